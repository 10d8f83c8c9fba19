//! Documents packed into a sequence: a new one starts wherever `seq_idx` differs from the token before.

use crate::tensor::View;

/// For each token, the index of the first token of its document. Empty without seq_idx: all is one document.
pub struct Documents {
    starts: Vec<usize>,
    seqlen: usize,
}

impl Documents {
    pub fn new(seq_idx: Option<&View<2>>) -> Self {
        let Some(seq_idx) = seq_idx else {
            return Documents { starts: Vec::new(), seqlen: 0 };
        };
        let [batch, seqlen] = seq_idx.shape;
        let mut starts = Vec::with_capacity(batch * seqlen);
        for b in 0..batch {
            let mut start = 0;
            for t in 0..seqlen {
                if t > 0 && seq_idx.get_i32([b, t]) != seq_idx.get_i32([b, t - 1]) {
                    start = t;
                }
                starts.push(start);
            }
        }
        Documents { starts, seqlen }
    }

    /// The first token of the document that token `t` of sequence `b` belongs to. Initial states, which stand for what
    /// came before token 0, belong to the document that starts at 0.
    #[inline(always)]
    pub fn start(&self, b: usize, t: usize) -> usize {
        if self.starts.is_empty() { 0 } else { self.starts[b * self.seqlen + t] }
    }
}
