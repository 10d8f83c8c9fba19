"""What a benchmark has to know of an op beside its cases. A new op is a line of `OPS`."""

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from oxiscan.testing import Case

Tensors = dict[str, Tensor]


class Op(NamedTuple):
    """An op, by its name in `oxiscan`, `oxiscan.reference` and the cases."""

    passes: tuple[str, ...] = ("fwd", "bwd")
    #: Arguments that are updated in place.
    written: tuple[str, ...] = ()
    #: The most that the case's sizes may be where results are checked: the reference of a scan goes token by token.
    checked_at: dict[str, int] = {}
    #: Sizes in which arithmetic does not matter beside the host's time.
    tiny: dict[str, int] = {"batch": 1, "seqlen": 1}
    #: How many exponentials a sweep over the tokens takes, where they can take longer than moving the bytes. There is a
    #: sweep forward, there are two backward.
    exponentials: Callable[[Tensors], int] = lambda tensors: 0


_TOKEN_LOOP = {"batch": 2, "seqlen": 300}

OPS = {
    "rmsnorm_gated": Op(),
    "causal_conv1d_fn": Op(),
    "causal_conv1d_update": Op(passes=("fwd",), written=("conv_state",), tiny={"batch": 1}),
    "mamba_chunk_scan_combined": Op(checked_at=_TOKEN_LOOP),
    "mamba_split_conv1d_scan_combined": Op(checked_at=_TOKEN_LOOP),
    "selective_scan_fn": Op(
        checked_at=_TOKEN_LOOP, exponentials=lambda tensors: tensors["u"].numel() * tensors["A"].shape[1]
    ),
    "selective_state_update": Op(passes=("fwd",), written=("state",), tiny={"batch": 1}),
}


def nbytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of memory that hold the tensors; an expanded dimension takes none."""
    return sum(
        t.element_size() * math.prod(size for size, stride in zip(t.shape, t.stride(), strict=True) if stride)
        for t in tensors
    )


def bytes_moved(op: Op, which: str, tensors: Tensors, outputs: list[Tensor]) -> int:
    """Bytes of a pass that reads every input once and writes every output once.

    A backward reads the arguments and the outputs' gradients and writes the arguments' gradients.
    """
    written = tensors.values() if which == "bwd" else [tensors[name] for name in op.written]
    return nbytes(tensors.values()) + nbytes(outputs) + nbytes(t for t in written if t.is_floating_point())


def duplicate(tensor: Tensor) -> Tensor:
    """The same values with the same strides in memory of its own; what was expanded is expanded again."""
    held = tensor.detach()[tuple(slice(None if stride else 1) for stride in tensor.stride())]
    own = torch.empty_strided(held.shape, held.stride(), dtype=held.dtype, device=held.device)
    return own.copy_(held).expand(tensor.shape)


class _DrawnOn(TorchFunctionMode):
    """Random numbers come from a generator of the device: on the CPU the large cases' take seconds."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.source = {"device": device, "generator": torch.Generator(device).manual_seed(0)}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        drawn = self.source if func in (torch.rand, torch.randn) else {}
        return func(*args, **(kwargs or {}) | drawn)


def draw(case: Case, dtype: torch.dtype, device: torch.device, sizes: dict[str, int]) -> Tensors:
    """A case's random arguments, `sizes` instead of its own."""
    with _DrawnOn(device):
        return case.tensors(dtype, device, **sizes)
