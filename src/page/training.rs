//! What a page says of training runs.

use serde_json::Value;

use super::html::{Html, details, element, short, table};
use super::plot::{Axis, Drawn, Plot, Point, Series, number};
use super::{Evaluated, MAX_NAME, Run, Section, plots, spread};
use crate::eval::Estimate;

/// Most points of the lines of a plot together; a line of more steps has means of neighbours instead.
const MAX_POINTS: usize = 240;
/// Most characters of a run's settings.
const MAX_CONFIG: usize = 12_000;

/// One step's figures, read from its line of `metrics.jsonl`. Those that the line lacks, or that are not finite, are NaN:
/// they are not drawn.
#[derive(Debug, Clone, PartialEq)]
pub struct Step {
    number: u64,
    figures: Vec<f64>,
}

impl Step {
    /// The step of a line; `None` if it has no number.
    pub fn of(line: &Value) -> Option<Self> {
        let figure = |(key, _): &(&str, &str)| {
            let value = key.split('.').try_fold(line, |value, name| value.get(name));
            match value {
                // What could not be judged, by kind.
                Some(Value::Object(kinds)) => kinds.values().filter_map(Value::as_f64).sum(),
                value => value.and_then(Value::as_f64).unwrap_or(f64::NAN),
            }
        };
        let number = line.get("step")?.as_u64()?;
        Some(Self { number, figures: GROUPS.iter().flat_map(|group| group.figures).map(figure).collect() })
    }

    fn get(&self, key: &str) -> f64 {
        let all = || GROUPS.iter().flat_map(|group| group.figures);
        let place = all().position(|(own, _)| *own == key);
        place.and_then(|place| self.figures.get(place)).copied().unwrap_or(f64::NAN)
    }
}

/// Figures that are drawn together where there is one run.
struct Group {
    title: &'static str,
    axis: &'static str,
    share: bool,
    /// Keys of `metrics.jsonl`, and what they are called.
    figures: &'static [(&'static str, &'static str)],
}

const GROUPS: [Group; 16] = [
    Group {
        title: "Reward",
        axis: "reward",
        share: false,
        figures: &[("reward_mean", "mean reward"), ("best_of_n_reward", "reward of best-of-N")],
    },
    Group {
        title: "Right responses",
        axis: "share",
        share: true,
        figures: &[("pass_at_1", "pass@1"), ("pass_at_n", "pass@N")],
    },
    Group {
        title: "Entropy",
        axis: "nats",
        share: false,
        figures: &[("answer_entropy", "of a group's answers"), ("token_entropy", "per token")],
    },
    Group {
        title: "Distinct answers of a group",
        axis: "answers",
        share: false,
        figures: &[("distinct_answers", "distinct answers")],
    },
    Group {
        title: "Response length",
        axis: "tokens",
        share: false,
        figures: &[("response_length", "response length")],
    },
    Group {
        title: "Truncated responses",
        axis: "share",
        share: false,
        figures: &[("truncated_share", "truncated")],
    },
    Group {
        title: "Log-prob gap, sampler to trainer",
        axis: "nats",
        share: false,
        figures: &[("logprob_gap_max", "largest"), ("logprob_gap_mean", "mean")],
    },
    Group {
        title: "KL from the starting model",
        axis: "nats per token",
        share: false,
        figures: &[("kl", "KL")],
    },
    Group { title: "Loss", axis: "loss", share: false, figures: &[("loss", "loss")] },
    Group {
        title: "Gradient norm before clipping",
        axis: "norm",
        share: false,
        figures: &[("grad_norm", "gradient norm")],
    },
    Group { title: "Learning rate", axis: "rate", share: false, figures: &[("lr", "learning rate")] },
    Group {
        title: "Groups",
        axis: "groups of a step",
        share: false,
        figures: &[
            ("all_pass_groups", "all right"),
            ("all_fail_groups", "all wrong"),
            ("zero_variance_groups", "all earn the same"),
            ("clipped_groups", "clipped weights"),
        ],
    },
    Group {
        title: "Responses that could not be judged",
        axis: "responses",
        share: false,
        figures: &[("verifier_failures", "not judged")],
    },
    Group {
        title: "Time of a step",
        axis: "seconds",
        share: false,
        figures: &[
            ("seconds.generate", "sampling"),
            ("seconds.verify", "waiting for verdicts"),
            ("seconds.forward_backward", "forward and backward"),
            ("seconds.optimizer", "optimizer"),
        ],
    },
    Group {
        title: "Speed",
        axis: "tokens/s",
        share: false,
        figures: &[("tokens_per_second", "sampled tokens per second")],
    },
    Group {
        title: "Sampled tokens of a step",
        axis: "tokens",
        share: false,
        figures: &[("tokens", "sampled tokens")],
    },
];

/// A figure over the steps: as it is, or in means of neighbours with the range of what they are means of.
fn over_steps(run: &Run, key: &str, name: String, style: usize, most: usize) -> Series {
    // Without N, or with N = 1, there is nothing to choose from.
    let alone = run.n.is_none_or(|n| n < 2) && ["pass_at_n", "best_of_n_reward"].contains(&key);
    let of_samples = !["loss", "grad_norm", "lr"].contains(&key) && !key.starts_with("seconds.");
    let left_out = alone || (run.imitates && of_samples);
    let steps = run.steps.iter().filter(|_| !left_out);
    let all: Vec<(f64, f64)> =
        steps.map(|step| (step.number as f64, step.get(key))).filter(|(_, y)| y.is_finite()).collect();
    let each = all.len().div_ceil(most.max(1)).max(1);
    let points = all
        .chunks(each)
        .map(|chunk| {
            let mean = |of: fn(&(f64, f64)) -> f64| chunk.iter().map(of).sum::<f64>() / chunk.len() as f64;
            let ends = chunk
                .iter()
                .fold([f64::INFINITY, f64::NEG_INFINITY], |[low, high], (_, y)| [low.min(*y), high.max(*y)]);
            Point { x: mean(|p| p.0).round(), y: mean(|p| p.1), band: (each > 1).then_some(ends) }
        })
        .collect();
    Series { name, style, points, drawn: Drawn::Plain, named: true }
}

/// The sections that come before those of evaluations.
pub(super) fn sections(runs: &[Run]) -> Vec<Section> {
    vec![
        Section { id: "training", title: "Training", content: steps(runs) },
        Section { id: "course", title: "Evaluations during training", content: course(runs) },
    ]
}

fn steps(runs: &[Run]) -> Html {
    let with: Vec<&Run> = runs.iter().filter(|run| !run.steps.is_empty()).collect();
    if with.is_empty() {
        return Html::default();
    }
    let head =
        ["run", "steps", "last pass@1", "last pass@N", "N", "sampled tokens", "hours"].map(str::to_owned);
    let row = |run: &&Run| {
        // A tenth of the run, because single steps are noisy.
        let tail = &run.steps[run.steps.len() - run.steps.len().div_ceil(10)..];
        let mean = |key: &str| tail.iter().map(|step| step.get(key)).sum::<f64>() / tail.len() as f64;
        let sum =
            |key: &str| run.steps.iter().map(|step| step.get(key)).filter(|x| x.is_finite()).sum::<f64>();
        let phases = ["generate", "verify", "forward_backward", "optimizer"];
        let seconds: f64 = phases.iter().map(|phase| sum(&format!("seconds.{phase}"))).sum();
        [
            short(&run.name, MAX_NAME),
            run.steps.last().map_or(0, |step| step.number).to_string(),
            number(if run.imitates { f64::NAN } else { mean("pass_at_1") }),
            number(if run.imitates { f64::NAN } else { mean("pass_at_n") }),
            run.n.map_or("\u{2013}".to_owned(), |n| n.to_string()),
            format!("{:.0}", sum("tokens")),
            format!("{:.2}", seconds / 3600.0),
        ]
        .map(Html::from)
        .to_vec()
    };
    let mut out = table(
        "Runs; last is the mean over the last tenth of the steps",
        &head,
        with.iter().map(row).collect(),
    );
    let most = (MAX_POINTS / with.len()).max(30);
    if with.iter().any(|run| run.steps.len() > most) {
        let text = "Lines are means of neighbouring steps; bands are the range of what they are means of.";
        out.push(element("p", &[("class", "note")], text));
    }
    let mut figures = Vec::new();
    for (i, group) in GROUPS.iter().enumerate() {
        let plot = |j: usize, title: String, series: Vec<Series>| {
            let counted = ["groups of a step", "responses"].contains(&group.axis);
            let y = match () {
                () if group.share => Axis::share(group.axis),
                () if counted => Axis::count(group.axis),
                () => Axis::of(group.axis),
            };
            let id = format!("training-{i}-{j}");
            Plot { id, title, x: Axis::count("step"), y, series, rule: None, note: String::new() }.figure()
        };
        if let [run] = with[..] {
            let line = |(style, (key, name)): (usize, &(&str, &str))| {
                over_steps(run, key, named(name, run.n), style, most)
            };
            let series: Vec<Series> = group.figures.iter().enumerate().map(line).collect();
            figures.push(plot(0, group.title.to_owned(), series));
            continue;
        }
        for (j, (key, name)) in group.figures.iter().enumerate() {
            let line =
                |(style, run): (usize, &&Run)| over_steps(run, key, short(&run.name, MAX_NAME), style, most);
            let title = if group.figures.len() == 1 {
                group.title.into()
            } else {
                format!("{}: {name}", group.title)
            };
            figures.push(plot(j, title, with.iter().enumerate().map(line).collect()));
        }
    }
    out.push(plots(figures));
    out
}

/// The name of a figure, with N as it is.
fn named(name: &str, n: Option<usize>) -> String {
    match n {
        Some(n) => name.replace("@N", &format!("@{n}")).replace("-of-N", &format!("-of-{n}")),
        None => name.to_owned(),
    }
}

fn course(runs: &[Run]) -> Html {
    let with: Vec<&Run> = runs.iter().filter(|run| run.course.len() > 1).collect();
    let Some(first) = with.first() else { return Html::default() };
    let ns = &first.course[0].ns;
    let point = |evaluated: &Evaluated, list: &[Estimate], n: usize| {
        let estimate = list.get(evaluated.ns.iter().position(|&own| own == n)?)?;
        Some(Point { x: evaluated.step as f64, y: estimate.mean, band: estimate.ci95 })
    };
    let mut figures = Vec::new();
    let plot = |id: String, title: String, series: Vec<Series>| {
        let (x, y) = (Axis::count("step"), Axis::share("right"));
        Plot { id, title, x, y, series, rule: None, note: String::new() }.figure()
    };
    for (kind, title) in ["pass@", "best-of-"].into_iter().enumerate() {
        let points = |run: &Run, n: usize| -> Vec<Point> {
            let shown = spread(run.course.len(), MAX_POINTS / 4);
            let shown = shown.into_iter().map(|i| &run.course[i]);
            shown
                .filter_map(|e| {
                    point(e, if kind == 0 { &e.figures.pass_at_n } else { &e.figures.best_of_n }, n)
                })
                .collect()
        };
        let chosen: Vec<usize> = spread(ns.len(), 4).into_iter().map(|i| ns[i]).collect();
        if let [run] = with[..] {
            let line = |(style, &n): (usize, &usize)| Series {
                name: format!("{title}{n}"),
                style,
                points: points(run, n),
                drawn: Drawn::Line,
                named: true,
            };
            let series = chosen.iter().enumerate().map(line).collect();
            figures.push(plot(
                format!("course-{kind}"),
                format!("{title}N on the evaluation's tasks"),
                series,
            ));
            continue;
        }
        for n in [chosen[0], chosen[chosen.len() - 1]] {
            let line = |(style, run): (usize, &&Run)| {
                let name = short(&run.name, MAX_NAME);
                Series { name, style, points: points(run, n), drawn: Drawn::Line, named: true }
            };
            let series = with.iter().enumerate().map(line).collect();
            figures.push(plot(
                format!("course-{kind}-{n}"),
                format!("{title}{n} on the evaluation's tasks"),
                series,
            ));
        }
    }
    plots(figures)
}

/// The section that comes last.
pub(super) fn settings(runs: &[Run]) -> Option<Section> {
    let config = |run: &Run| {
        let text = element("pre", &[], short(&run.config, MAX_CONFIG));
        details(&format!("{}: config.toml", short(&run.name, MAX_NAME)), text)
    };
    let content: Html = runs.iter().filter(|run| !run.config.is_empty()).map(config).collect();
    (!content.is_empty()).then_some(Section { id: "settings", title: "Settings of training", content })
}
