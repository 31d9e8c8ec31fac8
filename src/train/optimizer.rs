//! AdamW over all parameters, or those of adapters alone: gradients, moments and, for bf16 parameters, f32 master weights.

use std::path::Path;

use thiserror::Error;

use super::config::{MomentKind, OptimizerSection};
use super::snapshot::{Array, Arrays, SnapshotError, write_arrays};
use crate::backend::adamw::BLOCK;
use crate::backend::{AdamW, Backend, DType, Moments, Quantised, Update, Weight};
use crate::checkpoint::{Checkpoint, Dtype};
use crate::gemma::lora::full_plan;
use crate::gemma::params::{ParamKind, ParamSpec, wider_than_bf16};
use crate::gemma::{Gemma, Params};
use crate::rng::{Domain, derive_key};

/// A gradient that must not be applied.
#[derive(Debug, Clone, PartialEq, Error)]
#[error("the gradient of {tensor} holds NaN or Inf")]
pub struct NotFinite {
    /// The first such tensor.
    pub tensor: String,
}

/// The optimizer's state, and the gradients that it consumes.
pub struct Optimizer<B: Backend> {
    /// What [`Gemma::backward`] adds to. Those of parameters that are not trained have no rows.
    pub grads: Params<B::Tensor>,
    /// Of the parameters that are trained, in order.
    states: Vec<State<B>>,
    seed: u64,
}

/// What there is of one parameter beside itself and its gradient.
struct State<B: Backend> {
    spec: ParamSpec,
    /// Its place among all parameters.
    number: usize,
    moments: Moments<B::Tensor, B::Codes>,
    /// `None` where the parameter is its own master.
    master: Option<B::Tensor>,
}

/// How the moments of a parameter are kept, and whether it has a master.
fn kept(spec: &ParamSpec, dtype: DType, config: &OptimizerSection) -> (MomentKind, bool) {
    let of_matrix = matches!(spec.kind, ParamKind::Matrix | ParamKind::Stack(_));
    let moments = match spec.is_embedding() {
        true => config.embedding_moments,
        false if of_matrix => config.moments,
        false => MomentKind::F32,
    };
    (moments, dtype == DType::Bf16 && (config.masters || !of_matrix))
}

/// Whether the moments of a parameter are codes.
pub fn keeps_codes(spec: &ParamSpec, config: &OptimizerSection) -> bool {
    kept(spec, DType::F32, config).0 == MomentKind::Blockwise
}

/// Whether the state of a parameter lies in the host's memory, on a device that has another.
fn is_offloaded(spec: &ParamSpec, config: &OptimizerSection) -> bool {
    config.offload && matches!(spec.kind, ParamKind::Matrix | ParamKind::Stack(_))
}

/// What the gradient of a parameter is summed up in.
fn gradient_dtype(spec: &ParamSpec, config: &OptimizerSection) -> DType {
    match spec.kind {
        ParamKind::Matrix | ParamKind::Stack(_) => config.gradients,
        ParamKind::Adapter | ParamKind::Head | ParamKind::Vector => DType::F32,
    }
}

/// Whether a parameter is trained: all are, unless there are adapters, and then those are, with the score head.
pub fn is_trained(spec: &ParamSpec, adapters: bool) -> bool {
    !adapters || matches!(spec.kind, ParamKind::Adapter | ParamKind::Head)
}

/// Bytes that training holds beside the parameters.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct StateBytes {
    /// Of gradients.
    pub gradients: u64,
    /// Of both moments.
    pub moments: u64,
    /// Of master weights.
    pub masters: u64,
    /// Of moments that lie in the host's memory instead.
    pub host_moments: u64,
    /// Of such master weights.
    pub host_masters: u64,
}

/// What an [`Optimizer`] of a model of these parameters will hold; `dtype` is that of the parameters, and `adapters` says
/// whether there are some.
pub fn state_bytes(
    specs: &[&ParamSpec],
    adapters: bool,
    dtype: DType,
    config: &OptimizerSection,
) -> StateBytes {
    let mut all = StateBytes::default();
    for spec in specs.iter().filter(|spec| is_trained(spec, adapters)) {
        let n = (spec.rows * spec.cols) as u64;
        let f32s = |n: u64| n * DType::F32.bytes() as u64;
        let (moments, has_master) = kept(spec, dtype, config);
        all.gradients += n * gradient_dtype(spec, config).bytes() as u64;
        let (of_moments, of_masters) = match is_offloaded(spec, config) {
            false => (&mut all.moments, &mut all.masters),
            true => (&mut all.host_moments, &mut all.host_masters),
        };
        *of_moments += 2 * match moments {
            MomentKind::F32 => f32s(n),
            MomentKind::Blockwise => n + f32s(n.div_ceil(BLOCK as u64)),
        };
        *of_masters += if has_master { f32s(n) } else { 0 };
    }
    all
}

impl<B: Backend> State<B> {
    /// Zero moments; a master, where there is to be one, from the parameter.
    fn new(
        b: &B,
        config: &OptimizerSection,
        number: usize,
        (spec, parameter): (&ParamSpec, &B::Tensor),
    ) -> Self {
        let (kind, has_master) = kept(spec, b.dtype(parameter), config);
        let (rows, cols) = (spec.rows, spec.cols);
        let offloaded = is_offloaded(spec, config);
        let f32s = |rows, cols| match offloaded {
            false => b.zeros(DType::F32, rows, cols),
            true => b.host_zeros(DType::F32, rows, cols),
        };
        let zeros = || f32s(rows, cols);
        let quantised = || Quantised {
            codes: if offloaded { b.host_zero_codes(rows * cols) } else { b.zero_codes(rows * cols) },
            scales: f32s(1, (rows * cols).div_ceil(BLOCK)),
        };
        let moments = match kind {
            MomentKind::F32 => Moments::F32 { m: zeros(), v: zeros() },
            MomentKind::Blockwise => Moments::Blockwise { m: quantised(), v: quantised() },
        };
        let master = || match offloaded {
            false => b.widened(parameter),
            true => b.host_widened(parameter),
        };
        Self { spec: spec.clone(), number, moments, master: has_master.then(master) }
    }
}

impl<B: Backend> Optimizer<B> {
    /// Zero moments; masters from the parameters ([`Optimizer::start_from`] knows better). All parameters are trained, unless
    /// the model has adapters, and then those are. `seed` is that of weights without masters.
    pub fn new(model: &Gemma<B>, config: &OptimizerSection, seed: u64) -> Self {
        let (b, adapters, specs) = (&model.backend, model.adapter_scale.is_some(), full_plan(model));
        let trained = |spec: &ParamSpec| is_trained(spec, adapters);
        let grads = specs.map(|spec| {
            let rows = if trained(spec) { spec.rows } else { 0 };
            b.zeros(gradient_dtype(spec, config), rows, spec.cols)
        });
        let all = specs.tensors().into_iter().zip(model.params.tensors()).enumerate();
        let all = all.filter(|(_, (spec, _))| trained(spec));
        let states = all.map(|(number, parameter)| State::new(b, config, number, parameter)).collect();
        Self { grads, states, seed }
    }

    /// Takes the masters as a checkpoint of the model holds them where that is more than bf16: what the parameters had
    /// to be rounded for is not lost, and a small update counts from the start.
    pub fn start_from(&mut self, backend: &B, checkpoint: &Checkpoint) {
        for State { spec, master, .. } in &mut self.states {
            if let (Some(master), Some(bytes)) = (master, wider_than_bf16(checkpoint, spec)) {
                backend.overwrite(master, &bytes);
            }
        }
    }

    /// Applies and clears the gradients. `step` counts from 1. Returns the global L2 norm before clipping. Weight
    /// decay is for matrices, not for norms.
    pub fn step(
        &mut self,
        model: &mut Gemma<B>,
        config: &OptimizerSection,
        lr: f64,
        step: u64,
    ) -> Result<f64, NotFinite> {
        let b = &model.backend;
        let grads = self.grads.tensors();
        let grads: Vec<&B::Tensor> = self.states.iter().map(|state| grads[state.number]).collect();
        let mut squares = 0.0;
        for (state, sum) in self.states.iter().zip(b.sum_squares(&grads)) {
            if !sum.is_finite() {
                return Err(NotFinite { tensor: state.spec.name.clone() });
            }
            squares += sum;
        }
        let norm = squares.sqrt();
        let clip = config.clip_norm;
        // As torch.nn.utils.clip_grad_norm_, which adds 1e-6 to the norm.
        let grad_scale = if clip > 0.0 { (clip / (norm + 1e-6)).min(1.0) as f32 } else { 1.0 };
        let hyper = AdamW {
            lr: lr as f32,
            beta1: config.beta1 as f32,
            beta2: config.beta2 as f32,
            eps: config.eps as f32,
            step,
            grad_scale,
            key: derive_key(self.seed, Domain::Rounding, step),
        };
        let both = self.grads.tensors_mut().into_iter().zip(model.params.tensors_mut());
        let mut both: Vec<Option<(&mut B::Tensor, &mut B::Tensor)>> = both.map(Some).collect();
        let mut updates: Vec<Update<B::Tensor, B::Codes>> = Vec::new();
        for State { spec, number, moments, master } in &mut self.states {
            let (grad, parameter) = both[*number].take().expect("a parameter has one state");
            let weight_decay = if spec.kind == ParamKind::Vector { 0.0 } else { config.weight_decay as f32 };
            let weight = match (master, b.dtype(parameter)) {
                (Some(master), _) => Weight::Master { master, copy: parameter },
                (None, DType::F32) => Weight::F32(parameter),
                (None, DType::Bf16) => Weight::Bf16 { weight: parameter, number: *number as u32 },
            };
            updates.push(Update { grad, moments, weight, weight_decay });
        }
        b.adamw(&hyper, &mut updates);
        Ok(norm)
    }

    /// Writes moments and masters.
    pub fn save(&self, backend: &B, path: &Path) -> Result<(), SnapshotError> {
        let mut arrays = Vec::new();
        for State { spec, moments, master, .. } in &self.states {
            let mut add = |kind: &str, array| arrays.push((format!("{kind}.{}", spec.name), array));
            let matrix = |x| Array::new(Dtype::F32, spec.rows, spec.cols, move || backend.bytes(x));
            match moments {
                Moments::F32 { m, v } => {
                    add("m", matrix(m));
                    add("v", matrix(v));
                }
                Moments::Blockwise { m, v } => {
                    for (kind, x) in [("m", m), ("v", v)] {
                        let (codes, scales) = (&x.codes, &x.scales);
                        let bytes = || backend.download_codes(codes).into();
                        add(&format!("{kind}_codes"), Array::new(Dtype::U8, spec.rows, spec.cols, bytes));
                        let blocks = backend.shape(scales).1;
                        let bytes = || backend.bytes(scales);
                        add(&format!("{kind}_scales"), Array::new(Dtype::F32, 1, blocks, bytes));
                    }
                }
            }
            if let Some(master) = master {
                add("master", matrix(master));
            }
        }
        write_arrays(path, arrays)
    }

    /// Reads what [`Optimizer::save`] wrote, in place of the present state.
    pub fn load(&mut self, backend: &B, path: &Path) -> Result<(), SnapshotError> {
        let arrays = Arrays::open(path)?;
        for State { spec, moments, master, .. } in &mut self.states {
            let name = |kind: &str| format!("{kind}.{}", spec.name);
            let read = |kind: &str, x: &mut B::Tensor| {
                let (rows, cols) = backend.shape(x);
                backend.overwrite(x, arrays.bytes(&name(kind), Dtype::F32, rows, cols)?);
                Ok::<_, SnapshotError>(())
            };
            match moments {
                Moments::F32 { m, v } => {
                    read("m", m)?;
                    read("v", v)?;
                }
                Moments::Blockwise { m, v } => {
                    for (kind, x) in [("m", m), ("v", v)] {
                        let codes = name(&format!("{kind}_codes"));
                        let codes = arrays.bytes(&codes, Dtype::U8, spec.rows, spec.cols)?;
                        backend.overwrite_codes(&mut x.codes, codes);
                        read(&format!("{kind}_scales"), &mut x.scales)?;
                    }
                }
            }
            if let Some(master) = master {
                read("master", master)?;
            }
        }
        Ok(())
    }
}
