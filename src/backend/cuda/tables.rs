//! A batch on the device: what every op of a forward pass reads beside its tensors, uploaded once.

use super::attention::Plans;
use super::{Cuda, Memory};
use crate::backend::{AttentionSpec, Batch};
use crate::segments::{QueryRun, Segments};

/// See [`crate::backend::Backend::tables`].
pub struct Tables {
    /// Token ids `[T]`, on the host: the embedding's gradient sorts them.
    pub(super) ids: Vec<u32>,
    /// The segment table, on the host: attention's work lists are made from it.
    pub(super) segments: Segments,
    /// Which tokens the rows are.
    pub(super) runs: Vec<QueryRun>,
    /// Token ids `[T]`.
    pub(super) device_ids: Memory,
    /// Absolute positions `[T]`.
    pub(super) positions: Memory,
    /// The key/value row of every row `[T]`.
    pub(super) kv_rows: Memory,
    /// Attention's work lists.
    pub(super) attention: Plans,
    /// What the blocks of attention's gradient do.
    pub(super) attention_backward: super::attention_backward::Plans,
}

impl Tables {
    pub(super) fn new(cuda: &Cuda, batch: &Batch, attention: &[AttentionSpec]) -> Self {
        Self {
            ids: batch.ids.to_vec(),
            segments: batch.segments.clone(),
            runs: batch.runs.to_vec(),
            device_ids: cuda.table(batch.ids),
            positions: cuda.table(batch.positions),
            kv_rows: cuda.table(&batch.kv_rows()),
            attention: Plans::new(cuda, batch, attention),
            attention_backward: Default::default(),
        }
    }
}
