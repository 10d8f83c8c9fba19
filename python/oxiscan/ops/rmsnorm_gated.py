"""RMSNorm over groups of the last dimension, gated by silu(z)."""

from typing import Any

import torch
from torch import Tensor

from oxiscan import reference
from oxiscan._arguments import check_eps

from . import _kernels
from ._common import Function, apply, empty_like, once_differentiable


def norm_backward(
    tensors: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
    options: tuple[float, int | None, bool],
    dout: Tensor,
    dx: Tensor,
    dweight: Tensor,
    dbias: Tensor | None,
    dz: Tensor | None,
) -> None:
    """The kernel, with its workspace on CUDA: the parts of dweight and dbias that blocks of rows add.

    At most 1024 blocks of threads and, where a row of it is not longer by itself, 16 MB a parameter.
    """
    x, partials = tensors[0], None
    if x.is_cuda:
        dim = x.shape[-1]
        ngroups = dim // (options[1] or dim)
        blocks = max(min(x.numel() // dim, 1024 // ngroups, 2**22 // dim), 1)
        parameters = 1 if dbias is None else 2
        partials = torch.empty(blocks, parameters, dim, dtype=torch.float32, device=x.device)
    _kernels.rmsnorm_gated_backward(tensors, options, dout, dx, dweight, dbias, dz, partials)


class _RMSNormGated(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        z: Tensor | None,
        options: tuple[float, int | None, bool],
    ) -> Tensor:
        out = torch.empty_like(x)
        tensors = (x, weight, bias, z)
        _kernels.rmsnorm_gated_forward(tensors, options, out)
        ctx.save_for_backward(*tensors)
        ctx.options = options
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        x, weight, bias, z = tensors
        dx, dweight = torch.empty_like(x), torch.empty_like(weight)
        dbias, dz = empty_like(bias), empty_like(z)
        norm_backward(tensors, ctx.options, dout, dx, dweight, dbias, dz)
        return dx, dweight, dbias, dz, None


def rmsnorm_gated(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    z: Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
) -> Tensor:
    """RMSNorm over groups of the last dimension, gated by silu(z).

    norm_before_gate: out = (x / rms(x) weight + bias) silu(z); otherwise out = v / rms(v) weight + bias with
    v = x silu(z). rms(v) = sqrt(mean(v^2) + eps) over each group of group_size elements.

    Args:
        x: (..., dim), float32, bfloat16, float16 or on the CPU float64, any strides. On CUDA the fast path
            takes groups of up to 16384 elements of 2 bytes or 8192 of 4 (for gradients with z half of that) that in all
            tensors are dense, a multiple of 16 bytes long and aligned to 16 bytes; gradients with bias take the other.
        weight, bias: (dim,), in x's dtype or float32.
        z: x's shape and dtype; no gate if left out.
        eps: >= 0.
        group_size: a divisor of dim; dim if left out.

    Returns:
        out, of x's shape and dtype.

    Raises:
        ValueError, TypeError: an argument that does not fit, by name.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"x: got {type(x).__name__}; allowed: torch.Tensor")
    if group_size is not None and (not isinstance(group_size, int) or group_size < 1):
        raise ValueError(f"group_size: got {group_size!r}; allowed: None or a divisor of dim")
    return apply(_RMSNormGated, x, weight, bias, z, (check_eps("eps", eps), group_size, bool(norm_before_gate)))


class RMSNormGated(reference.RMSNormGated):
    """`rmsnorm_gated` as a module: weight (hidden_size,) of ones, no bias.

    Args:
        hidden_size: the size of the last dimension.
        eps, group_size, norm_before_gate: as for `rmsnorm_gated`.
        device, dtype: of the weight.
    """

    op = staticmethod(rmsnorm_gated)
