"""What the reference ops share: documents and dt."""

import torch
import torch.nn.functional as F
from torch import Tensor


def document_starts(seq_idx: Tensor) -> Tensor:
    """(batch, seqlen) bool: True where a token's id differs from the token before; False at token 0."""
    starts = torch.zeros_like(seq_idx, dtype=torch.bool)
    starts[:, 1:] = seq_idx[:, 1:] != seq_idx[:, :-1]
    return starts


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
