//! What the bulk copies and the tensor copies share.

use crate::decode::Refusal;
use crate::decode::decoder::{AddressOperand, Decoder};
use crate::error::ErrorKind;
use crate::machine::context::{Context, Stop};
use crate::machine::memory::access::{Access, by_space, in_window};
use crate::machine::memory::pick;
use crate::machine::registers::{LANES, Reg};
use crate::ptx::ast::Operand;
use crate::types::Space;

/// Which way a copy goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Direction {
    Load,
    Within,
    Store,
}

/// An address in shared memory, or none.
pub(super) fn shared_address(
    d: &mut Decoder<'_, '_>,
    op: Option<&Operand<'_>>,
) -> Result<AddressOperand, Refusal> {
    op.map_or(Ok(AddressOperand { base: Reg::NONE, offset: 0 }), |op| d.address(op, Space::Shared))
}

/// A multicast goes to the one block of the cluster.
pub(super) fn one_block(ctx: &mut Context<'_>, mask: u32, ctas: Reg) -> Result<(), Stop> {
    if ctas.is_some() {
        ctx.need_defined(mask, ctas, "the blocks of a multicast");
        let ctas = *ctx.regs().get::<u32>(ctas);
        let wrong = pick(mask, |lane| ctas[lane] & 0xffff != 1);
        if wrong != 0 {
            let message = "a multicast to other blocks: a cluster has one block here".to_owned();
            return Err(ctx.fault(ErrorKind::WrongSpace, wrong, message));
        }
    }
    Ok(())
}

/// The bytes of tensor maps at generic addresses: of parameters, constants or global memory.
pub(super) fn map_bytes(ctx: &Context<'_>, lane: usize, at: u64) -> Result<[u8; 128], Stop> {
    let all = [at; LANES];
    let [.., (_, constant), (_, param)] = by_space(1, &all);
    let mut bytes = [0; 128];
    if !at.is_multiple_of(64) {
        let message = format!("a tensor map at {at:#x}, no multiple of 64");
        return Err(ctx.fault(ErrorKind::Misaligned, 1 << lane, message));
    }
    if constant | param != 0 {
        let space = if param != 0 { Space::Param } else { Space::Const };
        let here = in_window(&all)[0];
        for half in [here, here + 64] {
            let bank = ctx.check_bank(1 << lane, &[half; LANES], &Access::read(64), space)?;
            let to = if half == here { &mut bytes[..64] } else { &mut bytes[64..] };
            to.copy_from_slice(&bank[half as usize..half as usize + 64]);
        }
    } else {
        let Some(a) = ctx.launch.memory.find(at, 128) else {
            let (kind, message) = ctx.launch.memory.explain(at, 128);
            return Err(ctx.fault(kind, 1 << lane, message));
        };
        a.data.read((at - a.start) as usize, &mut bytes);
    }
    Ok(bytes)
}
