//! Launchers of kernels/attention.cu, and the work lists of its blocks. Dh is 64, 128, 256 or 512; H is a multiple of K.

use std::ops::Range;

use super::chains::{Chains, window_of};
use super::entries::shared::attention::{
    FEW, KEYS, PART, THREADS, TILES, WIDE_COLUMNS, WIDE_EXCHANGE_BYTES, WIDE_THREADS,
};
use super::entries::{Entry, same_size};
use super::sections::{Arrays, Section};
use super::{Cuda, Tables, Tensor, narrow};
use crate::backend::{Attention, AttentionSpec, Batch, DType};
use crate::device::{Arg, Launch, Ptr};
use crate::segments::{QueryRun, Segments};

/// Keys of a split.
const SPLIT: usize = TILES * KEYS;
/// The most rows of an item of the large shape, and of the small one.
const MAX_ROWS: usize = 64;
const FEW_ROWS: usize = 16;

/// Bit of [`Item::kind`]: the item stores a state in the workspace.
const KIND_PART: u32 = PART as u32;
/// Bit of [`Item::kind`]: at most [`FEW_ROWS`] rows, and keys of one split.
const KIND_FEW: u32 = FEW as u32;

/// A tile of rows and a range of key positions. kernels/attention.cu explains the fields.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
struct Item {
    first: u32,
    rows: u32,
    low: u32,
    high: u32,
    begin: u32,
    end: u32,
    chain: u32,
    work_row: u32,
    kind: u32,
}

impl Item {
    /// Time of a block, in tiles of [`FEW_ROWS`] rows. A tile of [`MAX_ROWS`] rows counts twice, because it has about twice the
    /// wavefronts (at Dh = 512, 1.7 times).
    fn cost(&self) -> usize {
        let tiles = (self.end as usize).div_ceil(KEYS) - self.begin as usize / KEYS;
        if self.kind & KIND_FEW == 0 { 2 * tiles } else { tiles }
    }
}

/// Rows whose splits are merged. kernels/attention.cu explains the fields.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
struct MergeItem {
    first: u32,
    rows: u32,
    work_row: u32,
    stride: u32,
    splits: u32,
}

/// The items of a batch for one shape of heads and one window, on the host.
#[derive(Debug, Default)]
struct WorkList {
    /// At most [`MAX_ROWS`] rows each; but until [`WorkList::fill`], an item of one split has all rows that share the split.
    items: Vec<Item>,
    merge_items: Vec<MergeItem>,
    /// Rows of the workspace, for each kv head.
    work_rows: usize,
}

/// A [`WorkList`] on the device.
struct DeviceList {
    heads: Heads,
    window: usize,
    items: Section,
    /// Number of items.
    count: usize,
    /// Whether all items have few rows.
    few: bool,
    merge_items: Section,
    merge_count: usize,
    /// The most rows of a merge item.
    merge_rows: usize,
    work_rows: usize,
}

/// Attention's work lists for one batch, one for each pair of shape and window, on the device.
pub(super) struct DeviceLists {
    pub(super) chains: Chains,
    /// The chains' items.
    pub(super) chain_items: Section,
    lists: Vec<DeviceList>,
}

/// G and K.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Heads {
    group: usize,
    kv_heads: usize,
}

impl Heads {
    fn of(spec: &AttentionSpec) -> Self {
        Self { group: spec.heads / spec.kv_heads, kv_heads: spec.kv_heads }
    }
}

impl DeviceLists {
    /// Makes the lists and adds them to `arrays`.
    pub(super) fn new(
        arrays: &mut Arrays,
        batch: &Batch,
        specs: &[AttentionSpec],
        multiprocessors: u32,
    ) -> Self {
        let chains = Chains::new(batch.segments, batch.runs);
        let mut lists: Vec<DeviceList> = Vec::new();
        for spec in specs {
            let (heads, window) = (Heads::of(spec), window_of(spec));
            if lists.iter().any(|l| (l.heads, l.window) == (heads, window)) {
                continue;
            }
            let rows = batch.rows;
            let mut list = WorkList::new(batch.segments, batch.runs, rows, &chains, heads.group, window);
            list.fill(heads.kv_heads, multiprocessors as usize);
            lists.push(DeviceList {
                heads,
                window,
                items: arrays.add(&list.items),
                count: list.items.len(),
                few: list.items.iter().all(|i| i.kind & KIND_FEW != 0),
                merge_items: arrays.add(&list.merge_items),
                merge_count: list.merge_items.len(),
                merge_rows: list.merge_items.iter().map(|m| m.rows as usize).max().unwrap_or(0),
                work_rows: list.work_rows,
            });
        }
        Self { chain_items: arrays.add(&chains.items), chains, lists }
    }

    /// The same lists, given the address of the arrays that they are in.
    pub(super) fn at(mut self, base: Ptr) -> Self {
        self.chain_items = self.chain_items.at(base);
        for list in &mut self.lists {
            list.items = list.items.at(base);
            list.merge_items = list.merge_items.at(base);
        }
        self
    }
}

/// The position up to which the chains of two segments are the same rows.
fn common(segments: &Segments, a: usize, b: usize) -> usize {
    let (a, b) = (segments.chain(a), segments.chain(b));
    let last = a.iter().zip(&b).take_while(|(a, b)| a == b).last();
    last.map_or(0, |(&s, _)| segments.list()[s].position + segments.list()[s].len)
}

/// A run of few rows, which decode has.
struct Small {
    run: QueryRun,
    /// Positions of its queries.
    low: usize,
    high: usize,
    /// The first position that its first query sees.
    begin: usize,
    /// The position up to which it reaches keys through the same rows as the next run of its group.
    shared: usize,
}

impl Small {
    /// The splits of which it sees a key.
    fn splits(&self) -> Range<usize> {
        self.begin / SPLIT..self.high / SPLIT + 1
    }

    /// Whether it has several splits, which parts compute and the merge joins.
    fn in_parts(&self) -> bool {
        self.splits().len() > 1
    }

    /// The positions of a split that it sees.
    fn keys(&self, split: usize) -> Range<usize> {
        self.begin.max(split * SPLIT)..(self.high + 1).min((split + 1) * SPLIT)
    }

    /// Whether the same blocks compute a split for this run and for the next run of its group. They do if both runs see the last
    /// key of the split and reach it through the same row.
    fn shares(&self, split: usize, next: &Self) -> bool {
        let end = (split + 1) * SPLIT;
        let sees = |run: &Self| run.splits().contains(&split) && end <= run.high + 1;
        sees(self) && sees(next) && end <= self.shared && self.in_parts() == next.in_parts()
    }
}

impl WorkList {
    /// The list for query rows `0..query_rows`; rows that are in no run become items without keys.
    fn new(
        segments: &Segments,
        runs: &[QueryRun],
        query_rows: usize,
        chains: &Chains,
        group: usize,
        window: usize,
    ) -> Self {
        let mut list = Self::default();
        let mut runs: Vec<QueryRun> = runs.iter().copied().filter(|r| r.len > 0).collect();
        runs.sort_by_key(|r| r.row);
        let end_of = |r: &QueryRun| r.row + r.len;
        assert!(runs.windows(2).all(|w| end_of(&w[0]) <= w[1].row), "a query row belongs to one run");
        assert!(runs.last().is_none_or(|r| end_of(r) <= query_rows), "runs are rows of the batch");

        let mut at = 0;
        let mut rest = &runs[..];
        while let Some(run) = rest.first() {
            list.idle(at * group..run.row * group);
            let small = |r: &QueryRun| r.len * group <= MAX_ROWS;
            if !small(run) {
                list.large(*run, segments.first_position(run), chains.first(run.segment), group, window);
                at = end_of(run);
                rest = &rest[1..];
                continue;
            }
            // Small runs in neighbouring rows.
            let more = rest.windows(2).take_while(|w| end_of(&w[0]) == w[1].row && small(&w[1])).count();
            let (those, others) = rest.split_at(more + 1);
            let mut smalls: Vec<Small> = those
                .iter()
                .map(|&run| {
                    let low = segments.first_position(&run);
                    let begin = (low + 1).saturating_sub(window);
                    Small { run, low, high: low + run.len - 1, begin, shared: 0 }
                })
                .collect();
            for i in 1..smalls.len() {
                let (a, b) = (smalls[i - 1].run.segment, smalls[i].run.segment);
                smalls[i - 1].shared = common(segments, a, b);
            }
            list.smalls(&smalls, chains, group);
            at = end_of(&those[more]);
            rest = others;
        }
        list.idle(at * group..query_rows * group);
        list
    }

    /// Adds items for rows that belong to no run.
    fn idle(&mut self, rows: Range<usize>) {
        for first in rows.clone().step_by(FEW_ROWS) {
            let rows = narrow(FEW_ROWS.min(rows.end - first));
            self.items.push(Item { first: narrow(first), rows, kind: KIND_FEW, ..Item::default() });
        }
    }

    /// Adds whole items for a run of many rows, one for each tile of rows. The run's first query is at `position`.
    fn large(&mut self, run: QueryRun, position: usize, chain: u32, group: usize, window: usize) {
        let (from, to) = (run.row * group, (run.row + run.len) * group);
        for first in (from..to).step_by(MAX_ROWS) {
            let rows = MAX_ROWS.min(to - first);
            let position_of = |row: usize| position + row / group - run.row;
            let (low, high) = (position_of(first), position_of(first + rows - 1));
            self.items.push(Item {
                first: narrow(first),
                rows: narrow(rows),
                low: narrow(low),
                high: narrow(high),
                begin: narrow((low + 1).saturating_sub(window)),
                end: narrow(high + 1),
                chain,
                ..Item::default()
            });
        }
    }

    /// Adds items, and merge items, for small runs in neighbouring rows.
    fn smalls(&mut self, smalls: &[Small], chains: &Chains, group: usize) {
        let origin = smalls[0].run.row * group;
        let rows_of = |of: &[Small]| {
            let last = &of[of.len() - 1].run;
            of[0].run.row * group..(last.row + last.len) * group
        };
        let stride = rows_of(smalls).len();
        let splits = smalls.iter().map(|s| s.splits().start).min().unwrap_or(0)
            ..smalls.iter().map(|s| s.splits().end).max().unwrap_or(0);
        let base = self.work_rows;
        let work_row =
            |split: usize, row: usize| narrow(base + (split - splits.start) * stride + row - origin);
        if smalls.iter().any(Small::in_parts) {
            self.work_rows += splits.len() * stride;
        }
        for split in splits.clone() {
            for these in smalls.chunk_by(|a, b| a.shares(split, b)) {
                if !these[0].splits().contains(&split) {
                    continue;
                }
                let of_all = |f: fn(&Small) -> usize| these.iter().map(f);
                let keys = these.iter().map(|s| s.keys(split));
                let rows = rows_of(these);
                self.items.push(Item {
                    first: narrow(rows.start),
                    rows: narrow(rows.len()),
                    low: narrow(of_all(|s| s.low).min().unwrap_or(0)),
                    high: narrow(of_all(|s| s.high).max().unwrap_or(0)),
                    begin: narrow(keys.clone().map(|k| k.start).min().unwrap_or(0)),
                    end: narrow(keys.map(|k| k.end).max().unwrap_or(0)),
                    chain: chains.first(these[0].run.segment),
                    work_row: work_row(split, rows.start),
                    kind: if these[0].in_parts() { KIND_PART } else { 0 },
                });
            }
        }
        for small in smalls.iter().filter(|s| s.in_parts()) {
            let rows = rows_of(std::slice::from_ref(small));
            self.merge_items.push(MergeItem {
                first: narrow(rows.start),
                rows: narrow(rows.len()),
                work_row: work_row(small.splits().start, rows.start),
                stride: narrow(stride),
                splits: narrow(small.splits().len()),
            });
        }
    }

    /// The items, of which those of one split are cut so that none has more than `max_rows` rows.
    fn cut(&self, max_rows: usize) -> Vec<Item> {
        let mut items = Vec::with_capacity(self.items.len());
        for item in &self.items {
            if item.begin as usize / SPLIT != (item.end as usize).saturating_sub(1) / SPLIT {
                items.push(*item);
                continue;
            }
            for first in (0..item.rows).step_by(max_rows) {
                let rows = narrow(max_rows).min(item.rows - first);
                let few = if rows as usize <= FEW_ROWS { KIND_FEW } else { 0 };
                let (work_row, kind) = (item.work_row + first, item.kind | few);
                items.push(Item { first: item.first + first, rows, work_row, kind, ..*item });
            }
        }
        items
    }

    /// Cuts the items for the shape with which `multiprocessors` end first, and sorts them. The bits of a row do not depend on
    /// the shape that computes it.
    fn fill(&mut self, kv_heads: usize, multiprocessors: usize) {
        let multiprocessors = multiprocessors.max(1);
        let time = |items: &[Item]| {
            let costs = items.iter().map(Item::cost);
            (costs.clone().sum::<usize>() * kv_heads).div_ceil(multiprocessors).max(costs.max().unwrap_or(0))
        };
        let [many, few] = [MAX_ROWS, FEW_ROWS].map(|rows| self.cut(rows));
        self.items = if time(&few) < time(&many) { few } else { many };
        // The longest first, so that no long item begins when the others end.
        self.items.sort_by_key(|item| std::cmp::Reverse(item.cost()));
        if !self.merge_items.is_empty() {
            // Lengths are rounded up so that the launches of decode steps repeat while responses grow and end. The block of an
            // item without rows ends at once.
            let waves = self.items.len().next_multiple_of(multiprocessors);
            self.items.resize(waves, Item { kind: KIND_FEW, ..Item::default() });
            self.merge_items.resize(self.merge_items.len().next_power_of_two(), MergeItem::default());
            self.work_rows = self.work_rows.next_power_of_two();
        }
    }
}

/// The kernel's `Params`.
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
struct Params {
    q: u64,
    k: u64,
    v: u64,
    o: u64,
    lse: u64,
    items: u64,
    merge_items: u64,
    chains: u64,
    positions: u64,
    work: u64,
    work_rows: u32,
    group: u32,
    window: u32,
    inner: f32,
    outer: f32,
    /// C++ rounds the size up to that of the pointers.
    padding: u32,
}

same_size!(attention: Item = ITEM_BYTES, MergeItem = MERGE_ITEM_BYTES, Params = PARAMS_BYTES);

impl Attention for Cuda {
    /// Head widths 64, 128, 256 and 512.
    fn attention_forward(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        tables: &Tables,
        spec: &AttentionSpec,
    ) -> (Tensor, Tensor) {
        let AttentionSpec { heads, kv_heads, head_dim, .. } = *spec;
        assert!(heads.is_multiple_of(kv_heads) && spec.window != Some(0) && spec.scale > 0.0);
        assert!([q, k, v].iter().all(|x| x.dtype == DType::Bf16));
        assert!(q.cols == heads * head_dim && k.cols == kv_heads * head_dim && v.cols == k.cols);
        assert!(q.rows == tables.rows && tables.segments.rows() <= k.rows.min(v.rows));
        let [any, few, merge] = match head_dim {
            64 => [
                Entry::AttentionForward64Rows64,
                Entry::AttentionForward64Rows16,
                Entry::AttentionForward64Merge,
            ],
            128 => [
                Entry::AttentionForward128Rows64,
                Entry::AttentionForward128Rows16,
                Entry::AttentionForward128Merge,
            ],
            256 => [
                Entry::AttentionForward256Rows64,
                Entry::AttentionForward256Rows16,
                Entry::AttentionForward256Merge,
            ],
            512 => [
                Entry::AttentionForward512Rows64,
                Entry::AttentionForward512Rows16,
                Entry::AttentionForward512Merge,
            ],
            _ => panic!("heads of 64, 128, 256 or 512, not {head_dim}"),
        };
        let (shape, window) = (Heads::of(spec), window_of(spec));
        let list = tables.attention.lists.iter().find(|l| (l.heads, l.window) == (shape, window));
        let list = list.expect("the batch's tables know every layer's attention");

        let o = self.empty(DType::Bf16, q.rows, q.cols);
        let lse = self.empty(DType::F32, q.rows, heads);
        // o, m and l of each row.
        let work = self.memory(list.work_rows * kv_heads * (head_dim + 2) * 4);
        let (inner, outer) = match spec.softcap {
            None => (0.0, spec.scale),
            Some(c) => (spec.scale / c, c),
        };
        let address = |Ptr(x): Ptr| x;
        let params = Params {
            q: address(q.memory.ptr()),
            k: address(k.memory.ptr()),
            v: address(v.memory.ptr()),
            o: address(o.memory.ptr()),
            lse: address(lse.memory.ptr()),
            items: address(list.items.ptr()),
            merge_items: address(list.merge_items.ptr()),
            chains: address(tables.attention.chain_items.ptr()),
            positions: address(tables.positions.ptr()),
            work: address(work.ptr()),
            work_rows: narrow(list.work_rows),
            group: narrow(shape.group),
            window: narrow(window),
            inner,
            outer: outer * std::f32::consts::LOG2_E,
            padding: 0,
        };
        let args = [Arg::Bytes(bytemuck::bytes_of(&params).to_vec())];
        let wide = head_dim == 512;
        // Two stages of K or V: tiles of keys, but at a width of 512 halves of them and, for many rows, some columns of a split.
        let stages = match (list.few, wide) {
            (_, false) => SPLIT * head_dim,
            (true, true) => SPLIT * head_dim / 2,
            (false, true) => 2 * SPLIT * WIDE_COLUMNS,
        };
        let (entry, threads, shared) = match list.few {
            // Q or p; stages; the Exchange: for each tile a f32 for each warp and row, and for each warp, row and thread of a quad.
            true => {
                let exchange = 2 * 4 * FEW_ROWS * (1 + 4) * 4;
                (few, THREADS, (FEW_ROWS * head_dim.max(SPLIT) + stages) * 2 + exchange)
            }
            // Q; stages; m and l, and what wide items exchange.
            false => {
                let exchange = if wide { WIDE_EXCHANGE_BYTES } else { MAX_ROWS * 8 };
                (
                    any,
                    if wide { WIDE_THREADS } else { THREADS },
                    (MAX_ROWS * head_dim + stages) * 2 + exchange,
                )
            }
        };
        let mut launch = Launch::linear(list.count, threads as u32).shared(shared);
        launch.grid[1] = narrow(kv_heads);
        self.launch(entry, launch, &args);
        let mut launch = Launch::linear(list.merge_count, 32);
        launch.grid[1] = narrow(kv_heads);
        launch.grid[2] = narrow(list.merge_rows);
        self.launch(merge, launch, &args);
        (o, lse)
    }
}
