//! Asynchronous products (`wgmma`) of a warp: the registers and the shared memory that those under way use.
//!
//! A product is computed when it is issued. Until the warp has waited for its group nothing else may touch its accumulators,
//! write its factors, or rely on the fence before it; while there is anything to watch, the warp runs an instruction at a time
//! with its registers looked up here.

use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use super::barrier::WARPS;
use super::context::Context;
use super::inst::Inst;
use super::memory::access::Access;
use super::memory::lanes;
use super::memory::race::Nothing;
use super::registers::{LANES, Reg, Registers, Row};
use crate::error::ErrorKind;

/// Bytes of a piece of a factor in shared memory.
pub(crate) const UNIT: u64 = 16;

/// A set of rows of the register file.
#[derive(Clone, Debug, Default)]
struct Rows(Vec<u64>);

impl Rows {
    fn insert(&mut self, row: u32) {
        let word = row as usize / 64;
        if self.0.len() <= word {
            self.0.resize(word + 1, 0);
        }
        self.0[word] |= 1 << (row % 64);
    }

    fn has(&self, row: u32) -> bool {
        self.0.get(row as usize / 64).is_some_and(|word| word >> (row % 64) & 1 != 0)
    }

    fn clear(&mut self) {
        self.0.fill(0);
    }

    fn iter(&self) -> impl Iterator<Item = u32> + '_ {
        (0..64 * self.0.len() as u32).filter(|row| self.has(*row))
    }
}

/// The reads of a warpgroup's product.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct GroupReads {
    /// The clock of the group's party at the last of them.
    clock: u32,
    /// Warps that have waited.
    waited: u32,
}

/// A product under way.
#[derive(Clone, Debug)]
pub(crate) struct Product {
    /// How many the warp issued before.
    pub(crate) number: u64,
    /// The instruction.
    pub(crate) pc: u32,
    /// Rows of the accumulators; products with the same ones share the list.
    pub(crate) accumulators: Arc<[u32]>,
    /// Rows of the factor that is in registers.
    pub(crate) factors: Vec<u32>,
    /// Addresses in shared memory of the 16-byte pieces of the factors that are there.
    pub(crate) units: Vec<u64>,
}

/// How a register is used that a product under way uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Misuse {
    /// An accumulator is read.
    ReadsAccumulator,
    /// An accumulator is written.
    WritesAccumulator,
    /// A factor is written.
    WritesFactor,
    /// Another product has some of the accumulators, and others.
    SharesAccumulators,
    /// A factor is an accumulator of another product.
    AccumulatorAsFactor,
}

impl Misuse {
    /// In words, before "of the wgmma that has not been waited for".
    pub(crate) fn describe(self) -> &'static str {
        match self {
            Self::ReadsAccumulator => "this reads an accumulator",
            Self::WritesAccumulator => "this writes an accumulator",
            Self::WritesFactor => "this writes a register with a factor",
            Self::SharesAccumulators => "the product has some of the accumulators, not the same ones,",
            Self::AccumulatorAsFactor => "a register with a factor is an accumulator",
        }
    }
}

/// Why a product's registers are not what the last `wgmma.fence` ordered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unfenced {
    /// There was none.
    Never,
    /// A register was written after it.
    Written,
}

/// The products of a warp.
#[derive(Debug, Default)]
pub(crate) struct Products {
    /// Products of no group.
    open: Vec<Product>,
    /// Groups, the oldest first.
    groups: VecDeque<Vec<Product>>,
    /// Rows that products under way write, and that they read.
    writing: Rows,
    reading: Rows,
    /// Whether a fence orders what the registers hold, but for those of `written`.
    fenced: bool,
    /// Rows written since then.
    written: Rows,
    /// The accumulators of the products so far, each list once.
    lists: Vec<Arc<[u32]>>,
    /// Rows that products have used.
    used: Rows,
    /// What those held when nothing was under way any more: the fence orders what they hold still.
    kept: Option<BTreeMap<u32, Row>>,
    /// How many were issued.
    pub(crate) issued: u64,
    /// Registers of the product that is computed.
    pub(crate) scratch: Registers,
}

impl Products {
    /// None is under way, and there was no fence.
    pub(crate) fn clear(&mut self) {
        if self.fenced || self.issued != 0 || !self.groups.is_empty() {
            *self = Self { scratch: std::mem::take(&mut self.scratch), ..Self::default() };
        }
    }

    /// Whether registers must be looked up.
    #[inline(always)]
    pub(crate) fn watched(&self) -> bool {
        self.fenced
    }

    /// `wgmma.fence`
    pub(crate) fn fence(&mut self) {
        self.fenced = true;
        self.written.clear();
        self.kept = None;
    }

    /// `wgmma.commit_group`
    pub(crate) fn commit(&mut self) {
        self.groups.push_back(std::mem::take(&mut self.open));
    }

    /// Why the last fence does not order what these rows hold.
    pub(crate) fn unfenced(&self, rows: &[u32], regs: &Registers) -> Option<Unfenced> {
        if self.fenced {
            return rows.iter().any(|row| self.written.has(*row)).then_some(Unfenced::Written);
        }
        let Some(kept) = &self.kept else { return Some(Unfenced::Never) };
        let changed = |row: &u32| {
            self.written.has(*row) || kept.get(row).is_some_and(|before| regs.row(*row) != before)
        };
        rows.iter().any(changed).then_some(Unfenced::Written)
    }

    /// A list of accumulators, as products share it.
    pub(crate) fn list(&mut self, rows: &[u32]) -> Arc<[u32]> {
        if let Some(known) = self.lists.iter().find(|list| ***list == *rows) {
            return Arc::clone(known);
        }
        self.lists.push(rows.into());
        Arc::clone(&self.lists[self.lists.len() - 1])
    }

    /// The product under way that another one must not be issued beside.
    pub(crate) fn collision(&self, new: &Product) -> Option<(Misuse, u32)> {
        let as_factor = new.factors.iter().find(|row| self.writing.has(**row));
        if let Some(row) = as_factor {
            return Some((Misuse::AccumulatorAsFactor, self.user(*row, |p| &*p.accumulators)?));
        }
        let over = new.accumulators.iter().find(|row| self.reading.has(**row));
        if let Some(row) = over {
            return Some((Misuse::WritesFactor, self.user(*row, |p| &p.factors)?));
        }
        if !new.accumulators.iter().any(|row| self.writing.has(*row)) {
            return None;
        }
        let others = self.under_way().filter(|p| !Arc::ptr_eq(&p.accumulators, &new.accumulators));
        let shares = |p: &&Product| p.accumulators.iter().any(|row| new.accumulators.contains(row));
        others.filter(shares).last().map(|p| (Misuse::SharesAccumulators, p.pc))
    }

    /// A product is issued.
    pub(crate) fn issue(&mut self, product: Product) {
        self.fenced = true;
        product.accumulators.iter().for_each(|row| self.writing.insert(*row));
        product.factors.iter().for_each(|row| self.reading.insert(*row));
        product.accumulators.iter().chain(&product.factors).for_each(|row| self.used.insert(*row));
        self.issued += 1;
        self.open.push(product);
    }

    /// `wgmma.wait_group`: the products that are done, but for the last `leave` groups.
    pub(crate) fn wait(&mut self, leave: usize, regs: &Registers) -> Vec<Product> {
        let done: Vec<Product> =
            self.groups.drain(..self.groups.len().saturating_sub(leave)).flatten().collect();
        if done.is_empty() {
            return done;
        }
        let (mut writing, mut reading) = (Rows::default(), Rows::default());
        for product in self.under_way() {
            product.accumulators.iter().for_each(|row| writing.insert(*row));
            product.factors.iter().for_each(|row| reading.insert(*row));
        }
        (self.writing, self.reading) = (writing, reading);
        if self.under_way().next().is_none() {
            self.fenced = false;
            self.kept = Some(self.used.iter().map(|row| (row, *regs.row(row))).collect());
        }
        done
    }

    fn under_way(&self) -> impl Iterator<Item = &Product> {
        self.groups.iter().flatten().chain(&self.open)
    }

    /// The last product that uses a row so.
    fn user(&self, row: u32, rows: impl Fn(&Product) -> &[u32]) -> Option<u32> {
        self.under_way().filter(|p| rows(p).contains(&row)).last().map(|p| p.pc)
    }

    /// An ordinary instruction of the frame that begins at row `base`: notes what it writes, and gives what it must not do yet.
    pub(crate) fn touch(&mut self, inst: &Inst, base: u32) -> Option<(Misuse, u32)> {
        let rows = |reg: &Reg| base + reg.slot..base + reg.slot + reg.width.rows();
        let (dsts, srcs) = inst.regs.split_at(usize::from(inst.dsts));
        let mut found = None;
        for row in dsts.iter().flat_map(rows) {
            self.written.insert(row);
            if self.writing.has(row) {
                found = Some((Misuse::WritesAccumulator, self.user(row, |p| &*p.accumulators)?));
            } else if self.reading.has(row) {
                found = Some((Misuse::WritesFactor, self.user(row, |p| &p.factors)?));
            }
        }
        if let Some(row) = srcs.iter().flat_map(rows).find(|row| self.writing.has(*row)) {
            found = Some((Misuse::ReadsAccumulator, self.user(row, |p| &*p.accumulators)?));
        }
        found
    }
}

impl Context<'_> {
    /// Reports a register that a product under way, issued at `pc`, uses.
    #[cold]
    pub(crate) fn misused(&mut self, misuse: Misuse, pc: u32) {
        self.finding(ErrorKind::Wgmma, u32::MAX, Some(pc), || {
            format!("{} of a wgmma that has not been waited for", misuse.describe())
        });
    }

    /// Reports pieces of factors that somebody stored and that no `fence.proxy.async` has made visible to products.
    pub(crate) fn needs_proxy_fence(&mut self, mask: u32, at: &[u64; LANES]) {
        let block = &mut *self.block;
        let (shadow, _) = block.shared.parts();
        let unseen = |lane: usize| Some((lane, shadow.unseen(&block.clocks, self.warp.id, at[lane], UNIT)?));
        let Some((lane, (who, pc))) = lanes(mask).find_map(unseen) else { return };
        let (at, who) = (at[lane], self.block.clocks.describe(who));
        self.finding(ErrorKind::AsyncRace, u32::MAX, Some(pc), || {
            format!("shared memory at {at:#x}: a wgmma reads what {who} stored, and no fence.proxy.async stands between")
        });
    }

    /// A product is under way. Its reads are its warpgroup's, until somebody waits for it.
    pub(crate) fn begin_product(&mut self, mut product: Product) {
        let (group, block) = (self.warp.id / WARPS, &mut *self.block);
        if self.launch.checks.race
            && let Some((party, clock)) = block.clocks.group_reads(group)
        {
            let (shadow, _) = block.shared.parts();
            for units in std::mem::take(&mut product.units).chunks(LANES) {
                let mut at = [0; LANES];
                at[..units.len()].copy_from_slice(units);
                let mask = (u64::MAX >> (64 - units.len())) as u32;
                let access = Access::read(UNIT as u32);
                // Who wrote there without order has been told.
                shadow.touch(&block.clocks, party, product.pc, mask, &at, &access, true, &Nothing);
            }
            block.products.entry((group, product.number)).or_default().clock = clock;
        }
        self.warp.products.issue(product);
    }

    /// A warp has waited for a product, and so for the parts of it that the other warps of its group computed.
    pub(crate) fn end_product(&mut self, product: Product) {
        let (warp, group, block) = (self.warp.id, self.warp.id / WARPS, &mut *self.block);
        if let Entry::Occupied(mut entry) = block.products.entry((group, product.number)) {
            let read = entry.get_mut();
            read.waited += 1;
            block.clocks.acquire_reads(warp, group, read.clock);
            if read.waited == WARPS {
                entry.remove();
            }
        }
    }
}
