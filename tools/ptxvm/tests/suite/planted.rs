//! Planted bugs: small kernels, each wrong in one way, and what the machine must say of them.
//!
//! Each file of `tests/planted` is two versions of a kernel. Lines that end in `// bug` are in the faulty one only,
//! lines that begin with `// fix:` (less that mark) in the corrected one only, so that both have the same line numbers.
//! The head tells in lines that begin with `//>`:
//!
//! - `launch: grid 1 2, block 32, shared 64, cluster 1 2, cooperative`: dimensions are separated by blanks.
//! - `entry: k` (the kernel; `k` if it is not told), `budget: 1000` (of instructions).
//! - `args: in[8], out[8], 5, 5u64, bytes 0500`: buffers of words, or values. A buffer's name tells what it holds:
//!   `in` 1, 4, 7, ...; `zero` zeros; `out` and `raw` nothing that anybody wrote; `old` is freed before the launch.
//!   `map NAME` is a tensor map of an earlier buffer: rows of 8 floats, in boxes of 8 x 4.
//! - `expect: KIND; at #1; against #2; THREADS; "part of the message"; x3`: a finding. `#1` marks the end of the line
//!   that is meant, THREADS are written as `Threads` prints them (without lanes: any), `x3` is the count; `@1` in a
//!   part of the message is the number of line `#1`. Without `at` the line may be any. The report must have exactly
//!   the expected findings, in their order.
//! - `answer: out = 1+3*8 7*2`: what the corrected version leaves in a buffer: 8 words from 1 in steps of 3, then 7
//!   twice.
//! - `schedule: fixed`: the findings depend on the order in which warps run; otherwise the first one must be found
//!   under random schedules, too, where the two parties of a race may change places.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;

use ptxvm::error::{ErrorKind, Finding};
use ptxvm::{Arg, DevicePtr, Error, Gpu, Launch, Module, Options, Swizzle, TensorMap, TensorType, Tiled};

/// A tensor map of `rows` rows of 8 floats, in boxes of 8 x 4.
pub(crate) fn rows_of_8(address: u64, rows: u64) -> Vec<u8> {
    let tiled = Tiled {
        ty: TensorType::F32,
        address,
        dims: &[8, rows],
        strides: &[32],
        boxes: &[8, 4],
        element_strides: &[1, 1],
        swizzle: Swizzle::None,
        fill_nan: false,
    };
    TensorMap::encode(&tiled).unwrap().to_vec()
}

/// A version of a file: its text, and what its head tells.
struct Version {
    name: String,
    text: String,
    /// Lines of the marks `#1`, `#2`, ...
    marks: BTreeMap<u32, u32>,
    head: Vec<(String, String)>,
}

/// What a finding must be.
#[derive(Debug)]
struct Expected {
    kind: String,
    at: Option<u32>,
    against: Option<u32>,
    threads: Option<String>,
    parts: Vec<String>,
    count: Option<u64>,
}

impl Version {
    fn new(name: &str, file: &str, corrected: bool) -> Self {
        let mut marks = BTreeMap::new();
        let mut text = String::new();
        let mut head = Vec::new();
        for (i, line) in file.lines().enumerate() {
            let (code, comment) = match line.rsplit_once("// ") {
                Some((code, comment)) if !code.trim().is_empty() => (code, comment),
                _ => (line, ""),
            };
            let tags: Vec<&str> = comment.split(' ').collect();
            for tag in &tags {
                if let Some(number) = tag.strip_prefix('#') {
                    marks.insert(number.parse().unwrap(), i as u32 + 1);
                }
            }
            let line = if let Some(fix) = line.trim_start().strip_prefix("// fix: ") {
                if corrected { fix } else { "" }
            } else if tags.contains(&"bug") {
                if corrected { "" } else { code }
            } else {
                line
            };
            if let Some((key, value)) = line.strip_prefix("//> ").and_then(|told| told.split_once(": ")) {
                head.push((key.to_owned(), value.trim_end().to_owned()));
            }
            writeln!(text, "{line}").unwrap();
        }
        Self { name: name.to_owned(), text, marks, head }
    }

    fn all(&self, key: &str) -> Vec<&str> {
        self.head.iter().filter(|(k, _)| k == key).map(|(_, value)| value.as_str()).collect()
    }

    fn told(&self, key: &str) -> Option<&str> {
        self.all(key).first().copied()
    }

    fn line(&self, mark: &str) -> u32 {
        *self.marks.get(&mark.parse().unwrap()).unwrap_or_else(|| panic!("{}: no mark {mark}", self.name))
    }

    fn launch(&self) -> Launch {
        let mut launch = Launch::linear(1, 1);
        for part in self.told("launch").unwrap().split(", ") {
            let (what, numbers) = part.split_once(' ').unwrap_or((part, ""));
            let numbers: Vec<u32> = numbers.split_whitespace().map(|n| n.parse().unwrap()).collect();
            match what {
                "grid" => launch.grid[..numbers.len()].copy_from_slice(&numbers),
                "block" => launch.block[..numbers.len()].copy_from_slice(&numbers),
                "shared" => launch.shared_bytes = numbers[0],
                "cooperative" => launch.cooperative = true,
                "cluster" => {
                    let mut cluster = [1; 3];
                    cluster[..numbers.len()].copy_from_slice(&numbers);
                    launch.cluster = Some(cluster);
                }
                _ => panic!("{}: {part}", self.name),
            }
        }
        launch
    }

    fn expected(&self) -> Vec<Expected> {
        let one = |told: &str| {
            let mut parts = told.split("; ");
            let kind = parts.next().unwrap().to_owned();
            let mut expected =
                Expected { kind, at: None, against: None, threads: None, parts: Vec::new(), count: None };
            for part in parts {
                if let Some(mark) = part.strip_prefix("at #") {
                    expected.at = Some(self.line(mark));
                } else if let Some(mark) = part.strip_prefix("against #") {
                    expected.against = Some(self.line(mark));
                } else if let Some(count) = part.strip_prefix('x') {
                    expected.count = Some(count.parse().unwrap());
                } else if part.starts_with("block") {
                    expected.threads = Some(part.to_owned());
                } else {
                    let mut text = part.trim_matches('"').to_owned();
                    for (mark, line) in &self.marks {
                        text = text.replace(&format!("@{mark}"), &line.to_string());
                    }
                    expected.parts.push(text);
                }
            }
            expected
        };
        self.all("expect").into_iter().map(one).collect()
    }

    /// Loads and launches; gives the buffers as they are afterwards.
    fn run(&self, options: &Options) -> Result<BTreeMap<String, Vec<u32>>, Error> {
        let budget = self.told("budget").map_or(options.budget, |n| n.parse().unwrap());
        let mut gpu = Gpu::new(Options { budget, ..options.clone() });
        let module = Module::load(&self.name, &self.text)?;
        let loaded = gpu.load(&module)?;
        let mut buffers: Vec<(String, DevicePtr, usize)> = Vec::new();
        let mut args = Vec::new();
        for told in self.told("args").unwrap().split(", ") {
            args.push(match told.split_once('[') {
                Some((name, words)) => {
                    let words: usize = words.trim_end_matches(']').parse().unwrap();
                    let ptr = gpu.alloc_named(words * 4, name)?;
                    match name {
                        "in" => {
                            let values: Vec<u8> =
                                (0..words as u32).flat_map(|i| (1 + 3 * i).to_le_bytes()).collect();
                            gpu.write(ptr, &values)?;
                        }
                        "zero" => gpu.fill(ptr, 0, words * 4)?,
                        "out" | "raw" => {}
                        "old" => gpu.free(ptr)?,
                        _ => panic!("{}: {told}", self.name),
                    }
                    if name != "old" {
                        buffers.push((name.to_owned(), ptr, words));
                    }
                    Arg::Ptr(ptr)
                }
                None => {
                    if let Some(name) = told.strip_prefix("map ") {
                        let (_, ptr, words) = buffers.iter().find(|(n, ..)| n == name).unwrap();
                        Arg::Bytes(rows_of_8(ptr.0, *words as u64 / 8))
                    } else if let Some(digits) = told.strip_prefix("bytes ") {
                        let digits: String = digits.split_whitespace().collect();
                        let byte = |i| u8::from_str_radix(&digits[i..i + 2], 16).unwrap();
                        Arg::Bytes((0..digits.len()).step_by(2).map(byte).collect())
                    } else if let Some(number) = told.strip_suffix("u64") {
                        Arg::U64(number.parse().unwrap())
                    } else {
                        Arg::U32(told.parse().unwrap())
                    }
                }
            });
        }
        let entry = self.told("entry").unwrap_or("k");
        gpu.launch(&loaded, entry, &self.launch(), &args)?;
        let mut found = BTreeMap::new();
        for (name, ptr, words) in buffers {
            let mut bytes = vec![0; words * 4];
            gpu.read(ptr, &mut bytes)?;
            let words = bytes.chunks_exact(4).map(|b| u32::from_le_bytes(b.try_into().unwrap())).collect();
            found.insert(name, words);
        }
        Ok(found)
    }
}

/// `1+3*8 7*2`: 8 numbers from 1 in steps of 3, then 7 twice.
fn numbers(told: &str) -> Vec<u32> {
    let run = |told: &str| {
        let (start, count) = told.split_once('*').unwrap();
        let (start, step) = match start.split_once(['+', '-']) {
            Some((first, step)) => {
                let step: i64 = step.parse().unwrap();
                (first, if start.contains('-') { -step } else { step })
            }
            None => (start, 0),
        };
        let (start, count): (i64, i64) = (start.parse().unwrap(), count.parse().unwrap());
        (0..count).map(|i| (start + i * step) as u32).collect::<Vec<_>>()
    };
    told.split(' ').flat_map(run).collect()
}

/// The findings of a report.
fn findings(error: &Error) -> &[Finding] {
    match error {
        Error::Fault(findings) | Error::Unsupported(findings) => findings,
        Error::Internal(_) => &[],
    }
}

/// How a finding differs from what was expected.
fn difference(version: &Version, expected: &Expected, found: &Finding) -> Result<(), String> {
    let mut all = String::new();
    let mut same = |what: &str, right: bool| {
        if !right {
            write!(all, " {what}").unwrap();
        }
    };
    same("kind", format!("{:?}", found.kind) == expected.kind);
    if let Some(line) = expected.at {
        let text = version.text.lines().nth(line as usize - 1).unwrap_or_default();
        same("line", found.at.line == line && found.at.file == version.name);
        // What stands at a line may be told without its guard and its comment.
        same("text of the line", found.at.text.split(';').next().is_some_and(|t| text.contains(t.trim())));
    }
    same("other party", found.other.as_ref().map(|p| p.line) == expected.against);
    let threads = found.threads.as_ref().map(ToString::to_string);
    same(
        "threads",
        match (&expected.threads, &threads) {
            (Some(want), Some(got)) => want == got || got.starts_with(&format!("{want} lane")),
            (want, got) => want.is_none() && got.is_none(),
        },
    );
    same("count", expected.count.is_none_or(|n| found.count == n));
    for part in &expected.parts {
        same(part, found.message.contains(part.as_str()));
    }
    if all.is_empty() { Ok(()) } else { Err(all) }
}

/// What is wrong with the report of a faulty version.
fn judge(version: &Version, result: Result<BTreeMap<String, Vec<u32>>, Error>) -> Result<(), String> {
    let expected = version.expected();
    let Err(error) = result else { return Err("nothing is found".into()) };
    let found = findings(&error);
    let supported = !matches!(error, Error::Unsupported(_));
    if supported == expected.iter().any(|e| e.kind == "Unsupported") {
        return Err(format!("the wrong error: {error}"));
    }
    if expected.len() != found.len() {
        return Err(format!("{} findings instead of {}: {error}", found.len(), expected.len()));
    }
    for (expected, found) in expected.iter().zip(found) {
        difference(version, expected, found).map_err(|e| format!("differs in:{e}\n{found}"))?;
    }
    Ok(())
}

/// What is wrong with what a corrected version did.
fn check_answers(version: &Version, result: Result<BTreeMap<String, Vec<u32>>, Error>) -> Result<(), String> {
    let buffers = result.map_err(|e| format!("the corrected version is not silent: {e}"))?;
    for answer in version.all("answer") {
        let (name, told) = answer.split_once(" = ").unwrap();
        let (want, got) = (numbers(told), &buffers[name]);
        if want != *got {
            return Err(format!("the corrected version's answer in `{name}` is {got:?} instead of {want:?}"));
        }
    }
    Ok(())
}

/// Under another schedule: the first finding is the same, but for the order of a race's parties.
fn judge_any_order(
    version: &Version,
    result: Result<BTreeMap<String, Vec<u32>>, Error>,
) -> Result<(), String> {
    let expected = &version.expected()[0];
    let Err(error) = result else { return Err("nothing is found".into()) };
    let found = &findings(&error)[0];
    let parties = |a: Option<u32>, b: Option<u32>| if a <= b { (a, b) } else { (b, a) };
    let want = parties(expected.at, expected.against);
    let got = parties(expected.at.and(Some(found.at.line)), found.other.as_ref().map(|p| p.line));
    if format!("{:?}", found.kind) != expected.kind || want != got {
        return Err(format!("found was: {error}"));
    }
    Ok(())
}

/// All files: name and text.
fn files() -> Vec<(String, String)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/planted");
    let mut files: Vec<_> = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .map(|path| {
            (path.file_name().unwrap().to_str().unwrap().to_owned(), std::fs::read_to_string(&path).unwrap())
        })
        .collect();
    files.sort();
    files
}

fn each(check: impl Fn(&Version, &Version) -> Result<(), String>) {
    let mut wrong = Vec::new();
    for (name, text) in files() {
        let (faulty, corrected) = (Version::new(&name, &text, false), Version::new(&name, &text, true));
        if let Err(e) = check(&faulty, &corrected) {
            wrong.push(format!("{name}: {e}"));
        }
    }
    assert!(wrong.is_empty(), "{} files:\n\n{}", wrong.len(), wrong.join("\n\n"));
}

fn in_order() -> Options {
    Options { threads: 1, ..Options::default() }
}

#[test]
fn every_bug_is_reported_exactly() {
    each(|faulty, _| judge(faulty, faulty.run(&in_order())));
}

#[test]
fn corrected_kernels_are_silent_and_right() {
    each(|_, corrected| check_answers(corrected, corrected.run(&in_order())));
}

#[test]
fn reports_do_not_depend_on_host_threads() {
    each(|faulty, corrected| {
        let options = Options { threads: 3, ..Options::default() };
        judge(faulty, faulty.run(&options))?;
        check_answers(corrected, corrected.run(&options))
    });
}

#[test]
fn bugs_are_found_under_every_schedule() {
    each(|faulty, corrected| {
        for seed in 0..4 {
            let options = Options { seed: Some(seed), ..in_order() };
            check_answers(corrected, corrected.run(&options)).map_err(|e| format!("seed {seed}: {e}"))?;
            if faulty.told("schedule") != Some("fixed") {
                judge_any_order(faulty, faulty.run(&options)).map_err(|e| format!("seed {seed}: {e}"))?;
            }
        }
        Ok(())
    });
}

/// Every kind of finding that a program can cause is planted, and every file says what it must.
#[test]
fn all_kinds_are_planted() {
    let kinds = [
        ErrorKind::Syntax,
        ErrorKind::Invalid,
        ErrorKind::Unsupported,
        ErrorKind::Launch,
        ErrorKind::OutOfBounds,
        ErrorKind::UseAfterFree,
        ErrorKind::Misaligned,
        ErrorKind::WrongSpace,
        ErrorKind::Uninitialized,
        ErrorKind::SharedRace,
        ErrorKind::GlobalRace,
        ErrorKind::AsyncRace,
        ErrorKind::Barrier,
        ErrorKind::Mbarrier,
        ErrorKind::Cluster,
        ErrorKind::TensorMap,
        ErrorKind::Wgmma,
        ErrorKind::WarpMask,
        ErrorKind::Deadlock,
        ErrorKind::Budget,
        ErrorKind::Trap,
        ErrorKind::DivisionByZero,
        ErrorKind::StackOverflow,
    ];
    let files = files();
    assert!(files.len() >= 100, "only {} files", files.len());
    let mut missing: Vec<String> = kinds.iter().map(|kind| format!("{kind:?}")).collect();
    for (name, text) in &files {
        let (faulty, corrected) = (Version::new(name, text, false), Version::new(name, text, true));
        assert!(faulty.text != corrected.text, "{name}: both versions are the same");
        assert!(!faulty.expected().is_empty() && !corrected.all("answer").is_empty(), "{name}");
        for expected in faulty.expected() {
            assert!(
                kinds.iter().any(|kind| format!("{kind:?}") == expected.kind),
                "{name}: {}",
                expected.kind
            );
            missing.retain(|kind| *kind != expected.kind);
        }
    }
    assert!(missing.is_empty(), "no kernel is planted for {missing:?}");
}
