//! Launcher of kernels/adamw.cu.

use super::entries::{Entry, same_size};
use super::{Cuda, Memory, Tensor, narrow};
use crate::backend::adamw::BLOCK;
use crate::backend::{AdamW, AdamWCoefficients, DType, DynamicCode, Moments, Quantised, Update, Weight};
use crate::device::{Arg, Launch};

/// Elements of a block of 256 threads, whole [`BLOCK`]s, one for each: a few MiB of traffic. The list of chunks is small beside that, and blocks still divide
/// evenly.
const CHUNK: usize = 64 * 1024;

/// `struct Chunk` of the kernel.
#[derive(Clone, Copy, bytemuck::NoUninit)]
#[repr(C)]
struct Chunk {
    grad: u64,
    grad_bf16: u64,
    master: u64,
    m: u64,
    v: u64,
    m_scales: u64,
    v_scales: u64,
    copy: u64,
    len: u32,
    keep: f32,
    first: u32,
    number: u32,
}

same_size!(adamw: Chunk = CHUNK_BYTES, AdamWCoefficients = STEP_BYTES, DynamicCode = CODE_BYTES);

/// Codes of 8 bits.
pub struct Codes {
    pub(super) memory: Memory,
    pub(super) len: usize,
}

/// See [`crate::backend::Backend::adamw`].
pub(super) fn step(cuda: &Cuda, hyper: &AdamW, updates: &mut [Update<Tensor, Codes>]) {
    let (mut of_f32, mut of_codes) = (Vec::new(), Vec::new());
    for u in updates {
        let shape = (u.grad.rows, u.grad.cols);
        let n = shape.0 * shape.1;
        let check = |x: &Tensor, dtype| {
            assert!(x.dtype == dtype && (x.rows, x.cols) == shape, "{dtype:?} of the gradient's shape");
        };
        let address = |x: &Tensor| x.memory.ptr().0;
        check(u.grad, u.grad.dtype);
        let [grad, grad_bf16] = match u.grad.dtype {
            DType::F32 => [address(u.grad), 0],
            DType::Bf16 => [0, address(u.grad)],
        };
        let (master, copy, number) = match &u.weight {
            Weight::F32(weight) => (Some(&**weight), None, 0),
            Weight::Master { master, copy } => (Some(&**master), Some(&**copy), 0),
            Weight::Bf16 { weight, number } => (None, Some(&**weight), *number),
        };
        let master = master.map_or(0, |master| {
            check(master, DType::F32);
            address(master)
        });
        let copy = copy.map_or(0, |copy| {
            check(copy, DType::Bf16);
            address(copy)
        });
        let (chunks, bytes, [m, v], [m_scales, v_scales]) = match u.moments {
            Moments::F32 { m, v } => {
                check(m, DType::F32);
                check(v, DType::F32);
                (&mut of_f32, DType::F32.bytes(), [address(m), address(v)], [0; 2])
            }
            Moments::Blockwise { m, v } => {
                let both = [m, v].map(|x: &mut Quantised<Tensor, Codes>| {
                    assert!(x.codes.len == n, "a code of every element");
                    assert!(x.scales.dtype == DType::F32 && x.scales.cols == n.div_ceil(BLOCK), "scales");
                    (x.codes.memory.ptr().0, address(&x.scales))
                });
                (&mut of_codes, 1, both.map(|(codes, _)| codes), both.map(|(_, scales)| scales))
            }
        };
        let keep = hyper.keep(u.weight_decay);
        for first in (0..n).step_by(CHUNK) {
            // Null stays null.
            let at = |begin: u64, offset: usize| if begin == 0 { 0 } else { begin + offset as u64 };
            chunks.push(Chunk {
                grad: at(grad, 4 * first),
                grad_bf16: at(grad_bf16, 2 * first),
                master: at(master, 4 * first),
                m: at(m, bytes * first),
                v: at(v, bytes * first),
                m_scales: at(m_scales, 4 * first / BLOCK),
                v_scales: at(v_scales, 4 * first / BLOCK),
                copy: at(copy, 2 * first),
                len: CHUNK.min(n - first) as u32,
                keep,
                first: narrow(first / BLOCK),
                number,
            });
        }
    }
    let step = Arg::Bytes(bytemuck::bytes_of(&hyper.coefficients()).to_vec());
    if !of_f32.is_empty() {
        let on_device = cuda.array(&of_f32);
        cuda.launch(Entry::Adamw, Launch::linear(of_f32.len(), 256), &[on_device.arg(), step.clone()]);
    }
    if !of_codes.is_empty() {
        let on_device = cuda.array(&of_codes);
        let codes = cuda.array(&[*DynamicCode::signed(), *DynamicCode::unsigned()]);
        let args = [on_device.arg(), step, codes.arg()];
        cuda.launch(Entry::AdamwBlockwise, Launch::linear(of_codes.len(), 256), &args);
    }
}
