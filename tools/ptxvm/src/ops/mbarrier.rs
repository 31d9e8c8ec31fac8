//! `mbarrier`: arrivals and waits that are apart, for threads and for asynchronous copies.
//!
//! An arrival releases the warp's writes to those who wait for its phase, unless it is `.relaxed`; a wait that finds the phase
//! complete acquires them. A wait that finds it incomplete never suspends the warp here; it ends its time slice.

use super::memory::operands::{scope, space};
use crate::decode::decoder::{Decoder, operands};
use crate::decode::mods::Mods;
use crate::decode::{Refusal, invalid, unsupported};
use crate::error::ErrorKind;
use crate::machine::block::Poll;
use crate::machine::context::{Context, Stop};
use crate::machine::inst::{Class, Inst, WarpOp};
use crate::machine::memory::access::{Access, Act, Order, by_space, in_window};
use crate::machine::memory::mbarrier::{Awaited, MBARRIER_BYTES};
use crate::machine::memory::{lanes, pick};
use crate::machine::registers::{LANES, Reg, Width};
use crate::ptx::ast::{Instruction, Operand};
use crate::types::{Space, Type};

/// What the instruction does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Action {
    /// Source 1: the count.
    Init,
    Inval,
    /// Destination: the state, or none; source 1: the count, or none.
    Arrive {
        drop: bool,
        may_complete: bool,
    },
    /// The same, but source 1 is a number of bytes that is waited for first; one thread arrives.
    ArriveExpecting {
        drop: bool,
    },
    /// Source 1: bytes.
    ExpectTx,
    CompleteTx,
    /// Destination: a predicate; source 1: the state or the parity, source 2: a time, or none.
    Wait {
        parity: bool,
    },
    /// `cp.async.mbarrier.arrive`; without `noinc` the phase waits for one arrival more.
    CopiesArrive {
        noinc: bool,
    },
}

/// An instruction on the mbarrier at source 0.
#[derive(Debug)]
struct Mbarrier {
    action: Action,
    space: Space,
    offset: i64,
    /// Whether it may lie in the shared memory of another block.
    remote: bool,
    /// Whether an arrival releases, or a wait acquires.
    orders: bool,
}

/// The address of an mbarrier.
fn object(
    d: &mut Decoder<'_, '_>,
    mods: &mut Mods<'_, '_>,
    op: &Operand<'_>,
) -> Result<(Space, Reg, i64), Refusal> {
    let space = space(mods);
    if !matches!(space, Space::Generic | Space::Shared) {
        return Err(invalid(format!("`{}`: an mbarrier lies in shared memory", mods.written())));
    }
    let at = d.address(op, space)?;
    d.note_access(space, MBARRIER_BYTES as u32, false);
    Ok((space, at.base, at.offset))
}

/// Takes `.b64`, which all of them have.
fn finish(mut mods: Mods<'_, '_>) -> Result<(), Refusal> {
    if !mods.take("b64") {
        return Err(invalid(format!("`{}`: an mbarrier has type .b64", mods.written())));
    }
    mods.finish()
}

/// Takes order and scope; whether it is the stronger order, which is the default.
fn ordered(mods: &mut Mods<'_, '_>, stronger: &str) -> bool {
    let relaxed = mods.one_of(&[("relaxed", true), (stronger, false)]);
    scope(mods);
    relaxed != Some(true)
}

/// Decodes the instructions of this family.
///
/// # Errors
/// The instruction is wrong, or not built.
pub fn decode(d: &mut Decoder<'_, '_>, inst: &Instruction<'_>) -> Result<(), Refusal> {
    let mut mods = Mods::new(inst);
    let written = mods.written();
    let names = [
        "init",
        "inval",
        "arrive",
        "arrive_drop",
        "expect_tx",
        "complete_tx",
        "test_wait",
        "try_wait",
        "pending_count",
    ];
    let Some(name) = names.into_iter().find(|name| inst.modifiers.first() == Some(name)) else {
        return Err(unsupported(format!("`{written}`")));
    };
    mods.take(name);
    match name {
        "pending_count" => {
            finish(mods)?;
            let [count, state] = operands(inst)?;
            let (count, state) = (d.dst(count, Type::B32)?, d.src(state, Type::B64)?);
            d.warp(PendingCount, Class::Integer, &[count], &[state]);
            Ok(())
        }
        "init" | "expect_tx" | "complete_tx" => {
            let [at, count] = operands(inst)?;
            let action = match name {
                "init" => Action::Init,
                "expect_tx" => Action::ExpectTx,
                _ => Action::CompleteTx,
            };
            if action != Action::Init {
                mods.take("relaxed");
                scope(&mut mods);
            }
            let (space, base, offset) = object(d, &mut mods, at)?;
            finish(mods)?;
            let count = d.src(count, Type::U32)?;
            let remote = inst.modifiers.contains(&"shared::cluster");
            let op = Mbarrier { action, space, offset, remote, orders: false };
            d.warp(op, Class::Sync, &[], &[base, count]);
            Ok(())
        }
        "inval" => {
            let [at] = operands(inst)?;
            let (space, base, offset) = object(d, &mut mods, at)?;
            finish(mods)?;
            let op = Mbarrier { action: Action::Inval, space, offset, remote: false, orders: false };
            d.warp(op, Class::Sync, &[], &[base]);
            Ok(())
        }
        "arrive" | "arrive_drop" => arrive(d, inst, mods, name == "arrive_drop"),
        _ => wait(d, inst, mods, name == "try_wait"),
    }
}

fn arrive(
    d: &mut Decoder<'_, '_>,
    inst: &Instruction<'_>,
    mut mods: Mods<'_, '_>,
    drop: bool,
) -> Result<(), Refusal> {
    let written = mods.written();
    let expecting = mods.take("expect_tx");
    let may_complete = !mods.take("noComplete");
    let orders = ordered(&mut mods, "release");
    let remote = inst.modifiers.contains(&"shared::cluster");
    let wrong = || invalid(format!("`{written}` takes a state, an address and a count"));
    let (state, at, count) = match inst.operands.as_slice() {
        [at @ Operand::Address(_), count @ ..] if remote => (None, at, count),
        [state, at, count @ ..] => (Some(state), at, count),
        _ => return Err(wrong()),
    };
    if count.len() > 1 || (count.is_empty() && (expecting || !may_complete)) || (expecting && !may_complete) {
        return Err(wrong());
    }
    let state = match state {
        Some(Operand::Sink) | None => Reg::NONE,
        Some(_) if remote => {
            return Err(invalid(format!("`{written}` gives no state: its destination is `_`")));
        }
        Some(state) => d.dst(state, Type::B64)?,
    };
    let (space, base, offset) = object(d, &mut mods, at)?;
    finish(mods)?;
    let count = count.first().map_or(Ok(Reg::NONE), |op| d.src(op, Type::U32))?;
    let action = match expecting {
        true => Action::ArriveExpecting { drop },
        false => Action::Arrive { drop, may_complete },
    };
    d.warp(Mbarrier { action, space, offset, remote, orders }, Class::Sync, &[state], &[base, count]);
    Ok(())
}

fn wait(
    d: &mut Decoder<'_, '_>,
    inst: &Instruction<'_>,
    mut mods: Mods<'_, '_>,
    may_suspend: bool,
) -> Result<(), Refusal> {
    let written = mods.written();
    let parity = mods.take("parity");
    let orders = ordered(&mut mods, "acquire");
    let [done, at, awaited, hint @ ..] = inst.operands.as_slice() else {
        return Err(invalid(format!("`{written}` takes a predicate, an address and a phase")));
    };
    if hint.len() > usize::from(may_suspend) {
        return Err(invalid(format!("`{written}` has too many operands")));
    }
    let (space, base, offset) = object(d, &mut mods, at)?;
    finish(mods)?;
    let done = d.dst(done, Type::Pred)?;
    let awaited = d.src(awaited, if parity { Type::U32 } else { Type::B64 })?;
    let hint = hint.first().map_or(Ok(Reg::NONE), |op| d.src(op, Type::U32))?;
    let op = Mbarrier { action: Action::Wait { parity }, space, offset, remote: false, orders };
    d.warp(op, Class::Sync, &[done], &[base, awaited, hint]);
    Ok(())
}

/// `cp.async.mbarrier.arrive`, behind `mbarrier`.
pub(super) fn copies_arrive(
    d: &mut Decoder<'_, '_>,
    inst: &Instruction<'_>,
    mut mods: Mods<'_, '_>,
) -> Result<(), Refusal> {
    if !mods.take("arrive") {
        return Err(unsupported(format!("`{}`", mods.written())));
    }
    let noinc = mods.take("noinc");
    let [at] = operands(inst)?;
    let (space, base, offset) = object(d, &mut mods, at)?;
    finish(mods)?;
    d.asynchronous = true;
    let op = Mbarrier { action: Action::CopiesArrive { noinc }, space, offset, remote: false, orders: true };
    d.warp(op, Class::Sync, &[], &[base]);
    Ok(())
}

impl Mbarrier {
    /// The shared addresses of the objects.
    fn objects(&self, ctx: &mut Context<'_>, inst: &Inst, mask: u32) -> Result<[u64; LANES], Stop> {
        let mut at = ctx.addresses(mask, inst.src(0), self.offset);
        if self.space == Space::Generic {
            let parts = by_space(mask, &at);
            if let Some((space, bad)) = parts.iter().find(|(space, m)| *space != Space::Shared && *m != 0) {
                let first = at[bad.trailing_zeros() as usize];
                let message = format!("an mbarrier at {first:#x}, an address of {space} memory");
                return Err(ctx.fault(ErrorKind::WrongSpace, *bad, message));
            }
            at = in_window(&at);
        }
        Ok(at)
    }

    /// Checks an access to the objects at `at`.
    fn check(&self, ctx: &mut Context<'_>, mask: u32, at: &[u64; LANES]) -> Result<(), Stop> {
        ctx.bound_shared(mask, at, MBARRIER_BYTES)?;
        if ctx.launch.checks.race {
            if self.action == Action::Inval {
                // Lanes of one warp are done with the object when one of them ends it, because libcu++ chooses that lane by
                // `match.sync`, which orders no memory.
                ctx.block.clocks.warp_barrier(ctx.warp.id);
            }
            let plain = matches!(self.action, Action::Init | Action::Inval);
            let order = Order { strong: !plain, ..Order::default() };
            let act = if plain { Act::Write } else { Act::Atomic };
            let access = Access { size: MBARRIER_BYTES, act, order };
            ctx.race_shared(mask, at, &access, true, |_, _| None);
        }
        Ok(())
    }

    /// A number of source 1, 1 where there is none.
    fn counts(&self, ctx: &mut Context<'_>, inst: &Inst, mask: u32, what: &str) -> [u32; LANES] {
        let reg = inst.src(1);
        if reg.width == Width::None {
            return [1; LANES];
        }
        ctx.need_defined(mask, reg, what);
        *ctx.regs().get::<u32>(reg)
    }

    /// The lanes arrive, one after another.
    fn arrive(
        &self,
        ctx: &mut Context<'_>,
        inst: &Inst,
        mask: u32,
        at: &[u64; LANES],
        expecting: bool,
        (drop, may_complete): (bool, bool),
    ) -> Result<(), Stop> {
        let counts = self.counts(ctx, inst, mask, "the count of an arrival");
        let mut states = [0; LANES];
        if ctx.launch.checks.race {
            if self.orders && ctx.cluster_blocks() > 1 {
                ctx.publish();
            }
            let clocks = ctx.block.clocks.released(ctx.warp.id, self.orders);
            for lane in lanes(mask) {
                if let Ok(object) = ctx.block.shared.mbarriers.at(at[lane]) {
                    object.release(clocks);
                }
            }
        }
        for lane in lanes(mask) {
            states[lane] = ctx.with_mbarrier(lane, at[lane], |object| {
                let state = object.state(at[lane]);
                if expecting {
                    object.expect(counts[lane])?;
                }
                object.arrive(if expecting { 1 } else { counts[lane] }, drop, may_complete)?;
                Ok(state)
            })?;
        }
        let to = inst.dst(0);
        if to.is_some() {
            ctx.regs().set::<u64>(to, mask, &states);
            ctx.regs().set_defined(to, mask, u32::MAX);
        }
        Ok(())
    }

    fn wait(
        &self,
        ctx: &mut Context<'_>,
        inst: &Inst,
        mask: u32,
        at: &[u64; LANES],
        parity: bool,
    ) -> Result<(), Stop> {
        ctx.need_defined(mask, inst.src(1), "the phase that a wait names");
        ctx.need_defined(mask, inst.src(2), "the time that a wait may take");
        let awaited: [Awaited; LANES] = if parity {
            ctx.regs().get::<u32>(inst.src(1)).map(Awaited::Parity)
        } else {
            ctx.regs().get::<u64>(inst.src(1)).map(Awaited::State)
        };
        let mut done = 0;
        for lane in lanes(mask) {
            let complete = |ctx: &mut Context<'_>| {
                ctx.with_mbarrier(lane, at[lane], |object| object.is_complete(at[lane], awaited[lane]))
            };
            if !complete(ctx)? {
                ctx.settle(lane, at[lane])?;
                if !complete(ctx)? {
                    continue;
                }
            }
            done |= 1 << lane;
            if ctx.launch.checks.race
                && let Ok(object) = ctx.block.shared.mbarriers.at(at[lane])
            {
                ctx.block.clocks.acquired(ctx.warp.id, object.completed(), self.orders);
                if ctx.block.cluster.is_some() {
                    ctx.launch.memory.releases.strong_read(&mut ctx.block.epochs, true);
                }
            }
        }
        ctx.regs().set_pred(inst.dst(0), mask, done);
        ctx.regs().set_defined(inst.dst(0), mask, u32::MAX);
        // Lanes that went on may end the others' wait.
        if done == 0 {
            let lane = mask.trailing_zeros() as usize;
            ctx.block.poll = Some(Poll { pc: ctx.pc, lanes: mask, at: at[lane], awaited: awaited[lane] });
        }
        Ok(())
    }
}

impl WarpOp for Mbarrier {
    fn execute(&self, ctx: &mut Context<'_>, inst: &Inst, mask: u32) -> Result<(), Stop> {
        let at = self.objects(ctx, inst, mask)?;
        ctx.each_block(mask, &at, self.remote, |ctx, mask, at| self.act(ctx, inst, mask, *at))
    }
}

impl Mbarrier {
    /// The lanes of `mask`, whose objects lie at `at` in the memory of one block.
    fn act(&self, ctx: &mut Context<'_>, inst: &Inst, mask: u32, at: [u64; LANES]) -> Result<(), Stop> {
        self.check(ctx, mask, &at)?;
        match self.action {
            Action::Wait { parity } => return self.wait(ctx, inst, mask, &at, parity),
            Action::Arrive { drop, may_complete } => {
                self.arrive(ctx, inst, mask, &at, false, (drop, may_complete))?;
            }
            Action::ArriveExpecting { drop } => self.arrive(ctx, inst, mask, &at, true, (drop, true))?,
            Action::Init => {
                let counts = self.counts(ctx, inst, mask, "the count of an mbarrier");
                for lane in lanes(mask) {
                    let pc = ctx.pc;
                    let made = ctx.block.shared.mbarriers.init(at[lane], counts[lane], pc);
                    made.map_err(|what| ctx.mbarrier_fault(1 << lane, at[lane], &what))?;
                }
                let ones = [u128::MAX; LANES].map(|bits| bits as u64);
                for lane in lanes(mask) {
                    ctx.block.shared.write(at[lane], ones[lane]);
                }
                ctx.set_written_shared(mask, &at, 0, MBARRIER_BYTES, mask);
            }
            Action::Inval => {
                for lane in lanes(mask) {
                    let gone = ctx.block.shared.mbarriers.inval(at[lane]);
                    gone.map_err(|what| ctx.mbarrier_fault(1 << lane, at[lane], &what))?;
                }
                // What is left there is nobody's value.
                ctx.set_written_shared(mask, &at, 0, MBARRIER_BYTES, 0);
            }
            Action::ExpectTx | Action::CompleteTx => {
                let bytes = self.counts(ctx, inst, mask, "a number of bytes");
                for lane in lanes(mask) {
                    ctx.with_mbarrier(lane, at[lane], |object| match self.action {
                        Action::ExpectTx => object.expect(bytes[lane]),
                        _ => object.transact(-i64::from(bytes[lane])),
                    })?;
                }
            }
            Action::CopiesArrive { noinc } => {
                for lane in lanes(mask) {
                    // Without `.noinc` the arrival is one that nobody expected.
                    ctx.with_mbarrier(
                        lane,
                        at[lane],
                        |object| if noinc { Ok(()) } else { object.increment() },
                    )?;
                }
                ctx.defer_arrivals(mask, &at)?;
            }
        }
        ctx.block.progress += 1;
        Ok(())
    }
}

/// `mbarrier.pending_count`: the pending count of a state.
#[derive(Debug)]
struct PendingCount;

impl WarpOp for PendingCount {
    fn execute(&self, ctx: &mut Context<'_>, inst: &Inst, mask: u32) -> Result<(), Stop> {
        let counts = ctx.regs().get::<u64>(inst.src(0)).map(|state| (state & ((1 << 20) - 1)) as u32);
        let known = ctx.regs().defined(inst.src(0));
        ctx.regs().set::<u32>(inst.dst(0), mask, &counts);
        ctx.regs().set_defined(inst.dst(0), mask, pick(mask, |lane| known >> lane & 1 != 0));
        Ok(())
    }
}
