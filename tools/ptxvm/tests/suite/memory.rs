//! Loads, stores, addresses, what is never written, and what memory traffic is counted.

use ptxvm::error::ErrorKind;
use ptxvm::{Checks, Error, Options};

use crate::support::ptx::Kernel;

fn bytes(n: usize) -> Vec<u8> {
    (0..n).map(|i| (i as u8).wrapping_mul(37).wrapping_add(0x85)).collect()
}

#[test]
fn narrow_loads_extend_to_the_register() {
    for (ty, size, signed) in [
        ("u8", 1, false),
        ("s8", 1, true),
        ("b8", 1, false),
        ("u16", 2, false),
        ("s16", 2, true),
        ("b16", 2, false),
        ("u32", 4, false),
        ("s32", 4, true),
        ("b32", 4, false),
        ("u64", 8, false),
        ("s64", 8, true),
    ] {
        for (reg, store, width) in [("%h1", "b16", 2), ("%r9", "b32", 4), ("%rd9", "b64", 8)] {
            if width < size {
                continue;
            }
            let mut k = Kernel::new(&format!(
                "mul.wide.u32 %rd4, %r1, {size};\nadd.u64 %rd4, %rd1, %rd4;\nmul.wide.u32 %rd5, %r1, {width};\n\
                 add.u64 %rd5, %rd2, %rd5;\nld.global.{ty} {reg}, [%rd4];\nst.global.{store} [%rd5], {reg};"
            ));
            let data = bytes(50 * size);
            let (a, b) = (k.upload("in", &data), k.gpu.alloc(50 * width).unwrap());
            k.ok(1, 50, &[a.0, b.0]);
            let got = k.read(b, 50 * width);
            for i in 0..50 {
                let value = &data[i * size..(i + 1) * size];
                let fill = if signed && value[size - 1] & 0x80 != 0 { 0xff } else { 0 };
                let mut want = value.to_vec();
                want.resize(width, fill);
                assert_eq!(got[i * width..(i + 1) * width], want, "ld.{ty} into {reg}, lane {i}");
            }
        }
    }
}

/// Sends 16 bytes of each thread through a space in every shape, and back.
#[test]
fn every_shape_in_every_space() {
    let shapes = [
        ("b8", "%h", 1, 1),
        ("u8", "%r", 1, 4),
        ("b16", "%h", 2, 2),
        ("u16", "%h", 2, 4),
        ("b32", "%r", 4, 1),
        ("f32", "%f", 4, 2),
        ("f32", "%f", 4, 4),
        ("b64", "%rd3", 8, 1),
        ("f64", "%d", 8, 2),
        ("b128", "%q", 16, 1),
    ];
    let places = [
        ("global", "add.u64 %rd6, %rd3, %rd5;"),
        ("", "add.u64 %rd6, %rd3, %rd5;"),
        ("shared", "mov.u64 %rd6, s;\nadd.u64 %rd6, %rd6, %rd5;"),
        ("shared::cta", "mov.u32 %r7, s;\nmad.lo.u32 %r6, %r1, 16, %r7;\ncvt.u64.u32 %rd6, %r6;"),
        ("", "cvta.shared.u64 %rd6, s;\nadd.u64 %rd6, %rd6, %rd5;"),
        ("local", "mov.u64 %rd6, l;"),
        ("", "mov.u64 %rd7, l;\ncvta.local.u64 %rd6, %rd7;"),
        ("local", "mov.u64 %rd7, l;\ncvta.local.u64 %rd6, %rd7;\ncvta.to.local.u64 %rd6, %rd6;"),
    ];
    for (ty, reg, size, n) in shapes {
        for (space, address) in places {
            let regs: Vec<String> = (0..n).map(|i| format!("{reg}{i}")).collect();
            let (vector, list) = match n {
                1 => (String::new(), regs[0].clone()),
                n => (format!(".v{n}"), format!("{{{}}}", regs.join(", "))),
            };
            // %r1 and %r2 are the thread and the block.
            let list = list.replace("%r0", "%r10").replace("%r1,", "%r11,").replace("%r2", "%r12");
            let dot = if space.is_empty() { String::new() } else { format!(".{space}") };
            let piece = size * n;
            let mut body = format!("mul.wide.u32 %rd5, %r1, 16;\nadd.u64 %rd1, %rd1, %rd5;\n{address}\n");
            for at in (0..16).step_by(piece) {
                body += &format!(
                    "ld.global{vector}.{ty} {list}, [%rd1+{at}];\nst{dot}{vector}.{ty} [%rd6+{at}], {list};\n"
                );
            }
            body += "add.u64 %rd2, %rd2, %rd5;\n";
            for at in (0..16).step_by(piece) {
                body += &format!(
                    "ld{dot}{vector}.{ty} {list}, [%rd6+{at}];\nst.global{vector}.{ty} [%rd2+{at}], {list};\n"
                );
            }
            let mut k = Kernel::new(&body);
            let data = bytes(16 * 70);
            let a = k.upload("in", &data);
            let (b, c) = (k.gpu.alloc(16 * 70).unwrap(), k.gpu.alloc(16 * 70).unwrap());
            k.ok(1, 70, &[a.0, b.0, c.0]);
            assert_eq!(k.read(b, 16 * 70), data, "{ty} x {n} in `{space}`, {address}");
        }
    }
}

#[test]
fn constants_and_parameters() {
    let mut k = Kernel::new(
        "mov.u64 %rd5, k;\nld.const.u32 %r4, [%rd5+8];\ncvta.const.u64 %rd6, k;\nld.u32 %r5, [%rd6+12];\n\
         mov.b64 %rd7, b;\nld.param.u32 %r6, [%rd7];\nld.param.v2.u32 {%r7, %r8}, [c];\n\
         st.global.v4.b32 [%rd1], {%r4, %r5, %r6, %r7};",
    );
    let a = k.gpu.alloc(16).unwrap();
    k.ok(1, 32, &[a.0, 0x1122_3344_5566_7788, 99]);
    assert_eq!(k.read_words(a, 4), [0x0b0a_0908, 0x0f0e_0d0c, 0x5566_7788, 99]);
}

#[test]
fn windows_tell_the_space() {
    let spaces = ["global", "shared", "local", "const"];
    let mut body = String::from("mov.u64 %rd9, l;\n");
    let addresses = ["%rd1", "s", "%rd9", "k"];
    for (i, (space, address)) in spaces.iter().zip(addresses).enumerate() {
        body += &format!("cvta.{space}.u64 %rd{}, {address};\n", 10 + i);
    }
    for i in 0..4 {
        for (j, space) in spaces.iter().enumerate() {
            body += &format!(
                "isspacep.{space} %p1, %rd{};\nselp.u32 %r5, 1, 0, %p1;\nst.global.u32 [%rd1+{}], %r5;\n",
                10 + i,
                (i * 4 + j) * 4
            );
        }
    }
    let mut k = Kernel::new(&body);
    let a = k.gpu.alloc(64).unwrap();
    k.ok(1, 1, &[a.0]);
    let want: Vec<u32> = (0..16).map(|i| u32::from(i % 5 == 0)).collect();
    assert_eq!(k.read_words(a, 16), want);
}

#[test]
fn addresses_that_are_wrong() {
    let load = "mul.wide.u32 %rd4, %r1, 4;\nadd.u64 %rd4, %rd1, %rd4;\nld.global.u32 %r4, [%rd4];";
    let mut k = Kernel::new(load);
    let a = k.words("weights", &[1; 32]);
    k.ok(1, 32, &[a.0]);
    let found = k.wrong(1, 33, &[a.0], ErrorKind::OutOfBounds);
    assert!(found.message.contains("`weights`") && found.message.contains("0 bytes behind"), "{found}");
    assert_eq!(found.threads.as_ref().unwrap().lanes, 1);
    let found = k.wrong(1, 2, &[0], ErrorKind::OutOfBounds);
    assert!(found.message.contains("null page"), "{found}");
    k.wrong(1, 1, &[u64::MAX - 3], ErrorKind::OutOfBounds);
    k.wrong(1, 1, &[a.0 - 4], ErrorKind::OutOfBounds);
    k.wrong(1, 1, &[a.0 + 2], ErrorKind::Misaligned);
    k.gpu.free(a).unwrap();
    let found = k.wrong(1, 1, &[a.0 + 8], ErrorKind::UseAfterFree);
    assert!(found.message.contains("8 bytes into `weights`"), "{found}");
    assert!(matches!(k.gpu.free(a), Err(Error::Fault(f)) if f[0].kind == ErrorKind::UseAfterFree));
    let b = k.words("next", &[0; 32]);
    assert_ne!(a.0, b.0, "an address is not used again soon");
    // Exact to the byte: 127 bytes hold 31 words.
    let c = k.upload("odd", &[0; 127]);
    k.ok(1, 31, &[c.0]);
    assert!(k.wrong(1, 32, &[c.0], ErrorKind::OutOfBounds).message.contains("1 bytes past the end"));
    // Lanes in different allocations are no error.
    let mut k = Kernel::new(
        "and.b32 %r4, %r1, 1;\nsetp.eq.u32 %p1, %r4, 0;\nselp.b64 %rd4, %rd1, %rd2, %p1;\n\
         ld.global.u32 %r5, [%rd4];\nst.global.u32 [%rd4+4], %r5;",
    );
    let (a, b) = (k.words("a", &[5, 0]), k.words("b", &[6, 0]));
    k.ok(1, 32, &[a.0, b.0]);
    assert_eq!((k.read_words(a, 2), k.read_words(b, 2)), (vec![5, 5], vec![6, 6]));
    for (body, kind) in [
        ("mov.u32 %r5, 4096;\nld.shared.u32 %r4, [%r5];", ErrorKind::OutOfBounds),
        ("ld.shared.u32 %r4, [s+2];", ErrorKind::Misaligned),
        ("st.local.v4.u32 [l+264], {%r1, %r1, %r1, %r1};", ErrorKind::Misaligned),
        ("mov.u64 %rd4, l;\nld.local.u32 %r4, [%rd4+100000];", ErrorKind::OutOfBounds),
        ("ld.const.u64 %rd4, [k+64];", ErrorKind::OutOfBounds),
        ("cvta.const.u64 %rd4, k;\nst.u32 [%rd4], %r1;", ErrorKind::WrongSpace),
        ("mov.b64 %rd4, a;\nst.u32 [%rd4], %r1;", ErrorKind::WrongSpace),
        ("cvta.const.u64 %rd4, k;\nred.add.u32 [%rd4], %r1;", ErrorKind::WrongSpace),
        ("ld.global.v4.f32 {%f1, %f2, %f3, %f4}, [%rd1+8];", ErrorKind::Misaligned),
    ] {
        let mut k = Kernel::new(body);
        let a = k.words("a", &[0; 64]);
        k.wrong(1, 32, &[a.0], kind);
    }
}

#[test]
fn memory_is_limited() {
    let mut k = Kernel::with("", Options { memory: 1 << 20, ..Options::default() });
    let a = k.gpu.alloc(1 << 20).unwrap();
    assert!(matches!(k.gpu.alloc(1), Err(Error::Fault(f)) if f[0].message.contains("out of memory")));
    k.gpu.free(a).unwrap();
    k.gpu.alloc(1 << 20).unwrap();
}

/// A value that nobody wrote may travel, but not reach global memory, an address or an atomic.
#[test]
fn what_nobody_wrote() {
    let through = |space: &str, at: &str| {
        format!(
            "ld.global.u32 %r4, [%rd1];\nst.{space}.u32 [{at}], %r4;\nld.{space}.u32 %r5, [{at}];\nadd.u32 %r5, %r5, 1;\nst.global.u32 [%rd2], %r5;"
        )
    };
    for body in [
        "ld.global.u32 %r4, [%rd1];\nst.global.u32 [%rd2], %r4;".to_owned(),
        through("shared", "s"),
        through("local", "l"),
        "ld.shared.u32 %r4, [s];\nst.global.u32 [%rd2], %r4;".to_owned(),
        "ld.local.u32 %r4, [l];\nst.global.u32 [%rd2], %r4;".to_owned(),
        "st.shared.u16 [s], 1;\nld.shared.u32 %r4, [s];\nadd.u32 %r4, %r4, 1;\nst.global.u32 [%rd2], %r4;".to_owned(),
        "st.global.u32 [%rd2], %r30;".to_owned(),
        // A half of a pair, which is no gap of a structure, also behind a move.
        "ld.global.u32 %r4, [%rd2];\nmov.b64 %rd4, {%r4, %r30};\nst.global.u64 [%rd2], %rd4;".to_owned(),
        "ld.global.u32 %r4, [%rd2];\nmov.b64 %rd4, {%r30, %r4};\nmov.b64 %rd5, %rd4;\nst.global.u64 [%rd2], %rd5;".to_owned(),
        "st.shared.u32 [s], 1;\nld.shared.u64 %rd4, [s];\nmov.b64 {%r4, %r5}, %rd4;\nst.global.u32 [%rd2], %r5;".to_owned(),
        "st.shared.u32 [s+4], 1;\nld.shared.u64 %rd4, [s];\nst.global.u32 [%rd2], %rd4;".to_owned(),
        "ld.global.u64 %rd4, [%rd1];\nmul.lo.u64 %rd4, %rd4, 0;\nadd.u64 %rd4, %rd4, %rd2;\nld.global.u32 %r4, [%rd4];".to_owned(),
        "red.global.add.u32 [%rd1], 1;".to_owned(),
        "red.global.add.u32 [%rd2], %r30;".to_owned(),
        "atom.shared.max.u32 %r4, [s], 1;".to_owned(),
        "ld.global.u32 %r4, [%rd2];\ndiscard.global.L2 [%rd2], 128;\nld.global.u32 %r4, [%rd2];\nst.global.u32 [%rd2], %r4;".to_owned(),
    ] {
        let mut k = Kernel::new(&body);
        let (a, b) = (k.gpu.alloc(128).unwrap(), k.words("out", &[0; 32]));
        k.wrong(1, 1, &[a.0, b.0], ErrorKind::Uninitialized);
        // The same without the check, and with memory that the host has written.
        let checks = Checks { init: false, ..Checks::ALL };
        let mut k = Kernel::with(&body, Options { checks, ..Options::default() });
        let (a, b) = (k.gpu.alloc(128).unwrap(), k.words("out", &[0; 32]));
        k.ok(1, 1, &[a.0, b.0]);
    }
    // Loading it, and dropping it, is no error; nor is what another launch or the host wrote in part.
    let mut k =
        Kernel::new("ld.global.u32 %r4, [%rd1+4];\nld.global.u32 %r4, [%rd1];\nst.global.u32 [%rd1+8], %r4;");
    let a = k.gpu.alloc(64).unwrap();
    k.gpu.write(a, &[7; 4]).unwrap();
    k.ok(1, 32, &[a.0]);
    let mut k = Kernel::new("mad.wide.u32 %rd4, %r1, 4, %rd1;\nst.global.u32 [%rd4], %r1;");
    let mut text = Kernel::new(
        "mad.wide.u32 %rd4, %r1, 4, %rd1;\nld.global.u32 %r4, [%rd4];\nst.global.u32 [%rd4], %r4;",
    );
    std::mem::swap(&mut k.gpu, &mut text.gpu);
    let a = text.gpu.alloc(400).unwrap();
    std::mem::swap(&mut k.gpu, &mut text.gpu);
    k.ok(1, 100, &[a.0]);
    std::mem::swap(&mut k.gpu, &mut text.gpu);
    text.ok(1, 100, &[a.0]);
    // Structures with gaps are copied in wider pieces, and a pair may be taken apart and its written half used.
    for body in [
        "st.shared.u16 [s], 1;\nst.shared.u8 [s+4], 1;\nld.shared.v2.u32 {%r4, %r5}, [s];\nmov.b64 %rd4, {%r4, %r5};\nst.global.u64 [%rd1], %rd4;",
        "st.shared.u32 [s], 1;\nld.shared.u64 %rd4, [s];\nst.global.u64 [%rd1], %rd4;",
        "mov.u32 %r4, 5;\nmov.b64 %rd4, {%r30, %r4};\nmov.b64 {%r5, %r6}, %rd4;\nadd.u32 %r6, %r6, 1;\nst.global.u32 [%rd1], %r6;",
    ] {
        let mut k = Kernel::new(body);
        let a = k.gpu.alloc(64).unwrap();
        k.ok(1, 1, &[a.0]);
    }
    // An exchange does not look at the old value.
    let mut k = Kernel::new(
        "atom.global.exch.b32 %r4, [%rd1], 5;\nld.global.u32 %r5, [%rd1];\nst.global.u32 [%rd1+4], %r5;",
    );
    let a = k.gpu.alloc(64).unwrap();
    k.ok(1, 1, &[a.0]);
}

#[test]
fn traffic_is_counted() {
    let access = |stride: u32| format!("mad.wide.u32 %rd4, %r1, {stride}, %rd1;\nld.global.u32 %r4, [%rd4];");
    for (stride, threads, requests, sectors, ideal) in [
        (4, 32, 1, 4, 4),
        (8, 32, 1, 8, 4),
        (32, 32, 1, 32, 4),
        (0, 32, 1, 1, 1),
        (4, 40, 2, 5, 5),
        (128, 64, 2, 64, 8),
    ] {
        let mut k = Kernel::new(&access(stride));
        let a = k.upload("a", &[0; 8192]);
        let report = k.ok(1, threads, &[a.0]);
        let g = report.global;
        assert_eq!((g.requests, g.sectors, g.ideal_sectors), (requests, sectors, ideal), "stride {stride}");
        assert_eq!(g.bytes, u64::from(threads) * 4);
        assert_eq!(report.unique_sectors, (sectors, 0));
    }
    // All blocks read the same sectors: unique ones are counted once, in every launch anew, whatever the threads.
    for threads in [1, 4] {
        let mut k = Kernel::with(
            &(access(4) + "\nst.global.u32 [%rd4+1024], %r1;"),
            Options { threads, checks: Checks { race: false, ..Checks::ALL }, ..Options::default() },
        );
        let a = k.upload("a", &[0; 8192]);
        for _ in 0..2 {
            let report = k.ok(20, 256, &[a.0]);
            assert_eq!((report.global.sectors, report.unique_sectors), (2 * 20 * 8 * 4, (32, 32)));
        }
    }
    for (stride, bytes, passes, ideal) in
        [(4, 4, 1, 1), (8, 4, 2, 1), (128, 4, 32, 1), (8, 8, 2, 2), (16, 16, 4, 4)]
    {
        let regs = ["", "%r5", "{%r5, %r6}", "", "{%r5, %r6, %r7, %r8}"][bytes / 4];
        let v = ["", "", ".v2", "", ".v4"][bytes / 4];
        let mut k = Kernel::new(&format!(
            "mov.u32 %r4, s;\nmad.lo.u32 %r4, %r1, {stride}, %r4;\nld.shared{v}.u32 {regs}, [%r4];"
        ));
        let s = k.ok(1, 32, &[]).shared;
        assert_eq!((s.wavefronts, s.ideal_wavefronts), (passes, ideal), "stride {stride}, {bytes} bytes");
    }
}

#[test]
fn hints_change_nothing_and_unknown_ones_are_refused() {
    for body in [
        "ld.global.nc.L1::no_allocate.L2::128B.v4.f32 {%f1, %f2, %f3, %f4}, [%rd1];",
        "ld.global.ca.u32 %r4, [%rd1];\nld.global.cg.u32 %r4, [%rd1];\nld.global.cs.u32 %r4, [%rd1];\nld.global.lu.u32 %r4, [%rd1];\nld.global.cv.u32 %r4, [%rd1];",
        "ld.weak.global.L1::evict_last.L2::64B.u32 %r4, [%rd1];\nldu.global.u32 %r4, [%rd1];",
        "createpolicy.fractional.L2::evict_first.b64 %rd5, 1.0;\nld.global.L1::evict_last.L2::cache_hint.u32 %r4, [%rd1], %rd5;\nst.global.L2::cache_hint.u32 [%rd1], %r4, %rd5;",
        "createpolicy.range.global.L2::evict_last.L2::evict_unchanged.b64 %rd5, [%rd1], 128, 256;",
        "ld.volatile.global.u32 %r4, [%rd1];\nld.relaxed.gpu.global.u32 %r4, [%rd1];\nld.acquire.sys.u32 %r4, [%rd1];",
        "st.volatile.global.u32 [%rd1], 1;\nst.relaxed.cta.global.u32 [%rd1], 2;\nst.release.gpu.u32 [%rd1], 3;\nst.weak.global.u32 [%rd1], 4;",
        "st.global.wb.u32 [%rd1], 1;\nst.global.cg.u32 [%rd1], 1;\nst.global.cs.u32 [%rd1], 1;\nst.global.wt.u32 [%rd1], 1;",
        "prefetch.global.L2 [%rd1];\nprefetch.L1 [%rd1+4096000];\nprefetchu.L1 [%rd1];\nprefetch.global.L2::evict_last [%rd1];\napplypriority.global.L2::evict_normal [%rd1], 128;",
        "membar.cta;\nmembar.gl;\nmembar.sys;\nfence.sc.gpu;\nfence.acq_rel.cta;\nfence.proxy.alias;\nfence.proxy.async;\nfence.proxy.async.shared::cta;",
    ] {
        let mut k = Kernel::new(body);
        let a = k.words("a", &[0; 32]);
        k.ok(1, 32, &[a.0]);
    }
    for body in [
        "ld.global.mmio.relaxed.sys.u32 %r4, [%rd1];",
        "st.async.release.gpu.global.u32 [%rd1], %r5;",
        "fence.proxy.tensormap::generic.release.world;",
        "prefetch.global.tensormap [%rd1];",
    ] {
        let found = Kernel::new(body).load();
        assert!(matches!(found, Err(Error::Unsupported(_))), "{body}: {found:?}");
    }
    let found = Kernel::new("fence.acquire.sync_restrict::shared::cluster.gpu;").load();
    assert!(
        matches!(&found, Err(Error::Fault(f)) if f[0].message.contains("its scope is cluster")),
        "{found:?}"
    );
}

/// Constants written by the host, as `cudaMemcpyToSymbol` does.
#[test]
fn the_host_writes_constants() {
    let text = ".version 8.0\n.target sm_80\n.address_size 64\n.const .align 4 .b8 k[8] = {1, 0, 0, 0, 2};\n\
        .visible .entry e(.param .u64 to) {\n.reg .b64 %p;\n.reg .b32 %a, %b;\nld.param.u64 %p, [to];\n\
        ld.const.v2.u32 {%a, %b}, [k];\nst.global.v2.u32 [%p], {%a, %b};\nret;\n}\n";
    let mut gpu = ptxvm::Gpu::new(ptxvm::Options::default());
    let module = ptxvm::Module::load("k.ptx", text).unwrap();
    let mut loaded = gpu.load(&module).unwrap();
    gpu.write_constant(&mut loaded, "k", &7u32.to_le_bytes()).unwrap();
    let to = gpu.alloc(8).unwrap();
    gpu.launch(&loaded, "e", &ptxvm::Launch::linear(1, 1), &[ptxvm::Arg::Ptr(to)]).unwrap();
    let mut got = [0; 8];
    gpu.read(to, &mut got).unwrap();
    assert_eq!(got, [7, 0, 0, 0, 2, 0, 0, 0]);
    for (name, bytes) in [("nothing", 4), ("k", 9)] {
        assert!(gpu.write_constant(&mut loaded, name, &vec![0; bytes]).is_err(), "{name}");
    }
}

/// A kernel works on the host program's own memory, which then counts as written; devices may lie apart.
#[test]
fn an_allocation_can_be_memory_of_the_host() {
    let text = ".version 8.0\n.target sm_80\n.address_size 64\n.visible .entry twice(.param .u64 p) {\n.reg .b64 %rd<2>;\n\
        .reg .b32 %r<2>;\nld.param.u64 %rd1, [p];\nld.global.u32 %r1, [%rd1];\nadd.u32 %r1, %r1, %r1;\n\
        st.global.u32 [%rd1], %r1;\nret;\n}\n";
    let mut gpu = ptxvm::Gpu::new(Options::default());
    gpu.begin_at(1 << 38);
    let module = gpu.load(&ptxvm::Module::load("twice.ptx", text).unwrap()).unwrap();
    let at = gpu.alloc(12).unwrap();
    assert!(at.0 >= 1 << 38, "{at:?}");
    let mut host = vec![21u64, 5];
    let start = std::ptr::NonNull::new(host.as_mut_ptr()).unwrap();
    // SAFETY: 16 bytes, which live until the device is dropped.
    unsafe { gpu.back(at, start) }.unwrap();
    let launch = ptxvm::Launch::linear(1, 1);
    gpu.launch(&module, "twice", &launch, &[ptxvm::Arg::Ptr(at)]).unwrap();
    // SAFETY: no launch runs.
    assert_eq!(unsafe { start.read_volatile() }, 42);
    let mut seen = [0; 12];
    gpu.read(at, &mut seen).unwrap();
    assert_eq!(seen[..4], 42u32.to_le_bytes());
    // Bounds are those of the allocation, not of the words below it.
    let past = gpu.launch(&module, "twice", &launch, &[ptxvm::Arg::Ptr(at.offset(12))]).unwrap_err();
    let Error::Fault(findings) = past else { panic!("{past}") };
    assert_eq!(findings[0].kind, ErrorKind::OutOfBounds);
    // SAFETY: refused, since no allocation starts there.
    assert!(unsafe { gpu.back(at.offset(8), start) }.is_err());
    gpu.free(at).unwrap();
    drop(gpu);
    assert_eq!(host[1], 5);
}

/// What a kernel printed before it failed is told, too.
#[test]
fn what_a_failed_launch_printed_is_kept() {
    let text = ".version 8.0\n.target sm_80\n.address_size 64\n.extern .func (.param .b32 r) vprintf (.param .b64 a, .param .b64 b);\n\
        .global .align 1 .b8 s[4] = {104, 105, 10, 0};\n.visible .entry k() {\n.reg .b64 %rd<3>;\n\
        mov.u64 %rd1, s;\nmov.u64 %rd2, 0;\n{\n.param .b64 a;\nst.param.b64 [a], %rd1;\n.param .b64 b;\nst.param.b64 [b], %rd2;\n\
        .param .b32 r;\ncall.uni (r), vprintf, (a, b);\n}\ntrap;\nret;\n}\n";
    let mut gpu = ptxvm::Gpu::new(Options::default());
    let module = gpu.load(&ptxvm::Module::load("k.ptx", text).unwrap()).unwrap();
    gpu.launch(&module, "k", &ptxvm::Launch::linear(1, 1), &[]).unwrap_err();
    assert_eq!(gpu.printed(), "hi\n");
}

/// A finding in inlined code names the line of the kernel as well, through all calls between.
#[test]
fn inlined_code_is_placed_in_its_kernel() {
    let text = ".version 8.0\n.target sm_80\n.address_size 64\n.file 1 \"user.cu\"\n.file 2 \"leaf.h\"\n\
        .visible .entry k(.param .u64 p) {\n.reg .b64 %rd<2>;\n.reg .b32 %r<2>;\n.loc 1 4 0\nld.param.u64 %rd1, [p];\n\
        .loc 1 3 3, function_name $L0, inlined_at 1 5 3\n.loc 2 1 71, function_name $L1, inlined_at 1 3 3\n\
        ld.global.u32 %r1, [%rd1];\n.loc 1 6 3\nst.global.u32 [%rd1+4], %r1;\nret;\n}\n";
    let mut gpu = ptxvm::Gpu::new(Options::default());
    let module = gpu.load(&ptxvm::Module::load("k.ptx", text).unwrap()).unwrap();
    let at = gpu.alloc(4).unwrap();
    let run = gpu.launch(&module, "k", &ptxvm::Launch::linear(1, 1), &[ptxvm::Arg::Ptr(at)]);
    let told = run.unwrap_err().to_string();
    assert!(told.contains("(from user.cu:6)"), "{told}");
    let freed = ptxvm::DevicePtr(8);
    let run = gpu.launch(&module, "k", &ptxvm::Launch::linear(1, 1), &[ptxvm::Arg::Ptr(freed)]);
    let told = run.unwrap_err().to_string();
    assert!(told.contains("(from leaf.h:1, inlined at user.cu:5)"), "{told}");
}

/// A copy within the device takes along what was never written.
#[test]
fn a_copy_of_bytes_that_nobody_wrote_is_none_of_written_ones() {
    let text = ".version 8.0\n.target sm_80\n.address_size 64\n.visible .entry k(.param .u64 p, .param .u64 q) {\n\
        .reg .b64 %rd<3>;\n.reg .b32 %r<2>;\nld.param.u64 %rd1, [p];\nld.param.u64 %rd2, [q];\nld.global.u32 %r1, [%rd1];\n\
        st.global.u32 [%rd2], %r1;\nret;\n}\n";
    let mut gpu = ptxvm::Gpu::new(Options::default());
    let module = gpu.load(&ptxvm::Module::load("k.ptx", text).unwrap()).unwrap();
    let (a, b) = (gpu.alloc(9000).unwrap(), gpu.alloc(9000).unwrap());
    gpu.write(a, &bytes(8000)).unwrap();
    gpu.copy(b, a, 9000).unwrap();
    let mut got = vec![0; 8000];
    gpu.read(b, &mut got).unwrap();
    assert_eq!(got, bytes(8000));
    for (at, fine) in [(7996, true), (8000, false), (8996, false)] {
        let args = [ptxvm::Arg::Ptr(b.offset(at)), ptxvm::Arg::Ptr(a)];
        let run = gpu.launch(&module, "k", &ptxvm::Launch::linear(1, 1), &args);
        assert_eq!(run.is_ok(), fine, "at {at}: {run:?}");
    }
    assert!(gpu.copy(b, a, 9001).is_err() && gpu.copy(b.offset(1), a, 9000).is_err());
}
