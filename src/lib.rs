//! `oxiscan._C`: the kernels of state-space models, called from `python/oxiscan/ops`.

mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
mod dims;
mod dlpack;
mod error;
mod info;
mod ops;
mod tensor;
mod torch;

use pyo3::prelude::*;

#[pymodule(gil_used = true)]
mod _C {
    #[pymodule_export]
    use crate::info::{build_info, cuda_driver_version, cuda_kernels};
    #[pymodule_export]
    use crate::ops::causal_conv1d::{causal_conv1d_backward, causal_conv1d_forward};
    #[pymodule_export]
    use crate::ops::causal_conv1d_update::{causal_conv1d_update, causal_conv1d_varlen_states};
    #[pymodule_export]
    use crate::ops::rmsnorm_gated::{rmsnorm_gated_backward, rmsnorm_gated_forward};
    #[pymodule_export]
    use crate::ops::selective_scan::{selective_scan_backward, selective_scan_forward};
    #[pymodule_export]
    use crate::ops::selective_state_update::selective_state_update;
    #[pymodule_export]
    use crate::ops::ssd::{
        ssd_backward, ssd_backward_slot_tokens, ssd_forward, ssd_keeps_states, ssd_varlen_forward,
    };
    #[pymodule_export]
    use crate::ops::state_passing::{state_passing_backward, state_passing_forward};
    #[pymodule_export]
    use crate::torch::panic_on_purpose;
}
