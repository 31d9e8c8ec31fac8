//! `st`.

use super::operands::{
    by_bytes, cache_hints, class, each_space, element_bytes, elements, order, remote, space, values, vector,
    without_policy, written_in_part,
};
use crate::decode::decoder::Decoder;
use crate::decode::mods::Mods;
use crate::decode::{Refusal, invalid};
use crate::machine::context::{Context, Stop};
use crate::machine::inst::{Inst, WarpOp};
use crate::machine::memory::access::{Access, Act, value};
use crate::machine::memory::buffer::Cell;
use crate::machine::memory::lanes;
use crate::machine::registers::{LANES, Registers};
use crate::ptx::ast::{Instruction, Operand};
use crate::types::Space;

/// `st`: sources: the address, then the elements.
#[derive(Debug)]
struct Store {
    space: Space,
    /// Whether it may reach the shared memory of other blocks.
    remote: bool,
    bytes: u32,
    access: Access,
    offset: i64,
}

pub(super) fn store(d: &mut Decoder<'_, '_>, inst: &Instruction<'_>) -> Result<(), Refusal> {
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
    // A store does not wait. Another block may wait for it, but then that block's load makes the kernel ordered.
    d.note_access(space, bytes * n, false);
    let access = Access { size: u64::from(bytes * n), act: Act::Write, order };
    d.warp(
        Store { space, remote: remote(inst, space), bytes, access, offset: address.offset },
        class(space),
        &[],
        &srcs,
    );
    Ok(())
}

impl Store {
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
        let elements = &inst.srcs()[1..];
        match space {
            Space::Global => {
                for reg in elements {
                    // Gaps of a structure may be stored, too; they stay unwritten there.
                    let partly = written_in_part(&ctx.warp.regs, *reg, step, mask);
                    let whole = partly.iter().filter(|(_, bytes)| !bytes.is_torn());
                    let mask = whole.fold(mask, |mask, (lane, _)| mask & !(1 << lane));
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
                        for (lane, bytes) in written_in_part(&ctx.warp.regs, *reg, step, part.lanes) {
                            let at = part.offset(at[lane]) + k as u64 * step;
                            let gaps = (0..step).filter(|i| !bytes.has(*i as u32));
                            gaps.for_each(|i| part.allocation.forget(at + i, 1));
                        }
                    }
                    ctx.settle_overwrites(&part, at, &self.access);
                    rest &= !part.lanes;
                    if rest == 0 {
                        break;
                    }
                    span = part.rest(rest, at, self.access.size);
                }
            }
            Space::Shared => {
                let value = |regs: &Registers, lane: usize| {
                    Some(value(elements.iter().map(|reg| values::<T>(regs, *reg)[lane])))
                };
                let span = ctx.check_shared(mask, at, &self.access, value)?;
                if let [reg] = elements
                    && span.run
                    && mask & ctx.warp.regs.defined(*reg) == u32::MAX
                {
                    let values = values::<T>(&ctx.warp.regs, *reg);
                    ctx.block.shared.write_run(span.first, &values);
                    if ctx.launch.checks.init {
                        ctx.block.shared.set_all_written(span.first, step * LANES as u64, true);
                    }
                    return Ok(());
                }
                for (k, reg) in elements.iter().enumerate() {
                    let values = values::<T>(&ctx.warp.regs, *reg);
                    let skip = k as u64 * step;
                    for lane in lanes(mask) {
                        ctx.block.shared.write(at[lane] + skip, values[lane]);
                    }
                    let defined = ctx.warp.regs.defined(*reg);
                    ctx.set_written_shared(mask, at, skip, step, defined);
                    for (lane, bytes) in written_in_part(&ctx.warp.regs, *reg, step, mask) {
                        let here = (0..step).filter(|i| bytes.has(*i as u32));
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
                    for (lane, bytes) in written_in_part(&ctx.warp.regs, *reg, step, mask) {
                        for i in (0..step).filter(|i| bytes.has(*i as u32)) {
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
            if space == Space::Shared && ctx.block.cluster.is_some() {
                return self.in_cluster(ctx, inst, mask, at);
            }
            by_bytes!(self.bytes, self.run(ctx, inst, mask, space, at))
        })
    }
}
