//! Rotary position embedding (Su et al. 2021) in Transformers' "rotate half" layout.

use super::Tensor;
use super::rows::for_row_blocks;
use super::simd::{multiversion, sin_cos};
use crate::backend::RopeSpec;

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
