//! Decode steps of the state-space recurrence.

use pyo3::prelude::*;

use crate::cpu;
use crate::cpu::slots::Slots;
#[cfg(feature = "cuda")]
use crate::cuda;
use crate::dims::{Checker, StateUpdateDims, optional};
use crate::ops::with_accumulator;
use crate::tensor::{TensorArg, View};
use crate::torch::{Backend, run};

/// An axis that the caller's tensors lack (seqlen, nheads, ngroups) has one element.
pub struct StateUpdateInputs {
    pub dims: StateUpdateDims,
    pub state: View<4>,
    pub x: View<4>,
    pub dt: View<4>,
    pub A: View<3>,
    pub B: View<4>,
    pub C: View<4>,
    pub D: Option<View<2>>,
    pub z: Option<View<4>>,
    pub dt_bias: Option<View<2>>,
    pub dt_softplus: bool,
    pub intermediate: Option<View<5>>,
    pub out: View<4>,
}

/// state and, where given, intermediate_ssm_states are updated in place; out, of x's shape, is written.
#[pyfunction]
pub fn selective_state_update(
    py: Python<'_>,
    state: TensorArg,
    x: TensorArg,
    dt: TensorArg,
    A: TensorArg,
    B: TensorArg,
    C: TensorArg,
    D: Option<TensorArg>,
    z: Option<TensorArg>,
    dt_bias: Option<TensorArg>,
    dt_softplus: bool,
    state_batch_indices: Option<TensorArg>,
    intermediate_ssm_states: Option<TensorArg>,
    out: TensorArg,
) -> PyResult<()> {
    run(py, "x", &x, |backend| {
        let check = Checker::new("x", &x)?;
        let dims = StateUpdateDims::new(&x, &state, &B, state_batch_indices.is_some())?;
        state.expect_writable("state")?;
        state.expect_apart("state", "x", &x)?;
        if let Some(intermediate) = &intermediate_ssm_states {
            intermediate.expect_apart("intermediate_ssm_states", "state", &state)?;
        }
        let inputs = StateUpdateInputs {
            dims,
            state: check.floating("state", &state, dims.state())?,
            x: check.same("x", &x, dims.x())?,
            dt: check.same_or_f32("dt", &dt, dims.x())?,
            A: check.same_or_f32("A", &A, dims.A())?,
            B: check.same("B", &B, dims.B())?,
            C: check.same("C", &C, dims.B())?,
            D: optional(&D, |D| check.same_or_f32("D", D, dims.D()))?,
            z: optional(&z, |z| check.same("z", z, dims.x()))?,
            dt_bias: optional(&dt_bias, |bias| check.same_or_f32("dt_bias", bias, dims.D()))?,
            dt_softplus,
            intermediate: optional(&intermediate_ssm_states, |states| {
                states.expect_writable("intermediate_ssm_states")?;
                check.floating("intermediate_ssm_states", states, dims.intermediate())
            })?,
            out: check.same("out", &out, dims.x())?,
        };
        let indices = optional(&state_batch_indices, |indices| {
            check.integer("state_batch_indices", indices, dims.rows())
        })?;
        match backend {
            Backend::Cpu { threads } => {
                let (batch, count) = (dims.batch, dims.slots());
                let slots = Slots::new("state_batch_indices", indices.as_ref(), batch, count)?;
                cpu::pool::install(threads, || {
                    with_accumulator!(check.dtype, T => {
                        cpu::selective_state_update::update::<T>(&inputs, &slots);
                    });
                })
            }
            #[cfg(feature = "cuda")]
            Backend::Cuda(stream) => cuda::selective_state_update::update(
                &stream,
                check.dtype,
                &inputs,
                indices.as_ref(),
            ),
        }
    })
}
