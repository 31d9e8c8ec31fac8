//! Modifiers of an instruction, each of which must be understood.

use super::{Refusal, unsupported};
use crate::ptx::ast::Instruction;
use crate::types::Type;

/// The modifiers of one instruction. Its decoder takes the ones it knows; [`Mods::finish`] refuses the instruction if any
/// is left, so that no modifier is ever ignored by accident.
pub struct Mods<'i, 'a> {
    inst: &'i Instruction<'a>,
    used: u64,
}

impl<'i, 'a> Mods<'i, 'a> {
    /// All modifiers of `inst`, none taken yet.
    pub fn new(inst: &'i Instruction<'a>) -> Self {
        Self { inst, used: 0 }
    }

    fn unused(&self) -> impl Iterator<Item = (usize, &'a str)> + '_ {
        // More modifiers than bits stay unused for ever and are refused at the end.
        let all = self.inst.modifiers.iter().copied().enumerate();
        all.filter(|(i, _)| *i >= 64 || self.used >> i & 1 == 0)
    }

    fn mark(&mut self, i: usize) {
        if i < 64 {
            self.used |= 1 << i;
        }
    }

    /// Takes a modifier if it is there, wherever it stands.
    pub fn take(&mut self, name: &str) -> bool {
        let found = self.unused().find(|(i, m)| *i < 64 && *m == name).map(|(i, _)| i);
        found.inspect(|i| self.mark(*i)).is_some()
    }

    /// Takes the first modifier that a table names, and gives its value.
    pub fn one_of<T: Copy>(&mut self, table: &[(&str, T)]) -> Option<T> {
        let (i, value) = self.unused().find_map(|(i, m)| {
            table.iter().find(|(name, _)| *name == m && i < 64).map(|(_, value)| (i, *value))
        })?;
        self.mark(i);
        Some(value)
    }

    /// Takes the next modifier that is a type.
    ///
    /// # Errors
    /// There is none.
    pub fn ty(&mut self) -> Result<Type, Refusal> {
        self.maybe_ty().ok_or_else(|| unsupported(format!("`{}` without a type", self.written())))
    }

    /// Takes the next modifier that is a type, if one is left.
    pub fn maybe_ty(&mut self) -> Option<Type> {
        let (i, ty) =
            self.unused().find_map(|(i, m)| Type::from_name(m).filter(|_| i < 64).map(|ty| (i, ty)))?;
        self.mark(i);
        Some(ty)
    }

    /// Takes the next modifier, whatever it is.
    pub fn any(&mut self) -> Option<&'a str> {
        let (i, name) = self.unused().next().filter(|(i, _)| *i < 64)?;
        self.mark(i);
        Some(name)
    }

    /// The next modifier, left in place.
    pub fn peek(&self) -> Option<&'a str> {
        self.unused().next().map(|(_, m)| m)
    }

    /// The opcode with all modifiers, for messages.
    pub fn written(&self) -> String {
        written(self.inst)
    }

    /// Says that all modifiers have been taken.
    ///
    /// # Errors
    /// `Unsupported`, naming the first that is left.
    pub fn finish(self) -> Result<(), Refusal> {
        match self.peek() {
            None => Ok(()),
            Some(left) => Err(unsupported(format!("`.{left}` in `{}`", self.written()))),
        }
    }
}

/// The opcode with all modifiers, as written.
pub fn written(inst: &Instruction<'_>) -> String {
    let mut text = inst.opcode.to_owned();
    for m in &inst.modifiers {
        text.push('.');
        text.push_str(m);
    }
    text
}
