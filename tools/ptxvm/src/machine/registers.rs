//! The registers of a warp: every register is one value for each of 32 lanes.
//!
//! A 32-bit register (also a 16- or 8-bit one, zero-extended) is one [`Row`]; a 64-bit one two, a 128-bit one four.
//! A predicate is one `u32`, a bit a lane. Beside each register stands which lanes hold a value that somebody wrote:
//! the initialisation check.

use std::collections::HashMap;

use bytemuck::{Pod, Zeroable};

/// Lanes of a warp.
pub const LANES: usize = 32;

/// One 32-bit value for each lane.
#[derive(Clone, Copy, Debug, Pod, Zeroable, PartialEq, Eq)]
#[repr(C, align(64))]
pub struct Row(pub [u32; LANES]);

/// Width of a register.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Width {
    /// No register: the sink `_`, or an operand that is not there. Reads as 0, swallows what is written.
    None,
    /// A predicate.
    Pred,
    /// 8 or 16 bits, zero-extended to 32 in its row.
    B16,
    /// 32 bits.
    B32,
    /// 64 bits: two rows, read as `[u64; 32]`.
    B64,
    /// 128 bits: four rows, read as `[u128; 32]`.
    B128,
}

impl Width {
    /// Rows of the register file that one such register takes.
    pub const fn rows(self) -> u32 {
        match self {
            Self::None | Self::Pred => 0,
            Self::B16 | Self::B32 => 1,
            Self::B64 => 2,
            Self::B128 => 4,
        }
    }
}

/// A register of an instruction. While a function is decoded `slot` is a virtual register's number; afterwards it is a
/// row, or for predicates a mask, counted from the frame's base.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Reg {
    /// Width, `None` for the sink.
    pub width: Width,
    /// Which.
    pub slot: u32,
}

impl Reg {
    /// The sink.
    pub const NONE: Self = Self { width: Width::None, slot: 0 };

    /// Whether there is a register at all.
    pub const fn is_some(self) -> bool {
        !matches!(self.width, Width::None)
    }
}

/// A type that lanes compute in, and how it lies in a row.
pub trait Value: Copy + Default {
    /// The element of its rows: `u32`, `u64` or `u128`.
    type Raw: Pod + Default;
    /// Rows of a register of this type.
    const ROWS: usize;
    /// Reads the stored bits.
    fn from_raw(raw: Self::Raw) -> Self;
    /// The bits to store; narrow values zero-extend.
    fn into_raw(self) -> Self::Raw;
}

macro_rules! values {
    ($($t:ty, $raw:ty, $rows:literal, |$r:ident| $from:expr, |$v:ident| $into:expr;)*) => {$(
        impl Value for $t {
            type Raw = $raw;
            const ROWS: usize = $rows;
            #[inline(always)]
            fn from_raw($r: $raw) -> Self { $from }
            #[inline(always)]
            fn into_raw(self) -> $raw { let $v = self; $into }
        }
    )*};
}
values! {
    u8, u32, 1, |r| r as u8, |v| u32::from(v);
    i8, u32, 1, |r| r as i8, |v| u32::from(v as u8);
    u16, u32, 1, |r| r as u16, |v| u32::from(v);
    i16, u32, 1, |r| r as i16, |v| u32::from(v as u16);
    u32, u32, 1, |r| r, |v| v;
    i32, u32, 1, |r| r as i32, |v| v as u32;
    f32, u32, 1, |r| f32::from_bits(r), |v| v.to_bits();
    u64, u64, 2, |r| r, |v| v;
    i64, u64, 2, |r| r as i64, |v| v as u64;
    f64, u64, 2, |r| f64::from_bits(r), |v| v.to_bits();
    u128, u128, 4, |r| r, |v| v;
}

/// Which registers of a frame are written: a mask of lanes for each row and predicate.
#[derive(Clone, Debug, Default)]
pub(crate) struct Definedness {
    rows: Box<[u32]>,
    preds: Box<[u32]>,
}

/// The register file of one warp. Frames of called functions lie above their caller's; `base` and `pred_base` mark the
/// running one.
#[derive(Clone, Debug, Default)]
pub struct Registers {
    rows: Vec<Row>,
    defined: Vec<u32>,
    preds: Vec<u32>,
    preds_defined: Vec<u32>,
    /// For registers with lanes of which only some bytes are written. Rare, so kept apart; empty mostly.
    partly: HashMap<usize, [Bytes; LANES]>,
    /// First row of the running frame.
    base: usize,
    /// First predicate of the running frame.
    pred_base: usize,
}

fn clear(bytes: &mut [Bytes; LANES], mask: u32) {
    for (i, b) in bytes.iter_mut().enumerate() {
        if mask >> i & 1 != 0 {
            *b = Bytes::NONE;
        }
    }
}

/// Which bytes of a register are written in a lane.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bytes(u32);

impl Bytes {
    /// All of them, in a register of any width.
    pub const WRITTEN: Self = Self(0xffff);
    /// None.
    pub const NONE: Self = Self(0);
    const TORN: u32 = 1 << 16;

    /// Bytes by their bits, from the lowest.
    pub const fn new(bits: u16) -> Self {
        Self(bits as u32)
    }

    /// Whether a byte is written; one beyond the register's widest is not.
    pub const fn has(self, byte: u32) -> bool {
        byte < 16 && self.0 >> byte & 1 != 0
    }

    /// The same but for one byte.
    #[must_use]
    pub const fn without(self, byte: u32) -> Self {
        Self(self.0 & !(1 << byte))
    }

    /// Those that are written here and there.
    #[must_use]
    pub const fn and(self, other: Self) -> Self {
        Self(self.0 & other.0 & 0xffff | (self.0 | other.0) & Self::TORN)
    }

    /// The bytes of a word whose lower `bytes` are those of `low`.
    #[must_use]
    pub const fn above(self, bytes: u32, low: Self) -> Self {
        let lower = (1 << bytes) - 1;
        Self((self.0 << bytes | low.0 & lower) & 0xffff | (self.0 | low.0) & Self::TORN)
    }

    /// Marks a word that was put together of registers of which nobody wrote one: storing it is no copy of a structure.
    #[must_use]
    pub const fn torn(self) -> Self {
        Self(self.0 | Self::TORN)
    }

    /// Whether the word has that mark.
    pub const fn is_torn(self) -> bool {
        self.0 & Self::TORN != 0
    }
}

static ZEROS: [Row; 4] = [Row([0; LANES]); 4];

impl Registers {
    /// Registers are counted from these rows and predicates on; [`Warp::select`](super::warp::Warp) alone calls it.
    #[inline(always)]
    pub(super) fn select(&mut self, base: usize, pred_base: usize) {
        (self.base, self.pred_base) = (base, pred_base);
    }

    /// Makes room for a frame of `rows` and `preds` above the current base. New registers count as never written.
    pub fn reserve(&mut self, rows: usize, preds: usize) {
        let rows = self.base + rows;
        if self.rows.len() < rows {
            self.rows.resize(rows, Row([0; LANES]));
            self.defined.resize(rows, 0);
        }
        let preds = self.pred_base + preds;
        if self.preds.len() < preds {
            self.preds.resize(preds, 0);
            self.preds_defined.resize(preds, 0);
        }
    }

    /// Declares the registers of a frame never written, in the lanes of `mask`.
    pub fn forget(&mut self, rows: usize, preds: usize, mask: u32) {
        self.defined[self.base..self.base + rows].iter_mut().for_each(|d| *d &= !mask);
        self.preds_defined[self.pred_base..self.pred_base + preds].iter_mut().for_each(|d| *d &= !mask);
        if !self.partly.is_empty() {
            let frame = self.base..self.base + rows;
            let here = self.partly.iter_mut().filter(|(row, _)| frame.contains(*row));
            here.for_each(|(_, bytes)| clear(bytes, mask));
        }
    }

    /// Which registers of a frame are written, in every lane.
    pub(crate) fn definedness(&self, rows: usize, preds: usize) -> Definedness {
        Definedness {
            rows: self.defined[self.base..self.base + rows].into(),
            preds: self.preds_defined[self.pred_base..self.pred_base + preds].into(),
        }
    }

    /// Declares the registers of a frame written or not.
    pub(crate) fn set_definedness(&mut self, to: &Definedness) {
        self.defined[self.base..][..to.rows.len()].copy_from_slice(&to.rows);
        self.preds_defined[self.pred_base..][..to.preds.len()].copy_from_slice(&to.preds);
        self.partly.clear();
    }

    /// A row, counted from the first frame's.
    pub(crate) fn row(&self, row: u32) -> &Row {
        &self.rows[row as usize]
    }

    /// The 32 values of a register.
    #[inline(always)]
    pub fn get<V: Value>(&self, reg: Reg) -> &[V::Raw; LANES] {
        let rows = if reg.is_some() {
            let at = self.base + reg.slot as usize;
            &self.rows[at..at + V::ROWS]
        } else {
            &ZEROS[..V::ROWS]
        };
        let values: &[V::Raw] = bytemuck::cast_slice(rows);
        values.try_into().expect("a row holds 32 lanes")
    }

    /// The value of a register in one lane.
    #[inline(always)]
    pub fn lane<V: Value>(&self, reg: Reg, lane: usize) -> V {
        V::from_raw(self.get::<V>(reg)[lane])
    }

    /// Writes the lanes of `mask`.
    #[inline(always)]
    pub fn set<V: Value>(&mut self, reg: Reg, mask: u32, values: &[V::Raw; LANES]) {
        if !reg.is_some() {
            return;
        }
        let at = self.base + reg.slot as usize;
        let rows: &mut [V::Raw] = bytemuck::cast_slice_mut(&mut self.rows[at..at + V::ROWS]);
        let row: &mut [V::Raw; LANES] = rows.try_into().expect("a row holds 32 lanes");
        if mask == u32::MAX {
            *row = *values;
        } else {
            for i in 0..LANES {
                row[i] = if mask >> i & 1 != 0 { values[i] } else { row[i] };
            }
        }
    }

    /// The lanes where a predicate is true; none for the sink.
    #[inline(always)]
    pub fn pred(&self, reg: Reg) -> u32 {
        if reg.is_some() { self.preds[self.pred_base + reg.slot as usize] } else { 0 }
    }

    /// Writes a predicate in the lanes of `mask`.
    #[inline(always)]
    pub fn set_pred(&mut self, reg: Reg, mask: u32, bits: u32) {
        if reg.is_some() {
            let p = &mut self.preds[self.pred_base + reg.slot as usize];
            *p = (*p & !mask) | (bits & mask);
        }
    }

    /// The lanes in which the register is initialised; all for the sink.
    #[inline(always)]
    pub fn defined(&self, reg: Reg) -> u32 {
        match reg.width {
            Width::None => u32::MAX,
            Width::Pred => self.preds_defined[self.pred_base + reg.slot as usize],
            _ => self.defined[self.base + reg.slot as usize],
        }
    }

    /// Notes for the lanes of `mask` whether the register now holds a written value.
    #[inline(always)]
    pub fn set_defined(&mut self, reg: Reg, mask: u32, defined: u32) {
        let d = match reg.width {
            Width::None => return,
            Width::Pred => &mut self.preds_defined[self.pred_base + reg.slot as usize],
            _ => {
                let row = self.base + reg.slot as usize;
                if !self.partly.is_empty()
                    && let Some(bytes) = self.partly.get_mut(&row)
                {
                    clear(bytes, mask);
                }
                &mut self.defined[row]
            }
        };
        *d = (*d & !mask) | (defined & mask);
    }

    /// Whether any register has lanes that are written in part.
    #[inline(always)]
    pub fn any_partly(&self) -> bool {
        !self.partly.is_empty()
    }

    /// The initialised bytes of a register in one lane.
    pub fn written_bytes(&self, reg: Reg, lane: usize) -> Bytes {
        if self.defined(reg) >> lane & 1 != 0 {
            return Bytes::WRITTEN;
        }
        match reg.width {
            Width::None | Width::Pred => Bytes::NONE,
            _ => self.partly.get(&(self.base + reg.slot as usize)).map_or(Bytes::NONE, |bytes| bytes[lane]),
        }
    }

    /// Notes which bytes of a register are written in one lane: after `set_defined`, which said undefined.
    pub fn set_written_bytes(&mut self, reg: Reg, lane: usize, bytes: Bytes) {
        let all = match reg.width {
            Width::None | Width::Pred => return,
            Width::B16 => 0x3,
            Width::B32 => 0xf,
            Width::B64 => 0xff,
            Width::B128 => 0xffff,
        };
        let row = self.base + reg.slot as usize;
        match bytes.0 & all {
            0 => {}
            some if some == all => self.defined[row] |= 1 << lane,
            some => {
                let bytes = Bytes(some | bytes.0 & Bytes::TORN);
                self.partly.entry(row).or_insert([Bytes::NONE; LANES])[lane] = bytes;
            }
        }
    }
}
