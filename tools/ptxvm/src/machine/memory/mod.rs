//! Global, shared and local memory, each with the state that checks keep beside the bytes.

pub(crate) mod access;
pub(crate) mod blocks;
pub(crate) mod buffer;
pub mod global;
pub mod local;
pub(crate) mod mbarrier;
pub mod race;
pub mod shared;
pub(crate) mod traffic;
pub mod variables;
pub(crate) mod warps;

use self::access::Access;
use self::buffer::Cell;
use super::context::{Context, Stop};
use super::registers::LANES;

/// The lanes of a mask, lowest first.
#[inline(always)]
pub(crate) fn lanes(mask: u32) -> impl Iterator<Item = usize> {
    let mut rest = mask;
    std::iter::from_fn(move || {
        let lane = rest.trailing_zeros() as usize;
        (rest != 0).then(|| {
            rest &= rest - 1;
            lane
        })
    })
}

/// The lanes of a mask that a test picks.
#[inline(always)]
pub(crate) fn pick(mask: u32, test: impl Fn(usize) -> bool) -> u32 {
    lanes(mask).filter(|lane| test(*lane)).fold(0, |all, lane| all | 1 << lane)
}

impl Context<'_> {
    /// A warp-wide read of shared memory: `bytes` (1, 2, 4, 8 or 16) at each lane's address. Checks bounds, alignment,
    /// races, initialisation, and counts the wavefronts. Gives the values, little-endian, 0 for other lanes, and the
    /// lanes all of whose bytes are initialised.
    ///
    /// # Errors
    /// Out of bounds or misaligned.
    pub fn load_shared(
        &mut self,
        mask: u32,
        at: &[u64; LANES],
        bytes: u32,
    ) -> Result<([u128; LANES], u32), Stop> {
        let own;
        let at = match self.block.cluster {
            None => at,
            Some(_) => {
                own = self.own_shared(mask, *at)?;
                &own
            }
        };
        self.check_shared(mask, at, &Access::read(bytes), |_, _| None)?;
        let mut values = [0; LANES];
        for lane in lanes(mask) {
            let shared = &self.block.shared;
            values[lane] = match bytes {
                1 => shared.read::<u8>(at[lane]).full(),
                2 => shared.read::<u16>(at[lane]).full(),
                4 => shared.read::<u32>(at[lane]).full(),
                8 => shared.read::<u64>(at[lane]).full(),
                _ => shared.read::<u128>(at[lane]),
            };
        }
        Ok((values, self.written_shared(mask, at, 0, u64::from(bytes))))
    }

    /// A warp-wide write of shared memory; `defined` are the lanes whose value is initialised.
    ///
    /// # Errors
    /// Out of bounds or misaligned.
    pub fn store_shared(
        &mut self,
        mask: u32,
        at: &[u64; LANES],
        bytes: u32,
        values: &[u128; LANES],
        defined: u32,
    ) -> Result<(), Stop> {
        let own;
        let at = match self.block.cluster {
            None => at,
            Some(_) => {
                own = self.own_shared(mask, *at)?;
                &own
            }
        };
        self.check_shared(mask, at, &Access::write(bytes), |_, lane| Some(access::value([values[lane]])))?;
        for lane in lanes(mask) {
            let shared = &mut self.block.shared;
            match bytes {
                1 => shared.write(at[lane], u8::cut_full(values[lane])),
                2 => shared.write(at[lane], u16::cut_full(values[lane])),
                4 => shared.write(at[lane], u32::cut_full(values[lane])),
                8 => shared.write(at[lane], u64::cut_full(values[lane])),
                _ => shared.write(at[lane], values[lane]),
            }
        }
        self.set_written_shared(mask, at, 0, u64::from(bytes), defined);
        Ok(())
    }
}
