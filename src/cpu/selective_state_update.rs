//! state = exp(dt A) state + dt x B;  out = (state . C + D x) silu(z), one task a block of a head's rows.
//!
//! Each row of the state (dstate elements) goes through all tokens of the call before it is stored.

use std::ops::Range;

use rayon::prelude::*;

use crate::cpu::real::{Real, dot};
use crate::cpu::slots::Slots;
use crate::ops::selective_state_update::StateUpdateInputs;
use crate::tensor::View;

/// Rows of the state a task: without heads one state has thousands.
const ROWS: usize = 64;

pub fn update<T: Real>(inputs: &StateUpdateInputs, slots: &Slots) {
    let dims = inputs.dims;
    // Without a token a state is not even rounded.
    if dims.seqlen() == 0 {
        return;
    }
    let blocks = dims.dim.div_ceil(ROWS);
    (0..dims.batch * dims.nheads() * blocks).into_par_iter().for_each(|index| {
        let (bh, begin) = (index / blocks, index % blocks * ROWS);
        let rows = begin..dims.dim.min(begin + ROWS);
        let (b, h) = (bh / dims.nheads(), bh % dims.nheads());
        simd!(update_rows::<T>(inputs, slots.get(b), b, h, rows.clone()));
    });
}

#[inline(always)]
fn update_rows<T: Real>(
    inputs: &StateUpdateInputs,
    slot: Option<usize>,
    b: usize,
    h: usize,
    rows: Range<usize>,
) {
    let dims = inputs.dims;
    let (seqlen, dstate, nrows) = (dims.seqlen(), dims.dstate, rows.len());
    let zeros = |len: usize| vec![T::zero(); len];
    let at = [b, 0, h, rows.start];
    let mut out = zeros(seqlen * nrows);
    let Some(slot) = slot else {
        inputs.out.store_tile(at, (1, seqlen), (3, nrows), &out);
        return;
    };
    let (x, dt) = (tokens(&inputs.x, at, seqlen, nrows), dt::<T>(inputs, at, nrows));
    let group = [b, 0, h / (dims.nheads() / dims.ngroups()), 0];
    let B = tokens::<T>(&inputs.B, group, seqlen, dstate);
    let C = tokens::<T>(&inputs.C, group, seqlen, dstate);
    let (mut A, mut decay, mut state) = (zeros(dstate), zeros(dstate), zeros(dstate));
    for (row, p) in rows.enumerate() {
        // One A for the whole row, as Mamba-2 has: one exponential.
        let one_A = inputs.A.is_expanded(2);
        if one_A {
            A[0] = inputs.A.get([h, p, 0]);
        } else {
            inputs.A.load_line([h, p, 0], 2, &mut A);
        }
        inputs.state.load_line([slot, h, p, 0], 3, &mut state);
        for t in 0..seqlen {
            let (x, dt) = (x[t * nrows + row], dt[t * nrows + row]);
            if one_A {
                decay.fill((dt * A[0]).decay_factor());
            } else {
                for (decay, &A) in decay.iter_mut().zip(&A) {
                    *decay = (dt * A).decay_factor();
                }
            }
            let dtx = dt * x;
            for ((state, &decay), &B) in state.iter_mut().zip(&decay).zip(&B[t * dstate..]) {
                *state = state.decayed(decay, dtx * B);
            }
            out[t * nrows + row] = dot(&state, &C[t * dstate..][..dstate]);
            if let Some(intermediate) = &inputs.intermediate {
                intermediate.store_line([slot, t, h, p, 0], 4, &state);
            }
        }
        inputs.state.store_line([slot, h, p, 0], 3, &state);
    }
    if let Some(view) = &inputs.D {
        let D = parameter::<T>(view, at, nrows);
        for (i, out) in out.iter_mut().enumerate() {
            *out += D[i % nrows] * x[i];
        }
    }
    if let Some(z) = &inputs.z {
        for (out, z) in out.iter_mut().zip(tokens::<T>(z, at, seqlen, nrows)) {
            *out *= z.silu();
        }
    }
    inputs.out.store_tile(at, (1, seqlen), (3, nrows), &out);
}

/// What all tokens of the call have from `at` on along the last axis, a line of `len` each.
#[inline(always)]
fn tokens<T: Real>(view: &View<4>, at: [usize; 4], seqlen: usize, len: usize) -> Vec<T> {
    let mut tile = vec![T::zero(); seqlen * len];
    view.load_tile(at, (1, seqlen), (3, len), &mut tile);
    tile
}

/// The rows of D or dt_bias that tokens have `at`.
#[inline(always)]
fn parameter<T: Real>(view: &View<2>, at: [usize; 4], nrows: usize) -> Vec<T> {
    let mut line = vec![T::zero(); nrows];
    view.load_line([at[2], at[3]], 1, &mut line);
    line
}

#[inline(always)]
fn dt<T: Real>(inputs: &StateUpdateInputs, at: [usize; 4], nrows: usize) -> Vec<T> {
    let mut dt = tokens::<T>(&inputs.dt, at, inputs.dims.seqlen(), nrows);
    if let Some(view) = &inputs.dt_bias {
        let bias = parameter::<T>(view, at, nrows);
        for (i, dt) in dt.iter_mut().enumerate() {
            *dt += bias[i % nrows];
        }
    }
    if inputs.dt_softplus {
        for dt in &mut dt {
            *dt = dt.softplus();
        }
    }
    dt
}
