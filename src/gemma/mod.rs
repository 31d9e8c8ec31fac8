//! Gemma 1 to 4, forward and backward, on any [`Backend`].
//!
//! One code path serves prefill, decode and training: [`Gemma::forward`] runs flat tokens under a segment table,
//! with keys and values either in the batch itself (training) or in a [`KvCache`] (generation). Training keeps the
//! [`activations`] that there is memory for, and computes the rest again on the way back.

pub mod activations;
mod backward;
pub mod config;
mod forward;
pub mod lora;
pub mod params;
pub mod published;

pub use forward::{KvCache, Trace};
pub use params::{Frozen, Params};

use crate::backend::Backend;
use config::GemmaConfig;

/// A model: its shape, its parameters and the device that they live on.
pub struct Gemma<B: Backend> {
    /// Where ops run.
    pub backend: B,
    /// The shape.
    pub config: GemmaConfig,
    /// The parameters.
    pub params: Params<B::Tensor>,
    /// What it reads beside them, and training leaves as it is.
    pub frozen: Frozen<B::Tensor>,
    /// The factor on what adapters add, where they are switched on; see [`lora`].
    pub adapter_scale: Option<f32>,
}
