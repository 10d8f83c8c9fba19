"""Checks that ops and their reference share: what Rust cannot check because outputs are sized before it is called."""

import torch
from torch import Tensor


def sizes(name: str, tensor: Tensor, *dims: str) -> torch.Size:
    """The shape of `tensor`, which must have the dimensions `dims`."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: got {type(tensor).__name__}; allowed: torch.Tensor")
    if tensor.dim() != len(dims):
        allowed = f"{len(dims)} dimensions ({', '.join(dims)})"
        raise ValueError(f"{name}: got shape {tuple(tensor.shape)}; allowed: {allowed}")
    return tensor.shape


def acc_dtype(x: Tensor) -> torch.dtype:
    """The dtype of sums and states: float64 for float64, float32 for everything narrower."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def is_silu(activation: str | None) -> bool:
    """Whether `activation` is silu (also known as swish) rather than none."""
    if activation not in (None, "silu", "swish"):
        raise ValueError(f'activation: got {activation!r}; allowed: None, "silu", "swish"')
    return activation is not None


def check_chunk_size(chunk_size: int) -> None:
    """Refuse a chunk_size below 1."""
    if chunk_size < 1:
        raise ValueError(f"chunk_size: got {chunk_size}; allowed: >= 1")


def not_yet(**arguments: object) -> None:
    """Raise NotImplementedError for each argument that was given and has no implementation yet."""
    for name, value in arguments.items():
        if value is not None and value is not False:
            raise NotImplementedError(f"{name}: not supported yet; allowed: leave it out")
