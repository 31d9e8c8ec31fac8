use bon_engine::backend::adamw::BLOCK;
use bon_engine::backend::{AdamW, Backend, DType, Moments, Quantised, Update, Weight};

use super::{Case, check, coalescing, counted, counting, single_of, traffic, weight_of, workloads_of};
use crate::ops::randoms;
use crate::tolerance::Rule;

/// Parameters of these numbers of elements through `steps` steps, moments and weights kept in every way, one after another.
struct Steps<'a> {
    sizes: &'a [usize],
    steps: u64,
}

/// How the weight of parameter i is kept, and whether its moments are in codes.
fn kept(i: usize) -> (usize, bool) {
    (i % 3, i / 3 % 2 == 1)
}

impl Case for Steps<'_> {
    fn run<B: Backend>(&self, b: &B) -> Vec<B::Tensor> {
        let mut all = Vec::new();
        for (i, &n) in self.sizes.iter().enumerate() {
            let zeros = || b.zeros(DType::F32, 1, n);
            let quantised = || Quantised {
                codes: b.upload_codes(&vec![0; n]),
                scales: b.zeros(DType::F32, 1, n.div_ceil(BLOCK)),
            };
            let moments = match kept(i).1 {
                false => Moments::F32 { m: zeros(), v: zeros() },
                true => Moments::Blockwise { m: quantised(), v: quantised() },
            };
            // Some begin at zero, and stay too small for bf16.
            let start: Vec<f32> = randoms(i as u32, n)
                .iter()
                .enumerate()
                .map(|(k, x)| if k % 6 == 5 { 0.0 } else { *x })
                .collect();
            let (full, half) = (single_of(b, 1, n, &start), weight_of(b, 1, n, &start));
            all.push((zeros(), moments, full, half));
        }
        for step in 1..=self.steps {
            for (i, (grad, ..)) in all.iter_mut().enumerate() {
                // Gradients of all sizes, zero and one whose square is not normal among them.
                let sizes = [1.0, 1e-3, 0.0, 1e3, 1e-20, 1e-24];
                let grads = randoms(100 * step as u32 + i as u32, self.sizes[i]);
                let grads: Vec<f32> = grads.iter().enumerate().map(|(k, x)| x * sizes[k % 6]).collect();
                *grad = single_of(b, 1, self.sizes[i], &grads);
            }
            let key = [step as u32, 77];
            let hyper = AdamW { lr: 3e-2, beta1: 0.9, beta2: 0.95, eps: 1e-8, step, grad_scale: 0.37, key };
            let mut updates: Vec<Update<B::Tensor, B::Codes>> = all
                .iter_mut()
                .enumerate()
                .map(|(i, (grad, moments, full, half))| {
                    let weight_decay = if i % 3 == 0 { 0.1 } else { 0.0 };
                    let weight = match kept(i).0 {
                        0 => Weight::Master { master: full, copy: half },
                        1 => Weight::F32(full),
                        _ => Weight::Bf16 { weight: half, number: i as u32 },
                    };
                    Update { grad, moments, weight, weight_decay }
                })
                .collect();
            b.adamw(&hyper, &mut updates);
        }
        let codes = |x: Quantised<B::Tensor, B::Codes>| {
            let codes = b.download_codes(&x.codes);
            let codes: Vec<f32> = codes.into_iter().map(f32::from).collect();
            [single_of(b, 1, codes.len(), &codes), x.scales]
        };
        let outputs = |(grad, moments, full, half): (_, _, B::Tensor, B::Tensor)| {
            let moments: Vec<B::Tensor> = match moments {
                Moments::F32 { m, v } => vec![m, v],
                Moments::Blockwise { m, v } => [codes(m), codes(v)].into_iter().flatten().collect(),
            };
            [vec![grad, full, half], moments].into_iter().flatten()
        };
        all.into_iter().flat_map(outputs).collect()
    }
}

/// Which names `outputs` of [`Steps`] have.
fn names(sizes: &[usize]) -> Vec<&'static str> {
    let of = |i: usize| {
        let moments: &[&str] =
            if kept(i).1 { &["codes of m", "scales of m", "codes of v", "scales of v"] } else { &["m", "v"] };
        [&["gradient", "f32 weight", "bf16 weight"], moments].concat()
    };
    (0..sizes.len()).flat_map(of).collect()
}

/// The kernel's operations are the CPU's, so its bits are.
#[test]
fn steps_have_the_bits_of_the_cpu() {
    // Every remainder of 4, a warp's 256 elements and one more, half of them, nothing, a chunk and what begins after it; each in
    // the six ways of keeping moments and weight.
    let sizes = [
        1,
        2,
        3,
        4,
        5,
        0,
        127,
        128,
        130,
        131,
        255,
        256,
        257,
        300,
        511,
        700,
        1023,
        1025,
        64 * 1024,
        64 * 1024 + 1,
        0,
        5,
        64 * 1024 + 8,
        64 * 1024 + 301,
    ];
    check(&names(&sizes), Rule::Exact, &Steps { sizes: &sizes, steps: 2 });
    let sizes = [300; 6];
    check(&names(&sizes), Rule::Exact, &Steps { sizes: &sizes, steps: 6 });
}

#[test]
fn nothing_to_update() {
    check(&[], Rule::Exact, &Steps { sizes: &[], steps: 1 });
}

#[test]
fn every_byte_moves_once() {
    if !counting() {
        return;
    }
    for workload in workloads_of("adamw") {
        let reports = counted(&workload);
        let (coalescing, traffic) = (coalescing(&reports), traffic(&workload, &reports));
        assert_eq!(reports.len(), 1, "one launch for all parameters");
        let asked = 32.0 * reports[0].global.sectors as f64 / workload.bytes as f64;
        assert!(coalescing <= 1.05, "{}: {coalescing}", workload.name);
        assert!(traffic <= 1.05, "{}: {traffic}", workload.name);
        assert!(asked <= 1.05, "{}: {asked}", workload.name);
    }
}
