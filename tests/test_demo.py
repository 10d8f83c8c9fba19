"""The demo's command at tiny sizes: what it leaves behind, and that interrupting it changes nothing."""

import importlib.util
import json
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("tqdm", reason="the demo needs tqdm")
pytest.importorskip("matplotlib", reason="the demo needs matplotlib")
if importlib.util.find_spec("megatron") is None:
    pytest.skip("needs megatron-core: pip install oxiscan[megatron]", allow_module_level=True)

DEMO = Path(__file__).parent.parent / "examples" / "train_hybrid.py"
STEPS, COMPARED, CHECKPOINT_EVERY = 200, 3, 5


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few source files, of which the hash of the name holds some out."""
    folder = tmp_path_factory.mktemp("text")
    for number in range(60):
        lines = [f"def function_{number}_{line}(x):\n    return x + {line}\n\n" for line in range(20)]
        (folder / f"module_{number}.py").write_text("".join(lines))
    (folder / "tests").mkdir()
    (folder / "tests" / "left_out.py").write_text("#" * 100_000)
    return folder


def command(out: Path, text: Path, *arguments: str) -> list[str]:
    sizes = {
        "--text": text,
        "--out": out,
        "--steps": STEPS,
        "--compare-steps": COMPARED,
        "--warmup-steps": 4,
        "--checkpoint-every": CHECKPOINT_EVERY,
        "--batch-size": 2,
        "--seqlen": 16,
        "--layer-pattern": "M*-",
        "--hidden-size": 16,
        "--ffn-hidden-size": 16,
        "--attention-heads": 2,
        "--dstate": 4,
        "--headdim": 8,
        "--heldout-windows": 4,
        "--sample-bytes": 8,
    }
    options = [str(part) for pair in sizes.items() for part in pair]
    return [sys.executable, str(DEMO), *options, *arguments]


def run(out: Path, text: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(out, text, *arguments), capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    out = tmp_path_factory.mktemp("finished") / "demo-out"
    process = run(out, text)
    assert process.returncode == 0, process.stdout + process.stderr
    return out


def checkpoint(out: Path) -> dict[str, Any]:
    import torch

    return torch.load(out / "checkpoint.pt", weights_only=True)


def test_what_a_finished_run_leaves(finished: Path) -> None:
    assert {path.name for path in finished.iterdir()} == {"metrics.json", "loss.png", "sample.txt", "checkpoint.pt"}
    metrics = json.loads((finished / "metrics.json").read_text())
    assert metrics["steps"] == STEPS
    assert metrics["first_train_loss"] == metrics[f"losses_first_{COMPARED}"][0] > metrics["last_train_loss"] > 0
    assert len(metrics[f"losses_first_{COMPARED}"]) == len(metrics[f"reference_losses_first_{COMPARED}"]) == COMPARED
    assert metrics["max_relative_difference"] < 1e-3
    assert 0 < metrics["heldout_bits_per_byte"] < 16
    assert metrics["tokens_per_s"] > 0 and metrics["seconds"] > 0
    assert metrics["train_bytes"] > metrics["heldout_bytes"] > 0
    assert metrics["train_bytes"] + metrics["heldout_bytes"] < 100_000  # tests/ is left out
    assert set(metrics["versions"]) == {"oxiscan", "megatron_core", "torch", "python"}
    assert (finished / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (finished / "sample.txt").read_text().startswith("import os\n\n\ndef ")
    assert len(checkpoint(finished)["losses"]) == STEPS


def test_a_finished_run_is_not_repeated(finished: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    specification = importlib.util.spec_from_file_location("train_hybrid", DEMO)
    assert specification is not None and specification.loader is not None
    demo = importlib.util.module_from_spec(specification)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # megatron-core's, at import
        specification.loader.exec_module(demo)

    before = (finished / "metrics.json").stat().st_mtime_ns
    assert demo.main(command(finished, text)[2:]) == 0
    assert "--restart trains anew" in capsys.readouterr().out
    assert (finished / "metrics.json").stat().st_mtime_ns == before
    with pytest.raises(SystemExit, match=r"hidden_size 16 \(now 32\)"):
        demo.main(command(finished, text, "--hidden-size", "32")[2:])


def interrupt(out: Path, text: Path, signum: signal.Signals, step: int) -> int:
    """Runs the demo, sends `signum` once its checkpoint is past `step`, and returns the step it ended at."""
    process = subprocess.Popen(command(out, text), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    with process:
        deadline = time.monotonic() + 120
        while not ((out / "checkpoint.pt").exists() and len(checkpoint(out)["losses"]) > step):
            assert process.poll() is None and time.monotonic() < deadline, "no checkpoint came"
            time.sleep(0.005)
        process.send_signal(signum)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signum, output
    assert "the same command goes on from there" in output
    return len(checkpoint(out)["losses"])


def test_an_interrupted_run_goes_on_to_the_same_losses(finished: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "demo-out"
    first = interrupt(out, text, signal.SIGINT, 0)
    second = interrupt(out, text, signal.SIGTERM, first)
    assert first < second < STEPS
    assert not (out / "metrics.json").exists()

    last = run(out, text)
    assert last.returncode == 0, last.stdout + last.stderr
    assert f"going on from step {second} " in last.stdout
    assert checkpoint(out)["losses"] == checkpoint(finished)["losses"]
