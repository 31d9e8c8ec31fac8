//! The same launch gives the same bits and the same report, however many host threads run it.

use std::fmt::Write as _;

use ptxvm::error::ErrorKind;
use ptxvm::{Error, Launch, Options, Report};

use crate::flow::Kernel;

/// A kernel, how it is launched, and whether its results are independent of the order of threads.
struct Case {
    name: &'static str,
    functions: &'static str,
    body: &'static str,
    launch: Launch,
    any_order: bool,
}

/// Words of `out`: one for each thread, and some behind them for sums.
const SUMS: usize = 16;

fn cases() -> Vec<Case> {
    let case = |name, blocks, threads, any_order, functions, body| Case {
        name,
        functions,
        body,
        launch: Launch::linear(blocks, threads),
        any_order,
    };
    let mut all = vec![
        case("arithmetic", 37, 45, true, "", "    mad.lo.u32 v, i, 2654435761, i;\n    xor.b32 v, v, i;"),
        case(
            "loops of different length",
            23,
            64,
            true,
            "",
            "
    rem.u32 n, i, 29;
loop:
    mad.lo.u32 v, v, 33, n;
    setp.eq.u32 p, n, 0;
    sub.u32 n, n, 1;
    @!p bra loop;",
        ),
        case(
            "shared memory and barriers",
            19,
            96,
            true,
            "",
            "
    .shared .align 4 .b32 tile[96];
    mov.u32 j, %tid.x;
    mov.u32 s, tile;
    mad.lo.u32 t, j, 4, s;
    mul.lo.u32 w, i, 7;
    st.shared.u32 [t], w;
    bar.sync 0;
    sub.u32 w, 95, j;
    mad.lo.u32 t, w, 4, s;
    ld.shared.u32 v, [t];",
        ),
        case(
            "mbarriers and bulk copies",
            19,
            96,
            true,
            "",
            "
    .shared .align 8 .b64 bar;
    .shared .align 16 .b32 tile[192];
    mov.u32 j, %tid.x;
    mov.u32 m, bar;
    mov.u32 s, tile;
    mad.lo.u32 t, j, 4, s;
    setp.eq.u32 p, j, 0;
    @p mbarrier.init.shared.b64 [m], 96;
    bar.sync 0;
    mul.lo.u32 w, i, 7;
    st.shared.u32 [t], w;
    fence.proxy.async;
    mbarrier.arrive.shared.b64 a, [m];
first:
    mbarrier.try_wait.shared.b64 q, [m], a;
    @!q bra first;
    @p mbarrier.arrive.expect_tx.shared.b64 a, [m], 384;
    @p cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [s+384], [s], 384, [m];
    @!p mbarrier.arrive.shared.b64 a, [m];
second:
    mbarrier.try_wait.parity.shared.b64 q, [m], 1;
    @!q bra second;
    sub.u32 w, 191, j;
    mad.lo.u32 t, w, 4, s;
    ld.shared.u32 v, [t];",
        ),
        case(
            "integer sums by red",
            50,
            64,
            true,
            ".global .align 4 .u32 sum;",
            "
    red.global.add.u32 [sum], i;
    red.global.max.u32 [b+12800], i;
    and.b32 t, i, 7;
    mad.wide.u32 a, t, 4, b;
    red.global.add.u32 [a+12820], i;
    mov.u32 v, i;",
        ),
        case(
            "tickets",
            50,
            40,
            false,
            ".global .align 4 .u32 counter;",
            "    atom.global.add.u32 v, [counter], 1;",
        ),
        case(
            "float sums by red",
            40,
            64,
            false,
            "",
            "
    .reg .f32 g;
    cvt.rn.f32.u32 g, i;
    add.f32 g, g, 0f3f800000;
    rcp.rn.f32 g, g;
    red.global.add.f32 [b+10240], g;
    mov.u32 v, i;",
        ),
        case(
            "float sums by atom, with what was there before",
            40,
            64,
            false,
            ".global .align 4 .f32 sum;",
            "
    .reg .f32 g;
    cvt.rn.f32.u32 g, i;
    add.f32 g, g, 0f3f800000;
    rcp.rn.f32 g, g;
    atom.global.add.f32 g, [sum], g;
    mov.b32 v, g;",
        ),
        case(
            "float sums in shared memory",
            30,
            128,
            false,
            "",
            "
    .reg .f32 g;
    .shared .align 4 .f32 sum;
    mov.u32 j, %tid.x;
    setp.eq.u32 p, j, 0;
    @p st.shared.u32 [sum], 0;
    bar.sync 0;
    cvt.rn.f32.u32 g, i;
    sqrt.rn.f32 g, g;
    red.shared.add.f32 [sum], g;
    bar.sync 0;
    ld.shared.u32 v, [sum];",
        ),
        case(
            "double sums by compare and swap",
            12,
            32,
            false,
            ".global .align 8 .f64 total;",
            "
    .reg .f64 x, y;
    .reg .b64 old, new, seen;
    cvt.rn.f64.u32 x, i;
    sqrt.rn.f64 x, x;
    ld.relaxed.gpu.global.b64 seen, [total];
again:
    mov.b64 old, seen;
    mov.b64 y, old;
    add.rn.f64 y, y, x;
    mov.b64 new, y;
    atom.relaxed.gpu.global.cas.b64 seen, [total], old, new;
    setp.ne.u64 p, seen, old;
    @p bra again;
    cvt.u32.u64 v, new;",
        ),
        case(
            "maximum by compare and swap",
            12,
            64,
            true,
            "",
            "
    mad.lo.u32 w, i, 40503, 77;
    and.b32 w, w, 65535;
    ld.relaxed.gpu.global.u32 s, [b+3072];
again:
    setp.ge.u32 p, s, w;
    @p bra done;
    mov.u32 t, s;
    atom.relaxed.gpu.global.cas.b32 s, [b+3072], t, w;
    setp.ne.u32 p, s, t;
    @p bra again;",
        ),
        case(
            "the last block sums up",
            24,
            32,
            true,
            ".global .align 4 .u32 tickets;\n.global .align 4 .b32 parts[24];",
            "
    redux.sync.add.u32 w, i, 0xffffffff;
    mov.u32 j, %tid.x;
    mov.u32 t, %ctaid.x;
    mov.u64 f, parts;
    mad.wide.u32 a, t, 4, f;
    setp.eq.u32 p, j, 0;
    @!p bra skip;
    st.global.u32 [a], w;
    membar.gl;
    atom.global.add.u32 n, [tickets], 1;
skip:
    shfl.sync.idx.b32 n, n, 0, 31, 0xffffffff;
    setp.ne.u32 q, n, 23;
    @q bra done;
    membar.gl;
    setp.lt.u32 q, j, 24;
    mad.wide.u32 a, j, 4, f;
    mov.u32 w, 0;
    @q ld.global.u32 w, [a];
    redux.sync.add.u32 w, w, 0xffffffff;
    @p st.global.u32 [b+3072], w;",
        ),
        case(
            "printf",
            9,
            40,
            true,
            ".extern .func (.param .b32 r) vprintf(.param .b64 f, .param .b64 a);
.global .align 1 .b8 line[] = {116, 104, 114, 101, 97, 100, 32, 37, 117, 10, 0};",
            "
    .local .align 8 .b32 args[2];
    rem.u32 t, i, 5;
    setp.ne.u32 p, t, 0;
    @p bra done;
    st.local.u32 [args], i;
    {
        .param .b64 f0;
        .param .b64 a0;
        .param .b32 r0;
        mov.u64 f, line;
        st.param.b64 [f0], f;
        mov.u64 a, args;
        cvta.local.u64 a, a;
        st.param.b64 [a0], a;
        call (r0), vprintf, (f0, a0);
        ld.param.b32 v, [r0];
    }",
        ),
        // Findings, in many blocks.
        case("races", 40, 32, false, ".global .align 4 .u32 cell;", "    st.global.u32 [cell], i;\n    mov.u32 v, 1;"),
        case(
            "races in shared memory",
            40,
            64,
            false,
            "",
            "    .shared .align 4 .b32 cell;\n    st.shared.u32 [cell], i;\n    mov.u32 v, 1;",
        ),
        case(
            "uninitialised values",
            31,
            64,
            true,
            "",
            "    and.b32 t, i, 63;\n    setp.gt.u32 p, t, 20;\n    setp.gt.and.u32 p, i, 300, p;\n    @p mov.u32 w, i;
    mov.u32 v, w;",
        ),
        case("faults", 60, 32, true, "", "    sub.u32 t, i, 700;\n    div.u32 v, i, t;"),
        case(
            "faults and findings before them",
            60,
            32,
            true,
            "",
            "    mad.wide.u32 a, i, 4, b;\n    st.global.u32 [a], w;\n    setp.gt.u32 p, i, 900;\n    @p trap;",
        ),
    ];
    all.push(Case {
        name: "a ring of a cluster",
        functions: "",
        body: "
    .reg .b32 rank, far;
    .shared .align 4 .b32 tile[64];
    mov.u32 j, %tid.x;
    mov.u32 s, tile;
    mad.lo.u32 t, j, 4, s;
    mul.lo.u32 w, i, 5;
    st.shared.u32 [t], w;
    barrier.cluster.arrive;
    barrier.cluster.wait;
    mov.u32 rank, %cluster_ctarank;
    add.u32 rank, rank, 1;
    rem.u32 rank, rank, 4;
    mapa.shared::cluster.u32 far, t, rank;
    red.shared::cluster.add.u32 [far], j;
    barrier.cluster.arrive;
    barrier.cluster.wait;
    ld.shared.u32 v, [t];",
        launch: Launch { cluster: Some([4, 1, 1]), ..Launch::linear(12, 64) },
        any_order: true,
    });
    all.push(Case {
        name: "a barrier of the grid",
        functions: ".global .align 4 .u32 arrived;",
        body: "
    bar.sync 0;
    mov.u32 j, %tid.x;
    setp.ne.u32 p, j, 0;
    @p bra entered;
    atom.add.release.gpu.global.u32 w, [arrived], 1;
spin:
    ld.acquire.gpu.global.u32 w, [arrived];
    setp.lt.u32 q, w, 8;
    @q bra spin;
entered:
    bar.sync 0;
    mad.lo.u32 v, i, 3, 1;",
        launch: Launch { cooperative: true, ..Launch::linear(8, 64) },
        any_order: true,
    });
    all
}

type Outcome = Result<(Vec<u32>, Report), Error>;

fn run(case: &Case, threads: usize, seed: Option<u64>) -> Outcome {
    let k = Kernel::new(case.functions, case.body);
    let words = (case.launch.grid[0] * case.launch.block[0]) as usize + SUMS;
    k.try_run(Options { threads, seed, ..Options::default() }, &case.launch, words)
}

/// An outcome less what host threads may change: which blocks and warps were the first to show a race between blocks, and how often.
fn settled(outcome: Outcome) -> Outcome {
    outcome.map_err(|error| match error {
        Error::Fault(mut findings) => {
            for f in findings.iter_mut().filter(|f| f.kind == ErrorKind::GlobalRace) {
                (f.threads, f.count) = (None, 1);
                f.message.clear();
            }
            Error::Fault(findings)
        }
        other => other,
    })
}

#[test]
fn results_and_reports_do_not_depend_on_host_threads() {
    for case in cases() {
        let want = run(&case, 1, None);
        for threads in [1, 2, 3, 8] {
            for repeat in 0..3 {
                let got = run(&case, threads, None);
                let same = match threads {
                    1 => got == want,
                    _ => settled(got.clone()) == settled(want.clone()),
                };
                assert!(same, "{}, {threads} threads, run {repeat}:\n{}", case.name, told(&got, &want));
            }
        }
    }
}

/// With a seed the schedule is random, and yet the same for the same seed.
#[test]
fn a_seed_fixes_the_schedule() {
    for case in cases() {
        for seed in [1, 99] {
            let want = run(&case, 1, Some(seed));
            for threads in [2, 8] {
                let got = run(&case, threads, Some(seed));
                let same = settled(got.clone()) == settled(want.clone());
                assert!(same, "{}, seed {seed}, {threads} threads:\n{}", case.name, told(&got, &want));
            }
        }
    }
}

#[test]
fn what_does_not_depend_on_order_is_the_same_under_every_schedule() {
    for case in cases().iter().filter(|case| case.any_order) {
        let want = run(case, 1, None);
        for seed in 0..20 {
            let got = run(case, 2, Some(seed));
            let same = match (&got, &want) {
                (Ok((got, _)), Ok((want, _))) => got == want,
                // Of several warps that fail, one fails first.
                (Err(_), Err(_)) => true,
                _ => false,
            };
            assert!(same, "{}, seed {seed}:\n{}", case.name, told(&got, &want));
        }
    }
}

/// The cases are worth their names: those that end well do, and the others find what they are about.
#[test]
fn cases_do_what_they_are_called() {
    let fails = [
        "races",
        "races in shared memory",
        "uninitialised values",
        "faults",
        "faults and findings before them",
    ];
    for case in cases() {
        let outcome = run(&case, 1, None);
        match outcome {
            Ok((words, report)) => {
                assert!(!fails.contains(&case.name), "{} ends well", case.name);
                assert!(words.iter().any(|w| *w != 0), "{} writes nothing", case.name);
                assert_eq!(report.printed.is_empty(), case.name != "printf");
            }
            Err(e) => assert!(fails.contains(&case.name), "{}: {e}", case.name),
        }
    }
    // Sums of floating point do depend on the order: a schedule shows it.
    let sums = cases().into_iter().find(|case| case.name == "float sums in shared memory").unwrap();
    let words = |seed| run(&sums, 1, seed).unwrap().0;
    assert!((0..20).any(|seed| words(Some(seed)) != words(None)), "all schedules give the same sums");
}

fn told(got: &Outcome, want: &Outcome) -> String {
    let mut text = String::new();
    match (got, want) {
        (Ok((a, ra)), Ok((b, rb))) => {
            let differ = a.iter().zip(b).enumerate().filter(|(_, (a, b))| a != b);
            for (i, (a, b)) in differ.take(5) {
                writeln!(text, "out[{i}] = {a} instead of {b}").unwrap();
            }
            if ra != rb {
                writeln!(text, "{ra:?}\ninstead of\n{rb:?}").unwrap();
            }
        }
        _ => writeln!(text, "{got:?}\ninstead of\n{want:?}").unwrap(),
    }
    text
}
