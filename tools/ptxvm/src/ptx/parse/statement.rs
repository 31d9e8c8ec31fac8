//! Statements of a body, instructions and their operands.

use super::constant::Number;
use super::{Parsed, Parser, QUOTED_TOKEN, starts_declaration};
use crate::ptx::ast::{Address, Guard, Instruction, Linkage, Operand, SourceLoc, Statement};
use crate::ptx::lex::{Token, TokenKind, shorten};

impl<'a> Parser<'a, '_> {
    /// The statements after `{`, and the `}`.
    pub(super) fn block(&mut self) -> Parsed<Vec<Statement<'a>>> {
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
            TokenKind::Word => {
                let token = self.token;
                let name = self.name("a statement")?;
                if self.accept(b':')? {
                    return self.labelled(name, token.line, out);
                }
                let instruction = self.instruction(None, token)?;
                out.push(Statement::Instruction(instruction));
            }
            TokenKind::Mark(b'@') => {
                self.advance()?;
                let negated = self.accept(b'!')?;
                let guard = Guard { name: self.name("a predicate")?, negated };
                let token = self.token;
                self.name("an instruction")?;
                let instruction = self.instruction(Some(guard), token)?;
                out.push(Statement::Instruction(instruction));
            }
            TokenKind::Mark(b'{') => {
                self.advance()?;
                let block = self.block()?;
                out.push(Statement::Block(block));
            }
            TokenKind::Dot => match self.directive().unwrap_or_default() {
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

    /// The statement after `name:`. A label stands before anything, also before `}`.
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
                if self.token.kind != TokenKind::Word || self.of(self.token) != "_" {
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
        let mut inlined_at = None;
        while self.accept(b',')? {
            match self.name("`function_name` or `inlined_at`")? {
                "function_name" => {
                    self.name("a label")?;
                    if self.accept(b'+')? {
                        self.count("an offset")?;
                    }
                }
                "inlined_at" => {
                    let call =
                        (self.count("the index of a file")?, self.count("a line")?, self.count("a column")?);
                    // Where the call's own `.loc` came before, it tells what the caller is inlined into.
                    inlined_at = Some(self.calls.get(&call).copied().unwrap_or((call.0, call.1)));
                }
                _ => return self.expected("`function_name` or `inlined_at` after the comma"),
            }
        }
        match inlined_at {
            Some(outermost) => self.calls.insert((file, line, column), outermost),
            None => self.calls.remove(&(file, line, column)),
        };
        self.loc = Some(SourceLoc { file, line, column, inlined_at });
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
        self.token.kind == TokenKind::Word && !matches!(self.of(self.token), "_" | "WARP_SZ")
    }

    /// A name with the component or selector that follows it directly: `%tid.x`, `v.w`, `a.b0`.
    fn component(&mut self) -> Parsed<&'a str> {
        let token = self.advance()?;
        if self.token.kind == TokenKind::Dot && self.token.start == token.end {
            let part = self.advance()?;
            return Ok(&self.text[token.start..part.end]);
        }
        Ok(self.of(token))
    }

    /// In a call, parentheses hold arguments; elsewhere a constant.
    fn operand(&mut self, of_call: bool) -> Parsed<Operand<'a>> {
        match self.token.kind {
            TokenKind::Word if self.of(self.token) == "_" => {
                self.advance()?;
                self.pair(Operand::Sink)
            }
            TokenKind::Word if self.is_symbol() => {
                let name = self.component()?;
                match self.token.kind {
                    TokenKind::Mark(b'+' | b'-') => Ok(Operand::Name(name, self.addend()?)),
                    TokenKind::Mark(b'|') => self.pair(Operand::Name(name, 0)),
                    TokenKind::Mark(b'[') => self.unsupported(self.token, "an array index in an operand"),
                    _ => Ok(Operand::Name(name, 0)),
                }
            }
            TokenKind::Mark(b'{') => {
                self.enter()?;
                self.advance()?;
                let mut elements = vec![self.operand(false)?];
                while self.more(b'}')? {
                    elements.push(self.operand(false)?);
                }
                self.leave();
                Ok(Operand::Vector(elements))
            }
            TokenKind::Mark(b'[') => self.address(),
            TokenKind::Mark(b'(') if of_call => {
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
            TokenKind::Mark(mark @ (b'!' | b'-')) => {
                let token = self.advance()?;
                if self.is_symbol() {
                    let name = self.component()?;
                    return Ok(if mark == b'!' { Operand::Not(name) } else { Operand::Negated(name) });
                }
                let value = self.unary()?;
                let value = self.prefix(mark, token, value)?;
                self.constant_from(value).map(immediate)
            }
            TokenKind::Text | TokenKind::End | TokenKind::Double(_) => self.expected("an operand"),
            TokenKind::Mark(mark) if !b"(+~".contains(&mark) => self.expected("an operand"),
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
        } else if self.token.kind == TokenKind::Word && self.of(self.token) == "_" {
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

fn immediate<'a>(number: Number) -> Operand<'a> {
    match number {
        Number::Signed(value) => Operand::Integer(value as u64),
        Number::Unsigned(value) => Operand::Integer(value),
        Number::F32(bits) => Operand::F32(bits),
        Number::F64(value) => Operand::F64(value.to_bits()),
    }
}
