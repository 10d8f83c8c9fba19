"""RMSNorm over groups of the last dimension, gated by silu(z)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oxiscan._arguments import acc_dtype


def rmsnorm_gated(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    z: Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
) -> Tensor:
    """See `oxiscan.ops.rmsnorm_gated`."""
    dtype = acc_dtype(x)
    value = x.to(dtype)
    gate = None if z is None else F.silu(z.to(dtype))
    if gate is not None and not norm_before_gate:
        value = value * gate
    groups = value.unflatten(-1, (-1, group_size or x.shape[-1]))
    rstd = torch.rsqrt(groups.square().mean(-1, keepdim=True) + eps)
    value = (groups * rstd).flatten(-2) * weight.to(dtype)
    if bias is not None:
        value = value + bias.to(dtype)
    if gate is not None and norm_before_gate:
        value = value * gate
    return value.to(x.dtype)


class RMSNormGated(nn.Module):
    """See `oxiscan.ops.RMSNormGated`, which replaces `op` alone."""

    op = staticmethod(rmsnorm_gated)
    bias: Tensor | None

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        group_size: int | None = None,
        norm_before_gate: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if group_size is not None and (group_size < 1 or hidden_size % group_size):
            raise ValueError(f"group_size: got {group_size}; allowed: a divisor of hidden_size = {hidden_size}")
        self.eps = eps
        self.group_size = group_size
        self.norm_before_gate = norm_before_gate
        self.weight = nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set weight to one."""
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        """Normalize x (..., hidden_size), gated by z of the same shape where given."""
        return type(self).op(x, self.weight, self.bias, z, self.eps, self.group_size, self.norm_before_gate)

    def extra_repr(self) -> str:
        return (
            f"{self.weight.shape[0]}, eps={self.eps}, group_size={self.group_size}, "
            f"norm_before_gate={self.norm_before_gate}"
        )
