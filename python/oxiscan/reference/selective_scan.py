"""Mamba-1's state-space recurrence, each channel with a state of (dstate,).

state[t] = exp(delta[t] A) state[t - 1] + delta[t] u[t] B[t]        (state[t - 1] = 0 where a document starts)
out[t]   = (state[t] . C[t] + D u[t]) * silu(z[t])
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from oxiscan._arguments import acc_dtype, check_varlen_states

from ._common import discretize_dt, document_starts, documents


def _by_token(matrix: Tensor, dim: int, seqlen: int) -> Sequence[Tensor]:
    """B or C of each token, (batch or 1, dim, dstate)."""
    if matrix.dim() == 2:
        return [matrix[None]] * seqlen
    if matrix.dim() == 3:
        matrix = matrix[:, None]
    return matrix.repeat_interleave(dim // matrix.shape[1], dim=1).unbind(-1)


def selective_scan_fn(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    return_varlen_states: bool = False,
) -> Any:
    """See `oxiscan.ops.selective_scan_fn`."""
    check_varlen_states(return_varlen_states, cu_seqlens)
    batch, dim, seqlen = u.shape
    if cu_seqlens is not None:
        ndocs = len(cu_seqlens) - 1
        outs, states = [], []
        last = 0
        for i, (begin, end) in enumerate(documents(cu_seqlens, seqlen)):
            tokens = slice(begin, end)
            initial = None
            if initial_state is not None and i < len(initial_state) and i < ndocs:
                initial = initial_state[i : i + 1]
            out, state = selective_scan_fn(
                u[..., tokens],
                delta[..., tokens],
                A,
                B if B.dim() == 2 else B[..., tokens],
                C if C.dim() == 2 else C[..., tokens],
                D,
                None if z is None else z[..., tokens],
                delta_bias,
                delta_softplus,
                return_last_state=True,
                initial_state=initial,
                seq_idx=None if seq_idx is None else seq_idx[:, tokens],
            )
            outs.append(out)
            states.append(state)
            last = i if end > begin else last
        results = [torch.cat(outs, dim=-1)]
        if return_last_state:
            results.append(states[last])
        if return_varlen_states:
            results.append(torch.cat(states[:ndocs]))
        return results[0] if len(results) == 1 else tuple(results)

    dtype = acc_dtype(u)
    bias = None if delta_bias is None else delta_bias[:, None]
    delta = discretize_dt(delta, bias, delta_softplus, (float("-inf"), float("inf")), dtype)
    x, A = u.to(dtype), A.to(dtype)
    B_by_token, C_by_token = (_by_token(matrix.to(dtype), dim, seqlen) for matrix in (B, C))
    delta_by_token, input_by_token = delta.unbind(-1), (delta * x).unbind(-1)
    starts = None if seq_idx is None else document_starts(seq_idx)
    if initial_state is None:
        state = torch.zeros(batch, dim, A.shape[1], dtype=dtype, device=u.device)
    else:
        state = initial_state.to(dtype)
    columns = []
    for t in range(seqlen):
        if starts is not None:
            state = torch.where(starts[:, t, None, None], 0.0, state)
        decay = torch.exp(delta_by_token[t][..., None] * A)
        state = decay * state + input_by_token[t][..., None] * B_by_token[t]
        columns.append((state * C_by_token[t]).sum(-1))
    y = torch.stack(columns, dim=-1) if columns else torch.zeros_like(x)
    if D is not None:
        y = y + D.to(dtype)[:, None] * x
    if z is not None:
        y = y * F.silu(z.to(dtype))
    out = y.to(u.dtype)
    return (out, state) if return_last_state else out
