//! Evaluations of one model on the same problems at several temperatures.

use std::fmt::Write;

use serde::{Deserialize, Serialize};

use super::EvalError;
use super::interval::{Estimate, RESAMPLES, means, resamples};
use super::report::{Report, align, cell};
use super::scaling::ScalingFit;

/// Reports of one model by temperature, one at least.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Grid {
    /// One per temperature, of the same problems in the same order, at the same N.
    pub reports: Vec<Report>,
    /// The best temperature for each N; empty where there is one temperature.
    pub best: Vec<Best>,
}

/// The best temperatures for an N.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Best {
    /// N.
    pub n: usize,
    /// For pass@N.
    pub pass_at_n: BestTemperature,
    /// For Best-of-N.
    pub best_of_n: BestTemperature,
}

/// The temperature of the highest mean, the lower one of two. As the highest of several it is an optimistic estimate of
/// what that temperature reaches on other problems, the more so the less `share` is.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct BestTemperature {
    /// The temperature.
    pub temperature: f64,
    /// The figure there.
    pub figure: Estimate,
    /// The share of resamples of the problems in which it is the best, too; 1 with a single problem. Ties count for each
    /// of the best in equal parts.
    pub share: f64,
}

impl Grid {
    /// A grid of reports in the order of their temperatures. Fails if there is none, or if they are not of the same
    /// problems at the same N, or if two are of one temperature.
    pub fn new(mut reports: Vec<Report>) -> Result<Self, EvalError> {
        let key = |report: &Report| report.temperature().unwrap_or(f64::NAN);
        reports.sort_by(|a, b| key(a).total_cmp(&key(b)));
        let Some(first) = reports.first() else { return Err(EvalError::NoProblems) };
        for pair in reports.windows(2) {
            if pair[0].ns != pair[1].ns {
                let [before, after] = [0, 1].map(|i| pair[i].ns.clone());
                return Err(EvalError::DifferentN { before, after });
            }
            pair[0].same_problems(&pair[1])?;
            if key(&pair[0]) >= key(&pair[1]) || key(&pair[0]).is_nan() || key(&pair[1]).is_nan() {
                return Err(EvalError::Temperatures);
            }
        }
        let best = if reports.len() > 1 { best(&reports, first.seed) } else { Vec::new() };
        Ok(Self { reports, best })
    }

    /// Reads what [`Grid::to_json`] wrote, or a report of one temperature.
    pub fn from_json(text: &str) -> Result<Self, GridError> {
        /// The field that a report of one temperature lacks.
        #[derive(Deserialize)]
        struct Written {
            reports: Option<Vec<Report>>,
        }
        let Written { reports } = serde_json::from_str(text)?;
        let reports =
            reports.map_or_else(|| Ok(vec![serde_json::from_str(text)?]), Ok::<_, serde_json::Error>)?;
        Ok(Self::new(reports)?)
    }

    /// The temperatures, in their order; none where the only report does not say.
    pub fn temperatures(&self) -> Vec<f64> {
        self.reports.iter().filter_map(Report::temperature).collect()
    }

    /// The table of every temperature, the best temperature for each N and the forms of growth.
    pub fn to_table(&self) -> String {
        if let [report] = &self.reports[..] {
            return report.to_table();
        }
        let temperatures = self.temperatures();
        let heads = || temperatures.iter().map(|t| format!("T = {t}"));
        let mut out = format!("{}\n", self.reports[0].head());
        for (place, (title, _)) in self.reports[0].figures.by_n().into_iter().enumerate() {
            let mut rows = vec![std::iter::once("N".to_owned()).chain(heads()).collect::<Vec<_>>()];
            for (i, n) in self.reports[0].ns.iter().enumerate() {
                let at = |report: &Report| cell(&report.figures.by_n()[place].1[i]);
                rows.push(std::iter::once(n.to_string()).chain(self.reports.iter().map(at)).collect());
            }
            let _ = write!(out, "\n{title}\n{}", align(&rows));
        }
        let mut rows = vec![std::iter::once(String::new()).chain(heads()).collect::<Vec<_>>()];
        for (place, (title, _)) in self.reports[0].figures.of_pool().into_iter().enumerate() {
            let at = |report: &Report| cell(&report.figures.of_pool()[place].1);
            rows.push(std::iter::once(title.to_owned()).chain(self.reports.iter().map(at)).collect());
        }
        let _ = write!(out, "\n{}", align(&rows));
        let mut rows = vec![
            ["N", "pass@N best at T", "there", "sure", "best-of-N best at T", "there", "sure"]
                .map(str::to_owned)
                .to_vec(),
        ];
        for Best { n, pass_at_n, best_of_n } in &self.best {
            let of = |best: &BestTemperature| {
                [best.temperature.to_string(), cell(&best.figure), format!("{:.2}", best.share)]
            };
            let parts = [vec![n.to_string()], of(pass_at_n).to_vec(), of(best_of_n).to_vec()];
            rows.push(parts.concat());
        }
        let _ = write!(
            out,
            "\nthe best temperature for each N, and the share of resamples of the problems in which it is the best:\n{}",
            align(&rows)
        );
        let mut rows = vec![["T", "a", "b"].map(str::to_owned).to_vec()];
        for (temperature, report) in temperatures.iter().zip(&self.reports) {
            if let Some(ScalingFit { a, b, .. }) = &report.scaling {
                rows.push(vec![temperature.to_string(), cell(a), cell(b)]);
            }
        }
        if rows.len() > 1 {
            let _ = write!(out, "\npass@N ~ exp(a N^b)\n{}", align(&rows));
        }
        out
    }

    /// What is read back by [`Grid::from_json`]: a report by itself where there is one temperature.
    pub fn to_json(&self) -> serde_json::Result<String> {
        match &self.reports[..] {
            [report] => serde_json::to_string_pretty(report),
            _ => serde_json::to_string_pretty(self),
        }
    }
}

/// Why a file is no report.
#[derive(Debug, thiserror::Error)]
pub enum GridError {
    /// Another JSON, or none.
    #[error(transparent)]
    Syntax(#[from] serde_json::Error),
    /// Reports that do not fit together.
    #[error(transparent)]
    Eval(#[from] EvalError),
}

fn best(reports: &[Report], seed: u64) -> Vec<Best> {
    let ns = &reports[0].ns;
    let figures =
        |report: &Report| [report.figures.pass_at_n.clone(), report.figures.best_of_n.clone()].concat();
    let estimates: Vec<Vec<Estimate>> = reports.iter().map(figures).collect();
    // By problem: of every temperature pass@N and Best-of-N.
    let rows: Vec<Vec<f64>> = (0..reports[0].problems.len())
        .map(|i| {
            let of = |report: &Report| {
                let figures = &report.problems[i].figures;
                [&figures.pass_at_n[..], &figures.best_of_n[..]].concat()
            };
            reports.iter().flat_map(of).collect()
        })
        .collect();
    let width = 2 * ns.len();
    let highest = |means: &[f64], column: usize| -> Vec<usize> {
        let value = |t: usize| means[t * width + column];
        let most = (0..reports.len()).map(value).fold(f64::NEG_INFINITY, f64::max);
        // Equal but for the order of sums.
        (0..reports.len()).filter(|&t| value(t) >= most - 1e-12).collect()
    };
    let mut wins = vec![vec![0.0; reports.len()]; width];
    let mut total = 0.0;
    resamples(&rows, seed, |means| {
        total += 1.0;
        for (column, wins) in wins.iter_mut().enumerate() {
            let best = highest(means, column);
            best.iter().for_each(|&t| wins[t] += 1.0 / best.len() as f64);
        }
    });
    debug_assert!(total == 0.0 || total == RESAMPLES as f64);
    let all = means(&rows);
    let choice = |column: usize| {
        let t = highest(&all, column)[0];
        let share = if total > 0.0 { wins[column][t] / total } else { 1.0 };
        let temperature = reports[t].temperature().unwrap_or(f64::NAN);
        BestTemperature { temperature, figure: estimates[t][column], share }
    };
    let best = |(i, &n): (usize, &usize)| Best { n, pass_at_n: choice(i), best_of_n: choice(ns.len() + i) };
    ns.iter().enumerate().map(best).collect()
}
