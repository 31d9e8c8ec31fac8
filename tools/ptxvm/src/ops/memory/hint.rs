//! Advice for caches: `prefetch`, `applypriority`, `discard`, `createpolicy`.

use super::operands::{class, space};
use crate::decode::decoder::{Decoder, operands};
use crate::decode::mods::Mods;
use crate::decode::{Refusal, invalid, unsupported};
use crate::machine::context::{Context, Stop};
use crate::machine::inst::{Class, Inst, WarpOp};
use crate::machine::memory::access::Access;
use crate::machine::memory::lanes;
use crate::machine::registers::LANES;
use crate::ptx::ast::{Instruction, Operand};
use crate::types::{Space, Type};

/// Prefetches and priorities change nothing but speed; only their address is looked at.
#[derive(Debug)]
struct Hint;

pub(super) fn hint(d: &mut Decoder<'_, '_>, inst: &Instruction<'_>) -> Result<(), Refusal> {
    let mut mods = Mods::new(inst);
    let written = mods.written();
    let space = space(&mut mods);
    // Of a tensor map, which may be a kernel's parameter.
    let map = inst.opcode == "prefetch" && mods.take("tensormap");
    let known = if map {
        matches!(space, Space::Generic | Space::Const | Space::Param)
    } else {
        matches!(space, Space::Generic | Space::Global | Space::Local)
    };
    if !known {
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
        _ if map => operands::<1>(inst)?,
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

pub(super) fn discard(d: &mut Decoder<'_, '_>, inst: &Instruction<'_>) -> Result<(), Refusal> {
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
            // The contents are undefined from now on. The bytes keep their values here, but count as uninitialised.
            lanes(part.lanes).for_each(|lane| part.allocation.forget(part.offset(at[lane]), 128));
            rest &= !part.lanes;
            span = part.rest(rest, &at, access.size);
        }
        Ok(())
    }
}

/// `createpolicy`: a value that only cache hints read. It is the same for all policies.
#[derive(Debug)]
struct Policy;

pub(super) fn createpolicy(d: &mut Decoder<'_, '_>, inst: &Instruction<'_>) -> Result<(), Refusal> {
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
        // The accesses outside the fraction may have a priority of their own.
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
