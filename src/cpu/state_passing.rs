//! state[c + 1] = exp(decay[c]) state[c] + states[c], per head; forward gives state[c] before each chunk and the last.
//!
//! Backward, with G the gradient of the state after chunk c, from the last chunk to the first:
//! dstates[c] = G, ddecay[c] = exp(decay[c]) <G, state[c]>, G = exp(decay[c]) G + dstates_before[c].

use rayon::prelude::*;

use crate::cpu::real::Real;
use crate::dims::StatePassingDims;
use crate::ops::state_passing::Gradients;
use crate::tensor::View;

/// Run `task(b, h)` for every head, in parallel.
fn for_each_head(dims: &StatePassingDims, task: impl Fn(usize, usize) + Sync) {
    (0..dims.batch * dims.nheads)
        .into_par_iter()
        .for_each(|bh| task(bh / dims.nheads, bh % dims.nheads));
}

pub fn forward<T: Real>(
    dims: &StatePassingDims,
    states: &View<5>,
    decay: &View<3>,
    initial_states: Option<&View<4>>,
    states_before: &View<5>,
    final_states: &View<4>,
) {
    let (headdim, dstate) = (dims.headdim, dims.dstate);
    for_each_head(dims, |b, h| {
        let mut state = vec![T::zero(); headdim * dstate];
        let mut added = state.clone();
        simd!({
            if let Some(initial) = initial_states {
                initial.load_tile([b, h, 0, 0], (2, headdim), (3, dstate), &mut state);
            }
            for c in 0..dims.nchunks {
                let at = [b, c, h, 0, 0];
                states_before.store_tile(at, (3, headdim), (4, dstate), &state);
                states.load_tile(at, (3, headdim), (4, dstate), &mut added);
                let factor = decay.get::<T>([b, c, h]).exp();
                for (state, &added) in state.iter_mut().zip(&added) {
                    *state = factor * *state + added;
                }
            }
            final_states.store_tile([b, h, 0, 0], (2, headdim), (3, dstate), &state);
        });
    });
}

/// `states_before` as forward stored it, `initial_states` for what it was before the first chunk, unrounded.
pub fn backward<T: Real>(
    dims: &StatePassingDims,
    states_before: &View<5>,
    decay: &View<3>,
    initial_states: Option<&View<4>>,
    gradients: &Gradients,
) {
    let (headdim, dstate) = (dims.headdim, dims.dstate);
    for_each_head(dims, |b, h| {
        let mut G = vec![T::zero(); headdim * dstate];
        let mut other = G.clone();
        simd!({
            if let Some(dfinal) = &gradients.dfinal_states {
                dfinal.load_tile([b, h, 0, 0], (2, headdim), (3, dstate), &mut G);
            }
            for c in (0..dims.nchunks).rev() {
                let at = [b, c, h, 0, 0];
                gradients.dstates.store_tile(at, (3, headdim), (4, dstate), &G);
                match initial_states {
                    Some(initial) if c == 0 => {
                        initial.load_tile([b, h, 0, 0], (2, headdim), (3, dstate), &mut other);
                    }
                    _ => states_before.load_tile(at, (3, headdim), (4, dstate), &mut other),
                }
                let factor = decay.get::<T>([b, c, h]).exp();
                let product =
                    G.iter().zip(&other).fold(0.0, |sum, (&g, &h)| sum + (g * h).as_f64());
                gradients.ddecay.set([b, c, h], factor.as_f64() * product);
                other.fill(T::zero());
                if let Some(dbefore) = &gradients.dstates_before {
                    dbefore.load_tile(at, (3, headdim), (4, dstate), &mut other);
                }
                for (g, &added) in G.iter_mut().zip(&other) {
                    *g = factor * *g + added;
                }
            }
            if let Some(dinitial) = &gradients.dinitial_states {
                dinitial.store_tile([b, h, 0, 0], (2, headdim), (3, dstate), &G);
            }
        });
    });
}
