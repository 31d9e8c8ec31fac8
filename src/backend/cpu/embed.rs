//! Token embedding.

use half::bf16;
use rayon::prelude::*;

use super::packed::unpack_row;
use super::rows::for_row_blocks;
use super::simd::{f32_from_bf16, multiversion};
use super::sums::Sums;
use super::{Cpu, Data, Tables, Tensor};
use crate::backend::{DType, Embed};

multiversion! {
    fn scale_f32(row: &[f32], scale: f32, out: &mut [f32]) {
        for (out, x) in out.iter_mut().zip(row) {
            *out = scale * x;
        }
    }
}

multiversion! {
    fn scale_bf16(row: &[bf16], scale: f32, out: &mut [f32]) {
        for (out, x) in out.iter_mut().zip(row) {
            *out = scale * f32_from_bf16(*x);
        }
    }
}

multiversion! {
    fn add_scaled(scale: f32, x: &[f32], y: &mut [f32]) {
        super::simd::axpy(scale, x, y);
    }
}

/// x\[t\] = scale * embedding\[ids\[t\]\]: `[T, D]` f32 from an f32 or bf16 embedding `[V, D]`.
pub fn forward(embedding: &Tensor, ids: &[u32], scale: f32) -> Tensor {
    let cols = embedding.cols;
    let mut out = vec![0.0; ids.len() * cols];
    if let Some(bytes) = embedding.mapped() {
        let size = embedding.dtype().bytes();
        for_row_blocks(&mut out, cols, |first, block| {
            for (&id, out) in ids[first..].iter().zip(block.chunks_exact_mut(cols)) {
                let row = &bytes[id as usize * cols * size..(id as usize + 1) * cols * size];
                match embedding.dtype() {
                    DType::F32 => scale_f32(&bytemuck::pod_collect_to_vec::<u8, f32>(row), scale, out),
                    DType::Bf16 => scale_bf16(&bytemuck::pod_collect_to_vec::<u8, bf16>(row), scale, out),
                }
            }
        });
        return Tensor::f32(ids.len(), cols, out);
    }
    for_row_blocks(&mut out, cols, |first, block| {
        let mut unpacked = Vec::new();
        for (&id, out) in ids[first..].iter().zip(block.chunks_exact_mut(cols)) {
            let row = id as usize * cols..(id as usize + 1) * cols;
            match embedding.data() {
                Data::F32(t) => scale_f32(&t[row], scale, out),
                Data::Bf16(t) => scale_bf16(&t[row], scale, out),
                Data::Packed(t) => {
                    unpacked.resize(cols, bf16::ZERO);
                    unpack_row(t, cols, id as usize, &mut unpacked);
                    scale_bf16(&unpacked, scale, out);
                }
            }
        }
    });
    Tensor::f32(ids.len(), cols, out)
}

/// d_embedding\[ids\[t\]\] += scale * dx\[t\], the tokens of one id in order.
pub fn backward(dx: &Tensor, ids: &[u32], scale: f32, d_embedding: &mut Tensor) {
    /// Rows of the embedding per task.
    const ROWS: usize = 256;
    if d_embedding.rows == 0 {
        return;
    }
    assert_eq!((dx.rows, dx.cols), (ids.len(), d_embedding.cols));
    assert!(ids.iter().all(|&id| (id as usize) < d_embedding.rows));
    let cols = d_embedding.cols;
    let dx = dx.as_f32();
    let mut tokens: Vec<(u32, usize)> = ids.iter().copied().zip(0..).collect();
    tokens.sort_unstable(); // by id, then in order
    Sums::of(d_embedding).chunks(ROWS * cols).into_par_iter().enumerate().for_each(|(i, rows)| {
        let from = tokens.partition_point(|&(id, _)| (id as usize) < i * ROWS);
        let to = tokens.partition_point(|&(id, _)| (id as usize) < (i + 1) * ROWS);
        let mut rows: Vec<Sums> = if from < to { rows.chunks(cols) } else { Vec::new() };
        for tokens in tokens[from..to].chunk_by(|a, b| a.0 == b.0) {
            rows[tokens[0].0 as usize - i * ROWS].add(|row| {
                for &(_, t) in tokens {
                    add_scaled(scale, &dx[t * cols..][..cols], row);
                }
            });
        }
    });
}

impl Embed for Cpu {
    fn embed_forward(&self, embedding: &Tensor, tables: &Tables, scale: f32) -> Tensor {
        forward(embedding, &tables.ids, scale)
    }

    fn embed_backward(&self, dx: &Tensor, tables: &Tables, scale: f32, d_embedding: &mut Tensor) {
        backward(dx, &tables.ids, scale, d_embedding);
    }
}
