//! Compiles every `kernels/*.cu` to PTX and writes an index of their entry points, so that a launcher that names a
//! kernel which does not exist does not compile, and of the constants and sizes of structs that a kernel shares with its
//! launcher, so that each stands in the kernel alone (build/source.rs). Without nvcc the index is the same and the PTX is missing: the program
//! then computes on the CPU alone and says so.
//!
//! A release build also holds machine code for [`ARCHITECTURES`], so that its first start waits for no compiler; the
//! driver still compiles the PTX where none of it fits. Debug builds leave that out: it takes minutes.
//!
//! A kernel is compiled again only when something that its PTX depends on has other bytes than last time: itself, a
//! header that it includes, nvcc, the flags.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::{env, fs};

#[allow(unreachable_pub, reason = "it is the library's")]
#[path = "src/device/dependent.rs"]
mod dependent;
#[allow(dead_code, unreachable_pub, reason = "tests use it, and more of an entry point")]
#[path = "build/source.rs"]
mod source;

use source::{EntryPoint, Shared, Value};

/// -arch: runs on Ampere, Ada, Hopper and Blackwell, through the driver's compiler.
/// -fmad=false: a multiply-add is one where the kernel says `fmaf`. Otherwise ptxas may fuse what it likes, differently
/// in each variant of a kernel and on each architecture, and a row would not have the same bits in all of them.
/// -lineinfo: the virtual GPU's findings name lines of the .cu.
const FLAGS: [&str; 8] =
    ["-ptx", "-arch=compute_80", "-O3", "-std=c++17", "-fmad=false", "-lineinfo", "-Werror", "all-warnings"];

/// A driver refuses PTX that says it is of a newer version than the driver's own, and nvcc always says its own. The
/// kernels use nothing newer than this, which drivers of CUDA 11.4 (R470) and later take. If one should, ptxas says so
/// in the tests: "Feature .. requires PTX ISA .version .. or later".
const PTX_VERSION: (u32, u32) = (7, 4);

/// Compute capabilities of GPUs that machine code is made for: A100, RTX 30, RTX 40, H100, B200, RTX 50. It runs on later
/// ones of the same major version, too.
const ARCHITECTURES: [(i32, i32); 6] = [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)];
/// --suppress-debug-info: lines and text of the PTX are two thirds of a cubin otherwise. Who looks for them has the driver
/// compile the PTX: see CONTRIBUTING.md.
const PTXAS_FLAGS: [&str; 2] = ["-O3", "--suppress-debug-info"];

/// Settings that decide which compilers run.
const VARIABLES: [&str; 5] = ["NVCC", "PATH", "CUDA_HOME", "CUDA_PATH", "NVCC_CCBIN"];

fn main() {
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-changed=build");
    println!("cargo:rerun-if-changed=kernels");
    println!("cargo:rerun-if-changed=src/device/dependent.rs");
    println!("cargo:rustc-check-cfg=cfg(has_kernels)");
    for variable in VARIABLES {
        println!("cargo:rerun-if-env-changed={variable}");
    }
    let mut sources: Vec<PathBuf> = fs::read_dir("kernels")
        .expect("kernels/ is part of the project")
        .map(|entry| entry.expect("kernels/ can be read").path())
        .filter(|path| path.extension().is_some_and(|e| e == "cu"))
        .collect();
    sources.sort();
    let nvcc = find_nvcc();
    let mut cubins = Vec::new();
    match &nvcc {
        Some(nvcc) => {
            println!("cargo:rerun-if-changed={}", nvcc.display());
            // For tests that need them.
            println!("cargo:rustc-cfg=has_kernels");
            compile(nvcc, &sources, &out);
            if env::var("PROFILE").is_ok_and(|profile| profile == "release") {
                cubins = assemble(nvcc, &sources, &out);
            }
        }
        None => println!(
            "cargo:warning=no nvcc was found: this build computes on the CPU alone, without --device cuda and vm; \
             `make nvcc` fetches one, then build again"
        ),
    }
    fs::write(out.join("kernels.rs"), index(&sources, nvcc.as_deref(), &cubins))
        .expect("OUT_DIR can be written");
}

/// $NVCC, an installed toolkit, or what `make nvcc` fetched.
fn find_nvcc() -> Option<PathBuf> {
    let named = env::var_os("NVCC").map(PathBuf::from);
    let path = env::var_os("PATH").unwrap_or_default();
    let on_path = env::split_paths(&path).map(|dir| dir.join("nvcc"));
    let homes = ["CUDA_HOME", "CUDA_PATH"].into_iter().filter_map(env::var_os);
    let installed = homes.map(PathBuf::from).chain([PathBuf::from("/usr/local/cuda")]);
    let mut fetched: Vec<PathBuf> = fs::read_dir(".cache")
        .into_iter()
        .flatten()
        .filter_map(|entry| Some(entry.ok()?.path().join("nvidia/cu13/bin/nvcc")))
        .filter(|path| path.to_string_lossy().contains("nvcc-") && !path.to_string_lossy().contains(".part."))
        .collect();
    fetched.sort();
    let here = env::current_dir().expect("a build has a directory");
    named
        .into_iter()
        .chain(on_path)
        .chain(installed.map(|home| home.join("bin/nvcc")))
        .chain(fetched)
        .find(|nvcc| nvcc.is_file())
        .map(|nvcc| here.join(nvcc))
}

/// The assembler beside an nvcc, or beside what nvcc is a link to.
fn find_ptxas(nvcc: &Path) -> Option<PathBuf> {
    let places = [nvcc.to_owned(), fs::canonicalize(nvcc).ok()?];
    places.into_iter().map(|nvcc| nvcc.with_file_name("ptxas")).find(|ptxas| ptxas.is_file())
}

/// As many compilers at once as cargo allows; the first failure ends the build with nvcc's words.
fn compile(nvcc: &Path, sources: &[PathBuf], out: &Path) {
    let compiler = compiler(nvcc, &FLAGS);
    let failures = in_parallel(sources, |source| compile_one(nvcc, compiler, source, out).err());
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

/// What `f` makes of the items, as many at once as cargo allows, in no order.
fn in_parallel<T: Sync, R: Send>(items: &[T], f: impl Fn(&T) -> Option<R> + Sync) -> Vec<R> {
    let jobs = env::var("NUM_JOBS").ok().and_then(|n| n.parse().ok()).unwrap_or(1).min(items.len());
    let (next, made) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    std::thread::scope(|scope| {
        for _ in 0..jobs {
            scope.spawn(|| {
                while let Some(item) = items.get(next.fetch_add(1, Ordering::Relaxed)) {
                    if let Some(result) = f(item) {
                        made.lock().expect("no thread panics").push(result);
                    }
                }
            });
        }
    });
    made.into_inner().expect("no thread panics")
}

/// A kernel's machine code for one architecture, in a file of OUT_DIR.
struct Cubin {
    stem: String,
    capability: (i32, i32),
    /// Of the toolkit, as in 13.2.
    release: (u32, u32),
}

impl Cubin {
    fn file(&self) -> String {
        format!("{}.sm_{}{}.cubin", self.stem, self.capability.0, self.capability.1)
    }
}

/// Machine code of all kernels. What cannot be made, because the toolkit has no assembler or does not know an
/// architecture, is left to the driver, with a warning.
fn assemble(nvcc: &Path, sources: &[PathBuf], out: &Path) -> Vec<Cubin> {
    let ptxas = find_ptxas(nvcc).and_then(|ptxas| {
        let release = release(&ptxas)?;
        Some((ptxas, release))
    });
    let Some((ptxas, release)) = ptxas else {
        println!(
            "cargo:warning=no ptxas beside nvcc: GPUs compile the kernels when the program first starts"
        );
        return Vec::new();
    };
    let all: Vec<Cubin> = sources
        .iter()
        .flat_map(|source| {
            let stem = stem(source).to_owned();
            ARCHITECTURES.map(|capability| Cubin { stem: stem.clone(), capability, release })
        })
        .collect();
    let assembler = compiler(&ptxas, &PTXAS_FLAGS);
    let failures = in_parallel(&all, |cubin| {
        let message = assemble_one(&ptxas, assembler, cubin, out).err()?;
        Some((cubin.file(), message))
    });
    for (file, message) in &failures {
        println!(
            "cargo:warning=no {file}, so such GPUs compile it when the program first starts: {}",
            message.replace('\n', " ")
        );
    }
    all.into_iter().filter(|cubin| failures.iter().all(|(file, _)| *file != cubin.file())).collect()
}

fn assemble_one(ptxas: &Path, assembler: u64, cubin: &Cubin, out: &Path) -> Result<(), String> {
    let mut ptx = out.join(&cubin.stem).with_extension("ptx");
    let file = out.join(cubin.file());
    let stamp = file.with_extension("stamp");
    let mut text = fs::read_to_string(&ptx).map_err(|e| e.to_string())?;
    let (major, minor) = cubin.capability;
    if cubin.capability >= dependent::CAPABILITY {
        text = dependent::dependent(&text);
        ptx = file.with_extension("ptx");
        fs::write(&ptx, &text).map_err(|e| e.to_string())?;
    }
    let mut hash = DefaultHasher::new();
    text.hash(&mut hash);
    let made_of = format!("{assembler:016x} {:016x}\n", hash.finish());
    if file.is_file() && fs::read_to_string(&stamp).is_ok_and(|known| known == made_of) {
        return Ok(());
    }
    let _ = fs::remove_file(&stamp);
    let run = Command::new(ptxas)
        .args(PTXAS_FLAGS)
        .arg(format!("-arch=sm_{major}{minor}"))
        .arg("-o")
        .arg(&file)
        .arg(&ptx)
        .output()
        .map_err(|e| format!("{}: {e}", ptxas.display()))?;
    if !run.status.success() {
        return Err(String::from_utf8_lossy(&[run.stdout, run.stderr].concat()).into_owned());
    }
    fs::write(&stamp, made_of).map_err(|e| e.to_string())
}

/// The release that a ptxas says it is of.
fn release(ptxas: &Path) -> Option<(u32, u32)> {
    let run = Command::new(ptxas).arg("--version").output().ok()?;
    let text = String::from_utf8_lossy(&run.stdout).into_owned();
    let (major, minor) = text.split("release ").nth(1)?.split(',').next()?.split_once('.')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

/// A number that another nvcc or ptxas, other flags or settings, or another version of this file change.
fn compiler(program: &Path, flags: &[&str]) -> u64 {
    let mut hash = DefaultHasher::new();
    let file = fs::metadata(program).ok();
    (program, file.as_ref().map(|f| (f.len(), f.modified().ok()))).hash(&mut hash);
    (flags, env::var_os("NVCC_CCBIN")).hash(&mut hash);
    // What is done to the PTX afterwards.
    include_str!("build.rs").hash(&mut hash);
    include_str!("src/device/dependent.rs").hash(&mut hash);
    hash.finish()
}

/// A number that other contents of a kernel, or of a header that it includes, change.
fn contents(source: &Path) -> u64 {
    let mut hash = DefaultHasher::new();
    let (mut open, mut seen) = (vec![source.to_owned()], BTreeSet::new());
    while let Some(path) = open.pop() {
        // What is not beside the kernels belongs to the toolkit.
        let Ok(text) = fs::read_to_string(&path) else { continue };
        if !seen.insert(path.clone()) {
            continue;
        }
        (&path, &text).hash(&mut hash);
        let included = text.lines().filter_map(|line| {
            line.trim_start()
                .strip_prefix('#')?
                .trim_start()
                .strip_prefix("include")?
                .trim()
                .strip_prefix('"')?
                .split('"')
                .next()
        });
        open.extend(included.map(|name| path.with_file_name(name)));
    }
    hash.finish()
}

fn compile_one(nvcc: &Path, compiler: u64, source: &Path, out: &Path) -> Result<(), String> {
    let ptx = out.join(stem(source)).with_extension("ptx");
    let stamp = ptx.with_extension("stamp");
    let made_of = format!("{compiler:016x} {:016x}\n", contents(source));
    if ptx.is_file() && fs::read_to_string(&stamp).is_ok_and(|known| known == made_of) {
        return Ok(());
    }
    // An interrupted build must not leave a stamp beside another PTX.
    let _ = fs::remove_file(&stamp);
    let failed = |what: &str| format!("{}: {what}", source.display());
    let run = Command::new(nvcc)
        .args(FLAGS)
        .arg("-o")
        .arg(&ptx)
        .arg(source)
        .output()
        .map_err(|e| format!("{}: {e}", nvcc.display()))?;
    if !run.status.success() {
        let said = [run.stdout, run.stderr].concat();
        return Err(failed(&format!("nvcc failed:\n{}", String::from_utf8_lossy(&said))));
    }
    let text = fs::read_to_string(&ptx).map_err(|e| failed(&e.to_string()))?;
    let text = lower_version(&text).ok_or_else(|| failed("nvcc wrote PTX without a .version"))?;
    fs::write(&ptx, text).and_then(|()| fs::write(&stamp, made_of)).map_err(|e| failed(&e.to_string()))
}

/// PTX that says it is of [`PTX_VERSION`], or of its own version where that is older. nvcc's hint which bytes of a
/// vector load are used, a pragma of newer versions, is left out: it changes no result.
fn lower_version(ptx: &str) -> Option<String> {
    let (head, rest) = ptx.split_once("\n.version ")?;
    let (version, rest) = rest.split_once('\n')?;
    let (major, minor) = version.trim().split_once('.')?;
    let (major, minor) = (major.parse().ok()?, minor.parse().ok()?);
    let (major, minor) = PTX_VERSION.min((major, minor));
    let newer = |line: &&str| line.trim_start().starts_with(".pragma \"used_bytes_mask");
    let rest: String = rest.lines().filter(|line| !newer(line)).map(|line| format!("{line}\n")).collect();
    Some(format!("{head}\n.version {major}.{minor}\n{rest}"))
}

fn stem(source: &Path) -> &str {
    source.file_stem().and_then(|s| s.to_str()).expect("kernels have plain names")
}

/// The text of a kernel file; a problem that is found in it, as `line: what`, ends the build.
fn read<T>(path: &Path, f: impl FnOnce(&str) -> Result<T, String>) -> T {
    let text = fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    f(&text).unwrap_or_else(|problem| panic!("{}:{problem}", path.display()))
}

/// rms_norm_forward -> RmsNormForward.
fn camel(name: &str) -> String {
    let word = |w: &str| w[..1].to_uppercase() + &w[1..];
    name.split('_').filter(|w| !w.is_empty()).map(word).collect()
}

/// The module `shared` of the index: a module for each stem.
fn shared_index() -> String {
    let mut stems: BTreeMap<String, Shared> = BTreeMap::new();
    for entry in fs::read_dir("kernels").expect("kernels/ is part of the project") {
        let path = entry.expect("kernels/ can be read").path();
        if path.extension().is_some_and(|e| e == "cu" || e == "cuh") {
            let shared = stems.entry(stem(&path).to_owned()).or_default();
            read(&path, |text| source::add_shared(text, shared));
        }
    }
    let mut text = String::from(
        "/// Constants of kernels, sizes of structs in bytes (..`_BYTES`), and arguments of templates, that launchers use: by the\n\
         /// stem of the file that marks them with `// shared`.\npub mod shared {\n",
    );
    for (stem, shared) in stems.iter().filter(|(_, shared)| !shared.is_empty()) {
        writeln!(text, "    /// Of kernels/{stem}.cu and kernels/{stem}.cuh.\n    pub mod {stem} {{")
            .expect("a string");
        for (name, value) in shared {
            let (of, value) = match value {
                Value::Number(number) => ("usize".to_owned(), number.to_string()),
                Value::Numbers(numbers) => (format!("[usize; {}]", numbers.len()), format!("{numbers:?}")),
            };
            writeln!(text, "        /// See there.\n        pub const {name}: {of} = {value};")
                .expect("a string");
        }
        text.push_str("    }\n");
    }
    text + "}\n\n"
}

fn index(sources: &[PathBuf], nvcc: Option<&Path>, cubins: &[Cubin]) -> String {
    let (mut variants, mut names, mut modules) = (String::new(), String::new(), String::new());
    for source in sources {
        let stem = stem(source);
        let entries = read(source, source::entries);
        for EntryPoint { name, .. } in &entries {
            let variant = camel(name);
            writeln!(variants, "    /// `{name}` of kernels/{stem}.cu.\n    {variant},").expect("a string");
            writeln!(names, "            Entry::{variant} => {name:?},").expect("a string");
        }
        let list: String = entries.iter().map(|e| format!("Entry::{}, ", camel(&e.name))).collect();
        let ptx = match nvcc {
            Some(_) => format!("Some(include_str!(concat!(env!(\"OUT_DIR\"), \"/{stem}.ptx\")))"),
            None => "None".to_owned(),
        };
        let cubins: String = cubins
            .iter()
            .filter(|cubin| cubin.stem == stem)
            .map(|cubin| {
                let Cubin { capability, release, .. } = cubin;
                // An ELF file's fields are read where they lie.
                format!(
                    "Cubin {{ capability: {capability:?}, cuda: {release:?}, image: &Aligned(*include_bytes!(concat!(\
                     env!(\"OUT_DIR\"), \"/{}\"))).0 }}, ",
                    cubin.file()
                )
            })
            .collect();
        writeln!(
            modules,
            "    Module {{ name: {stem:?}, ptx: {ptx}, cubins: &[{cubins}], entries: &[{list}] }},"
        )
        .expect("a string");
    }
    let ptxas = nvcc.and_then(find_ptxas);
    let (nvcc, ptxas) = (nvcc.map(|p| p.to_string_lossy()), ptxas.as_deref().map(|p| p.to_string_lossy()));
    let index = format!(
        "/// An entry point.\n#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]\npub enum Entry {{\n{variants}}}\n\n\
         impl Entry {{\n    /// Its name in the PTX.\n    pub fn name(self) -> &'static str {{\n        match self {{\n\
         {names}        }}\n    }}\n}}\n\n/// Every kernel file, in order; entry points are numbered through.\n\
         pub static MODULES: &[Module] = &[\n{modules}];\n\n\
         /// The nvcc that compiled the kernels; `None` where there was none.\n\
         pub const NVCC: Option<&str> = {nvcc:?};\n\n\
         /// Its ptxas.\n\
         pub const PTXAS: Option<&str> = {ptxas:?};\n\n\
         /// The version that the kernels' PTX says it is of, at most: drivers before it cannot take it.\n\
         pub const PTX_VERSION: (u32, u32) = {PTX_VERSION:?};\n"
    );
    shared_index() + &index
}
