use bon_engine::backend::RopeSpec;
use bon_engine::backend::cpu::rope::{Direction, rotate};

use super::{random, same_everywhere, wide};
use crate::tolerance::{EPS, assert_within};

#[test]
fn rotation_agrees_at_every_width_forward_and_backward() {
    let widths = (2..=40).step_by(2).map(|dim| (dim, 3, 2)).chain([(256, 130, 4)]);
    for (dim, rows, heads) in widths {
        let all = dim / 2;
        for (pairs, theta, factor) in
            [(all, 10_000.0, 1.0), (all, 1e6, 8.0), (all / 4, 1e6, 1.0), (0, 1.0, 1.0)]
        {
            for direction in [Direction::Forward, Direction::Backward] {
                let x = random(dim as u32, rows, heads * dim);
                let positions: Vec<u32> = (0..rows as u32).map(|t| t * 251 + t * t % 17).collect();
                let y = &same_everywhere(|| {
                    let mut y = x.clone();
                    rotate(&mut y, &positions, &RopeSpec { head_dim: dim, pairs, theta, factor }, direction);
                    vec![y]
                })[0];

                let xs = wide(&x);
                let half = dim / 2;
                let mut want = vec![0.0; xs.len()];
                let mut size = vec![0.0; xs.len()];
                for (t, &position) in positions.iter().enumerate() {
                    for h in 0..heads {
                        for i in 0..half {
                            // The angle is rounded to f32 by contract; everything after it is exact here.
                            let power = theta.powf(f64::from((2 * i) as f32 / dim as f32)) as f32;
                            let frequency = 1.0 / power / factor as f32;
                            let angle = if i < pairs { f64::from(position as f32 * frequency) } else { 0.0 };
                            let angle = if direction == Direction::Forward { angle } else { -angle };
                            let a = (t * heads + h) * dim + i;
                            let b = a + half;
                            want[a] = xs[a] * angle.cos() - xs[b] * angle.sin();
                            want[b] = xs[b] * angle.cos() + xs[a] * angle.sin();
                            size[a] = xs[a].abs() + xs[b].abs();
                            size[b] = size[a];
                        }
                    }
                }
                // sin and cos within eps each, then two roundings.
                assert_within("y", y.as_f32(), &want, |i| 2.0 * EPS * size[i]);
            }
        }
    }
}
