//! Small arrays in one upload.

use crate::device::{Arg, Ptr};

/// Small arrays that are uploaded as one.
#[derive(Default)]
pub(super) struct Arrays {
    bytes: Vec<u8>,
}

/// One of several [`Arrays`]: its offset among them, which [`Section::at`] turns into its address.
#[derive(Debug, Clone, Copy)]
pub(super) struct Section(Ptr);

impl Arrays {
    /// Adds an array, aligned to 16 bytes.
    pub(super) fn add<T: bytemuck::NoUninit>(&mut self, data: &[T]) -> Section {
        self.bytes.resize(self.bytes.len().next_multiple_of(16), 0);
        let section = Section(Ptr(self.bytes.len() as u64));
        self.bytes.extend_from_slice(bytemuck::cast_slice(data));
        section
    }

    /// Makes the size a power of two, so that there are few sizes.
    pub(super) fn round_up(&mut self) {
        self.bytes.resize(self.bytes.len().next_power_of_two(), 0);
    }

    /// All of them.
    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes
    }
}

impl Section {
    /// The array on the device, given the address of all arrays.
    pub(super) fn at(self, base: Ptr) -> Self {
        Self(Ptr(base.0 + self.0.0))
    }

    /// Its address as a kernel's argument.
    pub(super) fn arg(&self) -> Arg {
        Arg::Ptr(self.0)
    }

    /// Its address.
    pub(super) fn ptr(&self) -> Ptr {
        self.0
    }
}
