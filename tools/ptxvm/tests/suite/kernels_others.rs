//! PTX that other compilers wrote: tests/kernels/triton and tests/kernels/clang.

use std::fs;
use std::path::{Path, PathBuf};

use ptxvm::Arg;

use crate::kernels::{Device, Rng, Round, ToArg, U32, bf16, f16, from_bf16, from_f16, near};
use crate::kernels_matrix::attention;
use crate::toolchain;

fn path(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/kernels").join(name)
}

fn text(name: &str) -> String {
    fs::read_to_string(path(name)).unwrap_or_else(|e| panic!("{name}: {e}"))
}

struct Null;
impl ToArg for Null {
    fn to_arg(&self) -> Arg {
        Arg::U64(0)
    }
}

/// Runs a program of Triton: block and shared memory as the file's second line says, two null scratch pointers last.
struct Triton {
    device: Device,
    name: String,
    threads: usize,
    shared: u32,
}

impl Triton {
    fn new(name: &str, arch: u32) -> Self {
        let text = text(&format!("triton/{name}_sm{arch}.ptx"));
        let line: Vec<&str> = text.lines().nth(1).unwrap().split(' ').collect();
        let ["//", "warps", warps, "shared", shared, "scratch", "0"] = line[..] else { panic!("{line:?}") };
        let (threads, shared) = (warps.parse::<usize>().unwrap() * 32, shared.parse().unwrap());
        Self { device: Device::with_ptx(name, &text), name: name.to_owned(), threads, shared }
    }

    fn run(&mut self, grid: (usize, usize), args: &[&dyn ToArg]) {
        let args: Vec<&dyn ToArg> = args.iter().copied().chain([&Null as &dyn ToArg, &Null]).collect();
        self.device.run_shared(&self.name, grid, self.threads, self.shared, &args);
    }
}

#[test]
fn the_assembler_accepts_all() {
    for folder in ["triton", "clang"] {
        for file in fs::read_dir(path(folder)).unwrap().map(|entry| entry.unwrap().path()) {
            if file.extension().is_some_and(|e| e == "ptx") {
                let hopper = file.to_str().unwrap().ends_with("sm90.ptx");
                let copy = Path::new(env!("CARGO_TARGET_TMPDIR")).join(file.file_name().unwrap());
                fs::copy(&file, &copy).unwrap(); // the output lies beside it
                toolchain::assemble(&copy, if hopper { "90a" } else { "80" });
            }
        }
    }
}

#[test]
fn triton_add() {
    for arch in [80, 90] {
        let mut t = Triton::new("add", arch);
        let n = 2500usize;
        let mut rng = Rng(31);
        let (x, y) = (rng.f32s(n), rng.f32s(n));
        let (a, b, c) = (t.device.upload(&x), t.device.upload(&y), t.device.empty::<f32>(n));
        t.run((n.div_ceil(1024), 1), &[&a, &b, &c, &(n as i32)]);
        let want: Vec<f32> = x.iter().zip(&y).map(|(x, y)| x + y).collect();
        assert_eq!(t.device.download::<f32>(c, n), want, "sm_{arch}");
    }
}

#[test]
fn triton_softmax() {
    for arch in [80, 90] {
        let mut t = Triton::new("softmax", arch);
        let (rows, cols, stride) = (3usize, 784usize, 800usize);
        let x = Rng(32).vec(rows * stride, |r| r.f32() * 8.0);
        let (a, b) = (t.device.upload(&x), t.device.upload(&vec![-1f32; rows * stride]));
        t.run((rows, 1), &[&b, &a, &(stride as i32), &(cols as i32)]);
        let got = t.device.download::<f32>(b, rows * stride);
        for (got, x) in got.chunks(stride).zip(x.chunks(stride)) {
            let x: Vec<f64> = x[..cols].iter().map(|v| f64::from(*v)).collect();
            let top = x.iter().copied().fold(f64::MIN, f64::max);
            let sum: f64 = x.iter().map(|v| (v - top).exp()).sum();
            for (c, got) in got.iter().enumerate() {
                if c >= cols {
                    assert_eq!(*got, -1.0);
                    continue;
                }
                let want = (x[c] - top).exp() / sum;
                // Exponents of 2 up to 24, rounded twice; then the function, the sum and the division.
                near(f64::from(*got), want, (2.0 * 24.0 + 12.0 + cols as f64) * U32 * want, (arch, c));
            }
        }
    }
}

#[test]
fn triton_layer_norm() {
    for arch in [80, 90] {
        let mut t = Triton::new("layer_norm", arch);
        let (rows, cols) = (3usize, 777usize);
        let mut rng = Rng(33);
        let x = rng.vec(rows * cols, |r| r.f32() * 2.0 + 1.0);
        let (gain, bias) = (rng.f32s(cols), rng.f32s(cols));
        let d = &mut t.device;
        let (a, g, b, o) = (d.upload(&x), d.upload(&gain), d.upload(&bias), d.empty::<f32>(x.len()));
        t.run((rows, 1), &[&a, &g, &b, &o, &(cols as i32), &1e-5f32]);
        let got = t.device.download::<f32>(o, x.len());
        for r in 0..rows {
            let x: Vec<f64> = x[r * cols..(r + 1) * cols].iter().map(|v| f64::from(*v)).collect();
            let mean = x.iter().sum::<f64>() / cols as f64;
            let var = x.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / cols as f64;
            for c in 0..cols {
                let unit = (x[c] - mean) / (var + f64::from(1e-5f32)).sqrt();
                let want = unit * f64::from(gain[c]) + f64::from(bias[c]);
                let bound = cols as f64 * U32 * (3.0 + unit.abs()) + 8.0 * U32 * (unit.abs() + 1.0);
                near(f64::from(got[r * cols + c]), want, bound, (arch, r, c));
            }
        }
    }
}

/// On sm_90 by `wgmma`: A is K-major with a swizzle of 64 bytes, B is MN-major with one of 128.
#[test]
fn triton_matmul() {
    for arch in [80, 90] {
        let mut t = Triton::new("matmul", arch);
        let (m, n, k) = (75usize, 80usize, 112usize);
        let mut rng = Rng(34);
        let mut sixteen = |n| rng.vec(n, |r| bf16(r.f64(), Round::Nearest));
        let (x, y) = (sixteen(m * k), sixteen(k * n));
        let (a, b, c) = (t.device.upload(&x), t.device.upload(&y), t.device.empty::<f32>(m * n));
        t.run((2, 2), &[&a, &b, &c, &(m as i32), &(n as i32), &(k as i32)]);
        for (i, got) in t.device.download::<f32>(c, m * n).into_iter().enumerate() {
            let terms = (0..k).map(|j| from_bf16(x[i / n * k + j]) * from_bf16(y[j * n + i % n]));
            let (sum, size) = terms.fold((0.0, 0.0), |(s, t): (f64, f64), v| (s + v, t + v.abs()));
            near(f64::from(got), sum, 2.0 * k as f64 * U32 * size, (arch, i));
        }
    }
}

#[test]
fn triton_attention() {
    let mut t = Triton::new("attention", 80);
    let (heads, tokens, width) = (2usize, 93usize, 64usize);
    let all = heads * tokens * width;
    let mut rng = Rng(35);
    let [q, k, v] = [(); 3].map(|()| rng.vec(all, |r| f16(r.f64(), Round::Nearest)));
    let [a, b, c] = [&q, &k, &v].map(|x| t.device.upload(x));
    let o = t.device.empty::<u16>(all);
    t.run((tokens.div_ceil(64), heads), &[&a, &b, &c, &o, &0.25f32, &(tokens as i32)]);
    let got = t.device.download::<u16>(o, all);
    let [q, k, v] = [q, k, v].map(|x| x.into_iter().map(from_f16).collect::<Vec<_>>());
    for h in 0..heads {
        let part = h * tokens * width..(h + 1) * tokens * width;
        let (want, _) =
            attention(&q[part.clone()], &k[part.clone()], &v[part.clone()], tokens, width, 0.25, true);
        for (i, want) in want.into_iter().enumerate() {
            // p and the output in f16, 2^-12 each of at most 1; scores of 64 products.
            let bound = 2f64.powi(-11) + 2.0 * 64.0 * 64.0 * U32;
            near(from_f16(got[part.start + i]), want, bound, (h, i));
        }
    }
}

#[test]
fn clang_kernels() {
    for level in ["O2", "O0"] {
        let mut d = Device::with_ptx("clang", &text(&format!("clang/kernels_{level}.ptx")));
        let mut rng = Rng(36);
        let n = 501usize;
        let count = n as i32;

        let (x, y) = (rng.vec(n, Rng::f64), rng.vec(n, Rng::f64));
        let (a, b) = (d.upload(&x), d.upload(&y));
        d.run("axpy", 3, 64, &[&a, &b, &0.3f64, &(n as u64)]);
        let want: Vec<f64> = x.iter().zip(&y).map(|(x, y)| 0.3f64.mul_add(*x, *y)).collect();
        assert_eq!(d.download::<f64>(b, n), want, "{level}");

        let x = rng.vec(n, |r| r.u32() as i32);
        let (a, out) = (d.upload(&x), d.upload(&[5i32]));
        d.run("sum", 2, 96, &[&a, &out, &count]);
        assert_eq!(d.download::<i32>(out, 1)[0], x.iter().fold(5i32, |s, v| s.wrapping_add(*v)), "{level}");

        let x = rng.vec(n, |r| 2 + r.u64() % 5000);
        let (a, b) = (d.upload(&x), d.empty::<u64>(n));
        d.run("smallest_factor", n.div_ceil(32), 32, &[&a, &b, &count]);
        let want: Vec<u64> = x.iter().map(|v| (2..=*v).find(|f| v % f == 0).unwrap()).collect();
        assert_eq!(d.download::<u64>(b, n), want, "{level}");

        // A heap-shaped tree of 60 nodes; nodes are {i32, i16, i16}.
        let nodes: Vec<i32> = (0..60)
            .flat_map(|i: i32| {
                let child = |c: i32| if c < 60 { c as i16 } else { -1 };
                let links = (child(2 * i + 1) as u16 as u32) | (child(2 * i + 2) as u16 as u32) << 16;
                [i * i - 700, links as i32]
            })
            .collect();
        let roots: Vec<i16> = (0..60).collect();
        let (a, r, b) = (d.upload(&nodes), d.upload(&roots), d.empty::<i64>(60));
        d.run("tree_sums", 2, 32, &[&a, &r, &b, &60i32]);
        let want: Vec<i64> = roots
            .iter()
            .map(|root| {
                let (mut stack, mut total) = (vec![i32::from(*root)], 0i64);
                while let Some(i) = stack.pop() {
                    total += i64::from(i * i - 700) * (stack.len() as i64 + 1);
                    stack.extend([2 * i + 2, 2 * i + 1].into_iter().filter(|c| *c < 60));
                }
                total
            })
            .collect();
        assert_eq!(d.download::<i64>(b, 60), want, "{level}");

        let x = rng.vec(n, Rng::u64);
        let a = d.upload(&x);
        d.run("present_rounds", n.div_ceil(64), 64, &[&a, &count, &5i32]);
        const SBOX: [u64; 16] = [12, 5, 6, 11, 9, 0, 10, 13, 3, 14, 15, 8, 4, 7, 1, 2];
        let present = |s: &u64| {
            (0..5).fold(*s, |s, round| {
                let t = (0..16).fold(0, |t, k| t | SBOX[(s >> (4 * k) & 15) as usize] << (4 * k));
                let p = (0..63).fold(t & 1 << 63, |p, k| p | (t >> k & 1) << (16 * k % 63));
                p ^ round
            })
        };
        assert_eq!(d.download::<u64>(a, n), x.iter().map(present).collect::<Vec<_>>(), "{level}");

        let (c, x) = (rng.f32s(7), rng.f32s(n));
        let (a, b, y) = (d.upload(&c), d.upload(&x), d.empty::<f32>(n));
        d.run("polynomial", n.div_ceil(128), 128, &[&a, &6i32, &b, &y, &count]);
        for (got, x) in d.download::<f32>(y, n).into_iter().zip(&x) {
            let want = c.iter().rev().fold(0.0, |v, c| v * f64::from(*x) + f64::from(*c));
            near(f64::from(got), want, 2.0 * 7.0 * 7.0 * U32, (level, x));
        }
    }
}
