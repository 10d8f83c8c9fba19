//! The chunk scan on the CPU: tiles of up to 64 tokens, matrix products inside a tile, a state carried between tiles.
//! No tile crosses from one document into the next, so a document gives the same bits alone or packed with others.
//!
//! Per head and tile, with `a = A dt` and `l = cumsum(a)` within the tile in f64 (strong decay needs the digits):
//!
//! ```text
//! L[t, s] = exp(l[t] - l[s]) for t >= s, else 0
//! u[t]    = exp(l[t])           w[s] = exp(l[end] - l[s])           g = exp(l[end])
//!
//! Y  = ((C B^T) o L dt) X + u C H^T + D X        out = Y silu(z)
//! H' = g H + X^T (dt w B)                        H, the state, is (headdim, dstate)
//! ```
//!
//! Every exponent but g's, u's and w's own is a difference that A < 0 makes negative: nothing overflows.
//!
//! Backward recomputes the states: one walk forward for H at each tile's start, one in reverse for G, the gradient of
//! the state at each tile's end, kept where a document goes on from one tile to the next; then all tiles at once, the
//! heads of a group in order within one task, so that dB and dC are sums in a fixed order. With dY = dout silu(z):
//!
//! ```text
//! dM = dY X^T             dCB = sum_heads dM o L dt        dC = dCB B + sum_heads u dY H
//! I = w B G^T             E = I + (CB o L)^T dY            dB = dCB^T C + sum_heads dt w X G
//! dX = dt E + D dY        dD = sum_t dY X                  G_before = g G + dY^T (u C)
//! K = dM o (CB o L dt)    r = u (C H^T . dY)               q = dt (I . X)
//! da[t] = sum_{t' >= t} (rowsum K - colsum K + r)[t'] + sum_{s < t} q[s] + g <G, H>
//! ddt = E . X + A da      dA = sum_t dt da
//! ```

use rayon::prelude::*;

use crate::cpu::documents::{Documents, Entry, Tile, Tiles};
use crate::cpu::matmul::{Mat, matmul};
use crate::cpu::real::{Real, dot, sum};
use crate::dims::SsdDims;
use crate::error::Result;
use crate::ops::ssd::{Packing, SsdGradients, SsdInputs, SsdStates};
use crate::tensor::{Along, View};

/// Tokens a tile, in backward and at most. The caller's chunk_size changes rounding only, so it is not used.
const TILE: usize = 64;
/// Tokens a tile in forward, which keeps no states at its tiles' boundaries: the work within a tile is halved.
const FORWARD_TILE: usize = 32;

/// What heads and tiles share: discretized dt, decay sums, packed B and C, and CB = C B^T of each tile.
struct Shared<'a, T> {
    inputs: &'a SsdInputs,
    /// The caller's, but seqlen ends with the last document.
    dims: SsdDims,
    documents: Documents,
    tiles: Tiles,
    /// (batch, nheads, seqlen)
    dt: Vec<T>,
    /// (batch, nheads, seqlen), starting anew with each tile
    l: Vec<f64>,
    /// (batch, ngroups, seqlen, dstate)
    B: Vec<T>,
    C: Vec<T>,
    /// (batch, ngroups, seqlen, tile_size): of a tile of n tokens the first n x n
    CB: Vec<T>,
    tile_size: usize,
}

/// What dt and A make of one tile of one head.
struct Decays<'a, T> {
    dt: &'a [T],
    l: &'a [f64],
    u: [T; TILE],
    w: [T; TILE],
    g: T,
}

/// Split into consecutive parts of these lengths.
fn split_lengths<T>(mut all: &mut [T], lengths: impl Iterator<Item = usize>) -> Vec<&mut [T]> {
    lengths.map(|length| all.split_off_mut(..length).expect("parts as long as the whole")).collect()
}

impl<'a, T: Real> Shared<'a, T> {
    fn new(inputs: &'a SsdInputs, tile_size: usize) -> Result<Self> {
        let initial_rows = inputs.initial_states.map(|states| states.shape[0]);
        let documents = match &inputs.packing {
            Packing::Tokens { seq_idx, cu_seqlens } => {
                let SsdDims { batch, seqlen, .. } = inputs.dims;
                Documents::new(batch, seqlen, seq_idx.as_ref(), cu_seqlens.as_ref(), initial_rows)?
            }
            Packing::Chunks { cu_chunk_seqlens, seq_idx } => {
                Documents::of_chunks(inputs.dims.seqlen, cu_chunk_seqlens, seq_idx, initial_rows)?
            }
        };
        let dims = SsdDims { seqlen: documents.seqlen, ..inputs.dims };
        let SsdDims { batch, seqlen, nheads, ngroups, dstate, .. } = dims;
        let tiles = documents.tiles(tile_size);
        let mut dt = vec![T::zero(); batch * nheads * seqlen];
        let mut l = vec![0.0; dt.len()];
        if seqlen > 0 {
            let per_head = dt.par_chunks_mut(seqlen).zip(l.par_chunks_mut(seqlen));
            per_head.enumerate().for_each(|(bh, (dt, l))| {
                let (b, h) = (bh / nheads, bh % nheads);
                simd!(discretize(inputs, &tiles.tiles[tiles.of(b)], h, dt, l));
            });
        }
        let mut B = vec![T::zero(); batch * ngroups * seqlen * dstate];
        let mut C = B.clone();
        let mut CB = vec![T::zero(); batch * ngroups * seqlen * tile_size];
        let parts: Vec<_> = (0..batch * ngroups)
            .flat_map(|bg| tiles.of(bg / ngroups).map(move |tile| (bg % ngroups, tile)))
            .map(|(group, tile)| (group, tiles.tiles[tile]))
            .collect();
        let lengths = |size: usize| parts.iter().map(move |(_, tile)| tile.len * size);
        let packed = split_lengths(&mut B, lengths(dstate))
            .into_par_iter()
            .zip(split_lengths(&mut C, lengths(dstate)))
            .zip(split_lengths(&mut CB, lengths(tile_size)));
        packed.zip(&parts).for_each(|(((B, C), CB), &(group, tile))| {
            let (n, at) = (tile.len, [tile.b, tile.begin, group, 0]);
            simd!({
                inputs.B.load_tile(at, (1, n), (3, dstate), B);
                inputs.C.load_tile(at, (1, n), (3, dstate), C);
            });
            matmul(CB, T::zero(), Mat::new(C, n, dstate), Mat::new(B, n, dstate).t());
        });
        Ok(Shared { inputs, dims, documents, tiles, dt, l, B, C, CB, tile_size })
    }

    /// Packed B and C (n, dstate) and CB (n, n) of a tile.
    fn group(&self, tile: &Tile, group: usize) -> (&[T], &[T], &[T]) {
        let dstate = self.dims.dstate;
        let token = (tile.b * self.dims.ngroups + group) * self.dims.seqlen + tile.begin;
        let rows = token * dstate..(token + tile.len) * dstate;
        let CB = &self.CB[token * self.tile_size..][..tile.len * tile.len];
        (&self.B[rows.clone()], &self.C[rows], CB)
    }

    #[inline(always)]
    fn decays(&self, tile: &Tile, h: usize) -> Decays<'_, T> {
        let token = (tile.b * self.dims.nheads + h) * self.dims.seqlen + tile.begin;
        let (dt, l) = (&self.dt[token..][..tile.len], &self.l[token..][..tile.len]);
        let total = l[tile.len - 1];
        let mut decays = Decays {
            dt,
            l,
            u: [T::zero(); TILE],
            w: [T::zero(); TILE],
            g: T::from_f64(total).fast_exp(),
        };
        for ((u, w), l) in decays.u.iter_mut().zip(&mut decays.w).zip(l) {
            *u = T::from_f64(*l).fast_exp();
            *w = T::from_f64(total - l).fast_exp();
        }
        decays
    }

    /// Load the state before a tile that carries none, in `layout`; false if there is nothing.
    fn load_entry(&self, entry: Entry, h: usize, layout: [Along; 2], state: &mut [T]) -> bool {
        match (entry, &self.inputs.initial_states) {
            (Entry::Initial(row), Some(initial)) => {
                initial.load_tile([row, h, 0, 0], layout[0], layout[1], state);
                true
            }
            _ => false,
        }
    }

    /// A state as (headdim, dstate).
    fn state(&self) -> [Along; 2] {
        [(2, self.dims.headdim), (3, self.dims.dstate)]
    }
}

/// dt with bias, softplus and clamp; l, the sum of A dt within each tile.
#[inline(always)]
fn discretize<T: Real>(inputs: &SsdInputs, tiles: &[Tile], h: usize, dt: &mut [T], l: &mut [f64]) {
    let A = inputs.A.get::<T>([h]).as_f64();
    inputs.dt.load_line([tiles[0].b, 0, h], 1, dt);
    let bias = dt_bias(inputs, h);
    for dt in dt.iter_mut() {
        *dt = clamp(inputs, unclamped(inputs, *dt + bias));
    }
    for tile in tiles {
        let mut sum = 0.0;
        for (dt, l) in dt[tile.begin..tile.end()].iter().zip(&mut l[tile.begin..tile.end()]) {
            sum += A * dt.as_f64();
            *l = sum;
        }
    }
}

#[inline(always)]
fn dt_bias<T: Real>(inputs: &SsdInputs, h: usize) -> T {
    inputs.dt_bias.map_or(T::zero(), |bias| bias.get([h]))
}

#[inline(always)]
fn unclamped<T: Real>(inputs: &SsdInputs, biased: T) -> T {
    if inputs.dt_softplus { biased.softplus() } else { biased }
}

/// Clamp to dt_limit; NaN stays NaN.
#[inline(always)]
fn clamp<T: Real>(inputs: &SsdInputs, dt: T) -> T {
    let (low, high) = (T::from_f64(inputs.dt_limit.0), T::from_f64(inputs.dt_limit.1));
    let dt = if dt < low { low } else { dt };
    if dt > high { high } else { dt }
}

/// The derivative of the discretized dt by the raw one.
#[inline(always)]
fn discretize_grad<T: Real>(inputs: &SsdInputs, biased: T) -> T {
    let dt = unclamped(inputs, biased);
    let slope = if inputs.dt_softplus { biased.softplus_grad() } else { T::one() };
    let (low, high) = (T::from_f64(inputs.dt_limit.0), T::from_f64(inputs.dt_limit.1));
    if dt < low || dt > high { T::zero() } else { slope }
}

/// L (n, n).
#[inline(always)]
fn decay_matrix<T: Real>(l: &[f64], L: &mut [T]) {
    for (t, row) in L.chunks_exact_mut(l.len()).take(l.len()).enumerate() {
        // Whole vectors: what lies past the diagonal, where exp may overflow, is cleared after.
        let vectors = (t + 1).next_multiple_of(16).min(l.len());
        let end = l[t];
        for (value, s) in row[..vectors].iter_mut().zip(l) {
            *value = T::from_f64(end - s);
        }
        for value in &mut row[..vectors] {
            *value = value.fast_exp();
        }
        row[t + 1..].fill(T::zero());
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

/// y = u C H^T + M X + D X; H^T is left out where no state enters.
fn scan_output<T: Real>(
    y: &mut [T],
    m: &[T],
    x: &[T],
    C: &[T],
    H_t: Option<Mat<'_, T>>,
    D: Option<&[T]>,
    decays: &Decays<T>,
) {
    let n = decays.l.len();
    let headdim = x.len() / n;
    let mut keep = T::zero();
    if let Some(H_t) = H_t {
        matmul(y, T::zero(), Mat::new(C, n, C.len() / n), H_t);
        simd!(scale_rows(y, headdim, &decays.u));
        keep = T::one();
    }
    matmul(y, keep, Mat::new(m, n, n), Mat::new(x, n, headdim));
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

pub fn forward<T: Real>(inputs: &SsdInputs, out: &View<4>, states: &SsdStates) -> Result<()> {
    let shared = Shared::<T>::new(inputs, FORWARD_TILE)?;
    let heads = inputs.dims.batch * inputs.dims.nheads;
    (0..heads).into_par_iter().with_max_len(1).for_each(|bh| {
        forward_head(&shared, bh / inputs.dims.nheads, bh % inputs.dims.nheads, out, states);
    });
    Ok(())
}

/// Walk the tiles of one head, the state in cache: as (dstate, headdim) here, which no product has to transpose.
fn forward_head<T: Real>(
    shared: &Shared<'_, T>,
    b: usize,
    h: usize,
    out: &View<4>,
    states: &SsdStates,
) {
    let SsdDims { seqlen, headdim, dstate, .. } = shared.dims;
    let inputs = shared.inputs;
    let D = skip_weights(inputs, h);
    let layout = [(3, dstate), (2, headdim)];
    let mut state = vec![T::zero(); headdim * dstate];
    let mut x = vec![T::zero(); FORWARD_TILE * headdim];
    let mut y = x.clone();
    let mut z = x.clone();
    let mut m = vec![T::zero(); FORWARD_TILE * FORWARD_TILE];
    let store = |states: Option<&View<4>>, row: usize, state: &[T]| {
        if let Some(states) = states {
            states.store_tile([row, h, 0, 0], layout[0], layout[1], state);
        }
    };
    for tile in &shared.tiles.tiles[shared.tiles.of(b)] {
        let (B, C, CB) = shared.group(tile, h / shared.dims.heads_per_group());
        let (n, at) = (tile.len, [b, tile.begin, h, 0]);
        let decays = simd!(shared.decays(tile, h));
        let (x, y) = (&mut x[..n * headdim], &mut y[..n * headdim]);
        let enters =
            tile.entry == Entry::Carried || shared.load_entry(tile.entry, h, layout, &mut state);
        simd!({
            inputs.x.load_tile(at, (1, n), (3, headdim), x);
            decay_matrix(decays.l, &mut m);
            for (t, (m, CB)) in m.chunks_exact_mut(n).zip(CB.chunks_exact(n)).enumerate() {
                for ((m, &CB), &dt) in m[..=t].iter_mut().zip(CB).zip(decays.dt) {
                    *m *= CB * dt;
                }
            }
        });
        let H_t = enters.then(|| Mat::new(&state, dstate, headdim));
        scan_output(y, &m, x, C, H_t, D.as_deref(), &decays);
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
        simd!(scale_leaving(x, headdim, &decays));
        let keep = if enters { decays.g } else { T::zero() };
        matmul(&mut state, keep, Mat::new(B, n, dstate).t(), Mat::new(x, n, headdim));
        if let Some(document) = tile.ends {
            store(states.varlen_states.as_ref(), document, &state);
        }
        if tile.end() == seqlen {
            store(states.final_states.as_ref(), b, &state);
        }
    }
    // Without a token the state after the last one is the state before the first.
    let untouched = |states: Option<&View<4>>, row: usize, entry: Entry, state: &mut [T]| {
        if !shared.load_entry(entry, h, layout, state) {
            state.fill(T::zero());
        }
        store(states, row, state);
    };
    if seqlen == 0 && states.final_states.is_some() {
        untouched(states.final_states.as_ref(), b, shared.documents.entry(b), &mut state);
    }
    if let Some(varlen_states) = &states.varlen_states {
        for &(row, entry) in shared.documents.empty() {
            if entry == Entry::Carried {
                let before = [row - 1, h, 0, 0];
                varlen_states.load_tile(before, layout[0], layout[1], &mut state);
                store(Some(varlen_states), row, &state);
            } else {
                untouched(Some(varlen_states), row, entry, &mut state);
            }
        }
    }
}

/// x *= dt w: what each token adds to the state that leaves, but for B.
#[inline(always)]
fn scale_leaving<T: Real>(x: &mut [T], headdim: usize, decays: &Decays<T>) {
    for (row, (&dt, &w)) in x.chunks_exact_mut(headdim).zip(decays.dt.iter().zip(&decays.w)) {
        let factor = dt * w;
        for value in row {
            *value *= factor;
        }
    }
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

/// The states of one head at the boundaries between tiles that a run crosses, each (headdim, dstate).
struct Walk<T> {
    /// Of each tile that carries a state, in order.
    H: Vec<T>,
    /// The gradients of the same, last boundary first.
    G: Vec<T>,
}

/// For each tile, how many before it in its sequence carry a state.
fn boundaries_before(tiles: &Tiles, batch: usize) -> Vec<usize> {
    let mut before = Vec::with_capacity(tiles.tiles.len());
    for b in 0..batch {
        let mut count = 0;
        for tile in &tiles.tiles[tiles.of(b)] {
            before.push(count);
            count += usize::from(tile.entry == Entry::Carried);
        }
    }
    before
}

/// Set, or add to, a state's gradient the one in row `row` of `states`; true if the gradient now holds anything.
fn add_state<T: Real>(
    states: Option<&View<4>>,
    row: usize,
    h: usize,
    present: bool,
    G: &mut [T],
) -> bool {
    let Some(states) = states else { return present };
    let [_, _, headdim, dstate] = states.shape;
    let load = |dst: &mut [T]| states.load_tile([row, h, 0, 0], (2, headdim), (3, dstate), dst);
    if present {
        let mut added = vec![T::zero(); G.len()];
        load(&mut added);
        for (g, added) in G.iter_mut().zip(added) {
            *g += added;
        }
    } else {
        load(G);
    }
    true
}

/// Load what reaches the state after a run's last tile from the returned states; false if nothing does.
fn load_exit<T: Real>(
    dims: &SsdDims,
    gradients: &SsdGradients,
    tile: &Tile,
    h: usize,
    G: &mut [T],
) -> bool {
    let mut present = false;
    if tile.end() == dims.seqlen {
        present = add_state(gradients.dfinal_states.as_ref(), tile.b, h, present, G);
    }
    if let Some(document) = tile.ends {
        present = add_state(gradients.dvarlen_states.as_ref(), document, h, present, G);
    }
    present
}

pub fn backward<T: Real>(inputs: &SsdInputs, gradients: &SsdGradients) -> Result<()> {
    let shared = Shared::<T>::new(inputs, TILE)?;
    let SsdDims { batch, nheads, headdim, ngroups, .. } = inputs.dims;
    let walks: Vec<_> = (0..batch * nheads)
        .into_par_iter()
        .with_max_len(1)
        .map(|bh| walk_states(&shared, gradients, bh / nheads, bh % nheads))
        .collect();
    if let Some(dinitial) = &gradients.dinitial_states {
        untouched_states::<T>(&shared, gradients, dinitial);
    }

    // Sums over tokens leave each task as one partial a head: dA, ddt_bias, dD[headdim].
    let per_head = 2 + headdim;
    let heads = inputs.dims.heads_per_group();
    let tasks = shared.tiles.groups(TILE);
    let before = boundaries_before(&shared.tiles, batch);
    let mut partials = vec![0.0; tasks.len() * ngroups * heads * per_head];
    partials.par_chunks_mut(heads * per_head).enumerate().with_max_len(1).for_each(
        |(index, partials)| {
            let mut scratch = Scratch::new(&shared.dims);
            for tile in tasks[index / ngroups].clone() {
                let states = States { walks: &walks, boundary: before[tile] };
                backward_tile(
                    &shared,
                    gradients,
                    &states,
                    index % ngroups,
                    tile,
                    &mut scratch,
                    partials,
                );
            }
        },
    );
    for h in 0..nheads {
        let mut total = vec![0.0; per_head];
        for task in 0..tasks.len() {
            let index = (task * ngroups + h / heads) * heads + h % heads;
            let partial = &partials[index * per_head..][..per_head];
            for (total, partial) in total.iter_mut().zip(partial) {
                *total += partial;
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
    Ok(())
}

/// The gradient of initial states that no token touches: what the returned states pass on.
fn untouched_states<T: Real>(shared: &Shared<'_, T>, gradients: &SsdGradients, dinitial: &View<4>) {
    let SsdDims { batch, seqlen, nheads, headdim, dstate, .. } = shared.dims;
    let mut state = vec![T::zero(); headdim * dstate];
    for &(document, entry) in shared.documents.empty() {
        let Entry::Initial(row) = entry else { continue };
        for h in 0..nheads {
            let mut present = false;
            if seqlen == 0 && document < batch {
                present =
                    add_state(gradients.dfinal_states.as_ref(), document, h, present, &mut state);
            }
            if !add_state(gradients.dvarlen_states.as_ref(), document, h, present, &mut state) {
                state.fill(T::zero());
            }
            dinitial.store_tile([row, h, 0, 0], (2, headdim), (3, dstate), &state);
        }
    }
}

/// Walk the tiles of one head forward and back, and write its initial states' gradients.
fn walk_states<T: Real>(
    shared: &Shared<'_, T>,
    gradients: &SsdGradients,
    b: usize,
    h: usize,
) -> Walk<T> {
    let SsdDims { headdim, dstate, .. } = shared.dims;
    let inputs = shared.inputs;
    let group = h / shared.dims.heads_per_group();
    let state_size = headdim * dstate;
    let tiles = &shared.tiles.tiles[shared.tiles.of(b)];
    let mut state = vec![T::zero(); state_size];
    let mut rows = vec![T::zero(); TILE * headdim];
    let mut z = rows.clone();

    let boundaries = tiles.iter().filter(|tile| tile.goes_on).count();
    let [mut H, mut G] = std::array::from_fn(|_| Vec::with_capacity(boundaries * state_size));
    for tile in tiles.iter().filter(|tile| tile.goes_on) {
        let enters = tile.entry == Entry::Carried
            || shared.load_entry(tile.entry, h, shared.state(), &mut state);
        let decays = simd!(shared.decays(tile, h));
        let n = tile.len;
        let x = &mut rows[..n * headdim];
        simd!({
            inputs.x.load_tile([b, tile.begin, h, 0], (1, n), (3, headdim), x);
            scale_leaving(x, headdim, &decays);
        });
        let B = Mat::new(shared.group(tile, group).0, n, dstate);
        let keep = if enters { decays.g } else { T::zero() };
        matmul(&mut state, keep, Mat::new(x, n, headdim).t(), B);
        H.extend_from_slice(&state);
    }

    for tile in tiles.iter().rev() {
        let leaves = tile.goes_on || load_exit(&shared.dims, gradients, tile, h, &mut state);
        if tile.goes_on {
            G.extend_from_slice(&state);
        }
        if tile.entry == Entry::Zero {
            continue;
        }
        let decays = simd!(shared.decays(tile, h));
        let n = tile.len;
        let dy = &mut rows[..n * headdim];
        simd!({
            load_dy(inputs, gradients, [b, tile.begin, h, 0], dy, &mut z);
            scale_rows(dy, headdim, &decays.u);
        });
        let C = Mat::new(shared.group(tile, group).1, n, dstate);
        let keep = if leaves { decays.g } else { T::zero() };
        matmul(&mut state, keep, Mat::new(dy, n, headdim).t(), C);
        if let (Some(dinitial), Entry::Initial(row)) = (&gradients.dinitial_states, tile.entry) {
            dinitial.store_tile([row, h, 0, 0], (2, headdim), (3, dstate), &state);
        }
    }
    Walk { H, G }
}

/// Where a tile finds its states.
struct States<'a, T> {
    /// Of each head (batch, nheads).
    walks: &'a [Walk<T>],
    /// How many boundaries there are before the tile in its sequence.
    boundary: usize,
}

impl<T> States<'_, T> {
    /// The state at the tile's start and the gradient of the one at its end, where the run goes on across them.
    fn of(&self, bh: usize, tile: &Tile, state_size: usize) -> (Option<&[T]>, Option<&[T]>) {
        let Walk { H, G } = &self.walks[bh];
        let carried = tile.entry == Entry::Carried;
        let after = self.boundary + usize::from(carried);
        (
            carried.then(|| &H[self.boundary * state_size..][..state_size]),
            tile.goes_on.then(|| &G[G.len() - (after + 1) * state_size..][..state_size]),
        )
    }
}

/// What a task's tiles and heads use one after another.
struct Scratch<T> {
    x: Vec<T>,
    dy: Vec<T>,
    z: Vec<T>,
    rows: Vec<T>,
    E: Vec<T>,
    P: Vec<T>,
    dM: Vec<T>,
    dCB: Vec<T>,
    dB: Vec<T>,
    dC: Vec<T>,
    dYH: Vec<T>,
    dD: Vec<T>,
    initial: Vec<T>,
    exit: Vec<T>,
}

impl<T: Real> Scratch<T> {
    fn new(dims: &SsdDims) -> Self {
        let SsdDims { headdim, dstate, .. } = *dims;
        let [x, dy, z, rows, E] = std::array::from_fn(|_| vec![T::zero(); TILE * headdim]);
        let [P, dM, dCB] = std::array::from_fn(|_| vec![T::zero(); TILE * TILE]);
        let [dB, dC, dYH] = std::array::from_fn(|_| vec![T::zero(); TILE * dstate]);
        let dD = vec![T::zero(); headdim];
        let [initial, exit] = std::array::from_fn(|_| vec![T::zero(); headdim * dstate]);
        Scratch { x, dy, z, rows, E, P, dM, dCB, dB, dC, dYH, dD, initial, exit }
    }
}

/// All gradients of one tile of one group's heads; `partials` is (heads, 2 + headdim).
fn backward_tile<T: Real>(
    shared: &Shared<'_, T>,
    gradients: &SsdGradients,
    states: &States<'_, T>,
    group: usize,
    index: usize,
    scratch: &mut Scratch<T>,
    partials: &mut [f64],
) {
    let SsdDims { nheads, headdim, dstate, .. } = shared.dims;
    let inputs = shared.inputs;
    let heads = shared.dims.heads_per_group();
    let tile = &shared.tiles.tiles[index];
    let n = tile.len;
    let (B, C, CB) = shared.group(tile, group);
    let (B_mat, C_mat) = (Mat::new(B, n, dstate), Mat::new(C, n, dstate));
    let [x, dy, z, rows, E] =
        [&mut scratch.x, &mut scratch.dy, &mut scratch.z, &mut scratch.rows, &mut scratch.E]
            .map(|values| &mut values[..n * headdim]);
    let [P, dM, dCB] =
        [&mut scratch.P, &mut scratch.dM, &mut scratch.dCB].map(|values| &mut values[..n * n]);
    let [dB, dC, dYH] = [&mut scratch.dB, &mut scratch.dC, &mut scratch.dYH]
        .map(|values| &mut values[..n * dstate]);
    let mut line = [T::zero(); TILE];
    dCB.fill(T::zero());
    dB.fill(T::zero());
    dC.fill(T::zero());

    for (head, partial) in partials.chunks_exact_mut(2 + headdim).enumerate() {
        let h = group * heads + head;
        let at = [tile.b, tile.begin, h, 0];
        // The state that enters the tile, and the gradient of the one that leaves it; none where they are zero.
        let (H, G) = states.of(tile.b * nheads + h, tile, headdim * dstate);
        let initial = &mut scratch.initial[..];
        let H = H.or(shared.load_entry(tile.entry, h, shared.state(), initial).then_some(initial));
        let exit = &mut scratch.exit[..];
        let G = G.or(load_exit(&shared.dims, gradients, tile, h, exit).then_some(exit));
        let (H_mat, G_mat) =
            (H.map(|H| Mat::new(H, headdim, dstate)), G.map(|G| Mat::new(G, headdim, dstate)));
        let D = skip_weights::<T>(inputs, h);
        let decays = simd!(shared.decays(tile, h));
        simd!({
            inputs.x.load_tile(at, (1, n), (3, headdim), x);
            load_dy(inputs, gradients, at, dy, z);
            decay_matrix(decays.l, P);
        });
        matmul(dM, T::zero(), Mat::new(dy, n, headdim), Mat::new(x, n, headdim).t());

        // One sweep turns L into P = CB o L and leaves dCB and the sums of K. K's diagonal, which does not depend on the
        // decay, is left out of them.
        let mut dl = [0.0; TILE];
        simd!({
            for t in 0..n {
                let row = t * n..t * n + t + 1;
                let (P, dCB) = (&mut P[row.clone()], &mut dCB[row.clone()]);
                let (dM, CB) = (&dM[row.clone()], &CB[row]);
                let K = &mut line[..t + 1];
                let sums = P.iter_mut().zip(dCB).zip(K.iter_mut());
                let factors = dM.iter().zip(CB).zip(decays.dt);
                for (((P, dCB), K), ((&dM, &CB), &dt)) in sums.zip(factors) {
                    let weighted = *P * dt;
                    *dCB += dM * weighted;
                    *P *= CB;
                    *K = dM * (CB * weighted);
                }
                let K = &K[..t];
                for (dl, K) in dl.iter_mut().zip(K) {
                    *dl -= K.as_f64();
                }
                dl[t] += sum(K);
            }
        });

        if let (Some(dz), Some(_)) = (&gradients.dz, &inputs.z) {
            simd!({
                for (t, (M, P)) in dM.chunks_exact_mut(n).zip(P.chunks_exact(n)).enumerate() {
                    let (before, after) = M.split_at_mut(t + 1);
                    for (M, (&P, &dt)) in before.iter_mut().zip(P.iter().zip(decays.dt)) {
                        *M = P * dt;
                    }
                    after.fill(T::zero());
                }
            });
            let y = &mut *rows;
            scan_output(y, dM, x, C, H_mat.map(Mat::t), D.as_deref(), &decays);
            simd!({
                let dout = &mut *E;
                match &gradients.dout {
                    Some(view) => view.load_tile(at, (1, n), (3, headdim), dout),
                    None => dout.fill(T::zero()),
                }
                for ((y, &dout), z) in y.iter_mut().zip(dout.iter()).zip(z.iter()) {
                    *y = *y * dout * z.silu_grad();
                }
                dz.store_tile(at, (1, n), (3, headdim), y);
            });
        }

        // dC, and r: what l gives through the entering state.
        if let Some(H_mat) = H_mat {
            matmul(dYH, T::zero(), Mat::new(dy, n, headdim), H_mat);
            simd!({
                let rows = dYH.chunks_exact(dstate).zip(C.chunks_exact(dstate));
                let rows = rows.zip(dC.chunks_exact_mut(dstate));
                for ((dl, &u), ((dYH, C), dC)) in dl.iter_mut().zip(&decays.u).zip(rows) {
                    *dl += (u * dot(dYH, C)).as_f64();
                    for (dC, &dYH) in dC.iter_mut().zip(dYH) {
                        *dC += u * dYH;
                    }
                }
            });
        }

        // What comes back from the leaving state: dB, I (in E) and q.
        let mut q = [0.0; TILE];
        let mut keep = T::zero();
        if let Some(G_mat) = G_mat {
            simd!(scaled_rows(rows, x, headdim, |t| decays.dt[t] * decays.w[t]));
            matmul(dB, T::one(), Mat::new(rows, n, headdim), G_mat);
            matmul(E, T::zero(), B_mat, G_mat.t());
            simd!({
                scale_rows(E, headdim, &decays.w);
                let tokens = E.chunks_exact(headdim).zip(x.chunks_exact(headdim));
                for ((q, &dt), (I, x)) in q.iter_mut().zip(decays.dt).zip(tokens) {
                    *q = (dt * dot(I, x)).as_f64();
                }
            });
            keep = T::one();
        }
        matmul(E, keep, Mat::new(P, n, n).t(), Mat::new(dy, n, headdim));

        // da from what each l[t] gave, a sum of a up to t; w and g also hold the sum over the whole tile.
        let mut da = [0.0; TILE];
        let mut suffix = 0.0;
        for t in (0..n).rev() {
            suffix += dl[t];
            da[t] = suffix;
        }
        let mut prefix = match (G, H) {
            (Some(G), Some(H)) => (decays.g * simd!(dot(G, H))).as_f64(),
            _ => 0.0,
        };
        for (da, q) in da.iter_mut().zip(&q) {
            *da += prefix;
            prefix += q;
        }

        let A = inputs.A.get::<T>([h]).as_f64();
        let (dA, rest) = partial.split_first_mut().expect("partials hold dA");
        let (ddt_bias, dD) = rest.split_first_mut().expect("partials hold ddt_bias");
        simd!({
            let slopes = &mut line[..n];
            inputs.dt.load_line([tile.b, tile.begin, h], 1, slopes);
            let bias = dt_bias(inputs, h);
            for slope in slopes.iter_mut() {
                *slope = discretize_grad(inputs, *slope + bias);
            }
            let tokens = E.chunks_exact(headdim).zip(x.chunks_exact(headdim));
            for (t, (E, x)) in tokens.enumerate() {
                let ddt = (dot(E, x).as_f64() + A * da[t]) * slopes[t].as_f64();
                slopes[t] = T::from_f64(ddt);
                *dA += decays.dt[t].as_f64() * da[t];
                *ddt_bias += ddt;
            }
            scale_rows(E, headdim, decays.dt);
            if let Some(D) = &D {
                let tile_dD = &mut scratch.dD[..headdim];
                tile_dD.fill(T::zero());
                let tokens = dy.chunks_exact(headdim).zip(x.chunks_exact(headdim));
                for (E, (dy, x)) in E.chunks_exact_mut(headdim).zip(tokens) {
                    for ((E, dD), ((&dy, &x), &D)) in
                        E.iter_mut().zip(tile_dD.iter_mut()).zip(dy.iter().zip(x).zip(D))
                    {
                        *E += D * dy;
                        *dD += dy * x;
                    }
                }
                for (dD, tile_dD) in dD.iter_mut().zip(tile_dD.iter()) {
                    *dD += tile_dD.as_f64();
                }
            }
            gradients.dx.store_tile(at, (1, n), (3, headdim), E);
        });
        gradients.ddt.store_line([tile.b, tile.begin, h], 1, &line[..n]);
    }

    let dCB = Mat::new(dCB, n, n);
    matmul(dC, T::one(), dCB, B_mat);
    matmul(dB, T::one(), dCB.t(), C_mat);
    let at = [tile.b, tile.begin, group, 0];
    gradients.dB.store_tile(at, (1, n), (3, dstate), dB);
    gradients.dC.store_tile(at, (1, n), (3, dstate), dC);
}
