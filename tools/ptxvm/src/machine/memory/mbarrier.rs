//! mbarrier objects: what a block's shared memory holds of each, and the arithmetic of its phases (PTX ISA, "Parallel
//! Synchronization and Communication Instructions: mbarrier").
//!
//! An object waits in each of its phases for arrivals and, by its tx-count, for bytes of copies. When both counts are 0 the
//! phase completes and the next begins with the expected count. Its 8 bytes in memory are opaque: they count as written, and
//! whoever touches them with an ordinary access is told so.

use std::collections::{BTreeMap, BTreeSet};

use super::lanes;
use super::race::join;
use crate::machine::registers::LANES;

/// Largest count of arrivals, and of bytes of the tx-count to either side.
pub(crate) const MAX_COUNT: u32 = (1 << 20) - 1;

/// Bytes of an object.
pub(crate) const MBARRIER_BYTES: u64 = 8;

/// One object between `init` and `inval`.
#[derive(Clone, Debug, Default)]
pub(crate) struct Mbarrier {
    /// Arrivals that each phase waits for, from the next one on.
    pub(crate) expected: u32,
    /// Arrivals that the running phase still waits for.
    pub(crate) pending: u32,
    /// Bytes that it still waits for; below 0 where copies brought more than was expected so far.
    pub(crate) tx: i64,
    /// Number of the running phase, from 0.
    pub(crate) phase: u64,
    /// Clocks of all that arrived.
    released: Vec<u32>,
    /// The same when the last phase completed.
    completed: Vec<u32>,
    /// The instruction that initialised it.
    pub(crate) pc: u32,
}

/// What a wait waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Awaited {
    /// The phase of a state that an arrival returned.
    State(u64),
    /// The phase of this parity.
    Parity(u32),
}

/// A state, as arrivals return it: pending count before the arrival, object, phase.
const STATE_OBJECT: u32 = 20;
const STATE_PHASE: u32 = 37;

impl Mbarrier {
    fn complete(&mut self) {
        if self.pending == 0 && self.tx == 0 {
            self.phase += 1;
            self.pending = self.expected;
            self.completed.clone_from(&self.released);
        }
    }

    /// The state before an arrival, for the object at `at`.
    pub(crate) fn state(&self, at: u64) -> u64 {
        u64::from(self.pending) | (at / MBARRIER_BYTES) << STATE_OBJECT | self.phase << STATE_PHASE
    }

    /// `count` arrivals; with `drop` later phases expect that many less. `Err` says what is wrong.
    pub(crate) fn arrive(&mut self, count: u32, drop: bool, may_complete: bool) -> Result<(), String> {
        if count > self.pending || count == 0 {
            return Err(match count {
                0 => "an arrival of no thread: the count must be 1 at least".to_owned(),
                _ => format!("{count} arrivals, but {}", self.describe()),
            });
        }
        if !may_complete && count == self.pending {
            return Err(format!("an arrival with .noComplete completes the phase: {}", self.describe()));
        }
        if drop {
            self.expected = self.expected.saturating_sub(count);
        }
        self.pending -= count;
        self.complete();
        Ok(())
    }

    /// One arrival more is waited for in the running phase.
    pub(crate) fn increment(&mut self) -> Result<(), String> {
        if self.pending >= MAX_COUNT {
            return Err(format!("more than {MAX_COUNT} arrivals are waited for"));
        }
        self.pending += 1;
        Ok(())
    }

    /// More bytes that the phase waits for.
    pub(crate) fn expect(&mut self, bytes: u32) -> Result<(), String> {
        self.transact(i64::from(bytes))
    }

    /// Adds to the bytes that the phase waits for, or takes from them what has come.
    pub(crate) fn transact(&mut self, bytes: i64) -> Result<(), String> {
        let tx = self.tx.saturating_add(bytes);
        if tx.unsigned_abs() > u64::from(MAX_COUNT) {
            return Err(format!("a tx-count of {tx} bytes: it may reach {MAX_COUNT}, {}", self.describe()));
        }
        self.tx = tx;
        self.complete();
        Ok(())
    }

    /// Whether a phase has completed.
    pub(crate) fn is_complete(&self, at: u64, awaited: Awaited) -> Result<bool, String> {
        match awaited {
            Awaited::Parity(parity) => Ok(self.phase & 1 != u64::from(parity & 1)),
            Awaited::State(state) => {
                let object = (state >> STATE_OBJECT) & ((1 << (STATE_PHASE - STATE_OBJECT)) - 1);
                if object != at / MBARRIER_BYTES {
                    let other = object * MBARRIER_BYTES;
                    return Err(format!("the state comes from an arrival at {other:#x}"));
                }
                let behind = (self.phase << STATE_PHASE).wrapping_sub(state & (u64::MAX << STATE_PHASE));
                match behind >> STATE_PHASE {
                    0 => Ok(false),
                    1 => Ok(true),
                    n => Err(format!(
                        "the state is {n} phases old, and hardware tells the running phase from the one before alone: {}",
                        self.describe()
                    )),
                }
            }
        }
    }

    /// Adds a vector of clocks to what those who wait acquire.
    pub(crate) fn release(&mut self, clocks: &[u32]) {
        if self.released.len() < clocks.len() {
            self.released.resize(clocks.len(), 0);
        }
        join(&mut self.released, clocks);
    }

    /// The clocks of all that arrived, to add to.
    pub(crate) fn released(&mut self) -> &mut Vec<u32> {
        &mut self.released
    }

    /// What a wait that has ended acquires.
    pub(crate) fn completed(&self) -> &[u32] {
        &self.completed
    }

    /// Its counts in words.
    pub(crate) fn describe(&self) -> String {
        self.describe_without(0)
    }

    /// The same, less arrivals that were not made because they cannot complete the phase.
    pub(crate) fn describe_without(&self, coming: u32) -> String {
        let Self { phase, expected, tx, .. } = self;
        let pending = self.pending.saturating_sub(coming);
        let tx = if *tx == 0 { String::new() } else { format!(" and {tx} bytes") };
        format!("phase {phase} waits for {pending} of {expected} arrivals{tx}")
    }
}

/// The objects of a block.
#[derive(Debug, Default)]
pub(crate) struct Mbarriers {
    /// By address.
    objects: BTreeMap<u64, Mbarrier>,
    /// Addresses where one was invalidated.
    gone: BTreeSet<u64>,
    /// The lowest address that one was ever at, and the end of the highest.
    span: (u64, u64),
}

impl Mbarriers {
    /// There are none.
    pub(super) fn clear(&mut self) {
        self.objects.clear();
        self.gone.clear();
        self.span = (u64::MAX, 0);
    }

    /// The object at an address; `Err` says why there is none.
    pub(crate) fn at(&mut self, at: u64) -> Result<&mut Mbarrier, String> {
        match self.objects.get_mut(&at) {
            Some(object) => Ok(object),
            None if self.gone.contains(&at) => Err("it was invalidated".to_owned()),
            None => Err("it was not initialised".to_owned()),
        }
    }

    /// Makes an object.
    pub(crate) fn init(&mut self, at: u64, count: u32, pc: u32) -> Result<(), String> {
        if count == 0 || count > MAX_COUNT {
            return Err(format!("a count of {count}: it may be 1 to {MAX_COUNT}"));
        }
        if let Some(old) = self.objects.get(&at) {
            return Err(format!(
                "it is initialised while it is one, and was not invalidated: {}",
                old.describe()
            ));
        }
        self.gone.remove(&at);
        self.span = (self.span.0.min(at), self.span.1.max(at + MBARRIER_BYTES));
        let object = Mbarrier { expected: count, pending: count, pc, ..Mbarrier::default() };
        self.objects.insert(at, object);
        Ok(())
    }

    /// Ends an object.
    pub(crate) fn inval(&mut self, at: u64) -> Result<(), String> {
        self.at(at)?;
        self.objects.remove(&at);
        self.gone.insert(at);
        Ok(())
    }

    /// The lanes of an access that touch an object, and the first such object with the instruction that initialised it.
    #[inline(always)]
    pub(crate) fn touched(&self, mask: u32, at: &[u64; LANES], bytes: u64) -> Option<(u32, u64, u32)> {
        if self.objects.is_empty() { None } else { self.find(mask, at, bytes) }
    }

    fn find(&self, mask: u32, at: &[u64; LANES], bytes: u64) -> Option<(u32, u64, u32)> {
        let mut found: Option<(u32, u64, u32)> = None;
        for lane in lanes(mask) {
            let (from, to) = (at[lane], at[lane].saturating_add(bytes));
            if to <= self.span.0 || from >= self.span.1 {
                continue;
            }
            let first = (from + 1).saturating_sub(MBARRIER_BYTES);
            if let Some((object, of)) = self.objects.range(first..to).next() {
                found.get_or_insert((0, *object, of.pc)).0 |= 1 << lane;
            }
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accesses_next_to_an_object_do_not_touch_it() {
        let mut all = Mbarriers::default();
        all.clear();
        all.init(64, 1, 7).unwrap();
        all.init(128, 1, 8).unwrap();
        for (at, bytes, hit) in [
            (56, 8, None),
            (63, 1, None),
            (60, 8, Some(64)),
            (71, 1, Some(64)),
            (72, 56, None),
            (72, 57, Some(128)),
        ] {
            let found = all.touched(1, &[at; LANES], bytes).map(|(_, object, _)| object);
            assert_eq!(found, hit, "{bytes} bytes at {at}");
        }
    }
}
