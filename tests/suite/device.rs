//! The devices, below any op: the arena's and the sequences' books, and the CUDA driver's calls, on a GPU where there is
//! one, and on the virtual driver (`tools/vcuda`) in any case.

use std::collections::BTreeMap;
use std::ffi::c_int;
use std::fmt::Write as _;
use std::path::Path;
use std::process::Command;
use std::sync::Mutex;

use bon_engine::backend::cuda::Cuda;
use bon_engine::backend::cuda::entries::MODULES;
use bon_engine::backend::{Backend, DType};
use bon_engine::device::arena::{ALIGN, Arena, SMALL};
use bon_engine::device::dependent::dependent;
use bon_engine::device::driver::{DEPENDENT_LAUNCH, EXACT_ALLOC, Gpu};
use bon_engine::device::sequence::{Recordings, Step, Steps, Verdict};
use bon_engine::device::vm::{Options, Vm};
use bon_engine::device::{Arg, Cubin, Device, DeviceError, Kernel, Launch, Ptr};

use crate::fixture::{Fixture, Ran};
use crate::places::{checkout, program, virtual_driver_folder};

/// cuda:0 as tests use it. Without one, what is left out is told at the end.
pub(crate) fn gpu() -> Option<Gpu> {
    match Gpu::open(0) {
        Ok(gpu) => Some(gpu),
        Err(e) => {
            skipped(&format!("need a GPU ({e})"));
            None
        }
    }
}

/// Counts checks that are left out, and tells at the end of the program: what a test prints that passes, nobody sees.
pub(crate) fn skipped(why: &str) {
    static SKIPPED: Mutex<BTreeMap<String, usize>> = Mutex::new(BTreeMap::new());
    unsafe extern "C" {
        fn atexit(f: extern "C" fn()) -> c_int;
    }
    #[allow(clippy::print_stderr)] // whoever runs the tests must hear of it
    extern "C" fn tell() {
        for (why, n) in SKIPPED.lock().iter().flat_map(|skipped| skipped.iter()) {
            eprintln!("skipped: {n} checks that {why}");
        }
    }
    let mut skipped = SKIPPED.lock().unwrap();
    if skipped.is_empty() {
        // SAFETY: a function of C's that every program has; `tell` does not panic.
        unsafe { atexit(tell) };
    }
    *skipped.entry(why.to_owned()).or_default() += 1;
}

/// Numbers that look random, the same every time.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        // Knuth's generator; its low bits are poor.
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        self.0 >> 33
    }

    fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    fn bytes(&mut self, n: usize) -> Vec<u8> {
        (0..n).map(|_| self.next() as u8).collect()
    }
}

// ------------------------------------------------------------------------------------------------------- the arena

/// An arena over pieces at invented addresses, checked against a plain list of what is in use.
struct Checked {
    arena: Arena,
    /// Where the next piece will be, and all pieces.
    next: u64,
    pieces: Vec<(u64, u64)>,
    used: BTreeMap<u64, u64>,
}

impl Checked {
    fn new(base: u64) -> Self {
        Self { arena: Arena::default(), next: base, pieces: vec![], used: BTreeMap::new() }
    }

    fn alloc(&mut self, bytes: u64) -> u64 {
        let address = self.arena.alloc(bytes).unwrap_or_else(|| {
            let [liked, least] = self.arena.slab_for(bytes).unwrap();
            assert!(liked >= least && least >= bytes);
            self.arena.add(bytes, self.next, liked);
            self.pieces.push((self.next, liked));
            // Pieces touch each other: an allocation must not reach from one into the next.
            self.next += liked;
            self.arena.alloc(bytes).unwrap()
        });
        assert!(address.is_multiple_of(ALIGN));
        let inside = |(base, size): &(u64, u64)| *base <= address && address + bytes <= base + size;
        assert_eq!(
            self.pieces.iter().filter(|piece| inside(piece)).count(),
            1,
            "{bytes} bytes at {address:#x}"
        );
        let before = self.used.range(..=address).next_back();
        assert!(before.is_none_or(|(start, size)| start + size <= address), "overlaps what lies before");
        let after = self.used.range(address..).next();
        assert!(after.is_none_or(|(start, _)| address + bytes <= *start), "overlaps what lies behind");
        assert_eq!(self.arena.is_small(address), bytes <= SMALL);
        self.used.insert(address, bytes);
        address
    }

    fn free(&mut self, address: u64) {
        assert!(self.used.remove(&address).is_some());
        assert!(self.arena.free(address));
        assert!(!self.arena.free(address), "freed twice");
    }
}

/// Allocations of all sizes, freed in any order; returns addresses relative to the first piece.
fn churn(base: u64, seed: u64) -> Vec<u64> {
    let (mut arena, mut random) = (Checked::new(base), Random(seed));
    let mut addresses = Vec::new();
    for _ in 0..3000 {
        if arena.used.len() < 40 || random.below(2) == 0 {
            let bytes = 1 + random.next() % (1 << (1 + random.below(27)));
            addresses.push(arena.alloc(bytes) - base);
        } else {
            let which = random.below(arena.used.len() as u64) as usize;
            let address = *arena.used.keys().nth(which).unwrap();
            arena.free(address);
        }
        let asked: u64 = arena.used.values().sum();
        assert!((asked..asked + 256 * arena.used.len() as u64).contains(&arena.arena.used()));
    }
    let peak = arena.arena.peak();
    assert!(arena.arena.held() < 2 * peak, "{} held for a peak of {peak}", arena.arena.held());
    while let Some((&address, _)) = arena.used.iter().next() {
        arena.free(address);
    }
    // All is one again: every piece can be given back.
    assert_eq!(arena.arena.used(), 0);
    assert_eq!(arena.arena.drain_unused().len(), arena.pieces.len());
    assert_eq!(arena.arena.held(), 0);
    addresses
}

#[test]
fn the_arena_gives_no_byte_twice_and_decides_by_the_calls_alone() {
    for seed in 0..4 {
        assert_eq!(
            churn(1 << 33, seed),
            churn(7 << 40, seed),
            "seed {seed}: other addresses with other pieces"
        );
    }
}

#[test]
fn a_loop_that_gives_back_what_it_took_gets_the_same_addresses() {
    let mut arena = Checked::new(1 << 33);
    let kept: Vec<u64> = (1..20).map(|i| arena.alloc(i * 300_000)).collect();
    arena.free(kept[7]);
    arena.free(kept[3]);
    let mut round = || {
        let mut live = Vec::new();
        let mut addresses = Vec::new();
        for i in 0..200u64 {
            let address = arena.alloc(1 + i * 7919 % 3_000_000);
            addresses.push(address);
            live.push(address);
            if i % 3 == 0 {
                arena.free(live.remove((i as usize * 31) % live.len()));
            }
        }
        live.into_iter().for_each(|address| arena.free(address));
        addresses
    };
    // The first round may have had to get pieces.
    let second = (round(), round()).1;
    assert_eq!(second, round());
}

#[test]
fn the_arena_fills_the_tightest_hole_and_forgets_pieces_that_are_empty() {
    let mut arena = Checked::new(1 << 33);
    let mib = 1 << 20;
    let a: Vec<u64> = [4, 2, 8, 2, 3, 2].into_iter().map(|n| arena.alloc(n * mib)).collect();
    for hole in [0, 2, 4] {
        arena.free(a[hole]);
    }
    assert_eq!(arena.alloc(3 * mib), a[4], "the hole of 3 MiB, not of 4 or 8");
    assert_eq!(arena.alloc(3 * mib + 1), a[0]);
    assert!(arena.arena.drain_unused().is_empty());
    arena.free(a[1]);
    let merged = a[0] + 3 * mib + 256;
    assert_eq!(arena.alloc(10 * mib), merged, "what was left of 4 MiB, 2 and 8 are one hole");
    assert_eq!(arena.arena.alloc(u64::MAX), None);
    assert_eq!(arena.arena.slab_for(u64::MAX), None);
    assert!(!arena.arena.free(12345));
}

// --------------------------------------------------------------------------------------------------- the sequences

fn sequence(steps: &[Step]) -> Steps {
    let mut sequence = Steps::default();
    steps.iter().for_each(|step| sequence.push(step));
    sequence
}

fn steps(seed: u32) -> Vec<Step> {
    let launch = |i: u32| {
        let args =
            vec![Arg::Ptr(Ptr(u64::from(i))), Arg::F32(i as f32), Arg::U32(seed), Arg::Bytes(vec![1, 2])];
        Step::Launch(Kernel(i as usize), Launch::linear(1 + i as usize, 32), args)
    };
    (0..6).map(launch).chain([Step::Fill(Ptr(256), 0, 16)]).collect()
}

#[test]
fn a_sequence_is_recorded_at_second_sight_and_replayed_from_then_on() {
    let mut recordings: Recordings<u32> = Recordings::default();
    assert_eq!(recordings.look(&sequence(&steps(1))), Verdict::Run);
    assert_eq!(recordings.look(&sequence(&steps(2))), Verdict::Run);
    assert_eq!(recordings.look(&sequence(&steps(1))), Verdict::Record);
    assert_eq!(recordings.keep(&sequence(&steps(1)), 11), None);
    for _ in 0..3 {
        assert_eq!(recordings.look(&sequence(&steps(1))), Verdict::Replay(&11));
    }
    assert_eq!(recordings.look(&sequence(&steps(2))), Verdict::Record);
    // What is too short is never worth it.
    for _ in 0..3 {
        assert_eq!(recordings.look(&sequence(&steps(1)[..2])), Verdict::Run);
    }
    assert_eq!(recordings.drain(), [11]);
}

/// A sequence that is not replayed runs from what was kept of it.
#[test]
fn a_sequence_gives_back_its_steps() {
    let all = [Arg::U64(u64::MAX - 1), Arg::F32(-0.0), Arg::F32(f32::INFINITY), Arg::Ptr(Ptr(1 << 40))];
    let bytes = (0..20).map(|n| Arg::Bytes((0..n).collect()));
    let launch = Launch { grid: [1, 2, 3], block: [4, 5, 6], shared_bytes: 7 };
    let odd = Step::Launch(Kernel(9), launch, all.into_iter().chain(bytes).collect());
    let steps = [&steps(3)[..], &[odd, Step::Fill(Ptr(u64::MAX), 255, usize::MAX)], &steps(4)].concat();
    let sequence = sequence(&steps);
    assert_eq!(sequence.len(), steps.len());
    let given = sequence.iter().collect::<Vec<_>>();
    // -0 equals 0, but not in words.
    assert!(given == steps && crate::device::sequence(&given) == sequence, "{given:?}");
}

#[test]
fn sequences_that_differ_in_anything_are_others() {
    let base = steps(1);
    let mut others: Vec<Vec<Step>> = vec![base[1..].to_vec(), base[..6].to_vec()];
    let mut alter = |f: &dyn Fn(&mut Kernel, &mut Launch, &mut Vec<Arg>)| {
        let mut other = base.clone();
        let Step::Launch(kernel, launch, args) = &mut other[3] else { unreachable!() };
        f(kernel, launch, args);
        assert_ne!(other, base);
        others.push(other);
    };
    alter(&|kernel, _, _| kernel.0 += 1);
    alter(&|_, launch, _| launch.grid[1] += 1);
    alter(&|_, launch, _| launch.block[2] += 1);
    alter(&|_, launch, _| launch.shared_bytes += 1);
    alter(&|_, _, args| args[0] = Arg::Ptr(Ptr(99)));
    alter(&|_, _, args| args[0] = Arg::U64(3));
    alter(&|_, _, args| args[1] = Arg::F32(-3.0));
    alter(&|_, _, args| args[1] = Arg::U32(3.0f32.to_bits()));
    alter(&|_, _, args| args[3] = Arg::Bytes(vec![2, 1]));
    alter(&|_, _, args| args[3] = Arg::Bytes(vec![1, 2, 0]));
    alter(&|_, _, args| drop(args.pop()));
    for fill in [Step::Fill(Ptr(512), 0, 16), Step::Fill(Ptr(256), 1, 16), Step::Fill(Ptr(256), 0, 32)] {
        others.push(base[..6].iter().cloned().chain([fill]).collect());
    }
    let mut recordings: Recordings<u32> = Recordings::default();
    assert_eq!(recordings.look(&sequence(&base)), Verdict::Run);
    assert_eq!(recordings.look(&sequence(&base)), Verdict::Record);
    assert_eq!(recordings.keep(&sequence(&base), 0), None);
    for other in &others {
        assert_eq!(recordings.look(&sequence(other)), Verdict::Run, "{other:?}");
    }
    assert_eq!(recordings.look(&sequence(&base)), Verdict::Replay(&0));
}

#[test]
fn only_so_many_recordings_are_kept() {
    let mut recordings = Recordings::default();
    let mut left = Vec::new();
    for seed in 0..100 {
        let _ = recordings.look(&sequence(&steps(seed)));
        assert_eq!(recordings.look(&sequence(&steps(seed))), Verdict::Record);
        left.extend(recordings.keep(&sequence(&steps(seed)), seed));
        // The first is used all the time.
        assert_eq!(recordings.look(&sequence(&steps(0))), Verdict::Replay(&0));
    }
    assert_eq!(left, Vec::from_iter(1..=36), "the longest unused leave first");
    assert_eq!(recordings.look(&sequence(&steps(36))), Verdict::Run);
    assert_eq!(recordings.look(&sequence(&steps(37))), Verdict::Replay(&37));
    assert_eq!(recordings.drain().len(), 64);
}

// --------------------------------------------------------------------------------------------------- on any driver

/// Kernels small enough to be written by hand.
const PTX: &str = "
.version 7.4
.target sm_80
.address_size 64
.extern .shared .align 16 .b8 room[];

// y[i] = a x[i] + table[i], one thread each.
.visible .entry combine(.param .u64 x, .param .u64 table, .param .u64 y, .param .u32 n, .param .f32 a) {
    .reg .pred %p;
    .reg .b32 %r<6>;
    .reg .b64 %d<8>;
    .reg .f32 %f<5>;
    mov.u32 %r0, %ctaid.x;
    mov.u32 %r1, %ntid.x;
    mov.u32 %r2, %tid.x;
    mad.lo.u32 %r3, %r0, %r1, %r2;
    ld.param.u32 %r4, [n];
    setp.ge.u32 %p, %r3, %r4;
    @%p bra done;
    ld.param.u64 %d0, [x];
    ld.param.u64 %d1, [table];
    ld.param.u64 %d2, [y];
    mul.wide.u32 %d3, %r3, 4;
    add.u64 %d4, %d0, %d3;
    add.u64 %d5, %d1, %d3;
    add.u64 %d6, %d2, %d3;
    ld.global.f32 %f0, [%d4];
    ld.global.f32 %f1, [%d5];
    ld.param.f32 %f2, [a];
    fma.rn.f32 %f3, %f2, %f0, %f1;
    st.global.f32 [%d6], %f3;
done:
    ret;
}

// y reversed, through the end of dynamic shared memory of `bytes` bytes; one block.
.visible .entry reverse(.param .u64 y, .param .u32 bytes) {
    .reg .b32 %r<9>;
    .reg .b64 %d<4>;
    mov.u32 %r0, %tid.x;
    mov.u32 %r1, %ntid.x;
    ld.param.u64 %d0, [y];
    mul.wide.u32 %d1, %r0, 4;
    add.u64 %d2, %d0, %d1;
    ld.global.u32 %r2, [%d2];
    ld.param.u32 %r3, [bytes];
    mov.u32 %r4, room;
    add.u32 %r4, %r4, %r3;
    shl.b32 %r5, %r1, 2;
    sub.u32 %r4, %r4, %r5;
    shl.b32 %r6, %r0, 2;
    add.u32 %r6, %r4, %r6;
    st.shared.u32 [%r6], %r2;
    bar.sync 0;
    add.u32 %r4, %r4, %r5;
    sub.u32 %r4, %r4, 4;
    shl.b32 %r6, %r0, 2;
    sub.u32 %r6, %r4, %r6;
    ld.shared.u32 %r7, [%r6];
    st.global.u32 [%d2], %r7;
    ret;
}

// Writes where nobody may.
.visible .entry wild() {
    .reg .b64 %d0;
    mov.u64 %d0, 64;
    st.global.u32 [%d0], 1;
    ret;
}
";

fn kernels(gpu: &Gpu) -> [Kernel; 3] {
    gpu.load("hand.ptx", PTX, &["combine", "reverse", "wild"]).unwrap().try_into().unwrap()
}

fn upload(gpu: &Gpu, x: &[f32]) -> Ptr {
    let ptr = gpu.alloc(4 * x.len()).unwrap();
    gpu.write(ptr, bytemuck::cast_slice(x)).unwrap();
    ptr
}

fn download(gpu: &Gpu, ptr: Ptr, n: usize) -> Vec<f32> {
    let mut x = vec![0.0; n];
    gpu.read(ptr, bytemuck::cast_slice_mut(&mut x)).unwrap();
    x
}

/// y = a x + table on n numbers.
fn combine(gpu: &Gpu, kernel: Kernel, [x, table, y]: [Ptr; 3], n: usize, a: f32) {
    let args = [x.into(), table.into(), y.into(), n.into(), a.into()];
    gpu.launch(kernel, &Launch::linear(n.div_ceil(64), 64), &args).unwrap();
}

/// What runs on a GPU, real or virtual.
mod on_gpu {
    use super::*;

    #[test]
    fn bytes_arrive_as_they_were() {
        let Some(gpu) = gpu() else { return };
        let mut random = Random(1);
        // One part of the page-locked memory is 8 MiB, all are 32.
        let sizes = [1, 255, 256, 257, 100_000, (8 << 20) - 1, 8 << 20, (8 << 20) + 1, (40 << 20) + 3];
        let copies: Vec<(Ptr, Vec<u8>)> = sizes
            .into_iter()
            .map(|n| {
                let mut bytes = random.bytes(n);
                let ptr = gpu.alloc(n).unwrap();
                gpu.write(ptr, &bytes).unwrap();
                let kept = bytes.clone();
                // The caller's memory is the caller's again.
                bytes.fill(0);
                (ptr, kept)
            })
            .collect();
        for (ptr, want) in &copies {
            let mut got = vec![0; want.len()];
            gpu.read(*ptr, &mut got).unwrap();
            assert!(got == *want, "{} bytes", want.len());
        }
        let (ptr, want) = &copies[4];
        gpu.fill(Ptr(ptr.0 + 100), 0xab, 50).unwrap();
        let mut got = vec![0; want.len()];
        gpu.read(*ptr, &mut got).unwrap();
        assert!(
            got[100..150].iter().all(|b| *b == 0xab)
                && got[..100] == want[..100]
                && got[150..] == want[150..]
        );
        copies.iter().for_each(|(ptr, _)| gpu.free(*ptr));
    }

    #[test]
    fn large_reads_go_through_page_locked_memory_in_order() {
        let Some(gpu) = gpu() else { return };
        let [kernel, ..] = kernels(&gpu);
        let mut random = Random(9);
        // One piece, fewer than parts, more, and ends within a piece; writes before and after use the same parts.
        for n in [(8 << 20) / 4, (20 << 20) / 4 + 3, (50 << 20) / 4 + 1] {
            let mut x: Vec<f32> = (0..n).map(|_| random.next() as f32).collect();
            let ptr = upload(&gpu, &x);
            combine(&gpu, kernel, [ptr, ptr, ptr], 100, 2.0);
            x[..100].iter_mut().for_each(|x| *x *= 3.0);
            let other = upload(&gpu, &x[5..1000]);
            assert!(download(&gpu, ptr, n) == x);
            let after = upload(&gpu, &x[7..3000]);
            assert!(download(&gpu, ptr, n) == x && download(&gpu, other, 995) == x[5..1000]);
            assert!(download(&gpu, after, 2993) == x[7..3000]);
            [ptr, other, after].into_iter().for_each(|ptr| gpu.free(ptr));
        }
    }

    #[test]
    fn memory_that_is_given_back_serves_again_without_the_driver() {
        let Some(gpu) = gpu() else { return };
        let round = || {
            let taken: Vec<Ptr> = (1..60).map(|i| gpu.alloc(i * 50_000).unwrap()).collect();
            taken.iter().for_each(|ptr| gpu.free(*ptr));
            taken
        };
        let first = round();
        let allocations = gpu.counts().allocations;
        assert_eq!(round(), first);
        assert_eq!(gpu.counts().allocations, allocations);
        let memory = gpu.memory().unwrap();
        assert!(memory.used == 0 && memory.held >= memory.peak && memory.peak > 0, "{memory:?}");
        // Others may have taken memory since.
        assert_eq!(memory.available(), memory.free + memory.held);
        assert!(gpu.available().unwrap().is_some_and(|bytes| (1..=memory.total).contains(&bytes)));
        gpu.reset_peak();
        assert_eq!(gpu.memory().unwrap().peak, 0);
        gpu.alloc(1000).unwrap();
        assert_eq!(gpu.memory().unwrap().peak, 1024);
    }

    #[test]
    fn work_runs_in_the_order_in_which_it_was_asked_for() {
        let Some(gpu) = gpu() else { return };
        let [kernel, ..] = kernels(&gpu);
        let n = 1000;
        let y = upload(&gpu, &vec![0.0; n]);
        // y = -y + i, with a table in the same place every time: none may arrive early or late.
        for i in 0..300 {
            let table = upload(&gpu, &vec![i as f32; n]);
            combine(&gpu, kernel, [y, table, y], n, -1.0);
            gpu.free(table);
        }
        // 299 - 298 + 297 - ... - 0
        assert!(download(&gpu, y, n).iter().all(|y| *y == 150.0));
    }

    #[test]
    fn a_block_gets_the_shared_memory_it_asks_for_or_a_clear_no() {
        let Some(gpu) = gpu() else { return };
        let [_, reverse, _] = kernels(&gpu);
        let x: Vec<f32> = (0..128).map(|i| i as f32).collect();
        let y = upload(&gpu, &x);
        let launch = |bytes: usize| {
            gpu.launch(reverse, &Launch::linear(1, 128).shared(bytes), &[y.into(), bytes.into()])
        };
        for bytes in [512, 48 << 10, 96 << 10, 49 << 10] {
            launch(bytes).unwrap();
        }
        assert_eq!(download(&gpu, y, 128), x, "reversed four times");
        launch(99 << 10).unwrap();
        assert_eq!(download(&gpu, y, 128), x.iter().rev().copied().collect::<Vec<_>>());
        let message = launch(1 << 20).unwrap_err().message;
        assert!(
            message.starts_with("reverse needs 1048576 bytes of shared memory for a block, and"),
            "{message}"
        );
    }

    #[test]
    fn what_cannot_be_loaded_is_explained() {
        let Some(gpu) = gpu() else { return };
        let message =
            gpu.load("mine.ptx", &PTX.replace("fma.rn", "fma.qq"), &["combine"]).unwrap_err().message;
        assert!(
            message.starts_with("cannot load mine.ptx: ") && message.contains("compiler says: "),
            "{message}"
        );
        assert!(message.contains("CUDA_ERROR_INVALID_PTX"), "{message}");
        let message = gpu.load("mine.ptx", PTX, &["combine", "absent"]).unwrap_err().message;
        assert!(message.starts_with("cannot find the kernel absent in mine.ptx: "), "{message}");
        let newer = PTX.replace(".version 7.4", ".version 42.0");
        let message = gpu.load("mine.ptx", &newer, &["combine"]).unwrap_err().message;
        assert!(message.contains("is PTX 42.0, and this driver knows CUDA "), "{message}");
    }

    #[test]
    fn a_launch_that_cannot_be_is_refused_by_name() {
        let Some(gpu) = gpu() else { return };
        let [combine, ..] = kernels(&gpu);
        let args = [Ptr(0), Ptr(0), Ptr(0)].map(Arg::Ptr).into_iter().chain([0u32.into(), 0f32.into()]);
        let args: Vec<Arg> = args.collect();
        let launch = Launch { grid: [1, 70_000, 1], block: [64, 1, 1], shared_bytes: 0 };
        let message = gpu.launch(combine, &launch, &args).unwrap_err().message;
        assert!(message.starts_with("cannot launch combine with grid [1, 70000, 1]"), "{message}");
        // Nothing is broken by it.
        gpu.launch(combine, &Launch::linear(1, 64), &args).unwrap();
        gpu.synchronize().unwrap();
    }

    #[test]
    fn there_is_no_gpu_of_a_high_number() {
        if gpu().is_some() {
            let error = Gpu::open(1000).unwrap_err();
            assert!(error.to_string().starts_with("cuda:1000: there "), "{error}");
        }
    }

    #[test]
    fn devices_and_threads_do_not_disturb_each_other() {
        let Some(one) = gpu() else { return };
        let two = gpu().unwrap();
        std::thread::scope(|scope| {
            for (gpu, a) in [(&one, 1.0), (&two, 2.0), (&one, 3.0)] {
                scope.spawn(move || {
                    let [kernel, ..] = kernels(gpu);
                    for i in 0..20 {
                        let n = 100 + i;
                        let (x, table) = (upload(gpu, &vec![i as f32; n]), upload(gpu, &vec![0.5; n]));
                        let y = gpu.alloc(4 * n).unwrap();
                        combine(gpu, kernel, [x, table, y], n, a);
                        assert!(download(gpu, y, n).iter().all(|y| *y == a * i as f32 + 0.5));
                        [x, table, y].into_iter().for_each(|ptr| gpu.free(ptr));
                    }
                });
            }
        });
    }

    #[test]
    fn time_passes() {
        let Some(gpu) = gpu() else { return };
        let [kernel, ..] = kernels(&gpu);
        let n = 5000;
        let y = upload(&gpu, &vec![1.0; n]);
        let time = |times: usize| {
            let work = &mut || (0..times).for_each(|_| combine(&gpu, kernel, [y, y, y], n, 0.0));
            gpu.timed(work).unwrap()
        };
        let (none, some) = (time(0), time(200));
        assert!(none >= 0.0 && some > 0.0 && some.is_finite(), "{none} and {some} s");
    }

    // A step of a decode loop: tables that are written between launches, temporaries of both pools, a fill.
    fn step(gpu: &Gpu, kernel: Kernel, state: Ptr, n: usize, i: usize) {
        let big = gpu.alloc(3 << 20).unwrap();
        gpu.fill(big, 0, 4 * n).unwrap();
        for j in 0..6 {
            let table = upload(gpu, &vec![(i * 7 + j) as f32; n]);
            let y = gpu.alloc(4 * n).unwrap();
            // y = state + table; state = y / 2 + big
            combine(gpu, kernel, [state, table, y], n, 1.0);
            gpu.free(table);
            combine(gpu, kernel, [y, big, state], n, 0.5);
            gpu.free(y);
        }
        gpu.free(big);
    }

    /// What a number becomes by that.
    fn stepped(mut state: f32, i: usize) -> f32 {
        for j in 0..6 {
            state = (state + (i * 7 + j) as f32) * 0.5;
        }
        state
    }

    #[test]
    fn a_sequence_that_comes_again_is_replayed_with_the_same_result() {
        let Some(gpu) = gpu() else { return };
        let [kernel, ..] = kernels(&gpu);
        let n = 777;
        let state = upload(&gpu, &vec![1.0; n]);
        let mut want = 1.0;
        let rounds = 8;
        for i in 0..rounds {
            gpu.begin_sequence().unwrap();
            step(&gpu, kernel, state, n, i);
            gpu.end_sequence().unwrap();
            want = stepped(want, i);
        }
        assert!(
            download(&gpu, state, n).iter().all(|x| *x == want),
            "{} for {want}",
            download(&gpu, state, 1)[0]
        );
        // The first runs step by step, and in the first round memory was new.
        let counts = gpu.counts();
        assert_eq!(counts.recorded, 1, "{counts:?}");
        assert!(counts.replayed >= rounds as u64 - 2, "{counts:?}");
        assert_eq!(counts.single, 13 * (rounds as u64 - counts.replayed), "{counts:?}");
        assert_eq!(counts.refused, 0);
    }

    #[test]
    fn numbers_that_change_are_not_replayed() {
        let Some(gpu) = gpu() else { return };
        let [kernel, ..] = kernels(&gpu);
        let state = upload(&gpu, &[0.0; 64]);
        for i in 0..5 {
            gpu.begin_sequence().unwrap();
            (0..8).for_each(|_| combine(&gpu, kernel, [state, state, state], 64, i as f32));
            gpu.end_sequence().unwrap();
        }
        assert_eq!((gpu.counts().recorded, gpu.counts().single), (0, 40));
    }

    #[test]
    fn reads_and_writes_within_a_sequence_keep_their_place() {
        let Some(gpu) = gpu() else { return };
        let [kernel, ..] = kernels(&gpu);
        let n = 500;
        let (old, y) = (upload(&gpu, &vec![1.0; n]), upload(&gpu, &vec![0.0; n]));
        for round in 0..6 {
            gpu.begin_sequence().unwrap();
            gpu.write(old, bytemuck::cast_slice(&vec![1.0f32; n])).unwrap();
            let ask = || (0..4).for_each(|_| combine(&gpu, kernel, [y, old, y], n, 0.5));
            ask();
            // Older than the sequence, and used by what is held back.
            gpu.write(old, bytemuck::cast_slice(&vec![2.0f32; n])).unwrap();
            ask();
            let middle = download(&gpu, y, n);
            // New, but used by what is held back before it is written.
            let new = gpu.alloc(4 * n).unwrap();
            combine(&gpu, kernel, [y, old, new], n, 1.0);
            combine(&gpu, kernel, [new, old, y], n, 1.0);
            gpu.write(new, bytemuck::cast_slice(&vec![-1.0f32; n])).unwrap();
            combine(&gpu, kernel, [y, new, y], n, 1.0);
            gpu.end_sequence().unwrap();
            let end = download(&gpu, y, n);
            gpu.free(new);
            assert!(
                middle.iter().zip(&end).all(|(middle, end)| *end == middle + 2.0 + 2.0 - 1.0),
                "round {round}"
            );
            gpu.fill(y, 0, 4 * n).unwrap();
            let want = (0..4).fold((0..4).fold(0.0, |y, _| y * 0.5 + 1.0), |y, _| y * 0.5 + 2.0);
            assert!(middle.iter().all(|y| *y == want), "round {round}: {} for {want}", middle[0]);
        }
        assert!(gpu.counts().replayed > 0, "{:?}", gpu.counts());
    }

    /// Bytes are those at the time of asking, whatever comes later, and whoever asks need not wait for them.
    #[test]
    fn reads_that_are_under_way_keep_what_they_read() {
        let Some(gpu) = gpu() else { return };
        let [kernel, ..] = kernels(&gpu);
        let n = 3000;
        let (one, y) = (upload(&gpu, &vec![1.0; n]), upload(&gpu, &vec![0.0; n]));
        let begin = |first: usize| {
            combine(&gpu, kernel, [y, one, y], n, 1.0);
            gpu.begin_read(y, 4 * first).unwrap()
        };
        let end = |reading, want: f32| {
            let bytes = gpu.end_read(reading).unwrap();
            assert!(bytes.chunks(4).all(|x| x == want.to_ne_bytes()), "{:?} for {want}", &bytes[..4]);
            bytes.len() / 4
        };
        for round in 0..4 {
            gpu.fill(y, 0, 4 * n).unwrap();
            gpu.begin_sequence().unwrap();
            let mut readings: Vec<_> = [n, 100, n, 1].map(|first| Some(begin(first))).into();
            // Nobody waits for this one; its place is taken by the next.
            readings[1] = None;
            readings.push(Some(begin(n)));
            gpu.end_sequence().unwrap();
            let mut take = |i: usize, want: f32| end(readings[i].take().unwrap(), want);
            assert_eq!((take(2, 3.0), take(0, 1.0)), (n, n), "round {round}");
            assert_eq!(take(3, 4.0), 1);
        }
        let other = Gpu::open(0).unwrap();
        assert!(other.end_read(begin(1)).is_err());
    }

    #[test]
    fn many_different_sequences_leave_a_bounded_number_of_graphs() {
        let Some(gpu) = gpu() else { return };
        let [kernel, ..] = kernels(&gpu);
        let y = upload(&gpu, &[0.0; 64]);
        for i in 0..80 {
            for _ in 0..3 {
                gpu.begin_sequence().unwrap();
                (0..4).for_each(|j| combine(&gpu, kernel, [y, y, y], 64 - j, i as f32 / 256.0));
                gpu.end_sequence().unwrap();
            }
        }
        gpu.synchronize().unwrap();
        let counts = gpu.counts();
        assert_eq!((counts.recorded, counts.replayed, counts.refused), (80, 160, 0));
    }

    #[test]
    fn sequences_do_not_nest() {
        let Some(gpu) = gpu() else { return };
        assert!(gpu.end_sequence().is_err());
        gpu.begin_sequence().unwrap();
        assert!(gpu.begin_sequence().is_err());
        gpu.end_sequence().unwrap();
        assert!(gpu.end_sequence().is_err());
    }
}

// ----------------------------------------------------------------------------------------------- the virtual driver

/// What may be wrong with a machine, and what is told of it: a process each, on a virtual driver with these settings.
mod with_settings {
    use super::*;

    /// Whether this is such a process. If not, one is run with the test of this name, and that was all.
    #[track_caller]
    fn on_machine(name: &str, settings: &[(&str, &str)]) -> bool {
        const SCENE: &str = "DEVICE_TEST_SCENE";
        if std::env::var_os(SCENE).is_some_and(|scene| scene == name) {
            return true;
        }
        let test = format!("{}::with_settings::{name}", here());
        assert_eq!(under(&[settings, &[(SCENE, name)]].concat(), &["--exact", &test]).0, 1, "{name}");
        false
    }

    #[test]
    fn an_old_gpu() {
        if !on_machine("an_old_gpu", &[("VCUDA_CAPABILITY", "7.5")]) {
            return;
        }
        let message = Gpu::open(0).unwrap_err().message;
        assert!(
            message.contains("compute capability 7.5, and the kernels need 8.0 (Ampere) or newer"),
            "{message}"
        );
    }

    #[test]
    fn an_old_driver() {
        if !on_machine("an_old_driver", &[("VCUDA_VERSION", "11.2")]) {
            return;
        }
        let gpu = Gpu::open(0).unwrap();
        // Which of several like GPUs makes no difference to bits.
        assert_eq!(gpu.name(), format!("cuda:0 ({})", gpu.description().name));
        assert_eq!(gpu.model(), format!("cuda ({})", gpu.description().name));
        let message = gpu.load("hand.ptx", PTX, &["combine"]).unwrap_err().message;
        let told =
            "hand.ptx is PTX 7.4, and this driver knows CUDA 11.2; install a driver of CUDA 11.4 or newer";
        assert!(message.starts_with(told), "{message}");
    }

    #[test]
    fn no_gpu() {
        if !on_machine("no_gpu", &[("VCUDA_DEVICES", "0")]) {
            return;
        }
        let message = Gpu::open(0).unwrap_err().message;
        assert!(message.contains("CUDA_VISIBLE_DEVICES") && message.contains("--device cpu"), "{message}");
    }

    #[test]
    fn no_fabric() {
        if !on_machine("no_fabric", &[("VCUDA_INIT", "802")]) {
            return;
        }
        let message = Gpu::open(0).unwrap_err().message;
        assert!(
            message.contains("(CUDA_ERROR_SYSTEM_NOT_READY); GPUs that an NVSwitch connects"),
            "{message}"
        );
    }

    /// A driver newer than the headers.
    #[test]
    fn an_unknown_result() {
        if !on_machine("an_unknown_result", &[("VCUDA_INIT", "98765")]) {
            return;
        }
        let message = Gpu::open(0).unwrap_err().message;
        assert_eq!(message, "cannot start the CUDA driver: error 98765 (error 98765)");
    }

    #[test]
    fn little_memory() {
        if !on_machine("little_memory", &[("VCUDA_MEMORY", "209715200")]) {
            return;
        }
        let gpu = Gpu::open(0).unwrap();
        let mib = 1 << 20;
        // Two pieces of 64 MiB in 200: the third does not fit unless they are given back.
        let two = [gpu.alloc(60 * mib).unwrap(), gpu.alloc(60 * mib).unwrap()];
        let message = gpu.alloc(100 * mib).unwrap_err().message;
        let told = "out of memory: 0.10 GiB are asked for; of 0.20 GiB this process uses 0.12 GiB and keeps 0.01 GiB";
        assert!(message.starts_with(told), "{message}");
        assert!(message.contains("0.07 GiB are free; `nvidia-smi`"), "{message}");
        two.into_iter().for_each(|ptr| gpu.free(ptr));
        // The pieces go back, and the memory is good.
        let sequence = || {
            let large = gpu.alloc(2 * mib).unwrap();
            gpu.begin_sequence().unwrap();
            (0..4).for_each(|i| gpu.fill(large, i, 2 * mib).unwrap());
            gpu.end_sequence().unwrap();
            gpu.free(large);
        };
        (0..3).for_each(|_| sequence());
        let big = gpu.alloc(150 * mib).unwrap();
        gpu.fill(big, 7, 150 * mib).unwrap();
        let mut end = [0; 16];
        gpu.read(Ptr(big.0 + (150 * mib - 16) as u64), &mut end).unwrap();
        assert_eq!(end, [7; 16]);
        assert!(gpu.alloc(usize::MAX).unwrap_err().out_of_memory);
        // The graph went before what it fills; others are made.
        gpu.free(big);
        (0..3).for_each(|_| sequence());
        assert_eq!((gpu.counts().recorded, gpu.counts().replayed), (2, 4));
    }

    #[test]
    fn a_kernel_that_fails() {
        if !on_machine("a_kernel_that_fails", &[]) {
            return;
        }
        let gpu = Gpu::open(0).unwrap();
        let [kernel, _, wild] = kernels(&gpu);
        // More than are remembered; the wild one is not the last.
        let y = upload(&gpu, &[1.0; 64]);
        (0..40).for_each(|_| combine(&gpu, kernel, [y, y, y], 64, 1.0));
        gpu.launch(wild, &Launch::linear(3, 1), &[]).unwrap();
        combine(&gpu, kernel, [y, y, y], 64, 1.0);
        let launched = "; launched before, the latest first: combine with grid [1, 1, 1], block [64, 1, 1], \
                        wild with grid [3, 1, 1], block [1, 1, 1], combine with grid [1, 1, 1]";
        let read = gpu.read(y, &mut [0; 4]).unwrap_err().message;
        assert!(read.contains(launched), "{read}");
        assert_eq!(read.matches(" with grid ").count(), 16, "{read}");
        for _ in 0..2 {
            let message = gpu.synchronize().unwrap_err().message;
            assert!(message.contains(launched), "{message}");
            assert!(message.contains("(CUDA_ERROR_ILLEGAL_ADDRESS); a kernel failed"), "{message}");
            assert!(
                message.contains("CUDA_LAUNCH_BLOCKING=1") && message.contains("--device vm"),
                "{message}"
            );
        }
    }

    /// With CUDA_LAUNCH_BLOCKING=1 the launch that fails says so itself.
    #[test]
    fn a_kernel_that_is_waited_for() {
        let settings = [("CUDA_LAUNCH_BLOCKING", "1"), ("VCUDA_FAULT", "reverse")];
        if !on_machine("a_kernel_that_is_waited_for", &settings) {
            return;
        }
        let gpu = Gpu::open(0).unwrap();
        let [kernel, reverse, _] = kernels(&gpu);
        let y = upload(&gpu, &[1.0; 64]);
        combine(&gpu, kernel, [y, y, y], 64, 1.0);
        let message =
            gpu.launch(reverse, &Launch::linear(1, 64), &[y.into(), 0u32.into()]).unwrap_err().message;
        assert!(
            message.starts_with("cannot launch reverse with grid [1, 1, 1], block [64, 1, 1]: "),
            "{message}"
        );
        assert!(
            message.ends_with(
                "; launched before, the latest first: combine with grid [1, 1, 1], block [64, 1, 1]"
            )
        );
    }

    #[test]
    fn a_replay_that_fails() {
        if !on_machine("a_replay_that_fails", &[]) {
            return;
        }
        let gpu = Gpu::open(0).unwrap();
        let [kernel, _, wild] = kernels(&gpu);
        let y = upload(&gpu, &[1.0; 64]);
        for round in 0..3 {
            gpu.begin_sequence().unwrap();
            (0..5).for_each(|_| combine(&gpu, kernel, [y, y, y], 64, 1.0));
            gpu.end_sequence().unwrap();
            if round == 1 {
                gpu.launch(wild, &Launch::linear(1, 1), &[]).unwrap();
            }
        }
        // Replayed, and a replay is a launch of all in it.
        assert_eq!(gpu.counts().replayed, 2);
        let message = gpu.synchronize().unwrap_err().message;
        let (_, launched) = message.split_once("the latest first: ").unwrap();
        let names: Vec<&str> =
            launched.split(" with grid ").map(|part| part.rsplit(' ').next().unwrap()).collect();
        assert_eq!(names[..7], [["combine"; 5].as_slice(), &["wild", "combine"]].concat(), "{message}");
    }

    /// Every allocation has its own bounds, so that an access past a tensor is seen where it happens.
    #[test]
    fn exact_memory() {
        if !on_machine("exact_memory", &[(EXACT_ALLOC, "1")]) {
            return;
        }
        let gpu = Gpu::open(0).unwrap();
        let before = gpu.memory().unwrap();
        let [kernel, ..] = kernels(&gpu);
        let [x, y] = [upload(&gpu, &[1.0; 50]), upload(&gpu, &[0.0; 50])];
        let memory = gpu.memory().unwrap();
        assert_eq!((memory.used, memory.held, memory.free), (400, 400, before.free - 400));
        // Memory that is freed in a sequence is still there when its work runs, and gone afterwards.
        for _ in 0..4 {
            gpu.begin_sequence().unwrap();
            (0..4).for_each(|_| step(&gpu, kernel, x, 50));
            gpu.end_sequence().unwrap();
        }
        assert!(download(&gpu, x, 50).iter().all(|x| *x == 17.0));
        let after = gpu.memory().unwrap();
        assert_eq!((after.used, after.held, after.free), (400, 400, before.free - 400));
        assert_eq!((gpu.counts().recorded, gpu.counts().single), (0, 32));
        combine(&gpu, kernel, [x, x, y], 51, 1.0);
        let message = gpu.synchronize().unwrap_err().message;
        assert!(message.contains("ILLEGAL_ADDRESS"), "{message}");
    }

    /// The same access within a piece of the arena, where nobody sees it.
    #[test]
    fn memory_in_pieces() {
        if !on_machine("memory_in_pieces", &[]) {
            return;
        }
        let gpu = Gpu::open(0).unwrap();
        let [kernel, ..] = kernels(&gpu);
        let [x, y] = [upload(&gpu, &[1.0; 51]), upload(&gpu, &[0.0; 50])];
        combine(&gpu, kernel, [x, x, y], 51, 1.0);
        gpu.synchronize().unwrap();
    }

    /// x = x + 1 by way of temporary memory, small and large.
    fn step(gpu: &Gpu, kernel: Kernel, x: Ptr, n: usize) {
        let one = upload(gpu, &vec![1.0; n]);
        let sum = gpu.alloc(2 << 20).unwrap();
        combine(gpu, kernel, [x, one, sum], n, 1.0);
        gpu.free(one);
        let zero = upload(gpu, &vec![0.0; n]);
        combine(gpu, kernel, [sum, zero, x], n, 1.0);
        [zero, sum].into_iter().for_each(|ptr| gpu.free(ptr));
    }

    #[test]
    fn no_graphs() {
        if !on_machine("no_graphs", &[("VCUDA_GRAPHS", "0")]) {
            return;
        }
        let gpu = Gpu::open(0).unwrap();
        four_sequences(&gpu);
        assert_eq!(gpu.counts().recorded, 0);
    }

    #[test]
    fn no_memory_for_graphs() {
        if !on_machine("no_memory_for_graphs", &[("VCUDA_GRAPHS", "made")]) {
            return;
        }
        let gpu = Gpu::open(0).unwrap();
        four_sequences(&gpu);
        assert_eq!(gpu.counts().recorded, 1);
    }

    /// Kernels that begin before those ahead have ended, one by one and in graphs, wait for them.
    #[test]
    fn kernels_that_begin_early() {
        if !on_machine("kernels_that_begin_early", &[("VCUDA_CAPABILITY", "9.0")]) {
            return;
        }
        let gpu = Gpu::open(0).unwrap();
        let [kernel, ..] = kernels(&gpu);
        let y = upload(&gpu, &[1.0; 64]);
        for _ in 0..4 {
            gpu.begin_sequence().unwrap();
            (0..5).for_each(|_| combine(&gpu, kernel, [y, y, y], 64, 1.0));
            gpu.end_sequence().unwrap();
        }
        combine(&gpu, kernel, [y, y, y], 64, 1.0);
        assert!(download(&gpu, y, 64).iter().all(|y| *y == 2f32.powi(21)));
        assert!(gpu.counts().recorded == 1 && gpu.counts().replayed > 0 && gpu.counts().refused == 0);
        let message = one_that_does_not_wait(&gpu).unwrap_err().message;
        assert!(message.contains("cannot launch combine with grid"), "{message}");
        assert!(message.contains("something is still in use"), "{message}");
    }

    /// A kernel that uses memory before it waits may be launched where nothing begins early.
    fn one_that_does_not_wait(gpu: &Gpu) -> Result<(), DeviceError> {
        let ptx = dependent(PTX);
        let late = ptx.replacen("griddepcontrol.wait;", "", 1);
        assert!(late != ptx);
        let image = machine_code(90, &late);
        let cubins = [Cubin { capability: (9, 0), cuda: (12, 0), image: &image }];
        let loaded = gpu.load_cubin("hand.cubin", &cubins, &["combine"])?.expect("it is for this GPU");
        let y = upload(gpu, &[1.0; 64]);
        let args = [y.into(), y.into(), y.into(), 64u32.into(), 1f32.into()];
        gpu.launch(loaded[0], &Launch::linear(1, 64), &args)
    }

    #[test]
    fn kernels_that_begin_late_by_request() {
        let settings = [("VCUDA_CAPABILITY", "9.0"), (DEPENDENT_LAUNCH, "0")];
        if on_machine("kernels_that_begin_late_by_request", &settings) {
            one_that_does_not_wait(&Gpu::open(0).unwrap()).unwrap();
        }
    }

    /// A driver whose graphs know no programmatic dependencies.
    #[test]
    fn kernels_that_begin_late_under_an_old_driver() {
        let settings = [("VCUDA_CAPABILITY", "9.0"), ("VCUDA_VERSION", "12.2")];
        if on_machine("kernels_that_begin_late_under_an_old_driver", &settings) {
            one_that_does_not_wait(&Gpu::open(0).unwrap()).unwrap();
        }
    }

    /// What stands for machine code on the virtual driver.
    fn machine_code(architecture: u8, ptx: &str) -> Vec<u8> {
        let mut image = vec![0; 64];
        image[..4].copy_from_slice(b"\x7fELF");
        image[0x31] = architecture;
        image.extend(ptx.bytes().chain([0]));
        image
    }

    const JETSON: [(&str, &str); 2] = [("VCUDA_CAPABILITY", "8.7"), ("VCUDA_VERSION", "13.0")];

    #[test]
    fn machine_code_where_there_is_some_for_the_gpu() {
        if !on_machine("machine_code_where_there_is_some_for_the_gpu", &JETSON) {
            return;
        }
        let gpu = Gpu::open(0).unwrap();
        // Each adds another number, so that it is seen which one runs.
        let images = [80u8, 86, 89, 90].map(|sm| {
            let ptx = PTX.replace(
                "fma.rn.f32 %f3, %f2, %f0, %f1;",
                &format!("mov.f32 %f3, 0f{:08x};", f32::from(sm).to_bits()),
            );
            (sm, machine_code(sm, &ptx))
        });
        let cubins = |cuda: i32| {
            images.each_ref().map(|(sm, image)| {
                let sm = i32::from(*sm);
                Cubin { capability: (sm / 10, sm % 10), cuda: (cuda, 2), image }
            })
        };
        let known = cubins(13);
        let [kernel] = gpu.load_cubin("hand.cubin", &known, &["combine"]).unwrap().unwrap()[..] else {
            panic!()
        };
        let y = upload(&gpu, &[1.0; 64]);
        combine(&gpu, kernel, [y, y, y], 64, 1.0);
        assert_eq!(download(&gpu, y, 64), [86.0; 64]);
        // Of another generation; of a newer toolkit; what the driver refuses.
        let none = |cubins: &[Cubin]| gpu.load_cubin("hand.cubin", cubins, &["combine"]).unwrap().is_none();
        assert!(none(&[]) && none(&known[3..]) && none(&cubins(14)) && !none(&cubins(12)));
        let refused = machine_code(86, "\0 no PTX");
        assert!(none(&[Cubin { image: &refused, ..known[1] }]));
        // Then the PTX is taken.
        let [kernel, ..] = kernels(&gpu);
        combine(&gpu, kernel, [y, y, y], 64, 1.0);
        assert_eq!(download(&gpu, y, 64), [172.0; 64]);
        let message = gpu.load_cubin("hand.cubin", &known, &["absent"]).unwrap_err().message;
        assert!(message.starts_with("cannot find the kernel absent in hand.cubin: "), "{message}");
    }

    #[test]
    fn machine_code_of_the_kernels_is_refused_and_their_ptx_runs() {
        use bon_engine::backend::cuda::entries::{MODULES, PTXAS};
        let Some(ptxas) = PTXAS.filter(|_| crate::kernels::compiled()) else { return };
        let name = "machine_code_of_the_kernels_is_refused_and_their_ptx_runs";
        if !on_machine(name, &[("VCUDA_CAPABILITY", "9.0"), ("VCUDA_VERSION", "13.0")]) {
            return;
        }
        let module = MODULES.iter().find(|module| module.name == "rows").unwrap();
        let dir = tempfile::tempdir().unwrap();
        let (ptx, cubin) = (dir.path().join("rows.ptx"), dir.path().join("rows.cubin"));
        std::fs::write(&ptx, module.ptx.unwrap()).unwrap();
        let run = Command::new(ptxas).args(["-arch=sm_90", "-o"]).arg(&cubin).arg(&ptx).output().unwrap();
        assert!(run.status.success(), "{run:?}");
        let image = std::fs::read(&cubin).unwrap();
        assert_eq!(image[0x31], 90);
        let gpu = Gpu::open(0).unwrap();
        let cubins = [Cubin { capability: (9, 0), cuda: (13, 0), image: &image }];
        let names: Vec<&str> = module.entries.iter().map(|e| e.name()).collect();
        assert_eq!(gpu.load_cubin("rows.cubin", &cubins, &names), Ok(None));
        gpu.load("rows.ptx", module.ptx.unwrap(), &names).unwrap();
    }

    #[test]
    fn the_compilers_log() {
        let said = |value: &str| {
            let settings =
                [&JETSON[..], &[("BON_ENGINE_JIT_LOG", value), ("DEVICE_TEST_SCENE", "log")]].concat();
            let test = format!("{}::with_settings::what_has_a_log", here());
            let (passed, said) = under(&settings, &["--exact", &test]);
            assert_eq!(passed, 1);
            said
        };
        assert!(said("1").contains("hand.ptx: compiled with line numbers\n"), "{}", said("1"));
        assert!(!said("0").contains("hand.ptx"));
    }

    /// For [`the_compilers_log`]: nothing elsewhere.
    #[test]
    fn what_has_a_log() {
        let set = |name: &str| std::env::var_os(name);
        if set("DEVICE_TEST_SCENE").is_none_or(|scene| scene != "log") {
            return;
        }
        let gpu = Gpu::open(0).unwrap();
        kernels(&gpu);
        // Of machine code there is none to be had.
        let image = machine_code(86, PTX);
        let cubins = [Cubin { capability: (8, 6), cuda: (13, 0), image: &image }];
        let loaded = gpu.load_cubin("hand.cubin", &cubins, &["combine"]).unwrap();
        assert_eq!(loaded.is_none(), set("BON_ENGINE_JIT_LOG").is_some_and(|value| value == "1"));
    }

    /// They come again, but run step by step.
    fn four_sequences(gpu: &Gpu) {
        let [kernel, ..] = kernels(gpu);
        let y = upload(gpu, &[1.0; 64]);
        for _ in 0..4 {
            gpu.begin_sequence().unwrap();
            (0..5).for_each(|_| combine(gpu, kernel, [y, y, y], 64, 1.0));
            gpu.end_sequence().unwrap();
        }
        assert!(download(gpu, y, 64).iter().all(|y| *y == 2f32.powi(20)));
        let counts = gpu.counts();
        assert_eq!((counts.replayed, counts.refused, counts.single), (0, 1, 20));
    }
}

/// A program that finds its libraries in `dir` first.
fn with_libraries(program: &Path, dir: &Path) -> Command {
    let mut path = vec![dir.to_owned()];
    path.extend(std::env::var_os("LD_LIBRARY_PATH").iter().flat_map(std::env::split_paths));
    let mut command = Command::new(program);
    command.env("LD_LIBRARY_PATH", std::env::join_paths(path).unwrap());
    for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("VCUDA_")) {
        command.env_remove(name);
    }
    command
}

/// Runs tests of this program on the virtual driver with `settings`; returns how many, and standard error.
#[track_caller]
fn under(settings: &[(&str, &str)], arguments: &[&str]) -> (usize, String) {
    let dir = virtual_driver_folder();
    let mut command = with_libraries(&std::env::current_exe().unwrap(), dir.path());
    let run = command.args(arguments).envs(settings.iter().copied()).output().unwrap();
    let (out, err) = (String::from_utf8_lossy(&run.stdout), String::from_utf8_lossy(&run.stderr));
    assert!(run.status.success(), "{arguments:?} with {settings:?}:\n{out}{err}");
    assert!(!err.contains("skipped"), "{err}");
    let passed = out.split("test result: ok. ").nth(1).and_then(|rest| rest.split(' ').next()).unwrap();
    (passed.parse().unwrap(), err.into_owned())
}

/// The path of this module's tests.
fn here() -> &'static str {
    module_path!().split_once("::").unwrap().1
}

#[test]
fn the_driver_is_used_as_it_may_be() {
    let (passed, said) = under(&[], &[&format!("{}::on_gpu::", here())]);
    let source = std::fs::read_to_string(checkout().join("tests/suite/device.rs")).unwrap();
    let there = source.split("mod on_gpu {").nth(1).unwrap().split("\n}\n").next().unwrap();
    assert_eq!(passed, there.matches("#[test]").count());
    // What the tests do on purpose, and nothing about leaks.
    let unexpected: Vec<&str> =
        said.lines().filter(|line| line.starts_with("vcuda: ") && !line.contains("70000")).collect();
    assert!(unexpected.is_empty(), "{unexpected:?}");
}

#[test]
fn the_kernels_run_through_the_driver() {
    if !crate::kernels::compiled() {
        return;
    }
    let run = |settings: &[(&str, &str)], tests: &[&str]| {
        assert_eq!(under(settings, &[&["--exact"], tests].concat()).0, tests.len(), "{settings:?}");
    };
    let tests =
        ["kernels::rows::rows_move_where_they_belong", "engine::decode_steps_are_replayed_while_streams_end"];
    run(&[], &tests);
    // Copies in streams of their own, which come as late as they may.
    let tests = [
        "offload::updates_have_the_same_bits_wherever_the_state_lies",
        "offload::buffers_are_nobody_elses_while_they_are_used",
        "offload::a_step_on_a_gpu_has_the_same_bits_with_its_state_on_the_host",
        "offload::per_layer_embeddings_may_lie_on_the_host",
    ];
    run(&[], &tests);
    run(&[("VCUDA_STREAMS", "early")], &tests);
    // Kernels that begin before those ahead have ended.
    let tests =
        ["engine::a_step_on_a_gpu_is_the_cpus_within_bf16", "engine::decode_steps_are_replayed_on_a_gpu"];
    run(&[("VCUDA_CAPABILITY", "9.0")], &tests);
}

/// Whatever wait between the streams of copies and kernels is left out, the update is wrong, if copies come late or if they come
/// early. Only the first, of copies for what had the buffers' memory before, is for work that no test has under way.
#[test]
fn no_wait_between_streams_can_be_left_out() {
    if !crate::kernels::compiled() {
        return;
    }
    let dir = virtual_driver_folder();
    let passes = |forgotten: usize, streams: &str| {
        let mut command = with_libraries(&std::env::current_exe().unwrap(), dir.path());
        command.args(["--exact", "offload::a_small_update_on_a_gpu_is_streamed"]);
        command.env("VCUDA_STREAMS", streams).env("VCUDA_FORGOTTEN", forgotten.to_string());
        let run = command.output().unwrap();
        let said = String::from_utf8_lossy(&run.stderr).into_owned();
        assert!(!said.contains("skipped"), "{said}");
        run.status.success()
    };
    for streams in ["late", "early"] {
        assert!(passes(0, streams), "{streams}");
        assert!(passes(8, streams), "there are seven");
    }
    for forgotten in 2..=7 {
        assert!(!passes(forgotten, "late") || !passes(forgotten, "early"), "wait {forgotten}");
    }
}

#[test]
fn devices_tells_what_there_is() {
    let program = program();
    let tell = |dir: &Path, settings: &[(&str, &str)]| {
        let run =
            with_libraries(&program, dir).arg("devices").envs(settings.iter().copied()).output().unwrap();
        assert!(run.status.success());
        String::from_utf8(run.stdout).unwrap()
    };
    if !crate::kernels::compiled() {
        let empty = tempfile::tempdir().unwrap();
        assert!(tell(empty.path(), &[]).contains("\ncuda    none: this program was built without nvcc"));
        return;
    }
    let dir = virtual_driver_folder();
    let told = tell(dir.path(), &[("VCUDA_DEVICES", "2"), ("VCUDA_CAPABILITY", "9.0")]);
    let gpu = "vcuda (a virtual GPU on the CPU), 16.0 GiB, compute capability 9.0, driver of CUDA 12.4\n";
    assert!(told.contains(&format!("\ncuda:0  {gpu}cuda:1  {gpu}vm      ")), "{told}");
    assert!(
        tell(dir.path(), &[("VCUDA_CAPABILITY", "7.5")]).contains("CUDA 12.4; too old: the kernels need")
    );
    assert!(
        tell(dir.path(), &[("VCUDA_DEVICES", "0")]).contains("\ncuda    none: cannot start the CUDA driver")
    );
}

#[test]
fn a_gpu_is_used_where_there_is_one() {
    let f = Fixture::for_kernels();
    let sample =
        ["sample", "--model", "model", "--prompt", "1+1=", "--max-new-tokens", "2", "--dtype", "bf16"];
    let dir = virtual_driver_folder();
    let run = |settings: &[(&str, &str)]| {
        let mut command = with_libraries(&program(), dir.path());
        Ran::of(command.args(sample).current_dir(f.root()).envs(settings.iter().copied()))
    };
    let cpu = f.succeed(&[&sample[..], &["--device", "cpu"]].concat());
    // Where there is a driver and no GPU is used, a line says why, and the CPU computes.
    let mut machines = vec![
        (("VCUDA_DEVICES", "0"), "cannot start the CUDA driver: "),
        (("VCUDA_CAPABILITY", "7.5"), "none has compute capability 8.0"),
    ];
    if crate::kernels::compiled() {
        machines.push((("VCUDA_VERSION", "11.2"), ", and this driver knows CUDA 11.2; install a driver"));
        let used = run(&[]);
        assert!(used.code == Some(0) && !used.stderr.contains("on the CPU, not"), "{used:?}");
        let failed = run(&[("VCUDA_FAULT", "lm_head_sample_merge")]);
        assert!(
            failed.code == Some(1) && failed.stderr.contains("lm_head_sample_merge with grid"),
            "{failed:?}"
        );
    } else {
        machines = vec![(("VCUDA_DEVICES", "1"), "this program was built without nvcc")];
    }
    for (setting, why) in machines {
        let ran = run(&[setting]);
        assert_eq!((ran.code, &ran.stdout), (Some(0), &cpu.stdout), "{setting:?}: {ran:?}");
        let told = ran.stderr.split_once("note: computing on the CPU, not on a GPU: ").map(|(_, told)| told);
        assert!(told.is_some_and(|told| told.contains(why)), "{setting:?}: {ran:?}");
    }
}

#[test]
fn kernels_tells_what_the_driver_makes_of_them() {
    if !crate::kernels::compiled() {
        return;
    }
    let dir = virtual_driver_folder();
    let tell = |more: &[&str]| {
        let mut command = with_libraries(&program(), dir.path());
        let run = command
            .args(["kernels", "--device", "cuda"])
            .args(more)
            .env("VCUDA_CAPABILITY", "9.0")
            .output()
            .unwrap();
        assert!(run.status.success(), "{run:?}");
        String::from_utf8(run.stdout).unwrap()
    };
    let gather = ["--op", "gather_rows", "--shape", "270m"];
    let text = tell(&gather);
    assert!(text.starts_with("cuda:0 (vcuda (a virtual GPU on the CPU)), 132 multiprocessors\n"), "{text}");
    let json: serde_json::Value = serde_json::from_str(&tell(&[&gather[..], &["--json"]].concat())).unwrap();
    let code = &json["resources"][0]["code"];
    assert_eq!((&json["resources"][0]["kernel"], code), (&"gather_rows".into(), &serde_json::json!([9, 0])));
    let launch = &json["launches"][0];
    let (grid, block) = (launch["grid"][0].as_u64().unwrap(), launch["block"][0].as_u64().unwrap());
    // The launch asks for no shared memory: threads or blocks are what a multiprocessor has no more of.
    let at_once = (2048 / block).min(32);
    assert_eq!(launch["blocks_per_multiprocessor"], at_once);
    let line = format!(
        "  gather_rows: {grid} blocks of {block} with 0 bytes of dynamic shared memory, {at_once} to a \
         multiprocessor: {:.2} waves\n",
        grid as f64 / (132 * at_once) as f64
    );
    assert!(text.ends_with(&line), "{text}");
    // Every kernel, and nothing is run.
    let all: serde_json::Value = serde_json::from_str(&tell(&["--json", "--resources"])).unwrap();
    let entries: usize = bon_engine::backend::cuda::entries::MODULES.iter().map(|m| m.entries.len()).sum();
    assert_eq!(all["resources"].as_array().unwrap().len(), entries);
    assert_eq!(all["launches"].as_array().unwrap().len(), 0);
}

#[test]
fn without_a_driver_the_next_step_is_told() {
    match Gpu::open(0) {
        Ok(gpu) => {
            assert!(gpu.name().starts_with("cuda:0 ("), "{}", gpu.name());
            assert_eq!(gpu.model(), gpu.name().replacen("cuda:0", "cuda", 1));
        }
        Err(e) => assert!(e.message.contains("--device cpu"), "{e}"),
    }
}

// --------------------------------------------------------------------------------------------------- what is built in

#[test]
fn machine_code_is_chosen_by_generation() {
    let cubins =
        [(8, 0), (8, 6), (9, 0), (10, 0)].map(|capability| Cubin { capability, cuda: (13, 2), image: &[] });
    let chosen = |capability, driver| Cubin::fitting(&cubins, capability, driver).map(|c| c.capability);
    for (capability, want) in [
        ((8, 0), Some((8, 0))),
        ((8, 6), Some((8, 6))),
        ((8, 9), Some((8, 6))),
        ((9, 0), Some((9, 0))),
        ((10, 3), Some((10, 0))),
        ((7, 5), None),
        ((12, 0), None),
    ] {
        assert_eq!(chosen(capability, (13, 0)), want, "{capability:?}");
        assert_eq!(chosen(capability, (12, 9)), None, "{capability:?}");
        assert_eq!(chosen(capability, (14, 1)), want, "{capability:?}");
    }
}

/// A virtual GPU that says it has machine code of all modules but some.
struct Ready(Vm, &'static [&'static str]);

impl Device for Ready {
    fn name(&self) -> String {
        self.0.name()
    }

    fn multiprocessors(&self) -> u32 {
        self.0.multiprocessors()
    }

    fn load(&self, name: &str, ptx: &str, entries: &[&str]) -> Result<Vec<Kernel>, DeviceError> {
        assert!(self.1.contains(&name), "{name} is compiled");
        self.0.load(name, ptx, entries)
    }

    fn load_cubin(
        &self,
        name: &str,
        _: &[Cubin],
        entries: &[&str],
    ) -> Result<Option<Vec<Kernel>>, DeviceError> {
        let ptx = name.replace(".cubin", ".ptx");
        let module = MODULES.iter().find(|module| name == format!("{}.cubin", module.name)).unwrap();
        (!self.1.contains(&&*ptx)).then(|| self.0.load(&ptx, module.ptx.unwrap(), entries)).transpose()
    }

    fn alloc(&self, bytes: usize) -> Result<Ptr, DeviceError> {
        self.0.alloc(bytes)
    }

    fn free(&self, ptr: Ptr) {
        self.0.free(ptr);
    }

    fn write(&self, dst: Ptr, bytes: &[u8]) -> Result<(), DeviceError> {
        self.0.write(dst, bytes)
    }

    fn read(&self, src: Ptr, bytes: &mut [u8]) -> Result<(), DeviceError> {
        self.0.read(src, bytes)
    }

    fn fill(&self, dst: Ptr, value: u8, bytes: usize) -> Result<(), DeviceError> {
        self.0.fill(dst, value, bytes)
    }

    fn launch(&self, kernel: Kernel, launch: &Launch, args: &[Arg]) -> Result<(), DeviceError> {
        self.0.launch(kernel, launch, args)
    }

    fn synchronize(&self) -> Result<(), DeviceError> {
        self.0.synchronize()
    }
}

#[test]
fn only_what_has_no_machine_code_is_compiled() {
    if !crate::kernels::compiled() {
        return;
    }
    for missing in [&[][..], &["geglu.ptx", "rows.ptx"]] {
        let mut told = 0;
        let ready = Ready(Vm::new(Options::default()), missing);
        let cuda = Cuda::loading(Box::new(ready), || told += 1).unwrap();
        assert_eq!(told, usize::from(!missing.is_empty()));
        // Every kernel has its place, whatever it was loaded from.
        let x: Vec<f32> = (0..64).map(|i| i as f32).collect();
        let x = cuda.upload(DType::F32, 8, 8, bytemuck::cast_slice(&x));
        assert_eq!(cuda.sum_squares(&[&x]), [(0..64).map(|i| f64::from(i * i)).sum::<f64>()]);
    }
}

#[test]
fn older_drivers_take_the_kernels() {
    use bon_engine::backend::cuda::entries::{MODULES, PTX_VERSION};
    use bon_engine::cost::figures::ptxas;
    if !crate::kernels::compiled() {
        return;
    }
    let mut refused = String::new();
    let dir = tempfile::tempdir().unwrap();
    for module in MODULES {
        let ptx = module.ptx.unwrap();
        let version = ptx.lines().find_map(|line| line.strip_prefix(".version ")).unwrap();
        let (major, minor) = version.split_once('.').unwrap();
        let version = (major.parse::<u32>().unwrap(), minor.parse::<u32>().unwrap());
        assert!(version <= PTX_VERSION, "{}.ptx is of version {version:?}", module.name);
        // No optimisation: only whether it may be of this version is asked.
        let Some(ptxas) = ptxas() else { continue };
        let path = dir.path().join(format!("{}.ptx", module.name));
        std::fs::write(&path, ptx).unwrap();
        let out = dir.path().join("out");
        let run = Command::new(ptxas).args(["-O0", "-arch=sm_80", "-o"]).arg(out).arg(path).output().unwrap();
        if !run.status.success() {
            write!(refused, "{}: {}", module.name, String::from_utf8_lossy(&run.stderr)).unwrap();
        }
    }
    assert!(refused.is_empty(), "{refused}");
}
