//! LaTeX to plain text in one spelling, such as `√(3)/2`.

use std::borrow::Cow;

use num::{BigInt, BigRational, pow};

use super::{DEEPEST, Work, canonical};
use crate::verifier::number::{self, SEPARATORS};

/// Words that say what a value counts rather than what it is.
const UNITS: &str = "acre acres cc cent cents centimeter centimeters centimetre centimetres cl cm cny cu cubic cup cups \
    day days decade decades deg degree degrees dm dollar dollars eur euro euros feet foot ft gallon gallons gbp gram \
    grams hour hours hr hrs hz inch inches inr joule joules kg kilogram kilograms kilometer kilometers kilometre \
    kilometres km kmh kph kw kwh lb lbs liter liters litre litres meter meters metre metres mg mi mile miles milligrams \
    milliliter milliliters millilitres millimeter millimeters millimetres min mins minute minutes ml mm month months \
    mph newton newtons ounce ounces oz per percent pint pints point points pound pounds quart quarts rad radian \
    radians rupee rupees sec second seconds secs sq square ton tonne tonnes tons unit units usd volt volts watt watts \
    week weeks yard yards year years yen yuan";

/// Words that say more of a number than what it counts, directions and halves of the day among them.
const NOT_UNITS: &str = "a above ad am and anticlockwise approximately at base bc bce below between billion but by ce \
    choose clockwise counterclockwise cubed debt divided down dozen east even factorial from gain hundred i is left less \
    loss million minus mod modulo more negative neither nor north not odd or over p plus pm positive profit r remainder \
    right south squared than thousand through times to trillion unless up west with";

/// Letters that stand for a unit even alone, if they are set upright.
const UNIT_LETTERS: &str = "A C F J K L N V W g h l m s";

/// Text macros: words in a formula.
const TEXT: [&str; 9] =
    ["text", "textrm", "textbf", "textit", "textnormal", "textsf", "mbox", "mathrm", "operatorname"];

fn listed(list: &str, word: &str) -> bool {
    list.split_ascii_whitespace().any(|entry| entry.eq_ignore_ascii_case(word))
}

/// The power of ten that a word multiplies by.
fn scale(word: &str) -> Option<usize> {
    let scales = [("hundred", 2), ("thousand", 3), ("million", 6), ("billion", 9), ("trillion", 12)];
    scales.iter().find(|(name, _)| name.eq_ignore_ascii_case(word)).map(|&(_, power)| power)
}

/// Splits `{inside}rest`. Escaped braces do not count.
pub(super) fn balanced(text: &str) -> Option<(&str, &str)> {
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

// -------------------------------------------------------------------------------------------------------- scanner

/// The rest of a LaTeX text.
#[derive(Clone)]
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
    /// A number without its thousands separators and exponent.
    Number(String),
    Symbol(char),
}

impl<'a> Scan<'a> {
    fn next(&mut self) -> Option<Token<'a>> {
        let first = self.rest.chars().next()?;
        if first == '\\' {
            return Some(Token::Command(self.command()));
        }
        if first.is_ascii_alphabetic() {
            return Some(Token::Word(self.run(|c| c.is_ascii_alphabetic())));
        }
        if let Some((len, digits)) = self.literal() {
            self.rest = &self.rest[len..];
            return Some(Token::Number(self.repeating(&digits).unwrap_or_else(|| plain_digits(digits))));
        }
        self.rest = &self.rest[first.len_utf8()..];
        Some(Token::Symbol(first))
    }

    fn literal(&self) -> Option<(usize, String)> {
        const SPACES: [&str; 2] = ["\\ ", " "];
        let separators: Vec<&str> =
            SEPARATORS.iter().chain(&SPACES).copied().filter(|s| *s != "," || self.open == 0).collect();
        number::literal(self.rest, &separators)
    }

    /// Goes on with a decimal whose last digits repeat, `0.1\overline{6}`, as a fraction.
    fn repeating(&mut self, digits: &str) -> Option<String> {
        let from = self.rest.strip_prefix('.').filter(|_| !digits.contains('.')).unwrap_or(self.rest);
        let mut scan = Scan { rest: from, open: 0 };
        if from.len() == self.rest.len() && !digits.contains('.') || !from.starts_with('\\') {
            return None;
        }
        let bar = matches!(scan.command(), "overline" | "bar" | "dot");
        let period =
            scan.argument().filter(|p| bar && !p.is_empty() && p.bytes().all(|c| c.is_ascii_digit()))?;
        let (whole, decimals) = digits.split_once('.').unwrap_or((digits, ""));
        let int = |digits: &str| format!("0{digits}").parse::<BigInt>().ok();
        if whole.len() + decimals.len() + period.len() > 100 {
            return None;
        }
        let before = format!("{whole}{decimals}");
        let above = int(&format!("{before}{period}"))? - int(&before)?;
        let ten = |power| pow(BigInt::from(10), power);
        let below = (ten(period.len()) - 1) * ten(decimals.len());
        self.rest = scan.rest;
        let value = BigRational::new(above, below);
        Some(if value.is_integer() { value.to_string() } else { format!("({value})") })
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

    /// Takes spaces, those of LaTeX included.
    fn spaces(&mut self) {
        loop {
            let before = self.rest.len();
            self.run(|c| c.is_whitespace() || c == '~');
            for space in ["\\,", "\\;", "\\:", "\\!", "\\ ", "\\quad", "\\qquad"] {
                self.take(space);
            }
            if self.rest.len() == before {
                return;
            }
        }
    }

    /// Whether a value ends here: at the end of the text or of an entry.
    fn at_end(&self) -> bool {
        let mut scan = self.clone();
        loop {
            scan.spaces();
            match scan.clone().next() {
                None => return true,
                Some(Token::Symbol('$' | '.')) | Some(Token::Command("right" | "(" | ")" | "[" | "]")) => {
                    scan.next();
                }
                Some(Token::Symbol(c)) => return ",;)]}&=".contains(c),
                Some(Token::Word(word)) => return matches!(word, "and" | "or"),
                Some(Token::Command(name)) if TEXT.contains(&name) => {
                    scan.next();
                    let words = scan.argument().unwrap_or_default().trim().trim_start_matches(',').trim();
                    return words.is_empty() || matches!(words, "and" | "or");
                }
                Some(Token::Command(name)) => {
                    return matches!(name, "}" | "rbrace" | "rbrack" | "\\" | "cup" | "cap" | "end");
                }
                Some(Token::Number(_)) => return false,
            }
        }
    }

    /// Takes what says what a value counts, `\text{ km}/\text{h}^2`, `^\circ\text{C}`, `\%`, if the value ends there.
    /// `tried`: the length of `rest` up to which this has been looked at in vain, and would be again.
    fn unit(&mut self, tried: &mut usize) -> bool {
        if self.rest.len() > *tried {
            return false;
        }
        let mut scan = self.clone();
        let taken = scan.unit_words() && scan.at_end();
        *tried = scan.rest.len();
        if taken {
            self.rest = scan.rest;
        }
        taken
    }

    /// Takes words, powers, degrees and quotients of units. Whether there were any, and none is half a quotient.
    fn unit_words(&mut self) -> bool {
        let (mut any, mut bar, mut degrees) = (false, false, false);
        loop {
            let mut ahead = self.clone();
            ahead.spaces();
            let mut joins = false;
            let unit = match ahead.next() {
                Some(Token::Word(word)) => {
                    listed(UNITS, word)
                        || bar && UNIT_LETTERS.split(' ').any(|letter| letter == word)
                        || degrees && matches!(word, "C" | "F" | "K")
                }
                Some(Token::Command(name)) if TEXT.contains(&name) => {
                    ahead.argument().is_some_and(|words| is_unit(words) || degrees && words.trim().len() == 1)
                }
                Some(Token::Command("%" | "degree") | Token::Symbol('%' | '°')) => {
                    degrees = true;
                    true
                }
                Some(Token::Symbol('^')) => {
                    let script = ahead.script().map(|s| s.trim_matches(['{', '}', ' ']));
                    degrees |= script == Some("\\circ");
                    script == Some("\\circ") || any && script.is_some_and(is_power)
                }
                Some(Token::Command("frac" | "dfrac" | "tfrac")) => [(); 2].iter().all(|()| {
                    ahead.argument().filter(|part| !part.contains("frac")).is_some_and(|part| {
                        let mut part = Scan { rest: part, open: 0 };
                        part.unit_words() && part.rest.trim().is_empty()
                    })
                }),
                Some(Token::Symbol('/' | '·') | Token::Command("cdot")) => {
                    joins = true;
                    any && !bar
                }
                _ => false,
            };
            if !unit {
                return any && !bar;
            }
            (any, bar, *self) = (true, joins, ahead);
        }
    }
}

/// Whether the argument of a text macro, after a value, is a unit or a noun: `cm^2`, `km/h`, `apples`; but not
/// ` or 6`, ` million`, `i`.
fn is_unit(words: &str) -> bool {
    let words = words.trim();
    let mut before = ' ';
    let spelled = words.chars().all(|c| {
        let power = c.is_ascii_digit() && (before == '^' || before == '-');
        if !"{}$".contains(c) {
            before = c;
        }
        c.is_alphabetic() || power || " ./^(){}$-%'".contains(c)
    });
    let mut letters = words.split(|c: char| !c.is_alphabetic()).filter(|word| !word.is_empty()).peekable();
    let alone = letters.peek().is_some_and(|word| words == *word && word.chars().count() == 1);
    let unit = if alone { UNIT_LETTERS.contains(words) } else { !letters.any(|w| listed(NOT_UNITS, w)) };
    spelled && unit && !words.is_empty()
}

fn is_power(script: &str) -> bool {
    let digits = script.strip_prefix('-').unwrap_or(script);
    digits.len() == 1 && digits.bytes().all(|c| c.is_ascii_digit())
}

/// A number without its exponent: `1e-3` is `0.001`.
fn plain_digits(number: String) -> String {
    let Some((mantissa, exponent)) = number.split_once(['e', 'E']) else { return number };
    let exponent = exponent.parse::<i32>().ok().filter(|e| e.abs() <= 400);
    exponent.map_or_else(|| number.clone(), |exponent| shifted(mantissa, exponent))
}

/// Moves the decimal point to the right.
fn shifted(digits: &str, by: i32) -> String {
    let (whole, decimals) = digits.split_once('.').unwrap_or((digits, ""));
    let point = whole.len() as i32 + by;
    let all = format!("{}{whole}{decimals}", "0".repeat(1.max(1 - point) as usize));
    let point = (point + 1.max(1 - point)) as usize;
    let all = format!("{all}{}", "0".repeat(point.saturating_sub(all.len())));
    let (whole, decimals) = all.split_at(point);
    let (whole, decimals) = (whole.trim_start_matches('0'), decimals.trim_end_matches('0'));
    let whole = if whole.is_empty() { "0" } else { whole };
    if decimals.is_empty() { whole.to_owned() } else { format!("{whole}.{decimals}") }
}

// --------------------------------------------------------------------------------------------------------- writer

/// Writes LaTeX as plain text. `None`: unbalanced braces, or too deep.
///
/// Inside of the text `√(x)` is a root, `∛(n)(x)` the n-th, `1⊕1/2` a mixed number, `⟦name|a,b;c,d⟧` a matrix whose
/// entries are [`canonical`].
pub(super) fn plain(latex: &str, work: Work, depth: usize) -> Option<String> {
    let mut writer = Writer { out: String::new(), sealed: None, worded: None, work };
    writer.write(latex, depth)?;
    Some(writer.out)
}

struct Writer {
    out: String,
    /// Length of `out` when a fraction, root, script or group ended: a number right after it is another factor.
    sealed: Option<usize>,
    /// Length of `out` where words begin that are no unit.
    worded: Option<usize>,
    work: Work,
}

impl Writer {
    fn write(&mut self, latex: &str, depth: usize) -> Option<()> {
        use Token::{Command, Number, Symbol, Word};
        if depth > DEEPEST {
            return None;
        }
        let work = self.work;
        let inner = |latex: &str| plain(latex, work, depth + 1);
        let begun = self.out.len();
        let (mut scan, mut tried) = (Scan { rest: latex, open: 0 }, usize::MAX);
        if latex.trim_start().starts_with(']') {
            // `]0, 1[`
            scan.open = 1;
        }
        loop {
            let before = scan.rest;
            if self.ends_in_value() && self.worded != Some(self.out.len()) && scan.unit(&mut tried) {
                self.seal();
            }
            let Some(token) = scan.next() else { return Some(()) };
            match token {
                Number(number) => self.number(&number),
                Command("frac" | "dfrac" | "tfrac" | "cfrac" | "nicefrac" | "sfrac") => {
                    let (above, below) = (inner(scan.argument()?)?, inner(scan.argument()?)?);
                    self.fraction(&above, &below);
                    self.seal();
                }
                Command("over") => {
                    let above = self.out.split_off(begun);
                    self.fraction(&above, &inner(scan.rest)?);
                    self.seal();
                    return Some(());
                }
                Command("sqrt") | Word("sqrt") | Symbol('√' | '∛') => {
                    let index = match token {
                        Symbol('∛') => "3".to_owned(),
                        _ => scan.option().map_or(Some(String::new()), inner)?,
                    };
                    self.out +=
                        &if matches!(&*index, "" | "2") { "√".to_owned() } else { format!("∛({index})") };
                    // `sqrt(2)` brings its own parentheses.
                    scan.run(char::is_whitespace);
                    if !scan.rest.starts_with('(') {
                        let radicand =
                            if matches!(token, Command(_)) { scan.argument()? } else { scan.script()? };
                        self.out += &format!("({})", inner(radicand)?);
                        self.seal();
                    }
                }
                Symbol('*') if scan.take("*") => self.script('^', &inner(scan.script()?)?),
                Symbol(script @ ('^' | '_')) => self.script(script, &inner(scan.script()?)?),
                Symbol('{') => {
                    scan.rest = before;
                    self.write(scan.group()?, depth + 1)?;
                }
                Symbol('}') => return None,
                Command("pi") | Word("pi") | Symbol('π') => {
                    self.out.push('π');
                    self.seal();
                }
                Command(name) if TEXT.contains(&name) => self.text(scan.argument()?, depth)?,
                Word("and" | "or") if !self.out.is_empty() => self.comma(),
                Word(word) if self.scale(word) => {}
                Word("infinity" | "infty" | "inf") => self.out.push('∞'),
                Word(word) if is_currency(word) && before_amount(&self.out, &mut scan) => {}
                Word(word) => self.out += word,

                Command("left" | "right" | "middle") => drop(scan.take(".")),
                Command("color" | "hspace" | "vspace" | "phantom" | "mspace" | "tag" | "label") => {
                    scan.take("*");
                    scan.argument()?;
                }
                Command("textcolor") => drop(scan.argument()?),
                Command(
                    "mathbf" | "mathit" | "mathsf" | "mathtt" | "boldsymbol" | "bm" | "bf" | "rm"
                    | "underline" | "displaystyle" | "textstyle" | "limits" | "big" | "Big" | "bigg" | "Bigg"
                    | "bigl" | "bigr" | "Bigl" | "Bigr" | "(" | ")" | "[" | "]" | "$" | "%" | "degree"
                    | "textdollar" | "hline" | "",
                )
                | Symbol('$' | '%' | '°' | '£' | '€' | '¥' | '₹' | '₩' | '₽' | '¢') => {}
                Command("quad" | "qquad" | " " | "," | ";" | ":" | "!" | ">" | "thinspace" | "enspace")
                | Symbol('~') => self.space(&mut scan),
                Symbol(space) if space.is_whitespace() => self.space(&mut scan),
                // The end of a line.
                Command("\\" | "newline") => {
                    scan.spaces();
                    if !self.out.is_empty() && !scan.rest.is_empty() {
                        self.comma();
                    }
                }

                Command("{" | "lbrace") => self.open(&mut scan, '{'),
                Command("lbrack") => self.open(&mut scan, '['),
                Command("lparen") => self.open(&mut scan, '('),
                Command("langle") | Symbol('⟨') => self.open(&mut scan, '⟨'),
                Symbol(bracket @ ('(' | '[')) => self.open(&mut scan, bracket),
                Command("}" | "rbrace") => self.close(&mut scan, '}'),
                Command("rbrack") => self.close(&mut scan, ']'),
                Command("rparen") => self.close(&mut scan, ')'),
                Command("rangle") | Symbol('⟩') => self.close(&mut scan, '⟩'),
                Symbol(bracket @ (')' | ']')) => self.close(&mut scan, bracket),

                Command("begin") => self.environment(&mut scan, depth)?,
                Command("cdot" | "times" | "ast") | Symbol('×' | '·' | '⋅' | '∗' | '•') => {
                    self.out.push('*')
                }
                Command("div") | Symbol('÷') => self.out.push('÷'),
                // Between numbers it is a range.
                Symbol('–' | '—') if !self.ends_in_value() => self.out.push('-'),
                Symbol('–' | '—') => self.out.push('–'),
                Symbol(',' | ';') => self.comma(),
                Symbol('<') if scan.take("=") => self.out.push('≤'),
                Symbol('>') if scan.take("=") => self.out.push('≥'),
                Symbol('!') if scan.take("=") => self.out.push('≠'),
                Command("not") if scan.rest.trim_start().starts_with('=') => {
                    scan.run(char::is_whitespace);
                    scan.take("=");
                    self.out.push('≠');
                }
                Command("mathbb") => {
                    let name = scan.argument()?.trim_matches(['{', '}']);
                    self.out += set(name).unwrap_or(name);
                }
                Command(name) => match symbol(name) {
                    Some(symbol) => self.out += symbol,
                    None => {
                        self.out.push('\\');
                        self.out += name;
                    }
                },
                Symbol('∅') => self.out += "{}",
                Symbol(symbol) => self.out.push(symbol),
            }
        }
    }

    fn seal(&mut self) {
        self.sealed = Some(self.out.len());
    }

    /// Whether a unit may follow.
    fn ends_in_value(&self) -> bool {
        self.out.ends_with(|c: char| c.is_ascii_digit() || c == ')' || c == 'π')
    }

    /// Never joins two numbers: whatever stood between them and was dropped, they are factors or stand apart.
    fn number(&mut self, digits: &str) {
        if self.out.ends_with(|c: char| c.is_ascii_digit() || c == '.') {
            self.out.push(' ');
        } else if self.sealed == Some(self.out.len()) && !self.out.is_empty() {
            self.out.push('*');
        }
        self.out += digits;
    }

    fn comma(&mut self) {
        if !self.out.ends_with(',') {
            self.out.push(',');
        }
    }

    fn open(&mut self, scan: &mut Scan, bracket: char) {
        scan.open += 1;
        self.out.push(bracket);
    }

    fn close(&mut self, scan: &mut Scan, bracket: char) {
        scan.open = scan.open.saturating_sub(1);
        self.out.push(bracket);
    }

    fn script(&mut self, kind: char, text: &str) {
        // Degrees are a unit.
        if !matches!(text, "" | "\\circ") {
            self.out.push(kind);
            self.out += &wrapped(text);
            self.seal();
        }
    }

    /// What a text macro holds, where it is no unit.
    fn text(&mut self, words: &str, depth: usize) -> Option<()> {
        let trimmed = words.trim();
        let (first, rest) = trimmed.split_once(' ').unwrap_or((trimmed, ""));
        match trimmed {
            "and" | "or" if !self.out.is_empty() => self.comma(),
            _ if self.scale(first) => {
                // `5\text{ million dollars}`
                if !is_unit(rest) {
                    self.worded = Some(self.out.len());
                    self.write(rest, depth + 1)?;
                }
            }
            _ if self.out.is_empty() && is_currency(trimmed.trim_end_matches('.')) => {}
            words => {
                self.worded = Some(self.out.len());
                self.write(words, depth + 1)?;
            }
        }
        Some(())
    }

    /// Multiplies the number before by what a word such as `million` says, if it is one.
    fn scale(&mut self, word: &str) -> bool {
        let left = self.out.trim_end_matches(|c: char| c.is_ascii_digit() || c == '.').len();
        let Some(power) = scale(word).filter(|_| left < self.out.len()) else { return false };
        let digits = self.out.split_off(left);
        self.out += &shifted(&digits, power as i32);
        true
    }

    /// Spaces mean nothing, unless a fraction follows that makes a number a mixed one.
    fn space(&mut self, scan: &mut Scan) {
        scan.spaces();
        let digits = |text: &str| text.bytes().take_while(u8::is_ascii_digit).count();
        let (above, rest) = scan.rest.split_at(digits(scan.rest));
        let below = rest.strip_prefix('/').unwrap_or_default();
        let (below, rest) = below.split_at(digits(below));
        if self.out.ends_with(|c: char| c.is_ascii_digit()) && !above.is_empty() && !below.is_empty() {
            self.fraction(above, below);
            self.seal();
            scan.rest = rest;
        }
    }

    /// Appends `above/below`; after a whole number it makes a mixed one, after another factor it gets parentheses.
    fn fraction(&mut self, above: &str, below: &str) {
        // A sign before a fraction is the numerator's.
        let first = self.out.is_empty() || self.out.ends_with(['(', '[', '{', ',', '=', '<', '≤', '∈']);
        let above = match above
            .strip_prefix('-')
            .filter(|above| first && !above.starts_with('-') && is_product(above))
        {
            Some(above) => {
                self.out.push('-');
                above
            }
            None => above,
        };
        let above = if is_product(above) { Cow::Borrowed(above) } else { wrapped(above) };
        let fraction = format!("{above}/{}", wrapped(below));
        let above = &*above;
        let is_whole = |text: &str| !text.is_empty() && text.bytes().all(|c| c.is_ascii_digit());
        let left = self.out.trim_end_matches(|c: char| c.is_ascii_digit());
        let whole = self.out[left.len()..].to_owned();
        let part_of_more =
            self.sealed == Some(self.out.len()) || left.ends_with(['.', '^', '_', '/', '⊕', '÷']);
        if is_whole(&whole) && is_whole(above) && is_whole(below) && !part_of_more {
            self.out.truncate(left.len());
            self.out += &format!("({whole}⊕{fraction})");
        } else if self.out.ends_with(|c: char| c.is_alphanumeric() || ")./^_÷".contains(c)) {
            self.out += &format!("({fraction})");
        } else {
            self.out += &fraction;
        }
    }

    /// `\begin{name}...\end{name}`: a matrix, cases, or lines of a display.
    fn environment(&mut self, scan: &mut Scan, depth: usize) -> Option<()> {
        let name = scan.argument()?.trim_end_matches('*');
        if name == "array" {
            scan.argument()?;
        }
        let (inside, rest) = environment(scan.rest)?;
        scan.rest = rest;
        let mut rows: Vec<Vec<&str>> = vec![vec![]];
        for (cell, ends_row) in cells(inside) {
            rows.last_mut()?.push(cell.trim().trim_start_matches("\\hline").trim());
            if ends_row {
                rows.push(vec![]);
            }
        }
        // A last `\\` is layout.
        while rows.pop_if(|row| row.iter().all(|cell| cell.is_empty())).is_some() {}
        if matches!(name, "aligned" | "align" | "gathered" | "gather" | "split" | "equation") {
            for (i, row) in rows.iter().enumerate() {
                if i > 0 {
                    self.comma();
                }
                self.write(&row.concat(), depth + 1)?;
            }
            return Some(());
        }
        let matrix = matches!(name, "matrix" | "pmatrix" | "bmatrix" | "smallmatrix" | "array");
        let rows: Option<Vec<String>> = rows
            .into_iter()
            .map(|row| {
                let cells: Option<Vec<String>> =
                    row.into_iter().map(|cell| canonical(cell, self.work, depth + 1)).collect();
                Some(cells?.join(","))
            })
            .collect();
        self.out += &format!("⟦{}|{}⟧", if matrix { "matrix" } else { name }, rows?.join(";"));
        self.seal();
        Some(())
    }
}

/// Splits a text after its first `\begin{..}` at the `\end{..}` that belongs to it.
fn environment(text: &str) -> Option<(&str, &str)> {
    let mut depth = 0usize;
    for (i, _) in text.match_indices('\\') {
        if text[i..].starts_with("\\begin{") {
            depth += 1;
        } else if let Some(after) = text[i..].strip_prefix("\\end{") {
            let Some(deeper) = depth.checked_sub(1) else {
                return Some((&text[..i], after.split_once('}')?.1));
            };
            depth = deeper;
        }
    }
    None
}

/// The cells of a matrix, each with whether it ends its row.
fn cells(inside: &str) -> Vec<(&str, bool)> {
    let (mut found, mut depth, mut from) = (Vec::new(), 0usize, 0);
    let mut chars = inside.char_indices();
    while let Some((i, c)) = chars.next() {
        match c {
            '{' => depth += 1,
            '}' => depth = depth.saturating_sub(1),
            '&' if depth == 0 => {
                found.push((&inside[from..i], false));
                from = i + 1;
            }
            '\\' if inside[i..].starts_with("\\begin{") => depth += 1,
            '\\' if inside[i..].starts_with("\\end{") => depth = depth.saturating_sub(1),
            '\\' => {
                if let Some((_, '\\')) = chars.next()
                    && depth == 0
                {
                    found.push((&inside[from..i], true));
                    from = i + 2;
                }
            }
            _ => {}
        }
    }
    found.push((&inside[from..], false));
    found
}

fn is_currency(word: &str) -> bool {
    listed("US USD EUR GBP JPY CNY INR CAD AUD CHF RMB HK CA AU NZ Rs", word)
}

/// Whether an amount follows, perhaps after a sign of money.
fn before_amount(out: &str, scan: &mut Scan) -> bool {
    let mut ahead = scan.clone();
    ahead.take(".");
    ahead.spaces();
    let sign = ahead.take("\\$") || ahead.take("$");
    let amount = ahead.rest.starts_with(|c: char| c.is_ascii_digit() || c == '.');
    let first = out.is_empty() || out.ends_with(['-', '+', '=', ',', '(', '[', '{']);
    let is = first && amount && (sign || ahead.rest.len() < scan.rest.len() || out.is_empty());
    if is {
        *scan = ahead;
    }
    is
}

/// The sets of numbers.
fn set(name: &str) -> Option<&'static str> {
    Some(match name {
        "R" => "ℝ",
        "Z" => "ℤ",
        "N" => "ℕ",
        "Q" => "ℚ",
        "C" => "ℂ",
        _ => return None,
    })
}

/// One character for commands that have one.
fn symbol(name: &str) -> Option<&'static str> {
    Some(match name {
        "in" => "∈",
        "infty" | "infin" => "∞",
        "cup" => "∪",
        "cap" => "∩",
        "pm" => "±",
        "le" | "leq" | "leqslant" => "≤",
        "ge" | "geq" | "geqslant" => "≥",
        "ne" | "neq" => "≠",
        "lt" => "<",
        "gt" => ">",
        "emptyset" | "varnothing" => "{}",
        "colon" => ":",
        "mid" | "vert" | "lvert" | "rvert" => "|",
        "ldots" | "dots" | "cdots" | "dotsc" => "…",
        "setminus" | "backslash" => "∖",
        "land" | "wedge" => "∧",
        "lor" | "vee" => "∨",
        "rightarrow" | "to" => "→",
        "prime" => "'",
        _ => return None,
    })
}

/// Whether `text/2` is a fraction of all of the text.
fn is_product(text: &str) -> bool {
    !text.is_empty()
        && !text.starts_with('*')
        && text.chars().all(|c| c.is_alphanumeric() || "\\^*.".contains(c))
}

/// In parentheses, unless it is one number, letter or name.
fn wrapped(text: &str) -> Cow<'_, str> {
    let number = text.bytes().all(|c| c.is_ascii_digit() || c == b'.');
    let name = text.strip_prefix('\\').is_some_and(|n| n.bytes().all(|c| c.is_ascii_alphabetic()));
    if number || name || text.chars().count() == 1 {
        Cow::Borrowed(text)
    } else {
        Cow::Owned(format!("({text})"))
    }
}
