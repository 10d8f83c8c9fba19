//! Documents packed into sequences, and tiles of tokens that never cross from one into the next.
//!
//! A *run* is what shares a state: it starts at a sequence's first token, wherever `seq_idx` differs from the token
//! before, and at each value of `cu_seqlens`. A *document* is what has a row in the states that go in and out: with
//! `cu_seqlens` the tokens between two of its values (one run, or several where seq_idx cuts it, or none), without it a
//! whole sequence. Tokens past the last value of `cu_seqlens` are a run that belongs to no document.
//!
//! `of_chunks` is the other way to say it: chunks in order, the document of each, a row of states for every chunk.

use std::ops::Range;

use crate::error::{Error, Result};
use crate::tensor::View;

/// What lies before a tile: for a scan the state, for the convolution the inputs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// Nothing: a run that starts without an initial state.
    Zero,
    /// This row of initial_states.
    Initial(usize),
    /// What the tile before left: the run goes on.
    Carried,
}

/// Consecutive tokens of one run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tile {
    pub b: usize,
    pub begin: usize,
    pub len: usize,
    pub entry: Entry,
    /// Whether the next tile carries on from this one.
    pub goes_on: bool,
    /// The row of document (or chunk) states that is the state after this tile.
    pub ends: Option<usize>,
    /// Whether the run's seq_idx is negative.
    pub negative_id: bool,
}

impl Tile {
    pub fn end(&self) -> usize {
        self.begin + self.len
    }
}

/// The tiles of a batch, sequence after sequence.
pub struct Tiles {
    pub tiles: Vec<Tile>,
    /// Where each sequence's tiles begin, and the end.
    offsets: Vec<usize>,
}

impl Tiles {
    /// Indices into `tiles` of the tiles of sequence `b`.
    pub fn of(&self, b: usize) -> Range<usize> {
        self.offsets[b]..self.offsets[b + 1]
    }

    /// Consecutive tiles of at least `tokens` tokens together: work for a task, however short the documents are.
    pub fn groups(&self, tokens: usize) -> Vec<Range<usize>> {
        let mut groups = Vec::new();
        let (mut begin, mut sum) = (0, 0);
        for (index, tile) in self.tiles.iter().enumerate() {
            sum += tile.len;
            if sum >= tokens || index + 1 == self.tiles.len() {
                groups.push(begin..index + 1);
                (begin, sum) = (index + 1, 0);
            }
        }
        groups
    }
}

pub struct Documents {
    batch: usize,
    /// Tokens of each sequence that belong to a run: with chunks those up to the last one.
    pub seqlen: usize,
    /// Each run (or chunk) as a tile of any length.
    runs: Vec<Tile>,
    /// Documents (or chunks) without a token, and what lies before them.
    empty: Vec<(usize, Entry)>,
    initial: InitialRows,
}

/// Which document each row of initial_states belongs to.
#[derive(Clone, Copy)]
enum InitialRows {
    None,
    First,
    Each,
}

impl Documents {
    /// `seq_idx` (batch, seqlen), `cu_seqlens` (ndocs + 1,), and the first size of initial_states: that of the documents,
    /// or 1 for the first document alone.
    pub fn new(
        batch: usize,
        seqlen: usize,
        seq_idx: Option<&View<2>>,
        cu_seqlens: Option<&View<1>>,
        initial_rows: Option<usize>,
    ) -> Result<Self> {
        let bounds = cu_seqlens.map(|values| bounds("cu_seqlens", values, seqlen)).transpose()?;
        let ndocs = bounds.as_ref().map_or(batch, |bounds| bounds.len() - 1);
        let initial = match initial_rows {
            None => InitialRows::None,
            Some(rows) if rows == ndocs => InitialRows::Each,
            Some(_) => InitialRows::First,
        };
        let mut documents =
            Documents { batch, seqlen, runs: Vec::new(), empty: Vec::new(), initial };
        match &bounds {
            Some(bounds) => {
                for (document, tokens) in bounds.windows(2).enumerate() {
                    documents.push(0, tokens[0]..tokens[1], Some(document), seq_idx);
                }
                documents.push(0, bounds[ndocs]..seqlen, None, seq_idx);
            }
            None => {
                for b in 0..batch {
                    documents.push(b, 0..seqlen, Some(b), seq_idx);
                }
            }
        }
        Ok(documents)
    }

    /// One sequence in the caller's chunks: `cu_chunk_seqlens` (nchunks + 1,) bounds them, `seq_idx` (nchunks,) has the
    /// document of each, which is its row of initial_states. States have a row a chunk.
    pub fn of_chunks(
        seqlen: usize,
        cu_chunk_seqlens: &View<1>,
        seq_idx: &View<1>,
        initial_rows: Option<usize>,
    ) -> Result<Self> {
        let bounds = bounds("cu_chunk_seqlens", cu_chunk_seqlens, seqlen)?;
        let initial = initial_rows.map_or(InitialRows::None, |_| InitialRows::Each);
        let seqlen = bounds.last().copied().unwrap_or(0);
        let mut documents =
            Documents { batch: 1, seqlen, runs: Vec::new(), empty: Vec::new(), initial };
        let mut started = false;
        for (chunk, tokens) in bounds.windows(2).enumerate() {
            let id = seq_idx.get_int([chunk]);
            let document = index("seq_idx", id, initial_rows)?;
            started &= chunk > 0 && id == seq_idx.get_int([chunk - 1]);
            let entry = if started { Entry::Carried } else { documents.entry(document) };
            if tokens[0] == tokens[1] {
                documents.empty.push((chunk, entry));
                continue;
            }
            if let (true, Some(before)) = (started, documents.runs.last_mut()) {
                before.goes_on = true;
            }
            started = true;
            documents.runs.push(Tile {
                b: 0,
                begin: tokens[0],
                len: tokens[1] - tokens[0],
                entry,
                goes_on: false,
                ends: Some(chunk),
                negative_id: false,
            });
        }
        Ok(documents)
    }

    /// The runs of one document.
    fn push(
        &mut self,
        b: usize,
        tokens: Range<usize>,
        document: Option<usize>,
        seq_idx: Option<&View<2>>,
    ) {
        if tokens.is_empty() {
            self.empty.extend(document.map(|document| (document, self.entry(document))));
            return;
        }
        let id = |t: usize| seq_idx.map_or(0, |seq_idx| seq_idx.get_int([b, t]));
        let mut begin = tokens.start;
        let mut entry = document.map_or(Entry::Zero, |document| self.entry(document));
        for t in tokens.start + 1..=tokens.end {
            if t == tokens.end || id(t) != id(t - 1) {
                self.runs.push(Tile {
                    b,
                    begin,
                    len: t - begin,
                    entry,
                    goes_on: false,
                    ends: document.filter(|_| t == tokens.end),
                    negative_id: id(begin) < 0,
                });
                (begin, entry) = (t, Entry::Zero);
            }
        }
    }

    /// What lies before a document.
    pub fn entry(&self, document: usize) -> Entry {
        match self.initial {
            InitialRows::Each => Entry::Initial(document),
            InitialRows::First if document == 0 => Entry::Initial(0),
            _ => Entry::Zero,
        }
    }

    /// Rows of document (or chunk) states that no token writes, and what lies before them: their state.
    pub fn empty(&self) -> &[(usize, Entry)] {
        &self.empty
    }

    /// The tokens in tiles of `size`, shorter only at the end of a run.
    pub fn tiles(&self, size: usize) -> Tiles {
        let mut tiles = Vec::new();
        let mut offsets = vec![0; self.batch + 1];
        for run in &self.runs {
            let end = run.end();
            for begin in (run.begin..end).step_by(size) {
                let len = size.min(end - begin);
                let last = begin + len == end;
                tiles.push(Tile {
                    begin,
                    len,
                    entry: if begin == run.begin { run.entry } else { Entry::Carried },
                    goes_on: run.goes_on || !last,
                    ends: run.ends.filter(|_| last),
                    ..*run
                });
            }
            offsets[run.b + 1] = tiles.len();
        }
        for b in 0..self.batch {
            offsets[b + 1] = offsets[b + 1].max(offsets[b]);
        }
        Tiles { tiles, offsets }
    }
}

/// `value` as an index, below `size` where there is one.
pub fn index(arg: &'static str, value: i64, size: Option<usize>) -> Result<usize> {
    let index = usize::try_from(value).ok();
    index.filter(|&index| size.is_none_or(|size| index < size)).ok_or_else(|| Error::Value {
        arg,
        got: value.to_string(),
        allowed: match size {
            Some(size) => format!("values >= 0 and below {size}"),
            None => "values >= 0".into(),
        },
    })
}

/// The values of cumulative lengths: 0, then none smaller than the one before, at most seqlen.
pub fn bounds(arg: &'static str, cumulative: &View<1>, seqlen: usize) -> Result<Vec<usize>> {
    let values: Vec<i64> = (0..cumulative.shape[0]).map(|i| cumulative.get_int([i])).collect();
    let grows = values.windows(2).all(|pair| pair[0] <= pair[1]);
    let ends = values.last().is_some_and(|&last| last <= seqlen as i64);
    if values.first() != Some(&0) || !grows || !ends {
        let allowed = format!(
            "values from 0, none smaller than the one before, to at most seqlen = {seqlen}"
        );
        return Err(Error::Value { arg, got: format!("{values:?}"), allowed });
    }
    Ok(values.into_iter().map(|value| value as usize).collect())
}
