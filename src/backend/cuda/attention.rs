//! Launchers of kernels/attention.cu, and the work lists that they run.
//!
//! Restrictions: Dh is 64, 128 or 256; H is a multiple of K.

use std::ops::Range;

use super::entries::Entry;
use super::tables::{Pack, Section};
use super::workload::{Shape, Workload, random};
use super::{Cuda, Tables, Tensor, narrow};
use crate::backend::{AttentionSpec, Backend, Batch, DType};
use crate::device::{Arg, Launch, Ptr};
use crate::segments::{QueryRun, Segment, Segments};

/// Keys of a tile.
const KEYS: usize = 64;
/// Keys of a split.
const SPLIT: usize = 128;
/// Most rows of an item, in the two shapes.
const MANY: usize = 64;
const FEW: usize = 16;
const THREADS: u32 = 128;
/// What `window` is where there is none.
const NO_WINDOW: usize = 1 << 31;

/// [`Item::kind`]: ends in the workspace.
const KIND_PART: u32 = 1;
/// [`Item::kind`]: at most [`FEW`] rows, and keys of one split.
const KIND_FEW: u32 = 2;

/// A tile of rows and a range of key positions; fields as kernels/attention.cu explains them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
struct Item {
    first: u32,
    rows: u32,
    low: u32,
    high: u32,
    begin: u32,
    end: u32,
    pieces: u32,
    work: u32,
    kind: u32,
}

impl Item {
    /// How long a block takes, in tiles of [`FEW`] rows: one of [`MANY`] has about twice the wavefronts.
    fn cost(&self) -> usize {
        let tiles = (self.end as usize).div_ceil(KEYS) - self.begin as usize / KEYS;
        if self.kind & KIND_FEW == 0 { 2 * tiles } else { tiles }
    }
}

/// Rows whose splits are merged; fields as kernels/attention.cu explains them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
struct Merged {
    first: u32,
    rows: u32,
    work: u32,
    stride: u32,
    splits: u32,
}

/// Keys at positions up to `end`, from the piece before, lie in rows position + delta.
#[derive(Debug, Clone, Copy, PartialEq, Eq, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
struct Piece {
    end: u32,
    delta: i32,
}

/// What depends on the shape of heads and a window.
#[derive(Debug, Default)]
struct Plan {
    /// Of at most [`MANY`] rows each; but until [`Plan::fill`], those of one split have as many as share it.
    items: Vec<Item>,
    merged: Vec<Merged>,
    /// Rows of the workspace, for each kv head.
    work_rows: usize,
}

/// A plan on the device.
struct Uploaded {
    heads: Heads,
    window: usize,
    items: Section,
    /// How many.
    count: usize,
    /// Whether all of them have few rows.
    few: bool,
    merged: Section,
    merged_count: usize,
    /// Most rows of one of [`Plan::merged`].
    merged_rows: usize,
    work_rows: usize,
}

/// Attention's work lists for one batch.
pub(super) struct Plans {
    pieces: Section,
    plans: Vec<Uploaded>,
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

fn window_of(spec: &AttentionSpec) -> usize {
    spec.window.map_or(NO_WINDOW, |w| w.min(NO_WINDOW))
}

impl Plans {
    /// Adds the lists to `pack`.
    pub(super) fn new(pack: &mut Pack, batch: &Batch, specs: &[AttentionSpec], multiprocessors: u32) -> Self {
        let chains = Chains::new(batch.segments, batch.runs);
        // A batch that meets no attention may have any positions.
        for run in batch.runs.iter().filter(|_| !specs.is_empty()) {
            let position = batch.segments.list()[run.segment].position + run.first;
            let mut positions = batch.positions[run.row..run.row + run.len].iter().zip(position..);
            assert!(positions.all(|(&p, want)| p as usize == want), "positions follow from the segments");
        }
        let mut plans: Vec<Uploaded> = Vec::new();
        for spec in specs {
            let (heads, window) = (Heads::of(spec), window_of(spec));
            if plans.iter().any(|p| (p.heads, p.window) == (heads, window)) {
                continue;
            }
            let mut plan =
                plan(batch.segments, batch.runs, batch.positions.len(), &chains, heads.group, window);
            plan.fill(heads.kv_heads, multiprocessors as usize);
            plans.push(Uploaded {
                heads,
                window,
                items: pack.add(&plan.items),
                count: plan.items.len(),
                few: plan.items.iter().all(|i| i.kind & KIND_FEW != 0),
                merged: pack.add(&plan.merged),
                merged_count: plan.merged.len(),
                merged_rows: plan.merged.iter().map(|m| m.rows as usize).max().unwrap_or(0),
                work_rows: plan.work_rows,
            });
        }
        Self { pieces: pack.add(&chains.pieces), plans }
    }

    /// The lists on the device, their pack being at `base`.
    pub(super) fn at(mut self, base: Ptr) -> Self {
        self.pieces = self.pieces.at(base);
        for plan in &mut self.plans {
            plan.items = plan.items.at(base);
            plan.merged = plan.merged.at(base);
        }
        self
    }
}

/// The chains of the segments that queries are in, as pieces.
struct Chains {
    pieces: Vec<Piece>,
    /// By segment: where its chain begins in `pieces`.
    first: Vec<usize>,
}

impl Chains {
    fn new(segments: &Segments, runs: &[QueryRun]) -> Self {
        let mut chains = Self { pieces: Vec::new(), first: vec![usize::MAX; segments.list().len()] };
        for run in runs {
            if chains.first[run.segment] != usize::MAX {
                continue;
            }
            chains.first[run.segment] = chains.pieces.len();
            let chain = segments.chain(run.segment).into_iter().map(|s| segments.list()[s]);
            chains.pieces.extend(chain.filter(|s| s.len > 0).map(|s: Segment| Piece {
                end: u32::try_from(s.position + s.len).expect("positions fit 32 bits"),
                delta: i32::try_from(s.start as i64 - s.position as i64).expect("rows fit 31 bits"),
            }));
        }
        chains
    }

    /// Up to which position two segments' chains are the same rows.
    fn common(&self, segments: &Segments, a: usize, b: usize) -> usize {
        let (a, b) = (segments.chain(a), segments.chain(b));
        let last = a.iter().zip(&b).take_while(|(a, b)| a == b).last();
        last.map_or(0, |(&s, _)| segments.list()[s].position + segments.list()[s].len)
    }
}

/// A run of few rows.
struct Small {
    run: QueryRun,
    /// Positions of its queries.
    low: usize,
    high: usize,
    /// First position that its first query sees.
    begin: usize,
    /// Up to this position it reaches keys through the same rows as the next run of its group.
    shared: usize,
}

impl Small {
    /// Those of which it sees a key.
    fn splits(&self) -> Range<usize> {
        self.begin / SPLIT..self.high / SPLIT + 1
    }

    /// Whether it has several of them: parts do them, and its rows are merged.
    fn in_parts(&self) -> bool {
        self.splits().len() > 1
    }

    /// The positions that it sees of one of them.
    fn keys(&self, split: usize) -> Range<usize> {
        self.begin.max(split * SPLIT)..(self.high + 1).min((split + 1) * SPLIT)
    }

    /// Whether the same blocks do a split for it and for the next run of its group: both see the last of its keys, and
    /// reach it through the same row.
    fn shares(&self, split: usize, next: &Self) -> bool {
        let end = (split + 1) * SPLIT;
        let sees = |run: &Self| run.splits().contains(&split) && end <= run.high + 1;
        sees(self) && sees(next) && end <= self.shared && self.in_parts() == next.in_parts()
    }
}

fn plan(
    segments: &Segments,
    runs: &[QueryRun],
    query_rows: usize,
    chains: &Chains,
    group: usize,
    window: usize,
) -> Plan {
    let mut plan = Plan::default();
    let mut runs: Vec<QueryRun> = runs.iter().copied().filter(|r| r.len > 0).collect();
    runs.sort_by_key(|r| r.row);
    let end_of = |r: &QueryRun| r.row + r.len;
    assert!(runs.windows(2).all(|w| end_of(&w[0]) <= w[1].row), "a query row belongs to one run");
    assert!(runs.last().is_none_or(|r| end_of(r) <= query_rows), "runs are rows of the batch");

    let first_position = |run: &QueryRun| segments.list()[run.segment].position + run.first;
    let mut at = 0;
    let mut rest = &runs[..];
    while let Some(run) = rest.first() {
        plan.idle(at * group..run.row * group);
        let small = |r: &QueryRun| r.len * group <= MANY;
        if !small(run) {
            plan.large(*run, first_position(run), chains.first[run.segment], group, window);
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
                let low = first_position(&run);
                let begin = (low + 1).saturating_sub(window);
                Small { run, low, high: low + run.len - 1, begin, shared: 0 }
            })
            .collect();
        for i in 1..smalls.len() {
            let (a, b) = (smalls[i - 1].run.segment, smalls[i].run.segment);
            smalls[i - 1].shared = chains.common(segments, a, b);
        }
        plan.smalls(&smalls, chains, group);
        at = end_of(&those[more]);
        rest = others;
    }
    plan.idle(at * group..query_rows * group);
    plan
}

impl Plan {
    /// Rows that belong to no run.
    fn idle(&mut self, rows: Range<usize>) {
        for first in rows.clone().step_by(FEW) {
            let rows = narrow(FEW.min(rows.end - first));
            self.items.push(Item { first: narrow(first), rows, kind: KIND_FEW, ..Item::default() });
        }
    }

    /// A run of many rows: every tile of them walks through all its keys.
    fn large(&mut self, run: QueryRun, position: usize, pieces: usize, group: usize, window: usize) {
        let (from, to) = (run.row * group, (run.row + run.len) * group);
        for first in (from..to).step_by(MANY) {
            let rows = MANY.min(to - first);
            let position_of = |row: usize| position + row / group - run.row;
            let (low, high) = (position_of(first), position_of(first + rows - 1));
            self.items.push(Item {
                first: narrow(first),
                rows: narrow(rows),
                low: narrow(low),
                high: narrow(high),
                begin: narrow((low + 1).saturating_sub(window)),
                end: narrow(high + 1),
                pieces: narrow(pieces),
                ..Item::default()
            });
        }
    }

    /// Small runs in neighbouring rows.
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
        let work = |split: usize, row: usize| narrow(base + (split - splits.start) * stride + row - origin);
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
                    pieces: narrow(chains.first[these[0].run.segment]),
                    work: work(split, rows.start),
                    kind: if these[0].in_parts() { KIND_PART } else { 0 },
                });
            }
        }
        for small in smalls.iter().filter(|s| s.in_parts()) {
            let rows = rows_of(std::slice::from_ref(small));
            self.merged.push(Merged {
                first: narrow(rows.start),
                rows: narrow(rows.len()),
                work: work(small.splits().start, rows.start),
                stride: narrow(stride),
                splits: narrow(small.splits().len()),
            });
        }
    }

    /// The items, with at most `most` rows in those of one split.
    fn cut(&self, most: usize) -> Vec<Item> {
        let mut items = Vec::with_capacity(self.items.len());
        for item in &self.items {
            if item.begin as usize / SPLIT != (item.end as usize).saturating_sub(1) / SPLIT {
                items.push(*item);
                continue;
            }
            for first in (0..item.rows).step_by(most) {
                let rows = narrow(most).min(item.rows - first);
                let few = if rows as usize <= FEW { KIND_FEW } else { 0 };
                let (work, kind) = (item.work + first, item.kind | few);
                items.push(Item { first: item.first + first, rows, work, kind, ..*item });
            }
        }
        items
    }

    /// Cuts the items so that `multiprocessors` are done soonest, and puts them in order. Which shape computes a row does
    /// not change its bits.
    fn fill(&mut self, kv_heads: usize, multiprocessors: usize) {
        let multiprocessors = multiprocessors.max(1);
        let time = |items: &[Item]| {
            let costs = items.iter().map(Item::cost);
            (costs.clone().sum::<usize>() * kv_heads).div_ceil(multiprocessors).max(costs.max().unwrap_or(0))
        };
        let [many, few] = [MANY, FEW].map(|most| self.cut(most));
        self.items = if time(&few) < time(&many) { few } else { many };
        // The longest first, so that none begins when the others end.
        self.items.sort_by_key(|item| std::cmp::Reverse(item.cost()));
        if !self.merged.is_empty() {
            // Lists of few lengths: a decode step's launches repeat while responses grow and end. A block of an item that
            // is nothing takes no longer than it needs to see that.
            let waves = self.items.len().next_multiple_of(multiprocessors);
            self.items.resize(waves, Item { kind: KIND_FEW, ..Item::default() });
            self.merged.resize(self.merged.len().next_power_of_two(), Merged::default());
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
    merged: u64,
    pieces: u64,
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

/// See [`crate::backend::Backend::attention_forward`]. Head widths 64, 128 and 256.
pub(super) fn forward(
    cuda: &Cuda,
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
    let [many, few, merge] = match head_dim {
        64 => {
            [Entry::AttentionForward64Rows64, Entry::AttentionForward64Rows16, Entry::AttentionForward64Merge]
        }
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
        _ => panic!("heads of 64, 128 or 256, not {head_dim}"),
    };
    let (shape, window) = (Heads::of(spec), window_of(spec));
    let plan = tables.attention.plans.iter().find(|p| (p.heads, p.window) == (shape, window));
    let plan = plan.expect("the batch's tables know every layer's attention");

    let o = cuda.empty(DType::Bf16, q.rows, q.cols);
    let lse = cuda.empty(DType::F32, q.rows, heads);
    // A row's o, m, l.
    let work = cuda.memory(plan.work_rows * kv_heads * (head_dim + 2) * 4);
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
        items: address(plan.items.ptr()),
        merged: address(plan.merged.ptr()),
        pieces: address(tables.attention.pieces.ptr()),
        positions: address(tables.positions.ptr()),
        work: address(work.ptr()),
        work_rows: narrow(plan.work_rows),
        group: narrow(shape.group),
        window: narrow(window),
        inner,
        outer: outer * std::f32::consts::LOG2_E,
        padding: 0,
    };
    let args = [Arg::Bytes(bytemuck::bytes_of(&params).to_vec())];
    let (entry, shared) = match plan.few {
        // Q or p, two tiles; of each tile a f32 for each warp and row, and for each warp, row and thread of a quad.
        true => (few, (FEW * head_dim.max(SPLIT) + SPLIT * head_dim) * 2 + 2 * 4 * FEW * (1 + 4) * 4),
        // Q, two tiles; m and l.
        false => (many, (MANY + SPLIT) * head_dim * 2 + MANY * 8),
    };
    let mut launch = Launch::linear(plan.count, THREADS).shared(shared);
    launch.grid[1] = narrow(kv_heads);
    cuda.launch(entry, launch, &args);
    let mut launch = Launch::linear(plan.merged_count, 32);
    launch.grid[1] = narrow(kv_heads);
    launch.grid[2] = narrow(plan.merged_rows);
    cuda.launch(merge, launch, &args);
    (o, lse)
}

/// One prompt and its responses.
fn group_of(prompt: usize, responses: usize, len: usize) -> Segments {
    let mut list = vec![Segment { start: 0, len: prompt, position: 0, prefix: None }];
    list.extend((0..responses).map(|i| Segment {
        start: prompt + i * len,
        len,
        position: prompt,
        prefix: Some(0),
    }));
    Segments::new(list).expect("a valid table")
}

/// Prefill, training and a step of decoding.
pub(super) fn workloads(shape: &Shape) -> Vec<Workload> {
    let prefill = |what: &str, window| {
        let segments = Segments::separate(&[1024]);
        let runs = segments.all_queries();
        workload(shape, what, segments, runs, window)
    };
    vec![
        prefill("prefill of 1024", None),
        prefill("prefill of 1024, window 512", Some(512)),
        training(shape, 4),
        decode(shape, 512, 32),
        decode(shape, 4096, 32),
    ]
}

/// A batch of training, and a step of decoding with many streams.
pub(super) fn large_workloads(shape: &Shape) -> Vec<Workload> {
    vec![training(shape, 32), decode(shape, 512, 256)]
}

fn training(shape: &Shape, responses: usize) -> Workload {
    let segments = group_of(512, responses, 128);
    let runs = segments.all_queries();
    workload(shape, &format!("prompt of 512 and {responses} responses of 128"), segments, runs, None)
}

fn decode(shape: &Shape, prompt: usize, tails: usize) -> Workload {
    let one_each = (0..tails).map(|i| QueryRun { segment: i + 1, first: 127, len: 1, row: i }).collect();
    let what = format!("decode, prompt of {prompt} and {tails} tails of 128");
    workload(shape, &what, group_of(prompt, tails, 128), one_each, None)
}

fn workload(
    shape: &Shape,
    what: &str,
    segments: Segments,
    runs: Vec<QueryRun>,
    window: Option<usize>,
) -> Workload {
    let Shape { heads, kv_heads, head_dim, .. } = *shape;
    let spec = AttentionSpec { heads, kv_heads, head_dim, scale: 0.0625, softcap: None, window };
    let queries: usize = runs.iter().map(|r| r.len).sum();
    let mut positions = vec![0; queries];
    let mut pairs = 0;
    for run in &runs {
        for t in 0..run.len {
            let position = segments.list()[run.segment].position + run.first + t;
            positions[run.row + t] = narrow(position);
            pairs += (position + 1).min(window_of(&spec));
        }
    }
    let rows = segments.rows();
    Workload {
        name: format!("attention_forward {what}"),
        // q, o and lse; k and v.
        bytes: (queries * heads * (head_dim * 4 + 4) + rows * kv_heads * head_dim * 4) as u64,
        flops: (4 * pairs * heads * head_dim) as u64,
        prepare: Box::new(move |cuda| {
            let x = |seed, rows, heads| random(cuda, seed, DType::Bf16, rows, heads * head_dim);
            let (q, k, v) = (x(1, queries, heads), x(2, rows, kv_heads), x(3, rows, kv_heads));
            let ids = vec![0; queries];
            let batch = Batch { ids: &ids, positions: &positions, segments: &segments, runs: &runs };
            let tables = cuda.tables(&batch, &[spec]);
            Box::new(move |cuda| drop(forward(cuda, &q, &k, &v, &tables, &spec)))
        }),
    }
}
