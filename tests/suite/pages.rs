//! Pages: well-formed, safe whatever a model wrote, the same for the same data, bounded, and legible in both themes.

use std::collections::{BTreeMap, BTreeSet};

use bon_engine::eval::{Grid, calibration_rows};
use bon_engine::page::{PageError, Run, Sources, Step, page};
use roxmltree::{Document, Node, ParsingOptions};

use crate::sources::{HOSTILE, all, grid, run};

/// Parsed as XML: a page that is that has no unescaped text and no unclosed element.
fn parse(text: &str) -> Document<'_> {
    let options = ParsingOptions { allow_dtd: true, ..ParsingOptions::default() };
    Document::parse_with_options(text, options).unwrap_or_else(|e| panic!("{e}"))
}

fn named<'a, 'd>(of: Node<'a, 'd>, name: &'static str) -> impl Iterator<Item = Node<'a, 'd>> {
    of.descendants().filter(move |node| node.is_element() && node.tag_name().name() == name)
}

fn words(node: Node) -> String {
    node.descendants().filter_map(|node| node.text().filter(|_| node.is_text())).collect()
}

#[test]
fn pages_are_well_formed_and_can_be_read_without_eyes() {
    for (name, sources) in all() {
        let text = page(&sources).unwrap();
        let document = parse(&text);
        let root = document.root_element();
        assert_eq!(root.attribute("lang"), Some("en"), "{name}");
        let all = || root.descendants().filter(|node| node.is_element());
        let ids: Vec<&str> = all().filter_map(|node| node.attribute("id")).collect();
        let unique: BTreeSet<&str> = ids.iter().copied().collect();
        assert_eq!(ids.len(), unique.len(), "{name}: ids are unique");
        for node in all() {
            for attribute in node.attributes() {
                let (key, value) = (attribute.name(), attribute.value());
                assert!(!key.starts_with("on") && key != "src" && key != "style", "{name}: {key}={value}");
                match key {
                    "href" => {
                        let target =
                            value.strip_prefix('#').unwrap_or_else(|| panic!("{name}: leads out: {value}"));
                        assert!(unique.contains(target), "{name}: {value}");
                    }
                    "aria-labelledby" => assert!(unique.contains(value), "{name}: {value}"),
                    _ => {}
                }
            }
            let tag = node.tag_name().name();
            assert!(
                !["script", "iframe", "object", "embed", "form", "base", "link", "img"].contains(&tag),
                "{name}: {tag}"
            );
        }
        // Headings go down by one.
        let mut level = 0;
        for node in all() {
            if let Some(own) = node.tag_name().name().strip_prefix('h').and_then(|n| n.parse::<u32>().ok()) {
                assert!(
                    own <= level + 1 || (own == 4 && level == 2),
                    "{name}: h{own} after h{level}: {}",
                    words(node)
                );
                level = own;
            }
        }
        let mut plots = 0;
        for figure in named(root, "figure") {
            let svg = named(figure, "svg").find(|svg| svg.attribute("role") == Some("img")).unwrap();
            assert!(svg.attribute("aria-label").unwrap().len() > 20, "{name}: says what it shows");
            assert_eq!(svg.first_element_child().unwrap().tag_name().name(), "title");
            assert!(!words(named(svg, "desc").next().unwrap()).is_empty());
            // The numbers behind it.
            let table = named(figure, "table").next().unwrap();
            assert!(named(table, "tr").count() > 1, "{name}");
            plots += 1;
        }
        assert!(plots >= 3, "{name}: {plots}");
        for table in named(root, "table") {
            assert!(!words(named(table, "caption").next().unwrap()).is_empty(), "{name}");
            let widths: BTreeSet<usize> = named(table, "tr").map(|row| row.children().count()).collect();
            assert_eq!(widths.len(), 1, "{name}: rows are as wide as the head: {}", words(table));
            let region = table.parent().unwrap();
            assert_eq!((region.attribute("tabindex"), region.attribute("role")), (Some("0"), Some("region")));
        }
        let links = named(named(root, "nav").next().unwrap(), "a").count();
        assert_eq!(links, named(root, "section").count(), "{name}: the contents list every section");
        let policy = named(root, "meta").find(|m| m.attribute("http-equiv").is_some()).unwrap();
        assert!(policy.attribute("content").unwrap().starts_with("default-src 'none'"));
        assert_eq!(page(&sources).unwrap(), text, "{name}: the same data, the same bytes");
        for outside in ["http://", "https://", "url(", "@import", "@font-face"] {
            let found = text.matches(outside).count();
            assert_eq!(
                found,
                usize::from(outside == "http://"),
                "{name}: {outside}; the namespace is no reference"
            );
        }
    }
}

/// Its figures as the text of a report has them, and a line for each evaluation beside what true probabilities would be; without
/// such a verifier there is no such section.
#[test]
fn a_verifier_that_is_not_the_environment_has_a_section() {
    let (_, mut sources) = all().into_iter().find(|(name, _)| *name == "two").unwrap();
    let text = page(&sources).unwrap();
    let document = parse(&text);
    let section = |document: &Document| {
        named(document.root_element(), "section").find(|s| s.attribute("id") == Some("verifier")).map(words)
    };
    let said = section(&document).unwrap();
    for (name, grid) in &sources.evaluations {
        let calibration = grid.reports[0].calibration.as_ref().unwrap();
        assert!(calibration.intervals.auc.is_some() && calibration.probabilities.is_some());
        for (title, value) in calibration_rows(calibration) {
            assert!(said.contains(title) && said.contains(&value), "{name}: {title} {value}: {said}");
        }
        assert!(said.contains(name));
    }
    assert!(said.contains("true probabilities"));
    for (_, grid) in &mut sources.evaluations {
        grid.reports.iter_mut().for_each(|report| report.calibration = None);
    }
    let text = page(&sources).unwrap();
    assert_eq!(section(&parse(&text)), None);
}

#[test]
fn what_a_model_wrote_is_shown_and_does_nothing() {
    let (_, sources) = all().into_iter().find(|(name, _)| *name == "hostile").unwrap();
    let text = page(&sources).unwrap();
    let acts = |c: char| {
        (c.is_control() && c != '\n' && c != '\t')
            || "\u{202e}\u{2066}\u{200b}\u{feff}\u{fffe}\u{ffff}\u{e0041}".contains(c)
    };
    assert_eq!(text.chars().find(|c| acts(*c)), None);
    let document = parse(&text);
    let shown: Vec<String> =
        named(document.root_element(), "pre").map(words).filter(|text| text.contains("desrever")).collect();
    assert!(shown.len() > 10, "{}", shown.len());
    for text in &shown {
        for part in [
            "<script>",
            "onerror=alert(1)",
            "&amp;]]><!--",
            "\u{2400}\u{2401}\u{241b}[31m\u{2421}",
            "\u{27e8}U+202E\u{27e9}desrever",
        ] {
            assert!(text.contains(part), "no {part:?} in {text:?}");
        }
    }
    assert!(words(named(document.root_element(), "title").next().unwrap()).contains("<script>"));
    assert!(HOSTILE.contains('\0'));
}

/// Whatever stands in it, text is the same text after parsing, but for what acts.
#[test]
fn every_character_survives_or_is_named() {
    let every: Vec<char> = ('\0'..=char::MAX)
        .filter(|c| (*c as u32) < 0x3000 || (*c as u32).is_multiple_of(251) || (*c as u32) & 0xfff0 == 0xfff0)
        .collect();
    for part in every.chunks(200) {
        let text: String = part.iter().collect();
        let name = |_: &str| Sources {
            evaluations: vec![],
            runs: vec![Run { config: text.clone(), ..run("r", 2, 0, "") }],
        };
        let made = page(&name("")).unwrap();
        let document = parse(&made);
        let shown = named(document.root_element(), "pre").map(words).next().unwrap();
        let mut rest = shown.as_str();
        for &c in part {
            let named = format!("\u{27e8}U+{:04X}\u{27e9}", c as u32);
            let picture = char::from_u32(if c == '\u{7f}' { 0x2421 } else { 0x2400 + c as u32 }).unwrap_or(c);
            let found = [c.to_string(), named, picture.to_string()]
                .into_iter()
                .find(|as_shown| rest.starts_with(as_shown));
            let found = found.unwrap_or_else(|| panic!("U+{:04X} is not at the start of {rest:?}", c as u32));
            rest = &rest[found.len()..];
        }
        assert_eq!(rest, "");
    }
}

/// Two megabytes, whatever there is.
const MAX_BYTES: usize = 2_000_000;

#[test]
fn pages_are_bounded() {
    // Many tasks with long prompts and answers.
    let long = HOSTILE.repeat(40);
    let mut many = grid(8, 16, &[1.0], 0.5, &long);
    let problems = many.reports[0].problems.clone();
    many.reports[0].problems = problems.iter().cycle().take(50_000).cloned().collect();
    let sources = Sources { evaluations: vec![(long.clone(), many)], runs: vec![] };
    let tasks = page(&sources).unwrap().len();
    assert!(tasks < MAX_BYTES / 2, "{tasks}");
    // As many evaluations as there may be, each at as many temperatures as there may be and many N.
    let temperatures: Vec<f64> = (1..=32).map(|i| f64::from(i) / 10.0).collect();
    let small = grid(3, 32, &temperatures, 0.5, &long);
    let evaluations = (0..8).map(|i| (format!("{i} {long}"), small.clone())).collect();
    let all = page(&Sources { evaluations, runs: vec![] }).unwrap().len();
    assert!(all < MAX_BYTES, "{all}");
    // Long runs.
    let of = |i: usize| run(&format!("{i} {long}"), 4000, 5, &long);
    let runs = page(&Sources { evaluations: vec![], runs: (0..8).map(of).collect() }).unwrap().len();
    assert!(runs < MAX_BYTES, "{runs}");
    let one = page(&Sources { evaluations: vec![], runs: vec![run("one", 60_000, 2, "")] }).unwrap().len();
    assert!(one < MAX_BYTES / 2, "{one}");
}

#[test]
fn a_page_of_nothing_is_refused() {
    assert_eq!(page(&Sources::default()), Err(PageError::Nothing));
    let empty = Sources {
        evaluations: vec![],
        runs: vec![Run { name: "r".into(), config: "x".into(), ..Run::default() }],
    };
    assert_eq!(page(&empty), Err(PageError::Nothing));
    let one = ("a".to_owned(), grid(2, 2, &[1.0], 0.5, ""));
    let nine = Sources { evaluations: vec![one; 9], runs: vec![] };
    assert_eq!(page(&nine), Err(PageError::TooMany { count: 9 }));
}

/// Places of a path's points: every number pair behind M or L.
fn places(path: &str) -> Vec<(f64, f64)> {
    let pairs = path.split(['M', 'L', 'z']).filter(|part| !part.is_empty());
    let pair = |part: &str| {
        let (x, y) = part.split_once(' ').unwrap();
        (x.parse().unwrap(), y.parse().unwrap())
    };
    pairs.map(pair).collect()
}

/// The places of an axis' numbers: by their value the coordinate.
fn ticks(svg: Node, coordinate: &str, anchor: &str) -> Vec<(f64, f64)> {
    let labels = named(svg, "text").filter(|text| text.attribute("text-anchor") == Some(anchor));
    labels
        .filter_map(|text| {
            let place: f64 = text.attribute(coordinate)?.parse().ok()?;
            Some((words(text).parse().ok()?, place))
        })
        .collect()
}

/// Lines lie where their numbers are, by the plot's own axes.
#[test]
fn lines_lie_where_their_numbers_are() {
    let grid = grid(40, 32, &[1.0], 0.5, "");
    let report = grid.reports[0].clone();
    let text = page(&Sources { evaluations: vec![("base".into(), grid)], runs: vec![] }).unwrap();
    let document = parse(&text);
    let figure = named(document.root_element(), "figure")
        .find(|f| f.attribute("aria-labelledby") == Some("pass-0"))
        .unwrap();
    let svg = named(figure, "svg").find(|svg| svg.attribute("role").is_some()).unwrap();
    let (xs, ys) = (ticks(svg, "x", "middle"), ticks(svg, "y", "end"));
    assert_eq!(xs.iter().map(|(n, _)| *n as usize).collect::<Vec<_>>(), report.ns);
    // Straight through two of them.
    let through = |t: &[(f64, f64)], value: f64| {
        let ((a, pa), (b, pb)) = (t[0], t[t.len() - 1]);
        pa + (value - a) / (b - a) * (pb - pa)
    };
    let at = |class: &str| {
        let paths = named(svg, "path").find(|path| path.attribute("class") == Some(class)).unwrap();
        places(paths.attribute("d").unwrap())
    };
    let (line, band) = (at("c0"), at("band c0"));
    assert_eq!(line.len(), report.ns.len());
    assert_eq!(band.len(), 2 * report.ns.len());
    for (i, estimate) in report.figures.pass_at_n.iter().enumerate() {
        assert!((line[i].0 - xs[i].1).abs() < 0.2);
        let close = |place: f64, value: f64| (place - (through(&ys, value) - 4.0)).abs() < 0.3;
        assert!(close(line[i].1, estimate.mean), "{:?} {estimate:?} {ys:?}", line[i]);
        let [low, high] = estimate.ci95.unwrap();
        assert!(close(band[i].1, high) && close(band[band.len() - 1 - i].1, low));
    }
    // And so they stand in the table.
    let table = words(named(figure, "table").next().unwrap());
    for estimate in &report.figures.pass_at_n {
        assert!(table.contains(&format!("{:.3} [", estimate.mean)), "{estimate:?}: {table}");
    }
}

#[test]
fn steps_without_a_figure_have_no_point() {
    let lines = [
        serde_json::json!({"step": 1, "loss": 0.5, "kl": null, "token_entropy": 0.1}),
        serde_json::json!({"step": 2, "loss": null, "verifier_failures": {"a": 2, "b": 3}}),
        serde_json::json!({"step": 3, "loss": 0.25}),
    ];
    assert_eq!(Step::of(&serde_json::json!({"loss": 1})), None);
    let steps = lines.iter().map(|line| Step::of(line).unwrap()).collect();
    let run = Run { name: "r".into(), steps, ..Run::default() };
    let text = page(&Sources { evaluations: vec![], runs: vec![run] }).unwrap();
    let document = parse(&text);
    let titles: Vec<String> =
        named(document.root_element(), "figure").map(|f| words(named(f, "h4").next().unwrap())).collect();
    assert_eq!(titles, ["Entropy", "Loss", "Responses that could not be judged"]);
    let loss = named(document.root_element(), "figure").nth(1).unwrap();
    let rows: Vec<String> = named(named(loss, "tbody").next().unwrap(), "tr").map(words).collect();
    assert_eq!(rows, ["10.500", "30.250"]);
}

/// The figures that a page draws are those that runs write.
#[test]
fn the_page_knows_the_keys_of_metrics() {
    let known = serde_json::to_value(bon_engine::train::metrics::StepMetrics {
        kl: Some(0.5),
        step: 1,
        ..Default::default()
    })
    .unwrap();
    let run = |line: &serde_json::Value| Run {
        name: "r".into(),
        n: Some(2),
        steps: vec![Step::of(line).unwrap()],
        ..Run::default()
    };
    let figures = |run: Run| {
        page(&Sources { evaluations: vec![], runs: vec![run] }).unwrap().matches("<figure").count()
    };
    assert_eq!(figures(run(&known)), 16, "all groups have a figure");
    let legend = |run: Run| {
        page(&Sources { evaluations: vec![], runs: vec![run] }).unwrap().matches("<li><svg").count()
    };
    assert_eq!(legend(run(&known)), 2 + 2 + 2 + 2 + 4 + 4, "all lines are there");
}

/// Of the style sheet, the variables of each theme.
fn themes() -> [BTreeMap<String, [f64; 3]>; 2] {
    let css = std::fs::read_to_string(crate::places::checkout().join("src/page/style.css")).unwrap();
    let variables = |block: &str| -> BTreeMap<String, [f64; 3]> {
        let declared =
            block.split(['{', ';', '}']).filter_map(|d| d.trim().strip_prefix("--")?.split_once(": #"));
        let colour =
            |hex: &str| [0, 2, 4].map(|i| f64::from(u8::from_str_radix(&hex[i..i + 2], 16).unwrap()) / 255.0);
        declared.map(|(name, hex)| (name.to_owned(), colour(hex))).collect()
    };
    let (light, rest) = css.split_once("@media (prefers-color-scheme: dark)").unwrap();
    let dark = &rest[..rest.find("* { box-sizing").unwrap()];
    [variables(light), variables(dark)]
}

fn linear(colour: [f64; 3]) -> [f64; 3] {
    colour.map(|c| if c <= 0.04045 { c / 12.92 } else { ((c + 0.055) / 1.055).powf(2.4) })
}

/// WCAG's contrast ratio.
fn contrast(a: [f64; 3], b: [f64; 3]) -> f64 {
    let luminance = |c: [f64; 3]| {
        let [r, g, b] = linear(c);
        0.2126 * r + 0.7152 * g + 0.0722 * b
    };
    let (a, b) = (luminance(a) + 0.05, luminance(b) + 0.05);
    a.max(b) / a.min(b)
}

/// Colours as they are seen without red or green cones (Machado et al. 2009, severity 1), in CIELAB.
fn seen(colour: [f64; 3], kind: usize) -> [f64; 3] {
    const KINDS: [[[f64; 3]; 3]; 3] = [
        [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]],
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    ];
    let dot = |row: [f64; 3], c: [f64; 3]| row.iter().zip(c).map(|(a, b)| a * b).sum::<f64>();
    let rgb = KINDS[kind].map(|row| dot(row, linear(colour)).clamp(0.0, 1.0));
    let xyz = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
        .map(|row| dot(row, rgb));
    let [x, y, z] = [xyz[0] / 0.9505, xyz[1], xyz[2] / 1.089]
        .map(|t| if t > 0.008856 { t.cbrt() } else { 7.787 * t + 16.0 / 116.0 });
    [116.0 * y - 16.0, 500.0 * (x - y), 200.0 * (y - z)]
}

#[test]
fn colours_are_legible_in_both_themes_and_without_red_or_green() {
    for (theme, colours) in ["light", "dark"].into_iter().zip(themes()) {
        for background in ["paper", "raised"] {
            for text in ["ink", "faint", "link", "good", "bad"] {
                let ratio = contrast(colours[text], colours[background]);
                assert!(ratio >= 4.5, "{theme}: {text} on {background} has {ratio:.2}");
            }
        }
        let series: Vec<[f64; 3]> = (0..6).map(|i| colours[&format!("c{i}")]).collect();
        for (i, a) in series.iter().enumerate() {
            let ratio = contrast(*a, colours["paper"]);
            assert!(ratio >= 3.0, "{theme}: c{i} on paper has {ratio:.2}");
            for (j, b) in series.iter().enumerate().skip(i + 1) {
                for kind in 0..3 {
                    let (a, b) = (seen(*a, kind), seen(*b, kind));
                    let distance = a.iter().zip(b).map(|(a, b)| (a - b) * (a - b)).sum::<f64>().sqrt();
                    // A difference of 2.3 can just be seen.
                    assert!(distance > 12.0, "{theme}, kind {kind}: c{i} and c{j} are {distance:.1} apart");
                }
            }
        }
    }
}

/// Lines can be told apart without colour.
#[test]
fn no_two_lines_of_a_plot_are_drawn_alike() {
    let temperatures: Vec<f64> = (1..=8).map(|i| f64::from(i) / 4.0).collect();
    let grid: Grid = grid(6, 8, &temperatures, 0.5, "");
    let text = page(&Sources { evaluations: vec![("g".into(), grid)], runs: vec![] }).unwrap();
    let document = parse(&text);
    let mut seen = 0;
    for legend in named(document.root_element(), "ul").filter(|ul| ul.attribute("class") == Some("legend")) {
        let items: Vec<Node> = named(legend, "li").collect();
        let drawn = |item: &Node| -> Vec<String> {
            let attributes = ["stroke-dasharray", "d"];
            named(*item, "path")
                .flat_map(|p| attributes.map(|a| p.attribute(a).unwrap_or("").to_owned()))
                .collect()
        };
        let shapes: BTreeSet<Vec<String>> = items.iter().map(drawn).collect();
        assert_eq!(shapes.len(), items.len());
        seen = seen.max(items.len());
    }
    assert_eq!(seen, 8);
}
