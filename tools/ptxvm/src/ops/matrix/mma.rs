//! mma.sync and wmma.mma: D = A B + C.
//!
//! # Arithmetic
//! By default ([`MmaOrder::Chain`]) each element of D is a chain of fused operations in a fixed order: `acc = c`, then
//! for k = 0, 1, 2, ... `acc = fma(a[k], b[k], acc)`.
//! - f16, bf16, tf32 and 8-bit floats: the chain is in f32, with subnormals. tf32 factors are the upper 19 bits of
//!   their registers. With f16 accumulators C is widened, the chain is in f32, and the end is rounded once.
//! - f64: the chain is in f64.
//! - Integers: exact modulo 2^32, or with `.satfinite` the exact sum clamped to s32.
//!
//! Hardware gives the same integers. Its f64 products are fused chains too, in an order that NVIDIA does not document.
//! Its other floats differ in the last bits: it adds groups of 4, 8 or 16 products and the accumulator at once, after
//! aligning them to the largest exponent and cutting off what lies beyond a few extra bits, and rounds by truncation.
//! [`MmaOrder::Ampere`] and [`MmaOrder::Hopper`] do that too, for f16, bf16 and tf32 with accumulators of f32: [`grouped`]
//! has the model and its sources. f16 accumulators and 8-bit floats, whose sums hardware keeps in fewer bits still, and
//! the old `m8n8k4` are chains in every order.
//! The relative error of either against exact sums is bounded by some 2^-23 times the sum of the |a b| and |c| for
//! each group; code that needs the same bits on both has inputs whose sums are exact (small integers, powers of two).
//!
//! An element of D is defined where its row of A, its column of B and its own C are: kernels compute padding rows that
//! they never store.

use super::grouped::{self, Ampere, Hopper};
use super::layout::{Fragment, Operand as Role, Shape, quad};
use super::number::{
    Bf16, Bits, Doubles, E4m3, E5m2, Elem, F16, Floats, Ints, Product, S4, S8, Tf32, U4, U8,
};
use super::number::{f16_to_f32, f32_to_f16};
use super::operands::{destinations, sources, sync_aligned, vector, whole_warp};
use super::tile::{Kernel, Plan, Tile, TileF16, TileF32, TileF64, TileS32, TileSat, left, right};
#[cfg(target_arch = "x86_64")]
use super::vectors::Avx2;
use super::vectors::{Plain, Vectors};
use crate::decode::decoder::{Decoder, operands};
use crate::decode::mods::Mods;
use crate::decode::{Refusal, invalid, unsupported};
use crate::machine::context::{Context, Stop};
use crate::machine::inst::{Class, Convergence, Inst, WarpOp};
use crate::machine::isa::Isa;
use crate::machine::options::MmaOrder;
use crate::machine::registers::{LANES, Registers, Value};
use crate::ptx::ast::Instruction;
use crate::types::Type;

/// Shape and element types of a product, from the modifiers.
#[derive(Clone, Copy, Debug)]
pub(super) struct Variant {
    pub(super) shape: Shape,
    pub(super) a: Elem,
    pub(super) b: Elem,
    pub(super) c: Elem,
    pub(super) d: Elem,
    pub(super) satfinite: bool,
    /// For b1: xor, not and.
    pub(super) xor: bool,
}

const fn shape(m: u8, n: u8, k: u16) -> Shape {
    Shape { m, n, k }
}

pub(super) const SHAPES: [(&str, Shape); 16] = [
    ("m8n8k4", shape(8, 8, 4)),
    ("m8n8k16", shape(8, 8, 16)),
    ("m8n8k32", shape(8, 8, 32)),
    ("m8n8k128", shape(8, 8, 128)),
    ("m16n8k4", shape(16, 8, 4)),
    ("m16n8k8", shape(16, 8, 8)),
    ("m16n8k16", shape(16, 8, 16)),
    ("m16n8k32", shape(16, 8, 32)),
    ("m16n8k64", shape(16, 8, 64)),
    ("m16n8k128", shape(16, 8, 128)),
    ("m16n8k256", shape(16, 8, 256)),
    ("m16n16k8", shape(16, 16, 8)),
    ("m16n16k16", shape(16, 16, 16)),
    ("m8n32k16", shape(8, 32, 16)),
    ("m32n8k16", shape(32, 8, 16)),
    ("m8n8k64", shape(8, 8, 64)),
];

/// Takes the next element type.
pub(super) fn elem(mods: &mut Mods<'_, '_>) -> Result<Elem, Refusal> {
    mods.one_of(&Elem::NAMES).ok_or_else(|| unsupported(format!("the element types of `{}`", mods.written())))
}

/// Takes `.row` or `.col`: whether it is `.row`.
pub(super) fn by_rows(mods: &mut Mods<'_, '_>) -> Result<bool, Refusal> {
    mods.one_of(&[("row", true), ("col", false)])
        .ok_or_else(|| invalid(format!("`{}` without .row or .col", mods.written())))
}

pub(super) fn take_shape(mods: &mut Mods<'_, '_>) -> Result<Shape, Refusal> {
    mods.one_of(&SHAPES).ok_or_else(|| unsupported(format!("the shape of `{}`", mods.written())))
}

pub(super) fn decode(d: &mut Decoder<'_, '_>, inst: &Instruction<'_>) -> Result<(), Refusal> {
    let mut mods = Mods::new(inst);
    if mods.peek().is_some_and(|m| m.starts_with("sp")) {
        return Err(unsupported(format!("`{}`: products with sparse factors", mods.written())));
    }
    sync_aligned(&mut mods)?;
    let shape = take_shape(&mut mods)?;
    let layouts = (by_rows(&mut mods)?, by_rows(&mut mods)?);
    let satfinite = mods.take("satfinite");
    let rounding = mods.take("rn");
    let types = [elem(&mut mods)?, elem(&mut mods)?, elem(&mut mods)?, elem(&mut mods)?];
    let op = mods.one_of(&[("xor", true), ("and", false)]);
    let popc = mods.take("popc");
    let written = mods.written();
    mods.finish()?;

    let [to, a, b, from] = types;
    let variant = Variant { shape, a, b, c: from, d: to, satfinite, xor: op == Some(true) };
    if (a == Elem::B1) != (op.is_some() && popc) || (a != Elem::B1 && (op.is_some() || popc)) {
        return Err(invalid(format!("`{written}`: .xor.popc or .and.popc belongs to .b1 and must be there")));
    }
    if rounding && a != Elem::F64 {
        return Err(invalid(format!("`{written}`: a rounding belongs to .f64")));
    }
    let m16 = shape.m == 16 && shape.n == 8;
    let m8 = shape.m == 8 && shape.n == 8;
    let k = shape.k;
    let quads = m8 && k == 4 && a == Elem::F16;
    let known = match a {
        Elem::F16 => quads || (m16 && matches!(k, 8 | 16)),
        Elem::Bf16 => m16 && matches!(k, 8 | 16),
        Elem::Tf32 => m16 && matches!(k, 4 | 8),
        Elem::F64 => (m8 && k == 4) || (m16 && matches!(k, 4 | 8 | 16)),
        Elem::E4m3 | Elem::E5m2 => m16 && matches!(k, 16 | 32),
        Elem::S8 | Elem::U8 => (m8 && k == 16) || (m16 && matches!(k, 16 | 32)),
        Elem::S4 | Elem::U4 => (m8 && k == 32) || (m16 && matches!(k, 32 | 64)),
        Elem::B1 => (m8 && k == 128) || (m16 && matches!(k, 128 | 256)),
        Elem::F32 | Elem::S32 => false,
    };
    // Only the quad products may have C of f16 and D of f32.
    let accumulators = from == to || (quads && (from, to) == (Elem::F16, Elem::F32));
    if !known || !accumulators {
        return Err(unsupported(format!("`{written}`: this combination of shape and types")));
    }
    if quads {
        if b != Elem::F16 || satfinite || !matches!(to, Elem::F16 | Elem::F32) {
            return Err(unsupported(format!("`{written}`: this combination of types")));
        }
        return decode_quads(d, inst, layouts, from, to);
    }
    if layouts != (true, false) {
        return Err(invalid(format!("`{written}`: A must be .row and B .col in this shape")));
    }
    let kernels = kernels(d.isa, variant)
        .ok_or_else(|| unsupported(format!("`{written}`: this combination of types")))?;
    emit(d, inst, variant, kernels, 1)
}

/// Appends the product. In `wmma` an f16 factor always has eight registers: `spread` says so.
pub(super) fn emit(
    d: &mut Decoder<'_, '_>,
    inst: &Instruction<'_>,
    variant: Variant,
    kernels: Kernels,
    least: usize,
) -> Result<(), Refusal> {
    let [to, a, b, from] = operands::<4>(inst)?;
    let fragment =
        |operand, elem: Elem| Fragment { operand, shape: variant.shape, elements: elem.per_register() };
    let parts = [
        fragment(Role::A, variant.a),
        fragment(Role::B, variant.b),
        fragment(Role::C, variant.c),
        fragment(Role::C, variant.d),
    ];
    let ty = |elem: Elem| if elem == Elem::F64 { Type::F64 } else { Type::B32 };
    let counts = parts.map(|f| {
        let n = usize::from(f.registers());
        if f.operand == Role::C { n } else { n.max(least) }
    });
    let mut srcs = Vec::new();
    sources(d, vector(a, counts[0], "A")?, ty(variant.a), &mut srcs)?;
    sources(d, vector(b, counts[1], "B")?, ty(variant.b), &mut srcs)?;
    sources(d, vector(from, counts[2], "C")?, ty(variant.c), &mut srcs)?;
    let dsts = destinations(d, vector(to, counts[3], "D")?, ty(variant.d))?;
    let plan = Plan { parts, b_at: counts[0], c_at: counts[0] + counts[1] };
    let Shape { m, n, k } = variant.shape;
    let inst = d.warp(Mma { plan, kernels }, Class::Mma, &dsts, &srcs);
    inst.convergence = Convergence::All;
    inst.flops = 2 * u32::from(m) * u32::from(n) * u32::from(k);
    Ok(())
}

// ------------------------------------------------------------------------------------------------ execution

/// The kernels of a variant in each order.
#[derive(Clone, Copy, Debug)]
pub(super) struct Kernels {
    chain: Kernel,
    ampere: Kernel,
    hopper: Kernel,
}

#[derive(Debug)]
struct Mma {
    plan: Plan,
    kernels: Kernels,
}

/// The kernels of a variant, if the types fit together.
pub(super) fn kernels(isa: Isa, v: Variant) -> Option<Kernels> {
    let chain = kernel(isa, v)?;
    let ampere = grouped::kernel::<Ampere>(isa, v.a, v.b, v.c, v.d).unwrap_or(chain);
    let hopper = grouped::kernel::<Hopper>(isa, v.a, v.b, v.c, v.d).unwrap_or(chain);
    Some(Kernels { chain, ampere, hopper })
}

/// The chain of a variant, if the types fit together.
fn kernel(isa: Isa, v: Variant) -> Option<Kernel> {
    /// `KE`: elements along k of a block, 4 for each element of a register.
    macro_rules! pick {
        ($product:ty, $c:ty, $d:ty, $ke:literal) => {
            Some(if v.shape.m == 8 {
                compiled::<$product, $c, $d, 1, $ke>(isa)
            } else {
                compiled::<$product, $c, $d, 2, $ke>(isa)
            })
        };
    }
    macro_rules! ints {
        ($a:ty, $b:ty, $ke:literal) => {
            if v.satfinite {
                pick!(Ints<$a, $b>, TileSat, TileSat, $ke)
            } else {
                pick!(Ints<$a, $b>, TileS32, TileS32, $ke)
            }
        };
    }
    macro_rules! fp8 {
        ($a:ty, $b:ty) => {
            match v.d {
                Elem::F32 => pick!(Floats<$a, $b>, TileF32, TileF32, 16),
                _ => pick!(Floats<$a, $b>, TileF16, TileF16, 16),
            }
        };
    }
    let integer = v.c == Elem::S32 && v.d == Elem::S32;
    let eight = v.c == v.d && matches!(v.d, Elem::F32 | Elem::F16) && !v.satfinite;
    match (v.a, v.b, v.c, v.d) {
        (Elem::S8, Elem::S8, ..) if integer => ints!(S8, S8, 16),
        (Elem::S8, Elem::U8, ..) if integer => ints!(S8, U8, 16),
        (Elem::U8, Elem::S8, ..) if integer => ints!(U8, S8, 16),
        (Elem::U8, Elem::U8, ..) if integer => ints!(U8, U8, 16),
        (Elem::S4, Elem::S4, ..) if integer => ints!(S4, S4, 32),
        (Elem::S4, Elem::U4, ..) if integer => ints!(S4, U4, 32),
        (Elem::U4, Elem::S4, ..) if integer => ints!(U4, S4, 32),
        (Elem::U4, Elem::U4, ..) if integer => ints!(U4, U4, 32),
        _ if v.satfinite => None,
        (Elem::B1, Elem::B1, ..) if integer && v.xor => pick!(Bits<true>, TileS32, TileS32, 4),
        (Elem::B1, Elem::B1, ..) if integer => pick!(Bits<false>, TileS32, TileS32, 4),
        (Elem::F16, Elem::F16, Elem::F32, Elem::F32) => pick!(Floats<F16, F16>, TileF32, TileF32, 8),
        (Elem::F16, Elem::F16, Elem::F16, Elem::F16) => pick!(Floats<F16, F16>, TileF16, TileF16, 8),
        (Elem::F16, Elem::F16, Elem::F16, Elem::F32) => pick!(Floats<F16, F16>, TileF16, TileF32, 8),
        (Elem::F16, Elem::F16, Elem::F32, Elem::F16) => pick!(Floats<F16, F16>, TileF32, TileF16, 8),
        (Elem::Bf16, Elem::Bf16, Elem::F32, Elem::F32) => pick!(Floats<Bf16, Bf16>, TileF32, TileF32, 8),
        (Elem::Tf32, Elem::Tf32, Elem::F32, Elem::F32) => pick!(Floats<Tf32, Tf32>, TileF32, TileF32, 4),
        (Elem::E4m3, Elem::E4m3, ..) if eight => fp8!(E4m3, E4m3),
        (Elem::E4m3, Elem::E5m2, ..) if eight => fp8!(E4m3, E5m2),
        (Elem::E5m2, Elem::E4m3, ..) if eight => fp8!(E5m2, E4m3),
        (Elem::E5m2, Elem::E5m2, ..) if eight => fp8!(E5m2, E5m2),
        (Elem::F64, Elem::F64, Elem::F64, Elem::F64) => pick!(Doubles, TileF64, TileF64, 4),
        _ => None,
    }
}

/// The product, compiled for an instruction set. `RB` blocks of 8 rows are computed together.
fn compiled<P: Product, C, D, const RB: usize, const KE: usize>(isa: Isa) -> Kernel
where
    C: Tile<P::Acc>,
    D: Tile<P::Acc>,
{
    #[cfg(target_arch = "x86_64")]
    {
        #[target_feature(enable = "avx2,fma,bmi1,bmi2,popcnt,lzcnt,f16c")]
        fn avx2<P: Product, C, D, const RB: usize, const KE: usize>(
            plan: &Plan,
            regs: &mut Registers,
            inst: &Inst,
        ) where
            C: Tile<P::Acc>,
            D: Tile<P::Acc>,
        {
            product::<P, C, D, Avx2, RB, KE>(plan, regs, inst);
        }
        #[target_feature(
            enable = "avx2,fma,bmi1,bmi2,popcnt,lzcnt,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512cd"
        )]
        fn avx512<P: Product, C, D, const RB: usize, const KE: usize>(
            plan: &Plan,
            regs: &mut Registers,
            inst: &Inst,
        ) where
            C: Tile<P::Acc>,
            D: Tile<P::Acc>,
        {
            product::<P, C, D, Avx2, RB, KE>(plan, regs, inst);
        }
        if isa == Isa::Avx512 {
            // SAFETY: `Isa::Avx512` and `Isa::Avx2` are made by `detect` alone, which has seen the features.
            return |plan, regs, inst| unsafe { avx512::<P, C, D, RB, KE>(plan, regs, inst) };
        }
        if isa == Isa::Avx2 {
            // SAFETY: as above.
            return |plan, regs, inst| unsafe { avx2::<P, C, D, RB, KE>(plan, regs, inst) };
        }
    }
    let _ = isa;
    product::<P, C, D, Plain, RB, KE>
}

#[inline(always)]
fn product<P: Product, C, D, M: Vectors, const RB: usize, const KE: usize>(
    plan: &Plan,
    regs: &mut Registers,
    inst: &Inst,
) where
    C: Tile<P::Acc>,
    D: Tile<P::Acc>,
{
    const { assert!(KE == 4 * P::E) };
    let [fa, fb, fc, fd] = plan.parts;
    let (a, b, c) = plan.sources(inst);
    // D's registers may be the factors' too: nothing is written before all is read.
    let mut out = [[<D::Word as Value>::Raw::default(); LANES]; 8];
    let rows = usize::from(fa.shape.m / 8);
    for row in (0..rows).step_by(RB) {
        for col in 0..fa.shape.n / 8 {
            let blocks: [u8; RB] = std::array::from_fn(|i| (row + i) as u8);
            let start = blocks.map(|block| C::load::<M>(regs, &c[usize::from(fc.c(block, col))..]));
            let mut acc = if D::C_LAST { [[P::Acc::default(); 64]; RB] } else { start };
            for k in 0..fa.k_blocks() {
                let right = right::<P, M, KE>(regs.get::<P::Word>(b[usize::from(fb.b(col, k))]));
                for i in 0..RB {
                    let left = left::<P, M, KE>(regs.get::<P::Word>(a[usize::from(fa.a(blocks[i], k))]));
                    M::multiply::<P, KE>(&left, &right, &mut acc[i]);
                }
            }
            for i in 0..RB {
                if D::C_LAST {
                    for n in 0..64 {
                        acc[i][n] = D::join(acc[i][n], start[i][n]);
                    }
                }
                D::store::<M>(&acc[i], &mut out[usize::from(fd.c(blocks[i], col))..][..D::REGS]);
            }
        }
    }
    for (i, reg) in inst.regs[..usize::from(inst.dsts)].iter().enumerate() {
        regs.set::<D::Word>(*reg, u32::MAX, &out[i]);
    }
}

impl Kernels {
    /// The one that adds in an order.
    pub(super) fn of(self, order: MmaOrder) -> Kernel {
        match order {
            MmaOrder::Chain => self.chain,
            MmaOrder::Ampere => self.ampere,
            MmaOrder::Hopper => self.hopper,
        }
    }
}

impl WarpOp for Mma {
    fn execute(&self, ctx: &mut Context<'_>, inst: &Inst, mask: u32) -> Result<(), Stop> {
        whole_warp(ctx, mask)?;
        let kernel = self.kernels.of(ctx.launch.mma);
        kernel(&self.plan, ctx.regs(), inst);
        ctx.block.work.mma_flops += u64::from(inst.flops);
        self.plan.define(ctx.regs(), inst);
        Ok(())
    }
}

/// The lanes of those groups of four that are in `lanes` as a whole.
fn whole_groups(lanes: u32) -> u32 {
    let pairs = lanes & lanes >> 1;
    (pairs & pairs >> 2 & 0x1111_1111) * 0xf
}

impl Plan {
    /// Notes which elements of D are defined.
    pub(super) fn define(&self, regs: &mut Registers, inst: &Inst) {
        if inst.srcs().iter().all(|src| regs.defined(*src) == u32::MAX) {
            inst.regs[..usize::from(inst.dsts)]
                .iter()
                .for_each(|reg| regs.set_defined(*reg, u32::MAX, u32::MAX));
            return;
        }
        let [fa, fb, fc, fd] = self.parts;
        let srcs = inst.srcs();
        let mut out = [0; 8];
        for row in 0..fa.shape.m / 8 {
            // Lane (g, t): row g of the block.
            let row_ok = whole_groups(
                (0..fa.k_blocks())
                    .fold(u32::MAX, |all, k| all & regs.defined(srcs[usize::from(fa.a(row, k))])),
            );
            for col in 0..fa.shape.n / 8 {
                let of_b = whole_groups((0..fb.k_blocks()).fold(u32::MAX, |all, k| {
                    all & regs.defined(srcs[self.b_at + usize::from(fb.b(col, k))])
                }));
                let mut half = [0; 2];
                for (sub, ok) in half.iter_mut().enumerate() {
                    // Lane (g, t) of D has columns 2t and 2t+1; those of B are its groups.
                    let group = (0..4).fold(0, |all, t| all | (of_b >> (4 * (2 * t + sub)) & 1) << t);
                    let c = usize::from(fc.c(row, col)) + if fc.elements == 1 { sub } else { 0 };
                    *ok = row_ok & (group * 0x1111_1111) & regs.defined(srcs[self.c_at + c]);
                }
                let at = usize::from(fd.c(row, col));
                if fd.elements == 1 {
                    out[at..at + 2].copy_from_slice(&half);
                } else {
                    out[at] = half[0] & half[1];
                }
            }
        }
        for (i, defined) in out.iter().enumerate().take(usize::from(inst.dsts)) {
            regs.set_defined(inst.dst(i), u32::MAX, *defined);
        }
    }
}

// ------------------------------------------------------------------------------------------------ quads

/// f16 `mma.m8n8k4`: four products of 8 x 8 x 4 side by side. Old, slow on today's hardware, and here element by element.
#[derive(Debug)]
struct Quads {
    a_by_rows: bool,
    b_by_rows: bool,
    /// Whether C is f32, and D.
    wide: [bool; 2],
}

fn decode_quads(
    d: &mut Decoder<'_, '_>,
    inst: &Instruction<'_>,
    (a_by_rows, b_by_rows): (bool, bool),
    from: Elem,
    to: Elem,
) -> Result<(), Refusal> {
    let wide = [from == Elem::F32, to == Elem::F32];
    let [dst, a, b, c] = operands::<4>(inst)?;
    let count = |wide| if wide { 8 } else { 4 };
    let mut srcs = Vec::new();
    sources(d, vector(a, 2, "A")?, Type::B32, &mut srcs)?;
    sources(d, vector(b, 2, "B")?, Type::B32, &mut srcs)?;
    sources(d, vector(c, count(wide[0]), "C")?, Type::B32, &mut srcs)?;
    let dsts = destinations(d, vector(dst, count(wide[1]), "D")?, Type::B32)?;
    let inst = d.warp(Quads { a_by_rows, b_by_rows, wide }, Class::Mma, &dsts, &srcs);
    inst.convergence = Convergence::All;
    inst.flops = 4 * 2 * 8 * 8 * 4;
    Ok(())
}

impl Quads {
    fn run(&self, regs: &mut Registers, inst: &Inst) {
        let c_place =
            |wide, q, row, col| if wide { quad::c_f32(q, row, col) } else { quad::c_f16(q, row, col) };
        // Bits of an element, and whether they are defined. The sources are A's, B's, C's registers.
        let read = |regs: &Registers, first: usize, at: super::layout::Place| {
            let (reg, lane) = (inst.src(first + usize::from(at.reg)), usize::from(at.lane));
            (regs.get::<u32>(reg)[lane] >> (16 * at.sub), regs.defined(reg) >> lane & 1 != 0)
        };
        let mut out = [[0u32; LANES]; 8];
        let mut defined = [u32::MAX; 8];
        for q in 0..4 {
            for row in 0..8 {
                for col in 0..8 {
                    let (bits, mut known) = read(regs, 4, c_place(self.wide[0], q, row, col));
                    let mut acc = if self.wide[0] { f32::from_bits(bits) } else { f16_to_f32(bits) };
                    for k in 0..4 {
                        let (a, a_known) = read(regs, 0, quad::a(q, row, k, self.a_by_rows));
                        let (b, b_known) = read(regs, 2, quad::b(q, k, col, self.b_by_rows));
                        acc = f16_to_f32(a).mul_add(f16_to_f32(b), acc);
                        known &= a_known & b_known;
                    }
                    let at = c_place(self.wide[1], q, row, col);
                    let (reg, lane) = (usize::from(at.reg), usize::from(at.lane));
                    out[reg][lane] |= match self.wide[1] {
                        true if acc.is_nan() => 0x7fff_ffff,
                        true => acc.to_bits(),
                        false => f32_to_f16(acc) << (16 * at.sub),
                    };
                    defined[reg] &= !(u32::from(!known) << lane);
                }
            }
        }
        for i in 0..usize::from(inst.dsts) {
            regs.set::<u32>(inst.dst(i), u32::MAX, &out[i]);
            regs.set_defined(inst.dst(i), u32::MAX, defined[i]);
        }
    }
}

impl WarpOp for Quads {
    fn execute(&self, ctx: &mut Context<'_>, inst: &Inst, mask: u32) -> Result<(), Stop> {
        whole_warp(ctx, mask)?;
        self.run(ctx.regs(), inst);
        ctx.block.work.mma_flops += u64::from(inst.flops);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::inst::{Control, Exec};
    use crate::machine::registers::{Reg, Width};

    /// D's rows for registers full of pseudo-random bits, in each order.
    fn run(isa: Isa, v: Variant) -> [Vec<[u32; LANES]>; 3] {
        let Kernels { chain, ampere, hopper } = kernels(isa, v).expect("a variant that exists");
        [chain, ampere, hopper].map(|kernel| run_one(kernel, v))
    }

    fn run_one(kernel: Kernel, v: Variant) -> Vec<[u32; LANES]> {
        let fragment =
            |operand, elem: Elem| Fragment { operand, shape: v.shape, elements: elem.per_register() };
        let parts =
            [fragment(Role::A, v.a), fragment(Role::B, v.b), fragment(Role::C, v.c), fragment(Role::C, v.d)];
        let [na, nb, nc, nd] = parts.map(|part| usize::from(part.registers()));
        let width = if v.a == Elem::F64 { Width::B64 } else { Width::B32 };
        let list: Vec<Reg> =
            (0..(nd + na + nb + nc) as u32).map(|i| Reg { width, slot: i * width.rows() }).collect();
        let mut regs = Registers::default();
        regs.reserve(list.len() * 2, 0);
        let mut seed = 1u32;
        let rows = |reg: &Reg| {
            (0..width.rows()).map(|i| Reg { width: Width::B32, slot: reg.slot + i }).collect::<Vec<_>>()
        };
        for row in list.iter().flat_map(rows) {
            let values = std::array::from_fn(|_| {
                seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                seed ^ seed >> 15
            });
            regs.set::<u32>(row, u32::MAX, &values);
        }
        let (dsts, srcs) = list.split_at(nd);
        let inst = Inst::new(Exec::Control(Control::Exit), Class::Mma, dsts, srcs, 0);
        kernel(&Plan { parts, b_at: na, c_at: na + nb }, &mut regs, &inst);
        list[..nd].iter().flat_map(rows).map(|row| *regs.get::<u32>(row)).collect()
    }

    #[test]
    fn every_instruction_set_gives_the_same_bits() {
        use Elem::{B1, Bf16, E4m3, E5m2, F16, F32, F64, S4, S8, S32, Tf32, U8};
        for (m, n, k, a, b, c, d) in [
            (16, 8, 16, F16, F16, F32, F32),
            (16, 8, 8, F16, F16, F16, F16),
            (32, 8, 16, F16, F16, F16, F32),
            (8, 32, 16, F16, F16, F32, F16),
            (16, 8, 16, Bf16, Bf16, F32, F32),
            (16, 16, 8, Tf32, Tf32, F32, F32),
            (16, 8, 32, E4m3, E5m2, F32, F32),
            (8, 8, 4, F64, F64, F64, F64),
            (16, 8, 16, F64, F64, F64, F64),
            (16, 8, 32, S8, U8, S32, S32),
            (16, 8, 64, S4, S4, S32, S32),
            (16, 8, 256, B1, B1, S32, S32),
        ] {
            for satfinite in [false, a == S8 || a == S4] {
                let v = Variant { shape: shape(m, n, k), a, b, c, d, satfinite, xor: false };
                let portable = run(Isa::Portable, v);
                for isa in [Isa::Avx2, Isa::Avx512].into_iter().filter(|isa| *isa <= Isa::detect()) {
                    assert!(run(isa, v) == portable, "{v:?} on {isa:?}");
                }
            }
        }
    }
}
