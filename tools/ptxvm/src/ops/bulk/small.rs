//! `st.async` and `red.async`: a few bytes of registers that arrive in shared memory with an mbarrier's count.

use super::common::{Direction, shared_address, target};
use super::reduce;
use crate::decode::decoder::{Decoder, operands};
use crate::decode::mods::Mods;
use crate::decode::{Refusal, invalid, unsupported};
use crate::machine::bulk::{Bulk, Reduction, Run, Way};
use crate::machine::context::{Context, Stop};
use crate::machine::inst::{Class, Inst, WarpOp};
use crate::machine::memory::lanes;
use crate::ptx::ast::{Instruction, Operand};
use crate::types::{Space, Type};

/// Decodes the instructions.
///
/// # Errors
/// The instruction is wrong, or not built.
pub(crate) fn decode(d: &mut Decoder<'_, '_>, inst: &Instruction<'_>) -> Result<(), Refusal> {
    let mut mods = Mods::new(inst);
    let written = mods.written();
    mods.take("async");
    let reduces = inst.opcode == "red";
    if reduces {
        mods.take("relaxed");
        mods.take("cluster");
    } else {
        mods.take("weak");
    }
    if !mods.take("mbarrier::complete_tx::bytes") {
        return Err(unsupported(format!("`{written}`: without an mbarrier")));
    }
    mods.take("shared::cluster");
    let n = mods.one_of(&[("v2", 2), ("v4", 4)]).unwrap_or(1);
    let (ty, reduction) = if reduces {
        let operation = reduce::operation(&mut mods, &written)?;
        let ty = inst.modifiers.last().and_then(|m| Type::from_name(m)).unwrap_or(Type::B8);
        (ty, Some(reduce::typed(operation, &mut mods, Direction::Within, &written)?.reduction))
    } else {
        (mods.ty()?, None)
    };
    mods.finish()?;
    if !matches!(ty.bytes(), 4 | 8) || ty.bytes() * n > 16 || reduces && n > 1 {
        return Err(invalid(format!("`{written}`: no such type or vector")));
    }
    let [to, value, mbarrier] = operands(inst)?;
    let elements = match value {
        Operand::Vector(all) => all.as_slice(),
        one => std::slice::from_ref(one),
    };
    if elements.len() != n as usize {
        return Err(invalid(format!("`{written}` needs {n} elements")));
    }
    let (to, mbarrier) = (d.address(to, Space::Shared)?, shared_address(d, Some(mbarrier))?);
    d.note_access(Space::Shared, ty.bytes(), false);
    d.asynchronous = true;
    let mut srcs = vec![to.base, mbarrier.base];
    for op in elements {
        srcs.push(d.src(op, ty)?);
    }
    let op = Small { bytes: ty.bytes() as usize, to: to.offset, mbarrier: mbarrier.offset, reduction };
    d.warp(op, Class::Shared, &[], &srcs);
    Ok(())
}

/// Sources: where to, the mbarrier, the elements.
#[derive(Debug)]
struct Small {
    /// Bytes of an element.
    bytes: usize,
    to: i64,
    mbarrier: i64,
    reduction: Option<Reduction>,
}

impl WarpOp for Small {
    fn execute(&self, ctx: &mut Context<'_>, inst: &Inst, mask: u32) -> Result<(), Stop> {
        let to = ctx.addresses(mask, inst.src(0), self.to);
        let mbarrier = ctx.addresses(mask, inst.src(1), self.mbarrier);
        let elements = &inst.srcs()[2..];
        for reg in elements {
            ctx.need_defined(mask, *reg, "the value of an asynchronous store");
        }
        let bytes = (self.bytes * elements.len()) as u64;
        ctx.each_block(mask, &to, true, |ctx, mask, at| ctx.bound_shared(mask, at, bytes).map(|_| ()))?;
        for lane in lanes(mask) {
            let mut data = Vec::with_capacity(16);
            for reg in elements {
                let value = match self.bytes {
                    4 => u64::from(ctx.regs().get::<u32>(*reg)[lane]),
                    _ => ctx.regs().get::<u64>(*reg)[lane],
                };
                data.extend_from_slice(&value.to_le_bytes()[..self.bytes]);
            }
            let (rank, to, mbarrier) = target(ctx, lane, to[lane], mbarrier[lane], false)?;
            let run = Run { shared: to, other: None, bytes };
            let mut bulk = Bulk::new(Way::Load(mbarrier), vec![run], vec![(to, bytes)]);
            bulk.reduction = self.reduction;
            bulk.fill = data.into();
            ctx.issue_bulk(lane, rank, bulk)?;
        }
        Ok(())
    }
}
