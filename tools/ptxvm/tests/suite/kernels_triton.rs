//! PTX that Triton wrote, tests/kernels/triton: each kernel against a reference in f64, with all checks.

use ptxvm::{Arg, DevicePtr, Swizzle, TensorMap, TensorType, Tiled};

use crate::kernels::{Device, Rng, Round, ToArg, U32, bf16, f16, from_bf16, from_f16, near, ulp32};
use crate::kernels_collective::philox;
use crate::kernels_matrix::attention;
use crate::kernels_others::text;
use crate::support::exact::{E2M1, E4M3, E5M2, Exact, Format, decode};

/// Unit roundoff of f16, and half its least number.
const U16: f64 = 1.0 / 2048.0;
const TINY16: f64 = 1.0 / (1u64 << 25) as f64;
const LOG2_E: f64 = std::f64::consts::LOG2_E;

impl ToArg for Arg {
    fn to_arg(&self) -> Arg {
        self.clone()
    }
}

/// Rows, columns and bytes of the swizzle of a tensor map's box.
#[derive(Clone, Copy)]
struct Tile {
    rows: u32,
    columns: u32,
    swizzle: u32,
}

/// A program of Triton, launched as its file's second line says.
struct Triton {
    device: Device,
    /// The kernel.
    entry: String,
    threads: usize,
    shared: u32,
    /// Bytes of global scratch memory for each block.
    scratch: usize,
    cluster: usize,
    maps: Vec<Tile>,
}

impl Triton {
    fn new(name: &str, arch: u32) -> Self {
        let text = text(&format!("triton/{name}_sm{arch}.ptx"));
        let line: Vec<&str> = text.lines().nth(1).unwrap().split(' ').collect();
        let number = |word: &str| word.parse::<u32>().unwrap();
        let ["//", "warps", warps, "shared", shared, "scratch", scratch, "cluster", cluster, ref maps @ ..] =
            line[..]
        else {
            panic!("{line:?}")
        };
        let maps = maps.chunks(4).map(|map| {
            let ["map", rows, columns, swizzle] = *map else { panic!("{map:?}") };
            Tile { rows: number(rows), columns: number(columns), swizzle: number(swizzle) }
        });
        let entry = text.split_once(".entry ").unwrap().1.split('(').next().unwrap();
        let mut device = Device::with_ptx(name, &text);
        let cluster = number(cluster);
        device.cluster = (cluster > 1).then_some([cluster, 1, 1]);
        Self {
            device,
            entry: entry.to_owned(),
            threads: number(warps) as usize * 32,
            shared: number(shared),
            scratch: number(scratch) as usize,
            cluster: cluster as usize,
            maps: maps.collect(),
        }
    }

    /// Runs programs, each a block or a cluster. Scratch memory and that of the profiler are the last arguments.
    fn run(&mut self, programs: (usize, usize), args: &[&dyn ToArg]) {
        let grid = (programs.0 * self.cluster, programs.1);
        let scratch = match self.scratch * grid.0 * grid.1 {
            0 => Arg::U64(0),
            bytes => Arg::Ptr(self.device.empty::<u8>(bytes)),
        };
        let args: Vec<&dyn ToArg> = args.iter().copied().chain([&scratch as _, &Arg::U64(0) as _]).collect();
        self.device.run_shared(&self.entry, grid, self.threads, self.shared, &args);
    }

    /// The arguments that stand for a tensor map, the kernel's `index`-th, of a matrix of f16.
    fn map(&self, index: usize, at: DevicePtr, rows: usize, columns: usize) -> [Arg; 5] {
        let tile = self.maps[index];
        let map = TensorMap::encode(&Tiled {
            ty: TensorType::F16,
            address: at.0,
            dims: &[columns as u64, rows as u64],
            strides: &[2 * columns as u64],
            boxes: &[tile.columns, tile.rows],
            element_strides: &[1, 1],
            swizzle: match tile.swizzle {
                0 => Swizzle::None,
                32 => Swizzle::B32,
                64 => Swizzle::B64,
                128 => Swizzle::B128,
                other => panic!("{other}"),
            },
            fill_nan: false,
        });
        let (stride, one) = (Arg::U64(columns as u64), Arg::U64(1));
        [Arg::Bytes(map.unwrap().to_vec()), Arg::I32(rows as i32), Arg::I32(columns as i32), stride, one]
    }

    /// Runs programs whose first arguments are tensor maps.
    fn run_maps(&mut self, programs: (usize, usize), maps: &[[Arg; 5]], args: &[&dyn ToArg]) {
        let maps = maps.as_flattened().iter().map(|arg| arg as &dyn ToArg);
        let all: Vec<&dyn ToArg> = maps.chain(args.iter().copied()).collect();
        self.run(programs, &all);
    }
}

fn halves(rng: &mut Rng, n: usize) -> Vec<u16> {
    rng.vec(n, |r| f16(r.f64(), Round::Nearest))
}

fn wide(x: &[u16]) -> Vec<f64> {
    x.iter().map(|x| from_f16(*x)).collect()
}

/// What a pattern stands for, which must be finite.
fn finite(format: Format, bits: u8) -> f64 {
    match decode(format, bits.into()) {
        Exact::Finite(_, value) => value.to_f64(),
        other => panic!("{other:?}"),
    }
}

/// m x n sums over k products, and the sums of their magnitudes. `a` is asked for (row, j), `b` for (j, column).
fn product(
    (m, n, k): (usize, usize, usize),
    a: impl Fn(usize, usize) -> f64,
    b: impl Fn(usize, usize) -> f64,
) -> Vec<(f64, f64)> {
    let element = |i: usize| {
        let terms = (0..k).map(|j| a(i / n, j) * b(j, i % n));
        terms.fold((0.0, 0.0), |(sum, size), t| (sum + t, size + t.abs()))
    };
    (0..m * n).map(element).collect()
}

/// Sums of products in f32.
fn near_sums(got: &[f32], want: &[(f64, f64)], k: usize, what: &str) {
    assert_eq!(got.len(), want.len());
    for (i, (got, (sum, size))) in got.iter().zip(want).enumerate() {
        near(f64::from(*got), *sum, 2.0 * k as f64 * U32 * size, (what, i));
    }
}

/// The same, of which a function was rounded to f16 that does not enlarge errors.
fn near_halves(got: &[u16], want: &[(f64, f64)], k: usize, then: fn(f64) -> f64, what: &str) {
    assert_eq!(got.len(), want.len());
    for (i, (got, (sum, size))) in got.iter().zip(want).enumerate() {
        let want = then(*sum);
        let bound = 2.0 * (k + 1) as f64 * U32 * size;
        near(from_f16(*got), want, bound + U16 * (want.abs() + bound) + TINY16, (what, i));
    }
}

fn same(x: f64) -> f64 {
    x
}

fn leaky(x: f64) -> f64 {
    if x < 0.0 { 0.01 * x } else { x }
}

#[test]
fn triton_add() {
    for (name, arch, block) in [
        ("add", 80, 1024),
        ("add", 90, 1024),
        ("dependent_add", 90, 256),
        // A program's piece is three blocks, and two stages of `cp.async` take turns.
        ("copied_add", 90, 3 * 256),
    ] {
        let mut t = Triton::new(name, arch);
        let n = 2500usize;
        let mut rng = Rng(31);
        let (x, y) = (rng.f32s(n), rng.f32s(n));
        let (a, b, c) = (t.device.upload(&x), t.device.upload(&y), t.device.empty::<f32>(n));
        t.run((n.div_ceil(block), 1), &[&a, &b, &c, &(n as i32)]);
        let want: Vec<f32> = x.iter().zip(&y).map(|(x, y)| x + y).collect();
        assert_eq!(t.device.download::<f32>(c, n), want, "{name} sm_{arch}");
    }
}

/// CUDA's device library promises 2 ulp.
#[test]
fn triton_arcsine() {
    let mut t = Triton::new("arcsine", 90);
    let n = 1000usize;
    let x = Rng(37).f32s(n);
    let (a, b) = (t.device.upload(&x), t.device.empty::<f32>(n));
    t.run((n.div_ceil(256), 1), &[&a, &b, &(n as i32)]);
    for (x, got) in x.into_iter().zip(t.device.download::<f32>(b, n)) {
        let want = f64::from(x).asin();
        near(got.into(), want, 2.0 * ulp32(want), x);
    }
}

#[test]
fn triton_dropout() {
    let mut t = Triton::new("dropout", 90);
    let (n, p, seed) = (1000usize, 0.25f32, 0x1234_5678_9abcu64);
    let x = Rng(38).f32s(n);
    let (a, b) = (t.device.upload(&x), t.device.empty::<f32>(n));
    t.run((n.div_ceil(256), 1), &[&a, &b, &(n as i32), &p, &seed]);
    let mut dropped = 0;
    for (i, got) in t.device.download::<f32>(b, n).into_iter().enumerate() {
        // Triton's uniform number: what is negative as an integer counts from the other end.
        let word = philox([i as u32, 0, 0, 0], seed)[0] as i32;
        let uniform = (if word < 0 { -1 - word } else { word }) as f32 * 4.656_612_7e-10;
        let want = if uniform > p { f64::from(x[i]) / f64::from(1.0 - p) } else { 0.0 };
        dropped += usize::from(want == 0.0);
        near(got.into(), want, 2.0 * ulp32(want) * want.abs().min(1.0).ceil(), i);
    }
    assert!((200..300).contains(&dropped), "{dropped}");
}

/// On sm_90 also by programs that take several rows, whose loads run ahead.
#[test]
fn triton_softmax() {
    for (name, arch) in [("softmax", 80), ("softmax", 90), ("softmax_rows", 90)] {
        let mut t = Triton::new(name, arch);
        let (rows, cols, stride) = (7usize, 784usize, 800usize);
        let x = Rng(32).vec(rows * stride, |r| r.f32() * 8.0);
        let (a, b) = (t.device.upload(&x), t.device.upload(&vec![-1f32; rows * stride]));
        let [step, height, width] = [stride, rows, cols].map(|n| n as i32);
        if name == "softmax" {
            t.run((rows, 1), &[&b, &a, &step, &width]);
        } else {
            t.run((2, 1), &[&b, &a, &step, &height, &width]);
        }
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
                near(f64::from(*got), want, (2.0 * 24.0 + 12.0 + cols as f64) * U32 * want, (name, arch, c));
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

/// Rows add their share of the gains' and biases' gradients to one of two sums, each behind a lock; then these are summed.
#[test]
fn triton_layer_norm_backward() {
    const GROUPS: usize = 2;
    let mut t = Triton::new("layer_norm_backward", 90);
    let (rows, cols) = (7usize, 300usize);
    let mut rng = Rng(39);
    let (x, dy, gain) = (rng.f32s(rows * cols), rng.f32s(rows * cols), rng.f32s(cols));
    let mean = rng.vec(rows, |r| r.f32() / 8.0);
    let inverse = rng.vec(rows, |r| 1.5 + r.f32() / 4.0);
    let d = &mut t.device;
    let inputs = [&dy, &x, &gain, &mean, &inverse].map(|x| d.upload(x));
    let dx = d.empty::<f32>(rows * cols);
    let sums = [(); 2].map(|()| d.empty::<f32>(GROUPS * cols));
    let locks = d.upload(&[0i32; 2 * GROUPS]);
    let [a, b, c, e, f] = &inputs;
    t.run((rows, 1), &[&dx, a, b, c, e, f, &sums[0], &sums[1], &locks, &(cols as i32)]);
    assert_eq!(t.device.download::<i32>(locks, 2 * GROUPS), [0, 0, 1, 1], "open, and used");

    let at = |x: &[f32], r: usize, c: usize| f64::from(x[r * cols + c]);
    let (scale, middle) = (|r: usize| f64::from(inverse[r]), |r: usize| f64::from(mean[r]));
    let unit = |r: usize, c: usize| (at(&x, r, c) - middle(r)) * scale(r);
    let got = t.device.download::<f32>(dx, rows * cols);
    for r in 0..rows {
        let w = |c: usize| at(&dy, r, c) * f64::from(gain[c]);
        let average = |of: &dyn Fn(usize) -> f64| (0..cols).map(of).sum::<f64>() / cols as f64;
        let (along, level) = (average(&|c| unit(r, c) * w(c)), average(&w));
        let sizes = (average(&|c| (unit(r, c) * w(c)).abs()), average(&|c| w(c).abs()));
        for c in 0..cols {
            let (w, unit) = (w(c), unit(r, c));
            let want = (w - (unit * along + level)) * scale(r);
            let parts = w.abs() + unit.abs() * sizes.0 + sizes.1;
            near(got[r * cols + c].into(), want, (cols + 8) as f64 * U32 * parts * scale(r), (r, c));
        }
    }

    // The sums go on in a second kernel, whose memory is another GPU's.
    let partial = sums.map(|at| t.device.download::<f32>(at, GROUPS * cols));
    let mut t = Triton::new("column_sums", 90);
    let factors: [&dyn Fn(usize, usize) -> f64; 2] = [&unit, &|_, _| 1.0];
    for (partial, of) in partial.iter().zip(factors) {
        let (a, b) = (t.device.upload(partial), t.device.empty::<f32>(cols));
        t.run((cols.div_ceil(64), 1), &[&a, &b, &(GROUPS as i32), &(cols as i32)]);
        for (c, got) in t.device.download::<f32>(b, cols).into_iter().enumerate() {
            let terms = (0..rows).map(|r| at(&dy, r, c) * of(r, c));
            let (sum, size) = terms.fold((0.0, 0.0), |(s, t): (f64, f64), v| (s + v, t + v.abs()));
            near(got.into(), sum, (rows + 4) as f64 * U32 * size, c);
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
        let want = product((m, n, k), |i, j| from_bf16(x[i * k + j]), |j, c| from_bf16(y[j * n + c]));
        near_sums(&t.device.download(c, m * n), &want, k, &format!("sm_{arch}"));
    }
}

/// Tiles in groups, a function of the result, and loops over tiles whose loads run ahead of the next tile.
#[test]
fn triton_matmul_grouped_and_persistent() {
    for (name, then, programs) in
        [("matmul_leaky", leaky as fn(f64) -> f64, 9usize), ("matmul_persistent", same, 3)]
    {
        let mut t = Triton::new(name, 90);
        let (m, n, k) = (150usize, 144usize, 112usize);
        let mut rng = Rng(40);
        let (x, y) = (halves(&mut rng, m * k), halves(&mut rng, n * k));
        let (a, b, c) = (t.device.upload(&x), t.device.upload(&y), t.device.empty::<u16>(m * n));
        t.run((programs, 1), &[&a, &b, &c, &(m as i32), &(n as i32), &(k as i32)]);
        let (x, y) = (wide(&x), wide(&y));
        let want = product((m, n, k), |i, j| x[i * k + j], |j, c| y[c * k + j]);
        near_halves(&t.device.download(c, m * n), &want, k, then, name);
    }
}

#[test]
fn triton_matmul_e4m3() {
    let mut t = Triton::new("matmul_leaky_e4m3", 90);
    let (m, n, k) = (75usize, 80usize, 112usize);
    let mut rng = Rng(41);
    // All magnitudes up to 1.875.
    let mut eight = |n| rng.vec(n, |r| (r.below(64) | r.below(2) << 7) as u8);
    let (x, y) = (eight(m * k), eight(n * k));
    let (a, b, c) = (t.device.upload(&x), t.device.upload(&y), t.device.empty::<u16>(m * n));
    t.run((4, 1), &[&a, &b, &c, &(m as i32), &(n as i32), &(k as i32)]);
    let want = product((m, n, k), |i, j| finite(E4M3, x[i * k + j]), |j, c| finite(E4M3, y[c * k + j]));
    near_halves(&t.device.download(c, m * n), &want, k, leaky, "e4m3");
}

/// The inputs have no more bits than tf32.
#[test]
fn triton_matmul_tf32() {
    let mut t = Triton::new("matmul_tf32", 90);
    let (m, n, k) = (75usize, 48usize, 112usize);
    let mut rng = Rng(42);
    let mut short = |n| rng.vec(n, |r| from_bf16(bf16(r.f64(), Round::Nearest)) as f32);
    let (x, y) = (short(m * k), short(n * k));
    let (a, b, c) = (t.device.upload(&x), t.device.upload(&y), t.device.empty::<f32>(m * n));
    t.run((2, 2), &[&a, &b, &c, &(m as i32), &(n as i32), &(k as i32)]);
    let want = product((m, n, k), |i, j| x[i * k + j].into(), |j, c| y[c * k + j].into());
    near_sums(&t.device.download(c, m * n), &want, k, "tf32");
}

/// Products of several shapes in one launch, also through tensor maps that the kernel makes in its scratch memory.
#[test]
fn triton_matmul_groups() {
    for (name, shapes, transposed) in [
        ("matmul_groups", [(64usize, 64usize, 32usize), (128, 32, 96), (64, 96, 64)], false),
        ("matmul_groups_maps", [(64, 128, 64), (128, 64, 192), (64, 64, 128)], true),
    ] {
        let mut t = Triton::new(name, 90);
        let mut rng = Rng(43);
        let factors = shapes.map(|(m, n, k)| [halves(&mut rng, m * k), halves(&mut rng, n * k)]);
        let d = &mut t.device;
        let places: Vec<[DevicePtr; 3]> = shapes
            .iter()
            .zip(&factors)
            .map(|((m, n, _), [x, y])| [d.upload(x), d.upload(y), d.empty::<u16>(m * n)])
            .collect();
        let pointers = d.upload(&places.iter().flatten().map(|at| at.0).collect::<Vec<u64>>());
        let sizes = d.upload(&shapes.map(|(m, n, k)| [m as i32, n as i32, k as i32]));
        t.run((3, 1), &[&pointers, &sizes, &(shapes.len() as i32)]);
        for (i, shape @ (m, n, k)) in shapes.into_iter().enumerate() {
            let [x, y] = factors[i].each_ref().map(|x| wide(x));
            let second = |j: usize, c: usize| if transposed { y[c * k + j] } else { y[j * n + c] };
            let want = product(shape, |i, j| x[i * k + j], second);
            near_halves(&t.device.download(places[i][2], m * n), &want, k, same, &format!("{name} {i}"));
        }
    }
}

/// Persistent programs with tensor maps of the host: eight warps, whose results go out in halves of a tile; partitions of
/// warps (one loads, others multiply); clusters of two blocks, which share a tile; and Gluon's, where the ring of
/// mbarriers, the waits and the partitions are the kernel's own.
#[test]
fn triton_matmul_maps() {
    for (name, persistent) in [
        ("matmul_maps", true),
        ("matmul_maps_specialized", true),
        ("matmul_maps_cluster", true),
        ("ring_matmul", false),
        ("partitioned_matmul", false),
    ] {
        let mut t = Triton::new(name, 90);
        let (m, n, k) = (200usize, 136usize, 232usize);
        let mut rng = Rng(44);
        let (x, y) = (halves(&mut rng, m * k), halves(&mut rng, n * k));
        let (a, b, c) = (t.device.upload(&x), t.device.upload(&y), t.device.empty::<u16>(m * n));
        let maps = [t.map(0, a, m, k), t.map(1, b, n, k), t.map(2, c, m, n)];
        if persistent {
            t.run_maps((3, 1), &maps, &[&(m as i32), &(n as i32), &(k as i32)]);
        } else {
            t.run_maps((m.div_ceil(64), n.div_ceil(64)), &maps, &[&(k as i32)]);
        }
        let (x, y) = (wide(&x), wide(&y));
        let want = product((m, n, k), |i, j| x[i * k + j], |j, c| y[c * k + j]);
        near_halves(&t.device.download(c, m * n), &want, k, same, name);
    }
}

/// Factors of 8 and of 4 or 8 bits with a power of two for every 32 along k, which sm_90 multiplies in bf16, exactly, and sm_120
/// as they are.
#[test]
fn triton_matmul_scaled() {
    for (name, arch, narrow) in [
        ("matmul_scaled_e2m1", 90, true),
        ("matmul_scaled_e5m2", 90, false),
        ("matmul_scaled_e5m2", 120, false),
    ] {
        let mut t = Triton::new(name, arch);
        let (m, n, k) = (128usize, 64usize, 192usize);
        let mut rng = Rng(45);
        let x = rng.vec(m * k, |r| (r.below(127) | r.below(2) << 7) as u8);
        let y = rng.vec(k * n, |r| if narrow { r.below(16) } else { r.below(124) | r.below(2) << 7 } as u8);
        let mut powers = |n| rng.vec(n, |r| 122 + r.below(12) as u8);
        let (px, py) = (powers(m * k / 32), powers(n * k / 32));
        let packed: Vec<u8> =
            (0..k / 2 * n).map(|i| y[i / n * 2 * n + i % n] | y[(i / n * 2 + 1) * n + i % n] << 4).collect();
        let d = &mut t.device;
        let (a, b) = (d.upload(&x), d.upload(if narrow { &packed } else { &y }));
        let (sa, sb, c) = (d.upload(&px), d.upload(&py), d.empty::<f32>(m * n));
        let [height, width, depth] = [m, n, k].map(|n| n as i32);
        t.run((m / 64, n / 32), &[&a, &sa, &b, &sb, &c, &height, &width, &depth]);
        let power = |of: &[u8], row: usize, j: usize| 2f64.powi(i32::from(of[row * (k / 32) + j / 32]) - 127);
        let want = product(
            (m, n, k),
            |i, j| finite(E4M3, x[i * k + j]) * power(&px, i, j),
            |j, c| finite(if narrow { E2M1 } else { E5M2 }, y[j * n + c]) * power(&py, c, j),
        );
        near_sums(&t.device.download(c, m * n), &want, k, name);
    }
}

/// Error of a probability: p is rounded to f16, and its score is a sum of 64 products.
const P: f64 = U16 + 2.0 * 64.0 * 64.0 * U32;

/// Causal attention of two heads: by pointers, by tensor maps of the host, and by partitions of warps.
#[test]
fn triton_attention() {
    for (name, arch, tokens, block) in [
        ("attention", 80, 93usize, 64usize),
        ("attention", 90, 93, 64),
        ("attention_maps", 90, 256, 128),
        ("attention_maps_specialized", 90, 192, 64),
    ] {
        let mut t = Triton::new(name, arch);
        let (heads, width) = (2usize, 64usize);
        let all = heads * tokens * width;
        let mut rng = Rng(35);
        let [q, k, v] = [(); 3].map(|()| halves(&mut rng, all));
        let [a, b, c] = [&q, &k, &v].map(|x| t.device.upload(x));
        let (o, tops) = (t.device.empty::<u16>(all), t.device.empty::<f32>(heads * tokens));
        let programs = (tokens.div_ceil(block), heads);
        let maps = !t.maps.is_empty();
        if maps {
            let maps = [(0, a), (1, b), (2, c), (3, o)].map(|(i, at)| t.map(i, at, heads * tokens, width));
            t.run_maps(programs, &maps, &[&tops, &0.25f32, &(tokens as i32)]);
        } else {
            t.run(programs, &[&a, &b, &c, &o, &0.25f32, &(tokens as i32)]);
        }
        let got = t.device.download::<u16>(o, all);
        let tops = if maps { t.device.download::<f32>(tops, heads * tokens) } else { Vec::new() };
        let [q, k, v] = [q, k, v].map(|x| wide(&x));
        for h in 0..heads {
            let part = h * tokens * width..(h + 1) * tokens * width;
            let (want, sums) =
                attention(&q[part.clone()], &k[part.clone()], &v[part.clone()], tokens, width, 0.25, true);
            for (i, want) in want.into_iter().enumerate() {
                // p and the output in f16, of at most 1.
                near(from_f16(got[part.start + i]), want, P + U16, (name, arch, h, i));
            }
            for (i, got) in tops.iter().skip(h * tokens).take(tokens).enumerate() {
                near(f64::from(*got), sums[i] * LOG2_E, 2.0 * P * LOG2_E, (name, h, i));
            }
        }
    }
}

#[test]
fn triton_attention_backward() {
    let mut t = Triton::new("attention_backward", 90);
    let (heads, tokens, width, scale) = (2usize, 128usize, 64usize, 0.25f64);
    let all = heads * tokens * width;
    let mut rng = Rng(46);
    let inputs = [(); 4].map(|()| halves(&mut rng, all));
    let at = inputs.each_ref().map(|x| t.device.upload(x));
    let inputs = inputs.map(|x| wide(&x));
    let head = |x: &'_ [f64], h: usize| x[h * tokens * width..(h + 1) * tokens * width].to_vec();
    let heads_of: Vec<[Vec<f64>; 4]> = (0..heads).map(|h| inputs.each_ref().map(|x| head(x, h))).collect();
    let forward: Vec<_> =
        heads_of.iter().map(|[q, k, v, _]| attention(q, k, v, tokens, width, scale, true)).collect();
    let tops: Vec<f32> =
        forward.iter().flat_map(|(_, sums)| sums.iter().map(|s| (s * LOG2_E) as f32)).collect();
    let delta = |h: usize, r: usize| {
        let row = r * width..(r + 1) * width;
        forward[h].0[row.clone()].iter().zip(&heads_of[h][3][row]).map(|(o, g)| o * g).sum::<f64>()
    };
    let deltas: Vec<f32> = (0..heads * tokens).map(|i| delta(i / tokens, i % tokens) as f32).collect();
    let (tops, deltas) = (t.device.upload(&tops), t.device.upload(&deltas));
    let out = [(); 3].map(|()| t.device.empty::<f32>(all));
    let [q, k, v, g] = &at;
    let [dq, dk, dv] = &out;
    let args: [&dyn ToArg; 11] = [q, k, v, g, &tops, &deltas, dq, dk, dv, &(scale as f32), &(tokens as i32)];
    t.run((tokens / 64, heads), &args);
    let got = out.map(|at| t.device.download::<f32>(at, all));

    for (h, [q, k, v, g]) in heads_of.iter().enumerate() {
        let dot = |a: &[f64], r: usize, b: &[f64], c: usize| {
            (0..width).map(|j| a[r * width + j] * b[c * width + j]).sum::<f64>()
        };
        // The gradients and bounds of their errors.
        let mut want = [(); 3].map(|()| vec![(0.0, 0.0); tokens * width]);
        for r in 0..tokens {
            for c in 0..=r {
                let p = (scale * dot(q, r, k, c) - forward[h].1[r]).exp();
                let dp = dot(g, r, v, c) - delta(h, r);
                let ds = p * dp;
                // Products of 64 terms of at most 1 in dp; ds is rounded to f16 as p is, and may be below its range.
                let error = P * ds.abs() + p * 2.0 * 64.0 * 64.0 * U32 + U16 * ds.abs() + TINY16;
                for j in 0..width {
                    let (row, column) = (r * width + j, c * width + j);
                    let terms = [
                        (0, row, scale * ds, scale * error, k[column]),
                        (1, column, scale * ds, scale * error, q[row]),
                        (2, column, p, P * p + TINY16, g[row]),
                    ];
                    for (of, place, weight, error, value) in terms {
                        let (sum, bound) = &mut want[of][place];
                        *sum += weight * value;
                        *bound += (error + tokens as f64 * U32 * weight.abs()) * value.abs();
                    }
                }
            }
        }
        for (of, want) in want.iter().enumerate() {
            for (i, (sum, bound)) in want.iter().enumerate() {
                near(got[of][h * tokens * width + i].into(), *sum, *bound, (["dq", "dk", "dv"][of], h, i));
            }
        }
    }
}
