//! Programs, and wrong twins of them with the finding that is expected.

use std::fs;

use crate::toolchain::{Ran, build, runtime, start};
use vcudart::properties::{Properties12, Properties13};

/// A program that is right: it ends well, and nothing is found.
#[track_caller]
fn right(name: &str, options: &[&str], out: &str) {
    let ran = start(&build(name, options), &[]);
    let found = ran.err.contains("the program is wrong") || ran.err.contains("not supported");
    assert!(ran.code == Some(0) && !found && ran.out == out, "{name}: {ran:#?}");
}

/// Its twin with a bug: standard error holds all of `told`.
#[track_caller]
fn wrong(name: &str, code: Option<i32>, told: &[&str]) -> Ran {
    let ran = start(&build(name, &["-DBUG"]), &[]);
    assert_eq!(ran.code, code, "{name}: {ran:#?}");
    for told in told {
        assert!(ran.err.contains(told), "{name}: no {told:?} in {ran:#?}");
    }
    ran
}

#[test]
fn vectors_are_added() {
    right("vector_add", &[], "1000 sums are right\n");
    let ran = wrong(
        "vector_add",
        Some(1),
        &[
            "launch of add(float const*, float const*, float*, int): the program is wrong:",
            "OutOfBounds: 4 bytes at ",
            "0 bytes behind the end of `allocation 3 of 4000 bytes`",
            "vector_add.cu:8)",
            "block (3,0,0) warp 7 lanes 8-31",
        ],
    );
    assert_eq!(ran.out, "failed: cudaErrorIllegalAddress\n");
    // Without the checks the overrun is found nevertheless, since bounds are always checked.
    let ran = start(&build("vector_add", &["-DBUG"]), &[("VCUDA_CHECKS", "0")]);
    assert!(ran.err.contains("OutOfBounds"), "{ran:#?}");
}

#[test]
fn templates_share_memory() {
    right("reduction", &[], "sums of int and double are right\n");
    wrong(
        "reduction",
        Some(1),
        &[
            "SharedRace: ",
            "in void sums<int>(int const*, int*), block (0,0,0)",
            "reduction.cu:9, inlined at ",
            "reduction.cu:20)",
        ],
    );
}

#[test]
fn host_and_device_share_managed_memory() {
    right("managed", &[], "counter 46\n");
    wrong("managed", Some(1), &["UseAfterFree: ", "`managed allocation 1 of 400 bytes`", "which was freed"]);
}

/// A device that has what the program needs.
const HOPPER: [(&str, &str); 1] = [("VCUDA_CAPABILITY", "9.0")];

#[test]
fn blocks_of_a_cluster_share_memory() {
    let build = |options: &[&str]| build("clusters", &[&["-arch=compute_90"], options].concat());
    let ran = start(&build(&[]), &HOPPER);
    assert!(
        ran.code == Some(0) && ran.out == "all counted\n" && ran.err.matches('\n').count() == 4,
        "{ran:#?}"
    );
    assert!(ran.err.contains("clusters of [16, 1, 1] blocks; the most is 8"), "{ran:#?}");
    let ran = start(&build(&["-DBUG"]), &HOPPER);
    assert_eq!(ran.code, Some(1), "{ran:#?}");
    for told in ["Cluster: the shared memory of block 1 of the cluster", "clusters.cu:2"] {
        assert!(ran.err.contains(told), "no {told:?} in {ran:#?}");
    }
    // A device of before sm_90 has none.
    let ran = start(&build(&[]), &[]);
    assert!(ran.code == Some(1) && ran.out == "no clusters\n", "{ran:#?}");
}

#[test]
fn boxes_of_tensors_are_copied() {
    let build = |options: &[&str]| build("tensors", &[&["-arch=compute_90"], options].concat());
    let ran = start(&build(&[]), &HOPPER);
    assert!(ran.code == Some(0) && ran.out == "transposed\n", "{ran:#?}");
    assert!(ran.err.starts_with("vcuda: cuTensorMapEncodeTiled: no tensor map: "), "{ran:#?}");
    let ran = start(&build(&["-DBUG"]), &HOPPER);
    assert!(ran.code == Some(1) && ran.err.contains("AsyncRace: "), "{ran:#?}");
}

#[test]
fn streams_are_ordered() {
    right("streams", &[], "all in order\n");
    // The copy is as late as it may be, so what the buffer holds by then arrives.
    let ran = wrong("streams", Some(1), &[]);
    assert_eq!(ran.out, "x[0] = 4002\n");
}

/// Work that nobody waits for by a call runs after a while, unless that is not wanted.
#[test]
fn programs_may_wait_in_their_own_ways() {
    right("waiting", &[], "called 1 times, 42 in managed memory\n");
    let ran = start(&build("waiting", &[]), &[("VCUDA_PATIENCE", "0")]);
    assert_eq!((ran.code, ran.out.as_str()), (Some(1), "nothing came\n"));
    assert!(ran.err.contains("the program ends while work waits to run"), "{ran:#?}");
}

#[test]
fn symbols_are_found() {
    right("symbols", &[], "32 bytes of weights\n");
}

#[test]
fn grids_wait_for_each_other() {
    right("cooperative", &[], "the grid has waited\n");
    wrong("cooperative", Some(1), &["GlobalRace: ", "`allocation 2 of 1024 bytes`", "cooperative.cu:13)"]);
}

#[test]
fn kernels_print_and_assert() {
    let printed = "before\nthread 0 of the device: 0.75\nthread 1 of the device: 0.75\nthread 2 of the device: 0.75\nafter: ";
    right("printing", &[], &format!("{printed}cudaSuccess\n"));
    let ran = wrong(
        "printing",
        Some(1),
        &["the assertion `threadIdx.x < 2` failed", "in say(int), block (0,0,0) warp 0 lane 2"],
    );
    assert_eq!(ran.out, format!("{printed}cudaErrorAssert\n"));
}

#[test]
fn rectangles_are_copied() {
    right("rectangles", &[], "pitch 512\n");
}

#[test]
fn errors_are_the_runtimes() {
    right("errors", &[], "all as expected: grid, block or shared memory is not allowed\n");
}

/// The driver's functions, in a program that uses both.
#[test]
fn the_driver_is_there_too() {
    let folder = format!("-L{}", runtime().display());
    right("driver", &[&folder, "-l:libcuda.so.1"], "driver and runtime agree\n");
}

/// Every way in which nvcc packs PTX.
#[test]
fn fat_binaries_are_read() {
    for packed in ["none", "size", "speed"] {
        right("vector_add", &[&format!("--compress-mode={packed}")], "1000 sums are right\n");
    }
    right("vector_add", &["-Xfatbin", "-compress-all"], "1000 sums are right\n");
    right("vector_add", &["-arch=compute_75"], "1000 sums are right\n");
}

/// What cannot run says why, and what to do.
#[test]
fn what_cannot_run_is_told() {
    let told = |options: &[&str], settings: &[(&str, &str)], sentence: &str| {
        let ran = start(&build("vector_add", options), settings);
        assert!(ran.code == Some(1) && ran.err.contains(sentence), "{options:?}: {ran:#?}");
        assert_eq!(ran.out, "failed: cudaErrorNoKernelImageForDevice\n");
    };
    let code = "-gencode=arch=compute_80,code=sm_80";
    told(
        &[code],
        &[],
        "the program holds machine code alone (for sm_80), and a virtual GPU runs PTX: build with -arch=compute_80",
    );
    told(
        &["-arch=compute_90"],
        &[],
        "the program's PTX is for sm_90, newer than the virtual GPU: set VCUDA_CAPABILITY=9.0",
    );
    // As it says.
    let ran = start(&build("vector_add", &["-arch=compute_90"]), &[("VCUDA_CAPABILITY", "9.0")]);
    assert_eq!((ran.code, ran.out.as_str()), (Some(0), "1000 sums are right\n"), "{}", ran.err);
    // NVIDIA's runtime within the program.
    let ran = start(&build("vector_add", &["-cudart=static"]), &[]);
    assert!(ran.code != Some(0), "{ran:#?}");
    assert!(ran.err.contains("build it with nvcc -cudart shared"), "{ran:#?}");
}

/// The structure that programs of CUDA 13 have, field by field, and what is in it.
#[test]
fn properties_lie_where_the_header_says() {
    let fields = Properties13::fields();
    let list = fields.iter().map(|(name, ..)| format!("FIELD({name})\n")).collect::<String>();
    let file = std::path::Path::new(env!("CARGO_TARGET_TMPDIR")).join("fields.h");
    fs::write(&file, list).unwrap();
    let ran = start(
        &build("layout", &[&format!("-DFIELDS=\"{}\"", file.display())]),
        &[("VCUDA_CAPABILITY", "9.0")],
    );
    assert_eq!(ran.code, Some(0), "{ran:#?}");
    let want = fields.iter().map(|(name, at, bytes)| format!("{name} {at} {bytes}\n")).collect::<String>();
    let size = size_of::<Properties13>();
    let rest = "9.0, 132 multiprocessors, 232448 bytes, 64 threads, warps of 32, CUDA 13\n";
    assert_eq!(ran.out, format!("{want}size {size}\n{rest}"));
}

/// Places in the structure of CUDA 12.4's header, as a C++ compiler tells them.
#[test]
fn properties_of_cuda_12_lie_where_its_header_says() {
    let fields = Properties12::fields();
    for (name, at, bytes) in [
        ("clockRate", 348, 4),
        ("major", 360, 4),
        ("maxTexture1DLinear", 416, 4),
        ("multiProcessorCount", 388, 4),
        ("memoryClockRate", 608, 4),
        ("managedMemory", 652, 4),
        ("sharedMemPerBlockOptin", 696, 8),
        ("clusterLaunch", 772, 4),
        ("reserved", 792, 240),
    ] {
        assert!(fields.contains(&(name, at, bytes)), "{name}");
    }
    assert_eq!(size_of::<Properties12>(), 1032);
}
