//! reduce.cu, scan.cu, sort.cu and random.cu.

use crate::kernels::{BUILDS, Device, Rng, U32, U64, near, ulp32};

/// Any order of summing n numbers: each addition rounds, at most n - 1 of them on a path.
fn sum_bound(x: &[f64], unit: f64) -> f64 {
    x.iter().map(|v| v.abs()).sum::<f64>() * unit * x.len() as f64
}

fn f64s(x: &[f32]) -> Vec<f64> {
    x.iter().map(|v| f64::from(*v)).collect()
}

#[test]
fn block_reductions() {
    for build in BUILDS {
        let mut d = Device::new("reduce.cu", build);
        let mut rng = Rng(11);
        let (n, grid) = (3001usize, 3usize);
        let count = n as i32;

        let x = rng.f32s(n);
        let wide = f64s(&x);
        let (a, b) = (d.upload(&x), d.empty::<f32>(grid));
        d.run("reduceIf3Sum", grid, 256, &[&a, &b, &count]);
        let got: f64 = f64s(&d.download::<f32>(b, grid)).iter().sum();
        near(got, wide.iter().sum(), sum_bound(&wide, U32), build);
        d.run("reduceIf3Max", grid, 512, &[&a, &b, &count]);
        let got = d.download::<f32>(b, grid);
        assert_eq!(got.into_iter().reduce(f32::max), x.iter().copied().reduce(f32::max));

        let x = rng.vec(n, |r| r.f64());
        let (a, b) = (d.upload(&x), d.empty::<f64>(grid));
        d.run("reduceId", grid, 128, &[&a, &b, &count]);
        near(d.download::<f64>(b, grid).iter().sum(), x.iter().sum(), sum_bound(&x, U64) * 2.0, build);

        let x = rng.vec(n, |r| r.u32() as i32);
        let (a, b) = (d.upload(&x), d.empty::<i32>(grid));
        d.run("reduceIi", grid, 64, &[&a, &b, &count]);
        assert_eq!(d.download::<i32>(b, grid).iter().max(), x.iter().max());

        let x = rng.vec(n, |r| r.u64() as i64);
        let (a, b) = (d.upload(&x), d.empty::<i64>(grid));
        d.run("reduceIx", grid, 1024, &[&a, &b, &count]);
        let sum = |x: &[i64]| x.iter().fold(0, |s: i64, v| s.wrapping_add(*v));
        assert_eq!(sum(&d.download::<i64>(b, grid)), sum(&x));
    }
}

#[test]
fn tree_reduction() {
    for build in BUILDS {
        let mut d = Device::new("reduce.cu", build);
        let x = Rng(12).f32s(1003);
        let (a, b) = (d.upload(&x), d.empty::<f32>(8));
        d.run_shared("reduce_tree", 8, 128, 512, &[&a, &b, &1003i32]);
        for (got, part) in d.download::<f32>(b, 8).into_iter().zip(x.chunks(128)) {
            // The very tree: the result is the same to the bit.
            let mut s = [0f32; 128];
            s[..part.len()].copy_from_slice(part);
            let mut half = 64;
            while half > 0 {
                (0..half).for_each(|t| s[t] += s[t + half]);
                half /= 2;
            }
            assert_eq!(got, s[0], "{build:?}");
        }
    }
}

#[test]
fn segments_and_dot() {
    for build in BUILDS {
        let mut d = Device::new("reduce.cu", build);
        let mut rng = Rng(13);
        let lengths = [0usize, 1, 31, 32, 33, 100, 5];
        let mut offsets = vec![0i32];
        lengths.iter().for_each(|l| offsets.push(offsets.last().unwrap() + *l as i32));
        let n: usize = lengths.iter().sum();
        let x = rng.f32s(n);
        let (a, o, b) = (d.upload(&x), d.upload(&offsets), d.empty::<f32>(7));
        d.run("segmented_sum", 2, 128, &[&a, &o, &b, &7i32]);
        let wide = f64s(&x);
        for (i, got) in d.download::<f32>(b, 7).into_iter().enumerate() {
            let part = &wide[offsets[i] as usize..offsets[i + 1] as usize];
            near(f64::from(got), part.iter().sum(), sum_bound(part, U32), (build, i));
        }

        let (x, y) = (rng.f32s(5001), rng.f32s(5001));
        let products: Vec<f64> = x.iter().zip(&y).map(|(x, y)| f64::from(*x) * f64::from(*y)).collect();
        let (a, b, out) = (d.upload(&x), d.upload(&y), d.upload(&[0f64]));
        d.run("dot_f64", 5, 256, &[&a, &b, &out, &5001i32]);
        let got = d.download::<f64>(out, 1)[0];
        near(got, products.iter().sum(), 2.0 * sum_bound(&products, U64), build);
    }
}

#[test]
fn redux_and_last_block() {
    for build in BUILDS {
        let mut d = Device::new("reduce.cu", build);
        let mut rng = Rng(14);
        let n = 107usize; // the last warp has 11 lanes
        let x = rng.vec(n, |r| r.u32() as i32);
        let (a, b) = (d.upload(&x), d.empty::<i32>(4 * 8));
        d.run("redux", 2, 64, &[&a, &b, &(n as i32)]);
        let got = d.download::<i32>(b, 32);
        for (w, part) in x.chunks(32).enumerate() {
            let fold = |f: fn(u32, u32) -> u32| part.iter().map(|v| *v as u32).reduce(f).unwrap() as i32;
            let want = [
                fold(u32::wrapping_add),
                *part.iter().min().unwrap(),
                *part.iter().max().unwrap(),
                fold(u32::min),
                fold(u32::max),
                fold(|a, b| a & b),
                fold(|a, b| a | b),
                fold(|a, b| a ^ b),
            ];
            assert_eq!(got[w * 8..w * 8 + 8], want, "{build:?} warp {w}");
        }

        let x = rng.f32s(4001);
        let (a, part, out) = (d.upload(&x), d.empty::<f32>(9), d.empty::<f32>(1));
        for _ in 0..2 {
            // The counter wraps, so the kernel can be launched again.
            d.run("sum_last_block", 9, 128, &[&a, &part, &out, &4001i32]);
            let got = f64::from(d.download::<f32>(out, 1)[0]);
            near(got, f64s(&x).iter().sum(), sum_bound(&f64s(&x), U32), build);
        }
    }
}

#[test]
fn scans() {
    for build in BUILDS {
        let mut d = Device::new("scan.cu", build);
        let mut rng = Rng(15);
        let exclusive = |x: &[u32]| -> Vec<u32> {
            x.iter().scan(0u32, |s, v| Some(std::mem::replace(s, s.wrapping_add(*v)))).collect()
        };
        let x = rng.vec(501, Rng::u32);
        let (a, b) = (d.upload(&x), d.empty::<u32>(501));
        d.run_shared("scan_blelloch", 1, 256, (512 + 16) * 4, &[&a, &b, &501i32]);
        assert_eq!(d.download::<u32>(b, 501), exclusive(&x), "{build:?}");

        let x = rng.vec(203, Rng::u32);
        let (a, b) = (d.upload(&x), d.empty::<u32>(203));
        d.run("scan_warp_asm", 4, 64, &[&a, &b, &203i32]);
        let want: Vec<u32> = x
            .chunks(32)
            .flat_map(|w| {
                exclusive(w).into_iter().zip(w).map(|(s, v)| s.wrapping_add(*v)).collect::<Vec<_>>()
            })
            .collect();
        assert_eq!(d.download::<u32>(b, 203), want, "{build:?}");

        let n = 9 * 512 - 77;
        let x = rng.vec(n, |r| r.u32() >> 8);
        let (a, b, state) = (d.upload(&x), d.empty::<u32>(n), d.upload(&[0u64; 10]));
        d.run("scan_look_back", 9, 128, &[&a, &b, &state, &(n as i32)]);
        assert_eq!(d.download::<u32>(b, n), exclusive(&x), "{build:?}");

        let x = rng.vec(1111, |r| r.u32() as i32);
        let (a, b, count) = (d.upload(&x), d.empty::<i32>(1111), d.upload(&[0i32]));
        d.run("compact", 5, 256, &[&a, &b, &count, &1111i32]);
        let mut want: Vec<i32> = x.iter().copied().filter(|v| v & 1 == 1).collect();
        assert_eq!(d.download::<i32>(count, 1)[0] as usize, want.len());
        let mut got = d.download::<i32>(b, want.len());
        got.sort_unstable();
        want.sort_unstable();
        assert_eq!(got, want, "{build:?}");
    }
}

#[test]
fn radix_sort() {
    for build in BUILDS {
        let mut d = Device::new("sort.cu", build);
        let n = 1003usize;
        let blocks = n.div_ceil(128);
        let mut rng = Rng(16);
        let keys = rng.vec(n, |r| r.u32() & 0xff3f_f0ff); // with repeats in some digits
        let values: Vec<u32> = (0..n as u32).collect();
        let mut from = (d.upload(&keys), d.upload(&values));
        let mut to = (d.empty::<u32>(n), d.empty::<u32>(n));
        let counts = d.empty::<u32>(16 * blocks);
        for shift in (0..32i32).step_by(4) {
            d.run("radix_count", blocks, 128, &[&from.0, &counts, &(n as i32), &shift]);
            d.run("radix_offsets", 1, 1, &[&counts, &(16 * blocks as i32)]);
            let args: [&dyn crate::kernels::ToArg; 7] =
                [&from.0, &from.1, &to.0, &to.1, &counts, &(n as i32), &shift];
            d.run("radix_scatter", blocks, 128, &args);
            std::mem::swap(&mut from, &mut to);
        }
        let mut want: Vec<(u32, u32)> = keys.into_iter().zip(values).collect();
        want.sort(); // by key, then by place: what a stable sort gives
        let got: Vec<_> =
            d.download::<u32>(from.0, n).into_iter().zip(d.download::<u32>(from.1, n)).collect();
        assert_eq!(got, want, "{build:?}");
    }
}

#[test]
fn bitonic_sorts() {
    for build in BUILDS {
        let mut d = Device::new("sort.cu", build);
        let mut rng = Rng(17);
        let mut x = rng.f32s(3 * 256);
        let a = d.upload(&x);
        d.run_shared("bitonic_sort", 3, 128, 1024, &[&a]);
        x.chunks_mut(256).for_each(|c| c.sort_by(f32::total_cmp));
        assert_eq!(d.download::<f32>(a, x.len()), x, "{build:?}");

        let mut x = rng.vec(150, Rng::u64);
        let a = d.upload(&x);
        d.run("bitonic_warp", 2, 96, &[&a, &150i32]);
        x.chunks_mut(32).for_each(<[u64]>::sort_unstable);
        assert_eq!(d.download::<u64>(a, 150), x, "{build:?}");
    }
}

#[test]
fn histogram() {
    for build in BUILDS {
        let mut d = Device::new("sort.cu", build);
        let x = Rng(18).vec(2501, |r| r.u32() & r.u32()); // not uniform
        let (a, bins) = (d.upload(&x), d.upload(&[0u32; 256]));
        d.run("histogram256", 4, 192, &[&a, &2501i32, &bins]);
        let mut want = vec![0u32; 256];
        x.iter().flat_map(|w| w.to_le_bytes()).for_each(|b| want[b as usize] += 1);
        assert_eq!(d.download::<u32>(bins, 256), want, "{build:?}");
    }
}

pub(crate) fn philox(mut c: [u32; 4], seed: u64) -> [u32; 4] {
    let mut k = [seed as u32, (seed >> 32) as u32];
    for _ in 0..10 {
        let (p, q) = (u64::from(c[0]) * 0xD251_1F53, u64::from(c[2]) * 0xCD9E_8D57);
        c = [(q >> 32) as u32 ^ c[1] ^ k[0], q as u32, (p >> 32) as u32 ^ c[3] ^ k[1], p as u32];
        k = [k[0].wrapping_add(0x9E37_79B9), k[1].wrapping_add(0xBB67_AE85)];
    }
    c
}

#[test]
fn random_numbers() {
    // Known answers of Random123: all zeros, and the digits of pi.
    assert_eq!(philox([0; 4], 0), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
    for build in BUILDS {
        let mut d = Device::new("random.cu", build);
        let (n, seed, offset) = (333usize, 0x2990_31d0_a409_3822u64, u64::from(u32::MAX) - 100);
        let out = d.empty::<[u32; 4]>(n);
        d.run("philox_fill", 2, 64, &[&out, &(n as i32), &seed, &offset]);
        for (i, got) in d.download::<[u32; 4]>(out, n).into_iter().enumerate() {
            let c = offset + i as u64;
            assert_eq!(got, philox([c as u32, (c >> 32) as u32, 0, 0], seed), "{build:?} {i}");
        }

        let out = d.empty::<[f32; 2]>(n);
        d.run("normal_fill", n.div_ceil(64), 64, &[&out, &(n as i32), &seed]);
        for (i, [s, c]) in d.download::<[f32; 2]>(out, n).into_iter().enumerate() {
            let r = philox([i as u32, 0, 1, 0], seed);
            let uniform = |x: u32| (x as f32).mul_add(2f32.powi(-32), 2f32.powi(-33));
            let (u, v) = (uniform(r[0]), uniform(r[1]));
            let radius = (-2.0 * f64::from(u).ln()).sqrt();
            let angle = 2.0 * std::f64::consts::PI * f64::from(v);
            // logf 1 ulp, sqrtf exact, sincospi 1 ulp, one product; log near 1 is small and so is its ulp.
            let bound = 4.0 * ulp32(radius);
            near(f64::from(s), radius * angle.sin(), bound, (build, i));
            near(f64::from(c), radius * angle.cos(), bound, (build, i));
        }

        let out = d.empty::<u64>(n);
        d.run("lcg_jump", 3, 128, &[&out, &(n as i32), &seed]);
        let mut state = seed;
        for (i, got) in d.download::<u64>(out, n).into_iter().enumerate() {
            assert_eq!(got, state, "{build:?} {i}");
            for _ in 0..977 {
                state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            }
        }
    }
}
