//! Safetensors in and out, atomic replacement, and the model's table of tensors.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};

use bon_engine::backend::DType;
use bon_engine::backend::cpu::{Cpu, Tensor};
use bon_engine::backend::ops::*;
use bon_engine::checkpoint::{
    Checkpoint, CheckpointError, Dtype, FileError, TensorSpec, atomic, write_tensors,
};
use bon_engine::cli::inspect;
use bon_engine::gemma::config::{ConfigFile, GemmaConfig};
use bon_engine::gemma::params::{self, Mismatch, ParamSpec, Params};
use bon_engine::model_dir::{self, open_weights};
use half::{bf16, f16};
use proptest::prelude::*;
use serde_json::{Value, json};

fn refusal(result: Result<Checkpoint, CheckpointError>) -> String {
    format!("{:#}", anyhow::Error::from(result.expect_err("must be refused")))
}

fn entries(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

fn spec(name: &str, dtype: Dtype, shape: &[usize]) -> TensorSpec {
    TensorSpec { name: name.into(), dtype, shape: shape.into() }
}

/// A safetensors file from a header and its data.
fn file(header: &[u8], data: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes()[..], header, data].concat()
}

fn open_bytes(bytes: &[u8]) -> Result<Checkpoint, CheckpointError> {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("model.safetensors"), bytes).unwrap();
    Checkpoint::open(dir.path())
}

// ---- reading ----

#[test]
fn tensors_come_back_from_one_file_and_from_shards() {
    let specs = [
        spec("b", Dtype::BF16, &[3]),
        spec("a", Dtype::F32, &[2, 2]),
        spec("empty", Dtype::F32, &[0, 7]),
        spec("c", Dtype::F32, &[5]),
    ];
    let data: Vec<Vec<u8>> = [6u8, 16, 0, 20].map(|n| (0..n).map(|i| i * 3 + n).collect()).into();
    for (limit, files) in [
        (1000, &["model.safetensors"][..]),
        (
            22,
            &[
                "model-00001-of-00002.safetensors",
                "model-00002-of-00002.safetensors",
                "model.safetensors.index.json",
            ],
        ),
    ] {
        let dir = tempfile::tempdir().unwrap();
        write_tensors(dir.path(), &specs, limit, |i| Cow::Borrowed(&data[i])).unwrap();
        assert_eq!(entries(dir.path()), files);
        let checkpoint = Checkpoint::open(dir.path()).unwrap();
        assert_eq!(checkpoint.names().collect::<Vec<_>>(), ["a", "b", "c", "empty"]);
        for (spec, data) in specs.iter().zip(&data) {
            let view = checkpoint.tensor(&spec.name).unwrap();
            assert_eq!((view.dtype, view.shape, view.bytes), (spec.dtype, &spec.shape[..], &data[..]));
            let width = spec.dtype.bitsize() / 8;
            assert!(
                view.bytes.is_empty() || view.bytes.as_ptr().addr().is_multiple_of(width),
                "{} is aligned",
                spec.name
            );
        }
        assert!(checkpoint.tensor("d").is_none());
        let sizes: u64 = checkpoint.files().map(|(_, size)| size).sum();
        assert!(sizes > 42);
    }
}

#[test]
fn damaged_files_are_refused() {
    let good = br#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#;
    open_bytes(&file(good, &[0; 8])).unwrap();
    let tensor = |name: &str, shape: &str, from: u64, to: u64| {
        format!(r#""{name}":{{"dtype":"U8","shape":{shape},"data_offsets":[{from},{to}]}}"#)
    };
    let header = |tensors: &[String]| format!("{{{}}}", tensors.join(",")).into_bytes();
    // Nine tensors that together claim 2^64 - 1 bytes: any further sum overflows.
    let most = (1u64 << 61) - 1;
    let huge = (0..9u64)
        .map(|i| {
            let (from, size) = (i * most, if i < 8 { most } else { 7 });
            tensor(&format!("t{i}"), &format!("[{size}]"), from, from + size)
        })
        .collect::<Vec<_>>();
    for (bytes, expected) in [
        (vec![], "(0 bytes)"),
        (vec![1, 2, 3], "(3 bytes)"),
        (file(good, &[0; 7]), "its tensors need 8 bytes, the file holds 7"),
        (file(good, &[0; 9]), "its tensors need 8 bytes, the file holds 9"),
        (file(good, &[])[..20].to_vec(), "its header claims 54 bytes, the file has 20"),
        (u64::MAX.to_le_bytes().to_vec(), "its header claims 18446744073709551615 bytes, at most"),
        (file(b"", &[]), "bad safetensors header: EOF"),
        (file(b"[]", &[]), "bad safetensors header: "),
        (file(b"{\"a\":\xff}", &[]), "bad safetensors header: "),
        (file(&b"{\"a\":".repeat(5000), &[]), "bad safetensors header: "),
        (
            file(&header(&[tensor("a", "[4]", 0, 4), tensor("b", "[4]", 2, 6)]), &[0; 6]),
            "bad safetensors header: ",
        ),
        (file(&header(&[tensor("a", "[4]", 4, 0)]), &[0; 4]), "bad safetensors header: "),
        (file(&header(&[tensor("a", "[5]", 0, 4)]), &[0; 4]), "bad safetensors header: "),
        (file(&header(&[tensor("a", "[4294967296,4294967296]", 0, 0)]), &[]), "bad safetensors header: "),
        (file(&header(&[tensor("a", "[-1]", 0, 4)]), &[0; 4]), "bad safetensors header: "),
        (file(&header(&huge), &[]), "its tensors need 18446744073709551615 bytes"),
        (
            file(&header(&[tensor("a", "[4]", 0, 4), tensor("a", "[4]", 0, 4)]), &[0; 4]),
            "bad safetensors header: \"a\" appears twice",
        ),
        (
            file(br#"{"a":{"dtype":"F99","shape":[2],"data_offsets":[0,8]}}"#, &[0; 8]),
            "bad safetensors header: ",
        ),
    ] {
        let problem = refusal(open_bytes(&bytes));
        assert!(
            problem.contains("model.safetensors: ") && problem.contains(expected),
            "{expected}: {problem}"
        );
    }
}

#[test]
fn paths_that_hold_no_file() {
    let dir = tempfile::tempdir().unwrap();
    let problem = || refusal(Checkpoint::open(dir.path()));
    assert!(problem().contains("neither model.safetensors nor model.safetensors.index.json is there"));
    let path = dir.path().join("model.safetensors");
    std::fs::create_dir(&path).unwrap();
    assert!(problem().ends_with("model.safetensors: not a regular file"), "{}", problem());
    std::fs::remove_dir(&path).unwrap();
    std::os::unix::fs::symlink("nowhere", &path).unwrap();
    assert!(
        problem().ends_with("model.safetensors: No such file or directory (os error 2)"),
        "{}",
        problem()
    );
}

#[test]
fn an_index_must_fit_its_shards() {
    let dir = tempfile::tempdir().unwrap();
    let one = |name: &str| {
        let header = format!(r#"{{"{name}":{{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}}}"#);
        file(header.as_bytes(), &[7])
    };
    std::fs::write(dir.path().join("s1.safetensors"), one("a")).unwrap();
    std::fs::write(dir.path().join("s2.safetensors"), one("b")).unwrap();
    std::fs::write(dir.path().join("s3.safetensors"), one("b")).unwrap();
    let index = dir.path().join("model.safetensors.index.json");
    let open = |text: &str| {
        std::fs::write(&index, text).unwrap();
        Checkpoint::open(dir.path())
    };
    let map = |pairs: &str| format!(r#"{{"metadata":{{}},"weight_map":{{{pairs}}}}}"#);
    open(&map(r#""a":"s1.safetensors","b":"s2.safetensors""#)).unwrap();
    for (text, expected) in [
        (String::new(), "bad index: EOF"),
        ("{}".into(), "bad index: missing field `weight_map`"),
        (map(r#""a":3"#), "bad index: invalid type: integer `3`, expected a string"),
        (map(r#""a":"s1.safetensors","a":"s2.safetensors""#), "bad index: \"a\" appears twice"),
        (map(r#""a":"s9.safetensors""#), "shard \"s9.safetensors\" is missing"),
        (map(r#""a":"../s1.safetensors""#), "shard \"../s1.safetensors\" is not a plain file name"),
        (map(r#""a":"/etc/passwd""#), "shard \"/etc/passwd\" is not a plain file name"),
        (map(r#""a":"..""#), "shard \"..\" is not a plain file name"),
        (map(r#""a":"""#), "shard \"\" is not a plain file name"),
        (map(r#""a":"s1.safetensors/""#), "shard \"s1.safetensors/\" is not a plain file name"),
        (
            map(r#""a":"s1.safetensors","b":"s1.safetensors""#),
            "tensor \"b\" is not in shard \"s1.safetensors\"",
        ),
        (
            map(r#""a":"s1.safetensors","c":"s2.safetensors""#),
            "tensor \"c\" is not in shard \"s2.safetensors\"",
        ),
        (map(r#""b":"s3.safetensors","a":"s2.safetensors""#), "s3.safetensors: holds tensor \"b\", as does "),
    ] {
        let problem = refusal(open(&text));
        assert!(problem.contains(expected), "{expected}: {problem}");
    }
    let header = br#"{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"z":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}"#;
    std::fs::write(dir.path().join("s1.safetensors"), file(header, &[7, 8])).unwrap();
    let problem = refusal(open(&map(r#""a":"s1.safetensors""#)));
    assert!(
        problem.contains(
            "index.json: shard \"s1.safetensors\" holds tensor \"z\", which the index does not list"
        )
    );
}

proptest! {
    #[test]
    fn no_damage_panics(
        at in any::<prop::sample::Index>(), byte in any::<u8>(), how in 0..4, index in any::<bool>(),
    ) {
        let specs = [spec("b", Dtype::BF16, &[3]), spec("a", Dtype::F32, &[2, 2])];
        let dir = tempfile::tempdir().unwrap();
        write_tensors(dir.path(), &specs, if index { 1 } else { 100 }, |i| vec![1; [6, 16][i]].into()).unwrap();
        let names = entries(dir.path());
        let target = dir.path().join(&names[at.index(names.len())]);
        let mut bytes = std::fs::read(&target).unwrap();
        // Most damage should hit the lengths and the header.
        let at = at.index(bytes.len());
        match how {
            0 => bytes[at] = byte,
            1 => bytes.truncate(at),
            2 => bytes.insert(at, byte),
            _ => bytes[at % 8] = byte,
        }
        std::fs::write(&target, bytes).unwrap();
        if let Ok(checkpoint) = Checkpoint::open(dir.path()) {
            for name in checkpoint.names() {
                let view = checkpoint.tensor(name).unwrap();
                prop_assert_eq!(view.shape.iter().product::<usize>() * view.dtype.bitsize(), view.bytes.len() * 8);
            }
        }
    }
}

// ---- atomic ----

fn fill(files: &'static [&'static str]) -> impl Fn(&Path) -> Result<(), FileError> {
    move |dir| files.iter().try_for_each(|name| atomic::write_new(&dir.join(name), b"new"))
}

#[test]
fn a_directory_appears_whole_and_replaces_its_predecessor() {
    let root = tempfile::tempdir().unwrap();
    let target = root.path().join("model");
    atomic::replace_dir(&target, |dir| {
        assert!(!target.exists(), "nothing is visible before all is written");
        fill(&["a"])(dir)
    })
    .unwrap();
    std::fs::write(target.join("a"), "old").unwrap();
    atomic::replace_dir(&target, fill(&["a", "b"])).unwrap();
    assert_eq!(std::fs::read(target.join("a")).unwrap(), b"new");
    assert_eq!(entries(&target), ["a", "b"]);
    assert_eq!(entries(root.path()), ["model"], "nothing is left beside it");
}

#[test]
fn a_failed_write_leaves_the_old_directory_and_nothing_else() {
    let root = tempfile::tempdir().unwrap();
    let target = root.path().join("model");
    atomic::replace_dir(&target, fill(&["a"])).unwrap();
    std::fs::write(target.join("a"), "old").unwrap();

    // /dev/full answers every write as a full disk does.
    let full = |dir: &Path| {
        fill(&["a", "b"])(dir)?;
        let path = dir.join("weights");
        std::os::unix::fs::symlink("/dev/full", &path).unwrap();
        let file = std::fs::OpenOptions::new().write(true).open(&path);
        file.and_then(|mut f| f.write_all(b"x"))
            .map_err(FileError::io(bon_engine::checkpoint::Action::Write, &path))
    };
    let problem = format!("{:#}", anyhow::Error::from(atomic::replace_dir(&target, full).unwrap_err()));
    assert!(
        problem.contains("weights (nothing was replaced; free some space or choose another directory): "),
        "{problem}"
    );
    assert!(problem.contains("No space left on device"), "{problem}");
    assert_eq!(std::fs::read(target.join("a")).unwrap(), b"old");
    assert_eq!((entries(&target), entries(root.path())), (vec!["a".to_owned()], vec!["model".to_owned()]));

    let panicked = std::panic::catch_unwind(|| {
        atomic::replace_dir(&target, |_| -> Result<(), FileError> { panic!("in the middle") })
    });
    assert!(panicked.is_err());
    assert_eq!(entries(root.path()), ["model"], "even a panic cleans up");
}

#[test]
fn replacing_never_loses_a_file() {
    let root = tempfile::tempdir().unwrap();
    let target = root.path().join("home");
    std::fs::create_dir(&target).unwrap();
    atomic::replace_dir(&target, fill(&["a"])).unwrap();
    std::fs::write(target.join("thesis.tex"), "precious").unwrap();
    let problem = atomic::replace_dir(&target, fill(&["a"])).unwrap_err().to_string();
    assert!(problem.contains("home: it holds \"thesis.tex\", which the new version does not"), "{problem}");
    assert_eq!(entries(&target), ["a", "thesis.tex"]);
    assert_eq!(entries(root.path()), ["home"]);
}

#[test]
fn directories_that_cannot_be_written() {
    let root = tempfile::tempdir().unwrap();
    std::fs::write(root.path().join("file"), "x").unwrap();
    std::os::unix::fs::symlink(root.path(), root.path().join("link")).unwrap();
    let unreached = |_: &Path| -> Result<(), FileError> { panic!("must be refused before the work") };
    for (name, expected) in [
        ("file", "file: a file or link stands there"),
        ("link", "link: a file or link stands there"),
        ("..", "the path must end in a name"),
        ("file/model", "file/model"),
        ("absent/model", "absent/model (create the directory that is to hold it)"),
    ] {
        let problem = atomic::replace_dir(&root.path().join(name), unreached).unwrap_err().to_string();
        assert!(problem.contains(expected), "{problem}");
    }
    assert_eq!(entries(root.path()), ["file", "link"]);
}

#[test]
fn a_file_is_replaced_whole_or_not_at_all() {
    let root = tempfile::tempdir().unwrap();
    let path = root.path().join("report.json");
    atomic::write_file(&path, |out| out.write_all(b"one")).unwrap();
    let failed = atomic::write_file(&path, |out| {
        out.write_all(b"tw")?;
        Err(std::io::ErrorKind::StorageFull.into())
    });
    assert!(failed.unwrap_err().to_string().contains("report.json (nothing was replaced; free some space"));
    assert_eq!(std::fs::read(&path).unwrap(), b"one");
    atomic::write_file(&path, |out| out.write_all(b"three")).unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), b"three");
    assert_eq!(entries(root.path()), ["report.json"]);
}

// ---- the model's parameters ----

fn tiny(family: &str) -> Value {
    let four = family.starts_with("gemma4");
    let mut json = json!({
        "model_type": if four { "gemma4_text" } else { family }, "vocab_size": 11, "hidden_size": 6, "intermediate_size": 10, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 2, "torch_dtype": "float32", "note": "kept",
    });
    if four {
        let own = json!({
            "hidden_size_per_layer_input": 0, "global_head_dim": 4, "num_global_key_value_heads": 1,
            "attention_k_eq_v": true, "enable_moe_block": family == "gemma4_moe", "num_experts": 3, "top_k_experts": 2,
            "moe_intermediate_size": 5,
        });
        json.as_object_mut().unwrap().extend(own.as_object().unwrap().clone());
    }
    json
}

/// name -> (dtype, shape, bytes), different in every element, for a model's whole table.
type Tensors = BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>;

fn tensors(config: &GemmaConfig, dtype: Dtype) -> Tensors {
    let mut next = 0u32;
    let mut element = || {
        next += 1;
        let x = (next as f32 * 0.37).sin() * 0.01;
        match dtype {
            Dtype::F32 => x.to_le_bytes().to_vec(),
            Dtype::BF16 => bf16::from_f32(x).to_le_bytes().to_vec(),
            Dtype::F16 => f16::from_f32(x).to_le_bytes().to_vec(),
            other => vec![next as u8; other.bitsize() / 8],
        }
    };
    let plan = params::plan(config);
    let tensor = |s: &ParamSpec| {
        let bytes = (0..s.rows * s.cols).flat_map(|_| element()).collect();
        (s.name.clone(), (dtype, s.shape(), bytes))
    };
    let mut all: Tensors = plan.tensors().into_iter().map(tensor).collect();
    let frozen = params::frozen(config).into_iter();
    all.extend(frozen.map(|(name, shape)| {
        let bytes = (0..shape.iter().product()).flat_map(|_: usize| element()).collect();
        (name, (dtype, shape, bytes))
    }));
    all
}

fn write_model(dir: &Path, config: &Value, tensors: &Tensors) {
    std::fs::write(dir.join("config.json"), config.to_string()).unwrap();
    let specs: Vec<TensorSpec> = tensors.iter().map(|(n, (d, s, _))| spec(n, *d, s)).collect();
    let _ = std::fs::remove_file(dir.join("model.safetensors"));
    let bytes: Vec<&Vec<u8>> = tensors.values().map(|(_, _, b)| b).collect();
    write_tensors(dir, &specs, u64::MAX, |i| bytes[i].into()).unwrap();
}

fn config(json: &Value) -> GemmaConfig {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("config.json"), json.to_string()).unwrap();
    ConfigFile::open(dir.path()).unwrap().gemma
}

#[test]
fn the_tables_are_transformers() {
    let names = |family: &str| {
        let plan = params::plan(&config(&tiny(family)));
        plan.tensors().into_iter().map(|s| (s.name.clone(), s.shape())).collect::<BTreeMap<_, _>>()
    };
    let own = |layers: &[(&str, Vec<usize>)]| {
        let mut all = BTreeMap::from([
            ("model.embed_tokens.weight".to_owned(), vec![11, 6]),
            ("model.norm.weight".to_owned(), vec![6]),
        ]);
        for i in 0..2 {
            all.extend(
                layers.iter().map(|(n, shape)| (format!("model.layers.{i}.{n}.weight"), shape.clone())),
            );
        }
        all
    };
    let mut layers = vec![
        ("self_attn.q_proj", vec![8, 6]),
        ("self_attn.k_proj", vec![4, 6]),
        ("self_attn.v_proj", vec![4, 6]),
        ("self_attn.o_proj", vec![6, 8]),
        ("mlp.gate_proj", vec![10, 6]),
        ("mlp.up_proj", vec![10, 6]),
        ("mlp.down_proj", vec![6, 10]),
        ("input_layernorm", vec![6]),
        ("post_attention_layernorm", vec![6]),
    ];
    assert_eq!(names("gemma"), own(&layers));
    layers.extend([("pre_feedforward_layernorm", vec![6]), ("post_feedforward_layernorm", vec![6])]);
    assert_eq!(names("gemma2"), own(&layers));
    layers.extend([("self_attn.q_norm", vec![2]), ("self_attn.k_norm", vec![2])]);
    assert_eq!(names("gemma3_text"), own(&layers));
    // The second layer is global: heads twice as wide, one for keys, and none for values.
    let mut four = own(&layers);
    four.remove("model.layers.1.self_attn.v_proj.weight");
    for (part, shape) in [
        ("q_proj", vec![16, 6]),
        ("k_proj", vec![4, 6]),
        ("o_proj", vec![6, 16]),
        ("q_norm", vec![4]),
        ("k_norm", vec![4]),
    ] {
        four.insert(format!("model.layers.1.self_attn.{part}.weight"), shape);
    }
    assert_eq!(names("gemma4_text"), four);
    for layer in 0..2 {
        for (part, shape) in [
            ("router.scale", vec![6]),
            ("router.proj.weight", vec![3, 6]),
            ("router.per_expert_scale", vec![3]),
            ("experts.gate_up_proj", vec![3, 10, 6]),
            ("experts.down_proj", vec![3, 6, 5]),
            ("pre_feedforward_layernorm_2.weight", vec![6]),
            ("post_feedforward_layernorm_1.weight", vec![6]),
            ("post_feedforward_layernorm_2.weight", vec![6]),
        ] {
            four.insert(format!("model.layers.{layer}.{part}"), shape);
        }
    }
    assert_eq!(names("gemma4_moe"), four);
    let frozen = params::frozen(&config(&tiny("gemma4_text")));
    assert_eq!(frozen, [0, 1].map(|l| (format!("model.layers.{l}.layer_scalar"), vec![1])));
    assert_eq!(params::frozen(&config(&tiny("gemma3_text"))), []);

    // One name, two places.
    let name = |spec: &ParamSpec| spec.name.clone();
    let first = |family: &str| params::plan(&config(&tiny(family))).map(name).layers.swap_remove(0);
    let one = first("gemma");
    assert_eq!(one.mlp_pre_norm, "model.layers.0.post_attention_layernorm.weight");
    assert_eq!((one.attn_post_norm, one.mlp_post_norm, one.q_norm), (None, None, None));
    let two = first("gemma2");
    assert_eq!(two.attn_post_norm.unwrap(), "model.layers.0.post_attention_layernorm.weight");
    assert_eq!(two.mlp_pre_norm, "model.layers.0.pre_feedforward_layernorm.weight");
}

#[test]
fn every_view_of_the_parameters_has_one_order() {
    for (family, layers) in [
        ("gemma", 2 * 9),
        ("gemma2", 2 * 11),
        ("gemma3_text", 2 * 13),
        ("gemma4_text", 13 + 12),
        ("gemma4_moe", 41),
    ] {
        let mut plan = params::plan(&config(&tiny(family)));
        let shared: Vec<String> = plan.tensors().iter().map(|s| s.name.clone()).collect();
        let unique: Vec<String> = plan.tensors_mut().iter().map(|s| s.name.clone()).collect();
        assert_eq!(shared, unique);
        assert_eq!(shared.len(), 2 + layers);
    }
}

#[test]
fn saving_and_loading_change_no_bit() {
    for (family, dtype) in [
        ("gemma", Dtype::F32),
        ("gemma2", Dtype::BF16),
        ("gemma3_text", Dtype::BF16),
        ("gemma4_text", Dtype::F32),
        ("gemma4_moe", Dtype::BF16),
    ] {
        let root = tempfile::tempdir().unwrap();
        let (source, out) = (root.path().join("source"), root.path().join("out"));
        std::fs::create_dir(&source).unwrap();
        let json = tiny(family);
        let stored = tensors(&config(&json), dtype);
        write_model(&source, &json, &stored);
        std::fs::write(source.join("tokenizer.json"), "any bytes \u{e9}").unwrap();
        std::fs::write(source.join("diary.txt"), "not the model's").unwrap();

        let file = ConfigFile::open(&source).unwrap();
        let loaded = params::load(&Cpu::F32, &file.gemma, &Checkpoint::open(&source).unwrap(), None).unwrap();
        model_dir::save(&Cpu::F32, &file, &loaded, &source, &out).unwrap();

        assert_eq!(entries(&out), ["config.json", "model.safetensors", "tokenizer.json"]);
        assert_eq!(std::fs::read(out.join("tokenizer.json")).unwrap(), "any bytes \u{e9}".as_bytes());
        let mut expected = json.clone();
        expected["torch_dtype"] = json!(if dtype == Dtype::F32 { "float32" } else { "bfloat16" });
        let saved: Value = serde_json::from_slice(&std::fs::read(out.join("config.json")).unwrap()).unwrap();
        assert_eq!(saved, expected);
        let checkpoint = Checkpoint::open(&out).unwrap();
        let names: Vec<&str> = stored.keys().map(String::as_str).collect();
        assert_eq!(checkpoint.names().collect::<Vec<_>>(), names);
        for (name, (dtype, shape, bytes)) in &stored {
            let view = checkpoint.tensor(name).unwrap();
            assert_eq!((view.dtype, view.shape, view.bytes), (*dtype, &shape[..], &bytes[..]), "{name}");
        }
        // Onto itself: a second save replaces the first.
        model_dir::save(&Cpu::F32, &file, &loaded, &source, &out).unwrap();
        // But never the directory that holds somebody's other file.
        let problem = model_dir::save(&Cpu::F32, &file, &loaded, &source, &source).unwrap_err().to_string();
        assert!(problem.contains("\"diary.txt\""), "{problem}");
    }
}

/// A vision-and-text model, in either naming: its text part is a text model, and what is saved is the same checkpoint with
/// other numbers in that part.
#[test]
fn a_wrapper_keeps_its_other_parts() {
    for name in ["gemma3_wrapper", "gemma4_wrapper"] {
        wrapped(name);
    }
}

fn wrapped(name: &str) {
    let golden = crate::tiny::dir(name);
    let file = ConfigFile::open(&golden).unwrap();
    let stored = Checkpoint::open(&golden).unwrap();
    let old = |name: &str| match name.strip_prefix("model.language_model.") {
        Some(rest) => format!("language_model.model.{rest}"),
        None => name.replacen("model.", "", 1),
    };
    for rename in [&(|name: &str| name.to_owned()) as &dyn Fn(&str) -> String, &old] {
        let root = tempfile::tempdir().unwrap();
        let (source, out) = (root.path().join("source"), root.path().join("out"));
        std::fs::create_dir(&source).unwrap();
        let mut all: Tensors = stored
            .names()
            .map(|name| {
                let view = stored.tensor(name).unwrap();
                (rename(name), (view.dtype, view.shape.to_vec(), view.bytes.to_vec()))
            })
            .collect();
        // Another type than the text part's, as towers may have.
        let (name, tower) = all.iter_mut().find(|(name, _)| name.contains("vision_tower")).unwrap();
        assert_eq!(tower.0, Dtype::F32);
        let name = name.clone();
        *tower = in_type(tower, Dtype::F16);
        write_model(
            &source,
            &serde_json::from_slice(&std::fs::read(golden.join("config.json")).unwrap()).unwrap(),
            &all,
        );
        std::fs::write(source.join("preprocessor_config.json"), "{}").unwrap();

        let weights = open_weights(&source, &file).unwrap();
        let text: Vec<&str> = weights.names().collect();
        assert!(text.iter().all(|name| name.starts_with("model.layers.") || !name.contains("layers.")));
        assert_eq!(text.len() + weights.others().count(), all.len());
        let mut params = params::load(&Cpu::F32, &file.gemma, &weights, None).unwrap();
        let final_norm = params.final_norm.as_f32_mut();
        final_norm[0] += 1.0;
        let changed: Vec<u8> = final_norm.iter().flat_map(|x| x.to_le_bytes()).collect();
        model_dir::save(&Cpu::F32, &file, &params, &source, &out).unwrap();

        assert_eq!(entries(&out), ["config.json", "model.safetensors", "preprocessor_config.json"]);
        let saved = Checkpoint::open(&out).unwrap();
        assert_eq!(saved.names().collect::<Vec<_>>(), all.keys().collect::<Vec<_>>());
        assert_eq!(saved.tensor(&name).unwrap().dtype, Dtype::F16);
        for (name, (dtype, shape, bytes)) in &all {
            let view = saved.tensor(name).unwrap();
            let trained = *name == rename("model.language_model.norm.weight");
            let bytes = if trained { &changed } else { bytes };
            assert_eq!((view.dtype, view.shape, view.bytes), (*dtype, &shape[..], &bytes[..]), "{name}");
        }
        // What was saved is such a model again.
        let again = ConfigFile::open(&out).unwrap();
        assert_eq!((again.wrapped, &again.gemma), (true, &file.gemma));
        let loaded: Params<Tensor> =
            params::load(&Cpu::F32, &again.gemma, &open_weights(&out, &again).unwrap(), None).unwrap();
        assert_eq!(loaded, params);

        let mut text = Vec::new();
        inspect::report(&inspect::Args { dir: out, tensors: true }, &mut text).unwrap();
        let text = String::from_utf8(text).unwrap();
        let frozen = params::frozen(&file.gemma).len();
        let others = all.len() - params.tensors().len() - frozen;
        assert!(text.contains(&format!("beside it    {others} tensors of other parts, ")), "{text}");
        assert_eq!(text.matches("\nbeside it    ").count(), 1 + others, "{text}");
        assert!(text.contains("\ntensor       model.norm.weight F32 [40]\n"), "{text}");
    }
}

/// What training leaves is saved in the type that it is computed with, so that a run that resumes computes the same.
#[test]
fn what_training_leaves_is_saved_as_it_was_computed_with() {
    let source = crate::tiny::dir("gemma4_e");
    let file = ConfigFile::open(&source).unwrap();
    let stored = Checkpoint::open(&source).unwrap();
    for dtype in [DType::F32, DType::Bf16] {
        let params = params::load(&Cpu::F32, &file.gemma, &stored, Some(dtype)).unwrap();
        let frozen = params::load_frozen(&Cpu::F32, &file.gemma, &stored, Some(dtype), false);
        assert_eq!(Cpu::F32.dtype(frozen.per_layer_embed.as_ref().unwrap()), dtype);
        let out = tempfile::tempdir().unwrap();
        let out = out.path().join("model");
        model_dir::save(&Cpu::F32, &file, &params, &source, &out).unwrap();
        let saved = Checkpoint::open(&out).unwrap();
        assert_eq!(params::load(&Cpu::F32, &file.gemma, &saved, None).unwrap(), params);
        assert_eq!(params::load_frozen(&Cpu::F32, &file.gemma, &saved, None, false), frozen);
        // Nobody reads keys of layers that share, and nobody saves them.
        assert!(stored.names().any(|name| name == "model.layers.4.self_attn.k_proj.weight"));
        assert!(saved.names().all(|name| name != "model.layers.4.self_attn.k_proj.weight"));
    }
}

#[test]
fn loading_converts_on_request() {
    let json = tiny("gemma3_text");
    let config = config(&json);
    let load = |stored: Dtype, dtype| {
        let dir = tempfile::tempdir().unwrap();
        write_model(dir.path(), &json, &tensors(&config, stored));
        let loaded: Params<Tensor> =
            params::load(&Cpu::F32, &config, &Checkpoint::open(dir.path()).unwrap(), dtype).unwrap();
        assert_eq!((loaded.final_norm.rows, loaded.final_norm.cols), (1, 6));
        (loaded.embed.dtype(), Cpu::F32.download(&loaded.embed))
    };
    let f32s =
        |bytes: &[u8]| bytes.chunks(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect::<Vec<_>>();
    let bf16s = |bytes: &[u8]| {
        bytes.chunks(2).map(|b| bf16::from_le_bytes(b.try_into().unwrap())).collect::<Vec<_>>()
    };
    let source = |n: usize| ((n + 1) as f32 * 0.37).sin() * 0.01;

    let (dtype, wide) = load(Dtype::F32, None);
    assert_eq!((dtype, f32s(&wide)), (DType::F32, (0..66).map(source).collect()));
    let (dtype, narrow) = load(Dtype::F32, Some(DType::Bf16));
    assert_eq!((dtype, bf16s(&narrow)), (DType::Bf16, (0..66).map(|n| bf16::from_f32(source(n))).collect()));
    let (dtype, bytes) = load(Dtype::BF16, None);
    assert_eq!((dtype, &bytes), (DType::Bf16, &narrow));
    let (dtype, bytes) = load(Dtype::BF16, Some(DType::F32));
    assert_eq!(
        (dtype, f32s(&bytes)),
        (DType::F32, (0..66).map(|n| bf16::from_f32(source(n)).to_f32()).collect())
    );
    let (dtype, bytes) = load(Dtype::F16, None);
    assert_eq!(
        (dtype, f32s(&bytes)),
        (DType::F32, (0..66).map(|n| f16::from_f32(source(n)).to_f32()).collect())
    );
    let twice = |n| bf16::from_f32(f16::from_f32(source(n)).to_f32());
    let (dtype, bytes) = load(Dtype::F16, Some(DType::Bf16));
    assert_eq!((dtype, bf16s(&bytes)), (DType::Bf16, (0..66).map(twice).collect()));
}

#[test]
fn zeros_have_the_shapes_and_f32() {
    let json = tiny("gemma2");
    let config = config(&json);
    let dir = tempfile::tempdir().unwrap();
    write_model(dir.path(), &json, &tensors(&config, Dtype::BF16));
    let loaded = params::load(&Cpu::F32, &config, &Checkpoint::open(dir.path()).unwrap(), None).unwrap();
    let zeros = loaded.zeros_like(&Cpu::F32);
    for (zero, tensor) in zeros.tensors().into_iter().zip(loaded.tensors()) {
        assert_eq!((zero.dtype(), zero.rows, zero.cols), (DType::F32, tensor.rows, tensor.cols));
        assert!(zero.as_f32().iter().all(|&x| x == 0.0));
    }
}

#[test]
fn one_error_lists_all_that_differs() {
    let json = tiny("gemma3_text");
    let config = config(&json);
    let dir = tempfile::tempdir().unwrap();
    let mut stored = tensors(&config, Dtype::F32);
    stored.remove("model.layers.1.mlp.up_proj.weight").unwrap();
    stored.insert("model.layers.0.self_attn.q_proj.weight".into(), (Dtype::F32, vec![6, 8], vec![0; 192]));
    stored.insert("model.norm.weight".into(), (Dtype::I8, vec![6], vec![0; 6]));
    stored.insert("model.layers.2.mlp.up_proj.weight".into(), (Dtype::F32, vec![1], vec![0; 4]));
    write_model(dir.path(), &json, &stored);
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    let error = params::load(&Cpu::F32, &config, &checkpoint, None).unwrap_err();
    assert_eq!(
        error.mismatches,
        [
            Mismatch::Shape {
                name: "model.layers.0.self_attn.q_proj.weight".into(),
                expected: vec![8, 6],
                found: vec![6, 8]
            },
            Mismatch::Missing { name: "model.layers.1.mlp.up_proj.weight".into(), expected: vec![10, 6] },
            Mismatch::DType { name: "model.norm.weight".into(), found: Dtype::I8 },
            Mismatch::Extra { name: "model.layers.2.mlp.up_proj.weight".into(), found: vec![1] },
        ]
    );
    let text = error.to_string();
    assert!(
        text.contains("model.safetensors: not the model of config.json beside it; tensors that differ: 4\n"),
        "{text}"
    );
    assert!(
        text.contains("\n  model.layers.0.self_attn.q_proj.weight: expected [8, 6], found [6, 8]"),
        "{text}"
    );
}

#[test]
fn a_second_copy_of_the_tied_head_must_be_a_copy() {
    let json = tiny("gemma");
    let config = config(&json);
    let dir = tempfile::tempdir().unwrap();
    let mut stored = tensors(&config, Dtype::BF16);
    let mut head = stored["model.embed_tokens.weight"].clone();
    stored.insert("lm_head.weight".into(), head.clone());
    write_model(dir.path(), &json, &stored);
    params::load(&Cpu::F32, &config, &Checkpoint::open(dir.path()).unwrap(), None).unwrap();
    head.2[0] ^= 1;
    stored.insert("lm_head.weight".into(), head);
    write_model(dir.path(), &json, &stored);
    let error = params::load(&Cpu::F32, &config, &Checkpoint::open(dir.path()).unwrap(), None).unwrap_err();
    assert_eq!(error.mismatches, [Mismatch::UntiedHead]);
}

// ---- inspect ----

#[test]
fn inspect_describes_the_model() {
    let dir = tempfile::tempdir().unwrap();
    let mut json = tiny("gemma3_text");
    json["num_hidden_layers"] = json!(8);
    json["rope_scaling"] = json!({ "rope_type": "linear", "factor": 8.0 });
    write_model(dir.path(), &json, &tensors(&config(&json), Dtype::BF16));
    let report = |dir: PathBuf, tensors| {
        let mut out = Vec::new();
        inspect::report(&inspect::Args { dir, tensors }, &mut out).map(|()| String::from_utf8(out).unwrap())
    };
    let text = report(dir.path().to_owned(), false).unwrap();
    // 66 + 8 layers of 2 * 48 + 2 * 24 + 3 * 60 + 4 * 6 + 2 * 2, and 6.
    for expected in [
        "family       gemma3_text\n",
        "shape        L 8, D 6, H 4, K 2, Dh 2, F 10, V 11, context 131072\n",
        "layers       0-4, 6-7: see a window of 4096, RoPE base 10000\n",
        "layers       5: see everything before, RoPE base 1000000, positions / 8\n",
        "norms        before and after attention and MLP, of q and k heads, times 1 + w; eps 1e-6\n",
        "parameters   2888 (66 embedding, 2822 other)\n",
        "stored as    BF16, 0.0 MB\n",
        "special      no tokenizer.json",
        "responses    end at token [1]\n",
    ] {
        assert!(text.contains(expected), "{expected}{text}");
    }
    assert!(!text.contains("tensor  "));
    let text = report(dir.path().to_owned(), true).unwrap();
    assert_eq!(text.matches("\ntensor  ").count(), 2 + 8 * 13);
    assert!(text.contains("tensor       model.layers.7.self_attn.o_proj.weight BF16 [6, 8]\n"), "{text}");

    std::fs::write(dir.path().join("model.safetensors"), "").unwrap();
    let problem = format!("{:#}", report(dir.path().to_owned(), false).unwrap_err());
    assert!(problem.contains("model.safetensors: not a whole safetensors file (0 bytes)"), "{problem}");
}

// ---- what is nearly the model ----

/// Loads tensors beside a configuration: the parameters' bytes, or the error.
fn loaded(json: &Value, stored: &Tensors) -> Result<Vec<Vec<u8>>, params::LoadError> {
    let dir = tempfile::tempdir().unwrap();
    write_model(dir.path(), json, stored);
    let params = params::load(&Cpu::F32, &config(json), &Checkpoint::open(dir.path()).unwrap(), None)?;
    Ok(params.tensors().into_iter().map(|t| Cpu::F32.download(t)).collect())
}

/// The elements in another type.
fn in_type((from, shape, bytes): &(Dtype, Vec<usize>, Vec<u8>), to: Dtype) -> (Dtype, Vec<usize>, Vec<u8>) {
    let read = |b: &[u8]| match from {
        Dtype::F32 => f32::from_le_bytes(b.try_into().unwrap()),
        Dtype::BF16 => bf16::from_le_bytes(b.try_into().unwrap()).to_f32(),
        _ => f16::from_le_bytes(b.try_into().unwrap()).to_f32(),
    };
    let write = |x: f32| match to {
        Dtype::F32 => x.to_le_bytes().to_vec(),
        Dtype::BF16 => bf16::from_f32(x).to_le_bytes().to_vec(),
        _ => f16::from_f32(x).to_le_bytes().to_vec(),
    };
    (to, shape.clone(), bytes.chunks(from.bitsize() / 8).flat_map(|b| write(read(b))).collect())
}

#[test]
fn what_cannot_matter_does_not_stop_a_load() {
    const EMBED: &str = "model.embed_tokens.weight";
    let json = tiny("gemma3_text");
    for stored_as in [Dtype::F32, Dtype::BF16] {
        let stored = tensors(&config(&json), stored_as);
        let expected = loaded(&json, &stored).unwrap();
        let with = |name: &str, tensor: (Dtype, Vec<usize>, Vec<u8>)| {
            let mut stored = stored.clone();
            stored.insert(name.into(), tensor);
            stored
        };
        let padded = |tensor: &(Dtype, Vec<usize>, Vec<u8>), rows: usize| {
            let (dtype, shape, mut bytes) = tensor.clone();
            bytes.resize(bytes.len() / shape[0] * rows, 0x3f);
            (dtype, vec![rows, shape[1]], bytes)
        };
        let mut harmless =
            vec![with(EMBED, padded(&stored[EMBED], 12)), with(EMBED, padded(&stored[EMBED], 11 + 1023))];
        for dtype in [Dtype::F32, Dtype::BF16, Dtype::F16] {
            // bf16 has exponents that f16 has not, and bits that f16 drops.
            if (stored_as, dtype) != (Dtype::BF16, Dtype::F16) {
                let head = in_type(&stored[EMBED], dtype);
                harmless.push(with("lm_head.weight", padded(&head, 64)));
                harmless.push(with("lm_head.weight", head));
            }
        }
        for buffer in [
            "model.rotary_emb.inv_freq",
            "model.rotary_emb_local.inv_freq",
            "model.layers.1.self_attn.rotary_emb.inv_freq",
            "model.rotary_emb.full_attention_inv_freq",
            "model.rotary_emb.sliding_attention_original_inv_freq",
            "model.embed_tokens.embed_scale",
            "model.position_ids",
        ] {
            harmless.push(with(buffer, (Dtype::F32, vec![3], vec![0; 12])));
        }
        for stored in &harmless {
            assert!(loaded(&json, stored).unwrap() == expected, "{:?}", stored.keys());
        }

        // A head of its own, rows that are missing, and more spare ones than any tool leaves.
        let mut head = in_type(&stored[EMBED], Dtype::F32);
        head.2[43] ^= 0x01;
        let mismatches = loaded(&json, &with("lm_head.weight", head)).unwrap_err().mismatches;
        assert_eq!(mismatches, [Mismatch::UntiedHead]);
        for rows in [10, 11 + 1024] {
            let error = loaded(&json, &with(EMBED, padded(&stored[EMBED], rows))).unwrap_err();
            assert!(matches!(error.mismatches[..], [Mismatch::Shape { .. }]), "{error}");
        }
    }
}

#[test]
fn masters_start_from_a_padded_embedding() {
    let json = tiny("gemma");
    let mut stored = tensors(&config(&json), Dtype::F32);
    let embed = stored.get_mut("model.embed_tokens.weight").unwrap();
    let wide = embed.2.clone();
    embed.1[0] += 5;
    embed.2.resize(wide.len() + 5 * 6 * 4, 1);
    let dir = tempfile::tempdir().unwrap();
    write_model(dir.path(), &json, &stored);
    let (checkpoint, plan) = (Checkpoint::open(dir.path()).unwrap(), params::plan(&config(&json)));
    assert_eq!(params::wider_than_bf16(&checkpoint, &plan.embed).unwrap(), wide);
}

/// Whatever differs in all tensors for one reason is told in one line with the reason and what to do.
#[test]
fn a_mismatch_with_one_cause_is_one_line() {
    let json = tiny("gemma3_text");
    let stored = tensors(&config(&json), Dtype::F32);
    let renamed = |rename: &dyn Fn(&str) -> String| -> Tensors {
        stored.iter().map(|(name, tensor)| (rename(name), tensor.clone())).collect()
    };
    let with = |name: &str| {
        let mut stored = stored.clone();
        stored.insert(name.into(), (Dtype::F32, vec![1], vec![0; 4]));
        stored
    };
    let mut vision = renamed(&|name| name.replacen("model.", "model.language_model.", 1));
    vision.insert("model.vision_tower.x.weight".into(), (Dtype::F32, vec![1], vec![0; 4]));
    let mut deeper = json.clone();
    deeper["num_hidden_layers"] = json!(5);
    let mut wider = json.clone();
    wider["hidden_size"] = json!(8);
    for (json, stored, words) in [
        (
            &json,
            renamed(&|name| format!("language_model.{name}")),
            &["the prefix `language_model.`", "vision-and-text"][..],
        ),
        (&json, renamed(&|name| format!("_orig_mod.{name}")), &["have the prefix `_orig_mod.`", "rename"]),
        (&json, renamed(&|name| format!("module.{name}")), &["have the prefix `module.`"]),
        (
            &json,
            renamed(&|name| name.replacen("model.", "", 1)),
            &["lack the prefix `model.`", "save_pretrained"],
        ),
        (
            &json,
            renamed(&|name| name.replacen("model.", "transformer.", 1)),
            &["`transformer.` where `model.`"],
        ),
        (&json, vision, &["`model.language_model.` where `model.` is expected", "vision-and-text"]),
        (
            &json,
            renamed(&|name| name.replace("layers.", "blk.").replace("model.", "")),
            &["none of the model's 28 tensors", "convert it"],
        ),
        (
            &json,
            with("base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"),
            &["a LoRA adapter's", "merge"],
        ),
        (&json, with("model.layers.0.mlp.up_proj.weight.absmax"), &["quantised weights", "bfloat16"]),
        (&deeper, stored.clone(), &["it has 2 layers", "num_hidden_layers = 5"]),
        (&wider, stored.clone(), &["the embedding is [11, 6]", "[11, 8]", "same model"]),
    ] {
        let text = loaded(json, &stored).unwrap_err().to_string();
        assert_eq!(text.lines().count(), 1, "{text}");
        assert!(text.contains("model.safetensors: "), "{text}");
        for word in words {
            assert!(text.contains(word), "no {word:?} in {text}");
        }
    }
    let shallow = tensors(&config(&deeper), Dtype::F32);
    let text = loaded(&json, &shallow).unwrap_err().to_string();
    assert!(text.contains("it has 5 layers") && text.contains("num_hidden_layers = 2"), "{text}");

    // Several causes: what differs in every layer is one line, and no list is long.
    let mut mixed = tensors(&config(&json), Dtype::F32);
    for layer in 0..2 {
        mixed.remove(&format!("model.layers.{layer}.self_attn.q_norm.weight")).unwrap();
        mixed.insert(format!("model.layers.{layer}.extra"), (Dtype::F32, vec![1], vec![0; 4]));
    }
    for i in 0..30 {
        mixed.insert(format!("other.{i}"), (Dtype::F32, vec![1], vec![0; 4]));
    }
    let text = loaded(&json, &mixed).unwrap_err().to_string();
    for words in [
        "tensors that differ: 34\n",
        "\n  model.layers.*.self_attn.q_norm.weight: missing, expected [2] (in 2 layers)\n",
        "\n  model.layers.*.extra: unknown, found [1] (in 2 layers)\n",
        "\n  and 20 more",
    ] {
        assert!(text.contains(words), "no {words:?} in {text}");
    }
    assert_eq!(text.lines().count(), 14, "{text}");
}
