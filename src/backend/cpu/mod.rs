//! The native backend: f32 arithmetic, with operands of matrix products rounded to bf16 where [`Compute`] says so;
//! parameters stored as f32 or bf16.

pub mod adamw;
pub mod attention;
pub mod embed;
pub mod experts;
pub mod form;
pub mod geglu;
pub mod lm_head;
pub mod matmul;
pub mod packed;
pub mod random;
pub mod reduce;
pub mod rms_norm;
pub mod rope;
pub mod rows;
pub mod simd;
pub mod sums;
mod tasks;

use std::collections::VecDeque;
use std::sync::OnceLock;

use half::bf16;
use rayon::prelude::*;

use super::{
    AdamW, AttentionSpec, Backend, Batch, Choice, Compute, DType, Decode, ExpertTrace, HeadNorm, HeadSpec,
    HeadTrace, NormSpec, ResidualSpec, RopeSpec, Routing, Sampled, Target, Truncation, Uniform, Update,
};
use crate::checkpoint::Mapped;
use crate::device::DeviceError;
use crate::segments::{QueryRun, Segments};

/// A row-major matrix in memory.
#[derive(Debug, Clone)]
pub struct Tensor {
    /// Number of rows.
    pub rows: usize,
    /// Number of columns.
    pub cols: usize,
    data: Data,
    /// The elements, of the type of `data`, which then has none: a table in a file.
    mapped: Option<Mapped>,
    /// [`Tensor::has_small`], once somebody has asked.
    small: OnceLock<bool>,
}

impl PartialEq for Tensor {
    fn eq(&self, other: &Self) -> bool {
        let bytes = |x: &Self| x.mapped.as_ref().map(|mapped| mapped.bytes().to_vec());
        (self.rows, self.cols, &self.data) == (other.rows, other.cols, &other.data)
            && bytes(self) == bytes(other)
    }
}

/// The elements of a [`Tensor`].
#[derive(Debug, Clone, PartialEq)]
pub enum Data {
    /// Activations, gradients, master weights.
    F32(Vec<f32>),
    /// Parameters.
    Bf16(Vec<bf16>),
    /// Weights of linear maps, as [`packed`] lays them out.
    Packed(Vec<bf16>),
}

impl Tensor {
    /// A matrix of `rows * cols` elements.
    pub fn new(rows: usize, cols: usize, data: Data) -> Self {
        let len = match &data {
            Data::F32(data) => data.len(),
            Data::Bf16(data) | Data::Packed(data) => data.len(),
        };
        assert!(
            packed::fits(rows, cols) || !matches!(data, Data::Packed(_)),
            "[{rows}, {cols}] is not packed"
        );
        assert_eq!(len, rows * cols, "the elements of a [{rows}, {cols}] matrix");
        Self { rows, cols, data, mapped: None, small: OnceLock::new() }
    }

    /// An f32 matrix.
    pub fn f32(rows: usize, cols: usize, data: Vec<f32>) -> Self {
        Self::new(rows, cols, Data::F32(data))
    }

    /// A matrix whose elements stay in a file.
    fn in_file(dtype: DType, rows: usize, cols: usize, mapped: Mapped) -> Self {
        assert_eq!(
            mapped.bytes().len(),
            rows * cols * dtype.bytes(),
            "the bytes of a [{rows}, {cols}] matrix"
        );
        let data = match dtype {
            DType::F32 => Data::F32(Vec::new()),
            DType::Bf16 => Data::Bf16(Vec::new()),
        };
        Self { rows, cols, data, mapped: Some(mapped), small: OnceLock::new() }
    }

    /// The bytes of a matrix whose elements are in a file.
    pub fn mapped(&self) -> Option<&[u8]> {
        self.mapped.as_ref().map(Mapped::bytes)
    }

    /// The elements.
    pub fn data(&self) -> &Data {
        assert!(self.mapped.is_none(), "rows are read of a table in a file, and nothing else");
        &self.data
    }

    /// The elements; their number must stay.
    pub fn data_mut(&mut self) -> &mut Data {
        self.small = OnceLock::new();
        &mut self.data
    }

    /// Whether a bf16 element is below [`form::SMALL`] without being zero: AdamW makes none.
    fn has_small(&self) -> bool {
        const CHUNK: usize = 1 << 16;
        match &self.data {
            Data::F32(_) => false,
            Data::Bf16(x) | Data::Packed(x) => {
                *self.small.get_or_init(|| x.par_chunks(CHUNK).any(form::any_small))
            }
        }
    }

    /// Storage type.
    pub fn dtype(&self) -> DType {
        match self.data {
            Data::F32(_) => DType::F32,
            Data::Bf16(_) | Data::Packed(_) => DType::Bf16,
        }
    }

    /// The elements, where the op's contract says f32.
    pub fn as_f32(&self) -> &[f32] {
        match &self.data {
            Data::F32(d) => d,
            Data::Bf16(_) | Data::Packed(_) => panic!("the op's contract says f32"),
        }
    }

    /// The elements, where the op's contract says f32.
    pub fn as_f32_mut(&mut self) -> &mut [f32] {
        match &mut self.data {
            Data::F32(d) => d,
            Data::Bf16(_) | Data::Packed(_) => panic!("the op's contract says f32"),
        }
    }
}

/// A [`Batch`] with its parts owned.
#[derive(Debug, Clone)]
pub struct Tables {
    ids: Vec<u32>,
    positions: Vec<u32>,
    segments: Segments,
    runs: Vec<QueryRun>,
    kv_rows: Vec<u32>,
}

/// See [`Backend::Draws`].
#[derive(Debug, Clone, Default)]
pub struct Draws {
    latest: Vec<u32>,
    not_taken: VecDeque<Vec<Sampled>>,
}

/// So many zeros. Large ones lie in huge pages where the system grants them: then their first use faults once per 2 MiB,
/// not once per 4 KiB.
pub(crate) fn zeroed<T: bytemuck::Zeroable>(len: usize) -> Vec<T> {
    let x = bytemuck::zeroed_vec(len);
    in_huge_pages(&x);
    x
}

/// Room for so many elements, likewise.
fn room<T>(len: usize) -> Vec<T> {
    let x = Vec::with_capacity(len);
    in_huge_pages(&x);
    x
}

/// Asks for huge pages below all of a vector's room.
fn in_huge_pages<T>(x: &Vec<T>) {
    #[cfg(target_os = "linux")]
    {
        const HUGE: usize = 2 << 20;
        let bytes = x.capacity() * size_of::<T>();
        let first = x.as_ptr().addr().next_multiple_of(HUGE);
        let end = (x.as_ptr().addr() + bytes) / HUGE * HUGE;
        if first < end {
            let at = x.as_ptr().with_addr(first).cast_mut().cast();
            // SAFETY: whole pages of the vector's room; the advice changes nothing that they hold.
            let _ = unsafe { rustix::mm::madvise(at, end - first, rustix::mm::Advice::LinuxHugepage) };
        }
    }
}

/// The elements that `bytes` hold, which may lie at any address. Copied by all threads.
fn collected<T: bytemuck::Pod + Send>(bytes: &[u8]) -> Vec<T> {
    const CHUNK: usize = 1 << 20;
    let mut x: Vec<T> = zeroed(bytes.len() / size_of::<T>());
    let to: &mut [u8] = bytemuck::cast_slice_mut(&mut x);
    to.par_chunks_mut(CHUNK).zip(bytes.par_chunks(CHUNK)).for_each(|(to, from)| to.copy_from_slice(from));
    x
}

/// Makes the calling thread, a program's main one, one of the thread pool's, because an op that is called from outside
/// hands itself over and waits: two switches of threads for each, after which two of the pool may share a core.
/// A pool that is there already stays. The threads of the pool wait awake for a step's next op.
pub fn compute_on_this_thread() {
    let _ = rayon::ThreadPoolBuilder::new().use_current_thread().build_global();
    tasks::stay_awake();
}

/// The CPU as a device; the thread pool is rayon's.
#[derive(Debug, Clone, Copy, Default)]
pub struct Cpu {
    /// What matrix products are computed in.
    pub compute: Compute,
}

impl Cpu {
    /// f32 throughout.
    pub const F32: Self = Self { compute: Compute::F32 };
    /// Products with bf16 weights in bf16.
    pub const BF16: Self = Self { compute: Compute::Bf16 };
}

impl Backend for Cpu {
    type Tensor = Tensor;
    type Tables = Tables;
    type Draws = Draws;
    type Routes = experts::Routes;
    type Codes = adamw::Codes;

    fn device_name(&self) -> String {
        "cpu".into()
    }

    fn activation_dtype(&self) -> DType {
        DType::F32
    }

    fn computing(self, compute: Compute) -> Self {
        Self { compute }
    }

    fn check(&self) -> Result<(), DeviceError> {
        Ok(())
    }

    fn zeros(&self, dtype: DType, rows: usize, cols: usize) -> Tensor {
        let data = match dtype {
            DType::F32 => Data::F32(zeroed(rows * cols)),
            DType::Bf16 => Data::Bf16(zeroed(rows * cols)),
        };
        Tensor::new(rows, cols, data)
    }

    fn random(&self, uniform: &Uniform, dtype: DType, rows: usize, cols: usize) -> Tensor {
        random::random(uniform, dtype, rows, cols)
    }

    fn upload(&self, dtype: DType, rows: usize, cols: usize, bytes: &[u8]) -> Tensor {
        assert_eq!(bytes.len(), rows * cols * dtype.bytes(), "the bytes of a [{rows}, {cols}] matrix");
        let data = match dtype {
            DType::F32 => Data::F32(collected(bytes)),
            DType::Bf16 => Data::Bf16(collected(bytes)),
        };
        Tensor::new(rows, cols, data)
    }

    fn upload_weight(&self, dtype: DType, rows: usize, cols: usize, bytes: &[u8]) -> Tensor {
        if dtype != DType::Bf16 || !packed::fits(rows, cols) {
            return self.upload(dtype, rows, cols, bytes);
        }
        Tensor::new(rows, cols, Data::Packed(packed::pack(bytes, cols)))
    }

    fn upload_to_host(
        &self,
        dtype: DType,
        rows: usize,
        cols: usize,
        bytes: &[u8],
        in_file: Option<Mapped>,
    ) -> Tensor {
        match in_file {
            Some(mapped) => Tensor::in_file(dtype, rows, cols, mapped),
            None => self.upload(dtype, rows, cols, bytes),
        }
    }

    fn download(&self, x: &Tensor) -> Vec<u8> {
        if let Some(bytes) = x.mapped() {
            return bytes.to_vec();
        }
        match &x.data {
            Data::F32(d) => bytemuck::cast_slice(d).to_vec(),
            Data::Bf16(d) => bytemuck::cast_slice(d).to_vec(),
            Data::Packed(d) => bytemuck::cast_slice(&packed::unpacked(d, x.cols)).to_vec(),
        }
    }

    fn to_f32(&self, x: &Tensor) -> Vec<f32> {
        rows::to_f32(x)
    }

    fn zero_codes(&self, n: usize) -> Vec<u8> {
        zeroed(n)
    }

    fn upload_codes(&self, codes: &[u8]) -> Vec<u8> {
        codes.to_vec()
    }

    fn download_codes(&self, codes: &Vec<u8>) -> Vec<u8> {
        codes.clone()
    }

    fn shape(&self, x: &Tensor) -> (usize, usize) {
        (x.rows, x.cols)
    }

    fn dtype(&self, x: &Tensor) -> DType {
        x.dtype()
    }

    fn tables(&self, batch: &Batch, _: &[AttentionSpec]) -> Tables {
        Tables {
            ids: batch.ids.to_vec(),
            positions: batch.positions(),
            segments: batch.segments.clone(),
            runs: batch.runs.to_vec(),
            kv_rows: batch.kv_rows(),
        }
    }

    fn decode_tables(&self, step: &Decode<Draws>, attention: &[AttentionSpec]) -> Tables {
        let ids: Vec<u32> = step.from.iter().map(|&row| step.draws.latest[row as usize]).collect();
        self.tables(&step.with_ids(&ids), attention)
    }

    fn embed_forward(&self, table: &Tensor, tables: &Tables, scale: f32) -> Tensor {
        embed::forward(table, &tables.ids, scale)
    }

    fn embed_backward(&self, dx: &Tensor, tables: &Tables, scale: f32, dtable: &mut Tensor) {
        embed::backward(dx, &tables.ids, scale, dtable);
    }

    fn rms_norm_forward(&self, x: &Tensor, w: &Tensor, norm: NormSpec) -> Tensor {
        rms_norm::forward(x, Some(w), x.cols, norm)
    }

    fn add_norm_forward(
        &self,
        x: &Tensor,
        branch: &Tensor,
        post: Option<&Tensor>,
        pre: &Tensor,
        spec: ResidualSpec,
    ) -> (Tensor, Tensor) {
        let normed_branch = |w| rms_norm::forward(branch, Some(w), branch.cols, spec.norm);
        let mut sum = post.map_or_else(|| branch.clone(), normed_branch);
        rows::add_scaled(&mut sum, x, spec.scale);
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
        let backward =
            |dy: &Tensor, x: &Tensor, w, dw| rms_norm::backward(dy, x, Some((w, dw)), x.cols, spec.norm);
        let mut dx = backward(d_normed, sum, pre, d_pre);
        match d_sum {
            Some(d_sum) => rows::add_scaled(&mut dx, d_sum, spec.scale),
            None => rows::scale(&mut dx, spec.scale),
        }
        let d_branch = post.map(|(branch, w, dw)| backward(&dx, branch, w, dw));
        (dx, d_branch)
    }

    fn add_forward(&self, x: &Tensor, branch: &Tensor, post: &Tensor, spec: ResidualSpec) -> Tensor {
        let mut sum = rms_norm::forward(branch, Some(post), branch.cols, spec.norm);
        rows::add_scaled(&mut sum, x, spec.scale);
        sum
    }

    fn add_backward(
        &self,
        d_sum: &Tensor,
        more: Option<&Tensor>,
        (branch, w, dw): (&Tensor, &Tensor, &mut Tensor),
        spec: ResidualSpec,
    ) -> (Tensor, Tensor) {
        let mut dx = d_sum.clone();
        match more {
            Some(more) => rows::add_scaled(&mut dx, more, spec.scale),
            None => rows::scale(&mut dx, spec.scale),
        }
        let d_branch = rms_norm::backward(&dx, branch, Some((w, dw)), branch.cols, spec.norm);
        (dx, d_branch)
    }

    fn matmul_forward<const N: usize>(&self, x: &Tensor, w: [&Tensor; N]) -> [Tensor; N] {
        matmul::forward(x, w, self.compute)
    }

    fn matmul_low_rank_forward<const N: usize>(
        &self,
        x: &Tensor,
        w: [&Tensor; N],
        low_rank: [Option<(&Tensor, &Tensor)>; N],
    ) -> [Tensor; N] {
        let mut y = matmul::forward(x, w, self.compute);
        for (y, low_rank) in y.iter_mut().zip(low_rank) {
            if let Some((h, b)) = low_rank {
                let [more] = matmul::forward(h, [b], self.compute);
                rows::add_scaled(y, &more, 1.0);
            }
        }
        y
    }

    fn matmul_backward_input(&self, pairs: &[(&Tensor, &Tensor)]) -> Tensor {
        let (dy, w) = pairs[0];
        let mut dx = self.zeros(DType::F32, dy.rows, w.cols);
        for (dy, w) in pairs {
            matmul::backward_input(dy, w, &mut dx, self.compute);
        }
        dx
    }

    fn matmul_backward_weight(&self, dy: &Tensor, x: &Tensor, dw: &mut Tensor) {
        matmul::backward_weight(dy, x, dw, self.compute);
    }

    fn rope_forward(
        &self,
        x: &Tensor,
        norm: Option<HeadNorm<&Tensor>>,
        tables: &Tables,
        rope: &RopeSpec,
    ) -> Tensor {
        let of_head = |norm: HeadNorm<&Tensor>| rms_norm::forward(x, norm.weight, rope.head_dim, norm.spec);
        let mut y = norm.map_or_else(|| x.clone(), of_head);
        rope::rotate(&mut y, &tables.positions, rope, rope::Direction::Forward);
        y
    }

    fn rope_append(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        [q_norm, k_norm, v_norm]: [Option<HeadNorm<&Tensor>>; 3],
        tables: &Tables,
        rope: &RopeSpec,
        cached_k: &mut Tensor,
        cached_v: &mut Tensor,
    ) -> Tensor {
        rows::write(&self.rope_forward(k, k_norm, tables, rope), &tables.kv_rows, cached_k);
        match v_norm {
            Some(norm) => {
                let v = rms_norm::forward(v, norm.weight, rope.head_dim, norm.spec);
                rows::write(&v, &tables.kv_rows, cached_v);
            }
            None => rows::write(v, &tables.kv_rows, cached_v),
        }
        self.rope_forward(q, q_norm, tables, rope)
    }

    fn rope_backward(
        &self,
        dy: &Tensor,
        x: &Tensor,
        norm: Option<HeadNorm<(&Tensor, &mut Tensor)>>,
        tables: &Tables,
        rope: &RopeSpec,
    ) -> Tensor {
        let mut dx = dy.clone();
        rope::rotate(&mut dx, &tables.positions, rope, rope::Direction::Backward);
        match norm {
            Some(HeadNorm { weight, spec }) => rms_norm::backward(&dx, x, weight, rope.head_dim, spec),
            None => dx,
        }
    }

    fn attention_forward(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        tables: &Tables,
        spec: &AttentionSpec,
    ) -> (Tensor, Tensor) {
        attention::forward(q, k, v, &tables.segments, &tables.runs, spec)
    }

    fn attention_backward(
        &self,
        d_o: &Tensor,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        o: &Tensor,
        lse: &Tensor,
        tables: &Tables,
        spec: &AttentionSpec,
    ) -> (Tensor, Tensor, Tensor) {
        attention::backward(d_o, q, k, v, o, lse, &tables.segments, &tables.runs, spec)
    }

    fn geglu_forward(
        &self,
        x: &Tensor,
        w_gate: &Tensor,
        w_up: &Tensor,
        keep: bool,
    ) -> (Tensor, Option<(Tensor, Tensor)>) {
        let [gate, up] = matmul::forward(x, [w_gate, w_up], self.compute);
        let h = geglu::forward(&gate, &up);
        (h, keep.then_some((gate, up)))
    }

    fn geglu_backward(&self, dh: &Tensor, gate: &Tensor, up: &Tensor) -> (Tensor, Tensor) {
        geglu::backward(dh, gate, up)
    }

    fn widened(&self, x: &Tensor) -> Tensor {
        rows::widened(x)
    }

    fn gelu_product_forward(&self, gate: &Tensor, inputs: &Tensor, first: usize) -> Tensor {
        geglu::product_forward(gate, inputs, first)
    }

    fn gelu_product_backward(
        &self,
        dh: &Tensor,
        gate: &Tensor,
        inputs: &Tensor,
        first: usize,
        d_inputs: &mut Tensor,
    ) -> Tensor {
        geglu::product_backward(dh, gate, inputs, first, d_inputs)
    }

    fn route_forward(&self, scores: &Tensor, factors: &Tensor, routing: &Routing) -> experts::Routes {
        experts::route(scores, factors, routing)
    }

    fn route_backward(
        &self,
        d_weights: &Tensor,
        routes: &experts::Routes,
        routing: &Routing,
        (factors, d_factors): (&Tensor, &mut Tensor),
    ) -> Tensor {
        experts::route_backward(d_weights, routes, routing, factors, d_factors)
    }

    fn experts_forward(
        &self,
        x: &Tensor,
        routes: &experts::Routes,
        gate_up: &Tensor,
        down: &Tensor,
        keep: bool,
    ) -> (Tensor, Option<ExpertTrace<Tensor>>) {
        experts::forward(x, routes, gate_up, down, keep, self.compute)
    }

    fn experts_backward(
        &self,
        dy: &Tensor,
        x: &Tensor,
        routes: &experts::Routes,
        trace: &ExpertTrace<Tensor>,
        gate_up: (&Tensor, &mut Tensor),
        down: (&Tensor, &mut Tensor),
    ) -> (Tensor, Tensor) {
        experts::backward(dy, x, routes, trace, gate_up, down, self.compute)
    }

    fn reshaped(&self, x: Tensor, rows: usize, cols: usize) -> Tensor {
        assert_eq!(x.rows * x.cols, rows * cols, "as many elements");
        assert!(!matches!(x.data, Data::Packed(_)), "weights keep their shape");
        Tensor { rows, cols, ..x }
    }

    fn scaled(&self, mut x: Tensor, factor: f32) -> Tensor {
        if factor != 1.0 {
            rows::scale(&mut x, factor);
        }
        x
    }

    fn accumulate(&self, x: &Tensor, sum: &mut Tensor) {
        rows::add_scaled(sum, x, 1.0);
    }

    fn narrowed(&self, sum: &Tensor) -> Tensor {
        sum.clone()
    }

    fn gather_rows(&self, x: &Tensor, indices: &[u32]) -> Tensor {
        rows::gather(x, indices)
    }

    fn scatter_rows(&self, dy: &Tensor, indices: &[u32], total: usize) -> Tensor {
        let mut dx = self.zeros(DType::F32, total, dy.cols);
        rows::write(dy, indices, &mut dx);
        dx
    }

    fn draws(&self, _: usize) -> Draws {
        Draws::default()
    }

    fn lm_head_draw(
        &self,
        x: &Tensor,
        table: &Tensor,
        head: &HeadSpec,
        truncation: &Truncation,
        choices: &[Choice],
        draws: &mut Draws,
    ) {
        let drawn = lm_head::sample(x, table, head, truncation, choices, self.compute);
        let any = |token: u32| if (token as usize) < table.rows { token } else { 0 };
        draws.latest = drawn.iter().map(|s| any(s.token)).collect();
        draws.not_taken.push_back(drawn);
    }

    fn take_draw(&self, draws: &mut Draws) -> Result<Vec<Sampled>, DeviceError> {
        Ok(draws.not_taken.pop_front().expect("a draw that was not taken"))
    }

    fn lm_head_logprob_forward(
        &self,
        x: &Tensor,
        table: &Tensor,
        head: &HeadSpec,
        targets: &[Target],
        keep: bool,
    ) -> (Vec<f32>, HeadTrace<Tensor>) {
        lm_head::logprob_forward(x, table, head, targets, keep, self.compute)
    }

    fn lm_head_logprob_backward(
        &self,
        x: &Tensor,
        table: &Tensor,
        head: &HeadSpec,
        trace: &HeadTrace<Tensor>,
        targets: &[Target],
        weights: &[f32],
        dtable: &mut Tensor,
    ) -> Tensor {
        lm_head::logprob_backward(x, table, head, trace, targets, weights, dtable, self.compute)
    }

    fn sum_squares(&self, x: &[&Tensor]) -> Vec<f64> {
        x.iter().map(|x| reduce::sum_squares(x)).collect()
    }

    fn adamw(&self, hyper: &AdamW, updates: &mut [Update<Tensor, Vec<u8>>]) {
        adamw::step(hyper, updates);
    }
}
