//! Tokens to syntax tree: recursive descent over PTX ISA 9.x, with one token of lookahead.
//!
//! What is refused is what ptxas refuses; where the ISA's text and ptxas differ, comments say so. A little more is
//! taken where it harms nobody: `[a-4]` beside `[a+-4]`, `.maxntid 8 8 1` without commas.
//!
//! Directives without a meaning for a machine that interprets are read and dropped: `.minnctapersm`, `.maxnreg`,
//! `.abi_preserve`, `.abi_preserve_control`, `.pragma`, `.attribute`, `.ptr` and its space and alignment, `.align`
//! of registers, the inlining attributes of `.loc`, and `.section` blocks.

use super::ast::{
    Address, Alias, Function, Guard, Initial, InitialValue, Instruction, Linkage, Module, Operand, Register,
    SourceLoc, Statement, Variable,
};
use super::lex::{Bad, Kind, Lexer, Token, shorten};
use crate::error::{Error, Finding, Kind as Fault, Place};
use crate::types::{Kind as Family, Space, Type};

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
/// `Fault` with a finding of kind `Syntax`, and `Unsupported` for what is PTX but not built yet: unknown directives,
/// textures and surfaces, array indexing in operands. The first place is reported.
pub fn parse<'a>(file: &str, text: &'a str) -> Result<Module<'a>, Error> {
    let text = text.trim_end_matches('\0');
    if text.len() > MAX_TEXT_BYTES {
        let message = format!("{} bytes of text; at most {MAX_TEXT_BYTES} are parsed", text.len());
        let at = Place { file: file.to_string(), ..Place::default() };
        return Err(Error::Unsupported(vec![Finding::load(Fault::Unsupported, at, message)]));
    }
    let mut parser = Parser {
        file,
        text,
        lexer: Lexer::new(text),
        token: Token { kind: Kind::End, start: 0, end: 0, line: 1 },
        depth: 0,
        function: "",
        loc: None,
    };
    parser.advance()?;
    parser.module()
}

/// A value of a constant expression (PTX ISA, "Constant Expressions"): 64-bit integers and `.f64`.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Number {
    Signed(i64),
    Unsigned(u64),
    /// `0f...`, which no operator takes.
    F32(u32),
    F64(f64),
}

impl Number {
    /// The 64 bits of an integer.
    fn bits(self) -> Option<u64> {
        match self {
            Self::Signed(value) => Some(value as u64),
            Self::Unsigned(value) => Some(value),
            Self::F32(_) | Self::F64(_) => None,
        }
    }
}

/// A binary operator of constant expressions.
#[derive(Clone, Copy, PartialEq)]
enum Binary {
    Or,
    And,
    BitOr,
    BitXor,
    BitAnd,
    Equal,
    Unequal,
    Less,
    LessEqual,
    Greater,
    GreaterEqual,
    ShiftLeft,
    ShiftRight,
    Add,
    Sub,
    Mul,
    Div,
    Rem,
}

/// How strong `+` binds; what follows a symbol starts there.
const ADDITIVE: u32 = 9;

impl Binary {
    /// The operator that a token is, with its precedence: higher binds tighter, as in C.
    fn of(kind: Kind) -> Option<(Self, u32)> {
        Some(match kind {
            Kind::Double([b'|', b'|']) => (Self::Or, 1),
            Kind::Double([b'&', b'&']) => (Self::And, 2),
            Kind::Mark(b'|') => (Self::BitOr, 3),
            Kind::Mark(b'^') => (Self::BitXor, 4),
            Kind::Mark(b'&') => (Self::BitAnd, 5),
            Kind::Double([b'=', b'=']) => (Self::Equal, 6),
            Kind::Double([b'!', b'=']) => (Self::Unequal, 6),
            Kind::Mark(b'<') => (Self::Less, 7),
            Kind::Double([b'<', b'=']) => (Self::LessEqual, 7),
            Kind::Mark(b'>') => (Self::Greater, 7),
            Kind::Double([b'>', b'=']) => (Self::GreaterEqual, 7),
            Kind::Double([b'<', b'<']) => (Self::ShiftLeft, 8),
            Kind::Double([b'>', b'>']) => (Self::ShiftRight, 8),
            Kind::Mark(b'+') => (Self::Add, ADDITIVE),
            Kind::Mark(b'-') => (Self::Sub, ADDITIVE),
            Kind::Mark(b'*') => (Self::Mul, 10),
            Kind::Mark(b'/') => (Self::Div, 10),
            Kind::Mark(b'%') => (Self::Rem, 10),
            _ => return None,
        })
    }

    /// Applies it, or says why it cannot be applied.
    fn apply(self, a: Number, b: Number) -> Result<Number, &'static str> {
        if let (Number::F64(a), Number::F64(b)) = (a, b) {
            return Ok(Number::F64(match self {
                Self::Add => a + b,
                Self::Sub => a - b,
                Self::Mul => a * b,
                Self::Div => a / b,
                _ => return Err("this operator takes integers"),
            }));
        }
        let (Some(x), Some(y)) = (a.bits(), b.bits()) else {
            return Err("an operator between an integer and a floating-point number, or on a `0f` number");
        };
        // Shifts keep the type of their left side; ptxas takes the count modulo 64.
        let signed = match self {
            Self::ShiftLeft | Self::ShiftRight => matches!(a, Number::Signed(_)),
            _ => matches!((a, b), (Number::Signed(_), Number::Signed(_))),
        };
        let (i, j) = (x as i64, y as i64);
        let truth = |value: bool| Ok(Number::Signed(i64::from(value)));
        let bits = match self {
            Self::Or => return truth(x != 0 || y != 0),
            Self::And => return truth(x != 0 && y != 0),
            Self::Equal => return truth(x == y),
            Self::Unequal => return truth(x != y),
            Self::Less => return truth(if signed { i < j } else { x < y }),
            Self::LessEqual => return truth(if signed { i <= j } else { x <= y }),
            Self::Greater => return truth(if signed { i > j } else { x > y }),
            Self::GreaterEqual => return truth(if signed { i >= j } else { x >= y }),
            Self::BitOr => x | y,
            Self::BitXor => x ^ y,
            Self::BitAnd => x & y,
            Self::ShiftLeft => x << (y & 63),
            Self::ShiftRight if signed => (i >> (y & 63)) as u64,
            Self::ShiftRight => x >> (y & 63),
            Self::Add => x.wrapping_add(y),
            Self::Sub => x.wrapping_sub(y),
            Self::Mul => x.wrapping_mul(y),
            Self::Div | Self::Rem if y == 0 => return Err("a division by zero"),
            Self::Div if signed => i.wrapping_div(j) as u64,
            Self::Div => x / y,
            Self::Rem if signed => i.wrapping_rem(j) as u64,
            Self::Rem => x % y,
        };
        Ok(if signed { Number::Signed(bits as i64) } else { Number::Unsigned(bits) })
    }
}

/// What a declaration says before its names: `.global .align 4 .v2 .f32`.
struct Declared {
    /// `None` for `.reg`.
    space: Option<Space>,
    ty: Type,
    /// 1, 2 or 4.
    vector: u32,
    /// What `.align` says.
    align: Option<u32>,
}

/// Types that a variable or register can have; the others are names for packed operands of instructions.
fn is_fundamental(ty: Type) -> bool {
    use Type::{BF16, BF16X2, E4M3X2, E5M2X2, F32X2, S16X2, TF32, U16X2};
    !matches!(ty, BF16 | BF16X2 | E4M3X2 | E5M2X2 | F32X2 | S16X2 | TF32 | U16X2)
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

struct Parser<'a, 'f> {
    file: &'f str,
    text: &'a str,
    lexer: Lexer<'a>,
    /// The token that is looked at.
    token: Token,
    /// Open blocks, parentheses and braces.
    depth: u32,
    /// The function that is parsed, for errors.
    function: &'a str,
    /// The latest `.loc` of the function.
    loc: Option<SourceLoc>,
}

impl From<Box<Finding>> for Error {
    fn from(finding: Box<Finding>) -> Self {
        match finding.kind {
            Fault::Unsupported => Self::Unsupported(vec![*finding]),
            _ => Self::Fault(vec![*finding]),
        }
    }
}

/// Errors are boxed: results pass through every small function, errors hardly ever do.
type Parsed<T> = Result<T, Box<Finding>>;

impl<'a> Parser<'a, '_> {
    // Errors.

    fn fail<T>(&self, kind: Fault, start: usize, line: u32, message: impl Into<String>) -> Parsed<T> {
        let from = self.text[..start].rfind('\n').map_or(0, |at| at + 1);
        let to = self.text[start..].find('\n').map_or(self.text.len(), |at| start + at);
        let text = shorten(self.text[from..to].trim(), QUOTED_LINE);
        let at = Place { file: self.file.to_string(), line, text, source: None };
        let finding = Finding::load(kind, at, message);
        Err(Box::new(Finding { kernel: self.function.to_string(), ..finding }))
    }

    /// A syntax error at a token.
    fn wrong<T>(&self, token: Token, message: impl Into<String>) -> Parsed<T> {
        self.fail(Fault::Syntax, token.start, token.line, message)
    }

    /// The token that is looked at is not what must stand here.
    fn expected<T>(&self, what: &str) -> Parsed<T> {
        let found = match self.token.kind {
            Kind::End => "the end of the text".to_string(),
            _ => format!("`{}`", shorten(self.of(self.token), QUOTED_TOKEN)),
        };
        self.wrong(self.token, format!("expected {what}, found {found}"))
    }

    fn unsupported<T>(&self, token: Token, what: &str) -> Parsed<T> {
        self.fail(Fault::Unsupported, token.start, token.line, format!("{what} is not supported"))
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
        self.fail(Fault::Syntax, bad.start, bad.line, bad.message)
    }

    fn is(&self, mark: u8) -> bool {
        self.token.kind == Kind::Mark(mark)
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
        (self.token.kind == Kind::Dot).then(|| &self.of(self.token)[1..])
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
        if self.token.kind != Kind::Word || self.of(self.token) == "_" {
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
        let Kind::Int(value, _) = self.token.kind else {
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
            if i > 0 && !self.accept(b',')? && !matches!(self.token.kind, Kind::Int(..)) {
                break;
            }
            if matches!(self.token.kind, Kind::Int(0, _)) {
                return self.expected("a positive number");
            }
            *value = self.count("a number")?;
        }
        Ok(values)
    }

    /// Counts a level of nesting; the caller takes it back with [`Self::leave`]. After an error nobody counts.
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
            if !matches!(self.token.kind, Kind::Int(32 | 64, _)) {
                return Ok(self.expected("an address size of 32 or 64")?);
            }
            module.address_size = self.count("32 or 64")?;
        }
        while self.token.kind != Kind::End {
            self.declaration(&mut module)?;
        }
        Ok(module)
    }

    fn declaration(&mut self, module: &mut Module<'a>) -> Parsed<()> {
        let Some(name) = self.directive() else {
            return self.expected("a declaration");
        };
        match name {
            "file" => {
                self.advance()?;
                let index = self.count("the index of a file")?;
                if self.token.kind != Kind::Text {
                    return self.expected("a path in quotes");
                }
                let token = self.advance()?;
                module.files.push((index, self.text[token.start + 1..token.end - 1].to_string()));
                // A time stamp and a size may follow.
                while self.accept(b',')? {
                    if !matches!(self.token.kind, Kind::Int(..)) {
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
                        let declared = self.declared()?;
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
        if self.token.kind != Kind::Dot {
            return self.expected("the name of a section");
        }
        self.advance()?;
        self.expect(b'{')?;
        while !self.is(b'}') {
            if self.token.kind == Kind::End || self.is(b'{') {
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
            if self.token.kind != Kind::Text {
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
                Kind::Mark(b'(') => open += 1,
                Kind::Mark(b')') => open -= 1,
                Kind::Dot | Kind::Int(..) | Kind::Mark(b',') => {}
                _ => return self.expected("an attribute or `)`"),
            }
            self.advance()?;
        }
        Ok(())
    }

    // Functions.

    fn function(&mut self, linkage: Linkage) -> Parsed<Function<'a>> {
        let is_entry = self.directive() == Some("entry");
        self.advance()?;
        while self.directive() == Some("attribute") {
            self.attribute()?;
        }
        let returns = if !is_entry && self.is(b'(') { self.parameters(false)? } else { Vec::new() };
        let line = self.token.line;
        let name = self.name("the name of a function")?;
        self.function = name;
        let params = if self.is(b'(') { self.parameters(is_entry)? } else { Vec::new() };
        let mut function = Function {
            is_entry,
            name,
            linkage,
            returns,
            params,
            noreturn: false,
            max_threads: None,
            required_threads: None,
            cluster: Default::default(),
            body: None,
            line,
        };
        while self.token.kind == Kind::Dot {
            self.tuning(&mut function)?;
        }
        if self.accept(b'{')? {
            function.body = Some(self.block()?);
        } else if !self.accept(b';')? {
            return self.expected("`{`, `;` or a directive");
        }
        self.function = "";
        self.loc = None;
        Ok(function)
    }

    /// A directive between a function's parameters and its body.
    fn tuning(&mut self, function: &mut Function<'a>) -> Parsed<()> {
        let Some(name) = self.directive() else { return Ok(()) };
        match name {
            "pragma" => return self.pragma(),
            "attribute" => return self.attribute(),
            "noreturn"
            | "maxntid"
            | "reqntid"
            | "reqnctapercluster"
            | "explicitcluster"
            | "maxclusterrank"
            | "blocksareclusters"
            | "minnctapersm"
            | "maxnreg"
            | "abi_preserve"
            | "abi_preserve_control" => {
                self.advance()?;
            }
            _ => return self.misplaced(),
        }
        match name {
            "noreturn" => function.noreturn = true,
            "maxntid" => function.max_threads = Some(self.dimensions()?),
            "reqntid" => function.required_threads = Some(self.dimensions()?),
            "reqnctapercluster" => function.cluster.required = Some(self.dimensions()?),
            "maxclusterrank" => function.cluster.max_rank = Some(self.count("a number of blocks")?),
            "explicitcluster" => function.cluster.explicit = true,
            "blocksareclusters" => function.cluster.blocks_are_clusters = true,
            _ => {
                self.count("a number")?;
            }
        }
        Ok(())
    }

    /// `(.param .b32 a, .reg .pred p)`; a kernel takes `.param` only.
    fn parameters(&mut self, of_kernel: bool) -> Parsed<Vec<Variable<'a>>> {
        self.expect(b'(')?;
        let mut list = Vec::new();
        if self.accept(b')')? {
            return Ok(list);
        }
        loop {
            let start = self.token;
            let declared = self.declared()?;
            match declared.space {
                Some(Space::Param) => {}
                None if !of_kernel => {}
                _ => {
                    return self
                        .wrong(start, "a parameter must be in the state space .param, of a .func also .reg");
                }
            }
            if declared.vector > 1 {
                return self.wrong(start, "a parameter cannot be a vector");
            }
            if self.accept_directive("ptr")? {
                // What it points at: advice.
                if let Some("global" | "const" | "shared" | "local") = self.directive() {
                    self.advance()?;
                }
                if self.directive() == Some("align") {
                    self.alignment()?;
                }
            }
            // A prototype's parameters are all called `_`.
            let name = self.token;
            if name.kind != Kind::Word {
                return self.expected("the name of a parameter");
            }
            self.advance()?;
            let (variable, shape) = self.shape(&declared, name, Linkage::Internal)?;
            if shape.open && of_kernel {
                return self.wrong(name, "a kernel's parameter must have a size");
            }
            list.push(variable);
            if !self.more(b')')? {
                return Ok(list);
            }
        }
    }

    // Declarations of variables and registers.

    /// `.align 16`
    fn alignment(&mut self) -> Parsed<u32> {
        self.advance()?;
        let token = self.token;
        let align = self.count("an alignment")?;
        if align.is_power_of_two() {
            Ok(align)
        } else {
            self.wrong(token, format!("an alignment of {align} is no power of two"))
        }
    }

    /// Everything up to the type: `.global .align 4 .v2 .f32`.
    fn declared(&mut self) -> Parsed<Declared> {
        let first = self.token;
        let mut space = None; // `Some(None)` is .reg
        let mut align = None;
        let mut vector = 1;
        let ty = loop {
            let token = self.token;
            let Some(name) = self.directive() else {
                return self.expected("a type");
            };
            let found = match name {
                "align" => {
                    align = Some(self.alignment()?);
                    continue;
                }
                "attribute" => {
                    self.attribute()?;
                    continue;
                }
                "v2" | "v4" if vector == 1 => {
                    vector = if name == "v2" { 2 } else { 4 };
                    self.advance()?;
                    continue;
                }
                "global" => Some(Space::Global),
                "const" => Some(Space::Const),
                "shared" => Some(Space::Shared),
                "local" => Some(Space::Local),
                "param" => Some(Space::Param),
                "reg" => None,
                _ if REFUSED.contains(&name) => {
                    return self.unsupported(token, &format!("`.{name}`"));
                }
                _ => match Type::from_name(name) {
                    Some(ty) if is_fundamental(ty) => {
                        self.advance()?;
                        break ty;
                    }
                    _ => return self.expected("a type"),
                },
            };
            if space.is_some() {
                return self.expected("a type");
            }
            space = Some(found);
            self.advance()?;
            if name == "const" && self.is(b'[') {
                return self.unsupported(token, "a bank of constant memory");
            }
        };
        let Some(space) = space else {
            return self.expected("a state space before the type");
        };
        if ty == Type::Pred && (space.is_some() || vector > 1) {
            return self.wrong(first, "only single registers can be .pred");
        }
        if ty.bits() * vector > 128 {
            return self.wrong(first, "a vector has at most 128 bits");
        }
        Ok(Declared { space, ty, vector, align })
    }

    /// `name[2][3]`: the name, then dimensions. The variable comes without its initialiser.
    fn shape(&mut self, declared: &Declared, name: Token, linkage: Linkage) -> Parsed<(Variable<'a>, Shape)> {
        let Declared { space, ty, vector, align } = *declared;
        let unit = u64::from(ty.bytes() * vector);
        let mut shape = Shape { lengths: Vec::new(), open: false };
        while self.accept(b'[')? {
            let token = self.token;
            let length = if self.is(b']') { 0 } else { self.length()? };
            self.expect(b']')?;
            if length == 0 {
                if !shape.lengths.is_empty() {
                    return self.wrong(token, "only the first dimension of an array may be open");
                }
                shape.open = true;
            }
            if shape.lengths.len() == MAX_DIMENSIONS {
                return self.wrong(token, format!("more than {MAX_DIMENSIONS} dimensions"));
            }
            shape.lengths.push(length);
        }
        // All sizes are below 2^63, so that offsets never overflow.
        let inner = shape.lengths.iter().skip(usize::from(shape.open));
        let bytes = inner.copied().try_fold(unit, u64::checked_mul).filter(|&b| i64::try_from(b).is_ok());
        let Some(bytes) = bytes else {
            return self.wrong(name, "the size of the array does not fit in 63 bits");
        };
        let variable = Variable {
            space: space.unwrap_or(Space::Generic),
            name: self.of(name),
            ty,
            vector,
            align: align.unwrap_or(ty.bytes() * vector),
            bytes: (!shape.open).then_some(bytes),
            init: Vec::new(),
            linkage,
            line: name.line,
        };
        Ok((variable, shape))
    }

    /// The length of a dimension.
    fn length(&mut self) -> Parsed<u64> {
        let token = self.token;
        match self.constant()? {
            Number::Signed(length) if length >= 0 => Ok(length as u64),
            Number::Unsigned(length) => Ok(length),
            _ => self.wrong(token, "the length of an array must be a whole number of at least 0"),
        }
    }

    /// `a, b[3] = {1, 2, 3};`
    fn variables(
        &mut self,
        declared: &Declared,
        linkage: Linkage,
        mut each: impl FnMut(Variable<'a>),
    ) -> Parsed<()> {
        loop {
            let token = self.token;
            self.name("the name of a variable")?;
            let (mut variable, shape) = self.shape(declared, token, linkage)?;
            if self.is(b'=') {
                if !matches!(variable.space, Space::Global | Space::Const) || linkage == Linkage::Extern {
                    return self.wrong(
                        token,
                        "only .global and .const variables that are not .extern have an initial value",
                    );
                }
                self.advance()?;
                self.initializer(&mut variable, shape)?;
            } else if shape.open && linkage != Linkage::Extern {
                return self.wrong(token, "an array without a size must be .extern or have an initial value");
            }
            each(variable);
            if !self.more(b';')? {
                return Ok(());
            }
        }
    }

    /// `.reg .b32 %r<100>, a;` after the type.
    fn registers(&mut self, declared: &Declared, out: &mut Vec<Statement<'a>>) -> Parsed<()> {
        loop {
            let line = self.token.line;
            let name = self.name("the name of a register")?;
            let count = if self.accept(b'<')? {
                let count = self.count("a number of registers")?;
                self.expect(b'>')?;
                Some(count)
            } else {
                None
            };
            out.push(Statement::Register(Register {
                ty: declared.ty,
                vector: declared.vector,
                name,
                count,
                line,
            }));
            if !self.more(b';')? {
                return Ok(());
            }
        }
    }

    // Initialisers.

    fn initializer(&mut self, variable: &mut Variable<'a>, shape: Shape) -> Parsed<()> {
        let element = u64::from(variable.ty.bytes());
        let mut levels: Vec<Level> =
            shape.lengths.iter().map(|&length| Level { length, stride: 0, whole: false }).collect();
        if variable.vector > 1 {
            levels.push(Level { length: u64::from(variable.vector), stride: 0, whole: true });
        }
        let mut stride = element;
        for level in levels.iter_mut().rev() {
            level.stride = stride;
            // The product of all lengths was checked; the open dimension's is 0 and outermost.
            stride = stride.saturating_mul(level.length);
        }
        let mut init = Vec::new();
        let rows = self.row(&levels, variable, 0, &mut init)?;
        if shape.open {
            let bytes = rows.checked_mul(levels[0].stride).filter(|&b| b > 0 && i64::try_from(b).is_ok());
            if bytes.is_none() {
                return self.expected("an initial value that gives the array a size of at least 1");
            }
            variable.bytes = bytes;
        }
        variable.init = init;
        Ok(())
    }

    /// One level of braces, or one value inside the innermost; returns how many elements there were.
    fn row(
        &mut self,
        levels: &[Level],
        variable: &Variable<'a>,
        offset: u64,
        init: &mut Vec<Initial<'a>>,
    ) -> Parsed<u64> {
        let Some((level, inner)) = levels.split_first() else {
            return self.initial_value(variable, offset, init).map(|()| 1);
        };
        let start = self.token;
        self.expect(b'{')?;
        let mut count = 0;
        if !self.is(b'}') {
            loop {
                if level.length > 0 && count == level.length {
                    return self
                        .wrong(self.token, format!("more than {count} elements in the initial value"));
                }
                let at = level.stride.checked_mul(count).and_then(|bytes| bytes.checked_add(offset));
                let Some(at) = at else {
                    return self.wrong(self.token, "the array does not fit in 64 bits");
                };
                self.row(inner, variable, at, init)?;
                count += 1;
                if !self.accept(b',')? {
                    break;
                }
            }
        }
        if !self.is(b'}') {
            return self.expected("`,` or `}`");
        }
        if level.whole && count != level.length {
            return self.wrong(start, format!("{count} elements for a vector of {}", level.length));
        }
        self.advance()?;
        Ok(count)
    }

    fn initial_value(
        &mut self,
        variable: &Variable<'a>,
        offset: u64,
        init: &mut Vec<Initial<'a>>,
    ) -> Parsed<()> {
        let token = self.token;
        let ty = variable.ty;
        let is_integer = matches!(ty.kind(), Family::Bits | Family::Unsigned | Family::Signed);
        if self.token.kind == Kind::Word && self.of(self.token) != "WARP_SZ" {
            let (name, addend, generic) = self.symbol()?;
            if !is_integer || !matches!(ty.bytes(), 4 | 8) {
                return self.wrong(token, format!("an address does not fit in an element of type {ty}"));
            }
            let value = InitialValue::Symbol { name, addend, generic, bytes: ty.bytes(), shift: 0 };
            init.push(Initial { offset, value });
            return Ok(());
        }
        let number = self.constant()?;
        if self.accept(b'(')? {
            // `0xFF00(name)`: one byte of an address. ptxas takes it for single bytes, and alone in 64 bits.
            let shift = match number.bits() {
                Some(mask) if mask != 0 && mask.trailing_zeros() % 8 == 0 => mask.trailing_zeros(),
                _ => 64,
            };
            if shift == 64 || number.bits().map(|mask| mask >> shift) != Some(0xFF) {
                return self.wrong(token, "the mask of an address must be one whole byte, such as 0xFF00");
            }
            if !is_integer || !matches!(ty.bytes(), 1 | 8) {
                return self
                    .wrong(token, format!("a byte of an address does not fit an element of type {ty}"));
            }
            let (name, addend, generic) = self.symbol()?;
            self.expect(b')')?;
            init.push(Initial {
                offset,
                value: InitialValue::Symbol { name, addend, generic, bytes: 1, shift },
            });
            return Ok(());
        }
        let Some(bytes) = stored(ty, number) else {
            let text = shorten(self.of(token), QUOTED_TOKEN);
            return self.wrong(token, format!("`{text}` is no initial value for the type {ty}"));
        };
        let bytes = &bytes[..ty.bytes() as usize];
        match init.last_mut() {
            Some(Initial { offset: start, value: InitialValue::Bytes(run) })
                if *start + run.len() as u64 == offset =>
            {
                run.extend_from_slice(bytes);
            }
            _ => init.push(Initial { offset, value: InitialValue::Bytes(bytes.to_vec()) }),
        }
        Ok(())
    }

    /// `name+4`, `generic(name)+4`
    fn symbol(&mut self) -> Parsed<(&'a str, i64, bool)> {
        let mut name = self.name("the name of a variable or function")?;
        let generic = name == "generic" && self.accept(b'(')?;
        if generic {
            name = self.name("the name of a variable")?;
            self.expect(b')')?;
        }
        Ok((name, self.addend()?, generic))
    }

    // Constant expressions.

    /// What may follow a name: `+4`, `+-4`, `-4`, `+4*2+8`; 0 where nothing does.
    fn addend(&mut self) -> Parsed<i64> {
        let start = self.token;
        let mut sum = Number::Signed(0);
        while self.is(b'+') || self.is(b'-') {
            sum = self.binary(sum, ADDITIVE)?;
        }
        match sum.bits() {
            Some(bits) => Ok(bits as i64),
            None => self.wrong(start, "an offset must be an integer"),
        }
    }

    fn constant(&mut self) -> Parsed<Number> {
        let first = self.unary()?;
        self.constant_from(first)
    }

    /// An expression whose first operand was read.
    fn constant_from(&mut self, first: Number) -> Parsed<Number> {
        let value = self.binary(first, 1)?;
        if !self.is(b'?') {
            return Ok(value);
        }
        let Some(truth) = value.bits() else {
            return self.expected("an integer before the `?`");
        };
        self.enter()?;
        self.advance()?;
        let yes = self.constant()?;
        self.expect(b':')?;
        let no = self.constant()?;
        self.leave();
        Ok(if truth != 0 { yes } else { no })
    }

    /// Operators at least as strong as `least` after `left`.
    fn binary(&mut self, mut left: Number, least: u32) -> Parsed<Number> {
        while let Some((operator, strength)) = Binary::of(self.token.kind) {
            if strength < least {
                break;
            }
            let token = self.advance()?;
            let right = self.unary()?;
            let right = self.binary(right, strength + 1)?;
            left = match operator.apply(left, right) {
                Ok(value) => value,
                Err(message) => return self.wrong(token, message),
            };
        }
        Ok(left)
    }

    fn unary(&mut self) -> Parsed<Number> {
        let Kind::Mark(mark @ (b'-' | b'+' | b'!' | b'~')) = self.token.kind else {
            return self.primary();
        };
        let token = self.advance()?;
        self.enter()?;
        let value = self.unary()?;
        self.leave();
        self.prefix(mark, token, value)
    }

    fn prefix(&self, mark: u8, token: Token, value: Number) -> Parsed<Number> {
        match (mark, value) {
            (b'+', Number::Signed(_) | Number::Unsigned(_) | Number::F64(_)) => Ok(value),
            (b'-', Number::Signed(value)) => Ok(Number::Signed(value.wrapping_neg())),
            (b'-', Number::Unsigned(value)) => Ok(Number::Unsigned(value.wrapping_neg())),
            (b'-', Number::F64(value)) => Ok(Number::F64(-value)),
            (b'~', Number::Signed(value)) => Ok(Number::Signed(!value)),
            (b'~', Number::Unsigned(value)) => Ok(Number::Unsigned(!value)),
            (b'!', Number::Signed(_) | Number::Unsigned(_)) => {
                Ok(Number::Signed(i64::from(value.bits() == Some(0))))
            }
            _ => self.wrong(token, format!("`{}` does not apply to this number", char::from(mark))),
        }
    }

    fn primary(&mut self) -> Parsed<Number> {
        let value = match self.token.kind {
            Kind::Int(value, true) => Number::Unsigned(value),
            Kind::Int(value, false) => Number::Signed(value as i64),
            Kind::F32(bits) => Number::F32(bits),
            Kind::F64(value) => Number::F64(value),
            Kind::Word if self.of(self.token) == "WARP_SZ" => Number::Signed(32),
            Kind::Dot if self.of(self.token).as_bytes()[1].is_ascii_digit() => {
                self.token = match self.lexer.fraction(self.token) {
                    Ok(token) => token,
                    Err(bad) => return self.unreadable(bad),
                };
                return self.primary();
            }
            Kind::Mark(b'(') => return self.parenthesis(),
            _ => return self.expected("a number"),
        };
        self.advance()?;
        Ok(value)
    }

    /// `(expression)`, `(.s64) operand`, `(.u64) operand`
    fn parenthesis(&mut self) -> Parsed<Number> {
        let open = self.advance()?;
        self.enter()?;
        let cast = self.directive().filter(|name| matches!(*name, "s64" | "u64"));
        let value = if let Some(name) = cast {
            self.advance()?;
            self.expect(b')')?;
            match (self.unary()?.bits(), name) {
                (Some(bits), "s64") => Number::Signed(bits as i64),
                (Some(bits), _) => Number::Unsigned(bits),
                (None, _) => return self.wrong(open, "a cast of a floating-point number"),
            }
        } else {
            let value = self.constant()?;
            self.expect(b')')?;
            value
        };
        self.leave();
        Ok(value)
    }

    // Statements.

    /// The statements after `{`, and the `}`.
    fn block(&mut self) -> Parsed<Vec<Statement<'a>>> {
        self.enter()?;
        let mut statements = Vec::new();
        while !self.accept(b'}')? {
            self.statement(&mut statements)?;
        }
        self.leave();
        Ok(statements)
    }

    fn statement(&mut self, out: &mut Vec<Statement<'a>>) -> Parsed<()> {
        match self.token.kind {
            Kind::Word => {
                let token = self.token;
                let name = self.name("a statement")?;
                if self.accept(b':')? {
                    return self.labelled(name, token.line, out);
                }
                let instruction = self.instruction(None, token)?;
                out.push(Statement::Instruction(instruction));
            }
            Kind::Mark(b'@') => {
                self.advance()?;
                let negated = self.accept(b'!')?;
                let guard = Guard { name: self.name("a predicate")?, negated };
                let token = self.token;
                self.name("an instruction")?;
                let instruction = self.instruction(Some(guard), token)?;
                out.push(Statement::Instruction(instruction));
            }
            Kind::Mark(b'{') => {
                self.advance()?;
                let block = self.block()?;
                out.push(Statement::Block(block));
            }
            Kind::Dot => match self.directive().unwrap_or_default() {
                "loc" => self.source_line()?,
                "pragma" => self.pragma()?,
                name if starts_declaration(name) => {
                    let declared = self.declared()?;
                    if declared.space.is_none() {
                        self.registers(&declared, out)?;
                    } else {
                        self.variables(&declared, Linkage::Internal, |v| out.push(Statement::Variable(v)))?;
                    }
                }
                _ => return self.misplaced(),
            },
            _ => return self.expected("a statement or `}`"),
        }
        Ok(())
    }

    /// What follows `name:`. A label stands before anything, also before `}`.
    fn labelled(&mut self, name: &'a str, line: u32, out: &mut Vec<Statement<'a>>) -> Parsed<()> {
        out.push(match self.directive() {
            Some("branchtargets") => {
                self.advance()?;
                Statement::BranchTargets(name, self.names("a label")?)
            }
            Some("calltargets") => {
                self.advance()?;
                Statement::CallTargets(name, self.names("the name of a function")?)
            }
            Some("callprototype") => {
                self.advance()?;
                let returns = if self.is(b'(') { self.parameters(false)? } else { Vec::new() };
                if self.token.kind != Kind::Word || self.of(self.token) != "_" {
                    return self.expected("`_` in place of a name");
                }
                self.advance()?;
                let params = if self.is(b'(') { self.parameters(false)? } else { Vec::new() };
                loop {
                    match self.directive() {
                        Some("noreturn") => {
                            self.advance()?;
                        }
                        Some("abi_preserve" | "abi_preserve_control") => {
                            self.advance()?;
                            self.count("a number")?;
                        }
                        _ => break,
                    }
                }
                self.expect(b';')?;
                Statement::CallPrototype(name, returns, params)
            }
            _ => Statement::Label(name, line),
        });
        Ok(())
    }

    /// `.loc 1 34 3, function_name $L__info_string0, inlined_at 1 30 5`
    fn source_line(&mut self) -> Parsed<()> {
        self.advance()?;
        let file = self.count("the index of a file")?;
        let line = self.count("a line")?;
        let column = self.count("a column")?;
        while self.accept(b',')? {
            match self.name("`function_name` or `inlined_at`")? {
                "function_name" => {
                    self.name("a label")?;
                    if self.accept(b'+')? {
                        self.count("an offset")?;
                    }
                }
                "inlined_at" => {
                    self.count("the index of a file")?;
                    self.count("a line")?;
                    self.count("a column")?;
                }
                _ => return self.expected("`function_name` or `inlined_at` after the comma"),
            }
        }
        self.loc = Some(SourceLoc { file, line, column });
        Ok(())
    }

    // Instructions.

    /// The rest of an instruction whose opcode was read.
    fn instruction(&mut self, guard: Option<Guard<'a>>, opcode: Token) -> Parsed<Instruction<'a>> {
        let line = opcode.line;
        let name = self.of(opcode);
        if !name.starts_with(|first: char| first.is_ascii_alphabetic()) {
            let name = shorten(name, QUOTED_TOKEN);
            return self.wrong(opcode, format!("expected a statement, found `{name}`"));
        }
        let loc = self.loc;
        let mut modifiers = Vec::new();
        while let Some(modifier) = self.directive() {
            modifiers.push(modifier);
            self.advance()?;
        }
        let mut operands = Vec::new();
        if !self.accept(b';')? {
            let is_call = name == "call";
            loop {
                operands.push(self.operand(is_call)?);
                if !self.more(b';')? {
                    break;
                }
            }
        }
        Ok(Instruction { line, loc, guard, opcode: name, modifiers, operands })
    }

    /// Whether a name of an operand is looked at: neither `_` nor the constant `WARP_SZ`.
    fn is_symbol(&self) -> bool {
        self.token.kind == Kind::Word && !matches!(self.of(self.token), "_" | "WARP_SZ")
    }

    /// A name with the component or selector that follows it directly: `%tid.x`, `v.w`, `a.b0`.
    fn component(&mut self) -> Parsed<&'a str> {
        let token = self.advance()?;
        if self.token.kind == Kind::Dot && self.token.start == token.end {
            let part = self.advance()?;
            return Ok(&self.text[token.start..part.end]);
        }
        Ok(self.of(token))
    }

    /// In a call, parentheses hold arguments; elsewhere a constant.
    fn operand(&mut self, of_call: bool) -> Parsed<Operand<'a>> {
        match self.token.kind {
            Kind::Word if self.of(self.token) == "_" => {
                self.advance()?;
                self.pair(Operand::Sink)
            }
            Kind::Word if self.is_symbol() => {
                let name = self.component()?;
                match self.token.kind {
                    Kind::Mark(b'+' | b'-') => Ok(Operand::Name(name, self.addend()?)),
                    Kind::Mark(b'|') => self.pair(Operand::Name(name, 0)),
                    Kind::Mark(b'[') => self.unsupported(self.token, "an array index in an operand"),
                    _ => Ok(Operand::Name(name, 0)),
                }
            }
            Kind::Mark(b'{') => {
                self.enter()?;
                self.advance()?;
                let mut elements = vec![self.operand(false)?];
                while self.more(b'}')? {
                    elements.push(self.operand(false)?);
                }
                self.leave();
                Ok(Operand::Vector(elements))
            }
            Kind::Mark(b'[') => self.address(),
            Kind::Mark(b'(') if of_call => {
                self.enter()?;
                self.advance()?;
                let mut list = Vec::new();
                if !self.accept(b')')? {
                    list.push(self.operand(false)?);
                    while self.more(b')')? {
                        list.push(self.operand(false)?);
                    }
                }
                self.leave();
                Ok(Operand::List(list))
            }
            Kind::Mark(mark @ (b'!' | b'-')) => {
                let token = self.advance()?;
                if self.is_symbol() {
                    let name = self.component()?;
                    return Ok(if mark == b'!' { Operand::Not(name) } else { Operand::Negated(name) });
                }
                let value = self.unary()?;
                let value = self.prefix(mark, token, value)?;
                self.constant_from(value).map(immediate)
            }
            Kind::Text | Kind::End | Kind::Double(_) => self.expected("an operand"),
            Kind::Mark(mark) if !b"(+~".contains(&mark) => self.expected("an operand"),
            _ => self.constant().map(immediate),
        }
    }

    /// `first`, or `first|second`.
    fn pair(&mut self, first: Operand<'a>) -> Parsed<Operand<'a>> {
        if !self.accept(b'|')? {
            return Ok(first);
        }
        let second = if self.is_symbol() {
            Operand::Name(self.component()?, 0)
        } else if self.token.kind == Kind::Word && self.of(self.token) == "_" {
            self.advance()?;
            Operand::Sink
        } else {
            return self.expected("a second result");
        };
        Ok(Operand::Pair(Box::new(first), Box::new(second)))
    }

    /// `[base+offset]`, `[4096]`, `[map, {x, y}]`
    fn address(&mut self) -> Parsed<Operand<'a>> {
        self.enter()?;
        self.advance()?;
        let (base, offset) = if self.is_symbol() {
            (Some(self.component()?), self.addend()?)
        } else {
            let start = self.token;
            match self.constant()?.bits() {
                Some(bits) => (None, bits as i64),
                None => return self.wrong(start, "an address must be an integer"),
            }
        };
        let mut rest = Vec::new();
        while self.more(b']')? {
            rest.push(self.operand(false)?);
        }
        self.leave();
        Ok(Operand::Address(Box::new(Address { base, offset, rest })))
    }
}

/// The dimensions of an array.
struct Shape {
    /// Outermost first; 0 for an open dimension.
    lengths: Vec<u64>,
    /// Whether the first is open: `[]`, and `[0]`, which ptxas takes for the same.
    open: bool,
}

/// A level of braces in an initialiser.
struct Level {
    /// The most elements; 0 where the initialiser decides.
    length: u64,
    /// Bytes of one element.
    stride: u64,
    /// Whether all elements must be there: a vector's.
    whole: bool,
}

/// Whether a directive without its dot starts a variable or a register.
fn starts_declaration(name: &str) -> bool {
    matches!(name, "global" | "const" | "shared" | "local" | "param" | "reg" | "align" | "attribute")
        || REFUSED.contains(&name)
}

fn immediate<'a>(number: Number) -> Operand<'a> {
    match number {
        Number::Signed(value) => Operand::Integer(value as u64),
        Number::Unsigned(value) => Operand::Integer(value),
        Number::F32(bits) => Operand::F32(bits),
        Number::F64(value) => Operand::F64(value.to_bits()),
    }
}

/// The little-endian bytes of a number in an element of a type, or `None` where the two do not go together. Integers are
/// cut to the width without a word, floating-point numbers rounded, as ptxas does.
fn stored(ty: Type, number: Number) -> Option<[u8; 16]> {
    let bits = match (ty, number) {
        (Type::F32 | Type::B32, Number::F32(bits)) => u128::from(bits),
        (Type::F32 | Type::B32, Number::F64(value)) => u128::from((value as f32).to_bits()),
        (Type::F64, Number::F32(bits)) => u128::from(f64::from(f32::from_bits(bits)).to_bits()),
        // ptxas widens the bits here, not the value.
        (Type::B64, Number::F32(bits)) => u128::from(bits),
        (Type::F64 | Type::B64, Number::F64(value)) => u128::from(value.to_bits()),
        (_, Number::Signed(value)) if ty.kind() != Family::Float => i128::from(value) as u128,
        (_, Number::Unsigned(value)) if ty.kind() != Family::Float => u128::from(value),
        _ => return None,
    };
    Some(bits.to_le_bytes())
}
