//! Reports to look at: evaluations and training runs as one HTML file that needs nothing else. Pure: data in, text out, the
//! same text for the same data.
//!
//! The page has no script and no outside reference; a policy in its head forbids both, whatever a model wrote. All of it can
//! be read without the plots: every plot has its numbers in a table behind it. What grows with the number of tasks, steps or
//! temperatures is cut off at fixed numbers, so that a page stays below two megabytes.

mod evaluations;
mod html;
mod plot;
mod training;

use thiserror::Error;

use crate::eval::{Estimate, Figures, Grid, Report};
use html::{Html, document, element, empty, short, style};
pub use training::Step;

/// Most evaluations and runs of a page.
pub const MAX_SOURCES: usize = 8;
/// Most characters of a name.
const MAX_NAME: usize = 48;

/// What a page shows.
#[derive(Debug, Clone, Default)]
pub struct Sources {
    /// Evaluations with their names. Differences are against the first.
    pub evaluations: Vec<(String, Grid)>,
    /// Training runs. Their first and last evaluations come behind the others.
    pub runs: Vec<Run>,
}

/// A training run, finished or under way.
#[derive(Debug, Clone, Default)]
pub struct Run {
    /// Its name.
    pub name: String,
    /// Its settings, as TOML.
    pub config: String,
    /// The objective's N.
    pub n: Option<usize>,
    /// Whether its steps draw no samples, so that their figures of samples mean nothing.
    pub imitates: bool,
    /// Its steps so far.
    pub steps: Vec<Step>,
    /// Its evaluations.
    pub course: Vec<Evaluated>,
    /// The first of them, whole.
    pub first: Option<Report>,
    /// The last of them, whole, if there are two.
    pub last: Option<Report>,
}

/// An evaluation within a run.
#[derive(Debug, Clone)]
pub struct Evaluated {
    /// Steps taken before it.
    pub step: u64,
    /// The N of its lists.
    pub ns: Vec<usize>,
    /// What it found.
    pub figures: Figures<Estimate>,
}

/// Why there is no page.
#[derive(Debug, Error, Clone, PartialEq, Eq)]
pub enum PageError {
    /// No evaluation and no step.
    #[error("there is nothing to show: no evaluation, and no step of a run")]
    Nothing,
    /// More than can be told apart.
    #[error("{count} reports and runs are more than a page can tell apart; give at most {MAX_SOURCES}")]
    TooMany {
        /// How many there are.
        count: usize,
    },
}

/// A part of a page: its anchor, its heading and its content.
struct Section {
    id: &'static str,
    title: &'static str,
    content: Html,
}

/// The page.
pub fn page(sources: &Sources) -> Result<String, PageError> {
    let count = sources.evaluations.len() + sources.runs.len();
    if count > MAX_SOURCES {
        return Err(PageError::TooMany { count });
    }
    let entries = entries(sources);
    let mut sections = Vec::new();
    if sources.runs.iter().any(|run| !run.steps.is_empty() || !run.course.is_empty()) {
        sections.extend(training::sections(&sources.runs));
    }
    if !entries.is_empty() {
        sections.extend(evaluations::sections(&entries));
    }
    sections.extend(training::settings(&sources.runs));
    sections.retain(|section| !section.content.is_empty());
    if entries.is_empty() && sources.runs.iter().all(|run| run.steps.is_empty()) {
        return Err(PageError::Nothing);
    }
    let names: Vec<String> = match sources.runs.is_empty() {
        true => entries.iter().map(|(name, _)| name.clone()).collect(),
        false => sources.runs.iter().map(|run| short(&run.name, MAX_NAME)).collect(),
    };
    let what = if sources.runs.is_empty() { "Evaluation of" } else { "Training run" };
    let title = format!("{what} {}", names.join(", "));
    let policy = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'";
    let head = [
        empty("meta", &[("charset", "utf-8")]),
        empty("meta", &[("http-equiv", "Content-Security-Policy"), ("content", policy)]),
        empty("meta", &[("name", "viewport"), ("content", "width=device-width, initial-scale=1")]),
        empty("meta", &[("name", "generator"), ("content", "bon-engine")]),
        element("title", &[], title.as_str()),
        style(include_str!("style.css")),
    ];
    let link = |section: &Section| {
        element("li", &[], element("a", &[("href", &format!("#{}", section.id))], section.title))
    };
    let contents = element("ul", &[], sections.iter().map(link).collect::<Html>());
    let section = |Section { id, title, content }| {
        element("section", &[("id", id)], [element("h2", &[], title), content])
    };
    let body = [
        element("a", &[("class", "skip"), ("href", "#main")], "Skip to the content"),
        element(
            "header",
            &[],
            [element("h1", &[], title.as_str()), element("nav", &[("aria-label", "Contents")], contents)],
        ),
        element("main", &[("id", "main")], sections.into_iter().map(section).collect::<Html>()),
    ];
    Ok(document(head.into(), body.into()))
}

/// The evaluations with their names, those of runs behind the others; what two runs both began with is there once.
fn entries(sources: &Sources) -> Vec<(String, Grid)> {
    let mut entries: Vec<(String, Grid)> = Vec::new();
    let given = sources.evaluations.iter().map(|(name, grid)| (short(name, MAX_NAME), grid.clone()));
    let of_run = |run: &Run| {
        let (first, last) = (run.course.first().map(|e| e.step), run.course.last().map(|e| e.step));
        let name = |step: Option<u64>| match step {
            Some(0) | None => format!("{}, before", short(&run.name, MAX_NAME)),
            Some(step) => format!("{}, {step} steps", short(&run.name, MAX_NAME)),
        };
        let reports = [(name(first), run.first.clone()), (name(last), run.last.clone())];
        let grid = |(name, report): (String, Option<Report>)| Some((name, Grid::new(vec![report?]).ok()?));
        reports.into_iter().filter_map(grid).collect::<Vec<_>>()
    };
    for (name, grid) in given.chain(sources.runs.iter().flat_map(of_run)) {
        let same = |other: &Grid| {
            let pairs = other.reports.iter().zip(&grid.reports);
            other.reports.len() == grid.reports.len()
                && pairs.into_iter().all(|(a, b)| a.problems == b.problems)
        };
        // Two that were given are shown even if they are the same.
        let again =
            entries.len() >= sources.evaluations.len() && entries.iter().any(|(_, other)| same(other));
        if !again {
            entries.push((name, grid));
        }
    }
    entries
}

/// Which of many are shown: `most` of them, evenly spread, with both ends.
fn spread(count: usize, most: usize) -> Vec<usize> {
    if count <= most {
        return (0..count).collect();
    }
    (0..most).map(|i| i * (count - 1) / (most - 1).max(1)).collect()
}

/// The figures of a group of plots, side by side.
fn plots(figures: impl IntoIterator<Item = Html>) -> Html {
    let figures: Html = figures.into_iter().collect();
    if figures.is_empty() { figures } else { element("div", &[("class", "plots")], figures) }
}

/// A figure of an evaluation with its interval.
fn shown(estimate: &Estimate) -> String {
    plot::with_band(estimate.mean, estimate.ci95)
}
