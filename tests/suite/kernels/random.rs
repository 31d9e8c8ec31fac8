use bon_engine::backend::{Backend, DType, Uniform};

use super::{Case, check, coalescing, counted, counting, traffic, workloads_of};
use crate::tolerance::Rule;

struct Random {
    uniform: Uniform,
    rows: usize,
    cols: usize,
}

impl Case for Random {
    fn run<B: Backend>(&self, b: &B) -> Vec<B::Tensor> {
        [DType::F32, DType::Bf16].map(|dtype| b.random(&self.uniform, dtype, self.rows, self.cols)).into()
    }
}

#[test]
fn numbers_are_those_of_the_cpu() {
    // Every remainder of 8, a block and one more element, nothing, and a matrix.
    let lines = (0..=9).chain([1023, 1024, 1025, 2047, 2048, 2049, 5003]).map(|cols| (1, cols));
    for (rows, cols) in lines.chain([(37, 104)]) {
        let uniform = Uniform { seed: 3 + cols as u32, center: 0.37, spread: 0.3 };
        check(&["f32", "bf16"], Rule::Exact, &Random { uniform, rows, cols });
    }
    check(&["f32", "bf16"], Rule::Exact, &Random { uniform: Uniform::up_to(1.0, 0), rows: 3, cols: 1000 });
}

#[test]
fn every_byte_is_written_once() {
    if !counting() {
        return;
    }
    for workload in workloads_of("random_") {
        let reports = counted(&workload);
        assert_eq!(reports.len(), 1, "{}", workload.name);
        let asked = 32.0 * reports[0].global.sectors as f64 / workload.bytes as f64;
        assert!(coalescing(&reports) <= 1.05 && asked <= 1.05, "{}: {asked}", workload.name);
        assert!(traffic(&workload, &reports) <= 1.05, "{}", workload.name);
    }
}
