//! Asynchronous copies (`cp.async`) under way: issued, not landed.

use std::collections::VecDeque;

use super::context::Context;
use super::memory::access::Access;
use super::memory::buffer::Cell;
use super::memory::lanes;
use super::registers::LANES;

/// One instruction's copies.
#[derive(Clone, Debug)]
pub struct Copies {
    /// Lanes whose copy has not landed.
    pub lanes: u32,
    /// The instruction.
    pub pc: u32,
    /// Bytes that each lane writes.
    pub bytes: u64,
    /// Bytes that each lane reads; zeros fill the rest.
    pub read: [u8; LANES],
    /// Shared addresses.
    pub to: [u64; LANES],
    /// Global addresses.
    pub from: [u64; LANES],
    /// Number of each lane's group.
    pub group: [u32; LANES],
}

/// The asynchronous copies of a warp that have not landed.
#[derive(Debug, Default)]
pub struct CopyQueue {
    /// One entry for each instruction, in order.
    pub copies: VecDeque<Box<Copies>>,
    /// Groups that each lane has closed; the copies that it issues now belong to the next.
    pub closed: [u32; LANES],
}

/// Whose writes the bytes of a copy become.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Party {
    /// The lanes that issued it, which have waited for it.
    Issuer,
    /// The agent of copies, for whom an mbarrier is waited at.
    Agent(u32),
}

impl Context<'_> {
    /// Copies of some lanes land.
    pub(crate) fn land(&mut self, copies: &mut Copies, due: u32, party: Party) {
        let memory = self.launch.memory;
        let checks = self.launch.checks;
        for lane in lanes(due) {
            let (to, from, read) = (copies.to[lane], copies.from[lane], u64::from(copies.read[lane]));
            let mut bytes = [0; 16];
            // Bounds were checked when the copy was issued, and nothing is freed while a kernel runs.
            let source = if read == 0 { None } else { memory.find(from, read) };
            let offset = source.map_or(0, |a| (from - a.start) as usize);
            if let Some(a) = source {
                match read {
                    16 => bytes = u128::load(&a.data, offset).to_le_bytes(),
                    8 => bytes[..8].copy_from_slice(&u64::load(&a.data, offset).to_le_bytes()),
                    4 => bytes[..4].copy_from_slice(&u32::load(&a.data, offset).to_le_bytes()),
                    n => a.data.read(offset, &mut bytes[..n as usize]),
                }
            }
            let shared = &mut self.block.shared;
            match copies.bytes {
                16 => shared.write(to, u128::from_le_bytes(bytes)),
                8 => shared.write(to, u64::from_bytes(&bytes[..8])),
                _ => shared.write(to, u32::from_bytes(&bytes[..4])),
            }
            if checks.init {
                shared.set_written(to, copies.bytes, true);
                if let Some(a) = source.filter(|a| !a.is_written(offset as u64, read)) {
                    for i in (0..read).filter(|i| !a.is_written(offset as u64 + i, 1)) {
                        shared.set_written(to + i, 1, false);
                    }
                }
            }
            if checks.race {
                shared.end_copy(to, copies.bytes);
            }
        }
        copies.lanes &= !due;
        if checks.race {
            // From now on the bytes count as written.
            let access = Access::write(copies.bytes as u32);
            match party {
                Party::Issuer => {
                    let here = std::mem::replace(&mut self.pc, copies.pc);
                    self.race_shared(due, &copies.to, &access, true, |_, _| None);
                    self.pc = here;
                }
                Party::Agent(agent) => self.note_agent(agent, copies.pc, due, &copies.to, &access),
            }
        }
    }
}
