//! cluster.cu: blocks that use each other's shared memory, as CUDA's programming guide and libraries do, and a wrong twin of each.

use ptxvm::error::ErrorKind;
use ptxvm::{DevicePtr, Error, Swizzle, TensorMap, TensorType, Tiled};

use crate::kernels::{Build, Device, Rng, ToArg};

const SM90: Build = Build { arch: "90a", flags: &["-O3", "-lineinfo"] };
const WRONG: Build = Build { arch: "90a", flags: &["-O3", "-lineinfo", "-DWRONG"] };
const DEBUG90: Build = Build { arch: "90a", flags: &["-G"] };

/// A device whose launches are in clusters of `cluster` blocks in x, where it is told.
fn device(build: Build, cluster: Option<u32>) -> Device {
    let mut d = Device::new("cluster.cu", build);
    d.cluster = cluster.map(|n| [n, 1, 1]);
    d
}

fn kinds(
    d: &mut Device,
    name: &str,
    grid: [u32; 3],
    threads: u32,
    shared: u32,
    args: &[&dyn ToArg],
) -> Vec<ErrorKind> {
    match d.try_run(name, grid, [threads, 1, 1], shared, false, args) {
        Err(Error::Fault(found)) => found.iter().map(|f| f.kind).collect(),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_histogram_over_a_cluster() {
    const PER_BLOCK: usize = 24;
    for (blocks, build) in [(1, SM90), (2, SM90), (8, SM90), (16, SM90), (4, DEBUG90)] {
        let mut d = device(build, Some(blocks));
        let (n, bins) = (3000, PER_BLOCK * blocks as usize);
        let x = Rng(5).vec(n, |r| r.below(bins as u64 + 20) as i32 - 10);
        let mut want = vec![0u32; bins];
        x.iter().for_each(|v| want[(*v).clamp(0, bins as i32 - 1) as usize] += 1);
        let (from, to) = (d.upload(&x), d.upload(&vec![0u32; bins]));
        let args: [&dyn ToArg; 4] = [&from, &(n as i32), &to, &(PER_BLOCK as i32)];
        let shared = 4 * PER_BLOCK as u32;
        d.try_run("cluster_histogram", [2 * blocks, 1, 1], [96, 1, 1], shared, false, &args).unwrap();
        assert_eq!(d.download::<u32>(to, bins), want, "{build:?}, {blocks} blocks");
    }
    let mut d = device(WRONG, Some(2));
    let (from, to) = (d.upload(&vec![30; 500]), d.upload(&[0u32; 48]));
    let found = kinds(&mut d, "cluster_histogram", [2, 1, 1], 64, 96, &[&from, &500i32, &to, &24i32]);
    assert!(found.contains(&ErrorKind::Cluster), "{found:?}");
}

#[test]
fn a_norm_whose_parts_are_in_several_blocks() {
    let (rows, columns) = (3, 700);
    let x = Rng(6).vec(rows * columns, |r| r.below(2000) as f32 / 1000.0 - 1.0);
    for build in [SM90, DEBUG90] {
        let mut d = device(build, None);
        let (from, to) = (d.upload(&x), d.empty::<f32>(rows));
        d.run("cluster_norm", 4 * rows, 128usize, &[&from, &to, &(columns as i32)]);
        for (got, row) in d.download::<f32>(to, rows).iter().zip(x.chunks(columns)) {
            let want: f64 = row.iter().map(|v| f64::from(*v) * f64::from(*v)).sum();
            // Each product is added to a sum of 512 threads, in a chain of 2 and a tree of 12 additions.
            let bound = want * 15.0 * f64::from(f32::EPSILON);
            assert!((f64::from(*got) - want).abs() <= bound, "{got} is not {want}");
        }
    }
    let mut d = device(WRONG, None);
    let (from, to) = (d.upload(&x), d.empty::<f32>(rows));
    let found = kinds(&mut d, "cluster_norm", [12, 1, 1], 128, 0, &[&from, &to, &(columns as i32)]);
    assert!(found.iter().all(|kind| *kind == ErrorKind::Cluster), "{found:?}");
}

/// A matrix of f32 in boxes.
fn map(at: DevicePtr, rows: usize, columns: usize, boxes: [u32; 2]) -> Vec<u8> {
    TensorMap::encode(&Tiled {
        ty: TensorType::F32,
        address: at.0,
        dims: &[columns as u64, rows as u64],
        strides: &[4 * columns as u64],
        boxes: &boxes,
        element_strides: &[1, 1],
        swizzle: Swizzle::None,
        fill_nan: false,
    })
    .unwrap()
    .to_vec()
}

#[test]
fn a_product_whose_tiles_are_multicast() {
    let (m, n, k) = (128, 96, 80);
    let (a, b) = (
        Rng(7).vec(m * k, |r| r.below(2000) as f32 / 1000.0 - 1.0),
        Rng(8).vec(k * n, |r| r.below(2000) as f32 / 1000.0 - 1.0),
    );
    for build in [SM90, DEBUG90] {
        let mut d = device(build, None);
        let (at_a, at_b, at_c) = (d.upload(&a), d.upload(&b), d.empty::<f32>(m * n));
        let (of_a, of_b) = (map(at_a, m, k, [16, 32]), map(at_b, k, n, [32, 8]));
        let grid = [n as u32 / 32, m as u32 / 32, 1];
        let args: [&dyn ToArg; 5] = [&of_a, &of_b, &at_c, &(n as i32), &(k as i32)];
        d.try_run("multicast_gemm", grid, [160, 1, 1], 0, false, &args).unwrap();
        let c = d.download::<f32>(at_c, m * n);
        for (i, got) in c.iter().enumerate() {
            let terms = (0..k).map(|j| f64::from(a[i / n * k + j]) * f64::from(b[j * n + i % n]));
            let (want, size) = terms.fold((0.0, 0.0), |(sum, size), t| (sum + t, size + t.abs()));
            let bound = size * (k + 1) as f64 * f64::from(f32::EPSILON) / 2.0;
            assert!((f64::from(*got) - want).abs() <= bound, "{build:?}, element {i}: {got} is not {want}");
        }
    }
    let mut d = device(WRONG, None);
    let (at_a, at_b, at_c) = (d.upload(&a), d.upload(&b), d.empty::<f32>(m * n));
    let (of_a, of_b) = (map(at_a, m, k, [16, 32]), map(at_b, k, n, [32, 8]));
    let args: [&dyn ToArg; 5] = [&of_a, &of_b, &at_c, &(n as i32), &(k as i32)];
    let found = kinds(&mut d, "multicast_gemm", [3, 4, 1], 160, 0, &args);
    assert!(found.contains(&ErrorKind::AsyncRace), "{found:?}");
}

#[test]
fn pieces_handed_round() {
    const PIECE: usize = 64;
    for (blocks, rounds, build) in [(2, 1, SM90), (4, 5, SM90), (3, 4, DEBUG90), (1, 3, SM90)] {
        let mut d = device(build, Some(blocks as u32));
        let x = Rng(9).vec(2 * blocks * PIECE, |r| r.below(1000) as i32);
        let (from, to) = (d.upload(&x), d.empty::<i32>(x.len()));
        d.run("cluster_ring", 2 * blocks, PIECE, &[&from, &to, &(rounds as i32)]);
        let got = d.download::<i32>(to, x.len());
        for (block, piece) in got.chunks(PIECE).enumerate() {
            let (cluster, rank) = (block / blocks, block % blocks);
            let source = cluster * blocks + (rank + blocks * rounds - rounds) % blocks;
            let want: Vec<i32> = x[source * PIECE..][..PIECE].iter().map(|v| v + rounds as i32 - 1).collect();
            assert_eq!(piece, want, "{blocks} blocks, {rounds} rounds, block {block}");
        }
    }
    let mut d = device(WRONG, Some(2));
    let (from, to) = (d.upload(&[1; 2 * PIECE]), d.empty::<i32>(2 * PIECE));
    let found = kinds(&mut d, "cluster_ring", [2, 1, 1], PIECE as u32, 0, &[&from, &to, &3i32]);
    assert_eq!(found, [ErrorKind::AsyncRace]);
}
