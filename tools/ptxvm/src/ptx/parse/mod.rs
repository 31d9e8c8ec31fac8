//! Tokens to syntax tree: recursive descent over PTX ISA 9.x, with one token of lookahead.
//!
//! The parser refuses the text that ptxas refuses; where the ISA's text and ptxas differ, comments say so. It takes a
//! little more where that is harmless: `[a-4]` beside `[a+-4]`, `.maxntid 8 8 1` without commas.
//!
//! Directives without a meaning for a machine that interprets are read and dropped: `.minnctapersm`, `.maxnreg`,
//! `.abi_preserve`, `.abi_preserve_control`, `.pragma`, `.attribute`, `.ptr` and its space and alignment, `.align`
//! of registers, the function that `.loc` names for inlined code, and `.section` blocks.

mod constant;
mod declare;
mod function;
mod statement;

use std::collections::HashMap;

use super::ast::{Alias, Linkage, Module, RefusedVariable, SourceLoc};
use super::lex::{Bad, Lexer, Token, TokenKind, shorten};
use crate::error::{Error, ErrorKind, Finding, Place};
use crate::types::{Space, Type};

/// The longest text that is parsed. The tree takes at most about a hundred bytes for a byte of hostile text, and about
/// ten for a compiler's.
pub const MAX_TEXT_BYTES: usize = 128 << 20;

/// How deep blocks, parentheses, initialisers and operands may nest, all together.
pub const MAX_DEPTH: u32 = 64;

/// The most dimensions of an array.
pub const MAX_DIMENSIONS: usize = 16;

/// How much of a wrong line an error quotes, and of a wrong token.
const QUOTED_LINE: usize = 120;
const QUOTED_TOKEN: usize = 40;

/// Parses a PTX file; `file` names it in errors.
///
/// The text may end in zero bytes, as a driver's or a compiler library's does.
///
/// # Errors
/// `Fault` with a finding of kind `Syntax`, and `Unsupported` for PTX that is not built yet: unknown directives,
/// textures and surfaces, array indexing in operands. The first place is reported.
pub fn parse<'a>(file: &str, text: &'a str) -> Result<Module<'a>, Error> {
    let text = text.trim_end_matches('\0');
    if text.len() > MAX_TEXT_BYTES {
        let message = format!("{} bytes of text; at most {MAX_TEXT_BYTES} are parsed", text.len());
        let at = Place { file: file.to_string(), ..Place::default() };
        return Err(Error::Unsupported(vec![Finding::load(ErrorKind::Unsupported, at, message)]));
    }
    let mut parser = Parser {
        file,
        text,
        lexer: Lexer::new(text),
        token: Token { kind: TokenKind::End, start: 0, end: 0, line: 1 },
        depth: 0,
        function: "",
        loc: None,
        calls: HashMap::new(),
    };
    parser.advance()?;
    parser.module()
}

/// Directives that the parser knows, for a better message where one stands at a wrong place.
const DIRECTIVES: &[&str] = &[
    "version",
    "target",
    "address_size",
    "file",
    "loc",
    "section",
    "visible",
    "extern",
    "weak",
    "common",
    "entry",
    "func",
    "global",
    "const",
    "shared",
    "local",
    "param",
    "reg",
    "align",
    "attribute",
    "alias",
    "pragma",
    "noreturn",
    "maxntid",
    "reqntid",
    "minnctapersm",
    "maxnreg",
    "reqnctapercluster",
    "explicitcluster",
    "maxclusterrank",
    "blocksareclusters",
    "abi_preserve",
    "abi_preserve_control",
    "branchtargets",
    "calltargets",
    "callprototype",
    "ptr",
];

/// Directives of PTX that the machine has nothing for.
const REFUSED: &[&str] = &["texref", "samplerref", "surfref", "tex", "sreg"];

/// Whether a directive without its dot starts a variable or a register.
fn starts_declaration(name: &str) -> bool {
    matches!(name, "global" | "const" | "shared" | "local" | "param" | "reg" | "align" | "attribute")
        || REFUSED.contains(&name)
}

struct Parser<'a, 'f> {
    file: &'f str,
    text: &'a str,
    lexer: Lexer<'a>,
    /// The current token.
    token: Token,
    /// Open blocks, parentheses and braces.
    depth: u32,
    /// The function that is parsed, for errors.
    function: &'a str,
    /// The latest `.loc` of the function.
    loc: Option<SourceLoc>,
    /// Of the latest `.loc` of inlined code at a file, line and column: file and line in the outermost function.
    calls: HashMap<(u32, u32, u32), (u32, u32)>,
}

impl From<Box<Finding>> for Error {
    fn from(finding: Box<Finding>) -> Self {
        match finding.kind {
            ErrorKind::Unsupported => Self::Unsupported(vec![*finding]),
            _ => Self::Fault(vec![*finding]),
        }
    }
}

/// Errors are boxed: results pass through every small function, errors hardly ever do.
type Parsed<T> = Result<T, Box<Finding>>;

impl<'a> Parser<'a, '_> {
    // Errors.

    fn fail<T>(&self, kind: ErrorKind, start: usize, line: u32, message: impl Into<String>) -> Parsed<T> {
        let from = self.text[..start].rfind('\n').map_or(0, |at| at + 1);
        let to = self.text[start..].find('\n').map_or(self.text.len(), |at| start + at);
        let text = shorten(self.text[from..to].trim(), QUOTED_LINE);
        let at = Place { file: self.file.to_string(), line, text, ..Place::default() };
        let finding = Finding::load(kind, at, message);
        Err(Box::new(Finding { kernel: self.function.to_string(), ..finding }))
    }

    /// A syntax error at a token.
    fn wrong<T>(&self, token: Token, message: impl Into<String>) -> Parsed<T> {
        self.fail(ErrorKind::Syntax, token.start, token.line, message)
    }

    /// A syntax error: `what` must stand here, and the current token is another.
    fn expected<T>(&self, what: &str) -> Parsed<T> {
        let found = match self.token.kind {
            TokenKind::End => "the end of the text".to_string(),
            _ => format!("`{}`", shorten(self.of(self.token), QUOTED_TOKEN)),
        };
        self.wrong(self.token, format!("expected {what}, found {found}"))
    }

    fn unsupported<T>(&self, token: Token, what: &str) -> Parsed<T> {
        self.fail(ErrorKind::Unsupported, token.start, token.line, format!("{what} is not supported"))
    }

    /// The directive that is looked at has no business here.
    fn misplaced<T>(&self) -> Parsed<T> {
        let name = self.directive().unwrap_or_default();
        if DIRECTIVES.contains(&name) || Type::from_name(name).is_some() {
            return self.expected(if self.function.is_empty() { "a declaration" } else { "a statement" });
        }
        let name = shorten(name, QUOTED_TOKEN);
        self.unsupported(self.token, &format!("the directive `.{name}`"))
    }

    // Tokens.

    /// The text of a token.
    fn of(&self, token: Token) -> &'a str {
        &self.text[token.start..token.end]
    }

    /// Goes on by a token and returns the one before.
    fn advance(&mut self) -> Parsed<Token> {
        match self.lexer.next() {
            Ok(token) => Ok(std::mem::replace(&mut self.token, token)),
            Err(bad) => self.unreadable(bad),
        }
    }

    #[cold]
    fn unreadable<T>(&self, bad: Bad) -> Parsed<T> {
        self.fail(ErrorKind::Syntax, bad.start, bad.line, bad.message)
    }

    fn is(&self, mark: u8) -> bool {
        self.token.kind == TokenKind::Mark(mark)
    }

    fn accept(&mut self, mark: u8) -> Parsed<bool> {
        let found = self.is(mark);
        if found {
            self.advance()?;
        }
        Ok(found)
    }

    fn expect(&mut self, mark: u8) -> Parsed<()> {
        if self.accept(mark)? { Ok(()) } else { self.expected(&format!("`{}`", char::from(mark))) }
    }

    /// The end of a list: a comma says that it goes on.
    fn more(&mut self, end: u8) -> Parsed<bool> {
        if self.accept(b',')? {
            return Ok(true);
        }
        if self.accept(end)? { Ok(false) } else { self.expected(&format!("`,` or `{}`", char::from(end))) }
    }

    /// The directive that is looked at, without its dot.
    fn directive(&self) -> Option<&'a str> {
        (self.token.kind == TokenKind::Dot).then(|| &self.of(self.token)[1..])
    }

    fn accept_directive(&mut self, name: &str) -> Parsed<bool> {
        let found = self.directive() == Some(name);
        if found {
            self.advance()?;
        }
        Ok(found)
    }

    /// A name of a symbol; `_` is none.
    fn name(&mut self, what: &str) -> Parsed<&'a str> {
        if self.token.kind != TokenKind::Word || self.of(self.token) == "_" {
            return self.expected(what);
        }
        let token = self.advance()?;
        Ok(self.of(token))
    }

    /// Names with commas up to `;`.
    fn names(&mut self, what: &str) -> Parsed<Vec<&'a str>> {
        let mut names = vec![self.name(what)?];
        while self.more(b';')? {
            names.push(self.name(what)?);
        }
        Ok(names)
    }

    /// An integer literal of 32 bits.
    fn count(&mut self, what: &str) -> Parsed<u32> {
        let TokenKind::Int(value, _) = self.token.kind else {
            return self.expected(what);
        };
        match u32::try_from(value) {
            Ok(value) => {
                self.advance()?;
                Ok(value)
            }
            Err(_) => self.wrong(self.token, format!("{value} does not fit in 32 bits")),
        }
    }

    /// One, two or three positive integers with or without commas; missing ones are 1.
    fn dimensions(&mut self) -> Parsed<[u32; 3]> {
        let mut values = [1; 3];
        for (i, value) in values.iter_mut().enumerate() {
            if i > 0 && !self.accept(b',')? && !matches!(self.token.kind, TokenKind::Int(..)) {
                break;
            }
            if matches!(self.token.kind, TokenKind::Int(0, _)) {
                return self.expected("a positive number");
            }
            *value = self.count("a number")?;
        }
        Ok(values)
    }

    /// Counts a level of nesting; the caller takes it back with [`Self::leave`], except after an error, which ends parsing.
    fn enter(&mut self) -> Parsed<()> {
        self.depth += 1;
        if self.depth > MAX_DEPTH {
            return self.wrong(self.token, format!("nested deeper than {MAX_DEPTH} levels"));
        }
        Ok(())
    }

    fn leave(&mut self) {
        self.depth -= 1;
    }

    // The module.

    fn module(mut self) -> Result<Module<'a>, Error> {
        // Without `.address_size` the ISA speaks of 32 bits, but today's ptxas has 64 only.
        let mut module = Module { address_size: 64, ..Module::default() };
        if !self.accept_directive("version")? {
            return Ok(self.expected("`.version` at the start")?);
        }
        let version = self.of(self.token);
        let parts = version.split_once('.').map(|(major, minor)| (major.parse(), minor.parse()));
        let Some((Ok(major), Ok(minor))) = parts else {
            return Ok(self.expected("a version such as 8.5")?);
        };
        module.version = (major, minor);
        self.advance()?;
        if self.directive() != Some("target") {
            return Ok(self.expected("`.target` after the version")?);
        }
        while self.accept_directive("target")? {
            module.targets.push(self.name("a target such as sm_90")?);
            while self.accept(b',')? {
                module.targets.push(self.name("a target option")?);
            }
        }
        if self.directive() == Some("address_size") {
            self.advance()?;
            if !matches!(self.token.kind, TokenKind::Int(32 | 64, _)) {
                return Ok(self.expected("an address size of 32 or 64")?);
            }
            module.address_size = self.count("32 or 64")?;
        }
        while self.token.kind != TokenKind::End {
            self.declaration(&mut module)?;
        }
        Ok(module)
    }

    /// The rest of a variable that the machine has nothing for, up to its `;`. What does not use it can run.
    fn pass_over(&mut self, why: Finding, module: &mut Module<'a>) -> Parsed<()> {
        let (mut name, mut open) = (None, true);
        while !self.is(b';') {
            if self.token.kind == TokenKind::End {
                return self.expected("`;`");
            }
            open &= !self.is(b'=') && !self.is(b'[');
            if open && self.token.kind == TokenKind::Word {
                name = Some(self.of(self.token));
            }
            // A bank in brackets stands before the name.
            open |= self.is(b']') && name.is_none();
            self.advance()?;
        }
        let Some(name) = name else { return self.expected("a name") };
        self.advance()?;
        module.refused.push(RefusedVariable { name, line: why.at.line, message: why.message });
        Ok(())
    }

    fn declaration(&mut self, module: &mut Module<'a>) -> Parsed<()> {
        let Some(name) = self.directive() else {
            return self.expected("a declaration");
        };
        match name {
            "file" => {
                self.advance()?;
                let index = self.count("the index of a file")?;
                if self.token.kind != TokenKind::Text {
                    return self.expected("a path in quotes");
                }
                let token = self.advance()?;
                module.files.push((index, self.text[token.start + 1..token.end - 1].to_string()));
                // A time stamp and a size may follow.
                while self.accept(b',')? {
                    if !matches!(self.token.kind, TokenKind::Int(..)) {
                        return self.expected("a number");
                    }
                    self.advance()?;
                }
                Ok(())
            }
            "section" => self.section(),
            "pragma" => self.pragma(),
            "alias" => {
                let line = self.advance()?.line;
                let name = self.name("the alias")?;
                self.expect(b',')?;
                let function = self.name("the name of a function")?;
                self.expect(b';')?;
                module.aliases.push(Alias { name, function, line });
                Ok(())
            }
            _ => {
                let linkage = match name {
                    "visible" => Linkage::Visible,
                    "extern" => Linkage::Extern,
                    "weak" => Linkage::Weak,
                    "common" => Linkage::Common,
                    _ => Linkage::Internal,
                };
                if linkage != Linkage::Internal {
                    self.advance()?;
                }
                match self.directive() {
                    Some("entry" | "func") => {
                        let function = self.function(linkage)?;
                        module.functions.push(function);
                        Ok(())
                    }
                    Some(name) if starts_declaration(name) => {
                        let start = self.token;
                        let declared = match self.declared() {
                            Err(why) if why.kind == ErrorKind::Unsupported => {
                                return self.pass_over(*why, module);
                            }
                            declared => declared?,
                        };
                        if !matches!(declared.space, Some(Space::Global | Space::Const | Space::Shared)) {
                            return self.wrong(
                                start,
                                "only .global, .const and .shared variables have module scope",
                            );
                        }
                        self.variables(&declared, linkage, |v| module.variables.push(v))
                    }
                    Some(_) if linkage == Linkage::Internal => self.misplaced(),
                    _ => self.expected("`.entry`, `.func` or a state space"),
                }
            }
        }
    }

    /// `.section .debug_str { ... }`: data of a debugger, without inner braces.
    fn section(&mut self) -> Parsed<()> {
        self.advance()?;
        if self.token.kind != TokenKind::Dot {
            return self.expected("the name of a section");
        }
        self.advance()?;
        self.expect(b'{')?;
        while !self.is(b'}') {
            if self.token.kind == TokenKind::End || self.is(b'{') {
                return self.expected("`}`");
            }
            self.advance()?;
        }
        self.expect(b'}')
    }

    /// `.pragma "a", "b";`: advice for an optimising assembler.
    fn pragma(&mut self) -> Parsed<()> {
        self.advance()?;
        loop {
            if self.token.kind != TokenKind::Text {
                return self.expected("a string");
            }
            self.advance()?;
            if !self.more(b';')? {
                return Ok(());
            }
        }
    }

    /// `.attribute(.managed)`, `.attribute(.unified(1, 2))`
    fn attribute(&mut self) -> Parsed<()> {
        self.advance()?;
        self.expect(b'(')?;
        let mut open = 1u32;
        while open > 0 {
            match self.token.kind {
                TokenKind::Mark(b'(') => open += 1,
                TokenKind::Mark(b')') => open -= 1,
                TokenKind::Dot | TokenKind::Int(..) | TokenKind::Mark(b',') => {}
                _ => return self.expected("an attribute or `)`"),
            }
            self.advance()?;
        }
        Ok(())
    }
}
