"""Every op at a few shapes against the float64 reference: `python -m oxiscan.info --self-test`."""

from collections.abc import Iterator
from typing import NamedTuple

import torch

import oxiscan
from oxiscan import reference
from oxiscan._C import build_info

from . import inputs
from .cases import CASES, Case
from .comparison import TOLERANCES, assert_close, compare


class Outcome(NamedTuple):
    """Of one op in one dtype."""

    op: str
    dtype: torch.dtype
    #: Empty if all its cases pass, else what was off in the first that did not.
    failure: str


def _cases(op: str) -> list[Case]:
    """Small ones, and for kernels with a fast path one that takes it."""
    wide: dict[str, tuple[str, dict[str, int]]] = {
        "rmsnorm_gated": ("hybrid8b_tp4/", {"batch": 2, "seqlen": 40}),
        "selective_state_update": ("decode8b/", {}),
    }
    cases = [case for case in CASES.values() if case.op == op and case.name.startswith("small/")]
    if op in wide:
        model, sizes = wide[op]
        found = [case for case in CASES.values() if case.op == op and case.name.startswith(model)]
        cases += [case._replace(sizes=case.sizes | sizes) for case in found[:2]]
    return cases


def _run(case: Case, dtype: torch.dtype, device: torch.device) -> None:
    op, exact = getattr(oxiscan, case.op), getattr(reference, case.op)
    tensors = case.tensors(dtype, device)
    if case.op != "selective_state_update":
        compare(op, exact, tensors, case.options)
        return
    doubled = {name: t.clone().double() for name, t in tensors.items()}
    expected = exact(**doubled, **case.options)
    assert_close("out", op(**tensors, **case.options), expected, TOLERANCES[dtype][0])
    assert_close("state", tensors["state"], doubled["state"], TOLERANCES[dtype][0])


def self_test(device: torch.device) -> Iterator[Outcome]:
    """Run it on `device`, op by op: those of `oxiscan` that have kernels there and small cases."""
    ops = dict.fromkeys(case.op for case in CASES.values())
    if device.type == "cuda":
        ops = {op: None for op in ops if op in build_info()["cuda_ops"]}
    for op in ops:
        for dtype in inputs.floats(device):
            try:
                for case in _cases(op):
                    _run(case, dtype, device)
            except (AssertionError, RuntimeError) as error:
                yield Outcome(op, dtype, str(error))
            else:
                yield Outcome(op, dtype, "")
