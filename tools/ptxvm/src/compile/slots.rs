//! Rows and predicates of the frame for virtual registers.
//!
//! Compilers write PTX in static single assignment: thousands of registers, few of them alive at a time. Registers whose
//! lives do not overlap share a row, so that a warp's frame stays in the host's cache. Liveness
//! is that of a single lane, so divergence changes nothing: other lanes' values lie in other columns. A register that some
//! path reads before it is written is alive from the function's start and so shares its row with no other: the
//! initialisation check still sees that it was never written.

use super::flow::Flow;
use crate::decode::decoder::Virtual;
use crate::machine::inst::Inst;
use crate::machine::registers::{Reg, Width};

/// A frame's plan: where each virtual register lies.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// Row or predicate of each virtual register.
    pub slot: Vec<u32>,
    /// Rows of a frame.
    pub rows: u32,
    /// Predicates of a frame.
    pub preds: u32,
}

/// Above this many bits of liveness sets (blocks x registers), every register gets its own place.
const MAX_LIVENESS_BITS: usize = 1 << 27;

/// Plans the frame of a function.
pub fn plan(code: &[Inst], flow: &Flow, virtuals: &[Virtual]) -> Plan {
    let n = virtuals.len();
    let mut lives: Vec<Option<(usize, usize)>> = vec![None; n];
    let whole = (0, code.len());
    if flow.blocks.len().saturating_mul(n) > MAX_LIVENESS_BITS {
        lives.fill(Some(whole));
    } else {
        find_lives(code, flow, &mut lives);
        for (v, origin) in virtuals.iter().enumerate() {
            // Written when the frame starts.
            if !matches!(origin, Virtual::Plain(_)) {
                lives[v] = Some(whole);
            }
        }
        // Asynchronous products use theirs beyond the last instruction that names them.
        for reg in code.iter().filter(|inst| inst.watched).flat_map(|inst| &inst.regs) {
            if reg.is_some() {
                lives[reg.slot as usize] = Some(whole);
            }
        }
    }
    let mut order: Vec<(usize, usize, usize)> =
        lives.iter().enumerate().filter_map(|(v, life)| life.map(|(from, to)| (from, to, v))).collect();
    order.sort_unstable();
    let mut plan = Plan { slot: vec![0; n], rows: 0, preds: 0 };
    // By class (predicates, 1, 2 and 4 rows): places in use with the end of their life, and free ones.
    let mut used: [std::collections::BinaryHeap<std::cmp::Reverse<(usize, u32)>>; 4] = Default::default();
    let mut free: [Vec<u32>; 4] = Default::default();
    for (from, to, v) in order {
        let width = virtuals[v].width();
        let class = match width {
            Width::None | Width::Pred => 0,
            Width::B16 | Width::B32 => 1,
            Width::B64 => 2,
            Width::B128 => 3,
        };
        // Strictly before: an operation may write one destination before it reads its last source.
        while let Some(std::cmp::Reverse((end, slot))) = used[class].peek().copied() {
            if end >= from {
                break;
            }
            used[class].pop();
            free[class].push(slot);
        }
        let slot = free[class].pop().unwrap_or_else(|| {
            let next = if class == 0 { &mut plan.preds } else { &mut plan.rows };
            let slot = *next;
            *next += if class == 0 { 1 } else { width.rows() };
            slot
        });
        used[class].push(std::cmp::Reverse((to, slot)));
        plan.slot[v] = slot;
    }
    plan
}

/// Registers that an instruction reads.
fn reads(inst: &Inst) -> impl Iterator<Item = usize> + '_ {
    let guard = inst.guard.map(|g| g.pred);
    inst.srcs().iter().copied().chain(guard).filter(|r| r.is_some()).map(|r| r.slot as usize)
}

/// Registers that an instruction writes.
fn writes(inst: &Inst) -> impl Iterator<Item = usize> + '_ {
    inst.regs[..inst.dsts as usize].iter().filter(|r| r.is_some()).map(|r| r.slot as usize)
}

struct Bits(Vec<u64>);

impl Bits {
    fn new(n: usize) -> Self {
        Self(vec![0; n.div_ceil(64)])
    }
    fn set(&mut self, i: usize) {
        self.0[i / 64] |= 1 << (i % 64);
    }
    fn clear(&mut self, i: usize) {
        self.0[i / 64] &= !(1 << (i % 64));
    }
    fn ones(&self) -> impl Iterator<Item = usize> + '_ {
        self.0.iter().enumerate().flat_map(|(w, bits)| {
            let mut bits = *bits;
            std::iter::from_fn(move || {
                let bit = (bits != 0).then(|| bits.trailing_zeros() as usize)?;
                bits &= bits - 1;
                Some(w * 64 + bit)
            })
        })
    }
}

/// First and last instruction of each register's life, in the order of the text.
fn find_lives(code: &[Inst], flow: &Flow, lives: &mut [Option<(usize, usize)>]) {
    let n = lives.len();
    let blocks = &flow.blocks;
    let mut live_in: Vec<Bits> = blocks.iter().map(|_| Bits::new(n)).collect();
    let mut live_out: Vec<Bits> = blocks.iter().map(|_| Bits::new(n)).collect();
    // Read before written in the block, and written for certain (not under a guard).
    let mut gen_: Vec<Bits> = blocks.iter().map(|_| Bits::new(n)).collect();
    let mut kill: Vec<Bits> = blocks.iter().map(|_| Bits::new(n)).collect();
    for (b, block) in blocks.iter().enumerate() {
        for inst in code[block.start..block.end].iter().rev() {
            if inst.guard.is_none() {
                for v in writes(inst) {
                    kill[b].set(v);
                    gen_[b].clear(v);
                }
            }
            reads(inst).for_each(|v| gen_[b].set(v));
        }
    }
    let mut changed = true;
    while changed {
        changed = false;
        for b in (0..blocks.len()).rev() {
            for &next in &blocks[b].next {
                let (out, input) = (&mut live_out[b].0, &live_in[next].0);
                out.iter_mut().zip(input).for_each(|(o, i)| *o |= i);
            }
            for w in 0..live_in[b].0.len() {
                let new = gen_[b].0[w] | (live_out[b].0[w] & !kill[b].0[w]);
                changed |= new != live_in[b].0[w];
                live_in[b].0[w] = new;
            }
        }
    }
    let mut extend = |v: usize, at: usize| {
        let life = lives[v].get_or_insert((at, at));
        *life = (life.0.min(at), life.1.max(at));
    };
    for (b, block) in blocks.iter().enumerate() {
        live_in[b].ones().for_each(|v| extend(v, block.start));
        live_out[b].ones().for_each(|v| extend(v, block.end - 1));
        for (i, inst) in code.iter().enumerate().take(block.end).skip(block.start) {
            reads(inst).chain(writes(inst)).for_each(|v| extend(v, i));
        }
    }
}

/// Gives a register the row or predicate that the plan has for it.
pub fn assign(reg: &mut Reg, plan: &Plan) {
    if reg.is_some() {
        reg.slot = plan.slot[reg.slot as usize];
    }
}
