//! The verifiers: tables of what each kind accepts, hostile text, and hostile programs.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bon_engine::verifier::pool::{Job, Pool, Verdicts};
use bon_engine::verifier::{BuildError, Failure, Request, Verifier, VerifierConfig, build};
use proptest::prelude::*;
use serde_json::{Map, Value, json};

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

/// (one way to write it, another) for answers that are the same.
const SAME: &[(&str, &str)] = &[
    ("5", "5"),
    (" 5 . ", "5"),
    ("5.0", "5"),
    (".5", "0.5"),
    ("0.50", r"\frac12"),
    ("-.5", r"-\frac{1}{2}"),
    (r"\dfrac{3}{4}", r"\tfrac34"),
    ("3/4", r"\frac{3}{4}"),
    (r"-\frac{3}{4}", r"\frac{-3}{4}"),
    (r"\frac1{72}", r"\frac{1}{72}"),
    (r"\frac{\pi}{2}", r"\pi/2"),
    (r"2\frac{1}{2}", "2.5"),
    ("2 1/2", r"\frac52"),
    (r"-1\frac12", "-1.5"),
    ("1,234", "1234"),
    ("1{,}234", "1234"),
    (r"1,\!234,\!567", "1234567"),
    ("10 000", "10000"),
    (r"10\,000.5", "10000.5"),
    (r"\$5", "5"),
    (r"\$1,000", "1000"),
    (r"50\%", "50"),
    ("50%", "50"),
    (r"90^\circ", "90"),
    (r"90^{\circ}", "90"),
    ("90°", "90"),
    (r"5\text{ cm}", "5"),
    (r"5\text{ cm}^2", "5"),
    (r"5\ \mathrm{km/h}", "5"),
    ("5 cm", "5"),
    ("12 square inches", "12"),
    ("5 miles per hour", "5"),
    ("x = 5", "5"),
    ("f(x)=x^2", "x^{2}"),
    (r"x \in [1, 2]", "[1,2]"),
    (r"\text{Tuesday}", "Tuesday"),
    (r"\text{No solution}", "no solution"),
    (r"x = \pm\sqrt{3}", r"\sqrt3, -\sqrt3"),
    (r"\textbf{(C)}", "C"),
    ("(C)", r"\text{C}"),
    (r"\sqrt2", r"\sqrt{2}"),
    ("sqrt(2)", r"\sqrt{2}"),
    (r"3\sqrt{2}", r"3 \cdot \sqrt 2"),
    (r"\frac{\sqrt{3}}{2}", r"\sqrt3/2"),
    (r"\frac{1}{\sqrt{3}}", r"\frac{\sqrt{3}}{3}"),
    (r"3.2\times10^{6}", "3,200,000"),
    (r"\frac{x}{2}", "x/2"),
    (r"\frac{x+1}{2}", "(x+1)/2"),
    (r"x^{2}+1", "x^2 + 1"),
    ("x+.5", "x+0.5"),
    ("2*x", "2x"),
    (r"\left(1, \frac12\right)", "(1, 0.5)"),
    (r"(-\infty, 2]", r"\left(-\infty,2\right]"),
    (r"\{1, 2\}", r"\{2,1\}"),
    ("3, -3", "-3,3"),
    (r"x = 1 \text{ or } x = 2", "1, 2"),
    ("3 and 4", "3,4"),
    (r"\emptyset", r"\{\}"),
    (r"x \leq 3", r"x \le 3"),
    (r"\begin{pmatrix} 1 \\ \dfrac12 \end{pmatrix}", r"\begin{pmatrix}1\\\frac{1}{2}\end{pmatrix}"),
    (r"$\mathbf{7}$", "7"),
    (r"\displaystyle 7", "7"),
    ("12345678901234567890", "12,345,678,901,234,567,890"),
    // Words between numbers stay, and part them.
    (r"3\text{ feet }4\text{ inches}", r"3 \text{ feet } 4 \text{ inches}"),
    ("2 hours 15 minutes", r"2\text{ hours }15\text{ minutes}"),
    ("3, 5, 7", r"3\text{, }5\text{, }7"),
    (r"3, 4, \text{ and } 5", "3,4,5"),
    ("1, 2, or 3", r"1, 2\text{, or }3"),
    (r"12\text{:}30", "12:30"),
    // Units and what else says what is counted.
    (r"12\text{ cm}^2", "12"),
    (r"5\text{ km}/\text{h}", "5"),
    (r"5 \frac{\text{m}}{\text{s}^2}", "5"),
    (r"9.8\,\text{m/s}^{2}", "9.8"),
    ("60 km/h", "60"),
    (r"25^\circ\text{C}", "25"),
    ("25°C", "25"),
    ("12 cm²", "12"),
    (r"x = 5\text{ apples}", "5"),
    (r"(3\text{ cm}, 4\text{ cm})", "(3, 4)"),
    (r"\frac{60\text{ miles}}{7\text{ hours}}", r"\frac{60}{7}"),
    (r"US\$5", "5"),
    (r"-\$5", r"\$ {-5}"),
    ("- 5", "-5"),
    (r"\text{USD } 5", "5"),
    ("5 euros", "€5"),
    (r"5\text{ million}", "5,000,000"),
    (r"2.5 million dollars", "2500000"),
    (r"1.2\text{ billion people}", "1200000000"),
    // Entries are values.
    (r"\begin{pmatrix} 1/2 \\ 2 \end{pmatrix}", r"\begin{pmatrix} \frac{1}{2} \\ 2 \end{pmatrix}"),
    (r"\begin{pmatrix} 1/2 \\ 2 \end{pmatrix}", r"\begin{pmatrix} 0.5 \\ 2 \end{pmatrix}"),
    (r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}", r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \\ \end{pmatrix}"),
    (r"\begin{pmatrix} 1 & 2 \end{pmatrix}", r"\begin{bmatrix} 1.0 & 2 \end{bmatrix}"),
    (r"\left(\begin{array}{cc} 1 & 2 \end{array}\right)", r"\begin{pmatrix} 1 & 2 \end{pmatrix}"),
    (r"\begin{bmatrix} -\frac12 & 1{,}000 \end{bmatrix}", r"\begin{bmatrix} -0.5 & 1000 \end{bmatrix}"),
    (r"\begin{vmatrix} 0.5 \end{vmatrix}", r"\begin{vmatrix} 1/2 \end{vmatrix}"),
    (
        r"\begin{cases} 1/2 & x > 0 \\ 0 & x < 0 \end{cases}",
        r"\begin{cases} 0.5 & x>0 \\ 0 & x<0 \end{cases}",
    ),
    (r"\begin{aligned} x &= 5 \end{aligned}", "5"),
    (r"\{0.5, 1\}", r"\{1, \frac12, 1\}"),
    (r"\langle 0.5, 1 \rangle", r"\langle \frac12, 1\rangle"),
    (r"\left[\tfrac12, 1\right)", "[0.5, 1)"),
    (r"[0.5,1]\cup[2,3]", r"[2, 3] \cup [\frac12, 1]"),
    (r"x < \frac12", "x<0.5"),
    (r"0.5 > x", r"x < \frac{1}{2}"),
    ("1 <= x <= 2.0", r"1 \le x \leq 2"),
    (r"(1, (0.5, 2))", r"(1, (\frac12, 2))"),
    // Other spellings.
    (r"(-\infty, 5)\cup(7,\infty)", r"(-\infty,5) \cup (7, +\infty)"),
    (r"+\infty", r"\infty"),
    ("infinity", "∞"),
    ("+5", "5"),
    ("1e5", "100000"),
    ("1E5", "100,000"),
    ("1e-3", "0.001"),
    ("2.5e+2", "250"),
    (r"{1 \over 2}", "0.5"),
    (r"1 \over 2", r"\frac12"),
    (r"{x+1 \over 2}", r"\frac{x+1}{2}"),
    (r"5 \\", "5"),
    (r"5\newline", "5"),
    (r"\lbrack 0,1)", "[0,1)"),
    (r"[0, 1\rbrack", "[0,1]"),
    ("]0,1[", "(0,1)"),
    ("]0,1]", r"\left(0,1\right]"),
    ("(1;2)", "(1,2)"),
    ("½", "0.5"),
    ("1½", r"\frac32"),
    ("x²+1", "x^2+1"),
    ("x₁", "x_1"),
    ("１２", "12"),
    ("−5", "-5"),
    (r"0.\overline{3}", r"\frac13"),
    (r"0.1\overline{6}", "1/6"),
    (r"0.\bar{9}", "1"),
    ("x**2", "x^2"),
    ("5 != x", r"5 \neq x"),
    (r"x \not= 5", r"x \ne 5"),
    (r"\mathbb{R}", r"(-\infty, \infty)"),
    (r"\frac{1\pm\sqrt5}{2}", r"\frac{1+\sqrt5}{2}, \frac{1-\sqrt5}{2}"),
    (r"2+2=4", "4"),
    (r"\textcolor{red}{5}", "5"),
    (r"\underline{5}", "5"),
    (r"{\bf 5}", "5"),
    (r"\nicefrac{1}{2}", "0.5"),
    // Exact where they are exact.
    (r"\frac{1+\sqrt{2}}{3}", r"\frac{\sqrt2+1}{3}"),
    (r"\frac{\pi^2}{6}", r"\pi^2/6"),
    (r"1.2\times 10^{-3}", "0.0012"),
    ("0.10000000000000000000001", "0.100000000000000000000010"),
];

/// (an exercise, what it comes to): the same only to `evaluate`. The second is the same as itself to both.
const WORK: &[(&str, &str)] = &[
    (r"17 \times 23", "391"),
    (r"1\cdot2\cdot3\cdot4\cdot5", "120"),
    ("2+2", "4"),
    ("5+0", "5"),
    (r"\sqrt2+0", r"\sqrt2"),
    ("5^1", "5"),
    (r"5\cdot 1", "5"),
    (r"\frac{1}{\frac15}", "5"),
    (r"\frac{2\sqrt6}{4}", r"\frac{\sqrt6}{2}"),
    (r"\sqrt{\frac34}", r"\frac{\sqrt3}{2}"),
    ("5!", "120"),
    ("17*23", "391"),
    ("(2+3)(4+5)", "45"),
    ("5(3)", "15"),
    (r"\frac{6}{8}", "0.75"),
    (r"\frac{391}{17}", "23"),
    (r"6 \div 4", "1.5"),
    (r"\frac{0.5}{2}", "0.25"),
    (r"\frac{\frac12}{3}", r"\frac16"),
    (r"\frac{2+2}{5}", "0.8"),
    ("2^{10}", "1024"),
    ("2^10", "1024"),
    (r"2^{-1}", "0.5"),
    (r"25^{1/2}", "5"),
    (r"\sqrt{16}", "4"),
    (r"\sqrt{18}", r"3\sqrt{2}"),
    (r"\sqrt2\sqrt3", r"\sqrt6"),
    (r"\sqrt{9+16}", "5"),
    (r"\sqrt[3]{-8}", "-2"),
    (r"\frac{6}{\sqrt3}", r"2\sqrt3"),
    (r"(1+\sqrt2)(\sqrt2-1)", "1"),
    (r"\sqrt2+\sqrt2", r"2\sqrt2"),
    (r"\sqrt2+\sqrt8", r"3\sqrt2"),
    (r"\pi+2\pi", r"3\pi"),
    (r"12\times10^{3}", "12000"),
    ("-(-5)", "5"),
    ("--5", "5"),
    ("3*-5", "-15"),
    (r"x = 2\cdot 3", "6"),
    (r"(1, 1+1)", "(1, 2)"),
    (r"\{2\cdot 3\}", r"\{6\}"),
    (r"\begin{pmatrix} 1+1 \end{pmatrix}", r"\begin{pmatrix} 2 \end{pmatrix}"),
    (r"\pm\sqrt{4}", "2, -2"),
    (r"x < 1+1", "x < 2"),
    (r"1\frac24", "1.5"),
];

/// Pairs that are not the same.
const DIFFERENT: &[(&str, &str)] = &[
    ("5", "-5"),
    ("5", "6"),
    ("1,2", "12"),
    ("1 2", "12"),
    ("(1,234)", "1234"),
    ("(1,2)", "(2,1)"),
    ("(1,2)", "[1,2]"),
    ("(1,2)", "1,2"),
    (r"\{1,2\}", "(1,2)"),
    ("x=1,y=2", "x=2,y=1"),
    (r"1\frac12", r"\frac{11}{2}"),
    (r"2^{3}\frac12", r"8.5"),
    ("x^{12}", "x^{1}2"),
    ("2x", "2y"),
    ("A", "a"),
    (r"\sqrt{2}", "1.414"),
    (r"\frac{1}{3}", "0.333"),
    ("12345678901234567890", "12345678901234567891"),
    ("1010_2", "1010"),
    (r"3\pi", "9.42"),
    (r"\text{even}", "odd"),
    (r"x \le 3", "x < 3"),
    (r"\infty", r"-\infty"),
    ("AB", "ab"),
    (r"\pm 2", "2"),
    ("1/0", "2/0"),
    (r"\frac{0}{0}", r"\sqrt{-1}"),
    // What parts two numbers is dropped without joining them.
    (r"3\text{ feet }4\text{ inches}", "34"),
    (r"2\text{ h }30\text{ min}", "230"),
    (r"2\text{ hours }15\text{ minutes}", "215"),
    (r"3\text{ feet }4\text{ inches}", r"3\text{ meters }4\text{ centimeters}"),
    (r"12\text{:}30", "1230"),
    (r"5\text{ or possibly }7", "57"),
    (r"1\text{ to }2", "12"),
    (r"2\text{ R }5", "25"),
    (r"1\text{ mod }5", "15"),
    (r"3\text{, }5\text{, }7", "357"),
    (r"10\mathrm{cm}5\mathrm{mm}", "105"),
    (r"1\%2", "12"),
    ("1%2", "12"),
    ("1°2", "12"),
    (r"1^\circ2", "12"),
    (r"1\$2", "12"),
    ("1$2", "12"),
    ("1£2", "12"),
    (r"5\,6", "56"),
    (r"1\;2\;3", "123"),
    (r"5\!6", "56"),
    (r"5\quad6", "56"),
    (r"5\text{}6", "56"),
    (r"5\displaystyle6", "56"),
    (r"5\left.6\right.", "56"),
    (r"5\hspace{1em}6", "56"),
    ("5{}6", "56"),
    ("{5}{6}", "56"),
    ("{5}6", "30"),
    ("5\u{200b}6", "56"),
    ("5\u{2009}6", "56"),
    ("5\\\\6", "56"),
    ("3–5", "-2"),
    ("3—5", "-2"),
    // Words that mean something.
    (r"5\text{ or }6", "5"),
    (r"5\text{ or maybe 6}", "5"),
    (r"5\text{ or more}", "5"),
    (r"8:15\text{ AM}", r"8:15\text{ PM}"),
    (r"5\text{ miles north}", r"5\text{ miles south}"),
    (r"90^\circ\text{ clockwise}", r"90^\circ\text{ counterclockwise}"),
    (r"\text{not }x = 5", "5"),
    (r"5 \text{ (or 6)}", "5"),
    (r"5 \text{ / } 6", "5"),
    (r"\text{A or B}", "A"),
    (r"A \text{ (not B)}", "A"),
    (r"1,2,\ldots,10", "10"),
    (r"5\text{ million}", "5"),
    (r"5\text{ squared}", "5"),
    (r"5\text{ is not it, }6", "5"),
    (r"3\mathrm{i}", "3"),
    (r"2\mathrm{e}", "2"),
    (r"101\text{ base two}", "101"),
    // Values that are nearly the same.
    ("0.333333333333333", r"\frac13"),
    ("1.0000000000000001", "1"),
    (r"\frac{10000000000000001}{10000000000000000}", "1"),
    (r"\sqrt{2.0000000000000001}", r"\sqrt2"),
    ("3.14159265358979323846", r"\pi"),
    (r"0.\overline{3}", "0.3"),
    ("1e999999999", "1e999999998"),
    ("2^{99999999}", "2^{99999998}"),
    // Matrices.
    (r"\begin{pmatrix} 1 & 2 \end{pmatrix}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"),
    (r"\begin{pmatrix} 1 & 2 \end{pmatrix}", "12"),
    (r"\begin{pmatrix} 1 & 2 \end{pmatrix}", r"\begin{vmatrix} 1 & 2 \end{vmatrix}"),
    (r"\begin{pmatrix} 1 & 23 \end{pmatrix}", r"\begin{pmatrix} 12 & 3 \end{pmatrix}"),
    (r"(-\infty, 5)", r"(-\infty, 5]"),
    ("]0,1[", "[0,1]"),
    (r"x < 5", "x > 5"),
    (r"x \ge 5", "x > 5"),
    ("2+2=5", "5"),
    ("5=4", "4"),
    // Many answers are not the one.
    ("1, 2, 3, 4, 5", "5"),
    (r"\{4, 5\}", "5"),
    ("5, 5", "5"),
    (r"4 \text{ or } 5", "5"),
];

fn boxed(evaluate: bool) -> Box<dyn Verifier> {
    verifier(json!({"kind": "boxed", "evaluate": evaluate}))
}

#[test]
fn boxed_knows_the_same_answer_in_other_clothes() {
    let mut wrong = Vec::new();
    for evaluate in [false, true] {
        let boxed = boxed(evaluate);
        let judge = |a: &str, b: &str| score(&*boxed, &format!(r"so \boxed{{{a}}}."), b);
        let mut expect = |a: &str, b: &str, wanted: f64| {
            if judge(a, b) != Ok(wanted) {
                wrong.push(format!("evaluate = {evaluate}: {a} for {b} is not {wanted}"));
            }
        };
        for &(a, b) in SAME {
            expect(a, b, 1.0);
            expect(b, a, 1.0);
        }
        for &(a, b) in DIFFERENT {
            for (a, b, wanted) in [(a, b, 0.0), (b, a, 0.0), (a, a, 1.0), (b, b, 1.0)] {
                expect(a, b, wanted);
            }
        }
        for &(exercise, result) in WORK {
            expect(exercise, result, f64::from(evaluate));
            expect(exercise, exercise, 1.0);
            expect(result, result, 1.0);
        }
    }
    assert!(wrong.is_empty(), "judged otherwise: {wrong:#?}");
    assert_eq!(config(json!({"kind": "boxed"})), config(json!({"kind": "boxed", "evaluate": false})));
}

/// A reference answer may be written as people write them, although a response may not.
#[test]
fn boxed_accepts_the_value_of_a_reference_that_is_not_reduced() {
    check(
        &*boxed(false),
        &[
            (r"\boxed{3/4}", r"\frac{6}{8}", 1.0),
            (r"\boxed{2}", r"\frac{6}{3}", 1.0),
            (r"\boxed{3\sqrt2}", r"\sqrt{18}", 1.0),
            (r"\boxed{1000}", "10^3", 1.0),
            (r"\boxed{10^3}", "10^3", 1.0),
            (r"\boxed{(2, 0.5)}", r"(\frac{4}{2}, \frac{2}{4})", 1.0),
            // What is asked for is the form.
            (r"\boxed{360}", r"2^3 \cdot 3^2 \cdot 5", 0.0),
            (r"\boxed{5 \cdot 2^{3} \cdot 3^2}", r"2^3 \cdot 3^2 \cdot 5", 1.0),
            (r"\boxed{2^3 \cdot 45}", r"2^3 \cdot 3^2 \cdot 5", 0.0),
        ],
    );
}

/// `boxed` and math-verify on what people and a generator wrote. Lines of the file: what the box holds, the reference
/// answer, the verdict of `boxed` (`e`: right to `evaluate` alone), math-verify's, and where they differ who is right.
#[test]
fn boxed_and_math_verify_differ_only_where_it_is_written_who_is_right() {
    let path = crate::places::checkout().join("tests/goldens/math_verify.tsv");
    let text = std::fs::read_to_string(&path).unwrap();
    let (as_written, evaluated) = (boxed(false), boxed(true));
    let (mut wrong, mut pairs, mut differ) = (Vec::new(), BTreeSet::new(), 0);
    for line in text.lines() {
        let fields: Vec<&str> = line.split('\t').collect();
        let [found, wanted, ours, theirs, ref reasons @ ..] = fields[..] else { panic!("{line:?}") };
        let judge = |boxed: &dyn Verifier| score(boxed, &format!("\\boxed{{{found}}}"), wanted).unwrap();
        let verdict = match (judge(&*as_written), judge(&*evaluated)) {
            (0.0, 0.0) => "0",
            (0.0, 1.0) => "e",
            (1.0, 1.0) => "1",
            other => panic!("{line:?}: {other:?}"),
        };
        if verdict != ours {
            wrong.push(format!("{line:?}: now {verdict}"));
        }
        let agree = (verdict == "0") == (theirs == "0");
        let ruled = |reason: &&str| reason.starts_with("ours: ") || reason.starts_with("theirs: ");
        if reasons.iter().filter(|r| ruled(r)).count() != reasons.len()
            || reasons.len() != usize::from(!agree)
        {
            wrong.push(format!(
                "{line:?}: write who is right where the verdicts differ, and nothing elsewhere"
            ));
        }
        differ += usize::from(!agree);
        assert!(["0", "1"].contains(&theirs) && pairs.insert((found, wanted)), "{line:?}");
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    assert!(pairs.len() >= 2000 && differ >= 100, "{} pairs, {differ} disagreements", pairs.len());
}

#[test]
fn boxed_reads_the_last_box() {
    check_extract(
        &*verifier(json!({"kind": "boxed"})),
        &[
            (r"\boxed{1} then \boxed{2}", Some("2")),
            (r"\boxed{1} then \fbox{2}", Some("2")),
            (r"\fbox{1} then \boxed{2}", Some("2")),
            (r"\boxed{\boxed{5}}", Some("5")),
            (r"\boxed {5}", Some("5")),
            (r"$\boxed 5$ is it", Some("5")),
            (r"$\boxed5$", Some("5")),
            (r"\boxed{\frac{1}{2}}", Some("1/2")),
            (r"\boxed{5, so}", Some("5,so")),
            (r"\boxed 5, so", Some("5")),
            (r"\boxed{\{1,2\}}", Some("{1,2}")),
            (r"\boxed{\left\{x\right\}}", Some("{x}")),
            (r"\boxed{a}\boxedfoo{b}", Some("a")),
            // A box that is not closed was cut off; an earlier one was not the answer.
            (r"\boxed{1} then \boxed{2", None),
            (r"\boxed{}", None),
            (r"\boxed", None),
            ("5", None),
        ],
    );
    check(
        &*boxed(false),
        &[
            ("5", "5", 0.0),
            (r"\boxed{5}", r"We add. $\boxed{5}$", 1.0),
            (r"\boxed{5}", "We add <<2+3=5>>5.\n#### 5", 1.0),
            (r"\boxed{a}b}", "a", 1.0),
        ],
    );
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

// ---------------------------------------------------------------------------------------------- hostile programs

/// Starts of shell programs: `reply SCORE` answers the request in `$line`.
const REPLY: &str = r#"
reply() { id=${line#*\"id\":}; printf '{"id":%s,"score":%s}\n' "${id%%,*}" "$1"; }
"#;

/// A `command` verifier whose program is a shell script that can note process ids in `$pids`.
struct Script {
    dir: tempfile::TempDir,
    verifier: Arc<dyn Verifier>,
}

impl Script {
    fn new(body: &str, timeout_seconds: f64, workers: usize) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("verify.sh");
        let pids = dir.path().join("pids");
        let head = format!("pids='{}'\necho $$ >> \"$pids\"\n{REPLY}", pids.display());
        std::fs::write(&path, format!("{head}{body}\n")).unwrap();
        let verifier = verifier(json!({
            "kind": "command", "program": ["sh", path], "timeout_seconds": timeout_seconds, "workers": workers,
        }));
        let script = Self { dir, verifier: verifier.into() };
        // So that a process that survives cannot be overlooked.
        while script.pids().len() < workers {
            std::thread::sleep(Duration::from_millis(2));
        }
        script
    }

    fn score(&self, response: &str) -> Result<f64, Failure> {
        score(&*self.verifier, response, "answer")
    }

    fn file(&self, name: &str) -> String {
        std::fs::read_to_string(self.dir.path().join(name)).unwrap_or_default()
    }

    fn pids(&self) -> Vec<i32> {
        self.file("pids").lines().map(|pid| pid.parse().unwrap()).collect()
    }

    /// Drops the verifier and checks that every process that was noted is gone.
    #[track_caller]
    fn finish(self) {
        let begun = Instant::now();
        let Self { dir, verifier } = self;
        drop(verifier);
        assert!(begun.elapsed() < Duration::from_secs(5), "dropping took {:?}", begun.elapsed());
        let pids = std::fs::read_to_string(dir.path().join("pids")).unwrap();
        assert!(!pids.is_empty());
        for pid in pids.lines() {
            while alive(pid.parse().unwrap()) {
                assert!(begun.elapsed() < Duration::from_secs(10), "process {pid} survives");
                std::thread::sleep(Duration::from_millis(5));
            }
        }
    }
}

/// A killed child of the program stays a zombie until whoever inherited it reaps it; that is not alive.
fn alive(pid: i32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let zombie = stat.rsplit(')').next().is_some_and(|rest| rest.starts_with(" Z"));
    let pid = rustix::process::Pid::from_raw(pid).unwrap();
    rustix::process::test_kill_process(pid).is_ok() && !zombie
}

/// Runs the body on one request, larger than a pipe holds, and checks the kind of failure, that it came no later than
/// the timeout needs, and that nothing survives.
#[track_caller]
fn misbehaves(body: &str, kind: &str, timeout_seconds: f64) -> Failure {
    let script = Script::new(body, timeout_seconds, 1);
    let begun = Instant::now();
    let failure = script.score(&"x".repeat(300_000)).unwrap_err();
    let seconds = begun.elapsed().as_secs_f64();
    assert_eq!(failure.kind(), kind, "{body:?}: {failure}");
    assert!(seconds < 5.0, "{body:?} took {seconds} s");
    assert!(kind != "timeout" || seconds >= timeout_seconds, "{body:?} took only {seconds} s");
    script.finish();
    failure
}

/// A timeout that a sound program meets on a busy machine, and one worth waiting for.
const AMPLE: f64 = 30.0;
const SHORT: f64 = 0.4;

#[test]
fn a_program_reads_the_whole_request_and_answers() {
    let script = Script::new(
        r#"while read -r line; do printf '%s\n' "$line" >> "$pids.lines"; reply -2.5e-1; done"#,
        AMPLE,
        1,
    );
    let Value::Object(task) = json!({"prompt": "2+2?", "answer": "4", "unit": {"of": ["x", 1.5, null]}})
    else {
        unreachable!()
    };
    let response = "four\n\"4\"\u{2028}\\boxed{é}";
    for _ in 0..3 {
        let request = Request { prompt: "2+2?", response, answer: "4", task: &task };
        assert_eq!(script.verifier.score(&request), Ok(-0.25));
    }
    let lines: Vec<Value> =
        script.file("pids.lines").lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let wanted = |id| json!({"id": id, "prompt": "2+2?", "response": response, "answer": "4", "task": task});
    assert_eq!(lines, [wanted(0), wanted(1), wanted(2)]);
    assert_eq!(script.pids().len(), 1, "one process serves all requests");
    assert_eq!(script.verifier.extract("4"), None);
    script.finish();
}

#[test]
fn programs_that_do_not_answer_time_out() {
    misbehaves("sleep 1000", "timeout", SHORT);
    misbehaves("exec <&-; sleep 1000", "timeout", SHORT);
    misbehaves("cat > /dev/null", "timeout", SHORT);
    misbehaves(r#"read -r line; printf '{"id":0,'; sleep 1000"#, "timeout", SHORT);
    misbehaves("read -r line; yes ''", "timeout", SHORT);
    misbehaves("trap '' TERM INT HUP PIPE; while :; do sleep 0.1; done", "timeout", SHORT);
    misbehaves(r#"sleep 1000 & echo $! >> "$pids"; wait"#, "timeout", SHORT);
    let flood = misbehaves("yes 'out of paper' >&2", "timeout", SHORT);
    assert!(flood.to_string().contains("stderr ends with:\nout of paper\n"), "{flood}");
    assert!(flood.to_string().len() < 4096);
}

#[test]
fn programs_that_end_have_crashed() {
    let ended = misbehaves("echo no licence >&2; exit 3", "crashed", AMPLE).to_string();
    assert!(ended.contains("exit status 3") && ended.contains("no licence"), "{ended}");
    let killed = misbehaves("read -r line; kill -SEGV $$", "crashed", AMPLE).to_string();
    assert!(killed.contains("signal 11"), "{killed}");
    let closed =
        misbehaves(r#"exec >&-; sleep 1000 & echo $! >> "$pids"; wait"#, "crashed", AMPLE).to_string();
    assert!(closed.contains("closed its stdout"), "{closed}");
    // Its child keeps stdout open, so only the deadline ends the wait.
    let orphan = misbehaves(r#"sleep 1000 & echo $! >> "$pids"; exit 7"#, "crashed", SHORT).to_string();
    assert!(orphan.contains("exit status 7"), "{orphan}");
    // A line is a line only with its end.
    misbehaves(r#"read -r line; printf '{"id":0,"score":1}'"#, "crashed", AMPLE);
}

#[test]
fn programs_that_write_something_else_break_the_protocol() {
    for (body, reason) in [
        ("echo Loading...; cat", "Loading..."),
        ("read -r line; echo '{}'", "no id"),
        ("read -r line; echo '{\"score\":1}'", "no id"),
        ("read -r line; echo '{\"id\":7,\"score\":1}'", "id 7"),
        ("read -r line; echo '{\"id\":-1,\"score\":1}'", "-1"),
        ("read -r line; echo '{\"id\":0,\"score\":\"1\"}'", "no number"),
        ("read -r line; echo '{\"id\":0,\"score\":1e999}'", "out of range"),
        ("read -r line; echo '[0,1]'; cat", "expected a map"),
        ("read -r line; printf '\\377\\376\\n'; cat", "expected value"),
        ("yes", "\"y\""),
        ("yes | tr -d '\\n'", "65536"),
        ("cat", "65536"),
        ("echo oops >&2; sleep 0.1; echo bad; sleep 1000", "oops"),
    ] {
        let failure = misbehaves(body, "protocol", AMPLE).to_string();
        assert!(failure.contains(reason) && failure.len() < 4096, "{body:?}: {failure}");
    }
}

#[test]
fn a_program_may_say_that_it_cannot_judge() {
    let script = Script::new(
        r#"while read -r line; do
            case "$line" in
                *say:nan*) reply NaN;; *say:inf*) reply -Infinity;; *say:null*) reply null;;
                *say:nothing*) id=${line#*\"id\":}; echo "{\"id\":${id%%,*},\"why\":\"NaN\"}";;
                *) reply 1;;
            esac
        done"#,
        AMPLE,
        1,
    );
    let kinds: Vec<_> = ["say:nan", "say:inf", "say:null", "say:nothing", "fine"]
        .map(|response| script.score(response).map_err(|failure| failure.kind()))
        .into();
    assert_eq!(kinds, [Err("nan"), Err("nan"), Err("missing"), Err("missing"), Ok(1.0)]);
    assert_eq!(script.pids().len(), 1, "a program that answers is not restarted");
    script.finish();
}

#[test]
fn only_the_request_that_breaks_a_program_fails() {
    let script = Script::new(
        r#"while read -r line; do
            case "$line" in *bomb*) echo boom >&2; exit 1;; *hang*) sleep 1000;; *) reply 1;; esac
        done"#,
        2.0,
        1,
    );
    assert_eq!(script.score("fine"), Ok(1.0));
    for _ in 0..5 {
        let bomb = script.score("bomb").unwrap_err();
        assert!(bomb.kind() == "crashed" && bomb.to_string().contains("boom"), "{bomb}");
    }
    assert_eq!(script.score("fine"), Ok(1.0));
    assert_eq!(script.score("hang").unwrap_err().kind(), "timeout");
    assert_eq!(script.score("fine"), Ok(1.0));
    script.finish();
}

#[test]
fn a_process_that_served_before_is_replaced_without_a_failure() {
    for body in [
        // One request per process.
        "read -r line; reply 1",
        // Answers twice, so that the second answer meets the next request.
        "while read -r line; do reply 1; reply 1; done",
        // Blank lines say nothing.
        "while read -r line; do echo; reply 1; echo; done",
        // More on stderr than a pipe holds.
        "while read -r line; do head -c 300000 /dev/zero >&2; reply 1; done",
    ] {
        let script = Script::new(body, AMPLE, 1);
        for _ in 0..5 {
            assert_eq!(script.score("fine"), Ok(1.0), "{body:?}");
        }
        script.finish();
    }
}

#[test]
fn a_program_that_never_works_is_reported_as_such() {
    let script = Script::new("echo no module named sympy >&2; exit 1", AMPLE, 1);
    let kinds = [(); 4].map(|()| script.score("fine").unwrap_err());
    assert_eq!(kinds.each_ref().map(Failure::kind), ["crashed", "crashed", "unavailable", "unavailable"]);
    assert!(kinds[3].to_string().contains("no module named sympy"), "{}", kinds[3]);
    assert_eq!(script.pids().len(), 3, "it is not started any more");
    script.finish();

    // It worked, and then its file is gone.
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("verify");
    std::fs::write(&path, format!("#!/bin/sh\n{REPLY}\nread -r line; reply 1\n")).unwrap();
    std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let gone = verifier(json!({"kind": "command", "program": [path]}));
    assert_eq!(score(&*gone, "fine", "answer"), Ok(1.0));
    std::fs::remove_file(&path).unwrap();
    let kinds = [(); 4].map(|()| score(&*gone, "fine", "answer").unwrap_err().kind());
    assert_eq!(kinds, ["start", "start", "unavailable", "unavailable"]);
}

// ---------------------------------------------------------------------------------------------------------- pool

fn job(id: usize, response: &str) -> Job {
    let Value::Object(task) = json!({"id": id}) else { unreachable!() };
    Job { id, prompt: "?".into(), response: response.to_owned(), answer: "1".into(), task: Arc::new(task) }
}

#[test]
fn a_pool_judges_in_parallel_and_in_order() {
    // The score is the task's id; lower ids take longer.
    let script = Script::new(
        r#"while read -r line; do n=${line##*\"id\":}; n=${n%%\}*}; sleep "0.$((9 - n))"; reply "$n"; done"#,
        AMPLE,
        8,
    );
    let mut pool = Pool::new(script.verifier.clone());
    for round in 0..2 {
        let begun = Instant::now();
        (0..8).for_each(|id| pool.submit(job(id, "fine")));
        assert!(begun.elapsed() < Duration::from_millis(500), "submitting does not wait");
        let wanted = (0..8).map(|id| (id, Ok(id as f64))).collect();
        assert_eq!(pool.collect(), Ok(Verdicts { scores: wanted }), "round {round}");
        // One after the other they take 4.4 s.
        assert!(begun.elapsed() < Duration::from_secs(4), "round {round} took {:?}", begun.elapsed());
    }
    assert_eq!(pool.collect(), Ok(Verdicts { scores: Vec::new() }), "nothing is left");
    drop(pool);
    script.finish();
}

#[test]
fn a_pool_names_failures_by_kind() {
    let script = Script::new(
        r#"while read -r line; do case "$line" in *bomb*) exit 1;; *null*) reply null;; *) reply 1;; esac; done"#,
        AMPLE,
        2,
    );
    assert_eq!(script.score("fine"), Ok(1.0));
    let mut pool = Pool::new(script.verifier.clone());
    for (id, response) in ["bomb", "fine", "null", "bomb", "fine", "bomb"].iter().enumerate() {
        pool.submit(job(id, response));
    }
    let verdicts = pool.collect().unwrap();
    let failed = |(_, score): &(usize, Result<f64, Failure>)| score.as_ref().err().map(Failure::kind);
    let kinds: Vec<_> = verdicts.scores.iter().filter_map(failed).collect();
    assert_eq!(kinds, ["crashed", "missing", "crashed", "crashed"]);
    let fine: Vec<_> = verdicts.scores.iter().filter(|(_, score)| score.is_ok()).map(|(id, _)| *id).collect();
    assert_eq!(fine, [1, 4]);
    drop(pool);
    script.finish();
}

#[test]
fn a_pool_reports_a_program_that_does_not_work() {
    let script = Script::new("echo no module named sympy >&2; exit 1", AMPLE, 2);
    let mut pool = Pool::new(script.verifier.clone());
    (0..20).for_each(|id| pool.submit(job(id, "fine")));
    let failure = pool.collect().unwrap_err();
    assert!(
        failure.kind() == "unavailable" && failure.to_string().contains("no module named sympy"),
        "{failure}"
    );
    drop(pool);
    script.finish();
}

#[test]
fn dropping_a_pool_gives_up_what_nobody_began() {
    let script = Script::new("while read -r line; do sleep 0.3; reply 1; done", AMPLE, 1);
    let mut pool = Pool::new(script.verifier.clone());
    (0..100).for_each(|id| pool.submit(job(id, "fine")));
    let begun = Instant::now();
    drop(pool);
    assert!(begun.elapsed() < Duration::from_secs(5), "dropping took {:?}", begun.elapsed());
    script.finish();
}

#[test]
#[should_panic(expected = "a bug in a verifier")]
fn a_panic_in_a_verifier_reaches_the_caller() {
    struct Buggy;
    impl Verifier for Buggy {
        fn score(&self, _request: &Request) -> Result<f64, Failure> {
            panic!("a bug in a verifier");
        }
        fn extract(&self, _response: &str) -> Option<String> {
            None
        }
    }
    let mut pool = Pool::new(Arc::new(Buggy));
    pool.submit(job(0, "fine"));
    pool.submit(job(1, "fine"));
    let _ = pool.collect();
}
