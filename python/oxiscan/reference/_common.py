"""What the reference ops share: documents, slots and dt."""

import torch
import torch.nn.functional as F
from torch import Tensor


def document_starts(seq_idx: Tensor) -> Tensor:
    """(batch, seqlen) bool: True where a token's id differs from the token before; False at token 0."""
    starts = torch.zeros_like(seq_idx, dtype=torch.bool)
    starts[:, 1:] = seq_idx[:, 1:] != seq_idx[:, :-1]
    return starts


def documents(cu_seqlens: Tensor, seqlen: int) -> list[tuple[int, int]]:
    """First token and end of each document, and of what lies past the last one."""
    bounds = [*cu_seqlens.tolist(), seqlen]
    return list(zip(bounds, bounds[1:], strict=False))


def initial_row(initial_states: Tensor | None, document: int, cu_seqlens: Tensor) -> Tensor | None:
    """What lies before a document: its row of initial_states, whose single row belongs to the first document."""
    if initial_states is None or document >= cu_seqlens.shape[0] - 1 or document >= initial_states.shape[0]:
        return None
    return initial_states[document : document + 1]


def slots(indices: Tensor | None, batch: int) -> list[tuple[int, int]]:
    """(row, slot) of each row of a batch; a row of padding (-1) has none."""
    if indices is None:
        return [(b, b) for b in range(batch)]
    return [(b, slot) for b, slot in enumerate(indices.tolist()) if slot != -1]


def discretize_dt(
    dt: Tensor, dt_bias: Tensor | None, dt_softplus: bool, dt_limit: tuple[float, float], dtype: torch.dtype
) -> Tensor:
    """Add dt_bias, then softplus, then clamp to dt_limit, in `dtype`."""
    dt = dt.to(dtype)
    if dt_bias is not None:
        dt = dt + dt_bias.to(dtype)
    if dt_softplus:
        dt = F.softplus(dt)
    return dt.clamp(*dt_limit)
