//! The arena's books.

use std::collections::BTreeMap;

use bon_engine::device::arena::{ALIGN, Arena, SMALL};

use super::Random;

/// An arena over pieces at invented addresses, checked against a plain list of what is in use.
struct Checked {
    arena: Arena,
    /// Where the next piece will be, and all pieces.
    next: u64,
    pieces: Vec<(u64, u64)>,
    used: BTreeMap<u64, u64>,
}

impl Checked {
    fn new(base: u64) -> Self {
        Self { arena: Arena::default(), next: base, pieces: vec![], used: BTreeMap::new() }
    }

    fn alloc(&mut self, bytes: u64) -> u64 {
        let address = self.arena.alloc(bytes).unwrap_or_else(|| {
            let [liked, least] = self.arena.slab_for(bytes).unwrap();
            assert!(liked >= least && least >= bytes);
            self.arena.add(bytes, self.next, liked);
            self.pieces.push((self.next, liked));
            // Pieces touch each other: an allocation must not reach from one into the next.
            self.next += liked;
            self.arena.alloc(bytes).unwrap()
        });
        assert!(address.is_multiple_of(ALIGN));
        let inside = |(base, size): &(u64, u64)| *base <= address && address + bytes <= base + size;
        assert_eq!(
            self.pieces.iter().filter(|piece| inside(piece)).count(),
            1,
            "{bytes} bytes at {address:#x}"
        );
        let before = self.used.range(..=address).next_back();
        assert!(before.is_none_or(|(start, size)| start + size <= address), "overlaps what lies before");
        let after = self.used.range(address..).next();
        assert!(after.is_none_or(|(start, _)| address + bytes <= *start), "overlaps what lies behind");
        assert_eq!(self.arena.is_small(address), bytes <= SMALL);
        self.used.insert(address, bytes);
        address
    }

    fn free(&mut self, address: u64) {
        assert!(self.used.remove(&address).is_some());
        assert!(self.arena.free(address));
        assert!(!self.arena.free(address), "freed twice");
    }
}

/// Allocations of all sizes, freed in any order; returns addresses relative to the first piece.
fn churn(base: u64, seed: u64) -> Vec<u64> {
    let (mut arena, mut random) = (Checked::new(base), Random(seed));
    let mut addresses = Vec::new();
    for _ in 0..3000 {
        if arena.used.len() < 40 || random.below(2) == 0 {
            let bytes = 1 + random.next() % (1 << (1 + random.below(27)));
            addresses.push(arena.alloc(bytes) - base);
        } else {
            let which = random.below(arena.used.len() as u64) as usize;
            let address = *arena.used.keys().nth(which).unwrap();
            arena.free(address);
        }
        let asked: u64 = arena.used.values().sum();
        assert!((asked..asked + 256 * arena.used.len() as u64).contains(&arena.arena.used()));
    }
    let peak = arena.arena.peak();
    assert!(arena.arena.held() < 2 * peak, "{} held for a peak of {peak}", arena.arena.held());
    while let Some((&address, _)) = arena.used.iter().next() {
        arena.free(address);
    }
    // All is one again: every piece can be given back.
    assert_eq!(arena.arena.used(), 0);
    assert_eq!(arena.arena.drain_unused().len(), arena.pieces.len());
    assert_eq!(arena.arena.held(), 0);
    addresses
}

#[test]
fn the_arena_gives_no_byte_twice_and_decides_by_the_calls_alone() {
    for seed in 0..4 {
        assert_eq!(
            churn(1 << 33, seed),
            churn(7 << 40, seed),
            "seed {seed}: other addresses with other pieces"
        );
    }
}

#[test]
fn a_loop_that_gives_back_what_it_took_gets_the_same_addresses() {
    let mut arena = Checked::new(1 << 33);
    let kept: Vec<u64> = (1..20).map(|i| arena.alloc(i * 300_000)).collect();
    arena.free(kept[7]);
    arena.free(kept[3]);
    let mut round = || {
        let mut live = Vec::new();
        let mut addresses = Vec::new();
        for i in 0..200u64 {
            let address = arena.alloc(1 + i * 7919 % 3_000_000);
            addresses.push(address);
            live.push(address);
            if i % 3 == 0 {
                arena.free(live.remove((i as usize * 31) % live.len()));
            }
        }
        live.into_iter().for_each(|address| arena.free(address));
        addresses
    };
    // The first round may have had to get pieces.
    let second = (round(), round()).1;
    assert_eq!(second, round());
}

#[test]
fn the_arena_fills_the_tightest_hole_and_forgets_pieces_that_are_empty() {
    let mut arena = Checked::new(1 << 33);
    let mib = 1 << 20;
    let a: Vec<u64> = [4, 2, 8, 2, 3, 2].into_iter().map(|n| arena.alloc(n * mib)).collect();
    for hole in [0, 2, 4] {
        arena.free(a[hole]);
    }
    assert_eq!(arena.alloc(3 * mib), a[4], "the hole of 3 MiB, not of 4 or 8");
    assert_eq!(arena.alloc(3 * mib + 1), a[0]);
    assert!(arena.arena.drain_unused().is_empty());
    arena.free(a[1]);
    let merged = a[0] + 3 * mib + 256;
    assert_eq!(arena.alloc(10 * mib), merged, "what was left of 4 MiB, 2 and 8 are one hole");
    assert_eq!(arena.arena.alloc(u64::MAX), None);
    assert_eq!(arena.arena.slab_for(u64::MAX), None);
    assert!(!arena.arena.free(12345));
}
