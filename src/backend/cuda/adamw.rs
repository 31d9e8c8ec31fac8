//! Launcher of kernels/adamw.cu.

use super::entries::{Entry, same_size};
use super::{Cuda, Memory, Tensor, narrow};
use crate::backend::adamw::BLOCK;
use crate::backend::{AdamW, AdamWCoefficients, DType, DynamicCode, Moments, Quantised, Update, Weight};
use crate::device::{Arg, Launch};

/// Elements of a block of 256 threads, whole [`BLOCK`]s, one for each: a few MiB of traffic. The list of chunks is small beside
/// that, and blocks still divide evenly.
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

/// Where a launch finds the elements of a parameter from `first` on, `len` of them, and the step's factor on it. 0: nowhere.
#[derive(Debug, Clone, Copy)]
pub(super) struct Range {
    pub(super) grad: u64,
    pub(super) grad_bf16: u64,
    pub(super) master: u64,
    pub(super) m: u64,
    pub(super) v: u64,
    pub(super) m_scales: u64,
    pub(super) v_scales: u64,
    pub(super) copy: u64,
    pub(super) keep: f32,
    pub(super) number: u32,
    pub(super) first: usize,
    pub(super) len: usize,
}

impl Range {
    /// Of a whole parameter. Moments and master in the host's memory are nowhere.
    pub(super) fn of(hyper: &AdamW, u: &Update<Tensor, Codes>) -> Self {
        let shape = (u.grad.rows, u.grad.cols);
        let n = shape.0 * shape.1;
        let check = |x: &Tensor, dtype| {
            assert!(x.dtype == dtype && (x.rows, x.cols) == shape, "{dtype:?} of the gradient's shape");
        };
        let address = |memory: &Memory| if memory.host.is_some() { 0 } else { memory.ptr().0 };
        let [grad, grad_bf16] = match u.grad.dtype {
            DType::F32 => [address(&u.grad.memory), 0],
            DType::Bf16 => [0, address(&u.grad.memory)],
        };
        let (master, copy, number) = match &u.weight {
            Weight::F32(weight) => (Some(&**weight), None, 0),
            Weight::Master { master, copy } => (Some(&**master), Some(&**copy), 0),
            Weight::Bf16 { weight, number } => (None, Some(&**weight), *number),
        };
        let master = master.map_or(0, |master| {
            check(master, DType::F32);
            address(&master.memory)
        });
        let copy = copy.map_or(0, |copy| {
            check(copy, DType::Bf16);
            address(&copy.memory)
        });
        let ([m, v], [m_scales, v_scales]) = match &*u.moments {
            Moments::F32 { m, v } => {
                check(m, DType::F32);
                check(v, DType::F32);
                ([m, v].map(|x| address(&x.memory)), [0; 2])
            }
            Moments::Blockwise { m, v } => {
                let both = [m, v].map(|x: &Quantised<Tensor, Codes>| {
                    assert!(x.codes.len == n, "a code of every element");
                    assert!(x.scales.dtype == DType::F32 && x.scales.cols == n.div_ceil(BLOCK), "scales");
                    (address(&x.codes.memory), address(&x.scales.memory))
                });
                (both.map(|(codes, _)| codes), both.map(|(_, scales)| scales))
            }
        };
        let keep = hyper.keep(u.weight_decay);
        Self { grad, grad_bf16, master, m, v, m_scales, v_scales, copy, keep, number, first: 0, len: n }
    }

    /// The chunks of the kernel. The moments are of `bytes` bytes each.
    fn chunks(&self, bytes: usize, chunks: &mut Vec<Chunk>) {
        for at in (0..self.len).step_by(CHUNK) {
            // Null stays null.
            let after = |begin: u64, offset: usize| if begin == 0 { 0 } else { begin + offset as u64 };
            chunks.push(Chunk {
                grad: after(self.grad, 4 * at),
                grad_bf16: after(self.grad_bf16, 2 * at),
                master: after(self.master, 4 * at),
                m: after(self.m, bytes * at),
                v: after(self.v, bytes * at),
                m_scales: after(self.m_scales, 4 * at / BLOCK),
                v_scales: after(self.v_scales, 4 * at / BLOCK),
                copy: after(self.copy, 2 * at),
                len: CHUNK.min(self.len - at) as u32,
                keep: self.keep,
                first: narrow((self.first + at) / BLOCK),
                number: self.number,
            });
        }
    }
}

/// Updates ranges, each with whether its moments are codes.
pub(super) fn launch(cuda: &Cuda, hyper: &AdamW, ranges: &[(Range, bool)]) {
    let (mut of_f32, mut of_codes) = (Vec::new(), Vec::new());
    for (range, codes) in ranges {
        match codes {
            false => range.chunks(DType::F32.bytes(), &mut of_f32),
            true => range.chunks(1, &mut of_codes),
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

/// See [`crate::backend::Optimize::adamw`], of parameters all of which lies on the device.
pub(super) fn step(cuda: &Cuda, hyper: &AdamW, updates: &[&Update<Tensor, Codes>]) {
    let codes = |u: &Update<Tensor, Codes>| matches!(u.moments, Moments::Blockwise { .. });
    let ranges: Vec<(Range, bool)> = updates.iter().map(|u| (Range::of(hyper, u), codes(u))).collect();
    launch(cuda, hyper, &ranges);
}
