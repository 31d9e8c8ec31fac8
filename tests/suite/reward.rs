//! Reward models: losses, the score head, training on scored responses, and what it is to select by one.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use bon_engine::adapter::{AdapterFile, merged};
use bon_engine::backend::cpu::{Cpu, Tensor};
use bon_engine::backend::cuda::Cuda;
use bon_engine::backend::{Backend, DType};
use bon_engine::checkpoint::Checkpoint;
use bon_engine::device::DeviceError;
use bon_engine::eval::{
    Calibration, Problem, RankIntervals, Sample, calibrate, calibrate_with_intervals, evaluate,
};
use bon_engine::gemma::activations::Recompute;
use bon_engine::gemma::config::ConfigFile;
use bon_engine::gemma::{Gemma, Params};
use bon_engine::model_dir::{self, ModelDir, ModelRole, OpenError, Precision};
use bon_engine::objective::verifier::{Loss, loss};
use bon_engine::objective::{Kind, ObjectiveConfig, ObjectiveError, ScoredGroup, coefficients};
use bon_engine::plan::{Place, Plan, Purpose, Run};
use bon_engine::reward::{Forward, RewardError, Scorer, logits, probability};
use bon_engine::segments::Continued;
use bon_engine::train::config::{OptimizerSection, TrainConfig};
use bon_engine::train::error::TrainError;
use bon_engine::train::interrupt::Interrupt;
use bon_engine::train::optimizer::Optimizer;
use bon_engine::train::run::{Event, Outcome, run};
use bon_engine::train::snapshot::newest_valid;
use proptest::prelude::*;
use serde_json::{Value, json};

use crate::delegating::Delegating;
use crate::engine;
use crate::fixture::Fixture;
use crate::goldens::Golden;
use crate::kernels::{compiled, vm};
use crate::ops::{randoms, wide};
use crate::tiny::{self, Groups, KINDS};
use crate::tolerance::{DERIVATIVE_ERROR, assert_within, derivative, f32_error, relative_error};
use crate::training::{Workplace, checkpoint, metrics, train_on};

fn objective(loss: Loss) -> ObjectiveConfig {
    ObjectiveConfig { loss: Some(loss), ..ObjectiveConfig::new(Kind::Verifier, None) }
}

fn group(scores: &[f64], labels: &[f64]) -> ScoredGroup {
    ScoredGroup { scores: scores.into(), rewards: labels.into(), expert_score: None }
}

// --------------------------------------------------------------------------------------------------------- losses

proptest! {
    #[test]
    fn coefficients_are_the_slope_of_the_loss(
        scores in prop::collection::vec(-4.0f64..4.0, 1..7),
        labels in prop::collection::vec(0u8..5, 7),
        pairwise in any::<bool>(),
    ) {
        let labels: Vec<f64> = labels[..scores.len()].iter().map(|&y| f64::from(y) / 4.0).collect();
        let config = objective(if pairwise { Loss::Pairwise } else { Loss::Bernoulli });
        let found = coefficients(&config, &group(&scores, &labels)).unwrap().samples;
        let of = |scores: &[f64]| loss(&config, &group(scores, &labels)).unwrap();
        for (i, c) in found.iter().enumerate() {
            let slope = derivative(&of, &scores, i);
            prop_assert!((c + slope).abs() <= 8.0 * DERIVATIVE_ERROR, "{i}: {c}, slope {slope}");
        }
    }
}

#[test]
fn losses_are_what_they_are_called() {
    let ln = |x: f64| -x.ln();
    let sigma = |x: f64| 1.0 / (1.0 + (-x).exp());
    let close = |got: f64, want: f64| assert!((got - want).abs() < 1e-12, "{got}, want {want}");
    let (s, y) = ([0.3, -1.2, 2.0], [1.0, 0.0, 0.25]);
    let bernoulli = objective(Loss::Bernoulli);
    let want =
        (ln(sigma(0.3)) + ln(1.0 - sigma(-1.2)) + 0.25 * ln(sigma(2.0)) + 0.75 * ln(1.0 - sigma(2.0))) / 3.0;
    close(loss(&bernoulli, &group(&s, &y)).unwrap(), want);
    let pairwise = objective(Loss::Pairwise);
    // 1 > 0, 1 > 0.25, 0.25 > 0.
    let want = (ln(sigma(0.3 + 1.2)) + ln(sigma(0.3 - 2.0)) + ln(sigma(2.0 + 1.2))) / 3.0;
    close(loss(&pairwise, &group(&s, &y)).unwrap(), want);
    // It says nothing of what all of a group have in common.
    let found = coefficients(&pairwise, &group(&s, &y)).unwrap().samples;
    close(found.iter().sum(), 0.0);
    // The default.
    let unset = ObjectiveConfig::new(Kind::Verifier, None);
    assert_eq!(coefficients(&unset, &group(&s, &y)), coefficients(&bernoulli, &group(&s, &y)));
    // Logits far out, on the wrong side, where a probability is 0 or 1.
    let far = group(&[800.0, -800.0], &[0.0, 1.0]);
    for config in [&bernoulli, &pairwise] {
        assert!(loss(config, &far).unwrap() >= 800.0);
        let found = coefficients(config, &far).unwrap().samples;
        assert!(found[0] <= -0.5 && found[1] >= 0.5, "{found:?}");
    }
    assert!(probability(800.0) == 1.0 && probability(-800.0) == 0.0 && probability(0.0) == 0.5);
}

#[test]
fn groups_without_anything_to_compare_teach_nothing_by_pairs() {
    for labels in [[0.0; 3], [1.0; 3], [0.4; 3]] {
        let found = coefficients(&objective(Loss::Pairwise), &group(&[1.0, 2.0, 3.0], &labels)).unwrap();
        assert_eq!(found.samples, [0.0; 3]);
        let found = coefficients(&objective(Loss::Bernoulli), &group(&[1.0, 2.0, 3.0], &labels)).unwrap();
        assert!(found.samples.iter().all(|&c| c != 0.0));
    }
}

#[test]
fn labels_and_scores_that_are_none_are_refused() {
    let bernoulli = objective(Loss::Bernoulli);
    for (i, bad) in [-0.1, 1.5].into_iter().enumerate() {
        let error = coefficients(&bernoulli, &group(&[0.0, 0.0], &[1.0, bad])).unwrap_err();
        assert_eq!(error, ObjectiveError::Label { index: 1, value: bad }, "{i}");
        assert!(error.to_string().contains("take \"pairwise\""), "{error}");
        coefficients(&objective(Loss::Pairwise), &group(&[0.0, 0.0], &[1.0, bad])).unwrap();
    }
    for bad in [f64::NAN, f64::INFINITY] {
        for (scores, labels, field) in
            [([bad, 0.0], [0.0, 1.0], "scores"), ([0.0, 0.0], [bad, 1.0], "rewards")]
        {
            let error = coefficients(&bernoulli, &group(&scores, &labels)).unwrap_err();
            assert!(
                matches!(error, ObjectiveError::NonFinite { field: f, index: 0, .. } if f == field),
                "{error}"
            );
        }
    }
    let error = ObjectiveConfig { loss: Some(Loss::Pairwise), ..ObjectiveConfig::new(Kind::Rl, None) };
    assert!(error.validate().unwrap_err().to_string().contains("`loss` has no effect on objective `rl`"));
}

// ---------------------------------------------------------------------------------------------------- calibration

/// The intervals are as wide as resamples of the problems vary, where samples of a problem are alike: much wider than if they were not.
#[test]
fn intervals_of_ranks_are_over_problems() {
    const PROBLEMS: usize = 80;
    const SAMPLES: usize = 8;
    let numbers = randoms(9, PROBLEMS * (1 + 2 * SAMPLES));
    let (of_problem, of_sample) = numbers.split_at(PROBLEMS);
    let of = |score: f64, correct: bool| Sample { score, correct, answer: None, tokens: 1, truncated: false };
    let problem = |p: usize| {
        let sample = |i: usize| {
            let [noise, luck] = [0, 1].map(|j| f64::from(of_sample[2 * (SAMPLES * p + i) + j]));
            let ease = f64::from(of_problem[p]);
            of(ease + 0.1 * noise, ease + 0.5 * luck > 0.0)
        };
        Problem { id: p.to_string(), samples: (0..SAMPLES).map(sample).collect() }
    };
    let problems: Vec<Problem> = (0..PROBLEMS).map(problem).collect();
    let found = calibrate_with_intervals(&problems, 5);
    let half = |interval: Option<[f64; 2]>| interval.map(|[low, high]| (high - low) / 2.0).unwrap();
    let spread = |problems: &[Problem], figure: &dyn Fn(&Calibration) -> f64| {
        let draws = randoms(11, 400 * problems.len());
        let picked = draws.chunks(problems.len()).map(|draw| {
            let at = |x: &f32| ((f64::from(*x) + 1.0) / 2.0 * problems.len() as f64) as usize;
            figure(&calibrate(&draw.iter().map(|x| problems[at(x)].clone()).collect::<Vec<_>>()))
        });
        let all: Vec<f64> = picked.collect();
        let mean = all.iter().sum::<f64>() / all.len() as f64;
        2.0 * (all.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / (all.len() - 1) as f64).sqrt()
    };
    // 400 resamples know their spread to 3.5 %; the formula is of first order, and the interval 2 % narrower.
    for (what, interval, want) in [
        ("all", half(found.intervals.auc), spread(&problems, &|c| c.auc.unwrap())),
        ("within", half(found.intervals.pair_accuracy), spread(&problems, &|c| c.pair_accuracy.unwrap())),
    ] {
        assert!((interval / want - 1.0).abs() < 0.15, "{what}: {interval}, want {want}");
    }
    let alone: Vec<Problem> = problems
        .iter()
        .flat_map(|problem| {
            problem.samples.iter().map(|sample| Problem { id: "1".into(), samples: vec![sample.clone()] })
        })
        .collect();
    let as_if_alone = half(calibrate_with_intervals(&alone, 5).intervals.auc);
    let width = half(found.intervals.auc);
    assert!(width > 1.4 * as_if_alone, "{width}, {as_if_alone}");
    assert_eq!(calibrate(&problems).intervals, RankIntervals::default());
    assert_eq!(calibrate_with_intervals(&problems[..1], 5).intervals, RankIntervals::default());
}

/// By their definitions, over all pairs.
#[test]
fn calibration_is_what_all_pairs_say() {
    let numbers = randoms(7, 120);
    let sample = |i: usize| Sample {
        // Ties among them.
        score: (f64::from(numbers[2 * i] + 1.0) * 10.0).round() / 20.0,
        correct: numbers[2 * i + 1] > 0.2,
        answer: None,
        tokens: 1,
        truncated: false,
    };
    let problems: Vec<Problem> = (0..6)
        .map(|p| Problem { id: p.to_string(), samples: (0..10).map(|i| sample(10 * p + i)).collect() })
        .collect();
    let wins = |samples: &[Sample]| {
        let (mut sum, mut count) = (0.0, 0.0);
        for a in samples.iter().filter(|s| s.correct) {
            for b in samples.iter().filter(|s| !s.correct) {
                sum += if a.score > b.score {
                    1.0
                } else if a.score == b.score {
                    0.5
                } else {
                    0.0
                };
                count += 1.0;
            }
        }
        (count > 0.0).then_some(sum / count)
    };
    let all: Vec<Sample> = problems.iter().flat_map(|p| p.samples.clone()).collect();
    let found = calibrate(&problems);
    let close = |got: f64, want: f64| assert!((got - want).abs() < 1e-12, "{got}, want {want}");
    close(found.auc.unwrap(), wins(&all).unwrap());
    let within: Vec<f64> = problems.iter().filter_map(|p| wins(&p.samples)).collect();
    close(found.pair_accuracy.unwrap(), within.iter().sum::<f64>() / within.len() as f64);
    assert_eq!((found.samples, all.len()), (60, 60));
    let p = found.probabilities.unwrap();
    let mean = |f: &dyn Fn(&Sample) -> f64| all.iter().map(f).sum::<f64>() / 60.0;
    let one = |correct: bool| if correct { 1.0 } else { 0.0 };
    close(p.brier, mean(&|s| (s.score - one(s.correct)).powi(2)));
    close(p.accuracy, mean(&|s| one((s.score >= 0.5) == s.correct)));
    let mut bins: BTreeMap<usize, Vec<&Sample>> = BTreeMap::new();
    for s in &all {
        bins.entry(((s.score * 10.0).floor() as usize).min(9)).or_default().push(s);
    }
    let gap = |bin: &Vec<&Sample>| {
        let n = bin.len() as f64;
        let (score, right): (f64, f64) =
            (bin.iter().map(|s| s.score).sum(), bin.iter().map(|s| one(s.correct)).sum());
        (score / n - right / n).abs() * n / 60.0
    };
    close(p.ece, bins.values().map(gap).sum());
    assert_eq!(
        p.bins.iter().map(|b| b.samples).collect::<Vec<_>>(),
        bins.values().map(Vec::len).collect::<Vec<_>>()
    );

    // A score that is no probability says nothing as one; with one kind of sample alone there is nothing to tell apart.
    let of = |score: f64, correct: bool| Sample { score, correct, answer: None, tokens: 1, truncated: false };
    let only = |samples: Vec<Sample>| calibrate(&[Problem { id: "1".into(), samples }]);
    let beyond = only(vec![of(3.0, true), of(-2.0, false)]);
    assert!(beyond.probabilities.is_none() && beyond.auc == Some(1.0), "{beyond:?}");
    let right = only(vec![of(0.1, true), of(0.9, true)]);
    assert!(right.auc.is_none() && right.pair_accuracy.is_none() && right.probabilities.is_some());
}

/// A verifier that overrates one wrong response is found out as N grows: what it chooses is that one ever more often.
#[test]
fn a_report_tells_where_best_of_n_falls() {
    let of = |score: f64, correct: bool| Sample { score, correct, answer: None, tokens: 1, truncated: false };
    let report = |samples: Vec<Sample>| {
        let problems: Vec<Problem> =
            (0..2).map(|i| Problem { id: i.to_string(), samples: samples.clone() }).collect();
        let mut report = evaluate(&problems, &[1, 2, 4, 8], 0).unwrap();
        report.calibration = Some(calibrate(&problems));
        report
    };
    let mut samples = vec![of(0.6, true); 4];
    samples.extend(vec![of(0.2, false); 3]);
    samples.push(of(0.9, false));
    let table = report(samples.clone()).to_table();
    // Of two: right unless both are low or one is the overrated: 1 - (3 + 7) / 28. Of all eight it is chosen for certain.
    assert!(table.contains("best-of-N is highest at 0.643 at N = 2 and falls to 0.000 at N = 8"), "{table}");
    assert!(table.contains("it misses 1.000 of pass@N") && table.contains("0.9 to 1.0"), "{table}");
    samples.pop();
    samples.push(of(0.1, false));
    let table = report(samples.clone()).to_table();
    assert!(table.contains("best-of-N does not fall as N grows; 1.000 at N = 8"), "{table}");
    // Before and after, both ways.
    let (good, bad) = (
        report(samples),
        report(vec![
            of(0.5, true),
            of(0.6, false),
            of(0.7, false),
            of(0.1, true),
            of(0.2, true),
            of(0.3, true),
            of(0.4, true),
            of(0.45, true),
        ]),
    );
    let text = bad.compare(&good).unwrap().to_table();
    let row = text.lines().find(|line| line.contains("within a problem")).unwrap_or_else(|| panic!("{text}"));
    assert!(
        row.trim_start().starts_with("the same within a problem") && row.trim_end().ends_with("1.000"),
        "{text}"
    );
}

// ----------------------------------------------------------------------------------------------------------- model

/// A golden model with a score head of random numbers.
fn scoring<B: Backend>(model: Gemma<B>) -> Gemma<B> {
    let d = model.config.hidden_size;
    let w: Vec<f32> = randoms(90, d).iter().map(|x| x * (3.0 / d as f32).sqrt()).collect();
    with_head(model, &w)
}

fn with_head<B: Backend>(mut model: Gemma<B>, w: &[f32]) -> Gemma<B> {
    let dtype = model.backend.dtype(&model.params.embed);
    let head = bon_engine::gemma::lora::upload(&model.backend, dtype, 1, w.len(), w);
    model.params.score = Some(head);
    model.config.score_head = true;
    model
}

fn gradient<B: Backend>(
    model: &Gemma<B>,
    groups: &[Continued],
    c: &[f64],
    recompute: Recompute,
) -> (Vec<f64>, Params<B::Tensor>) {
    let mut grads = Optimizer::new(model, &OptimizerSection::default(), 0).grads;
    let forward = Forward::new(model, groups, recompute);
    let s = forward.logits.clone();
    forward.backward(model, c, &mut grads);
    (s, grads)
}

/// Logits, the loss and every gradient, the head's too, as Transformers' sequence classifiers have them.
#[test]
fn logits_and_gradients_are_those_of_transformers() {
    for (name, base) in [("score_gemma3", "gemma3"), ("score_wrapper", "gemma3_wrapper")] {
        let (golden, of_base) = (Golden::open(name), Golden::open(base));
        let w: Vec<f32> = golden.floats("score.weight").iter().map(|&x| x as f32).collect();
        let model = with_head(tiny::model(base, DType::F32), &w);
        let labels = golden.floats("labels");
        let want = golden.floats("scores");
        let config = objective(Loss::Bernoulli);
        let (s, grads) = golden.with_batch(|groups| {
            let s = logits(&model, groups).unwrap();
            let c = coefficients(&config, &group(&s, &labels)).unwrap().samples;
            gradient(&model, groups, &c, Recompute::Auto)
        });
        // What the last layer leaves is as wrong as the logits of tokens are, relative to its size; a row of w has size 1.
        let relative = of_base.gradient_error() / 2.0;
        let size = want.iter().map(|s| s.abs()).fold(1.0, f64::max) * (w.len() as f64).sqrt();
        let got: Vec<f32> = s.iter().map(|&s| s as f32).collect();
        assert_within(name, &got, &want, |_| relative * size);
        let found = loss(&config, &group(&s, &labels)).unwrap();
        assert!((found - golden.number("/loss")).abs() <= relative * size, "{name}: loss {found}");
        let named = tiny::named(&model, &grads);
        assert!(named.iter().any(|(name, _)| name == "score.weight"));
        for (parameter, grad) in named {
            let off = relative_error(grad.as_f32(), &golden.floats(&format!("grad.{parameter}")));
            // Coefficients are as wrong as logits.
            let allowed = of_base.gradient_error() + relative * size;
            assert!(off <= allowed, "{name}: grad.{parameter} is off by {off:e}, allowed {allowed:e}");
        }
    }
}

/// The backward pass against differences of the forward pass, for the head and for matrices of every kind.
#[test]
fn every_gradient_is_the_slope_of_the_scores() {
    for name in ["gemma1", "gemma2", "gemma3"] {
        let Gemma { config, params, frozen, .. } = scoring(tiny::model(name, DType::F32));
        let mut model = Gemma { backend: Delegating::new(), config, params, frozen, adapter_scale: None };
        let groups = Groups::few_shot();
        let count: usize = groups.0.iter().map(|(_, responses)| responses.len()).sum();
        let c: Vec<f64> = randoms(4, count).into_iter().map(f64::from).collect();
        let (_, grads) = groups.with(|groups| gradient(&model, groups, &c, Recompute::None));
        let sum = |model: &Gemma<Delegating>| {
            let s = groups.with(|groups| logits(model, groups)).unwrap();
            -s.iter().zip(&c).map(|(s, c)| s * c).sum::<f64>()
        };
        // A logit is as wrong as hidden states are: of D columns that err independently it is a sum of the size of one, which is
        // about 1, with a w of norm 1.
        let noise = Golden::open(name).gradient_error() / 2.0 * (count as f64).sqrt();
        let norm = |x: &[f64]| x.iter().map(|x| x * x).sum::<f64>().sqrt();
        for (i, (parameter, gradient)) in tiny::named(&model, &grads).into_iter().enumerate() {
            let (start, gradient) = (model.params.tensors()[i].clone(), wide(&gradient));
            let other: Vec<f64> = randoms(i as u32, gradient.len()).into_iter().map(f64::from).collect();
            let (size, length) = (norm(&gradient), norm(&other));
            let along: Vec<f64> = gradient.iter().zip(&other).map(|(g, o)| g / size + o / length).collect();
            let slope: f64 = gradient.iter().zip(&along).map(|(g, d)| g * d).sum();
            let allowed = 2e-3 * size;
            let h = 1.5 * noise / allowed;
            let mut at = |steps: f64| {
                let moved: Vec<f32> =
                    wide(&start).iter().zip(&along).map(|(x, d)| (x + steps * h * d) as f32).collect();
                model.params.tensors_mut()[i].as_f32_mut().copy_from_slice(&moved);
                sum(&model)
            };
            let got = (8.0 * (at(1.0) - at(-1.0)) - (at(2.0) - at(-2.0))) / (12.0 * h);
            assert!(
                (got - slope).abs() <= allowed,
                "{name}: {parameter}: the scores change by {got}, the gradient says {slope}; allowed {allowed:e}"
            );
            *model.params.tensors_mut()[i] = start;
        }
    }
}

fn bits(x: &[f64]) -> Vec<u64> {
    x.iter().map(|x| x.to_bits()).collect()
}

/// A score depends on the prompt and the response alone, in scoring and in training.
fn assert_scores_alone<B: Backend>(what: &str, model: &Gemma<B>, groups: &Groups) {
    let together = groups.with(|groups| logits(model, groups)).unwrap();
    let alone: Vec<f64> =
        groups.separate().flat_map(|g| g.with(|groups| logits(model, groups)).unwrap()).collect();
    assert_eq!(bits(&together), bits(&alone), "{what}");
    let trained = groups.with(|groups| Forward::new(model, groups, Recompute::All).logits);
    assert_eq!(bits(&together), bits(&trained), "{what}: training");
    assert!(together.windows(2).any(|pair| pair[0] != pair[1]), "{what}: all scores are equal");
}

#[test]
fn a_score_depends_on_its_own_tokens_alone() {
    for name in ["gemma1", "gemma2", "gemma3", "gemma3_wrapper"] {
        for kind in KINDS {
            let model = scoring(tiny::model_of(name, kind));
            assert_scores_alone(name, &model, &Groups::few_shot());
        }
    }
}

#[test]
fn a_score_depends_on_its_own_tokens_alone_on_the_kernels() {
    if !compiled() {
        return;
    }
    for family in ["gemma2", "gemma3_text"] {
        let on = |backend: Cuda| scoring(engine::model(backend, &engine::config(family)));
        let model = on(vm(None));
        assert_scores_alone(family, &model, &Groups::few_shot());
        // Near the CPU's in f32: bf16 rounds every activation, of a dozen to a path, by up to 2^-9.
        let cpu = scoring(engine::model(Cpu::F32, &engine::config(family)));
        let (got, want) = (
            Groups::few_shot().with(|groups| logits(&model, groups)).unwrap(),
            Groups::few_shot().with(|groups| logits(&cpu, groups)).unwrap(),
        );
        let spread = want.iter().map(|s| s.abs()).fold(0.0, f64::max);
        for (a, b) in got.iter().zip(&want) {
            assert!((a - b).abs() <= 24.0 / 512.0 * spread, "{family}: {got:?}, want {want:?}");
        }
    }
}

#[test]
fn recomputation_changes_no_gradient() {
    let model = scoring(tiny::model("gemma3", DType::F32));
    let groups = Groups::few_shot();
    let count: usize = groups.0.iter().map(|(_, responses)| responses.len()).sum();
    let c: Vec<f64> = randoms(4, count).into_iter().map(f64::from).collect();
    let of = |recompute| {
        let (s, grads) = groups.with(|groups| gradient(&model, groups, &c, recompute));
        let grads =
            grads.tensors().iter().flat_map(|g| g.as_f32().to_vec()).map(f32::to_bits).collect::<Vec<_>>();
        (bits(&s), grads)
    };
    assert!(of(Recompute::None) == of(Recompute::All));
}

/// Memory for so little that every response is scored on its own.
#[test]
fn what_there_is_room_for_changes_no_score() {
    let Gemma { config, params, frozen, .. } = scoring(tiny::model("gemma3", DType::F32));
    let mut model = Gemma { backend: Delegating::new(), config, params, frozen, adapter_scale: None };
    let groups = Groups::few_shot();
    let want = groups.with(|groups| logits(&model, groups)).unwrap();
    for bytes in [0, 20_000, 60_000, 200_000] {
        model.backend.generation_bytes = bytes;
        let got = groups.with(|groups| logits(&model, groups)).unwrap();
        assert_eq!(bits(&got), bits(&want), "{bytes} bytes");
    }
}

#[test]
fn a_reward_model_that_has_diverged_or_is_too_small_says_so() {
    let mut model = scoring(tiny::model("gemma3", DType::F32));
    let long = Groups(vec![(vec![2], vec![tiny::tokens(1, 64)])]);
    let error = long.with(|groups| logits(&model, groups)).unwrap_err();
    assert_eq!(error, RewardError::TooLong { tokens: 65, context: 64 });
    let d = model.config.hidden_size;
    model.params.score = Some(Tensor::f32(1, d, vec![f32::NAN; d]));
    let error = Groups::few_shot().with(|groups| logits(&model, groups)).unwrap_err();
    assert!(matches!(error, RewardError::NotFinite { .. }), "{error}");
    let gone = RewardError::Device(DeviceError::out_of_memory("cuda:0", "out of memory"));
    assert!(gone.to_string().contains("sample fewer responses"), "{gone}");
}

// -------------------------------------------------------------------------------------------------------- training

/// Words whose first letter is an e are right. Lines as `eval --save-samples` writes them, but for tokens.
fn labelled(prompts: &[&str], seed: u32) -> String {
    let words = ["eel", "ever", "end", "ant", "bee", "zeal", "yes", "eve"];
    let line = |(i, prompt): (usize, &&str)| {
        let responses: Vec<Value> = (0..6)
            .map(|j| {
                let word = words[(seed as usize + 3 * i + 5 * j + j * j) % words.len()];
                json!({ "text": word, "score": if word.starts_with('e') { 1.0 } else { 0.0 } })
            })
            .collect();
        format!("{}\n", json!({ "prompt": prompt, "responses": responses }))
    };
    prompts.iter().enumerate().map(line).collect()
}

/// A configuration of the place that trains a verifier, with files of labels.
fn verifying(place: &Workplace, output: &str, overrides: &[&str]) -> TrainConfig {
    fs::write(place.path("scored.jsonl"), labelled(&["first", "second", "third", "fourth"], 0)).unwrap();
    fs::write(place.path("held-out.jsonl"), labelled(&["fifth", "sixth"], 1)).unwrap();
    let text = format!(
        r#"
        model.path = "{}"
        data.tasks = "{}"
        data.eval_tasks = "{}"
        data.prefix = "a shared beginning, "
        generate.prompts_per_step = 2
        objective.kind = "verifier"
        optimizer.lr = 3e-3
        train = {{ steps = 6, seed = 3, output = "{}" }}
        "#,
        place.path("model").display(),
        place.path("scored.jsonl").display(),
        place.path("held-out.jsonl").display(),
        place.path(output).display(),
    );
    let overrides: Vec<String> = overrides.iter().map(|s| s.to_string()).collect();
    TrainConfig::parse("run.toml", &text, &overrides).unwrap()
}

fn finish(config: &TrainConfig) -> Outcome {
    let outcome = run(Cpu::F32, config, false, &Interrupt::default(), |_| {});
    outcome.unwrap_or_else(|e| panic!("{:#}", anyhow::Error::from(e)))
}

fn failure(config: &TrainConfig) -> String {
    let error = run(Cpu::F32, config, false, &Interrupt::default(), |_| {}).unwrap_err();
    format!("{:#}", anyhow::Error::from(error))
}

fn model_of(config: &TrainConfig) -> PathBuf {
    newest_valid(&config.train.output.join("checkpoints")).unwrap().snapshot.unwrap().model_dir()
}

#[test]
fn a_verifier_learns_which_responses_are_right() {
    let place = Workplace::new();
    for (name, settings) in [
        ("bernoulli", &["train.steps=60", "train.gradient_accumulation=2"][..]),
        ("pairwise", &["train.steps=60", "objective.loss=pairwise"]),
        ("lora", &["train.steps=120", "lora.rank=4", "optimizer.lr=2e-2"]),
    ] {
        let config = verifying(&place, name, settings);
        let comparison = finish(&config).comparison.expect("there are responses to evaluate on");
        let (before, after) = comparison.calibration.expect("scores and labels differ");
        assert!(before.auc == Some(0.5) && before.mean_score == 0.5, "{name}: a head of zeros: {before:?}");
        assert!(after.auc.unwrap() > 0.9 && after.pair_accuracy.unwrap() > 0.9, "{name}: {after:?}");
        let best = comparison.figures.best_of_n.last().unwrap();
        assert!(best.after.mean > 0.99 && best.difference.mean > 0.1, "{name}: {best:?}");
        let steps = metrics(&config.train.output);
        let first = &steps[0]["verifier"];
        assert!(first["responses"] == 12 && first["auc"] == 0.5, "{first}");
        if name != "pairwise" {
            assert!((steps[0]["loss"].as_f64().unwrap() - std::f64::consts::LN_2).abs() < 1e-12, "{name}");
        }
        if name == "bernoulli" {
            let p = after.probabilities.unwrap();
            assert!(p.accuracy > 0.9 && p.brier < 0.1, "{name}: {p:?}");
        }
        let last = steps.last().unwrap();
        assert!(last["loss"].as_f64().unwrap() < 0.3, "{name}: {last}");
    }
}

#[test]
fn a_resumed_verifier_is_the_uninterrupted_one() {
    let place = Workplace::new();
    for (name, state) in [
        ("f32", &["model.dtype=f32", "train.updates_per_batch=2"][..]),
        ("bf16", &["model.dtype=bf16", "objective.loss=pairwise"]),
        ("small", &["model.dtype=bf16", "optimizer.moments=8bit", "optimizer.masters=false"]),
        ("lora", &["lora.rank=3"]),
    ] {
        let settings =
            [&["train.save_every=2", "optimizer.schedule=cosine", "train.eval_every=2"][..], state].concat();
        let whole = verifying(&place, &format!("{name}-whole"), &settings);
        let parts = verifying(&place, &format!("{name}-parts"), &settings);
        train_on(Cpu::F32, &whole, false, 6);
        assert_eq!(train_on(Cpu::F32, &parts, false, 3).len(), 3);
        assert_eq!(train_on(Cpu::F32, &parts, true, 6)[0].step, 4);
        assert_eq!(metrics(&parts.train.output), metrics(&whole.train.output), "{name}");
        let newest = |config: &TrainConfig| {
            let snapshot = newest_valid(&config.train.output.join("checkpoints")).unwrap().snapshot.unwrap();
            let optimizer = fs::read(snapshot.optimizer_path()).unwrap();
            let weights = fs::read_dir(snapshot.model_dir()).unwrap().map(|f| f.unwrap().path());
            let weights = weights.filter(|p| p.extension().is_some_and(|e| e == "safetensors"));
            (optimizer, weights.map(|p| fs::read(p).unwrap()).collect::<Vec<_>>())
        };
        assert!(newest(&parts) == newest(&whole), "{name}: other weights or moments");
    }
}

#[test]
fn on_the_kernels_a_verifier_trains_and_resumes() {
    if !compiled() {
        return;
    }
    let place = Workplace::for_kernels();
    // All groups in every step, so that the second is on what the first learnt from.
    let settings = ["train.steps=2", "train.save_every=1", "generate.prompts_per_step=4"];
    let of = |output: &str| {
        let mut config = verifying(&place, output, &settings);
        config.data.eval_tasks = None;
        config
    };
    let (whole, parts) = (of("whole"), of("parts"));
    let steps = train_on(vm(None), &whole, false, 2);
    assert!((steps[0].loss - std::f64::consts::LN_2).abs() < 1e-12 && steps[0].grad_norm > 0.0, "{steps:?}");
    assert!(steps[1].loss < steps[0].loss, "{steps:?}");
    train_on(vm(None), &parts, false, 1);
    train_on(vm(None), &parts, true, 2);
    assert!(checkpoint(&parts) == checkpoint(&whole), "other weights or moments");
    assert_eq!(metrics(&parts.train.output), metrics(&whole.train.output));
    // The CPU takes the same first step within what bf16 allows.
    let cpu = train_on(Cpu::F32, &of("cpu"), false, 2);
    let off = (cpu[0].grad_norm - steps[0].grad_norm).abs() / cpu[0].grad_norm;
    assert!(off < 24.0 / 512.0, "gradient norms {} and {}", cpu[0].grad_norm, steps[0].grad_norm);
}

/// What is saved is what Transformers' class for sequence classification reads, opens as a reward model, and as nothing else.
#[test]
fn a_saved_reward_model_is_a_sequence_classifier() {
    let place = Workplace::new();
    let config = verifying(&place, "run", &["train.steps=3"]);
    finish(&config);
    let dir = model_of(&config);
    let json: Value = serde_json::from_slice(&fs::read(dir.join("config.json")).unwrap()).unwrap();
    assert_eq!(json["architectures"], json!(["Gemma3TextForSequenceClassification"]));
    assert_eq!(json["id2label"].as_object().unwrap().len(), 1);
    let weights = Checkpoint::open(&dir).unwrap();
    let d = json["hidden_size"].as_u64().unwrap() as usize;
    assert_eq!(weights.tensor("score.weight").unwrap().shape, [1, d]);
    assert!(weights.tensor("score.weight").unwrap().bytes.iter().any(|&b| b != 0), "it has learnt nothing");

    let opened = ModelDir::open_as(ModelRole::Reward, Cpu::F32, &dir, Precision::default()).unwrap();
    assert!(opened.config.gemma.score_head);
    let error = ModelDir::open(Cpu::F32, &dir, Precision::default()).err().expect("it writes no responses");
    assert!(matches!(error, OpenError::RewardModel { .. }), "{error}");
    let base = place.path("model");
    let error = ModelDir::open_as(ModelRole::Reward, Cpu::F32, &base, Precision::default()).err().unwrap();
    assert!(matches!(error, OpenError::NoScoreHead { .. }), "{error}");
    assert!(error.to_string().contains("objective.kind = \"verifier\""), "{error}");
    // A run goes on from a reward model, with its head.
    let path = format!("model.path={}", dir.display());
    let further = verifying(&place, "further", &["train.steps=1", "optimizer.lr=1e-30", &path]);
    let comparison = finish(&further).comparison.unwrap();
    let (before, after) = comparison.calibration.unwrap();
    assert!(before == after && before.mean_score != 0.5, "{before:?}, {after:?}");
}

/// Of a vision-and-text model it is the classifier around the whole, with the names and the towers that it has.
#[test]
fn a_reward_model_inside_a_multimodal_model_keeps_its_parts() {
    let dir = tiny::dir("gemma3_wrapper");
    let config = ConfigFile::open(&dir).unwrap().with_score_head().unwrap();
    let model = scoring(tiny::model("gemma3_wrapper", DType::F32));
    let out = tempfile::tempdir().unwrap();
    let out = out.path().join("reward");
    model_dir::save(&Cpu::F32, &config, &model.params, &dir, &out).unwrap();
    let json: Value = serde_json::from_slice(&fs::read(out.join("config.json")).unwrap()).unwrap();
    assert_eq!(json["architectures"], json!(["Gemma3ForSequenceClassification"]));
    let (old, new) = (Checkpoint::open(&dir).unwrap(), Checkpoint::open(&out).unwrap());
    let mut names: Vec<&str> = old.names().collect();
    names.push("score.weight");
    names.sort_unstable();
    let saved: Vec<&str> = new.names().filter(|name| *name != "lm_head.weight").collect();
    names.retain(|name| *name != "lm_head.weight");
    assert_eq!(saved, names);
    let again = ConfigFile::open(&out).unwrap();
    assert!(again.gemma.score_head && again.wrapped);
    let weights = model_dir::open_weights(&out, &again).unwrap();
    let params = bon_engine::gemma::params::load(&Cpu::F32, &again.gemma, &weights, None).unwrap();
    assert_eq!(params.score.unwrap().as_f32(), model.params.score.as_ref().unwrap().as_f32());
}

/// Of a model with an LM head of its own nothing remains of that.
#[test]
fn a_reward_model_has_no_lm_head() {
    let place = Workplace::new();
    let ModelDir { mut model, config, .. } =
        ModelDir::open(Cpu::F32, &place.path("model"), Precision::default()).unwrap();
    model.params.head = Some(model.params.embed.clone());
    let untied = place.path("untied");
    model_dir::save(&Cpu::F32, &config.untied(), &model.params, &place.path("model"), &untied).unwrap();
    let path = format!("model.path={}", untied.display());
    let run = verifying(&place, "run", &["train.steps=1", &path]);
    finish(&run);
    let snapshot = newest_valid(&run.train.output.join("checkpoints")).unwrap().snapshot.unwrap();
    let dir = snapshot.model_dir();
    assert!(Checkpoint::open(&dir).unwrap().tensor("lm_head.weight").is_none());
    let reward = ModelDir::open_as(ModelRole::Reward, Cpu::F32, &dir, Precision::default()).unwrap();
    assert!(reward.model.params.head.is_none() && reward.model.params.score.is_some());
}

#[test]
fn families_without_a_classifier_are_refused() {
    let place = Workplace::new();
    for name in ["gemma4", "vaultgemma"] {
        assert!(ConfigFile::open(&tiny::dir(name)).unwrap().with_score_head().is_none(), "{name}");
    }
    let gemma4 = place.path("gemma4");
    fs::create_dir(&gemma4).unwrap();
    for entry in fs::read_dir(tiny::dir("gemma4")).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, gemma4.join(path.file_name().unwrap())).unwrap();
    }
    fs::copy(place.path("model/tokenizer.json"), gemma4.join("tokenizer.json")).unwrap();
    let path = format!("model.path={}", gemma4.display());
    let text = failure(&verifying(&place, "run", &[&path]));
    assert!(text.contains("no sequence classifier of gemma4_text"), "{text}");
}

/// An adapter and its head become one reward model, by the same scores but for rounding.
#[test]
fn an_adapter_of_a_reward_model_merges_into_one() {
    let place = Workplace::new();
    let config = verifying(&place, "run", &["train.steps=8", "lora.rank=4", "optimizer.lr=1e-2"]);
    finish(&config);
    let (adapter, base) = (model_of(&config), place.path("model"));
    let json: Value =
        serde_json::from_slice(&fs::read(adapter.join("adapter_config.json")).unwrap()).unwrap();
    assert_eq!(
        (&json["task_type"], &json["modules_to_save"]),
        (&json!("SEQ_CLS"), &json!(["classifier", "score"]))
    );
    assert!(AdapterFile::open(&adapter).unwrap().scores());
    let open = || ModelDir::open_as(ModelRole::NewReward, Cpu::F32, &base, Precision::default()).unwrap();
    let adapted = open().with_adapter(Some(&adapter)).unwrap();
    let groups = Groups(vec![(vec![2, 9, 10], vec![vec![11, 12], vec![13], vec![30, 31, 1]])]);
    let want = groups.with(|groups| logits(&adapted.model, groups)).unwrap();
    assert!(want[0] != want[1], "{want:?}");
    let got = groups.with(|groups| logits(&merged(adapted.model), groups)).unwrap();
    let size = want.iter().map(|s| s.abs()).fold(1.0, f64::max);
    assert!(got.iter().zip(&want).all(|(a, b)| (a - b).abs() < f32_error(size)), "{got:?}, want {want:?}");
    // A model that writes responses takes no such adapter, and a reward model no other.
    let policy = ModelDir::open(Cpu::F32, &base, Precision::default()).unwrap();
    let error = policy.with_adapter(Some(&adapter)).err().unwrap().to_string();
    assert!(error.contains("score.weight: it is of a reward model"), "{error}");
}

#[test]
fn hostile_labels_are_told_by_their_line() {
    let place = Workplace::new();
    let good = json!({ "prompt": "first", "responses": [{ "text": "eel", "score": 1 }, { "text": "a", "score": 0 }] });
    for (line, said) in [
        (json!({ "prompt": "x" }), "field `responses` is missing"),
        (json!({ "prompt": "x", "responses": [] }), "field `responses` is empty"),
        (json!({ "prompt": "x", "responses": "eel" }), "field `responses` is no list"),
        (json!({ "prompt": "x", "responses": ["eel"] }), "field `responses[0]` is no object"),
        (json!({ "prompt": "x", "responses": [{ "score": 1 }] }), "field `responses[0].text` is missing"),
        (
            json!({ "prompt": "x", "responses": [{ "text": "e", "score": null }] }),
            "`responses[0].score` is missing or no number",
        ),
        (
            json!({ "prompt": "x", "responses": [{ "text": "e" }] }),
            "leave a response out that could not be judged",
        ),
        (
            json!({ "prompt": "x", "responses": [{ "text": "e", "score": 1.5 }] }),
            "`responses[0].score` is 1.5; with objective.loss",
        ),
        (
            json!({ "prompt": "x", "responses": [{ "text": "e", "score": 1, "tokens": [1000] }] }),
            "`responses[0].tokens` is no list of token ids below",
        ),
        (
            json!({ "prompt": "x", "responses": [{ "text": "e", "score": 1, "tokens": [] }] }),
            "`responses[0].tokens` is no list",
        ),
        (
            json!({ "prompt": "x", "responses": [{ "text": "e", "score": 1, "tokens": [9] }] }),
            "are not those of `text`",
        ),
        (
            json!({ "prompt": "x", "responses": [{ "text": "e".repeat(80), "score": 1 }] }),
            "leave the response out",
        ),
        (json!({ "responses": [{ "text": "e", "score": 1 }] }), "field `prompt` is missing"),
    ] {
        let config = verifying(&place, "run", &[]);
        fs::write(place.path("scored.jsonl"), format!("{good}\n{line}\n")).unwrap();
        let text = failure(&config);
        assert!(text.contains("scored.jsonl:2") && text.contains(said), "{line}: {text}");
        assert!(!place.path("run").exists(), "something was written: {line}");
    }
    // Nothing to compare, and nothing to tell apart.
    let alike =
        json!({ "prompt": "x", "responses": [{ "text": "e", "score": 1 }, { "text": "ee", "score": 1 }] });
    let config = verifying(&place, "run", &["objective.loss=pairwise", "train.steps=1"]);
    fs::write(place.path("scored.jsonl"), format!("{alike}\n")).unwrap();
    assert!(failure(&config).contains("there is nothing to compare"));
    let config = verifying(&place, "alike", &["train.steps=1"]);
    fs::write(place.path("scored.jsonl"), format!("{alike}\n")).unwrap();
    let mut told = Vec::new();
    run(Cpu::F32, &config, false, &Interrupt::default(), |event| {
        if let Event::Warning { text } = event {
            told.push(text.to_owned());
        }
    })
    .unwrap();
    assert!(told.iter().any(|text| text.contains("all 2 responses have the score 1")), "{told:?}");
    // It is told what to select by; a verifier beside that would be of no effect.
    let text = failure(&verifying(&place, "two", &["verifier.kind=numeric"]));
    assert!(text.contains("verifier: has no effect on objective \"verifier\""), "{text}");
}

// ------------------------------------------------------------------------------------------------------- selection

/// A reward model of the place.
fn reward_model(place: &Workplace) -> PathBuf {
    let config = verifying(place, "reward", &["train.steps=20"]);
    finish(&config);
    model_of(&config)
}

/// A run that selects by a reward model and earns by a pattern.
fn selecting(place: &Workplace, output: &str, reward: &Path, overrides: &[&str]) -> TrainConfig {
    let verifier = format!("verifier={{ kind = \"model\", path = \"{}\" }}", reward.display());
    let environment = "environment={ kind = \"regex\", pattern = \"[a-z]\", pick = \"first\" }";
    let settings = [
        "objective={ kind = \"bon-rl\", n = 2, selector = \"verifier\", reward = \"environment\" }",
        &verifier,
        environment,
    ];
    place.config(output, &[&settings, overrides].concat())
}

#[test]
fn a_policy_learns_by_what_a_reward_model_selects() {
    let place = Workplace::new();
    let reward = reward_model(&place);
    let eval = format!("data.eval_tasks={}", place.path("tasks.jsonl").display());
    let settings = ["train.steps=3", "train.save_every=1", &*eval, "train.eval_samples=4"];
    let whole = selecting(&place, "whole", &reward, &settings);
    let steps = train_on(Cpu::F32, &whole, false, 3);
    assert!(steps.iter().all(|m| m.logprob_gap_max == 0.0), "{steps:?}");
    // Answers are read by the environment, since the model reads none.
    assert!(steps.iter().all(|m| m.distinct_answers > 0.0), "{steps:?}");
    let parts = selecting(&place, "parts", &reward, &settings);
    train_on(Cpu::F32, &parts, false, 2);
    train_on(Cpu::F32, &parts, true, 3);
    assert!(checkpoint(&parts) == checkpoint(&whole), "other weights or moments");
    assert_eq!(metrics(&parts.train.output), metrics(&whole.train.output));
    let report = fs::read(whole.train.output.join("eval/step-000000.json")).unwrap();
    let report: Value = serde_json::from_slice(&report).unwrap();
    assert_eq!(report["calibration"]["samples"], 16, "{report}");
    let weights = &report["provenance"]["settings"]["verifier.weights"];
    assert!(weights.as_str().unwrap().starts_with("crc32c"), "{report}");

    // The reward model alone: its probability is the reward.
    let alone = ["objective={ kind = \"bon-rl-v\", n = 2 }", "train.steps=1"];
    let mut alone = selecting(&place, "alone", &reward, &alone);
    alone.environment = None;
    let steps = train_on(Cpu::F32, &alone, false, 1);
    assert!(steps[0].reward_mean > 0.0 && steps[0].reward_mean < 1.0, "{steps:?}");
    // And as what judges beside another selector, and of an expert.
    let other = ["objective={ kind = \"grpo\" }", "train.steps=1"];
    let mut other = selecting(&place, "other", &reward, &other);
    std::mem::swap(&mut other.verifier, &mut other.environment);
    assert!(train_on(Cpu::F32, &other, false, 1)[0].grad_norm > 0.0);
    let expert =
        selecting(&place, "expert", &reward, &["objective={ kind = \"bon-sft\", n = 2 }", "train.steps=1"]);
    assert!(train_on(Cpu::F32, &expert, false, 1)[0].grad_norm > 0.0);
}

#[test]
fn on_the_kernels_a_policy_learns_by_what_a_reward_model_selects() {
    if !compiled() {
        return;
    }
    let place = Workplace::for_kernels();
    let reward = reward_model(&place);
    let settings = [
        "train.steps=1",
        "generate.samples=4",
        "generate.max_new_tokens=2",
        "objective={ kind = \"bon-sft\", n = 2 }",
    ];
    let config = selecting(&place, "run", &reward, &settings);
    let steps = train_on(vm(None), &config, false, 1);
    assert!(steps[0].logprob_gap_max == 0.0 && steps[0].grad_norm > 0.0, "{steps:?}");
}

/// What a rollout says is what the model says of the same tokens, however many prompts are sampled at once.
#[test]
fn the_score_of_a_sampled_response_is_the_models_own() {
    let f = Fixture::new();
    f.write("scored.jsonl", "{\"prompt\": \"1+1=\", \"responses\": [{\"text\": \"2\", \"score\": 1}, {\"text\": \"3\", \"score\": 0}]}\n");
    f.write(
        "verifier.toml",
        r#"
        model.path = "model"
        data = { tasks = "scored.jsonl", eval_tasks = "scored.jsonl" }
        generate.prompts_per_step = 1
        objective.kind = "verifier"
        optimizer.lr = 1e-2
        train = { steps = 10, output = "reward" }
        "#,
    );
    let ran = f.succeed(&["train", "verifier.toml", "--device", "cpu"]);
    assert!(
        ran.stdout.contains("area under the ROC curve") && ran.stdout.contains("[verifier] kind = \"model\""),
        "{}",
        ran.stdout
    );
    assert!(ran.stderr.contains("accuracy") && ran.stderr.contains("AUC"), "{}", ran.stderr);
    let reward = "reward/checkpoints/step-000010/model";
    let model = format!("verifier={{ kind = \"model\", path = \"{reward}\" }}");
    let environment = "environment={ kind = \"numeric\", pick = \"first\" }";
    let eval = |more: &[&str]| {
        let args =
            ["eval", "run.toml", "--samples", "4", "--device", "cpu", "--set", &model, "--set", environment];
        f.succeed(&[&args[..], more].concat())
    };
    let ran = eval(&["--output", "whole.json", "--save-samples", "samples.jsonl"]);
    assert!(
        ran.stdout.contains("expected calibration error") && ran.stdout.contains("it misses"),
        "{}",
        ran.stdout
    );
    let samples = fs::read_to_string(f.path("samples.jsonl")).unwrap();
    let lines: Vec<Value> = samples.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(lines.len(), 25);
    assert!(
        lines
            .iter()
            .all(|line| line["responses"].as_array().unwrap().len() == 4 && line["answer"].is_string())
    );
    // The same scores, one by one.
    let opened =
        ModelDir::open_as(ModelRole::Reward, Cpu::F32, &f.path(reward), Precision::default()).unwrap();
    let mut scores = Vec::new();
    for line in &lines {
        let prompt = opened.tokenizer.encode_prompt(line["prompt"].as_str().unwrap()).unwrap();
        for response in line["responses"].as_array().unwrap() {
            let tokens: Vec<u32> = serde_json::from_value(response["tokens"].clone()).unwrap();
            scores.extend(opened.score(&[Continued { prompt: &prompt, responses: &[&tokens] }]).unwrap());
        }
    }
    let report: Value = serde_json::from_slice(&fs::read(f.path("whole.json")).unwrap()).unwrap();
    let mean = scores.iter().sum::<f64>() / scores.len() as f64;
    assert_eq!(report["calibration"]["mean_score"].as_f64(), Some(mean));
    // What was saved is what a verifier learns from.
    let train = [
        "train",
        "verifier.toml",
        "--device",
        "cpu",
        "--set",
        "data.tasks=samples.jsonl",
        "--set",
        "train.steps=1",
        "--set",
        "train.output=again",
    ];
    f.succeed(&train);
    // Another reward model is another measure.
    let other = f.run(&[
        "eval",
        "run.toml",
        "--samples",
        "4",
        "--device",
        "cpu",
        "--set",
        "verifier={ kind = \"model\", path = \"again/checkpoints/step-000001/model\" }",
        "--set",
        environment,
        "--compare",
        "whole.json",
    ]);
    assert!(other.code != Some(0) && other.stderr.contains("verifier.weights"), "{}", other.stderr);
}

#[test]
fn what_cannot_judge_is_refused_with_what_to_do() {
    let f = Fixture::new();
    let run = |path: &str| {
        let verifier = format!("verifier={{ kind = \"model\", path = \"{path}\" }}");
        let ran = f.run(&["train", "run.toml", "--device", "cpu", "--set", &verifier]);
        assert!(ran.code == Some(1) && !f.path("out").exists(), "{}", ran.stderr);
        ran.stderr
    };
    let said = run("nothing");
    assert!(said.contains("verifier.path: no directory at nothing"), "{said}");
    let said = run("model");
    assert!(said.contains("[verifier] kind = \"model\"") && said.contains("has no score head"), "{said}");
    // Another vocabulary.
    let place = Workplace::new();
    let reward = reward_model(&place);
    let said = run(reward.to_str().unwrap());
    assert!(said.contains("has another vocabulary than model"), "{said}");
    // A classifier of three labels, and a head without a configuration that says so.
    let three = f.path("three");
    let config = ConfigFile::open(&reward).unwrap();
    let opened = ModelDir::open_as(ModelRole::Reward, Cpu::F32, &reward, Precision::default()).unwrap();
    model_dir::save(&Cpu::F32, &config, &opened.model.params, &reward, &three).unwrap();
    let mut json: Value = serde_json::from_slice(&fs::read(three.join("config.json")).unwrap()).unwrap();
    json["architectures"] = json!(["Gemma3ForCausalLM"]);
    fs::write(three.join("config.json"), json.to_string()).unwrap();
    let error = ModelDir::open(Cpu::F32, &three, Precision::default()).err().unwrap();
    assert!(error.to_string().contains("the head of a sequence classifier"), "{error}");
    // What writes responses is no place for a reward model.
    let said = f.run(&["sample", "--model", reward.to_str().unwrap(), "--prompt", "1+1="]).stderr;
    assert!(said.contains("is a reward model, which scores responses and writes none"), "{said}");
}

// ------------------------------------------------------------------------------------------------------------ plan

#[test]
fn a_plan_counts_the_reward_model() {
    let place = Workplace::for_kernels();
    let reward = reward_model(&place);
    let config = selecting(&place, "run", &reward, &[]);
    let (policy, model) =
        (ConfigFile::open(&config.model.path).unwrap().gemma, ConfigFile::open(&reward).unwrap().gemma);
    let prompts = vec![vec![2; 12]; 4];
    let plan = |reward_models: &[_], place| {
        let run = Run {
            model: &policy,
            dtype: DType::Bf16,
            config: &config,
            prompts: &prompts,
            purpose: Purpose::Train,
            reward_models,
        };
        Plan::new(&run, place)
    };
    // The file's numbers are f32: the CPU holds them as they are, and a GPU half as many bytes.
    let file = fs::metadata(reward.join("model.safetensors")).unwrap().len();
    assert_eq!(Precision::default().storage(&reward, &ConfigFile::open(&reward).unwrap()), DType::F32);
    let (gpu, cpu) = (Place::Gpu { memory: 1 << 30, driver: 0, host: None }, Place::Cpu(1 << 32));
    for (place, dtype, weights) in
        [(gpu, DType::F32, file / 2), (cpu, DType::F32, file), (cpu, DType::Bf16, file / 2)]
    {
        let (without, with) = (plan(&[], place), plan(&[(model.clone(), dtype)], place));
        let [none, held] = [&without, &with].map(|plan| {
            let of_weights = plan.held.iter().filter(|line| line.what == "the reward model's weights");
            of_weights.map(|line| line.bytes).sum::<u64>()
        });
        // A file has names beside numbers.
        assert!(held <= weights && held * 10 > weights * 8, "{held} of {weights}\n{with}");
        // It has a tokenizer of its own, which the CPU's plan counts.
        assert!(none == 0 && with.held_bytes() - without.held_bytes() >= held, "{without}\n{with}");
        assert!(
            with.phases.iter().any(|line| line.what.contains("the reward model") && line.bytes > 0),
            "{with}"
        );
        assert!(with.fits, "{with}");
    }
    let config = verifying(&place, "verifier", &["generate.samples=6", "generate.max_new_tokens=5"]);
    for place in [Place::Gpu { memory: 1 << 30, driver: 0, host: None }, Place::Cpu(1 << 32)] {
        let run = Run {
            model: &policy,
            dtype: DType::Bf16,
            config: &config,
            prompts: &prompts,
            purpose: Purpose::Train,
            reward_models: &[],
        };
        let plan = Plan::new(&run, place);
        // Nothing is sampled. The CPU's plan says what writing a checkpoint takes as well.
        let [training, saving @ ..] = &plan.phases[..] else { panic!("{plan}") };
        assert!(training.what.starts_with("to train on 2 prompts x 6 responses"), "{plan}");
        let on_cpu = matches!(place, Place::Cpu(_));
        assert!(
            saving.len() == usize::from(on_cpu)
                && saving.iter().all(|line| line.what == "to write a checkpoint")
        );
    }
}

/// Errors of a device come with what to do about them.
#[test]
fn a_device_that_fails_at_scoring_says_how_to_go_on() {
    let source = RewardError::Device(DeviceError::new("cuda:0", "it fell off the bus"));
    let source = bon_engine::rollout::RolloutError::Reward { section: "verifier", source };
    let text = format!("{:#}", anyhow::Error::from(TrainError::Rollout { step: 3, source }));
    assert!(text.starts_with("step 3; ") && text.contains("--resume goes on"), "{text}");
}
