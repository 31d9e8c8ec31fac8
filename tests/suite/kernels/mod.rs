//! Every kernel on every device that can run it: against the CPU in f32 by the rule of [`crate::tolerance`], under all
//! of the virtual GPU's checks, and bit-equal over schedules.
//!
//! A [`Case`] is written once, for any backend: the CPU's answer is the truth, [`Rounded`]'s says how wrong bf16 may
//! be, the devices' are tested.

mod adamw;
mod attention;
mod attention_backward;
mod bf16_gradients;
mod embed;
mod experts;
mod geglu;
mod lm_head;
mod matmul;
mod random;
mod reduce;
mod resources;
mod rms_norm;
mod rope;
mod rows;

use bon_engine::backend::cpu::{Cpu, Tensor as CpuTensor};
use bon_engine::backend::cuda::Cuda;
use bon_engine::backend::cuda::entries;
use bon_engine::backend::ops::*;
use bon_engine::backend::{Backend, DType};
use bon_engine::cost::workloads::{GEMMA_2B, GEMMA_270M, Workload, workloads};
use bon_engine::delegate_device;
use bon_engine::device::vm::{Checks, MmaOrder, Options, Report, Vm};
use bon_engine::device::{Arg, Device, DeviceError, Kernel, Launch, Ptr};
use half::bf16;
use std::sync::{Arc, OnceLock};

use crate::ops::{bits, randoms};
use crate::rounded::Rounded;
use crate::tolerance::{Rule, assert_rule};

/// One computation with fixed inputs.
pub(crate) trait Case {
    /// Runs it and returns the outputs. Inputs come from [`activation`], [`weight`] and [`single`].
    fn run<B: Backend>(&self, b: &B) -> Vec<B::Tensor>;
}

/// Whether the program has kernels. Without them, what is left out is told at the end; `make test` sees to it that it has.
pub(crate) fn compiled() -> bool {
    if !entries::compiled() {
        crate::device::skipped("need kernels (built without nvcc; `make nvcc` fetches one)");
    }
    entries::compiled()
}

/// A virtual GPU with the kernels on it, all checks on. With a seed, warps are scheduled at random.
pub(crate) fn vm(seed: Option<u64>) -> Cuda {
    Cuda::new(Box::new(Vm::new(Options { seed, ..Options::default() }))).expect("the kernels load")
}

/// A virtual GPU that adds up products in an order. Its checks see the same accesses as in any other, and are off.
pub(crate) fn vm_in(mma: MmaOrder) -> Cuda {
    let options = Options { mma, checks: Checks::NONE, counters: false, ..Options::default() };
    Cuda::new(Box::new(Vm::new(options))).expect("the kernels load")
}

/// The orders in which GPUs add up products, beside the chain that a virtual GPU makes of them unless told otherwise.
const GPU_ORDERS: [MmaOrder; 2] = [MmaOrder::Ampere, MmaOrder::Hopper];

/// Whether only a GPU is asked, and nothing counted: `KERNEL_TESTS=gpu`, under tools to which the virtual GPU is just a
/// program that takes long.
fn gpu_alone() -> bool {
    std::env::var_os("KERNEL_TESTS").is_some_and(|only| only == "gpu")
}

/// Every device that can run the kernels: a virtual GPU with nothing on it, and cuda:0 where there is one.
pub(crate) fn devices() -> Vec<Cuda> {
    if !compiled() {
        return Vec::new();
    }
    [(!gpu_alone()).then(|| vm(None)), cuda()].into_iter().flatten().collect()
}

/// [`devices`], and virtual GPUs that add up products as tensor cores do: what must hold of products to the bit holds in
/// each of these orders, since two paths that cut k at different places agree in a chain and differ in groups.
pub(crate) fn orders() -> Vec<Cuda> {
    let mut all = devices();
    if counting() {
        all.extend(GPU_ORDERS.map(vm_in));
    }
    all
}

/// Whether work is counted: on the virtual GPU.
pub(crate) fn counting() -> bool {
    compiled() && !gpu_alone()
}

/// cuda:0 with the kernels on it, one for all tests. Without a GPU the skip is counted, and told at the end.
pub(crate) fn cuda() -> Option<Cuda> {
    static CUDA: OnceLock<Cuda> = OnceLock::new();
    if let Some(cuda) = CUDA.get() {
        return Some(cuda.clone());
    }
    let gpu = crate::device::gpu()?;
    Some(CUDA.get_or_init(|| Cuda::new(Box::new(gpu)).expect("the kernels load")).clone())
}

/// A virtual GPU whose memory is NaN where nothing was written. Its other checks cannot see that nothing was.
pub(crate) fn poisoned() -> Cuda {
    Cuda::new(Box::new(Poisoned(Vm::new(Options::default())))).expect("the kernels load")
}

struct Poisoned(Vm);

impl Device for Poisoned {
    delegate_device!(self, self.0; name, multiprocessors, load, free, write, read, fill, launch, synchronize);

    fn alloc(&self, bytes: usize) -> Result<Ptr, DeviceError> {
        let ptr = self.0.alloc(bytes)?;
        self.0.fill(ptr, 0xff, bytes)?;
        Ok(ptr)
    }
}

/// Values as bf16 holds them.
pub(crate) fn rounded(x: &[f32]) -> Vec<f32> {
    x.iter().map(|x| bf16::from_f32(*x).to_f32()).collect()
}

/// Random activations in (-1, 1), the same numbers on every backend.
pub(crate) fn activation<B: Backend>(b: &B, seed: u32, rows: usize, cols: usize) -> B::Tensor {
    activation_of(b, rows, cols, &randoms(seed, rows * cols))
}

/// Random activations in (-size, size).
pub(crate) fn activation_up_to<B: Backend>(
    b: &B,
    size: f32,
    seed: u32,
    rows: usize,
    cols: usize,
) -> B::Tensor {
    let x: Vec<f32> = randoms(seed, rows * cols).iter().map(|x| x * size).collect();
    activation_of(b, rows, cols, &x)
}

/// These numbers, rounded to bf16, as activations.
pub(crate) fn activation_of<B: Backend>(b: &B, rows: usize, cols: usize, x: &[f32]) -> B::Tensor {
    match b.activation_dtype() {
        DType::F32 => single_of(b, rows, cols, &rounded(x)),
        DType::Bf16 => weight_of(b, rows, cols, x),
    }
}

/// Random bf16 weights in (-1, 1).
pub(crate) fn weight<B: Backend>(b: &B, seed: u32, rows: usize, cols: usize) -> B::Tensor {
    weight_of(b, rows, cols, &randoms(seed, rows * cols))
}

/// These numbers as bf16 weights.
pub(crate) fn weight_of<B: Backend>(b: &B, rows: usize, cols: usize, x: &[f32]) -> B::Tensor {
    let data: Vec<bf16> = x.iter().map(|x| bf16::from_f32(*x)).collect();
    b.upload(DType::Bf16, rows, cols, bytemuck::cast_slice(&data))
}

/// Random f32 numbers in (-1, 1): gradients of weights, masters, moments.
pub(crate) fn single<B: Backend>(b: &B, seed: u32, rows: usize, cols: usize) -> B::Tensor {
    single_of(b, rows, cols, &randoms(seed, rows * cols))
}

/// These numbers in f32.
pub(crate) fn single_of<B: Backend>(b: &B, rows: usize, cols: usize, x: &[f32]) -> B::Tensor {
    b.upload(DType::F32, rows, cols, bytemuck::cast_slice(x))
}

/// Runs a case and returns its outputs' shapes and values; asserts that the device is content.
#[track_caller]
pub(crate) fn outputs<B: Backend>(b: &B, case: &impl Case) -> Vec<CpuTensor> {
    let out = case.run(b);
    if let Err(e) = b.check() {
        panic!("{e}");
    }
    out.iter()
        .map(|x| {
            let (rows, cols) = b.shape(x);
            CpuTensor::f32(rows, cols, b.to_f32(x))
        })
        .collect()
}

/// How else a device of [`devices`] may run something, with the same bits: the virtual GPU by other schedules and with
/// memory that holds NaN, a GPU as it likes.
pub(crate) fn again(device: &Cuda) -> Vec<(Cuda, &'static str)> {
    match device.device_name().starts_with("cuda") {
        true => vec![(device.clone(), "when run again")],
        false => vec![
            (vm(Some(1)), "under schedule 1"),
            (vm(Some(2)), "under schedule 2"),
            (poisoned(), "in poisoned memory"),
        ],
    }
}

/// Whether a case's kernels use tensor cores.
fn has_products(case: &impl Case) -> bool {
    let vm = Arc::new(Vm::new(Options { checks: Checks::NONE, counters: false, ..Options::default() }));
    let cuda = Cuda::new(Box::new(Arc::clone(&vm))).expect("the kernels load");
    vm.keep_reports();
    case.run(&cuda);
    vm.take_reports().iter().any(|report| report.mma_flops > 0)
}

/// Runs a case everywhere, products in every order, and holds it to `rule`; its bits must not depend on the schedule.
/// `what` names the outputs.
#[track_caller]
pub(crate) fn check(what: &[&str], rule: Rule, case: &impl Case) {
    if !compiled() {
        return;
    }
    let (exact, naive) = (outputs(&Cpu::F32, case), outputs(&Rounded, case));
    let orders = if counting() && has_products(case) { GPU_ORDERS.map(vm_in).into() } else { Vec::new() };
    let mut all: Vec<(Cuda, bool)> = devices().into_iter().map(|device| (device, true)).collect();
    all.extend(orders.into_iter().map(|device| (device, false)));
    for (device, reschedule) in all {
        let name = device.device_name();
        let got = outputs(&device, case);
        assert_eq!(what.len(), got.len(), "a name for every output");
        for (i, what) in what.iter().enumerate() {
            let shape = |of: &[CpuTensor]| (of[i].rows, of[i].cols);
            assert_eq!(shape(&got), shape(&exact), "{what}: shape on {name}");
            let what = format!("{what} on {name}");
            assert_rule(&what, rule, got[i].as_f32(), exact[i].as_f32(), naive[i].as_f32());
        }
        // No schedule depends on what products are.
        for (again, how) in if reschedule { again(&device) } else { Vec::new() } {
            for ((got, again), what) in got.iter().zip(outputs(&again, case)).zip(what) {
                assert_eq!(bits(got), bits(&again), "{what} on {name}: other bits {how}");
            }
        }
    }
}

/// What the launches of one workload did, counted at its full size: one report per launch.
pub(crate) fn counted(workload: &Workload) -> Vec<Report> {
    counted_on(workload, 108)
}

/// The same on a GPU of so many multiprocessors, by which tiles are chosen.
pub(crate) fn counted_on(workload: &Workload, multiprocessors: u32) -> Vec<Report> {
    let vm = Vm::new(Options { checks: Checks::NONE, ..Options::default() });
    let vm = Arc::new(vm.with_multiprocessors(multiprocessors));
    let cuda = Cuda::new(Box::new(Arc::clone(&vm))).expect("the kernels load");
    let run = (workload.prepare)(&cuda);
    vm.keep_reports();
    run(&cuda);
    if let Err(e) = cuda.check() {
        panic!("{}: {e}", workload.name);
    }
    vm.take_reports()
}

/// Sectors of global memory that accesses requested, over those that they would request if coalesced.
pub(crate) fn coalescing(reports: &[Report]) -> f64 {
    let sum = |f: fn(&Report) -> u64| reports.iter().map(f).sum::<u64>() as f64;
    sum(|r| r.global.sectors) / sum(|r| r.global.ideal_sectors)
}

/// Bytes of different sectors that a workload's launches read and wrote, over its compulsory traffic.
pub(crate) fn traffic(workload: &Workload, reports: &[Report]) -> f64 {
    let sectors: u64 = reports.iter().map(|r| r.unique_sectors.0 + r.unique_sectors.1).sum();
    32.0 * sectors as f64 / workload.bytes as f64
}

/// Workloads whose names begin so, at the shapes of Gemma 2B and Gemma 3 270M.
pub(crate) fn workloads_of(op: &str) -> Vec<Workload> {
    let all = [GEMMA_2B, GEMMA_270M].iter().flat_map(workloads);
    all.filter(|w| w.name.starts_with(op)).collect()
}
