//! A backend that leaves everything to the CPU but what a test changes.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use bon_engine::backend::cpu::adamw::Codes;
use bon_engine::backend::cpu::experts::Routes;
use bon_engine::backend::cpu::{Cpu, Draws, Tables, Tensor};
use bon_engine::backend::ops::*;
use bon_engine::backend::{
    AdamW, AttentionSpec, Batch, Choice, DType, Decode, ExpertTrace, HeadNorm, HeadSpec, HeadTrace, NormSpec,
    ResidualSpec, RopeSpec, Routing, Sampled, Target, Truncation, Uniform, Update,
};
use bon_engine::device::DeviceError;

/// The backend. Clones count together.
#[derive(Debug, Clone)]
pub(crate) struct Delegating {
    /// What it says there is for generation.
    pub(crate) generation_bytes: usize,
    /// What it says there is for a step of training.
    pub(crate) training_bytes: u64,
    /// Added to the log-probs that training computes: of every third target the first, of the others the second.
    pub(crate) shift: [f32; 2],
    /// Batches of prompts that it has sampled.
    pub(crate) turns: Arc<AtomicUsize>,
    /// Rows of the batches that it has prepared, and of its steps of decoding.
    pub(crate) prepared: Arc<AtomicUsize>,
    pub(crate) decoded: Arc<AtomicUsize>,
    /// Sends tokens to the experts that they went to in the first forward pass.
    pub(crate) held: Option<Arc<Mutex<HeldRoutes>>>,
}

/// The routes of a model's first forward pass. Where they change a model's output jumps, and has no slope.
#[derive(Debug)]
pub(crate) struct HeldRoutes {
    /// Layers of the model, in each of which tokens are sent to experts.
    pub(crate) layers: usize,
    /// By layer.
    experts: Vec<Vec<u32>>,
    /// How often tokens were sent.
    calls: usize,
}

impl HeldRoutes {
    pub(crate) fn new(layers: usize) -> Self {
        Self { layers, experts: vec![], calls: 0 }
    }

    /// Scores of which only those of the first pass's experts can be the largest.
    fn masked(&self, scores: &Tensor, top: usize) -> Option<Tensor> {
        let experts = self.experts.get(self.calls % self.layers)?;
        let rows = scores.as_f32().chunks_exact(scores.cols).zip(experts.chunks_exact(top));
        let kept = |(row, kept): (&[f32], &[u32])| -> Vec<f32> {
            let score =
                |(e, &x): (usize, &f32)| if kept.contains(&(e as u32)) { x } else { f32::NEG_INFINITY };
            row.iter().enumerate().map(score).collect()
        };
        Some(Tensor::f32(scores.rows, scores.cols, rows.flat_map(kept).collect()))
    }
}

impl Delegating {
    /// The CPU as it is.
    pub(crate) fn new() -> Self {
        Self {
            generation_bytes: Cpu::F32.generation_bytes(),
            training_bytes: Cpu::F32.training_bytes(),
            shift: [0.0; 2],
            turns: Arc::default(),
            prepared: Arc::default(),
            decoded: Arc::default(),
            held: None,
        }
    }

    /// The number of batches since the last call.
    pub(crate) fn take_turns(&self) -> usize {
        self.turns.swap(0, Ordering::Relaxed)
    }
}

macro_rules! to_cpu {
    ($(fn $name:ident(&self $(, $arg:ident: $type:ty)* $(,)?) $(-> $out:ty)?;)*) => {
        $(fn $name(&self $(, $arg: $type)*) $(-> $out)? {
            Cpu::F32.$name($($arg),*)
        })*
    };
}

impl Platform for Delegating {
    type Tensor = Tensor;
    type Tables = Tables;
    type Draws = Draws;
    type Routes = Routes;
    type Codes = Codes;

    fn generation_bytes(&self) -> usize {
        self.generation_bytes
    }

    fn training_bytes(&self) -> u64 {
        self.training_bytes
    }

    to_cpu! {
        fn device_name(&self) -> String;
        fn activation_dtype(&self) -> DType;
        fn check(&self) -> Result<(), DeviceError>;
        fn zeros(&self, dtype: DType, rows: usize, cols: usize) -> Tensor;
        fn upload(&self, dtype: DType, rows: usize, cols: usize, bytes: &[u8]) -> Tensor;
        fn download(&self, x: &Tensor) -> Vec<u8>;
        fn to_f32(&self, x: &Tensor) -> Vec<f32>;
        fn zero_codes(&self, n: usize) -> Codes;
        fn upload_codes(&self, codes: &[u8]) -> Codes;
        fn download_codes(&self, codes: &Codes) -> Vec<u8>;
        fn shape(&self, x: &Tensor) -> (usize, usize);
        fn dtype(&self, x: &Tensor) -> DType;
        fn reshaped(&self, x: Tensor, rows: usize, cols: usize) -> Tensor;
    }
}

impl Batches for Delegating {
    fn tables(&self, batch: &Batch, attention: &[AttentionSpec]) -> Tables {
        self.prepared.fetch_add(batch.rows, Ordering::Relaxed);
        Cpu::F32.tables(batch, attention)
    }

    fn decode_tables(&self, step: &Decode<Draws>, attention: &[AttentionSpec]) -> Tables {
        self.decoded.fetch_add(step.from.len(), Ordering::Relaxed);
        Cpu::F32.decode_tables(step, attention)
    }
}

impl Embed for Delegating {
    to_cpu! {
        fn embed_forward(&self, embedding: &Tensor, tables: &Tables, scale: f32) -> Tensor;
        fn embed_backward(&self, dx: &Tensor, tables: &Tables, scale: f32, d_embedding: &mut Tensor);
    }
}

impl RmsNorm for Delegating {
    to_cpu! {
        fn rms_norm_forward(&self, x: &Tensor, w: &Tensor, norm: NormSpec) -> Tensor;
        fn add_norm_forward(
            &self, x: &Tensor, branch: &Tensor, post: Option<&Tensor>, pre: &Tensor, spec: ResidualSpec,
        ) -> (Tensor, Tensor);
        fn add_norm_backward(
            &self, d_sum: Option<&Tensor>, d_normed: &Tensor, sum: &Tensor, pre: (&Tensor, &mut Tensor),
            post: Option<(&Tensor, &Tensor, &mut Tensor)>, spec: ResidualSpec,
        ) -> (Tensor, Option<Tensor>);
        fn add_forward(&self, x: &Tensor, branch: &Tensor, post: &Tensor, spec: ResidualSpec) -> Tensor;
        fn add_backward(
            &self, d_sum: &Tensor, more: Option<&Tensor>, post: (&Tensor, &Tensor, &mut Tensor), spec: ResidualSpec,
        ) -> (Tensor, Tensor);
    }
}

impl Matmul for Delegating {
    fn matmul_forward<const N: usize>(&self, x: &Tensor, w: [&Tensor; N]) -> [Tensor; N] {
        Cpu::F32.matmul_forward(x, w)
    }

    fn matmul_low_rank_forward<const N: usize>(
        &self,
        x: &Tensor,
        w: [&Tensor; N],
        low_rank: [Option<(&Tensor, &Tensor)>; N],
    ) -> [Tensor; N] {
        Cpu::F32.matmul_low_rank_forward(x, w, low_rank)
    }

    to_cpu! {
        fn matmul_backward_input(&self, pairs: &[(&Tensor, &Tensor)]) -> Tensor;
        fn matmul_backward_weight(&self, dy: &Tensor, x: &Tensor, dw: &mut Tensor);
    }
}

impl Rope for Delegating {
    to_cpu! {
        fn rope_forward(
            &self, x: &Tensor, norm: Option<HeadNorm<&Tensor>>, tables: &Tables, rope: &RopeSpec,
        ) -> Tensor;
        fn rope_append(
            &self, q: &Tensor, k: &Tensor, v: &Tensor, norms: [Option<HeadNorm<&Tensor>>; 3], tables: &Tables,
            rope: &RopeSpec, cached_k: &mut Tensor, cached_v: &mut Tensor,
        ) -> Tensor;
        fn rope_backward(
            &self, dy: &Tensor, x: &Tensor, norm: Option<HeadNorm<(&Tensor, &mut Tensor)>>, tables: &Tables,
            rope: &RopeSpec,
        ) -> Tensor;
    }
}

impl Attention for Delegating {
    to_cpu! {
        fn attention_forward(
            &self, q: &Tensor, k: &Tensor, v: &Tensor, tables: &Tables, spec: &AttentionSpec,
        ) -> (Tensor, Tensor);
    }
}

impl AttentionBackward for Delegating {
    to_cpu! {
        fn attention_backward(
            &self, d_o: &Tensor, q: &Tensor, k: &Tensor, v: &Tensor, o: &Tensor, lse: &Tensor, tables: &Tables,
            spec: &AttentionSpec,
        ) -> (Tensor, Tensor, Tensor);
    }
}

impl Geglu for Delegating {
    to_cpu! {
        fn geglu_forward(
            &self, x: &Tensor, w_gate: &Tensor, w_up: &Tensor, keep: bool,
        ) -> (Tensor, Option<(Tensor, Tensor)>);
        fn geglu_backward(&self, dh: &Tensor, gate: &Tensor, up: &Tensor) -> (Tensor, Tensor);
        fn gelu_product_forward(&self, gate: &Tensor, inputs: &Tensor, first: usize) -> Tensor;
        fn gelu_product_backward(
            &self, dh: &Tensor, gate: &Tensor, inputs: &Tensor, first: usize, d_inputs: &mut Tensor,
        ) -> Tensor;
    }
}

impl Experts for Delegating {
    fn route_forward(&self, scores: &Tensor, factors: &Tensor, routing: &Routing) -> Routes {
        let Some(held) = &self.held else { return Cpu::F32.route_forward(scores, factors, routing) };
        let mut held = held.lock().unwrap();
        let masked = held.masked(scores, routing.top);
        let routes = Cpu::F32.route_forward(masked.as_ref().unwrap_or(scores), factors, routing);
        if masked.is_none() {
            held.experts.push(routes.experts.clone());
        }
        held.calls += 1;
        routes
    }

    to_cpu! {
        fn route_backward(
            &self, d_weights: &Tensor, routes: &Routes, routing: &Routing, factors: (&Tensor, &mut Tensor),
        ) -> Tensor;
        fn experts_forward(
            &self, x: &Tensor, routes: &Routes, gate_up: &Tensor, down: &Tensor, keep: bool,
        ) -> (Tensor, Option<ExpertTrace<Tensor>>);
        fn experts_backward(
            &self, dy: &Tensor, x: &Tensor, routes: &Routes, trace: &ExpertTrace<Tensor>,
            gate_up: (&Tensor, &mut Tensor), down: (&Tensor, &mut Tensor),
        ) -> (Tensor, Tensor);
    }
}

impl Rows for Delegating {
    to_cpu! {
        fn scaled(&self, x: Tensor, factor: f32) -> Tensor;
        fn accumulate(&self, x: &Tensor, sum: &mut Tensor);
        fn narrowed(&self, sum: &Tensor) -> Tensor;
        fn gather_rows(&self, x: &Tensor, rows: &[u32]) -> Tensor;
        fn scatter_rows(&self, dy: &Tensor, rows: &[u32], total: usize) -> Tensor;
    }
}

impl LmHead for Delegating {
    fn draws(&self, rows: usize) -> Draws {
        self.turns.fetch_add(1, Ordering::Relaxed);
        Cpu::F32.draws(rows)
    }

    fn lm_head_logprob_forward(
        &self,
        x: &Tensor,
        embedding: &Tensor,
        head: &HeadSpec,
        targets: &[Target],
        keep: bool,
    ) -> (Vec<f32>, HeadTrace<Tensor>) {
        let (mut logprobs, trace) = Cpu::F32.lm_head_logprob_forward(x, embedding, head, targets, keep);
        for (i, logprob) in logprobs.iter_mut().enumerate() {
            *logprob += self.shift[usize::from(i % 3 != 0)];
        }
        (logprobs, trace)
    }

    to_cpu! {
        fn lm_head_draw(
            &self, x: &Tensor, embedding: &Tensor, head: &HeadSpec, truncation: &Truncation, rows: &[u32],
            choices: &[Choice], draws: &mut Draws,
        );
        fn take_draw(&self, draws: &mut Draws) -> Result<Vec<Sampled>, DeviceError>;
        fn lm_head_logprob_backward(
            &self, x: &Tensor, embedding: &Tensor, head: &HeadSpec, trace: &HeadTrace<Tensor>, targets: &[Target],
            weights: &[f32], d_embedding: &mut Tensor,
        ) -> Tensor;
    }
}

impl Reduce for Delegating {
    to_cpu! {
        fn sum_squares(&self, x: &[&Tensor]) -> Vec<f64>;
    }
}

impl Random for Delegating {
    to_cpu! {
        fn random(&self, uniform: &Uniform, dtype: DType, rows: usize, cols: usize) -> Tensor;
    }
}

impl Optimize for Delegating {
    to_cpu! {
        fn adamw(&self, hyper: &AdamW, updates: &mut [Update<Tensor, Codes>]);
    }
}
