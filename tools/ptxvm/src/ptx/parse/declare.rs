//! Declarations of variables and registers, and initialisers.

use super::constant::Number;
use super::{MAX_DIMENSIONS, Parsed, Parser, QUOTED_TOKEN, REFUSED};
use crate::ptx::ast::{Initial, InitialValue, Linkage, Register, Statement, Variable};
use crate::ptx::lex::{Token, TokenKind, shorten};
use crate::types::{Space, Type, TypeKind};

/// The part of a declaration before its names: `.global .align 4 .v2 .f32`.
pub(super) struct Declared {
    /// `None` for `.reg`.
    pub(super) space: Option<Space>,
    pub(super) ty: Type,
    /// 1, 2 or 4.
    pub(super) vector: u32,
    /// The value of `.align`.
    pub(super) align: Option<u32>,
}

/// Types that a variable or register can have; the others are names for packed operands of instructions.
fn is_fundamental(ty: Type) -> bool {
    use Type::{BF16, BF16X2, E2M1X2, E2M3X2, E3M2X2, E4M3X2, E5M2X2, F32X2, S16X2, TF32, U16X2, UE8M0X2};
    !matches!(
        ty,
        BF16 | BF16X2 | F32X2 | S16X2 | TF32 | U16X2 | E4M3X2 | E5M2X2 | E2M3X2 | E3M2X2 | E2M1X2 | UE8M0X2
    )
}

/// The dimensions of an array.
pub(super) struct Shape {
    /// Outermost first; 0 for an open dimension.
    lengths: Vec<u64>,
    /// Whether the first is open: `[]`, and `[0]`, which ptxas takes for the same.
    pub(super) open: bool,
}

/// A level of braces in an initialiser.
struct Level {
    /// The most elements; 0 where the initialiser decides.
    length: u64,
    /// Bytes of one element.
    stride: u64,
    /// Whether all elements must be there: a vector's.
    whole: bool,
}

impl<'a> Parser<'a, '_> {
    /// `.align 16`
    pub(super) fn alignment(&mut self) -> Parsed<u32> {
        self.advance()?;
        let token = self.token;
        let align = self.count("an alignment")?;
        if align.is_power_of_two() {
            Ok(align)
        } else {
            self.wrong(token, format!("an alignment of {align} is no power of two"))
        }
    }

    /// Everything up to the type: `.global .align 4 .v2 .f32`.
    pub(super) fn declared(&mut self) -> Parsed<Declared> {
        let first = self.token;
        let mut space = None; // `Some(None)` is .reg
        let mut align = None;
        let mut vector = 1;
        let ty = loop {
            let token = self.token;
            let Some(name) = self.directive() else {
                return self.expected("a type");
            };
            let found = match name {
                "align" => {
                    align = Some(self.alignment()?);
                    continue;
                }
                "attribute" => {
                    self.attribute()?;
                    continue;
                }
                "v2" | "v4" if vector == 1 => {
                    vector = if name == "v2" { 2 } else { 4 };
                    self.advance()?;
                    continue;
                }
                "global" => Some(Space::Global),
                "const" => Some(Space::Const),
                "shared" => Some(Space::Shared),
                "local" => Some(Space::Local),
                "param" => Some(Space::Param),
                "reg" => None,
                _ if REFUSED.contains(&name) => {
                    return self.unsupported(token, &format!("`.{name}`"));
                }
                _ => match Type::from_name(name) {
                    Some(ty) if is_fundamental(ty) => {
                        self.advance()?;
                        break ty;
                    }
                    _ => return self.expected("a type"),
                },
            };
            if space.is_some() {
                return self.expected("a type");
            }
            space = Some(found);
            self.advance()?;
            if name == "const" && self.is(b'[') {
                return self.unsupported(token, "a bank of constant memory");
            }
        };
        let Some(space) = space else {
            return self.expected("a state space before the type");
        };
        if ty == Type::Pred && (space.is_some() || vector > 1) {
            return self.wrong(first, "only single registers can be .pred");
        }
        if ty.bits() * vector > 128 {
            return self.wrong(first, "a vector has at most 128 bits");
        }
        Ok(Declared { space, ty, vector, align })
    }

    /// `name[2][3]`: the name, then dimensions. The variable comes without its initialiser.
    pub(super) fn shape(
        &mut self,
        declared: &Declared,
        name: Token,
        linkage: Linkage,
    ) -> Parsed<(Variable<'a>, Shape)> {
        let Declared { space, ty, vector, align } = *declared;
        let unit = u64::from(ty.bytes() * vector);
        let mut shape = Shape { lengths: Vec::new(), open: false };
        while self.accept(b'[')? {
            let token = self.token;
            let length = if self.is(b']') { 0 } else { self.length()? };
            self.expect(b']')?;
            if length == 0 {
                if !shape.lengths.is_empty() {
                    return self.wrong(token, "only the first dimension of an array may be open");
                }
                shape.open = true;
            }
            if shape.lengths.len() == MAX_DIMENSIONS {
                return self.wrong(token, format!("more than {MAX_DIMENSIONS} dimensions"));
            }
            shape.lengths.push(length);
        }
        // All sizes are below 2^63, so that offsets never overflow.
        let inner = shape.lengths.iter().skip(usize::from(shape.open));
        let bytes = inner.copied().try_fold(unit, u64::checked_mul).filter(|&b| i64::try_from(b).is_ok());
        let Some(bytes) = bytes else {
            return self.wrong(name, "the size of the array does not fit in 63 bits");
        };
        let variable = Variable {
            space: space.unwrap_or(Space::Generic),
            name: self.of(name),
            ty,
            vector,
            align: align.unwrap_or(ty.bytes() * vector),
            bytes: (!shape.open).then_some(bytes),
            init: Vec::new(),
            linkage,
            line: name.line,
        };
        Ok((variable, shape))
    }

    /// The length of a dimension.
    fn length(&mut self) -> Parsed<u64> {
        let token = self.token;
        match self.constant()? {
            Number::Signed(length) if length >= 0 => Ok(length as u64),
            Number::Unsigned(length) => Ok(length),
            _ => self.wrong(token, "the length of an array must be a whole number of at least 0"),
        }
    }

    /// `a, b[3] = {1, 2, 3};`
    pub(super) fn variables(
        &mut self,
        declared: &Declared,
        linkage: Linkage,
        mut each: impl FnMut(Variable<'a>),
    ) -> Parsed<()> {
        loop {
            let token = self.token;
            self.name("the name of a variable")?;
            let (mut variable, shape) = self.shape(declared, token, linkage)?;
            if self.is(b'=') {
                if !matches!(variable.space, Space::Global | Space::Const) || linkage == Linkage::Extern {
                    return self.wrong(
                        token,
                        "only .global and .const variables that are not .extern have an initial value",
                    );
                }
                self.advance()?;
                self.initializer(&mut variable, shape)?;
            } else if shape.open && linkage != Linkage::Extern {
                return self.wrong(token, "an array without a size must be .extern or have an initial value");
            }
            each(variable);
            if !self.more(b';')? {
                return Ok(());
            }
        }
    }

    /// `.reg .b32 %r<100>, a;` after the type.
    pub(super) fn registers(&mut self, declared: &Declared, out: &mut Vec<Statement<'a>>) -> Parsed<()> {
        loop {
            let line = self.token.line;
            let name = self.name("the name of a register")?;
            let count = if self.accept(b'<')? {
                let count = self.count("a number of registers")?;
                self.expect(b'>')?;
                Some(count)
            } else {
                None
            };
            out.push(Statement::Register(Register {
                ty: declared.ty,
                vector: declared.vector,
                name,
                count,
                line,
            }));
            if !self.more(b';')? {
                return Ok(());
            }
        }
    }

    // Initialisers: values in braces, a level for each dimension.

    fn initializer(&mut self, variable: &mut Variable<'a>, shape: Shape) -> Parsed<()> {
        let element = u64::from(variable.ty.bytes());
        let mut levels: Vec<Level> =
            shape.lengths.iter().map(|&length| Level { length, stride: 0, whole: false }).collect();
        if variable.vector > 1 {
            levels.push(Level { length: u64::from(variable.vector), stride: 0, whole: true });
        }
        let mut stride = element;
        for level in levels.iter_mut().rev() {
            level.stride = stride;
            // The product of all lengths was checked; the open dimension's is 0 and outermost.
            stride = stride.saturating_mul(level.length);
        }
        let mut init = Vec::new();
        let rows = self.row(&levels, variable, 0, &mut init)?;
        if shape.open {
            let bytes = rows.checked_mul(levels[0].stride).filter(|&b| b > 0 && i64::try_from(b).is_ok());
            if bytes.is_none() {
                return self.expected("an initial value that gives the array a size of at least 1");
            }
            variable.bytes = bytes;
        }
        variable.init = init;
        Ok(())
    }

    /// One level of braces, or one value inside the innermost; returns how many elements there were.
    fn row(
        &mut self,
        levels: &[Level],
        variable: &Variable<'a>,
        offset: u64,
        init: &mut Vec<Initial<'a>>,
    ) -> Parsed<u64> {
        let Some((level, inner)) = levels.split_first() else {
            return self.initial_value(variable, offset, init).map(|()| 1);
        };
        let start = self.token;
        self.expect(b'{')?;
        let mut count = 0;
        if !self.is(b'}') {
            loop {
                if level.length > 0 && count == level.length {
                    return self
                        .wrong(self.token, format!("more than {count} elements in the initial value"));
                }
                let at = level.stride.checked_mul(count).and_then(|bytes| bytes.checked_add(offset));
                let Some(at) = at else {
                    return self.wrong(self.token, "the array does not fit in 64 bits");
                };
                self.row(inner, variable, at, init)?;
                count += 1;
                if !self.accept(b',')? {
                    break;
                }
            }
        }
        if !self.is(b'}') {
            return self.expected("`,` or `}`");
        }
        if level.whole && count != level.length {
            return self.wrong(start, format!("{count} elements for a vector of {}", level.length));
        }
        self.advance()?;
        Ok(count)
    }

    fn initial_value(
        &mut self,
        variable: &Variable<'a>,
        offset: u64,
        init: &mut Vec<Initial<'a>>,
    ) -> Parsed<()> {
        let token = self.token;
        let ty = variable.ty;
        let is_integer = matches!(ty.kind(), TypeKind::Bits | TypeKind::Unsigned | TypeKind::Signed);
        if self.token.kind == TokenKind::Word && self.of(self.token) != "WARP_SZ" {
            let (name, addend, generic) = self.symbol()?;
            if !is_integer || !matches!(ty.bytes(), 4 | 8) {
                return self.wrong(token, format!("an address does not fit in an element of type {ty}"));
            }
            let value = InitialValue::Symbol { name, addend, generic, bytes: ty.bytes(), shift: 0 };
            init.push(Initial { offset, value });
            return Ok(());
        }
        let number = self.constant()?;
        if self.accept(b'(')? {
            // `0xFF00(name)`: one byte of an address. ptxas takes it for single bytes, and alone in 64 bits.
            let shift = match number.bits() {
                Some(mask) if mask != 0 && mask.trailing_zeros() % 8 == 0 => mask.trailing_zeros(),
                _ => 64,
            };
            if shift == 64 || number.bits().map(|mask| mask >> shift) != Some(0xFF) {
                return self.wrong(token, "the mask of an address must be one whole byte, such as 0xFF00");
            }
            if !is_integer || !matches!(ty.bytes(), 1 | 8) {
                return self
                    .wrong(token, format!("a byte of an address does not fit an element of type {ty}"));
            }
            let (name, addend, generic) = self.symbol()?;
            self.expect(b')')?;
            init.push(Initial {
                offset,
                value: InitialValue::Symbol { name, addend, generic, bytes: 1, shift },
            });
            return Ok(());
        }
        let Some(bytes) = stored(ty, number) else {
            let text = shorten(self.of(token), QUOTED_TOKEN);
            return self.wrong(token, format!("`{text}` is no initial value for the type {ty}"));
        };
        let bytes = &bytes[..ty.bytes() as usize];
        match init.last_mut() {
            Some(Initial { offset: start, value: InitialValue::Bytes(run) })
                if *start + run.len() as u64 == offset =>
            {
                run.extend_from_slice(bytes);
            }
            _ => init.push(Initial { offset, value: InitialValue::Bytes(bytes.to_vec()) }),
        }
        Ok(())
    }

    /// `name+4`, `generic(name)+4`
    fn symbol(&mut self) -> Parsed<(&'a str, i64, bool)> {
        let mut name = self.name("the name of a variable or function")?;
        let generic = name == "generic" && self.accept(b'(')?;
        if generic {
            name = self.name("the name of a variable")?;
            self.expect(b')')?;
        }
        Ok((name, self.addend()?, generic))
    }
}

/// The little-endian bytes of a number in an element of a type, or `None` where the two do not go together. Integers are
/// cut to the width without a word, floating-point numbers rounded, as ptxas does.
fn stored(ty: Type, number: Number) -> Option<[u8; 16]> {
    let bits = match (ty, number) {
        (Type::F32 | Type::B32, Number::F32(bits)) => u128::from(bits),
        (Type::F32 | Type::B32, Number::F64(value)) => u128::from((value as f32).to_bits()),
        (Type::F64, Number::F32(bits)) => u128::from(f64::from(f32::from_bits(bits)).to_bits()),
        // ptxas widens the bits here, not the value.
        (Type::B64, Number::F32(bits)) => u128::from(bits),
        (Type::F64 | Type::B64, Number::F64(value)) => u128::from(value.to_bits()),
        (_, Number::Signed(value)) if ty.kind() != TypeKind::Float => i128::from(value) as u128,
        (_, Number::Unsigned(value)) if ty.kind() != TypeKind::Float => u128::from(value),
        _ => return None,
    };
    Some(bits.to_le_bytes())
}
