//! `regex`: what a pattern captures is the answer. The regex crate matches in linear time, so that no response can
//! stall it.
//!
//! The pattern is applied to the task's answer as to the response, so that GSM8K's own field, a solution that ends in
//! `#### 18`, can be used as it is. An answer in which it finds nothing is taken whole, if the group could capture
//! it; one that could never be captured is a [`Failure`], because no response would ever be right.
//!
//! Captures that are decimal numbers with nothing else but a full stop are compared as numbers: `1,200.` is `1200`.
//! All others, numbers with a leading zero included, are compared as text.

use num::BigRational;
use regex_syntax::hir::{Hir, HirKind};

use super::number::{self, fold};
use super::{BuildError, Failure, Pick, Request, Verifier, excerpt};

pub(super) struct Regex {
    pattern: ::regex::Regex,
    /// What the group alone matches, from end to end.
    captured: ::regex::Regex,
    group: usize,
    pick: Pick,
}

impl Regex {
    pub(super) fn new(pattern: &str, group: Option<usize>, pick: Pick) -> Result<Self, BuildError> {
        let compiled =
            |pattern: &str| ::regex::Regex::new(pattern).map_err(|e| BuildError::Pattern(Box::new(e)));
        let regex = compiled(pattern)?;
        let last = regex.captures_len() - 1;
        let group = group.unwrap_or(last.min(1));
        if group > last {
            return Err(BuildError::Group { group, last });
        }
        let whole = regex_syntax::parse(pattern).ok();
        let inside = whole.as_ref().and_then(|hir| captured(hir, group)).map(Hir::to_string);
        let captured = compiled(&format!(r"^\s*(?:{})\s*$", inside.as_deref().unwrap_or("(?s).*")))?;
        Ok(Self { pattern: regex, captured, group, pick })
    }

    /// A match in which the group took no part is no match.
    fn capture<'a>(&self, text: &'a str) -> Option<&'a str> {
        let captures = self.pattern.captures_iter(text).filter_map(|c| c.get(self.group));
        self.pick.of(captures).map(|m| m.as_str().trim())
    }
}

/// What group `index` of a pattern holds; 0 is the pattern.
fn captured(hir: &Hir, index: usize) -> Option<&Hir> {
    if index == 0 {
        return Some(hir);
    }
    let mut open = vec![hir];
    while let Some(hir) = open.pop() {
        match hir.kind() {
            HirKind::Capture(capture) if capture.index as usize == index => return Some(&capture.sub),
            HirKind::Capture(capture) => open.push(&capture.sub),
            HirKind::Repetition(repetition) => open.push(&repetition.sub),
            HirKind::Concat(parts) | HirKind::Alternation(parts) => open.extend(parts),
            HirKind::Empty | HirKind::Literal(_) | HirKind::Class(_) | HirKind::Look(_) => {}
        }
    }
    None
}

/// The value of a text that is a decimal number and nothing else.
fn decimal(text: &str) -> Option<BigRational> {
    let text = fold(text.strip_suffix('.').unwrap_or(text));
    let (negative, digits) = match text.strip_prefix('-') {
        Some(digits) => (true, digits),
        None => (false, text.strip_prefix('+').unwrap_or(&text)),
    };
    let coded = digits.starts_with('0') && digits[1..].starts_with(|c: char| c.is_ascii_digit());
    let (len, literal) = number::literal(digits, &[","]).filter(|_| !coded)?;
    let value = number::exact(&literal).filter(|_| len == digits.len())?;
    Some(if negative { -value } else { value })
}

/// What equal captures share.
fn normal(capture: &str) -> String {
    decimal(capture).map_or_else(|| capture.to_owned(), |value| value.to_string())
}

impl Verifier for Regex {
    fn score(&self, request: &Request) -> Result<f64, Failure> {
        let answer = request.answer.trim();
        let wanted = match self.capture(answer) {
            Some(captured) => captured,
            None if self.captured.is_match(answer) || decimal(answer).is_some() => answer,
            None => {
                return Err(Failure::Answer { answer: excerpt(answer), wanted: "match of verifier.pattern" });
            }
        };
        let found = self.capture(request.response).map(normal);
        Ok(f64::from(found.is_some_and(|found| found == normal(wanted) || found == normal(answer))))
    }

    fn extract(&self, response: &str) -> Option<String> {
        self.capture(response).map(normal)
    }
}
