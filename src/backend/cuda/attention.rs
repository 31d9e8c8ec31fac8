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
/// Tiles of a split.
const SPLIT: usize = 8;
/// Rows of an item's two shapes.
const ROWS: [usize; 2] = [64, 16];
const THREADS: u32 = 128;
/// What `window` is where there is none.
const NO_WINDOW: usize = 1 << 31;

/// Fewest items of a list that is padded: an eighth of a GPU's multiprocessors or less.
const LEAST_ITEMS: usize = 8;

/// [`Item::kind`]: ends in the workspace.
const PART: u32 = 1;
/// [`Item::kind`]: begins with a state from the workspace.
const RESUME: u32 = 2;

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
    stride: u32,
    slots: u32,
    ready: u32,
    kind: u32,
}

/// Keys at positions up to `end`, from the piece before, lie in rows position + delta.
#[derive(Debug, Clone, Copy, PartialEq, Eq, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
struct Piece {
    end: u32,
    delta: i32,
}

/// Indices into the two launches' two lists.
const PARTS: usize = 0;
const FINISHERS: usize = 1;

/// What depends on a group size and a window.
#[derive(Debug, Default)]
struct Plan {
    /// By launch, then by shape as in [`ROWS`].
    items: [[Vec<Item>; 2]; 2],
    /// Rows of the workspace, for each kv head.
    work_rows: usize,
}

/// A plan on the device.
struct Uploaded {
    group: usize,
    window: usize,
    /// All items, list after list.
    items: Section,
    /// How many, as in [`Plan::items`].
    counts: [[usize; 2]; 2],
    work_rows: usize,
}

/// Attention's work lists for one batch.
pub(super) struct Plans {
    pieces: Section,
    plans: Vec<Uploaded>,
}

fn window_of(spec: &AttentionSpec) -> usize {
    spec.window.map_or(NO_WINDOW, |w| w.min(NO_WINDOW))
}

impl Plans {
    /// Adds the lists to `pack`; with `again` those of a step that shall be like the one before.
    pub(super) fn new(pack: &mut Pack, batch: &Batch, specs: &[AttentionSpec], again: bool) -> Self {
        let chains = Chains::new(batch.segments, batch.runs);
        // A batch that meets no attention may have any positions.
        for run in batch.runs.iter().filter(|_| !specs.is_empty()) {
            let position = batch.segments.list()[run.segment].position + run.first;
            let mut positions = batch.positions[run.row..run.row + run.len].iter().zip(position..);
            assert!(positions.all(|(&p, want)| p as usize == want), "positions follow from the segments");
        }
        let mut plans: Vec<Uploaded> = Vec::new();
        for spec in specs {
            let (group, window) = (spec.heads / spec.kv_heads, window_of(spec));
            if plans.iter().any(|p| (p.group, p.window) == (group, window)) {
                continue;
            }
            let mut plan = plan(batch.segments, batch.runs, batch.positions.len(), &chains, group, window);
            if again {
                plan.pad();
            }
            plans.push(Uploaded {
                group,
                window,
                items: pack.add(&plan.items.as_flattened().concat()),
                counts: plan.items.each_ref().map(|lists| lists.each_ref().map(Vec::len)),
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

/// A run of few rows, as parts and finisher see it. Tiles and splits are counted from position 0.
struct Small {
    run: QueryRun,
    /// Positions of its queries.
    low: usize,
    high: usize,
    /// First position that its first query sees.
    begin: usize,
    /// First tile that its finisher does itself.
    own: usize,
    /// Tiles that it shares with the next run of its group.
    shared: usize,
}

impl Small {
    /// The split of its last key.
    fn last_split(&self) -> usize {
        self.high / KEYS / SPLIT
    }

    fn first_split(&self) -> usize {
        self.begin / KEYS / SPLIT
    }

    /// The tiles of a split that parts do for it.
    fn part(&self, split: usize) -> Range<usize> {
        (self.begin / KEYS).max(split * SPLIT)..self.own.min((split + 1) * SPLIT)
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
        let small = |r: &QueryRun| r.len * group <= ROWS[0];
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
                Small { run, low, high: low + run.len - 1, begin, own: 0, shared: 0 }
            })
            .collect();
        for i in 1..smalls.len() {
            let (a, b) = (smalls[i - 1].run.segment, smalls[i].run.segment);
            smalls[i - 1].shared = chains.common(segments, a, b) / KEYS;
        }
        let mut before = 0;
        for small in &mut smalls {
            // Parts do all splits but the last, and of that what is shared. The finisher needs at least one tile.
            let from = (small.last_split() * SPLIT).max(small.begin / KEYS);
            small.own = before.max(small.shared).min(small.high / KEYS).max(from);
            before = small.shared;
        }
        plan.smalls(&smalls, chains, group);
        at = end_of(&those[more]);
        rest = others;
    }
    plan.idle(at * group..query_rows * group);
    for list in plan.items.as_flattened_mut() {
        // The longest first, so that none begins when the others end.
        list.sort_by_key(|i| std::cmp::Reverse(i.end.div_ceil(KEYS as u32) - i.begin / KEYS as u32));
    }
    plan
}

impl Plan {
    /// Gives the lists one of few lengths, so that their launches are the same while streams grow and end. An item
    /// without rows takes a block no longer than it needs to see that.
    fn pad(&mut self) {
        for list in self.items.as_flattened_mut().iter_mut().filter(|list| !list.is_empty()) {
            list.resize(list.len().next_power_of_two().max(LEAST_ITEMS), Item::default());
        }
    }

    /// Adds an item of at most 64 rows.
    fn push(&mut self, launch: usize, item: Item) {
        let shape = usize::from(item.rows as usize <= ROWS[1]);
        self.items[launch][shape].push(item);
    }

    /// Rows that belong to no run.
    fn idle(&mut self, rows: Range<usize>) {
        for first in rows.clone().step_by(ROWS[0]) {
            let item = Item {
                first: narrow(first),
                rows: narrow(ROWS[0].min(rows.end - first)),
                slots: 1,
                ..Item::default()
            };
            self.push(FINISHERS, item);
        }
    }

    /// A run of many rows: every tile of them walks through all its keys.
    fn large(&mut self, run: QueryRun, position: usize, pieces: usize, group: usize, window: usize) {
        let (from, to) = (run.row * group, (run.row + run.len) * group);
        for first in (from..to).step_by(ROWS[0]) {
            let rows = ROWS[0].min(to - first);
            let position_of = |row: usize| position + row / group - run.row;
            let (low, high) = (position_of(first), position_of(first + rows - 1));
            let begin = (low + 1).saturating_sub(window);
            let split = begin / KEYS / SPLIT;
            let mut item = Item {
                first: narrow(first),
                rows: narrow(rows),
                low: narrow(low),
                high: narrow(high),
                begin: narrow(begin),
                end: narrow(high + 1),
                pieces: narrow(pieces),
                work: 0,
                stride: 0,
                slots: 1,
                ready: narrow(split),
                kind: 0,
            };
            if high / KEYS / SPLIT > split {
                item.work = narrow(self.work_rows);
                self.work_rows += rows;
            }
            self.push(FINISHERS, item);
        }
    }

    /// Small runs in neighbouring rows.
    fn smalls(&mut self, smalls: &[Small], chains: &Chains, group: usize) {
        let origin = smalls[0].run.row * group;
        let last = &smalls[smalls.len() - 1].run;
        let stride = (last.row + last.len) * group - origin;
        let slots = smalls.iter().map(|s| s.last_split() + 1 - s.first_split()).max().unwrap_or(1);
        let base = self.work_rows;
        let in_parts = |s: &Small| s.begin / KEYS < s.own;
        if smalls.iter().any(in_parts) {
            self.work_rows += slots * stride;
        }
        let item = |first: usize, rows: usize| Item {
            first: narrow(first),
            rows: narrow(rows),
            work: narrow(base + first - origin),
            stride: narrow(stride),
            slots: narrow(slots),
            ..Item::default()
        };

        let splits = smalls.iter().map(Small::first_split).min().unwrap_or(0)
            ..smalls.iter().map(|s| s.last_split() + 1).max().unwrap_or(0);
        for split in splits {
            // Neighbours that do the same tiles of the split and reach them through the same rows.
            let together = |a: &Small, b: &Small| {
                let (p, r) = (a.part(split), b.part(split));
                !p.is_empty() && !r.is_empty() && p.end == r.end && p.end <= a.shared
            };
            for shared in smalls.chunk_by(together).filter(|c| !c[0].part(split).is_empty()) {
                let tiles = shared[0].part(split);
                let of_all = |f: fn(&Small) -> usize| shared.iter().map(f);
                let begin = of_all(|s| s.begin).min().unwrap_or(0).max(split * SPLIT * KEYS);
                let last = &shared[shared.len() - 1].run;
                let (from, to) = (shared[0].run.row * group, (last.row + last.len) * group);
                for first in (from..to).step_by(ROWS[0]) {
                    let rows = ROWS[0].min(to - first);
                    self.push(
                        PARTS,
                        Item {
                            low: narrow(of_all(|s| s.low).min().unwrap_or(0)),
                            high: narrow(of_all(|s| s.high).max().unwrap_or(0)),
                            begin: narrow(begin),
                            end: narrow(tiles.end * KEYS),
                            pieces: narrow(chains.first[shared[0].run.segment]),
                            ready: narrow(split),
                            kind: PART,
                            ..item(first, rows)
                        },
                    );
                }
            }
        }
        for small in smalls {
            let own = small.own;
            self.push(
                FINISHERS,
                Item {
                    low: narrow(small.low),
                    high: narrow(small.high),
                    begin: narrow(small.begin.max(own * KEYS)),
                    end: narrow(small.high + 1),
                    pieces: narrow(chains.first[small.run.segment]),
                    ready: narrow(small.first_split()),
                    kind: if small.part(own / SPLIT).is_empty() { 0 } else { RESUME },
                    ..item(small.run.row * group, small.run.len * group)
                },
            );
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
    let entries = match head_dim {
        64 => [Entry::AttentionForward64Rows64, Entry::AttentionForward64Rows16],
        128 => [Entry::AttentionForward128Rows64, Entry::AttentionForward128Rows16],
        256 => [Entry::AttentionForward256Rows64, Entry::AttentionForward256Rows16],
        _ => panic!("heads of 64, 128 or 256, not {head_dim}"),
    };
    let (group, window) = (heads / kv_heads, window_of(spec));
    let plan = tables.attention.plans.iter().find(|p| (p.group, p.window) == (group, window));
    let plan = plan.expect("the batch's tables know every layer's attention");

    let o = cuda.empty(DType::Bf16, q.rows, q.cols);
    let lse = cuda.empty(DType::F32, q.rows, heads);
    // A row's o, 16 parts of l, m.
    let work = cuda.memory(plan.work_rows * kv_heads * (head_dim + 17) * 4);
    let (inner, outer) = match spec.softcap {
        None => (0.0, spec.scale),
        Some(c) => (spec.scale / c, c),
    };
    let address = |Ptr(x): Ptr| x;
    let mut params = Params {
        q: address(q.memory.ptr()),
        k: address(k.memory.ptr()),
        v: address(v.memory.ptr()),
        o: address(o.memory.ptr()),
        lse: address(lse.memory.ptr()),
        items: address(plan.items.ptr()),
        pieces: address(tables.attention.pieces.ptr()),
        positions: address(tables.positions.ptr()),
        work: address(work.ptr()),
        work_rows: narrow(plan.work_rows),
        group: narrow(group),
        window: narrow(window),
        inner,
        outer: outer * std::f32::consts::LOG2_E,
        padding: 0,
    };
    for (shape, count) in plan.counts.as_flattened().iter().enumerate() {
        let (entry, rows) = (entries[shape % 2], ROWS[shape % 2]);
        // Q, K, V; with shared rows also p and one f32 for each warp and row.
        let shared =
            (rows + 2 * KEYS) * head_dim * 2 + if rows == 16 { 16 * KEYS * 2 + 4 * 16 * 4 } else { 0 };
        let mut launch = Launch::linear(*count, THREADS).shared(shared);
        launch.grid[1] = narrow(kv_heads);
        cuda.launch(entry, launch, &[Arg::Bytes(bytemuck::bytes_of(&params).to_vec())]);
        params.items += (count * size_of::<Item>()) as u64;
    }
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
        decode(shape, 32),
    ]
}

/// A batch of training, and a step of decoding with many streams.
pub(super) fn large_workloads(shape: &Shape) -> Vec<Workload> {
    vec![training(shape, 32), decode(shape, 256)]
}

fn training(shape: &Shape, responses: usize) -> Workload {
    let segments = group_of(512, responses, 128);
    let runs = segments.all_queries();
    workload(shape, &format!("prompt of 512 and {responses} responses of 128"), segments, runs, None)
}

fn decode(shape: &Shape, tails: usize) -> Workload {
    let one_each = (0..tails).map(|i| QueryRun { segment: i + 1, first: 127, len: 1, row: i }).collect();
    let what = format!("decode, prompt of 512 and {tails} tails of 128");
    workload(shape, &what, group_of(512, tails, 128), one_each, None)
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
