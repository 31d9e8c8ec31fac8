//! The CUDA backend: launchers of the kernels in `kernels/`, one file per op, over any [`Device`]: a GPU or the virtual
//! one. Only this directory knows launch geometry.
//!
//! Activations and parameters are bf16, sums and statistics f32. Tensors are contiguous and aligned to 256 bytes.
//! Shapes that a kernel cannot take are refused before a model is loaded ([`Platform::supports`]), so launchers assert.

pub mod adamw;
pub mod attention;
pub mod attention_backward;
mod chains;
pub mod embed;
pub mod entries;
pub mod experts;
pub mod geglu;
pub mod lm_head;
pub mod matmul;
pub mod offload;
pub mod random;
pub mod reduce;
pub mod rms_norm;
pub mod rope;
pub mod rows;
mod sections;
pub mod tables;

use std::collections::VecDeque;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use half::bf16;

use super::{DType, ModelShape, Pace, Platform, Unsupported};
use crate::checkpoint::Mapped;
use crate::device::{Arg, Device, DeviceError, HostPtr, Kernel, Launch, Ptr, Reading, host};
use entries::shared::mma::VECTOR;
use entries::{Entry, MODULES, Module, NO_KERNELS};
pub use tables::Tables;

/// Head widths that the attention kernels are made for.
const HEAD_DIMS: [usize; 4] = [64, 128, 256, 512];
/// [`Platform::generation_bytes`] on a device whose memory is the host's.
const HOST_GENERATION_BYTES: usize = 1 << 30;
/// The rows of the smallest tiles; see [`decode_rows`].
const DECODE_TILE: usize = 32;
/// The most query heads that share a key/value head.
const MAX_GROUP: usize = 64;

/// The fastest pace of decode loops on a GPU: the host reads tokens one step later, while the next step runs.
pub const PACE: Pace = Pace { lag: 1, rows: decode_rows };

/// Rows of a decode step with `streams` streams: whole tiles of every product, or a power of two if they are less than a tile.
fn decode_rows(streams: usize) -> usize {
    if streams < DECODE_TILE { streams.next_power_of_two() } else { streams.next_multiple_of(DECODE_TILE) }
}

/// A count as kernels take it. Data that fits a GPU's memory has far fewer rows, items and tiles than 2^32.
fn narrow(x: usize) -> u32 {
    u32::try_from(x).expect("counts of a batch fit 32 bits")
}

/// A device with the kernels loaded. Clones share it.
#[derive(Clone)]
pub struct Cuda(Arc<Inner>);

struct Inner {
    device: Box<dyn Device>,
    /// By [`Entry`].
    kernels: Vec<Kernel>,
    /// Computed once for each rotary embedding: see [`rope`].
    frequencies: rope::FrequencyCache,
    /// Bytes of each of the two buffers of [`offload`].
    buffer: AtomicUsize,
    /// The first error.
    failed: Mutex<Option<DeviceError>>,
}

/// Memory of the device, or page-locked memory of the host; given back when dropped.
pub(crate) struct Memory {
    inner: Arc<Inner>,
    /// Where kernels find it; 0 where they do not.
    ptr: Ptr,
    /// Where it lies in the host's memory, if it does.
    host: Option<HostPtr>,
}

impl Drop for Memory {
    fn drop(&mut self) {
        match self.host {
            Some(host) => self.inner.device.host_free(host),
            None if self.ptr.0 != 0 => self.inner.device.free(self.ptr),
            None => {}
        }
    }
}

impl Memory {
    /// Its address as a kernel's argument.
    pub(super) fn arg(&self) -> Arg {
        Arg::Ptr(self.ptr())
    }

    /// Its address.
    pub(super) fn ptr(&self) -> Ptr {
        assert!(self.host.is_none() || self.ptr.0 != 0, "kernels do not find what is streamed");
        self.ptr
    }
}

/// A row-major matrix on the device.
pub struct Tensor {
    memory: Memory,
    rows: usize,
    cols: usize,
    dtype: DType,
}

impl Tensor {
    /// Its address as a kernel's argument.
    fn arg(&self) -> Arg {
        self.memory.arg()
    }

    fn bytes(&self) -> usize {
        self.rows * self.cols * self.dtype.bytes()
    }
}

/// See [`Platform::Draws`].
pub struct Draws {
    /// The latest (token, bits of its log-prob) of each row. Each draw overwrites it, so that steps repeat to the address. Shared
    /// with the tables of the step that embeds the tokens.
    latest: Arc<Memory>,
    room: usize,
    /// Draws that are being read to the host, the oldest first; `None` if the device failed.
    not_taken: VecDeque<Option<Reading>>,
}

/// The names of a module's entry points.
fn names(module: &Module) -> Vec<&'static str> {
    module.entries.iter().map(|e| e.name()).collect()
}

impl Cuda {
    /// Loads all kernels. Fails where the program was built without them.
    pub fn new(device: Box<dyn Device>) -> Result<Self, DeviceError> {
        Self::loading(device, || {})
    }

    /// [`Cuda::new`] that calls `compiling` when there is no machine code for the device and it must compile kernels.
    pub fn loading(device: Box<dyn Device>, compiling: impl FnOnce()) -> Result<Self, DeviceError> {
        let mut loaded = Vec::new();
        for module in MODULES {
            loaded.push(device.load_cubin(
                &format!("{}.cubin", module.name),
                module.cubins,
                &names(module),
            )?);
        }
        if loaded.contains(&None) {
            compiling();
        }
        let load = |module: &Module| match module.ptx {
            Some(ptx) => device.load(&format!("{}.ptx", module.name), ptx, &names(module)),
            None => Err(DeviceError::new(device.name(), format!("{NO_KERNELS}, or use --device cpu"))),
        };
        // A thread for each module, because the driver compiles on the calling thread.
        let kernels: Result<Vec<Vec<Kernel>>, DeviceError> = std::thread::scope(|scope| {
            let load = &load;
            let asked: Vec<_> = MODULES
                .iter()
                .zip(loaded)
                .map(|(module, known)| known.ok_or_else(|| scope.spawn(move || load(module))))
                .collect();
            let ready = |thread: std::thread::ScopedJoinHandle<_>| {
                thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            };
            asked.into_iter().map(|kernels| kernels.or_else(ready)).collect()
        });
        let kernels = kernels?.concat();
        let (frequencies, failed) = (Mutex::default(), Mutex::default());
        let buffer = AtomicUsize::new(offload::BUFFER);
        Ok(Self(Arc::new(Inner { device, kernels, frequencies, buffer, failed })))
    }

    /// Sets the size of the two buffers through which what lies in the host's memory is streamed, in bytes; at least
    /// [`offload::MIN_BUFFER`]. It changes no result.
    pub fn stream_through(&self, bytes: usize) {
        self.0.buffer.store(bytes.max(offload::MIN_BUFFER), Ordering::Relaxed);
    }

    /// The device.
    pub fn device(&self) -> &dyn Device {
        &*self.0.device
    }

    /// Keeps the first error; afterwards nothing more is asked of the device.
    fn attempt<T>(&self, f: impl FnOnce(&dyn Device) -> Result<T, DeviceError>) -> Option<T> {
        let mut failed = self.0.failed.lock().unwrap_or_else(PoisonError::into_inner);
        if failed.is_some() {
            return None;
        }
        match f(&*self.0.device) {
            Ok(value) => Some(value),
            Err(e) => {
                *failed = Some(e);
                None
            }
        }
    }

    /// Memory with undefined contents.
    pub(super) fn memory(&self, bytes: usize) -> Memory {
        let ptr = if bytes == 0 { None } else { self.attempt(|device| device.alloc(bytes)) };
        Memory { inner: Arc::clone(&self.0), ptr: ptr.unwrap_or(Ptr(0)), host: None }
    }

    /// Zeros in page-locked memory of the host, where no kernel finds them.
    fn host_memory(&self, bytes: usize) -> Memory {
        let host = if bytes == 0 { None } else { self.attempt(|device| device.host_alloc(bytes)) };
        Memory { inner: Arc::clone(&self.0), ptr: Ptr(0), host }
    }

    /// A tensor with undefined contents.
    pub(super) fn empty(&self, dtype: DType, rows: usize, cols: usize) -> Tensor {
        Tensor { memory: self.memory(rows * cols * dtype.bytes()), rows, cols, dtype }
    }

    /// Zeros in page-locked memory of the host, where kernels read them over the bus.
    pub fn mapped_zeros(&self, dtype: DType, rows: usize, cols: usize) -> Tensor {
        let mut memory = self.host_memory(rows * cols * dtype.bytes());
        let address = memory.host.and_then(|host| self.attempt(|device| device.host_mapped(host)));
        memory.ptr = address.unwrap_or(Ptr(0));
        Tensor { memory, rows, cols, dtype }
    }

    /// A small array on the device, for a kernel to read.
    pub(super) fn array<T: bytemuck::NoUninit>(&self, data: &[T]) -> Memory {
        let bytes: &[u8] = bytemuck::cast_slice(data);
        let memory = self.memory(bytes.len());
        self.write(&memory, bytes);
        memory
    }

    /// The first error, if any.
    fn first_error(&self) -> Result<(), DeviceError> {
        let failed = self.0.failed.lock().unwrap_or_else(PoisonError::into_inner);
        failed.as_ref().map_or(Ok(()), |e| Err(e.clone()))
    }

    fn write(&self, memory: &Memory, bytes: &[u8]) {
        if !bytes.is_empty() {
            self.attempt(|device| match memory.host {
                Some(host) => device.host_write(host, bytes),
                None => device.write(memory.ptr, bytes),
            });
        }
    }

    /// Reads `n` values from the beginning of `memory`; zeros after an error.
    pub(super) fn read<T: bytemuck::AnyBitPattern + bytemuck::NoUninit>(
        &self,
        memory: &Memory,
        n: usize,
    ) -> Vec<T> {
        let mut out = vec![T::zeroed(); n];
        if n > 0 {
            let out = bytemuck::cast_slice_mut(&mut out);
            self.attempt(|device| match memory.host {
                Some(host) => device.host_read(host, out),
                None => device.read(memory.ptr, out),
            });
        }
        out
    }

    /// Runs a kernel; a grid without blocks is nothing to do.
    pub(super) fn launch(&self, entry: Entry, launch: Launch, args: &[Arg]) {
        if launch.grid.contains(&0) {
            return;
        }
        let kernel = self.0.kernels[entry as usize];
        self.attempt(|device| device.launch(kernel, &launch, args));
    }
}

impl Platform for Cuda {
    type Tensor = Tensor;
    type Tables = Tables;
    type Draws = Draws;
    type Routes = experts::Routes;
    type Codes = adamw::Codes;

    fn device_name(&self) -> String {
        self.0.device.name()
    }

    fn device_model(&self) -> String {
        self.0.device.model()
    }

    fn supports(&self, shape: &ModelShape) -> Result<(), Unsupported> {
        let ModelShape { hidden, heads, kv_heads, head_dim, intermediate, vocab, .. } = *shape;
        let (input, inputs) = (shape.per_layer_width, shape.per_layer_columns);
        let ModelShape { experts, experts_per_token: per_token, expert_width, .. } = *shape;
        let mut problems = Vec::new();
        if !HEAD_DIMS.contains(&head_dim) {
            problems.push(format!(
                "head_dim {head_dim}: the attention kernels are made for 64, 128, 256 and 512"
            ));
        }
        for (field, value) in [
            ("hidden_size", hidden),
            ("intermediate_size", intermediate),
            ("hidden_size_per_layer_input", input),
            ("num_experts", experts),
            ("moe_intermediate_size", expert_width),
        ] {
            if !value.is_multiple_of(VECTOR) {
                problems
                    .push(format!("{field} {value}: rows must be whole vectors of {VECTOR} bf16, 16 bytes"));
            }
        }
        let qkv = (heads + 2 * kv_heads) * head_dim;
        for (what, value, most, why) in [
            ("hidden_size", hidden, rms_norm::MAX_COLS, "a block of threads holds a row in the norms"),
            (
                "hidden_size_per_layer_input",
                input,
                rms_norm::MAX_COLS,
                "a block of threads holds a row in the norms",
            ),
            ("columns of all layers' inputs", inputs, matmul::MAX_FEATURES, "a grid has no more tiles"),
            ("intermediate_size", intermediate, matmul::MAX_FEATURES, "a grid has no more tiles"),
            ("num_experts", experts, experts::MAX_EXPERTS, "a warp holds a token's scores"),
            ("top_k_experts", per_token, experts::MAX_TOP, "a warp holds a token's choices"),
            ("moe_intermediate_size", expert_width, matmul::MAX_FEATURES, "a grid has no more tiles"),
            ("rows of q, k and v", qkv, matmul::MAX_FEATURES, "a grid has no more tiles"),
            ("vocab_size", vocab, lm_head::MAX_TOKENS, "so many fit the digits that top-k sorts by"),
        ] {
            if value > most {
                problems.push(format!("{what} {value}: at most {most}, {why}"));
            }
        }
        if heads > MAX_GROUP * kv_heads {
            problems.push(format!(
                "num_attention_heads {heads}: at most {MAX_GROUP} of them can share one of the {kv_heads} key/value heads"
            ));
        }
        match problems.is_empty() {
            true => Ok(()),
            false => Err(Unsupported { device: self.device_name(), problems }),
        }
    }

    fn pace(&self) -> Pace {
        PACE
    }

    fn begin_sequence(&self) {
        self.attempt(|device| device.begin_sequence());
    }

    fn end_sequence(&self) {
        self.attempt(|device| device.end_sequence());
    }

    fn activation_dtype(&self) -> DType {
        DType::Bf16
    }

    fn check(&self) -> Result<(), DeviceError> {
        self.attempt(|device| device.synchronize());
        self.first_error()
    }

    fn generation_bytes(&self) -> usize {
        // Half of the free memory, because it is fragmented and the caller's figures are estimates.
        let available = self.attempt(|device| device.available()).flatten();
        available.map_or(HOST_GENERATION_BYTES, |bytes| usize::try_from(bytes / 2).unwrap_or(usize::MAX))
    }

    fn training_bytes(&self) -> u64 {
        let available = self.attempt(|device| device.available()).flatten();
        // A device without memory of its own uses the host's.
        available.or_else(|| host::available().map(|bytes| bytes / 2)).unwrap_or(HOST_GENERATION_BYTES as u64)
    }

    fn forget_out_of_memory(&self) {
        let mut failed = self.0.failed.lock().unwrap_or_else(PoisonError::into_inner);
        failed.take_if(|e| e.out_of_memory);
    }

    fn zeros(&self, dtype: DType, rows: usize, cols: usize) -> Tensor {
        let x = self.empty(dtype, rows, cols);
        if x.bytes() > 0 {
            self.attempt(|device| device.fill(x.memory.ptr, 0, x.bytes()));
        }
        x
    }

    fn upload(&self, dtype: DType, rows: usize, cols: usize, bytes: &[u8]) -> Tensor {
        let x = self.empty(dtype, rows, cols);
        assert_eq!(bytes.len(), x.bytes(), "the bytes of a [{rows}, {cols}] matrix");
        self.write(&x.memory, bytes);
        x
    }

    fn download(&self, x: &Tensor) -> Vec<u8> {
        self.read(&x.memory, x.bytes())
    }

    fn to_f32(&self, x: &Tensor) -> Vec<f32> {
        match x.dtype {
            DType::F32 => self.read(&x.memory, x.rows * x.cols),
            DType::Bf16 => self.read::<bf16>(&x.memory, x.rows * x.cols).iter().map(|x| x.to_f32()).collect(),
        }
    }

    fn zero_codes(&self, n: usize) -> adamw::Codes {
        let memory = self.memory(n);
        if n > 0 {
            self.attempt(|device| device.fill(memory.ptr, 0, n));
        }
        adamw::Codes { memory, len: n }
    }

    fn upload_codes(&self, codes: &[u8]) -> adamw::Codes {
        adamw::Codes { memory: self.array(codes), len: codes.len() }
    }

    fn download_codes(&self, codes: &adamw::Codes) -> Vec<u8> {
        self.read(&codes.memory, codes.len)
    }

    fn host_zeros(&self, dtype: DType, rows: usize, cols: usize) -> Tensor {
        Tensor { memory: self.host_memory(rows * cols * dtype.bytes()), rows, cols, dtype }
    }

    fn host_zero_codes(&self, n: usize) -> adamw::Codes {
        adamw::Codes { memory: self.host_memory(n), len: n }
    }

    fn upload_to_host(
        &self,
        dtype: DType,
        rows: usize,
        cols: usize,
        bytes: &[u8],
        _: Option<Mapped>,
    ) -> Tensor {
        let mut x = self.mapped_zeros(dtype, rows, cols);
        self.overwrite(&mut x, bytes);
        x
    }

    fn overwrite(&self, x: &mut Tensor, bytes: &[u8]) {
        assert_eq!(bytes.len(), x.bytes(), "the bytes of a [{}, {}] matrix", x.rows, x.cols);
        self.write(&x.memory, bytes);
    }

    fn overwrite_codes(&self, codes: &mut adamw::Codes, bytes: &[u8]) {
        assert_eq!(bytes.len(), codes.len, "as many codes as there are");
        self.write(&codes.memory, bytes);
    }

    fn shape(&self, x: &Tensor) -> (usize, usize) {
        (x.rows, x.cols)
    }

    fn dtype(&self, x: &Tensor) -> DType {
        x.dtype
    }

    fn reshaped(&self, x: Tensor, rows: usize, cols: usize) -> Tensor {
        assert_eq!(x.rows * x.cols, rows * cols, "as many elements");
        Tensor { rows, cols, ..x }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::vm::{Options, Vm};

    #[test]
    #[cfg_attr(not(has_kernels), ignore = "built without nvcc; `make nvcc` fetches one")]
    fn shapes_beyond_the_kernels_are_refused_each_for_its_reason() {
        let cuda = Cuda::new(Box::new(Vm::new(Options::default()))).expect("the kernels load");
        let fits = ModelShape {
            hidden: 8192,
            heads: 64,
            kv_heads: 1,
            head_dim: 256,
            intermediate: matmul::MAX_FEATURES,
            vocab: 1 << 22,
            per_layer_width: 256,
            per_layer_columns: 35 * 256,
            experts: 128,
            experts_per_token: 8,
            expert_width: 704,
        };
        assert_eq!(cuda.supports(&fits), Ok(()));
        for (shape, why) in [
            (ModelShape { head_dim: 32, ..fits }, "head_dim 32"),
            (ModelShape { hidden: 8188, ..fits }, "hidden_size 8188"),
            (ModelShape { hidden: 8200, ..fits }, "hidden_size 8200"),
            (ModelShape { intermediate: 100, ..fits }, "intermediate_size 100"),
            (ModelShape { intermediate: matmul::MAX_FEATURES + 8, ..fits }, "intermediate_size 2097128"),
            (ModelShape { heads: 65, ..fits }, "num_attention_heads 65"),
            (ModelShape { heads: 8192, kv_heads: 8192, ..fits }, "rows of q, k and v 6291456"),
            (ModelShape { vocab: (1 << 22) + 1, ..fits }, "vocab_size 4194305"),
            (ModelShape { per_layer_width: 12, ..fits }, "hidden_size_per_layer_input 12"),
            (ModelShape { per_layer_width: 8200, ..fits }, "hidden_size_per_layer_input 8200"),
            (ModelShape { experts: 12, ..fits }, "num_experts 12: rows must be whole vectors"),
            (ModelShape { experts: 264, ..fits }, "num_experts 264: at most 256"),
            (ModelShape { experts_per_token: 33, ..fits }, "top_k_experts 33"),
            (ModelShape { expert_width: 700, ..fits }, "moe_intermediate_size 700"),
            (ModelShape { expert_width: 1 << 22, ..fits }, "moe_intermediate_size 4194304"),
            (ModelShape { per_layer_columns: 1 << 22, ..fits }, "columns of all layers' inputs 4194304"),
        ] {
            let refused = cuda.supports(&shape).expect_err(why);
            assert!(refused.problems.len() == 1 && refused.problems[0].starts_with(why), "{refused}");
        }
        assert_eq!(cuda.generation_bytes(), HOST_GENERATION_BYTES);
    }
}
