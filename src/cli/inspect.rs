//! `bon-engine inspect`: what a model directory holds.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::PathBuf;

use crate::gemma::config::{ConfigFile, GemmaConfig, LayerShape, LayerSpec, NormPlacement};
use crate::gemma::params::{check, plan};
use crate::model_dir::{look_at, open_weights};
use crate::tokenizer::{TOKENIZER_FILE, Tokenizer};

/// Arguments of `inspect`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Model directory in Hugging Face's layout
    pub dir: PathBuf,
    /// List every tensor
    #[arg(long)]
    pub tensors: bool,
}

/// Prints to stdout, all or, on an error, nothing.
pub fn run(args: Args) -> anyhow::Result<()> {
    let mut text = Vec::new();
    report(&args, &mut text)?;
    Ok(std::io::stdout().write_all(&text)?)
}

/// Prints to `out`.
pub fn report(args: &Args, out: &mut impl Write) -> anyhow::Result<()> {
    look_at(&args.dir)?;
    let file = ConfigFile::open(&args.dir)?;
    let checkpoint = open_weights(&args.dir, &file)?;
    let config = file.gemma;
    write_config(&config, out)?;
    if config.score_head {
        writeln!(out, "head         scores responses: a reward model, for [verifier] kind = \"model\"")?;
    }
    let plan = plan(&config);
    check(&config, &checkpoint)?;
    let specs = plan.tensors();
    let count: usize = specs.iter().map(|s| s.rows * s.cols).sum();
    let embedding = plan.embed.rows * plan.embed.cols;
    let mut dtypes = BTreeMap::new();
    for view in specs.iter().filter_map(|s| checkpoint.tensor(&s.name)) {
        *dtypes.entry(format!("{:?}", view.dtype)).or_insert(0) += view.bytes.len();
    }
    let own_head = plan.head.as_ref().map_or(0, |head| head.rows * head.cols);
    let head = if own_head > 0 { format!("{own_head} LM head, ") } else { String::new() };
    writeln!(
        out,
        "parameters   {count} ({embedding} embedding, {head}{} other)",
        count - embedding - own_head
    )?;
    for (dtype, bytes) in dtypes {
        writeln!(out, "stored as    {dtype}, {}", megabytes(bytes as u64))?;
    }
    if file.wrapped {
        let (count, bytes) =
            checkpoint.others().fold((0, 0), |(n, sum), (_, t)| (n + 1, sum + t.bytes.len()));
        let size = megabytes(bytes as u64);
        writeln!(out, "beside it    {count} tensors of other parts, {size}, kept as they are")?;
    }
    for (path, bytes) in checkpoint.files() {
        writeln!(
            out,
            "file         {}, {}",
            path.file_name().unwrap_or_default().display(),
            megabytes(bytes)
        )?;
    }

    if args.dir.join(TOKENIZER_FILE).exists() {
        let t = Tokenizer::open(&args.dir, &config)?;
        let special = [t.bos(), t.eos(), t.start_of_turn(), t.end_of_turn()];
        let special = special.map(|id| format!("{} {id}", t.name(id)));
        writeln!(out, "special      {}", special.join(", "))?;
    } else {
        writeln!(out, "special      no {TOKENIZER_FILE}: the model can take token ids, but no text")?;
    }
    writeln!(out, "responses    end at token {:?}", config.eos_tokens)?;

    if args.tensors {
        for name in checkpoint.names() {
            let view = checkpoint.tensor(name).expect("it names its tensors");
            writeln!(out, "tensor       {name} {:?} {:?}", view.dtype, view.shape)?;
        }
        for (name, view) in checkpoint.others() {
            writeln!(out, "beside it    {name} {:?} {:?}", view.dtype, view.shape)?;
        }
    }
    Ok(())
}

fn write_config(c: &GemmaConfig, out: &mut impl Write) -> std::io::Result<()> {
    writeln!(out, "family       {}", c.model_type)?;
    let widths = |layer: &LayerSpec| {
        let LayerShape { heads, kv_heads, head_dim, intermediate } = layer.shape;
        format!("H {heads}, K {kv_heads}, Dh {head_dim}, F {intermediate}, ")
    };
    // Widths that all layers have are the model's.
    let uniform = c.layers.iter().all(|layer| layer.shape == c.layers[0].shape);
    let of_model = if uniform { widths(&c.layers[0]) } else { String::new() };
    let (layers, hidden, vocab, context) = (c.layers.len(), c.hidden_size, c.vocab_size, c.max_positions);
    writeln!(out, "shape        L {layers}, D {hidden}, {of_model}V {vocab}, context {context}")?;
    for (layer, numbers) in layer_kinds(&c.layers) {
        let window = layer.window.map_or("everything before".to_owned(), |w| format!("a window of {w}"));
        let of_layer = if uniform { String::new() } else { widths(&layer) };
        write!(out, "layers       {numbers}: {of_layer}see {window}, RoPE base {}", layer.rope.theta)?;
        if layer.rope.factor != 1.0 {
            write!(out, ", positions / {}", layer.rope.factor)?;
        }
        if layer.rope.pairs != layer.rope.head_dim / 2 {
            write!(out, " of {} pairs", layer.rope.pairs)?;
        }
        if layer.keys_are_values {
            write!(out, ", values are keys")?;
        }
        if let Some(from) = layer.kv_from {
            write!(out, ", keys and values of layer {from}")?;
        }
        writeln!(out)?;
    }
    let norms = match c.norms {
        NormPlacement::Pre => "before attention and MLP",
        NormPlacement::Sandwich => "before and after attention and MLP",
    };
    let heads = match (c.qk_norm, c.value_norm) {
        (false, _) => "",
        (true, false) => ", of q and k heads",
        (true, true) => ", of q, k and v heads",
    };
    let weight = if c.norm.offset == 0.0 { "w" } else { "1 + w" };
    writeln!(out, "norms        {norms}{heads}, times {weight}; eps {:e}", c.norm.eps)?;
    if c.layer_scalars {
        writeln!(out, "layers       each times a number of the checkpoint")?;
    }
    if c.per_layer_width != 0 {
        writeln!(
            out,
            "inputs       of each layer P {}, from embeddings that are trained only if asked for",
            c.per_layer_width
        )?;
    }
    let cap = |c: Option<f32>| c.map_or("none".to_owned(), |c| c.to_string());
    let (attention, logits) = (cap(c.attention_softcap), cap(c.final_softcap));
    writeln!(out, "attention    scale {}, soft cap {attention}; logits' soft cap {logits}", c.attention_scale)
}

/// Layers of the same kind together: their spec and their numbers as "0-4, 6-10".
fn layer_kinds(layers: &[LayerSpec]) -> Vec<(LayerSpec, String)> {
    let mut kinds: Vec<(LayerSpec, Vec<(usize, usize)>)> = Vec::new();
    for (i, layer) in layers.iter().enumerate() {
        let at = kinds.iter().position(|(kind, _)| kind == layer).unwrap_or_else(|| {
            kinds.push((*layer, Vec::new()));
            kinds.len() - 1
        });
        match kinds[at].1.last_mut() {
            Some((_, last)) if *last + 1 == i => *last = i,
            _ => kinds[at].1.push((i, i)),
        }
    }
    let range = |(a, b): &(usize, usize)| if a == b { a.to_string() } else { format!("{a}-{b}") };
    kinds.into_iter().map(|(l, runs)| (l, runs.iter().map(range).collect::<Vec<_>>().join(", "))).collect()
}

fn megabytes(bytes: u64) -> String {
    format!("{:.1} MB", bytes as f64 / 1e6)
}
