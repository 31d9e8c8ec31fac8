//! The benchmark of the engine, at a size that the virtual GPU does: what runs on GPUs only would rot.

use std::collections::BTreeMap;

use serde_json::Value;

use crate::kernels::compiled;

#[path = "../../benches/engine.rs"]
mod engine;

fn run(arguments: &[&str]) -> (Result<(), String>, String) {
    let arguments: Vec<String> = arguments.iter().map(|&s| s.into()).collect();
    let mut out = Vec::new();
    let ran = engine::run(&arguments, &mut out).map_err(|e| e.to_string());
    (ran, String::from_utf8(out).unwrap())
}

/// The figures by name, and the rest, of the tiny model on a device.
fn measured(device: &str, more: &[&str]) -> (BTreeMap<String, Value>, Value, String) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("engine.json");
    let output = path.to_str().unwrap();
    let (ran, said) =
        run(&[&["--bench", "--model", "tiny", "--device", device, "--output", output], more].concat());
    ran.unwrap_or_else(|e| panic!("{e}\n{said}"));
    let json: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    let figures = json["figures"].as_array().unwrap().iter();
    let by_name = figures.map(|f| (f["name"].as_str().unwrap().to_owned(), f.clone())).collect();
    (by_name, json, said)
}

const NAMES: [&str; 11] = [
    "ceiling/copy",
    "ceiling/product",
    "tiny/decode 3 prompts",
    "tiny/decode N = 1",
    "tiny/decode N = 3",
    "tiny/optimizer start",
    "tiny/prefill 2 x 12",
    "tiny/sample 2 x 3 x 5",
    "tiny/train 24 tokens",
    "tiny/train 48 tokens",
    "tiny/weights",
];

fn check(device: &str) {
    let (figures, json, said) = measured(device, &[]);
    assert!(figures.keys().map(String::as_str).eq(NAMES), "{:?}", figures.keys());
    assert_eq!(json["wrong"], Value::Array(vec![]));
    for (name, figure) in &figures {
        assert!(said.contains(&format!("\n{name} ")), "no line of {name} in\n{said}");
        for (key, value) in figure.as_object().unwrap().iter().filter(|(key, _)| *key != "name") {
            let value = value.as_f64().unwrap_or_else(|| panic!("{name}: {key} is {value}"));
            assert!(
                if key == "logprob_gap_max" { value == 0.0 } else { value > 0.0 },
                "{name}: {key} is {value}"
            );
        }
    }
    // 333 x 104; two layers of 104 x (2 x 256 + 2 x 64 + 3 x 200), four norms of 104 and two of 64; a last norm.
    let parameters = 333 * 104 + 2 * (104 * (2 * 256 + 2 * 64 + 3 * 200) + 4 * 104 + 2 * 64) + 104;
    assert_eq!(figures["tiny/weights"]["parameters"], parameters);
    // Three steps after the first token: rows of 64 keys and values in bf16. The layer with a window of 8 reads tails
    // of 1 to 3 and 7 to 5 rows of the prompt, the other the whole prompt and the same tails.
    let rows =
        |prompts: f64, n: f64| prompts * ((7.0 + 6.0 + 5.0) / 3.0 + 12.0) + 2.0 * n * (1.0 + 2.0 + 3.0) / 3.0;
    for (name, prompts, n) in [
        ("tiny/decode N = 1", 1.0, 1.0),
        ("tiny/decode N = 3", 1.0, 3.0),
        ("tiny/decode 3 prompts", 3.0, 3.0),
    ] {
        let want = 2.0 * f64::from(parameters) + rows(prompts, n) * 2.0 * 2.0 * 64.0;
        let got = figures[name]["bytes_per_step"].as_f64().unwrap();
        assert!((got - want).abs() < 1e-6, "{name}: {got} bytes, want {want}");
    }
    // 12 + 3 x 4 tokens, 13 of which predict; queries see min(position + 1, 8) keys in one layer, all in the other.
    let seen = |position: u32, window: u32| f64::from((position + 1).min(window));
    let pairs: f64 = [8, 100]
        .iter()
        .map(|&w| (0..12).map(|p| seen(p, w)).sum::<f64>() + 3.0 * (12..16).map(|p| seen(p, w)).sum::<f64>())
        .sum();
    let body = f64::from(parameters - 333 * 104);
    let want = 6.0 * body * 24.0 + 12.0 * pairs * 256.0 + 6.0 * 333.0 * 104.0 * 13.0;
    assert_eq!(figures["tiny/train 24 tokens"]["flops"].as_f64(), Some(want));
}

#[test]
fn the_engine_is_measured_on_the_virtual_gpu() {
    if compiled() {
        check("vm");
    }
}

#[test]
fn the_engine_is_measured_on_the_cpu() {
    check("cpu");
}

#[test]
fn a_name_chooses_and_time_runs_out() {
    let (figures, ..) = measured("cpu", &["^tiny/decode N = 3"]);
    assert_eq!(Vec::from_iter(figures.keys()), ["ceiling/copy", "ceiling/product", NAMES[4], NAMES[10]]);
    let (figures, ..) = measured("cpu", &["--seconds", "0"]);
    for name in [NAMES[2], NAMES[3], NAMES[4], NAMES[6], NAMES[8], NAMES[9]] {
        assert_eq!(figures[name]["left_out"], "the model's 0 seconds are over", "{name}");
    }
}

#[test]
fn what_is_for_others_is_ignored_and_what_makes_no_sense_refused() {
    let (ran, said) = run(&["--bench", "--device", "cpu", "--noplot", "rms_norm"]);
    assert_eq!(ran, Ok(()));
    assert!(said.starts_with("ignored: --noplot\n") && !said.contains("Gemma"), "{said}");
    for (arguments, words) in [
        (["--model", "3b"], "--model 3b: must be 270m, 1b, 2b or tiny"),
        (["--device", "gpu"], "--device gpu: must be cuda, cuda:<number>, vm or cpu"),
        (["--device", "cuda:99"], "cuda"),
        (["--seconds", "soon"], "--seconds soon: must be a number"),
        (["--bench", "--output"], "--output wants a value: engine --bench"),
    ] {
        let error = run(&arguments).0.unwrap_err();
        assert!(error.starts_with(words), "{error}");
    }
}
