//! A run's checkpoints: what they give back, and what damage and kills leave of them.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::time::Duration;

use bon_engine::checkpoint::Dtype;
use bon_engine::train::snapshot::{
    Array, Arrays, SnapshotError, Snapshots, TrainState, newest_valid, write_arrays,
};

use crate::child::{child, child_dir, say, wait_for};

fn save(snapshots: &Snapshots, step: u64) {
    let state =
        TrainState { step, config_hash: 2, data_hash: 3, device: "cpu".into(), inputs: BTreeMap::new() };
    let m: Vec<f32> = (0..6).map(|i| (i * step) as f32).collect();
    let v = [step as f32; 4];
    snapshots
        .save(
            &state,
            |dir| {
                fs::create_dir(dir)?;
                fs::write(dir.join("config.json"), "{}")?;
                Ok(fs::write(dir.join("model.safetensors"), vec![step as u8; 3000])?)
            },
            |path| {
                let little_endian = |x: &[f32]| x.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>();
                Ok(write_arrays(
                    path,
                    [
                        ("m.w".to_string(), Array::new(Dtype::F32, 2, 3, || little_endian(&m).into())),
                        ("v.w".to_string(), Array::new(Dtype::F32, 1, 4, || little_endian(&v).into())),
                    ],
                )?)
            },
        )
        .unwrap();
}

#[test]
fn a_checkpoint_gives_back_what_was_saved() {
    let dir = tempfile::tempdir().unwrap();
    assert!(newest_valid(&dir.path().join("none")).unwrap().snapshot.is_none());
    let snapshots = Snapshots::open(&dir.path().join("run/checkpoints"), 2).unwrap();
    assert!(snapshots.newest_valid().unwrap().snapshot.is_none());
    save(&snapshots, 7);
    let snapshot = snapshots.newest_valid().unwrap().snapshot.unwrap();
    assert!(snapshot.path.ends_with("run/checkpoints/step-000007"));
    assert_eq!(
        snapshot.state,
        TrainState { step: 7, config_hash: 2, data_hash: 3, device: "cpu".into(), inputs: BTreeMap::new() }
    );
    assert_eq!(fs::read(snapshot.model_dir().join("model.safetensors")).unwrap(), vec![7; 3000]);
    let arrays = Arrays::open(&snapshot.optimizer_path()).unwrap();
    let m: &[f32] = bytemuck::cast_slice(arrays.bytes("m.w", Dtype::F32, 2, 3).unwrap());
    assert_eq!(m, [0.0, 7.0, 14.0, 21.0, 28.0, 35.0]);
    assert_eq!(bytemuck::cast_slice::<u8, f32>(arrays.bytes("v.w", Dtype::F32, 1, 4).unwrap()), [7.0; 4]);

    let shape = arrays.bytes("m.w", Dtype::F32, 3, 2).unwrap_err().to_string();
    assert!(shape.ends_with("`m.w` is F32 [2, 3]; the model needs F32 [3, 2]"), "{shape}");
    assert!(matches!(arrays.bytes("w", Dtype::F32, 1, 1), Err(SnapshotError::Arrays { .. })));
    assert!(Arrays::open(&snapshot.path.join("state.json")).is_err());
}

#[test]
fn any_damage_is_found_and_the_older_checkpoint_taken() {
    let dir = tempfile::tempdir().unwrap();
    let snapshots = Snapshots::open(dir.path(), 5).unwrap();
    save(&snapshots, 1);
    save(&snapshots, 2);
    let newer = dir.path().join("step-000002");
    let files = [
        "manifest.json",
        "state.json",
        "optimizer.safetensors",
        "model/config.json",
        "model/model.safetensors",
    ];
    let falls_back = |file: &Path, how: &str| {
        let newest = snapshots.newest_valid().unwrap();
        assert_eq!(
            newest.snapshot.map(|s| s.state.step),
            Some(1),
            "{how} of {} was not seen",
            file.display()
        );
        let [(path, error)] = &newest.passed_over[..] else { panic!("{:?}", newest.passed_over) };
        assert_eq!(*path, newer);
        // Damage to the manifest may show as a mismatch of any file.
        assert!(error.to_string().contains("step-000002/"), "{error}");
        if !file.ends_with("manifest.json") {
            assert!(error.to_string().contains(&*file.to_string_lossy()), "{error}");
        }
    };
    for file in files {
        let file = newer.join(file);
        let whole = fs::read(&file).unwrap();
        for i in 0..whole.len().min(1500) {
            let mut bytes = whole.clone();
            bytes[i] ^= 1;
            fs::write(&file, &bytes).unwrap();
            falls_back(&file, &format!("a flip at {i}"));
        }
        for cut in [0, 1, whole.len() / 2, whole.len() - 1] {
            fs::write(&file, &whole[..cut]).unwrap();
            falls_back(&file, &format!("a cut to {cut}"));
        }
        fs::write(&file, [&whole[..], b"}"].concat()).unwrap();
        falls_back(&file, "a longer version");
        fs::remove_file(&file).unwrap();
        falls_back(&file, "the loss");
        fs::write(&file, &whole).unwrap();
        assert_eq!(snapshots.newest_valid().unwrap().snapshot.unwrap().state.step, 2);
    }
    fs::rename(&newer, dir.path().join("step-000003")).unwrap();
    let newest = snapshots.newest_valid().unwrap();
    assert_eq!(newest.snapshot.unwrap().state.step, 1);
    assert!(newest.passed_over[0].1.to_string().contains("is of step 2"));
}

fn saves_until_killed(dir: &Path) {
    let snapshots = Snapshots::open(dir, 1).unwrap();
    let newest = snapshots.newest_valid().unwrap();
    assert!(newest.passed_over.is_empty(), "{:?}", newest.passed_over);
    let first = newest.snapshot.map_or(1, |s| s.state.step + 1);
    for step in first..first + 1000 {
        save(&snapshots, step);
        say(&format!("\nsaved {step}"));
    }
}

#[test]
fn a_kill_at_any_moment_leaves_a_usable_checkpoint() {
    if let Some(dir) = child_dir() {
        return saves_until_killed(&dir);
    }
    let dir = tempfile::tempdir().unwrap();
    let saved = |line: &str| line.strip_prefix("saved ").map(|s| s.parse::<u64>().unwrap());
    let mut before = 0;
    for round in 0..25u64 {
        let (mut process, mut lines) =
            child(concat!(module_path!(), "::a_kill_at_any_moment_leaves_a_usable_checkpoint"), dir.path());
        let mut last = wait_for(&mut lines, saved).expect("the child saves once");
        assert_eq!(last, before + 1, "the child goes on from the newest checkpoint");
        // Saves take a few milliseconds: the delays fall all over one.
        std::thread::sleep(Duration::from_micros(round * 977));
        process.kill().unwrap();
        assert_eq!(process.wait().unwrap().signal(), Some(9));
        while let Some(step) = wait_for(&mut lines, saved) {
            last = step;
        }
        // As a start finds it: what is complete but for its name counts.
        let newest = Snapshots::open(dir.path(), 1).unwrap().newest_valid().unwrap();
        assert!(newest.passed_over.is_empty(), "{:?}", newest.passed_over);
        before = newest.snapshot.expect("a checkpoint survives").state.step;
        assert!(before == last || before == last + 1, "{last} was saved, {before} is left");
    }
}
