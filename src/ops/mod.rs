//! One file per op: its arguments checked once, then the backend that its device asks for.

pub mod causal_conv1d;
pub mod causal_conv1d_update;
pub mod rmsnorm_gated;
pub mod selective_scan;
pub mod selective_state_update;
pub mod ssd;
pub mod state_passing;

/// Run `$body` with `$T` bound to the type that tensors of `$dtype` are computed in.
macro_rules! with_accumulator {
    ($dtype:expr, $T:ident => $body:expr) => {
        if $dtype.accumulator() == crate::tensor::DType::F64 {
            type $T = f64;
            $body
        } else {
            type $T = f32;
            $body
        }
    };
}
pub(crate) use with_accumulator;
