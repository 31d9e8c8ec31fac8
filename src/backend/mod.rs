//! The ops that Gemma needs. Each is a trait in a file of its own, with formulas, shapes and what is added to what;
//! [`cpu`] implements it natively, [`cuda`] with the kernels in `kernels/`, each in a file of the same name (the CPU has
//! attention's gradient beside attention). [`Backend`] is all of them. Whoever calls ops of a device by its own type brings them into scope by `use backend::ops::*`.
//!
//! | op | method | what it computes |
//! |---|---|---|
//! | [`Random`] | `random` | x = center + spread u, u by Philox |
//! | [`Embed`] | `embed_forward` | x\[t\] = scale E\[id\[t\]\] |
//! | | `embed_backward` | dE\[id\[t\]\] += scale dx\[t\] |
//! | [`RmsNorm`] | `rms_norm_forward` | y = x rsqrt(mean(x^2) + eps) (offset + w) |
//! | | `add_norm_forward` | sum = scale (x + norm(branch)), y = norm(sum) |
//! | | `add_norm_backward` | dx, dbranch; dw += |
//! | | `add_forward` | sum = scale (x + norm(branch)) |
//! | | `add_backward` | dx, dbranch; dw += |
//! | [`Matmul`] | `matmul_forward` | Y = X W^T |
//! | | `matmul_low_rank_forward` | Y = X W^T + H B^T |
//! | | `matmul_backward_input` | dX = sum of dY W |
//! | | `matmul_backward_weight` | dW += dY^T X |
//! | [`Rope`] | `rope_forward` | y = norm(x), pairs turned by position / factor * theta^(-2i/Dh) |
//! | | `rope_append` | the same of q and k, and k and v appended to a cache |
//! | | `rope_backward` | dx; dw += |
//! | [`Attention`] | `attention_forward` | o = softmax(cap(scale q K^T)) V over what q sees, and the log of the softmax's sum |
//! | [`AttentionBackward`] | `attention_backward` | dq, dk, dv |
//! | [`Geglu`] | `geglu_forward` | h = gelu(X Wg^T) * (X Wu^T) |
//! | | `geglu_backward` | dgate, dup |
//! | | `gelu_product_forward` | h = gelu(gate) * some columns |
//! | | `gelu_product_backward` | dgate, dcolumns |
//! | [`Experts`] | `route_forward` | the G experts of the largest scores; weight = softmax(scale scores) factor |
//! | | `route_backward` | dscores; dfactors += |
//! | | `experts_forward` | y = sum over g of weight (gelu(x Wg^T) * (x Wu^T)) Wd^T |
//! | | `experts_backward` | dx, dweight; dW += |
//! | [`Rows`] | `scaled` | factor x |
//! | | `accumulate` | sum += x |
//! | | `narrowed` | an f32 sum as an activation |
//! | | `widened` | x in f32 |
//! | | `gather_rows` | y\[i\] = x\[rows\[i\]\] |
//! | | `scatter_rows` | dx\[rows\[i\]\] = dy\[i\] |
//! | [`LmHead`] | `draws` | room for draws |
//! | | `lm_head_draw` | argmax over v of cap(x . E\[v\]) / temperature + Gumbel noise, of the tokens that truncation keeps |
//! | | `take_draw` | the oldest draw's tokens |
//! | | `lm_head_sample` | both |
//! | | `lm_head_logprob_forward` | log pi(token) = cap(x . E\[token\]) / temperature - log-sum-exp |
//! | | `lm_head_logprob_backward` | of L = -sum of weight log pi: dx; dE += |
//! | [`Reduce`] | `sum_squares` | sum of x^2, in f64 |
//! | [`Optimize`] | `adamw` | AdamW's update |
//! | | `host_widened` | x in f32 in the host's memory |
//!
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
pub mod attention;
pub mod attention_backward;
pub mod batch;
pub mod cpu;
pub mod cuda;
pub mod embed;
pub mod experts;
pub mod geglu;
pub mod lm_head;
pub mod matmul;
pub mod platform;
pub mod random;
pub mod reduce;
pub mod rms_norm;
pub mod rope;
pub mod rows;

pub use adamw::{AdamW, AdamWCoefficients, DynamicCode, Moments, Optimize, Quantised, Update, Weight};
pub use attention::{Attention, AttentionSpec};
pub use attention_backward::AttentionBackward;
pub use batch::{Batch, Batches, Decode};
pub use embed::Embed;
pub use experts::{ExpertTrace, Experts, Routing};
pub use geglu::{GateUp, Geglu};
pub use lm_head::{Choice, HeadSpec, HeadTrace, LmHead, Sampled, TEMPERATURES, Target, Truncation};
pub use matmul::Matmul;
pub use platform::{Compute, DType, ModelShape, Pace, Platform, Unsupported};
pub use random::{Random, Uniform};
pub use reduce::Reduce;
pub use rms_norm::{NormSpec, ResidualSpec, RmsNorm};
pub use rope::{HeadNorm, Rope, RopeSpec};
pub use rows::Rows;

/// Declares [`Backend`] and [`ops`].
macro_rules! all_ops {
    ($($op:ident),* $(,)?) => {
        /// A device with all ops. `+=` in an op's docs means that it adds to what the output holds; otherwise outputs are new
        /// tensors. The gradient of a weight that is not trained has no rows, and ops leave it out. One in bf16 becomes that of
        /// the same op in f32, rounded to nearest even once; by the CPU's LM head once for every 512 rows.
        pub trait Backend: $($op +)* {}

        impl<B: $($op +)*> Backend for B {}

        /// The traits of all ops, for whoever calls them on a device of which the type is known.
        pub mod ops {
            pub use crate::backend::{$($op),*};
        }
    };
}

all_ops! {
    Platform, Batches, Random, Embed, RmsNorm, Matmul, Rope, Attention, AttentionBackward, Geglu, Experts, Rows, LmHead, Reduce,
    Optimize,
}
