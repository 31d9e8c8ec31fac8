//! Accesses to memory: space and allocation of each address, the checks, and the counters.

use super::blocks::LINE;
use super::buffer::Cell;
use super::global::Allocation;
use super::race::{Conflict, Releases, Stored};
use super::shared::Contents;
use super::traffic::{SECTOR, wavefronts};
use super::{lanes, pick};
use crate::error::ErrorKind;
use crate::machine::context::{Context, Stop};
use crate::machine::counters::MemoryCount;
use crate::machine::layout::{CONST_WINDOW, LOCAL_WINDOW, PARAM_WINDOW, SHARED_WINDOW, WINDOW_BYTES, region};
use crate::machine::options::Checks;
use crate::machine::registers::{LANES, Reg, Registers, Width};
use crate::types::Space;

/// How an access is ordered with others (PTX ISA, "Memory Consistency Model").
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Order {
    /// volatile, relaxed, acquire, release, or an atomic: it does not race with its like.
    pub(crate) strong: bool,
    /// `.volatile`, which compilers make of C++'s.
    pub(crate) volatile: bool,
    /// Later accesses of the warp see the writes that the releasing warp made before its release.
    pub(crate) acquire: bool,
    /// Earlier writes of the warp are visible to a warp that acquires this access's value.
    pub(crate) release: bool,
    /// Whether the scope reaches other blocks (`.gpu`, `.sys`).
    pub(crate) gpu: bool,
    /// Whether it reaches those of the cluster alone.
    pub(crate) cluster: bool,
}

/// The kind of an access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Act {
    /// It reads.
    Read,
    /// It writes.
    Write,
    /// Both at once, indivisibly.
    Atomic,
    /// The same as a compare-and-swap.
    Swap,
}

/// An access of a warp's lanes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Access {
    /// Bytes of each lane, all elements of a vector together.
    pub(crate) size: u64,
    /// Read, write or atomic.
    pub(crate) act: Act,
    /// How it is ordered.
    pub(crate) order: Order,
}

impl Access {
    /// A plain read.
    pub(crate) fn read(bytes: u32) -> Self {
        Self { size: u64::from(bytes), act: Act::Read, order: Order::default() }
    }

    /// A plain write.
    pub(crate) fn write(bytes: u32) -> Self {
        Self { size: u64::from(bytes), act: Act::Write, order: Order::default() }
    }

    /// Whether it writes.
    pub(crate) fn writes(&self) -> bool {
        self.act != Act::Read
    }
}

/// What a lane stores, from its address on.
pub(crate) type Value = [u8; 32];

/// The bytes of a lane's elements.
pub(crate) fn value<T: Cell>(elements: impl IntoIterator<Item = T>) -> Value {
    let mut bytes = [0; 32];
    for (at, element) in bytes.chunks_exact_mut(T::BYTES).zip(elements) {
        element.to_bytes(at);
    }
    bytes
}

/// What the lanes of an access store to shared memory, and what is there.
struct Values<'a, F> {
    /// What a lane stores; `None` of what is no plain store.
    value: F,
    at: &'a [u64; LANES],
    contents: Contents<'a>,
    checks: Checks,
}

impl<F: Fn(usize) -> Option<Value>> Stored for Values<'_, F> {
    fn same(&self, a: usize, b: usize) -> bool {
        (self.value)(a) == (self.value)(b)
    }

    fn held(&self, lane: usize, from: u64, bytes: u64) -> bool {
        let Some(value) = (self.value)(lane).filter(|_| !self.checks.repeated) else { return false };
        let (first, n) = ((from - self.at[lane]) as usize, bytes as usize);
        value[first..first + n] == self.contents.bytes[from as usize..][..n]
            && (!self.checks.init || self.contents.is_written(from, bytes))
    }
}

/// The addresses of a warp's access, summed up.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Span {
    /// The lowest.
    pub(crate) first: u64,
    /// The highest.
    pub(crate) last: u64,
    /// Whether the lanes touch consecutive places in the order of their numbers.
    pub(crate) run: bool,
}

impl Span {
    /// Of the lanes of `mask`, `size` bytes each.
    #[inline(always)]
    pub(crate) fn of(mask: u32, at: &[u64; LANES], size: u64) -> Self {
        if mask == u32::MAX {
            let start = at[0];
            let mut differ = 0;
            for i in 1..LANES {
                differ |= at[i].wrapping_sub(at[i - 1]) ^ size;
            }
            if differ == 0 && start < start.wrapping_add(31 * size) {
                return Self { first: start, last: start + 31 * size, run: true };
            }
            let (mut first, mut last) = (u64::MAX, 0);
            for a in at {
                first = first.min(*a);
                last = last.max(*a);
            }
            return Self { first, last, run: false };
        }
        if mask == 0 {
            return Self { first: 0, last: 0, run: false };
        }
        let (mut first, mut last, mut run) = (u64::MAX, 0u64, true);
        let low = mask.trailing_zeros() as usize;
        let start = at[low];
        for lane in lanes(mask) {
            first = first.min(at[lane]);
            last = last.max(at[lane]);
            run &= at[lane].wrapping_sub(start) == (lane - low) as u64 * size;
        }
        let dense = (mask >> low) & (mask >> low).wrapping_add(1) == 0;
        Self { first, last, run: run && dense }
    }

    /// Bytes from the first to behind the last access.
    #[inline(always)]
    fn bytes(&self, size: u64) -> u64 {
        (self.last - self.first).saturating_add(size)
    }
}

/// The lanes of an access that lie in one allocation.
pub(crate) struct Part<'m> {
    /// Where.
    pub(crate) allocation: &'m Allocation,
    /// Which.
    pub(crate) lanes: u32,
    /// Offset and length of the bytes that the lanes touch, where the bytes are consecutive.
    run: Option<(u64, u64)>,
}

impl Part<'_> {
    /// Lane 0's offset, if the bytes of all 32 lanes are consecutive in the order of the lanes.
    #[inline(always)]
    pub(crate) fn dense(&self) -> Option<usize> {
        self.run.filter(|_| self.lanes == u32::MAX).map(|(from, _)| from as usize)
    }

    /// Where a lane's address lies in the allocation.
    #[inline(always)]
    pub(crate) fn offset(&self, at: u64) -> u64 {
        at - self.allocation.start
    }

    /// Calls for each line that the lanes touch: its number in the allocation, and a bit for each of its bytes. Lanes that
    /// follow each other in a line are taken together.
    #[inline(always)]
    pub(crate) fn lines(&self, at: &[u64; LANES], size: u64, mut each: impl FnMut(u64, u64)) {
        let (mut line, mut bits) = (u64::MAX, 0);
        let mut range = |from: u64, bytes: u64| {
            let (mut from, end) = (from, from + bytes);
            while from < end {
                if from / LINE != line {
                    if bits != 0 {
                        each(line, bits);
                    }
                    (line, bits) = (from / LINE, 0);
                }
                let n = (end - from).min(LINE - from % LINE);
                bits |= (u64::MAX >> (64 - n)) << (from % LINE);
                from += n;
            }
        };
        match self.run {
            Some((from, bytes)) => range(from, bytes),
            None => lanes(self.lanes).for_each(|lane| range(self.offset(at[lane]), size)),
        }
        if bits != 0 {
            each(line, bits);
        }
    }

    /// The first of the lanes that touches a byte of the allocation.
    pub(crate) fn lane_of(&self, at: &[u64; LANES], size: u64, offset: u64) -> Option<usize> {
        lanes(self.lanes)
            .find(|lane| (self.offset(at[*lane])..self.offset(at[*lane]) + size).contains(&offset))
    }

    /// The addresses of the lanes that are left when this part is done.
    pub(crate) fn rest(&self, rest: u32, at: &[u64; LANES], size: u64) -> Span {
        Span { run: false, ..Span::of(rest & !self.lanes, at, size) }
    }

    /// The lanes whose `bytes` bytes from `skip` on somebody wrote.
    #[inline(always)]
    pub(crate) fn written(&self, at: &[u64; LANES], skip: u64, bytes: u64) -> u32 {
        let a = self.allocation;
        if a.all_written() || self.run.is_some_and(|(from, n)| a.is_written(from, n)) {
            return self.lanes;
        }
        pick(self.lanes, |lane| a.is_written(self.offset(at[lane]) + skip, bytes))
    }

    /// Notes that the lanes wrote `bytes` bytes each.
    #[inline(always)]
    pub(crate) fn set_written(&self, at: &[u64; LANES], bytes: u64) {
        if self.allocation.all_written() {
            return;
        }
        if let Some((from, n)) = self.run {
            return self.allocation.set_written(from, n);
        }
        for lane in lanes(self.lanes) {
            self.allocation.set_written(self.offset(at[lane]), bytes);
        }
    }
}

/// The lanes whose generic addresses lie in each space; a lane of no window is global.
pub(crate) fn by_space(mask: u32, at: &[u64; LANES]) -> [(Space, u32); 5] {
    let mut parts =
        [Space::Global, Space::Shared, Space::Local, Space::Const, Space::Param].map(|space| (space, 0));
    for lane in lanes(mask) {
        let window = match at[lane] & !(WINDOW_BYTES - 1) {
            SHARED_WINDOW => 1,
            LOCAL_WINDOW => 2,
            CONST_WINDOW => 3,
            PARAM_WINDOW => 4,
            _ => 0,
        };
        parts[window].1 |= 1 << lane;
    }
    parts
}

/// Addresses within the window of their space.
pub(crate) fn in_window(at: &[u64; LANES]) -> [u64; LANES] {
    at.map(|a| a & (WINDOW_BYTES - 1))
}

impl<'a> Context<'a> {
    /// Where the memory traffic of the running instruction is counted.
    #[inline(always)]
    fn count(&mut self) -> Option<&mut MemoryCount> {
        self.worker.counters.memory.get_mut(self.pc as usize)
    }

    /// The addresses of an access: a base register, of 32 or 64 bits or none, plus an offset. Reports uninitialised
    /// bases.
    #[inline(always)]
    pub(crate) fn addresses(&mut self, mask: u32, base: Reg, offset: i64) -> [u64; LANES] {
        let regs = &self.warp.regs;
        let mut at = [offset as u64; LANES];
        match base.width {
            Width::B64 => {
                let base = regs.get::<u64>(base);
                for i in 0..LANES {
                    at[i] = at[i].wrapping_add(base[i]);
                }
            }
            Width::None => {}
            _ => {
                // Addresses of 32 bits wrap: compilers fold negative parts of a sum into the base.
                let base = regs.get::<u32>(base);
                for i in 0..LANES {
                    at[i] = u64::from(base[i].wrapping_add(offset as u32));
                }
            }
        }
        self.need_defined(mask, base, "the address");
        at
    }

    /// Reports the lanes in which a register is uninitialised, at an instruction that may not use such a value.
    #[inline(always)]
    pub(crate) fn need_defined(&mut self, mask: u32, reg: Reg, what: &str) {
        let undefined = mask & !self.warp.regs.defined(reg);
        if undefined != 0 && self.launch.checks.init {
            self.report_undefined(undefined, what);
        }
    }

    /// Reports lanes in which the value that `what` names is uninitialised.
    #[cold]
    pub(crate) fn report_undefined(&mut self, lanes: u32, what: &str) {
        self.finding(ErrorKind::Uninitialized, lanes, None, || format!("{what} was never written"));
    }

    /// Refuses addresses that are no multiple of their size.
    #[inline(always)]
    pub(crate) fn aligned(&self, mask: u32, at: &[u64; LANES], size: u64) -> Result<(), Stop> {
        let odd = at.iter().fold(0, |all, a| all | a) & (size - 1);
        if odd == 0 { Ok(()) } else { self.misaligned(mask, at, size) }
    }

    #[cold]
    fn misaligned(&self, mask: u32, at: &[u64; LANES], size: u64) -> Result<(), Stop> {
        let odd = pick(mask, |lane| at[lane] & (size - 1) != 0);
        if odd == 0 {
            return Ok(());
        }
        let first = at[odd.trailing_zeros() as usize];
        Err(self.fault(ErrorKind::Misaligned, odd, format!("an access of {size} bytes at {first:#x}")))
    }

    // ------------------------------------------------------------------------------------------------- global

    /// Begins an access to global memory: alignment and counters.
    #[inline(always)]
    pub(crate) fn begin_global(
        &mut self,
        mask: u32,
        at: &[u64; LANES],
        access: &Access,
    ) -> Result<Span, Stop> {
        let span = Span::of(mask, at, access.size);
        if span.run {
            if span.first & (access.size - 1) != 0 {
                self.misaligned(mask, at, access.size)?;
            }
        } else {
            self.aligned(mask, at, access.size)?;
        }
        if self.launch.counters {
            self.count_global(mask, at, &span, access.size);
        }
        if access.order.strong && self.launch.checks.race {
            self.synchronise(mask, at, access, self.reaches(access.order), 0);
        }
        Ok(span)
    }

    pub(crate) fn count_global(&mut self, mask: u32, at: &[u64; LANES], span: &Span, size: u64) {
        let lanes_in = u64::from(mask.count_ones());
        let (sectors, distinct) = if span.run {
            let sectors = span.last.saturating_add(size - 1) / SECTOR - span.first / SECTOR + 1;
            (sectors, lanes_in * size)
        } else {
            let mut sorted = [0; LANES];
            let mut n = 0;
            for lane in lanes(mask) {
                sorted[n] = at[lane];
                n += 1;
            }
            let sorted = &mut sorted[..n];
            if !sorted.is_sorted() {
                sorted.sort_unstable();
            }
            // Addresses are multiples of the size, so that two are the same or do not overlap.
            let (mut sectors, mut distinct) = (0, 0);
            let mut last = None;
            for a in sorted {
                if last == Some(*a) {
                    continue;
                }
                distinct += size;
                let known = last.is_some_and(|last| last / SECTOR == *a / SECTOR);
                sectors += size.div_ceil(SECTOR) - u64::from(known);
                last = Some(*a);
            }
            (sectors, distinct)
        };
        self.block.work.sectors += sectors;
        if let Some(count) = self.count() {
            count.requests += 1;
            count.sectors += sectors;
            count.ideal_sectors += distinct.div_ceil(SECTOR);
            count.bytes += lanes_in * size;
        }
    }

    /// The lanes of `rest` that lie in the allocation of the first of them: checks bounds and races, and notes the
    /// sectors. To be called until no lane is left.
    #[inline(always)]
    pub(crate) fn global_part(
        &mut self,
        rest: u32,
        at: &[u64; LANES],
        span: &Span,
        access: &Access,
    ) -> Result<Part<'a>, Stop> {
        let memory = self.launch.memory;
        let size = access.size;
        let part = match memory.find(span.first, span.bytes(size)) {
            Some(allocation) => Part {
                allocation,
                lanes: rest,
                run: span.run.then(|| (span.first - allocation.start, span.bytes(size))),
            },
            None => self.scattered_part(rest, at, size)?,
        };
        if part.allocation.is_heap() {
            self.check_heap(&part, at, size)?;
        }
        self.part_checks(&part, at, access);
        if self.launch.checks.race && self.block.warps > 1 && !part.allocation.is_heap() {
            self.race_warps(&part, at, access);
        }
        Ok(part)
    }

    /// Notes the sectors of a part of an access and looks for races between blocks.
    #[inline(always)]
    fn part_checks(&mut self, part: &Part<'a>, at: &[u64; LANES], access: &Access) {
        let size = access.size;
        if let Some(sectors) = &part.allocation.sectors
            && self.launch.counters
        {
            let mut new = 0;
            let mut touch = |from: u64, bytes: u64| {
                let (from, to) = (from / SECTOR, (from + bytes - 1) / SECTOR);
                new += sectors.touch(access.writes(), self.launch.serial, from, to);
            };
            if let Some((from, bytes)) = part.run {
                touch(from, bytes);
            } else {
                lanes(part.lanes).for_each(|lane| touch(part.offset(at[lane]), size));
            }
            let unique = &mut self.worker.counters.unique_sectors;
            *if access.writes() { &mut unique.written } else { &mut unique.read } += new;
        }
        if self.launch.checks.race && self.launch.grid != [1, 1, 1] {
            self.race_global(part, at, access);
        }
    }

    /// Whether an order's scope reaches other blocks. That of a cluster counts as all where there are clusters.
    #[inline(always)]
    pub(crate) fn reaches(&self, order: Order) -> bool {
        order.gpu || order.cluster && self.block.cluster.is_some()
    }

    /// A strong access publishes the warp's clocks (release) and merges published ones into them (acquire); addresses count from
    /// `base`.
    fn synchronise(&mut self, mask: u32, at: &[u64; LANES], access: &Access, blocks: bool, base: u64) {
        let warp = self.warp.id;
        let (clocks, epochs) = (&mut self.block.clocks, &mut self.block.epochs);
        if access.order.release {
            clocks.fence(warp);
        }
        let mut last = None;
        for lane in lanes(mask) {
            if last == Some(at[lane]) {
                continue;
            }
            last = Some(at[lane]);
            if access.act != Act::Write {
                clocks.strong_read(warp, base + at[lane], access.order.acquire);
            }
            if access.act != Act::Read {
                clocks.strong_write(warp, base + at[lane]);
            }
        }
        if blocks {
            let releases = &self.launch.memory.releases;
            if access.order.release {
                Releases::fence(epochs);
            }
            if access.act != Act::Read {
                releases.strong_write(self.launch.serial, self.block.number as u32, epochs);
            }
            if access.act != Act::Write {
                // An atomic that reads counts as one that acquires; a load must, or be followed by a fence or a barrier.
                releases.strong_read(epochs, access.order.acquire || access.act != Act::Read);
            }
        }
    }

    /// One lane's read of `bytes` bytes (any number) of global memory: checks bounds and races.
    pub(crate) fn global_bytes(&mut self, lane: usize, address: u64, bytes: u64) -> Result<(), Stop> {
        self.global_piece(lane, address, bytes, &Access::read(1)).map(|_| ())
    }

    /// One lane's access to `bytes` bytes (any number), for which `access` stands but for its size.
    pub(crate) fn global_piece(
        &mut self,
        lane: usize,
        address: u64,
        bytes: u64,
        access: &Access,
    ) -> Result<Part<'a>, Stop> {
        let memory = self.launch.memory;
        let Some(allocation) = memory.find(address, bytes) else {
            let (kind, message) = memory.explain(address, bytes);
            return Err(self.fault(kind, 1 << lane, message));
        };
        let part = Part { allocation, lanes: 1 << lane, run: Some((address - allocation.start, bytes)) };
        if allocation.is_heap() {
            self.check_heap(&part, &[address; LANES], bytes)?;
        }
        self.part_checks(&part, &[address; LANES], &Access { size: bytes, ..*access });
        Ok(part)
    }

    #[inline(never)]
    fn scattered_part(&mut self, rest: u32, at: &[u64; LANES], size: u64) -> Result<Part<'a>, Stop> {
        let memory = self.launch.memory;
        let first = rest.trailing_zeros() as usize;
        let Some(allocation) = memory.find(at[first], size) else {
            let bad = pick(rest, |lane| memory.find(at[lane], size).is_none());
            let (kind, message) = memory.explain(at[first], size);
            return Err(self.fault(kind, bad, message));
        };
        let same = |lane: usize| memory.find(at[lane], size).is_some_and(|a| a.start == allocation.start);
        Ok(Part { allocation, lanes: pick(rest, same), run: None })
    }

    // ------------------------------------------------------------------------------------------------- shared

    /// Checks an access to shared memory (bounds, alignment, races) and counts its wavefronts. `value` is what a lane will
    /// store, if the access is a plain store.
    #[inline(always)]
    pub(crate) fn check_shared(
        &mut self,
        mask: u32,
        at: &[u64; LANES],
        access: &Access,
        value: impl Fn(&Registers, usize) -> Option<Value>,
    ) -> Result<Span, Stop> {
        let span = self.bound_shared(mask, at, access.size)?;
        if !self.meets_mbarrier(mask, at, access.size) && self.launch.checks.race {
            self.race_shared(mask, at, access, true, value);
        }
        Ok(span)
    }

    /// Whether an ordinary access touches the bytes of an mbarrier, which is reported.
    #[inline(always)]
    pub(crate) fn meets_mbarrier(&mut self, mask: u32, at: &[u64; LANES], size: u64) -> bool {
        let Some((lanes, object, pc)) = self.block.shared.mbarriers.touched(mask, at, size) else {
            return false;
        };
        self.finding(ErrorKind::Mbarrier, lanes, Some(pc), || {
            format!(
                "an ordinary access to the mbarrier at {object:#x} of shared memory, whose bytes are opaque"
            )
        });
        true
    }

    /// Checks bounds and alignment of an access to shared memory, and counts its passes.
    #[inline(always)]
    pub(crate) fn bound_shared(&mut self, mask: u32, at: &[u64; LANES], size: u64) -> Result<Span, Stop> {
        let span = Span::of(mask, at, size);
        self.aligned(mask, at, size)?;
        if self.launch.variables.len() > 1 {
            self.in_variables(mask, at, &span, size)?;
        } else {
            let have = self.block.shared.len();
            let within = |lane: usize| {
                at[lane].saturating_add(size) <= have || self.block.shared.is_reserved(at[lane], size)
            };
            if span.last.saturating_add(size) > have && !lanes(mask).all(within) {
                return Err(self.beyond(mask, at, size, have, "shared memory of the block"));
            }
        }
        if self.launch.counters {
            // Consecutive lanes never meet in a bank.
            let (passes, ideal) = if span.run && size <= 4 && span.first.is_multiple_of(4) {
                (1, 1)
            } else {
                wavefronts(mask, at, size as u32)
            };
            self.block.work.wavefronts += passes;
            if let Some(count) = self.count() {
                count.wavefronts += passes;
                count.ideal_wavefronts += ideal;
            }
        }
        Ok(span)
    }

    /// Looks for races between an access to shared memory and earlier ones; `note` as in `Shadow::touch`, `value` as in
    /// [`Context::check_shared`]. Gives whether an earlier one is not ordered.
    #[inline(always)]
    pub(crate) fn race_shared(
        &mut self,
        mask: u32,
        at: &[u64; LANES],
        access: &Access,
        note: bool,
        value: impl Fn(&Registers, usize) -> Option<Value>,
    ) -> bool {
        if access.order.strong {
            self.synchronise(mask, at, access, false, self.block.shown_base());
        }
        let block = &mut *self.block;
        let copying = block.shared.copying(mask, at, access.size);
        let reading = if access.writes() { block.shared.reading(mask, at, access.size) } else { None };
        let (party, pc) = (block.clocks.party(self.warp.id), self.pc);
        let (shadow, contents) = block.shared.parts();
        let stored =
            Values { value: |lane| value(&self.warp.regs, lane), at, contents, checks: self.launch.checks };
        let found = shadow.touch(&block.clocks, party, pc, mask, at, access, note, &stored);
        if let Some((lanes, by, pc)) = copying {
            let first = at[lanes.trailing_zeros() as usize];
            let (by, place) = (self.block.clocks.describe(by), self.block.place(first));
            self.finding(ErrorKind::AsyncRace, lanes, Some(pc), || {
                format!("{place}: a cp.async of {by} has not been waited for")
            });
        }
        if let Some((lanes, by, pc)) = reading {
            let first = at[lanes.trailing_zeros() as usize];
            let (by, place) = (self.block.clocks.describe(by), self.block.place(first));
            self.finding(ErrorKind::AsyncRace, lanes, Some(pc), || {
                format!("{place}: a bulk copy of {by} may still read it")
            });
        }
        if let Some(conflict) = &found {
            self.report_shared(conflict, at, access);
        }
        found.is_some_and(|c| !c.step)
    }

    #[cold]
    fn report_shared(&mut self, c: &Conflict, at: &[u64; LANES], access: &Access) {
        let (lane, warp) = (c.lane, self.warp.id);
        let verb = if access.writes() { "writes" } else { "reads" };
        let agent = self.block.clocks.is_agent(c.who);
        let (place, other) = (self.block.place(at[lane]), self.block.clocks.describe(c.who));
        let message = || {
            if agent && !c.wrote {
                return format!("{place}: lane {lane} of warp {warp} writes what a wgmma may still read");
            }
            if agent {
                return format!(
                    "{place}: lane {lane} of warp {warp} {verb} what an asynchronous copy wrote, and did not wait at its mbarrier"
                );
            }
            if c.step {
                return format!(
                    "{place}: lane {lane} of warp {warp} reads what {other} wrote, both `volatile`, and no __syncwarp stands \
                     between: lanes need not run in step"
                );
            }
            if c.same {
                return format!(
                    "{place}: lane {lane} of warp {warp} and {other} write different values at once"
                );
            }
            let did = if c.wrote { "wrote" } else { "read" };
            format!("{place}: lane {lane} of warp {warp} {verb} what {other} {did} without a barrier between")
        };
        let kind = match (agent, c.step) {
            (true, _) => ErrorKind::AsyncRace,
            (false, true) => ErrorKind::InStep,
            (false, false) => ErrorKind::SharedRace,
        };
        self.finding(kind, c.lanes, Some(c.pc), message);
    }

    /// The lanes whose `bytes` bytes from `skip` on somebody wrote.
    #[inline(always)]
    pub(crate) fn written_shared(&self, mask: u32, at: &[u64; LANES], skip: u64, bytes: u64) -> u32 {
        if !self.launch.checks.init {
            return mask;
        }
        pick(mask, |lane| self.block.shared.is_written(at[lane] + skip, bytes))
    }

    /// Marks the bytes that lanes wrote as initialised, in the lanes of `defined`: those whose value was.
    #[inline(always)]
    pub(crate) fn set_written_shared(
        &mut self,
        mask: u32,
        at: &[u64; LANES],
        skip: u64,
        bytes: u64,
        defined: u32,
    ) {
        if self.launch.checks.init {
            for lane in lanes(mask) {
                self.block.shared.set_written(at[lane] + skip, bytes, defined >> lane & 1 != 0);
            }
        }
    }

    // ------------------------------------------------------------------------------------------------- others

    #[cold]
    pub(crate) fn beyond(&self, mask: u32, at: &[u64; LANES], size: u64, have: u64, what: &str) -> Stop {
        let bad = pick(mask, |lane| at[lane].saturating_add(size) > have);
        let first = at[bad.trailing_zeros() as usize % LANES];
        if let Some(other) = region(first) {
            let message =
                format!("{size} bytes at {first:#x}, the generic address of {other}: not in the {what}");
            return self.fault(ErrorKind::WrongSpace, bad, message);
        }
        self.fault(
            ErrorKind::OutOfBounds,
            bad,
            format!("{size} bytes at {first:#x}: the {what} has {have} bytes"),
        )
    }

    /// Checks an access to the threads' local memory and counts it.
    pub(crate) fn check_local(&mut self, mask: u32, at: &[u64; LANES], size: u64) -> Result<(), Stop> {
        self.aligned(mask, at, size)?;
        let have = self.warp.local.bytes();
        if lanes(mask).any(|lane| at[lane].saturating_add(size) > have) {
            return Err(self.beyond(mask, at, size, have, "local memory of a thread"));
        }
        let gone = self.warp.local.dead(mask, at, size);
        if gone != 0 {
            let first = at[gone.trailing_zeros() as usize];
            let message = format!(
                "{size} bytes at {first:#x} of local memory, where no variable of the thread's functions lies"
            );
            return Err(self.fault(ErrorKind::OutOfBounds, gone, message));
        }
        if self.launch.counters {
            // A sector holds the same word of 8 neighbouring lanes.
            let uniform = lanes(mask).all(|lane| at[lane] / 4 == at[mask.trailing_zeros() as usize] / 4);
            let groups = (0..4).filter(|g| mask >> (g * 8) & 0xff != 0).count() as u64;
            let lanes_in = u64::from(mask.count_ones());
            let words = size.div_ceil(4);
            if let Some(count) = self.count() {
                count.requests += 1;
                count.bytes += lanes_in * size;
                count.sectors += if uniform { groups * words } else { lanes_in * words };
                count.ideal_sectors += (lanes_in * size).div_ceil(SECTOR);
            }
        }
        Ok(())
    }

    /// Checks an access to a bank of constants or parameters.
    pub(crate) fn check_bank(
        &self,
        mask: u32,
        at: &[u64; LANES],
        access: &Access,
        space: Space,
    ) -> Result<&'a [u8], Stop> {
        let (bank, what) = match space {
            Space::Const => (self.launch.constants, "constant bank of the module"),
            _ => (self.launch.params, "parameters of the kernel"),
        };
        if access.writes() {
            let first = at[mask.trailing_zeros() as usize];
            return Err(self.fault(
                ErrorKind::WrongSpace,
                mask,
                format!("a write at {first:#x} of the {what}"),
            ));
        }
        self.aligned(mask, at, access.size)?;
        let have = bank.len() as u64;
        if lanes(mask).any(|lane| at[lane].saturating_add(access.size) > have) {
            return Err(self.beyond(mask, at, access.size, have, what));
        }
        Ok(bank)
    }
}
