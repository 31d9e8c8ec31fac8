//! ldmatrix, stmatrix and movmatrix: 8 x 8 matrices of 16-bit elements. ldmatrix also loads matrices of bytes, which lie in memory
//! as 8, 6 or 4 bits.
//!
//! In registers, lane l holds row l / 4, columns 2 (l % 4) and the next; with `.trans` row and column change places. Of bytes it
//! holds columns 4 (l % 4) to the third next; of 16 x 16, always with `.trans`, a second register holds what is 8 further.

use super::operands::{destinations, sources, sync_aligned, vector, whole_warp};
use crate::decode::decoder::{AddressOperand, Decoder, operands};
use crate::decode::mods::Mods;
use crate::decode::{Refusal, invalid, unsupported};
use crate::error::ErrorKind;
use crate::machine::context::{Context, Stop};
use crate::machine::inst::{Class, Convergence, Inst, WarpOp};
use crate::machine::layout::{SHARED_WINDOW, WINDOW_BYTES};
use crate::machine::registers::{LANES, Reg};
use crate::ptx::ast::Instruction;
use crate::types::{Space, Type};

/// Source 0 is the address; lanes 8i .. 8i+7 give the rows of matrix i. Loads have one destination for each matrix,
/// stores one more source.
#[derive(Debug)]
struct MatrixAccess {
    store: bool,
    trans: bool,
    generic: bool,
    matrices: usize,
    offset: i64,
}

pub(super) fn decode(d: &mut Decoder<'_, '_>, inst: &Instruction<'_>) -> Result<(), Refusal> {
    let mut mods = Mods::new(inst);
    sync_aligned(&mut mods)?;
    if inst.opcode == "ldmatrix" && (mods.take("m8n16") || mods.take("m16n16")) {
        return decode_bytes(d, inst, mods);
    }
    if !mods.take("m8n8") {
        return Err(unsupported(format!("`{}`: this shape", mods.written())));
    }
    let Some(matrices) = mods.one_of(&[("x1", 1), ("x2", 2), ("x4", 4)]) else {
        return Err(invalid(format!("`{}` without .x1, .x2 or .x4", mods.written())));
    };
    let trans = mods.take("trans");
    let space =
        mods.one_of(&[("shared", Space::Shared), ("shared::cta", Space::Shared)]).unwrap_or(Space::Generic);
    if mods.ty()? != Type::B16 {
        return Err(unsupported(format!("`{}`: only .b16 is built", mods.written())));
    }
    mods.finish()?;
    let store = inst.opcode == "stmatrix";
    let [first, second] = operands::<2>(inst)?;
    let (address, matrix) = if store { (first, second) } else { (second, first) };
    let AddressOperand { base, offset } = d.address(address, space)?;
    let regs = vector(matrix, matrices, "the operand of the matrices")?;
    let mut srcs = vec![base];
    let mut dsts = Vec::new();
    if store {
        sources(d, regs, Type::B32, &mut srcs)?;
    } else {
        dsts = destinations(d, regs, Type::B32)?;
    }
    d.note_access(Space::Shared, 16, false);
    let op = MatrixAccess { store, trans, generic: space == Space::Generic, matrices, offset };
    d.warp(op, Class::Shared, &dsts, &srcs).convergence = Convergence::All;
    Ok(())
}

/// `ldmatrix` of bytes. Source 0 is the address; destinations are one register for each 8 rows in registers.
#[derive(Debug)]
struct ByteMatrices {
    /// 16 x 16, transposed; otherwise 8 x 16.
    square: bool,
    /// Bits of an element in memory.
    bits: usize,
    generic: bool,
    matrices: usize,
    offset: i64,
}

fn decode_bytes(
    d: &mut Decoder<'_, '_>,
    inst: &Instruction<'_>,
    mut mods: Mods<'_, '_>,
) -> Result<(), Refusal> {
    let written = mods.written();
    let square = inst.modifiers.contains(&"m16n16");
    let Some(matrices) = mods.one_of(&[("x1", 1), ("x2", 2), ("x4", 4)]).filter(|n| !square || *n < 4) else {
        return Err(invalid(format!("`{written}` without a number of matrices that it may have")));
    };
    if mods.take("trans") != square {
        return Err(invalid(format!("`{written}`: .trans belongs to .m16n16 and must be there")));
    }
    let space =
        mods.one_of(&[("shared", Space::Shared), ("shared::cta", Space::Shared)]).unwrap_or(Space::Generic);
    let plain = mods.take("b8");
    let bits = match mods.take("b8x16") {
        true => mods.one_of(&[("b6x16_p32", 6), ("b4x16_p64", 4)]),
        false => Some(8).filter(|_| plain && square),
    };
    mods.finish()?;
    let Some(bits) = bits else {
        return Err(invalid(format!("`{written}`: this type")));
    };
    let [matrix, address] = operands::<2>(inst)?;
    let AddressOperand { base, offset } = d.address(address, space)?;
    let n = if square { 2 * matrices } else { matrices };
    let dsts = destinations(d, vector(matrix, n, "the operand of the matrices")?, Type::B32)?;
    d.note_access(Space::Shared, 16, false);
    let op = ByteMatrices { square, bits, generic: space == Space::Generic, matrices, offset };
    d.warp(op, Class::Shared, &dsts, &[base]).convergence = Convergence::All;
    Ok(())
}

impl ByteMatrices {
    /// Row and column in memory of a byte of a register of a lane.
    fn position(&self, lane: usize, reg: usize, sub: usize) -> (usize, usize) {
        let (row, column) = (lane / 4, 4 * (lane % 4) + sub);
        if self.square { (column, row + 8 * reg) } else { (row, column) }
    }
}

impl WarpOp for ByteMatrices {
    fn execute(&self, ctx: &mut Context<'_>, inst: &Inst, mask: u32) -> Result<(), Stop> {
        whole_warp(ctx, mask)?;
        let (height, regs) = if self.square { (16, 2) } else { (8, 1) };
        let lanes = (u64::MAX >> (64 - height * self.matrices)) as u32;
        let at = addresses(ctx, inst.src(0), self.offset, self.generic, lanes)?;
        let mut words = [[0u32; LANES]; 4];
        let mut defined = [u32::MAX; 4];
        for i in 0..self.matrices {
            let first = height * i;
            let mask = (((1u64 << height) - 1) << first) as u32;
            let (rows, rows_defined) = ctx.load_shared(mask, &at, 16)?;
            let own = if rows_defined == mask { None } else { Some(ctx.own_shared(mask, at)?) };
            for reg in 0..regs {
                let to = regs * i + reg;
                for (lane, sub) in (0..LANES).flat_map(|lane| (0..4).map(move |sub| (lane, sub))) {
                    let (row, column) = self.position(lane, reg, sub);
                    let bit = self.bits * column;
                    let value = (rows[first + row] >> bit) as u32 & ((1 << self.bits) - 1);
                    words[to][lane] |= value << (8 * sub);
                    // The padding behind elements of 4 and 6 bits need not be written.
                    if let Some(own) = &own {
                        let bytes = bit / 8..(bit + self.bits).div_ceil(8);
                        let lane_of_row = 1 << (first + row);
                        let known = bytes
                            .into_iter()
                            .all(|byte| ctx.written_shared(lane_of_row, own, byte as u64, 1) != 0);
                        defined[to] &= !(u32::from(!known) << lane);
                    }
                }
            }
        }
        for i in 0..usize::from(inst.dsts) {
            ctx.regs().set::<u32>(inst.dst(i), u32::MAX, &words[i]);
            ctx.regs().set_defined(inst.dst(i), u32::MAX, defined[i]);
        }
        Ok(())
    }
}

/// Addresses in shared memory of the lanes of `lanes`.
fn addresses(
    ctx: &mut Context<'_>,
    base: Reg,
    offset: i64,
    generic: bool,
    lanes: u32,
) -> Result<[u64; LANES], Stop> {
    let mut at = ctx.addresses(lanes, base, offset);
    if !generic {
        return Ok(at);
    }
    let mut outside = 0;
    for i in 0..LANES {
        at[i] = at[i].wrapping_sub(SHARED_WINDOW);
        outside |= u32::from(at[i] >= WINDOW_BYTES) << i;
    }
    if outside & lanes != 0 {
        let lane = (outside & lanes).trailing_zeros() as usize;
        let message = format!(
            "the generic address {:#x} of a matrix row does not lie in shared memory",
            at[lane].wrapping_add(SHARED_WINDOW)
        );
        return Err(ctx.fault(ErrorKind::WrongSpace, outside & lanes, message));
    }
    Ok(at)
}

impl MatrixAccess {
    fn load(&self, ctx: &mut Context<'_>, inst: &Inst, at: &[u64; LANES]) -> Result<(), Stop> {
        let mut words = [[0u32; LANES]; 4];
        let mut defined = [0u32; 4];
        for i in 0..self.matrices {
            let (rows, rows_defined) = ctx.load_shared(0xff << (8 * i), at, 16)?;
            let rows = &rows[8 * i..8 * i + 8];
            let rows_defined = rows_defined >> (8 * i) & 0xff;
            if self.trans {
                for lane in 0..LANES {
                    let (col, row) = (lane / 4, 2 * (lane % 4));
                    let half = |row: usize| (rows[row] >> (16 * col)) as u32 & 0xffff;
                    words[i][lane] = half(row) | half(row + 1) << 16;
                }
            } else {
                for lane in 0..LANES {
                    words[i][lane] = (rows[lane / 4] >> (32 * (lane % 4))) as u32;
                }
            }
            defined[i] = u32::MAX;
            if rows_defined != 0xff {
                let at = &ctx.own_shared(0xff << (8 * i), *at)?;
                let columns: [u32; 8] = std::array::from_fn(|c| {
                    ctx.written_shared(0xff << (8 * i), at, 2 * c as u64, 2) >> (8 * i)
                });
                defined[i] = self.lanes_of(&columns);
            }
        }
        // All matrices are read before the first register is written: one of them may hold the addresses.
        for i in 0..self.matrices {
            ctx.regs().set::<u32>(inst.dst(i), u32::MAX, &words[i]);
            ctx.regs().set_defined(inst.dst(i), u32::MAX, defined[i]);
        }
        Ok(())
    }

    /// Row and column, in the matrix as it lies in memory, of an element of a lane.
    fn position(&self, lane: usize, sub: usize) -> (usize, usize) {
        let (row, col) = (lane / 4, 2 * (lane % 4) + sub);
        if self.trans { (col, row) } else { (row, col) }
    }

    /// The lanes both of whose elements are in the set that has, for each column, these rows.
    fn lanes_of(&self, columns: &[u32; 8]) -> u32 {
        let has = |lane, sub| {
            let (row, col) = self.position(lane, sub);
            columns[col] >> row & 1 != 0
        };
        (0..LANES).fold(0, |all, lane| all | u32::from(has(lane, 0) && has(lane, 1)) << lane)
    }

    fn store(&self, ctx: &mut Context<'_>, inst: &Inst, at: &[u64; LANES]) -> Result<(), Stop> {
        for i in 0..self.matrices {
            let reg = inst.src(1 + i);
            let words = *ctx.regs().get::<u32>(reg);
            let known = ctx.regs().defined(reg);
            let mut rows = [0u128; LANES];
            for lane in 0..LANES {
                for sub in 0..2 {
                    let (row, col) = self.position(lane, sub);
                    rows[8 * i + row] |= u128::from(words[lane] >> (16 * sub) & 0xffff) << (16 * col);
                }
            }
            let mask = 0xff << (8 * i);
            ctx.store_shared(mask, at, 16, &rows, mask)?;
            if known != u32::MAX {
                let at = &ctx.own_shared(mask, *at)?;
                let mut columns = [mask; 8];
                for (lane, sub) in (0..LANES).flat_map(|lane| [(lane, 0), (lane, 1)]) {
                    let (row, col) = self.position(lane, sub);
                    columns[col] &= !(u32::from(known >> lane & 1 == 0) << (8 * i + row));
                }
                for (col, written) in columns.into_iter().enumerate() {
                    ctx.set_written_shared(mask, at, 2 * col as u64, 2, written);
                }
            }
        }
        Ok(())
    }
}

impl WarpOp for MatrixAccess {
    fn execute(&self, ctx: &mut Context<'_>, inst: &Inst, mask: u32) -> Result<(), Stop> {
        whole_warp(ctx, mask)?;
        let lanes = (u64::MAX >> (64 - 8 * self.matrices)) as u32;
        let at = addresses(ctx, inst.src(0), self.offset, self.generic, lanes)?;
        if self.store { self.store(ctx, inst, &at) } else { self.load(ctx, inst, &at) }
    }
}

/// `movmatrix.sync.aligned.m8n8.trans.b16 d, a`
#[derive(Debug)]
struct Transpose;

pub(super) fn decode_movmatrix(d: &mut Decoder<'_, '_>, inst: &Instruction<'_>) -> Result<(), Refusal> {
    let mut mods = Mods::new(inst);
    sync_aligned(&mut mods)?;
    if !(mods.take("m8n8") && mods.take("trans") && mods.take("b16")) {
        return Err(invalid(format!("`{}`: the only variant is .m8n8.trans.b16", mods.written())));
    }
    mods.finish()?;
    let [dst, src] = operands::<2>(inst)?;
    let mut srcs = Vec::new();
    sources(d, std::slice::from_ref(src), Type::B32, &mut srcs)?;
    let dst = d.dst(dst, Type::B32)?;
    d.warp(Transpose, Class::Warp, &[dst], &srcs).convergence = Convergence::All;
    Ok(())
}

impl WarpOp for Transpose {
    fn execute(&self, ctx: &mut Context<'_>, inst: &Inst, mask: u32) -> Result<(), Stop> {
        whole_warp(ctx, mask)?;
        let regs = ctx.regs();
        let a = regs.get::<u32>(inst.src(0));
        let known = regs.defined(inst.src(0));
        let mut words = [0; LANES];
        let mut defined = u32::MAX;
        for lane in 0..LANES {
            for sub in 0..2 {
                // Row 2 (l % 4) + sub, column l / 4 of the source.
                let col = lane / 4;
                let from = 4 * (2 * (lane % 4) + sub) + col / 2;
                words[lane] |= (a[from] >> (16 * (col % 2)) & 0xffff) << (16 * sub);
                defined &= !(u32::from(known >> from & 1 == 0) << lane);
            }
        }
        regs.set::<u32>(inst.dst(0), u32::MAX, &words);
        regs.set_defined(inst.dst(0), u32::MAX, defined);
        Ok(())
    }
}
