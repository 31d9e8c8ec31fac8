//! `cp.async.bulk.tensor` and its like: boxes of a tensor, which a tensor map describes.

use super::common::{Direction, issue, map_bytes, multicast, shared_address, target};
use super::reduce::{self, Operation};
use crate::decode::decoder::{AddressOperand, Decoder};
use crate::decode::{Refusal, invalid};
use crate::error::ErrorKind;
use crate::machine::bulk::{Bulk, Run, Way};
use crate::machine::context::{Context, Stop};
use crate::machine::inst::{Class, Inst, WarpOp};
use crate::machine::memory::lanes;
use crate::machine::registers::Reg;
use crate::machine::tensor_map::{Swizzle, TensorMap};
use crate::ptx::ast::{Address, Operand};
use crate::types::{Space, Type};

/// Where a box must begin in shared memory.
const BOX_ALIGN: u64 = 128;

/// The operand `[map, {x, y}]`: the map's address, and the coordinates.
fn place(
    d: &mut Decoder<'_, '_>,
    rank: usize,
    op: &Operand<'_>,
) -> Result<(AddressOperand, Vec<Reg>), Refusal> {
    let Operand::Address(address) = op else {
        return Err(invalid("a tensor map in brackets is missing"));
    };
    let wrong = || invalid(format!("a tensor of {rank} dimensions needs as many coordinates, {{...}}"));
    let coordinates = match address.rest.as_slice() {
        [Operand::Vector(all)] if all.len() == rank => all.as_slice(),
        [one] if rank == 1 && !matches!(one, Operand::Vector(_)) => std::slice::from_ref(one),
        _ => return Err(wrong()),
    };
    let plain = Address { base: address.base, offset: address.offset, rest: Vec::new() };
    let map = d.address(&Operand::Address(Box::new(plain)), Space::Generic)?;
    let coordinates = coordinates.iter().map(|op| d.src(op, Type::S32)).collect::<Result<_, _>>()?;
    Ok((map, coordinates))
}

/// Decodes `cp.async.bulk.prefetch.tensor`.
pub(super) fn prefetch(d: &mut Decoder<'_, '_>, rank: usize, map: &Operand<'_>) -> Result<(), Refusal> {
    let (map, coordinates) = place(d, rank, map)?;
    let op = Tensor { direction: None, own: true, operation: None, map: map.offset, shared: 0, mbarrier: 0 };
    let mut srcs = vec![map.base, Reg::NONE, Reg::NONE, Reg::NONE];
    srcs.extend(coordinates);
    d.warp(op, Class::Global, &[], &srcs);
    Ok(())
}

/// Decodes the operands of a tensor copy.
pub(super) fn copy(
    d: &mut Decoder<'_, '_>,
    rank: usize,
    (direction, own): (Direction, bool),
    operation: Option<Operation>,
    ops: &[Operand<'_>],
    ctas: Reg,
    written: &str,
) -> Result<(), Refusal> {
    let (map, shared, mbarrier) = match (direction, ops) {
        (Direction::Store, [map, from]) => (map, from, None),
        (Direction::Load, [to, map, mbarrier]) => (map, to, Some(mbarrier)),
        _ => return Err(invalid(format!("`{written}`: wrong number of operands"))),
    };
    let (map, coordinates) = place(d, rank, map)?;
    let shared = shared_address(d, Some(shared))?;
    let mbarrier = shared_address(d, mbarrier)?;
    let op = Tensor {
        direction: Some(direction),
        own,
        operation,
        map: map.offset,
        shared: shared.offset,
        mbarrier: mbarrier.offset,
    };
    let mut srcs = vec![map.base, shared.base, mbarrier.base, ctas];
    srcs.extend(coordinates);
    d.warp(op, Class::Global, &[], &srcs);
    Ok(())
}

/// A tensor copy, or without a direction a fetch to L2. Sources: the map, the box in shared memory, the mbarrier, the blocks of a
/// multicast, the coordinates.
#[derive(Debug)]
struct Tensor {
    direction: Option<Direction>,
    /// Whether it reaches the own block alone.
    own: bool,
    operation: Option<Operation>,
    map: i64,
    shared: i64,
    mbarrier: i64,
}

/// The 16-byte pieces of a box in shared memory, put together where they follow each other.
fn cover(base: u64, bytes: u64, swizzle: Swizzle) -> Vec<(u64, u64)> {
    if swizzle == Swizzle::None {
        return vec![(base, bytes)];
    }
    let mut all: Vec<u64> = (0..bytes / 16).map(|i| swizzle.apply(base + 16 * i)).collect();
    all.sort_unstable();
    let mut found: Vec<(u64, u64)> = Vec::new();
    for at in all {
        match found.last_mut() {
            Some((from, n)) if *from + *n == at => *n += 16,
            _ => found.push((at, 16)),
        }
    }
    found
}

impl WarpOp for Tensor {
    fn execute(&self, ctx: &mut Context<'_>, inst: &Inst, mask: u32) -> Result<(), Stop> {
        let maps = ctx.addresses(mask, inst.src(0), self.map);
        let shared = ctx.addresses(mask, inst.src(1), self.shared);
        let mbarriers = ctx.addresses(mask, inst.src(2), self.mbarrier);
        let ctas = multicast(ctx, mask, inst.src(3))?;
        let rows = &inst.srcs()[4..];
        for reg in rows {
            ctx.need_defined(mask, *reg, "a coordinate of a tensor");
        }
        for lane in lanes(mask) {
            let at: Vec<i32> = rows.iter().map(|reg| ctx.regs().get::<u32>(*reg)[lane] as i32).collect();
            let fault = |ctx: &Context<'_>, kind, message| Err(ctx.fault(kind, 1 << lane, message));
            let Some(map) = TensorMap::decode(&map_bytes(ctx, lane, maps[lane])?) else {
                let message = format!("the bytes at {:#x} are no tensor map of this machine", maps[lane]);
                return fault(ctx, ErrorKind::TensorMap, message);
            };
            if map.rank != rows.len() {
                let message =
                    format!("a tensor of {} dimensions is copied as one of {}", map.rank, rows.len());
                return fault(ctx, ErrorKind::TensorMap, message);
            }
            if let Err(e) = map.check() {
                return fault(ctx, e.kind(), format!("at {:#x}: {e}", maps[lane]));
            }
            let Some(direction) = self.direction else { continue };
            let (rank, base, mbarrier) = match direction {
                Direction::Store => (ctx.block.rank(), ctx.own_shared(1 << lane, shared)?[lane], 0),
                _ => target(ctx, lane, shared[lane], mbarriers[lane], self.own)?,
            };
            if !base.is_multiple_of(BOX_ALIGN) {
                let message = format!("a box at {base:#x} of shared memory, no multiple of {BOX_ALIGN}");
                return fault(ctx, ErrorKind::Misaligned, message);
            }
            let reduction = self.operation.map(|operation| reduce::of_tensor(operation, map.ty));
            if reduction.is_some_and(|r| r.is_none()) {
                let message = format!("no such reduction of a tensor of {:?}", map.ty);
                return fault(ctx, ErrorKind::TensorMap, message);
            }
            let mut runs = Vec::new();
            let mut total = 0;
            map.pieces(&at, |offset, other, bytes| {
                total += bytes;
                if map.swizzle == Swizzle::None {
                    return runs.push(Run { shared: base + offset, other, bytes });
                }
                let mut done = 0;
                while done < bytes {
                    let at = base + offset + done;
                    let n = (16 - at % 16).min(bytes - done);
                    runs.push(Run {
                        shared: map.swizzle.apply(at),
                        other: other.map(|o| o.wrapping_add(done)),
                        bytes: n,
                    });
                    done += n;
                }
            });
            let way = match direction {
                Direction::Store => Way::Store,
                _ => Way::Load(mbarrier),
            };
            let mut bulk = Bulk::new(way, runs, cover(base, total, map.swizzle));
            bulk.reduction = reduction.flatten();
            bulk.fill = map.fill().into();
            issue(ctx, lane, rank, bulk, ctas.map(|ctas| ctas[lane]))?;
        }
        Ok(())
    }
}
