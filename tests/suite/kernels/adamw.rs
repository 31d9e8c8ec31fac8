use bon_engine::backend::{AdamW, Backend, DType, Update};

use super::{Case, check, coalescing, counted, counting, single, single_of, traffic, workloads_of};
use crate::ops::randoms;
use crate::tolerance::Rule;

/// Parameters of these numbers of elements, every other one with a copy, through `steps` steps.
struct Steps<'a> {
    sizes: &'a [usize],
    steps: u64,
}

impl Case for Steps<'_> {
    fn run<B: Backend>(&self, b: &B) -> Vec<B::Tensor> {
        let mut all = Vec::new();
        for (i, &n) in self.sizes.iter().enumerate() {
            let zeros = || b.zeros(DType::F32, 1, n);
            let copy = (i % 2 == 0).then(|| b.zeros(DType::Bf16, 1, n));
            all.push((zeros(), single(b, i as u32, 1, n), zeros(), zeros(), copy));
        }
        for step in 1..=self.steps {
            for (i, (grad, ..)) in all.iter_mut().enumerate() {
                // Gradients of all sizes, zero and one whose square is not normal among them.
                let sizes = [1.0, 1e-3, 0.0, 1e3, 1e-20];
                let grads = randoms(100 * step as u32 + i as u32, self.sizes[i]);
                let grads: Vec<f32> = grads.iter().enumerate().map(|(k, x)| x * sizes[k % 5]).collect();
                *grad = single_of(b, 1, self.sizes[i], &grads);
            }
            let hyper = AdamW { lr: 3e-2, beta1: 0.9, beta2: 0.95, eps: 1e-8, step, grad_scale: 0.37 };
            let mut updates: Vec<Update<B::Tensor>> = all
                .iter_mut()
                .enumerate()
                .map(|(i, (grad, master, m, v, copy))| {
                    let weight_decay = if i % 3 == 0 { 0.1 } else { 0.0 };
                    Update { grad, master, m, v, copy: copy.as_mut(), weight_decay }
                })
                .collect();
            b.adamw(&hyper, &mut updates);
        }
        all.into_iter()
            .flat_map(|(grad, master, m, v, copy)| [Some(grad), Some(master), Some(m), Some(v), copy])
            .flatten()
            .collect()
    }
}

/// Which names `outputs` of [`Steps`] have.
fn names(sizes: &[usize]) -> Vec<&'static str> {
    let all = ["gradient", "master", "m", "v", "copy"];
    (0..sizes.len()).flat_map(|i| all[..if i % 2 == 0 { 5 } else { 4 }].iter().copied()).collect()
}

/// The kernel's operations are the CPU's, so its bits are; the copy is rounded to nearest even on both.
#[test]
fn steps_have_the_bits_of_the_cpu() {
    // Every remainder of 4, a block's 256 threads and one more, nothing, a chunk and what begins after it.
    let sizes = [1, 2, 3, 4, 5, 0, 1023, 1024, 1025, 1031, 64 * 1024, 64 * 1024 + 1, 64 * 1024 + 8];
    check(&names(&sizes), Rule::Exact, &Steps { sizes: &sizes, steps: 2 });
    check(&names(&[300]), Rule::Exact, &Steps { sizes: &[300], steps: 6 });
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
