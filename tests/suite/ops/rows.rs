use bon_engine::backend::cpu::rows::{add_scaled, scale, write};
use bon_engine::backend::cpu::{Cpu, Data, Tensor};
use bon_engine::backend::ops::*;
use half::bf16;

use super::{random, same_everywhere};

#[test]
fn rows_move_where_they_belong() {
    for cols in (1..=40).chain([2000]) {
        let (x, dy) = (random(1, 30, cols), random(2, 4, cols));
        let rows = [29, 0, 7, 8];
        let out = same_everywhere(|| {
            let mut written = x.clone();
            write(&dy, &rows, &mut written);
            vec![Cpu::F32.gather_rows(&x, &rows), written]
        });
        let row =
            |t: &bon_engine::backend::cpu::Tensor, r: usize| t.as_f32()[r * cols..(r + 1) * cols].to_vec();
        for r in 0..30 {
            match rows.iter().position(|&x| x as usize == r) {
                Some(i) => {
                    assert_eq!(row(&out[0], i), row(&x, r));
                    assert_eq!(row(&out[1], r), row(&dy, i));
                }
                None => assert_eq!(row(&out[1], r), row(&x, r)),
            }
        }
    }
}

#[test]
fn gather_may_repeat_rows() {
    let x = random(1, 3, 5);
    assert_eq!(Cpu::F32.gather_rows(&x, &[2, 2]).as_f32(), [&x.as_f32()[10..], &x.as_f32()[10..]].concat());
}

#[test]
fn sums_and_products_everywhere() {
    for n in (1..=40).chain([50_000]) {
        let (x, y) = (random(1, 1, n), random(2, 1, n));
        for factor in [1.0, 0.3] {
            let out = &same_everywhere(|| {
                let (mut sum, mut product) = (x.clone(), x.clone());
                add_scaled(&mut sum, &y, factor);
                scale(&mut product, factor);
                vec![sum, product]
            });
            let (x, y) = (x.as_f32(), y.as_f32());
            assert!((0..n).all(|i| out[0].as_f32()[i] == (x[i] + y[i]) * factor));
            assert!((0..n).all(|i| out[1].as_f32()[i] == x[i] * factor));
        }
    }
}

#[test]
fn widening_keeps_every_number() {
    for (rows, cols) in [(1, 1), (3, 5), (70, 300), (1, 40_000)] {
        let x = random(1, rows, cols);
        let narrow: Vec<bf16> = x.as_f32().iter().map(|x| bf16::from_f32(*x)).collect();
        let want: Vec<f32> = narrow.iter().map(|x| x.to_f32()).collect();
        let narrow = Tensor::new(rows, cols, Data::Bf16(narrow));
        assert_eq!(same_everywhere(|| vec![Cpu::F32.widened(&narrow)])[0].as_f32(), want);
        assert_eq!(Cpu::F32.widened(&x), x);
    }
}
