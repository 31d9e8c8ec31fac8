//! nvcc, and this library where programs find it.

use std::collections::hash_map::DefaultHasher;
use std::fs;
use std::hash::{Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::LazyLock;

fn run(command: &mut Command, what: &str) -> String {
    let out = command.output().unwrap_or_else(|e| panic!("{what}: {e}"));
    let (stdout, stderr) = (String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
    assert!(out.status.success(), "{what} failed:\n{stdout}{stderr}");
    stdout.trim().to_owned()
}

/// The crate's folder.
pub(crate) fn crate_folder() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// The path of nvcc, fetched if need be. Without one the tests fail, with the script's message.
pub(crate) fn nvcc() -> &'static Path {
    static NVCC: LazyLock<PathBuf> = LazyLock::new(|| {
        let script = crate_folder().join("../install-nvcc.sh");
        PathBuf::from(run(&mut Command::new(script), "install-nvcc.sh"))
    });
    &NVCC
}

/// A folder with the runtime, as install.sh makes it. It stays, and every run of the tests makes it anew.
pub(crate) fn runtime() -> &'static Path {
    static RUNTIME: LazyLock<PathBuf> = LazyLock::new(|| {
        let library = std::env::current_exe().unwrap().with_file_name("libvcudart.so");
        assert!(library.is_file(), "no {}", library.display());
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("vcudart");
        let mut install = Command::new(crate_folder().join("install.sh"));
        run(install.arg(&folder).arg(&library), "install.sh");
        folder
    });
    &RUNTIME
}

/// A folder to link with: NVIDIA's own runtime, where the compiler has it, so that programs are what they are elsewhere.
fn link_folder() -> &'static Path {
    static FOLDER: LazyLock<PathBuf> = LazyLock::new(|| {
        let theirs = nvcc().parent().unwrap().join("../lib/libcudart.so.13");
        if !theirs.is_file() {
            return runtime().to_owned();
        }
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("nvidia-runtime");
        let _ = fs::remove_dir_all(&folder);
        fs::create_dir_all(&folder).unwrap();
        std::os::unix::fs::symlink(theirs.canonicalize().unwrap(), folder.join("libcudart.so")).unwrap();
        folder
    });
    &FOLDER
}

/// Builds tests/programs/`name`.cu with `options`; what was built is kept for the next run.
pub(crate) fn build(name: &str, options: &[&str]) -> PathBuf {
    static VERSION: LazyLock<String> =
        LazyLock::new(|| run(Command::new(nvcc()).arg("--version"), "nvcc --version"));
    let folder = crate_folder().join("tests/programs");
    let text = fs::read(folder.join(format!("{name}.cu"))).unwrap();
    let mut hasher = DefaultHasher::new();
    (name, &text, options, &*VERSION, link_folder()).hash(&mut hasher);
    let kept = Path::new(env!("CARGO_TARGET_TMPDIR")).join("programs");
    fs::create_dir_all(&kept).unwrap();
    let program = kept.join(format!("{name}.{:016x}", hasher.finish()));
    if !program.is_file() {
        let fresh =
            program.with_extension(format!("{:?}", std::thread::current().id()).replace(['(', ')'], "-"));
        let mut nvcc = Command::new(nvcc());
        // Findings name the file as the compiler was told it.
        nvcc.current_dir(&folder).args(["-cudart", "shared", "-std=c++17", "-lineinfo"]);
        if !options.iter().any(|option| option.contains("compute_") || option.contains("sm_")) {
            nvcc.arg("-arch=sm_80");
        }
        nvcc.args(options).arg(format!("{name}.cu")).arg("-L").arg(link_folder()).arg("-o").arg(&fresh);
        run(&mut nvcc, &format!("nvcc on {name}.cu"));
        fs::rename(&fresh, &program).unwrap();
    }
    program
}

/// How a program ended, and what it said.
#[derive(Debug)]
pub(crate) struct Ran {
    pub(crate) code: Option<i32>,
    pub(crate) out: String,
    pub(crate) err: String,
}

/// Runs a program with the runtime.
pub(crate) fn start(program: &Path, settings: &[(&str, &str)]) -> Ran {
    let mut command = Command::new(program);
    for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("VCUDA_")) {
        command.env_remove(name);
    }
    command.env_remove("CUDA_LAUNCH_BLOCKING").env("LD_LIBRARY_PATH", runtime());
    let out = command.envs(settings.iter().copied()).output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    Ran { code: out.status.code(), out: text(&out.stdout), err: text(&out.stderr) }
}
