//! cp.async: its bytes land at the issuer's wait, no earlier, and belong to the issuer.

use ptxvm::Options;
use ptxvm::error::ErrorKind;

use crate::support::ptx::Kernel;

/// The thread's 16 bytes: %r4 in shared memory, %rd4 in `in`, %rd5 in `out`.
const HEAD: &str = "mov.u32 %r3, s;\nmad.lo.u32 %r4, %r1, 16, %r3;\nmad.wide.u32 %rd4, %r1, 16, %rd1;\n\
    mad.wide.u32 %rd5, %r1, 16, %rd2;\n";
const OUT: &str = "ld.shared.v4.u32 {%r10, %r11, %r12, %r13}, [%r4];\n\
    st.global.v4.u32 [%rd5], {%r10, %r11, %r12, %r13};\n";

fn kernel(body: &str) -> Kernel {
    Kernel::new(&format!("{HEAD}{body}"))
}

fn data(k: &mut Kernel) -> (Vec<u8>, [u64; 2]) {
    let bytes: Vec<u8> = (0..1024u32).map(|i| (i * 7 + 1) as u8).collect();
    let a = k.upload("in", &bytes);
    let b = k.upload("out", &[0; 1024]);
    (bytes, [a.0, b.0])
}

#[test]
fn copies_land_whole_in_part_or_as_zeros() {
    for (copy, keep) in [
        ("cp.async.cg.shared.global [%r4], [%rd4], 16;", 16),
        ("cp.async.ca.shared::cta.global.L2::128B [%r4], [%rd4], 16;", 16),
        ("cp.async.ca.shared.global [%r4], [%rd4], 8;\ncp.async.ca.shared.global [%r4+8], [%rd4+8], 8;", 16),
        (
            "cp.async.ca.shared.global [%r4], [%rd4], 4;\ncp.async.ca.shared.global [%r4+4], [%rd4+4], 4;\n\
             cp.async.ca.shared.global [%r4+8], [%rd4+8], 8;",
            16,
        ),
        ("mov.u32 %r5, 16;\ncp.async.cg.shared.global [%r4], [%rd4], 16, %r5;", 16),
        ("mov.u32 %r5, 5;\ncp.async.cg.shared.global [%r4], [%rd4], 16, %r5;", 5),
        ("cp.async.cg.shared.global [%r4], [%rd4], 16, 8;", 8),
        ("mov.u64 %rd4, 0;\ncp.async.cg.shared.global [%r4], [%rd4], 16, 0;", 0),
        ("setp.eq.u32 %p1, %r3, %r3;\ncp.async.cg.shared.global [%r4], [%rd4], 16, %p1;", 0),
        ("setp.ne.u32 %p1, %r3, %r3;\ncp.async.cg.shared.global [%r4], [%rd4], 16, %p1;", 16),
    ] {
        for wait in ["cp.async.commit_group;\ncp.async.wait_group 0;\n", "cp.async.wait_all;\n"] {
            let mut k = kernel(&format!("{copy}\n{wait}{OUT}"));
            let (bytes, args) = data(&mut k);
            k.ok(1, 64, &args);
            let mut want = bytes;
            want.iter_mut().enumerate().filter(|(i, _)| i % 16 >= keep).for_each(|(_, b)| *b = 0);
            assert_eq!(k.read(ptxvm::DevicePtr(args[1]), 1024), want, "{copy}");
        }
    }
}

#[test]
fn bytes_do_not_arrive_before_the_wait() {
    // Without checks: the old contents are read before the wait, the new ones behind it.
    let body = "st.shared.v4.u32 [%r4], {%r1, %r1, %r1, %r1};\ncp.async.cg.shared.global [%r4], [%rd4], 16;\n\
        cp.async.commit_group;\nld.shared.u32 %r6, [%r4];\ncp.async.wait_group 0;\nld.shared.u32 %r7, [%r4];\n\
        st.global.v2.u32 [%rd5], {%r6, %r7};";
    let options = Options { checks: ptxvm::Checks::NONE, ..Options::default() };
    let mut k = Kernel::with(&format!("{HEAD}{body}"), options);
    let (bytes, args) = data(&mut k);
    k.ok(1, 64, &args);
    for (i, got) in k.read_words(ptxvm::DevicePtr(args[1]), 256).chunks(4).enumerate() {
        let new = u32::from_le_bytes(bytes[i * 16..i * 16 + 4].try_into().unwrap());
        assert_eq!(got[..2], [i as u32, new]);
    }
    let mut k = kernel(body);
    let (_, args) = data(&mut k);
    let found = k.wrong(1, 64, &args, ErrorKind::AsyncRace);
    assert!(found.message.contains("cp.async") && found.other.is_some(), "{found}");
}

#[test]
fn groups_are_waited_for_in_order() {
    // Two groups; the first has landed when one may be left.
    let issue = "cp.async.ca.shared.global [%r4], [%rd4], 4;\ncp.async.commit_group;\n\
        cp.async.ca.shared.global [%r4+4], [%rd4+4], 4;\ncp.async.commit_group;\n";
    for (body, ok) in [
        ("cp.async.wait_group 1;\nld.shared.u32 %r6, [%r4];", true),
        ("cp.async.wait_group 1;\nld.shared.u32 %r6, [%r4+4];", false),
        ("cp.async.wait_group 2;\nld.shared.u32 %r6, [%r4];", false),
        ("cp.async.wait_group 0;\nld.shared.v2.u32 {%r6, %r7}, [%r4];", true),
        // What is not committed belongs to no group.
        (
            "cp.async.ca.shared.global [%r4+8], [%rd4+8], 4;\ncp.async.wait_group 0;\nld.shared.u32 %r6, [%r4+8];",
            false,
        ),
        (
            "cp.async.ca.shared.global [%r4+8], [%rd4+8], 4;\ncp.async.wait_all;\nld.shared.u32 %r6, [%r4+8];",
            true,
        ),
    ] {
        let mut k = kernel(&format!("{issue}{body}"));
        let (_, args) = data(&mut k);
        if ok {
            k.ok(2, 64, &args);
        } else {
            k.wrong(1, 64, &args, ErrorKind::AsyncRace);
        }
    }
}

#[test]
fn landed_bytes_belong_to_the_issuer() {
    let other = "xor.b32 %r5, %r1, 32;\nmad.lo.u32 %r5, %r5, 16, %r3;\n";
    let issue = "cp.async.cg.shared.global [%r4], [%rd4], 16;\n";
    for (body, found) in [
        (format!("{issue}cp.async.wait_all;\nbar.sync 0;\nld.shared.u32 %r6, [%r5];"), None),
        (format!("{issue}cp.async.wait_all;\nld.shared.u32 %r6, [%r5];"), Some(ErrorKind::SharedRace)),
        // A wait of another thread does not help, nor does a barrier without a wait.
        (format!("{issue}bar.sync 0;\nld.shared.u32 %r6, [%r5];"), Some(ErrorKind::AsyncRace)),
        (
            "setp.lt.u32 %p1, %r1, 32;\n@%p1 cp.async.cg.shared.global [%r4], [%rd4], 16;\nsetp.ge.u32 %p2, %r1, 32;\n@%p2 cp.async.wait_all;\nbar.sync 0;\n@%p2 ld.shared.u32 %r6, [%r5];".to_owned(),
            Some(ErrorKind::AsyncRace),
        ),
        // The bytes may change as soon as the copy is issued: readers of the old ones must be done.
        (
            format!(
                "st.shared.u32 [%r4], %r1;\nbar.sync 0;\nld.shared.u32 %r6, [%r5];\n{issue}bar.sync 0;\ncp.async.wait_all;"
            ),
            Some(ErrorKind::SharedRace),
        ),
        (
            format!(
                "st.shared.u32 [%r4], %r1;\nbar.sync 0;\nld.shared.u32 %r6, [%r5];\nbar.sync 0;\n{issue}cp.async.wait_all;"
            ),
            None,
        ),
        // Copies that nobody waits for end with the kernel.
        (issue.to_owned(), None),
    ] {
        let mut k = kernel(&format!("{other}{body}"));
        let (_, args) = data(&mut k);
        match found {
            Some(kind) => {
                // Whoever reads too early may also meet the copy itself.
                let found = k.findings(1, 64, &args);
                assert!(found.iter().any(|f| f.kind == kind), "{body}: {found:?}");
                assert!(
                    found.iter().all(|f| matches!(f.kind, ErrorKind::AsyncRace | ErrorKind::SharedRace)),
                    "{found:?}"
                );
            }
            None => _ = k.ok(3, 64, &args),
        }
    }
}

#[test]
fn sources_are_checked() {
    let mut k = kernel("cp.async.cg.shared.global [%r4], [%rd4], 16;\ncp.async.wait_all;");
    let (_, args) = data(&mut k);
    let found = k.wrong(1, 65, &args, ErrorKind::OutOfBounds);
    assert!(found.message.contains("`in`"), "{found}");
    k.wrong(1, 1, &[args[0] + 8], ErrorKind::Misaligned);
    let mut k = kernel("mov.u32 %r5, 17;\ncp.async.cg.shared.global [%r4], [%rd4], 16, %r5;");
    let (_, args) = data(&mut k);
    k.wrong(1, 1, &args, ErrorKind::OutOfBounds);
    // 1020 bytes: the last copy reads 12 of its 16.
    let body = "setp.eq.u32 %p1, %r1, 63;\nselp.u32 %r5, 12, 16, %p1;\ncp.async.cg.shared.global [%r4], [%rd4], 16, %r5;\ncp.async.wait_all;";
    let mut k = kernel(body);
    let a = k.upload("short", &[3; 1020]);
    k.ok(1, 64, &[a.0]);
    // What nobody wrote stays so.
    let mut k = kernel(&format!("cp.async.cg.shared.global [%r4], [%rd4], 16;\ncp.async.wait_all;\n{OUT}"));
    let (a, b) = (k.gpu.alloc(64).unwrap(), k.upload("out", &[0; 64]));
    k.wrong(1, 4, &[a.0, b.0], ErrorKind::Uninitialized);
}
