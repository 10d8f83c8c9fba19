//! The convolution's decode steps and packed documents' conv states on CUDA: instances and launches.

use super::launch::{Block, Stream, WARP};
use super::params::{self, OxiConvUpdate, OxiVarlenStates, is_dense};
use crate::error::Result;
use crate::ops::causal_conv1d_update::ConvUpdateInputs;
use crate::tensor::{DType, View};

const THREADS: usize = 4 * WARP;
/// Width and state_len of the instance that moves lines of both at once: kWhole of the kernel.
const WHOLE: usize = 4;
/// The largest value of the axis SEQUENCES, and for how many blocks a multiprocessor it pays.
const SEQUENCES: usize = 2;
const BLOCKS_AT_ONCE: usize = 4;

pub fn update(
    stream: &Stream,
    dtype: DType,
    inputs: &ConvUpdateInputs,
    indices: Option<&View<1>>,
    cache_seqlens: Option<&View<1>>,
) -> Result<()> {
    let dims = inputs.dims;
    if dims.batch * dims.dim == 0 {
        return Ok(());
    }
    let whole = dims.width == WHOLE
        && dims.state_len == WHOLE
        && dims.seqlen() == 1
        && cache_seqlens.is_none()
        && inputs.intermediate.is_none()
        && is_dense(&inputs.conv_state, WHOLE)
        && is_dense(&inputs.weight, WHOLE);
    let channel_blocks = dims.dim.div_ceil(THREADS);
    let is_64_bit = |view: Option<&View<1>>| view.is_some_and(|view| view.dtype == DType::I64);
    let integers = |view: Option<&View<1>>| {
        view.map_or((std::ptr::null(), 0), |view| (view.data().cast(), view.strides()[0] as i64))
    };
    let (cache_data, cache_step) = integers(cache_seqlens);
    let (indices_data, indices_step) = integers(indices);
    // Several sequences a thread where the device has blocks enough for all its multiprocessors even then.
    let blocks = dims.batch * channel_blocks;
    let enough = blocks >= SEQUENCES * BLOCKS_AT_ONCE * stream.device.multiprocessors as usize;
    let (choice, sequences) = match whole {
        true if enough => (2, SEQUENCES),
        true => (1, 1),
        false => (0, 1),
    };
    let params = OxiConvUpdate {
        dim: params::size("x", "dim", dims.dim)?,
        width: dims.width as i32,
        seqlen: params::size("x", "seqlen", dims.seqlen())?,
        state_len: params::size("conv_state", "state_len", dims.state_len)?,
        silu: inputs.silu.into(),
        wide_weight: (inputs.weight.dtype == DType::F32).into(),
        channel_blocks: channel_blocks as i32,
        indices_are_64_bit: is_64_bit(indices).into(),
        cache_seqlens_are_64_bit: is_64_bit(cache_seqlens).into(),
        batch: params::size("x", "batch", dims.batch)?,
        slots: dims.slots() as i64,
        indices: indices_data,
        indices_step,
        cache_seqlens: cache_data,
        cache_seqlens_step: cache_step,
        state: Some(&inputs.conv_state).into(),
        x: Some(&inputs.x).into(),
        out: Some(&inputs.out).into(),
        weight: Some(&inputs.weight).into(),
        bias: params::vector(inputs.bias.as_ref()),
        intermediate: inputs.intermediate.as_ref().into(),
    };
    let choices = [params::dtype(dtype) as usize, choice];
    let blocks = dims.batch.div_ceil(sequences) * channel_blocks;
    stream.launch(&params, &choices, [blocks, 1, 1], Block::of(THREADS))
}

/// x (total_tokens, dim), states (ndocs, dim, state_len).
pub fn varlen_states(
    stream: &Stream,
    dtype: DType,
    x: &View<2>,
    cu_seqlens: &View<1>,
    states: &View<3>,
) -> Result<()> {
    let [ndocs, dim, state_len] = states.shape;
    let channel_blocks = dim.div_ceil(THREADS);
    let params = OxiVarlenStates {
        dim: params::size("x", "dim", dim)?,
        state_len: params::size("states", "state_len", state_len)?,
        channel_blocks: channel_blocks as i32,
        cu_seqlens_are_64_bit: (cu_seqlens.dtype == DType::I64).into(),
        total_tokens: x.shape[0] as i64,
        cu_seqlens: cu_seqlens.data().cast(),
        cu_seqlens_step: cu_seqlens.strides()[0] as i64,
        x: Some(x).into(),
        states: Some(states).into(),
    };
    let blocks = ndocs * channel_blocks;
    stream.launch(&params, &[params::dtype(dtype) as usize], [blocks, 1, 1], Block::of(THREADS))
}
