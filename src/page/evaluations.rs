//! What a page says of evaluations.

use std::collections::{BTreeMap, BTreeSet};

use super::html::{Html, details, element, short, table};
use super::plot::{Axis, Drawn, Plot, Point, Scale, Series, number};
use super::{Section, plots, shown, spread};
use crate::eval::{
    Best, BestTemperature, Calibration, Change, Comparison, Estimate, EvalError, Example, Grid,
    Probabilities, Report, ScalingFit, Text, Why, calibration_rows,
};

/// Most plots of a group, lines of a plot, and N of a line.
const MAX_PLOTS: usize = 6;
const MAX_LINES: usize = 8;
const MAX_N: usize = 33;
/// Most tasks in the table of tasks, and tasks whose responses are shown.
const MAX_TASKS: usize = 40;
const MAX_EXAMPLES: usize = 18;
/// Most rows of a table of reports.
const MAX_ROWS: usize = 64;
/// Most characters of a response, of a task's name and of a setting.
const MAX_TEXT: usize = 600;
const MAX_ID: usize = 100;
const MAX_SETTING: usize = 300;

/// An evaluation by name.
type Entry = (String, Grid);

/// A report against that of the first evaluation at its temperature.
struct Paired<'a> {
    name: &'a str,
    report: &'a Report,
    /// Whether there is another temperature.
    several: bool,
    compared: Result<Comparison, EvalError>,
}

/// The sections, in their order.
pub(super) fn sections(entries: &[Entry]) -> Vec<Section> {
    let paired = paired(entries);
    let section = |id, title, content| Section { id, title, content };
    vec![
        section("summary", "Summary", summary(entries, &paired)),
        section("differences", "Differences from the first", differences(entries, &paired)),
        section("pass", "pass@N", pass(entries)),
        section("choosing", "Choosing one of N", choosing(entries)),
        section("verifier", "The verifier's scores", verifier(entries)),
        section("temperature", "Temperature", temperature(entries)),
        section("growth", "Growth with N", growth(entries)),
        section("diversity", "Diversity and lengths", diversity(entries)),
        section("tasks", "Tasks", tasks(entries)),
        section("responses", "Responses", responses(entries)),
        section("provenance", "What made these figures", provenance(entries)),
    ]
}

/// `T = 0.7` in one piece, where that is known.
fn at(report: &Report) -> String {
    report.temperature().map_or_else(|| "T unknown".to_owned(), |t| format!("T\u{a0}=\u{a0}{t}"))
}

/// The name of a report among several.
fn label(name: &str, report: &Report, several: bool) -> String {
    if several { format!("{name}, {}", at(report)) } else { name.to_owned() }
}

/// The report of a grid that stands for it: the only one, or that of the best temperature at the largest N.
fn chosen(grid: &Grid) -> &Report {
    let best = grid.best.last().map(|best| best.pass_at_n.temperature);
    grid.reports.iter().find(|report| report.temperature() == best).unwrap_or(&grid.reports[0])
}

fn paired(entries: &[Entry]) -> Vec<Paired<'_>> {
    let Some(((_, first), others)) = entries.split_first() else { return Vec::new() };
    let mut all = Vec::new();
    for (name, grid) in others {
        let several = first.reports.len() > 1 || grid.reports.len() > 1;
        for report in &grid.reports {
            let same = |before: &&Report| !several || before.temperature() == report.temperature();
            if let Some(before) = first.reports.iter().find(same) {
                all.push(Paired { name, report, several, compared: before.compare(report) });
            }
        }
    }
    all
}

/// The places of the N that are drawn.
fn places(report: &Report) -> Vec<usize> {
    spread(report.ns.len(), MAX_N)
}

fn by_n(report: &Report, list: &[Estimate], name: String, style: usize) -> Series {
    let point = |i: usize| {
        let estimate = list.get(i)?;
        Some(Point { x: report.ns[i] as f64, y: estimate.mean, band: estimate.ci95 })
    };
    let points = places(report).into_iter().filter_map(point).collect();
    Series { name, style, points, drawn: Drawn::Line, named: true }
}

fn n_axis(reports: &[&Report]) -> Axis {
    let all: BTreeSet<usize> =
        reports.iter().flat_map(|report| places(report).into_iter().map(|i| report.ns[i])).collect();
    Axis::at("N", Scale::Log, all.into_iter().map(|n| n as f64).collect())
}

fn samples(report: &Report) -> String {
    let sizes: BTreeSet<usize> = report.problems.iter().map(|problem| problem.samples).collect();
    match (sizes.first(), sizes.last()) {
        (Some(least), Some(most)) if least != most => format!("{least} to {most}"),
        (Some(least), _) => least.to_string(),
        _ => "0".to_owned(),
    }
}

fn summary(entries: &[Entry], paired: &[Paired]) -> Html {
    let mut out = Html::default();
    let (name, grid) = &entries[entries.len() - 1];
    let report = chosen(grid);
    let interval = match report.problems.len() {
        1 => "A single task has no interval.".to_owned(),
        _ => "Brackets and bands are 95 % bootstrap intervals over tasks.".to_owned(),
    };
    let what = format!(
        "{} tasks, {} responses each. Estimates are unbiased for N fresh samples. {interval}",
        report.problems.len(),
        samples(report)
    );
    out.push(element("p", &[], what));
    let against = paired.iter().find(|p| std::ptr::eq(p.report, report));
    let compared = against.and_then(|paired| paired.compared.as_ref().ok());
    let head = match compared {
        Some(_) => format!("{} against {}", label(name, report, grid.reports.len() > 1), entries[0].0),
        None => label(name, report, grid.reports.len() > 1),
    };
    out.push(element("h3", &[], head));
    out.push(cards(report, compared));
    let (mut rows, mut left_out) = (Vec::new(), 0);
    let last = report.ns.len() - 1;
    let most = report.ns[last];
    for (name, grid) in entries {
        for report in &grid.reports {
            if rows.len() == MAX_ROWS {
                left_out += 1;
                continue;
            }
            let at = |list: &[Estimate], n: usize| {
                let place = report.ns.iter().position(|&own| own == n);
                Html::from(place.and_then(|i| list.get(i)).map_or("\u{2013}".into(), shown))
            };
            let figures = &report.figures;
            rows.push(vec![
                Html::text(&label(name, report, true)),
                at(&figures.pass_at_n, 1),
                at(&figures.pass_at_n, most),
                at(&figures.best_of_n, most),
                at(&figures.majority_at_n, most),
                at(&figures.weighted_majority_at_n, most),
                report.unjudged.len().to_string().into(),
            ]);
        }
    }
    let head = [
        "model".to_owned(),
        "pass@1".to_owned(),
        format!("pass@{most}"),
        format!("best-of-{most}"),
        format!("majority@{most}"),
        format!("weighted majority@{most}"),
        "not judged".to_owned(),
    ];
    out.push(table("All evaluations", &head, rows));
    out.push(rest(left_out, "evaluations"));
    out
}

/// That there are more than are shown.
fn rest(left_out: usize, what: &str) -> Html {
    match left_out {
        0 => Html::default(),
        _ => element("p", &[("class", "note")], format!("{left_out} more {what} are not shown here.")),
    }
}

fn cards(report: &Report, compared: Option<&Comparison>) -> Html {
    let last = report.ns.len() - 1;
    let most = report.ns[last];
    let mut all = Html::default();
    let mut card = |title: String, estimate: &Estimate, change: Option<&Change>| {
        let mut says = Html::default();
        if let Some([low, high]) = estimate.ci95 {
            says.push(element("div", &[("class", "small")], format!("[{low:.3}, {high:.3}]")));
        }
        if let Some(change) = change {
            let text = [Html::text("change "), difference(&change.difference)];
            says.push(element("div", &[("class", "small")], text));
        }
        let big = element("div", &[("class", "big")], format!("{:.3}", estimate.mean));
        let card = [element("dt", &[], title), element("dd", &[], [big, says])];
        all.push(element("div", &[("class", "card")], card));
    };
    let change = |list: fn(&Comparison) -> &Vec<Change>, n: usize| {
        compared.and_then(|c| list(c).get(c.ns.iter().position(|&own| own == n)?))
    };
    let figures = &report.figures;
    if report.ns[0] == 1 {
        card("pass@1".into(), &figures.pass_at_n[0], change(|c| &c.figures.pass_at_n, 1));
    }
    card(format!("pass@{most}"), &figures.pass_at_n[last], change(|c| &c.figures.pass_at_n, most));
    card(format!("best-of-{most}"), &figures.best_of_n[last], change(|c| &c.figures.best_of_n, most));
    card(
        format!("majority@{most}"),
        &figures.majority_at_n[last],
        change(|c| &c.figures.majority_at_n, most),
    );
    element("dl", &[("class", "cards")], all)
}

/// A paired difference; one beyond its interval is marked.
fn difference(estimate: &Estimate) -> Html {
    let text = match estimate.ci95 {
        Some([low, high]) => {
            format!("{} [{}, {}]", signed(estimate.mean), signed(low), signed(high))
        }
        None => signed(estimate.mean),
    };
    match estimate.ci95 {
        Some([low, _]) if low > 0.0 => element("span", &[("class", "gain")], text),
        Some([_, high]) if high < 0.0 => element("span", &[("class", "loss")], text),
        _ => Html::text(&text),
    }
}

fn signed(x: f64) -> String {
    let x = if x.abs() < 0.0005 { 0.0 } else { x };
    format!("{x:+.3}").replace('-', "\u{2212}")
}

fn differences(entries: &[Entry], paired: &[Paired]) -> Html {
    let mut out = Html::default();
    if entries.len() < 2 {
        return out;
    }
    let first = &entries[0].0;
    out.push(element("p", &[], format!(
        "Differences from {first}, task by task: what tasks have in common cancels, so that their intervals are narrower than \
         those of the figures suggest. Gains and losses in bold are beyond their intervals."
    )));
    let mut lines: Vec<(String, &Comparison)> = Vec::new();
    for paired in paired {
        let name = label(paired.name, paired.report, paired.several);
        match &paired.compared {
            Ok(comparison) => lines.push((name, comparison)),
            Err(error) => {
                let text = short(&error.to_string(), MAX_TEXT);
                out.push(element(
                    "p",
                    &[("class", "note")],
                    format!("{name} is not compared with {first}: {text}"),
                ));
            }
        }
    }
    for (name, grid) in &entries[1..] {
        if !paired.iter().any(|p| p.name == name) {
            let has = grid.temperatures().iter().map(f64::to_string).collect::<Vec<_>>().join(", ");
            let text = format!(
                "{name} is not compared with {first}: they have no temperature in common (it has {has})."
            );
            out.push(element("p", &[("class", "note")], text));
        }
    }
    let shown = spread(lines.len(), MAX_LINES);
    let figures = ["pass@N", "best-of-N", "majority@N"].into_iter().enumerate().map(|(figure, title)| {
        let series = shown.iter().enumerate().map(|(style, &i)| {
            let (name, comparison) = &lines[i];
            let list = comparison.figures.by_n()[figure].1;
            let points = spread(comparison.ns.len(), MAX_N).into_iter().map(|i| {
                let difference = list[i].difference;
                Point { x: comparison.ns[i] as f64, y: difference.mean, band: difference.ci95 }
            });
            Series { name: name.clone(), style, points: points.collect(), drawn: Drawn::Line, named: true }
        });
        let ns: BTreeSet<usize> = lines
            .iter()
            .flat_map(|(_, comparison)| {
                spread(comparison.ns.len(), MAX_N).into_iter().map(|i| comparison.ns[i])
            })
            .collect();
        Plot {
            id: format!("difference-{figure}"),
            title: format!("Difference of {title} from {first}"),
            x: Axis::at("N", Scale::Log, ns.into_iter().map(|n| n as f64).collect()),
            y: Axis::of("difference"),
            series: series.collect(),
            rule: Some(0.0),
            note: String::new(),
        }
        .figure()
    });
    out.push(plots(figures));
    for &i in &shown {
        let (name, comparison) = &lines[i];
        out.push(details(&format!("{name} against {first}, in full"), full(comparison)));
    }
    out.push(rest(lines.len() - shown.len(), "comparisons"));
    out
}

/// The table of a comparison, and what was made differently.
fn full(comparison: &Comparison) -> Html {
    let mut rows = Vec::new();
    let row = |title: String, change: &Change| {
        vec![
            Html::text(&title),
            shown(&change.before).into(),
            shown(&change.after).into(),
            difference(&change.difference),
        ]
    };
    for (title, list) in comparison.figures.by_n() {
        for i in spread(comparison.ns.len(), MAX_N) {
            rows.push(row(format!("{title}, N = {}", comparison.ns[i]), &list[i]));
        }
    }
    for (title, change) in comparison.figures.of_pool() {
        rows.push(row(title.to_owned(), &change));
    }
    let head = ["", "before", "after", "difference"].map(str::to_owned);
    let mut out = table("Before, after and the paired difference", &head, rows);
    if comparison.unknown {
        let text =
            "One of the two reports does not say what made it: only the prompts are known to be the same.";
        out.push(element("p", &[("class", "note")], text));
    }
    let differences = comparison.differences.iter().take(MAX_ROWS);
    let item = |difference: String| element("li", &[], short(&difference, MAX_SETTING));
    let list: Html = differences.map(|difference| item(difference.to_string())).collect();
    if !list.is_empty() {
        out.push(element("p", &[], "What differs between the two:"));
        out.push(element("ul", &[], list));
    }
    out
}

/// Lines that are drawn together.
struct Group<'a> {
    title: String,
    lines: Vec<(String, &'a Report)>,
    /// Those that there is no room for.
    left_out: usize,
}

/// The groups of lines: by temperature of each model where there are several, and by model at each temperature.
fn groups(entries: &[Entry]) -> Vec<Group<'_>> {
    let mut groups = Vec::new();
    for (name, grid) in entries.iter().filter(|(_, grid)| grid.reports.len() > 1) {
        let lines = spread(grid.reports.len(), MAX_LINES).into_iter().map(|i| {
            let report = &grid.reports[i];
            (at(report), report)
        });
        let lines: Vec<_> = lines.collect();
        let left_out = grid.reports.len() - lines.len();
        groups.push(Group { title: name.clone(), lines, left_out });
    }
    if entries.len() > 1 || groups.is_empty() {
        // Bits of numbers that are not negative are in their order.
        let mut by_temperature: BTreeMap<u64, Group> = BTreeMap::new();
        let several = entries.iter().any(|(_, grid)| grid.reports.len() > 1);
        for (name, grid) in entries {
            for report in &grid.reports {
                let (key, title) = match report.temperature() {
                    Some(temperature) if several => (temperature.to_bits(), at(report)),
                    _ => (0, String::new()),
                };
                let empty = Group { title, lines: Vec::new(), left_out: 0 };
                by_temperature.entry(key).or_insert(empty).lines.push((name.clone(), report));
            }
        }
        groups.extend(by_temperature.into_values().filter(|group| group.lines.len() > 1 || !several));
    }
    groups
}

fn pass(entries: &[Entry]) -> Html {
    let groups = groups(entries);
    let shown = spread(groups.len(), MAX_PLOTS);
    let mut out = Html::default();
    out.push(element(
        "p",
        &[],
        "The chance that at least one of N responses is right: what a perfect choice among them would reach.",
    ));
    let figure = |&i: &usize| {
        let Group { title, lines, left_out } = &groups[i];
        let series = lines
            .iter()
            .enumerate()
            .map(|(style, (name, report))| by_n(report, &report.figures.pass_at_n, name.clone(), style));
        let reports: Vec<&Report> = lines.iter().map(|(_, report)| *report).collect();
        Plot {
            id: format!("pass-{i}"),
            title: if title.is_empty() { "pass@N".into() } else { format!("pass@N: {title}") },
            x: n_axis(&reports),
            y: Axis::share("pass@N"),
            series: series.collect(),
            rule: None,
            note: match left_out {
                0 => String::new(),
                _ => format!("{left_out} more temperatures are in the tables alone."),
            },
        }
        .figure()
    };
    out.push(plots(shown.iter().map(figure)));
    out.push(rest(groups.len() - shown.len(), "plots"));
    out
}

fn choosing(entries: &[Entry]) -> Html {
    let mut out = Html::default();
    let text = "What a choice among N responses reaches, beside the chance that a right one is among them: best-of-N takes the \
                response with the best score, majority@N the most frequent answer, weighted majority@N the answer whose \
                scores add up to the most. Ties are averaged over their orders.";
    out.push(element("p", &[], text));
    let all: Vec<(String, &Report)> = entries
        .iter()
        .flat_map(|(name, grid)| {
            let several = grid.reports.len() > 1;
            grid.reports.iter().map(move |report| (label(name, report, several), report))
        })
        .collect();
    let shown = spread(all.len(), MAX_PLOTS);
    let figure = |&i: &usize| {
        let (name, report) = &all[i];
        // What is the same everywhere, as best-of-N and pass@N are where the verifier is never wrong, is one line.
        let mut merged: Vec<(String, &[Estimate])> = Vec::new();
        for (title, list) in report.figures.by_n() {
            let equal = |own: &[Estimate]| own.iter().zip(list).all(|(a, b)| (a.mean - b.mean).abs() < 1e-9);
            match merged.iter_mut().find(|(_, own)| equal(own)) {
                Some((name, _)) => *name += &format!(", {title}"),
                None => merged.push((title.to_owned(), list)),
            }
        }
        let series = merged.into_iter().enumerate();
        Plot {
            id: format!("choosing-{i}"),
            title: name.clone(),
            x: n_axis(&[report]),
            y: Axis::share("right"),
            series: series.map(|(style, (title, list))| by_n(report, list, title, style)).collect(),
            rule: None,
            note: String::new(),
        }
        .figure()
    };
    out.push(plots(shown.iter().map(figure)));
    out.push(rest(all.len() - shown.len(), "plots"));
    out
}

/// How far a verifier that is not the environment tells right from wrong, and whether its scores are probabilities.
fn verifier(entries: &[Entry]) -> Html {
    let reports = entries.iter().flat_map(|(name, grid)| {
        let several = grid.reports.len() > 1;
        grid.reports.iter().map(move |report| (label(name, report, several), report.calibration.as_ref()))
    });
    let all: Vec<(String, &Calibration)> =
        reports.filter_map(|(name, calibration)| Some((name, calibration?))).collect();
    let Some((_, first)) = all.first() else { return Html::default() };
    let mut out = Html::default();
    let text = "The verifier that chooses is not what says which responses are right. The area under the ROC curve is the chance \
                that it scores a right response above a wrong one; within a problem it is what choosing among its responses needs. \
                Scores from 0 to 1 are probabilities as far as, of responses that it scores alike, that share is right.";
    out.push(element("p", &[], text));
    let titles = calibration_rows(first).map(|(title, _)| title.to_owned());
    let head: Vec<String> = std::iter::once("model".to_owned()).chain(titles).collect();
    let row = |(name, calibration): &(String, &Calibration)| {
        let values = calibration_rows(calibration).map(|(_, value)| Html::from(value));
        std::iter::once(Html::text(name)).chain(values).collect()
    };
    out.push(table("How the verifier scores", &head, all.iter().take(MAX_ROWS).map(row).collect()));
    out.push(rest(all.len().saturating_sub(MAX_ROWS), "evaluations"));
    let told: Vec<(&str, &Probabilities)> =
        all.iter().filter_map(|(name, found)| Some((&**name, found.probabilities.as_ref()?))).collect();
    if told.is_empty() {
        return out;
    }
    let point = |x: f64, y: f64| Point { x, y, band: None };
    let line = |(style, (name, found)): (usize, &(&str, &Probabilities))| Series {
        name: (*name).to_owned(),
        style,
        points: found.bins.iter().map(|bin| point(bin.mean_score, bin.right)).collect(),
        drawn: Drawn::Line,
        named: true,
    };
    let shown = told.iter().take(MAX_LINES - 1).enumerate();
    let diagonal = Series {
        name: "true probabilities".to_owned(),
        style: shown.len(),
        points: vec![point(0.0, 0.0), point(1.0, 1.0)],
        drawn: Drawn::Plain,
        named: true,
    };
    let plot = Plot {
        id: "verifier-scores".to_owned(),
        title: "Share of right responses by score".to_owned(),
        x: Axis::share("mean score of responses"),
        y: Axis::share("right"),
        series: shown.map(line).chain([diagonal]).collect(),
        rule: None,
        note: "In ten bins of equal width; those without responses are left out.".to_owned(),
    };
    out.push(plots([plot.figure()]));
    out.push(rest(told.len().saturating_sub(MAX_LINES - 1), "lines"));
    out
}

/// Points over the temperatures of a grid.
fn over_temperature(
    grid: &Grid,
    name: String,
    style: usize,
    figure: impl Fn(&Report) -> Option<Estimate>,
) -> Series {
    let point = |report: &Report| {
        let (x, estimate) = (report.temperature()?, figure(report)?);
        Some(Point { x, y: estimate.mean, band: estimate.ci95 })
    };
    let points = grid.reports.iter().filter_map(point).collect();
    Series { name, style, points, drawn: Drawn::Line, named: true }
}

fn temperature_axis(entries: &[Entry]) -> Axis {
    let mut all: Vec<f64> = entries.iter().flat_map(|(_, grid)| grid.temperatures()).collect();
    all.sort_by(f64::total_cmp);
    all.dedup();
    Axis::at("temperature", Scale::Linear, all)
}

fn temperature(entries: &[Entry]) -> Html {
    let mut out = Html::default();
    let grids: Vec<&Entry> = entries.iter().filter(|(_, grid)| grid.reports.len() > 1).collect();
    let mut figures = Vec::new();
    for (i, (name, grid)) in grids.iter().take(MAX_PLOTS / 2).enumerate() {
        for (kind, title) in ["pass@", "best-of-"].into_iter().enumerate() {
            let series = spread(grid.reports[0].ns.len(), 6).into_iter().enumerate().map(|(style, place)| {
                let name = format!("{title}{}", grid.reports[0].ns[place]);
                let list = |report: &Report| report.figures.by_n()[kind].1.get(place).copied();
                over_temperature(grid, name, style, list)
            });
            let plot = Plot {
                id: format!("temperature-{i}-{kind}"),
                title: format!("{title}N by temperature: {name}"),
                x: temperature_axis(entries),
                y: Axis::share(&format!("{title}N")),
                series: series.collect(),
                rule: None,
                note: String::new(),
            };
            figures.push(plot.figure());
        }
    }
    out.push(plots(figures));
    for (name, grid) in &grids {
        let row = |best: &Best| {
            let of = |best: &BestTemperature| {
                [best.temperature.to_string(), shown(&best.figure), format!("{:.2}", best.share)]
                    .map(Html::from)
            };
            let mut row = vec![Html::from(best.n.to_string())];
            row.extend(of(&best.pass_at_n).into_iter().chain(of(&best.best_of_n)));
            row
        };
        let head = [
            "N",
            "best T for pass@N",
            "pass@N there",
            "sure",
            "best T for best-of-N",
            "best-of-N there",
            "sure",
        ];
        let rows = spread(grid.best.len(), MAX_N).into_iter().map(|i| row(&grid.best[i])).collect();
        out.push(table(&format!("The best temperature for each N: {name}"), &head.map(str::to_owned), rows));
    }
    if !grids.is_empty() {
        let text = "\u{201c}Sure\u{201d} is the share of bootstrap resamples of the tasks in which that temperature is the best, \
                    too. The figure at the best of several temperatures is an optimistic estimate of what it reaches on other \
                    tasks, the more so the less sure the choice is.";
        out.push(element("p", &[("class", "note")], text));
    }
    out
}

fn growth(entries: &[Entry]) -> Html {
    let mut out = Html::default();
    let mut figures = Vec::new();
    let mut tables = Html::default();
    for (i, (name, grid)) in entries.iter().enumerate() {
        let fits: Vec<(&Report, &ScalingFit)> =
            grid.reports.iter().filter_map(|report| Some((report, report.scaling.as_ref()?))).collect();
        if fits.is_empty() {
            continue;
        }
        if figures.len() < 2 * MAX_PLOTS {
            figures.extend(growth_plots(i, name, &fits));
        }
        let row = |(report, fit): &(&Report, &ScalingFit)| {
            let largest = fit.points.iter().map(|point| point.residual.abs()).fold(0.0, f64::max);
            [at(report), shown(&fit.a), shown(&fit.b), fit.points.len().to_string(), number(largest)]
                .map(Html::from)
                .to_vec()
        };
        let head = ["temperature", "a", "b", "N fitted", "largest residual"].map(str::to_owned);
        tables.push(table(&format!("a and b: {name}"), &head, fits.iter().map(row).collect()));
    }
    if figures.is_empty() {
        return out;
    }
    let text = "pass@N \u{2248} exp(a N^b), after Chow et al.: log(\u{2212}log pass@N) would be a straight line in log N. The line \
                is fitted by least squares with the weights p log\u{b2}p / (1 \u{2212} p), so that rates near 0 and 1, whose \
                logarithms err the most, count the least; rates of exactly 0 or 1 have no place on it. Residuals say where the \
                form does not hold.";
    out.push(element("p", &[], text));
    out.push(plots(figures));
    out.push(tables);
    out
}

fn growth_plots(i: usize, name: &str, fits: &[(&Report, &ScalingFit)]) -> [Html; 2] {
    let (mut lines, mut residuals) = (Vec::new(), Vec::new());
    for (style, place) in spread(fits.len(), MAX_LINES).into_iter().enumerate() {
        let (report, fit) = fits[place];
        let bare = |x: usize, y: f64| Point { x: x as f64, y, band: None };
        let shown = spread(fit.points.len(), MAX_N).into_iter().map(|i| &fit.points[i]);
        let line = |n: usize| (-fit.a.mean).ln() + fit.b.mean * (n as f64).ln();
        let points: Vec<Point> = shown.clone().map(|p| bare(p.n, line(p.n) + p.residual)).collect();
        let fitted: Vec<Point> = shown.clone().map(|p| bare(p.n, line(p.n))).collect();
        let named = at(report);
        lines.push(Series { name: named.clone(), style, points, drawn: Drawn::Points, named: true });
        lines.push(Series { name: String::new(), style, points: fitted, drawn: Drawn::Plain, named: false });
        let points = shown.map(|p| bare(p.n, p.residual)).collect();
        residuals.push(Series { name: named, style, points, drawn: Drawn::Line, named: true });
    }
    let reports: Vec<&Report> = fits.iter().map(|(report, _)| *report).collect();
    let plot = |kind: &str, title: String, y: &str, series: Vec<Series>, rule: Option<f64>| Plot {
        id: format!("growth-{i}-{kind}"),
        title,
        x: n_axis(&reports),
        y: Axis::of(y),
        series,
        rule,
        note: String::new(),
    };
    let label = "log(\u{2212}log pass@N)";
    [
        plot("fit", format!("Points and fits: {name}"), label, lines, None).figure(),
        plot("residuals", format!("Residuals: {name}"), "point less fit", residuals, Some(0.0)).figure(),
    ]
}

fn diversity(entries: &[Entry]) -> Html {
    let mut out = Html::default();
    let of = |report: &Report, title: &str| -> Option<Estimate> {
        report.figures.of_pool().into_iter().find(|(own, _)| *own == title).map(|(_, estimate)| estimate)
    };
    let titles: Vec<&str> = entries
        .iter()
        .flat_map(|(_, grid)| &grid.reports)
        .map(|report| report.figures.of_pool())
        .fold(Vec::new(), |mut titles, figures| {
            figures.iter().for_each(|(title, _)| {
                if !titles.contains(title) {
                    titles.push(title);
                }
            });
            titles
        });
    if entries.iter().any(|(_, grid)| grid.reports.len() > 1) {
        let figures = titles.iter().enumerate().map(|(i, title)| {
            let series = entries.iter().enumerate().map(|(style, (name, grid))| {
                over_temperature(grid, name.clone(), style, |report| of(report, title))
            });
            Plot {
                id: format!("diversity-{i}"),
                title: format!("{title} by temperature"),
                x: temperature_axis(entries),
                y: Axis::of(title),
                series: series.collect(),
                rule: None,
                note: String::new(),
            }
            .figure()
        });
        out.push(plots(figures));
    }
    let mut rows = Vec::new();
    let mut left_out = 0;
    for (name, grid) in entries {
        for report in &grid.reports {
            if rows.len() == MAX_ROWS {
                left_out += 1;
                continue;
            }
            let cells =
                titles.iter().map(|title| of(report, title).map_or("\u{2013}".into(), |e| shown(&e)).into());
            rows.push(std::iter::once(Html::text(&label(name, report, true))).chain(cells).collect());
        }
    }
    let head: Vec<String> =
        std::iter::once("model").chain(titles.iter().copied()).map(str::to_owned).collect();
    out.push(table("Means over tasks; answers are compared as the verifier reads them", &head, rows));
    out.push(rest(left_out, "evaluations"));
    out
}

fn tasks(entries: &[Entry]) -> Html {
    let mut out = Html::default();
    let shown = spread(entries.len(), MAX_PLOTS);
    let n = chosen(&entries[0].1).ns[0];
    let rate = |report: &Report, i: usize| -> Option<f64> {
        let place = report.ns.iter().position(|&own| own == n)?;
        report.problems.get(i)?.figures.pass_at_n.get(place).copied()
    };
    let figure = |&i: &usize| {
        let (name, grid) = &entries[i];
        let report = chosen(grid);
        let rates: Vec<f64> = (0..report.problems.len()).filter_map(|i| rate(report, i)).collect();
        let mut counts = [0usize; 10];
        rates.iter().for_each(|r| counts[((r * 10.0) as usize).min(9)] += 1);
        let bar =
            |(i, &count): (usize, &usize)| Point { x: (i as f64 + 0.5) / 10.0, y: count as f64, band: None };
        let points = counts.iter().enumerate().map(bar).collect();
        let (never, always) =
            (rates.iter().filter(|r| **r < 1e-9).count(), rates.iter().filter(|r| **r > 1.0 - 1e-9).count());
        Plot {
            id: format!("tasks-{i}"),
            title: format!("Tasks by pass@{n}: {}", label(name, report, grid.reports.len() > 1)),
            x: Axis::share(&format!("pass@{n} of a task, in tenths")),
            y: Axis::count("tasks"),
            series: vec![Series { name: "tasks".into(), style: i, points, drawn: Drawn::Bars, named: true }],
            rule: None,
            note: format!("{never} of {} tasks never pass, {always} always.", rates.len()),
        }
        .figure()
    };
    out.push(plots(shown.iter().map(figure)));
    let reports: Vec<(String, &Report)> = shown
        .iter()
        .map(|&i| {
            (
                label(&entries[i].0, chosen(&entries[i].1), entries[i].1.reports.len() > 1),
                chosen(&entries[i].1),
            )
        })
        .collect();
    let (first, last) = (reports[0].1, reports[reports.len() - 1].1);
    let same = |report: &Report, i: usize| {
        report.problems.get(i).map(|p| &p.id) == first.problems.get(i).map(|p| &p.id)
    };
    let change = |i: usize| if same(last, i) { Some(rate(last, i)? - rate(first, i)?) } else { None };
    let mut order: Vec<usize> = (0..first.problems.len()).collect();
    let (key, which): (Box<dyn Fn(usize) -> f64>, &str) = match reports.len() {
        1 => (Box::new(|i| rate(first, i).unwrap_or(0.0)), "those that pass the least often first"),
        _ => (Box::new(|i| -change(i).unwrap_or(0.0).abs()), "those that changed the most first"),
    };
    order.sort_by(|&a, &b| key(a).total_cmp(&key(b)).then(a.cmp(&b)));
    let row = |&i: &usize| {
        let cells = reports.iter().map(|(_, report)| {
            let rate = rate(report, i).filter(|_| same(report, i));
            Html::from(rate.map_or("\u{2013}".to_owned(), |r| format!("{r:.3}")))
        });
        let id = element("span", &[("class", "long")], short(&first.problems[i].id, MAX_ID));
        let mut row: Vec<Html> = std::iter::once(id).chain(cells).collect();
        if reports.len() > 1 {
            row.push(change(i).map_or("\u{2013}".to_owned(), signed).into());
        }
        row
    };
    let rows: Vec<Vec<Html>> = order.iter().take(MAX_TASKS).map(row).collect();
    let mut head = vec!["task".to_owned()];
    head.extend(reports.iter().map(|(name, _)| name.clone()));
    if reports.len() > 1 {
        head.push("change, first to last".into());
    }
    let caption = format!("pass@{n} by task: {} of {}, {which}", rows.len(), first.problems.len());
    out.push(details("Table of tasks", table(&caption, &head, rows)));
    out
}

fn responses(entries: &[Entry]) -> Html {
    let mut out = Html::default();
    let with: Vec<(String, &Report)> = entries
        .iter()
        .map(|(name, grid)| (label(name, chosen(grid), grid.reports.len() > 1), chosen(grid)))
        .filter(|(_, report)| !report.examples.is_empty())
        .collect();
    let each = (MAX_EXAMPLES / with.len().max(1)).max(1);
    for (name, report) in with.iter().take(MAX_EXAMPLES) {
        // Of each kind as many.
        let mut chosen: Vec<&Example> = Vec::new();
        let kinds = [Why::Disagreement, Why::Worst, Why::Best];
        let of = |why: Why| report.examples.iter().filter(move |example| example.why == why);
        for place in 0..each {
            chosen.extend(kinds.iter().filter_map(|why| of(*why).nth(place)));
        }
        chosen.truncate(each);
        chosen.sort_by_key(|example| (example.why, example.number));
        let shown: Html = chosen.iter().map(|example| self::example(example)).collect();
        out.push(details(&format!("{name}: {} of {} tasks", chosen.len(), report.problems.len()), shown));
    }
    if !out.is_empty() {
        let text = "Tasks that go best and worst, and those in which the verifier's choice among all responses is wrong although \
                    others are right. Control characters, and such as reorder or hide text, are written by their names.";
        out = [element("p", &[], text), out].into();
    }
    out
}

/// A text as it was kept, shortened further.
fn pre(text: &Text) -> Html {
    let mut shown = short(&text.text, MAX_TEXT);
    let cut = text.left_out + text.text.chars().count().saturating_sub(MAX_TEXT);
    if cut > 0 {
        shown = format!("{}\n({cut} more characters)", shown.trim_end_matches('\u{2026}'));
    }
    element("pre", &[("dir", "auto")], shown)
}

fn example(example: &Example) -> Html {
    let why = match example.why {
        Why::Disagreement => "the verifier's choice is wrong",
        Why::Worst => "among the least often right",
        Why::Best => "among the most often right",
    };
    let mut out = Html::default();
    let head = format!(
        "Task {}: {why}; {:.0} of {} responses are right",
        example.number,
        example.pass_rate * example.samples as f64,
        example.samples
    );
    out.push(element("h4", &[], head));
    out.push(pre(&example.prompt));
    let answer = short(&example.answer.text, MAX_SETTING);
    out.push(element("p", &[("class", "note")], format!("The task's answer: {answer}")));
    for response in &example.responses {
        let (class, word) =
            if response.correct { ("response right", "right") } else { ("response wrong", "wrong") };
        let mut says = format!("{word}: score {}", number(response.score));
        if response.reward != response.score {
            says += &format!(", reward {}", number(response.reward));
        }
        match &response.answer {
            Some(answer) => says += &format!(", answer read: {}", short(&answer.text, MAX_ID)),
            None => says += ", no answer read",
        }
        says += &format!(", {} tokens", response.tokens);
        if response.truncated {
            says += ", cut by the length limit";
        }
        if response.count > 1 {
            says += &format!(", {} times", response.count);
        }
        let head = element("p", &[("class", "note")], says);
        out.push(element("div", &[("class", class)], [head, pre(&response.text)]));
    }
    element("article", &[("class", "example")], out)
}

fn provenance(entries: &[Entry]) -> Html {
    let mut out = Html::default();
    let settings: Vec<BTreeMap<String, String>> = entries
        .iter()
        .map(|(_, grid)| {
            let mut settings =
                grid.reports[0].provenance.as_ref().map(|made| made.settings.clone()).unwrap_or_default();
            if grid.reports.len() > 1 {
                let all: Vec<String> = grid.temperatures().iter().map(f64::to_string).collect();
                settings.insert(crate::eval::provenance::TEMPERATURE.to_owned(), all.join(", "));
            }
            settings
        })
        .collect();
    let keys: BTreeSet<&String> = settings.iter().flat_map(BTreeMap::keys).collect();
    let several = entries.len() > 1;
    let row = |key: &&String| {
        let values: Vec<Option<&String>> = settings.iter().map(|settings| settings.get(*key)).collect();
        let cell = |value: &Option<&String>| {
            let text = value.map_or("unset".to_owned(), |value| short(value, MAX_SETTING));
            element("span", &[("class", "long")], text)
        };
        let mut row = vec![Html::text(&short(key, MAX_ID))];
        row.extend(values.iter().map(cell));
        if several {
            let differs = values.iter().any(|value| *value != values[0]);
            row.push(if differs { element("strong", &[], "differs") } else { Html::text("same") });
        }
        row
    };
    let mut head = vec!["setting".to_owned()];
    head.extend(entries.iter().map(|(name, _)| name.clone()));
    if several {
        head.push("".into());
    }
    let rows: Vec<Vec<Html>> = keys.iter().take(MAX_ROWS * 2).map(row).collect();
    if rows.is_empty() {
        out.push(element("p", &[], "The reports do not say what made them."));
    } else {
        out.push(table("Program, model and its checksums, tasks, sampling and verifier", &head, rows));
    }
    let mut commands = Html::default();
    for (name, grid) in entries {
        let command =
            grid.reports[0].provenance.as_ref().map(|made| made.command.as_str()).unwrap_or_default();
        if !command.is_empty() {
            commands.push(element("h3", &[], format!("Command: {name}")));
            commands.push(element("pre", &[], short(command, 2 * MAX_TEXT)));
        }
    }
    out.push(commands);
    out
}
