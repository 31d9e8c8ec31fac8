//! How fast the virtual machine is, checks off and on: `cargo bench -p ptxvm`.
//!
//! `fma` counts lane-instructions, `mma` and `wgmma` FLOPs of the tensor cores, the others bytes of compulsory global traffic; the
//! ratio of `off` to `on` is what the checks cost. Results are compared with the expected ones before anything is timed.

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use ptxvm::{Arg, Checks, DevicePtr, Gpu, Launch, LoadedModule, Module, Options, Report};

const KERNELS: &str = include_str!("kernels.ptx");
/// Width of the transposed matrix, and the square root of the numbers that are copied and reduced.
const SIDE: usize = 1024;

/// What a kernel's throughput is counted in.
#[derive(Clone, Copy)]
enum Unit {
    LaneInstructions,
    TensorFlops,
    Bytes,
}

struct Device {
    gpu: Gpu,
    module: LoadedModule,
    from: DevicePtr,
    to: DevicePtr,
}

/// Small enough that sums of 256 are exact.
fn input() -> Vec<f32> {
    (0..SIDE * SIDE).map(|i| (i * 31 % 1021) as f32).collect()
}

impl Device {
    fn new(checks: Checks) -> Self {
        // Counting of memory traffic goes with the checks: the user who wants speed wants neither.
        let mut gpu = Gpu::new(Options { checks, counters: checks == Checks::ALL, ..Options::default() });
        let module = Module::load("kernels.ptx", KERNELS).and_then(|m| gpu.load(&m)).unwrap();
        let from = gpu.alloc(4 * SIDE * SIDE).unwrap();
        let to = gpu.alloc(4 * SIDE * SIDE).unwrap();
        gpu.write(from, bytemuck::cast_slice(&input())).unwrap();
        Self { gpu, module, from, to }
    }

    fn launch(&mut self, kernel: &str) -> Report {
        let side = SIDE as u32;
        let copying = [Arg::Ptr(self.from), Arg::Ptr(self.to)];
        let (shape, args) = match kernel {
            "fma" => (Launch::linear(32, 256), vec![Arg::Ptr(self.to), Arg::U32(250)]),
            "mma" => (Launch::linear(16, 128), vec![Arg::Ptr(self.to), Arg::U32(200)]),
            "wgmma" => (Launch::linear(16, 128), vec![Arg::Ptr(self.to), Arg::U32(20)]),
            "copy" => (Launch::linear(side * side / 1024, 256), copying.into()),
            "reduce" => (Launch::linear(side * side / 256, 256), copying.into()),
            "transpose" => {
                let grid = [side / 32, side / 32, 1];
                (
                    Launch { grid, block: [32, 8, 1], shared_bytes: 0, cooperative: false, cluster: None },
                    copying.into(),
                )
            }
            other => unreachable!("no kernel {other}"),
        };
        self.gpu.launch(&self.module, kernel, &shape, &args).unwrap()
    }

    fn output(&self) -> Vec<f32> {
        let mut out = vec![0f32; SIDE * SIDE];
        self.gpu.read(self.to, bytemuck::cast_slice_mut(&mut out)).unwrap();
        out
    }

    /// A fast wrong result is worth nothing.
    fn check(&self, kernel: &str) {
        let (input, output) = (input(), self.output());
        match kernel {
            "copy" => assert_eq!(output, input),
            "transpose" => {
                assert!((0..SIDE * SIDE).all(|i| output[i] == input[i % SIDE * SIDE + i / SIDE]));
            }
            "reduce" => {
                let sums: Vec<f32> = input.chunks(256).map(|c| c.iter().sum()).collect();
                assert_eq!(output[..sums.len()], sums);
            }
            "fma" => {
                let chain = |x: f32, start: f32| (0..1000).fold(start, |f, _| f.mul_add(x, 0.5));
                let x = 5.0 * f32::from_bits(0x3a00_0000);
                let (a, b) = (chain(x, x), chain(x, 0.5));
                let pair = a + b;
                assert_eq!(output[5], (pair + pair) + (pair + pair));
            }
            _ => assert!(output[..4096].iter().all(|x| x.is_finite() && *x != 0.0)),
        }
    }
}

fn machine(c: &mut Criterion) {
    for (kernel, unit) in [
        ("fma", Unit::LaneInstructions),
        ("mma", Unit::TensorFlops),
        ("wgmma", Unit::TensorFlops),
        ("copy", Unit::Bytes),
        ("transpose", Unit::Bytes),
        ("reduce", Unit::Bytes),
    ] {
        let mut group = c.benchmark_group(kernel);
        group.sample_size(20);
        let counted = Device::new(Checks::ALL).launch(kernel);
        group.throughput(match unit {
            Unit::LaneInstructions => Throughput::Elements(counted.instructions().lanes),
            Unit::TensorFlops => Throughput::Elements(counted.mma_flops),
            Unit::Bytes => Throughput::Bytes((counted.unique_sectors.0 + counted.unique_sectors.1) * 32),
        });
        for (name, checks) in [("off", Checks::NONE), ("on", Checks::ALL)] {
            let mut device = Device::new(checks);
            device.launch(kernel);
            device.check(kernel);
            group.bench_function(BenchmarkId::from_parameter(name), |b| b.iter(|| device.launch(kernel)));
        }
        group.finish();
    }
}

criterion_group!(benches, machine);
criterion_main!(benches);
