//! What pages are made of in tests: evaluations and runs of every kind, with text that a hostile model might write.

use std::collections::BTreeMap;

use bon_engine::eval::{
    Examples, Grid, Judged, Problem, Provenance, Report, Sample, calibrate_with_intervals, evaluate,
};
use bon_engine::page::{Evaluated, Run, Sources, Step};
use bon_engine::rng::{Domain, Stream};
use serde_json::json;

/// Text that would act if it were not escaped: markup, attributes, the ends of what a page is made of, control characters,
/// such as reorder text, such as cannot be seen, and such as no document may hold.
pub(crate) const HOSTILE: &str = "</pre></style></title><script>document.title='owned'</script>\"'><img src=x onerror=alert(1)>\
    &amp;]]><!-- \0\u{1}\u{1b}[31m\u{7f}\u{85}\u{202e}desrever\u{2066}\u{200b}\u{feff}\u{fffe}\u{ffff}\u{e0041} {{7*7}} \
    javascript:alert(1)";

/// An evaluation of so many tasks at these temperatures; `skill` makes responses right.
pub(crate) fn grid(tasks: usize, samples: usize, temperatures: &[f64], skill: f64, text: &str) -> Grid {
    let reports = temperatures.iter().map(|&t| report(tasks, samples, t, skill, text)).collect();
    Grid::new(reports).unwrap()
}

fn report(tasks: usize, samples: usize, temperature: f64, skill: f64, text: &str) -> Report {
    let mut examples = Examples::new(3);
    let problems: Vec<Problem> = (0..tasks)
        .map(|i| {
            let mut stream = Stream::new(5, Domain::Shuffle, i as u64);
            let hardness = (i % 10) as f64 / 10.0;
            let pool: Vec<Judged> = (0..samples)
                .map(|j| {
                    let mut uniform = || stream.below(1000) as f64 / 1000.0;
                    // Heat spreads: fewer are right on easy tasks, some on hard ones.
                    let chance =
                        (skill * (1.0 - hardness) / temperature.max(0.3)).min(0.95) + 0.02 * temperature;
                    let correct = uniform() < chance;
                    let noisy = if uniform() < 0.1 { 1.0 } else { 0.0 };
                    let score = if correct { 1.0 } else { noisy };
                    let answer = if correct {
                        "7".to_owned()
                    } else {
                        format!("{}", (uniform() * 20.0 * temperature) as u32)
                    };
                    let sample = Sample {
                        score,
                        correct,
                        answer: Some(answer),
                        tokens: 3 + j % 5,
                        truncated: j % 9 == 0,
                    };
                    Judged {
                        text: format!("the answer is {j} {text}"),
                        ids: Vec::new(),
                        rewarded: true,
                        reward: f64::from(u8::from(correct)),
                        sample,
                    }
                })
                .collect();
            examples.offer(i + 1, &format!("task {i}: {text}"), text, &pool);
            let samples = pool.into_iter().map(|judged| judged.sample).collect();
            Problem { id: format!("{}: {i} + 3 = {text}", i + 1), samples }
        })
        .collect();
    let ns: Vec<usize> = (0..).map(|i| 1 << i).take_while(|n| *n <= samples).collect();
    let settings = [
        ("program", "bon-engine 0.1.0"),
        ("generate.temperature", &format!("{temperature:?}")),
        ("model", &format!("models/of skill {skill}")),
        ("model.weights", "crc32c 01234567"),
        ("verifier.kind", "\"numeric\""),
        ("data.prefix", text),
    ];
    let settings: BTreeMap<String, String> =
        settings.into_iter().map(|(key, value)| (key.to_owned(), value.to_owned())).collect();
    let command = format!("bon-engine eval config.toml --set 'data.prefix={text}'");
    let provenance = Some(Provenance { settings, answers: vec![text.to_owned(); tasks], command });
    let report = evaluate(&problems, &ns, 1).unwrap();
    let calibration = Some(calibrate_with_intervals(&problems, 1));
    Report { provenance, examples: examples.into_list(), calibration, ..report }
}

/// A run of so many steps.
pub(crate) fn run(name: &str, steps: u64, evaluations: u64, text: &str) -> Run {
    let line = |step: u64| {
        let progress = step as f64 / steps.max(1) as f64;
        let noise = ((step * 7919) % 101) as f64 / 1010.0;
        Step::of(&json!({
            "step": step, "loss": 0.3 - 0.2 * progress + noise, "reward_mean": 0.2 + 0.5 * progress + noise / 2.0,
            "pass_at_1": 0.2 + 0.5 * progress, "pass_at_n": 0.6 + 0.35 * progress, "best_of_n_reward": 0.6 + 0.3 * progress,
            "grad_norm": if step == 2 { serde_json::Value::Null } else { json!(1.0 + noise) },
            "lr": 2e-6 * (1.0 - progress), "tokens": 700 + step % 13, "tokens_per_second": 300.0 + 100.0 * noise,
            "logprob_gap_max": 0.0, "logprob_gap_mean": 0.0, "all_pass_groups": step % 4, "all_fail_groups": 1,
            "clipped_groups": 0, "distinct_answers": 6.0 - 3.0 * progress, "answer_entropy": 1.7 - progress,
            "token_entropy": 0.9 - 0.4 * progress, "response_length": 5.0 + progress, "truncated_share": 0.05 * noise,
            "kl": 0.01 * progress, "verifier_failures": { "timeout": step % 3, "answer": 1 },
            "seconds": { "generate": 1.2 + noise, "verify": 0.1, "forward_backward": 0.8 - noise, "optimizer": 0.2 },
        }))
        .unwrap()
    };
    let at = |i: u64| report(30, 8, 1.0, 0.2 + 0.5 * i as f64 / evaluations.max(1) as f64, text);
    let reports: Vec<(u64, Report)> =
        (0..evaluations).map(|i| (i * steps / (evaluations - 1).max(1), at(i))).collect();
    let evaluated = |(step, report): &(u64, Report)| Evaluated {
        step: *step,
        ns: report.ns.clone(),
        figures: report.figures.clone(),
    };
    Run {
        name: name.to_owned(),
        config: format!("[train]\noutput = \"{text}\"\n"),
        n: Some(8),
        imitates: false,
        steps: (1..=steps).map(line).collect(),
        course: reports.iter().map(evaluated).collect(),
        first: reports.first().map(|(_, report)| report.clone()),
        last: reports.iter().skip(1).last().map(|(_, report)| report.clone()),
    }
}

/// A page of every kind, by name.
pub(crate) fn all() -> Vec<(&'static str, Sources)> {
    let named = |name: &str, grid: Grid| (name.to_owned(), grid);
    let evaluations = |list: Vec<(String, Grid)>| Sources { evaluations: list, runs: vec![] };
    let temperatures = [0.4, 0.7, 1.0, 1.3];
    vec![
        ("one", evaluations(vec![named("base", grid(40, 32, &[1.0], 0.5, ""))])),
        (
            "two",
            evaluations(vec![
                named("base", grid(40, 32, &[1.0], 0.3, "")),
                named("trained", grid(40, 32, &[1.0], 0.8, "")),
            ]),
        ),
        (
            "grid",
            evaluations(vec![
                named("base", grid(40, 16, &temperatures, 0.3, "")),
                named("trained with a long name, so that it wraps", grid(40, 16, &temperatures, 0.8, "")),
            ]),
        ),
        ("run", Sources { evaluations: vec![], runs: vec![run("demo", 100, 4, "")] }),
        ("runs", Sources { evaluations: vec![], runs: vec![run("bon", 100, 3, ""), run("rl", 700, 3, "")] }),
        (
            "hostile",
            Sources {
                evaluations: vec![
                    named(HOSTILE, grid(12, 8, &[0.5, 1.0], 0.5, HOSTILE)),
                    named(&format!("b {HOSTILE}"), grid(12, 8, &[0.5, 1.0], 0.7, HOSTILE)),
                ],
                runs: vec![run(HOSTILE, 5, 2, HOSTILE)],
            },
        ),
        ("single", evaluations(vec![named("one task", grid(1, 4, &[1.0], 0.5, ""))])),
    ]
}
