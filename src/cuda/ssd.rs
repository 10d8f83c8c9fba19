//! The chunk scan's forward on CUDA: which kernel serves a call, and its launches.

use super::launch::{Block, Stream, WARP};
use super::module::CudaDevice;
use super::params::{
    self, OXI_SSD_SEGMENT_PARTS, OXI_SSD_STATES_SHARED_BYTES, OXI_SSD_TILE, OxiSsd, OxiSsdMapped,
    SsdMappedStates, SsdRecurrence, VECTOR,
};
use crate::dims::SsdDims;
use crate::error::{Error, Result};
use crate::ops::ssd::{Packing, SsdInputs, SsdStates};
use crate::tensor::{DType, View};

/// The sizes with kernels of their own: one or two parts of the values of the axis HEADDIM, and the values of DSTATE.
pub const HEADDIMS: [usize; 4] = [64, 80, 96, 128];
pub const DSTATES: [usize; 3] = [64, 128, 256];
/// Headdim and dstate at most.
pub const MAX_SIZE: usize = 256;

/// Of the kernels with wgmma: a block's threads, for states by DSTATES; rows of the state that it has, if only to leave some
/// aside.
pub(super) const WGMMA_THREADS: usize = 640;
const WGMMA_STATES_THREADS: [usize; 3] = [256, 256, 384];
const WGMMA_ROWS: usize = 64;
/// Rows of a tile of out, in backward of dx, that a warp writes.
pub(super) const WGMMA_ROWS_OF_WARP: usize = 16;
/// Of the kernel with mma.sync: threads of a block and rows of the state that it has at most; its shared memory, and what a
/// stage of it takes for each column of the state.
const MMA_THREADS: usize = 160;
const MMA_ROWS: usize = 64;
const MMA_SHARED_BYTES: usize = 27648;
const MMA_STAGE_ROW_BYTES: usize = 256;
/// Of the recurrence: lanes that share a row of the state; elements of it that a thread has, and a warp's rows then.
const LANES_OF_ROW: usize = 8;
const MOST_WARPS: usize = 8;
const HELD: [usize; 4] = [4, 8, 16, 32];
const ROWS_OF_WARP: [usize; 4] = [32, 32, 16, 8];

/// How headdim is shared among blocks.
pub(super) struct Slices {
    pub count: usize,
    size: usize,
    step: usize,
}

impl Slices {
    /// In parts of `size`, the last of which may be smaller.
    pub fn of(headdim: usize, size: usize) -> Self {
        Slices { count: headdim.div_ceil(size), size, step: size }
    }

    /// In two parts of `size` at most, which overlap if they are larger than headdim together.
    fn of_two(headdim: usize, size: usize) -> Self {
        Slices { count: headdim.div_ceil(size), size, step: headdim - size }
    }
}

/// What is stored.
pub(super) struct Results<'a> {
    pub out: &'a View<4>,
    pub states: SsdStates,
    /// Of a backward, where z has gradients: those of what it gates as they come, and where z's go; that of Y goes to out.
    pub gate: Option<(&'a View<4>, &'a View<4>)>,
    /// The states that enter tiles: to be written, or of a backward those that were.
    pub entry_states: Option<&'a View<1>>,
}

/// Tokens of a slot of states, where the kernels with wgmma serve a backward or not.
pub fn slot_tokens(by_wgmma: bool) -> usize {
    const TILE: usize = OXI_SSD_TILE as usize;
    if by_wgmma { 2 * TILE } else { TILE }
}

/// Slots of a sequence's states at tiles' ends: see ssd_bwd.cuh.
pub struct Slots {
    slot_tokens: usize,
    of_tokens: usize,
    entering: usize,
    leaving: usize,
}

impl Slots {
    /// `dvarlen`: whether there are gradients of documents' last states.
    pub fn of(inputs: &SsdInputs, dvarlen: bool, by_wgmma: bool) -> Self {
        let slot_tokens = slot_tokens(by_wgmma);
        let documents = |has: bool| if has { inputs.packing.documents() } else { 0 };
        Slots {
            slot_tokens,
            of_tokens: inputs.dims.seqlen.div_ceil(slot_tokens),
            entering: documents(inputs.initial_states.is_some()),
            leaving: documents(dvarlen),
        }
    }

    pub fn of_entries(&self) -> usize {
        self.of_tokens + self.entering
    }

    pub fn of_exits(&self) -> usize {
        self.of_tokens + self.leaving + 1
    }

    /// Those of documents among the latter.
    pub(super) fn of_documents(&self) -> usize {
        self.leaving
    }

    pub(super) fn enter(&self, params: &mut OxiSsd, states: *mut u8) {
        params.slot_tokens = self.slot_tokens as i32;
        params.token_slots = self.of_tokens as i32;
        params.entry_slots = self.of_entries() as i32;
        params.entry_states = states.cast();
    }
}

/// Elements of a head's state as kernels keep it, at most: headdim is rounded up to whole slices, dstate to DSTATES.
pub fn state_elements(headdim: usize, dstate: usize) -> usize {
    headdim.next_multiple_of(MMA_ROWS) * DSTATES[rounded(dstate)]
}

/// Refuse sizes that no kernel is for.
pub fn check_sizes(dims: &SsdDims) -> Result<()> {
    for (arg, name, size) in [("x", "headdim", dims.headdim), ("B", "dstate", dims.dstate)] {
        if size > MAX_SIZE {
            return Err(Error::Unsupported {
                arg,
                got: format!("{name} = {size}"),
                allowed: format!("{name} <= {MAX_SIZE} on cuda"),
            });
        }
    }
    Ok(())
}

/// The place among DSTATES of the size that dstate is rounded up to.
pub(super) fn rounded(dstate: usize) -> usize {
    DSTATES.iter().position(|&size| size >= dstate).expect("a size up to 256")
}

/// `segments`: the workspace of long sequences, (parts of segments but the last one, batch nheads, elements + 1).
pub fn forward(
    stream: &Stream,
    dtype: DType,
    inputs: &SsdInputs,
    out: &View<4>,
    states: SsdStates,
    segments: Option<&View<3>>,
    entry_states: Option<&View<1>>,
) -> Result<()> {
    check_sizes(&inputs.dims)?;
    let results = Results { out, states, gate: None, entry_states };
    launch(stream, dtype, inputs, &results, segments)
}

/// Of sizes that were checked.
pub(super) fn launch(
    stream: &Stream,
    dtype: DType,
    inputs: &SsdInputs,
    results: &Results,
    segments: Option<&View<3>>,
) -> Result<()> {
    let dims = inputs.dims;
    if dims.batch == 0 {
        return Ok(());
    }
    let (dout, dz) = results.gate.unzip();
    let mapped = [&inputs.x, &inputs.B, &inputs.C, results.out];
    if fits(stream.device, dtype, &dims, mapped, [inputs.z.as_ref(), dout, dz]) {
        return wgmma(stream, dtype, inputs, results, segments);
    }
    if results.gate.is_none() && results.entry_states.is_some() {
        return Err(unserved_entry_states());
    }
    if dtype == DType::F32 {
        recurrence(stream, inputs, results, segments)
    } else {
        mma(stream, dtype, inputs, results, segments)
    }
}

/// Whether the kernels with wgmma serve a call with these x, B, C and out, and z, dout and dz.
fn fits(
    device: &CudaDevice,
    dtype: DType,
    dims: &SsdDims,
    mapped: [&View<4>; 4],
    dense: [Option<&View<4>>; 3],
) -> bool {
    have_wgmma(device, dtype, dims)
        && mapped.into_iter().all(is_mapped)
        && dense.into_iter().flatten().all(is_dense)
}

/// Whether a call with these x, B, C and out, and z, can keep the states that enter tiles for a backward: those of the slices
/// that it takes headdim in.
pub fn keeps_states(
    device: &CudaDevice,
    dtype: DType,
    dims: &SsdDims,
    mapped: [&View<4>; 4],
    z: Option<&View<4>>,
) -> bool {
    dims.headdim.is_multiple_of(wgmma_part(dims.headdim))
        && fits(device, dtype, dims, mapped, [z, None, None])
}

/// Whether there are kernels with wgmma for these sizes, of dense tensors.
pub(super) fn have_wgmma(device: &CudaDevice, dtype: DType, dims: &SsdDims) -> bool {
    // Without tokens there is no memory to map.
    device.capability == (9, 0)
        && dtype != DType::F32
        && dims.batch * dims.seqlen > 0
        && HEADDIMS.contains(&dims.headdim)
        && DSTATES.contains(&dims.dstate)
}

/// A block of that of those kernels that walks states alone, where two share a multiprocessor if they can. `dstate`: an index
/// of DSTATES.
fn wgmma_states_block(stream: &Stream, choices: &[usize], dstate: usize) -> Block {
    let shared_bytes = match DSTATES[dstate] {
        256 => stream.shared_bytes::<SsdMappedStates>(choices),
        _ => OXI_SSD_STATES_SHARED_BYTES as usize,
    };
    Block { threads: WGMMA_STATES_THREADS[dstate], shared_bytes }
}

/// Whether rows move in 16 bytes, and in bulk copies.
fn is_dense(view: &View<4>) -> bool {
    params::is_dense(view, VECTOR / view.dtype.size())
}
pub(super) fn is_mapped(view: &View<4>) -> bool {
    is_dense(view) && params::can_be_mapped(view)
}

/// Only kernels with wgmma keep the states that enter tiles, and read them.
pub fn unserved_entry_states() -> Error {
    Error::Value {
        arg: "entry_states",
        got: "a tensor".into(),
        allowed: "None, unless kernels with wgmma serve the call".into(),
    }
}

fn wgmma(
    stream: &Stream,
    dtype: DType,
    inputs: &SsdInputs,
    results: &Results,
    segments: Option<&View<3>>,
) -> Result<()> {
    let headdim = inputs.dims.headdim;
    let dstate = rounded(inputs.dims.dstate);
    // Two of 48 overlap in a headdim of 80.
    let part = wgmma_part(headdim);
    let slices = Slices::of_two(headdim, part);
    let choices = [narrow(dtype), (part == 64).into(), dstate];
    let map = |view: &View<4>| stream.tensor_map(view, OXI_SSD_TILE as usize);
    let mapped = OxiSsdMapped {
        x: map(&inputs.x)?,
        B: map(&inputs.B)?,
        C: map(&inputs.C)?,
        out: stream.tensor_map(results.out, WGMMA_ROWS_OF_WARP)?,
        ..Default::default()
    };
    let mut params = forward_params(inputs, results, &slices)?;
    if let Some(states) = results.entry_states {
        params.keeps_entry_states = results.gate.is_none().into();
        Slots::of(inputs, false, true).enter(&mut params, states.data());
    }
    let elements = slices.count * WGMMA_ROWS * DSTATES[dstate];
    in_segments(inputs, params, segments, elements, |ssd, blocks| {
        let (grid, mapped) = ([blocks, 1, 1], OxiSsdMapped { ssd, ..mapped });
        if ssd.states_only == 0 {
            let shared_bytes = stream.shared_bytes::<OxiSsdMapped>(&choices);
            let block = Block { threads: WGMMA_THREADS, shared_bytes };
            stream.launch(&mapped, &choices, grid, block)
        } else {
            let block = wgmma_states_block(stream, &choices, dstate);
            stream.launch(&SsdMappedStates(mapped), &choices, grid, block)
        }
    })
}

/// Of the kernels with wgmma: what a block has of a headdim, a value of the axis HEADDIM.
pub(super) fn wgmma_part(headdim: usize) -> usize {
    if matches!(headdim, 80 | 96) { 48 } else { 64 }
}

fn mma(
    stream: &Stream,
    dtype: DType,
    inputs: &SsdInputs,
    results: &Results,
    segments: Option<&View<3>>,
) -> Result<()> {
    let dims = inputs.dims;
    let dstate = rounded(dims.dstate);
    let choices = [narrow(dtype), dstate];
    let slices = Slices::of(dims.headdim, dims.headdim.min(MMA_ROWS));
    let most = stream.shared_bytes::<OxiSsd>(&choices);
    let bytes = |stages: usize| MMA_SHARED_BYTES + stages * MMA_STAGE_ROW_BYTES * DSTATES[dstate];
    let stages = if bytes(2) <= most { 2 } else { 1 };
    let mut params = forward_params(inputs, results, &slices)?;
    params.stages = stages as i32;
    let copied = [Some(&inputs.x), Some(&inputs.B), Some(&inputs.C)];
    params.width = copied_at_once(inputs, &copied, VECTOR / dtype.size(), 2) as i32;
    let block = Block { threads: MMA_THREADS, shared_bytes: bytes(stages) };
    let elements = slices.count * MMA_ROWS * DSTATES[dstate];
    in_segments(inputs, params, segments, elements, |params, blocks| {
        stream.launch(&params, &choices, [blocks, 1, 1], block)
    })
}

fn recurrence(
    stream: &Stream,
    inputs: &SsdInputs,
    results: &Results,
    segments: Option<&View<3>>,
) -> Result<()> {
    let dims = inputs.dims;
    let held = HELD.iter().position(|held| held * LANES_OF_ROW >= dims.dstate).expect("up to 256");
    let rows = ROWS_OF_WARP[held];
    // A head's warps, in blocks of as many as leave none of the multiprocessors without one: they share B and C.
    let mut warps = dims.headdim.div_ceil(rows).next_power_of_two().min(MOST_WARPS);
    let walks = dims.batch
        * dims.nheads
        * segments.map_or(1, |view| segments_of(view.shape[0], dims.seqlen).count);
    let blocks = |warps: usize| walks * dims.headdim.div_ceil(rows * warps);
    while warps > 1 && 2 * blocks(warps) < stream.device.multiprocessors as usize {
        warps /= 2;
    }
    let slices = Slices::of(dims.headdim, rows * warps);
    let mut params = forward_params(inputs, results, &slices)?;
    let copied = [Some(&inputs.x), Some(&inputs.B), Some(&inputs.C), inputs.z.as_ref()];
    params.width = copied_at_once(inputs, &copied, VECTOR / 4, VECTOR / 4) as i32;
    let (choices, block) = ([0, held], Block::of(warps * WARP));
    let elements = dims.headdim * LANES_OF_ROW * HELD[held];
    in_segments(inputs, params, segments, elements, |params, blocks| {
        stream.launch(&SsdRecurrence(params), &choices, [blocks, 1, 1], block)
    })
}

/// The choice of ELEMENT among the narrow ones.
pub(super) fn narrow(dtype: DType) -> usize {
    params::dtype(dtype) as usize - 1
}

/// How many elements of these tensors move at once: `most`, or as many as their alignment allows, but at least `least`;
/// else 1.
pub(super) fn copied_at_once(
    inputs: &SsdInputs,
    tensors: &[Option<&View<4>>],
    most: usize,
    least: usize,
) -> usize {
    let fits = |width: usize| {
        inputs.dims.headdim.is_multiple_of(width)
            && inputs.dims.dstate.is_multiple_of(width)
            && tensors.iter().flatten().all(|view| params::is_dense(view, width))
    };
    let mut width = most;
    while width >= least {
        if fits(width) {
            return width;
        }
        width /= 2;
    }
    1
}

/// How a long sequence is cut.
struct Segments {
    count: usize,
    /// Of each but the last one, which may have fewer.
    tokens: usize,
}

/// As many segments as a workspace of so many rows is for; fewer where the tokens of each, rounded up so that parts have whole
/// tiles, are then enough.
fn segments_of(rows: usize, seqlen: usize) -> Segments {
    let parts = OXI_SSD_SEGMENT_PARTS as usize;
    let tokens = seqlen.max(1).div_ceil(rows / parts + 1);
    let tokens = tokens.next_multiple_of(OXI_SSD_TILE as usize * parts);
    Segments { count: seqlen.max(1).div_ceil(tokens), tokens }
}

/// Launch over the whole sequences or, with a workspace for it, over segments of them: what each but the last adds first.
/// `elements`: of segment_states, for a part of a head.
fn in_segments(
    inputs: &SsdInputs,
    mut params: OxiSsd,
    segments: Option<&View<3>>,
    elements: usize,
    launch: impl Fn(OxiSsd, usize) -> Result<()>,
) -> Result<()> {
    let dims = inputs.dims;
    let blocks = dims.batch * dims.nheads * params.slices as usize;
    let Some(view) = segments else { return launch(params, blocks) };
    let count = cut(&mut params, view, dims.seqlen, elements)?;
    let has_states = !params.entry_states.is_null() && params.keeps_entry_states == 0;
    if count > 1 && !has_states {
        let parts = OXI_SSD_SEGMENT_PARTS as usize;
        launch(OxiSsd { states_only: 1, ..params }, blocks * parts * (count - 1))?;
    }
    launch(params, blocks * count)
}

/// Have a sequence walked in as many segments as the workspace is for: how many. `elements` as above.
pub(super) fn cut(
    params: &mut OxiSsd,
    view: &View<3>,
    seqlen: usize,
    elements: usize,
) -> Result<usize> {
    let parts = OXI_SSD_SEGMENT_PARTS as usize;
    let [rows, heads, has] = view.shape;
    if rows % parts != 0 || has <= elements {
        return Err(Error::Value {
            arg: "segments",
            got: format!("shape {:?}", view.shape),
            allowed: format!("{parts} rows a segment, more than {elements} elements"),
        });
    }
    let Segments { count, tokens } = segments_of(rows, seqlen);
    if count > 1 {
        params.segments = count as i32;
        params.segment_tokens = tokens as i32;
        params.segment_states = view.data().cast();
        params.segment_decays = view.data().cast::<f32>().wrapping_add(rows * heads * (has - 1));
    }
    Ok(count)
}

fn forward_params(inputs: &SsdInputs, results: &Results, slices: &Slices) -> Result<OxiSsd> {
    let (dout, dz) = results.gate.unzip();
    let params = params_of(inputs, &results.states, slices)?;
    let (z, out) = (inputs.z.as_ref().into(), Some(results.out).into());
    Ok(OxiSsd { z, out, dout: dout.into(), dz: dz.into(), ..params })
}

/// What forward and backward have in common. `states`: those of backward are gradients.
pub(super) fn params_of(inputs: &SsdInputs, states: &SsdStates, slices: &Slices) -> Result<OxiSsd> {
    let dims = inputs.dims;
    let seqlen = params::seqlen(dims.seqlen)?;
    let (seq_idx, cu_seqlens) = match &inputs.packing {
        Packing::Tokens { seq_idx, cu_seqlens } => (seq_idx.as_ref(), cu_seqlens.as_ref()),
        Packing::Chunks { .. } => unreachable!("chunks of the caller's are the CPU backend's"),
    };
    let ndocs = inputs.packing.documents();
    Ok(OxiSsd {
        seqlen,
        nheads: params::size("x", "nheads", dims.nheads)?,
        heads_per_group: dims.heads_per_group() as i32,
        headdim: dims.headdim as i32,
        dstate: dims.dstate as i32,
        ndocs: params::size("cu_seqlens", "ndocs", ndocs)?,
        segments: 1,
        segment_tokens: seqlen.max(1),
        slices: slices.count as i32,
        slice: slices.size as i32,
        slice_step: slices.step as i32,
        dt_softplus: inputs.dt_softplus.into(),
        dt_min: inputs.dt_limit.0 as f32,
        dt_max: inputs.dt_limit.1 as f32,
        wide_dt: params::is_wide(inputs.dt.dtype),
        wide_D: inputs.D.map_or(0, |D| params::is_wide(D.dtype)),
        wide_initial_states: inputs
            .initial_states
            .map_or(0, |states| params::is_wide(states.dtype)),
        varlen_dtype: states.varlen_states.map_or(0, |states| params::dtype(states.dtype) as i32),
        state_a_document: inputs.initial_states.is_some_and(|s| s.shape[0] == ndocs).into(),
        cu_seqlens_are_64_bit: cu_seqlens.is_some_and(|b| b.dtype == DType::I64).into(),
        x: Some(&inputs.x).into(),
        dt: Some(&inputs.dt).into(),
        A: params::vector(Some(&inputs.A)),
        dt_bias: params::vector(inputs.dt_bias.as_ref()),
        B: Some(&inputs.B).into(),
        C: Some(&inputs.C).into(),
        D: inputs.D.as_ref().into(),
        initial_states: inputs.initial_states.as_ref().into(),
        final_states: states.final_states.as_ref().into(),
        varlen_states: states.varlen_states.as_ref().into(),
        seq_idx: seq_idx.map_or(std::ptr::null(), |ids| ids.data().cast()),
        seq_idx_stride: seq_idx.map_or([0; 2], |ids| ids.strides().map(|stride| stride as i64)),
        cu_seqlens: cu_seqlens.map_or(std::ptr::null(), |bounds| bounds.data().cast()),
        cu_seqlens_step: cu_seqlens.map_or(0, |bounds| bounds.strides()[0] as i64),
        ..Default::default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_segment_has_tokens() {
        let parts = OXI_SSD_SEGMENT_PARTS as usize;
        for segments in [1, 2, 4, 66, 128, 256] {
            for seqlen in [0, 1, 257, 32768, 65636, 16384 * 66 + 1, 16384 * 256 + 1] {
                let Segments { count, tokens } = segments_of(parts * (segments - 1), seqlen);
                assert!((1..=segments).contains(&count) && tokens % (64 * parts) == 0);
                assert!((count - 1) * tokens < seqlen.max(1) && seqlen <= count * tokens);
            }
        }
        let Segments { count, tokens } = segments_of(parts * 3, 65636);
        assert_eq!((count, tokens), (4, 16512));
    }
}
