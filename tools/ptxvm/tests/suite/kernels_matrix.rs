//! sgemm.cu, mma_gemm.cu, wmma_gemm.cu, flash_attention.cu and norm.cu.

use crate::kernels::{
    BUILDS, Device, FAST, Rng, Round, SM80, SM90, U32, bf16, f16, from_bf16, from_f16, near, ulp32,
};

fn wide(x: &[f32]) -> Vec<f64> {
    x.iter().map(|v| f64::from(*v)).collect()
}

/// A[m][k] times B, where `b` is called with (k, n); also the same of the absolute values, for bounds.
fn product(a: &[f64], b: impl Fn(usize, usize) -> f64, m: usize, n: usize, k: usize) -> Vec<(f64, f64)> {
    let cell = |i: usize| {
        let (r, c) = (i / n, i % n);
        let terms = (0..k).map(|j| a[r * k + j] * b(j, c));
        terms.fold((0.0, 0.0), |(s, t), v: f64| (s + v, t + v.abs()))
    };
    (0..m * n).map(cell).collect()
}

#[test]
fn sgemm() {
    for build in BUILDS {
        for (entry, grid_tile, block, (m, n, k)) in [
            ("sgemm_naive", 16, (16, 16), (37usize, 29usize, 23usize)),
            ("sgemm_tiledILi16", 16, (16, 16), (37, 29, 23)),
            ("sgemm_tiledILi32", 32, (32, 32), (45, 33, 65)),
            ("sgemm_register_tiled", 64, (256, 1), (68, 76, 20)),
        ] {
            let mut d = Device::new("sgemm.cu", build);
            let mut rng = Rng(21);
            let (x, y, z) = (rng.f32s(m * k), rng.f32s(k * n), rng.f32s(m * n));
            let (a, b, c) = (d.upload(&x), d.upload(&y), d.upload(&z));
            let grid = (n.div_ceil(grid_tile), m.div_ceil(grid_tile));
            let (mi, ni, ki) = (m as i32, n as i32, k as i32);
            d.run(entry, grid, block, &[&mi, &ni, &ki, &1.5f32, &a, &b, &-0.25f32, &c]);
            let y = wide(&y);
            let want = product(&wide(&x), |j, c| y[j * n + c], m, n, k);
            for (i, got) in d.download::<f32>(c, m * n).into_iter().enumerate() {
                let (sum, size) = want[i];
                let z = f64::from(z[i]);
                // Products and sums round k times each, scaling three times more.
                let bound = (2 * k + 4) as f64 * U32 * (1.5 * size + 0.25 * z.abs());
                near(f64::from(got), 1.5 * sum - 0.25 * z, bound, (build, entry, i));
            }
        }
    }
}

/// Random numbers of a 16-bit format, with few enough bits that products are what they seem.
fn sixteen(rng: &mut Rng, n: usize, encode: fn(f64, Round) -> u16) -> Vec<u16> {
    rng.vec(n, |r| encode(r.f64(), Round::Nearest))
}

#[test]
fn tensor_core_gemm() {
    for build in BUILDS {
        for (entry, bm, threads, encode, decode) in [
            ("mma_gemmI13", 64usize, 128, bf16 as fn(f64, Round) -> u16, from_bf16 as fn(u16) -> f64),
            ("mma_gemmI6", 128, 256, f16, from_f16),
        ] {
            for (m, n, k) in [(70usize, 67usize, 104usize), (1, 5, 8), (130, 64, 32)] {
                let mut d = Device::new("mma_gemm.cu", build);
                let mut rng = Rng(22);
                let (x, y) = (sixteen(&mut rng, m * k, encode), sixteen(&mut rng, n * k, encode));
                let (a, b, c) = (d.upload(&x), d.upload(&y), d.empty::<f32>(m * n));
                let shared = 3 * (bm + 64) * 32 * 2;
                let grid = (n.div_ceil(64), m.div_ceil(bm));
                let args: [&dyn crate::kernels::ToArg; 6] =
                    [&a, &b, &c, &(m as i32), &(n as i32), &(k as i32)];
                d.run_shared(entry, grid, threads, shared as u32, &args);
                let x: Vec<f64> = x.into_iter().map(decode).collect();
                let want = product(&x, |j, c| decode(y[c * k + j]), m, n, k);
                for (i, got) in d.download::<f32>(c, m * n).into_iter().enumerate() {
                    // Tensor cores may cut instead of round: two units for each of the k additions.
                    near(f64::from(got), want[i].0, 2.0 * k as f64 * U32 * want[i].1, (build, entry, m, i));
                }
            }
        }
    }
}

#[test]
fn transposed_fragments() {
    for build in BUILDS {
        let (m, n, k) = (19usize, 35usize, 50usize);
        let mut d = Device::new("mma_gemm.cu", build);
        let mut rng = Rng(23);
        let (x, y) = (sixteen(&mut rng, m * k, bf16), sixteen(&mut rng, n * k, bf16));
        let (a, b, c) = (d.upload(&x), d.upload(&y), d.empty::<f32>(m * n));
        d.run("mma_gemm_trans", (3, 2), 32, &[&a, &b, &c, &(m as i32), &(n as i32), &(k as i32)]);
        let x: Vec<f64> = x.into_iter().map(from_bf16).collect();
        let want = product(&x, |j, c| from_bf16(y[j * n + c]), m, n, k);
        for (i, got) in d.download::<f32>(c, m * n).into_iter().enumerate() {
            near(f64::from(got), want[i].0, 2.0 * 64.0 * U32 * want[i].1, (build, i));
        }
    }
}

/// Whole numbers: every order and every width of accumulation gives the same bits.
#[test]
fn fragments_of_whole_numbers() {
    for build in BUILDS {
        let mut d = Device::new("mma_gemm.cu", build);
        let mut rng = Rng(24);
        let mut small = |n: usize, span: u64| rng.vec(n, |r| r.below(2 * span + 1) as f64 - span as f64);
        let exact = |a: &[f64], b: &[f64], m, n, k| -> Vec<f64> {
            product(a, |j, c| b[c * k + j], m, n, k).into_iter().map(|(s, _)| s).collect()
        };
        let encode = |x: &[f64], f: fn(f64, Round) -> u16| -> Vec<u16> {
            x.iter().map(|v| f(*v, Round::Nearest)).collect()
        };

        let (x, y) = (small(16 * 8, 100), small(8 * 8, 100));
        let (a, b) = (d.upload(&encode(&x, bf16)), d.upload(&encode(&y, bf16)));
        let c = d.empty::<f32>(128);
        d.run("mma_m16n8k8_bf16", 1, 32, &[&a, &b, &c]);
        let want: Vec<f64> = exact(&x, &y, 16, 8, 8).iter().map(|v| v + 0.5).collect();
        assert_eq!(wide(&d.download::<f32>(c, 128)), want, "{build:?}");

        let (x, y) = (small(16 * 16, 8), small(8 * 16, 8));
        let (a, b) = (d.upload(&encode(&x, f16)), d.upload(&encode(&y, f16)));
        let c = d.empty::<u16>(128);
        d.run("mma_m16n8k16_f16_accumulate", 1, 32, &[&a, &b, &c]);
        assert_eq!(d.download::<u16>(c, 128), encode(&exact(&x, &y, 16, 8, 16), f16), "{build:?}");

        let (x, y) = (small(16 * 8, 1000), small(8 * 8, 1000));
        let narrow = |x: &[f64]| x.iter().map(|v| *v as f32).collect::<Vec<f32>>();
        let (a, b, c) = (d.upload(&narrow(&x)), d.upload(&narrow(&y)), d.empty::<f32>(128));
        d.run("mma_m16n8k8_tf32", 1, 32, &[&a, &b, &c]);
        assert_eq!(wide(&d.download::<f32>(c, 128)), exact(&x, &y, 16, 8, 8), "{build:?}");

        let (x, y) = (small(8 * 4, 1 << 20), small(8 * 4, 1 << 20));
        let (a, b, c) = (d.upload(&x), d.upload(&y), d.empty::<f64>(64));
        d.run("mma_m8n8k4_f64", 1, 32, &[&a, &b, &c]);
        let want: Vec<f64> = exact(&x, &y, 8, 8, 4);
        let want: Vec<f64> =
            want.iter().enumerate().map(|(i, v)| v + if i % 2 == 0 { 1.0 } else { -1.0 }).collect();
        assert_eq!(d.download::<f64>(c, 64), want, "{build:?}");
    }
}

#[test]
fn integer_gemm() {
    for build in BUILDS {
        let (m, n, k) = (35usize, 21usize, 96usize);
        let mut d = Device::new("mma_gemm.cu", build);
        let mut rng = Rng(25);
        let (x, y) = (rng.vec(m * k, |r| r.u32() as i8), rng.vec(n * k, |r| r.u32() as i8));
        let (a, b, c) = (d.upload(&x), d.upload(&y), d.empty::<i32>(m * n));
        d.run("mma_gemm_s8", (3, 3), 32, &[&a, &b, &c, &(m as i32), &(n as i32), &(k as i32)]);
        let dot =
            |i: usize| (0..k).map(|j| i32::from(x[i / n * k + j]) * i32::from(y[i % n * k + j])).sum::<i32>();
        assert_eq!(d.download::<i32>(c, m * n), (0..m * n).map(dot).collect::<Vec<_>>(), "{build:?}");

        let (x, y) = (rng.vec(256, |r| r.u32() as u8), rng.vec(128, |r| r.u32() as i8));
        let start = rng.vec(128, |r| if r.u32() & 1 == 0 { i32::MAX - 20_000 } else { i32::MIN + 20_000 });
        let (a, b, s, c) = (d.upload(&x), d.upload(&y), d.upload(&start), d.empty::<i32>(128));
        d.run("mma_m16n8k16_u8s8_satfinite", 1, 32, &[&a, &b, &s, &c]);
        let want: Vec<i32> = (0..128)
            .map(|i| {
                let dot = (0..16).map(|j| i64::from(x[i / 8 * 16 + j]) * i64::from(y[i % 8 * 16 + j]));
                let sum = dot.sum::<i64>() + i64::from(start[i]);
                sum.clamp(i64::from(i32::MIN), i64::from(i32::MAX)) as i32
            })
            .collect();
        assert_eq!(d.download::<i32>(c, 128), want, "{build:?}");
    }
}

#[test]
fn wmma() {
    for build in BUILDS {
        let mut d = Device::new("wmma_gemm.cu", build);
        let mut rng = Rng(26);
        let (m, n, k) = (48usize, 32usize, 64usize);
        let (mi, ni, ki) = (m as i32, n as i32, k as i32);
        for (entry, encode, decode) in [
            ("wmma_gemmI6__half", f16 as fn(f64, Round) -> u16, from_f16 as fn(u16) -> f64),
            ("wmma_gemmI13", bf16, from_bf16),
        ] {
            let (x, y) = (sixteen(&mut rng, m * k, encode), sixteen(&mut rng, n * k, encode));
            let (a, b, c) = (d.upload(&x), d.upload(&y), d.empty::<f32>(m * n));
            d.run(entry, (2, 2), (32, 2), &[&a, &b, &c, &mi, &ni, &ki, &2.0f32]);
            let x: Vec<f64> = x.into_iter().map(decode).collect();
            let want = product(&x, |j, c| decode(y[c * k + j]), m, n, k);
            for (i, got) in d.download::<f32>(c, m * n).into_iter().enumerate() {
                near(f64::from(got), 2.0 * want[i].0, 4.0 * k as f64 * U32 * want[i].1, (build, entry, i));
            }
        }
    }
}

#[test]
fn wmma_integers_and_shapes() {
    for build in BUILDS {
        let mut d = Device::new("wmma_gemm.cu", build);
        let mut rng = Rng(27);
        let (m, n, k) = (32usize, 48usize, 32usize);
        let (x, y) = (rng.vec(m * k, |r| r.u32() as i8), rng.vec(n * k, |r| r.u32() as i8));
        let (a, b, c) = (d.upload(&x), d.upload(&y), d.empty::<i32>(m * n));
        d.run("wmma_gemmIai", (3, 2), (32, 1), &[&a, &b, &c, &(m as i32), &(n as i32), &(k as i32), &-3i32]);
        let dot =
            |i: usize| (0..k).map(|j| i32::from(x[i / n * k + j]) * i32::from(y[i % n * k + j])).sum::<i32>();
        assert_eq!(
            d.download::<i32>(c, m * n),
            (0..m * n).map(|i| -3 * dot(i)).collect::<Vec<_>>(),
            "{build:?}"
        );

        // Small whole numbers, exact in f16, too. A is 32 x 16 or, its beginning, 8 x 16; B has rows of 32.
        let whole = |rng: &mut Rng| rng.vec(512, |r| r.below(17) as f64 - 8.0);
        let (x, y) = (whole(&mut rng), whole(&mut rng));
        let encode = |x: &[f64]| x.iter().map(|v| f16(*v, Round::Nearest)).collect::<Vec<_>>();
        let (a, b) = (d.upload(&encode(&x)), d.upload(&encode(&y)));
        let (tall, flat) = (d.empty::<f32>(256), d.empty::<f32>(256));
        d.run("wmma_shapes", 1, 32, &[&a, &b, &tall, &flat]);
        let dot = |r: usize, c: usize| (0..16).map(|j| x[r * 16 + j] * y[j * 32 + c]).sum::<f64>();
        let want: Vec<f64> = (0..256).map(|i| dot(i % 32, i / 32) + 1.0).collect(); // column-major
        assert_eq!(wide(&d.download::<f32>(tall, 256)), want, "{build:?}");
        let want: Vec<f64> = (0..256).map(|i| dot(i / 32, i % 32)).collect();
        assert_eq!(wide(&d.download::<f32>(flat, 256)), want, "{build:?}");

        let (x, y) = (rng.f32s(16 * 40), rng.f32s(40 * 16));
        let start = rng.f32s(256);
        let (a, b, c) = (d.upload(&x), d.upload(&y), d.upload(&start));
        d.run("wmma_tf32", 1, 32, &[&a, &b, &c, &40i32]);
        let y = wide(&y);
        let want = product(&wide(&x), |j, c| y[j * 16 + c], 16, 16, 40);
        for (i, got) in d.download::<f32>(c, 256).into_iter().enumerate() {
            let start = f64::from(start[i]);
            // Each factor loses up to 2^-11 of itself, the sums as in f32.
            let bound = (2f64.powi(-10) + 80.0 * U32) * want[i].1 + 80.0 * U32 * start.abs();
            near(f64::from(got), want[i].0 + start, bound * 1.01, (build, i));
        }
    }
}

/// Attention of one head in f64: outputs and log-sum-exp.
pub(crate) fn attention(
    q: &[f64],
    k: &[f64],
    v: &[f64],
    tokens: usize,
    d: usize,
    scale: f64,
    causal: bool,
) -> (Vec<f64>, Vec<f64>) {
    let (mut out, mut lse) = (vec![0.0; tokens * d], vec![0.0; tokens]);
    for r in 0..tokens {
        let end = if causal { r + 1 } else { tokens };
        let score = |c: usize| scale * (0..d).map(|j| q[r * d + j] * k[c * d + j]).sum::<f64>();
        let scores: Vec<f64> = (0..end).map(score).collect();
        let top = scores.iter().copied().fold(f64::MIN, f64::max);
        let sum: f64 = scores.iter().map(|s| (s - top).exp()).sum();
        lse[r] = top + sum.ln();
        for (c, s) in scores.iter().enumerate() {
            (0..d).for_each(|j| out[r * d + j] += (s - lse[r]).exp() * v[c * d + j]);
        }
    }
    (out, lse)
}

#[test]
fn flash_attention() {
    for build in [SM80, SM90] {
        for (entry, width, causal, tokens) in
            [("flash_forwardILi64", 64usize, true, 150usize), ("flash_forwardILi32", 32, false, 77)]
        {
            let heads = 2;
            let mut d = Device::new("flash_attention.cu", build);
            let mut rng = Rng(28);
            let all = heads * tokens * width;
            let [q, k, v] = [(); 3].map(|()| sixteen(&mut rng, all, bf16));
            let [a, b, c] = [&q, &k, &v].map(|x| d.upload(x));
            let (o, l) = (d.empty::<u16>(all), d.empty::<f32>(heads * tokens));
            d.run(entry, (tokens.div_ceil(64), heads), 128, &[&a, &b, &c, &o, &l, &(tokens as i32), &0.5f32]);
            let [q, k, v] = [q, k, v].map(|x| x.into_iter().map(from_bf16).collect::<Vec<_>>());
            let (got, sums) = (d.download::<u16>(o, all), d.download::<f32>(l, heads * tokens));
            for h in 0..heads {
                let part = h * tokens * width..(h + 1) * tokens * width;
                let (want, lse) = attention(
                    &q[part.clone()],
                    &k[part.clone()],
                    &v[part.clone()],
                    tokens,
                    width,
                    0.5,
                    causal,
                );
                for (i, want) in want.into_iter().enumerate() {
                    // |v| <= 1, so an error of p is at most one of the output: p and the output are rounded to bf16
                    // (2^-9 each); scores are off by 64 products' roundings of numbers below 64.
                    let bound = 2f64.powi(-9) * 2.0 + 2.0 * 64.0 * 64.0 * U32;
                    near(from_bf16(got[part.start + i]), want, bound, (build, entry, h, i));
                }
                for (i, want) in lse.into_iter().enumerate() {
                    near(f64::from(sums[h * tokens + i]), want, 64.0 * 64.0 * U32, (build, entry, h, i));
                }
            }
        }
    }
}

#[test]
fn softmax() {
    for build in [BUILDS[0], BUILDS[1], BUILDS[2], FAST] {
        let mut d = Device::new("norm.cu", build);
        let mut rng = Rng(29);
        for (entry, rows, cols) in [("softmax_rows", 3usize, 1020usize), ("softmax_warp", 5, 101)] {
            let x = rng.vec(rows * cols, |r| r.f32() * 10.0);
            let (a, b) = (d.upload(&x), d.empty::<f32>(x.len()));
            if entry == "softmax_rows" {
                d.run(entry, rows, 256, &[&a, &b, &(cols as i32)]);
            } else {
                d.run(entry, 2, (32, 4), &[&a, &b, &(rows as i32), &(cols as i32)]);
            }
            let got = d.download::<f32>(b, x.len());
            for (got, x) in got.chunks(cols).zip(wide(&x).chunks(cols)) {
                let top = x.iter().copied().fold(f64::MIN, f64::max);
                let sum: f64 = x.iter().map(|v| (v - top).exp()).sum();
                for (got, x) in got.iter().zip(x) {
                    let want = (x - top).exp() / sum;
                    // The exponent of exp2 is at most 29 and rounded twice, which __expf turns into a relative error;
                    // 4 more units for the function itself and the division, and one for each addition of the sum.
                    let relative = (2.0 * 29.0 + 8.0 + cols as f64) * U32;
                    near(f64::from(*got), want, relative * want + 1e-37, (build, entry));
                }
            }
        }
    }
}

#[test]
fn norms() {
    for build in BUILDS {
        let mut d = Device::new("norm.cu", build);
        let mut rng = Rng(30);
        for (rows, cols, threads) in [(3usize, 333usize, 128usize), (2, 20, 96)] {
            let x = rng.vec(rows * cols, |r| r.f32() * 3.0 + 1.0);
            let (gain, bias) = (rng.f32s(cols), rng.f32s(cols));
            let (a, g, b, o) = (d.upload(&x), d.upload(&gain), d.upload(&bias), d.empty::<f32>(x.len()));
            d.run("layer_norm", rows, threads, &[&a, &g, &b, &o, &(cols as i32), &1e-5f32]);
            let got = d.download::<f32>(o, x.len());
            for (r, x) in wide(&x).chunks(cols).enumerate() {
                let mean = x.iter().sum::<f64>() / cols as f64;
                let var = x.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / cols as f64;
                for c in 0..cols {
                    let unit = (x[c] - mean) / (var + f64::from(1e-5f32)).sqrt();
                    let want = unit * f64::from(gain[c]) + f64::from(bias[c]);
                    // The mean is off by up to a unit of its size for each step (|x| <= 4), the deviation relatively so.
                    let bound = 2.0 * cols as f64 * U32 * (4.0 + unit.abs()) + 4.0 * ulp32(want);
                    near(f64::from(got[r * cols + c]), want, bound, (build, r, c));
                }
            }
        }

        let (rows, cols) = (3usize, 648usize);
        let (x, w) = (sixteen(&mut rng, rows * cols, bf16), sixteen(&mut rng, cols, bf16));
        let (a, g, o) = (d.upload(&x), d.upload(&w), d.empty::<u16>(x.len()));
        d.run("rms_norm_bf16", rows, 128, &[&a, &g, &o, &(cols as i32), &1e-6f32]);
        let got = d.download::<u16>(o, x.len());
        for r in 0..rows {
            let row: Vec<f64> = x[r * cols..(r + 1) * cols].iter().map(|v| from_bf16(*v)).collect();
            let scale = (row.iter().map(|v| v * v).sum::<f64>() / cols as f64 + f64::from(1e-6f32)).sqrt();
            for c in 0..cols {
                let want = row[c] / scale * (1.0 + from_bf16(w[c]));
                let bound = (2f64.powi(-8) + (cols as f64 + 8.0) * U32) * want.abs();
                near(from_bf16(got[r * cols + c]), want, bound, (build, r, c));
            }
        }
    }
}
