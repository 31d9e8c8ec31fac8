//! How a virtual GPU is set up.

/// Which checks run. Bounds and alignment are always checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Checks {
    /// Uninitialised values that reach memory, a branch or an address.
    pub init: bool,
    /// Races in shared memory, in global memory between blocks and between a block's warps, and with asynchronous copies.
    pub race: bool,
    /// Whether it is a race, too, that unordered stores of a block's warps put the same value to the same memory. Compilers
    /// make such stores where a value is replicated, and every order of them leaves the same bytes.
    pub repeated: bool,
}

impl Checks {
    /// All that finds wrong results.
    pub const ALL: Self = Self { init: true, race: true, repeated: false };
    /// `ALL`, and what is a race by the letter alone.
    pub const STRICT: Self = Self { repeated: true, ..Self::ALL };
    /// All off.
    pub const NONE: Self = Self { init: false, race: false, repeated: false };
}

/// How tensor cores add up the products of narrow floats.
///
/// A kernel whose paths cut k at different places may agree to the bit in one order and differ in another. A claim about
/// bits on hardware should be tried in all of them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum MmaOrder {
    /// A chain of fused multiply-adds over k, each rounded to nearest, as C code computes it.
    #[default]
    Chain,
    /// Groups of 8 products (4 of tf32) with the accumulator, aligned, cut off 24 bits below the largest exponent, added
    /// and truncated to f32: sm_80, 86 and 89 according to published studies.
    Ampere,
    /// The same in groups of 16 (8 of tf32) and cut off 25 bits below: sm_90.
    Hopper,
}

impl MmaOrder {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Chain, Self::Ampere, Self::Hopper];

    /// `chain`, `ampere` or `hopper`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Chain => "chain",
            Self::Ampere => "ampere",
            Self::Hopper => "hopper",
        }
    }

    /// The one of that name.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|order| order.name() == name)
    }
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
    /// How `mma` and `wmma` add up the products of narrow floats.
    pub mma: MmaOrder,
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
            mma: MmaOrder::Chain,
        }
    }
}
