//! What lies in the host's memory and goes through a device: the optimizer's state, streamed at each update, and per-layer
//! embeddings, of which kernels read rows. All of it has the bits that it has elsewhere.

use std::sync::Arc;

use bon_engine::backend::adamw::BLOCK;
use bon_engine::backend::cpu::Cpu;
use bon_engine::backend::cuda::{Cuda, offload};
use bon_engine::backend::ops::*;
use bon_engine::backend::{AdamW, Backend, DType, Moments, Quantised, Update, Weight};
use bon_engine::device::vm::{Options, Vm};
use bon_engine::gemma::config::ConfigFile;
use bon_engine::gemma::{Gemma, params};
use bon_engine::model_dir::{Placement, open_weights};
use bon_engine::plan::{Place, Plan, Purpose, Run};
use bon_engine::train::config::{MomentKind, OptimizerSection};
use bon_engine::train::optimizer::{Optimizer, state_bytes};

use crate::kernels::{activation, compiled, devices, rounded};
use crate::ops::randoms;
use crate::tiny;
use crate::training::{Workplace, checkpoint, metrics, train_on};

fn single<B: Backend>(b: &B, x: &[f32]) -> B::Tensor {
    b.upload(DType::F32, 1, x.len(), bytemuck::cast_slice(x))
}

fn half<B: Backend>(b: &B, x: &[f32]) -> B::Tensor {
    let x: Vec<half::bf16> = x.iter().map(|x| half::bf16::from_f32(*x)).collect();
    b.upload(DType::Bf16, 1, x.len(), bytemuck::cast_slice(&x))
}

/// Parameters of these sizes after three updates, moments and weights kept in every way: all that is kept, as bytes.
fn updated<B: Backend>(b: &B, sizes: &[usize], on_host: bool) -> Vec<Vec<u8>> {
    let zeros = |n| if on_host { b.host_zeros(DType::F32, 1, n) } else { b.zeros(DType::F32, 1, n) };
    let quantised = |n: usize| Quantised {
        codes: if on_host { b.host_zero_codes(n) } else { b.zero_codes(n) },
        scales: zeros(n.div_ceil(BLOCK)),
    };
    let mut all = Vec::new();
    for (i, &n) in sizes.iter().enumerate() {
        let moments = match i % 2 {
            0 => Moments::F32 { m: zeros(n), v: zeros(n) },
            _ => Moments::Blockwise { m: quantised(n), v: quantised(n) },
        };
        let start = randoms(i as u32, n);
        let master = (i / 2 % 2 == 0).then(|| {
            let mut master = zeros(n);
            b.overwrite(&mut master, bytemuck::cast_slice(&start));
            master
        });
        all.push((moments, master, half(b, &start)));
    }
    for step in 1..=3 {
        let mut grads: Vec<B::Tensor> = Vec::new();
        for (i, &n) in sizes.iter().enumerate() {
            let grad = randoms(100 * step as u32 + i as u32, n);
            // Of one dtype after the other.
            grads.push(if i % 3 == 0 { half(b, &grad) } else { single(b, &rounded(&grad)) });
        }
        let hyper =
            AdamW { lr: 3e-2, beta1: 0.9, beta2: 0.95, eps: 1e-8, step, grad_scale: 0.37, key: [5, 77] };
        let mut updates: Vec<Update<B::Tensor, B::Codes>> = (0..)
            .zip(all.iter_mut().zip(&mut grads))
            .map(|(number, ((moments, master, copy), grad))| Update {
                grad,
                moments,
                weight: match master {
                    Some(master) => Weight::Master { master, copy },
                    None => Weight::Bf16 { weight: copy, number },
                },
                weight_decay: 0.1,
            })
            .collect();
        // Work is under way in memory that the buffers get.
        drop([7, 8].map(|seed| b.scaled(activation(b, seed, 1, 3520), 2.0)));
        b.adamw(&hyper, &mut updates);
        assert!(grads.iter().all(|x| b.download(x).iter().all(|byte| *byte == 0)), "gradients are cleared");
    }
    b.check().expect("no finding");
    let mut kept = Vec::new();
    for (moments, master, copy) in &all {
        match moments {
            Moments::F32 { m, v } => kept.extend([m, v].map(|x| b.download(x))),
            Moments::Blockwise { m, v } => {
                for x in [m, v] {
                    kept.extend([b.download_codes(&x.codes), b.download(&x.scales)]);
                }
            }
        }
        kept.extend(master.iter().chain([copy]).map(|x| b.download(x)));
    }
    kept
}

/// Fewer and more than a block, and than a kernel's chunk; one after the other in each of the ways.
const SIZES: [usize; 9] = [5000, 1, 300, 255, 66_000, 70_001, 256, 257, 3000];

#[test]
fn updates_have_the_same_bits_wherever_the_state_lies() {
    let of_cpu = updated(&Cpu::F32, &SIZES, true);
    for cuda in devices() {
        let want = updated(&cuda, &SIZES, false);
        assert!(want == of_cpu, "the CPU's bits");
        // One block at a time; some; a few pieces; all at once.
        for bytes in [offload::MIN_BUFFER, 20_000, 300_000, offload::BUFFER] {
            cuda.stream_through(bytes);
            assert!(updated(&cuda, &SIZES, true) == want, "{bytes} bytes on {}", cuda.device_name());
        }
        cuda.stream_through(offload::BUFFER);
    }
}

/// Other work uses memory that the buffers had, and the buffers memory that it had.
#[test]
fn buffers_are_nobody_elses_while_they_are_used() {
    for cuda in devices() {
        cuda.stream_through(20_000);
        let want = updated(&cuda, &SIZES, false);
        let x = single(&cuda, &randoms(9, 5000));
        for _ in 0..3 {
            // What is asked for right behind an update, of the same size.
            let got = updated(&cuda, &SIZES, true);
            let copies: Vec<_> = (0..6).map(|_| cuda.scaled(half(&cuda, &randoms(9, 9000)), 2.0)).collect();
            drop(copies);
            assert!(got == want);
        }
        assert!(cuda.to_f32(&x) == randoms(9, 5000));
        cuda.stream_through(offload::BUFFER);
    }
}

/// Some pieces, once, on the driver's GPU: what is wrong with its order shows here.
#[test]
fn a_small_update_on_a_gpu_is_streamed() {
    let Some(cuda) = crate::kernels::cuda() else { return };
    const SIZES: [usize; 6] = [5000, 300, 4000, 255, 3001, 2000];
    let want = updated(&cuda, &SIZES, false);
    cuda.stream_through(8000);
    assert!(updated(&cuda, &SIZES, true) == want);
    cuda.stream_through(offload::BUFFER);
}

const SMALL: [&str; 4] = [
    "optimizer.moments=8bit",
    "optimizer.embedding_moments=8bit",
    "optimizer.masters=false",
    "optimizer.gradients=bf16",
];

/// A run whose state is streamed is the run whose is not, and each goes on as the other.
#[test]
fn runs_have_the_same_bits_and_go_on_either_way() {
    if !compiled() {
        return;
    }
    let place = Workplace::for_kernels();
    for (kind, state) in [("full", &[][..]), ("small", &SMALL)] {
        let config = |name: &str, offload: &str| {
            let offload = format!("optimizer.offload={offload}");
            let settings = ["train.steps=3", "train.save_every=1", "generate.max_new_tokens=4", &offload];
            place.config(&format!("{kind}-{name}"), &[&settings, state].concat())
        };
        let device = || {
            let cuda =
                Cuda::new(Box::new(Vm::new(Options { counters: false, ..Options::default() }))).unwrap();
            cuda.stream_through(20_000);
            cuda
        };
        let here = config("here", "false");
        train_on(device(), &here, false, 3);
        let want = (checkpoint(&here), metrics(&here.train.output));
        for (name, begun, ended) in
            [("stay", "true", "true"), ("come", "false", "true"), ("go", "true", "false")]
        {
            train_on(device(), &config(name, begun), false, 1);
            let config = config(name, ended);
            train_on(device(), &config, true, 3);
            assert!(checkpoint(&config) == want.0, "{kind}, {name}");
            assert_eq!(metrics(&config.train.output), want.1, "{kind}, {name}");
        }
    }
}

/// On the driver's GPU, real or virtual: one step of a run.
#[test]
fn a_step_on_a_gpu_has_the_same_bits_with_its_state_on_the_host() {
    let Some(cuda) = crate::kernels::cuda() else { return };
    let place = Workplace::for_kernels();
    let run = |name: &str, offload: &str| {
        let offload = format!("optimizer.offload={offload}");
        let settings = ["train.steps=1", "generate.max_new_tokens=3", &offload];
        let config = place.config(name, &[&settings, &SMALL[..3]].concat());
        train_on(cuda.clone(), &config, false, 1);
        checkpoint(&config)
    };
    let want = run("here", "false");
    cuda.stream_through(20_000);
    let got = run("host", "true");
    cuda.stream_through(offload::BUFFER);
    assert!(got == want);
}

/// A tiny model on a virtual GPU that counts, with an optimizer.
fn model(vm: &Arc<Vm>, config: &OptimizerSection) -> (Gemma<Cuda>, Optimizer<Cuda>) {
    let cuda = Cuda::new(Box::new(Arc::clone(vm))).unwrap();
    let model = tiny::model_on(cuda, "gemma3", DType::Bf16);
    let optimizer = Optimizer::new(&model, config, 0);
    (model, optimizer)
}

/// What goes over the bus is the state, once each way; a gradient that is not finite moves and changes nothing.
#[test]
fn an_update_moves_the_state_once_each_way_and_a_refused_one_nothing() {
    if !compiled() {
        return;
    }
    let small = OptimizerSection {
        moments: MomentKind::Blockwise,
        embedding_moments: MomentKind::Blockwise,
        masters: false,
        ..OptimizerSection::default()
    };
    for config in [OptimizerSection::default(), small] {
        let config = OptimizerSection { offload: true, ..config };
        let vm = Arc::new(Vm::new(Options::default()));
        let (mut model, mut optimizer) = model(&vm, &config);
        let specs = params::plan(&model.config);
        let state = state_bytes(&specs.tensors(), false, DType::Bf16, &config);
        let streamed = state.host_moments + state.host_masters;
        assert!(streamed > 0 && state.masters > 0, "norms stay on the device");
        // Masters are made of the weights.
        assert_eq!(vm.take_bus(), [0, state.host_masters]);
        optimizer.step(&mut model, &config, 1e-3, 1).expect("gradients of zero");
        assert_eq!(vm.take_bus(), [streamed; 2]);

        let dir = tempfile::tempdir().unwrap();
        let saved = |name: &str, optimizer: &Optimizer<Cuda>| {
            optimizer.save(&model.backend, &dir.path().join(name)).unwrap();
            std::fs::read(dir.path().join(name)).unwrap()
        };
        let before = saved("before", &optimizer);
        let (rows, cols) = model.backend.shape(&optimizer.grads.embed);
        let wrong = vec![f32::NAN; rows * cols];
        optimizer.grads.embed = model.backend.upload(DType::F32, rows, cols, bytemuck::cast_slice(&wrong));
        let mut again = tiny::model_on(model.backend.clone(), "gemma3", DType::Bf16);
        assert!(optimizer.step(&mut again, &config, 1e-3, 2).is_err());
        assert_eq!(vm.take_bus(), [0; 2]);
        assert!(saved("after", &optimizer) == before);
    }
}

/// The plan counts what lies there apart, refuses what the host has no room for, and says what goes over the bus.
#[test]
fn the_plan_counts_what_the_host_holds() {
    let all = bon_engine::gemma::published::all();
    let plan = |name: &str, settings: &[&str], host: Option<u64>| {
        let (_, model) = all.iter().find(|(known, _)| *known == name).unwrap();
        let config = crate::plan::config(settings);
        let prompts: Vec<Vec<u32>> = (0..8).map(|i| vec![i; 64]).collect();
        let (dtype, purpose) = (DType::Bf16, Purpose::Train);
        let (config, prompts) = (&config, &*prompts);
        let run = Run { model, dtype, config, prompts, purpose, reward_models: &[] };
        Plan::new(&run, Place::Gpu { memory: 24_000_000_000, driver: 0, host })
    };
    let bytes = |lines: &[bon_engine::plan::Line], what: &str| {
        lines.iter().find(|line| line.what == what).map_or(0, |line| line.bytes)
    };
    let (here, there) =
        (plan("Gemma 3 270M", &[], None), plan("Gemma 3 270M", &["optimizer.offload=true"], None));
    for what in ["moments", "masters"] {
        let of = |plan: &Plan| bytes(&plan.held, what) + bytes(&plan.host, what);
        assert_eq!(of(&here), of(&there), "{what} lie somewhere");
        assert!(bytes(&there.host, what) > 100 * bytes(&there.held, what));
    }
    let bus = there.bus.expect("there is some");
    assert_eq!([bus.into, bus.back], [there.host_bytes(); 2]);
    assert!(here.bus.is_none() && here.host.is_empty());
    assert!(there.to_string().contains("(modelled, "), "{there}");
    let refused = plan("Gemma 3 270M", &["optimizer.offload=true"], Some(there.host_bytes() - 1));
    assert!(!refused.fits, "{refused}");
    assert!(plan("Gemma 3 270M", &["optimizer.offload=true"], Some(there.host_bytes())).fits);

    let per_layer = ["model.per_layer_embeddings=host"];
    let (here, there) = (plan("Gemma 4 E2B", &[], None), plan("Gemma 4 E2B", &per_layer, None));
    let table = 262_144 * 35 * 256 * 2;
    assert_eq!(bytes(&there.host, "per-layer embeddings"), table);
    assert_eq!(bytes(&here.held, "weights") - bytes(&there.held, "weights"), table);
    let trained = plan("Gemma 4 E2B", &["model.per_layer_embeddings=trained"], None);
    for (what, size) in [("weights", 0), ("gradients", 4), ("moments", 8), ("masters", 4)] {
        assert_eq!(bytes(&trained.held, what) - bytes(&here.held, what), size * table / 2, "{what}");
    }
    assert!(trained.host.is_empty());
}

/// The table of Gemma 4 E in the host's memory, or in its file, gives the same log-probs and gradients.
#[test]
fn per_layer_embeddings_may_lie_on_the_host() {
    fn outputs<B: Backend>(backend: B, dtype: DType, placement: Placement) -> Vec<Vec<u8>> {
        let dir = tiny::dir("gemma4_e");
        let file = ConfigFile::open(&dir).unwrap();
        let (weights, config) = (open_weights(&dir, &file).unwrap(), file.gemma);
        let params = params::load(&backend, &config, &weights, Some(dtype)).unwrap();
        let on_host = placement == Placement::Host;
        let frozen = params::load_frozen(&backend, &config, &weights, Some(dtype), on_host);
        drop(weights);
        let model = Gemma { backend, config, params, frozen, adapter_scale: None };
        let groups = tiny::Groups::few_shot();
        let weights = randoms(3, groups.predicted());
        let (logprobs, grads) = groups.with(|groups| tiny::gradient(&model, groups, 0.9, &weights));
        model.backend.check().expect("no finding");
        let table = model.backend.download(model.frozen.per_layer_embed.as_ref().unwrap());
        let mut all: Vec<Vec<u8>> = grads.tensors().into_iter().map(|x| model.backend.download(x)).collect();
        all.extend([bytemuck::cast_slice(&logprobs).to_vec(), table]);
        all
    }
    fn same<B: Backend + Clone>(backend: &B, dtype: DType) {
        let [here, there] =
            [Placement::Device, Placement::Host].map(|place| outputs(backend.clone(), dtype, place));
        assert!(here == there, "{dtype:?} on {}", backend.device_name());
    }
    same(&Cpu::F32, DType::F32);
    same(&Cpu::F32, DType::Bf16);
    for cuda in devices() {
        same(&cuda, DType::Bf16);
    }
    // The file has one of the two types, and a table of that stays in it.
    let dir = tiny::dir("gemma4_e");
    let file = ConfigFile::open(&dir).unwrap();
    let weights = open_weights(&dir, &file).unwrap();
    let stays = [DType::F32, DType::Bf16].map(|dtype| {
        let frozen = params::load_frozen(&Cpu::F32, &file.gemma, &weights, Some(dtype), true);
        frozen.per_layer_embed.unwrap().mapped().is_some()
    });
    assert_eq!(stays, [DType::F32, DType::Bf16].map(|dtype| Some(dtype) == params::stored_dtype(&weights)));
}

#[test]
fn the_cpu_streams_nothing_and_says_so() {
    let f = crate::fixture::Fixture::new();
    for command in [&["train", "run.toml"][..], &["plan", "run.toml"]] {
        let arguments = [command, &["--device", "cpu", "--set", "optimizer.offload=true"]].concat();
        let ran = f.run(&arguments);
        assert!(
            ran.code == Some(1) && ran.stderr.contains("optimizer.offload: the CPU computes in"),
            "{ran:?}"
        );
    }
}
