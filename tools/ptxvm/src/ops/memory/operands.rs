//! Modifiers and operands that several instructions of memory have.

use crate::decode::decoder::Decoder;
use crate::decode::mods::Mods;
use crate::decode::{Refusal, invalid};
use crate::machine::context::Stop;
use crate::machine::inst::Class;
use crate::machine::memory::access::{Order, by_space, in_window};
use crate::machine::memory::buffer::Cell;
use crate::machine::memory::lanes;
use crate::machine::registers::{Bytes, LANES, Reg, Registers, Width};
use crate::ptx::ast::{Instruction, Operand};
use crate::types::{Space, Type};

const SPACES: &[(&str, Space)] = &[
    ("global", Space::Global),
    ("shared", Space::Shared),
    ("shared::cta", Space::Shared),
    ("shared::cluster", Space::Shared),
    ("local", Space::Local),
    ("const", Space::Const),
    ("param", Space::Param),
    ("param::entry", Space::Param),
    ("param::func", Space::Param),
];

/// Takes the state space; generic where none is written.
pub(crate) fn space(mods: &mut Mods<'_, '_>) -> Space {
    mods.one_of(SPACES).unwrap_or(Space::Generic)
}

/// Whether an instruction reaches the shared memory of other blocks of the cluster: through a generic address, or where it says so.
pub(crate) fn remote(inst: &Instruction<'_>, space: Space) -> bool {
    space == Space::Generic || inst.modifiers.contains(&"shared::cluster")
}

/// How far an order reaches.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Scope {
    /// To all blocks.
    pub(crate) gpu: bool,
    /// To those of the cluster.
    pub(crate) cluster: bool,
}

/// Takes the scope.
pub(crate) fn scope(mods: &mut Mods<'_, '_>) -> Option<Scope> {
    let of = |gpu, cluster| Scope { gpu, cluster };
    mods.one_of(&[
        ("cta", of(false, false)),
        ("cluster", of(false, true)),
        ("gpu", of(true, true)),
        ("sys", of(true, true)),
    ])
}

/// Takes the modifiers that only steer caches: they change no result.
pub(super) fn cache_hints(mods: &mut Mods<'_, '_>, operators: &[(&str, ())]) {
    mods.one_of(operators);
    mods.one_of(&[
        ("L1::evict_normal", ()),
        ("L1::evict_unchanged", ()),
        ("L1::evict_first", ()),
        ("L1::evict_last", ()),
        ("L1::no_allocate", ()),
    ]);
    mods.one_of(&[("L2::evict_normal", ()), ("L2::evict_first", ()), ("L2::evict_last", ())]);
    mods.one_of(&[("L2::64B", ()), ("L2::128B", ()), ("L2::256B", ())]);
}

/// With `.L2::cache_hint` the last operand is a cache policy; gives the operands before it.
pub(crate) fn without_policy<'i, 'a>(
    d: &mut Decoder<'_, '_>,
    mods: &mut Mods<'_, '_>,
    all: &'i [Operand<'a>],
) -> Result<&'i [Operand<'a>], Refusal> {
    if !mods.take("L2::cache_hint") {
        return Ok(all);
    }
    let [rest @ .., policy] = all else {
        return Err(invalid(format!("`{}` without a cache policy", mods.written())));
    };
    d.src(policy, Type::B64)?;
    Ok(rest)
}

/// Takes `.v2`, `.v4` or `.v8`.
pub(super) fn vector(mods: &mut Mods<'_, '_>) -> u32 {
    mods.one_of(&[("v2", 2), ("v4", 4), ("v8", 8)]).unwrap_or(1)
}

/// The elements of a vector operand, or the operand itself.
pub(crate) fn elements<'i, 'a>(
    op: &'i Operand<'a>,
    n: u32,
    written: &str,
) -> Result<&'i [Operand<'a>], Refusal> {
    let all = match op {
        Operand::Vector(all) => all.as_slice(),
        op => std::slice::from_ref(op),
    };
    if all.len() == n as usize {
        return Ok(all);
    }
    Err(invalid(format!("`{written}` needs {n} element{}", if n == 1 { "" } else { "s" })))
}

/// Checks the type and width of a load or store, and gives the bytes of one element.
pub(super) fn element_bytes(ty: Type, n: u32, space: Space, written: &str) -> Result<u32, Refusal> {
    let plain = matches!(
        ty,
        Type::B8
            | Type::B16
            | Type::B32
            | Type::B64
            | Type::B128
            | Type::U8
            | Type::U16
            | Type::U32
            | Type::U64
            | Type::S8
            | Type::S16
            | Type::S32
            | Type::S64
            | Type::F32
            | Type::F64
    );
    if !plain {
        return Err(invalid(format!("`{written}`: {ty} is no type of memory")));
    }
    let bytes = ty.bytes();
    let wide = bytes * n == 32 && (4..=8).contains(&bytes) && matches!(space, Space::Global);
    if bytes * n > 16 && !wide {
        return Err(invalid(format!("`{written}` is wider than 16 bytes")));
    }
    Ok(bytes)
}

/// The counter class of an access.
pub(super) fn class(space: Space) -> Class {
    match space {
        Space::Generic | Space::Global => Class::Global,
        Space::Shared => Class::Shared,
        Space::Local => Class::Local,
        Space::Const | Space::Param => Class::Constant,
    }
}

impl Decoder<'_, '_> {
    /// Records two facts of an access for the function: the size of its pieces, if it may touch shared memory, and that
    /// results may depend on the order of blocks, if it `waits` (a strong load).
    pub(crate) fn note_access(&mut self, space: Space, bytes: u32, waits: bool) {
        if matches!(space, Space::Shared | Space::Generic) {
            self.shared_grain = self.shared_grain.min(bytes);
        }
        self.ordered |= waits && matches!(space, Space::Global | Space::Generic);
    }
}

/// Takes the modifiers that order a load or store; `stronger` is the order beyond relaxed that it may have: `acquire` or
/// `release`.
pub(super) fn order(mods: &mut Mods<'_, '_>, stronger: &str) -> Result<Order, Refusal> {
    let weak = Order::default();
    if mods.take("volatile") {
        return Ok(Order { strong: true, volatile: true, gpu: true, ..weak });
    }
    let Some(strongest) = mods.one_of(&[("relaxed", false), (stronger, true)]) else {
        mods.take("weak");
        return Ok(weak);
    };
    let scope = scope(mods).ok_or_else(|| invalid(format!("`{}` without a scope", mods.written())))?;
    let Scope { gpu, cluster } = scope;
    let [acquire, release] = ["acquire", "release"].map(|name| strongest && name == stronger);
    Ok(Order { strong: true, volatile: false, acquire, release, gpu, cluster })
}

/// The lanes of a register as values of memory.
#[inline(always)]
pub(crate) fn values<T: Cell>(regs: &Registers, reg: Reg) -> [T; LANES] {
    match reg.width {
        Width::None | Width::Pred => [T::default(); LANES],
        Width::B16 | Width::B32 => regs.get::<u32>(reg).map(|v| T::cut(u64::from(v))),
        Width::B64 => regs.get::<u64>(reg).map(T::cut),
        Width::B128 => regs.get::<u128>(reg).map(T::cut_full),
    }
}

/// The initialised bytes of a register's lower `size`, in the lanes of `mask` in which only some bytes of the register are.
pub(super) fn written_in_part(regs: &Registers, reg: Reg, size: u64, mask: u32) -> Vec<(usize, Bytes)> {
    if !regs.any_partly() {
        return Vec::new();
    }
    let undefined = lanes(mask & !regs.defined(reg)).map(|lane| (lane, regs.written_bytes(reg, lane)));
    undefined.filter(|(_, bytes)| (0..size as u32).any(|byte| bytes.has(byte))).collect()
}

/// Calls `$f::<T>` with the cell type of `$bytes` bytes.
macro_rules! by_bytes {
    ($bytes:expr, $self:ident.$f:ident($($arg:expr),*)) => {
        match $bytes {
            1 => $self.$f::<u8>($($arg),*),
            2 => $self.$f::<u16>($($arg),*),
            4 => $self.$f::<u32>($($arg),*),
            8 => $self.$f::<u64>($($arg),*),
            _ => $self.$f::<u128>($($arg),*),
        }
    };
}
pub(super) use by_bytes;

/// Calls `f` with the lanes that each space concerns, and their addresses in it.
#[inline(always)]
pub(crate) fn each_space(
    space: Space,
    mask: u32,
    at: &[u64; LANES],
    mut f: impl FnMut(Space, u32, &[u64; LANES]) -> Result<(), Stop>,
) -> Result<(), Stop> {
    // Parameters are addressed generically: a kernel's lie in their bank, a call's in local memory.
    if !matches!(space, Space::Generic | Space::Param) {
        return f(space, mask, at);
    }
    for (space, part) in by_space(mask, at) {
        if part == 0 {
            continue;
        }
        if space == Space::Global {
            f(space, part, at)?;
        } else {
            f(space, part, &in_window(at))?;
        }
    }
    Ok(())
}
