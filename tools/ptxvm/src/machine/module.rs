//! A module as the machine runs it: its program, its variables, and its text for reports.

use super::program::{Constant, Function, PlaceLine, Program, Refused};
use crate::error::{Finding, Place};

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
    /// Declarations of no use. Functions that use them are refused; those that do not can run.
    pub refused_declarations: Vec<Refused>,
}

impl Module {
    /// A line of the text.
    pub(crate) fn place_of_line(&self, line: u32) -> Place {
        let text = (line as usize).checked_sub(1).and_then(|i| self.text.lines().nth(i)).unwrap_or("");
        Place { file: self.name.clone(), line, text: shorten(text), ..Place::default() }
    }

    /// Where the instruction at `pc` stands.
    pub fn place(&self, pc: u32) -> Place {
        let inst = self.program.code.get(pc as usize);
        let line = inst.and_then(|i| self.program.places.get(i.place as usize)).copied().unwrap_or_default();
        let inlined_at = self.file_and_line(line.inlined_at);
        Place { source: self.source(line), inlined_at, ..self.place_of_line(line.line) }
    }

    /// `file:line` of the source that a line of the PTX came from, where the PTX tells.
    pub fn source(&self, line: PlaceLine) -> Option<String> {
        self.file_and_line(line.source)
    }

    fn file_and_line(&self, (file, number): (u32, u32)) -> Option<String> {
        let name = || self.files.iter().find(|(i, _)| *i == file).map_or("?", |(_, name)| name);
        (number > 0).then(|| format!("{}:{number}", name()))
    }

    /// What keeps a function from running, as findings.
    pub fn refused(&self, f: &Function) -> Vec<Finding> {
        let of_function = |refused| Finding { kernel: f.name.clone(), ..self.finding(refused) };
        f.refused.iter().map(of_function).collect()
    }

    /// All that is wrong or that the machine does not run, in the order of the text, each line once.
    pub(crate) fn all_refused(&self) -> Vec<Refused> {
        let of_functions = self.program.functions.iter().flat_map(|f| &f.refused);
        let mut all: Vec<Refused> = self.refused_declarations.iter().chain(of_functions).cloned().collect();
        all.sort_by(|a, b| (a.line, &a.message).cmp(&(b.line, &b.message)));
        all.dedup();
        all
    }

    /// A refused line as a finding.
    pub(crate) fn finding(&self, refused: &Refused) -> Finding {
        Finding::load(refused.kind, self.place_of_line(refused.line), refused.message.clone())
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
