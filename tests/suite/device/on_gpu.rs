//! What runs on a GPU, real or virtual.

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
        got[100..150].iter().all(|b| *b == 0xab) && got[..100] == want[..100] && got[150..] == want[150..]
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
    let launch =
        |bytes: usize| gpu.launch(reverse, &Launch::linear(1, 128).shared(bytes), &[y.into(), bytes.into()]);
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
    let message = gpu.load("mine.ptx", &PTX.replace("fma.rn", "fma.qq"), &["combine"]).unwrap_err().message;
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
