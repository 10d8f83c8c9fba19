//! Causal convolution on CUDA: which instance serves a call, and its launch.

use super::launch::{Block, Stream, WARP};
use super::params::{
    self, OXI_CONV_CHANNEL_WARPS, OXI_CONV_DOUT, OXI_CONV_DX, OXI_CONV_LINE_THREADS, OXI_CONV_OUT,
    OXI_CONV_WEIGHT, OXI_CONV_X, OXI_EXACT_CONV_WIDTH, OXI_MAX_MARKED_TOKENS, OxiConv,
    OxiConvBackward, OxiConvParameters, VECTOR,
};
use crate::error::Result;
use crate::ops::causal_conv1d::{ConvGradients, ConvInputs};
use crate::tensor::{DType, View};

/// Spans begin at multiples of a warp's step where tokens are neighbours, otherwise of what is usual of allocations.
const STEP: usize = 256;
const UNIT: usize = 8;
/// Tokens of a span at least, for its halo not to count.
const MIN_SPAN: usize = 32;
/// Spans for each block that runs at once, for multiprocessors to end together: forward and backward along channels, where
/// each has a halo to load and backward's blocks go from span to span; along tokens.
const WAVES_FORWARD: usize = 6;
const WAVES_BACKWARD: usize = 1;
const WAVES_ALONG_TOKENS: usize = 8;

/// The values of the axis FORM.
#[derive(Clone, Copy, PartialEq)]
enum Form {
    Plain,
    Packed,
    Any,
}

/// How a call is shared out.
struct Plan {
    /// Choices of ELEMENT, LAYOUT, FORM.
    choices: [usize; 3],
    form: Form,
    along_tokens: bool,
    /// Elements that a thread moves at once.
    width: usize,
    block: Block,
    channel_blocks: usize,
}

impl Plan {
    /// Of a call with these tensors beside x; None where there is none of them.
    fn new(inputs: &ConvInputs, dtype: DType, others: &[Option<&View<3>>]) -> Self {
        let dims = inputs.dims;
        // Where neither is dense, along tokens: a lane's elements are then at least a line of memory.
        let along_tokens = inputs.x.strides()[1] != 1 || (dims.dim == 1 && dims.seqlen > 1);
        // kSpan or kChannels of the kernels, where all moves in packs of those and elsewhere.
        let (exact_width, any_width) =
            if along_tokens { (VECTOR / dtype.size(), 8) } else { (8 / dtype.size(), 2) };
        let dense = |view: &View<3>| is_dense(view, along_tokens, exact_width);
        let whole = dims.seqlen > 0 && dims.seqlen.is_multiple_of(exact_width);
        let exact = dims.width == OXI_EXACT_CONV_WIDTH as usize
            && (!along_tokens || whole)
            && dense(&inputs.x)
            && others.iter().all(|view| view.is_some_and(dense));
        let packed = inputs.seq_idx.is_some() || inputs.cu_seqlens.is_some();
        let form = match (exact, packed) {
            (true, false) => Form::Plain,
            (true, true) => Form::Packed,
            (false, _) => Form::Any,
        };
        let width = if exact { exact_width } else { any_width };
        let (warps, per_block) = if along_tokens {
            (OXI_CONV_CHANNEL_WARPS as usize, OXI_CONV_CHANNEL_WARPS as usize)
        } else {
            let most = OXI_CONV_LINE_THREADS as usize / WARP;
            let warps = dims.dim.div_ceil(width * WARP).clamp(1, most);
            (warps, warps * WARP * width)
        };
        Plan {
            choices: [params::dtype(dtype) as usize, along_tokens.into(), form as usize],
            form,
            along_tokens,
            width,
            block: Block::of(warps * WARP),
            channel_blocks: dims.dim.div_ceil(per_block),
        }
    }

    /// The bit if lines of the tensor move in packs.
    fn flag(&self, view: Option<&View<3>>, bit: u32) -> i32 {
        let dense = view.is_some_and(|view| is_dense(view, self.along_tokens, self.width));
        if dense { bit as i32 } else { 0 }
    }

    /// Tokens of a span where about `spans` of them are wanted of all sequences together.
    fn tokens(&self, inputs: &ConvInputs, spans: usize) -> usize {
        let dims = inputs.dims;
        let unit = if self.along_tokens { STEP } else { UNIT };
        let of_sequence = (spans / dims.batch.max(1)).max(1);
        let most =
            if self.form != Form::Plain { OXI_MAX_MARKED_TOKENS as usize } else { usize::MAX };
        dims.seqlen.div_ceil(of_sequence).max(MIN_SPAN).next_multiple_of(unit).min(most)
    }

    fn params(&self, inputs: &ConvInputs, tokens: usize) -> Result<OxiConv> {
        let dims = inputs.dims;
        let seqlen = params::seqlen(dims.seqlen)?;
        let spans_of_sequence = dims.seqlen.div_ceil(tokens).max(1);
        let ndocs = inputs.cu_seqlens.as_ref().map_or(1, |bounds| bounds.shape[0] - 1);
        let row = OXI_EXACT_CONV_WIDTH as usize;
        let weight_is_dense = dims.width == row && params::is_dense(&inputs.weight, row);
        Ok(OxiConv {
            dim: params::size("x", "dim", dims.dim)?,
            width: dims.width as i32,
            seqlen,
            ndocs: params::size("cu_seqlens", "ndocs", ndocs)?,
            silu: inputs.silu.into(),
            dense: self.flag(Some(&inputs.x), OXI_CONV_X)
                | if weight_is_dense { OXI_CONV_WEIGHT as i32 } else { 0 },
            wide_weight: params::is_wide(inputs.weight.dtype),
            wide_initial_states: inputs
                .initial_states
                .map_or(0, |states| params::is_wide(states.dtype)),
            state_a_document: inputs.initial_states.is_some_and(|s| s.shape[0] == ndocs).into(),
            channel_blocks: params::size("x", "dim", self.channel_blocks)? as u32,
            tokens: tokens as i32,
            spans_of_sequence: spans_of_sequence as u32,
            spans: params::size("x", "batch", spans_of_sequence * dims.batch)? as u32,
            x: Some(&inputs.x).into(),
            weight: Some(&inputs.weight).into(),
            bias: params::vector(inputs.bias.as_ref()),
            initial_states: inputs.initial_states.as_ref().into(),
            seq_idx: inputs.seq_idx.map_or(std::ptr::null(), |ids| ids.data().cast()),
            seq_idx_stride: inputs.seq_idx.map_or([0; 2], |ids| ids.strides().map(|s| s as i64)),
            cu_seqlens: inputs.cu_seqlens.map_or(std::ptr::null(), |bounds| bounds.data().cast()),
            cu_seqlens_step: inputs.cu_seqlens.map_or(0, |bounds| bounds.strides()[0] as i64),
            cu_seqlens_are_64_bit: inputs.cu_seqlens.is_some_and(|b| b.dtype == DType::I64).into(),
            ..Default::default()
        })
    }
}

/// Whether the lines of a tensor (batch, dim, seqlen) along tokens, or along channels, move in packs of `width` elements.
fn is_dense(view: &View<3>, along_tokens: bool, width: usize) -> bool {
    if along_tokens {
        return params::is_dense(view, width);
    }
    view.shape[1].is_multiple_of(width) && params::is_dense_along(view, 1, width)
}

pub fn forward(
    stream: &Stream,
    dtype: DType,
    inputs: &ConvInputs,
    out: &View<3>,
    final_states: Option<&View<3>>,
) -> Result<()> {
    let dims = inputs.dims;
    if dims.batch * dims.dim == 0 {
        return Ok(());
    }
    let plan = Plan::new(inputs, dtype, &[Some(out)]);
    let resident = stream.resident_blocks::<OxiConv>(&plan.choices, plan.block)?;
    let waves = if plan.along_tokens { WAVES_ALONG_TOKENS } else { WAVES_FORWARD };
    let tokens = plan.tokens(inputs, waves * resident / plan.channel_blocks);
    let mut params = plan.params(inputs, tokens)?;
    params.out = Some(out).into();
    params.final_states = final_states.into();
    params.dense |= plan.flag(Some(out), OXI_CONV_OUT);
    let blocks = params.spans as usize * plan.channel_blocks;
    stream.launch(&params, &plan.choices, [blocks, 1, 1], plan.block)
}

/// `partials`: the workspace of the parameters' gradients, (blocks, width + 1, dim).
pub fn backward(
    stream: &Stream,
    dtype: DType,
    inputs: &ConvInputs,
    gradients: &ConvGradients,
    partials: &View<3>,
) -> Result<()> {
    let dims = inputs.dims;
    if dims.dim == 0 {
        return Ok(());
    }
    let mut span_blocks = 0;
    if dims.batch > 0 {
        let dout = gradients.dout.as_ref();
        let plan = Plan::new(inputs, dtype, &[dout, Some(&gradients.dx)]);
        let resident = stream.resident_blocks::<OxiConvBackward>(&plan.choices, plan.block)?;
        let waves = if plan.along_tokens { WAVES_ALONG_TOKENS } else { WAVES_BACKWARD };
        let spans = (waves * resident / plan.channel_blocks).min(partials.shape[0]);
        let tokens = plan.tokens(inputs, spans);
        let mut conv = plan.params(inputs, tokens)?;
        conv.dense |= plan.flag(dout, OXI_CONV_DOUT) | plan.flag(Some(&gradients.dx), OXI_CONV_DX);
        span_blocks = partials.shape[0].min(conv.spans as usize);
        let params = OxiConvBackward {
            conv,
            dout: dout.into(),
            dx: Some(&gradients.dx).into(),
            dfinal_states: gradients.dfinal_states.as_ref().into(),
            dinitial_states: gradients.dinitial_states.as_ref().into(),
            partials: partials.data().cast(),
            span_blocks: span_blocks as i32,
            ..Default::default()
        };
        let blocks = span_blocks * plan.channel_blocks;
        stream.launch(&params, &plan.choices, [blocks, 1, 1], plan.block)?;
    }
    let params = OxiConvParameters {
        partials: partials.data().cast(),
        dweight: Some(&gradients.dweight).into(),
        dbias: params::vector(gradients.dbias.as_ref()),
        blocks: span_blocks as i32,
        dim: params::size("x", "dim", dims.dim)?,
        width: dims.width as i32,
        dweight_dtype: params::dtype(gradients.dweight.dtype) as i32,
    };
    let columns = dims.dim * (dims.width + 1);
    stream.launch(&params, &[], [columns.div_ceil(WARP), 1, 1], Block::of_column_sum(span_blocks))
}
