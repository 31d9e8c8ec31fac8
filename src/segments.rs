//! The one description of who attends to whom: prefill, decode and training share it.
//!
//! Tokens lie flat: row `r` of the key/value arrays belongs to exactly one *segment*. A segment is a run of
//! consecutive rows with an absolute position and, optionally, a *prefix*: another segment that all its tokens
//! see in full (and through it, that segment's own prefix, and so on). A few-shot header is a root; a prompt is
//! a child of it; each of its N responses is a child of the prompt, or of what it begins with alike with others. A query at
//! local index `t` sees its whole prefix chain and its own tokens `0..=t`, further cut by the layer's sliding window through
//! absolute positions. Because a prefix has rows of its own, its activations exist once per group, forward and backward, and
//! its key/value gradients sum over all that see it.

use thiserror::Error;

/// One run of tokens: rows `start..start + len`, at absolute positions `position..position + len`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// First row in the key/value arrays.
    pub start: usize,
    /// Number of tokens.
    pub len: usize,
    /// Absolute position of the first token (the number of tokens in the prefix chain).
    pub position: usize,
    /// Index of the segment that this one sees in full.
    pub prefix: Option<usize>,
}

/// A consecutive run of queries of one segment: query rows `row..row + len` are the segment's tokens
/// `first..first + len`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QueryRun {
    /// Index into the segment table.
    pub segment: usize,
    /// Local index of the first query inside its segment.
    pub first: usize,
    /// Number of queries.
    pub len: usize,
    /// First row in the query array.
    pub row: usize,
}

/// Why a segment table cannot be used.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum SegmentError {
    /// A prefix must come earlier in the table, so that chains end.
    #[error("segment {segment}: prefix {prefix} does not come before it")]
    PrefixOrder {
        /// The offending segment.
        segment: usize,
        /// Its prefix.
        prefix: usize,
    },
    /// Positions continue the prefix's.
    #[error("segment {segment}: starts at position {found}, its prefix ends at {expected}")]
    Position {
        /// The offending segment.
        segment: usize,
        /// Position found.
        found: usize,
        /// Position that continues the prefix.
        expected: usize,
    },
    /// Two segments claim a row.
    #[error("segments {first} and {second} share rows")]
    Overlap {
        /// The segment that starts first.
        first: usize,
        /// The other.
        second: usize,
    },
    /// A query run reaches outside its segment.
    #[error("a query run asks for tokens {first}..{end} of segment {segment}, which has {len}")]
    Query {
        /// The segment.
        segment: usize,
        /// First local index asked for.
        first: usize,
        /// One past the last.
        end: usize,
        /// Length of the segment.
        len: usize,
    },
}

/// A checked table of segments.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Segments {
    list: Vec<Segment>,
}

impl Segments {
    /// Checks that prefixes come first, positions continue them and no row belongs to two segments.
    pub fn new(list: Vec<Segment>) -> Result<Self, SegmentError> {
        for (i, s) in list.iter().enumerate() {
            let expected = match s.prefix {
                None => 0,
                Some(p) if p < i => list[p].position + list[p].len,
                Some(p) => return Err(SegmentError::PrefixOrder { segment: i, prefix: p }),
            };
            if s.position != expected {
                return Err(SegmentError::Position { segment: i, found: s.position, expected });
            }
        }
        let mut by_row: Vec<usize> = (0..list.len()).filter(|&i| list[i].len > 0).collect();
        by_row.sort_by_key(|&i| list[i].start);
        for w in by_row.windows(2) {
            if list[w[0]].start + list[w[0]].len > list[w[1]].start {
                return Err(SegmentError::Overlap { first: w[0], second: w[1] });
            }
        }
        Ok(Self { list })
    }

    /// One segment per sequence, laid end to end, none sharing anything: the plain batch.
    pub fn separate(lens: &[usize]) -> Self {
        let mut start = 0;
        let list = lens
            .iter()
            .map(|&len| {
                let s = Segment { start, len, position: 0, prefix: None };
                start += len;
                s
            })
            .collect();
        Self { list }
    }

    /// The segments, in table order.
    pub fn list(&self) -> &[Segment] {
        &self.list
    }

    /// Number of rows that the key/value arrays need.
    pub fn rows(&self) -> usize {
        self.list.iter().map(|s| s.start + s.len).max().unwrap_or(0)
    }

    /// Absolute position of the first query of a run.
    pub fn first_position(&self, run: &QueryRun) -> usize {
        self.list[run.segment].position + run.first
    }

    /// The prefix chain of segment `s`, root first, `s` itself last.
    pub fn chain(&self, s: usize) -> Vec<usize> {
        let mut chain = vec![s];
        while let Some(p) = self.list[chain[chain.len() - 1]].prefix {
            chain.push(p);
        }
        chain.reverse();
        chain
    }

    /// How many first positions two segments see the same rows of: to the end of the last prefix that both continue.
    pub fn common(&self, a: usize, b: usize) -> usize {
        let above = |s: usize| std::iter::successors(self.list[s].prefix, |&p| self.list[p].prefix);
        // Prefixes come first in the table.
        let (mut left, mut right) = (above(a).peekable(), above(b).peekable());
        while let (Some(&x), Some(&y)) = (left.peek(), right.peek()) {
            match x.cmp(&y) {
                std::cmp::Ordering::Equal => return self.list[x].position + self.list[x].len,
                std::cmp::Ordering::Less => right.next(),
                std::cmp::Ordering::Greater => left.next(),
            };
        }
        0
    }

    /// The longest sequence that the table describes, in tokens.
    pub fn longest(&self) -> usize {
        self.list.iter().map(|s| s.position + s.len).max().unwrap_or(0)
    }

    /// Appends a segment of rows `start..start + len`, which no other has, after `prefix`; returns its index.
    pub fn push(&mut self, prefix: Option<usize>, start: usize, len: usize) -> usize {
        let position = prefix.map_or(0, |p| self.list[p].position + self.list[p].len);
        self.list.push(Segment { start, len, position, prefix });
        self.list.len() - 1
    }

    /// Ends a segment that nobody continues yet after its first `len` tokens.
    pub fn end(&mut self, segment: usize, len: usize) {
        self.list[segment].len = len;
    }

    /// Query runs that ask for every token of every segment, query row = key/value row. This is prefill and
    /// training.
    pub fn all_queries(&self) -> Vec<QueryRun> {
        (0..self.list.len())
            .map(|i| QueryRun { segment: i, first: 0, len: self.list[i].len, row: self.list[i].start })
            .collect()
    }

    /// Refuses query runs that reach outside their segment.
    pub fn check(&self, runs: &[QueryRun]) -> Result<(), SegmentError> {
        for r in runs {
            let len = self.list[r.segment].len;
            if r.first + r.len > len {
                let (segment, first, end) = (r.segment, r.first, r.first + r.len);
                return Err(SegmentError::Query { segment, first, end, len });
            }
        }
        Ok(())
    }

    /// The rows that the query at absolute position `query` of segment `s` sees under `window` (`None`: all), as
    /// row ranges in order of absolute position. With a window of W it sees the last W positions, its own
    /// included (Transformers' convention).
    pub fn visible(&self, s: usize, query: usize, window: Option<usize>) -> Vec<std::ops::Range<usize>> {
        let lo = window.map_or(0, |w| (query + 1).saturating_sub(w));
        self.chain(s)
            .into_iter()
            .filter_map(|i| {
                let seg = self.list[i];
                let from = lo.max(seg.position);
                let to = (query + 1).min(seg.position + seg.len);
                (from < to).then(|| seg.start + (from - seg.position)..seg.start + (to - seg.position))
            })
            .collect()
    }

    /// Absolute position of every row (rows that belong to no segment get 0).
    pub fn positions(&self) -> Vec<u32> {
        let mut out = vec![0; self.rows()];
        for s in &self.list {
            for t in 0..s.len {
                out[s.start + t] = (s.position + t) as u32;
            }
        }
        out
    }
}

/// A prompt and some continuations of it.
#[derive(Debug, Clone, Copy)]
pub struct Continued<'a> {
    /// Prompt tokens; not empty.
    pub prompt: &'a [u32],
    /// Response tokens, each not empty.
    pub responses: &'a [&'a [u32]],
}

/// Items by their next token, in the order in which tokens first occur; those without one are left out.
pub fn by_next(items: &[usize], next: impl Fn(usize) -> Option<u32>) -> Vec<Vec<usize>> {
    let mut parts: Vec<(u32, Vec<usize>)> = Vec::new();
    for &item in items {
        let Some(token) = next(item) else { continue };
        match parts.iter_mut().find(|(of, _)| *of == token) {
            Some((_, part)) => part.push(item),
            None => parts.push((token, vec![item])),
        }
    }
    parts.into_iter().map(|(_, part)| part).collect()
}

/// A batch under construction: tokens laid end to end, each run of them a segment.
#[derive(Debug, Clone, Default)]
pub struct Layout {
    segments: Segments,
    ids: Vec<u32>,
}

impl Layout {
    /// Lays out prompts so that what all of them begin with (a few-shot header, the turn template) is one root
    /// segment that they share. Returns the segment of every prompt, in order. Every prompt keeps at least its
    /// last token to itself: that is where its responses begin. Prompts must not be empty.
    pub fn of_prompts(prompts: &[&[u32]]) -> (Self, Vec<usize>) {
        let mut layout = Self::default();
        let shared = match prompts {
            [first, rest @ ..] if !rest.is_empty() => {
                let common = |p: &&[u32]| first.iter().zip(*p).take_while(|(a, b)| a == b).count();
                let shortest = prompts.iter().map(|p| p.len() - 1).min().unwrap_or(0);
                rest.iter().map(common).min().unwrap_or(0).min(shortest)
            }
            _ => 0,
        };
        let root = (shared > 0).then(|| layout.push(None, &prompts[0][..shared]));
        let of = prompts.iter().map(|p| layout.push(root, &p[shared..])).collect();
        (layout, of)
    }

    /// Appends a segment after `prefix` and returns its index.
    pub fn push(&mut self, prefix: Option<usize>, tokens: &[u32]) -> usize {
        // Segments lie end to end.
        let start = self.ids.len();
        self.ids.extend_from_slice(tokens);
        self.segments.push(prefix, start, tokens.len())
    }

    /// Appends continuations of `prefix` as a tree: what some of them begin with alike is one segment, which the rest of each
    /// continues, if that saves at least a sixteenth of their tokens, because a segment of few tokens may cost a device as much as
    /// a longer one. Returns the row of every token of every continuation.
    pub fn push_tree(&mut self, prefix: usize, continuations: &[&[u32]]) -> Vec<Vec<u32>> {
        let mut rows = vec![vec![]; continuations.len()];
        let mut push = |prefix, part: &[usize], tokens: &[u32]| {
            let first = self.ids.len() as u32;
            let segment = self.push(Some(prefix), tokens);
            part.iter().for_each(|&i| rows[i].extend(first..self.ids.len() as u32));
            segment
        };
        // Continuations that have their tokens before `from` in segments, of which `prefix` is the last, and agree in those
        // before `agreed`.
        let mut open = vec![(prefix, 0, 0, (0..continuations.len()).collect::<Vec<_>>())];
        while let Some((prefix, from, agreed, alike)) = open.pop() {
            for &i in alike.iter().filter(|&&i| continuations[i].len() == agreed && from < agreed) {
                push(prefix, &[i], &continuations[i][from..]);
            }
            for part in by_next(&alike, |i| continuations[i].get(agreed).copied()) {
                let one = continuations[part[0]];
                let common =
                    |&i: &usize| one.iter().zip(continuations[i]).take_while(|(a, b)| a == b).count();
                let agreed = part.iter().map(common).min().unwrap_or(0);
                let tokens: usize = part.iter().map(|&i| continuations[i].len() - from).sum();
                let saved = (agreed - from) * (part.len() - 1);
                if part.len() > 1 && 16 * saved < tokens {
                    open.push((prefix, from, agreed, part));
                } else {
                    open.push((push(prefix, &part, &one[from..agreed]), agreed, agreed, part));
                }
            }
        }
        rows
    }

    /// The segment table.
    pub fn segments(&self) -> &Segments {
        &self.segments
    }

    /// Token ids of the rows that are known.
    pub fn ids(&self) -> &[u32] {
        &self.ids
    }

    /// The row of a segment's last token.
    pub fn last_row(&self, segment: usize) -> u32 {
        let s = self.segments.list[segment];
        (s.start + s.len - 1) as u32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tree() -> Segments {
        Segments::new(vec![
            Segment { start: 0, len: 3, position: 0, prefix: None },
            Segment { start: 3, len: 2, position: 3, prefix: Some(0) },
            Segment { start: 5, len: 4, position: 5, prefix: Some(1) },
            Segment { start: 9, len: 1, position: 5, prefix: Some(1) },
        ])
        .unwrap()
    }

    #[test]
    fn a_query_sees_its_chain_and_itself() {
        let t = tree();
        assert_eq!(t.visible(2, 6, None), vec![0..3, 3..5, 5..7]);
        assert_eq!(t.visible(3, 5, None), vec![0..3, 3..5, 9..10]);
        assert_eq!(t.visible(1, 3, None), vec![0..3, 3..4]);
        assert_eq!([t.common(2, 3), t.common(2, 2), t.common(1, 3), t.common(0, 3)], [5, 5, 3, 0]);
    }

    #[test]
    fn the_window_cuts_by_absolute_position() {
        let t = tree();
        assert_eq!(t.visible(2, 7, Some(4)), vec![4..5, 5..8]);
        assert_eq!(t.visible(2, 8, Some(1)), vec![8..9]);
        assert_eq!(t.visible(0, 0, Some(2)), vec![0..1]);
    }

    #[test]
    fn prompts_share_what_they_begin_with() {
        let (layout, of) = Layout::of_prompts(&[&[1, 2, 3, 4], &[1, 2, 5], &[1, 2, 3]]);
        assert_eq!(layout.ids(), &[1, 2, 3, 4, 5, 3]);
        let list = layout.segments().list();
        assert_eq!(list[0], Segment { start: 0, len: 2, position: 0, prefix: None });
        assert_eq!(list[of[1]], Segment { start: 4, len: 1, position: 2, prefix: Some(0) });
        assert_eq!(layout.last_row(of[2]), 5);
        // Equal prompts still own their last token; one prompt has no root.
        let (layout, of) = Layout::of_prompts(&[&[7, 8], &[7, 8]]);
        assert_eq!((layout.ids(), of), (&[7, 8, 8][..], vec![1, 2]));
        let (layout, of) = Layout::of_prompts(&[&[7, 8]]);
        assert_eq!((layout.ids(), of), (&[7, 8][..], vec![0]));
        Segments::new(layout.segments().list().to_vec()).unwrap();
    }

    #[test]
    fn continuations_are_a_tree() {
        let (mut layout, of) = Layout::of_prompts(&[&[1, 2]]);
        let rows = layout.push_tree(of[0], &[&[5, 6, 7], &[8], &[5, 6, 9, 9], &[5], &[], &[5, 6, 7]]);
        // Segments: 5; 8; 6; 7; 9, 9.
        assert_eq!(layout.ids(), &[1, 2, 5, 8, 6, 7, 9, 9]);
        assert_eq!(rows, [&[2, 4, 5][..], &[3], &[2, 4, 6, 7], &[2], &[], &[2, 4, 5]]);
        let segments = Segments::new(layout.segments().list().to_vec()).unwrap();
        let chain: Vec<usize> = segments.chain(5).iter().map(|&s| segments.list()[s].len).collect();
        assert_eq!(chain, [2, 1, 1, 2]);
        // Little in common: one after the other, but for those that agree for longer.
        let till = |n: usize, end: u32| [&[1; 20][..n], &[end; 20][n..]].concat();
        let long = [till(1, 7), till(1, 8), till(20, 1), till(15, 9), till(1, 8)];
        let (mut layout, of) = Layout::of_prompts(&[&[1, 2]]);
        let rows = layout.push_tree(of[0], &long.each_ref().map(|l| &l[..]));
        assert_eq!(layout.ids().len(), 2 + 20 + 20 + 20 + 5);
        assert!(rows[1] == rows[4] && rows[2][..15] == rows[3][..15] && rows[0][0] != rows[1][0]);
        for (rows, long) in rows.iter().zip(&long) {
            assert!(rows.iter().zip(long).all(|(&row, token)| layout.ids()[row as usize] == *token));
        }
        Segments::new(layout.segments().list().to_vec()).unwrap();
        // Nothing in common: the same.
        let (mut layout, of) = Layout::of_prompts(&[&[1, 2]]);
        assert_eq!(layout.push_tree(of[0], &[&[3, 4], &[5, 6]]), [[2, 3], [4, 5]]);
        assert_eq!(layout.segments().list()[2], Segment { start: 4, len: 2, position: 2, prefix: Some(0) });
    }

    #[test]
    fn bad_tables_are_refused() {
        let root = Segment { start: 0, len: 3, position: 0, prefix: None };
        let late = Segment { start: 3, len: 1, position: 0, prefix: Some(1) };
        assert_eq!(Segments::new(vec![root, late]), Err(SegmentError::PrefixOrder { segment: 1, prefix: 1 }));
        let gap = Segment { start: 3, len: 1, position: 4, prefix: Some(0) };
        assert_eq!(
            Segments::new(vec![root, gap]),
            Err(SegmentError::Position { segment: 1, found: 4, expected: 3 })
        );
        let overlap = Segment { start: 2, len: 1, position: 3, prefix: Some(0) };
        assert_eq!(Segments::new(vec![root, overlap]), Err(SegmentError::Overlap { first: 0, second: 1 }));
    }
}
