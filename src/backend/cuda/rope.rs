//! Launchers of kernels/rope.cu.

use std::sync::{Mutex, PoisonError};

use super::entries::Entry;
use super::entries::shared::rope::{BLOCK, FREQUENCIES_BYTES, PER_THREAD};
use super::{Cuda, Tables, Tensor};
use crate::backend::{DType, HeadNorm, Rope, RopeSpec};
use crate::device::{Arg, Launch, Ptr};

/// The widest heads: a head's threads are in one warp, and its frequencies are arguments of the kernel.
const MAX_HEAD_DIM: usize = 2 * FREQUENCIES_BYTES / size_of::<f32>();
/// The fewest heads that a block of the backward pass adds up, so that the traffic of partial sums is small.
const BACKWARD_HEADS: usize = 64;
/// The most blocks of the backward pass, each of which writes a row of partial sums.
const BACKWARD_BLOCKS: usize = 1024;

/// The most shared memory for angles, in bytes.
const MAX_ANGLES: usize = 16 * 1024;

/// The division of a tensor's heads among blocks.
struct Geometry {
    rows: usize,
    heads: usize,
    dim: usize,
    /// Lanes of a head's group.
    lanes: usize,
}

impl Geometry {
    fn new(x: &Tensor, rope: &RopeSpec, tables: &Tables) -> Self {
        let dim = rope.head_dim;
        assert!(
            dim.is_multiple_of(PER_THREAD) && (1..=MAX_HEAD_DIM).contains(&dim),
            "head widths are multiples of {PER_THREAD} up to {MAX_HEAD_DIM}"
        );
        assert!(x.dtype == DType::Bf16 && x.cols.is_multiple_of(dim), "bf16 rows of whole heads");
        assert_eq!(x.rows, tables.rows, "a row for every token");
        Self { rows: x.rows, heads: x.cols / dim, dim, lanes: (dim / PER_THREAD).next_power_of_two() }
    }

    /// Rows whose heads a block holds at the same time.
    fn at_once(&self) -> usize {
        (BLOCK / self.lanes / self.heads.max(1)).max(1)
    }

    /// Rows of a block of the forward pass: several, if the blocks are then still enough to fill a GPU; one in a decode step.
    fn forward_rows(&self) -> usize {
        (self.rows / 512).clamp(1, MAX_ANGLES / self.angles(1))
    }

    /// Bytes of shared memory for the angles of `rows` rows.
    fn angles(&self, rows: usize) -> usize {
        rows * PER_THREAD * self.lanes * 4
    }

    /// A launch whose blocks take `per_block` rows at the same time.
    fn forward_launch(&self, per_block: usize) -> Launch {
        Launch::linear(self.rows.div_ceil(per_block), BLOCK as u32).shared(self.angles(per_block))
    }

    fn assert_like(&self, y: &Tensor) {
        assert!(
            y.dtype == DType::Bf16 && (y.rows, y.cols) == (self.rows, self.heads * self.dim),
            "bf16 of one shape"
        );
    }

    /// A norm's weight, or the null pointer that stands for none.
    fn weight_arg(&self, w: Option<&Tensor>) -> Arg {
        let shape = (1, self.dim);
        assert!(
            w.is_none_or(|w| w.dtype == DType::Bf16 && (w.rows, w.cols) == shape),
            "a bf16 weight of a head's width"
        );
        w.map_or(NULL, Tensor::arg)
    }
}

const NULL: Arg = Arg::Ptr(Ptr(0));

/// Whether any pair turns.
fn turned(rope: &RopeSpec) -> Arg {
    usize::from(rope.pairs > 0).into()
}

/// `struct Frequencies` of the kernel for each rotary embedding used so far. They are kept because a model has one or two, and
/// every layer of every decode step needs one.
pub(super) type FrequencyCache = Mutex<Vec<(RopeSpec, Vec<u8>)>>;

fn frequencies(cuda: &Cuda, rope: &RopeSpec) -> Arg {
    let mut known = cuda.0.frequencies.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some((_, bytes)) = known.iter().find(|(spec, _)| spec == rope) {
        return Arg::Bytes(bytes.clone());
    }
    let mut of = rope.inverse_frequencies();
    of.resize(MAX_HEAD_DIM / 2, 0.0);
    let bytes: Vec<u8> = bytemuck::cast_slice(&of).to_vec();
    known.push((*rope, bytes.clone()));
    Arg::Bytes(bytes)
}

/// y = x rotated by `sign` times the angles.
fn rotate(cuda: &Cuda, x: &Tensor, tables: &Tables, rope: &RopeSpec, sign: f32) -> Tensor {
    let g = Geometry::new(x, rope, tables);
    let y = cuda.empty(DType::Bf16, x.rows, x.cols);
    let per_block = g.forward_rows();
    let mut args = vec![x.arg(), y.arg(), tables.positions.arg(), frequencies(cuda, rope)];
    args.extend([g.rows.into(), g.heads.into(), g.dim.into(), per_block.into(), sign.into()]);
    cuda.launch(Entry::RopeForward, g.forward_launch(per_block), &args);
    y
}

impl Rope for Cuda {
    /// Head widths are multiples of 16 up to 512, positions at
    /// most 2^18.
    fn rope_forward(
        &self,
        x: &Tensor,
        norm: Option<HeadNorm<&Tensor>>,
        tables: &Tables,
        rope: &RopeSpec,
    ) -> Tensor {
        let Some(HeadNorm { weight, spec }) = norm else {
            return rotate(self, x, tables, rope, 1.0);
        };
        let g = Geometry::new(x, rope, tables);
        let y = self.empty(DType::Bf16, x.rows, x.cols);
        let per_block = g.forward_rows();
        let mut args = vec![x.arg(), g.weight_arg(weight), y.arg()];
        args.extend([tables.positions.arg(), frequencies(self, rope)]);
        args.extend([g.rows.into(), g.heads.into(), g.dim.into(), per_block.into()]);
        args.extend([spec.eps.into(), spec.offset.into(), turned(rope)]);
        self.launch(Entry::RopeForwardNorm, g.forward_launch(per_block), &args);
        y
    }

    /// As [`rope_forward`](Self::rope_forward). Every row belongs to a run.
    fn rope_append(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        norms: [Option<HeadNorm<&Tensor>>; 3],
        tables: &Tables,
        rope: &RopeSpec,
        cached_k: &mut Tensor,
        cached_v: &mut Tensor,
    ) -> Tensor {
        let [of_q, of_k] = [q, k].map(|x| Geometry::new(x, rope, tables));
        of_k.assert_like(v);
        let needed =
            tables.runs.iter().map(|r| tables.segments.list()[r.segment].start + r.first + r.len).max();
        for cached in [&*cached_k, &*cached_v] {
            assert!(cached.dtype == DType::Bf16 && cached.cols == k.cols, "a cache of rows like k and v");
            assert!(needed.unwrap_or(0) <= cached.rows, "a cache with room for every row");
        }
        let rotated = self.empty(DType::Bf16, q.rows, q.cols);
        let per_block = of_q.forward_rows();
        let mut args = vec![q.arg(), k.arg(), v.arg()];
        let norms = match norms {
            [None, None, None] => None,
            [Some(q), Some(k), v] => {
                assert!(q.spec == k.spec && v.is_none_or(|v| v.weight.is_none() && v.spec == q.spec));
                args.extend([q.weight, k.weight].map(|weight| of_k.weight_arg(weight)));
                Some((q.spec, v.is_some()))
            }
            _ => panic!("a norm of q and k or of neither, and of v where they have one"),
        };
        args.extend([
            rotated.arg(),
            cached_k.arg(),
            cached_v.arg(),
            tables.kv_rows.arg(),
            tables.positions.arg(),
        ]);
        args.extend([frequencies(self, rope), of_q.rows.into(), of_q.heads.into(), of_k.heads.into()]);
        args.extend([of_q.dim.into(), per_block.into()]);
        args.extend(
            norms
                .iter()
                .flat_map(|(spec, of_v)| [spec.eps.into(), spec.offset.into(), usize::from(*of_v).into()]),
        );
        let entry = if norms.is_some() { Entry::RopeAppendNorm } else { Entry::RopeAppend };
        self.launch(entry, of_q.forward_launch(per_block), &args);
        rotated
    }

    /// As [`rope_forward`](Self::rope_forward).
    fn rope_backward(
        &self,
        dy: &Tensor,
        x: &Tensor,
        norm: Option<HeadNorm<(&Tensor, &mut Tensor)>>,
        tables: &Tables,
        rope: &RopeSpec,
    ) -> Tensor {
        let g = Geometry::new(x, rope, tables);
        g.assert_like(dy);
        let Some(HeadNorm { weight, spec }) = norm else {
            return rotate(self, dy, tables, rope, -1.0);
        };
        let (w, dw) = weight.unzip();
        let dw = dw.filter(|dw| dw.rows > 0);
        let dx = self.empty(DType::Bf16, x.rows, x.cols);
        if g.rows * g.heads == 0 {
            return dx;
        }
        let at_once = g.at_once();
        let least = BACKWARD_HEADS.div_ceil(at_once * g.heads);
        let per_block = at_once * g.rows.div_ceil(at_once * BACKWARD_BLOCKS).max(least);
        let blocks = g.rows.div_ceil(per_block);
        let partials = w.is_some().then(|| self.empty(DType::F32, blocks, g.dim));
        let gradients = BLOCK / g.lanes * g.dim * 4;
        let launch = Launch::linear(blocks, BLOCK as u32).shared(gradients + g.angles(at_once));
        let mut args = vec![dy.arg(), x.arg(), g.weight_arg(w), dx.arg()];
        args.extend([partials.as_ref().map_or(NULL, Tensor::arg), tables.positions.arg()]);
        args.extend([frequencies(self, rope), g.rows.into(), g.heads.into(), g.dim.into()]);
        args.extend([per_block.into(), at_once.into(), spec.eps.into(), spec.offset.into(), turned(rope)]);
        self.launch(Entry::RopeBackwardNorm, launch, &args);
        if let Some((partials, dw)) = partials.zip(dw) {
            assert!(
                dw.dtype == DType::F32 && (dw.rows, dw.cols) == (1, g.dim),
                "an f32 gradient of a head's width"
            );
            let args = [partials.arg(), dw.arg(), blocks.into(), g.dim.into()];
            self.launch(Entry::RopeBackwardWeight, Launch::linear(g.dim.div_ceil(32), 1024), &args);
        }
        dx
    }
}
