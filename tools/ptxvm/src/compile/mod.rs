//! Syntax tree to program: functions become code, a module is linked.

pub mod flow;
pub mod function;
pub mod module;
pub mod slots;
