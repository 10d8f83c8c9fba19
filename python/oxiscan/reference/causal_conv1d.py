"""Causal depthwise convolution: out[t] = act(bias + sum_k weight[k] * x[t - (width - 1) + k])."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from oxiscan._arguments import acc_dtype, is_silu

from ._common import document_starts, documents, initial_row


def causal_conv1d_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
    cu_seqlens: Tensor | None = None,
) -> Any:
    """See `oxiscan.ops.causal_conv1d_fn`."""
    batch, dim, seqlen = x.shape
    if cu_seqlens is not None:
        parts = [
            causal_conv1d_fn(
                x[..., begin:end],
                weight,
                bias,
                None if seq_idx is None else seq_idx[:, begin:end],
                initial_row(initial_states, document, cu_seqlens),
                True,
                activation=activation,
            )
            for document, (begin, end) in enumerate(documents(cu_seqlens, seqlen))
        ]
        out = torch.cat([part[0] for part in parts], dim=-1)
        states = torch.cat([part[1] for part in parts[:-1]])
        if return_final_states and final_states_out is not None:
            states = final_states_out.copy_(states)
        return (out, states) if return_final_states else out
    dtype = acc_dtype(x)
    width = weight.shape[1]
    history = x.new_zeros(batch, dim, width - 1) if initial_states is None else initial_states
    padded = torch.cat([history.to(dtype), x.to(dtype)], dim=-1)

    # The run of equal ids each column belongs to; what came before token 0 belongs to token 0's run.
    run = torch.zeros(batch, width - 1 + seqlen, dtype=torch.long, device=x.device)
    if seq_idx is not None:
        run[:, width - 1 :] = document_starts(seq_idx).cumsum(dim=1)

    out = torch.zeros(batch, dim, seqlen, dtype=dtype, device=x.device)
    for k in range(width):
        same_run = run[:, k : k + seqlen] == run[:, width - 1 :]
        tap = weight[:, k].to(dtype)[:, None] * padded[:, :, k : k + seqlen]
        out = out + torch.where(same_run[:, None], tap, 0.0)
    if bias is not None:
        out = out + bias.to(dtype)[:, None]
    if is_silu(activation):
        out = F.silu(out)
    if seq_idx is not None:
        out = torch.where((seq_idx < 0)[:, None], 0.0, out)
    out = out.to(x.dtype)
    if not return_final_states:
        return out

    last = padded.shape[-1] - (width - 1)
    in_last_run = run[:, last:] == run[:, -1:]
    final_states = torch.where(in_last_run[:, None], padded[:, :, last:], 0.0).to(x.dtype)
    if final_states_out is not None:
        final_states = final_states_out.copy_(final_states)
    return out, final_states
