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

use std::borrow::Cow;
use std::collections::VecDeque;
use std::sync::OnceLock;

use half::bf16;
use rayon::prelude::*;

use super::{AttentionSpec, Batch, Batches, Compute, DType, Decode, Platform, Sampled};
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

/// See [`Platform::Draws`].
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

/// Threads that compute.
pub fn threads() -> usize {
    rayon::current_num_threads()
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

impl Platform for Cpu {
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
            Data::Packed(d) => packed::unpacked_bytes(d, x.cols),
        }
    }

    fn bytes<'a>(&self, x: &'a Tensor) -> Cow<'a, [u8]> {
        match (x.mapped(), &x.data) {
            (Some(bytes), _) => bytes.into(),
            (None, Data::F32(d)) => bytemuck::cast_slice(d).into(),
            (None, Data::Bf16(d)) => bytemuck::cast_slice(d).into(),
            (None, Data::Packed(_)) => self.download(x).into(),
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

    fn reshaped(&self, x: Tensor, rows: usize, cols: usize) -> Tensor {
        assert_eq!(x.rows * x.cols, rows * cols, "as many elements");
        assert!(!matches!(x.data, Data::Packed(_)), "weights keep their shape");
        Tensor { rows, cols, ..x }
    }
}

impl Batches for Cpu {
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
}
