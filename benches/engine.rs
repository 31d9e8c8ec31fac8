//! The whole engine at the shapes of real models: `cargo bench --bench engine`, or the program that this makes, alone:
//!
//! ```text
//! engine --bench [--quick] [--model 270m|1b|2b|tiny] [--device cuda|cuda:<number>|vm|cpu] [--seconds S]
//!        [--output FILE.json] [beginning of a name]
//! ```
//!
//! Weights are random and made on the device, so there is nothing to load. First the ceilings: the rate of a large copy
//! and that of a large product. Then each model prefills, decodes N streams of one prompt, and takes training steps on
//! responses that it sampled; a line per figure as it comes, all of them as JSON in the file. Transformers does the same
//! work in `tools/reference/gpu_bench.py --engine`, by the same names.
//!
//! Three things must hold, or the exit status is 1: log-probs are the same in sampling and in training, a stream is the
//! same whatever N, and a replayed step samples what it sampled at first. Without a GPU nothing is timed, unless
//! another device is asked for. Without `--bench`, as `cargo test --benches` runs it, the tiny model runs on the
//! virtual GPU.

use std::collections::HashSet;
use std::error::Error;
use std::fmt::Write as _;
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use bon_engine::backend::cpu::{Cpu, compute_on_this_thread};
use bon_engine::backend::cuda::Cuda;
use bon_engine::backend::{Backend, Batch, DType, Truncation, Uniform};
use bon_engine::cost::workloads::{GEMMA_2B, GEMMA_270M};
use bon_engine::device::driver::{Counts, Gpu};
use bon_engine::device::vm::{Options as VmOptions, Vm};
use bon_engine::device::{Device, DeviceError};
use bon_engine::gemma::config::{GemmaConfig, LayerShape, LayerSpec};
use bon_engine::gemma::params::ParamKind;
use bon_engine::gemma::{Frozen, Gemma, KvCache, params, published};
use bon_engine::generate::{GenerateError, Prompt, Response, Sampling, generate};
use bon_engine::rng::philox4x32;
use bon_engine::segments::Layout;
use bon_engine::train::config::OptimizerSection;
use bon_engine::train::optimizer::Optimizer;
use bon_engine::train::policy::{Continued, Forward};
use serde_json::{Map, Value, json};

type Failure = Box<dyn Error>;

#[allow(dead_code, reason = "as a module of the tests it is not called")]
fn main() -> ExitCode {
    compute_on_this_thread();
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match run(&arguments, &mut std::io::stdout()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            // Nothing can be done about an error that cannot be told.
            let _ = writeln!(std::io::stderr(), "error: {e}");
            ExitCode::FAILURE
        }
    }
}

// --------------------------------------------------------------------------------------------------------- models

/// A model to measure.
struct Spec {
    /// What `--model` calls it.
    key: &'static str,
    name: &'static str,
    config: fn() -> GemmaConfig,
    sizes: &'static Sizes,
}

/// What is measured of a model.
struct Sizes {
    /// Tokens of a prompt.
    prompt: usize,
    /// N, ascending: streams of one prompt that decode together.
    streams: &'static [usize],
    /// Streams that decode together once more, each with a prompt of its own: what sharing one gains.
    unshared: usize,
    /// Tokens that each stream samples.
    new: usize,
    /// Numbers of prompts that are prefilled together.
    prefills: &'static [usize],
    /// Numbers of prompts of a training step, ascending.
    groups: &'static [usize],
    /// Responses to each of these prompts.
    responses: usize,
    /// Tokens of such a response. Nothing is predicted from the last, so it is one row less.
    length: usize,
    /// Rows and columns of a matrix to copy.
    copy: (usize, usize),
    /// Rows and columns of both factors of a product.
    product: usize,
    /// Seconds for all of it; what they do not suffice for is left out.
    seconds: f64,
}

/// A prompt of 512 tokens and 32 times 112 rows of responses are 4096 tokens.
const REAL: Sizes = Sizes {
    prompt: 512,
    streams: &[1, 8, 32, 256],
    unshared: 32,
    new: 64,
    prefills: &[1, 16],
    groups: &[1, 4],
    responses: 32,
    length: 113,
    // Long rows, so that the table of their numbers is small beside them: 1 GiB.
    copy: (8192, 65_536),
    product: 8192,
    seconds: 40.0,
};

/// What the virtual GPU does in seconds.
const TINY: Sizes = Sizes {
    prompt: 12,
    streams: &[1, 3],
    unshared: 3,
    new: 4,
    prefills: &[2],
    groups: &[1, 2],
    responses: 3,
    length: 5,
    copy: (4, 1024),
    product: 64,
    seconds: f64::INFINITY,
};

const MODELS: [Spec; 4] = [
    Spec { key: "270m", name: GEMMA_270M.name, config: published::gemma_3_270m, sizes: &REAL },
    Spec { key: "1b", name: "Gemma 3 1B", config: published::gemma_3_1b, sizes: &REAL },
    Spec { key: "2b", name: GEMMA_2B.name, config: published::gemma_2b, sizes: &REAL },
    Spec { key: "tiny", name: "tiny", config: tiny, sizes: &TINY },
];

/// The names of figures.
impl Spec {
    fn of(&self, what: &str) -> String {
        format!("{}/{what}", self.name)
    }

    fn decode_name(&self, streams: usize) -> String {
        self.of(&format!("decode N = {streams}"))
    }

    fn unshared_name(&self) -> String {
        self.of(&format!("decode {} prompts", self.sizes.unshared))
    }

    fn prefill_name(&self, prompts: usize) -> String {
        self.of(&format!("prefill {prompts} x {}", self.sizes.prompt))
    }

    fn tokens(&self, groups: usize) -> usize {
        let sizes = self.sizes;
        groups * (sizes.prompt + sizes.responses * (sizes.length - 1))
    }

    fn train_name(&self, groups: usize) -> String {
        self.of(&format!("train {} tokens", self.tokens(groups)))
    }

    fn names(&self) -> Vec<String> {
        let sizes = self.sizes;
        let prefills = sizes.prefills.iter().map(|&n| self.prefill_name(n));
        let decodes = sizes.streams.iter().map(|&n| self.decode_name(n));
        let trains = sizes.groups.iter().map(|&n| self.train_name(n));
        prefills.chain(decodes).chain([self.unshared_name()]).chain(trains).collect()
    }
}

/// As small as the kernels take it, with all that Gemma 3 has and a layer of either kind.
fn tiny() -> GemmaConfig {
    let shape = LayerShape { heads: 4, kv_heads: 1, head_dim: 64, intermediate: 200 };
    GemmaConfig {
        vocab_size: 333,
        hidden_size: 104,
        layers: published::five_to_one(shape, 8).skip(4).take(2).collect(),
        attention_scale: 0.125,
        max_positions: 64,
        ..published::gemma_3_270m()
    }
}

/// Random weights. A linear map's have a variance of 1 over its width, so what it maps keeps its size; the embedding is
/// one of them, which makes logits of about 1: of a quarter million tokens none is likely, so that samples differ.
fn random_model<B: Backend>(backend: B, config: &GemmaConfig) -> Gemma<B> {
    let mut seed = 0;
    let params = params::plan(config).map(|spec| {
        seed += 1;
        let spread = match spec.kind {
            ParamKind::Vector => 0.2,
            ParamKind::Matrix | ParamKind::Stack(_) | ParamKind::Adapter | ParamKind::Head => {
                (3.0 / spec.cols as f32).sqrt()
            }
        };
        backend.random(&Uniform::up_to(spread, seed), DType::Bf16, spec.rows, spec.cols)
    });
    Gemma {
        backend,
        config: config.clone(),
        params,
        frozen: Frozen { scalars: vec![1.0; config.layers.len()], per_layer_embed: None },
        adapter_scale: None,
    }
}

/// Random tokens: prompts with nothing in common.
fn prompts(config: &GemmaConfig, count: usize, len: usize) -> Vec<Vec<u32>> {
    let token = |prompt, at| philox4x32([at, prompt, 0, 0], [77, 0])[0] % config.vocab_size as u32;
    (0..count as u32).map(|prompt| (0..len as u32).map(|at| token(prompt, at)).collect()).collect()
}

// --------------------------------------------------------------------------------------------------- what it takes

fn parameters(config: &GemmaConfig) -> usize {
    params::plan(config).tensors().iter().map(|p| p.rows * p.cols).sum()
}

/// Bytes that a step of decoding must read: all weights, and the keys and values that its queries see, those of a
/// prompt once for all its streams. The mean over the steps that sample `new` tokens.
fn bytes_of_step(config: &GemmaConfig, prompts: usize, prompt: usize, streams: usize, new: usize) -> f64 {
    let elements = |tail: usize| {
        let of = |layer: &LayerSpec| {
            let window = layer.window.unwrap_or(usize::MAX);
            let own = tail.min(window);
            2 * layer.shape.kv_width() * prompts * (streams * own + prompt.min(window - own))
        };
        config.layers.iter().map(of).sum::<usize>()
    };
    let steps = (new - 1).max(1);
    let mean = (1..=steps).map(elements).sum::<usize>() as f64 / steps as f64;
    (parameters(config) as f64 + mean) * DType::Bf16.bytes() as f64
}

/// FLOPs of matrix products that a forward pass over prompts with responses needs, its head aside: two for each weight
/// and token, four for each pair of a query and a key of a head and their width.
fn forward_flops(config: &GemmaConfig, groups: usize, prompt: usize, responses: usize, rows: usize) -> f64 {
    let body = parameters(config) - config.vocab_size * config.hidden_size;
    let tokens = groups * (prompt + responses * rows);
    let pairs = |layer: &LayerSpec| {
        let seen = |position: usize| (position + 1).min(layer.window.unwrap_or(usize::MAX));
        let (shared, own) =
            (0..prompt + rows).map(seen).enumerate().fold((0, 0), |(shared, own), (at, n)| {
                if at < prompt { (shared + n, own) } else { (shared, own + n) }
            });
        groups * (shared + responses * own) * layer.shape.q_width()
    };
    let pairs: usize = config.layers.iter().map(pairs).sum();
    2.0 * (body as f64) * tokens as f64 + 4.0 * pairs as f64
}

/// FLOPs of a training step without anything computed twice: a backward pass has two products for each of a forward's.
fn training_flops(config: &GemmaConfig, sizes: &Sizes, groups: usize) -> f64 {
    let rows = sizes.length - 1;
    let predicting = groups * (1 + sizes.responses * rows);
    let head = 2 * config.vocab_size * config.hidden_size * predicting;
    3.0 * (forward_flops(config, groups, sizes.prompt, sizes.responses, rows) + head as f64)
}

// --------------------------------------------------------------------------------------------------------- devices

/// Where models run.
struct Machine<B> {
    /// Makes a backend; after an error the old one is of no more use.
    fresh: Box<dyn Fn() -> Result<B, DeviceError>>,
    device: Option<Arc<dyn Device>>,
    gpu: Option<Arc<Gpu>>,
}

impl Machine<Cuda> {
    fn new<D: Device + 'static>(device: D, gpu: Option<Arc<Gpu>>) -> Self {
        let device: Arc<dyn Device> = Arc::new(device);
        let of = Arc::clone(&device);
        Self { fresh: Box::new(move || Cuda::new(Box::new(Arc::clone(&of)))), device: Some(device), gpu }
    }
}

impl<B: Backend> Machine<B> {
    /// Seconds that `f` takes on `backend`: by a GPU's own clock, where there is one.
    fn timed(&self, backend: &B, f: &mut dyn FnMut()) -> Result<f64, DeviceError> {
        let seconds = match &self.device {
            Some(device) => device.timed(f)?,
            None => {
                let began = Instant::now();
                f();
                began.elapsed().as_secs_f64()
            }
        };
        backend.check()?;
        Ok(seconds)
    }

    /// The median of `times` runs after a first one.
    fn median(&self, backend: &B, times: usize, f: &mut dyn FnMut()) -> Result<f64, DeviceError> {
        self.timed(backend, f)?;
        let all: Result<Vec<f64>, DeviceError> = (0..times).map(|_| self.timed(backend, f)).collect();
        Ok(median(all?))
    }

    fn counts(&self) -> Counts {
        self.gpu.as_ref().map_or_else(Counts::default, |gpu| gpu.counts())
    }

    /// From here on memory's peak is counted anew.
    fn begin_peak(&self) {
        if let Some(gpu) = &self.gpu {
            gpu.reset_peak();
        }
    }

    /// Bytes that were in use at once at most; `None` where memory is the host's.
    fn peak(&self) -> Result<Option<u64>, DeviceError> {
        self.gpu.as_ref().map(|gpu| Ok(gpu.memory()?.peak)).transpose()
    }

    /// Bytes that may still be taken; `None` where memory is the host's.
    fn available(&self) -> Result<Option<u64>, DeviceError> {
        self.device.as_ref().map_or(Ok(None), |device| device.available())
    }
}

fn median(mut x: Vec<f64>) -> f64 {
    x.sort_by(f64::total_cmp);
    x[x.len() / 2]
}

// --------------------------------------------------------------------------------------------------------- figures

/// What is told: lines as they come, JSON in the end.
struct Report<'a> {
    out: &'a mut dyn Write,
    json: Map<String, Value>,
    figures: Vec<Value>,
    /// What must hold and did not.
    wrong: Vec<String>,
    output: Option<PathBuf>,
    /// Beginnings of the names that were asked for; empty: all.
    filters: Vec<String>,
}

impl Report<'_> {
    fn line(&mut self, text: &str) -> Result<(), Failure> {
        writeln!(self.out, "{text}")?;
        self.out.flush()?;
        Ok(())
    }

    /// A figure, and in the file what is known so far: who runs out of time has that.
    fn figure(&mut self, name: &str, text: &str, mut value: Value) -> Result<(), Failure> {
        self.line(&format!("{name:<40} {text}"))?;
        value["name"] = name.into();
        self.figures.push(value);
        self.save()
    }

    fn left_out(&mut self, name: &str, why: &str) -> Result<(), Failure> {
        self.figure(name, &format!("left out: {why}"), json!({ "left_out": why }))
    }

    fn wrong(&mut self, what: String) -> Result<(), Failure> {
        self.line(&format!("WRONG: {what}"))?;
        self.wrong.push(what);
        self.save()
    }

    fn save(&mut self) -> Result<(), Failure> {
        let Some(path) = &self.output else { return Ok(()) };
        self.json.insert("figures".into(), self.figures.clone().into());
        self.json.insert("wrong".into(), self.wrong.clone().into());
        std::fs::write(path, serde_json::to_string_pretty(&self.json)?)
            .map_err(|e| format!("{}: {e}", path.display()).into())
    }

    fn wanted(&self, name: &str) -> bool {
        self.filters.is_empty() || self.filters.iter().any(|f| name.starts_with(f.as_str()))
    }
}

/// A quantity with a prefix for powers of 1000.
fn si(x: f64, unit: &str) -> String {
    let prefixes = [(1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, "")];
    let (scale, prefix) = prefixes.into_iter().find(|(scale, _)| x >= *scale).unwrap_or((1.0, ""));
    format!("{:.3} {prefix}{unit}", x / scale)
}

fn percent(part: f64) -> String {
    format!("{:.1} %", 100.0 * part)
}

/// What else is told of a run: what the driver did for it, and memory.
fn driver_figures(counts: Counts, before: Counts, peak: Option<u64>, text: &mut String, value: &mut Value) {
    if let Some(peak) = peak {
        let (recorded, replayed) = (counts.recorded - before.recorded, counts.replayed - before.replayed);
        let single = counts.single - before.single;
        let _ = write!(
            text,
            "; graphs {recorded} recorded, {replayed} replayed, {single} single launches; peak {}",
            si(peak as f64, "B")
        );
        value["graphs_recorded"] = recorded.into();
        value["graphs_replayed"] = replayed.into();
        value["single_launches"] = single.into();
        value["peak_bytes"] = peak.into();
    }
}

// --------------------------------------------------------------------------------------------------------- measures

/// The best that this device does, measured.
struct Ceilings {
    /// Bytes read and written per second by a large copy.
    copy: f64,
    /// FLOPs per second of a large bf16 product.
    product: f64,
}

fn ceilings<B: Backend>(
    m: &Machine<B>,
    backend: &B,
    sizes: &Sizes,
    report: &mut Report,
) -> Result<Ceilings, Failure> {
    const TIMES: usize = 10;
    let (mut rows, cols) = sizes.copy;
    let dtype = backend.activation_dtype();
    // Both copies in a quarter of what there is.
    if let Some(available) = m.available()? {
        rows = rows.min(available as usize / 8 / (cols * dtype.bytes())).max(1);
    }
    let bytes = 2 * rows * cols * dtype.bytes();
    let x = backend.random(&Uniform::up_to(1.0, 1), dtype, rows, cols);
    let order: Vec<u32> = (0..rows as u32).collect();
    let seconds = m.median(backend, TIMES, &mut || drop(backend.gather_rows(&x, &order)))?;
    drop(x);
    let copy = bytes as f64 / seconds;
    let text = format!(
        "{} ({} read and written in {:.3} ms)",
        si(copy, "B/s"),
        si(bytes as f64, "B"),
        1e3 * seconds
    );
    report.figure("ceiling/copy", &text, json!({ "bytes_per_s": copy, "seconds": seconds }))?;

    let n = sizes.product;
    let x = backend.random(&Uniform::up_to(1.0, 2), dtype, n, n);
    let w = backend.random(&Uniform::up_to(1.0, 3), DType::Bf16, n, n);
    let seconds = m.median(backend, TIMES, &mut || drop(backend.matmul_forward(&x, [&w])))?;
    let product = 2.0 * (n as f64).powi(3) / seconds;
    let text = format!("{} ({n}^3 in {:.3} ms)", si(product, "FLOP/s"), 1e3 * seconds);
    report.figure("ceiling/product", &text, json!({ "flops_per_s": product, "seconds": seconds }))?;
    Ok(Ceilings { copy, product })
}

/// What sampling took.
struct Sampled {
    responses: Vec<Vec<Response>>,
    /// Seconds to the first tokens.
    first: f64,
    /// Seconds of every step after.
    steps: Vec<f64>,
}

fn sample<B: Backend>(
    model: &Gemma<B>,
    prompts: &[Vec<u32>],
    streams: usize,
    new: usize,
) -> Result<Sampled, GenerateError> {
    let requests: Vec<Prompt> =
        (0..).zip(prompts).map(|(number, ids)| Prompt { ids, number, streams }).collect();
    let sampling = Sampling {
        temperature: 1.0,
        truncation: Truncation::default(),
        max_new_tokens: new,
        seed: 11,
        step: 1,
    };
    // When a stream was first seen with so many tokens: the stop rule is asked in every step.
    let seen = Mutex::new(vec![Instant::now()]);
    let stop = |tokens: &[u32]| {
        let mut seen = seen.lock().unwrap_or_else(PoisonError::into_inner);
        while seen.len() <= tokens.len() {
            seen.push(Instant::now());
        }
        false
    };
    let responses = generate(model, &requests, &sampling, stop, |_, _, _| {})?;
    let seen = seen.into_inner().unwrap_or_else(PoisonError::into_inner);
    let spans: Vec<f64> = seen.windows(2).map(|pair| (pair[1] - pair[0]).as_secs_f64()).collect();
    Ok(Sampled { responses, first: spans[0], steps: spans[1..].to_vec() })
}

/// The largest difference between a response's log-probs and those that training computes; infinite where one of them
/// is not a number.
fn gap<B: Backend>(
    model: &Gemma<B>,
    prompts: &[Vec<u32>],
    responses: &[Vec<Response>],
) -> Result<f32, DeviceError> {
    let trained = with_groups(prompts, responses, |groups| Forward::new(model, groups, 1.0).logprobs);
    model.backend.check()?;
    let sampled = responses.iter().flatten().flat_map(|r| &r.logprobs);
    let gap = |(a, b): (&f32, &f32)| if (a - b).is_nan() { f32::INFINITY } else { (a - b).abs() };
    Ok(sampled.zip(&trained).map(gap).fold(0.0, f32::max))
}

fn with_groups<T>(prompts: &[Vec<u32>], responses: &[Vec<Response>], f: impl FnOnce(&[Continued]) -> T) -> T {
    let tokens: Vec<Vec<&[u32]>> =
        responses.iter().map(|group| group.iter().map(|r| r.tokens.as_slice()).collect()).collect();
    let groups: Vec<Continued> =
        prompts.iter().zip(&tokens).map(|(prompt, responses)| Continued { prompt, responses }).collect();
    f(&groups)
}

/// What is being measured.
struct Bench<'a, B: Backend> {
    m: &'a Machine<B>,
    spec: &'static Spec,
    config: GemmaConfig,
    ceilings: &'a Ceilings,
    quick: bool,
    began: Instant,
    /// For all of this model.
    seconds: f64,
}

impl<B: Backend + Clone> Bench<'_, B> {
    /// What of a list is measured.
    fn some<'s>(&self, list: &'s [usize], quickly: usize) -> &'s [usize] {
        if self.quick { &list[list.len() - quickly.min(list.len())..] } else { list }
    }

    /// Whether a figure is asked for and there is time for it; says so where there is not.
    fn goes_on(&self, name: &str, report: &mut Report) -> Result<bool, Failure> {
        if !report.wanted(name) {
            return Ok(false);
        }
        let late = self.began.elapsed().as_secs_f64() > self.seconds;
        if late {
            report.left_out(name, &format!("the model's {} seconds are over", self.seconds))?;
        }
        Ok(!late)
    }

    fn run(&self, backend: &B, report: &mut Report) -> Result<(), Failure> {
        let n = parameters(&self.config);
        let name = self.spec.of("weights");
        // Weights, and as much again for caches and activations of the smaller measures.
        let least = 2 * (n * DType::Bf16.bytes()) as u64;
        if let Some(available) = self.m.available()?.filter(|&available| available < least) {
            let why =
                format!("it needs {}, and {} are free", si(least as f64, "B"), si(available as f64, "B"));
            return report.left_out(&name, &why);
        }
        let mut model = None;
        let make = &mut || model = Some(random_model(backend.clone(), &self.config));
        let seconds = self.m.timed(backend, make)?;
        let Some(model) = model else { return Err("the device did not do what it was asked".into()) };
        let text = format!("{} parameters made in {:.1} ms", si(n as f64, ""), 1e3 * seconds);
        report.figure(&name, &text, json!({ "parameters": n, "seconds": seconds }))?;
        self.prefill(&model, report)?;
        self.decode(&model, report)?;
        self.train(model, report)
    }

    fn prefill(&self, model: &Gemma<B>, report: &mut Report) -> Result<(), Failure> {
        let (b, sizes) = (&model.backend, self.spec.sizes);
        for &n in self.some(sizes.prefills, 1) {
            let name = self.spec.prefill_name(n);
            if !self.goes_on(&name, report)? {
                continue;
            }
            let prompts = prompts(&self.config, n, sizes.prompt);
            let (layout, of) = Layout::of_prompts(&prompts.iter().map(Vec::as_slice).collect::<Vec<_>>());
            let segments = layout.segments();
            let runs = segments.all_queries();
            let batch = Batch::new(layout.ids(), segments, &runs);
            let mut last: Vec<u32> = of.iter().map(|&prompt| layout.last_row(prompt)).collect();
            last.sort_unstable();
            last.dedup();
            let mut cache = KvCache::new(b, &self.config, segments.rows());
            let times = if self.quick { 1 } else { 5 };
            let seconds = self.m.median(b, times, &mut || drop(model.prefill(&batch, &last, &mut cache)))?;
            let tokens = layout.ids().len() as f64;
            let share = forward_flops(&self.config, n, sizes.prompt, 0, 0) / seconds / self.ceilings.product;
            let text = format!(
                "{:.3} ms, {} of the product's rate",
                1e3 * seconds,
                [si(tokens / seconds, "tokens/s"), percent(share)].join(", ")
            );
            let value =
                json!({ "seconds": seconds, "tokens_per_s": tokens / seconds, "share_of_product": share });
            report.figure(&name, &text, value)?;
        }
        Ok(())
    }

    fn decode(&self, model: &Gemma<B>, report: &mut Report) -> Result<(), Failure> {
        let sizes = self.spec.sizes;
        let mut cases: Vec<(String, usize, usize)> =
            self.some(sizes.streams, 2).iter().map(|&n| (self.spec.decode_name(n), 1, n)).collect();
        cases.push((self.spec.unshared_name(), sizes.unshared, 1));
        let mut fewer: Vec<Response> = Vec::new();
        for (name, groups, n) in cases {
            if !self.goes_on(&name, report)? {
                continue;
            }
            let prompts = prompts(&self.config, groups, sizes.prompt);
            self.m.begin_peak();
            let mut before = self.m.counts();
            let mut sampled = sample(model, &prompts, n, sizes.new)?;
            if !self.quick {
                // Now the steps are known, and the memory is there.
                before = self.m.counts();
                let again = sample(model, &prompts, n, sizes.new)?;
                if again.responses != sampled.responses {
                    report.wrong(format!("{name}: sampled twice, the responses differ"))?;
                }
                sampled = again;
            }
            let (counts, peak) = (self.m.counts(), self.m.peak()?);
            let Sampled { responses, first, steps } = sampled;
            let all: f64 = steps.iter().sum();
            let rate = (groups * n * steps.len()) as f64 / all;
            let step = median(steps);
            let bytes = bytes_of_step(&self.config, groups, sizes.prompt, n, sizes.new);
            let share = bytes / step / self.ceilings.copy;
            let gap = gap(model, &prompts, &responses)?;
            let distinct = distinct(&responses);
            let mut text = format!(
                "{:.3} ms a step, {}, first token after {:.3} ms, {} a step: {} of the copy's rate; {distinct} \
                 different tokens; logprob_gap_max {gap:e}",
                1e3 * step,
                si(rate, "tokens/s"),
                1e3 * first,
                si(bytes, "B"),
                percent(share)
            );
            let mut value = json!({
                "ms_per_step": 1e3 * step,
                "tokens_per_s": rate,
                "first_token_ms": 1e3 * first,
                "bytes_per_step": bytes,
                "share_of_copy": share,
                "distinct_tokens": distinct,
                "logprob_gap_max": gap,
            });
            driver_figures(counts, before, peak, &mut text, &mut value);
            report.figure(&name, &text, value)?;
            self.check_responses(&name, gap, &responses, report)?;
            // The first prompt's streams, whatever decodes beside them.
            let common = fewer.len().min(responses[0].len());
            if responses[0][..common] != fewer[..common] {
                report.wrong(format!(
                    "{name}: a stream's tokens or log-probs depend on what decodes beside it"
                ))?;
            }
            fewer.clone_from(&responses[0]);
        }
        Ok(())
    }

    /// What must hold of all samples.
    fn check_responses(
        &self,
        name: &str,
        gap: f32,
        responses: &[Vec<Response>],
        report: &mut Report,
    ) -> Result<(), Failure> {
        if gap != 0.0 {
            report.wrong(format!(
                "{name}: logprob_gap_max is {gap:e}; sampling and training must agree to the bit"
            ))?;
        }
        let count: usize = responses.iter().flatten().map(|r| r.tokens.len()).sum();
        let distinct = distinct(responses);
        if distinct * 4 < count.min(self.config.vocab_size) {
            report.wrong(format!(
                "{name}: of {count} tokens {distinct} are different; such weights measure nothing"
            ))?;
        }
        Ok(())
    }

    fn train(&self, model: Gemma<B>, report: &mut Report) -> Result<(), Failure> {
        let sizes = self.spec.sizes;
        let mut planned = Vec::new();
        for &groups in if self.quick { &sizes.groups[..1] } else { sizes.groups } {
            if self.goes_on(&self.spec.train_name(groups), report)? {
                planned.push(groups);
            }
        }
        let Some(&most) = planned.last() else { return Ok(()) };
        let prompts = prompts(&self.config, most, sizes.prompt);
        let sampled = sample(&model, &prompts, sizes.responses, sizes.length)?;
        let responses = sampled.responses;
        let rate = (most * sizes.responses * sampled.steps.len()) as f64 / sampled.steps.iter().sum::<f64>();
        let step = median(sampled.steps);
        let gap = gap(&model, &prompts, &responses)?;
        let name = self.spec.of(&format!("sample {most} x {} x {}", sizes.responses, sizes.length));
        let text = format!("{:.3} ms a step, {}; logprob_gap_max {gap:e}", 1e3 * step, si(rate, "tokens/s"));
        let value = json!({ "ms_per_step": 1e3 * step, "tokens_per_s": rate, "logprob_gap_max": gap });
        report.figure(&name, &text, value)?;
        self.check_responses(&name, gap, &responses, report)?;

        let optimizer_bytes = 16 * parameters(&self.config) as u64;
        if let Some(available) = self.m.available()?.filter(|&available| available < optimizer_bytes) {
            let (needs, has) = (si(optimizer_bytes as f64, "B"), si(available as f64, "B"));
            let why = format!("masters, gradients and moments need {needs}, and {has} are free");
            for groups in planned {
                report.left_out(&self.spec.train_name(groups), &why)?;
            }
            return Ok(());
        }
        let began = Instant::now();
        let optimizer = Optimizer::new(&model, &OptimizerSection::default(), 0);
        model.backend.check()?;
        let seconds = began.elapsed().as_secs_f64();
        let text = format!("made in {seconds:.3} s");
        report.figure(&self.spec.of("optimizer start"), &text, json!({ "seconds": seconds }))?;
        let mut trained = Trained { model, optimizer, updates: 0 };
        for groups in planned {
            if self.goes_on(&self.spec.train_name(groups), report)? {
                self.steps(&mut trained, &prompts[..groups], &responses[..groups], report)?;
            }
        }
        Ok(())
    }

    /// Training steps on the same responses.
    fn steps(
        &self,
        trained: &mut Trained<B>,
        prompts: &[Vec<u32>],
        responses: &[Vec<Response>],
        report: &mut Report,
    ) -> Result<(), Failure> {
        let Trained { model, optimizer, updates } = trained;
        let (name, b) = (self.spec.train_name(prompts.len()), model.backend.clone());
        // As an objective would weigh them: good and bad responses, all of them to be learnt from.
        let count = responses.iter().flatten().map(|r| r.tokens.len()).sum::<usize>() as f32;
        let weight = |j: usize| if j.is_multiple_of(2) { 1.0 / count } else { -0.5 / count };
        let weights: Vec<f32> = responses
            .iter()
            .flat_map(|group| group.iter().enumerate())
            .flat_map(|(j, r)| std::iter::repeat_n(weight(j), r.tokens.len()))
            .collect();
        let mut spent = [const { Vec::new() }; 3];
        let before = self.m.counts();
        self.m.begin_peak();
        let times = if self.quick { 1 } else { 3 };
        for _ in 0..=times {
            *updates += 1;
            let mut forward = None;
            let f = self.m.timed(&b, &mut || {
                forward = with_groups(prompts, responses, |groups| Some(Forward::new(model, groups, 1.0)));
            })?;
            let g = self.m.timed(&b, &mut || {
                if let Some(forward) = forward.take() {
                    forward.backward(model, &weights, &mut optimizer.grads);
                }
            })?;
            let mut norm = None;
            let section = OptimizerSection::default();
            let o = self
                .m
                .timed(&b, &mut || norm = Some(optimizer.step(model, &section, section.lr, *updates)))?;
            let norm = norm.transpose()?.unwrap_or(0.0);
            if norm <= 0.0 {
                report.wrong(format!("{name}: the gradient's norm is {norm}"))?;
            }
            spent.iter_mut().zip([f, g, o]).for_each(|(all, seconds)| all.push(seconds));
            if self.began.elapsed().as_secs_f64() > self.seconds {
                break;
            }
        }
        // The first step records nothing, but memory is taken for it; unless there was time for no other.
        let steps = spent[0].len();
        let [f, g, o] = spent.map(|all| median(all[usize::from(steps > 1)..].to_vec()));
        let tokens = self.spec.tokens(prompts.len()) as f64;
        let flops = training_flops(&self.config, self.spec.sizes, prompts.len());
        let share = flops / (f + g) / self.ceilings.product;
        let optimizer_bytes = 34.0 * parameters(&self.config) as f64;
        let optimizer_share = optimizer_bytes / o / self.ceilings.copy;
        let mut text = format!(
            "{:.3} ms, {}: forward {:.3}, backward {:.3}, {} of the product's rate; optimizer {:.3}, {} of the \
             copy's rate",
            1e3 * (f + g + o),
            si(tokens / (f + g + o), "tokens/s"),
            1e3 * f,
            1e3 * g,
            percent(share),
            1e3 * o,
            percent(optimizer_share)
        );
        let mut value = json!({
            "seconds": f + g + o,
            "tokens_per_s": tokens / (f + g + o),
            "response_tokens_per_s": f64::from(count) / (f + g + o),
            "forward_ms": 1e3 * f,
            "backward_ms": 1e3 * g,
            "optimizer_ms": 1e3 * o,
            "flops": flops,
            "share_of_product": share,
            "optimizer_share_of_copy": optimizer_share,
        });
        driver_figures(self.m.counts(), before, self.m.peak()?, &mut text, &mut value);
        report.figure(&name, &text, value)
    }
}

/// A model in training.
struct Trained<B: Backend> {
    model: Gemma<B>,
    optimizer: Optimizer<B>,
    updates: u64,
}

fn distinct(responses: &[Vec<Response>]) -> usize {
    responses.iter().flatten().flat_map(|r| &r.tokens).collect::<HashSet<_>>().len()
}

/// Whether it is for want of memory.
fn out_of_memory(e: &Failure) -> bool {
    let generate = e
        .downcast_ref::<GenerateError>()
        .is_some_and(|e| matches!(e, GenerateError::Device(e) if e.out_of_memory));
    generate || e.downcast_ref::<DeviceError>().is_some_and(|e| e.out_of_memory)
}

// -------------------------------------------------------------------------------------------------------- the program

const USAGE: &str = "engine --bench [--quick] [--model 270m|1b|2b|tiny] [--device cuda|cuda:<number>|vm|cpu] \
                     [--seconds S] [--output FILE.json] [beginning of a name]";

#[derive(Default)]
struct Options {
    bench: bool,
    quick: bool,
    models: Vec<&'static Spec>,
    device: Option<String>,
    seconds: Option<f64>,
    output: Option<PathBuf>,
    filters: Vec<String>,
    /// What is for other benchmarks.
    ignored: Vec<String>,
}

impl Options {
    fn parse(arguments: &[String]) -> Result<Self, Failure> {
        let mut options = Self::default();
        let mut rest = arguments.iter();
        while let Some(argument) = rest.next() {
            let mut value = || rest.next().ok_or_else(|| format!("{argument} wants a value: {USAGE}"));
            match argument.as_str() {
                "--bench" => options.bench = true,
                "--quick" => options.quick = true,
                "--model" => {
                    let key = value()?;
                    let Some(spec) = MODELS.iter().find(|spec| spec.key == key) else {
                        return Err(format!("--model {key}: must be 270m, 1b, 2b or tiny").into());
                    };
                    options.models.push(spec);
                }
                "--device" => options.device = Some(value()?.clone()),
                "--seconds" => {
                    let text = value()?;
                    let seconds = text.parse().map_err(|_| format!("--seconds {text}: must be a number"))?;
                    options.seconds = Some(seconds);
                }
                "--output" => options.output = Some(value()?.into()),
                // `cargo bench` gives all benchmarks the same arguments.
                other if other.starts_with('-') => options.ignored.push(other.to_owned()),
                name => options.filters.push(name.trim_matches(['^', '$']).to_owned()),
            }
        }
        if options.models.is_empty() {
            let all = MODELS.iter().filter(|spec| (spec.key == "tiny") != options.bench);
            options.models.extend(all);
        }
        Ok(options)
    }
}

/// The program. Fails where something could not be measured that should have been, or something is wrong that was.
pub(crate) fn run(arguments: &[String], out: &mut dyn Write) -> Result<(), Failure> {
    let options = Options::parse(arguments)?;
    let mut report = Report {
        out,
        json: Map::new(),
        figures: Vec::new(),
        wrong: Vec::new(),
        output: options.output.clone(),
        filters: options.filters.clone(),
    };
    if !options.ignored.is_empty() {
        report.line(&format!("ignored: {}", options.ignored.join(" ")))?;
    }
    let device = options.device.as_deref().unwrap_or(if options.bench { "cuda" } else { "vm" });
    match device {
        "cpu" => {
            let machine = Machine { fresh: Box::new(|| Ok(Cpu::BF16)), device: None, gpu: None };
            run_on(&machine, &options, &mut report)?;
        }
        "vm" => run_on(&Machine::new(Vm::new(VmOptions::default()), None), &options, &mut report)?,
        name => {
            let number = match name.strip_prefix("cuda") {
                Some("") => Some(0),
                Some(rest) => rest.strip_prefix(':').and_then(|number| number.parse().ok()),
                None => None,
            };
            let Some(number) = number else {
                return Err(format!("--device {name}: must be cuda, cuda:<number>, vm or cpu").into());
            };
            match Gpu::open(number).map(Arc::new) {
                Ok(gpu) => run_on(&Machine::new(Arc::clone(&gpu), Some(gpu)), &options, &mut report)?,
                Err(e) if options.device.is_none() => report.line(&format!("no engine is timed: {e}"))?,
                Err(e) => return Err(e.into()),
            }
        }
    }
    match report.wrong.len() {
        0 => Ok(()),
        n => {
            Err(format!("{n} of the engine's promises do not hold:\n  {}", report.wrong.join("\n  ")).into())
        }
    }
}

fn run_on<B: Backend + Clone>(m: &Machine<B>, options: &Options, report: &mut Report) -> Result<(), Failure> {
    let mut backend = (m.fresh)()?;
    report.json.insert("device".into(), backend.device_name().into());
    let multiprocessors = m.device.as_ref().map(|device| device.multiprocessors());
    report.json.insert("multiprocessors".into(), multiprocessors.into());
    let count = multiprocessors.map_or(String::new(), |n| format!(", {n} multiprocessors"));
    report.line(&format!("{}{count}", backend.device_name()))?;
    if m.gpu.is_none() {
        report.line("these times are this computer's and say nothing of a GPU")?;
    }
    let mut measured = None;
    for &spec in &options.models {
        if !spec.names().iter().any(|name| report.wanted(name)) {
            continue;
        }
        let ceilings = match measured.take() {
            Some(ceilings) => ceilings,
            None => ceilings(m, &backend, spec.sizes, report)?,
        };
        let bench = Bench {
            m,
            spec,
            config: (spec.config)(),
            ceilings: &ceilings,
            quick: options.quick,
            began: Instant::now(),
            seconds: options.seconds.unwrap_or(spec.sizes.seconds * if options.quick { 0.4 } else { 1.0 }),
        };
        match bench.run(&backend, report) {
            Err(e) if out_of_memory(&e) => {
                report.left_out(&spec.of("rest"), &format!("it does not fit the memory: {e}"))?;
                drop(backend);
                backend = (m.fresh)()?;
            }
            other => other?,
        }
        measured = Some(ceilings);
    }
    report.save()
}
