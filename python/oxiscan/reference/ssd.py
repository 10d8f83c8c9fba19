"""Mamba-2's state-space recurrence, and the whole mixer core around it.

Per head, with a state of (headdim, dstate):
    state[t] = exp(dt[t] A) state[t - 1] + dt[t] x[t] B[t]^T        (state[t - 1] = 0 where a document starts)
    out[t]   = (state[t] C[t] + D x[t]) * silu(z[t])
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from oxiscan._arguments import acc_dtype, check_chunks, varlen_states_dtype

from ._common import discretize_dt, document_starts, documents, initial_row
from .causal_conv1d import causal_conv1d_fn
from .rmsnorm_gated import rmsnorm_gated


def mamba_chunk_scan_combined(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
    return_varlen_states: bool = False,
    state_dtype: torch.dtype | None = None,
) -> Any:
    """See `oxiscan.ops.mamba_chunk_scan_combined`; chunk_size has nothing to act on here."""
    check_chunks(chunk_size, state_dtype)
    if cu_seqlens is not None:
        return _by_document(
            x,
            dt,
            A,
            B,
            C,
            chunk_size,
            D,
            z,
            dt_bias,
            initial_states,
            seq_idx,
            cu_seqlens,
            dt_softplus,
            dt_limit,
            return_final_states,
            varlen_states_dtype(return_varlen_states, cu_seqlens, state_dtype, C.dtype),
        )
    dtype = acc_dtype(x)
    batch, seqlen, nheads, headdim = x.shape
    ngroups, dstate = B.shape[2:]
    dt = discretize_dt(dt, dt_bias, dt_softplus, dt_limit, dtype)
    decay = torch.exp(dt * A.to(dtype))
    x_acc = x.to(dtype)
    xdt = x_acc * dt[..., None]
    B, C = (t.to(dtype).repeat_interleave(nheads // ngroups, dim=2) for t in (B, C))
    starts = None if seq_idx is None else document_starts(seq_idx)

    if initial_states is None:
        state = torch.zeros(batch, nheads, headdim, dstate, dtype=dtype, device=x.device)
    else:
        state = initial_states.to(dtype)
    rows = []
    for t in range(seqlen):
        if starts is not None:
            state = torch.where(starts[:, t, None, None, None], 0.0, state)
        state = decay[:, t, :, None, None] * state + xdt[:, t, :, :, None] * B[:, t, :, None, :]
        rows.append((state * C[:, t, :, None, :]).sum(-1))
    y = torch.stack(rows, dim=1) if rows else torch.zeros_like(x_acc)
    if D is not None:
        y = y + x_acc * (D if D.dim() == 2 else D[:, None]).to(dtype)
    if z is not None:
        y = y * F.silu(z.to(dtype))
    out = y.to(x.dtype)
    return (out, state) if return_final_states else out


def _by_document(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_states: Tensor | None,
    seq_idx: Tensor | None,
    cu_seqlens: Tensor,
    dt_softplus: bool,
    dt_limit: tuple[float, float],
    return_final_states: bool,
    varlen_dtype: torch.dtype | None,
) -> Any:
    """Each document alone, one after another."""

    def part(document: int, begin: int, end: int) -> tuple[Tensor, Tensor]:
        tokens = slice(begin, end)
        return mamba_chunk_scan_combined(
            x[:, tokens],
            dt[:, tokens],
            A,
            B[:, tokens],
            C[:, tokens],
            chunk_size,
            D,
            None if z is None else z[:, tokens],
            dt_bias,
            initial_row(initial_states, document, cu_seqlens),
            None if seq_idx is None else seq_idx[:, tokens],
            dt_softplus=dt_softplus,
            dt_limit=dt_limit,
            return_final_states=True,
        )

    spans = documents(cu_seqlens, x.shape[1])
    parts = [part(document, begin, end) for document, (begin, end) in enumerate(spans)]
    results = [torch.cat([out for out, _ in parts], dim=1)]
    if return_final_states:
        # After the last token there is; without any, what lies before the first document.
        with_tokens = [state for (begin, end), (_, state) in zip(spans, parts, strict=True) if begin < end]
        results.append(with_tokens[-1] if with_tokens else parts[0][1])
    if varlen_dtype is not None:
        results.append(torch.cat([state for _, state in parts[:-1]]).to(varlen_dtype))
    return results[0] if len(results) == 1 else tuple(results)


@torch.no_grad()
def mamba_chunk_scan_combined_varlen(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    cu_chunk_seqlens: Tensor,
    last_chunk_indices: Tensor,
    seq_idx: Tensor,
    out: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_raw_states: bool = False,
    state_dtype: torch.dtype | None = None,
) -> Any:
    """See `oxiscan.ops.mamba_chunk_scan_combined_varlen`."""
    check_chunks(chunk_size, state_dtype)
    bounds, ids = cu_chunk_seqlens.tolist(), seq_idx.tolist()
    states: list[Tensor] = []
    for chunk, (begin, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
        if chunk > 0 and ids[chunk] == ids[chunk - 1]:
            entry: Tensor | None = states[-1]
        else:
            entry = None if initial_states is None else initial_states[ids[chunk]].unsqueeze(0)
        part, state = mamba_chunk_scan_combined(
            x[begin:end].unsqueeze(0),
            dt[begin:end].unsqueeze(0),
            A,
            B[begin:end].unsqueeze(0),
            C[begin:end].unsqueeze(0),
            chunk_size,
            D,
            None if z is None else z[begin:end].unsqueeze(0),
            dt_bias,
            entry,
            dt_softplus=dt_softplus,
            dt_limit=dt_limit,
            return_final_states=True,
        )
        out[begin:end] = part.squeeze(0)
        states.append(state)
    raw_states = torch.cat(states).to(state_dtype or C.dtype)
    varlen_states = raw_states[last_chunk_indices.long()]
    return (varlen_states, raw_states) if return_raw_states else varlen_states


def mamba_split_conv1d_scan_combined(
    zxbcdt: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    chunk_size: int,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
    activation: str | None = "silu",
    rmsnorm_weight: Tensor | None = None,
    rmsnorm_eps: float = 1e-6,
    outproj_weight: Tensor | None = None,
    outproj_bias: Tensor | None = None,
    headdim: int | None = None,
    ngroups: int = 1,
    norm_before_gate: bool = True,
    state_dtype: torch.dtype | None = None,
    initial_conv_states: Tensor | None = None,
    return_final_conv_states: bool = False,
    cu_seqlens: Tensor | None = None,
    return_varlen_states: bool = False,
) -> Any:
    """See `oxiscan.ops.mamba_split_conv1d_scan_combined`."""
    nheads = dt_bias.shape[0]
    if headdim is None:
        headdim = D.shape[1]
    dim = nheads * headdim
    conv_dim = conv1d_weight.shape[0]
    z, xBC, dt = zxbcdt.split([dim, conv_dim, nheads], dim=-1)
    conv = causal_conv1d_fn(
        xBC.transpose(1, 2),
        conv1d_weight,
        conv1d_bias,
        seq_idx=seq_idx,
        initial_states=initial_conv_states,
        return_final_states=True,
        activation=activation,
        cu_seqlens=cu_seqlens,
    )
    xBC = conv[0].transpose(1, 2)
    x, B, C = xBC.split([dim, (conv_dim - dim) // 2, (conv_dim - dim) // 2], dim=-1)
    gate_in_scan = rmsnorm_weight is None
    y, final_states, *varlen_states = mamba_chunk_scan_combined(
        x.unflatten(-1, (nheads, headdim)),
        dt,
        A,
        B.unflatten(-1, (ngroups, -1)),
        C.unflatten(-1, (ngroups, -1)),
        chunk_size,
        D=D,
        z=z.unflatten(-1, (nheads, headdim)) if gate_in_scan else None,
        dt_bias=dt_bias,
        initial_states=initial_states,
        seq_idx=seq_idx,
        cu_seqlens=cu_seqlens,
        dt_softplus=True,
        dt_limit=dt_limit,
        return_final_states=True,
        return_varlen_states=return_varlen_states,
        state_dtype=state_dtype,
    )
    out = y.flatten(-2)
    if rmsnorm_weight is not None:
        out = rmsnorm_gated(out, rmsnorm_weight, None, z, rmsnorm_eps, dim // ngroups, norm_before_gate)
    if outproj_weight is not None:
        bias = None if outproj_bias is None else outproj_bias.to(out.dtype)
        out = F.linear(out, outproj_weight.to(out.dtype), bias)
    results = [out]
    if return_final_states:
        results.append(final_states)
    if return_final_conv_states:
        results.append(conv[1])
    results += varlen_states
    return results[0] if len(results) == 1 else tuple(results)
