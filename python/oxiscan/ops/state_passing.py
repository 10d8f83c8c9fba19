"""The short recurrence over chunk states; the same op carries a state from one rank to the next."""

from typing import Any

import torch
from torch import Tensor

from oxiscan._arguments import acc_dtype, sizes

from . import _kernels
from ._common import Function, apply, empty_like, once_differentiable


class _StatePassing(Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, decay: Tensor, initial_states: Tensor | None) -> tuple[Tensor, Tensor]:
        batch, _, nheads, headdim, dstate = sizes("states", states, "batch", "nchunks", "nheads", "headdim", "dstate")
        states_before = torch.empty_like(states)
        final_states = states.new_empty(batch, nheads, headdim, dstate, dtype=acc_dtype(states))
        _kernels.state_passing_forward(states, decay, initial_states, states_before, final_states)
        ctx.save_for_backward(states_before, decay, initial_states)
        ctx.set_materialize_grads(False)
        return states_before, final_states

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dstates_before: Tensor | None, dfinal_states: Tensor | None) -> tuple[Tensor | None, ...]:
        states_before, decay, initial_states = ctx.saved_tensors
        dstates, ddecay = torch.empty_like(states_before), torch.empty_like(decay)
        dinitial_states = empty_like(initial_states)
        partials = None
        if states_before.is_cuda:
            # What each warp of a head adds to ddecay: it has 32 packs of 16 bytes, of which a row takes whole ones.
            headdim, dstate = states_before.shape[3:]
            packs = headdim * -(-dstate * states_before.element_size() // 16)
            partials = decay.new_empty(max(-(-packs // 32), 1), 1, decay.numel())
        inputs = (states_before, decay, initial_states, dstates_before, dfinal_states)
        _kernels.state_passing_backward(*inputs, dstates, ddecay, dinitial_states, partials)
        return dstates, ddecay, dinitial_states


def state_passing(states: Tensor, decay: Tensor, initial_states: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Carry a state over chunks: state[c + 1] = exp(decay[c]) state[c] + states[c], state[0] = initial_states.

    Args:
        states: (batch, nchunks, nheads, headdim, dstate), what each chunk adds; float32, bfloat16, float16 or on the
            CPU float64, any strides. On CUDA the fast path takes rows along dstate that in all tensors are dense, a
            multiple of 16 bytes long and aligned to 16 bytes.
        decay: (batch, nchunks, nheads), the logarithm of each chunk's decay; float32 (or float64 with float64 states).
        initial_states: (batch, nheads, headdim, dstate), in states' dtype or float32; zeros if left out.

    Returns:
        states_before: of states' shape and dtype, the state at each chunk's start.
        final_states: (batch, nheads, headdim, dstate) float32 (float64 for float64), the state after the last chunk.
        Both are differentiable in all three arguments.

    Raises:
        ValueError, TypeError: an argument that does not fit, by name.
    """
    return apply(_StatePassing, states, decay, initial_states)
