//! Causal depthwise convolution: forward, backward.

use pyo3::prelude::*;

use crate::cpu;
#[cfg(feature = "cuda")]
use crate::cuda;
use crate::dims::{Checker, ConvDims, document_rows, initial_rows, optional};
use crate::error::Result;
use crate::ops::with_accumulator;
use crate::tensor::{TensorArg, View};
use crate::torch::{Backend, run};

/// x, weight; bias, seq_idx, cu_seqlens, initial_states where given.
type ConvTensors = (
    TensorArg,
    TensorArg,
    Option<TensorArg>,
    Option<TensorArg>,
    Option<TensorArg>,
    Option<TensorArg>,
);

/// What forward and backward both read.
pub struct ConvInputs {
    pub dims: ConvDims,
    pub x: View<3>,
    pub weight: View<2>,
    pub bias: Option<View<1>>,
    pub seq_idx: Option<View<2>>,
    pub cu_seqlens: Option<View<1>>,
    pub initial_states: Option<View<3>>,
    pub silu: bool,
}

impl ConvInputs {
    fn new(check: &Checker, tensors: &ConvTensors, silu: bool) -> Result<Self> {
        let (x, weight, bias, seq_idx, cu_seqlens, initial_states) = tensors;
        let dims = ConvDims::new(x, weight)?;
        let cu_seqlens = optional(cu_seqlens, |bounds| check.cu_seqlens(bounds, dims.batch))?;
        Ok(ConvInputs {
            x: check.same("x", x, dims.x())?,
            weight: check.same_or_f32("weight", weight, dims.weight())?,
            bias: optional(bias, |bias| check.same_or_f32("bias", bias, dims.bias()))?,
            seq_idx: optional(seq_idx, |ids| check.int32("seq_idx", ids, dims.seq_idx()))?,
            initial_states: optional(initial_states, |states| {
                let rows = initial_rows(dims.batch, cu_seqlens.as_ref(), states);
                check.same_or_f32("initial_states", states, dims.states(rows))
            })?,
            cu_seqlens,
            silu,
            dims,
        })
    }

    /// The shape of final_states.
    fn final_states(&self) -> [(&'static str, usize); 3] {
        self.dims.states(document_rows(self.dims.batch, self.cu_seqlens.as_ref()))
    }
}

pub struct ConvGradients {
    pub dout: Option<View<3>>,
    pub dfinal_states: Option<View<3>>,
    pub dx: View<3>,
    pub dweight: View<2>,
    pub dbias: Option<View<1>>,
    pub dinitial_states: Option<View<3>>,
}

/// out (batch, dim, seqlen) and, where given, final_states are written.
#[pyfunction]
pub fn causal_conv1d_forward(
    py: Python<'_>,
    tensors: ConvTensors,
    silu: bool,
    out: TensorArg,
    final_states: Option<TensorArg>,
) -> PyResult<()> {
    run(py, "x", &tensors.0, |backend| {
        let check = Checker::new("x", &tensors.0)?;
        let inputs = ConvInputs::new(&check, &tensors, silu)?;
        let out = check.same("out", &out, inputs.dims.x())?;
        let final_states = optional(&final_states, |states| {
            check.same("final_states", states, inputs.final_states())
        })?;
        match backend {
            Backend::Cpu { threads } => cpu::pool::install(threads, || {
                with_accumulator!(check.dtype, T => {
                    cpu::causal_conv1d::forward::<T>(&inputs, &out, final_states.as_ref())
                })
            })?,
            #[cfg(feature = "cuda")]
            Backend::Cuda(stream) => cuda::causal_conv1d::forward(
                &stream,
                check.dtype,
                &inputs,
                &out,
                final_states.as_ref(),
            ),
        }
    })
}

/// Every gradient tensor that is given is written; those of optional arguments go with their arguments.
///
/// partials: on CUDA the workspace of the parameters' gradients, (blocks, width + 1, dim) float32 and contiguous, for at
/// most that many blocks of tokens, at least one.
#[pyfunction]
pub fn causal_conv1d_backward(
    py: Python<'_>,
    tensors: ConvTensors,
    silu: bool,
    dout: Option<TensorArg>,
    dfinal_states: Option<TensorArg>,
    dx: TensorArg,
    dweight: TensorArg,
    dbias: Option<TensorArg>,
    dinitial_states: Option<TensorArg>,
    #[cfg_attr(not(feature = "cuda"), expect(unused_variables))] partials: Option<TensorArg>,
) -> PyResult<()> {
    run(py, "x", &tensors.0, |backend| {
        let check = Checker::new("x", &tensors.0)?;
        let inputs = ConvInputs::new(&check, &tensors, silu)?;
        let dims = inputs.dims;
        let gradients = ConvGradients {
            dout: optional(&dout, |dout| check.same("dout", dout, dims.x()))?,
            dfinal_states: optional(&dfinal_states, |states| {
                check.same("dfinal_states", states, inputs.final_states())
            })?,
            dx: check.same("dx", &dx, dims.x())?,
            dweight: check.same_or_f32("dweight", &dweight, dims.weight())?,
            dbias: optional(&dbias, |dbias| check.same_or_f32("dbias", dbias, dims.bias()))?,
            dinitial_states: optional(&dinitial_states, |states| {
                let rows = initial_rows(dims.batch, inputs.cu_seqlens.as_ref(), states);
                check.same_or_f32("dinitial_states", states, dims.states(rows))
            })?,
        };
        match backend {
            Backend::Cpu { threads } => cpu::pool::install(threads, || {
                with_accumulator!(check.dtype, T => {
                    cpu::causal_conv1d::backward::<T>(&inputs, &gradients)
                })
            })?,
            #[cfg(feature = "cuda")]
            Backend::Cuda(stream) => {
                let partials = check.workspace(partials.as_ref(), dims.width + 1, dims.dim)?;
                cuda::causal_conv1d::backward(&stream, check.dtype, &inputs, &gradients, &partials)
            }
        }
    })
}
