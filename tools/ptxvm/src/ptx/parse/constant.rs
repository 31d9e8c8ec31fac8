//! Constant expressions, evaluated where they stand.

use super::{Parsed, Parser};
use crate::ptx::lex::{Token, TokenKind};

/// A value of a constant expression (PTX ISA, "Constant Expressions"): 64-bit integers and `.f64`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Number {
    Signed(i64),
    Unsigned(u64),
    /// `0f...`, which no operator takes.
    F32(u32),
    F64(f64),
}

impl Number {
    /// The 64 bits of an integer.
    pub(super) fn bits(self) -> Option<u64> {
        match self {
            Self::Signed(value) => Some(value as u64),
            Self::Unsigned(value) => Some(value),
            Self::F32(_) | Self::F64(_) => None,
        }
    }
}

/// A binary operator of constant expressions.
#[derive(Clone, Copy, PartialEq)]
enum Binary {
    Or,
    And,
    BitOr,
    BitXor,
    BitAnd,
    Equal,
    Unequal,
    Less,
    LessEqual,
    Greater,
    GreaterEqual,
    ShiftLeft,
    ShiftRight,
    Add,
    Sub,
    Mul,
    Div,
    Rem,
}

/// The precedence of `+`: the least of an operator that may follow a symbol.
const ADDITIVE: u32 = 9;

impl Binary {
    /// The operator that a token is, with its precedence: higher binds tighter, as in C.
    fn of(kind: TokenKind) -> Option<(Self, u32)> {
        Some(match kind {
            TokenKind::Double([b'|', b'|']) => (Self::Or, 1),
            TokenKind::Double([b'&', b'&']) => (Self::And, 2),
            TokenKind::Mark(b'|') => (Self::BitOr, 3),
            TokenKind::Mark(b'^') => (Self::BitXor, 4),
            TokenKind::Mark(b'&') => (Self::BitAnd, 5),
            TokenKind::Double([b'=', b'=']) => (Self::Equal, 6),
            TokenKind::Double([b'!', b'=']) => (Self::Unequal, 6),
            TokenKind::Mark(b'<') => (Self::Less, 7),
            TokenKind::Double([b'<', b'=']) => (Self::LessEqual, 7),
            TokenKind::Mark(b'>') => (Self::Greater, 7),
            TokenKind::Double([b'>', b'=']) => (Self::GreaterEqual, 7),
            TokenKind::Double([b'<', b'<']) => (Self::ShiftLeft, 8),
            TokenKind::Double([b'>', b'>']) => (Self::ShiftRight, 8),
            TokenKind::Mark(b'+') => (Self::Add, ADDITIVE),
            TokenKind::Mark(b'-') => (Self::Sub, ADDITIVE),
            TokenKind::Mark(b'*') => (Self::Mul, 10),
            TokenKind::Mark(b'/') => (Self::Div, 10),
            TokenKind::Mark(b'%') => (Self::Rem, 10),
            _ => return None,
        })
    }

    /// Applies it, or says why it cannot be applied.
    fn apply(self, a: Number, b: Number) -> Result<Number, &'static str> {
        if let (Number::F64(a), Number::F64(b)) = (a, b) {
            return Ok(Number::F64(match self {
                Self::Add => a + b,
                Self::Sub => a - b,
                Self::Mul => a * b,
                Self::Div => a / b,
                _ => return Err("this operator takes integers"),
            }));
        }
        let (Some(x), Some(y)) = (a.bits(), b.bits()) else {
            return Err("an operator between an integer and a floating-point number, or on a `0f` number");
        };
        // Shifts keep the type of their left side; ptxas takes the count modulo 64.
        let signed = match self {
            Self::ShiftLeft | Self::ShiftRight => matches!(a, Number::Signed(_)),
            _ => matches!((a, b), (Number::Signed(_), Number::Signed(_))),
        };
        let (i, j) = (x as i64, y as i64);
        let truth = |value: bool| Ok(Number::Signed(i64::from(value)));
        let bits = match self {
            Self::Or => return truth(x != 0 || y != 0),
            Self::And => return truth(x != 0 && y != 0),
            Self::Equal => return truth(x == y),
            Self::Unequal => return truth(x != y),
            Self::Less => return truth(if signed { i < j } else { x < y }),
            Self::LessEqual => return truth(if signed { i <= j } else { x <= y }),
            Self::Greater => return truth(if signed { i > j } else { x > y }),
            Self::GreaterEqual => return truth(if signed { i >= j } else { x >= y }),
            Self::BitOr => x | y,
            Self::BitXor => x ^ y,
            Self::BitAnd => x & y,
            Self::ShiftLeft => x << (y & 63),
            Self::ShiftRight if signed => (i >> (y & 63)) as u64,
            Self::ShiftRight => x >> (y & 63),
            Self::Add => x.wrapping_add(y),
            Self::Sub => x.wrapping_sub(y),
            Self::Mul => x.wrapping_mul(y),
            Self::Div | Self::Rem if y == 0 => return Err("a division by zero"),
            Self::Div if signed => i.wrapping_div(j) as u64,
            Self::Div => x / y,
            Self::Rem if signed => i.wrapping_rem(j) as u64,
            Self::Rem => x % y,
        };
        Ok(if signed { Number::Signed(bits as i64) } else { Number::Unsigned(bits) })
    }
}

impl Parser<'_, '_> {
    /// The offset that may follow a name: `+4`, `+-4`, `-4`, `+4*2+8`; 0 where nothing does.
    pub(super) fn addend(&mut self) -> Parsed<i64> {
        let start = self.token;
        let mut sum = Number::Signed(0);
        while self.is(b'+') || self.is(b'-') {
            sum = self.binary(sum, ADDITIVE)?;
        }
        match sum.bits() {
            Some(bits) => Ok(bits as i64),
            None => self.wrong(start, "an offset must be an integer"),
        }
    }

    pub(super) fn constant(&mut self) -> Parsed<Number> {
        let first = self.unary()?;
        self.constant_from(first)
    }

    /// An expression whose first operand was read.
    pub(super) fn constant_from(&mut self, first: Number) -> Parsed<Number> {
        let value = self.binary(first, 1)?;
        if !self.is(b'?') {
            return Ok(value);
        }
        let Some(truth) = value.bits() else {
            return self.expected("an integer before the `?`");
        };
        self.enter()?;
        self.advance()?;
        let yes = self.constant()?;
        self.expect(b':')?;
        let no = self.constant()?;
        self.leave();
        Ok(if truth != 0 { yes } else { no })
    }

    /// Operators at least as strong as `least` after `left`.
    fn binary(&mut self, mut left: Number, least: u32) -> Parsed<Number> {
        while let Some((operator, strength)) = Binary::of(self.token.kind) {
            if strength < least {
                break;
            }
            let token = self.advance()?;
            let right = self.unary()?;
            let right = self.binary(right, strength + 1)?;
            left = match operator.apply(left, right) {
                Ok(value) => value,
                Err(message) => return self.wrong(token, message),
            };
        }
        Ok(left)
    }

    pub(super) fn unary(&mut self) -> Parsed<Number> {
        let TokenKind::Mark(mark @ (b'-' | b'+' | b'!' | b'~')) = self.token.kind else {
            return self.primary();
        };
        let token = self.advance()?;
        self.enter()?;
        let value = self.unary()?;
        self.leave();
        self.prefix(mark, token, value)
    }

    pub(super) fn prefix(&self, mark: u8, token: Token, value: Number) -> Parsed<Number> {
        match (mark, value) {
            (b'+', Number::Signed(_) | Number::Unsigned(_) | Number::F64(_)) => Ok(value),
            (b'-', Number::Signed(value)) => Ok(Number::Signed(value.wrapping_neg())),
            (b'-', Number::Unsigned(value)) => Ok(Number::Unsigned(value.wrapping_neg())),
            (b'-', Number::F64(value)) => Ok(Number::F64(-value)),
            (b'~', Number::Signed(value)) => Ok(Number::Signed(!value)),
            (b'~', Number::Unsigned(value)) => Ok(Number::Unsigned(!value)),
            (b'!', Number::Signed(_) | Number::Unsigned(_)) => {
                Ok(Number::Signed(i64::from(value.bits() == Some(0))))
            }
            _ => self.wrong(token, format!("`{}` does not apply to this number", char::from(mark))),
        }
    }

    fn primary(&mut self) -> Parsed<Number> {
        let value = match self.token.kind {
            TokenKind::Int(value, true) => Number::Unsigned(value),
            TokenKind::Int(value, false) => Number::Signed(value as i64),
            TokenKind::F32(bits) => Number::F32(bits),
            TokenKind::F64(value) => Number::F64(value),
            TokenKind::Word if self.of(self.token) == "WARP_SZ" => Number::Signed(32),
            TokenKind::Dot if self.of(self.token).as_bytes()[1].is_ascii_digit() => {
                self.token = match self.lexer.fraction(self.token) {
                    Ok(token) => token,
                    Err(bad) => return self.unreadable(bad),
                };
                return self.primary();
            }
            TokenKind::Mark(b'(') => return self.parenthesis(),
            _ => return self.expected("a number"),
        };
        self.advance()?;
        Ok(value)
    }

    /// `(expression)`, `(.s64) operand`, `(.u64) operand`
    fn parenthesis(&mut self) -> Parsed<Number> {
        let open = self.advance()?;
        self.enter()?;
        let cast = self.directive().filter(|name| matches!(*name, "s64" | "u64"));
        let value = if let Some(name) = cast {
            self.advance()?;
            self.expect(b')')?;
            match (self.unary()?.bits(), name) {
                (Some(bits), "s64") => Number::Signed(bits as i64),
                (Some(bits), _) => Number::Unsigned(bits),
                (None, _) => return self.wrong(open, "a cast of a floating-point number"),
            }
        } else {
            let value = self.constant()?;
            self.expect(b')')?;
            value
        };
        self.leave();
        Ok(value)
    }
}
