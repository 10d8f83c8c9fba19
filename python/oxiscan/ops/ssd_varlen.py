"""Mamba-2's chunk scan over packed documents, as a server prefills them."""

from typing import Any

import torch
from torch import Tensor

from oxiscan._arguments import check, check_chunks, check_optional, limits, sizes

from . import _kernels


@torch.no_grad()
def mamba_chunk_scan_combined_varlen(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    cu_chunk_seqlens: Tensor,
    last_chunk_indices: Tensor,
    seq_idx: Tensor,
    out: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_raw_states: bool = False,
    state_dtype: torch.dtype | None = None,
) -> Any:
    """`mamba_chunk_scan_combined` over packed documents whose chunks the caller lays out. For inference: no gradient.

    Args:
        x: (seqlen, nheads, headdim), float32, float64, bfloat16 or float16, any strides.
        dt: (seqlen, nheads); B, C: (seqlen, ngroups, dstate); z: x's shape.
        A, D, dt_bias, dt_softplus, dt_limit, and all dtypes: as for `mamba_chunk_scan_combined`.
        chunk_size: >= 1; the chunks are those of cu_chunk_seqlens, of any length.
        cu_chunk_seqlens: (nchunks + 1,) int32 or int64 from 0: chunk c has the tokens from cu_chunk_seqlens[c] to
            cu_chunk_seqlens[c + 1], none for equal values.
        seq_idx: (nchunks,) int32 or int64, the document of each chunk, its row of initial_states. A document starts
            with a chunk whose value differs from that of the chunk before.
        last_chunk_indices: (ndocs,) int32 or int64, the index of each document's last chunk.
        out: x's shape and dtype, written in place; tokens past the last chunk keep what they hold. It may be x or z
            itself, but not overlap them otherwise.
        initial_states: (ndocs, nheads, headdim, dstate), in x's dtype or float32. Zeros if left out.
        return_raw_states: also return the state after every chunk.
        state_dtype: the dtype of returned states; C's if left out.

    Returns:
        varlen_states (ndocs, nheads, headdim, dstate), the state after each document's last chunk; with
        return_raw_states (varlen_states, raw_states), raw_states (nchunks, nheads, headdim, dstate). A chunk without
        tokens leaves the state as it is.

    Raises:
        ValueError, TypeError: an argument that does not fit, by name; out is untouched then.
    """
    check_chunks(chunk_size, state_dtype)
    seqlen, nheads, headdim = sizes("x", x, "seqlen", "nheads", "headdim")
    _, ngroups, dstate = sizes("B", B, "seqlen", "ngroups", "dstate")
    like_x = {"seqlen": seqlen, "nheads": nheads, "headdim": headdim}
    like_B = {"seqlen": seqlen, "ngroups": ngroups, "dstate": dstate}
    check("dt", dt, {"seqlen": seqlen, "nheads": nheads}, x.dtype, torch.float32)
    check("B", B, like_B, x.dtype)
    check("C", C, like_B, x.dtype)
    check("out", out, like_x, x.dtype)
    check_optional("z", z, like_x, x.dtype)
    (nchunks,) = sizes("seq_idx", seq_idx, "nchunks")
    raw_states = x.new_empty(nchunks, nheads, headdim, dstate, dtype=state_dtype or C.dtype)
    x, dt, B, C = (tensor.unsqueeze(0) for tensor in (x, dt, B, C))
    z = None if z is None else z.unsqueeze(0)
    _kernels.ssd_varlen_forward(
        (x, dt, A, B, C, D, z, dt_bias, initial_states),
        (cu_chunk_seqlens, seq_idx),
        last_chunk_indices,
        bool(dt_softplus),
        limits("dt_limit", dt_limit),
        out.unsqueeze(0),
        raw_states,
    )
    varlen_states = raw_states.index_select(0, last_chunk_indices)
    return (varlen_states, raw_states) if return_raw_states else varlen_states
