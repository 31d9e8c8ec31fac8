//! The naive bf16 implementation that kernels are measured against: what a framework does that runs every op on its
//! own. Sums are f32 and exact enough; every tensor that an op stores is rounded to bf16.

mod attention;
mod attention_backward;
mod experts;
mod lm_head;

use bon_engine::backend::cpu::adamw::Codes;
use bon_engine::backend::cpu::experts::Routes;
use bon_engine::backend::cpu::{Cpu, Data, Draws, Tables, Tensor, rms_norm};
use bon_engine::backend::ops::*;
use bon_engine::backend::{
    AdamW, AttentionSpec, Batch, Choice, DType, Decode, ExpertTrace, HeadNorm, HeadSpec, HeadTrace, NormSpec,
    ResidualSpec, RopeSpec, Routing, Sampled, Target, Truncation, Uniform, Update,
};
use bon_engine::device::DeviceError;
use half::bf16;

/// The backend. Its tensors are f32 whose values are bf16.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Rounded;

/// To the nearest bf16.
fn round(mut x: Tensor) -> Tensor {
    if let Data::F32(data) = x.data_mut() {
        for x in data {
            *x = bf16::from_f32(*x).to_f32();
        }
    }
    x
}

fn zip(x: &Tensor, y: &Tensor, f: impl Fn(f32, f32) -> f32) -> Tensor {
    assert_eq!((x.rows, x.cols), (y.rows, y.cols));
    let data = x.as_f32().iter().zip(y.as_f32()).map(|(x, y)| f(*x, *y)).collect();
    round(Tensor::f32(x.rows, x.cols, data))
}

fn add(x: &Tensor, y: &Tensor) -> Tensor {
    zip(x, y, |x, y| x + y)
}

fn scale(x: &Tensor, factor: f32) -> Tensor {
    round(Tensor::f32(x.rows, x.cols, x.as_f32().iter().map(|x| x * factor).collect()))
}

/// Columns `first..first + n`.
fn columns(x: &Tensor, first: usize, n: usize) -> Tensor {
    let rows = x.as_f32().chunks_exact(x.cols);
    Tensor::f32(x.rows, n, rows.flat_map(|row| row[first..first + n].to_vec()).collect())
}

/// The norm of heads of `n` columns.
fn head_norm(x: &Tensor, norm: HeadNorm<&Tensor>, n: usize) -> Tensor {
    rms_norm::forward(x, norm.weight, n, norm.spec)
}

/// The gradient of a norm over `n` columns, by its input and its weight.
fn norm_backward(
    dy: &Tensor,
    x: &Tensor,
    weight: Option<(&Tensor, &mut Tensor)>,
    n: usize,
    norm: NormSpec,
) -> Tensor {
    let Some((w, dw)) = weight else { return round(rms_norm::backward(dy, x, None, n, norm)) };
    let mut dx = None;
    add_rounded(dw, |dw| dx = Some(round(rms_norm::backward(dy, x, Some((w, dw)), n, norm))));
    dx.expect("it was computed")
}

/// A gradient of a parameter as such a framework makes it: rounded, then added to the f32 sum, or to a bf16 one and rounded again.
fn add_rounded(dw: &mut Tensor, compute: impl FnOnce(&mut Tensor)) {
    let mut new = Tensor::f32(dw.rows, dw.cols, vec![0.0; dw.rows * dw.cols]);
    compute(&mut new);
    let new = round(new);
    match dw.data_mut() {
        Data::F32(dw) => dw.iter_mut().zip(new.as_f32()).for_each(|(dw, new)| *dw += new),
        Data::Bf16(dw) => {
            dw.iter_mut().zip(new.as_f32()).for_each(|(dw, new)| *dw = bf16::from_f32(dw.to_f32() + new));
        }
        Data::Packed(_) => unreachable!("gradients are not packed"),
    }
}

impl Platform for Rounded {
    type Tensor = Tensor;
    type Tables = (Tables, Owned);
    type Draws = Draws;
    type Routes = Routes;
    type Codes = Codes;

    fn device_name(&self) -> String {
        "rounded".into()
    }

    fn activation_dtype(&self) -> DType {
        DType::F32
    }

    fn check(&self) -> Result<(), DeviceError> {
        Ok(())
    }

    fn zeros(&self, dtype: DType, rows: usize, cols: usize) -> Tensor {
        Cpu::F32.zeros(dtype, rows, cols)
    }

    fn upload(&self, dtype: DType, rows: usize, cols: usize, bytes: &[u8]) -> Tensor {
        Cpu::F32.upload(dtype, rows, cols, bytes)
    }

    fn download(&self, x: &Tensor) -> Vec<u8> {
        Cpu::F32.download(x)
    }

    fn to_f32(&self, x: &Tensor) -> Vec<f32> {
        Cpu::F32.to_f32(x)
    }

    fn zero_codes(&self, n: usize) -> Codes {
        Cpu::F32.zero_codes(n)
    }

    fn upload_codes(&self, codes: &[u8]) -> Codes {
        Cpu::F32.upload_codes(codes)
    }

    fn download_codes(&self, codes: &Codes) -> Vec<u8> {
        Cpu::F32.download_codes(codes)
    }

    fn shape(&self, x: &Tensor) -> (usize, usize) {
        Cpu::F32.shape(x)
    }

    fn dtype(&self, x: &Tensor) -> DType {
        Cpu::F32.dtype(x)
    }

    fn reshaped(&self, x: Tensor, rows: usize, cols: usize) -> Tensor {
        Cpu::F32.reshaped(x, rows, cols)
    }
}

impl Batches for Rounded {
    fn tables(&self, batch: &Batch, attention: &[AttentionSpec]) -> Self::Tables {
        (Cpu::F32.tables(batch, attention), Owned::new(batch))
    }

    fn decode_tables(&self, step: &Decode<Draws>, attention: &[AttentionSpec]) -> Self::Tables {
        (Cpu::F32.decode_tables(step, attention), Owned::new(&step.with_ids(&[])))
    }
}

impl Embed for Rounded {
    fn embed_forward(&self, embedding: &Tensor, tables: &Self::Tables, scale: f32) -> Tensor {
        round(Cpu::F32.embed_forward(embedding, &tables.0, scale))
    }

    fn embed_backward(&self, dx: &Tensor, tables: &Self::Tables, scale: f32, d_embedding: &mut Tensor) {
        add_rounded(d_embedding, |d| Cpu::F32.embed_backward(dx, &tables.0, scale, d));
    }
}

impl RmsNorm for Rounded {
    fn rms_norm_forward(&self, x: &Tensor, w: &Tensor, norm: NormSpec) -> Tensor {
        round(Cpu::F32.rms_norm_forward(x, w, norm))
    }

    fn add_norm_forward(
        &self,
        x: &Tensor,
        branch: &Tensor,
        post: Option<&Tensor>,
        pre: &Tensor,
        spec: ResidualSpec,
    ) -> (Tensor, Tensor) {
        let branch = post.map_or_else(|| branch.clone(), |w| self.rms_norm_forward(branch, w, spec.norm));
        let sum = scale(&add(x, &branch), spec.scale);
        let normed = self.rms_norm_forward(&sum, pre, spec.norm);
        (sum, normed)
    }

    fn add_norm_backward(
        &self,
        d_sum: Option<&Tensor>,
        d_normed: &Tensor,
        sum: &Tensor,
        (pre, d_pre): (&Tensor, &mut Tensor),
        post: Option<(&Tensor, &Tensor, &mut Tensor)>,
        spec: ResidualSpec,
    ) -> (Tensor, Option<Tensor>) {
        let norm_backward = |dy: &Tensor, x: &Tensor, w: &Tensor, dw: &mut Tensor| {
            norm_backward(dy, x, Some((w, dw)), x.cols, spec.norm)
        };
        let mut dx = norm_backward(d_normed, sum, pre, d_pre);
        if let Some(d_sum) = d_sum {
            dx = add(&dx, d_sum);
        }
        let dx = scale(&dx, spec.scale);
        let d_branch = post.map(|(branch, w, dw)| norm_backward(&dx, branch, w, dw));
        (dx, d_branch)
    }

    fn add_forward(&self, x: &Tensor, branch: &Tensor, post: &Tensor, spec: ResidualSpec) -> Tensor {
        scale(&add(x, &self.rms_norm_forward(branch, post, spec.norm)), spec.scale)
    }

    fn add_backward(
        &self,
        d_sum: &Tensor,
        more: Option<&Tensor>,
        (branch, w, dw): (&Tensor, &Tensor, &mut Tensor),
        spec: ResidualSpec,
    ) -> (Tensor, Tensor) {
        let dx = scale(&more.map_or_else(|| d_sum.clone(), |more| add(d_sum, more)), spec.scale);
        let d_branch = norm_backward(&dx, branch, Some((w, dw)), branch.cols, spec.norm);
        (dx, d_branch)
    }
}

impl Matmul for Rounded {
    fn matmul_forward<const N: usize>(&self, x: &Tensor, w: [&Tensor; N]) -> [Tensor; N] {
        Cpu::F32.matmul_forward(x, w).map(round)
    }

    fn matmul_low_rank_forward<const N: usize>(
        &self,
        x: &Tensor,
        w: [&Tensor; N],
        low_rank: [Option<(&Tensor, &Tensor)>; N],
    ) -> [Tensor; N] {
        let mut y = self.matmul_forward(x, w);
        for (y, low_rank) in y.iter_mut().zip(low_rank) {
            if let Some((h, b)) = low_rank {
                let [more] = self.matmul_forward(h, [b]);
                *y = add(y, &more);
            }
        }
        y
    }

    fn matmul_backward_input(&self, pairs: &[(&Tensor, &Tensor)]) -> Tensor {
        let parts = pairs.iter().map(|pair| round(Cpu::F32.matmul_backward_input(&[*pair])));
        parts.reduce(|sum, part| add(&sum, &part)).expect("at least one pair")
    }

    fn matmul_backward_weight(&self, dy: &Tensor, x: &Tensor, dw: &mut Tensor) {
        add_rounded(dw, |dw| Cpu::F32.matmul_backward_weight(dy, x, dw));
    }
}

impl Rope for Rounded {
    fn rope_forward(
        &self,
        x: &Tensor,
        norm: Option<HeadNorm<&Tensor>>,
        tables: &Self::Tables,
        rope: &RopeSpec,
    ) -> Tensor {
        let normed = |norm| round(head_norm(x, norm, rope.head_dim));
        let x = norm.map_or_else(|| x.clone(), normed);
        round(Cpu::F32.rope_forward(&x, None, &tables.0, rope))
    }

    fn rope_append(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        [q_norm, k_norm, v_norm]: [Option<HeadNorm<&Tensor>>; 3],
        tables: &Self::Tables,
        rope: &RopeSpec,
        cached_k: &mut Tensor,
        cached_v: &mut Tensor,
    ) -> Tensor {
        let k = self.rope_forward(k, k_norm, tables, rope);
        bon_engine::backend::cpu::rows::write(&k, &tables.1.kv_rows, cached_k);
        let v = v_norm.map_or_else(|| v.clone(), |norm| round(head_norm(v, norm, rope.head_dim)));
        bon_engine::backend::cpu::rows::write(&v, &tables.1.kv_rows, cached_v);
        self.rope_forward(q, q_norm, tables, rope)
    }

    fn rope_backward(
        &self,
        dy: &Tensor,
        x: &Tensor,
        norm: Option<HeadNorm<(&Tensor, &mut Tensor)>>,
        tables: &Self::Tables,
        rope: &RopeSpec,
    ) -> Tensor {
        let dx = round(Cpu::F32.rope_backward(dy, x, None, &tables.0, rope));
        match norm {
            None => dx,
            Some(HeadNorm { weight, spec }) => norm_backward(&dx, x, weight, rope.head_dim, spec),
        }
    }
}

impl Attention for Rounded {
    fn attention_forward(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        tables: &Self::Tables,
        spec: &AttentionSpec,
    ) -> (Tensor, Tensor) {
        attention::forward(q, k, v, tables, spec)
    }
}

impl AttentionBackward for Rounded {
    fn attention_backward(
        &self,
        d_o: &Tensor,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        _: &Tensor,
        _: &Tensor,
        tables: &Self::Tables,
        spec: &AttentionSpec,
    ) -> (Tensor, Tensor, Tensor) {
        attention_backward::backward(d_o, q, k, v, tables, spec)
    }
}

impl Geglu for Rounded {
    fn geglu_forward(
        &self,
        x: &Tensor,
        w_gate: &Tensor,
        w_up: &Tensor,
        keep: bool,
    ) -> (Tensor, Option<(Tensor, Tensor)>) {
        let [gate, up] = self.matmul_forward(x, [w_gate, w_up]);
        let one = Tensor::f32(up.rows, up.cols, vec![1.0; up.rows * up.cols]);
        let activated = round(bon_engine::backend::cpu::geglu::forward(&gate, &one));
        let h = zip(&activated, &up, |a, u| a * u);
        (h, keep.then_some((gate, up)))
    }

    fn geglu_backward(&self, dh: &Tensor, gate: &Tensor, up: &Tensor) -> (Tensor, Tensor) {
        // dup = dh gelu(gate) and dgate = (dh up) gelu'(gate), each product stored.
        let one = Tensor::f32(up.rows, up.cols, vec![1.0; up.rows * up.cols]);
        let activated = round(bon_engine::backend::cpu::geglu::forward(gate, &one));
        let d_activated = zip(dh, up, |d, u| d * u);
        let d_gate = round(bon_engine::backend::cpu::geglu::backward(&d_activated, gate, &one).0);
        (d_gate, zip(dh, &activated, |d, a| d * a))
    }

    fn gelu_product_forward(&self, gate: &Tensor, inputs: &Tensor, first: usize) -> Tensor {
        let one = Tensor::f32(gate.rows, gate.cols, vec![1.0; gate.rows * gate.cols]);
        let activated = round(bon_engine::backend::cpu::geglu::forward(gate, &one));
        zip(&activated, &columns(inputs, first, gate.cols), |a, u| a * u)
    }

    fn gelu_product_backward(
        &self,
        dh: &Tensor,
        gate: &Tensor,
        inputs: &Tensor,
        first: usize,
        d_inputs: &mut Tensor,
    ) -> Tensor {
        let (d_gate, d_up) = self.geglu_backward(dh, gate, &columns(inputs, first, gate.cols));
        let width = d_inputs.cols;
        let rows = d_inputs.as_f32_mut().chunks_exact_mut(width);
        for (row, d_up) in rows.zip(d_up.as_f32().chunks_exact(gate.cols)) {
            row[first..first + gate.cols].copy_from_slice(d_up);
        }
        d_gate
    }
}

impl Experts for Rounded {
    fn route_forward(&self, scores: &Tensor, factors: &Tensor, routing: &Routing) -> Routes {
        // Routes are f32 in such a framework too.
        Cpu::F32.route_forward(scores, factors, routing)
    }

    fn route_backward(
        &self,
        d_weights: &Tensor,
        routes: &Routes,
        routing: &Routing,
        (factors, d_factors): (&Tensor, &mut Tensor),
    ) -> Tensor {
        let mut d_scores = None;
        add_rounded(d_factors, |d_factors| {
            d_scores = Some(round(Cpu::F32.route_backward(d_weights, routes, routing, (factors, d_factors))));
        });
        d_scores.expect("it was computed")
    }

    fn experts_forward(
        &self,
        x: &Tensor,
        routes: &Routes,
        gate_up: &Tensor,
        down: &Tensor,
        _keep: bool,
    ) -> (Tensor, Option<ExpertTrace<Tensor>>) {
        let (y, trace) = experts::forward(x, routes, gate_up, down);
        (y, Some(trace))
    }

    fn experts_backward(
        &self,
        dy: &Tensor,
        x: &Tensor,
        routes: &Routes,
        trace: &ExpertTrace<Tensor>,
        gate_up: (&Tensor, &mut Tensor),
        down: (&Tensor, &mut Tensor),
    ) -> (Tensor, Tensor) {
        experts::backward(dy, x, routes, trace, gate_up, down)
    }
}

impl Rows for Rounded {
    fn scaled(&self, x: Tensor, factor: f32) -> Tensor {
        scale(&x, factor)
    }

    fn accumulate(&self, x: &Tensor, sum: &mut Tensor) {
        Cpu::F32.accumulate(x, sum);
    }

    fn narrowed(&self, sum: &Tensor) -> Tensor {
        round(sum.clone())
    }

    fn gather_rows(&self, x: &Tensor, rows: &[u32]) -> Tensor {
        Cpu::F32.gather_rows(x, rows)
    }

    fn scatter_rows(&self, dy: &Tensor, rows: &[u32], total: usize) -> Tensor {
        Cpu::F32.scatter_rows(dy, rows, total)
    }
}

impl LmHead for Rounded {
    fn draws(&self, rows: usize) -> Draws {
        Cpu::F32.draws(rows)
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
        // What it draws is not asked of it.
        Cpu::F32.lm_head_draw(x, embedding, head, truncation, rows, choices, draws);
    }

    fn take_draw(&self, draws: &mut Draws) -> Result<Vec<Sampled>, DeviceError> {
        Cpu::F32.take_draw(draws)
    }

    fn lm_head_logprob_forward(
        &self,
        x: &Tensor,
        embedding: &Tensor,
        head: &HeadSpec,
        targets: &[Target],
        _keep: bool,
    ) -> (Vec<f32>, HeadTrace<Tensor>) {
        let (logprobs, lse) = lm_head::logprob_forward(x, embedding, head, targets);
        (logprobs, HeadTrace { lse, logits: None })
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
        lm_head::logprob_backward(x, embedding, head, &trace.lse, targets, weights, d_embedding)
    }
}

impl Reduce for Rounded {
    fn sum_squares(&self, x: &[&Tensor]) -> Vec<f64> {
        Cpu::F32.sum_squares(x)
    }
}

impl Random for Rounded {
    fn random(&self, uniform: &Uniform, dtype: DType, rows: usize, cols: usize) -> Tensor {
        Cpu::F32.random(uniform, dtype, rows, cols)
    }
}

impl Optimize for Rounded {
    fn adamw(&self, hyper: &AdamW, updates: &mut [Update<Tensor, Codes>]) {
        Cpu::F32.adamw(hyper, updates);
    }
}

/// A batch's parts, for what is computed here.
pub(crate) struct Owned {
    pub(crate) segments: bon_engine::segments::Segments,
    pub(crate) runs: Vec<bon_engine::segments::QueryRun>,
    kv_rows: Vec<u32>,
}

impl Owned {
    fn new(batch: &Batch) -> Self {
        Self { segments: batch.segments.clone(), runs: batch.runs.to_vec(), kv_rows: batch.kv_rows() }
    }
}
