//! Random kernels of the asynchronous instructions: `wgmma` with any descriptors, copies in bulk and by tensor maps that the
//! kernel changes, mbarriers, clusters. Mostly valid, rarely sensible.

use proptest::prelude::*;
use proptest::sample::select;

use super::soup;

const HEAD: &str = ".version 8.6
.target sm_90a
.address_size 64
.visible .entry k(.param .u64 in, .param .align 64 .b8 map[128], .param .u64 out)
{
    .reg .pred p, q, one;
    .reg .b16 h;
    .reg .b32 t, s, m, r, x, y, z, c, d<128>;
    .reg .f32 f;
    .reg .b64 a, b, da, db, w, pm;
    .shared .align 8 .b64 bar[4];
    .shared .align 128 .b8 copy[128];
    .shared .align 1024 .b8 tile[8192];
    mov.u32 t, %tid.x;
    mov.u32 m, bar;
    mov.u32 c, copy;
    mov.u32 s, tile;
    mad.lo.u32 r, t, 16, s;
    mov.u32 x, 0;
    mov.u32 y, 1;
    mov.u32 z, 2;
    mov.b16 h, 3;
    mov.f32 f, 0f3f800000;
    mov.b64 w, 0;
    ld.param.u64 a, [in];
    ld.param.u64 b, [out];
    mov.b64 pm, map;
    cvta.param.u64 pm, pm;
    setp.eq.u32 one, t, 0;
    setp.ne.u32 p, t, 5;
    setp.ne.u32 q, s, -1;
    @one mbarrier.init.shared.b64 [m], 1;
    @one mbarrier.init.shared.b64 [m+8], 2;
    st.shared.v4.b32 [r], {t, y, z, t};
    bar.sync 0;
";

/// The head's constants as registers, and numbers that are at the edge of something.
const NUMBERS: &[&str] =
    &["0", "1", "2", "7", "8", "16", "31", "32", "128", "256", "1024", "-1", "2147483647"];

fn number() -> impl Strategy<Value = &'static str> {
    select(NUMBERS)
}

/// An address in shared memory, mostly within the tile.
fn shared() -> impl Strategy<Value = String> {
    prop_oneof![
        8 => (0u32..64).prop_map(|n| format!("s+{}", n * 128)),
        2 => (0u32..520).prop_map(|n| format!("s+{}", n * 16)),
        1 => (-40i32..40).prop_map(|n| format!("m{n:+}")),
        1 => Just("c".to_owned()),
        1 => Just("r".to_owned()),
    ]
}

fn mbarrier() -> impl Strategy<Value = String> {
    prop_oneof![
        6 => select(&["m", "m+8"][..]).prop_map(str::to_owned),
        1 => select(&["m+16", "m+4", "m+32", "s", "x"][..]).prop_map(str::to_owned),
    ]
}

fn bytes() -> impl Strategy<Value = u32> {
    prop_oneof![6 => (1u32..16).prop_map(|n| n * 16), 1 => 0u32..4096, 1 => Just(u32::MAX)]
}

fn guard() -> impl Strategy<Value = &'static str> {
    prop_oneof![4 => Just("@one "), 2 => Just(""), 1 => Just("@p "), 1 => Just("@!one ")]
}

/// A matrix descriptor: three offsets, now and then a base offset, a swizzle.
fn descriptor() -> impl Strategy<Value = u64> {
    let field = || prop_oneof![6 => 0u64..65, 2 => 0u64..513, 1 => 0u64..0x4000];
    let base = prop_oneof![6 => Just(0u64), 1 => 0u64..8];
    let known = (field(), field(), field(), base, 0u64..4).prop_map(|(at, lead, step, base, swizzle)| {
        at | lead << 16 | step << 32 | base << 49 | swizzle << 62
    });
    prop_oneof![12 => known, 1 => any::<u64>()]
}

fn product() -> impl Strategy<Value = String> {
    const TYPES: &[(&str, &str, u32, usize)] = &[
        ("f32.f16.f16", "k16", 2, 2),
        ("f16.f16.f16", "k16", 4, 2),
        ("f32.bf16.bf16", "k16", 2, 2),
        ("f32.tf32.tf32", "k8", 2, 0),
        ("f32.e4m3.e5m2", "k32", 2, 0),
        ("f16.e5m2.e4m3", "k32", 4, 0),
        ("s32.s8.u8", "k32", 2, 9),
        ("s32.u8.u8", "k32", 2, 9),
    ];
    let signs = prop::collection::vec(select(&["1", "1", "1", "-1", "-1", "-1", "1", "0"][..]), 4);
    let shape = (select(TYPES), 1u32..33, any::<bool>(), any::<bool>());
    (shape, descriptor(), descriptor(), signs, prop::bool::weighted(0.95)).prop_map(
        |((ty, width, registers, not), da, db, signs, scaled)| {
            let (names, k, part, majors) = ty;
            let n = width * 8;
            let list = |n: u32, from: u32| {
                let all: Vec<String> = (0..n).map(|i| format!("d{}", (from + i) % 128)).collect();
                all.join(", ")
            };
            let a = if registers { format!("{{{}}}", list(4, n)) } else { "da".to_owned() };
            let scale = if not { "!q" } else { "q" };
            let mut rest = String::new();
            if majors != 9 {
                // A zero for a sign, or a minus for a transposition, is refused.
                rest += &format!(", {}, {}", signs[0], signs[1]);
                for sign in &signs[2..2 + majors.saturating_sub(usize::from(registers && majors > 0))] {
                    rest += if *sign == "-1" && !scaled { ", -1" } else if *sign == "1" { ", 1" } else { ", 0" };
                }
            }
            format!(
                "mov.b64 da, {da};\nmov.b64 db, {db};\nwgmma.mma_async.sync.aligned.m64n{n}{k}.{names} {{{}}}, {a}, db, {scale}{rest};\n",
                list(n / part, 0)
            )
        },
    )
}

fn copy() -> impl Strategy<Value = String> {
    const OPERATIONS: &[&str] = &[
        "add.u32",
        "add.f32",
        "add.noftz.f16",
        "add.u64",
        "min.s32",
        "max.bf16",
        "inc.u32",
        "xor.b32",
        "and.b64",
    ];
    let bulk = (0..4u8, guard(), shared(), bytes(), mbarrier(), select(OPERATIONS), 0u32..1200).prop_map(
        |(way, guard, at, n, bar, op, far)| match way {
            0 => format!(
                "{guard}cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [{at}], [a+{far}], {n}, [{bar}];\n"
            ),
            1 => format!("{guard}cp.async.bulk.global.shared::cta.bulk_group [b+{far}], [{at}], {n};\n"),
            2 => format!(
                "{guard}cp.reduce.async.bulk.global.shared::cta.bulk_group.{op} [b+{far}], [{at}], {n};\n"
            ),
            _ => format!(
                "mapa.shared::cluster.u32 x, s, {};\n{guard}cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [x], [{at}], {n}, [{bar}];\n",
                far % 3
            ),
        },
    );
    let places = prop::collection::vec(number(), 5);
    let maps = select(&["pm", "pm", "b", "a", "w"][..]);
    let tensor = (0..5u8, guard(), 1usize..6, maps, places, shared(), mbarrier()).prop_map(
        |(way, guard, rank, map, places, at, bar)| {
            // The test's own maps have two dimensions.
            let rank = if map == "pm" && rank > 3 { 2 } else { rank };
            let mut moves = String::new();
            for (i, n) in places.iter().enumerate() {
                moves += &format!("mov.u32 d{}, {n};\n", 120 + i);
            }
            let list: Vec<String> = (0..rank).map(|i| format!("d{}", 120 + i)).collect();
            let from = format!("[{map}, {{{}}}]", list.join(", "));
            moves
                + &match way {
                    0 | 1 => format!(
                        "{guard}cp.async.bulk.tensor.{rank}d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [{at}], {from}, [{bar}];\n"
                    ),
                    2 => format!("{guard}cp.async.bulk.tensor.{rank}d.global.shared::cta.tile.bulk_group {from}, [{at}];\n"),
                    3 => format!(
                        "{guard}cp.reduce.async.bulk.tensor.{rank}d.global.shared::cta.add.tile.bulk_group {from}, [{at}];\n"
                    ),
                    _ => format!("{guard}cp.async.bulk.prefetch.tensor.{rank}d.L2.global.tile {from};\n"),
                }
        },
    );
    prop_oneof![bulk, tensor]
}

/// A copy of the kernel's map with some fields changed, in shared memory and then behind `b`.
fn changed_map() -> impl Strategy<Value = String> {
    const FIELDS: &[(&str, bool, bool)] = &[
        ("global_address", false, true),
        ("rank", false, false),
        ("box_dim", true, false),
        ("global_dim", true, false),
        ("global_stride", true, true),
        ("element_stride", true, false),
        ("elemtype", false, false),
        ("interleave_layout", false, false),
        ("swizzle_mode", false, false),
        ("fill_mode", false, false),
    ];
    let change =
        (select(FIELDS), 0..6u8, number(), any::<bool>()).prop_map(|((name, numbered, wide), i, n, own)| {
            let place = if numbered { format!("{i}, ") } else { String::new() };
            let (ty, value) = match (wide, own) {
                (true, true) => ("b64", "a"),
                (true, false) => ("b64", "w"),
                _ => ("b32", "x"),
            };
            let moved =
                if value == "a" { String::new() } else { format!("mov.u32 x, {n};\ncvt.u64.u32 w, x;\n") };
            format!("{moved}@one tensormap.replace.tile.{name}.shared::cta.b1024.{ty} [c], {place}{value};\n")
        });
    prop::collection::vec(change, 0..5).prop_map(|changes| {
        let mut text = String::new();
        for i in 0..16 {
            text += &format!("@one ld.param.b64 w, [map+{}];\n@one st.shared.b64 [c+{}], w;\n", i * 8, i * 8);
        }
        text + &changes.concat()
            + "bar.sync 0;\ntensormap.cp_fenceproxy.global.shared::cta.tensormap::generic.release.gpu.sync.aligned [b], [c], 128;\nfence.proxy.tensormap::generic.acquire.gpu [b], 128;\n"
    })
}

fn instruction() -> impl Strategy<Value = String> {
    const PLAIN: &[&str] = &[
        "wgmma.fence.sync.aligned;\n",
        "wgmma.commit_group.sync.aligned;\n",
        "wgmma.wait_group.sync.aligned 0;\n",
        "wgmma.wait_group.sync.aligned 1;\n",
        "fence.proxy.async;\n",
        "fence.proxy.async.shared::cta;\n",
        "fence.mbarrier_init.release.cluster;\n",
        "cp.async.bulk.commit_group;\n",
        "cp.async.bulk.wait_group 0;\n",
        "cp.async.bulk.wait_group.read 1;\n",
        "bar.sync 0;\n",
        "bar.warp.sync -1;\n",
        "barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;\n",
        "barrier.cluster.arrive.relaxed.aligned;\n",
        "barrier.cluster.wait.aligned;\n",
        "setmaxnreg.dec.sync.aligned.u32 40;\n",
        "ld.shared.v4.b32 {d0, d1, d2, d3}, [r];\n",
        "st.shared.v4.b32 [r], {d0, t, d2, t};\n",
        "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {d0, d1, d2, d3}, [r];\n",
        "stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [r], {d0, t};\n",
        "mov.b32 d0, t;\nmov.b32 d1, t;\nmov.b32 d2, t;\nmov.b32 d3, t;\n",
        "mapa.shared::cluster.u32 x, s, 1;\nld.shared::cluster.b32 d4, [x];\n",
        "mapa.shared::cluster.u32 x, s, 0;\nst.shared::cluster.b32 [x], t;\n",
        "mapa.shared::cluster.u32 x, m, 1;\nmbarrier.arrive.release.cluster.shared::cluster.b64 _, [x];\n",
        "cp.async.ca.shared.global [r], [a], 16;\ncp.async.commit_group;\n",
        "cp.async.wait_all;\n",
        "@one bra over;\n",
    ];
    let barrier =
        (0..7u8, guard(), mbarrier(), bytes(), number()).prop_map(|(what, guard, at, n, k)| match what {
            0 => format!("{guard}mbarrier.init.shared.b64 [{at}], {k};\n"),
            1 => format!("{guard}mbarrier.arrive.expect_tx.shared.b64 _, [{at}], {n};\n"),
            2 => format!("{guard}mbarrier.arrive.shared.b64 w, [{at}];\n"),
            3 => format!("{guard}mbarrier.try_wait.parity.shared.b64 p, [{at}], {};\n", n % 2),
            4 => format!("{guard}mbarrier.inval.shared.b64 [{at}];\n"),
            5 => format!("{guard}mbarrier.complete_tx.relaxed.cta.shared::cta.b64 [{at}], {n};\n"),
            _ => format!("{guard}cp.async.mbarrier.arrive.noinc.shared.b64 [{at}];\n"),
        });
    let small = (guard(), number(), any::<bool>()).prop_map(|(guard, rank, adds)| {
        let store = if adds {
            "red.async.relaxed.cluster.shared::cluster.mbarrier::complete_tx::bytes.add.u32 [x], t, [y]"
        } else {
            "st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [x], t, [y]"
        };
        format!("mapa.shared::cluster.u32 x, r, {rank};\nmapa.shared::cluster.u32 y, m, {rank};\n{guard}{store};\n")
    });
    prop_oneof![
        6 => select(PLAIN).prop_map(str::to_owned),
        3 => product(),
        3 => copy(),
        3 => barrier,
        1 => small,
        1 => changed_map(),
    ]
}

/// Kernels of up to twelve such instructions, then up to two edits.
pub(crate) fn kernels() -> impl Strategy<Value = String> {
    let body = prop::collection::vec(instruction(), 1..12);
    let edits = prop_oneof![3 => Just(Vec::new()), 1 => prop::collection::vec(soup::edit(), 1..3)];
    (body, edits).prop_map(|(body, edits)| {
        let text = format!("{HEAD}{}over:\nst.global.b32 [b], t;\nret;\n}}\n", body.concat());
        if edits.is_empty() { text } else { soup::mutate(&text, &edits) }
    })
}
