//! `numeric`: a number in the response equals the task's.
//!
//! What counts as one number follows what graders of GSM8K accept, minus their accidents:
//!
//! - Decimals (`0.5`, `.5`), thousands separators (`1,234,567.8`, `1{,}234`, `1\,234`; but `1,2,3` and `0,100` are
//!   lists), exponents (`2.5e-3`). A final full stop is not a decimal point. `1.234,56` is not understood. Digits of
//!   other alphabets count as ASCII's.
//! - `-` (also U+2212 and the en dash), `minus` and `negative` are signs where nothing is left of them to subtract
//!   from, whatever spaces and currency follow: `= -5`, `= - 5`, `(-5)`, `is - 5`, `-$5`, `-US$5`, `- €5`; but not in
//!   `17-5`, `17 - 5`, `17 -5`, `x - 5`, the range `3-5`, the dash of `Total - 5` and a list's bullets.
//! - `3/4` without spaces and `\frac{3}{4}` are fractions and `1 1/2` a mixed number; `12/25/2024` is three numbers.
//! - `%` and units are ignored: `50%` is 50, `5kg` is 5.
//! - Digits glued to the end of a word or raised after `^` are part of a name or a unit: `H2O`, `m2` and `m^2` hold
//!   no number. Powers are not worked out; `boxed` does that.
//! - What does not fit a finite f64 is no number.
//!
//! Numbers are compared as they are written, to the last digit; the tolerance comes on top, and the default one is
//! not for whole numbers.
//!
//! The answer's number is its last, so that GSM8K's own field, a solution that ends in `#### 18`, can be used as
//! it is. For the strict form of the benchmark use `regex` with `#### (-?[0-9.,]+)`.

use num::{BigRational, Signed, ToPrimitive, Zero};

use super::number::{self, SEPARATORS, fold};
use super::{Failure, Pick, Request, Verifier, excerpt};

/// Allows for rounding of binary fractions and no more.
pub(super) const ROUNDING: f64 = 1e-12;

pub(super) struct Numeric {
    pub(super) pick: Pick,
    pub(super) absolute_tolerance: f64,
    pub(super) relative_tolerance: f64,
}

impl Numeric {
    fn accepts(&self, found: &BigRational, wanted: &BigRational) -> bool {
        let exact = self.absolute_tolerance == 0.0 && self.relative_tolerance <= ROUNDING;
        if found == wanted || exact && found.is_integer() && wanted.is_integer() {
            return found == wanted;
        }
        let size = |x: BigRational| x.abs().to_f64().unwrap_or(f64::INFINITY);
        let tolerance = self.absolute_tolerance.max(self.relative_tolerance * size(wanted.clone()));
        size(found - wanted) <= tolerance
    }
}

impl Verifier for Numeric {
    fn score(&self, request: &Request) -> Result<f64, Failure> {
        let Some(wanted) = numbers(request.answer).pop() else {
            return Err(Failure::Answer { answer: excerpt(request.answer), wanted: "number" });
        };
        let found = self.pick.of(numbers(request.response).into_iter());
        Ok(f64::from(found.is_some_and(|found| self.accepts(&found.value(), &wanted.value()))))
    }

    fn extract(&self, response: &str) -> Option<String> {
        let found = self.pick.of(numbers(response).into_iter())?.value();
        if found.is_integer() { Some(found.to_string()) } else { Some(found.to_f64()?.to_string()) }
    }
}

/// A number as it was found: (whole + above / below), all of them literals that fit a finite f64.
struct Number {
    negative: bool,
    whole: Option<String>,
    above: String,
    below: Option<String>,
}

impl Number {
    fn value(&self) -> BigRational {
        let exact = |digits: &String| {
            let rounded = || BigRational::from_float(approximate(digits)?);
            number::exact(digits).or_else(rounded).unwrap_or_default()
        };
        let mut value = exact(&self.above);
        if let Some(below) = self.below.as_ref().map(exact).filter(|below| !below.is_zero()) {
            value /= below;
        }
        value += self.whole.as_ref().map_or_else(BigRational::zero, exact);
        if self.negative { -value } else { value }
    }
}

/// The value of a literal, if it is finite.
fn approximate(digits: &str) -> Option<f64> {
    digits.parse().ok().filter(|x: &f64| x.is_finite())
}

/// The numbers of a text, in order.
fn numbers(text: &str) -> Vec<Number> {
    let text = &*fold(text);
    let bytes = text.as_bytes();
    let digit_at = |i: usize| bytes.get(i).is_some_and(u8::is_ascii_digit);
    let one_dash = text.lines().filter(|line| line.trim_start().starts_with("- ")).count() < 2;
    let mut found: Vec<Number> = Vec::new();
    // Where the number before ended, if it is a whole one.
    let mut whole_end = None;
    let mut i = 0;
    while i < bytes.len() {
        let before = if i == 0 { b' ' } else { bytes[i - 1] };
        let point = bytes[i] == b'.' && digit_at(i + 1) && !before.is_ascii_alphanumeric();
        if !(point || digit_at(i)) {
            i += 1;
            continue;
        }
        let start = i;
        let Some((len, above)) = number::literal(&text[start..], SEPARATORS) else { break };
        i += len;
        let latex = numerator(&text[..start]);
        let left = latex.unwrap_or(&text[..start]);
        let (mut negative, left_of_sign) = sign(left, one_dash);
        negative ^= latex.is_some() && text[..start].ends_with('-');
        let raised = left_of_sign.ends_with('^') || left_of_sign.ends_with("^{");
        let glued = latex.is_none() && before.is_ascii_alphabetic() && unpaid(&text[..start]).is_none();
        let Some(size) = approximate(&above).filter(|_| !raised && !glued && before != b'_') else {
            continue;
        };
        let (bar, end_mark) = if latex.is_some() { ("}{", "}") } else { ("/", "") };
        let mut below = None;
        if text[i..].starts_with(bar) && digit_at(i + bar.len()) && before != b'/' {
            let from = i + bar.len();
            let literal = number::literal(&text[from..], SEPARATORS);
            if let Some((end, digits)) = literal.map(|(len, digits)| (from + len, digits)) {
                let date = bytes.get(end) == Some(&b'/') && digit_at(end + 1);
                let divides = approximate(&digits).is_some_and(|below| below != 0.0);
                if divides && !date && text[end..].starts_with(end_mark) {
                    (below, i) = (Some(digits), end + end_mark.len());
                }
            }
        }
        let gap = whole_end.take().and_then(|end| left.get(end..));
        let next_to_whole = gap == Some(" ") || latex.is_some() && gap == Some("");
        let proper = below.as_deref().and_then(approximate).is_some_and(|below| size < below);
        if let Some(mixed) = found.last_mut().filter(|_| next_to_whole && proper) {
            mixed.whole = Some(std::mem::replace(&mut mixed.above, above));
            mixed.below = below;
            continue;
        }
        let is_whole = below.is_none() && above.bytes().all(|c| c.is_ascii_digit());
        whole_end = is_whole.then_some(i);
        found.push(Number { negative, whole: None, above, below });
    }
    found
}

/// What stands left of `\frac{` or `\frac{-`, if the text ends so.
fn numerator(left: &str) -> Option<&str> {
    let left = left.strip_suffix('-').unwrap_or(left);
    ["\\frac{", "\\dfrac{", "\\tfrac{"].iter().find_map(|frac| left.strip_suffix(frac))
}

/// `left` without a currency at its end: `US$`, `\$`, `€`, `USD `, `Rs. `. `None` if there is none.
fn unpaid(left: &str) -> Option<&str> {
    const CODES: [&str; 12] =
        ["USD", "EUR", "GBP", "JPY", "CNY", "INR", "CAD", "AUD", "CHF", "RMB", "Rs.", "Rs"];
    const PREFIXES: [&str; 8] = ["US", "CA", "AU", "NZ", "HK", "A", "C", "S"];
    let whole_word = |rest: &&str| !rest.ends_with(|c: char| c.is_alphanumeric());
    let near = left.trim_end_matches([' ', '\t']);
    if let Some(rest) = near.strip_suffix(['$', '€', '£', '¥', '₹', '₩', '₽']) {
        let rest = rest.strip_suffix('\\').unwrap_or(rest);
        return Some(PREFIXES.iter().find_map(|p| rest.strip_suffix(p).filter(whole_word)).unwrap_or(rest));
    }
    CODES.iter().find_map(|code| near.strip_suffix(code).filter(whole_word))
}

/// Whether a number that follows `left` is negative, and `left` without the sign and currency. `one_dash`: a dash
/// that begins a line is no bullet, because it is the only one.
fn sign(left: &str, one_dash: bool) -> (bool, &str) {
    const MINUS: [char; 2] = ['-', '\u{2013}'];
    /// Words after which a number comes, not an operation.
    const VERBS: &str = " is are was were be equals equal to of at by than get gets gives give becomes makes \
        yields from ";
    let left = unpaid(left).unwrap_or(left);
    let near = left.trim_end_matches([' ', '\t']);
    let spoken = |word: &str| {
        let (rest, end) = near.split_at_checked(near.len().checked_sub(word.len())?)?;
        let whole = !rest.ends_with(|c: char| c.is_alphanumeric() || c == '-');
        (end.eq_ignore_ascii_case(word) && whole && near.len() < left.len()).then_some(rest)
    };
    if let Some(rest) = spoken("negative") {
        return (true, rest);
    }
    let Some(rest) = near.strip_suffix(MINUS).or_else(|| spoken("minus")) else { return (false, left) };
    let operand = rest.trim_end_matches([' ', '\t']);
    if near.len() == left.len() {
        let subtracts = operand.ends_with(|c: char| {
            c.is_ascii_digit()
                || c == ')'
                || operand.len() == rest.len() && (c.is_alphanumeric() || "]}%".contains(c))
        });
        return (!subtracts, rest);
    }
    // Bold type is no product.
    let bold = operand.strip_suffix("**").map(|o| o.trim_end_matches([' ', '\t']));
    let operand = bold.unwrap_or(operand);
    let Some(last) = operand.chars().next_back() else { return (one_dash, rest) };
    let negative = match last {
        '\n' | '\r' => one_dash,
        // A closing `$` ends a formula, which can be subtracted from; an opening one begins it.
        '$' => operand[..operand.len() - 1]
            .chars()
            .next_back()
            .is_none_or(|before| before.is_whitespace() || "({:$".contains(before)),
        c if c.is_alphabetic() => {
            let word = &operand[operand
                .rfind(|c: char| !c.is_alphabetic())
                .map_or(0, |i| i + operand[i..].chars().next().map_or(0, char::len_utf8))..];
            word.len() > 1 && VERBS.contains(&format!(" {} ", word.to_ascii_lowercase()))
        }
        c => !(c.is_numeric() || ")]}%°.;!?".contains(c)),
    };
    (negative, rest)
}
