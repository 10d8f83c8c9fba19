//! Decode steps on CUDA: which instance serves a call, and its launch.

use super::launch::{Block, Stream, WARP};
use super::params::{self, OxiStateUpdate, VECTOR, is_dense, is_wide};
use crate::error::{Error, Result};
use crate::ops::selective_state_update::StateUpdateInputs;
use crate::tensor::{DType, View};

/// kMaxWarps and kHeld of the kernel, and kRows by the choice of ROWS; kOneTokenBlocks is in `update`.
const MAX_WARPS: usize = 4;
const HELD: usize = 8;
const ROWS: [usize; 4] = [1, 1, 2, 4];
/// A lane has HELD elements of a row.
const MAX_DSTATE: usize = WARP * HELD;

pub fn update(
    stream: &Stream,
    dtype: DType,
    inputs: &StateUpdateInputs,
    indices: Option<&View<1>>,
) -> Result<()> {
    let dims = inputs.dims;
    if dims.dstate > MAX_DSTATE {
        return Err(Error::Unsupported {
            arg: "state",
            got: format!("dstate = {}", dims.dstate),
            allowed: format!("dstate <= {MAX_DSTATE} on cuda"),
        });
    }
    if dims.batch * dims.nheads() * dims.dim * dims.seqlen() == 0 {
        return Ok(());
    }
    let state = &inputs.state;
    let width = VECTOR / state.dtype.size();
    let lanes = dims.dstate.div_ceil(HELD).next_power_of_two();
    let rows_at_once = WARP / lanes;
    let dense = dims.dstate == lanes * HELD
        && dims.dim.is_multiple_of(rows_at_once)
        && is_dense(state, width)
        && is_dense(&inputs.B, width)
        && is_dense(&inputs.C, width)
        && (inputs.A.is_expanded(2) || is_dense(&inputs.A, width))
        && inputs.intermediate.as_ref().is_none_or(|states| is_dense(states, width));
    // The grid, and the warps of a block, with ROWS[choice] rows a thread.
    let grid = |choice: usize| {
        let rows_of_warp = rows_at_once * ROWS[choice];
        let warps = dims.dim.div_ceil(rows_of_warp).min(MAX_WARPS);
        ([dims.batch, dims.nheads(), dims.dim.div_ceil(rows_of_warp * warps)], warps)
    };
    // Several rows a thread for one token alone: four for loads enough under way; two where the device holds all blocks
    // even then, and what counts is how soon a thread is done.
    let fills =
        |choice: usize| dims.seqlen() == 1 && dims.dim.is_multiple_of(rows_at_once * ROWS[choice]);
    let blocks_at_once =
        if stream.device.capability < (10, 0) && state.dtype.size() < 4 { 5 } else { 4 };
    let at_once = blocks_at_once * stream.device.multiprocessors as usize;
    let choice = match dense {
        true if fills(3) && grid(3).0.iter().product::<usize>() > at_once => 3,
        true if fills(2) => 2,
        true => 1,
        false => 0,
    };
    let one_decay = inputs.dt.is_expanded(3)
        && inputs.A.is_expanded(1)
        && inputs.A.is_expanded(2)
        && inputs.dt_bias.as_ref().is_none_or(|bias| bias.is_expanded(1));
    let params = OxiStateUpdate {
        seqlen: params::size("x", "seqlen", dims.seqlen())?,
        heads_per_group: (dims.nheads() / dims.ngroups()) as i32,
        dim: params::size("x", "dim", dims.dim)?,
        dstate: dims.dstate as i32,
        lanes_log2: lanes.trailing_zeros() as i32,
        one_decay: one_decay.into(),
        dt_softplus: inputs.dt_softplus.into(),
        wide_dt: is_wide(inputs.dt.dtype),
        wide_dt_bias: inputs.dt_bias.map_or(0, |bias| is_wide(bias.dtype)),
        wide_A: is_wide(inputs.A.dtype),
        wide_D: inputs.D.map_or(0, |D| is_wide(D.dtype)),
        intermediate_dtype: inputs
            .intermediate
            .map_or(0, |states| params::dtype(states.dtype) as i32),
        slots: dims.slots() as i64,
        indices: indices.map_or(std::ptr::null(), |indices| indices.data().cast()),
        state: Some(state).into(),
        x: Some(&inputs.x).into(),
        dt: Some(&inputs.dt).into(),
        dt_bias: inputs.dt_bias.as_ref().into(),
        A: Some(&inputs.A).into(),
        B: Some(&inputs.B).into(),
        C: Some(&inputs.C).into(),
        D: inputs.D.as_ref().into(),
        out: Some(&inputs.out).into(),
        z: inputs.z.as_ref().into(),
        intermediate: inputs.intermediate.as_ref().into(),
        indices_step: indices.map_or(0, |indices| indices.strides()[0] as i64),
        indices_are_64_bit: indices.is_some_and(|indices| indices.dtype == DType::I64).into(),
        ..Default::default()
    };
    let choices = [params::dtype(dtype) as usize, params::dtype(state.dtype) as usize, choice];
    let (blocks, warps) = grid(choice);
    stream.launch(&params, &choices, blocks, Block::of(warps * WARP))
}
