//! Comparisons, selections, moves.

use std::marker::PhantomData;

use super::forms::{self, Form, Handler, table};
use super::integer::ops;
use super::lane::{
    Compare, Select, Split, combine, compare, compare_halves, lane_op, pack, select, ternary, unary, unpack,
};
use super::logic::predicate_logic;
use crate::decode::decoder::{Decoder, operands, width_of};
use crate::decode::mods::{Mods, written};
use crate::decode::{Refusal, invalid, unsupported};
use crate::machine::context::{Context, Stop};
use crate::machine::inst::{Class, Defs, Inst, Moved, WarpOp};
use crate::machine::program::Special;
use crate::machine::registers::{LANES, Reg, Value, Width};
use crate::ptx::ast::{Instruction, Operand};
use crate::types::{Type, TypeKind};

/// Decodes the instructions of this family.
///
/// # Errors
/// The instruction is wrong, or not built.
pub fn decode(d: &mut Decoder<'_, '_>, inst: &Instruction<'_>) -> Result<(), Refusal> {
    match inst.opcode {
        "setp" => setp(d, inst),
        "set" => set(d, inst),
        "selp" => selp(d, inst),
        "mov" => mov(d, inst),
        _ => forms::decode(d, SLCT, Class::Integer, inst).map(|_| ()),
    }
}

/// `table!` for all types of `mov`, `selp` and `slct`: only the width matters.
macro_rules! by_width {
    ($lift:ident $op:ident) => {
        table![$lift $op: B16 u16, U16 u16, S16 u16, B32 u32, U32 u32, S32 u32, F32 u32, B64 u64, U64 u64, S64 u64,
            F64 u64]
    };
}

/// The handler of a type.
fn handler_of(handlers: forms::Handlers, ty: Type, inst: &Instruction<'_>) -> Result<Handler, Refusal> {
    let found = handlers.iter().find(|(t, _)| *t == ty).map(|(_, handler)| *handler);
    found.ok_or_else(|| unsupported(format!("`{}`", written(inst))))
}

// -------------------------------------------------------------------------------------------------- comparisons

/// How the values of a type are ordered.
trait Order {
    type A: Value;
    fn less(a: Self::A, b: Self::A) -> bool;
    fn equal(a: Self::A, b: Self::A) -> bool;
    /// Whether neither is a NaN.
    fn ordered(_a: Self::A, _b: Self::A) -> bool {
        true
    }
}

struct Whole<T>(PhantomData<T>);

impl<T: Value + Ord> Order for Whole<T> {
    type A = T;
    #[inline(always)]
    fn less(a: T, b: T) -> bool {
        a < b
    }
    #[inline(always)]
    fn equal(a: T, b: T) -> bool {
        a == b
    }
}

/// f32; `FTZ` takes subnormal numbers for zeros.
struct Single<const FTZ: bool>;

/// Subnormal numbers become zeros of their sign.
fn flushed(a: f32) -> f32 {
    if a.to_bits() & 0x7f80_0000 == 0 { f32::from_bits(a.to_bits() & 0x8000_0000) } else { a }
}

impl<const FTZ: bool> Order for Single<FTZ> {
    type A = f32;
    #[inline(always)]
    fn less(a: f32, b: f32) -> bool {
        if FTZ { flushed(a) < flushed(b) } else { a < b }
    }
    #[inline(always)]
    fn equal(a: f32, b: f32) -> bool {
        if FTZ { flushed(a) == flushed(b) } else { a == b }
    }
    #[inline(always)]
    fn ordered(a: f32, b: f32) -> bool {
        !a.is_nan() && !b.is_nan()
    }
}

struct Double;

impl Order for Double {
    type A = f64;
    #[inline(always)]
    fn less(a: f64, b: f64) -> bool {
        a < b
    }
    #[inline(always)]
    fn equal(a: f64, b: f64) -> bool {
        a == b
    }
    #[inline(always)]
    fn ordered(a: f64, b: f64) -> bool {
        !a.is_nan() && !b.is_nan()
    }
}

/// A 16-bit format with `M` bits of mantissa, sign and magnitude: bits compare as integers do.
struct Half<const M: u32, const FTZ: bool>;

impl<const M: u32, const FTZ: bool> Half<M, FTZ> {
    #[inline(always)]
    fn key(a: u16) -> i32 {
        let magnitude = i32::from(a & 0x7fff);
        let magnitude = if FTZ && magnitude >> M == 0 { 0 } else { magnitude };
        if a >> 15 != 0 { -magnitude } else { magnitude }
    }
}

impl<const M: u32, const FTZ: bool> Order for Half<M, FTZ> {
    type A = u16;
    #[inline(always)]
    fn less(a: u16, b: u16) -> bool {
        Self::key(a) < Self::key(b) && Self::ordered(a, b)
    }
    #[inline(always)]
    fn equal(a: u16, b: u16) -> bool {
        Self::key(a) == Self::key(b) && Self::ordered(a, b)
    }
    #[inline(always)]
    fn ordered(a: u16, b: u16) -> bool {
        let infinity = 0x7fff >> M << M;
        a & 0x7fff <= infinity && b & 0x7fff <= infinity
    }
}

/// a < b
const LESS: u8 = 0;
/// a == b
const EQUAL: u8 = 1;
/// a < b or a == b
const LESS_EQUAL: u8 = 2;
/// a < b or a > b
const UNEQUAL: u8 = 3;
/// Neither is a NaN.
const ORDERED: u8 = 4;

/// A relation of a format.
struct Is<F, const R: u8>(PhantomData<F>);

impl<F: Order, const R: u8> Compare for Is<F, R> {
    type A = F::A;
    #[inline(always)]
    fn eval(a: F::A, b: F::A) -> bool {
        match R {
            LESS => F::less(a, b),
            EQUAL => F::equal(a, b),
            LESS_EQUAL => F::less(a, b) || F::equal(a, b),
            UNEQUAL => F::ordered(a, b) && !F::equal(a, b),
            _ => F::ordered(a, b),
        }
    }
}

/// Handlers by relation; integers need the first two alone.
macro_rules! relations {
    ($lift:ident $f:ty) => {
        &[
            $lift::<Is<$f, LESS>>,
            $lift::<Is<$f, EQUAL>>,
            $lift::<Is<$f, LESS_EQUAL>>,
            $lift::<Is<$f, UNEQUAL>>,
            $lift::<Is<$f, ORDERED>>,
        ]
    };
    ($lift:ident $t:ty, $bits:ty) => {
        &[$lift::<Is<Whole<$t>, LESS>>, $lift::<Is<Whole<$bits>, EQUAL>>]
    };
}

type Relations = &'static [Handler];

const RELATIONS: &[(Type, bool, Relations)] = &[
    (Type::B16, false, relations!(compare u16, u16)),
    (Type::U16, false, relations!(compare u16, u16)),
    (Type::S16, false, relations!(compare i16, u16)),
    (Type::B32, false, relations!(compare u32, u32)),
    (Type::U32, false, relations!(compare u32, u32)),
    (Type::S32, false, relations!(compare i32, u32)),
    (Type::B64, false, relations!(compare u64, u64)),
    (Type::U64, false, relations!(compare u64, u64)),
    (Type::S64, false, relations!(compare i64, u64)),
    (Type::F32, false, relations!(compare Single<false>)),
    (Type::F32, true, relations!(compare Single<true>)),
    (Type::F64, false, relations!(compare Double)),
    (Type::F16, false, relations!(compare Half<10, false>)),
    (Type::F16, true, relations!(compare Half<10, true>)),
    (Type::BF16, false, relations!(compare Half<7, false>)),
    (Type::F16X2, false, relations!(compare_halves Half<10, false>)),
    (Type::F16X2, true, relations!(compare_halves Half<10, true>)),
    (Type::BF16X2, false, relations!(compare_halves Half<7, false>)),
];

/// A comparison operator: a relation, perhaps with its operands exchanged, perhaps negated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Operator {
    relation: u8,
    exchanged: bool,
    negated: bool,
    valid: Valid,
}

/// The types an operator exists for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Valid {
    All,
    /// All but bits without an interpretation.
    Numbers,
    Unsigned,
    Floats,
}

const fn operator(relation: u8, exchanged: bool, negated: bool, valid: Valid) -> Operator {
    Operator { relation, exchanged, negated, valid }
}

const OPERATORS: &[(&str, Operator)] = &[
    ("eq", operator(EQUAL, false, false, Valid::All)),
    // Of floats `ne` is ordered; see `operator_for`.
    ("ne", operator(EQUAL, false, true, Valid::All)),
    ("lt", operator(LESS, false, false, Valid::Numbers)),
    ("le", operator(LESS_EQUAL, false, false, Valid::Numbers)),
    ("gt", operator(LESS, true, false, Valid::Numbers)),
    ("ge", operator(LESS_EQUAL, true, false, Valid::Numbers)),
    ("lo", operator(LESS, false, false, Valid::Unsigned)),
    ("ls", operator(LESS_EQUAL, false, false, Valid::Unsigned)),
    ("hi", operator(LESS, true, false, Valid::Unsigned)),
    ("hs", operator(LESS_EQUAL, true, false, Valid::Unsigned)),
    // True where an operand is a NaN: the opposite is ordered.
    ("equ", operator(UNEQUAL, false, true, Valid::Floats)),
    ("neu", operator(EQUAL, false, true, Valid::Floats)),
    ("ltu", operator(LESS_EQUAL, true, true, Valid::Floats)),
    ("leu", operator(LESS, true, true, Valid::Floats)),
    ("gtu", operator(LESS_EQUAL, false, true, Valid::Floats)),
    ("geu", operator(LESS, false, true, Valid::Floats)),
    ("num", operator(ORDERED, false, false, Valid::Floats)),
    ("nan", operator(ORDERED, false, true, Valid::Floats)),
];

const BOOL_OPS: &[(&str, u64)] = &[("and", combine::AND), ("or", combine::OR), ("xor", combine::XOR)];

/// A comparison that is ready to be appended.
struct Comparison {
    handler: Handler,
    operator: Operator,
    bool_op: Option<u64>,
    ty: Type,
}

impl Comparison {
    fn new(op: Operator, ftz: bool, bool_op: Option<u64>, ty: Type, text: &str) -> Result<Self, Refusal> {
        let float = ty.kind() == TypeKind::Float;
        let valid = match op.valid {
            Valid::All => true,
            Valid::Numbers => ty.kind() != TypeKind::Bits,
            Valid::Unsigned => ty.kind() == TypeKind::Unsigned,
            Valid::Floats => float,
        };
        let row = RELATIONS.iter().find(|(t, f, _)| *t == ty && *f == ftz);
        let (Some((_, _, relations)), true) = (row, valid) else {
            return Err(unsupported(format!("`{text}`")));
        };
        let operator = match op {
            // a <= b of integers is !(b < a).
            Operator { relation: LESS_EQUAL, exchanged, .. } if !float => {
                Operator { relation: LESS, exchanged: !exchanged, negated: true, ..op }
            }
            // `ne` of floats is false where one is a NaN, unlike `neu`.
            Operator { relation: EQUAL, negated: true, valid: Valid::All, .. } if float => {
                Operator { relation: UNEQUAL, negated: false, ..op }
            }
            _ => op,
        };
        Ok(Self { handler: relations[operator.relation as usize], operator, bool_op, ty })
    }

    /// Appends it: `rest` are the operands a, b, and c where there is a Boolean operation.
    fn emit(&self, d: &mut Decoder<'_, '_>, dsts: [Reg; 2], rest: &[Operand<'_>]) -> Result<(), Refusal> {
        let (a, b, c) = match (rest, self.bool_op) {
            ([a, b], None) => (a, b, None),
            ([a, b, c], Some(_)) => (a, b, Some(c)),
            _ => return Err(invalid("a comparison takes a, b, and c if it has a Boolean operation")),
        };
        let (mut a, mut b) = (d.src(a, self.ty)?, d.src(b, self.ty)?);
        if self.operator.exchanged {
            std::mem::swap(&mut a, &mut b);
        }
        let (c, not_c) = c.map_or(Ok((Reg::NONE, false)), |c| d.pred(c))?;
        let imm = self.bool_op.unwrap_or(combine::NONE)
            | if not_c { combine::NOT_C } else { 0 }
            | if self.operator.negated { combine::NOT_CMP } else { 0 };
        let class = match self.ty {
            Type::F32 => Class::Float32,
            Type::F64 => Class::Float64,
            ty if ty.kind() == TypeKind::Float => Class::Half,
            _ => Class::Integer,
        };
        d.lane((self.handler)(d.isa), class, &dsts, &[a, b, c], imm);
        Ok(())
    }

    fn packed(&self) -> bool {
        matches!(self.ty, Type::F16X2 | Type::BF16X2)
    }
}

/// The operator among the modifiers.
fn operator_of(mods: &mut Mods<'_, '_>) -> Result<Operator, Refusal> {
    mods.one_of(OPERATORS).ok_or_else(|| invalid(format!("`{}` without a comparison", mods.written())))
}

/// `setp.CmpOp{.ftz}.type p{|q}, a, b;` and `setp.CmpOp.BoolOp{.ftz}.type p{|q}, a, b, {!}c;`
fn setp(d: &mut Decoder<'_, '_>, inst: &Instruction<'_>) -> Result<(), Refusal> {
    let mut mods = Mods::new(inst);
    let op = operator_of(&mut mods)?;
    let bool_op = mods.one_of(BOOL_OPS);
    let ftz = mods.take("ftz");
    let comparison = Comparison::new(op, ftz, bool_op, mods.ty()?, &mods.written())?;
    mods.finish()?;
    let Some((dst, rest)) = inst.operands.split_first() else {
        return Err(invalid("`setp` without operands"));
    };
    let dsts = match dst {
        Operand::Pair(p, q) => [d.dst(p, Type::Pred)?, d.dst(q, Type::Pred)?],
        p => [d.dst(p, Type::Pred)?, Reg::NONE],
    };
    comparison.emit(d, dsts, rest)
}

/// The value that `set` writes for true: all ones, or one; in a packed result in each half.
fn truth(dst: Type, src: Type) -> Option<u64> {
    let packed = matches!(src, Type::F16X2 | Type::BF16X2);
    let half = matches!(src, Type::F16 | Type::BF16);
    Some(match dst {
        Type::U16 | Type::S16 if half => 0xffff,
        Type::U32 | Type::S32 => 0xffff_ffff,
        Type::F32 if !half && !packed => 0x3f80_0000,
        Type::F16 if !packed && src != Type::BF16 => 0x3c00,
        Type::BF16 if !packed => 0x3f80,
        Type::F16X2 if src == dst => 0x3c00_3c00,
        Type::BF16X2 if src == dst => 0x3f80_3f80,
        _ => return None,
    })
}

/// `set.CmpOp{.BoolOp}{.ftz}.dtype.stype d, a, b{, {!}c};`: a comparison into a predicate, and a selection by it.
fn set(d: &mut Decoder<'_, '_>, inst: &Instruction<'_>) -> Result<(), Refusal> {
    let mut mods = Mods::new(inst);
    let op = operator_of(&mut mods)?;
    let bool_op = mods.one_of(BOOL_OPS);
    let ftz = mods.take("ftz");
    let (dst_ty, src_ty) = (mods.ty()?, mods.ty()?);
    let comparison = Comparison::new(op, ftz, bool_op, src_ty, &mods.written())?;
    let truth = truth(dst_ty, src_ty).filter(|_| !(ftz && dst_ty == Type::BF16));
    let truth = truth.ok_or_else(|| unsupported(format!("`{}`", mods.written())))?;
    mods.finish()?;
    let Some((dst, rest)) = inst.operands.split_first() else {
        return Err(invalid("`set` without operands"));
    };
    let dst = d.dst(dst, dst_ty)?;
    let width = width_of(dst_ty);
    let p = d.temp(Width::Pred);
    let handler = select::<Choice<u32>>(d.isa);
    let choose = |d: &mut Decoder<'_, '_>, dst: Reg, one: Reg, zero: Reg, p: Reg| {
        d.lane(handler, Class::Integer, &[dst], &[one, zero, p], 0).defs = Defs::Select;
    };
    let zero = d.constant(width, 0);
    let ones = d.constant(width, truth);
    if !comparison.packed() {
        comparison.emit(d, [p, Reg::NONE], rest)?;
        choose(d, dst, ones, zero, p);
        return Ok(());
    }
    let q = d.temp(Width::Pred);
    comparison.emit(d, [p, q], rest)?;
    let (low, high) = (d.constant(width, truth & 0xffff), d.constant(width, truth & 0xffff_0000));
    let (with_high, without) = (d.temp(width), d.temp(width));
    choose(d, with_high, ones, high, p);
    choose(d, without, low, zero, p);
    choose(d, dst, with_high, without, q);
    Ok(())
}

// -------------------------------------------------------------------------------------------------- selections

/// Selection of values of this width.
struct Choice<T>(PhantomData<T>);

impl<T: Value> Select for Choice<T> {
    type A = T;
}

/// `selp.type d, a, b, {!}p;`
fn selp(d: &mut Decoder<'_, '_>, inst: &Instruction<'_>) -> Result<(), Refusal> {
    let mut mods = Mods::new(inst);
    let ty = mods.ty()?;
    mods.finish()?;
    let handler = handler_of(by_width!(select Choice), ty, inst)?;
    let [dst, a, b, p] = operands(inst)?;
    let dst = d.dst(dst, ty)?;
    let (mut a, mut b) = (d.src(a, ty)?, d.src(b, ty)?);
    let (p, negated) = d.pred(p)?;
    if negated {
        std::mem::swap(&mut a, &mut b);
    }
    d.lane(handler(d.isa), Class::Integer, &[dst], &[a, b, p], 0).defs = Defs::Select;
    Ok(())
}

const SLCT: &[Form] = &[
    Form::new("slct", &["s32"], "t=ttu", by_width!(ternary ChoiceBySign)),
    Form::new("slct", &["f32"], "t=ttu", by_width!(ternary ChoiceByFloat)),
    Form::new("slct", &["ftz", "f32"], "t=ttu", by_width!(ternary ChoiceByFloat)).with(1),
];

ops! {
    Ternary ChoiceBySign<T: Value>(_, a: T, b: T, c: i32) -> T { if c >= 0 { a } else { b } }
    /// -0 chooses a, a NaN b; `imm` 1 takes subnormal numbers for zeros.
    Ternary ChoiceByFloat<T: Value>(ftz, a: T, b: T, c: f32) -> T {
        if (if ftz != 0 { flushed(c) } else { c }) >= 0.0 { a } else { b }
    }
}

// -------------------------------------------------------------------------------------------------- moves

ops! {
    Unary Move<T: Value>(_, a: T) -> T { a }
}

/// The lower half of 64 bits.
struct Low;

lane_op!(Low, |_, a: u64| -> u32 { a as u32 });

fn mov(d: &mut Decoder<'_, '_>, inst: &Instruction<'_>) -> Result<(), Refusal> {
    let mut mods = Mods::new(inst);
    let ty = mods.ty()?;
    mods.finish()?;
    let [dst, src] = operands(inst)?;
    match (dst, src) {
        (Operand::Vector(parts), src) => return mov_unpack(d, inst, ty, parts, src),
        (dst, Operand::Vector(parts)) => return mov_pack(d, inst, ty, dst, parts),
        _ => {}
    }
    let dst = d.dst(dst, ty)?;
    if ty == Type::Pred {
        let (src, negated) = d.pred(src)?;
        let table = if negated { 0b0011 } else { 0b1100 };
        d.lane(predicate_logic, Class::Integer, &[dst], &[src, Reg::NONE], table);
        return Ok(());
    }
    let handler = match ty {
        Type::B128 => unary::<Move<u128>>,
        _ => handler_of(by_width!(unary Move), ty, inst)?,
    };
    if let Operand::Name(name, 0) = src {
        if let Some(clock) = Clock::from_name(name) {
            if clock.ty.bits() != ty.bits() {
                let bits = clock.ty.bits();
                return Err(invalid(format!("`{name}` has {bits} bits, the instruction reads {ty}")));
            }
            d.warp(clock, Class::Integer, &[dst], &[]);
            return Ok(());
        }
        if let Some(special) = Special::from_name(name) {
            // Old code reads the lower half of a special register that has grown since.
            let handler: Handler = match (width_of(ty), special.width()) {
                (Width::B32, Width::B64) => unary::<Low>,
                (Width::B16, Width::B32) => unary::<Move<u16>>,
                (wanted, width) if wanted == width => handler,
                _ => return Err(invalid(format!("`{name}` does not have the width of {ty}"))),
            };
            let src = d.special(special);
            d.lane(handler(d.isa), Class::Integer, &[dst], &[src], 0);
            return Ok(());
        }
    }
    let src = match d.own_parameter(src, ty) {
        Some(address) => address,
        None => d.src(src, ty)?,
    };
    d.lane(handler(d.isa), Class::Integer, &[dst], &[src], 0);
    Ok(())
}

/// A whole of type `W` in parts of type `P`.
struct Parts<W, P>(PhantomData<(W, P)>);

macro_rules! parts {
    ($($w:ident $p:ident $n:literal;)*) => {$(
        impl Split for Parts<$w, $p> {
            type Whole = $w;
            type Part = $p;
            const PARTS: usize = $n;
            #[inline(always)]
            fn part(whole: $w, i: usize) -> $p { (whole >> (i as u32 * $p::BITS)) as $p }
            #[inline(always)]
            fn whole(part: $p, i: usize) -> $w { $w::from(part) << (i as u32 * $p::BITS) }
            #[inline(always)]
            fn join(a: $w, b: $w) -> $w { a | b }
        }
    )*
        /// Bits of the whole, number of parts, a part's type, and the handlers of packing and unpacking.
        const PACKINGS: &[(u32, usize, Type, Handler, Handler)] = &[$(
            ($w::BITS, $n, bits_of($p::BITS), pack::<Parts<$w, $p>>, unpack::<Parts<$w, $p>>)
        ),*];
    };
}
parts! {
    u16 u8 2;
    u32 u16 2;
    u32 u8 4;
    u64 u32 2;
    u64 u16 4;
    u128 u64 2;
    u128 u32 4;
}

const fn bits_of(bits: u32) -> Type {
    match bits {
        8 => Type::B8,
        16 => Type::B16,
        32 => Type::B32,
        _ => Type::B64,
    }
}

/// The packing of `n` parts into a type, and a check of the parts' declared widths (8 and 16 bits lie in registers alike).
fn packing(
    d: &mut Decoder<'_, '_>,
    inst: &Instruction<'_>,
    ty: Type,
    parts: &[Operand<'_>],
) -> Result<(Type, Handler, Handler), Refusal> {
    let found = PACKINGS.iter().find(|(bits, n, ..)| *bits == ty.bits() && *n == parts.len());
    let (Some((_, _, part, pack, unpack)), TypeKind::Bits) = (found, ty.kind()) else {
        return Err(invalid(format!("`{}` of {} parts", written(inst), parts.len())));
    };
    for operand in parts {
        let Operand::Name(name, 0) = operand else { continue };
        match d.register(name) {
            Ok((_, declared)) if declared.bits() != part.bits() => {
                return Err(invalid(format!("`{name}` is {declared}, a part has {} bits", part.bits())));
            }
            _ => {}
        }
    }
    Ok((*part, *pack, *unpack))
}

fn mov_pack(
    d: &mut Decoder<'_, '_>,
    inst: &Instruction<'_>,
    ty: Type,
    dst: &Operand<'_>,
    parts: &[Operand<'_>],
) -> Result<(), Refusal> {
    let (part, pack, _) = packing(d, inst, ty, parts)?;
    let dst = d.dst(dst, ty)?;
    let srcs = parts.iter().map(|p| d.src(p, part)).collect::<Result<Vec<_>, _>>()?;
    d.lane(pack(d.isa), Class::Integer, &[dst], &srcs, 0).defs = Defs::Moved(Moved::Join(part.bytes() as u8));
    Ok(())
}

fn mov_unpack(
    d: &mut Decoder<'_, '_>,
    inst: &Instruction<'_>,
    ty: Type,
    parts: &[Operand<'_>],
    src: &Operand<'_>,
) -> Result<(), Refusal> {
    let (part, _, unpack) = packing(d, inst, ty, parts)?;
    let src = d.src(src, ty)?;
    let dsts = parts.iter().map(|p| d.dst(p, part)).collect::<Result<Vec<_>, _>>()?;
    d.lane(unpack(d.isa), Class::Integer, &dsts, &[src], 0).defs =
        Defs::Moved(Moved::Split(part.bytes() as u8));
    Ok(())
}

/// A clock: how many instructions the block has executed, so that two runs see the same time.
#[derive(Clone, Copy, Debug)]
struct Clock {
    ty: Type,
    shift: u32,
}

impl Clock {
    /// The clock of a special register. A nanosecond of `%globaltimer` is one instruction, too.
    fn from_name(name: &str) -> Option<Self> {
        let (ty, shift) = match name {
            "%clock" | "%globaltimer_lo" => (Type::B32, 0),
            "%clock_hi" | "%globaltimer_hi" => (Type::B32, 32),
            "%clock64" | "%globaltimer" => (Type::B64, 0),
            _ => return None,
        };
        Some(Self { ty, shift })
    }
}

impl WarpOp for Clock {
    fn execute(&self, ctx: &mut Context<'_>, inst: &Inst, mask: u32) -> Result<(), Stop> {
        let ticks = ctx.ticks >> self.shift;
        let dst = inst.dst(0);
        match self.ty {
            Type::B64 => ctx.regs().set::<u64>(dst, mask, &[ticks; LANES]),
            _ => ctx.regs().set::<u32>(dst, mask, &[ticks as u32; LANES]),
        }
        ctx.regs().set_defined(dst, mask, mask);
        Ok(())
    }
}
