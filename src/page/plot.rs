//! Plots as inline SVG.
//!
//! Written here rather than by a plotting crate, because those write colours and fonts into the picture (plotters) or need a
//! browser to draw (charming): a page that is read in light and dark, printed, and by screen readers takes its colours from
//! the style sheet, has its legend as text that wraps, and says in words what a plot shows.
//!
//! Series differ by colour, dash and mark, so that they can be told apart without any one of these.

use std::fmt::Write;

use super::html::{Html, details, element, empty, table};

/// Size of the drawing, and of the part with the axes.
const WIDTH: f64 = 420.0;
const HEIGHT: f64 = 270.0;
const LEFT: f64 = 50.0;
const RIGHT: f64 = WIDTH - 14.0;
const TOP: f64 = 26.0;
const BOTTOM: f64 = HEIGHT - 44.0;
/// Width of a character of a label, about.
const CHARACTER: f64 = 7.4;
/// Colours in the style sheet; dashes and marks.
pub(super) const COLOURS: usize = 6;
const DASHES: [&str; 6] = ["none", "7 3", "2 3", "9 3 2 3", "5 2 2 2 2 2", "12 4"];
const MARKS: usize = 8;

/// How a coordinate becomes a place.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Scale {
    /// Evenly.
    Linear,
    /// By its logarithm.
    Log,
}

/// An axis.
#[derive(Debug, Clone)]
pub(super) struct Axis {
    /// What it is of.
    pub label: String,
    /// Its scale.
    pub scale: Scale,
    /// Its ends; widened to hold all points where there are none.
    pub range: Option<[f64; 2]>,
    /// Where it has numbers; round ones where there are none.
    pub ticks: Vec<f64>,
    /// Whether these are whole ones.
    pub whole: bool,
}

impl Axis {
    /// An axis with round numbers that holds all points.
    pub(super) fn of(label: &str) -> Self {
        Self { label: label.to_owned(), scale: Scale::Linear, range: None, ticks: Vec::new(), whole: false }
    }

    /// An axis of things that are counted.
    pub(super) fn count(label: &str) -> Self {
        Self { whole: true, ..Self::of(label) }
    }

    /// An axis of shares, from 0 to 1.
    pub(super) fn share(label: &str) -> Self {
        Self { range: Some([0.0, 1.0]), ..Self::of(label) }
    }

    /// An axis with a number at each of these.
    pub(super) fn at(label: &str, scale: Scale, ticks: Vec<f64>) -> Self {
        Self { scale, ticks, ..Self::of(label) }
    }
}

/// A point with its interval.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Point {
    pub x: f64,
    pub y: f64,
    pub band: Option<[f64; 2]>,
}

/// What a series is drawn as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Drawn {
    /// Points joined by a line.
    Line,
    /// Points joined by a line, without marks: there are many.
    Plain,
    /// Points alone.
    Points,
    /// Bars from 0, as wide as points are apart.
    Bars,
}

/// One line of a plot.
#[derive(Debug, Clone)]
pub(super) struct Series {
    /// Its name in the legend.
    pub name: String,
    /// Which colour, dash and mark.
    pub style: usize,
    /// In the order of x. What is no number, or beyond 1e300, is left out.
    pub points: Vec<Point>,
    /// How it is drawn.
    pub drawn: Drawn,
    /// Whether it stands in the legend and in the table.
    pub named: bool,
}

/// A plot with its title, legend and numbers.
#[derive(Debug, Clone)]
pub(super) struct Plot {
    /// Unique on the page.
    pub id: String,
    pub title: String,
    pub x: Axis,
    pub y: Axis,
    pub series: Vec<Series>,
    /// A level to compare with.
    pub rule: Option<f64>,
    /// A sentence below it.
    pub note: String,
}

/// A number as tables have it: three decimals in the range of shares, as many digits elsewhere.
pub(super) fn number(x: f64) -> String {
    let size = x.abs();
    match () {
        () if !x.is_finite() => "\u{2013}".to_owned(),
        () if x == x.trunc() && size < 1e6 => format!("{}", x + 0.0),
        () if !(1e-3..1e6).contains(&size) => format!("{x:.2e}"),
        () if size < 10.0 => format!("{x:.3}"),
        () if size < 1000.0 => format!("{x:.1}"),
        () => format!("{x:.0}"),
    }
}

/// A number and its interval, all with as many decimals.
pub(super) fn with_band(mean: f64, band: Option<[f64; 2]>) -> String {
    let digits = match mean.abs() {
        size if size > 0.0 && size < 1e-3 => None,
        ..10.0 => Some(3),
        ..1000.0 => Some(1),
        _ => Some(0),
    };
    let show = |x: f64| match digits {
        None => number(x),
        // What is shown as 0 has no sign.
        Some(digits) => format!("{x:.digits$}").replace("-0.000", "0.000"),
    };
    match band {
        Some([low, high]) => format!("{} [{}, {}]", show(mean), show(low), show(high)),
        None => show(mean),
    }
}

/// A number on an axis: no more digits than tell it from its neighbours.
fn tick(x: f64, step: f64) -> String {
    let x = if x.abs() < step * 1e-6 { 0.0 } else { x };
    if x != 0.0 && (x.abs() >= 1e5 || x.abs() < 1e-3) {
        return format!("{x:.1e}").replace(".0e", "e");
    }
    let digits = (-step.log10().floor()).clamp(0.0, 6.0) as usize;
    let text = format!("{x:.digits$}");
    if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.').to_owned() } else { text }
}

/// Round numbers from `low` to `high`, about `count` of them.
fn round_numbers(low: f64, high: f64, count: f64, whole: bool) -> Vec<f64> {
    let rough = (high - low) / count;
    let power = 10f64.powf(rough.log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0].map(|m| m * power).into_iter().find(|s| *s >= rough * 0.999);
    let step = step.unwrap_or(power * 10.0).max(if whole { 1.0 } else { 0.0 });
    let first = (low / step - 1e-9).ceil() as i64;
    let last = (high / step + 1e-9).floor() as i64;
    (first..=last).take(50).map(|i| i as f64 * step).collect()
}

/// An axis laid out: its ends as the scale has them, and its labels.
struct Laid {
    scale: Scale,
    low: f64,
    high: f64,
    from: f64,
    to: f64,
    ticks: Vec<(f64, String)>,
}

impl Laid {
    /// `from` and `to` are the places of its ends; `room` says how much a label takes of them.
    fn new(axis: &Axis, values: &[f64], from: f64, to: f64, room: impl Fn(&str) -> f64) -> Self {
        let scaled = |x: f64| if axis.scale == Scale::Log { x.ln() } else { x };
        let values = values.iter().chain(&axis.ticks).map(|&x| scaled(x)).filter(|x| x.is_finite());
        let [mut low, mut high] = axis.range.map_or_else(
            || values.fold([f64::INFINITY, f64::NEG_INFINITY], |[lo, hi], x| [lo.min(x), hi.max(x)]),
            |range| range.map(scaled),
        );
        if low > high {
            [low, high] = [0.0, 1.0];
        }
        let span = high - low;
        if span <= 1e-12 * low.abs().max(high.abs()) {
            let by = if low == 0.0 { 1.0 } else { 0.1 * low.abs() };
            // What is 0 throughout lies on the axis.
            [low, high] = if low == 0.0 { [0.0, by] } else { [low - by, high + by] };
        } else if axis.range.is_none() && axis.ticks.is_empty() {
            let by = 0.05 * span;
            // What begins at 0 does not need room below.
            [low, high] = [if low == 0.0 { 0.0 } else { low - by }, high + by];
        } else if axis.range.is_none() {
            [low, high] = [low - 0.04 * span, high + 0.04 * span];
        }
        let mut laid = Self { scale: axis.scale, low, high, from, to, ticks: Vec::new() };
        let all: Vec<(f64, String)> = if axis.ticks.is_empty() {
            let round = round_numbers(low, high, 6.0, axis.whole);
            let step = if round.len() > 1 { round[1] - round[0] } else { high - low };
            round.into_iter().map(|x| (x, tick(x, step))).collect()
        } else {
            axis.ticks.iter().map(|&x| (x, short_number(x))).collect()
        };
        // Labels that would touch the one before are left out, but not the last.
        let mut kept: Vec<(f64, String)> = Vec::new();
        let clash = |laid: &Self, a: &(f64, String), b: &(f64, String)| {
            (laid.place(a.0) - laid.place(b.0)).abs() < 0.5 * (room(&a.1) + room(&b.1)) + 6.0
        };
        let last = all.last().cloned();
        for next in all {
            if kept.last().is_none_or(|before| !clash(&laid, before, &next)) {
                kept.push(next);
            }
        }
        if let Some(last) = last.filter(|last| kept.last() != Some(last)) {
            while kept.len() > 1 && kept.last().is_some_and(|before| clash(&laid, before, &last)) {
                kept.pop();
            }
            kept.push(last);
        }
        laid.ticks = kept;
        laid
    }

    /// Where a coordinate lies, not beyond the ends.
    fn place(&self, x: f64) -> f64 {
        let x = if self.scale == Scale::Log { x.ln() } else { x };
        let share = ((x - self.low) / (self.high - self.low)).clamp(0.0, 1.0);
        self.from + share * (self.to - self.from)
    }
}

/// A number that is given, with no more digits than it has.
fn short_number(x: f64) -> String {
    let text = format!("{x:.4}");
    match text.trim_end_matches('0').trim_end_matches('.') {
        "0" if x != 0.0 => format!("{x:e}"),
        text => text.to_owned(),
    }
}

/// The path of a mark around a point.
fn mark(shape: usize, x: f64, y: f64) -> String {
    let (r, d) = (3.4, 4.6);
    match shape % MARKS {
        0 => format!("M{:.1} {y:.1}a{r} {r} 0 1 0 {} 0a{r} {r} 0 1 0 -{} 0z", x - r, 2.0 * r, 2.0 * r),
        1 => format!("M{:.1} {:.1}h{}v{}h-{}z", x - r, y - r, 2.0 * r, 2.0 * r, 2.0 * r),
        2 => format!("M{x:.1} {:.1}l{d} {}h-{}z", y - d, 1.75 * d, 2.0 * d),
        3 => format!("M{x:.1} {:.1}l{d} {d}l-{d} {d}l-{d} -{d}z", y - d),
        4 => format!("M{x:.1} {:.1}l-{d} -{}h{}z", y + d, 1.75 * d, 2.0 * d),
        5 => format!(
            "M{:.1} {:.1}l{} {}m0 -{}l-{} {}",
            x - r,
            y - r,
            2.0 * r,
            2.0 * r,
            2.0 * r,
            2.0 * r,
            2.0 * r
        ),
        6 => format!("M{:.1} {y:.1}h{}M{x:.1} {:.1}v{}", x - d, 2.0 * d, y - d, 2.0 * d),
        _ => format!(
            "M{:.1} {:.1}l{d} {}l{d} -{}h-{}zM{x:.1} {y:.1}v{d}",
            x - d,
            y - r,
            1.6 * r,
            1.6 * r,
            2.0 * d
        ),
    }
}

/// The classes of a series: colours and dashes come round at different times.
fn dash(style: usize) -> &'static str {
    DASHES[(style + style / COLOURS) % DASHES.len()]
}

/// Whether a coordinate is a number, and differences of such are.
fn drawable(x: f64) -> bool {
    x.abs() < 1e300
}

fn line_path(points: impl Iterator<Item = (f64, f64)>) -> String {
    let mut path = String::new();
    for (i, (x, y)) in points.enumerate() {
        let _ = write!(path, "{}{x:.1} {y:.1}", if i == 0 { "M" } else { "L" });
    }
    path
}

impl Plot {
    /// The plot as a figure. One without any point is nothing.
    pub(super) fn figure(&self) -> Html {
        let mut plot = self.clone();
        for series in &mut plot.series {
            series.points.retain(|point| drawable(point.x) && drawable(point.y));
            for point in &mut series.points {
                point.band = point.band.filter(|ends| ends.iter().all(|end| drawable(*end)));
            }
        }
        plot.series.retain(|series| !series.points.is_empty());
        if plot.series.is_empty() {
            return Html::default();
        }
        let mut content = Html::default();
        content.push(element("h4", &[("id", &plot.id)], plot.title.as_str()));
        content.push(plot.svg());
        content.push(plot.legend());
        if plot.note.is_empty() && plot.series.iter().flat_map(|series| &series.points).all(|p| p.y == 0.0) {
            plot.note = "0 throughout.".to_owned();
        }
        if !plot.note.is_empty() {
            content.push(element("p", &[("class", "note")], plot.note.as_str()));
        }
        content.push(details("Numbers", plot.numbers()));
        element("figure", &[("aria-labelledby", &plot.id)], content)
    }

    fn svg(&self) -> Html {
        let all = || self.series.iter().flat_map(|series| series.points.iter());
        let xs: Vec<f64> = all().map(|point| point.x).collect();
        let mut ys: Vec<f64> = all().map(|point| point.y).collect();
        ys.extend(all().filter_map(|point| point.band).flatten());
        ys.extend(self.rule);
        if self.series.iter().any(|series| series.drawn == Drawn::Bars) {
            ys.push(0.0);
        }
        let x = Laid::new(&self.x, &xs, LEFT, RIGHT, |label| CHARACTER * label.chars().count() as f64);
        let y = Laid::new(&self.y, &ys, BOTTOM, TOP, |_| 8.0);
        let mut out = Html::default();
        out.push(element("title", &[], self.title.as_str()));
        out.push(element("desc", &[], self.description().as_str()));
        let mut grid = String::new();
        let mut labels = Html::default();
        for (value, label) in &y.ticks {
            let place = y.place(*value);
            let _ = write!(grid, "M{LEFT} {place:.1}H{RIGHT}");
            let at = [format!("{:.1}", LEFT - 6.0), format!("{:.1}", place + 4.0)];
            let attributes = [("x", at[0].as_str()), ("y", &at[1]), ("text-anchor", "end")];
            labels.push(element("text", &attributes, label.as_str()));
        }
        let mut axes = format!("M{LEFT} {TOP}V{BOTTOM}H{RIGHT}");
        for (value, label) in &x.ticks {
            let place = x.place(*value);
            let _ = write!(axes, "M{place:.1} {BOTTOM}v4");
            let at = [format!("{place:.1}"), format!("{:.1}", BOTTOM + 17.0)];
            let attributes = [("x", at[0].as_str()), ("y", &at[1]), ("text-anchor", "middle")];
            labels.push(element("text", &attributes, label.as_str()));
        }
        out.push(empty("path", &[("class", "grid"), ("d", &grid)]));
        out.push(empty("path", &[("class", "axis"), ("d", &axes)]));
        if let Some(level) = self.rule {
            let place = y.place(level);
            out.push(empty("path", &[("class", "rule"), ("d", &format!("M{LEFT} {place:.1}H{RIGHT}"))]));
        }
        // Bands of many lines would hide each other.
        let many =
            self.series.iter().filter(|series| series.points.iter().any(|p| p.band.is_some())).count() > 3;
        for series in &self.series {
            out.push(band(series, many, &x, &y));
        }
        for series in &self.series {
            out.push(drawn(series, &x, &y));
        }
        let (middle, low) = (format!("{:.1}", (LEFT + RIGHT) / 2.0), format!("{:.1}", HEIGHT - 8.0));
        labels.push(element(
            "text",
            &[("x", &middle), ("y", &low), ("text-anchor", "middle"), ("class", "of")],
            self.x.label.as_str(),
        ));
        labels.push(element("text", &[("x", "4"), ("y", "14"), ("class", "of")], self.y.label.as_str()));
        out.push(labels);
        let size = format!("0 0 {WIDTH} {HEIGHT}");
        let label = format!("{}. {}", self.title, self.description());
        element("svg", &[("viewBox", &size), ("role", "img"), ("aria-label", &label)], out)
    }

    /// What the plot shows, in words.
    fn description(&self) -> String {
        let (x, y) = (&self.x.label, &self.y.label);
        let mut out = format!("{y} against {x}.");
        for series in self.series.iter().filter(|series| series.named) {
            let (Some(first), Some(last)) = (series.points.first(), series.points.last()) else { continue };
            let _ = write!(
                out,
                " {}: {} at {}, {} at {}.",
                series.name,
                number(first.y),
                number(first.x),
                number(last.y),
                number(last.x)
            );
        }
        out
    }

    /// The names of the series, each with its line.
    fn legend(&self) -> Html {
        let named: Vec<&Series> = self.series.iter().filter(|series| series.named).collect();
        if named.len() < 2 {
            return Html::default();
        }
        let item = |series: &&Series| {
            let mut sign = Html::default();
            let class = class(series);
            if matches!(series.drawn, Drawn::Line | Drawn::Plain) {
                let line =
                    [("class", class.as_str()), ("d", "M1 7H33"), ("stroke-dasharray", dash(series.style))];
                sign.push(empty("path", &line));
            }
            if series.drawn != Drawn::Plain {
                let class = format!("mark {class}");
                sign.push(empty("path", &[("class", &class), ("d", &mark(series.style, 17.0, 7.0))]));
            }
            let attributes = [("viewBox", "0 0 34 14"), ("aria-hidden", "true")];
            element("li", &[], [element("svg", &attributes, sign), Html::text(&series.name)])
        };
        element("ul", &[("class", "legend")], named.iter().map(item).collect::<Html>())
    }

    /// The table of the points: a row per x.
    fn numbers(&self) -> Html {
        let named: Vec<&Series> = self.series.iter().filter(|series| series.named).collect();
        let mut xs: Vec<f64> = named.iter().flat_map(|series| &series.points).map(|point| point.x).collect();
        xs.sort_by(f64::total_cmp);
        xs.dedup();
        let mut head = vec![self.x.label.clone()];
        head.extend(named.iter().map(|series| series.name.clone()));
        let cell = |series: &Series, x: f64| {
            let point = series.points.iter().find(|point| point.x == x)?;
            Some(match point.band {
                Some(_) => with_band(point.y, point.band),
                None => number(point.y),
            })
        };
        let row = |&x: &f64| {
            let cells = named.iter().map(|series| Html::from(cell(series, x).unwrap_or_default()));
            std::iter::once(Html::text(&short_number(x))).chain(cells).collect()
        };
        let of_title = self.title.starts_with(&self.y.label);
        let caption = if of_title { self.title.clone() } else { format!("{}: {}", self.title, self.y.label) };
        table(&caption, &head, xs.iter().map(row).collect())
    }
}

fn class(series: &Series) -> String {
    format!("c{}", series.style % COLOURS)
}

fn band(series: &Series, many: bool, x: &Laid, y: &Laid) -> Html {
    let ends: Vec<(f64, [f64; 2])> =
        series.points.iter().filter_map(|point| Some((point.x, point.band?))).collect();
    if ends.is_empty() || series.drawn == Drawn::Bars {
        return Html::default();
    }
    if series.drawn == Drawn::Points || ends.len() == 1 {
        let mut path = String::new();
        for (at, [low, high]) in &ends {
            let _ = write!(path, "M{:.1} {:.1}V{:.1}", x.place(*at), y.place(*low), y.place(*high));
        }
        return empty("path", &[("class", &format!("whisker {}", class(series))), ("d", &path)]);
    }
    let above = ends.iter().map(|(at, [_, high])| (x.place(*at), y.place(*high)));
    let below = ends.iter().rev().map(|(at, [low, _])| (x.place(*at), y.place(*low)));
    let path = line_path(above.chain(below)) + "z";
    let faint = if many { " many" } else { "" };
    empty("path", &[("class", &format!("band {}{faint}", class(series))), ("d", &path)])
}

fn drawn(series: &Series, x: &Laid, y: &Laid) -> Html {
    let places: Vec<(f64, f64)> =
        series.points.iter().map(|point| (x.place(point.x), y.place(point.y))).collect();
    let mut out = Html::default();
    if series.drawn == Drawn::Bars {
        let apart = places.windows(2).map(|pair| pair[1].0 - pair[0].0).fold(f64::INFINITY, f64::min);
        let half = 0.42 * apart.min(60.0);
        let mut path = String::new();
        for (at, top) in &places {
            let _ = write!(
                path,
                "M{:.1} {:.1}V{top:.1}h{:.1}V{:.1}z",
                at - half,
                y.place(0.0),
                2.0 * half,
                y.place(0.0)
            );
        }
        out.push(empty("path", &[("class", &format!("bar {}", class(series))), ("d", &path)]));
        return out;
    }
    if series.drawn != Drawn::Points && places.len() > 1 {
        let attributes = [
            ("class", &*class(series)),
            ("d", &line_path(places.iter().copied())),
            ("stroke-dasharray", dash(series.style)),
        ];
        out.push(empty("path", &attributes));
    }
    if series.drawn != Drawn::Plain || places.len() == 1 {
        let marks: String = places.iter().map(|&(x, y)| mark(series.style, x, y)).collect();
        out.push(empty("path", &[("class", &format!("mark {}", class(series))), ("d", &marks)]));
    }
    out
}
