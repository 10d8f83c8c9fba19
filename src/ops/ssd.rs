//! Mamba-2's chunk scan (state-space duality), forward and backward.

use pyo3::prelude::*;

use crate::cpu;
use crate::dims::{Backend, Checker, SsdDims};
use crate::error::{Error, Result};
use crate::ops::with_accumulator;
use crate::tensor::{DType, TensorArg, View};
use crate::torch::run;

/// What forward and backward both read.
pub struct SsdInputs {
    pub dims: SsdDims,
    pub dtype: DType,
    pub backend: Backend,
    pub x: View<4>,
    pub dt: View<3>,
    pub A: View<1>,
    pub B: View<4>,
    pub C: View<4>,
    /// (nheads, headdim); expanded along headdim when the caller's has one value a head.
    pub D: Option<View<2>>,
    pub z: Option<View<4>>,
    pub dt_bias: Option<View<1>>,
    pub initial_states: Option<View<4>>,
    pub seq_idx: Option<View<2>>,
    pub dt_softplus: bool,
    pub dt_limit: (f64, f64),
}

impl SsdInputs {
    fn new(
        x: &TensorArg,
        dt: &TensorArg,
        A: &TensorArg,
        B: &TensorArg,
        C: &TensorArg,
        D: Option<&TensorArg>,
        z: Option<&TensorArg>,
        dt_bias: Option<&TensorArg>,
        initial_states: Option<&TensorArg>,
        seq_idx: Option<&TensorArg>,
        dt_softplus: bool,
        dt_limit: (f64, f64),
    ) -> Result<Self> {
        let check = Checker::new("x", x)?;
        let dims = SsdDims::new(x, B)?;
        if dt_limit.0.is_nan() || dt_limit.1.is_nan() || dt_limit.0 > dt_limit.1 {
            return Err(Error::Value {
                arg: "dt_limit",
                got: format!("{dt_limit:?}"),
                allowed: "(low, high) with low <= high".into(),
            });
        }
        Ok(SsdInputs {
            dims,
            dtype: check.dtype,
            backend: check.backend,
            x: check.same("x", x, dims.x())?,
            dt: check.same_or_f32("dt", dt, dims.dt())?,
            A: check.same_or_f32("A", A, dims.heads())?,
            B: check.same("B", B, dims.B())?,
            C: check.same("C", C, dims.B())?,
            D: D.map(|D| {
                check.expect_same_or_f32("D", D)?;
                per_head_or_element("D", D, &dims)
            })
            .transpose()?,
            z: z.map(|z| check.same("z", z, dims.x())).transpose()?,
            dt_bias: dt_bias
                .map(|bias| check.same_or_f32("dt_bias", bias, dims.heads()))
                .transpose()?,
            initial_states: initial_states
                .map(|states| check.same_or_f32("initial_states", states, dims.states()))
                .transpose()?,
            seq_idx: seq_idx
                .map(|seq_idx| check.int32("seq_idx", seq_idx, dims.seq_idx()))
                .transpose()?,
            dt_softplus,
            dt_limit,
        })
    }
}

/// D, or its gradient: (nheads,) or (nheads, headdim).
fn per_head_or_element(arg: &'static str, D: &TensorArg, dims: &SsdDims) -> Result<View<2>> {
    if D.shape().len() == 2 {
        D.view_of(arg, [("nheads", dims.nheads), ("headdim", dims.headdim)])
    } else {
        Ok(D.view_of(arg, dims.heads())?.expand_last(dims.headdim))
    }
}

/// Gradients that come in, and where those that go out are written.
pub struct SsdGradients {
    pub dout: Option<View<4>>,
    pub dfinal_states: Option<View<4>>,
    pub dx: View<4>,
    pub ddt: View<3>,
    pub dA: View<1>,
    pub dB: View<4>,
    pub dC: View<4>,
    pub dD: Option<View<2>>,
    pub dz: Option<View<4>>,
    pub ddt_bias: Option<View<1>>,
    pub dinitial_states: Option<View<4>>,
}

/// out (batch, seqlen, nheads, headdim) and, where given, final_states are written.
#[pyfunction]
pub fn ssd_forward(
    py: Python<'_>,
    x: TensorArg,
    dt: TensorArg,
    A: TensorArg,
    B: TensorArg,
    C: TensorArg,
    D: Option<TensorArg>,
    z: Option<TensorArg>,
    dt_bias: Option<TensorArg>,
    initial_states: Option<TensorArg>,
    seq_idx: Option<TensorArg>,
    dt_softplus: bool,
    dt_limit: (f64, f64),
    out: TensorArg,
    final_states: Option<TensorArg>,
) -> PyResult<()> {
    run(py, |threads| {
        let inputs = SsdInputs::new(
            &x,
            &dt,
            &A,
            &B,
            &C,
            D.as_ref(),
            z.as_ref(),
            dt_bias.as_ref(),
            initial_states.as_ref(),
            seq_idx.as_ref(),
            dt_softplus,
            dt_limit,
        )?;
        let check = Checker::new("x", &x)?;
        let out = check.same("out", &out, inputs.dims.x())?;
        let final_states = final_states
            .as_ref()
            .map(|states| check.accumulator("final_states", states, inputs.dims.states()))
            .transpose()?;
        match inputs.backend {
            Backend::Cpu => cpu::pool::install(threads, || {
                with_accumulator!(inputs.dtype, T => {
                    cpu::ssd::forward::<T>(&inputs, &out, final_states.as_ref());
                });
            }),
        }
    })
}

/// Every gradient tensor that is given is written; dD, dz, ddt_bias, dinitial_states go with their arguments.
#[pyfunction]
pub fn ssd_backward(
    py: Python<'_>,
    x: TensorArg,
    dt: TensorArg,
    A: TensorArg,
    B: TensorArg,
    C: TensorArg,
    D: Option<TensorArg>,
    z: Option<TensorArg>,
    dt_bias: Option<TensorArg>,
    initial_states: Option<TensorArg>,
    seq_idx: Option<TensorArg>,
    dt_softplus: bool,
    dt_limit: (f64, f64),
    dout: Option<TensorArg>,
    dfinal_states: Option<TensorArg>,
    dx: TensorArg,
    ddt: TensorArg,
    dA: TensorArg,
    dB: TensorArg,
    dC: TensorArg,
    dD: Option<TensorArg>,
    dz: Option<TensorArg>,
    ddt_bias: Option<TensorArg>,
    dinitial_states: Option<TensorArg>,
) -> PyResult<()> {
    run(py, |threads| {
        let inputs = SsdInputs::new(
            &x,
            &dt,
            &A,
            &B,
            &C,
            D.as_ref(),
            z.as_ref(),
            dt_bias.as_ref(),
            initial_states.as_ref(),
            seq_idx.as_ref(),
            dt_softplus,
            dt_limit,
        )?;
        let check = Checker::new("x", &x)?;
        let dims = inputs.dims;
        let gradients = SsdGradients {
            dout: dout.as_ref().map(|dout| check.same("dout", dout, dims.x())).transpose()?,
            dfinal_states: dfinal_states
                .as_ref()
                .map(|states| check.accumulator("dfinal_states", states, dims.states()))
                .transpose()?,
            dx: check.same("dx", &dx, dims.x())?,
            ddt: check.same_or_f32("ddt", &ddt, dims.dt())?,
            dA: check.same_or_f32("dA", &dA, dims.heads())?,
            dB: check.same("dB", &dB, dims.B())?,
            dC: check.same("dC", &dC, dims.B())?,
            dD: dD
                .as_ref()
                .map(|dD| {
                    check.expect_same_or_f32("dD", dD)?;
                    per_head_or_element("dD", dD, &dims)
                })
                .transpose()?,
            dz: dz.as_ref().map(|dz| check.same("dz", dz, dims.x())).transpose()?,
            ddt_bias: ddt_bias
                .as_ref()
                .map(|bias| check.same_or_f32("ddt_bias", bias, dims.heads()))
                .transpose()?,
            dinitial_states: dinitial_states
                .as_ref()
                .map(|states| check.same_or_f32("dinitial_states", states, dims.states()))
                .transpose()?,
        };
        match inputs.backend {
            Backend::Cpu => cpu::pool::install(threads, || {
                with_accumulator!(inputs.dtype, T => cpu::ssd::backward::<T>(&inputs, &gradients));
            }),
        }
    })
}
