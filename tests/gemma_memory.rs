//! What training the real Gemma 3 270M on the CPU takes of the host's memory, in each mode, beside what its plan says. It needs the
//! weights (`make gemma`), so `make memory` runs it and `make test` does not; that holds a small model to the same (`memory.rs`).

mod allocated;

use std::path::Path;

use bon_engine::backend::cpu::Cpu;
use bon_engine::plan::Purpose;
use bon_engine::train::config::TrainConfig;
use bon_engine::train::interrupt::Interrupt;
use bon_engine::train::run::run;

use allocated::{is_as_planned, peak, planned};

/// The demo, without evaluations, which take less, and so hot that responses are as long as they may be and have nothing in
/// common: for such is the plan. Their verdicts are by chance and the objective is `rl`, so that each of them teaches
/// something: others are not trained on.
const CONFIG: &str = r#"
model.path = ".cache/gemma-3-270m"
data = { tasks = "examples/demo/train.jsonl", prefix = "17 + 5 = 22\n31 + 8 = 39\n68 + 4 = 72\n25 + 9 = 34\n83 + 6 = 89\n" }
generate = { samples = 16, prompts_per_step = 8, max_new_tokens = 6, temperature = 10.0 }
objective = { kind = "rl" }
verifier = { kind = "command", program = ["python3", "-c", """
import json, sys
for line in sys.stdin:
    request = json.loads(line)
    print(json.dumps({"id": request["id"], "score": len(request["response"]) % 2}), flush=True)
"""] }
train = { steps = 1, seed = 1, recompute = "none" }
"#;

/// Modes, and their settings beside those.
const MODES: [(&str, &[&str]); 5] = [
    ("whole", &[]),
    ("8-bit moments", &["optimizer.moments=8bit"]),
    ("no masters", &["optimizer.masters=false"]),
    (
        "8-bit moments, embedding included, no masters, bf16 gradients",
        &[
            "optimizer.moments=8bit",
            "optimizer.embedding_moments=8bit",
            "optimizer.masters=false",
            "optimizer.gradients=bf16",
        ],
    ),
    ("LoRA of rank 16", &["lora.rank=16"]),
];

#[test]
fn training_gemma_3_270m_takes_what_its_plan_says() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    std::env::set_current_dir(root).unwrap();
    let output = tempfile::tempdir().unwrap();
    // Threads, with what belongs to them.
    rayon::broadcast(|_| ());
    println!("| mode | plan | taken | of the plan |\n|---|---:|---:|---:|");
    let mut runs = Vec::new();
    for (i, (name, settings)) in MODES.into_iter().enumerate() {
        let output = format!("train.output={:?}", output.path().join(i.to_string()));
        let settings: Vec<String> =
            settings.iter().map(|s| s.to_string()).chain(std::iter::once(output)).collect();
        let config = TrainConfig::parse("demo.toml", CONFIG, &settings).unwrap();
        let (plan, _) = planned(&config, Purpose::Train);
        let taken = peak(|| {
            assert!(run(Cpu::F32, &config, false, &Interrupt::default(), |_| {}).unwrap().finished);
        });
        let gigabytes = |bytes: u64| bytes as f64 / 1e9;
        let ratio = 100.0 * taken as f64 / plan.peak() as f64;
        println!("| {name} | {:.2} GB | {:.2} GB | {ratio:.0} % |", gigabytes(plan.peak()), gigabytes(taken));
        runs.push((name, taken, plan));
    }
    for (name, taken, plan) in &runs {
        assert!(is_as_planned(*taken, plan), "{name}: {taken} bytes were taken of\n{plan}");
    }
}
