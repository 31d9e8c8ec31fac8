//! The kit for a machine with a GPU (`tools/gpu_kit`): its script on the virtual GPU, on a machine that has nothing but
//! bash and coreutils, and with binaries that lie. And the bits of wgmma, for the GPUs that have it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::OnceLock;

use bon_engine::device::driver::Gpu;
use bon_engine::device::{Device, Launch};
use half::bf16;

use crate::ops::randoms;
use crate::places::{checkout, program, virtual_driver};

/// What the script may call: bash, and programs of coreutils.
const PROGRAMS: [&str; 14] = [
    "bash", "cat", "df", "dirname", "env", "head", "mkdir", "nproc", "sleep", "stat", "tail", "timeout",
    "tr", "uname",
];

/// Links to some programs of this machine.
fn programs(folder: &Path, names: &[&str]) {
    let path = std::env::var_os("PATH").unwrap();
    for name in names {
        let found = std::env::split_paths(&path).map(|dir| dir.join(name)).find(|path| path.is_file());
        let found = found.unwrap_or_else(|| panic!("this machine has no {name}"));
        std::os::unix::fs::symlink(found, folder.join(name)).unwrap();
    }
}

/// A machine: an empty folder to work in, and a PATH.
struct Machine {
    dir: tempfile::TempDir,
}

impl Machine {
    fn new() -> Self {
        let machine = Self { dir: tempfile::tempdir().unwrap() };
        ["bin", "work"].iter().for_each(|name| fs::create_dir(machine.path(name)).unwrap());
        programs(&machine.path("bin"), &PROGRAMS);
        machine
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// An executable script of bash.
    fn script(&self, path: &Path, text: &str) {
        // Another process writes it: a file cannot be run that this one, or what it forks meanwhile, may still write.
        let text = format!("#!{}\n{text}\n", self.path("bin/bash").display());
        let write = "printf '%s' \"$1\" >\"$2\" && chmod +x \"$2\"";
        let wrote = Command::new("sh").args(["-c", write, "sh", &text]).arg(path).status().unwrap();
        assert!(wrote.success());
    }

    fn run(&self, kit: &Path, args: &[&str], settings: &[(&str, &str)]) -> Ran {
        let mut command = Command::new(kit.join("run.sh"));
        command.args(args).current_dir(self.path("work")).env_clear().env("PATH", self.path("bin"));
        let Output { status, stdout, stderr } = command.envs(settings.iter().copied()).output().unwrap();
        let report = args.last().map(|out| self.path("work").join(out).join("report.txt"));
        let report = report.and_then(|path| fs::read(path).ok()).unwrap_or_default();
        assert!(report.len() <= 1_000_000, "a report of {} bytes", report.len());
        Ran {
            code: status.code().unwrap(),
            out: String::from_utf8(stdout).unwrap(),
            err: String::from_utf8(stderr).unwrap(),
            report: String::from_utf8_lossy(&report).into_owned(),
        }
    }
}

/// What a run of the script left.
#[derive(Debug)]
struct Ran {
    code: i32,
    out: String,
    err: String,
    report: String,
}

impl Ran {
    /// Verdict and what is said of every step, in the report's summary.
    fn summary(&self) -> Vec<(String, String, String)> {
        let (_, summary) = self.report.rsplit_once("==== summary: ").unwrap_or_else(|| panic!("{self:?}"));
        let lines: Vec<&str> = summary.lines().skip(1).collect();
        let (_, steps) = lines.split_last().unwrap();
        let split = |line: &&str| {
            // Steps that are part of another are set in.
            let name = line[8..30].trim_end().to_owned();
            (line[..7].trim_end().to_owned(), name, line.split_once(" s  ").unwrap().1.to_owned())
        };
        steps.iter().map(split).collect()
    }

    /// Steps with this verdict.
    fn steps(&self, verdict: &str) -> Vec<String> {
        self.summary().into_iter().filter(|(v, ..)| v == verdict).map(|(_, name, _)| name).collect()
    }

    /// What is said of a step.
    fn said(&self, step: &str) -> String {
        let found = self.summary().into_iter().find(|(_, name, _)| name == step);
        found.unwrap_or_else(|| panic!("no step {step}: {self:?}")).2
    }
}

/// The kit of this build, put together once, by links.
fn kit() -> &'static Path {
    static KIT: OnceLock<tempfile::TempDir> = OnceLock::new();
    let make = || {
        let dir = tempfile::tempdir().unwrap();
        let made = Command::new(checkout().join("tools/gpu_kit/assemble.sh"))
            .arg("--link")
            .arg(dir.path().join("kit"))
            .args([program(), std::env::current_exe().unwrap(), virtual_driver()])
            .output()
            .unwrap();
        assert!(made.status.success(), "{made:?}");
        dir
    };
    Box::leak(KIT.get_or_init(make).path().join("kit").into_boxed_path())
}

/// Every op has a step.
fn ops() -> Vec<String> {
    let stems = |folder: &str, ending: &str| -> Vec<String> {
        let paths = fs::read_dir(checkout().join(folder)).unwrap().map(|entry| entry.unwrap().path());
        let those = paths.filter(|path| path.extension().is_some_and(|e| e == ending));
        those.map(|path| path.file_stem().unwrap().to_str().unwrap().to_owned()).collect()
    };
    let mut ops = stems("kernels", "cu");
    // What several kernels have in common has a file of tests, too.
    ops.extend(
        stems("tests/suite/kernels", "rs").into_iter().filter(|name| name != "mod" && name != "resources"),
    );
    ops.sort();
    ops.dedup();
    ops.into_iter().map(|op| format!("10-{op}")).collect()
}

#[test]
fn the_kit_is_green_on_the_virtual_gpu() {
    if !crate::kernels::compiled() {
        return;
    }
    let machine = Machine::new();
    let ran = machine.run(kit(), &["--virtual", "right", "out"], &[]);
    assert_eq!((ran.code, ran.err.as_str()), (0, ""), "{ran:?}");
    assert!(ran.out.contains("all passed, nothing was skipped; the report is "), "{}", ran.out);
    let mut passed = ran.steps("ok");
    let mut expected: Vec<String> =
        ["00-machine", "01-devices", "02-driver", "03-compile", "20-step", "21-replay", "22-async"]
            .map(String::from)
            .into();
    expected.extend(ops());
    passed.sort();
    expected.sort();
    assert_eq!(passed, expected);
    // Only a GPU of capability 9.0 has wgmma.
    assert_eq!(ran.steps("none"), ["30-wgmma"]);
    assert_eq!(ran.summary().len(), expected.len() + 1);
    // Nothing was left where it ran but the report and the logs.
    let left: Vec<_> = fs::read_dir(machine.path("work")).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(left, ["out"]);
    let log = fs::read_to_string(machine.path("work/out/03-compile.log")).unwrap();
    assert!(log.contains("\nadamw ") && log.contains(" sm_80\n"), "{log}");
}

#[test]
fn a_kernel_that_fails_turns_its_own_step_red_and_is_named() {
    if !crate::kernels::compiled() {
        return;
    }
    // No other step runs it.
    const KERNEL: &str = "attention_backward_keys_256";
    let machine = Machine::new();
    let ran = machine.run(kit(), &["--virtual", "right", "out"], &[("VCUDA_FAULT", KERNEL)]);
    assert_eq!(ran.code, 1, "{ran:?}");
    assert!(ran.out.contains("not all passed; the report is "), "{}", ran.out);
    let failed = ran.steps("FAILED");
    assert_eq!(
        failed.iter().filter(|step| !step.starts_with(' ')).collect::<Vec<_>>(),
        ["10-attention_backward"]
    );
    let said = ran.said("10-attention_backward");
    assert!(said.contains(&format!("cannot launch {KERNEL} with grid [")), "{said}");
    assert!(said.contains("CUDA_ERROR_ILLEGAL_ADDRESS"), "{said}");
    // By themselves those tests pass that do without it, and the others are named.
    let alone = failed.iter().filter(|step| step.starts_with(' ')).count();
    let tests = ran.report.matches("==== 10-attention_backward.apart.log\n").count();
    assert!((1..tests).contains(&alone), "{alone} of {tests} tests fail by themselves");
    let mut others = ops();
    others.retain(|op| op != "10-attention_backward");
    assert!(others.iter().all(|op| ran.steps("ok").contains(op)), "{ran:?}");
}

#[test]
fn what_cannot_be_asked_is_refused_in_one_sentence() {
    if !crate::kernels::compiled() {
        return;
    }
    let machine = Machine::new();
    let refused = |args: &[&str], settings: &[(&str, &str)]| {
        let ran = machine.run(kit(), args, settings);
        assert_eq!((ran.code, ran.out.as_str()), (2, ""), "{args:?}: {ran:?}");
        let sentence = ran.err.strip_prefix("run.sh: error: ").unwrap_or_else(|| panic!("{ran:?}"));
        assert_eq!(sentence.lines().count(), 1, "{ran:?}");
        sentence.to_owned()
    };
    for args in
        [&[][..], &["right"], &["--virtual"], &["left", "out"], &["right", "out", "more"], &["--help"]]
    {
        assert_eq!(refused(args, &[]), "usage: ./run.sh [--virtual] right|fast OUT\n");
    }
    assert!(refused(&["--virtual", "fast", "out"], &[]).contains("no speed to measure"));
    fs::write(machine.path("work/file"), "").unwrap();
    assert!(refused(&["--virtual", "right", "file"], &[]).contains("file cannot be made"));
    assert!(refused(&["--virtual", "right", "file/out"], &[]).contains("file/out cannot be made"));
    fs::create_dir_all(machine.path("work/taken/report.txt")).unwrap();
    assert!(refused(&["--virtual", "right", "taken"], &[]).contains("report.txt cannot be written"));

    let none = refused(&["--virtual", "right", "out"], &[("VCUDA_DEVICES", "0")]);
    assert!(none.starts_with("there is no GPU to ask: cannot start the CUDA driver: "), "{none}");
    let old = refused(&["--virtual", "right", "out"], &[("VCUDA_CAPABILITY", "7.5")]);
    assert!(old.contains("too old"), "{old}");
    let vcuda = kit().join("vcuda");
    let mistaken = refused(&["right", "out"], &[("LD_LIBRARY_PATH", vcuda.to_str().unwrap())]);
    assert!(mistaken.contains("is the virtual one"), "{mistaken}");
    if Gpu::open(0).is_err_and(|e| e.message.starts_with("no CUDA driver")) {
        let none = refused(&["right", "out"], &[]);
        assert!(
            none.starts_with("there is no GPU to ask: no CUDA driver: libcuda.so.1 is not on this machine")
        );
    }
}

/// A kit whose binaries are scripts: `main` says of every step what it is told to.
fn invented(machine: &Machine, main: &str) -> PathBuf {
    let kit = machine.path("kit");
    fs::create_dir_all(kit.join("benches")).unwrap();
    let _ = std::os::unix::fs::symlink(checkout().join("tools/gpu_kit/run.sh"), kit.join("run.sh"));
    let devices = "echo 'cpu     AVX2'; echo 'cuda:0  NVIDIA H100, 80.0 GiB, compute capability 9.0, driver of CUDA 13.0'";
    machine.script(&kit.join("bon-engine"), devices);
    machine.script(&kit.join("main"), main);
    kit
}

const PASSED: &str = "echo 'test result: ok. 3 passed; 0 failed; 0 ignored; 0 measured; 9 filtered out'";

#[test]
fn what_was_not_asked_is_no_success() {
    let machine = Machine::new();
    let right = |main: &str| machine.run(&invented(&machine, main), &["right", "out"], &[]);
    let ran = right(PASSED);
    assert_eq!((ran.code, ran.steps("ok").len()), (0, 2 + 1 + 1 + 11 + 4), "{ran:?}");

    let ran = right(&format!(
        "[[ $1 != kernels::rope:: ]] || echo 'skipped: 2 checks that need a GPU' >&2; {PASSED}"
    ));
    assert_eq!((ran.code, ran.steps("SKIPPED")), (1, vec!["10-rope".to_owned()]));
    assert_eq!(ran.said("10-rope"), "2 checks that need a GPU; ");

    let other = "echo 'test result: ok. 0 passed; 0 failed; 0 ignored; 0 measured; 9 filtered out'";
    let ran = right(&format!("if [[ $1 == kernels::rope:: ]]; then {other}; else {PASSED}; fi"));
    assert_eq!((ran.code, ran.steps("SKIPPED")), (1, vec!["10-rope".to_owned()]));

    let other = "echo 'test result: ok. 1 passed; 0 failed; 2 ignored; 0 measured; 9 filtered out'";
    let ran = right(&format!("if [[ $1 == kernels::rope:: ]]; then {other}; else {PASSED}; fi"));
    assert_eq!((ran.code, ran.steps("SKIPPED")), (1, vec!["10-rope".to_owned()]));

    // The GPU is one that has wgmma.
    let other = format!("echo 'skipped: 1 checks that need WGMMA_BITS' >&2; {PASSED}");
    let ran = right(&format!("if [[ $2 == gpu_kit::bits_of_wgmma ]]; then {other}; else {PASSED}; fi"));
    assert_eq!((ran.code, ran.steps("SKIPPED")), (1, vec!["30-wgmma".to_owned()]));

    // A step that dies, with more words than a report holds; what it ran is run by itself, and the rest goes on.
    let list = "echo 'kernels::rope::good: test'; echo 'kernels::rope::bad: test'";
    let dies = "for i in {1..6000}; do echo 'many words that nobody reads in the end'; done; \
                echo \"thread 'x' panicked at a.rs:1:2:\"; echo 'cannot launch rope with grid [1, 1, 1]'; kill -9 $$";
    let ran = right(&format!(
        "case \"$*\" in *--list*) {list} ;; kernels::rope::\\ *|*bad*) {dies} ;; *) {PASSED} ;; esac"
    ));
    assert_eq!(ran.code, 1);
    assert_eq!(ran.steps("FAILED"), ["10-rope", "  by itself"]);
    assert_eq!(ran.said("10-rope"), "cannot launch rope with grid [1, 1, 1]");
    assert_eq!(ran.said("  by itself"), "kernels::rope::bad: cannot launch rope with grid [1, 1, 1]");
    assert!(ran.report.contains("the middle is left out: see 10-rope.log"));
    let again = fs::read_to_string(machine.path("work/out/22-async.log")).unwrap();
    assert!(again.starts_with("test result"), "{again}");
    assert!(ran.report.contains("--skip kernels::resources:: --skip kernels::rope:: --test-threads 16\n"));
}

#[test]
fn the_fast_stage_takes_what_the_machine_has() {
    let machine = Machine::new();
    let kit = invented(&machine, PASSED);
    // Nothing to ask the GPU with.
    let ran = machine.run(&kit, &["fast", "out"], &[]);
    assert_eq!((ran.code, ran.steps("ok")), (1, vec!["00-machine".to_owned()]), "{ran:?}");
    assert_eq!(ran.steps("none").len() + 1, ran.summary().len());
    assert!(ran.out.contains("the GPU was not asked"), "{}", ran.out);

    let engine = "[[ $2 != --output ]] || echo \"$*\" >\"$3\"; echo \"decode 1.00 ms $2 ${BON_GPU_DEPENDENT_LAUNCH-}\"";
    machine.script(&kit.join("benches/engine"), engine);
    machine.script(&kit.join("benches/kernels"), "echo \"$* $CRITERION_HOME\"");
    machine.script(&kit.join("benches/other"), "echo \"$*\"");
    let ran = machine.run(&kit, &["fast", "out"], &[]);
    assert_eq!((ran.code, ran.err.as_str()), (0, ""), "{ran:?}");
    assert_eq!(
        ran.steps("ok"),
        ["00-machine", "10-engine", "11-engine-late", "20-kernels-2b", "21-kernels-270m", "25-other"]
    );
    assert_eq!(ran.steps("none"), ["30-torch", "40-ncu", "50-sanitizer"]);
    let out = fs::canonicalize(machine.path("work/out")).unwrap();
    let json = out.join("engine.json");
    let asked = fs::read_to_string(&json).unwrap();
    assert_eq!(asked, format!("--bench --output {}\n", json.display()));
    assert_eq!(ran.said("11-engine-late"), "decode 1.00 ms Gemma 3 270M/decode 0");
    let times = format!("--bench --noplot ^Gemma 2B/ {}", out.join("criterion").display());
    assert_eq!(ran.said("20-kernels-2b"), times);

    // With PyTorch, a profiler that may not look, and a sanitizer that finds something.
    machine.script(&machine.path("bin/python3"), "[[ $1 == -c ]] || echo \"PyTorch: $2\"");
    machine.script(&machine.path("bin/ncu"), "echo '==ERROR== ERR_NVGPUCTRPERM'; exit 1");
    let sanitizer = "echo \"$BON_GPU_EXACT_ALLOC\"; [[ $2 == memcheck ]] || { echo '==== ERROR SUMMARY: 3 errors'; exit 9; }";
    machine.script(&machine.path("bin/compute-sanitizer"), sanitizer);
    let ran = machine.run(&kit, &["fast", "out"], &[]);
    assert_eq!((ran.code, ran.steps("FAILED")), (1, vec!["50-racecheck".to_owned()]), "{ran:?}");
    assert_eq!(ran.said("50-racecheck"), "exit status 9: ==== ERROR SUMMARY: 3 errors");
    assert_eq!(
        (ran.said("30-torch-engine"), ran.said("50-memcheck")),
        ("PyTorch: --engine".into(), "1".into())
    );
    assert_eq!(ran.steps("none"), ["40-ncu"]);
}

/// What `make demo` does before it builds.
#[test]
fn make_looks_for_nvcc_where_there_is_a_driver() {
    let bin = tempfile::tempdir().unwrap();
    programs(bin.path(), &["bash", "cat", "dirname", "env", "make", "mkdir", "readlink"]);
    let driver = crate::places::virtual_driver_folder();
    let make = |path: &std::ffi::OsStr, libraries: &Path| {
        let mut command = Command::new("make");
        command.args(["--no-print-directory", "kernels-for-gpu"]).current_dir(checkout());
        let found = command.env_clear().env("PATH", path).env("LD_LIBRARY_PATH", libraries).output().unwrap();
        assert!(found.status.success() && found.stdout.is_empty(), "{found:?}");
        String::from_utf8(found.stderr).unwrap()
    };
    // A compiler that cannot run: the build goes on, for the CPU.
    let told = make(bin.path().as_os_str(), driver.path());
    assert!(told.starts_with("install-nvcc: error: nvcc needs a C++ compiler on this machine"), "{told}");
    assert!(told.ends_with("no nvcc for the kernels (see above): computing on the CPU\n"), "{told}");
    // A machine that has all there is, unless it would have to be fetched.
    let path = std::env::var_os("PATH").unwrap();
    if crate::kernels::compiled() {
        assert_eq!(make(&path, driver.path()), "");
    }
    if Gpu::open(0).is_err_and(|e| e.message.starts_with("no CUDA driver")) {
        assert_eq!(make(bin.path().as_os_str(), bin.path()), "");
    }
}

// ------------------------------------------------------------------------------------------------------------ wgmma

/// Rows of C, its columns, and k, of `tools/gpu_kit/wgmma_bits.cu`.
const SHAPE: (usize, usize, usize) = (64, 256, 2048);
const WIDTHS: [usize; 6] = [8, 16, 32, 64, 128, 256];

/// Numbers of one kind, all of them bf16.
fn inputs(kind: &str, seed: u32, n: usize) -> Vec<f32> {
    let (x, y) = (randoms(seed, n), randoms(seed + 1, n));
    let value = |(x, y): (&f32, &f32)| match kind {
        "uniform" => *x,
        // y is in (-1, 1).
        "sizes from 2^-20 to 2^20" => x * (20.0 * y).round().exp2(),
        _ => {
            if *y < 0.5 {
                0.0
            } else {
                *x
            }
        }
    };
    x.iter().zip(&y).map(value).map(|x| bf16::from_f32(x).to_f32()).collect()
}

/// Which widths of wgmma give mma.sync's bits: a measurement, whose outcome is told and is no failure. That both compute
/// the product is asserted.
#[test]
#[allow(clippy::print_stdout, reason = "the measurement is for people")]
fn bits_of_wgmma() {
    let Some(gpu) = crate::device::gpu() else { return };
    let capability = gpu.description().capability;
    if capability != (9, 0) {
        let (major, minor) = capability;
        crate::device::skipped(&format!(
            "need wgmma, of compute capability 9.0, and this GPU has {major}.{minor}"
        ));
        return;
    }
    let Some(path) = std::env::var_os("WGMMA_BITS") else {
        crate::device::skipped(
            "need the GPU kit, which sets WGMMA_BITS to the PTX of tools/gpu_kit/wgmma_bits.cu",
        );
        return;
    };
    let ptx = fs::read_to_string(path).unwrap();
    let names: Vec<String> = WIDTHS.iter().map(|n| format!("wgmma_n{n}")).collect();
    let entries: Vec<&str> = ["mma_sync"].into_iter().chain(names.iter().map(String::as_str)).collect();
    let kernels = gpu.load("wgmma_bits.ptx", &ptx, &entries).unwrap();
    let (rows, columns, k) = SHAPE;
    println!(
        "\n{:<28}{}",
        "of 1000 elements other bits",
        WIDTHS.map(|n| format!("{:>8}", format!("n{n}"))).concat()
    );
    let mut other = [0; WIDTHS.len()];
    for (seed, kind) in [(1, "uniform"), (3, "sizes from 2^-20 to 2^20"), (5, "half of them zero")] {
        let (a, b) = (inputs(kind, seed, rows * k), inputs(kind, seed + 100, columns * k));
        let upload = |x: &[f32]| {
            let x: Vec<bf16> = x.iter().map(|x| bf16::from_f32(*x)).collect();
            let ptr = gpu.alloc(2 * x.len()).unwrap();
            gpu.write(ptr, bytemuck::cast_slice(&x)).unwrap();
            ptr
        };
        let (on_a, on_b, on_c) = (upload(&a), upload(&b), gpu.alloc(4 * rows * columns).unwrap());
        let results: Vec<Vec<f32>> = kernels
            .iter()
            .map(|kernel| {
                gpu.fill(on_c, 0xff, 4 * rows * columns).unwrap();
                let args = [on_a.into(), on_b.into(), on_c.into(), k.into()];
                gpu.launch(*kernel, &Launch::linear(1, 128), &args).unwrap();
                let mut c = vec![0.0; rows * columns];
                gpu.read(on_c, bytemuck::cast_slice_mut(&mut c)).unwrap();
                c
            })
            .collect();
        [on_a, on_b, on_c].into_iter().for_each(|ptr| gpu.free(ptr));
        let mut line = format!("{kind:<28}");
        for (i, result) in results.iter().enumerate() {
            let width = if i == 0 { columns } else { WIDTHS[i - 1] };
            let mut differ = 0;
            for (row, a) in a.chunks_exact(k).enumerate() {
                for (column, b) in b.chunks_exact(k).take(width).enumerate() {
                    let products = || a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b));
                    let (sum, size) = (products().sum::<f64>(), products().map(f64::abs).sum::<f64>());
                    let got = result[row * columns + column];
                    // One rounding, or cut, of at most an eps of the whole for each of k.
                    let allowed = k as f64 * f64::from(f32::EPSILON) * size;
                    let name = entries[i];
                    assert!(
                        (f64::from(got) - sum).abs() <= allowed,
                        "{name}, {kind}: {got} for {sum} at {row}, {column}"
                    );
                    differ += usize::from(got.to_bits() != results[0][row * columns + column].to_bits());
                }
            }
            if i > 0 {
                line.push_str(&format!("{:>8}", (1000 * differ).div_ceil(rows * width)));
                other[i - 1] += differ;
            }
        }
        println!("{line}");
    }
    let told = WIDTHS
        .iter()
        .zip(other)
        .map(|(n, other)| format!("n{n} {}", if other == 0 { "the bits of mma.sync" } else { "OTHER BITS" }));
    println!("in short: {}", told.collect::<Vec<_>>().join(", "));
}
