//! Sequences of work that repeat, such as the steps of a decode loop. A driver that has recorded a sequence may replay it as a
//! whole, which costs far less than one launch after the other.
//!
//! This is the bookkeeping, without any driver: the steps of a sequence, the sequences seen so far, and their recordings. Sequences
//! are compared word by word, with all arguments, so that a replay does exactly the work that was asked for. A sequence that is
//! replayed stays words; its steps are decoded only to run it step by step.

use std::collections::{HashMap, VecDeque};

use super::{Arg, Kernel, Launch, Ptr};

/// One step of work, which needs nothing of the host.
#[derive(Debug, Clone, PartialEq)]
pub enum Step {
    /// A kernel.
    Launch(Kernel, Launch, Vec<Arg>),
    /// A number of bytes, all set to a value.
    Fill(Ptr, u8, usize),
}

/// The fewest steps of a sequence that is worth a replay.
const MIN_STEPS: usize = 4;
/// The most recordings that are kept, and the most sequences without a recording that are remembered.
const MAX_RECORDINGS: usize = 64;
const MAX_SEEN: usize = 4096;

/// Steps in order, encoded as words: equal words mean equal work. A decode step has some hundred launches of some words each.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Steps {
    words: Vec<u64>,
    count: usize,
}

/// First word of a step.
const LAUNCH: u64 = 0;
const FILL: u64 = 1;
/// First word of an argument.
const PTR: u64 = 0;
const U32: u64 = 1;
const U64: u64 = 2;
const F32: u64 = 3;
const BYTES: u64 = 4;

impl Steps {
    /// Number of steps.
    pub fn len(&self) -> usize {
        self.count
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Adds a kernel.
    pub fn launch(&mut self, kernel: Kernel, launch: &Launch, args: &[Arg]) {
        let words = &mut self.words;
        words.extend([LAUNCH, kernel.0 as u64, u64::from(launch.shared_bytes), args.len() as u64]);
        words.extend(launch.grid.iter().chain(&launch.block).map(|n| u64::from(*n)));
        for arg in args {
            match arg {
                Arg::Ptr(Ptr(x)) => words.extend([PTR, *x]),
                Arg::U32(x) => words.extend([U32, u64::from(*x)]),
                Arg::U64(x) => words.extend([U64, *x]),
                Arg::F32(x) => words.extend([F32, u64::from(x.to_bits())]),
                Arg::Bytes(x) => {
                    words.extend([BYTES, x.len() as u64]);
                    words.extend(x.chunks(8).map(|part| {
                        let mut word = [0; 8];
                        word[..part.len()].copy_from_slice(part);
                        u64::from_ne_bytes(word)
                    }));
                }
            }
        }
        self.count += 1;
    }

    /// Adds bytes that are set to a value.
    pub fn fill(&mut self, Ptr(to): Ptr, value: u8, bytes: usize) {
        self.words.extend([FILL, to, u64::from(value), bytes as u64]);
        self.count += 1;
    }

    /// Adds a step.
    pub fn push(&mut self, step: &Step) {
        match step {
            Step::Launch(kernel, launch, args) => self.launch(*kernel, launch, args),
            Step::Fill(to, value, bytes) => self.fill(*to, *value, *bytes),
        }
    }

    /// The steps as they were added.
    pub fn iter(&self) -> impl Iterator<Item = Step> {
        let mut words = self.words.iter().copied();
        let mut next = move || words.next().expect("steps are whole");
        let narrow = |x: u64| u32::try_from(x).expect("it was 32 bits");
        (0..self.count).map(move |_| {
            if next() == FILL {
                let [to, value, bytes] = [next(), next(), next()];
                return Step::Fill(Ptr(to), value as u8, bytes as usize);
            }
            let [kernel, shared, args] = [next(), next(), next()];
            let grid = [(); 3].map(|()| narrow(next()));
            let block = [(); 3].map(|()| narrow(next()));
            let arg = |_| {
                let (kind, x) = (next(), next());
                match kind {
                    PTR => Arg::Ptr(Ptr(x)),
                    U32 => Arg::U32(narrow(x)),
                    U64 => Arg::U64(x),
                    F32 => Arg::F32(f32::from_bits(narrow(x))),
                    _ => {
                        let parts = (0..x.div_ceil(8)).flat_map(|_| next().to_ne_bytes());
                        let mut bytes: Vec<u8> = parts.collect();
                        bytes.truncate(x as usize);
                        Arg::Bytes(bytes)
                    }
                }
            };
            let args = (0..args).map(arg).collect();
            Step::Launch(Kernel(kernel as usize), Launch { grid, block, shared_bytes: narrow(shared) }, args)
        })
    }

    /// A fast hash that need not be collision-free: two words at a time are multiplied to 128 bits, whose halves are folded.
    fn hash(&self) -> u64 {
        const START: u64 = 0x9e37_79b9_7f4a_7c15;
        const OTHER: u64 = 0xd1b5_4a32_d192_ed03;
        self.words.chunks(2).fold(START ^ self.words.len() as u64, |hash, pair| {
            let product = u128::from(hash ^ pair[0]) * u128::from(OTHER ^ pair.get(1).copied().unwrap_or(0));
            product as u64 ^ (product >> 64) as u64
        })
    }
}

/// What to do with a sequence.
#[derive(Debug, PartialEq, Eq)]
pub enum Verdict<'a, R> {
    /// Its steps one by one.
    Run,
    /// It comes for the second time: record it, replay the recording, and [`Recordings::keep`] it.
    Record,
    /// Replay this recording.
    Replay(&'a R),
}

/// The recordings of one device; `R` is the driver's handle.
#[derive(Debug)]
pub struct Recordings<R> {
    /// By hash of the sequence.
    kept: HashMap<u64, Kept<R>>,
    /// Hashes of sequences seen once, the oldest first. If two have one hash, the second is recorded a round too early.
    seen: VecDeque<u64>,
    /// Number of calls so far, by which recordings have an age.
    clock: u64,
}

#[derive(Debug)]
struct Kept<R> {
    steps: Steps,
    recording: R,
    last_used: u64,
}

impl<R> Default for Recordings<R> {
    fn default() -> Self {
        Self { kept: HashMap::new(), seen: VecDeque::new(), clock: 0 }
    }
}

impl<R> Recordings<R> {
    /// What to do with a sequence that is about to run.
    pub fn look(&mut self, steps: &Steps) -> Verdict<'_, R> {
        if steps.len() < MIN_STEPS {
            return Verdict::Run;
        }
        self.clock += 1;
        let hash = steps.hash();
        if self.kept.get(&hash).is_some_and(|kept| kept.steps == *steps) {
            let kept = self.kept.get_mut(&hash).expect("it is there");
            kept.last_used = self.clock;
            return Verdict::Replay(&kept.recording);
        }
        if let Some(at) = self.seen.iter().position(|seen| *seen == hash) {
            self.seen.remove(at);
            return Verdict::Record;
        }
        if self.seen.len() == MAX_SEEN {
            self.seen.pop_front();
        }
        self.seen.push_back(hash);
        Verdict::Run
    }

    /// Keeps the recording of a sequence. If there are too many, removes and returns the one that is unused the longest.
    #[must_use]
    pub fn keep(&mut self, steps: &Steps, recording: R) -> Option<R> {
        let hash = steps.hash();
        let oldest = || self.kept.iter().min_by_key(|(_, kept)| kept.last_used).map(|(hash, _)| *hash);
        let leaves = if self.kept.len() < MAX_RECORDINGS { None } else { oldest() };
        let left = leaves.and_then(|hash| self.kept.remove(&hash));
        let replaced =
            self.kept.insert(hash, Kept { steps: steps.clone(), recording, last_used: self.clock });
        // `replaced` would be the recording of another sequence with the same hash, which is not expected. At most one of `left`
        // and `replaced` is present, because an insertion that replaces a recording adds none.
        left.or(replaced).map(|kept| kept.recording)
    }

    /// Forgets all sequences and returns the recordings.
    pub fn drain(&mut self) -> Vec<R> {
        self.seen.clear();
        self.kept.drain().map(|(_, kept)| kept.recording).collect()
    }
}
