//! The convolution's decode steps, and the states that decoding packed documents starts from.
//!
//! A task takes one sequence and a block of channels. It works on a *window*: the inputs that conv_state holds, oldest
//! first, then x, a row of channels each. Token t reads the width rows that end with its own; after n tokens conv_state
//! is the state_len rows from n on.
//!
//! A circular conv_state keeps the input at position p at index p mod state_len: after n tokens in all its oldest input
//! lies at n mod state_len, where the next one goes. A shifted one has its oldest always at 0.

use rayon::prelude::*;

use crate::cpu::real::Real;
use crate::cpu::slots::Slots;
use crate::error::{Error, Result};
use crate::ops::causal_conv1d_update::ConvUpdateInputs;
use crate::tensor::View;

const CHANNELS: usize = 64;

/// The first channel of a block and how many it has.
fn channels(dim: usize, block: usize) -> (usize, usize) {
    let channel = block * CHANNELS;
    (channel, CHANNELS.min(dim - channel))
}

/// How many tokens each sequence of a circular conv_state has seen, modulo state_len; 0 for a row of padding.
pub fn positions(cache_seqlens: &View<1>, slots: &Slots, state_len: usize) -> Result<Vec<usize>> {
    let position = |b| {
        let seen = slots.get(b).map_or(0, |_| cache_seqlens.get_int([b]));
        usize::try_from(seen).map(|seen| seen % state_len).map_err(|_| Error::Value {
            arg: "cache_seqlens",
            got: format!("{seen} at row {b}"),
            allowed: "the number of tokens seen before, >= 0".into(),
        })
    };
    (0..cache_seqlens.shape[0]).map(position).collect()
}

/// `positions`: where the oldest input of each sequence lies in a circular conv_state.
pub fn update<T: Real>(inputs: &ConvUpdateInputs, slots: &Slots, positions: Option<&[usize]>) {
    let dims = inputs.dims;
    let blocks = dims.dim.div_ceil(CHANNELS);
    (0..dims.batch * blocks).into_par_iter().for_each(|index| {
        let b = index / blocks;
        let (channel, nchannels) = channels(dims.dim, index % blocks);
        let task = Task {
            inputs,
            b,
            channel,
            nchannels,
            position: positions.map(|positions| positions[b]),
        };
        simd!(task.run::<T>(slots.get(b)));
    });
}

struct Task<'a> {
    inputs: &'a ConvUpdateInputs,
    b: usize,
    channel: usize,
    nchannels: usize,
    position: Option<usize>,
}

impl Task<'_> {
    #[inline(always)]
    fn run<T: Real>(&self, slot: Option<usize>) {
        let Task { inputs, b, channel, nchannels, .. } = *self;
        let (seqlen, state_len) = (inputs.dims.seqlen(), inputs.dims.state_len);
        let at = [b, channel, 0];
        let mut out = vec![T::zero(); seqlen * nchannels];
        let Some(slot) = slot else {
            inputs.out.store_tile(at, (2, seqlen), (1, nchannels), &out);
            return;
        };
        let mut window = vec![T::zero(); (state_len + seqlen) * nchannels];
        let (state, x) = window.split_at_mut(state_len * nchannels);
        for (row, index, len) in self.parts(0) {
            let part = &mut state[row * nchannels..][..len * nchannels];
            inputs.conv_state.load_tile([slot, channel, index], (2, len), (1, nchannels), part);
        }
        inputs.x.load_tile(at, (2, seqlen), (1, nchannels), x);
        self.convolve(&window, &mut out);
        inputs.out.store_tile(at, (2, seqlen), (1, nchannels), &out);
        if let Some(intermediate) = &inputs.intermediate {
            for t in 0..seqlen {
                for (row, index, len) in self.parts(t + 1) {
                    let part = &window[(t + 1 + row) * nchannels..][..len * nchannels];
                    let at = [slot, t, channel, index];
                    intermediate.store_tile(at, (3, len), (2, nchannels), part);
                }
            }
        }
        for (row, index, len) in self.parts(seqlen) {
            let part = &window[(seqlen + row) * nchannels..][..len * nchannels];
            inputs.conv_state.store_tile([slot, channel, index], (2, len), (1, nchannels), part);
        }
    }

    /// How conv_state holds its rows, oldest first, after `tokens` of this call: (first row, its index, how many).
    #[inline(always)]
    fn parts(&self, tokens: usize) -> [(usize, usize, usize); 2] {
        let state_len = self.inputs.dims.state_len;
        let oldest = self.position.map_or(0, |position| (position + tokens) % state_len);
        [(0, oldest, state_len - oldest), (state_len - oldest, 0, oldest)]
    }

    /// In the order of causal_conv1d's forward, so that both give the same bits.
    #[inline(always)]
    fn convolve<T: Real>(&self, window: &[T], out: &mut [T]) {
        let Task { inputs, channel, nchannels, .. } = *self;
        let (width, state_len) = (inputs.dims.width, inputs.dims.state_len);
        let mut weight = vec![T::zero(); width * nchannels];
        inputs.weight.load_tile([channel, 0], (1, width), (0, nchannels), &mut weight);
        let mut bias = vec![T::zero(); nchannels];
        if let Some(view) = &inputs.bias {
            view.load_line([channel], 0, &mut bias);
        }
        for (t, out) in out.chunks_exact_mut(nchannels).enumerate() {
            out.copy_from_slice(&bias);
            let first = state_len + t + 1 - width;
            let sources = window[first * nchannels..].chunks_exact(nchannels);
            for (weight, source) in weight.chunks_exact(nchannels).zip(sources) {
                for ((out, &weight), &source) in out.iter_mut().zip(weight).zip(source) {
                    *out += weight * source;
                }
            }
            if inputs.silu {
                for value in out {
                    *value = value.silu();
                }
            }
        }
    }
}

/// The last inputs of each document of x (total_tokens, dim) to states (ndocs, dim, state_len), newest last.
pub fn varlen_states<T: Real>(x: &View<2>, bounds: &[usize], states: &View<3>) {
    let [ndocs, dim, state_len] = states.shape;
    let blocks = dim.div_ceil(CHANNELS);
    (0..ndocs * blocks).into_par_iter().for_each(|index| {
        let document = index / blocks;
        let (channel, nchannels) = channels(dim, index % blocks);
        let end = bounds[document + 1];
        let len = state_len.min(end - bounds[document]);
        simd!({
            let mut rows = vec![T::zero(); state_len * nchannels];
            let last = &mut rows[(state_len - len) * nchannels..];
            x.load_tile([end - len, channel], (0, len), (1, nchannels), last);
            states.store_tile([document, channel, 0], (2, state_len), (1, nchannels), &rows);
        });
    });
}
