//! Plans of memory: what they say is what runs take.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use bon_engine::backend::DType;
use bon_engine::backend::cuda::Cuda;
use bon_engine::device::Device;
use bon_engine::gemma::config::ConfigFile;
use bon_engine::gemma::published;
use bon_engine::model_dir::{ComputeChoice, Precision};
use bon_engine::plan::{CONTEXT, Place, Plan, Purpose, Run};
use bon_engine::train::config::TrainConfig;

use crate::activations::Metered;
use crate::fixture::Fixture;
use crate::kernels::compiled;
use crate::prompts::prompts;
use crate::training::{Workplace, train_on};

#[test]
fn a_run_takes_what_its_plan_says() {
    if !compiled() {
        return;
    }
    let taken = |device: &Metered| [&device.peak, &device.host].map(|bytes| bytes.load(Ordering::Relaxed));
    runs_take_what_plans_say(|| Metered::new(u64::MAX), taken);
}

/// Runs on devices that `new` makes, and what these have then `taken` at most: of their memory, and of the host's.
pub(crate) fn runs_take_what_plans_say<D: Device + 'static>(
    new: impl Fn() -> Arc<D>,
    taken: impl Fn(&D) -> [u64; 2],
) {
    let place = Workplace::for_kernels();
    let small = [
        "optimizer.moments=8bit",
        "optimizer.embedding_moments=8bit",
        "optimizer.masters=false",
        "optimizer.gradients=bf16",
    ];
    // With a KL term all responses are trained on, and so they are with adapters, where the reference is no second model.
    for (name, settings) in [
        ("full", &["train.recompute=none"][..]),
        ("small", &[&["train.recompute=all"][..], &small].concat()),
        ("parts", &["train.recompute=none", "train.gradient_accumulation=2"]),
        ("lora", &["train.recompute=none", "lora.rank=4"]),
        ("offloaded", &["train.recompute=all", "optimizer.offload=true"]),
    ] {
        // Responses are as long as they may be in a run of the seeds that come first.
        let ([taken, on_host], config) = (0..40)
            .find_map(|seed| {
                let seed = format!("train.seed={seed}");
                let name = format!("{name}-{seed}");
                let all = [
                    settings,
                    &["train.steps=1", "generate.max_new_tokens=4", "train.kl_coefficient=0.1", &seed],
                ]
                .concat();
                let config = place.config(&name, &all);
                let device = new();
                let steps = train_on(Cuda::new(Box::new(Arc::clone(&device))).unwrap(), &config, false, 1);
                (steps[0].truncated_responses == 16).then_some((taken(&device), config))
            })
            .expect("a run without an end token");
        let file = ConfigFile::open(&config.model.path).unwrap();
        let prompts = prompts(&config, &file);
        let (model, config, prompts) = (&file.gemma, &config, &*prompts);
        let run =
            Run { model, dtype: DType::Bf16, config, prompts, purpose: Purpose::Train, reward_models: &[] };
        let plan = Plan::new(&run, Place::Gpu { memory: 1 << 30, driver: 0, host: None });
        assert!(plan.fits, "{plan}");
        let ratio = taken as f64 / plan.peak() as f64;
        assert!((0.95..=1.05).contains(&ratio), "{name}: {taken} bytes were taken, {ratio} of\n{plan}");
        assert_eq!(on_host, plan.host_bytes(), "{name}");
    }
}

pub(crate) fn config(overrides: &[&str]) -> TrainConfig {
    let text = r#"
        model.path = "m"
        data.tasks = "t"
        objective = { kind = "bon-rl-v", n = 32 }
        generate = { samples = 32, prompts_per_step = 8, max_new_tokens = 64 }
        "#;
    let overrides: Vec<String> = overrides.iter().map(|s| s.to_string()).collect();
    TrainConfig::parse("run.toml", text, &overrides).unwrap()
}

/// With 64 tokens in a prompt, on a GPU with so much memory.
fn plan(model: &str, overrides: &[&str], memory: u64) -> Plan {
    let all = published::all();
    let (_, model) = all.iter().find(|(name, _)| *name == model).unwrap();
    let prompts: Vec<Vec<u32>> = (0..8).map(|i| vec![i; 64]).collect();
    let (config, dtype) = (config(overrides), DType::Bf16);
    let run =
        Run { model, dtype, config: &config, prompts: &prompts, purpose: Purpose::Train, reward_models: &[] };
    Plan::new(&run, Place::Gpu { memory, driver: CONTEXT, host: None })
}

#[test]
fn what_is_proposed_fits_and_nothing_of_it_is_left_out() {
    const GB: u64 = 1_000_000_000;
    for (model, memory) in [
        ("Gemma 3 270M", 6 * GB),
        ("Gemma 3 270M", 4 * GB),
        ("Gemma 3 270M", 2 * GB),
        ("Gemma 3 1B", 16 * GB),
        ("Gemma 2B", 24 * GB),
        ("Gemma 3 4B", 24 * GB),
        ("Gemma 4 E2B", 24 * GB),
    ] {
        let without = plan(model, &[], memory);
        assert!(!without.fits && !without.remedies.is_empty(), "{model}\n{without}");
        assert!(without.peak() > memory, "what it takes at least is too much: {model}\n{without}");
        let remedies: Vec<&str> = without.remedies.iter().map(String::as_str).collect();
        let with = plan(model, &remedies, memory);
        assert!(with.fits && with.peak() <= memory, "{model}: {remedies:?}\n{with}");
        for left_out in 0..remedies.len() {
            let mut others = remedies.clone();
            others.remove(left_out);
            assert!(!plan(model, &others, memory).fits, "{model}: {remedies:?} without its {left_out}th");
        }
    }
    // The weights alone are more.
    assert_eq!(plan("Gemma 3 27B", &[], 24 * GB).remedies, [""; 0]);
}

/// 2 bytes of weights, 4 of gradients, 8 of moments, 4 of masters; what is small takes 2 of moments and no masters.
#[test]
fn state_is_counted_by_the_byte() {
    let parameters = 268_098_176_u64;
    let bytes = |plan: &Plan, what: &str| plan.held.iter().find(|line| line.what == what).unwrap().bytes;
    let full = plan("Gemma 3 270M", &[], 80 << 30);
    let of = |each: u64| each * parameters;
    assert_eq!(bytes(&full, "weights"), of(2));
    assert_eq!(["gradients", "moments", "masters"].map(|what| bytes(&full, what)), [of(4), of(8), of(4)]);
    let small = ["optimizer.moments=8bit", "optimizer.embedding_moments=8bit", "optimizer.masters=false"];
    let small = plan("Gemma 3 270M", &small, 80 << 30);
    // Norms keep 12 bytes; of codes a scale is 4 bytes for every 256.
    let norms = 640 * 4 * 18 + 640 + 2 * 256 * 18;
    let codes = parameters - norms;
    assert_eq!(bytes(&small, "moments"), 2 * (codes + codes / 256 * 4) + 8 * norms);
    assert_eq!(bytes(&small, "masters"), 4 * norms);
    assert_eq!(bytes(&small, "gradients"), of(4));
    let smaller = plan("Gemma 3 270M", &["optimizer.gradients=bf16"], 80 << 30);
    assert_eq!(bytes(&smaller, "gradients"), of(2) + 2 * norms);
}

#[test]
fn weights_are_counted_as_they_will_be_stored() {
    let fixture = Fixture::new();
    let dir = fixture.path("model");
    let path = dir.join("config.json");
    let json = std::fs::read_to_string(&path).unwrap();
    let storage = |precision: Precision| precision.storage(&dir, &ConfigFile::open(&dir).unwrap());
    let as_stored = Precision::default();
    let compute = |compute| Precision { compute, ..as_stored };

    assert_eq!(storage(as_stored), DType::F32);
    assert_eq!(storage(compute(ComputeChoice::F32)), DType::F32);
    assert_eq!(storage(compute(ComputeChoice::Bf16)), DType::Bf16);
    assert_eq!(storage(Precision { dtype: Some(DType::Bf16), ..as_stored }), DType::Bf16);
    // The weights are what counts, and where there are none yet, what config.json says.
    fixture.write("model/config.json", json.replace("float32", "bfloat16"));
    assert_eq!(storage(as_stored), DType::F32);
    std::fs::remove_file(dir.join("model.safetensors")).unwrap();
    assert_eq!(storage(as_stored), DType::Bf16);
    for wider in ["float32", "float16"] {
        fixture.write("model/config.json", json.replace("float32", wider));
        assert_eq!(storage(as_stored), DType::F32);
    }
    fixture.write("model/config.json", json.replace("torch_dtype", "of_another"));
    assert_eq!(storage(as_stored), DType::Bf16);
}

#[test]
fn plan_tells_and_names_what_it_cannot_use() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("run.toml");
    std::fs::write(
        &path,
        "model.path = \"m\"\nobjective = { kind = \"rl\" }\ngenerate.samples = 4\nverifier.kind = \"numeric\"\n",
    )
    .unwrap();
    let run = |arguments: &[&str]| {
        let mut command = assert_cmd::Command::cargo_bin("bon-engine").unwrap();
        let output = command.arg("plan").arg(&path).args(arguments).output().unwrap();
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        (output.status.success(), text(output.stdout), text(output.stderr))
    };
    let (ok, told, _) = run(&["--published", "gemma 3 270m", "--memory", "8GB", "--prompt-tokens", "100"]);
    assert!(
        ok && told.contains("prompts of up to 100 tokens") && told.contains("of 8.00 GB: it fits"),
        "{told}"
    );
    let (ok, told, _) = run(&["--published", "Gemma 2B", "--memory", "8GiB"]);
    assert!(ok && told.contains("it does not fit") && told.contains("--set 'lora.rank=16'"), "{told}");
    let (ok, told, _) = run(&["--published", "Gemma 3 270M", "--memory", "16GB", "--device", "cpu"]);
    assert!(ok && told.contains("0.54 GB  weights"), "{told}");
    for (arguments, why) in [
        (&["--memory", "24"][..], "must be a size such as 24GB or 24GiB"),
        (&["--published", "Gemma 9"], "must be one of Gemma 2B, Gemma 7B"),
        (&["--memory", "8GB"], "m is not a directory"),
        (&["--published", "Gemma 2B", "--device", "vm"], "give cuda or cpu"),
        (&["--published", "Gemma 2B", "--prompt-tokens", "8000"], "the model's context is 8192"),
        (&["--published", "Gemma 2B", "--set", "generate.samples=0"], "generate.samples"),
        (&["--published", "Gemma 2B", "--set", "train.gradient_accumulation=3"], "does not divide the 8"),
    ] {
        let (ok, _, error) = run(arguments);
        assert!(!ok && error.contains(why), "{arguments:?}: {error}");
    }
}

/// Each `bon-engine plan` of a published model in the README is followed by what it says.
#[test]
fn the_plans_in_the_readme_are_what_the_program_says() {
    let readme = std::fs::read_to_string(crate::places::checkout().join("README.md")).unwrap();
    let mut plans = 0;
    for line in readme.lines().filter(|line| line.starts_with("bon-engine plan examples/minimal.toml")) {
        // Outside of quotes words end at blanks.
        let quoted = |(i, part): (usize, &str)| -> Vec<String> {
            if i % 2 == 1 { vec![part.into()] } else { part.split_whitespace().map(String::from).collect() }
        };
        let words = line.split('"').enumerate().flat_map(quoted).skip(1);
        let output = assert_cmd::Command::cargo_bin("bon-engine").unwrap().args(words).output().unwrap();
        let told = String::from_utf8(output.stdout).unwrap();
        let behind = readme.split(line).nth(1).unwrap();
        assert!(!told.is_empty() && behind.contains(&told), "{line}\n{told}");
        plans += 1;
    }
    assert_eq!(plans, 5);
}
