//! Barriers of a block, within a warp and across a grid, and locks.

use ptxvm::error::ErrorKind;
use ptxvm::{Error, Launch, Options};

use crate::flow::{Kernel, each};

/// Runs under the usual schedule and under random ones; all must give `want` without any finding.
#[track_caller]
fn always(k: &Kernel, launch: &Launch, want: &[u32]) {
    for seed in [None, Some(1), Some(2), Some(3), Some(4)] {
        let options = Options { seed, budget: 60_000_000, ..Options::default() };
        let (got, _) = k
            .try_run(options, launch, want.len())
            .unwrap_or_else(|e| panic!("seed {seed:?}: {e}\n{}", k.text));
        assert_eq!(got, want, "seed {seed:?}\n{}", k.text);
    }
}

#[test]
fn a_barrier_orders_a_block() {
    let k = Kernel::new(
        "",
        "
    .shared .align 4 .b32 tile[1024];
    mov.u32 s, tile;
    mov.u32 n, %ntid.x;
    mov.u32 j, %tid.x;
    mad.lo.u32 t, j, 4, s;
    mov.u32 v, i;
    mov.u32 w, 0;
round:
    st.shared.u32 [t], v;
    bar.sync 0;
    sub.u32 m, n, j;
    sub.u32 m, m, 1;
    mad.lo.u32 m, m, 4, s;
    ld.shared.u32 m, [m];
    mad.lo.u32 v, v, 3, m;
    bar.sync 0;
    add.u32 w, w, 1;
    setp.lt.u32 p, w, 5;
    @p bra round;",
    );
    for threads in [32, 45, 256, 1000] {
        let mut want: Vec<u32> = Vec::new();
        for block in 0..2 {
            let mut v: Vec<u32> = (0..threads).map(|i| block * threads + i).collect();
            for _ in 0..5 {
                v = v.iter().zip(v.iter().rev()).map(|(a, b)| a.wrapping_mul(3).wrapping_add(*b)).collect();
            }
            want.extend(v);
        }
        always(&k, &Launch::linear(2, threads), &want);
    }
}

#[test]
fn lanes_reach_an_unaligned_barrier_separately() {
    // Two `barrier.sync` in the two sides of a branch: without `.aligned` each thread arrives for itself.
    let k = Kernel::new(
        "",
        "
    .shared .align 4 .b32 tile[96];
    mov.u32 s, tile;
    mad.lo.u32 t, i, 4, s;
    st.shared.u32 [t], i;
    and.b32 w, i, 3;
    setp.eq.u32 p, w, 0;
    @p bra other;
    barrier.sync 0;
    mov.u32 w, 1000;
    bra meet;
other:
    barrier.sync 0;
    mov.u32 w, 2000;
meet:
    sub.u32 t, 95, i;
    mad.lo.u32 t, t, 4, s;
    ld.shared.u32 v, [t];
    add.u32 v, v, w; // after",
    );
    let want = each(96, |i| 95 - i + if i % 4 == 0 { 2000 } else { 1000 });
    always(&k, &Launch::linear(1, 96), &want);
    let (_, report) = k.run(1, 96);
    assert_eq!(report.barriers, 1);
    assert_eq!(k.count(&report, "after"), (3, 96));
}

#[test]
fn the_aligned_barrier_of_a_full_warp_may_be_written_either_way() {
    for barrier in
        ["bar.sync 0;", "barrier.sync 0;", "barrier.sync.aligned 0;", "bar.cta.sync 0;", "bar.sync 3, 64;"]
    {
        let k = Kernel::new(
            "",
            &format!(
                "
    .shared .align 4 .b32 tile[64];
    mov.u32 s, tile;
    mad.lo.u32 t, i, 4, s;
    st.shared.u32 [t], i;
    {barrier}
    xor.b32 t, i, 63;
    mad.lo.u32 t, t, 4, s;
    ld.shared.u32 v, [t];"
            ),
        );
        always(&k, &Launch::linear(1, 64), &each(64, |i| i ^ 63));
    }
}

#[test]
fn reductions_at_a_barrier() {
    let k = Kernel::new(
        "",
        "
    rem.u32 t, i, 3;
    setp.eq.u32 p, t, 0;
    bar.red.popc.u32 v, 0, p;
    bar.red.popc.u32 w, 1, !p;
    mad.lo.u32 v, v, 1000, w;
    setp.lt.u32 q, i, 100;
    bar.red.and.pred r, 0, q;
    selp.u32 w, 1, 0, r;
    mad.lo.u32 v, v, 10, w;
    bar.red.and.pred r, 0, p;
    selp.u32 w, 1, 0, r;
    mad.lo.u32 v, v, 10, w;
    bar.red.or.pred r, 0, p;
    selp.u32 w, 1, 0, r;
    mad.lo.u32 v, v, 10, w;
    setp.gt.u32 q, i, 99;
    barrier.red.or.pred r, 0, q;
    selp.u32 w, 1, 0, r;
    mad.lo.u32 v, v, 10, w;",
    );
    always(&k, &Launch::linear(1, 100), &each(100, |_| (34 * 1000 + 66) * 10_000 + 1010));
}

#[test]
fn reductions_of_some_warps_at_a_named_barrier() {
    let k = Kernel::new(
        "",
        "
    shr.u32 w, i, 5;
    shr.u32 n, w, 1;
    add.u32 n, n, 1;        // warps 0 and 1 meet at barrier 1, 2 and 3 at barrier 2
    and.b32 t, i, 1;
    setp.eq.u32 p, t, 1;
    setp.ge.u32 q, i, 96;
    or.pred p, p, q;
    bar.red.popc.u32 v, n, 64, p;",
    );
    always(&k, &Launch::linear(1, 128), &each(128, |i| if i < 64 { 32 } else { 48 }));
}

/// Two warps produce, two consume, through two buffers with a barrier for full and for empty each.
#[test]
fn producers_and_consumers() {
    let k = Kernel::new(
        "",
        "
    .shared .align 4 .b32 ring[128];
    and.b32 j, i, 63;
    mov.u32 s, ring;
    mad.lo.u32 s, j, 4, s;
    mov.u32 n, 0;
    setp.ge.u32 p, i, 64;
    @p bra consumer;
produce:
    and.b32 t, n, 1;
    setp.lt.u32 q, n, 2;
    add.u32 w, t, 3;
    @q bra first;
    bar.sync w, 128;        // empty: 3 and 4
first:
    mad.lo.u32 m, t, 256, s;
    mad.lo.u32 w, n, 100, j;
    st.shared.u32 [m], w;
    add.u32 w, t, 1;
    bar.arrive w, 128;      // full: 1 and 2
    add.u32 n, n, 1;
    setp.lt.u32 q, n, 9;
    @q bra produce;
    ret;
consumer:
    xor.b32 s, j, 63;
    mov.u32 t, ring;
    mad.lo.u32 s, s, 4, t;
consume:
    and.b32 t, n, 1;
    add.u32 w, t, 1;
    bar.sync w, 128;
    mad.lo.u32 m, t, 256, s;
    ld.shared.u32 w, [m];
    mad.lo.u32 v, v, 3, w;
    setp.ge.u32 q, n, 7;    // the last two buffers are filled no more
    add.u32 w, t, 3;
    @q bra last;
    bar.arrive w, 128;
last:
    add.u32 n, n, 1;
    setp.lt.u32 q, n, 9;
    @q bra consume;",
    );
    let want = |i: u32| {
        if i < 64 {
            0
        } else {
            (0..9u32).fold(0u32, |v, n| v.wrapping_mul(3).wrapping_add(n * 100 + ((i & 63) ^ 63)))
        }
    };
    always(&k, &Launch::linear(1, 128), &each(128, want));
}

#[test]
fn threads_that_have_left_count_at_a_barrier() {
    // Of five warps one leaves as a whole, one in part, one has no full set of threads.
    let k = Kernel::new(
        "",
        "
    .shared .align 4 .b32 sum;
    setp.eq.u32 p, i, 0;
    @p st.shared.u32 [sum], 0;
    bar.sync 0;
    shr.u32 w, i, 5;
    setp.eq.u32 p, w, 1;
    @p ret;
    setp.eq.u32 p, w, 2;
    and.b32 t, i, 3;
    setp.eq.and.u32 p, t, 1, p;
    @p exit;
    red.shared.add.u32 [sum], 1;
    bar.sync 0;
    ld.shared.u32 v, [sum];
    bar.sync 0;
    add.u32 v, v, i;",
    );
    let left = |i: u32| i / 32 == 1 || (i / 32 == 2 && i % 4 == 1);
    let staying = (0..140).filter(|i| !left(*i)).count() as u32;
    always(&k, &Launch::linear(1, 140), &each(140, |i| if left(i) { 0 } else { staying + i }));
}

#[test]
fn a_lock_within_a_block() {
    // All threads of all warps of a block take a lock in turn.
    let k = Kernel::new(
        "",
        "
    .shared .align 4 .b32 lock;
    .shared .align 4 .b32 total;
    setp.eq.u32 p, i, 0;
    @p st.shared.u32 [lock], 0;
    @p st.shared.u32 [total], 0;
    bar.sync 0;
again:
    atom.acquire.cta.shared.cas.b32 w, [lock], 0, 1;
    setp.ne.u32 q, w, 0;
    @q bra again;
    ld.shared.u32 w, [total];
    add.u32 w, w, i;
    st.shared.u32 [total], w;
    atom.release.cta.shared.exch.b32 w, [lock], 0;
    bar.sync 0;
    ld.shared.u32 v, [total];",
    );
    always(&k, &Launch::linear(1, 40), &each(40, |_| 40 * 39 / 2));
}

const COOPERATIVE: Launch =
    Launch { grid: [6, 1, 1], block: [16, 1, 1], shared_bytes: 0, cooperative: true, cluster: None };

#[test]
fn a_lock_between_blocks() {
    let k = Kernel::new(
        ".global .align 4 .u32 lock;\n.global .align 4 .u32 total;",
        "
again:
    atom.acquire.gpu.global.cas.b32 w, [lock], 0, 1;
    setp.ne.u32 q, w, 0;
    @q bra again;
    ld.global.u32 w, [total];
    add.u32 w, w, 1;
    st.global.u32 [total], w;
    atom.release.gpu.global.exch.b32 t, [lock], 0;
    mov.u32 v, 1;
    setp.gt.u32 p, w, 96;
    @p mov.u32 v, 2;",
    );
    always(&k, &COOPERATIVE, &each(96, |_| 1));
}

/// A barrier of the whole grid, made of an atomic counter, as cooperative groups do it.
#[test]
fn a_barrier_of_the_grid() {
    let k = Kernel::new(
        ".global .align 4 .u32 arrived;\n.global .align 4 .b32 data[96];",
        "
    mov.u64 f, data;
    mad.wide.u32 a, i, 4, f;
    mov.u32 v, i;
    mov.u32 n, 0;
round:
    st.global.u32 [a], v;
    add.u32 n, n, 1;
    bar.sync 0;
    mov.u32 j, %tid.x;
    setp.ne.u32 p, j, 0;
    @p bra entered;
    membar.gl;
    mul.lo.u32 m, n, 6;
    atom.add.release.gpu.global.u32 w, [arrived], 1;
spin:
    ld.acquire.gpu.global.u32 w, [arrived];
    setp.lt.u32 q, w, m;
    @q bra spin;
    membar.gl;
entered:
    bar.sync 0;
    // What the block to the right has stored.
    add.u32 w, i, 16;
    rem.u32 w, w, 96;
    .reg .b64 c;
    mad.wide.u32 c, w, 4, f;
    ld.global.u32 w, [c];
    mad.lo.u32 v, v, 5, w;
    // A second barrier, before the data are overwritten.
    add.u32 n, n, 1;
    bar.sync 0;
    @p bra entered2;
    membar.gl;
    mul.lo.u32 m, n, 6;
    atom.add.release.gpu.global.u32 w, [arrived], 1;
spin2:
    ld.acquire.gpu.global.u32 w, [arrived];
    setp.lt.u32 q, w, m;
    @q bra spin2;
    membar.gl;
entered2:
    bar.sync 0;
    setp.lt.u32 q, n, 6;
    @q bra round;",
    );
    let mut want: Vec<u32> = (0..96).collect();
    for _ in 0..3 {
        want = (0..96).map(|i| want[i].wrapping_mul(5).wrapping_add(want[(i + 16) % 96])).collect();
    }
    always(&k, &COOPERATIVE, &want);
}

/// Block 5 works first and hands over to 4, and so on: each waits for a flag that the next block sets.
#[test]
fn blocks_hand_over_in_reverse_order() {
    let k = Kernel::new(
        ".global .align 4 .u32 turn;\n.global .align 4 .u32 log;",
        "
    mov.u32 t, %ctaid.x;
    sub.u32 n, 5, t;
wait:
    ld.acquire.gpu.global.u32 w, [turn];
    setp.lt.u32 p, w, n;
    @p bra wait;
    bar.sync 0;
    mov.u32 j, %tid.x;
    setp.eq.u32 p, j, 0;
    ld.global.u32 v, [log];
    bar.sync 0;
    mad.lo.u32 w, v, 10, t;
    @p st.global.u32 [log], w;
    add.u32 n, n, 1;
    @p st.release.gpu.global.u32 [turn], n;",
    );
    let log = |block: u32| (block + 1..6).rev().fold(0, |log, b| log * 10 + b);
    always(&k, &COOPERATIVE, &each(96, |i| log(i / 16)));
}

#[test]
fn a_grid_that_waits_for_itself_needs_a_cooperative_launch() {
    // Blocks of an ordinary launch may run one after another: the first waits for ever.
    let k = Kernel::new(
        ".global .align 4 .u32 arrived;",
        "
    atom.global.add.u32 w, [arrived], 1;
wait:
    ld.acquire.gpu.global.u32 v, [arrived];
    setp.lt.u32 p, v, 2;
    @p bra wait;",
    );
    let options = Options { budget: 100_000, ..Options::default() };
    let result = k.try_run(options.clone(), &Launch::linear(2, 1), 2);
    let Err(Error::Fault(findings)) = result else { panic!("{result:?}") };
    assert_eq!(findings[0].kind, ErrorKind::Budget);
    let launch = Launch { cooperative: true, ..Launch::linear(2, 1) };
    assert_eq!(k.try_run(options, &launch, 2).unwrap().0, [2, 2]);
}

#[test]
fn barriers_are_counted_when_they_open() {
    let k = Kernel::new(
        "",
        "
    mov.u32 n, 0;
loop:
    bar.sync 0;
    add.u32 n, n, 1;
    setp.lt.u32 p, n, 10;
    @p bra loop;
    bar.sync 1, 96;",
    );
    let (_, report) = k.run(3, 96);
    assert_eq!(report.barriers, 33);
}

/// Block b does a thing b + 1 times: the most and the least of each figure are the last block's and the first's, and of
/// a single block both are the launch's.
#[test]
fn what_a_block_does_is_counted() {
    let k = Kernel::new(
        "",
        "
    .shared .align 4 .b32 tile[64];
    mov.u32 s, tile;
    mov.u32 j, %tid.x;
    mad.lo.u32 s, j, 4, s;
    mov.u32 n, %ctaid.x;
round:
    st.shared.u32 [s], n;
    ld.global.u32 m, [b]; // loaded
    add.u32 v, v, m;
    setp.gt.u32 p, j, 15;
    @p bra over;
    add.u32 v, v, 1;
over:
    sub.u32 n, n, 1;
    setp.ge.s32 p, n, 0;
    @p bra round;",
    );
    // Others write `out` while blocks read its first word.
    let options = || Options { checks: ptxvm::Checks::NONE, ..Options::default() };
    let run = |blocks| k.try_run(options(), &Launch::linear(blocks, 64), 64 * blocks as usize).unwrap().1;
    let one = run(1);
    let all = (one.instructions().warps, one.shared.wavefronts, one.global.sectors);
    for block in [one.blocks.most, one.blocks.least] {
        assert_eq!((block.instructions, block.wavefronts, block.sectors), all);
    }
    let five = run(5);
    let (most, least) = (five.blocks.most, five.blocks.least);
    assert_eq!(least, one.blocks.least);
    // Two warps store once a round, and ask for one sector; at the end each asks for four.
    assert_eq!((most.wavefronts, most.sectors), (5 * 2, 5 * 2 + 8));
    let sum: u64 = (0..5)
        .map(|b| {
            let round = (most.instructions - least.instructions) / 4;
            least.instructions + b * round
        })
        .sum();
    assert_eq!(five.instructions().warps, sum);
}
