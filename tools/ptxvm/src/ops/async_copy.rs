//! cp.async: copies from global to shared memory that land at a wait.
//!
//! The bytes are read and written when the issuing thread waits for them, not earlier: a read before that sees the old
//! contents, as may happen on hardware, and the race check reports it.

use super::memory::operands::without_policy;
use super::{bulk, mbarrier};
use crate::decode::decoder::{Decoder, operands};
use crate::decode::mods::Mods;
use crate::decode::{Refusal, invalid, unsupported};
use crate::error::ErrorKind;
use crate::machine::context::{Context, Stop};
use crate::machine::copies::{Copies, Party};
use crate::machine::inst::{Class, Inst, WarpOp};
use crate::machine::memory::access::{Access, Span};
use crate::machine::memory::{lanes, pick};
use crate::machine::registers::{LANES, Reg, Width};
use crate::ptx::ast::{Instruction, Operand};
use crate::types::{Space, Type};

/// Copies of a warp that may be under way at once. Beyond them the oldest lands early, as hardware may do as well.
const MAX_COPIES: usize = 4096;

/// Decodes the instructions of this family.
///
/// # Errors
/// The instruction is wrong, or not built.
pub fn decode(d: &mut Decoder<'_, '_>, inst: &Instruction<'_>) -> Result<(), Refusal> {
    let mut mods = Mods::new(inst);
    let written = mods.written();
    let reduces = mods.take("reduce");
    if inst.modifiers.contains(&"bulk") && mods.take("async") && mods.take("bulk") {
        return bulk::decode(d, inst, mods, reduces);
    }
    if reduces || !mods.take("async") {
        return Err(unsupported(format!("`{written}`")));
    }
    if mods.take("mbarrier") {
        return mbarrier::copies_arrive(d, inst, mods);
    }
    if mods.take("commit_group") {
        mods.finish()?;
        operands::<0>(inst)?;
        d.warp(Commit, Class::Sync, &[], &[]);
        return Ok(());
    }
    if mods.take("wait_all") {
        mods.finish()?;
        operands::<0>(inst)?;
        d.warp(Wait { leave: None }, Class::Sync, &[], &[]);
        return Ok(());
    }
    if mods.take("wait_group") {
        mods.finish()?;
        let [Operand::Integer(n)] = operands(inst)? else {
            return Err(invalid(format!("`{written}` takes a number")));
        };
        let leave = Some(u32::try_from(*n).unwrap_or(u32::MAX));
        d.warp(Wait { leave }, Class::Sync, &[], &[]);
        return Ok(());
    }
    copy(d, inst, mods, &written)
}

fn copy(
    d: &mut Decoder<'_, '_>,
    inst: &Instruction<'_>,
    mut mods: Mods<'_, '_>,
    written: &str,
) -> Result<(), Refusal> {
    let bypass = match mods.one_of(&[("ca", false), ("cg", true)]) {
        Some(bypass) => bypass,
        None => return Err(unsupported(format!("`{written}`"))),
    };
    if mods.one_of(&[("shared", ()), ("shared::cta", ())]).is_none() || !mods.take("global") {
        return Err(unsupported(format!("`{written}`: copies go from global to shared memory")));
    }
    let ops = without_policy(d, &mut mods, &inst.operands)?;
    mods.one_of(&[("L2::64B", ()), ("L2::128B", ()), ("L2::256B", ())]);
    mods.finish()?;
    let ([to, from, size], rest) = ops
        .split_first_chunk::<3>()
        .ok_or_else(|| invalid(format!("`{written}` takes two addresses and a size")))?;
    let bytes = match size {
        Operand::Integer(16) => 16,
        Operand::Integer(n @ (4 | 8)) if !bypass => *n,
        _ => return Err(invalid(format!("`{written}`: no such size"))),
    };
    let to = d.address(to, Space::Shared)?;
    let from = d.address(from, Space::Global)?;
    // The last operand is the number of bytes to read, or a predicate that says to read none.
    let (read, ignore) = match rest {
        [] => (Reg::NONE, (Reg::NONE, false)),
        [op] => {
            let is_pred = match op {
                Operand::Not(_) => true,
                Operand::Name(name, 0) => d.register(name).is_ok_and(|(reg, _)| reg.width == Width::Pred),
                _ => false,
            };
            if is_pred { (Reg::NONE, d.pred(op)?) } else { (d.src(op, Type::U32)?, (Reg::NONE, false)) }
        }
        _ => return Err(invalid(format!("`{written}` has too many operands"))),
    };
    d.note_access(Space::Shared, bytes as u32, false);
    let op = Issue { bytes, to: to.offset, from: from.offset, negated: ignore.1 };
    d.warp(op, Class::Global, &[], &[to.base, from.base, read, ignore.0]);
    Ok(())
}

/// `cp.async`: sources: the shared and the global address, bytes to read (or none), a predicate to read none (or none).
#[derive(Debug)]
struct Issue {
    bytes: u64,
    to: i64,
    from: i64,
    negated: bool,
}

impl WarpOp for Issue {
    fn execute(&self, ctx: &mut Context<'_>, inst: &Inst, mask: u32) -> Result<(), Stop> {
        let bytes = self.bytes;
        let mut read = [bytes as u8; LANES];
        if inst.src(2).is_some() {
            ctx.need_defined(mask, inst.src(2), "the number of bytes to copy");
            let sizes = *ctx.regs().get::<u32>(inst.src(2));
            let wrong = pick(mask, |lane| u64::from(sizes[lane]) > bytes);
            if wrong != 0 {
                let n = sizes[wrong.trailing_zeros() as usize];
                let message = format!("a copy of {bytes} bytes is told to read {n}");
                return Err(ctx.fault(ErrorKind::OutOfBounds, wrong, message));
            }
            read = sizes.map(|n| n as u8);
        }
        if inst.src(3).is_some() {
            ctx.need_defined(mask, inst.src(3), "the predicate of a copy");
            let none = ctx.regs().pred(inst.src(3)) ^ if self.negated { u32::MAX } else { 0 };
            for lane in lanes(none) {
                read[lane] = 0;
            }
        }
        let to = ctx.addresses(mask, inst.src(0), self.to);
        let reading = pick(mask, |lane| read[lane] != 0);
        let from = ctx.addresses(reading, inst.src(1), self.from);
        let to = ctx.own_shared(mask, to)?;
        ctx.bound_shared(mask, &to, bytes)?;
        ctx.meets_mbarrier(mask, &to, bytes);
        if reading != 0 {
            self.check_source(ctx, reading, &from, &read)?;
        }
        if ctx.launch.checks.race {
            // The copy may write from now on, so earlier accesses must be ordered before it. The write itself is recorded
            // when it lands.
            ctx.race_shared(mask, &to, &Access::write(bytes as u32), false, |_, _| None);
            for lane in lanes(mask) {
                let by = ctx.block.clocks.who(ctx.warp.id, lane);
                ctx.block.shared.begin_copy(to[lane], bytes, by, ctx.pc);
            }
        }
        if ctx.warp.copies.copies.len() >= MAX_COPIES
            && let Some(mut oldest) = ctx.warp.copies.copies.pop_front()
        {
            let all = oldest.lanes;
            ctx.land(&mut oldest, all, Party::Issuer);
        }
        let group = ctx.warp.copies.closed;
        let copies = Copies { lanes: mask, pc: ctx.pc, bytes, read, to, from, group };
        ctx.warp.copies.copies.push_back(Box::new(copies));
        Ok(())
    }
}

impl Issue {
    fn check_source(
        &self,
        ctx: &mut Context<'_>,
        reading: u32,
        from: &[u64; LANES],
        read: &[u8; LANES],
    ) -> Result<(), Stop> {
        let access = Access::read(self.bytes as u32);
        // Counted together, whatever part of the bytes is read.
        let span = ctx.begin_global(reading, from, &access)?;
        let full = pick(reading, |lane| u64::from(read[lane]) == self.bytes);
        let mut rest = full;
        let mut span = if full == reading { span } else { Span::of(full, from, access.size) };
        while rest != 0 {
            let part = ctx.global_part(rest, from, &span, &access)?;
            rest &= !part.lanes;
            span = part.rest(rest, from, access.size);
        }
        for lane in lanes(reading & !full) {
            ctx.global_bytes(lane, from[lane], u64::from(read[lane]))?;
        }
        Ok(())
    }
}

/// `cp.async.commit_group`
#[derive(Debug)]
struct Commit;

impl WarpOp for Commit {
    fn execute(&self, ctx: &mut Context<'_>, _inst: &Inst, mask: u32) -> Result<(), Stop> {
        for lane in lanes(mask) {
            let closed = &mut ctx.warp.copies.closed[lane];
            *closed = closed.saturating_add(1);
        }
        Ok(())
    }
}

/// `cp.async.wait_group` and `wait_all`.
#[derive(Debug)]
struct Wait {
    /// How many of the last groups may stay under way; `None` waits for copies of no group as well.
    leave: Option<u32>,
}

impl WarpOp for Wait {
    fn execute(&self, ctx: &mut Context<'_>, _inst: &Inst, mask: u32) -> Result<(), Stop> {
        let mut queue = std::mem::take(&mut ctx.warp.copies.copies);
        for copies in &mut queue {
            let due = match self.leave {
                None => copies.lanes & mask,
                Some(n) => {
                    let closed = &ctx.warp.copies.closed;
                    pick(copies.lanes & mask, |lane| copies.group[lane].saturating_add(n) < closed[lane])
                }
            };
            if due != 0 {
                ctx.land(copies, due, Party::Issuer);
            }
        }
        queue.retain(|copies| copies.lanes != 0);
        ctx.warp.copies.copies = queue;
        ctx.land_deferred(mask);
        Ok(())
    }
}
