//! The causal convolution when serving: decode steps, and the states that packed documents leave for them.

use pyo3::prelude::*;

use crate::cpu;
use crate::cpu::slots::Slots;
#[cfg(feature = "cuda")]
use crate::cuda;
use crate::dims::{Checker, ConvUpdateDims, optional};
use crate::ops::with_accumulator;
use crate::tensor::{TensorArg, View};
use crate::torch::{Backend, run};

/// Where x is one token without an axis for it, x and out have an axis of one element.
pub struct ConvUpdateInputs {
    pub dims: ConvUpdateDims,
    pub x: View<3>,
    pub conv_state: View<3>,
    pub weight: View<2>,
    pub bias: Option<View<1>>,
    pub silu: bool,
    pub intermediate: Option<View<4>>,
    pub out: View<3>,
}

/// conv_state and, where given, intermediate_conv_states are updated in place; out, of x's shape, is written.
#[pyfunction]
pub fn causal_conv1d_update(
    py: Python<'_>,
    x: TensorArg,
    conv_state: TensorArg,
    weight: TensorArg,
    bias: Option<TensorArg>,
    silu: bool,
    cache_seqlens: Option<TensorArg>,
    conv_state_indices: Option<TensorArg>,
    intermediate_conv_states: Option<TensorArg>,
    out: TensorArg,
) -> PyResult<()> {
    run(py, "x", &x, |backend| {
        let check = Checker::new("x", &x)?;
        let dims = ConvUpdateDims::new(&x, &conv_state, &weight, conv_state_indices.is_some())?;
        conv_state.expect_writable("conv_state")?;
        conv_state.expect_apart("conv_state", "x", &x)?;
        if let Some(intermediate) = &intermediate_conv_states {
            intermediate.expect_apart("intermediate_conv_states", "conv_state", &conv_state)?;
        }
        let inputs = ConvUpdateInputs {
            dims,
            x: check.same("x", &x, dims.x())?,
            conv_state: check.same("conv_state", &conv_state, dims.conv_state())?,
            weight: check.same_or_f32("weight", &weight, dims.weight())?,
            bias: optional(&bias, |bias| check.same_or_f32("bias", bias, dims.bias()))?,
            silu,
            intermediate: optional(&intermediate_conv_states, |states| {
                states.expect_writable("intermediate_conv_states")?;
                check.same("intermediate_conv_states", states, dims.intermediate())
            })?,
            out: check.same("out", &out, dims.x())?,
        };
        let cache_seqlens = optional(&cache_seqlens, |seqlens| {
            check.integer("cache_seqlens", seqlens, dims.rows())
        })?;
        let indices = optional(&conv_state_indices, |indices| {
            check.integer("conv_state_indices", indices, dims.rows())
        })?;
        match backend {
            Backend::Cpu { threads } => {
                let (batch, count) = (dims.batch, dims.slots());
                let slots = Slots::new("conv_state_indices", indices.as_ref(), batch, count)?;
                let positions = cache_seqlens
                    .map(|seen| cpu::causal_conv1d_update::positions(&seen, &slots, dims.state_len))
                    .transpose()?;
                cpu::pool::install(threads, || {
                    with_accumulator!(check.dtype, T => {
                        cpu::causal_conv1d_update::update::<T>(&inputs, &slots, positions.as_deref());
                    });
                })
            }
            #[cfg(feature = "cuda")]
            Backend::Cuda(stream) => cuda::causal_conv1d_update::update(
                &stream,
                check.dtype,
                &inputs,
                indices.as_ref(),
                cache_seqlens.as_ref(),
            ),
        }
    })
}

/// states (ndocs, dim, state_len) is written.
#[pyfunction]
pub fn causal_conv1d_varlen_states(
    py: Python<'_>,
    x: TensorArg,
    cu_seqlens: TensorArg,
    states: TensorArg,
) -> PyResult<()> {
    run(py, "x", &x, |backend| {
        let check = Checker::new("x", &x)?;
        let x = x.view("x", ["total_tokens", "dim"])?;
        let cu_seqlens = check.cu_seqlens(&cu_seqlens, 1)?;
        let state_len = states.view("states", ["ndocs", "dim", "state_len"])?.shape[2];
        let ndocs = cu_seqlens.shape[0] - 1;
        let shape = [("ndocs", ndocs), ("dim", x.shape[1]), ("state_len", state_len)];
        let states = check.same("states", &states, shape)?;
        match backend {
            Backend::Cpu { threads } => {
                let bounds = cpu::documents::bounds("cu_seqlens", &cu_seqlens, x.shape[0])?;
                cpu::pool::install(threads, || {
                    with_accumulator!(check.dtype, T => {
                        cpu::causal_conv1d_update::varlen_states::<T>(&x, &bounds, &states);
                    });
                })
            }
            #[cfg(feature = "cuda")]
            Backend::Cuda(stream) => cuda::causal_conv1d_update::varlen_states(
                &stream,
                check.dtype,
                &x,
                &cu_seqlens,
                &states,
            ),
        }
    })
}
