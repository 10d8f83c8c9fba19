"""One decode step of the state-space recurrence: state = exp(dt A) state + dt x B; out = C state + D x."""

import torch
import torch.nn.functional as F
from torch import Tensor

from oxiscan._arguments import acc_dtype, not_yet

from ._common import discretize_dt


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
    not_yet(state_batch_indices=state_batch_indices, intermediate_ssm_states=intermediate_ssm_states)
    dtype = acc_dtype(x)
    if x.dim() == 4:
        raise NotImplementedError("x: several tokens (4 dimensions) are not supported yet; allowed: 2 or 3 dimensions")
    if x.dim() == 2:  # no heads: one head of size dim

        def head(tensor: Tensor | None, dim: int) -> Tensor | None:
            return None if tensor is None else tensor.unsqueeze(dim)

        return selective_state_update(
            head(state, 1),  # type: ignore[arg-type]
            head(x, 1),  # type: ignore[arg-type]
            head(dt, 1),  # type: ignore[arg-type]
            head(A, 0),  # type: ignore[arg-type]
            B,
            C,
            head(D, 0),
            head(z, 1),
            head(dt_bias, 0),
            dt_softplus,
        ).squeeze(1)
    nheads = x.shape[1]
    B, C = (t.unsqueeze(1) if t.dim() == 2 else t for t in (B, C))
    B, C = (t.to(dtype).repeat_interleave(nheads // t.shape[1], dim=1) for t in (B, C))
    dt = discretize_dt(dt, dt_bias, dt_softplus, (float("-inf"), float("inf")), dtype)
    decay = torch.exp(dt[..., None] * A.to(dtype))
    new_state = state.to(dtype) * decay + (dt * x.to(dtype))[..., None] * B[:, :, None]
    state.copy_(new_state)
    out = (new_state * C[:, :, None]).sum(-1)
    if D is not None:
        out = out + D.to(dtype) * x.to(dtype)
    if z is not None:
        out = out * F.silu(z.to(dtype))
    return out.to(x.dtype)
