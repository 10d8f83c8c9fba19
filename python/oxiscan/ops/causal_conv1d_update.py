"""The causal convolution when serving: decode steps, and the states that packed documents leave for them."""

import torch
from torch import Tensor

from oxiscan._arguments import check_tensor, check_whole, is_silu, ndocs, sizes

from . import _kernels


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
    """`causal_conv1d_fn` going on after the inputs in conv_state, which is updated in place.

    For inference: the result carries no gradient. It has the bits that `causal_conv1d_fn` gives for the same inputs.

    Args:
        x: (batch, dim), one token, or (batch, dim, seqlen), tokens applied one after another. float32, float64,
            bfloat16 or float16.
        conv_state: (batch, dim, state_len >= width - 1) in x's dtype: the last state_len inputs, newest last. With
            conv_state_indices (slots, dim, state_len).
        weight: (dim, width), width 2 to 8, in x's dtype or float32.
        bias: (dim,), in x's dtype or float32.
        activation: None, "silu" or "swish".
        cache_seqlens: (batch,) int32 or int64, how many tokens each sequence has seen before this call. conv_state is
            then a circular buffer: the input at position p lies at index p mod state_len and stays there. A token
            reads the width - 1 places before its own, whatever they hold: zeros, for a sequence to start from nothing.
        conv_state_indices: (batch,) int32 or int64, the slot of conv_state that each row uses. A row with -1 is
            padding: its result is 0 and nothing is touched.
        intermediate_conv_states: (slots, seqlen, dim, state_len) in x's dtype, seqlen 1 for x of two dimensions. Row s
            becomes slot s of conv_state as it is after each token; rows of slots not in this call stay as they are.
        Any strides, expanded (stride 0) dimensions included, but for the two states that are written.

    Returns:
        out, of x's shape and dtype.

    Raises:
        ValueError, TypeError: an argument that does not fit, by name, a slot that is taken twice or outside the state
            included; nothing is written then.
    """
    check_tensor("x", x)
    out = torch.empty_like(x)
    _kernels.causal_conv1d_update(
        x,
        conv_state,
        weight,
        bias,
        is_silu(activation),
        cache_seqlens,
        conv_state_indices,
        intermediate_conv_states,
        out,
    )
    return out


@torch.no_grad()
def causal_conv1d_varlen_states(x: Tensor, cu_seqlens: Tensor, state_len: int) -> Tensor:
    """The conv_state that each of several packed documents leaves. For inference: it carries no gradient.

    Args:
        x: (total_tokens, dim), float32, float64, bfloat16 or float16, any strides: documents one after the other.
        cu_seqlens: (ndocs + 1,) int32 or int64, where documents begin and end: from 0, none smaller than the one
            before, at most total_tokens. Tokens past the last value belong to no document.
        state_len: how many inputs to keep, a whole number >= 0.

    Returns:
        (ndocs, dim, state_len) in x's dtype: each document's last state_len inputs, newest last, zeros in front where
        it is shorter.

    Raises:
        ValueError, TypeError: an argument that does not fit, by name.
    """
    dim = sizes("x", x, "total_tokens", "dim")[1]
    check_whole("state_len", state_len, lowest=0)
    states = x.new_empty(ndocs(cu_seqlens, batch=1), dim, state_len)
    _kernels.causal_conv1d_varlen_states(x, cu_seqlens, states)
    return states
