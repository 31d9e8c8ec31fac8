//! Rotary position embedding (Su et al. 2021) in Transformers' "rotate half" layout.

use super::Tensor;
use super::rows::for_row_blocks;
use super::simd::{multiversion, sin_cos};
use crate::backend::Direction;

/// The angle per position of every pair, rounded where Transformers rounds: theta^(2i/Dh), its reciprocal and the
/// division by the scaling factor are f32.
fn inverse_frequencies(head_dim: usize, theta: f64, factor: f64) -> Vec<f32> {
    (0..head_dim / 2)
        .map(|i| {
            let exponent = (2 * i) as f32 / head_dim as f32;
            1.0 / theta.powf(f64::from(exponent)) as f32 / factor as f32
        })
        .collect()
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

/// Rotates pairs (i, i + Dh/2) of every head of every row in place by positions\[t\] / factor * theta^(-2i/Dh):
/// (a, b) becomes (a cos - b sin, b cos + a sin). Angle, cosine and sine are f32. Positions up to 2^18.
pub fn rotate(
    x: &mut Tensor,
    positions: &[u32],
    head_dim: usize,
    theta: f64,
    factor: f64,
    direction: Direction,
) {
    assert!(head_dim.is_multiple_of(2) && x.cols.is_multiple_of(head_dim) && positions.len() == x.rows);
    let frequencies = inverse_frequencies(head_dim, theta, factor);
    let sign = match direction {
        Direction::Forward => 1.0,
        Direction::Backward => -1.0,
    };
    let cols = x.cols;
    for_row_blocks(x.as_f32_mut(), cols, |first, block| {
        rotate_rows(block, cols, &positions[first..][..block.len() / cols], &frequencies, sign);
    });
}

#[cfg(test)]
mod tests {
    use super::inverse_frequencies;

    /// Bit patterns that Transformers computes (`ROPE_INIT_FUNCTIONS`, PyTorch float32).
    #[test]
    fn frequencies_are_those_of_transformers() {
        let tables = [
            (256, 1e6, 8.0, [(0, 0x3e000000), (1, 0x3de5ced3), (17, 0x3ca3770f), (127, 0x341583da)]),
            (256, 1e4, 1.0, [(0, 0x3f800000), (2, 0x3f5dafd7), (40, 0x3d6655c2), (127, 0x38e15c91)]),
            (128, 1e4, 1.0, [(1, 0x3f5dafd7), (17, 0x3db15978), (40, 0x3b4f3e38), (63, 0x38f22ce2)]),
        ];
        for (head_dim, theta, factor, want) in tables {
            let frequencies = inverse_frequencies(head_dim, theta, factor);
            assert_eq!(frequencies.len(), head_dim / 2);
            for (i, bits) in want {
                assert_eq!(frequencies[i].to_bits(), bits, "pair {i} of {head_dim}, theta {theta}");
            }
        }
    }
}
