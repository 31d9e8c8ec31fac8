//! The devices, below any op: the arena's and the sequences' books, and the CUDA driver's calls, on a GPU where there is
//! one, and on the virtual driver (`tools/vcuda`) in any case.

mod arena;
mod on_gpu;
mod sequences;
mod with_settings;

use std::collections::BTreeMap;
use std::ffi::c_int;
use std::fmt::Write as _;
use std::path::Path;
use std::process::Command;
use std::sync::Mutex;

use bon_engine::backend::DType;
use bon_engine::backend::cuda::Cuda;
use bon_engine::backend::cuda::entries::MODULES;
use bon_engine::backend::ops::*;
use bon_engine::delegate_device;
use bon_engine::device::dependent::dependent;
use bon_engine::device::driver::{DEPENDENT_LAUNCH, EXACT_ALLOC, Gpu};
use bon_engine::device::vm::{Options, Vm};
use bon_engine::device::{Arg, Cubin, Device, DeviceError, Kernel, Launch, Ptr};

use crate::fixture::{Fixture, Ran};
use crate::places::{checkout, program, virtual_driver_folder};

/// cuda:0 as tests use it. Without one, what is left out is told at the end.
pub(crate) fn gpu() -> Option<Gpu> {
    match Gpu::open(0) {
        Ok(gpu) => Some(gpu),
        Err(e) => {
            skipped(&format!("need a GPU ({e})"));
            None
        }
    }
}

/// Counts checks that are left out, and tells at the end of the program: what a test prints that passes, nobody sees.
pub(crate) fn skipped(why: &str) {
    static SKIPPED: Mutex<BTreeMap<String, usize>> = Mutex::new(BTreeMap::new());
    unsafe extern "C" {
        fn atexit(f: extern "C" fn()) -> c_int;
    }
    #[allow(clippy::print_stderr, reason = "whoever runs the tests must hear of it")]
    extern "C" fn tell() {
        for (why, n) in SKIPPED.lock().iter().flat_map(|skipped| skipped.iter()) {
            eprintln!("skipped: {n} checks that {why}");
        }
    }
    let mut skipped = SKIPPED.lock().unwrap();
    if skipped.is_empty() {
        // SAFETY: a function of C's that every program has; `tell` does not panic.
        unsafe { atexit(tell) };
    }
    *skipped.entry(why.to_owned()).or_default() += 1;
}

/// Numbers that look random, the same every time.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        // Knuth's generator; its low bits are poor.
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        self.0 >> 33
    }

    fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    fn bytes(&mut self, n: usize) -> Vec<u8> {
        (0..n).map(|_| self.next() as u8).collect()
    }
}

// --------------------------------------------------------------------------------------------------- on any driver

/// Kernels small enough to be written by hand.
const PTX: &str = "
.version 7.4
.target sm_80
.address_size 64
.extern .shared .align 16 .b8 room[];

// y[i] = a x[i] + table[i], one thread each.
.visible .entry combine(.param .u64 x, .param .u64 table, .param .u64 y, .param .u32 n, .param .f32 a) {
    .reg .pred %p;
    .reg .b32 %r<6>;
    .reg .b64 %d<8>;
    .reg .f32 %f<5>;
    mov.u32 %r0, %ctaid.x;
    mov.u32 %r1, %ntid.x;
    mov.u32 %r2, %tid.x;
    mad.lo.u32 %r3, %r0, %r1, %r2;
    ld.param.u32 %r4, [n];
    setp.ge.u32 %p, %r3, %r4;
    @%p bra done;
    ld.param.u64 %d0, [x];
    ld.param.u64 %d1, [table];
    ld.param.u64 %d2, [y];
    mul.wide.u32 %d3, %r3, 4;
    add.u64 %d4, %d0, %d3;
    add.u64 %d5, %d1, %d3;
    add.u64 %d6, %d2, %d3;
    ld.global.f32 %f0, [%d4];
    ld.global.f32 %f1, [%d5];
    ld.param.f32 %f2, [a];
    fma.rn.f32 %f3, %f2, %f0, %f1;
    st.global.f32 [%d6], %f3;
done:
    ret;
}

// y reversed, through the end of dynamic shared memory of `bytes` bytes; one block.
.visible .entry reverse(.param .u64 y, .param .u32 bytes) {
    .reg .b32 %r<9>;
    .reg .b64 %d<4>;
    mov.u32 %r0, %tid.x;
    mov.u32 %r1, %ntid.x;
    ld.param.u64 %d0, [y];
    mul.wide.u32 %d1, %r0, 4;
    add.u64 %d2, %d0, %d1;
    ld.global.u32 %r2, [%d2];
    ld.param.u32 %r3, [bytes];
    mov.u32 %r4, room;
    add.u32 %r4, %r4, %r3;
    shl.b32 %r5, %r1, 2;
    sub.u32 %r4, %r4, %r5;
    shl.b32 %r6, %r0, 2;
    add.u32 %r6, %r4, %r6;
    st.shared.u32 [%r6], %r2;
    bar.sync 0;
    add.u32 %r4, %r4, %r5;
    sub.u32 %r4, %r4, 4;
    shl.b32 %r6, %r0, 2;
    sub.u32 %r6, %r4, %r6;
    ld.shared.u32 %r7, [%r6];
    st.global.u32 [%d2], %r7;
    ret;
}

// Writes where nobody may.
.visible .entry wild() {
    .reg .b64 %d0;
    mov.u64 %d0, 64;
    st.global.u32 [%d0], 1;
    ret;
}
";

fn kernels(gpu: &Gpu) -> [Kernel; 3] {
    gpu.load("hand.ptx", PTX, &["combine", "reverse", "wild"]).unwrap().try_into().unwrap()
}

fn upload(gpu: &Gpu, x: &[f32]) -> Ptr {
    let ptr = gpu.alloc(4 * x.len()).unwrap();
    gpu.write(ptr, bytemuck::cast_slice(x)).unwrap();
    ptr
}

fn download(gpu: &Gpu, ptr: Ptr, n: usize) -> Vec<f32> {
    let mut x = vec![0.0; n];
    gpu.read(ptr, bytemuck::cast_slice_mut(&mut x)).unwrap();
    x
}

/// y = a x + table on n numbers.
fn combine(gpu: &Gpu, kernel: Kernel, [x, table, y]: [Ptr; 3], n: usize, a: f32) {
    let args = [x.into(), table.into(), y.into(), n.into(), a.into()];
    gpu.launch(kernel, &Launch::linear(n.div_ceil(64), 64), &args).unwrap();
}

// ----------------------------------------------------------------------------------------------- the virtual driver

/// A program that finds its libraries in `dir` first.
fn with_libraries(program: &Path, dir: &Path) -> Command {
    let mut path = vec![dir.to_owned()];
    path.extend(std::env::var_os("LD_LIBRARY_PATH").iter().flat_map(std::env::split_paths));
    let mut command = Command::new(program);
    command.env("LD_LIBRARY_PATH", std::env::join_paths(path).unwrap());
    for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("VCUDA_")) {
        command.env_remove(name);
    }
    command
}

/// Runs tests of this program on the virtual driver with `settings`; returns how many, and standard error.
#[track_caller]
fn under(settings: &[(&str, &str)], arguments: &[&str]) -> (usize, String) {
    let dir = virtual_driver_folder();
    let mut command = with_libraries(&std::env::current_exe().unwrap(), dir.path());
    let run = command.args(arguments).envs(settings.iter().copied()).output().unwrap();
    let (out, err) = (String::from_utf8_lossy(&run.stdout), String::from_utf8_lossy(&run.stderr));
    assert!(run.status.success(), "{arguments:?} with {settings:?}:\n{out}{err}");
    assert!(!err.contains("skipped"), "{err}");
    let passed = out.split("test result: ok. ").nth(1).and_then(|rest| rest.split(' ').next()).unwrap();
    (passed.parse().unwrap(), err.into_owned())
}

/// The path of this module's tests.
fn here() -> &'static str {
    module_path!().split_once("::").unwrap().1
}

#[test]
fn the_driver_is_used_as_it_may_be() {
    let (passed, said) = under(&[], &[&format!("{}::on_gpu::", here())]);
    let source = std::fs::read_to_string(checkout().join("tests/suite/device/on_gpu.rs")).unwrap();
    assert_eq!(passed, source.matches("#[test]").count());
    // What the tests do on purpose, and nothing about leaks.
    let unexpected: Vec<&str> =
        said.lines().filter(|line| line.starts_with("vcuda: ") && !line.contains("70000")).collect();
    assert!(unexpected.is_empty(), "{unexpected:?}");
}

#[test]
fn the_kernels_run_through_the_driver() {
    if !crate::kernels::compiled() {
        return;
    }
    let run = |settings: &[(&str, &str)], tests: &[&str]| {
        assert_eq!(under(settings, &[&["--exact"], tests].concat()).0, tests.len(), "{settings:?}");
    };
    let tests =
        ["kernels::rows::rows_move_where_they_belong", "engine::decode_steps_are_replayed_while_streams_end"];
    run(&[], &tests);
    // Copies in streams of their own, which come as late as they may.
    let tests = [
        "offload::updates_have_the_same_bits_wherever_the_state_lies",
        "offload::buffers_are_nobody_elses_while_they_are_used",
        "offload::a_step_on_a_gpu_has_the_same_bits_with_its_state_on_the_host",
        "offload::per_layer_embeddings_may_lie_on_the_host",
    ];
    run(&[], &tests);
    run(&[("VCUDA_STREAMS", "early")], &tests);
    // Kernels that begin before those ahead have ended.
    let tests =
        ["engine::a_step_on_a_gpu_is_the_cpus_within_bf16", "engine::decode_steps_are_replayed_on_a_gpu"];
    run(&[("VCUDA_CAPABILITY", "9.0")], &tests);
}

/// Every model that Transformers computed, by the driver's calls: log-probs, gradients, logits, hidden states and ten updates.
#[test]
fn the_goldens_hold_through_the_driver() {
    if !crate::kernels::compiled() {
        return;
    }
    let tests = [
        "goldens::log_probs_loss_and_every_gradient_on_the_kernels",
        "goldens::logits_and_hidden_states_on_the_kernels",
        "goldens::ten_updates_of_adamw_on_the_kernels",
    ];
    let passed = under(&[("KERNEL_TESTS", "gpu")], &[&["--exact"], &tests[..]].concat()).0;
    assert_eq!(passed, tests.len());
}

/// Whatever wait between the streams of copies and kernels is left out, the update is wrong, if copies come late or if they come
/// early.
#[test]
fn no_wait_between_streams_can_be_left_out() {
    if !crate::kernels::compiled() {
        return;
    }
    let dir = virtual_driver_folder();
    let passes = |forgotten: usize, streams: &str| {
        let mut command = with_libraries(&std::env::current_exe().unwrap(), dir.path());
        command.args(["--exact", "offload::a_small_update_on_a_gpu_is_streamed"]);
        command.env("VCUDA_STREAMS", streams).env("VCUDA_FORGOTTEN", forgotten.to_string());
        let run = command.output().unwrap();
        let said = String::from_utf8_lossy(&run.stderr).into_owned();
        assert!(!said.contains("skipped"), "{said}");
        run.status.success()
    };
    for streams in ["late", "early"] {
        assert!(passes(0, streams), "{streams}");
        assert!(passes(8, streams), "there are seven");
    }
    for forgotten in 1..=7 {
        assert!(!passes(forgotten, "late") || !passes(forgotten, "early"), "wait {forgotten}");
    }
}

#[test]
fn devices_tells_what_there_is() {
    let program = program();
    let tell = |dir: &Path, settings: &[(&str, &str)]| {
        let run =
            with_libraries(&program, dir).arg("devices").envs(settings.iter().copied()).output().unwrap();
        assert!(run.status.success());
        String::from_utf8(run.stdout).unwrap()
    };
    if !crate::kernels::compiled() {
        let empty = tempfile::tempdir().unwrap();
        assert!(tell(empty.path(), &[]).contains("\ncuda    none: this program was built without nvcc"));
        return;
    }
    let dir = virtual_driver_folder();
    let told = tell(dir.path(), &[("VCUDA_DEVICES", "2"), ("VCUDA_CAPABILITY", "9.0")]);
    let gpu = "vcuda (a virtual GPU on the CPU), 16.0 GiB, compute capability 9.0, driver of CUDA 12.4\n";
    assert!(told.contains(&format!("\ncuda:0  {gpu}cuda:1  {gpu}vm      ")), "{told}");
    assert!(
        tell(dir.path(), &[("VCUDA_CAPABILITY", "7.5")]).contains("CUDA 12.4; too old: the kernels need")
    );
    assert!(
        tell(dir.path(), &[("VCUDA_DEVICES", "0")]).contains("\ncuda    none: cannot start the CUDA driver")
    );
}

#[test]
fn a_gpu_is_used_where_there_is_one() {
    let f = Fixture::for_kernels();
    let sample =
        ["sample", "--model", "model", "--prompt", "1+1=", "--max-new-tokens", "2", "--dtype", "bf16"];
    let dir = virtual_driver_folder();
    let run = |settings: &[(&str, &str)]| {
        let mut command = with_libraries(&program(), dir.path());
        Ran::of(command.args(sample).current_dir(f.root()).envs(settings.iter().copied()))
    };
    let cpu = f.succeed(&[&sample[..], &["--device", "cpu"]].concat());
    // Where there is a driver and no GPU is used, a line says why, and the CPU computes.
    let mut machines = vec![
        (("VCUDA_DEVICES", "0"), "cannot start the CUDA driver: "),
        (("VCUDA_CAPABILITY", "7.5"), "none has compute capability 8.0"),
    ];
    if crate::kernels::compiled() {
        machines.push((("VCUDA_VERSION", "11.2"), ", and this driver knows CUDA 11.2; install a driver"));
        let used = run(&[]);
        assert!(used.code == Some(0) && !used.stderr.contains("on the CPU, not"), "{used:?}");
        let failed = run(&[("VCUDA_FAULT", "lm_head_sample_merge")]);
        assert!(
            failed.code == Some(1) && failed.stderr.contains("lm_head_sample_merge with grid"),
            "{failed:?}"
        );
    } else {
        machines = vec![(("VCUDA_DEVICES", "1"), "this program was built without nvcc")];
    }
    for (setting, why) in machines {
        let ran = run(&[setting]);
        assert_eq!((ran.code, &ran.stdout), (Some(0), &cpu.stdout), "{setting:?}: {ran:?}");
        let told = ran.stderr.split_once("note: computing on the CPU, not on a GPU: ").map(|(_, told)| told);
        assert!(told.is_some_and(|told| told.contains(why)), "{setting:?}: {ran:?}");
    }
}

#[test]
fn kernels_tells_what_the_driver_makes_of_them() {
    if !crate::kernels::compiled() {
        return;
    }
    let dir = virtual_driver_folder();
    let tell = |more: &[&str]| {
        let mut command = with_libraries(&program(), dir.path());
        let run = command
            .args(["kernels", "--device", "cuda"])
            .args(more)
            .env("VCUDA_CAPABILITY", "9.0")
            .output()
            .unwrap();
        assert!(run.status.success(), "{run:?}");
        String::from_utf8(run.stdout).unwrap()
    };
    let gather = ["--op", "gather_rows", "--shape", "270m"];
    let text = tell(&gather);
    assert!(text.starts_with("cuda:0 (vcuda (a virtual GPU on the CPU)), 132 multiprocessors\n"), "{text}");
    let json: serde_json::Value = serde_json::from_str(&tell(&[&gather[..], &["--json"]].concat())).unwrap();
    let code = &json["resources"][0]["code"];
    assert_eq!((&json["resources"][0]["kernel"], code), (&"gather_rows".into(), &serde_json::json!([9, 0])));
    let launch = &json["launches"][0];
    let (grid, block) = (launch["grid"][0].as_u64().unwrap(), launch["block"][0].as_u64().unwrap());
    // The launch asks for no shared memory: threads or blocks are what a multiprocessor has no more of.
    let at_once = (2048 / block).min(32);
    assert_eq!(launch["blocks_per_multiprocessor"], at_once);
    let line = format!(
        "  gather_rows: {grid} blocks of {block} with 0 bytes of dynamic shared memory, {at_once} to a \
         multiprocessor: {:.2} waves\n",
        grid as f64 / (132 * at_once) as f64
    );
    assert!(text.ends_with(&line), "{text}");
    // Every kernel, and nothing is run.
    let all: serde_json::Value = serde_json::from_str(&tell(&["--json", "--resources"])).unwrap();
    let entries: usize = bon_engine::backend::cuda::entries::MODULES.iter().map(|m| m.entries.len()).sum();
    assert_eq!(all["resources"].as_array().unwrap().len(), entries);
    assert_eq!(all["launches"].as_array().unwrap().len(), 0);
}

#[test]
fn without_a_driver_the_next_step_is_told() {
    match Gpu::open(0) {
        Ok(gpu) => {
            assert!(gpu.name().starts_with("cuda:0 ("), "{}", gpu.name());
            assert_eq!(gpu.model(), gpu.name().replacen("cuda:0", "cuda", 1));
        }
        Err(e) => assert!(e.message.contains("--device cpu"), "{e}"),
    }
}

// --------------------------------------------------------------------------------------------------- what is built in

#[test]
fn machine_code_is_chosen_by_generation() {
    let cubins =
        [(8, 0), (8, 6), (9, 0), (10, 0)].map(|capability| Cubin { capability, cuda: (13, 2), image: &[] });
    let chosen = |capability, driver| Cubin::fitting(&cubins, capability, driver).map(|c| c.capability);
    for (capability, want) in [
        ((8, 0), Some((8, 0))),
        ((8, 6), Some((8, 6))),
        ((8, 9), Some((8, 6))),
        ((9, 0), Some((9, 0))),
        ((10, 3), Some((10, 0))),
        ((7, 5), None),
        ((12, 0), None),
    ] {
        assert_eq!(chosen(capability, (13, 0)), want, "{capability:?}");
        assert_eq!(chosen(capability, (12, 9)), None, "{capability:?}");
        assert_eq!(chosen(capability, (14, 1)), want, "{capability:?}");
    }
}

/// A virtual GPU that says it has machine code of all modules but some.
struct Ready(Vm, &'static [&'static str]);

impl Device for Ready {
    delegate_device!(self, self.0; name, multiprocessors, alloc, free, write, read, fill, launch, synchronize);

    fn load(&self, name: &str, ptx: &str, entries: &[&str]) -> Result<Vec<Kernel>, DeviceError> {
        assert!(self.1.contains(&name), "{name} is compiled");
        self.0.load(name, ptx, entries)
    }

    fn load_cubin(
        &self,
        name: &str,
        _: &[Cubin],
        entries: &[&str],
    ) -> Result<Option<Vec<Kernel>>, DeviceError> {
        let ptx = name.replace(".cubin", ".ptx");
        let module = MODULES.iter().find(|module| name == format!("{}.cubin", module.name)).unwrap();
        (!self.1.contains(&&*ptx)).then(|| self.0.load(&ptx, module.ptx.unwrap(), entries)).transpose()
    }
}

#[test]
fn only_what_has_no_machine_code_is_compiled() {
    if !crate::kernels::compiled() {
        return;
    }
    for missing in [&[][..], &["geglu.ptx", "rows.ptx"]] {
        let mut told = 0;
        let ready = Ready(Vm::new(Options::default()), missing);
        let cuda = Cuda::loading(Box::new(ready), || told += 1).unwrap();
        assert_eq!(told, usize::from(!missing.is_empty()));
        // Every kernel has its place, whatever it was loaded from.
        let x: Vec<f32> = (0..64).map(|i| i as f32).collect();
        let x = cuda.upload(DType::F32, 8, 8, bytemuck::cast_slice(&x));
        assert_eq!(cuda.sum_squares(&[&x]), [(0..64).map(|i| f64::from(i * i)).sum::<f64>()]);
    }
}

#[test]
fn older_drivers_take_the_kernels() {
    use bon_engine::backend::cuda::entries::{MODULES, PTX_VERSION};
    use bon_engine::cost::figures::ptxas;
    if !crate::kernels::compiled() {
        return;
    }
    let mut refused = String::new();
    let dir = tempfile::tempdir().unwrap();
    for module in MODULES {
        let ptx = module.ptx.unwrap();
        let version = ptx.lines().find_map(|line| line.strip_prefix(".version ")).unwrap();
        let (major, minor) = version.split_once('.').unwrap();
        let version = (major.parse::<u32>().unwrap(), minor.parse::<u32>().unwrap());
        assert!(version <= PTX_VERSION, "{}.ptx is of version {version:?}", module.name);
        // No optimisation: only whether it may be of this version is asked.
        let Some(ptxas) = ptxas() else { continue };
        let path = dir.path().join(format!("{}.ptx", module.name));
        std::fs::write(&path, ptx).unwrap();
        let out = dir.path().join("out");
        let run = Command::new(ptxas).args(["-O0", "-arch=sm_80", "-o"]).arg(out).arg(path).output().unwrap();
        if !run.status.success() {
            write!(refused, "{}: {}", module.name, String::from_utf8_lossy(&run.stderr)).unwrap();
        }
    }
    assert!(refused.is_empty(), "{refused}");
}
