"""Decode steps of the state-space recurrence: state = exp(dt A) state + dt x B; out = (C state + D x) silu(z)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from oxiscan._arguments import acc_dtype

from ._common import discretize_dt, slots


@torch.no_grad()
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
    """See `oxiscan.ops.selective_state_update`."""
    dtype = acc_dtype(x)
    heads, several = x.dim() > 2, x.dim() == 4

    def tokens(tensor: Tensor) -> Tensor:
        """(batch, seqlen, nheads, dim) or (batch, seqlen, ngroups, dstate)."""
        tensor = (tensor if several else tensor.unsqueeze(1)).to(dtype)
        return tensor if tensor.dim() == 4 else tensor.unsqueeze(2)

    def parameter(tensor: Tensor) -> Tensor:
        """(nheads, dim[, dstate])."""
        return (tensor if heads else tensor.unsqueeze(0)).to(dtype)

    x_acc, B, C, A = tokens(x), tokens(B), tokens(C), parameter(A)
    batch, seqlen, nheads, _ = x_acc.shape
    B, C = (t.repeat_interleave(nheads // t.shape[2], dim=2) for t in (B, C))
    dt_bias = None if dt_bias is None else parameter(dt_bias)
    dt = discretize_dt(tokens(dt), dt_bias, dt_softplus, (float("-inf"), float("inf")), dtype)

    out = torch.zeros_like(x_acc)
    for b, slot in slots(state_batch_indices, batch):
        new = parameter(state[slot].clone())
        for t in range(seqlen):
            xdt = x_acc[b, t] * dt[b, t]
            new = torch.exp(dt[b, t, :, :, None] * A) * new + xdt[:, :, None] * B[b, t, :, None, :]
            out[b, t] = (new * C[b, t, :, None, :]).sum(-1)
            if D is not None:
                out[b, t] += parameter(D) * x_acc[b, t]
            if z is not None:
                out[b, t] *= F.silu(tokens(z)[b, t])
            if intermediate_ssm_states is not None:
                intermediate_ssm_states[slot, t] = new.reshape(state.shape[1:])
        state[slot] = new.reshape(state.shape[1:])
    return out.to(x.dtype).reshape(x.shape)
