"""Kernels of state-space models for PyTorch: causal conv1d, Mamba-1's selective scan, Mamba-2's chunk scan, gated
RMSNorm, decode steps.

The ops take the arguments of mamba_ssm's and causal_conv1d's functions of the same names. `oxiscan.reference` has each
of them in plain torch, `oxiscan.megatron` plugs them into Megatron-LM's hybrid models.
"""

from . import ops, reference
from ._C import build_info
from .ops import (
    RMSNormGated,
    causal_conv1d_fn,
    causal_conv1d_update,
    causal_conv1d_varlen_states,
    mamba_chunk_scan_combined,
    mamba_chunk_scan_combined_varlen,
    mamba_inner_fn,
    mamba_split_conv1d_scan_combined,
    rmsnorm_gated,
    selective_scan_fn,
    selective_state_update,
    state_passing,
)

__version__: str = build_info()["version"]

__all__ = [
    "RMSNormGated",
    "causal_conv1d_fn",
    "causal_conv1d_update",
    "causal_conv1d_varlen_states",
    "mamba_chunk_scan_combined",
    "mamba_chunk_scan_combined_varlen",
    "mamba_inner_fn",
    "mamba_split_conv1d_scan_combined",
    "ops",
    "reference",
    "rmsnorm_gated",
    "selective_scan_fn",
    "selective_state_update",
    "state_passing",
]
