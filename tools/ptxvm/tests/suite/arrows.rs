//! Which module names which, read from the source. The engine's tests use it as well.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

/// For every module, the modules that its code names.
pub(crate) type Arrows = BTreeMap<String, BTreeSet<String>>;

/// Files below a folder of `root`, by their path from there, with their code: without comments, and without unit tests.
fn sources(root: &Path, skipped: &[&str], folder: &Path, found: &mut BTreeMap<String, String>) {
    for entry in fs::read_dir(root.join(folder)).unwrap() {
        let path = folder.join(entry.unwrap().file_name());
        let name = path.to_str().unwrap().to_owned();
        if root.join(&path).is_dir() {
            if !skipped.contains(&name.as_str()) {
                sources(root, skipped, &path, found);
            }
        } else if !skipped.contains(&name.as_str()) {
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

/// The modules that the files below `root` name, but for the files and folders `skipped`. Of those of which it is the
/// parent a module has the ones that it uses, not those that it only declares.
pub(crate) fn arrows(root: &Path, skipped: &[&str]) -> Arrows {
    let mut files = BTreeMap::new();
    sources(root, skipped, Path::new(""), &mut files);
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

/// The arrows of circles and of ways between them: whoever names nobody is on no circle, nor is whom nobody names.
pub(crate) fn circles(mut arrows: Arrows) -> Arrows {
    loop {
        let named: BTreeSet<String> = arrows.values().flatten().cloned().collect();
        let before = arrows.len();
        arrows.retain(|module, to| !to.is_empty() && named.contains(module));
        let left: BTreeSet<String> = arrows.keys().cloned().collect();
        arrows.values_mut().for_each(|to| to.retain(|module| left.contains(module)));
        if arrows.len() == before {
            return arrows;
        }
    }
}
