//! half_math.cu, integers.cu and mathlib.cu.

use crate::kernels::{
    BUILDS, Device, FAST, Rng, Round, SM80, bf16, f16, from_bf16, from_f16, near, round_to, ulp32, ulp64,
};

/// Bits of 0.0 and 1.0 and the like differ by format; both formats run the same operations, but for a few slots.
#[test]
fn packed_arithmetic() {
    type Encode = fn(f64, Round) -> u16;
    for build in BUILDS {
        for (entry, encode, decode) in [
            ("half2_ops", f16 as Encode, from_f16 as fn(u16) -> f64),
            ("bfloat2_ops", bf16 as Encode, from_bf16),
        ] {
            let n = 203usize;
            let mut d = Device::new("half_math.cu", build);
            let mut rng = Rng(71);
            // Exponents from -3 to 3: a product and a sum of two fit f64, so the references round once.
            let mut data =
                || rng.vec(2 * n, |r| encode(r.f64() * f64::from(1 + r.u32() % 8), Round::Nearest));
            let (mut x, mut y) = (data(), data());
            (x[0], y[0], x[1], y[1]) =
                (0, 0x8000, encode(f64::NAN, Round::Nearest), encode(1.0, Round::Nearest));
            let (a, b, o) = (d.upload(&x), d.upload(&y), d.empty::<u16>(n * 32));
            d.run(entry, n.div_ceil(64), 64, &[&a, &b, &o, &(n as i32)]);
            let got = d.download::<u16>(o, n * 32);
            for i in 0..2 * n {
                let (pair, lane) = (i / 2, i % 2);
                let (u, v) = (decode(x[i]), decode(y[i]));
                let of = |kind: usize| got[pair * 32 + kind * 2 + lane];
                let r = |w: f64| encode(w, Round::Nearest);
                let check = |kind: usize, want: u16| {
                    assert!(
                        of(kind) == want || (decode(want).is_nan() && decode(of(kind)).is_nan()),
                        "{build:?} {entry} kind {kind}, {u} and {v}: {:#06x}, not {want:#06x}",
                        of(kind)
                    );
                };
                check(0, r(u + v));
                check(1, r(u - v));
                check(2, r(u * v));
                check(3, r(u * v + u));
                check(4, if u.is_nan() || u > v || (u == v && y[i] >> 15 == 1) { y[i] } else { x[i] });
                check(5, if u.is_nan() || u < v || (u == v && x[i] >> 15 == 1) { y[i] } else { x[i] });
                check(6, x[i] ^ 0x8000);
                check(7, x[i] & 0x7fff);
                let relu = u * v + v;
                check(8, if relu <= 0.0 { 0 } else { r(relu) });
                // Division goes through f32 and an approximate reciprocal, corrected: a unit of the format.
                let quotient = u / v;
                if quotient.is_finite() {
                    let unit = if entry == "half2_ops" { 2f64.powi(-10) } else { 2f64.powi(-7) };
                    near(decode(of(10)), quotient, unit * quotient.abs() + 2f64.powi(-24), (entry, u, v));
                }
                if entry == "half2_ops" {
                    let sat = (u + v).clamp(0.0, 1.0);
                    check(9, if (u + v).is_nan() { 0 } else { r(sat) });
                    check(11, r(f64::from(u8::from(u < v))));
                    check(12, x[i ^ 1]);
                    check(13, r(u.round_ties_even()));
                    check(14, if u.is_nan() { x[i] } else { of(5) });
                    let (first, second) = (pair * 2, pair * 2 + 1);
                    let mixed = [decode(x[first]) + decode(y[second]), decode(x[second]) * decode(y[first])];
                    check(15, r(mixed[lane]));
                } else {
                    check(9, r(f64::from(u8::from(u > v))));
                    check(11, x[pair * 2]);
                    check(12, y[i ^ 1]);
                    check(13, r(u.trunc()));
                    check(14, if u.is_nan() { x[i] } else { of(4) });
                    let factor = if lane == 0 { u as f32 * 1.5 } else { v as f32 * -0.3 };
                    check(15, r(f64::from(factor)));
                }
            }
        }
    }
}

#[test]
fn narrowing() {
    for build in BUILDS {
        let mut d = Device::new("half_math.cu", build);
        let mut rng = Rng(72);
        let mut x = rng.vec(400, |r| r.f32() * 2f32.powi(r.below(50) as i32 - 30));
        x.extend([0.0, -0.0, 1e30, -1e30, 65519.0, 65520.0, f32::INFINITY, 1e-8, -1e-8, 3.39e38]);
        let n = x.len();
        let (a, o) = (d.upload(&x), d.empty::<u16>(n * 12));
        d.run("narrow", n.div_ceil(64), 64, &[&a, &o, &(n as i32)]);
        for (v, got) in x.iter().zip(d.download::<u16>(o, n * 12).chunks(12)) {
            let w = f64::from(*v);
            let modes = [Round::Nearest, Round::Zero, Round::Up, Round::Down];
            let h = from_f16(f16(w, Round::Nearest));
            let int = (v * 3.0) as i32;
            let mut want: Vec<u16> = modes.iter().map(|m| f16(w, *m)).collect();
            want.extend(modes.iter().map(|m| bf16(w, *m)));
            want.push(f16(w * 1.0000001, Round::Nearest));
            want.push(h.round_ties_even() as i16 as u16);
            want.push(h as u16);
            want.push(f16(f64::from(int), Round::Nearest));
            assert_eq!(got, want, "{build:?} {v:e}");
        }

        let (a, b) = (d.empty::<f32>(65536), d.empty::<f32>(65536));
        d.run("widen", 256, 256, &[&a, &b]);
        let (h, b) = (d.download::<f32>(a, 65536), d.download::<f32>(b, 65536));
        for i in 0..=u16::MAX {
            near(f64::from(h[i as usize]), from_f16(i), 0.0, ("f16", i));
            near(f64::from(b[i as usize]), from_bf16(i), 0.0, ("bf16", i));
        }
    }
}

#[test]
fn half_functions() {
    for build in BUILDS {
        let mut d = Device::new("half_math.cu", build);
        let x = Rng(73).vec(300, |r| f16(r.f64() * 6.0, Round::Nearest));
        let (a, o) = (d.upload(&x), d.empty::<u16>(2400));
        d.run("half_functions", 5, 64, &[&a, &o, &300i32]);
        for (x, got) in x.iter().zip(d.download::<u16>(o, 2400).chunks(8)) {
            let v = from_f16(*x);
            let p = v.abs();
            let want = [v.exp(), p.ln(), p.sqrt(), p.sqrt().recip(), v.recip(), v.sin(), v.cos(), v.tanh()];
            for (k, want) in want.into_iter().enumerate() {
                // One unit in the last place of f16 for the functions of f32 inside; tanh.approx.f16 has 2^-10.987.
                near(from_f16(got[k]), want, want.abs() * 2f64.powi(-10) + 2f64.powi(-11), (build, k, v));
            }
        }
    }
}

fn byte_perm(a: u32, b: u32, selector: u32) -> u32 {
    let bytes = (u64::from(b) << 32 | u64::from(a)).to_le_bytes();
    u32::from_le_bytes(std::array::from_fn(|i| bytes[(selector >> (4 * i) & 7) as usize]))
}

/// Applies `f` to each of the parts of `bits` bits.
fn parts(a: u32, b: u32, bits: u32, f: impl Fn(u32, u32) -> u32) -> u32 {
    let mask = (1u32 << bits) - 1;
    (0..32).step_by(bits as usize).fold(0, |r, s| r | (f(a >> s & mask, b >> s & mask) & mask) << s)
}

#[test]
fn bit_intrinsics() {
    for build in BUILDS {
        let mut d = Device::new("integers.cu", build);
        let mut rng = Rng(74);
        let n = 300usize;
        let (mut x, mut y) = (rng.vec(n, Rng::u32), rng.vec(n, Rng::u32));
        (x[0], y[0], x[1], y[1], x[2], y[2]) = (0, 0, u32::MAX, u32::MAX, 0x8000_0000, 0x7fff_ffff);
        let (a, b, o) = (d.upload(&x), d.upload(&y), d.empty::<u32>(n * 32));
        d.run("bit_intrinsics", n.div_ceil(64), 64, &[&a, &b, &o, &(n as i32)]);
        let got = d.download::<u32>(o, n * 32);
        for i in 0..n {
            let (a, b) = (x[i], y[i]);
            let (sa, sb) = (a as i32, b as i32);
            let (wa, wb) = (i64::from(sa), i64::from(sb));
            let (ua, ub) = (u64::from(a), u64::from(b));
            let w = ua << 32 | ub;
            let funnel = ub << 32 | ua;
            let signed = |v: u32, i: u32| i64::from((v >> (8 * i)) as u8 as i8);
            let byte = |v: u32, i: u32| u64::from((v >> (8 * i)) as u8);
            let low24 = |v: u32| i64::from((v << 8) as i32 >> 8);
            let ffs = |v: u64| if v == 0 { 0 } else { v.trailing_zeros() + 1 };
            let want = [
                a.count_ones(),
                a.leading_zeros(),
                ffs(ua),
                a.reverse_bits(),
                byte_perm(a, b, b & 0x7777),
                (funnel << (b & 31) >> 32) as u32,
                (funnel >> (a & 31)) as u32,
                ((u128::from(funnel) << (b & 63).min(32)) >> 32) as u32,
                (funnel >> (a & 63).min(32)) as u32,
                ((0..4).map(|i| signed(a, i) * signed(b, i)).sum::<i64>() + 5) as u32,
                ((0..4).map(|i| byte(a, i) * byte(b, i)).sum::<u64>() + 5) as u32,
                (i64::from(a as i16) * signed(b, 0) + i64::from((a >> 16) as i16) * signed(b, 1) - 3) as u32,
                (u64::from(a as u16) * byte(b, 2) + u64::from(a >> 16) * byte(b, 3) + 3) as u32,
                ((ua * ub) >> 32) as u32,
                ((wa * wb) >> 32) as u32,
                ((ua & 0xff_ffff) * (ub & 0xff_ffff)) as u32,
                (low24(a) * low24(b)) as u32,
                sa.abs_diff(sb).wrapping_add(7),
                a.abs_diff(b).wrapping_add(7),
                ((wa + wb) >> 1) as u32,
                ((wa + wb + 1) >> 1) as u32,
                ((ua + ub) >> 1) as u32,
                ((ua + ub + 1) >> 1) as u32,
                w.count_ones(),
                w.leading_zeros(),
                ffs(w),
                w.reverse_bits() as u32,
                (w.reverse_bits() >> 32) as u32,
                (a & b) ^ (!a & 0x0f0f_0f0f) | (b & 0x00ff_00ff),
                a << (b & 31) | b >> (a & 31),
                (sa >> (b & 31)) as u32,
                parts(a, b, 8, u32::abs_diff)
                    .wrapping_add(parts(a, b, 16, |u, v| u + v))
                    .wrapping_add(parts(a, b, 8, |u, v| (u as i8).max(v as i8) as u32))
                    .wrapping_add(parts(a, b, 16, |u, v| if u > v { 0xffff } else { 0 })),
            ];
            assert_eq!(got[i * 32..i * 32 + 32], want, "{build:?} {a:#x} {b:#x}");
        }
    }
}

#[test]
fn inline_ptx_integers() {
    for build in BUILDS {
        let mut d = Device::new("integers.cu", build);
        let mut rng = Rng(75);
        let n = 300usize;
        let (mut x, y) = (rng.vec(n, Rng::u32), rng.vec(n, Rng::u32));
        (x[0], x[1]) = (0, u32::MAX);
        let (a, b, o) = (d.upload(&x), d.upload(&y), d.empty::<u32>(n * 16));
        d.run("ptx_integers", n.div_ceil(64), 64, &[&a, &b, &o, &(n as i32)]);
        let got = d.download::<u32>(o, n * 16);
        for i in 0..n {
            let (a, b) = (x[i], y[i]);
            let (from, len) = (b & 31, b >> 8 & 31);
            let mask = (1u64 << len) - 1;
            let field = (u64::from(a) >> from & mask) as u32;
            // Beyond bit 31 the sign stands in; its place is the field's top bit or bit 31.
            let extended =
                if len == 0 { 0 } else { ((i64::from(a as i32) >> from << (64 - len)) >> (64 - len)) as u32 };
            let place = (mask << from) as u32;
            let top = |v: u32| if v == 0 { u32::MAX } else { 31 - v.leading_zeros() };
            let bytes = (u64::from(b) << 32 | u64::from(a)).to_le_bytes();
            let c = (b & 3) as usize;
            let product = u64::from(a) * u64::from(b);
            let signed = (a << 8) as i32 >> 8;
            let other = (b << 8) as i32 >> 8;
            let low = (i64::from(signed) * i64::from(other)) as u32;
            let want = [
                field,
                extended,
                (b & !place) | ((u64::from(a) << from) as u32 & place),
                top(a),
                top(if (a as i32) < 0 { !a } else { a }),
                if a == 0 { u32::MAX } else { a.leading_zeros() },
                (a & b) | (a & i as u32) | (b & i as u32),
                u32::from_le_bytes(std::array::from_fn(|k| bytes[c + k])),
                u32::from_le_bytes([bytes[c]; 4]),
                low.wrapping_add(17),
                ((u64::from(a & 0xff_ffff) * u64::from(b & 0xff_ffff)) >> 16) as u32,
                a.wrapping_add(3).wrapping_add(u32::from(a.checked_add(b).is_none())),
                b.wrapping_sub(3).wrapping_sub(u32::from(a < b)),
                ((product >> 32) as u32)
                    .wrapping_add(9)
                    .wrapping_add(u32::from((product as u32).checked_add(b).is_none())),
                if ((a ^ b) as i32) >= 0 { a } else { b },
                {
                    let (at, width) = (a & 63, b & 63);
                    if at > 31 { 0 } else { (((1u64 << width.min(32)) - 1) << at) as u32 }
                },
            ];
            assert_eq!(got[i * 16..i * 16 + 16], want, "{build:?} {a:#x} {b:#x}");
        }
    }
}

#[test]
fn divisions() {
    for build in BUILDS {
        let mut d = Device::new("integers.cu", build);
        let mut rng = Rng(76);
        let n = 200usize;
        let x = rng.vec(n, |r| r.u64() as i64 >> r.below(40));
        let y = rng.vec(n, |r| (r.u64() as i64 >> r.below(60)) | 1);
        let (a, b, o) = (d.upload(&x), d.upload(&y), d.empty::<i64>(n * 14));
        d.run("divisions", n.div_ceil(64), 64, &[&a, &b, &o, &(n as i32)]);
        let got = d.download::<i64>(o, n * 14);
        for i in 0..n {
            let (a, b) = (x[i], y[i]);
            let (a32, b32, a16, b16) = (a as i32, b as i32 | 1, a as i16, (b | 1) as i16);
            let want = [
                a.wrapping_div(b),
                a.wrapping_rem(b),
                (a as u64 / b as u64) as i64,
                (a as u64 % b as u64) as i64,
                i64::from(a32.wrapping_div(b32)),
                i64::from(a32.wrapping_rem(b32)),
                i64::from(a32 as u32 / b32 as u32),
                i64::from(a32 as u32 % b32 as u32),
                i64::from(i32::from(a16) / i32::from(b16)),
                i64::from(a16 as u16 % b16 as u16),
                a / 1_000_000_007,
                i64::from(a32 % 10),
                i64::from(a32 as u32 / 7),
                (a as u64 / 641) as i64,
            ];
            assert_eq!(got[i * 14..i * 14 + 14], want, "{build:?} {a} {b}");
        }
    }
}

#[test]
fn wide_integers() {
    for build in BUILDS {
        let mut d = Device::new("integers.cu", build);
        let mut rng = Rng(77);
        let n = 150usize;
        let (x, y) = (rng.vec(n, |r| r.u64() >> r.below(50)), rng.vec(n, |r| r.u64() >> r.below(50)));
        let (a, b, o) = (d.upload(&x), d.upload(&y), d.empty::<u64>(n * 16));
        d.run("wide_integers", n.div_ceil(64), 64, &[&a, &b, &o, &(n as i32)]);
        let got = d.download::<u64>(o, n * 16);
        for i in 0..n {
            let (a, b) = (x[i], y[i]);
            let (sa, sb) = (a as i64, b as i64);
            let p = u128::from(a) * u128::from(b);
            let s = p.wrapping_add(u128::from(b) << 64 | u128::from(a)).wrapping_sub(u128::from(a ^ b));
            let want = [
                p as u64,
                (p >> 64) as u64,
                (p >> 64) as u64,
                ((i128::from(sa) * i128::from(sb)) >> 64) as u64,
                s as u64,
                (s >> 64) as u64,
                (p >> (a & 127)) as u64,
                (p << (b & 127) >> 64) as u64,
                (p / (u128::from(b) + 12345)) as u64,
                (p % (u128::from(a) >> 7 | 1)) as u64,
                a.rotate_left((b & 63) as u32),
                (sa >> (b & 63)) as u64,
                (i64::from(sa as i32) * i64::from(sb as i32)).wrapping_add(sb) as u64,
                (u64::from(a as u32) * u64::from(b as u32)).wrapping_add(a),
                (sa.wrapping_abs() as u64).wrapping_add(sa.max(sb) as u64),
                u64::from(a < b) + 2 * u64::from(sa < sb) + 4 * u64::from(p > s),
            ];
            assert_eq!(got[i * 16..i * 16 + 16], want, "{build:?} {a:#x} {b:#x}");
        }
    }
}

#[test]
fn small_integers() {
    for build in BUILDS {
        let mut d = Device::new("integers.cu", build);
        let x = Rng(78).vec(300, |r| r.u32() as i32 >> r.below(28));
        let (a, o) = (d.upload(&x), d.empty::<i16>(2400));
        d.run("small_integers", 5, 64, &[&a, &o, &300i32]);
        for (v, got) in x.iter().zip(d.download::<i16>(o, 2400).chunks(8)) {
            let (c, u, s) = (i32::from(*v as i8), i32::from((v >> 3) as u8), i32::from((v >> 5) as i16));
            let want = [
                (c * u) as i16,
                (s + c) as i16,
                i16::from((c << 3) as i8),
                i16::from((u - c) as u8),
                (s >> (u & 15)) as i16,
                (i32::from(s as u16) >> (u & 15)) as i16,
                (*v).clamp(-32768, 32767) as i16,
                (*v).clamp(0, 255) as i16,
            ];
            assert_eq!(got, want, "{build:?} {v}");
        }
    }
}

/// Arguments for the math functions: all sizes from 2^-20 to 2^5, both signs.
fn arguments(n: usize) -> Vec<f64> {
    Rng(79).vec(n, |r| f64::from((r.f64() * 2f64.powi(r.below(26) as i32 - 20)) as f32))
}

#[test]
fn math_f32() {
    for build in BUILDS {
        let mut d = Device::new("mathlib.cu", build);
        let x = arguments(400);
        let narrow: Vec<f32> = x.iter().map(|v| *v as f32).collect();
        let (a, o) = (d.upload(&narrow), d.empty::<f32>(400 * 24));
        d.run("math_f32", 7, 64, &[&a, &o, &400i32]);
        for (v, got) in narrow.iter().zip(d.download::<f32>(o, 400 * 24).chunks(24)) {
            let p = v.abs() + 1e-3f32;
            let u = f64::from(v / (1.0 + p));
            let (v, p) = (f64::from(*v), f64::from(p));
            // Value, and the bound in units in the last place that the CUDA C++ Programming Guide gives. Functions
            // that Rust's std lacks (erf) are left to their symmetry below.
            let want = [
                (0, v.exp(), 2.0),
                (1, p.ln(), 1.0),
                (2, v.sin(), 2.0),
                (3, v.cos(), 2.0),
                (4, u.tan(), 4.0),
                (5, v.tanh(), 2.0),
                (7, p.powf(f64::from(1.7f32)), 4.0),
                (8, p.sqrt(), 0.5),
                (9, p.sqrt().recip(), 2.0),
                (10, u.exp2(), 2.0),
                (11, p.log2(), 1.0),
                (12, p.ln_1p(), 1.0),
                (13, u.exp_m1(), 1.0),
                (14, v.atan(), 2.0),
                (15, v.atan2(f64::from(0.7f32)), 3.0),
                (16, u.asin(), 2.0),
                (17, u.acos(), 2.0),
                (18, u.sinh(), 3.0),
                (19, v.cbrt(), 1.0),
                (20, v.hypot(3.0), 3.0),
                (21, v % f64::from(0.37f32), 0.0),
                (22, p.recip(), 0.5),
            ];
            for (k, want, ulps) in want {
                near(f64::from(got[k]), want, (ulps + 0.5) * ulp32(want), (build, k, v));
            }
            // erf(v) by its series or, far out, by 1; erfc(u) = 1 - erf(u).
            for (k, want) in [(6, erf(v)), (23, 1.0 - erf(u))] {
                near(f64::from(got[k]), want, 4.5 * ulp32(want), (build, k, v));
            }
        }
    }
}

/// erf by its Taylor series in f64, good to 1e-12 below 3; 1 beyond 6; between by the continued fraction of erfc.
fn erf(x: f64) -> f64 {
    let a = x.abs();
    let v = if a < 2.5 {
        let mut term = a;
        let mut sum = a;
        for n in 1..80 {
            term *= -a * a / f64::from(n);
            sum += term / f64::from(2 * n + 1);
        }
        sum * std::f64::consts::FRAC_2_SQRT_PI
    } else {
        let tail = (1..=60).rev().fold(a, |t, k| a + f64::from(k) / 2.0 / t);
        1.0 - (-a * a).exp() / (tail * std::f64::consts::PI.sqrt())
    };
    v.copysign(x)
}

#[test]
fn large_arguments() {
    for build in BUILDS {
        let mut d = Device::new("mathlib.cu", build);
        let mut rng = Rng(80);
        let mut x = rng.vec(200, |r| r.f32() * 2f32.powi(r.below(110) as i32 + 10));
        x.extend([1e5, 105615.0, 1e30, -3.4e38, 2e-30, 0.0]);
        let n = x.len();
        let (a, o) = (d.upload(&x), d.empty::<f32>(2 * n));
        d.run("trig_large", n.div_ceil(64), 64, &[&a, &o, &(n as i32)]);
        for (v, got) in x.iter().zip(d.download::<f32>(o, 2 * n).chunks(2)) {
            let v = f64::from(*v);
            near(f64::from(got[0]), v.sin(), 2.5 * ulp32(v.sin()), (build, "sin", v));
            near(f64::from(got[1]), v.cos(), 2.5 * ulp32(v.cos()), (build, "cos", v));
        }
    }
}

#[test]
fn math_f64() {
    for build in BUILDS {
        let mut d = Device::new("mathlib.cu", build);
        let x = arguments(300);
        let (a, o) = (d.upload(&x), d.empty::<f64>(300 * 24));
        d.run("math_f64", 5, 64, &[&a, &o, &300i32]);
        for (v, got) in x.iter().zip(d.download::<f64>(o, 300 * 24).chunks(24)) {
            let v = *v;
            let p = v.abs() + 1e-3;
            let u = v / (1.0 + p);
            let far = v * 1e6;
            let rounded =
                v.floor() + 2.0 * v.ceil() + 4.0 * v.round_ties_even() + 8.0 * v.trunc() + 16.0 * v.round();
            let want = [
                (0, v.exp(), 1.0),
                (1, p.ln(), 1.0),
                (2, v.sin(), 2.0),
                (3, v.cos(), 2.0),
                (4, u.tan(), 2.0),
                (5, v.tanh(), 2.0),
                (6, far.sin(), 2.0),
                (7, far.cos(), 2.0),
                (8, p.sqrt(), 0.0),
                (9, p.sqrt().recip(), 2.0),
                (10, u.exp2(), 1.0),
                (11, p.log2(), 1.0),
                (12, p.ln_1p(), 1.0),
                (13, u.exp_m1(), 1.0),
                (14, v.atan(), 2.0),
                (15, p.powf(1.7), 2.0),
                (16, u.asin(), 2.0),
                (17, v.cbrt(), 1.0),
                (18, p.recip(), 0.0),
                (19, p / 3.0, 0.0),
                (20, v % 0.37, 0.0),
                (21, rounded, 0.0),
                (22, v * 4096.0 + u / 8.0, 1.0),
            ];
            for (k, want, ulps) in want {
                // The guide's bound, and one unit for the host's own function.
                let slack = if ulps == 0.0 { 0.0 } else { ulps + 1.0 };
                near(got[k], want, slack * ulp64(want), (build, k, v));
            }
            near(got[23], erf(v), 1e-11, (build, "erf", v));
        }
    }
}

#[test]
fn fast_functions() {
    for build in [SM80, FAST] {
        let mut d = Device::new("mathlib.cu", build);
        let x = Rng(81).vec(300, |r| r.f32() * 3.0);
        let (a, o) = (d.upload(&x), d.empty::<f32>(3600));
        d.run("math_fast", 5, 64, &[&a, &o, &300i32]);
        for (v, got) in x.iter().zip(d.download::<f32>(o, 3600).chunks(12)) {
            let (v, p) = (f64::from(*v), f64::from(v.abs() + 1e-3f32));
            // Bounds of the programming guide and of the PTX ISA; those of products of logarithms added up.
            let want = [
                (v.exp(), (2.0 + 1.173 * v.abs() + 1.0) * ulp32(v.exp())),
                (p.ln(), 2f64.powi(-21) + 3.0 * ulp32(p.ln())),
                (v.sin(), 2f64.powi(-20)),
                (v.cos(), 2f64.powi(-20)),
                (p.powf(1.3), p.powf(1.3) * (2f64.powi(-21) + 16.0 * 2f64.powi(-23))),
                (v / p, 2.0 * ulp32(v / p)),
                (v.tanh(), v.tanh().abs() * 2f64.powi(-10) * 1.01),
                (p.recip(), ulp32(p.recip()) * 1.5),
                (p.sqrt(), 2f64.powi(-22) * p.sqrt()),
                (p.sqrt().recip(), 2f64.powi(-22) * p.sqrt().recip() * 1.5),
                (v.exp2(), 2.0 * ulp32(v.exp2())),
                (v.clamp(0.0, 1.0) + p.log2() + p.log10(), 2f64.powi(-19)),
            ];
            for (k, (want, bound)) in want.into_iter().enumerate() {
                near(f64::from(got[k]), want, bound, (build, k, v));
            }
        }
    }
}

#[test]
fn roundings() {
    let modes = [Round::Nearest, Round::Zero, Round::Up, Round::Down];
    let f32_of = |v: f64, how| round_to(v, 24, -126, how);
    for build in BUILDS {
        let mut d = Device::new("mathlib.cu", build);
        let mut rng = Rng(82);
        let n = 400usize;
        let mut scaled = || rng.vec(n, |r| r.f32() * 2f32.powi(r.below(9) as i32 - 4));
        let (x, y) = (scaled(), scaled());
        let (a, b, o) = (d.upload(&x), d.upload(&y), d.empty::<u32>(32 * n));
        d.run("roundings", n.div_ceil(64), 64, &[&a, &b, &o, &(n as i32)]);
        let got = d.download::<u32>(o, 32 * n);
        for i in 0..n {
            let (x, y, got) = (x[i], y[i], &got[32 * i..32 * i + 32]);
            let (a, b) = (f64::from(x), f64::from(y));
            for (k, how) in modes.into_iter().enumerate() {
                // Sums of 24-bit numbers this close in size, products and a * b + a are exact in f64 or differ from
                // the truth far below the rounded bit; quotients and roots of 24-bit numbers never fall on a midpoint.
                let want = [a + b, a * b, a * b + a, a / b, a.abs().sqrt()];
                for (op, want) in want.into_iter().enumerate() {
                    let got = f32::from_bits(got[op * 4 + k]);
                    near(f64::from(got), f32_of(want, how), 0.0, (build, op, how, x, y));
                }
            }
            let want = [
                f32_of(a * b, Round::Nearest) as f32,
                f32_of(a * b, Round::Zero) as f32,
                ((x * 1e6) as i32) as f32,
            ];
            assert_eq!(got[20..23], want.map(f32::to_bits), "{build:?} {x} {y}");
            let ints = [a.round_ties_even(), a.ceil(), a.floor()].map(|v| v as i32 as u32);
            assert_eq!(got[23..26], ints, "{build:?} {x}");
            assert_eq!(got[26], (x * 1e12) as i32 as u32, "{build:?} {x}"); // saturates
            assert_eq!(got[27], a.round_ties_even() as u32, "{build:?} {x}"); // so do negative numbers
            assert_eq!(f32::from_bits(got[28]), x.round_ties_even() + y.floor());
            assert_eq!(f32::from_bits(got[29]), x.min(y) - x.max(y));
            assert_eq!(got[30], x.copysign(y).to_bits());
            let flags = u32::from(x.is_sign_negative()) * 4
                + u32::from(x < y) * 40 // less, and not greater or equal
                + u32::from(x == y) * 16
                + u32::from(x != y) * 64;
            assert_eq!(got[31], flags, "{build:?} {x} {y}");
        }
    }
}

#[test]
fn newton_roots() {
    for build in BUILDS {
        let mut d = Device::new("mathlib.cu", build);
        let x = Rng(83).vec(130, |r| (r.f64().abs() + 1e-3) * 10f64.powi(r.below(9) as i32));
        let (a, b, s) = (d.upload(&x), d.empty::<f64>(130), d.empty::<i32>(130));
        d.run("newton_roots", 3, 64, &[&a, &b, &s, &130i32]);
        let steps = d.download::<i32>(s, 130);
        for (i, got) in d.download::<f64>(b, 130).into_iter().enumerate() {
            near(got, x[i].cbrt(), 8.0 * ulp64(x[i].cbrt()), (build, x[i]));
            assert!((1..=200).contains(&steps[i]));
        }
    }
}
