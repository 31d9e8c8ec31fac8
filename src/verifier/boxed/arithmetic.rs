//! What a text of digits, roots, pi and operations is worth, and whether work is left in it.

use num::integer::Roots;
use num::{BigInt, BigRational, Integer, One, Signed, ToPrimitive, Zero, pow};

use super::{DEEPEST, Work};
use crate::verifier::number;

/// Longer texts and larger numbers are not worked out, because a response may hold `9^{9^9}`.
const MAX_BYTES: usize = 500;
const MAX_BITS: u64 = 2048;

/// The canonical number that `text` works out to, if it is arithmetic and no more is left to do than `work` permits.
/// `Err(true)`: it is arithmetic with work left in it; `Err(false)`: it is something else.
pub(super) fn value(text: &str, work: Work) -> Result<String, bool> {
    let (sign, digits) = text.strip_prefix('-').map_or(("", text), |digits| ("-", digits));
    if !digits.is_empty() && digits.bytes().all(|c| c.is_ascii_digit()) {
        // Whole numbers of any length keep all their digits.
        let digits = digits.trim_start_matches('0');
        return Ok(if digits.is_empty() { "0".to_owned() } else { format!("{sign}{digits}") });
    }
    let term = evaluate(text, work).ok_or(false)?;
    if work < Work::All && !term.is_done(work) { Err(true) } else { Ok(term.value.to_string()) }
}

/// Whether two texts are worth the same number.
pub(super) fn equal(a: &str, b: &str) -> bool {
    let worth = |text| value(text, Work::All).ok();
    worth(a).is_some_and(|a| Some(a) == worth(b))
}

fn evaluate(text: &str, work: Work) -> Option<Term> {
    if text.len() > MAX_BYTES {
        return None;
    }
    let mut parser = Parser { rest: text, depth: 0, work };
    let term = parser.sum()?;
    (parser.rest.is_empty() && term.value.to_f64().is_finite()).then_some(term)
}

// --------------------------------------------------------------------------------------------------------- values

#[derive(Clone)]
enum Value {
    Rational(BigRational),
    /// ± sqrt(`square`) pi^`pi`, exactly; never rational.
    Surd {
        negative: bool,
        square: BigRational,
        pi: i32,
    },
    /// Anything else, to about 15 digits.
    Rounded(f64),
}

fn root(n: &BigRational, index: u32) -> Option<BigRational> {
    if n.is_negative() && index.is_multiple_of(2) {
        return None;
    }
    let whole = |n: &BigInt| Some(n.nth_root(index)).filter(|root| pow(root.clone(), index as usize) == *n);
    Some(BigRational::new_raw(whole(n.numer())?, whole(n.denom())?))
}

impl Value {
    fn new(negative: bool, square: BigRational, pi: i32) -> Option<Self> {
        if square.numer().bits().max(square.denom().bits()) > MAX_BITS {
            return None;
        }
        Some(match root(&square, 2).filter(|root| pi == 0 || root.is_zero()) {
            Some(root) => Self::Rational(if negative { -root } else { root }),
            None => Self::Surd { negative, square, pi },
        })
    }

    fn rounded(x: f64) -> Option<Self> {
        x.is_finite().then_some(Self::Rounded(x))
    }

    /// Sign, square without pi, and power of pi.
    fn surd(&self) -> Option<(bool, BigRational, i32)> {
        match self {
            Self::Rational(x) => Some((x.is_negative(), x * x, 0)),
            Self::Surd { negative, square, pi } => Some((*negative, square.clone(), *pi)),
            Self::Rounded(_) => None,
        }
    }

    fn to_f64(&self) -> f64 {
        match self {
            Self::Rational(x) => x.to_f64().unwrap_or(f64::INFINITY),
            Self::Surd { negative, square, pi } => {
                let size = square.to_f64().unwrap_or(f64::INFINITY).sqrt() * std::f64::consts::PI.powi(*pi);
                if *negative { -size } else { size }
            }
            Self::Rounded(x) => *x,
        }
    }

    fn negate(self) -> Self {
        match self {
            Self::Rational(x) => Self::Rational(-x),
            Self::Surd { negative, square, pi } => Self::Surd { negative: !negative, square, pi },
            Self::Rounded(x) => Self::Rounded(-x),
        }
    }

    fn times(&self, other: &Self) -> Option<Self> {
        match (self.surd(), other.surd()) {
            (Some((left, a, p)), Some((right, b, q))) => Self::new(left != right, a * b, p.checked_add(q)?),
            _ => Self::rounded(self.to_f64() * other.to_f64()),
        }
    }

    fn inverse(&self) -> Option<Self> {
        match self.surd() {
            Some((_, square, _)) if square.is_zero() => None,
            Some((negative, square, pi)) => Self::new(negative, square.recip(), pi.checked_neg()?),
            None => Self::rounded(self.to_f64().recip()),
        }
    }

    /// How many times `other` this is, if that is a fraction.
    fn ratio(&self, other: &Self) -> Option<BigRational> {
        match self.times(&other.inverse()?)? {
            Self::Rational(ratio) => Some(ratio),
            _ => None,
        }
    }

    fn plus(&self, other: &Self) -> Option<Self> {
        if matches!(other, Self::Rational(zero) if zero.is_zero()) {
            return Some(self.clone());
        }
        match self.ratio(other) {
            Some(ratio) => other.times(&Self::Rational(ratio + BigRational::one())),
            None => Self::rounded(self.to_f64() + other.to_f64()),
        }
    }

    fn power(&self, exponent: &Self) -> Option<Self> {
        let Self::Rational(by) = exponent else {
            return Self::rounded(self.to_f64().powf(exponent.to_f64()));
        };
        if let (Some((negative, square, pi)), Some(n)) =
            (self.surd(), by.to_i32().filter(|_| by.is_integer()))
        {
            let size = n.unsigned_abs();
            let bits = square.numer().bits().max(square.denom().bits());
            if bits.saturating_mul(size.into()) > MAX_BITS {
                return None;
            }
            let raised = Self::new(
                negative && size % 2 == 1,
                pow(square, size as usize),
                pi.checked_mul(size as i32)?,
            )?;
            return if n < 0 { raised.inverse() } else { Some(raised) };
        }
        match by.denom().to_u32().filter(|index| (2..=9).contains(index)) {
            Some(index) => self.root(index)?.power(&Self::Rational(by.numer().clone().into())),
            None => Self::rounded(self.to_f64().powf(exponent.to_f64())),
        }
    }

    fn root(&self, index: u32) -> Option<Self> {
        if let Self::Rational(x) = self {
            if index == 2 && !x.is_negative() {
                return Self::new(false, x.clone(), 0);
            }
            if let Some(root) = root(x, index) {
                return Some(Self::Rational(root));
            }
        }
        let x = self.to_f64();
        let root = x.abs().powf(f64::from(index).recip());
        Self::rounded(if x >= 0.0 {
            root
        } else if index % 2 == 1 {
            -root
        } else {
            f64::NAN
        })
    }
}

impl std::fmt::Display for Value {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Rational(x) => write!(f, "{x}"),
            Self::Surd { negative, square, pi } => {
                write!(f, "{}√({square})π^{pi}", if *negative { "-" } else { "" })
            }
            Self::Rounded(x) => {
                // What roots leave behind may be a fraction again: (1+√2)(√2-1)/3.
                let fraction = (1..=1000).map(f64::from).find(|d| {
                    let above = x * d;
                    above.abs() < 1e15 && (above - above.round()).abs() <= 1e-12 * above.abs().max(1.0)
                });
                match fraction {
                    Some(1.0) => write!(f, "{}", x.round() + 0.0),
                    Some(below) => write!(f, "{}/{below}", (x * below).round()),
                    None => write!(f, "{x:.11e}"),
                }
            }
        }
    }
}

// ---------------------------------------------------------------------------------------------------------- terms

/// A value, and what it looks like.
struct Term {
    value: Value,
    form: Form,
    signed: bool,
}

/// Forms that an answer may have; all others are [`Form::Open`]: work is left in them.
#[derive(Clone, PartialEq)]
enum Form {
    /// A coefficient, a root and pi, each at most once: `3/4`, `2√3`, `√5/2`, `3π/4`.
    Product {
        coefficient: Coefficient,
        root: bool,
        pi: bool,
    },
    /// 10 to a whole number: it makes a number of a mantissa.
    PowerOfTen,
    /// Terms that do not add up: `1+√2`, `(3-√5)/2`.
    Sum,
    Open,
}

#[derive(Clone, PartialEq)]
enum Coefficient {
    None,
    Whole(BigInt),
    Decimal,
    Fraction,
}

use Coefficient::{Decimal, Fraction, Whole};

impl Form {
    const fn number(coefficient: Coefficient) -> Self {
        Self::Product { coefficient, root: false, pi: false }
    }

    fn is_number(&self) -> bool {
        matches!(self, Self::Product { root: false, pi: false, .. })
    }

    fn times(&self, other: &Self) -> Self {
        use Coefficient::None;
        match (self, other) {
            (
                Self::Product { coefficient: a, root, pi },
                Self::Product { coefficient: b, root: r, pi: p },
            ) if (*a == None || *b == None) && !(*root && *r) && !(*pi && *p) => {
                let coefficient = if *a == None { b } else { a };
                Self::Product { coefficient: coefficient.clone(), root: *root || *r, pi: *pi || *p }
            }
            (Self::Product { coefficient: Whole(_) | Decimal, root: false, pi: false }, Self::PowerOfTen) => {
                Self::number(Decimal)
            }
            (Self::Product { root: false, .. }, Self::Sum)
            | (Self::Sum, Self::Product { root: false, .. }) => Self::Sum,
            _ => Self::Open,
        }
    }
}

/// Whether no square can be taken out of the root of n, as far as factors below 1000 tell.
fn squarefree(n: &BigInt) -> bool {
    let Some(n) = n.to_u128() else { return false };
    n > 0 && (n == 1 || n.sqrt().pow(2) != n) && !(2..1000u128).any(|d| n % (d * d) == 0)
}

impl Term {
    fn is_done(&self, work: Work) -> bool {
        match self.form {
            Form::Open => false,
            Form::PowerOfTen => work > Work::None,
            _ => true,
        }
    }

    fn negate(self) -> Self {
        let form = if self.signed { Form::Open } else { self.form };
        Self { value: self.value.negate(), form, signed: true }
    }

    fn times(self, other: &Self) -> Option<Self> {
        let mantissa = || (1.0..10.0).contains(&self.value.to_f64().abs());
        let form = if other.signed || other.form == Form::PowerOfTen && !mantissa() {
            Form::Open
        } else {
            self.form.times(&other.form)
        };
        Some(Self { value: self.value.times(&other.value)?, form, signed: self.signed })
    }

    fn over(self, other: &Self, work: Work) -> Option<Self> {
        use Coefficient::None;
        let form = match (&self.form, &other.form) {
            _ if self.signed && other.signed => Form::Open,
            (
                Form::Product { coefficient: above @ (None | Whole(_)), root, pi },
                Form::Product { coefficient: below @ (None | Whole(_)), root: r, pi: p },
            ) if !(*root && *r || *pi && *p) => {
                // Numerator and denominator share no factor: 6/8, 391/17 and 6/√3 are not done.
                let coprime = match (above, other.value.surd()) {
                    (Whole(above), Some((_, square, _))) => above.gcd(square.numer()).is_one(),
                    _ => true,
                };
                if coprime || work == Work::Reduce {
                    let coefficient = if (above, below) == (&None, &None) { None } else { Fraction };
                    Form::Product { coefficient, root: *root || *r, pi: *pi || *p }
                } else {
                    Form::Open
                }
            }
            (Form::Sum, Form::Product { coefficient: Whole(_), root: false, pi: false }) => Form::Sum,
            _ => Form::Open,
        };
        let value = self.value.times(&other.value.inverse()?)?;
        Some(Self { value, form, signed: self.signed || other.signed })
    }

    /// A root of this.
    fn root(self, index: u32, work: Work) -> Option<Self> {
        let value = self.value.root(index)?;
        let plain = match &self.value {
            Value::Rational(x) if work == Work::None => {
                !matches!(value, Value::Rational(_)) && squarefree(x.numer()) && squarefree(x.denom())
            }
            _ => true,
        };
        let form = if plain && self.form.is_number() && !self.signed {
            Form::Product { coefficient: Coefficient::None, root: true, pi: false }
        } else {
            Form::Open
        };
        Some(Self { value, form, signed: false })
    }

    fn power(self, exponent: &Self) -> Option<Self> {
        let value = self.value.power(&exponent.value)?;
        let whole = matches!(exponent.form, Form::Product { coefficient: Whole(_), root: false, pi: false });
        let form = match &self.form {
            Form::Product { coefficient: Whole(ten), root: false, pi: false }
                if whole && !self.signed && *ten == BigInt::from(10) =>
            {
                Form::PowerOfTen
            }
            Form::Product { coefficient: Coefficient::None, root: false, pi: true } if whole => self.form,
            _ => Form::Open,
        };
        Some(Self { value, form, signed: self.signed })
    }
}

// --------------------------------------------------------------------------------------------------------- parser

/// Recursive descent. A number or name next to another is a factor; roots and parentheses may be, digits may not.
struct Parser<'a> {
    rest: &'a str,
    depth: usize,
    work: Work,
}

impl Parser<'_> {
    fn take(&mut self, prefix: &str) -> bool {
        let rest = self.rest.strip_prefix(prefix);
        self.rest = rest.unwrap_or(self.rest);
        rest.is_some()
    }

    fn sum(&mut self) -> Option<Term> {
        self.depth += 1;
        if self.depth > DEEPEST {
            return None;
        }
        let mut sum = self.product()?;
        // Terms of an answer that is done: each is a product, and no two of them add up.
        let mut terms = vec![sum.value.clone()];
        let mut done = matches!(sum.form, Form::Product { .. });
        loop {
            let minus = self.take("-");
            if !minus && !self.take("+") {
                self.depth -= 1;
                return Some(sum);
            }
            let mut term = self.product()?;
            if minus {
                term.value = term.value.negate();
            }
            done &= matches!(term.form, Form::Product { .. }) && !term.signed && terms.len() < 8;
            done = done && term.value.to_f64() != 0.0;
            done = done && terms.iter().all(|other| other.ratio(&term.value).is_none());
            let value = sum.value.plus(&term.value)?;
            sum = Term { value, form: if done { Form::Sum } else { Form::Open }, signed: false };
            if done {
                terms.push(term.value);
            }
        }
    }

    fn product(&mut self) -> Option<Term> {
        let mut product = self.signed()?;
        loop {
            if self.take("*") {
                product = product.times(&self.signed()?)?;
            } else if self.take("/") {
                product = product.over(&self.signed()?, self.work)?;
            } else if self.take("÷") {
                // The sign of an exercise, not of a fraction.
                product = product.over(&self.signed()?, self.work)?;
                product.form = Form::Open;
            } else if self.rest.starts_with(['(', '√', '∛', 'π']) {
                product = product.times(&self.power()?)?;
            } else {
                return Some(product);
            }
        }
    }

    fn signed(&mut self) -> Option<Term> {
        let signs = self.rest.len() - self.rest.trim_start_matches(['-', '+']).len();
        let (signs, rest) = self.rest.split_at(signs);
        self.rest = rest;
        let term = self.power()?;
        let term = if signs.matches('-').count() % 2 == 1 { term.negate() } else { term };
        Some(if signs.len() > 1 { Term { form: Form::Open, ..term } } else { term })
    }

    fn power(&mut self) -> Option<Term> {
        let mut base = self.atom()?;
        if self.take("!") {
            let Value::Rational(n) = &base.value else { return None };
            let n = n.to_u32().filter(|&most| n.is_integer() && most <= 150)?;
            let product: BigInt = (1..=n).map(BigInt::from).product();
            base = Term { value: Value::Rational(product.into()), form: Form::Open, signed: base.signed };
        }
        // The writer wraps every exponent that is more than a number or a name.
        if self.take("^") { base.power(&self.atom()?) } else { Some(base) }
    }

    fn atom(&mut self) -> Option<Term> {
        if self.take("√") {
            return self.parentheses()?.root(2, self.work);
        }
        if self.take("∛") {
            let Value::Rational(index) = self.parentheses()?.value else { return None };
            let index = index.to_u32().filter(|i| index.is_integer() && (2..=64).contains(i))?;
            return self.parentheses()?.root(index, self.work);
        }
        if self.take("π") {
            let value = Value::Surd { negative: false, square: BigRational::one(), pi: 1 };
            let form = Form::Product { coefficient: Coefficient::None, root: false, pi: true };
            return Some(Term { value, form, signed: false });
        }
        if self.rest.starts_with('(') {
            return self.parentheses();
        }
        let len = self.rest.bytes().take_while(|c| c.is_ascii_digit() || *c == b'.').count();
        let (digits, rest) = self.rest.split_at(len);
        self.rest = rest;
        let value = number::exact(digits).filter(|_| !digits.is_empty())?;
        if self.take("⊕") {
            let (above, below) = (self.atom()?, self.take("/").then(|| self.atom())??);
            let fraction = above.over(&below, self.work)?;
            let Value::Rational(part) = &fraction.value else { return None };
            let form = if *part < BigRational::one() { fraction.form } else { Form::Open };
            return Some(Term { value: Value::Rational(value + part), form, signed: false });
        }
        let coefficient = if digits.contains('.') { Decimal } else { Whole(value.numer().clone()) };
        Some(Term { value: Value::Rational(value), form: Form::number(coefficient), signed: false })
    }

    fn parentheses(&mut self) -> Option<Term> {
        if !self.take("(") {
            return None;
        }
        let term = self.sum()?;
        self.take(")").then_some(term)
    }
}
