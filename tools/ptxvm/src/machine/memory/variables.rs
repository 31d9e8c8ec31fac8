//! The variables of shared memory. Between any two lies a gap that belongs to none, so that an access beyond one of them is found
//! as one beyond an allocation is.
//!
//! Dynamic shared memory is one variable, whatever a kernel keeps there and under however many names it is declared.

use super::access::Span;
use super::pick;
use crate::error::ErrorKind;
use crate::machine::context::{Context, Stop};
use crate::machine::layout::region;
use crate::machine::registers::LANES;

/// What dynamic shared memory is called in messages.
pub(crate) const DYNAMIC_SHARED: &str = "dynamic shared memory";

/// Where a variable lies in the shared memory of a block.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SharedRange {
    /// Its name, for messages.
    pub name: String,
    /// Its first byte.
    pub from: u64,
    /// The byte behind its last one.
    pub end: u64,
}

/// The variable that all of some bytes belong to, or that would be the next one.
fn find(all: &[SharedRange], at: u64, bytes: u64) -> Result<&SharedRange, usize> {
    let next = all.partition_point(|v| v.end <= at);
    let found = all.get(next).filter(|v| v.from <= at && at.saturating_add(bytes) <= v.end);
    found.ok_or(next)
}

/// Why an access to bytes that are not all of one variable is wrong: where they lie, as seen from the nearest one.
fn explain(all: &[SharedRange], at: u64, bytes: u64) -> String {
    let what = |v: &SharedRange| format!("`{}` ({} bytes at {:#x})", v.name, v.end - v.from, v.from);
    let access = format!("{bytes} byte{} at {at:#x} of shared memory", if bytes == 1 { "" } else { "s" });
    let next = all.partition_point(|v| v.end <= at);
    if let Some(v) = all.get(next).filter(|v| v.from <= at) {
        let over = at.saturating_add(bytes) - v.end;
        return format!("{access}: reaches {over} bytes past the end of {}", what(v));
    }
    let behind = next.checked_sub(1).map(|i| &all[i]);
    match (behind, all.get(next)) {
        (Some(b), Some(n)) if at - b.end > n.from - at => {
            format!("{access}: {} bytes in front of {}", n.from - at, what(n))
        }
        (Some(b), _) => format!("{access}: {} bytes behind the end of {}", at - b.end, what(b)),
        (None, Some(n)) => format!("{access}: {} bytes in front of {}", n.from - at, what(n)),
        (None, None) => access,
    }
}

impl Context<'_> {
    /// Refuses an access to shared memory of which a lane touches bytes of no variable, or of two.
    #[inline(always)]
    pub(crate) fn in_variables(
        &self,
        mask: u32,
        at: &[u64; LANES],
        span: &Span,
        size: u64,
    ) -> Result<(), Stop> {
        // Mostly all lanes are in the same one.
        let bytes = (span.last - span.first).saturating_add(size);
        match find(&self.launch.variables, span.first, bytes) {
            Ok(_) => Ok(()),
            Err(_) => self.each_in_variable(mask, at, size),
        }
    }

    #[inline(never)]
    fn each_in_variable(&self, mask: u32, at: &[u64; LANES], size: u64) -> Result<(), Stop> {
        let all = &self.launch.variables;
        let wrong = |lane: usize| {
            find(all, at[lane], size).is_err() && !self.block.shared.is_reserved(at[lane], size)
        };
        let bad = pick(mask, wrong);
        if bad == 0 {
            return Ok(());
        }
        let first = at[bad.trailing_zeros() as usize];
        if region(first).is_some() {
            return Err(self.beyond(bad, at, size, 0, "shared memory of the block"));
        }
        Err(self.fault(ErrorKind::OutOfBounds, bad, explain(all, first, size)))
    }

    /// The same for a piece of any number of bytes.
    pub(crate) fn in_variable(&self, mask: u32, at: u64, bytes: u64) -> Result<(), Stop> {
        if self.launch.variables.len() < 2 || bytes == 0 {
            return Ok(());
        }
        self.each_in_variable(mask, &[at; LANES], bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nearest_variable_is_named() {
        let range = |name: &str, from, end| SharedRange { name: name.to_owned(), from, end };
        let all = [range("a", 0, 12), range("b", 1040, 1060)];
        for (at, bytes, told) in [
            (8, 8, "8 bytes at 0x8 of shared memory: reaches 4 bytes past the end of `a` (12 bytes at 0x0)"),
            (16, 1, "1 byte at 0x10 of shared memory: 4 bytes behind the end of `a` (12 bytes at 0x0)"),
            (1036, 4, "4 bytes at 0x40c of shared memory: 4 bytes in front of `b` (20 bytes at 0x410)"),
            (1064, 4, "4 bytes at 0x428 of shared memory: 4 bytes behind the end of `b` (20 bytes at 0x410)"),
        ] {
            assert!(find(&all, at, bytes).is_err());
            assert_eq!(explain(&all, at, bytes), told);
        }
        assert_eq!(find(&all, 8, 4), Ok(&all[0]));
        assert_eq!(find(&all, 1040, 20), Ok(&all[1]));
    }
}
