//! `bon-engine devices`: what this program can compute on, and which published models fit what.

use std::fmt::Write as _;
use std::io::Write;

use crate::backend::DType;
use crate::backend::cpu::simd::{Isa, isa};
use crate::backend::cuda::entries::{NO_KERNELS, compiled};
use crate::backend::cuda::offload::BUFFER;
use crate::device::driver::{self, Description};
use crate::gemma::activations::StepSize;
use crate::gemma::config::GemmaConfig;
use crate::gemma::{params, published};

/// Arguments of `devices`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Instead: what every published Gemma needs of a device's memory
    #[arg(long)]
    pub models: bool,
}

/// Memory of the cards that people have, in GB.
const CARDS: [u64; 5] = [8, 16, 24, 48, 80];
/// Streams of the table, and their tokens: of the prompt that they share, and of each.
const STREAMS: usize = 32;
const TOKENS: usize = 512;
/// Tokens of a micro-batch of training.
const STEP: StepSize = StepSize { tokens: 4096, predicting: 3072 };

/// What a model takes, in bytes, with bf16 weights and activations.
struct Needs {
    /// Trained parameters.
    parameters: u64,
    /// Parameters that are read as they are.
    frozen: u64,
    /// To sample [`STREAMS`] streams: weights, and keys and values.
    sample: u64,
    /// To train: weights, f32 masters, moments and gradients, and a step that keeps the residual stream alone.
    train: u64,
    /// The same with moments of 8 bits, gradients in bf16 and no masters, per-layer embeddings on the host.
    small: u64,
    /// The same with moments, and masters or none, on the host, too.
    offloaded: u64,
}

impl Needs {
    fn new(config: &GemmaConfig) -> Self {
        let plan = params::plan(config);
        let count = |sizes: &mut dyn Iterator<Item = usize>| sizes.map(|size| size as u64).sum::<u64>();
        let parameters = count(&mut plan.tensors().iter().map(|spec| spec.rows * spec.cols));
        let frozen = count(&mut params::frozen(config).iter().map(|(_, shape)| shape.iter().product()));
        let own = config.layers.iter().filter(|layer| layer.kv_from.is_none());
        let cached: usize = own.map(|layer| 2 * layer.shape.kv_width()).sum();
        let rows = TOKENS + STREAMS * TOKENS;
        let weights = 2 * (parameters + frozen);
        let step = STEP.least_bytes(config, DType::Bf16);
        Self {
            parameters,
            frozen,
            sample: weights + 2 * (rows * cached) as u64,
            train: weights + 16 * parameters + step,
            // Two codes, and a scale of 4 bytes for every 256 of each.
            small: 2 * parameters + 4 * parameters + 8 * parameters / 256 + step,
            offloaded: 2 * parameters + 2 * parameters + step + 2 * BUFFER as u64,
        }
    }
}

/// The smallest card with a tenth more memory than that.
fn card(bytes: u64) -> String {
    let fits = CARDS.into_iter().find(|gb| bytes / 10 * 11 <= gb * 1_000_000_000);
    fits.map_or("-".into(), |gb| format!("{gb} GB"))
}

/// The table of published models.
pub fn models() -> String {
    let gb = |bytes: u64| format!("{:.1}", bytes as f64 / 1e9);
    let mut out = String::new();
    let mut line = |cells: [&str; 11]| {
        let [name, parameters, frozen, sample, on, train, train_on, small, small_on, away, away_on] = cells;
        writeln!(
            out,
            "{name:<15} {parameters:>10} {frozen:>10} {sample:>10} {on:>6} {train:>9} {train_on:>6} {small:>9} {small_on:>6} \
             {away:>11} {away_on:>6}"
        )
        .expect("a string takes all text");
    };
    line([
        "",
        "parameters",
        "frozen",
        "sample GB",
        "card",
        "train GB",
        "card",
        "small GB",
        "card",
        "offload GB",
        "card",
    ]);
    for (name, config) in published::all() {
        let Needs { parameters, frozen, sample, train, small, offloaded } = Needs::new(&config);
        let billions = |n: u64| if n < 10_000_000 { "-".into() } else { format!("{:.2} B", n as f64 / 1e9) };
        let sizes = [sample, train, small, offloaded].map(|bytes| [gb(bytes), card(bytes)]);
        let [sample, train, small, away] = sizes.each_ref().map(|both| both.each_ref().map(String::as_str));
        let (parameters, frozen) = (billions(parameters), billions(frozen));
        line([
            name,
            &parameters,
            &frozen,
            sample[0],
            sample[1],
            train[0],
            train[1],
            small[0],
            small[1],
            away[0],
            away[1],
        ]);
    }
    out
}

/// Runs the command.
pub fn run(args: Args) -> anyhow::Result<()> {
    if args.models {
        return Ok(write!(std::io::stdout(), "{}", models())?);
    }
    let threads = rayon::current_num_threads();
    let vectors = match isa() {
        Isa::Avx512Bf16 => "AVX-512 with bf16",
        Isa::Avx512 => "AVX-512",
        Isa::Avx2 => "AVX2 and FMA",
        Isa::Portable => "portable vector code",
    };
    let mut out = std::io::stdout().lock();
    writeln!(out, "cpu     {vectors}, {threads} threads (RAYON_NUM_THREADS changes that)")?;
    if !compiled() {
        writeln!(out, "cuda    none: {NO_KERNELS}")?;
        writeln!(out, "vm      none: {NO_KERNELS}")?;
        return Ok(());
    }
    match driver::gpus() {
        Ok(gpus) => {
            for gpu in &gpus {
                writeln!(out, "{:<7} {}", format!("cuda:{}", gpu.ordinal), described(gpu))?;
            }
            if gpus.is_empty() {
                writeln!(out, "cuda    none: the driver sees no GPU")?;
            }
        }
        Err(e) => writeln!(out, "cuda    none: {}", e.message)?,
    }
    writeln!(
        out,
        "vm      a virtual GPU on the CPU, which checks every access of the kernels; slow, for tests"
    )?;
    Ok(())
}

fn described(gpu: &Description) -> String {
    let (major, minor) = gpu.capability;
    let memory = gpu.memory as f64 / (1u64 << 30) as f64;
    let cuda = format!("CUDA {}.{}", gpu.driver.0, gpu.driver.1);
    let told = format!("{}, {memory:.1} GiB, compute capability {major}.{minor}, driver of {cuda}", gpu.name);
    if gpu.usable {
        told
    } else {
        format!("{told}; too old: the kernels need compute capability 8.0 or newer")
    }
}
