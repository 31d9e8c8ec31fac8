//! bon-engine fine-tunes Gemma so that it is best when you sample it N times and keep the best answer, after Chow et
//! al., "Inference-Aware Fine-Tuning for Best-of-N Sampling in Large Language Models" (arXiv 2412.15287).
//!
//! # Bird's eye view
//!
//! A training step is five words: sample, score, weigh, backward, step.
//!
//! ```text
//! tasks ──> rollout ───────────────────────────────> objective ──────> policy ─────────────> optimizer
//!           M responses per prompt (generate),       r, R -> c_j per   L = - sum_jt w_jt     AdamW on
//!           each judged (verifier): r and R          response          log pi(y_jt | ..)     f32 masters
//! ```
//!
//! Every objective ends in one coefficient c_j per response, so there is one backward pass, whatever the objective. A verifier
//! may be a model as well ([`reward`]); to train one, coefficients are on its scores of given responses.
//! Sampling and training run the same weights through the same ops ([`gemma::Gemma`] on a [`backend::Backend`]): there
//! is no second engine to keep in step, and no text is tokenised twice.
//!
//! # Where to begin reading
//!
//! - [`train::run`] lists the ten things that a step does, and where; [`train::policy::Forward`] is the pass that it
//!   differentiates.
//! - [`objective::coefficients`] is the mathematics; each file in `objective` opens with its equation.
//! - [`gemma::Gemma::forward`] is the model, one screen per block; its backward pass mirrors it line by line.
//! - [`backend`] lists the ops with their formulas; each is a trait, with shapes, and [`backend::cpu`] has their code.
//! - [`segments`] is the one description of who attends to whom, which prefill, decode and training share.
//! - [`cli`] turns a command line into calls of the above.
//!
//! # Code map
//!
//! From the bottom up; a module names only modules above it in this list.
//!
//! - [`rng`]: Philox4x32-10. A draw is a function of (seed, step, prompt, stream, position), not of history.
//! - [`segments`]: runs of tokens and the prefixes that they see. A few-shot header is a segment, each prompt is one
//!   that continues it, and its N responses are a tree of segments that continue the prompt; what is shared exists once.
//! - [`checkpoint`]: bytes on disk to named tensors and back, in Hugging Face's layout. Knows no model.
//! - [`layered`]: settings from a TOML file with overrides on top. Knows no setting.
//! - [`device`]: something that runs PTX: a GPU through the CUDA driver, or the virtual GPU; or only has memory.
//! - [`backend`]: the ops that Gemma needs, a trait and a file for each, here, in [`backend::cpu`] and in [`backend::cuda`].
//! - [`cost`]: the ops at the shapes of real models, counted on the virtual GPU, and the least time of that on a chip.
//! - [`gemma`]: config.json as data ([`gemma::config`], all that differs between Gemmas), parameters, forward
//!   pass, backward pass.
//! - [`chat`]: conversations, and the chat templates that turn them into prompts.
//! - [`tokenizer`]: text to ids and back, and the turn template.
//! - [`tasks`]: JSON lines of prompts and answers, and the order in which training draws them.
//! - [`objective`]: scored groups to coefficients. Pure functions.
//! - [`verifier`]: text to score, in process, by the user's program, or by a task's tests in confined processes; a pool that
//!   judges beside generation.
//! - [`eval`]: pools of judged samples to pass@N, Best-of-N and majorities with intervals, over N and temperatures. Pure
//!   functions.
//! - [`page`]: evaluations and runs as a page with plots. Pure functions.
//! - [`adapter`]: low-rank adapters on disk, as PEFT has them, and their merger into a model.
//! - [`generate`]: one prefill, N streams per prompt, which part where their tokens do.
//! - [`model_dir`]: a model directory, opened.
//! - [`reward`]: reward models, which score responses by their tokens: forward and backward.
//! - [`rollout`]: tasks to prompts to responses to verdicts; training and evaluation both begin here.
//! - [`train`]: configuration, optimizer, schedule, checkpoints, metrics, and the loop over them.
//! - [`plan`]: what a run will take of memory.
//! - [`cli`]: one file per command; the only place for anyhow, the terminal and printing.
//!
//! # Invariants
//!
//! - **A row's result depends on that row alone.** Reductions have a fixed order; batch, thread count and instruction
//!   set change no bit. So the log-prob recorded in sampling is the log-prob that training computes:
//!   [`train::metrics::StepMetrics::logprob_gap_max`] is 0 on the first update of a step.
//! - **Nothing is drawn twice or by history.** Random numbers are counter-based, so a resumed run continues to the
//!   same bits, and a stream does not depend on its neighbours.
//! - **The loss is at the sampler's temperature**, and token ids are kept from sampling to loss.
//! - **Text never becomes a control token, and a response's text is one function of its tokens**
//!   ([`rollout::ResponseEnd`]): for live output, verifiers, stop strings and experts.
//! - **A reward model's score depends on prompt and response alone**, and is the same in training and in use: both read the
//!   tokens that were sampled.
//! - **Logits exist only in tiles.** Sampling, log-probs and their gradient work on a tile of rows x vocabulary.
//! - **A failure to judge is no verdict.** [`verifier::Failure`] is counted apart from a score of 0.
//! - **Files appear whole.** They are written beside their place, synced and renamed; a kill at any moment leaves the
//!   newest checkpoint usable.
//! - **Bad input is an error that says what to do**, not a panic; a typed one below [`cli`].
//!
//! # Deliberately absent
//!
//! - No autograd: each op's backward pass is written beside its forward pass, and the model's mirrors the model.
//! - No second engine for inference: what samples is what trains.
//! - No tensor library: a tensor is a matrix `[rows, cols]`, ops are functions of whole matrices, nothing broadcasts.
//! - No async runtime: threads and channels.
//! - No plug-ins in process: a verifier of one's own is a program that reads lines, an objective is code here.
//! - No Python: it fetches weights, makes goldens and times peers, in `tools/`, and runs Python that models write.

pub mod adapter;
pub mod backend;
pub mod chat;
pub mod checkpoint;
pub mod cli;
pub mod cost;
pub mod device;
pub mod eval;
pub mod gemma;
pub mod generate;
pub mod layered;
pub mod model_dir;
pub mod objective;
pub mod page;
pub mod plan;
pub mod reward;
pub mod rng;
pub mod rollout;
pub mod segments;
pub mod tasks;
pub mod tokenizer;
pub mod train;
pub mod verifier;
