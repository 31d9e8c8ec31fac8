//! What a run on the CPU takes of the host's memory, beside what its plan says. A binary of its own, because its allocator counts.

mod allocated;

use std::fs;
use std::path::Path;

use bon_engine::backend::DType;
use bon_engine::backend::cpu::{Cpu, Tensor};
use bon_engine::gemma::config::{CONFIG_FILE, ConfigFile};
use bon_engine::gemma::params;
use bon_engine::generate::{Prompt, Sampling, generate};
use bon_engine::model_dir::{self, ModelDir};
use bon_engine::plan::Purpose;
use bon_engine::tokenizer::TOKENIZER_FILE;
use bon_engine::train::config::TrainConfig;
use bon_engine::train::interrupt::Interrupt;
use bon_engine::train::run::run;
use serde_json::{Value, json};

use allocated::{is_as_planned, peak, planned};

/// Tokens of the responses below, their end token included.
const NEW: usize = 24;
/// Responses to a prompt where they are sampled.
const STREAMS: usize = 16;

/// V.
const VOCAB: usize = 4096;

/// A BPE tokenizer of control tokens, one token for every letter, and pieces that no merge makes.
fn tokenizer() -> Value {
    let control = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>", "\n"];
    let letters = ('a'..='z').map(String::from).chain(["\u{2581}".into(), ",".into()]);
    let pieces = (0..).map(|i| format!("piece{i}"));
    let words = control.into_iter().map(String::from).chain(letters).chain(pieces);
    let words: Vec<String> = words.take(VOCAB).collect();
    let added = |(id, content): (usize, &&str)| {
        json!({ "id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": *content != "\n" })
    };
    let vocab: serde_json::Map<_, _> = words.iter().enumerate().map(|(i, w)| (w.clone(), json!(i))).collect();
    json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": control.iter().enumerate().map(added).collect::<Vec<_>>(),
        "normalizer": { "type": "Replace", "pattern": { "String": " " }, "content": "\u{2581}" },
        "pre_tokenizer": null, "post_processor": null,
        "decoder": { "type": "Replace", "pattern": { "String": "\u{2581}" }, "content": " " },
        "model": { "type": "BPE", "dropout": null, "unk_token": "<unk>", "continuing_subword_prefix": null,
                   "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": false, "ignore_merges": false,
                   "vocab": vocab, "merges": [] },
    })
}

/// A Gemma 3 of 10 million weights, and tasks with responses.
fn write(dir: &Path) {
    let source = dir.join("source");
    fs::create_dir(&source).unwrap();
    let config = json!({
        "model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"], "vocab_size": VOCAB, "hidden_size": 512,
        "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 64, "query_pre_attn_scalar": 64, "sliding_window": 16, "sliding_window_pattern": 2,
        "max_position_embeddings": 256, "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0,
        "torch_dtype": "float32",
    });
    fs::write(source.join(CONFIG_FILE), config.to_string()).unwrap();
    fs::write(source.join(TOKENIZER_FILE), tokenizer().to_string()).unwrap();
    let config = ConfigFile::open(&source).unwrap();
    let mut element = 0u32;
    let mut value = || {
        element = element.wrapping_add(1);
        0.05 * ((element as f32).sin() * 43_758.547).fract()
    };
    let params = params::plan(&config.gemma).map(|spec| {
        let n = spec.rows * spec.cols;
        Tensor::f32(spec.rows, spec.cols, std::iter::repeat_with(&mut value).take(n).collect())
    });
    model_dir::save(&Cpu::F32, &config, &params, &source, &dir.join("model")).unwrap();
    let letter = |i: usize| char::from(b'a' + (i % 26) as u8);
    let task = |i: usize| {
        let response: String = (1..NEW).map(|j| letter(i + j)).collect();
        json!({ "prompt": format!("a prompt of {}", letter(i)), "answer": "a", "response": response })
            .to_string()
    };
    fs::write(dir.join("tasks.jsonl"), (0..32).map(task).collect::<Vec<_>>().join("\n")).unwrap();
}

fn config(dir: &Path, name: &str, overrides: &[&str]) -> TrainConfig {
    let text = format!(
        r#"
        model.path = "{model}"
        data.tasks = "{tasks}"
        data.prefix = "a shared beginning, "
        generate = {{ prompts_per_step = 12, max_new_tokens = {NEW} }}
        objective.kind = "sft"
        train = {{ steps = 1, eval_samples = {STREAMS}, output = "{output}" }}
        "#,
        model = dir.join("model").display(),
        tasks = dir.join("tasks.jsonl").display(),
        output = dir.join(name).display(),
    );
    let overrides: Vec<String> = overrides.iter().map(|s| s.to_string()).collect();
    TrainConfig::parse("run.toml", &text, &overrides).unwrap()
}

#[test]
fn a_run_on_the_cpu_takes_what_its_plan_says() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    write(dir);
    // Threads, with what belongs to them.
    rayon::broadcast(|_| ());
    let small = [
        "model.dtype=bf16",
        "optimizer.moments=8bit",
        "optimizer.embedding_moments=8bit",
        "optimizer.masters=false",
        "optimizer.gradients=bf16",
    ];
    let (all, none) = ("train.recompute=all", "train.recompute=none");
    let mut runs = Vec::new();
    for (name, settings) in [
        ("f32", &[all][..]),
        ("f32, activations kept", &[none]),
        ("bf16", &["model.dtype=bf16", all]),
        ("bf16, activations kept", &["model.dtype=bf16", none]),
        ("bf16, products in f32", &["model.dtype=bf16", "model.compute=f32", all]),
        ("micro-batches", &["model.dtype=bf16", none, "train.gradient_accumulation=4"]),
        ("8-bit moments", &["optimizer.moments=8bit", all]),
        ("6 bytes", &[&small[..], &[all]].concat()),
        ("6 bytes, activations kept", &[&small[..], &[none]].concat()),
        ("LoRA", &["model.dtype=bf16", "lora.rank=8", all]),
        ("LoRA, activations kept", &["model.dtype=bf16", "lora.rank=8", none]),
        ("LoRA, f32", &["lora.rank=8", all]),
    ] {
        let config = config(dir, &name.replace([' ', ','], "-"), settings);
        let (plan, _) = planned(&config, Purpose::Train);
        let taken = peak(|| {
            let outcome = run(Cpu::F32, &config, false, &Interrupt::default(), |_| {}).unwrap();
            assert!(outcome.finished);
        });
        runs.push((name, taken, plan));
    }
    for (name, dtype) in [("sampling, f32", DType::F32), ("sampling, bf16", DType::Bf16)] {
        let is = if dtype == DType::F32 { "model.dtype=f32" } else { "model.dtype=bf16" };
        let config = config(dir, "none", &[is]);
        let (plan, prompts) = planned(&config, Purpose::Evaluate);
        let taken = peak(|| {
            let opened = ModelDir::open(Cpu::F32, &config.model.path, config.model.precision()).unwrap();
            let prompts: Vec<Prompt> =
                prompts.iter().map(|ids| Prompt { ids, number: 0, streams: STREAMS }).collect();
            let sampling = Sampling {
                temperature: 1.0,
                truncation: config.generate.truncation(),
                max_new_tokens: NEW,
                seed: 0,
                step: 0,
            };
            generate(&opened.model, &prompts, &sampling, |_| false, |_, _, _| {}).unwrap();
        });
        runs.push((name, taken, plan));
    }
    for (name, taken, plan) in &runs {
        assert!(is_as_planned(*taken, plan), "{name}: {taken} bytes were taken of\n{plan}");
    }
}
