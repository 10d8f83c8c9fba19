"""Everything between a Mamba-1 mixer's input projection and its result."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from oxiscan._arguments import FLOATS, check, check_eps, check_optional, sizes

from .causal_conv1d import causal_conv1d_fn
from .rmsnorm_gated import rmsnorm_gated
from .selective_scan import selective_scan_fn


def _normalized(matrix: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """B or C, in any form that the scan takes, with an RMS norm over dstate where there is a weight."""
    if weight is None:
        return matrix
    if matrix.dim() == 2:
        return rmsnorm_gated(matrix, weight, eps=eps)
    return rmsnorm_gated(matrix.transpose(-1, -2), weight, eps=eps).transpose(-1, -2)


def _check_given(name: str, given: Tensor, dim: int, dstate: int, dtype: torch.dtype) -> None:
    """Refuse a B or C whose dstate or dtype does not fit; the scan checks the rest."""
    forms = "(dim, dstate), (batch, dstate, seqlen) or (batch, ngroups, dstate, seqlen)"
    if not isinstance(given, Tensor):
        raise TypeError(f"{name}: got {type(given).__name__}; allowed: torch.Tensor")
    if not 2 <= given.dim() <= 4 or given.shape[-1 if given.dim() == 2 else -2] != dstate:
        raise ValueError(f"{name}: got shape {tuple(given.shape)}; allowed: {forms} with dstate = {dstate}")
    if given.dim() == 2:
        check(name, given, {"dim": dim, "dstate": dstate}, dtype, torch.float32)
    else:
        names = ("batch", "dstate", "seqlen") if given.dim() == 3 else ("batch", "ngroups", "dstate", "seqlen")
        check(name, given, dict(zip(names, given.shape, strict=True)), dtype)


def _conv_and_scan(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    A: Tensor,
    B: Tensor | None,
    C: Tensor | None,
    D: Tensor | None,
    delta_bias: Tensor | None,
    B_proj_bias: Tensor | None,
    C_proj_bias: Tensor | None,
    b_rms_weight: Tensor | None,
    c_rms_weight: Tensor | None,
    dt_rms_weight: Tensor | None,
    delta_softplus: bool,
    eps: float,
) -> Tensor:
    dtype = xz.dtype
    x, z = xz.chunk(2, dim=1)
    x = causal_conv1d_fn(x, conv1d_weight, conv1d_bias, activation="silu")
    features = F.linear(x.transpose(1, 2), x_proj_weight.to(dtype))
    delta_rank, dstate = delta_proj_weight.shape[1], A.shape[1]
    delta = F.linear(features[..., :delta_rank], delta_proj_weight.to(dtype)).to(dtype)
    if dt_rms_weight is not None:
        delta = rmsnorm_gated(delta, dt_rms_weight, eps=eps)
    if B is None:
        B = features[..., delta_rank : delta_rank + dstate].to(dtype).transpose(1, 2)
        if B_proj_bias is not None:
            B = B + B_proj_bias.to(dtype)[:, None]
    if C is None:
        C = features[..., features.shape[-1] - dstate :].to(dtype).transpose(1, 2)
        if C_proj_bias is not None:
            C = C + C_proj_bias.to(dtype)[:, None]
    B, C = _normalized(B, b_rms_weight, eps), _normalized(C, c_rms_weight, eps)
    return selective_scan_fn(x, delta.transpose(1, 2), A, B, C, D, z, delta_bias, delta_softplus)


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
    """A Mamba-1 mixer from the input projection's result on: convolution, projections of its result, scan, output.

    With x, z the halves of xz: x = silu(conv(x)); x_proj_weight x[t] gives, in this order, delta_rank features, then
    B[t] and C[t] where these are left out; delta[t] = delta_proj_weight (those features); y is `selective_scan_fn` of
    these, and out[t] = out_proj_weight y[t] + out_proj_bias.

    Args:
        xz: (batch, 2 dim, seqlen), float32, float64, bfloat16 or float16, any strides.
        conv1d_weight: (dim, 1, width) or (dim, width), width 2 to 8; conv1d_bias: (dim,). In xz's dtype or float32.
        x_proj_weight: (delta_rank + dstate for each of B and C that is left out, dim).
        delta_proj_weight: (dim, delta_rank).
        out_proj_weight: (out_features, dim); out_proj_bias: (out_features,). The projections run in xz's dtype, to
            which their weights of another floating dtype are cast, under autocast in autocast's.
        A: (dim, dstate), negative, in xz's dtype or float32.
        B, C: any form that `selective_scan_fn` takes, in place of the projected ones, which have one group.
        D, delta_bias: (dim,), in xz's dtype or float32.
        B_proj_bias, C_proj_bias: (dstate,), any floating dtype, added to a projected B or C; only without B or C given.
        delta_softplus: as for `selective_scan_fn`.
        checkpoint_lvl: 0 keeps what backward needs, 1 computes all before the output projection once more in backward
            and keeps only its inputs and its result. Same bits.
        b_rms_weight, c_rms_weight: (dstate,), dt_rms_weight: (dim,), in xz's dtype or float32: where given, B and C
            (after their bias) and delta (after its projection) become weight v / sqrt(mean(v^2) + b_c_dt_rms_eps).

    Returns:
        out (batch, seqlen, out_features) in xz's dtype, under autocast in autocast's.

    Raises:
        ValueError, TypeError: an argument that does not fit, by name.
    """
    batch, channels, seqlen = sizes("xz", xz, "batch", "2 dim", "seqlen")
    check("xz", xz, {"batch": batch, "2 dim": channels, "seqlen": seqlen}, *FLOATS)
    if channels == 0 or channels % 2:
        raise ValueError(f"xz: got {channels} channels; allowed: 2 dim, x and z")
    dim = {"dim": channels // 2}
    dtypes = (xz.dtype, torch.float32)
    if isinstance(conv1d_weight, Tensor) and conv1d_weight.dim() == 3 and conv1d_weight.shape[1] == 1:
        conv1d_weight = conv1d_weight.squeeze(1)
    width = sizes("conv1d_weight", conv1d_weight, "dim", "width")[1]
    if not 2 <= width <= 8:
        raise ValueError(f"conv1d_weight: got width = {width}; allowed: width from 2 to 8")
    check("conv1d_weight", conv1d_weight, dim | {"width": width}, *dtypes)
    check_optional("conv1d_bias", conv1d_bias, dim, *dtypes)
    dstate = {"dstate": sizes("A", A, "dim", "dstate")[1]}
    delta_rank = sizes("delta_proj_weight", delta_proj_weight, "dim", "delta_rank")[1]
    check("delta_proj_weight", delta_proj_weight, dim | {"delta_rank": delta_rank}, *FLOATS)
    features = ["delta_rank"] + ["dstate"] * ((B is None) + (C is None))
    nfeatures = delta_rank + dstate["dstate"] * (len(features) - 1)
    check("x_proj_weight", x_proj_weight, {" + ".join(features): nfeatures} | dim, *FLOATS)
    out_features = {"out_features": sizes("out_proj_weight", out_proj_weight, "out_features", "dim")[0]}
    check("out_proj_weight", out_proj_weight, out_features | dim, *FLOATS)
    check_optional("out_proj_bias", out_proj_bias, out_features, *FLOATS)
    for name, bias, given in (("B", B_proj_bias, B), ("C", C_proj_bias, C)):
        if bias is not None and given is not None:
            raise ValueError(f"{name}_proj_bias: got a tensor beside {name}; allowed: one of the two")
        check_optional(f"{name}_proj_bias", bias, dstate, *FLOATS)
    for name, given in (("B", B), ("C", C)):
        if given is not None:
            _check_given(name, given, dim["dim"], dstate["dstate"], xz.dtype)
    check_optional("b_rms_weight", b_rms_weight, dstate, *dtypes)
    check_optional("c_rms_weight", c_rms_weight, dstate, *dtypes)
    check_optional("dt_rms_weight", dt_rms_weight, dim, *dtypes)
    check_eps("b_c_dt_rms_eps", b_c_dt_rms_eps)
    if checkpoint_lvl not in (0, 1):
        raise ValueError(f"checkpoint_lvl: got {checkpoint_lvl!r}; allowed: 0 or 1")
    arguments: tuple[Any, ...] = (
        xz,
        conv1d_weight,
        conv1d_bias,
        x_proj_weight,
        delta_proj_weight,
        A,
        B,
        C,
        D,
        delta_bias,
        B_proj_bias,
        C_proj_bias,
        b_rms_weight,
        c_rms_weight,
        dt_rms_weight,
        delta_softplus,
        b_c_dt_rms_eps,
    )
    if checkpoint_lvl == 1 and torch.is_grad_enabled():
        try:
            out = checkpoint(_conv_and_scan, *arguments, use_reentrant=False, preserve_rng_state=False)
        except Exception as error:
            # torch's checkpoint (2.11; no longer 2.13) leaves its hooks on this thread while a frame of it lives, as in
            # the traceback of an error that is kept: the backward of what comes next would run this call again.
            raise error.with_traceback(None) from error.__cause__
    else:
        out = _conv_and_scan(*arguments)
    bias = None if out_proj_bias is None else out_proj_bias.to(out.dtype)
    return F.linear(out.transpose(1, 2), out_proj_weight.to(out.dtype), bias)
