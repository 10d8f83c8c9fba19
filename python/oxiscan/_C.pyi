"""The compiled module. Outputs are tensors that the caller allocates; None stands for what is not asked for."""

from typing import TypedDict

from torch import Tensor

__all__ = [
    "causal_conv1d_backward",
    "causal_conv1d_forward",
    "causal_conv1d_update",
    "causal_conv1d_varlen_states",
    "rmsnorm_gated_backward",
    "rmsnorm_gated_forward",
    "selective_scan_backward",
    "selective_scan_forward",
    "selective_state_update",
    "ssd_backward",
    "ssd_forward",
    "ssd_varlen_forward",
    "state_passing_backward",
    "state_passing_forward",
    "build_info",
    "_cuda_driver_version",
    "_cuda_kernels",
    "_panic",
    "_ssd_backward_slot_tokens",
    "_ssd_keeps_states",
]

# x, weight; bias, seq_idx, cu_seqlens, initial_states
_ConvTensors = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]
# x, weight; bias, z
_NormTensors = tuple[Tensor, Tensor, Tensor | None, Tensor | None]
# eps, group_size, norm_before_gate
_NormOptions = tuple[float, int | None, bool]
# u, delta, A, B, C; D, z, delta_bias, initial_state, seq_idx, cu_seqlens
_ScanTensors = tuple[
    Tensor,
    Tensor,
    Tensor,
    Tensor,
    Tensor,
    Tensor | None,
    Tensor | None,
    Tensor | None,
    Tensor | None,
    Tensor | None,
    Tensor | None,
]
# x, dt, A, B, C; D, z, dt_bias, initial_states
_SsdTensors = tuple[
    Tensor,
    Tensor,
    Tensor,
    Tensor,
    Tensor,
    Tensor | None,
    Tensor | None,
    Tensor | None,
    Tensor | None,
]
# dy, states, partials, cuts, segments
_SsdWorkspaces = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]
# seq_idx, cu_seqlens
_TokenPacking = tuple[Tensor | None, Tensor | None]
# cu_chunk_seqlens, seq_idx
_ChunkPacking = tuple[Tensor, Tensor]

class _BuildInfo(TypedDict):
    version: str
    backends: list[str]
    simd: str
    profile: str
    cuda_ops: list[str]
    cuda_archs: list[str]
    cuda_chunk_scan: tuple[list[int], list[int], int]

class _CudaKernel(TypedDict):
    symbol: str
    arch: str
    registers: int
    shared_bytes: int
    cubin_bytes: int
    compile_ms: int

def build_info() -> _BuildInfo: ...
def _cuda_driver_version() -> tuple[int, int] | None: ...
def _cuda_kernels(major: int, minor: int) -> list[_CudaKernel]: ...
def _panic(message: str, worker: bool = False) -> None: ...
def causal_conv1d_forward(tensors: _ConvTensors, silu: bool, out: Tensor, final_states: Tensor | None) -> None: ...
def causal_conv1d_backward(
    tensors: _ConvTensors,
    silu: bool,
    dout: Tensor | None,
    dfinal_states: Tensor | None,
    dx: Tensor,
    dweight: Tensor,
    dbias: Tensor | None,
    dinitial_states: Tensor | None,
    partials: Tensor | None,
) -> None: ...
def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    cache_seqlens: Tensor | None,
    conv_state_indices: Tensor | None,
    intermediate_conv_states: Tensor | None,
    out: Tensor,
) -> None: ...
def causal_conv1d_varlen_states(x: Tensor, cu_seqlens: Tensor, states: Tensor) -> None: ...
def rmsnorm_gated_forward(tensors: _NormTensors, options: _NormOptions, out: Tensor) -> None: ...
def rmsnorm_gated_backward(
    tensors: _NormTensors,
    options: _NormOptions,
    dout: Tensor,
    dx: Tensor,
    dweight: Tensor,
    dbias: Tensor | None,
    dz: Tensor | None,
    partials: Tensor | None,
) -> None: ...
def selective_scan_forward(
    tensors: _ScanTensors,
    delta_softplus: bool,
    out: Tensor,
    last_state: Tensor | None,
    varlen_states: Tensor | None,
) -> None: ...
def selective_scan_backward(
    tensors: _ScanTensors,
    delta_softplus: bool,
    dout: Tensor | None,
    dlast_state: Tensor | None,
    dvarlen_states: Tensor | None,
    du: Tensor,
    ddelta: Tensor,
    dA: Tensor,
    dB: Tensor,
    dC: Tensor,
    dD: Tensor | None,
    dz: Tensor | None,
    ddelta_bias: Tensor | None,
    dinitial_state: Tensor | None,
) -> None: ...
def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    state_batch_indices: Tensor | None,
    intermediate_ssm_states: Tensor | None,
    out: Tensor,
) -> None: ...
def ssd_forward(
    tensors: _SsdTensors,
    packing: _TokenPacking,
    dt_softplus: bool,
    dt_limit: tuple[float, float],
    out: Tensor,
    final_states: Tensor | None,
    varlen_states: Tensor | None,
    segments: Tensor | None,
    entry_states: Tensor | None,
) -> None: ...
def ssd_backward(
    tensors: _SsdTensors,
    packing: _TokenPacking,
    dt_softplus: bool,
    dt_limit: tuple[float, float],
    dout: Tensor | None,
    dfinal_states: Tensor | None,
    dvarlen_states: Tensor | None,
    dx: Tensor,
    ddt: Tensor,
    dA: Tensor,
    dB: Tensor,
    dC: Tensor,
    dD: Tensor | None,
    dz: Tensor | None,
    ddt_bias: Tensor | None,
    dinitial_states: Tensor | None,
    workspaces: _SsdWorkspaces,
    entry_states: Tensor | None,
) -> None: ...
def _ssd_backward_slot_tokens(
    x: Tensor, dy: Tensor, B: Tensor, C: Tensor, dx: Tensor, dB: Tensor, dC: Tensor
) -> int: ...
def _ssd_keeps_states(x: Tensor, B: Tensor, C: Tensor, z: Tensor | None, out: Tensor) -> bool: ...
def ssd_varlen_forward(
    tensors: _SsdTensors,
    packing: _ChunkPacking,
    last_chunk_indices: Tensor,
    dt_softplus: bool,
    dt_limit: tuple[float, float],
    out: Tensor,
    chunk_states: Tensor,
) -> None: ...
def state_passing_forward(
    states: Tensor,
    decay: Tensor,
    initial_states: Tensor | None,
    states_before: Tensor,
    final_states: Tensor,
) -> None: ...
def state_passing_backward(
    states_before: Tensor,
    decay: Tensor,
    initial_states: Tensor | None,
    dstates_before: Tensor | None,
    dfinal_states: Tensor | None,
    dstates: Tensor,
    ddecay: Tensor,
    dinitial_states: Tensor | None,
    partials: Tensor | None,
) -> None: ...
