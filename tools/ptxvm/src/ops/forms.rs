//! Tables of instructions whose decoding is the same but for their names, types and handlers.
//!
//! A [`Form`] is one spelling: an opcode, the modifiers beside the type, and the handler for each type. The modifiers
//! must be exactly those of a form, so none is ignored.

use crate::decode::decoder::Decoder;
use crate::decode::mods::written;
use crate::decode::{Refusal, invalid, unsupported};
use crate::machine::inst::{Class, Inst, LaneFn};
use crate::machine::isa::Isa;
use crate::machine::registers::Reg;
use crate::ptx::ast::{Instruction, Operand};
use crate::types::Type;

/// Picks a handler, such as `binary::<Add<u32>>`.
pub type Handler = fn(Isa) -> LaneFn;

/// Handlers by the instruction's type.
pub type Handlers = &'static [(Type, Handler)];

/// One spelling of an instruction.
#[derive(Clone, Copy, Debug)]
pub struct Form {
    /// The part before the first dot.
    pub opcode: &'static str,
    /// All modifiers but the first type, in any order: `&["hi", "sat"]`.
    pub mods: &'static [&'static str],
    /// Destinations, `=`, sources; a letter for each register of the bytecode:
    /// `t` the type, `w` twice its width, `u` 32 bits, `p` a predicate; without an operand: `c` the carry flag, `_` none.
    pub shape: &'static str,
    /// The types it exists for.
    pub handlers: Handlers,
    /// Constants of the operation.
    pub imm: u64,
}

impl Form {
    /// A form without constants.
    pub const fn new(
        opcode: &'static str,
        mods: &'static [&'static str],
        shape: &'static str,
        handlers: Handlers,
    ) -> Self {
        Self { opcode, mods, shape, handlers, imm: 0 }
    }

    /// The form with constants.
    #[must_use]
    pub const fn with(mut self, imm: u64) -> Self {
        self.imm = imm;
        self
    }
}

/// The same modifiers, in whatever order: assemblers do not mind.
fn same(a: &[&str], b: &[&str]) -> bool {
    let within = |a: &[&str], b: &[&str]| a.iter().all(|x| count(a, x) == count(b, x));
    a.len() == b.len() && within(a, b)
}

fn count(list: &[&str], x: &str) -> usize {
    list.iter().filter(|y| **y == x).count()
}

/// Twice as wide.
fn doubled(ty: Type) -> Result<Type, Refusal> {
    Ok(match ty.bits() {
        16 => Type::B32,
        32 => Type::B64,
        64 => Type::B128,
        _ => return Err(unsupported(format!("a result twice as wide as {ty}"))),
    })
}

/// The form that an instruction is written in, and its type and handler.
///
/// # Errors
/// `Unsupported`: no form has these modifiers, or none of them this type.
pub fn find(
    forms: &'static [Form],
    inst: &Instruction<'_>,
) -> Result<(&'static Form, Type, Handler), Refusal> {
    let at = inst.modifiers.iter().position(|m| Type::from_name(m).is_some());
    let ty = at.and_then(|at| Type::from_name(inst.modifiers[at]));
    let Some((at, ty)) = at.zip(ty) else {
        return Err(unsupported(format!("`{}` without a type", written(inst))));
    };
    let mut mods = inst.modifiers.clone();
    mods.remove(at);
    for form in forms.iter().filter(|form| form.opcode == inst.opcode && same(form.mods, &mods)) {
        if let Some((_, handler)) = form.handlers.iter().find(|(t, _)| *t == ty) {
            return Ok((form, ty, *handler));
        }
    }
    Err(unsupported(format!("`{}`", written(inst))))
}

/// The registers of a form, destinations and sources, from its operands.
///
/// # Errors
/// Another number of operands, or operands that are not of the types.
pub fn registers(
    d: &mut Decoder<'_, '_>,
    form: &Form,
    ty: Type,
    inst: &Instruction<'_>,
) -> Result<(Vec<Reg>, Vec<Reg>), Refusal> {
    let wanted = form.shape.chars().filter(|c| !matches!(c, '=' | '_' | 'c')).count();
    if inst.operands.len() != wanted {
        let n = inst.operands.len();
        return Err(invalid(format!("`{}` takes {wanted} operands, {n} are given", written(inst))));
    }
    let mut operands = inst.operands.iter();
    let (mut dsts, mut srcs) = (Vec::new(), Vec::new());
    let mut is_dst = true;
    for letter in form.shape.chars() {
        let ty = match letter {
            '=' => {
                is_dst = false;
                continue;
            }
            't' => ty,
            'w' => doubled(ty)?,
            'u' => Type::B32,
            'p' => Type::Pred,
            _ => {
                let reg = if letter == 'c' { d.carry_flag() } else { Reg::NONE };
                if is_dst {
                    dsts.push(reg)
                } else {
                    srcs.push(reg)
                }
                continue;
            }
        };
        let operand = operands.next().unwrap_or(&Operand::Sink);
        if is_dst { dsts.push(d.dst(operand, ty)?) } else { srcs.push(d.src(operand, ty)?) }
    }
    Ok((dsts, srcs))
}

/// Decodes an instruction whose form is in the table.
///
/// # Errors
/// As [`find`] and [`registers`].
pub fn decode<'d>(
    d: &'d mut Decoder<'_, '_>,
    forms: &'static [Form],
    class: Class,
    inst: &Instruction<'_>,
) -> Result<&'d mut Inst, Refusal> {
    let (form, ty, handler) = find(forms, inst)?;
    let (dsts, srcs) = registers(d, form, ty, inst)?;
    Ok(d.lane(handler(d.isa), class, &dsts, &srcs, form.imm))
}

/// `table![binary Add: U32 u32, S32 u32]`: handlers `binary::<Add<u32>>` by type.
macro_rules! table {
    ($lift:ident $op:ident: $($ty:ident $t:ty),* $(,)?) => {
        &[$((crate::types::Type::$ty, $lift::<$op<$t>> as crate::ops::forms::Handler)),*]
    };
}

/// Handlers for integers of 16, 32 and 64 bits where the sign does not matter.
macro_rules! unsigned {
    ($lift:ident $op:ident) => {
        crate::ops::forms::table![$lift $op: U16 u16, S16 u16, U32 u32, S32 u32, U64 u64, S64 u64]
    };
}

/// Handlers for integers of 16, 32 and 64 bits where the sign matters.
macro_rules! signed {
    ($lift:ident $op:ident) => {
        crate::ops::forms::table![$lift $op: U16 u16, S16 i16, U32 u32, S32 i32, U64 u64, S64 i64]
    };
}

pub(super) use {signed, table, unsigned};
