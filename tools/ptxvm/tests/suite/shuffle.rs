//! shfl, vote, match, redux, activemask, elect, against the pseudo-code of the ISA.

// A loop over lanes reads better as one, and vectorises, with an index into several rows.
#![allow(clippy::needless_range_loop, reason = "lanes are numbers in several arrays")]

use ptxvm::error::ErrorKind;

use crate::support::warp::{Random, Row, faults, run, run_one, undefined};

/// The ISA's pseudo-code for shfl, for one lane: source lane and predicate.
fn source(mode: &str, lane: i32, b: u32, c: u32) -> (usize, bool) {
    let bval = (b & 0x1f) as i32;
    let cval = (c & 0x1f) as i32;
    let mask = (c >> 8 & 0x1f) as i32;
    let max_lane = (lane & mask) | (cval & !mask);
    let min_lane = lane & mask;
    let (j, p) = match mode {
        "up" => (lane - bval, lane - bval >= max_lane),
        "down" => (lane + bval, lane + bval <= max_lane),
        "bfly" => (lane ^ bval, (lane ^ bval) <= max_lane),
        _ => {
            let j = min_lane | (bval & !mask);
            (j, j <= max_lane)
        }
    };
    (if p { j as usize } else { lane as usize }, p)
}

#[test]
fn shfl_reads_the_lane_that_the_pseudo_code_names() {
    let mut random = Random(1);
    for mode in ["up", "down", "bfly", "idx"] {
        let mut warps = Vec::new();
        // Segments of all widths, with the clamps that CUDA uses, and random ones; b random by lane, uniform, too large.
        for width in [1, 2, 4, 8, 16, 32] {
            for b in [0, 1, 3, 8, 16, 31, 33] {
                let clamp = if mode == "up" { 0 } else { 31 };
                let c = (32 - width) << 8 | clamp;
                warps.push(vec![random.row(), [b; 32], [c; 32]]);
                warps.push(vec![random.row(), random.row(), [c; 32]]);
            }
        }
        for _ in 0..20 {
            let c = random.next() as u32;
            warps.push(vec![random.row(), random.row(), [c; 32]]);
        }
        let body = format!(
            "shfl.sync.{mode}.b32 %out0|%p0, %in0, %in1, %in2, -1;\nselp.u32 %out1, 1, 0, %p0;\n\
             shfl.sync.{mode}.b32 %out2, %in0, %in1, %in2, 0xffffffff;\n"
        );
        for (w, out) in warps.iter().zip(run(&body, &warps, 3)) {
            for lane in 0..32 {
                let (from, p) = source(mode, lane as i32, w[1][lane], w[2][lane]);
                assert_eq!(
                    out[0][lane], w[0][from],
                    "{mode} lane {lane} b {} c {:x}",
                    w[1][lane], w[2][lane]
                );
                assert_eq!(
                    out[1][lane],
                    u32::from(p),
                    "{mode} lane {lane} b {} c {:x}",
                    w[1][lane],
                    w[2][lane]
                );
                assert_eq!(out[2][lane], out[0][lane]);
            }
        }
        // Constants take another way.
        for (b, c) in [(1, 31), (2, 0x1c1f), (16, 0), (5, 0x181f), (31, 31), (0, 0)] {
            let body =
                format!("shfl.sync.{mode}.b32 %out0|%p0, %in0, {b}, {c}, -1;\nselp.u32 %out1, 1, 0, %p0;\n");
            let a = random.row();
            let out = run_one(&body, &[a], 2);
            for lane in 0..32 {
                let (from, p) = source(mode, lane as i32, b, c);
                assert_eq!(
                    (out[0][lane], out[1][lane]),
                    (a[from], u32::from(p)),
                    "{mode} {b} {c:x} lane {lane}"
                );
            }
        }
    }
}

#[test]
fn shfl_from_a_lane_that_does_not_take_part_is_found() {
    let a: Row = std::array::from_fn(|i| i as u32);
    // The lower half exchanges with itself: fine. With distance 16 it reads the upper half, which is elsewhere.
    let body = |distance| {
        format!(
            "setp.lt.u32 %p1, %lane, 16;\nmov.u32 %out0, 0;\n@!%p1 bra SKIP;\n\
             shfl.sync.bfly.b32 %out0, %in0, {distance}, 31, 0xffff;\nSKIP:\n"
        )
    };
    let out = run_one(&body(8), &[a], 1);
    assert_eq!(out[0], std::array::from_fn(|i| if i < 16 { i as u32 ^ 8 } else { 0 }));
    // The results are undefined, and storing them is a finding, too.
    assert_eq!(faults(&body(16), &[a], 1), [ErrorKind::WarpMask, ErrorKind::Uninitialized]);
    assert_eq!(undefined_of_found(&body(16), &[a]), 0xffff);
    // A lane that runs it without being a member.
    for text in [
        "shfl.sync.bfly.b32 %out0, %in0, 1, 31, 0x7fffffff;\n",
        "vote.sync.ballot.b32 %out0, 1, 0x7fffffff;\n",
        "match.any.sync.b32 %out0, %in0, 0x7fffffff;\n",
        "redux.sync.or.b32 %out0, %in0, 0x7fffffff;\n",
        "elect.sync %out0|%p0, 0x7fffffff;\n",
    ] {
        assert_eq!(faults(text, &[a], 1), [ErrorKind::WarpMask], "{text}");
    }
}

/// The lanes of the `WarpMask` finding.
fn undefined_of_found(body: &str, inputs: &[Row]) -> u32 {
    match crate::support::warp::try_run(body, &[inputs.to_vec()], 1) {
        Err(ptxvm::Error::Fault(found)) => found[0].threads.as_ref().unwrap().lanes,
        other => panic!("{other:?}"),
    }
}

#[test]
fn half_warps_with_masks_of_their_own_in_one_instruction() {
    let mut random = Random(2);
    let a = random.row();
    let masks: Row = std::array::from_fn(|i| if i < 16 { 0xffff } else { 0xffff_0000 });
    let body = "shfl.sync.idx.b32 %out0, %in0, 3, 0x101f, %in1;\nredux.sync.add.u32 %out1, %in0, %in1;\n\
                setp.lt.s32 %p0, %in0, 0;\nvote.sync.ballot.b32 %out2, %p0, %in1;\n\
                elect.sync %out3|%p1, %in1;\nselp.u32 %out4, 1, 0, %p1;\n\
                match.any.sync.b32 %out5, %in1, %in1;\n";
    let out = run_one(body, &[a, masks], 6);
    for lane in 0..32 {
        let half = lane / 16 * 16;
        let range = half..half + 16;
        assert_eq!(out[0][lane], a[half + 3]);
        assert_eq!(out[1][lane], a[range.clone()].iter().fold(0u32, |s, x| s.wrapping_add(*x)));
        let ballot = range.fold(0, |all, i| all | a[i] >> 31 << i);
        assert_eq!(out[2][lane], ballot);
        assert_eq!((out[3][lane], out[4][lane]), (half as u32, u32::from(lane == half)));
        assert_eq!(out[5][lane], masks[lane]);
    }
}

#[test]
fn divergent_halves_each_for_itself() {
    let mut random = Random(3);
    let a = random.row();
    // Odd lanes and even lanes on two sides of a branch, each with its own mask.
    let body = "and.b32 %r0, %lane, 1;\nsetp.eq.u32 %p1, %r0, 0;\n@%p1 bra EVEN;\n\
                redux.sync.xor.b32 %out0, %in0, 0xaaaaaaaa;\nactivemask.b32 %out1;\n\
                shfl.sync.down.b32 %out2, %in0, 2, 31, 0xaaaaaaaa;\nbra.uni END;\n\
                EVEN:\nredux.sync.xor.b32 %out0, %in0, 0x55555555;\nactivemask.b32 %out1;\n\
                shfl.sync.down.b32 %out2, %in0, 2, 31, 0x55555555;\nEND:\n";
    let out = run_one(body, &[a], 3);
    for lane in 0..32 {
        let mine = (0..32).filter(|i| i % 2 == lane % 2);
        assert_eq!(out[0][lane], mine.fold(0, |all, i| all ^ a[i]));
        assert_eq!(out[1][lane], if lane % 2 == 0 { 0x5555_5555 } else { 0xaaaa_aaaa });
        assert_eq!(out[2][lane], a[if lane + 2 < 32 { lane + 2 } else { lane }]);
    }
}

#[test]
fn votes() {
    let mut random = Random(4);
    let rows: Vec<Vec<Row>> = [0, u32::MAX, 1, 0x8000_0000, 0xffff_fffe, 0x1234_5678]
        .into_iter()
        .chain((0..10).map(|_| random.next() as u32))
        .map(|bits| vec![std::array::from_fn(|lane| bits >> lane & 1)])
        .collect();
    for (mask, guard) in [(u32::MAX, ""), (0x00ff_ff00, "@%p7 ")] {
        for not in ["", "!"] {
            let mut body = format!(
                "setp.ne.u32 %p0, %in0, 0;\nshr.u32 %r0, {mask}, %lane;\nand.b32 %r0, %r0, 1;\nsetp.ne.u32 %p7, %r0, 0;\n\
                 mov.u32 %out0, 7;\nmov.u32 %out1, 7;\nmov.u32 %out2, 7;\nmov.u32 %out3, 7;\n"
            );
            for (i, mode) in ["all", "any", "uni"].into_iter().enumerate() {
                body += &format!(
                    "{guard}vote.sync.{mode}.pred %p1, {not}%p0, {mask};\n{guard}selp.u32 %out{i}, 1, 0, %p1;\n"
                );
            }
            body += &format!("{guard}vote.sync.ballot.b32 %out3, {not}%p0, {mask};\n");
            for (inputs, out) in rows.iter().zip(run(&body, &rows, 4)) {
                let members: Vec<usize> = (0..32).filter(|i| mask >> i & 1 != 0).collect();
                let yes = |i: &usize| (inputs[0][*i] != 0) != (not == "!");
                let count = members.iter().filter(|i| yes(i)).count();
                for lane in 0..32 {
                    let got = [0, 1, 2, 3].map(|i| out[i][lane]);
                    let want = if mask >> lane & 1 != 0 {
                        let ballot = members.iter().filter(|i| yes(i)).fold(0u32, |all, i| all | 1 << i);
                        let all = count == members.len();
                        [u32::from(all), u32::from(count > 0), u32::from(all || count == 0), ballot]
                    } else {
                        [7; 4]
                    };
                    assert_eq!(got, want, "{inputs:?} {mask:x} {not} lane {lane}");
                }
            }
        }
    }
}

#[test]
fn matches() {
    let mut random = Random(5);
    let mut warps: Vec<Vec<Row>> = Vec::new();
    for kinds in [1, 2, 3, 32] {
        warps.push((0..2).map(|_| std::array::from_fn(|_| (random.next() % kinds) as u32)).collect());
    }
    let body = "match.any.sync.b32 %out0, %in0, -1;\nmatch.all.sync.b32 %out1|%p0, %in0, -1;\n\
                selp.u32 %out2, 1, 0, %p0;\n.reg .b64 %q;\nmov.b64 %q, {%in0, %in1};\n\
                match.any.sync.b64 %out3, %q, -1;\nmatch.all.sync.b64 %out4|%p1, %q, -1;\nselp.u32 %out5, 1, 0, %p1;\n";
    for (w, out) in warps.iter().zip(run(body, &warps, 6)) {
        for lane in 0..32 {
            let same = |wide: bool| {
                (0..32)
                    .filter(|i| w[0][*i] == w[0][lane] && (!wide || w[1][*i] == w[1][lane]))
                    .fold(0u32, |all, i| all | 1 << i)
            };
            for (at, wide) in [(0, false), (3, true)] {
                let all = same(wide) == u32::MAX;
                assert_eq!(out[at][lane], same(wide));
                assert_eq!(out[at + 1][lane], if all { u32::MAX } else { 0 });
                assert_eq!(out[at + 2][lane], u32::from(all));
            }
        }
    }
}

#[test]
fn reductions() {
    let mut random = Random(6);
    let a = random.row();
    let fold = |f: &dyn Fn(i64, i64) -> i64, signed: bool| {
        let value = |x: u32| if signed { i64::from(x as i32) } else { i64::from(x) };
        a[4..20].iter().map(|x| value(*x)).reduce(f).unwrap() as u32
    };
    for (op, ty, want) in [
        ("add", "u32", fold(&|x, y| x + y, false)),
        ("add", "s32", fold(&|x, y| x + y, true)),
        ("min", "u32", fold(&|x, y| x.min(y), false)),
        ("max", "u32", fold(&|x, y| x.max(y), false)),
        ("min", "s32", fold(&|x, y| x.min(y), true)),
        ("max", "s32", fold(&|x, y| x.max(y), true)),
        ("and", "b32", fold(&|x, y| x & y, false)),
        ("or", "b32", fold(&|x, y| x | y, false)),
        ("xor", "b32", fold(&|x, y| x ^ y, false)),
    ] {
        let body = format!(
            "mov.u32 %out0, 0;\nsub.u32 %r0, %lane, 4;\nsetp.lt.u32 %p0, %r0, 16;\n\
             @%p0 redux.sync.{op}.{ty} %out0, %in0, 0x000ffff0;\n"
        );
        let out = run_one(&body, &[a], 1);
        assert_eq!(out[0], std::array::from_fn(|i| if (4..20).contains(&i) { want } else { 0 }), "{op}.{ty}");
    }
}

#[test]
fn undefined_inputs_make_undefined_what_depends_on_them() {
    let a: Row = [1; 32];
    let one = |body: &str, written: u32| undefined(body, &[a], &[written], 1)[0];
    assert_eq!(one("shfl.sync.bfly.b32 %out0, %in0, 16, 31, -1;\n", 0xffff_0000), 0xffff_0000);
    assert_eq!(one("shfl.sync.idx.b32 %out0, %in0, 5, 31, -1;\n", !(1 << 6)), 0);
    assert_eq!(one("shfl.sync.idx.b32 %out0, %in0, 5, 31, -1;\n", !(1 << 5)), u32::MAX);
    assert_eq!(one("shfl.sync.idx.b32 %out0, %lane, %in0, 31, -1;\n", !(1 << 5)), 1 << 5);
    assert_eq!(one("redux.sync.add.u32 %out0, %in0, -1;\n", !1), u32::MAX);
    assert_eq!(one("match.any.sync.b32 %out0, %in0, -1;\n", !1), u32::MAX);
    let vote = |mode: &str, compare: &str| {
        format!(
            "setp.{compare}.u32 %p0, %in0, 1;\nvote.sync.{mode}.pred %p1, %p0, -1;\nselp.u32 %out0, 1, 0, %p1;\n"
        )
    };
    // A known yes decides `any`, a known no decides `all`, and neither decides the other.
    assert_eq!(one(&vote("any", "eq"), !1), 0);
    assert_eq!(one(&vote("any", "ne"), !1), u32::MAX);
    assert_eq!(one(&vote("all", "ne"), !1), 0);
    assert_eq!(one(&vote("all", "eq"), !1), u32::MAX);
    assert_eq!(one(&vote("uni", "eq"), !1), u32::MAX);
    assert_eq!(one("setp.eq.u32 %p0, %in0, 1;\nvote.sync.ballot.b32 %out0, %p0, -1;\n", !1), u32::MAX);
}

#[test]
fn what_is_not_built_is_refused() {
    for (text, kind) in [
        ("shfl.bfly.b32 %out0, %in0, 1, 31;", ErrorKind::Unsupported),
        ("redux.sync.add.f32 %out0, %in0, -1;", ErrorKind::Unsupported),
        ("redux.sync.xor.f32 %out0, %in0, -1;", ErrorKind::Unsupported),
        ("redux.sync.add.b32 %out0, %in0, -1;", ErrorKind::Unsupported),
        ("shfl.sync.bfly.b64 %out0, %in0, 1, 31, -1;", ErrorKind::Invalid),
        ("elect.sync %out0, -1;", ErrorKind::Invalid),
        ("match.any.sync.b32 %out0|%p0, %in0, -1;", ErrorKind::Invalid),
    ] {
        assert_eq!(faults(text, &[[0; 32]], 1), [kind], "{text}");
    }
}
