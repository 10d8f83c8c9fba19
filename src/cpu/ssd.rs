//! The chunk scan on the CPU: tiles of 64 tokens, matrix products inside a tile, a state carried between tiles.
//!
//! Per head and tile, with `a = A dt` and `l = cumsum(a)` in f64 (strong decay needs the digits), starting anew with
//! each document so that no bit of one depends on another:
//!
//! ```text
//! L[t, s] = exp(l[t] - l[s])   for t >= s of one document, else 0
//! u[t]    = exp(l[t])          if t's document began before the tile, else 0
//! w[s]    = exp(l[end] - l[s]) if s's document reaches the tile's end, else 0
//! g       = exp(l[end])        if one document spans the tile, else 0
//!
//! Y  = ((C B^T) o L dt) X + u C H^T + D X        out = Y silu(z)
//! H' = g H + X^T (dt w B)                        H, the state, is (headdim, dstate)
//! ```
//!
//! Every exponent but g's, u's and w's own is a difference that A < 0 makes negative: nothing overflows.
//!
//! Backward recomputes the states: one walk forward for H at each tile's start, one in reverse for G, the gradient of
//! the state at each tile's end; then all tiles at once, the heads of a group in order within one task, so that dB and
//! dC are sums in a fixed order. With dY = dout silu(z):
//!
//! ```text
//! dM = dY X^T             dCB = sum_heads dM o L dt        dC = dCB B + sum_heads u dY H
//! I = w B G^T             E = I + (CB o L)^T dY            dB = dCB^T C + sum_heads dt w X G
//! dX = dt E + D dY        dD = sum_t dY X                  G_before = g G + dY^T (u C)
//! K = dM o (CB o L dt)    r = u (C H^T . dY)               q = dt (I . X)
//! da[t] = sum_{t' >= t} (rowsum K - colsum K + r)[t'] + sum_{s < t} q[s] + g <G, H>, sums within t's document
//! ddt = E . X + A da      dA = sum_t dt da
//! ```

use std::ops::Range;

use rayon::prelude::*;

use crate::cpu::documents::Documents;
use crate::cpu::matmul::{Mat, matmul};
use crate::cpu::real::{Real, SOFTPLUS_LINEAR, dot};
use crate::dims::SsdDims;
use crate::ops::ssd::{SsdGradients, SsdInputs};
use crate::tensor::View;

/// Tokens a tile. The caller's chunk_size changes rounding only, so it is not used.
const TILE: usize = 64;

/// What heads and tiles share: discretized dt, decay sums, packed B and C, and CB = C B^T of each tile.
struct Shared<'a, T> {
    inputs: &'a SsdInputs,
    dims: SsdDims,
    ntiles: usize,
    documents: Documents,
    /// (batch, nheads, ntiles, TILE)
    dt: Vec<T>,
    /// (batch, nheads, ntiles, TILE), starting anew with each tile and each document
    l: Vec<f64>,
    /// (batch, ngroups, ntiles, TILE, dstate)
    B: Vec<T>,
    C: Vec<T>,
    /// (batch, ngroups, ntiles, TILE, TILE); a short last tile of n tokens uses the first n x n
    CB: Vec<T>,
}

/// What dt and A make of one tile of one head.
struct Decays<T> {
    /// Tokens in this tile.
    n: usize,
    dt: [T; TILE],
    l: [f64; TILE],
    /// The first token in the tile of each token's document.
    first: [usize; TILE],
    u: [T; TILE],
    w: [T; TILE],
    g: T,
    /// How many tokens belong to the document that began before the tile: beyond, u is 0.
    entered: usize,
    /// The first token of the document that reaches the tile's end: before, w is 0.
    last: usize,
}

impl<T> Decays<T> {
    /// The tile's documents. Products go document by document, so that not even a NaN of one reaches another.
    fn documents(&self) -> impl Iterator<Item = Range<usize>> {
        let starts = |&t: &usize| t == 0 || self.first[t] == t;
        (0..self.n).filter(starts).map(|start| {
            let next = (start + 1..self.n).find(|&t| self.first[t] == t);
            start..next.unwrap_or(self.n)
        })
    }
}

impl<'a, T: Real> Shared<'a, T> {
    fn new(inputs: &'a SsdInputs) -> Self {
        let dims = inputs.dims;
        let SsdDims { batch, seqlen, nheads, ngroups, dstate, .. } = dims;
        let ntiles = seqlen.div_ceil(TILE);
        let documents = Documents::new(inputs.seq_idx.as_ref());
        let mut dt = vec![T::zero(); batch * nheads * ntiles * TILE];
        let mut l = vec![0.0; dt.len()];
        let mut B = vec![T::zero(); batch * ngroups * ntiles * TILE * dstate];
        let mut C = B.clone();
        let mut CB = vec![T::zero(); batch * ngroups * ntiles * TILE * TILE];
        if ntiles > 0 {
            let per_head = dt.par_chunks_mut(ntiles * TILE).zip(l.par_chunks_mut(ntiles * TILE));
            per_head.enumerate().for_each(|(bh, (dt, l))| {
                let (dt, l) = (&mut dt[..seqlen], &mut l[..seqlen]);
                discretize(inputs, &documents, bh / nheads, bh % nheads, dt, l);
            });
        }
        B.par_chunks_mut(TILE * dstate)
            .zip(C.par_chunks_mut(TILE * dstate))
            .zip(CB.par_chunks_mut(TILE * TILE))
            .enumerate()
            .for_each(|(index, ((B, C), CB))| {
                let (bg, tile) = (index / ntiles, index % ntiles);
                let n = TILE.min(seqlen - tile * TILE);
                let at = [bg / ngroups, tile * TILE, bg % ngroups, 0];
                simd!({
                    inputs.B.load_tile(at, (1, n), (3, dstate), B);
                    inputs.C.load_tile(at, (1, n), (3, dstate), C);
                });
                matmul(CB, T::zero(), Mat::new(C, n, dstate), Mat::new(B, n, dstate).t());
            });
        Shared { inputs, dims, ntiles, documents, dt, l, B, C, CB }
    }

    /// Packed B and C (n, dstate) and CB (n, n) of a tile.
    fn group(&self, b: usize, group: usize, tile: usize) -> (&[T], &[T], &[T]) {
        let index = (b * self.dims.ngroups + group) * self.ntiles + tile;
        let rows = index * TILE * self.dims.dstate..(index + 1) * TILE * self.dims.dstate;
        (&self.B[rows.clone()], &self.C[rows], &self.CB[index * TILE * TILE..][..TILE * TILE])
    }

    #[inline(always)]
    fn decays(&self, b: usize, h: usize, tile: usize) -> Decays<T> {
        let begin = tile * TILE;
        let n = TILE.min(self.dims.seqlen - begin);
        let at = ((b * self.dims.nheads + h) * self.ntiles + tile) * TILE;
        let mut decays = Decays {
            n,
            dt: [T::zero(); TILE],
            l: [0.0; TILE],
            first: [0; TILE],
            u: [T::zero(); TILE],
            w: [T::zero(); TILE],
            g: T::zero(),
            entered: 0,
            last: 0,
        };
        decays.dt.copy_from_slice(&self.dt[at..at + TILE]);
        decays.l.copy_from_slice(&self.l[at..at + TILE]);
        // What enters the tile belongs to the document of the token before it; at token 0, to token 0's own.
        let entered = |start: usize| start < begin.max(1);
        let last = self.documents.start(b, begin + n - 1);
        let total = decays.l[n - 1];
        for t in 0..n {
            let start = self.documents.start(b, begin + t);
            decays.first[t] = start.saturating_sub(begin);
            if entered(start) {
                decays.entered = t + 1;
                decays.u[t] = T::from_f64(decays.l[t]).fast_exp();
            }
            if start == last {
                decays.w[t] = T::from_f64(total - decays.l[t]).fast_exp();
            }
        }
        decays.last = last.saturating_sub(begin);
        if entered(last) {
            decays.g = T::from_f64(total).fast_exp();
        }
        decays
    }
}

/// dt with bias, softplus and clamp; l, the sum of A dt within each tile and document.
fn discretize<T: Real>(
    inputs: &SsdInputs,
    documents: &Documents,
    b: usize,
    h: usize,
    dt: &mut [T],
    l: &mut [f64],
) {
    let A: T = inputs.A.get([h]);
    inputs.dt.load_line([b, 0, h], 1, dt);
    let mut sum = 0.0;
    for (t, (dt, l)) in dt.iter_mut().zip(l).enumerate() {
        if t % TILE == 0 || documents.start(b, t) == t {
            sum = 0.0;
        }
        *dt = clamp(inputs, softplus(inputs, with_bias(inputs, h, *dt)));
        sum += A.as_f64() * dt.as_f64();
        *l = sum;
    }
}

fn with_bias<T: Real>(inputs: &SsdInputs, h: usize, dt: T) -> T {
    inputs.dt_bias.map_or(dt, |bias| dt + bias.get([h]))
}

fn softplus<T: Real>(inputs: &SsdInputs, dt: T) -> T {
    if inputs.dt_softplus { dt.softplus() } else { dt }
}

/// Clamp to dt_limit; NaN stays NaN.
fn clamp<T: Real>(inputs: &SsdInputs, dt: T) -> T {
    let (low, high) = (T::from_f64(inputs.dt_limit.0), T::from_f64(inputs.dt_limit.1));
    if dt < low {
        low
    } else if dt > high {
        high
    } else {
        dt
    }
}

/// The derivative of the discretized dt by the raw one.
fn discretize_grad<T: Real>(inputs: &SsdInputs, h: usize, raw: T) -> T {
    let biased = with_bias(inputs, h, raw);
    let dt = softplus(inputs, biased);
    let (low, high) = (T::from_f64(inputs.dt_limit.0), T::from_f64(inputs.dt_limit.1));
    if dt < low || dt > high {
        T::zero()
    } else if inputs.dt_softplus && biased <= T::from_f32(SOFTPLUS_LINEAR) {
        biased.sigmoid()
    } else {
        T::one()
    }
}

/// L (n, n).
#[inline(always)]
fn decay_matrix<T: Real>(decays: &Decays<T>, L: &mut [T]) {
    let n = decays.n;
    for (t, row) in L.chunks_exact_mut(n).take(n).enumerate() {
        row.fill(T::zero());
        let first = decays.first[t];
        for (value, l) in row[first..=t].iter_mut().zip(&decays.l[first..=t]) {
            *value = T::from_f64(decays.l[t] - l).fast_exp();
        }
    }
}

/// rows[t] *= factor[t].
#[inline(always)]
fn scale_rows<T: Real>(rows: &mut [T], cols: usize, factors: &[T]) {
    for (row, &factor) in rows.chunks_exact_mut(cols).zip(factors) {
        for value in row {
            *value *= factor;
        }
    }
}

/// dst[t] = factor[t] * src[t].
#[inline(always)]
fn scaled_rows<T: Real>(dst: &mut [T], src: &[T], cols: usize, factor: impl Fn(usize) -> T) {
    let rows = dst.chunks_exact_mut(cols).zip(src.chunks_exact(cols));
    for (t, (dst, src)) in rows.enumerate() {
        let factor = factor(t);
        for (dst, &src) in dst.iter_mut().zip(src) {
            *dst = factor * src;
        }
    }
}

/// y = u C H^T + M X + D X.
fn scan_output<T: Real>(
    y: &mut [T],
    m: &[T],
    x: &[T],
    C: &[T],
    H: Mat<'_, T>,
    D: Option<&[T]>,
    decays: &Decays<T>,
) {
    let (n, entered) = (decays.n, decays.entered);
    let (headdim, dstate) = (x.len() / n, C.len() / TILE);
    let (inside, outside) = y.split_at_mut(entered * headdim);
    matmul(inside, T::zero(), Mat::new(C, entered, dstate), H.t());
    simd!(scale_rows(inside, headdim, &decays.u));
    outside.fill(T::zero());
    for tokens in decays.documents() {
        let rows = tokens.start * headdim..tokens.end * headdim;
        let X = Mat::new(&x[rows.clone()], tokens.len(), headdim);
        matmul(&mut y[rows], T::one(), Mat::diagonal_block(m, n, tokens), X);
    }
    if let Some(D) = D {
        simd!({
            for (y, x) in y.chunks_exact_mut(headdim).zip(x.chunks_exact(headdim)) {
                for ((y, &x), &D) in y.iter_mut().zip(x).zip(D) {
                    *y += D * x;
                }
            }
        });
    }
}

fn skip_weights<T: Real>(inputs: &SsdInputs, h: usize) -> Option<Vec<T>> {
    inputs.D.map(|D| {
        let mut values = vec![T::zero(); inputs.dims.headdim];
        D.load_line([h, 0], 1, &mut values);
        values
    })
}

/// The state before token 0.
fn first_state<T: Real>(inputs: &SsdInputs, b: usize, h: usize) -> Vec<T> {
    let SsdDims { headdim, dstate, .. } = inputs.dims;
    let mut state = vec![T::zero(); headdim * dstate];
    if let Some(initial) = inputs.initial_states {
        initial.load_tile([b, h, 0, 0], (2, headdim), (3, dstate), &mut state);
    }
    state
}

pub fn forward<T: Real>(inputs: &SsdInputs, out: &View<4>, final_states: Option<&View<4>>) {
    let shared = Shared::<T>::new(inputs);
    let heads = inputs.dims.batch * inputs.dims.nheads;
    (0..heads).into_par_iter().with_max_len(1).for_each(|bh| {
        forward_head(&shared, bh / inputs.dims.nheads, bh % inputs.dims.nheads, out, final_states);
    });
}

/// Walk the tiles of one head, the state in cache.
fn forward_head<T: Real>(
    shared: &Shared<'_, T>,
    b: usize,
    h: usize,
    out: &View<4>,
    final_states: Option<&View<4>>,
) {
    let SsdDims { headdim, dstate, .. } = shared.dims;
    let inputs = shared.inputs;
    let D = skip_weights(inputs, h);
    let mut state = first_state(inputs, b, h);
    let mut x = vec![T::zero(); TILE * headdim];
    let mut y = x.clone();
    let mut z = x.clone();
    let mut m = vec![T::zero(); TILE * TILE];
    for tile in 0..shared.ntiles {
        let (B, C, CB) = shared.group(b, h / shared.dims.heads_per_group(), tile);
        let at = [b, tile * TILE, h, 0];
        let decays = simd!(shared.decays(b, h, tile));
        let n = decays.n;
        let (x, y) = (&mut x[..n * headdim], &mut y[..n * headdim]);
        simd!({
            inputs.x.load_tile(at, (1, n), (3, headdim), x);
            decay_matrix(&decays, &mut m);
            for t in 0..n {
                let row = t * n + decays.first[t]..t * n + t + 1;
                let dt = &decays.dt[decays.first[t]..];
                for ((m, &CB), &dt) in m[row.clone()].iter_mut().zip(&CB[row]).zip(dt) {
                    *m *= CB * dt;
                }
            }
        });
        scan_output(y, &m, x, C, Mat::new(&state, headdim, dstate), D.as_deref(), &decays);
        simd!({
            if let Some(gate) = &inputs.z {
                let z = &mut z[..n * headdim];
                gate.load_tile(at, (1, n), (3, headdim), z);
                for (y, z) in y.iter_mut().zip(z) {
                    *y *= z.silu();
                }
            }
            out.store_tile(at, (1, n), (3, headdim), y);
        });
        carry_state(&mut state, x, B, &decays);
    }
    if let Some(final_states) = final_states {
        final_states.store_tile([b, h, 0, 0], (2, headdim), (3, dstate), &state);
    }
}

/// H = g H + X^T (dt w B); x is overwritten.
fn carry_state<T: Real>(state: &mut [T], x: &mut [T], B: &[T], decays: &Decays<T>) {
    let (n, last) = (decays.n, decays.last);
    let (headdim, dstate) = (x.len() / n, B.len() / TILE);
    let x = &mut x[last * headdim..];
    simd!({
        for (t, row) in x.chunks_exact_mut(headdim).enumerate() {
            for value in row {
                *value *= decays.dt[last + t] * decays.w[last + t];
            }
        }
    });
    let B = Mat::new(&B[last * dstate..], n - last, dstate);
    matmul(state, decays.g, Mat::new(x, n - last, headdim).t(), B);
}

/// dY = dout silu(z) of a tile; zero without dout.
#[inline(always)]
fn load_dy<T: Real>(
    inputs: &SsdInputs,
    gradients: &SsdGradients,
    at: [usize; 4],
    dy: &mut [T],
    z: &mut [T],
) {
    let headdim = inputs.dims.headdim;
    let n = dy.len() / headdim;
    let Some(dout) = &gradients.dout else {
        dy.fill(T::zero());
        return;
    };
    dout.load_tile(at, (1, n), (3, headdim), dy);
    if let Some(gate) = &inputs.z {
        gate.load_tile(at, (1, n), (3, headdim), z);
        for (dy, z) in dy.iter_mut().zip(z) {
            *dy *= z.silu();
        }
    }
}

pub fn backward<T: Real>(inputs: &SsdInputs, gradients: &SsdGradients) {
    let shared = Shared::<T>::new(inputs);
    let SsdDims { batch, nheads, headdim, ngroups, dstate, .. } = inputs.dims;
    let (ntiles, state_size) = (shared.ntiles, headdim * dstate);

    // H at each tile's start and G at each tile's end, (batch, nheads, ntiles, headdim, dstate).
    let mut H = vec![T::zero(); batch * nheads * ntiles * state_size];
    let mut G = H.clone();
    if ntiles > 0 {
        let walk = ntiles * state_size;
        H.par_chunks_mut(walk).zip(G.par_chunks_mut(walk)).enumerate().for_each(|(bh, (H, G))| {
            walk_states(&shared, gradients, bh / nheads, bh % nheads, H, G);
        });
    } else if let Some(dinitial) = &gradients.dinitial_states {
        // Nothing between the initial and the final states.
        let mut state = vec![T::zero(); state_size];
        for bh in 0..batch * nheads {
            let at = [bh / nheads, bh % nheads, 0, 0];
            if let Some(dfinal) = &gradients.dfinal_states {
                dfinal.load_tile(at, (2, headdim), (3, dstate), &mut state);
            }
            dinitial.store_tile(at, (2, headdim), (3, dstate), &state);
        }
    }

    // Sums over tokens leave each task as one partial a head: dA, ddt_bias, dD[headdim].
    let per_head = 2 + headdim;
    let heads = inputs.dims.heads_per_group();
    let mut partials = vec![0.0; batch * ngroups * ntiles * heads * per_head];
    partials.par_chunks_mut(heads * per_head).enumerate().with_max_len(1).for_each(
        |(index, partials)| {
            let (bg, tile) = (index / ntiles, index % ntiles);
            backward_tile(&shared, gradients, &H, &G, bg / ngroups, bg % ngroups, tile, partials);
        },
    );
    for h in 0..nheads {
        let mut total = vec![0.0; per_head];
        for b in 0..batch {
            for tile in 0..ntiles {
                let task = (b * ngroups + h / heads) * ntiles + tile;
                let partial = &partials[(task * heads + h % heads) * per_head..][..per_head];
                for (total, partial) in total.iter_mut().zip(partial) {
                    *total += partial;
                }
            }
        }
        gradients.dA.set([h], total[0]);
        if let Some(ddt_bias) = &gradients.ddt_bias {
            ddt_bias.set([h], total[1]);
        }
        if let Some(dD) = &gradients.dD {
            if dD.is_expanded(1) {
                dD.set([h, 0], total[2..].iter().sum::<f64>());
            } else {
                dD.store_line([h, 0], 1, &total[2..]);
            }
        }
    }
}

/// Fill H and G (ntiles, headdim, dstate) of one head, and write the initial state's gradient.
fn walk_states<T: Real>(
    shared: &Shared<'_, T>,
    gradients: &SsdGradients,
    b: usize,
    h: usize,
    H: &mut [T],
    G: &mut [T],
) {
    let SsdDims { headdim, dstate, .. } = shared.dims;
    let inputs = shared.inputs;
    let group = h / shared.dims.heads_per_group();
    let state_size = headdim * dstate;
    let mut rows = vec![T::zero(); TILE * headdim];
    let mut z = rows.clone();

    let mut state = first_state(inputs, b, h);
    for tile in 0..shared.ntiles {
        H[tile * state_size..][..state_size].copy_from_slice(&state);
        let decays = simd!(shared.decays(b, h, tile));
        let x = &mut rows[..decays.n * headdim];
        let at = [b, tile * TILE, h, 0];
        simd!(inputs.x.load_tile(at, (1, decays.n), (3, headdim), x));
        carry_state(&mut state, x, shared.group(b, group, tile).0, &decays);
    }

    state.fill(T::zero());
    if let Some(dfinal) = &gradients.dfinal_states {
        dfinal.load_tile([b, h, 0, 0], (2, headdim), (3, dstate), &mut state);
    }
    for tile in (0..shared.ntiles).rev() {
        G[tile * state_size..][..state_size].copy_from_slice(&state);
        let decays = simd!(shared.decays(b, h, tile));
        let (n, entered) = (decays.n, decays.entered);
        let dy = &mut rows[..n * headdim];
        simd!({
            load_dy(inputs, gradients, [b, tile * TILE, h, 0], dy, &mut z);
            scale_rows(&mut dy[..entered * headdim], headdim, &decays.u);
        });
        let C = shared.group(b, group, tile).1;
        let dY = Mat::new(dy, entered, headdim);
        matmul(&mut state, decays.g, dY.t(), Mat::new(C, entered, dstate));
    }
    if let Some(dinitial) = &gradients.dinitial_states {
        dinitial.store_tile([b, h, 0, 0], (2, headdim), (3, dstate), &state);
    }
}

/// All gradients of one tile of one group's heads; `partials` is (heads, 2 + headdim).
fn backward_tile<T: Real>(
    shared: &Shared<'_, T>,
    gradients: &SsdGradients,
    H: &[T],
    G: &[T],
    b: usize,
    group: usize,
    tile: usize,
    partials: &mut [f64],
) {
    let SsdDims { seqlen, nheads, headdim, dstate, .. } = shared.dims;
    let inputs = shared.inputs;
    let heads = shared.dims.heads_per_group();
    let n = TILE.min(seqlen - tile * TILE);
    let (B, C, CB) = shared.group(b, group, tile);
    let zeros = |len: usize| vec![T::zero(); len];
    let (mut x, mut dy, mut z) = (zeros(n * headdim), zeros(n * headdim), zeros(n * headdim));
    let (mut rows, mut E) = (zeros(n * headdim), zeros(n * headdim));
    let (mut P, mut dM, mut dCB) = (zeros(n * n), zeros(n * n), zeros(n * n));
    let (mut dB, mut dC, mut uDyH) = (zeros(n * dstate), zeros(n * dstate), zeros(n * dstate));
    let mut line = [T::zero(); TILE];

    for (head, partial) in partials.chunks_exact_mut(2 + headdim).enumerate() {
        let h = group * heads + head;
        let at = [b, tile * TILE, h, 0];
        let state = ((b * nheads + h) * shared.ntiles + tile) * headdim * dstate;
        let (H, G) = (&H[state..][..headdim * dstate], &G[state..][..headdim * dstate]);
        let H_mat = Mat::new(H, headdim, dstate);
        let D = skip_weights::<T>(inputs, h);
        let decays = simd!(shared.decays(b, h, tile));
        simd!({
            inputs.x.load_tile(at, (1, n), (3, headdim), &mut x);
            load_dy(inputs, gradients, at, &mut dy, &mut z);
            decay_matrix(&decays, &mut P);
        });
        let (X, dY) = (Mat::new(&x, n, headdim), Mat::new(&dy, n, headdim));
        matmul(&mut dM, T::zero(), dY, X.t());

        // One sweep turns L into P = CB o L and leaves dCB and the sums of K.
        let mut dl = [0.0; TILE];
        simd!({
            for t in 0..n {
                let row = t * n + decays.first[t]..t * n + t + 1;
                let tokens = decays.first[t]..t + 1;
                let (P, dCB) = (&mut P[row.clone()], &mut dCB[row.clone()]);
                let (dM, CB) = (&dM[row.clone()], &CB[row]);
                let K = &mut line[tokens.clone()];
                let dt = &decays.dt[tokens.clone()];
                let sums = P.iter_mut().zip(dCB).zip(K.iter_mut());
                let factors = dM.iter().zip(CB).zip(dt);
                for (((P, dCB), K), ((&dM, &CB), &dt)) in sums.zip(factors) {
                    let weighted = *P * dt;
                    *dCB += dM * weighted;
                    *P *= CB;
                    *K = dM * (CB * weighted);
                }
                // The diagonal does not depend on the decay.
                let (_, K) = K.split_last().expect("a row holds its own token");
                let mut row_sum = 0.0;
                for (dl, K) in dl[tokens].iter_mut().zip(K) {
                    *dl -= K.as_f64();
                    row_sum += K.as_f64();
                }
                dl[t] += row_sum;
            }
        });

        if let (Some(dz), Some(_)) = (&gradients.dz, &inputs.z) {
            let (y, M) = (&mut rows, &mut dM);
            simd!({
                for (t, (M, P)) in M.chunks_exact_mut(n).zip(P.chunks_exact(n)).enumerate() {
                    M.fill(T::zero());
                    let tokens = decays.first[t]..t + 1;
                    let factors = P[tokens.clone()].iter().zip(&decays.dt[tokens.clone()]);
                    for (M, (&P, &dt)) in M[tokens].iter_mut().zip(factors) {
                        *M = P * dt;
                    }
                }
            });
            scan_output(y, M, &x, C, H_mat, D.as_deref(), &decays);
            simd!({
                let dout = &mut E;
                match &gradients.dout {
                    Some(view) => view.load_tile(at, (1, n), (3, headdim), dout),
                    None => dout.fill(T::zero()),
                }
                for ((y, &dout), z) in y.iter_mut().zip(dout.iter()).zip(&z) {
                    *y = *y * dout * z.silu_grad();
                }
                dz.store_tile(at, (1, n), (3, headdim), y);
            });
        }

        // dC, and r: what l gives through the entering state.
        let (entered, last) = (decays.entered, decays.last);
        simd!(scaled_rows(&mut rows, &dy, headdim, |t| decays.u[t]));
        matmul(&mut uDyH, T::zero(), Mat::new(&rows, entered, headdim), H_mat);
        simd!({
            let tokens = uDyH.chunks_exact(dstate).zip(C.chunks_exact(dstate)).take(entered);
            for (dl, (uDyH, C)) in dl.iter_mut().zip(tokens) {
                *dl += dot(uDyH, C).as_f64();
            }
            for (dC, &uDyH) in dC.iter_mut().zip(&uDyH[..entered * dstate]) {
                *dC += uDyH;
            }
            scaled_rows(&mut rows, &x, headdim, |t| decays.dt[t] * decays.w[t]);
        });
        let G_mat = Mat::new(G, headdim, dstate);
        let leaving = Mat::new(&rows[last * headdim..], n - last, headdim);
        matmul(&mut dB[last * dstate..], T::one(), leaving, G_mat);

        let mut q = [0.0; TILE];
        let (before, leaving) = E.split_at_mut(last * headdim);
        before.fill(T::zero());
        let B_leaving = Mat::new(&B[last * dstate..], n - last, dstate);
        matmul(leaving, T::zero(), B_leaving, G_mat.t());
        simd!({
            scale_rows(leaving, headdim, &decays.w[last..]);
            let rows = leaving.chunks_exact(headdim).zip(x[last * headdim..].chunks_exact(headdim));
            for (t, (I, x)) in (last..).zip(rows) {
                q[t] = (decays.dt[t] * dot(I, x)).as_f64();
            }
        });
        for tokens in decays.documents() {
            let rows = tokens.start * headdim..tokens.end * headdim;
            let dY = Mat::new(&dy[rows.clone()], tokens.len(), headdim);
            matmul(&mut E[rows], T::one(), Mat::diagonal_block(&P, n, tokens).t(), dY);
        }

        // da from what each l[t] gave: l[t] sums a from its document's start (or the tile's) up to t; w and g also hold
        // the sum over all of the last document.
        let mut da = [0.0; TILE];
        let mut suffix = 0.0;
        for t in (0..n).rev() {
            suffix += dl[t];
            da[t] = suffix;
            if decays.first[t] == t {
                suffix = 0.0;
            }
        }
        let mut prefix = 0.0;
        if decays.g != T::zero() {
            prefix = (decays.g * simd!(dot(G, H))).as_f64();
        }
        for t in 0..n {
            if t > 0 && decays.first[t] == t {
                prefix = 0.0;
            }
            da[t] += prefix;
            prefix += q[t];
        }

        let A: T = inputs.A.get([h]);
        let mut raw = [T::zero(); TILE];
        inputs.dt.load_line([b, tile * TILE, h], 1, &mut raw[..n]);
        let (dA, rest) = partial.split_first_mut().expect("partials hold dA");
        let (ddt_bias, dD) = rest.split_first_mut().expect("partials hold ddt_bias");
        simd!({
            for (t, E) in E.chunks_exact_mut(headdim).enumerate() {
                let tokens = t * headdim..(t + 1) * headdim;
                let (x, dy) = (&x[tokens.clone()], &dy[tokens]);
                let ddt = dot(E, x).as_f64() + A.as_f64() * da[t];
                let ddt = ddt * discretize_grad(inputs, h, raw[t]).as_f64();
                line[t] = T::from_f64(ddt);
                *dA += decays.dt[t].as_f64() * da[t];
                *ddt_bias += ddt;
                for value in E.iter_mut() {
                    *value *= decays.dt[t];
                }
                if let Some(D) = &D {
                    for (i, value) in E.iter_mut().enumerate() {
                        *value += D[i] * dy[i];
                        dD[i] += (dy[i] * x[i]).as_f64();
                    }
                }
            }
            gradients.dx.store_tile(at, (1, n), (3, headdim), &E);
        });
        gradients.ddt.store_line([b, tile * TILE, h], 1, &line[..n]);
    }

    let decays = shared.decays(b, group * heads, tile);
    for tokens in decays.documents() {
        let rows = tokens.start * dstate..tokens.end * dstate;
        let (B, C) = (&B[rows.clone()], &C[rows.clone()]);
        let dCB = Mat::diagonal_block(&dCB, n, tokens.clone());
        matmul(&mut dC[rows.clone()], T::one(), dCB, Mat::new(B, tokens.len(), dstate));
        matmul(&mut dB[rows], T::one(), dCB.t(), Mat::new(C, tokens.len(), dstate));
    }
    let at = [b, tile * TILE, group, 0];
    gradients.dB.store_tile(at, (1, n), (3, dstate), &dB);
    gradients.dC.store_tile(at, (1, n), (3, dstate), &dC);
}
