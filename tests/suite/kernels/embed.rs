use bon_engine::backend::cpu::Cpu;
use bon_engine::backend::ops::*;
use bon_engine::backend::{Backend, Batch, Choice, Decode, HeadSpec, Truncation};
use bon_engine::segments::Segments;

use super::{
    Case, activation, check, coalescing, counted, counting, devices, outputs, rounded, single, traffic,
    weight, workloads_of,
};
use crate::tolerance::Rule;

const SCALE: f32 = 25.3;
const VOCAB: usize = 50;

fn tables<B: Backend>(b: &B, ids: &[u32]) -> B::Tables {
    let segments = Segments::separate(&[ids.len()]);
    let runs = segments.all_queries();
    b.tables(&Batch::new(ids, &segments, &runs), &[])
}

struct Forward<'a> {
    ids: &'a [u32],
    cols: usize,
}

impl Case for Forward<'_> {
    fn run<B: Backend>(&self, b: &B) -> Vec<B::Tensor> {
        vec![b.embed_forward(&weight(b, 1, VOCAB, self.cols), &tables(b, self.ids), SCALE)]
    }
}

struct Backward<'a> {
    ids: &'a [u32],
    cols: usize,
}

impl Case for Backward<'_> {
    fn run<B: Backend>(&self, b: &B) -> Vec<B::Tensor> {
        let dx = activation(b, 2, self.ids.len(), self.cols);
        let mut d_embedding = single(b, 3, VOCAB, self.cols);
        b.embed_backward(&dx, &tables(b, self.ids), SCALE, &mut d_embedding);
        vec![d_embedding]
    }
}

/// Both ends of the embedding, an id twice, others never.
const IDS: [u32; 6] = [49, 0, 7, 31, 7, 1];

/// One vector, a block's threads and one vector more, the widths of Gemma 3 270M, 2B and more than a block's threads.
const WIDTHS: [usize; 8] = [8, 248, 256, 264, 640, 2048, 2056, 5376];

#[test]
fn rows_of_every_width() {
    for cols in WIDTHS {
        check(&["x"], Rule::Forward, &Forward { ids: &IDS, cols });
        // The kernel adds in the CPU's order.
        check(&["d_embedding"], Rule::Exact, &Backward { ids: &IDS, cols });
    }
}

#[test]
fn forward_has_the_bits_of_the_cpu() {
    let case = Forward { ids: &IDS, cols: 640 };
    for cuda in devices() {
        assert!(outputs(&cuda, &case)[0].as_f32() == rounded(outputs(&Cpu::F32, &case)[0].as_f32()));
    }
}

/// The rows of tokens that only the device knows are those of the same tokens told by the host.
#[test]
fn tokens_just_drawn_are_embedded_as_known_ones() {
    const HEAD: HeadSpec = HeadSpec { softcap: None, temperature: 1.0 };
    let from = [5, 0, 0, 3, 6];
    for cuda in devices() {
        for cols in [8, 264, 2056] {
            let (embedding, x) = (weight(&cuda, 1, VOCAB, cols), activation(&cuda, 2, 7, cols));
            let mut draws = cuda.draws(9);
            cuda.lm_head_draw(
                &x,
                &embedding,
                &HEAD,
                &Truncation::default(),
                &[0, 1, 2, 3, 4, 5, 6],
                &[Choice::Greedy; 7],
                &mut draws,
            );
            let segments = Segments::separate(&[from.len()]);
            let runs = segments.all_queries();
            let step = Decode { draws: &draws, from: &from, segments: &segments, runs: &runs };
            let got = cuda.to_f32(&cuda.embed_forward(&embedding, &cuda.decode_tables(&step, &[]), SCALE));
            let drawn = cuda.take_draw(&mut draws).unwrap();
            let ids = from.map(|row| drawn[row as usize].token);
            assert!(ids[0] != ids[1] && ids[1] != ids[3], "{ids:?}");
            let want = cuda.to_f32(&cuda.embed_forward(&embedding, &tables(&cuda, &ids), SCALE));
            assert!(got == want, "{cols} columns");
        }
    }
}

/// A row of NaN draws no token, and what embeds that reads no memory that is not the embedding's.
#[test]
fn what_is_no_token_is_embedded_as_some_token() {
    const HEAD: HeadSpec = HeadSpec { softcap: None, temperature: 1.0 };
    for cuda in devices() {
        let (embedding, x) =
            (weight(&cuda, 1, VOCAB, 16), super::activation_of(&cuda, 1, 16, &[f32::NAN; 16]));
        let mut draws = cuda.draws(1);
        cuda.lm_head_draw(&x, &embedding, &HEAD, &Truncation::default(), &[0], &[Choice::Greedy], &mut draws);
        let segments = Segments::separate(&[1]);
        let runs = segments.all_queries();
        let step = Decode { draws: &draws, from: &[0], segments: &segments, runs: &runs };
        let got = cuda.to_f32(&cuda.embed_forward(&embedding, &cuda.decode_tables(&step, &[]), SCALE));
        assert!(cuda.check().is_ok() && got.iter().all(|x| x.is_finite()), "{got:?}");
        assert!(cuda.take_draw(&mut draws).unwrap()[0].logprob.is_nan());
    }
}

/// Tokens are added eight at a time, then one by one.
#[test]
fn ids_of_every_frequency() {
    for most in [1, 2, 7, 8, 9, 15, 16, 17, 100] {
        // Id i occurs up to `most` times, spread over the batch.
        let mut ids: Vec<u32> =
            (0..4).flat_map(|i| vec![i * 13; most - (i as usize).min(most - 1)]).collect();
        let n = ids.len();
        for t in 0..n {
            ids.swap(t, t * 7919 % n);
        }
        check(&["d_embedding"], Rule::Exact, &Backward { ids: &ids, cols: 24 });
    }
}

#[test]
fn no_tokens_are_no_work() {
    check(&["x"], Rule::Exact, &Forward { ids: &[], cols: 16 });
    check(&["d_embedding"], Rule::Exact, &Backward { ids: &[], cols: 16 });
}

#[test]
fn every_byte_moves_once() {
    if !counting() {
        return;
    }
    for workload in workloads_of("embed") {
        let reports = counted(&workload);
        let (coalescing, traffic) = (coalescing(&reports), traffic(&workload, &reports));
        assert!(coalescing <= 1.05, "{}: {coalescing}", workload.name);
        assert!(traffic <= 1.05, "{}: {traffic}", workload.name);
    }
}
