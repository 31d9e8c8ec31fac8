//! Launchers of kernels/attention_backward.cu, and the work lists of its blocks.
//!
//! Head widths 64, 128, 256 and 512; any number of query heads per key/value head. A *pair* is (query token, head of a group).

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use bytemuck::NoUninit;

use super::chains::{Chains, window_of};
use super::entries::shared::attention_backward::{STAY, STREAM, THREADS, WIDE_KEYS, WIDE_PAIRS, WIDE_STREAM};
use super::entries::{Entry, same_size};
use super::{Cuda, Memory, Tables, Tensor, narrow};
use crate::backend::{AttentionBackward, AttentionSpec, DType, Platform};
use crate::device::{Arg, Launch};
use crate::segments::{QueryRun, Segment, Segments};

/// Elements of dO that a block of the first pass takes.
const STATS: usize = 8192;
/// The least pairs of a part.
const MIN_PART: usize = 512;
/// Cost of a part, in pairs, beside its pairs, where a tile is cut: the block reads its keys again and writes f32 sums (128
/// KiB at Dh = 256 and 512).
const PART_COST: usize = 100;
/// Multiprocessors of the GPU for which the pairs of keys are cut, an H100. The cuts do not depend on the GPU in use, because
/// they determine the order of sums.
const REFERENCE: usize = 132;
/// [`KeyItem::slot`] of a tile that has one part.
const DIRECT: u32 = u32::MAX;

/// Rows of the tiles of a head width.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Tiles {
    /// Keys of a block of the second pass.
    keys: usize,
    /// Pairs of a block of the third pass.
    pairs: usize,
    /// Rows of a streamed tile, pairs in the second pass and keys in the third.
    stream: usize,
}

impl Tiles {
    /// Of heads of 64, 128 and 256.
    const NARROW: Self = Self { keys: STAY, pairs: STAY, stream: STREAM };
    /// Of heads of 512.
    const WIDE: Self = Self { keys: WIDE_KEYS, pairs: WIDE_PAIRS, stream: WIDE_STREAM };

    fn of(head_dim: usize) -> Self {
        if head_dim <= 256 { Self::NARROW } else { Self::WIDE }
    }

    /// Bytes of shared memory of a block of the second pass, and of the third.
    fn shared_bytes(self, head_dim: usize) -> [usize; 2] {
        const BF16: usize = 2;
        const F32: usize = 4;
        /// (lse, D) and position.
        const ROW: usize = 8 + 4;
        let Self { keys, pairs, stream } = self;
        let (stages, rows) = (2 * 2 * stream * head_dim * BF16, 2 * stream * ROW);
        // For every (key, pair) of two tiles: P cap'; dS.
        if self == Self::NARROW {
            return [stages + rows + keys * stream * F32, stages + pairs * stream * BF16];
        }
        // A third stage of Q; for every (key, pair) three parts of S and of dP, P cap', P and dS.
        let second = stages + stream * head_dim * BF16 + rows + keys * stream * (7 * F32 + 2 * BF16);
        // Q and dO, and in their place then the stages, eight parts for every (key, pair), and dS of two tiles.
        let third = (2 * pairs * head_dim * BF16).max(stages + pairs * stream * (8 * F32 + 2 * BF16));
        // And the rows of two tiles' keys.
        [second, third + pairs * ROW + 2 * stream * 4]
    }
}

/// `KeyItem` of the kernel.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, NoUninit)]
struct KeyItem {
    row: u32,
    position: u32,
    keys: u32,
    first: u32,
    offset: u32,
    pairs: u32,
    slot: u32,
    unused: u32,
}

/// `QueryItem` of the kernel.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, NoUninit)]
struct QueryItem {
    row: u32,
    position: u32,
    offset: u32,
    pairs: u32,
    first: u32,
    keys: u32,
    chain: u32,
    unused: u32,
}

/// `SumItem` of the kernel.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, NoUninit)]
struct SumItem {
    row: u32,
    keys: u32,
    slot: u32,
    parts: u32,
}

/// `Scores` of the kernel.
#[repr(C)]
#[derive(Debug, Clone, Copy, NoUninit)]
struct Scores {
    scale: f32,
    inner: f32,
    cap: f32,
    window: u32,
}

same_size!(
    attention_backward: KeyItem = KEY_ITEM_BYTES, QueryItem = QUERY_ITEM_BYTES, SumItem = SUM_ITEM_BYTES,
    Scores = SCORES_BYTES,
);

impl Scores {
    fn new(spec: &AttentionSpec) -> Self {
        let log2_e = std::f32::consts::LOG2_E;
        let (inner, cap) = match spec.softcap {
            None => (spec.scale * log2_e, 0.0),
            Some(c) => (2.0 * log2_e * spec.scale / c, c * log2_e),
        };
        Self { scale: spec.scale, inner, cap, window: narrow(window_of(spec)) }
    }
}

/// What the items of a batch depend on, beside its segments.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Key {
    /// Query heads for each key/value head.
    group: usize,
    kv_heads: usize,
    window: Option<usize>,
    tiles: Tiles,
}

/// The items of all blocks for one [`Key`], on the host. The longest items come first, because a long
/// block that begins late would run alone at the end.
#[derive(Debug, Default)]
struct WorkList {
    key_items: Vec<KeyItem>,
    /// For each tile of keys, the rows of the tokens that see it, as a range of this list. Tiles share ranges where they can.
    tokens: Vec<u32>,
    sums: Vec<SumItem>,
    slots: usize,
    query_items: Vec<QueryItem>,
    /// Whether a tile of keys is seen by no query.
    unseen: bool,
}

/// A segment and the runs of its queries, in order.
struct Queried<'a> {
    segment: &'a Segment,
    runs: Vec<QueryRun>,
}

impl Queried<'_> {
    /// The rows of its queries at positions `from..to`.
    fn rows_at(&self, from: usize, to: usize) -> impl Iterator<Item = u32> {
        self.runs.iter().flat_map(move |run| {
            let begin = self.segment.position + run.first;
            let (from, to) = (from.max(begin), to.min(begin + run.len));
            let first = run.row + from - begin;
            (first..first + to.saturating_sub(from)).map(narrow)
        })
    }
}

/// Every segment, with the runs of its queries.
fn queried<'a>(segments: &'a Segments, runs: &[QueryRun]) -> Vec<Queried<'a>> {
    let mut all: Vec<Queried> =
        segments.list().iter().map(|segment| Queried { segment, runs: Vec::new() }).collect();
    for run in runs.iter().filter(|run| run.len > 0) {
        all[run.segment].runs.push(*run);
    }
    for Queried { runs, .. } in &mut all {
        runs.sort_by_key(|run| run.first);
    }
    all
}

/// Pairs of a part, given the pairs of each tile of keys. Candidates are multiples of an eighth of the pairs that a block of the
/// reference would have at best. A model, in which each multiprocessor takes the longest part that is left, gives the time of
/// the last block for each candidate.
fn part_pairs(tiles: &[usize], kv_heads: usize, stream: usize) -> usize {
    let fair = tiles.iter().sum::<usize>() * kv_heads / REFERENCE;
    let end = |&part: &usize| {
        let parts = tiles.iter().flat_map(|&pairs| {
            let count = pairs.div_ceil(part);
            let cost = if count > 1 { PART_COST } else { 0 };
            (0..count).map(move |i| part.min(pairs - i * part) + cost)
        });
        let mut parts: Vec<usize> = parts.collect();
        parts.sort_unstable_by_key(|&pairs| Reverse(pairs));
        let mut ends: BinaryHeap<Reverse<usize>> = (0..REFERENCE).map(|_| Reverse(0)).collect();
        for pairs in parts.iter().flat_map(|pairs| std::iter::repeat_n(pairs, kv_heads)) {
            let Reverse(first) = ends.pop().expect("a block for each multiprocessor");
            ends.push(Reverse(first + pairs));
        }
        ends.into_iter().map(|Reverse(end)| end).max().unwrap_or(0)
    };
    let sizes = (1..=16).rev().map(|eighths| (fair * eighths / 8).next_multiple_of(stream).max(MIN_PART));
    let ends: Vec<(usize, usize)> = sizes.map(|size| (size, end(&size))).collect();
    let least = ends.iter().map(|(_, end)| *end).min().unwrap_or(0);
    // The largest candidate within a sixteenth of the best, because parts take memory.
    ends.iter().find(|(_, end)| end * 16 <= least * 17).expect("the best is one of them").0
}

impl WorkList {
    fn new(segments: &Segments, runs: &[QueryRun], chains: &Chains, key: Key) -> Self {
        let mut lists = Self::default();
        let queried = queried(segments, runs);
        lists.add_keys(segments, &queried, key);
        lists.add_queries(&queried, chains, key);
        lists
    }

    fn add_keys(
        &mut self,
        segments: &Segments,
        queried: &[Queried],
        Key { group, kv_heads, window, tiles: size }: Key,
    ) {
        let list = segments.list();
        // For each segment, the segments whose queries see it: itself first, then in the order of the list.
        let mut seen_by = vec![Vec::new(); list.len()];
        for i in 0..list.len() {
            for prefix in segments.chain(i) {
                seen_by[prefix].push(i);
            }
        }
        // Tiles: (index of the first key in its segment, segment, the range of `tokens` that see the tile).
        let mut tiles = Vec::new();
        for (i, s) in list.iter().enumerate() {
            let last = seen_by[i].iter().map(|&j| list[j].position + list[j].len).max().unwrap_or(0);
            // If no window ends among them, the tokens that see a tile are those that see the tile before it, without the tokens of
            // that tile. The range of the first such tile, which begins with its own tokens, contains the ranges of all later
            // tiles.
            let mut shared: Option<(usize, Range<usize>)> = None;
            for first in (0..s.len).step_by(size.keys) {
                let (position, keys) = (s.position + first, size.keys.min(s.len - first));
                let end = window.map_or(usize::MAX, |w| (position + keys - 1).saturating_add(w));
                let range = match &shared {
                    Some((of, range)) => {
                        let own = queried[i].rows_at(s.position + of, position).count();
                        range.start + own..range.end
                    }
                    None => {
                        let start = self.tokens.len();
                        for &j in &seen_by[i] {
                            self.tokens.extend(queried[j].rows_at(position, end));
                        }
                        start..self.tokens.len()
                    }
                };
                if end >= last && shared.is_none() {
                    shared = Some((first, range.clone()));
                }
                tiles.push((first, s, range));
            }
        }

        let pairs: Vec<usize> = tiles.iter().map(|(.., tokens)| tokens.len() * group).collect();
        let part = part_pairs(&pairs, kv_heads, size.stream);
        for (first, s, tokens) in tiles {
            let (row, keys) = (narrow(s.start + first), narrow(size.keys.min(s.len - first)));
            let pairs = tokens.len() * group;
            let parts = pairs.div_ceil(part);
            self.unseen |= parts == 0;
            let slot = self.slots;
            if parts > 1 {
                self.slots += parts;
                self.sums.push(SumItem { row, keys, slot: narrow(slot), parts: narrow(parts) });
            }
            self.key_items.extend((0..parts).map(|i| KeyItem {
                row,
                position: narrow(s.position + first),
                keys,
                first: narrow(tokens.start + i * part / group),
                offset: narrow(i * part % group),
                pairs: narrow(part.min(pairs - i * part)),
                slot: if parts > 1 { narrow(slot + i) } else { DIRECT },
                unused: 0,
            }));
        }
        self.key_items.sort_by_key(|item| Reverse(item.pairs));
    }

    fn add_queries(
        &mut self,
        queried: &[Queried],
        chains: &Chains,
        Key { group, window, tiles: size, .. }: Key,
    ) {
        for (i, Queried { segment: s, runs }) in queried.iter().enumerate() {
            if runs.is_empty() {
                continue;
            }
            let chain = chains.first(i);
            let pairs_of = |run| (0..run_pairs(run, group)).step_by(size.pairs).map(move |pair| (run, pair));
            for (run, pair) in runs.iter().flat_map(pairs_of) {
                let pairs = size.pairs.min(run_pairs(run, group) - pair);
                let (token, last) = (pair / group, (pair + pairs - 1) / group);
                let position = s.position + run.first;
                let first = window.map_or(0, |w| (position + token + 1).saturating_sub(w));
                self.query_items.push(QueryItem {
                    row: narrow(run.row + token),
                    position: narrow(position + token),
                    offset: narrow(pair % group),
                    pairs: narrow(pairs),
                    first: narrow(first),
                    keys: narrow(position + last + 1 - first),
                    chain,
                    unused: 0,
                });
            }
        }
        self.query_items.sort_by_key(|item| Reverse(item.keys));
    }
}

fn run_pairs(run: &QueryRun, group: usize) -> usize {
    run.len * group
}

/// [`WorkList`] on the device.
struct DeviceList {
    key: Key,
    key_items: (Memory, usize),
    tokens: Memory,
    sums: (Memory, usize),
    slots: usize,
    query_items: (Memory, usize),
    /// Whether every row of q is a query.
    dense_queries: bool,
    /// Whether some query sees every row of k and v.
    dense_keys: bool,
}

impl DeviceList {
    fn new(cuda: &Cuda, tables: &Tables, key_rows: usize, key: Key) -> Self {
        let (segments, runs) = (&tables.segments, &tables.runs);
        let lists = WorkList::new(segments, runs, &tables.attention.chains, key);
        let keys: usize = segments.list().iter().map(|s| s.len).sum();
        Self {
            key,
            key_items: (cuda.array(&lists.key_items), lists.key_items.len()),
            tokens: cuda.array(&lists.tokens),
            sums: (cuda.array(&lists.sums), lists.sums.len()),
            slots: lists.slots,
            query_items: (cuda.array(&lists.query_items), lists.query_items.len()),
            dense_queries: runs.iter().map(|run| run.len).sum::<usize>() == tables.rows,
            dense_keys: keys == key_rows && !lists.unseen,
        }
    }
}

/// The lists of a batch, made when a layer first asks for them.
#[derive(Default)]
pub(crate) struct DeviceLists(Mutex<Vec<Arc<DeviceList>>>);

impl DeviceLists {
    fn get(cuda: &Cuda, tables: &Tables, key_rows: usize, key: Key) -> Arc<DeviceList> {
        let mut lists = tables.attention_backward.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(list) = lists.iter().find(|list| list.key == key) {
            return Arc::clone(list);
        }
        let list = Arc::new(DeviceList::new(cuda, tables, key_rows, key));
        lists.push(Arc::clone(&list));
        list
    }
}

/// The entry points of a head width.
struct Entries {
    stats: Entry,
    keys: Entry,
    sum: Entry,
    queries: Entry,
}

fn entries(head_dim: usize) -> Entries {
    match head_dim {
        64 => Entries {
            stats: Entry::AttentionBackwardStats64,
            keys: Entry::AttentionBackwardKeys64,
            sum: Entry::AttentionBackwardSum64,
            queries: Entry::AttentionBackwardQueries64,
        },
        128 => Entries {
            stats: Entry::AttentionBackwardStats128,
            keys: Entry::AttentionBackwardKeys128,
            sum: Entry::AttentionBackwardSum128,
            queries: Entry::AttentionBackwardQueries128,
        },
        256 => Entries {
            stats: Entry::AttentionBackwardStats256,
            keys: Entry::AttentionBackwardKeys256,
            sum: Entry::AttentionBackwardSum256,
            queries: Entry::AttentionBackwardQueries256,
        },
        512 => Entries {
            stats: Entry::AttentionBackwardStats512,
            keys: Entry::AttentionBackwardKeys512,
            sum: Entry::AttentionBackwardSum512,
            queries: Entry::AttentionBackwardQueries512,
        },
        other => panic!("attention's heads are 64, 128, 256 or 512 wide, not {other}"),
    }
}

impl AttentionBackward for Cuda {
    /// Heads are 64, 128, 256 or 512 wide.
    fn attention_backward(
        &self,
        d_o: &Tensor,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        o: &Tensor,
        lse: &Tensor,
        tables: &Tables,
        spec: &AttentionSpec,
    ) -> (Tensor, Tensor, Tensor) {
        let AttentionSpec { heads, kv_heads, head_dim, .. } = *spec;
        let (rows, key_rows) = (q.rows, k.rows);
        assert!(heads.is_multiple_of(kv_heads) && spec.window != Some(0));
        for x in [d_o, q, o] {
            assert!(
                x.dtype == DType::Bf16 && (x.rows, x.cols) == (rows, heads * head_dim),
                "[T, H Dh] in bf16"
            );
        }
        for x in [k, v] {
            assert!(
                x.dtype == DType::Bf16 && (x.rows, x.cols) == (key_rows, kv_heads * head_dim),
                "[rows, K Dh] in bf16"
            );
        }
        assert!(lse.dtype == DType::F32 && (lse.rows, lse.cols) == (rows, heads), "lse [T, H] in f32");
        assert!(rows == tables.rows && tables.segments.rows() <= key_rows, "a row for every token");
        let entries = entries(head_dim);
        let tiles = Tiles::of(head_dim);
        let [keys_shared, queries_shared] = tiles.shared_bytes(head_dim);
        let key = Key { group: heads / kv_heads, kv_heads, window: spec.window, tiles };
        let list = DeviceLists::get(self, tables, key_rows, key);

        let stats = self.empty(DType::F32, rows, heads * 2);
        let launch = Launch::linear((rows * heads * head_dim).div_ceil(STATS), THREADS as u32);
        self.launch(
            entries.stats,
            launch,
            &[d_o.arg(), o.arg(), lse.arg(), stats.arg(), (rows * heads).into()],
        );

        // The gradient of rows that are no query, or that no query sees, is zero.
        let output = |like: &Tensor, dense| match dense {
            true => self.empty(DType::Bf16, like.rows, like.cols),
            false => self.zeros(DType::Bf16, like.rows, like.cols),
        };
        let dq = output(q, list.dense_queries);
        let [dk, dv] = [k, v].map(|x| output(x, list.dense_keys));
        let grid = |items: usize, z: usize| Launch {
            grid: [narrow(items), narrow(kv_heads), narrow(z)],
            block: [THREADS as u32, 1, 1],
            shared_bytes: 0,
        };
        let scores = Arg::Bytes(bytemuck::bytes_of(&Scores::new(spec)).to_vec());

        let partial = self.memory(list.slots * kv_heads * 2 * tiles.keys * head_dim * size_of::<f32>());
        let (items, count) = &list.key_items;
        self.launch(
            entries.keys,
            grid(*count, 1).shared(keys_shared),
            &[
                q.arg(),
                k.arg(),
                v.arg(),
                d_o.arg(),
                stats.arg(),
                tables.positions.arg(),
                items.arg(),
                list.tokens.arg(),
                dk.arg(),
                dv.arg(),
                partial.arg(),
                heads.into(),
                kv_heads.into(),
                scores.clone(),
            ],
        );
        let (items, count) = &list.sums;
        self.launch(
            entries.sum,
            grid(count * tiles.keys * head_dim / 4 / THREADS, 2),
            &[partial.arg(), items.arg(), dk.arg(), dv.arg(), kv_heads.into()],
        );

        let (items, count) = &list.query_items;
        self.launch(
            entries.queries,
            grid(*count, 1).shared(queries_shared),
            &[
                q.arg(),
                k.arg(),
                v.arg(),
                d_o.arg(),
                stats.arg(),
                items.arg(),
                tables.attention.chain_items.arg(),
                dq.arg(),
                heads.into(),
                kv_heads.into(),
                scores,
            ],
        );
        (dq, dk, dv)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;
    use crate::backend::Batch;

    /// One prompt, then one response after the other.
    fn group(prompt: usize, responses: &[usize]) -> Segments {
        let mut list = vec![Segment { start: 3, len: prompt, position: 0, prefix: None }];
        for &len in responses {
            let last = list[list.len() - 1];
            let start = last.start + last.len;
            list.push(Segment { start, len, position: prompt, prefix: Some(0) });
        }
        Segments::new(list).expect("a valid table")
    }

    /// So many query heads for one key/value head, without a window.
    fn key(group: usize, tiles: Tiles) -> Key {
        Key { group, kv_heads: 1, window: None, tiles }
    }

    /// The list of a batch in which every token is a query.
    fn of_all(segments: &Segments, key: Key) -> WorkList {
        let runs = segments.all_queries();
        WorkList::new(segments, &runs, &Chains::new(segments, &runs), key)
    }

    /// Expands the lists into (row of the query, row of the key, head of the group), counts how often each is computed, and
    /// compares with [`Segments::visible`].
    fn check(segments: &Segments, key: Key) -> WorkList {
        check_queries(segments, &segments.all_queries(), key)
    }

    fn check_queries(segments: &Segments, runs: &[QueryRun], key: Key) -> WorkList {
        let Key { group, window, tiles, .. } = key;
        let chains = Chains::new(segments, runs);
        let lists = WorkList::new(segments, runs, &chains, key);
        let rows = runs.iter().map(|run| run.row + run.len).max().unwrap_or(0);
        let positions = Batch { ids: &[], rows, segments, runs }.positions();
        let sees = |query: u32, position: u32| {
            let distance = positions[query as usize].wrapping_sub(position);
            (distance as usize) < window.unwrap_or(1 << 31)
        };
        let mut want = HashMap::new();
        for run in runs {
            let position = segments.first_position(run);
            for t in 0..run.len {
                for key in segments.visible(run.segment, position + t, window).into_iter().flatten() {
                    want.extend((0..group).map(|h| ((narrow(run.row + t), narrow(key), h), 1)));
                }
            }
        }
        let mut by_key = HashMap::new();
        for item in &lists.key_items {
            assert!(item.keys as usize <= tiles.keys && item.pairs > 0 && (item.offset as usize) < group);
            for pair in (item.offset..item.offset + item.pairs).map(|p| p as usize) {
                let token = lists.tokens[item.first as usize + pair / group];
                assert!((0..item.keys).any(|key| sees(token, item.position + key)), "a pair in vain");
                for key in (0..item.keys).filter(|key| sees(token, item.position + key)) {
                    *by_key.entry((token, item.row + key, pair % group)).or_insert(0) += 1;
                }
            }
        }
        assert!(by_key == want, "keys: {group} heads, window {window:?}");
        let mut by_query = HashMap::new();
        for item in &lists.query_items {
            let last = item.row + (item.offset + item.pairs - 1) / narrow(group);
            let seen = |at| (item.row..=last).any(|token| sees(token, at));
            assert!((item.first..item.first + item.keys).all(seen), "a key in vain");
            assert!(item.pairs as usize <= tiles.pairs && (item.offset as usize) < group);
            for pair in (item.offset..item.offset + item.pairs).map(|p| p as usize) {
                let token = item.row + narrow(pair / group);
                assert_eq!(positions[token as usize], item.position + narrow(pair / group));
                for at in (item.first..item.first + item.keys).filter(|&at| sees(token, at)) {
                    let chain = &chains.items[item.chain as usize..];
                    let segment = chain.iter().find(|c| at < c.end).expect("a row for every key");
                    *by_query
                        .entry((token, at.wrapping_add_signed(segment.delta), pair % group))
                        .or_insert(0) += 1;
                }
            }
        }
        assert!(by_query == want, "queries: {group} heads, window {window:?}");
        // The parts of a tile have consecutive slots in the order of their tokens, and each slot is used once.
        let mut slots = vec![0; lists.slots];
        for sum in &lists.sums {
            let mut parts: Vec<&KeyItem> =
                lists.key_items.iter().filter(|item| item.row == sum.row).collect();
            parts.sort_by_key(|item| (item.first, item.offset));
            assert!(parts.iter().map(|item| item.slot).eq(sum.slot..sum.slot + sum.parts));
            assert!(parts.iter().all(|item| item.keys == sum.keys));
            (sum.slot..sum.slot + sum.parts).for_each(|slot| slots[slot as usize] += 1);
        }
        assert!(slots.iter().all(|&n| n == 1));
        let direct = lists.key_items.iter().filter(|item| item.slot == DIRECT).count();
        assert_eq!(direct + lists.slots, lists.key_items.len());
        lists
    }

    #[test]
    fn lists_hold_what_is_seen_and_hold_it_once() {
        let s = |start, len, position, prefix| Segment { start, len, position, prefix };
        let tree = Segments::new(vec![
            s(300, 90, 0, None),
            s(2, 70, 90, Some(0)),
            s(90, 0, 160, Some(1)),
            s(100, 64, 160, Some(2)),
            s(180, 7, 160, Some(1)),
            s(200, 65, 90, Some(0)),
            s(400, 1, 0, None),
        ])
        .expect("a valid table");
        for window in [None, Some(1), Some(20), Some(63), Some(64), Some(100), Some(180), Some(1000)] {
            for (heads, kv_heads) in [(1, 1), (3, 1), (8, 2)] {
                for tiles in [Tiles::NARROW, Tiles::WIDE] {
                    check(&tree, Key { group: heads, kv_heads, window, tiles });
                }
            }
        }
        check(&group(1, &[1]), key(1, Tiles::NARROW));

        // Some of the tokens: no prompt but its last, and holes; then tiles of keys that no query sees.
        let all = tree.all_queries();
        let ids = vec![0; tree.rows()];
        let batch = Batch::new(&ids, &tree, &all);
        let some: Vec<u32> =
            (0..narrow(tree.rows())).filter(|row| *row == 389 || row % 7 < 4 && *row < 300).collect();
        for (rows, seen) in [(some, true), (vec![181, 310], false)] {
            let (_, runs) = batch.narrowed(&rows);
            for window in [None, Some(20), Some(100)] {
                for tiles in [Tiles::NARROW, Tiles::WIDE] {
                    let lists = check_queries(&tree, &runs, Key { group: 3, kv_heads: 1, window, tiles });
                    assert!(seen || lists.unseen);
                }
            }
        }
    }

    /// A prompt of 512 that 4 responses of 256 see, in Gemma 2B's heads and in 270M's: nearly all multiprocessors of an H100
    /// have a block, and none of 1024 pairs and more is left to wait for.
    #[test]
    fn pieces_fill_the_reference() {
        for (group, blocks, pairs) in [(8, 129, 896), (4, 104, 544)] {
            let segments = self::group(512, &[256; 4]);
            let lists = of_all(&segments, key(group, Tiles::NARROW));
            assert_eq!((lists.key_items.len(), lists.key_items[0].pairs), (blocks, pairs), "{group} heads");
        }
    }

    /// No block of any head width asks for more shared memory than all GPUs have: 99 KiB.
    #[test]
    fn blocks_fit_every_gpu() {
        for head_dim in [64, 128, 256, 512] {
            let bytes = Tiles::of(head_dim).shared_bytes(head_dim);
            assert!(bytes.iter().all(|&bytes| bytes <= 99 * 1024), "{head_dim}: {bytes:?}");
        }
    }

    #[test]
    fn long_lists_are_cut_and_shared() {
        let lists = check(&group(130, &[90; 6]), key(8, Tiles::NARROW));
        assert!(lists.sums.len() == 9 && lists.sums[0].parts == 11, "{:?}", lists.sums);
        // The prompt's three tiles share a list; so do the two of every response.
        assert_eq!(lists.tokens.len(), 130 + 6 * 90 + 6 * 90);
        // With much work the parts become longer, not more.
        let long = Segments::separate(&[8192]);
        let lists = of_all(&long, key(8, Tiles::NARROW));
        assert!((REFERENCE..2 * REFERENCE).contains(&lists.key_items.len()), "{}", lists.key_items.len());
        assert!(lists.key_items.is_sorted_by_key(|item| Reverse(item.pairs)));
    }
}
