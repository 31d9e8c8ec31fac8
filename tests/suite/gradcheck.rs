//! The backward pass of whole models against differences of the forward pass, with everything that training has:
//! shared prompts, repeated prompts, a temperature, weights of both signs.

use std::sync::{Arc, Mutex};

use bon_engine::adapter::AdapterFile;
use bon_engine::backend::DType;
use bon_engine::backend::cpu::Cpu;
use bon_engine::gemma::Gemma;
use bon_engine::train::policy::Forward;

use crate::delegating::{Delegating, HeldRoutes};
use crate::goldens::Golden;
use crate::lora::ADAPTERS;
use crate::ops::{randoms, wide};
use crate::tiny::{self, Groups, NAMES};

const TEMPERATURE: f32 = 0.7;

/// L = -sum of weights * log-probs.
fn loss(model: &Gemma<Delegating>, groups: &Groups, weights: &[f32]) -> f64 {
    let logprobs = groups.with(|groups| Forward::new(model, groups, TEMPERATURE).logprobs);
    -logprobs.iter().zip(weights).map(|(&l, &w)| f64::from(l) * f64::from(w)).sum::<f64>()
}

fn norm(x: &[f64]) -> f64 {
    x.iter().map(|x| x * x).sum::<f64>().sqrt()
}

/// A direction that sees both wrong entries and missing ones: the gradient at a random half of the entries, and random
/// numbers of the same size everywhere. Unit norm.
fn direction(seed: u32, gradient: &[f64]) -> Vec<f64> {
    let (half, noise) = (randoms(seed, gradient.len()), randoms(seed + 1, gradient.len()));
    let noise: Vec<f64> = noise.into_iter().map(f64::from).collect();
    let size = norm(gradient) / norm(&noise);
    let mixed: Vec<f64> =
        (0..noise.len()).map(|i| size * noise[i] + if half[i] > 0.0 { gradient[i] } else { 0.0 }).collect();
    let length = norm(&mixed);
    mixed.into_iter().map(|x| x / length).collect()
}

#[test]
fn every_gradient_is_the_slope_of_the_loss() {
    for name in NAMES {
        check(name, tiny::model(name, DType::F32));
    }
}

#[test]
fn every_gradient_of_an_adapter_is_the_slope_of_the_loss() {
    for (name, base) in ADAPTERS {
        let mut model = tiny::model(base, DType::F32);
        AdapterFile::open(&tiny::dir(name)).unwrap().load(&mut model).unwrap();
        check(name, model);
    }
}

/// Moves every trained parameter.
fn check(name: &str, model: Gemma<Cpu>) {
    let groups = Groups::few_shot();
    let Gemma { config, params, frozen, adapter_scale, .. } = model;
    let held = config.experts.map(|_| Arc::new(Mutex::new(HeldRoutes::new(config.layers.len()))));
    let backend = Delegating { held, ..Delegating::new() };
    let mut model = Gemma { backend, config, params, frozen, adapter_scale };
    // The first pass, all of whose activations are kept, so that tokens are sent to experts once in each layer.
    let weights = randoms(5, groups.predicted());
    let (_, gradients) = groups.with(|groups| tiny::gradient(&model, groups, TEMPERATURE, &weights));
    // How wrong a loss is: every log-prob as wrong as it may be, signs at random.
    let squares: f64 = weights.iter().map(|&w| f64::from(w).powi(2)).sum();
    let noise = Golden::open(name).logprob_error() / f64::from(TEMPERATURE) * squares.sqrt();
    for (i, (parameter, gradient)) in tiny::named(&model, &gradients).into_iter().enumerate() {
        if gradient.rows == 0 {
            continue; // not trained
        }
        let (start, gradient) = (model.params.tensors()[i].clone(), wide(&gradient));
        let along = direction(i as u32, &gradient);
        let slope: f64 = gradient.iter().zip(&along).map(|(g, d)| g * d).sum();

        // Central difference of fourth order. The step is as short as rounding permits if it may blur the slope by
        // 0.1% of the gradient's norm; so short, the formula's own error is nothing beside that.
        let allowed = 1e-3 * norm(&gradient);
        let h = (8.0 + 8.0 + 1.0 + 1.0) / 12.0 * noise / allowed;
        let mut at = |steps: f64| {
            let moved = wide(&start).into_iter().zip(&along).map(|(x, d)| (x + steps * h * d) as f32);
            model.params.tensors_mut()[i].as_f32_mut().copy_from_slice(&moved.collect::<Vec<_>>());
            loss(&model, &groups, &weights)
        };
        let got = (8.0 * (at(1.0) - at(-1.0)) - (at(2.0) - at(-2.0))) / (12.0 * h);
        assert!(
            (got - slope).abs() <= allowed,
            "{name}: {parameter}: the loss changes by {got}, the gradient says {slope}; allowed {allowed:e}"
        );
        *model.params.tensors_mut()[i] = start;
    }
}
