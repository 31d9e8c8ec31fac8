//! Who may know whom: the map at the head of `src/lib.rs`, held to the code.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

/// Files of the library below a folder of `src`, by their path from there, with their code: without comments, and
/// without unit tests. The program (`main.rs`, `cli`) is another crate.
fn sources(folder: &Path, found: &mut BTreeMap<String, String>) {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    for entry in fs::read_dir(root.join(folder)).unwrap() {
        let path = folder.join(entry.unwrap().file_name());
        let name = path.to_str().unwrap().to_owned();
        if root.join(&path).is_dir() {
            if name != "cli" {
                sources(&path, found);
            }
        } else if name != "main.rs" && name != "lib.rs" {
            let text = fs::read_to_string(root.join(&path)).unwrap();
            let code = text.lines().take_while(|line| line.trim() != "#[cfg(test)]");
            let code: Vec<&str> = code.map(|line| line.split("//").next().unwrap().trim()).collect();
            found.insert(name, code.join(" "));
        }
    }
}

/// The module of a file: `ops/matrix/mod.rs` is `ops::matrix`.
fn module(file: &str) -> String {
    file.trim_end_matches(".rs").trim_end_matches("/mod").replace('/', "::")
}

/// The paths that `text` begins with, as far as they are lower-case: `a::{b::C, d}` gives `a::b` and `a::d`.
fn paths(text: &str, prefix: &str, found: &mut Vec<String>) {
    let text = text.trim_start();
    if let Some(group) = text.strip_prefix('{') {
        let mut depth = 0;
        let end = group.find(|c| {
            depth += i32::from(c == '{') - i32::from(c == '}');
            depth < 0
        });
        let mut depth = 0;
        let items = group[..end.unwrap()].split(|c| {
            depth += i32::from(c == '{') - i32::from(c == '}');
            c == ',' && depth == 0
        });
        return items.for_each(|item| paths(item, prefix, found));
    }
    let end = text.find(|c: char| !(c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_'));
    let (word, rest) = text.split_at(end.unwrap_or(text.len()));
    let path =
        if word.is_empty() || word == "self" { prefix.to_owned() } else { format!("{prefix}::{word}") };
    match rest.strip_prefix("::") {
        Some(rest) if !word.is_empty() => paths(rest, &path, found),
        _ => found.push(path),
    }
}

/// For every module, the modules that its code names, and of which it is no parent that only declares them.
fn arrows() -> BTreeMap<String, BTreeSet<String>> {
    let mut files = BTreeMap::new();
    sources(Path::new(""), &mut files);
    let modules: BTreeSet<String> = files.keys().map(|file| module(file)).collect();
    let arrow = |(file, code): (&String, &String)| {
        let own = module(file);
        let parent =
            |path: &str| path.rsplit_once("::").map_or(String::new(), |(parent, _)| parent.to_owned());
        let mut named = Vec::new();
        let mut starts = vec![("crate::".to_owned(), String::new()), ("self::".to_owned(), own.clone())];
        starts.push(("super::".to_owned(), parent(&own)));
        // A parent names its children as they are.
        let children = modules.iter().filter(|m| parent(m) == own);
        starts.extend(
            children.map(|child| (format!("{}::", child.rsplit("::").next().unwrap()), child.clone())),
        );
        for (start, prefix) in &starts {
            for (at, _) in code.match_indices(start.as_str()) {
                let before = code[..at].chars().next_back().unwrap_or(' ');
                if !before.is_alphanumeric() && before != '_' && before != ':' {
                    let from = named.len();
                    paths(&code[at + start.len()..], prefix, &mut named);
                    assert!(!named[from..].iter().any(|path| path.contains("super")), "{file}: super::super");
                }
            }
        }
        // Of `a::b::function` the longest part that is a module.
        let known = |path: String| {
            let mut path = path.trim_start_matches("::").to_owned();
            while !path.is_empty() && !modules.contains(&path) {
                path = parent(&path);
            }
            path
        };
        let named = named.into_iter().map(known).filter(|path| !path.is_empty() && *path != own).collect();
        (own, named)
    };
    files.iter().map(arrow).collect()
}

/// The modules that the map lists, from the bottom up.
fn layers() -> Vec<&'static str> {
    let text = include_str!("../../src/lib.rs");
    let map = text.split("# Code map").nth(1).and_then(|t| t.split("# Invariants").next()).unwrap();
    let lines = map.lines().filter_map(|line| line.strip_prefix("//! - [`"));
    lines.map(|line| line.split('`').next().unwrap()).collect()
}

#[test]
fn the_code_map_lists_the_modules() {
    let text = include_str!("../../src/lib.rs");
    let declared = text.lines().filter_map(|l| l.strip_prefix("pub mod ")?.strip_suffix(';'));
    assert_eq!(declared.collect::<BTreeSet<_>>(), layers().into_iter().collect());
}

#[test]
fn modules_name_only_those_before_them_in_the_map() {
    let layers = layers();
    let top = |module: &str| module.split("::").next().unwrap().to_owned();
    let floor = |module: &str| layers.iter().position(|layer| *layer == top(module)).unwrap();
    let (mut wrong, mut seen) = (Vec::new(), 0);
    for (from, named) in arrows() {
        for to in named.iter().filter(|to| top(to) != top(&from)) {
            seen += 1;
            if floor(to) > floor(&from) {
                wrong.push(format!("{from} names {to}"));
            }
        }
    }
    assert!(seen > 100, "only {seen} arrows were seen");
    assert!(wrong.is_empty(), "arrows that point up:\n  {}", wrong.join("\n  "));
}

#[test]
fn only_the_machine_has_a_circle() {
    let mut arrows = arrows();
    // Whoever names nobody is on no circle, nor is whom nobody names; what is left are circles and ways between them.
    loop {
        let named: BTreeSet<String> = arrows.values().flatten().cloned().collect();
        let before = arrows.len();
        arrows.retain(|module, to| !to.is_empty() && named.contains(module));
        let left: BTreeSet<String> = arrows.keys().cloned().collect();
        arrows.values_mut().for_each(|to| to.retain(|module| left.contains(module)));
        if arrows.len() == before {
            break;
        }
    }
    assert!(arrows.contains_key("machine::context"), "an instruction's context knows the warp that runs it");
    let others: Vec<_> = arrows.iter().filter(|(module, _)| !module.starts_with("machine::")).collect();
    assert!(others.is_empty(), "circles outside machine: {others:#?}");
}
