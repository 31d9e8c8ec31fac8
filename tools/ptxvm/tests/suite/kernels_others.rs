//! PTX that clang wrote, tests/kernels/clang, and what holds for that of all other compilers.

use std::fs;
use std::path::{Path, PathBuf};

use crate::kernels::{Device, Rng, U32, near};
use crate::toolchain;

fn path(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/kernels").join(name)
}

pub(crate) fn text(name: &str) -> String {
    fs::read_to_string(path(name)).unwrap_or_else(|e| panic!("{name}: {e}"))
}

#[test]
fn the_assembler_accepts_all() {
    for folder in ["triton", "clang"] {
        for file in fs::read_dir(path(folder)).unwrap().map(|entry| entry.unwrap().path()) {
            if file.extension().is_some_and(|e| e == "ptx") {
                let arch = ["90", "120"]
                    .into_iter()
                    .find(|n| file.to_str().unwrap().ends_with(&format!("sm{n}.ptx")));
                let copy = Path::new(env!("CARGO_TARGET_TMPDIR")).join(file.file_name().unwrap());
                fs::copy(&file, &copy).unwrap(); // the output lies beside it
                toolchain::assemble(&copy, &arch.map_or("80".to_owned(), |n| format!("{n}a")));
            }
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
