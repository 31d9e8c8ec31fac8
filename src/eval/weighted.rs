//! Majority votes that the verifier's score weighs.
//!
//! Among N samples an answer's total is the sum of the scores of the samples that give it. The largest total wins; of
//! equal totals each wins with equal chance. Samples without an answer do not vote, an answer that nobody of the N gives
//! is not elected however low the totals are, and if nobody votes the outcome is wrong. The winner is right to the share
//! of its samples among the N that are. With scores of 1 that is the plain majority, with a verifier that is never wrong
//! pass@N.
//!
//! Totals tie as decimals do: a score counts in units of 10^-12 of the power of ten at or above the pool's largest
//! magnitude, because 0.1 + 0.2 and 0.3 differ as f64.

use std::collections::BTreeMap;

use super::Sample;
use crate::rng::{Domain, Stream};

/// Subsets that are drawn where totals are too many for the exact mean. A draw's error per problem is then at most
/// 0.5/sqrt(2048) = 0.011, and that of a mean over K problems smaller by sqrt(K).
const SUBSETS: usize = 2048;
/// Most pairs of votes and total of all answers together that the exact mean is taken over.
const MAX_TOTALS: usize = 1 << 16;
/// Most steps of the exact mean.
const MAX_STEPS: usize = 1 << 27;

/// An answer's samples: score in units, and whether it is right.
type Ballot = Vec<(i64, bool)>;
/// A sample that votes: its answer's number, and the two.
type Vote = (usize, i64, bool);

/// Accuracy of the answer with the largest total score among N samples: the mean over all N-subsets of the pool, so
/// unbiased for N fresh samples. Exact where the answers' totals are few, as those of a verifier that gives a few scores
/// are; otherwise over 2048 subsets that `seed` and `problem` draw, which is unbiased as well. Needs
/// `1 <= n <= samples.len()`.
pub fn weighted_majority_at_n(samples: &[Sample], n: usize, seed: u64, problem: u64) -> f64 {
    let pool = samples.len();
    let (votes, ballots) = ballots(samples);
    if n == pool {
        return elected(&ballots.iter().map(|b| tally(b.iter())).collect::<Vec<_>>());
    }
    if n == 1 {
        let right = ballots.iter().flatten().filter(|(_, correct)| *correct).count();
        return right as f64 / pool as f64;
    }
    exact(&ballots, pool, n).unwrap_or_else(|| {
        let number = problem << 20 | n as u64;
        drawn(&votes, ballots.len(), n, Stream::new(seed, Domain::Votes, number))
    })
}

/// The samples' votes, and the same by answer.
fn ballots(samples: &[Sample]) -> (Vec<Option<Vote>>, Vec<Ballot>) {
    let largest = samples.iter().map(|s| s.score.abs()).fold(0.0, f64::max);
    // A power of ten above the largest f64 is infinite, and one below the smallest 0: both only shift the unit.
    let scale = if largest > 0.0 { 10f64.powi(largest.log10().ceil() as i32) } else { 1.0 };
    let scale = scale.clamp(f64::MIN_POSITIVE, f64::MAX);
    let unit = |score: f64| (score / scale * 1e12).round() as i64;
    let mut numbers: BTreeMap<&str, usize> = BTreeMap::new();
    for answer in samples.iter().filter_map(|s| s.answer.as_deref()) {
        numbers.insert(answer, 0);
    }
    numbers.values_mut().enumerate().for_each(|(i, number)| *number = i);
    let mut ballots = vec![Ballot::new(); numbers.len()];
    let of = samples
        .iter()
        .map(|s| {
            let number = numbers[s.answer.as_deref()?];
            ballots[number].push((unit(s.score), s.correct));
            Some((number, unit(s.score), s.correct))
        })
        .collect();
    (of, ballots)
}

/// What an answer has of some samples.
#[derive(Debug, Clone, Copy, Default)]
struct Tally {
    votes: usize,
    total: i64,
    right: usize,
}

impl Tally {
    fn add(&mut self, score: i64, correct: bool) {
        self.votes += 1;
        self.total += score;
        self.right += usize::from(correct);
    }
}

fn tally<'a>(ballot: impl Iterator<Item = &'a (i64, bool)>) -> Tally {
    let mut tally = Tally::default();
    ballot.for_each(|&(score, correct)| tally.add(score, correct));
    tally
}

/// The chance that who is elected is right.
fn elected(tallies: &[Tally]) -> f64 {
    let voted = || tallies.iter().filter(|t| t.votes > 0);
    let Some(most) = voted().map(|t| t.total).max() else { return 0.0 };
    let winners = voted().filter(|t| t.total == most);
    let (count, right) =
        winners.fold((0, 0.0), |(count, right), t| (count + 1, right + t.right as f64 / t.votes as f64));
    right / f64::from(count)
}

/// The mean over subsets that are drawn.
fn drawn(votes: &[Option<Vote>], answers: usize, n: usize, mut stream: Stream) -> f64 {
    let mut order: Vec<usize> = (0..votes.len()).collect();
    let mut sum = 0.0;
    for _ in 0..SUBSETS {
        let mut tallies = vec![Tally::default(); answers];
        // The beginning of a shuffle of whatever order there is.
        for i in 0..n {
            let further = stream.below((order.len() - i) as u64) as usize;
            order.swap(i, i + further);
            if let Some((answer, score, correct)) = votes[order[i]] {
                tallies[answer].add(score, correct);
            }
        }
        sum += elected(&tallies);
    }
    sum / SUBSETS as f64
}

/// Of an answer's subsets of u samples, by their total: the share that has it, and the mean over all u-subsets of the
/// share of right samples where they have it, else 0.
type Totals = BTreeMap<i64, (f64, f64)>;

/// [`Totals`] for u = 0, 1, ... votes; `None` where there are more than `room`.
fn totals(ballot: &Ballot, most: usize, room: &mut usize) -> Option<Vec<Totals>> {
    // Here the second of a pair is the mean number of right samples. A u-subset of the first i samples holds the last of
    // them with chance u/i.
    let mut by_votes: Vec<Totals> = vec![BTreeMap::from([(0, (1.0, 0.0))])];
    for (i, &(score, correct)) in ballot.iter().enumerate() {
        let so_far = (i + 1) as f64;
        let mut next: Vec<Totals> = Vec::with_capacity(by_votes.len() + 1);
        for votes in 0..=(i + 1).min(most) {
            let with = votes as f64 / so_far;
            let mut all = Totals::new();
            for (total, (share, right)) in by_votes.get(votes).into_iter().flatten() {
                let entry = all.entry(*total).or_default();
                entry.0 += (1.0 - with) * share;
                entry.1 += (1.0 - with) * right;
            }
            let fewer = votes.checked_sub(1).and_then(|votes| by_votes.get(votes));
            for (total, (share, right)) in fewer.into_iter().flatten() {
                let entry = all.entry(total + score).or_default();
                entry.0 += with * share;
                entry.1 += with * (right + if correct { *share } else { 0.0 });
            }
            next.push(all);
        }
        by_votes = next;
        if by_votes.iter().map(BTreeMap::len).sum::<usize>() > *room {
            return None;
        }
    }
    *room -= by_votes.iter().map(BTreeMap::len).sum::<usize>().min(*room);
    for (votes, all) in by_votes.iter_mut().enumerate().skip(1) {
        all.values_mut().for_each(|(_, right)| *right /= votes as f64);
    }
    Some(by_votes)
}

/// The mean over all subsets: the sum over t of the chance that the winner's total is t. For each t a pass over the
/// answers carries the chance of (votes drawn so far, rivals with total t, winner met or not), as in
/// [`super::estimators::majority_at_n`]. `None` where that is too much work.
fn exact(ballots: &[Ballot], pool: usize, n: usize) -> Option<f64> {
    let mut room = MAX_TOTALS;
    let tables: Vec<Vec<Totals>> =
        ballots.iter().map(|ballot| totals(ballot, n, &mut room)).collect::<Option<_>>()?;
    // How many answers can have each total.
    let mut candidates: BTreeMap<i64, usize> = BTreeMap::new();
    for table in &tables {
        let mut own: Vec<i64> = table[1..].iter().flat_map(|all| all.keys().copied()).collect();
        own.sort_unstable();
        own.dedup();
        own.into_iter().for_each(|total| *candidates.entry(total).or_default() += 1);
    }
    let width = |answers: usize| answers.min(n) + 1;
    let steps = candidates.values().try_fold(0usize, |steps, &answers| {
        steps.checked_add(pool.checked_mul(n)?.checked_mul(width(answers))?)
    });
    if steps.is_none_or(|steps| steps > MAX_STEPS) {
        return None;
    }
    let tables: Vec<Vec<Ranked>> =
        tables.iter().map(|table| table.iter().map(Ranked::new).collect()).collect();
    let sizes: Vec<usize> = ballots.iter().map(Vec::len).collect();
    let draws = super::estimators::draws(&sizes, pool, n);
    let mut right = 0.0;
    for (&total, &answers) in &candidates {
        let against: Vec<Vec<Against>> =
            tables.iter().map(|table| table.iter().map(|ranked| ranked.against(total)).collect()).collect();
        right += wins_with(&against, &draws, n, width(answers));
    }
    Some(right)
}

/// [`Totals`] in their order, each with the share of those below it.
#[derive(Debug)]
struct Ranked(Vec<(i64, Against)>);

/// An answer's chances against a winner's total, given its votes: that its own is lower, that it is the same, and that
/// with the share of right samples.
#[derive(Debug, Clone, Copy, Default)]
struct Against {
    below: f64,
    same: f64,
    right: f64,
}

impl Ranked {
    fn new(totals: &Totals) -> Self {
        let mut below = 0.0;
        let row = |(&total, &(same, right)): (&i64, &(f64, f64))| {
            let against = Against { below, same, right };
            below += same;
            (total, against)
        };
        Self(totals.iter().map(row).collect())
    }

    fn against(&self, total: i64) -> Against {
        let place = self.0.partition_point(|(own, _)| *own < total);
        match (self.0.get(place), self.0.last()) {
            (Some((own, against)), _) if *own == total => *against,
            (Some((_, next)), _) => Against { below: next.below, ..Against::default() },
            (None, Some((_, last))) => Against { below: last.below + last.same, ..Against::default() },
            (None, None) => Against::default(),
        }
    }
}

/// The part of [`exact`] in which the winner's total is the one that `against` is about; at most `width - 1` answers
/// have it.
fn wins_with(against: &[Vec<Against>], draws: &[Vec<Vec<f64>>], n: usize, width: usize) -> f64 {
    let at = |d: usize, s: usize| d * width + s;
    let mut open = vec![0.0; (n + 1) * width];
    let mut won = open.clone();
    open[0] = 1.0;
    for (answer, table) in against.iter().zip(draws) {
        let mut next_open = vec![0.0; open.len()];
        let mut next_won = vec![0.0; won.len()];
        for (d, chances) in table.iter().enumerate() {
            for s in 0..width {
                let (o, w) = (open[at(d, s)], won[at(d, s)]);
                if o == 0.0 && w == 0.0 {
                    continue;
                }
                for (u, p) in chances.iter().enumerate() {
                    // Without votes it is no rival.
                    let without = Against { below: 1.0, ..Against::default() };
                    let Against { below, same, right } = if u == 0 { without } else { answer[u] };
                    next_open[at(d + u, s)] += p * below * o;
                    next_won[at(d + u, s)] += p * below * w;
                    if same > 0.0 {
                        next_won[at(d + u, s)] += p * right * o;
                        // A rival more than there are answers to be one has no chance.
                        if s + 1 < width {
                            next_open[at(d + u, s + 1)] += p * same * o;
                            next_won[at(d + u, s + 1)] += p * same * w;
                        }
                    }
                }
            }
        }
        (open, won) = (next_open, next_won);
    }
    won.iter().enumerate().map(|(i, p)| p / (i % width + 1) as f64).sum()
}
