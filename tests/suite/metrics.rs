//! What a run says of its steps: metrics.jsonl and TensorBoard's events, also after it was resumed.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use bon_engine::train::metrics::{EvalMetrics, Metrics, MetricsError, PhaseSeconds, StepMetrics};

fn step(step: u64) -> StepMetrics {
    StepMetrics {
        step,
        loss: 0.1 * step as f64,
        kl: Some(0.25),
        token_entropy: 1.5 + step as f64,
        tokens: 1000 + step,
        verifier_failures: BTreeMap::from([("timeout".to_string(), step)]),
        seconds: PhaseSeconds { generate: 1.5, ..Default::default() },
        ..Default::default()
    }
}

/// Every event of a run's event files as TensorBoard reads them, with the checksums checked: the step, and for a
/// summary its tags and values. A session start drops what was said of its step and later ones.
fn scalars(run_dir: &Path) -> BTreeMap<(u64, String), f32> {
    fn varint(b: &mut &[u8]) -> u64 {
        let mut value = 0;
        for shift in (0..64).step_by(7) {
            let byte = b[0];
            *b = &b[1..];
            value |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                return value;
            }
        }
        panic!("a varint that does not end");
    }
    /// (field number, value): numbers as their bits, messages as their bytes.
    fn fields(mut b: &[u8]) -> Vec<(u64, u64, &[u8])> {
        let mut out = Vec::new();
        while !b.is_empty() {
            let key = varint(&mut b);
            let (number, bytes) = match key & 7 {
                0 => (varint(&mut b), &b[..0]),
                kind => {
                    let n = match kind {
                        1 => 8,
                        2 => varint(&mut b) as usize,
                        5 => 4,
                        other => panic!("wire type {other}"),
                    };
                    let (bytes, rest) = b.split_at(n);
                    b = rest;
                    (0, bytes)
                }
            };
            out.push((key >> 3, number, bytes));
        }
        out
    }
    let check = |data: &[u8], crc: &[u8]| {
        let stored = u32::from_le_bytes(crc.try_into().unwrap()).wrapping_sub(0xa282_ead8).rotate_left(15);
        assert_eq!(crc32c::crc32c(data), stored);
    };
    let mut files: Vec<_> =
        fs::read_dir(run_dir.join("tensorboard")).unwrap().map(|e| e.unwrap().path()).collect();
    files.sort();
    let mut found = BTreeMap::new();
    for file in files {
        let bytes = fs::read(file).unwrap();
        let mut rest = &bytes[..];
        let mut first = true;
        while !rest.is_empty() {
            check(&rest[..8], &rest[8..12]);
            let n = u64::from_le_bytes(rest[..8].try_into().unwrap()) as usize;
            let data = &rest[12..12 + n];
            check(data, &rest[12 + n..16 + n]);
            rest = &rest[16 + n..];

            let event = fields(data);
            let wall_time = f64::from_le_bytes(event[0].2.try_into().unwrap());
            assert!(event[0].0 == 1 && wall_time > 1.6e9);
            let step = event.iter().find(|f| f.0 == 2).map_or(0, |f| f.1);
            match event.last().unwrap() {
                (3, _, version) => assert!(first && *version == b"brain.Event:2"),
                (7, _, log) => {
                    assert_eq!(fields(log), [(1, 1, &[][..])]);
                    found.retain(|(s, _), _| *s < step);
                }
                (5, _, summary) => {
                    for (field, _, value) in fields(summary) {
                        let value = fields(value);
                        assert_eq!((field, value[0].0, value[1].0), (1, 1, 2));
                        let tag = String::from_utf8(value[0].2.to_vec()).unwrap();
                        found.insert((step, tag), f32::from_le_bytes(value[1].2.try_into().unwrap()));
                    }
                }
                other => panic!("{other:?}"),
            }
            first = false;
        }
    }
    found
}

#[test]
fn a_resumed_run_leaves_the_metrics_of_an_uninterrupted_one() {
    let dir = tempfile::tempdir().unwrap();
    let (whole, cut) = (dir.path().join("whole"), dir.path().join("cut"));
    let record = |dir: &Path, completed: u64, last: u64, factor: f64| {
        fs::create_dir_all(dir).unwrap();
        let mut metrics = Metrics::open(dir, completed).unwrap();
        for s in completed + 1..=last {
            metrics.step(&StepMetrics { lr: factor, ..step(s) }).unwrap();
            if s % 2 == 0 {
                metrics.eval(&EvalMetrics { step: s, pass_at_n: factor, ..Default::default() }).unwrap();
            }
        }
        metrics.sync().unwrap();
    };
    record(&whole, 0, 6, 1.0);
    // Killed in step 6, in the middle of a line; its last checkpoint was of step 3.
    record(&cut, 0, 3, 1.0);
    record(&cut, 3, 5, 9.0);
    let path = cut.join("metrics.jsonl");
    fs::write(&path, [&fs::read(&path).unwrap()[..], b"{\"step\":6,\"lo"].concat()).unwrap();
    record(&cut, 3, 6, 1.0);

    for file in ["metrics.jsonl", "eval.jsonl"] {
        let text = fs::read_to_string(whole.join(file)).unwrap();
        assert_eq!(text, fs::read_to_string(cut.join(file)).unwrap());
        assert_eq!(text.lines().count(), if file == "eval.jsonl" { 3 } else { 6 });
    }
    let lines = fs::read_to_string(whole.join("metrics.jsonl")).unwrap();
    let last: StepMetrics = serde_json::from_str(lines.lines().last().unwrap()).unwrap();
    assert_eq!(last, StepMetrics { lr: 1.0, ..step(6) });

    let events = scalars(&whole);
    assert_eq!(events, scalars(&cut));
    assert_eq!(events[&(6, "train/loss".into())], 0.1f32 * 6.0);
    assert_eq!(events[&(6, "train/seconds/generate".into())], 1.5);
    assert_eq!(events[&(6, "train/token_entropy".into())], 7.5);
    assert!(events.contains_key(&(6, "train/response_length".into())));
    assert!(events.contains_key(&(6, "train/truncated_share".into())));
    assert_eq!(events[&(6, "train/verifier_failures/timeout".into())], 6.0);
    assert_eq!(events[&(4, "eval/pass_at_n".into())], 1.0);
    assert!(!events.contains_key(&(6, "train/step".into())));
}

#[test]
fn metrics_that_are_not_ours_are_not_cut() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("metrics.jsonl");
    fs::write(&path, "{\"step\":1}\nnotes\n{\"step\":2}\n").unwrap();
    let error = Metrics::open(dir.path(), 5).unwrap_err();
    assert!(matches!(error, MetricsError::Line { line: 2, .. }), "{error}");
    assert_eq!(fs::read_to_string(&path).unwrap().lines().count(), 3);
}

/// Behind the last step of the checkpoint.
#[test]
fn a_torn_line_is_cut_off_wherever_it_was_torn() {
    let whole = "{\"step\":1}\n{\"step\":2}\n";
    for torn in ["{", "{\"step\":3", "{\"step\":3}"] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metrics.jsonl");
        fs::write(&path, format!("{whole}{torn}")).unwrap();
        let mut metrics = Metrics::open(dir.path(), 2).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), whole, "{torn}");
        metrics.step(&step(3)).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap().lines().count(), 3, "{torn}");
    }
}

#[test]
fn a_loss_that_is_not_a_number_stays_one_line_of_json() {
    let dir = tempfile::tempdir().unwrap();
    let mut metrics = Metrics::open(dir.path(), 0).unwrap();
    metrics.step(&StepMetrics { loss: f64::NAN, ..step(1) }).unwrap();
    let line: serde_json::Value =
        serde_json::from_str(&fs::read_to_string(dir.path().join("metrics.jsonl")).unwrap()).unwrap();
    assert!(line["loss"].is_null());
    assert!(!scalars(dir.path()).contains_key(&(1, "train/loss".into())));
}
