//! The ops that Gemma needs, as one trait. [`cpu`] implements it natively, [`cuda`] with the kernels in `kernels/`.
//!
//! Conventions. Tensors are row-major matrices `[rows, cols]`; a vector is `[1, n]`. Activations and their gradients
//! are f32 on the CPU, where they are rounded to bf16 as they enter a product if [`Compute`] says so, and bf16 under
//! CUDA, where each is rounded once, as an op stores it; sums and statistics are f32. Parameters are f32 or bf16
//! (CUDA: bf16); AdamW's moments and master weights are f32; their gradients are f32 or, of matrices, bf16. Linear
//! weights are `[out, in]` as in Transformers. Names as in Gemma's literature: T tokens (flat), D model width, H query
//! heads, K key/value heads, Dh head width, F MLP width, V vocabulary.
//!
//! Every reduction has a fixed order that depends on the row's own data alone: the same row gives the same bits in
//! any batch, on any number of threads. So a log-prob recorded in sampling is the log-prob that training computes.

pub mod adamw;
pub mod cpu;
pub mod cuda;

pub use adamw::{AdamW, AdamWCoefficients, DynamicCode, Moments, Quantised, Update, Weight};

use crate::checkpoint::Mapped;
use crate::device::{DeviceError, host};
use crate::rng::{DrawKey, philox4x32};
use crate::segments::{QueryRun, Segment, Segments};

/// Storage type of a tensor's elements.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DType {
    /// IEEE binary32.
    F32,
    /// bfloat16.
    Bf16,
}

impl DType {
    /// Size of one element.
    pub fn bytes(self) -> usize {
        match self {
            DType::F32 => 4,
            DType::Bf16 => 2,
        }
    }
}

/// What a device multiplies matrices in, where it has the choice.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Compute {
    /// f32, whatever the weights are stored in.
    #[default]
    F32,
    /// bf16 where the weights are bf16, with sums in f32.
    Bf16,
}

/// Tokens to run: flat, with who attends to whom.
#[derive(Debug, Clone, Copy)]
pub struct Batch<'a> {
    /// Token ids `[T]`; empty in a step of decoding whose tokens the host does not know.
    pub ids: &'a [u32],
    /// T.
    pub rows: usize,
    /// The segment table of the key/value rows.
    pub segments: &'a Segments,
    /// Which tokens the rows of this batch are.
    pub runs: &'a [QueryRun],
}

impl<'a> Batch<'a> {
    /// These tokens.
    pub fn new(ids: &'a [u32], segments: &'a Segments, runs: &'a [QueryRun]) -> Self {
        Self { ids, rows: ids.len(), segments, runs }
    }

    /// The absolute position of every query row; 0 of those that belong to no run.
    pub fn positions(&self) -> Vec<u32> {
        self.by_row(|segment| segment.position)
    }

    /// The key/value row of every query row; 0 of those that belong to no run.
    pub fn kv_rows(&self) -> Vec<u32> {
        self.by_row(|segment| segment.start)
    }

    /// The tokens of some of the rows, which ascend, and which those are.
    pub fn narrowed(&self, rows: &[u32]) -> (Vec<u32>, Vec<QueryRun>) {
        let ids = rows.iter().map(|&row| self.ids[row as usize]).collect();
        let mut runs: Vec<QueryRun> = Vec::new();
        for run in self.runs {
            let begin = rows.partition_point(|&row| (row as usize) < run.row);
            let end = rows.partition_point(|&row| (row as usize) < run.row + run.len);
            let mut at = begin;
            for next in rows[begin..end].chunk_by(|a, b| a + 1 == *b) {
                let first = run.first + next[0] as usize - run.row;
                runs.push(QueryRun { segment: run.segment, first, len: next.len(), row: at });
                at += next.len();
            }
        }
        (ids, runs)
    }

    /// A number of every query row that counts up from what `first` says of its segment.
    fn by_row(&self, first: fn(&Segment) -> usize) -> Vec<u32> {
        let mut numbers = vec![0; self.rows];
        for run in self.runs {
            let begin = first(&self.segments.list()[run.segment]) + run.first;
            for (number, t) in numbers[run.row..run.row + run.len].iter_mut().zip(begin..) {
                *number = t as u32;
            }
        }
        numbers
    }
}

/// A step of decoding: one more token of each of many streams, as the latest draw left it.
#[derive(Debug, Clone, Copy)]
pub struct Decode<'a, D> {
    /// Where that draw is.
    pub draws: &'a D,
    /// Which of its rows each token is from `[T]`.
    pub from: &'a [u32],
    /// The segment table of the key/value rows.
    pub segments: &'a Segments,
    /// Which tokens the rows of this step are.
    pub runs: &'a [QueryRun],
}

impl<'a, D> Decode<'a, D> {
    /// The step as a batch of tokens that are known.
    pub fn with_ids(&self, ids: &'a [u32]) -> Batch<'a> {
        Batch { ids, rows: self.from.len(), segments: self.segments, runs: self.runs }
    }
}

/// How a decode loop uses a backend. It changes no result.
#[derive(Debug, Clone, Copy)]
pub struct Pace {
    /// Steps that are asked for before the tokens of one are looked at: while the device computes a step, the host looks
    /// at the one before and prepares the next. A stream that has ended takes part in so many more.
    pub lag: usize,
    /// Rows of a step with so many live streams, at least as many; growing with them. Those in excess belong to nobody.
    /// Where it has few values, the same work comes again while streams end.
    pub rows: fn(usize) -> usize,
}

/// One layer's rotary embedding: pairs (i, i + Dh/2) of every head turn by position / factor * theta^(-2i/Dh).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RopeSpec {
    /// Dh.
    pub head_dim: usize,
    /// Pairs that turn, the first ones; the others stay as they are (Gemma 4's "proportional" RoPE). Dh / 2 elsewhere.
    pub pairs: usize,
    /// Base of the angles.
    pub theta: f64,
    /// Positions are divided by this (linear scaling).
    pub factor: f64,
}

impl RopeSpec {
    /// All pairs turn, by position * theta^(-2i/Dh).
    pub fn new(head_dim: usize, theta: f64) -> Self {
        Self { head_dim, pairs: head_dim / 2, theta, factor: 1.0 }
    }

    /// No pair turns.
    pub fn still(head_dim: usize) -> Self {
        Self { pairs: 0, ..Self::new(head_dim, 1.0) }
    }

    /// The angle per position of every pair, `[Dh / 2]`, rounded where Transformers rounds: theta^(2i/Dh), its
    /// reciprocal and the division by the scaling factor are f32.
    pub fn inverse_frequencies(&self) -> Vec<f32> {
        let of_pair = |i: usize| {
            let exponent = (2 * i) as f32 / self.head_dim as f32;
            1.0 / self.theta.powf(f64::from(exponent)) as f32 / self.factor as f32
        };
        (0..self.head_dim / 2).map(|i| if i < self.pairs { of_pair(i) } else { 0.0 }).collect()
    }
}

/// An RMSNorm: y = x rsqrt(mean(x^2) + eps) (offset + w).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct NormSpec {
    /// Added to the mean square.
    pub eps: f32,
    /// Added to the weight: 1 up to Gemma 3, whose weights are differences from 1; 0 in Gemma 4.
    pub offset: f32,
}

/// The norm of every head of q, k (Gemma 3) and v (Gemma 4).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct HeadNorm<W> {
    /// The weight `[1, Dh]` (and, in the backward pass, its gradient); without one the norm is x rsqrt(mean(x^2) + eps).
    pub weight: Option<W>,
    /// Its figures.
    pub spec: NormSpec,
}

/// A sum on the residual stream: sum = scale (x + branch), of which `norm` says how it and the branch are normed.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ResidualSpec {
    /// Of the norm of the branch and of that of the sum.
    pub norm: NormSpec,
    /// The layer scalar of Gemma 4, at the end of a layer; 1 elsewhere.
    pub scale: f32,
}

/// What one layer's attention needs to know beside its tensors.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AttentionSpec {
    /// H.
    pub heads: usize,
    /// K; query head h reads key/value head h / (H / K).
    pub kv_heads: usize,
    /// Dh.
    pub head_dim: usize,
    /// Factor on q . k.
    pub scale: f32,
    /// `c tanh(s / c)` on the scaled scores, before the mask.
    pub softcap: Option<f32>,
    /// Sliding window.
    pub window: Option<usize>,
}

/// A mixture of experts (Gemma 4 26B-A4B): each row goes to those of E MLPs whose scores are the largest.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Routing {
    /// E.
    pub experts: usize,
    /// G, the experts of each row.
    pub top: usize,
    /// Factor on scores.
    pub scale: f32,
}

/// The figures of a model that kernels are made for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ModelShape {
    /// D.
    pub hidden: usize,
    /// H.
    pub heads: usize,
    /// K.
    pub kv_heads: usize,
    /// Dh.
    pub head_dim: usize,
    /// F.
    pub intermediate: usize,
    /// V.
    pub vocab: usize,
    /// P, the width of a layer's own inputs; 0: none.
    pub per_layer_width: usize,
    /// L P.
    pub per_layer_columns: usize,
    /// E; 0: none.
    pub experts: usize,
    /// G, of each token.
    pub experts_per_token: usize,
    /// Fe.
    pub expert_width: usize,
}

/// A model that a backend has no kernels for.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{device} cannot run a model of this shape; --device cpu can:{}", .problems.iter().map(|p| format!("\n  {p}")).collect::<String>())]
pub struct Unsupported {
    /// [`Backend::device_name`].
    pub device: String,
    /// All that is in the way; never empty.
    pub problems: Vec<String>,
}

/// Temperatures of [`HeadSpec`]. Below, f32 logits over the temperature may overflow, and what is left is greedy
/// sampling; above, what is left is uniform.
pub const TEMPERATURES: std::ops::RangeInclusive<f32> = 1e-6..=1e6;

/// What the LM head's log-probs leave for their backward pass.
#[derive(Debug, Clone)]
pub struct HeadTrace<T> {
    /// Log-sum-exp of each row's logits: `[1, R]`, f32.
    pub lse: T,
    /// The products that the logits are made of, in f32 as the backend lays them out.
    pub logits: Option<T>,
}

impl<T> HeadTrace<T> {
    /// An upper bound of the bytes of [`Self::logits`]: rows and tokens come in whole tiles.
    pub fn logits_bytes(rows: usize, vocab: usize) -> u64 {
        rows.next_multiple_of(64) as u64 * vocab.next_multiple_of(512) as u64 * DType::F32.bytes() as u64
    }
}

/// What turns hidden states into probabilities: pi(v) = softmax(cap(x . E_v) / temperature).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct HeadSpec {
    /// `c tanh(l / c)` on the logits.
    pub softcap: Option<f32>,
    /// Sampling temperature, one of [`TEMPERATURES`]; it is part of pi.
    pub temperature: f32,
}

/// Truncation of the distribution before a draw. The default truncates nothing.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Truncation {
    /// Keep the k most probable tokens; 0 keeps all.
    pub top_k: usize,
    /// Keep the smallest set of most probable tokens whose probability reaches p; 1 keeps all.
    pub top_p: f32,
    /// Keep tokens whose probability is at least p times the most probable one's; 0 keeps all.
    pub min_p: f32,
}

impl Default for Truncation {
    fn default() -> Self {
        Self { top_k: 0, top_p: 1.0, min_p: 0.0 }
    }
}

impl Truncation {
    /// Whether the whole distribution remains.
    pub fn is_none(&self) -> bool {
        *self == Self::default()
    }
}

/// How one row's token is chosen.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Choice {
    /// The most probable token; the lowest id among equals.
    Greedy,
    /// Gumbel-max with Philox noise under this key.
    Draw(DrawKey),
}

/// A chosen token.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sampled {
    /// Its id.
    pub token: u32,
    /// log pi(token) under the full (untruncated) distribution at the head's temperature.
    pub logprob: f32,
}

/// One log-prob asked of the LM head: `token` after hidden row `row`. A row may have several targets (N responses
/// begin after the same prompt token) and is then computed once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Target {
    /// Row of the hidden states.
    pub row: u32,
    /// Token id.
    pub token: u32,
}

/// Random numbers between center - spread and center + spread, each as likely as any other.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Uniform {
    /// Different seeds give different numbers.
    pub seed: u32,
    /// The mean.
    pub center: f32,
    /// The largest distance from it.
    pub spread: f32,
}

impl Uniform {
    /// Numbers between -`spread` and `spread`.
    pub fn up_to(spread: f32, seed: u32) -> Self {
        Self { seed, center: 0.0, spread }
    }

    /// Elements 4 n to 4 n + 3 of what [`Backend::random`] makes, before they are rounded to its dtype.
    pub fn four(&self, n: u64) -> [f32; 4] {
        philox4x32([n as u32, (n >> 32) as u32, 0, 0], [self.seed, 0])
            .map(|bits| self.center + self.spread * ((bits >> 7) as f32 / 16_777_216.0 - 1.0))
    }
}

/// gate and up of the gated MLP, where they are kept.
pub type GateUp<T> = Option<(T, T)>;

/// What experts computed: a row `[Fe]` of each for every route, in the order of experts and, of one expert, of tokens.
pub struct ExpertTrace<T> {
    /// x Wg^T.
    pub gate: T,
    /// x Wu^T.
    pub up: T,
    /// gelu_tanh(gate) * up.
    pub product: T,
}

/// The ops. `+=` in an op's docs means it adds to what the output holds; otherwise outputs are new tensors. The gradient of
/// a weight that is not trained has no rows, and ops leave it out. One in bf16 becomes that of the same op in f32, rounded
/// to nearest even once; by the CPU's LM head once for every 512 rows.
///
/// An op that the device fails (no memory left, a broken launch) records the first such error, and later ops do
/// nothing; whoever reads results back asks [`Backend::check`] before trusting them. So errors surface where results
/// do, as they do on an asynchronous device anyway.
pub trait Backend: Send + Sync {
    /// A matrix on the backend's device.
    type Tensor: Send + Sync;
    /// A [`Batch`] where the ops can read it.
    type Tables: Send + Sync;
    /// The draws of a decode loop: the latest where the next step's embedding can read it, and those that nobody has
    /// taken yet on their way to the host.
    type Draws: Send + Sync;
    /// Which experts each row goes to, with what weights, and so which rows each expert has.
    type Routes: Send + Sync;
    /// Codes of 8 bits, as AdamW's moments may be kept in.
    type Codes: Send + Sync;

    /// What computes, as a user would recognise it: `cpu`, or the name of a GPU.
    fn device_name(&self) -> String;
    /// What of that name bits may depend on: `cpu`, on which they are the same everywhere, or a GPU's model.
    fn device_model(&self) -> String {
        self.device_name()
    }
    /// Whether the ops can run models of this shape: asked before a model is loaded.
    fn supports(&self, _shape: &ModelShape) -> Result<(), Unsupported> {
        Ok(())
    }
    /// Storage type of activations and their gradients; bf16 activations want bf16 parameters.
    fn activation_dtype(&self) -> DType;
    /// The same device, its products computed so. One that has no choice stays as it is.
    fn computing(self, _compute: Compute) -> Self
    where
        Self: Sized,
    {
        self
    }
    /// The first error of the device, if any. Waits for what was asked of it.
    fn check(&self) -> Result<(), DeviceError>;
    /// Bytes that one batch of generation may take, above all its key/value cache; further prompts go in turns. A
    /// decode step reads all weights, for however many streams: the more run together, the better.
    fn generation_bytes(&self) -> usize {
        1 << 30
    }
    /// Bytes that a training step may take beside what is held already: what is free of the device's memory. Where that is
    /// the host's, which others use, half of what is free.
    fn training_bytes(&self) -> u64 {
        host::available().map_or(1 << 30, |bytes| bytes / 2)
    }
    /// Forgets a want of memory, if that is what failed, so that less can be asked for. What ops returned since is void.
    fn forget_out_of_memory(&self) {}
    /// How decode loops do best here: without a lag or surplus rows, unless the device works while the host does.
    fn pace(&self) -> Pace {
        Pace { lag: 0, rows: |streams| streams }
    }
    /// From here to [`Backend::end_sequence`] the ops are those of one step of many alike: a device that can record
    /// and replay them may. Changes no result.
    fn begin_sequence(&self) {}
    /// See [`Backend::begin_sequence`].
    fn end_sequence(&self) {}

    /// A matrix of zeros.
    fn zeros(&self, dtype: DType, rows: usize, cols: usize) -> Self::Tensor;
    /// A matrix of random numbers, the same on every device. Element i is center + spread u with u = b / 2^24 - 1, where
    /// b is the upper 25 bits of word i mod 4 of Philox over the counter (i / 4, 0, 0) under the key (seed, 0); every
    /// operation rounds to f32, the last one to `dtype`.
    fn random(&self, uniform: &Uniform, dtype: DType, rows: usize, cols: usize) -> Self::Tensor;
    /// Uploads row-major bytes of `dtype`. Panics unless `bytes` is exactly the matrix.
    fn upload(&self, dtype: DType, rows: usize, cols: usize, bytes: &[u8]) -> Self::Tensor;
    /// Downloads row-major bytes in the tensor's own dtype.
    fn download(&self, x: &Self::Tensor) -> Vec<u8>;
    /// Downloads as f32 whatever the dtype.
    fn to_f32(&self, x: &Self::Tensor) -> Vec<f32>;
    /// So many codes, all 0.
    fn zero_codes(&self, n: usize) -> Self::Codes;
    /// Uploads codes.
    fn upload_codes(&self, codes: &[u8]) -> Self::Codes;
    /// Downloads codes.
    fn download_codes(&self, codes: &Self::Codes) -> Vec<u8>;
    /// A matrix of zeros in the host's memory, where the device has another. Ops but [`Backend::adamw`] do not
    /// take it: that one updates moments and masters there with the same bits as elsewhere.
    fn host_zeros(&self, dtype: DType, rows: usize, cols: usize) -> Self::Tensor {
        self.zeros(dtype, rows, cols)
    }
    /// So many codes there, all 0.
    fn host_zero_codes(&self, n: usize) -> Self::Codes {
        self.zero_codes(n)
    }
    /// [`Backend::widened`] to the host's memory, as [`Backend::host_zeros`].
    fn host_widened(&self, x: &Self::Tensor) -> Self::Tensor {
        self.widened(x)
    }
    /// [`Backend::upload`] of the weights of a linear map, or of the embeddings, which a device may lay out as its products read
    /// them.
    fn upload_weight(&self, dtype: DType, rows: usize, cols: usize, bytes: &[u8]) -> Self::Tensor {
        self.upload(dtype, rows, cols, bytes)
    }
    /// Uploads to the host's memory, where the device has another, a matrix of which [`Backend::embed_forward`] reads rows and no
    /// other op anything. The bytes may be those of a file: a device that computes in the host's memory leaves them there.
    fn upload_to_host(
        &self,
        dtype: DType,
        rows: usize,
        cols: usize,
        bytes: &[u8],
        _in_file: Option<Mapped>,
    ) -> Self::Tensor {
        self.upload(dtype, rows, cols, bytes)
    }
    /// Replaces the elements of a matrix, wherever it lies, by row-major bytes of its dtype. Panics unless `bytes` is exactly the
    /// matrix.
    fn overwrite(&self, x: &mut Self::Tensor, bytes: &[u8]) {
        let ((rows, cols), dtype) = (self.shape(x), self.dtype(x));
        *x = self.upload(dtype, rows, cols, bytes);
    }
    /// The same of codes, as many as there are.
    fn overwrite_codes(&self, codes: &mut Self::Codes, bytes: &[u8]) {
        *codes = self.upload_codes(bytes);
    }
    /// `[rows, cols]`.
    fn shape(&self, x: &Self::Tensor) -> (usize, usize);
    /// Storage type.
    fn dtype(&self, x: &Self::Tensor) -> DType;

    /// Prepares a batch, once for each forward pass. `attention` holds every [`AttentionSpec`] of the pass.
    fn tables(&self, batch: &Batch, attention: &[AttentionSpec]) -> Self::Tables;
    /// The same of a step of decoding, whose tokens the host need not know. A draw of what is no token, from a row of
    /// NaN, stands for any token: whoever takes the draw sees its log-prob.
    fn decode_tables(&self, step: &Decode<Self::Draws>, attention: &[AttentionSpec]) -> Self::Tables;

    /// x\[t\] = scale * embedding\[ids\[t\]\]: `[T, D]`.
    fn embed_forward(&self, embedding: &Self::Tensor, tables: &Self::Tables, scale: f32) -> Self::Tensor;
    /// d_embedding\[ids\[t\]\] += scale * dx\[t\], the tokens of an id in ascending order.
    fn embed_backward(
        &self,
        dx: &Self::Tensor,
        tables: &Self::Tables,
        scale: f32,
        d_embedding: &mut Self::Tensor,
    );

    /// y = x rsqrt(mean(x^2) + eps) (offset + w) over the columns of x; w `[1, D]`.
    fn rms_norm_forward(&self, x: &Self::Tensor, w: &Self::Tensor, norm: NormSpec) -> Self::Tensor;
    /// The end of a branch and the beginning of the next: sum = scale (x + norm(branch; post)), or scale (x + branch) without
    /// `post`, and normed = norm(sum; pre). Returns (sum, normed); normed is computed from sum as stored.
    fn add_norm_forward(
        &self,
        x: &Self::Tensor,
        branch: &Self::Tensor,
        post: Option<&Self::Tensor>,
        pre: &Self::Tensor,
        spec: ResidualSpec,
    ) -> (Self::Tensor, Self::Tensor);
    /// Gradient of [`Backend::add_norm_forward`], given those of sum (`None`: zero) and normed. `pre` is (w, dw),
    /// `post` (branch, w, dw); weights' gradients += over all rows in a fixed order. Returns (dx, dbranch); without
    /// `post` there is no dbranch: it equals dx.
    fn add_norm_backward(
        &self,
        d_sum: Option<&Self::Tensor>,
        d_normed: &Self::Tensor,
        sum: &Self::Tensor,
        pre: (&Self::Tensor, &mut Self::Tensor),
        post: Option<(&Self::Tensor, &Self::Tensor, &mut Self::Tensor)>,
        spec: ResidualSpec,
    ) -> (Self::Tensor, Option<Self::Tensor>);

    /// [`Backend::add_norm_forward`] where no norm follows: scale (x + norm(branch; post)).
    fn add_forward(
        &self,
        x: &Self::Tensor,
        branch: &Self::Tensor,
        post: &Self::Tensor,
        spec: ResidualSpec,
    ) -> Self::Tensor;
    /// Gradient of [`Backend::add_forward`], given that of the sum, which is `d_sum` plus `more`; `post` as in
    /// [`Backend::add_norm_backward`]. Returns (dx, dbranch).
    fn add_backward(
        &self,
        d_sum: &Self::Tensor,
        more: Option<&Self::Tensor>,
        post: (&Self::Tensor, &Self::Tensor, &mut Self::Tensor),
        spec: ResidualSpec,
    ) -> (Self::Tensor, Self::Tensor);

    /// Y_i = X W_i^T: X `[T, in]`, W_i `[out_i, in]`, Y_i `[T, out_i]`.
    fn matmul_forward<const N: usize>(&self, x: &Self::Tensor, w: [&Self::Tensor; N]) -> [Self::Tensor; N];
    /// Y_i = X W_i^T + H_i B_i^T, where there is such an (H_i, B_i), summed before it is rounded: H_i `[T, r]`, B_i `[out_i, r]`.
    fn matmul_low_rank_forward<const N: usize>(
        &self,
        x: &Self::Tensor,
        w: [&Self::Tensor; N],
        low_rank: [Option<(&Self::Tensor, &Self::Tensor)>; N],
    ) -> [Self::Tensor; N];
    /// dX = sum over i of dY_i W_i, summed before it is rounded.
    fn matmul_backward_input(&self, pairs: &[(&Self::Tensor, &Self::Tensor)]) -> Self::Tensor;
    /// dW += dY^T X.
    fn matmul_backward_weight(&self, dy: &Self::Tensor, x: &Self::Tensor, dw: &mut Self::Tensor);

    /// q or k as attention reads it: the heads of x `[T, heads Dh]` normed, where there is a `norm`, and turned.
    fn rope_forward(
        &self,
        x: &Self::Tensor,
        norm: Option<HeadNorm<&Self::Tensor>>,
        tables: &Self::Tables,
        rope: &RopeSpec,
    ) -> Self::Tensor;
    /// [`Backend::rope_forward`] of q, which it returns, and of k into the batch's rows of a cache, and there v, normed but not
    /// turned: the cache's append. The norms are those of q, k and v; v is normed only where q and k are.
    #[allow(clippy::too_many_arguments, reason = "three tensors in, two caches out")]
    fn rope_append(
        &self,
        q: &Self::Tensor,
        k: &Self::Tensor,
        v: &Self::Tensor,
        norms: [Option<HeadNorm<&Self::Tensor>>; 3],
        tables: &Self::Tables,
        rope: &RopeSpec,
        cached_k: &mut Self::Tensor,
        cached_v: &mut Self::Tensor,
    ) -> Self::Tensor;
    /// Gradient of [`Backend::rope_forward`] by x; that of the norm's weight, if it has one, +=.
    fn rope_backward(
        &self,
        dy: &Self::Tensor,
        x: &Self::Tensor,
        norm: Option<HeadNorm<(&Self::Tensor, &mut Self::Tensor)>>,
        tables: &Self::Tables,
        rope: &RopeSpec,
    ) -> Self::Tensor;

    /// Segment attention. q `[Tq, H Dh]` with rows as the batch's runs say; k, v `[rows, K Dh]` with rows as its
    /// segments say. Returns o `[Tq, H Dh]` and lse `[Tq, H]` (f32: natural log of the sum of exp of the visible
    /// scores); rows of q that belong to no run come out as zero with an lse of -inf.
    fn attention_forward(
        &self,
        q: &Self::Tensor,
        k: &Self::Tensor,
        v: &Self::Tensor,
        tables: &Self::Tables,
        spec: &AttentionSpec,
    ) -> (Self::Tensor, Self::Tensor);
    /// Gradient of [`Backend::attention_forward`], of which every row of k and v belongs to a segment of the batch: returns
    /// (dq, dk, dv). Keys of a shared prefix collect the gradients of all that see them, in a fixed order; those that no
    /// query sees have none, zero.
    #[allow(clippy::too_many_arguments, reason = "all that the formula reads")]
    fn attention_backward(
        &self,
        d_o: &Self::Tensor,
        q: &Self::Tensor,
        k: &Self::Tensor,
        v: &Self::Tensor,
        o: &Self::Tensor,
        lse: &Self::Tensor,
        tables: &Self::Tables,
        spec: &AttentionSpec,
    ) -> (Self::Tensor, Self::Tensor, Self::Tensor);

    /// h = gelu_tanh(X Wg^T) * (X Wu^T): X `[T, D]`, weights `[F, D]`. With `keep` also the two products, (gate, up),
    /// which the backward pass needs.
    fn geglu_forward(
        &self,
        x: &Self::Tensor,
        w_gate: &Self::Tensor,
        w_up: &Self::Tensor,
        keep: bool,
    ) -> (Self::Tensor, GateUp<Self::Tensor>);
    /// (dgate, dup) of h = gelu_tanh(gate) * up.
    fn geglu_backward(
        &self,
        dh: &Self::Tensor,
        gate: &Self::Tensor,
        up: &Self::Tensor,
    ) -> (Self::Tensor, Self::Tensor);

    /// h = gelu_tanh(gate) * up, where up is columns `first..first + P` of `inputs`: gate `[T, P]`.
    fn gelu_product_forward(&self, gate: &Self::Tensor, inputs: &Self::Tensor, first: usize) -> Self::Tensor;
    /// dgate of [`Backend::gelu_product_forward`]; the gradient of up replaces columns `first..first + P` of `d_inputs`.
    fn gelu_product_backward(
        &self,
        dh: &Self::Tensor,
        gate: &Self::Tensor,
        inputs: &Self::Tensor,
        first: usize,
        d_inputs: &mut Self::Tensor,
    ) -> Self::Tensor;

    /// Sends every row t to the G experts e_g that have the largest scores `[T, E]`, the first among equals, in the order of
    /// scores: share\[t, g\] is the softmax over g of scale * scores\[t, e_g\], weight\[t, g\] = share\[t, g\] factors\[e_g\].
    /// factors `[1, E]`.
    fn route_forward(&self, scores: &Self::Tensor, factors: &Self::Tensor, routing: &Routing)
    -> Self::Routes;
    /// The gradient of the scores, 0 of experts that a row does not go to, given that of the weights, `[T, G]` in f32; that
    /// of the factors +=, over the rows in a fixed order.
    fn route_backward(
        &self,
        d_weights: &Self::Tensor,
        routes: &Self::Routes,
        routing: &Routing,
        factors: (&Self::Tensor, &mut Self::Tensor),
    ) -> Self::Tensor;
    /// y\[t\] = sum over g of weight\[t, g\] (gelu_tanh(x\[t\] Wg^T) * (x\[t\] Wu^T)) Wd^T with the weights of expert e_g:
    /// x `[T, D]`; gate_up `[E 2 Fe, D]` holds Wg and then Wu of each expert, down `[E D, Fe]` Wd of each. A row's sum is in f32,
    /// in the order of g. With `keep` also what the backward pass needs.
    fn experts_forward(
        &self,
        x: &Self::Tensor,
        routes: &Self::Routes,
        gate_up: &Self::Tensor,
        down: &Self::Tensor,
        keep: bool,
    ) -> (Self::Tensor, Option<ExpertTrace<Self::Tensor>>);
    /// Gradient of [`Backend::experts_forward`]; (weights, their gradient, which +=, an expert's rows in ascending order).
    /// Returns (dx, d_weights `[T, G]` in f32).
    fn experts_backward(
        &self,
        dy: &Self::Tensor,
        x: &Self::Tensor,
        routes: &Self::Routes,
        trace: &ExpertTrace<Self::Tensor>,
        gate_up: (&Self::Tensor, &mut Self::Tensor),
        down: (&Self::Tensor, &mut Self::Tensor),
    ) -> (Self::Tensor, Self::Tensor);

    /// The same elements in rows of another length.
    fn reshaped(&self, x: Self::Tensor, rows: usize, cols: usize) -> Self::Tensor;
    /// factor x.
    fn scaled(&self, x: Self::Tensor, factor: f32) -> Self::Tensor;
    /// sum += x; sum is f32.
    fn accumulate(&self, x: &Self::Tensor, sum: &mut Self::Tensor);
    /// A sum in f32 as an activation.
    fn narrowed(&self, sum: &Self::Tensor) -> Self::Tensor;
    /// x in f32, which holds every bf16 exactly.
    fn widened(&self, x: &Self::Tensor) -> Self::Tensor {
        let (rows, cols) = self.shape(x);
        self.upload(DType::F32, rows, cols, bytemuck::cast_slice(&self.to_f32(x)))
    }

    /// out\[i\] = x\[rows\[i\]\].
    fn gather_rows(&self, x: &Self::Tensor, rows: &[u32]) -> Self::Tensor;
    /// The transpose of [`Backend::gather_rows`] out of `total` rows: dx\[rows\[i\]\] = dy\[i\], zero elsewhere; `rows`
    /// ascend without repeating.
    fn scatter_rows(&self, dy: &Self::Tensor, rows: &[u32], total: usize) -> Self::Tensor;

    /// Room for draws of up to `rows` rows.
    fn draws(&self, rows: usize) -> Self::Draws;
    /// Chooses one token per row of x `[R, D]`: logits exist only for a tile of rows x vocabulary. Waits for nothing.
    fn lm_head_draw(
        &self,
        x: &Self::Tensor,
        embedding: &Self::Tensor,
        head: &HeadSpec,
        truncation: &Truncation,
        choices: &[Choice],
        draws: &mut Self::Draws,
    );
    /// The tokens of the oldest draw that was not taken yet; waits for it, and for nothing that was asked later. The
    /// device's first error, if there was one by then. Panics if all were taken.
    fn take_draw(&self, draws: &mut Self::Draws) -> Result<Vec<Sampled>, DeviceError>;
    /// [`Backend::lm_head_draw`] and what it drew; zeros after an error.
    fn lm_head_sample(
        &self,
        x: &Self::Tensor,
        embedding: &Self::Tensor,
        head: &HeadSpec,
        truncation: &Truncation,
        choices: &[Choice],
    ) -> Vec<Sampled> {
        let mut draws = self.draws(choices.len());
        self.lm_head_draw(x, embedding, head, truncation, choices, &mut draws);
        let nothing = |_| vec![Sampled { token: 0, logprob: 0.0 }; choices.len()];
        self.take_draw(&mut draws).unwrap_or_else(nothing)
    }
    /// log pi(token | row) of every target, and what the backward pass needs of it: with `keep`, the logits as well.
    fn lm_head_logprob_forward(
        &self,
        x: &Self::Tensor,
        embedding: &Self::Tensor,
        head: &HeadSpec,
        targets: &[Target],
        keep: bool,
    ) -> (Vec<f32>, HeadTrace<Self::Tensor>);
    /// Gradient of L = -sum_i weights\[i\] * logprob(targets\[i\]): returns dx `[R, D]`, and d_embedding +=. Logits that were not
    /// kept are computed again, in tiles; no bit depends on it.
    #[allow(clippy::too_many_arguments, reason = "all that the formula reads, and a sum")]
    fn lm_head_logprob_backward(
        &self,
        x: &Self::Tensor,
        embedding: &Self::Tensor,
        head: &HeadSpec,
        trace: &HeadTrace<Self::Tensor>,
        targets: &[Target],
        weights: &[f32],
        d_embedding: &mut Self::Tensor,
    ) -> Self::Tensor;

    /// Sum of squares of every (f32 or bf16) tensor in f64, fixed order. NaN or Inf in one makes its sum non-finite.
    fn sum_squares(&self, x: &[&Self::Tensor]) -> Vec<f64>;
    /// One AdamW update of every parameter; gradients are zero afterwards.
    fn adamw(&self, hyper: &AdamW, updates: &mut [Update<Self::Tensor, Self::Codes>]);
}

#[cfg(test)]
mod tests {
    use super::RopeSpec;

    /// Bit patterns that Transformers computes (`ROPE_INIT_FUNCTIONS`, PyTorch float32).
    #[test]
    fn frequencies_are_those_of_transformers() {
        let tables = [
            (256, 128, 1e6, 8.0, [(0, 0x3e000000), (1, 0x3de5ced3), (17, 0x3ca3770f), (127, 0x341583da)]),
            (256, 128, 1e4, 1.0, [(0, 0x3f800000), (2, 0x3f5dafd7), (40, 0x3d6655c2), (127, 0x38e15c91)]),
            (128, 64, 1e4, 1.0, [(1, 0x3f5dafd7), (17, 0x3db15978), (40, 0x3b4f3e38), (63, 0x38f22ce2)]),
            (512, 64, 1e6, 1.0, [(1, 0x3f728cf8), (17, 0x3ecc90c7), (63, 0x3d08b588), (64, 0)]),
        ];
        for (head_dim, pairs, theta, factor, want) in tables {
            let frequencies = RopeSpec { head_dim, pairs, theta, factor }.inverse_frequencies();
            assert_eq!(frequencies.len(), head_dim / 2);
            for (i, bits) in want {
                assert_eq!(frequencies[i].to_bits(), bits, "pair {i} of {head_dim}, theta {theta}");
            }
        }
    }
}
