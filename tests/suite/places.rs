//! Where tests find what is not in their own binary. Each place is told by an environment variable or, without it, is
//! the one that the build recorded: a binary that was carried to another machine finds its things there.

use std::path::{Path, PathBuf};

/// A place that the environment may tell.
fn place(variable: &str, recorded: impl Into<PathBuf>) -> PathBuf {
    std::env::var_os(variable).map_or_else(|| recorded.into(), PathBuf::from)
}

/// The program `bon-engine` (`BON_PROGRAM`).
pub(crate) fn program() -> PathBuf {
    place("BON_PROGRAM", env!("CARGO_BIN_EXE_bon-engine"))
}

/// The checkout, with sources and golden files (`BON_CHECKOUT`).
pub(crate) fn checkout() -> PathBuf {
    place("BON_CHECKOUT", env!("CARGO_MANIFEST_DIR"))
}

/// The virtual driver (`BON_VCUDA`): cargo builds a dev-dependency's libraries beside the tests.
pub(crate) fn virtual_driver() -> PathBuf {
    let library = place("BON_VCUDA", std::env::current_exe().unwrap().with_file_name("libvcuda.so"));
    assert!(library.is_file(), "no {}", library.display());
    library
}

/// A folder in which a program finds the virtual driver as the CUDA driver, and under the name of the linker's stub a
/// library that is none.
pub(crate) fn virtual_driver_folder() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let link = |to: &Path, name: &str| std::os::unix::fs::symlink(to, dir.path().join(name)).unwrap();
    link(&virtual_driver(), "libcuda.so.1");
    let loaded = std::fs::read_to_string("/proc/self/maps").unwrap();
    let libc = loaded.lines().filter_map(|line| line.find('/').map(|at| &line[at..]));
    let libc = libc.into_iter().find(|path| path.contains("/libc.so") || path.contains("/libc-"));
    link(Path::new(libc.expect("a C library is loaded")), "libcuda.so");
    dir
}
