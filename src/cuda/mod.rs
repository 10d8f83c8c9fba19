//! The CUDA backend: one file per op, kernels compiled by the build script and launched on torch's current stream.

pub mod causal_conv1d;
pub mod causal_conv1d_update;
#[allow(dead_code)] // the build script uses the rest
mod instances;
pub mod launch;
pub mod module;
mod params;
pub mod rmsnorm_gated;
mod rows;
pub mod selective_state_update;
pub mod ssd;
pub mod ssd_backward;
pub mod state_passing;

/// The ops that have CUDA kernels, by the names of `oxiscan`'s functions.
pub const OPS: [&str; 7] = [
    "causal_conv1d_fn",
    "causal_conv1d_update",
    "causal_conv1d_varlen_states",
    "mamba_chunk_scan_combined",
    "rmsnorm_gated",
    "selective_state_update",
    "state_passing",
];
