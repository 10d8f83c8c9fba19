//! The chunk scan's backward on CUDA: which kernels serve a call, and their launches.

use super::launch::{Block, Stream, WARP};
use super::module::CudaDevice;
use super::params::{
    self, OXI_SSD_STATES_SHARED_BYTES, OXI_SSD_TILE, OxiSsd, OxiSsdBackward, OxiSsdBackwardMapped,
    SsdBackwardCuts, SsdBackwardMappedStates, SsdBackwardParameters, SsdBackwardStates, VECTOR,
};
use super::ssd::{self, Results, Slices, Slots, WGMMA_ROWS_OF_WARP, WGMMA_THREADS};
use crate::dims::SsdDims;
use crate::error::Result;
use crate::ops::ssd::{SsdGradients, SsdInputs, SsdStates, SsdWorkspaces};
use crate::tensor::{DType, View};

const TILE: usize = OXI_SSD_TILE as usize;

/// Of the kernels with wgmma: blocks that share a window's tiles, by DSTATES. Threads of a block that walks states, of which
/// so many share a multiprocessor.
const WGMMA_BLOCKS_OF_WINDOW: [usize; 3] = [1, 1, 2];
const WGMMA_STATES_THREADS: usize = 256;
const WGMMA_STATES_BLOCKS: usize = 2;
/// Of those with mma.sync: a block's threads, and rows of the state that it has at most; sizeof(Shared), of 16-bit elements and
/// of fp32, for states by DSTATES.
const MMA_THREADS: usize = 256;
const MMA_STATES_THREADS: usize = 288;
const MMA_ROWS: usize = 64;
const MMA_SHARED_BYTES: [usize; 2] = [88064, 96256];
const MMA_STATES_SHARED_BYTES: [usize; 3] = [50176, 74752, 82944];
/// What the walks leave of each token and head for the tiles.
pub const TOKEN_FLOATS: usize = 3;
/// Threads of the kernel for cuts.
const CUTS_THREADS: usize = 1024;

/// Windows of a sequence, of TILE tokens.
pub fn windows(seqlen: usize) -> usize {
    seqlen.div_ceil(TILE)
}

/// Whether the kernels with wgmma serve a call with these x, dY, B, C and dx, and dB and dC.
pub fn fits(
    device: &CudaDevice,
    dtype: DType,
    dims: &SsdDims,
    mapped: [&View<4>; 5],
    dense: [&View<4>; 2],
) -> bool {
    ssd::have_wgmma(device, dtype, dims)
        && mapped.into_iter().all(ssd::is_mapped)
        && dense.into_iter().all(|view| params::is_dense(view, VECTOR / dtype.size()))
}

/// Of sizes that were checked.
pub fn backward(
    stream: &Stream,
    dtype: DType,
    inputs: &SsdInputs,
    gradients: &SsdGradients,
    workspaces: &SsdWorkspaces,
) -> Result<()> {
    let dims = inputs.dims;
    let dy = workspaces.dy.as_ref().unwrap_or(&workspaces.dout);
    if let (Some(out), Some(dz)) = (&workspaces.dy, &gradients.dz) {
        let states = SsdStates { final_states: None, varlen_states: None };
        let gate = Some((&workspaces.dout, dz));
        let results = Results { out, states, gate, entry_states: workspaces.entry_states.as_ref() };
        ssd::launch(stream, dtype, inputs, &results, workspaces.segments.as_ref())?;
    }
    let part =
        if workspaces.fits { ssd::wgmma_part(dims.headdim) } else { dims.headdim.min(MMA_ROWS) };
    let params = params_of(inputs, gradients, workspaces, dy, &Slices::of(dims.headdim, part))?;
    if !params.marks.is_null() {
        let grid = [dims.batch, 1, 1];
        stream.launch(&SsdBackwardCuts(params), &[], grid, Block::of(CUTS_THREADS))?;
    }
    if workspaces.fits {
        wgmma(stream, dtype, inputs, gradients, workspaces, dy, params)?;
    } else {
        mma(stream, dtype, inputs, workspaces, dy, params)?;
    }
    let columns = dims.nheads * (2 + params.dD_columns as usize);
    let block = Block::of_column_sum(dims.batch * windows(dims.seqlen));
    stream.launch(&SsdBackwardParameters(params), &[], [columns.div_ceil(WARP), 1, 1], block)
}

fn wgmma(
    stream: &Stream,
    dtype: DType,
    inputs: &SsdInputs,
    gradients: &SsdGradients,
    workspaces: &SsdWorkspaces,
    dy: &View<4>,
    mut params: OxiSsdBackward,
) -> Result<()> {
    let part = ssd::wgmma_part(inputs.dims.headdim);
    let dstate = ssd::rounded(inputs.dims.dstate);
    let choices = [ssd::narrow(dtype), (part == 64).into(), dstate];
    let map = |view: &View<4>| stream.tensor_map(view, TILE);
    let mapped = OxiSsdBackwardMapped {
        x: map(&inputs.x)?,
        dy: map(dy)?,
        B: map(&inputs.B)?,
        C: map(&inputs.C)?,
        dx: stream.tensor_map(&gradients.dx, WGMMA_ROWS_OF_WARP)?,
        ..Default::default()
    };
    let dims = inputs.dims;
    let room = WGMMA_STATES_BLOCKS * stream.device.multiprocessors as usize;
    // A state's columns are shared by two blocks if it has more than one can have, or where walks leave room for twice as many.
    let has_few = workspaces.segments.is_some() || walks(inputs, &params) < room;
    let parts = if dims.dstate > 128 || (dims.dstate == 128 && has_few) { 2 } else { 1 };
    params.column_parts = parts as i32;
    let shared_bytes = OXI_SSD_STATES_SHARED_BYTES as usize;
    let block = Block { threads: WGMMA_STATES_THREADS, shared_bytes };
    let of_walk = [choices[0], choices[1], (dims.dstate / parts == 128).into()];
    let params = walk_states(inputs, workspaces, params, |bwd, blocks| {
        let params = SsdBackwardMappedStates(OxiSsdBackwardMapped { bwd, ..mapped });
        stream.launch(&params, &of_walk, [blocks, 1, 1], block)
    })?;
    let shared_bytes = stream.shared_bytes::<OxiSsdBackwardMapped>(&choices);
    let block = Block { threads: WGMMA_THREADS, shared_bytes };
    // One on each multiprocessor, which takes one window after another.
    let at_once = stream.device.multiprocessors as usize / WGMMA_BLOCKS_OF_WINDOW[dstate];
    let blocks = tile_blocks(inputs).min(at_once) * WGMMA_BLOCKS_OF_WINDOW[dstate];
    let params = OxiSsdBackwardMapped { bwd: params, ..mapped };
    stream.launch(&params, &choices, [blocks, 1, 1], block)
}

fn mma(
    stream: &Stream,
    dtype: DType,
    inputs: &SsdInputs,
    workspaces: &SsdWorkspaces,
    dy: &View<4>,
    mut params: OxiSsdBackward,
) -> Result<()> {
    let dstate = ssd::rounded(inputs.dims.dstate);
    let choices = [params::dtype(dtype) as usize, dstate];
    let width = VECTOR / dtype.size();
    let copied = [Some(&inputs.x), Some(dy), Some(&inputs.B), Some(&inputs.C)];
    params.ssd.width = ssd::copied_at_once(inputs, &copied, width, width) as i32;
    let shared_bytes = MMA_STATES_SHARED_BYTES[dstate];
    let block = Block { threads: MMA_STATES_THREADS, shared_bytes };
    let params = walk_states(inputs, workspaces, params, |params, blocks| {
        stream.launch(&SsdBackwardStates(params), &choices, [blocks, 1, 1], block)
    })?;
    let shared_bytes = MMA_SHARED_BYTES[usize::from(dtype == DType::F32)];
    let block = Block { threads: MMA_THREADS, shared_bytes };
    stream.launch(&params, &choices, [tile_blocks(inputs), 1, 1], block)
}

/// How many windows have tiles of their own, for the heads of each group.
fn tile_blocks(inputs: &SsdInputs) -> usize {
    let dims = inputs.dims;
    dims.batch * windows(dims.seqlen) * dims.ngroups
}

/// How many walks there are along each sequence or segment: of gradients and, unless they were kept, of states.
fn walks(inputs: &SsdInputs, params: &OxiSsdBackward) -> usize {
    let directions = 1 + params.finds_entry_states as usize;
    inputs.dims.batch * directions * inputs.dims.nheads * params.ssd.slices as usize
}

/// Launch the walks along whole sequences or, with a workspace for it, over segments of them: what each but the last adds
/// first. The params that go with that.
fn walk_states(
    inputs: &SsdInputs,
    workspaces: &SsdWorkspaces,
    mut params: OxiSsdBackward,
    launch: impl Fn(OxiSsdBackward, usize) -> Result<()>,
) -> Result<OxiSsdBackward> {
    let dims = inputs.dims;
    let blocks = walks(inputs, &params) * params.column_parts as usize;
    let mut segments = 1;
    if let Some(view) = &workspaces.segments {
        let elements = ssd::state_elements(dims.headdim, dims.dstate);
        segments = ssd::cut(&mut params.ssd, view, dims.seqlen, elements)?;
    }
    if segments > 1 {
        let ssd = OxiSsd { states_only: 1, ..params.ssd };
        launch(OxiSsdBackward { ssd, ..params }, blocks * (segments - 1))?;
    }
    launch(params, blocks * segments)?;
    Ok(params)
}

fn params_of(
    inputs: &SsdInputs,
    gradients: &SsdGradients,
    workspaces: &SsdWorkspaces,
    dy: &View<4>,
    slices: &Slices,
) -> Result<OxiSsdBackward> {
    let dims = inputs.dims;
    let windows = windows(dims.seqlen);
    let states = SsdStates {
        final_states: gradients.dfinal_states,
        varlen_states: gradients.dvarlen_states,
    };
    let mut ssd = ssd::params_of(inputs, &states, slices)?;
    let slots = Slots::of(inputs, gradients.dvarlen_states.is_some(), workspaces.fits);
    // Of this call's workspace the states that enter come behind those that leave.
    let elements = ssd::state_elements(dims.headdim, dims.dstate);
    let exits = dims.batch * slots.of_exits() * dims.nheads * elements;
    let entries = workspaces.states.data().wrapping_byte_add(exits * inputs.x.dtype.size());
    slots.enter(&mut ssd, workspaces.entry_states.map_or(entries, |states| states.data()));
    let tiles = dims.batch * windows * dims.ngroups;
    params::size("x", "batch times windows of 64 tokens times ngroups", tiles)?;
    let mut params = OxiSsdBackward {
        ssd,
        dy: Some(dy).into(),
        dx: Some(&gradients.dx).into(),
        ddt: Some(&gradients.ddt).into(),
        dB: Some(&gradients.dB).into(),
        dC: Some(&gradients.dC).into(),
        dinitial_states: gradients.dinitial_states.as_ref().into(),
        dA: params::vector(Some(&gradients.dA)),
        ddt_bias: params::vector(gradients.ddt_bias.as_ref()),
        dD: gradients.dD.as_ref().into(),
        exit_states: workspaces.states.data().cast(),
        tokens: workspaces.partials.data().cast(),
        partials: workspaces
            .partials
            .data()
            .cast::<f32>()
            .wrapping_add(TOKEN_FLOATS * dims.batch * dims.nheads * dims.seqlen),
        windows: windows as i32,
        document_slots: slots.of_documents() as i32,
        exit_slots: params::size("cu_seqlens", "ndocs", slots.of_exits())?,
        column_parts: 1,
        finds_entry_states: workspaces.entry_states.is_none().into(),
        batch: params::size("x", "batch", dims.batch)?,
        ngroups: dims.ngroups as i32,
        dD_columns: gradients.dD_columns() as i32,
        dD_dtype: gradients.dD.map_or(0, |dD| params::dtype(dD.dtype) as i32),
        wide_ddt: params::is_wide(gradients.ddt.dtype),
        wide_dinitial_states: gradients
            .dinitial_states
            .map_or(0, |states| params::is_wide(states.dtype)),
        ..Default::default()
    };
    if let Some(cuts) = workspaces.cuts.filter(|_| dims.batch * windows > 0) {
        // Words of 64 bits, then as many of 32.
        let marks = cuts.data().cast::<u64>();
        params.marks = marks;
        params.run_starts = marks.wrapping_add(dims.batch * windows).cast();
    }
    Ok(params)
}
