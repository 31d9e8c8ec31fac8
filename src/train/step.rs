//! One step: sample, score, weigh, backward, step.

use std::time::Instant;

use super::config::{LengthNormalizer, TrainConfig};
use super::error::TrainError;
use super::metrics::{PhaseSeconds, StepMetrics};
use super::optimizer::Optimizer;
use super::policy::{Continued, Forward};
use super::schedule::learning_rate;
use super::scored::{Fit, Scored};
use super::setup::{expert, prompt, rollout, sampling, stop_rule};
use crate::backend::Backend;
use crate::eval::estimators::{answer_counts, entropy};
use crate::eval::{Unjudged, count_by_kind};
use crate::gemma::Gemma;
use crate::gemma::activations::{Kept, Recompute};
use crate::generate::Finish;
use crate::model_dir::ModelDir;
use crate::objective::{Coefficients, GroupMetrics, ScoredGroup, coefficients};
use crate::rollout::{Given, Group, Judges, RolloutSeconds};
use crate::tasks::{Order, Task, Tasks};

/// What steps are taken with.
pub(super) struct Stepper<'a, B: Backend> {
    pub(super) config: &'a TrainConfig,
    pub(super) tasks: &'a Tasks,
    /// The order of the tasks.
    pub(super) order: Order,
    /// The order of those that take the place of others.
    pub(super) refills: Order,
    /// `None` where the objective needs no samples and nothing is evaluated.
    pub(super) judges: Option<Judges>,
    /// The frozen start, where there is a KL term and weights are trained. Adapters are switched off instead.
    pub(super) reference: Option<Gemma<B>>,
    /// The tasks' scored responses, where a verifier is trained; in the order of the tasks.
    pub(super) scored: Vec<Scored>,
    /// The fewest activations that a micro-batch kept so far.
    pub(super) kept: Option<Kept>,
}

/// One task's part of a step.
struct Weighed {
    prompt: Vec<u32>,
    responses: Vec<Vec<u32>>,
    /// c_j of every response, the expert's last where there is one; 0 of those that are masked.
    coefficients: Vec<f64>,
    /// Whether a response is left out of the loss, KL term and all.
    masked: Vec<bool>,
    /// Sampled responses are the first `sampled`; these are their log-probs when they were drawn.
    sampled: usize,
    old_logprobs: Vec<Vec<f32>>,
}

impl Weighed {
    /// Whether the objective learns anything from it.
    fn teaches(&self) -> bool {
        self.coefficients.iter().any(|&c| c != 0.0)
    }
}

impl<B: Backend> Stepper<'_, B> {
    /// Step `step` (1, 2, 3...): `prompts_per_step` tasks from their places in the order. Its figures, and the responses
    /// that could not be judged.
    pub(super) fn step(
        &mut self,
        dir: &mut ModelDir<B>,
        optimizer: &mut Optimizer<B>,
        step: u64,
    ) -> Result<(StepMetrics, Vec<Unjudged>), TrainError> {
        let config = self.config;
        let started = Instant::now();
        let prompts = config.generate.prompts_per_step as u64;
        let picked: Vec<usize> = ((step - 1) * prompts..step * prompts).map(|p| self.order.task(p)).collect();
        let mut metrics = StepMetrics { step, ..StepMetrics::default() };
        let mut seconds = PhaseSeconds::default();
        let mut unjudged = Vec::new();
        let verifier = config.objective.kind.trains_verifier();
        let labelled = if verifier { picked.clone() } else { Vec::new() };
        let weighed = if verifier {
            Vec::new()
        } else if config.objective.kind.objective().needs_samples {
            let mut sampled = Sampled::default();
            let mut weighed = self.sample(dir, step, 0, &picked, &mut sampled)?;
            metrics.refilled_groups = self.refill(dir, step, picked, &mut weighed, &mut sampled)?;
            sampled.figures(&mut metrics);
            metrics.refill_prompts = sampled.answers.len() as u64 - prompts;
            (seconds.generate, seconds.verify) = (sampled.seconds.generate, sampled.seconds.verify);
            unjudged = sampled.unjudged;
            weighed
        } else {
            let stop_rule = stop_rule(config, dir);
            picked
                .iter()
                .map(|&index| {
                    let task = &self.tasks.list[index];
                    let (_, prompt) = prompt(config, dir, &config.data.tasks, task)?;
                    let unit = self.coefficients(step, index, &ScoredGroup::default())?;
                    Ok(Weighed {
                        prompt,
                        responses: vec![expert(config, dir, &stop_rule, task)?],
                        coefficients: unit.expert.into_iter().collect(),
                        masked: vec![false],
                        sampled: 0,
                        old_logprobs: vec![],
                    })
                })
                .collect::<Result<_, TrainError>>()?
        };

        let lr = learning_rate(&config.optimizer, config.train.steps, step);
        let updates = config.train.updates_per_batch as u64;
        for update in 0..updates {
            let phase = Instant::now();
            let micro = prompts.div_ceil(config.train.gradient_accumulation as u64) as usize;
            let mut total = Totals::default();
            for groups in weighed.chunks(micro) {
                let micro = MicroBatch { groups, step_groups: &weighed, update, step };
                self.backward(&mut dir.model, optimizer, micro, &mut total)?;
            }
            if verifier {
                let scored: Vec<&Scored> = labelled.iter().map(|&index| &self.scored[index]).collect();
                let mut fit = Fit::default();
                for groups in scored.chunks(micro) {
                    fit.backward(config, &dir.model, optimizer, groups, scored.len(), step)?;
                }
                if update == 0 {
                    metrics.verifier = Some(fit.metrics());
                }
                (total.loss, total.kept) = (fit.loss, fit.kept);
            }
            self.kept = self.kept.into_iter().chain(total.kept).min_by_key(Kept::parts);
            seconds.forward_backward += phase.elapsed().as_secs_f64();
            let phase = Instant::now();
            let t = (step - 1) * updates + update + 1;
            let stepped = optimizer.step(&mut dir.model, &config.optimizer, lr, t);
            // Figures that a failed device returns mean nothing.
            dir.model.backend.check().map_err(|source| TrainError::Device { step, source })?;
            metrics.grad_norm = stepped.map_err(|source| TrainError::Gradient { step, source })?;
            seconds.optimizer += phase.elapsed().as_secs_f64();
            if update == 0 {
                // Later updates have moved away from the sampler; the first must agree with it.
                metrics.logprob_gap_max = total.gap_max;
                metrics.logprob_gap_mean = total.gap_sum / total.sampled.max(1) as f64;
                metrics.kl = self.holds().then(|| total.kl / total.sampled.max(1) as f64);
            }
            metrics.loss = total.loss;
        }
        metrics.lr = lr;
        metrics.seconds = seconds;
        metrics.tokens_per_second = metrics.tokens as f64 / started.elapsed().as_secs_f64();
        Ok((metrics, unjudged))
    }

    /// Whether a KL term holds the policy to its start.
    fn holds(&self) -> bool {
        self.config.train.kl_coefficient > 0.0
    }

    /// The objective's coefficients for the group of task `index`.
    fn coefficients(&self, step: u64, index: usize, group: &ScoredGroup) -> Result<Coefficients, TrainError> {
        coefficients(&self.config.objective, group).map_err(|source| TrainError::Objective {
            step,
            path: self.config.data.tasks.clone(),
            line: self.tasks.list[index].line,
            source,
        })
    }

    /// Samples, judges and weighs groups of the tasks `picked`, whose numbers in RNG keys begin with `begin`.
    fn sample(
        &mut self,
        dir: &ModelDir<B>,
        step: u64,
        begin: usize,
        picked: &[usize],
        sampled: &mut Sampled,
    ) -> Result<Vec<Weighed>, TrainError> {
        let config = self.config;
        let tasks: Vec<&Task> = picked.iter().map(|&t| &self.tasks.list[t]).collect();
        let Some(judges) = &mut self.judges else { unreachable!("validated: there is a verifier") };
        let (stop_rule, sampling) = (stop_rule(config, dir), sampling(config, step));
        let rollout = rollout(config, dir, &stop_rule);
        let rolled = rollout.run_from(begin, &tasks, config.generate.samples, &sampling, judges, || {});
        let (mut groups, seconds) = rolled.map_err(|source| TrainError::Rollout { step, source })?;
        sampled.add(&mut groups, seconds);
        self.weigh(dir, step, picked, groups, sampled)
    }

    /// Puts groups of further tasks in the place of those that teach nothing, as many as `generate.refill_prompts` permits
    /// to draw. Of a step's tasks none is drawn twice so. How many groups were replaced.
    ///
    /// The tasks are those of the step's own places in an order of their own: what one step draws moves no other step, and
    /// there is nothing to save.
    fn refill(
        &mut self,
        dir: &ModelDir<B>,
        step: u64,
        mut picked: Vec<usize>,
        weighed: &mut [Weighed],
        sampled: &mut Sampled,
    ) -> Result<u64, TrainError> {
        let most = self.config.generate.refill_prompts as u64;
        let mut places = (step - 1) * most..step * most;
        let mut replaced = 0;
        loop {
            let idle: Vec<usize> = (0..weighed.len()).filter(|&g| !weighed[g].teaches()).collect();
            let begin = picked.len();
            while picked.len() < begin + idle.len()
                && let Some(place) = places.next()
            {
                let task = self.refills.task(place);
                if !picked.contains(&task) {
                    picked.push(task);
                }
            }
            if picked.len() == begin {
                return Ok(replaced);
            }
            let found = self.sample(dir, step, begin, &picked[begin..], sampled)?;
            for (group, place) in found.into_iter().filter(Weighed::teaches).zip(idle) {
                weighed[place] = group;
                replaced += 1;
            }
        }
    }

    /// What sampled groups of the tasks `picked` teach.
    fn weigh(
        &self,
        dir: &ModelDir<B>,
        step: u64,
        picked: &[usize],
        groups: Vec<Group>,
        sampled: &mut Sampled,
    ) -> Result<Vec<Weighed>, TrainError> {
        let stop_rule = stop_rule(self.config, dir);
        let mut weighed = Vec::new();
        for (group, &index) in groups.into_iter().zip(picked) {
            let mut experts = None;
            let mut scored = ScoredGroup { scores: group.scores, rewards: group.rewards, expert_score: None };
            if let (true, Some(judges)) =
                (self.config.objective.kind.objective().needs_expert(), &self.judges)
            {
                let task = &self.tasks.list[index];
                let (prompt, _) = prompt(self.config, dir, &self.config.data.tasks, task)?;
                let tokens = expert(self.config, dir, &stop_rule, task)?;
                let (path, line) = (&self.config.data.tasks, task.line);
                let text = stop_rule.text(&tokens);
                let given = Given { prompt: (&prompt, &group.prompt), response: (&text, &tokens), task };
                let score = judges.score(given).map_err(|source| TrainError::ExpertScore {
                    path: path.clone(),
                    line,
                    source,
                })?;
                scored.expert_score =
                    Some(score.map_err(|source| TrainError::Expert { path: path.clone(), line, source })?);
                experts = Some(tokens);
            }
            let Coefficients { samples, expert, metrics: found } = self.coefficients(step, index, &scored)?;
            sampled.groups.extend(found);
            let sampled = group.responses.len();
            let mask = self.config.train.mask_truncated;
            let cut = group.responses.iter().map(|r| mask && r.finish == Finish::Length);
            let masked: Vec<bool> = cut.chain(experts.iter().map(|_| false)).collect();
            let (mut responses, old_logprobs): (Vec<_>, Vec<_>) =
                group.responses.into_iter().map(|r| (r.tokens, r.logprobs)).unzip();
            responses.extend(experts);
            let all = samples.into_iter().chain(expert).zip(&masked);
            let coefficients = all.map(|(c, &masked)| if masked { 0.0 } else { c }).collect();
            let prompt = group.prompt;
            weighed.push(Weighed { prompt, responses, coefficients, masked, sampled, old_logprobs });
        }
        Ok(weighed)
    }

    /// Adds the gradient of one micro-batch.
    fn backward(
        &self,
        model: &mut Gemma<B>,
        optimizer: &mut Optimizer<B>,
        MicroBatch { groups, step_groups, update, step }: MicroBatch,
        total: &mut Totals,
    ) -> Result<(), TrainError> {
        let config = self.config;
        let temperature = config.generate.temperature as f32;
        // A response whose coefficient is zero moves nothing, unless the KL term holds it: positive-only objectives
        // on hard tasks spare most of the work.
        let counts = |g: &Weighed, j: usize| !g.masked[j] && (self.holds() || g.coefficients[j] != 0.0);
        let groups: Vec<(&Weighed, Vec<usize>)> = groups
            .iter()
            .map(|g| (g, (0..g.responses.len()).filter(|&j| counts(g, j)).collect()))
            .filter(|(_, picked): &(_, Vec<usize>)| !picked.is_empty())
            .collect();
        if groups.is_empty() {
            return Ok(());
        }
        let responses: Vec<Vec<&[u32]>> = groups
            .iter()
            .map(|(g, picked)| picked.iter().map(|&j| g.responses[j].as_slice()).collect())
            .collect();
        let continued: Vec<Continued> = groups
            .iter()
            .zip(&responses)
            .map(|((g, _), responses)| Continued { prompt: &g.prompt, responses })
            .collect();
        // First, since nothing of it stays but the log-probs.
        let logprobs = |m: &Gemma<B>| Forward::with(m, &continued, temperature, Recompute::All).logprobs;
        let reference = match &self.reference {
            Some(reference) => Some(logprobs(reference)),
            None if self.holds() => {
                let scale = model.adapter_scale.take();
                let reference = logprobs(model);
                model.adapter_scale = scale;
                Some(reference)
            }
            None => None,
        };
        let model = &*model;
        let forward = Forward::with(model, &continued, temperature, config.train.recompute);
        total.kept = total.kept.into_iter().chain([forward.kept]).min_by_key(Kept::parts);
        model.backend.check().map_err(|source| TrainError::Device { step, source })?;

        let count: usize = step_groups.iter().map(|g| g.responses.len()).sum();
        let tokens: usize = step_groups.iter().flat_map(|g| &g.responses).map(Vec::len).sum();
        let mean_length = tokens as f64 / count as f64;
        let mut weights = Vec::with_capacity(forward.logprobs.len());
        for (group, picked) in &groups {
            for &j in picked {
                let response = &group.responses[j];
                let length = match config.train.length_normalizer {
                    LengthNormalizer::PerToken => mean_length,
                    LengthNormalizer::PerSequence => response.len() as f64,
                    LengthNormalizer::Constant => config.generate.max_new_tokens as f64,
                };
                let scale = 1.0 / (step_groups.len() as f64 * length);
                let c = group.coefficients[j];
                for t in 0..response.len() {
                    let logprob = forward.logprobs[weights.len()];
                    if !logprob.is_finite() {
                        return Err(TrainError::LogProb { step, value: logprob });
                    }
                    let mut w = c;
                    if j < group.sampled {
                        let gap = f64::from(logprob) - f64::from(group.old_logprobs[j][t]);
                        total.gap_max = total.gap_max.max(gap.abs());
                        total.gap_sum += gap.abs();
                        total.sampled += 1;
                        if update > 0 {
                            w = clipped_weight(c, gap, config.train.clip());
                        }
                        if let Some(reference) = &reference {
                            let d = f64::from(reference[weights.len()]) - f64::from(logprob);
                            let (kl, slope) = k3(d);
                            total.kl += kl;
                            w -= config.train.kl_coefficient * slope / group.sampled as f64;
                        }
                    }
                    total.loss -= w * scale * f64::from(logprob);
                    weights.push((w * scale) as f32);
                }
            }
        }
        forward.backward(model, &weights, &mut optimizer.grads);
        Ok(())
    }
}

/// d/d log pi of PPO's min(ratio c, clip(ratio, 1 - low, 1 + high) c) (Schulman et al. 2017, eq. 7, where the two are
/// one), where ratio = e^gap and gap = log pi - log pi_old: ratio c, and 0 where the clip holds.
fn clipped_weight(c: f64, gap: f64, (low, high): (f64, f64)) -> f64 {
    let ratio = gap.exp();
    let held = if c > 0.0 { ratio > 1.0 + high } else { ratio < 1.0 - low };
    if held { 0.0 } else { ratio * c }
}

/// Schulman's k3 estimator of KL(pi || ref) at one token, e^d - d - 1 with d = log ref - log pi, and its derivative
/// by log pi.
fn k3(d: f64) -> (f64, f64) {
    (d.exp() - d - 1.0, 1.0 - d.exp())
}

/// Groups whose gradient is computed at once.
struct MicroBatch<'a> {
    groups: &'a [Weighed],
    /// All groups of the step: normalisers are the step's.
    step_groups: &'a [Weighed],
    /// The number of updates that the step has made.
    update: u64,
    step: u64,
}

/// Sums over a step's micro-batches.
#[derive(Default)]
struct Totals {
    loss: f64,
    gap_max: f64,
    gap_sum: f64,
    kl: f64,
    sampled: u64,
    kept: Option<Kept>,
}

/// What a step samples, of all its rollouts.
#[derive(Default)]
struct Sampled {
    /// Of each group.
    groups: Vec<GroupMetrics>,
    /// Distinct answers and the entropy of the answers, likewise.
    answers: Vec<(f64, f64)>,
    responses: u64,
    tokens: u64,
    /// Sum of the tokens' log-probs.
    logprobs: f64,
    truncated: u64,
    unjudged: Vec<Unjudged>,
    seconds: RolloutSeconds,
}

impl Sampled {
    /// Counts what can be read off the groups themselves, and takes what could not be judged out of them.
    fn add(&mut self, groups: &mut [Group], seconds: RolloutSeconds) {
        self.seconds.generate += seconds.generate;
        self.seconds.verify += seconds.verify;
        for group in groups {
            self.unjudged.append(&mut group.unjudged);
            for response in &group.responses {
                self.responses += 1;
                self.tokens += response.tokens.len() as u64;
                self.logprobs += response.logprobs.iter().map(|&logprob| f64::from(logprob)).sum::<f64>();
                self.truncated += u64::from(response.finish == Finish::Length);
            }
            let (answers, _) = answer_counts(&group.samples());
            self.answers.push((answers.len() as f64, entropy(&answers)));
        }
    }

    fn figures(&self, metrics: &mut StepMetrics) {
        let all = &self.groups;
        let mean = |f: fn(&GroupMetrics) -> f64| all.iter().map(f).sum::<f64>() / all.len().max(1) as f64;
        metrics.reward_mean = mean(|m| m.mean_reward);
        metrics.pass_at_1 = mean(|m| 1.0 - m.p_fail);
        metrics.pass_at_n = mean(|m| m.pass_at_n);
        metrics.best_of_n_reward = mean(|m| m.best_of_n);
        metrics.all_pass_groups = all.iter().filter(|m| m.all_pass).count() as u64;
        metrics.all_fail_groups = all.iter().filter(|m| m.all_fail).count() as u64;
        metrics.zero_variance_groups = all.iter().filter(|m| m.zero_variance).count() as u64;
        metrics.clipped_groups = all.iter().filter(|m| m.clipped > 0).count() as u64;
        let share = 1.0 / self.answers.len() as f64;
        for (distinct, entropy) in &self.answers {
            metrics.distinct_answers += distinct * share;
            metrics.answer_entropy += entropy * share;
        }
        (metrics.tokens, metrics.truncated_responses) = (self.tokens, self.truncated);
        metrics.token_entropy = -self.logprobs / self.tokens as f64;
        metrics.response_length = self.tokens as f64 / self.responses as f64;
        metrics.truncated_share = self.truncated as f64 / self.responses as f64;
        metrics.verifier_failures = count_by_kind(&self.unjudged);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Central difference of `f` at `x`.
    fn slope(f: impl Fn(f64) -> f64, x: f64) -> f64 {
        let h = 1e-6;
        (f(x + h) - f(x - h)) / (2.0 * h)
    }

    #[test]
    fn weights_are_the_derivatives_of_what_they_stand_for() {
        let surrogate = |c: f64, (low, high): (f64, f64)| {
            move |gap: f64| {
                let ratio = gap.exp();
                (ratio * c).min(ratio.clamp(1.0 - low, 1.0 + high) * c)
            }
        };
        for gap in [-0.9, -0.3, -0.1, 0.0, 0.1, 0.3, 0.9] {
            for (c, clip) in [(-1.5, (0.2, 0.2)), (0.7, (0.2, 0.2)), (-1.5, (0.05, 0.4)), (0.7, (0.05, 0.4))]
            {
                let expected = slope(surrogate(c, clip), gap);
                assert!((clipped_weight(c, gap, clip) - expected).abs() < 1e-8, "{c} {gap} {clip:?}");
            }
            // By log pi, d falls as log pi rises.
            assert!((k3(gap).1 + slope(|d| k3(d).0, gap)).abs() < 1e-8, "{gap}");
        }
    }
}
