//! The race checks: each planted race is found, and correct programs are silent.

use ptxvm::error::ErrorKind;
use ptxvm::{Checks, Options};

use crate::support::ptx::Kernel;

/// Addresses of the thread's own word and of that of thread `(tid + 32) % 64`, in shared memory.
const SHARED: &str = "mov.u32 %r3, s;\nmad.lo.u32 %r4, %r1, 4, %r3;\nadd.u32 %r5, %r1, 32;\nand.b32 %r5, %r5, 63;\n\
    mad.lo.u32 %r5, %r5, 4, %r3;\nxor.b32 %r6, %r1, 1;\nmad.lo.u32 %r6, %r6, 4, %r3;\n";

fn shared(body: &str) -> Kernel {
    Kernel::new(&format!("{SHARED}{body}"))
}

#[test]
fn shared_memory_between_warps() {
    for body in [
        "st.shared.u32 [%r4], %r1;\nld.shared.u32 %r7, [%r5];",
        "st.shared.u32 [%r4], %r1;\nbar.warp.sync 0xffffffff;\nld.shared.u32 %r7, [%r5];",
        "st.shared.u32 [%r4], %r1;\nst.shared.u32 [%r5], %r1;",
        "st.shared.u32 [%r4], %r1;\nbar.sync 0;\nld.shared.u32 %r7, [%r5];\nst.shared.u32 [%r4], %r1;",
        "st.shared.u32 [%r3], %r1;",
        "st.shared.u8 [%r4+1], %r1;\nld.shared.u32 %r7, [%r5];",
        "st.shared.u32 [%r4], %r1;\nld.shared.v4.u32 {%r7, %r8, %r9, %r10}, [%r3];",
        // The own atomic behind the plain store does not hide it.
        "setp.lt.u32 %p1, %r1, 1;\n@%p1 st.shared.u32 [%r3], 0;\n@%p1 red.shared.add.u32 [%r3], 1;\nsetp.eq.u32 %p1, %r1, 32;\n@%p1 red.shared.add.u32 [%r3], 1;",
    ] {
        let found = shared(body).wrong(1, 64, &[], ErrorKind::SharedRace);
        assert!(found.other.is_some() && found.message.contains("shared memory at 0x"), "{found}");
    }
    for body in [
        "st.shared.u32 [%r4], %r1;\nbar.sync 0;\nld.shared.u32 %r7, [%r5];\nbar.sync 0;\nst.shared.u32 [%r4], %r1;",
        "st.shared.u32 [%r4], %r1;\nld.shared.u32 %r7, [%r4];\nst.shared.u32 [%r4], %r7;",
        "st.shared.u32 [%r4], %r1;\nbar.sync 3, 64;\nld.shared.u32 %r7, [%r5];",
        "add.u32 %r7, %r3, %r1;\nst.shared.u8 [%r7], %r1;",
        "ld.shared.u32 %r7, [%r3];\nld.shared.u32 %r7, [%r4];",
        "setp.lt.u32 %p1, %r1, 1;\n@%p1 st.shared.u32 [%r3], 0;\nbar.sync 0;\nred.shared.add.u32 [%r3], 1;",
    ] {
        shared(body).ok(3, 64, &[]);
    }
    // The two parties are named.
    let found = shared("st.shared.u32 [%r4], %r1;\nld.shared.u32 %r7, [%r5];").wrong(
        1,
        64,
        &[],
        ErrorKind::SharedRace,
    );
    let texts = [&found.at.text, &found.other.as_ref().unwrap().text];
    for start in ["ld.shared", "st.shared"] {
        assert!(texts.iter().any(|text| text.starts_with(start)), "{found}");
    }
    assert!(found.message.contains("of warp 0") && found.message.contains("of warp 1"), "{found}");
}

/// An instruction in the first thread of one warp alone.
fn in_warp(warp: u32, body: &str) -> String {
    format!("setp.eq.u32 %p1, %r1, {};\n@%p1 {body}\n", 32 * warp)
}

#[test]
fn the_same_value_in_the_same_place_is_no_race() {
    let all = "st.shared.u32 [%r3], 7;\n";
    let wide = "st.shared.v2.u32 [%r3], {7, 8};\n";
    let reads = "ld.shared.u32 %r7, [%r3];\n";
    let silent = [
        all.to_owned(),
        format!("{}{wide}", in_warp(0, all)),
        // Whoever wrote it reads it, in whatever order.
        format!("{}{}{}{}", in_warp(0, all), in_warp(2, all), in_warp(0, reads), in_warp(2, reads)),
        format!(
            "{}{}{}",
            in_warp(0, wide),
            in_warp(1, all),
            in_warp(0, "ld.shared.v2.u32 {%r7, %r8}, [%r3];")
        ),
        format!("{all}bar.sync 0;\n{reads}bar.sync 0;\nst.shared.u32 [%r4], %r1;"),
        // The barrier orders the others' stores, too.
        format!(
            "{}{}bar.sync 0;\n{}",
            in_warp(0, all),
            in_warp(1, all),
            in_warp(2, "st.shared.u32 [%r3], 9;")
        ),
    ];
    for body in &silent {
        shared(body).ok(1, 96, &[]);
    }
    let wrong = [
        // Who did not write it must wait.
        format!("{}{}{}", in_warp(0, all), in_warp(1, all), in_warp(2, reads)),
        format!("{}{}{}", in_warp(0, all), in_warp(1, all), in_warp(2, "st.shared.u32 [%r3], 9;")),
        format!("{}{}{}", in_warp(0, all), in_warp(1, all), in_warp(0, "st.shared.u32 [%r3], 9;")),
        // A part of it is another value.
        format!("{}{}", in_warp(0, wide), in_warp(1, "st.shared.v2.u32 [%r3], {7, 9};")),
        format!("{}{}", in_warp(0, all), in_warp(1, "st.shared.u16 [%r3], 8;")),
        // It is the value, but another one was there in between.
        format!("{}{}{}", in_warp(0, all), in_warp(0, "st.shared.u32 [%r3], 8;"), in_warp(1, all)),
        // Somebody has read it, who might as well have read what comes.
        format!("{all}bar.sync 0;\n{}{}", in_warp(0, reads), in_warp(1, all)),
    ];
    for body in &wrong {
        shared(body).wrong(1, 96, &[], ErrorKind::SharedRace);
    }
    // By the letter all of them are races.
    let strict = || Options { checks: Checks::STRICT, ..Options::default() };
    for body in silent.iter().chain(&wrong) {
        Kernel::with(&format!("{SHARED}{body}"), strict()).wrong(1, 96, &[], ErrorKind::SharedRace);
    }
}

#[test]
fn a_barrier_is_after_those_who_left() {
    let body = |barrier: &str| {
        let leaves = "setp.gt.u32 %p2, %r9, 0;\n@%p2 bra STAYS;\nst.shared.u32 [%r4], %r1;\nret;\nSTAYS:\n";
        format!("shr.u32 %r9, %r1, 5;\n{leaves}{barrier}\nsub.u32 %r7, %r4, 128;\nld.shared.u32 %r7, [%r7];")
    };
    shared(&body("bar.sync 0;")).ok(1, 64, &[]);
    // A count of threads waits for those who arrive, not for those who leave.
    shared(&body("bar.sync 0, 32;")).wrong(1, 64, &[], ErrorKind::SharedRace);
    shared(&body("")).wrong(1, 64, &[], ErrorKind::SharedRace);
}

#[test]
fn shared_memory_within_a_warp() {
    for body in [
        "st.shared.u32 [%r4], %r1;\nld.shared.u32 %r7, [%r6];",
        "ld.shared.u32 %r7, [%r6];\nst.shared.u32 [%r4], %r1;",
        "st.shared.u32 [%r3], %r1;",
        "ld.shared.u32 %r7, [%r3];\nst.shared.u32 [%r3], 1;",
    ] {
        shared(body).wrong(1, 32, &[], ErrorKind::SharedRace);
    }
    for body in [
        "st.shared.u32 [%r4], %r1;\nbar.warp.sync 0xffffffff;\nld.shared.u32 %r7, [%r6];",
        "st.shared.u32 [%r4], %r1;\nbar.sync 0;\nld.shared.u32 %r7, [%r6];",
        "st.shared.u32 [%r3], 7;",
        "st.volatile.shared.u32 [%r4], %r1;\nld.volatile.shared.u32 %r7, [%r6];",
    ] {
        shared(body).ok(2, 32, &[]);
    }
}

#[test]
fn atomics_in_shared_memory() {
    let init = "mov.u32 %r7, 0;\nst.shared.u32 [%r4], %r7;\nbar.sync 0;\n";
    let ok = ["red.shared.add.u32 [%r3], 1;\nbar.sync 0;\nld.shared.u32 %r8, [%r3];"];
    let wrong = [
        "red.shared.add.u32 [%r3], 1;\nld.shared.u32 %r8, [%r3];",
        "red.shared.add.u32 [%r3], 1;\nst.shared.u32 [%r4], %r1;",
    ];
    for body in ok {
        shared(&format!("{init}{body}")).ok(2, 64, &[]);
    }
    for body in wrong {
        shared(&format!("{init}{body}")).wrong(1, 64, &[], ErrorKind::SharedRace);
    }
    // A loop around a compare-and-swap begins with a plain read.
    let cas = "LOOP:\nld.shared.u32 %r8, [%r3];\nadd.u32 %r9, %r8, 1;\natom.shared.cas.b32 %r10, [%r3], %r8, %r9;\n\
        setp.ne.u32 %p1, %r10, %r8;\n@%p1 bra LOOP;";
    shared(&format!("{init}{cas}")).ok(1, 64, &[]);
}

/// Warp 0 writes data and a flag, warp 1 waits for the flag and reads the data.
fn flag(publish: &str, wait: &str) -> Kernel {
    shared(&format!(
        "setp.eq.u32 %p4, %r1, 0;\n@%p4 st.shared.u32 [%r3+1024], 0;\nbar.sync 0;\nsetp.ge.u32 %p1, %r1, 32;\n@%p1 bra WAIT;\n\
         st.shared.u32 [%r4], %r1;\nbar.warp.sync 0xffffffff;\nsetp.ne.u32 %p2, %r1, 0;\n@%p2 bra END;\n{publish}\nbra END;\n\
         WAIT:\n{wait}\nsetp.eq.u32 %p3, %r8, 0;\n@%p3 bra WAIT;\nbar.warp.sync 0xffffffff;\nld.shared.u32 %r7, [%r5];\nEND:"
    ))
}

#[test]
fn flags_in_shared_memory_order_what_they_guard() {
    let acquire = "ld.acquire.cta.shared.u32 %r8, [%r3+1024];";
    let relaxed = "ld.relaxed.cta.shared.u32 %r8, [%r3+1024];";
    let fenced = "ld.volatile.shared.u32 %r8, [%r3+1024];\nmembar.cta;";
    flag("st.release.cta.shared.u32 [%r3+1024], 1;", acquire).ok(1, 64, &[]);
    flag("membar.cta;\nst.volatile.shared.u32 [%r3+1024], 1;", fenced).ok(1, 64, &[]);
    flag("atom.shared.release.cta.exch.b32 %r9, [%r3+1024], 1;", acquire).ok(1, 64, &[]);
    flag("st.relaxed.cta.shared.u32 [%r3+1024], 1;", acquire).wrong(1, 64, &[], ErrorKind::SharedRace);
    flag("st.volatile.shared.u32 [%r3+1024], 1;", relaxed).wrong(1, 64, &[], ErrorKind::SharedRace);
    flag("st.release.cta.shared.u32 [%r3+1024], 1;", "ld.shared.u32 %r8, [%r3+1024];").wrong(
        1,
        64,
        &[],
        ErrorKind::SharedRace,
    );
}

/// Races between blocks are found whatever the order and the number of host threads.
fn blocks(body: &str, threads: usize) -> Kernel {
    Kernel::with(body, Options { threads, ..Options::default() })
}

#[test]
fn global_memory_between_blocks() {
    let own = "mad.wide.u32 %rd4, %r2, 4, %rd1;\n";
    for threads in [1, 3] {
        for body in [
            "st.global.u32 [%rd1], %r2;".to_owned(),
            format!("{own}st.global.u32 [%rd4], 1;\nld.global.u32 %r4, [%rd1];"),
            format!("{own}st.global.u32 [%rd4], 1;\nld.global.v4.u32 {{%r4, %r5, %r6, %r7}}, [%rd1];"),
            "red.global.add.u32 [%rd1], 1;\nld.global.u32 %r4, [%rd1];".to_owned(),
            "red.global.cta.add.u32 [%rd1], 1;".to_owned(),
            "cvt.u64.u32 %rd4, %r2;\nadd.u64 %rd4, %rd4, %rd1;\nst.global.u8 [%rd4], 1;\nld.global.u8 %r4, [%rd4+1];".to_owned(),
        ] {
            let mut k = blocks(&body, threads);
            let a = k.words("a", &[0; 64]);
            let found = k.wrong(8, 1, &[a.0], ErrorKind::GlobalRace);
            assert!(found.message.contains("`a` + ") && found.message.contains("block "), "{found}");
        }
        for body in [
            format!("{own}st.global.u32 [%rd4], %r2;\nld.global.u32 %r4, [%rd4];"),
            "cvt.u64.u32 %rd4, %r2;\nadd.u64 %rd4, %rd4, %rd1;\nst.global.u8 [%rd4], 1;\nld.global.u8 %r4, [%rd4];".to_owned(),
            "mad.wide.u32 %rd4, %r2, 2, %rd1;\nst.global.u16 [%rd4], 1;".to_owned(),
            "ld.global.u32 %r4, [%rd1];\nld.global.v4.u32 {%r4, %r5, %r6, %r7}, [%rd1];".to_owned(),
            "red.global.add.u32 [%rd1], 1;\nred.global.max.u32 [%rd1], %r2;".to_owned(),
            "atom.global.add.u32 %r4, [%rd1], 1;\nld.volatile.global.u32 %r5, [%rd1];".to_owned(),
        ] {
            let mut k = blocks(&body, threads);
            let a = k.words("a", &[0; 64]);
            k.ok(8, 1, &[a.0]);
            k.ok(8, 1, &[a.0]);
        }
    }
    // One block never races with itself across launches, and without the check nobody does.
    let mut k = Kernel::new("st.global.u32 [%rd1], 1;");
    let a = k.words("a", &[0]);
    k.ok(1, 1, &[a.0]);
    k.ok(1, 1, &[a.0]);
    let checks = Checks { race: false, ..Checks::ALL };
    let mut k = Kernel::with("st.global.u32 [%rd1], 1;", Options { checks, ..Options::default() });
    let a = k.words("a", &[0]);
    k.ok(8, 1, &[a.0]);
}

/// Each block writes a word, then counts itself; the last one adds all words up.
fn last_block(fence: &str) -> Kernel {
    Kernel::new(&format!(
        "mad.wide.u32 %rd4, %r2, 4, %rd2;\nst.global.u32 [%rd4], %r2;\n{fence}\nmov.u32 %r9, %nctaid.x;\n\
         sub.u32 %r8, %r9, 1;\natom.global.inc.u32 %r4, [%rd1], %r8;\nsetp.ne.u32 %p1, %r4, %r8;\n@%p1 bra DONE;\n\
         mov.u32 %r5, 0;\nmov.u32 %r6, 0;\nSUM:\nmad.wide.u32 %rd4, %r5, 4, %rd2;\nld.global.u32 %r7, [%rd4];\n\
         add.u32 %r6, %r6, %r7;\nadd.u32 %r5, %r5, 1;\nsetp.lt.u32 %p2, %r5, %r9;\n@%p2 bra SUM;\n\
         st.global.u32 [%rd3], %r6;\nDONE:"
    ))
}

#[test]
fn the_last_block_needs_a_fence() {
    let mut k = last_block("membar.gl;");
    let (a, b, c) = (k.words("count", &[0]), k.words("parts", &[0; 50]), k.words("sum", &[0]));
    for _ in 0..2 {
        k.ok(50, 1, &[a.0, b.0, c.0]);
        assert_eq!(k.read_words(c, 1), [49 * 50 / 2]);
    }
    // The last is of shared memory alone.
    for fence in ["", "membar.cta;", "fence.release.sync_restrict::shared::cta.cluster;"] {
        let mut k = last_block(fence);
        let (a, b, c) = (k.words("count", &[0]), k.words("parts", &[0; 50]), k.words("sum", &[0]));
        let found = k.wrong(50, 1, &[a.0, b.0, c.0], ErrorKind::GlobalRace);
        assert!(found.message.contains("`parts`"), "{found}");
    }
}

#[test]
fn blocks_that_wait_for_each_other() {
    // Decoupled look-back: block i waits for the flag of block i - 1, adds, and raises its own.
    for (release, fires) in [("st.release.gpu.global.u32", false), ("st.relaxed.gpu.global.u32", true)] {
        let mut k = Kernel::new(&format!(
            "mad.wide.u32 %rd4, %r2, 4, %rd1;\nmad.wide.u32 %rd5, %r2, 4, %rd2;\nmov.u32 %r6, 0;\n\
             setp.eq.u32 %p1, %r2, 0;\n@%p1 bra FIRST;\nWAIT:\nld.acquire.gpu.global.u32 %r5, [%rd4+-4];\n\
             setp.eq.u32 %p2, %r5, 0;\n@%p2 bra WAIT;\nld.global.u32 %r6, [%rd5+-4];\nFIRST:\nadd.u32 %r6, %r6, %r2;\n\
             st.global.u32 [%rd5], %r6;\n{release} [%rd4], 1;"
        ));
        let (a, b) = (k.words("flags", &[0; 20]), k.words("sums", &[0; 20]));
        if fires {
            k.wrong(20, 1, &[a.0, b.0], ErrorKind::GlobalRace);
        } else {
            k.ok(20, 1, &[a.0, b.0]);
            let want: Vec<u32> = (0..20).map(|i| i * (i + 1) / 2).collect();
            assert_eq!(k.read_words(b, 20), want);
        }
    }
}

/// The tree of old code, whose last steps a warp does alone: `volatile` and no `__syncwarp`. It is no race, and a note says what it
/// relies on.
#[test]
fn lanes_that_rely_on_running_in_step() {
    let tree = |between: &str, how: &str| {
        format!(
            "st.shared.u32 [%r4], 1;\nbar.sync 0;\nmov.u32 %r8, 1;\nmov.u32 %r7, 0;\nsetp.lt.u32 %p1, %r1, 16;\n\
             @%p1 ld{how}.shared.u32 %r7, [%r4+64];\n{between}@%p1 st{how}.shared.u32 [%r4], %r7;\n{between}\
             setp.lt.u32 %p1, %r1, 8;\n@%p1 ld{how}.shared.u32 %r8, [%r4+32];\n{between}@%p1 st{how}.shared.u32 [%r4], %r8;"
        )
    };
    let report = shared(&tree("", ".volatile")).ok(1, 64, &[]);
    let [note] = report.notes.as_slice() else { panic!("{:?}", report.notes) };
    assert!(note.kind == ErrorKind::InStep && note.message.contains("no __syncwarp"), "{note}");
    assert!(note.at.text.contains("%r4+32") && note.threads.as_ref().unwrap().lanes == 0xff, "{note}");
    assert_eq!(note.other.as_ref().unwrap().text, "@%p1 st.volatile.shared.u32 [%r4], %r7;");
    let silent = shared(&tree("bar.warp.sync -1;\n", ".volatile")).ok(1, 64, &[]);
    assert_eq!(silent.notes, []);
    // Without `volatile` it is a race, and with it between warps, too.
    shared(&tree("", "")).wrong(1, 64, &[], ErrorKind::SharedRace);
    // Atomics are made for several lanes, and a lane may read what it wrote itself.
    for body in [
        "red.shared.add.u32 [%r3], 1;\nld.volatile.shared.u32 %r7, [%r3];",
        "st.volatile.shared.u32 [%r4], %r1;\nld.volatile.shared.u32 %r7, [%r4];",
    ] {
        let body = format!("setp.eq.u32 %p1, %r1, 0;\n@%p1 st.shared.u32 [%r3], 0;\nbar.sync 0;\n{body}");
        assert_eq!(shared(&body).ok(1, 64, &[]).notes, [], "{body}");
    }
}

/// `ptxvm run` prints the note, and ends well.
#[cfg(feature = "cli")]
#[test]
fn the_program_prints_notes() {
    let text = ".version 8.0\n.target sm_80\n.address_size 64\n.visible .entry k()\n{\n.reg .pred p;\n.reg .b32 a, b;\n.shared .b32 s[33];\n\
                mov.u32 a, %tid.x;\nshl.b32 b, a, 2;\nmov.u32 a, s;\nadd.u32 a, a, b;\nst.volatile.shared.u32 [a], b;\n\
                setp.lt.u32 p, b, 124;\n@p ld.volatile.shared.u32 b, [a+4];\nret;\n}\n";
    let path = std::path::Path::new(env!("CARGO_TARGET_TMPDIR")).join("notes.ptx");
    std::fs::write(&path, text).unwrap();
    let mut program = std::process::Command::new(env!("CARGO_BIN_EXE_ptxvm"));
    let out = program.arg("run").arg(&path).args(["--grid", "1", "--block", "32"]).output().unwrap();
    let told = String::from_utf8(out.stderr).unwrap();
    assert!(
        out.status.success() && told.starts_with("note: InStep: shared memory at 0x4: lane 0 of warp 0"),
        "{told}"
    );
}

/// Between warps of one block, global memory is checked as shared memory is; stores of the same value are no race.
#[test]
fn global_memory_between_warps() {
    // The own word, and that of the thread of the other warp.
    let at = "and.b32 %r4, %r1, 31;\nmad.wide.u32 %rd4, %r1, 4, %rd1;\nxor.b32 %r5, %r1, 32;\nmad.wide.u32 %rd5, %r5, 4, %rd1;\n\
              mad.wide.u32 %rd6, %r4, 4, %rd1;\nmov.u32 %r6, 7;\n";
    let run = |body: &str| {
        let mut kernel = Kernel::new(&format!("{at}{body}"));
        let words = kernel.words("words", &[0; 128]);
        match kernel.run(1, 64, &[words.0]) {
            Ok(_) => None,
            Err(ptxvm::Error::Fault(found)) => Some(found),
            Err(e) => panic!("{e}"),
        }
    };
    for body in [
        "st.global.u32 [%rd4], %r1;\nld.global.u32 %r7, [%rd5];",
        "st.global.u32 [%rd4], %r1;\nbar.sync 0;\nld.global.u32 %r7, [%rd5];\nst.global.u32 [%rd4], %r7;",
        // All words of a line, of which the other warp wrote one.
        "setp.eq.u32 %p1, %r1, 5;\n@%p1 st.global.u32 [%rd1+64], %r6;\nld.global.u32 %r7, [%rd6];",
        // The values are the same but for one.
        "mov.u32 %r8, 7;\nsetp.eq.u32 %p1, %r1, 60;\n@%p1 mov.u32 %r8, 9;\nst.global.u32 [%rd6], %r8;",
        // Who read before the value was written twice.
        "setp.ge.u32 %p1, %r1, 32;\n@!%p1 st.global.u32 [%rd1], %r6;\n@%p1 ld.global.u32 %r7, [%rd1];\nst.global.u32 [%rd1+4], %r6;",
        "red.global.add.u32 [%rd6], %r1;\nld.global.u32 %r7, [%rd6];",
    ] {
        let found = run(body).unwrap_or_else(|| panic!("nothing is found in {body}"));
        assert!(found.iter().all(|f| f.kind == ErrorKind::GlobalRace), "{body}: {found:?}");
        assert!(
            found[0].message.contains("of warp 1") && found[0].message.contains("of warp 0"),
            "{found:?}"
        );
    }
    for body in [
        "st.global.u32 [%rd4], %r1;\nbar.sync 0;\nld.global.u32 %r7, [%rd5];\nbar.sync 0;\nst.global.u32 [%rd4], %r7;",
        "ld.global.u32 %r7, [%rd6];\nst.global.u32 [%rd4+256], %r7;",
        // The same value, which each of the two may read, and all behind a barrier.
        "st.global.u32 [%rd6], %r6;\nld.global.u32 %r7, [%rd6];\nst.global.u32 [%rd6], %r6;\nbar.sync 0;\nld.global.u32 %r7, [%rd5];",
        "red.global.add.u32 [%rd6], %r1;\natom.global.add.u32 %r7, [%rd6], 1;",
        // A loop around a compare-and-swap begins with a plain read.
        "ld.global.u32 %r7, [%rd6];\natom.global.cas.b32 %r8, [%rd6], %r7, %r1;",
        // Bytes of one word.
        "shr.u32 %r7, %r1, 5;\ncvt.u64.u32 %rd7, %r7;\nadd.u64 %rd7, %rd7, %rd6;\nst.global.u8 [%rd7], %r1;\nld.global.u8 %r8, [%rd7];",
        // The flag of another warp, fences on both sides.
        "setp.ge.u32 %p1, %r1, 32;\n@%p1 bra reader;\nst.global.u32 [%rd4], %r1;\nbar.warp.sync -1;\nmembar.cta;\nsetp.eq.u32 %p2, %r1, 0;\n@%p2 st.volatile.global.u32 [%rd1+300], %r6;\nbra end;\n\
         reader:\nld.volatile.global.u32 %r8, [%rd1+300];\nsetp.eq.u32 %p2, %r8, 0;\n@%p2 bra reader;\nmembar.cta;\nld.global.u32 %r7, [%rd5];\nend:",
    ] {
        assert!(run(body).is_none(), "{body}: {:?}", run(body));
    }
}
