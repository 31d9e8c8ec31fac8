//! Tensor maps, which tensor copies of kernels take.

use std::ffi::{c_uint, c_void};

use ptxvm::{Swizzle, TensorMap, TensorMapError, TensorType, Tiled};

use super::{Entry, Handle, answer, export};
use crate::code::{Code, say};

/// CUtensorMap.
#[repr(C, align(64))]
#[derive(Clone, Copy)]
pub struct Map([u8; 128]);

/// A refusal, told.
fn refused(what: &str, code: Code) -> Code {
    say(&format!("cuTensorMapEncodeTiled: {what}"));
    code
}

export! { TABLE:
    /// Makes a map of a tensor that is copied in boxes.
    fn cuTensorMapEncodeTiled(
        map: *mut Map,
        ty: c_uint,
        rank: c_uint,
        address: *mut c_void,
        dims: *const u64,
        strides: *const u64,
        boxes: *const c_uint,
        element_strides: *const c_uint,
        interleave: c_uint,
        swizzle: c_uint,
        promotion: c_uint,
        fill: c_uint,
    ) {
        let missing = map.is_null() || dims.is_null() || boxes.is_null() || element_strides.is_null();
        if missing || !(1..=5).contains(&rank) || rank > 1 && strides.is_null() || promotion > 3 || fill > 1 {
            return Err(refused("a pointer is null, or the rank or an enumerator is none", Code::INVALID_VALUE));
        }
        if !map.addr().is_multiple_of(64) {
            return Err(refused("the map must lie at a multiple of 64 bytes", Code::INVALID_VALUE));
        }
        let Some(of) = TensorType::from_number(ty) else {
            let code = if ty <= 15 { Code::NOT_SUPPORTED } else { Code::INVALID_VALUE };
            return Err(refused(&format!("data type {ty} is not built: types of 1 to 8 bytes are"), code));
        };
        let Some(swizzled) = Swizzle::from_number(swizzle) else {
            let code = if swizzle <= 6 { Code::NOT_SUPPORTED } else { Code::INVALID_VALUE };
            return Err(refused(&format!("swizzle {swizzle} is not built: none, 32B, 64B and 128B are"), code));
        };
        if interleave != 0 {
            let code = if interleave <= 2 { Code::NOT_SUPPORTED } else { Code::INVALID_VALUE };
            return Err(refused("interleaved layouts are not built", code));
        }
        let n = rank as usize;
        let strides: &[u64] = if n == 1 { &[] } else { std::slice::from_raw_parts(strides, n - 1) };
        let tiled = Tiled {
            ty: of,
            address: address.addr() as u64,
            dims: std::slice::from_raw_parts(dims, n),
            strides,
            boxes: std::slice::from_raw_parts(boxes, n),
            element_strides: std::slice::from_raw_parts(element_strides, n),
            swizzle: swizzled,
            fill_nan: fill == 1,
        };
        match TensorMap::encode(&tiled) {
            Ok(bytes) => {
                map.write(Map(bytes));
                Ok(())
            }
            Err(e @ TensorMapError::Invalid(_)) => Err(refused(&e.to_string(), Code::INVALID_VALUE)),
            Err(e @ TensorMapError::Unsupported(_)) => Err(refused(&e.to_string(), Code::NOT_SUPPORTED)),
        }
    }

    /// Gives a map another tensor of the same shape.
    fn cuTensorMapReplaceAddress(map: *mut Map, address: Handle) {
        if map.is_null() {
            return Err(Code::INVALID_VALUE);
        }
        match TensorMap::at_address(&map.read().0, address.addr() as u64) {
            Ok(bytes) => {
                map.write(Map(bytes));
                Ok(())
            }
            Err(what) => {
                say(&format!("cuTensorMapReplaceAddress: {what}"));
                Err(Code::INVALID_VALUE)
            }
        }
    }

    /// Maps for convolutions: there are none.
    fn cuTensorMapEncodeIm2col(_map: *mut Map) {
        say("cuTensorMapEncodeIm2col: tensors are copied by tiles alone");
        Err(Code::NOT_SUPPORTED)
    }
}
