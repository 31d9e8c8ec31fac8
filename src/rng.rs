//! Philox4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC'11): a counter-based
//! generator, so a draw depends on its key and counter alone: not on batching, threads or device.

/// Rounds of Philox4x32-10.
pub const PHILOX_ROUNDS: usize = 10;
/// What the two counters are multiplied by.
pub const PHILOX_MULTIPLIERS: [u64; 2] = [0xD251_1F53, 0xCD9E_8D57];

/// One round of Philox4x32.
#[inline(always)]
pub fn philox_round(counter: [u32; 4], key: [u32; 2]) -> [u32; 4] {
    let [m0, m1] = PHILOX_MULTIPLIERS;
    let p0 = m0 * u64::from(counter[0]);
    let p1 = m1 * u64::from(counter[2]);
    [(p1 >> 32) as u32 ^ counter[1] ^ key[0], p1 as u32, (p0 >> 32) as u32 ^ counter[3] ^ key[1], p0 as u32]
}

/// The key of the round after the one under `key` (Weyl sequences).
#[inline(always)]
pub fn philox_next_key(key: [u32; 2]) -> [u32; 2] {
    [key[0].wrapping_add(0x9E37_79B9), key[1].wrapping_add(0xBB67_AE85)]
}

/// Ten rounds of Philox4x32 over `counter` under `key`.
#[inline(always)]
pub fn philox4x32(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for _ in 0..PHILOX_ROUNDS {
        counter = philox_round(counter, key);
        key = philox_next_key(key);
    }
    counter
}

/// What a draw is for. Different domains of one seed never share a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Domain {
    /// Token sampling.
    Sample = 1,
    /// The order of the tasks in an epoch.
    Shuffle = 2,
    /// Bootstrap resampling in evaluation.
    Bootstrap = 3,
    /// The order of the tasks that take the place of others within a step.
    Refill = 4,
    /// The matrices that new adapters begin with; the step counts them.
    Adapters = 5,
    /// The rounding of weights that have no master; the step is AdamW's.
    Rounding = 6,
    /// Subsets of a pool, for majority votes that scores weigh.
    Votes = 7,
    /// Prompts that are made up to measure speed; the seed is the round.
    Prompts = 8,
}

/// The key for everything drawn under (seed, domain, step).
pub fn derive_key(seed: u64, domain: Domain, step: u64) -> [u32; 2] {
    let [a, b, ..] =
        philox4x32([step as u32, (step >> 32) as u32, domain as u32, 0], [seed as u32, (seed >> 32) as u32]);
    [a, b]
}

/// The RNG key of one token to sample: streams differ by construction, and the draw does not depend on what else
/// is in the batch. The counter's first word is left to the vocabulary.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DrawKey {
    /// From [`derive_key`].
    pub key: [u32; 2],
    /// The prompt's number (its index in the task file or request).
    pub prompt: u32,
    /// The stream's number within its group.
    pub stream: u32,
    /// Absolute position of the token that is drawn.
    pub position: u32,
}

/// A plain sequential generator over one key, for shuffles and bootstraps.
#[derive(Debug, Clone)]
pub struct Stream {
    key: [u32; 2],
    counter: u64,
}

impl Stream {
    /// A stream under (seed, domain, step).
    pub fn new(seed: u64, domain: Domain, step: u64) -> Self {
        Self { key: derive_key(seed, domain, step), counter: 0 }
    }

    /// The next 64 random bits.
    pub fn next_u64(&mut self) -> u64 {
        let c = self.counter;
        self.counter += 1;
        let [a, b, ..] = philox4x32([c as u32, (c >> 32) as u32, 0, 0], self.key);
        u64::from(a) | u64::from(b) << 32
    }

    /// Uniform in `0..n` without bias (rejection). `n` must not be 0.
    pub fn below(&mut self, n: u64) -> u64 {
        assert!(n > 0, "an empty range has no element to draw");
        let zone = u64::MAX - u64::MAX % n;
        loop {
            let x = self.next_u64();
            if x < zone {
                return x % n;
            }
        }
    }

    /// Fisher-Yates.
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for i in (1..items.len()).rev() {
            items.swap(i, self.below(i as u64 + 1) as usize);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The known-answer vectors published with Random123 (kat_vectors: philox4x32 10).
    #[test]
    fn philox_matches_random123() {
        assert_eq!(philox4x32([0; 4], [0; 2]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        assert_eq!(
            philox4x32([u32::MAX; 4], [u32::MAX; 2]),
            [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]
        );
        assert_eq!(
            philox4x32([0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344], [0xa409_3822, 0x299f_31d0]),
            [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]
        );
    }

    /// Runs are resumed with the same keys by later versions.
    #[test]
    fn keys_are_made_of_all_of_seed_step_and_domain() {
        for (domain, number) in [(Domain::Sample, 1), (Domain::Shuffle, 2), (Domain::Bootstrap, 3)] {
            let [a, b, ..] = philox4x32([3, 5, number, 0], [7, 11]);
            assert_eq!(derive_key(11 << 32 | 7, domain, 5 << 32 | 3), [a, b], "{domain:?}");
        }
    }

    #[test]
    fn shuffle_is_a_permutation_and_repeats() {
        let mut a: Vec<u32> = (0..100).collect();
        Stream::new(7, Domain::Shuffle, 3).shuffle(&mut a);
        let mut b: Vec<u32> = (0..100).collect();
        Stream::new(7, Domain::Shuffle, 3).shuffle(&mut b);
        assert_eq!(a, b);
        assert_ne!(a, (0..100).collect::<Vec<u32>>());
        a.sort_unstable();
        assert_eq!(a, (0..100).collect::<Vec<u32>>());
    }
}
