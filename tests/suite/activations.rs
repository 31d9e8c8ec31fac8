//! What training keeps of a forward pass: gradients do not depend on it, memory stays within the plan, and what is kept
//! is not computed again.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use bon_engine::backend::cpu::Cpu;
use bon_engine::backend::cuda::Cuda;
use bon_engine::backend::{Backend, Batch, DType};
use bon_engine::delegate_device;
use bon_engine::device::vm::{Checks, Options, Report, Vm};
use bon_engine::device::{Arg, Device, DeviceError, HostPtr, Kernel, Launch, Ptr};
use bon_engine::gemma::activations::{Kept, Recompute, Share, StepSize};
use bon_engine::gemma::config::{GemmaConfig, LayerShape};
use bon_engine::gemma::lora::{Linear, begin};
use bon_engine::gemma::params::{self, ParamKind};
use bon_engine::gemma::{Gemma, KvCache, Params, published};
use bon_engine::segments::Segments;
use bon_engine::train::config::OptimizerSection;
use bon_engine::train::interrupt::Interrupt;
use bon_engine::train::optimizer::Optimizer;
use bon_engine::train::policy::{Continued, Forward};
use bon_engine::train::run::{Event, run};

use crate::engine::{FAMILIES, config, model};
use crate::kernels::{activation, compiled, counting, vm};
use crate::tiny;
use crate::training::{Workplace, checkpoint};

/// A batch of three sequences.
struct Flat {
    ids: Vec<u32>,
    segments: Segments,
}

impl Flat {
    fn new() -> Self {
        Self { ids: tiny::tokens(7, 40), segments: Segments::separate(&[21, 1, 18]) }
    }

    /// Hidden states of the wanted rows and all gradients, in full, of a model that keeps `kept`.
    fn gradients<B: Backend>(&self, model: &Gemma<B>, wanted: Option<&[u32]>, kept: &Kept) -> Vec<Vec<u8>> {
        let runs = self.segments.all_queries();
        let batch = Batch::new(&self.ids, &self.segments, &runs);
        let b = &model.backend;
        let (hidden, trace) = model.forward_keeping(&batch, wanted, kept);
        let mut grads = model.params.zeros_like(b);
        let rows = wanted.map_or(self.ids.len(), <[u32]>::len);
        model.backward(trace, activation(b, 3, rows, model.config.hidden_size), &mut grads);
        b.check().unwrap_or_else(|e| panic!("{e}"));
        [&hidden].into_iter().chain(grads.tensors()).map(|x| b.download(x)).collect()
    }
}

fn same_whatever_is_kept<B: Backend>(family: &str, backend: B) {
    let (batch, model) = (Flat::new(), model(backend, &config(family)));
    let layers = model.config.layers.len();
    // Where the last layers read the keys and values of others, only the wanted rows run through them.
    let some = (model.config.first_sharing() < layers).then_some(Some(&[5, 19, 20, 21, 38][..]));
    for wanted in [None].into_iter().chain(some) {
        let want = batch.gradients(&model, wanted, &Kept::none(&model.config));
        assert!(want.iter().all(|tensor| tensor.iter().any(|byte| *byte != 0)), "{family}: zeros");
        for (attention, mlp) in [(layers, layers), (1, 0), (0, 1), (layers, 1), (1, layers)] {
            let got = batch.gradients(&model, wanted, &Kept { layers, attention, mlp, logits: false });
            assert!(got == want, "{family}: other bits where {attention} and {mlp} of {layers} blocks keep");
        }
    }
}

#[test]
fn gradients_have_the_same_bits_whatever_is_kept_on_the_cpu() {
    for family in FAMILIES {
        same_whatever_is_kept(family, Cpu::F32);
        same_whatever_is_kept(family, Cpu::BF16);
    }
}

#[test]
fn gradients_have_the_same_bits_whatever_is_kept_on_the_kernels() {
    if !compiled() {
        return;
    }
    for family in FAMILIES {
        same_whatever_is_kept(family, vm(None));
    }
}

// ----------------------------------------------------------------------------------------------------------- memory

/// A virtual GPU with so many bytes of memory, which counts them.
pub(crate) struct Metered {
    vm: Vm,
    /// Bytes that there are, and that it says there are.
    limit: AtomicU64,
    told: AtomicU64,
    live: Mutex<(HashMap<u64, u64>, u64)>,
    pub(crate) peak: AtomicU64,
    /// Bytes of the host's memory that were asked for.
    pub(crate) host: AtomicU64,
}

impl Metered {
    pub(crate) fn new(limit: u64) -> Arc<Self> {
        Arc::new(Self {
            vm: Vm::new(Options { checks: Checks::NONE, ..Options::default() }),
            limit: AtomicU64::new(limit),
            told: AtomicU64::new(limit),
            live: Mutex::default(),
            peak: AtomicU64::new(0),
            host: AtomicU64::new(0),
        })
    }

    fn live(&self) -> u64 {
        self.live.lock().unwrap().1
    }

    fn set(&self, limit: u64, told: u64) {
        self.limit.store(limit, Ordering::Relaxed);
        self.told.store(told, Ordering::Relaxed);
    }
}

impl Device for Metered {
    delegate_device!(self, self.vm; name, multiprocessors, load, write, read, fill, launch, synchronize, host_free, host_write, host_read, copy_in, copy_out);

    fn alloc(&self, bytes: usize) -> Result<Ptr, DeviceError> {
        let (sizes, live) = &mut *self.live.lock().unwrap();
        if *live + bytes as u64 > self.limit.load(Ordering::Relaxed) {
            return Err(DeviceError::out_of_memory("metered", "there is no more"));
        }
        let ptr = self.vm.alloc(bytes)?;
        sizes.insert(ptr.0, bytes as u64);
        *live += bytes as u64;
        self.peak.fetch_max(*live, Ordering::Relaxed);
        Ok(ptr)
    }

    fn free(&self, ptr: Ptr) {
        let (sizes, live) = &mut *self.live.lock().unwrap();
        *live -= sizes.remove(&ptr.0).expect("it was allocated");
        self.vm.free(ptr);
    }

    fn host_alloc(&self, bytes: usize) -> Result<HostPtr, DeviceError> {
        self.host.fetch_add(bytes as u64, Ordering::Relaxed);
        self.vm.host_alloc(bytes)
    }

    fn available(&self) -> Result<Option<u64>, DeviceError> {
        Ok(Some(self.told.load(Ordering::Relaxed).saturating_sub(self.live())))
    }
}

/// The tiny model on a metered device without a limit.
fn metered(family: &str) -> (Arc<Metered>, Gemma<Cuda>) {
    let device = Metered::new(u64::MAX);
    let cuda = Cuda::new(Box::new(Arc::clone(&device))).unwrap();
    let model = model(cuda, &config(family));
    (device, model)
}

#[test]
fn as_much_is_kept_as_was_planned() {
    if !compiled() {
        return;
    }
    for family in FAMILIES {
        let (device, model) = metered(family);
        let batch = Flat::new();
        let runs = batch.segments.all_queries();
        let tokens = Batch::new(&batch.ids, &batch.segments, &runs);
        let held = |kept: &Kept| {
            let before = device.live();
            let (_, trace) = model.forward_keeping(&tokens, None, kept);
            let held = device.live() - before;
            drop(trace);
            held
        };
        // Tables that are made once are there from the first pass on.
        held(&Kept::none(&model.config));
        let least = held(&Kept::none(&model.config));
        let layers = model.config.layers.len();
        for (attention, mlp) in [(layers, layers), (1, 0), (0, layers), (layers, 1)] {
            let kept = Kept { layers, attention, mlp, logits: false };
            let planned = kept.bytes_per_token(&model.config, DType::Bf16) * batch.ids.len();
            // Routes also say where the rows of each expert begin.
            let experts = model.config.experts.map_or(0, |experts| mlp * (experts.count + 1) * 4);
            assert_eq!(held(&kept) - least, (planned + experts) as u64, "{family}: {kept:?}");
        }
    }
}

/// A prompt and responses to it, long enough that a layer's activations outweigh what is fixed.
struct Grouped {
    prompt: Vec<u32>,
    responses: Vec<Vec<u32>>,
}

impl Grouped {
    fn new() -> Self {
        Self { prompt: tiny::tokens(1, 30), responses: vec![tiny::tokens(2, 20), tiny::tokens(3, 15)] }
    }

    fn with<R>(&self, f: impl FnOnce(&[Continued]) -> R) -> R {
        let responses: Vec<&[u32]> = self.responses.iter().map(Vec::as_slice).collect();
        f(&[Continued { prompt: &self.prompt, responses: &responses }])
    }

    fn forward<B: Backend>(&self, model: &Gemma<B>, recompute: Recompute) -> Forward<B> {
        self.with(|groups| Forward::with(model, groups, 1.0, recompute))
    }

    /// All gradients after a forward pass, or the device's error.
    fn backward<B: Backend>(
        &self,
        model: &Gemma<B>,
        forward: Forward<B>,
        grads: &mut Params<B::Tensor>,
    ) -> Result<Vec<Vec<u8>>, DeviceError> {
        let weights: Vec<f32> = (0..forward.logprobs.len()).map(|i| 0.3 - 0.02 * i as f32).collect();
        forward.backward(model, &weights, grads);
        model.backend.check()?;
        Ok(grads.tensors().into_iter().map(|g| model.backend.download(g)).collect())
    }
}

#[test]
fn keeping_asks_for_no_memory_that_there_is_not() {
    if !compiled() {
        return;
    }
    let (batch, family) = (Grouped::new(), "gemma3_text");
    // What a step takes that keeps nothing, and its gradients.
    let (device, model) = metered(family);
    let mut grads = model.params.zeros_like(&model.backend);
    let forward = batch.forward(&model, Recompute::All);
    let want = batch.backward(&model, forward, &mut grads).unwrap();
    let least = device.peak.load(Ordering::Relaxed);
    let size = StepSize { tokens: 30 + 19 + 14, predicting: 1 + 19 + 14 };
    let all = Kept::all(&model.config).bytes_per_token(&model.config, DType::Bf16) * size.tokens;
    let mut met = Vec::new();
    for eighths in 0..=24 {
        let limit = least + all as u64 * eighths / 8;
        let (device, model) = metered(family);
        let mut grads = model.params.zeros_like(&model.backend);
        device.set(limit, limit);
        let forward = batch.forward(&model, Recompute::Auto);
        met.push(forward.kept.share());
        let got = batch.backward(&model, forward, &mut grads);
        let got = got.unwrap_or_else(|e| panic!("{eighths} eighths beyond what is needed: {e}"));
        assert!(got == want, "other bits with {eighths} eighths");
    }
    met.dedup();
    assert_eq!(met, [Share::None, Share::Some, Share::All]);
    // It would not have been enough.
    let (device, model) = metered(family);
    let mut grads = model.params.zeros_like(&model.backend);
    device.set(least, least);
    let forward = batch.forward(&model, Recompute::None);
    assert!(batch.backward(&model, forward, &mut grads).unwrap_err().out_of_memory);
}

#[test]
fn memory_that_cannot_be_had_after_all_is_not_needed() {
    if !compiled() {
        return;
    }
    let (batch, family) = (Grouped::new(), "gemma2");
    let (device, model) = metered(family);
    let mut grads = model.params.zeros_like(&model.backend);
    let forward = batch.forward(&model, Recompute::All);
    let (before, forward_peak) = (device.live(), device.peak.load(Ordering::Relaxed));
    let want = batch.backward(&model, forward, &mut grads).unwrap();
    let least = device.peak.load(Ordering::Relaxed);

    // More is told to be free than the forward pass finds, as where it lies in pieces.
    let (device, model) = metered(family);
    let mut grads = model.params.zeros_like(&model.backend);
    device.set(forward_peak, u64::MAX);
    let forward = batch.forward(&model, Recompute::Auto);
    assert_eq!(forward.kept.share(), Share::None);
    device.set(least, u64::MAX);
    assert!(batch.backward(&model, forward, &mut grads).unwrap() == want);

    // Others take it between the passes.
    let (device, model) = metered(family);
    let mut grads = model.params.zeros_like(&model.backend);
    let forward = batch.forward(&model, Recompute::Auto);
    assert_eq!(forward.kept.share(), Share::All);
    assert!(device.live() > before);
    device.set(least, least);
    assert!(batch.backward(&model, forward, &mut grads).unwrap() == want);
}

#[test]
fn more_memory_keeps_more_and_never_more_than_there_is() {
    let size = StepSize { tokens: 5000, predicting: 4000 };
    for family in FAMILIES {
        let config = config(family);
        for dtype in [DType::F32, DType::Bf16] {
            let within = |bytes: u64| Kept::within(bytes, &config, dtype, &size);
            assert_eq!(within(0), Kept::none(&config));
            assert_eq!(within(u64::MAX), Kept::all(&config));
            let mut last = Kept::none(&config);
            for mebibytes in 0..1000 {
                let kept = within(mebibytes << 20);
                assert!(
                    kept.attention >= last.attention && kept.mlp >= last.mlp && kept.attention >= kept.mlp
                );
                let bytes = kept.bytes_per_token(&config, dtype) as u64 * size.tokens as u64;
                assert!(bytes <= mebibytes << 20, "{kept:?} in {mebibytes} MiB");
                last = kept;
            }
            assert_eq!(last, Kept::all(&config));
        }
    }
}

// ------------------------------------------------------------------------------------------------------------- work

/// A family's model whose widths are all whole tiles, and whose values are no keys: each matrix makes as many products as
/// any other.
fn in_whole_tiles(family: &str) -> GemmaConfig {
    let mut config = GemmaConfig { hidden_size: 256, vocab_size: 1024, max_positions: 512, ..config(family) };
    if config.per_layer_width != 0 {
        config.per_layer_width = 256;
    }
    for layer in &mut config.layers {
        layer.shape = LayerShape { heads: 4, kv_heads: 2, intermediate: 512, ..layer.shape };
        layer.keys_are_values = false;
    }
    config
}

/// The layer of a tensor.
fn layer_of(name: &str) -> Option<usize> {
    name.split_once("layers.")?.1.split_once('.')?.0.parse().ok()
}

/// Whether a matrix multiplies the wanted rows alone: in the layers that read the keys and values of others, and of the one before
/// them all but the projections that attention reads.
fn in_tail(config: &GemmaConfig, name: &str) -> bool {
    let Some((narrowing, layer)) = config.narrowing().zip(layer_of(name)) else { return false };
    let read = ["q_proj", "k_proj", "v_proj"].iter().any(|part| name.contains(part));
    layer > narrowing || layer == narrowing && !read
}

/// Rows times elements of every matrix that multiplies rows, all of them or those that are wanted.
fn products(config: &GemmaConfig, rows: u64, wanted: u64) -> u64 {
    let in_tail = |spec: &params::ParamSpec| in_tail(config, &spec.name);
    let plan = params::plan(config);
    let matrices = plan.tensors().into_iter().filter(|spec| spec.kind == ParamKind::Matrix);
    let of_layers = matrices.filter(|spec| spec.name != plan.embed.name);
    of_layers.map(|spec| (spec.rows * spec.cols) as u64 * if in_tail(spec) { wanted } else { rows }).sum()
}

/// FLOPs of tensor cores, those of attention or all others.
fn tensor_flops(reports: &[Report], attention: bool) -> u64 {
    let which = |r: &&Report| r.kernel.starts_with("attention") == attention;
    reports.iter().filter(which).map(|r| r.mma_flops).sum()
}

/// The tokens of [`counted`], and those of them that predict one.
const TOKENS: u64 = 256;
const PREDICTING: u64 = 128;

/// What the kernels of a training step did.
fn counted(config: &GemmaConfig, recompute: Recompute) -> Vec<Report> {
    counted_with(config, recompute, None)
}

/// The same of adapters of that rank on all linear maps, where there is one.
fn counted_with(config: &GemmaConfig, recompute: Recompute, rank: Option<usize>) -> Vec<Report> {
    let vm = Arc::new(Vm::new(Options { checks: Checks::NONE, ..Options::default() }));
    let mut model = model(Cuda::new(Box::new(Arc::clone(&vm))).unwrap(), config);
    if let Some(rank) = rank {
        begin(&mut model, rank, &Linear::ALL, 1);
        model.adapter_scale = Some(2.0);
    }
    let response = tiny::tokens(2, PREDICTING as usize);
    let batch =
        Grouped { prompt: tiny::tokens(1, (TOKENS - PREDICTING) as usize + 1), responses: vec![response] };
    // As training has them: of what is not trained there is no gradient.
    let mut grads = Optimizer::new(&model, &OptimizerSection::default(), 0).grads;
    vm.keep_reports();
    let forward = batch.forward(&model, recompute);
    batch.backward(&model, forward, &mut grads).unwrap();
    vm.take_reports()
}

/// Gemma 4 E's last layers have those of the tokens that predict one.
#[test]
fn with_kept_activations_a_step_is_three_times_the_forward_products() {
    if !counting() {
        return;
    }
    for family in ["gemma3_text", "gemma4_e"] {
        let config = in_whole_tiles(family);
        let head = PREDICTING * (config.vocab_size * config.hidden_size) as u64;
        // Y, dX and dW of every layer, and of the head.
        let products = 3 * 2 * (products(&config, TOKENS, PREDICTING) + head);
        let launched =
            |reports: &[Report], name: &str| reports.iter().filter(|r| r.kernel.starts_with(name)).count();
        let (kept, again) = (counted(&config, Recompute::Auto), counted(&config, Recompute::All));
        let ratio = tensor_flops(&kept, false) as f64 / products as f64;
        let what = "of the products of one forward and one backward pass";
        assert!((1.0..=1.02).contains(&ratio), "{family}: {ratio} {what}");
        let twice = tensor_flops(&again, false) as f64 / products as f64;
        assert!(twice > 1.2, "{family}: computing again is no more work: {twice}");
        // Attention runs forward once; its own backward pass is the same.
        assert_eq!(2 * launched(&kept, "attention_forward"), launched(&again, "attention_forward"));
        assert_eq!(launched(&kept, "attention_backward"), launched(&again, "attention_backward"));
        let whole = |reports: &[Report]| tensor_flops(reports, false) + tensor_flops(reports, true);
        assert!(whole(&again) as f64 > 1.2 * whole(&kept) as f64);
    }
}

/// Of a step of adapters Y and dX of every weight, and of every adapter the seven products of its own: x A^T, with B in the sum,
/// dy B and dB, x A^T again, dA, and with A in the sum.
#[test]
fn a_step_of_adapters_computes_no_gradient_of_the_weights_that_stay() {
    if !counting() {
        return;
    }
    // Whole tiles.
    const RANK: u64 = 128;
    for family in ["gemma3_text", "gemma4_e"] {
        let config = in_whole_tiles(family);
        let head = PREDICTING * (config.vocab_size * config.hidden_size) as u64;
        let weights = products(&config, TOKENS, PREDICTING) + head;
        let of_adapters: u64 = params::plan(&config)
            .layers
            .iter()
            .flat_map(|layer| {
                let maps = Linear::ALL.into_iter().filter_map(|map| layer.weight(map));
                maps.map(|spec| {
                    let rows = if in_tail(&config, &spec.name) { PREDICTING } else { TOKENS };
                    rows * RANK * (4 * spec.cols + 3 * spec.rows) as u64
                })
            })
            .sum();
        let full = tensor_flops(&counted(&config, Recompute::None), false);
        let adapted = tensor_flops(&counted_with(&config, Recompute::None, Some(RANK as usize)), false);
        for (what, flops, products) in
            [("all weights", full, 3 * weights), ("adapters", adapted, 2 * weights + of_adapters)]
        {
            let ratio = flops as f64 / (2 * products) as f64;
            assert!((1.0..=1.02).contains(&ratio), "{family}, {what}: {ratio} of the products by hand");
        }
    }
}

#[test]
fn in_generation_prompts_run_only_the_layers_whose_keys_somebody_reads() {
    if !counting() {
        return;
    }
    let config = in_whole_tiles("gemma4_e");
    let vm = Arc::new(Vm::new(Options { checks: Checks::NONE, ..Options::default() }));
    let model = model(Cuda::new(Box::new(Arc::clone(&vm))).unwrap(), &config);
    let ids = tiny::tokens(1, TOKENS as usize);
    let segments = Segments::separate(&[ids.len() / 2; 2]);
    let runs = segments.all_queries();
    let batch = Batch::new(&ids, &segments, &runs);
    // Every second one, so that tiles are whole.
    let wanted: Vec<u32> = (0..TOKENS as u32).step_by((TOKENS / PREDICTING) as usize).collect();
    let mut cache = KvCache::new(&model.backend, &config, ids.len());
    vm.keep_reports();
    model.prefill(&batch, &wanted, &mut cache);
    let flops = tensor_flops(&vm.take_reports(), false);
    assert_eq!(flops, 2 * products(&config, TOKENS, PREDICTING));
}

/// By weights, the work of a prompt's token in the layers of Gemma 4 E2B and E4B beside that of a token that predicts one.
#[test]
fn prompts_meet_a_third_of_the_layers_of_e2b_and_more_than_half_of_e4bs() {
    let share = |model: &str| {
        let all = published::all();
        let (_, config) = all.iter().find(|(name, _)| *name == model).unwrap();
        let plan = params::plan(config);
        // What makes the layers' inputs stands before them, and runs for every token.
        let before = plan.per_layer.as_ref().map_or(0, |spec| spec.rows * spec.cols) as u64;
        let of = |wanted: u64| (products(config, 1, wanted) - before) as f64;
        100.0 * of(0) / of(1)
    };
    let [e2b, e4b] = ["Gemma 4 E2B", "Gemma 4 E4B"].map(share);
    assert_eq!(format!("{e2b:.1} % and {e4b:.1} %"), "28.4 % and 55.6 %");
}

// -------------------------------------------------------------------------------------------------------------- runs

#[test]
fn a_run_says_once_what_it_keeps_and_ends_the_same_either_way() {
    let place = Workplace::new();
    let ran = |output: &str, recompute: &str| {
        let config = place.config(output, &["train.steps=2", &format!("train.recompute={recompute}")]);
        let mut told = Vec::new();
        run(Cpu::F32, &config, false, &Interrupt::default(), |event| {
            if let Event::Activations { kept } = event {
                told.push(kept.share());
            }
        })
        .unwrap();
        (told, checkpoint(&config))
    };
    let (auto, all, none) = (ran("auto", "auto"), ran("all", "all"), ran("none", "none"));
    assert_eq!(
        (&auto.0[..], &all.0[..], &none.0[..]),
        (&[Share::All][..], &[Share::None][..], &[Share::All][..])
    );
    assert!(auto.1 == all.1 && none.1 == all.1, "other weights or moments");
}
