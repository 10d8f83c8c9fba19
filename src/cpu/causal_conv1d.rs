//! Causal depthwise convolution: pre[t] = bias + sum_k weight[k] source[t - (width - 1) + k], out = silu(pre).
//!
//! The *sources* of a tile are the width - 1 inputs before it and its own: before a run's first token lie its initial
//! state or zeros. A token with a negative id gives 0.
//!
//! A task takes tiles of tokens and a block of channels: channel by channel, a line of tokens each, where tokens are
//! neighbours in x's memory, else as a matrix of rows (tokens) of channels. Backward's tiles own their tokens as sources
//! (a run's first tile also the initial state) and recompute dpre for the width - 1 tokens after them; dweight and dbias
//! are one partial a task, added in order.

use rayon::prelude::*;

use crate::cpu::documents::{Documents, Entry, Tile, Tiles};
use crate::cpu::real::{Real, dot, sum};
use crate::dims::{ConvDims, MAX_WIDTH};
use crate::error::Result;
use crate::ops::causal_conv1d::{ConvGradients, ConvInputs};
use crate::tensor::View;

/// Tokens a tile, more than width - 1 by far.
const TOKENS: usize = 128;
/// Channels a task.
const CHANNELS: usize = 64;
/// Tokens of a backward task, at least: what one partial of dweight serves.
const PARTIAL: usize = 512;

/// Parameters of a block of channels: weights as (width, nchannels), bias.
struct Filter<'a, T> {
    inputs: &'a ConvInputs,
    width: usize,
    channel: usize,
    nchannels: usize,
    weight: Vec<T>,
    bias: Vec<T>,
}

impl<'a, T: Real> Filter<'a, T> {
    #[inline(always)]
    fn new(inputs: &'a ConvInputs, channel: usize) -> Self {
        let ConvDims { dim, width, .. } = inputs.dims;
        let nchannels = CHANNELS.min(dim - channel);
        let mut weight = vec![T::zero(); width * nchannels];
        inputs.weight.load_tile([channel, 0], (1, width), (0, nchannels), &mut weight);
        let mut bias = vec![T::zero(); nchannels];
        if let Some(view) = &inputs.bias {
            view.load_line([channel], 0, &mut bias);
        }
        Filter { inputs, width, channel, nchannels, weight, bias }
    }

    /// The sources of a tile and of the `ahead` tokens after it, a row each.
    #[inline(always)]
    fn load_sources(&self, tile: &Tile, ahead: usize, sources: &mut Vec<T>) {
        let (nchannels, history) = (self.nchannels, self.width - 1);
        sources.clear();
        sources.resize((history + tile.len + ahead) * nchannels, T::zero());
        let (past, present) = sources.split_at_mut(history * nchannels);
        let x = |begin: usize, rows: usize, dst: &mut [T]| {
            self.inputs.x.load_tile([tile.b, self.channel, begin], (2, rows), (1, nchannels), dst);
        };
        match (tile.entry, &self.inputs.initial_states) {
            (Entry::Carried, _) => x(tile.begin - history, history, past),
            (Entry::Initial(row), Some(initial)) => {
                initial.load_tile([row, self.channel, 0], (2, history), (1, nchannels), past);
            }
            _ => {}
        }
        x(tile.begin, tile.len + ahead, present);
    }

    /// The sources of one channel of a tile and of the `ahead` tokens after it.
    #[inline(always)]
    fn load_line(&self, tile: &Tile, channel: usize, ahead: usize, sources: &mut Vec<T>) {
        let history = self.width - 1;
        let x = &self.inputs.x;
        sources.clear();
        sources.resize(history + tile.len + ahead, T::zero());
        let (past, present) = sources.split_at_mut(history);
        match (tile.entry, &self.inputs.initial_states) {
            (Entry::Carried, _) => x.load_line([tile.b, channel, tile.begin - history], 2, past),
            (Entry::Initial(row), Some(initial)) => initial.load_line([row, channel, 0], 2, past),
            _ => {}
        }
        x.load_line([tile.b, channel, tile.begin], 2, present);
    }

    /// pre of a line of tokens of channel `c` of the block, in the order of additions of `convolve`.
    #[inline(always)]
    fn convolve_line(&self, c: usize, sources: &[T], pre: &mut [T]) {
        pre.fill(self.bias[c]);
        for (k, weight) in self.weight.iter().skip(c).step_by(self.nchannels).enumerate() {
            for (pre, &source) in pre.iter_mut().zip(&sources[k..]) {
                *pre += *weight * source;
            }
        }
    }

    /// pre of the token whose first source is row `row` of `sources`.
    #[inline(always)]
    fn convolve(&self, sources: &[T], row: usize, pre: &mut [T]) {
        pre.copy_from_slice(&self.bias);
        let taps = self.weight.chunks_exact(self.nchannels);
        for (weight, source) in
            taps.zip(sources[row * self.nchannels..].chunks_exact(self.nchannels))
        {
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

/// Copy a state (dim, width - 1) of `src`, or zeros, to row `row` of `dst`.
fn copy_state<T: Real>(dims: &ConvDims, src: Option<(&View<3>, usize)>, dst: &View<3>, row: usize) {
    let (dim, history) = (dims.dim, dims.width - 1);
    let mut state = vec![T::zero(); dim * history];
    if let Some((view, row)) = src {
        view.load_tile([row, 0, 0], (1, dim), (2, history), &mut state);
    }
    dst.store_tile([row, 0, 0], (1, dim), (2, history), &state);
}

fn documents(inputs: &ConvInputs) -> Result<Documents> {
    let ConvDims { batch, seqlen, .. } = inputs.dims;
    let initial_rows = inputs.initial_states.map(|states| states.shape[0]);
    Documents::new(batch, seqlen, inputs.seq_idx.as_ref(), inputs.cu_seqlens.as_ref(), initial_rows)
}

pub fn forward<T: Real>(
    inputs: &ConvInputs,
    out: &View<3>,
    final_states: Option<&View<3>>,
) -> Result<()> {
    let documents = documents(inputs)?;
    let tiles = documents.tiles(TOKENS);
    let channel_blocks = inputs.dims.dim.div_ceil(CHANNELS);
    (0..tiles.tiles.len() * channel_blocks).into_par_iter().for_each(|index| {
        let (tile, channel) =
            (&tiles.tiles[index / channel_blocks], index % channel_blocks * CHANNELS);
        simd!({
            let filter = Filter::<T>::new(inputs, channel);
            if inputs.x.is_dense(2) {
                forward_lines(&filter, tile, out, final_states);
            } else {
                forward_rows(&filter, tile, out, final_states);
            }
        });
    });
    if let Some(final_states) = final_states {
        for &(document, entry) in documents.empty() {
            let initial = match entry {
                Entry::Initial(row) => inputs.initial_states.as_ref().map(|states| (states, row)),
                _ => None,
            };
            copy_state::<T>(&inputs.dims, initial, final_states, document);
        }
    }
    Ok(())
}

#[inline(always)]
fn forward_lines<T: Real>(
    filter: &Filter<'_, T>,
    tile: &Tile,
    out: &View<3>,
    final_states: Option<&View<3>>,
) {
    let (mut sources, mut pre) = (Vec::new(), vec![T::zero(); tile.len]);
    for c in 0..filter.nchannels {
        let channel = filter.channel + c;
        filter.load_line(tile, channel, 0, &mut sources);
        if !tile.negative_id {
            filter.convolve_line(c, &sources, &mut pre);
            filter.activate(&mut pre);
        }
        out.store_line([tile.b, channel, tile.begin], 2, &pre);
        if let (Some(final_states), Some(document)) = (final_states, tile.ends) {
            final_states.store_line([document, channel, 0], 2, &sources[tile.len..]);
        }
    }
}

#[inline(always)]
fn forward_rows<T: Real>(
    filter: &Filter<'_, T>,
    tile: &Tile,
    out: &View<3>,
    final_states: Option<&View<3>>,
) {
    let (channel, nchannels) = (filter.channel, filter.nchannels);
    let history = filter.width - 1;
    let mut sources = Vec::new();
    filter.load_sources(tile, 0, &mut sources);
    let mut result = vec![T::zero(); tile.len * nchannels];
    if !tile.negative_id {
        for (row, pre) in result.chunks_exact_mut(nchannels).enumerate() {
            filter.convolve(&sources, row, pre);
            filter.activate(pre);
        }
    }
    out.store_tile([tile.b, channel, tile.begin], (2, tile.len), (1, nchannels), &result);
    if let (Some(final_states), Some(document)) = (final_states, tile.ends) {
        let last = &sources[tile.len * nchannels..];
        final_states.store_tile([document, channel, 0], (2, history), (1, nchannels), last);
    }
}

pub fn backward<T: Real>(inputs: &ConvInputs, gradients: &ConvGradients) -> Result<()> {
    let ConvDims { dim, width, .. } = inputs.dims;
    let documents = documents(inputs)?;
    let tiles = documents.tiles(TOKENS);
    let groups = tiles.groups(PARTIAL);
    let channel_blocks = dim.div_ceil(CHANNELS);
    // Of each task (width + 1, CHANNELS): dweight, then dbias.
    let partial_size = (width + 1) * CHANNELS;
    let mut partials = vec![T::zero(); groups.len() * channel_blocks * partial_size];
    partials.par_chunks_mut(partial_size).enumerate().for_each(|(index, partial)| {
        let (group, channel) = (&groups[index / channel_blocks], index % channel_blocks * CHANNELS);
        simd!({
            let filter = Filter::new(inputs, channel);
            let mut buffers = Buffers::default();
            for tile in group.clone() {
                let reach = Reach::new(&tiles, tile, width - 1);
                if inputs.x.is_dense(2) {
                    backward_lines(&filter, &reach, gradients, &mut buffers, partial);
                } else {
                    backward_rows(&filter, &reach, gradients, &mut buffers, partial);
                }
            }
        });
    });
    for d in 0..dim {
        for k in 0..=width {
            let mut total = 0.0;
            for group in 0..groups.len() {
                let index = group * channel_blocks + d / CHANNELS;
                total += partials[index * partial_size + k * CHANNELS + d % CHANNELS].as_f64();
            }
            if k < width {
                gradients.dweight.set([d, k], total);
            } else if let Some(dbias) = &gradients.dbias {
                dbias.set([d], total);
            }
        }
    }
    if let Some(dinitial) = &gradients.dinitial_states {
        for &(document, entry) in documents.empty() {
            if let Entry::Initial(row) = entry {
                let dfinal = gradients.dfinal_states.as_ref().map(|states| (states, document));
                copy_state::<T>(&inputs.dims, dfinal, dinitial, row);
            }
        }
    }
    Ok(())
}

/// What a task's tiles use one after another.
#[derive(Default)]
struct Buffers<T> {
    sources: Vec<T>,
    dsources: Vec<T>,
    dpre: Vec<T>,
    pre: Vec<T>,
}

/// A tile and the tokens that reach its sources.
struct Reach<'a> {
    tile: &'a Tile,
    /// How many tokens after the tile reach its sources.
    ahead: usize,
    /// The document that ends with the last of those tokens.
    ends: Option<usize>,
}

impl<'a> Reach<'a> {
    fn new(tiles: &'a Tiles, index: usize, history: usize) -> Self {
        let tile = &tiles.tiles[index];
        let next = tile.goes_on.then(|| &tiles.tiles[index + 1]);
        let ahead = next.map_or(0, |next| next.len.min(history));
        let ends = next.map_or(tile.ends, |next| next.ends.filter(|_| next.len == ahead));
        Reach { tile, ahead, ends }
    }
}

#[inline(always)]
fn backward_lines<T: Real>(
    filter: &Filter<'_, T>,
    reach: &Reach,
    gradients: &ConvGradients,
    buffers: &mut Buffers<T>,
    partial: &mut [T],
) {
    let Reach { tile, ahead, ends } = *reach;
    let (width, history, tokens) = (filter.width, filter.width - 1, tile.len + ahead);
    let Buffers { sources, dsources, dpre, pre } = buffers;
    pre.resize(tokens, T::zero());
    for c in 0..filter.nchannels {
        let channel = filter.channel + c;
        filter.load_line(tile, channel, ahead, sources);
        dsources.clear();
        dsources.resize(sources.len(), T::zero());
        if let (Some(dout), false) = (&gradients.dout, tile.negative_id) {
            dpre.resize(tokens, T::zero());
            dout.load_line([tile.b, channel, tile.begin], 2, dpre);
            if filter.inputs.silu {
                filter.convolve_line(c, sources, pre);
                for (dpre, pre) in dpre.iter_mut().zip(pre.iter()) {
                    *dpre *= pre.silu_grad();
                }
            }
            let own = &dpre[..tile.len];
            // The last tap first: additions to a source then go from earlier tokens to later ones, as by rows.
            for k in (0..width).rev() {
                let weight = filter.weight[k * filter.nchannels + c];
                for (dsource, &dpre) in dsources[k..].iter_mut().zip(dpre.iter()) {
                    *dsource += dpre * weight;
                }
                partial[k * CHANNELS + c] += dot(own, &sources[k..][..tile.len]);
            }
            partial[width * CHANNELS + c] += T::from_f64(sum(own));
        }
        if let (Some(dfinal), Some(document)) = (&gradients.dfinal_states, ends) {
            let mut gradient = [T::zero(); MAX_WIDTH];
            let gradient = &mut gradient[..history];
            dfinal.load_line([document, channel, 0], 2, gradient);
            for (dsource, &gradient) in dsources[tokens..].iter_mut().zip(gradient.iter()) {
                *dsource += gradient;
            }
        }
        if let (Some(dinitial), Entry::Initial(row)) = (&gradients.dinitial_states, tile.entry) {
            dinitial.store_line([row, channel, 0], 2, &dsources[..history]);
        }
        let own = &dsources[history..][..tile.len];
        gradients.dx.store_line([tile.b, channel, tile.begin], 2, own);
    }
}

#[inline(always)]
fn backward_rows<T: Real>(
    filter: &Filter<'_, T>,
    reach: &Reach,
    gradients: &ConvGradients,
    buffers: &mut Buffers<T>,
    partial: &mut [T],
) {
    let Reach { tile, ahead, ends } = *reach;
    let (channel, nchannels) = (filter.channel, filter.nchannels);
    let (history, tokens) = (filter.width - 1, tile.len + ahead);
    let Buffers { sources, dsources, dpre, pre } = buffers;
    filter.load_sources(tile, ahead, sources);
    dsources.clear();
    dsources.resize(sources.len(), T::zero());
    if let (Some(dout), false) = (&gradients.dout, tile.negative_id) {
        dpre.resize(tokens * nchannels, T::zero());
        pre.resize(nchannels, T::zero());
        dout.load_tile([tile.b, channel, tile.begin], (2, tokens), (1, nchannels), dpre);
        for (row, dpre) in dpre.chunks_exact_mut(nchannels).take(tokens).enumerate() {
            if filter.inputs.silu {
                filter.convolve(sources, row, pre);
                for (dpre, &pre) in dpre.iter_mut().zip(pre.iter()) {
                    *dpre *= pre.silu_grad();
                }
            }
            let weights = filter.weight.chunks_exact(nchannels);
            let rows = dsources[row * nchannels..].chunks_exact_mut(nchannels);
            for (dsource, weight) in rows.zip(weights) {
                for ((dsource, &dpre), &weight) in dsource.iter_mut().zip(dpre.iter()).zip(weight) {
                    *dsource += dpre * weight;
                }
            }
            if row < tile.len {
                let (dweight, dbias) = partial.split_at_mut(filter.width * CHANNELS);
                let rows = sources[row * nchannels..].chunks_exact(nchannels);
                for (dweight, x) in dweight.chunks_exact_mut(CHANNELS).zip(rows) {
                    for ((dweight, &dpre), &x) in dweight.iter_mut().zip(dpre.iter()).zip(x) {
                        *dweight += dpre * x;
                    }
                }
                for (dbias, &dpre) in dbias.iter_mut().zip(dpre.iter()) {
                    *dbias += dpre;
                }
            }
        }
    }
    if let (Some(dfinal), Some(document)) = (&gradients.dfinal_states, ends) {
        dpre.resize(dpre.len().max(history * nchannels), T::zero());
        let gradient = &mut dpre[..history * nchannels];
        dfinal.load_tile([document, channel, 0], (2, history), (1, nchannels), gradient);
        for (dsource, &gradient) in dsources[tokens * nchannels..].iter_mut().zip(gradient.iter()) {
            *dsource += gradient;
        }
    }
    let (past, present) = dsources.split_at(history * nchannels);
    if let (Some(dinitial), Entry::Initial(row)) = (&gradients.dinitial_states, tile.entry) {
        dinitial.store_tile([row, channel, 0], (2, history), (1, nchannels), past);
    }
    let at = [tile.b, channel, tile.begin];
    gradients.dx.store_tile(at, (2, tile.len), (1, nchannels), present);
}
