//! AdamW over all parameters, or those of adapters alone: gradients, moments and, for bf16 parameters, f32 master weights.

use std::path::Path;

use thiserror::Error;

use super::config::OptimizerSection;
use super::snapshot::{Array, Arrays, SnapshotError, write_arrays};
use crate::backend::{AdamW, Backend, DType, Update};
use crate::checkpoint::Checkpoint;
use crate::gemma::lora::full_plan;
use crate::gemma::params::{ParamKind, ParamSpec, wider_than_bf16};
use crate::gemma::{Gemma, Params};

/// A gradient that must not be applied.
#[derive(Debug, Clone, PartialEq, Error)]
#[error("the gradient of {tensor} holds NaN or Inf")]
pub struct NotFinite {
    /// The first such tensor.
    pub tensor: String,
}

/// The optimizer's state, and the gradients that it consumes.
pub struct Optimizer<B: Backend> {
    /// All parameters, in order. Only the trained ones have gradients and state.
    specs: Vec<ParamSpec>,
    /// What [`Gemma::backward`] adds to. Those that are not trained have no rows.
    pub grads: Params<B::Tensor>,
    m: Params<B::Tensor>,
    v: Params<B::Tensor>,
    /// One entry per parameter, in order; `None` where the parameter is f32 and its own master, or not trained.
    masters: Vec<Option<B::Tensor>>,
    /// Adapters alone are trained.
    adapters: bool,
}

/// Whether a parameter is trained: all are, unless there are adapters, and then those are.
fn is_trained(spec: &ParamSpec, adapters: bool) -> bool {
    !adapters || spec.kind == ParamKind::Adapter
}

impl<B: Backend> Optimizer<B> {
    /// Zero moments; masters from the parameters ([`Optimizer::start_from`] knows better).
    pub fn new(model: &Gemma<B>) -> Self {
        let (b, adapters, specs) = (&model.backend, model.adapter_scale.is_some(), full_plan(model));
        let trained = |spec: &ParamSpec| is_trained(spec, adapters);
        let zeros =
            || specs.map(|spec| b.zeros(DType::F32, if trained(spec) { spec.rows } else { 0 }, spec.cols));
        let master = |(spec, p): (&&ParamSpec, &B::Tensor)| {
            (trained(spec) && b.dtype(p) == DType::Bf16).then(|| b.widened(p))
        };
        let all = specs.tensors();
        let masters = all.iter().zip(model.params.tensors()).map(master).collect();
        let [grads, m, v] = [zeros(), zeros(), zeros()];
        Self { specs: all.into_iter().cloned().collect(), grads, m, v, masters, adapters }
    }

    /// Takes the masters as a checkpoint of the model holds them where that is more than bf16: what the parameters had
    /// to be rounded for is not lost, and a small update counts from the start.
    pub fn start_from(&mut self, backend: &B, checkpoint: &Checkpoint) {
        for (spec, master) in self.specs.iter().zip(&mut self.masters) {
            if let (Some(master), Some(bytes)) = (master, wider_than_bf16(checkpoint, spec)) {
                *master = backend.upload(DType::F32, spec.rows, spec.cols, &bytes);
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
        let adapters = self.adapters;
        let mut squares = 0.0;
        let trained =
            self.specs.iter().zip(self.grads.tensors()).filter(|(spec, _)| is_trained(spec, adapters));
        let (specs, grads): (Vec<&ParamSpec>, Vec<&B::Tensor>) = trained.unzip();
        for (spec, sum) in specs.into_iter().zip(b.sum_squares(&grads)) {
            if !sum.is_finite() {
                return Err(NotFinite { tensor: spec.name.clone() });
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
        };
        let states = self.grads.tensors_mut().into_iter().zip(self.m.tensors_mut()).zip(self.v.tensors_mut());
        let params = model.params.tensors_mut().into_iter().zip(&mut self.masters);
        let all = self.specs.iter().zip(states).zip(params);
        let all = all.filter(|((spec, _), _)| is_trained(spec, adapters));
        let mut updates: Vec<Update<B::Tensor>> = all
            .map(|((spec, ((grad, m), v)), (param, master))| {
                let decay = if spec.kind == ParamKind::Vector { 0.0 } else { config.weight_decay };
                let (master, copy) = match master {
                    Some(master) => (master, Some(param)),
                    None => (param, None),
                };
                Update { grad, master, m, v, copy, weight_decay: decay as f32 }
            })
            .collect();
        b.adamw(&hyper, &mut updates);
        Ok(norm)
    }

    /// Writes moments and masters.
    pub fn save(&self, backend: &B, path: &Path) -> Result<(), SnapshotError> {
        let (m, v) = (self.m.tensors(), self.v.tensors());
        let mut arrays = Vec::new();
        for (i, spec) in self.specs.iter().enumerate().filter(|(_, spec)| is_trained(spec, self.adapters)) {
            let master = self.masters[i].as_ref();
            for (kind, tensor) in [("m", Some(m[i])), ("v", Some(v[i])), ("master", master)] {
                if let Some(tensor) = tensor {
                    let array = Array::new(spec.rows, spec.cols, || backend.download(tensor));
                    arrays.push((format!("{kind}.{}", spec.name), array));
                }
            }
        }
        write_arrays(path, arrays)
    }

    /// Reads what [`Optimizer::save`] wrote, in place of the present state.
    pub fn load(&mut self, backend: &B, path: &Path) -> Result<(), SnapshotError> {
        let arrays = Arrays::open(path)?;
        let (m, v) = (self.m.tensors_mut(), self.v.tensors_mut());
        let all = self.specs.iter().zip(m).zip(v).zip(&mut self.masters);
        for (((spec, m), v), master) in all.filter(|(((spec, _), _), _)| is_trained(spec, self.adapters)) {
            for (kind, tensor) in [("m", Some(m)), ("v", Some(v)), ("master", master.as_mut())] {
                if let Some(tensor) = tensor {
                    let bytes = arrays.bytes(&format!("{kind}.{}", spec.name), spec.rows, spec.cols)?;
                    *tensor = backend.upload(DType::F32, spec.rows, spec.cols, bytes);
                }
            }
        }
        Ok(())
    }
}
