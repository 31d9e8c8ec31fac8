//! A Gemma 3 of a few thousand random weights with its tokenizer, tasks that it sometimes solves by luck, and a
//! training configuration for them: enough for the real program to run end to end in milliseconds a step.

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use bon_engine::checkpoint::{Dtype, TensorSpec, write_tensors};
use bon_engine::gemma::config::ConfigFile;
use bon_engine::gemma::params::{ParamKind, frozen, plan};
use serde_json::{Value, json};

/// Context of the tiny model, in tokens.
pub(crate) const CONTEXT: usize = 64;

const CONTROL: [&str; 6] = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"];

/// Control tokens, a line break, and one token per character of arithmetic and of the turn template.
pub(crate) fn vocabulary() -> Vec<String> {
    let characters = "\n0123456789+-=?.,\u{2581}abcdefghijklmnopqrstuvwxyz";
    CONTROL.into_iter().map(String::from).chain(characters.chars().map(String::from)).collect()
}

/// `tokenizer.json`, laid out as Gemma's: BPE, spaces as U+2581, a line break that is an added token.
pub(crate) fn tokenizer_json() -> Value {
    let words = vocabulary();
    let added = |(id, content): (usize, &String)| {
        json!({ "id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": id < CONTROL.len() })
    };
    let vocab: serde_json::Map<_, _> = words.iter().enumerate().map(|(i, w)| (w.clone(), json!(i))).collect();
    json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": words[..=CONTROL.len()].iter().enumerate().map(added).collect::<Vec<_>>(),
        "normalizer": { "type": "Replace", "pattern": { "String": " " }, "content": "\u{2581}" },
        "pre_tokenizer": null, "post_processor": null,
        "decoder": { "type": "Sequence", "decoders": [
            { "type": "Replace", "pattern": { "String": "\u{2581}" }, "content": " " },
            { "type": "ByteFallback" }, { "type": "Fuse" },
        ] },
        "model": { "type": "BPE", "dropout": null, "unk_token": "<unk>", "continuing_subword_prefix": null,
                   "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": false, "ignore_merges": false,
                   "vocab": vocab, "merges": [] },
    })
}

/// `config.json` of a Gemma 3 with a local and a global layer.
pub(crate) fn config_json() -> Value {
    json!({
        "model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"], "vocab_size": vocabulary().len(),
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 8,
        "sliding_window_pattern": 2, "max_position_embeddings": CONTEXT, "bos_token_id": 2, "eos_token_id": 1,
        "pad_token_id": 0, "torch_dtype": "float32",
    })
}

/// Writes the model's directory: the same weights every time.
pub(crate) fn write_model(dir: &Path) {
    write_model_of(&config_json(), dir);
}

pub(crate) fn write_model_of(config: &Value, dir: &Path) {
    std::fs::create_dir_all(dir).unwrap();
    std::fs::write(dir.join("config.json"), config.to_string()).unwrap();
    std::fs::write(dir.join("tokenizer.json"), tokenizer_json().to_string()).unwrap();
    let config = ConfigFile::open(dir).unwrap().gemma;
    let plan = plan(&config);
    let mut element = 0u32;
    let mut specs = Vec::new();
    let mut data: Vec<Vec<u8>> = Vec::new();
    for spec in plan.tensors() {
        // Spread like a fresh initialisation, where the factors of norms are about 1.
        let (center, scale) = match spec.kind {
            ParamKind::Vector => (1.0 - config.norm.offset, 0.1),
            _ => (0.0, 1.7 / (spec.cols as f32).sqrt()),
        };
        let value = |_| {
            element = element.wrapping_add(1);
            (center + scale * ((element as f32).sin() * 43_758.547).fract()).to_le_bytes()
        };
        data.push((0..spec.rows * spec.cols).flat_map(value).collect());
        specs.push(TensorSpec { name: spec.name.clone(), dtype: Dtype::F32, shape: spec.shape() });
    }
    for (name, shape) in frozen(&config) {
        let value = |i: usize| if shape.len() == 1 { 1.0 } else { (i as f32).sin() };
        data.push((0..shape.iter().product()).flat_map(|i| value(i).to_le_bytes()).collect());
        specs.push(TensorSpec { name, dtype: Dtype::F32, shape });
    }
    write_tensors(dir, &specs, u64::MAX, |i| data[i].as_slice().into()).unwrap();
}

/// Sums of digits whose answer is one digit.
pub(crate) fn tasks_jsonl() -> String {
    let sums = (0..5).flat_map(|a| (0..5).map(move |b| (a, b)));
    sums.map(|(a, b)| {
        format!("{}\n", json!({ "prompt": format!("{a}+{b}="), "answer": (a + b).to_string() }))
    })
    .collect()
}

/// A directory with `model/`, `tasks.jsonl`, `eval.jsonl` and a configuration `run.toml` for a run in `out/`, which
/// goes when the value goes.
pub(crate) struct Fixture {
    dir: tempfile::TempDir,
}

impl Fixture {
    /// Writes all of it.
    pub(crate) fn new() -> Self {
        Self::of(&config_json())
    }

    /// The same with a model in widths that the CUDA kernels take.
    pub(crate) fn for_kernels() -> Self {
        let mut json = config_json();
        json["head_dim"] = 64.into();
        Self::of(&json)
    }

    /// The same with a Gemma 4 whose layers have embeddings of their own.
    pub(crate) fn gemma_4_e() -> Self {
        let golden = crate::tiny::dir("gemma4_e_trained").join("config.json");
        let mut json: Value = serde_json::from_str(&std::fs::read_to_string(golden).unwrap()).unwrap();
        for size in ["vocab_size", "vocab_size_per_layer_input"] {
            json[size] = vocabulary().len().into();
        }
        Self::of(&json)
    }

    fn of(config: &Value) -> Self {
        let fixture = Self { dir: tempfile::tempdir().unwrap() };
        write_model_of(config, &fixture.path("model"));
        fixture.write("tasks.jsonl", tasks_jsonl());
        fixture.write("eval.jsonl", tasks_jsonl().lines().take(4).collect::<Vec<_>>().join("\n"));
        fixture.write("run.toml", RUN);
        fixture
    }

    /// The directory itself: paths in `run.toml` are relative to it.
    pub(crate) fn root(&self) -> &Path {
        self.dir.path()
    }

    /// The path of a file in it.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Writes or replaces a file.
    pub(crate) fn write(&self, name: &str, content: impl AsRef<[u8]>) {
        std::fs::write(self.path(name), content).unwrap();
    }
}

/// Trains for pass@2 on the sums; a random model gets about one digit in ten right, so that there is something to
/// learn from.
pub(crate) const RUN: &str = r#"
[model]
path = "model"

[data]
tasks = "tasks.jsonl"

[generate]
samples = 4
prompts_per_step = 4
max_new_tokens = 4

[objective]
kind = "pass-at-n"
n = 2

[verifier]
kind = "numeric"
pick = "first"

[optimizer]
lr = 1e-2

[train]
steps = 4
output = "out"
"#;

impl Fixture {
    /// The program with these arguments, to be run in the fixture's directory. A backtrace would be a bug, so it is
    /// asked for.
    pub(crate) fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(crate::places::program());
        command.args(args).current_dir(self.root()).env("RUST_BACKTRACE", "1").stdin(Stdio::null());
        command
    }

    /// Runs the program to its end.
    pub(crate) fn run(&self, args: &[&str]) -> Ran {
        Ran::of(&mut self.command(args))
    }

    /// [`Fixture::run`], which must succeed.
    pub(crate) fn succeed(&self, args: &[&str]) -> Ran {
        let ran = self.run(args);
        assert_eq!(ran.code, Some(0), "{args:?}: {}", ran.stderr);
        ran
    }
}

/// What a program did.
#[derive(Debug)]
pub(crate) struct Ran {
    /// Exit code; `None` if a signal ended it.
    pub(crate) code: Option<i32>,
    /// Standard output.
    pub(crate) stdout: String,
    /// Standard error.
    pub(crate) stderr: String,
}

impl Ran {
    /// Runs a command to its end.
    pub(crate) fn of(command: &mut Command) -> Self {
        Self::from(command.output().unwrap())
    }
}

impl From<Output> for Ran {
    fn from(output: Output) -> Self {
        let text = |bytes| String::from_utf8(bytes).unwrap();
        Self { code: output.status.code(), stdout: text(output.stdout), stderr: text(output.stderr) }
    }
}
