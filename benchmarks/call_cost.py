"""What one call costs on the host, on tensors too small for arithmetic to matter.

    python benchmarks/call_cost.py --json call_cost.json

For each op, microseconds of the forward under grad and of forward and backward, by how the kernels are called: `eager`
(straight to the compiled module), `registered` (the same through torch.library), `compiled` (torch.compile).
"""

import argparse
import json
import timeit
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch._inductor.config
from torch import Tensor

import oxiscan
from oxiscan.ops import _kernels
from oxiscan.testing import inputs

CPU = torch.device("cpu")
SMALL: dict[str, Any] = {"batch": 1, "seqlen": 4, "dtype": torch.float32, "device": CPU}


def cases() -> dict[str, tuple[Callable[..., Tensor], dict[str, Tensor]]]:
    x, z = (inputs.normal(4, 8, dtype=torch.float32, device=CPU) for _ in range(2))
    return {
        "rmsnorm_gated": (oxiscan.rmsnorm_gated, {"x": x, "weight": torch.ones(8), "z": z}),
        "causal_conv1d_fn": (partial(oxiscan.causal_conv1d_fn, activation="silu"), inputs.conv(dim=8, **SMALL)),
        "mamba_chunk_scan_combined": (
            partial(oxiscan.mamba_chunk_scan_combined, chunk_size=64, dt_softplus=True),
            inputs.ssd(nheads=2, headdim=4, ngroups=1, dstate=4, **SMALL),
        ),
    }


def calls(op: Callable[..., Tensor], tensors: dict[str, Tensor]) -> dict[str, Callable[[], Any]]:
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
    gradient = torch.ones_like(op(**leaves))

    def both() -> None:
        torch.autograd.grad(op(**leaves), list(leaves.values()), gradient)

    return {"forward": partial(op, **leaves), "forward + backward": both}


def measure(op: Callable[..., Tensor], tensors: dict[str, Tensor], rounds: int) -> dict[str, dict[str, float]]:
    """Microseconds by path and call: the shortest of `rounds` averages, the paths in turn within each round."""
    direct = calls(op, tensors)
    paths = {"eager": direct, "registered": direct, "compiled": calls(torch.compile(op, fullgraph=True), tensors)}
    shortest = {path: dict.fromkeys(direct, float("inf")) for path in paths}
    for _ in range(rounds):
        for path, timed in paths.items():
            forced = mock.patch.object(_kernels, "_tracing", lambda: True)
            with forced if path == "registered" else nullcontext():
                for name, call in timed.items():
                    call()
                    average = timeit.timeit(call, number=100) / 100 * 1e6
                    shortest[path][name] = min(shortest[path][name], average)
    return shortest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=50, help="averages to take the shortest of")
    parser.add_argument("--json", metavar="PATH", help="also write the figures there")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch._inductor.config.compile_threads = 1  # no processes that start up beside what is timed
    figures = {name: measure(op, tensors, arguments.rounds) for name, (op, tensors) in cases().items()}

    print(f"{'microseconds':26}{'':12}{'forward':>10}{'forward + backward':>22}")
    for name, paths in figures.items():
        for path, times in paths.items():
            print(f"{name:26}{path:12}{times['forward']:10.1f}{times['forward + backward']:22.1f}")
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump({"torch": torch.__version__, "microseconds": figures}, file, indent=2)


if __name__ == "__main__":
    main()
