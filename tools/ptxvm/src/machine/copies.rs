//! Asynchronous copies (`cp.async`) under way: issued, not landed.

use std::collections::VecDeque;

use super::registers::LANES;

/// One instruction's copies.
#[derive(Debug)]
pub struct Copies {
    /// Lanes whose copy has not landed.
    pub lanes: u32,
    /// The instruction.
    pub pc: u32,
    /// Bytes that each lane writes.
    pub bytes: u64,
    /// Bytes that each lane reads; zeros fill the rest.
    pub read: [u8; LANES],
    /// Shared addresses.
    pub to: [u64; LANES],
    /// Global addresses.
    pub from: [u64; LANES],
    /// Number of each lane's group.
    pub group: [u32; LANES],
}

/// The asynchronous copies of a warp that have not landed.
#[derive(Debug, Default)]
pub struct CopyQueue {
    /// One entry for each instruction, in order.
    pub copies: VecDeque<Box<Copies>>,
    /// Groups that each lane has closed; the copies that it issues now belong to the next.
    pub closed: [u32; LANES],
}
