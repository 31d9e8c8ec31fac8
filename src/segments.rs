//! The one description of who attends to whom: prefill, decode and training share it.
//!
//! Tokens lie flat: row `r` of the key/value arrays belongs to exactly one *segment*. A segment is a run of
//! consecutive rows with an absolute position and, optionally, a *prefix*: another segment that all its tokens
//! see in full (and through it, that segment's own prefix, and so on). A few-shot header is a root; a prompt is
//! a child of it; each of its N responses is a child of the prompt. A query at local index `t` sees its whole
//! prefix chain and its own tokens `0..=t`, further cut by the layer's sliding window through absolute
//! positions. Because a prefix has rows of its own, its activations exist once per group, forward and backward,
//! and its key/value gradients sum over all that see it.

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

    /// The longest sequence that the table describes, in tokens.
    pub fn longest(&self) -> usize {
        self.list.iter().map(|s| s.position + s.len).max().unwrap_or(0)
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
        let index = self.reserve(prefix, tokens.len());
        self.ids.extend_from_slice(tokens);
        index
    }

    /// Appends a segment whose tokens are not known yet (a stream's tail); all after it must be reserved, too.
    pub fn reserve(&mut self, prefix: Option<usize>, len: usize) -> usize {
        let list = &mut self.segments.list;
        let position = prefix.map_or(0, |p| list[p].position + list[p].len);
        // Segments lie end to end.
        let start = list.last().map_or(0, |s| s.start + s.len);
        list.push(Segment { start, len, position, prefix });
        list.len() - 1
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
