//! A batch on the device: what every op of a forward pass reads beside its tensors, uploaded at once.

use std::sync::Arc;

use super::attention::Plans;
use super::{Cuda, Draws, Memory};
use crate::backend::{AttentionSpec, Batch, Decode};
use crate::device::{Arg, Ptr};
use crate::segments::{QueryRun, Segments};

/// The tokens of a batch.
pub(super) enum Tokens {
    /// Their ids `[T]`, on the host, where the embedding's gradient sorts them, and on the device.
    Known(Vec<u32>, Section),
    /// A draw's (token, log-prob) by row, and the row of each token `[T]`.
    Drawn(Arc<Memory>, Section),
}

/// See [`crate::backend::Backend::tables`].
pub struct Tables {
    /// T.
    pub(super) rows: usize,
    /// The tokens.
    pub(super) tokens: Tokens,
    /// The segment table, on the host: attention's work lists are made from it.
    pub(super) segments: Segments,
    /// Which tokens the rows are.
    pub(super) runs: Vec<QueryRun>,
    /// Absolute positions `[T]`.
    pub(super) positions: Section,
    /// The key/value row of every row `[T]`.
    pub(super) kv_rows: Section,
    /// Attention's work lists.
    pub(super) attention: Plans,
    /// What the blocks of attention's gradient do.
    pub(super) attention_backward: super::attention_backward::Plans,
    /// What the sections lie in.
    _memory: Memory,
}

impl Tables {
    pub(super) fn new(cuda: &Cuda, batch: &Batch, attention: &[AttentionSpec]) -> Self {
        let mut pack = Pack::default();
        let ids = pack.add(batch.ids);
        let plans = Plans::new(&mut pack, batch, attention, cuda.device().multiprocessors());
        Self::with(cuda, pack, batch, plans, |base| Tokens::Known(batch.ids.to_vec(), ids.at(base)))
    }

    /// See [`crate::backend::Backend::decode_tables`].
    pub(super) fn of_step(cuda: &Cuda, step: &Decode<Draws>, attention: &[AttentionSpec]) -> Self {
        assert!(step.from.iter().all(|&row| (row as usize) < step.draws.room), "rows of the draw");
        let mut pack = Pack::default();
        let (from, batch) = (pack.add(step.from), step.with_ids(&[]));
        let plans = Plans::new(&mut pack, &batch, attention, cuda.device().multiprocessors());
        // Few sizes, so that steps repeat to the address.
        pack.bytes.resize(pack.bytes.len().next_power_of_two(), 0);
        let tokens = |base| Tokens::Drawn(Arc::clone(&step.draws.latest), from.at(base));
        Self::with(cuda, pack, &batch, plans, tokens)
    }

    /// Uploads what was packed, with the rest.
    fn with(
        cuda: &Cuda,
        mut pack: Pack,
        batch: &Batch,
        attention: Plans,
        tokens: impl FnOnce(Ptr) -> Tokens,
    ) -> Self {
        let positions = pack.add(batch.positions);
        let kv_rows = pack.add(&batch.kv_rows());
        let memory = cuda.table(&pack.bytes);
        let base = memory.ptr();
        Self {
            rows: batch.positions.len(),
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

/// Small tables that are uploaded as one.
#[derive(Default)]
pub(super) struct Pack {
    bytes: Vec<u8>,
}

/// A table among others: where it begins in their [`Pack`], until [`Section::at`] says where that lies.
#[derive(Debug, Clone, Copy)]
pub(super) struct Section(Ptr);

impl Pack {
    /// Adds a table, aligned to 16 bytes.
    pub(super) fn add<T: bytemuck::NoUninit>(&mut self, data: &[T]) -> Section {
        self.bytes.resize(self.bytes.len().next_multiple_of(16), 0);
        let section = Section(Ptr(self.bytes.len() as u64));
        self.bytes.extend_from_slice(bytemuck::cast_slice(data));
        section
    }
}

impl Section {
    /// The table on the device, its pack being at `base`.
    pub(super) fn at(self, base: Ptr) -> Self {
        Self(Ptr(base.0 + self.0.0))
    }

    /// Its address as a kernel's argument.
    pub(super) fn arg(&self) -> Arg {
        Arg::Ptr(self.0)
    }

    /// Its address.
    pub(super) fn ptr(&self) -> Ptr {
        self.0
    }
}
