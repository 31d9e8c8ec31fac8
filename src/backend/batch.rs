//! What ops compute: tokens, flat, with who attends to whom.

use super::attention::AttentionSpec;
use super::platform::Platform;
use crate::segments::{QueryRun, Segment, Segments};

/// Tokens to run: flat, with who attends to whom.
#[derive(Debug, Clone, Copy)]
pub struct Batch<'a> {
    /// Token ids `[T]`; empty in a step of decoding whose tokens the host does not know.
    pub ids: &'a [u32],
    /// T.
    pub rows: usize,
    /// The segment table of the key/value rows.
    pub segments: &'a Segments,
    /// Which tokens the rows of this batch are.
    pub runs: &'a [QueryRun],
}

impl<'a> Batch<'a> {
    /// These tokens.
    pub fn new(ids: &'a [u32], segments: &'a Segments, runs: &'a [QueryRun]) -> Self {
        Self { ids, rows: ids.len(), segments, runs }
    }

    /// The absolute position of every query row; 0 of those that belong to no run.
    pub fn positions(&self) -> Vec<u32> {
        self.by_row(|segment| segment.position)
    }

    /// The key/value row of every query row; 0 of those that belong to no run.
    pub fn kv_rows(&self) -> Vec<u32> {
        self.by_row(|segment| segment.start)
    }

    /// The tokens of some of the rows, which ascend, and which those are.
    pub fn narrowed(&self, rows: &[u32]) -> (Vec<u32>, Vec<QueryRun>) {
        let ids = rows.iter().map(|&row| self.ids[row as usize]).collect();
        let mut runs: Vec<QueryRun> = Vec::new();
        for run in self.runs {
            let begin = rows.partition_point(|&row| (row as usize) < run.row);
            let end = rows.partition_point(|&row| (row as usize) < run.row + run.len);
            let mut at = begin;
            for next in rows[begin..end].chunk_by(|a, b| a + 1 == *b) {
                let first = run.first + next[0] as usize - run.row;
                runs.push(QueryRun { segment: run.segment, first, len: next.len(), row: at });
                at += next.len();
            }
        }
        (ids, runs)
    }

    /// A number of every query row that counts up from what `first` says of its segment.
    fn by_row(&self, first: fn(&Segment) -> usize) -> Vec<u32> {
        let mut numbers = vec![0; self.rows];
        for run in self.runs {
            let begin = first(&self.segments.list()[run.segment]) + run.first;
            for (number, t) in numbers[run.row..run.row + run.len].iter_mut().zip(begin..) {
                *number = t as u32;
            }
        }
        numbers
    }
}

/// A step of decoding: one more token of each of many streams, as the latest draw left it.
#[derive(Debug, Clone, Copy)]
pub struct Decode<'a, D> {
    /// Where that draw is.
    pub draws: &'a D,
    /// Which of its rows each token is from `[T]`.
    pub from: &'a [u32],
    /// The segment table of the key/value rows.
    pub segments: &'a Segments,
    /// Which tokens the rows of this step are.
    pub runs: &'a [QueryRun],
}

impl<'a, D> Decode<'a, D> {
    /// The step as a batch of tokens that are known.
    pub fn with_ids(&self, ids: &'a [u32]) -> Batch<'a> {
        Batch { ids, rows: self.from.len(), segments: self.segments, runs: self.runs }
    }
}

/// A batch where ops can read it.
pub trait Batches: Platform {
    /// Prepares a batch, once for each forward pass. `attention` holds every [`AttentionSpec`] of the pass.
    fn tables(&self, batch: &Batch, attention: &[AttentionSpec]) -> Self::Tables;
    /// The same of a step of decoding, whose tokens the host need not know. A draw of what is no token, from a row of
    /// NaN, stands for any token: whoever takes the draw sees its log-prob.
    fn decode_tables(&self, step: &Decode<Self::Draws>, attention: &[AttentionSpec]) -> Self::Tables;
}
