//! atom and red against their definitions.

use ptxvm::Options;

use crate::support::ptx::Kernel;

const EDGES: [u64; 10] = [
    0,
    1,
    2,
    7,
    0x7fff_ffff,
    0x8000_0000,
    0xffff_ffff,
    0x7fff_ffff_ffff_ffff,
    0x8000_0000_0000_0000,
    u64::MAX,
];

fn define(op: &str, ty: &str, old: u64, b: u64, c: u64) -> u64 {
    let bits: u32 = ty[1..].parse().unwrap();
    let cut = |x: u128| (x & ((1u128 << bits) - 1)) as u64;
    let signed = |x: u64| (i128::from(x) << (128 - bits)) >> (128 - bits);
    let [old, b, c] = [old, b, c].map(|x| cut(u128::from(x)));
    match op {
        "add" => cut(u128::from(old) + u128::from(b)),
        "inc" => {
            if old >= b {
                0
            } else {
                old + 1
            }
        }
        "dec" => {
            if old == 0 || old > b {
                b
            } else {
                old - 1
            }
        }
        "min" if ty.starts_with('s') => {
            if signed(old) < signed(b) {
                old
            } else {
                b
            }
        }
        "max" if ty.starts_with('s') => {
            if signed(old) > signed(b) {
                old
            } else {
                b
            }
        }
        "min" => old.min(b),
        "max" => old.max(b),
        "and" => old & b,
        "or" => old | b,
        "xor" => old ^ b,
        "exch" => b,
        "cas" => {
            if old == b {
                c
            } else {
                old
            }
        }
        _ => unreachable!(),
    }
}

/// 16 bytes: threads of several blocks add to two halves by compare-and-swap, and an exchange leaves each value with one thread.
#[test]
fn sixteen_bytes() {
    const BLOCKS: u32 = 5;
    const THREADS: u32 = 48;
    for (space, at) in [(".global", "%rd1"), ("", "%rd1"), (".shared", "%r5"), ("", "%rd9")] {
        let shared = at != "%rd1";
        let clear = "mov.u32 %r5, s;\nadd.u32 %r5, %r5, 64;\ncvt.u64.u32 %rd9, %r5;\ncvta.shared.u64 %rd9, %rd9;\n\
                     setp.eq.u32 %p1, %r1, 0;\nmov.b64 %rd5, 0;\n@%p1 st.shared.v2.b64 [%r5], {%rd5, %rd5};\n\
                     @%p1 st.shared.v2.b64 [%r5+16], {%rd5, %rd5};\nbar.sync 0;\n";
        // The sum of what the threads add is all that they see at last; whoever exchanges gets what another left.
        let body = format!(
            "{clear}mov.b64 %rd6, 1;\ncvt.u64.u32 %rd7, %r1;\nmov.b128 %q0, {{%rd5, %rd5}};\n\
             again:\nmov.b128 {{%rd10, %rd11}}, %q0;\nadd.u64 %rd12, %rd10, %rd6;\nadd.u64 %rd13, %rd11, %rd7;\n\
             mov.b128 %q1, {{%rd12, %rd13}};\natom{space}.cas.b128 %q2, [{at}], %q0, %q1;\n\
             mov.b128 {{%rd14, %rd15}}, %q2;\nsetp.ne.u64 %p2, %rd14, %rd10;\nsetp.ne.or.u64 %p2, %rd15, %rd11, %p2;\n\
             mov.b128 %q0, {{%rd14, %rd15}};\n@%p2 bra again;\n\
             mad.lo.u32 %r3, %r2, {THREADS}, %r1;\ncvt.u64.u32 %rd16, %r3;\nadd.u64 %rd17, %rd16, 1;\nnot.b64 %rd18, %rd17;\n\
             mov.b128 %q1, {{%rd17, %rd18}};\natom{space}.exch.b128 %q2, [{at}+16], %q1;\n\
             mad.lo.u64 %rd19, %rd16, 16, %rd2;\nst.global.b128 [%rd19], %q2;\nbar.sync 0;\n\
             @!%p1 bra done;\nmad.wide.u32 %rd20, %r2, 32, %rd3;\n{}done:\n",
            match shared {
                true =>
                    "ld.shared.b128 %q0, [%r5];\nld.shared.b128 %q1, [%r5+16];\nst.global.b128 [%rd20], %q0;\n\
                     st.global.b128 [%rd20+16], %q1;\n",
                false =>
                    "mov.b64 %rd21, 0;\nst.global.v2.b64 [%rd20], {%rd21, %rd21};\nst.global.v2.b64 [%rd20+16], {%rd21, %rd21};\n",
            }
        );
        let mut k = Kernel::new(&body);
        let all = (BLOCKS * THREADS) as usize;
        let target = k.upload("target", &[0; 32]);
        let (got, ends) =
            (k.upload("got", &vec![0; 16 * all]), k.upload("ends", &vec![0; 32 * BLOCKS as usize]));
        k.ok(BLOCKS, THREADS, &[target.0, got.0, ends.0]);
        let words = |bytes: Vec<u8>| -> Vec<u64> {
            bytes.chunks(8).map(|b| u64::from_le_bytes(b.try_into().unwrap())).collect()
        };
        let places: Vec<u64> =
            if shared { words(k.read(ends, 32 * BLOCKS as usize)) } else { words(k.read(target, 32)) };
        let share = if shared { 1 } else { u64::from(BLOCKS) };
        let sum = u64::from(THREADS * (THREADS - 1) / 2);
        // The values left over by exchanges, and those that came back, are each thread's once and the zero of each place.
        let mut seen: Vec<u64> = Vec::new();
        for place in places.chunks(4) {
            assert_eq!(place[..2], [share * u64::from(THREADS), share * sum], "{space} {at}");
            assert_eq!(place[3], !place[2], "{space} {at}: both halves are one thread's");
            seen.push(place[2]);
        }
        for pair in words(k.read(got, 16 * all)).chunks(2) {
            assert!(pair == [0, 0] || pair[1] == !pair[0], "{space} {at}: {pair:?}");
            seen.push(pair[0]);
        }
        seen.sort_unstable();
        let zeros = places.len() / 4;
        assert!(seen[..zeros].iter().all(|n| *n == 0), "{space} {at}");
        assert_eq!(seen[zeros..], (1..=all as u64).collect::<Vec<_>>(), "{space} {at}");
    }
}

/// Every integer operation on all pairs of edges, in every space, as atom and as red.
#[test]
fn integers() {
    let ops = [
        ("add", &["u32", "s32", "u64"][..]),
        ("inc", &["u32"]),
        ("dec", &["u32"]),
        ("min", &["u32", "s32", "u64", "s64"]),
        ("max", &["u32", "s32", "u64", "s64"]),
        ("and", &["b32", "b64"]),
        ("or", &["b32", "b64"]),
        ("xor", &["b32", "b64"]),
        ("exch", &["b32", "b64"]),
        ("cas", &["b16", "b32", "b64"]),
    ];
    let n = EDGES.len() * EDGES.len();
    for (op, types) in ops {
        for ty in types {
            let (r, size) = match &ty[1..] {
                "16" => ("%h", 2),
                "32" => ("%r1", 4),
                _ => ("%rd1", 8),
            };
            for space in ["global", "shared", "generic"] {
                for red in [false, true] {
                    if red && matches!(op, "exch" | "cas") {
                        continue;
                    }
                    let third = if op == "cas" { format!(", {r}3") } else { String::new() };
                    let (dot, at) = match space {
                        "global" => (".global", "%rd5"),
                        "shared" => (".shared", "%r5"),
                        _ => ("", "%rd6"),
                    };
                    let instruction = match red {
                        true => format!("red{dot}.{op}.{ty} [{at}], {r}2{third};"),
                        false => format!("atom{dot}.{op}.{ty} {r}1, [{at}], {r}2{third};"),
                    };
                    // Records of old, b, c; results: returned value, new value.
                    let (inn, out) = match space {
                        "global" => ("", format!("ld.global.b{0} {r}4, [%rd5];", size * 8)),
                        _ => (
                            "mov.u32 %r5, s;\nmad.lo.u32 %r5, %r1, 16, %r5;\nst.shared.v2.b64 [%r5], {%rd7, %rd7};\n",
                            format!("ld.shared.b{0} {r}4, [%r5];", size * 8),
                        ),
                    };
                    let body = format!(
                        "mad.wide.u32 %rd5, %r1, 32, %rd1;\nmad.wide.u32 %rd8, %r1, 16, %rd2;\nld.global.b64 %rd7, [%rd5];\n\
                         {inn}cvta.shared.u64 %rd6, s;\nmad.wide.u32 %rd6, %r1, 16, %rd6;\n\
                         ld.global.b{0} {r}2, [%rd5+8];\nld.global.b{0} {r}3, [%rd5+16];\nmov.b{0} {r}1, 0;\n{instruction}\n{out}\n\
                         st.global.b{0} [%rd8], {r}1;\nst.global.b{0} [%rd8+8], {r}4;",
                        size * 8
                    );
                    let mut k = Kernel::new(&body);
                    let data: Vec<u64> = (0..n)
                        .flat_map(|i| [EDGES[i / 10], EDGES[i % 10], EDGES[(i * 7 + 3) % 10] ^ 5, 0])
                        .collect();
                    let a = k.upload("in", bytemuck::cast_slice(&data));
                    let b = k.upload("out", &vec![0; n * 16]);
                    k.ok(1, n as u32, &[a.0, b.0]);
                    let got = k.read(b, n * 16);
                    let word = |at: usize| {
                        let mut bytes = [0; 8];
                        bytes[..size].copy_from_slice(&got[at..at + size]);
                        u64::from_le_bytes(bytes)
                    };
                    let cut = |x: u64| x & (u64::MAX >> (64 - size * 8));
                    for i in 0..n {
                        let [old, b, c] = [data[i * 4], data[i * 4 + 1], data[i * 4 + 2]];
                        let want = (if red { 0 } else { cut(old) }, define(op, ty, old, b, c));
                        assert_eq!(
                            (word(i * 16), word(i * 16 + 8)),
                            want,
                            "{instruction} {old:#x} {b:#x} {c:#x}"
                        );
                    }
                }
            }
        }
    }
}

#[test]
fn lanes_and_blocks_take_turns() {
    // Each lane sees what the lanes before it added; blocks come in order, however many host threads there are.
    for threads in [1, 4] {
        let mut k = Kernel::with(
            "atom.global.add.u32 %r4, [%rd1], %r1;\nmov.u32 %r5, %ntid.x;\nmad.lo.u32 %r5, %r2, %r5, %r1;\n\
             mad.wide.u32 %rd4, %r5, 4, %rd2;\nst.global.u32 [%rd4], %r4;",
            Options { threads, ..Options::default() },
        );
        let (a, b) = (k.words("sum", &[0]), k.words("seen", &[0; 320]));
        k.ok(5, 64, &[a.0, b.0]);
        let sum = |n: u32| (0..n).map(|i| i % 64).sum::<u32>();
        assert_eq!(k.read_words(b, 320), (0..320).map(sum).collect::<Vec<_>>());
        assert_eq!(k.read_words(a, 1), [sum(320)]);
    }
}

#[test]
fn floats_add_in_order() {
    let values: Vec<f32> =
        (0..64).map(|i| (i as f32 - 20.3) * 1.7e-3 * if i % 3 == 0 { 1e5 } else { 1.0 }).collect();
    let mut k = Kernel::new(
        "mad.wide.u32 %rd4, %r1, 4, %rd2;\nld.global.f32 %f1, [%rd4];\nred.global.add.f32 [%rd1], %f1;",
    );
    let (a, b) = (k.words("sum", &[0]), k.upload("values", bytemuck::cast_slice(&values)));
    k.ok(1, 64, &[a.0, b.0]);
    let want = values.iter().fold(0f32, |s, v| s + v);
    assert_eq!(k.read_words(a, 1), [want.to_bits()]);
    // Global atomics flush subnormal numbers, shared ones keep them; NaN is canonical.
    for (space, tiny) in [("global", 0), ("shared", 3u32)] {
        let at = if space == "global" { "%rd1" } else { "s" };
        let mut k = Kernel::new(&format!(
            "mov.b32 %f1, 0f00000001;\nmov.b32 %f2, 0f00000002;\nst.{space}.f32 [{at}], %f1;\n\
             atom.{space}.add.f32 %f3, [{at}], %f2;\nld.{space}.f32 %f4, [{at}];\nmov.b32 %f5, 0fFF800000;\n\
             mov.b32 %f6, 0f7F800000;\nst.{space}.f32 [{at}], %f5;\nred.{space}.add.f32 [{at}], %f6;\n\
             ld.{space}.f32 %f7, [{at}];\nst.global.v2.f32 [%rd1], {{%f4, %f7}};"
        ));
        let a = k.words("out", &[0; 2]);
        k.ok(1, 1, &[a.0]);
        assert_eq!(k.read_words(a, 2), [tiny, 0x7fff_ffff], "{space}");
    }
    let mut k = Kernel::new("mov.f64 %d1, 0d3FF0000000000001;\natom.global.add.f64 %d2, [%rd1], %d1;");
    let a = k.upload("d", &1e-300f64.to_le_bytes());
    k.ok(1, 3, &[a.0]);
    let one = f64::from_bits(0x3ff0_0000_0000_0001);
    assert_eq!(k.read(a, 8), (((1e-300 + one) + one) + one).to_le_bytes());
}

#[test]
fn sixteen_bit_floats_and_vectors() {
    // 1.0 + 2^-11 is a tie and stays; 1.0 + 3 * 2^-11 goes up to 1 + 2^-9. The same for bf16 with 2^-8.
    let mut k = Kernel::new(
        "mov.b32 %r4, 0x12003c00;\nst.global.u32 [%rd1], 0x3c003c00;\nmov.b32 %r5, 0x16001000;\n\
         red.global.add.noftz.f16x2 [%rd1], %r5;\nmov.b16 %h1, 0x3b80;\nst.global.u32 [%rd1+4], 0x3f803f80;\n\
         atom.global.add.noftz.bf16 %h2, [%rd1+4], %h1;\nmov.b16 %h1, 0x3c40;\natom.global.add.noftz.bf16 %h3, [%rd1+6], %h1;\n\
         mov.f32 %f1, 0f3F800000;\nmov.f32 %f2, 0f40000000;\n\
         atom.global.v2.f32.add {%f3, %f4}, [%rd1+8], {%f1, %f2};\nst.global.v2.f32 [%rd1+16], {%f3, %f4};\n\
         red.global.add.noftz.v4.bf16x2 [%rd1+32], {%r6, %r6, %r6, %r6};"
            .replace("mov.b32 %r4, 0x12003c00;", "mov.b32 %r6, 0x3f803f80;")
            .as_str(),
    );
    let a = k.words("out", &[0; 16]);
    k.gpu.write(a.offset(8), bytemuck::cast_slice(&[0.5f32, 0.25])).unwrap();
    k.ok(1, 1, &[a.0]);
    let got = k.read_words(a, 12);
    assert_eq!(got[0], 0x3c02_3c00, "f16x2: 1 + 3 * 2^-11 * ..., ties to even");
    assert_eq!(got[1], 0x3f82_3f80, "bf16");
    assert_eq!(got[2..6], [1.5f32, 2.25, 0.5, 0.25].map(f32::to_bits));
    assert_eq!(got[8..12], [0x3f80_3f80; 4]);
}

#[test]
fn locks_exclude_each_other() {
    // A spin lock around a plain read and write, taken by one lane of each warp of each block.
    let body = "and.b32 %r4, %r1, 31;\nsetp.ne.u32 %p1, %r4, 0;\n@%p1 bra DONE;\n\
         TAKE:\natom.global.acquire.gpu.cas.b32 %r5, [%rd1], 0, 1;\nsetp.ne.u32 %p2, %r5, 0;\n@%p2 bra TAKE;\n\
         ld.global.u32 %r6, [%rd2];\nadd.u32 %r6, %r6, 1;\nst.global.u32 [%rd2], %r6;\n\
         atom.global.release.gpu.exch.b32 %r5, [%rd1], 0;\nDONE:";
    let mut k = Kernel::new(body);
    let (a, b) = (k.words("lock", &[0]), k.words("count", &[0]));
    k.ok(7, 128, &[a.0, b.0]);
    assert_eq!(k.read_words(b, 1), [28]);
}
