//! The sequences' books.

use bon_engine::device::sequence::{Recordings, Step, Steps, Verdict};
use bon_engine::device::{Arg, Kernel, Launch, Ptr};

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
    assert!(given == steps && self::sequence(&given) == sequence, "{given:?}");
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
