//! The CPU backend: one file per op, generic over the accumulation type, multi-threaded with rayon.

/// Evaluate an expression with the widest vector instructions of this processor.
///
/// Every function it calls has to be `#[inline(always)]`, or is compiled for the baseline.
macro_rules! simd {
    ($body:expr) => {
        pulp::Arch::new().dispatch(
            #[inline(always)]
            || $body,
        )
    };
}

pub mod causal_conv1d;
pub mod causal_conv1d_update;
pub mod documents;
pub mod matmul;
pub mod pool;
pub mod real;
pub mod rmsnorm_gated;
pub mod selective_state_update;
pub mod slots;
pub mod ssd;
pub mod state_passing;

/// The vector instructions that `simd!` and the matrix products use here.
pub fn simd_name() -> &'static str {
    #[cfg(target_arch = "x86_64")]
    match pulp::Arch::new() {
        pulp::Arch::V4(_) => return "avx512",
        pulp::Arch::V3(_) => return "avx2",
        _ => {}
    }
    "baseline"
}
