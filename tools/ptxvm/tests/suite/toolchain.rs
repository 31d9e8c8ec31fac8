//! The CUDA compiler as the tests use it: `.cu` to PTX, each text seen and accepted by the real assembler.

use std::collections::HashMap;
use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, LazyLock, Mutex, OnceLock};

fn run(command: &mut Command, what: &str) -> String {
    let out = command.output().unwrap_or_else(|e| panic!("{what}: {e}"));
    let (stdout, stderr) = (String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
    assert!(out.status.success(), "{what} failed:\n{stdout}{stderr}");
    stdout.trim().to_owned()
}

/// The path of nvcc, fetched if need be. Without one the tests fail, with the script's message.
fn nvcc() -> &'static Path {
    static NVCC: LazyLock<PathBuf> = LazyLock::new(|| {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../install-nvcc.sh");
        PathBuf::from(run(&mut Command::new(script), "install-nvcc.sh"))
    });
    &NVCC
}

/// Has ptxas accept the file for `sm_<arch>`.
pub(crate) fn assemble(ptx: &Path, arch: &str) {
    let cubin = ptx.with_extension(format!("{}.cubin", std::process::id()));
    let mut ptxas = Command::new(nvcc().with_file_name("ptxas"));
    ptxas.arg(format!("-arch=sm_{arch}")).arg(ptx).arg("-o").arg(&cubin);
    run(&mut ptxas, &format!("ptxas on {}", ptx.display()));
    let _ = fs::remove_file(cubin);
}

/// The PTX of tests/kernels/`cu` for `compute_<arch>`, compiled with `extra`; kept under target/tmp for the next run.
pub(crate) fn ptx(cu: &str, arch: &str, extra: &[&str]) -> String {
    static VERSION: LazyLock<String> =
        LazyLock::new(|| run(Command::new(nvcc()).arg("--version"), "nvcc --version"));
    static DONE: Mutex<Option<HashMap<u64, Arc<OnceLock<String>>>>> = Mutex::new(None);

    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/kernels").join(cu);
    let text = fs::read(&source).unwrap_or_else(|e| panic!("{}: {e}", source.display()));
    let mut hasher = DefaultHasher::new();
    (cu, text, arch, extra, &*VERSION).hash(&mut hasher);
    let key = hasher.finish();
    // One compilation for each key, others wait for it alone.
    let cell = {
        let mut done = DONE.lock().unwrap_or_else(|e| e.into_inner());
        done.get_or_insert_default().entry(key).or_default().clone()
    };
    let compile = || {
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("ptx");
        fs::create_dir_all(&folder).unwrap();
        let kept = folder.join(format!("{}.{key:016x}.ptx", cu.replace('/', "_")));
        if let Ok(text) = fs::read_to_string(&kept) {
            return text;
        }
        let fresh = kept.with_extension(format!("{}.ptx", std::process::id()));
        let mut nvcc = Command::new(nvcc());
        nvcc.arg("-ptx").arg(format!("-arch=compute_{arch}")).arg("-std=c++17").args(extra);
        run(nvcc.arg(&source).arg("-o").arg(&fresh), &format!("nvcc on {cu}"));
        assemble(&fresh, arch);
        fs::rename(&fresh, &kept).unwrap();
        fs::read_to_string(&kept).unwrap()
    };
    cell.get_or_init(compile).clone()
}
