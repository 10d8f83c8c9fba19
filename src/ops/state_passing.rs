//! The short recurrence over chunk states, forward and backward.

use pyo3::prelude::*;

use crate::cpu;
#[cfg(feature = "cuda")]
use crate::cuda;
use crate::dims::{Checker, StatePassingDims, optional};
use crate::error::Result;
use crate::ops::with_accumulator;
use crate::tensor::{DType, TensorArg, View};
use crate::torch::{Backend, run};

pub struct Gradients {
    pub dstates_before: Option<View<5>>,
    pub dfinal_states: Option<View<4>>,
    pub dstates: View<5>,
    pub ddecay: View<3>,
    pub dinitial_states: Option<View<4>>,
}

/// decay (batch, nchunks, nheads) is a logarithm, kept in the accumulation dtype or float32.
fn decay_view(
    check: &Checker,
    arg: &'static str,
    decay: &TensorArg,
    dims: &StatePassingDims,
) -> Result<View<3>> {
    match check.dtype {
        DType::F64 => check.same_or_f32(arg, decay, dims.decay()),
        _ => check.accumulator(arg, decay, dims.decay()),
    }
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
    run(py, "states", &states, |backend| {
        let check = Checker::new("states", &states)?;
        let dims = StatePassingDims::new(&states)?;
        let states = check.same("states", &states, dims.states())?;
        let decay = decay_view(&check, "decay", &decay, &dims)?;
        let initial_states = optional(&initial_states, |initial| {
            check.same_or_f32("initial_states", initial, dims.one_state())
        })?;
        let states_before = check.same("states_before", &states_before, dims.states())?;
        let final_states = check.accumulator("final_states", &final_states, dims.one_state())?;
        match backend {
            Backend::Cpu { threads } => cpu::pool::install(threads, || {
                with_accumulator!(check.dtype, T => cpu::state_passing::forward::<T>(
                    &dims,
                    &states,
                    &decay,
                    initial_states.as_ref(),
                    &states_before,
                    &final_states,
                ));
            }),
            #[cfg(feature = "cuda")]
            Backend::Cuda(stream) => cuda::state_passing::forward(
                &stream,
                &dims,
                &states,
                &decay,
                initial_states.as_ref(),
                &states_before,
                &final_states,
            ),
        }
    })
}

/// Reads forward's states_before; writes dstates, ddecay and, where given, dinitial_states.
///
/// partials: on CUDA the workspace of ddecay, (warps of a head, 1, batch nheads nchunks) float32 and contiguous, at least
/// one row. A row along dstate takes whole packs of 16 bytes, one for each of a warp's 32 threads.
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
    #[cfg_attr(not(feature = "cuda"), expect(unused_variables))] partials: Option<TensorArg>,
) -> PyResult<()> {
    run(py, "states_before", &states_before, |backend| {
        let check = Checker::new("states_before", &states_before)?;
        let dims = StatePassingDims::new(&states_before)?;
        let states_before = check.same("states_before", &states_before, dims.states())?;
        let gradients = Gradients {
            dstates_before: optional(&dstates_before, |gradient| {
                check.same("dstates_before", gradient, dims.states())
            })?,
            dfinal_states: optional(&dfinal_states, |gradient| {
                check.accumulator("dfinal_states", gradient, dims.one_state())
            })?,
            dstates: check.same("dstates", &dstates, dims.states())?,
            ddecay: decay_view(&check, "ddecay", &ddecay, &dims)?,
            dinitial_states: optional(&dinitial_states, |gradient| {
                check.same_or_f32("dinitial_states", gradient, dims.one_state())
            })?,
        };
        let decay = decay_view(&check, "decay", &decay, &dims)?;
        let initial_states = optional(&initial_states, |initial| {
            check.same_or_f32("initial_states", initial, dims.one_state())
        })?;
        match backend {
            Backend::Cpu { threads } => cpu::pool::install(threads, || {
                with_accumulator!(check.dtype, T => cpu::state_passing::backward::<T>(
                    &dims,
                    &states_before,
                    &decay,
                    initial_states.as_ref(),
                    &gradients,
                ));
            }),
            #[cfg(feature = "cuda")]
            Backend::Cuda(stream) => {
                let columns = dims.batch * dims.nheads * dims.nchunks;
                let partials = check.workspace(partials.as_ref(), 1, columns)?;
                cuda::state_passing::backward(
                    &stream,
                    &dims,
                    &states_before,
                    &decay,
                    initial_states.as_ref(),
                    &gradients,
                    &partials,
                )
            }
        }
    })
}
