//! Training steps written down once more from their definition, and compared with what `train::run` does: every step
//! from the checkpoint before it, so that nothing but one step's rounding comes between the two.
//!
//! What is shared with the trainer is what other tests hold: the model's forward and backward pass, the sampler, the
//! tokenizer and the rule that ends responses. Order, random keys, verdicts, coefficients, weights, clipping, AdamW,
//! learning rate and every figure are written anew.

use std::path::PathBuf;

use bon_engine::backend::cpu::Cpu;
use bon_engine::backend::ops::*;
use bon_engine::checkpoint::Dtype;
use bon_engine::gemma::{Gemma, params};
use bon_engine::generate::{Finish, Prompt, Response, Sampling, generate};
use bon_engine::model_dir::{ModelDir, Precision};
use bon_engine::objective::{Kind, NegativeSign, Signal};
use bon_engine::rng::{Domain, Stream};
use bon_engine::rollout::ResponseEnd;
use bon_engine::tasks::{Task, Tasks};
use bon_engine::train::config::{LengthNormalizer, Schedule, TrainConfig};
use bon_engine::train::metrics::StepMetrics;
use bon_engine::train::policy::Forward;
use bon_engine::train::snapshot::{Arrays, Snapshot, verify};

use crate::delegating::Delegating;
use crate::fixture::Fixture;
use crate::judging::by_programs;
use crate::tiny::Groups;
use crate::training::train_on;

/// What the verifiers of these tests are, beside the same in sh: they look at the first character of a response.
struct Judge {
    script: &'static str,
    score: fn(Option<char>) -> Option<f64>,
}

/// A program that looks at the first character alone: what follows may be escaped in the request.
const FIRST: &str = r#"t=${line#*\"response\":\"}; t=${t%%\"*}; case $t in"#;

/// Scores of many levels, below 0 too, and some responses that it does not judge.
const GRADED: Judge = Judge {
    script: "[abcdef]*) reply 0.5;; [ghijkl]*) reply 0.25;; [mnop]*) reply -1;; [0123456789]*) reply 2;; \
             [qr]*) reply null;; *) reply 0;; esac",
    score: |first| match first {
        Some('a'..='f') => Some(0.5),
        Some('g'..='l') => Some(0.25),
        Some('m'..='p') => Some(-1.0),
        Some('0'..='9') => Some(2.0),
        Some('q'..='r') => None,
        _ => Some(0.0),
    },
};

/// Rewards that disagree with it.
const WAYWARD: Judge = Judge {
    script: "[abcmn]*) reply 1;; [ghi]*) reply 0.5;; [jkl]*) reply 0.4999;; [01234]*) reply -0.75;; \
             [stu]*) reply null;; *) reply 0;; esac",
    score: |first| match first {
        Some('a'..='c' | 'm'..='n') => Some(1.0),
        Some('g'..='i') => Some(0.5),
        Some('j'..='l') => Some(0.4999),
        Some('0'..='4') => Some(-0.75),
        Some('s'..='u') => None,
        _ => Some(0.0),
    },
};

/// 1 or 0, nothing unjudged.
const BINARY: Judge = Judge {
    script: "[abcdefgmnopqr01234]*) reply 1;; *) reply 0;; esac",
    score: |first| Some(f64::from(matches!(first, Some('a'..='g' | 'm'..='r' | '0'..='4')))),
};

/// Seven tasks, which no number of prompts per step here divides; their answers are the experts' responses, and each
/// scores otherwise.
const TASKS: &str = r#"{"prompt":"0+1=","answer":"ab"}
{"prompt":"1+2=","answer":"g"}
{"prompt":"2+2=","answer":"mno"}
{"prompt":"a b c","answer":"5"}
{"prompt":"3+0=","answer":"zz zz"}
{"prompt":"4+4","answer":"d"}
{"prompt":"?","answer":"hij"}
"#;

/// A run and what judges its responses.
struct Case {
    fixture: Fixture,
    config: TrainConfig,
    verifier: &'static Judge,
    /// The verifier where there is none.
    environment: &'static Judge,
}

const STEPS: u64 = 5;

impl Case {
    fn new(verifier: &'static Judge, environment: Option<&'static Judge>, set: &[&str]) -> Self {
        let f = Fixture::new();
        let script = |judge: &Judge| format!("{FIRST} {}", judge.script);
        by_programs(&f, &script(verifier), environment.map(script).as_deref());
        f.write("tasks.jsonl", TASKS);
        let path = |key: &str, name: &str| format!("{key}={}", f.path(name).display());
        let program = |key: &str| format!("{key}.program=[\"sh\", \"{}.sh\"]", f.path(key).display());
        let mut overrides = vec![
            path("model.path", "model"),
            path("data.tasks", "tasks.jsonl"),
            path("train.output", "out"),
            program("verifier"),
            format!("train.steps={STEPS}"),
            "train.save_every=1".to_owned(),
            "train.keep_checkpoints=9".to_owned(),
            // A root that is hardly more than rounding must not decide the size of an update.
            "optimizer.eps=1e-4".to_owned(),
        ];
        overrides.extend(environment.map(|_| program("environment")));
        overrides.extend(set.iter().map(|s| s.to_string()));
        let config = TrainConfig::load(&f.path("run.toml"), &overrides).unwrap();
        Self { fixture: f, config, verifier, environment: environment.unwrap_or(verifier) }
    }

    /// The run directory's checkpoint of a step.
    fn snapshot(&self, step: u64) -> Snapshot {
        let path: PathBuf = self.fixture.path("out/checkpoints").join(format!("step-{step:06}"));
        verify(&path).unwrap()
    }

    /// The model and the optimizer's moments after a step.
    fn state(&self, step: u64) -> State {
        if step == 0 {
            let dir = ModelDir::open(Cpu::F32, &self.config.model.path, Precision::default()).unwrap();
            let zeros: Vec<Vec<f64>> = flat(&dir.model).iter().map(|x| vec![0.0; x.len()]).collect();
            return State { dir, m: zeros.clone(), v: zeros };
        }
        let snapshot = self.snapshot(step);
        let dir = ModelDir::open(Cpu::F32, &snapshot.model_dir(), Precision::default()).unwrap();
        let saved = Arrays::open(&snapshot.optimizer_path()).unwrap();
        let moments = |kind: &str| {
            let plan = params::plan(&dir.model.config);
            let read = |spec: &&params::ParamSpec| {
                let bytes =
                    saved.bytes(&format!("{kind}.{}", spec.name), Dtype::F32, spec.rows, spec.cols).unwrap();
                bytes.chunks(4).map(|b| f64::from(f32::from_le_bytes(b.try_into().unwrap()))).collect()
            };
            plan.tensors().iter().map(read).collect()
        };
        let (m, v) = (moments("m"), moments("v"));
        State { dir, m, v }
    }
}

struct State {
    dir: ModelDir<Cpu>,
    m: Vec<Vec<f64>>,
    v: Vec<Vec<f64>>,
}

fn flat(model: &Gemma<Cpu>) -> Vec<Vec<f64>> {
    let wide = |x: &_| Cpu::F32.to_f32(x).into_iter().map(f64::from).collect();
    model.params.tensors().into_iter().map(wide).collect()
}

/// All that one prompt brings into a step.
struct Group {
    prompt: Vec<u32>,
    sampled: Vec<Response>,
    expert: Option<Vec<u32>>,
    /// r and R as the objective takes them.
    scores: Vec<f64>,
    rewards: Vec<f64>,
    unjudged: usize,
    /// c of the samples, then of the expert.
    c: Vec<f64>,
    clipped: bool,
}

impl Group {
    /// Whether a response has a weight, those that are masked apart.
    fn teaches(&self, config: &TrainConfig) -> bool {
        let masked = |j: usize| {
            config.train.mask_truncated && self.sampled.get(j).is_some_and(|r| r.finish == Finish::Length)
        };
        self.c.iter().enumerate().any(|(j, &c)| c != 0.0 && !masked(j))
    }

    /// Tokens of the samples, then of the expert.
    fn responses(&self) -> Vec<Vec<u32>> {
        self.sampled.iter().map(|r| r.tokens.clone()).chain(self.expert.clone()).collect()
    }
}

/// N-subsets of 0..m.
fn subsets(m: usize, n: usize) -> Vec<Vec<usize>> {
    let members = |bits: usize| (0..m).filter(|i| bits >> i & 1 == 1).collect::<Vec<_>>();
    (0..1 << m).map(members).filter(|s| s.len() == n).collect()
}

/// The value of the member with the best score, of equal ones in the mean.
fn best(members: &[usize], scores: &[f64], values: &[f64]) -> f64 {
    let top = members.iter().map(|&i| scores[i]).fold(f64::NEG_INFINITY, f64::max);
    let tied: Vec<f64> = members.iter().filter(|&&i| scores[i] == top).map(|&i| values[i]).collect();
    tied.iter().sum::<f64>() / tied.len() as f64
}

/// Mean of it over all N-subsets.
fn best_of_n(n: usize, scores: &[f64], values: &[f64]) -> f64 {
    let all = subsets(scores.len(), n);
    all.iter().map(|s| best(s, scores, values)).sum::<f64>() / all.len() as f64
}

fn choose(n: usize, k: usize) -> f64 {
    if k > n { 0.0 } else { (0..k).map(|i| (n - i) as f64 / (i + 1) as f64).product() }
}

/// c_j, and whether a weight was clipped: the formulas at the heads of src/objective/*.rs, summed as they stand there.
fn coefficients(config: &TrainConfig, scores: &[f64], rewards: &[f64], expert: f64) -> (Vec<f64>, bool) {
    let objective = &config.objective;
    let (m, n) = (scores.len(), objective.n.unwrap_or(1));
    let signal = |s: Option<Signal>| match s.unwrap() {
        Signal::Verifier => scores,
        Signal::Environment => rewards,
    };
    let marginal = |selector: &[f64], reward: &[f64]| -> Vec<f64> {
        let all = subsets(m, n);
        let of = |j: usize| {
            let gain = |s: &Vec<usize>| {
                let without: Vec<usize> = s.iter().copied().filter(|&i| i != j).collect();
                best(s, selector, reward) - best(&without, selector, reward)
            };
            all.iter().filter(|s| s.contains(&j)).map(gain).sum::<f64>() / all.len() as f64
        };
        (0..m).map(of).collect()
    };
    match objective.kind {
        Kind::Sft => (vec![1.0], false),
        Kind::Rl => {
            let mean = rewards.iter().sum::<f64>() / m as f64;
            (rewards.iter().map(|r| (r - mean) / (m as f64 - 1.0)).collect(), false)
        }
        Kind::BonRl => (marginal(signal(objective.selector), signal(objective.reward)), false),
        Kind::BonRlV => (marginal(scores, scores), false),
        Kind::BonRlS | Kind::PassAtN => (marginal(rewards, rewards), false),
        Kind::Pkpo => {
            assert_eq!(objective.baseline, None, "the others' formulas are in the tests of objectives");
            (marginal(rewards, rewards), false)
        }
        Kind::MaxRl => {
            let mean = rewards.iter().sum::<f64>() / m as f64;
            let of = |r: &f64| if mean == 0.0 { 0.0 } else { (r - mean) / mean / m as f64 };
            (rewards.iter().map(of).collect(), false)
        }
        Kind::Grpo => {
            let mean = rewards.iter().sum::<f64>() / m as f64;
            let std = rewards.iter().map(|r| (r - mean).powi(2)).sum::<f64>() / (m as f64 - 1.0);
            let same = rewards.iter().all(|r| *r == rewards[0]);
            let of = |r: &f64| if same { 0.0 } else { (r - mean) / std.sqrt() / m as f64 };
            (rewards.iter().map(of).collect(), false)
        }
        Kind::BonSft => {
            // lambda by Newton's method on the KL of the tilt, from where the root nearly is.
            let nf = n as f64;
            let kl = |l: f64| ((l - 1.0) * l.exp() + 1.0) / (l.exp() - 1.0) - ((l.exp() - 1.0) / l).ln();
            let mut lambda = nf + 1.0;
            for _ in 0..50 {
                let slope = (kl(lambda + 1e-5) - kl(lambda - 1e-5)) / 2e-5;
                lambda -= (kl(lambda) - nf.ln() + (nf - 1.0) / nf) / slope;
            }
            let at_least = |i: usize, j: usize| f64::from(scores[i] >= scores[j]);
            let q: Vec<f64> = (0..m)
                .map(|i| (0..m).filter(|&j| j != i).map(|j| at_least(i, j)).sum::<f64>() / (m - 1) as f64)
                .collect();
            let z: f64 = q.iter().map(|q| (lambda * q).exp()).sum();
            let v: Vec<f64> = q.iter().map(|q| (lambda * q).exp() / z).collect();
            let of = |j: usize| {
                let wins = f64::from(expert >= scores[j]) * lambda / m as f64;
                let others = (0..m).filter(|&i| i != j);
                wins - v[j] - lambda * others.map(|i| v[i] * at_least(i, j)).sum::<f64>() / (m - 1) as f64
            };
            ((0..m).map(of).chain([1.0]).collect(), false)
        }
        Kind::BonRlb | Kind::BonRlbP => {
            let clip = objective.weight_clip.unwrap_or(10.0);
            let fails = rewards.iter().filter(|&&r| r == 0.0).count();
            let (nf, mf, ff) = (n as f64, m as f64, fails as f64);
            let pass = match fails == m {
                true => 0.0,
                false => {
                    nf * choose(fails, n - 1) / choose(m - 1, n - 1) / (1.0 - choose(fails, n) / choose(m, n))
                }
            };
            let fail = if fails == 0 { 0.0 } else { nf * (ff - 1.0) / (mf - ff + 1.0) };
            let (pass, fail) = match (objective.kind, objective.negative_sign) {
                (Kind::BonRlbP, _) => (pass * (mf - ff) / mf, 0.0),
                (_, Some(NegativeSign::Penalize)) => (pass, -fail),
                _ => (pass, fail),
            };
            let clipped = (pass > clip && fails < m) || (fail.abs() > clip && fails > 0);
            let of = |j: usize| {
                let only: Vec<f64> = (0..m).map(|i| f64::from(i == j)).collect();
                let weight = if rewards[j] == 0.0 { fail } else { pass };
                best_of_n(n, scores, &only) * weight.clamp(-clip, clip)
            };
            ((0..m).map(of).collect(), clipped)
        }
        kind => unreachable!(
            "no case has {kind}, whose formula is in the tests of objectives or of reward models"
        ),
    }
}

/// Linear from 0 to the peak, then the schedule down to its least value at the last step.
fn rate(config: &TrainConfig, step: u64) -> f64 {
    let o = &config.optimizer;
    let (step, warm, steps) = (step as f64, o.warmup_steps as f64, config.train.steps as f64);
    if step <= warm {
        return o.lr * step / warm;
    }
    let (left, least) = ((steps - step) / (steps - warm), o.lr * o.min_lr_ratio);
    match o.schedule {
        Schedule::Constant => o.lr,
        Schedule::Linear => least + (o.lr - least) * left,
        Schedule::Cosine => least + (o.lr - least) * (1.0 - (std::f64::consts::PI * left).cos()) / 2.0,
    }
}

/// Place `position` in an order of the tasks: one shuffle of them after the other.
fn place(case: &Case, tasks: usize, domain: Domain, position: usize) -> usize {
    let mut epoch: Vec<usize> = (0..tasks).collect();
    Stream::new(case.config.train.seed, domain, (position / tasks) as u64).shuffle(&mut epoch);
    epoch[position % tasks]
}

/// All groups that step `step`, which counts from 1, samples, and which of them it learns from, in their places.
fn groups(case: &Case, dir: &ModelDir<Cpu>, tasks: &Tasks, step: u64) -> (Vec<Group>, Vec<usize>) {
    let (config, count) = (&case.config, tasks.list.len());
    let (prompts, further) = (config.generate.prompts_per_step, config.generate.refill_prompts);
    let before = step as usize - 1;
    let mut picked: Vec<usize> =
        (before * prompts..step as usize * prompts).map(|p| place(case, count, Domain::Shuffle, p)).collect();
    let sample = |begin: usize, picked: &[usize]| {
        let tasks: Vec<&Task> = picked.iter().map(|&t| &tasks.list[t]).collect();
        sampled(case, dir, &tasks, begin as u32, step)
    };
    let mut all = sample(0, &picked);
    let mut kept: Vec<usize> = (0..prompts).collect();
    let mut left: Vec<usize> = (before * further..step as usize * further)
        .map(|p| place(case, count, Domain::Refill, p))
        .rev()
        .collect();
    loop {
        let idle: Vec<usize> = (0..prompts).filter(|&at| !all[kept[at]].teaches(config)).collect();
        let begin = picked.len();
        while picked.len() - begin < idle.len() && !left.is_empty() {
            let task = left.pop().unwrap();
            if !picked.contains(&task) {
                picked.push(task);
            }
        }
        if picked.len() == begin {
            return (all, kept);
        }
        all.extend(sample(begin, &picked[begin..]));
        let good = (begin..all.len()).filter(|&g| all[g].teaches(config));
        for (at, group) in idle.into_iter().zip(good) {
            kept[at] = group;
        }
    }
}

/// What is sampled of tasks whose numbers in random keys begin with `begin`.
fn sampled(case: &Case, dir: &ModelDir<Cpu>, picked: &[&Task], begin: u32, step: u64) -> Vec<Group> {
    let (config, generate_) = (&case.config, &case.config.generate);
    let stop = ResponseEnd::new(&dir.model.config, &dir.tokenizer, &generate_.stop);
    let prompt = |task: &&Task| {
        let text = format!("{}{}{}", config.data.prefix, task.prompt, config.data.suffix);
        dir.tokenizer.encode_prompt(&text).unwrap()
    };
    let prompts: Vec<Vec<u32>> = picked.iter().map(prompt).collect();
    let samples = if config.objective.kind == Kind::Sft { 0 } else { generate_.samples };
    let requests: Vec<Prompt> =
        (begin..).zip(&prompts).map(|(number, ids)| Prompt { ids, number, streams: samples }).collect();
    let sampling = Sampling {
        temperature: generate_.temperature as f32,
        truncation: Default::default(),
        max_new_tokens: generate_.max_new_tokens,
        seed: config.train.seed,
        step,
    };
    let sampled: Vec<Vec<Response>> = match samples {
        0 => vec![vec![]; prompts.len()],
        _ => generate(&dir.model, &requests, &sampling, |tokens| stop.reached(tokens), |_, _, _| {}).unwrap(),
    };
    let threshold = config.objective.pass_threshold.unwrap_or(0.5);
    let zip = prompts.into_iter().zip(sampled).zip(picked);
    zip.map(|((prompt, sampled), task)| {
        let firsts: Vec<Option<char>> = sampled.iter().map(|r| stop.text(&r.tokens).chars().next()).collect();
        // What was not judged gets the least that was, and no more than 0.
        let values = |judge: &Judge| {
            let found: Vec<Option<f64>> = firsts.iter().map(|&first| (judge.score)(first)).collect();
            let least = found.iter().flatten().copied().fold(0.0, f64::min);
            let unjudged = found.iter().filter(|x| x.is_none()).count();
            (found.into_iter().map(|x| x.unwrap_or(least)).collect::<Vec<f64>>(), unjudged)
        };
        let (scores, unscored) = values(case.verifier);
        let (rewards, unrewarded) = values(case.environment);
        let apart = !std::ptr::eq(case.verifier, case.environment);
        assert!(threshold > 0.0, "what was not judged must not pass");
        let expert = matches!(config.objective.kind, Kind::Sft | Kind::BonSft);
        let expert = expert.then(|| stop.complete(&task.answer, dir.tokenizer.eos()).unwrap());
        let expert_score = (case.verifier.score)(task.answer.chars().next()).expect("experts can be judged");
        let (c, clipped) = coefficients(config, &scores, &rewards, expert_score);
        let unjudged = unscored + if apart { unrewarded } else { 0 };
        Group { prompt, sampled, expert, scores, rewards, unjudged, c, clipped }
    })
    .collect()
}

/// The figures that groups alone say.
fn figures(config: &TrainConfig, step: u64, groups: &[Group]) -> StepMetrics {
    let n = config.objective.n.unwrap_or(1);
    let mut found = StepMetrics { step, lr: rate(config, step), ..Default::default() };
    for group in groups.iter().filter(|g| !g.sampled.is_empty()) {
        let share = 1.0 / groups.len() as f64;
        let passing: Vec<f64> = group.rewards.iter().map(|&r| f64::from(r >= 0.5)).collect();
        let right = passing.iter().sum::<f64>();
        let samples = passing.len() as f64;
        found.reward_mean += share * group.rewards.iter().sum::<f64>() / samples;
        found.pass_at_1 += share * right / samples;
        found.pass_at_n += share * best_of_n(n, &passing, &passing);
        found.best_of_n_reward += share * best_of_n(n, &group.scores, &group.rewards);
        found.all_pass_groups += u64::from(right == samples);
        found.all_fail_groups += u64::from(right == 0.0);
        let earned = match (config.objective.kind, config.objective.reward) {
            (Kind::BonRl, Some(Signal::Verifier)) => &group.scores,
            _ => &group.rewards,
        };
        found.zero_variance_groups += u64::from(earned.iter().all(|x| *x == earned[0]));
        found.clipped_groups += u64::from(group.clipped);
        found.tokens += group.sampled.iter().map(|r| r.tokens.len() as u64).sum::<u64>();
        found.truncated_responses +=
            group.sampled.iter().filter(|r| r.finish == Finish::Length).count() as u64;
        found.token_entropy -=
            group.sampled.iter().flat_map(|r| &r.logprobs).map(|&l| f64::from(l)).sum::<f64>();
        if group.unjudged > 0 {
            *found.verifier_failures.entry("missing".into()).or_default() += group.unjudged as u64;
        }
    }
    let responses: usize = groups.iter().map(|g| g.sampled.len()).sum();
    if responses > 0 {
        found.token_entropy /= found.tokens as f64;
        found.response_length = found.tokens as f64 / responses as f64;
        found.truncated_share = found.truncated_responses as f64 / responses as f64;
    }
    found
}

/// The slope of PPO's surrogate by a token's log-prob: none where the bounded ratio is the worse one.
fn slope(c: f64, gap: f64, below: f64, above: f64) -> f64 {
    let ratio = gap.exp();
    let bounded = ratio.clamp(1.0 - below, 1.0 + above);
    if ratio * c <= bounded * c { ratio * c } else { 0.0 }
}

/// Takes step `step` from `before`. Returns its figures, and how many tokens PPO's clip held.
fn take(
    case: &Case,
    before: &mut State,
    start: &Gemma<Cpu>,
    tasks: &Tasks,
    step: u64,
) -> (StepMetrics, usize) {
    let config = &case.config;
    let (train, optimizer) = (&config.train, &config.optimizer);
    let (all, kept) = groups(case, &before.dir, tasks, step);
    let mut found = figures(config, step, &all);
    let prompts = config.generate.prompts_per_step;
    found.refill_prompts = (all.len() - prompts) as u64;
    found.refilled_groups = kept.iter().filter(|&&g| g >= prompts).count() as u64;
    let groups: Vec<&Group> = kept.iter().map(|&g| &all[g]).collect();
    let batch = Groups(groups.iter().map(|g| (g.prompt.clone(), g.responses())).collect());
    let temperature = config.generate.temperature as f32;
    let forward = |model: &Gemma<Cpu>| batch.with(|groups| Forward::new(model, groups, temperature));
    let reference = forward(start).logprobs;
    let lengths: Vec<usize> =
        groups.iter().flat_map(|g| g.responses().into_iter().map(|r| r.len()).collect::<Vec<_>>()).collect();
    let mean_length = lengths.iter().sum::<usize>() as f64 / lengths.len() as f64;

    let names: Vec<String> =
        params::plan(&before.dir.model.config).tensors().iter().map(|s| s.name.clone()).collect();
    let mut weights_now = flat(&before.dir.model);
    let mut held = 0;
    for update in 1..=train.updates_per_batch as u64 {
        let model = &before.dir.model;
        let forward = forward(model);
        let (mut weights, mut loss) = (Vec::new(), 0.0);
        let (mut kl, mut gaps) = (0.0, Vec::new());
        for group in &groups {
            for (j, response) in group.responses().iter().enumerate() {
                let length = match train.length_normalizer {
                    LengthNormalizer::PerToken => mean_length,
                    LengthNormalizer::PerSequence => response.len() as f64,
                    LengthNormalizer::Constant => config.generate.max_new_tokens as f64,
                };
                for t in 0..response.len() {
                    let now = f64::from(forward.logprobs[weights.len()]);
                    let mut w = group.c[j];
                    let cut = group.sampled.get(j).is_some_and(|r| r.finish == Finish::Length);
                    if cut && train.mask_truncated {
                        w = 0.0;
                    } else if let Some(sample) = group.sampled.get(j) {
                        let gap = now - f64::from(sample.logprobs[t]);
                        if group.c[j] != 0.0 || train.kl_coefficient > 0.0 {
                            gaps.push(gap.abs());
                        }
                        if update > 1 {
                            let below = train.clip_epsilon;
                            w = slope(w, gap, below, train.clip_epsilon_high.unwrap_or(below));
                            held += usize::from(w == 0.0 && group.c[j] != 0.0);
                        }
                        let away = f64::from(reference[weights.len()]) - now;
                        kl += away.exp() - 1.0 - away;
                        w += train.kl_coefficient / group.sampled.len() as f64 * (away.exp() - 1.0);
                    }
                    let scaled = w / (groups.len() as f64 * length);
                    loss -= scaled * now;
                    weights.push(scaled as f32);
                }
            }
        }
        let mut grads = model.params.zeros_like(&Cpu::F32);
        forward.backward(model, &weights, &mut grads);
        let grads: Vec<Vec<f64>> =
            grads.tensors().iter().map(|g| Cpu::F32.to_f32(g).into_iter().map(f64::from).collect()).collect();
        let norm = grads.iter().flatten().map(|g| g * g).sum::<f64>().sqrt();
        let clip = optimizer.clip_norm;
        let scale = if clip > 0.0 && norm > clip { clip / norm } else { 1.0 };
        let t = ((step - 1) * train.updates_per_batch as u64 + update) as i32;
        for (i, grad) in grads.iter().enumerate() {
            let decay = if names[i].contains("norm") { 0.0 } else { optimizer.weight_decay };
            for (k, g) in grad.iter().map(|g| g * scale).enumerate() {
                let (m, v) = (&mut before.m[i][k], &mut before.v[i][k]);
                *m = optimizer.beta1 * *m + (1.0 - optimizer.beta1) * g;
                *v = optimizer.beta2 * *v + (1.0 - optimizer.beta2) * g * g;
                let m = *m / (1.0 - optimizer.beta1.powi(t));
                let v = *v / (1.0 - optimizer.beta2.powi(t));
                let w = &mut weights_now[i][k];
                *w -= found.lr * (decay * *w + m / (v.sqrt() + optimizer.eps));
            }
        }
        let model = &mut before.dir.model;
        for (tensor, new) in model.params.tensors_mut().into_iter().zip(&weights_now) {
            let narrow: Vec<f32> = new.iter().map(|&x| x as f32).collect();
            tensor.as_f32_mut().copy_from_slice(&narrow);
        }
        // The last update's; what says how far the sampler and the trainer are apart, the first one's.
        (found.loss, found.grad_norm) = (loss, norm);
        if update == 1 {
            let tokens = gaps.len().max(1) as f64;
            found.kl = (train.kl_coefficient > 0.0).then(|| kl / tokens);
            found.logprob_gap_max = gaps.iter().copied().fold(0.0, f64::max);
            found.logprob_gap_mean = gaps.iter().sum::<f64>() / tokens;
        }
    }
    (found, held)
}

fn distance(a: &[Vec<f64>], b: &[Vec<f64>]) -> f64 {
    a.iter().flatten().zip(b.iter().flatten()).map(|(a, b)| (a - b).powi(2)).sum::<f64>().sqrt()
}

/// Whether two figures are the same but for the rounding of sums.
#[track_caller]
fn assert_near(what: &str, found: f64, want: f64, tolerance: f64) {
    assert!((found - want).abs() <= tolerance * want.abs().max(1e-3), "{what}: {found}, want {want}");
}

/// Runs the trainer, then takes every step again. Returns the trainer's figures.
fn check(name: &str, case: &Case) -> Vec<StepMetrics> {
    let config = &case.config;
    let steps = train_on(Cpu::F32, config, false, STEPS);
    assert_eq!(steps.len() as u64, STEPS);
    let tasks = Tasks::read(&config.data.tasks).unwrap();
    let (start, mut held) = (case.state(0).dir.model, 0);
    for (found, step) in steps.iter().zip(1..) {
        let name = format!("{name}, step {step}");
        let (mut state, after) = (case.state(step - 1), case.state(step));
        let before = flat(&state.dir.model);
        let (want, clipped) = take(case, &mut state, &start, &tasks, step);
        held += clipped;

        // Sums of log-probs that are the same bits, in another order.
        for (figure, found, want) in [
            ("loss", found.loss, want.loss),
            ("lr", found.lr, want.lr),
            ("reward_mean", found.reward_mean, want.reward_mean),
            ("pass_at_1", found.pass_at_1, want.pass_at_1),
            ("pass_at_n", found.pass_at_n, want.pass_at_n),
            ("best_of_n_reward", found.best_of_n_reward, want.best_of_n_reward),
            ("token_entropy", found.token_entropy, want.token_entropy),
            ("response_length", found.response_length, want.response_length),
            ("truncated_share", found.truncated_share, want.truncated_share),
            ("kl", found.kl.unwrap_or(-1.0), want.kl.unwrap_or(-1.0)),
            ("logprob_gap_mean", found.logprob_gap_mean, want.logprob_gap_mean),
            ("logprob_gap_max", found.logprob_gap_max, want.logprob_gap_max),
        ] {
            // After an update, of weights that were rounded at another place.
            let tolerance = if figure == "loss" && config.train.updates_per_batch > 1 { 1e-4 } else { 1e-9 };
            assert_near(&format!("{name}: {figure}"), found, want, tolerance);
        }
        assert_near(&format!("{name}: grad_norm"), found.grad_norm, want.grad_norm, 1e-4);
        let counts = |m: &StepMetrics| {
            (
                [m.step, m.tokens, m.truncated_responses, m.all_pass_groups, m.all_fail_groups],
                [m.zero_variance_groups, m.clipped_groups, m.refill_prompts, m.refilled_groups],
                m.verifier_failures.clone(),
            )
        };
        assert_eq!(counts(found), counts(&want), "{name}");

        // Moments and weights: sums of gradients in f32.
        let (off, way) = (distance(&flat(&after.dir.model), &flat(&state.dir.model)), {
            distance(&flat(&state.dir.model), &before)
        });
        assert!(off <= 1e-4 * way && way > 0.0, "{name}: weights {off:e} off after a way of {way:e}");
        let zero: Vec<Vec<f64>> = state.m.iter().map(|x| vec![0.0; x.len()]).collect();
        for (moment, found, want) in [("m", &after.m, &state.m), ("v", &after.v, &state.v)] {
            let (off, size) = (distance(found, want), distance(want, &zero));
            assert!(off <= 1e-4 * size && size > 0.0, "{name}: {moment} {off:e} off of {size:e}");
        }

        let saved = case.snapshot(step).state;
        assert_eq!(saved.step, step);
        assert_eq!(
            (saved.config_hash, saved.data_hash),
            (config.resume_hash().unwrap(), tasks.fingerprint),
            "{name}"
        );
    }
    assert_eq!(held > 0, config.train.updates_per_batch > 1, "{name}: whether PPO's clip held anything");
    steps
}

const DISAGREEING: &str = "objective={kind='bon-rl', n=2, selector='verifier', reward='environment'}";

/// What selects is not what is earned, and neither is 0 or 1.
#[test]
fn bon_rl_with_a_verifier_and_an_environment_that_disagree() {
    for (name, objective) in [
        ("by the verifier", DISAGREEING),
        ("by the environment", "objective={kind='bon-rl', n=3, selector='environment', reward='verifier'}"),
    ] {
        let set = [
            objective,
            "generate={samples=6, prompts_per_step=4, max_new_tokens=5, temperature=0.8}",
            "optimizer.schedule=cosine",
            "optimizer.warmup_steps=2",
            "optimizer.weight_decay=0.1",
            "optimizer.clip_norm=50",
            "train.seed=11",
            "train.gradient_accumulation=2",
            "data.prefix=see ",
            "data.suffix= =",
        ];
        let steps = check(name, &Case::new(&GRADED, Some(&WAYWARD), &set));
        assert!(
            steps
                .iter()
                .all(|m| m.token_entropy > 0.0 && m.response_length > 1.0 && m.response_length <= 5.0)
        );
        // Short of the clip, and above it where the test of a clipped norm is.
        assert!(steps.iter().all(|m| m.grad_norm > 0.0 && m.grad_norm < 50.0), "{name}");
        assert!(steps.iter().any(|m| m.verifier_failures["missing"] > 0), "{name}");
        assert!(steps.iter().any(|m| m.pass_at_n > m.best_of_n_reward), "{name}");
    }
}

/// Experts, whose token weights no clip and no KL touches, and samples that are pushed away.
#[test]
fn bon_sft_with_experts_of_every_score() {
    for normalizer in ["per-token", "per-sequence"] {
        let normalizer = format!("train.length_normalizer={normalizer}");
        let set = [
            "objective={kind='bon-sft', n=3}",
            "generate={samples=5, prompts_per_step=3, max_new_tokens=6}",
            "optimizer.schedule=linear",
            "optimizer.warmup_steps=3",
            "optimizer.clip_norm=0.05",
            "train.gradient_accumulation=3",
            "train.updates_per_batch=2",
            "train.clip_epsilon=0.05",
            "train.kl_coefficient=0.2",
            &normalizer,
        ];
        let steps = check(&normalizer, &Case::new(&GRADED, None, &set));
        assert!(steps.iter().all(|m| m.grad_norm > 0.05), "the norm must be clipped");
        assert!(steps[0].kl == Some(0.0) && steps[4].kl > Some(0.0));
    }
}

/// Coefficients below 0 under PPO's clip, where the ratio is held from below.
#[test]
fn objectives_with_negative_coefficients() {
    for (name, objective, verifier) in [
        ("penalize", "objective={kind='bon-rlb', n=4, negative_sign='penalize', weight_clip=1.5}", &BINARY),
        ("unbiased", "objective={kind='bon-rlb', n=3, negative_sign='unbiased', weight_clip=2.5}", &BINARY),
        ("rl", "objective={kind='rl'}", &GRADED),
        ("pass-at-n", "objective={kind='pass-at-n', n=2}", &BINARY),
        ("pkpo", "objective={kind='pkpo', n=3}", &GRADED),
        ("max-rl", "objective={kind='max-rl', n=2}", &BINARY),
        ("grpo", "objective={kind='grpo'}", &GRADED),
    ] {
        let set = [
            objective,
            "generate={samples=7, prompts_per_step=2, max_new_tokens=4, temperature=1.3, stop=['a', '1']}",
            "optimizer={lr=5e-3, warmup_steps=1, weight_decay=0.01, clip_norm=0.3, beta1=0.8, beta2=0.9, eps=1e-4}",
            "train.gradient_accumulation=2",
            "train.updates_per_batch=3",
            "train.clip_epsilon=0.03",
            "train.kl_coefficient=0.02",
            "train.length_normalizer=per-sequence",
        ];
        let steps = check(name, &Case::new(verifier, None, &set));
        assert!(steps.iter().any(|m| m.truncated_responses > 0 && m.truncated_responses < 14), "{name}");
        if name == "penalize" {
            assert!(steps.iter().any(|m| m.clipped_groups > 0), "{name}");
        }
    }
}

/// Above 1 a ratio is held by the bound of its own, below 1 by the other; without that they are one.
#[test]
fn the_clip_has_two_bounds_where_that_is_asked_for() {
    let run = |name: &str, bounds: &[&str]| {
        let mut set = vec![
            "objective={kind='rl'}",
            "generate={samples=6, prompts_per_step=2, max_new_tokens=4, temperature=1.3}",
            "optimizer.lr=4e-3",
            "train.updates_per_batch=3",
        ];
        set.extend(bounds);
        check(name, &Case::new(&GRADED, None, &set)).iter().map(|m| m.grad_norm).collect::<Vec<f64>>()
    };
    let narrow = run("one bound", &["train.clip_epsilon=0.02"]);
    assert_eq!(narrow, run("twice the same", &["train.clip_epsilon=0.02", "train.clip_epsilon_high=0.02"]));
    assert_ne!(narrow, run("higher", &["train.clip_epsilon=0.02", "train.clip_epsilon_high=0.5"]));
    assert_ne!(narrow, run("lower", &["train.clip_epsilon=0.5", "train.clip_epsilon_high=0.02"]));
}

/// What the length limit cut is out of the loss, of its KL term and of the gaps, and nothing else moves: with experts,
/// which no limit cuts, and in groups of which only a part is cut.
#[test]
fn truncated_responses_are_masked_where_that_is_asked_for() {
    for (name, objective, normalizer) in [
        ("masked, grpo", "objective={kind='grpo'}", "per-token"),
        ("masked, bon-sft", "objective={kind='bon-sft', n=2}", "constant"),
    ] {
        let normalizer = format!("train.length_normalizer={normalizer}");
        for kl in ["train.kl_coefficient=0", "train.kl_coefficient=0.1"] {
            let set = [
                objective,
                "generate={samples=6, prompts_per_step=3, max_new_tokens=4, temperature=1.3, stop=['a', '1', 'q']}",
                "optimizer.lr=2e-3",
                "train.updates_per_batch=2",
                "train.clip_epsilon=0.01",
                "train.mask_truncated=true",
                &normalizer,
                kl,
            ];
            let steps = check(name, &Case::new(&GRADED, None, &set));
            assert!(steps.iter().any(|m| m.truncated_responses > 0 && m.truncated_responses < 18), "{name}");
        }
    }
}

/// Further prompts in the place of groups that teach nothing, until all teach or no more may be drawn: in one step or
/// another all of that happens.
#[test]
fn groups_that_teach_nothing_are_replaced_as_far_as_that_is_asked_for() {
    let (mut full, mut short, mut drawn) = (0, 0, 0);
    for (name, set) in [
        ("refill", ["objective={kind='pass-at-n', n=2}", "generate.refill_prompts=6", "generate.samples=2"]),
        (
            "refill under KL",
            ["objective={kind='grpo'}", "generate.refill_prompts=2", "train.kl_coefficient=0.1"],
        ),
        (
            "refill, masked",
            ["objective={kind='max-rl'}", "generate.refill_prompts=20", "train.mask_truncated=true"],
        ),
    ] {
        let more = [
            "generate.samples=3",
            "generate.prompts_per_step=4",
            "generate.max_new_tokens=5",
            "generate.stop=['a', '1', 'q', 'x']",
            "train.updates_per_batch=2",
            "train.gradient_accumulation=2",
            "train.clip_epsilon=0.01",
            "optimizer.lr=5e-3",
        ];
        let steps = check(name, &Case::new(&BINARY, None, &[&more[..], &set].concat()));
        for m in steps {
            // Of seven tasks four are drawn before, or three where one ends an epoch and begins the next.
            assert!(m.refill_prompts <= 4 && m.refilled_groups <= m.refill_prompts, "{m:?}");
            drawn += m.refill_prompts;
            full += u64::from(m.refilled_groups > 0 && m.refilled_groups == m.refill_prompts);
            short += u64::from(m.refilled_groups < m.refill_prompts);
        }
    }
    assert!(full > 0 && short > 0 && drawn > 6, "{full} {short} {drawn}");
}

#[test]
fn sft_of_experts_alone() {
    let set = [
        "objective={kind='sft'}",
        "generate.prompts_per_step=4",
        "generate.stop=['z']",
        "optimizer.schedule=linear",
        "optimizer.clip_norm=0",
        "optimizer.warmup_steps=2",
        "train.gradient_accumulation=4",
        "train.length_normalizer=per-token",
    ];
    check("sft", &Case::new(&GRADED, None, &set));
}

/// How far the trainer's log-probs are from the sampler's counts whichever way they are off, and is taken before the
/// first update.
#[test]
fn gaps_of_log_probs_have_no_sign() {
    for (shift, mean) in [([-0.25f32; 2], 0.25), ([0.25; 2], 0.25), ([0.5, -0.5], 0.5), ([-0.125, 0.0], 0.0)]
    {
        let set = [DISAGREEING, "train.kl_coefficient=0.1", "train.updates_per_batch=2", "optimizer.lr=0.05"];
        let case = Case::new(&GRADED, Some(&WAYWARD), &set);
        let backend = Delegating { shift, ..Delegating::new() };
        for step in train_on(backend, &case.config, false, STEPS) {
            let most = f64::from(shift[0].abs());
            assert!((step.logprob_gap_max - most).abs() < 1e-6, "{shift:?}: {}", step.logprob_gap_max);
            let found = step.logprob_gap_mean;
            match mean {
                // Every third token of a batch, and of a second micro-batch.
                0.0 => assert!((found - most / 3.0).abs() < 0.01, "{shift:?}: {found}"),
                _ => assert!((found - mean).abs() < 1e-6, "{shift:?}: {found}"),
            }
        }
    }
}
