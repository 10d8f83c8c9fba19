//! Mamba-1's selective scan on the CPU: LANES channels side by side in vectors, tiles of tokens within one run.
//!
//! Per channel and state index n, with `delta` after bias and softplus:
//!
//! ```text
//! state[t] = decay[t] state[t - 1] + delta[t] u[t] B[t]     decay[t] = exp(delta[t] A)
//! y[t] = sum_n C[t] state[t] + D u[t]                       out[t] = y[t] silu(z[t])
//! ```
//!
//! A task has a *part* of one sequence's channels: some blocks of LANES channels of one group. In each tile it goes state
//! index by state index, at each block by block, token by token, so that what a state index needs stays in the nearest
//! cache whatever dstate is, and what blocks share (B, C, and the gradients of both) is touched once for all of them.
//!
//! Backward walks the tiles forward and keeps the states that enter a tile from the one before, then in reverse:
//! a tile's states and decays anew, and from its last token on G, the gradient of the state, with dy = dout silu(z):
//!
//! ```text
//! G += C[t] dy[t]                               dC[t] = sum_channels state[t] dy[t]
//! gb[t] = sum_n G B[t]                          dB[t] = sum_channels delta[t] u[t] G
//! ga[t] = sum_n A G decay[t] state[t - 1]       dA = sum_t delta[t] G decay[t] state[t - 1]
//! G = decay[t] G                                and on to t - 1
//!
//! du = delta gb + D dy     ddelta = (u gb + ga) (the derivative of softplus)     dD = sum_t u dy
//! ```
//!
//! Sums over tokens leave a tile in T and are carried on in f64, in the order of the tiles.

use rayon::prelude::*;

use crate::cpu::documents::{Documents, Entry, Tile, Tiles};
use crate::cpu::real::Real;
use crate::dims::SelectiveScanDims;
use crate::error::Result;
use crate::ops::selective_scan::{Projection, ScanGradients, ScanInputs};
use crate::tensor::{Along, View};

/// Channels a vector: one register of 512 bits for f32.
const LANES: usize = 16;
/// Tokens a tile: the work arrays of one state index, (TILE, LANES) each, stay in the nearest cache.
const TILE: usize = 64;
/// Tasks that backward splits the channels of one sequence into, if a task gets MIN_BLOCKS blocks or more: each has
/// dB and dC of its own.
const PARTS: usize = 16;
const MIN_BLOCKS: usize = 4;

type Lanes<T> = [T; LANES];

/// At most LANES channels of one group.
#[derive(Clone, Copy)]
struct Block {
    channel: usize,
    nchannels: usize,
}

impl Block {
    /// Rows of the block's channels, which run along `axis` of `view`; lanes without a channel become 0.
    ///
    /// What lies together in memory is copied together, then transposed in cache if that is rows. Compiled once, with its
    /// own choice of vector instructions: inlined at every call it would be most of the code.
    #[inline(never)]
    fn load<T: Real, const N: usize>(
        &self,
        view: &View<N>,
        at: [usize; N],
        rows: Along,
        axis: usize,
        dst: &mut [Lanes<T>],
    ) {
        let n = self.nchannels;
        let mut copy = [T::zero(); TILE * LANES];
        simd!({
            for (i, dst) in dst[..rows.1].chunks_mut(TILE).enumerate() {
                let (mut at, copy) = (at, &mut copy[..dst.len() * n]);
                at[rows.0] += i * TILE;
                if n < LANES {
                    dst.fill([T::zero(); LANES]);
                }
                if view.is_dense(axis) {
                    view.load_tile(at, (rows.0, dst.len()), (axis, n), copy);
                    for (row, values) in dst.iter_mut().zip(copy.chunks_exact(n)) {
                        row[..n].copy_from_slice(values);
                    }
                } else {
                    view.load_tile(at, (axis, n), (rows.0, dst.len()), copy);
                    for (l, values) in copy.chunks_exact(dst.len()).enumerate() {
                        for (row, &value) in dst.iter_mut().zip(values) {
                            row[l] = value;
                        }
                    }
                }
            }
        });
    }

    /// The opposite of `load`.
    #[inline(never)]
    fn store<T: Real, const N: usize>(
        &self,
        view: &View<N>,
        at: [usize; N],
        rows: Along,
        axis: usize,
        src: &[Lanes<T>],
    ) {
        let n = self.nchannels;
        let mut copy = [T::zero(); TILE * LANES];
        simd!({
            for (i, src) in src[..rows.1].chunks(TILE).enumerate() {
                let (mut at, copy) = (at, &mut copy[..src.len() * n]);
                at[rows.0] += i * TILE;
                if view.is_dense(axis) {
                    for (row, values) in src.iter().zip(copy.chunks_exact_mut(n)) {
                        values.copy_from_slice(&row[..n]);
                    }
                    view.store_tile(at, (rows.0, src.len()), (axis, n), copy);
                } else {
                    for (l, values) in copy.chunks_exact_mut(src.len()).enumerate() {
                        for (row, value) in src.iter().zip(values) {
                            *value = row[l];
                        }
                    }
                    view.store_tile(at, (axis, n), (rows.0, src.len()), copy);
                }
            }
        });
    }

    /// Tokens of u, delta, z or dout.
    #[inline(always)]
    fn load_tokens<T: Real>(&self, view: &View<3>, tile: &Tile, dst: &mut [Lanes<T>]) {
        self.load(view, [tile.b, self.channel, tile.begin], (2, tile.len), 1, dst);
    }

    #[inline(always)]
    fn store_tokens<T: Real>(&self, view: &View<3>, tile: &Tile, src: &[Lanes<T>]) {
        self.store(view, [tile.b, self.channel, tile.begin], (2, tile.len), 1, src);
    }

    /// (dim, dstate) as (dstate, LANES).
    #[inline(always)]
    fn load_matrix<T: Real>(&self, view: &View<2>, dst: &mut [Lanes<T>]) {
        self.load(view, [self.channel, 0], (1, dst.len()), 0, dst);
    }

    /// (dim,) as one row.
    #[inline(always)]
    fn load_vector<T: Real>(&self, view: Option<&View<1>>) -> Lanes<T> {
        let mut row = [[T::zero(); LANES]];
        if let Some(view) = view {
            view.load_line([self.channel], 0, &mut row[0][..self.nchannels]);
        }
        row[0]
    }

    /// One row of states, as (dstate, LANES).
    #[inline(always)]
    fn load_state<T: Real>(&self, view: &View<3>, row: usize, dst: &mut [Lanes<T>]) {
        self.load(view, [row, self.channel, 0], (2, dst.len()), 1, dst);
    }

    #[inline(always)]
    fn store_state<T: Real>(&self, view: &View<3>, row: usize, src: &[Lanes<T>]) {
        self.store(view, [row, self.channel, 0], (2, src.len()), 1, src);
    }
}

/// What one task does.
struct Part {
    b: usize,
    group: usize,
    blocks: Vec<Block>,
}

/// The parts of each sequence, group after group.
fn parts(dims: &SelectiveScanDims, blocks_per_part: usize) -> Vec<Part> {
    let mut parts = Vec::new();
    for index in 0..dims.batch * dims.ngroups {
        let (b, group) = (index / dims.ngroups, index % dims.ngroups);
        let (begin, end) = (group * dims.group_dim(), (group + 1) * dims.group_dim());
        let blocks: Vec<_> = (begin..end)
            .step_by(LANES)
            .map(|channel| Block { channel, nchannels: LANES.min(end - channel) })
            .collect();
        let chunks = blocks.chunks(blocks_per_part);
        parts.extend(chunks.map(|blocks| Part { b, group, blocks: blocks.to_vec() }));
    }
    parts
}

/// B or C of the tile at hand.
struct Operand<'a, T> {
    projection: &'a Projection,
    /// Fixed: (dstate, LANES) a block.
    blocks: Vec<Vec<Lanes<T>>>,
    /// Varying: (dstate, tokens).
    tokens: Vec<T>,
}

impl<'a, T: Real> Operand<'a, T> {
    #[inline(always)]
    fn new(projection: &'a Projection, part: &Part, dstate: usize) -> Self {
        let (mut blocks, mut tokens) = (Vec::new(), Vec::new());
        match projection {
            Projection::Fixed(view) => {
                for block in &part.blocks {
                    let mut rows = vec![[T::zero(); LANES]; dstate];
                    block.load_matrix(view, &mut rows);
                    blocks.push(rows);
                }
            }
            Projection::Varying(_) => tokens = vec![T::zero(); dstate * TILE],
        }
        Operand { projection, blocks, tokens }
    }

    #[inline(always)]
    fn load(&mut self, group: usize, tile: &Tile) {
        if let Projection::Varying(view) = self.projection {
            let dstate = view.shape[2];
            let at = [tile.b, group, 0, tile.begin];
            view.load_tile(at, (2, dstate), (3, tile.len), &mut self.tokens);
        }
    }

    /// State index `n` of block `block`.
    #[inline(always)]
    fn row(&self, n: usize, block: usize, len: usize) -> Row<'_, T> {
        match self.projection {
            Projection::Fixed(_) => Row::Fixed(self.blocks[block][n]),
            Projection::Varying(_) => Row::Varying(&self.tokens[n * len..(n + 1) * len]),
        }
    }
}

/// B or C at one state index: a value a channel, or one a token.
enum Row<'a, T> {
    Fixed(Lanes<T>),
    Varying(&'a [T]),
}

/// What both kinds of `Row` are to the loops over tokens.
trait ByToken<T>: Copy {
    fn at(self, t: usize) -> Lanes<T>;
}

impl<T: Real> ByToken<T> for Lanes<T> {
    #[inline(always)]
    fn at(self, _: usize) -> Lanes<T> {
        self
    }
}

impl<T: Real> ByToken<T> for &[T] {
    #[inline(always)]
    fn at(self, t: usize) -> Lanes<T> {
        [self[t]; LANES]
    }
}

/// Evaluate an expression with the rows `$B` and `$C` as `ByToken`.
macro_rules! with_rows {
    ($B:ident, $C:ident => $body:expr) => {
        match ($B, $C) {
            (Row::Varying($B), Row::Varying($C)) => $body,
            (Row::Varying($B), Row::Fixed($C)) => $body,
            (Row::Fixed($B), Row::Varying($C)) => $body,
            (Row::Fixed($B), Row::Fixed($C)) => $body,
        }
    };
}

/// A block of channels on its walk through the tiles: parameters, state, tokens of the tile at hand.
struct Channels<T> {
    block: Block,
    A: Vec<Lanes<T>>,
    D: Lanes<T>,
    delta_bias: Lanes<T>,
    state: Vec<Lanes<T>>,
    u: Vec<Lanes<T>>,
    delta: Vec<Lanes<T>>,
    /// delta u
    input: Vec<Lanes<T>>,
    y: Vec<Lanes<T>>,
}

impl<T: Real> Channels<T> {
    #[inline(always)]
    fn new(inputs: &ScanInputs, block: Block) -> Self {
        let (states, tokens) =
            (vec![[T::zero(); LANES]; inputs.dims.dstate], vec![[T::zero(); LANES]; TILE]);
        let mut A = states.clone();
        block.load_matrix(&inputs.A, &mut A);
        Channels {
            block,
            A,
            D: block.load_vector(inputs.D.as_ref()),
            delta_bias: block.load_vector(inputs.delta_bias.as_ref()),
            state: states,
            u: tokens.clone(),
            delta: tokens.clone(),
            input: tokens.clone(),
            y: tokens,
        }
    }

    /// u, and delta with its bias.
    #[inline(always)]
    fn load(&mut self, inputs: &ScanInputs, tile: &Tile) {
        self.block.load_tokens(&inputs.u, tile, &mut self.u);
        self.block.load_tokens(&inputs.delta, tile, &mut self.delta);
        let bias = self.delta_bias;
        for row in &mut self.delta[..tile.len] {
            let mut delta = *row;
            for l in 0..LANES {
                delta[l] += bias[l];
            }
            *row = delta;
        }
    }

    /// From what `load` left: softplus of delta, and the arrays that follow from it.
    #[inline(always)]
    fn discretize(&mut self, softplus: bool, len: usize) {
        if softplus {
            for delta in self.delta[..len].as_flattened_mut() {
                *delta = delta.softplus();
            }
        }
        let (delta, u) = (&self.delta[..len], &self.u[..len]);
        let (input, y, D) = (&mut self.input[..len], &mut self.y[..len], self.D);
        for t in 0..len {
            let (delta, u) = (delta[t], u[t]);
            let (mut of_input, mut of_y) = ([T::zero(); LANES], [T::zero(); LANES]);
            for l in 0..LANES {
                of_input[l] = delta[l] * u[l];
                of_y[l] = D[l] * u[l];
            }
            (input[t], y[t]) = (of_input, of_y);
        }
    }

    /// Take one state index through the tile.
    #[inline(always)]
    fn advance(&mut self, n: usize, len: usize, B: impl ByToken<T>, C: impl ByToken<T>) {
        let (delta, input) = (&self.delta[..len], &self.input[..len]);
        let (A, y) = (self.A[n], &mut self.y[..len]);
        let mut state = self.state[n];
        for t in 0..len {
            let (delta, input, B, C, mut of_y) = (delta[t], input[t], B.at(t), C.at(t), y[t]);
            for l in 0..LANES {
                let decay = (delta[l] * A[l]).decay_factor();
                state[l] = state[l].decayed(decay, input[l] * B[l]);
                of_y[l] = C[l].mul_add(state[l], of_y[l]);
            }
            y[t] = of_y;
        }
        self.state[n] = state;
    }
}

/// A part on its walk through the tiles.
struct Walk<'a, T> {
    inputs: &'a ScanInputs,
    part: &'a Part,
    channels: Vec<Channels<T>>,
    B: Operand<'a, T>,
    C: Operand<'a, T>,
}

impl<'a, T: Real> Walk<'a, T> {
    #[inline(always)]
    fn new(inputs: &'a ScanInputs, part: &'a Part) -> Self {
        let dstate = inputs.dims.dstate;
        let mut channels = Vec::new();
        for &block in &part.blocks {
            channels.push(Channels::new(inputs, block));
        }
        Walk {
            inputs,
            part,
            channels,
            B: Operand::new(&inputs.B, part, dstate),
            C: Operand::new(&inputs.C, part, dstate),
        }
    }

    /// The state that a run starts from.
    #[inline(always)]
    fn enter(&mut self, entry: Entry) {
        for channels in &mut self.channels {
            match (entry, &self.inputs.initial_state) {
                (Entry::Initial(row), Some(view)) => {
                    channels.block.load_state(view, row, &mut channels.state);
                }
                (Entry::Carried, _) => {}
                _ => channels.state.fill([T::zero(); LANES]),
            }
        }
    }

    /// The tile's tokens, and the states after it.
    #[inline(always)]
    fn advance(&mut self, tile: &Tile) {
        self.B.load(self.part.group, tile);
        self.C.load(self.part.group, tile);
        for channels in &mut self.channels {
            channels.load(self.inputs, tile);
            channels.discretize(self.inputs.delta_softplus, tile.len);
        }
        for n in 0..self.inputs.dims.dstate {
            for (i, channels) in self.channels.iter_mut().enumerate() {
                let (B, C) = (self.B.row(n, i, tile.len), self.C.row(n, i, tile.len));
                with_rows!(B, C => channels.advance(n, tile.len, B, C));
            }
        }
    }
}

fn documents(inputs: &ScanInputs) -> Result<Documents> {
    let SelectiveScanDims { batch, seqlen, .. } = inputs.dims;
    let initial_rows = inputs.initial_state.map(|state| state.shape[0]);
    Documents::new(batch, seqlen, inputs.seq_idx.as_ref(), inputs.cu_seqlens.as_ref(), initial_rows)
}

/// The row of last_state that a document without tokens decides: without any token at all, last_state is the first
/// document's.
fn row_of_last_state(inputs: &ScanInputs, document: usize) -> Option<usize> {
    let first = inputs.cu_seqlens.is_none() || document == 0;
    (inputs.dims.seqlen == 0 && first).then_some(document)
}

pub fn forward<T: Real>(
    inputs: &ScanInputs,
    out: &View<3>,
    last_state: Option<&View<3>>,
    varlen_states: Option<&View<3>>,
) -> Result<()> {
    let documents = documents(inputs)?;
    let tiles = documents.tiles(TILE);
    parts(&inputs.dims, 1).par_iter().with_max_len(1).for_each(|part| {
        simd!(forward_part::<T>(inputs, &tiles, part, out, last_state, varlen_states));
    });
    let mut state = vec![T::zero(); inputs.dims.dstate];
    for &(document, entry) in documents.empty() {
        for d in 0..inputs.dims.dim {
            match (entry, &inputs.initial_state) {
                (Entry::Initial(row), Some(view)) => view.load_line([row, d, 0], 2, &mut state),
                _ => state.fill(T::zero()),
            }
            if let Some(states) = varlen_states {
                states.store_line([document, d, 0], 2, &state);
            }
            if let (Some(states), Some(row)) = (last_state, row_of_last_state(inputs, document)) {
                states.store_line([row, d, 0], 2, &state);
            }
        }
    }
    Ok(())
}

#[inline(always)]
fn forward_part<T: Real>(
    inputs: &ScanInputs,
    tiles: &Tiles,
    part: &Part,
    out: &View<3>,
    last_state: Option<&View<3>>,
    varlen_states: Option<&View<3>>,
) {
    let mut walk = Walk::<T>::new(inputs, part);
    let mut z = vec![[T::zero(); LANES]; TILE];
    for index in tiles.of(part.b) {
        let tile = &tiles.tiles[index];
        walk.enter(tile.entry);
        walk.advance(tile);
        for Channels { block, state, y, .. } in &mut walk.channels {
            if let Some(gate) = &inputs.z {
                block.load_tokens(gate, tile, &mut z);
                let y = y[..tile.len].as_flattened_mut();
                for (y, z) in y.iter_mut().zip(z.as_flattened()) {
                    *y *= z.silu();
                }
            }
            block.store_tokens(out, tile, y);
            if let (Some(states), Some(document)) = (varlen_states, tile.ends) {
                block.store_state(states, document, state);
            }
            if let (Some(states), true) = (last_state, tile.end() == inputs.dims.seqlen) {
                block.store_state(states, part.b, state);
            }
        }
    }
}

/// Sums over the tokens of a block.
#[derive(Clone)]
struct Sums {
    /// (dstate, LANES); those of B and C where these are fixed.
    dA: Vec<Lanes<f64>>,
    dB: Vec<Lanes<f64>>,
    dC: Vec<Lanes<f64>>,
    dD: Lanes<f64>,
    ddelta_bias: Lanes<f64>,
}

impl Sums {
    fn new(dstate: usize) -> Self {
        let zeros = vec![[0.0; LANES]; dstate];
        Sums {
            dA: zeros.clone(),
            dB: zeros.clone(),
            dC: zeros,
            dD: [0.0; LANES],
            ddelta_bias: [0.0; LANES],
        }
    }

    fn rows(&self) -> impl Iterator<Item = &Lanes<f64>> {
        let matrices = self.dA.iter().chain(&self.dB).chain(&self.dC);
        matrices.chain([&self.dD, &self.ddelta_bias])
    }

    fn rows_mut(&mut self) -> impl Iterator<Item = &mut Lanes<f64>> {
        let matrices = self.dA.iter_mut().chain(&mut self.dB).chain(&mut self.dC);
        matrices.chain([&mut self.dD, &mut self.ddelta_bias])
    }
}

#[inline(always)]
fn add<T: Real>(sum: &mut Lanes<f64>, value: &Lanes<T>) {
    for l in 0..LANES {
        sum[l] += value[l].as_f64();
    }
}

#[inline(always)]
fn sum_of_lanes<T: Real>(row: &Lanes<T>) -> T {
    let (mut eight, mut four) = ([T::zero(); 8], [T::zero(); 4]);
    for l in 0..8 {
        eight[l] = row[l] + row[l + 8];
    }
    for l in 0..4 {
        four[l] = eight[l] + eight[l + 4];
    }
    (four[0] + four[2]) + (four[1] + four[3])
}

/// What the tasks leave to be added up.
struct Partial<T> {
    /// Block by block.
    sums: Vec<Sums>,
    /// (dstate, seqlen) where B and C vary, else empty.
    dB: Vec<T>,
    dC: Vec<T>,
}

pub fn backward<T: Real>(inputs: &ScanInputs, gradients: &ScanGradients) -> Result<()> {
    let dims = &inputs.dims;
    let SelectiveScanDims { batch, dim, seqlen, ngroups, dstate } = *dims;
    let documents = documents(inputs)?;
    let tiles = documents.tiles(TILE);
    let blocks_per_group = dims.group_dim().div_ceil(LANES);
    let blocks_per_part = (ngroups * blocks_per_group).div_ceil(PARTS).max(MIN_BLOCKS);
    let parts = parts(dims, blocks_per_part);
    let partials: Vec<Partial<T>> = parts
        .par_iter()
        .with_max_len(1)
        .map(|part| simd!(backward_part(inputs, &tiles, part, gradients)))
        .collect();

    let parts_per_group = blocks_per_group.div_ceil(blocks_per_part);
    let of_group = |b: usize, group: usize| {
        &partials[(b * ngroups + group) * parts_per_group..][..parts_per_group]
    };
    (0..batch * ngroups * dstate).into_par_iter().for_each(|index| {
        let (bg, n) = (index / dstate, index % dstate);
        let (b, group) = (bg / ngroups, bg % ngroups);
        let store = |gradient: &Projection, of: &dyn Fn(&Partial<T>) -> &[T]| {
            if let Projection::Varying(view) = gradient {
                let mut total = vec![T::zero(); seqlen];
                for partial in of_group(b, group) {
                    let row = &of(partial)[n * seqlen..(n + 1) * seqlen];
                    for (total, &value) in total.iter_mut().zip(row) {
                        *total += value;
                    }
                }
                view.store_line([b, group, n, 0], 3, &total);
            }
        };
        store(&gradients.dB, &|partial| &partial.dB);
        store(&gradients.dC, &|partial| &partial.dC);
    });

    (0..ngroups * blocks_per_group).into_par_iter().for_each(|index| {
        let (group, block) = (index / blocks_per_group, index % blocks_per_group);
        let mut total = Sums::new(dstate);
        for b in 0..batch {
            let partial = &of_group(b, group)[block / blocks_per_part];
            let sums = &partial.sums[block % blocks_per_part];
            for (total, sum) in total.rows_mut().zip(sums.rows()) {
                add(total, sum);
            }
        }
        let channel = group * dims.group_dim() + block * LANES;
        let nchannels = LANES.min((group + 1) * dims.group_dim() - channel);
        let block = Block { channel, nchannels };
        let store_matrix = |view: &View<2>, rows: &[Lanes<f64>]| {
            block.store(view, [channel, 0], (1, dstate), 0, rows);
        };
        store_matrix(&gradients.dA, &total.dA);
        if let Projection::Fixed(view) = &gradients.dB {
            store_matrix(view, &total.dB);
        }
        if let Projection::Fixed(view) = &gradients.dC {
            store_matrix(view, &total.dC);
        }
        if let Some(dD) = &gradients.dD {
            dD.store_line([channel], 0, &total.dD[..nchannels]);
        }
        if let Some(ddelta_bias) = &gradients.ddelta_bias {
            ddelta_bias.store_line([channel], 0, &total.ddelta_bias[..nchannels]);
        }
    });

    if let Some(dinitial) = &gradients.dinitial_state {
        let (mut total, mut state) = (vec![T::zero(); dstate], vec![T::zero(); dstate]);
        for &(document, entry) in documents.empty() {
            let Entry::Initial(row) = entry else { continue };
            for d in 0..dim {
                total.fill(T::zero());
                let varlen = gradients.dvarlen_states.map(|states| (states, document));
                let last = gradients.dlast_state.zip(row_of_last_state(inputs, document));
                for (states, row) in varlen.into_iter().chain(last) {
                    states.load_line([row, d, 0], 2, &mut state);
                    for (total, &value) in total.iter_mut().zip(&state) {
                        *total += value;
                    }
                }
                dinitial.store_line([row, d, 0], 2, &total);
            }
        }
    }
    Ok(())
}

/// The gradient of B or C at one state index of one tile, (tokens, LANES), on its way to where it is summed up.
struct OperandGradient<T> {
    varies: bool,
    rows: Vec<Lanes<T>>,
    /// (dstate, seqlen) if it varies.
    tokens: Vec<T>,
}

impl<T: Real> OperandGradient<T> {
    #[inline(always)]
    fn new(projection: &Projection, dims: &SelectiveScanDims) -> Self {
        let varies = matches!(projection, Projection::Varying(_));
        let tokens = if varies { vec![T::zero(); dims.dstate * dims.seqlen] } else { Vec::new() };
        OperandGradient { varies, rows: vec![[T::zero(); LANES]; TILE], tokens }
    }

    /// After each block: if it is fixed, its tokens are added up.
    #[inline(always)]
    fn end_block(&mut self, len: usize, sum: &mut Lanes<f64>) {
        if self.varies {
            return;
        }
        let mut total = [T::zero(); LANES];
        for row in &mut self.rows[..len] {
            for l in 0..LANES {
                total[l] += row[l];
            }
            *row = [T::zero(); LANES];
        }
        add(sum, &total);
    }

    /// After the last block: if it varies, its channels are added up.
    #[inline(always)]
    fn end_blocks(&mut self, at: usize, len: usize) {
        if !self.varies {
            return;
        }
        for (row, total) in self.rows[..len].iter_mut().zip(&mut self.tokens[at..at + len]) {
            *total = sum_of_lanes(row);
            *row = [T::zero(); LANES];
        }
    }
}

/// What backward holds beside `Channels`, of the tile at hand but for the first and the last.
struct ChannelGradients<T> {
    /// (dstate, LANES)
    G: Vec<Lanes<T>>,
    /// The derivative of the discretized delta.
    slope: Vec<Lanes<T>>,
    dy: Vec<Lanes<T>>,
    /// dout silu'(z): dz but for the factor y.
    gate: Vec<Lanes<T>>,
    gb: Vec<Lanes<T>>,
    ga: Vec<Lanes<T>>,
    sums: Sums,
}

impl<T: Real> ChannelGradients<T> {
    #[inline(always)]
    fn new(dstate: usize) -> Self {
        let tokens = vec![[T::zero(); LANES]; TILE];
        ChannelGradients {
            G: vec![[T::zero(); LANES]; dstate],
            slope: tokens.clone(),
            dy: tokens.clone(),
            gate: tokens.clone(),
            gb: tokens.clone(),
            ga: tokens,
            sums: Sums::new(dstate),
        }
    }

    /// G after the tile's last token, unless later tokens of its run left it.
    #[inline(always)]
    fn enter(&mut self, gradients: &ScanGradients, block: &Block, tile: &Tile, last: bool) {
        if !tile.goes_on {
            self.G.fill([T::zero(); LANES]);
        }
        let last = gradients.dlast_state.filter(|_| last).map(|states| (states, tile.b));
        for (states, row) in gradients.dvarlen_states.zip(tile.ends).into_iter().chain(last) {
            let mut state = vec![[T::zero(); LANES]; self.G.len()];
            block.load_state(&states, row, &mut state);
            for (G, state) in self.G.iter_mut().zip(&state) {
                for l in 0..LANES {
                    G[l] += state[l];
                }
            }
        }
    }

    /// The arrays of a tile, from what `Channels::load` left.
    #[inline(always)]
    fn load(
        &mut self,
        inputs: &ScanInputs,
        gradients: &ScanGradients,
        channels: &Channels<T>,
        tile: &Tile,
    ) {
        let len = tile.len;
        let slope = self.slope[..len].as_flattened_mut();
        for (slope, &biased) in slope.iter_mut().zip(channels.delta.as_flattened()) {
            *slope = if inputs.delta_softplus { biased.softplus_grad() } else { T::one() };
        }
        match &gradients.dout {
            Some(dout) => channels.block.load_tokens(dout, tile, &mut self.dy),
            None => self.dy[..len].fill([T::zero(); LANES]),
        }
        if let Some(z) = &inputs.z {
            channels.block.load_tokens(z, tile, &mut self.gate);
            let dy = self.dy[..len].as_flattened_mut();
            for (dy, gate) in dy.iter_mut().zip(self.gate.as_flattened_mut()) {
                let (z, dout) = (*gate, *dy);
                *dy = dout * z.silu();
                *gate = dout * z.silu_grad();
            }
        }
        self.gb[..len].fill([T::zero(); LANES]);
        self.ga[..len].fill([T::zero(); LANES]);
    }

    /// The gradients of a tile's tokens, once all state indices have passed.
    #[inline(always)]
    fn store(&mut self, gradients: &ScanGradients, channels: &mut Channels<T>, tile: &Tile) {
        let len = tile.len;
        let Channels { block, D, u, delta, y, .. } = channels;
        let (D, mut dD, mut ddelta_bias) = (*D, [T::zero(); LANES], [T::zero(); LANES]);
        let (u, delta, slope) = (&u[..len], &delta[..len], &self.slope[..len]);
        let (dy, gb, ga) = (&self.dy[..len], &mut self.gb[..len], &mut self.ga[..len]);
        for t in 0..len {
            let (u, delta, slope, dy) = (u[t], delta[t], slope[t], dy[t]);
            let (mut du, mut ddelta) = (gb[t], ga[t]);
            for l in 0..LANES {
                ddelta[l] = (u[l] * du[l] + ddelta[l]) * slope[l];
                du[l] = delta[l] * du[l] + D[l] * dy[l];
                dD[l] += u[l] * dy[l];
                ddelta_bias[l] += ddelta[l];
            }
            (gb[t], ga[t]) = (du, ddelta);
        }
        add(&mut self.sums.dD, &dD);
        add(&mut self.sums.ddelta_bias, &ddelta_bias);
        block.store_tokens(&gradients.du, tile, gb);
        block.store_tokens(&gradients.ddelta, tile, ga);
        if let Some(dz) = &gradients.dz {
            for (gate, &y) in self.gate[..len].as_flattened_mut().iter_mut().zip(y.as_flattened()) {
                *gate *= y;
            }
            block.store_tokens(dz, tile, &self.gate);
        }
    }
}

/// Work arrays of one state index, (TILE, LANES).
struct Trace<T> {
    /// As `decay_factor` gives it.
    decay: Vec<Lanes<T>>,
    /// decay[t] state[t - 1]
    decayed: Vec<Lanes<T>>,
}

impl<T: Real> Trace<T> {
    /// Take one state index through the tile: y and dC, and what `reverse` needs.
    #[inline(always)]
    fn recompute(
        &mut self,
        channels: &mut Channels<T>,
        n: usize,
        len: usize,
        B: impl ByToken<T>,
        C: impl ByToken<T>,
        dy: &[Lanes<T>],
        dC: &mut [Lanes<T>],
    ) {
        let (decay, decayed) = (&mut self.decay[..len], &mut self.decayed[..len]);
        let (delta, input) = (&channels.delta[..len], &channels.input[..len]);
        let (y, dy, dC) = (&mut channels.y[..len], &dy[..len], &mut dC[..len]);
        let A = channels.A[n];
        let mut state = channels.state[n];
        for t in 0..len {
            let (delta, input, B, C, dy) = (delta[t], input[t], B.at(t), C.at(t), dy[t]);
            let (mut of_y, mut of_C) = (y[t], dC[t]);
            let (mut of_decay, mut of_decayed) = ([T::zero(); LANES], [T::zero(); LANES]);
            for l in 0..LANES {
                of_decay[l] = (delta[l] * A[l]).decay_factor();
                // `decayed` without and with what is added.
                let kept = if of_decay[l] < T::zero() { state[l] } else { T::zero() };
                let rest = of_decay[l] * state[l];
                of_decayed[l] = kept + rest;
                state[l] = kept + input[l].mul_add(B[l], rest);
                of_y[l] = C[l].mul_add(state[l], of_y[l]);
                of_C[l] = dy[l].mul_add(state[l], of_C[l]);
            }
            (decay[t], decayed[t], y[t], dC[t]) = (of_decay, of_decayed, of_y, of_C);
        }
    }

    /// Take G of one state index back through the tile: gb, ga, dB and dA.
    #[inline(always)]
    fn reverse(
        &self,
        channels: &Channels<T>,
        of: &mut ChannelGradients<T>,
        n: usize,
        len: usize,
        B: impl ByToken<T>,
        C: impl ByToken<T>,
        dB: &mut [Lanes<T>],
    ) {
        let (decay, decayed) = (&self.decay[..len], &self.decayed[..len]);
        let (delta, input) = (&channels.delta[..len], &channels.input[..len]);
        let (dy, dB) = (&of.dy[..len], &mut dB[..len]);
        let (gb, ga) = (&mut of.gb[..len], &mut of.ga[..len]);
        let A = channels.A[n];
        let mut G = of.G[n];
        let mut dA = [T::zero(); LANES];
        for t in (0..len).rev() {
            let (delta, input, B, C, dy) = (delta[t], input[t], B.at(t), C.at(t), dy[t]);
            let (decay, decayed) = (decay[t], decayed[t]);
            let (mut of_gb, mut of_ga, mut of_B) = (gb[t], ga[t], dB[t]);
            for l in 0..LANES {
                G[l] = C[l].mul_add(dy[l], G[l]);
                of_gb[l] = G[l].mul_add(B[l], of_gb[l]);
                of_B[l] = G[l].mul_add(input[l], of_B[l]);
                let ddecay = G[l] * decayed[l];
                of_ga[l] = A[l].mul_add(ddecay, of_ga[l]);
                dA[l] = delta[l].mul_add(ddecay, dA[l]);
                G[l] = G[l].decayed(decay[l], T::zero());
            }
            (gb[t], ga[t], dB[t]) = (of_gb, of_ga, of_B);
        }
        of.G[n] = G;
        add(&mut of.sums.dA[n], &dA);
    }
}

#[inline(always)]
fn backward_part<T: Real>(
    inputs: &ScanInputs,
    tiles: &Tiles,
    part: &Part,
    gradients: &ScanGradients,
) -> Partial<T> {
    let SelectiveScanDims { seqlen, dstate, .. } = inputs.dims;
    let mut walk = Walk::<T>::new(inputs, part);
    // The states that enter tiles within a run, (dstate, LANES) a block and tile.
    let mut carried: Vec<Lanes<T>> = Vec::new();
    for index in tiles.of(part.b) {
        let tile = &tiles.tiles[index];
        walk.enter(tile.entry);
        if tile.goes_on {
            walk.advance(tile);
            for channels in &walk.channels {
                carried.extend_from_slice(&channels.state);
            }
        }
    }

    let mut of_channels = Vec::new();
    for _ in &part.blocks {
        of_channels.push(ChannelGradients::<T>::new(dstate));
    }
    let mut dB = OperandGradient::<T>::new(&inputs.B, &inputs.dims);
    let mut dC = OperandGradient::<T>::new(&inputs.C, &inputs.dims);
    let mut trace =
        Trace { decay: vec![[T::zero(); LANES]; TILE], decayed: vec![[T::zero(); LANES]; TILE] };
    for index in tiles.of(part.b).rev() {
        let tile = &tiles.tiles[index];
        let len = tile.len;
        walk.enter(tile.entry);
        if tile.entry == Entry::Carried {
            for channels in walk.channels.iter_mut().rev() {
                let rest = carried.len() - dstate;
                channels.state.copy_from_slice(&carried[rest..]);
                carried.truncate(rest);
            }
        }
        walk.B.load(part.group, tile);
        walk.C.load(part.group, tile);
        for (channels, of) in walk.channels.iter_mut().zip(&mut of_channels) {
            of.enter(gradients, &channels.block, tile, tile.end() == seqlen);
            channels.load(inputs, tile);
            of.load(inputs, gradients, channels, tile);
            channels.discretize(inputs.delta_softplus, len);
        }
        for n in 0..dstate {
            for (i, (channels, of)) in walk.channels.iter_mut().zip(&mut of_channels).enumerate() {
                let (B, C) = (walk.B.row(n, i, len), walk.C.row(n, i, len));
                with_rows!(B, C => {
                    trace.recompute(channels, n, len, B, C, &of.dy, &mut dC.rows);
                    trace.reverse(channels, of, n, len, B, C, &mut dB.rows);
                });
                dB.end_block(len, &mut of.sums.dB[n]);
                dC.end_block(len, &mut of.sums.dC[n]);
            }
            dB.end_blocks(n * seqlen + tile.begin, len);
            dC.end_blocks(n * seqlen + tile.begin, len);
        }
        for (channels, of) in walk.channels.iter_mut().zip(&mut of_channels) {
            of.store(gradients, channels, tile);
            if let (Some(dinitial), Entry::Initial(row)) = (&gradients.dinitial_state, tile.entry) {
                channels.block.store_state(dinitial, row, &of.G);
            }
        }
    }
    let sums = of_channels.into_iter().map(|of| of.sums).collect();
    Partial { sums, dB: dB.tokens, dC: dC.tokens }
}
