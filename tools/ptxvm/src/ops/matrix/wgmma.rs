//! `wgmma`: products of four warps, asynchronous, whose second factor, and maybe first, lie in shared memory.
//!
//! A warpgroup is four warps in a row, the first of a number that 4 divides. Its w-th warp computes rows 16w .. 16w+15 of the 64
//! of D, so the machine lets each compute by itself: as `mma.sync` with 16 rows does, 16 or 8 columns at a time, with the same
//! sums. Then it waits for the other three, because a product is one operation of all four: whoever waits for it knows that
//! the others' parts are done, too.
//!
//! The product is computed at once, and [`Products`](crate::machine::products::Products) watches over its registers until its
//! group is waited for. What it reads of shared memory is read by the asynchronous party of the race check until then.

use super::descriptor::Descriptor;
use super::layout::{Fragment, Operand as Role, Shape};
use super::mma::{Kernels, Variant, elem, kernels};
use super::number::Elem;
use super::operands::{destinations, sources, sync_aligned, vector, whole_warp};
use super::tile::Plan;
use crate::decode::decoder::{Decoder, operands};
use crate::decode::mods::Mods;
use crate::decode::{Refusal, invalid, unsupported};
use crate::error::ErrorKind;
use crate::machine::barrier::WARPS;
use crate::machine::context::{Context, Stop};
use crate::machine::inst::{Class, Control, Convergence, Exec, Inst, WarpOp};
use crate::machine::memory::access::{Access, Span};
use crate::machine::memory::{lanes, pick};
use crate::machine::products::{Product, UNIT, Unfenced};
use crate::machine::registers::{LANES, Reg, Registers, Width};
use crate::ptx::ast::{Instruction, Operand};
use crate::types::{Space, Type};

/// Rows of D that a warp computes.
const ROWS: u8 = 16;
/// Registers of a warp's part of A.
const A_REGS: usize = 4;

pub(super) fn decode(d: &mut Decoder<'_, '_>, inst: &Instruction<'_>) -> Result<(), Refusal> {
    let mut mods = Mods::new(inst);
    let written = mods.written();
    if mods.take("mma_async") {
        return product(d, inst, mods);
    }
    let step =
        mods.one_of(&[("fence", Step::Fence), ("commit_group", Step::Commit), ("wait_group", Step::Wait(0))]);
    let Some(mut step) = step else { return Err(unsupported(format!("`{written}`"))) };
    sync_aligned(&mut mods)?;
    mods.finish()?;
    if let Step::Wait(leave) = &mut step {
        let [Operand::Integer(n)] = operands(inst)? else {
            return Err(invalid(format!("`{written}` takes a number")));
        };
        *leave = usize::try_from(*n).unwrap_or(usize::MAX);
    } else {
        operands::<0>(inst)?;
    }
    let inst = d.warp(step, Class::Sync, &[], &[]);
    inst.convergence = Convergence::All;
    inst.watched = true;
    Ok(())
}

/// `setmaxnreg`: registers are not assigned here, so it is looked at and changes nothing.
pub(super) fn decode_registers(d: &mut Decoder<'_, '_>, inst: &Instruction<'_>) -> Result<(), Refusal> {
    let mut mods = Mods::new(inst);
    let written = mods.written();
    if mods.one_of(&[("inc", ()), ("dec", ())]).is_none() {
        return Err(invalid(format!("`{written}` without .inc or .dec")));
    }
    sync_aligned(&mut mods)?;
    if mods.ty()? != Type::U32 {
        return Err(invalid(format!("`{written}`: its type is .u32")));
    }
    mods.finish()?;
    match operands(inst)? {
        [Operand::Integer(24..=256)] if matches!(inst.operands[0], Operand::Integer(n) if n % 8 == 0) => {}
        _ => return Err(invalid(format!("`{written}` takes a number from 24 to 256 that 8 divides"))),
    }
    d.warp(Step::Registers, Class::Sync, &[], &[]).convergence = Convergence::All;
    Ok(())
}

/// A factor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Factor {
    /// In registers.
    Registers,
    /// In shared memory; K-major, or with `true` MN-major.
    Shared(bool),
}

/// `wgmma.mma_async`. Destinations: D. Sources: A's registers or descriptor, B's descriptor, whether D is added.
#[derive(Debug)]
struct ProductOp {
    n: usize,
    a: Factor,
    /// Whether B is MN-major.
    b_mn_major: bool,
    /// Bits that negate the elements of a register of A, and of B.
    negate: [u32; 2],
    /// Whether the predicate counts if it is false.
    not: bool,
    kernels: Kernels,
    plan: Plan,
    /// Sixteen rows and as many columns as are computed at a time, in registers of its own: A, B, C, D.
    part: Inst,
}

fn product(d: &mut Decoder<'_, '_>, inst: &Instruction<'_>, mut mods: Mods<'_, '_>) -> Result<(), Refusal> {
    let written = mods.written();
    if mods.take("sp") {
        return Err(unsupported(format!("`{written}`: products with sparse factors")));
    }
    sync_aligned(&mut mods)?;
    let shape = mods.any().unwrap_or_default();
    let numbers = || {
        let (m, rest) = shape.strip_prefix('m')?.split_once('n')?;
        let (n, k) = rest.split_once('k')?;
        Some((m.parse::<u8>().ok()?, n.parse::<u16>().ok()?, k.parse::<u16>().ok()?))
    };
    let Some((64, n, k)) = numbers() else {
        return Err(invalid(format!("`{written}`: the shape is m64n..k..")));
    };
    let satfinite = mods.take("satfinite");
    let [to, a, b] = [elem(&mut mods)?, elem(&mut mods)?, elem(&mut mods)?];
    let binary = mods.take("and") && mods.take("popc");
    mods.finish()?;
    let (depth, integer) = match a {
        Elem::F16 | Elem::Bf16 => (16, false),
        Elem::Tf32 => (8, false),
        Elem::E4m3 | Elem::E5m2 => (32, false),
        Elem::S8 | Elem::U8 => (32, true),
        Elem::B1 => (256, true),
        _ => (0, false),
    };
    // Integers have the even ones of the larger widths alone.
    let width = n % 8 == 0 && (8..=256).contains(&n) && !(integer && n > 32 && n % 16 != 0);
    if k != depth || !width || binary != (a == Elem::B1) || satfinite && !integer {
        return Err(unsupported(format!("`{written}`: this combination of shape and types")));
    }
    let columns = if n % 16 == 0 { 16 } else { 8 };
    let part = Shape { m: ROWS, n: columns, k };
    let variant = Variant { shape: part, a, b, c: to, d: to, satfinite, xor: false };
    let kernels = kernels(d.isa, variant)
        .ok_or_else(|| unsupported(format!("`{written}`: this combination of types")))?;

    let [d_op, a_op, b_op, scale, rest @ ..] = inst.operands.as_slice() else {
        return Err(invalid(format!("`{written}` takes at least four operands")));
    };
    let in_registers = matches!(a_op, Operand::Vector(_));
    let half = matches!(a, Elem::F16 | Elem::Bf16);
    // Scales of A and B for floats; of 16 bits, for each factor in shared memory, whether it is MN-major.
    let scales = if integer { 0 } else { 2 };
    let majors = usize::from(half) * (2 - usize::from(in_registers));
    if rest.len() != scales + majors {
        let message = format!(
            "`{written}` takes {} operands here, {} are given",
            4 + scales + majors,
            inst.operands.len()
        );
        return Err(invalid(message));
    }
    let (scales, majors) = rest.split_at(scales);
    let sign = match a.bits() {
        32 => 0x8000_0000,
        16 => 0x8000_8000,
        _ => 0x8080_8080,
    };
    let negate = |op: Option<&Operand<'_>>| match op {
        None | Some(Operand::Integer(1)) => Ok(0),
        Some(Operand::Integer(n)) if *n as i64 == -1 || *n == 0xffff_ffff => Ok(sign),
        _ => Err(invalid(format!("`{written}`: a factor's scale is 1 or -1"))),
    };
    let mn_major = |op: Option<&Operand<'_>>| match op {
        None | Some(Operand::Integer(0)) => Ok(false),
        Some(Operand::Integer(1)) => Ok(true),
        _ => Err(invalid(format!("`{written}`: transposition is 0 or 1"))),
    };
    let negate = [negate(scales.first())?, negate(scales.get(1))?];
    let a_factor = if in_registers { Factor::Registers } else { Factor::Shared(mn_major(majors.first())?) };
    let b_mn_major = mn_major(majors.last())?;

    let fragment = |operand, elem: Elem| Fragment { operand, shape: part, elements: elem.per_register() };
    let accumulator = fragment(Role::C, to);
    let parts = [fragment(Role::A, a), fragment(Role::B, b), accumulator, accumulator];
    let (b_regs, each) = (usize::from(parts[1].registers()), usize::from(accumulator.registers()));
    let plan = Plan { parts, b_at: A_REGS, c_at: A_REGS + b_regs };
    let row = |slot: usize| Reg { width: Width::B32, slot: slot as u32 };
    let all: Vec<Reg> = (0..A_REGS + b_regs + 2 * each).map(row).collect();
    let (from, into) = all.split_at(A_REGS + b_regs + each);
    let part = Inst::new(Exec::Control(Control::Yield), Class::Mma, into, from, 0);

    let count = usize::from(n / u16::from(columns)) * each;
    let dsts = destinations(d, vector(d_op, count, "D")?, Type::B32)?;
    let mut srcs = Vec::new();
    if in_registers {
        sources(d, vector(a_op, A_REGS, "A")?, Type::B32, &mut srcs)?;
    } else {
        srcs.push(d.src(a_op, Type::B64)?);
    }
    srcs.push(d.src(b_op, Type::B64)?);
    let (scale, not) = d.pred(scale)?;
    srcs.push(scale);
    d.note_access(Space::Shared, UNIT as u32, false);
    d.asynchronous = true;
    let op = ProductOp { n: usize::from(n), a: a_factor, b_mn_major, negate, not, kernels, plan, part };
    let inst = d.warp(op, Class::Mma, &dsts, &srcs);
    inst.convergence = Convergence::All;
    inst.watched = true;
    inst.flops = 2 * u32::from(ROWS) * u32::from(n) * u32::from(k);
    d.emit(Exec::Control(Control::Warpgroup), Class::Mma, &[], &[]);
    Ok(())
}

// ------------------------------------------------------------------------------------------------ factors

/// The words of four registers of a fragment, and the lanes in which they are defined.
type Words = ([[u32; LANES]; 4], [u32; 4]);

/// Eight rows of A or columns of B, and the units or depths of them.
#[derive(Clone, Copy, Debug)]
struct Piece {
    /// In rows.
    row: u64,
    /// The first or second half of the depth.
    half: u64,
}

impl ProductOp {
    /// Reads up to four registers' worth from shared memory; notes their units' addresses.
    fn read(
        &self,
        ctx: &mut Context<'_>,
        matrix: &Descriptor,
        mn_major: bool,
        pieces: &[Piece],
        units: &mut Vec<u64>,
    ) -> Result<Words, Stop> {
        let mut at = [0; LANES];
        for (i, piece) in pieces.iter().enumerate() {
            for j in 0..8 {
                at[8 * i + j as usize] = match mn_major {
                    false => matrix.k_major(piece.row + j, piece.half),
                    true => matrix.mn_major(piece.row / 8, 8 * piece.half + j),
                };
            }
        }
        let mask = (u64::MAX >> (64 - 8 * pieces.len())) as u32;
        let have = ctx.block.shared.len();
        let beyond = pick(mask, |lane| at[lane] + UNIT > have);
        if beyond != 0 {
            let first = at[beyond.trailing_zeros() as usize];
            let message = format!(
                "the matrix descriptor leads to {first:#x}; shared memory of the block has {have} bytes"
            );
            return Err(ctx.fault(ErrorKind::OutOfBounds, u32::MAX, message));
        }
        if ctx.launch.variables.len() > 1 {
            ctx.in_variables(mask, &at, &Span::of(mask, &at, UNIT), UNIT)?;
        }
        ctx.meets_mbarrier(mask, &at, UNIT);
        if ctx.launch.checks.race
            && !ctx.race_shared(mask, &at, &Access::read(UNIT as u32), false, |_, _| None)
        {
            ctx.needs_proxy_fence(mask, &at);
        }
        if ctx.launch.checks.race {
            units.extend(lanes(mask).map(|lane| at[lane]));
        }
        let mut words = [[0; LANES]; 4];
        let mut defined = [0; 4];
        for i in 0..pieces.len() {
            let rows: [u128; 8] = std::array::from_fn(|j| ctx.block.shared.read(at[8 * i + j]));
            if !mn_major {
                // A row is the words of four neighbouring lanes.
                words[i] = bytemuck::cast(rows.map(u128::to_le));
            } else {
                for lane in 0..LANES {
                    let (g, t) = (lane / 4, lane % 4);
                    let half = |k: usize| (rows[k] >> (16 * g)) as u32 & 0xffff;
                    words[i][lane] = half(2 * t) | half(2 * t + 1) << 16;
                }
            }
            let whole = ctx.written_shared(0xff << (8 * i), &at, 0, UNIT) >> (8 * i);
            defined[i] = match (whole & 0xff, mn_major) {
                (0xff, _) => u32::MAX,
                // A unit is all of a row's words, or an element of all.
                (whole, false) => pick(u32::MAX, |lane| whole >> (lane / 4) & 1 != 0),
                (whole, true) => pick(u32::MAX, |lane| whole >> (lane % 4 * 2) & 3 == 3),
            };
        }
        Ok((words, defined))
    }

    /// A descriptor, which all lanes must have.
    fn descriptor(&self, ctx: &mut Context<'_>, reg: Reg) -> Result<Descriptor, Stop> {
        ctx.need_defined(u32::MAX, reg, "a matrix descriptor");
        let bits = *ctx.regs().get::<u64>(reg);
        let other = pick(u32::MAX, |lane| bits[lane] != bits[0]);
        if other != 0 {
            let message = "the lanes have different matrix descriptors".to_owned();
            return Err(ctx.fault(ErrorKind::Wgmma, other, message));
        }
        Descriptor::read(bits[0]).map_err(|message| ctx.fault(ErrorKind::Unsupported, u32::MAX, message))
    }

    /// Whether D is added to the product.
    fn accumulates(&self, ctx: &mut Context<'_>, reg: Reg) -> Result<bool, Stop> {
        ctx.need_defined(u32::MAX, reg, "the predicate of whether D is added");
        match ctx.regs().pred(reg) ^ if self.not { u32::MAX } else { 0 } {
            0 => Ok(false),
            u32::MAX => Ok(true),
            some => Err(ctx.fault(
                ErrorKind::Wgmma,
                some,
                "D is added in these lanes, and not in others".to_owned(),
            )),
        }
    }
}

impl WarpOp for ProductOp {
    fn execute(&self, ctx: &mut Context<'_>, inst: &Inst, mask: u32) -> Result<(), Stop> {
        whole_warp(ctx, mask)?;
        let warp = ctx.warp.id;
        if warp / WARPS * WARPS + WARPS > ctx.block.warps {
            let message = format!("warp {warp} has no warpgroup: the block has {} warps", ctx.block.warps);
            return Err(ctx.fault(ErrorKind::Wgmma, mask, message));
        }
        let in_registers = self.a == Factor::Registers;
        let [b_at, scale_at] = if in_registers { [A_REGS, A_REGS + 1] } else { [1, 2] };
        let adds = self.accumulates(ctx, inst.src(scale_at))?;
        let b = self.descriptor(ctx, inst.src(b_at))?;

        let base = ctx.warp.frame().base;
        let rows =
            |regs: &[Reg]| regs.iter().filter(|r| r.is_some()).map(|r| base + r.slot).collect::<Vec<_>>();
        let accumulators = ctx.warp.products.list(&rows(&inst.regs[..usize::from(inst.dsts)]));
        let factors = if in_registers { rows(&inst.srcs()[..A_REGS]) } else { Vec::new() };
        let number = ctx.warp.products.issued;
        let mut product = Product { number, pc: ctx.pc, accumulators, factors, units: Vec::new() };
        self.check(ctx, &product);

        let first = u64::from(warp % WARPS) * u64::from(ROWS);
        let (mut a_words, a_defined) = match self.a {
            Factor::Registers => {
                let regs = ctx.regs();
                let of = |i: usize| (*regs.get::<u32>(inst.src(i)), regs.defined(inst.src(i)));
                let all: [_; A_REGS] = std::array::from_fn(of);
                (all.map(|(words, _)| words), all.map(|(_, defined)| defined))
            }
            Factor::Shared(mn_major) => {
                let a = self.descriptor(ctx, inst.src(0))?;
                // The order of an A fragment's registers: rows before depth.
                let piece = |i: u64| Piece { row: first + 8 * (i % 2), half: i / 2 };
                self.read(ctx, &a, mn_major, &[0, 1, 2, 3].map(piece), &mut product.units)?
            }
        };
        a_words.as_flattened_mut().iter_mut().for_each(|word| *word ^= self.negate[0]);

        let mut scratch = std::mem::take(&mut ctx.warp.products.scratch);
        scratch.reserve(self.part.regs.len(), 0);
        for i in 0..A_REGS {
            put(&mut scratch, self.part.src(i), &a_words[i], a_defined[i]);
        }
        let (each, c_at) = (usize::from(self.part.dsts), self.plan.c_at);
        let columns = usize::from(self.plan.parts[1].shape.n);
        let kernel = self.kernels.of(ctx.launch.mma);
        if !adds {
            (0..each).for_each(|i| put(&mut scratch, self.part.src(c_at + i), &[0; LANES], u32::MAX));
        }
        for block in 0..self.n / columns {
            // The order of a B fragment's registers: depth before columns.
            let piece = |i: usize| Piece { row: (block * columns + i / 2 * 8) as u64, half: i as u64 % 2 };
            let pieces = &[0, 1, 2, 3].map(piece)[..c_at - A_REGS];
            let (b_words, b_defined) = self.read(ctx, &b, self.b_mn_major, pieces, &mut product.units)?;
            for i in 0..pieces.len() {
                let words = b_words[i].map(|word| word ^ self.negate[1]);
                put(&mut scratch, self.part.src(A_REGS + i), &words, b_defined[i]);
            }
            let d = &inst.regs[block * each..][..each];
            let mut whole =
                a_defined.iter().chain(&b_defined[..pieces.len()]).all(|lanes| *lanes == u32::MAX);
            if adds {
                for (i, from) in d.iter().enumerate() {
                    let (words, defined) = (ctx.warp.regs.get::<u32>(*from), ctx.warp.regs.defined(*from));
                    whole &= defined == u32::MAX;
                    put(&mut scratch, self.part.src(c_at + i), words, defined);
                }
            }
            kernel(&self.plan, &mut scratch, &self.part);
            if !whole {
                self.plan.define(&mut scratch, &self.part);
            }
            for (i, to) in d.iter().enumerate() {
                let from = self.part.dst(i);
                put(
                    ctx.regs(),
                    *to,
                    scratch.get::<u32>(from),
                    if whole { u32::MAX } else { scratch.defined(from) },
                );
            }
        }
        ctx.warp.products.scratch = scratch;
        ctx.block.work.mma_flops += u64::from(inst.flops);
        ctx.begin_product(product);
        Ok(())
    }
}

impl ProductOp {
    /// Whether its registers are ordered, and free.
    fn check(&self, ctx: &mut Context<'_>, product: &Product) {
        let rows: Vec<u32> = product.accumulators.iter().chain(&product.factors).copied().collect();
        if let Some(why) = ctx.warp.products.unfenced(&rows, &ctx.warp.regs) {
            ctx.finding(ErrorKind::Wgmma, u32::MAX, None, || {
                match why {
                    Unfenced::Never => "there was no wgmma.fence before the warp's first product",
                    Unfenced::Written => "its registers were written since the last wgmma.fence",
                }
                .to_owned()
            });
        }
        if let Some((misuse, pc)) = ctx.warp.products.collision(product) {
            ctx.misused(misuse, pc);
        }
    }
}

/// Writes a register, and in which lanes it is defined.
#[inline(always)]
fn put(regs: &mut Registers, reg: Reg, words: &[u32; LANES], defined: u32) {
    regs.set::<u32>(reg, u32::MAX, words);
    regs.set_defined(reg, u32::MAX, defined);
}

// ------------------------------------------------------------------------------------------------ fences and groups

/// `wgmma.fence`, `wgmma.commit_group`, `wgmma.wait_group` with the number of groups that it leaves, and `setmaxnreg`.
#[derive(Clone, Copy, Debug)]
enum Step {
    Fence,
    Commit,
    Wait(usize),
    Registers,
}

impl WarpOp for Step {
    fn execute(&self, ctx: &mut Context<'_>, _inst: &Inst, mask: u32) -> Result<(), Stop> {
        whole_warp(ctx, mask)?;
        match self {
            Self::Fence => ctx.warp.products.fence(),
            Self::Commit => ctx.warp.products.commit(),
            Self::Registers => {}
            Self::Wait(leave) => {
                let done = ctx.warp.products.wait(*leave, &ctx.warp.regs);
                for product in done {
                    ctx.end_product(product);
                }
            }
        }
        Ok(())
    }
}
