//! `boxed`: the response's last `\boxed{...}` means the same as the answer.
//!
//! Both are brought to one spelling ([`canonical`]) and compared as text, so that what scores as equal also votes
//! as equal. In the manner of MATH's graders this forgives
//!
//! - layout: spaces, `$`, `\left \right`, `\dfrac \tfrac`, `\frac12`, `\sqrt2`, `\text`, `\mathbf`, a final full stop;
//! - units: `\$`, `\%`, degrees, `\text{...}` after a value, the names in [`UNITS`];
//! - the left side of `x = 5`, `f(x) = 5` and `x \in [1, 2]`, and parentheses around one value;
//! - upper and lower case in words, and the order of sets and of lists, but not of tuples and intervals;
//! - and how a value is written: what can be worked out (digits with or without thousands separators, fractions,
//!   mixed numbers, roots, powers, pi, the four operations) is compared to 12 significant digits.
//!
//! It does no algebra: `x+1` and `1+x` differ. A user who needs that runs a computer algebra system as `command`.

use std::borrow::Cow;
use std::collections::BTreeSet;

use super::{Failure, Request, Verifier, excerpt};

/// Nesting beyond this is left as it is written; it bounds the recursion and keeps the work linear.
const DEEPEST: usize = 40;

/// Words that say what a value counts rather than what it is.
const UNITS: &str = "cent cents centimeter centimeters cm cubic day days degree degrees dollar dollars feet foot ft gram \
    grams hour hours inch inches kg kilogram kilograms kilometer kilometers km meter meters mile miles \
    minute minutes mm month months mph per percent point points pound pounds second seconds square unit \
    units week weeks yard yards";

pub(super) struct Boxed;

impl Verifier for Boxed {
    fn score(&self, request: &Request) -> Result<f64, Failure> {
        // MATH's own `solution` field can stand in for the answer.
        let wanted = canonical(last_box(request.answer).unwrap_or(request.answer));
        if wanted.is_empty() {
            return Err(Failure::Answer { answer: excerpt(request.answer), wanted: "expression" });
        }
        Ok(f64::from(self.extract(request.response) == Some(wanted)))
    }

    fn extract(&self, response: &str) -> Option<String> {
        last_box(response).map(canonical).filter(|answer| !answer.is_empty())
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
    match balanced(rest) {
        Some((inside, _)) => Some(inside),
        None if rest.starts_with('{') => None,
        None => rest.split(|c: char| c.is_whitespace() || c == '$').next(),
    }
}

/// Splits `{inside}rest`. Escaped braces do not count.
fn balanced(text: &str) -> Option<(&str, &str)> {
    let mut depth = 0usize;
    let mut escaped = false;
    for (i, c) in text.char_indices() {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            '{' => depth += 1,
            '}' => depth = depth.checked_sub(1)?,
            _ => {}
        }
        if depth == 0 {
            return (i > 0).then(|| (&text[1..i], &text[i + 1..]));
        }
    }
    None
}

/// The one spelling of an answer. Text that is no LaTeX, such as unbalanced braces, is only trimmed.
fn canonical(latex: &str) -> String {
    let latex = latex.trim();
    match plain(latex, 0) {
        Some(text) => key(text.trim_end_matches('.').trim(), 0),
        None => latex.to_owned(),
    }
}

// ------------------------------------------------------------------------------------------- LaTeX to plain text

/// The rest of a LaTeX text.
struct Scan<'a> {
    rest: &'a str,
    /// Open brackets. Inside of them commas separate, outside they may group digits.
    open: usize,
}

enum Token<'a> {
    /// A control sequence, without its backslash.
    Command(&'a str),
    /// A run of letters.
    Word(&'a str),
    /// A number without its thousands separators.
    Number(String),
    Symbol(char),
}

impl<'a> Scan<'a> {
    fn next(&mut self) -> Option<Token<'a>> {
        let first = self.rest.chars().next()?;
        if self.rest.starts_with('\\') {
            return Some(Token::Command(self.command()));
        }
        if first.is_ascii_alphabetic() {
            return Some(Token::Word(self.run(|c| c.is_ascii_alphabetic())));
        }
        let point = self.take(".");
        let digits = self.run(|c| c.is_ascii_digit());
        if point && !digits.is_empty() {
            return Some(Token::Number(format!("0.{digits}")));
        }
        if !digits.is_empty() {
            return Some(Token::Number(self.number(digits)));
        }
        if !point {
            self.rest = &self.rest[first.len_utf8()..];
        }
        Some(Token::Symbol(first))
    }

    /// Goes on with a number after its first digits: `1,234,567.8`, but not `1,2`, `1234,567` or `0,100`.
    fn number(&mut self, first: &str) -> String {
        let mut number = first.to_owned();
        let separators: &[&str] = &[",\\!", "{,}", "\\,", "\\ ", " ", ","];
        let separators = &separators[..separators.len() - usize::from(self.open > 0)];
        let groups = |rest: &'a str| {
            let rest = separators.iter().find_map(|&separator| rest.strip_prefix(separator))?;
            let digits = rest.len() - rest.trim_start_matches(|c: char| c.is_ascii_digit()).len();
            // `1 234/567` is a mixed number.
            (digits == 3 && !rest[digits..].starts_with('/')).then(|| rest.split_at(digits))
        };
        if first.len() <= 3 && !first.starts_with('0') {
            while let Some((group, rest)) = groups(self.rest) {
                number += group;
                self.rest = rest;
            }
        }
        if let Some(decimals) =
            self.rest.strip_prefix('.').filter(|d| d.starts_with(|c: char| c.is_ascii_digit()))
        {
            self.rest = decimals;
            number.push('.');
            number += self.run(|c| c.is_ascii_digit());
        }
        number
    }

    fn command(&mut self) -> &'a str {
        let name = &self.rest[1..];
        let letters = name.bytes().take_while(u8::is_ascii_alphabetic).count();
        let len = if letters > 0 { letters } else { name.chars().next().map_or(0, char::len_utf8) };
        self.rest = &name[len..];
        &name[..len]
    }

    fn take(&mut self, prefix: &str) -> bool {
        let rest = self.rest.strip_prefix(prefix);
        self.rest = rest.unwrap_or(self.rest);
        rest.is_some()
    }

    /// Takes everything up to the first character that is not `wanted`.
    fn run(&mut self, wanted: impl Fn(char) -> bool) -> &'a str {
        let (run, rest) = self.rest.split_at(self.rest.find(|c| !wanted(c)).unwrap_or(self.rest.len()));
        self.rest = rest;
        run
    }

    /// Takes `{inside}`.
    fn group(&mut self) -> Option<&'a str> {
        let (inside, rest) = balanced(self.rest)?;
        self.rest = rest;
        Some(inside)
    }

    /// A macro's argument: a group, a command or one character.
    fn argument(&mut self) -> Option<&'a str> {
        self.run(char::is_whitespace);
        let from = self.rest;
        match from.chars().next() {
            Some('{') => return self.group(),
            Some('\\') => drop(self.command()),
            first => self.rest = &from[first.map_or(0, char::len_utf8)..],
        }
        Some(&from[..from.len() - self.rest.len()])
    }

    /// An exponent, index or radicand. People write `10^12` and `x^-1` where TeX wants braces.
    fn script(&mut self) -> Option<&'a str> {
        self.run(char::is_whitespace);
        let from = self.rest;
        self.take("-");
        if self.run(|c| c.is_ascii_digit()).is_empty() {
            self.rest = from;
            return self.argument();
        }
        Some(&from[..from.len() - self.rest.len()])
    }

    /// `[inside]`, if it comes next. The index of a root is short, and looking far for its end each time would not be.
    fn option(&mut self) -> Option<&'a str> {
        let inside = self.rest.strip_prefix('[')?;
        let end = inside.bytes().take(64).position(|c| c == b']')?;
        self.rest = &inside[end + 1..];
        Some(&inside[..end])
    }
}

/// Writes LaTeX as plain text in one spelling, such as `sqrt(3)/2`. `None`: unbalanced braces, or too deep.
fn plain(latex: &str, depth: usize) -> Option<String> {
    use Token::{Command, Number, Symbol, Word};
    if depth > DEEPEST {
        return None;
    }
    let inner = |latex: &str| plain(latex, depth + 1);
    let mut scan = Scan { rest: latex, open: 0 };
    let mut out = String::new();
    // Length of `out` when a fraction, root, script or group ended: a number right after it is another factor.
    let mut sealed = None;
    loop {
        let before = scan.rest;
        let Some(token) = scan.next() else { return Some(out) };
        match token {
            Number(number) => {
                if sealed == Some(out.len()) {
                    out.push('*');
                }
                out += &number;
            }
            Command("frac" | "dfrac" | "tfrac" | "cfrac") => {
                let (above, below) = (inner(scan.argument()?)?, inner(scan.argument()?)?);
                push_fraction(&mut out, &above, &below, sealed);
                sealed = Some(out.len());
            }
            Command("sqrt") | Word("sqrt") | Symbol('√') => {
                let index = scan.option().map_or(Some(String::new()), inner)?;
                out += &if index.is_empty() { "sqrt".to_owned() } else { format!("root({index})") };
                // `sqrt(2)` brings its own parentheses.
                scan.run(char::is_whitespace);
                if !scan.rest.starts_with('(') {
                    let radicand =
                        if matches!(token, Command(_)) { scan.argument()? } else { scan.script()? };
                    out += &format!("({})", inner(radicand)?);
                    sealed = Some(out.len());
                }
            }
            Symbol(script @ ('^' | '_')) => {
                let script_text = inner(scan.script()?)?;
                // Degrees are a unit.
                if !matches!(script_text.as_str(), "" | "\\circ") {
                    out.push(script);
                    out += &wrapped(&script_text);
                    sealed = Some(out.len());
                }
            }
            Symbol('{') => {
                scan.rest = before;
                out += &inner(scan.group()?)?;
                sealed = Some(out.len());
            }
            Symbol('}') => return None,
            Command("pi") | Word("pi") | Symbol('π') => {
                out += "pi";
                sealed = Some(out.len());
            }
            Command(
                "text" | "textrm" | "textbf" | "textit" | "textnormal" | "mbox" | "mathrm" | "operatorname",
            ) => match scan.argument()?.trim() {
                "and" | "or" if !out.is_empty() => out.push(','),
                _ if ends_in_value(&out) => skip_power(&mut scan)?,
                words => out += &inner(words)?,
            },
            Word("and" | "or") if !out.is_empty() => out.push(','),
            Word(unit) if ends_in_value(&out) && is_unit(unit) => {
                skip_power(&mut scan)?;
            }
            Word(word) => out += word,

            Command("left" | "right") => drop(scan.take(".")),
            Command(
                "mathbf" | "mathit" | "mathsf" | "boldsymbol" | "bf" | "rm" | "displaystyle" | "big" | "Big"
                | "bigl" | "bigr" | "Bigl" | "Bigr" | "!" | "," | ";" | ":" | "(" | ")" | "[" | "]" | "$"
                | "%" | "degree" | "",
            )
            | Symbol('$' | '%' | '°' | '£' | '€') => {}
            Command("quad" | "qquad" | " ") | Symbol('~') => push_space(&mut out, &mut scan),
            Symbol(space) if space.is_whitespace() => push_space(&mut out, &mut scan),

            Command("{" | "lbrace") => {
                scan.open += 1;
                out.push('{');
            }
            Symbol(bracket @ ('(' | '[')) => {
                scan.open += 1;
                out.push(bracket);
            }
            Command("}" | "rbrace") => {
                scan.open = scan.open.saturating_sub(1);
                out.push('}');
            }
            Symbol(bracket @ (')' | ']')) => {
                scan.open = scan.open.saturating_sub(1);
                out.push(bracket);
            }

            Command("cdot" | "times" | "ast") | Symbol('×' | '·' | '⋅') => out.push('*'),
            Command("div") | Symbol('÷') => out.push('/'),
            Symbol('−' | '–') => out.push('-'),
            Command("in") => out.push('∈'),
            Command("infty") => out.push('∞'),
            Command("cup") => out.push('∪'),
            Command("pm") => out.push('±'),
            Command("le" | "leq" | "leqslant") => out.push('≤'),
            Command("ge" | "geq" | "geqslant") => out.push('≥'),
            Command("ne" | "neq") => out.push('≠'),
            Command("lt") => out.push('<'),
            Command("gt") => out.push('>'),
            Command("emptyset" | "varnothing") | Symbol('∅') => out += "{}",
            Command(name) => {
                out.push('\\');
                out += name;
            }
            Symbol(symbol) => out.push(symbol),
        }
    }
}

/// Whether a unit may follow.
fn ends_in_value(text: &str) -> bool {
    text.ends_with(|c: char| c.is_ascii_digit() || c == ')') || text.ends_with("pi")
}

fn is_unit(word: &str) -> bool {
    UNITS.split(' ').any(|unit| unit.eq_ignore_ascii_case(word))
}

/// Drops the power of a unit.
fn skip_power(scan: &mut Scan) -> Option<()> {
    if let Some(rest) = scan.rest.trim_start().strip_prefix('^') {
        scan.rest = rest;
        scan.script()?;
    }
    Some(())
}

/// Spaces mean nothing except between numbers, which they separate, unless the second is the fraction of a mixed one.
fn push_space(out: &mut String, scan: &mut Scan) {
    scan.run(|c| c.is_whitespace() || c == '~');
    let digits = |text: &str| text.bytes().take_while(u8::is_ascii_digit).count();
    let (above, rest) = scan.rest.split_at(digits(scan.rest));
    if above.is_empty() || !out.ends_with(|c: char| c.is_ascii_digit()) {
        return;
    }
    let below = rest.strip_prefix('/').unwrap_or_default();
    let (below, rest) = below.split_at(digits(below));
    if below.is_empty() {
        out.push(' ');
    } else {
        push_fraction(out, above, below, None);
        scan.rest = rest;
    }
}

/// Appends `above/below`; after a whole number it makes a mixed one, after another factor it gets parentheses.
fn push_fraction(out: &mut String, above: &str, below: &str, sealed: Option<usize>) {
    let fraction = format!("{}/{}", wrapped(above), wrapped(below));
    let is_whole = |text: &str| !text.is_empty() && text.bytes().all(|c| c.is_ascii_digit());
    let left = out.trim_end_matches(|c: char| c.is_ascii_digit());
    let whole = out[left.len()..].to_owned();
    let part_of_more = sealed == Some(out.len()) || left.ends_with(['.', '^', '_', '/']);
    if is_whole(&whole) && is_whole(above) && is_whole(below) && !part_of_more {
        out.truncate(left.len());
        *out += &format!("({whole}+{fraction})");
    } else if out.ends_with(|c: char| c.is_alphanumeric() || ")./^_".contains(c)) {
        *out += &format!("({fraction})");
    } else {
        *out += &fraction;
    }
}

/// In parentheses, unless it is one number, letter or name.
fn wrapped(text: &str) -> Cow<'_, str> {
    let number = text.bytes().all(|c| c.is_ascii_digit() || c == b'.');
    let name = text.strip_prefix('\\').is_some_and(|n| n.bytes().all(|c| c.is_ascii_alphabetic()));
    if number || name || text == "pi" || text.chars().count() == 1 {
        Cow::Borrowed(text)
    } else {
        Cow::Owned(format!("({text})"))
    }
}

// ------------------------------------------------------------------------------------------ plain text to the key

/// The spelling of plain text that compares: values worked out, sets and lists in order.
fn key(text: &str, depth: usize) -> String {
    if depth > DEEPEST {
        return text.to_owned();
    }
    let parts = split(text);
    if parts.len() > 1 {
        // `x=1,x=2` lists two values; `x=1,y=2` must not equal `x=2,y=1`.
        let names: BTreeSet<&str> =
            parts.iter().filter_map(|part| name(part)).map(|(name, _)| name).collect();
        let named = |part: &str| match name(part) {
            Some((name, value)) if names.len() > 1 => format!("{name}={}", key(value, depth + 1)),
            _ => key(part, depth + 1),
        };
        let mut keys: Vec<String> = parts.into_iter().map(named).collect();
        keys.sort_unstable();
        return keys.join(",");
    }
    let text = name(text).map_or(text, |(_, value)| value);
    if let Some(number) = text.strip_prefix('±').filter(|number| evaluate(number).is_some()) {
        return key(&format!("-({number}),{number}"), depth + 1);
    }
    if let Some((left, inside, right)) = bracketed(text) {
        let mut keys: Vec<String> = split(inside).into_iter().map(|part| key(part, depth + 1)).collect();
        match (left, right) {
            ('(', ')') if keys.len() == 1 => return keys.remove(0),
            ('{', _) => keys.sort_unstable(),
            _ => {}
        }
        return format!("{left}{}{right}", keys.join(","));
    }
    value(text).unwrap_or_else(|| {
        let text = text.trim();
        // Words are the same in any case; `AB` and `ab`, `x` and `X` are not words.
        let letters = text.len() > 1 && text.bytes().all(|c| c.is_ascii_alphabetic());
        if letters && text.bytes().any(|c| c.is_ascii_lowercase()) {
            return text.to_ascii_lowercase();
        }
        // A product needs its sign only before a number: `2*x` is `2x`.
        let mut factors = text.split('*');
        let mut product = factors.next().unwrap_or_default().to_owned();
        for factor in factors {
            let implied = factor.starts_with(|c: char| c.is_alphabetic() || "(\\".contains(c));
            product += if implied { "" } else { "*" };
            product += factor;
        }
        product
    })
}

/// Splits `x=5`, `f(x)=5` and `x∈S` into name and value.
fn name(text: &str) -> Option<(&str, &str)> {
    let (name, value) = text.split_once(['=', '∈'])?;
    let is_name = name.starts_with(|c: char| c.is_ascii_alphabetic() || "(\\".contains(c))
        && name.bytes().any(|c| c.is_ascii_alphabetic())
        && name.chars().all(|c| c.is_ascii_alphanumeric() || "_(),\\'".contains(c));
    (is_name && !value.is_empty() && !value.contains(['=', '∈'])).then_some((name, value))
}

/// The parts between commas that are in no bracket.
fn split(text: &str) -> Vec<&str> {
    let mut depth = 0usize;
    text.split(|c: char| {
        match c {
            '(' | '[' | '{' => depth += 1,
            ')' | ']' | '}' => depth = depth.saturating_sub(1),
            _ => {}
        }
        c == ',' && depth == 0
    })
    .collect()
}

/// Splits `(inside)` if the first bracket closes at the end; half-open intervals mix brackets.
fn bracketed(text: &str) -> Option<(char, &str, char)> {
    let left = text.chars().next().filter(|c| "([{".contains(*c))?;
    let mut depth = 0usize;
    for (i, c) in text.char_indices() {
        match c {
            '(' | '[' | '{' => depth += 1,
            ')' | ']' | '}' => depth -= 1,
            _ => {}
        }
        if depth == 0 {
            return (i + c.len_utf8() == text.len()).then(|| (left, &text[1..i], c));
        }
    }
    None
}

/// The canonical number that `text` works out to. Whole numbers keep all their digits.
fn value(text: &str) -> Option<String> {
    let (sign, digits) = text.strip_prefix('-').map_or(("", text), |digits| ("-", digits));
    if !digits.is_empty() && digits.bytes().all(|c| c.is_ascii_digit()) {
        let digits = digits.trim_start_matches('0');
        return Some(if digits.is_empty() { "0".to_owned() } else { format!("{sign}{digits}") });
    }
    let exact = evaluate(text)?;
    const LAST_WHOLE: f64 = (1u64 << f64::MANTISSA_DIGITS) as f64;
    // Adding zero turns -0 into 0.
    let shown = if exact.fract() == 0.0 && exact.abs() <= LAST_WHOLE {
        exact + 0.0
    } else {
        format!("{exact:.11e}").parse::<f64>().ok()? + 0.0
    };
    Some(shown.to_string())
}

/// The value of an arithmetic expression, if that is what `text` is and the value is finite.
fn evaluate(text: &str) -> Option<f64> {
    let mut parser = Arithmetic { rest: text, depth: 0 };
    let value = parser.sum()?;
    (parser.rest.is_empty() && value.is_finite()).then_some(value)
}

/// Recursive descent. A number or name next to another is a factor; roots and parentheses may be, digits may not.
struct Arithmetic<'a> {
    rest: &'a str,
    depth: usize,
}

impl Arithmetic<'_> {
    fn take(&mut self, prefix: &str) -> bool {
        let rest = self.rest.strip_prefix(prefix);
        self.rest = rest.unwrap_or(self.rest);
        rest.is_some()
    }

    fn sum(&mut self) -> Option<f64> {
        self.depth += 1;
        if self.depth > DEEPEST {
            return None;
        }
        let mut value = self.product()?;
        loop {
            if self.take("+") {
                value += self.product()?;
            } else if self.take("-") {
                value -= self.product()?;
            } else {
                self.depth -= 1;
                return Some(value);
            }
        }
    }

    fn product(&mut self) -> Option<f64> {
        let mut value = self.signed()?;
        loop {
            if self.take("*") {
                value *= self.signed()?;
            } else if self.take("/") {
                value /= self.signed()?;
            } else if self.rest.starts_with(['(', 's', 'r', 'p']) {
                value *= self.power()?;
            } else {
                return Some(value);
            }
        }
    }

    fn signed(&mut self) -> Option<f64> {
        let mut sign = 1.0;
        while self.rest.starts_with(['-', '+']) {
            sign *= if self.take("-") { -1.0 } else { 1.0 };
            self.take("+");
        }
        Some(sign * self.power()?)
    }

    fn power(&mut self) -> Option<f64> {
        let base = self.atom()?;
        // `plain` wraps every exponent that is more than a number or a name.
        if self.take("^") { Some(base.powf(self.atom()?)) } else { Some(base) }
    }

    fn atom(&mut self) -> Option<f64> {
        if self.take("sqrt") {
            return Some(self.parentheses()?.sqrt());
        }
        if self.take("root") {
            let (index, radicand) = (self.parentheses()?, self.parentheses()?);
            let odd = (index % 2.0).abs() == 1.0;
            let root = if odd {
                radicand.abs().powf(index.recip()).copysign(radicand)
            } else {
                radicand.powf(index.recip())
            };
            return Some(root);
        }
        if self.take("pi") {
            return Some(std::f64::consts::PI);
        }
        if self.rest.starts_with('(') {
            return self.parentheses();
        }
        let len = self.rest.bytes().take_while(|c| c.is_ascii_digit() || *c == b'.').count();
        let (number, rest) = self.rest.split_at(len);
        self.rest = rest;
        number.parse().ok()
    }

    fn parentheses(&mut self) -> Option<f64> {
        if !self.take("(") {
            return None;
        }
        let value = self.sum()?;
        self.take(")").then_some(value)
    }
}
