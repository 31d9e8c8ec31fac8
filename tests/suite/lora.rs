//! Low-rank adapters: against PEFT on tiny models, on disk, in training, and what must be refused.

use std::collections::BTreeMap;
use std::path::Path;

use bon_engine::adapter::{ADAPTER_CONFIG, ADAPTER_WEIGHTS, AdapterFile, LoraSpec, merged, save};
use bon_engine::backend::cpu::{Cpu, Tensor};
use bon_engine::backend::{Backend, DType, Truncation};
use bon_engine::checkpoint::{Checkpoint, Dtype, TensorSpec, write_file_of};
use bon_engine::gemma::Gemma;
use bon_engine::gemma::lora::{Linear, begin, full_plan, upload};
use bon_engine::gemma::params::{ParamKind, TextNames};
use bon_engine::generate::{Prompt, Sampling, generate};
use bon_engine::model_dir::{ModelDir, Precision};
use bon_engine::train::config::OptimizerSection;
use bon_engine::train::optimizer::Optimizer;
use bon_engine::train::policy::{Continued, Forward};
use half::bf16;
use serde_json::{Value, json};

use crate::engine;
use crate::fixture::Fixture;
use crate::goldens::{Golden, mean_loss};
use crate::kernels::{compiled, vm};
use crate::ops::{bits, randoms};
use crate::rounded::Rounded;
use crate::tiny::{self, Groups};
use crate::tolerance::{EPS, Rule, assert_rule, assert_within, relative_error};

/// Adapters that PEFT made, each with the golden model that it is for.
pub(crate) const ADAPTERS: [(&str, &str); 3] =
    [("lora_gemma3", "gemma3"), ("lora_gemma4", "gemma4"), ("lora_wrapper", "gemma3_wrapper")];

/// That model with the adapter.
fn adapted(name: &str, base: &str) -> Gemma<Cpu> {
    let mut model = tiny::model(base, DType::F32);
    AdapterFile::open(&tiny::dir(name)).unwrap().load(&mut model).unwrap();
    model
}

/// What the golden file calls the gradient of a matrix.
fn golden_name(base: &str, parameter: &str) -> String {
    let inner = parameter.strip_prefix("model.").unwrap();
    let body = if base.ends_with("wrapper") { "model.language_model." } else { "model." };
    format!("grad.base_model.model.{body}{inner}")
}

/// A matrix without what its rank was filled up with, which must be zeros.
fn stripped(x: &Tensor, len: usize, is_a: bool) -> Vec<f32> {
    let data = x.as_f32();
    let columns = if is_a { x.cols } else { len / x.rows };
    let rows = len / columns;
    let mut kept = Vec::new();
    for (r, row) in data.chunks_exact(x.cols).enumerate() {
        let (own, filled) = row.split_at(if r < rows { columns } else { 0 });
        assert!(filled.iter().all(|x| *x == 0.0), "what a rank is filled up with stays zero");
        kept.extend_from_slice(own);
    }
    kept
}

#[test]
fn log_probs_loss_and_every_gradient_are_pefts() {
    for (name, base) in ADAPTERS {
        let (golden, model) = (Golden::open(name), adapted(name, base));
        let weights = vec![1.0 / golden.predicted() as f32; golden.predicted()];
        let (logprobs, grads) = golden.with_batch(|groups| tiny::gradient(&model, groups, 1.0, &weights));
        let (bound, want) = (golden.logprob_error(), golden.all("logprobs"));
        assert_within(&format!("{name}: log-probs"), &logprobs, &want, |i| bound + 2.0 * EPS * want[i].abs());
        let loss = [mean_loss(&logprobs) as f32];
        assert_within(&format!("{name}: loss"), &loss, &[golden.number("/loss")], |_| bound);
        let plan = full_plan(&model);
        let mut compared = 0;
        for (spec, grad) in plan.tensors().into_iter().zip(grads.tensors()) {
            if spec.kind != ParamKind::Adapter {
                assert_eq!(grad.rows, 0, "{name}: {} is not trained", spec.name);
                continue;
            }
            let want = golden.floats(&golden_name(base, &spec.name));
            let got = stripped(grad, want.len(), spec.name.contains("lora_A"));
            let (off, allowed) = (relative_error(&got, &want), golden.gradient_error());
            assert!(off <= allowed, "{name}: grad.{} is off by {off:e}, allowed {allowed:e}", spec.name);
            compared += 1;
        }
        let stored = Checkpoint::open_file(&tiny::dir(name).join(ADAPTER_WEIGHTS)).unwrap();
        assert_eq!(compared, stored.names().count(), "{name}: matrices");
    }
}

#[test]
fn ten_updates_of_adamw_are_pefts() {
    for (name, base) in ADAPTERS {
        let (golden, mut model) = (Golden::open(name), adapted(name, base));
        let of = |key: &str| golden.number(&format!("/adamw/{key}"));
        let section = golden.adamw();
        let weights = vec![1.0 / golden.predicted() as f32; golden.predicted()];
        let base_before: Vec<Vec<u32>> =
            tiny::model(base, DType::F32).params.tensors().into_iter().map(bits).collect();
        let mut optimizer = Optimizer::new(&model, &section, 0);
        for k in 0..=of("updates") as u64 {
            let forward = golden.with_batch(|groups| Forward::new(&model, groups, 1.0));
            let (got, want) = (mean_loss(&forward.logprobs), of(&format!("losses/{k}")));
            // As in `goldens::ten_updates_of_adamw`.
            let way = 4.0 * golden.gradient_error() * (of("losses/0") - want);
            let bound = golden.logprob_error() + way;
            assert!((got - want).abs() <= bound, "{name}: loss {k} is {got}, want {want}, allowed {bound:e}");
            if k < of("updates") as u64 {
                forward.backward(&model, &weights, &mut optimizer.grads);
                optimizer.step(&mut model, &section, section.lr, k + 1).unwrap();
            }
        }
        let plan = full_plan(&model);
        let own = plan.tensors().into_iter().zip(model.params.tensors());
        let own = own.filter(|(spec, _)| spec.kind != ParamKind::Adapter).map(|(_, tensor)| bits(tensor));
        assert_eq!(own.collect::<Vec<_>>(), base_before, "{name}: the model's own weights stay");
    }
}

#[test]
fn a_merged_model_is_the_adapted_one() {
    for (name, base) in ADAPTERS {
        let golden = Golden::open(name);
        let merged = merged(adapted(name, base));
        assert!(merged.params.layers.iter().all(|layer| layer.adapters.iter().all(Option::is_none)));
        let got = golden.with_batch(|groups| Forward::new(&merged, groups, 1.0).logprobs);
        let (bound, want) = (golden.logprob_error(), golden.all("logprobs"));
        assert_within(&format!("{name}: merged"), &got, &want, |i| bound + 2.0 * EPS * want[i].abs());

        // With weights in bf16, to which the sum is rounded: no worse than PEFT's own model in bf16.
        let mut in_bf16 = tiny::model(base, DType::Bf16);
        AdapterFile::open(&tiny::dir(name)).unwrap().load(&mut in_bf16).unwrap();
        let in_bf16 = bon_engine::adapter::merged(in_bf16);
        let got = golden.with_batch(|groups| Forward::new(&in_bf16, groups, 1.0).logprobs);
        let worst = got.iter().zip(&want).map(|(g, w)| (f64::from(*g) - w).abs()).fold(0.0, f64::max);
        let allowed = 2.0 * golden.number("/bf16_logprob_error/max");
        assert!(worst <= allowed, "{name}: merged in bf16 is off by {worst}, allowed {allowed}");
    }
}

/// The program's own directories are read to the same bits, and describe themselves as PEFT's do.
#[test]
fn saving_and_loading_change_no_bit() {
    for (name, base) in ADAPTERS {
        let root = tempfile::tempdir().unwrap();
        let out = root.path().join("adapter");
        let (model, file) = (adapted(name, base), AdapterFile::open(&tiny::dir(name)).unwrap());
        let names =
            TextNames::of(&Checkpoint::open(&tiny::dir(base)).unwrap()).filter(|_| base.ends_with("wrapper"));
        save(&model, &file.spec, Path::new(base), names, &out).unwrap();
        let mut again = tiny::model(base, DType::F32);
        let saved = AdapterFile::open(&out).unwrap();
        assert_eq!(saved.spec, file.spec, "{name}");
        saved.load(&mut again).unwrap();
        let all = |model: &Gemma<Cpu>| model.params.tensors().into_iter().map(bits).collect::<Vec<_>>();
        assert!(all(&again) == all(&model) && again.adapter_scale == model.adapter_scale, "{name}");

        let stored = |dir: &Path| {
            let weights = Checkpoint::open_file(&dir.join(ADAPTER_WEIGHTS)).unwrap();
            let read = |name: &str| (name.to_owned(), weights.tensor(name).unwrap().bytes.to_vec());
            weights.names().map(read).collect::<BTreeMap<_, _>>()
        };
        assert!(stored(&out) == stored(&tiny::dir(name)), "{name}: PEFT's names, shapes and bytes");
        let json: Value = serde_json::from_slice(&std::fs::read(out.join(ADAPTER_CONFIG)).unwrap()).unwrap();
        let modules: Vec<&str> =
            json["target_modules"].as_array().unwrap().iter().map(|m| m.as_str().unwrap()).collect();
        match name {
            "lora_gemma3" => assert_eq!(modules, Linear::ALL.map(Linear::name)),
            "lora_gemma4" => assert_eq!(modules, ["k_proj", "v_proj", "o_proj", "up_proj"]),
            // Layer 1 has none, and the vision tower has modules of the same name.
            _ => assert_eq!(
                modules,
                [
                    "language_model.layers.0.self_attn.q_proj",
                    "language_model.layers.0.mlp.down_proj",
                    "language_model.layers.2.self_attn.q_proj",
                    "language_model.layers.2.mlp.down_proj"
                ]
            ),
        }
    }
}

/// New adapters leave the model as it is, whatever they are on, and what is sampled is what training sees.
#[test]
fn new_adapters_change_nothing_and_sampling_agrees_with_training() {
    let spec = LoraSpec { rank: 3, ..LoraSpec::default() };
    for kind in tiny::KINDS {
        for name in tiny::NAMES {
            let groups = Groups::few_shot();
            let logprobs =
                |model: &Gemma<Cpu>| groups.with(|groups| Forward::new(model, groups, 0.7).logprobs);
            let mut model = tiny::model_of(name, kind);
            let before = logprobs(&model);
            begin(&mut model, spec.rank, &spec.targets, 5);
            model.adapter_scale = Some(spec.scale());
            assert_eq!(logprobs(&model), before, "{name}");
            // With other adapters than such that change nothing.
            for layer in &mut model.params.layers {
                for (i, adapter) in layer.adapters.iter_mut().flatten().enumerate() {
                    let (b, cols) = (&mut adapter.b, adapter.a.rows);
                    let values = randoms(i as u32, b.rows * spec.rank);
                    for (row, values) in
                        b.as_f32_mut().chunks_exact_mut(cols).zip(values.chunks_exact(spec.rank))
                    {
                        row[..spec.rank].iter_mut().zip(values).for_each(|(to, x)| *to = 0.2 * x);
                    }
                }
            }
            assert_ne!(logprobs(&model), before, "{name}");
            assert_eq!(sampling_gap(&model), 0.0, "{name}");
            // Switched off, they are not there.
            model.adapter_scale = None;
            assert_eq!(logprobs(&model), before, "{name}");
        }
    }
}

/// A family's model with adapters that are not zero, the same on every backend.
fn family_model<B: Backend>(backend: B, family: &str) -> Gemma<B> {
    let mut model = engine::model(backend, &engine::config(family));
    let spec = LoraSpec { rank: 5, alpha: 7.0, ..LoraSpec::default() };
    let dtype = model.backend.activation_dtype();
    begin(&mut model, spec.rank, &spec.targets, 5);
    model.adapter_scale = Some(spec.scale());
    for layer in &mut model.params.layers {
        for (i, adapter) in layer.adapters.iter_mut().flatten().enumerate() {
            let ((held, _), (rows, _)) = (model.backend.shape(&adapter.a), model.backend.shape(&adapter.b));
            let mut values = vec![0.0; rows * held];
            let drawn = randoms(i as u32, rows * spec.rank);
            for (row, drawn) in values.chunks_exact_mut(held).zip(drawn.chunks_exact(spec.rank)) {
                row[..spec.rank]
                    .iter_mut()
                    .zip(drawn)
                    .for_each(|(to, x)| *to = bf16::from_f32(0.3 * x).to_f32());
            }
            let a = model.backend.to_f32(&adapter.a);
            let a: Vec<f32> = a.into_iter().map(|x| bf16::from_f32(x).to_f32()).collect();
            let (a_rows, a_cols) = model.backend.shape(&adapter.a);
            adapter.a = upload(&model.backend, dtype, a_rows, a_cols, &a);
            adapter.b = upload(&model.backend, dtype, rows, held, &values);
        }
    }
    model
}

/// Log-probs, and by name the gradient of every trained matrix.
fn step<B: Backend>(model: &Gemma<B>, weights: &[f32]) -> (Vec<f32>, Vec<(String, Vec<f32>)>) {
    let mut optimizer = Optimizer::new(model, &OptimizerSection::default(), 0);
    let forward = Groups::few_shot().with(|groups| Forward::new(model, groups, 0.7));
    let logprobs = forward.logprobs.clone();
    forward.backward(model, weights, &mut optimizer.grads);
    let plan = full_plan(model);
    let trained = plan.tensors().into_iter().zip(optimizer.grads.tensors());
    let trained = trained.filter(|(spec, _)| spec.kind == ParamKind::Adapter);
    let gradients = trained.map(|(spec, grad)| (spec.name.clone(), model.backend.to_f32(grad))).collect();
    model.backend.check().unwrap();
    (logprobs, gradients)
}

#[test]
fn a_step_of_adapters_on_the_kernels_is_the_cpus_within_bf16() {
    if !compiled() {
        return;
    }
    let weights = randoms(5, Groups::few_shot().predicted());
    for family in ["gemma2", "gemma4_text", "gemma4_e"] {
        let (exact, exact_grads) = step(&family_model(Cpu::F32, family), &weights);
        let (naive, naive_grads) = step(&family_model(Rounded, family), &weights);
        let model = family_model(vm(None), family);
        let (got, grads) = step(&model, &weights);
        assert_rule(&format!("{family}: log-probs"), Rule::Forward, &got, &exact, &naive);
        for (((name, got), (_, exact)), (_, naive)) in grads.iter().zip(&exact_grads).zip(&naive_grads) {
            assert!(exact.iter().any(|g| *g != 0.0), "{family}: {name}");
            assert_rule(&format!("{family}: {name}"), Rule::Backward, got, exact, naive);
        }
        assert_eq!(sampling_gap(&model), 0.0, "{family}");
    }
}

/// The largest difference between log-probs as sampled and as training computes them.
fn sampling_gap<B: Backend>(model: &Gemma<B>) -> f32 {
    let truncation = Truncation::default();
    let sampling = Sampling { temperature: 0.7, truncation, max_new_tokens: 5, seed: 3, step: 0 };
    let prompt = [&[2][..], &tiny::tokens(4, 11)].concat();
    let prompts = [Prompt { ids: &prompt, number: 0, streams: 3 }];
    let sampled = generate(model, &prompts, &sampling, |_| false, |_, _, _| {}).unwrap().remove(0);
    let responses: Vec<&[u32]> = sampled.iter().map(|r| r.tokens.as_slice()).collect();
    let trained = Forward::new(model, &[Continued { prompt: &prompt, responses: &responses }], 0.7);
    let drawn = sampled.iter().flat_map(|r| r.logprobs.iter());
    drawn.zip(&trained.logprobs).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

/// Writes an adapter directory of these settings and matrices.
fn write(dir: &Path, config: &Value, matrices: &[(&str, Vec<usize>, f32)]) {
    let _ = std::fs::remove_dir_all(dir);
    std::fs::create_dir_all(dir).unwrap();
    std::fs::write(dir.join(ADAPTER_CONFIG), config.to_string()).unwrap();
    let spec = |(name, shape, _): &(&str, Vec<usize>, f32)| TensorSpec {
        name: (*name).to_owned(),
        dtype: Dtype::F32,
        shape: shape.clone(),
    };
    let specs: Vec<TensorSpec> = matrices.iter().map(spec).collect();
    write_file_of(&dir.join(ADAPTER_WEIGHTS), &specs, |i| {
        let (_, shape, value) = &matrices[i];
        value.to_le_bytes().repeat(shape.iter().product()).into()
    })
    .unwrap();
}

#[test]
fn hostile_directories_are_refused_by_name() {
    let root = tempfile::tempdir().unwrap();
    let dir = root.path().join("adapter");
    let refusal = |dir: &Path| match AdapterFile::open(dir) {
        Err(e) => e.to_string(),
        Ok(file) => {
            let mut model = tiny::model("gemma3", DType::F32);
            let problem = file.load(&mut model).unwrap_err().to_string();
            assert!(
                model.adapter_scale.is_none() && model.params.layers[0].adapters.iter().all(Option::is_none)
            );
            problem
        }
    };
    assert!(refusal(&dir).contains("adapter: no adapter_config.json is there"));

    let good =
        json!({ "peft_type": "LORA", "r": 4, "lora_alpha": 8, "base_model_name_or_path": "google/gemma" });
    let q = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight";
    let q_b = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight";
    let pair = || vec![(q, vec![4, 40], 1.0), (q_b, vec![64, 4], 1.0)];
    write(&dir, &good, &pair());
    let mut model = tiny::model("gemma3", DType::F32);
    AdapterFile::open(&dir).unwrap().load(&mut model).unwrap();
    assert_eq!(model.adapter_scale, Some(2.0));

    for (field, value, expected) in [
        ("peft_type", json!("IA3"), "peft_type: \"IA3\"; the engine reads \"LORA\""),
        ("use_dora", json!(true), "use_dora: true is not supported"),
        ("bias", json!("all"), "bias: \"all\" is not supported"),
        ("modules_to_save", json!(["lm_head"]), "modules_to_save: [\"lm_head\"] is not supported"),
        ("rank_pattern", json!({ "q_proj": 8 }), "rank_pattern: {\"q_proj\":8} is not supported"),
        ("fan_in_fan_out", json!(1), "fan_in_fan_out: 1 is not supported"),
        (
            "init_lora_weights",
            json!("pissa_niter_4"),
            "init_lora_weights: \"pissa_niter_4\" changes the model's own",
        ),
        ("r", json!(0), "r: is 0; it must be from 1 to 4096"),
        ("r", json!(null), "r: missing"),
        ("r", json!(-1), "r: is 18446744073709551615"),
        ("lora_alpha", json!("x"), "lora_alpha: is NaN; it must be above 0"),
        ("lora_alpha", json!(1e300), "lora_alpha: is 1"),
        ("use_rslora", json!("yes"), "use_rslora: \"yes\" is neither true nor false"),
    ] {
        let mut config = good.clone();
        config[field] = value;
        write(&dir, &config, &pair());
        let problem = refusal(&dir);
        assert!(problem.contains(&format!("adapter_config.json: {expected}")), "{problem}");
    }
    std::fs::write(dir.join(ADAPTER_CONFIG), "[]").unwrap();
    assert!(refusal(&dir).contains("adapter_config.json: not a JSON object"));

    let head = "base_model.model.lm_head.lora_A.weight";
    let beyond = "base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight";
    for (matrices, expected) in [
        (vec![(q, vec![4, 40], 1.0)], "q_proj.lora_B.weight: missing beside the other of its pair"),
        (
            vec![(q, vec![4, 41], 1.0), (q_b, vec![64, 4], 1.0)],
            "lora_A.weight: expected [4, 40], found [4, 41]",
        ),
        (
            vec![(q, vec![5, 40], 1.0), (q_b, vec![64, 5], 1.0)],
            "lora_A.weight: expected [4, 40], found [5, 40]",
        ),
        (vec![(q, vec![4, 40], f32::NAN), (q_b, vec![64, 4], 1.0)], "lora_A.weight: element 0 is NaN"),
        (
            [pair(), vec![(head, vec![4, 40], 1.0)]].concat(),
            "lm_head.lora_A.weight: it changes the LM head, which is the embedding as well in this model; `bon-engine merge --untie`",
        ),
        (
            [pair(), vec![(beyond, vec![4, 40], 1.0)]].concat(),
            "layers.9.self_attn.q_proj.lora_A.weight: the model has no",
        ),
        (vec![], "it holds no matrices"),
    ] {
        write(&dir, &good, &matrices);
        let problem = refusal(&dir);
        assert!(
            problem.contains(expected) && problem.contains("(it says that it is of google/gemma)"),
            "{problem}"
        );
    }
    write(&dir, &good, &pair());
    std::fs::write(dir.join(ADAPTER_WEIGHTS), "short").unwrap();
    assert!(refusal(&dir).contains("adapter_model.safetensors: not a whole safetensors file"));
    std::fs::remove_file(dir.join(ADAPTER_WEIGHTS)).unwrap();
    assert!(refusal(&dir).contains("adapter_model.safetensors"));
}

/// The values of a matrix in a model directory.
fn stored(dir: &Path, name: &str) -> Vec<f32> {
    let checkpoint = Checkpoint::open(dir).unwrap();
    let stored = checkpoint.tensor(name).unwrap_or_else(|| panic!("no {name} in {}", dir.display()));
    assert_eq!(stored.dtype, Dtype::F32);
    bytemuck::pod_collect_to_vec(stored.bytes)
}

/// The matrix that is embedding and LM head becomes two where an adapter changes one of them, by request alone.
#[test]
fn an_adapter_of_the_head_or_of_the_embedding_unties_them() {
    let f = Fixture::new();
    let model = f.path("model");
    let json = std::fs::read(model.join("config.json")).unwrap();
    let json: Value = serde_json::from_slice(&json).unwrap();
    let size = |field: &str| json[field].as_u64().unwrap() as usize;
    let (v, d, r) = (size("vocab_size"), size("hidden_size"), 3);
    let embedding = "model.embed_tokens.weight";
    let base = stored(&model, embedding);
    let spec = json!({ "peft_type": "LORA", "r": r, "lora_alpha": 6 });
    let named = |name: &str, rows: usize, cols: usize, seed| {
        (format!("base_model.model.{name}"), vec![rows, cols], randoms(seed, rows * cols))
    };
    let q = size("num_attention_heads") * size("head_dim");
    let of_q = vec![
        named("model.layers.0.self_attn.q_proj.lora_A.weight", r, d, 1),
        named("model.layers.0.self_attn.q_proj.lora_B.weight", q, r, 2),
    ];
    let of_embedding = [
        named("model.embed_tokens.lora_embedding_A", r, v, 3),
        named("model.embed_tokens.lora_embedding_B", d, r, 4),
    ];
    let of_head = vec![named("lm_head.lora_A.weight", r, d, 5), named("lm_head.lora_B.weight", v, r, 6)];
    // PEFT saves it beside them.
    let copy = |name: &str, values: &[f32]| {
        (format!("base_model.model.{name}.base_layer.weight"), vec![v, d], values.to_vec())
    };
    let save = |spec: &Value, matrices: &[(String, Vec<usize>, Vec<f32>)]| {
        let dir = f.path("adapter");
        let _ = std::fs::remove_dir_all(&dir);
        std::fs::create_dir_all(&dir).unwrap();
        std::fs::write(dir.join(ADAPTER_CONFIG), spec.to_string()).unwrap();
        let specs = matrices.iter().map(|(name, shape, _)| TensorSpec {
            name: name.clone(),
            dtype: Dtype::F32,
            shape: shape.clone(),
        });
        let specs: Vec<TensorSpec> = specs.collect();
        write_file_of(&dir.join(ADAPTER_WEIGHTS), &specs, |i| {
            bytemuck::cast_slice::<f32, u8>(&matrices[i].2).into()
        })
        .unwrap();
    };
    let merge = ["merge", "--model", "model", "--adapter", "adapter", "--output"];
    save(&spec, &of_q);
    f.succeed(&[&merge[..], &["plain", "--untie"]].concat());
    assert!(
        Checkpoint::open(&f.path("plain")).unwrap().tensor("lm_head.weight").is_none(),
        "nothing is to be untied"
    );

    // The element in row t and column c, and its size: W + 2 sum_k up_kt down_kc.
    let expected =
        |up: &dyn Fn(usize, usize) -> f32, down: &dyn Fn(usize, usize) -> f32, t: usize, c: usize| {
            let products = (0..r).map(|k| 2.0 * f64::from(up(k, t)) * f64::from(down(k, c)));
            let w = f64::from(base[t * d + c]);
            products.fold((w, w.abs()), |(sum, size), x| (sum + x, size + x.abs()))
        };
    for (embeds, heads) in [(false, true), (true, false), (true, true)] {
        let mut all = of_q.clone();
        all.extend(of_embedding.iter().filter(|_| embeds).cloned());
        all.extend(of_head.iter().filter(|_| heads).cloned());
        all.extend(heads.then(|| copy("lm_head", &base)));
        all.extend(embeds.then(|| copy("model.embed_tokens", &base)));
        save(&spec, &all);
        let sample = ["sample", "--model", "model", "--adapter", "adapter", "--prompt", "1+1="];
        for refused in [&[&merge[..], &["refused"]].concat()[..], &sample] {
            let ran = f.run(refused);
            assert!(
                ran.code == Some(1) && ran.stderr.contains("`bon-engine merge --untie`"),
                "{}",
                ran.stderr
            );
        }
        f.succeed(&[&merge[..], &["merged", "--untie"]].concat());
        let merged = f.path("merged");
        for (name, changed, [a, b]) in [
            (embedding, embeds, [&of_embedding[0].2, &of_embedding[1].2]),
            ("lm_head.weight", heads, [&of_head[1].2, &of_head[0].2]),
        ] {
            let got = stored(&merged, name);
            if !changed {
                assert!(got == base, "{name} is as it was");
                continue;
            }
            assert!(got != base, "{name}");
            for (i, got) in got.iter().enumerate() {
                let (want, size) = match name {
                    // A is [r, V] and B [D, r] here,
                    _ if name == embedding => {
                        expected(&|k, t| a[k * v + t], &|k, c| b[c * r + k], i / d, i % d)
                    }
                    // and B [V, r] and A [r, D] there.
                    _ => expected(&|k, t| a[t * r + k], &|k, c| b[k * d + c], i / d, i % d),
                };
                // r products, sums and the factor round once each.
                let allowed = (2 * r + 2) as f64 * EPS * size;
                assert!((f64::from(*got) - want).abs() <= allowed, "{name}, element {i}: {got}, not {want}");
            }
        }
        let q = "model.layers.0.self_attn.q_proj.weight";
        assert!(stored(&merged, q) == stored(&f.path("plain"), q), "the rest is merged as ever");
        let told: Value =
            serde_json::from_slice(&std::fs::read(merged.join("config.json")).unwrap()).unwrap();
        assert_eq!(told["tie_word_embeddings"], json!(false));
        f.succeed(&["sample", "--model", "merged", "--prompt", "1+1=", "--max-new-tokens", "4"]);
        let model = ModelDir::open(Cpu::F32, &merged, Precision::default()).unwrap().model;
        let own = model.params.head.as_ref().expect("an LM head of its own");
        assert_eq!(own.as_f32(), stored(&merged, "lm_head.weight"));
        assert_eq!(model.params.embed.as_f32(), stored(&merged, embedding));
    }

    // A model that has both already: an adapter of its head changes that alone.
    save(&spec, &of_head);
    let ran = f.run(&["sample", "--model", "merged", "--adapter", "adapter", "--prompt", "1+1="]);
    assert!(ran.code == Some(1) && ran.stderr.contains("no adapters on the LM head"), "{}", ran.stderr);
    f.succeed(&["merge", "--model", "merged", "--adapter", "adapter", "--untie", "--output", "again"]);
    let [before, after] = ["merged", "again"].map(|dir| stored(&f.path(dir), "lm_head.weight"));
    for (i, (got, before)) in after.iter().zip(&before).enumerate() {
        let (up, down) = (&of_head[1].2, &of_head[0].2);
        let products = (0..r).map(|k| 2.0 * f64::from(up[i / d * r + k]) * f64::from(down[k * d + i % d]));
        let w = f64::from(*before);
        let (want, size) = products.fold((w, w.abs()), |(sum, size), x| (sum + x, size + x.abs()));
        let allowed = (2 * r + 2) as f64 * EPS * size;
        assert!((f64::from(*got) - want).abs() <= allowed, "element {i}: {got}, not {want}");
    }
    assert!(stored(&f.path("again"), embedding) == stored(&f.path("merged"), embedding));

    let other: Vec<f32> = base.iter().map(|x| x + 1.0).collect();
    let mut tied = spec.clone();
    tied["ensure_weight_tying"] = json!(true);
    for (spec, matrices, why) in [
        (&spec, vec![of_head[0].clone()], "lm_head.lora_B.weight: missing beside the other of its pair"),
        (
            &spec,
            vec![of_head[0].clone(), named("lm_head.lora_B.weight", v + 1, r, 1)],
            "lm_head.lora_B.weight: expected",
        ),
        (
            &spec,
            [of_head.clone(), vec![copy("lm_head", &other)]].concat(),
            "lm_head.base_layer.weight: differs from the model's LM head",
        ),
        (
            &tied,
            of_head.clone(),
            "adapter_config.json: the embedding and the LM head cannot be untied: ensure_weight_tying",
        ),
    ] {
        save(spec, &matrices);
        let ran = f.run(&[&merge[..], &["wrong", "--untie"]].concat());
        assert!(ran.code == Some(1) && ran.stderr.contains(why), "{why}: {}", ran.stderr);
        assert!(!f.path("wrong").exists());
    }
}

/// Trains, goes on, samples, evaluates and merges with the program.
#[test]
fn a_run_of_adapters_from_end_to_end() {
    let f = Fixture::new();
    let train = |output: &str, more: &[&str]| -> Vec<String> {
        let output = format!("train.output={output}");
        let set = [
            "lora.rank=3",
            "train.kl_coefficient=0.01",
            "train.updates_per_batch=2",
            "train.save_every=1",
            "train.steps=8",
            &output,
        ];
        let set = set.iter().chain(more).flat_map(|s| ["--set", *s]);
        ["train", "run.toml"].into_iter().chain(set).map(String::from).collect()
    };
    let run = |args: Vec<String>| f.run(&args.iter().map(String::as_str).collect::<Vec<_>>());
    let done = |args: Vec<String>| {
        let ran = run(args);
        assert_eq!(ran.code, Some(0), "{}", ran.stderr);
        ran
    };
    let before = std::fs::read(f.path("model/model.safetensors")).unwrap();
    let told = done(train("whole", &[])).stdout;
    assert!(told.ends_with("the adapter of model: whole/checkpoints/step-000008/model\n"), "{told}");
    done(train("parts", &["train.steps=3"]));
    let mut resumed = train("parts", &[]);
    resumed.push("--resume".into());
    done(resumed);
    let adapter = |run: &str| f.path(&format!("{run}/checkpoints/step-000008/model"));
    for file in [ADAPTER_CONFIG, ADAPTER_WEIGHTS] {
        let read = |run: &str| std::fs::read(adapter(run).join(file)).unwrap();
        assert!(read("whole") == read("parts"), "{file} of a resumed run");
    }
    let state = |run: &str| std::fs::read(adapter(run).with_file_name("optimizer.safetensors")).unwrap();
    assert!(state("whole") == state("parts"));
    assert!(std::fs::read(f.path("model/model.safetensors")).unwrap() == before, "the model stays as it is");
    // Nothing but two matrices for each of 7 maps in 2 layers, with their moments.
    let optimizer = Checkpoint::open_file(&adapter("whole").with_file_name("optimizer.safetensors")).unwrap();
    assert_eq!(optimizer.names().count(), 2 * 7 * 2 * 2);
    let metrics = std::fs::read_to_string(f.path("whole/metrics.jsonl")).unwrap();
    let mut moved = false;
    for line in metrics.lines() {
        let line: Value = serde_json::from_str(line).unwrap();
        assert_eq!(line["logprob_gap_max"], json!(0.0), "{line}");
        let kl = line["kl"].as_f64().unwrap();
        assert!((kl > 0.0) == moved, "the start is the model without adapters: {line}");
        moved |= line["grad_norm"].as_f64().unwrap() > 0.0;
    }
    assert!(moved);

    let sample = |more: &[&str]| {
        let args = ["sample", "--prompt", "1+1=", "--json", "-n", "8", "--max-new-tokens", "4", "--model"];
        f.succeed(&[&args[..], more].concat()).stdout
    };
    let dir = adapter("whole").display().to_string();
    let with = sample(&["model", "--adapter", &dir]);
    assert_ne!(with, sample(&["model"]));
    f.succeed(&["merge", "--model", "model", "--adapter", &dir, "--output", "merged"]);
    let texts = |lines: &str| -> Vec<Value> {
        lines.lines().map(|line| serde_json::from_str::<Value>(line).unwrap()["tokens"].clone()).collect()
    };
    assert_eq!(texts(&sample(&["merged"])), texts(&with), "the merged model draws the same tokens");
    let eval = |more: &[&str]| {
        let args = ["eval", "run.toml", "--samples", "2", "--tasks", "eval.jsonl", "--output", "report.json"];
        f.succeed(&[&args[..], more].concat());
        serde_json::from_slice::<Value>(&std::fs::read(f.path("report.json")).unwrap()).unwrap()
    };
    let (base, tuned) = (eval(&[]), eval(&["--adapter", &dir]));
    let weights = |report: &Value| report["provenance"]["settings"]["model.weights"].clone();
    assert!(weights(&base).is_string() && weights(&base) != weights(&tuned));

    // A run goes on with an adapter, if its settings are the adapter's.
    let from = format!("model.adapter={dir}");
    done(train("on", &[&from, "train.steps=1"]));
    for (more, expected) in [
        (&[&*from, "lora.rank=4"][..], "model.adapter: lora.rank is 4, the adapter's 3"),
        (&[&*from, "lora.alpha=1"], "model.adapter: lora.alpha and lora.rslora give a factor of"),
        (
            &[&*from, "lora.targets=[\"q_proj\"]"],
            "model.adapter: lora.targets are q_proj, the adapter's q_proj, k_proj",
        ),
        (&["model.adapter=nowhere"], "model.adapter: no directory at nowhere"),
        (&["lora.rank=0"], "lora.rank: is 0; it must be from 1 to 4096"),
        (&["lora.dropout=0.1"], "lora.dropout: is 0.1; only 0 is possible"),
        (&["lora.targets=[]"], "lora.targets: is empty"),
        (&["lora.targets=[\"lm_head\"]"], "lm_head"),
    ] {
        let ran = run(train("refused", more));
        assert!(ran.code == Some(1) && ran.stderr.contains(expected), "{expected}: {}", ran.stderr);
    }
    let ran = f.run(&["train", "run.toml", "--set", &from, "--set", "train.output=refused"]);
    assert!(ran.stderr.contains("model.adapter: is set without [lora]"), "{}", ran.stderr);
    let ran = f.run(&["sample", "--model", &dir, "--prompt", "x"]);
    assert!(
        ran.stderr.contains("is an adapter of model, not a model; give the model's directory"),
        "{}",
        ran.stderr
    );
    // Without the model, a run of adapters cannot go on.
    std::fs::rename(f.path("model"), f.path("elsewhere")).unwrap();
    let mut resumed = train("parts", &["train.steps=9"]);
    resumed.push("--resume".into());
    let ran = run(resumed);
    assert!(ran.stderr.contains("model.path: no directory at model"), "{}", ran.stderr);
}
