//! Every op of the CPU backend against a naive f64 one, and against itself on other instruction sets and thread counts.

mod adamw;
mod attention;
mod embed;
mod experts;
mod geglu;
mod lm_head;
mod matmul;
mod random;
mod reduce;
mod rms_norm;
mod rope;
mod rows;

use bon_engine::backend::cpu::simd::{Isa, detect, with_isa};
use bon_engine::backend::cpu::{Cpu, Data, Tensor};
use bon_engine::backend::ops::*;
use bon_engine::rng::philox4x32;
use bon_engine::segments::{Segment, Segments};
use half::bf16;

/// `n` floats in (-1, 1), different for every seed.
pub(crate) fn randoms(seed: u32, n: usize) -> Vec<f32> {
    (0..n as u32).map(|i| (philox4x32([i, 0, 0, 0], [seed, 7])[0] >> 7) as f32 / 16_777_216.0 - 1.0).collect()
}

/// An f32 matrix of [`randoms`].
pub(crate) fn random(seed: u32, rows: usize, cols: usize) -> Tensor {
    Tensor::f32(rows, cols, randoms(seed, rows * cols))
}

/// The same matrix in bf16, and its values.
pub(crate) fn random_bf16(seed: u32, rows: usize, cols: usize) -> (Tensor, Vec<f64>) {
    let data: Vec<bf16> = randoms(seed, rows * cols).into_iter().map(bf16::from_f32).collect();
    let values = data.iter().map(|x| x.to_f64()).collect();
    (Tensor::new(rows, cols, Data::Bf16(data)), values)
}

/// The same matrix as models hold their weights: packed, where its shape allows.
pub(crate) fn laid_out(x: &Tensor) -> Tensor {
    Cpu::F32.upload_weight(x.dtype(), x.rows, x.cols, &Cpu::F32.download(x))
}

/// In f64.
pub(crate) fn wide(x: &Tensor) -> Vec<f64> {
    x.as_f32().iter().map(|&x| f64::from(x)).collect()
}

/// Bit patterns, which tell -0 from 0.
pub(crate) fn bits(x: &Tensor) -> Vec<u32> {
    match x.data() {
        Data::F32(x) => x.iter().map(|x| x.to_bits()).collect(),
        Data::Bf16(x) | Data::Packed(x) => x.iter().map(|x| u32::from(x.to_bits())).collect(),
    }
}

/// Runs `f` on every instruction set that the machine has and on 1, 2 and 3 threads, asserts that it gives the same bits
/// each time, and returns its result.
#[track_caller]
pub(crate) fn same_everywhere(f: impl Fn() -> Vec<Tensor> + Sync) -> Vec<Tensor> {
    let want = f();
    let want_bits: Vec<_> = want.iter().map(bits).collect();
    for threads in [1, 2, 3] {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a thread pool");
        for isa in Isa::ALL.into_iter().filter(|&isa| isa <= detect()) {
            let got = with_isa(isa, || pool.install(&f));
            let same = got.iter().map(bits).eq(want_bits.iter().cloned());
            assert!(same, "other bits with {threads} threads on {isa:?}");
        }
    }
    want
}

/// A few-shot root, two prompts after it, responses after these, one separate sequence: laid out of order and with
/// rows between them that belong to nobody.
pub(crate) fn tree() -> Segments {
    let s = |start, len, position, prefix| Segment { start, len, position, prefix };
    Segments::new(vec![
        s(30, 5, 0, None),
        s(2, 6, 5, Some(0)),
        s(10, 4, 11, Some(1)),
        s(14, 7, 11, Some(1)),
        s(21, 3, 5, Some(0)),
        s(36, 9, 8, Some(4)),
        s(24, 4, 0, None),
    ])
    .expect("a valid table")
}

/// One prompt of `prompt` tokens, with responses.
pub(crate) fn group(prompt: usize, responses: &[usize]) -> Segments {
    let mut list = vec![Segment { start: 0, len: prompt, position: 0, prefix: None }];
    for &len in responses {
        let last = list[list.len() - 1];
        list.push(Segment { start: last.start + last.len, len, position: prompt, prefix: Some(0) });
    }
    Segments::new(list).expect("a valid table")
}
