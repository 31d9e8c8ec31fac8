//! Objectives: from a scored group of responses to one coefficient per response. Pure functions, no device, no I/O.
//!
//! Every objective of Chow et al., "Inference-Aware Fine-Tuning for Best-of-N Sampling in Large Language Models"
//! (arXiv 2412.15287), and of its neighbours `grpo`, `max-rl` and `pkpo` reduces to a coefficient c_j on log pi(y_j|x): the
//! gradient to *ascend* is `sum_j c_j grad log pi(y_j|x)`, plus `c* grad log pi(y*|x)` where an expert response y* takes part.
//! The trainer needs one weighted backward pass whatever the objective is. [`verifier`] trains what scores responses, not what
//! writes them: its coefficients are on grad s(x, y_j), the gradient of the response's logit.
//!
//! Notation, here and in the files below: M samples in the group, N the Best-of-N size, r verifier scores (they
//! select), R environment rewards (they are what we care about), w_j the chance that Best-of-N returns sample j.

pub mod bon_rl;
pub mod bon_rlb;
pub mod bon_sft;
pub mod grpo;
pub mod max_rl;
pub mod pkpo;
pub mod rl;
pub mod sft;
pub mod shared;
pub mod verifier;

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// An objective: what it asks for and its formula, told in its own file and named once in the list below. The help of
/// `weigh`, the README's table and every check follow from it.
#[derive(Debug)]
pub struct Objective {
    /// What the coefficient of a response is, in words.
    pub coefficient: &'static str,
    /// When to choose it, in words.
    pub when: &'static str,
    /// Whether it reads `n`. Where it does not, that only sets the N of the metrics.
    pub needs_n: bool,
    /// Whether prompts need samples from the policy.
    pub needs_samples: bool,
    /// What it needs of an expert response.
    pub expert: Expert,
    /// Whether it is defined for rewards of 0 and 1 alone.
    pub binary: bool,
    /// The settings that it must be given, and those that it may be given, of [`ObjectiveConfig::settings`]. Any other
    /// has no effect and is refused.
    pub required: &'static [&'static str],
    /// See `required`.
    pub optional: &'static [&'static str],
    /// The formula: the coefficients of a group that has passed the checks above.
    compute: fn(&ObjectiveConfig, &ScoredGroup) -> Result<Weighed, ObjectiveError>,
}

impl Objective {
    /// Whether prompts need an expert response.
    pub fn needs_expert(&self) -> bool {
        self.expert != Expert::Unused
    }
}

/// What an objective needs of an expert response y*.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Expert {
    /// Nothing.
    Unused,
    /// Its tokens.
    Response,
    /// Its tokens and its score r*, which is compared with the samples'.
    Scored,
}

/// What a formula returns.
struct Weighed {
    /// c_j; length M.
    samples: Vec<f64>,
    /// c*.
    expert: Option<f64>,
    /// What a sample earns here: a group in which all earn the same has zero variance.
    earned: Signal,
    /// Samples whose weight was clipped.
    clipped: usize,
}

/// Coefficients of samples that earn the environment's reward.
impl From<Vec<f64>> for Weighed {
    fn from(samples: Vec<f64>) -> Self {
        Self { samples, expert: None, earned: Signal::Environment, clipped: 0 }
    }
}

macro_rules! objectives {
    ($($kind:ident: $objective:path,)*) => {
        /// Which objective to optimise. Configuration files use the names in kebab-case: `bon-rl-v`.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
        #[serde(rename_all = "kebab-case")]
        pub enum Kind {
            $(#[doc = concat!("See [`", stringify!($objective), "`].")] $kind,)*
        }

        impl Kind {
            /// All of them, the paper's baselines first and other papers' last, but for what trains no policy.
            pub const ALL: &[Kind] = &[$(Kind::$kind),*];

            /// The names of those for which `of` holds, as in `sft, rl and grpo`.
            pub fn listed(of: impl Fn(&Objective) -> bool) -> String {
                let names: Vec<String> =
                    Self::ALL.iter().filter(|kind| of(kind.objective())).map(Kind::to_string).collect();
                match names.split_last() {
                    Some((last, [])) => last.clone(),
                    Some((last, others)) => format!("{} and {last}", others.join(", ")),
                    None => String::new(),
                }
            }

            /// What it asks for, and its formula.
            pub fn objective(self) -> &'static Objective {
                match self {
                    $(Kind::$kind => &$objective,)*
                }
            }
        }
    };
}

objectives! {
    Sft: sft::SFT,
    BonSft: bon_sft::BON_SFT,
    Rl: rl::RL,
    BonRlV: bon_rl::BON_RL_V,
    BonRlS: bon_rl::BON_RL_S,
    BonRl: bon_rl::BON_RL,
    BonRlb: bon_rlb::BON_RLB,
    BonRlbP: bon_rlb::BON_RLB_P,
    PassAtN: bon_rl::PASS_AT_N,
    Pkpo: pkpo::PKPO,
    MaxRl: max_rl::MAX_RL,
    Grpo: grpo::GRPO,
    Verifier: verifier::VERIFIER,
}

impl Kind {
    /// Whether it trains the model that scores responses, on labels that are given.
    pub fn trains_verifier(self) -> bool {
        self == Kind::Verifier
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

macro_rules! objective_config {
    ($($(#[$doc:meta])* $setting:ident: $type:ty,)*) => {
        /// The `[objective]` table of a training configuration. A setting that the chosen kind would ignore is an error.
        #[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
        #[serde(deny_unknown_fields)]
        pub struct ObjectiveConfig {
            /// Which objective.
            pub kind: Kind,
            /// The Best-of-N size N, for objectives that need it ([`Objective::needs_n`]).
            #[serde(default, skip_serializing_if = "Option::is_none")]
            pub n: Option<usize>,
            $($(#[$doc])* #[serde(default, skip_serializing_if = "Option::is_none")] pub $setting: Option<$type>,)*
            /// The least reward R of a response that passes, which is to say, is right: in every figure, in evaluation and in
            /// what the objectives count as a pass. [`DEFAULT_PASS_THRESHOLD`] if absent.
            #[serde(default, skip_serializing_if = "Option::is_none")]
            pub pass_threshold: Option<f64>,
        }

        impl ObjectiveConfig {
            /// A configuration with every option at its default.
            pub fn new(kind: Kind, n: Option<usize>) -> Self {
                Self { kind, n, $($setting: None,)* pass_threshold: None }
            }

            /// The settings that some objectives read, by name, and whether each is given.
            pub fn settings(&self) -> Vec<(&'static str, bool)> {
                vec![$((stringify!($setting), self.$setting.is_some())),*]
            }
        }
    };
}

// The settings that some objectives read.
objective_config! {
    /// For `bon-rl`, `bon-rl-v` and `bon-rl-s`; `exact` if absent.
    estimator: Estimator,
    /// For `bon-rlb`; `unbiased` if absent.
    negative_sign: NegativeSign,
    /// For `bon-rlb` and `bon-rlb-p`: the bound on their weights; [`bon_rlb::DEFAULT_WEIGHT_CLIP`] if absent,
    /// `inf` for none.
    weight_clip: f64,
    /// For `bon-rl`, and required there: what picks the best of N.
    selector: Signal,
    /// For `bon-rl`, and required there: what the pick earns.
    reward: Signal,
    /// For `pkpo`; `leave-one-out-minus-one` if absent.
    baseline: pkpo::Baseline,
    /// For `max-rl`: whether the mean score of all samples is subtracted; true if absent.
    control_variate: bool,
    /// For `grpo`: whether advantages are divided by the group's standard deviation; true if absent, false is Dr. GRPO.
    std_normalization: bool,
    /// For `verifier`; `bernoulli` if absent.
    loss: verifier::Loss,
}

/// `pass_threshold` if it is not given: halfway between the rewards of built-in verifiers.
pub const DEFAULT_PASS_THRESHOLD: f64 = 0.5;

/// Whether a response passes: the one definition of "right".
pub fn passes(reward: f64, pass_threshold: f64) -> bool {
    reward >= pass_threshold
}

impl ObjectiveConfig {
    /// The names of all settings beside `kind` and `n`.
    pub fn options() -> Vec<&'static str> {
        let settings = Self::new(Kind::Sft, None).settings().into_iter();
        settings.map(|(name, _)| name).chain(["pass_threshold"]).collect()
    }

    /// `pass_threshold`, or its default.
    pub fn threshold(&self) -> f64 {
        self.pass_threshold.unwrap_or(DEFAULT_PASS_THRESHOLD)
    }

    /// `weight_clip`, or its default.
    fn clip(&self) -> f64 {
        self.weight_clip.unwrap_or(bon_rlb::DEFAULT_WEIGHT_CLIP)
    }

    /// The fewest samples M that a group must have, if it has any: N, and one more where a baseline is taken over
    /// N-subsets without the sample.
    pub fn least_samples(&self) -> usize {
        let n = self.n.unwrap_or(1);
        n.saturating_add(usize::from(self.baseline == Some(pkpo::Baseline::LeaveOneOut)))
    }

    /// A setting that the objective cannot do without.
    fn required<T>(&self, setting: &'static str, value: Option<T>) -> Result<T, ObjectiveError> {
        value.ok_or(ObjectiveError::MissingSetting { kind: self.kind, setting })
    }

    /// Refuses values out of range, settings that are missing and settings that the kind would ignore.
    pub fn validate(&self) -> Result<(), ObjectiveError> {
        let kind = self.kind;
        let objective = kind.objective();
        if self.n == Some(0) {
            return Err(ObjectiveError::ZeroN);
        }
        if objective.needs_n {
            self.required("n", self.n)?;
        }
        let threshold = self.threshold();
        let undefined = passes(0.0, threshold) || !passes(1.0, threshold);
        if !threshold.is_finite() || (objective.binary && undefined) {
            return Err(ObjectiveError::PassThreshold { kind, value: threshold });
        }
        for (setting, given) in self.settings() {
            let required = objective.required.contains(&setting);
            if given && !required && !objective.optional.contains(&setting) {
                return Err(ObjectiveError::NotApplicable { kind, setting });
            }
            self.required(setting, (given || !required).then_some(()))?;
        }
        let clip = self.clip();
        if clip.is_nan() || clip <= 0.0 {
            return Err(ObjectiveError::WeightClip { value: clip });
        }
        Ok(())
    }
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
    /// One figure of merit of every sample; length M.
    fn signal(&self, signal: Signal) -> &[f64] {
        match signal {
            Signal::Verifier => &self.scores,
            Signal::Environment => &self.rewards,
        }
    }

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
    /// All samples earn the same, right, wrong or in between: `bon-sft` and `bon-rlb` alone learn from that, as do
    /// `pkpo` and `max-rl` without their default baselines, but not in expectation.
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
            zero_variance: shared::equal(earned),
            pass_at_n: shared::Ranking::new(&passing).best_of_n(&passing, n),
            best_of_n: shared::Ranking::new(scores).best_of_n(rewards, n),
            oracle_best_of_n: shared::Ranking::new(rewards).best_of_n(rewards, n),
            clipped,
        }
    }
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
        if kind.objective().binary { ", above 0 and at most 1 where rewards are 0 and 1" } else { "" }
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
    /// No N-subset of the group leaves a sample out.
    #[error(
        "`baseline` = \"leave-one-out\" needs more samples than n = {n}, and the group has {m}; draw more samples per \
         prompt, lower n, or take \"leave-one-out-minus-one\""
    )]
    NoOthers {
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
    /// The likelihood of labels is defined for probabilities alone.
    #[error(
        "`rewards[{index}]` is {value}: objective `verifier` with `loss` = \"bernoulli\" takes labels from 0 to 1; scale them, or \
         take \"pairwise\""
    )]
    Label {
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
    config.validate()?;
    check(config, group)?;
    let Weighed { mut samples, expert, earned, clipped } = (config.kind.objective().compute)(config, group)?;
    samples.iter_mut().for_each(|c| *c += 0.0); // -0 is a confusing way to write 0
    if let Some(index) = samples.iter().position(|c| !c.is_finite()) {
        return Err(ObjectiveError::Overflow { index });
    }
    let n = config.n.unwrap_or(1);
    let metrics = (!group.scores.is_empty())
        .then(|| GroupMetrics::new(group, group.signal(earned), config.threshold(), n, clipped));
    Ok(Coefficients { samples, expert, metrics })
}

/// Refuses a group that the objective cannot be computed on.
fn check(config: &ObjectiveConfig, group: &ScoredGroup) -> Result<(), ObjectiveError> {
    let kind = config.kind;
    let Objective { needs_samples, binary, expert, .. } = *kind.objective();
    let ScoredGroup { scores, rewards, expert_score } = group;
    let m = scores.len();
    if m != rewards.len() {
        return Err(ObjectiveError::LengthMismatch { scores: m, rewards: rewards.len() });
    }
    if m == 0 && needs_samples {
        return Err(ObjectiveError::EmptyGroup { kind });
    }
    if m > 0 {
        match config.n {
            Some(n) if n > m => return Err(ObjectiveError::GroupTooSmall { n, m }),
            Some(n) if config.least_samples() > m => return Err(ObjectiveError::NoOthers { n, m }),
            _ => {}
        }
    }
    for (field, values) in [("scores", scores), ("rewards", rewards)] {
        if let Some(index) = values.iter().position(|x| !x.is_finite()) {
            return Err(ObjectiveError::NonFinite { field, index, value: values[index] });
        }
    }
    if binary && let Some(index) = rewards.iter().position(|&x| x != 0.0 && x != 1.0) {
        return Err(ObjectiveError::NotBinary { kind, index, value: rewards[index] });
    }
    match *expert_score {
        None if expert == Expert::Scored => Err(ObjectiveError::MissingExpertScore { kind }),
        Some(_) if expert != Expert::Scored => Err(ObjectiveError::UnneededExpertScore { kind }),
        Some(value) if !value.is_finite() => Err(ObjectiveError::NonFiniteExpert { value }),
        _ => Ok(()),
    }
}
