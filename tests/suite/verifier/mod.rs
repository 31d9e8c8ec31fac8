//! The verifiers: tables of what each kind accepts, and hostile text.

mod boxed;
mod command;
mod pool;

use std::time::{Duration, Instant};

use bon_engine::verifier::{BuildError, Failure, Request, Verifier, VerifierConfig, build};
use proptest::prelude::*;
use serde_json::{Map, Value, json};

use boxed::boxed;

fn config(value: Value) -> VerifierConfig {
    serde_json::from_value(value).unwrap()
}

fn verifier(value: Value) -> Box<dyn Verifier> {
    build(&config(value)).unwrap()
}

fn score(verifier: &dyn Verifier, response: &str, answer: &str) -> Result<f64, Failure> {
    verifier.score(&Request { prompt: "?", response, answer, task: &Map::new() })
}

/// Every row is (response, answer, score).
#[track_caller]
fn check(verifier: &dyn Verifier, rows: &[(&str, &str, f64)]) {
    let wrong: Vec<_> = rows
        .iter()
        .filter(|(response, answer, wanted)| score(verifier, response, answer) != Ok(*wanted))
        .collect();
    assert!(wrong.is_empty(), "judged otherwise: {wrong:#?}");
}

/// Every row is (response, what is read from it).
#[track_caller]
fn check_extract(verifier: &dyn Verifier, rows: &[(&str, Option<&str>)]) {
    for (response, wanted) in rows {
        assert_eq!(verifier.extract(response).as_deref(), *wanted, "read from {response:?}");
    }
}

// ------------------------------------------------------------------------------------------------------ built-in

#[test]
fn exact() {
    let plain = verifier(json!({"kind": "exact"}));
    check(
        &*plain,
        &[(" Paris\n", "Paris", 1.0), ("paris", "Paris", 0.0), ("", "Paris", 0.0), ("5", "5.0", 0.0)],
    );
    check_extract(&*plain, &[(" Paris\n", Some("Paris")), (" \n", None)]);
    let folded = verifier(json!({"kind": "exact", "case_insensitive": true}));
    check(&*folded, &[("ÉCOLE", " école ", 1.0), ("Paris.", "paris", 0.0)]);
    check_extract(&*folded, &[("Paris", Some("paris"))]);
}

#[test]
fn numeric_picks_the_last_number() {
    let numeric = verifier(json!({"kind": "numeric"}));
    check_extract(
        &*numeric,
        &[
            ("", None),
            ("no number - at all.", None),
            ("So 3 + 4 = 7.", Some("7")),
            ("#### 18", Some("18")),
            ("The answer is **72**.", Some("72")),
            ("5 apples and -3 pears", Some("-3")),
            // Signs.
            ("17-5", Some("5")),
            ("17 - 5", Some("5")),
            ("17 -5", Some("5")),
            ("(2+3) -5", Some("5")),
            ("(2+3)-5", Some("5")),
            ("x-5", Some("5")),
            ("50%-5", Some("5")),
            ("pages 3-5", Some("5")),
            ("pages 3–5", Some("5")),
            ("it is -5", Some("-5")),
            ("it is −5 °C", Some("-5")),
            ("17\n-5", Some("-5")),
            ("= -5", Some("-5")),
            ("(-5)", Some("-5")),
            ("=-5", Some("-5")),
            ("-5", Some("-5")),
            ("-0", Some("0")),
            ("+5", Some("5")),
            // Money, separators, units.
            ("-$5", Some("-5")),
            ("$-5", Some("-5")),
            (r"\$1,234.50.", Some("1234.5")),
            ("1,234,567", Some("1234567")),
            ("a list: 1,2,3", Some("3")),
            ("1,2345", Some("2345")),
            ("1234,567", Some("567")),
            ("0,100", Some("100")),
            ("12,34", Some("34")),
            ("50%", Some("50")),
            ("5kg", Some("5")),
            ("Rs.100", Some("100")),
            ("the 3rd", Some("3")),
            // Decimals and exponents.
            (".5", Some("0.5")),
            ("0.50", Some("0.5")),
            ("5.", Some("5")),
            ("version 1.2.3", Some("3")),
            ("2.5e3", Some("2500")),
            ("2.5E-1", Some("0.25")),
            ("3e", Some("3")),
            ("3em", Some("3")),
            ("2e5x", Some("2")),
            ("1e999", None),
            // Fractions.
            ("3/4", Some("0.75")),
            ("-3/4", Some("-0.75")),
            ("1 1/2 cups", Some("1.5")),
            ("-1 1/2", Some("-1.5")),
            ("1  1/2", Some("0.5")),
            ("2 3/2", Some("1.5")),
            ("12/25/2024", Some("2024")),
            ("3/0", Some("0")),
            ("10 / 2", Some("2")),
            // Parts of names.
            ("4 H2O", Some("4")),
            ("12 m2", Some("12")),
            ("12 cm^2", Some("12")),
            ("12 cm^{2}", Some("12")),
            ("12 s^-2", Some("12")),
            ("7 of x_1", Some("7")),
            ("答案是5。", Some("5")),
        ],
    );
}

#[test]
fn numeric_keeps_signs_across_spaces_and_currencies() {
    check_extract(
        &*verifier(json!({"kind": "numeric"})),
        &[
            ("Therefore x = - 5.", Some("-5")),
            ("It is - 1/2", Some("-0.5")),
            (r"\boxed{- 5}", Some("-5")),
            (r"$x = -\frac{1}{2}$", Some("-0.5")),
            (r"\boxed{\frac{-3}{4}}", Some("-0.75")),
            ("a loss of -€5", Some("-5")),
            ("-US$5", Some("-5")),
            ("- US$ 5", Some("-5")),
            (r"-\$ 5", Some("-5")),
            ("-£1,000", Some("-1000")),
            ("is - $5", Some("-5")),
            ("-USD 5", Some("-5")),
            ("-Rs. 5", Some("-5")),
            ("USD5", Some("5")),
            ("#### - 5", Some("-5")),
            ("**Answer:** - 5", Some("-5")),
            ("$- 5$", Some("-5")),
            ("so $x$ is $ - 5$", Some("-5")),
            ("(- 5)", Some("-5")),
            ("3, - 5", Some("-5")),
            ("3 * - 5", Some("-5")),
            ("- 5", Some("-5")),
            ("So:\n- 5", Some("-5")),
            ("−\u{a0}5", Some("-5")),
            ("minus 5", Some("-5")),
            ("it is negative 5 degrees", Some("-5")),
            ("- 1 1/2", Some("-1.5")),
            // Nothing of this is a sign.
            ("17 - 5 = 12", Some("12")),
            ("17 - 5", Some("5")),
            ("17 - $5", Some("5")),
            ("$17$ - $5$", Some("5")),
            ("17 minus 5", Some("5")),
            ("x - 5", Some("5")),
            ("(2+3) - 5", Some("5")),
            ("50% - 5", Some("5")),
            ("x^{2} - 5", Some("5")),
            ("Total - 5", Some("5")),
            ("non-negative 5", Some("5")),
            ("- 5 apples\n- 3 pears", Some("3")),
            ("pages 3 – 5", Some("5")),
        ],
    );
    check(
        &*verifier(json!({"kind": "numeric"})),
        &[("Therefore x = - 5.", "-5", 1.0), ("Therefore x = - 5.", "5", 0.0), ("x = 5", "x = - 5", 0.0)],
    );
}

#[test]
fn numeric_reads_the_usual_spellings_of_a_number() {
    check_extract(
        &*verifier(json!({"kind": "numeric"})),
        &[
            ("1{,}234", Some("1234")),
            (r"1,\!234,\!567", Some("1234567")),
            (r"10\,000", Some("10000")),
            ("10\u{202f}000", Some("10000")),
            ("1,234\u{2009}567", Some("567")),
            (r"\frac{3}{4}", Some("0.75")),
            (r"2\frac{1}{2}", Some("2.5")),
            (r"2 \frac{1}{2}", Some("2.5")),
            (r"-2\dfrac{1}{2}", Some("-2.5")),
            (r"\frac{x}{4}", Some("4")),
            ("1½", Some("1.5")),
            ("17-½", Some("0.5")),
            ("½3", Some("3")),
            ("n.½", Some("0.5")),
            ("a½", Some("0.5")),
            ("１２．５", Some("12.5")),
            ("٤٢", Some("42")),
            ("𝟒𝟐", Some("42")),
            ("5\u{200b}6", Some("6")),
            ("12 m²", Some("12")),
            ("12 cm³", Some("12")),
            ("log₂8", Some("8")),
            ("12345678901234567891", Some("12345678901234567891")),
            ("1e308", Some(&("1".to_owned() + &"0".repeat(308)))),
            (&format!("{}1", "9".repeat(400)), None),
        ],
    );
}

#[test]
fn numeric_compares_within_tolerance() {
    check(
        &*verifier(json!({"kind": "numeric"})),
        &[
            ("so 18.", "18", 1.0),
            ("so 18 or 19", "18", 0.0),
            ("18.0", "18", 1.0),
            ("$1,800", "She pays 3 * 600 = 1800.\n#### 1,800", 1.0),
            ("0.333333333", "1/3", 0.0),
            ("1/3", "0.3333333333333333", 1.0),
            ("1000000001", "1000000000", 0.0),
            ("12345678901234567891", "12345678901234567890", 0.0),
            ("12345678901234567890.0", "12,345,678,901,234,567,890", 1.0),
            ("0.1234567890123456789", "0.1234567890123456788", 1.0),
            ("0.30000000000000004", "0.3", 1.0),
            ("0.3000000001", "0.3", 0.0),
            ("-5", "5", 0.0),
            ("", "0", 0.0),
        ],
    );
    check(
        &*verifier(json!({"kind": "numeric", "pick": "first", "relative_tolerance": 0.01})),
        &[("99 bottles, not 7", "100", 1.0), ("98.9", "100", 0.0), ("-99.5", "-100", 1.0)],
    );
    check(
        &*verifier(json!({"kind": "numeric", "relative_tolerance": 0})),
        &[
            ("0.30000000000000004", "0.3", 0.0),
            ("0.30", "3/10", 1.0),
            ("0.1234567890123456789", "0.1234567890123456788", 0.0),
        ],
    );
    check(
        &*verifier(json!({"kind": "numeric", "absolute_tolerance": 0.5, "relative_tolerance": 0})),
        &[("7.5", "7", 1.0), ("7.6", "7", 0.0)],
    );
}

#[test]
fn an_answer_that_cannot_be_compared_is_a_failure() {
    let numeric = score(&*verifier(json!({"kind": "numeric"})), "5", "five");
    assert!(matches!(&numeric, Err(Failure::Answer { answer, .. }) if answer == "five"), "{numeric:?}");
    let boxed = score(&*verifier(json!({"kind": "boxed"})), r"\boxed{5}", " $ $ ");
    assert_eq!(boxed.unwrap_err().kind(), "answer");
}

#[test]
fn regex() {
    let strict = verifier(json!({"kind": "regex", "pattern": r"#### *(-?[0-9.,]+)"}));
    check(&*strict, &[("#### 7\n#### 18", "18", 1.0), ("#### 7\n#### 18", "7", 0.0), ("18", "18", 0.0)]);
    let first = verifier(json!({"kind": "regex", "pattern": r"#### *(-?[0-9.,]+)", "pick": "first"}));
    check(&*first, &[("#### 7\n#### 18", "7", 1.0)]);
    let whole = verifier(json!({"kind": "regex", "pattern": r"\b[A-D]\b"}));
    check(&*whole, &[("A? No, C.", " C ", 1.0)]);
    let zero = verifier(json!({"kind": "regex", "pattern": "is (.*)", "group": 0}));
    check(&*zero, &[("it is so", "is so", 1.0)]);
    // A match in which the group took no part has nothing to compare.
    let optional = verifier(json!({"kind": "regex", "pattern": r"yes(!)?"}));
    check(&*optional, &[("yes! yes", "!", 1.0), ("yes", "!", 0.0)]);
    check_extract(&*optional, &[("yes", None), ("yes!", Some("!"))]);
}

#[test]
fn boxed_reads_the_last_result_of_an_answer() {
    let answer = "7 eggs a day.\n#### 7\nNo, 18.\n#### 18";
    check(&*boxed(false), &[(r"\boxed{18}", answer, 1.0), (r"\boxed{7}", answer, 0.0)]);
}

#[test]
fn regex_reads_the_answer_as_it_reads_the_response() {
    const SOLUTION: &str = "She sold 48/2 = <<48/2=24>>24 clips in May.\n#### 72";
    let strict = verifier(json!({"kind": "regex", "pattern": r"#### (-?[0-9.,]+)"}));
    check(
        &*strict,
        &[
            ("In total it is 72.\n#### 72", SOLUTION, 1.0),
            ("In total it is 72.\n#### 24", SOLUTION, 0.0),
            ("In total it is 72.", SOLUTION, 0.0),
            ("#### 72", "72", 1.0),
            // Numbers are equal as numbers: a full stop, separators and zeros do not count.
            ("#### 72.", "72", 1.0),
            ("#### 72.00", SOLUTION, 1.0),
            ("#### 1,200", "1200", 1.0),
            ("#### 1200", "We have 1,200.\n#### 1,200", 1.0),
            ("#### 1,200.50", "1200.5", 1.0),
            ("#### -3", "- 3 is it.\n#### -3", 1.0),
            ("#### 3", "#### -3", 0.0),
            ("#### 1,2", "12", 0.0),
            ("#### 12345678901234567890", "12345678901234567891", 0.0),
        ],
    );
    check_extract(&*strict, &[("#### 1,200.", Some("1200")), ("#### 007", Some("007"))]);

    let letter = verifier(json!({"kind": "regex", "pattern": r"answer is \(?([A-D])\)?"}));
    check(&*letter, &[("The answer is (B).", "B", 1.0), ("The answer is B.", "so the answer is (B)", 1.0)]);
    // What the pattern finds in the answer, and the answer itself where the group could capture all of it.
    let rest = verifier(json!({"kind": "regex", "pattern": "is (.*)"}));
    check(&*rest, &[("it is what is right", "what is right", 1.0), ("it is so", "the sum is so", 1.0)]);
    let words = verifier(json!({"kind": "regex", "pattern": "<a>(.*?)</a>", "pick": "first"}));
    check(&*words, &[("<a>1.10</a>", "1.10", 1.0), ("<a>v1.10</a>", "v1.1", 0.0), ("<a>007</a>", "7", 0.0)]);
}

/// An answer that no match of the pattern could ever equal says so, instead of scoring 0 for every response.
#[test]
fn regex_refuses_an_answer_that_it_can_never_capture() {
    for (pattern, answer) in [
        (r"#### (-?[0-9.,]+)", "seventy-two"),
        (r"#### (-?[0-9.,]+)", "It costs\n#### $72"),
        (r"yes(!)?", ""),
        (r"\b[A-D]\b", "b"),
        (r"is (?:(no)|(yes))[.]", "maybe"),
        (r"x = ((\d)+)", "five"),
    ] {
        let failure = score(&*verifier(json!({"kind": "regex", "pattern": pattern})), "#### 72", answer);
        let message = failure.expect_err(pattern).to_string();
        assert!(
            message.contains("verifier.pattern") && message.contains(&format!("{answer:?}")),
            "{message}"
        );
    }
}

#[test]
fn bad_configurations_are_refused() {
    let refusal = |value| build(&config(value)).err().expect("a refusal");
    let pattern = refusal(json!({"kind": "regex", "pattern": "("}));
    assert!(
        matches!(&pattern, BuildError::Pattern(_)) && pattern.to_string().contains("unclosed group"),
        "{pattern}"
    );
    let group = refusal(json!({"kind": "regex", "pattern": "(a)", "group": 2}));
    assert!(matches!(group, BuildError::Group { group: 2, last: 1 }), "{group}");
    let tolerance = refusal(json!({"kind": "numeric", "absolute_tolerance": -1.0}));
    assert!(tolerance.to_string().contains("absolute_tolerance"), "{tolerance}");
    assert!(matches!(refusal(json!({"kind": "command", "program": []})), BuildError::NoProgram));
    assert!(matches!(refusal(json!({"kind": "command", "program": [""]})), BuildError::NoProgram));
    let missing = refusal(json!({"kind": "command", "program": ["/no/such/program"]}));
    assert!(
        matches!(&missing, BuildError::Start { program, .. } if program == "/no/such/program"),
        "{missing}"
    );
    for (field, value) in
        [("timeout_seconds", json!(0)), ("timeout_seconds", json!(1e300)), ("workers", json!(0))]
    {
        let mut table = json!({"kind": "command", "program": ["cat"]});
        table[field] = value;
        let error = refusal(table);
        assert!(matches!(error, BuildError::Range { name, .. } if name == field), "{error}");
    }
    for (table, named) in [
        (json!({"kind": "numeric", "tolerance": 1}), "tolerance"),
        (json!({"kind": "boxed", "pick": "last"}), "pick"),
        (json!({"kind": "magic"}), "magic"),
        (json!({"kind": "regex"}), "pattern"),
        (json!({"kind": "program", "program": ["python3"]}), "program"),
        (json!({"kind": "program", "code": "whole"}), "whole"),
    ] {
        let error = serde_json::from_value::<VerifierConfig>(table).unwrap_err().to_string();
        assert!(error.contains(named), "{error}");
    }
}

#[test]
fn configurations_survive_toml() {
    for table in [
        json!({"kind": "exact", "case_insensitive": true}),
        json!({"kind": "numeric", "pick": "first"}),
        json!({"kind": "boxed"}),
        json!({"kind": "regex", "pattern": "a"}),
        json!({"kind": "command", "program": ["a", "b"], "timeout_seconds": 2.5}),
        json!({"kind": "program"}),
        json!({"kind": "program", "code": "fenced", "isolation": "required", "interpreter": ["python3.12"]}),
    ] {
        let config = config(table);
        assert_eq!(toml::from_str::<VerifierConfig>(&toml::to_string(&config).unwrap()).unwrap(), config);
    }
}

// -------------------------------------------------------------------------------------------------- hostile text

fn built_in() -> Vec<Box<dyn Verifier>> {
    ["exact", "numeric", "boxed"]
        .into_iter()
        .map(|kind| verifier(json!({"kind": kind})))
        .chain([boxed(true), verifier(json!({"kind": "regex", "pattern": "(?:is|£)?(.+?)[.]"}))])
        .collect()
}

/// LaTeX with the pieces that the verifiers treat specially, more often broken than not.
fn latex() -> impl Strategy<Value = String> {
    let piece = prop_oneof![
        prop::sample::select(vec![
            r"\frac",
            r"\sqrt",
            r"\boxed",
            r"\text",
            r"\left",
            r"\right",
            r"\{",
            r"\}",
            r"\!",
            r"\,",
            r"\cdot",
            r"\pi",
            r"\circ",
            r"\in",
            "{",
            "}",
            "(",
            ")",
            "[",
            "]",
            "^",
            "_",
            ",",
            ".",
            "/",
            "-",
            "=",
            "*",
            " ",
            "\\",
            "$",
            "%",
            "cm",
            "and",
            "sqrt",
            "pi",
            "1",
            "23",
            "456",
            "x",
            "é",
            "∞",
            r"\begin{pmatrix}",
            r"\end{pmatrix}",
            r"\\",
            "&",
            r"\over",
            r"0.\overline{3}",
            "e5",
            "½",
            "²",
            "７",
            "±",
            "√",
            "∛",
            "⊕",
            "⟦",
            "⟧",
            "<",
            "≥",
            "∪",
            "!",
            "^{9^9}",
            r"\text{ million}",
            "–",
            "- ",
            "-€",
            "minus ",
            "#### ",
        ])
        .prop_map(str::to_owned),
        "\\PC",
    ];
    prop::collection::vec(piece, 0..40).prop_map(|pieces| pieces.concat())
}

proptest! {
    #[test]
    fn no_text_makes_a_verifier_panic(a in prop_oneof!["\\PC*", latex()], b in prop_oneof![".*", latex()]) {
        for verifier in built_in() {
            let verdict = score(&*verifier, &a, &b);
            prop_assert!(
                matches!(verdict, Ok(s) if s == 0.0 || s == 1.0) || matches!(verdict, Err(Failure::Answer { .. })),
                "{verdict:?}"
            );
            verifier.extract(&format!("\\boxed{{{a}}}"));
        }
    }

    /// Whatever is read from a box scores 1 against the same text as answer, and votes are equal exactly where
    /// scores are.
    #[test]
    fn boxed_agrees_with_itself(a in latex(), b in latex()) {
        let boxed = verifier(json!({"kind": "boxed"}));
        let (box_a, box_b) = (format!("\\boxed{{{a}}}"), format!("\\boxed{{{b}}}"));
        if let (Some(a), Some(b)) = (boxed.extract(&box_a), boxed.extract(&box_b)) {
            prop_assert_eq!(score(&*boxed, &box_a, &box_a), Ok(1.0));
            prop_assert_eq!(score(&*boxed, &box_a, &box_b), Ok(f64::from(a == b)));
        }
    }

    #[test]
    fn numeric_reads_what_display_writes(x in -1e15..1e15f64) {
        let numeric = verifier(json!({"kind": "numeric"}));
        prop_assert_eq!(numeric.extract(&format!("it is {x}.")), Some(x.to_string()));
        prop_assert_eq!(numeric.extract(&format!("it is {x:e}.")), Some(x.to_string()));
    }
}

#[test]
fn long_hostile_text_stalls_no_verifier() {
    let pieces = [
        "{",
        "}",
        "(",
        "[",
        "\\",
        "-",
        "+",
        "^",
        "_",
        ",",
        ".",
        "1",
        "1,",
        "1,234",
        "1 ",
        " ",
        "1/",
        "1/2 ",
        "e",
        "1e",
        "$",
        "\\frac",
        "\\frac{",
        "\\frac1",
        "\\sqrt[",
        "\\sqrt{",
        "\\boxed",
        "\\boxed{",
        "\\{",
        "((1)",
        "x=",
        "x=1,",
        "and ",
        "\\text{",
        "1 -",
        "1. ",
        "1cm^",
        "*",
        "2^",
        "pi",
        "sqrt",
        "é",
        "½",
        "²",
        "- 1\n",
        "1\n",
        "1 - $",
        "minus ",
        "±",
        "1±",
        "1=",
        "1+",
        "x+",
        "(x)",
        "1/9999999999+",
        "9999999999*",
        "1<",
        "∪",
        "\\sqrt2+",
        "\\text{ cm}",
        "1cm ",
        "1%%x",
        "%",
        "1cm^1",
        "1\\%",
        "\\begin{a}",
        "\\begin{a}1&2\\\\\\end{a}",
        "\\over ",
        "0.\\overline{3}",
        "1e5",
        "9!",
        "#### 1",
        "\\$",
        "]1,2[",
        "[",
        "⟦",
        "⊕1/2",
        "\\frac12",
    ];
    for piece in pieces {
        let long = piece.repeat(50_000 / piece.len());
        for verifier in built_in() {
            // The longest answers that `boxed` takes apart, and that it works out.
            let part = |bytes: usize| format!("\\boxed{{{}}}", piece.repeat(bytes / piece.len()));
            let boxes = [format!("\\boxed{{{long}}}"), format!("\\boxed{{{long}"), part(4096), part(500)];
            for text in boxes.iter().chain([&long]) {
                let begun = Instant::now();
                let _ = score(&*verifier, text, if text.len() < long.len() { text } else { &long });
                assert!(begun.elapsed() < Duration::from_secs(5), "{piece:?} took {:?}", begun.elapsed());
            }
        }
    }
}
