"""Every CUDA kernel under NVIDIA's compute-sanitizer: `python tests/sanitizer.py [TOOL...]`, all four tools by default.

Prints a line for each tool, with its report where it found something; the exit status says whether one did. In one
process a tool takes more than nine minutes; `--jobs N` runs N of them at once, `--ops` leaves ops out.

The calls compare nothing, `pytest --device cuda` does that. Arguments are made on the CPU and copied, with the memory
that surrounds them, so that no kernels run but this package's: the tools slow those down alone, and initcheck, which
takes memory for uninitialised that a kernel it does not see has written, needs no filter. It does not follow what bulk
copies write either: states that the scan's kernels leave for one another lie in memory filled with zeros here, and that
all that is read of them was written is for the tests to show, where memory holds NaN first.
"""

import argparse
import itertools
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import oxiscan
from oxiscan.ops import ssd
from oxiscan.testing import inputs

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
CPU = torch.device("cpu")
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
Call = tuple[str, Callable[[], None]]


def on_gpu(tensor: Tensor) -> Tensor:
    """The tensor with all of the memory that it is a view of, copied as it is."""
    memory = tensor.new_empty(0).set_(tensor.untyped_storage()).to("cuda")
    return memory.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def unaligned(tensor: Tensor) -> Tensor:
    return torch.zeros(tensor.numel() + 1, dtype=tensor.dtype)[1:].view(tensor.shape).copy_(tensor)


def expanded(tensor: Tensor) -> Tensor:
    return tensor[:1].clone().expand_as(tensor)


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": torch.clone,
    "unaligned": unaligned,
    "expanded": expanded,
    **{name: lambda t, name=name: inputs.laid_out(t, name) for name in inputs.LAYOUTS if name != "contiguous"},
}


def norm(shape: tuple[int, ...], view: str, options: dict[str, Any], **sizes: Any) -> Call:
    def call() -> None:
        tensors = inputs.rmsnorm_gated(*shape, **sizes, device=CPU)
        tensors = {name: on_gpu(VIEWS[view](t)).requires_grad_() for name, t in tensors.items()}
        gradient = on_gpu(VIEWS[view](inputs.normal(*shape, dtype=sizes["dtype"], device=CPU)))
        out = oxiscan.rmsnorm_gated(**tensors, **options)
        torch.autograd.grad(out, list(tensors.values()), gradient)

    return f"rmsnorm_gated {shape} {view} {options} {sizes}", call


def norms() -> Iterator[Call]:
    groups = [(1, 1), (7, 7), (33, 11), (64, 64), (100, 50), (264, 8), (1024, 256), (1025, 1025), (4096, 4096)]
    for (dim, group_size), dtype, first in itertools.product(groups, (F32, BF16, F16), (False, True)):
        options = {"group_size": group_size, "norm_before_gate": first}
        yield norm((33, dim), "contiguous", options, dtype=dtype)
        yield norm((33, dim), "contiguous", options, dtype=dtype, bias=False)
        yield norm((1, dim), "contiguous", options, dtype=dtype, z=False, bias=False, parameters=F32)
    for dim, dtype in itertools.product((8192, 16384, 65536), (F32, BF16)):
        yield norm((3, dim), "contiguous", {}, dtype=dtype)
        yield norm((3, dim), "contiguous", {"norm_before_gate": False}, dtype=dtype, bias=False)
        yield norm((3, dim), "contiguous", {"group_size": dim // 2}, dtype=dtype, parameters=F32)
    for view, dim, dtype in itertools.product(VIEWS, (36, 1024), (F32, BF16)):
        yield norm((2, 5, dim), view, {}, dtype=dtype)
        yield norm((2, 5, dim), view, {"norm_before_gate": False}, dtype=dtype, bias=False)
    yield norm((0, 64), "contiguous", {}, dtype=F32)


def step(view: str, slots: list[int] | None, one_value: bool, indices: torch.dtype = torch.int32, **sizes: Any) -> Call:
    def call() -> None:
        tensors = inputs.state_update(**sizes, batch=3, device=CPU)
        arguments = {name: VIEWS[view](t) for name, t in tensors.items() if "state" not in name}
        if one_value:  # a head
            for name in ("dt", "D", "dt_bias"):
                arguments[name] = tensors[name][..., :1].clone().expand_as(tensors[name])
            arguments["A"] = tensors["A"][..., :1, :1].clone().expand_as(tensors["A"])
        arguments |= {
            name: VIEWS["contiguous" if view == "expanded" else view](t)
            for name, t in tensors.items()
            if "state" in name
        }
        if slots is not None:
            arguments["state_batch_indices"] = torch.tensor(slots, dtype=indices).repeat_interleave(2)[::2]
        oxiscan.selective_state_update(**{name: on_gpu(t) for name, t in arguments.items()}, dt_softplus=True)

    return f"selective_state_update {view} {slots} {one_value} {indices} {sizes}", call


def steps() -> Iterator[Call]:
    some = [2, -1, 0]
    for dstate, dtype, state, one in itertools.product(
        (1, 7, 16, 64, 100, 128, 256), (F32, BF16, F16), (F32, BF16, F16), (False, True)
    ):
        yield step("contiguous", None, one, dim=33, dstate=dstate, dtype=dtype, state=state)
    for dim, dstate, seqlen, dtype in itertools.product((1, 3, 64, 65, 130), (7, 128), (None, 0, 3), (F32, BF16)):
        sizes = {"dim": dim, "dstate": dstate, "seqlen": seqlen, "dtype": dtype, "parameters": F32}
        yield step("contiguous", some, dim % 2 == 0, **sizes, intermediate=True)
    for view, dstate, seqlen, one in itertools.product(VIEWS, (24, 128), (None, 3), (False, True)):
        yield step(view, some, one, dim=64, dstate=dstate, seqlen=seqlen, dtype=BF16, state=F32, intermediate=True)
    for slots, indices in itertools.product(([3, -2, 2**31 - 1], [-1, -1, -1], [0, 1, 2]), (torch.int32, torch.int64)):
        yield step("contiguous", slots, False, indices, dim=64, dstate=128, dtype=F32, seqlen=2, intermediate=True)
    yield step("contiguous", None, False, nheads=None, ngroups=None, dim=130, dstate=16, dtype=BF16, parameters=F32)


def conv(view: str, channel_last: bool, lengths: tuple[int, ...] | None = None, **sizes: Any) -> Call:
    def call() -> None:
        tensors = inputs.conv(**sizes, device=CPU)
        shape = tensors["x"].shape
        rows = shape[0]
        if lengths is not None:
            rows = len(lengths)
            tensors["cu_seqlens"] = inputs.cu_seqlens(*lengths, device=CPU)
            states = inputs.normal(rows, shape[1], sizes["width"] - 1, dtype=sizes["dtype"], device=CPU)
            tensors["initial_states"] = states

        def on_gpu_as_viewed(tensor: Tensor) -> Tensor:
            if tensor.shape == shape and channel_last:
                return on_gpu(VIEWS[view](tensor.transpose(1, 2).contiguous())).transpose(1, 2)
            return on_gpu(VIEWS[view](tensor) if tensor.is_floating_point() else tensor)

        arguments = {name: on_gpu_as_viewed(t) for name, t in tensors.items()}
        leaves = [t.requires_grad_() for t in arguments.values() if t.is_floating_point()]
        gradients = [
            on_gpu_as_viewed(inputs.normal(*size, dtype=sizes["dtype"], device=CPU))
            for size in (shape, (rows, shape[1], sizes["width"] - 1))
        ]
        outputs = oxiscan.causal_conv1d_fn(**arguments, return_final_states=True, activation="silu")
        torch.autograd.grad(outputs, leaves, gradients)

    return f"causal_conv1d_fn {view} {channel_last} {lengths} {sizes}", call


def convs() -> Iterator[Call]:
    layouts = (False, True)
    for last, dtype, width, seq_idx in itertools.product(layouts, (F32, BF16, F16), (2, 4, 8), (False, True)):
        sizes = {"dtype": dtype, "width": width, "seq_idx": seq_idx}
        for dim, seqlen in ((1, 1), (7, 33), (64, 64), (130, 130), (256, 257), (24, 0)):
            yield conv("contiguous", last, dim=dim, seqlen=seqlen, **sizes)
        yield conv("contiguous", last, batch=1, dim=20, seqlen=2100, **sizes)
    for last, view, dim, dtype in itertools.product(layouts, VIEWS, (64, 35), (F32, BF16)):
        yield conv(view, last, dim=dim, seqlen=72, width=4, dtype=dtype)
        yield conv(view, last, dim=dim, seqlen=71, width=4, dtype=dtype, seq_idx=True)
    for last, lengths in itertools.product(layouts, ((0, 0), (1, 0, 2, 60), (0, 40, 30))):
        yield conv("contiguous", last, lengths, batch=1, dim=36, seqlen=71 if sum(lengths) else 0, width=4, dtype=BF16)


def conv_step(view: str, slots: list[int] | None, **sizes: Any) -> Call:
    def call() -> None:
        tensors = inputs.conv_update(**sizes, batch=3, device=CPU)
        tensors = {name: VIEWS[view](t) if t.is_floating_point() else t for name, t in tensors.items()}
        if slots is not None:
            tensors["conv_state_indices"] = torch.tensor(slots)
        oxiscan.causal_conv1d_update(**{name: on_gpu(t) for name, t in tensors.items()}, activation="silu")

    return f"causal_conv1d_update {view} {slots} {sizes}", call


def conv_steps() -> Iterator[Call]:
    for dtype, state_len, seqlen, circular in itertools.product((F32, BF16), (4, 6), (None, 0, 5), (False, True)):
        sizes = {"dtype": dtype, "state_len": state_len, "seqlen": seqlen, "circular": circular}
        for slots in (None, [2, -1, 0], [3, -2, 2**40]):
            yield conv_step("contiguous", slots, dim=130, intermediate=seqlen == 5, **sizes)
    for view in VIEWS:
        if view != "expanded":
            yield conv_step(view, None, dim=36, state_len=4, dtype=BF16)


def varlen_states() -> Iterator[Call]:
    def call(lengths: tuple[int, ...], state_len: int, view: str) -> None:
        x = on_gpu(VIEWS[view](inputs.normal(20, 37, dtype=BF16, device=CPU)))
        oxiscan.causal_conv1d_varlen_states(x, on_gpu(inputs.cu_seqlens(*lengths, device=CPU)), state_len)

    for lengths, state_len, view in itertools.product(((20,), (0, 3, 1, 16), (5, 90, -100)), (0, 3, 9), VIEWS):
        yield f"causal_conv1d_varlen_states {lengths} {state_len} {view}", partial(call, lengths, state_len, view)


def passing(view: str, wide: bool, **sizes: Any) -> Call:
    def call() -> None:
        tensors = inputs.state_passing(**sizes, device=CPU)
        if wide and "initial_states" in tensors:
            tensors["initial_states"] = tensors["initial_states"].float()
        final = inputs.normal(*tensors["states"][:, 0].shape, dtype=F32, device=CPU)
        gradients = [on_gpu(VIEWS[view](t)) for t in (tensors["states"], final)]
        leaves = {name: on_gpu(VIEWS[view](t)).requires_grad_() for name, t in tensors.items()}
        outputs = oxiscan.state_passing(**leaves)
        torch.autograd.grad(outputs, list(leaves.values()), gradients)

    return f"state_passing {view} {wide} {sizes}", call


def passings() -> Iterator[Call]:
    for dtype, nchunks, (headdim, dstate) in itertools.product(
        (F32, BF16, F16), (1, 4, 9), ((1, 1), (3, 7), (5, 100), (33, 8), (64, 128), (2, 1001))
    ):
        sizes = {"dtype": dtype, "nchunks": nchunks, "headdim": headdim, "dstate": dstate}
        yield passing("contiguous", False, **sizes)
        yield passing("contiguous", True, **sizes)
        yield passing("contiguous", False, **sizes, initial=False)
    for view, dtype, dstate in itertools.product(VIEWS, (F32, BF16), (9, 64)):
        yield passing(view, True, dtype=dtype, headdim=36, dstate=dstate)
    for empty in ("batch", "headdim"):
        yield passing("contiguous", False, dtype=BF16, **{empty: 0})


@contextmanager
def filled_states() -> Iterator[None]:
    """Fill the memory of states that the scan's kernels leave for one another with zeros, for initcheck."""

    def kept_states(*arguments: Any) -> Tensor | None:
        states = own_kept_states(*arguments)
        return states if states is None else states.zero_()

    def workspaces(*arguments: Any) -> Any:
        result = own_workspaces(*arguments)
        states = result[0][1]
        if states is not None:
            states.zero_()
        return result

    own_kept_states, own_workspaces = ssd.kept_states, ssd.backward_workspaces
    with mock.patch.object(ssd, "kept_states", kept_states), mock.patch.object(ssd, "backward_workspaces", workspaces):
        yield


def scan(view: str, bounds: tuple[int, ...] | None = None, rows: int = 1, **sizes: Any) -> Call:
    """With cu_seqlens if there are `bounds`, and `rows` of initial states then."""

    def call() -> None:
        shape = {"batch": 1, "seqlen": 100, "nheads": 2, "ngroups": 1, **sizes}
        tensors = inputs.ssd(**shape, device=CPU)
        if bounds is not None:
            tensors["cu_seqlens"] = torch.tensor(bounds)
            states = inputs.ssd(**shape | {"batch": rows, "seqlen": 1}, device=CPU)
            tensors["initial_states"] = states["initial_states"]
        arguments = {name: on_gpu(VIEWS[view](t)) for name, t in tensors.items()}
        leaves = [t.requires_grad_() for t in arguments.values() if t.is_floating_point()]
        outputs = oxiscan.mamba_chunk_scan_combined(
            **arguments,
            chunk_size=64,
            dt_softplus=True,
            return_final_states=True,
            return_varlen_states=bounds is not None,
        )
        gradient = inputs.normal(*tensors["x"].shape, dtype=sizes["dtype"], device=CPU)
        gradients = [on_gpu(VIEWS[view](gradient)), *(torch.randn_like(t) for t in outputs[1:])]
        torch.autograd.grad(outputs, leaves, gradients, allow_unused=True)

    return f"mamba_chunk_scan_combined {view} {bounds} {rows} {sizes}", call


def scans() -> Iterator[Call]:
    small, large = {"headdim": 8, "dstate": 12}, {"headdim": 64, "dstate": 128}
    odd = ((1, 1), (8, 12), (33, 70), (100, 200), (256, 33))
    models = tuple(itertools.product((64, 80, 96, 128), (64, 128, 256)))
    for (headdim, dstate), dtype, seq_idx in itertools.product(odd + models, (F32, BF16), (False, True)):
        yield scan("contiguous", headdim=headdim, dstate=dstate, dtype=dtype, seq_idx=seq_idx)
    for seqlen, shape, dtype in itertools.product((0, 1, 2, 63, 64, 65, 129), (small, large), (F32, BF16)):
        yield scan("contiguous", **shape, seqlen=seqlen, dtype=dtype, seq_idx=True, D="elements", parameters=F32)
    for view, shape, dtype in itertools.product(VIEWS, (small, large), (F32, BF16, F16)):
        yield scan(view, **shape, batch=3, nheads=4, ngroups=2, dtype=dtype, seq_idx=True, D="elements")
    for shape, dtype in itertools.product((small, large), (F32, BF16, F16)):
        yield scan("contiguous", **shape, dtype=dtype, optional=False)
        yield scan("contiguous", **shape, dtype=dtype, batch=0)
    documents = ((0, 0), (0, 0, 1, 1, 3, 70), (0, 64, 64, 100, 100))
    garbage = ((5, 2, -7, 2**40), (0, 200, 50, 100), (-1, -1, -1), (2**40, -(2**40), 2**31 - 1))
    for bounds, shape, dtype in itertools.product(documents + garbage, (small, large), (F32, BF16)):
        yield scan("contiguous", bounds, **shape, dtype=dtype)
        yield scan("strided", bounds, len(bounds) - 1, **shape, dtype=dtype, seq_idx=True)
    # In segments.
    for headdim, dstate, dtype in ((16, 16, BF16), (64, 64, BF16), (20, 20, F32)):
        long: dict[str, Any] = {"seqlen": 2**15, "nheads": 1, "headdim": headdim, "dstate": dstate, "dtype": dtype}
        yield scan("contiguous", **long, seq_idx=True)
        yield scan("contiguous", (0, 7, 7, 2**14 + 1, 2**15 - 9), 4, **long)
        yield scan("contiguous", (5, 2**16, -7, 2**40), 3, **long)


#: By public op: its calls.
CALLS: dict[str, Callable[[], Iterator[Call]]] = {
    "causal_conv1d_fn": convs,
    "causal_conv1d_update": conv_steps,
    "causal_conv1d_varlen_states": varlen_states,
    "mamba_chunk_scan_combined": scans,
    "rmsnorm_gated": norms,
    "selective_state_update": steps,
    "state_passing": passings,
}


def make_calls(ops: list[str], share: int, shares: int) -> None:
    """Every call of these ops that is in a share, announced, so that a report says which one it is about."""
    every = itertools.chain.from_iterable(CALLS[op]() for op in ops)
    with filled_states():
        for name, call in itertools.islice(every, share, None, shares):
            print(name, flush=True)
            call()
            torch.cuda.synchronize()
    # Autograd's thread takes another task only when it is rid of the calls' graphs: it would abort at those after the
    # interpreter's end.
    one = torch.ones(1, device="cuda", requires_grad=True)
    torch.autograd.grad(one * 1, one, torch.ones_like(one))


def command(sanitizer: str, tool: str) -> list[str]:
    """What runs this program under a tool."""
    options = ["--tool", tool, "--error-exitcode", "1", "--print-limit", "20", "--show-backtrace", "device"]
    known = subprocess.run([sanitizer, "--help"], capture_output=True, text=True).stdout
    if tool == "memcheck" and "--padding" in known:
        options += ["--padding", "512"]  # between allocations, which would hide an access past the end of one
    return [sanitizer, *options, sys.executable, __file__]


def report(output: str) -> str:
    """What a tool has found, with the names of the calls, or how the program failed."""
    lines = output.splitlines()
    before = itertools.chain([""], lines)
    found = [
        f"{name}\n{line}" if name.startswith(tuple(CALLS)) else line
        for name, line in zip(before, lines, strict=False)
        if line.startswith("=========")
    ]
    return "\n".join(found[:60] + lines[-20:])


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tools", nargs="*", metavar="TOOL", help=f"of {', '.join(TOOLS)}; all if none is named")
    parser.add_argument("--ops", default=",".join(CALLS), help="public ops, with commas; all by default")
    parser.add_argument("--jobs", type=int, default=1, help="how many processes have a share of the calls each")
    parser.add_argument("--share", type=int, help="make the calls of one share here, under no tool")
    options = parser.parse_args()
    options.ops = options.ops.split(",")
    for name, values, allowed in (("TOOL", options.tools, TOOLS), ("--ops", options.ops, CALLS)):
        unknown = [value for value in values if value not in allowed]
        if unknown:
            parser.error(f"{name}: got {unknown[0]}; allowed: {', '.join(allowed)}")
    if options.jobs < 1:
        parser.error(f"--jobs: got {options.jobs}; allowed: 1 and more")
    return options


def main() -> int:
    options = arguments()
    if options.share is not None:
        make_calls(options.ops, options.share, options.jobs)
        return 0
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        print("no compute-sanitizer on PATH")
        return 2
    found = False
    # An allocation each, so that the end of a tensor is the end of its memory.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // options.jobs)))

    def run(program: list[str], share: int) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [*program, "--share", str(share)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=environment,
        )
        if done.returncode != 0:
            print(f"share {share}: exit status {done.returncode}\n{report(done.stdout)}", flush=True)
        return done

    for tool in options.tools or TOOLS:
        begin = time.monotonic()
        program = [*command(sanitizer, tool), "--ops", ",".join(options.ops), "--jobs", str(options.jobs)]
        with ThreadPoolExecutor(options.jobs) as threads:
            done = threads.map(partial(run, program), range(options.jobs))
            failed = sum(share.returncode != 0 for share in done)
        found |= failed > 0
        result = f"found something in {failed} of {options.jobs} shares" if failed else "clean"
        print(f"{tool}: {result} ({time.monotonic() - begin:.0f} s)", flush=True)
    return int(found)


if __name__ == "__main__":
    sys.exit(main())
