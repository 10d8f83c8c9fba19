"""The causal convolution when serving, token by token: out = act(bias + sum_k weight[k] * source[k])."""

import torch
import torch.nn.functional as F
from torch import Tensor

from oxiscan._arguments import acc_dtype, is_silu

from ._common import slots


@torch.no_grad()
def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: Tensor | None = None,
    conv_state_indices: Tensor | None = None,
    intermediate_conv_states: Tensor | None = None,
) -> Tensor:
    """See `oxiscan.ops.causal_conv1d_update`."""
    dtype = acc_dtype(x)
    tokens = x.unsqueeze(-1) if x.dim() == 2 else x
    width, state_len = weight.shape[1], conv_state.shape[-1]
    out = torch.zeros(tokens.shape, dtype=dtype, device=x.device)
    for b, slot in slots(conv_state_indices, tokens.shape[0]):
        state = conv_state[slot]
        for t in range(tokens.shape[-1]):
            new = tokens[b, :, t : t + 1]
            if cache_seqlens is None:
                sources = torch.cat([state, new], dim=-1)[:, -width:]
                state.copy_(torch.cat([state[:, 1:], new], dim=-1))
            else:
                position = int(cache_seqlens[b]) + t
                before = [(position - k) % state_len for k in range(width - 1, 0, -1)]
                sources = torch.cat([state[:, before], new], dim=-1)
                state[:, position % state_len] = new[:, 0]
            out[b, :, t] = (sources.to(dtype) * weight.to(dtype)).sum(-1)
            if bias is not None:
                out[b, :, t] += bias.to(dtype)
            if is_silu(activation):
                out[b, :, t] = F.silu(out[b, :, t])
            if intermediate_conv_states is not None:
                intermediate_conv_states[slot, t] = state
    return out.to(x.dtype).reshape(x.shape)


@torch.no_grad()
def causal_conv1d_varlen_states(x: Tensor, cu_seqlens: Tensor, state_len: int) -> Tensor:
    """See `oxiscan.ops.causal_conv1d_varlen_states`."""
    bounds = cu_seqlens.tolist()
    states = x.new_zeros(len(bounds) - 1, x.shape[1], state_len)
    for document, (begin, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
        last = x[max(begin, end - state_len) : end]
        states[document, :, state_len - last.shape[0] :] = last.T
    return states
