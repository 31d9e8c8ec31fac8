//! The rules of the house that no compiler checks: who may know whom, and that documents tell the truth.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use bon_engine::objective::{Kind, Objective, ObjectiveConfig};
use bon_engine::train::config::TrainConfig;

use crate::arrows::{arrows, circles};
use crate::places::checkout as root;

fn read(path: impl AsRef<Path>) -> String {
    let path = root().join(path);
    fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// Files below a directory, or the file itself, by their path from the root; binary goldens and caches left out.
fn files(top: &str) -> Vec<String> {
    let mut found = Vec::new();
    let mut open = vec![PathBuf::from(top)];
    while let Some(path) = open.pop() {
        let full = root().join(&path);
        if full.is_dir() {
            open.extend(fs::read_dir(&full).unwrap().map(|entry| path.join(entry.unwrap().file_name())));
        } else if !path.extension().is_some_and(|e| e == "safetensors" || e == "npy" || e == "pyc") {
            found.push(path.to_str().unwrap().to_owned());
        }
    }
    found.sort();
    assert!(!found.is_empty(), "nothing at {top}");
    found
}

/// The library's and the program's code without comments and unit tests: path, and numbered lines.
fn sources() -> Vec<(String, Vec<(usize, String)>)> {
    let code = |path: &String| {
        let text = read(path);
        let lines = text.lines().take_while(|line| *line != "#[cfg(test)]").enumerate();
        // No string of ours holds `//` after a space.
        lines.map(|(i, line)| (i + 1, format!(" {line}").split(" //").next().unwrap().to_owned())).collect()
    };
    files("src").iter().map(|path| (path.clone(), code(path))).collect()
}

fn assert_none(what: &str, found: Vec<String>) {
    assert!(found.is_empty(), "{what}:\n  {}", found.join("\n  "));
}

// ------------------------------------------------------------------------------------------------- who knows whom

/// The modules of src/lib.rs from the bottom up, as its code map lists them: each names only modules before it.
const LAYERS: [&str; 23] = [
    "rng",
    "segments",
    "checkpoint",
    "layered",
    "device",
    "backend",
    "cost",
    "gemma",
    "chat",
    "tokenizer",
    "tasks",
    "objective",
    "verifier",
    "eval",
    "page",
    "adapter",
    "generate",
    "model_dir",
    "reward",
    "rollout",
    "train",
    "plan",
    "cli",
];
/// Modules that name no other at all: text or numbers in, numbers out.
const ALONE: [&str; 7] = ["rng", "segments", "checkpoint", "layered", "device", "objective", "verifier"];

/// All `crate::` paths of a line, such as `train::tasks::Task`.
fn crate_paths(line: &str) -> impl Iterator<Item = &str> {
    line.split("crate::").skip(1).map(|rest| {
        rest.split(|c: char| !(c.is_alphanumeric() || c == '_' || c == ':'))
            .next()
            .unwrap()
            .trim_end_matches(':')
    })
}

#[test]
fn modules_name_only_those_below_them() {
    let level = |module: &str| LAYERS.iter().position(|l| *l == module);
    let mut wrong = Vec::new();
    let mut arrows = 0;
    for (path, lines) in sources() {
        let module = path.strip_prefix("src/").unwrap().split(['/', '.']).next().unwrap();
        if module == "lib" || module == "main" {
            continue;
        }
        let own = level(module).unwrap_or_else(|| panic!("{path}: `{module}` has no place in LAYERS"));
        let is_root = path == format!("src/{module}.rs") || path == format!("src/{module}/mod.rs");
        for (n, line) in &lines {
            if line.contains("super::super") {
                wrong.push(format!("{path}:{n}: hides where it leads; write it from `crate::`"));
            }
            // A top-level module's parent is the crate.
            let line = if is_root { line.replace("super::", "crate::") } else { line.clone() };
            for named in crate_paths(&line) {
                let target = named.split("::").next().unwrap();
                let Some(other) = level(target) else {
                    wrong.push(format!("{path}:{n}: names `crate::{named}`; name a module"));
                    continue;
                };
                if other == own {
                    continue;
                }
                arrows += 1;
                if other > own || ALONE.contains(&module) {
                    wrong.push(format!("{path}:{n}: {module} must not name {named}"));
                }
            }
        }
    }
    assert!(arrows > 50, "only {arrows} arrows were seen");
    assert_none("arrows that point up", wrong);
}

#[test]
fn no_modules_need_each_other() {
    let mut arrows = arrows(&root().join("src"), &["lib.rs", "main.rs"]);
    // A folder's mod.rs holds what its files share.
    for (from, named) in &mut arrows {
        named.retain(|to| !from.starts_with(&format!("{to}::")));
    }
    assert!(arrows.values().map(BTreeSet::len).sum::<usize>() > 300, "few arrows were seen: {arrows:#?}");
    let circles = circles(arrows);
    assert!(circles.is_empty(), "{circles:#?}");
}

#[test]
fn the_code_map_lists_the_modules_from_the_bottom_up() {
    let text = read("src/lib.rs");
    let map = text.split("# Code map").nth(1).and_then(|t| t.split("# Invariants").next()).unwrap();
    let listed: Vec<&str> = map
        .lines()
        .filter_map(|line| line.strip_prefix("//! - [`"))
        .map(|line| line.split('`').next().unwrap())
        .collect();
    assert_eq!(listed, LAYERS);
    let declared: BTreeSet<&str> =
        text.lines().filter_map(|l| l.strip_prefix("pub mod ")?.strip_suffix(';')).collect();
    assert_eq!(declared, BTreeSet::from(LAYERS));
}

/// What only some files may use: (text, where).
const PRIVILEGES: [(&str, &[&str]); 17] = [
    ("anyhow", &["src/cli/", "src/main.rs"]),
    ("clap", &["src/cli/", "src/main.rs"]),
    ("println!", &[]),
    ("io::stdout", &["src/cli/"]),
    ("io::stdin", &["src/cli/"]),
    (
        "env::",
        &["src/device/driver/", "src/cost/figures.rs", "src/verifier/program/mod.rs", "src/cli/mod.rs"],
    ),
    ("indicatif", &["src/cli/"]),
    ("process::exit", &[]),
    ("rayon::", &["src/backend/cpu/", "src/cli/devices.rs"]),
    ("std::arch", &["src/backend/cpu/simd.rs"]),
    ("tokenizers::", &["src/tokenizer.rs"]),
    (
        "std::process",
        &[
            "src/verifier/command.rs",
            "src/verifier/program/mod.rs",
            "src/verifier/workers.rs",
            "src/main.rs",
            "src/checkpoint/atomic.rs",
            "src/cost/figures.rs",
        ],
    ),
    ("signal_hook", &["src/train/interrupt.rs"]),
    ("backend::cpu", &["src/cli/", "src/backend/cpu/", "src/plan/"]),
    ("backend::cuda", &["src/cost/", "src/cli/", "src/plan/"]),
    ("ptxvm", &["src/device/vm.rs"]),
    ("cudarc", &["src/device/sys.rs"]),
];
/// Pure functions: no files, clocks, threads.
const PURE: [&str; 5] = ["src/objective/", "src/eval/", "src/page/", "src/rng.rs", "src/segments.rs"];

#[test]
fn what_few_may_use_the_others_do_not() {
    let (mut wrong, mut used) = (Vec::new(), BTreeSet::new());
    for (path, lines) in sources() {
        for (n, line) in &lines {
            for (text, places) in PRIVILEGES.iter().filter(|(text, _)| line.contains(text)) {
                match places.iter().find(|place| path.starts_with(**place)) {
                    Some(place) => drop(used.insert((*text, *place))),
                    None => wrong.push(format!("{path}:{n}: {text}")),
                }
            }
            let impure = ["std::fs", "std::io", "std::net", "std::thread", "std::time"];
            if PURE.iter().any(|place| path.starts_with(place)) && impure.iter().any(|m| line.contains(m)) {
                wrong.push(format!("{path}:{n}: this file is pure: {}", line.trim()));
            }
        }
    }
    assert_none("not allowed here", wrong);
    let granted =
        PRIVILEGES.iter().flat_map(|(text, places)| places.iter().map(move |place| (*text, *place)));
    let idle: Vec<String> = granted.filter(|p| !used.contains(p)).map(|p| format!("{p:?}")).collect();
    assert_none("privileges that nobody uses", idle);
}

/// A test in a file that no other file declares would not run, and nobody would hear of it.
#[test]
fn every_file_of_rust_is_declared() {
    let crates = ["tools/ptxvm", "tools/vcuda", "tools/vcudart"]
        .map(|of| [format!("{of}/src"), format!("{of}/tests")]);
    let mut undeclared = Vec::new();
    for top in ["src", "tests/suite"].map(str::to_owned).iter().chain(crates.as_flattened()) {
        for path in files(top).into_iter().filter(|path| path.ends_with(".rs")) {
            // A folder is declared where its mod.rs is.
            let module = path.trim_end_matches(".rs").trim_end_matches("/mod");
            let (dir, name) = module.rsplit_once('/').unwrap();
            let declares = |parent: &str| {
                let text = fs::read_to_string(root().join(dir).join(parent)).unwrap_or_default();
                text.lines().any(|line| line.ends_with(&format!("mod {name};")))
            };
            let roots = ["lib", "main"].contains(&name);
            let parents = ["mod.rs", "lib.rs", "main.rs", "../main.rs"];
            if !roots && !parents.into_iter().any(declares) {
                undeclared.push(path);
            }
        }
    }
    assert_none("files that no file declares", undeclared);
}

/// Stems of the files with this extension in a directory, but for some.
fn stems(dir: &str, extension: &str, other: &[&str]) -> BTreeSet<String> {
    let paths = files(dir).into_iter().map(PathBuf::from);
    let stem = |path: PathBuf| path.file_stem().unwrap().to_str().unwrap().to_owned();
    paths
        .filter(|path| path.extension().is_some_and(|e| e == extension))
        .map(stem)
        .filter(|stem| !other.contains(&stem.as_str()))
        .collect()
}

#[test]
fn one_stem_per_op() {
    assert_eq!(
        stems("src/backend/cpu", "rs", &["mod", "simd", "form", "packed", "sums", "tasks"]),
        stems("tests/suite/ops", "rs", &["mod"])
    );
}

#[test]
fn one_stem_per_kernel_file() {
    let kernels = stems("kernels", "cu", &[]);
    let launchers = ["mod", "chains", "entries", "offload", "sections", "tables"];
    assert_eq!(kernels, stems("src/backend/cuda", "rs", &launchers));
    assert_eq!(kernels, stems("src/cost/workloads", "rs", &["mod"]));
    assert_eq!(kernels, stems("tests/suite/kernels", "rs", &["mod", "bf16_gradients", "resources"]));
    // A kernel file is an op, or a part of one.
    let ops = stems("src/backend/cpu", "rs", &["mod", "simd", "form", "packed", "sums", "tasks"]);
    let part = |stem: &String| ops.iter().any(|op| stem == op || stem.starts_with(&format!("{op}_")));
    assert!(kernels.iter().all(part), "{kernels:?} are not all parts of {ops:?}");
}

// ------------------------------------------------------------------------------------------ documents and the truth

const DOCUMENTS: [&str; 7] = [
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "kernels/README.md",
    "tools/gpu_kit/README.md",
    "tools/reference/README.md",
    "examples/reference.toml",
];
/// The top of a path that stands in the repository; `.cache`, `runs` and `target` are made by commands.
const TOPS: [&str; 7] = ["src/", "tests/", "tools/", "benches/", "examples/", "kernels/", ".ci/"];

#[test]
fn paths_and_targets_in_documents_exist() {
    let makefile = read("Makefile");
    let (mut wrong, mut seen) = (Vec::new(), 0);
    for document in DOCUMENTS.into_iter().chain(["src/lib.rs", "Makefile", ".ci/run"]) {
        let text = read(document);
        for (i, line) in text.lines().enumerate() {
            for word in line.split(|c: char| c.is_whitespace() || "`()[]\"',;".contains(c)) {
                // `src/<name>.rs` speaks of any file in src.
                let path = word.split('<').next().unwrap().trim_end_matches(['.', ':']);
                if TOPS.iter().any(|top| path.starts_with(top)) {
                    seen += 1;
                    if !root().join(path).exists() {
                        wrong.push(format!("{document}:{}: no {path}", i + 1));
                    }
                }
            }
            for target in line.split("`make ").skip(1).filter_map(|rest| rest.split(['`', ' ']).next()) {
                seen += 1;
                if !makefile.contains(&format!("\n{target}:")) {
                    wrong.push(format!("{document}:{}: the Makefile has no target {target}", i + 1));
                }
            }
        }
        for link in text.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            let file = link.split('#').next().unwrap();
            let base = root().join(document).parent().unwrap().join(file);
            if !link.contains("://") && document.ends_with(".md") && !base.exists() {
                wrong.push(format!("{document}: the link {link} leads nowhere"));
            }
        }
    }
    assert!(seen > 30, "only {seen} paths were seen");
    assert_none("documents name what does not exist", wrong);
}

/// A trap that no test holds is a promise.
#[test]
fn known_traps_name_tests_that_exist() {
    let text = read("tests/KNOWN_GEMMA_TRAPS.md");
    let rows: Vec<&str> = text.lines().filter(|line| line.ends_with("` |")).collect();
    assert!(rows.len() > 20, "a test in every row");
    assert_eq!(
        text.lines().filter(|line| line.starts_with("| ")).count(),
        rows.len() + 4,
        "beside the headings"
    );
    let missing = |row: &&str| {
        let name = row.rsplit('`').nth(1).expect("it ends with one");
        let (modules, function) = name.rsplit_once("::").expect("a module's test");
        let file = format!("tests/suite/{}.rs", modules.replace("::", "/"));
        (!read(&file).contains(&format!("\nfn {function}() {{"))).then(|| format!("{name}: not in {file}"))
    };
    assert_none("tests that do not exist", rows.iter().filter_map(missing).collect());
}

/// Fenced blocks of a Markdown text, each with the line before it.
fn blocks(text: &str) -> Vec<(String, String)> {
    let (mut found, mut before) = (Vec::new(), "");
    let mut lines = text.lines();
    while let Some(line) = lines.next() {
        if line.starts_with("```") {
            let block = lines.by_ref().take_while(|line| !line.starts_with("```"));
            found.push((before.to_owned(), block.map(|line| format!("{line}\n")).collect()));
        }
        before = if line.is_empty() { before } else { line };
    }
    found
}

#[test]
fn the_readme_shows_files_as_they_are() {
    let mut shown = BTreeSet::new();
    for (before, block) in blocks(&read("README.md")) {
        if let Some(path) = before.strip_prefix('`').and_then(|b| b.strip_suffix("`:")) {
            assert_eq!(block, read(path), "README.md shows another {path} than there is");
            shown.insert(path.to_owned());
        }
    }
    assert_eq!(Vec::from_iter(shown), ["examples/minimal.toml", "examples/verify.py"]);
}

#[test]
fn the_readme_shows_what_weigh_prints() {
    let readme = read("README.md");
    let mut lines = readme.lines();
    let mut count = 0;
    while let Some(line) = lines.next() {
        let Some((input, arguments)) =
            line.strip_prefix("$ echo '").and_then(|rest| rest.split_once("' | bon-engine "))
        else {
            continue;
        };
        let run = assert_cmd::Command::new(crate::places::program())
            .args(arguments.split(' '))
            .write_stdin(format!("{input}\n"))
            .assert()
            .success();
        let output = String::from_utf8(run.get_output().stdout.clone()).unwrap();
        assert_eq!(Some(output.trim_end()), lines.next(), "{line}");
        count += 1;
    }
    assert!(count > 0, "the README has no example of weigh");
}

#[test]
fn the_changelog_speaks_of_this_version() {
    let heading = format!("\n## {}", env!("CARGO_PKG_VERSION"));
    assert!(read("CHANGELOG.md").contains(&heading), "CHANGELOG.md has no section{heading}");
}

// -------------------------------------------------------------------------------------- the configuration reference

const REFERENCE: &str = "examples/reference.toml";
/// What a run must be told; all else in the reference stands at its default.
const REQUIRED: [&str; 7] = [
    "model.path",
    "data.tasks",
    "objective.kind",
    "objective.n",
    "verifier.kind",
    "train.steps",
    "train.output",
];

#[test]
fn objectives_are_listed_where_they_are_told_of() {
    let row = |kind: &Kind| {
        let Objective { coefficient, when, .. } = kind.objective();
        format!("| `{kind}` | {coefficient} | {when} |\n")
    };
    let table = "| kind | coefficient of a response | when |\n|---|---|---|\n".to_owned()
        + &Kind::ALL.iter().map(row).collect::<String>()
        + "\n";
    assert!(read("README.md").contains(&table), "README.md does not hold the table\n{table}");
    let names = Kind::ALL.iter().map(|kind| format!("\"{kind}\"")).collect::<Vec<_>>().join(", ");
    assert!(
        read(REFERENCE).contains(&format!("# Required. One of {names}.\n")),
        "{REFERENCE} does not list {names}"
    );
    for sentence in [
        format!("# Required by all kinds but {}. N of Best-of-N.\n", Kind::listed(|of| !of.needs_n)),
        format!("# Required by every objective but {}.\n", Kind::listed(|of| !of.needs_samples)),
    ] {
        assert!(read(REFERENCE).contains(&sentence), "{REFERENCE} does not say: {sentence}");
    }
    // A setting that no objective reads could not be set, and one that is not in the list could not be read.
    let taken: BTreeSet<&str> =
        Kind::ALL.iter().flat_map(|k| [k.objective().required, k.objective().optional].concat()).collect();
    let settings: BTreeSet<&str> =
        ObjectiveConfig::new(Kind::Sft, None).settings().into_iter().map(|(name, _)| name).collect();
    assert_eq!(taken, settings);
}

/// One `[section]` of the reference with its `key = value` lines. `#key = value` is a setting that is unset.
#[derive(Debug, Default)]
struct Section {
    name: String,
    live: bool,
    /// Text of the line without its `#`, and whether it had none.
    settings: Vec<(String, bool)>,
}

impl Section {
    fn toml(&self, keep: impl Fn(&str, bool) -> bool) -> String {
        let lines = self.settings.iter().filter(|(line, live)| keep(line, *live));
        format!("[{}]\n", self.name) + &lines.map(|(line, _)| format!("{line}\n")).collect::<String>()
    }

    fn keys(&self) -> BTreeSet<String> {
        self.settings.iter().map(|(line, _)| key(line).to_owned()).collect()
    }
}

fn key(line: &str) -> &str {
    line.split(" = ").next().unwrap()
}

fn reference() -> Vec<Section> {
    let mut sections: Vec<Section> = Vec::new();
    for line in read(REFERENCE).lines() {
        let (code, live) = line.strip_prefix('#').map_or((line, true), |code| (code, false));
        if code.starts_with(' ') || code.is_empty() {
            continue;
        }
        match code.strip_prefix('[').and_then(|c| c.strip_suffix(']')) {
            Some(name) => sections.push(Section { name: name.to_owned(), live, settings: vec![] }),
            None => sections.last_mut().unwrap().settings.push((code.to_owned(), live)),
        }
    }
    sections
}

fn parse(text: &str) -> TrainConfig {
    TrainConfig::parse(REFERENCE, text, &[]).unwrap_or_else(|e| panic!("{e}\n{text}"))
}

/// The names that may stand at a place, from the complaint about one that never does.
fn known(text: &str) -> BTreeSet<String> {
    let message = TrainConfig::parse(REFERENCE, text, &[]).unwrap_err().to_string();
    if message.contains("none is known here") {
        return BTreeSet::new();
    }
    let (_, names) = message.split_once("known: ").unwrap_or_else(|| panic!("{text}: {message}"));
    names.split(", ").map(str::to_owned).collect()
}

#[test]
fn the_reference_names_every_key_and_no_other() {
    let sections = reference();
    let names: BTreeSet<String> = sections.iter().map(|s| s.name.clone()).collect();
    assert_eq!(names, known("[zzzz]"));
    for name in &names {
        if !["verifier", "environment"].contains(&name.as_str()) {
            let keys: BTreeSet<String> =
                sections.iter().filter(|s| s.name == *name).flat_map(Section::keys).collect();
            assert_eq!(keys, known(&format!("[{name}]\nzzzz = 1")), "[{name}]");
        }
    }
    let mut kinds = BTreeMap::new();
    for section in sections.iter().filter(|s| ["verifier", "environment"].contains(&s.name.as_str())) {
        let kind = section.settings.iter().find_map(|(line, _)| line.strip_prefix("kind = ")).unwrap();
        let mut keys = section.keys();
        keys.remove("kind");
        let top = format!("[{}]\nkind = {kind}\n", section.name);
        assert_eq!(keys, known(&format!("{top}zzzz = 1")), "{top}");
        kinds.insert(kind.trim_matches('"').to_owned(), keys);
    }
    let kinds: BTreeSet<String> = kinds.into_keys().collect();
    assert_eq!(kinds, known("[verifier]\nkind = \"zzzz\""));
    let readme = read("README.md");
    let table = readme.split("\n## Verifiers\n").nth(1).unwrap().split("\n\n").next().unwrap();
    let rows: BTreeSet<String> = table
        .lines()
        .filter_map(|line| line.strip_prefix("| `")?.split('`').next())
        .map(str::to_owned)
        .collect();
    assert_eq!(kinds, rows, "the kinds, and the rows of README.md's table of verifiers");
}

#[test]
fn the_reference_stands_at_the_defaults_and_what_it_leaves_unset_can_be_set() {
    let sections = reference();
    let live = || sections.iter().filter(|s| s.live);
    let whole = parse(&live().map(|s| s.toml(|_, live| live)).collect::<String>());
    let required = |section: &Section, line: &str| {
        let path = format!("{}.{}", section.name, key(line));
        REQUIRED.contains(&path.as_str())
    };
    let least = parse(&live().map(|s| s.toml(|line, live| live && required(s, line))).collect::<String>());
    assert_eq!(whole.to_toml().unwrap(), least.to_toml().unwrap());

    for section in &sections {
        let others: String =
            live().filter(|s| s.name != section.name).map(|s| s.toml(|_, live| live)).collect();
        if !section.live {
            // Another kind of verifier, with all its settings.
            assert_ne!(parse(&(others + &section.toml(|_, _| true))), whole, "{section:?}");
            continue;
        }
        for (unset, _) in section.settings.iter().filter(|(_, live)| !live) {
            let text = section.toml(|line, live| live || line == unset);
            assert_ne!(parse(&(others.clone() + &text)), whole, "{unset}");
        }
    }
}

#[test]
fn the_reference_names_every_value_that_is_a_word() {
    let text = read(REFERENCE);
    let mut missing = Vec::new();
    for place in [
        "[model]\ndtype",
        "[model]\ncompute",
        "[data]\ntemplate",
        "[objective]\nkind",
        "[objective]\nestimator",
        "[objective]\nnegative_sign",
        "[objective]\nselector",
        "[objective]\nreward",
        "[objective]\nbaseline",
        "[verifier]\nkind = \"numeric\"\npick",
        "[verifier]\nkind = \"program\"\ncode",
        "[verifier]\nkind = \"program\"\nisolation",
        "[optimizer]\nschedule",
        "[train]\nlength_normalizer",
        "[train]\nrecompute",
    ] {
        let words = known(&format!("{place} = \"zzzz\""));
        assert!(words.len() > 1, "{place}");
        missing.extend(words.into_iter().filter(|w| !text.contains(&format!("\"{w}\""))));
    }
    assert_none("values that the reference does not name", missing);
}

// --------------------------------------------------------------------------------------------- manners and packages

#[test]
fn nothing_is_left_to_do_and_no_package_host_is_named() {
    // In pieces, so that this file may be searched like the others.
    let words = [
        concat!("TO", "DO"),
        concat!("FIX", "ME"),
        concat!("XX", "X"),
        concat!("index", "-url"),
        concat!("find", "-links"),
        concat!("pypi", ".org"),
        concat!("pythonhosted", ".org"),
        concat!("static.crates", ".io"),
        concat!("huggingface", ".co/"),
    ];
    let mut wrong = Vec::new();
    let tops = [
        "src",
        "kernels",
        "tests",
        "tools",
        "benches",
        "examples",
        ".ci",
        "build",
        "build.rs",
        "Makefile",
        "Cargo.toml",
    ];
    let listed = tops.into_iter().flat_map(files).chain(DOCUMENTS.map(str::to_owned));
    for path in listed.filter(|path| !path.ends_with("tokenizer.json")) {
        for (i, line) in read(&path).lines().enumerate() {
            wrong.extend(
                words.iter().filter(|w| line.contains(**w)).map(|w| format!("{path}:{}: {w}", i + 1)),
            );
        }
    }
    assert_none("not in a finished project", wrong);
}

#[test]
fn dependencies_say_what_they_are_for_and_come_from_one_place() {
    let manifest = read("Cargo.toml");
    let mut silent = Vec::new();
    let mut section = "";
    for line in manifest.lines() {
        match line {
            _ if line.starts_with('[') => section = line,
            _ if !line.contains(" = ") || !section.ends_with("dependencies]") => {}
            _ if line.contains(" # ") => {}
            _ => silent.push(line.to_owned()),
        }
    }
    assert_none("dependencies without a word on what they are for", silent);

    let locked = read("Cargo.lock");
    let foreign: Vec<String> = locked
        .lines()
        .filter(|line| line.starts_with("source = "))
        .filter(|line| !line.starts_with("source = \"registry+"))
        .map(str::to_owned)
        .collect();
    assert_none("packages from elsewhere", foreign);
}
