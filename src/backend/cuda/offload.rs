//! AdamW of moments and masters that lie in page-locked memory of the host: they are streamed through two buffers on the device.
//! While AdamW updates what is in one, the other's contents go back and the next come, on lanes of their own.
//!
//! The state is cut into pieces that fill a buffer. A block of 256 elements, whose moments have a scale in common, lies in one
//! piece, and every element meets the same operations as where nothing is streamed: no bit depends on the cut.

use std::sync::atomic::Ordering;

use super::adamw::{self, Codes, Range, launch};
use super::{Cuda, Memory, Tensor, rows};
use crate::backend::adamw::BLOCK;
use crate::backend::{AdamW, DType, Moments, Optimize, Platform, Update, Weight};
use crate::device::arena::ALIGN;
use crate::device::{HostPtr, Lane, Ptr};

/// Bytes of a buffer: some milliseconds of a bus, beside which the calls for a piece take little.
pub const BUFFER: usize = 64 << 20;
/// A block with all that may belong to it, each part aligned.
pub const MIN_BUFFER: usize = 5 * (ALIGN as usize + 4 * BLOCK);

/// What marks stand behind. Each is of one lane, by buffer where there are two.
const BEGIN: usize = 0;
const CAME: [usize; 2] = [1, 2];
const UPDATED: [usize; 2] = [3, 4];
const WENT: [usize; 2] = [5, 6];

/// Whether the moments lie in the host's memory, and the master, if there is one.
pub(super) fn on_host(u: &Update<Tensor, Codes>) -> bool {
    let of = |memory: &Memory| memory.host.is_some();
    let moments = match &*u.moments {
        Moments::F32 { m, v } => [of(&m.memory), of(&v.memory)],
        Moments::Blockwise { m, v } => {
            [of(&m.codes.memory) && of(&m.scales.memory), of(&v.codes.memory) && of(&v.scales.memory)]
        }
    };
    let master = match &u.weight {
        Weight::Master { master, .. } => of(&master.memory),
        Weight::F32(_) | Weight::Bf16 { .. } => moments[0],
    };
    assert!(moments == [master; 2], "moments and master lie in one memory");
    master
}

/// A part of the state of a parameter: where it begins, and its bytes for a block.
#[derive(Debug, Clone, Copy)]
struct Part {
    host: HostPtr,
    block: usize,
}

/// A parameter's parts: m, v, their scales, the master.
fn parts(u: &Update<Tensor, Codes>) -> [Option<Part>; 5] {
    let part = |memory: &Memory, block| memory.host.map(|host| Part { host, block });
    let f32s = BLOCK * DType::F32.bytes();
    let ([m, v], scales) = match &*u.moments {
        Moments::F32 { m, v } => ([m, v].map(|x| part(&x.memory, f32s)), [None; 2]),
        Moments::Blockwise { m, v } => (
            [m, v].map(|x| part(&x.codes.memory, BLOCK)),
            [m, v].map(|x| part(&x.scales.memory, DType::F32.bytes())),
        ),
    };
    let master = match &u.weight {
        Weight::Master { master, .. } => part(&master.memory, f32s),
        Weight::F32(_) | Weight::Bf16 { .. } => None,
    };
    [m, v, scales[0], scales[1], master]
}

/// What is copied for a piece, both ways.
struct Copy {
    host: HostPtr,
    /// From the beginning of the buffer.
    at: usize,
    bytes: usize,
}

/// What fills a buffer.
#[derive(Default)]
struct Piece {
    copies: Vec<Copy>,
    /// With addresses as if the buffer began at [`BASE`], and whether moments are codes.
    ranges: Vec<(Range, bool)>,
    filled: usize,
}

/// Where a buffer begins as long as nobody knows where it does: not at 0, which is no address.
const BASE: u64 = 1 << 20;

/// Cuts the state into pieces of at most `room` bytes.
fn pieces(hyper: &AdamW, updates: &[&Update<Tensor, Codes>], room: usize) -> Vec<Piece> {
    let mut all = vec![Piece::default()];
    for u in updates {
        let (whole, parts) = (Range::of(hyper, u), parts(u));
        let codes = matches!(u.moments, Moments::Blockwise { .. });
        let known: Vec<Part> = parts.iter().flatten().copied().collect();
        let of_block: usize = known.iter().map(|part| part.block).sum();
        let (blocks, mut done) = (whole.len.div_ceil(BLOCK), 0);
        while done < blocks {
            let last = all.last_mut().expect("there is one");
            // Each part may be aligned.
            let left = room.saturating_sub(last.filled + known.len() * ALIGN as usize);
            let taken = (left / of_block).min(blocks - done);
            if taken == 0 {
                all.push(Piece::default());
                continue;
            }
            let first = done * BLOCK;
            let len = (taken * BLOCK).min(whole.len - first);
            let addresses = parts.map(|part| {
                let Some(Part { host, block }) = part else { return 0 };
                let at = last.filled.next_multiple_of(ALIGN as usize);
                // The last block may be shorter than others; a scale is never.
                let bytes = if block < BLOCK { block * taken } else { block / BLOCK * len };
                last.copies.push(Copy { host: host.at(done * block), at, bytes });
                last.filled = at + bytes;
                BASE + at as u64
            });
            let [m, v, m_scales, v_scales, master] = addresses;
            let after =
                |begin: u64, bytes: usize| if begin == 0 { 0 } else { begin + (bytes * first) as u64 };
            let (grad, grad_bf16) = (after(whole.grad, 4), after(whole.grad_bf16, 2));
            let copy = after(whole.copy, 2);
            let state =
                Range { grad, grad_bf16, copy, m, v, m_scales, v_scales, master, first, len, ..whole };
            last.ranges.push((state, codes));
            done += taken;
        }
    }
    all.retain(|piece| !piece.ranges.is_empty());
    all
}

impl Piece {
    /// Its ranges, in the buffer that begins at `base`.
    fn ranges_in(&self, base: Ptr) -> Vec<(Range, bool)> {
        let moved = |at: u64| if at == 0 { 0 } else { at - BASE + base.0 };
        let of = |&(range, codes): &(Range, bool)| {
            let [m, v, m_scales, v_scales, master] =
                [range.m, range.v, range.m_scales, range.v_scales, range.master].map(moved);
            (Range { m, v, m_scales, v_scales, master, ..range }, codes)
        };
        self.ranges.iter().map(of).collect()
    }
}

/// y = x in f32, section by section through a buffer: x `[rows, cols]` on the device in bf16, y in the host's memory.
pub(super) fn widen(cuda: &Cuda, x: &Tensor, y: &Tensor) {
    let row = x.cols * DType::F32.bytes();
    let Some(host) = y.memory.host else { return };
    let count = (cuda.0.buffer.load(Ordering::Relaxed) / row).clamp(1, x.rows);
    let buffer = cuda.empty(DType::F32, count, x.cols);
    for first in (0..x.rows).step_by(count) {
        let section = first..x.rows.min(first + count);
        let bytes = section.len() * row;
        if first > 0 {
            cuda.attempt(|device| device.wait_for(Lane::Compute, WENT[0]));
        }
        rows::widen(cuda, x, section, &buffer);
        cuda.attempt(|device| {
            device.mark(Lane::Compute, UPDATED[0])?;
            device.wait_for(Lane::Out, UPDATED[0])?;
            device.copy_out(host.at(first * row), buffer.memory.ptr(), bytes)?;
            device.mark(Lane::Out, WENT[0])
        });
    }
    cuda.attempt(|device| device.wait_for(Lane::Compute, WENT[0]));
}

/// Updates parameters whose moments and masters lie in the host's memory.
pub(super) fn step(cuda: &Cuda, hyper: &AdamW, updates: &[&Update<Tensor, Codes>]) {
    let all = pieces(hyper, updates, cuda.0.buffer.load(Ordering::Relaxed));
    let Some(largest) = all.iter().map(|piece| piece.filled).max() else { return };
    let buffers: Vec<Memory> = (0..all.len().min(2)).map(|_| cuda.memory(largest)).collect();
    let come = |i: usize| {
        let buffer = buffers[i % 2].ptr();
        cuda.attempt(|device| {
            for Copy { host, at, bytes } in &all[i].copies {
                device.copy_in(Ptr(buffer.0 + *at as u64), *host, *bytes)?;
            }
            device.mark(Lane::In, CAME[i % 2])
        });
    };
    // Whatever had the buffers' memory before has ended.
    cuda.attempt(|device| device.mark(Lane::Compute, BEGIN));
    cuda.attempt(|device| device.wait_for(Lane::In, BEGIN));
    come(0);
    for (i, piece) in all.iter().enumerate() {
        if i + 1 < all.len() {
            if i > 0 {
                cuda.attempt(|device| device.wait_for(Lane::In, WENT[(i + 1) % 2]));
            }
            come(i + 1);
        }
        cuda.attempt(|device| device.wait_for(Lane::Compute, CAME[i % 2]));
        let buffer = buffers[i % 2].ptr();
        launch(cuda, hyper, &piece.ranges_in(buffer));
        cuda.attempt(|device| {
            device.mark(Lane::Compute, UPDATED[i % 2])?;
            device.wait_for(Lane::Out, UPDATED[i % 2])?;
            for Copy { host, at, bytes } in &piece.copies {
                device.copy_out(*host, Ptr(buffer.0 + *at as u64), *bytes)?;
            }
            device.mark(Lane::Out, WENT[i % 2])
        });
    }
    // Who gets the buffers' memory next works in the lane of launches.
    for went in &WENT[..buffers.len()] {
        cuda.attempt(|device| device.wait_for(Lane::Compute, *went));
    }
}

impl Optimize for Cuda {
    fn host_widened(&self, x: &Tensor) -> Tensor {
        let y = self.host_zeros(DType::F32, x.rows, x.cols);
        widen(self, x, &y);
        y
    }

    fn adamw(&self, hyper: &AdamW, updates: &mut [Update<Tensor, Codes>]) {
        let (on_host, here): (Vec<_>, Vec<_>) = updates.iter().partition(|u| on_host(u));
        adamw::step(self, hyper, &here);
        step(self, hyper, &on_host);
    }
}
