//! mbarrier against a definition of its own: a list of what has happened, from which every answer is counted anew.

use ptxvm::error::ErrorKind;

use crate::support::ptx::Kernel;
use crate::support::warp::Random;

/// What a thread does.
#[derive(Clone, Copy, Debug)]
enum Event {
    /// Arrivals, and whether they leave for good.
    Arrive(i64, bool),
    /// Bytes that are expected (above 0) or have come (below 0).
    Bytes(i64),
}

/// The object after some events: number of its phase, arrivals and bytes that this waits for, arrivals that later ones do.
fn replay(count: i64, events: &[Event]) -> (u64, i64, i64, i64) {
    let mut start = 0;
    let (mut phase, mut expected) = (0, count);
    let mut first = count;
    for end in 0..=events.len() {
        let part = &events[start..end];
        let sum = |f: &dyn Fn(&Event) -> i64| part.iter().map(f).sum::<i64>();
        let arrived = sum(&|e| if let Event::Arrive(n, _) = e { *n } else { 0 });
        let left = sum(&|e| if let Event::Arrive(n, true) = e { *n } else { 0 });
        let bytes = sum(&|e| if let Event::Bytes(n) = e { *n } else { 0 });
        if end > start && arrived == first && bytes == 0 {
            expected = first - left;
            first = expected;
            phase += 1;
            start = end;
        } else if end == events.len() {
            return (phase, first - arrived, bytes, first - left);
        }
    }
    (phase, first, 0, expected)
}

#[test]
fn phases_and_counts() {
    let mut random = Random(17);
    for round in 0..300 {
        let count = 1 + (random.next() % 6) as i64;
        let mut body = format!("mov.u32 %r3, s;\nmbarrier.init.shared.b64 [%r3], {count};\n");
        let mut events: Vec<Event> = Vec::new();
        let mut want: Vec<u32> = Vec::new();
        // The states so far: register and phase.
        let mut states: Vec<(usize, u64)> = Vec::new();
        let answer = |body: &mut String, want: &mut Vec<u32>, value: u32| {
            *body += &format!("st.global.u32 [%rd1+{}], %r5;\n", 4 * want.len());
            want.push(value);
        };
        for _ in 0..24 {
            let (phase, pending, bytes, expected) = replay(count, &events);
            match random.next() % 8 {
                0..=2 if pending > 0 && states.len() < 30 => {
                    let n = 1 + (random.next() % pending as u64) as i64;
                    let (drop, tx) =
                        (random.next().is_multiple_of(4) && n < expected, random.next().is_multiple_of(3));
                    let state = 8 + states.len();
                    let name = if drop { "arrive_drop" } else { "arrive" };
                    if tx {
                        let more = (random.next() % 64) as i64;
                        body += &format!(
                            "mbarrier.{name}.expect_tx.release.cta.shared::cta.b64 %rd{state}, [%r3], {more};\n"
                        );
                        events.push(Event::Bytes(more));
                        events.push(Event::Arrive(1, drop));
                    } else {
                        let last = n == pending;
                        let (form, given) = match random.next() % 3 {
                            0 if n == 1 => ("", String::new()),
                            1 if !last => (".noComplete.release.cta", format!(", {n}")),
                            _ => ("", format!(", {n}")),
                        };
                        body += &format!("mbarrier.{name}{form}.shared.b64 %rd{state}, [%r3]{given};\n");
                        events.push(Event::Arrive(n, drop));
                    }
                    states.push((state, phase));
                    body += &format!("mbarrier.pending_count.b64 %r5, %rd{state};\n");
                    answer(&mut body, &mut want, pending as u32);
                }
                3 if bytes < 1000 => {
                    let n = 1 + (random.next() % 256) as i64;
                    body += &format!("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%r3], {n};\n");
                    events.push(Event::Bytes(n));
                }
                4 | 5 if bytes != 0 => {
                    // What has come may be less, the same, or more than is expected.
                    let n = if random.next().is_multiple_of(4) { bytes.abs() + 16 } else { bytes.abs() };
                    if bytes > 0 {
                        body += &format!(
                            "mbarrier.complete_tx.relaxed.cluster.shared::cluster.b64 [%r3], {n};\n"
                        );
                        events.push(Event::Bytes(-n));
                    } else {
                        body += &format!("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%r3], {n};\n");
                        events.push(Event::Bytes(n));
                    }
                }
                6 => {
                    let parity = random.next() % 2;
                    let wait = ["test_wait", "try_wait"][random.next() as usize % 2];
                    body += &format!(
                        "mbarrier.{wait}.parity.acquire.cta.shared::cta.b64 %p1, [%r3], {parity};\nselp.u32 %r5, 1, 0, %p1;\n"
                    );
                    answer(&mut body, &mut want, u32::from(phase % 2 != parity));
                }
                _ => {
                    let Some((state, of)) = states.last().filter(|(_, of)| of + 1 >= phase) else { continue };
                    let hint = [
                        "test_wait.shared.b64 %p1, [%r3], %rdS",
                        "try_wait.shared.b64 %p1, [%r3], %rdS, 100",
                    ][random.next() as usize % 2];
                    let wait = hint.replace('S', &state.to_string());
                    body += &format!("mbarrier.{wait};\nselp.u32 %r5, 1, 0, %p1;\n");
                    answer(&mut body, &mut want, u32::from(phase > *of));
                }
            }
        }
        let mut k = Kernel::new(&body);
        let out = k.words("out", &vec![9; want.len().max(1)]);
        k.ok(1, 1, &[out.0]);
        assert_eq!(k.read_words(out, want.len()), want, "round {round}: {events:?}\n{body}");
    }
}

#[test]
fn addresses_of_all_forms() {
    let head = "mov.u32 %r3, s;\ncvta.shared.u64 %rd4, %rd5;\n".replace("%rd5", "s");
    let head = head.replace("cvta.shared.u64 %rd4, s", "mov.u64 %rd5, s;\ncvta.shared.u64 %rd4, %rd5");
    for (at, space) in
        [("%rd4", ""), ("%r3", ".shared"), ("%r3", ".shared::cta"), ("s", ".shared"), ("%rd5", ".shared")]
    {
        let body = format!(
            "{head}mbarrier.init{space}.b64 [{at}+64], 1;\nmbarrier.arrive{space}.b64 %rd6, [{at}+64];\n\
             mbarrier.arrive{space}.b64 _, [{at}+64];\nmbarrier.arrive.shared::cluster.b64 _, [%r3+64], 1;\n\
             mbarrier.test_wait.parity{space}.b64 %p1, [{at}+64], 0;\nselp.u32 %r5, 1, 0, %p1;\n\
             st.global.u32 [%rd1], %r5;\nmbarrier.inval{space}.b64 [{at}+64];\n"
        );
        let mut k = Kernel::new(&body);
        let out = k.words("out", &[9]);
        k.ok(1, 1, &[out.0]);
        assert_eq!(k.read_words(out, 1), [1], "{body}");
    }
    for wrong in [
        "mbarrier.arrive.shared::cluster.b64 %rd6, [%r3];",
        "mbarrier.arrive.noComplete.shared.b64 %rd6, [%r3];",
        "mbarrier.arrive.expect_tx.shared.b64 %rd6, [%r3];",
        "mbarrier.init.shared.b32 [%r3], 1;",
        "mbarrier.init.global.b64 [%rd1], 1;",
        "mbarrier.test_wait.shared.b64 %p1, [%r3], %rd6, 5;",
        "mbarrier.try_wait.parity.shared.b64 %p1, [%r3], %rd6;",
    ] {
        let error = Kernel::new(wrong).load().and_then(|m| ptxvm::Gpu::new(Default::default()).load(&m));
        let found = match error {
            Err(ptxvm::Error::Fault(found) | ptxvm::Error::Unsupported(found)) => found,
            other => panic!("{wrong} {other:?}"),
        };
        assert!(matches!(found[0].kind, ErrorKind::Invalid | ErrorKind::Unsupported), "{wrong} {found:?}");
    }
}

/// A cluster of one block: its addresses are the block's own.
#[test]
fn addresses_of_a_cluster() {
    let body = "mov.u32 %r3, s;\nmbarrier.init.shared.b64 [%r3], 2;\nmov.u32 %r6, %cluster_ctarank;\n\
        mapa.shared::cluster.u32 %r4, %r3, %r6;\nmbarrier.arrive.release.cluster.shared::cluster.b64 _, [%r4];\n\
        mov.u64 %rd4, s;\ncvta.shared.u64 %rd4, %rd4;\nmapa.u64 %rd5, %rd4, 0;\nmbarrier.arrive.b64 _, [%rd5];\n\
        mbarrier.test_wait.parity.shared.b64 %p1, [%r3], 0;\nselp.u32 %r5, 1, 0, %p1;\nst.global.u32 [%rd1], %r5;\n\
        getctarank.shared::cluster.u32 %r5, %r4;\nst.global.u32 [%rd1+4], %r5;\ngetctarank.u64 %r5, %rd5;\n\
        st.global.u32 [%rd1+8], %r5;\nst.shared::cluster.u32 [%r4+8], 5;\nld.shared.u32 %r5, [%r3+8];\n\
        st.global.u32 [%rd1+12], %r5;\nisspacep.shared::cluster %p1, %rd5;\nselp.u32 %r5, 1, 0, %p1;\n\
        st.global.u32 [%rd1+16], %r5;\n";
    let mut k = Kernel::new(body);
    let out = k.words("out", &[9; 5]);
    k.ok(1, 1, &[out.0]);
    assert_eq!(k.read_words(out, 5), [1, 0, 0, 5, 1]);
    let found = Kernel::new("mapa.u64 %rd5, %rd1, 1;").wrong(1, 1, &[0], ErrorKind::Cluster);
    assert!(found.message.contains("block 1 of the cluster"), "{found}");
}

/// All lanes of several warps arrive, and wait where lanes of a warp are apart.
#[test]
fn lanes_that_are_apart() {
    let body = "mov.u32 %r3, s;\nsetp.eq.u32 %p1, %r1, 0;\n@%p1 mbarrier.init.shared.b64 [%r3], 96;\nbar.sync 0;\n\
        and.b32 %r4, %r1, 1;\nsetp.eq.u32 %p2, %r4, 0;\n@%p2 bra even;\n\
        odd:\nmbarrier.try_wait.parity.shared.b64 %p3, [%r3], 0;\n@!%p3 bra odd;\nbra meet;\n\
        even:\nmbarrier.arrive.shared.b64 %rd4, [%r3], 2;\n\
        meet:\nmad.wide.u32 %rd5, %r1, 4, %rd1;\nst.global.u32 [%rd5], %r1;\n";
    for seed in [None, Some(1), Some(2), Some(3)] {
        let options = ptxvm::Options { seed, ..Default::default() };
        let mut k = Kernel::with(body, options);
        let out = k.words("out", &[9; 96]);
        k.ok(1, 96, &[out.0]);
        assert_eq!(k.read_words(out, 96), (0..96).collect::<Vec<u32>>());
    }
}
