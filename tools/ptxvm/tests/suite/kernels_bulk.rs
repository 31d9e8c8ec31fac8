//! bulk.cu: bulk copies and tensor maps in kernels as people write them, and a wrong twin of each.

use ptxvm::error::ErrorKind;
use ptxvm::{DevicePtr, Error, Swizzle, TensorMap, TensorType, Tiled};

use crate::kernels::{Build, Device, Rng, SM90};

const N: usize = 256;
const WRONG: Build = Build { arch: "90", flags: &["-O3", "-lineinfo", "-DWRONG"] };
const DEBUG90: Build = Build { arch: "90", flags: &["-G"] };

/// A square matrix of f32 in boxes of 32 x 32, whose rows are `stride` words apart.
fn map(at: DevicePtr, side: usize, stride: usize) -> Vec<u8> {
    TensorMap::encode(&Tiled {
        ty: TensorType::F32,
        address: at.0,
        dims: &[side as u64; 2],
        strides: &[4 * stride as u64],
        boxes: &[32, 32],
        element_strides: &[1, 1],
        swizzle: Swizzle::B128,
        fill_nan: false,
    })
    .unwrap()
    .to_vec()
}

fn kinds(result: Result<ptxvm::Report, Error>) -> Vec<ErrorKind> {
    match result {
        Err(Error::Fault(found)) => found.iter().map(|f| f.kind).collect(),
        other => panic!("{other:?}"),
    }
}

#[test]
fn tiles_in_bulk() {
    let x = Rng(3).vec(5 * N, |r| r.below(1000) as f32);
    for build in [SM90, DEBUG90] {
        let mut d = Device::new("bulk.cu", build);
        for tiles in [1, 2, 5] {
            let want: Vec<f32> =
                x[..tiles * N].chunks(N).flat_map(|tile| tile.iter().rev().copied()).collect();
            let (a, b) = (d.upload(&x), d.empty::<f32>(x.len()));
            d.run("bulk_reverse", 1, N, &[&a, &b, &(tiles as i32)]);
            assert_eq!(d.download::<f32>(b, tiles * N), want, "{build:?}, {tiles} tiles");
        }
    }
    let mut d = Device::new("bulk.cu", WRONG);
    let (a, b) = (d.upload(&x), d.empty::<f32>(x.len()));
    let found = kinds(d.try_run("bulk_reverse", [1; 3], [N as u32, 1, 1], 0, false, &[&a, &b, &5i32]));
    assert_eq!(found, [ErrorKind::AsyncRace]);
}

#[test]
fn tensor_boxes_in_a_ring() {
    for (side, build) in [(32, SM90), (96, SM90), (70, SM90), (100, DEBUG90)] {
        let mut d = Device::new("bulk.cu", build);
        let stride = side + 12 - side % 4;
        let x = Rng(side as u64).vec(side * stride, |r| r.below(1000) as f32);
        let (a, b) = (d.upload(&x), d.upload(&vec![-1f32; side * stride]));
        let boxes = side.div_ceil(32);
        let (from, to) = (map(a, side, stride), map(b, side, stride));
        d.run("tma_add_transposed", 1, 160usize, &[&from, &to, &(boxes as i32)]);
        let got = d.download::<f32>(b, side * stride);
        for (i, got) in got.iter().enumerate() {
            let (r, c) = (i / stride, i % stride);
            let want = if c < side { x[r * stride + c] + x[c * stride + r] } else { -1.0 };
            assert_eq!(*got, want, "{side}: row {r}, column {c}");
        }
    }
    let mut d = Device::new("bulk.cu", WRONG);
    let (a, b) = (d.upload(&vec![1f32; 96 * 96]), d.empty::<f32>(96 * 96));
    let (from, to) = (map(a, 96, 96), map(b, 96, 96));
    let found = d.try_run("tma_add_transposed", [1; 3], [160, 1, 1], 0, false, &[&from, &to, &3i32]);
    let Err(Error::Fault(found)) = found else { panic!("{found:?}") };
    assert_eq!(found[0].kind, ErrorKind::Deadlock, "{found:#?}");
    assert!(found[0].message.contains("phase 0 waits for 128 of 128 arrivals"), "{found:#?}");
}
