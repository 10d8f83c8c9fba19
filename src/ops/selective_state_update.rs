//! One decode step of the state-space recurrence.

use pyo3::prelude::*;

use crate::cpu;
use crate::dims::{Backend, Checker, StateUpdateDims, optional};
use crate::ops::with_accumulator;
use crate::tensor::{TensorArg, View};
use crate::torch::run;

pub struct StateUpdateInputs {
    pub dims: StateUpdateDims,
    pub state: View<4>,
    pub x: View<3>,
    pub dt: View<3>,
    pub A: View<3>,
    pub B: View<3>,
    pub C: View<3>,
    pub D: Option<View<2>>,
    pub z: Option<View<3>>,
    pub dt_bias: Option<View<2>>,
    pub dt_softplus: bool,
    pub out: View<3>,
}

/// state (batch, nheads, dim, dstate) is updated in place, out (batch, nheads, dim) is written.
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
    out: TensorArg,
) -> PyResult<()> {
    run(py, |threads| {
        let check = Checker::new("x", &x)?;
        let dims = StateUpdateDims::new(&x, &state, &B)?;
        state.expect_writable("state")?;
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
            out: check.same("out", &out, dims.x())?,
        };
        match check.backend {
            Backend::Cpu => cpu::pool::install(threads, || {
                with_accumulator!(check.dtype, T => cpu::selective_state_update::step::<T>(&inputs));
            }),
        }
    })
}
