//! `ld` and `ldu`.

use super::address::parameter;
use super::operands::{
    by_bytes, cache_hints, class, each_space, element_bytes, elements, order, remote, space, vector,
    without_policy,
};
use crate::decode::decoder::Decoder;
use crate::decode::mods::Mods;
use crate::decode::{Refusal, invalid};
use crate::machine::context::{Context, Stop};
use crate::machine::inst::{Inst, WarpOp};
use crate::machine::layout::PARAM_WINDOW;
use crate::machine::memory::access::{Access, Act, Part};
use crate::machine::memory::buffer::Cell;
use crate::machine::memory::{lanes, pick};
use crate::machine::registers::{Bytes, LANES, Reg, Registers, Width};
use crate::ptx::ast::{Instruction, Operand};
use crate::types::Space;

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
    /// The window of the parameters, where the address is a register's; otherwise 0.
    parameters: u64,
    /// Whether it may reach the shared memory of other blocks.
    remote: bool,
    /// Bytes of an element.
    bytes: u32,
    access: Access,
    offset: i64,
    extend: Box<[Extend]>,
}

pub(super) fn load(d: &mut Decoder<'_, '_>, inst: &Instruction<'_>) -> Result<(), Refusal> {
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
    let access = Access { size: u64::from(bytes * n), act: Act::Read, order };
    let at = if space == Space::Param { d.in_bank(from) } else { None };
    if let Some(at) = at.filter(|at| at.is_multiple_of(access.size)) {
        d.warp(LoadParameter { at, bytes, access, extend: extend.into() }, class(space), &dsts, &[]);
        return Ok(());
    }
    let address = d.address(from, space)?;
    d.note_access(space, bytes * n, order.strong);
    let op = Load {
        space,
        parameters: match space == Space::Param && !d.is_constant(address.base) {
            true if inst.modifiers.contains(&"param::entry") => PARAM_WINDOW,
            true => d.parameters,
            false => 0,
        },
        remote: remote(inst, space),
        bytes,
        access,
        offset: address.offset,
        extend: extend.into(),
    };
    d.warp(op, class(space), &dsts, &[address.base]);
    Ok(())
}

/// `ld.param` of a kernel's parameter, which all lanes have in common. Destinations: the elements.
#[derive(Debug)]
struct LoadParameter {
    /// Where it lies in the parameter bank.
    at: u64,
    /// Bytes of an element.
    bytes: u32,
    access: Access,
    extend: Box<[Extend]>,
}

impl LoadParameter {
    #[inline(always)]
    fn run<T: Cell>(&self, ctx: &mut Context<'_>, inst: &Inst, mask: u32) -> Result<(), Stop> {
        let from = self.at as usize;
        let Some(elements) = ctx.launch.params.get(from..from + self.access.size as usize) else {
            return ctx.check_bank(mask, &[self.at; LANES], &self.access, Space::Param).map(|_| ());
        };
        for ((k, extend), element) in self.extend.iter().enumerate().zip(elements.chunks(T::BYTES)) {
            put(ctx.regs(), inst.dst(k), *extend, mask, &[T::from_bytes(element); LANES]);
            ctx.regs().set_defined(inst.dst(k), mask, mask);
        }
        Ok(())
    }
}

impl WarpOp for LoadParameter {
    fn execute(&self, ctx: &mut Context<'_>, inst: &Inst, mask: u32) -> Result<(), Stop> {
        by_bytes!(self.bytes, self.run(ctx, inst, mask))
    }
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
    /// Shared memory of blocks of a cluster, apart because the code of other kernels' accesses is then as short as without
    /// clusters.
    #[cold]
    fn in_cluster(
        &self,
        ctx: &mut Context<'_>,
        inst: &Inst,
        mask: u32,
        at: &[u64; LANES],
    ) -> Result<(), Stop> {
        ctx.each_block(mask, at, self.remote, |ctx, mask, at| {
            by_bytes!(self.bytes, self.run(ctx, inst, mask, Space::Shared, at))
        })
    }

    #[inline(always)]
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
                let span = ctx.check_shared(mask, at, &self.access, |_, _| None)?;
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
        regs.set_written_bytes(reg, lane, Bytes::new(bits));
    }
}

impl WarpOp for Load {
    fn execute(&self, ctx: &mut Context<'_>, inst: &Inst, mask: u32) -> Result<(), Stop> {
        let mut at = ctx.addresses(mask, inst.src(0), self.offset);
        if self.parameters != 0 {
            at = at.map(|at| parameter(self.parameters, at));
        }
        each_space(self.space, mask, &at, |space, mask, at| {
            if space == Space::Shared && ctx.block.cluster.is_some() {
                return self.in_cluster(ctx, inst, mask, at);
            }
            by_bytes!(self.bytes, self.run(ctx, inst, mask, space, at))
        })
    }
}
