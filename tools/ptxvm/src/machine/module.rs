//! A module as the machine runs it: its program, its variables, and its text for reports.

use super::program::{Constant, Function, PlaceLine, Program};
use crate::error::{ErrorKind, Finding, Place};

/// A global variable of a module.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GlobalVariable {
    /// Its name.
    pub name: String,
    /// How many bytes.
    pub bytes: u64,
    /// Initial values: bytes at offsets; the rest is 0.
    pub init: Vec<(u64, Vec<u8>)>,
    /// Addresses that it holds: offset and value.
    pub pointers: Vec<(u64, Constant)>,
}

/// A decoded module, on no device yet.
#[derive(Debug, Default)]
pub struct Module {
    /// As the caller named it.
    pub name: String,
    /// The text, for reports.
    pub text: String,
    /// Source files by their index in the text.
    pub files: Vec<(u32, String)>,
    /// The code.
    pub program: Program,
    /// Global variables, by the index in [`Constant::Global`].
    pub globals: Vec<GlobalVariable>,
    /// The constant bank.
    pub constants: Vec<u8>,
    /// Addresses that the constant bank holds.
    pub constant_pointers: Vec<(u64, Constant)>,
    /// Names of constant variables: offset and bytes.
    pub constant_names: Vec<(String, u32, u32)>,
}

impl Module {
    /// A line of the text.
    pub(crate) fn place_of_line(&self, line: u32) -> Place {
        let text = (line as usize).checked_sub(1).and_then(|i| self.text.lines().nth(i)).unwrap_or("");
        Place { file: self.name.clone(), line, text: shorten(text), source: None }
    }

    /// Where the instruction at `pc` stands.
    pub fn place(&self, pc: u32) -> Place {
        let inst = self.program.code.get(pc as usize);
        let line = inst.and_then(|i| self.program.places.get(i.place as usize)).copied().unwrap_or_default();
        Place { source: self.source(line), ..self.place_of_line(line.line) }
    }

    /// `file:line` of the source that a line of the PTX came from, where the PTX tells.
    pub fn source(&self, line: PlaceLine) -> Option<String> {
        let (file, number) = line.source;
        let name = || self.files.iter().find(|(i, _)| *i == file).map_or("?", |(_, name)| name);
        (number > 0).then(|| format!("{}:{number}", name()))
    }

    /// Unsupported instructions of a function, as findings.
    pub fn missing(&self, f: &Function) -> Vec<Finding> {
        let finding = |(line, message): &(u32, String)| {
            let mut finding =
                Finding::load(ErrorKind::Unsupported, self.place_of_line(*line), message.clone());
            finding.kernel.clone_from(&f.name);
            finding
        };
        f.missing.iter().map(finding).collect()
    }

    /// The kernels of the module.
    pub fn kernels(&self) -> impl Iterator<Item = &Function> {
        self.program.functions.iter().filter(|f| f.is_entry)
    }
}

/// A line of text without its margin, at most 120 characters long.
fn shorten(line: &str) -> String {
    let line = line.split_whitespace().collect::<Vec<_>>().join(" ");
    if line.chars().count() <= 120 { line } else { line.chars().take(117).chain("...".chars()).collect() }
}
