//! What the bulk copies and the tensor copies share.

use crate::decode::Refusal;
use crate::decode::decoder::{AddressOperand, Decoder};
use crate::error::ErrorKind;
use crate::machine::bulk::Bulk;
use crate::machine::context::{Context, Stop};
use crate::machine::memory::access::{Access, by_space, in_window};
use crate::machine::memory::{lanes, pick};
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

/// The blocks that a multicast of each lane goes to, a bit each, where there is one.
pub(super) fn multicast(ctx: &mut Context<'_>, mask: u32, ctas: Reg) -> Result<Option<[u32; LANES]>, Stop> {
    if !ctas.is_some() {
        return Ok(None);
    }
    ctx.need_defined(mask, ctas, "the blocks of a multicast");
    let ctas = ctx.regs().get::<u32>(ctas).map(|ctas| ctas & 0xffff);
    let blocks = ctx.cluster_blocks();
    let wrong = pick(mask, |lane| ctas[lane] == 0 || ctas[lane] >> blocks != 0);
    if wrong != 0 {
        let told = ctas[wrong.trailing_zeros() as usize];
        let message = format!("a multicast to the blocks {told:#b} of a cluster that has {blocks}");
        return Err(ctx.fault(ErrorKind::Cluster, wrong, message));
    }
    Ok(Some(ctas))
}

/// A place in shared memory that a copy writes to, and its mbarrier, which must be of the same block: the block's rank, and both
/// addresses in its memory. With `own` it must be the running block.
pub(super) fn target(
    ctx: &Context<'_>,
    lane: usize,
    to: u64,
    mbarrier: u64,
    own: bool,
) -> Result<(usize, u64, u64), Stop> {
    let ((rank, to), (of, mbarrier)) = (ctx.split_rank(to), ctx.split_rank(mbarrier));
    if rank != of {
        let message =
            format!("the copy goes to block {rank} of the cluster, and its mbarrier lies in block {of}");
        return Err(ctx.fault(ErrorKind::Cluster, 1 << lane, message));
    }
    let here = ctx.block.rank();
    if own && rank != here {
        let message = format!(
            "a copy to block {rank} of the cluster from block {here}: .shared::cta means the own block"
        );
        return Err(ctx.fault(ErrorKind::WrongSpace, 1 << lane, message));
    }
    Ok((rank, to, mbarrier))
}

/// Issues a copy to the block of its target, or with `ctas` to several.
pub(super) fn issue(
    ctx: &mut Context<'_>,
    lane: usize,
    rank: usize,
    mut bulk: Bulk,
    ctas: Option<u32>,
) -> Result<(), Stop> {
    let Some(ctas) = ctas else { return ctx.issue_bulk(lane, rank, bulk) };
    for rank in lanes(ctas) {
        ctx.issue_bulk(lane, rank, bulk.clone())?;
        bulk.repeats = true;
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
