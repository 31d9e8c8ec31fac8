//! Sequences of work that come again, such as the steps of a decode loop: a driver that has seen one may replay it as a
//! whole, which costs it far less than one launch after the other.
//!
//! This is the bookkeeping, without any driver: what a sequence consists of, which sequences were seen, and what was
//! made of them. Sequences are compared word by word, with all arguments: a replay does exactly what was asked.

use std::collections::{HashMap, VecDeque};
use std::hash::{DefaultHasher, Hash, Hasher};

use super::{Arg, Kernel, Launch, Ptr};

/// One piece of work that needs nothing of the host.
#[derive(Debug, Clone, PartialEq)]
pub enum Step {
    /// A kernel.
    Launch(Kernel, Launch, Vec<Arg>),
    /// Bytes set to a value.
    Fill(Ptr, u8, usize),
}

/// A shorter sequence is not worth a replay.
const LEAST_STEPS: usize = 4;
/// Recordings kept, and sequences remembered that are not recorded.
const MOST_RECORDINGS: usize = 64;
const MOST_SEEN: usize = 4096;

/// What to do with a sequence.
#[derive(Debug, PartialEq, Eq)]
pub enum Verdict<'a, R> {
    /// Its steps one by one.
    Run,
    /// It comes for the second time: record it, replay that, and [`Recordings::keep`] it.
    Record,
    /// What was recorded.
    Replay(&'a R),
}

/// The recordings of one device; `R` is the driver's handle.
#[derive(Debug)]
pub struct Recordings<R> {
    /// By hash of the sequence.
    kept: HashMap<u64, Kept<R>>,
    /// Hashes of sequences seen once, the oldest first.
    seen: VecDeque<u64>,
    /// Counts calls; the age of a recording.
    clock: u64,
}

#[derive(Debug)]
struct Kept<R> {
    words: Vec<u64>,
    recording: R,
    last_used: u64,
}

impl<R> Default for Recordings<R> {
    fn default() -> Self {
        Self { kept: HashMap::new(), seen: VecDeque::new(), clock: 0 }
    }
}

/// A sequence as words: equal words, equal work.
fn words(steps: &[Step]) -> Vec<u64> {
    let mut words = Vec::with_capacity(steps.len() * 16);
    for step in steps {
        match step {
            Step::Launch(kernel, launch, args) => {
                words.extend([0, kernel.0 as u64, u64::from(launch.shared_bytes), args.len() as u64]);
                words.extend(launch.grid.iter().chain(&launch.block).map(|n| u64::from(*n)));
                for arg in args {
                    match arg {
                        Arg::Ptr(Ptr(x)) => words.extend([0, *x]),
                        Arg::U32(x) => words.extend([1, u64::from(*x)]),
                        Arg::U64(x) => words.extend([2, *x]),
                        Arg::F32(x) => words.extend([3, u64::from(x.to_bits())]),
                        Arg::Bytes(x) => {
                            // Eight to a word: they may be a kibibyte, and this is done for every launch.
                            words.extend([4, x.len() as u64]);
                            words.extend(x.chunks(8).map(|part| {
                                let mut word = [0; 8];
                                word[..part.len()].copy_from_slice(part);
                                u64::from_ne_bytes(word)
                            }));
                        }
                    }
                }
            }
            Step::Fill(Ptr(to), value, bytes) => words.extend([1, *to, u64::from(*value), *bytes as u64]),
        }
    }
    words
}

fn hash(words: &[u64]) -> u64 {
    let mut hash = DefaultHasher::new();
    words.hash(&mut hash);
    hash.finish()
}

impl<R> Recordings<R> {
    /// What to do with a sequence that is about to run.
    pub fn look(&mut self, steps: &[Step]) -> Verdict<'_, R> {
        if steps.len() < LEAST_STEPS {
            return Verdict::Run;
        }
        self.clock += 1;
        let words = words(steps);
        let hash = hash(&words);
        if self.kept.get(&hash).is_some_and(|kept| kept.words == words) {
            let kept = self.kept.get_mut(&hash).expect("it is there");
            kept.last_used = self.clock;
            return Verdict::Replay(&kept.recording);
        }
        if let Some(at) = self.seen.iter().position(|seen| *seen == hash) {
            self.seen.remove(at);
            return Verdict::Record;
        }
        if self.seen.len() == MOST_SEEN {
            self.seen.pop_front();
        }
        self.seen.push_back(hash);
        Verdict::Run
    }

    /// Keeps the recording of a sequence. Returns one that had to give way, if any: the longest unused.
    #[must_use]
    pub fn keep(&mut self, steps: &[Step], recording: R) -> Option<R> {
        let words = words(steps);
        let hash = hash(&words);
        let oldest = || self.kept.iter().min_by_key(|(_, kept)| kept.last_used).map(|(hash, _)| *hash);
        let leaves = if self.kept.len() < MOST_RECORDINGS { None } else { oldest() };
        let left = leaves.and_then(|hash| self.kept.remove(&hash));
        let replaced = self.kept.insert(hash, Kept { words, recording, last_used: self.clock });
        // Another sequence of the same hash would be a wonder; both cannot leave at once.
        left.or(replaced).map(|kept| kept.recording)
    }

    /// Forgets all and returns what was recorded.
    pub fn drain(&mut self) -> Vec<R> {
        self.seen.clear();
        self.kept.drain().map(|(_, kept)| kept.recording).collect()
    }
}
