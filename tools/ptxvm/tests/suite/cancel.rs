//! `clusterlaunchcontrol`: every cluster's work is done exactly once, whoever does it, and which index an answer names.

use std::collections::BTreeSet;

use ptxvm::error::ErrorKind;
use ptxvm::{Arg, Error, Gpu, Launch, Module, Options, Report};

/// Blocks of 64 threads that take each other's places, in clusters. Each notes the index of the first block of every cluster whose
/// work it does in `done`, counted up by an atomic at `n`, with its own number in the grid.
fn worker(all: bool, vector: bool) -> String {
    // Rank 0 asks for the whole cluster, or each block for itself.
    let multicast = if all { ".multicast::cluster::all" } else { "" };
    let first = match vector {
        true => "clusterlaunchcontrol.query_cancel.get_first_ctaid.v4.b32.b128 {x, y, z, _}, answer;",
        false => {
            "clusterlaunchcontrol.query_cancel.get_first_ctaid::x.b32.b128 x, answer;\n\
             clusterlaunchcontrol.query_cancel.get_first_ctaid::y.b32.b128 y, answer;\n\
             clusterlaunchcontrol.query_cancel.get_first_ctaid::z.b32.b128 z, answer;"
        }
    };
    format!(
        ".version 8.6\n.target sm_100a\n.address_size 64\n\
         .visible .entry k(.param .u64 list, .param .u64 count)\n{{\n\
         .reg .b32 i, r, x, y, z, own, m, s, f, t;\n.reg .b64 d, n, a;\n.reg .b128 answer;\n.reg .pred p, asks, tells, q;\n\
         .shared .align 8 .b64 bar;\n.shared .align 16 .b8 place[16];\n\
         ld.param.u64 d, [list];\nld.param.u64 n, [count];\n\
         mov.u32 i, %tid.x;\nmov.u32 r, %cluster_ctarank;\nmov.u32 m, bar;\nmov.u32 s, place;\nmov.u32 f, 0;\n\
         setp.eq.u32 p, i, 0;\nsetp.eq.and.u32 tells, r, 0, p;\nmov.pred asks, {asks};\n\
         mov.u32 x, %clusterid.x;\nmov.u32 t, %cluster_nctaid.x;\nmul.lo.u32 x, x, t;\n\
         mov.u32 y, %clusterid.y;\nmov.u32 t, %cluster_nctaid.y;\nmul.lo.u32 y, y, t;\n\
         mov.u32 z, %clusterid.z;\nmov.u32 t, %cluster_nctaid.z;\nmul.lo.u32 z, z, t;\n\
         mov.u32 own, %ctaid.z;\nmov.u32 t, %nctaid.y;\nmul.lo.u32 own, own, t;\nmov.u32 t, %ctaid.y;\nadd.u32 own, own, t;\n\
         mov.u32 t, %nctaid.x;\nmul.lo.u32 own, own, t;\nmov.u32 t, %ctaid.x;\nadd.u32 own, own, t;\n\
         @p mbarrier.init.shared.b64 [m], 1;\n@p fence.mbarrier_init.release.cluster;\n\
         barrier.cluster.arrive;\nbarrier.cluster.wait;\n\
         next:\n@p mbarrier.arrive.expect_tx.shared.b64 _, [m], 16;\n\
         barrier.cluster.arrive;\nbarrier.cluster.wait;\n\
         @asks clusterlaunchcontrol.try_cancel.async.shared::cta.mbarrier::complete_tx::bytes{multicast}.b128 [s], [m];\n\
         @!tells bra waits;\natom.global.add.u32 t, [n], 1;\nmad.wide.u32 a, t, 16, d;\nst.global.v4.u32 [a], {{x, y, z, own}};\n\
         waits:\nmbarrier.try_wait.parity.acquire.cluster.shared.b64 q, [m], f;\n@!q bra waits;\n\
         ld.shared.b128 answer, [s];\nclusterlaunchcontrol.query_cancel.is_canceled.pred.b128 q, answer;\n@!q bra ends;\n\
         {first}\nxor.b32 f, f, 1;\nbarrier.cluster.arrive;\nbarrier.cluster.wait;\nbra next;\n\
         ends:\nbarrier.cluster.arrive;\nbarrier.cluster.wait;\nret;\n}}\n",
        asks = if all { "tells" } else { "p" },
    )
}

/// The clusters that were done, by the number of the block that did them, in the order in which they were.
fn done(
    text: &str,
    grid: [u32; 3],
    cluster: [u32; 3],
    options: Options,
    cooperative: bool,
) -> (Vec<(u32, [u32; 3])>, Report) {
    let mut gpu = Gpu::new(options);
    let module = gpu.load(&Module::load("cancel.ptx", text).unwrap()).unwrap();
    let most = grid.iter().product::<u32>() as usize;
    let (list, n) = (gpu.alloc(16 * most).unwrap(), gpu.alloc(4).unwrap());
    gpu.write(n, &[0; 4]).unwrap();
    let launch =
        Launch { grid, block: [64, 1, 1], cluster: Some(cluster), cooperative, ..Launch::linear(1, 1) };
    let report = gpu.launch(&module, "k", &launch, &[Arg::Ptr(list), Arg::Ptr(n)]);
    let report = report.unwrap_or_else(|e| panic!("{text}\n{e}"));
    let mut count = [0; 4];
    gpu.read(n, &mut count).unwrap();
    let mut bytes = vec![0; 16 * u32::from_le_bytes(count) as usize];
    gpu.read(list, &mut bytes).unwrap();
    let words: Vec<u32> = bytes.chunks(4).map(|c| u32::from_le_bytes(c.try_into().unwrap())).collect();
    (words.chunks(4).map(|w| (w[3], [w[0], w[1], w[2]])).collect(), report)
}

/// The first block of every cluster of a grid.
fn firsts(grid: [u32; 3], cluster: [u32; 3]) -> BTreeSet<[u32; 3]> {
    let mut all = BTreeSet::new();
    for z in (0..grid[2]).step_by(cluster[2] as usize) {
        for y in (0..grid[1]).step_by(cluster[1] as usize) {
            all.extend((0..grid[0]).step_by(cluster[0] as usize).map(|x| [x, y, z]));
        }
    }
    all
}

#[test]
fn every_cluster_is_done_once() {
    for (grid, cluster) in [
        ([1, 1, 1], [1, 1, 1]),
        ([2, 1, 1], [1, 1, 1]),
        ([11, 1, 1], [1, 1, 1]),
        ([3, 4, 5], [1, 1, 1]),
        ([8, 1, 1], [2, 1, 1]),
        ([6, 4, 2], [3, 2, 1]),
        ([2, 2, 6], [1, 2, 2]),
    ] {
        let blocks: u32 = cluster.iter().product();
        for (vector, seed) in
            [(false, None), (true, None), (true, Some(1)), (false, Some(2)), (false, Some(3))]
        {
            // A cluster of several is asked for once, and each of its blocks is told.
            let text = worker(blocks > 1, vector);
            let (got, _) = done(&text, grid, cluster, Options { seed, ..Options::default() }, false);
            let distinct: BTreeSet<[u32; 3]> = got.iter().map(|(_, first)| *first).collect();
            assert_eq!(distinct.len(), got.len(), "twice: {got:?}");
            assert_eq!(distinct, firsts(grid, cluster), "grid {grid:?}, clusters {cluster:?}, seed {seed:?}");
            // Without a seed a cluster is granted two others, and so every third one starts.
            if seed.is_none() {
                let started: BTreeSet<u32> = got.iter().map(|(by, _)| *by).collect();
                assert_eq!(started.len(), got.len().div_ceil(3), "{got:?}");
            }
        }
    }
    // Seeds differ in who does what.
    let text = worker(false, true);
    let run = |seed| {
        done(&text, [24, 1, 1], [1, 1, 1], Options { seed: Some(seed), ..Options::default() }, false).0
    };
    assert!((1..8).map(run).collect::<BTreeSet<_>>().len() > 4);
}

/// All blocks of a cooperative launch have started, so that there is none whose place another could take.
#[test]
fn a_cooperative_launch_cancels_nothing() {
    let text = worker(false, true);
    let (got, _) = done(&text, [7, 1, 1], [1, 1, 1], Options::default(), true);
    assert!(got.iter().all(|(by, [x, ..])| by == x), "{got:?}");
    assert_eq!(got.len(), 7);
}

#[test]
fn host_threads_change_nothing() {
    let text = worker(false, false);
    for seed in [None, Some(5)] {
        let run = |threads| {
            let (got, report) =
                done(&text, [40, 1, 1], [1, 1, 1], Options { threads, seed, ..Options::default() }, false);
            (got, format!("{:?}", report.classes), report.barriers)
        };
        let one = run(1);
        for threads in [2, 3, 8] {
            assert_eq!(run(threads), one, "{threads} threads");
        }
    }
}

/// Addresses without a space must lie in the block's own shared memory; the answer takes 16 bytes at a multiple of 16.
#[test]
fn where_an_answer_may_go() {
    let body = |address: &str, at: &str| {
        format!(
            ".version 8.6\n.target sm_100a\n.address_size 64\n.visible .entry k(.param .u64 global)\n{{\n\
             .reg .b64 a, m, g;\n.reg .pred p;\n.reg .b128 q;\n.shared .align 16 .b8 s[64];\n.local .align 16 .b8 l[32];\n\
             ld.param.u64 g, [global];\nmov.u64 a, {address};\n\
             cvta.shared.u64 m, s;\nmbarrier.init.b64 [m], 1;\nmbarrier.arrive.expect_tx.shared.b64 _, [s], 16;\n\
             clusterlaunchcontrol.try_cancel.async.mbarrier::complete_tx::bytes.b128 {at}, [m];\n\
             w:\nmbarrier.try_wait.parity.b64 p, [m], 0;\n@!p bra w;\nld.shared.b128 q, [s+16];\n\
             clusterlaunchcontrol.query_cancel.is_canceled.pred.b128 p, q;\nret;\n}}\n"
        )
    };
    for (address, at, wrong) in [
        ("s", "[m+16]", None),
        ("s", "[m+24]", Some(ErrorKind::Misaligned)),
        ("s", "[m+64]", Some(ErrorKind::OutOfBounds)),
        ("g", "[a]", Some(ErrorKind::WrongSpace)),
    ] {
        let text = body(address, at);
        let mut gpu = Gpu::new(Options::default());
        let module = gpu.load(&Module::load("cancel.ptx", &text).unwrap()).unwrap();
        let global = gpu.alloc(64).unwrap();
        let got = gpu.launch(&module, "k", &Launch::linear(1, 1), &[Arg::Ptr(global)]);
        match (wrong, got) {
            (None, got) => _ = got.unwrap_or_else(|e| panic!("{text}\n{e}")),
            (Some(kind), Err(Error::Fault(found))) => assert_eq!(found[0].kind, kind, "{at}: {found:#?}"),
            (wrong, got) => panic!("{at}: {wrong:?}, {got:?}"),
        }
    }
}
