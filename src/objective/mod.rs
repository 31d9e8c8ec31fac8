//! Objectives: from a scored group of responses to one coefficient per response. Pure functions, no device, no I/O.
//!
//! Every objective of Chow et al., "Inference-Aware Fine-Tuning for Best-of-N Sampling in Large Language Models"
//! (arXiv 2412.15287), reduces to a coefficient c_j on log pi(y_j|x): the gradient to *ascend* is
//! `sum_j c_j grad log pi(y_j|x)`, plus `c* grad log pi(y*|x)` where an expert response y* takes part. The trainer
//! needs one weighted backward pass whatever the objective is.
//!
//! Notation, here and in the files below: M samples in the group, N the Best-of-N size, r verifier scores (they
//! select), R environment rewards (they are what we care about), w_j the chance that Best-of-N returns sample j.

mod bon_rl;
pub mod bon_rlb;
pub mod bon_sft;
mod rl;
mod sft;
pub mod shared;

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// Which objective to optimise.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// Maximum likelihood of the expert response.
    Sft,
    /// Maximum likelihood of the expert response under the variational Best-of-N policy.
    BonSft,
    /// REINFORCE on the mean reward with the leave-one-out baseline (RLOO).
    Rl,
    /// Best-of-N reward, with `selector` and `reward` given explicitly.
    BonRl,
    /// Best-of-N reward: the verifier selects and rewards.
    BonRlV,
    /// Best-of-N reward: the environment selects and rewards.
    BonRlS,
    /// 1 - p^N for binary rewards, from positive and negative samples.
    BonRlb,
    /// 1 - p^N for binary rewards, from positive samples alone.
    BonRlbP,
    /// pass@N: `bon-rl-s` with the exact estimator.
    PassAtN,
}

impl Kind {
    /// Whether the objective reads `n`. `sft` and `rl` do not; there it only sets the N of the metrics.
    pub fn needs_n(self) -> bool {
        !matches!(self, Kind::Sft | Kind::Rl)
    }

    /// Whether prompts need an expert response.
    pub fn needs_expert(self) -> bool {
        matches!(self, Kind::Sft | Kind::BonSft)
    }

    /// Whether prompts need samples from the policy.
    pub fn needs_samples(self) -> bool {
        self != Kind::Sft
    }
}

/// The name that configuration files use.
impl std::fmt::Display for Kind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.serialize(f)
    }
}

/// How `bon-rl`, `bon-rl-v` and `bon-rl-s` estimate the gradient.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Estimator {
    /// Marginal contributions: unbiased for any selector and reward.
    #[default]
    Exact,
    /// The paper's: score function of the variational Best-of-N policy.
    Variational,
}

/// The sign of `bon-rlb`'s term for failing samples.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum NegativeSign {
    /// +1: the two terms sum to grad(1 - p^N).
    #[default]
    Unbiased,
    /// -1: the same direction, (1+p)/(1-p) times longer, so hard prompts weigh more.
    Penalize,
}

/// One of a sample's two figures of merit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Signal {
    /// The verifier score r.
    Verifier,
    /// The environment reward R.
    Environment,
}

/// The `[objective]` table of a training configuration. A setting that the chosen kind would ignore is an error.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ObjectiveConfig {
    /// Which objective.
    pub kind: Kind,
    /// The Best-of-N size N. Required by every kind but `sft` and `rl`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub n: Option<usize>,
    /// For `bon-rl`, `bon-rl-v` and `bon-rl-s`; `exact` if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub estimator: Option<Estimator>,
    /// For `bon-rlb`; `unbiased` if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub negative_sign: Option<NegativeSign>,
    /// For `bon-rlb` and `bon-rlb-p`: the bound on their weights; [`bon_rlb::DEFAULT_WEIGHT_CLIP`] if absent,
    /// `inf` for none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub weight_clip: Option<f64>,
    /// For `bon-rl`, and required there: what picks the best of N.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub selector: Option<Signal>,
    /// For `bon-rl`, and required there: what the pick earns.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reward: Option<Signal>,
    /// The least reward R of a response that passes, which is to say, is right: in every figure, in evaluation and in
    /// what the objectives count as a pass. [`DEFAULT_PASS_THRESHOLD`] if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pass_threshold: Option<f64>,
}

/// `pass_threshold` if it is not given: halfway between the rewards of built-in verifiers.
pub const DEFAULT_PASS_THRESHOLD: f64 = 0.5;

/// Whether a response passes: the one definition of "right".
pub fn passes(reward: f64, pass_threshold: f64) -> bool {
    reward >= pass_threshold
}

impl ObjectiveConfig {
    /// The settings beside `kind` and `n`, by name.
    pub const OPTIONS: [&str; 6] =
        ["estimator", "negative_sign", "weight_clip", "selector", "reward", "pass_threshold"];

    /// A configuration with every option at its default.
    pub fn new(kind: Kind, n: Option<usize>) -> Self {
        Self {
            kind,
            n,
            estimator: None,
            negative_sign: None,
            weight_clip: None,
            selector: None,
            reward: None,
            pass_threshold: None,
        }
    }

    /// `pass_threshold`, or its default.
    pub fn threshold(&self) -> f64 {
        self.pass_threshold.unwrap_or(DEFAULT_PASS_THRESHOLD)
    }

    /// Refuses values out of range, settings that are missing and settings that the kind would ignore.
    pub fn validate(&self) -> Result<(), ObjectiveError> {
        self.plan().map(|_| ())
    }

    /// The settings resolved into what is to be computed.
    fn plan(&self) -> Result<Plan, ObjectiveError> {
        let kind = self.kind;
        let required = |setting| ObjectiveError::MissingSetting { kind, setting };
        let n = match self.n {
            Some(0) => return Err(ObjectiveError::ZeroN),
            None if kind.needs_n() => return Err(required("n")),
            n => n.unwrap_or(1),
        };
        let tilted = matches!(kind, Kind::BonRl | Kind::BonRlV | Kind::BonRlS);
        let binary = matches!(kind, Kind::BonRlb | Kind::BonRlbP);
        let threshold = self.threshold();
        let undefined = passes(0.0, threshold) || !passes(1.0, threshold);
        if !threshold.is_finite() || (binary && undefined) {
            return Err(ObjectiveError::PassThreshold { kind, value: threshold });
        }
        for (setting, given, applies) in [
            ("estimator", self.estimator.is_some(), tilted),
            ("negative_sign", self.negative_sign.is_some(), kind == Kind::BonRlb),
            ("weight_clip", self.weight_clip.is_some(), binary),
            ("selector", self.selector.is_some(), kind == Kind::BonRl),
            ("reward", self.reward.is_some(), kind == Kind::BonRl),
        ] {
            if given && !applies {
                return Err(ObjectiveError::NotApplicable { kind, setting });
            }
        }
        let clip = self.weight_clip.unwrap_or(bon_rlb::DEFAULT_WEIGHT_CLIP);
        if clip.is_nan() || clip <= 0.0 {
            return Err(ObjectiveError::WeightClip { value: clip });
        }
        let estimator = self.estimator.unwrap_or_default();
        let best_of_n = |selector, reward| Plan::BonRl { n, estimator, selector, reward };
        Ok(match kind {
            Kind::Sft => Plan::Sft,
            Kind::BonSft => Plan::BonSft { n },
            Kind::Rl => Plan::Rl,
            Kind::BonRl => best_of_n(
                self.selector.ok_or_else(|| required("selector"))?,
                self.reward.ok_or_else(|| required("reward"))?,
            ),
            Kind::BonRlV => best_of_n(Signal::Verifier, Signal::Verifier),
            Kind::BonRlS | Kind::PassAtN => best_of_n(Signal::Environment, Signal::Environment),
            Kind::BonRlb => Plan::BonRlb { n, clip, sign: Some(self.negative_sign.unwrap_or_default()) },
            Kind::BonRlbP => Plan::BonRlb { n, clip, sign: None },
        })
    }
}

/// A validated configuration, down to the file that computes it.
enum Plan {
    Sft,
    BonSft { n: usize },
    Rl,
    BonRl { n: usize, estimator: Estimator, selector: Signal, reward: Signal },
    BonRlb { n: usize, clip: f64, sign: Option<NegativeSign> },
}

/// What is known of the M responses that were sampled for one prompt.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct ScoredGroup {
    /// r_j, the verifier's score of each sample; length M.
    pub scores: Vec<f64>,
    /// R_j, the environment's reward of each sample; length M.
    pub rewards: Vec<f64>,
    /// r*, the verifier's score of the expert response: for `bon-sft` alone.
    pub expert_score: Option<f64>,
}

impl ScoredGroup {
    /// The group of what verifiers said, where `None` stands for a sample that could not be judged.
    ///
    /// Such a sample gets 0 or, where that is lower, the least value that was given in the group: nothing that was
    /// judged, however wrong, is worth less to the objective. Its reward never passes either, so under a
    /// `pass_threshold` of 0 or less it stays just below that.
    pub fn judged(scores: &[Option<f64>], rewards: &[Option<f64>], pass_threshold: f64) -> Self {
        let fill = |values: &[Option<f64>], most: f64| {
            let least = values.iter().flatten().copied().fold(most, f64::min);
            values.iter().map(|value| value.unwrap_or(least)).collect()
        };
        let most = pass_threshold.next_down().min(0.0);
        Self { scores: fill(scores, 0.0), rewards: fill(rewards, most), expert_score: None }
    }
}

/// An objective's answer for one group.
#[derive(Debug, Clone, PartialEq)]
pub struct Coefficients {
    /// c_j on log pi(y_j|x); length M.
    pub samples: Vec<f64>,
    /// c* on log pi(y*|x), where the objective has an expert response.
    pub expert: Option<f64>,
    /// Figures to log; `None` for a group without samples.
    pub metrics: Option<GroupMetrics>,
}

/// What to log of one group, whatever the objective is. A sample passes by [`passes`].
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct GroupMetrics {
    /// Mean of R.
    pub mean_reward: f64,
    /// Share of samples that do not pass.
    pub p_fail: f64,
    /// Every sample passes.
    pub all_pass: bool,
    /// None does.
    pub all_fail: bool,
    /// All samples earn the same, right, wrong or in between: nothing but `bon-sft` and `bon-rlb` learns from that.
    pub zero_variance: bool,
    /// Unbiased estimate of pass@N, the chance that one of N samples passes.
    pub pass_at_n: f64,
    /// Unbiased estimate of the expected R when the verifier picks the best of N: deployed Best-of-N.
    pub best_of_n: f64,
    /// The same when the environment picks: the mean of the best reward among N.
    pub oracle_best_of_n: f64,
    /// Samples whose weight was clipped.
    pub clipped: usize,
}

impl GroupMetrics {
    fn new(group: &ScoredGroup, earned: &[f64], threshold: f64, n: usize, clipped: usize) -> Self {
        let ScoredGroup { scores, rewards, .. } = group;
        let passing: Vec<f64> = rewards.iter().map(|&x| f64::from(u8::from(passes(x, threshold)))).collect();
        let fails = passing.iter().filter(|&&x| x == 0.0).count();
        Self {
            mean_reward: shared::mean(rewards.iter().copied()),
            p_fail: fails as f64 / rewards.len() as f64,
            all_pass: fails == 0,
            all_fail: fails == rewards.len(),
            zero_variance: equal(earned),
            pass_at_n: shared::Ranking::new(&passing).best_of_n(&passing, n),
            best_of_n: shared::Ranking::new(scores).best_of_n(rewards, n),
            oracle_best_of_n: shared::Ranking::new(rewards).best_of_n(rewards, n),
            clipped,
        }
    }
}

/// Whether there is one value only. A single sample is compared with nothing, so it is no such case.
fn equal(values: &[f64]) -> bool {
    values.len() > 1 && values.iter().all(|x| *x == values[0])
}

/// Why a configuration or a group cannot be used.
#[derive(Debug, Error, Clone, PartialEq)]
pub enum ObjectiveError {
    /// A required setting is absent.
    #[error("objective `{kind}` needs the setting `{setting}`")]
    MissingSetting {
        /// The objective.
        kind: Kind,
        /// The absent setting.
        setting: &'static str,
    },
    /// The setting would have no effect.
    #[error("`{setting}` has no effect on objective `{kind}`; remove it")]
    NotApplicable {
        /// The objective.
        kind: Kind,
        /// The superfluous setting.
        setting: &'static str,
    },
    /// N = 0.
    #[error("`n` must be at least 1")]
    ZeroN,
    /// The clip bound is not a positive number.
    #[error("`weight_clip` must be above 0 (`inf` for none), not {value}")]
    WeightClip {
        /// The value given.
        value: f64,
    },
    /// The threshold is no number, or calls both or neither of 0 and 1 a pass where nothing else occurs.
    #[error(
        "`pass_threshold` is {value}; it must be a finite number{}",
        if matches!(kind, Kind::BonRlb | Kind::BonRlbP) { ", above 0 and at most 1 where rewards are 0 and 1" } else { "" }
    )]
    PassThreshold {
        /// The objective.
        kind: Kind,
        /// The value given.
        value: f64,
    },
    /// `scores` and `rewards` differ in length.
    #[error("{scores} `scores` but {rewards} `rewards`: a group has one of each per sample")]
    LengthMismatch {
        /// Length of `scores`.
        scores: usize,
        /// Length of `rewards`.
        rewards: usize,
    },
    /// The objective learns from samples and there is none.
    #[error("objective `{kind}` learns from samples, and the group has none")]
    EmptyGroup {
        /// The objective.
        kind: Kind,
    },
    /// Best-of-N cannot be estimated from fewer than N samples.
    #[error("n = {n} is more than the group's {m} samples; draw at least n samples per prompt or lower n")]
    GroupTooSmall {
        /// N.
        n: usize,
        /// M.
        m: usize,
    },
    /// NaN or infinity.
    #[error("`{field}[{index}]` is {value}, not a finite number")]
    NonFinite {
        /// `scores` or `rewards`.
        field: &'static str,
        /// Which sample.
        index: usize,
        /// The value.
        value: f64,
    },
    /// NaN or infinity.
    #[error("`expert_score` is {value}, not a finite number")]
    NonFiniteExpert {
        /// The value.
        value: f64,
    },
    /// The objective is defined for rewards of 0 and 1 alone.
    #[error("`rewards[{index}]` is {value}: objective `{kind}` takes rewards of 0 and 1 only")]
    NotBinary {
        /// The objective.
        kind: Kind,
        /// Which sample.
        index: usize,
        /// The value.
        value: f64,
    },
    /// `bon-sft` compares samples with the expert response.
    #[error("objective `{kind}` needs `expert_score`, the verifier's score of the expert response")]
    MissingExpertScore {
        /// The objective.
        kind: Kind,
    },
    /// Any other objective would ignore it.
    #[error("`expert_score` has no effect on objective `{kind}`; remove it")]
    UnneededExpertScore {
        /// The objective.
        kind: Kind,
    },
    /// Scores or rewards are finite, but so large that sums over them are not.
    #[error("the coefficient of sample {index} overflows; scale scores and rewards down")]
    Overflow {
        /// Which sample.
        index: usize,
    },
}

/// The coefficients of one group under one objective.
pub fn coefficients(config: &ObjectiveConfig, group: &ScoredGroup) -> Result<Coefficients, ObjectiveError> {
    let plan = config.plan()?;
    check(config, group)?;
    let ScoredGroup { scores, rewards, expert_score } = group;
    let signal = |s| match s {
        Signal::Verifier => scores,
        Signal::Environment => rewards,
    };
    let earned = match plan {
        Plan::BonRl { reward, .. } => signal(reward),
        _ => rewards,
    };
    let mut clipped = 0;
    let (mut samples, expert) = match plan {
        // Rounding would make noise of it.
        Plan::Rl | Plan::BonRl { .. } if equal(earned) => (vec![0.0; earned.len()], None),
        Plan::Sft => sft::coefficients(scores.len()),
        Plan::BonSft { n } => {
            let expert_score =
                expert_score.ok_or(ObjectiveError::MissingExpertScore { kind: config.kind })?;
            bon_sft::coefficients(n, scores, expert_score)
        }
        Plan::Rl => (rl::coefficients(rewards), None),
        Plan::BonRl { n, estimator, selector, reward } => {
            let estimate = match estimator {
                Estimator::Exact => bon_rl::exact,
                Estimator::Variational => bon_rl::variational,
            };
            (estimate(n, signal(selector), signal(reward)), None)
        }
        Plan::BonRlb { n, clip, sign } => {
            let weighed = bon_rlb::coefficients(n, scores, rewards, sign, clip);
            clipped = weighed.clipped;
            (weighed.coefficients, None)
        }
    };
    samples.iter_mut().for_each(|c| *c += 0.0); // -0 is a confusing way to write 0
    if let Some(index) = samples.iter().position(|c| !c.is_finite()) {
        return Err(ObjectiveError::Overflow { index });
    }
    let metrics = (!scores.is_empty())
        .then(|| GroupMetrics::new(group, earned, config.threshold(), config.n.unwrap_or(1), clipped));
    Ok(Coefficients { samples, expert, metrics })
}

/// Refuses a group that the objective cannot be computed on.
fn check(config: &ObjectiveConfig, group: &ScoredGroup) -> Result<(), ObjectiveError> {
    let kind = config.kind;
    let ScoredGroup { scores, rewards, expert_score } = group;
    let m = scores.len();
    if m != rewards.len() {
        return Err(ObjectiveError::LengthMismatch { scores: m, rewards: rewards.len() });
    }
    if m == 0 && kind.needs_samples() {
        return Err(ObjectiveError::EmptyGroup { kind });
    }
    match config.n {
        Some(n) if n > m && m > 0 => return Err(ObjectiveError::GroupTooSmall { n, m }),
        _ => {}
    }
    for (field, values) in [("scores", scores), ("rewards", rewards)] {
        if let Some(index) = values.iter().position(|x| !x.is_finite()) {
            return Err(ObjectiveError::NonFinite { field, index, value: values[index] });
        }
    }
    if matches!(kind, Kind::BonRlb | Kind::BonRlbP)
        && let Some(index) = rewards.iter().position(|&x| x != 0.0 && x != 1.0)
    {
        return Err(ObjectiveError::NotBinary { kind, index, value: rewards[index] });
    }
    match *expert_score {
        None if kind == Kind::BonSft => Err(ObjectiveError::MissingExpertScore { kind }),
        Some(_) if kind != Kind::BonSft => Err(ObjectiveError::UnneededExpertScore { kind }),
        Some(value) if !value.is_finite() => Err(ObjectiveError::NonFiniteExpert { value }),
        _ => Ok(()),
    }
}
