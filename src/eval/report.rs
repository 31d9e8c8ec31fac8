//! What an evaluation says, and what changed between two: plain data that serialises, and plain-text tables.

use super::EvalError;
use super::calibration::{Calibration, Probabilities};
use super::examples::Example;
use super::interval::{Estimate, bootstrap, bootstrap_with};
use super::provenance::{Difference, Provenance, TEMPERATURE};
use super::scaling::{self, ScalingFit};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt::Write;

/// Every figure that is reported. `T` is f64 for one problem, [`Estimate`] for a mean over problems and [`Change`]
/// for a comparison; the lists are parallel to the report's `ns`. Reports of earlier versions lack some.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Figures<T> {
    /// Chance that one of N samples is correct.
    pub pass_at_n: Vec<T>,
    /// Accuracy of the sample that the verifier picks among N.
    pub best_of_n: Vec<T>,
    /// Accuracy of the most frequent answer among N samples.
    pub majority_at_n: Vec<T>,
    /// Accuracy of the answer with the largest total score among N samples
    /// ([`weighted_majority_at_n`](super::weighted_majority_at_n)); empty in earlier reports.
    #[serde(default = "Vec::new", skip_serializing_if = "Vec::is_empty")]
    pub weighted_majority_at_n: Vec<T>,
    /// Entropy of the answers, nats.
    pub answer_entropy: T,
    /// Number of distinct answers in the pool.
    pub distinct_answers: T,
    /// Share of samples without an answer.
    pub unanswered: T,
    /// Mean length of responses in tokens, end tokens included; absent in earlier reports.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub response_length: Option<T>,
    /// Share of responses that the length limit cut; absent in earlier reports.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub truncated: Option<T>,
}

impl<T: Copy> Figures<T> {
    /// The lists by N.
    fn lists(&self) -> [&Vec<T>; 4] {
        [&self.pass_at_n, &self.best_of_n, &self.majority_at_n, &self.weighted_majority_at_n]
    }

    /// All figures in one row.
    fn row(&self) -> Vec<T> {
        let single = [self.answer_entropy, self.distinct_answers, self.unanswered];
        let young = [self.response_length, self.truncated].into_iter().flatten();
        self.lists().into_iter().flatten().copied().chain(single).chain(young).collect()
    }

    /// The inverse of [`Figures::row`] for figures of this shape.
    fn like<U: Copy>(&self, row: &[U]) -> Figures<U> {
        let mut rest = row.iter().copied();
        let [pass_at_n, best_of_n, majority_at_n, weighted_majority_at_n] =
            self.lists().map(|list| rest.by_ref().take(list.len()).collect());
        let mut next = || rest.next().expect("a row of this shape");
        Figures {
            pass_at_n,
            best_of_n,
            majority_at_n,
            weighted_majority_at_n,
            answer_entropy: next(),
            distinct_answers: next(),
            unanswered: next(),
            response_length: self.response_length.map(|_| next()),
            truncated: self.truncated.map(|_| next()),
        }
    }

    /// The figures at some of the N, by their places in the list, and without what `other` lacks.
    fn shared<U>(&self, places: &[usize], other: &Figures<U>) -> Self {
        let at = |list: &[T]| places.iter().filter_map(|&i| list.get(i).copied()).collect();
        let known = !other.weighted_majority_at_n.is_empty();
        Figures {
            pass_at_n: at(&self.pass_at_n),
            best_of_n: at(&self.best_of_n),
            majority_at_n: at(&self.majority_at_n),
            weighted_majority_at_n: if known { at(&self.weighted_majority_at_n) } else { Vec::new() },
            response_length: self.response_length.filter(|_| other.response_length.is_some()),
            truncated: self.truncated.filter(|_| other.truncated.is_some()),
            ..*self
        }
    }

    /// Those that depend on N, with their titles.
    pub fn by_n(&self) -> Vec<(&'static str, &[T])> {
        let titles = ["pass@N", "best-of-N", "majority@N", "weighted majority@N"];
        let all = titles.into_iter().zip(self.lists().map(Vec::as_slice));
        all.filter(|(_, list)| !list.is_empty()).collect()
    }

    /// Those that do not.
    pub fn of_pool(&self) -> Vec<(&'static str, T)> {
        let young = [("response length (tokens)", self.response_length), ("share truncated", self.truncated)];
        [
            ("answer entropy (nats)", self.answer_entropy),
            ("distinct answers", self.distinct_answers),
            ("share without answer", self.unanswered),
        ]
        .into_iter()
        .chain(young.into_iter().filter_map(|(title, figure)| Some((title, figure?))))
        .collect()
    }
}

/// The figures of one problem.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ProblemReport {
    /// The problem's id.
    pub id: String,
    /// M, the size of its pool.
    pub samples: usize,
    /// Its figures.
    #[serde(flatten)]
    pub figures: Figures<f64>,
}

/// A response that could not be judged.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Unjudged {
    /// The task's prompt.
    pub prompt: String,
    /// The response.
    pub response: String,
    /// What could not judge it: `verifier` or `environment`.
    pub judge: String,
    /// A short name of the reason, for counting.
    pub kind: String,
    /// Why, in full.
    pub reason: String,
}

/// How many responses could not be judged, by kind.
pub fn count_by_kind<'a>(unjudged: impl IntoIterator<Item = &'a Unjudged>) -> BTreeMap<String, u64> {
    let mut counts = BTreeMap::new();
    for response in unjudged {
        *counts.entry(response.kind.clone()).or_default() += 1;
    }
    counts
}

/// The result of [`super::evaluate`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// The N that the lists of `figures` are parallel to.
    pub ns: Vec<usize>,
    /// Seed of the bootstrap.
    pub seed: u64,
    /// Means over problems.
    pub figures: Figures<Estimate>,
    /// Every problem, in the order given.
    pub problems: Vec<ProblemReport>,
    /// How far scores tell right from wrong, where what selects is not what counts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub calibration: Option<Calibration>,
    /// The growth of pass@N with N, where it has a form.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scaling: Option<ScalingFit>,
    /// What made it, where that is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub provenance: Option<Provenance>,
    /// Some responses, as many as were asked for.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub examples: Vec<Example>,
    /// Responses that could not be judged, and count as wrong.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub unjudged: Vec<Unjudged>,
}

impl Report {
    /// A report of problems that [`super::evaluate_problem`] evaluated at `ns`; fails if there is none. `seed` drives the
    /// bootstrap of the intervals.
    pub fn new(ns: Vec<usize>, seed: u64, problems: Vec<ProblemReport>) -> Result<Self, EvalError> {
        let Some(first) = problems.first() else { return Err(EvalError::NoProblems) };
        let rows: Vec<Vec<f64>> = problems.iter().map(|p| p.figures.row()).collect();
        // pass@N comes first in a row.
        let fit = |means: &[f64]| scaling::fit(&ns, &means[..ns.len()]);
        let (means, fitted) =
            bootstrap_with(&rows, seed, |means| fit(means).map_or(vec![f64::NAN; 2], |(a, b)| vec![a, b]));
        let pass: Vec<f64> = means[..ns.len()].iter().map(|estimate| estimate.mean).collect();
        let scaling = fit(&pass).map(|fit| ScalingFit {
            a: fitted[0],
            b: fitted[1],
            points: scaling::points(fit, &ns, &pass),
        });
        let figures = first.figures.like(&means);
        let (calibration, provenance) = (None, None);
        let (examples, unjudged) = (Vec::new(), Vec::new());
        Ok(Self { ns, seed, figures, problems, calibration, scaling, provenance, examples, unjudged })
    }

    /// The temperature that the samples were drawn at, where the report says it.
    pub fn temperature(&self) -> Option<f64> {
        self.provenance.as_ref()?.settings.get(TEMPERATURE)?.parse().ok()
    }

    /// What the figures are of.
    pub(super) fn head(&self) -> String {
        let sizes = self.problems.iter().map(|p| p.samples);
        let (least, most) = (sizes.clone().min().unwrap_or(0), sizes.max().unwrap_or(0));
        let each = if least == most { format!("{most}") } else { format!("{least} to {most}") };
        format!(
            "problems: {}, samples each: {each}; brackets: 95 % confidence intervals over problems",
            self.problems.len()
        )
    }

    /// A table: one row per N, then the diversity of answers and the form of growth.
    pub fn to_table(&self) -> String {
        let mut rows = vec![vec!["N".to_owned()]];
        for (title, list) in self.figures.by_n() {
            rows[0].push(title.to_owned());
            for (i, estimate) in list.iter().enumerate() {
                if rows.len() <= i + 1 {
                    rows.push(vec![self.ns[i].to_string()]);
                }
                rows[i + 1].push(cell(estimate));
            }
        }
        let of_pool: Vec<_> = self
            .figures
            .of_pool()
            .into_iter()
            .map(|(title, estimate)| vec![title.to_owned(), cell(&estimate)])
            .collect();
        let scaling = match &self.scaling {
            None => String::new(),
            Some(ScalingFit { a, b, .. }) => {
                format!("\npass@N ~ exp(a N^b): a = {}, b = {}\n", cell(a), cell(b))
            }
        };
        let mut out = format!("{}\n\n{}\n{}{scaling}", self.head(), align(&rows), align(&of_pool));
        if let Some(calibration) = &self.calibration {
            let titled = |(title, value): (&str, String)| vec![title.to_owned(), value];
            let _ = write!(out, "\n{}", align(&calibration_rows(calibration).map(titled)));
            if let Some(Probabilities { bins, .. }) = &calibration.probabilities {
                let head = ["verifier's score", "responses", "mean score", "right"].map(str::to_owned);
                let mut rows = vec![head.to_vec()];
                rows.extend(bins.iter().map(|bin| {
                    let range = format!("{:.1} to {:.1}", bin.low, bin.high);
                    vec![range, bin.samples.to_string(), figure(bin.mean_score), figure(bin.right)]
                }));
                let _ = write!(out, "\n{}", align(&rows));
            }
            let _ = writeln!(out, "\n{}", self.inversion());
        }
        out
    }

    /// In words: whether choosing among more responses stops to help.
    fn inversion(&self) -> String {
        let best = &self.figures.best_of_n;
        let at = |i: usize| format!("{} at N = {}", figure(best[i].mean), self.ns[i]);
        let last = best.len() - 1;
        let peak = (0..=last).rev().max_by(|&a, &b| best[a].mean.total_cmp(&best[b].mean)).unwrap_or(last);
        let missed = self.figures.pass_at_n[last].mean - best[last].mean;
        match best[peak].mean - best[last].mean {
            fall if fall < 0.0005 => {
                format!(
                    "best-of-N does not fall as N grows; {} it misses {} of pass@N",
                    at(last),
                    figure(missed)
                )
            }
            _ => format!(
                "best-of-N is highest at {} and falls to {}: there the verifier chooses what it overrates; it misses {} of \
                 pass@N",
                at(peak),
                at(last),
                figure(missed)
            ),
        }
    }

    /// In what this report and one of `after` were made differently, as far as both say; none where one does not. Fails
    /// if they judge by different measures.
    pub fn differences(&self, after: Option<&Provenance>) -> Result<Vec<Difference>, EvalError> {
        let (Some(before), Some(after)) = (&self.provenance, after) else { return Ok(Vec::new()) };
        let differences = before.differences(after);
        match differences.iter().any(|difference| difference.of_measure) {
            true => Err(EvalError::DifferentMeasure { differences }),
            false => Ok(differences),
        }
    }

    /// What changed from this report to `after`, which must be about the same problems in the same order, judged alike,
    /// at the N that both list. Differences are paired: their intervals come from the differences of each problem, so
    /// what problems have in common cancels.
    pub fn compare(&self, after: &Report) -> Result<Comparison, EvalError> {
        let place = |report: &Report, n: &usize| report.ns.iter().position(|own| own == n);
        let ns: Vec<usize> = self.ns.iter().copied().filter(|n| after.ns.contains(n)).collect();
        if ns.is_empty() {
            return Err(EvalError::DifferentN { before: self.ns.clone(), after: after.ns.clone() });
        }
        self.same_problems(after)?;
        let differences = self.differences(after.provenance.as_ref())?;
        let places = [self, after]
            .map(|report| -> Vec<usize> { ns.iter().filter_map(|n| place(report, n)).collect() });
        let shared = |before: &ProblemReport, after: &ProblemReport| {
            let (b, a) = (&before.figures, &after.figures);
            (b.shared(&places[0], a), a.shared(&places[1], b))
        };
        let rows: Vec<Vec<f64>> = self
            .problems
            .iter()
            .zip(&after.problems)
            .map(|(before, after)| {
                let (before, after) = shared(before, after);
                before.row().iter().zip(after.row()).map(|(b, a)| a - b).collect()
            })
            .collect();
        let before = self.figures.shared(&places[0], &after.figures);
        let after_figures = after.figures.shared(&places[1], &self.figures);
        let changes: Vec<Change> = bootstrap(&rows, self.seed)
            .into_iter()
            .zip(before.row().into_iter().zip(after_figures.row()))
            .map(|(difference, (before, after))| Change { before, after, difference })
            .collect();
        let figures = before.like(&changes);
        let unknown = self.provenance.is_some() != after.provenance.is_some();
        let calibration = self.calibration.clone().zip(after.calibration.clone());
        let problems = self.problems.len();
        Ok(Comparison { ns, problems, differences, unknown, figures, calibration })
    }

    /// Fails if `after` is not about the same problems in the same order.
    pub(super) fn same_problems(&self, after: &Report) -> Result<(), EvalError> {
        let longest = self.problems.len().max(after.problems.len());
        let id = |report: &Report, i: usize| report.problems.get(i).map(|p| p.id.clone());
        match (0..longest).find(|&i| id(self, i) != id(after, i)) {
            None => Ok(()),
            Some(index) => {
                let name = |report| id(report, index).map_or("none".to_owned(), |id| format!("`{id}`"));
                let (before, after) = (name(self), name(after));
                Err(EvalError::DifferentProblems { index, before, after })
            }
        }
    }
}

/// A figure before and after.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Change {
    /// Mean before.
    pub before: Estimate,
    /// Mean after.
    pub after: Estimate,
    /// Mean of after - before, with the interval of the paired differences.
    pub difference: Estimate,
}

/// The result of [`Report::compare`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Comparison {
    /// The N that the lists of `figures` are parallel to.
    pub ns: Vec<usize>,
    /// Number of problems.
    pub problems: usize,
    /// In what the two were made differently.
    pub differences: Vec<Difference>,
    /// Whether one of the two does not say what made it.
    pub unknown: bool,
    /// Every figure's change.
    pub figures: Figures<Change>,
    /// How far scores tell right from wrong, before and after, where both say it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub calibration: Option<(Calibration, Calibration)>,
}

impl Comparison {
    /// One table per figure: N, before, after, difference.
    pub fn to_table(&self) -> String {
        let columns = ["before", "after", "difference"].map(str::to_owned);
        let row = |head: String, change: &Change| {
            vec![head, cell(&change.before), cell(&change.after), signed(&change.difference)]
        };
        let mut out = format!(
            "problems: {}; brackets: 95 % confidence intervals over problems, paired for differences\n",
            self.problems
        );
        if self.unknown {
            out.push_str("one of the two reports does not say what made it: only the prompts are known to be the same\n");
        }
        if !self.differences.is_empty() {
            out.push_str("what differs between the two:\n");
        }
        for difference in &self.differences {
            let _ = writeln!(out, "  {difference}");
        }
        for (title, list) in self.figures.by_n() {
            let mut rows = vec![std::iter::once("N".to_owned()).chain(columns.clone()).collect()];
            rows.extend(self.ns.iter().zip(list).map(|(n, change)| row(n.to_string(), change)));
            let _ = write!(out, "\n{title}\n{}", align(&rows));
        }
        let mut rows = vec![std::iter::once(String::new()).chain(columns).collect()];
        rows.extend(self.figures.of_pool().iter().map(|(title, change)| row((*title).to_owned(), change)));
        let _ = write!(out, "\n{}", align(&rows));
        if let Some((before, after)) = &self.calibration {
            let mut rows = vec![["", "before", "after"].map(str::to_owned).to_vec()];
            let both = calibration_rows(before).into_iter().zip(calibration_rows(after));
            rows.extend(both.map(|((title, before), (_, after))| vec![title.to_owned(), before, after]));
            let _ = write!(out, "\n{}", align(&rows));
        }
        out.push('\n');
        for (title, list) in self.figures.by_n() {
            let _ = writeln!(out, "{title}: {}", self.verdict(list));
        }
        out
    }

    /// In words: at which N the difference is beyond its interval, and which way.
    fn verdict(&self, list: &[Change]) -> String {
        let at = |says: fn([f64; 2]) -> bool| -> Vec<String> {
            let there = self.ns.iter().zip(list).filter(|(_, c)| c.difference.ci95.is_some_and(says));
            there.map(|(n, _)| n.to_string()).collect()
        };
        let (gains, losses) = (at(|[lo, _]| lo > 0.0), at(|[_, hi]| hi < 0.0));
        let part = |what: &str, ns: &[String]| format!("{what} beyond the interval at N = {}", ns.join(", "));
        match (gains.is_empty(), losses.is_empty()) {
            (true, true) => "no change beyond the interval at any N".to_owned(),
            (false, true) => part("gain", &gains),
            (true, false) => part("loss", &losses),
            (false, false) => format!("{}; {}", part("gain", &gains), part("loss", &losses)),
        }
    }
}

/// Titles and values of a calibration as reports have them; `-` for what there is not.
pub fn calibration_rows(calibration: &Calibration) -> [(&'static str, String); 7] {
    let or_none = |value: Option<f64>| value.map_or("-".to_owned(), figure);
    let with_interval = |value: Option<f64>, interval: Option<[f64; 2]>| match (value, interval) {
        (Some(mean), Some(ci95)) => cell(&Estimate { mean, ci95: Some(ci95) }),
        (value, _) => or_none(value),
    };
    let intervals = &calibration.intervals;
    let of = |f: fn(&Probabilities) -> f64| or_none(calibration.probabilities.as_ref().map(f));
    [
        ("right responses", figure(calibration.base_rate)),
        ("mean score", figure(calibration.mean_score)),
        ("area under the ROC curve", with_interval(calibration.auc, intervals.auc)),
        ("the same within a problem", with_interval(calibration.pair_accuracy, intervals.pair_accuracy)),
        ("accuracy at 0.5", of(|p| p.accuracy)),
        ("Brier score", of(|p| p.brier)),
        ("expected calibration error", of(|p| p.ece)),
    ]
}

fn figure(value: f64) -> String {
    let value = if value.abs() < 0.0005 { 0.0 } else { value };
    format!("{value:.3}")
}

pub(super) fn cell(estimate: &Estimate) -> String {
    let (mean, ci95) = shown(estimate);
    match ci95 {
        Some([lo, hi]) => format!("{mean:.3} [{lo:.3}, {hi:.3}]"),
        None => format!("{mean:.3}"),
    }
}

fn signed(estimate: &Estimate) -> String {
    let (mean, ci95) = shown(estimate);
    match ci95 {
        Some([lo, hi]) => format!("{mean:+.3} [{lo:+.3}, {hi:+.3}]"),
        None => format!("{mean:+.3}"),
    }
}

/// What three decimals show as zero is zero: never `-0.000`.
fn shown(estimate: &Estimate) -> (f64, Option<[f64; 2]>) {
    let shown = |x: f64| if x.abs() < 0.0005 { 0.0 } else { x };
    (shown(estimate.mean), estimate.ci95.map(|ci| ci.map(shown)))
}

/// Rows of cells as lines of columns, right-aligned, two spaces apart.
pub(super) fn align(rows: &[Vec<String>]) -> String {
    let columns = rows.first().map_or(0, Vec::len);
    let widths: Vec<usize> =
        (0..columns).map(|c| rows.iter().map(|row| row[c].len()).max().unwrap_or(0)).collect();
    let mut out = String::new();
    for row in rows {
        let cells: Vec<String> =
            row.iter().zip(&widths).map(|(cell, width)| format!("{cell:>width$}")).collect();
        out.push_str(&cells.join("  "));
        out.push('\n');
    }
    out
}
