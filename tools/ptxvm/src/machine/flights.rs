//! Asynchronous work of a block whose end an mbarrier tells.
//!
//! It is done as late as it may be: when somebody waits at the mbarrier for a phase that nothing else keeps from completing.
//! A wrong wait then sees the old contents, and the race check says so.

use super::context::{Context, Stop};
use super::copies::{Copies, Party};
use super::memory::access::Access;
use super::memory::mbarrier::Mbarrier;
use super::memory::race::Nothing;
use super::memory::{lanes, pick};
use super::registers::LANES;
use crate::error::ErrorKind;

/// Arrivals that may be under way at once. Beyond them the oldest come early, as on hardware they may as well.
const MAX_ARRIVALS: usize = 4096;

/// `cp.async.mbarrier.arrive`: arrivals that follow copies.
#[derive(Debug)]
pub(crate) struct Arrivals {
    /// The warp that issued them.
    warp: u32,
    /// Lanes that have not arrived.
    lanes: u32,
    /// Addresses of the mbarriers.
    at: [u64; LANES],
    /// The instruction.
    pc: u32,
    /// The copies that must land before.
    copies: Vec<Copies>,
    /// What the warp knew and had done.
    clocks: Vec<u32>,
}

/// All of it that is under way.
#[derive(Debug, Default)]
pub(crate) struct Flights {
    arrivals: Vec<Arrivals>,
}

impl Flights {
    /// There is none.
    pub(super) fn clear(&mut self) {
        self.arrivals.clear();
    }

    /// Arrivals that are under way to the mbarrier at `at`.
    pub(super) fn coming(&self, at: u64) -> u32 {
        self.arrivals.iter().map(|a| a.lanes_at(at).count_ones()).sum()
    }
}

impl Arrivals {
    /// Lanes that have not arrived at the mbarrier at `at`.
    fn lanes_at(&self, at: u64) -> u32 {
        pick(self.lanes, |lane| self.at[lane] == at)
    }
}

impl Context<'_> {
    /// A fault of the mbarrier at `at`.
    #[cold]
    pub(crate) fn mbarrier_fault(&self, lanes: u32, at: u64, what: &str) -> Stop {
        let message = format!("the mbarrier at {at:#x} of shared memory: {what}");
        self.fault(ErrorKind::Mbarrier, lanes, message)
    }

    /// Does something with the mbarrier at `at`, for a lane.
    pub(crate) fn with_mbarrier<T>(
        &mut self,
        lane: usize,
        at: u64,
        f: impl FnOnce(&mut Mbarrier) -> Result<T, String>,
    ) -> Result<T, Stop> {
        let done = self.block.shared.mbarriers.at(at).and_then(f);
        done.map_err(|what| self.mbarrier_fault(1 << lane, at, &what))
    }

    /// Records that the agent wrote shared memory.
    pub(super) fn note_agent(&mut self, agent: u32, pc: u32, mask: u32, at: &[u64; LANES], access: &Access) {
        let block = &mut *self.block;
        let (shadow, _) = block.shared.parts();
        // Whoever touched the bytes since the copy was issued has been told so.
        shadow.touch(&block.clocks, agent, pc, mask, at, access, true, &Nothing);
    }

    /// The copies so far of some lanes are followed by arrivals.
    pub(crate) fn defer_arrivals(&mut self, mask: u32, at: &[u64; LANES]) -> Result<(), Stop> {
        let mut copies = Vec::new();
        for entry in &mut self.warp.copies.copies {
            let due = entry.lanes & mask;
            if due != 0 {
                copies.push(Copies { lanes: due, ..(**entry).clone() });
                entry.lanes &= !due;
            }
        }
        self.warp.copies.copies.retain(|entry| entry.lanes != 0);
        let warp = self.warp.id;
        let clocks = match self.launch.checks.race {
            true => self.block.clocks.released(warp, true).to_vec(),
            false => Vec::new(),
        };
        if self.block.flights.arrivals.len() >= MAX_ARRIVALS {
            let mut oldest = self.block.flights.arrivals.remove(0);
            let all = oldest.lanes;
            self.arrive(&mut oldest, all)?;
        }
        let arrivals = Arrivals { warp, lanes: mask, at: *at, pc: self.pc, copies, clocks };
        self.block.flights.arrivals.push(arrivals);
        Ok(())
    }

    /// The issuing lanes wait for their copies without the mbarrier.
    pub(crate) fn land_deferred(&mut self, mask: u32) {
        let mut all = std::mem::take(&mut self.block.flights.arrivals);
        let warp = self.warp.id;
        for arrivals in all.iter_mut().filter(|a| a.warp == warp) {
            for copies in &mut arrivals.copies {
                let due = copies.lanes & mask;
                if due != 0 {
                    self.land(copies, due, Party::Issuer);
                }
            }
        }
        self.block.flights.arrivals = all;
    }

    /// Some lanes' copies land, and they arrive.
    fn arrive(&mut self, arrivals: &mut Arrivals, due: u32) -> Result<(), Stop> {
        let race = self.launch.checks.race;
        let agent = if race { self.block.clocks.agent_writes() } else { None };
        let party = agent.map_or(Party::Issuer, Party::Agent);
        for copies in &mut arrivals.copies {
            let landing = copies.lanes & due;
            if landing != 0 {
                self.land(copies, landing, party);
            }
        }
        arrivals.lanes &= !due;
        let here = std::mem::replace(&mut self.pc, arrivals.pc);
        for lane in lanes(due) {
            let at = arrivals.at[lane];
            if race && let Ok(object) = self.block.shared.mbarriers.at(at) {
                object.release(&arrivals.clocks);
                self.block.clocks.add_agent(object.released());
            }
            self.with_mbarrier(lane, at, |object| object.arrive(1, false, true))?;
        }
        self.pc = here;
        self.block.progress += 1;
        Ok(())
    }

    /// Somebody waits for the running phase of the mbarrier at `at`: what can complete it is done.
    pub(crate) fn settle(&mut self, lane: usize, at: u64) -> Result<(), Stop> {
        let pending = self.with_mbarrier(lane, at, |object| Ok(object.pending))?;
        if pending != 0 && self.block.flights.coming(at) >= pending {
            let mut all = std::mem::take(&mut self.block.flights.arrivals);
            let mut left = pending;
            for arrivals in &mut all {
                let mut due = arrivals.lanes_at(at);
                while due.count_ones() > left {
                    due &= !(1 << (31 - due.leading_zeros()));
                }
                left -= due.count_ones();
                if due != 0 {
                    self.arrive(arrivals, due)?;
                }
            }
            all.retain(|a| a.lanes != 0);
            self.block.flights.arrivals = all;
        }
        self.land_bulk_at(lane, at)
    }
}
