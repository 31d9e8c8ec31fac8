//! What ptxas makes of every kernel on every architecture that we name: no register goes to memory, and a
//! multiprocessor has room for enough warps.

use std::path::Path;
use std::process::Command;

use bon_engine::backend::cuda::Cuda;
use bon_engine::backend::cuda::entries::{MODULES, PTXAS};
use bon_engine::backend::ops::*;
use bon_engine::backend::{Batch, Choice, DType, HeadSpec, ModelShape, Truncation};
use bon_engine::cli::kernels::{ARCHS, TABLE_HEAD, section_of, table_line};
use bon_engine::cost::figures::{CHIPS, Counted, Resources, all_resources, count};
use bon_engine::cost::workloads::{GEMMA_2B, workloads};
use bon_engine::device::dependent::dependent;
use bon_engine::gemma::config::{GemmaConfig, LayerSpec};
use bon_engine::gemma::params::{self, ParamSpec};
use bon_engine::gemma::{Frozen, Gemma, KvCache, published};
use bon_engine::rng::DrawKey;
use bon_engine::segments::{QueryRun, Segment, Segments};

use super::{compiled, counted, counting, traffic};

/// Kernels, by the beginnings of their names, that live on reuse of registers and shared memory rather than on many
/// warps; and how many threads a multiprocessor must still hold of them, as far as registers go. Longest match first.
const HEAVY: [(&str, u32); 6] = [
    ("matmul", 256),
    ("geglu_forward", 256),
    ("attention", 128),
    ("lm_head", 256),
    ("experts_matmul", 256),
    ("experts_geglu_forward", 256),
];
/// All others wait for memory: so many threads hide that.
const LIGHT: u32 = 512;

/// `.maxntid` of every entry point: what `__launch_bounds__` says.
fn threads(ptx: &str, kernel: &str) -> u32 {
    let at = ptx.find(&format!(".entry {kernel}(")).unwrap_or_else(|| panic!("no {kernel}"));
    let body = ptx[at..].find('{').map_or(&ptx[at..], |end| &ptx[at..at + end]);
    let bound = body.split(".maxntid").nth(1).unwrap_or_else(|| panic!("{kernel} has no __launch_bounds__"));
    let numbers = bound.lines().next().unwrap().split(',').map(|n| n.trim().parse::<u32>().unwrap());
    numbers.product()
}

#[test]
fn no_kernel_spills_and_each_leaves_room_for_enough_warps() {
    if !counting() {
        return;
    }
    let resources = all_resources(&ARCHS, "").unwrap_or_else(|e| panic!("{}", anyhow::Error::from(e)));
    let kernels: usize = MODULES.iter().map(|m| m.entries.len()).sum();
    assert_eq!(resources.len(), kernels * ARCHS.len());
    let mut wrong = Vec::new();
    for r in &resources {
        let Resources { kernel, arch, registers, shared, stack, spill_stores, spill_loads } = r;
        if stack + spill_stores + spill_loads > 0 {
            wrong.push(format!(
                "{kernel} on {arch}: {stack} bytes of stack, {spill_stores} and {spill_loads} of spills"
            ));
        }
        let module = MODULES.iter().find(|m| m.entries.iter().any(|e| e.name() == kernel)).unwrap();
        let threads = threads(module.ptx.unwrap(), kernel);
        let wanted =
            HEAVY.iter().find(|(name, _)| kernel.starts_with(name)).map_or(LIGHT, |(_, least)| *least);
        for chip in CHIPS {
            let held = chip.occupancy(*registers, *shared, threads) * threads;
            if held < wanted.min(chip.threads) {
                wrong.push(format!(
                    "{kernel} on {arch}: {registers} registers and {shared} bytes of shared memory leave room for \
                     {held} threads on {}, want {wanted}",
                    chip.name
                ));
            }
        }
    }
    assert!(wrong.is_empty(), "\n  {}", wrong.join("\n  "));
}

/// From compute capability 9.0 on kernels begin before those ahead have ended: by the machine code, whatever the order of the
/// text, nothing is read or written before they wait.
#[test]
#[cfg_attr(not(has_kernels), ignore = "built without nvcc; `make nvcc` fetches one")]
fn no_kernel_uses_memory_before_it_waits() {
    let ptxas = Path::new(PTXAS.expect("nvcc has a ptxas beside it"));
    let dir = tempfile::tempdir().unwrap();
    let mut kernels = 0;
    for module in MODULES {
        let (text, cubin) = (dir.path().join("module.ptx"), dir.path().join("module.cubin"));
        std::fs::write(&text, dependent(module.ptx.unwrap())).unwrap();
        let run = Command::new(ptxas).args(["-arch=sm_90", "-O3", "-o"]).arg(&cubin).arg(&text).output();
        assert!(run.as_ref().is_ok_and(|run| run.status.success()), "{}: {run:?}", module.name);
        let listed =
            Command::new(ptxas.with_file_name("cuobjdump")).arg("-sass").arg(&cubin).output().unwrap();
        let listed = String::from_utf8_lossy(&listed.stdout).into_owned();
        for function in listed.split("Function : ").skip(1) {
            let name = function.split_whitespace().next().unwrap();
            // The instruction of griddepcontrol.wait.
            let (before, _) = function.split_once("ACQBULK").unwrap_or_else(|| panic!("{name} never waits"));
            // Parameters are read by LDC.
            const USES: [&str; 11] =
                ["LD", "LDG", "LDGSTS", "LDL", "LDS", "ST", "STG", "STL", "STS", "ATOMG", "RED"];
            let uses = |line: &&str| line.split([' ', '.', ';']).any(|word| USES.contains(&word));
            assert_eq!(before.lines().find(uses), None, "{name}");
            kernels += 1;
        }
    }
    assert_eq!(kernels, MODULES.iter().map(|m| m.entries.len()).sum::<usize>());
}

/// ptxas may fuse a product and a sum that do not say how they round. What it would fuse depends on the variant of the
/// kernel and on the GPU, and so would the bits of a row.
#[test]
fn every_sum_and_product_says_how_it_rounds() {
    if !compiled() {
        return;
    }
    for module in MODULES {
        let open = |line: &&str| {
            let words = line.split_whitespace().find(|word| !word.starts_with('@'));
            let mut parts = words.unwrap_or("").split('.');
            ["add", "sub", "mul"].contains(&parts.next().unwrap_or(""))
                && matches!(parts.find(|part| *part != "ftz"), Some("f32" | "f64"))
        };
        let found: Vec<&str> = module.ptx.unwrap().lines().filter(open).collect();
        assert!(found.is_empty(), "{}.ptx: {} such, the first {}", module.name, found.len(), found[0]);
    }
}

/// No GPU adds 64 bits to shared memory in one instruction: the assembler makes a loop of compare-and-swap of it, which
/// lanes that meet in one place go through one by one.
#[test]
fn no_kernel_adds_64_bits_to_shared_memory() {
    if !compiled() {
        return;
    }
    for module in MODULES {
        let adds = |line: &&str| line.contains("atom.") && line.contains(".shared") && line.contains("64 ");
        let found: Vec<&str> = module.ptx.unwrap().lines().filter(adds).collect();
        assert!(found.is_empty(), "{}.ptx: {found:?}", module.name);
    }
}

/// A layer of Gemma 2B that decodes 32 streams moves its weights and its keys and values, and hardly anything else.
#[test]
fn a_decode_step_moves_little_but_weights_and_keys() {
    if !counting() {
        return;
    }
    // Each with how often a layer does it.
    let ops = [
        ("matmul_forward q k v, T = 32", 1),
        ("rope_append q k v, T = 32", 1),
        ("attention_forward decode, prompt of 512", 1),
        ("matmul_forward out, T = 32", 1),
        ("geglu_forward, T = 32", 1),
        ("matmul_forward down, T = 32", 1),
        ("add_norm_forward T = 32", 2),
    ];
    let all = workloads(&GEMMA_2B);
    let unique: f64 = ops
        .iter()
        .map(|(name, times)| {
            let mut found = all.iter().filter(|w| w.name.starts_with(name));
            let workload = found.next().unwrap_or_else(|| panic!("no workload {name}"));
            assert!(found.next().is_none(), "{name} names several workloads");
            f64::from(*times) * traffic(workload, &counted(workload)) * workload.bytes as f64
        })
        .sum();
    let ModelShape { hidden: d, heads, kv_heads, head_dim, intermediate: f, .. } = GEMMA_2B.shape;
    let weights = 2 * d * (2 * heads * head_dim + 2 * kv_heads * head_dim + 3 * f);
    let keys = 2 * 2 * (512 + 32 * 128) * kv_heads * head_dim;
    let ratio = unique / (weights + keys) as f64;
    assert!(ratio <= 1.05, "{ratio}");
}

/// The same of a whole step of Gemma 4 E2B, whose attention has wider heads beside smaller MLPs: beside weights and keys it moves
/// the states of splits, written once and read once. Keys that several layers read are moved by each.
#[test]
fn a_decode_step_of_e2b_moves_little_but_weights_keys_and_states_of_splits() {
    if !counting() {
        return;
    }
    const STREAMS: usize = 32;
    const PROMPT: usize = 512;
    const TAIL: usize = 128;
    let e2b = published::gemma_4_e2b();
    // The first of each kind: with keys of their own, local and global, and the two that read theirs.
    let [local, global, local_reader, global_reader] = [0, 4, 15, 19].map(|l| e2b.layers[l]);
    let kinds = [local, global, local_reader, global_reader];
    let reading = |reader, from| LayerSpec { kv_from: Some(from), ..reader };
    let layers = vec![local, global, reading(local_reader, 0), reading(global_reader, 1)];
    let config = GemmaConfig { layers, ..e2b.clone() };

    let segment = |start, len, position, prefix| Segment { start, len, position, prefix };
    let tails = (0..STREAMS).map(|i| segment(PROMPT + i * TAIL, TAIL, PROMPT, Some(0)));
    let segments = Segments::new([segment(0, PROMPT, 0, None)].into_iter().chain(tails).collect()).unwrap();
    let run = |row| QueryRun { segment: row + 1, first: TAIL - 1, len: 1, row };
    let runs: Vec<QueryRun> = (0..STREAMS).map(run).collect();
    let ids: Vec<u32> = (0..STREAMS as u32).collect();
    let prepare = |cuda: &Cuda| {
        let zeros = |rows, cols| cuda.zeros(DType::Bf16, rows, cols);
        let table = zeros(STREAMS, config.per_layer_columns());
        let frozen = Frozen { scalars: vec![1.0; kinds.len()], per_layer_embed: Some(table) };
        let params = params::plan(&config).map(|spec| zeros(spec.rows, spec.cols));
        let model =
            Gemma { backend: cuda.clone(), config: config.clone(), params, frozen, adapter_scale: None };
        (model, KvCache::new(cuda, &config, segments.rows()))
    };
    let head = HeadSpec { softcap: config.final_softcap, temperature: 1.0 };
    let key = |stream| DrawKey { key: [1, 2], prompt: 3, stream, position: 4 };
    let choices: Vec<Choice> = ids.iter().map(|&stream| Choice::Draw(key(stream))).collect();
    let launches = count("a step of E2B", &CHIPS[0], prepare, |cuda, (model, mut cache)| {
        let hidden = model.forward_cached(&Batch::new(&ids, &segments, &runs), &mut cache);
        drop(cuda.lm_head_sample(&hidden, &model.params.embed, &head, &Truncation::default(), &choices));
    })
    .unwrap_or_else(|e| panic!("{}", anyhow::Error::from(e)));

    let first = launches.iter().position(|launch| launch.kernel.starts_with("lm_head")).expect("a head");
    let (launches, of_head) = launches.split_at(first);
    // Each layer has as many launches as any other.
    let mlps: Vec<usize> =
        (0..launches.len()).filter(|&i| launches[i].kernel.starts_with("geglu_forward")).collect();
    let each = mlps[1] - mlps[0];
    assert!(mlps.len() == kinds.len() && mlps.windows(2).all(|pair| pair[1] - pair[0] == each), "{mlps:?}");
    let (before, of_layers) = launches.split_at(launches.len() - kinds.len() * each);
    let bytes =
        |launches: &[Counted]| launches.iter().map(|launch| launch.unique_bytes).sum::<u64>() as usize;
    let of_kind: Vec<usize> = of_layers.chunks_exact(each).map(bytes).collect();
    let of =
        |layer: &LayerSpec| of_kind[kinds.iter().position(|kind| kind == layer).expect("there are four")];
    // The model's embedding and the first norm, and then what has columns for every layer.
    let starts = ["embed_forward", "rms_norm_forward", "embed_forward", "matmul_forward", "add_forward"];
    let as_said = before.iter().zip(starts).all(|(launch, name)| launch.kernel.starts_with(name));
    assert!(before.len() == starts.len() && as_said, "{before:?}");
    let (once, of_all) = before.split_at(2);
    let inputs = bytes(once) + bytes(of_all) * e2b.layers.len() / kinds.len();
    let moved = inputs + e2b.layers.iter().map(of).sum::<usize>() + bytes(of_head);

    let plan = params::plan(&e2b);
    let elements = |spec: &ParamSpec| spec.rows * spec.cols;
    let weights: usize = 2 * plan.tensors().into_iter().map(elements).sum::<usize>();
    let last = PROMPT + TAIL - 1;
    let first = |layer: &LayerSpec| layer.window.map_or(0, |window| last + 1 - window);
    let rows = |layer: &LayerSpec| PROMPT - first(layer) + STREAMS * TAIL;
    let keys: usize = e2b.layers.iter().map(|layer| 2 * 2 * rows(layer) * layer.shape.kv_width()).sum();
    // A sum of values, a largest score and a sum of exponentials, in f32, for every head and split of 128 positions.
    let splits = |layer: &LayerSpec| last / 128 - first(layer) / 128 + 1;
    let state = |layer: &LayerSpec| 4 * STREAMS * layer.shape.heads * (layer.shape.head_dim + 2);
    let states: usize = e2b.layers.iter().map(|layer| 2 * splits(layer) * state(layer)).sum();
    let ratio = moved as f64 / (weights + keys + states) as f64;
    assert!(ratio <= 1.031, "{ratio}");
    let ratio = moved as f64 / (weights + keys) as f64;
    assert!(ratio <= 1.051, "{ratio}");
}

/// kernels/README.md has a line for each workload of Gemma 2B, in its section's table, as `bon-engine kernels --readme`
/// writes them; two of them are counted anew.
#[test]
fn the_tables_of_the_readme_are_what_the_program_writes() {
    if !counting() {
        return;
    }
    let readme = std::fs::read_to_string(crate::places::checkout().join("kernels/README.md")).unwrap();
    let mut section = "";
    let mut lines = std::collections::BTreeMap::new();
    for line in readme.lines() {
        if line.starts_with("## ") {
            section = line;
        }
        let (cells, columns) = (line.split(" | ").count(), TABLE_HEAD[0].split(" | ").count());
        if line.starts_with("| work |") {
            assert_eq!(line, TABLE_HEAD[0], "{section}");
        } else if cells == columns {
            let name = line.trim_start_matches("| ").split(" | ").next().unwrap();
            assert!(lines.insert((section, name.to_owned()), line).is_none(), "twice: {name}");
        }
    }
    let all = workloads(&GEMMA_2B);
    let known: Vec<_> = all.iter().map(|w| (section_of(&w.name), w.name.clone())).collect();
    let again = "run `bon-engine kernels --readme kernels/README.md`";
    for (section, name) in lines.keys() {
        assert!(known.iter().any(|(s, n)| s == section && n == name), "{name} is no workload: {again}");
    }
    for (workload, key) in all.iter().zip(&known) {
        let line =
            lines.get(&(key.0, key.1.clone())).unwrap_or_else(|| panic!("no line of {}: {again}", key.1));
        if workload.name.starts_with("gather_rows") || workload.name.starts_with("matmul_forward out, T = 32")
        {
            assert_eq!(*line, table_line(workload).unwrap(), "{again}");
        }
    }
}
