//! What a run will take of memory, before anything is loaded.
//!
//! On a GPU the run itself tells: the model, the optimizer, a batch of sampling and a training step are put through the
//! launchers on a device that has memory and nothing else ([`Dry`]). So a plan is no estimate of what they ask for, whatever
//! they come to ask for. On the CPU, whose ops use the host's memory, a plan is what tensors are held all the time, and the
//! lives of those of a batch and a step, as `cpu.rs` beside this knows them.

mod cpu;

use std::fmt::{self, Write as _};

use self::cpu::OnCpu;

use crate::backend::cpu::Cpu;
use crate::backend::cuda::Cuda;
use crate::backend::{DType, Platform};
use crate::cost::figures::CHIPS;
use crate::device::DeviceError;
use crate::device::dry::Dry;
use crate::gemma::Gemma;
use crate::gemma::activations::{Kept, Recompute, Share, StepSize};
use crate::gemma::config::GemmaConfig;
use crate::gemma::lora::{begin, full_plan};
use crate::gemma::params::{self, Frozen, ParamSpec, Params};
use crate::generate::{self, GenerateError, Prompt, Sampling, fitting, generate, streams_at_once, within};
use crate::model_dir::{ComputeChoice, Placement};
use crate::reward::{self, RewardError};
use crate::segments::Layout;
use crate::train::config::{MomentKind, TrainConfig};
use crate::train::optimizer::{Optimizer, StateBytes, is_trained, keeps_codes, state_bytes};
use crate::train::policy::{Continued, Forward};

/// What a GPU's driver takes for a process with these kernels, in bytes. Assumed, because no driver tells it before.
pub const CONTEXT: u64 = 512 << 20;

/// A run that is planned.
#[derive(Debug, Clone, Copy)]
pub struct Run<'a> {
    /// The model.
    pub model: &'a GemmaConfig,
    /// Storage of its parameters; on a GPU they are bf16.
    pub dtype: DType,
    /// The settings.
    pub config: &'a TrainConfig,
    /// Prompts, the longest first: a step's are the first of them, an evaluation's may be all.
    pub prompts: &'a [Vec<u32>],
    /// What is done.
    pub purpose: Purpose,
    /// The reward models that judge, which are held beside it, each with the storage of its weights; on a GPU they are bf16.
    pub reward_models: &'a [(GemmaConfig, DType)],
}

impl Run<'_> {
    /// How many tokens too long the longest prompt is, with a response behind it, for the model.
    pub fn too_long(&self) -> usize {
        let longest = self.prompts.iter().map(Vec::len).max().unwrap_or(0);
        longest.saturating_add(self.config.generate.max_new_tokens).saturating_sub(self.model.max_positions)
    }
}

/// What a run is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// To train, and to evaluate on the way if there are tasks for that.
    Train,
    /// To evaluate alone.
    Evaluate,
}

/// What computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// A GPU.
    Gpu {
        /// Bytes of its memory that are free.
        memory: u64,
        /// Of these, what its driver will take.
        driver: u64,
        /// Bytes of the host's memory that are free, where something says.
        host: Option<u64>,
    },
    /// The CPU, and so many bytes of memory that are free.
    Cpu(u64),
}

/// Bytes of one thing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Line {
    /// What.
    pub what: String,
    /// How many.
    pub bytes: u64,
}

/// What a run takes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// What is held from beginning to end.
    pub held: Vec<Line>,
    /// What is needed beside it for a while, one after another.
    pub phases: Vec<Line>,
    /// What there is.
    pub memory: u64,
    /// What lies in the host's memory beside that, from beginning to end, where there is a GPU.
    pub host: Vec<Line>,
    /// What there is of it, where something says.
    pub host_memory: Option<u64>,
    /// What goes over the bus in an update, where something does.
    pub bus: Option<Bus>,
    /// Whether the run finds all that it asks for. Pieces of memory may be free and too small.
    pub fits: bool,
    /// Settings that would make it fit, where it does not and there are some: each with a value, to be set together.
    pub remedies: Vec<String>,
}

/// What an update moves from the host's memory and back, beside what is computed in the meantime.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bus {
    /// Bytes from the host's memory to the GPU's.
    pub into: u64,
    /// Bytes back.
    pub back: u64,
    /// Bytes of the GPU's memory that AdamW reads and writes.
    pub update: u64,
    /// FLOPs of the products with weights in the training of a step's prompts and responses, forward and backward, without what is
    /// computed again; attention's are not among them.
    pub training: u64,
}

/// Bytes per second of PCIe 4.0 with 16 lanes, each way: 16 GT/s a lane, 128 of 130 bits of which are data (PCI Express Base
/// Specification 4.0).
const PCIE: f64 = 16e9 * 16.0 / 8.0 * 128.0 / 130.0;

impl fmt::Display for Bus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let chip = CHIPS.iter().find(|chip| chip.name == "RTX 4090").expect("it is one of them");
        let seconds = |x: u64, rate: f64| x as f64 / rate;
        write!(
            f,
            "  an update moves {:.2} GB to the GPU and {:.2} GB back: {:.2} s of PCIe 4.0 x16, both ways at once, beside {:.2} s of AdamW; \
             the step's products take {:.1} s (modelled, at the limits of an {})",
            self.into as f64 / 1e9,
            self.back as f64 / 1e9,
            seconds(self.into.max(self.back), PCIE),
            seconds(self.update, chip.bandwidth),
            seconds(self.training, chip.tensor),
            chip.name
        )
    }
}

impl Plan {
    /// The most that is in use at once.
    pub fn peak(&self) -> u64 {
        self.held_bytes() + self.phases.iter().map(|line| line.bytes).max().unwrap_or(0)
    }

    /// What is in use from beginning to end.
    pub fn held_bytes(&self) -> u64 {
        self.held.iter().map(|line| line.bytes).sum()
    }

    /// What lies in the host's memory from beginning to end.
    pub fn host_bytes(&self) -> u64 {
        self.host.iter().map(|line| line.bytes).sum()
    }

    /// Plans a run. Panics if it has no prompts, or some that are [too long](Run::too_long). To train a verifier a group is of
    /// `generate.samples` responses of `generate.max_new_tokens` each, whatever its data say.
    pub fn new(run: &Run, place: Place) -> Self {
        if trains_verifier(run) && !run.model.score_head {
            let model = GemmaConfig { score_head: true, ..run.model.clone() };
            return Self::new(&Run { model: &model, ..*run }, place);
        }
        let trains_per_layer_embed = run.config.model.precision().trains_per_layer_embed(run.model);
        if trains_per_layer_embed != run.model.trains_per_layer_embed {
            let model = GemmaConfig { trains_per_layer_embed, ..run.model.clone() };
            return Self::new(&Run { model: &model, ..*run }, place);
        }
        let plan = Self::of(run, place);
        if plan.fits {
            return plan;
        }
        let remedies = remedies(run, place);
        Self { remedies, ..plan }
    }

    /// Without remedies.
    fn of(run: &Run, place: Place) -> Self {
        match place {
            Place::Cpu(memory) => on_cpu(run, memory),
            Place::Gpu { memory, driver, host: host_memory } => {
                let found = on_gpu(run, &Dry::new(memory.saturating_sub(driver)));
                let fits = found.is_ok();
                let least =
                    |_| on_gpu(run, &Dry::stingy()).expect("a device that gives all that is asked for");
                let Found { mut held, phases, host, bus } = found.unwrap_or_else(least);
                if driver > 0 {
                    held.push(Line { what: "the driver and the kernels (assumed)".into(), bytes: driver });
                }
                let on_host: u64 = host.iter().map(|line| line.bytes).sum();
                let fits = fits && host_memory.is_none_or(|there| on_host <= there);
                Self { held, phases, memory, host, host_memory, bus, fits, remedies: Vec::new() }
            }
        }
    }
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let gb = |bytes: u64| format!("{:>8.2} GB", bytes as f64 / 1e9);
        for Line { what, bytes } in &self.held {
            writeln!(f, "  {}  {what}", gb(*bytes))?;
        }
        for Line { what, bytes } in &self.phases {
            writeln!(f, "+ {}  {what}", gb(*bytes))?;
        }
        let verdict = if self.fits { "it fits" } else { "it does not fit" };
        write!(f, "= {}  at most, of {}", gb(self.peak()), gb(self.memory).trim_start())?;
        if !self.host.is_empty() {
            for Line { what, bytes } in &self.host {
                write!(f, "\n  {}  in the host's memory: {what}", gb(*bytes))?;
            }
            let all: u64 = self.host_bytes();
            let there =
                self.host_memory.map_or(String::new(), |there| format!(", of {}", gb(there).trim_start()));
            write!(f, "\n= {}  there{there}", gb(all))?;
        }
        if let Some(bus) = &self.bus {
            write!(f, "\n{bus}\n{verdict}")?;
        } else if self.host.is_empty() {
            write!(f, ": {verdict}")?;
        } else {
            write!(f, "\n{verdict}")?;
        }
        if !self.fits {
            let with = match self.remedies.is_empty() {
                true => "\nno setting makes it fit; a smaller model, fewer samples or shorter responses may"
                    .into(),
                false => self.remedies.iter().fold("\nit would fit with".to_owned(), |mut text, setting| {
                    write!(text, " --set '{setting}'").expect("a string takes all text");
                    text
                }),
            };
            f.write_str(&with)?;
        }
        Ok(())
    }
}

/// What a backend holds all the time, but for what training holds: weights, and what it reads beside them, of which per-layer
/// embeddings may lie elsewhere.
fn weights(config: &GemmaConfig, dtype: DType, per_layer: Placement) -> u64 {
    let trained: usize = params::plan(config).tensors().iter().map(|spec| spec.rows * spec.cols).sum();
    let frozen: usize = params::frozen(config).iter().map(|(_, shape)| shape.iter().product::<usize>()).sum();
    let all = ((trained + frozen) * dtype.bytes()) as u64;
    match per_layer {
        Placement::Device | Placement::Trained => all,
        Placement::Host => all - per_layer_bytes(config, dtype),
    }
}

/// The layers' own embeddings.
fn per_layer_bytes(config: &GemmaConfig, dtype: DType) -> u64 {
    let tables = params::frozen(config).into_iter().filter(|(_, shape)| shape.len() == 2);
    tables.map(|(_, shape)| (shape[0] * shape[1] * dtype.bytes()) as u64).sum()
}

/// The adapters among a model's tensors.
fn adapter_bytes(specs: &Params<ParamSpec>, dtype: DType) -> u64 {
    let all = specs.layers.iter().flat_map(|layer| layer.adapters.iter().flatten());
    let size = |spec: &ParamSpec| (spec.rows * spec.cols * dtype.bytes()) as u64;
    all.map(|adapter| size(&adapter.a) + size(&adapter.b)).sum()
}

/// Whether what is trained scores responses.
fn trains_verifier(run: &Run) -> bool {
    run.purpose == Purpose::Train && run.config.objective.kind.trains_verifier()
}

/// Responses of a group, each as long as may be: those sampled or given, and an expert's.
fn responses(config: &TrainConfig) -> usize {
    let objective = config.objective.kind.objective();
    let several = objective.needs_samples || config.objective.kind.trains_verifier();
    let sampled = if several { config.generate.samples } else { 0 };
    sampled + usize::from(objective.needs_expert())
}

/// How many prompts' groups are trained on at once.
fn micro_batch(config: &TrainConfig) -> usize {
    config.generate.prompts_per_step.div_ceil(config.train.gradient_accumulation)
}

/// What is sampled together, as far as there is room: how many prompts, how many streams of each, and what for.
fn samplings(run: &Run) -> Vec<(usize, usize, &'static str)> {
    let (config, all) = (run.config, run.prompts.len());
    let train = run.purpose == Purpose::Train;
    let mut both = Vec::new();
    if trains_verifier(run) {
        return both;
    }
    if !train || config.data.eval_tasks.is_some() {
        both.push((all, config.train.eval_samples, "evaluate"));
    }
    if train && config.objective.kind.objective().needs_samples {
        both.push((all.min(config.generate.prompts_per_step), config.generate.samples, "sample"));
    }
    both
}

/// `stored` is what weights are held in that are stored as given.
fn held_lines(
    run: &Run,
    stored: impl Fn(DType) -> DType,
    adapters: Option<u64>,
    state: Option<StateBytes>,
) -> Vec<Line> {
    let line = |what: &str, bytes| Line { what: what.to_owned(), bytes };
    let weights = weights(run.model, stored(run.dtype), run.config.model.per_layer_embeddings);
    let mut held = vec![line("weights", weights)];
    let judging =
        |(model, dtype): &(GemmaConfig, DType)| self::weights(model, stored(*dtype), Placement::Device);
    let judging: u64 = run.reward_models.iter().map(judging).sum();
    held.push(line("the reward model's weights", judging));
    if let Some(bytes) = adapters {
        held.push(line("adapters", bytes));
    }
    if let Some(StateBytes { gradients, moments, masters, .. }) = state {
        if holds_reference(run.config) {
            held.push(line("the model of the start, for the KL term", weights));
        }
        held.extend([line("gradients", gradients), line("moments", moments), line("masters", masters)]);
    }
    held.retain(|line| line.bytes > 0);
    held
}

/// What lies in the host's memory while a GPU computes.
fn host_lines(run: &Run, state: Option<StateBytes>) -> Vec<Line> {
    let line = |what: &str, bytes| Line { what: what.to_owned(), bytes };
    let mut all = Vec::new();
    if let Some(StateBytes { host_moments, host_masters, .. }) = state {
        all.extend([line("moments", host_moments), line("masters", host_masters)]);
    }
    if run.config.model.per_layer_embeddings == Placement::Host {
        let copies = 1 + u64::from(run.purpose == Purpose::Train && holds_reference(run.config));
        all.push(line("per-layer embeddings", copies * per_layer_bytes(run.model, DType::Bf16)));
    }
    all.retain(|line| line.bytes > 0);
    all
}

/// What an update moves, and what is computed meanwhile.
fn bus(run: &Run, model: &Gemma<Cuda>, state: &StateBytes, [into, back]: [u64; 2]) -> Option<Bus> {
    let elements = |spec: &ParamSpec| (spec.rows * spec.cols) as u64;
    let specs = full_plan(model);
    let all: u64 = specs.tensors().into_iter().map(elements).sum();
    let StateBytes { gradients, moments, masters, host_moments, host_masters } = *state;
    let update = 2 * (gradients + moments + masters + host_moments + host_masters + 2 * all);
    let config = run.config;
    let groups = config.generate.prompts_per_step.min(run.prompts.len());
    let prompts: usize = run.prompts[..groups].iter().map(Vec::len).sum();
    let predicted = (groups * responses(config) * config.generate.max_new_tokens) as u64;
    let tokens = prompts as u64 + predicted;
    let head = elements(specs.lm_head());
    // Rows of embeddings are looked up.
    let of_layers = specs.per_layer_embed.as_ref().map_or(0, elements);
    let all = all - of_layers - if specs.head.is_some() { elements(&specs.embed) } else { 0 };
    // Two for each weight and token, and twice that for the gradients.
    let training = 6 * ((all - head) * tokens + head * predicted);
    (into > 0).then_some(Bus { into, back, update, training })
}

/// Whether a second model is held.
fn holds_reference(config: &TrainConfig) -> bool {
    config.train.kl_coefficient > 0.0 && config.lora.is_none()
}

/// The model that is trained, of zeros on a device, with adapters where there are to be some.
fn zeros(run: &Run, cuda: &Cuda) -> Gemma<Cuda> {
    let mut model = zeros_of(run.model, cuda, run.config.model.per_layer_embeddings);
    if let Some(spec) = &run.config.lora {
        begin(&mut model, spec.rank, &spec.targets, 0);
        model.adapter_scale = Some(spec.scale());
    }
    model
}

/// A model of zeros.
fn zeros_of(config: &GemmaConfig, cuda: &Cuda, per_layer: Placement) -> Gemma<Cuda> {
    let dtype = cuda.activation_dtype();
    let params = params::plan(config).map(|spec| cuda.zeros(dtype, spec.rows, spec.cols));
    // After the layers' scalars.
    let embed = params::frozen(config).pop().filter(|(_, shape)| shape.len() == 2);
    let per_layer_embed = embed.map(|(_, shape)| match per_layer {
        Placement::Device | Placement::Trained => cuda.zeros(dtype, shape[0], shape[1]),
        Placement::Host => cuda.mapped_zeros(dtype, shape[0], shape[1]),
    });
    let frozen = Frozen { scalars: vec![1.0; config.layers.len()], per_layer_embed };
    let backend = cuda.clone();
    Gemma { backend, config: config.clone(), params, frozen, adapter_scale: None }
}

/// See [`Plan`].
struct Found {
    held: Vec<Line>,
    phases: Vec<Line>,
    host: Vec<Line>,
    bus: Option<Bus>,
}

/// What the run asks of a device, which fails if it has not as much.
fn on_gpu(run: &Run, dry: &Dry) -> Result<Found, DeviceError> {
    let config = run.config;
    let cuda = Cuda::new(Box::new(dry.clone()))?;
    let mut model = zeros(run, &cuda);
    let specs = full_plan(&model);
    let (train, lora) = (run.purpose == Purpose::Train, config.lora.is_some());
    let mut optimizer = train.then(|| Optimizer::new(&model, &config.optimizer, 0));
    let without_adapters = Run { config: &TrainConfig { lora: None, ..config.clone() }, ..*run };
    let reference = (train && holds_reference(config)).then(|| zeros(&without_adapters, &cuda));
    let judging: Vec<Gemma<Cuda>> =
        run.reward_models.iter().map(|(model, _)| zeros_of(model, &cuda, Placement::Device)).collect();
    cuda.check()?;
    let state = train.then(|| state_bytes(&specs.tensors(), lora, DType::Bf16, &config.optimizer));
    let adapters = lora.then(|| adapter_bytes(&specs, DType::Bf16));
    let held = held_lines(run, |_| DType::Bf16, adapters, state);
    let begin = dry.used();
    let mut phases = Vec::new();
    for (prompts, streams, what) in samplings(run) {
        dry.take_peak();
        let (together, at_once) = sampled(run, &model, prompts, streams)?;
        let bytes = dry.take_peak() - begin;
        phases.push(sampling_line(what, together, at_once, bytes));
        if !judging.is_empty() {
            dry.take_peak();
            judging.iter().try_for_each(|judge| scored(run, judge, together, streams))?;
            phases.push(scoring_line(dry.take_peak() - begin));
        }
    }
    dry.take_bus();
    if let Some(optimizer) = &mut optimizer {
        dry.take_peak();
        let kept = trained(run, &mut model, reference.as_ref(), optimizer)?;
        let bytes = dry.take_peak() - begin;
        phases.push(training_line(run, &kept, bytes));
    }
    let bus = state.and_then(|state| bus(run, &model, &state, dry.take_bus()));
    Ok(Found { held, phases, host: host_lines(run, state), bus })
}

fn sampling_line(what: &str, prompts: usize, streams: usize, bytes: u64) -> Line {
    Line { what: format!("to {what} {prompts} prompts x {streams} responses at once"), bytes }
}

fn scoring_line(bytes: u64) -> Line {
    Line { what: "for the reward model to score them".into(), bytes }
}

/// So many responses, as long as they may be, no two of which begin alike, because what does is computed once.
fn different(run: &Run, count: usize) -> Vec<Vec<u32>> {
    let (vocab, new) = (run.model.vocab_size, run.config.generate.max_new_tokens);
    (0..count).map(|i| vec![(i % vocab) as u32; new]).collect()
}

/// Scores responses to the first prompts.
fn scored(run: &Run, judge: &Gemma<Cuda>, prompts: usize, streams: usize) -> Result<(), DeviceError> {
    let responses = different(run, streams);
    let responses: Vec<&[u32]> = responses.iter().map(Vec::as_slice).collect();
    let groups: Vec<Continued> =
        run.prompts[..prompts].iter().map(|prompt| Continued { prompt, responses: &responses }).collect();
    match reward::logits(judge, &groups) {
        Err(RewardError::Device(e)) => Err(e),
        // A reward model with a shorter context is refused before its run begins.
        _ => judge.backend.check(),
    }
}

fn training_line(run: &Run, kept: &Kept, bytes: u64) -> Line {
    let kept = match kept.share() {
        Share::All => "all activations kept",
        Share::Some => "some activations kept",
        Share::None => "no activations kept",
    };
    let (groups, responses) = (micro_batch(run.config).min(run.prompts.len()), responses(run.config));
    Line { what: format!("to train on {groups} prompts x {responses} responses at once, {kept}"), bytes }
}

/// Samples responses to the first prompts that there is room for, and says how many those are, and how many responses to each are
/// sampled at once.
fn sampled(
    run: &Run,
    model: &Gemma<Cuda>,
    prompts: usize,
    streams: usize,
) -> Result<(usize, usize), DeviceError> {
    let generate_section = &run.config.generate;
    let new = generate_section.max_new_tokens;
    let lengths = run.prompts[..prompts].iter().map(Vec::len);
    let together = fitting(model, lengths, streams, new).min(prompts);
    // Of parts the first is as large as any.
    let streams = match together {
        1 => streams_at_once(model, run.prompts[0].len(), streams, new),
        _ => streams,
    };
    let prompts: Vec<Prompt> =
        run.prompts[..together].iter().map(|ids| Prompt { ids, number: 0, streams }).collect();
    let sampling = Sampling {
        temperature: generate_section.temperature as f32,
        truncation: generate_section.truncation(),
        max_new_tokens: new,
        seed: 0,
        step: 0,
    };
    match generate(model, &prompts, &sampling, |_| false, |_, _, _| {}) {
        Ok(_) => model.backend.check().map(|()| (together, streams)),
        Err(GenerateError::Device(e)) => Err(e),
        Err(e) => panic!("prompts that fit the model, and log-probs of zero: {e}"),
    }
}

/// One training step on the first prompts.
fn trained(
    run: &Run,
    model: &mut Gemma<Cuda>,
    reference: Option<&Gemma<Cuda>>,
    optimizer: &mut Optimizer<Cuda>,
) -> Result<Kept, DeviceError> {
    let config = run.config;
    let responses = different(run, responses(config));
    let responses: Vec<&[u32]> = responses.iter().map(Vec::as_slice).collect();
    let micro = micro_batch(config).min(run.prompts.len());
    let groups: Vec<Continued> =
        run.prompts[..micro].iter().map(|prompt| Continued { prompt, responses: &responses }).collect();
    let temperature = config.generate.temperature as f32;
    if let Some(reference) = reference {
        drop(Forward::with(reference, &groups, temperature, Recompute::All));
    }
    let kept = if trains_verifier(run) {
        let forward = reward::Forward::new(model, &groups, config.train.recompute);
        let (kept, count) = (forward.kept, forward.logits.len());
        forward.backward(model, &vec![0.0; count], &mut optimizer.grads);
        kept
    } else {
        let forward = Forward::with(model, &groups, temperature, config.train.recompute);
        let (kept, count) = (forward.kept, forward.logprobs.len());
        forward.backward(model, &vec![0.0; count], &mut optimizer.grads);
        kept
    };
    optimizer.step(model, &config.optimizer, config.optimizer.lr, 1).expect("gradients of zero");
    model.backend.check().map(|()| kept)
}

fn on_cpu(run: &Run, memory: u64) -> Plan {
    // Nothing is streamed where there is one memory.
    let mut alone = run.config.clone();
    alone.optimizer.offload = false;
    let run = &Run { config: &alone, ..*run };
    let (model, config) = (run.model, run.config);
    // The names and shapes of adapters, which take no memory here.
    let dry = Cuda::new(Box::new(Dry::stingy())).expect("a device that gives all that is asked for");
    let specs = full_plan(&zeros(run, &dry));
    let (train, lora) = (run.purpose == Purpose::Train, config.lora.is_some());
    let state = train.then(|| state_bytes(&specs.tensors(), lora, run.dtype, &config.optimizer));
    let adapters = lora.then(|| adapter_bytes(&specs, DType::F32));
    let mut held = held_lines(run, |dtype| dtype, adapters, state);
    let tokenizers = 1 + run.reward_models.len();
    let tokenizer = (tokenizers * model.vocab_size * cpu::TOKENIZER) as u64;
    held.push(Line { what: "the tokenizer".into(), bytes: tokenizer });
    let held_bytes: u64 = held.iter().map(|line| line.bytes).sum();
    let new = config.generate.max_new_tokens;
    let counted = OnCpu::new(model, run.dtype, config.model.precision().compute);
    let mut phases = Vec::new();
    for (prompts, streams, what) in samplings(run) {
        let cost =
            |streams| move |prompt: &Vec<u32>| generate::bytes(model, DType::F32, prompt.len(), streams, new);
        let (prompts, room) = (&run.prompts[..prompts], Cpu::F32.generation_bytes());
        let together = within(prompts.iter().map(cost(streams)), room).min(prompts.len());
        let at_once = match together {
            1 => {
                let room = generate::room_of_one(room, memory.saturating_sub(held_bytes) / 2);
                generate::streams_within(model, DType::F32, prompts[0].len(), streams, new, room)
            }
            _ => streams,
        };
        let truncated = !config.generate.truncation().is_none();
        let tokens = shared_rows(run.prompts, together);
        let bytes = counted.sampling(tokens, together * at_once, new, truncated);
        phases.push(sampling_line(what, together, at_once, bytes));
        let tokens = tokens + together * streams * new;
        let cost = |(judge, dtype): &(GemmaConfig, DType)| {
            let most = Cpu::F32.generation_bytes() / reward::bytes(judge, DType::F32, 1).max(1);
            OnCpu::new(judge, *dtype, ComputeChoice::Auto).scoring(tokens.min(most))
        };
        phases.extend(run.reward_models.iter().map(cost).max().map(scoring_line));
    }
    if train {
        let groups = micro_batch(config).min(run.prompts.len());
        let prompts = shared_rows(run.prompts, groups);
        let count = groups * responses(config);
        let size = match trains_verifier(run) {
            true => reward::step_size(prompts + count * new, count),
            // Nothing is predicted from a response's last token, and the first of each from its prompt's last.
            false => StepSize {
                tokens: prompts + count * new.saturating_sub(1),
                predicting: groups + count * new.saturating_sub(1),
            },
        };
        let free = memory.saturating_sub(held_bytes) / 2;
        let kept = match config.train.recompute {
            Recompute::Auto => Kept::within(free, model, DType::F32, &size),
            Recompute::None => Kept::all(model),
            Recompute::All => Kept::none(model),
        };
        phases.push(training_line(run, &kept, counted.training(&size, &kept)));
        // Weights of products lie in panels, which files do not, and codes are copied.
        let codes = |spec: &ParamSpec| keeps_codes(spec, &config.optimizer);
        let copied = |spec: &&ParamSpec| {
            let weights =
                if run.dtype == DType::Bf16 { DType::Bf16.bytes() } else { usize::from(codes(spec)) };
            (spec.rows * spec.cols * weights) as u64
        };
        let largest =
            specs.tensors().into_iter().filter(|spec| is_trained(spec, lora)).map(|spec| copied(&spec)).max();
        phases.push(Line { what: "to write a checkpoint".into(), bytes: largest.unwrap_or(0) });
    }
    phases.retain(|line| line.bytes > 0);
    let (host, host_memory, bus) = (Vec::new(), None, None);
    let mut plan = Plan { held, phases, memory, host, host_memory, bus, fits: true, remedies: Vec::new() };
    plan.fits = plan.peak() <= memory;
    plan
}

/// The most rows of so many prompts in one batch, which has once what they all begin with: those of the longest, if they have
/// no more in common than all prompts.
fn shared_rows(prompts: &[Vec<u32>], together: usize) -> usize {
    let all: Vec<&[u32]> = prompts.iter().map(Vec::as_slice).collect();
    let tokens = |prompts: &[&[u32]]| prompts.iter().map(|ids| ids.len()).sum::<usize>();
    let shared = (tokens(&all) - Layout::of_prompts(&all).0.ids().len()) / (all.len() - 1).max(1);
    tokens(&all[..together]) - shared * together.saturating_sub(1)
}

/// A setting that saves memory, if it is not made already: applies it, and says how it is set.
type Change = fn(&mut TrainConfig, &Run, usize) -> Option<String>;

/// Those that cost least first: smaller batches take no more work and change no result but in its last bits, rows of embeddings are
/// few bytes wherever they come from, with codes and
/// without masters the optimizer rounds, and so do sums of gradients in bf16; a streamed state changes no bit, and
/// takes as much of the host's memory and of its bus; with adapters the run is another.
const CHANGES: [Change; 8] = [
    |c, _, parts| {
        c.train.gradient_accumulation = parts;
        Some(format!("train.gradient_accumulation={parts}"))
    },
    |c, run, _| {
        let section = &mut c.model.per_layer_embeddings;
        let changes = run.model.per_layer_width > 0 && *section == Placement::Device;
        changes.then(|| {
            *section = Placement::Host;
            "model.per_layer_embeddings=host".into()
        })
    },
    |c, _, _| {
        let changes = c.lora.is_none() && c.optimizer.moments != MomentKind::Blockwise;
        c.optimizer.moments = MomentKind::Blockwise;
        changes.then(|| "optimizer.moments=8bit".into())
    },
    |c, _, _| {
        let changes = c.lora.is_none() && c.optimizer.embedding_moments != MomentKind::Blockwise;
        c.optimizer.embedding_moments = MomentKind::Blockwise;
        changes.then(|| "optimizer.embedding_moments=8bit".into())
    },
    |c, _, _| {
        let changes = c.lora.is_none() && c.optimizer.masters;
        c.optimizer.masters = false;
        changes.then(|| "optimizer.masters=false".into())
    },
    |c, _, _| {
        let changes = c.lora.is_none() && c.optimizer.gradients != DType::Bf16;
        c.optimizer.gradients = DType::Bf16;
        changes.then(|| "optimizer.gradients=bf16".into())
    },
    |c, _, _| {
        let changes = c.lora.is_none() && !c.optimizer.offload;
        c.optimizer.offload = true;
        changes.then(|| "optimizer.offload=true".into())
    },
    |c, _, _| {
        let changes = c.lora.is_none() && c.model.per_layer_embeddings != Placement::Trained;
        c.lora = Some(c.lora.take().unwrap_or_default());
        changes.then(|| "lora.rank=16".into())
    },
];
/// Of adapters, among [`CHANGES`]; what rounds the state of all parameters is of no use to them.
const LORA: usize = CHANGES.len() - 1;
/// Of state, the first among [`CHANGES`].
const STATE: usize = 2;

/// Settings under which the run would fit.
fn remedies(run: &Run, place: Place) -> Vec<String> {
    if run.purpose == Purpose::Evaluate {
        return Vec::new();
    }
    let prompts = run.config.generate.prompts_per_step;
    let tried = |on: &[bool], parts: usize| {
        let mut config = run.config.clone();
        let texts: Vec<String> = CHANGES
            .iter()
            .zip(on)
            .filter(|(_, on)| **on)
            .filter_map(|(f, _)| f(&mut config, run, parts))
            .collect();
        Plan::of(&Run { config: &config, ..*run }, place).fits.then_some(texts)
    };
    let mut on = [false; CHANGES.len()];
    let enough = (0..CHANGES.len()).any(|i| {
        on[i] = true;
        if i == LORA {
            on[STATE..LORA].fill(false);
        }
        tried(&on, prompts).is_some()
    });
    if !enough {
        return Vec::new();
    }
    // What was tried before it was enough may not be needed.
    for i in 0..LORA {
        let before = std::mem::replace(&mut on[i], false);
        on[i] = before && tried(&on, prompts).is_none();
    }
    // Micro-batches are of one size.
    let parts = (run.config.train.gradient_accumulation..=prompts).filter(|&n| prompts.is_multiple_of(n));
    parts.filter_map(|parts| tried(&on, parts)).next().unwrap_or_default()
}
