//! Numbers as people write them: what `numeric`, `regex` and `boxed` read alike.

use std::borrow::Cow;

use num::{BigInt, BigRational, pow};

/// Longer numbers, and powers of ten beyond it, are not worked with: a response may claim `1e999999999`.
const MAX_DIGITS: usize = 1000;

/// What may stand between groups of three digits, beside spaces: `1,234`, `1{,}234`, `1,\!234`, `1\,234`.
pub(super) const SEPARATORS: &[&str] = &[",\\!", "{,}", "\\,", ","];

/// Characters of other alphabets that mean what ASCII or LaTeX has a spelling for: digits, signs, powers, fractions
/// and spaces. No character vanishes, because its neighbours would join.
pub(super) fn fold(text: &str) -> Cow<'_, str> {
    if text.is_ascii() {
        return Cow::Borrowed(text);
    }
    let mut out = String::with_capacity(text.len());
    let mut rest = text.chars().peekable();
    // The power or index that is being written.
    let mut script = None;
    while let Some(c) = rest.next() {
        let raised = "⁰¹²³⁴⁵⁶⁷⁸⁹⁻".chars().position(|r| r == c).map(|i| ('^', i));
        let lowered = || "₀₁₂₃₄₅₆₇₈₉₋".chars().position(|r| r == c).map(|i| ('_', i));
        let small = raised.or_else(lowered);
        if script.is_some() && script != small.map(|(kind, _)| kind) {
            out.push('}');
        }
        if let Some((kind, digit)) = small {
            if script != Some(kind) {
                out.extend([kind, '{']);
            }
            out.push(char::from(b"0123456789-"[digit]));
        }
        script = small.map(|(kind, _)| kind);
        if small.is_some() {
            continue;
        }
        let digit = |zero: u32| char::from(b'0' + ((u32::from(c) - zero) % 10) as u8);
        match c {
            '\u{ff01}'..='\u{ff5e}' => out.extend(char::from_u32(u32::from(c) - 0xfee0)),
            '\u{0660}'..='\u{0669}' => out.push(digit(0x660)),
            '\u{06f0}'..='\u{06f9}' => out.push(digit(0x6f0)),
            '\u{0966}'..='\u{096f}' => out.push(digit(0x966)),
            '\u{1d7ce}'..='\u{1d7ff}' => out.push(digit(0x1d7ce)),
            '\u{2212}' | '\u{2010}' | '\u{2011}' | '\u{fe63}' => out.push('-'),
            '\u{2044}' | '\u{2215}' => out.push('/'),
            // Thin spaces group digits, as `\,` does.
            '\u{2009}' | '\u{202f}' => out += "\\,",
            '\u{200b}'..='\u{200d}' | '\u{2060}' | '\u{feff}' => out.push(' '),
            c if c.is_whitespace() && !c.is_ascii() => out.push(' '),
            c => match vulgar(c) {
                // `1½` is a mixed number, and `½3` does not end in 23.
                Some((above, below)) => {
                    let apart = out.ends_with(|c: char| c.is_alphanumeric() || c == '.');
                    let before = if apart { " " } else { "" };
                    let after = if rest.peek().is_some_and(char::is_ascii_digit) { " " } else { "" };
                    out += &format!("{before}{above}/{below}{after}");
                }
                None => out.push(c),
            },
        }
    }
    if script.is_some() {
        out.push('}');
    }
    Cow::Owned(out)
}

fn vulgar(c: char) -> Option<(u32, u32)> {
    const FRACTIONS: &str = "½12⅓13⅔23¼14¾34⅕15⅖25⅗35⅘45⅙16⅚56⅛18⅜38⅝58⅞78";
    let digits = FRACTIONS.split_once(c).filter(|_| !c.is_ascii())?.1;
    let mut digits = digits.chars().map_while(|c| c.to_digit(10));
    Some((digits.next()?, digits.next()?))
}

/// The length of the unsigned number that `text` starts with, and the number without its thousands separators:
/// `1,234,567.8`, `.5`, `2.5e-3`; but of `1,2`, `1234,567` and `0,100` the first digits. `None` if there is none.
pub(super) fn literal(text: &str, separators: &[&str]) -> Option<(usize, String)> {
    let digits = |from: usize| text.bytes().skip(from).take_while(u8::is_ascii_digit).count();
    let mut end = digits(0);
    let mut number = text[..end].to_owned();
    if (1..=3).contains(&end) && !text.starts_with('0') {
        // One separator serves the whole number.
        let separator = separators.iter().find(|separator| text[end..].starts_with(**separator));
        while let Some(separator) = separator.filter(|separator| text[end..].starts_with(**separator)) {
            let from = end + separator.len();
            // `1 234/567` is a mixed number.
            let mixed = separator.ends_with([' ', '\\']) || *separator == "\\,";
            if digits(from) != 3 || mixed && text[from + 3..].starts_with('/') {
                break;
            }
            end = from + 3;
            number += &text[from..end];
        }
    }
    if text[end..].starts_with('.') && digits(end + 1) > 0 {
        let decimals = end..end + 1 + digits(end + 1);
        number += if number.is_empty() { "0" } else { "" };
        number += &text[decimals.clone()];
        end = decimals.end;
    }
    if end == 0 {
        return None;
    }
    if text[end..].starts_with(['e', 'E']) {
        let from = end + 1 + usize::from(text[end + 1..].starts_with(['+', '-']));
        let to = from + digits(from);
        if to > from && !text[to..].starts_with(|c: char| c.is_ascii_alphabetic()) {
            number += &text[end..to];
            end = to;
        }
    }
    Some((end, number))
}

/// The value of a [`literal`] to the last digit. `None` where it has too many.
pub(super) fn exact(number: &str) -> Option<BigRational> {
    let (mantissa, exponent) = number.split_once(['e', 'E']).unwrap_or((number, "0"));
    let (whole, decimals) = mantissa.split_once('.').unwrap_or((mantissa, ""));
    let exponent = exponent.parse::<i64>().ok().filter(|e| e.unsigned_abs() <= MAX_DIGITS as u64)?;
    if mantissa.len() > MAX_DIGITS {
        return None;
    }
    let digits: BigInt = format!("{whole}{decimals}").parse().ok()?;
    let power = exponent - decimals.len() as i64;
    let ten = pow(BigInt::from(10), power.unsigned_abs() as usize);
    Some(if power < 0 { BigRational::new(digits, ten) } else { (digits * ten).into() })
}
