"""One decode step of the state-space recurrence."""

import torch
from torch import Tensor

from oxiscan import _C
from oxiscan._arguments import check, check_optional, not_yet, sizes

from ._common import written


def _unsqueeze(tensor: Tensor | None, dim: int) -> Tensor | None:
    return None if tensor is None else tensor.unsqueeze(dim)


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
    """One token: state = exp(dt A) state + dt x B; out = (state C + D x) silu(z). The result carries no gradient.

    Args:
        state: (batch, nheads, dim, dstate), any floating dtype, updated in place.
        x: (batch, nheads, dim), float32, float64, bfloat16 or float16.
        dt: x's shape, in x's dtype or float32; dt_bias is added, then softplus applied if dt_softplus.
        A: (nheads, dim, dstate), in x's dtype or float32.
        B, C: (batch, ngroups, dstate) or (batch, dstate), in x's dtype.
        D, dt_bias: (nheads, dim), in x's dtype or float32.
        z: x's shape and dtype.
        state_batch_indices, intermediate_ssm_states: not supported yet.
        Any strides, expanded (stride 0) dimensions included, but for state. Without heads: x (batch, dim) and every
        other argument without its nheads dimension.

    Returns:
        out, of x's shape and dtype.

    Raises:
        ValueError, TypeError: an argument that does not fit, by name; state is untouched then.
        NotImplementedError: several tokens (x of 4 dimensions), or an argument that is not supported yet.
    """
    not_yet(state_batch_indices=state_batch_indices, intermediate_ssm_states=intermediate_ssm_states)
    if isinstance(x, Tensor) and x.dim() == 2:
        batch, dim = x.shape
        dstate = sizes("state", state, "batch", "dim", "dstate")[2]
        dtypes = (x.dtype, torch.float32)
        check("dt", dt, {"batch": batch, "dim": dim}, *dtypes)
        check("A", A, {"dim": dim, "dstate": dstate}, *dtypes)
        check_optional("D", D, {"dim": dim}, *dtypes)
        check_optional("z", z, {"batch": batch, "dim": dim}, x.dtype)
        check_optional("dt_bias", dt_bias, {"dim": dim}, *dtypes)
        state, x, dt, z = state.unsqueeze(1), x.unsqueeze(1), dt.unsqueeze(1), _unsqueeze(z, 1)
        A, D, dt_bias = A.unsqueeze(0), _unsqueeze(D, 0), _unsqueeze(dt_bias, 0)
        return selective_state_update(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus).squeeze(1)
    if isinstance(x, Tensor) and x.dim() == 4:
        raise NotImplementedError("x: got 4 dimensions (several tokens); allowed: 2 or 3 dimensions")
    sizes("x", x, "batch", "nheads", "dim")
    B, C = (t.unsqueeze(1) if isinstance(t, Tensor) and t.dim() == 2 else t for t in (B, C))
    out = torch.empty_like(x)
    _C.selective_state_update(state, x, dt, A, B, C, D, z, dt_bias, bool(dt_softplus), out)
    written(state)
    return out
