//! The CUDA backend: one file per op, kernels compiled by the build script and launched on torch's current stream.

#[allow(dead_code)] // the build script uses the rest
mod instances;
pub mod launch;
pub mod module;
mod params;
pub mod rmsnorm_gated;
mod rows;
pub mod selective_state_update;

/// The ops that have CUDA kernels, by the names of `oxiscan`'s functions.
pub const OPS: [&str; 2] = ["rmsnorm_gated", "selective_state_update"];
