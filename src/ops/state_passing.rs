//! The short recurrence over chunk states, forward and backward.

use pyo3::prelude::*;

use crate::cpu;
use crate::dims::{Checker, StatePassingDims, optional};
use crate::error::{Error, Result};
use crate::ops::with_accumulator;
use crate::tensor::{DType, TensorArg, View};
use crate::torch::run_on_cpu;

/// decay (batch, nchunks, nheads) is a logarithm, kept in the accumulation dtype or float32.
fn decay_view(check: &Checker, decay: &TensorArg, dims: &StatePassingDims) -> Result<View<3>> {
    if decay.dtype != DType::F32 && decay.dtype != check.dtype.accumulator() {
        return Err(Error::Type {
            arg: "decay",
            got: decay.dtype.name().into(),
            allowed: "float32, or float64 with float64 states".into(),
        });
    }
    check.floating("decay", decay, dims.decay())
}

#[pyfunction]
pub fn state_passing_forward(
    py: Python<'_>,
    states: TensorArg,
    decay: TensorArg,
    initial_states: Option<TensorArg>,
    states_before: TensorArg,
    final_states: TensorArg,
) -> PyResult<()> {
    run_on_cpu(py, "state_passing", "states", &states, |threads| {
        let check = Checker::new("states", &states)?;
        let dims = StatePassingDims::new(&states)?;
        let states = check.same("states", &states, dims.states())?;
        let decay = decay_view(&check, &decay, &dims)?;
        let initial_states = optional(&initial_states, |initial| {
            check.same_or_f32("initial_states", initial, dims.one_state())
        })?;
        let states_before = check.same("states_before", &states_before, dims.states())?;
        let final_states = check.accumulator("final_states", &final_states, dims.one_state())?;
        cpu::pool::install(threads, || {
            with_accumulator!(check.dtype, T => cpu::state_passing::forward::<T>(
                &dims,
                &states,
                &decay,
                initial_states.as_ref(),
                &states_before,
                &final_states,
            ));
        })
    })
}

/// Reads forward's states_before; writes dstates, ddecay and, where given, dinitial_states.
#[pyfunction]
pub fn state_passing_backward(
    py: Python<'_>,
    states_before: TensorArg,
    decay: TensorArg,
    initial_states: Option<TensorArg>,
    dstates_before: Option<TensorArg>,
    dfinal_states: Option<TensorArg>,
    dstates: TensorArg,
    ddecay: TensorArg,
    dinitial_states: Option<TensorArg>,
) -> PyResult<()> {
    run_on_cpu(py, "state_passing", "states_before", &states_before, |threads| {
        let check = Checker::new("states_before", &states_before)?;
        let dims = StatePassingDims::new(&states_before)?;
        let states_before = check.same("states_before", &states_before, dims.states())?;
        let gradients = cpu::state_passing::Gradients {
            dstates_before: optional(&dstates_before, |gradient| {
                check.same("dstates_before", gradient, dims.states())
            })?,
            dfinal_states: optional(&dfinal_states, |gradient| {
                check.accumulator("dfinal_states", gradient, dims.one_state())
            })?,
            dstates: check.same("dstates", &dstates, dims.states())?,
            ddecay: decay_view(&check, &ddecay, &dims)?,
            dinitial_states: optional(&dinitial_states, |gradient| {
                check.same_or_f32("dinitial_states", gradient, dims.one_state())
            })?,
        };
        let decay = decay_view(&check, &decay, &dims)?;
        let initial_states = optional(&initial_states, |initial| {
            check.same_or_f32("initial_states", initial, dims.one_state())
        })?;
        cpu::pool::install(threads, || {
            with_accumulator!(check.dtype, T => cpu::state_passing::backward::<T>(
                &dims,
                &states_before,
                &decay,
                initial_states.as_ref(),
                &gradients,
            ));
        })
    })
}
