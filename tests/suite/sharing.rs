//! A prompt that is computed once serves its N responses as N prompts would: in training and in generation.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use bon_engine::backend::cpu::Cpu;
use bon_engine::backend::cpu::Tensor;
use bon_engine::backend::cuda::Cuda;
use bon_engine::backend::ops::*;
use bon_engine::backend::{Backend, Batch, Choice, DType, HeadSpec, Pace, Truncation};
use bon_engine::device::vm::MmaOrder;
use bon_engine::gemma::Gemma;
use bon_engine::gemma::config::GemmaConfig;
use bon_engine::generate::{Finish, GenerateError, Prompt, Response, Sampling, generate, generate_at};
use bon_engine::rng::{Domain, DrawKey, derive_key};
use bon_engine::segments::{Layout, Segments};
use bon_engine::train::policy::Forward;

use crate::delegating::Delegating;
use crate::engine;
use crate::goldens::Golden;
use crate::kernels::{compiled, counting, cuda, vm_in};
use crate::ops::{randoms, same_everywhere};
use crate::tiny::{self, Groups, KINDS, NAMES, tokens};
use crate::tolerance::rms;

/// The families whose layers differ in more than their windows; on the kernels these stand for all.
const GEMMA_4: [&str; 3] = ["gemma4_text", "gemma4_e", "gemma4_moe"];

/// Two prompts whose keys the kernels take in two splits, the first of which they have only in part in common.
fn long_prompts() -> [Vec<u32>; 2] {
    [30, 31].map(|seed| [&[2][..], &tokens(1, 9), &tokens(seed, 125)].concat())
}

/// Devices that sum products in groups, as tensor cores do: a chain would hide where they are cut.
fn in_groups() -> Vec<Cuda> {
    let vm = counting().then(|| vm_in(MmaOrder::Hopper));
    [vm, compiled().then(cuda).flatten()].into_iter().flatten().collect()
}

fn to_bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

// ---- training

/// Responses that begin alike, at several lengths, one of them twice and one as another's beginning.
fn alike(seed: u32) -> Vec<Vec<u32>> {
    let (all, other) = (tokens(seed, 12), tokens(seed + 1, 12));
    let till = |n: usize, m: usize| [&all[..n], &other[..m]].concat();
    vec![till(12, 0), till(3, 4), other.clone(), till(3, 6), till(12, 0), till(7, 0), till(1, 0), till(5, 1)]
}

/// Several layouts: a shared header, no common beginning beyond BOS, one prompt alone, prompts of BOS alone, responses that begin
/// alike.
fn layouts() -> Vec<Groups> {
    let responses = |seed: u32| vec![tokens(seed, 7), tokens(seed + 1, 1), tokens(seed + 2, 20)];
    let prompt = |seed: u32, len: usize| [vec![2], tokens(seed, len)].concat();
    vec![
        Groups::few_shot(),
        Groups(vec![(prompt(30, 17), responses(40)), (prompt(31, 2), responses(50))]),
        Groups(vec![(prompt(32, 12), responses(60))]),
        Groups(vec![(vec![2], responses(70)), (vec![2], responses(80))]),
        Groups(vec![(prompt(33, 5), alike(90)), (prompt(34, 3), responses(50)), (prompt(35, 9), alike(94))]),
    ]
}

fn assert_shared_is_separate<B: Backend>(what: &str, model: &Gemma<B>, groups: &Groups) {
    let logprobs = |g: &Groups| g.with(|groups| Forward::new(model, groups, 0.7).logprobs);
    let separate: Vec<f32> = groups.separate().flat_map(|g| logprobs(&g)).collect();
    assert_eq!(to_bits(&logprobs(groups)), to_bits(&separate), "{what}");
}

#[test]
fn shared_prompts_give_the_log_probs_of_separate_sequences_bit_for_bit() {
    for name in NAMES {
        for kind in KINDS {
            let model = tiny::model_of(name, kind);
            for groups in layouts() {
                assert_shared_is_separate(name, &model, &groups);
            }
        }
    }
}

#[test]
fn shared_prompts_give_the_log_probs_of_separate_sequences_on_the_kernels() {
    let responses = |seed| [vec![tokens(seed, 6), tokens(seed + 1, 11)], alike(seed + 2)].concat();
    let groups = (40..).step_by(10).zip(long_prompts()).map(|(seed, prompt)| (prompt, responses(seed)));
    let groups = Groups(groups.collect());
    for device in in_groups() {
        for family in GEMMA_4 {
            let model = engine::model(device.clone(), &engine::config(family));
            assert_shared_is_separate(family, &model, &groups);
        }
    }
}

#[test]
fn shared_prompts_give_the_gradient_of_separate_sequences() {
    for name in NAMES {
        let (model, allowed) = (tiny::model(name, DType::F32), Golden::open(name).gradient_error());
        for groups in layouts() {
            let weights = randoms(6, groups.predicted());
            let gradient = |g: &Groups, weights: &[f32]| {
                let (_, grads) = g.with(|groups| tiny::gradient(&model, groups, 0.7, weights));
                tiny::named(&model, &grads)
            };
            let mut from = 0;
            let separate: Vec<_> = groups
                .separate()
                .map(|g| {
                    from += g.predicted();
                    gradient(&g, &weights[from - g.predicted()..from])
                })
                .collect();
            for (i, (parameter, shared)) in gradient(&groups, &weights).iter().enumerate() {
                let parts: Vec<&[f32]> = separate.iter().map(|s| s[i].1.as_f32()).collect();
                let sum = |at: usize| parts.iter().map(|p| f64::from(p[at])).sum::<f64>();
                let off = rms((0..shared.as_f32().len()).map(|at| f64::from(shared.as_f32()[at]) - sum(at)));
                // Each part is rounded in proportion to itself, however much of it cancels in the sum.
                let size: f64 = parts.iter().map(|p| rms(p.iter().map(|&x| f64::from(x)))).sum();
                assert!(off <= allowed * size, "{name}: {parameter} is off by {off:e} of {size:e}");
            }
        }
    }
}

// ---- generation

const SAMPLING: Sampling = Sampling {
    temperature: 0.7,
    truncation: Truncation { top_k: 0, top_p: 1.0, min_p: 0.0 },
    max_new_tokens: 12,
    seed: 9,
    step: 4,
};

/// About one token in ten ends a response, so that streams leave the batch at different times.
fn stop(tokens: &[u32]) -> bool {
    tokens.last().is_some_and(|t| t % 10 == 7)
}

fn run<B: Backend>(model: &Gemma<B>, prompts: &[Prompt], sampling: &Sampling) -> Vec<Vec<Response>> {
    generate(model, prompts, sampling, stop, |_, _, _| {}).unwrap()
}

/// One stream, without a cache and without neighbours: the whole sequence again for every token.
fn alone<B: Backend>(model: &Gemma<B>, prompt: &Prompt, stream: u32, sampling: &Sampling) -> Response {
    let mut ids = prompt.ids.to_vec();
    let mut response = Response { tokens: vec![], logprobs: vec![], finish: Finish::Length };
    let greedy = sampling.temperature == 0.0;
    let temperature = if greedy { 1.0 } else { sampling.temperature };
    let head = HeadSpec { softcap: model.config.final_softcap, temperature };
    while response.tokens.len() < sampling.max_new_tokens && response.finish == Finish::Length {
        let segments = Segments::separate(&[ids.len()]);
        let runs = segments.all_queries();
        let batch = Batch::new(&ids, &segments, &runs);
        let last = model.backend.gather_rows(&model.forward(&batch).0, &[ids.len() as u32 - 1]);
        let choice = if greedy {
            Choice::Greedy
        } else {
            let key = derive_key(sampling.seed, Domain::Sample, sampling.step);
            Choice::Draw(DrawKey { key, prompt: prompt.number, stream, position: ids.len() as u32 })
        };
        let drawn = model.backend.lm_head_sample(
            &last,
            model.params.lm_head(),
            &head,
            &sampling.truncation,
            &[choice],
        )[0];
        ids.push(drawn.token);
        response.tokens.push(drawn.token);
        response.logprobs.push(drawn.logprob);
        if stop(&response.tokens) {
            response.finish = Finish::Stop;
        }
    }
    response
}

/// Prompts with a header in common (first three) and without (last two).
fn prompts() -> Vec<Vec<u32>> {
    let few_shot = Groups::few_shot();
    let mut prompts: Vec<Vec<u32>> = few_shot.0.into_iter().map(|(prompt, _)| prompt).collect();
    prompts.extend([vec![2], [vec![2], tokens(7, 20)].concat()]);
    prompts
}

fn requests(prompts: &[Vec<u32>], streams: usize) -> Vec<Prompt<'_>> {
    (10..).zip(prompts).map(|(number, ids)| Prompt { ids, number, streams }).collect()
}

fn assert_same(got: &Response, want: &Response, what: &str) {
    assert_eq!((&got.tokens, got.finish), (&want.tokens, want.finish), "{what}");
    assert_eq!(to_bits(&got.logprobs), to_bits(&want.logprobs), "{what}");
}

#[test]
fn streams_are_what_each_would_be_alone() {
    let prompts = prompts();
    let mut finishes = BTreeMap::new();
    for name in NAMES {
        for kind in KINDS {
            let model = tiny::model_of(name, kind);
            let truncation = Truncation { top_k: 40, top_p: 0.95, min_p: 0.01 };
            for sampling in [
                SAMPLING,
                Sampling { temperature: 0.0, ..SAMPLING },
                Sampling { temperature: 0.15, ..SAMPLING },
                Sampling { truncation, temperature: 1.3, ..SAMPLING },
                Sampling { max_new_tokens: 1, ..SAMPLING },
            ] {
                // All together, those with a common header, one alone.
                for picked in [&prompts[..], &prompts[..3], &prompts[4..]] {
                    let requests = requests(picked, 3);
                    for (request, group) in requests.iter().zip(run(&model, &requests, &sampling)) {
                        for (stream, response) in (0..).zip(&group) {
                            let want = alone(&model, request, stream, &sampling);
                            assert_same(response, &want, &format!("{name}, {sampling:?}, stream {stream}"));
                            *finishes.entry(format!("{:?}", response.finish)).or_insert(0) += 1;
                        }
                    }
                }
            }
        }
    }
    assert!(finishes["Stop"] > 50 && finishes["Length"] > 50, "{finishes:?}");
}

#[test]
fn streams_on_the_kernels_are_what_each_would_be_alone() {
    let (prompts, sampling) = (long_prompts(), Sampling { max_new_tokens: 2, ..SAMPLING });
    for device in in_groups() {
        for family in GEMMA_4 {
            let config = GemmaConfig { max_positions: 256, ..engine::config(family) };
            let model = engine::model(device.clone(), &config);
            let requests = requests(&prompts, 3);
            let groups = run(&model, &requests, &sampling);
            // The first token is the prefill's, the second a decode step's.
            assert!(groups.iter().any(|group| group[2].tokens.len() == 2), "{family}: no stream goes on");
            for (request, group) in requests.iter().zip(&groups) {
                assert_same(&group[2], &alone(&model, request, 2, &sampling), family);
            }
        }
    }
}

#[test]
fn generation_gives_the_same_bits_on_any_threads_and_instruction_set() {
    let prompts = prompts();
    for name in NAMES {
        let model = tiny::model_of(name, (DType::Bf16, Cpu::BF16));
        same_everywhere(|| {
            let groups = run(&model, &requests(&prompts, 5), &SAMPLING);
            groups
                .into_iter()
                .flatten()
                .map(|r| {
                    let tokens = r.tokens.into_iter().map(f32::from_bits);
                    Tensor::f32(2, r.logprobs.len(), tokens.chain(r.logprobs).collect())
                })
                .collect()
        });
    }
}

#[test]
fn the_samplers_log_probs_are_those_of_training_bit_for_bit() {
    let prompts = prompts();
    for name in NAMES {
        for kind in KINDS {
            let model = tiny::model_of(name, kind);
            for temperature in [0.7, 1.0] {
                let groups = run(&model, &requests(&prompts, 6), &Sampling { temperature, ..SAMPLING });
                let sampled: Vec<f32> = groups.iter().flatten().flat_map(|r| r.logprobs.clone()).collect();
                let tokens = |group: &Vec<Response>| group.iter().map(|r| r.tokens.clone()).collect();
                let groups = Groups(prompts.iter().cloned().zip(groups.iter().map(tokens)).collect());
                let trained = groups.with(|groups| Forward::new(&model, groups, temperature).logprobs);
                assert_eq!(to_bits(&trained), to_bits(&sampled), "{name}");
            }
        }
    }
}

#[test]
fn every_response_is_reported_once_and_as_it_is_returned() {
    let (model, prompts) = (tiny::model("gemma2", DType::F32), prompts());
    let requests = requests(&prompts, 4);
    let mut heard = BTreeMap::new();
    let groups = generate(&model, &requests, &SAMPLING, stop, |prompt, stream, response| {
        assert!(heard.insert((prompt, stream), response.clone()).is_none());
    })
    .unwrap();
    assert_eq!(heard.len(), 20);
    assert!(heard.iter().all(|(&(prompt, stream), response)| groups[prompt][stream] == *response));
    for response in groups.iter().flatten() {
        let (last, before) = response.tokens.split_last().unwrap();
        assert!(before.iter().all(|t| !stop(&[*t])));
        assert_eq!(stop(&[*last]), response.finish == Finish::Stop);
        assert!(response.finish == Finish::Stop || response.tokens.len() == SAMPLING.max_new_tokens);
    }

    // Responses of no token are responses, too.
    let (none, mut heard) = (Sampling { max_new_tokens: 0, ..SAMPLING }, 0);
    let groups = generate(&model, &requests, &none, stop, |_, _, _| heard += 1).unwrap();
    assert_eq!((heard, groups.iter().flatten().filter(|r| r.tokens.is_empty()).count()), (20, 20));
}

/// Neither how far the host lags behind nor rows of nobody change a bit, or the order in which responses are told.
#[test]
fn every_pace_gives_the_same_responses() {
    let prompts = prompts();
    let requests = requests(&prompts, 3);
    for name in NAMES {
        let model = tiny::model_of(name, (DType::Bf16, Cpu::BF16));
        for sampling in
            [SAMPLING, Sampling { temperature: 0.15, ..SAMPLING }, Sampling { max_new_tokens: 1, ..SAMPLING }]
        {
            let told = |pace: Pace| {
                let mut told = Vec::new();
                let tell =
                    |prompt, stream, response: &Response| told.push((prompt, stream, response.clone()));
                let groups = generate_at(pace, &model, &requests, &sampling, stop, tell).unwrap();
                let in_groups =
                    |(prompt, stream, r): &(usize, usize, Response)| groups[*prompt][*stream] == *r;
                assert!(told.len() == 15 && told.iter().all(in_groups));
                let bits = |(prompt, stream, r): (usize, usize, Response)| {
                    (prompt, stream, r.finish, r.tokens, to_bits(&r.logprobs))
                };
                told.into_iter().map(bits).collect::<Vec<_>>()
            };
            let want = told(Cpu::F32.pace());
            for lag in [0, 1, 3, 100] {
                for rows in [|n: usize| n, |n: usize| n.next_multiple_of(4), |n: usize| n.max(9)] {
                    assert_eq!(told(Pace { lag, rows }), want, "{name}, lag {lag}, {} rows for 5", rows(5));
                }
            }
        }
    }
}

/// What streams begin with alike is read once, however many of them do, and whenever they part; what a device asks for that
/// looks at tokens late is a row for each stream.
#[test]
fn what_streams_have_in_common_is_read_once() {
    let prompts = prompts();
    let mut shares = Vec::new();
    for (temperature, lag) in [(0.0, 0), (0.15, 0), (0.7, 0), (0.15, 1)] {
        let model = tiny::model_on(Delegating::new(), "gemma3", DType::F32);
        let rows = Arc::clone(&model.backend.decoded);
        let sampling = Sampling { temperature, ..SAMPLING };
        let pace = Pace { lag, rows: |n| n };
        let groups =
            generate_at(pace, &model, &requests(&prompts, 8), &sampling, stop, |_, _, _| {}).unwrap();
        let of_group = |group: &Vec<Response>| -> Vec<Vec<u32>> {
            let beginnings =
                |r: &Response| (1..r.tokens.len()).map(|n| r.tokens[..n].to_vec()).collect::<Vec<_>>();
            group.iter().flat_map(beginnings).collect()
        };
        let all: usize = groups.iter().map(|group| of_group(group).len()).sum();
        let distinct: usize =
            groups.iter().map(|g| of_group(g).into_iter().collect::<BTreeSet<_>>().len()).sum();
        let read = rows.load(Ordering::Relaxed);
        match lag {
            0 => assert_eq!(read, distinct, "at {temperature}"),
            _ => assert!(read >= all, "{read} rows for {all} tokens"),
        }
        shares.push(distinct as f64 / all as f64);
        // The same in training.
        let responses = |group: &Vec<Response>| group.iter().map(|r| r.tokens.clone()).collect();
        let groups = Groups(prompts.iter().cloned().zip(groups.iter().map(responses)).collect());
        model.backend.prepared.store(0, Ordering::Relaxed);
        groups.with(|groups| Forward::new(&model, groups, 0.7));
        let (layout, _) = Layout::of_prompts(&prompts.iter().map(|p| &p[..]).collect::<Vec<_>>());
        let trained = model.backend.prepared.load(Ordering::Relaxed) - layout.ids().len();
        // Little in common is left apart.
        assert!(
            (distinct..=distinct + all / 8).contains(&trained),
            "{trained} rows of {all}, {distinct} different"
        );
    }
    assert!(
        shares[0] == 0.125 && shares[1] < 0.9 && shares[0] < shares[1] && shares[1] < shares[2],
        "{shares:?}"
    );
}

/// What looks later notices the same.
#[test]
fn every_pace_notices_the_first_nan() {
    let (mut model, prompts) = (tiny::model("gemma1", DType::F32), prompts());
    // Who embeds one of these tokens overflows. To the LM head the column is zero times what it holds.
    let width = model.config.hidden_size;
    let unused = |token: &u32| prompts.iter().flatten().all(|t| t != token);
    for token in (0..model.config.vocab_size as u32).filter(unused).step_by(4) {
        model.params.embed.as_f32_mut()[token as usize * width] = 3e38;
    }
    model.params.final_norm.as_f32_mut()[0] = -1.0;
    let refusal = |lag: usize| {
        let pace = Pace { lag, rows: |n| n };
        let refused = generate_at(pace, &model, &requests(&prompts, 4), &SAMPLING, stop, |_, _, _| {});
        match refused.unwrap_err() {
            GenerateError::NotFinite { prompt, stream, position, .. } => (prompt, stream, position),
            other => panic!("{other}"),
        }
    };
    let want = refusal(0);
    assert!(want.2 > prompts[want.0].len(), "{want:?} is no decode step");
    assert!([1, 2, 50].iter().all(|&lag| refusal(lag) == want), "{want:?}");
}

/// Equal prompts draw alike under one number and differently under two; likewise streams, seeds, steps.
#[test]
fn keys_alone_tell_streams_apart() {
    let (model, ids) = (tiny::model("gemma3", DType::F32), &prompts()[0]);
    let sampling = Sampling { temperature: 1.5, ..SAMPLING };
    let of = |numbers: [u32; 2], sampling: &Sampling| {
        let requests = numbers.map(|number| Prompt { ids, number, streams: 2 });
        let groups = run(&model, &requests, sampling);
        groups.into_iter().flatten().map(|r| r.tokens).collect::<Vec<_>>()
    };
    let [a, b, c, d] = of([1, 1], &sampling).try_into().unwrap();
    assert_eq!((&a, &b), (&c, &d));
    assert_ne!(a, b);
    let [e, f, g, h] = of([1, 2], &sampling).try_into().unwrap();
    assert_eq!((&a, &b), (&e, &f));
    assert!(g != a && h != b && g != h);
    assert_ne!(of([1, 1], &Sampling { seed: 10, ..sampling.clone() })[0], a);
    assert_ne!(of([1, 1], &Sampling { step: 5, ..sampling.clone() })[0], a);
}

#[test]
fn what_generation_refuses() {
    let mut model = tiny::model("gemma1", DType::F32);
    let refusal = |model: &Gemma<Cpu>, ids: &[u32], max_new_tokens: usize| {
        let prompts = [Prompt { ids: &[2], number: 0, streams: 1 }, Prompt { ids, number: 1, streams: 1 }];
        let sampling = Sampling { max_new_tokens, ..SAMPLING };
        generate(model, &prompts, &sampling, stop, |_, _, _| {}).err()
    };
    assert_eq!(refusal(&model, &[], 1), Some(GenerateError::EmptyPrompt { prompt: 1 }));
    let token = GenerateError::Token { prompt: 1, token: 131, vocab: 131 };
    assert_eq!(refusal(&model, &[2, 131], 1), Some(token));
    assert_eq!(refusal(&model, &[2, 5], 62), None);
    let long = GenerateError::TooLong { prompt: 1, tokens: 2, new: 63, context: 64 };
    assert_eq!(refusal(&model, &[2, 5], 63), Some(long));
    model.params.layers[1].down.as_f32_mut()[7] = f32::NAN;
    let Some(GenerateError::NotFinite { prompt: 0, stream: 0, position: 1, value }) =
        refusal(&model, &[2], 5)
    else {
        panic!("NaN weights must be noticed");
    };
    assert!(value.is_nan());
}
