//! `clusterlaunchcontrol`: a cluster takes the place of one that has not started.
//!
//! A request that is granted takes the next cluster of the grid, which then never starts. Hardware may refuse while clusters are
//! left; here each block is granted a few (`may_cancel`) and then refused, so that both answers are met. The answer is
//! decided when it is asked for, and lands as a bulk copy does. Its sixteen bytes are opaque by the ISA; here they are the index
//! in the grid of the first block of the cluster, and one of two words.

use super::bulk::multiple_of_16;
use super::memory::operands::elements;
use crate::decode::decoder::{Decoder, operands};
use crate::decode::mods::Mods;
use crate::decode::{Refusal, invalid, unsupported};
use crate::error::ErrorKind;
use crate::machine::bulk::{Bulk, Run, Way};
use crate::machine::context::{Context, Stop};
use crate::machine::inst::{Class, Inst, WarpOp};
use crate::machine::memory::access::{by_space, in_window};
use crate::machine::memory::lanes;
use crate::machine::registers::{LANES, Reg};
use crate::ptx::ast::Instruction;
use crate::types::{Space, Type};

/// The last word of an answer that a cluster was cancelled.
const GRANTED: u32 = 0x6772_616e;
/// The same that none was.
const REFUSED: u32 = 0x7265_6675;

/// Decodes the instructions of this family.
///
/// # Errors
/// The instruction is wrong, or not built.
pub fn decode(d: &mut Decoder<'_, '_>, inst: &Instruction<'_>) -> Result<(), Refusal> {
    let mut mods = Mods::new(inst);
    let written = mods.written();
    match mods.any() {
        Some("try_cancel") => try_cancel(d, inst, mods),
        Some("query_cancel") => query(d, inst, mods),
        _ => Err(unsupported(format!("`{written}`"))),
    }
}

fn try_cancel(
    d: &mut Decoder<'_, '_>,
    inst: &Instruction<'_>,
    mut mods: Mods<'_, '_>,
) -> Result<(), Refusal> {
    let written = mods.written();
    if !mods.take("async") {
        return Err(invalid(format!("`{written}` without `.async`")));
    }
    let space = if mods.take("shared::cta") { Space::Shared } else { Space::Generic };
    if !mods.take("mbarrier::complete_tx::bytes") {
        return Err(invalid(format!("`{written}` without `.mbarrier::complete_tx::bytes`")));
    }
    let all = mods.take("multicast::cluster::all");
    if !mods.take("b128") {
        return Err(invalid(format!("`{written}` without `.b128`")));
    }
    mods.finish()?;
    let [to, mbarrier] = operands(inst)?;
    let (to, mbarrier) = (d.address(to, space)?, d.address(mbarrier, space)?);
    d.note_access(Space::Shared, 8, false);
    d.asynchronous = true;
    // Which clusters are left depends on how far the grid has come.
    d.ordered = true;
    let op = TryCancel { space, all, to: to.offset, mbarrier: mbarrier.offset };
    d.warp(op, Class::Sync, &[], &[to.base, mbarrier.base]);
    Ok(())
}

/// `clusterlaunchcontrol.try_cancel`. Sources: where the answer goes, and the mbarrier.
#[derive(Debug)]
struct TryCancel {
    space: Space,
    /// Whether every block of the cluster is answered.
    all: bool,
    to: i64,
    mbarrier: i64,
}

impl TryCancel {
    /// Addresses in the own block's shared memory.
    fn own(&self, ctx: &mut Context<'_>, mask: u32, reg: Reg, offset: i64) -> Result<[u64; LANES], Stop> {
        let mut at = ctx.addresses(mask, reg, offset);
        if self.space == Space::Generic {
            let parts = by_space(mask, &at);
            if let Some((space, bad)) = parts.iter().find(|(space, m)| *space != Space::Shared && *m != 0) {
                let first = at[bad.trailing_zeros() as usize];
                let message =
                    format!("{first:#x} is an address of {space} memory, and no block's shared memory");
                return Err(ctx.fault(ErrorKind::WrongSpace, *bad, message));
            }
            at = in_window(&at);
        }
        ctx.own_shared(mask, at)
    }
}

impl WarpOp for TryCancel {
    fn execute(&self, ctx: &mut Context<'_>, inst: &Inst, mask: u32) -> Result<(), Stop> {
        let to = self.own(ctx, mask, inst.src(0), self.to)?;
        let mbarrier = self.own(ctx, mask, inst.src(1), self.mbarrier)?;
        for lane in lanes(mask) {
            let (to, at) = (to[lane], mbarrier[lane]);
            multiple_of_16(ctx, lane, &[("destination", to)])?;
            if ctx.block.refused {
                ctx.finding(ErrorKind::Cluster, 1 << lane, None, || {
                    "the block asks for another cluster, although it has seen that one was refused".to_owned()
                });
            }
            let granted = if ctx.may_cancel() { ctx.launch.waiting.take() } else { None };
            let answer = match granted {
                None => [0, 0, 0, REFUSED],
                Some(cluster) => {
                    ctx.block.granted += 1;
                    let [x, y, z] = ctx.launch.index_of(cluster * ctx.launch.cluster_blocks());
                    [x, y, z, GRANTED]
                }
            };
            let mut bulk =
                Bulk::new(Way::Load(at), vec![Run { shared: to, other: None, bytes: 16 }], vec![(to, 16)]);
            bulk.fill = answer.map(u32::to_le_bytes).concat().into();
            bulk.refuses = granted.is_none();
            let own = ctx.block.rank();
            let ranks = if self.all { 0..ctx.cluster_blocks() } else { own..own + 1 };
            for rank in ranks {
                ctx.issue_bulk(lane, rank, bulk.clone())?;
            }
        }
        Ok(())
    }
}

fn query(d: &mut Decoder<'_, '_>, inst: &Instruction<'_>, mut mods: Mods<'_, '_>) -> Result<(), Refusal> {
    let written = mods.written();
    let wrong = || invalid(format!("`{written}`: no such question"));
    let [to, answer] = operands(inst)?;
    let dims = [("get_first_ctaid::x", 0), ("get_first_ctaid::y", 1), ("get_first_ctaid::z", 2)];
    let (query, dsts) = if mods.take("is_canceled") {
        if !mods.take("pred") {
            return Err(wrong());
        }
        (Query::IsCancelled, vec![d.dst(to, Type::Pred)?])
    } else if let Some(dim) = mods.one_of(&dims) {
        if !mods.take("b32") {
            return Err(wrong());
        }
        (Query::First(dim), vec![d.dst(to, Type::B32)?])
    } else {
        if !(mods.take("get_first_ctaid") && mods.take("v4") && mods.take("b32")) {
            return Err(wrong());
        }
        let parts = elements(to, 4, &written)?;
        let dsts = parts.iter().map(|part| d.dst(part, Type::B32)).collect::<Result<Vec<_>, _>>()?;
        (Query::First(0), dsts)
    };
    if !mods.take("b128") {
        return Err(wrong());
    }
    mods.finish()?;
    let answer = d.src(answer, Type::B128)?;
    d.warp(query, Class::Integer, &dsts, &[answer]);
    Ok(())
}

/// `clusterlaunchcontrol.query_cancel`. Source: the answer.
#[derive(Clone, Copy, Debug)]
enum Query {
    /// Destination: a predicate.
    IsCancelled,
    /// Destinations: the index of the first block of the cluster, from this dimension on. What stands behind z is unspecified.
    First(usize),
}

impl WarpOp for Query {
    fn execute(&self, ctx: &mut Context<'_>, inst: &Inst, mask: u32) -> Result<(), Stop> {
        ctx.need_defined(mask, inst.src(0), "the answer of clusterlaunchcontrol.try_cancel");
        let answers = *ctx.regs().get::<u128>(inst.src(0));
        let word = |lane: usize, i: usize| (answers[lane] >> (32 * i)) as u32;
        let those =
            |last: u32| lanes(mask).filter(|lane| word(*lane, 3) == last).fold(0, |m, lane| m | 1 << lane);
        let (granted, refused) = (those(GRANTED), those(REFUSED));
        let defined = ctx.warp.regs.defined(inst.src(0));
        let strange = mask & defined & !granted & !refused;
        if strange != 0 {
            ctx.finding(ErrorKind::Cluster, strange, None, || {
                "these sixteen bytes are no answer of clusterlaunchcontrol.try_cancel".to_owned()
            });
        }
        match self {
            Self::IsCancelled => ctx.regs().set_pred(inst.dst(0), mask, granted),
            Self::First(dim) => {
                let unanswered = mask & refused;
                if unanswered != 0 {
                    ctx.finding(ErrorKind::Cluster, unanswered, None, || {
                        "the first block of a cluster that was not cancelled: the request was refused"
                            .to_owned()
                    });
                }
                for i in 0..inst.dsts as usize {
                    let values = std::array::from_fn(|lane| word(lane, dim + i));
                    ctx.regs().set::<u32>(inst.dst(i), mask, &values);
                }
            }
        }
        for i in 0..inst.dsts as usize {
            // The fourth word of a vector is unspecified.
            let known = if i == 3 { 0 } else { u32::MAX };
            ctx.regs().set_defined(inst.dst(i), mask, known);
        }
        Ok(())
    }
}
