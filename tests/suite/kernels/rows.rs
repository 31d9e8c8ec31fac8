use bon_engine::backend::Backend;
use bon_engine::backend::cpu::Cpu;

use super::{
    Case, activation, check, coalescing, counted, counting, devices, outputs, rounded, single, traffic,
    weight, workloads_of,
};
use crate::ops::bits;
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

struct Sums {
    cols: usize,
}

impl Case for Sums {
    fn run<B: Backend>(&self, b: &B) -> Vec<B::Tensor> {
        let (x, y) = (activation(b, 1, 30, self.cols), activation(b, 2, 30, self.cols));
        let mut sum = single(b, 3, 30, self.cols);
        b.accumulate(&x, &mut sum);
        b.accumulate(&y, &mut sum);
        let x = b.narrowed(&sum);
        vec![sum, x]
    }
}

struct Scaled {
    cols: usize,
}

impl Case for Scaled {
    fn run<B: Backend>(&self, b: &B) -> Vec<B::Tensor> {
        [1.0, 0.3, -2.5].map(|factor| b.scaled(activation(b, 1, 30, self.cols), factor)).into()
    }
}

#[test]
fn rows_are_scaled_and_rounded_once() {
    for cols in [8, 12, 640, 2056] {
        for cuda in devices() {
            let (got, want) = (outputs(&cuda, &Scaled { cols }), outputs(&Cpu::F32, &Scaled { cols }));
            for (got, want) in got.iter().zip(&want) {
                assert_eq!(got.as_f32(), rounded(want.as_f32()), "{cols} columns");
            }
        }
    }
}

/// Sums in f32 have the CPU's bits, and are rounded once.
#[test]
fn sums_of_activations() {
    for cols in [8, 12, 640, 2056] {
        for cuda in devices() {
            let (got, want) = (outputs(&cuda, &Sums { cols }), outputs(&Cpu::F32, &Sums { cols }));
            assert_eq!(bits(&got[0]), bits(&want[0]), "{cols} columns");
            assert_eq!(got[1].as_f32(), rounded(want[1].as_f32()), "{cols} columns");
        }
    }
}

#[test]
fn rows_are_moved_once() {
    if !counting() {
        return;
    }
    let all = ["gather_rows", "scatter_rows", "widen_rows", "accumulate_rows", "narrow_rows"];
    for workload in all.into_iter().flat_map(workloads_of) {
        let reports = counted(&workload);
        assert!(coalescing(&reports) <= 1.05, "{}", workload.name);
        assert!(traffic(&workload, &reports) <= 1.05, "{}", workload.name);
    }
}
