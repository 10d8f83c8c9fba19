//! Gated RMSNorm, forward and backward.

use pyo3::prelude::*;

use crate::cpu;
use crate::dims::{Backend, Checker, NormDims, optional};
use crate::error::{Error, Result};
use crate::ops::with_accumulator;
use crate::tensor::{Rows, TensorArg, View};
use crate::torch::run;

/// x, weight; bias, z where given.
type NormTensors = (TensorArg, TensorArg, Option<TensorArg>, Option<TensorArg>);

/// eps, group_size (dim if left out), norm_before_gate.
type NormOptions = (f64, Option<usize>, bool);

/// What forward and backward both read.
pub struct NormInputs {
    pub dims: NormDims,
    pub x: Rows,
    pub weight: View<1>,
    pub bias: Option<View<1>>,
    pub z: Option<Rows>,
    pub eps: f64,
    pub norm_before_gate: bool,
}

impl NormInputs {
    fn new(check: &Checker, tensors: &NormTensors, options: NormOptions) -> Result<Self> {
        let (x, weight, bias, z) = tensors;
        let (eps, group_size, norm_before_gate) = options;
        let dims = NormDims::new(x, group_size)?;
        if eps.is_nan() || eps < 0.0 {
            return Err(Error::Value {
                arg: "eps",
                got: eps.to_string(),
                allowed: "eps >= 0".into(),
            });
        }
        Ok(NormInputs {
            x: check.same_rows("x", x, &dims.shape)?,
            weight: check.same_or_f32("weight", weight, dims.weight())?,
            bias: optional(bias, |bias| check.same_or_f32("bias", bias, dims.weight()))?,
            z: optional(z, |z| check.same_rows("z", z, &dims.shape))?,
            eps,
            norm_before_gate,
            dims,
        })
    }
}

pub struct NormGradients {
    pub dout: Rows,
    pub dx: Rows,
    pub dweight: View<1>,
    pub dbias: Option<View<1>>,
    pub dz: Option<Rows>,
}

/// out, of x's shape, is written.
#[pyfunction]
pub fn rmsnorm_gated_forward(
    py: Python<'_>,
    tensors: NormTensors,
    options: NormOptions,
    out: TensorArg,
) -> PyResult<()> {
    run(py, |threads| {
        let check = Checker::new("x", &tensors.0)?;
        let inputs = NormInputs::new(&check, &tensors, options)?;
        let out = check.same_rows("out", &out, &inputs.dims.shape)?;
        match check.backend {
            Backend::Cpu => cpu::pool::install(threads, || {
                with_accumulator!(check.dtype, T => cpu::rmsnorm_gated::forward::<T>(&inputs, &out));
            }),
        }
    })
}

/// Every gradient tensor that is given is written; those of optional arguments go with their arguments.
#[pyfunction]
pub fn rmsnorm_gated_backward(
    py: Python<'_>,
    tensors: NormTensors,
    options: NormOptions,
    dout: TensorArg,
    dx: TensorArg,
    dweight: TensorArg,
    dbias: Option<TensorArg>,
    dz: Option<TensorArg>,
) -> PyResult<()> {
    run(py, |threads| {
        let check = Checker::new("x", &tensors.0)?;
        let inputs = NormInputs::new(&check, &tensors, options)?;
        let dims = &inputs.dims;
        let gradients = NormGradients {
            dout: check.same_rows("dout", &dout, &dims.shape)?,
            dx: check.same_rows("dx", &dx, &dims.shape)?,
            dweight: check.same_or_f32("dweight", &dweight, dims.weight())?,
            dbias: optional(&dbias, |dbias| check.same_or_f32("dbias", dbias, dims.weight()))?,
            dz: optional(&dz, |dz| check.same_rows("dz", dz, &dims.shape))?,
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
