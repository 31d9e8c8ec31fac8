//! Which lanes and bytes of a result count as written: the initialisation check's rules for operations of lanes ([`Defs`]).
//!
//! Words that are written in part come from memory, where structures have gaps and arrays ends. Operations that only carry bytes
//! elsewhere carry this along; any other makes of such a word one that nobody wrote.

use super::inst::{Defs, Inst, Moved};
use super::memory::lanes;
use super::registers::{Bytes, Reg, Registers};

/// All bytes of a register.
const ALL: Bytes = Bytes::WRITTEN;

/// Sets the initialisation state of the destinations of an operation of lanes, which has run.
#[inline(always)]
pub(super) fn follow(regs: &mut Registers, inst: &Inst, m: u32) {
    let defined = match inst.defs {
        Defs::All | Defs::Bytes | Defs::Moved(_) => {
            inst.srcs().iter().fold(u32::MAX, |all, r| all & regs.defined(*r))
        }
        Defs::Select => {
            let (a, b, p) = (inst.src(0), inst.src(1), inst.src(2));
            let chosen = chosen(regs, inst);
            regs.defined(p) & ((regs.defined(a) & chosen) | (regs.defined(b) & !chosen))
        }
        Defs::Some(which) => {
            let counted = inst.srcs().iter().enumerate().filter(|(i, _)| which >> i & 1 != 0);
            counted.fold(u32::MAX, |all, (_, r)| all & regs.defined(*r))
        }
        Defs::Own => return,
    };
    if m & !defined != 0 && by_bytes(inst) && (regs.any_partly() || joins(inst)) {
        return follow_bytes(regs, inst, m, defined);
    }
    for i in 0..inst.dsts as usize {
        regs.set_defined(inst.dst(i), m, defined);
    }
}

/// Whether the operation's rule is one of bytes.
fn by_bytes(inst: &Inst) -> bool {
    matches!(inst.defs, Defs::Bytes | Defs::Select | Defs::Moved(_))
}

/// Whether the operation may make a word that is written in part of registers that are not.
fn joins(inst: &Inst) -> bool {
    matches!(inst.defs, Defs::Moved(Moved::Join(_)))
}

/// The lanes in which a selection takes its first source.
fn chosen(regs: &Registers, inst: &Inst) -> u32 {
    regs.pred(inst.src(2)) ^ if inst.imm & 1 != 0 { u32::MAX } else { 0 }
}

/// The same, byte by byte, where sources are written in part.
#[cold]
fn follow_bytes(regs: &mut Registers, inst: &Inst, m: u32, defined: u32) {
    let results: Vec<(Reg, usize, Bytes)> = (0..inst.dsts as usize)
        .flat_map(|i| lanes(m & !defined).map(move |lane| (i, lane)))
        .map(|(i, lane)| (inst.dst(i), lane, result(regs, inst, i, lane)))
        .collect();
    for i in 0..inst.dsts as usize {
        regs.set_defined(inst.dst(i), m, defined);
    }
    results.into_iter().for_each(|(reg, lane, bytes)| regs.set_written_bytes(reg, lane, bytes));
}

/// The written bytes of destination `i` in a lane. Bytes beyond the value's width count as written.
fn result(regs: &Registers, inst: &Inst, i: usize, lane: usize) -> Bytes {
    let of = |n: usize| regs.written_bytes(inst.src(n), lane);
    // The operation has run, so that a source that is also the destination does not have its value any more.
    let value = |n: usize| {
        let reg = inst.src(n);
        let kept = reg != inst.dst(i) && regs.defined(reg) >> lane & 1 != 0;
        kept.then(|| regs.lane::<u32>(reg, lane))
    };
    let bits = |bytes: u8| 8 * u32::from(bytes);
    match inst.defs {
        Defs::Bytes => (0..inst.srcs().len()).fold(ALL, |all, n| all.and(of(n))),
        Defs::Select if regs.defined(inst.src(2)) >> lane & 1 != 0 => {
            if chosen(regs, inst) >> lane & 1 != 0 {
                of(0)
            } else {
                of(1)
            }
        }
        Defs::Moved(Moved::Split(bytes)) => {
            of(0).gather(bytes, |byte| of(0).has(byte + i as u32 * u32::from(bytes)))
        }
        Defs::Moved(Moved::Join(bytes)) => {
            let parts = inst.srcs().len();
            let part = u32::from(bytes);
            let whole = ALL.gather(bytes * parts as u8, |byte| of((byte / part) as usize).has(byte % part));
            // A register that nobody wrote is no gap of a structure.
            let unwritten = |n: &usize| (0..part).all(|byte| !of(*n).has(byte));
            let torn = (0..parts).any(|n| of(n).is_torn() || unwritten(&n));
            if torn { whole.torn() } else { whole }
        }
        Defs::Moved(Moved::Left(width)) => match value(1) {
            Some(n) => of(0).gather(width, |byte| {
                let high = (8 * byte + 8).saturating_sub(n.min(1 << 10));
                of(0).bits((8 * byte).saturating_sub(n)..high)
            }),
            None => Bytes::NONE,
        },
        Defs::Moved(Moved::Right(width, signed)) => match value(1) {
            Some(n) => of(0).gather(width, |byte| of(0).field(8 * byte, n, bits(width), bits(width), signed)),
            None => Bytes::NONE,
        },
        Defs::Moved(Moved::Field(width, signed)) => match (value(1), value(2)) {
            // Both numbers are bytes; beyond the word the field has its top bit, or zeros.
            (Some(at), Some(n)) => {
                let (at, n) = (at & 255, n & 255);
                of(0).gather(width, |byte| of(0).field(8 * byte, at, n, bits(width), signed))
            }
            _ => Bytes::NONE,
        },
        Defs::Moved(Moved::Funnel(left)) => match value(2) {
            Some(n) => {
                let n = if inst.imm != 0 { n & 31 } else { n.min(32) };
                let both = of(1).above(4, of(0));
                let n = if left { 32 - n } else { n };
                both.gather(4, |byte| both.bits(8 * byte + n..8 * byte + n + 8))
            }
            None => Bytes::NONE,
        },
        Defs::Moved(Moved::Permute) => match value(2) {
            Some(c) => {
                let selectors = if inst.imm != 0 { (inst.imm >> (16 * (c & 3))) as u32 } else { c };
                let both = of(1).above(4, of(0));
                both.gather(4, |byte| both.has(selectors >> (4 * byte) & 7))
            }
            None => Bytes::NONE,
        },
        Defs::Moved(Moved::Resize { from, from_signed, to, to_signed }) => {
            let (from, to) = (u32::from(from), u32::from(to));
            let value = |byte: u32| match byte < from {
                true => of(0).has(byte),
                false => !from_signed || of(0).has(from - 1),
            };
            of(0).gather(16, |byte| if byte < to { value(byte) } else { !to_signed || value(to - 1) })
        }
        _ => Bytes::NONE,
    }
}

impl Bytes {
    /// Those of a word of `width` bytes that `f` says are written.
    fn gather(self, width: u8, f: impl Fn(u32) -> bool) -> Self {
        let bytes = (0..u32::from(width)).filter(|byte| !f(*byte)).fold(ALL, Self::without);
        if self.is_torn() { bytes.torn() } else { bytes }
    }

    /// Whether all bytes are written that bits of this range lie in; an empty range is.
    fn bits(self, range: std::ops::Range<u32>) -> bool {
        range.is_empty() || (range.start / 8..=(range.end - 1) / 8).all(|byte| self.has(byte))
    }

    /// Whether the eight bits from `first` on are written of the field of `n` bits at bit `at` of a word of `width` bits, which is
    /// extended by its top bit or by zeros.
    fn field(self, first: u32, at: u32, n: u32, width: u32, signed: bool) -> bool {
        let end = at.saturating_add(n).min(width);
        let from = first.saturating_add(at);
        let extended = from.saturating_add(8) > end;
        self.bits(from.min(end)..from.saturating_add(8).min(end))
            && (!extended || !signed || n == 0 || self.has((end.max(1).min(width) - 1) / 8))
    }
}
