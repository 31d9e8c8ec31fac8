//! What kernels/README.md and the line above each kernel say of methods, entry points, launchers and tests is so.

use std::collections::BTreeSet;
use std::fs;

use bon_engine::backend::cuda::entries::{Entry, MODULES};

use crate::kernel_source::source::{EntryPoint, entries};
use crate::places::checkout;

fn read(path: &str) -> String {
    fs::read_to_string(checkout().join(path)).unwrap_or_else(|e| panic!("{path}: {e}"))
}

fn launchers(stem: &str) -> String {
    read(&format!("src/backend/cuda/{stem}.rs"))
}

fn has_function(source: &str, name: &str) -> bool {
    source.contains(&format!("fn {name}(")) || source.contains(&format!("fn {name}<"))
}

/// The names in backticks of a table's cell.
fn names(cell: &str) -> Vec<&str> {
    cell.split('`').skip(1).step_by(2).collect()
}

/// The methods of every op: those of the traits in `src/backend/<op>.rs`, (op, trait, method).
fn ops() -> BTreeSet<(String, String, String)> {
    let mut found = BTreeSet::new();
    for module in MODULES {
        let source = read(&format!("src/backend/{}.rs", module.name));
        let (_, after) =
            source.split_once("\npub trait ").unwrap_or_else(|| panic!("{}: no trait", module.name));
        let (name, body) = after.split_once(": ").unwrap();
        for method in body.split("\n}").next().unwrap().split("\n    fn ").skip(1) {
            let method = method.split(['(', '<']).next().unwrap();
            found.insert((module.name.to_owned(), name.to_owned(), method.to_owned()));
        }
    }
    assert!(found.len() > 30, "{found:?}");
    found
}

/// What launches no kernel of its own.
const WITHOUT_KERNELS: [&str; 4] = ["draws", "take_draw", "lm_head_sample", "host_widened"];

#[test]
fn the_list_of_ops_is_that_of_the_traits() {
    let mut listed = BTreeSet::new();
    let mut name = String::new();
    for line in read("src/backend/mod.rs").lines().filter_map(|line| line.strip_prefix("//! |")) {
        let cells: Vec<&str> = line.trim_end_matches('|').split('|').collect();
        let [op, method, formula] = cells[..] else { continue };
        if let Some(op) = names(op).first() {
            name = (*op).to_owned();
        }
        if let Some(method) = names(method).first() {
            assert!(!formula.trim().is_empty(), "no formula: {line}");
            listed.insert((name.clone(), (*method).to_owned()));
        }
    }
    let methods: BTreeSet<_> = ops().into_iter().map(|(_, name, method)| (name, method)).collect();
    assert_eq!(
        listed, methods,
        "ops and methods: those that src/backend/mod.rs lists, and those of the traits"
    );
}

#[test]
fn the_table_of_methods_is_that_of_the_tree() {
    let readme = read("kernels/README.md");
    let section =
        readme.split("## From a method to its tests").nth(1).unwrap().split("\n## ").next().unwrap();
    let modules = read("tests/suite/kernels/mod.rs");
    let (mut rows, mut covered) = (BTreeSet::new(), BTreeSet::new());
    for line in section.lines().filter(|line| line.starts_with("| `") && line.matches(" : ").count() == 2) {
        let cells: Vec<&str> = line.trim_matches('|').split(" | ").collect();
        let [method, entries, tests] = cells[..] else { panic!("three cells: {line}") };
        let (file, entries) = entries.split_once(" : ").unwrap();
        let (file, entries) = (names(file)[0], names(entries));
        let module = MODULES.iter().find(|m| format!("{}.cu", m.name) == file);
        let module = module.unwrap_or_else(|| panic!("no kernels/{file}: {line}"));
        for entry in entries {
            let fits = |e: &&Entry| match entry.strip_suffix('*') {
                Some(beginning) => e.name().starts_with(beginning),
                None => e.name() == entry,
            };
            let found: Vec<&str> = module.entries.iter().filter(fits).map(|e| e.name()).collect();
            assert!(!found.is_empty(), "kernels/{file} has no {entry}: {line}");
            covered.extend(found);
        }
        for tests in names(tests) {
            assert!(modules.contains(&format!("\nmod {tests};")), "no tests {tests}: {line}");
        }
        let [op, method] = names(method)[..] else { panic!("op : method: {line}") };
        rows.insert((op.to_owned(), method.to_owned()));
    }
    let launching = ops().into_iter().filter(|(_, _, method)| !WITHOUT_KERNELS.contains(&method.as_str()));
    let launching: BTreeSet<_> = launching.map(|(op, _, method)| (op, method)).collect();
    assert_eq!(rows, launching, "ops and methods: the table's, and those of the traits in src/backend");
    let all = MODULES.iter().flat_map(|m| m.entries).map(|e| e.name());
    let missing: Vec<&str> = all.filter(|name| !covered.contains(name)).collect();
    assert!(missing.is_empty(), "entry points that no line of the table names: {missing:?}");
}

/// `// Launched by cuda/op.rs: function; grid (..), N threads.` stands in the comment above each entry point or family; the
/// file has the function and names the entry point, and N is the number of its launch bounds.
#[test]
fn every_kernel_names_its_launcher() {
    for module in MODULES {
        let source = read(&format!("kernels/{}.cu", module.name));
        let lines: Vec<&str> = source.lines().collect();
        let found = entries(&source).unwrap();
        assert_eq!(found.len(), module.entries.len(), "kernels/{}.cu", module.name);
        for (entry, EntryPoint { name, line, threads: bound }) in module.entries.iter().zip(&found) {
            assert_eq!(entry.name(), name);
            let what = format!("kernels/{}.cu: {name}", module.name);
            let above = lines[..line - 1].iter().rev();
            let line = above
                .take_while(|line| line.starts_with("//"))
                .find_map(|line| line.strip_prefix("// Launched by cuda/"))
                .unwrap_or_else(|| panic!("{what}: no line that begins with `// Launched by cuda/`"));
            let (file, rest) = line.split_once(".rs: ").unwrap_or_else(|| panic!("{what}: {line}"));
            let (function, rest) = rest.split_once("; grid (").unwrap_or_else(|| panic!("{what}: {line}"));
            let (_, threads) = rest.rsplit_once("), ").unwrap_or_else(|| panic!("{what}: {line}"));
            let launcher = launchers(file);
            assert!(has_function(&launcher, function), "{what}: no function {function} in {file}.rs");
            assert!(launcher.contains(&format!("Entry::{entry:?}")), "{what}: {file}.rs does not launch it");
            let threads = threads.strip_suffix(" threads.").unwrap_or_else(|| panic!("{what}: {line}"));
            // A formula says how many of those that the bounds allow, or what bounds and launcher have from one place.
            let Ok(number) = threads.rsplit(' ').next().unwrap().parse::<u32>() else { continue };
            assert_eq!(
                *bound,
                number.to_string(),
                "{what}: __launch_bounds__({bound}) and {threads} threads"
            );
        }
    }
}
