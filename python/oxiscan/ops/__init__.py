"""The public ops: upstream's signatures, outputs allocated with torch, arithmetic in Rust."""

from .causal_conv1d import causal_conv1d_fn
from .causal_conv1d_update import causal_conv1d_update, causal_conv1d_varlen_states
from .mamba_inner import mamba_inner_fn
from .rmsnorm_gated import RMSNormGated, rmsnorm_gated
from .selective_scan import selective_scan_fn
from .selective_state_update import selective_state_update
from .split_conv1d_scan import mamba_split_conv1d_scan_combined
from .ssd import mamba_chunk_scan_combined
from .ssd_varlen import mamba_chunk_scan_combined_varlen
from .state_passing import state_passing

__all__ = [
    "RMSNormGated",
    "causal_conv1d_fn",
    "causal_conv1d_update",
    "causal_conv1d_varlen_states",
    "mamba_chunk_scan_combined",
    "mamba_chunk_scan_combined_varlen",
    "mamba_inner_fn",
    "mamba_split_conv1d_scan_combined",
    "rmsnorm_gated",
    "selective_scan_fn",
    "selective_state_update",
    "state_passing",
]
