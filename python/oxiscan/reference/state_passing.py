"""The recurrence over chunks: state at the next chunk's start = exp(decay) * state at this one's + what it adds."""

import torch
from torch import Tensor

from oxiscan._arguments import acc_dtype


def state_passing(states: Tensor, decay: Tensor, initial_states: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """See `oxiscan.ops.state_passing`."""
    dtype = acc_dtype(states)
    batch, nchunks, nheads, headdim, dstate = states.shape
    if initial_states is None:
        state = torch.zeros(batch, nheads, headdim, dstate, dtype=dtype, device=states.device)
    else:
        state = initial_states.to(dtype)
    before = []
    for c in range(nchunks):
        before.append(state)
        state = torch.exp(decay[:, c].to(dtype))[..., None, None] * state + states[:, c].to(dtype)
    states_before = torch.stack(before, dim=1).to(states.dtype) if before else states.clone()
    return states_before, state
