//! Hostile modules, loaded and launched: whatever the text, an answer comes in time, and it never blames the machine.
//!
//! By default 100,000 inputs, always the same. `PTXVM_FUZZ=2` runs two million others:
//!
//! ```text
//! PTXVM_FUZZ=2 cargo test -p ptxvm --release --test main fuzz
//! ```

use std::sync::LazyLock;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

use proptest::prelude::*;
use proptest::sample::{Index, select};
use proptest::strategy::ValueTree;
use proptest::test_runner::{Config, RngAlgorithm, TestCaseError, TestRng, TestRunner};
use ptxvm::{Arg, Checks, Error, Gpu, Launch, Module, Options};

use crate::planted::rows_of_8;
use crate::support::{hopper, soup};

/// The longest that an input may take. It is far more than any needs, for machines under load.
const MAX_TIME: Duration = Duration::from_secs(60);

/// Modules that are valid, or wrong in one place: the planted bugs and what compilers gave.
static MODULES: LazyLock<Vec<&'static str>> = LazyLock::new(|| {
    let tests = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests");
    let mut paths: Vec<_> = ["planted", "parse"]
        .iter()
        .flat_map(|folder| std::fs::read_dir(tests.join(folder)).unwrap())
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|e| e == "ptx"))
        .collect();
    paths.sort();
    let read = |path| {
        let text = std::fs::read_to_string(path).unwrap();
        // Comments are no use to mutations.
        let code = text.lines().map(|line| line.split("//").next().unwrap_or_default().trim_end());
        let code: Vec<&str> = code.filter(|line| !line.is_empty()).collect();
        &*Box::leak((code.join("\n") + "\n").into_boxed_str())
    };
    paths.iter().map(read).collect()
});

/// All words of the modules: opcodes with their modifiers, registers, numbers, directives.
static WORDS: LazyLock<Vec<&'static str>> = LazyLock::new(|| {
    let mut words: Vec<_> = MODULES.iter().flat_map(|text| soup::split(text)).collect();
    words.retain(|word| !word.trim().is_empty());
    words.sort_unstable();
    words.dedup();
    words.extend([
        "0",
        "1",
        "31",
        "32",
        "4294967295",
        "-1",
        "18446744073709551615",
        "0x7d0000000000",
        "0f7fc00000",
        // What no seed has.
        "max.NaN.abs.f32",
        "redux.sync.min.abs.NaN.f32",
        "add.rz.sat.f32.bf16",
        "fma.rn.f32.f16",
        "tcgen05.mma.cta_group::1.kind::f16",
        "barrier.cluster.arrive.relaxed.aligned",
        "getctarank.shared::cluster.u32",
        "isspacep.shared::cluster",
        "%cluster_nctaid.x",
        "%is_explicit_cluster",
        ".blocksareclusters",
        ".maxclusterrank",
        ".explicitcluster",
    ]);
    words
});

/// A module with up to eight words replaced by words of other modules, or a whole line doubled or moved: mostly PTX
/// that assemblers would take, and that then does something else.
fn splices() -> impl Strategy<Value = String> {
    let word = (any::<Index>(), any::<Index>());
    let line = (any::<Index>(), any::<Index>());
    let edits = (prop::collection::vec(word, 0..8), prop::collection::vec(line, 0..3));
    (select(MODULES.as_slice()), edits).prop_map(|(text, (words, lines))| {
        let mut all: Vec<&str> = text.lines().collect();
        for (from, to) in lines {
            let line = all[from.index(all.len())];
            all.insert(to.index(all.len()), line);
        }
        let text = all.join("\n");
        let mut pieces = soup::split(&text);
        for (at, word) in words {
            let at = at.index(pieces.len());
            if !pieces[at].trim().is_empty() {
                pieces[at] = WORDS[word.index(WORDS.len())];
            }
        }
        pieces.concat()
    })
}

/// Loads the text and launches each of its kernels in a few shapes; gives what `Error::Internal` says, if it comes.
fn exercise(text: &str, seed: u64) -> Result<(), String> {
    let module = match Module::load("fuzz.ptx", text) {
        Ok(module) => module,
        Err(Error::Internal(message)) => return Err(message),
        Err(error) => {
            // Whoever reads the findings must be able to print them.
            let _ = error.to_string();
            return Ok(());
        }
    };
    let checks = [Checks::ALL, Checks::NONE, Checks { race: false, ..Checks::ALL }][seed as usize % 3];
    let options = Options {
        threads: 1,
        checks,
        counters: !seed.is_multiple_of(5),
        budget: 20_000,
        seed: seed.is_multiple_of(4).then_some(seed),
        memory: 1 << 20,
        ..Options::default()
    };
    let kernels: Vec<String> = module.kernels().into_iter().take(3).map(str::to_owned).collect();
    for kernel in kernels {
        let mut gpu = Gpu::new(options.clone());
        let loaded = match gpu.load(&module) {
            Ok(loaded) => loaded,
            Err(Error::Internal(message)) => return Err(message),
            Err(_) => continue,
        };
        let params = module.params(&kernel).unwrap_or_default();
        let mut args = Vec::new();
        for (bytes, _) in params {
            args.push(match bytes {
                8 => match gpu.alloc(1024) {
                    Ok(ptr) => Arg::Ptr(ptr),
                    Err(_) => Arg::U64(0),
                },
                4 => Arg::U32(5),
                // As large as a tensor map, and so one.
                128 => match gpu.alloc(1024) {
                    Ok(ptr) => Arg::Bytes(rows_of_8(ptr.0, 32)),
                    Err(_) => Arg::Bytes(vec![1; 128]),
                },
                n => Arg::Bytes(vec![1; n as usize]),
            });
        }
        // A warpgroup where there may be one; else two warps.
        let threads = if text.contains("wgmma") { 128 } else { 64 };
        for launch in [
            Launch::linear(1, 32),
            Launch { shared_bytes: 512, ..Launch::linear(2, threads) },
            Launch { cooperative: seed.is_multiple_of(2), ..Launch::linear(2, 40) },
            Launch { cluster: Some([2, 1, 1]), cooperative: seed.is_multiple_of(7), ..Launch::linear(4, 40) },
        ] {
            match gpu.launch(&loaded, &kernel, &launch, &args) {
                Ok(report) => drop(report.to_string()),
                Err(Error::Internal(message)) => return Err(message),
                Err(error) => drop(error.to_string()),
            }
        }
    }
    Ok(())
}

/// Runs an input on a thread of its own: a panic or a hang is the input's failure, not the test's end.
fn judge(text: String, seed: u64) -> Result<(), TestCaseError> {
    let (done, wait) = channel();
    let worker = std::thread::spawn(move || {
        // The receiver may have given up.
        let _ = done.send(exercise(&text, seed));
    });
    match wait.recv_timeout(MAX_TIME) {
        Ok(Ok(())) => Ok(()),
        Ok(Err(message)) => Err(TestCaseError::fail(format!("an internal error: {message}"))),
        Err(RecvTimeoutError::Timeout) => Err(TestCaseError::fail(format!("no end within {MAX_TIME:?}"))),
        Err(RecvTimeoutError::Disconnected) => {
            let panic = worker.join().expect_err("it ended without an answer");
            let text = panic.downcast_ref::<String>().cloned();
            let text = text.or_else(|| panic.downcast_ref::<&str>().map(|t| (*t).to_owned()));
            Err(TestCaseError::fail(format!("a panic: {}", text.unwrap_or_default())))
        }
    }
}

/// Runs `share` of the inputs from a source.
fn fuzz(inputs: impl Strategy<Value = String>, cases: u32, share: f64) {
    let million: Option<f64> = std::env::var("PTXVM_FUZZ").ok().and_then(|n| n.parse().ok());
    let cases = million.map_or(cases, |n| (n * share * 1e6) as u32);
    let config = Config { cases, max_shrink_iters: 2000, failure_persistence: None, ..Config::default() };
    let mut runner = if million.is_some() {
        TestRunner::new(config)
    } else {
        TestRunner::new_with_rng(config, TestRng::deterministic_rng(RngAlgorithm::ChaCha))
    };
    runner.run(&(inputs, any::<u64>()), |(text, seed)| judge(text, seed)).unwrap_or_else(|e| panic!("{e}"));
}

#[test]
fn mutated_modules() {
    fuzz(soup::mutations(MODULES.as_slice()), 30_000, 0.25);
}

#[test]
fn spliced_modules() {
    fuzz(splices(), 30_000, 0.25);
}

#[test]
fn random_programs_and_soups() {
    fuzz(prop_oneof![soup::programs(), soup::tokens(40)], 10_000, 0.2);
}

#[test]
fn asynchronous_kernels() {
    fuzz(hopper::kernels(), 30_000, 0.3);
}

/// Most of the asynchronous kernels are loaded, and some run to their end, so that what they do there is tried, too.
#[test]
fn asynchronous_kernels_get_far() {
    let mut runner =
        TestRunner::new_with_rng(Config::default(), TestRng::deterministic_rng(RngAlgorithm::ChaCha));
    let (mut loaded, mut ended) = (0, 0);
    for _ in 0..200 {
        let text = hopper::kernels().new_tree(&mut runner).unwrap().current();
        let Ok(module) = Module::load("fuzz.ptx", &text) else { continue };
        loaded += 1;
        let mut gpu =
            Gpu::new(Options { threads: 1, checks: Checks::NONE, budget: 20_000, ..Options::default() });
        let module = gpu.load(&module).unwrap();
        let (a, b) = (gpu.alloc(1024).unwrap(), gpu.alloc(1024).unwrap());
        let args = [Arg::Ptr(a), Arg::Bytes(rows_of_8(a.0, 32)), Arg::Ptr(b)];
        ended += usize::from(gpu.launch(&module, "k", &Launch::linear(1, 128), &args).is_ok());
    }
    assert!(loaded >= 80 && ended >= 8, "of 200 are loaded {loaded}, run to their end {ended}");
}

/// The modules themselves are loaded and launched by the mutations above; most must get that far.
#[test]
fn most_modules_load() {
    let loads = MODULES.iter().filter(|text| Module::load("seed.ptx", text).is_ok()).count();
    assert!(loads * 10 >= MODULES.len() * 8, "{loads} of {}", MODULES.len());
}
