//! What may be wrong with a machine, and what is told of it: a process each, on a virtual driver with these settings.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bon_engine::device::{HostPtr, Lane};

use super::*;

/// Whether this is such a process. If not, one is run with the test of this name, and that was all.
#[track_caller]
fn on_machine(name: &str, settings: &[(&str, &str)]) -> bool {
    const SCENE: &str = "DEVICE_TEST_SCENE";
    if std::env::var_os(SCENE).is_some_and(|scene| scene == name) {
        return true;
    }
    let test = format!("{}::with_settings::{name}", here());
    assert_eq!(under(&[settings, &[(SCENE, name)]].concat(), &["--exact", &test]).0, 1, "{name}");
    false
}

#[test]
fn an_old_gpu() {
    if !on_machine("an_old_gpu", &[("VCUDA_CAPABILITY", "7.5")]) {
        return;
    }
    let message = Gpu::open(0).unwrap_err().message;
    assert!(
        message.contains("compute capability 7.5, and the kernels need 8.0 (Ampere) or newer"),
        "{message}"
    );
}

#[test]
fn an_old_driver() {
    if !on_machine("an_old_driver", &[("VCUDA_VERSION", "11.2")]) {
        return;
    }
    let gpu = Gpu::open(0).unwrap();
    // Which of several like GPUs makes no difference to bits.
    assert_eq!(gpu.name(), format!("cuda:0 ({})", gpu.description().name));
    assert_eq!(gpu.model(), format!("cuda ({})", gpu.description().name));
    let message = gpu.load("hand.ptx", PTX, &["combine"]).unwrap_err().message;
    let told = "hand.ptx is PTX 7.4, and this driver knows CUDA 11.2; install a driver of CUDA 11.4 or newer";
    assert!(message.starts_with(told), "{message}");
}

#[test]
fn no_gpu() {
    if !on_machine("no_gpu", &[("VCUDA_DEVICES", "0")]) {
        return;
    }
    let message = Gpu::open(0).unwrap_err().message;
    assert!(message.contains("CUDA_VISIBLE_DEVICES") && message.contains("--device cpu"), "{message}");
}

#[test]
fn no_fabric() {
    if !on_machine("no_fabric", &[("VCUDA_INIT", "802")]) {
        return;
    }
    let message = Gpu::open(0).unwrap_err().message;
    assert!(message.contains("(CUDA_ERROR_SYSTEM_NOT_READY); GPUs that an NVSwitch connects"), "{message}");
}

/// A driver newer than the headers.
#[test]
fn an_unknown_result() {
    if !on_machine("an_unknown_result", &[("VCUDA_INIT", "98765")]) {
        return;
    }
    let message = Gpu::open(0).unwrap_err().message;
    assert_eq!(message, "cannot start the CUDA driver: error 98765 (error 98765)");
}

#[test]
fn little_memory() {
    if !on_machine("little_memory", &[("VCUDA_MEMORY", "209715200")]) {
        return;
    }
    let gpu = Gpu::open(0).unwrap();
    let mib = 1 << 20;
    // Two pieces of 64 MiB in 200: the third does not fit unless they are given back.
    let two = [gpu.alloc(60 * mib).unwrap(), gpu.alloc(60 * mib).unwrap()];
    let message = gpu.alloc(100 * mib).unwrap_err().message;
    let told =
        "out of memory: 0.10 GiB are asked for; of 0.20 GiB this process uses 0.12 GiB and keeps 0.01 GiB";
    assert!(message.starts_with(told), "{message}");
    assert!(message.contains("0.07 GiB are free; `nvidia-smi`"), "{message}");
    two.into_iter().for_each(|ptr| gpu.free(ptr));
    // The pieces go back, and the memory is good.
    let sequence = || {
        let large = gpu.alloc(2 * mib).unwrap();
        gpu.begin_sequence().unwrap();
        (0..4).for_each(|i| gpu.fill(large, i, 2 * mib).unwrap());
        gpu.end_sequence().unwrap();
        gpu.free(large);
    };
    (0..3).for_each(|_| sequence());
    let big = gpu.alloc(150 * mib).unwrap();
    gpu.fill(big, 7, 150 * mib).unwrap();
    let mut end = [0; 16];
    gpu.read(Ptr(big.0 + (150 * mib - 16) as u64), &mut end).unwrap();
    assert_eq!(end, [7; 16]);
    assert!(gpu.alloc(usize::MAX).unwrap_err().out_of_memory);
    // The graph went before what it fills; others are made.
    gpu.free(big);
    (0..3).for_each(|_| sequence());
    assert_eq!((gpu.counts().recorded, gpu.counts().replayed), (2, 4));
}

#[test]
fn a_kernel_that_fails() {
    if !on_machine("a_kernel_that_fails", &[]) {
        return;
    }
    let gpu = Gpu::open(0).unwrap();
    let [kernel, _, wild] = kernels(&gpu);
    // More than are remembered; the wild one is not the last.
    let y = upload(&gpu, &[1.0; 64]);
    (0..40).for_each(|_| combine(&gpu, kernel, [y, y, y], 64, 1.0));
    gpu.launch(wild, &Launch::linear(3, 1), &[]).unwrap();
    combine(&gpu, kernel, [y, y, y], 64, 1.0);
    let launched = "; launched before, the latest first: combine with grid [1, 1, 1], block [64, 1, 1], \
                    wild with grid [3, 1, 1], block [1, 1, 1], combine with grid [1, 1, 1]";
    let read = gpu.read(y, &mut [0; 4]).unwrap_err().message;
    assert!(read.contains(launched), "{read}");
    assert_eq!(read.matches(" with grid ").count(), 16, "{read}");
    for _ in 0..2 {
        let message = gpu.synchronize().unwrap_err().message;
        assert!(message.contains(launched), "{message}");
        assert!(message.contains("(CUDA_ERROR_ILLEGAL_ADDRESS); a kernel failed"), "{message}");
        assert!(message.contains("CUDA_LAUNCH_BLOCKING=1") && message.contains("--device vm"), "{message}");
    }
}

/// With CUDA_LAUNCH_BLOCKING=1 the launch that fails says so itself.
#[test]
fn a_kernel_that_is_waited_for() {
    let settings = [("CUDA_LAUNCH_BLOCKING", "1"), ("VCUDA_FAULT", "reverse")];
    if !on_machine("a_kernel_that_is_waited_for", &settings) {
        return;
    }
    let gpu = Gpu::open(0).unwrap();
    let [kernel, reverse, _] = kernels(&gpu);
    let y = upload(&gpu, &[1.0; 64]);
    combine(&gpu, kernel, [y, y, y], 64, 1.0);
    let message = gpu.launch(reverse, &Launch::linear(1, 64), &[y.into(), 0u32.into()]).unwrap_err().message;
    assert!(
        message.starts_with("cannot launch reverse with grid [1, 1, 1], block [64, 1, 1]: "),
        "{message}"
    );
    assert!(
        message
            .ends_with("; launched before, the latest first: combine with grid [1, 1, 1], block [64, 1, 1]")
    );
}

#[test]
fn a_replay_that_fails() {
    if !on_machine("a_replay_that_fails", &[]) {
        return;
    }
    let gpu = Gpu::open(0).unwrap();
    let [kernel, _, wild] = kernels(&gpu);
    let y = upload(&gpu, &[1.0; 64]);
    for round in 0..3 {
        gpu.begin_sequence().unwrap();
        (0..5).for_each(|_| combine(&gpu, kernel, [y, y, y], 64, 1.0));
        gpu.end_sequence().unwrap();
        if round == 1 {
            gpu.launch(wild, &Launch::linear(1, 1), &[]).unwrap();
        }
    }
    // Replayed, and a replay is a launch of all in it.
    assert_eq!(gpu.counts().replayed, 2);
    let message = gpu.synchronize().unwrap_err().message;
    let (_, launched) = message.split_once("the latest first: ").unwrap();
    let names: Vec<&str> =
        launched.split(" with grid ").map(|part| part.rsplit(' ').next().unwrap()).collect();
    assert_eq!(names[..7], [["combine"; 5].as_slice(), &["wild", "combine"]].concat(), "{message}");
}

/// A GPU, and the most of its memory that the driver said was in use, and the host's that it was asked for.
struct Watched {
    gpu: Gpu,
    peak: AtomicU64,
    host: AtomicU64,
}

impl Device for Watched {
    delegate_device!(self, self.gpu; name, multiprocessors, load, load_cubin, free, write, read, fill, launch, synchronize, available,
        host_free, host_mapped, host_write, host_read, copy_in, copy_out, mark, wait_for, begin_sequence, end_sequence);

    fn alloc(&self, bytes: usize) -> Result<Ptr, DeviceError> {
        let ptr = self.gpu.alloc(bytes)?;
        let used = self.gpu.description().memory - self.gpu.memory()?.free;
        self.peak.fetch_max(used, Ordering::Relaxed);
        Ok(ptr)
    }

    fn host_alloc(&self, bytes: usize) -> Result<HostPtr, DeviceError> {
        self.host.fetch_add(bytes as u64, Ordering::Relaxed);
        self.gpu.host_alloc(bytes)
    }
}

/// What a run takes as the driver counts it, to which each allocation is one of its own.
#[test]
fn memory_as_it_was_planned() {
    let settings = [(EXACT_ALLOC, "1"), ("VCUDA_CHECKS", "0")];
    if !crate::kernels::compiled() || !on_machine("memory_as_it_was_planned", &settings) {
        return;
    }
    let new = || {
        let (peak, host) = (AtomicU64::new(0), AtomicU64::new(0));
        Arc::new(Watched { gpu: Gpu::open(0).unwrap(), peak, host })
    };
    let taken = |device: &Watched| [&device.peak, &device.host].map(|bytes| bytes.load(Ordering::Relaxed));
    crate::plan::runs_take_what_plans_say(new, taken);
}

/// Every allocation has its own bounds, so that an access past a tensor is seen where it happens.
#[test]
fn exact_memory() {
    if !on_machine("exact_memory", &[(EXACT_ALLOC, "1")]) {
        return;
    }
    let gpu = Gpu::open(0).unwrap();
    let before = gpu.memory().unwrap();
    let [kernel, ..] = kernels(&gpu);
    let [x, y] = [upload(&gpu, &[1.0; 50]), upload(&gpu, &[0.0; 50])];
    let memory = gpu.memory().unwrap();
    assert_eq!((memory.used, memory.held, memory.free), (400, 400, before.free - 400));
    // Memory that is freed in a sequence is still there when its work runs, and gone afterwards.
    for _ in 0..4 {
        gpu.begin_sequence().unwrap();
        (0..4).for_each(|_| step(&gpu, kernel, x, 50));
        gpu.end_sequence().unwrap();
    }
    assert!(download(&gpu, x, 50).iter().all(|x| *x == 17.0));
    let after = gpu.memory().unwrap();
    assert_eq!((after.used, after.held, after.free), (400, 400, before.free - 400));
    assert_eq!((gpu.counts().recorded, gpu.counts().single), (0, 32));
    combine(&gpu, kernel, [x, x, y], 51, 1.0);
    let message = gpu.synchronize().unwrap_err().message;
    assert!(message.contains("ILLEGAL_ADDRESS"), "{message}");
}

/// The same access within a piece of the arena, where nobody sees it.
#[test]
fn memory_in_pieces() {
    if !on_machine("memory_in_pieces", &[]) {
        return;
    }
    let gpu = Gpu::open(0).unwrap();
    let [kernel, ..] = kernels(&gpu);
    let [x, y] = [upload(&gpu, &[1.0; 51]), upload(&gpu, &[0.0; 50])];
    combine(&gpu, kernel, [x, x, y], 51, 1.0);
    gpu.synchronize().unwrap();
}

/// x = x + 1 by way of temporary memory, small and large.
fn step(gpu: &Gpu, kernel: Kernel, x: Ptr, n: usize) {
    let one = upload(gpu, &vec![1.0; n]);
    let sum = gpu.alloc(2 << 20).unwrap();
    combine(gpu, kernel, [x, one, sum], n, 1.0);
    gpu.free(one);
    let zero = upload(gpu, &vec![0.0; n]);
    combine(gpu, kernel, [sum, zero, x], n, 1.0);
    [zero, sum].into_iter().for_each(|ptr| gpu.free(ptr));
}

#[test]
fn no_graphs() {
    if !on_machine("no_graphs", &[("VCUDA_GRAPHS", "0")]) {
        return;
    }
    let gpu = Gpu::open(0).unwrap();
    four_sequences(&gpu);
    assert_eq!(gpu.counts().recorded, 0);
}

#[test]
fn no_memory_for_graphs() {
    if !on_machine("no_memory_for_graphs", &[("VCUDA_GRAPHS", "made")]) {
        return;
    }
    let gpu = Gpu::open(0).unwrap();
    four_sequences(&gpu);
    assert_eq!(gpu.counts().recorded, 1);
}

/// Kernels that begin before those ahead have ended, one by one and in graphs, wait for them.
#[test]
fn kernels_that_begin_early() {
    if !on_machine("kernels_that_begin_early", &[("VCUDA_CAPABILITY", "9.0")]) {
        return;
    }
    let gpu = Gpu::open(0).unwrap();
    let [kernel, ..] = kernels(&gpu);
    let y = upload(&gpu, &[1.0; 64]);
    for _ in 0..4 {
        gpu.begin_sequence().unwrap();
        (0..5).for_each(|_| combine(&gpu, kernel, [y, y, y], 64, 1.0));
        gpu.end_sequence().unwrap();
    }
    combine(&gpu, kernel, [y, y, y], 64, 1.0);
    assert!(download(&gpu, y, 64).iter().all(|y| *y == 2f32.powi(21)));
    assert!(gpu.counts().recorded == 1 && gpu.counts().replayed > 0 && gpu.counts().refused == 0);
    let message = one_that_does_not_wait(&gpu).unwrap_err().message;
    assert!(message.contains("cannot launch combine with grid"), "{message}");
    assert!(message.contains("something is still in use"), "{message}");
}

/// A kernel that uses memory before it waits may be launched where nothing begins early.
fn one_that_does_not_wait(gpu: &Gpu) -> Result<(), DeviceError> {
    let ptx = dependent(PTX);
    let late = ptx.replacen("griddepcontrol.wait;", "", 1);
    assert!(late != ptx);
    let image = machine_code(90, &late);
    let cubins = [Cubin { capability: (9, 0), cuda: (12, 0), image: &image }];
    let loaded = gpu.load_cubin("hand.cubin", &cubins, &["combine"])?.expect("it is for this GPU");
    let y = upload(gpu, &[1.0; 64]);
    let args = [y.into(), y.into(), y.into(), 64u32.into(), 1f32.into()];
    gpu.launch(loaded[0], &Launch::linear(1, 64), &args)
}

#[test]
fn kernels_that_begin_late_by_request() {
    let settings = [("VCUDA_CAPABILITY", "9.0"), (DEPENDENT_LAUNCH, "0")];
    if on_machine("kernels_that_begin_late_by_request", &settings) {
        one_that_does_not_wait(&Gpu::open(0).unwrap()).unwrap();
    }
}

/// A driver whose graphs know no programmatic dependencies.
#[test]
fn kernels_that_begin_late_under_an_old_driver() {
    let settings = [("VCUDA_CAPABILITY", "9.0"), ("VCUDA_VERSION", "12.2")];
    if on_machine("kernels_that_begin_late_under_an_old_driver", &settings) {
        one_that_does_not_wait(&Gpu::open(0).unwrap()).unwrap();
    }
}

/// What stands for machine code on the virtual driver.
fn machine_code(architecture: u8, ptx: &str) -> Vec<u8> {
    let mut image = vec![0; 64];
    image[..4].copy_from_slice(b"\x7fELF");
    image[0x31] = architecture;
    image.extend(ptx.bytes().chain([0]));
    image
}

const JETSON: [(&str, &str); 2] = [("VCUDA_CAPABILITY", "8.7"), ("VCUDA_VERSION", "13.0")];

#[test]
fn machine_code_where_there_is_some_for_the_gpu() {
    if !on_machine("machine_code_where_there_is_some_for_the_gpu", &JETSON) {
        return;
    }
    let gpu = Gpu::open(0).unwrap();
    // Each adds another number, so that it is seen which one runs.
    let images = [80u8, 86, 89, 90].map(|sm| {
        let ptx = PTX.replace(
            "fma.rn.f32 %f3, %f2, %f0, %f1;",
            &format!("mov.f32 %f3, 0f{:08x};", f32::from(sm).to_bits()),
        );
        (sm, machine_code(sm, &ptx))
    });
    let cubins = |cuda: i32| {
        images.each_ref().map(|(sm, image)| {
            let sm = i32::from(*sm);
            Cubin { capability: (sm / 10, sm % 10), cuda: (cuda, 2), image }
        })
    };
    let known = cubins(13);
    let [kernel] = gpu.load_cubin("hand.cubin", &known, &["combine"]).unwrap().unwrap()[..] else { panic!() };
    let y = upload(&gpu, &[1.0; 64]);
    combine(&gpu, kernel, [y, y, y], 64, 1.0);
    assert_eq!(download(&gpu, y, 64), [86.0; 64]);
    // Of another generation; of a newer toolkit; what the driver refuses.
    let none = |cubins: &[Cubin]| gpu.load_cubin("hand.cubin", cubins, &["combine"]).unwrap().is_none();
    assert!(none(&[]) && none(&known[3..]) && none(&cubins(14)) && !none(&cubins(12)));
    let refused = machine_code(86, "\0 no PTX");
    assert!(none(&[Cubin { image: &refused, ..known[1] }]));
    // Then the PTX is taken.
    let [kernel, ..] = kernels(&gpu);
    combine(&gpu, kernel, [y, y, y], 64, 1.0);
    assert_eq!(download(&gpu, y, 64), [172.0; 64]);
    let message = gpu.load_cubin("hand.cubin", &known, &["absent"]).unwrap_err().message;
    assert!(message.starts_with("cannot find the kernel absent in hand.cubin: "), "{message}");
}

#[test]
fn machine_code_of_the_kernels_is_refused_and_their_ptx_runs() {
    use bon_engine::backend::cuda::entries::{MODULES, PTXAS};
    let Some(ptxas) = PTXAS.filter(|_| crate::kernels::compiled()) else { return };
    let name = "machine_code_of_the_kernels_is_refused_and_their_ptx_runs";
    if !on_machine(name, &[("VCUDA_CAPABILITY", "9.0"), ("VCUDA_VERSION", "13.0")]) {
        return;
    }
    let module = MODULES.iter().find(|module| module.name == "rows").unwrap();
    let dir = tempfile::tempdir().unwrap();
    let (ptx, cubin) = (dir.path().join("rows.ptx"), dir.path().join("rows.cubin"));
    std::fs::write(&ptx, module.ptx.unwrap()).unwrap();
    let run = Command::new(ptxas).args(["-arch=sm_90", "-o"]).arg(&cubin).arg(&ptx).output().unwrap();
    assert!(run.status.success(), "{run:?}");
    let image = std::fs::read(&cubin).unwrap();
    assert_eq!(image[0x31], 90);
    let gpu = Gpu::open(0).unwrap();
    let cubins = [Cubin { capability: (9, 0), cuda: (13, 0), image: &image }];
    let names: Vec<&str> = module.entries.iter().map(|e| e.name()).collect();
    assert_eq!(gpu.load_cubin("rows.cubin", &cubins, &names), Ok(None));
    gpu.load("rows.ptx", module.ptx.unwrap(), &names).unwrap();
}

#[test]
fn the_compilers_log() {
    let said = |value: &str| {
        let settings = [&JETSON[..], &[("BON_ENGINE_JIT_LOG", value), ("DEVICE_TEST_SCENE", "log")]].concat();
        let test = format!("{}::with_settings::what_has_a_log", here());
        let (passed, said) = under(&settings, &["--exact", &test]);
        assert_eq!(passed, 1);
        said
    };
    assert!(said("1").contains("hand.ptx: compiled with line numbers\n"), "{}", said("1"));
    assert!(!said("0").contains("hand.ptx"));
}

/// For [`the_compilers_log`]: nothing elsewhere.
#[test]
fn what_has_a_log() {
    let set = |name: &str| std::env::var_os(name);
    if set("DEVICE_TEST_SCENE").is_none_or(|scene| scene != "log") {
        return;
    }
    let gpu = Gpu::open(0).unwrap();
    kernels(&gpu);
    // Of machine code there is none to be had.
    let image = machine_code(86, PTX);
    let cubins = [Cubin { capability: (8, 6), cuda: (13, 0), image: &image }];
    let loaded = gpu.load_cubin("hand.cubin", &cubins, &["combine"]).unwrap();
    assert_eq!(loaded.is_none(), set("BON_ENGINE_JIT_LOG").is_some_and(|value| value == "1"));
}

/// They come again, but run step by step.
fn four_sequences(gpu: &Gpu) {
    let [kernel, ..] = kernels(gpu);
    let y = upload(gpu, &[1.0; 64]);
    for _ in 0..4 {
        gpu.begin_sequence().unwrap();
        (0..5).for_each(|_| combine(gpu, kernel, [y, y, y], 64, 1.0));
        gpu.end_sequence().unwrap();
    }
    assert!(download(gpu, y, 64).iter().all(|y| *y == 2f32.powi(20)));
    let counts = gpu.counts();
    assert_eq!((counts.replayed, counts.refused, counts.single), (0, 1, 20));
}
