//! Text to tokens (PTX ISA, "Source Format", "Identifiers", "Constants").

/// A token: its kind and its place. `start..end` are byte offsets, so names borrow from the text.
#[derive(Clone, Copy, Debug)]
pub(super) struct Token {
    pub(super) kind: TokenKind,
    pub(super) start: usize,
    pub(super) end: usize,
    pub(super) line: u32,
}

/// The kinds of tokens.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum TokenKind {
    /// `add`, `%r1`, `$L__BB0_1`, `_`
    Word,
    /// `.f32`, `.shared::cta`, `.16x256b`: a directive or a modifier, its dot included.
    Dot,
    /// An integer; whether it is unsigned (`U` suffix, or too large for `.s64`).
    Int(u64, bool),
    /// `0f3F800000`
    F32(u32),
    /// `0d3FF0000000000000`, `1.5`
    F64(f64),
    /// `"text"`, without escapes: PTX has none.
    Text,
    /// `;`, `{`, `+`, ... and of the operators with two characters the first, see [`TokenKind::Double`].
    Mark(u8),
    /// `<<`, `>>`, `<=`, `>=`, `==`, `!=`, `&&`, `||`: both characters.
    Double([u8; 2]),
    /// Nothing is left.
    End,
}

/// Text that is no token: the message, and where.
#[derive(Debug)]
pub(super) struct Bad {
    pub(super) message: String,
    pub(super) start: usize,
    pub(super) line: u32,
}

/// Reads tokens one at a time.
#[derive(Debug)]
pub(super) struct Lexer<'a> {
    text: &'a str,
    bytes: &'a [u8],
    at: usize,
    line: u32,
}

/// Characters that go on a name: `[A-Za-z0-9_$]`.
const fn is_name(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || byte == b'_' || byte == b'$'
}

/// `is_name` as a table; most of the text is names.
const NAME: [bool; 256] = {
    let mut table = [false; 256];
    let mut byte = 0;
    while byte < 256 {
        table[byte] = is_name(byte as u8);
        byte += 1;
    }
    table
};

impl<'a> Lexer<'a> {
    pub(super) fn new(text: &'a str) -> Self {
        Self { text, bytes: text.as_bytes(), at: 0, line: 1 }
    }

    fn byte(&self, at: usize) -> u8 {
        self.bytes.get(at).copied().unwrap_or(0)
    }

    fn bad<T>(&self, start: usize, message: impl Into<String>) -> Result<T, Bad> {
        Err(Bad { message: message.into(), start, line: self.line })
    }

    /// The end of the run of name characters that starts at `at`.
    fn name_end(&self, mut at: usize) -> usize {
        while at < self.bytes.len() && NAME[usize::from(self.bytes[at])] {
            at += 1;
        }
        at
    }

    /// Skips blanks, comments and `#` lines (line markers of a preprocessor).
    fn skip(&mut self) -> Result<(), Bad> {
        let mut line_start = self.at == 0;
        loop {
            match self.byte(self.at) {
                b' ' | b'\t' | b'\r' | 0x0b | 0x0c => self.at += 1,
                b'\n' => {
                    self.at += 1;
                    self.line += 1;
                    line_start = true;
                }
                b'/' if self.byte(self.at + 1) == b'/' => self.skip_line(),
                b'#' if line_start => self.skip_line(),
                b'/' if self.byte(self.at + 1) == b'*' => {
                    let Some(length) = self.text[self.at + 2..].find("*/") else {
                        return self.bad(self.at, "a comment `/*` that no `*/` ends");
                    };
                    let end = self.at + 2 + length + 2;
                    let lines = self.bytes[self.at..end].iter().filter(|&&b| b == b'\n').count();
                    self.line += lines as u32; // the text is shorter than 2^32 bytes
                    self.at = end;
                }
                _ => return Ok(()),
            }
        }
    }

    fn skip_line(&mut self) {
        let rest = &self.bytes[self.at..];
        self.at += rest.iter().position(|&b| b == b'\n').unwrap_or(rest.len());
    }

    /// The next token.
    pub(super) fn next(&mut self) -> Result<Token, Bad> {
        self.skip()?;
        let start = self.at;
        let first = self.byte(start);
        let (kind, end) = match first {
            _ if start == self.bytes.len() => (TokenKind::End, start),
            b'a'..=b'z' | b'A'..=b'Z' | b'_' => (TokenKind::Word, self.name_end(start + 1)),
            b'%' | b'$' => match self.name_end(start + 1) {
                end if end == start + 1 && first == b'$' => return self.bad(start, "a name of `$` alone"),
                end if end == start + 1 => (TokenKind::Mark(b'%'), end),
                end => (TokenKind::Word, end),
            },
            b'.' => self.dot(start)?,
            b'0'..=b'9' => self.number(start)?,
            b'"' => {
                let rest = &self.bytes[start + 1..];
                match rest.iter().position(|&b| b == b'"' || b == b'\n') {
                    Some(length) if rest[length] == b'"' => (TokenKind::Text, start + length + 2),
                    _ => return self.bad(start, "a string that does not end on its line"),
                }
            }
            b'<' | b'>' | b'=' | b'!' | b'&' | b'|' => match &[first, self.byte(start + 1)] {
                two @ (b"<<" | b">>" | b"<=" | b">=" | b"==" | b"!=" | b"&&" | b"||") => {
                    (TokenKind::Double(*two), start + 2)
                }
                _ => (TokenKind::Mark(first), start + 1),
            },
            b'(' | b')' | b'{' | b'}' | b'[' | b']' | b',' | b';' | b':' | b'+' | b'-' | b'*' | b'/'
            | b'~' | b'^' | b'?' | b'@' => (TokenKind::Mark(first), start + 1),
            _ => {
                let found = self.text[start..].chars().next().unwrap_or_default();
                let found = found.escape_debug();
                return self.bad(start, format!("the character `{found}` has no meaning in PTX"));
            }
        };
        self.at = end;
        Ok(Token { kind, start, end, line: self.line })
    }

    /// `.name`, `.name::name`, and `.5`, which only the place tells from a modifier: see [`Self::fraction`].
    fn dot(&self, start: usize) -> Result<(TokenKind, usize), Bad> {
        let mut end = self.name_end(start + 1);
        if end == start + 1 {
            return self.bad(start, "a name must follow the dot directly");
        }
        while self.byte(end) == b':' && self.byte(end + 1) == b':' && is_name(self.byte(end + 2)) {
            end = self.name_end(end + 2);
        }
        Ok((TokenKind::Dot, end))
    }

    /// Reads the `Dot` token anew, which must be the latest one, as a decimal fraction such as `.5e-3`.
    pub(super) fn fraction(&mut self, token: Token) -> Result<Token, Bad> {
        let (kind, end) = self.decimal(token.start)?;
        self.at = end;
        Ok(Token { kind, end, ..token })
    }

    fn number(&self, start: usize) -> Result<(TokenKind, usize), Bad> {
        if self.byte(start) != b'0' {
            return self.decimal(start);
        }
        match self.byte(start + 1) {
            b'f' | b'F' => {
                let end = self.name_end(start);
                match self.hex_exact(start + 2..end, 8) {
                    Some(bits) => Ok((TokenKind::F32(bits as u32), end)),
                    None => self.bad(start, "a `0f` number must have exactly 8 hexadecimal digits"),
                }
            }
            b'd' | b'D' => {
                let end = self.name_end(start);
                match self.hex_exact(start + 2..end, 16) {
                    Some(bits) => Ok((TokenKind::F64(f64::from_bits(bits)), end)),
                    None => self.bad(start, "a `0d` number must have exactly 16 hexadecimal digits"),
                }
            }
            b'x' | b'X' => self.integer(start, start + 2, 16),
            b'b' | b'B' => self.integer(start, start + 2, 2),
            b'0'..=b'9' => {
                // `00.5` is a decimal number, `017` an octal one.
                let mut end = start;
                while self.byte(end).is_ascii_digit() {
                    end += 1;
                }
                if matches!(self.byte(end), b'.' | b'e' | b'E') {
                    self.decimal(start)
                } else {
                    self.integer(start, start + 1, 8)
                }
            }
            _ => self.decimal(start),
        }
    }

    fn hex_exact(&self, digits: std::ops::Range<usize>, count: usize) -> Option<u64> {
        let digits = self.text.get(digits)?;
        // `from_str_radix` would take a sign, but name characters hold none.
        (digits.len() == count).then(|| u64::from_str_radix(digits, 16).ok())?
    }

    /// The digits from `from` on, an optional `U`, and nothing else that a name could hold.
    fn integer(&self, start: usize, from: usize, radix: u64) -> Result<(TokenKind, usize), Bad> {
        let mut at = from;
        let mut value = 0u64;
        while let Some(digit) = char::from(self.byte(at)).to_digit(radix as u32) {
            let next = value.checked_mul(radix).and_then(|v| v.checked_add(u64::from(digit)));
            let Some(next) = next else {
                return self.bad(start, "an integer that does not fit in 64 bits");
            };
            value = next;
            at += 1;
        }
        let digits = at - from;
        let suffix = self.byte(at) == b'U';
        at += usize::from(suffix);
        if digits == 0 || is_name(self.byte(at)) {
            let text = shorten(&self.text[start..self.name_end(at)], 40);
            return self.bad(start, format!("`{text}` is no number"));
        }
        Ok((TokenKind::Int(value, suffix || value > i64::MAX as u64), at))
    }

    /// `12`, `12U`, `1.5`, `1.`, `1e-3`
    fn decimal(&self, start: usize) -> Result<(TokenKind, usize), Bad> {
        let digits = |mut at: usize| {
            while self.byte(at).is_ascii_digit() {
                at += 1;
            }
            at
        };
        let mut end = digits(start);
        if !matches!(self.byte(end), b'.' | b'e' | b'E') {
            return self.integer(start, start, 10);
        }
        if self.byte(end) == b'.' {
            end = digits(end + 1);
        }
        if matches!(self.byte(end), b'e' | b'E') {
            let sign = usize::from(matches!(self.byte(end + 1), b'+' | b'-'));
            end = digits(end + 1 + sign);
        }
        match self.text[start..end].parse::<f64>() {
            Ok(value) if value.is_finite() && !is_name(self.byte(end)) => Ok((TokenKind::F64(value), end)),
            Ok(value) if value.is_infinite() => self.bad(start, "a number beyond the range of .f64"),
            _ => {
                let text = shorten(&self.text[start..self.name_end(end)], 40);
                self.bad(start, format!("`{text}` is no number"))
            }
        }
    }
}

/// At most `limit` characters of `text`, with an ellipsis where something is missing.
pub(super) fn shorten(text: &str, limit: usize) -> String {
    match text.char_indices().nth(limit) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text.to_string(),
    }
}
