"""Bad input: an exception that names the argument, what came and what is allowed; nothing is written."""

import inspect

import pytest
import torch

import oxiscan
from oxiscan import reference
from oxiscan.testing import inputs

CPU = torch.device("cpu")
F32 = {"dtype": torch.float32, "device": CPU}


def ssd(**changes):
    tensors = inputs.ssd(seqlen=6, **F32)
    options = {"chunk_size": 4}
    return lambda: oxiscan.mamba_chunk_scan_combined(**tensors | options | changes)


def scan(**changes):
    tensors = inputs.selective_scan(seqlen=6, **F32)
    return lambda: oxiscan.selective_scan_fn(**tensors | changes)


def packed_scan(**changes):
    tensors = inputs.selective_scan(batch=1, seqlen=6, lengths=(2, 4), **F32)
    return lambda: oxiscan.selective_scan_fn(**tensors | changes)


def inner(given="", **changes):
    return lambda: oxiscan.mamba_inner_fn(**inputs.mamba_inner(seqlen=6, given=given, **F32) | changes)


def conv(**changes):
    return lambda: oxiscan.causal_conv1d_fn(**inputs.conv(seqlen=6, dim=5, **F32) | changes)


CU = inputs.cu_seqlens(3, 3, device=CPU)


def packed(**changes):
    tensors = inputs.ssd(batch=1, seqlen=6, **F32) | {"cu_seqlens": CU, "chunk_size": 4}
    return lambda: oxiscan.mamba_chunk_scan_combined(**tensors | changes)


def packed_conv(**changes):
    return lambda: oxiscan.causal_conv1d_fn(
        **inputs.conv(batch=1, seqlen=6, dim=5, **F32) | {"cu_seqlens": CU} | changes
    )


def packed_split(**changes):
    tensors = inputs.split_conv1d_scan(batch=1, seqlen=6, **F32) | {"cu_seqlens": CU, "chunk_size": 4, "ngroups": 2}
    return lambda: oxiscan.mamba_split_conv1d_scan_combined(**tensors | changes)


def norm(**changes):
    return lambda: oxiscan.rmsnorm_gated(**{"x": torch.ones(3, 8), "weight": torch.ones(8)} | changes)


def split(**changes):
    tensors = inputs.split_conv1d_scan(seqlen=6, **F32)
    return lambda: oxiscan.mamba_split_conv1d_scan_combined(**tensors | {"chunk_size": 4, "ngroups": 2} | changes)


def conv_update(**changes):
    tensors = {"x": torch.ones(2, 5), "conv_state": torch.ones(2, 5, 3), "weight": torch.ones(5, 4)}
    return lambda: oxiscan.causal_conv1d_update(**tensors | changes)


def state_update(**changes):
    tensors = {
        "state": torch.ones(2, 4, 3, 6),
        "x": torch.ones(2, 4, 3),
        "dt": torch.ones(2, 4, 3),
        "A": torch.ones(4, 3, 6),
        "B": torch.ones(2, 2, 6),
        "C": torch.ones(2, 2, 6),
    }
    return lambda: oxiscan.selective_state_update(**tensors | changes)


def headless_update(**changes):
    tensors = {"state": torch.ones(2, 3, 6), "x": torch.ones(2, 3), "dt": torch.ones(2, 3), "A": torch.ones(3, 6)}
    return state_update(**tensors | {"B": torch.ones(2, 6), "C": torch.ones(2, 6)} | changes)


def varlen_states(**changes):
    tensors = {"x": torch.ones(9, 5), "cu_seqlens": indices(0, 4, 9)}
    return lambda: oxiscan.causal_conv1d_varlen_states(**tensors | {"state_len": 3} | changes)


def indices(*values):
    return torch.tensor(values, dtype=torch.int64)


def passing(**changes):
    tensors = {"states": torch.ones(2, 3, 4, 5, 6), "decay": torch.ones(2, 3, 4)}
    return lambda: oxiscan.state_passing(**tensors | changes)


ERRORS = [
    (ssd(x=[1.0]), TypeError, "x: got list; allowed: torch.Tensor"),
    (ssd(dt=[1.0]), TypeError, "dt: got list; allowed: torch.Tensor"),
    (ssd(x=torch.ones(2, 6, 32)), ValueError, r"x: got shape \(2, 6, 32\); allowed: 4 dimensions \(batch, seqlen"),
    (ssd(dt=torch.ones(2, 6, 3)), ValueError, r"dt: got shape \(2, 6, 3\); allowed: \(batch, seqlen, nheads\) ="),
    (ssd(A=torch.ones(4, 1)), ValueError, r"A: got shape \(4, 1\); allowed: \(nheads\) = \(4,\)"),
    (ssd(B=torch.ones(2, 6, 3, 12)), ValueError, "B: got ngroups = 3; allowed: a divisor of nheads = 4"),
    (ssd(B=torch.ones(2, 6, 2, 0)), ValueError, "B: got dstate = 0; allowed: dstate >= 1"),
    (ssd(C=torch.ones(2, 6, 2, 11)), ValueError, r"C: got shape \(2, 6, 2, 11\)"),
    (ssd(C=torch.ones(2, 6, 2, 12).bfloat16()), TypeError, "C: got bfloat16; allowed: float32"),
    (ssd(D=torch.ones(8)), ValueError, r"D: got shape \(8,\); allowed: \(nheads\) = \(4,\)"),
    (ssd(D=torch.ones(4, 9)), ValueError, r"D: got shape \(4, 9\); allowed: \(nheads, headdim\) = \(4, 8\)"),
    (ssd(z=torch.ones(2, 6, 4, 7)), ValueError, "z: got shape"),
    (ssd(dt_bias=torch.ones(5)), ValueError, "dt_bias: got shape"),
    (ssd(dt_bias=torch.ones(4).double()), TypeError, "dt_bias: got float64; allowed: float32"),
    (ssd(initial_states=torch.ones(1, 4, 8, 12)), ValueError, "initial_states: got shape"),
    (ssd(seq_idx=torch.zeros(2, 5, dtype=torch.int32)), ValueError, "seq_idx: got shape"),
    (ssd(seq_idx=torch.zeros(2, 6, dtype=torch.int64)), TypeError, "seq_idx: got int64; allowed: int32"),
    (ssd(seq_idx=torch.zeros(2, 6)), TypeError, "seq_idx: got float32; allowed: int32"),
    (ssd(dt_limit=(1.0, 0.5)), ValueError, r"dt_limit: got \(1.0, 0.5\); allowed: \(low, high\) with low <= high"),
    (ssd(dt_limit=None), TypeError, r"dt_limit: got None; allowed: \(low, high\)"),
    (ssd(dt_limit=(0.0, "1")), TypeError, "dt_limit: got '1'; allowed: a number"),
    (ssd(chunk_size=1.5), TypeError, "chunk_size: got 1.5; allowed: a whole number"),
    (ssd(state_dtype=torch.int32), TypeError, "state_dtype: got torch.int32; allowed: None, torch.float32"),
    (ssd(chunk_size=0), ValueError, "chunk_size: got 0; allowed: >= 1"),
    (ssd(cu_seqlens=CU), ValueError, "cu_seqlens: got cu_seqlens with a batch of 2; allowed: batch 1"),
    (ssd(return_varlen_states=True), ValueError, "return_varlen_states: got True without cu_seqlens; allowed: both"),
    (packed(cu_seqlens=CU.float()), TypeError, "cu_seqlens: got float32; allowed: int32 or int64"),
    (packed(cu_seqlens=[0, 6]), TypeError, "cu_seqlens: got list; allowed: torch.Tensor"),
    (packed(cu_seqlens=CU[None]), ValueError, r"cu_seqlens: got shape \(1, 3\); allowed: 1 dimensions \(ndocs \+ 1\)"),
    (packed(cu_seqlens=CU[:1]), ValueError, r"cu_seqlens: got shape \(1,\); allowed: \(ndocs \+ 1,\) with ndocs >= 1"),
    (packed(cu_seqlens=CU + 1), ValueError, r"cu_seqlens: got \[1, 4, 7\]; allowed: values from 0, .* seqlen = 6"),
    (packed(cu_seqlens=CU.flip(0)), ValueError, r"cu_seqlens: got \[6, 3, 0\]; allowed: values from 0"),
    (packed(cu_seqlens=CU * 2), ValueError, r"cu_seqlens: got \[0, 6, 12\]; allowed: values from 0, .* seqlen = 6"),
    (packed(initial_states=torch.ones(3, 4, 8, 12)), ValueError, r"initial_states: got shape .* \(ndocs, nheads, head"),
    (ssd(x=torch.ones(2, 6, 4, 8, dtype=torch.int32)), TypeError, "x: got int32; allowed: float32, float64"),
    (ssd(x=torch.ones(2, 6, 4, 8, dtype=torch.complex64)), TypeError, "x: got complex64"),
    (ssd(x=torch.ones(2, 6, 0, 8)), ValueError, "x: got nheads = 0; allowed: nheads >= 1"),
    (ssd(B=torch.ones(2, 6, 2, 12, device="meta")), ValueError, "B: got a tensor on meta; allowed: the device of x"),
    (scan(u=[1.0]), TypeError, "u: got list; allowed: torch.Tensor"),
    (scan(u=torch.ones(2, 20)), ValueError, r"u: got shape \(2, 20\); allowed: 3 dimensions \(batch, dim, seqlen\)"),
    (scan(u=torch.ones(2, 0, 6)), ValueError, "u: got dim = 0; allowed: dim >= 1"),
    (scan(delta=torch.ones(2, 20, 5)), ValueError, r"delta: got shape \(2, 20, 5\); allowed: \(batch, dim, seqlen\)"),
    (scan(delta=torch.ones(2, 20, 6).half()), TypeError, "delta: got float16; allowed: float32"),
    (scan(A=torch.ones(20, 7, dtype=torch.complex64)), TypeError, "A: got complex64; allowed: float32"),
    (scan(A=torch.ones(20)), ValueError, r"A: got shape \(20,\); allowed: 2 dimensions \(dim, dstate\)"),
    (scan(A=torch.ones(20, 0)), ValueError, "A: got dstate = 0; allowed: dstate >= 1"),
    (scan(B=torch.ones(7)), ValueError, r"B: got shape \(7,\); allowed: \(dim, dstate\), \(batch, dstate, seqlen\) or"),
    (scan(B=torch.ones(20, 6)), ValueError, r"B: got shape \(20, 6\); allowed: \(dim, dstate\) = \(20, 7\)"),
    (scan(B=torch.ones(2, 7, 5), C=torch.ones(2, 7, 6)), ValueError, r"B: got shape \(2, 7, 5\); allowed: \(batch, ds"),
    (scan(B=torch.ones(2, 3, 7, 6)), ValueError, "B: got ngroups = 3; allowed: a divisor of dim = 20"),
    (scan(B=torch.ones(2, 0, 7, 6)), ValueError, "B: got ngroups = 0; allowed: ngroups >= 1"),
    (scan(B=torch.ones(2, 2, 7, 6).half()), TypeError, "B: got float16; allowed: float32"),
    (scan(C=torch.ones(2, 4, 7, 6)), ValueError, "C: got ngroups = 4; allowed: B's ngroups = 2"),
    (scan(C=torch.ones(2, 2, 7, 5)), ValueError, r"C: got shape \(2, 2, 7, 5\); allowed: \(batch, ngroups, dstate"),
    (scan(C=None), TypeError, "C: got NoneType; allowed: torch.Tensor"),
    (scan(D=torch.ones(20, 1)), ValueError, r"D: got shape \(20, 1\); allowed: \(dim\) = \(20,\)"),
    (scan(z=torch.ones(2, 20, 7)), ValueError, "z: got shape"),
    (scan(z=torch.ones(2, 20, 6).half()), TypeError, "z: got float16; allowed: float32"),
    (scan(delta_bias=torch.ones(19)), ValueError, r"delta_bias: got shape \(19,\); allowed: \(dim\) ="),
    (scan(initial_state=torch.ones(1, 20, 7)), ValueError, r"initial_state: got shape \(1, 20, 7\); allowed: \(batch"),
    (scan(seq_idx=torch.zeros(2, 6, dtype=torch.int64)), TypeError, "seq_idx: got int64; allowed: int32"),
    (scan(seq_idx=torch.zeros(2, 5, dtype=torch.int32)), ValueError, "seq_idx: got shape"),
    (scan(cu_seqlens=torch.tensor([0, 6])), ValueError, "cu_seqlens: got cu_seqlens with a batch of 2; allowed: batch"),
    (scan(return_varlen_states=True), ValueError, "return_varlen_states: got True without cu_seqlens"),
    (packed_scan(cu_seqlens=torch.tensor([0])), ValueError, r"cu_seqlens: got shape \(1,\); allowed: \(ndocs \+ 1,\)"),
    (packed_scan(cu_seqlens=torch.tensor([0.0, 1.0])), TypeError, "cu_seqlens: got float32; allowed: int32 or int64"),
    (packed_scan(cu_seqlens=torch.tensor([1, 2, 6])), ValueError, r"cu_seqlens: got \[1, 2, 6\]; allowed: values from"),
    (packed_scan(cu_seqlens=torch.tensor([0, 4, 2])), ValueError, r"cu_seqlens: got \[0, 4, 2\]; allowed: values from"),
    (packed_scan(cu_seqlens=torch.tensor([0, 4, 7])), ValueError, r"cu_seqlens: got \[0, 4, 7\]; .* at most seqlen ="),
    (packed_scan(initial_state=torch.ones(3, 20, 7)), ValueError, r"initial_state: got .* allowed: \(ndocs, dim, dsta"),
    (inner(xz=[1.0]), TypeError, "xz: got list; allowed: torch.Tensor"),
    (inner(xz=torch.ones(2, 41, 6)), ValueError, "xz: got 41 channels; allowed: 2 dim, x and z"),
    (inner(xz=torch.ones(2, 40, 6, dtype=torch.int32)), TypeError, "xz: got int32; allowed: float32"),
    (inner(conv1d_weight=torch.ones(20, 2, 4)), ValueError, r"conv1d_weight: got shape \(20, 2, 4\); allowed: 2 dim"),
    (inner(conv1d_weight=torch.ones(19, 4)), ValueError, r"conv1d_weight: got shape \(19, 4\); allowed: \(dim, width"),
    (inner(conv1d_weight=torch.ones(20, 1, 9)), ValueError, "conv1d_weight: got width = 9; allowed: width from 2 to 8"),
    (inner(conv1d_bias=torch.ones(19)), ValueError, r"conv1d_bias: got shape \(19,\); allowed: \(dim\) ="),
    (inner(A=torch.ones(20, 6, dtype=torch.complex64)), TypeError, "A: got complex64; allowed: float32"),
    (inner(A=torch.ones(19, 6)), ValueError, r"A: got shape \(19, 6\); allowed: \(dim, dstate\) ="),
    (inner(delta_proj_weight=torch.ones(19, 3)), ValueError, r"delta_proj_weight: got shape \(19, 3\); allowed: \(dim"),
    (inner(x_proj_weight=torch.ones(16, 20)), ValueError, r"x_proj_weight: got .* \(delta_rank \+ dstate \+ dstate, d"),
    (inner("B", x_proj_weight=torch.ones(15, 20)), ValueError, r"x_proj_weight: got .* \(delta_rank \+ dstate, dim\)"),
    (inner(x_proj_weight=torch.ones(15, 20).int()), TypeError, "x_proj_weight: got int32; allowed: float32"),
    (inner(out_proj_weight=torch.ones(5, 21)), ValueError, r"out_proj_weight: got shape \(5, 21\); allowed: \(out_fea"),
    (inner(out_proj_bias=torch.ones(6)), ValueError, r"out_proj_bias: got shape \(6,\); allowed: \(out_features\) ="),
    (inner("B", B_proj_bias=torch.ones(6)), ValueError, "B_proj_bias: got a tensor beside B; allowed: one of the two"),
    (inner("C", C_proj_bias=torch.ones(6)), ValueError, "C_proj_bias: got a tensor beside C; allowed: one of the two"),
    (inner(C_proj_bias=torch.ones(5)), ValueError, r"C_proj_bias: got shape \(5,\); allowed: \(dstate\) = \(6,\)"),
    (inner("B", B=torch.ones(2, 6, 5)), ValueError, r"B: got shape \(2, 6, 5\); allowed: \(batch, dstate, seqlen\)"),
    (inner("B", B=[1.0]), TypeError, "B: got list; allowed: torch.Tensor"),
    (inner(b_rms_weight=torch.ones(5)), ValueError, r"b_rms_weight: got shape \(5,\); allowed: \(dstate\) ="),
    (inner(c_rms_weight=torch.ones(6).half()), TypeError, "c_rms_weight: got float16; allowed: float32"),
    (inner(dt_rms_weight=torch.ones(6)), ValueError, r"dt_rms_weight: got shape \(6,\); allowed: \(dim\) = \(20,\)"),
    (inner(b_c_dt_rms_eps=-1.0), ValueError, "b_c_dt_rms_eps: got -1.0; allowed: b_c_dt_rms_eps >= 0"),
    (inner(checkpoint_lvl=2), ValueError, "checkpoint_lvl: got 2; allowed: 0 or 1"),
    (inner(delta_bias=torch.ones(19)), ValueError, "delta_bias: got shape"),
    (conv(x=torch.ones(2, 6)), ValueError, r"x: got shape \(2, 6\); allowed: 3 dimensions \(batch, dim, seqlen\)"),
    (conv(weight=torch.ones(5, 9)), ValueError, "weight: got width = 9; allowed: width from 2 to 8"),
    (conv(weight=torch.ones(5, 1)), ValueError, "weight: got width = 1; allowed"),
    (conv(weight=torch.ones(4, 4)), ValueError, r"weight: got shape \(4, 4\); allowed: \(dim, width\) = \(5, 4\)"),
    (conv(bias=torch.ones(4)), ValueError, "bias: got shape"),
    (conv(initial_states=torch.ones(2, 5, 4)), ValueError, r"initial_states: got shape \(2, 5, 4\); allowed"),
    (conv(activation="gelu"), ValueError, "activation: got 'gelu'; allowed: None"),
    (conv(cu_seqlens=CU), ValueError, "cu_seqlens: got cu_seqlens with a batch of 2; allowed: batch 1"),
    (conv(cu_seqlens=1), TypeError, "cu_seqlens: got int; allowed: torch.Tensor"),
    (packed_conv(initial_states=torch.ones(3, 5, 3)), ValueError, r"initial_states: got shape .* \(ndocs, dim, width"),
    (packed_conv(return_final_states=True, final_states_out=torch.ones(1, 5, 3)), ValueError, "final_states_out: got"),
    (conv(return_final_states=True, final_states_out=torch.ones(2, 5, 2)), ValueError, "final_states_out: got shape"),
    (conv(return_final_states=True, final_states_out=torch.ones(2, 5, 3).half()), TypeError, "final_states_out"),
    (
        conv(return_final_states=True, final_states_out=torch.ones(1, 5, 3).expand(2, 5, 3)),
        ValueError,
        "final_states_out: got an expanded tensor; allowed: one with an element",
    ),
    (
        conv(return_final_states=True, final_states_out=torch.ones(2, 5, 3, device="meta")),
        ValueError,
        "final_states_out: got a tensor on meta; allowed: cpu, as x",
    ),
    (conv(x=torch.ones(2, 5, 6).to_sparse()), TypeError, "x: got a Tensor without memory of its own; allowed: a plain"),
    (conv(return_final_states=True, final_states_out=[1]), TypeError, "final_states_out: got list"),
    (norm(weight=torch.ones(7)), ValueError, r"weight: got shape \(7,\); allowed: \(dim\) = \(8,\)"),
    (norm(z=torch.ones(3, 7)), ValueError, r"z: got shape \(3, 7\); allowed: \(3, 8\)"),
    (norm(z=torch.ones(3, 8).half()), TypeError, "z: got float16; allowed: float32"),
    (norm(group_size=3), ValueError, "group_size: got 3; allowed: a divisor of dim = 8"),
    (norm(x=[1.0]), TypeError, "x: got list; allowed: torch.Tensor"),
    (norm(group_size=-1), ValueError, "group_size: got -1; allowed"),
    (norm(eps="a"), TypeError, "eps: got 'a'; allowed: a number"),
    (norm(group_size=0), ValueError, "group_size: got 0; allowed"),
    (norm(eps=-1.0), ValueError, "eps: got -1.0; allowed: eps >= 0"),
    (norm(x=torch.ones([1] * 8 + [8])), TypeError, "x: got 9 dimensions; allowed: at most 8"),
    (norm(x=torch.tensor(1.0)), ValueError, r"x: got shape \(\); allowed: \(..., dim\)"),
    (split(zxbcdt=torch.ones(2, 6, 7)), ValueError, "zxbcdt: got 7 channels; allowed: 2 dim"),
    (split(zxbcdt=torch.ones(2, 6, 118)), NotImplementedError, "zxbcdt: got 118 channels, 10 more than"),
    (split(D=torch.ones(4)), ValueError, "headdim: got None with D of shape"),
    (split(headdim="4"), TypeError, "headdim: got '4'; allowed: a whole number"),
    (split(ngroups=1.0), TypeError, "ngroups: got 1.0; allowed: a whole number"),
    (split(rmsnorm_eps=float("nan")), ValueError, "rmsnorm_eps: got nan; allowed: rmsnorm_eps >= 0"),
    (split(dt_limit=(0, 10**400)), ValueError, "dt_limit: got 1000.*; allowed: a number within float's range"),
    (split(ngroups=3), ValueError, "ngroups: got 3; allowed: a divisor of nheads = 4"),
    (split(conv1d_weight=torch.ones(70, 4)), ValueError, "conv1d_weight: got 70 channels; allowed: dim"),
    (split(conv1d_weight=torch.ones(72, 9)), ValueError, "conv1d_weight: got width = 9; allowed: width from 2 to 8"),
    (split(conv1d_weight=torch.ones(72, 4).half()), TypeError, "conv1d_weight: got float16; allowed: float32"),
    (split(conv1d_bias=torch.ones(71)), ValueError, r"conv1d_bias: got shape \(71,\); allowed: "),
    (split(initial_conv_states=torch.ones(2, 72, 4)), ValueError, r"initial_conv_states: got shape \(2, 72, 4\)"),
    (split(rmsnorm_weight=torch.ones(31)), ValueError, r"rmsnorm_weight: got shape \(31,\); allowed: \(dim\) ="),
    (split(rmsnorm_eps=-1.0), ValueError, "rmsnorm_eps: got -1.0; allowed: rmsnorm_eps >= 0"),
    (split(outproj_weight=torch.ones(5, 31)), ValueError, r"outproj_weight: got shape \(5, 31\)"),
    (split(zxbcdt=torch.ones(2, 6, 108, dtype=torch.int32)), TypeError, "zxbcdt: got int32; allowed: float32"),
    (split(D=None, headdim=8), TypeError, "D: got NoneType; allowed: torch.Tensor"),
    (split(outproj_bias=torch.ones(5)), ValueError, "outproj_bias: got a tensor without outproj_weight"),
    (split(cu_seqlens=CU), ValueError, r"cu_seqlens: got cu_seqlens with a batch of 2"),
    (split(return_varlen_states=True), ValueError, "return_varlen_states: got True without cu_seqlens"),
    (packed_split(initial_conv_states=torch.ones(3, 72, 3)), ValueError, r"initial_conv_states: got .* \(ndocs, dim"),
    (conv_update(x=[1.0]), TypeError, "x: got list; allowed: torch.Tensor"),
    (conv_update(x=torch.ones(5)), ValueError, r"x: got shape \(5,\); allowed: \(batch, dim\) or"),
    (conv_update(weight=torch.ones(5, 9)), ValueError, "weight: got width = 9; allowed: width from 2 to 8"),
    (conv_update(weight=torch.ones(4, 4)), ValueError, r"weight: got shape \(4, 4\); allowed: \(dim, width\)"),
    (conv_update(activation="gelu"), ValueError, "activation: got 'gelu'; allowed: None"),
    (conv_update(conv_state=torch.ones(2, 5, 2)), ValueError, "conv_state: got state_len = 2; allowed: state_len >="),
    (conv_update(conv_state=torch.ones(3, 5, 3)), ValueError, r"conv_state: got shape \(3, 5, 3\); allowed: \(batch,"),
    (conv_update(conv_state=torch.ones(1, 5, 3).expand(2, 5, 3)), ValueError, "conv_state: got strides"),
    (conv_update(conv_state=torch.ones(2, 5, 3).half()), TypeError, "conv_state: got float16; allowed: float32"),
    (conv_update(cache_seqlens=indices(0, -3)), ValueError, "cache_seqlens: got -3 at row 1; allowed: .* >= 0"),
    (conv_update(cache_seqlens=indices(0)), ValueError, r"cache_seqlens: got shape \(1,\); allowed: \(batch\) ="),
    (conv_update(cache_seqlens=torch.zeros(2)), TypeError, "cache_seqlens: got float32; allowed: int32 or int64"),
    (conv_update(intermediate_conv_states=torch.ones(2, 5, 3)), ValueError, r"_states: got .* = \(2, 1, 5, 3\)"),
    (conv_update(intermediate_conv_states=torch.ones(2, 1, 5, 3).half()), TypeError, "intermediate_conv_states: got"),
    (conv_update(intermediate_conv_states=torch.ones(5, 3).expand(2, 1, 5, 3)), ValueError, "_states: got strides"),
    (varlen_states(x=[1.0]), TypeError, "x: got list; allowed: torch.Tensor"),
    (varlen_states(x=torch.ones(9)), ValueError, r"x: got shape \(9,\); allowed: 2 dimensions \(total_tokens, dim\)"),
    (varlen_states(x=torch.ones(9, 5, dtype=torch.int32)), TypeError, "x: got int32; allowed: float32"),
    (varlen_states(cu_seqlens=None), TypeError, "cu_seqlens: got NoneType; allowed: torch.Tensor"),
    (varlen_states(cu_seqlens=torch.zeros(3)), TypeError, "cu_seqlens: got float32; allowed: int32 or int64"),
    (varlen_states(cu_seqlens=indices()), ValueError, r"cu_seqlens: got shape \(0,\); allowed: \(ndocs \+ 1,\)"),
    (varlen_states(cu_seqlens=indices(0)), ValueError, r"cu_seqlens: got shape \(1,\); allowed: \(ndocs \+ 1,\)"),
    (varlen_states(cu_seqlens=indices(1, 4)), ValueError, r"cu_seqlens: got \[1, 4\]; allowed: values from 0"),
    (varlen_states(cu_seqlens=indices(0, 4, 3)), ValueError, r"cu_seqlens: got \[0, 4, 3\]; allowed: values from 0"),
    (varlen_states(cu_seqlens=indices(0, 10)), ValueError, r"cu_seqlens: got \[0, 10\]; allowed: .* seqlen = 9"),
    (varlen_states(state_len=-1), ValueError, "state_len: got -1; allowed: >= 0"),
    (varlen_states(state_len=2.0), TypeError, "state_len: got 2.0; allowed: a whole number"),
    (state_update(x=[1.0]), TypeError, "x: got list; allowed: torch.Tensor"),
    (state_update(x=torch.ones(3)), ValueError, r"x: got shape \(3,\); allowed: \(batch, dim\), \(batch,"),
    (state_update(x=torch.ones(2, 4, 2)), ValueError, r"state: got shape \(2, 4, 3, 6\); allowed: .* = \(2, 4, 2, 6\)"),
    (state_update(dt=torch.ones(2, 4)), ValueError, r"dt: got shape \(2, 4\); allowed: \(batch, nheads, dim\) ="),
    (state_update(A=torch.ones(4, 3, 5)), ValueError, "A: got shape"),
    (state_update(B=[1.0]), TypeError, "B: got list; allowed: torch.Tensor"),
    (state_update(B=torch.ones(6)), ValueError, r"B: got shape \(6,\); allowed: \(batch, dstate\) or \(batch,"),
    (state_update(B=torch.ones(2, 3, 6)), ValueError, "B: got ngroups = 3; allowed: a divisor of nheads = 4"),
    (state_update(B=torch.ones(2, 0, 6)), ValueError, "B: got ngroups = 0; allowed: ngroups >= 1"),
    (state_update(C=torch.ones(2, 6)), ValueError, r"C: got shape \(2, 6\); allowed: \(batch, ngroups, dstate\) ="),
    (state_update(x=torch.ones(2, 1, 4, 3)), ValueError, r"dt: got shape \(2, 4, 3\); allowed: \(batch, seqlen,"),
    (state_update(x=torch.ones(2, 1, 4, 3), B=torch.ones(2, 6)), ValueError, r"B: got .*; allowed: \(batch, seqlen,"),
    (state_update(state=torch.ones(2, 4, 3)), ValueError, "state: got shape"),
    (state_update(state=torch.ones(2, 4, 3, 0)), ValueError, "state: got dstate = 0; allowed: dstate >= 1"),
    (state_update(state=torch.ones(3, 4, 3, 6)), ValueError, r"state: got shape \(3, 4, 3, 6\); allowed: \(batch,"),
    (state_update(state=torch.ones(1, 4, 3, 6).expand(2, 4, 3, 6)), ValueError, "state: got strides"),
    (state_update(state=torch.ones(4096).as_strided((2, 4, 3, 6), (8, 1, 2, 3))), ValueError, "state: got strides"),
    (state_update(x=torch.ones(2, 3)), ValueError, r"state: got shape \(2, 4, 3, 6\); allowed: 3 dimensions"),
    (headless_update(A=None), TypeError, "A: got NoneType; allowed: torch.Tensor"),
    (headless_update(A=torch.ones(1, 3, 6)), ValueError, r"A: got shape \(1, 3, 6\); allowed: \(dim, dstate\) ="),
    (headless_update(B=torch.ones(2, 3, 6)), ValueError, "B: got ngroups = 3; allowed: a divisor of nheads = 1"),
    (headless_update(D=torch.ones(1, 3)), ValueError, r"D: got shape \(1, 3\); allowed: \(dim\) = \(3,\)"),
    (state_update(intermediate_ssm_states=torch.ones(2, 2, 4, 3, 6)), ValueError, r"_states: got .* \(2, 1, 4, 3, 6\)"),
    (state_update(intermediate_ssm_states=torch.ones(2, 1, 4, 3, 6).int()), TypeError, "intermediate_ssm_states: got"),
    (state_update(intermediate_ssm_states=torch.ones(3, 6).expand(2, 1, 4, 3, 6)), ValueError, "_states: got strides"),
    (passing(states=torch.ones(2, 3, 4, 5)), ValueError, "states: got shape"),
    (passing(decay=torch.ones(2, 3, 5)), ValueError, "decay: got shape"),
    (passing(decay=torch.ones(2, 3, 4).half()), TypeError, "decay: got float16; allowed: float32"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "message"), ERRORS, ids=[message for _, _, message in ERRORS])
def test_errors_name_the_argument(call, error, message):
    with pytest.raises(error, match=message):
        call()


NORM = {"x": torch.ones(3, 8), "weight": torch.ones(8), "bias": torch.ones(8), "z": torch.ones(3, 8)}
STEP = inputs.state_update(batch=2, dim=3, dstate=6, slots=2, intermediate=True, **F32)
SCAN = inputs.ssd(batch=1, seqlen=6, seq_idx=True, **F32) | {"cu_seqlens": CU, "chunk_size": 4}
#: By op: valid arguments; one of them, what it is made into, the error. For every backend.
REFUSED = {
    "rmsnorm_gated": (
        NORM,
        [
            ("x", lambda x: [1.0], TypeError, "x: got list; allowed: torch.Tensor"),
            ("x", lambda x: x.int(), TypeError, "x: got int32; allowed: float32"),
            ("weight", lambda weight: weight[:7], ValueError, r"weight: got shape \(7,\); allowed: \(dim\) = \(8,\)"),
            ("weight", lambda weight: weight.half(), TypeError, "weight: got float16; allowed: float32"),
            ("bias", lambda bias: bias.double(), TypeError, "bias: got float64; allowed: float32"),
            ("z", lambda z: z[:, :7], ValueError, r"z: got shape \(3, 7\); allowed: \(3, 8\)"),
            ("z", lambda z: z.half(), TypeError, "z: got float16; allowed: float32"),
            ("x", lambda x: x.to("meta"), NotImplementedError, "x: got a tensor on meta; allowed: cpu"),
            ("weight", lambda weight: weight.to("meta"), ValueError, "weight: got a tensor on meta; allowed: the dev"),
            ("x", lambda x: x.to_sparse(), TypeError, "x: got a Tensor without memory of its own; allowed: a plain"),
            ("group_size", lambda _: 3, ValueError, "group_size: got 3; allowed: a divisor of dim = 8"),
            ("eps", lambda _: -1.0, ValueError, "eps: got -1.0; allowed: eps >= 0"),
        ],
    ),
    "mamba_chunk_scan_combined": (
        SCAN,
        [
            ("x", lambda x: x.int(), TypeError, "x: got int32; allowed: float32"),
            ("x", lambda x: x[0], ValueError, r"x: got shape \(6, 4, 8\); allowed: 4 dimensions \(batch, seqlen"),
            ("dt", lambda dt: dt[..., :3], ValueError, r"dt: got shape \(1, 6, 3\); allowed: \(batch, seqlen, nh"),
            ("A", lambda A: A.half(), TypeError, "A: got float16; allowed: float32"),
            ("B", lambda B: B[:, :, :1].expand(-1, -1, 3, -1), ValueError, "B: got ngroups = 3; allowed: a divisor of"),
            ("B", lambda B: B[..., :0], ValueError, "B: got dstate = 0; allowed: dstate >= 1"),
            ("C", lambda C: C.half(), TypeError, "C: got float16; allowed: float32"),
            ("D", lambda D: D[:3], ValueError, r"D: got shape \(3,\); allowed: \(nheads\) = \(4,\)"),
            ("z", lambda z: z.to("meta"), ValueError, "z: got a tensor on meta; allowed: the device of x"),
            ("dt_bias", lambda bias: bias[:3], ValueError, "dt_bias: got shape"),
            ("initial_states", lambda t: t.expand(3, -1, -1, -1), ValueError, r"initial_states: got .* \(ndocs, nh"),
            ("seq_idx", lambda ids: ids.long(), TypeError, "seq_idx: got int64; allowed: int32"),
            ("cu_seqlens", lambda bounds: bounds[:1], ValueError, r"cu_seqlens: got shape \(1,\); allowed: \(ndocs"),
            ("cu_seqlens", lambda bounds: bounds.float(), TypeError, "cu_seqlens: got float32; allowed: int32"),
            ("dt_limit", lambda _: (1.0, 0.5), ValueError, r"dt_limit: got \(1.0, 0.5\); allowed: \(low, high\)"),
            ("chunk_size", lambda _: 0, ValueError, "chunk_size: got 0; allowed: >= 1"),
        ],
    ),
    "selective_state_update": (
        STEP,
        [
            ("x", lambda x: x[..., :2], ValueError, "state: got shape"),
            ("state", lambda state: state.int(), TypeError, "state: got int32; allowed: float32"),
            ("state", lambda state: state[:1].expand_as(state), ValueError, "state: got strides"),
            ("dt", lambda dt: dt[0], ValueError, r"dt: got shape \(4, 3\); allowed: \(batch, nheads, dim\) ="),
            ("A", lambda A: A[..., :5], ValueError, "A: got shape"),
            ("B", lambda B: B[:, :1].expand(-1, 3, -1), ValueError, "B: got ngroups = 3; allowed: a divisor of"),
            ("C", lambda C: C[..., :5], ValueError, "C: got shape"),
            ("C", lambda C: C.half(), TypeError, "C: got float16; allowed: float32"),
            ("D", lambda D: D.to("meta"), ValueError, "D: got a tensor on meta; allowed: the device of x"),
            ("z", lambda z: z[:1], ValueError, "z: got shape"),
            ("dt_bias", lambda bias: bias.half(), TypeError, "dt_bias: got float16; allowed: float32"),
            ("state_batch_indices", lambda i: i.float(), TypeError, "state_batch_indices: got float32; allowed: int"),
            ("state_batch_indices", lambda i: i[:1], ValueError, r"state_batch_indices: got shape \(1,\)"),
            ("intermediate_ssm_states", lambda t: t.int(), TypeError, "intermediate_ssm_states: got int32"),
            ("intermediate_ssm_states", lambda t: t[:, :0], ValueError, "intermediate_ssm_states: got shape"),
        ],
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "argument", "change", "error", "message"),
    [(name, *row) for name, (_, rows) in REFUSED.items() for row in rows],
    ids=[row[-1] for _, rows in REFUSED.values() for row in rows],
)
def test_what_is_refused_on_every_backend(name, argument, change, error, message, device):
    given = REFUSED[name][0]
    tensors = {n: t.to(device, copy=True) for n, t in given.items() if isinstance(t, torch.Tensor)}
    before = {n: t.clone() for n, t in tensors.items()}
    arguments = given | tensors
    with pytest.raises(error, match=message):
        getattr(oxiscan, name)(**arguments | {argument: change(arguments.get(argument))})
    assert all(torch.equal(t, before[n]) for n, t in tensors.items())


def test_a_device_without_a_backend_is_named():
    with pytest.raises(NotImplementedError, match="x: got a tensor on meta; allowed: cpu"):
        oxiscan.rmsnorm_gated(torch.ones(3, 8, device="meta"), torch.ones(8, device="meta"))


@pytest.mark.parametrize(("step", "name"), [(conv_update, "conv_state_indices"), (state_update, "state_batch_indices")])
@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        ([0, 1], TypeError, "got list; allowed: torch.Tensor"),
        (torch.zeros(2), TypeError, "got float32; allowed: int32 or int64"),
        (indices(0), ValueError, r"got shape \(1,\); allowed: \(batch\) = \(2,\)"),
        (indices(0, 2), ValueError, "got 2 at row 1; allowed: 0 to slots - 1 = 1, or -1 for a padding row"),
        (indices(-2, 0), ValueError, "got -2 at row 0; allowed: 0 to slots - 1"),
        (indices(1, 1), ValueError, "got slot 1 a second time at row 1; allowed: each slot at most once"),
    ],
)
def test_indices_are_checked(step, name, value, error, message):
    with pytest.raises(error, match=f"{name}: {message}"):
        step(**{name: value})()


REFUSED_STEPS = [
    (state_update, {"C": torch.ones(2, 2, 5)}, "C: got shape"),
    (state_update, {"state_batch_indices": indices(0, 2)}, "state_batch_indices: got 2"),
    (state_update, {"state_batch_indices": indices(0, 0)}, "state_batch_indices: got slot 0 a second time"),
    (conv_update, {"bias": torch.ones(6)}, "bias: got shape"),
    (conv_update, {"conv_state_indices": indices(0, 2)}, "conv_state_indices: got 2"),
    (conv_update, {"conv_state_indices": indices(0, 0)}, "conv_state_indices: got slot 0 a second time"),
    (conv_update, {"cache_seqlens": indices(0, -1)}, "cache_seqlens: got -1"),
]


@pytest.mark.parametrize(("step", "changes", "message"), REFUSED_STEPS, ids=[row[2] for row in REFUSED_STEPS])
def test_a_refused_step_leaves_its_states_alone(step, changes, message):
    if step is state_update:
        states = {"state": torch.ones(2, 4, 3, 6), "intermediate_ssm_states": torch.ones(2, 1, 4, 3, 6)}
    else:
        states = {"conv_state": torch.ones(2, 5, 3), "intermediate_conv_states": torch.ones(2, 1, 5, 3)}
    with pytest.raises(ValueError, match=message):
        step(**states, **changes)()
    assert all((state == 1).all() for state in states.values())


def test_a_lazily_negated_view_is_refused():
    negated = torch.imag(torch.conj(torch.ones(3, 8, dtype=torch.complex64) * 1j))
    assert negated.is_neg()
    column, number = negated[:, :1], negated[0, 0]
    for view in (
        negated,
        column,
        column[:, 0, None],
        number[None],
        negated.as_strided((3, 8), (8, 1)),
        negated[2:, 4:],
    ):
        assert view.is_neg()
        with pytest.raises(TypeError, match="x: got a lazily negated view; allowed: tensor.resolve_neg"):
            oxiscan.rmsnorm_gated(view, torch.ones(view.shape[-1]))


def test_a_tensor_without_memory_is_refused():
    class Wrapper(torch.Tensor):  # as DTensor is one
        @classmethod
        def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
            return torch.ones(3, 8)

    wrapper = torch.Tensor._make_wrapper_subclass(Wrapper, (3, 8))
    with pytest.raises(TypeError, match="x: got a Wrapper without memory of its own; allowed: a plain"):
        oxiscan.rmsnorm_gated(wrapper, torch.ones(8))
    zeros = torch._efficientzerotensor((3, 8))
    with pytest.raises(TypeError, match="x: got a Tensor without memory of its own"):
        oxiscan.rmsnorm_gated(zeros, torch.ones(8))


def test_misaligned_memory_is_refused():
    x = torch.frombuffer(bytearray(33), dtype=torch.float32, count=8, offset=1)
    with pytest.raises(TypeError, match="x: got data at .*; allowed: data aligned to 4 bytes"):
        oxiscan.rmsnorm_gated(x, torch.ones(8))


@pytest.mark.parametrize("name", oxiscan.ops.__all__)
def test_reference_takes_the_same_arguments(name):
    op, twin = getattr(oxiscan.ops, name), getattr(reference, name)
    parameters = [list(inspect.signature(f).parameters.items()) for f in (op, twin)]
    assert parameters[0] == parameters[1]
