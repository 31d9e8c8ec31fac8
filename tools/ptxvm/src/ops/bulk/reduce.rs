//! The operations of `cp.reduce.async.bulk`, element by element.

use super::common::Direction;
use crate::decode::mods::Mods;
use crate::decode::{Refusal, invalid};
use crate::machine::bulk::{Combine, Reduction};
use crate::machine::tensor_map::TensorType;
use crate::ops::float::Real;
use crate::ops::half::{Bf16, F16, Format16};
use crate::types::Type;

/// What is done with the old value and the copied one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Operation {
    Add,
    Min,
    Max,
    /// Wraps at the copied value.
    Inc,
    Dec,
    And,
    Or,
    Xor,
}

/// A reduction, and whether its result depends on the order of several.
#[derive(Clone, Copy, Debug)]
pub(super) struct Typed {
    pub(super) reduction: Reduction,
    pub(super) rounds: bool,
}

/// Takes the operation.
pub(super) fn operation(mods: &mut Mods<'_, '_>, written: &str) -> Result<Operation, Refusal> {
    use Operation::*;
    let all = [
        ("add", Add),
        ("min", Min),
        ("max", Max),
        ("inc", Inc),
        ("dec", Dec),
        ("and", And),
        ("or", Or),
        ("xor", Xor),
    ];
    mods.one_of(&all).ok_or_else(|| invalid(format!("`{written}` names no operation")))
}

/// Takes the type, and gives the reduction of it.
pub(super) fn typed(
    operation: Operation,
    mods: &mut Mods<'_, '_>,
    direction: Direction,
    written: &str,
) -> Result<Typed, Refusal> {
    let noftz = mods.take("noftz");
    let ty = mods.ty()?;
    let half = matches!(ty, Type::F16 | Type::BF16);
    let untyped = matches!(operation, Operation::And | Operation::Or | Operation::Xor);
    let wide =
        matches!(ty, Type::B64 | Type::S64 | Type::U64) && !(operation == Operation::Add && ty == Type::U64);
    let float = half || matches!(ty, Type::F32 | Type::F64);
    let found = combine(operation, ty).filter(|_| {
        noftz == (half && operation == Operation::Add)
            && untyped == matches!(ty, Type::B32 | Type::B64)
            && (direction == Direction::Store || !(wide || float))
    });
    let Some(combine) = found else {
        return Err(invalid(format!("`{written}`: no such reduction")));
    };
    let rounds = operation == Operation::Add && float;
    Ok(Typed { reduction: Reduction { bytes: u64::from(ty.bytes()), combine }, rounds })
}

/// The reduction of a tensor's elements.
pub(super) fn of_tensor(operation: Operation, ty: TensorType) -> Option<Reduction> {
    let untyped = matches!(operation, Operation::And | Operation::Or | Operation::Xor);
    let ty = match ty {
        TensorType::U32 | TensorType::S32 if untyped => Type::B32,
        TensorType::U64 | TensorType::S64 if untyped => Type::B64,
        TensorType::U32 => Type::U32,
        TensorType::S32 => Type::S32,
        TensorType::U64 => Type::U64,
        TensorType::S64 => Type::S64,
        TensorType::F16 => Type::F16,
        TensorType::Bf16 => Type::BF16,
        TensorType::F32 | TensorType::F32Ftz => Type::F32,
        TensorType::F64 => Type::F64,
        _ => return None,
    };
    // Addition does not mind the sign.
    let ty = if operation == Operation::Add && ty == Type::S64 { Type::U64 } else { ty };
    Some(Reduction { bytes: u64::from(ty.bytes()), combine: combine(operation, ty)? })
}

/// The lesser of two halves, or with `greater` the greater: a NaN gives way to a number, and -0 is below +0.
fn extreme<F: Format16>(a: u64, b: u64, greater: bool) -> u64 {
    let (x, y) = (F::wide(a as u32 & 0xffff), F::wide(b as u32 & 0xffff));
    if x.is_nan() && y.is_nan() {
        return 0x7fff;
    }
    let first =
        y.is_nan() || !x.is_nan() && ((x, !x.is_sign_negative()) < (y, !y.is_sign_negative())) != greater;
    (if first { a } else { b }) & 0xffff
}

fn add16<F: Format16>(a: u64, b: u64) -> u64 {
    u64::from(F::narrow(F::wide(a as u32 & 0xffff) + F::wide(b as u32 & 0xffff)))
}

fn combine(operation: Operation, ty: Type) -> Option<Combine> {
    use Operation::*;
    Some(match (operation, ty) {
        (Add, Type::U32 | Type::S32) => |a, b| u64::from((a as u32).wrapping_add(b as u32)),
        (Add, Type::U64) => u64::wrapping_add,
        (Add, Type::F32) => |a, b| {
            let [a, b] = [a, b].map(|bits| f32::from_bits(bits as u32).flushed());
            u64::from((a + b).or_nan([a, b]).flushed().to_bits())
        },
        (Add, Type::F64) => |a, b| {
            let [a, b] = [a, b].map(f64::from_bits);
            (a + b).or_nan([a, b]).to_bits()
        },
        (Add, Type::F16) => add16::<F16>,
        (Add, Type::BF16) => add16::<Bf16>,
        (Min, Type::U32 | Type::U64) => u64::min,
        (Max, Type::U32 | Type::U64) => u64::max,
        (Min, Type::S32) => |a, b| u64::from((a as i32).min(b as i32) as u32),
        (Max, Type::S32) => |a, b| u64::from((a as i32).max(b as i32) as u32),
        (Min, Type::S64) => |a, b| (a as i64).min(b as i64) as u64,
        (Max, Type::S64) => |a, b| (a as i64).max(b as i64) as u64,
        (Min, Type::F16) => |a, b| extreme::<F16>(a, b, false),
        (Max, Type::F16) => |a, b| extreme::<F16>(a, b, true),
        (Min, Type::BF16) => |a, b| extreme::<Bf16>(a, b, false),
        (Max, Type::BF16) => |a, b| extreme::<Bf16>(a, b, true),
        (Inc, Type::U32) => |a, b| if a >= b { 0 } else { a + 1 },
        (Dec, Type::U32) => |a, b| if a == 0 || a > b { b } else { a - 1 },
        (And, Type::B32 | Type::B64) => |a, b| a & b,
        (Or, Type::B32 | Type::B64) => |a, b| a | b,
        (Xor, Type::B32 | Type::B64) => |a, b| a ^ b,
        _ => return None,
    })
}
