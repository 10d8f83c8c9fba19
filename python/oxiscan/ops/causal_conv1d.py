"""Causal depthwise convolution over a sequence."""

from typing import Any

import torch
from torch import Tensor

from oxiscan._arguments import check, check_tensor, is_silu, ndocs, sizes

from . import _kernels
from ._common import Function, apply, empty_like, once_differentiable


def conv_backward(
    tensors: tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None],
    silu: bool,
    dout: Tensor | None,
    dfinal_states: Tensor | None,
    dx: Tensor,
    dweight: Tensor,
    dbias: Tensor | None,
    dinitial_states: Tensor | None,
) -> None:
    """The kernel, with its workspace on CUDA: the parts of dweight and dbias that blocks of tokens add.

    At most 1024 blocks and, where a row of it is not longer by itself, 16 MB.
    """
    x, partials = tensors[0], None
    if x.is_cuda:
        batch, dim, seqlen = x.shape
        rows = tensors[1].shape[1] + 1
        blocks = max(min(batch * (seqlen // 32 + 1), 1024, 2**22 // max(rows * dim, 1)), 1)
        partials = torch.empty(blocks, rows, dim, dtype=torch.float32, device=x.device)
    _kernels.causal_conv1d_backward(tensors, silu, dout, dfinal_states, dx, dweight, dbias, dinitial_states, partials)


class _CausalConv1d(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        seq_idx: Tensor | None,
        cu_seqlens: Tensor | None,
        initial_states: Tensor | None,
        silu: bool,
        return_final_states: bool,
    ) -> Any:
        check_tensor("x", x)
        out = torch.empty_like(x)
        final_states = None
        if return_final_states:
            batch, dim, _ = sizes("x", x, "batch", "dim", "seqlen")
            width = sizes("weight", weight, "dim", "width")[1]
            final_states = x.new_empty(ndocs(cu_seqlens, batch), dim, max(width - 1, 0))
        tensors = (x, weight, bias, seq_idx, cu_seqlens, initial_states)
        _kernels.causal_conv1d_forward(tensors, silu, out, final_states)
        ctx.save_for_backward(*tensors)
        ctx.silu = silu
        ctx.set_materialize_grads(False)
        return (out, final_states) if return_final_states else out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor | None, dfinal_states: Tensor | None = None) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        x, weight, bias, _, _, initial_states = tensors
        dx, dweight = torch.empty_like(x), torch.empty_like(weight)
        dbias, dinitial_states = empty_like(bias), empty_like(initial_states)
        conv_backward(tensors, ctx.silu, dout, dfinal_states, dx, dweight, dbias, dinitial_states)
        return dx, dweight, dbias, None, None, dinitial_states, None, None


def causal_conv1d_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
    cu_seqlens: Tensor | None = None,
) -> Any:
    """Causal depthwise convolution: out[t] = act(bias + sum_k weight[k] x[t - (width - 1) + k]).

    Args:
        x: (batch, dim, seqlen), float32, float64, bfloat16 or float16, any strides: both layouts, channels or tokens
            innermost, are read as they lie, split views too.
        weight: (dim, width), width 2 to 8, in x's dtype or float32.
        bias: (dim,), in x's dtype or float32.
        seq_idx: (batch, seqlen) int32, the document of each token. One starts wherever the id differs from the token
            before; no tap reaches across. A token with a negative id gives 0.
        initial_states: (batch, dim, width - 1), the inputs before token 0, in x's dtype or float32; they belong to the
            run of equal ids that contains token 0. With cu_seqlens (ndocs, dim, width - 1), one for each document, or
            (1, dim, width - 1), for the first document. Zeros if left out.
        return_final_states: also return the last width - 1 inputs of the last run of equal ids, (batch, dim, width - 1)
            in x's dtype: the initial states of what follows. With cu_seqlens (ndocs, dim, width - 1), those of each
            document; a document without tokens gives its initial state. Differentiable.
        final_states_out: where to write those, instead of a new tensor; of their shape and dtype.
        activation: None, "silu" or "swish".
        cu_seqlens: (ndocs + 1,) int32 or int64, for a batch of 1: document i has the tokens from cu_seqlens[i] to
            cu_seqlens[i + 1]. Starts at 0, repeats for a document without tokens; tokens past the last value are one
            more document, without states. Documents start anew as with seq_idx, which may cut them further.

    Returns:
        out, of x's shape, dtype and layout; with return_final_states (out, final_states).

    Raises:
        ValueError, TypeError: an argument that does not fit, by name.
    """
    if final_states_out is not None:
        batch, dim, _ = sizes("x", x, "batch", "dim", "seqlen")
        width = sizes("weight", weight, "dim", "width")[1]
        rows = {"batch" if cu_seqlens is None else "ndocs": ndocs(cu_seqlens, batch)}
        check("final_states_out", final_states_out, rows | {"dim": dim, "width - 1": width - 1}, x.dtype)
        if final_states_out.device != x.device:
            raise ValueError(f"final_states_out: got a tensor on {final_states_out.device}; allowed: {x.device}, as x")
        if any(
            size > 1 and stride == 0
            for size, stride in zip(final_states_out.shape, final_states_out.stride(), strict=True)
        ):
            raise ValueError("final_states_out: got an expanded tensor; allowed: one with an element for each value")
    silu = is_silu(activation)
    results = apply(_CausalConv1d, x, weight, bias, seq_idx, cu_seqlens, initial_states, silu, return_final_states)
    if not return_final_states:
        return results
    out, final_states = results
    if final_states_out is not None:
        final_states = final_states_out.copy_(final_states)
    return out, final_states
