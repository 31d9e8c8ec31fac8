//! A batch on the device: the small arrays that the ops of a forward pass read beside their tensors, uploaded as one.

use std::sync::Arc;

use super::attention::DeviceLists;
use super::sections::{Arrays, Section};
use super::{Cuda, Draws, Memory};
use crate::backend::{AttentionSpec, Batch, Batches, Decode};
use crate::device::Ptr;
use crate::segments::{QueryRun, Segments};

/// The tokens of a batch.
pub(super) enum Tokens {
    /// Ids `[T]`: on the host, where the embedding's gradient sorts them, and on the device.
    Known(Vec<u32>, Section),
    /// The latest draw's (token, log-prob) of each row, and for each token its row in the draw `[T]`.
    Drawn(Arc<Memory>, Section),
}

/// See [`Batches::tables`].
pub struct Tables {
    /// T.
    pub(super) rows: usize,
    /// The tokens.
    pub(super) tokens: Tokens,
    /// The segments, on the host, from which attention's work lists are made.
    pub(super) segments: Segments,
    /// Which tokens of the segments the rows are.
    pub(super) runs: Vec<QueryRun>,
    /// Absolute positions `[T]`.
    pub(super) positions: Section,
    /// The key/value row of every row `[T]`.
    pub(super) kv_rows: Section,
    /// Attention's work lists.
    pub(super) attention: DeviceLists,
    /// The work lists of attention's gradient.
    pub(super) attention_backward: super::attention_backward::DeviceLists,
    /// The memory of all sections.
    _memory: Memory,
}

impl Tables {
    /// Uploads `arrays` together with positions and rows.
    fn with(
        cuda: &Cuda,
        mut arrays: Arrays,
        batch: &Batch,
        attention: DeviceLists,
        tokens: impl FnOnce(Ptr) -> Tokens,
    ) -> Self {
        let positions = arrays.add(&batch.positions());
        let kv_rows = arrays.add(&batch.kv_rows());
        let memory = cuda.array(arrays.bytes());
        let base = memory.ptr();
        Self {
            rows: batch.rows,
            tokens: tokens(base),
            segments: batch.segments.clone(),
            runs: batch.runs.to_vec(),
            positions: positions.at(base),
            kv_rows: kv_rows.at(base),
            attention: attention.at(base),
            attention_backward: Default::default(),
            _memory: memory,
        }
    }
}

impl Batches for Cuda {
    fn tables(&self, batch: &Batch, attention: &[AttentionSpec]) -> Tables {
        let mut arrays = Arrays::default();
        let ids = arrays.add(batch.ids);
        let lists = DeviceLists::new(&mut arrays, batch, attention, self.device().multiprocessors());
        Tables::with(self, arrays, batch, lists, |base| Tokens::Known(batch.ids.to_vec(), ids.at(base)))
    }

    fn decode_tables(&self, step: &Decode<Draws>, attention: &[AttentionSpec]) -> Tables {
        assert!(step.from.iter().all(|&row| (row as usize) < step.draws.room), "rows of the draw");
        let mut arrays = Arrays::default();
        let (from, batch) = (arrays.add(step.from), step.with_ids(&[]));
        let lists = DeviceLists::new(&mut arrays, &batch, attention, self.device().multiprocessors());
        // The size is rounded up, so that there are few sizes and steps repeat to the address.
        arrays.round_up();
        let tokens = |base| Tokens::Drawn(Arc::clone(&step.draws.latest), from.at(base));
        Tables::with(self, arrays, &batch, lists, tokens)
    }
}
