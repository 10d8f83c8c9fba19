//! Gated RMSNorm, forward and backward.

use pyo3::prelude::*;

use crate::cpu;
use crate::dims::{Backend, Checker, NormDims};
use crate::error::{Error, Result};
use crate::ops::with_accumulator;
use crate::tensor::{Rows, TensorArg, View};
use crate::torch::run;

pub struct NormInputs {
    pub dims: NormDims,
    pub x: Rows,
    pub weight: View<1>,
    pub bias: Option<View<1>>,
    pub z: Option<Rows>,
    pub eps: f64,
    pub norm_before_gate: bool,
}

pub struct NormGradients {
    pub dout: Rows,
    pub dx: Rows,
    pub dweight: View<1>,
    pub dbias: Option<View<1>>,
    pub dz: Option<Rows>,
}

fn same_rows(
    check: &Checker,
    arg: &'static str,
    tensor: &TensorArg,
    dims: &NormDims,
) -> Result<Rows> {
    check.expect_same(arg, tensor)?;
    tensor.rows(arg, &dims.shape)
}

fn inputs(
    check: &Checker,
    x: &TensorArg,
    weight: &TensorArg,
    bias: Option<&TensorArg>,
    z: Option<&TensorArg>,
    eps: f64,
    group_size: Option<usize>,
    norm_before_gate: bool,
) -> Result<NormInputs> {
    let dims = NormDims::new(x, group_size)?;
    if eps.is_nan() || eps < 0.0 {
        return Err(Error::Value { arg: "eps", got: eps.to_string(), allowed: "eps >= 0".into() });
    }
    let dim = [("dim", dims.dim)];
    Ok(NormInputs {
        x: same_rows(check, "x", x, &dims)?,
        weight: check.same_or_f32("weight", weight, dim)?,
        bias: bias.map(|bias| check.same_or_f32("bias", bias, dim)).transpose()?,
        z: z.map(|z| same_rows(check, "z", z, &dims)).transpose()?,
        eps,
        norm_before_gate,
        dims,
    })
}

#[pyfunction]
pub fn rmsnorm_gated_forward(
    py: Python<'_>,
    x: TensorArg,
    weight: TensorArg,
    bias: Option<TensorArg>,
    z: Option<TensorArg>,
    eps: f64,
    group_size: Option<usize>,
    norm_before_gate: bool,
    out: TensorArg,
) -> PyResult<()> {
    run(py, |threads| {
        let check = Checker::new("x", &x)?;
        let (bias, z) = (bias.as_ref(), z.as_ref());
        let inputs = inputs(&check, &x, &weight, bias, z, eps, group_size, norm_before_gate)?;
        let out = same_rows(&check, "out", &out, &inputs.dims)?;
        match check.backend {
            Backend::Cpu => cpu::pool::install(threads, || {
                with_accumulator!(check.dtype, T => cpu::rmsnorm_gated::forward::<T>(&inputs, &out));
            }),
        }
    })
}

#[pyfunction]
pub fn rmsnorm_gated_backward(
    py: Python<'_>,
    x: TensorArg,
    weight: TensorArg,
    bias: Option<TensorArg>,
    z: Option<TensorArg>,
    eps: f64,
    group_size: Option<usize>,
    norm_before_gate: bool,
    dout: TensorArg,
    dx: TensorArg,
    dweight: TensorArg,
    dbias: Option<TensorArg>,
    dz: Option<TensorArg>,
) -> PyResult<()> {
    run(py, |threads| {
        let check = Checker::new("x", &x)?;
        let (bias, z) = (bias.as_ref(), z.as_ref());
        let inputs = inputs(&check, &x, &weight, bias, z, eps, group_size, norm_before_gate)?;
        let dim = [("dim", inputs.dims.dim)];
        let gradients = NormGradients {
            dout: same_rows(&check, "dout", &dout, &inputs.dims)?,
            dx: same_rows(&check, "dx", &dx, &inputs.dims)?,
            dweight: check.same_or_f32("dweight", &dweight, dim)?,
            dbias: dbias
                .as_ref()
                .map(|dbias| check.same_or_f32("dbias", dbias, dim))
                .transpose()?,
            dz: dz.as_ref().map(|dz| same_rows(&check, "dz", dz, &inputs.dims)).transpose()?,
        };
        match check.backend {
            Backend::Cpu => cpu::pool::install(threads, || {
                with_accumulator!(check.dtype, T => {
                    cpu::rmsnorm_gated::backward::<T>(&inputs, &gradients);
                });
            }),
        }
    })
}
