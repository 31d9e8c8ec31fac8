//! elementwise.cu and transpose.cu.

use crate::kernels::{BUILDS, Device, Rng};

#[test]
fn vector_add() {
    for build in BUILDS {
        for n in [1usize, 31, 257, 1000] {
            let mut d = Device::new("elementwise.cu", build);
            let mut rng = Rng(n as u64);
            let (x, y) = (rng.f32s(n), rng.f32s(n));
            let (a, b, c) = (d.upload(&x), d.upload(&y), d.empty::<f32>(n));
            d.run("vector_add", n.div_ceil(128), 128, &[&a, &b, &c, &(n as i32)]);
            let want: Vec<f32> = x.iter().zip(&y).map(|(x, y)| x + y).collect();
            assert_eq!(d.download::<f32>(c, n), want, "{build:?} n {n}");
        }
    }
}

#[test]
fn saxpy() {
    for build in BUILDS {
        for (entry, n, grid) in
            [("saxpy_grid_stride", 5003, 7), ("saxpy_vec4", 5003, 3), ("saxpy_vec4", 3, 1)]
        {
            let mut d = Device::new("elementwise.cu", build);
            let mut rng = Rng(1);
            let (x, y) = (rng.f32s(n), rng.f32s(n));
            let (a, b) = (d.upload(&x), d.upload(&y));
            d.run(entry, grid, 256, &[&(n as i32), &0.7f32, &a, &b]);
            let want: Vec<f32> = x.iter().zip(&y).map(|(x, y)| 0.7f32.mul_add(*x, *y)).collect();
            assert_eq!(d.download::<f32>(b, n), want, "{build:?} {entry}");
        }
    }
}

macro_rules! converts {
    ($device:ident, $rng:ident, $($name:literal $per:literal $from:ty => $to:ty, $next:expr, $convert:expr;)*) => {$({
        let n = 517usize;
        let x: Vec<$from> = $rng.vec(n, $next);
        let (a, b) = ($device.upload(&x), $device.empty::<$to>(n));
        $device.run($name, n.div_ceil(64 * $per), 64, &[&a, &b, &(n as i32)]);
        let want: Vec<$to> = x.iter().map($convert).collect();
        assert_eq!($device.download::<$to>(b, n), want, $name);
    })*};
}

#[test]
fn conversions() {
    for build in BUILDS {
        let d = &mut Device::new("elementwise.cu", build);
        let mut rng = Rng(5);
        converts! { d, rng,
            "convertIhi" 3 i32 => u8, |r| r.u32() as i32, |v| *v as u8;
            "convertIsf" 2 f32 => i16, |r| r.f32() * 32000.0, |v| *v as i16;
            "convertIfa" 4 i8 => f32, |r| r.u32() as i8, |v| f32::from(*v);
            "convertIdx" 1 i64 => f64, |r| r.u64() as i64, |v| *v as f64;
            "convertIyd" 1 f64 => u64, |r| r.f64().abs() * 1e19, |v| *v as u64;
            "convertIfj" 1 u32 => f32, |r| r.u32(), |v| *v as f32;
            "convertIid" 1 f64 => i32, |r| r.f64() * 2e9, |v| *v as i32;
            "convertIfd" 1 f64 => f32, |r| r.f64() * 1e-39, |v| *v as f32;
        }
    }
}

#[test]
fn cache_operators() {
    for build in BUILDS {
        let n = 301usize;
        let mut d = Device::new("elementwise.cu", build);
        let x = Rng(7).vec(n, |r| r.u32() as i32);
        let (a, b) = (d.upload(&x), d.empty::<i32>(n));
        d.run("copy_cached", n.div_ceil(96), 96, &[&a, &b, &(n as i32)]);
        assert_eq!(d.download::<i32>(b, n), x, "{build:?}");
    }
}

#[test]
fn three_dimensions() {
    for build in BUILDS {
        let (nx, ny, nz, pitch) = (13usize, 7usize, 5usize, 16usize);
        let (grid, block) = ((3usize, 2usize, 3usize), (5usize, 4usize, 2usize));
        let mut d = Device::new("elementwise.cu", build);
        let start = vec![-1i64; nz * ny * pitch];
        let out = d.upload(&start);
        d.run("index_3d", grid, block, &[&out, &(nx as i32), &(ny as i32), &(nz as i32), &(pitch as i32)]);
        let mut want = start;
        for (z, y, x) in (0..nz).flat_map(|z| (0..ny).flat_map(move |y| (0..nx).map(move |x| (z, y, x)))) {
            let thread = ((z % 2) * block.1 + y % 4) * block.0 + x % 5;
            let number = ((z / 2) * grid.1 + y / 4) * grid.0 + x / 5;
            want[(z * ny + y) * pitch + x] = ((number << 32) | (thread << 8) | (thread % 32)) as i64;
        }
        assert_eq!(d.download::<i64>(out, want.len()), want, "{build:?}");
    }
}

fn transposed<T: Copy>(x: &[T], rows: usize, cols: usize) -> Vec<T> {
    (0..cols).flat_map(|c| (0..rows).map(move |r| x[r * cols + c])).collect()
}

#[test]
fn transposes() {
    for build in BUILDS {
        let mut d = Device::new("transpose.cu", build);
        let mut rng = Rng(9);
        let (rows, cols) = (45usize, 77usize);
        let (r, c) = (rows as i32, cols as i32);
        let x = rng.f32s(rows * cols);
        let (a, b) = (d.upload(&x), d.empty::<f32>(x.len()));
        d.run("transposeIf", (cols.div_ceil(32), rows.div_ceil(32)), (32, 8), &[&a, &b, &r, &c]);
        assert_eq!(d.download::<f32>(b, x.len()), transposed(&x, rows, cols), "{build:?}");
        let x = rng.vec(rows * cols, Rng::f64);
        let (a, b) = (d.upload(&x), d.empty::<f64>(x.len()));
        d.run("transposeId", (cols.div_ceil(16), rows.div_ceil(16)), (16, 16), &[&a, &b, &r, &c]);
        assert_eq!(d.download::<f64>(b, x.len()), transposed(&x, rows, cols), "{build:?}");
        let x = rng.vec(rows * cols, |r| r.u32() as u16);
        let (a, b) = (d.upload(&x), d.empty::<u16>(x.len()));
        d.run("transposeIt", (cols.div_ceil(32), rows.div_ceil(32)), (32, 4), &[&a, &b, &r, &c]);
        assert_eq!(d.download::<u16>(b, x.len()), transposed(&x, rows, cols), "{build:?}");

        let n = 70usize;
        let x = rng.vec(n * 16, |r| r.u32() as u8);
        let (a, b) = (d.upload(&x), d.empty::<u8>(x.len()));
        d.run("transpose_bytes_4x4", n.div_ceil(32), 32, &[&a, &b, &(n as i32)]);
        let want: Vec<u8> = x.chunks(16).flat_map(|m| transposed(m, 4, 4)).collect();
        assert_eq!(d.download::<u8>(b, x.len()), want, "{build:?}");
    }
}
