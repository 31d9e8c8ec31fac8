//! How a virtual GPU is set up.

/// Which checks run. Bounds and alignment are always checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Checks {
    /// Reads of values that nobody wrote, where they reach memory, a branch or an address.
    pub init: bool,
    /// Races in shared memory, between blocks in global memory, and with asynchronous copies.
    pub race: bool,
}

impl Checks {
    /// All on.
    pub const ALL: Self = Self { init: true, race: true };
    /// All off.
    pub const NONE: Self = Self { init: false, race: false };
}

/// Set-up of a virtual GPU.
#[derive(Clone, Debug, PartialEq)]
pub struct Options {
    /// Host threads that run blocks; 0 for as many as the host has.
    pub threads: usize,
    /// Checks.
    pub checks: Checks,
    /// Whether memory traffic is counted (sectors, wavefronts). Instructions are always counted.
    pub counters: bool,
    /// Most instructions that one block's warps may execute together, before the launch ends with a `Budget` fault.
    pub budget: u64,
    /// `None`: warps run in order, each as far as it can. A seed: which warp runs next, and for how long, is random.
    pub seed: Option<u64>,
    /// Most bytes of global memory.
    pub memory: u64,
    /// Most bytes of shared memory of a block, static and dynamic. An A100 has 166912, an H100 232448.
    pub shared: u32,
    /// Multiprocessors, as `%nsmid` tells; a launch with `cooperative` has at most 32 blocks for each.
    pub multiprocessors: u32,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            threads: 0,
            checks: Checks::ALL,
            counters: true,
            budget: 10_000_000_000,
            seed: None,
            memory: 16 << 30,
            shared: 232_448,
            multiprocessors: 108,
        }
    }
}
