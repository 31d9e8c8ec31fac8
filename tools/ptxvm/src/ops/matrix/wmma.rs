//! wmma.load, wmma.store and wmma.mma.
//!
//! The ISA leaves the layout of fragments open; here it is that of [`super::layout`], whatever the layout in memory. A
//! load or store becomes an instruction that computes addresses and then plain `ld` or `st` for each register, as on
//! hardware, so that their checks and counters are those of any other access. (A kernel that loads a factor as `.row`
//! and multiplies it as `.col` is wrong by the ISA, and is not found out.)

use super::layout::{Fragment, Operand as Role, Shape};
use super::mma::{self, Variant, by_rows, elem, take_shape};
use super::number::Elem;
use super::operands::{sync_aligned, vector, whole_warp};
use crate::decode::decoder::{AddressOperand, Decoder, operands};
use crate::decode::mods::Mods;
use crate::decode::{Refusal, invalid, unsupported};
use crate::machine::context::{Context, Stop};
use crate::machine::inst::{Class, Convergence, Inst, WarpOp};
use crate::machine::registers::{LANES, Reg, Registers, Width};
use crate::ops::memory;
use crate::ptx::ast::{Address, Instruction, Operand, Register};
use crate::types::{Space, Type};

pub(super) fn decode(d: &mut Decoder<'_, '_>, inst: &Instruction<'_>) -> Result<(), Refusal> {
    match inst.modifiers.first().copied() {
        Some("mma") => decode_mma(d, inst),
        Some("load") => access(d, inst, false),
        Some("store") => access(d, inst, true),
        _ => Err(invalid(format!("`{}`: wmma has load, store and mma", Mods::new(inst).written()))),
    }
}

/// Whether `wmma` has factors of this type in this shape.
fn known(shape: Shape, factor: Elem) -> bool {
    let Shape { m, n, k } = shape;
    let large = matches!((m, n, k), (16, 16, 16) | (8, 32, 16) | (32, 8, 16));
    match factor {
        Elem::F16 | Elem::Bf16 | Elem::S8 | Elem::U8 => large,
        Elem::Tf32 => (m, n, k) == (16, 16, 8),
        Elem::F64 => (m, n, k) == (8, 8, 4),
        Elem::S4 | Elem::U4 => (m, n, k) == (8, 8, 32),
        Elem::B1 => (m, n, k) == (8, 8, 128),
        Elem::F32 | Elem::S32 | Elem::E4m3 | Elem::E5m2 => false,
    }
}

/// Registers of a factor's fragment: f16 ones always have eight, those that are not needed hold copies.
fn least_registers(factor: Elem) -> usize {
    if factor == Elem::F16 { 8 } else { 1 }
}

fn decode_mma(d: &mut Decoder<'_, '_>, inst: &Instruction<'_>) -> Result<(), Refusal> {
    let mut mods = Mods::new(inst);
    mods.take("mma");
    let op = mods.one_of(&[("xor", true), ("and", false)]);
    let popc = mods.take("popc");
    sync_aligned(&mut mods)?;
    let layouts = (by_rows(&mut mods)?, by_rows(&mut mods)?);
    let shape = take_shape(&mut mods)?;
    let rounding = mods.take("rn");
    let satfinite = mods.take("satfinite");
    let mut types = vec![elem(&mut mods)?, elem(&mut mods)?];
    while let Some(next) = mods.one_of(&Elem::NAMES) {
        types.push(next);
    }
    let written = mods.written();
    mods.finish()?;
    let refuse = || unsupported(format!("`{written}`: this combination of shape and types"));
    // For f16 only the types of D and C are written.
    let [to, a, b, from] = match types[..] {
        [to, from] => [to, Elem::F16, Elem::F16, from],
        [to, a, b, from] => [to, a, b, from],
        _ => return Err(refuse()),
    };
    if (a == Elem::F16) != (types.len() == 2) || a != b || !known(shape, a) {
        return Err(refuse());
    }
    if (a == Elem::B1) != (op.is_some() && popc) || (a != Elem::B1 && (op.is_some() || popc)) {
        return Err(invalid(format!("`{written}`: .xor.popc or .and.popc belongs to .b1 and must be there")));
    }
    if rounding && a != Elem::F64 {
        return Err(invalid(format!("`{written}`: a rounding belongs to .f64")));
    }
    if a.bits() < 8 && layouts != (true, false) {
        return Err(invalid(format!("`{written}`: A must be .row and B .col with these types")));
    }
    let variant = Variant { shape, a, b, c: from, d: to, satfinite, xor: op == Some(true) };
    let kernels = mma::kernels(d.isa, variant).ok_or_else(refuse)?;
    mma::emit(d, inst, variant, kernels, least_registers(a))
}

// ------------------------------------------------------------------------------------------------ loads and stores

/// Names of the registers that the pieces of an access need: no register of a program can have them.
const ADDRESS: &str = "wmma.address";
const PARTS: [&str; 4] = ["wmma.part.a", "wmma.part.b", "wmma.part.c", "wmma.part.d"];

fn access(d: &mut Decoder<'_, '_>, inst: &Instruction<'_>, store: bool) -> Result<(), Refusal> {
    let mut mods = Mods::new(inst);
    mods.take(if store { "store" } else { "load" });
    let roles: &[_] =
        if store { &[("d", Role::C)] } else { &[("a", Role::A), ("b", Role::B), ("c", Role::C)] };
    let Some(role) = mods.one_of(roles) else {
        return Err(invalid(format!("`{}` names no matrix", mods.written())));
    };
    sync_aligned(&mut mods)?;
    let rows = by_rows(&mut mods)?;
    let shape = take_shape(&mut mods)?;
    let space = mods.one_of(&[("global", "global"), ("shared", "shared"), ("shared::cta", "shared")]);
    let elem = elem(&mut mods)?;
    let written = mods.written();
    mods.finish()?;

    let of = |factors: &[Elem]| factors.iter().any(|factor| known(shape, *factor));
    let fits = match (role, elem) {
        (Role::C, Elem::F16) => of(&[Elem::F16]),
        (Role::C, Elem::F32) => of(&[Elem::F16, Elem::Tf32]),
        (Role::C, Elem::S32) => of(&[Elem::S8, Elem::S4, Elem::B1]),
        (Role::C, Elem::F64) => of(&[Elem::F64]),
        (Role::C, _) => false,
        (Role::A | Role::B, _) => known(shape, elem),
    };
    if !fits {
        return Err(unsupported(format!("`{written}`: this combination of shape and type")));
    }
    if elem.bits() < 8 && rows != (role == Role::A) {
        return Err(invalid(format!("`{written}`: A must be .row and B .col with these types")));
    }

    let (list, stride) = match inst.operands.len() {
        2 => (operands::<2>(inst)?.as_slice(), None),
        _ => {
            let [first, second, stride] = operands::<3>(inst)?;
            let _ = (first, second);
            (&inst.operands[..2], Some(stride))
        }
    };
    let (address, regs) = if store { (&list[0], &list[1]) } else { (&list[1], &list[0]) };
    let fragment = Fragment { operand: role, shape, elements: elem.per_register() };
    let distinct = usize::from(fragment.registers());
    let least = if role == Role::C { 1 } else { least_registers(elem) };
    let regs = vector(regs, distinct.max(least), "the fragment")?;

    // Base and stride, kept apart from the program's registers, which a load may overwrite.
    let AddressOperand { base, offset } =
        d.address(address, space.and_then(Space::from_name).unwrap_or(Space::Generic))?;
    let stride = match stride {
        Some(op) => d.src(op, Type::U32)?,
        None => {
            let (r, c) = match role {
                Role::A => (u64::from(shape.m), u64::from(shape.k)),
                Role::B => (u64::from(shape.k), u64::from(shape.n)),
                Role::C => (u64::from(shape.m), u64::from(shape.n)),
            };
            d.constant(Width::B32, if rows { c } else { r })
        }
    };
    let start = [d.temp(Width::B64), d.temp(Width::B64)];
    d.warp(Begin { offset }, Class::Integer, &start, &[base, stride]).convergence = Convergence::All;

    d.open_scope();
    let done = pieces(d, inst, &Piece { fragment, elem, rows, store, space, start }, &regs[..distinct]);
    d.close_scope();
    done?;
    for (i, copy) in regs.iter().enumerate().skip(distinct) {
        let (to, from) = (d.dst(copy, Type::B32)?, d.src(&regs[i % distinct], Type::B32)?);
        d.lane(pack, Class::Integer, &[to], &[from], 32);
    }
    Ok(())
}

/// Type, space and layout, which all accesses of one instruction share.
struct Piece {
    fragment: Fragment,
    elem: Elem,
    /// Whether the matrix lies in memory by rows.
    rows: bool,
    store: bool,
    space: Option<&'static str>,
    /// Base address, and stride in elements.
    start: [Reg; 2],
}

fn pieces(
    d: &mut Decoder<'_, '_>,
    inst: &Instruction<'_>,
    p: &Piece,
    regs: &[Operand<'_>],
) -> Result<(), Refusal> {
    for (name, ty) in [(ADDRESS, Type::B64)].into_iter().chain(PARTS.map(|name| (name, Type::B16))) {
        d.declare_registers(&Register { ty, vector: 1, name, count: None, line: inst.line })?;
    }
    let bits = p.elem.bits();
    let per_register = usize::from(p.fragment.elements);
    // The step from one element to the next of a register (of a pair of registers in C) goes along the rows, except in B.
    let contiguous = p.rows != (p.fragment.operand == Role::B);
    if p.fragment.operand == Role::C && per_register == 1 && contiguous {
        for (i, pair) in regs.chunks_exact(2).enumerate() {
            address(d, p, 2 * i as u8, 0)?;
            memory_access(
                d,
                inst,
                p,
                &["v2", if bits == 64 { "b64" } else { "b32" }],
                Operand::Vector(pair.to_vec()),
            )?;
        }
        return Ok(());
    }
    for (i, reg) in regs.iter().enumerate() {
        if per_register == 1 || contiguous {
            address(d, p, i as u8, 0)?;
            memory_access(d, inst, p, &[if bits == 64 { "b64" } else { "b32" }], reg.clone())?;
            continue;
        }
        let parts = &PARTS[..per_register];
        let piece = [if bits == 16 { "b16" } else { "b8" }];
        let whole = if p.store { d.src(reg, Type::B32)? } else { d.dst(reg, Type::B32)? };
        let mut halves = Vec::new();
        for (sub, name) in parts.iter().enumerate() {
            let part = d.register(name)?.0;
            if p.store {
                d.lane(unpack, Class::Integer, &[part], &[whole], u64::from(bits) << 8 | sub as u64);
            }
            address(d, p, i as u8, sub as u8)?;
            memory_access(d, inst, p, &piece, Operand::Name(name, 0))?;
            halves.push(part);
        }
        if !p.store {
            d.lane(pack, Class::Integer, &[whole], &halves, u64::from(bits));
        }
    }
    Ok(())
}

/// Computes where lanes find an element of a register.
fn address(d: &mut Decoder<'_, '_>, p: &Piece, reg: u8, sub: u8) -> Result<(), Refusal> {
    let origin = p.fragment.origin(reg, sub);
    let (major, minor) = if p.rows { (0, 1) } else { (1, 0) };
    // Six bytes of coefficients, then the element's bits: all fit, no index of a matrix goes beyond 128.
    let coefficients = [
        origin.at[major],
        origin.by_g[major],
        origin.by_t[major],
        origin.at[minor],
        origin.by_g[minor],
        origin.by_t[minor],
        p.elem.bits() as u8,
        0,
    ];
    let to = d.register(ADDRESS)?.0;
    d.lane(element_address, Class::Integer, &[to], &p.start, u64::from_le_bytes(coefficients));
    Ok(())
}

/// base + (major * stride + minor) * bits / 8, with the indices of a lane as `imm` gives them.
fn element_address(regs: &mut Registers, inst: &Inst, mask: u32) {
    let [major, major_g, major_t, minor, minor_g, minor_t, bits, _] = inst.imm.to_le_bytes().map(u64::from);
    let base = regs.get::<u64>(inst.src(0));
    let stride = regs.get::<u64>(inst.src(1));
    let mut at = [0; LANES];
    for lane in 0..LANES {
        let (g, t) = (lane as u64 / 4, lane as u64 % 4);
        let index = (major + g * major_g + t * major_t) * stride[lane] + minor + g * minor_g + t * minor_t;
        at[lane] = base[lane].wrapping_add(index * bits / 8);
    }
    regs.set::<u64>(inst.dst(0), mask, &at);
}

/// `ld` or `st` at the computed address.
fn memory_access(
    d: &mut Decoder<'_, '_>,
    inst: &Instruction<'_>,
    p: &Piece,
    types: &[&'static str],
    value: Operand<'_>,
) -> Result<(), Refusal> {
    let at = Operand::Address(Box::new(Address { base: Some(ADDRESS), offset: 0, rest: Vec::new() }));
    let access = Instruction {
        line: inst.line,
        loc: inst.loc,
        guard: None,
        opcode: if p.store { "st" } else { "ld" },
        modifiers: p.space.iter().chain(types).copied().collect(),
        operands: if p.store { vec![at, value] } else { vec![value, at] },
    };
    memory::decode(d, &access)
}

/// Joins the sources, `imm` bits each, the first lowest.
fn pack(regs: &mut Registers, inst: &Inst, mask: u32) {
    let mut whole = [0u32; LANES];
    for (i, part) in inst.srcs().iter().enumerate() {
        let part = regs.get::<u32>(*part);
        for lane in 0..LANES {
            whole[lane] |= part[lane] << (inst.imm as usize * i);
        }
    }
    regs.set::<u32>(inst.dst(0), mask, &whole);
}

/// Cuts out the part of the index in `imm`'s low byte; the byte above is its width, 8 or 16.
fn unpack(regs: &mut Registers, inst: &Inst, mask: u32) {
    let [sub, bits] = [inst.imm as u32 & 0xff, inst.imm as u32 >> 8];
    let whole = regs.get::<u32>(inst.src(0));
    let mut part = [0; LANES];
    for lane in 0..LANES {
        part[lane] = whole[lane] >> (bits * sub) & ((1 << bits) - 1);
    }
    regs.set::<u32>(inst.dst(0), mask, &part);
}

/// Starts an access: waits for the whole warp, and computes base address and stride as 64-bit numbers.
#[derive(Debug)]
struct Begin {
    offset: i64,
}

impl WarpOp for Begin {
    fn execute(&self, ctx: &mut Context<'_>, inst: &Inst, mask: u32) -> Result<(), Stop> {
        whole_warp(ctx, mask)?;
        let at = ctx.addresses(mask, inst.src(0), self.offset);
        ctx.need_defined(mask, inst.src(1), "the stride");
        let regs = ctx.regs();
        let narrow = regs.get::<u32>(inst.src(1));
        let mut stride = [0; LANES];
        for lane in 0..LANES {
            stride[lane] = u64::from(narrow[lane]);
        }
        regs.set::<u64>(inst.dst(0), mask, &at);
        regs.set::<u64>(inst.dst(1), mask, &stride);
        // What was never written has been reported.
        regs.set_defined(inst.dst(0), mask, u32::MAX);
        regs.set_defined(inst.dst(1), mask, u32::MAX);
        Ok(())
    }
}
