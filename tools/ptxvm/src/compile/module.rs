//! A whole module: variables get their places, functions are decoded and linked.

use super::function::{self, At, Layout, MAX_SHARED_BYTES, SharedVariable, Signature};
use crate::decode::symbols::{Symbol, Symbols};
use crate::decode::{Refusal, invalid, unsupported};
use crate::error::{Error, ErrorKind, Finding};
use crate::machine::inst::{Control, Exec};
use crate::machine::isa::Isa;
use crate::machine::memory::variables::SharedRange;
use crate::machine::module::{GlobalVariable, Module};
use crate::machine::program::{Constant, PlaceLine, Refused};
use crate::ptx::ast::{self, InitialValue, Linkage, Variable};
use crate::types::Space;

/// Most bytes of all constant variables of a module, as on hardware.
const MAX_CONST_BYTES: u64 = 64 << 10;
/// Most bytes of global variables that a module may declare.
const MAX_GLOBAL_BYTES: u64 = 1 << 32;

/// Most bytes that gaps between shared variables take together. With them the addresses of a block that uses all of its shared
/// memory still have the 18 bits that matrix descriptors can name.
const MAX_SHARED_GAPS: u64 = 16 << 10;

/// Bytes between two shared variables, where a kernel has `n`, dynamic shared memory included. It is a multiple of what banks,
/// boxes and swizzles repeat after, where there is room, so that an address has the same remainder as without gaps.
fn shared_gap(n: usize) -> u64 {
    [1024, 128, 16].into_iter().find(|gap| n as u64 * gap <= MAX_SHARED_GAPS).unwrap_or(0)
}

/// Parses and decodes PTX; `name` stands for it in reports.
///
/// # Errors
/// If nothing of it can be launched: `Fault` for text that is wrong, `Unsupported` for text that the machine cannot run, with
/// all places.
pub fn load(name: &str, text: &str) -> Result<Module, Error> {
    let tree = crate::ptx::parse(name, text)?;
    let mut module = Module {
        name: name.to_owned(),
        text: text.to_owned(),
        files: tree.files.clone(),
        ..Module::default()
    };
    let Err(refused) = module.build(&tree, Isa::detect()) else { return Ok(module) };
    Err(error(refused.iter().map(|refused| module.finding(refused)).collect()))
}

/// What is wrong comes first. What is not supported is told beside it, so that one run shows everything that keeps the text from
/// a launch.
pub(crate) fn error(findings: Vec<Finding>) -> Error {
    let (mut wrong, missing): (Vec<_>, Vec<_>) =
        findings.into_iter().partition(|finding| finding.kind != ErrorKind::Unsupported);
    if wrong.is_empty() {
        return Error::Unsupported(missing);
    }
    wrong.extend(missing);
    Error::Fault(wrong)
}

/// A refusal with its line.
fn at((line, refusal): At) -> Refused {
    Refused { line, kind: refusal.kind, message: refusal.message }
}

impl Module {
    /// Fails if no kernel can run. What keeps only some from it stays with them.
    fn build(&mut self, tree: &ast::Module<'_>, isa: Isa) -> Result<(), Vec<Refused>> {
        if tree.address_size != 64 {
            return Err(vec![at((
                0,
                unsupported(format!("`.address_size {}`: only 64", tree.address_size)),
            ))]);
        }
        let mut symbols = Symbols::default();
        let mut useless: Vec<At> = Vec::new();
        let mut signatures: Vec<Signature> = Vec::new();
        let mut bodies: Vec<Option<&ast::Function<'_>>> = Vec::new();
        for f in &tree.functions {
            let mut signature = function::signature(f);
            // A declaration may come before its definition: they are one function.
            let known = match symbols.get(f.name) {
                Some(Symbol::Function(i)) => Some(*i as usize),
                _ => None,
            };
            let i = known.unwrap_or(signatures.len());
            if i == signatures.len() {
                symbols.insert(f.name, Symbol::Function(i as u32));
                signatures.push(signature);
                bodies.push(f.body.is_some().then_some(f));
            } else if f.body.is_some() {
                if bodies[i].is_some() {
                    signature.refused = Some((f.line, invalid(format!("`{}` is defined twice", f.name))));
                }
                signatures[i] = signature;
                bodies[i] = Some(f);
            }
        }
        for alias in &tree.aliases {
            match symbols.get(alias.function) {
                Some(Symbol::Function(i)) => symbols.insert(alias.name, Symbol::Function(*i)),
                _ => {
                    let why = invalid(format!("there is no function `{}`", alias.function));
                    symbols.refuse(alias.name, why.clone());
                    useless.push((alias.line, why));
                }
            }
        }
        for v in &tree.refused {
            let why = unsupported(v.message.clone());
            symbols.refuse(v.name, why.clone());
            useless.push((v.line, why));
        }
        let mut shared: Vec<SharedVariable> = Vec::new();
        let mut constant = Layout::default();
        let mut global_bytes = Layout::default();
        for v in &tree.variables {
            if let Err(r) = self.variable(v, &mut symbols, &mut shared, [&mut constant, &mut global_bytes]) {
                symbols.refuse(v.name, r.clone());
                useless.push((v.line, r));
            }
        }
        self.constants.resize(constant.bytes as usize, 0);
        for v in &tree.variables {
            if let Err(r) = self.initialise(v, &symbols) {
                symbols.refuse(v.name, r.clone());
                useless.push((v.line, r));
            }
        }
        // Nor is of use what holds the address of such a variable.
        while let Some((v, why)) = tree.variables.iter().find_map(|v| Some((v, holds_refused(v, &symbols)?)))
        {
            symbols.refuse(v.name, why.clone());
            useless.push((v.line, why));
        }
        self.refused_declarations = useless.into_iter().map(at).collect();
        let mut decoded = Vec::new();
        let mut refused = Vec::new();
        for (i, f) in bodies.into_iter().enumerate() {
            let Some(f) = f else { continue };
            let own = signatures[i].refused.clone();
            match function::decode(&symbols, &signatures, f, i as u32, shared.len() as u32, isa) {
                Ok(d) if own.is_none() => {
                    shared.extend_from_slice(&d.shared);
                    decoded.push((i, d));
                }
                lines => {
                    refused.push((i, own.into_iter().chain(lines.err().into_iter().flatten()).collect()))
                }
            }
        }
        self.link(signatures, decoded, refused);
        // Dynamic shared memory is one piece, however often it is declared.
        let dynamic = tree.variables.iter().filter(|v| v.space == Space::Shared && v.bytes.is_none());
        let align = dynamic.map(|v| v.align).max().unwrap_or(1);
        self.program.functions.iter_mut().for_each(|f| f.dynamic_align = f.dynamic_align.max(align));
        self.lay_out_shared(&shared, tree);
        // With nothing to launch, what is wrong with the rest is all that there is to tell.
        let all = self.all_refused();
        if all.is_empty() || self.kernels().any(|f| f.refused.is_empty()) { Ok(()) } else { Err(all) }
    }

    fn variable<'a>(
        &mut self,
        v: &Variable<'a>,
        symbols: &mut Symbols<'a>,
        shared: &mut Vec<SharedVariable>,
        [constant, global]: [&mut Layout; 2],
    ) -> Result<(), Refusal> {
        let too_much =
            |limit: u64| invalid(format!("`{}`: {} variables take more than {limit} bytes", v.name, v.space));
        let address = match (v.space, v.bytes) {
            (Space::Shared, None) => Constant::DynamicShared(0, 0),
            (_, None) => return Err(unsupported(format!("`{}` is defined elsewhere: link first", v.name))),
            (_, Some(_)) if v.linkage == Linkage::Extern => {
                return Err(unsupported(format!("`{}` is defined elsewhere: link first", v.name)));
            }
            (Space::Shared, Some(bytes)) => {
                if bytes > MAX_SHARED_BYTES {
                    return Err(too_much(MAX_SHARED_BYTES));
                }
                shared.push(SharedVariable { name: v.name.to_owned(), align: v.align, bytes });
                Constant::Shared(shared.len() as u32 - 1, 0)
            }
            (Space::Const, Some(bytes)) => {
                let at = constant
                    .allocate(v.align, bytes, MAX_CONST_BYTES)
                    .ok_or_else(|| too_much(MAX_CONST_BYTES))?;
                self.constant_names.push((v.name.to_owned(), at, bytes as u32));
                Constant::Bits(u64::from(at))
            }
            (Space::Global, Some(bytes)) => {
                global.allocate(1, bytes, MAX_GLOBAL_BYTES).ok_or_else(|| too_much(MAX_GLOBAL_BYTES))?;
                self.globals.push(GlobalVariable {
                    name: v.name.to_owned(),
                    bytes,
                    init: Vec::new(),
                    pointers: Vec::new(),
                });
                Constant::Global(self.globals.len() as u32 - 1, 0)
            }
            (space, _) => {
                return Err(unsupported(format!("a {space} variable of module scope, `{}`", v.name)));
            }
        };
        symbols.insert(v.name, Symbol::Variable { space: v.space, address });
        Ok(())
    }

    fn initialise(&mut self, v: &Variable<'_>, symbols: &Symbols<'_>) -> Result<(), Refusal> {
        let Some(Symbol::Variable { address, .. }) = symbols.get(v.name) else { return Ok(()) };
        for piece in &v.init {
            match &piece.value {
                InitialValue::Bytes(bytes) => match (*address, v.space) {
                    (Constant::Global(i, _), _) => {
                        self.globals[i as usize].init.push((piece.offset, bytes.clone()));
                    }
                    (Constant::Bits(at), Space::Const) => {
                        let from = (at + piece.offset) as usize;
                        let place = self.constants.get_mut(from..from + bytes.len());
                        place.ok_or_else(|| invalid("the initialiser is too long"))?.copy_from_slice(bytes);
                    }
                    _ => return Err(invalid(format!("{} memory has no initial values", v.space))),
                },
                InitialValue::Symbol { name, addend, generic, bytes, shift } => {
                    if *bytes != 8 || *shift != 0 {
                        return Err(unsupported(format!(
                            "a part of the address of `{name}` as initial value"
                        )));
                    }
                    let value = match symbols.get(name) {
                        None => return Err(invalid(format!("`{name}` is not declared"))),
                        // The variables of this kind are sorted out when all others are known.
                        Some(Symbol::Refused(_)) => continue,
                        Some(Symbol::Function(i)) => Constant::Function(*i),
                        Some(Symbol::Variable { space, address }) if *generic => {
                            address.plus(*addend).generic(*space)
                        }
                        Some(Symbol::Variable { address, .. }) => address.plus(*addend),
                    };
                    match (*address, v.space) {
                        (Constant::Global(i, _), _) => {
                            self.globals[i as usize].pointers.push((piece.offset, value))
                        }
                        (Constant::Bits(at), Space::Const) => {
                            self.constant_pointers.push((at + piece.offset, value))
                        }
                        _ => return Err(invalid(format!("{} memory has no initial values", v.space))),
                    }
                }
            }
        }
        Ok(())
    }

    /// Concatenates the functions' code, and adds to each kernel the needs of the functions that it calls.
    fn link(
        &mut self,
        signatures: Vec<Signature>,
        decoded: Vec<(usize, function::Decoded)>,
        refused: Vec<(usize, Vec<At>)>,
    ) {
        let n = signatures.len();
        let mut calls: Vec<Vec<u32>> = vec![Vec::new(); n];
        let mut any = vec![false; n];
        self.program.functions.resize_with(n, Default::default);
        for (i, s) in signatures.into_iter().enumerate() {
            let f = &mut self.program.functions[i];
            (f.name, f.is_entry, f.defined) = (s.name, s.is_entry, s.defined);
        }
        for (i, lines) in refused {
            self.program.functions[i].refused = lines.into_iter().map(at).collect();
        }
        for (i, mut d) in decoded {
            let start = self.program.code.len() as u32;
            let first_place = self.program.places.len() as u32;
            for inst in &mut d.code {
                inst.place += first_place;
                if let Exec::Control(control) = &mut inst.exec {
                    match control {
                        Control::Branch { target, join } => {
                            *target += start;
                            join.iter_mut().for_each(|j| *j += start);
                        }
                        Control::BranchTable { targets, join } => {
                            targets.iter_mut().for_each(|t| *t += start);
                            join.iter_mut().for_each(|j| *j += start);
                        }
                        _ => {}
                    }
                }
            }
            self.program.code.append(&mut d.code);
            self.program.places.append(&mut d.places.into_iter().collect::<Vec<PlaceLine>>());
            calls[i] = d.calls;
            any[i] = d.calls_any;
            d.function.start = start;
            self.program.functions[i] = d.function;
        }
        let reach: Vec<Vec<u32>> = (0..n).map(|i| reachable(i as u32, &calls, &any)).collect();
        for (i, reached) in reach.iter().enumerate() {
            let mut f = std::mem::take(&mut self.program.functions[i]);
            for j in reached.iter().filter(|j| **j as usize != i) {
                let callee = &self.program.functions[*j as usize];
                if !callee.is_entry {
                    f.shared.extend(&callee.shared);
                    f.dynamic_align = f.dynamic_align.max(callee.dynamic_align);
                    f.ordered |= callee.ordered;
                    f.asynchronous |= callee.asynchronous;
                    f.meets_cluster |= callee.meets_cluster;
                    f.system = f.system.and(callee.system);
                    f.shared_grain = f.shared_grain.min(callee.shared_grain);
                    f.refused.extend(callee.refused.iter().cloned());
                }
            }
            self.program.functions[i] = f;
        }
    }

    /// Gives the shared variables of each kernel their places. Between any two is a gap, so that an access beyond one is found.
    fn lay_out_shared(&mut self, shared: &[SharedVariable], tree: &ast::Module<'_>) {
        for f in self.program.functions.iter_mut().filter(|f| f.is_entry) {
            f.shared.sort_unstable();
            f.shared.dedup();
            // As hardware has them, and with the gaps.
            let (mut packed, mut spread) = (Layout::default(), Layout::default());
            let gap = shared_gap(f.shared.len() + 1);
            for (i, offset) in &mut f.shared {
                let v = &shared[*i as usize];
                if spread.bytes > 0 {
                    spread.bytes += gap;
                }
                let fits = packed.allocate(v.align, v.bytes, MAX_SHARED_BYTES);
                let at_most = MAX_SHARED_BYTES + 2 * MAX_SHARED_GAPS;
                let Some(at) = fits.and_then(|_| spread.allocate(v.align, v.bytes, at_most)) else {
                    let line = tree.functions.iter().find(|g| g.name == f.name).map_or(0, |g| g.line);
                    let limit =
                        format!("`{}`: its shared variables take more than {MAX_SHARED_BYTES} bytes", f.name);
                    f.refused.push(at((line, invalid(limit))));
                    break;
                };
                *offset = at;
                let from = u64::from(at);
                f.variables.push(SharedRange { name: v.name.clone(), from, end: from + v.bytes });
            }
            f.variables.retain(|v| v.from < v.end);
            (f.shared_bytes, f.shared_span, f.shared_gap) = (packed.bytes as u32, spread.bytes, gap);
        }
    }
}

/// Why a variable is of no use that is initialised with the address of one that is not, if it is still thought to be.
fn holds_refused(v: &Variable<'_>, symbols: &Symbols<'_>) -> Option<Refusal> {
    let known = symbols.refusal(v.name).is_none();
    v.init.iter().filter(|_| known).find_map(|piece| match &piece.value {
        InitialValue::Symbol { name, .. } => symbols.refusal(name).cloned(),
        InitialValue::Bytes(_) => None,
    })
}

/// Functions that a function may call, itself included; one that calls through a register may call all.
fn reachable(from: u32, calls: &[Vec<u32>], any: &[bool]) -> Vec<u32> {
    let mut seen = vec![false; calls.len()];
    let mut open = vec![from];
    while let Some(f) = open.pop() {
        if std::mem::replace(&mut seen[f as usize], true) {
            continue;
        }
        if any[f as usize] {
            return (0..calls.len() as u32).collect();
        }
        open.extend(&calls[f as usize]);
    }
    (0..calls.len() as u32).filter(|f| seen[*f as usize]).collect()
}
