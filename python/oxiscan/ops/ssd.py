"""Mamba-2's chunk scan (state-space duality)."""

from typing import Any

import torch
from torch import Tensor

from oxiscan._arguments import acc_dtype, check_chunks, limits, ndocs, sizes, varlen_states_dtype

from . import _kernels
from ._common import Function, apply, empty_like, once_differentiable, results

#: x, dt, A, B, C; D, z, dt_bias, initial_states.
_Tensors = tuple[
    Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None
]  # fmt: skip


def state_elements(headdim: int, dstate: int) -> int:
    """Those of a head's state, in the sizes that CUDA's kernels round up to."""
    return -(-headdim // 64) * 64 * next(size for size in (64, 128, 256) if size >= min(dstate, 256))


def segments_workspace(x: Tensor, dstate: int) -> Tensor | None:
    """What the kernels need to walk a long sequence in segments at once, where it has too few heads to fill a GPU.

    Their number depends on one sequence alone, so that its results do not depend on the batch.
    """
    batch, seqlen, nheads, headdim = x.shape
    # Blocks of the float32 kernel are smaller: two or three fit on a multiprocessor.
    segments_and_heads = 256 if x.dtype == torch.float32 else 128
    segments = min(seqlen // 16384, segments_and_heads // max(nheads, 1))
    if not x.is_cuda or segments < 2:
        return None
    # A row for each of two parts of each segment but the last one, in backward for each direction; one more element for
    # the decay over it.
    elements = state_elements(headdim, dstate) + 1
    return x.new_empty(2 * (segments - 1), batch * nheads, elements, dtype=torch.float32)


def slots(seqlen: int, slot_tokens: int, cu_seqlens: Tensor | None, states_of_documents: Tensor | None) -> int:
    """Slots of a sequence's states in CUDA's kernels: one for so many tokens, then those of documents with states."""
    return -(-seqlen // slot_tokens) + (0 if states_of_documents is None else ndocs(cu_seqlens, 1))


def kept_states(tensors: _Tensors, cu_seqlens: Tensor | None, out: Tensor) -> Tensor | None:
    """For the states that CUDA's kernels keep between forward and backward, where they do."""
    x, _, _, B, C, _, z, _, initial_states = tensors
    if not _kernels.ssd_keeps_states(x, B, C, z, out):
        return None
    batch, seqlen, nheads, headdim = x.shape
    count = slots(seqlen, 128, cu_seqlens, initial_states)
    return x.new_empty(batch * count * nheads * headdim * B.shape[3])


def backward_workspaces(
    tensors: _Tensors,
    packing: tuple[Tensor | None, Tensor | None],
    dout: Tensor | None,
    dvarlen_states: Tensor | None,
    gradients: _Tensors,
    entry_states: Tensor | None,
) -> tuple[tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None], Tensor | None]:
    """What the kernels of `ssd_backward` leave for one another on CUDA: dy, states, partials, cuts, segments.

    And the states that forward kept, if they are of use.
    """
    x, _, _, B, C, D, z, _, initial_states = tensors
    if dout is None or not x.is_cuda:
        return (None, None, None, None, None), None
    dx, _, _, dB, dC, *_ = gradients
    seq_idx, cu_seqlens = packing
    batch, seqlen, nheads, headdim = x.shape
    dstate = B.shape[3]
    windows = (seqlen + 63) // 64
    dy = None if z is None else torch.empty_like(x, memory_format=torch.contiguous_format)
    slot_tokens = _kernels.ssd_backward_slot_tokens(x, dout if dy is None else dy, B, C, dx, dB, dC)
    if slot_tokens != 128:
        entry_states = None
    count = slots(seqlen, slot_tokens, cu_seqlens, dvarlen_states) + 1
    if entry_states is None:
        count += slots(seqlen, slot_tokens, cu_seqlens, initial_states)
    states = x.new_empty(batch * count * nheads * state_elements(headdim, dstate))
    columns = 2 if D is None else 3 if D.dim() == 1 else 2 + headdim
    partials = x.new_empty(batch * nheads * (3 * seqlen + windows * columns), dtype=torch.float32)
    is_packed = seq_idx is not None or cu_seqlens is not None
    cuts = x.new_empty(3 * batch * windows, dtype=torch.int32) if is_packed else None
    return (dy, states, partials, cuts, segments_workspace(x, dstate)), entry_states


def scan_backward(
    tensors: _Tensors,
    packing: tuple[Tensor | None, Tensor | None],
    dt_softplus: bool,
    dt_limit: tuple[float, float],
    dout: Tensor | None,
    dfinal_states: Tensor | None,
    dvarlen_states: Tensor | None,
    gradients: _Tensors,
    entry_states: Tensor | None = None,
) -> None:
    """The kernel, with its workspaces on CUDA, where it takes no None for the gradient of out."""
    x = tensors[0]
    if dout is None and x.is_cuda:
        dout = torch.zeros_like(x)
    workspaces = backward_workspaces(tensors, packing, dout, dvarlen_states, gradients, entry_states)
    _kernels.ssd_backward(
        tensors, packing, dt_softplus, dt_limit, dout, dfinal_states, dvarlen_states, *gradients, *workspaces
    )


class _ChunkScan(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        z: Tensor | None,
        dt_bias: Tensor | None,
        initial_states: Tensor | None,
        seq_idx: Tensor | None,
        cu_seqlens: Tensor | None,
        dt_softplus: bool,
        dt_limit: tuple[float, float],
        return_final_states: bool,
        varlen_dtype: torch.dtype | None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        batch, _, nheads, headdim = sizes("x", x, "batch", "seqlen", "nheads", "headdim")
        dstate = sizes("B", B, "batch", "seqlen", "ngroups", "dstate")[3]
        out = torch.empty_like(x)
        final_states = varlen_states = None
        if return_final_states:
            final_states = x.new_empty(batch, nheads, headdim, dstate, dtype=acc_dtype(x))
        if varlen_dtype is not None:
            varlen_states = x.new_empty(ndocs(cu_seqlens, batch), nheads, headdim, dstate, dtype=varlen_dtype)
        tensors, packing = (x, dt, A, B, C, D, z, dt_bias, initial_states), (seq_idx, cu_seqlens)
        segments = segments_workspace(x, dstate)
        entry_states = kept_states(tensors, cu_seqlens, out) if any(ctx.needs_input_grad) else None
        _kernels.ssd_forward(
            tensors, packing, dt_softplus, dt_limit, out, final_states, varlen_states, segments, entry_states
        )
        ctx.save_for_backward(*tensors, *packing, entry_states)
        ctx.options = dt_softplus, dt_limit
        ctx.set_materialize_grads(False)
        return out, final_states, varlen_states

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, dout: Tensor | None, dfinal_states: Tensor | None, dvarlen_states: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        # Read once: activation checkpointing unpacks each tensor a single time.
        *tensors, seq_idx, cu_seqlens, entry_states = ctx.saved_tensors
        x, dt, A, B, C, D, z, dt_bias, initial_states = tensors
        dx, ddt, dA, dB, dC = (torch.empty_like(t) for t in (x, dt, A, B, C))
        dD, dz, ddt_bias, dinitial_states = (empty_like(t) for t in (D, z, dt_bias, initial_states))
        gradients = (dx, ddt, dA, dB, dC, dD, dz, ddt_bias, dinitial_states)
        packing, (dt_softplus, dt_limit) = (seq_idx, cu_seqlens), ctx.options
        scan_backward(
            (*tensors,), packing, dt_softplus, dt_limit, dout, dfinal_states, dvarlen_states, gradients, entry_states
        )
        return *gradients, None, None, None, None, None, None


def mamba_chunk_scan_combined(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
    return_varlen_states: bool = False,
    state_dtype: torch.dtype | None = None,
) -> Any:
    """Mamba-2's state-space scan.

    Per head, with a state of (headdim, dstate):
    state[t] = exp(dt[t] A) state[t - 1] + dt[t] x[t] B[t]^T;  out[t] = (state[t] C[t] + D x[t]) silu(z[t]).

    A value that is not finite stays within its document, where it may also reach up to 63 tokens before it. A document
    gives the same bits alone and packed with others, gradients of its tokens too; on CUDA if the sequence is shorter
    than 32768 tokens.

    On CUDA headdim and dstate up to 256. In bfloat16 and float16 the fastest kernels run with headdim 64, 80, 96 or
    128, dstate 64, 128 or 256, and rows of x, B, C, z and out's gradient aligned to 16 bytes, on compute capability 9.0
    by wgmma; `python -m oxiscan.info` lists which arguments meet which. float32 goes token by token, its gradients in
    tiles.

    Between forward and backward the arguments are kept and, on CUDA where wgmma serves a call with gradients, a headdim
    other than 80, not compiled by torch.compile, for every 128 tokens of a head a state of x's dtype: less time in all
    than to find them again. Backward has, on CUDA, for as long as it runs, as many gradients of states, and where none
    were kept as many states besides; in calls that wgmma does not serve, or compiled ones, for every 64 tokens. With
    initial_states, or gradients of varlen_states, there is one more for every document.

    Args:
        x: (batch, seqlen, nheads, headdim), float32, bfloat16, float16 or on the CPU float64, any strides.
        dt: (batch, seqlen, nheads), in x's dtype or float32; dt_bias is added, then softplus applied if dt_softplus,
            then it is clamped to dt_limit. A clamped dt has no gradient.
        A: (nheads,), negative, in x's dtype or float32.
        B, C: (batch, seqlen, ngroups, dstate) in x's dtype; ngroups divides nheads, head h reads group
            h // (nheads / ngroups).
        chunk_size: >= 1; the result does not depend on it beyond rounding.
        D: (nheads,) or (nheads, headdim), in x's dtype or float32.
        z: x's shape and dtype.
        dt_bias: (nheads,), in x's dtype or float32.
        initial_states: (batch, nheads, headdim, dstate), in x's dtype or float32; they belong to the run of equal ids
            that contains token 0. With cu_seqlens (ndocs, nheads, headdim, dstate), one for each document, or
            (1, nheads, headdim, dstate), for the first document. Zeros if left out.
        seq_idx: (batch, seqlen) int32, the document of each token: the state is 0 where the id differs from the token
            before.
        cu_seqlens: (ndocs + 1,) int32 or int64, for a batch of 1: document i has the tokens from cu_seqlens[i] to
            cu_seqlens[i + 1]. Starts at 0, repeats for a document without tokens; tokens past the last value are one
            more document, without states. Documents start anew as with seq_idx, which may cut them further.
        return_final_states: also return the state after the last token, (batch, nheads, headdim, dstate) float32
            (float64 for float64). Differentiable.
        return_varlen_states: with cu_seqlens, also return the state after each document's last token, (ndocs, nheads,
            headdim, dstate) in state_dtype; a document without tokens gives its initial state. Differentiable.
        state_dtype: the dtype of states that are returned in C's dtype if it is left out: varlen_states.

    Returns:
        out, of x's shape and dtype; with the flags (out, final_states), (out, varlen_states) or
        (out, final_states, varlen_states).

    Raises:
        ValueError, TypeError: an argument that does not fit, by name.
        NotImplementedError: on CUDA, a larger headdim or dstate.
    """
    check_chunks(chunk_size, state_dtype)
    sizes("C", C, "batch", "seqlen", "ngroups", "dstate")
    varlen_dtype = varlen_states_dtype(return_varlen_states, cu_seqlens, state_dtype, C.dtype)
    tensors = (x, dt, A, B, C, D, z, dt_bias, initial_states, seq_idx, cu_seqlens)
    options = (bool(dt_softplus), limits("dt_limit", dt_limit), return_final_states, varlen_dtype)
    out, *states = apply(_ChunkScan, *tensors, *options)
    return results(out, *states)
