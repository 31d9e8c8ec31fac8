//! A whole decode step, counted on the virtual GPU and modelled in time: `bon-engine kernels --step`.

use std::io::Write;

use serde::Serialize;

use crate::backend::cuda::{Cuda, PACE};
use crate::backend::ops::*;
use crate::backend::{Batch, Choice, HeadSpec, Truncation};
use crate::cost::figures::{Bound, Chip, Counted, FiguresError, count};
use crate::gemma::config::{GemmaConfig, LayerSpec};
use crate::gemma::published;
use crate::gemma::{Frozen, Gemma, KvCache, params};
use crate::rng::DrawKey;
use crate::segments::{QueryRun, Segment, Segments};

/// N: streams of one prompt.
const STREAMS: usize = 32;
/// Tokens of the prompt.
const PROMPT: usize = 512;
/// Tokens of each stream's tail, of which the last is the step's query.
const TAIL: usize = 128;

/// From one kernel's end to the next one's start in a CUDA graph. Gray, "Getting started with CUDA graphs" (NVIDIA technical
/// blog, 2019): kernels of 2.9 us each take 3.4 us in a graph, on V100; newer chips are assumed to be alike.
const GAP: f64 = 0.5e-6;
/// Until a kernel's blocks have their places and parameters. Where blocks may take their places early, this and the gap pass
/// while the kernel ahead runs. Assumed.
const PLACING: f64 = 0.5e-6;
/// Until its blocks run at full rate, and from the first that ends to the last: the first accesses come back from memory one
/// after another, the last writes are awaited. Assumed: kernels that do hardly anything take 1.5 to 2.5 us each in a graph.
const START_UP: f64 = 1e-6;
/// What the host does for a step: tokens come back, tables and plans are made, uploads and a graph are launched. The device
/// waits for it as far as the decode loop's lag does not hide it. Assumed.
const HOST: f64 = 275e-6;

/// A model whose step is counted.
struct Model {
    name: &'static str,
    config: GemmaConfig,
}

/// The models of `--step`.
fn models() -> [Model; 3] {
    [
        Model { name: "Gemma 3 270M", config: published::gemma_3_270m() },
        Model { name: "Gemma 3 1B", config: published::gemma_3_1b() },
        Model { name: "Gemma 2B", config: published::gemma_2b() },
    ]
}

/// Launches that a step does so many times.
#[derive(Debug, Clone, Serialize)]
struct Part {
    times: usize,
    launches: Vec<Counted>,
}

/// A step on a chip.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Step {
    model: &'static str,
    chip: &'static str,
    /// Kernel launches.
    launches: usize,
    /// The launches' bounds, one after the other.
    kernels_seconds: f64,
    /// Gaps between kernels, and their start-up.
    launch_seconds: f64,
    /// What the device waits for the host.
    host_seconds: f64,
    /// Per kernel, longest first.
    kernels: Vec<Share>,
}

/// A kernel's share.
#[derive(Debug, Clone, Serialize)]
struct Share {
    kernel: String,
    launches: usize,
    /// Of one, the longest.
    bound: Bound,
    /// Blocks for each multiprocessor, of that one.
    blocks_each: f64,
    /// Bounds of all of them.
    seconds: f64,
}

impl Step {
    fn new(model: &'static str, chip: &Chip, parts: &[Part]) -> Self {
        let mut kernels: Vec<Share> = Vec::new();
        for (part, launch) in parts.iter().flat_map(|part| part.launches.iter().map(move |l| (part, l))) {
            let bound = chip.of_launch(launch);
            let (n, seconds) = (part.times, part.times as f64 * bound.seconds);
            let blocks_each = chip.blocks_each(launch);
            match kernels.iter_mut().find(|share| share.kernel == launch.kernel) {
                Some(share) => {
                    share.launches += n;
                    share.seconds += seconds;
                    if bound.seconds > share.bound.seconds {
                        (share.bound, share.blocks_each) = (bound, blocks_each);
                    }
                }
                None => {
                    let kernel = launch.kernel.clone();
                    kernels.push(Share { kernel, launches: n, bound, blocks_each, seconds });
                }
            }
        }
        kernels.sort_by(|a, b| b.seconds.total_cmp(&a.seconds));
        let launches = kernels.iter().map(|share| share.launches).sum();
        let kernels_seconds = kernels.iter().map(|share| share.seconds).sum();
        let exposed = if chip.launches_dependents() { 0.0 } else { GAP + PLACING };
        let launch_seconds = launches as f64 * (exposed + START_UP);
        Self {
            model,
            chip: chip.name,
            launches,
            kernels_seconds,
            launch_seconds,
            // With a lag the host works while the device does.
            host_seconds: if PACE.lag == 0 {
                HOST
            } else {
                (HOST - kernels_seconds - launch_seconds).max(0.0)
            },
            kernels,
        }
    }

    /// Its line in that table.
    pub(super) fn line(&self) -> String {
        let ms = |seconds: f64| format!("{:.2} ms", 1e3 * seconds);
        let (kernels, launches, all) =
            (ms(self.kernels_seconds), ms(self.kernels_seconds + self.launch_seconds), ms(self.seconds()));
        format!("| {} | {} | {} | {kernels} | {launches} | {all} |", self.model, self.chip, self.launches)
    }

    /// Modelled.
    fn seconds(&self) -> f64 {
        self.kernels_seconds + self.launch_seconds + self.host_seconds
    }
}

/// The last query of every stream.
fn queries() -> (Segments, Vec<QueryRun>) {
    let mut list = vec![Segment { start: 0, len: PROMPT, position: 0, prefix: None }];
    list.extend((0..STREAMS).map(|i| Segment {
        start: PROMPT + i * TAIL,
        len: TAIL,
        position: PROMPT,
        prefix: Some(0),
    }));
    let run = |row| QueryRun { segment: row + 1, first: TAIL - 1, len: 1, row };
    (Segments::new(list).expect("a valid table"), (0..STREAMS).map(run).collect())
}

/// The launches of a model of these layers, without the LM head. What is counted depends on no value, so all are zero.
fn body(model: &Model, chip: &Chip, layers: Vec<LayerSpec>) -> Result<Vec<Counted>, FiguresError> {
    // One row of the embedding serves all tokens.
    let config = GemmaConfig { layers, vocab_size: 8, ..model.config.clone() };
    let (segments, runs) = queries();
    let prepare = |cuda: &Cuda| {
        let params = params::plan(&config).map(|spec| {
            let dtype = cuda.activation_dtype();
            cuda.zeros(dtype, spec.rows, spec.cols)
        });
        let frozen = Frozen { scalars: vec![1.0; config.layers.len()], per_layer_embed: None };
        let model =
            Gemma { backend: cuda.clone(), config: config.clone(), params, frozen, adapter_scale: None };
        let cache = KvCache::new(cuda, &config, segments.rows());
        (model, cache)
    };
    count(&format!("a step of {}", model.name), chip, prepare, |_, (model, mut cache)| {
        let ids = vec![0; STREAMS];
        let batch = Batch::new(&ids, &segments, &runs);
        drop(model.forward_cached(&batch, &mut cache));
    })
}

/// The launches of the LM head over the whole vocabulary.
fn head(model: &Model, chip: &Chip) -> Result<Vec<Counted>, FiguresError> {
    let GemmaConfig { vocab_size, hidden_size, final_softcap, .. } = model.config;
    let key = |stream| DrawKey { key: [1, 2], prompt: 0, stream, position: 0 };
    let choices: Vec<Choice> = (0..STREAMS as u32).map(|stream| Choice::Draw(key(stream))).collect();
    let spec = HeadSpec { softcap: final_softcap, temperature: 1.0 };
    let prepare = |cuda: &Cuda| {
        let dtype = cuda.activation_dtype();
        (cuda.zeros(dtype, STREAMS, hidden_size), cuda.zeros(dtype, vocab_size, hidden_size))
    };
    count(&format!("the LM head of {}", model.name), chip, prepare, |cuda, (x, embedding)| {
        drop(cuda.lm_head_sample(&x, &embedding, &spec, &Truncation::default(), &choices));
    })
}

/// Counts a step: what comes once (the embedding, the first norm) and every layer of a kind is the same, so that few layers
/// tell of all. With R(..) the launches of a model of these layers, f those that come once and l(k) those of a layer of kind
/// k: f = R(a) - l(a) and l(k) = R(a, k) - R(a).
fn step(model: &Model, chip: &Chip) -> Result<Step, FiguresError> {
    let first = model.config.layers[0];
    let mut kinds: Vec<(LayerSpec, usize)> = Vec::new();
    for layer in &model.config.layers {
        match kinds.iter_mut().find(|(kind, _)| kind == layer) {
            Some((_, n)) => *n += 1,
            None => kinds.push((*layer, 1)),
        }
    }
    let one = body(model, chip, vec![first])?;
    let mut parts = Vec::new();
    for (i, (kind, times)) in kinds.into_iter().enumerate() {
        // The launches of a layer stand behind all that came before it.
        let two = body(model, chip, vec![first, kind])?;
        let layer = two.len() - one.len();
        if i == 0 {
            parts.push(Part { times: 1, launches: one[..one.len() - layer].to_vec() });
        }
        parts.push(Part { times, launches: two[two.len() - layer..].to_vec() });
    }
    parts.push(Part { times: 1, launches: head(model, chip)? });
    Ok(Step::new(model.name, chip, &parts))
}

/// Steps of the models whose names contain `name`, on `chips`, told as they come.
pub(super) fn steps(
    name: &str,
    chips: &[Chip],
    mut told: impl FnMut(&Step) -> std::io::Result<()>,
) -> anyhow::Result<Vec<Step>> {
    let mut all = Vec::new();
    for model in models().iter().filter(|model| model.name.contains(name)) {
        for chip in chips {
            let step = step(model, chip)?;
            told(&step)?;
            all.push(step);
        }
    }
    Ok(all)
}

/// The first two lines of the table of steps in kernels/README.md.
pub(super) const TABLE_HEAD: [&str; 2] = [
    "| model | chip | launches | at the chip's limits | and launches | and the host |",
    "|---|---|---|---|---|---|",
];

pub(super) fn write(step: &Step, out: &mut impl Write) -> std::io::Result<()> {
    let ms = |seconds: f64| format!("{:.3} ms", 1e3 * seconds);
    writeln!(
        out,
        "{} on {}: a decode step of {STREAMS} streams, prompt of {PROMPT}, tails of {TAIL}: {} modelled",
        step.model,
        step.chip,
        ms(step.seconds())
    )?;
    writeln!(
        out,
        "  = {} at the chip's limits + {} for {} launches + {} that the device waits for the host",
        ms(step.kernels_seconds),
        ms(step.launch_seconds),
        step.launches,
        ms(step.host_seconds)
    )?;
    for share in &step.kernels {
        writeln!(
            out,
            "  {:<34} {:>4} x, {} in all; one at least {:.2} us ({}), {:.2} blocks for each multiprocessor",
            share.kernel,
            share.launches,
            ms(share.seconds),
            1e6 * share.bound.seconds,
            share.bound.label(),
            share.blocks_each
        )?;
    }
    writeln!(out)
}
