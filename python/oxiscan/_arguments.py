"""Checks that ops and their reference share: what Rust cannot check because outputs are sized before it is called."""

import torch
from torch import Tensor

#: The dtypes that ops compute on.
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def check_tensor(name: str, tensor: Tensor) -> None:
    """Refuse what is not a tensor."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: got {type(tensor).__name__}; allowed: torch.Tensor")


def sizes(name: str, tensor: Tensor, *dims: str) -> torch.Size:
    """The shape of `tensor`, which must have the dimensions `dims`."""
    check_tensor(name, tensor)
    if tensor.dim() != len(dims):
        allowed = f"{len(dims)} dimensions ({', '.join(dims)})"
        raise ValueError(f"{name}: got shape {tuple(tensor.shape)}; allowed: {allowed}")
    return tensor.shape


def check(name: str, tensor: Tensor, dims: dict[str, int], *dtypes: torch.dtype) -> None:
    """Refuse a tensor whose sizes are not those of `dims` or whose dtype is not in `dtypes`."""
    if sizes(name, tensor, *dims) != torch.Size(dims.values()):
        allowed = f"({', '.join(dims)}) = {tuple(dims.values())}"
        raise ValueError(f"{name}: got shape {tuple(tensor.shape)}; allowed: {allowed}")
    if tensor.dtype not in dtypes:
        allowed = " or ".join(dict.fromkeys(str(dtype).removeprefix("torch.") for dtype in dtypes))
        raise TypeError(f"{name}: got {str(tensor.dtype).removeprefix('torch.')}; allowed: {allowed}")


def check_optional(name: str, tensor: Tensor | None, dims: dict[str, int], *dtypes: torch.dtype) -> None:
    """`check` of an argument that may be left out."""
    if tensor is not None:
        check(name, tensor, dims, *dtypes)


def ndocs(cu_seqlens: Tensor | None, batch: int) -> int:
    """How many documents states have a row for: those of cu_seqlens, or the sequences of the batch."""
    if cu_seqlens is None:
        return batch
    (size,) = sizes("cu_seqlens", cu_seqlens, "ndocs + 1")
    return max(size - 1, 0)


def check_varlen_states(return_varlen_states: bool, cu_seqlens: Tensor | None) -> None:
    """Refuse to return states of documents when there are none."""
    if return_varlen_states and cu_seqlens is None:
        raise ValueError("return_varlen_states: got True without cu_seqlens; allowed: both, or neither")


def acc_dtype(x: Tensor) -> torch.dtype:
    """The dtype of sums and states: float64 for float64, float32 for everything narrower."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def is_silu(activation: str | None) -> bool:
    """Whether `activation` is silu (also known as swish) rather than none."""
    if activation not in (None, "silu", "swish"):
        raise ValueError(f'activation: got {activation!r}; allowed: None, "silu", "swish"')
    return activation is not None


def number(name: str, value: float) -> float:
    """`value` as a float; anything that is not a number is refused."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: got {value!r}; allowed: a number")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name}: got {value}; allowed: a number within float's range") from None


def check_eps(name: str, value: float) -> float:
    """`value` as a float >= 0."""
    if type(value) is float and value >= 0:
        return value
    if not number(name, value) >= 0:
        raise ValueError(f"{name}: got {value}; allowed: {name} >= 0")
    return float(value)


def limits(name: str, value: tuple[float, float]) -> tuple[float, float]:
    """`value` as a pair of floats, low <= high."""
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise TypeError(f"{name}: got {value!r}; allowed: (low, high)")
    low, high = number(name, value[0]), number(name, value[1])
    if not low <= high:
        raise ValueError(f"{name}: got ({low}, {high}); allowed: (low, high) with low <= high")
    return low, high


def check_whole(name: str, value: int, lowest: int) -> None:
    """Refuse what is not a whole number from `lowest` on."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: got {value!r}; allowed: a whole number")
    if value < lowest:
        raise ValueError(f"{name}: got {value}; allowed: >= {lowest}")


def check_chunks(chunk_size: int, state_dtype: torch.dtype | None) -> None:
    """Refuse a chunk_size that is not a whole number from 1 on, a state_dtype that ops do not compute on."""
    check_whole("chunk_size", chunk_size, lowest=1)
    if state_dtype is not None and state_dtype not in FLOATS:
        raise TypeError(f"state_dtype: got {state_dtype!r}; allowed: None, {', '.join(map(str, FLOATS))}")


def varlen_states_dtype(
    return_varlen_states: bool, cu_seqlens: Tensor | None, state_dtype: torch.dtype | None, default: torch.dtype
) -> torch.dtype | None:
    """The dtype of varlen states, None where they are not asked for."""
    check_varlen_states(return_varlen_states, cu_seqlens)
    return (state_dtype or default) if return_varlen_states else None
