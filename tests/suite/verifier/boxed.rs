//! `boxed`: which answers are the same, and which are not.

use std::collections::BTreeSet;

use bon_engine::verifier::Verifier;
use serde_json::json;

use super::{check, check_extract, config, score, verifier};

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

pub(super) fn boxed(evaluate: bool) -> Box<dyn Verifier> {
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
