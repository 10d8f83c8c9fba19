import os
import re
from collections.abc import Generator

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic products in torch; before it starts CUDA

import hypothesis  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

from oxiscan import _C  # noqa: E402
from oxiscan.testing import inputs  # noqa: E402

FLOAT64_IS_CPU_ONLY = "float64 is the CPU backend's alone"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="the backend that the op tests run on")
    parser.addoption("--examples", type=int, help="random examples for each property (default: 200, always the same)")


def pytest_configure(config: pytest.Config) -> None:
    examples = config.getoption("--examples")
    hypothesis.settings.register_profile(
        "oxiscan",
        max_examples=examples or 200,
        derandomize=examples is None,
        print_blob=True,
        database=None,
        deadline=None,
    )
    hypothesis.settings.load_profile("oxiscan")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, None, None]:
    """A test of an op without CUDA kernels yet is skipped by the op's own message; no other is."""
    try:
        return (yield)
    except NotImplementedError as error:
        missing = re.search(r"got a tensor on cuda:\d+.*; allowed: cpu, the only backend of (\w+) so far", str(error))
        on_cuda = torch.device(item.config.getoption("--device")).type == "cuda"
        if not on_cuda or missing is None:
            raise
        if missing[1] in _C.build_info()["cuda_ops"]:
            raise
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    device = torch.device(request.config.getoption("--device"))
    if device.type == "cuda" and not torch.cuda.is_available():
        pytest.skip("--device cuda: no GPU on this machine")
    return device


@pytest.fixture(scope="session")
def exact(device: torch.device) -> torch.dtype:
    """The widest dtype that the backend computes in."""
    return inputs.floats(device)[0]


@pytest.fixture
def float64(device: torch.device) -> torch.dtype:
    """float64, for what nothing narrower shows: gradcheck."""
    if device.type != "cpu":
        pytest.skip(FLOAT64_IS_CPU_ONLY)
    return torch.float64


@pytest.fixture(autouse=True)
def dtypes_of_the_backend(request: pytest.FixtureRequest) -> None:
    """Of the dtypes that a test is parametrized by, CUDA takes all but float64."""
    if "device" not in request.fixturenames or request.getfixturevalue("device").type == "cpu":
        return
    parameters = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    if any(value is torch.float64 for value in parameters.values()):
        pytest.skip(FLOAT64_IS_CPU_ONLY)


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Uninitialised tensors hold NaN: an output that an op does not write shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
