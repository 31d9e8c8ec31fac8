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

/// (method, `op::launcher`) of all methods of `impl Backend for Cuda` that call a launcher.
fn launching_methods() -> BTreeSet<(String, String)> {
    let source = read("src/backend/cuda/mod.rs");
    let body = source.split("impl Backend for Cuda {").nth(1).unwrap().split("\n}\n").next().unwrap();
    let mut found = BTreeSet::new();
    let (methods, launched) = body.split_once("launched! {").unwrap();
    // `op::launcher is method(...)`
    for (before, after) in launched.lines().filter_map(|line| line.trim().split_once(" is ")) {
        let known = MODULES.iter().any(|module| before.starts_with(&format!("{}::", module.name)));
        if known {
            found.insert((after.split('(').next().unwrap().to_owned(), before.to_owned()));
        }
    }
    for method in methods.split("\n    fn ").skip(1) {
        let name = method.split(['(', '<']).next().unwrap();
        for module in MODULES {
            let call = format!("{}::", module.name);
            for (at, _) in method.match_indices(&call) {
                let whole = !method[..at].ends_with(|c: char| c.is_alphanumeric() || c == '_');
                let launcher = method[at + call.len()..].split('(').next().unwrap();
                if whole && launcher.chars().all(|c| c.is_ascii_lowercase() || c == '_') {
                    found.insert((name.to_owned(), format!("{call}{launcher}")));
                }
            }
        }
    }
    assert!(found.len() > 20, "{found:?}");
    found
}

#[test]
fn the_table_of_methods_is_that_of_the_tree() {
    let readme = read("kernels/README.md");
    let section =
        readme.split("## From a method to its tests").nth(1).unwrap().split("\n## ").next().unwrap();
    let modules = read("tests/suite/kernels/mod.rs");
    let (mut rows, mut covered) = (BTreeSet::new(), BTreeSet::new());
    for line in section.lines().filter(|line| line.starts_with("| `") && line.contains(" : ")) {
        let cells: Vec<&str> = line.trim_matches('|').split(" | ").collect();
        let [methods, entries, launcher, tests] = cells[..] else { panic!("four cells: {line}") };
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
        let launcher = names(launcher)[0];
        let (op, function) = launcher.split_once("::").unwrap();
        assert!(has_function(&launchers(op), function), "no {launcher}: {line}");
        for tests in names(tests) {
            assert!(modules.contains(&format!("\nmod {tests};")), "no tests {tests}: {line}");
        }
        rows.extend(names(methods).into_iter().map(|method| (method.to_owned(), launcher.to_owned())));
    }
    assert_eq!(
        rows,
        launching_methods(),
        "methods and launchers: the table's, and those of impl Backend for Cuda"
    );
    let all = MODULES.iter().flat_map(|m| m.entries).map(|e| e.name());
    let missing: Vec<&str> = all.filter(|name| !covered.contains(name)).collect();
    assert!(missing.is_empty(), "entry points that no line of the table names: {missing:?}");
}

/// `// Launched by cuda/op.rs: function; grid (..), N threads.` stands in the comment above each entry point or family; the file has
/// the function and names the entry point, and N is the number of its launch bounds.
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
