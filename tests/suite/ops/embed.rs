use bon_engine::backend::cpu::Tensor;
use bon_engine::backend::cpu::embed::{backward, forward};

use super::{laid_out, random, random_bf16, same_everywhere, wide};
use crate::tolerance::{EPS, assert_within};

/// Repeats, both ends of the embedding, no order.
fn ids(n: usize, vocabulary: u32) -> Vec<u32> {
    (0..n as u32).map(|t| [0, vocabulary - 1, t * 37 % vocabulary, 5][t as usize % 4]).collect()
}

#[test]
fn forward_scales_rows_of_f32_and_bf16_tables() {
    for cols in (1..=40).chain([640]) {
        let ids = ids(50, 608);
        let f32_table = random(1, 608, cols);
        let (bf16_table, bf16_values) = random_bf16(2, 608, cols);
        let as_held = laid_out(&bf16_table);
        let f32_values = wide(&f32_table);
        for (embedding, values) in
            [(&f32_table, f32_values), (&bf16_table, bf16_values.clone()), (&as_held, bf16_values)]
        {
            let x = &same_everywhere(|| vec![forward(embedding, &ids, 25.3)])[0];
            let row = |&id: &u32| values[id as usize * cols..][..cols].to_vec();
            let want: Vec<f64> = ids.iter().flat_map(row).map(|x| x * f64::from(25.3f32)).collect();
            assert_within("x", x.as_f32(), &want, |i| 0.5 * EPS * want[i].abs());
        }
    }
}

#[test]
fn backward_adds_the_tokens_of_each_id() {
    for cols in (1..=40).chain([640]) {
        let ids = ids(50, 600);
        let (dx, before) = (random(3, 50, cols), random(4, 600, cols));
        let got = &same_everywhere(|| {
            let mut d_embedding = before.clone();
            backward(&dx, &ids, 25.3, &mut d_embedding);
            vec![d_embedding]
        })[0];
        let mut want = wide(&before);
        let mut size: Vec<f64> = want.iter().map(|x| x.abs()).collect();
        for (t, &id) in ids.iter().enumerate() {
            for c in 0..cols {
                let term = f64::from(25.3f32) * wide(&dx)[t * cols + c];
                want[id as usize * cols + c] += term;
                size[id as usize * cols + c] += term.abs();
            }
        }
        // At most 26 tokens share an id, one rounding each.
        assert_within("d_embedding", got.as_f32(), &want, |i| 13.0 * EPS * size[i]);
    }
}

#[test]
#[should_panic]
fn an_id_beyond_the_table_is_a_bug_of_the_caller() {
    backward(&random(1, 1, 4), &[9], 1.0, &mut Tensor::f32(9, 4, vec![0.0; 36]));
}
