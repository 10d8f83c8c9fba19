"""benchmarks.run and benchmarks.report: what they write, refuse and show. No times are asserted."""

import json
import os
import re
import sys
import threading
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

import oxiscan
from oxiscan.testing import CASES, inputs

sys.path.insert(0, str(Path(__file__).parent.parent))  # pytest may have been started without the repository's folder
from benchmarks import gpu_peers, ops, records, report, run, timing  # noqa: E402

CPU = torch.device("cpu")
FIELDS = {
    *("op", "impl", "shape", "dtype", "pass", "us", "host_us", "floor_us", "launches", "peak_bytes", "error"),
    *("copy_gb_s", "matmul_tflops", "sm_clock_mhz", "gpu", "version", "commit", "method"),
}


def record(impl="oxiscan", us=120.0, **fields):
    known = {"op": "rmsnorm_gated", "shape": "hybrid8b_tp4/norm", "dtype": "bf16", "pass": "fwd"}
    figures = {"host_us": 9.0, "floor_us": 100.0, "launches": 1, "peak_bytes": 67_108_864, "error": 2e-3}
    run = {"copy_gb_s": 3000.0, "matmul_tflops": 720.0, "sm_clock_mhz": 1755.0, "gpu": "NVIDIA H100 80GB HBM3"}
    code = {"version": "0.1.0", "commit": None, "method": "profiler"}
    return known | figures | run | code | {"impl": impl, "us": us} | fields


def written(folder):
    (path,) = folder.iterdir()
    return json.loads(path.read_text())


@pytest.fixture(autouse=True)
def small_ceilings(monkeypatch):
    """A copy and a product of full size would take most of the test's time."""
    monkeypatch.setattr(timing, "ceilings", lambda device, effort: timing.Ceilings(10.0, 0.1, None, None))
    monkeypatch.setattr(timing, "QUICK", timing.Effort(100, 5, 2, 2))


def test_a_run_on_the_cpu(tmp_path, capsys):
    cases = "small/norm,small/ssd,cpu/state_update*"
    assert run.main(["--device", "cpu", "--cases", cases, "--quick", "--out", str(tmp_path)]) == 0
    found = written(tmp_path)
    assert [(r["shape"], r["pass"]) for r in found] == [
        *(("small/ssd", which) for which in ("fwd", "bwd")),
        *((f"small/{norm}", which) for norm in ("norm", "norm_gate_first", "norm_no_z") for which in ("fwd", "bwd")),
        ("cpu/state_update_batch8", "fwd"),
    ]
    for r in found:
        assert r.keys() == FIELDS == records.Record.__annotations__.keys()
        assert (r["op"], r["impl"], r["dtype"]) == (CASES[r["shape"]].op, "oxiscan", "float32")
        assert (r["method"], r["launches"], r["sm_clock_mhz"]) == ("wall", None, None)
        assert 0 < r["error"] < 1e-4 and min(r["us"], r["floor_us"]) > 0
        assert r["pass"] == "bwd" or r["host_us"] > 0  # a difference of two times may be anything
    assert "| small/norm | fwd | oxiscan |" in capsys.readouterr().out


def test_host_times_come_first(tmp_path, monkeypatch):
    """Before any kernel is timed: a GPU's profiler slows down every launch after it."""
    timed = []
    timing_of = {"host": timing.host_us, "kernels": timing.median_us}
    monkeypatch.setattr(timing, "host_us", lambda *arguments: timed.append("host") or timing_of["host"](*arguments))
    monkeypatch.setattr(timing, "median_us", lambda *args: timed.append("kernels") or timing_of["kernels"](*args))
    options = ["--device", "cpu", "--cases", "small/norm,small/conv_*", "--quick", "--out", str(tmp_path)]
    assert run.main(options) == 0
    passes = [r["pass"] for r in written(tmp_path)]
    assert len(passes) > 4
    assert timed == ["host"] * (passes.count("fwd") + 2 * passes.count("bwd")) + ["kernels"] * len(passes)


def test_the_host_time_of_a_backward_is_what_a_call_adds(monkeypatch):
    """To one of an autograd function that saves the same and does nothing, of many calls that share a backward."""
    results, taken = [], iter((640.0, 160.0))

    def host_us(call, device, effort):
        results.append(call())
        return next(taken)

    monkeypatch.setattr(timing, "host_us", host_us)
    bench = run.Bench(CPU, "float32", ["bwd"], timing.QUICK, peers=False)
    tensors = CASES["small/norm"].tensors(torch.float32, CPU)
    out = oxiscan.rmsnorm_gated(**tensors)
    us = bench.host_us(ops.OPS["rmsnorm_gated"], "bwd", partial(oxiscan.rmsnorm_gated), tensors, [torch.ones_like(out)])
    assert us == (640.0 - 160.0) / run.CALLS_OF_A_BACKWARD
    shapes = [t.shape for t in tensors.values()] * run.CALLS_OF_A_BACKWARD
    assert [[gradient.shape for gradient in gradients] for gradients in results] == [shapes, shapes]


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system pins no threads")
def test_host_times_of_a_gpu_are_taken_on_every_core(monkeypatch):
    """One after the other by all threads, which may afterwards run where they could before, also when a call fails."""
    cores, used, done, other = os.sched_getaffinity(0), [], threading.Event(), []
    thread = threading.Thread(target=lambda: (other.append(threading.get_native_id()), done.wait()))
    thread.start()
    monkeypatch.setattr(timing, "synchronize", lambda device: None)
    monkeypatch.setattr(timing, "warm_us", lambda call, device: None)
    effort = timing.Effort(100, 5, timing.LOOPS_A_CORE * len(cores), 1)
    here_and_there = lambda: (os.sched_getaffinity(0), os.sched_getaffinity(other[0]))  # noqa: E731
    us = timing.host_us(lambda: used.append(here_and_there()), torch.device("cuda"), effort)
    assert us > 0 and used == [({core}, {core}) for core in sorted(cores) for _ in range(timing.LOOPS_A_CORE)]
    assert here_and_there() == (cores, cores)
    done.set()
    thread.join()

    with pytest.raises(ZeroDivisionError):
        timing.host_us(lambda: 1 / 0, torch.device("cuda"), effort)
    assert os.sched_getaffinity(0) == cores


@pytest.mark.parametrize("which, name", [("fwd", "out0"), ("bwd", "dweight")])
def test_a_wrong_result_is_not_timed(which, name, tmp_path, capsys, monkeypatch):
    right = oxiscan.rmsnorm_gated

    def wrong(x, weight, **rest):
        if which == "fwd":
            return right(x, weight, **rest) * 1.01
        return right(x, weight + 0.01 * (weight - weight.detach()), **rest)  # the right result with another gradient

    monkeypatch.setattr(oxiscan, "rmsnorm_gated", wrong)
    options = ["--device", "cpu", "--cases", "small/norm_no_z,small/conv_*", "--passes", which, "--quick"]
    assert run.main([*options, "--out", str(tmp_path)]) == 1
    assert [r["shape"] for r in written(tmp_path)] == ["small/conv_channel_last"]
    assert f"small/norm_no_z {which} oxiscan: WRONG, not timed: {name}: relative RMS" in capsys.readouterr().out


def test_what_is_missing_and_what_breaks(tmp_path, capsys, monkeypatch):
    def missing(**arguments):
        raise NotImplementedError("no kernel here")

    def broken(**arguments):
        raise RuntimeError("a fault")

    options = ["--device", "cpu", "--cases", "small/norm_no_z", "--quick", "--out", str(tmp_path)]
    monkeypatch.setattr(oxiscan, "rmsnorm_gated", missing)
    assert run.main(options) == 0
    monkeypatch.setattr(oxiscan, "rmsnorm_gated", broken)
    assert run.main(options) == 1
    out = capsys.readouterr().out
    assert "small/norm_no_z oxiscan: skipped: no kernel here" in out
    assert "small/norm_no_z oxiscan: RuntimeError: a fault" in out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "options, message",
    [
        (["--cases", "nothing"], "nothing.*allowed: parts of rmsnorm_gated"),
        (["--passes", "fwd,up"], "--passes: got 'fwd,up'; allowed: fwd, bwd"),
        (["--device", "meta"], "--device: got meta; allowed: cpu, cuda"),
    ],
)
def test_the_command_line_is_checked(options, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        run.main(["--device", "cpu", *options])
    assert stopped.value.code == 2
    assert re.search(message, capsys.readouterr().err)


def test_bytes_are_those_of_memory():
    tensors = CASES["decode8b/state_update_batch8"].tensors(torch.bfloat16, CPU)
    out = tensors["x"].clone()
    state, x, heads, groups = 8 * 128 * 64 * 128 * 2, 8 * 128 * 64 * 2, 128, 2 * 8 * 8 * 128 * 2
    expected = 2 * state + 2 * x + groups + heads * (8 * 2 + 4 + 2 + 2)  # dt, A, D, dt_bias: one value a head
    assert ops.bytes_moved(ops.OPS["selective_state_update"], "fwd", tensors, [out]) == expected
    tensors = inputs.rmsnorm_gated(3, 8, bias=False, dtype=torch.float32, device=CPU)
    rows, weight = 3 * 8 * 4, 8 * 4
    norm = ops.OPS["rmsnorm_gated"]
    assert ops.bytes_moved(norm, "fwd", tensors, [tensors["x"]]) == 3 * rows + weight
    assert ops.bytes_moved(norm, "bwd", tensors, [tensors["x"]]) == 5 * rows + 2 * weight


def test_a_duplicate_lies_in_memory_as_the_tensor_does():
    for name in ("decode8b/state_update_batch1", "small/conv_channel_last"):
        for tensor in CASES[name].tensors(torch.float32, CPU).values():
            copy = ops.duplicate(tensor)
            assert torch.equal(copy, tensor) and copy.stride() == tensor.stride()
            assert copy.data_ptr() != tensor.data_ptr()


def test_the_floor_is_of_bytes_or_of_exponentials():
    ceilings = timing.Ceilings(copy_gb_s=3000, matmul_tflops=720, sm_clock_mhz=1750, processors=132)
    tensors = {"u": torch.empty(8, 5120, 2048, device="meta"), "A": torch.empty(5120, 16, device="meta")}
    exponentials = ops.OPS["selective_scan_fn"].exponentials(tensors)
    assert ceilings.floor_us(201_326_592, 0) == pytest.approx(67.1, abs=0.05)
    assert ceilings.floor_us(671_088_640, exponentials) == pytest.approx(363, abs=0.5)


def test_kernels_are_told_apart_by_the_flush(monkeypatch):
    """What the profiler of a GPU gives, by hand."""

    def kernel(name, us):
        return SimpleNamespace(name=name, time_range=SimpleNamespace(elapsed_us=lambda: us))

    timer = timing.KernelTimer.__new__(timing.KernelTimer)
    timer.flush = "fill"
    calls = [[3.0, 1.0], [5.0, 1.0], [4.0, 1.0]]
    events = [event for call in calls for event in (kernel("fill", 90.0), *(kernel("op", us) for us in call))]
    monkeypatch.setattr(timing, "gpu_events", lambda call: events)
    assert timer.measure(lambda: None, 3) == (5.0, 2, "profiler")
    with pytest.raises(RuntimeError, match="saw 3 calls with kernels after 3 flushes; expected 4 of each"):
        timer.measure(lambda: None, 4)


def test_short_kernels_are_timed_in_a_graph(capsys, monkeypatch):
    """As on a GPU, whose profiler and graph are played here."""

    def no_graph(prepare, nbytes, device, effort):
        prepare()()
        raise RuntimeError("no capture")

    bench = run.Bench(CPU, "float32", ["fwd"], timing.QUICK, peers=False)
    bench.kernels = SimpleNamespace(measure=lambda call, repeats: timing.Timing(3.0, 1, "profiler"))
    for replay in (lambda *arguments: 2.5, no_graph):
        monkeypatch.setattr(timing, "replay_us", replay)
        bench.check(CASES["cpu/state_update_batch8"])
        bench.measure(CASES["cpu/state_update_batch8"])
    assert [(r["us"], r["launches"], r["method"]) for r in bench.records] == [(2.5, 1, "graph"), (3.0, 1, "profiler")]
    assert "no graph, the profiler's time instead: RuntimeError: no capture" in capsys.readouterr().out


def test_gpu_events_are_in_order(monkeypatch):
    def event(device, start, annotation=False):
        interval = SimpleNamespace(start=start)
        return SimpleNamespace(device_type=device, time_range=interval, is_user_annotation=annotation)

    class Profiler:
        def __init__(self, activities):
            self.found = [
                event(DeviceType.CUDA, 3.0),
                event(DeviceType.CPU, 1.0),
                event(DeviceType.CUDA, 2.0),
                event(DeviceType.CUDA, 0.0, annotation=True),
            ]

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def events(self):
            return self.found

    monkeypatch.setattr(timing, "profile", Profiler)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *device: None)
    assert [e.time_range.start for e in timing.gpu_events(lambda: None)] == [2.0, 3.0]


def test_a_peer_that_cannot_be_imported_is_absent(capsys, monkeypatch):
    def load():
        raise OSError("undefined symbol")

    taken = gpu_peers.Peer("there", "rmsnorm_gated", lambda: "a function")
    refusing = gpu_peers.Peer("narrow", "rmsnorm_gated", lambda: "another", lambda case: False)
    broken = gpu_peers.Peer("broken", "rmsnorm_gated", load)
    monkeypatch.setattr(gpu_peers, "PEERS", [taken, refusing, broken])
    for _ in range(2):
        assert gpu_peers.load(CASES["small/norm"]) == {"there": "a function"}
    assert capsys.readouterr().out == "broken: absent for rmsnorm_gated: OSError: undefined symbol\n"


def test_which_norms_fla_takes():
    (fla,) = [peer for peer in gpu_peers.PEERS if peer.package == "fla"]
    norms = [name for name, case in CASES.items() if case.op == fla.op and fla.takes(case)]
    assert norms == ["cpu/norm", "mamba2_2p7b/norm"]


def test_a_report(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="the plot needs matplotlib")
    found = [record(), record("mamba_ssm", us=240.0), record(us=190.0, **{"pass": "bwd"})]
    records.write(found, tmp_path / "results" / "gpu.json")
    (tmp_path / "results" / "other.json").write_text("{}")
    plot = tmp_path / "plots" / "times.png"
    assert report.main(["--out", str(tmp_path / "results"), "--plot", str(plot)]) == 0
    out = capsys.readouterr().out
    assert "## NVIDIA H100 80GB HBM3" in out and "### rmsnorm_gated, bf16" in out
    assert "| hybrid8b_tp4/norm | fwd | mamba_ssm | 240 | 100 | 42% | 9 | 1 | 67.1 | 2.0e-03 | profiler | 2.00 |" in out
    assert len([line for line in out.splitlines() if line.startswith("| hybrid8b_tp4/norm")]) == 3
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_a_report_of_something_else_is_refused(tmp_path, capsys):
    other = tmp_path / "other.json"
    other.write_text('[{"op": "rmsnorm_gated"}]')
    for arguments in ([str(other)], ["--out", str(tmp_path)]):
        with pytest.raises(SystemExit):
            report.main(arguments)
        assert "allowed: " in capsys.readouterr().err
