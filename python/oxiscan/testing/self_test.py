"""Ops at a few shapes against the float64 reference: `python -m oxiscan.info --self-test`."""

from collections.abc import Iterator
from typing import NamedTuple

import torch

import oxiscan
from oxiscan import reference
from oxiscan._C import build_info

from . import inputs
from .cases import CASES, Case
from .comparison import compare, compare_in_place


class Outcome(NamedTuple):
    """Of one op in one dtype."""

    op: str
    device: torch.device
    dtype: torch.dtype
    #: Empty if all its cases pass, else what was off in the first that did not.
    failure: str


#: What decode steps update in place.
WRITTEN = {"selective_state_update": "state", "causal_conv1d_update": "conv_state"}

#: Beside the small ones of `CASES`.
_MORE = [
    Case("small/state_passing", "state_passing", inputs.state_passing, {}, {}),
    Case("small/conv_update", "causal_conv1d_update", inputs.conv_update, {}, {"activation": "silu"}),
    Case("small/state_update", "selective_state_update", inputs.state_update, {"seqlen": 3}, {"dt_softplus": True}),
    # Kernels with a fast path take it.
    CASES["decode8b/state_update_batch1"],
    CASES["decode8b/state_update_batch8"],
    *(
        case._replace(sizes=case.sizes | {"batch": 2, "seqlen": 40})
        for name, case in CASES.items()
        if name.startswith(("hybrid8b_tp4/norm", "hybrid8b_tp4/ssd"))
    ),
]


def _run(case: Case, dtype: torch.dtype, device: torch.device) -> None:
    op, exact = getattr(oxiscan, case.op), getattr(reference, case.op)
    tensors = case.tensors(dtype, device)
    if case.op in WRITTEN:
        compare_in_place(op, exact, tensors, case.options, [WRITTEN[case.op]])
    else:
        compare(op, exact, tensors, case.options)


def self_test(device: torch.device) -> Iterator[Outcome]:
    """Every op that has kernels for `device`, but for mamba_inner_fn and inference on packed documents."""
    cases = [case for name, case in CASES.items() if name.startswith("small/")] + _MORE
    for op in dict.fromkeys(case.op for case in cases):
        if device.type == "cuda" and op not in build_info()["cuda_ops"]:
            continue
        for dtype in inputs.floats(device):
            failure = ""
            try:
                for case in cases:
                    if case.op == op:
                        _run(case, dtype, device)
            except Exception as error:  # whatever it is, the other ops are still to be tested
                failure = f"{type(error).__name__}: {error}"
            yield Outcome(op, device, dtype, failure)
