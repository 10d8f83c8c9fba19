"""Random arguments for the ops, the same for the same seed on every machine."""

from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def floats(device: torch.device) -> tuple[torch.dtype, ...]:
    """Those of `FLOATS` that a device's backend computes in, widest first: float64 is the CPU's alone."""
    return FLOATS if device.type == "cpu" else FLOATS[1:]


def normal(
    *shape: int,
    dtype: torch.dtype,
    device: torch.device,
    scale: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Standard normal values times `scale`, drawn on the CPU."""
    return (torch.randn(*shape, dtype=torch.float64, generator=generator) * scale).to(dtype).to(device)


#: How `laid_out` lays a tensor out: the order of its dimensions in memory, the step between elements, and which
#: dimensions are part of a larger one.
LAYOUTS: dict[str, tuple[str, int, str]] = {
    "contiguous": ("own", 1, "none"),
    "rows": ("own", 1, "first"),
    "columns": ("own", 1, "last"),
    "transposed": ("first two exchanged", 1, "none"),
    "reversed": ("reversed", 1, "none"),
    "stepped": ("own", 2, "all"),
    "strided": ("reversed", 2, "all"),
}


def laid_out(tensor: Tensor, layout: str) -> Tensor:
    """The same values in memory as `LAYOUTS` says, among NaNs (-2^30 for integers)."""
    order, step, larger = LAYOUTS[layout]
    dims = list(range(tensor.dim()))
    margins = [3 if larger == "all" or (larger, dim) in (("first", 0), ("last", dims[-1])) else 0 for dim in dims]
    if order == "reversed":
        dims.reverse()
    elif order == "first two exchanged":
        dims[:2] = reversed(dims[:2])
    unused = float("nan") if tensor.is_floating_point() else -(2**30)
    buffer = torch.full(
        [step * tensor.shape[dim] + margins[dim] for dim in dims], unused, dtype=tensor.dtype, device=tensor.device
    )
    begins = [min(margin, 1) for margin in margins]
    ends = [begin + step * size for begin, size in zip(begins, tensor.shape, strict=True)]
    # Either order of dimensions is its own inverse.
    view = buffer.permute(*dims)[tuple(slice(begin, end, step) for begin, end in zip(begins, ends, strict=True))]
    return view.copy_(tensor)


def strided(tensor: Tensor) -> Tensor:
    """The same values with no dimension contiguous and dimensions in reverse order in memory."""
    return laid_out(tensor, "strided")


def documents(
    batch: int,
    seqlen: int,
    *,
    device: torch.device,
    mean_length: int = 11,
    lowest: int = 0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """seq_idx: documents that start anywhere, their ids neither growing nor unique, `lowest` among them."""
    starts = torch.rand(batch, seqlen, generator=generator) < 1 / mean_length
    ids = starts.cumsum(1) * 5 % 3 + lowest
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
    like: dict[str, Any] = {"dtype": dtype, "device": device, "generator": generator}
    parameter = like | {"dtype": parameters or dtype}
    tensors = {
        "x": normal(batch, seqlen, nheads, headdim, **like),
        "dt": normal(batch, seqlen, nheads, **parameter),
        "A": -(torch.rand(nheads, dtype=torch.float64, generator=generator) + 0.2).to(device, parameter["dtype"])
        * decay,
        "B": normal(batch, seqlen, ngroups, dstate, **like),
        "C": normal(batch, seqlen, ngroups, dstate, **like),
    }
    if optional:
        shape = (nheads,) if D == "heads" else (nheads, headdim)
        tensors["D"] = normal(*shape, **parameter)
        tensors["z"] = normal(batch, seqlen, nheads, headdim, **like)
        tensors["dt_bias"] = normal(nheads, **parameter)
        tensors["initial_states"] = normal(batch, nheads, headdim, dstate, **parameter)
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
    like: dict[str, Any] = {"dtype": dtype, "device": device, "generator": generator}
    parameter = like | {"dtype": parameters or dtype}
    if channel_last:
        x = normal(batch, seqlen, dim, **like).transpose(1, 2)
    else:
        x = normal(batch, dim, seqlen, **like)
    tensors = {"x": x, "weight": normal(dim, width, scale=0.5, **parameter)}
    if optional:
        tensors["bias"] = normal(dim, **parameter)
        tensors["initial_states"] = normal(batch, dim, width - 1, **like)
    if seq_idx:
        tensors["seq_idx"] = documents(batch, seqlen, device=device, generator=generator)
    return tensors


def slot_indices(batch: int, slots: int, *, device: torch.device, generator: torch.Generator | None = None) -> Tensor:
    """A slot for each row of a batch, all different, in no order; (batch,) int32."""
    return torch.randperm(slots, generator=generator)[:batch].to(device, torch.int32)


def conv_update(
    *,
    batch: int = 3,
    dim: int = 70,
    seqlen: int | None = None,
    width: int = 4,
    state_len: int | None = None,
    dtype: torch.dtype,
    device: torch.device,
    parameters: torch.dtype | None = None,
    optional: bool = True,
    circular: bool = False,
    slots: int | None = None,
    intermediate: bool = False,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Arguments of causal_conv1d_update.

    Args:
        seqlen: None for one token without an axis for it.
        state_len: width - 1 if left out.
        circular: with cache_seqlens.
        slots: the slots of the states, with conv_state_indices; None for a row each.
    """
    generator = torch.Generator().manual_seed(seed)
    like: dict[str, Any] = {"dtype": dtype, "device": device, "generator": generator}
    parameter = like | {"dtype": parameters or dtype}
    state_len = width - 1 if state_len is None else state_len
    rows = batch if slots is None else slots
    tensors = {
        "x": normal(batch, dim, **like) if seqlen is None else normal(batch, dim, seqlen, **like),
        "conv_state": normal(rows, dim, state_len, **like),
        "weight": normal(dim, width, scale=0.5, **parameter),
    }
    if optional:
        tensors["bias"] = normal(dim, **parameter)
    if circular:
        tensors["cache_seqlens"] = torch.randint(0, 50, (batch,), generator=generator).to(device, torch.int32)
    if slots is not None:
        tensors["conv_state_indices"] = slot_indices(batch, slots, device=device, generator=generator)
    if intermediate:
        tokens = 1 if seqlen is None else seqlen
        tensors["intermediate_conv_states"] = normal(rows, tokens, dim, state_len, **like)
    return tensors


def state_update(
    *,
    batch: int = 3,
    seqlen: int | None = None,
    nheads: int | None = 4,
    dim: int = 5,
    ngroups: int | None = 2,
    dstate: int = 7,
    dtype: torch.dtype,
    device: torch.device,
    parameters: torch.dtype | None = None,
    state: torch.dtype | None = None,
    slots: int | None = None,
    intermediate: bool = False,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Arguments of selective_state_update.

    Args:
        seqlen: None for one token without an axis for it.
        nheads: None for arguments without heads.
        ngroups: None for B and C without groups.
        parameters: the dtype of dt, A, D and dt_bias.
        state: the dtype of both states.
        slots: the slots of the states, with state_batch_indices; None for a row each.
    """
    generator = torch.Generator().manual_seed(seed)
    like: dict[str, Any] = {"dtype": dtype, "device": device, "generator": generator}
    parameter = like | {"dtype": parameters or dtype}
    states = like | {"dtype": state or dtype}
    rows = batch if slots is None else slots
    tokens = (batch,) if seqlen is None else (batch, seqlen)
    heads = () if nheads is None else (nheads,)
    groups = () if ngroups is None else (ngroups,)
    tensors = {
        "state": normal(rows, *heads, dim, dstate, **states),
        "x": normal(*tokens, *heads, dim, **like),
        "dt": normal(*tokens, *heads, dim, **parameter),
        "A": -normal(*heads, dim, dstate, **parameter).abs(),
        "B": normal(*tokens, *groups, dstate, **like),
        "C": normal(*tokens, *groups, dstate, **like),
        "D": normal(*heads, dim, **parameter),
        "z": normal(*tokens, *heads, dim, **like),
        "dt_bias": normal(*heads, dim, **parameter),
    }
    if slots is not None:
        tensors["state_batch_indices"] = slot_indices(batch, slots, device=device, generator=generator)
    if intermediate:
        tensors["intermediate_ssm_states"] = normal(
            rows, 1 if seqlen is None else seqlen, *heads, dim, dstate, **states
        )
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
    like: dict[str, Any] = {"dtype": dtype, "device": device, "generator": generator}
    parameter = like | {"dtype": parameters or dtype}
    dim = nheads * headdim
    conv_dim = dim + 2 * ngroups * dstate
    tensors = {
        "zxbcdt": normal(batch, seqlen, dim + conv_dim + nheads, **like),
        "conv1d_weight": normal(conv_dim, width, scale=0.5, **parameter),
        "conv1d_bias": normal(conv_dim, **parameter),
        "dt_bias": normal(nheads, **parameter),
        "A": -normal(nheads, **parameter).abs(),
        "D": normal(nheads, headdim, **parameter),
    }
    if norm:
        tensors["rmsnorm_weight"] = normal(dim, **parameter)
    if outproj:
        tensors["outproj_weight"] = normal(5, dim, scale=dim**-0.5, **like)
        tensors["outproj_bias"] = normal(5, **like)
    if states:
        tensors["initial_states"] = normal(batch, nheads, headdim, dstate, **parameter)
        tensors["initial_conv_states"] = normal(batch, conv_dim, width - 1, **like)
    if seq_idx:
        tensors["seq_idx"] = documents(batch, seqlen, device=device, generator=generator)
    return tensors


def rmsnorm_gated(
    *shape: int,
    dtype: torch.dtype,
    device: torch.device,
    parameters: torch.dtype | None = None,
    bias: bool = True,
    z: bool = True,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Arguments of rmsnorm_gated, x of this shape."""
    generator = torch.Generator().manual_seed(seed)
    like: dict[str, Any] = {"dtype": dtype, "device": device, "generator": generator}
    parameter = like | {"dtype": parameters or dtype}
    tensors = {"x": normal(*shape, **like), "weight": normal(shape[-1], **parameter)}
    if bias:
        tensors["bias"] = normal(shape[-1], **parameter)
    if z:
        tensors["z"] = normal(*shape, **like)
    return tensors


def state_passing(
    *,
    batch: int = 2,
    nchunks: int = 5,
    nheads: int = 3,
    headdim: int = 4,
    dstate: int = 6,
    dtype: torch.dtype,
    device: torch.device,
    initial: bool = True,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Arguments of state_passing."""
    generator = torch.Generator().manual_seed(seed)
    like: dict[str, Any] = {"dtype": dtype, "device": device, "generator": generator}
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    tensors = {
        "states": normal(batch, nchunks, nheads, headdim, dstate, **like),
        "decay": -normal(batch, nchunks, nheads, **like | {"dtype": acc}).abs(),
    }
    if initial:
        tensors["initial_states"] = normal(batch, nheads, headdim, dstate, **like)
    return tensors


def selective_scan(
    *,
    batch: int = 2,
    dim: int = 20,
    seqlen: int = 97,
    ngroups: int | None = 2,
    dstate: int = 7,
    dtype: torch.dtype,
    device: torch.device,
    parameters: torch.dtype | None = None,
    fixed: str = "",
    optional: bool = True,
    seq_idx: bool = False,
    lengths: tuple[int, ...] | None = None,
    decay: float = 1.0,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Arguments of selective_scan_fn.

    Args:
        ngroups: of B and C; None for (batch, dstate, seqlen).
        parameters: the dtype of delta, A, D, delta_bias, initial_state, and of B and C where fixed.
        fixed: "B", "C" or "BC": those that are the same for all tokens.
        lengths: of the documents, for cu_seqlens.
    """
    generator = torch.Generator().manual_seed(seed)
    like: dict[str, Any] = {"dtype": dtype, "device": device, "generator": generator}
    parameter = like | {"dtype": parameters or dtype}
    varying = (batch, dstate, seqlen) if ngroups is None else (batch, ngroups, dstate, seqlen)
    tensors = {
        "u": normal(batch, dim, seqlen, **like),
        "delta": normal(batch, dim, seqlen, **parameter),
        "A": -(normal(dim, dstate, **parameter).abs() + 0.2) * decay,
    }
    for name in ("B", "C"):
        tensors[name] = normal(dim, dstate, **parameter) if name in fixed else normal(*varying, **like)
    if optional:
        tensors["D"] = normal(dim, **parameter)
        tensors["z"] = normal(batch, dim, seqlen, **like)
        tensors["delta_bias"] = normal(dim, **parameter)
        rows = batch if lengths is None else len(lengths)
        tensors["initial_state"] = normal(rows, dim, dstate, **parameter)
    if seq_idx:
        tensors["seq_idx"] = documents(batch, seqlen, device=device, generator=generator)
    if lengths is not None:
        tensors["cu_seqlens"] = cu_seqlens(*lengths, device=device)
    return tensors


def mamba_inner(
    *,
    batch: int = 2,
    dim: int = 20,
    seqlen: int = 75,
    dstate: int = 6,
    delta_rank: int = 3,
    width: int = 4,
    dtype: torch.dtype,
    device: torch.device,
    parameters: torch.dtype | None = None,
    given: str = "",
    optional: bool = True,
    norm: bool = False,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Arguments of mamba_inner_fn.

    Args:
        parameters: the dtype of all but xz, and B and C where given.
        given: "B", "C" or "BC": those that are not projected from x, (batch, ngroups, dstate, seqlen); with two groups
            if there are both, as projected ones have one.
        optional: with biases and D.
        norm: with the three RMS norms.
    """
    generator = torch.Generator().manual_seed(seed)
    like: dict[str, Any] = {"dtype": dtype, "device": device, "generator": generator}
    parameter = like | {"dtype": parameters or dtype}
    nfeatures = delta_rank + dstate * (2 - len(given))
    tensors = {
        "xz": normal(batch, 2 * dim, seqlen, **like),
        "conv1d_weight": normal(dim, 1, width, scale=0.5, **parameter),
        "x_proj_weight": normal(nfeatures, dim, scale=dim**-0.5, **parameter),
        "delta_proj_weight": normal(dim, delta_rank, scale=delta_rank**-0.5, **parameter),
        "out_proj_weight": normal(5, dim, scale=dim**-0.5, **parameter),
        "A": -(normal(dim, dstate, **parameter).abs() + 0.2),
    }
    for name in given:
        tensors[name] = normal(batch, len(given), dstate, seqlen, **like)
    if optional:
        tensors["conv1d_bias"] = normal(dim, **parameter)
        tensors["out_proj_bias"] = normal(5, **parameter)
        tensors["D"] = normal(dim, **parameter)
        tensors["delta_bias"] = normal(dim, **parameter)
        for name in "BC":
            if name not in given:
                tensors[f"{name}_proj_bias"] = normal(dstate, **parameter)
    if norm:
        tensors["b_rms_weight"] = normal(dstate, **parameter)
        tensors["c_rms_weight"] = normal(dstate, **parameter)
        tensors["dt_rms_weight"] = normal(dim, **parameter)
    return tensors
