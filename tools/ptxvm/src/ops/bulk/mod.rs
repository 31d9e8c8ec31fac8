//! `cp.async.bulk`, `cp.reduce.async.bulk` and their tensor forms: how they are written, and their groups.
//!
//! Copies land when they are waited for ([`crate::machine`] has how).

mod common;
mod reduce;
pub(super) mod small;
mod tensor;

use self::common::{Direction, issue, multicast, shared_address, target};
use self::reduce::Operation;
use super::memory::operands::without_policy;
use crate::decode::decoder::{Decoder, operands};
use crate::decode::mods::Mods;
use crate::decode::{Refusal, invalid, unsupported};
use crate::error::ErrorKind;
use crate::machine::bulk::{Bulk, Reduction, Run, Way};
use crate::machine::context::{Context, Stop};
use crate::machine::inst::{Class, Inst, WarpOp};
use crate::machine::memory::{lanes, pick};
use crate::machine::registers::{LANES, Reg};
use crate::ptx::ast::{Instruction, Operand};
use crate::types::{Space, Type};

/// Decodes what follows `cp.async.bulk` or, with `reduces`, `cp.reduce.async.bulk`.
pub(super) fn decode(
    d: &mut Decoder<'_, '_>,
    inst: &Instruction<'_>,
    mut mods: Mods<'_, '_>,
    reduces: bool,
) -> Result<(), Refusal> {
    let written = mods.written();
    d.asynchronous = true;
    if mods.take("commit_group") {
        mods.finish()?;
        operands::<0>(inst)?;
        d.warp(Commit, Class::Sync, &[], &[]);
        return Ok(());
    }
    if mods.take("wait_group") {
        let read = mods.take("read");
        mods.finish()?;
        let [Operand::Integer(n)] = operands(inst)? else {
            return Err(invalid(format!("`{written}` takes a number")));
        };
        let leave = u32::try_from(*n).unwrap_or(u32::MAX);
        d.warp(WaitGroup { leave, read }, Class::Sync, &[], &[]);
        return Ok(());
    }
    let other_mode = |m: &&str| m.starts_with("im2col") || m.starts_with("tile::");
    if let Some(mode) = inst.modifiers.iter().find(|m| other_mode(m)) {
        return Err(unsupported(format!("`.{mode}` in `{written}`: tensors are copied by tiles alone")));
    }
    let prefetches = mods.take("prefetch");
    let rank = match mods.take("tensor") {
        false => None,
        true => {
            let ranks = [("1d", 1), ("2d", 2), ("3d", 3), ("4d", 4), ("5d", 5)];
            let rank = mods.one_of(&ranks).ok_or_else(|| invalid(format!("`{written}` names no rank")))?;
            mods.take("tile");
            Some(rank)
        }
    };
    if prefetches {
        if !mods.take("L2") || !mods.take("global") {
            return Err(invalid(format!("`{written}`: it fetches from global memory to L2")));
        }
        let ops = without_policy(d, &mut mods, &inst.operands)?;
        mods.finish()?;
        return match (rank, ops) {
            (Some(rank), [map]) => tensor::prefetch(d, rank, map),
            (None, [from, size]) => {
                let (from, size) = (d.address(from, Space::Global)?, d.src(size, Type::U32)?);
                d.warp(Prefetch { offset: from.offset }, Class::Global, &[], &[from.base, size]);
                Ok(())
            }
            _ => Err(invalid(format!("`{written}`: wrong number of operands"))),
        };
    }
    let own = inst.modifiers.contains(&"shared::cta");
    let direction = match (mods.any(), mods.any()) {
        (Some("shared::cta" | "shared::cluster"), Some("global")) if !reduces => Direction::Load,
        (Some("shared::cluster"), Some("shared::cta")) if rank.is_none() => Direction::Within,
        (Some("global"), Some("shared::cta")) => Direction::Store,
        _ => return Err(invalid(format!("`{written}`: no such direction"))),
    };
    let told = if direction == Direction::Store { "bulk_group" } else { "mbarrier::complete_tx::bytes" };
    if !mods.take(told) {
        return Err(invalid(format!("`{written}` without `.{told}`")));
    }
    let multicasts = direction == Direction::Load && mods.take("multicast::cluster");
    let operation = if reduces { Some(reduce::operation(&mut mods, &written)?) } else { None };
    let reduction = match (operation, rank) {
        (Some(operation), None) => Some(reduce::typed(operation, &mut mods, direction, &written)?),
        _ => None,
    };
    let masks = direction == Direction::Store && !reduces && rank.is_none() && mods.take("cp_mask");
    let ignores = direction == Direction::Load && own && rank.is_none() && mods.take("ignore_oob");
    let mut ops = inst.operands.as_slice();
    let mut bytes = Reg::NONE;
    if masks {
        let Some((mask, rest)) = ops.split_last() else {
            return Err(invalid(format!("`{written}` has no operands")));
        };
        (bytes, ops) = (d.src(mask, Type::B16)?, rest);
    }
    ops = without_policy(d, &mut mods, ops)?;
    mods.finish()?;
    let mut ctas = Reg::NONE;
    if multicasts {
        let Some((mask, rest)) = ops.split_last() else {
            return Err(invalid(format!("`{written}` has no operands")));
        };
        (ctas, ops) = (d.src(mask, Type::B16)?, rest);
    }
    if direction == Direction::Store {
        // Which of two blocks adds first shows in a rounded sum.
        let rounds =
            operation == Some(Operation::Add) && (rank.is_some() || reduction.is_some_and(|r| r.rounds));
        d.note_access(Space::Global, 16, rounds);
    }
    // A mask leaves out single bytes.
    d.note_access(Space::Shared, if masks { 1 } else { 8 }, false);
    if let Some(rank) = rank {
        return tensor::copy(d, rank, (direction, own), operation, ops, ctas, &written);
    }
    let mut ignored = [Reg::NONE; 2];
    let without_ignored: Vec<Operand<'_>>;
    if ignores {
        let [to, from, size, left, right, mbarrier] = ops else {
            return Err(invalid(format!("`{written}`: wrong number of operands")));
        };
        ignored = [d.src(left, Type::U32)?, d.src(right, Type::U32)?];
        without_ignored = [to, from, size, mbarrier].map(Clone::clone).into();
        ops = &without_ignored;
    }
    let (to, from, size, mbarrier) = match (direction, ops) {
        (Direction::Store, [to, from, size]) => (to, from, size, None),
        (Direction::Load | Direction::Within, [to, from, size, mbarrier]) => (to, from, size, Some(mbarrier)),
        _ => return Err(invalid(format!("`{written}`: wrong number of operands"))),
    };
    let spaces = match direction {
        Direction::Load => (Space::Shared, Space::Global),
        Direction::Within => (Space::Shared, Space::Shared),
        Direction::Store => (Space::Global, Space::Shared),
    };
    let (to, from) = (d.address(to, spaces.0)?, d.address(from, spaces.1)?);
    let size = d.src(size, Type::U32)?;
    let mbarrier = shared_address(d, mbarrier)?;
    let op = Copy {
        direction,
        own: own && direction == Direction::Load,
        to: to.offset,
        from: from.offset,
        mbarrier: mbarrier.offset,
        reduction: reduction.map(|r| r.reduction),
    };
    let [left, right] = ignored;
    d.warp(op, Class::Global, &[], &[to.base, from.base, size, mbarrier.base, ctas, bytes, left, right]);
    Ok(())
}

/// `cp.async.bulk` and `cp.reduce.async.bulk`. Sources: where to, where from, bytes, the mbarrier, the blocks of a multicast, which
/// bytes of sixteen are copied, and how many are ignored at both ends; the last five may be none.
#[derive(Debug)]
struct Copy {
    direction: Direction,
    /// Whether a load may go to the own block alone.
    own: bool,
    to: i64,
    from: i64,
    mbarrier: i64,
    reduction: Option<Reduction>,
}

impl WarpOp for Copy {
    fn execute(&self, ctx: &mut Context<'_>, inst: &Inst, mask: u32) -> Result<(), Stop> {
        let to = ctx.addresses(mask, inst.src(0), self.to);
        let from = ctx.addresses(mask, inst.src(1), self.from);
        let mbarrier = ctx.addresses(mask, inst.src(3), self.mbarrier);
        ctx.need_defined(mask, inst.src(2), "the number of bytes to copy");
        let sizes = *ctx.regs().get::<u32>(inst.src(2));
        let ctas = multicast(ctx, mask, inst.src(4))?;
        let masks = byte_masks(ctx, mask, inst.src(5));
        let ignored = [ignored(ctx, mask, inst.src(6))?, ignored(ctx, mask, inst.src(7))?];
        let from = if self.direction == Direction::Load { from } else { ctx.own_shared(mask, from)? };
        for lane in lanes(mask) {
            let (to, from, bytes) = (to[lane], from[lane], u64::from(sizes[lane]));
            multiple_of_16(ctx, lane, &[("destination", to), ("source", from), ("size", bytes)])?;
            if bytes == 0 {
                continue;
            }
            let (rank, to, at) = match self.direction {
                Direction::Store => (ctx.block.rank(), to, 0),
                _ => target(ctx, lane, to, mbarrier[lane], self.own)?,
            };
            let (way, shared, other) = match self.direction {
                Direction::Load => (Way::Load(at), to, from),
                Direction::Within => (Way::Within(at), to, from),
                Direction::Store => (Way::Store, from, to),
            };
            // What is larger than shared memory is told when it is issued, and has no runs made of it.
            let runs = match (&masks, &ignored) {
                (Some(masks), _) if bytes <= ctx.block.shared.len() => {
                    masked(shared, other, bytes, masks[lane])
                }
                (None, [Some(left), Some(right)]) => {
                    ignoring(shared, other, bytes, left[lane].into(), right[lane].into())
                }
                _ => vec![Run { shared, other: Some(other), bytes }],
            };
            let mut bulk = Bulk::new(way, runs, vec![(shared, bytes)]);
            bulk.reduction = self.reduction;
            bulk.masked = masks.is_some();
            if ignored[0].is_some() {
                // What nobody can rely on, and not what memory that was cleared would have.
                (bulk.ignores, bulk.fill) = (true, vec![0xa5].into());
            }
            issue(ctx, lane, rank, bulk, ctas.map(|ctas| ctas[lane]))?;
        }
        Ok(())
    }
}

/// Which bytes of each sixteen the lanes copy, where there is a mask.
fn byte_masks(ctx: &mut Context<'_>, mask: u32, bytes: Reg) -> Option<[u16; LANES]> {
    if !bytes.is_some() {
        return None;
    }
    ctx.need_defined(mask, bytes, "the mask of the bytes to copy");
    Some(ctx.regs().get::<u32>(bytes).map(|mask| mask as u16))
}

/// How many bytes the lanes ignore at one end, where there is such a number: at most 15.
fn ignored(ctx: &mut Context<'_>, mask: u32, bytes: Reg) -> Result<Option<[u32; LANES]>, Stop> {
    if !bytes.is_some() {
        return Ok(None);
    }
    ctx.need_defined(mask, bytes, "the number of bytes to ignore");
    let bytes = *ctx.regs().get::<u32>(bytes);
    let wrong = pick(mask, |lane| bytes[lane] > 15);
    if wrong != 0 {
        let told = bytes[wrong.trailing_zeros() as usize];
        let message = format!("a bulk copy is told to ignore {told} bytes at one end, more than 15");
        return Err(ctx.fault(ErrorKind::OutOfBounds, wrong, message));
    }
    Ok(Some(bytes))
}

/// The runs of a copy of `bytes` bytes, a multiple of 16, of which each sixteen are copied as bits of `mask` say.
fn masked(shared: u64, other: u64, bytes: u64, mask: u16) -> Vec<Run> {
    if mask == u16::MAX {
        return vec![Run { shared, other: Some(other), bytes }];
    }
    let mut pieces = Vec::new();
    let mut at = 0;
    while let Some(first) = (at..16).find(|i| mask >> i & 1 != 0) {
        let end = (first..16).find(|i| mask >> i & 1 == 0).unwrap_or(16);
        pieces.push((first, end - first));
        at = end;
    }
    let chunks = (0..bytes).step_by(16);
    chunks
        .flat_map(|chunk| pieces.iter().map(move |(first, n)| (chunk + first, *n)))
        .map(|(i, bytes)| Run { shared: shared.wrapping_add(i), other: Some(other.wrapping_add(i)), bytes })
        .collect()
}

/// The runs of a copy of `bytes` bytes that ignores some at both ends.
fn ignoring(shared: u64, other: u64, bytes: u64, left: u64, right: u64) -> Vec<Run> {
    let left = left.min(bytes);
    let end = bytes.saturating_sub(right).max(left);
    let runs = [
        Run { shared, other: None, bytes: left },
        Run { shared: shared.wrapping_add(left), other: Some(other.wrapping_add(left)), bytes: end - left },
        Run { shared: shared.wrapping_add(end), other: None, bytes: bytes - end },
    ];
    runs.into_iter().filter(|run| run.bytes != 0).collect()
}

/// Refuses figures of a bulk copy that are no multiples of 16.
pub(super) fn multiple_of_16(ctx: &Context<'_>, lane: usize, figures: &[(&str, u64)]) -> Result<(), Stop> {
    match figures.iter().find(|(_, n)| n % 16 != 0) {
        None => Ok(()),
        Some((what, n)) => {
            let message = format!("the {what} of a bulk copy is {n:#x}, no multiple of 16");
            Err(ctx.fault(ErrorKind::Misaligned, 1 << lane, message))
        }
    }
}

/// `cp.async.bulk.prefetch.L2`: sources the address, and how many bytes.
#[derive(Debug)]
struct Prefetch {
    offset: i64,
}

impl WarpOp for Prefetch {
    fn execute(&self, ctx: &mut Context<'_>, inst: &Inst, mask: u32) -> Result<(), Stop> {
        let at = ctx.addresses(mask, inst.src(0), self.offset);
        ctx.need_defined(mask, inst.src(1), "the number of bytes to fetch");
        let sizes = *ctx.regs().get::<u32>(inst.src(1));
        for lane in lanes(mask) {
            let (at, bytes) = (at[lane], u64::from(sizes[lane]));
            multiple_of_16(ctx, lane, &[("source", at), ("size", bytes)])?;
            if ctx.launch.memory.find(at, bytes).is_none() {
                let (kind, message) = ctx.launch.memory.explain(at, bytes);
                return Err(ctx.fault(kind, 1 << lane, message));
            }
        }
        Ok(())
    }
}

/// `cp.async.bulk.commit_group`
#[derive(Debug)]
struct Commit;

impl WarpOp for Commit {
    fn execute(&self, ctx: &mut Context<'_>, _inst: &Inst, mask: u32) -> Result<(), Stop> {
        lanes(mask).for_each(|lane| ctx.close_bulk_group(lane));
        Ok(())
    }
}

/// `cp.async.bulk.wait_group`
#[derive(Debug)]
struct WaitGroup {
    /// How many of the last groups may stay under way.
    leave: u32,
    /// Whether only what they read matters.
    read: bool,
}

impl WarpOp for WaitGroup {
    fn execute(&self, ctx: &mut Context<'_>, _inst: &Inst, mask: u32) -> Result<(), Stop> {
        lanes(mask).try_for_each(|lane| ctx.wait_bulk_groups(lane, self.leave, self.read))
    }
}
