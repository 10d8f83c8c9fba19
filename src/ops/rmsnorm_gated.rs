//! Gated RMSNorm, forward and backward.

use pyo3::prelude::*;

use crate::cpu;
#[cfg(feature = "cuda")]
use crate::cuda;
use crate::dims::{Checker, NormDims, optional};
use crate::error::{Error, Result};
use crate::ops::with_accumulator;
use crate::tensor::{Rows, TensorArg, View};
use crate::torch::{Backend, run};

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
    run(py, "x", &tensors.0, |backend| {
        let check = Checker::new("x", &tensors.0)?;
        let inputs = NormInputs::new(&check, &tensors, options)?;
        let out = check.same_rows("out", &out, &inputs.dims.shape)?;
        match backend {
            Backend::Cpu { threads } => cpu::pool::install(threads, || {
                with_accumulator!(check.dtype, T => cpu::rmsnorm_gated::forward::<T>(&inputs, &out));
            }),
            #[cfg(feature = "cuda")]
            Backend::Cuda(stream) => {
                cuda::rmsnorm_gated::forward(&stream, check.dtype, &inputs, &out)
            }
        }
    })
}

/// Every gradient tensor that is given is written; those of optional arguments go with their arguments.
///
/// partials: on CUDA the workspace of the parameters' gradients, (blocks, 1 or with bias 2, dim) float32 and contiguous,
/// for at most that many blocks of rows, at least one.
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
    #[cfg_attr(not(feature = "cuda"), expect(unused_variables))] partials: Option<TensorArg>,
) -> PyResult<()> {
    run(py, "x", &tensors.0, |backend| {
        let check = Checker::new("x", &tensors.0)?;
        let inputs = NormInputs::new(&check, &tensors, options)?;
        let dims = &inputs.dims;
        expect_both("dbias", &dbias, "bias", inputs.bias.is_some())?;
        expect_both("dz", &dz, "z", inputs.z.is_some())?;
        let gradients = NormGradients {
            dout: check.same_rows("dout", &dout, &dims.shape)?,
            dx: check.same_rows("dx", &dx, &dims.shape)?,
            dweight: check.same_or_f32("dweight", &dweight, dims.weight())?,
            dbias: optional(&dbias, |dbias| check.same_or_f32("dbias", dbias, dims.weight()))?,
            dz: optional(&dz, |dz| check.same_rows("dz", dz, &dims.shape))?,
        };
        match backend {
            Backend::Cpu { threads } => cpu::pool::install(threads, || {
                with_accumulator!(check.dtype, T => {
                    cpu::rmsnorm_gated::backward::<T>(&inputs, &gradients);
                });
            }),
            #[cfg(feature = "cuda")]
            Backend::Cuda(stream) => {
                let parameters = if inputs.bias.is_some() { 2 } else { 1 };
                let partials = check.workspace(partials.as_ref(), parameters, dims.dim)?;
                cuda::rmsnorm_gated::backward(&stream, check.dtype, &inputs, &gradients, &partials)
            }
        }
    })
}

/// Fail unless an optional argument's gradient comes with it, and without it none.
fn expect_both(
    arg: &'static str,
    gradient: &Option<TensorArg>,
    of: &str,
    given: bool,
) -> Result<()> {
    if gradient.is_some() == given {
        return Ok(());
    }
    let got = if given { "None" } else { "a tensor" };
    let allowed = format!("a tensor where {of} is given, None where it is not");
    Err(Error::Value { arg, got: got.into(), allowed })
}
