//! `numeric`: a number in the response equals the task's.
//!
//! What counts as one number follows what graders of GSM8K accept, minus their accidents:
//!
//! - Decimals (`0.5`, `.5`), thousands separators (`1,234,567.8`; but `1,2,3` and `0,100` are lists), exponents
//!   (`2.5e-3`), currency (`$5`, `-$5`). A final full stop is not a decimal point. `1.234,56` is not understood.
//! - `-` (also U+2212 and the en dash) is a sign only where nothing is left of it to subtract from: `= -5`, `(-5)`
//!   and `is -5`, but not `17-5`, `17 - 5`, `17 -5`, `x-5` or the range `3-5`.
//! - `3/4` without spaces is a fraction and `1 1/2` a mixed number; `12/25/2024` is three numbers.
//! - `%` and units are ignored: `50%` is 50, `5kg` is 5.
//! - Digits glued to the end of a word or raised after `^` are part of a name or a unit: `H2O`, `m2` and `m^2` hold
//!   no number. Powers are not worked out; `boxed` does that.
//! - What does not fit a finite f64 is no number.
//!
//! The answer's number is its last, so that GSM8K's own field, a solution that ends in `#### 18`, can be used as
//! it is. For the strict form of the benchmark use `regex` with `#### (-?[0-9.,]+)`.

use super::{Failure, Pick, Request, Verifier, excerpt};

pub(super) struct Numeric {
    pub(super) pick: Pick,
    pub(super) absolute_tolerance: f64,
    pub(super) relative_tolerance: f64,
}

impl Verifier for Numeric {
    fn score(&self, request: &Request) -> Result<f64, Failure> {
        let Some(&wanted) = numbers(request.answer).last() else {
            return Err(Failure::Answer { answer: excerpt(request.answer), wanted: "number" });
        };
        let tolerance = self.absolute_tolerance.max(self.relative_tolerance * wanted.abs());
        let found = self.pick.of(numbers(request.response).into_iter());
        Ok(f64::from(found.is_some_and(|x| (x - wanted).abs() <= tolerance)))
    }

    fn extract(&self, response: &str) -> Option<String> {
        // Adding zero turns -0 into 0.
        self.pick.of(numbers(response).into_iter()).map(|x| (x + 0.0).to_string())
    }
}

/// The numbers of a text, in order.
fn numbers(text: &str) -> Vec<f64> {
    let bytes = text.as_bytes();
    let digit_at = |i: usize| bytes.get(i).is_some_and(u8::is_ascii_digit);
    let mut found: Vec<f64> = Vec::new();
    // Where the number before ended, if a fraction after a space would make it a mixed number.
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
        i += unsigned_len(&bytes[start..]);
        let (negative, left) = sign(&text[..start]);
        let raised = left.ends_with('^') || left.ends_with("^{");
        if raised || before.is_ascii_alphabetic() || before == b'_' {
            continue;
        }
        let Some(mut value) = parse(&text[start..i]) else { continue };
        let mut fraction = false;
        if bytes.get(i) == Some(&b'/') && digit_at(i + 1) && before != b'/' {
            let end = i + 1 + unsigned_len(&bytes[i + 1..]);
            let date = bytes.get(end) == Some(&b'/') && digit_at(end + 1);
            let quotient = parse(&text[i + 1..end]).map(|below| value / below).filter(|q| q.is_finite());
            if let (false, Some(quotient)) = (date, quotient) {
                (value, fraction, i) = (quotient, true, end);
            }
        }
        if fraction && value < 1.0 && whole_end == Some(start) {
            if let Some(whole) = found.last_mut() {
                *whole += value.copysign(*whole);
            }
            whole_end = None;
            continue;
        }
        found.push(if negative { -value } else { value });
        let whole = !fraction && text[start..i].bytes().all(|c| c.is_ascii_digit());
        whole_end = (whole && bytes.get(i) == Some(&b' ')).then_some(i + 1);
    }
    found
}

/// The length of the unsigned number that `text` starts with; 0 if there is none.
fn unsigned_len(text: &[u8]) -> usize {
    let digits = |from: usize| text[from..].iter().take_while(|c| c.is_ascii_digit()).count();
    let mut end = digits(0);
    if (1..=3).contains(&end) && text[0] != b'0' {
        while text.get(end) == Some(&b',') && digits(end + 1) == 3 {
            end += 4;
        }
    }
    if text.get(end) == Some(&b'.') {
        let decimals = digits(end + 1);
        end += if decimals > 0 { 1 + decimals } else { 0 };
    }
    if end > 0 && matches!(text.get(end), Some(b'e' | b'E')) {
        let signed = usize::from(matches!(text.get(end + 1), Some(b'+' | b'-')));
        let from = (end + 1 + signed).min(text.len());
        let exponent = digits(from);
        let glued = text.get(from + exponent).is_some_and(u8::is_ascii_alphabetic);
        if exponent > 0 && !glued {
            end = from + exponent;
        }
    }
    end
}

fn parse(number: &str) -> Option<f64> {
    number.replace(',', "").parse().ok().filter(|x: &f64| x.is_finite())
}

/// Whether a number that follows `left` is negative, and `left` without the sign and currency.
fn sign(left: &str) -> (bool, &str) {
    const MINUS: [char; 3] = ['-', '\u{2212}', '\u{2013}'];
    let unpaid = left.strip_suffix('$').map_or(left, |l| l.strip_suffix('\\').unwrap_or(l));
    let Some(left) = unpaid.strip_suffix(MINUS) else { return (false, unpaid) };
    let near = left.trim_end_matches([' ', '\t']);
    let subtracts = near.ends_with(|c: char| {
        c.is_ascii_digit()
            || c == ')'
            || near.len() == left.len() && (c.is_alphanumeric() || "]}%".contains(c))
    });
    (!subtracts, left)
}
