//! One function: statements to instructions with virtual registers, then to bytecode.

use std::collections::HashMap;

use super::flow::{Flow, parting_call, targets};
use super::slots;
use crate::decode::decoder::{Decoder, Virtual, operands};
use crate::decode::mods::{Mods, written};
use crate::decode::symbols::{Symbol, Symbols};
use crate::decode::{Refusal, invalid, unsupported};
use crate::machine::cluster::MAX_CLUSTER;
use crate::machine::inst::{BarrierKind, Class, Control, Exec, Guard, Inst, ParamCopy, System};
use crate::machine::isa::Isa;
use crate::machine::layout::{LOCAL_WINDOW, MAX_LOCAL_BYTES, PARAM_WINDOW};
use crate::machine::program::{ClusterShape, Constant, Function, Param, PlaceLine, SystemMemory};
use crate::machine::registers::{Reg, Width};
use crate::ops;
use crate::ptx::ast::{self, Instruction, Operand, Statement, Variable};
use crate::types::{Space, Type};

/// Most bytes of a kernel's parameters (PTX ISA 8.1 and later).
const MAX_PARAM_BYTES: u64 = 32_764;
/// Most bytes of shared memory that the text may declare; the limit of a launch is an option of the machine.
pub const MAX_SHARED_BYTES: u64 = 1 << 20;

/// Functions that the runtime provides.
const SYSTEM: [(&str, System); 4] = [
    ("vprintf", System::Vprintf),
    ("__assertfail", System::AssertFail),
    ("malloc", System::Malloc),
    ("free", System::Free),
];

/// A refusal and the line it stands at.
pub type At = (u32, Refusal);

/// A function decoded alone: branch targets and places count from its own start.
pub struct Decoded {
    /// Its frame and parameters; its start is not known yet.
    pub function: Function,
    /// Its code.
    pub code: Vec<Inst>,
    /// Its lines.
    pub places: Vec<PlaceLine>,
    /// Its own shared variables.
    pub shared: Vec<SharedVariable>,
    /// Functions it calls.
    pub calls: Vec<u32>,
    /// Whether it calls through registers.
    pub calls_any: bool,
}

/// Bytes of local memory in front of and behind a `.local` variable that are no variable's.
const LOCAL_GAP: u64 = 16;
/// Bytes that these gaps may add to a frame beyond the limit of a thread's memory.
const MAX_LOCAL_GAPS: u64 = 4096;

/// Lays variables out one after another.
#[derive(Clone, Copy, Debug, Default)]
pub struct Layout {
    /// Bytes so far.
    pub bytes: u64,
}

impl Layout {
    /// The offset of the next variable, of `bytes` bytes; `None` where it would end above `limit`.
    pub fn allocate(&mut self, align: u32, bytes: u64, limit: u64) -> Option<u32> {
        let at = self.bytes.checked_next_multiple_of(u64::from(align.max(1)))?;
        self.bytes = at.checked_add(bytes).filter(|end| *end <= limit)?;
        u32::try_from(at).ok()
    }
}

struct Walk<'m, 'a> {
    d: Decoder<'m, 'a>,
    signatures: &'m [Signature],
    is_entry: bool,
    local: Layout,
    /// The pieces of the frame that are variables': offset and bytes, in order.
    local_live: Vec<(u32, u32)>,
    /// Whether the last of them is a `.local` variable, which has a gap behind it.
    local_ends: bool,
    shared: Vec<SharedVariable>,
    first_shared: u32,
    dynamic_align: u32,
    /// Call parameters in scope: offset in the frame and bytes.
    call_params: Vec<HashMap<&'a str, (u32, u32)>>,
    labels: Vec<HashMap<&'a str, u32>>,
    /// Where each label stands in the code.
    label_at: Vec<Option<u32>>,
    label_names: Vec<&'a str>,
    tables: Vec<HashMap<&'a str, &'m [&'a str]>>,
    places: Vec<PlaceLine>,
    calls: Vec<u32>,
    calls_any: bool,
    /// Whether it uses the barrier of a cluster.
    meets_cluster: bool,
    refusals: Vec<At>,
    index: u32,
}

/// A function's name and parameters, for its callers.
#[derive(Clone, Debug, Default)]
pub struct Signature {
    /// Its name.
    pub name: String,
    /// Parameters and their places.
    pub params: Vec<Param>,
    /// Return values and their places.
    pub returns: Vec<Param>,
    /// Bytes of its frame that parameters and return values take.
    pub bytes: u64,
    /// Whether it has a body.
    pub defined: bool,
    /// Whether a launch may name it.
    pub is_entry: bool,
    /// Why it can neither be launched nor called.
    pub refused: Option<At>,
}

/// Lays out a function's parameters: in the parameter bank for a kernel, in its frame for others. Too many bytes, parameters in
/// registers and clusters of more blocks than there are on a GPU are refused.
pub fn signature(f: &ast::Function<'_>) -> Signature {
    let whole = lay_out(f).and_then(|whole| clusters(f).map(|()| whole));
    whole.unwrap_or_else(|refused| Signature {
        name: f.name.to_owned(),
        defined: f.body.is_some(),
        is_entry: f.is_entry,
        refused: Some(refused),
        ..Signature::default()
    })
}

/// A kernel's clusters have a size that a GPU has.
fn clusters(f: &ast::Function<'_>) -> Result<(), At> {
    let blocks =
        f.cluster.required.map_or(1, |r| r.iter().fold(1u64, |n, d| n.saturating_mul(u64::from(*d))));
    if !(1..=u64::from(MAX_CLUSTER)).contains(&blocks) {
        let message = format!("`{}` runs in clusters of {blocks} blocks: 1 to {MAX_CLUSTER}", f.name);
        return Err((f.line, invalid(message)));
    }
    if f.cluster.blocks_are_clusters && f.cluster.required.is_none() {
        return Err((
            f.line,
            invalid(format!("`{}`: .blocksareclusters without .reqnctapercluster", f.name)),
        ));
    }
    Ok(())
}

fn lay_out(f: &ast::Function<'_>) -> Result<Signature, At> {
    let mut layout = Layout::default();
    let limit = if f.is_entry { MAX_PARAM_BYTES } else { u64::from(MAX_LOCAL_BYTES) };
    let mut param = |v: &Variable<'_>| -> Result<Param, At> {
        if v.space != Space::Param {
            return Err((v.line, unsupported(format!("parameter `{}` in a register", v.name))));
        }
        let bytes =
            v.bytes.ok_or_else(|| (v.line, unsupported(format!("parameter `{}` without a size", v.name))))?;
        let offset = layout
            .allocate(v.align, bytes, limit)
            .ok_or_else(|| (v.line, invalid(format!("the parameters take more than {limit} bytes"))))?;
        Ok(Param { name: v.name.to_owned(), offset, bytes: bytes as u32, align: v.align })
    };
    let returns = f.returns.iter().map(&mut param).collect::<Result<_, _>>()?;
    let params = f.params.iter().map(&mut param).collect::<Result<_, _>>()?;
    Ok(Signature {
        name: f.name.to_owned(),
        params,
        returns,
        bytes: layout.bytes,
        defined: f.body.is_some(),
        is_entry: f.is_entry,
        refused: None,
    })
}

/// A shared variable.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SharedVariable {
    /// Name, for messages.
    pub name: String,
    /// Alignment.
    pub align: u32,
    /// How many bytes.
    pub bytes: u64,
}

/// Decodes a function with a body. `first_shared` is the index that its first own shared variable gets.
///
/// # Errors
/// All that is wrong or not built, with lines.
pub fn decode<'m, 'a>(
    symbols: &'m Symbols<'a>,
    signatures: &'m [Signature],
    f: &'m ast::Function<'a>,
    index: u32,
    first_shared: u32,
    isa: Isa,
) -> Result<Decoded, Vec<At>> {
    let body = f.body.as_deref().unwrap_or_default();
    let own = &signatures[index as usize];
    let mut w = Walk {
        d: Decoder::new(symbols, isa, if f.is_entry { PARAM_WINDOW } else { LOCAL_WINDOW }),
        signatures,
        is_entry: f.is_entry,
        local: if f.is_entry { Layout::default() } else { Layout { bytes: own.bytes } },
        local_live: if f.is_entry || own.bytes == 0 { Vec::new() } else { vec![(0, own.bytes as u32)] },
        local_ends: false,
        shared: Vec::new(),
        first_shared,
        dynamic_align: 16,
        call_params: vec![HashMap::new()],
        labels: Vec::new(),
        label_at: Vec::new(),
        label_names: Vec::new(),
        tables: Vec::new(),
        places: vec![PlaceLine { line: f.line, function: index, ..PlaceLine::default() }],
        calls: Vec::new(),
        calls_any: false,
        meets_cluster: false,
        refusals: Vec::new(),
        index,
    };
    for (v, p) in f.returns.iter().zip(&own.returns).chain(f.params.iter().zip(&own.params)) {
        let address = if f.is_entry {
            Constant::Bits(PARAM_WINDOW + u64::from(p.offset))
        } else {
            Constant::Local(p.offset, LOCAL_WINDOW)
        };
        w.d.declare_variable(v, address);
        if !f.is_entry {
            w.call_params[0].insert(v.name, (p.offset, p.bytes));
        }
    }
    w.statements(body);
    w.finish(f, own)
}

impl<'m, 'a> Walk<'m, 'a> {
    fn statements(&mut self, statements: &'m [Statement<'a>]) {
        let mut labels = HashMap::new();
        let mut tables = HashMap::new();
        for s in statements {
            match s {
                Statement::Label(name, line) => {
                    let id = self.label_at.len() as u32;
                    self.label_at.push(None);
                    self.label_names.push(name);
                    if labels.insert(*name, id).is_some() {
                        self.refusals.push((*line, invalid(format!("the label `{name}` stands twice"))));
                    }
                }
                Statement::BranchTargets(name, list) => {
                    tables.insert(*name, list.as_slice());
                }
                _ => {}
            }
        }
        self.labels.push(labels);
        self.tables.push(tables);
        for s in statements {
            let (line, done) = match s {
                Statement::Label(name, line) => {
                    if let Some(id) = self.labels.last().and_then(|l| l.get(name)) {
                        self.label_at[*id as usize].get_or_insert(self.d.code.len() as u32);
                    }
                    (*line, Ok(()))
                }
                Statement::Register(r) => (r.line, self.d.declare_registers(r)),
                Statement::Variable(v) => (v.line, self.variable(v)),
                Statement::Instruction(i) => (i.line, self.instruction(i)),
                Statement::Block(inner) => {
                    self.d.open_scope();
                    self.call_params.push(HashMap::new());
                    self.statements(inner);
                    self.call_params.pop();
                    self.d.close_scope();
                    (0, Ok(()))
                }
                Statement::BranchTargets(..) | Statement::CallTargets(..) | Statement::CallPrototype(..) => {
                    (0, Ok(()))
                }
            };
            if let Err(refusal) = done {
                self.refusals.push((line, refusal));
            }
        }
        self.labels.pop();
        self.tables.pop();
    }

    fn variable(&mut self, v: &Variable<'a>) -> Result<(), Refusal> {
        let bytes = v.bytes;
        match v.space {
            Space::Local | Space::Param => {
                let bytes = bytes.ok_or_else(|| invalid(format!("`{}` has no size", v.name)))?;
                let limit = u64::from(MAX_LOCAL_BYTES);
                let at = self.allocate_local(v, bytes, limit).ok_or_else(|| {
                    invalid(format!("`{}`: local memory takes more than {limit} bytes", v.name))
                })?;
                let window = if v.space == Space::Param { LOCAL_WINDOW } else { 0 };
                self.d.declare_variable(v, Constant::Local(at, window));
                if v.space == Space::Param {
                    self.call_params.last_mut().expect("one scope").insert(v.name, (at, bytes as u32));
                }
            }
            Space::Shared => {
                let address = match bytes {
                    None => {
                        self.dynamic_align = self.dynamic_align.max(v.align);
                        Constant::DynamicShared(0, 0)
                    }
                    Some(bytes) => {
                        if bytes > MAX_SHARED_BYTES {
                            return Err(invalid(format!(
                                "`{}` takes more than {MAX_SHARED_BYTES} bytes",
                                v.name
                            )));
                        }
                        let index = self.first_shared + self.shared.len() as u32;
                        self.shared.push(SharedVariable { name: v.name.to_owned(), align: v.align, bytes });
                        self.d.shared_used.insert(index);
                        Constant::Shared(index, 0)
                    }
                };
                self.d.declare_variable(v, address);
            }
            space => return Err(unsupported(format!("a {space} variable inside a function, `{}`", v.name))),
        }
        Ok(())
    }

    /// The offset of a variable in the frame. A `.local` one has gaps around it, so that an access beyond it is found.
    fn allocate_local(&mut self, v: &Variable<'a>, bytes: u64, limit: u64) -> Option<u32> {
        let apart = std::mem::replace(&mut self.local_ends, v.space == Space::Local);
        let apart = self.local.bytes > 0 && (apart || self.local_ends);
        if apart {
            self.local.bytes += LOCAL_GAP;
        }
        let at = self.local.allocate(v.align, bytes, limit + if apart { MAX_LOCAL_GAPS } else { 0 })?;
        match self.local_live.last_mut() {
            Some((from, n)) if !apart => *n = at + bytes as u32 - *from,
            _ => self.local_live.push((at, bytes as u32)),
        }
        Some(at)
    }

    fn instruction(&mut self, i: &'m Instruction<'a>) -> Result<(), Refusal> {
        let source = i.loc.filter(|l| l.line > 0).map_or((0, 0), |l| (l.file, l.line));
        let inlined_at = i.loc.and_then(|l| l.inlined_at).unwrap_or((0, 0));
        let place = PlaceLine { line: i.line, source, inlined_at, function: self.index };
        if self.places.last() != Some(&place) {
            self.places.push(place);
        }
        self.d.place = self.places.len() as u32 - 1;
        self.d.guard = match &i.guard {
            None => None,
            Some(g) => {
                let (pred, _) = self.d.pred(&Operand::Name(g.name, 0))?;
                Some(Guard { pred, negated: g.negated })
            }
        };
        if self.control(i)? { Ok(()) } else { ops::decode(&mut self.d, i) }
    }

    // ------------------------------------------------------------------------------------------ control flow

    /// Decodes an instruction if it is control flow.
    fn control(&mut self, i: &'m Instruction<'a>) -> Result<bool, Refusal> {
        let mut mods = Mods::new(i);
        match i.opcode {
            "bra" => {
                mods.take("uni");
                let [Operand::Name(name, 0)] = operands(i)? else {
                    return Err(invalid("`bra` takes a label"));
                };
                let target = self.label(name)?;
                self.emit(Control::Branch { target, join: None }, Class::Control, &[], &[]);
            }
            "brx" => {
                if !mods.take("idx") {
                    return Err(unsupported(format!("`{}`", written(i))));
                }
                mods.take("uni");
                let [index, Operand::Name(table, 0)] = operands(i)? else {
                    return Err(invalid("`brx.idx` takes a register and a list of targets"));
                };
                let index = self.d.src(index, Type::U32)?;
                let names = self.tables.iter().rev().find_map(|t| t.get(table)).copied();
                let names =
                    names.ok_or_else(|| invalid(format!("`{table}` is no list of branch targets")))?;
                let targets = names.iter().map(|n| self.label(n)).collect::<Result<_, _>>()?;
                self.emit(Control::BranchTable { targets, join: None }, Class::Control, &[], &[index]);
            }
            "call" => {
                mods.take("uni");
                self.call(i)?;
            }
            "ret" => {
                mods.take("uni");
                let control = if self.is_entry { Control::Exit } else { Control::Return };
                self.emit(control, Class::Control, &[], &[]);
            }
            "exit" => {
                self.emit(Control::Exit, Class::Control, &[], &[]);
            }
            "trap" => {
                self.emit(Control::Trap, Class::Control, &[], &[]);
            }
            "brkpt" => {
                self.emit(Control::Yield, Class::Control, &[], &[]);
            }
            "nanosleep" => {
                mods.ty()?;
                let [amount] = operands(i)?;
                let amount = self.d.src(amount, Type::U32)?;
                self.emit(Control::Yield, Class::Control, &[], &[amount]);
            }
            // A marker for profilers; launches of dependent grids, which have nothing to wait for here.
            "pmevent" => {
                mods.take("mask");
                self.emit(Control::Yield, Class::Control, &[], &[]);
            }
            "griddepcontrol" => {
                if !mods.take("launch_dependents") && !mods.take("wait") {
                    return Err(invalid("`griddepcontrol` is `.launch_dependents` or `.wait`"));
                }
                self.emit(Control::Yield, Class::Sync, &[], &[]);
            }
            "bar" | "barrier" => {
                return self.barrier(i, mods).map(|()| true);
            }
            _ => return Ok(false),
        };
        mods.finish()?;
        Ok(true)
    }

    fn emit(&mut self, control: Control, class: Class, dsts: &[Reg], srcs: &[Reg]) -> &mut Inst {
        self.d.emit(Exec::Control(control), class, dsts, srcs)
    }

    fn label(&self, name: &str) -> Result<u32, Refusal> {
        let found = self.labels.iter().rev().find_map(|l| l.get(name)).copied();
        found.ok_or_else(|| invalid(format!("there is no label `{name}`")))
    }

    fn barrier(&mut self, i: &Instruction<'a>, mut mods: Mods<'_, 'a>) -> Result<(), Refusal> {
        if mods.take("cluster") {
            let arrives = mods.one_of(&[("arrive", true), ("wait", false)]);
            let arrives =
                arrives.ok_or_else(|| invalid(format!("`{}` neither arrives nor waits", written(i))))?;
            let orders = match arrives {
                true => mods.one_of(&[("release", true), ("relaxed", false)]).unwrap_or(true),
                false => {
                    mods.take("acquire");
                    true
                }
            };
            let aligned = mods.take("aligned");
            mods.finish()?;
            operands::<0>(i)?;
            self.meets_cluster = true;
            self.emit(Control::ClusterBarrier { arrives, aligned, orders }, Class::Sync, &[], &[]);
            return Ok(());
        }
        mods.take("cta");
        if mods.take("warp") {
            mods.take("sync");
            mods.finish()?;
            let [mask] = operands(i)?;
            let mask = self.d.src(mask, Type::B32)?;
            self.emit(Control::WarpBarrier, Class::Sync, &[], &[mask]);
            return Ok(());
        }
        let aligned = mods.take("aligned") || i.opcode == "bar";
        let mut ops = i.operands.iter();
        let lacks = |what: &str| invalid(format!("`{}` lacks {what}", written(i)));
        let (kind, dst, has_pred) = if mods.take("sync") {
            (BarrierKind::Sync, Reg::NONE, false)
        } else if mods.take("arrive") {
            (BarrierKind::Arrive, Reg::NONE, false)
        } else if mods.take("red") {
            let kind = mods
                .one_of(&[("popc", BarrierKind::Popc), ("and", BarrierKind::And), ("or", BarrierKind::Or)])
                .ok_or_else(|| invalid(format!("`{}` without an operation", written(i))))?;
            let ty = mods.ty()?;
            if (ty == Type::Pred) == (kind == BarrierKind::Popc) || !matches!(ty, Type::Pred | Type::U32) {
                return Err(invalid(format!("`{}` with {ty}", written(i))));
            }
            let dst = ops.next().ok_or_else(|| lacks("a destination"))?;
            (kind, self.d.dst(dst, ty)?, true)
        } else {
            return Err(unsupported(format!("`{}`", written(i))));
        };
        mods.finish()?;
        let id = self.d.src(ops.next().ok_or_else(|| lacks("a barrier"))?, Type::U32)?;
        let has_count = ops.len() > usize::from(has_pred);
        let mut count = Reg::NONE;
        if has_count {
            count = self.d.src(ops.next().ok_or_else(|| lacks("a count"))?, Type::U32)?;
        }
        let (mut pred, mut negated) = (Reg::NONE, false);
        if has_pred {
            (pred, negated) = self.d.pred(ops.next().ok_or_else(|| lacks("a predicate"))?)?;
        }
        if kind == BarrierKind::Arrive && !has_count {
            return Err(invalid("`bar.arrive` needs a thread count"));
        }
        if ops.len() > 0 {
            return Err(invalid(format!("`{}` has too many operands", written(i))));
        }
        let control = Control::Barrier { kind, aligned, counted: has_count };
        self.emit(control, Class::Sync, &[dst], &[id, count, pred]).imm = u64::from(negated);
        Ok(())
    }

    // ------------------------------------------------------------------------------------------ calls

    fn call_param(&self, op: &Operand<'a>) -> Result<(u32, u32), Refusal> {
        let Operand::Name(name, 0) = op else {
            return Err(unsupported("a call whose arguments are not `.param` variables"));
        };
        let found = self.call_params.iter().rev().find_map(|scope| scope.get(name)).copied();
        found.ok_or_else(|| unsupported(format!("the argument `{name}`, which is no `.param` variable")))
    }

    fn call(&mut self, i: &'m Instruction<'a>) -> Result<(), Refusal> {
        let mut ops = i.operands.as_slice();
        let params =
            |list: &[Operand<'a>]| list.iter().map(|op| self.call_param(op)).collect::<Result<Box<[_]>, _>>();
        let results = match ops.split_first() {
            Some((Operand::List(list), rest)) => {
                ops = rest;
                params(list)?
            }
            _ => Box::default(),
        };
        let Some((Operand::Name(callee, 0), rest)) = ops.split_first() else {
            return Err(invalid("`call` names no function"));
        };
        let args = match rest.first() {
            Some(Operand::List(list)) => params(list)?,
            _ => Box::default(),
        };
        if let Ok((reg, _)) = self.d.register(callee) {
            if reg.width != Width::B64 {
                return Err(invalid(format!("`{callee}` does not hold the address of a function")));
            }
            self.calls_any = true;
            self.emit(Control::CallIndirect { args, results }, Class::Control, &[], &[reg]);
            return Ok(());
        }
        let function = match self.d.symbols.get(callee) {
            Some(Symbol::Function(index)) => *index,
            _ => {
                let refusal = self.d.symbols.refusal(callee).cloned();
                return Err(refusal.unwrap_or_else(|| invalid(format!("there is no function `{callee}`"))));
            }
        };
        let s = &self.signatures[function as usize];
        if let Some((_, refusal)) = &s.refused {
            return Err(refusal.clone());
        }
        if !s.defined {
            let system = SYSTEM.iter().find(|(name, _)| name == callee).map(|(_, system)| *system);
            let function = system.ok_or_else(|| unsupported(format!("the external function `{callee}`")))?;
            // Which block gets which piece of the heap shows in its addresses.
            self.d.ordered |= matches!(function, System::Malloc | System::Free);
            self.emit(Control::System { function, args, results }, Class::Control, &[], &[]);
            return Ok(());
        }
        if s.is_entry {
            return Err(unsupported(format!("a call of the kernel `{callee}`")));
        }
        let args = pair(&args, &s.params).map_err(|e| invalid(format!("arguments of `{callee}`: {e}")))?;
        let results =
            pair(&results, &s.returns).map_err(|e| invalid(format!("results of `{callee}`: {e}")))?;
        self.calls.push(function);
        self.emit(Control::Call { function, args, results }, Class::Control, &[], &[]);
        Ok(())
    }

    // ------------------------------------------------------------------------------------------ the whole

    fn finish(mut self, f: &ast::Function<'a>, own: &Signature) -> Result<Decoded, Vec<At>> {
        self.d.guard = None;
        self.d.place = 0;
        // One way out of a device function, so that lanes that return early meet the others there.
        let out = self.d.code.len() as u32;
        if !self.is_entry {
            for inst in &mut self.d.code {
                if matches!(inst.exec, Exec::Control(Control::Return)) {
                    inst.exec = Exec::Control(Control::Branch { target: u32::MAX, join: None });
                }
            }
        }
        self.emit(if self.is_entry { Control::Exit } else { Control::Return }, Class::Control, &[], &[]);
        let mut code = std::mem::take(&mut self.d.code);
        // Labels to instructions; a label at the end names the way out.
        let at: Vec<u32> = self.label_at.iter().map(|at| at.unwrap_or(out).min(out)).collect();
        for inst in &mut code {
            if let Exec::Control(control) = &mut inst.exec {
                let fix = |t: &mut u32| *t = if *t == u32::MAX { out } else { at[*t as usize] };
                match control {
                    Control::Branch { target, .. } => fix(target),
                    Control::BranchTable { targets, .. } => targets.iter_mut().for_each(fix),
                    _ => {}
                }
            }
        }
        if !self.refusals.is_empty() {
            return Err(self.refusals);
        }
        let flow = Flow::new(&code);
        let plan = slots::plan(&code, &flow, &self.d.virtuals);
        let mut code = with_joins(code, &flow, self.is_entry);
        for inst in &mut code {
            inst.regs.iter_mut().for_each(|r| slots::assign(r, &plan));
            if let Some(guard) = &mut inst.guard {
                slots::assign(&mut guard.pred, &plan);
            }
        }
        let mut constants = Vec::new();
        let mut specials = Vec::new();
        for (v, origin) in self.d.virtuals.iter().enumerate() {
            let reg = Reg { width: origin.width(), slot: plan.slot[v] };
            match origin {
                Virtual::Plain(_) => {}
                Virtual::Constant(_, value) => constants.push((reg, *value)),
                Virtual::Special(special) => specials.push((reg, *special)),
            }
        }
        let gap = if self.local_ends { LOCAL_GAP } else { 0 };
        let local_bytes = (self.local.bytes + gap).next_multiple_of(16) as u32;
        let function = Function {
            name: f.name.to_owned(),
            is_entry: f.is_entry,
            defined: true,
            refused: Vec::new(),
            start: 0,
            rows: plan.rows,
            preds: plan.preds,
            constants,
            system: SystemMemory::of(&specials),
            specials,
            params: own.params.clone(),
            returns: own.returns.clone(),
            local_bytes,
            local_live: self.local_live,
            shared: self.d.shared_used.iter().map(|i| (*i, 0)).collect(),
            shared_bytes: 0,
            shared_span: 0,
            shared_gap: 0,
            variables: Vec::new(),
            dynamic_align: self.dynamic_align,
            max_threads: f.max_threads,
            required_threads: f.required_threads,
            cluster: ClusterShape {
                required: f.cluster.required,
                most: f.cluster.max_rank,
                explicit: f.cluster.explicit,
                counted: f.cluster.blocks_are_clusters,
            },
            meets_cluster: self.meets_cluster,
            ordered: self.d.ordered,
            shared_grain: self.d.shared_grain,
            asynchronous: self.d.asynchronous,
        };
        Ok(Decoded {
            function,
            code,
            places: self.places,
            shared: self.shared,
            calls: self.calls,
            calls_any: self.calls_any,
        })
    }
}

/// Matches the caller's pieces of parameter memory to the callee's.
fn pair(caller: &[(u32, u32)], callee: &[Param]) -> Result<Box<[ParamCopy]>, String> {
    if caller.len() != callee.len() {
        return Err(format!("{} are given, the function has {}", caller.len(), callee.len()));
    }
    let one = |(&(at, bytes), p): (&(u32, u32), &Param)| {
        if bytes < p.bytes {
            return Err(format!("{bytes} bytes for `{}`, which has {}", p.name, p.bytes));
        }
        Ok(ParamCopy { caller: at, callee: p.offset, bytes: p.bytes })
    };
    caller.iter().zip(callee).map(one).collect()
}

/// Finds where the lanes of each branch meet again, and puts a `Join` there.
///
/// Basic blocks of a kernel that only exit get none, so that lanes exit at once and wait for no others.
fn with_joins(code: Vec<Inst>, flow: &Flow, is_entry: bool) -> Vec<Inst> {
    let post = flow.post_dominators();
    let only_exits =
        |b: usize| is_entry && matches!(code[flow.blocks[b].start].exec, Exec::Control(Control::Exit));
    let join_of = |i: usize| {
        // A branch without a guard does not part lanes; one through a table may.
        let may_part =
            code[i].guard.is_some() || matches!(code[i].exec, Exec::Control(Control::BranchTable { .. }));
        let b = post[flow.block_of(i)].filter(|_| may_part && !targets(&code[i]).is_empty())?;
        (!only_exits(b)).then_some(b)
    };
    let joins: Vec<Option<usize>> = (0..code.len()).map(join_of).collect();
    let mut has_join = vec![false; flow.blocks.len()];
    joins.iter().flatten().for_each(|b| has_join[*b] = true);
    let behind = (0..code.len()).filter(|i| parting_call(&code[*i])).map(|i| flow.block_of(i + 1));
    behind.filter(|b| !only_exits(*b)).for_each(|b| has_join[b] = true);
    // New index of every instruction; that of a block with a join is the join's.
    let mut moved = Vec::with_capacity(code.len());
    let mut inserted = 0;
    for i in 0..code.len() {
        let b = flow.block_of(i);
        let first = flow.blocks[b].start == i;
        moved.push((i + inserted) as u32);
        inserted += usize::from(first && has_join[b]);
    }
    let mut out = Vec::with_capacity(code.len() + inserted);
    for (i, mut inst) in code.into_iter().enumerate() {
        let b = flow.block_of(i);
        if flow.blocks[b].start == i && has_join[b] {
            out.push(Inst::new(Exec::Control(Control::Join), Class::Control, &[], &[], inst.place));
        }
        if let Exec::Control(control) = &mut inst.exec {
            let meet = joins[i].map(|b| moved[flow.blocks[b].start]);
            match control {
                Control::Branch { target, join } => {
                    *target = moved[*target as usize];
                    *join = meet;
                }
                Control::BranchTable { targets, join } => {
                    targets.iter_mut().for_each(|t| *t = moved[*t as usize]);
                    *join = meet;
                }
                _ => {}
            }
        }
        out.push(inst);
    }
    out
}
