//! What people bring: settings, prompts, files and directories that are nearly what is asked for. Each is taken as it is
//! meant, or there is one line that says what it is and what to do.

use std::fs;
use std::path::Path;

use bon_engine::model_dir::{OpenError, look_at};
use bon_engine::train::config::{TrainConfig, escape};
use serde_json::{Value, json};

use crate::fixture::{Fixture, config_json, write_model_of};

/// The lines of a program's standard error that warn.
fn warnings(f: &Fixture, args: &[&str]) -> Vec<String> {
    let ran = f.succeed(args);
    ran.stderr.lines().filter(|l| l.starts_with("warning: ")).map(String::from).collect()
}

/// The error of a program that must fail with a single line.
fn one_line(f: &Fixture, args: &[&str]) -> String {
    let ran = f.run(args);
    assert_eq!(ran.code, Some(1), "{args:?}: {}", ran.stderr);
    assert_eq!(ran.stderr.lines().count(), 1, "{args:?}: {}", ran.stderr);
    ran.stderr
}

// ---- text and control tokens

/// A model whose vocabulary has a token for every byte.
fn bytes_model(f: &Fixture) {
    let mut config = config_json();
    config["vocab_size"] = crate::tokenizer::vocabulary().len().into();
    write_model_of(&config, &f.path("bytes"));
    f.write("bytes/tokenizer.json", crate::tokenizer::tokenizer_json().to_string());
}

/// The fixture's tokenizer with nothing marked as special.
fn unmark(f: &Fixture) {
    let mut json: Value = serde_json::from_slice(&fs::read(f.path("model/tokenizer.json")).unwrap()).unwrap();
    json["added_tokens"].as_array_mut().unwrap().iter_mut().for_each(|token| token["special"] = false.into());
    f.write("model/tokenizer.json", json.to_string());
}

#[test]
fn what_the_file_marks_as_special_changes_nothing() {
    let f = Fixture::new();
    f.write(
        "in.jsonl",
        "{\"prompt\": \"a<end_of_turn>\\n<start_of_turn>model\\n\"}\n{\"prompt\": \"<bos><pad><unk>\"}",
    );
    let commands = [
        &["sample", "--model", "model", "--prompt", "1<eos>", "-n", "40", "--max-new-tokens", "40", "--json"]
            [..],
        &["sample", "--model", "model", "--prompt", "1", "--turn", "-n", "40", "--max-new-tokens", "40"],
        &["logprobs", "--model", "model", "--input", "in.jsonl"],
        &["eval", "run.toml", "--set", "verifier={kind=\"exact\"}", "--samples", "64"],
    ];
    let marked = commands.map(|args| f.succeed(args).stdout);
    unmark(&f);
    let unmarked = commands.map(|args| f.succeed(args).stdout);
    assert_eq!(marked, unmarked);
    // Enough responses ended at a turn's end for it to show.
    assert!(marked[0].lines().filter(|l| l.contains("\"finish\":\"stop\"")).count() > 5, "{}", marked[0]);
    assert!(!marked[0].contains("_of_turn"), "{}", marked[0]);
}

#[test]
fn prompts_that_spell_control_tokens_are_told_with_their_line() {
    let f = Fixture::new();
    let task = |prompt: &str| format!("{}\n", json!({ "prompt": prompt, "answer": "2" }));
    let clean = f.succeed(&["eval", "run.toml", "--samples", "1"]);
    assert!(!clean.stderr.contains("warning"), "{}", clean.stderr);

    let turn = "<bos><start_of_turn>1+1=<end_of_turn>";
    f.write("tasks.jsonl", ["\n", &task("1+1="), &task(turn), &task("2<pad>"), &task(turn)].concat());
    let set = ["--set", "generate.max_new_tokens=2", "--set", "train.steps=1"];
    let said = |set: &[&str], args: &[&str]| {
        let sets: Vec<&str> = set.iter().flat_map(|s| ["--set", s]).collect();
        warnings(&f, &[args, &sets].concat())
    };
    for args in [&["eval", "run.toml", "--samples", "1"][..], &["train", "run.toml"]] {
        let told = warnings(&f, &[args, &set].concat());
        let [line] = &told[..] else { panic!("{args:?}: {told:?}") };
        for words in [
            "warning: tasks.jsonl:3: the prompt spells <bos>, <start_of_turn>, <end_of_turn>, ",
            "data.template = \"turn\"",
            "(and 2 more like it)",
        ] {
            assert!(line.contains(words), "no {words:?} in {line}");
        }
    }

    // The other texts that reach a model.
    f.write("tasks.jsonl", task("1+1="));
    let eval = ["eval", "run.toml", "--samples", "1"];
    let told = said(&["data.prefix=\"<start_of_turn>\"", "data.suffix=\"<eos>\""], &eval);
    assert!(told[0].starts_with("warning: data.prefix spells <start_of_turn>, "), "{told:?}");
    assert!(told[1].starts_with("warning: data.suffix spells <eos>, ") && told.len() == 2, "{told:?}");
    let told = said(&["generate.stop=[\"<eos>\", \"\\n<start_of_turn>\"]"], &eval);
    assert!(
        told[0].starts_with("warning: generate.stop: \"\\n<start_of_turn>\" holds") && told.len() == 1,
        "{told:?}"
    );
    f.write("in.jsonl", "{\"prompt\": \"1\"}\n\n{\"prompt\": \"<eos>\"}\n{\"prompt\": \"<bos>\"}\n");
    let told = warnings(&f, &["logprobs", "--model", "model", "--input", "in.jsonl"]);
    assert!(
        told[0].starts_with("warning: in.jsonl:3: the prompt spells <eos>, ") && told.len() == 2,
        "{told:?}"
    );
    assert_eq!(told[1], "warning: in.jsonl: 1 more prompts spell control tokens");
    let sample = ["sample", "--model", "model", "--max-new-tokens", "1", "--prompt"];
    let told = warnings(&f, &[&sample[..], &["<end_of_turn>"]].concat());
    assert!(told[0].starts_with("warning: the prompt spells <end_of_turn>, ") && told.len() == 1, "{told:?}");

    // Experts, where they count.
    let expert =
        |response: &str| format!("{}\n", json!({ "prompt": "1+1=", "answer": "2", "response": response }));
    f.write("tasks.jsonl", [task("1"), expert("2<end_of_turn>"), expert("it is 2\nand so on")].concat());
    let sft = ["objective={kind=\"sft\"}", "train.steps=1", "generate.stop=[\"\\n\"]"];
    let told = said(&[&sft[..], &["train.output=sft"]].concat(), &["train", "run.toml"]);
    assert!(told[0].contains("tasks.jsonl:2: the expert response spells <end_of_turn>, "), "{told:?}");
    assert!(told[0].contains("(and 1 more like it)") && told.len() == 1, "{told:?}");
    assert!(warnings(&f, &eval).is_empty());
}

/// One response alone as it comes, among others, and as JSON: the same text, byte for byte.
#[test]
fn live_output_is_the_text() {
    let f = Fixture::new();
    bytes_model(&f);
    let mut cut = 0;
    for (seed, stop) in (0..24).map(|seed| (seed.to_string(), ["", "a", "us", "\u{fffd}"][seed % 4])) {
        let mut args =
            vec!["sample", "--model", "bytes", "--prompt", "us", "--max-new-tokens", "12", "--seed", &seed];
        if !stop.is_empty() {
            args.extend(["--stop", stop]);
        }
        let json = f.succeed(&[&args[..], &["--json"]].concat()).stdout;
        let text = serde_json::from_str::<Value>(&json).unwrap()["text"].as_str().unwrap().to_owned();
        assert_eq!(f.succeed(&args).stdout, format!("{text}\n"), "seed {seed}, stop {stop:?}");
        let several = f.succeed(&[&args[..], &["-n", "2"]].concat()).stdout;
        let first = &several[several.find("--- 1 of 2").unwrap()..];
        assert!(first.split_once('\n').unwrap().1.starts_with(&format!("{text}\n")), "{several:?}");
        cut += usize::from(text.contains('\u{fffd}'));
    }
    assert!(cut > 5, "only {cut} responses have bytes that are no text");
}

// ---- settings

#[test]
fn a_table_that_chooses_a_kind_replaces_the_choice() {
    let f = Fixture::new();
    let regex = crate::fixture::RUN
        .replace("kind = \"numeric\"\npick = \"first\"", "kind = \"regex\"\npattern = \"(.)\"\ngroup = 1");
    f.write("run.toml", format!("{regex}\n[environment]\nkind = \"exact\"\ncase_insensitive = true\n"));
    let load = |set: &[&str]| {
        let set: Vec<String> = set.iter().map(|s| (*s).to_owned()).collect();
        TrainConfig::load(&f.path("run.toml"), &set).map_err(|e| e.to_string())
    };
    for (set, section, expected) in [
        (&["verifier={kind=\"numeric\"}"][..], "verifier", "kind = \"numeric\""),
        (&["verifier = { kind = \"boxed\" }"], "verifier", "kind = \"boxed\""),
        (
            &["environment={kind='regex', pattern='x'}"],
            "environment",
            "kind = \"regex\"\npattern = \"x\"\npick = \"last\"",
        ),
        (&["objective={kind=\"sft\"}"], "objective", "kind = \"sft\""),
        (
            &["verifier={kind=\"command\", program=[\"./judge\"]}", "verifier.workers=3"],
            "verifier",
            "kind = \"command\"\nprogram = [\"./judge\"]\ntimeout_seconds = 30.0\nworkers = 3",
        ),
        // The same kind is a choice as well; a table without one, and a single key, add to what is there.
        (
            &["verifier={kind=\"regex\", pattern=\"y\"}"],
            "verifier",
            "kind = \"regex\"\npattern = \"y\"\npick = \"last\"",
        ),
        (
            &["verifier={pattern=\"y\"}"],
            "verifier",
            "kind = \"regex\"\npattern = \"y\"\ngroup = 1\npick = \"last\"",
        ),
        (
            &["verifier.pattern=y"],
            "verifier",
            "kind = \"regex\"\npattern = \"y\"\ngroup = 1\npick = \"last\"",
        ),
    ] {
        let text = load(set).unwrap().to_toml().unwrap();
        let found =
            text.split(&format!("[{section}]\n")).nth(1).unwrap().split("\n\n").next().unwrap().trim();
        assert!(found.starts_with(expected), "{set:?}: {found}");
    }
    // Tables of settings are no choice: what is not named stays.
    assert_eq!(load(&["generate={samples=2}"]).unwrap().generate.max_new_tokens, 4);
    for (set, words) in [
        (
            "verifier.kind=numeric",
            ["--set verifier.kind=numeric: unknown key `", "--set 'verifier={kind=\"...\", ...}'"],
        ),
        (
            "environment.kind=numeric",
            ["--set environment.kind=numeric: unknown key `", "all of [environment]"],
        ),
        (
            "verifier={kind=\"numeric\", patern=\"x\"}",
            ["unknown key `patern` in [verifier]", "--set verifier={"],
        ),
    ] {
        let error = load(&[set]).unwrap_err();
        assert!(words.iter().all(|w| error.contains(w)), "{set}: {error}");
    }
}

#[test]
fn two_characters_where_a_line_break_is_meant() {
    for (text, found) in [
        (r"\n", Some(r"\n")),
        (r"1 + 1 = 2\n", Some(r"\n")),
        (r"Q: 1\nA: 2", Some(r"\n")),
        (r"one\ntwo", Some(r"\n")),
        (r"\t", Some(r"\t")),
        (r"end\r\n", Some(r"\r")),
        (r"$\nu$\n", Some(r"\n")),
        ("a\nb\t", None),
        (r"\\n", None),
        (r"$\nu = \times$", None),
        (r"\frac12 \neq \tfrac12", None),
        (r"C:\data", None),
        (r"\d+", None),
    ] {
        assert_eq!(escape(text), found, "{text}");
    }
    let f = Fixture::new();
    let args = ["eval", "run.toml", "--samples", "1"];
    for (set, words) in [
        (
            r"data.prefix=1 + 1 = 2\n",
            [r"data.prefix: \n is taken as the two characters", r#"--set 'data.prefix="...\n"'"#],
        ),
        (r"data.suffix=\n", ["data.suffix: ", "line break"]),
        (r"generate.stop=['\n']", ["generate.stop: ", "line break"]),
        (r"generate.stop=['x', '\t']", ["generate.stop: ", "tabulator"]),
    ] {
        let told = warnings(&f, &[&args[..], &["--set", set]].concat());
        assert!(told.len() == 1 && words.iter().all(|w| told[0].contains(w)), "{set}: {told:?}");
    }
    assert!(warnings(&f, &[&args[..], &["--set", "generate.stop=[\"\\n\"]"]].concat()).is_empty());
    let sample = ["sample", "--model", "model", "--max-new-tokens", "1", "--prompt"];
    let told = warnings(&f, &[&sample[..], &["1", "--stop", r"\n"]].concat());
    assert!(
        told.len() == 1 && told[0].contains(r"--stop: \n is taken") && told[0].contains("$'...\\n'"),
        "{told:?}"
    );
    let told = warnings(&f, &[&sample[..], &[r"1\n"]].concat());
    assert!(told.len() == 1 && told[0].contains("--prompt: "), "{told:?}");
}

// ---- model directories

#[test]
fn what_is_taken_for_a_model_directory() {
    let f = Fixture::new();
    let model = |name: &str| fs::create_dir_all(f.path(name)).unwrap();
    for dir in ["adapter", "gguf", "both", "pytorch", "spm", "empty", "hub/snapshots/1f"] {
        model(dir);
    }
    f.write(
        "adapter/adapter_config.json",
        r#"{"peft_type": "LORA", "base_model_name_or_path": "google/gemma"}"#,
    );
    f.write("adapter/adapter_model.safetensors", "");
    f.write("gguf/model-Q4_K_M.gguf", "GGUF");
    f.write("both/config.json", config_json().to_string());
    f.write("both/model.GGUF", "GGUF");
    f.write("pytorch/config.json", config_json().to_string());
    f.write("pytorch/pytorch_model.bin", "");
    f.write("hub/snapshots/1f/config.json", config_json().to_string());
    for file in ["config.json", "model.safetensors"] {
        fs::copy(f.path("model").join(file), f.path("spm").join(file)).unwrap();
    }
    f.write("spm/tokenizer.model", "");
    f.succeed(&["train", "run.toml", "--set", "train.steps=1"]);
    for (path, words) in [
        ("adapter", &["adapter is an adapter of google/gemma", "--adapter", "bon-engine merge"][..]),
        ("gguf", &["gguf holds a GGUF file, model-Q4_K_M.gguf", "convert it", "gguf_file"]),
        ("gguf/model-Q4_K_M.gguf", &["is a GGUF file", "convert it"]),
        ("both", &["holds a GGUF file, model.GGUF"]),
        ("pytorch", &["holds its weights as pytorch_model.bin", "save_pretrained"]),
        ("spm", &["has a tokenizer.model and no tokenizer.json", "AutoTokenizer"]),
        ("model/model.safetensors", &["is a file of weights; give the directory"]),
        ("out", &["is no model directory, but out/checkpoints/step-000001/model is"]),
        ("out/checkpoints/step-000001", &["but out/checkpoints/step-000001/model is"]),
        ("hub", &["but hub/snapshots/1f is"]),
        ("empty", &["cannot read empty/config.json"]),
        ("nowhere", &["nowhere is not a directory"]),
        ("google/gemma", &["download it first: hf download google/gemma "]),
    ] {
        for args in [&["sample", "--prompt", "1", "--model", path][..], &["inspect", path]] {
            let error = one_line(&f, args);
            assert!(words.iter().all(|w| error.contains(w)), "{args:?}: {error}");
        }
    }
    let ran = f.run(&[
        "train",
        "run.toml",
        "--set",
        "model.path=gguf/model-Q4_K_M.gguf",
        "--set",
        "train.output=o",
    ]);
    assert!(ran.stderr.contains("  model.path: gguf/model-Q4_K_M.gguf is a GGUF file; "), "{}", ran.stderr);
    look_at(&f.path("model")).unwrap();
    // A whole model beside which an adapter lies is a model.
    f.write("model/adapter_config.json", "{}");
    look_at(&f.path("model")).unwrap();
    assert!(matches!(look_at(Path::new("/no/such/place")), Err(OpenError::NoDirectory { .. })));
}

#[test]
fn a_chat_template_that_is_not_gemmas_is_told() {
    let gemma = "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ role }}\n{{ m.content }}<end_of_turn>\n{% endfor %}<start_of_turn>model\n";
    let chatml = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n";
    let as_json = |template: &str| json!({ "chat_template": template }).to_string();
    let named = |template: &str| {
        json!({ "chat_template": [{ "name": "default", "template": template }] }).to_string()
    };
    for (files, told) in [
        (&[][..], None),
        (&[("tokenizer_config.json", as_json(gemma))], None),
        (&[("tokenizer_config.json", named(gemma))], None),
        (&[("chat_template.jinja", gemma.to_owned()), ("tokenizer_config.json", as_json(chatml))], None),
        (&[("tokenizer_config.json", "{}".to_owned())], None),
        (&[("tokenizer_config.json", json!({ "chat_template": null }).to_string())], None),
        (&[("tokenizer_config.json", as_json(chatml))], Some("tokenizer_config.json")),
        (&[("tokenizer_config.json", named(chatml))], Some("tokenizer_config.json")),
        (&[("chat_template.json", as_json(chatml))], Some("chat_template.json")),
        (
            &[("chat_template.jinja", chatml.to_owned()), ("tokenizer_config.json", as_json(gemma))],
            Some("chat_template.jinja"),
        ),
        (
            &[("chat_template.jinja", "{{ messages[0].content }} [/INST]".to_owned())],
            Some("chat_template.jinja"),
        ),
    ] {
        let f = Fixture::new();
        for (name, content) in files {
            f.write(&format!("model/{name}"), content);
        }
        let sample = ["sample", "--model", "model", "--prompt", "1", "--max-new-tokens", "1"];
        assert!(warnings(&f, &sample).is_empty(), "{files:?}");
        let eval = ["eval", "run.toml", "--samples", "1", "--set", "data.template=turn"];
        for (args, setting) in
            [(&[&sample[..], &["--turn"]].concat()[..], "--turn"), (&eval, "data.template")]
        {
            let found = warnings(&f, args);
            assert_eq!(found.len(), usize::from(told.is_some()), "{files:?}: {found:?}");
            if let Some(name) = told {
                assert!(
                    found[0].contains(&format!("model/{name}: ")) && found[0].contains(setting),
                    "{found:?}"
                );
            }
        }
    }
}

// ---- byte order marks

#[test]
fn a_byte_order_mark_is_no_text() {
    let f = Fixture::new();
    f.write("prefix.txt", "1+1=2\n");
    f.write("prompt.txt", "1+1=");
    f.write("in.jsonl", "{\"prompt\": \"1+1=\"}\n");
    f.write("groups.jsonl", "{\"scores\": [1, 0]}\n");
    f.write("model/generation_config.json", "{\"eos_token_id\": [1, 5]}");
    let prefix = "data.prefix_file=prefix.txt";
    let commands: [&[&str]; 5] = [
        &["eval", "run.toml", "--set", prefix, "--samples", "4"],
        &["sample", "--model", "model", "--prompt-file", "prompt.txt", "--max-new-tokens", "8", "--json"],
        &["logprobs", "--model", "model", "--input", "in.jsonl"],
        &["weigh", "--objective", "rl", "groups.jsonl"],
        &["inspect", "model", "--tensors"],
    ];
    let clean: Vec<String> = commands.iter().map(|args| f.succeed(args).stdout).collect();
    for name in [
        "run.toml",
        "tasks.jsonl",
        "prefix.txt",
        "prompt.txt",
        "in.jsonl",
        "groups.jsonl",
        "model/config.json",
        "model/generation_config.json",
        "model/tokenizer.json",
    ] {
        let bytes = fs::read(f.path(name)).unwrap();
        f.write(name, [b"\xef\xbb\xbf", &bytes[..]].concat());
        let found: Vec<String> = commands.iter().map(|args| f.succeed(args).stdout).collect();
        assert_eq!(found, clean, "{name}");
        f.write(name, bytes);
    }
    // In the middle of joined files, and in front of texts.
    let tasks = fs::read_to_string(f.path("tasks.jsonl")).unwrap();
    f.write("tasks.jsonl", tasks.replace('{', "\u{feff}{").replace(":\"", ":\"\u{feff}"));
    assert_eq!(f.succeed(commands[0]).stdout, clean[0]);
    f.write("in.jsonl", "{\"prompt\": \"\u{feff}1+1=\"}\n");
    assert_eq!(f.succeed(commands[2]).stdout, clean[2]);
    let sample =
        ["sample", "--model", "model", "--max-new-tokens", "8", "--json", "--prompt", "\u{feff}1+1="];
    assert_eq!(f.succeed(&sample).stdout, clean[1]);
}
