//! Operations between the lanes of a warp: shfl, vote, match, redux, activemask, elect.
//!
//! The scheduler runs a `.sync` form for a group of lanes with the same membermask, when all live lanes of the mask have
//! arrived: `mask` is that group. Results are uninitialised where an input that they depend on is.

// A loop over lanes reads better as one, and vectorises, with an index into several rows.
#![allow(clippy::needless_range_loop, reason = "lanes are numbers in several arrays")]

use super::float::extremum;
use super::rounding::flag;
use crate::decode::decoder::{Decoder, operands};
use crate::decode::mods::Mods;
use crate::decode::{Refusal, invalid, unsupported};
use crate::error::ErrorKind;
use crate::machine::context::{Context, Stop};
use crate::machine::inst::{Class, Convergence, Inst, WarpOp};
use crate::machine::registers::{Bytes, LANES, Reg, Registers};
use crate::ptx::ast::{Instruction, Operand};
use crate::types::Type;

/// Decodes the instructions of this family.
///
/// # Errors
/// The instruction is wrong, or not built.
pub fn decode(d: &mut Decoder<'_, '_>, inst: &Instruction<'_>) -> Result<(), Refusal> {
    match inst.opcode {
        "shfl" => shfl(d, inst),
        "vote" => vote(d, inst),
        "match" => match_sync(d, inst),
        "redux" => redux(d, inst),
        "activemask" => activemask(d, inst),
        "elect" => elect(d, inst),
        opcode => Err(unsupported(format!("the instruction `{opcode}`"))),
    }
}

/// A destination `d` or `d|p`.
fn value_and_predicate(d: &mut Decoder<'_, '_>, op: &Operand<'_>, ty: Type) -> Result<[Reg; 2], Refusal> {
    match op {
        Operand::Pair(value, pred) => Ok([d.dst(value, ty)?, d.dst(pred, Type::Pred)?]),
        _ => Ok([d.dst(op, ty)?, Reg::NONE]),
    }
}

fn only_sync(mods: &mut Mods<'_, '_>) -> Result<(), Refusal> {
    if mods.take("sync") {
        return Ok(());
    }
    Err(unsupported(format!("`{}` without `.sync`, which sm_70 and later do not have", mods.written())))
}

/// A lane that is not in its own membermask ends the launch, because the ISA leaves its result undefined.
#[inline(always)]
fn members_only(ctx: &mut Context<'_>, members: Reg, mask: u32) -> Result<(), Stop> {
    ctx.need_defined(mask, members, "the membermask");
    let first = mask.trailing_zeros() as usize % LANES;
    let named = ctx.warp.regs.get::<u32>(members)[first];
    if mask & !named == 0 { Ok(()) } else { Err(outsiders(ctx, named, mask & !named)) }
}

#[cold]
fn outsiders(ctx: &Context<'_>, named: u32, lanes: u32) -> Stop {
    ctx.fault(
        ErrorKind::WarpMask,
        lanes,
        format!("these lanes execute it with the mask {named:08x}, which does not name them"),
    )
}

fn lanes(mask: u32) -> impl Iterator<Item = usize> {
    (0..LANES).filter(move |lane| mask >> lane & 1 != 0)
}

/// All lanes, or none.
fn all_if(condition: bool) -> u32 {
    if condition { u32::MAX } else { 0 }
}

// ------------------------------------------------------------------------------------------------ shfl

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Direction {
    Up,
    Down,
    Bfly,
    Idx,
}

/// Where each lane reads, and which found their source in range.
#[derive(Clone, Debug)]
struct Routes {
    from: [u8; LANES],
    in_range: u32,
}

/// Sources: a, b, c, membermask; destinations: d, p.
#[derive(Debug)]
struct Shfl {
    direction: Direction,
    /// Known beforehand where b and c are constants, as they nearly always are.
    routes: Option<Routes>,
}

impl Direction {
    /// The source lane of `lane`, by the ISA's pseudo-code, and whether it was in range: else it is the lane itself.
    fn source(self, lane: u32, b: u32, c: u32) -> (u32, bool) {
        let (b, clamp, segment) = (b & 31, c & 31, c >> 8 & 31);
        let first = lane & segment;
        let last = first | (clamp & !segment);
        // `up` goes below 0, where no segment begins.
        let (source, in_range) = match self {
            Self::Up => (lane.wrapping_sub(b), lane as i32 - b as i32 >= last as i32),
            Self::Down => (lane + b, lane + b <= last),
            Self::Bfly => (lane ^ b, lane ^ b <= last),
            Self::Idx => {
                let source = first | (b & !segment);
                (source, source <= last)
            }
        };
        if in_range { (source & 31, true) } else { (lane, false) }
    }

    fn routes(self, b: impl Fn(usize) -> u32, c: impl Fn(usize) -> u32) -> Routes {
        let mut routes = Routes { from: [0; LANES], in_range: 0 };
        for lane in 0..LANES {
            let (from, in_range) = self.source(lane as u32, b(lane), c(lane));
            routes.from[lane] = from as u8;
            routes.in_range |= u32::from(in_range) << lane;
        }
        routes
    }
}

fn shfl(d: &mut Decoder<'_, '_>, inst: &Instruction<'_>) -> Result<(), Refusal> {
    let mut mods = Mods::new(inst);
    only_sync(&mut mods)?;
    let directions = [
        ("up", Direction::Up),
        ("down", Direction::Down),
        ("bfly", Direction::Bfly),
        ("idx", Direction::Idx),
    ];
    let Some(direction) = mods.one_of(&directions) else {
        return Err(invalid(format!("`{}` without .up, .down, .bfly or .idx", mods.written())));
    };
    if mods.ty()? != Type::B32 {
        return Err(invalid(format!("`{}`: the type is .b32", mods.written())));
    }
    mods.finish()?;
    let [to, a, b, c, members] = operands::<5>(inst)?;
    let dsts = value_and_predicate(d, to, Type::B32)?;
    let routes = match (b, c) {
        (Operand::Integer(b), Operand::Integer(c)) => Some(direction.routes(|_| *b as u32, |_| *c as u32)),
        _ => None,
    };
    let srcs = [d.src(a, Type::B32)?, d.src(b, Type::U32)?, d.src(c, Type::U32)?, d.src(members, Type::U32)?];
    d.warp(Shfl { direction, routes }, Class::Warp, &dsts, &srcs).convergence = Convergence::Mask(3);
    Ok(())
}

/// Which bytes the words have that lanes get of others whose word is written in part.
#[cold]
fn partly(regs: &Registers, inst: &Inst, routes: &Routes, takers: u32) -> Vec<(usize, Bytes)> {
    let of = |lane: usize| regs.written_bytes(inst.src(0), usize::from(routes.from[lane]) % LANES);
    lanes(takers).map(|lane| (lane, of(lane))).collect()
}

impl WarpOp for Shfl {
    #[inline]
    fn execute(&self, ctx: &mut Context<'_>, inst: &Inst, mask: u32) -> Result<(), Stop> {
        members_only(ctx, inst.src(3), mask)?;
        let regs = &mut ctx.warp.regs;
        let computed;
        let (routes, mut known) = match &self.routes {
            Some(routes) => (routes, u32::MAX),
            None => {
                let (b, c) = (regs.get::<u32>(inst.src(1)), regs.get::<u32>(inst.src(2)));
                computed = self.direction.routes(|lane| b[lane], |lane| c[lane]);
                (&computed, regs.defined(inst.src(1)) & regs.defined(inst.src(2)))
            }
        };
        let a = regs.get::<u32>(inst.src(0));
        let mut values = [0; LANES];
        for lane in 0..LANES {
            values[lane] = a[usize::from(routes.from[lane]) % LANES];
        }
        let routes_known = known;
        let mut strangers = 0;
        let given = regs.defined(inst.src(0)) & mask;
        if given != u32::MAX {
            for lane in lanes(mask) {
                let from = routes.from[lane];
                known &= !(u32::from(given >> from & 1 == 0) << lane);
                strangers |= u32::from(mask >> from & 1 == 0) << lane;
            }
        }
        let partly = match regs.any_partly() {
            true => partly(regs, inst, routes, mask & !known & routes_known & !strangers),
            false => Vec::new(),
        };
        regs.set::<u32>(inst.dst(0), mask, &values);
        regs.set_defined(inst.dst(0), mask, known);
        partly.into_iter().for_each(|(lane, bytes)| regs.set_written_bytes(inst.dst(0), lane, bytes));
        regs.set_pred(inst.dst(1), mask, routes.in_range);
        regs.set_defined(inst.dst(1), mask, routes_known);
        if strangers != 0 {
            ctx.finding(ErrorKind::WarpMask, strangers, None, || {
                "these lanes read from lanes that do not take part: their results are undefined".to_owned()
            });
        }
        Ok(())
    }
}

// ------------------------------------------------------------------------------------------------ vote

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Question {
    All,
    Any,
    Uni,
    Ballot,
}

/// Sources: the predicate, and for `.sync` the membermask.
#[derive(Debug)]
struct Vote {
    question: Question,
    negated: bool,
}

fn vote(d: &mut Decoder<'_, '_>, inst: &Instruction<'_>) -> Result<(), Refusal> {
    let mut mods = Mods::new(inst);
    let sync = mods.take("sync");
    let questions = [
        ("all", Question::All),
        ("any", Question::Any),
        ("uni", Question::Uni),
        ("ballot", Question::Ballot),
    ];
    let Some(question) = mods.one_of(&questions) else {
        return Err(invalid(format!("`{}` without .all, .any, .uni or .ballot", mods.written())));
    };
    let ty = mods.ty()?;
    if ty != (if question == Question::Ballot { Type::B32 } else { Type::Pred }) {
        return Err(invalid(format!("`{}`: .ballot is .b32, the others are .pred", mods.written())));
    }
    mods.finish()?;
    // Without .sync (before sm_70) the lanes that happen to be together vote.
    let (to, a, members) = if sync {
        let [to, a, members] = operands::<3>(inst)?;
        (to, a, Some(members))
    } else {
        let [to, a] = operands::<2>(inst)?;
        (to, a, None)
    };
    let dst = d.dst(to, ty)?;
    let (pred, negated) = d.pred(a)?;
    let mut srcs = vec![pred];
    if let Some(members) = members {
        srcs.push(d.src(members, Type::U32)?);
    }
    let inst = d.warp(Vote { question, negated }, Class::Warp, &[dst], &srcs);
    if sync {
        inst.convergence = Convergence::Mask(1);
    }
    Ok(())
}

impl WarpOp for Vote {
    fn execute(&self, ctx: &mut Context<'_>, inst: &Inst, mask: u32) -> Result<(), Stop> {
        if let Some(members) = inst.srcs().get(1) {
            members_only(ctx, *members, mask)?;
        }
        let regs = &mut ctx.warp.regs;
        let votes = (regs.pred(inst.src(0)) ^ all_if(self.negated)) & mask;
        let known = regs.defined(inst.src(0)) & mask;
        // One known vote may decide whatever the unknown ones are.
        let (some_yes, some_no) = (votes & known != 0, !votes & known != 0);
        let (answer, decided) = match self.question {
            Question::All => (votes == mask, some_no),
            Question::Any => (votes != 0, some_yes),
            Question::Uni => (votes == mask || votes == 0, some_yes && some_no),
            Question::Ballot => {
                regs.set::<u32>(inst.dst(0), mask, &[votes; LANES]);
                regs.set_defined(inst.dst(0), mask, all_if(known == mask));
                return Ok(());
            }
        };
        regs.set_pred(inst.dst(0), mask, all_if(answer));
        regs.set_defined(inst.dst(0), mask, all_if(known == mask || decided));
        Ok(())
    }
}

// ------------------------------------------------------------------------------------------------ match

/// Sources: a, membermask; destinations: d, p.
#[derive(Debug)]
struct Match {
    all: bool,
    wide: bool,
}

fn match_sync(d: &mut Decoder<'_, '_>, inst: &Instruction<'_>) -> Result<(), Refusal> {
    let mut mods = Mods::new(inst);
    only_sync(&mut mods)?;
    let Some(all) = mods.one_of(&[("any", false), ("all", true)]) else {
        return Err(invalid(format!("`{}` without .any or .all", mods.written())));
    };
    let ty = mods.ty()?;
    if !matches!(ty, Type::B32 | Type::B64) {
        return Err(invalid(format!("`{}`: the type is .b32 or .b64", mods.written())));
    }
    mods.finish()?;
    let [to, a, members] = operands::<3>(inst)?;
    if !all && matches!(to, Operand::Pair(..)) {
        return Err(invalid("`match.any` has no predicate destination"));
    }
    let dsts = value_and_predicate(d, to, Type::B32)?;
    let srcs = [d.src(a, ty)?, d.src(members, Type::U32)?];
    d.warp(Match { all, wide: ty == Type::B64 }, Class::Warp, &dsts, &srcs).convergence =
        Convergence::Mask(1);
    Ok(())
}

impl WarpOp for Match {
    fn execute(&self, ctx: &mut Context<'_>, inst: &Inst, mask: u32) -> Result<(), Stop> {
        members_only(ctx, inst.src(1), mask)?;
        let regs = &mut ctx.warp.regs;
        let a: [u64; LANES] = if self.wide {
            *regs.get::<u64>(inst.src(0))
        } else {
            regs.get::<u32>(inst.src(0)).map(u64::from)
        };
        let mut peers = [0u32; LANES];
        for lane in lanes(mask) {
            peers[lane] =
                lanes(mask).filter(|other| a[*other] == a[lane]).fold(0, |all, other| all | 1 << other);
        }
        let known = all_if(regs.defined(inst.src(0)) & mask == mask);
        if self.all {
            let equal = all_if(peers[mask.trailing_zeros() as usize % LANES] == mask);
            regs.set::<u32>(inst.dst(0), mask, &[equal & mask; LANES]);
            regs.set_pred(inst.dst(1), mask, equal);
            regs.set_defined(inst.dst(1), mask, known);
        } else {
            regs.set::<u32>(inst.dst(0), mask, &peers);
        }
        regs.set_defined(inst.dst(0), mask, known);
        Ok(())
    }
}

// ------------------------------------------------------------------------------------------------ redux

/// Sources: a, membermask.
#[derive(Debug)]
struct Redux {
    combine: fn(u32, u32) -> u32,
    /// Bits of a that count: `.abs` takes the sign away.
    keep: u32,
    /// Whether a NaN of a single lane becomes the canonical one.
    float: bool,
}

/// The lesser or greater of two f32 (sm_100).
fn of_floats<const MAX: bool, const FLAGS: u64>(a: u32, b: u32) -> u32 {
    extremum::<MAX>(FLAGS, a, b, 1 << 31, 0x7f80_0000)
}

fn redux(d: &mut Decoder<'_, '_>, inst: &Instruction<'_>) -> Result<(), Refusal> {
    let mut mods = Mods::new(inst);
    only_sync(&mut mods)?;
    let op = mods.any().unwrap_or_default();
    let ty = mods.ty()?;
    let written = mods.written();
    let flags = if ty == Type::F32 { (mods.take("abs"), mods.take("NaN")) } else { (false, false) };
    mods.finish()?;
    let combine: fn(u32, u32) -> u32 = match (op, ty) {
        ("add", Type::U32 | Type::S32) => u32::wrapping_add,
        ("min", Type::U32) => u32::min,
        ("max", Type::U32) => u32::max,
        ("min", Type::S32) => |a, b| (a as i32).min(b as i32) as u32,
        ("max", Type::S32) => |a, b| (a as i32).max(b as i32) as u32,
        ("and", Type::B32) => |a, b| a & b,
        ("or", Type::B32) => |a, b| a | b,
        ("xor", Type::B32) => |a, b| a ^ b,
        ("min", Type::F32) if flags.1 => of_floats::<false, { flag::NAN }>,
        ("min", Type::F32) => of_floats::<false, 0>,
        ("max", Type::F32) if flags.1 => of_floats::<true, { flag::NAN }>,
        ("max", Type::F32) => of_floats::<true, 0>,
        _ => return Err(unsupported(format!("`{written}`"))),
    };
    let [to, a, members] = operands::<3>(inst)?;
    let dst = d.dst(to, Type::B32)?;
    let srcs = [d.src(a, ty)?, d.src(members, Type::U32)?];
    d.warp(
        Redux { combine, keep: if flags.0 { 0x7fff_ffff } else { u32::MAX }, float: ty == Type::F32 },
        Class::Warp,
        &[dst],
        &srcs,
    )
    .convergence = Convergence::Mask(1);
    Ok(())
}

impl WarpOp for Redux {
    fn execute(&self, ctx: &mut Context<'_>, inst: &Inst, mask: u32) -> Result<(), Stop> {
        members_only(ctx, inst.src(1), mask)?;
        let regs = &mut ctx.warp.regs;
        let a = regs.get::<u32>(inst.src(0));
        let Some(value) = lanes(mask).map(|lane| a[lane] & self.keep).reduce(self.combine) else {
            return Ok(());
        };
        let value = if self.float { (self.combine)(value, value) } else { value };
        let known = all_if(regs.defined(inst.src(0)) & mask == mask);
        regs.set::<u32>(inst.dst(0), mask, &[value; LANES]);
        regs.set_defined(inst.dst(0), mask, known);
        Ok(())
    }
}

// ------------------------------------------------------------------------------------------------ activemask, elect

/// The lanes that run it together: those of the running split whose guard is true.
#[derive(Debug)]
struct ActiveMask;

fn activemask(d: &mut Decoder<'_, '_>, inst: &Instruction<'_>) -> Result<(), Refusal> {
    let mut mods = Mods::new(inst);
    if mods.ty()? != Type::B32 {
        return Err(invalid(format!("`{}`: the type is .b32", mods.written())));
    }
    mods.finish()?;
    let [to] = operands::<1>(inst)?;
    let dst = d.dst(to, Type::B32)?;
    d.warp(ActiveMask, Class::Warp, &[dst], &[]);
    Ok(())
}

impl WarpOp for ActiveMask {
    fn execute(&self, ctx: &mut Context<'_>, inst: &Inst, mask: u32) -> Result<(), Stop> {
        ctx.regs().set::<u32>(inst.dst(0), mask, &[mask; LANES]);
        ctx.regs().set_defined(inst.dst(0), mask, u32::MAX);
        Ok(())
    }
}

/// Source: membermask; destinations: the leader's lane (or none), and whether the lane is it. The ISA leaves the choice
/// open but wants it to be the same each time; here, as on hardware, it is the lowest lane.
#[derive(Debug)]
struct Elect;

fn elect(d: &mut Decoder<'_, '_>, inst: &Instruction<'_>) -> Result<(), Refusal> {
    let mut mods = Mods::new(inst);
    only_sync(&mut mods)?;
    mods.finish()?;
    let [to, members] = operands::<2>(inst)?;
    if !matches!(to, Operand::Pair(..)) {
        return Err(invalid("`elect.sync` writes a register and a predicate, `d|p`"));
    }
    let dsts = value_and_predicate(d, to, Type::B32)?;
    let srcs = [d.src(members, Type::U32)?];
    d.warp(Elect, Class::Warp, &dsts, &srcs).convergence = Convergence::Mask(0);
    Ok(())
}

impl WarpOp for Elect {
    fn execute(&self, ctx: &mut Context<'_>, inst: &Inst, mask: u32) -> Result<(), Stop> {
        members_only(ctx, inst.src(0), mask)?;
        let leader = mask.trailing_zeros();
        let regs = ctx.regs();
        regs.set::<u32>(inst.dst(0), mask, &[leader; LANES]);
        regs.set_pred(inst.dst(1), mask, 1 << (leader & 31));
        regs.set_defined(inst.dst(0), mask, u32::MAX);
        regs.set_defined(inst.dst(1), mask, u32::MAX);
        Ok(())
    }
}
