//! Names of module scope.

use std::collections::HashMap;

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
}

/// Names of module scope.
#[derive(Debug, Default)]
pub struct Symbols<'a> {
    names: HashMap<&'a str, Symbol>,
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
}
