use bon_engine::backend::Backend;

use super::{
    Case, activation, activation_up_to, check, coalescing, counted, counting, devices, outputs, traffic,
    workloads_of,
};
use crate::ops::bits;
use crate::tolerance::Rule;

struct Backward {
    rows: usize,
    cols: usize,
    /// Gates are in (-size, size).
    size: f32,
}

impl Case for Backward {
    fn run<B: Backend>(&self, b: &B) -> Vec<B::Tensor> {
        let (rows, cols) = (self.rows, self.cols);
        let gate = activation_up_to(b, self.size, 1, rows, cols);
        let [dh, up] = [2, 3].map(|seed| activation(b, seed, rows, cols));
        let (d_gate, d_up) = b.geglu_backward(&dh, &gate, &up);
        vec![d_gate, d_up]
    }
}

#[test]
fn any_number_of_elements() {
    // One vector; a block's 256 and one more or less; the widths of Gemma.
    for (rows, cols) in [(1, 8), (1, 2040), (1, 2048), (1, 2056), (3, 24), (0, 8), (2, 16_384), (3, 6912)] {
        check(&["dgate", "dup"], Rule::Backward, &Backward { rows, cols, size: 4.0 });
    }
}

/// From where the gate is nearly linear in x to where it is closed or open altogether.
#[test]
fn gates_of_any_size() {
    for size in [1e-6, 0.1, 1.0, 10.0, 100.0, 1e10] {
        check(&["dgate", "dup"], Rule::Backward, &Backward { rows: 4, cols: 512, size });
    }
}

#[test]
fn bits_do_not_depend_on_the_batch() {
    for cuda in devices() {
        let run = |rows| outputs(&cuda, &Backward { rows, cols: 520, size: 4.0 });
        for (few, many) in run(3).iter().zip(run(70)) {
            // The same numbers stand in front of the longer tensors.
            assert_eq!(bits(few)[..], bits(&many)[..3 * 520]);
        }
    }
}

/// The product with columns of the layers' inputs.
struct Product {
    rows: usize,
    cols: usize,
    first: usize,
    width: usize,
}

impl Case for Product {
    fn run<B: Backend>(&self, b: &B) -> Vec<B::Tensor> {
        let Product { rows, cols, first, width } = *self;
        let gate = activation_up_to(b, 4.0, 1, rows, cols);
        let (dh, inputs) = (activation(b, 2, rows, cols), activation(b, 3, rows, width));
        // What other layers have written stays.
        let mut d_inputs = activation(b, 4, rows, width);
        let h = b.gelu_product_forward(&gate, &inputs, first);
        let d_gate = b.gelu_product_backward(&dh, &gate, &inputs, first, &mut d_inputs);
        vec![h, d_gate, d_inputs]
    }
}

#[test]
fn products_with_columns() {
    for (rows, cols, first, width) in
        [(1, 8, 0, 8), (3, 24, 48, 72), (5, 16, 16, 40), (7, 256, 512, 1024), (0, 8, 8, 16), (257, 8, 0, 16)]
    {
        let product = Product { rows, cols, first, width };
        check(&["h", "dgate", "dinputs"], Rule::Backward, &product);
    }
}

#[test]
fn every_byte_moves_once() {
    if !counting() {
        return;
    }
    for workload in workloads_of("geglu_backward").into_iter().chain(workloads_of("gelu_product")) {
        let reports = counted(&workload);
        let (coalescing, traffic) = (coalescing(&reports), traffic(&workload, &reports));
        let elements = workload.bytes / if workload.name.contains("forward") { 6 } else { 10 };
        let instructions: u64 = reports.iter().flat_map(|r| r.classes.values()).map(|c| c.lanes).sum();
        let instructions = instructions as f64 / elements as f64;
        assert!(coalescing <= 1.05, "{}: {coalescing}", workload.name);
        assert!(traffic <= 1.05, "{}: {traffic}", workload.name);
        // An A100 executes 49 while 10 bytes come from memory.
        assert!(instructions <= 45.0, "{}: {instructions} instructions an element", workload.name);
    }
}
