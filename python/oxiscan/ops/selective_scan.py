"""Mamba-1's selective scan."""

from typing import Any

import torch
from torch import Tensor

from oxiscan._arguments import acc_dtype, check_varlen_states, ndocs, sizes

from . import _kernels
from ._common import empty_like, once_differentiable, results


class _SelectiveScan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        u: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        z: Tensor | None,
        delta_bias: Tensor | None,
        initial_state: Tensor | None,
        seq_idx: Tensor | None,
        cu_seqlens: Tensor | None,
        delta_softplus: bool,
        return_last_state: bool,
        return_varlen_states: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        batch, dim, _ = sizes("u", u, "batch", "dim", "seqlen")
        dstate = sizes("A", A, "dim", "dstate")[1]
        out = torch.empty_like(u)
        last_state = varlen_states = None
        if return_last_state:
            last_state = u.new_empty(batch, dim, dstate, dtype=acc_dtype(u))
        if return_varlen_states:
            varlen_states = u.new_empty(ndocs(cu_seqlens, batch), dim, dstate, dtype=acc_dtype(u))
        tensors = (u, delta, A, B, C, D, z, delta_bias, initial_state, seq_idx, cu_seqlens)
        _kernels.selective_scan_forward(tensors, delta_softplus, out, last_state, varlen_states)
        ctx.save_for_backward(*tensors)
        ctx.delta_softplus = delta_softplus
        ctx.set_materialize_grads(False)
        return out, last_state, varlen_states

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, dout: Tensor | None, dlast_state: Tensor | None, dvarlen_states: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors  # once: activation checkpointing unpacks each tensor a single time
        u, delta, A, B, C, D, z, delta_bias, initial_state, _, _ = tensors
        du, ddelta, dA, dB, dC = (torch.empty_like(t) for t in (u, delta, A, B, C))
        dD, dz, ddelta_bias, dinitial_state = (empty_like(t) for t in (D, z, delta_bias, initial_state))
        gradients = (du, ddelta, dA, dB, dC, dD, dz, ddelta_bias, dinitial_state)
        _kernels.selective_scan_backward(tensors, ctx.delta_softplus, dout, dlast_state, dvarlen_states, *gradients)
        return *gradients, None, None, None, None, None


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
    """Mamba-1's selective scan.

    Per channel d, with a state of (dstate,):
    state[t] = exp(delta[t] A) state[t - 1] + delta[t] u[t] B[t];  out[t] = (state[t] . C[t] + D u[t]) silu(z[t]).

    Args:
        u: (batch, dim, seqlen), float32, float64, bfloat16 or float16, any strides.
        delta: u's shape, in u's dtype or float32; delta_bias is added, then softplus applied if delta_softplus.
        A: (dim, dstate), negative, in u's dtype or float32. A complex A is refused.
        B, C: (batch, ngroups, dstate, seqlen) or (batch, dstate, seqlen), one group, in u's dtype; or (dim, dstate),
            the same for all tokens, in u's dtype or float32. ngroups divides dim, channel d reads group
            d // (dim / ngroups). One may be fixed and the other not; if both vary their ngroups agree.
        D: (dim,), in u's dtype or float32.
        z: u's shape and dtype.
        delta_bias: (dim,), in u's dtype or float32.
        return_last_state: also return the state after the last token, (batch, dim, dstate) float32 (float64 for
            float64). Differentiable.
        initial_state: (batch, dim, dstate), in u's dtype or float32: the state before each sequence's first token.
            With cu_seqlens (ndocs, dim, dstate), before each document's, or (1, dim, dstate), before the first one's.
            Zeros if left out.
        seq_idx: (batch, seqlen) int32: the state starts from zero again where the id differs from the token before.
        cu_seqlens: (ndocs + 1,) int32 or int64 from 0, none smaller than the one before: where the documents packed
            into a batch of 1 begin and end. Repeated values are empty documents, tokens past the last value one more
            document, without a row in the states.
        return_varlen_states: with cu_seqlens, also return the state after each document's last token, (ndocs, dim,
            dstate) in last_state's dtype; for an empty document its initial state. Differentiable.

    Returns:
        out, of u's shape and dtype; with the flags (out, last_state), (out, varlen_states) or (out, last_state,
        varlen_states).

    Raises:
        ValueError, TypeError: an argument that does not fit, by name; return_varlen_states without cu_seqlens.
    """
    check_varlen_states(return_varlen_states, cu_seqlens)
    tensors = (u, delta, A, B, C, D, z, delta_bias, initial_state, seq_idx, cu_seqlens)
    options = (bool(delta_softplus), return_last_state, return_varlen_states)
    return results(*_SelectiveScan.apply(*tensors, *options))
