//! Low-rank adapters: y = x W^T + s (x A^T) B^T (Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models"), where
//! W stays as it is and s is alpha / r, or alpha / sqrt(r) (Kalajdzievski 2023, "A Rank Stabilization Scaling Factor for
//! Fine-Tuning with LoRA").
//!
//! Sampling and training run them by the same ops, as they do the rest of the model; without them the same weights are the
//! model that training started from.

use super::Gemma;
pub use super::params::{Adapter, Adapters, Linear};
use super::params::{LayerParams, ParamKind, ParamSpec, Params, plan};
use crate::backend::{Backend, DType, Uniform};
use crate::rng::{Domain, derive_key};

/// The ranks that kernels take are multiples of this: others are filled up with zeros, which stay zeros.
const RANK_UNIT: usize = 8;

/// A rank as it is held.
pub fn held_rank(rank: usize) -> usize {
    rank.next_multiple_of(RANK_UNIT)
}

/// The tensors of the adapters of a layer, by the name of the module: A and B of each map that `wanted` names and the layer has.
pub fn layer_plan(
    layer: &LayerParams<ParamSpec>,
    number: usize,
    rank: usize,
    wanted: impl Fn(Linear) -> bool,
) -> Adapters<ParamSpec> {
    Linear::ALL.map(|map| {
        let weight = layer.weight(map).filter(|_| wanted(map))?;
        let module = format!("model.layers.{number}.{}", map.path());
        let of = |part: &str, rows, cols| ParamSpec {
            name: format!("{module}.{part}.weight"),
            kind: ParamKind::Adapter,
            rows,
            cols,
        };
        let rank = held_rank(rank);
        Some(Adapter { a: of("lora_A", rank, weight.cols), b: of("lora_B", weight.rows, rank) })
    })
}

/// The model's tensors, with those of its adapters where `model` has some.
pub fn full_plan<B: Backend>(model: &Gemma<B>) -> Params<ParamSpec> {
    let mut specs = plan(&model.config);
    for (number, (spec, layer)) in specs.layers.iter_mut().zip(&model.params.layers).enumerate() {
        let held = layer.adapters.iter().flatten().next().map(|adapter| model.backend.shape(&adapter.a).0);
        let has = |map: Linear| layer.adapters[map as usize].is_some();
        spec.adapters = layer_plan(spec, number, held.unwrap_or(0), has);
    }
    specs
}

/// The matrices of new adapters: A between -in^-1/2 and in^-1/2, as PEFT draws it, and B = 0, so that training begins with the
/// model as it is. Stored as activations are.
pub fn begin<B: Backend>(model: &mut Gemma<B>, rank: usize, targets: &[Linear], seed: u64) {
    let dtype = model.backend.activation_dtype();
    let specs = plan(&model.config);
    let mut number = 0;
    for (l, layer) in model.params.layers.iter_mut().enumerate() {
        let wanted = layer_plan(&specs.layers[l], l, rank, |map| targets.contains(&map));
        layer.adapters = wanted.map(|adapter| {
            let Adapter { a, b } = adapter?;
            let backend = &model.backend;
            number += 1;
            let uniform =
                Uniform::up_to((a.cols as f32).powf(-0.5), derive_key(seed, Domain::Adapters, number)[0]);
            let mut values = vec![0.0; a.rows * a.cols];
            for (i, value) in values[..rank * a.cols].iter_mut().enumerate() {
                *value = uniform.four(i as u64 / 4)[i % 4];
            }
            Some(Adapter {
                a: upload(backend, dtype, a.rows, a.cols, &values),
                b: backend.zeros(dtype, b.rows, b.cols),
            })
        });
    }
}

/// A matrix of these values in `dtype`.
pub fn upload<B: Backend>(backend: &B, dtype: DType, rows: usize, cols: usize, values: &[f32]) -> B::Tensor {
    match dtype {
        DType::F32 => backend.upload(dtype, rows, cols, bytemuck::cast_slice(values)),
        DType::Bf16 => {
            let rounded: Vec<half::bf16> = values.iter().map(|&x| half::bf16::from_f32(x)).collect();
            backend.upload(dtype, rows, cols, bytemuck::cast_slice(&rounded))
        }
    }
}

impl<B: Backend> Gemma<B> {
    /// The adapter of a linear map of layer `l` and the factor on it, where it has one that is switched on.
    pub(super) fn adapter(&self, l: usize, map: Linear) -> Option<(&Adapter<B::Tensor>, f32)> {
        self.params.layers[l].adapters[map as usize].as_ref().zip(self.adapter_scale)
    }

    /// Y_i = X W_i^T of linear maps of layer `l`, with what their adapters add.
    pub(super) fn linear<const N: usize>(
        &self,
        l: usize,
        x: &B::Tensor,
        maps: [Linear; N],
    ) -> [B::Tensor; N] {
        let (b, p) = (&self.backend, &self.params.layers[l]);
        let w = maps.map(|map| p.weight(map).expect("a map that the layer has"));
        let low_rank = maps.map(|map| {
            let (adapter, scale) = self.adapter(l, map)?;
            Some((self.narrowed(x, adapter, scale), &adapter.b))
        });
        if low_rank.iter().all(Option::is_none) {
            return b.matmul_forward(x, w);
        }
        b.matmul_low_rank_forward(x, w, low_rank.each_ref().map(|low| low.as_ref().map(|(h, b)| (h, *b))))
    }

    /// H = s X A^T.
    fn narrowed(&self, x: &B::Tensor, adapter: &Adapter<B::Tensor>, scale: f32) -> B::Tensor {
        let [h] = self.backend.matmul_forward(x, [&adapter.a]);
        self.backend.scaled(h, scale)
    }

    /// The gradient of the input x of linear maps of layer `l`, given those of their outputs; gradients of weights and of
    /// adapters +=: dB += dY^T H and, with G = s dY B, dA += G^T X and dX = dY W + G A.
    pub(super) fn linear_backward(
        &self,
        l: usize,
        x: &B::Tensor,
        outputs: &[(Linear, &B::Tensor)],
        g: &mut LayerParams<B::Tensor>,
    ) -> B::Tensor {
        let (b, p) = (&self.backend, &self.params.layers[l]);
        let weight = |map| p.weight(map).expect("a map that the layer has");
        let mut low_rank = Vec::new();
        for &(map, dy) in outputs {
            b.matmul_backward_weight(dy, x, g.weight_mut(map).expect("a gradient of every weight"));
            if let Some((adapter, scale)) = self.adapter(l, map) {
                let dh = b.scaled(b.matmul_backward_input(&[(dy, &adapter.b)]), scale);
                if let Some(g) = &mut g.adapters[map as usize] {
                    b.matmul_backward_weight(dy, &self.narrowed(x, adapter, scale), &mut g.b);
                    b.matmul_backward_weight(&dh, x, &mut g.a);
                }
                low_rank.push((dh, &adapter.a));
            }
        }
        let mut terms: Vec<(&B::Tensor, &B::Tensor)> =
            outputs.iter().map(|&(map, dy)| (dy, weight(map))).collect();
        terms.extend(low_rank.iter().map(|(dh, a)| (dh, *a)));
        b.matmul_backward_input(&terms)
    }
}
