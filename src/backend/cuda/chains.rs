//! Where the kernels of attention and of its gradient find the keys that a query sees: chains of segments, and windows.

use super::entries::same_size;
use super::narrow;
use crate::backend::AttentionSpec;
use crate::segments::{QueryRun, Segments};

/// The value of `window` that means no window.
const NO_WINDOW: usize = 1 << 31;

/// The kernels' `window`: tokens that a query sees, its own included.
pub(super) fn window_of(spec: &AttentionSpec) -> usize {
    spec.window.map_or(NO_WINDOW, |w| w.min(NO_WINDOW))
}

/// A segment of a chain. Its keys, at positions from the `end` of the item before up to `end`, lie in rows position + delta.
#[derive(Debug, Clone, Copy, PartialEq, Eq, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
pub(super) struct ChainItem {
    pub(super) end: u32,
    pub(super) delta: i32,
}

same_size!(attention: ChainItem = CHAIN_ITEM_BYTES);

/// The chains of the segments that contain queries.
pub(super) struct Chains {
    pub(super) items: Vec<ChainItem>,
    /// By segment: index in `items` of the first item of its chain; `None` if the segment contains no query.
    first: Vec<Option<u32>>,
}

impl Chains {
    pub(super) fn new(segments: &Segments, runs: &[QueryRun]) -> Self {
        let list = segments.list();
        let mut chains = Self { items: Vec::new(), first: vec![None; list.len()] };
        for run in runs.iter().filter(|run| run.len > 0) {
            if chains.first[run.segment].is_some() {
                continue;
            }
            chains.first[run.segment] = Some(narrow(chains.items.len()));
            let chain = segments.chain(run.segment).into_iter().map(|s| list[s]);
            chains.items.extend(chain.filter(|s| s.len > 0).map(|s| ChainItem {
                end: narrow(s.position + s.len),
                delta: i32::try_from(s.start as i64 - s.position as i64).expect("rows fit 31 bits"),
            }));
        }
        chains
    }

    /// The index of the first item of the chain of a segment that contains queries.
    pub(super) fn first(&self, segment: usize) -> u32 {
        self.first[segment].expect("a segment with queries")
    }
}
