"""Random arguments for the ops, the same for the same seed on every machine."""

from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def normal(
    *shape: int,
    dtype: torch.dtype,
    device: torch.device,
    scale: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Standard normal values times `scale`, drawn on the CPU."""
    return (torch.randn(*shape, dtype=torch.float64, generator=generator) * scale).to(dtype).to(device)


def strided(tensor: Tensor) -> Tensor:
    """The same values with no dimension contiguous and dimensions in reverse order in memory."""
    shape = [2 * size + 3 for size in reversed(tensor.shape)]
    unused = float("nan") if tensor.is_floating_point() else -(2**30)
    buffer = torch.full(shape, unused, dtype=tensor.dtype, device=tensor.device)
    view = buffer.permute(*reversed(range(tensor.dim())))
    view = view[tuple(slice(1, 2 * size + 1, 2) for size in tensor.shape)]
    return view.copy_(tensor)


def documents(
    batch: int,
    seqlen: int,
    *,
    device: torch.device,
    mean_length: int = 11,
    generator: torch.Generator | None = None,
) -> Tensor:
    """seq_idx: documents that start anywhere, their ids neither growing nor unique."""
    starts = torch.rand(batch, seqlen, generator=generator) < 1 / mean_length
    ids = starts.cumsum(1) * 5 % 3
    return ids.to(torch.int32).to(device)


def cu_seqlens(*lengths: int, device: torch.device, dtype: torch.dtype = torch.int32) -> Tensor:
    """Cumulative lengths of packed documents, (ndocs + 1,) from 0."""
    return torch.tensor([0, *lengths]).cumsum(0).to(device, dtype)


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
    seed: int = 0,
) -> dict[str, Tensor]:
    """Arguments of mamba_chunk_scan_combined. `parameters`: the dtype of dt, A, D, dt_bias, initial_states."""
    generator = torch.Generator().manual_seed(seed)
    parameters = parameters or dtype
    like: dict[str, Any] = {"dtype": dtype, "device": device, "generator": generator}
    tensors = {
        "x": normal(batch, seqlen, nheads, headdim, **like),
        "dt": normal(batch, seqlen, nheads, dtype=parameters, device=device, generator=generator),
        "A": -(torch.rand(nheads, dtype=torch.float64, generator=generator) + 0.2).to(parameters).to(device) * decay,
        "B": normal(batch, seqlen, ngroups, dstate, **like),
        "C": normal(batch, seqlen, ngroups, dstate, **like),
    }
    if optional:
        shape = (nheads,) if D == "heads" else (nheads, headdim)
        tensors["D"] = normal(*shape, dtype=parameters, device=device, generator=generator)
        tensors["z"] = normal(batch, seqlen, nheads, headdim, **like)
        tensors["dt_bias"] = normal(nheads, dtype=parameters, device=device, generator=generator)
        tensors["initial_states"] = normal(
            batch, nheads, headdim, dstate, dtype=parameters, device=device, generator=generator
        )
    if seq_idx:
        tensors["seq_idx"] = documents(batch, seqlen, device=device, generator=generator)
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
    seed: int = 0,
) -> dict[str, Tensor]:
    """Arguments of causal_conv1d_fn."""
    generator = torch.Generator().manual_seed(seed)
    parameters = parameters or dtype
    if channel_last:
        x = normal(batch, seqlen, dim, dtype=dtype, device=device, generator=generator).transpose(1, 2)
    else:
        x = normal(batch, dim, seqlen, dtype=dtype, device=device, generator=generator)
    tensors = {"x": x, "weight": normal(dim, width, dtype=parameters, device=device, scale=0.5, generator=generator)}
    if optional:
        tensors["bias"] = normal(dim, dtype=parameters, device=device, generator=generator)
        tensors["initial_states"] = normal(batch, dim, width - 1, dtype=dtype, device=device, generator=generator)
    if seq_idx:
        tensors["seq_idx"] = documents(batch, seqlen, device=device, generator=generator)
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
    seed: int = 0,
) -> dict[str, Tensor]:
    """Arguments of mamba_split_conv1d_scan_combined, D of (nheads, headdim)."""
    generator = torch.Generator().manual_seed(seed)
    like: dict[str, Any] = {"dtype": parameters or dtype, "device": device, "generator": generator}
    dim = nheads * headdim
    conv_dim = dim + 2 * ngroups * dstate
    tensors = {
        "zxbcdt": normal(batch, seqlen, dim + conv_dim + nheads, dtype=dtype, device=device, generator=generator),
        "conv1d_weight": normal(conv_dim, width, scale=0.5, **like),
        "conv1d_bias": normal(conv_dim, **like),
        "dt_bias": normal(nheads, **like),
        "A": -normal(nheads, **like).abs(),
        "D": normal(nheads, headdim, **like),
    }
    if norm:
        tensors["rmsnorm_weight"] = normal(dim, **like)
    if outproj:
        tensors["outproj_weight"] = normal(5, dim, dtype=dtype, device=device, scale=dim**-0.5, generator=generator)
        tensors["outproj_bias"] = normal(5, dtype=dtype, device=device, generator=generator)
    if states:
        tensors["initial_states"] = normal(batch, nheads, headdim, dstate, **like)
        tensors["initial_conv_states"] = normal(
            batch, conv_dim, width - 1, dtype=dtype, device=device, generator=generator
        )
    if seq_idx:
        tensors["seq_idx"] = documents(batch, seqlen, device=device, generator=generator)
    return tensors
