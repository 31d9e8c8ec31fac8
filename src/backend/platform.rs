//! A device as ops see it: its name, its matrices, its memory and its pace.

use std::borrow::Cow;

use crate::checkpoint::Mapped;
use crate::device::{DeviceError, host};

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
    /// [`Platform::device_name`].
    pub device: String,
    /// All that is in the way; never empty.
    pub problems: Vec<String>,
}

/// What a device is to the ops, each of which is a trait over it.
///
/// An op that the device fails (no memory left, a broken launch) records the first such error, and later ops do
/// nothing; whoever reads results back asks [`Platform::check`] before trusting them. So errors surface where results
/// do, as they do on an asynchronous device anyway.
pub trait Platform: Send + Sync {
    /// A matrix on the device.
    type Tensor: Send + Sync;
    /// A [`Batch`](super::Batch) where ops can read it.
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
    /// From here to [`Platform::end_sequence`] the ops are those of one step of many alike: a device that can record
    /// and replay them may. Changes no result.
    fn begin_sequence(&self) {}
    /// See [`Platform::begin_sequence`].
    fn end_sequence(&self) {}

    /// A matrix of zeros.
    fn zeros(&self, dtype: DType, rows: usize, cols: usize) -> Self::Tensor;
    /// Uploads row-major bytes of `dtype`. Panics unless `bytes` is exactly the matrix.
    fn upload(&self, dtype: DType, rows: usize, cols: usize, bytes: &[u8]) -> Self::Tensor;
    /// Downloads row-major bytes in the tensor's own dtype.
    fn download(&self, x: &Self::Tensor) -> Vec<u8>;
    /// The same bytes where they lie, if the host can read them there as they are; else downloaded.
    fn bytes<'a>(&self, x: &'a Self::Tensor) -> Cow<'a, [u8]> {
        self.download(x).into()
    }
    /// Downloads as f32 whatever the dtype.
    fn to_f32(&self, x: &Self::Tensor) -> Vec<f32>;

    /// So many codes, all 0.
    fn zero_codes(&self, n: usize) -> Self::Codes;
    /// Uploads codes.
    fn upload_codes(&self, codes: &[u8]) -> Self::Codes;
    /// Downloads codes.
    fn download_codes(&self, codes: &Self::Codes) -> Vec<u8>;

    /// A matrix of zeros in the host's memory, where the device has another. Ops but [`adamw`](super::Optimize::adamw) do not
    /// take it: that one updates moments and masters there with the same bits as elsewhere.
    fn host_zeros(&self, dtype: DType, rows: usize, cols: usize) -> Self::Tensor {
        self.zeros(dtype, rows, cols)
    }
    /// So many codes there, all 0.
    fn host_zero_codes(&self, n: usize) -> Self::Codes {
        self.zero_codes(n)
    }
    /// [`Platform::upload`] of the weights of a linear map, or of the embeddings, which a device may lay out as its products read
    /// them.
    fn upload_weight(&self, dtype: DType, rows: usize, cols: usize, bytes: &[u8]) -> Self::Tensor {
        self.upload(dtype, rows, cols, bytes)
    }
    /// Uploads to the host's memory, where the device has another, a matrix of which
    /// [`embed_forward`](super::Embed::embed_forward) reads rows and no other op anything. The bytes may be those of a file: a
    /// device that computes in the host's memory leaves them there.
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
    /// The same elements in rows of another length.
    fn reshaped(&self, x: Self::Tensor, rows: usize, cols: usize) -> Self::Tensor;
}
