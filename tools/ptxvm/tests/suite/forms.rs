//! What runs and what does not, form by form: `tests/forms.txt` lists the forms of PTX's instructions, the real assembler says that
//! they are PTX, ptxvm whether it takes them, and the README's table must say the same.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;

use ptxvm::error::ErrorKind;
use ptxvm::{Error, Module};

use crate::toolchain;

/// A line of the list: an instruction with its modifiers, in one or several spellings.
struct Form {
    family: String,
    target: String,
    /// As listed, without operands.
    pattern: String,
    /// Each spelling with operands.
    texts: Vec<String>,
}

/// All texts that `<a|b>` stands for.
fn spellings(text: &str) -> Vec<String> {
    let Some((head, rest)) = text.split_once('<') else { return vec![text.to_owned()] };
    let (choice, tail) = rest.split_once('>').expect("a closing mark");
    let tails = spellings(tail);
    choice.split('|').flat_map(|one| tails.iter().map(move |tail| format!("{head}{one}{tail}"))).collect()
}

fn forms() -> Vec<Form> {
    let list = include_str!("../forms.txt");
    let (mut family, mut target) = (String::new(), String::new());
    let mut all = Vec::new();
    for line in list.lines().filter(|line| !line.is_empty() && !line.starts_with('#')) {
        if let Some(name) = line.strip_prefix("= ") {
            family = name.to_owned();
        } else if let Some(name) = line.strip_prefix("@ ") {
            target = name.to_owned();
        } else {
            let pattern = line.split(' ').next().unwrap().to_owned();
            let texts = spellings(line);
            all.push(Form { family: family.clone(), target: target.clone(), pattern, texts });
        }
    }
    all
}

/// Everything that operands name; `forms` stand one after another.
fn module(target: &str, forms: &[&str]) -> String {
    let body: String = forms.iter().map(|form| format!("    {form};\n")).collect();
    format!(
        ".version 9.2\n.target {target}\n.address_size 64\n.const .b32 c;\n.visible .entry k(.param .b32 x)\n{{\n    \
         .reg .pred %p<4>;\n    .reg .b8 %b<3>;\n    .reg .b16 %h<5>;\n    .reg .b32 %r<17>;\n    .reg .b64 %d<9>;\n    \
         .reg .b64 %a<2>;\n    .reg .b128 %q<4>;\n    .local .b32 l;\n{body}    ret;\n}}\n"
    )
}

/// Why the machine does not take a form, if it does not.
fn refusal(form: &Form, text: &str) -> Option<String> {
    match Module::load("form.ptx", &module(&form.target, &[text])) {
        Ok(_) => None,
        Err(Error::Unsupported(found)) => Some(found[0].message.clone()),
        Err(e) => panic!("`{text}` is PTX, and refused as what is not: {e}"),
    }
}

/// In the README's spelling.
fn written(pattern: &str) -> String {
    format!("`{}`", pattern.replace('<', "{").replace('>', "}").replace('|', ","))
}

/// The table, from what the machine says.
fn table() -> String {
    let mut families: Vec<String> = Vec::new();
    let mut opcodes: BTreeMap<String, (usize, Vec<String>)> = BTreeMap::new();
    let mut refused: BTreeMap<String, Vec<String>> = BTreeMap::new();
    let mut mixed = String::new();
    for form in forms() {
        if !families.contains(&form.family) {
            families.push(form.family.clone());
        }
        let why: Vec<Option<String>> = form.texts.iter().map(|text| refusal(&form, text)).collect();
        let n = why.iter().flatten().count();
        if n == 0 {
            let (count, names) = opcodes.entry(form.family.clone()).or_default();
            *count += form.texts.len();
            for text in &form.texts {
                let name = text.split(['.', ' ']).next().unwrap().to_owned();
                if !names.contains(&name) {
                    names.push(name);
                }
            }
        } else if n == form.texts.len() {
            refused.entry(form.family.clone()).or_default().push(written(&form.pattern));
        } else {
            for (text, _) in form.texts.iter().zip(&why).filter(|(_, why)| why.is_some()) {
                writeln!(mixed, "{text}").unwrap();
            }
        }
        for (text, message) in form.texts.iter().zip(&why).filter_map(|(t, w)| Some((t, w.as_ref()?))) {
            let opcode = text.split(['.', ' ', '<']).next().unwrap();
            assert!(message.contains(opcode), "`{text}` is refused without its name: {message}");
        }
    }
    assert!(mixed.is_empty(), "of a line of forms.txt some run and some do not; these do not:\n{mixed}");
    let mut table = "| family | runs | refused |\n|---|---|---|\n".to_owned();
    for family in families {
        let runs = opcodes.get(&family).map_or_else(String::new, |(count, names)| {
            let names: Vec<String> = names.iter().map(|name| format!("`{name}`")).collect();
            format!("{count} forms of {}", names.join(", "))
        });
        let refused = refused.get(&family).map_or_else(String::new, |all| all.join(", "));
        writeln!(table, "| {family} | {runs} | {refused} |").unwrap();
    }
    table
}

/// The README's table is what the machine says.
#[test]
fn the_readme_lists_what_runs() {
    let readme = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("README.md")).unwrap();
    let table = table();
    assert!(readme.contains(&table), "README.md must have this table:\n\n{table}");
}

/// What is not PTX at all is an error of the program, and never counts as a form that the machine lacks.
#[test]
fn what_is_no_ptx_is_called_wrong() {
    for text in [
        "add.s32 %r1, %h2, %r3",
        "add.s32 %r1, %r2",
        "setp.eq.s32 %r1, %r2, %r3",
        "bar.sync",
        "mov.b32 %r1, %r99",
    ] {
        match Module::load("form.ptx", &module("sm_90a", &[text])) {
            Err(Error::Fault(found)) => assert_eq!(found[0].kind, ErrorKind::Invalid, "{text}"),
            other => panic!("{text}: {other:?}"),
        }
    }
}

/// The assembler takes each form for its target.
#[test]
fn the_forms_are_ptx() {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("forms");
    std::fs::create_dir_all(&folder).unwrap();
    let all = forms();
    let mut targets: Vec<&str> = all.iter().map(|form| form.target.as_str()).collect();
    targets.sort_unstable();
    targets.dedup();
    for target in targets {
        let here = all.iter().filter(|form| form.target == target);
        // Behind a form that ends a kernel nothing is left.
        let ends = |text: &&str| ["ret", "exit", "trap"].iter().any(|end| text.starts_with(end));
        let texts: Vec<&str> =
            here.flat_map(|form| &form.texts).map(String::as_str).filter(|text| !ends(text)).collect();
        let path = folder.join(format!("{target}.ptx"));
        std::fs::write(&path, module(target, &texts)).unwrap();
        toolchain::assemble(&path, target.strip_prefix("sm_").unwrap());
    }
}
