//! Launchers of kernels/lm_head.cu. D is a multiple of 8, the vocabulary at most 2^22 tokens; any number of rows.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;

use super::entries::shared::lm_head::{
    BINS, CHUNK, CUT_BYTES, MAX_BLOCKS, MERGE_ROWS, TILE_V, WALK16, WALK32, WALK64, WALK128,
};
use super::entries::shared::mma::TILE_K;
use super::entries::{Entry, same_size};
use super::{Cuda, Draws, Memory, Tensor, VECTOR, matmul, narrow};
use crate::backend::{
    Choice, DType, HeadSpec, HeadTrace, LmHead, Platform, Rows, Sampled, Target, Truncation,
};
use crate::device::{Arg, DeviceError, Launch, Ptr, Reading};
use crate::rng::DrawKey;

/// Rows whose logits truncation writes to memory at a time: the rows of one walk over the embedding matrix.
const TRUNCATED_ROWS: usize = 64;
/// Tokens of a row of logits that are worth a block.
const BLOCK_TOKENS: usize = 4096;
/// The largest vocabulary: a token is 22 bits of the key by which it is ranked.
pub(super) const MAX_TOKENS: usize = 1 << 22;
/// Bounds of the workspace for the gradient of the logits, in bytes. Where memory is free it may grow to the upper one.
const MIN_WORKSPACE: u64 = 64 << 20;
const MAX_WORKSPACE: u64 = 4 << 30;

/// A kernel's tiling: rows of a tile, warps along the rows, of which there are two along the tokens each, and stages.
#[derive(Debug, Clone, Copy)]
struct Walk {
    rows: usize,
    warps: usize,
    stages: usize,
}

const ROWS_16: Walk = Walk::of(WALK16);
const ROWS_32: Walk = Walk::of(WALK32);
const ROWS_64: Walk = Walk::of(WALK64);
const ROWS_128: Walk = Walk::of(WALK128);

impl Walk {
    /// Of the arguments of `Walk` of kernels/lm_head.cuh.
    const fn of([rows, warps, stages]: [usize; 3]) -> Self {
        Self { rows, warps, stages }
    }

    /// A grid of all tiles of `rows` times `chunks`.
    fn launch(self, rows: usize, chunks: usize) -> Launch {
        // CUDA's limit.
        assert!(chunks < 1 << 16, "{chunks} chunks along y");
        let mut launch = Launch::linear(rows.div_ceil(self.rows), narrow(64 * self.warps));
        launch.grid[1] = chunks as u32;
        launch.shared((TILE_V + self.rows) * TILE_K * DType::Bf16.bytes() * self.stages)
    }

    /// `rows` in whole tiles.
    fn padded(self, rows: usize) -> usize {
        rows.next_multiple_of(self.rows)
    }
}

/// `Operands` of kernels/lm_head.cuh.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::NoUninit)]
struct Operands {
    embedding: u64,
    x: u64,
    vocab: u32,
    rows: u32,
    width: u32,
    unused: u32,
}

/// `Head` of kernels/lm_head.cuh.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::NoUninit)]
struct Head {
    softcap: f32,
    inverse_softcap: f32,
    inverse_temperature: f32,
}

/// `Draw` of kernels/random.cuh.
#[repr(C)]
#[derive(Clone, Copy, Default, bytemuck::NoUninit)]
struct Draw {
    key: [u32; 2],
    position: u32,
    stream: u32,
    prompt: u32,
    noisy: u32,
    unused: [u32; 2],
}

/// `Target` of kernels/lm_head.cu.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::NoUninit)]
struct KernelTarget {
    row: u32,
    token: u32,
    index: u32,
    weight: f32,
}

/// `Gradient` of kernels/lm_head.cu.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::NoUninit)]
struct Gradient {
    targets: [u64; 2],
    lse: u64,
    total: u64,
    dlogits: u64,
    chunk0: u32,
    ld: u32,
}

same_size!(random: Draw = DRAW_BYTES);
same_size!(lm_head: Operands = OPERANDS_BYTES, Head = HEAD_BYTES, KernelTarget = TARGET_BYTES, Gradient = GRADIENT_BYTES);

/// The arguments that the kernels of one call share.
struct Call<'a> {
    cuda: &'a Cuda,
    x: &'a Tensor,
    embedding: &'a Tensor,
    head: Head,
}

impl<'a> Call<'a> {
    fn new(cuda: &'a Cuda, x: &'a Tensor, embedding: &'a Tensor, head: &HeadSpec) -> Self {
        assert!(x.dtype == DType::Bf16 && embedding.dtype == DType::Bf16, "rows and embedding are bf16");
        let fits = x.cols == embedding.cols && x.cols > 0 && x.cols.is_multiple_of(VECTOR);
        assert!(
            fits,
            "an embedding [V, {}] for rows [R, {}]: D is a multiple of {VECTOR}",
            embedding.cols, x.cols
        );
        assert!((1..=MAX_TOKENS).contains(&embedding.rows), "a vocabulary of {} tokens", embedding.rows);
        assert!(head.temperature > 0.0, "the temperature is positive");
        let softcap = head.softcap.unwrap_or(0.0);
        let inverse_softcap = if softcap > 0.0 { 1.0 / softcap } else { 0.0 };
        let head = Head { softcap, inverse_softcap, inverse_temperature: 1.0 / head.temperature };
        Self { cuda, x, embedding, head }
    }

    fn chunks(&self) -> usize {
        self.embedding.rows.div_ceil(CHUNK)
    }

    /// The arguments `Operands`, of some of the rows, and `Head`.
    fn args(&self, rows: &Range<usize>) -> [Arg; 2] {
        let operands = Operands {
            embedding: self.embedding.memory.ptr().0,
            x: self.x.memory.ptr().0 + (rows.start * self.x.cols * DType::Bf16.bytes()) as u64,
            vocab: narrow(self.embedding.rows),
            rows: narrow(rows.len()),
            width: narrow(self.x.cols),
            unused: 0,
        };
        [bytes(&operands), bytes(&self.head)]
    }

    /// Memory for the running log-sum-exp (max, sum) of each chunk and row.
    fn sums(&self, rows: usize) -> Memory {
        self.cuda.memory(self.chunks() * rows * 2 * DType::F32.bytes())
    }

    /// Merges chunks into each row's log-sum-exp.
    fn merge(&self, sums: &Memory, stride: usize, rows: usize) -> Tensor {
        let lse = self.cuda.empty(DType::F32, 1, rows);
        let launch = Launch::linear(rows.div_ceil(MERGE_ROWS), 256);
        let args = [sums.arg(), self.chunks().into(), stride.into(), rows.into(), lse.arg()];
        self.cuda.launch(Entry::LmHeadLogprobForwardMerge, launch, &args);
        lse
    }
}

fn bytes<T: bytemuck::NoUninit>(x: &T) -> Arg {
    Arg::Bytes(bytemuck::bytes_of(x).to_vec())
}

fn draw(choice: &Choice) -> Draw {
    match *choice {
        Choice::Greedy => Draw::default(),
        Choice::Draw(DrawKey { key, prompt, stream, position }) => {
            Draw { key, position, stream, prompt, noisy: 1, unused: [0; 2] }
        }
    }
}

/// See [`LmHead::lm_head_draw`]: (token, log-prob) of every row to `out`.
pub(super) fn sample(
    cuda: &Cuda,
    x: &Tensor,
    embedding: &Tensor,
    head: &HeadSpec,
    truncation: &Truncation,
    choices: &[Choice],
    out: &Memory,
) {
    assert_eq!(x.rows, choices.len(), "one choice per row");
    let call = Call::new(cuda, x, embedding, head);
    let draws = cuda.array(&choices.iter().map(draw).collect::<Vec<_>>());
    if truncation.is_none() {
        sample_all(&call, &draws, out);
    } else {
        sample_truncated(&call, truncation, &draws, out);
    }
}

/// Draws from the whole distribution: (token, log-prob) of every row to `out`.
fn sample_all(call: &Call, draws: &Memory, out: &Memory) {
    let (cuda, rows) = (call.cuda, call.x.rows);
    let (walk, entry) = match rows {
        0..=16 => (ROWS_16, Entry::LmHeadSample16),
        17..=32 => (ROWS_32, Entry::LmHeadSample32),
        _ => (ROWS_64, Entry::LmHeadSample64),
    };
    let stride = walk.padded(rows);
    let sums = call.sums(stride);
    let best = cuda.memory(call.chunks() * stride * size_of::<[u32; 4]>());
    let [operands, head] = call.args(&(0..rows));
    let launch = walk.launch(rows, call.chunks());
    cuda.launch(entry, launch, &[operands, head, draws.arg(), sums.arg(), best.arg()]);
    let launch = Launch::linear(rows.div_ceil(MERGE_ROWS), 256);
    let [chunks, stride, rows]: [Arg; 3] = [call.chunks().into(), stride.into(), rows.into()];
    let args = [sums.arg(), best.arg(), chunks, stride, rows, out.arg()];
    cuda.launch(Entry::LmHeadSampleMerge, launch, &args);
}

/// Draws from the tokens that truncation keeps, some rows at a time.
fn sample_truncated(call: &Call, truncation: &Truncation, draws: &Memory, out: &Memory) {
    let (cuda, rows, vocab) = (call.cuda, call.x.rows, call.embedding.rows);
    let length = vocab.next_multiple_of(VECTOR);
    // Two blocks for each multiprocessor. No bit depends on the number of blocks.
    let at_once = rows.min(TRUNCATED_ROWS);
    let blocks = (2 * cuda.device().multiprocessors() as usize).div_ceil(at_once.max(1));
    let blocks = blocks.min(MAX_BLOCKS).min(vocab.div_ceil(BLOCK_TOKENS));
    let sums = call.sums(ROWS_64.padded(at_once));
    let stats = cuda.memory(at_once * size_of::<[f32; 2]>());
    let logits = cuda.memory(at_once * length * DType::F32.bytes());
    let weights = cuda.memory(at_once * blocks * BINS * size_of::<u64>());
    let counts = cuda.memory(at_once * blocks * BINS * size_of::<u32>());
    let cuts = cuda.memory(at_once * CUT_BYTES);
    let best = cuda.memory(at_once * blocks * size_of::<[u32; 4]>());
    let listed = cuda.memory(at_once * blocks * size_of::<u32>());
    let list = cuda.memory(at_once * length * size_of::<u32>());
    // Top-k of the whole vocabulary cuts nothing.
    let top_k = if truncation.top_k < vocab { truncation.top_k } else { 0 };
    let log_min_p = if truncation.min_p > 0.0 { truncation.min_p.ln() } else { f32::NEG_INFINITY };
    let [top_k, top_p, log_min_p]: [Arg; 3] = [top_k.into(), truncation.top_p.into(), log_min_p.into()];
    let [blocks_, vocab, length]: [Arg; 3] = [blocks, vocab, length].map(Arg::from);
    for first in (0..rows).step_by(TRUNCATED_ROWS) {
        let part = first..rows.min(first + TRUNCATED_ROWS);
        let (walk, entry) = match part.len() {
            0..=16 => (ROWS_16, Entry::LmHeadSampleLogits16),
            17..=32 => (ROWS_32, Entry::LmHeadSampleLogits32),
            _ => (ROWS_64, Entry::LmHeadSampleLogits64),
        };
        let [operands, head] = call.args(&part);
        let launch = walk.launch(part.len(), call.chunks());
        cuda.launch(entry, launch, &[operands, head, sums.arg(), logits.arg(), length.clone()]);
        let args = [sums.arg(), call.chunks().into(), walk.rows.into(), part.len().into(), stats.arg()];
        cuda.launch(Entry::LmHeadSampleStats, Launch::linear(part.len().div_ceil(MERGE_ROWS), 256), &args);

        let draws: Arg = Ptr(draws.ptr().0 + (first * size_of::<Draw>()) as u64).into();
        let out: Arg = Ptr(out.ptr().0 + (first * size_of::<[u32; 2]>()) as u64).into();
        let mut shared = Launch::linear(blocks, 512);
        shared.grid[1] = narrow(part.len());
        let args = [logits.arg(), stats.arg(), vocab.clone(), length.clone(), weights.arg(), counts.arg()];
        cuda.launch(Entry::LmHeadSampleHistogram, shared, &args);
        let own = Launch::linear(part.len(), 1024);
        let args = [weights.arg(), counts.arg(), blocks_.clone(), top_k.clone(), top_p.clone(), cuts.arg()];
        cuda.launch(Entry::LmHeadSampleCut, own, &args);
        let args = [logits.arg(), stats.arg(), draws.clone(), cuts.arg(), vocab.clone(), length.clone()];
        let more = [log_min_p.clone(), best.arg(), listed.arg(), list.arg()];
        cuda.launch(Entry::LmHeadSampleKeep, shared, &[&args[..], &more].concat());
        let args = [logits.arg(), stats.arg(), draws, cuts.arg(), best.arg(), listed.arg(), list.arg()];
        let more = [blocks_.clone(), length.clone(), top_k.clone(), top_p.clone(), log_min_p.clone(), out];
        cuda.launch(Entry::LmHeadSampleTruncated, own, &[&args[..], &more].concat());
    }
}

/// Sorts targets by (chunk, row tile), the block that has their logits. Returns the index of each block's first target, and the
/// targets. Equal (row, token) stay in order.
fn by_block(call: &Call, mut kernel_targets: Vec<KernelTarget>) -> (Vec<u32>, Vec<KernelTarget>) {
    let tiles = call.x.rows.div_ceil(ROWS_128.rows);
    let block = |t: &KernelTarget| t.token as usize / CHUNK * tiles + t.row as usize / ROWS_128.rows;
    kernel_targets.sort_by_key(|t| (block(t), t.row, t.token));
    let mut offsets = vec![0; call.chunks() * tiles + 1];
    for t in &kernel_targets {
        offsets[block(t) + 1] += 1;
    }
    for i in 1..offsets.len() {
        offsets[i] += offsets[i - 1];
    }
    (offsets, kernel_targets)
}

/// `Targets` of kernels/lm_head.cu, on the device. The memory must outlive the launch.
struct Lists(Memory, Memory);

impl Lists {
    fn new(cuda: &Cuda, (offsets, mut kernel_targets): (Vec<u32>, Vec<KernelTarget>)) -> Self {
        // The device has no empty arrays. This target is in no block's list.
        kernel_targets.push(KernelTarget { row: u32::MAX, token: u32::MAX, index: 0, weight: 0.0 });
        Self(cuda.array(&offsets), cuda.array(&kernel_targets))
    }

    fn addresses(&self) -> [u64; 2] {
        [self.0.ptr().0, self.1.ptr().0]
    }
}

fn assert_inside(x: &Tensor, embedding: &Tensor, targets: &[Target]) {
    let inside = |t: &Target| (t.row as usize) < x.rows && (t.token as usize) < embedding.rows;
    assert!(targets.iter().all(inside), "targets of rows and tokens that exist");
}

impl LmHead for Cuda {
    fn draws(&self, rows: usize) -> Draws {
        let latest = Arc::new(self.memory(rows * size_of::<[u32; 2]>()));
        Draws { latest, room: rows, not_taken: VecDeque::new() }
    }

    fn lm_head_draw(
        &self,
        x: &Tensor,
        embedding: &Tensor,
        head: &HeadSpec,
        truncation: &Truncation,
        rows: &[u32],
        choices: &[Choice],
        draws: &mut Draws,
    ) {
        assert!(choices.len() <= draws.room, "room for {} draws, not {}", draws.room, choices.len());
        // The kernels draw once after each row.
        let each = rows.len() == x.rows && rows.iter().enumerate().all(|(i, &row)| i == row as usize);
        let gathered = (!each).then(|| self.gather_rows(x, rows));
        let x = gathered.as_ref().unwrap_or(x);
        sample(self, x, embedding, head, truncation, choices, &draws.latest);
        let bytes = choices.len() * size_of::<[u32; 2]>();
        draws.not_taken.push_back(match bytes {
            0 => Some(Reading::Done(Vec::new())),
            _ => self.attempt(|device| device.begin_read(draws.latest.ptr(), bytes)),
        });
    }

    fn take_draw(&self, draws: &mut Draws) -> Result<Vec<Sampled>, DeviceError> {
        let reading = draws.not_taken.pop_front().expect("a draw that was not taken");
        let bytes = reading.and_then(|reading| self.attempt(|device| device.end_read(reading)));
        self.first_error()?;
        let drawn: Vec<[u32; 2]> = bytemuck::pod_collect_to_vec(&bytes.unwrap_or_default());
        Ok(drawn
            .into_iter()
            .map(|[token, logprob]| Sampled { token, logprob: f32::from_bits(logprob) })
            .collect())
    }

    fn lm_head_logprob_forward(
        &self,
        x: &Tensor,
        embedding: &Tensor,
        head: &HeadSpec,
        targets: &[Target],
        keep: bool,
    ) -> (Vec<f32>, HeadTrace<Tensor>) {
        assert_inside(x, embedding, targets);
        let call = Call::new(self, x, embedding, head);
        let kernel_targets = targets.iter().zip(0..);
        let kernel_targets =
            kernel_targets.map(|(t, index)| KernelTarget { row: t.row, token: t.token, index, weight: 0.0 });
        let lists = Lists::new(self, by_block(&call, kernel_targets.collect()));
        let found = self.memory(targets.len() * DType::F32.bytes());
        let stride = ROWS_128.padded(x.rows);
        let sums = call.sums(stride);
        let [operands, spec] = call.args(&(0..x.rows));
        let logits = keep.then(|| self.empty(DType::F32, x.rows, call.chunks() * CHUNK));
        let (to, ld) = logits.as_ref().map_or((Arg::Ptr(Ptr(0)), 0), |logits| (logits.arg(), logits.cols));
        let args = [operands, spec, bytes(&lists.addresses()), sums.arg(), found.arg(), to, ld.into()];
        self.launch(Entry::LmHeadLogprobForward, ROWS_128.launch(x.rows, call.chunks()), &args);
        let lse = call.merge(&sums, stride, x.rows);
        // One subtraction, as in the sampling kernels.
        let (found, of_row) = (self.read::<f32>(&found, targets.len()), self.to_f32(&lse));
        let logprobs = targets.iter().zip(found).map(|(t, logit)| logit - of_row[t.row as usize]);
        (logprobs.collect(), HeadTrace { lse, logits })
    }

    fn lm_head_logprob_backward(
        &self,
        x: &Tensor,
        embedding: &Tensor,
        head: &HeadSpec,
        trace: &HeadTrace<Tensor>,
        targets: &[Target],
        weights: &[f32],
        d_embedding: &mut Tensor,
    ) -> Tensor {
        let free = self.attempt(|device| device.available()).flatten();
        logprob_backward_within(
            workspace(free),
            self,
            x,
            embedding,
            head,
            trace,
            targets,
            weights,
            d_embedding,
        )
    }
}

/// Bytes of the workspace, given the bytes that are free: a quarter of them, because every range of the vocabulary reads and
/// writes all of dX in f32. Sizes are powers of two, so that the arena can use the same memory in many steps.
fn workspace(free: Option<u64>) -> usize {
    let quarter = free.map_or(0, |free| free / 4);
    let whole = quarter.checked_ilog2().map_or(0, |log| 1 << log);
    whole.clamp(MIN_WORKSPACE, MAX_WORKSPACE) as usize
}

/// [`LmHead::lm_head_logprob_backward`] that has at most `workspace` bytes for the gradient of the
/// logits, if a chunk's is no larger. No bit depends on it.
#[allow(clippy::too_many_arguments, reason = "the method has them, and a bound")]
pub fn logprob_backward_within(
    workspace: usize,
    cuda: &Cuda,
    x: &Tensor,
    embedding: &Tensor,
    head: &HeadSpec,
    trace: &HeadTrace<Tensor>,
    targets: &[Target],
    weights: &[f32],
    d_embedding: &mut Tensor,
) -> Tensor {
    let HeadTrace { lse, logits } = trace;
    assert_inside(x, embedding, targets);
    assert_eq!(targets.len(), weights.len(), "one weight per target");
    assert_eq!((lse.dtype, lse.rows, lse.cols), (DType::F32, 1, x.rows), "lse [1, R] in f32");
    let trained = d_embedding.rows > 0;
    let same = (d_embedding.rows, d_embedding.cols) == (embedding.rows, embedding.cols) || !trained;
    assert!(same, "d_embedding [V, D]");
    if x.rows == 0 {
        return cuda.empty(DType::Bf16, 0, x.cols);
    }
    let call = Call::new(cuda, x, embedding, head);
    let kept = logits.as_ref().map(|logits| {
        let shape = (DType::F32, x.rows, call.chunks() * CHUNK);
        assert_eq!((logits.dtype, logits.rows, logits.cols), shape, "logits of these rows in f32");
        [logits.arg(), logits.cols.into()]
    });
    let mut total = vec![0.0; x.rows];
    for (t, w) in targets.iter().zip(weights) {
        total[t.row as usize] += w;
    }
    let total = cuda.array::<f32>(&total);
    let kernel_targets = targets.iter().zip(weights);
    let kernel_targets =
        kernel_targets.map(|(t, &weight)| KernelTarget { row: t.row, token: t.token, index: 0, weight });
    let lists = Lists::new(cuda, unique(&call, kernel_targets.collect()));

    let chunks = (workspace / (x.rows * CHUNK * DType::Bf16.bytes())).clamp(1, call.chunks());
    let dlogits = cuda.empty(DType::Bf16, x.rows, chunks * CHUNK);
    let dx_sum = matmul::InputSum::new(cuda, x.rows, embedding);
    for first in (0..call.chunks()).step_by(chunks) {
        let here = chunks.min(call.chunks() - first);
        let [operands, spec] = call.args(&(0..x.rows));
        let gradient = Gradient {
            targets: lists.addresses(),
            lse: lse.memory.ptr().0,
            total: total.ptr().0,
            dlogits: dlogits.memory.ptr().0,
            chunk0: narrow(first),
            ld: narrow(dlogits.cols),
        };
        let args = [operands, spec, bytes(&gradient)];
        let launch = ROWS_128.launch(x.rows, here);
        match &kept {
            None => cuda.launch(Entry::LmHeadLogprobBackward, launch, &args),
            Some(kept) => {
                let args = [&args[..], kept].concat();
                cuda.launch(Entry::LmHeadLogprobBackwardKept, launch.shared(0), &args);
            }
        }
        let tokens = (here * CHUNK).min(embedding.rows - first * CHUNK);
        dx_sum.add(cuda, &dlogits, tokens, embedding, first * CHUNK);
        if trained {
            matmul::add_backward_weight(cuda, &dlogits, tokens, x, first * CHUNK, d_embedding);
        }
    }
    dx_sum.finish(cuda)
}

/// [`by_block`] with one target for each (row, token), whose weight is the sum of their weights in order.
fn unique(call: &Call, kernel_targets: Vec<KernelTarget>) -> (Vec<u32>, Vec<KernelTarget>) {
    let mut sums: Vec<KernelTarget> = Vec::with_capacity(kernel_targets.len());
    for t in by_block(call, kernel_targets).1 {
        match sums.last_mut() {
            Some(last) if (last.row, last.token) == (t.row, t.token) => last.weight += t.weight,
            _ => sums.push(t),
        }
    }
    by_block(call, sums)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_workspace_is_a_quarter_of_what_is_free() {
        let mebibytes = |free: Option<u64>| workspace(free.map(|free| free << 20)) >> 20;
        assert_eq!([None, Some(0), Some(3), Some(511)].map(mebibytes), [64; 4]);
        assert_eq!([Some(512), Some(1023), Some(2048), Some(9000)].map(mebibytes), [128, 128, 512, 2048]);
        assert_eq!([Some(16_384), Some(131_072)].map(mebibytes), [4096; 2]);
    }
}
