//! warpgroups.cu: kernels that load by TMA and multiply by wgmma, right and wrong.

use ptxvm::error::ErrorKind;
use ptxvm::{DevicePtr, Error, Report, Swizzle, TensorMap, TensorType, Tiled};

use crate::kernels::{Build, Device, Rng, Round, U32, bf16, from_bf16, near};
use crate::kernels_matrix::attention;

const RIGHT: Build = Build { arch: "90a", flags: &["-O3", "-lineinfo"] };

/// A matrix of bf16 in boxes of 64 columns.
fn map(at: DevicePtr, rows: usize, columns: usize, box_rows: u32) -> Vec<u8> {
    let tiled = Tiled {
        ty: TensorType::Bf16,
        address: at.0,
        dims: &[columns as u64, rows as u64],
        strides: &[2 * columns as u64],
        boxes: &[64, box_rows],
        element_strides: &[1, 1],
        swizzle: Swizzle::B128,
        fill_nan: false,
    };
    TensorMap::encode(&tiled).unwrap().to_vec()
}

fn sixteen(seed: u64, n: usize) -> Vec<u16> {
    Rng(seed).vec(n, |r| bf16(r.f64(), Round::Nearest))
}

/// c = a b^T: the factors, and where the product is.
struct Gemm {
    a: Vec<u16>,
    b: Vec<u16>,
    c: DevicePtr,
    device: Device,
}

impl Gemm {
    fn run(build: Build, m: usize, n: usize, k: usize) -> (Self, Result<Report, Error>) {
        let mut device = Device::new("warpgroups.cu", build);
        let (a, b) = (sixteen(41, m * k), sixteen(42, n * k));
        let (x, y, c) = (device.upload(&a), device.upload(&b), device.empty::<f32>(m * n));
        let (from, to) = (map(x, m, k, 128), map(y, n, k, 64));
        let shared = 3 * (128 + 64) * 64 * 2;
        let args: [&dyn crate::kernels::ToArg; 6] = [&from, &to, &c, &(m as i32), &(n as i32), &(k as i32)];
        let done = device.try_run("gemm", [2, 1, 1], [384, 1, 1], shared, false, &args);
        (Self { a, b, c, device }, done)
    }
}

/// Tiles that fit and tiles that stick out; one step of k, fewer than stages, and more.
#[test]
fn a_ring_of_stages_feeds_two_warpgroups() {
    for (m, n, k) in [(128, 64, 64), (256, 192, 128), (200, 72, 328)] {
        let (mut gemm, done) = Gemm::run(RIGHT, m, n, k);
        done.unwrap_or_else(|e| panic!("{m} {n} {k}: {e}"));
        for (i, got) in gemm.device.download::<f32>(gemm.c, m * n).into_iter().enumerate() {
            let terms = (0..k).map(|j| from_bf16(gemm.a[i / n * k + j]) * from_bf16(gemm.b[i % n * k + j]));
            let (sum, size) = terms.fold((0.0, 0.0), |(s, t): (f64, f64), v| (s + v, t + v.abs()));
            near(f64::from(got), sum, 2.0 * k as f64 * U32 * size, (m, n, k, i));
        }
    }
}

fn attend(
    build: Build,
    queries: usize,
    keys: usize,
) -> (Device, DevicePtr, [Vec<u16>; 3], Result<Report, Error>) {
    let mut device = Device::new("warpgroups.cu", build);
    let all = [sixteen(43, queries * 64), sixteen(44, keys * 64), sixteen(45, keys * 64)];
    let [q, k, v] = [0, 1, 2].map(|i| device.upload(&all[i]));
    let o = device.empty::<f32>(queries * 64);
    let maps = [map(q, queries, 64, 128), map(k, keys, 64, 64), map(v, keys, 64, 64)];
    let args: [&dyn crate::kernels::ToArg; 6] =
        [&maps[0], &maps[1], &maps[2], &o, &(queries as i32), &(keys as i32)];
    let blocks = queries.div_ceil(128) as u32;
    let done = device.try_run("attention", [blocks, 1, 1], [384, 1, 1], 8 * 64 * 64 * 2, false, &args);
    (device, o, all, done)
}

#[test]
fn attention_keeps_its_scores_in_registers() {
    for (queries, keys) in [(128, 64), (200, 150), (64, 400)] {
        let (mut device, o, all, done) = attend(RIGHT, queries, keys);
        done.unwrap_or_else(|e| panic!("{queries} {keys}: {e}"));
        let [q, k, v] = all.map(|x| x.into_iter().map(from_bf16).collect::<Vec<_>>());
        let got = device.download::<f32>(o, queries * 64);
        for row in 0..queries {
            // One query at a time, so that there may be more queries than keys: it is the last of `keys` tokens.
            let mut tokens = vec![0.0; keys * 64];
            tokens[(keys - 1) * 64..].copy_from_slice(&q[row * 64..][..64]);
            let (want, _) = attention(&tokens, &k, &v, keys, 64, 1.0, true);
            for (i, want) in want[(keys - 1) * 64..].iter().enumerate() {
                // Weights in bf16, 2^-9 each, of which the sum is at most 1; exponents of up to 64 with a bit of 2^-18 each.
                near(
                    f64::from(got[row * 64 + i]),
                    *want,
                    2f64.powi(-9) + 2f64.powi(-16),
                    (queries, keys, row, i),
                );
            }
        }
    }
}

fn found(result: Result<Report, Error>) -> Vec<(ErrorKind, String)> {
    match result {
        Err(Error::Fault(found)) => found.into_iter().map(|f| (f.kind, f.message)).collect(),
        other => panic!("{other:?}"),
    }
}

#[test]
fn each_mistake_is_told() {
    let wrong = |flag: &'static [&'static str]| Gemm::run(Build { arch: "90a", flags: flag }, 256, 64, 320).1;
    let fence = found(wrong(&["-O3", "-lineinfo", "-DWRONG=1"]));
    assert!(
        matches!(&fence[0], (ErrorKind::Wgmma, what) if what.contains("there was no wgmma.fence")),
        "{fence:?}"
    );
    // A stage that is given back while its products may read it.
    let early = found(wrong(&["-O3", "-lineinfo", "-DWRONG=2"]));
    let told = |(kind, what): &(ErrorKind, String)| {
        *kind == ErrorKind::AsyncRace && what.contains("what a wgmma may still read")
    };
    assert!(early.iter().any(told), "{early:?}");
    let store = found(wrong(&["-O3", "-lineinfo", "-DWRONG=3"]));
    assert!(
        matches!(&store[0], (ErrorKind::Wgmma, what) if what.contains("reads an accumulator")),
        "{store:?}"
    );
    // Accumulators are scaled, and scores rounded, between the products.
    let between = found(attend(Build { arch: "90a", flags: &["-O3", "-lineinfo", "-DWRONG=4"] }, 128, 128).3);
    let told =
        |(kind, what): &(ErrorKind, String)| *kind == ErrorKind::Wgmma && what.contains("written since");
    assert!(between.iter().all(told), "{between:?}");
}
