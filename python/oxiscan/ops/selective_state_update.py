"""Decode steps of the state-space recurrence."""

import torch
from torch import Tensor

from oxiscan._arguments import check_tensor

from . import _kernels


def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    state_batch_indices: Tensor | None = None,
    intermediate_ssm_states: Tensor | None = None,
) -> Tensor:
    """A token: state = exp(dt A) state + dt x B; out = (state C + D x) silu(z). state is updated in place.

    For inference: the result carries no gradient. Between the tokens of one call the state is not rounded to its dtype.

    Args:
        state: (batch, nheads, dim, dstate), any floating dtype. With state_batch_indices (slots, nheads, dim, dstate).
            On CUDA dstate is at most 256; the fast path takes a dstate that is a power of two from 8 on, dim a multiple
            of 256 / dstate, and state, A, B and C that are dense and aligned along dstate.
        x: (batch, nheads, dim), one token, or (batch, seqlen, nheads, dim), tokens applied one after another. float32,
            bfloat16, float16 or on the CPU float64.
        dt: x's shape, in x's dtype or float32; dt_bias is added, then softplus applied if dt_softplus.
        A: (nheads, dim, dstate), in x's dtype or float32.
        B, C: in x's dtype, (batch, ngroups, dstate) or (batch, dstate); for x of four dimensions
            (batch, seqlen, ngroups, dstate) or (batch, seqlen, dstate). ngroups divides nheads.
        D, dt_bias: (nheads, dim), in x's dtype or float32.
        z: x's shape and dtype.
        state_batch_indices: (batch,) int32 or int64, the slot of state that each row uses. A row with -1 is padding:
            its result is 0 and nothing is touched. Each slot at most once. On CUDA, where indices are not read before
            the kernel runs, a row with any other index outside the slots gets NaN and touches nothing, and what a slot
            that is taken twice becomes is undefined.
        intermediate_ssm_states: (slots, seqlen, nheads, dim, dstate), any floating dtype, seqlen 1 for one token. Row s
            becomes slot s of state as it is after each token; rows of slots not in this call stay as they are.
        Any strides, expanded (stride 0) dimensions included, but for the two states that are written. Without heads:
        x (batch, dim) and every other argument without its nheads dimension.

    Returns:
        out, of x's shape and dtype.

    Raises:
        ValueError, TypeError: an argument that does not fit, by name, on the CPU a slot that is taken twice or outside
            the state included; nothing is written then.
        NotImplementedError: dstate above 256 on CUDA.
    """
    check_tensor("x", x)
    out = torch.empty_like(x)
    _kernels.selective_state_update(
        state,
        x,
        dt,
        A,
        B,
        C,
        D,
        z,
        dt_bias,
        bool(dt_softplus),
        state_batch_indices,
        intermediate_ssm_states,
        out,
    )
    return out
