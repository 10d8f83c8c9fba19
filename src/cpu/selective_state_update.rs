//! state = exp(dt A) state + dt x B;  out = (state . C + D x) silu(z), one task a head.

use rayon::prelude::*;

use crate::cpu::real::Real;
use crate::dims::StateUpdateDims;
use crate::ops::selective_state_update::StateUpdateInputs;

pub fn step<T: Real>(inputs: &StateUpdateInputs) {
    let StateUpdateDims { batch, nheads, .. } = inputs.dims;
    (0..batch * nheads)
        .into_par_iter()
        .for_each(|bh| simd!(step_head::<T>(inputs, bh / nheads, bh % nheads)));
}

#[inline(always)]
fn step_head<T: Real>(inputs: &StateUpdateInputs, b: usize, h: usize) {
    let StateUpdateDims { nheads, dim, ngroups, dstate, .. } = inputs.dims;
    let group = h / (nheads / ngroups);
    let zeros = |len: usize| vec![T::zero(); len];
    let (mut B, mut C, mut state) = (zeros(dstate), zeros(dstate), zeros(dstate));
    let mut decay = zeros(dstate);
    let mut out = zeros(dim);
    inputs.B.load_line([b, group, 0], 2, &mut B);
    inputs.C.load_line([b, group, 0], 2, &mut C);
    for (p, out) in out.iter_mut().enumerate() {
        let x: T = inputs.x.get([b, h, p]);
        let mut dt: T = inputs.dt.get([b, h, p]);
        if let Some(bias) = &inputs.dt_bias {
            dt += bias.get([h, p]);
        }
        if inputs.dt_softplus {
            dt = dt.softplus();
        }
        if inputs.A.is_expanded(2) {
            // One A for the whole row, as Mamba-2 has: one exponential.
            let A: T = inputs.A.get([h, p, 0]);
            decay.fill((dt * A).exp());
        } else {
            inputs.A.load_line([h, p, 0], 2, &mut decay);
            for decay in &mut decay {
                *decay = (dt * *decay).fast_exp();
            }
        }
        inputs.state.load_line([b, h, p, 0], 3, &mut state);
        let dtx = dt * x;
        let mut sum = T::zero();
        for n in 0..dstate {
            state[n] = decay[n] * state[n] + dtx * B[n];
            sum += state[n] * C[n];
        }
        inputs.state.store_line([b, h, p, 0], 3, &state);
        if let Some(D) = &inputs.D {
            sum += D.get::<T>([h, p]) * x;
        }
        if let Some(z) = &inputs.z {
            sum *= z.get::<T>([b, h, p]).silu();
        }
        *out = sum;
    }
    inputs.out.store_line([b, h, 0], 2, &out);
}
