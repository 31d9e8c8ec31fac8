//! Names of module scope.

use std::collections::HashMap;

use super::Refusal;
use crate::machine::program::Constant;
use crate::types::Space;

/// The meaning of a name of module scope.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Symbol {
    /// A variable and its address in its own space.
    Variable {
        /// Where it lives.
        space: Space,
        /// Its address there.
        address: Constant,
    },
    /// The function of this index.
    Function(u32),
    /// Something that the machine cannot hold: the index of why.
    Refused(u32),
}

/// Names of module scope.
#[derive(Debug, Default)]
pub struct Symbols<'a> {
    names: HashMap<&'a str, Symbol>,
    refusals: Vec<Refusal>,
}

impl<'a> Symbols<'a> {
    /// The meaning of a name.
    pub fn get(&self, name: &str) -> Option<&Symbol> {
        self.names.get(name)
    }

    /// Declares a name; a later declaration of the same name replaces it (forward declarations).
    pub fn insert(&mut self, name: &'a str, symbol: Symbol) {
        self.names.insert(name, symbol);
    }

    /// Declares a name that is of no use: whoever uses it gets the refusal.
    pub fn refuse(&mut self, name: &'a str, why: Refusal) {
        self.names.insert(name, Symbol::Refused(self.refusals.len() as u32));
        self.refusals.push(why);
    }

    /// Why a name is of no use, if it is not.
    pub fn refusal(&self, name: &str) -> Option<&Refusal> {
        match self.names.get(name)? {
            Symbol::Refused(i) => self.refusals.get(*i as usize),
            _ => None,
        }
    }
}
