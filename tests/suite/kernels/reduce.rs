use bon_engine::backend::Backend;
use bon_engine::backend::cpu::Cpu;

use super::{again, coalescing, counted, counting, devices, single_of, traffic, workloads_of};
use crate::ops::randoms;

/// Elements of a chunk, threads of a block, as in src/backend/cuda/reduce.rs.
const CHUNK: usize = 64 * 1024;
const BLOCK: usize = 256;

fn sums<B: Backend>(b: &B, tensors: &[Vec<f32>]) -> Vec<f64> {
    let tensors: Vec<B::Tensor> = tensors.iter().map(|x| single_of(b, 1, x.len(), x)).collect();
    let sums = b.sum_squares(&tensors.iter().collect::<Vec<_>>());
    b.check().expect("nothing went wrong");
    sums
}

#[test]
fn sums_of_any_length() {
    // Every remainder of 4, more and fewer than a block has threads, none, and several chunks, the last of one element.
    let lengths = [1, 2, 3, 4, 5, 0, 255, 1023, 1024, 1027, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 1030];
    let tensors: Vec<Vec<f32>> = (1..).zip(lengths).map(|(seed, n)| randoms(seed, n)).collect();
    for cuda in devices() {
        let got = sums(&cuda, &tensors);
        for ((got, x), want) in got.iter().zip(&tensors).zip(sums(&Cpu::F32, &tensors)) {
            // Roundings of the longest way: a thread's sum, four of them, the warp, the warps, the chunks; the CPU's is
            // shorter, but counts as much.
            let roundings = CHUNK / BLOCK / 4 + 3 + 5 + 8 + 2 * x.len().div_ceil(CHUNK);
            let bound = 2.0 * roundings as f64 * f64::EPSILON / 2.0 * want;
            assert!((got - want).abs() <= bound, "{} elements: {got:e}, want {want:e}", x.len());
        }
        for (again, how) in again(&cuda) {
            assert_eq!(sums(&again, &tensors), got, "other bits {how}");
        }
        // Alone or among others.
        for (x, got) in tensors.iter().zip(got) {
            assert_eq!(sums(&cuda, std::slice::from_ref(x)), [got]);
        }
    }
}

/// 300 chunks: more sums than a block has threads.
#[test]
fn more_chunks_than_threads() {
    for cuda in devices() {
        let x = vec![0.5; 299 * CHUNK + 3];
        assert_eq!(sums(&cuda, &[x]), [0.25 * (299 * CHUNK + 3) as f64], "exact in f64");
    }
}

#[test]
fn what_is_not_finite_stays_so() {
    for cuda in devices() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            for at in [0, 777, 2001, CHUNK + 4] {
                let mut x = randoms(1, CHUNK + 5);
                x[at] = bad;
                let got = sums(&cuda, &[vec![1.0], x, vec![2.0]]);
                assert!(!got[1].is_finite(), "{bad} at {at}");
                assert_eq!((got[0], got[2]), (1.0, 4.0), "the others");
            }
        }
        // The largest f32 has a square in f64.
        assert_eq!(sums(&cuda, &[vec![f32::MAX; 2]]), [2.0 * f64::from(f32::MAX).powi(2)]);
    }
}

#[test]
fn nothing_to_sum() {
    for cuda in devices() {
        assert!(sums(&cuda, &[]).is_empty());
    }
}

#[test]
fn every_byte_moves_once() {
    if !counting() {
        return;
    }
    for workload in workloads_of("sum_squares") {
        let reports = counted(&workload);
        let (coalescing, traffic) = (coalescing(&reports), traffic(&workload, &reports));
        let asked: u64 = reports.iter().map(|r| 32 * r.global.sectors).sum();
        let asked = asked as f64 / workload.bytes as f64;
        assert!(coalescing <= 1.05, "{}: {coalescing}", workload.name);
        assert!(traffic <= 1.05, "{}: {traffic}", workload.name);
        assert!(asked <= 1.05, "{}: {asked}", workload.name);
    }
}
