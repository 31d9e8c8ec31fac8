use bon_engine::backend::cpu::Cpu;
use bon_engine::backend::ops::*;
use bon_engine::backend::{Backend, Batch, HeadNorm, NormSpec, Rope as _, RopeSpec};
use bon_engine::segments::{QueryRun, Segment, Segments};

use super::{
    Case, activation, activation_up_to, check, coalescing, counted, counting, devices, outputs, rounded,
    single, traffic, weight, workloads_of,
};
use crate::ops::randoms;
use crate::tolerance::Rule;

const NORM: NormSpec = NormSpec { eps: 1e-6, offset: 1.0 };
/// The widths of Gemma; the narrowest and the widest; some that leave lanes of a group idle.
const WIDTHS: [usize; 9] = [16, 32, 48, 64, 80, 128, 208, 256, 512];

/// Which heads are normed, and how.
#[derive(Clone, Copy, PartialEq)]
enum Norms {
    None,
    /// q and k, by 1 + w.
    Gemma3,
    /// q and k, by w, and v.
    Gemma4,
}

impl Norms {
    fn of<W>(self, w: Option<W>) -> Option<HeadNorm<W>> {
        match self {
            Norms::None => None,
            Norms::Gemma3 => Some(HeadNorm { weight: w, spec: NORM }),
            Norms::Gemma4 => Some(HeadNorm { weight: w, spec: NormSpec { offset: 0.0, ..NORM } }),
        }
    }
}

#[derive(Clone, Copy)]
struct Rope {
    rows: usize,
    heads: usize,
    dim: usize,
    norm: Norms,
    /// Pairs that turn.
    pairs: usize,
    theta: f64,
    factor: f64,
    /// Of x.
    size: f32,
}

impl Rope {
    fn new(rows: usize, heads: usize, dim: usize, norm: Norms) -> Self {
        Self { rows, heads, dim, norm, pairs: dim / 2, theta: 10_000.0, factor: 1.0, size: 1.0 }
    }

    fn spec(&self) -> RopeSpec {
        RopeSpec { head_dim: self.dim, pairs: self.pairs, theta: self.theta, factor: self.factor }
    }

    /// Positions all over 0..2^18, the ends among them: parts of up to 5 rows, each after a prefix of its own. In the
    /// cache the parts lie in the other order with a gap between any two; where the prefixes lie does not matter here.
    fn tables<B: Backend>(&self, b: &B) -> B::Tables {
        const PART: usize = 5;
        let (n, parts) = (self.rows, self.rows.div_ceil(PART));
        let (mut list, mut runs) = (Vec::new(), Vec::new());
        let mut prefix_start = 1 << 20;
        for i in 0..parts {
            let row = i * PART;
            let len = PART.min(n - row);
            let position = if i + 1 == parts { (1 << 18) - len } else { i * 7919 * 31 % ((1 << 18) - len) };
            list.push(Segment { start: prefix_start, len: position, position: 0, prefix: None });
            prefix_start += position;
            let start = (parts - 1 - i) * (PART + 1) + 1;
            list.push(Segment { start, len, position, prefix: Some(2 * i) });
            runs.push(QueryRun { segment: 2 * i + 1, first: 0, len, row });
        }
        let segments = Segments::new(list).expect("disjoint rows");
        let ids = vec![0; n];
        b.tables(&Batch::new(&ids, &segments, &runs), &[])
    }

    /// Rows that the cache needs, and one that nothing goes to.
    fn cached(&self) -> usize {
        self.rows.div_ceil(5) * 6 + 1
    }
}

struct Forward(Rope);

impl Case for Forward {
    fn run<B: Backend>(&self, b: &B) -> Vec<B::Tensor> {
        let Rope { rows, heads, dim, norm, .. } = self.0;
        let tables = self.0.tables(b);
        let [w_q, w_k] = [1, 6].map(|seed| weight(b, seed, 1, dim));
        let of_v = if norm == Norms::Gemma4 { norm.of(None) } else { None };
        let norms = [norm.of(Some(&w_q)), norm.of(Some(&w_k)), of_v];
        let x = activation_up_to(b, self.0.size, 2, rows, heads * dim);
        let kv_heads = heads.div_ceil(2);
        let [k, v] = [7, 3].map(|seed| activation_up_to(b, self.0.size, seed, rows, kv_heads * dim));
        // What the cache holds elsewhere stays.
        let [mut cached_k, mut cached_v] =
            [4, 5].map(|seed| activation(b, seed, self.0.cached(), kv_heads * dim));
        let y = b.rope_forward(&x, norms[0], &tables, &self.0.spec());
        let still = b.rope_forward(&v, of_v, &tables, &RopeSpec::still(dim));
        let q = b.rope_append(&x, &k, &v, norms, &tables, &self.0.spec(), &mut cached_k, &mut cached_v);
        vec![y, q, cached_k, cached_v, still]
    }
}

struct Backward(Rope);

impl Case for Backward {
    fn run<B: Backend>(&self, b: &B) -> Vec<B::Tensor> {
        let Rope { rows, heads, dim, norm, .. } = self.0;
        let tables = self.0.tables(b);
        let w = weight(b, 1, 1, dim);
        let dy = activation(b, 2, rows, heads * dim);
        let x = activation_up_to(b, self.0.size, 3, rows, heads * dim);
        let mut dw = single(b, 4, 1, dim);
        let dx = b.rope_backward(&dy, &x, norm.of(Some((&w, &mut dw))), &tables, &self.0.spec());
        // v.
        let still = b.rope_backward(&dy, &x, norm.of(None), &tables, &RopeSpec::still(dim));
        vec![dx, dw, still]
    }
}

fn check_both(rope: Rope) {
    check(&["y", "q", "cached k", "cached v", "v"], Rule::Forward, &Forward(rope));
    check(&["dx", "dw", "dv"], Rule::Backward, &Backward(rope));
}

#[test]
fn heads_of_every_width() {
    for (i, dim) in WIDTHS.into_iter().enumerate() {
        for norm in [Norms::None, Norms::Gemma3, Norms::Gemma4] {
            check_both(Rope::new(3, 1 + i % 3, dim, norm));
        }
    }
}

/// Where eps decides: it is the square of 1e-3.
#[test]
fn heads_as_small_as_eps() {
    check_both(Rope { size: 1e-3, ..Rope::new(3, 2, 64, Norms::Gemma3) });
}

/// Fewer heads than a block has under way, as many, more, and a number that does not divide it.
#[test]
fn any_number_of_heads() {
    for heads in [1, 3, 15, 16, 17, 40] {
        check_both(Rope::new(2, heads, 256, if heads % 2 == 0 { Norms::Gemma4 } else { Norms::Gemma3 }));
    }
}

/// Blocks of one row below 1024 rows, of two from there; the last block may have less. Backward, several rounds of a
/// block.
#[test]
fn any_number_of_rows() {
    for rows in [1, 2, 15, 16, 17, 63, 64, 65, 1023, 1024, 1025] {
        check_both(Rope::new(rows, 1, 16, if rows % 2 == 1 { Norms::Gemma3 } else { Norms::None }));
    }
    check_both(Rope::new(129, 3, 64, Norms::Gemma3));
    check_both(Rope::new(129, 3, 64, Norms::Gemma4));
}

#[test]
fn long_context_frequencies() {
    for (theta, factor) in [(1_000_000.0, 8.0), (10_000.0, 1.0)] {
        check_both(Rope { theta, factor, ..Rope::new(300, 1, 64, Norms::Gemma3) });
    }
}

/// Gemma 4's global layers.
#[test]
fn some_pairs_turn() {
    for (dim, pairs) in [(512, 64), (64, 3), (64, 0)] {
        for norm in [Norms::None, Norms::Gemma4] {
            check_both(Rope { pairs, theta: 1e6, ..Rope::new(30, 2, dim, norm) });
        }
    }
}

/// bf16 would hide an error of the angles that f32 shows. The kernel computes as the CPU does, so it has the CPU's bits,
/// rounded; and the CPU's angles are compared with f64 where they are computed.
#[test]
fn a_rotation_has_the_bits_of_the_cpu() {
    let rope = Rope::new(1500, 2, 128, Norms::None);
    for cuda in devices() {
        for (got, want) in outputs(&cuda, &Forward(rope)).iter().zip(outputs(&Cpu::F32, &Forward(rope))) {
            assert!(got.as_f32() == rounded(want.as_f32()));
        }
        let (got, want) = (outputs(&cuda, &Backward(rope)), outputs(&Cpu::F32, &Backward(rope)));
        assert!(got[0].as_f32() == rounded(want[0].as_f32()));
        assert_eq!(got[1].as_f32(), randoms(4, 128), "without a norm there is no gradient of its weight");
    }
}

/// The first rows of a batch of any size have the same bits.
#[test]
fn bits_do_not_depend_on_the_batch() {
    for (cuda, heads) in devices().into_iter().flat_map(|cuda| [1, 4].map(|heads| (cuda.clone(), heads))) {
        let run = |rows: usize| {
            let (segments, ids) = (Segments::separate(&[rows]), vec![0; rows]);
            let runs = segments.all_queries();
            let batch = Batch::new(&ids, &segments, &runs);
            let tables = cuda.tables(&batch, &[]);
            let [x, k] = [(1, heads), (6, 2)].map(|(seed, heads)| activation(&cuda, seed, rows, heads * 256));
            let weights = [2, 7].map(|seed| weight(&cuda, seed, 1, 256));
            let [of_q, of_k] = weights.each_ref().map(|w| Norms::Gemma4.of(Some(w)));
            let norms = [of_q, of_k, Norms::Gemma4.of(None)];
            let spec = Rope::new(rows, heads, 256, Norms::Gemma4).spec();
            let [y, turned_k] =
                [(&x, norms[0]), (&k, norms[1])].map(|(x, norm)| cuda.rope_forward(x, norm, &tables, &spec));
            let v = cuda.rope_forward(&k, norms[2], &tables, &RopeSpec::still(256));
            let [mut cached_k, mut cached_v] = [3, 4].map(|seed| activation(&cuda, seed, rows, 2 * 256));
            let q = cuda.rope_append(&x, &k, &k, norms, &tables, &spec, &mut cached_k, &mut cached_v);
            assert!(cuda.download(&y) == cuda.download(&q), "a decode step has the q of the forward pass");
            assert!(
                cuda.download(&turned_k) == cuda.download(&cached_k),
                "the cache gets the forward pass's k"
            );
            assert!(cuda.download(&v) == cuda.download(&cached_v), "the cache gets the forward pass's v");
            cuda.download(&y)
        };
        let (few, many) = (run(5), run(1030));
        assert!(few[..] == many[..few.len()], "{heads} heads");
    }
}

#[test]
fn no_rows_are_no_work() {
    for cuda in devices() {
        let segments = Segments::separate(&[]);
        let tables = cuda.tables(&Batch::new(&[], &segments, &[]), &[]);
        let (x, w, mut dw) = (activation(&cuda, 1, 0, 64), weight(&cuda, 2, 1, 32), single(&cuda, 3, 1, 32));
        let spec = Rope::new(0, 2, 32, Norms::Gemma3).spec();
        let norm = Norms::Gemma3.of(Some(&w));
        assert_eq!(cuda.shape(&cuda.rope_forward(&x, norm, &tables, &spec)), (0, 64));
        let norm = Norms::Gemma3.of(Some((&w, &mut dw)));
        assert_eq!(cuda.shape(&cuda.rope_backward(&x, &x, norm, &tables, &spec)), (0, 64));
        assert_eq!(cuda.to_f32(&dw), randoms(3, 32));
        cuda.check().expect("nothing went wrong");
    }
}

#[test]
fn every_byte_moves_once() {
    if !counting() {
        return;
    }
    for workload in workloads_of("rope") {
        let reports = counted(&workload);
        let (coalescing, traffic) = (coalescing(&reports), traffic(&workload, &reports));
        let asked: u64 = reports.iter().map(|r| 32 * r.global.sectors).sum();
        let asked = asked as f64 / workload.bytes as f64;
        // What heads share, the norm's weight and positions, is asked for by each thread anew.
        assert!(asked <= 1.35, "{}: {asked}", workload.name);
        let conflicts = reports.iter().map(|r| r.shared.wavefronts).sum::<u64>() as f64
            / reports.iter().map(|r| r.shared.ideal_wavefronts).sum::<u64>() as f64;
        assert!(coalescing <= 1.05, "{}: {coalescing}", workload.name);
        assert!(traffic <= 1.05, "{}: {traffic}", workload.name);
        assert!(conflicts <= 1.1, "{}: {conflicts}", workload.name);
        for report in &reports {
            assert_eq!(report.local.sectors, 0, "{}: local memory", workload.name);
        }
    }
}
