//! The CPU backend: one file per op, generic over the accumulation type, multi-threaded with rayon.

/// Evaluate an expression with the widest vector instructions of this processor.
///
/// Every function it calls has to be `#[inline(always)]`, or is compiled for the baseline.
macro_rules! simd {
    ($body:expr) => {
        pulp::Arch::new().dispatch(crate::cpu::Inlined(
            #[inline(always)]
            || $body,
        ))
    };
}

/// A closure for `simd!`, called in place.
///
/// As an `FnOnce` it would be called through a function of the compiler's making, which is not `#[inline(always)]`: what
/// LLVM does not inline of its own accord is compiled for the baseline.
struct Inlined<F>(F);

impl<R, F: FnMut() -> R> pulp::NullaryFnOnce for Inlined<F> {
    type Output = R;

    #[inline(always)]
    fn call(mut self) -> R {
        (self.0)()
    }
}

pub mod causal_conv1d;
pub mod causal_conv1d_update;
pub mod documents;
pub mod matmul;
pub mod pool;
pub mod real;
pub mod rmsnorm_gated;
pub mod selective_scan;
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
