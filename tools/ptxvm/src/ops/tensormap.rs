//! `tensormap.replace`, and the copy that publishes a changed map (`tensormap.cp_fenceproxy`).
//!
//! Kernels change maps in shared or global memory, field by field, or make them of 128 bytes of zeros. That copies see the change
//! needs a fence of the tensor-map proxy, which orders here as a fence of memory does.

use super::memory::operands::scope;
use crate::decode::decoder::{Decoder, operands};
use crate::decode::mods::Mods;
use crate::decode::{Refusal, invalid, unsupported};
use crate::error::ErrorKind;
use crate::machine::context::{Context, Stop};
use crate::machine::inst::{Class, Convergence, Inst, WarpOp};
use crate::machine::memory::access::Access;
use crate::machine::memory::lanes;
use crate::machine::memory::race::Releases;
use crate::machine::registers::{LANES, Reg};
use crate::machine::tensor_map::{Field, TENSOR_MAP_BYTES, TensorMap};
use crate::ptx::ast::{Instruction, Operand};
use crate::types::{Space, Type};

/// Decodes the instructions of this family.
///
/// # Errors
/// The instruction is wrong, or not built.
pub fn decode(d: &mut Decoder<'_, '_>, inst: &Instruction<'_>) -> Result<(), Refusal> {
    let mut mods = Mods::new(inst);
    let written = mods.written();
    if mods.take("cp_fenceproxy") {
        let rest: Vec<_> =
            ["global", "shared::cta", "tensormap::generic", "release", "sync", "aligned"].into();
        if !rest.iter().all(|name| mods.take(name)) {
            return Err(invalid(format!("`{written}` lacks a modifier")));
        }
        let gpu = scope(&mut mods).ok_or_else(|| invalid(format!("`{written}` names no scope")))?.gpu;
        mods.finish()?;
        let [to, from, Operand::Integer(128)] = operands(inst)? else {
            return Err(invalid(format!("`{written}` copies 128 bytes")));
        };
        let (to, from) = (d.address(to, Space::Global)?, d.address(from, Space::Shared)?);
        d.note_access(Space::Shared, 16, false);
        let op = Publish { to: to.offset, from: from.offset, gpu };
        d.warp(op, Class::Global, &[], &[to.base, from.base]).convergence = Convergence::All;
        return Ok(());
    }
    if !mods.take("replace") || !mods.take("tile") {
        return Err(unsupported(format!("`{written}`")));
    }
    let fields = [
        ("global_address", (Field::Address, false)),
        ("rank", (Field::Rank, false)),
        ("box_dim", (Field::Box, true)),
        ("global_dim", (Field::Dim, true)),
        ("global_stride", (Field::Stride, true)),
        ("element_stride", (Field::ElementStride, true)),
        ("elemtype", (Field::Type, false)),
        ("interleave_layout", (Field::Interleave, false)),
        ("swizzle_mode", (Field::Swizzle, false)),
        ("fill_mode", (Field::Fill, false)),
    ];
    let Some((field, numbered)) = mods.one_of(&fields) else {
        return Err(unsupported(format!("`{written}`: no field that is known")));
    };
    let space =
        mods.one_of(&[("global", Space::Global), ("shared::cta", Space::Shared)]).unwrap_or(Space::Generic);
    if !mods.take("b1024") {
        return Err(invalid(format!("`{written}`: a map has type .b1024")));
    }
    let wide = matches!(field, Field::Address | Field::Stride);
    let ty = mods.ty()?;
    mods.finish()?;
    if ty != if wide { Type::B64 } else { Type::B32 } || space == Space::Generic {
        return Err(invalid(format!("`{written}`: wrong type of the value, or no space")));
    }
    let (at, number, value) = match (numbered, inst.operands.as_slice()) {
        (true, [at, Operand::Integer(n @ 0..5), value]) => (at, *n as usize, value),
        (false, [at, value]) => (at, 0, value),
        _ => return Err(invalid(format!("`{written}`: wrong operands"))),
    };
    let at = d.address(at, space)?;
    let value = d.src(value, ty)?;
    d.note_access(space, 16, false);
    d.warp(Replace { field, number, space, offset: at.offset }, Class::Global, &[], &[at.base, value]);
    Ok(())
}

/// `tensormap.replace`: sources the map's address, and the new value.
#[derive(Debug)]
struct Replace {
    field: Field,
    /// Which dimension.
    number: usize,
    space: Space,
    offset: i64,
}

/// Refuses an address at which no map lies.
fn check_place(ctx: &Context<'_>, lane: usize, at: u64) -> Result<(), Stop> {
    if at.is_multiple_of(64) {
        return Ok(());
    }
    let message = format!("a tensor map at {at:#x}, no multiple of 64");
    Err(ctx.fault(ErrorKind::Misaligned, 1 << lane, message))
}

impl WarpOp for Replace {
    fn execute(&self, ctx: &mut Context<'_>, inst: &Inst, mask: u32) -> Result<(), Stop> {
        let at = ctx.addresses(mask, inst.src(0), self.offset);
        let reg: Reg = inst.src(1);
        ctx.need_defined(mask, reg, "the value that a tensor map gets");
        let wide = matches!(self.field, Field::Address | Field::Stride);
        let values: [u64; LANES] =
            if wide { *ctx.regs().get::<u64>(reg) } else { ctx.regs().get::<u32>(reg).map(u64::from) };
        let at = if self.space == Space::Shared { ctx.own_shared(mask, at)? } else { at };
        for lane in lanes(mask) {
            let (at, n) = (at[lane], TENSOR_MAP_BYTES as u64);
            check_place(ctx, lane, at)?;
            let mut bytes = [0; TENSOR_MAP_BYTES];
            let mut part = None;
            let written = if self.space == Space::Shared {
                ctx.shared_piece(lane, at, n, &Access::write(1))?;
                bytes.copy_from_slice(ctx.block.shared.bytes(at, n));
                ctx.block.shared.all_written(at, n)
            } else {
                let found = ctx.global_piece(lane, at, n, &Access::write(1))?;
                let offset = at - found.allocation.start;
                found.allocation.data.read(offset as usize, &mut bytes);
                part.insert(found).allocation.is_written(offset, n)
            };
            if !written && ctx.launch.checks.init {
                ctx.report_undefined(1 << lane, "a part of the tensor map");
            }
            let new = TensorMap::replace(&bytes, self.field, self.number, values[lane])
                .map_err(|e| ctx.fault(e.kind(), 1 << lane, format!("at {at:#x}: {e}")))?;
            match part {
                None => {
                    ctx.block.shared.bytes_mut(at, n).copy_from_slice(&new);
                    ctx.block.shared.set_all_written(at, n, true);
                }
                Some(part) => {
                    let offset = at - part.allocation.start;
                    part.allocation.data.write(offset as usize, &new);
                    part.allocation.set_written(offset, n);
                }
            }
        }
        Ok(())
    }
}

/// `tensormap.cp_fenceproxy`: sources where to, where from, the same in all lanes.
#[derive(Debug)]
struct Publish {
    to: i64,
    from: i64,
    gpu: bool,
}

impl WarpOp for Publish {
    fn execute(&self, ctx: &mut Context<'_>, inst: &Inst, mask: u32) -> Result<(), Stop> {
        let to = ctx.addresses(mask, inst.src(0), self.to);
        let from = ctx.addresses(mask, inst.src(1), self.from);
        let from = ctx.own_shared(mask, from)?;
        let lane = mask.trailing_zeros() as usize;
        let (to, from, n) = (to[lane], from[lane], TENSOR_MAP_BYTES as u64);
        check_place(ctx, lane, to)?;
        check_place(ctx, lane, from)?;
        ctx.shared_piece(lane, from, n, &Access::read(1))?;
        let bytes = ctx.block.shared.bytes(from, n).to_vec();
        let part = ctx.global_piece(lane, to, n, &Access::write(1))?;
        let offset = to - part.allocation.start;
        part.allocation.data.write(offset as usize, &bytes);
        part.allocation.set_written(offset, n);
        if ctx.launch.checks.race {
            ctx.block.clocks.fence(ctx.warp.id);
            if self.gpu {
                Releases::fence(&mut ctx.block.epochs);
            }
        }
        Ok(())
    }
}
