PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := $(shell find build cuda src python -name '*.rs' -o -name '*.cu' -o -name '*.cuh' -o -name '*.h' -o -name '*.py' -o -name '*.pyi')

# torch's threads wait for work by spinning, for long by default, on cores that this package's threads could use.
export GOMP_SPINCOUNT ?= 10000
# Cargo builds against the environment's Python, whoever calls it.
export PYO3_PYTHON := $(abspath $(BIN)/python)
# As an extension module also for cargo's own tests: they call no Python, so no libpython need be installed.
export PYO3_BUILD_EXTENSION_MODULE := 1

.PHONY: demo test lint clean

demo: $(VENV)/.oxiscan
	$(BIN)/python examples/train_hybrid.py --out demo-out

test: $(VENV)/.oxiscan lint
	cargo test --release
	$(BIN)/python -m pytest

# Clippy's builds share nothing with cargo's: without cubins it need not compile the kernels a second time.
lint: $(VENV)/.oxiscan
	cargo fmt --check
	OXISCAN_CUDA_ARCHS=none cargo clippy --all-targets -- -D warnings
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/stubtest oxiscan._C

$(VENV)/.requirements: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -r requirements.txt
	touch $@

$(VENV)/.oxiscan: $(VENV)/.requirements Cargo.toml Cargo.lock pyproject.toml $(SOURCES)
	$(BIN)/python -m pip install --quiet --no-deps .
	touch $@

clean:
	rm -rf $(VENV) target demo-out
