//! Where each row of a batch keeps its state.

use std::collections::HashSet;

use crate::error::{Error, Result};
use crate::tensor::View;

/// The slot of each row of a batch, no slot twice, so that rows can be written side by side.
pub struct Slots(Vec<Option<usize>>);

impl Slots {
    /// `indices` (batch,) into `count` slots, -1 for a row of padding; without them row b has slot b.
    pub fn new(
        arg: &'static str,
        indices: Option<&View<1>>,
        batch: usize,
        count: usize,
    ) -> Result<Self> {
        let Some(indices) = indices else {
            return Ok(Slots((0..batch).map(Some).collect()));
        };
        let mut taken = HashSet::new();
        let slot = |b| {
            let index = indices.get_int([b]);
            if index == -1 {
                return Ok(None);
            }
            let slot = usize::try_from(index).ok().filter(|&slot| slot < count);
            let Some(slot) = slot else {
                return Err(Error::Value {
                    arg,
                    got: format!("{index} at row {b}"),
                    allowed: format!(
                        "0 to slots - 1 = {}, or -1 for a padding row",
                        count as i64 - 1
                    ),
                });
            };
            if !taken.insert(slot) {
                return Err(Error::Value {
                    arg,
                    got: format!("slot {slot} a second time at row {b}"),
                    allowed: "each slot at most once".into(),
                });
            }
            Ok(Some(slot))
        };
        Ok(Slots((0..batch).map(slot).collect::<Result<_>>()?))
    }

    /// None: row `b` is padding. It has no state and its result is zero.
    pub fn get(&self, b: usize) -> Option<usize> {
        self.0[b]
    }
}
