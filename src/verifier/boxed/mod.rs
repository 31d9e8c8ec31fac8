//! `boxed`: the response's last `\boxed{...}` means the same as the answer.
//!
//! Both are brought to one spelling ([`canonical`]) and compared as text, so that what scores as equal also votes
//! as equal. In the manner of MATH's graders this forgives
//!
//! - layout: spaces, `$`, `\left \right`, `\dfrac \tfrac \over`, `\frac12`, `\sqrt2`, `\text`, `\mathbf`, a final full
//!   stop or `\\`;
//! - units: `\$`, `US\$`, `\%`, degrees, `\text{...}` after a value, the names in `UNITS`, also `km/h` and powers. A
//!   word that is left out never joins what it parted: `3\text{ feet }4\text{ inches}` is not 34, and words that mean
//!   something stay (`5\text{ or more}`), or count (`5\text{ million}`);
//! - the left side of `x = 5`, `f(x) = 5`, `2 + 2 = 4` and `x \in [1, 2]`, and parentheses around one value;
//! - upper and lower case in words, and the order of sets, unions and lists, but not of tuples and intervals;
//! - how a value is written, also in entries of matrices, tuples, sets and intervals and beside `<`: digits with or
//!   without thousands separators, `1e5`, `1.2 \times 10^5`, fractions, mixed numbers, repeating decimals, roots, pi.
//!
//! Fractions and products of roots and powers of pi are compared exactly, sums of different ones to 12 significant
//! digits.
//!
//! With `evaluate` all that can be worked out is: `17 \times 23` is 391. Without it, the default, an answer with work
//! left in it ([`Work::None`]) equals only itself, because a model that is rewarded for restating the question will.
//! The reference answer may be an unreduced fraction, root or power of ten nevertheless.
//!
//! It knows no algebra but the order of terms and of factors in parentheses: `x+1` is `1+x`, and `2(x+1)` is not
//! `2x+2`. A user who needs more runs a computer algebra system as `command`.

mod arithmetic;
mod key;
mod latex;

use super::number::fold;
use super::{Failure, Request, Verifier, excerpt};

/// Nesting beyond this is left as it is written; it bounds the recursion and keeps the work linear.
const DEEPEST: usize = 40;
/// Bytes of an answer. A longer one is left as it is written.
const MAX_BYTES: usize = 4096;

/// What is worked out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Work {
    /// Nothing: numbers, fractions in lowest terms, roots of squarefree numbers, multiples of pi and sums of such that
    /// do not add up are values; `6/8`, `\sqrt{16}`, `2^{10}`, `1+1` and `6 \div 2` are exercises.
    None,
    /// Fractions are reduced, roots simplified, powers of ten multiplied out.
    Reduce,
    /// Everything.
    All,
}

pub(super) struct Boxed {
    pub(super) evaluate: bool,
}

impl Boxed {
    fn work(&self) -> Work {
        if self.evaluate { Work::All } else { Work::None }
    }
}

impl Verifier for Boxed {
    fn score(&self, request: &Request) -> Result<f64, Failure> {
        // The solutions of MATH and of GSM8K can stand in for the answer.
        let answer = last_box(request.answer)
            .or_else(|| Some(request.answer.rsplit_once("####")?.1))
            .unwrap_or(request.answer);
        let wanted = spelling(answer, self.work());
        if wanted.is_empty() {
            return Err(Failure::Answer { answer: excerpt(request.answer), wanted: "expression" });
        }
        let right = self.extract(request.response).is_some_and(|found| {
            found == wanted || !self.evaluate && found == spelling(answer, Work::Reduce)
        });
        Ok(f64::from(right))
    }

    fn extract(&self, response: &str) -> Option<String> {
        last_box(response).map(|inside| spelling(inside, self.work())).filter(|answer| !answer.is_empty())
    }
}

/// What the last `\boxed` or `\fbox` of a text holds; `None` if it is not closed. `\boxed 5` holds one word.
fn last_box(text: &str) -> Option<&str> {
    let after = |command: &str| {
        text.rmatch_indices(command)
            .map(|(start, _)| start + command.len())
            .find(|&end| !text[end..].starts_with(|c: char| c.is_ascii_alphabetic()))
    };
    let rest = text[after("\\boxed").max(after("\\fbox"))?..].trim_start();
    match latex::balanced(rest) {
        Some((inside, _)) => Some(inside),
        None if rest.starts_with('{') => None,
        None => rest.split(|c: char| c.is_whitespace() || c == '$').next(),
    }
}

/// The one spelling of an answer. Text that is no LaTeX, such as unbalanced braces, is only trimmed.
fn spelling(answer: &str, work: Work) -> String {
    let answer = answer.trim();
    let known = (answer.len() <= MAX_BYTES).then(|| canonical(&fold(answer), work, 0)).flatten();
    known.unwrap_or_else(|| answer.to_owned())
}

/// The one spelling of a formula. `None`: it is no LaTeX, or too deep.
fn canonical(latex: &str, work: Work, depth: usize) -> Option<String> {
    let text = latex::plain(latex, work, depth)?;
    Some(key::key(text.trim().trim_end_matches(['.', ',']).trim(), work, depth))
}
