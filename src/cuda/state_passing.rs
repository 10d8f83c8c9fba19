//! State passing on CUDA: who shares a head, and the launches.

use super::launch::{Block, Stream, WARP};
use super::params::{
    self, OxiChunkStates, OxiStatePassing, OxiStatePassingBackward, OxiStatePassingDecay, VECTOR,
};
use crate::dims::StatePassingDims;
use crate::error::{Error, Result};
use crate::ops::state_passing::Gradients;
use crate::tensor::{DType, View};

/// A block's warps at most: kPassingWarps of the kernels.
const BLOCK_WARPS: usize = 2;

/// How a call is shared out. It depends on neither batch nor strides, so results do not either.
struct Plan {
    /// The choice of ELEMENT.
    choices: [usize; 1],
    /// Elements that a thread moves at once.
    width: usize,
    /// How many warps have a head's elements.
    warps_of_head: usize,
    blocks_of_head: usize,
    block: Block,
}

impl Plan {
    fn new(dims: &StatePassingDims, dtype: DType) -> Self {
        let width = VECTOR / dtype.size();
        let warps_of_head = (dims.headdim * dims.dstate.div_ceil(width)).div_ceil(WARP);
        let warps = warps_of_head.clamp(1, BLOCK_WARPS);
        Plan {
            choices: [params::dtype(dtype) as usize],
            width,
            warps_of_head,
            blocks_of_head: warps_of_head.div_ceil(warps),
            block: Block::of(warps * WARP),
        }
    }

    fn blocks(&self, dims: &StatePassingDims) -> [usize; 3] {
        [dims.batch * dims.nheads * self.blocks_of_head, 1, 1]
    }

    /// Whether the rows of a tensor along dstate, if there is one, move in packs.
    fn is_dense<const N: usize>(&self, view: Option<&View<N>>) -> bool {
        view.is_none_or(|view| {
            view.shape[N - 1].is_multiple_of(self.width) && params::is_dense(view, self.width)
        })
    }

    fn sizes(&self, dims: &StatePassingDims, dense: bool) -> Result<OxiChunkStates> {
        Ok(OxiChunkStates {
            nchunks: params::size("states", "nchunks", dims.nchunks)?,
            nheads: params::size("states", "nheads", dims.nheads)?,
            headdim: params::size("states", "headdim", dims.headdim)?,
            dstate: params::size("states", "dstate", dims.dstate)?,
            warps_of_head: params::size("states", "headdim dstate", self.warps_of_head)?,
            blocks_of_head: self.blocks_of_head as u32,
            dense: dense.into(),
            ..Default::default()
        })
    }
}

pub fn forward(
    stream: &Stream,
    dims: &StatePassingDims,
    states: &View<5>,
    decay: &View<3>,
    initial_states: Option<&View<4>>,
    states_before: &View<5>,
    final_states: &View<4>,
) -> Result<()> {
    let plan = Plan::new(dims, states.dtype);
    let dense = plan.is_dense(Some(states))
        && plan.is_dense(Some(states_before))
        && plan.is_dense(initial_states)
        && plan.is_dense(Some(final_states));
    let params = OxiStatePassing {
        sizes: plan.sizes(dims, dense)?,
        states: Some(states).into(),
        states_before: Some(states_before).into(),
        decay: Some(decay).into(),
        initial_states: initial_states.into(),
        final_states: Some(final_states).into(),
        wide_initial_states: initial_states.is_some_and(|s| s.dtype == DType::F32).into(),
        ..Default::default()
    };
    stream.launch(&params, &plan.choices, plan.blocks(dims), plan.block)
}

/// `partials`: the workspace of ddecay, (warps of a head, 1, batch nheads nchunks).
pub fn backward(
    stream: &Stream,
    dims: &StatePassingDims,
    states_before: &View<5>,
    decay: &View<3>,
    initial_states: Option<&View<4>>,
    gradients: &Gradients,
    partials: &View<3>,
) -> Result<()> {
    let dtype = states_before.dtype;
    let plan = Plan::new(dims, dtype);
    if partials.shape[0] < plan.warps_of_head {
        return Err(Error::Value {
            arg: "partials",
            got: format!("{} rows", partials.shape[0]),
            allowed: format!("one for each of {} warps", plan.warps_of_head),
        });
    }
    let wide_initial_states = initial_states.filter(|states| states.dtype != dtype);
    let Gradients { dstates_before, dfinal_states, dstates, ddecay, dinitial_states } = gradients;
    let dense = plan.is_dense(Some(states_before))
        && plan.is_dense(wide_initial_states)
        && plan.is_dense(dstates_before.as_ref())
        && plan.is_dense(dfinal_states.as_ref())
        && plan.is_dense(Some(dstates))
        && plan.is_dense(dinitial_states.as_ref());
    let sizes = plan.sizes(dims, dense)?;
    let columns = partials.shape[2];
    let params = OxiStatePassingBackward {
        sizes,
        states_before: Some(states_before).into(),
        dstates_before: dstates_before.as_ref().into(),
        dstates: Some(dstates).into(),
        decay: Some(decay).into(),
        wide_initial_states: wide_initial_states.into(),
        dfinal_states: dfinal_states.as_ref().into(),
        dinitial_states: dinitial_states.as_ref().into(),
        partials: partials.data().cast(),
        columns: columns as i64,
        wide_dinitial_states: dinitial_states.is_some_and(|s| s.dtype == DType::F32).into(),
        ..Default::default()
    };
    stream.launch(&params, &plan.choices, plan.blocks(dims), plan.block)?;
    let params = OxiStatePassingDecay {
        partials: partials.data().cast(),
        columns: columns as i64,
        ddecay: Some(ddecay).into(),
        warps_of_head: sizes.warps_of_head,
        nchunks: sizes.nchunks,
        nheads: sizes.nheads,
        ..Default::default()
    };
    let block = Block::of_column_sum(plan.warps_of_head);
    stream.launch(&params, &[], [columns.div_ceil(WARP), 1, 1], block)
}
