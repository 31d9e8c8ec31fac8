//! Functions and kernels: name, parameters, directives, body.

use super::{Parsed, Parser};
use crate::ptx::ast::{Function, Linkage, Variable};
use crate::ptx::lex::TokenKind;
use crate::types::Space;

impl<'a> Parser<'a, '_> {
    pub(super) fn function(&mut self, linkage: Linkage) -> Parsed<Function<'a>> {
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
        while self.token.kind == TokenKind::Dot {
            self.tuning(&mut function)?;
        }
        if self.accept(b'{')? {
            function.body = Some(self.block()?);
        } else if !self.accept(b';')? {
            return self.expected("`{`, `;` or a directive");
        }
        self.function = "";
        self.loc = None;
        self.calls.clear();
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
    pub(super) fn parameters(&mut self, of_kernel: bool) -> Parsed<Vec<Variable<'a>>> {
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
            if name.kind != TokenKind::Word {
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
}
