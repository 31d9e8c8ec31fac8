//! atom and red: indivisible read-modify-write of global and shared memory.
//!
//! Lanes of a warp take their turns in the order of their numbers. Elements of a vector are atomic one by one, as the
//! ISA says.

use super::float::Real;
use super::half::{Bf16, F16, Format16};
use super::memory::operands::{Scope, each_space, remote, scope, space, values, without_policy};
use crate::decode::decoder::Decoder;
use crate::decode::mods::Mods;
use crate::decode::{Refusal, invalid, unsupported};
use crate::error::ErrorKind;
use crate::machine::context::{Context, Stop};
use crate::machine::inst::{Class, Inst, WarpOp};
use crate::machine::memory::access::{Access, Act, Order};
use crate::machine::memory::buffer::Word;
use crate::machine::memory::lanes;
use crate::machine::registers::{LANES, Reg, Width};
use crate::ptx::ast::{Instruction, Operand};
use crate::types::{Space, Type};

/// The new value of an atomic, from the old one and the operands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Update {
    Add,
    /// Wraps at the operand.
    Inc,
    Dec,
    Min,
    Max,
    MinSigned,
    MaxSigned,
    And,
    Or,
    Xor,
    Exch,
    Cas,
    AddF32,
    AddF64,
    AddF16,
    AddBf16,
    AddF16x2,
    AddBf16x2,
}

/// a + b rounded once: f32 has more than twice the bits of either format.
fn add16<F: Format16>(a: u32, b: u32) -> u32 {
    F::narrow(F::wide(a) + F::wide(b))
}

fn add16x2<F: Format16>(a: u32, b: u32) -> u32 {
    add16::<F>(a & 0xffff, b & 0xffff) | add16::<F>(a >> 16, b >> 16) << 16
}

impl Update {
    /// The new value; `flush` is for f32 in global memory, whose atomics know no subnormal numbers.
    #[inline(always)]
    fn apply<T: Word>(self, old: T, b: T, c: T, flush: bool) -> T {
        let (x, y) = (old.wide(), b.wide());
        let (low, low_b) = (old.low(), b.low());
        T::cut(match self {
            Self::Add => x.wrapping_add(y),
            Self::Inc => {
                if x >= y {
                    0
                } else {
                    x + 1
                }
            }
            Self::Dec => {
                if x == 0 || x > y {
                    y
                } else {
                    x - 1
                }
            }
            Self::Min => x.min(y),
            Self::Max => x.max(y),
            Self::MinSigned => (old.signed() as i64).min(b.signed() as i64) as u64,
            Self::MaxSigned => (old.signed() as i64).max(b.signed() as i64) as u64,
            Self::And => x & y,
            Self::Or => x | y,
            Self::Xor => x ^ y,
            // These two have values of 16 bytes, too.
            Self::Exch => return b,
            Self::Cas => return if old == b { c } else { old },
            Self::AddF32 => {
                let sources = [f32::from_bits(low), f32::from_bits(low_b)];
                let [a, b] = if flush { sources.map(Real::flushed) } else { sources };
                let sum = (a + b).or_nan([a, b]);
                u64::from((if flush { sum.flushed() } else { sum }).to_bits())
            }
            Self::AddF64 => {
                let (a, b) = (f64::from_bits(x), f64::from_bits(y));
                (a + b).or_nan([a, b]).to_bits()
            }
            Self::AddF16 => u64::from(add16::<F16>(low, low_b)),
            Self::AddBf16 => u64::from(add16::<Bf16>(low, low_b)),
            Self::AddF16x2 => u64::from(add16x2::<F16>(low, low_b)),
            Self::AddBf16x2 => u64::from(add16x2::<Bf16>(low, low_b)),
        })
    }

    /// Whether the order of the operations shows in the sum of many.
    fn rounds(self) -> bool {
        use Update::*;
        matches!(self, AddF32 | AddF64 | AddF16 | AddBf16 | AddF16x2 | AddBf16x2)
    }
}

/// `atom` and `red`. Sources: the address, the elements of b, and c for `cas`; destinations: the old elements.
#[derive(Debug)]
struct Atomic {
    space: Space,
    /// Whether it may reach the shared memory of other blocks.
    remote: bool,
    update: Update,
    /// Bytes of an element.
    bytes: u32,
    /// How many elements.
    n: usize,
    access: Access,
    offset: i64,
}

/// Decodes the instructions of this family.
///
/// # Errors
/// The instruction is wrong, or not built.
pub fn decode(d: &mut Decoder<'_, '_>, inst: &Instruction<'_>) -> Result<(), Refusal> {
    let mut mods = Mods::new(inst);
    let written = mods.written();
    let returns = inst.opcode == "atom";
    let order = order(&mut mods);
    let space = space(&mut mods);
    if !matches!(space, Space::Generic | Space::Global | Space::Shared) {
        return Err(invalid(format!("`{written}`: atomics work on global and shared memory")));
    }
    let (update, ty) = operation(&mut mods, &written)?;
    let n = mods.one_of(&[("v2", 2), ("v4", 4), ("v8", 8)]).unwrap_or(1);
    let ops = without_policy(d, &mut mods, &inst.operands)?;
    mods.finish()?;
    if n > 1 {
        let fits = match ty {
            Type::F32 => n <= 4,
            Type::F16 | Type::BF16 => n <= 8,
            Type::F16X2 | Type::BF16X2 => n <= 4,
            _ => false,
        };
        if !fits || space == Space::Shared {
            return Err(invalid(format!("`{written}`: no such vector")));
        }
    }
    if !returns && matches!(update, Update::Exch | Update::Cas) {
        return Err(invalid(format!("`{written}`: red has no such operation")));
    }
    let (to, ops) = match (returns, ops) {
        (true, [to, rest @ ..]) => (Some(to), rest),
        (false, all) => (None, all),
        _ => return Err(invalid(format!("`{written}` has no operands"))),
    };
    let (at, b, c) = match (update, ops) {
        (Update::Cas, [at, b, c]) => (at, b, Some(c)),
        (u, [at, b]) if u != Update::Cas => (at, b, None),
        _ => return Err(invalid(format!("`{written}`: wrong number of operands"))),
    };
    let elements = |op: &Operand<'_>| -> Result<usize, Refusal> {
        let have = if let Operand::Vector(all) = op { all.len() } else { 1 };
        let vector = matches!(op, Operand::Vector(_));
        if have == n && vector == (n > 1) {
            return Ok(have);
        }
        Err(invalid(format!("`{written}` needs {n} elements")))
    };
    fn all<'o, 'a>(op: &'o Operand<'a>) -> &'o [Operand<'a>] {
        if let Operand::Vector(all) = op { all } else { std::slice::from_ref(op) }
    }
    // Packed and half types are untyped bits to the register rules.
    let raw = match ty.bytes() {
        2 => Type::B16,
        4 => Type::B32,
        8 => Type::B64,
        _ => Type::B128,
    };
    let typed = if matches!(ty, Type::F32 | Type::F64) { ty } else { raw };
    let mut dsts: Vec<Reg> = Vec::new();
    if let Some(to) = to {
        // The old value may be dropped as a whole.
        if !matches!(to, Operand::Sink) {
            elements(to)?;
            for op in all(to) {
                dsts.push(d.dst(op, raw)?);
            }
        }
    }
    let used = dsts.iter().any(|reg| reg.is_some());
    dsts.resize(n, Reg::NONE);
    let address = d.address(at, space)?;
    let mut srcs = vec![address.base];
    elements(b)?;
    for op in all(b).iter().chain(c) {
        if matches!(op, Operand::Sink) {
            return Err(invalid(format!("`{written}`: `_` is no value")));
        }
        srcs.push(d.src(op, typed)?);
    }
    // A reduction that does not round gives the same in any order of blocks. The host has no atomics of 16 bytes, so that blocks that
    // use them must not run at the same time.
    d.note_access(space, ty.bytes(), used || update.rounds() || ty == Type::B128);
    let act = if update == Update::Cas { Act::Swap } else { Act::Atomic };
    let access = Access { size: u64::from(ty.bytes()) * n as u64, act, order };
    let remote = remote(inst, space);
    let op = Atomic { space, remote, update, bytes: ty.bytes(), n, access, offset: address.offset };
    d.warp(op, Class::Atomic, &dsts, &srcs);
    Ok(())
}

/// `.relaxed.gpu` is the default.
fn order(mods: &mut Mods<'_, '_>) -> Order {
    let semantics = [("relaxed", (false, false)), ("acquire", (true, false)), ("release", (false, true))];
    let found = mods.one_of(&semantics).or_else(|| mods.take("acq_rel").then_some((true, true)));
    let (acquire, release) = found.unwrap_or_default();
    let Scope { gpu, cluster } = scope(mods).unwrap_or(Scope { gpu: true, cluster: true });
    Order { strong: true, volatile: false, acquire, release, gpu, cluster }
}

fn operation(mods: &mut Mods<'_, '_>, written: &str) -> Result<(Update, Type), Refusal> {
    use Type::*;
    let names = ["add", "inc", "dec", "min", "max", "and", "or", "xor", "exch", "cas"];
    let name = names.into_iter().find(|name| mods.take(name));
    let name = name.ok_or_else(|| unsupported(format!("`{written}`: no operation that is known")))?;
    let noftz = mods.take("noftz");
    let ty = mods.ty()?;
    let half = matches!(ty, F16 | BF16 | F16X2 | BF16X2);
    let update = match (name, ty) {
        ("add", U32 | S32 | U64) => Update::Add,
        ("add", F32) => Update::AddF32,
        ("add", F64) => Update::AddF64,
        ("add", F16) => Update::AddF16,
        ("add", BF16) => Update::AddBf16,
        ("add", F16X2) => Update::AddF16x2,
        ("add", BF16X2) => Update::AddBf16x2,
        ("inc", U32) => Update::Inc,
        ("dec", U32) => Update::Dec,
        ("min", U32 | U64) => Update::Min,
        ("max", U32 | U64) => Update::Max,
        ("min", S32 | S64) => Update::MinSigned,
        ("max", S32 | S64) => Update::MaxSigned,
        ("and", B32 | B64) => Update::And,
        ("or", B32 | B64) => Update::Or,
        ("xor", B32 | B64) => Update::Xor,
        ("exch", B32 | B64 | B128) => Update::Exch,
        ("cas", B16 | B32 | B64 | B128) => Update::Cas,
        ("min" | "max", F16 | BF16 | F16X2 | BF16X2) => {
            return Err(unsupported(format!("`{written}`")));
        }
        _ => return Err(invalid(format!("`{written}`: no {name} of {ty}"))),
    };
    if noftz != half {
        return Err(invalid(format!("`{written}`: .noftz stands with 16-bit formats, and must")));
    }
    Ok((update, ty))
}

impl Atomic {
    fn run<T: Word>(
        &self,
        ctx: &mut Context<'_>,
        inst: &Inst,
        mask: u32,
        space: Space,
        at: &[u64; LANES],
    ) -> Result<(), Stop> {
        let step = T::BYTES as u64;
        let c = if self.update == Update::Cas { inst.src(2) } else { Reg::NONE };
        let c = values::<T>(&ctx.warp.regs, c);
        // An exchange does not read the old value's initialisation state.
        let blind = self.update == Update::Exch;
        let init = ctx.launch.checks.init;
        match space {
            Space::Global => {
                let mut span = ctx.begin_global(mask, at, &self.access)?;
                let mut rest = mask;
                while rest != 0 {
                    let part = ctx.global_part(rest, at, &span, &self.access)?;
                    for k in 0..self.n {
                        let skip = k as u64 * step;
                        let b = values::<T>(&ctx.warp.regs, inst.src(1 + k));
                        let known = if init { part.written(at, skip, step) } else { part.lanes };
                        if known != part.lanes && !blind {
                            ctx.report_undefined(part.lanes & !known, "the value that an atomic changes");
                        }
                        let mut old = [T::default(); LANES];
                        for lane in lanes(part.lanes) {
                            let offset = (part.offset(at[lane]) + skip) as usize;
                            let update = |old| self.update.apply(old, b[lane], c[lane], true);
                            old[lane] = T::update(&part.allocation.data, offset, update);
                        }
                        self.finish(
                            ctx,
                            inst.dst(k),
                            part.lanes,
                            &old,
                            if blind { known } else { part.lanes },
                        );
                    }
                    part.set_written(at, self.access.size);
                    rest &= !part.lanes;
                    span = part.rest(rest, at, self.access.size);
                }
                Ok(())
            }
            Space::Shared => {
                ctx.check_shared(mask, at, &self.access, |_, _| None)?;
                let b = values::<T>(&ctx.warp.regs, inst.src(1));
                let known = ctx.written_shared(mask, at, 0, step);
                if known != mask && !blind {
                    ctx.report_undefined(mask & !known, "the value that an atomic changes");
                }
                let mut old = [T::default(); LANES];
                for lane in lanes(mask) {
                    let shared = &mut ctx.block.shared;
                    old[lane] = shared.read(at[lane]);
                    shared.write(at[lane], self.update.apply(old[lane], b[lane], c[lane], false));
                }
                ctx.set_written_shared(mask, at, 0, step, mask);
                self.finish(ctx, inst.dst(0), mask, &old, if blind { known } else { mask });
                Ok(())
            }
            space => {
                let first = at[mask.trailing_zeros() as usize];
                let message = format!("an atomic at {first:#x} of {space} memory");
                Err(ctx.fault(ErrorKind::WrongSpace, mask, message))
            }
        }
    }

    fn finish<T: Word>(&self, ctx: &mut Context<'_>, to: Reg, mask: u32, old: &[T; LANES], known: u32) {
        match to.width {
            Width::B64 => ctx.regs().set::<u64>(to, mask, &old.map(T::wide)),
            Width::B16 | Width::B32 => ctx.regs().set::<u32>(to, mask, &old.map(T::low)),
            Width::B128 => ctx.regs().set::<u128>(to, mask, &old.map(T::full)),
            _ => return,
        }
        ctx.regs().set_defined(to, mask, known);
    }
}

impl WarpOp for Atomic {
    fn execute(&self, ctx: &mut Context<'_>, inst: &Inst, mask: u32) -> Result<(), Stop> {
        let at = ctx.addresses(mask, inst.src(0), self.offset);
        for reg in &inst.srcs()[1..] {
            ctx.need_defined(mask, *reg, "an operand of an atomic");
        }
        each_space(self.space, mask, &at, |space, mask, at| {
            if space == Space::Shared && self.n > 1 {
                let message = "a vector atomic of shared memory".to_owned();
                return Err(ctx.fault(ErrorKind::WrongSpace, mask, message));
            }
            let run = |ctx: &mut Context<'_>, mask, at: &[u64; LANES]| match self.bytes {
                2 => self.run::<u16>(ctx, inst, mask, space, at),
                4 => self.run::<u32>(ctx, inst, mask, space, at),
                8 => self.run::<u64>(ctx, inst, mask, space, at),
                _ => self.run::<u128>(ctx, inst, mask, space, at),
            };
            if space == Space::Shared {
                ctx.each_block(mask, at, self.remote, run)
            } else {
                run(ctx, mask, at)
            }
        })
    }
}
