use bon_engine::backend::Backend;

use super::{Case, activation, check, coalescing, counted, counting, traffic, weight, workloads_of};
use crate::tolerance::Rule;

struct Rows {
    cols: usize,
}

impl Case for Rows {
    fn run<B: Backend>(&self, b: &B) -> Vec<B::Tensor> {
        let (x, dy) = (activation(b, 1, 30, self.cols), activation(b, 2, 4, self.cols));
        let w = weight(b, 3, 30, self.cols);
        vec![b.gather_rows(&x, &[29, 0, 7, 7, 8]), b.scatter_rows(&dy, &[0, 7, 8, 29], 30), b.widened(&w)]
    }
}

#[test]
fn rows_move_where_they_belong() {
    for cols in [8, 16, 640, 2048, 2056] {
        check(&["gathered", "scattered", "widened"], Rule::Exact, &Rows { cols });
    }
}

#[test]
fn rows_are_moved_once() {
    if !counting() {
        return;
    }
    for workload in ["gather_rows", "scatter_rows", "widen_rows"].into_iter().flat_map(workloads_of) {
        let reports = counted(&workload);
        assert!(coalescing(&reports) <= 1.05, "{}", workload.name);
        assert!(traffic(&workload, &reports) <= 1.05, "{}", workload.name);
    }
}
