//! `mma.sync` of floats of 4, 6 and 8 bits (sm_120): `.kind::f8f6f4`, and with a scale for each block along k
//! `.kind::mxf8f6f4`, `.kind::mxf4` and `.kind::mxf4nvf4`.
//!
//! Each element of D is a chain in f32 as elsewhere (see [`mma`](super::mma)), of the products of factors that were scaled before:
//! these are exact, and each addition is rounded once. With accumulators of f16 C is widened, and the end is rounded.
//!
//! A scale lies in a byte of a register of the lanes that the selectors name (PTX ISA, "Block Scaling for mma.sync"). Of each four
//! lanes, which share a row of A and a column of B, two have the scales of A, for the row and for that 8 below, and one has
//! those of B.

use super::layout::{Fragment, Operand as Role, Place, Shape};
use super::mma::{Variant, by_rows, emit, kernels, take_shape};
use super::number::{E2M1, E2M3, E3M2, E4M3, E5M2, Elem, f16_to_f32, f32_to_f16};
use super::operands::{destinations, sources, sync_aligned, vector, whole_warp};
use super::tile::Plan;
use crate::decode::decoder::{Decoder, operands};
use crate::decode::mods::Mods;
use crate::decode::{Refusal, invalid, unsupported};
use crate::error::ErrorKind;
use crate::machine::context::{Context, Stop};
use crate::machine::inst::{Class, Convergence, Inst, WarpOp};
use crate::machine::registers::{LANES, Registers};
use crate::ptx::ast::{Instruction, Operand};
use crate::types::Type;

/// `.kind`
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    F8f6f4,
    Mxf8f6f4,
    Mxf4,
    Mxf4nvf4,
}

const KINDS: [(&str, Kind); 4] = [
    ("kind::f8f6f4", Kind::F8f6f4),
    ("kind::mxf8f6f4", Kind::Mxf8f6f4),
    ("kind::mxf4", Kind::Mxf4),
    ("kind::mxf4nvf4", Kind::Mxf4nvf4),
];

/// The type of a factor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Factor {
    E4m3,
    E5m2,
    E3m2,
    E2m3,
    E2m1,
}

const FACTORS: [(&str, Factor); 5] = [
    ("e4m3", Factor::E4m3),
    ("e5m2", Factor::E5m2),
    ("e3m2", Factor::E3m2),
    ("e2m3", Factor::E2m3),
    ("e2m1", Factor::E2m1),
];

impl Factor {
    /// The value of a container of 8 bits: six bits lie at its low end, and four in its middle.
    fn contained(self, byte: u32) -> f32 {
        match self {
            Self::E4m3 => E4M3[byte as usize & 0xff],
            Self::E5m2 => E5M2[byte as usize & 0xff],
            Self::E3m2 => E3M2[byte as usize & 0x3f],
            Self::E2m3 => E2M3[byte as usize & 0x3f],
            Self::E2m1 => E2M1[byte as usize >> 2 & 0xf],
        }
    }

    /// The type as those products know it that have no kind.
    fn eight(self) -> Option<Elem> {
        match self {
            Self::E4m3 => Some(Elem::E4m3),
            Self::E5m2 => Some(Elem::E5m2),
            _ => None,
        }
    }
}

/// Whether a product is one of these.
pub(super) fn has_kind(inst: &Instruction<'_>) -> bool {
    inst.modifiers.iter().any(|m| KINDS.iter().any(|(name, _)| name == m))
}

pub(super) fn decode(d: &mut Decoder<'_, '_>, inst: &Instruction<'_>) -> Result<(), Refusal> {
    let mut mods = Mods::new(inst);
    let written = mods.written();
    sync_aligned(&mut mods)?;
    let shape = take_shape(&mut mods)?;
    let layouts = (by_rows(&mut mods)?, by_rows(&mut mods)?);
    let Some(kind) = mods.one_of(&KINDS) else {
        return Err(unsupported(format!("`{written}`: its kind")));
    };
    let scaled = mods.take("block_scale");
    let given = mods.one_of(&[("scale_vec::1X", 1), ("scale_vec::2X", 2), ("scale_vec::4X", 4)]);
    let accumulators = [("f32", Elem::F32), ("f16", Elem::F16)];
    let to = mods.one_of(&accumulators);
    let factors = [mods.one_of(&FACTORS), mods.one_of(&FACTORS)];
    let from = mods.one_of(&accumulators);
    let fraction = mods.one_of(&[("ue8m0", false), ("ue4m3", true)]);
    mods.finish()?;
    let ([Some(a), Some(b)], Some(to)) = (factors, to.filter(|_| to == from)) else {
        return Err(unsupported(format!("`{written}`: this combination of types")));
    };
    let blocks = match (kind, given) {
        (Kind::F8f6f4, None) => 0,
        (Kind::Mxf8f6f4, None | Some(1)) => 1,
        (Kind::Mxf4, None) | (Kind::Mxf4 | Kind::Mxf4nvf4, Some(2)) => 2,
        (Kind::Mxf4nvf4, Some(4)) => 4,
        _ => return Err(invalid(format!("`{written}`: no such number of scales in this kind"))),
    };
    if scaled != (blocks != 0) || fraction.is_some() != scaled {
        return Err(invalid(format!(
            "`{written}`: .block_scale and the scales' type belong to the other kinds"
        )));
    }
    let packed = matches!(kind, Kind::Mxf4 | Kind::Mxf4nvf4);
    let fits = !packed || (a, b) == (Factor::E2m1, Factor::E2m1);
    let k = if packed { 64 } else { 32 };
    if !fits
        || shape != (Shape { m: 16, n: 8, k })
        || (scaled && to != Elem::F32)
        || (fraction == Some(true) && blocks != 4)
    {
        return Err(unsupported(format!("`{written}`: this combination of shape and types")));
    }
    if layouts != (true, false) {
        return Err(invalid(format!("`{written}`: A must be .row and B .col in this shape")));
    }
    if let (0, Some(a), Some(b)) = (blocks, a.eight(), b.eight()) {
        let variant = Variant { shape, a, b, c: to, d: to, satfinite: false, xor: false };
        let kernels = kernels(d.isa, variant).ok_or_else(|| unsupported(format!("`{written}`")))?;
        return emit(d, inst, variant, kernels, 1);
    }

    // The four of every product, and a register and its selectors for the scales of A and of B.
    let (all, scale_operands) = match scaled {
        true => operands::<8>(inst)?.split_at(4),
        false => operands::<4>(inst)?.split_at(4),
    };
    let per_word = if packed { 8 } else { 4 };
    let fragment = |operand, elements| Fragment { operand, shape, elements };
    let c = fragment(Role::C, to.per_register());
    let parts = [fragment(Role::A, per_word), fragment(Role::B, per_word), c, c];
    let counts = parts.map(|part| usize::from(part.registers()));
    let mut srcs = Vec::new();
    for ((op, n), what) in all[1..].iter().zip(counts).zip(["A", "B", "C"]) {
        sources(d, vector(op, n, what)?, Type::B32, &mut srcs)?;
    }
    let dsts = destinations(d, vector(&all[0], counts[3], "D")?, Type::B32)?;
    let plan = Plan { parts, b_at: counts[0], c_at: counts[0] + counts[1] };
    let scales = scaled.then(|| Scales { blocks, fraction: fraction == Some(true), at: srcs.len() });
    if let Some(scales) = &scales {
        for (pair, threads) in scale_operands.chunks(2).zip(THREADS) {
            srcs.push(d.src(&pair[0], Type::B32)?);
            let selectors = vector(&pair[1], 2, "a scale's selector")?;
            for (selector, most) in selectors.iter().zip([scales.bytes(), threads]) {
                if let Operand::Integer(n) = selector
                    && !most.iter().any(|value| u64::from(*value) == *n)
                {
                    return Err(invalid(format!(
                        "`{written}`: the selector {n} of a scale: there are {most:?}"
                    )));
                }
                srcs.push(d.src(selector, Type::U16)?);
            }
        }
    }
    let op = Narrow { plan, factors: [a, b], packed, wide: to == Elem::F32, scales };
    let inst = d.warp(op, Class::Mma, &dsts, &srcs);
    inst.convergence = Convergence::All;
    inst.flops = 2 * 16 * 8 * u32::from(k);
    Ok(())
}

/// Values of the selectors of lanes, for the scales of A and of B.
const THREADS: [&[u32]; 2] = [&[0, 1], &[0, 1, 2, 3]];

/// Where the scales are: the sources from `at` on are a register of A's scales, the selectors of its byte and lanes, and those of B.
#[derive(Debug)]
struct Scales {
    /// How many a row of A has, and a column of B.
    blocks: usize,
    /// Whether they are `ue4m3`, otherwise `ue8m0`.
    fraction: bool,
    at: usize,
}

/// The scales of a product.
struct Values {
    rows: [[f64; 4]; 16],
    columns: [[f64; 4]; 8],
    /// The rows and columns of which they are written.
    rows_defined: u32,
    columns_defined: u32,
}

impl Scales {
    /// The bytes at which they may begin.
    fn bytes(&self) -> &'static [u32] {
        match self.blocks {
            1 => &[0, 1, 2, 3],
            2 => &[0, 2],
            _ => &[0],
        }
    }

    fn value(&self, byte: u32) -> f64 {
        match byte & 0xff {
            byte if self.fraction => E4M3[byte as usize & 0x7f].into(),
            0xff => f64::NAN,
            byte => f64::from_bits(u64::from(byte + 1023 - 127) << 52),
        }
    }

    /// A selector, the same in all lanes.
    fn selector(ctx: &mut Context<'_>, inst: &Inst, at: usize, values: &[u32]) -> Result<usize, Stop> {
        let reg = inst.src(at);
        ctx.need_defined(u32::MAX, reg, "the selector of a scale");
        let row = ctx.regs().get::<u32>(reg).map(|value| value & 0xffff);
        if row.iter().all(|value| *value == row[0]) && values.contains(&row[0]) {
            return Ok(row[0] as usize);
        }
        let lanes = (0..LANES).filter(|i| !values.contains(&row[*i])).fold(0u32, |lanes, i| lanes | 1 << i);
        let message = if lanes == 0 {
            "lanes disagree on the selector of a scale".to_owned()
        } else {
            format!("the selector {} of a scale: there are {values:?}", row[lanes.trailing_zeros() as usize])
        };
        Err(ctx.fault(ErrorKind::OutOfBounds, if lanes == 0 { u32::MAX } else { lanes }, message))
    }

    fn read(&self, ctx: &mut Context<'_>, inst: &Inst) -> Result<Values, Stop> {
        let mut values =
            Values { rows: [[0.0; 4]; 16], columns: [[0.0; 4]; 8], rows_defined: 0, columns_defined: 0 };
        for (i, threads) in THREADS.into_iter().enumerate() {
            let at = self.at + 3 * i;
            let byte = Self::selector(ctx, inst, at + 1, self.bytes())?;
            let thread = Self::selector(ctx, inst, at + 2, threads)?;
            let regs = ctx.regs();
            let (words, defined) = (*regs.get::<u32>(inst.src(at)), regs.defined(inst.src(at)));
            let all = |lane: usize| {
                std::array::from_fn(|block| self.value(words[lane] >> (8 * (byte + block).min(3))))
            };
            if i == 0 {
                for row in 0..16 {
                    let lane = row % 8 * 4 + 2 * thread + row / 8;
                    values.rows[row] = all(lane);
                    values.rows_defined |= (defined >> lane & 1) << row;
                }
            } else {
                for column in 0..8 {
                    let lane = 4 * column + thread;
                    values.columns[column] = all(lane);
                    values.columns_defined |= (defined >> lane & 1) << column;
                }
            }
        }
        Ok(values)
    }
}

/// A product of narrow floats. Sources: the registers of A, B and C, and those of the scales.
#[derive(Debug)]
struct Narrow {
    plan: Plan,
    factors: [Factor; 2],
    /// Whether elements have 4 bits, not containers of 8.
    packed: bool,
    /// Whether C and D are f32, not f16.
    wide: bool,
    scales: Option<Scales>,
}

/// acc + p, rounded once.
fn add(acc: f32, p: f64) -> f32 {
    let a = f64::from(acc);
    let sum = a + p;
    let back = sum - a;
    let error = (a - (sum - back)) + (p - back);
    // Where the sum in f64 is not exact its last bit is made odd, towards what was lost: then the second rounding is right.
    if sum.is_finite() && error != 0.0 && sum.to_bits() & 1 == 0 {
        let away = (error > 0.0) == (sum > 0.0);
        return f64::from_bits(if away { sum.to_bits() + 1 } else { sum.to_bits() - 1 }) as f32;
    }
    sum as f32
}

impl Narrow {
    fn element(&self, word: u32, sub: u8, factor: Factor) -> f64 {
        f64::from(match self.packed {
            true => E2M1[(word >> (4 * sub)) as usize & 0xf],
            false => factor.contained(word >> (8 * sub)),
        })
    }

    fn run(&self, regs: &mut Registers, inst: &Inst, scales: Option<&Values>) {
        let [fa, fb, fc, fd] = self.plan.parts;
        let (a, b, c) = self.plan.sources(inst);
        let depth = usize::from(fa.shape.k);
        let block = depth / self.scales.as_ref().map_or(1, |scales| scales.blocks);
        let word = |from: &[_], at: Place| regs.get::<u32>(from[usize::from(at.reg)])[usize::from(at.lane)];
        let scale = |of: Option<&[f64; 4]>, k: usize| of.map_or(1.0, |scales| scales[k / block]);
        let left: Vec<f64> = (0..16 * depth)
            .map(|i| {
                let (row, k) = (i / depth, i % depth);
                let at = fa.place(row, k);
                self.element(word(a, at), at.sub, self.factors[0]) * scale(scales.map(|s| &s.rows[row]), k)
            })
            .collect();
        let right: Vec<f64> = (0..8 * depth)
            .map(|i| {
                let (column, k) = (i / depth, i % depth);
                let at = fb.place(k, column);
                self.element(word(b, at), at.sub, self.factors[1])
                    * scale(scales.map(|s| &s.columns[column]), k)
            })
            .collect();
        let mut out = [[0u32; LANES]; 4];
        for (row, left) in left.chunks(depth).enumerate() {
            for (column, right) in right.chunks(depth).enumerate() {
                let from = fc.place(row, column);
                let bits = word(c, from) >> (16 * from.sub);
                let start = if self.wide { f32::from_bits(bits) } else { f16_to_f32(bits & 0xffff) };
                let sum = left.iter().zip(right).fold(start, |sum, (a, b)| add(sum, a * b));
                let to = fd.place(row, column);
                out[usize::from(to.reg)][usize::from(to.lane)] |= match self.wide {
                    true if sum.is_nan() => 0x7fff_ffff,
                    true => sum.to_bits(),
                    false => f32_to_f16(sum) << (16 * to.sub),
                };
            }
        }
        for i in 0..usize::from(inst.dsts) {
            regs.set::<u32>(inst.dst(i), u32::MAX, &out[i]);
        }
    }

    /// D is not defined where a scale is not.
    fn define_scaled(&self, regs: &mut Registers, inst: &Inst, scales: &Values) {
        if scales.rows_defined == 0xffff && scales.columns_defined == 0xff {
            return;
        }
        let mut defined: Vec<u32> = (0..usize::from(inst.dsts)).map(|i| regs.defined(inst.dst(i))).collect();
        for row in 0..16 {
            for column in 0..8 {
                if scales.rows_defined >> row & scales.columns_defined >> column & 1 == 0 {
                    let at = self.plan.parts[3].place(row, column);
                    defined[usize::from(at.reg)] &= !(1 << at.lane);
                }
            }
        }
        for (i, defined) in defined.into_iter().enumerate() {
            regs.set_defined(inst.dst(i), u32::MAX, defined);
        }
    }
}

impl WarpOp for Narrow {
    fn execute(&self, ctx: &mut Context<'_>, inst: &Inst, mask: u32) -> Result<(), Stop> {
        whole_warp(ctx, mask)?;
        let scales = match &self.scales {
            Some(scales) => Some(scales.read(ctx, inst)?),
            None => None,
        };
        self.run(ctx.regs(), inst, scales.as_ref());
        self.plan.define(ctx.regs(), inst);
        if let Some(scales) = &scales {
            self.define_scaled(ctx.regs(), inst, scales);
        }
        ctx.block.work.mma_flops += u64::from(inst.flops);
        Ok(())
    }
}
