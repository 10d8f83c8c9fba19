"""Threads, forks, panics and the command line."""

import json
import multiprocessing
import os
import re
import subprocess
import sys
import threading
import time

import pytest
import torch

import oxiscan
from oxiscan import _C
from oxiscan.info import _chunk_scan
from oxiscan.testing import inputs
from oxiscan.testing.self_test import self_test

CPU = torch.device("cpu")


def scan():
    torch.manual_seed(0)
    tensors = inputs.ssd(dtype=torch.float32, device=CPU)
    return oxiscan.mamba_chunk_scan_combined(**tensors, chunk_size=32)


def print_pool_threads() -> None:
    """The number of this package's threads with 3, then with 5 threads in torch: one pool each."""
    for threads, total in ((3, 3), (5, 8)):
        torch.set_num_threads(threads)
        scan()
        deadline = time.monotonic() + 10
        found = 0
        while found != total and time.monotonic() < deadline:  # a thread takes its name after it has started
            names = [open(f"/proc/self/task/{task}/comm").read() for task in os.listdir("/proc/self/task")]
            found = sum(name.startswith("oxiscan") for name in names)
        print(found)


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads through /proc")
def test_threads_follow_torch():
    code = "import sys; sys.path.insert(0, sys.argv[1]); import test_process; test_process.print_pool_threads()"
    command = [sys.executable, "-c", code, os.path.dirname(__file__)]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout.split() == ["3", "8"]


def test_calls_from_several_threads_at_once():
    expected = scan()
    tensors = inputs.ssd(dtype=torch.float32, device=CPU)
    torch.manual_seed(0)
    tensors = inputs.ssd(dtype=torch.float32, device=CPU)
    results = [None] * 8

    def work(i):
        results[i] = oxiscan.mamba_chunk_scan_combined(**tensors, chunk_size=32)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(len(results))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert all(torch.equal(result, expected) for result in results)


def child(queue):
    # numpy, as sharing a tensor between processes needs more than a queue.
    queue.put(scan().numpy())


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_forked_child_computes_too():
    expected = scan()  # starts the parent's threads, which the child will not have
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=child, args=(queue,))
    process.start()
    result = queue.get(timeout=60)
    process.join(timeout=60)
    assert process.exitcode == 0
    assert torch.equal(torch.from_numpy(result), expected)


def test_a_panic_is_an_exception():
    with pytest.raises(RuntimeError, match="internal error, please report it: on purpose"):
        _C._panic("on purpose")
    assert scan().isfinite().all()


def test_a_panic_in_a_worker_thread_is_an_exception():
    with pytest.raises(RuntimeError, match="internal error, please report it: in a worker"):
        _C._panic("in a worker", worker=True)
    assert scan().isfinite().all()


def test_info():
    command = [sys.executable, "-m", "oxiscan.info"]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert re.search(rf"^oxiscan +{re.escape(oxiscan.__version__)}$", text, re.MULTILINE) and "cpu threads" in text
    info = json.loads(subprocess.run([*command, "--json"], check=True, capture_output=True, text=True).stdout)
    assert info["oxiscan"] == oxiscan.__version__
    assert info["torch"] == torch.__version__
    assert info["backends"] == _C.build_info()["backends"] and "cpu" in info["backends"]
    assert isinstance(info["gpus"], list) and info["cpu_threads"] >= 1
    assert ("chunk scan" in text) == any(gpu["chunk_scan"] for gpu in info["gpus"])


@pytest.mark.parametrize(("arch", "kernels"), [("sm_90a", {"wgmma", "mma.sync"}), ("sm_80", {"mma.sync"})])
def test_info_says_which_kernels_run_the_chunk_scan(arch, kernels):
    listed = _chunk_scan(arch)
    assert set(listed.values()) == kernels | {"recurrence on CUDA cores, gradients by mma.sync"}
    fast = next(iter(listed))
    assert "headdim 64, 80, 96, 128 x dstate 64, 128, 256" in fast and "up to 256" in next(reversed(listed))


def test_info_lists_the_compiled_kernels():
    command = [sys.executable, "-m", "oxiscan.info", "--kernels"]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    build = oxiscan._C.build_info()
    if not torch.cuda.is_available():
        assert {line.split()[1] for line in lines[1:]} == set(build["cuda_archs"])
    files = {"mamba_chunk_scan_combined": "ssd"}
    prefixes = tuple(files.get(op, op.removesuffix("_fn")) for op in build["cuda_ops"])
    assert all(line.startswith(prefixes) for line in lines[1:])
    assert ("cuda" in build["backends"]) == (len(lines) > 1)


def test_the_self_test_passes():
    command = [sys.executable, "-m", "oxiscan.info", "--self-test"]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    *lines, last = text.splitlines()
    assert last == "self-test: pass"
    tested = {line.split()[1] for line in lines}
    assert tested > {"rmsnorm_gated", "selective_state_update", "mamba_chunk_scan_combined", "state_passing"}


def test_a_self_test_that_fails_says_so(monkeypatch):
    monkeypatch.setattr(oxiscan, "rmsnorm_gated", lambda x, *args, **kwargs: x * kwargs.get("weight", 1))
    outcomes = {outcome.op: outcome.failure for outcome in self_test(CPU) if outcome.dtype == torch.float32}
    assert "relative RMS error" in outcomes.pop("rmsnorm_gated")
    assert not any(outcomes.values())
