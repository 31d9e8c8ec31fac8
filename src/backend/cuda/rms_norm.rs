//! Launchers of kernels/rms_norm.cu.

use super::entries::Entry;
use super::entries::shared::rms_norm::MAX_GROUPS;
use super::{Cuda, Tensor, VECTOR};
use crate::backend::{DType, NormSpec, ResidualSpec, RmsNorm};
use crate::device::{Arg, Launch, Ptr};

/// The widest rows: each vector has a thread, and the threads of a row are one block, of at most 1024.
pub(super) const MAX_COLS: usize = 1024 * VECTOR;
/// The most blocks of a backward pass, each of which writes a row of partial sums.
const BACKWARD_BLOCKS: usize = 512;

/// Threads of a row of x.
fn threads(x: &Tensor) -> u32 {
    assert!(
        x.dtype == DType::Bf16 && x.cols.is_multiple_of(VECTOR) && (1..=MAX_COLS).contains(&x.cols),
        "bf16 rows of a multiple of {VECTOR} columns, up to {MAX_COLS}"
    );
    (x.cols / VECTOR).next_multiple_of(32) as u32
}

fn assert_weight(w: &Tensor, cols: usize) {
    assert!(w.dtype == DType::Bf16 && (w.rows, w.cols) == (1, cols), "a bf16 weight of {cols} columns");
}

fn assert_gradient(dw: &Tensor, cols: usize) {
    assert!(dw.dtype == DType::F32 && dw.rows <= 1 && dw.cols == cols, "an f32 gradient of {cols} columns");
}

fn assert_like(y: &Tensor, x: &Tensor) {
    assert!(y.dtype == DType::Bf16 && (y.rows, y.cols) == (x.rows, x.cols), "bf16 of one shape");
}

/// The last arguments of a kernel with a residual sum.
fn figures(ResidualSpec { norm, scale }: ResidualSpec) -> [Arg; 3] {
    [norm.eps.into(), norm.offset.into(), scale.into()]
}

/// Rows that a block of a forward pass takes: several, if the blocks are then still enough to fill a GPU.
fn forward_rows(rows: usize) -> usize {
    (rows / 512).clamp(1, 8)
}

/// Rows that a block of a backward pass adds up. They depend on the shape alone, because they determine the order of the weight's
/// gradient. From 2048 rows on, where memory is the limit, they are 32, with which the partial sums are 3 % of the traffic. With
/// fewer rows a block takes fewer, so that there are 64 blocks, but at least one row for each group.
fn backward_rows(rows: usize) -> usize {
    (rows / 64).clamp(MAX_GROUPS, 32).max(rows.div_ceil(BACKWARD_BLOCKS))
}

impl RmsNorm for Cuda {
    /// Columns a multiple of 8, at most 8192.
    fn rms_norm_forward(&self, x: &Tensor, w: &Tensor, norm: NormSpec) -> Tensor {
        let threads = threads(x);
        assert_weight(w, x.cols);
        let y = self.empty(DType::Bf16, x.rows, x.cols);
        let per_block = forward_rows(x.rows);
        let launch = Launch::linear(x.rows.div_ceil(per_block), threads);
        let mut args = vec![x.arg(), w.arg(), y.arg(), x.rows.into(), x.cols.into(), per_block.into()];
        args.extend([norm.eps.into(), norm.offset.into()]);
        self.launch(Entry::RmsNormForward, launch, &args);
        y
    }

    /// Columns a multiple of 8, at most 8192.
    fn add_norm_forward(
        &self,
        x: &Tensor,
        branch: &Tensor,
        post: Option<&Tensor>,
        pre: &Tensor,
        spec: ResidualSpec,
    ) -> (Tensor, Tensor) {
        let threads = threads(x);
        assert_like(branch, x);
        assert_weight(pre, x.cols);
        let sum = self.empty(DType::Bf16, x.rows, x.cols);
        let normed = self.empty(DType::Bf16, x.rows, x.cols);
        let per_block = forward_rows(x.rows);
        let launch = Launch::linear(x.rows.div_ceil(per_block), threads);
        let mut args = vec![x.arg(), branch.arg()];
        args.extend(post.map(|post| {
            assert_weight(post, x.cols);
            post.arg()
        }));
        args.extend([pre.arg(), sum.arg(), normed.arg(), x.rows.into(), x.cols.into(), per_block.into()]);
        args.extend(figures(spec));
        let entry = if post.is_some() { Entry::AddNormForwardPost } else { Entry::AddNormForward };
        self.launch(entry, launch, &args);
        (sum, normed)
    }

    /// Columns a multiple of 8, at most 8192.
    fn add_norm_backward(
        &self,
        d_sum: Option<&Tensor>,
        d_normed: &Tensor,
        sum: &Tensor,
        pre: (&Tensor, &mut Tensor),
        post: Option<(&Tensor, &Tensor, &mut Tensor)>,
        spec: ResidualSpec,
    ) -> (Tensor, Option<Tensor>) {
        let (pre, d_pre) = pre;
        let (rows, cols) = (sum.rows, sum.cols);
        assert_like(d_normed, sum);
        assert_weight(pre, cols);
        assert_gradient(d_pre, cols);
        let Blocks { per_block, blocks, launch } = Blocks::new(sum);

        let dx = self.empty(DType::Bf16, rows, cols);
        let weights = 1 + usize::from(post.is_some());
        let partials = self.empty(DType::F32, weights * blocks, cols);
        let d_sum = d_sum.map_or(Arg::Ptr(Ptr(0)), |d_sum| {
            assert_like(d_sum, sum);
            d_sum.arg()
        });
        let mut args = vec![d_sum, d_normed.arg(), sum.arg(), pre.arg()];
        let mut last = vec![partials.arg(), rows.into(), cols.into(), per_block.into()];
        last.extend(figures(spec));
        let (d_branch, d_post) = match post {
            None => {
                args.push(dx.arg());
                args.extend(last);
                self.launch(Entry::AddNormBackward, launch, &args);
                (None, Arg::Ptr(Ptr(0)))
            }
            Some((branch, post, d_post)) => {
                assert_like(branch, sum);
                assert_weight(post, cols);
                assert_gradient(d_post, cols);
                assert_eq!(d_pre.rows, d_post.rows, "the norms of a model are trained together");
                let d_branch = self.empty(DType::Bf16, rows, cols);
                args.extend([branch.arg(), post.arg(), dx.arg(), d_branch.arg()]);
                args.extend(last);
                self.launch(Entry::AddNormBackwardPost, launch, &args);
                (Some(d_branch), d_post.arg())
            }
        };
        if d_pre.rows > 0 {
            add_weights(self, &partials, [d_pre.arg(), d_post], weights);
        }
        (dx, d_branch)
    }

    /// Columns a multiple of 8, at most 8192.
    fn add_forward(&self, x: &Tensor, branch: &Tensor, post: &Tensor, spec: ResidualSpec) -> Tensor {
        let threads = threads(x);
        assert_like(branch, x);
        assert_weight(post, x.cols);
        let sum = self.empty(DType::Bf16, x.rows, x.cols);
        let per_block = forward_rows(x.rows);
        let mut args = vec![x.arg(), branch.arg(), post.arg(), sum.arg()];
        args.extend([x.rows.into(), x.cols.into(), per_block.into()]);
        args.extend(figures(spec));
        self.launch(Entry::AddForward, Launch::linear(x.rows.div_ceil(per_block), threads), &args);
        sum
    }

    /// Columns a multiple of 8, at most 8192.
    fn add_backward(
        &self,
        d_sum: &Tensor,
        more: Option<&Tensor>,
        (branch, post, d_post): (&Tensor, &Tensor, &mut Tensor),
        spec: ResidualSpec,
    ) -> (Tensor, Tensor) {
        let (rows, cols) = (d_sum.rows, d_sum.cols);
        let Blocks { per_block, blocks, launch } = Blocks::new(d_sum);
        assert_like(branch, d_sum);
        assert_weight(post, cols);
        assert_gradient(d_post, cols);
        let more = more.map_or(Arg::Ptr(Ptr(0)), |more| {
            assert_like(more, d_sum);
            more.arg()
        });
        let [dx, d_branch] = [0, 1].map(|_| self.empty(DType::Bf16, rows, cols));
        let partials = self.empty(DType::F32, blocks, cols);
        let mut args = vec![d_sum.arg(), more, branch.arg(), post.arg(), dx.arg(), d_branch.arg()];
        args.extend([partials.arg(), rows.into(), cols.into(), per_block.into()]);
        args.extend(figures(spec));
        self.launch(Entry::AddBackward, launch, &args);
        if d_post.rows > 0 {
            add_weights(self, &partials, [d_post.arg(), Arg::Ptr(Ptr(0))], 1);
        }
        (dx, d_branch)
    }
}

/// The blocks of a backward pass.
struct Blocks {
    /// Rows of a block.
    per_block: usize,
    blocks: usize,
    launch: Launch,
}

impl Blocks {
    fn new(x: &Tensor) -> Self {
        let row_threads = threads(x);
        let groups = (MAX_COLS / VECTOR / row_threads as usize).min(MAX_GROUPS);
        let per_block = backward_rows(x.rows);
        let blocks = x.rows.div_ceil(per_block);
        let launch = Launch::linear(blocks, row_threads * groups as u32).shared(groups * x.cols * 4);
        Self { per_block, blocks, launch }
    }
}

/// Adds the blocks' partial sums `[weights blocks, D]` to the gradients of so many weights.
fn add_weights(cuda: &Cuda, partials: &Tensor, gradients: [Arg; 2], weights: usize) {
    let (blocks, cols) = (partials.rows / weights, partials.cols);
    if blocks > 0 {
        let launch =
            Launch { grid: [cols.div_ceil(32) as u32, weights as u32, 1], ..Launch::linear(1, 1024) };
        let [first, second] = gradients;
        let args = [partials.arg(), first, second, blocks.into(), cols.into()];
        cuda.launch(Entry::AddNormBackwardWeight, launch, &args);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_backward_pass_has_64_blocks_where_rows_allow() {
        let blocks = |rows: usize| rows.div_ceil(backward_rows(rows));
        assert_eq!([1, 8, 256, 512, 1024, 2048].map(blocks), [1, 1, 32, 64, 64, 64]);
        assert_eq!([4096, 16_384, 16_385, 1 << 20].map(blocks), [128, 512, 497, 512]);
    }
}
