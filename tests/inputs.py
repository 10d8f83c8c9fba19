"""Random inputs for the op tests."""

from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def normal(*shape: int, dtype: torch.dtype, device: torch.device, scale: float = 1.0) -> Tensor:
    """Standard normal values times `scale`."""
    return (torch.randn(*shape, dtype=torch.float64) * scale).to(dtype).to(device)


def strided(tensor: Tensor) -> Tensor:
    """The same values with no dimension contiguous and dimensions in reverse order in memory."""
    shape = [2 * size + 3 for size in reversed(tensor.shape)]
    buffer = torch.full(shape, float("nan"), dtype=tensor.dtype, device=tensor.device)
    view = buffer.permute(*reversed(range(tensor.dim())))
    view = view[tuple(slice(1, 2 * size + 1, 2) for size in tensor.shape)]
    return view.copy_(tensor)


def documents(batch: int, seqlen: int, *, device: torch.device, mean_length: int = 11) -> Tensor:
    """seq_idx: documents that start anywhere, their ids neither growing nor unique."""
    starts = torch.rand(batch, seqlen) < 1 / mean_length
    ids = starts.cumsum(1) * 5 % 3
    return ids.to(torch.int32).to(device)


def ssd(
    *,
    batch: int = 2,
    seqlen: int = 97,
    nheads: int = 4,
    headdim: int = 8,
    ngroups: int = 2,
    dstate: int = 12,
    dtype: torch.dtype,
    device: torch.device,
    parameters: torch.dtype | None = None,
    D: str = "heads",
    optional: bool = True,
    seq_idx: bool = False,
    decay: float = 1.0,
) -> dict[str, Tensor]:
    """Arguments of mamba_chunk_scan_combined. `parameters`: the dtype of dt, A, D, dt_bias, initial_states."""
    parameters = parameters or dtype
    like: dict[str, Any] = {"dtype": dtype, "device": device}
    tensors = {
        "x": normal(batch, seqlen, nheads, headdim, **like),
        "dt": normal(batch, seqlen, nheads, dtype=parameters, device=device),
        "A": -(torch.rand(nheads, dtype=torch.float64) + 0.2).to(parameters).to(device) * decay,
        "B": normal(batch, seqlen, ngroups, dstate, **like),
        "C": normal(batch, seqlen, ngroups, dstate, **like),
    }
    if optional:
        shape = (nheads,) if D == "heads" else (nheads, headdim)
        tensors["D"] = normal(*shape, dtype=parameters, device=device)
        tensors["z"] = normal(batch, seqlen, nheads, headdim, **like)
        tensors["dt_bias"] = normal(nheads, dtype=parameters, device=device)
        tensors["initial_states"] = normal(batch, nheads, headdim, dstate, dtype=parameters, device=device)
    if seq_idx:
        tensors["seq_idx"] = documents(batch, seqlen, device=device)
    return tensors


def conv(
    *,
    batch: int = 2,
    dim: int = 70,
    seqlen: int = 131,
    width: int = 4,
    dtype: torch.dtype,
    device: torch.device,
    parameters: torch.dtype | None = None,
    optional: bool = True,
    seq_idx: bool = False,
    channel_last: bool = False,
) -> dict[str, Tensor]:
    """Arguments of causal_conv1d_fn."""
    parameters = parameters or dtype
    if channel_last:
        x = normal(batch, seqlen, dim, dtype=dtype, device=device).transpose(1, 2)
    else:
        x = normal(batch, dim, seqlen, dtype=dtype, device=device)
    tensors = {"x": x, "weight": normal(dim, width, dtype=parameters, device=device, scale=0.5)}
    if optional:
        tensors["bias"] = normal(dim, dtype=parameters, device=device)
        tensors["initial_states"] = normal(batch, dim, width - 1, dtype=dtype, device=device)
    if seq_idx:
        tensors["seq_idx"] = documents(batch, seqlen, device=device)
    return tensors


def split_conv1d_scan(
    *,
    batch: int = 2,
    seqlen: int = 75,
    nheads: int = 4,
    headdim: int = 8,
    ngroups: int = 2,
    dstate: int = 10,
    width: int = 4,
    dtype: torch.dtype,
    device: torch.device,
    parameters: torch.dtype | None = None,
    norm: bool = False,
    outproj: bool = False,
    states: bool = True,
    seq_idx: bool = False,
) -> dict[str, Tensor]:
    """Arguments of mamba_split_conv1d_scan_combined, D of (nheads, headdim)."""
    like: dict[str, Any] = {"dtype": parameters or dtype, "device": device}
    dim = nheads * headdim
    conv_dim = dim + 2 * ngroups * dstate
    tensors = {
        "zxbcdt": normal(batch, seqlen, dim + conv_dim + nheads, dtype=dtype, device=device),
        "conv1d_weight": normal(conv_dim, width, scale=0.5, **like),
        "conv1d_bias": normal(conv_dim, **like),
        "dt_bias": normal(nheads, **like),
        "A": -normal(nheads, **like).abs(),
        "D": normal(nheads, headdim, **like),
    }
    if norm:
        tensors["rmsnorm_weight"] = normal(dim, **like)
    if outproj:
        tensors["outproj_weight"] = normal(5, dim, dtype=dtype, device=device, scale=dim**-0.5)
        tensors["outproj_bias"] = normal(5, dtype=dtype, device=device)
    if states:
        tensors["initial_states"] = normal(batch, nheads, headdim, dstate, **like)
        tensors["initial_conv_states"] = normal(batch, conv_dim, width - 1, dtype=dtype, device=device)
    if seq_idx:
        tensors["seq_idx"] = documents(batch, seqlen, device=device)
    return tensors
