//! Causal depthwise convolution: pre[t] = bias + sum_k weight[k] source[t - (width - 1) + k], out = silu(pre).
//!
//! A *source* is an input by its position: x from 0 on, the initial states (or zeros) at -(width - 1)..0. A tap reaches
//! only sources of its token's document; what came before token 0 belongs to the document that starts there. A token
//! with a negative id gives 0.
//!
//! A task takes a block of tokens and of channels, as a tile of rows (tokens) of channels whatever the layout of x.
//! Backward's tasks own blocks of sources and recompute dpre for the width - 1 tokens after them; dweight and dbias are
//! one partial a task, added in order.

use rayon::prelude::*;

use crate::cpu::documents::Documents;
use crate::cpu::real::Real;
use crate::dims::ConvDims;
use crate::ops::causal_conv1d::{ConvGradients, ConvInputs};
use crate::tensor::View;

const TOKENS: usize = 128;
const CHANNELS: usize = 64;

/// A block of tokens and channels of one sequence.
struct Block {
    b: usize,
    tokens: std::ops::Range<usize>,
    channel: usize,
    nchannels: usize,
}

/// The blocks of the problem: at least one block of tokens, so that states pass through an empty sequence.
struct Blocks {
    dims: ConvDims,
    along_tokens: usize,
    along_channels: usize,
}

impl Blocks {
    fn new(dims: ConvDims) -> Self {
        Blocks {
            dims,
            along_tokens: dims.seqlen.div_ceil(TOKENS).max(1),
            along_channels: dims.dim.div_ceil(CHANNELS),
        }
    }

    fn count(&self) -> usize {
        self.dims.batch * self.along_tokens * self.along_channels
    }

    /// Blocks of one range of channels are apart by `along_channels`.
    fn get(&self, index: usize) -> Block {
        let channel = index % self.along_channels * CHANNELS;
        let rest = index / self.along_channels;
        let token = rest % self.along_tokens * TOKENS;
        Block {
            b: rest / self.along_tokens,
            tokens: token..self.dims.seqlen.min(token + TOKENS),
            channel,
            nchannels: CHANNELS.min(self.dims.dim - channel),
        }
    }
}

/// What a block needs beside x: weights as (width, nchannels), bias, documents.
struct Filter<'a, T> {
    inputs: &'a ConvInputs,
    documents: &'a Documents,
    width: usize,
    nchannels: usize,
    weight: Vec<T>,
    bias: Vec<T>,
}

impl<'a, T: Real> Filter<'a, T> {
    #[inline(always)]
    fn new(inputs: &'a ConvInputs, documents: &'a Documents, block: &Block) -> Self {
        let (width, nchannels) = (inputs.dims.width, block.nchannels);
        let mut weight = vec![T::zero(); width * nchannels];
        inputs.weight.load_tile([block.channel, 0], (1, width), (0, nchannels), &mut weight);
        let mut bias = vec![T::zero(); nchannels];
        if let Some(view) = &inputs.bias {
            view.load_line([block.channel], 0, &mut bias);
        }
        Filter { inputs, documents, width, nchannels, weight, bias }
    }

    /// The first source that token `t` may reach.
    #[inline(always)]
    fn reach(&self, b: usize, t: usize) -> isize {
        match self.documents.start(b, t) {
            0 => -(self.width as isize - 1),
            start => start as isize,
        }
    }

    /// The first tap of token `t` that stays within its document.
    #[inline(always)]
    fn first_tap(&self, b: usize, t: usize) -> usize {
        let first_source = t as isize - (self.width as isize - 1);
        (self.reach(b, t) - first_source).max(0) as usize
    }

    #[inline(always)]
    fn is_padding(&self, b: usize, t: usize) -> bool {
        self.inputs.seq_idx.is_some_and(|seq_idx| seq_idx.get_i32([b, t]) < 0)
    }

    /// Sources from `begin` (>= -(width - 1)) to `end` (<= seqlen), a row each.
    #[inline(always)]
    fn load_sources(&self, block: &Block, begin: isize, end: isize) -> Vec<T> {
        let nchannels = self.nchannels;
        let history = self.width as isize - 1;
        let mut sources = vec![T::zero(); (end - begin) as usize * nchannels];
        let before = (end.min(0) - begin).max(0) as usize;
        let (past, present) = sources.split_at_mut(before * nchannels);
        if let Some(initial) = &self.inputs.initial_states {
            let at = [block.b, block.channel, (begin + history) as usize];
            if before > 0 {
                initial.load_tile(at, (2, before), (1, nchannels), past);
            }
        }
        let rows = present.len() / nchannels;
        if rows > 0 {
            let at = [block.b, block.channel, begin.max(0) as usize];
            self.inputs.x.load_tile(at, (2, rows), (1, nchannels), present);
        }
        sources
    }

    /// pre of token `t`, its first source being row `row` of `sources`.
    #[inline(always)]
    fn convolve(&self, first_tap: usize, sources: &[T], row: usize, pre: &mut [T]) {
        pre.copy_from_slice(&self.bias);
        for k in first_tap..self.width {
            let weight = &self.weight[k * self.nchannels..][..self.nchannels];
            let source = &sources[(row + k) * self.nchannels..][..self.nchannels];
            for ((pre, &weight), &source) in pre.iter_mut().zip(weight).zip(source) {
                *pre += weight * source;
            }
        }
    }

    #[inline(always)]
    fn activate(&self, pre: &mut [T]) {
        if self.inputs.silu {
            for value in pre {
                *value = value.silu();
            }
        }
    }
}

pub fn forward<T: Real>(inputs: &ConvInputs, out: &View<3>, final_states: Option<&View<3>>) {
    let blocks = Blocks::new(inputs.dims);
    let documents = Documents::new(inputs.seq_idx.as_ref());
    (0..blocks.count()).into_par_iter().for_each(|index| {
        simd!(forward_block::<T>(inputs, &documents, &blocks.get(index), out, final_states));
    });
}

#[inline(always)]
fn forward_block<T: Real>(
    inputs: &ConvInputs,
    documents: &Documents,
    block: &Block,
    out: &View<3>,
    final_states: Option<&View<3>>,
) {
    let filter = Filter::<T>::new(inputs, documents, block);
    let (b, channel, nchannels) = (block.b, block.channel, block.nchannels);
    let ConvDims { seqlen, width, .. } = inputs.dims;
    let history = width as isize - 1;
    let (begin, end) = (block.tokens.start as isize, block.tokens.end as isize);
    let sources = filter.load_sources(block, begin - history, end);
    let mut result = vec![T::zero(); block.tokens.len() * nchannels];
    for (row, t) in block.tokens.clone().enumerate() {
        let pre = &mut result[row * nchannels..][..nchannels];
        if !filter.is_padding(b, t) {
            filter.convolve(filter.first_tap(b, t), &sources, row, pre);
            filter.activate(pre);
        }
    }
    let at = [b, channel, block.tokens.start];
    out.store_tile(at, (2, block.tokens.len()), (1, nchannels), &result);

    if let (Some(final_states), true) = (final_states, block.tokens.end == seqlen) {
        let first = seqlen as isize - history;
        let mut last = filter.load_sources(block, first, seqlen as isize);
        let foreign = final_states_begin(&filter, b) - first;
        last[..foreign as usize * nchannels].fill(T::zero());
        final_states.store_tile([b, channel, 0], (2, width - 1), (1, nchannels), &last);
    }
}

/// The first source that belongs to the final states: theirs is the document of the last token.
#[inline(always)]
fn final_states_begin<T: Real>(filter: &Filter<'_, T>, b: usize) -> isize {
    let seqlen = filter.inputs.dims.seqlen;
    let first = seqlen as isize - (filter.width as isize - 1);
    if seqlen == 0 { first } else { first.max(filter.reach(b, seqlen - 1)) }
}

pub fn backward<T: Real>(inputs: &ConvInputs, gradients: &ConvGradients) {
    let ConvDims { batch, dim, width, .. } = inputs.dims;
    let blocks = Blocks::new(inputs.dims);
    let documents = Documents::new(inputs.seq_idx.as_ref());
    // Of each block (width + 1, CHANNELS): dweight, then dbias.
    let partial_size = (width + 1) * CHANNELS;
    let mut partials = vec![T::zero(); blocks.count() * partial_size];
    partials.par_chunks_mut(partial_size).enumerate().for_each(|(index, partial)| {
        simd!(backward_block(inputs, &documents, &blocks.get(index), gradients, partial));
    });
    for d in 0..dim {
        for k in 0..=width {
            let mut total = 0.0;
            for block in 0..batch * blocks.along_tokens {
                let index = block * blocks.along_channels + d / CHANNELS;
                total += partials[index * partial_size + k * CHANNELS + d % CHANNELS].as_f64();
            }
            if k < width {
                gradients.dweight.set([d, k], total);
            } else if let Some(dbias) = &gradients.dbias {
                dbias.set([d], total);
            }
        }
    }
}

#[inline(always)]
fn backward_block<T: Real>(
    inputs: &ConvInputs,
    documents: &Documents,
    block: &Block,
    gradients: &ConvGradients,
    partial: &mut [T],
) {
    let filter = Filter::<T>::new(inputs, documents, block);
    let (b, channel, nchannels) = (block.b, block.channel, block.nchannels);
    let ConvDims { seqlen, width, .. } = inputs.dims;
    let history = width as isize - 1;
    // The first block also owns the sources before token 0.
    let begin = block.tokens.start as isize - if block.tokens.start == 0 { history } else { 0 };
    let end = block.tokens.end as isize;
    // Tokens that reach the block's sources: its own and the width - 1 after them.
    let tokens = block.tokens.start..seqlen.min(block.tokens.end + width - 1);
    let first_source = tokens.start as isize - history;
    let sources = filter.load_sources(block, first_source, tokens.end as isize);
    let mut dpre = vec![T::zero(); tokens.len() * nchannels];
    if let Some(dout) = &gradients.dout {
        let at = [b, channel, tokens.start];
        dout.load_tile(at, (2, tokens.len()), (1, nchannels), &mut dpre);
    }
    let mut dsources = vec![T::zero(); (end - begin) as usize * nchannels];
    let mut pre = vec![T::zero(); nchannels];
    for (row, t) in tokens.clone().enumerate() {
        if filter.is_padding(b, t) {
            continue;
        }
        let first_tap = filter.first_tap(b, t);
        let dpre = &mut dpre[row * nchannels..][..nchannels];
        if inputs.silu {
            filter.convolve(first_tap, &sources, row, &mut pre);
            for (dpre, &pre) in dpre.iter_mut().zip(&pre) {
                *dpre *= pre.silu_grad();
            }
        }
        let own = block.tokens.contains(&t);
        for k in first_tap..width {
            let source = t as isize - history + k as isize;
            if own {
                let dweight = &mut partial[k * CHANNELS..][..nchannels];
                let x = &sources[(row + k) * nchannels..][..nchannels];
                for ((dweight, &dpre), &x) in dweight.iter_mut().zip(dpre.iter()).zip(x) {
                    *dweight += dpre * x;
                }
            }
            if (begin..end).contains(&source) {
                let dsource = &mut dsources[(source - begin) as usize * nchannels..][..nchannels];
                let weight = &filter.weight[k * nchannels..][..nchannels];
                for ((dsource, &dpre), &weight) in dsource.iter_mut().zip(dpre.iter()).zip(weight) {
                    *dsource += dpre * weight;
                }
            }
        }
        if own {
            let dbias = &mut partial[width * CHANNELS..][..nchannels];
            for (dbias, &dpre) in dbias.iter_mut().zip(dpre.iter()) {
                *dbias += dpre;
            }
        }
    }
    if let Some(dfinal) = &gradients.dfinal_states {
        let first = seqlen as isize - history;
        let mut gradient = vec![T::zero(); (width - 1) * nchannels];
        dfinal.load_tile([b, channel, 0], (2, width - 1), (1, nchannels), &mut gradient);
        for source in final_states_begin(&filter, b).max(begin)..end.min(seqlen as isize) {
            let dsource = &mut dsources[(source - begin) as usize * nchannels..][..nchannels];
            let gradient = &gradient[(source - first) as usize * nchannels..][..nchannels];
            for (dsource, &gradient) in dsource.iter_mut().zip(gradient) {
                *dsource += gradient;
            }
        }
    }
    let before = (block.tokens.start as isize - begin) as usize;
    let (past, present) = dsources.split_at(before * nchannels);
    if let (Some(dinitial), true) = (&gradients.dinitial_states, before > 0) {
        dinitial.store_tile([b, channel, 0], (2, before), (1, nchannels), past);
    }
    let at = [b, channel, block.tokens.start];
    gradients.dx.store_tile(at, (2, block.tokens.len()), (1, nchannels), present);
}

/// Convolve what conv_state (batch, dim, state_len) and x hold, and leave the last state_len inputs in conv_state.
pub fn update<T: Real>(inputs: &ConvInputs, conv_state: &View<3>, out: &View<3>) {
    let ConvDims { batch, seqlen, width, .. } = inputs.dims;
    let state_len = conv_state.shape[2];
    let channel_blocks = inputs.dims.dim.div_ceil(CHANNELS);
    let documents = Documents::new(None);
    (0..batch * channel_blocks).into_par_iter().for_each(|index| {
        let channel = index % channel_blocks * CHANNELS;
        let nchannels = CHANNELS.min(inputs.dims.dim - channel);
        let block = Block { b: index / channel_blocks, tokens: 0..seqlen, channel, nchannels };
        let at = [block.b, channel, 0];
        simd!({
            let filter = Filter::<T>::new(inputs, &documents, &block);
            let mut window = vec![T::zero(); (state_len + seqlen) * nchannels];
            let (state, x) = window.split_at_mut(state_len * nchannels);
            conv_state.load_tile(at, (2, state_len), (1, nchannels), state);
            inputs.x.load_tile(at, (2, seqlen), (1, nchannels), x);
            let mut result = vec![T::zero(); seqlen * nchannels];
            for (t, pre) in result.chunks_exact_mut(nchannels).enumerate() {
                filter.convolve(0, &window, state_len + t - (width - 1), pre);
                filter.activate(pre);
            }
            out.store_tile(at, (2, seqlen), (1, nchannels), &result);
            conv_state.store_tile(
                at,
                (2, state_len),
                (1, nchannels),
                &window[seqlen * nchannels..],
            );
        });
    });
}
