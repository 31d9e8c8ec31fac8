//! Who may know whom: the map at the head of `src/lib.rs`, held to the code.

use std::collections::BTreeSet;
use std::path::Path;

use crate::arrows::{arrows, circles};

/// For every module of the library, those that its code names. The program (`main.rs`, `cli`) is another crate.
fn library() -> crate::arrows::Arrows {
    arrows(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src"), &["cli", "main.rs", "lib.rs"])
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
    for (from, named) in library() {
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
    let arrows = circles(library());
    assert!(arrows.contains_key("machine::context"), "an instruction's context knows the warp that runs it");
    let others: Vec<_> = arrows.iter().filter(|(module, _)| !module.starts_with("machine::")).collect();
    assert!(others.is_empty(), "circles outside machine: {others:#?}");
}
