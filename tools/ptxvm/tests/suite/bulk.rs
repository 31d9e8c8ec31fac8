//! cp.async.bulk: what is moved and when, and its reductions against definitions of their own.

use ptxvm::error::ErrorKind;
use ptxvm::{Checks, Options};

use crate::support::ptx::Kernel;
use crate::support::warp::Random;

/// One thread: %r3 is `s`, whose first 8 bytes are an mbarrier of one arrival.
const HEAD: &str = "mov.u32 %r3, s;\nmbarrier.init.shared.b64 [%r3], 1;\n";
const WAIT: &str = "w:\nmbarrier.try_wait.parity.shared.b64 %p1, [%r3], 0;\n@!%p1 bra w;\n";

/// Copies `n` bytes between global and shared memory by 4 bytes a time.
fn words(n: usize, shared: usize, base: &str, load: bool) -> String {
    (0..n / 4)
        .map(|i| match load {
            true => format!(
                "ld.global.u32 %r5, [{base}+{}];\nst.shared.u32 [%r3+{}], %r5;\n",
                4 * i,
                shared + 4 * i
            ),
            false => format!(
                "ld.shared.u32 %r5, [%r3+{}];\nst.global.u32 [{base}+{}], %r5;\n",
                shared + 4 * i,
                4 * i
            ),
        })
        .collect()
}

fn random_bytes(random: &mut Random, n: usize) -> Vec<u8> {
    (0..n).map(|_| random.next() as u8).collect()
}

#[test]
fn bytes_move_in_all_directions() {
    let mut random = Random(7);
    for n in [16, 32, 48, 240, 1024] {
        let data = random_bytes(&mut random, n);
        let expect = format!("mbarrier.arrive.expect_tx.shared.b64 _, [%r3], {n};\n");
        let fill = words(n, 1024, "%rd1", true) + "fence.proxy.async;\n";
        let store = format!(
            "cp.async.bulk.global.shared::cta.bulk_group [%rd2], [%r3+1024], {n};\ncp.async.bulk.commit_group;\n\
             cp.async.bulk.wait_group 0;\n"
        );
        let bodies = [
            format!(
                "{expect}cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r3+1024], [%rd1], {n}, [%r3];\n{WAIT}{}",
                words(n, 1024, "%rd2", false)
            ),
            format!(
                "createpolicy.fractional.L2::evict_last.b64 %rd5, 1.0;\nmov.u16 %h1, 1;\n{expect}\
                 cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster.L2::cache_hint \
                 [%r3+1024], [%rd1], {n}, [%r3], %h1, %rd5;\n{WAIT}{}",
                words(n, 1024, "%rd2", false)
            ),
            format!("cp.async.bulk.prefetch.L2.global [%rd1], {n};\n{fill}{store}"),
            format!(
                "{fill}{expect}cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%r3+2048], [%r3+1024], {n}, [%r3];\n{WAIT}{}",
                words(n, 2048, "%rd2", false)
            ),
            // Loaded by one copy and stored by another: no ordinary access, no fence.
            format!(
                "{expect}cp.async.bulk.shared::cta.global.mbarrier::complete_tx::bytes [%r3+1024], [%rd1], {n}, [%r3];\n{WAIT}{store}"
            ),
        ];
        for body in bodies {
            let mut k = Kernel::new(&format!("{HEAD}{body}"));
            let (a, b) = (k.upload("in", &data), k.gpu.alloc(n).unwrap());
            k.ok(1, 1, &[a.0, b.0]);
            assert_eq!(k.read(b, n), data, "{body}");
        }
    }
}

#[test]
fn bytes_land_when_they_are_waited_for() {
    // Without checks: the old contents before, the new ones behind.
    let body = format!(
        "{HEAD}st.shared.u32 [%r3+64], 5;\nmbarrier.arrive.expect_tx.shared.b64 _, [%r3], 16;\n\
         cp.async.bulk.shared::cta.global.mbarrier::complete_tx::bytes [%r3+64], [%rd1], 16, [%r3];\n\
         ld.shared.u32 %r6, [%r3+64];\n{WAIT}ld.shared.u32 %r7, [%r3+64];\nst.global.v2.u32 [%rd2], {{%r6, %r7}};\n\
         fence.proxy.async;\ncp.async.bulk.global.shared::cta.bulk_group [%rd2+16], [%r3+64], 16;\n\
         cp.async.bulk.commit_group;\nst.shared.u32 [%r3+64], 6;\nld.global.u32 %r8, [%rd2+16];\n\
         cp.async.bulk.wait_group.read 0;\nst.shared.u32 [%r3+64], 7;\nld.global.u32 %r9, [%rd2+16];\n\
         cp.async.bulk.wait_group 0;\nld.global.u32 %r10, [%rd2+16];\nst.global.v2.u32 [%rd2+32], {{%r8, %r9}};\n\
         st.global.u32 [%rd2+40], %r10;\n"
    );
    let mut k = Kernel::with(&body, Options { checks: Checks::NONE, ..Options::default() });
    let (a, b) = (k.words("in", &[11, 12, 13, 14]), k.words("out", &[99; 12]));
    k.ok(1, 1, &[a.0, b.0]);
    let got = k.read_words(b, 12);
    assert_eq!((&got[..2], &got[4..8], &got[8..11]), (&[5, 11][..], &[6, 12, 13, 14][..], &[99, 99, 6][..]));
}

#[test]
fn groups_end_in_order() {
    // Three groups of one copy each; with two left, the first has been read and written.
    let copy = |i: usize| {
        format!(
            "cp.async.bulk.global.shared::cta.bulk_group [%rd2+{}], [%r3+{}], 16;\ncp.async.bulk.commit_group;\n",
            16 * i,
            1024 + 16 * i
        )
    };
    for leave in 0..4 {
        let body = format!(
            "{HEAD}{}fence.proxy.async;\n{}{}{}cp.async.bulk.wait_group {leave};\nld.global.u32 %r6, [%rd2];\n\
             ld.global.u32 %r7, [%rd2+16];\nld.global.u32 %r8, [%rd2+32];\nst.global.u32 [%rd3], %r6;\n\
             st.global.u32 [%rd3+4], %r7;\nst.global.u32 [%rd3+8], %r8;\ncp.async.bulk.wait_group 0;\n",
            words(48, 1024, "%rd1", true),
            copy(0),
            copy(1),
            copy(2)
        );
        let mut k = Kernel::new(&body);
        let data: Vec<u32> = (1..13).collect();
        let (a, b, c) = (k.words("in", &data), k.words("out", &[0; 12]), k.words("seen", &[9; 3]));
        k.ok(1, 1, &[a.0, b.0, c.0]);
        assert_eq!(k.read_words(b, 12), data);
        let done = 3usize.saturating_sub(leave);
        let want: Vec<u32> = (0..3).map(|i| if i < done { data[4 * i] } else { 0 }).collect();
        assert_eq!(k.read_words(c, 3), want, "{leave} left");
    }
}

/// A reduction: how it is written, bytes of an element, and its definition on the bits of one; `None` where several results are
/// right.
type Rule = fn(u64, u64) -> Option<u64>;

fn half(bits: u64, bf16: bool) -> f64 {
    let bits = bits as u32 & 0xffff;
    if bf16 {
        return f64::from(f32::from_bits(bits << 16));
    }
    let (sign, exponent, fraction) = (bits >> 15, bits >> 10 & 31, f64::from(bits & 0x3ff));
    let size = match exponent {
        0 => fraction * 2f64.powi(-24),
        31 if fraction == 0.0 => f64::INFINITY,
        31 => f64::NAN,
        e => (1024.0 + fraction) * 2f64.powi(e as i32 - 25),
    };
    if sign == 1 { -size } else { size }
}

/// The half nearest to a number, ties to the even one: looked for among all.
fn nearest(x: f64, bf16: bool) -> Option<u64> {
    if x.is_nan() {
        return None;
    }
    let largest = if bf16 { half(0x7f7f, true) } else { half(0x7bff, false) };
    let ulp = if bf16 { 2f64.powi(120) } else { 32.0 };
    if x.abs() >= largest + ulp / 2.0 {
        let infinity = if bf16 { 0x7f80 } else { 0x7c00 };
        return Some(infinity | if x < 0.0 { 0x8000 } else { 0 });
    }
    let top = if bf16 { 0x7f7fu64 } else { 0x7bff };
    let (mut low, mut high) = (0u64, top);
    while low < high {
        let middle = (low + high).div_ceil(2);
        if half(middle, bf16) <= x.abs() { low = middle } else { high = middle - 1 }
    }
    let (below, above) = (half(low, bf16), half((low + 1).min(top), bf16));
    let (down, up) = (x.abs() - below, above - x.abs());
    let up = low < top && (up < down || up == down && low % 2 == 1);
    let sign = if x < 0.0 || x == 0.0 && x.is_sign_negative() { 0x8000 } else { 0 };
    Some((low + u64::from(up)) | sign)
}

fn extreme(a: u64, b: u64, bf16: bool, max: bool) -> Option<u64> {
    let (x, y) = (half(a, bf16), half(b, bf16));
    match (x.is_nan(), y.is_nan()) {
        (true, true) => None,
        (true, false) => Some(b),
        (false, true) => Some(a),
        _ if x == y && x == 0.0 => Some(if max { a & b } else { a | b }),
        _ => Some(if (x < y) != max { a } else { b }),
    }
}

const RULES: [(&str, u64, Rule); 26] = [
    ("add.u32", 4, |a, b| Some((a + b) & 0xffff_ffff)),
    ("add.s32", 4, |a, b| Some((a + b) & 0xffff_ffff)),
    ("add.u64", 8, |a, b| Some((u128::from(a) + u128::from(b)) as u64)),
    ("inc.u32", 4, |a, b| Some(if a < b { a + 1 } else { 0 })),
    ("dec.u32", 4, |a, b| Some(if (1..=b).contains(&a) { a - 1 } else { b })),
    ("min.u32", 4, |a, b| Some(if a < b { a } else { b })),
    ("max.u32", 4, |a, b| Some(if a < b { b } else { a })),
    ("min.s32", 4, |a, b| Some(if (a as i32) < b as i32 { a } else { b })),
    ("max.s32", 4, |a, b| Some(if (a as i32) < b as i32 { b } else { a })),
    ("and.b32", 4, |a, b| Some(!(!a | !b))),
    ("or.b32", 4, |a, b| Some(!(!a & !b))),
    ("xor.b32", 4, |a, b| Some((a | b) & !(a & b))),
    // From here on to global memory alone.
    ("and.b64", 8, |a, b| Some(!(!a | !b))),
    ("or.b64", 8, |a, b| Some(!(!a & !b))),
    ("xor.b64", 8, |a, b| Some((a | b) & !(a & b))),
    ("min.u64", 8, |a, b| Some(if a < b { a } else { b })),
    ("max.u64", 8, |a, b| Some(if a < b { b } else { a })),
    ("min.s64", 8, |a, b| Some(if (a as i64) < b as i64 { a } else { b })),
    ("max.s64", 8, |a, b| Some(if (a as i64) < b as i64 { b } else { a })),
    ("add.f64", 8, |a, b| {
        Some(f64::from_bits(a) + f64::from_bits(b)).filter(|x| !x.is_nan()).map(f64::to_bits)
    }),
    ("add.noftz.f16", 2, |a, b| nearest(half(a, false) + half(b, false), false)),
    // The sum of two bf16 is exact in f64 unless they are far apart; the nearest is then the larger all the same.
    ("add.noftz.bf16", 2, |a, b| nearest(half(a, true) + half(b, true), true)),
    ("min.f16", 2, |a, b| extreme(a, b, false, false)),
    ("max.f16", 2, |a, b| extreme(a, b, false, true)),
    ("min.bf16", 2, |a, b| extreme(a, b, true, false)),
    ("max.bf16", 2, |a, b| extreme(a, b, true, true)),
];
/// How many of them work on shared memory as well.
const SHARED_RULES: usize = 12;

fn elements(bytes: &[u8], size: u64) -> Vec<u64> {
    let one = |b: &[u8]| b.iter().rev().fold(0, |all, b| all << 8 | u64::from(*b));
    bytes.chunks(size as usize).map(one).collect()
}

fn check(name: &str, size: u64, rule: Rule, old: &[u8], new: &[u8], got: &[u8]) {
    let all = [old, new, got].map(|bytes| elements(bytes, size));
    for (i, got) in all[2].iter().enumerate() {
        let (a, b) = (all[0][i], all[1][i]);
        if let Some(want) = rule(a, b) {
            let mask = u64::MAX >> (64 - 8 * size);
            assert_eq!(*got, want & mask, "{name} of {a:#x} and {b:#x}");
        }
    }
}

#[test]
fn reductions() {
    let mut random = Random(8);
    for (i, (name, size, rule)) in RULES.iter().enumerate() {
        for round in 0..6 {
            let (mut old, new) = (random_bytes(&mut random, 256), random_bytes(&mut random, 256));
            if round == 0 {
                old.copy_from_slice(&new);
            }
            let fill = words(256, 1024, "%rd1", true);
            let body = format!(
                "{HEAD}{fill}fence.proxy.async;\ncp.reduce.async.bulk.global.shared::cta.bulk_group.{name} [%rd2], [%r3+1024], 256;\n\
                 cp.async.bulk.commit_group;\ncp.async.bulk.wait_group 0;\n"
            );
            let mut k = Kernel::new(&body);
            let (a, b) = (k.upload("in", &new), k.upload("out", &old));
            k.ok(1, 1, &[a.0, b.0]);
            check(name, *size, *rule, &old, &new, &k.read(b, 256));
            if i >= SHARED_RULES {
                continue;
            }
            let body = format!(
                "{HEAD}{fill}{}fence.proxy.async;\nmbarrier.arrive.expect_tx.shared.b64 _, [%r3], 256;\n\
                 cp.reduce.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes.{name} [%r3+2048], [%r3+1024], 256, [%r3];\n\
                 {WAIT}{}",
                words(256, 2048, "%rd2", true),
                words(256, 2048, "%rd2", false)
            );
            let mut k = Kernel::new(&body);
            let (a, b) = (k.upload("in", &new), k.upload("out", &old));
            k.ok(1, 1, &[a.0, b.0]);
            check(name, *size, *rule, &old, &new, &k.read(b, 256));
        }
    }
    // Subnormal numbers count as zeros in sums of f32.
    let (old, new) = ([1.5f32, 1e-40, 3e38, -1e-40], [2.25f32, 1e-40, 3e38, 1.0]);
    let body = format!(
        "{HEAD}{}fence.proxy.async;\ncp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%rd2], [%r3+1024], 16;\n\
         cp.async.bulk.commit_group;\ncp.async.bulk.wait_group 0;\n",
        words(16, 1024, "%rd1", true)
    );
    let mut k = Kernel::new(&body);
    let (a, b) = (k.words("in", &new.map(f32::to_bits)), k.words("out", &old.map(f32::to_bits)));
    k.ok(1, 1, &[a.0, b.0]);
    assert_eq!(k.read_words(b, 4), [3.75f32, 0.0, f32::INFINITY, 1.0].map(f32::to_bits));
}

/// Values of registers, and what they do to the words that are there.
#[test]
fn small_stores_and_reductions() {
    let stores = "st.async.shared::cluster.mbarrier::complete_tx::bytes.u32 [%r3+64], %r10, [%r3];\n\
        st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.b32 [%r3+72], {%r11, %r12}, [%r3];\n\
        st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.b64 [%r3+80], {%rd10, %rd11}, [%r3];\n\
        st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%r3+96], {%f1, %f2, %f3, %f4}, [%r3];\n\
        red.async.relaxed.cluster.shared::cluster.mbarrier::complete_tx::bytes.add.u32 [%r3+112], 5, [%r3];\n\
        red.async.relaxed.cluster.shared::cluster.mbarrier::complete_tx::bytes.add.u64 [%r3+120], %rd10, [%r3];\n\
        red.async.relaxed.cluster.shared::cluster.mbarrier::complete_tx::bytes.min.s32 [%r3+116], -7, [%r3];\n";
    let set = "mov.u32 %r10, 10;\nmov.u32 %r11, 11;\nmov.u32 %r12, 12;\nmov.u64 %rd10, 0x1400000013;\nmov.u64 %rd11, 0x1600000015;\n\
        mov.b32 %f1, 1;\nmov.b32 %f2, 2;\nmov.b32 %f3, 3;\nmov.b32 %f4, 4;\n";
    let expect = "mbarrier.arrive.expect_tx.shared.b64 _, [%r3], 60;\n";
    let body = format!(
        "{HEAD}{set}{}{expect}{stores}{WAIT}{}",
        words(64, 64, "%rd1", true),
        words(64, 64, "%rd2", false)
    );
    let mut k = Kernel::new(&body);
    let old: Vec<u32> = (100..116).collect();
    let (a, b) = (k.words("in", &old), k.words("out", &[0; 16]));
    k.ok(1, 1, &[a.0, b.0]);
    let want =
        [10, 101, 11, 12, 0x13, 0x14, 0x15, 0x16, 1, 2, 3, 4, 117, -7i32 as u32, 0x13 + 114, 0x14 + 115];
    assert_eq!(k.read_words(b, 16), want);
    // What is read before the wait is a finding, and so is a lane's store to an odd place.
    let early = format!(
        "{HEAD}{set}st.shared.u32 [%r3+64], 1;\n{expect}st.async.shared::cluster.mbarrier::complete_tx::bytes.u32 [%r3+64], %r10, [%r3];\nld.shared.u32 %r5, [%r3+64];\n"
    );
    let found = Kernel::new(&early).findings(1, 1, &[]);
    assert!(found.iter().all(|f| f.kind == ErrorKind::AsyncRace) && found.len() == 2, "{found:?}");
    let odd = early.replacen("[%r3+64], %r10", "[%r3+66], %r10", 1);
    Kernel::new(&odd).wrong(1, 1, &[], ErrorKind::Misaligned);
}

/// A mask leaves out the same bytes of each sixteen; they stay what they were, unwritten as well.
#[test]
fn single_bytes_are_left_out() {
    let mut random = Random(9);
    let drawn: Vec<u16> = (0..8).map(|_| random.next() as u16).collect();
    for mask in [0xffff, 0, 1, 0x8000, 0x00ff, 0x7ffe].into_iter().chain(drawn) {
        for (n, policy) in [(16, false), (48, true), (256, false)] {
            let copy = match policy {
                false => format!("cp_mask [%rd2], [%r3+1024], {n}, %h1"),
                true => format!("L2::cache_hint.cp_mask [%rd2], [%r3+1024], {n}, %rd5, %h1"),
            };
            let body = format!(
                "{HEAD}{}fence.proxy.async;\ncreatepolicy.fractional.L2::evict_last.b64 %rd5, 1.0;\nmov.u16 %h1, {};\n\
                 cp.async.bulk.global.shared::cta.bulk_group.{copy};\ncp.async.bulk.commit_group;\ncp.async.bulk.wait_group 0;\n",
                words(n, 1024, "%rd1", true),
                mask as i16
            );
            let (old, new) = (random_bytes(&mut random, n), random_bytes(&mut random, n));
            let mut k = Kernel::new(&body);
            let (a, b) = (k.upload("in", &new), k.upload("out", &old));
            k.ok(1, 1, &[a.0, b.0]);
            let want: Vec<u8> =
                (0..n).map(|i| if mask >> (i % 16) & 1 != 0 { new[i] } else { old[i] }).collect();
            assert_eq!(k.read(b, n), want, "{mask:#x}, {n} bytes");
            // Behind the copy the kernel reads one byte of a buffer that nobody wrote.
            for i in [0, 5, 15] {
                let body = format!("{body}ld.global.u8 %r5, [%rd2+{i}];\nst.global.u8 [%rd3], %r5;\n");
                let mut k = Kernel::new(&body);
                let (a, b, c) = (k.upload("in", &new), k.gpu.alloc(n).unwrap(), k.upload("seen", &[0]));
                match mask >> i & 1 != 0 {
                    true => _ = k.ok(1, 1, &[a.0, b.0, c.0]),
                    false => _ = k.wrong(1, 1, &[a.0, b.0, c.0], ErrorKind::Uninitialized),
                }
            }
        }
    }
}

/// Bytes that a masked copy reads must stay until it has read them; others may change.
#[test]
fn bytes_that_are_left_out_may_change_meanwhile() {
    for (at, races) in
        [(0, true), (3, true), (4, false), (6, false), (9, false), (12, true), (17, true), (22, false)]
    {
        let body = format!(
            "{HEAD}{}fence.proxy.async;\nmov.u16 %h1, 0xf00f;\n\
             cp.async.bulk.global.shared::cta.bulk_group.cp_mask [%rd2], [%r3+1024], 32, %h1;\ncp.async.bulk.commit_group;\n\
             st.shared.u8 [%r3+{}], 7;\ncp.async.bulk.wait_group 0;\n",
            words(32, 1024, "%rd1", true),
            1024 + at
        );
        let mut k = Kernel::new(&body);
        let (a, b) = (k.words("in", &[1; 8]), k.words("out", &[0; 8]));
        match races {
            true => _ = k.wrong(1, 1, &[a.0, b.0], ErrorKind::AsyncRace),
            false => _ = k.ok(1, 1, &[a.0, b.0]),
        }
    }
    // What is copied must be visible to the asynchronous proxy, what is left out need not.
    for (at, races) in [(1, true), (5, false)] {
        let body = format!(
            "{HEAD}{}fence.proxy.async;\nst.shared.u8 [%r3+{}], 7;\nmov.u16 %h1, 0x000f;\n\
             cp.async.bulk.global.shared::cta.bulk_group.cp_mask [%rd2], [%r3+1024], 16, %h1;\ncp.async.bulk.commit_group;\n\
             cp.async.bulk.wait_group 0;\n",
            words(16, 1024, "%rd1", true),
            1024 + at
        );
        let mut k = Kernel::new(&body);
        let (a, b) = (k.words("in", &[1; 4]), k.words("out", &[0; 4]));
        match races {
            true => _ = k.wrong(1, 1, &[a.0, b.0], ErrorKind::AsyncRace),
            false => _ = k.ok(1, 1, &[a.0, b.0]),
        }
    }
}

/// Up to 15 bytes at both ends may lie outside the allocation; what arrives there is indeterminate.
#[test]
fn bytes_at_the_ends_are_ignored() {
    let mut random = Random(10);
    for (n, left, right) in
        [(16, 0, 0), (16, 3, 5), (16, 15, 15), (16, 0, 15), (48, 15, 1), (64, 1, 15), (48, 8, 8)]
    {
        let data = random_bytes(&mut random, n);
        let copy = |modifier: &str, ignored: &str| {
            format!(
                "{HEAD}mbarrier.arrive.expect_tx.shared.b64 _, [%r3], {n};\n\
                 cp.async.bulk.shared::cta.global.mbarrier::complete_tx::bytes{modifier} [%r3+1024], [%rd1], {n}{ignored}, [%r3];\n{WAIT}"
            )
        };
        let ignoring = copy(".ignore_oob", &format!(", {left}, {right}"));
        let byte =
            |i: usize| format!("ld.shared.u8 %r5, [%r3+{}];\nst.global.u8 [%rd2+{i}], %r5;\n", 1024 + i);
        let kept = left..(n - right).max(left);
        let body = ignoring.clone() + &kept.clone().map(byte).collect::<String>();
        let mut k = Kernel::new(&body);
        // The allocation ends where bytes are ignored.
        let (a, b) = (k.upload("in", &data[..n - right]), k.upload("out", &vec![0; n]));
        k.ok(1, 1, &[a.0, b.0]);
        let want: Vec<u8> = (0..n).map(|i| if kept.contains(&i) { data[i] } else { 0 }).collect();
        assert_eq!(k.read(b, n), want, "{n} bytes, {left} and {right} ignored");
        for i in (0..n).filter(|i| !kept.contains(i)) {
            let mut k = Kernel::new(&(ignoring.clone() + &byte(i)));
            let (a, b) = (k.upload("in", &data[..n - right]), k.upload("out", &vec![0; n]));
            k.wrong(1, 1, &[a.0, b.0], ErrorKind::Uninitialized);
        }
        if right > 0 {
            let one_less = copy(".ignore_oob", &format!(", {left}, {}", right - 1));
            for body in
                [Some(copy("", "")), Some(one_less).filter(|_| !kept.is_empty())].into_iter().flatten()
            {
                let mut k = Kernel::new(&body);
                let a = k.upload("in", &data[..n - right]);
                k.wrong(1, 1, &[a.0], ErrorKind::OutOfBounds);
            }
        }
        let mut k = Kernel::new(&copy(".ignore_oob", ", 0, 16"));
        let a = k.upload("in", &data);
        let found = k.wrong(1, 1, &[a.0], ErrorKind::OutOfBounds);
        assert!(found.message.contains("ignore 16 bytes"), "{}", found.message);
    }
}

#[test]
fn what_does_not_exist_is_refused() {
    for wrong in [
        "cp.async.bulk.global.shared::cta.mbarrier::complete_tx::bytes [%rd2], [%r3], 16, [%r3];",
        "cp.async.bulk.shared::cta.global.bulk_group [%r3], [%rd1], 16;",
        "cp.async.bulk.shared::cta.shared::cluster.mbarrier::complete_tx::bytes [%r3], [%r3], 16, [%r3];",
        "cp.async.bulk.shared::cta.global.mbarrier::complete_tx::bytes [%r3], [%rd1], 16;",
        "cp.async.bulk.global.shared::cta.bulk_group.cp_mask [%rd2], [%r3], 16;",
        "cp.async.bulk.global.shared::cta.bulk_group.ignore_oob [%rd2], [%r3], 16, 1, 1;",
        "cp.async.bulk.shared::cta.global.mbarrier::complete_tx::bytes.cp_mask [%r3], [%rd1], 16, [%r3], %h1;",
        "cp.async.bulk.shared::cta.global.mbarrier::complete_tx::bytes.ignore_oob [%r3], [%rd1], 16, [%r3];",
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.ignore_oob [%r3], [%rd1], 16, 1, 1, [%r3];",
        "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f16 [%rd2], [%r3], 16;",
        "cp.reduce.async.bulk.global.shared::cta.bulk_group.and.u32 [%rd2], [%r3], 16;",
        "cp.reduce.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes.add.f32 [%r3], [%r3], 16, [%r3];",
        "cp.reduce.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.add.u32 [%r3], [%rd1], 16, [%r3];",
        "cp.async.bulk.tensor.6d.shared::cta.global.mbarrier::complete_tx::bytes [%r3], [%rd1, {%r1}], [%r3];",
        "cp.async.bulk.tensor.2d.shared::cta.global.mbarrier::complete_tx::bytes [%r3], [%rd1], [%r3];",
        "cp.async.bulk.wait_group %r1;",
        "cp.async.bulk.wait_group.write 0;",
    ] {
        let found = Kernel::new(wrong).load().and_then(|m| ptxvm::Gpu::new(Options::default()).load(&m));
        assert!(
            matches!(found, Err(ptxvm::Error::Fault(_) | ptxvm::Error::Unsupported(_))),
            "{wrong}: {found:?}"
        );
    }
}
