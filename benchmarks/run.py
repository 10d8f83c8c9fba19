"""Times every op: beside the floor that this machine's copy speed sets, and beside other packages on a GPU.

    python -m benchmarks.run [--device cuda] [--ops norm] [--cases 'decode8b/*'] [--passes fwd] [--quick] [--no-peers]

Writes `records.Record`s to FOLDER/<gpu>-<date>.json. Results are compared with the float64 reference first: what is
wrong is not timed, and the exit code is 1.
"""

import argparse
import inspect
import sys
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import oxiscan
from oxiscan import reference
from oxiscan.testing import CASES, TOLERANCES, Case, assert_close, relative_rms, run

from . import gpu_peers, machine, records, report, timing
from .ops import OPS, Op, Tensors, bytes_moved, draw, duplicate, nbytes
from .records import OURS, Record
from .timing import Call, Effort, Timing

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "float32": torch.float32, "float64": torch.float64}


#: So many calls share a backward for the host's time, as a model's layers do: one hand-over to autograd's thread.
CALLS_OF_A_BACKWARD = 16


class WrongResult(Exception):
    """An output or a gradient is not what the reference gives."""


def as_list(result: Any) -> list[Tensor]:
    """The outputs of an op that returns one or several."""
    return list(result) if isinstance(result, tuple) else [result]


def unwritten(op: Op, tensors: Tensors) -> Tensors:
    """The arguments, with copies of those that the op updates."""
    return {k: duplicate(t) if k in op.written else t for k, t in tensors.items()}


def bound(call: partial[Any], tensors: Tensors) -> Call:
    """A call with these arguments by position: a partial's named ones would be merged at every call."""
    found = inspect.signature(call.func).bind(**tensors, **call.keywords)
    return partial(call.func, *found.args, **found.kwargs)


def forward(op: Op, call: partial[Any], tensors: Tensors, gradients: list[Tensor]) -> Call:
    """The forward, as training calls it where there is a backward."""
    differentiable = "bwd" in op.passes
    leaves = {k: t.detach().requires_grad_(differentiable and t.is_floating_point()) for k, t in tensors.items()}
    return bound(call, leaves)


def backward(op: Op, call: Callable[..., Any], tensors: Tensors, gradients: list[Tensor], calls: int = 1) -> Call:
    """The backward alone, of a forward that runs here; of `calls` of them at once, as a model's is of many layers."""
    outputs, wanted = [], []
    for _ in range(calls):
        leaves = {k: t.detach().requires_grad_(t.is_floating_point()) for k, t in tensors.items()}
        wanted += [t for t in leaves.values() if t.requires_grad]
        outputs += as_list(call(**leaves))
    return lambda: torch.autograd.grad(outputs, wanted, gradients * calls, retain_graph=True, allow_unused=True)


class Nothing(torch.autograd.Function):
    """Saves its arguments, and hands out results and gradients made before: what autograd itself takes of the host."""

    @staticmethod
    def forward(ctx: Any, outputs: list[Tensor], gradients: list[Tensor | None], *arguments: Tensor) -> Any:
        ctx.save_for_backward(*arguments)
        ctx.gradients = gradients
        return tuple(output.detach() for output in outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        assert ctx.saved_tensors
        return None, None, *ctx.gradients


def nothing(call: partial[Any], tensors: Tensors) -> Callable[..., Any]:
    """What takes the same arguments as a call and returns the like of its results, by `Nothing`."""
    with torch.no_grad():
        outputs = as_list(call(**tensors))
    gradients = [torch.empty_like(t) if t.is_floating_point() else None for t in tensors.values()]
    return lambda **leaves: Nothing.apply(outputs, gradients, *leaves.values())


#: What is timed of each pass.
PASSES: dict[str, Callable[[Op, partial[Any], Tensors, list[Tensor]], Call]] = {"fwd": forward, "bwd": backward}


class Check:
    """A case's results in float64 by the reference, for implementations to be compared with."""

    def __init__(self, op: Op, case: Case, tensors: Tensors, passes: Sequence[str]) -> None:
        self.op, self.tensors = op, tensors
        self.dtype = next(iter(tensors.values())).dtype
        self.gradients: list[Tensor] = []
        call = partial(getattr(reference, case.op), **case.options)
        exact = {k: t.double() if t.is_floating_point() else t for k, t in tensors.items()}
        self.expected = self.results("fwd", call, exact)
        if "bwd" in passes:
            self.gradients = [torch.randn_like(t).to(self.dtype) for t in self.expected.values()]
            self.expected |= self.results("bwd", call, exact)

    def results(self, which: str, call: Callable[..., Any], tensors: Tensors) -> Tensors:
        """Outputs as "out0", ... and by name what is updated in place, or gradients as "d" + name."""
        if which == "bwd":
            gradients = [gradient.to(next(iter(tensors.values())).dtype) for gradient in self.gradients]
            values = run(call, tensors, {}, gradients)
            return {f"d{k}": values[f"d{k}"] for k, t in tensors.items() if t.is_floating_point()}
        own = unwritten(self.op, tensors)
        with torch.no_grad():
            outputs = as_list(call(**own))
        return {f"out{i}": t for i, t in enumerate(outputs)} | {name: own[name] for name in self.op.written}

    def error(self, which: str, call: Callable[..., Any]) -> float:
        """The largest relative RMS error of a pass; WrongResult where one is more than `TOLERANCES` allows."""
        errors = []
        for name, value in self.results(which, call, self.tensors).items():
            allowed = max(TOLERANCES[dtype][which == "bwd"] for dtype in (self.dtype, value.dtype))
            try:
                assert_close(name, value, self.expected[name], allowed)
            except AssertionError as error:
                raise WrongResult(error) from None
            errors.append(relative_rms(value, self.expected[name]))
        return max(errors)


class Checked(NamedTuple):
    """A pass by an implementation whose result is right, and what a call takes of the host."""

    impl: str
    which: str
    call: partial[Any]
    error: float
    host_us: float


class Bench:
    """One run: what it measures with, and what it found.

    Two sweeps over the cases: `check` all, then `measure` what was right. A profiler that has once run makes every
    launch slower for the rest of the process, up to twice: the host's times are taken before.
    """

    def __init__(self, device: torch.device, dtype: str, passes: Sequence[str], effort: Effort, peers: bool) -> None:
        self.device, self.dtype, self.passes, self.effort, self.peers = device, dtype, passes, effort, peers
        self.checked: dict[str, list[Checked]] = {}
        self.kernels: timing.KernelTimer | None = None
        self.ceilings = timing.ceilings(device, effort)
        self.gpu, self.commit = machine.name(device), machine.commit()
        self.records: list[Record] = []
        self.failed = False

    def check(self, case: Case) -> None:
        """Compare every pass of a case by every implementation with the reference, and take the host's times."""
        op = OPS[case.op]
        passes = [which for which in op.passes if which in self.passes]
        if not passes:
            return
        functions = {OURS: getattr(oxiscan, case.op)} | (gpu_peers.load(case) if self.peers else {})
        tiny = self.draw(case, op.tiny)
        calls = {}
        for impl, function in functions.items():
            call = partial(function, **case.options)
            # Before large arguments are made: whether there is a kernel at all.
            if self.attempt(f"{case.name} {impl}", impl, lambda call=call: call(**unwritten(op, tiny))):
                calls[impl] = call
        if not calls:
            return

        at = {name: min(most, case.sizes[name]) for name, most in op.checked_at.items()}
        expected = Check(op, case, self.draw(case, at), passes)
        self.checked[case.name] = checked = []

        def compare(impl: str, call: partial[Any], which: str) -> None:
            error = expected.error(which, call)
            tensors, gradients, _ = self.arguments(op, which, call, tiny)
            checked.append(Checked(impl, which, call, error, self.host_us(op, which, call, tensors, gradients)))

        for impl, call in calls.items():
            for which in passes:
                self.attempt(f"{case.name} {which} {impl}", impl, partial(compare, impl, call, which))

    def host_us(self, op: Op, which: str, call: partial[Any], tensors: Tensors, gradients: list[Tensor]) -> float:
        """How long the host is busy with a call; of a backward, what a call adds to what autograd itself takes."""
        if which == "fwd":
            return timing.host_us(forward(op, call, tensors, gradients), self.device, self.effort)
        # Loops as long as those of a forward.
        effort = self.effort._replace(host_calls=max(1, self.effort.host_calls // CALLS_OF_A_BACKWARD))
        one, none = (
            timing.host_us(backward(op, each, tensors, gradients, CALLS_OF_A_BACKWARD), self.device, effort)
            for each in (call, nothing(call, tensors))
        )
        return (one - none) / CALLS_OF_A_BACKWARD

    def measure(self, case: Case) -> None:
        """Every pass of a case that was right."""
        if self.device.type == "cuda" and self.kernels is None:
            self.kernels = timing.KernelTimer(self.device)
        checked = self.checked.get(case.name)
        if not checked:
            return
        tensors = self.draw(case, {})
        for one in checked:
            self.attempt(f"{case.name} {one.which} {one.impl}", one.impl, partial(self.record, case, tensors, one))

    def draw(self, case: Case, sizes: dict[str, int]) -> Tensors:
        """A case's random arguments, `sizes` instead of its own."""
        return draw(case, DTYPES[self.dtype], self.device, sizes)

    def attempt(self, label: str, impl: str, step: Callable[[], Any]) -> bool:
        """Take a step, or say why not. A wrong result fails the run, as does any error of ours but a missing kernel."""
        try:
            step()
        except WrongResult as error:
            print(f"{label}: WRONG, not timed: {error}", flush=True)
            self.failed = True
        except NotImplementedError as error:
            print(f"{label}: skipped: {error}", flush=True)
        except Exception as error:  # whatever a kernel or a peer raises, the other cases are still measured
            print(f"{label}: {type(error).__name__}: {error}", flush=True)
            self.failed |= impl == OURS
        else:
            return True
        return False

    def record(self, case: Case, tensors: Tensors, checked: Checked) -> None:
        """Measure a pass, print and keep the record."""
        op, which = OPS[case.op], checked.which
        make = partial(PASSES[which], op, checked.call)
        tensors, gradients, moved = self.arguments(op, which, checked.call, tensors)
        peak = timing.peak_bytes(lambda: make(tensors, gradients)(), self.device)
        timed = self.time(f"{case.name} {which} {checked.impl}", make, tensors, gradients)
        found: Record = {
            "op": case.op,
            "impl": checked.impl,
            "shape": case.name,
            "dtype": self.dtype,
            "pass": which,
            "us": timed.us,
            "host_us": checked.host_us,
            "floor_us": self.ceilings.floor_us(moved, op.exponentials(tensors) * {"fwd": 1, "bwd": 2}[which]),
            "launches": timed.launches,
            "peak_bytes": peak,
            "error": checked.error,
            **self.ceilings.measured(),
            "gpu": self.gpu,
            "version": oxiscan.__version__,
            "commit": self.commit,
            "method": timed.method,
        }
        print(report.line(found), flush=True)
        self.records.append(found)

    def arguments(
        self, op: Op, which: str, call: Callable[..., Any], tensors: Tensors
    ) -> tuple[Tensors, list[Tensor], int]:
        """Arguments to time a pass with, random gradients of the outputs, and the bytes that it has to move."""
        own = unwritten(op, tensors)
        with torch.no_grad():
            outputs = as_list(call(**own))
        return own, [torch.randn_like(t) for t in outputs], bytes_moved(op, which, own, outputs)

    def time(
        self, label: str, make: Callable[[Tensors, list[Tensor]], Call], tensors: Tensors, gradients: list[Tensor]
    ) -> Timing:
        """The time of a call: on a GPU of its kernels, of short ones in a graph if the call can be captured."""
        call = make(tensors, gradients)
        if self.kernels is None:
            return Timing(timing.median_us(call, self.device, self.effort), None, "wall")
        timed = self.kernels.measure(call, self.effort.repeats(timing.warm_us(call, self.device)))
        if timed.us >= timing.SHORT_US:
            return timed

        def prepare() -> Call:
            return make({k: duplicate(t) for k, t in tensors.items()}, [duplicate(t) for t in gradients])

        try:
            us = timing.replay_us(prepare, nbytes(tensors.values()), self.device, self.effort)
        except Exception as error:  # whatever a peer does that no graph can hold
            print(f"{label}: no graph, the profiler's time instead: {type(error).__name__}: {error}", flush=True)
            return timed
        return Timing(us, timed.launches, "graph")


def listed(text: str) -> list[str]:
    """The parts of a comma-separated argument."""
    return [part for part in text.split(",") if part]


def matches(name: str, patterns: list[str]) -> bool:
    """Whether a name has one of `patterns` as a part, or is what one says as a glob."""
    return any(pattern in name or fnmatchcase(name, pattern) for pattern in patterns)


def chosen(device: torch.device, ops: list[str] | None, cases: list[str] | None) -> list[Case]:
    """The cases that filters let through; without one of cases, the small ones on the CPU and the models' on a GPU."""

    def default(name: str) -> bool:
        return name.startswith("cpu/") if device.type == "cpu" else not name.startswith(("cpu/", "small/"))

    return [
        case
        for name, case in CASES.items()
        if (ops is None or matches(case.op, ops)) and (default(name) if cases is None else matches(name, cases))
    ]


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; ends the program where it does not fit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=torch.device, help="cuda if there is one, else cpu")
    parser.add_argument("--ops", type=listed, help="parts or globs of ops' names, with commas")
    parser.add_argument("--cases", type=listed, help="the same of cases' names")
    parser.add_argument("--passes", type=listed, default=list(PASSES), help="fwd,bwd")
    parser.add_argument("--dtype", choices=DTYPES, help="bf16 on a GPU, float32 on the CPU")
    parser.add_argument("--out", type=Path, default=records.FOLDER, metavar="FOLDER", help="where results go")
    parser.add_argument("--quick", action="store_true", help="fewer repetitions")
    parser.add_argument("--no-peers", action="store_true", help="oxiscan alone")
    options = parser.parse_args(argv)
    options.device = options.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if options.device.type not in ("cpu", "cuda"):
        parser.error(f"--device: got {options.device}; allowed: cpu, cuda, cuda:N")
    options.dtype = options.dtype or ("bf16" if options.device.type == "cuda" else "float32")
    if not options.passes or not set(options.passes) <= PASSES.keys():
        parser.error(f"--passes: got {','.join(options.passes)!r}; allowed: {', '.join(PASSES)}, with commas")
    options.chosen = chosen(options.device, options.ops, options.cases)
    if not options.chosen:
        parser.error(
            f"--ops, --cases: got {options.ops}, {options.cases}, which no case matches; "
            f"allowed: parts of {', '.join(OPS)} and of {', '.join(CASES)}"
        )
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write the records; 1 if something was wrong."""
    options = arguments(argv)
    device = options.device
    torch.manual_seed(0)
    if device.type == "cuda":
        torch.cuda.set_device(device.index or 0)
    peers = device.type == "cuda" and not options.no_peers
    effort = timing.QUICK if options.quick else timing.FULL
    bench = Bench(device, options.dtype, options.passes, effort, peers)
    print(f"{bench.gpu}: {report.ceilings(bench.ceilings.measured())}\n{report.HEADER}", flush=True)
    # torch keeps the memory in between: a GPU clears what is given back, beside what is measured next.
    for sweep in (bench.check, bench.measure):
        for case in options.chosen:
            bench.attempt(case.name, OURS, partial(sweep, case))
    if bench.records:
        path = options.out / f"{machine.slug(bench.gpu)}-{datetime.now(timezone.utc).date().isoformat()}.json"
        records.write(bench.records, path)
        print(f"\n{report.markdown(bench.records)}\n{path}")
    return int(bench.failed)


if __name__ == "__main__":
    sys.exit(main())
