//! Rotary position embedding (Su et al. 2021) in Transformers' "rotate half" layout.

use super::rows::{self, for_row_blocks};
use super::simd::{multiversion, sin_cos};
use super::{Cpu, Tables, Tensor, rms_norm};
use crate::backend::{HeadNorm, Rope, RopeSpec};

/// Which way to turn: backward is the inverse rotation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// By +angle.
    Forward,
    /// By -angle: the transpose, which carries gradients back.
    Backward,
}

multiversion! {
    /// Rotates every head of a block of rows by `sign` times its angles.
    fn rotate_rows(x: &mut [f32], cols: usize, positions: &[u32], frequencies: &[f32], sign: f32) {
        let half = frequencies.len();
        let (mut sin, mut cos) = (vec![0.0; half], vec![0.0; half]);
        for (row, &position) in x.chunks_exact_mut(cols).zip(positions) {
            for ((s, c), f) in sin.iter_mut().zip(&mut cos).zip(frequencies) {
                (*s, *c) = sin_cos(position as f32 * f);
                *s *= sign;
            }
            for head in row.chunks_exact_mut(2 * half) {
                let (a, b) = head.split_at_mut(half);
                for (((a, b), s), c) in a.iter_mut().zip(b).zip(&sin).zip(&cos) {
                    let (x, y) = (*a, *b);
                    *a = x.mul_add(*c, -(y * s));
                    *b = y.mul_add(*c, x * s);
                }
            }
        }
    }
}

/// Rotates pairs (i, i + Dh/2) of every head of every row in place: (a, b) becomes (a cos - b sin, b cos + a sin).
/// Angle, cosine and sine are f32. Positions up to 2^18.
pub fn rotate(x: &mut Tensor, positions: &[u32], rope: &RopeSpec, direction: Direction) {
    let head_dim = rope.head_dim;
    assert!(head_dim.is_multiple_of(2) && x.cols.is_multiple_of(head_dim) && positions.len() == x.rows);
    if rope.pairs == 0 {
        return;
    }
    let frequencies = rope.inverse_frequencies();
    let sign = match direction {
        Direction::Forward => 1.0,
        Direction::Backward => -1.0,
    };
    let cols = x.cols;
    for_row_blocks(x.as_f32_mut(), cols, |first, block| {
        rotate_rows(block, cols, &positions[first..][..block.len() / cols], &frequencies, sign);
    });
}

impl Rope for Cpu {
    fn rope_forward(
        &self,
        x: &Tensor,
        norm: Option<HeadNorm<&Tensor>>,
        tables: &Tables,
        rope: &RopeSpec,
    ) -> Tensor {
        let of_head = |norm: HeadNorm<&Tensor>| rms_norm::forward(x, norm.weight, rope.head_dim, norm.spec);
        let mut y = norm.map_or_else(|| x.clone(), of_head);
        rotate(&mut y, &tables.positions, rope, Direction::Forward);
        y
    }

    fn rope_append(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        [q_norm, k_norm, v_norm]: [Option<HeadNorm<&Tensor>>; 3],
        tables: &Tables,
        rope: &RopeSpec,
        cached_k: &mut Tensor,
        cached_v: &mut Tensor,
    ) -> Tensor {
        rows::write(&self.rope_forward(k, k_norm, tables, rope), &tables.kv_rows, cached_k);
        match v_norm {
            Some(norm) => {
                let v = rms_norm::forward(v, norm.weight, rope.head_dim, norm.spec);
                rows::write(&v, &tables.kv_rows, cached_v);
            }
            None => rows::write(v, &tables.kv_rows, cached_v),
        }
        self.rope_forward(q, q_norm, tables, rope)
    }

    fn rope_backward(
        &self,
        dy: &Tensor,
        x: &Tensor,
        norm: Option<HeadNorm<(&Tensor, &mut Tensor)>>,
        tables: &Tables,
        rope: &RopeSpec,
    ) -> Tensor {
        let mut dx = dy.clone();
        rotate(&mut dx, &tables.positions, rope, Direction::Backward);
        match norm {
            Some(HeadNorm { weight, spec }) => rms_norm::backward(&dx, x, weight, rope.head_dim, spec),
            None => dx,
        }
    }
}
