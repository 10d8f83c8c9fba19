"""The CPU backend beside what one would write in plain torch: time and peak memory of both sides, in one run.

    python benchmarks/cpu.py [--json FILE] [--threads N] [--rounds N]

float32. The sides are compared with each other before they are timed, and take turns in every round; peak memory is
taken in a process of its own for each side.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import peers
import torch
from machine import processor
from torch import Tensor

import oxiscan
from oxiscan.testing import CASES, assert_close, peak_memory, run

Side = Callable[..., Tensor]
CPU = torch.device("cpu")


def chunked(chunk_size: int) -> Side:
    return lambda **tensors: peers.chunked_ssd(**tensors, chunk_size=chunk_size)


#: Of each case: arguments that plain torch is spared, and the ways to write it.
PEERS: dict[str, tuple[set[str], dict[str, Side]]] = {
    "cpu/ssd": ({"z", "initial_states"}, {f"chunks of {size}": chunked(size) for size in (32, 64, 128, 256)}),
    "cpu/selective_scan": ({"z", "initial_state"}, {"token loop": peers.token_loop_selective_scan}),
    "cpu/conv": ({"initial_states"}, {"torch": peers.conv1d_silu}),
    "cpu/conv_channel_last": ({"initial_states"}, {"torch": peers.conv1d_silu}),
    "cpu/norm": (set(), {"torch": peers.gated_rms_norm}),
}


def arguments(name: str, **sizes: Any) -> dict[str, Tensor]:
    tensors = CASES[name].tensors(torch.float32, CPU, **sizes)
    return {k: t for k, t in tensors.items() if k not in PEERS[name][0]}


def sides(name: str) -> dict[str, Side]:
    case = CASES[name]
    op = getattr(oxiscan, case.op)
    return {"oxiscan": lambda **tensors: op(**tensors, **case.options)} | PEERS[name][1]


def check(name: str) -> None:
    """Raise AssertionError unless all sides give the same outputs and gradients."""
    results = {side: run(call, arguments(name), {}) for side, call in sides(name).items()}
    for side, values in results.items():
        for value, tensor in values.items():
            assert_close(f"{name}, {side}: {value}", tensor, results["oxiscan"][value], 1e-4)


def forward(side: Side, tensors: dict[str, Tensor]) -> Callable[[], Any]:
    return lambda: side(**tensors)


def forward_backward(side: Side, tensors: dict[str, Tensor]) -> Callable[[], Any]:
    """Forward, and gradients of all arguments."""
    leaves = {k: t.detach().requires_grad_() for k, t in tensors.items()}
    gradient = torch.randn_like(next(iter(tensors.values())))  # results have the first argument's shape
    return lambda: torch.autograd.grad(side(**leaves), list(leaves.values()), gradient)


PASSES = {"forward": forward, "forward + backward": forward_backward}


def times(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median milliseconds of each side. In a turn a side is called four times, the first to settle caches and memory.

    A side that takes more than half a second a call gets three calls in all.
    """
    samples: dict[str, list[float]] = {side: [] for side in calls}
    for _ in range(rounds):
        for side, call in calls.items():
            if len(samples[side]) >= 3 and statistics.median(samples[side]) > 500:
                continue
            for _ in range(4):
                begin = time.perf_counter()
                call()
                samples[side].append((time.perf_counter() - begin) * 1e3)
            del samples[side][-4]
    return {side: statistics.median(values) for side, values in samples.items()}


def memory(name: str, side: str) -> float:
    """Peak MB of one side's forward and backward, after a small call that starts threads and libraries."""
    command = [sys.executable, __file__, "--memory", name, side, "--threads", str(torch.get_num_threads())]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def measure_memory(name: str, side: str) -> float:
    call = sides(name)[side]
    forward_backward(call, arguments(name, seqlen=256))()
    return peak_memory(forward_backward(call, arguments(name))) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of both sides")
    parser.add_argument("--rounds", type=int, default=10, help="turns of each side, of three timed calls")
    parser.add_argument("--memory", nargs=2, metavar=("CASE", "SIDE"), help="print one side's peak MB, nothing else")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.memory:
        print(measure_memory(*options.memory))
        return

    print(f"{'case':<24}{'side':<16}{'forward ms':>12}{'+ backward ms':>15}{'peak MB':>10}   oxiscan is")
    found: dict[str, Any] = {}
    for name in PEERS:
        check(name)
        tensors = arguments(name)
        found[name] = {side: {"peak MB": memory(name, side)} for side in sides(name)}
        for which, build in PASSES.items():
            calls = {side: build(call, tensors) for side, call in sides(name).items()}
            for side, value in times(calls, options.rounds).items():
                found[name][side][f"{which} ms"] = value
        ours = found[name]["oxiscan"]
        for side, row in found[name].items():
            both = row["forward ms"], row["forward + backward ms"]
            factors = [row[f"{which} ms"] / ours[f"{which} ms"] for which in PASSES]
            note = "" if side == "oxiscan" else f"   {factors[0]:.2f} and {factors[1]:.2f} times as fast"
            print(f"{name:<24}{side:<16}{both[0]:>12.2f}{both[1]:>15.2f}{row['peak MB']:>10.1f}{note}", flush=True)

    if options.json:
        machine = {"processor": processor(), "threads": options.threads, "torch": torch.__version__}
        about = machine | {"date": datetime.now(UTC).date().isoformat(), "oxiscan": oxiscan.__version__}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(about | {"cases": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
