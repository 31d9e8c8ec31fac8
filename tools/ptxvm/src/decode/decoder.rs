//! The decoder of one function: names, virtual registers, constants, and the code so far.

use std::collections::{BTreeSet, HashMap};

use super::symbols::{Symbol, Symbols};
use super::{Refusal, invalid, unsupported};
use crate::machine::inst::{Class, Exec, Guard, Inst, LaneFn, WarpOp};
use crate::machine::isa::Isa;
use crate::machine::layout::{CONST_WINDOW, LOCAL_WINDOW, PARAM_WINDOW, SHARED_WINDOW};
use crate::machine::program::{Constant, Special};
use crate::machine::registers::{Reg, Width};
use crate::ptx::ast::{Instruction, Operand, Register, Variable};
use crate::types::{Space, Type, TypeKind};

/// The origin of a virtual register's value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Virtual {
    /// A register of the program.
    Plain(Width),
    /// A constant, written when a frame starts.
    Constant(Width, Constant),
    /// A special register, written when a frame starts.
    Special(Special),
}

impl Virtual {
    /// Width of the register.
    pub const fn width(self) -> Width {
        match self {
            Self::Plain(width) | Self::Constant(width, _) => width,
            Self::Special(special) => special.width(),
        }
    }
}

/// The address of a memory access: a base register (32 or 64 bits, or none) and bytes added to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AddressOperand {
    /// The base; with one of 32 bits the sum is one of 32 bits, too. A variable's address comes as a 64-bit constant register.
    pub base: Reg,
    /// Added with wrap-around.
    pub offset: i64,
}

/// A name in a function's scope.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Binding {
    /// A register, or for a vector its first of several in a row.
    Register(Reg, Type),
    /// A variable of the function's own.
    Variable(Space, Constant),
}

#[derive(Debug)]
struct Range {
    ty: Type,
    count: u32,
    made: HashMap<u32, Reg>,
}

#[derive(Debug, Default)]
struct Scope<'a> {
    names: HashMap<&'a str, Binding>,
    ranges: HashMap<&'a str, Range>,
}

/// Decodes one function.
pub struct Decoder<'m, 'a> {
    /// The module's symbols.
    pub(crate) symbols: &'m Symbols<'a>,
    /// The instruction set to pick handlers for.
    pub isa: Isa,
    /// First address of the window in which the function's parameters lie.
    pub(crate) parameters: u64,
    scopes: Vec<Scope<'a>>,
    pub(crate) virtuals: Vec<Virtual>,
    constants: HashMap<(Width, Constant), Reg>,
    specials: HashMap<Special, Reg>,
    pub(crate) code: Vec<Inst>,
    pub(crate) guard: Option<Guard>,
    pub(crate) place: u32,
    /// Whether the order in which blocks run can show in results, or blocks may wait for each other.
    pub(crate) ordered: bool,
    /// The smallest access that may be one to shared memory, in bytes; 16 where there is none.
    pub(crate) shared_grain: u32,
    /// Whether copies arrive at mbarriers, or the asynchronous proxy touches shared memory.
    pub(crate) asynchronous: bool,
    carry: Option<Reg>,
    /// Shared variables that the function names.
    pub(crate) shared_used: BTreeSet<u32>,
}

/// The width of the register that holds a type.
pub const fn width_of(ty: Type) -> Width {
    match ty.bits() {
        1 => Width::Pred,
        8 | 16 => Width::B16,
        32 => Width::B32,
        64 => Width::B64,
        _ => Width::B128,
    }
}

const fn width_bits(width: Width) -> u32 {
    match width {
        Width::None => 0,
        Width::Pred => 1,
        Width::B16 => 16,
        Width::B32 => 32,
        Width::B64 => 64,
        Width::B128 => 128,
    }
}

impl<'m, 'a> Decoder<'m, 'a> {
    pub(crate) fn new(symbols: &'m Symbols<'a>, isa: Isa, parameters: u64) -> Self {
        Self {
            symbols,
            isa,
            parameters,
            scopes: vec![Scope::default()],
            virtuals: Vec::new(),
            constants: HashMap::new(),
            specials: HashMap::new(),
            code: Vec::new(),
            guard: None,
            place: 0,
            ordered: false,
            shared_grain: 16,
            asynchronous: false,
            carry: None,
            shared_used: BTreeSet::new(),
        }
    }

    // ---------------------------------------------------------------------------------------------- registers

    fn virtual_register(&mut self, width: Width, origin: Virtual) -> Reg {
        let slot = self.virtuals.len() as u32;
        self.virtuals.push(origin);
        Reg { width, slot }
    }

    /// A register of the decoder's own, for operations that become several instructions.
    pub fn temp(&mut self, width: Width) -> Reg {
        self.virtual_register(width, Virtual::Plain(width))
    }

    pub(crate) fn is_constant(&self, reg: Reg) -> bool {
        matches!(self.virtuals.get(reg.slot as usize), Some(Virtual::Constant(..)))
    }

    /// The carry flag `CC.CF` of the function.
    pub fn carry_flag(&mut self) -> Reg {
        if let Some(carry) = self.carry {
            return carry;
        }
        let carry = self.temp(Width::Pred);
        *self.carry.insert(carry)
    }

    /// A register that always holds `bits`.
    pub fn constant(&mut self, width: Width, bits: u64) -> Reg {
        self.constant_of(width, Constant::Bits(bits))
    }

    pub(crate) fn constant_of(&mut self, width: Width, value: Constant) -> Reg {
        if let Some(reg) = self.constants.get(&(width, value)) {
            return *reg;
        }
        let reg = self.virtual_register(width, Virtual::Constant(width, value));
        self.constants.insert((width, value), reg);
        reg
    }

    /// A register that holds a special register's value, which does not change while a block runs.
    pub fn special(&mut self, special: Special) -> Reg {
        if let Some(reg) = self.specials.get(&special) {
            return *reg;
        }
        let reg = self.virtual_register(special.width(), Virtual::Special(special));
        self.specials.insert(special, reg);
        reg
    }

    // ---------------------------------------------------------------------------------------------- names

    pub(crate) fn open_scope(&mut self) {
        self.scopes.push(Scope::default());
    }

    pub(crate) fn close_scope(&mut self) {
        self.scopes.pop();
    }

    fn scope(&mut self) -> &mut Scope<'a> {
        self.scopes.last_mut().expect("the function's scope stays open")
    }

    pub(crate) fn declare_registers(&mut self, r: &Register<'a>) -> Result<(), Refusal> {
        if r.vector != 1 {
            return Err(unsupported(format!("registers of a vector type, `{}`", r.name)));
        }
        let width = width_of(r.ty);
        if let Some(count) = r.count {
            self.scope().ranges.insert(r.name, Range { ty: r.ty, count, made: HashMap::new() });
        } else {
            let reg = self.temp(width);
            self.scope().names.insert(r.name, Binding::Register(reg, r.ty));
        }
        Ok(())
    }

    pub(crate) fn declare_variable(&mut self, v: &Variable<'a>, address: Constant) {
        self.scope().names.insert(v.name, Binding::Variable(v.space, address));
    }

    pub(crate) fn binding(&mut self, name: &str) -> Option<Binding> {
        for i in (0..self.scopes.len()).rev() {
            if let Some(binding) = self.scopes[i].names.get(name) {
                return Some(*binding);
            }
            let digits = name.bytes().rev().take_while(u8::is_ascii_digit).count();
            let mut at = name.len() - digits;
            // `%r10` may be number 10 of `%r<..>` or number 0 of `%r1<..>`.
            while at < name.len() {
                let (prefix, number) = name.split_at(at);
                let number = number.parse().ok().filter(|_| number == "0" || !number.starts_with('0'));
                if let (Some(range), Some(number)) = (self.scopes[i].ranges.get(prefix), number)
                    && number < range.count
                {
                    let ty = range.ty;
                    if let Some(reg) = range.made.get(&number) {
                        return Some(Binding::Register(*reg, ty));
                    }
                    let reg = self.temp(width_of(ty));
                    self.scopes[i].ranges.get_mut(prefix)?.made.insert(number, reg);
                    return Some(Binding::Register(reg, ty));
                }
                at += 1;
            }
        }
        None
    }

    /// The register of a name, with the type it was declared with.
    ///
    /// # Errors
    /// The name is no register.
    pub fn register(&mut self, name: &str) -> Result<(Reg, Type), Refusal> {
        match self.binding(name) {
            Some(Binding::Register(reg, ty)) => Ok((reg, ty)),
            Some(Binding::Variable(..)) => Err(invalid(format!("`{name}` is a variable, not a register"))),
            None => Err(invalid(format!("`{name}` is not declared"))),
        }
    }

    /// The address of a variable or function in its own space, and that space.
    pub(crate) fn symbol(&mut self, name: &str) -> Option<(Space, Constant)> {
        if let Some(binding) = self.binding(name) {
            return match binding {
                Binding::Variable(space, constant) => Some((space, constant)),
                Binding::Register(..) => None,
            };
        }
        match self.symbols.get(name)? {
            Symbol::Variable { space, address } => {
                if let Constant::Shared(index, _) = address {
                    self.shared_used.insert(*index);
                }
                Some((*space, *address))
            }
            Symbol::Function(index) => Some((Space::Global, Constant::Function(*index))),
            Symbol::Refused(_) => None,
        }
    }

    /// Why a name has no address.
    fn unknown(&mut self, name: &str) -> Refusal {
        match self.symbols.refusal(name).filter(|_| self.binding(name).is_none()) {
            Some(why) => why.clone(),
            None => invalid(format!("`{name}` is not declared")),
        }
    }

    // ---------------------------------------------------------------------------------------------- operands

    /// A destination of exactly the width of `ty`; `_` is the sink.
    ///
    /// # Errors
    /// Not a register, or of another width.
    pub fn dst(&mut self, op: &Operand<'_>, ty: Type) -> Result<Reg, Refusal> {
        match op {
            Operand::Sink => Ok(Reg::NONE),
            Operand::Name(name, 0) => {
                let (reg, declared) = self.register(name)?;
                if reg.width == width_of(ty) {
                    Ok(reg)
                } else {
                    Err(invalid(format!("`{name}` is {declared}, the instruction writes {ty}")))
                }
            }
            _ => Err(invalid("a destination must be a register")),
        }
    }

    /// A destination at least as wide as `ty`, as `ld` and `cvt` allow.
    ///
    /// # Errors
    /// Not a register, or narrower.
    pub fn dst_wide(&mut self, op: &Operand<'_>, ty: Type) -> Result<Reg, Refusal> {
        if let Operand::Name(name, 0) = op {
            let (reg, declared) = self.register(name)?;
            if width_bits(reg.width) >= ty.bits() && (reg.width == Width::Pred) == (ty == Type::Pred) {
                return Ok(reg);
            }
            return Err(invalid(format!("`{name}` is {declared}, too narrow for {ty}")));
        }
        self.dst(op, ty)
    }

    /// A source of exactly the width of `ty`: a register, a special register, an immediate, or a symbol's address.
    ///
    /// # Errors
    /// Another width, an unknown name, or not a value.
    pub fn src(&mut self, op: &Operand<'_>, ty: Type) -> Result<Reg, Refusal> {
        let reg = self.src_wide(op, ty)?;
        if reg.width == width_of(ty) {
            return Ok(reg);
        }
        let name = if let Operand::Name(name, _) = op { name } else { "operand" };
        Err(invalid(format!("`{name}` has {} bits, the instruction reads {ty}", width_bits(reg.width))))
    }

    /// A source at least as wide as `ty`, as `st` and `cvt` allow. Immediates get the width of `ty`.
    ///
    /// # Errors
    /// Narrower, an unknown name, or not a value.
    pub fn src_wide(&mut self, op: &Operand<'_>, ty: Type) -> Result<Reg, Refusal> {
        let width = width_of(ty);
        match op {
            Operand::Name(name, addend) => {
                if let Some(special) = Special::from_name(name) {
                    let reg = self.special(special);
                    return self.fits(name, reg, ty);
                }
                if *addend == 0
                    && let Some(Binding::Register(reg, _)) = self.binding(name)
                {
                    return self.fits(name, reg, ty);
                }
                let Some((_, address)) = self.symbol(name) else {
                    return Err(match name.starts_with('%') && self.binding(name).is_none() {
                        true if Special::is_known(name) => unsupported(format!("special register `{name}`")),
                        _ => self.unknown(name),
                    });
                };
                if !matches!(width, Width::B32 | Width::B64) {
                    return Err(invalid(format!("the address of `{name}` has 32 or 64 bits, not {ty}")));
                }
                Ok(self.constant_of(width, address.plus(*addend)))
            }
            Operand::Integer(bits) => {
                if width == Width::Pred {
                    return Ok(self.constant(Width::Pred, u64::from(*bits != 0)));
                }
                if ty.kind() == TypeKind::Float && matches!(ty, Type::F32 | Type::F64) {
                    return Err(invalid(format!("an integer where {ty} is read")));
                }
                let keep = if ty.bits() >= 64 { u64::MAX } else { (1 << ty.bits()) - 1 };
                Ok(self.constant(width, bits & keep))
            }
            Operand::F32(bits) if width == Width::B32 => Ok(self.constant(width, u64::from(*bits))),
            Operand::F32(bits) if ty == Type::F64 => {
                Ok(self.constant(width, f64::from(f32::from_bits(*bits)).to_bits()))
            }
            Operand::F64(bits) if width == Width::B64 => Ok(self.constant(width, *bits)),
            Operand::F64(bits) if ty == Type::F32 => {
                Ok(self.constant(width, u64::from((f64::from_bits(*bits) as f32).to_bits())))
            }
            Operand::Sink => Ok(Reg::NONE),
            _ => Err(invalid(format!("no value of type {ty}"))),
        }
    }

    fn fits(&self, name: &str, reg: Reg, ty: Type) -> Result<Reg, Refusal> {
        if width_bits(reg.width) >= ty.bits() && (reg.width == Width::Pred) == (ty == Type::Pred) {
            Ok(reg)
        } else {
            Err(invalid(format!("`{name}` has {} bits, the instruction reads {ty}", width_bits(reg.width))))
        }
    }

    /// A predicate source and whether `!` stands before it.
    ///
    /// # Errors
    /// Not a predicate.
    pub fn pred(&mut self, op: &Operand<'_>) -> Result<(Reg, bool), Refusal> {
        match op {
            Operand::Not(name) => Ok((self.src(&Operand::Name(name, 0), Type::Pred)?, true)),
            _ => Ok((self.src(op, Type::Pred)?, false)),
        }
    }

    /// The operand of `[...]` for an access to `space`. A variable's address is turned generic for generic accesses.
    ///
    /// # Errors
    /// Not an address, coordinates (tensor copies), or a variable of another space.
    pub fn address(&mut self, op: &Operand<'_>, space: Space) -> Result<AddressOperand, Refusal> {
        let Operand::Address(address) = op else {
            return Err(invalid("an address in brackets is missing"));
        };
        if !address.rest.is_empty() {
            return Err(unsupported("an address with coordinates"));
        }
        let Some(name) = address.base else {
            return Ok(AddressOperand { base: Reg::NONE, offset: address.offset });
        };
        if let Some(Binding::Register(base, declared)) = self.binding(name) {
            if !matches!(base.width, Width::B32 | Width::B64) {
                return Err(invalid(format!("`{name}` is {declared}; an address has 32 or 64 bits")));
            }
            return Ok(AddressOperand { base, offset: address.offset });
        }
        let Some((own, constant)) = self.symbol(name) else {
            return Err(self.unknown(name));
        };
        if space != own && space != Space::Generic {
            return Err(invalid(format!("`{name}` lies in {own} memory, the access names {space}")));
        }
        // Parameters are always addressed generically: a kernel's lie in their bank, a call's in local memory.
        let constant = if space == Space::Generic { constant.generic(own) } else { constant };
        Ok(AddressOperand { base: self.constant_of(Width::B64, constant), offset: address.offset })
    }

    /// The offset in the parameter bank of an operand of `[...]` that names a kernel's parameter.
    pub(crate) fn in_bank(&mut self, op: &Operand<'_>) -> Option<u64> {
        let Operand::Address(address) = op else { return None };
        let (space, constant) = self.symbol(address.base?)?;
        let Constant::Bits(at) = constant else { return None };
        let offset = at.wrapping_sub(PARAM_WINDOW).checked_add_signed(address.offset)?;
        (space == Space::Param && self.parameters == PARAM_WINDOW && address.rest.is_empty())
            .then_some(offset)
    }

    /// The address that `mov` takes of a parameter of a function, which is one of local memory (PTX ISA, `mov`).
    pub(crate) fn own_parameter(&mut self, op: &Operand<'_>, ty: Type) -> Option<Reg> {
        let Operand::Name(name, addend) = op else { return None };
        let Binding::Variable(Space::Param, Constant::Local(at, LOCAL_WINDOW)) = self.binding(name)? else {
            return None;
        };
        let at = u32::try_from(i64::from(at) + addend).ok()?;
        Some(self.constant_of(width_of(ty), Constant::Local(at, 0)))
    }

    // ---------------------------------------------------------------------------------------------- emission

    /// Appends an instruction under the current guard and place; its other fields can be set through the result.
    pub fn emit(&mut self, exec: Exec, class: Class, dsts: &[Reg], srcs: &[Reg]) -> &mut Inst {
        self.code.push(Inst { guard: self.guard, ..Inst::new(exec, class, dsts, srcs, self.place) });
        self.code.last_mut().expect("just pushed")
    }

    /// Appends an operation of lanes alone.
    pub fn lane(&mut self, f: LaneFn, class: Class, dsts: &[Reg], srcs: &[Reg], imm: u64) -> &mut Inst {
        let inst = self.emit(Exec::Lane(f), class, dsts, srcs);
        inst.imm = imm;
        inst
    }

    /// Appends an operation of the warp.
    pub fn warp(&mut self, op: impl WarpOp + 'static, class: Class, dsts: &[Reg], srcs: &[Reg]) -> &mut Inst {
        self.emit(Exec::Warp(Box::new(op)), class, dsts, srcs)
    }
}

/// The operands of an instruction, `N` of them.
///
/// # Errors
/// Another number of operands.
pub fn operands<'i, 'a, const N: usize>(inst: &'i Instruction<'a>) -> Result<&'i [Operand<'a>; N], Refusal> {
    inst.operands.as_slice().try_into().map_err(|_| {
        let n = inst.operands.len();
        invalid(format!("`{}` takes {N} operands, {n} are given", super::mods::written(inst)))
    })
}

/// First address of the generic window of a space; 0 for global memory, whose addresses are generic.
pub const fn window(space: Space) -> u64 {
    match space {
        Space::Generic | Space::Global => 0,
        Space::Shared => SHARED_WINDOW,
        Space::Local => LOCAL_WINDOW,
        Space::Const => CONST_WINDOW,
        Space::Param => PARAM_WINDOW,
    }
}
