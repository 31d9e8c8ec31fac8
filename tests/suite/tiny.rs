//! Tiny models: those of `tests/goldens`, and what the tests of whole models share.

use std::path::PathBuf;

use bon_engine::backend::cpu::{Cpu, Tensor};
use bon_engine::backend::{Backend, DType};
use bon_engine::gemma::config::ConfigFile;
use bon_engine::gemma::lora::full_plan;
use bon_engine::gemma::{Gemma, Params, params};
use bon_engine::model_dir::open_weights;
use bon_engine::train::config::OptimizerSection;
use bon_engine::train::optimizer::Optimizer;
use bon_engine::train::policy::{Continued, Forward};

use crate::ops::randoms;

/// One of every family, one with linear RoPE scaling, one whose LM head is not its embedding, and those inside models of text
/// and other things.
pub(crate) const NAMES: [&str; 12] = [
    "gemma1",
    "gemma2",
    "gemma3",
    "gemma3_linear",
    "gemma3_untied",
    "gemma3_wrapper",
    "vaultgemma",
    "gemma4",
    "gemma4_e",
    "gemma4_e_trained",
    "gemma4_wrapper",
    "gemma4_moe",
];

/// The directory of a golden model.
pub(crate) fn dir(name: &str) -> PathBuf {
    crate::places::checkout().join("tests/goldens").join(name)
}

/// A golden model, weights in `dtype` (they are the same numbers in f32 and bf16).
pub(crate) fn model(name: &str, dtype: DType) -> Gemma<Cpu> {
    model_on(Cpu::F32, name, dtype)
}

/// The same on any backend.
pub(crate) fn model_on<B: Backend>(backend: B, name: &str, dtype: DType) -> Gemma<B> {
    let dir = dir(name);
    let file = ConfigFile::open(&dir).unwrap();
    let (weights, mut config) = (open_weights(&dir, &file).unwrap(), file.gemma);
    config.trains_per_layer_embed = name == "gemma4_e_trained";
    let params = params::load(&backend, &config, &weights, Some(dtype)).unwrap();
    let frozen = params::load_frozen(&backend, &config, &weights, Some(dtype), false);
    Gemma { backend, config, params, frozen, adapter_scale: None }
}

/// What weights are stored in and multiplied in on the CPU.
pub(crate) const KINDS: [(DType, Cpu); 3] =
    [(DType::F32, Cpu::F32), (DType::Bf16, Cpu::F32), (DType::Bf16, Cpu::BF16)];

/// A golden model of that kind.
pub(crate) fn model_of(name: &str, (dtype, backend): (DType, Cpu)) -> Gemma<Cpu> {
    Gemma { backend, ..model(name, dtype) }
}

/// `n` token ids of the golden models that are no control tokens.
pub(crate) fn tokens(seed: u32, n: usize) -> Vec<u32> {
    randoms(seed, n).iter().map(|x| 3 + ((x + 1.0) * 64.0) as u32).collect()
}

/// Prompts and responses to each.
pub(crate) struct Groups(pub(crate) Vec<(Vec<u32>, Vec<Vec<u32>>)>);

impl Groups {
    /// Three prompts after one few-shot header, two of them equal, all longer than the golden models' windows;
    /// responses shorter and longer than these, down to one token, equal ones among them.
    pub(crate) fn few_shot() -> Self {
        let prompt = |own: &[u32]| [&[2][..], &tokens(1, 9), own].concat();
        let response = |seed: u32, len: usize| tokens(seed, len);
        Self(vec![
            (prompt(&tokens(2, 3)), vec![response(10, 1), response(11, 6), response(12, 13)]),
            (prompt(&tokens(2, 3)), vec![response(13, 2), response(10, 1)]),
            (
                prompt(&tokens(3, 1)),
                vec![response(14, 11), response(14, 11), response(15, 1), response(16, 5)],
            ),
        ])
    }

    /// Runs `f` on them.
    pub(crate) fn with<R>(&self, f: impl FnOnce(&[Continued]) -> R) -> R {
        let responses: Vec<Vec<&[u32]>> =
            self.0.iter().map(|(_, responses)| responses.iter().map(Vec::as_slice).collect()).collect();
        let groups = self.0.iter().zip(&responses);
        let groups: Vec<_> = groups.map(|((prompt, _), responses)| Continued { prompt, responses }).collect();
        f(&groups)
    }

    /// Every response with its prompt, on its own.
    pub(crate) fn separate(&self) -> impl Iterator<Item = Groups> {
        let each = |(prompt, responses): &(Vec<u32>, Vec<Vec<u32>>)| -> Vec<Groups> {
            responses.iter().map(|r| Groups(vec![(prompt.clone(), vec![r.clone()])])).collect()
        };
        self.0.iter().flat_map(each).collect::<Vec<_>>().into_iter()
    }

    /// Number of response tokens.
    pub(crate) fn predicted(&self) -> usize {
        self.0.iter().flat_map(|(_, responses)| responses).map(Vec::len).sum()
    }
}

/// Log-probs and gradient of L = -sum of weights * log-probs.
pub(crate) fn gradient<B: Backend>(
    model: &Gemma<B>,
    groups: &[Continued],
    temperature: f32,
    weights: &[f32],
) -> (Vec<f32>, Params<B::Tensor>) {
    let mut grads = Optimizer::new(model, &OptimizerSection::default(), 0).grads;
    let forward = Forward::new(model, groups, temperature);
    let logprobs = forward.logprobs.clone();
    assert_eq!(logprobs.len(), weights.len());
    forward.backward(model, weights, &mut grads);
    (logprobs, grads)
}

/// Every parameter's name and tensor.
pub(crate) fn named<B: Backend>(model: &Gemma<B>, tensors: &Params<Tensor>) -> Vec<(String, Tensor)> {
    let specs = full_plan(model);
    specs.tensors().into_iter().map(|s| s.name.clone()).zip(tensors.tensors().into_iter().cloned()).collect()
}
