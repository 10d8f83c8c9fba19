"""Mamba-1's mixer from the input projection's result on."""

import torch.nn.functional as F
from torch import Tensor

from .causal_conv1d import causal_conv1d_fn
from .rmsnorm_gated import rmsnorm_gated
from .selective_scan import selective_scan_fn


def mamba_inner_fn(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
    checkpoint_lvl: int = 1,
    b_rms_weight: Tensor | None = None,
    c_rms_weight: Tensor | None = None,
    dt_rms_weight: Tensor | None = None,
    b_c_dt_rms_eps: float = 1e-6,
) -> Tensor:
    """See `oxiscan.ops.mamba_inner_fn`; checkpoint_lvl has nothing to act on here."""
    dim = xz.shape[1] // 2
    dstate = A.shape[1]

    def project(tokens: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        bias = None if bias is None else bias.to(tokens.dtype)
        return F.linear(tokens, weight.to(tokens.dtype), bias).to(xz.dtype)

    def norm(value: Tensor, weight: Tensor | None) -> Tensor:
        return value if weight is None else rmsnorm_gated(value, weight, eps=b_c_dt_rms_eps)

    x, z = xz[:, :dim], xz[:, dim:]
    x = causal_conv1d_fn(x, conv1d_weight.reshape(dim, -1), conv1d_bias, activation="silu")
    rest = project(x.mT, x_proj_weight)
    delta, rest = rest.tensor_split([delta_proj_weight.shape[1]], dim=-1)
    delta = norm(project(delta, delta_proj_weight), dt_rms_weight)
    if B is None:
        B, rest = rest.tensor_split([dstate], dim=-1)
        B = (B if B_proj_bias is None else B + B_proj_bias.to(B.dtype)).mT
    if C is None:
        C = (rest if C_proj_bias is None else rest + C_proj_bias.to(rest.dtype)).mT
    B = norm(B, b_rms_weight) if B.dim() == 2 else norm(B.mT, b_rms_weight).mT
    C = norm(C, c_rms_weight) if C.dim() == 2 else norm(C.mT, c_rms_weight).mT
    out = selective_scan_fn(x, delta.mT, A, B, C, D, z, delta_bias, delta_softplus)
    return project(out.mT, out_proj_weight, out_proj_bias)
