"""Everything between a Mamba-2 mixer's input and output projection, as one op for training."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from oxiscan._arguments import (
    FLOATS,
    acc_dtype,
    check,
    check_chunks,
    check_eps,
    check_optional,
    check_whole,
    is_silu,
    limits,
    ndocs,
    sizes,
    varlen_states_dtype,
)

from . import _kernels
from ._common import empty_like, expect_cpu, once_differentiable, results
from .causal_conv1d import conv_backward
from .rmsnorm_gated import norm_backward
from .ssd import scan_backward


class _Sizes(NamedTuple):
    """How zxbcdt splits: z (dim), xBC (dim + 2 ngroups dstate), dt (nheads)."""

    nheads: int
    headdim: int
    ngroups: int
    dstate: int

    @property
    def dim(self) -> int:
        return self.nheads * self.headdim

    @property
    def conv_dim(self) -> int:
        return self.dim + 2 * self.ngroups * self.dstate

    def split(self, zxbcdt: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        z, xBC, dt = zxbcdt.split([self.dim, self.conv_dim, self.nheads], dim=-1)
        return z, xBC, dt

    def heads(self, channels: Tensor) -> Tensor:
        """(batch, seqlen, dim) as (batch, seqlen, nheads, headdim)."""
        return channels.unflatten(-1, (self.nheads, self.headdim))

    def scan_operands(self, xBC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x by heads, B and C by groups: views of the convolution's result."""
        x, B, C = xBC.split([self.dim, self.ngroups * self.dstate, self.ngroups * self.dstate], dim=-1)
        groups = (self.ngroups, self.dstate)
        return self.heads(x), B.unflatten(-1, groups), C.unflatten(-1, groups)


class _Options(NamedTuple):
    """The arguments that are not tensors."""

    sizes: _Sizes
    silu: bool
    dt_limit: tuple[float, float]
    rmsnorm_eps: float
    norm_before_gate: bool
    return_final_states: bool
    return_final_conv_states: bool
    varlen_dtype: torch.dtype | None

    def norm(self) -> tuple[float, int, bool]:
        """eps, group_size and norm_before_gate of the gated norm."""
        return self.rmsnorm_eps, self.sizes.dim // self.sizes.ngroups, self.norm_before_gate


class _SplitConv1dScan(torch.autograd.Function):
    """The gate is applied by the norm where there is one, else by the scan."""

    @staticmethod
    def forward(
        ctx: Any,
        zxbcdt: Tensor,
        conv1d_weight: Tensor,
        conv1d_bias: Tensor | None,
        dt_bias: Tensor,
        A: Tensor,
        D: Tensor,
        rmsnorm_weight: Tensor | None,
        initial_states: Tensor | None,
        initial_conv_states: Tensor | None,
        seq_idx: Tensor | None,
        cu_seqlens: Tensor | None,
        options: _Options,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        split = options.sizes
        batch, rows = zxbcdt.shape[0], ndocs(cu_seqlens, zxbcdt.shape[0])
        z, xBC, dt = split.split(zxbcdt)
        final_states = final_conv_states = varlen_states = None
        state = (split.nheads, split.headdim, split.dstate)
        if options.return_final_states:
            final_states = zxbcdt.new_empty(batch, *state, dtype=acc_dtype(zxbcdt))
        if options.return_final_conv_states:
            final_conv_states = zxbcdt.new_empty(rows, split.conv_dim, conv1d_weight.shape[1] - 1)
        if options.varlen_dtype is not None:
            varlen_states = zxbcdt.new_empty(rows, *state, dtype=options.varlen_dtype)

        conv, y = torch.empty_like(xBC), torch.empty_like(z)
        conv_tensors = (xBC.transpose(1, 2), conv1d_weight, conv1d_bias, seq_idx, cu_seqlens, initial_conv_states)
        _kernels.causal_conv1d_forward(conv_tensors, options.silu, conv.transpose(1, 2), final_conv_states)
        gate = split.heads(z) if rmsnorm_weight is None else None
        x, B, C = split.scan_operands(conv)
        scan_tensors = (x, dt, A, B, C, D, gate, dt_bias, initial_states)
        packing = (seq_idx, cu_seqlens)
        states = (final_states, varlen_states)
        _kernels.ssd_forward(scan_tensors, packing, True, options.dt_limit, split.heads(y), *states, None, None)
        out = y
        if rmsnorm_weight is not None:
            out = torch.empty_like(y)
            _kernels.rmsnorm_gated_forward((y, rmsnorm_weight, None, z), options.norm(), out)

        ctx.save_for_backward(
            zxbcdt,
            conv1d_weight,
            conv1d_bias,
            dt_bias,
            A,
            D,
            rmsnorm_weight,
            initial_states,
            initial_conv_states,
            seq_idx,
            cu_seqlens,
            None if rmsnorm_weight is None else y,
        )
        ctx.options = options
        ctx.set_materialize_grads(False)
        return out, final_states, final_conv_states, varlen_states

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any,
        dout: Tensor | None,
        dfinal_states: Tensor | None,
        dfinal_conv_states: Tensor | None,
        dvarlen_states: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        zxbcdt, conv1d_weight, conv1d_bias, dt_bias, A, D, rmsnorm_weight, *rest = ctx.saved_tensors
        initial_states, initial_conv_states, seq_idx, cu_seqlens, y = rest
        options: _Options = ctx.options
        split = options.sizes
        z, xBC, dt = split.split(zxbcdt)
        dzxbcdt = torch.empty_like(zxbcdt)
        dz, dxBC, ddt = split.split(dzxbcdt)
        gate = dgate = None

        dy, drmsnorm_weight = dout, None
        if rmsnorm_weight is None:
            gate, dgate = split.heads(z), split.heads(dz)
        elif dout is None:
            drmsnorm_weight = torch.zeros_like(rmsnorm_weight)
            dz.zero_()
        else:
            dy, drmsnorm_weight = torch.empty_like(y), torch.empty_like(rmsnorm_weight)
            norm_tensors = (y, rmsnorm_weight, None, z)
            norm_backward(norm_tensors, options.norm(), dout, dy, drmsnorm_weight, None, dz)

        # The convolution is recomputed: cheaper than keeping its result from forward on.
        conv, dconv = torch.empty_like(xBC), torch.empty_like(xBC)
        conv_tensors = (xBC.transpose(1, 2), conv1d_weight, conv1d_bias, seq_idx, cu_seqlens, initial_conv_states)
        _kernels.causal_conv1d_forward(conv_tensors, options.silu, conv.transpose(1, 2), None)

        x, B, C = split.scan_operands(conv)
        dx, dB, dC = split.scan_operands(dconv)
        dA, dD, ddt_bias = torch.empty_like(A), torch.empty_like(D), torch.empty_like(dt_bias)
        dinitial_states = empty_like(initial_states)
        scan_tensors = (x, dt, A, B, C, D, gate, dt_bias, initial_states)
        packing = (seq_idx, cu_seqlens)
        scan_gradients = (dx, ddt, dA, dB, dC, dD, dgate, ddt_bias, dinitial_states)
        dy = None if dy is None else split.heads(dy)
        scan_backward(scan_tensors, packing, True, options.dt_limit, dy, dfinal_states, dvarlen_states, scan_gradients)

        dconv1d_weight, dconv1d_bias = torch.empty_like(conv1d_weight), empty_like(conv1d_bias)
        dinitial_conv_states = empty_like(initial_conv_states)
        conv_backward(
            conv_tensors,
            options.silu,
            dconv.transpose(1, 2),
            dfinal_conv_states,
            dxBC.transpose(1, 2),
            dconv1d_weight,
            dconv1d_bias,
            dinitial_conv_states,
        )
        parameters = (dconv1d_weight, dconv1d_bias, ddt_bias, dA, dD, drmsnorm_weight)
        return dzxbcdt, *parameters, dinitial_states, dinitial_conv_states, None, None, None


def _split_sizes(
    zxbcdt: Tensor, conv1d_weight: Tensor, dt_bias: Tensor, D: Tensor, headdim: int | None, ngroups: int
) -> _Sizes:
    batch, seqlen, channels = sizes("zxbcdt", zxbcdt, "batch", "seqlen", "2 dim + 2 ngroups dstate + nheads")
    check("zxbcdt", zxbcdt, {"batch": batch, "seqlen": seqlen, "channels": channels}, *FLOATS)
    conv_dim = sizes("conv1d_weight", conv1d_weight, "dim + 2 ngroups dstate", "width")[0]
    (nheads,) = sizes("dt_bias", dt_bias, "nheads")
    if not isinstance(D, Tensor) or D.dim() != 1:
        headdim_of_D = sizes("D", D, "nheads", "headdim")[1]
        headdim = headdim_of_D if headdim is None else headdim
    if headdim is None:
        raise ValueError(f"headdim: got None with D of shape {tuple(D.shape)}; allowed: headdim >= 1")
    check_whole("headdim", headdim, lowest=1)
    check_whole("ngroups", ngroups, lowest=1)
    dim = nheads * headdim
    if nheads % ngroups:
        raise ValueError(f"ngroups: got {ngroups}; allowed: a divisor of nheads = {nheads}")
    dstate = (conv_dim - dim) // (2 * ngroups)
    if dstate < 1 or dim + 2 * ngroups * dstate != conv_dim:
        raise ValueError(
            f"conv1d_weight: got {conv_dim} channels; allowed: dim + 2 ngroups dstate with dim = nheads headdim = "
            f"{dim} and ngroups = {ngroups}"
        )
    extra = channels - (dim + conv_dim + nheads)
    if extra > 0 and extra % 2 == 0:
        raise NotImplementedError(
            f"zxbcdt: got {channels} channels, {extra} more than z, x, B, C, dt have; allowed: {channels - extra} "
            "(no leading channels outside the scan)"
        )
    if extra:
        raise ValueError(
            f"zxbcdt: got {channels} channels; allowed: 2 dim + 2 ngroups dstate + nheads = {channels - extra}"
        )
    return _Sizes(nheads, headdim, ngroups, dstate)


def mamba_split_conv1d_scan_combined(
    zxbcdt: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    chunk_size: int,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
    activation: str | None = "silu",
    rmsnorm_weight: Tensor | None = None,
    rmsnorm_eps: float = 1e-6,
    outproj_weight: Tensor | None = None,
    outproj_bias: Tensor | None = None,
    headdim: int | None = None,
    ngroups: int = 1,
    norm_before_gate: bool = True,
    state_dtype: torch.dtype | None = None,
    initial_conv_states: Tensor | None = None,
    return_final_conv_states: bool = False,
    cu_seqlens: Tensor | None = None,
    return_varlen_states: bool = False,
) -> Any:
    """A Mamba-2 mixer between its projections: split, causal convolution, scan with softplus of dt, gate, norm.

    Equals `causal_conv1d_fn` on xBC, `mamba_chunk_scan_combined` on its parts, then either the gate silu(z) or
    `rmsnorm_gated` over groups of dim / ngroups, then the output projection; keeps only zxbcdt, the parameters and,
    with a norm, the scan's result for backward.

    Args:
        zxbcdt: (batch, seqlen, 2 dim + 2 ngroups dstate + nheads), dim = nheads headdim; any strides, so (seqlen,
            batch, ...) transposed needs no copy.
        conv1d_weight: (dim + 2 ngroups dstate, width); conv1d_bias: (dim + 2 ngroups dstate,).
        dt_bias, A: (nheads,); D: (nheads,) or (nheads, headdim). These and the weights in zxbcdt's dtype or float32.
        chunk_size: >= 1; the result does not depend on it beyond rounding.
        initial_states: (batch, nheads, headdim, dstate); with cu_seqlens (ndocs, ...), or (1, ...) for the first
            document.
        initial_conv_states: (batch, dim + 2 ngroups dstate, width - 1); with cu_seqlens as initial_states.
        seq_idx: (batch, seqlen) int32, the document of each token; convolution and state start anew with each.
        cu_seqlens: (ndocs + 1,) int32 or int64, for a batch of 1: where documents begin and end, as for
            `mamba_chunk_scan_combined`.
        dt_limit: clamps softplus(dt + dt_bias).
        return_final_states: also return the scan's last state, float32 (float64 for float64).
        activation: of the convolution: None, "silu" or "swish".
        rmsnorm_weight: (dim,); without it the scan's result is gated by silu(z) and not normalized.
        norm_before_gate: with a norm, whether silu(z) multiplies its result or its input.
        outproj_weight: (out_features, dim); outproj_bias: (out_features,). The projection runs in zxbcdt's dtype, under
            autocast in autocast's.
        headdim: needed when D is (nheads,).
        return_final_conv_states: also return the last width - 1 inputs of the convolution, with cu_seqlens those of
            each document.
        return_varlen_states: with cu_seqlens, also return the scan's state after each document.
        state_dtype: the dtype of states that are stored, zxbcdt's if left out: here varlen_states, as this backend
            keeps no states between forward and backward.

    Returns:
        out (batch, seqlen, dim or out_features) in zxbcdt's dtype and order of dimensions in memory; with the flags
        (out[, final_states][, final_conv_states][, varlen_states]). All differentiable.

    Raises:
        ValueError, TypeError: an argument that does not fit, by name.
        NotImplementedError: channels of zxbcdt outside the scan.
    """
    check_chunks(chunk_size, state_dtype)
    split = _split_sizes(zxbcdt, conv1d_weight, dt_bias, D, headdim, ngroups)
    batch, width = zxbcdt.shape[0], conv1d_weight.shape[1]
    dtypes = (zxbcdt.dtype, torch.float32)
    conv_dim = {"dim + 2 ngroups dstate": split.conv_dim}
    if not 2 <= width <= 8:
        raise ValueError(f"conv1d_weight: got width = {width}; allowed: width from 2 to 8")
    check("conv1d_weight", conv1d_weight, conv_dim | {"width": width}, *dtypes)
    check_optional("conv1d_bias", conv1d_bias, conv_dim, *dtypes)
    rows = {"batch" if cu_seqlens is None else "ndocs": ndocs(cu_seqlens, batch)}
    if cu_seqlens is not None and isinstance(initial_conv_states, Tensor) and initial_conv_states.shape[:1] == (1,):
        rows = {"first document": 1}
    check_optional("initial_conv_states", initial_conv_states, rows | conv_dim | {"width - 1": width - 1}, *dtypes)
    check_optional("rmsnorm_weight", rmsnorm_weight, {"dim": split.dim}, *dtypes)
    if outproj_weight is not None:
        out_features = sizes("outproj_weight", outproj_weight, "out_features", "dim")[0]
        check("outproj_weight", outproj_weight, {"out_features": out_features, "dim": split.dim}, *dtypes)
        check_optional("outproj_bias", outproj_bias, {"out_features": out_features}, *dtypes)
    elif outproj_bias is not None:
        raise ValueError("outproj_bias: got a tensor without outproj_weight; allowed: both, or neither")
    options = _Options(
        sizes=split,
        silu=is_silu(activation),
        dt_limit=limits("dt_limit", dt_limit),
        rmsnorm_eps=check_eps("rmsnorm_eps", rmsnorm_eps),
        norm_before_gate=bool(norm_before_gate),
        return_final_states=return_final_states,
        return_final_conv_states=return_final_conv_states,
        varlen_dtype=varlen_states_dtype(return_varlen_states, cu_seqlens, state_dtype, zxbcdt.dtype),
    )
    expect_cpu("mamba_split_conv1d_scan_combined", "zxbcdt", zxbcdt)
    out, *states = _SplitConv1dScan.apply(
        zxbcdt,
        conv1d_weight,
        conv1d_bias,
        dt_bias,
        A,
        D,
        rmsnorm_weight,
        initial_states,
        initial_conv_states,
        seq_idx,
        cu_seqlens,
        options,
    )
    if outproj_weight is not None:
        bias = None if outproj_bias is None else outproj_bias.to(out.dtype)
        out = F.linear(out, outproj_weight.to(out.dtype), bias)
    return results(out, *states)
