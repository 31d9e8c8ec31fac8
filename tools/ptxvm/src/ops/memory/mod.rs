//! Loads, stores, address conversions, fences, cache hints.

use super::lane::{Unary, unary};
use crate::decode::decoder::{Decoder, operands, window};
use crate::decode::mods::Mods;
use crate::decode::{Refusal, invalid, unsupported};
use crate::machine::context::{Context, Stop};
use crate::machine::inst::{Class, Inst, WarpOp};
use crate::machine::memory::access::{Access, Act, Order, Part, by_space, in_window};
use crate::machine::memory::buffer::Cell;
use crate::machine::memory::race::Releases;
use crate::machine::memory::{lanes, pick};
use crate::machine::registers::{LANES, Reg, Registers, Width};
use crate::ptx::ast::{Instruction, Operand};
use crate::types::{Space, Type};

/// Decodes the instructions of this family.
///
/// # Errors
/// The instruction is wrong, or not built.
pub fn decode(d: &mut Decoder<'_, '_>, inst: &Instruction<'_>) -> Result<(), Refusal> {
    match inst.opcode {
        "ld" | "ldu" => load(d, inst),
        "st" => store(d, inst),
        "cvta" => cvta(d, inst),
        "isspacep" => isspacep(d, inst),
        "prefetch" | "prefetchu" | "applypriority" => hint(d, inst),
        "discard" => discard(d, inst),
        "membar" | "fence" => fence(d, inst),
        "createpolicy" => createpolicy(d, inst),
        opcode => Err(unsupported(format!("the instruction `{opcode}`"))),
    }
}

const SPACES: &[(&str, Space)] = &[
    ("global", Space::Global),
    ("shared", Space::Shared),
    ("shared::cta", Space::Shared),
    ("local", Space::Local),
    ("const", Space::Const),
    ("param", Space::Param),
    ("param::entry", Space::Param),
    ("param::func", Space::Param),
];

/// Takes the state space; generic where none is written.
pub(crate) fn space(mods: &mut Mods<'_, '_>) -> Space {
    mods.one_of(SPACES).unwrap_or(Space::Generic)
}

/// Takes the scope: whether it reaches other blocks. A cluster is one block in this machine.
pub(crate) fn scope(mods: &mut Mods<'_, '_>) -> Option<bool> {
    mods.one_of(&[("cta", false), ("cluster", false), ("gpu", true), ("sys", true)])
}

/// Takes what only steers caches: it changes no result.
fn cache_hints(mods: &mut Mods<'_, '_>, operators: &[(&str, ())]) {
    mods.one_of(operators);
    mods.one_of(&[
        ("L1::evict_normal", ()),
        ("L1::evict_unchanged", ()),
        ("L1::evict_first", ()),
        ("L1::evict_last", ()),
        ("L1::no_allocate", ()),
    ]);
    mods.one_of(&[("L2::evict_normal", ()), ("L2::evict_first", ()), ("L2::evict_last", ())]);
    mods.one_of(&[("L2::64B", ()), ("L2::128B", ()), ("L2::256B", ())]);
}

/// With `.L2::cache_hint` the last operand is a cache policy; gives the operands before it.
pub(crate) fn without_policy<'i, 'a>(
    d: &mut Decoder<'_, '_>,
    mods: &mut Mods<'_, '_>,
    all: &'i [Operand<'a>],
) -> Result<&'i [Operand<'a>], Refusal> {
    if !mods.take("L2::cache_hint") {
        return Ok(all);
    }
    let [rest @ .., policy] = all else {
        return Err(invalid(format!("`{}` without a cache policy", mods.written())));
    };
    d.src(policy, Type::B64)?;
    Ok(rest)
}

/// Takes `.v2`, `.v4` or `.v8`.
fn vector(mods: &mut Mods<'_, '_>) -> u32 {
    mods.one_of(&[("v2", 2), ("v4", 4), ("v8", 8)]).unwrap_or(1)
}

/// The elements of a vector operand, or the operand itself.
fn elements<'i, 'a>(op: &'i Operand<'a>, n: u32, written: &str) -> Result<&'i [Operand<'a>], Refusal> {
    let all = match op {
        Operand::Vector(all) => all.as_slice(),
        op => std::slice::from_ref(op),
    };
    if all.len() == n as usize {
        return Ok(all);
    }
    Err(invalid(format!("`{written}` needs {n} element{}", if n == 1 { "" } else { "s" })))
}

/// Checks the type and width of a load or store, and gives the bytes of one element.
fn element_bytes(ty: Type, n: u32, space: Space, written: &str) -> Result<u32, Refusal> {
    let plain = matches!(
        ty,
        Type::B8
            | Type::B16
            | Type::B32
            | Type::B64
            | Type::B128
            | Type::U8
            | Type::U16
            | Type::U32
            | Type::U64
            | Type::S8
            | Type::S16
            | Type::S32
            | Type::S64
            | Type::F32
            | Type::F64
    );
    if !plain {
        return Err(invalid(format!("`{written}`: {ty} is no type of memory")));
    }
    let bytes = ty.bytes();
    let wide = bytes * n == 32 && (4..=8).contains(&bytes) && matches!(space, Space::Global);
    if bytes * n > 16 && !wide {
        return Err(invalid(format!("`{written}` is wider than 16 bytes")));
    }
    Ok(bytes)
}

/// The counter class of an access.
fn class(space: Space) -> Class {
    match space {
        Space::Generic | Space::Global => Class::Global,
        Space::Shared => Class::Shared,
        Space::Local => Class::Local,
        Space::Const | Space::Param => Class::Constant,
    }
}

impl Decoder<'_, '_> {
    /// Notes what the core must know of an access: it may touch shared memory in pieces of `bytes`, and a strong
    /// one may see how far other blocks are.
    pub(crate) fn note_access(&mut self, space: Space, bytes: u32, waits: bool) {
        if matches!(space, Space::Shared | Space::Generic) {
            self.shared_grain = self.shared_grain.min(bytes);
        }
        self.ordered |= waits && matches!(space, Space::Global | Space::Generic);
    }
}

// ------------------------------------------------------------------------------------------------------- loads

/// How a value of memory fills a register.
#[derive(Clone, Copy, Debug)]
struct Extend {
    signed: bool,
    /// The bits that the register has.
    keep: u64,
}

/// `ld`: sources: the address; destinations: the elements.
#[derive(Debug)]
struct Load {
    space: Space,
    /// Bytes of an element.
    bytes: u32,
    access: Access,
    offset: i64,
    extend: Box<[Extend]>,
}

fn load(d: &mut Decoder<'_, '_>, inst: &Instruction<'_>) -> Result<(), Refusal> {
    let mut mods = Mods::new(inst);
    let written = mods.written();
    let order = order(&mut mods, "acquire")?;
    let space = space(&mut mods);
    mods.take("nc");
    cache_hints(&mut mods, &[("ca", ()), ("cg", ()), ("cs", ()), ("lu", ()), ("cv", ())]);
    let ops = without_policy(d, &mut mods, &inst.operands)?;
    let n = vector(&mut mods);
    let ty = mods.ty()?;
    mods.finish()?;
    if inst.opcode == "ldu" && !matches!(space, Space::Global | Space::Generic) {
        return Err(invalid(format!("`{written}`: ldu reads global memory")));
    }
    let [to, from] = ops else {
        return Err(invalid(format!("`{written}` takes a destination and an address")));
    };
    let bytes = element_bytes(ty, n, space, &written)?;
    let mut dsts = Vec::new();
    let mut extend = Vec::new();
    for op in elements(to, n, &written)? {
        dsts.push(d.dst_wide(op, ty)?);
        let bits = match op {
            Operand::Name(name, _) => d.register(name)?.1.bits(),
            _ => 64,
        };
        extend.push(Extend { signed: ty.is_signed(), keep: u64::MAX >> (64 - bits.clamp(1, 64)) });
    }
    let address = d.address(from, space)?;
    d.note_access(space, bytes * n, order.strong);
    let access = Access { size: u64::from(bytes * n), act: Act::Read, order };
    let op = Load { space, bytes, access, offset: address.offset, extend: extend.into() };
    d.warp(op, class(space), &dsts, &[address.base]);
    Ok(())
}

/// How a load or store is ordered; `stronger` is what it may be beyond relaxed: `acquire` or `release`.
fn order(mods: &mut Mods<'_, '_>, stronger: &str) -> Result<Order, Refusal> {
    let weak = Order::default();
    if mods.take("volatile") {
        return Ok(Order { strong: true, gpu: true, ..weak });
    }
    let Some(strongest) = mods.one_of(&[("relaxed", false), (stronger, true)]) else {
        mods.take("weak");
        return Ok(weak);
    };
    let gpu = scope(mods).ok_or_else(|| invalid(format!("`{}` without a scope", mods.written())))?;
    let [acquire, release] = ["acquire", "release"].map(|name| strongest && name == stronger);
    Ok(Order { strong: true, acquire, release, gpu })
}

/// Puts loaded values into a register.
#[inline(always)]
fn put<T: Cell>(regs: &mut Registers, reg: Reg, extend: Extend, mask: u32, values: &[T; LANES]) {
    match reg.width {
        Width::None | Width::Pred => {}
        Width::B16 | Width::B32 => {
            let mut row = [0; LANES];
            if extend.signed {
                for i in 0..LANES {
                    row[i] = values[i].signed() as u32 & extend.keep as u32;
                }
            } else {
                for i in 0..LANES {
                    row[i] = values[i].low();
                }
            }
            regs.set::<u32>(reg, mask, &row);
        }
        Width::B64 => {
            let mut row = [0; LANES];
            for i in 0..LANES {
                row[i] = if extend.signed { values[i].signed() } else { values[i].wide() };
            }
            regs.set::<u64>(reg, mask, &row);
        }
        Width::B128 => {
            let mut row = [0; LANES];
            for i in 0..LANES {
                row[i] = if extend.signed { values[i].signed() as i64 as u128 } else { values[i].full() };
            }
            regs.set::<u128>(reg, mask, &row);
        }
    }
}

/// The values of the lanes of `mask`, 0 for others.
#[inline(always)]
fn gather<T: Cell>(mask: u32, f: impl Fn(usize) -> T) -> [T; LANES] {
    let mut values = [T::default(); LANES];
    if mask == u32::MAX {
        for (lane, value) in values.iter_mut().enumerate() {
            *value = f(lane);
        }
    } else {
        for lane in lanes(mask) {
            values[lane] = f(lane);
        }
    }
    values
}

impl Load {
    fn run<T: Cell>(
        &self,
        ctx: &mut Context<'_>,
        inst: &Inst,
        mask: u32,
        space: Space,
        at: &[u64; LANES],
    ) -> Result<(), Stop> {
        let step = T::BYTES as u64;
        match space {
            Space::Global => {
                let mut span = ctx.begin_global(mask, at, &self.access)?;
                let mut rest = mask;
                loop {
                    let part = ctx.global_part(rest, at, &span, &self.access)?;
                    self.global::<T>(ctx, inst, &part, at);
                    rest &= !part.lanes;
                    if rest == 0 {
                        break;
                    }
                    span = part.rest(rest, at, self.access.size);
                }
                return Ok(());
            }
            Space::Shared => {
                let span = ctx.check_shared(mask, at, &self.access, |_, _, _| true)?;
                let dense = span.run && mask == u32::MAX;
                let all = dense
                    && ctx.launch.checks.init
                    && ctx.block.shared.all_written(span.first, self.access.size * LANES as u64);
                for (k, extend) in self.extend.iter().enumerate() {
                    let skip = k as u64 * step;
                    let shared = &ctx.block.shared;
                    let values = if dense {
                        shared.read_run::<T>(span.first + skip, self.extend.len())
                    } else {
                        gather::<T>(mask, |lane| shared.read(at[lane] + skip))
                    };
                    let defined = if all { mask } else { ctx.written_shared(mask, at, skip, step) };
                    put(ctx.regs(), inst.dst(k), *extend, mask, &values);
                    ctx.regs().set_defined(inst.dst(k), mask, defined);
                    let shared = &ctx.block.shared;
                    let written = |lane: usize, i| shared.is_written(at[lane] + skip + i, 1);
                    note_bytes(&mut ctx.warp.regs, inst.dst(k), mask & !defined, step, written);
                }
            }
            Space::Local => {
                ctx.check_local(mask, at, self.access.size)?;
                for (k, extend) in self.extend.iter().enumerate() {
                    let skip = k as u64 * step;
                    let values = gather::<T>(mask, |lane| ctx.warp.local.read(at[lane] + skip, lane));
                    let defined = pick(mask, |lane| ctx.warp.local.defined(at[lane] + skip, step, lane));
                    put(ctx.regs(), inst.dst(k), *extend, mask, &values);
                    ctx.regs().set_defined(inst.dst(k), mask, defined);
                    let local = &ctx.warp.local;
                    let written = |lane: usize, i| local.defined(at[lane] + skip + i, 1, lane);
                    note_bytes(&mut ctx.warp.regs, inst.dst(k), mask & !defined, step, written);
                }
            }
            _ => {
                let bank = ctx.check_bank(mask, at, &self.access, space)?;
                for (k, extend) in self.extend.iter().enumerate() {
                    let skip = k * T::BYTES;
                    let values = gather(mask, |lane| {
                        let at = at[lane] as usize + skip;
                        T::from_bytes(&bank[at..at + T::BYTES])
                    });
                    put(ctx.regs(), inst.dst(k), *extend, mask, &values);
                    ctx.regs().set_defined(inst.dst(k), mask, mask);
                }
            }
        }
        Ok(())
    }

    #[inline(always)]
    fn global<T: Cell>(&self, ctx: &mut Context<'_>, inst: &Inst, part: &Part<'_>, at: &[u64; LANES]) {
        let step = T::BYTES as u64;
        let init = ctx.launch.checks.init;
        for (k, extend) in self.extend.iter().enumerate() {
            let skip = k as u64 * step;
            let data = &part.allocation.data;
            let values = match part.dense() {
                Some(first) => T::load_run(data, first + skip as usize, self.extend.len()),
                None => gather(part.lanes, |lane| T::load(data, (part.offset(at[lane]) + skip) as usize)),
            };
            let defined = if init { part.written(at, skip, step) } else { part.lanes };
            put(ctx.regs(), inst.dst(k), *extend, part.lanes, &values);
            ctx.regs().set_defined(inst.dst(k), part.lanes, defined);
            let written = |lane: usize, i| part.allocation.is_written(part.offset(at[lane]) + skip + i, 1);
            note_bytes(&mut ctx.warp.regs, inst.dst(k), part.lanes & !defined, step, written);
        }
    }
}

/// Notes which bytes of a loaded register are written, in the lanes where not all are. A register without any is plainly
/// undefined.
#[inline(always)]
fn note_bytes(
    regs: &mut Registers,
    reg: Reg,
    lanes_in: u32,
    bytes: u64,
    written: impl Fn(usize, u64) -> bool,
) {
    for lane in lanes(lanes_in) {
        let bits = (0..bytes).filter(|i| written(lane, *i)).fold(0, |all, i| all | 1 << i);
        regs.set_written_bytes(reg, lane, bits);
    }
}

/// The bytes of a register that are written, in those lanes of `mask` in which only some are.
fn written_in_part(regs: &Registers, reg: Reg, mask: u32) -> Vec<(usize, u16)> {
    if !regs.any_partly() {
        return Vec::new();
    }
    let undefined = lanes(mask & !regs.defined(reg)).map(|lane| (lane, regs.written_bytes(reg, lane)));
    undefined.filter(|(_, bytes)| *bytes != 0).collect()
}

/// Calls `$f::<T>` with the cell type of `$bytes` bytes.
macro_rules! by_bytes {
    ($bytes:expr, $self:ident.$f:ident($($arg:expr),*)) => {
        match $bytes {
            1 => $self.$f::<u8>($($arg),*),
            2 => $self.$f::<u16>($($arg),*),
            4 => $self.$f::<u32>($($arg),*),
            8 => $self.$f::<u64>($($arg),*),
            _ => $self.$f::<u128>($($arg),*),
        }
    };
}

impl WarpOp for Load {
    fn execute(&self, ctx: &mut Context<'_>, inst: &Inst, mask: u32) -> Result<(), Stop> {
        let at = ctx.addresses(mask, inst.src(0), self.offset);
        each_space(self.space, mask, &at, |space, mask, at| {
            by_bytes!(self.bytes, self.run(ctx, inst, mask, space, at))
        })
    }
}

/// Calls `f` with the lanes that each space concerns, and their addresses in it.
#[inline(always)]
pub(crate) fn each_space(
    space: Space,
    mask: u32,
    at: &[u64; LANES],
    mut f: impl FnMut(Space, u32, &[u64; LANES]) -> Result<(), Stop>,
) -> Result<(), Stop> {
    // Parameters are addressed generically: a kernel's lie in their bank, a call's in local memory.
    if !matches!(space, Space::Generic | Space::Param) {
        return f(space, mask, at);
    }
    for (space, part) in by_space(mask, at) {
        if part == 0 {
            continue;
        }
        if space == Space::Global {
            f(space, part, at)?;
        } else {
            f(space, part, &in_window(at))?;
        }
    }
    Ok(())
}

// ------------------------------------------------------------------------------------------------------- stores

/// `st`: sources: the address, then the elements.
#[derive(Debug)]
struct Store {
    space: Space,
    bytes: u32,
    access: Access,
    offset: i64,
}

fn store(d: &mut Decoder<'_, '_>, inst: &Instruction<'_>) -> Result<(), Refusal> {
    let mut mods = Mods::new(inst);
    let written = mods.written();
    let order = order(&mut mods, "release")?;
    let space = space(&mut mods);
    if space == Space::Const {
        return Err(invalid(format!("`{written}`: constants cannot be written")));
    }
    cache_hints(&mut mods, &[("wb", ()), ("cg", ()), ("cs", ()), ("wt", ())]);
    let ops = without_policy(d, &mut mods, &inst.operands)?;
    let n = vector(&mut mods);
    let ty = mods.ty()?;
    mods.finish()?;
    let [to, from] = ops else {
        return Err(invalid(format!("`{written}` takes an address and a value")));
    };
    let bytes = element_bytes(ty, n, space, &written)?;
    let address = d.address(to, space)?;
    let mut srcs = vec![address.base];
    for op in elements(from, n, &written)? {
        if matches!(op, Operand::Sink) {
            return Err(invalid(format!("`{written}`: `_` is no value")));
        }
        srcs.push(d.src_wide(op, ty)?);
    }
    // A store alone does not wait, but it may be what another block waits for: that one's load counts.
    d.note_access(space, bytes * n, false);
    let access = Access { size: u64::from(bytes * n), act: Act::Write, order };
    d.warp(Store { space, bytes, access, offset: address.offset }, class(space), &[], &srcs);
    Ok(())
}

/// The lanes of a register as values of memory.
#[inline(always)]
pub(crate) fn values<T: Cell>(regs: &Registers, reg: Reg) -> [T; LANES] {
    match reg.width {
        Width::None | Width::Pred => [T::default(); LANES],
        Width::B16 | Width::B32 => regs.get::<u32>(reg).map(|v| T::cut(u64::from(v))),
        Width::B64 => regs.get::<u64>(reg).map(T::cut),
        Width::B128 => regs.get::<u128>(reg).map(T::cut_full),
    }
}

impl Store {
    fn run<T: Cell>(
        &self,
        ctx: &mut Context<'_>,
        inst: &Inst,
        mask: u32,
        space: Space,
        at: &[u64; LANES],
    ) -> Result<(), Stop> {
        let step = T::BYTES as u64;
        let elements = &inst.srcs()[1..];
        match space {
            Space::Global => {
                for reg in elements {
                    // Gaps of a structure may be stored, too; they stay unwritten there.
                    let partly = written_in_part(&ctx.warp.regs, *reg, mask);
                    let mask = partly.iter().fold(mask, |mask, (lane, _)| mask & !(1 << lane));
                    ctx.need_defined(mask, *reg, "the value stored to global memory");
                }
                let mut span = ctx.begin_global(mask, at, &self.access)?;
                let mut rest = mask;
                loop {
                    let part = ctx.global_part(rest, at, &span, &self.access)?;
                    for (k, reg) in elements.iter().enumerate() {
                        let values = values::<T>(&ctx.warp.regs, *reg);
                        let skip = k as u64 * step;
                        let data = &part.allocation.data;
                        if let Some(first) = part.dense() {
                            T::store_run(&values, data, first + skip as usize, elements.len());
                        } else {
                            for lane in lanes(part.lanes) {
                                values[lane].store(data, (part.offset(at[lane]) + skip) as usize);
                            }
                        }
                    }
                    part.set_written(at, self.access.size);
                    for (k, reg) in elements.iter().enumerate() {
                        for (lane, bytes) in written_in_part(&ctx.warp.regs, *reg, part.lanes) {
                            let at = part.offset(at[lane]) + k as u64 * step;
                            let gaps = (0..step).filter(|i| bytes >> i & 1 == 0);
                            gaps.for_each(|i| part.allocation.forget(at + i, 1));
                        }
                    }
                    rest &= !part.lanes;
                    if rest == 0 {
                        break;
                    }
                    span = part.rest(rest, at, self.access.size);
                }
            }
            Space::Shared => {
                let same = |regs: &Registers, a: usize, b: usize| {
                    elements.iter().all(|reg| {
                        let values = values::<T>(regs, *reg);
                        values[a] == values[b]
                    })
                };
                ctx.check_shared(mask, at, &self.access, same)?;
                for (k, reg) in elements.iter().enumerate() {
                    let values = values::<T>(&ctx.warp.regs, *reg);
                    let skip = k as u64 * step;
                    for lane in lanes(mask) {
                        ctx.block.shared.write(at[lane] + skip, values[lane]);
                    }
                    let defined = ctx.warp.regs.defined(*reg);
                    ctx.set_written_shared(mask, at, skip, step, defined);
                    for (lane, bytes) in written_in_part(&ctx.warp.regs, *reg, mask) {
                        let here = (0..step).filter(|i| bytes >> i & 1 != 0);
                        here.for_each(|i| ctx.block.shared.set_written(at[lane] + skip + i, 1, true));
                    }
                }
            }
            Space::Local => {
                ctx.check_local(mask, at, self.access.size)?;
                for (k, reg) in elements.iter().enumerate() {
                    let values = values::<T>(&ctx.warp.regs, *reg);
                    let defined = ctx.warp.regs.defined(*reg);
                    for lane in lanes(mask) {
                        let at = at[lane] + k as u64 * step;
                        ctx.warp.local.write(at, lane, values[lane], defined >> lane & 1 != 0);
                    }
                    for (lane, bytes) in written_in_part(&ctx.warp.regs, *reg, mask) {
                        for i in (0..step).filter(|i| bytes >> i & 1 != 0) {
                            let at = at[lane] + k as u64 * step + i;
                            let byte = ctx.warp.local.read::<u8>(at, lane);
                            ctx.warp.local.write(at, lane, byte, true);
                        }
                    }
                }
            }
            _ => {
                ctx.check_bank(mask, at, &self.access, space)?;
            }
        }
        Ok(())
    }
}

impl WarpOp for Store {
    fn execute(&self, ctx: &mut Context<'_>, inst: &Inst, mask: u32) -> Result<(), Stop> {
        let at = ctx.addresses(mask, inst.src(0), self.offset);
        each_space(self.space, mask, &at, |space, mask, at| {
            by_bytes!(self.bytes, self.run(ctx, inst, mask, space, at))
        })
    }
}

// ------------------------------------------------------------------------------------------------------- addresses

/// d = a + imm
struct Shift;

impl Unary for Shift {
    type A = u64;
    type D = u64;
    fn eval(imm: u64, a: u64) -> u64 {
        a.wrapping_add(imm)
    }
}

fn cvta(d: &mut Decoder<'_, '_>, inst: &Instruction<'_>) -> Result<(), Refusal> {
    let mut mods = Mods::new(inst);
    let written = mods.written();
    let to = mods.take("to");
    let space = space(&mut mods);
    let ty = mods.ty()?;
    mods.finish()?;
    if space == Space::Generic {
        return Err(invalid(format!("`{written}` names no space")));
    }
    if ty == Type::U32 {
        return Err(unsupported(format!("`{written}`: addresses of 32 bits")));
    }
    if ty != Type::U64 {
        return Err(invalid(format!("`{written}`: an address has type .u64")));
    }
    let [dst, src] = operands(inst)?;
    let dst = d.dst(dst, Type::U64)?;
    let src = d.src(src, Type::U64)?;
    // Addresses of parameters are generic from the beginning.
    let base = if space == Space::Param { 0 } else { window(space) };
    let imm = if to { base.wrapping_neg() } else { base };
    d.lane(unary::<Shift>(d.isa), Class::Integer, &[dst], &[src], imm);
    Ok(())
}

/// `isspacep`: destination a predicate, source the address.
#[derive(Debug)]
struct IsSpace(Space);

fn isspacep(d: &mut Decoder<'_, '_>, inst: &Instruction<'_>) -> Result<(), Refusal> {
    let mut mods = Mods::new(inst);
    let space = space(&mut mods);
    mods.finish()?;
    if space == Space::Generic {
        return Err(invalid("`isspacep` names no space"));
    }
    let [dst, src] = operands(inst)?;
    let dst = d.dst(dst, Type::Pred)?;
    let src = d.src(src, Type::U64)?;
    d.warp(IsSpace(space), Class::Integer, &[dst], &[src]);
    Ok(())
}

impl WarpOp for IsSpace {
    fn execute(&self, ctx: &mut Context<'_>, inst: &Inst, mask: u32) -> Result<(), Stop> {
        let at = ctx.regs().get::<u64>(inst.src(0));
        let parts = by_space(mask, at);
        let hit = parts.iter().find(|(space, _)| *space == self.0).map_or(0, |(_, lanes)| *lanes);
        let defined = ctx.regs().defined(inst.src(0));
        ctx.regs().set_pred(inst.dst(0), mask, hit);
        ctx.regs().set_defined(inst.dst(0), mask, defined);
        Ok(())
    }
}

// ------------------------------------------------------------------------------------------------------- hints

/// Prefetches and priorities change nothing but speed; only their address is looked at.
#[derive(Debug)]
struct Hint;

fn hint(d: &mut Decoder<'_, '_>, inst: &Instruction<'_>) -> Result<(), Refusal> {
    let mut mods = Mods::new(inst);
    let written = mods.written();
    let space = space(&mut mods);
    if !matches!(space, Space::Generic | Space::Global | Space::Local) {
        return Err(unsupported(format!("`{written}`")));
    }
    let ops = match inst.opcode {
        "applypriority" => {
            if !mods.take("L2::evict_normal") {
                return Err(invalid(format!("`{written}` names no priority")));
            }
            let [at, size] = operands(inst)?;
            if *size != Operand::Integer(128) {
                return Err(invalid(format!("`{written}` takes 128 bytes")));
            }
            std::slice::from_ref(at)
        }
        "prefetchu" => {
            if !mods.take("L1") {
                return Err(invalid(format!("`{written}` names no cache level")));
            }
            operands::<1>(inst)?
        }
        _ => {
            let levels = [("L1", ()), ("L2", ()), ("L2::evict_last", ()), ("L2::evict_normal", ())];
            if mods.one_of(&levels).is_none() {
                return Err(unsupported(format!("`{written}` names no cache level")));
            }
            operands::<1>(inst)?
        }
    };
    mods.finish()?;
    let address = d.address(&ops[0], space)?;
    d.warp(Hint, class(space), &[], &[address.base]);
    Ok(())
}

impl WarpOp for Hint {
    fn execute(&self, ctx: &mut Context<'_>, inst: &Inst, mask: u32) -> Result<(), Stop> {
        ctx.need_defined(mask, inst.src(0), "the address");
        Ok(())
    }
}

/// `discard`: 128 bytes lose their contents.
#[derive(Debug)]
struct Discard {
    offset: i64,
}

fn discard(d: &mut Decoder<'_, '_>, inst: &Instruction<'_>) -> Result<(), Refusal> {
    let mut mods = Mods::new(inst);
    let written = mods.written();
    let space = space(&mut mods);
    if !mods.take("L2") || !matches!(space, Space::Generic | Space::Global) {
        return Err(invalid(format!("`{written}` discards global memory from L2")));
    }
    mods.finish()?;
    let [at, size] = operands(inst)?;
    if *size != Operand::Integer(128) {
        return Err(invalid(format!("`{written}` takes 128 bytes")));
    }
    let address = d.address(at, space)?;
    d.warp(Discard { offset: address.offset }, Class::Global, &[], &[address.base]);
    Ok(())
}

impl WarpOp for Discard {
    fn execute(&self, ctx: &mut Context<'_>, inst: &Inst, mask: u32) -> Result<(), Stop> {
        let at = ctx.addresses(mask, inst.src(0), self.offset);
        let access = Access::write(128);
        let mut rest = mask;
        let mut span = ctx.begin_global(mask, &at, &access)?;
        while rest != 0 {
            let part = ctx.global_part(rest, &at, &span, &access)?;
            // What the bytes hold from now on is undefined; they keep their values here, but count as never written.
            lanes(part.lanes).for_each(|lane| part.allocation.forget(part.offset(at[lane]), 128));
            rest &= !part.lanes;
            span = part.rest(rest, &at, access.size);
        }
        Ok(())
    }
}

// ------------------------------------------------------------------------------------------------------- fences

/// `fence` and `membar`.
#[derive(Debug)]
struct Fence {
    /// Whether other blocks are meant.
    gpu: bool,
}

fn fence(d: &mut Decoder<'_, '_>, inst: &Instruction<'_>) -> Result<(), Refusal> {
    let mut mods = Mods::new(inst);
    let written = mods.written();
    let missing = || invalid(format!("`{written}` names no scope"));
    operands::<0>(inst)?;
    let gpu = if inst.opcode == "membar" {
        mods.one_of(&[("cta", false), ("gl", true), ("sys", true)]).ok_or_else(missing)?
    } else if mods.one_of(&[("proxy", ())]).is_some() {
        // All accesses that this machine has go through one proxy, so nothing is to be ordered.
        let proxies = ["alias", "async", "async.global", "async.shared::cta"];
        let rest: Vec<_> = std::iter::from_fn(|| mods.any()).collect();
        if !proxies.contains(&rest.join(".").as_str()) {
            return Err(unsupported(format!("`{written}`")));
        }
        return Ok(());
    } else {
        mods.one_of(&[("sc", ()), ("acq_rel", ()), ("acquire", ()), ("release", ())]);
        scope(&mut mods).ok_or_else(missing)?
    };
    mods.finish()?;
    d.warp(Fence { gpu }, Class::Sync, &[], &[]);
    Ok(())
}

impl WarpOp for Fence {
    fn execute(&self, ctx: &mut Context<'_>, _inst: &Inst, _mask: u32) -> Result<(), Stop> {
        if ctx.launch.checks.race {
            ctx.block.clocks.fence(ctx.warp.id);
            if self.gpu {
                Releases::fence(&mut ctx.block.clocks.block);
            }
        }
        std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
        Ok(())
    }
}

// ------------------------------------------------------------------------------------------------------- policies

/// `createpolicy`: a value that only cache hints read. It is the same for all policies.
#[derive(Debug)]
struct Policy;

fn createpolicy(d: &mut Decoder<'_, '_>, inst: &Instruction<'_>) -> Result<(), Refusal> {
    let mut mods = Mods::new(inst);
    let written = mods.written();
    let primary = [
        ("L2::evict_last", ()),
        ("L2::evict_normal", ()),
        ("L2::evict_first", ()),
        ("L2::evict_unchanged", ()),
    ];
    let kind = mods.one_of(&[("fractional", 1), ("range", 3), ("cvt", 1)]);
    let kind = kind.ok_or_else(|| invalid(format!("`{written}` names no kind of policy")))?;
    if !mods.take("L2") {
        mods.one_of(&primary).ok_or_else(|| invalid(format!("`{written}` names no priority")))?;
        // A fraction of the accesses may have a second priority.
        mods.one_of(&primary);
    }
    if kind == 3 {
        mods.take("global");
    }
    let ty = mods.ty()?;
    mods.finish()?;
    if ty != Type::B64 {
        return Err(invalid(format!("`{written}`: a policy has type .b64")));
    }
    let [dst, srcs @ ..] = inst.operands.as_slice() else {
        return Err(invalid(format!("`{written}` has no operands")));
    };
    if srcs.len() > kind {
        return Err(invalid(format!("`{written}` has too many operands")));
    }
    let dst = d.dst(dst, Type::B64)?;
    d.warp(Policy, Class::Integer, &[dst], &[]);
    Ok(())
}

impl WarpOp for Policy {
    fn execute(&self, ctx: &mut Context<'_>, inst: &Inst, mask: u32) -> Result<(), Stop> {
        ctx.regs().set::<u64>(inst.dst(0), mask, &[0x10f0_0000_0000_0000; LANES]);
        ctx.regs().set_defined(inst.dst(0), mask, mask);
        Ok(())
    }
}
