//! tiles.cu, atomics.cu, sync.cu and groups.cu.

use ptxvm::Error;
use ptxvm::error::ErrorKind;

use crate::kernels::{BUILDS, Device, Rng, Round, SM80, SM90, U32, bf16, f16, near};

#[test]
fn aggregated_filters() {
    for build in BUILDS {
        let mut d = Device::new("tiles.cu", build);
        let x = Rng(41).vec(777, |r| r.below(1000) as i32);
        let mut want: Vec<i32> = x.iter().copied().filter(|v| v % 3 == 0).collect();
        want.sort_unstable();
        for entry in ["filter_aggregated", "filter_coalesced"] {
            let (a, b, count) = (d.upload(&x), d.empty::<i32>(777), d.upload(&[0i32]));
            d.run(entry, 7, 128, &[&a, &b, &count, &777i32]);
            assert_eq!(d.download::<i32>(count, 1)[0] as usize, want.len(), "{build:?} {entry}");
            let mut got = d.download::<i32>(b, want.len());
            got.sort_unstable();
            assert_eq!(got, want, "{build:?} {entry}");
        }
    }
}

#[test]
fn votes() {
    // Where the lanes of an `if` meet again is the compiler's choice in debug code, so only optimised builds here.
    for build in [SM80, SM90] {
        let mut d = Device::new("tiles.cu", build);
        let mut rng = Rng(42);
        let mut x = rng.vec(96, |r| r.below(15) as i32 - 7);
        x[32..64].fill(3); // a warp of equals
        let (a, b) = (d.upload(&x), d.empty::<u32>(96 * 12));
        d.run("votes", 1, 96, &[&a, &b]);
        let got = d.download::<u32>(b, 96 * 12);
        for (i, v) in x.iter().enumerate() {
            let warp = &x[i / 32 * 32..i / 32 * 32 + 32];
            let lanes = |f: &dyn Fn(i32) -> bool| -> u32 {
                warp.iter().enumerate().map(|(l, v)| u32::from(f(*v)) << l).sum()
            };
            let lane = i as u32 % 32;
            let below = (1u32 << lane) - 1;
            let want = [
                lanes(&|w| w > 0),
                if v & 1 != 0 { lanes(&|w| w & 1 != 0 && w > 2) } else { 0 },
                u32::from(warp.iter().any(|w| *w > 6)),
                u32::from(warp.iter().all(|w| *w > -6)),
                u32::from(warp.iter().all(|w| (*w > 0) == (*v > 0))),
                lanes(&|w| w == *v),
                if warp.iter().all(|w| w == v) { u32::MAX ^ 1 } else { 0 },
                lanes(&|w| w == *v),
                0,
                1 << lane,
                u32::MAX,
                !(below << 1 | 1),
            ];
            assert_eq!(got[i * 12..i * 12 + 12], want, "{build:?} thread {i}");
        }
    }
}

#[test]
fn shuffles() {
    for build in BUILDS {
        let mut d = Device::new("tiles.cu", build);
        let x = Rng(43).vec(64, Rng::f64);
        let (a, b) = (d.upload(&x), d.empty::<f64>(640));
        d.run("shuffles", 2, 32, &[&a, &b]);
        let got = d.download::<f64>(b, 640);
        for i in 0..64usize {
            let (w, l) = (&x[i / 32 * 32..][..32], i % 32);
            let part = |width: usize| l / width * width;
            let want = [
                w[(l * 7 + 3) % 32],
                w[part(8) + (l ^ 5) % 8],
                w[if l >= 3 { l - 3 } else { l }],
                w[if l % 4 >= 2 { l - 2 } else { l }],
                w[if l + 9 < 32 { l + 9 } else { l }],
                w[if l % 16 < 15 { l + 1 } else { l }],
                w[l ^ 21],
                // xor 9 leaves the group of 8: a group behind may be read, a group ahead may not.
                w[if (l ^ 9) < part(8) + 8 { l ^ 9 } else { l }],
                w[if l < 16 { 15 - l } else { 47 - l }],
                w[if l % 2 == 1 { 1 } else { 30 }],
            ];
            assert_eq!(got[i * 10..i * 10 + 10], want, "{build:?} thread {i}");
        }
    }
}

#[test]
fn tiles() {
    for build in BUILDS {
        let mut d = Device::new("tiles.cu", build);
        let mut rng = Rng(44);
        for (entry, size) in
            [("normalize_tilesILi4", 4usize), ("normalize_tilesILi16", 16), ("normalize_tilesILi32", 32)]
        {
            let x = rng.f32s(192);
            let (a, b) = (d.upload(&x), d.empty::<f32>(192));
            d.run(entry, 3, 64, &[&a, &b]);
            for (i, got) in d.download::<f32>(b, 192).into_iter().enumerate() {
                let tile = &x[i / size * size..][..size];
                let length = tile.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>().sqrt();
                let want = f64::from(x[i]) / length;
                near(f64::from(got), want, (size as f64 + 8.0) * U32 * want.abs(), (build, entry, i));
            }
        }
        let x = rng.vec(128, |r| r.u32() as i32);
        let (a, b) = (d.upload(&x), d.empty::<i32>(12));
        d.run("group_extremes", 2, 64, &[&a, &b]);
        let want: Vec<i32> = x
            .chunks(32)
            .flat_map(|w| {
                [*w.iter().min().unwrap(), *w.iter().max().unwrap(), w.iter().fold(0, |a, b| a ^ b)]
            })
            .collect();
        assert_eq!(d.download::<i32>(b, 12), want, "{build:?}");
    }
}

#[test]
fn atomic_integers() {
    for build in BUILDS {
        let mut d = Device::new("atomics.cu", build);
        let n = 300usize;
        let x = Rng(45).vec(n, |r| r.u32() as i32);
        let start: [i32; 13] = [1, 2, 5, -5, 9, 9, -1, 0, 3, 10, 50, 0, 0];
        let wide: [u64; 10] = [5, 0, 0, u64::MAX, 0, u64::MAX, 0, 1, 0, 0];
        let (a, b, c) = (d.upload(&x), d.upload(&start), d.upload(&wide));
        d.run("atomic_integers", 3, 128, &[&a, &b, &c, &(n as i32)]);
        let mut want = start;
        let mut far = wide;
        for v in x {
            let l = i64::from(v);
            want[0] = want[0].wrapping_add(v);
            want[1] = want[1].wrapping_sub(v);
            want[2] = want[2].min(v);
            want[3] = want[3].max(v);
            want[4] = (want[4] as u32).min(v as u32) as i32;
            want[5] = (want[5] as u32).max(v as u32) as i32;
            want[6] &= v | 0x00ff_00f0;
            want[7] |= v & 0x0ff0;
            want[8] ^= v;
            want[9] = if want[9] >= 99 { 0 } else { want[9] + 1 };
            want[10] = if want[10] == 0 || want[10] > 77 { 77 } else { want[10] - 1 };
            (want[11], want[12]) = (42, 7);
            far[0] = far[0].wrapping_add(l as u64);
            far[1] = (far[1] as i64).min(l << 20) as u64;
            far[2] = (far[2] as i64).max(l << 20) as u64;
            far[3] = far[3].min(l as u64);
            far[4] = far[4].max(l as u64);
            far[5] &= !(1 << (v & 63));
            far[6] |= 1 << (v & 63);
            far[7] ^= 0x0123_4567_89ab_cdefu64.wrapping_mul(l as u64);
            (far[8], far[9]) = (43, 9);
        }
        assert_eq!(d.download::<i32>(b, 13), want, "{build:?}");
        assert_eq!(d.download::<u64>(c, 10), far, "{build:?}");
    }
}

#[test]
fn atomic_results_and_shared() {
    for build in BUILDS {
        let mut d = Device::new("atomics.cu", build);
        let (counter, taken) = (d.upload(&[0u32]), d.empty::<u32>(5 * 70));
        d.run("tickets", 5, 70, &[&counter, &taken]);
        let mut got = d.download::<u32>(taken, 350);
        got.sort_unstable();
        assert_eq!(
            got,
            (0..5).flat_map(|b| (0..70).map(move |t| b << 16 | t)).collect::<Vec<u32>>(),
            "{build:?}"
        );

        let x = Rng(46).vec(300, Rng::u32);
        let (a, out) = (d.upload(&x), d.empty::<u64>(15));
        d.run("atomic_shared", 3, 128, &[&a, &out, &300i32]);
        let want: Vec<u64> = x
            .chunks(128)
            .flat_map(|part| {
                [
                    u64::from(part.iter().fold(0u32, |s, v| s.wrapping_add(*v))),
                    u64::from(*part.iter().min().unwrap()),
                    u64::from(*part.iter().max().unwrap()),
                    part.iter().fold(0, |s: u64, v| s.wrapping_add(u64::from(*v) * u64::from(*v))),
                    part.iter().map(|v| u64::from(v & 15)).sum(),
                ]
            })
            .collect();
        assert_eq!(d.download::<u64>(out, 15), want, "{build:?}");
    }
}

#[test]
fn atomic_floats() {
    for build in BUILDS {
        let mut d = Device::new("atomics.cu", build);
        let x = Rng(47).vec(200, |r| r.below(9) as f32); // sums below 2048: exact in f16
        let (a, f, b) = (d.upload(&x), d.upload(&[0f32, -1.0, 0.0]), d.upload(&[0f64; 2]));
        let (h, bf) = (d.upload(&[0u16; 4]), d.upload(&[0u16; 4]));
        d.run("atomic_floats", 2, 128, &[&a, &f, &b, &h, &bf, &200i32]);
        let sum: f32 = x.iter().sum();
        let top = x.iter().copied().fold(-1.0, f32::max);
        assert_eq!(d.download::<f32>(f, 3), [sum, top, 5.0], "{build:?}");
        assert_eq!(d.download::<f64>(b, 2), [f64::from(sum); 2], "{build:?}");
        let half: f64 = x[..50].iter().map(|v| f64::from(*v)).sum();
        let want = [half, -half, half, 0.0].map(|v| f16(v, Round::Nearest));
        assert_eq!(d.download::<u16>(h, 4), want, "{build:?}");
        let want = [50.0, 0.0, 50.0, 100.0].map(|v| bf16(v, Round::Nearest));
        assert_eq!(d.download::<u16>(bf, 4), want, "{build:?}");
    }
}

#[test]
fn locks_and_flags() {
    for build in BUILDS {
        let mut d = Device::new("atomics.cu", build);
        let x = Rng(48).vec(24, Rng::f64);
        let (lock, count, mean, a) = (d.upload(&[0i32]), d.upload(&[0i32]), d.upload(&[0f64]), d.upload(&x));
        d.run("spin_lock", 24, 64, &[&lock, &count, &mean, &a]);
        assert_eq!(d.download::<i32>(count, 1), [24], "{build:?}");
        near(d.download::<f64>(mean, 1)[0], x.iter().sum::<f64>() / 24.0, 1e-14, build);

        let (lock, value) = (d.upload(&[0i32]), d.upload(&[0i32]));
        d.run("spin_lock_lanes", 2, 48, &[&lock, &value]);
        let want = (0..96).fold(0i32, |v, _| v.wrapping_mul(3).wrapping_add(1));
        assert_eq!(d.download::<i32>(value, 1), [want], "{build:?}");

        let (flags, payload) = (d.upload(&[0u32; 9]), d.empty::<i32>(9 * 64));
        d.run("message_ring", 9, 64, &[&flags, &payload]);
        let want: Vec<i32> = (0..9).flat_map(|b| (0..64).map(move |t| (t + b) % 64 + b + 1)).collect();
        assert_eq!(d.download::<i32>(payload, 9 * 64), want, "{build:?}");

        let out = d.empty::<i32>(1);
        d.run("warp_relay", 1, 160, &[&out]);
        assert_eq!(d.download::<i32>(out, 1), [(0..5).fold(1, |v, w| v * 5 + w)], "{build:?}");
    }
}

#[test]
fn named_barriers() {
    for build in BUILDS {
        let mut d = Device::new("sync.cu", build);
        let rounds = 7;
        let x: Vec<i32> = (0..64 * rounds).collect();
        let (a, b) = (d.upload(&x), d.empty::<i32>(x.len()));
        d.run("producer_consumer", 1, 128, &[&a, &b, &rounds]);
        let want: Vec<i32> =
            (0..rounds).flat_map(|i| (0..64).map(move |t| (i * 64 + 63 - t) * 3 + i)).collect();
        assert_eq!(d.download::<i32>(b, x.len()), want, "{build:?}");

        let b = d.empty::<i32>(256);
        d.run("half_barriers", 2, 128, &[&b]);
        let want: Vec<i32> = (0..256)
            .map(|i| {
                let trips = if i % 128 >= 64 { 5 } else { 9 };
                (i % 64 + trips) % 64 + trips
            })
            .collect();
        assert_eq!(d.download::<i32>(b, 256), want, "{build:?}");
    }
}

#[test]
fn grid_barrier() {
    for build in BUILDS {
        let mut d = Device::new("sync.cu", build);
        let (n, steps) = (500usize, 5);
        let mut x = Rng(49).f32s(n);
        let (a, b) = (d.upload(&x), d.empty::<f32>(n));
        let (count, rounds) = (n as i32, steps);
        let args: [&dyn crate::kernels::ToArg; 4] = [&a, &b, &count, &rounds];
        d.try_run("grid_diffusion", [8, 1, 1], [64, 1, 1], 0, true, &args)
            .unwrap_or_else(|e| panic!("{build:?}: {e}"));
        let mut wide: Vec<f64> = x.iter().map(|v| f64::from(*v)).collect();
        for _ in 0..steps {
            wide = (0..n)
                .map(|i| 0.25 * wide[(i + n - 1) % n] + 0.5 * wide[i] + 0.25 * wide[(i + 1) % n])
                .collect();
        }
        x = d.download::<f32>(if steps % 2 == 1 { b } else { a }, n);
        for (i, want) in wide.into_iter().enumerate() {
            near(f64::from(x[i]), want, 3.0 * 5.0 * U32, (build, i));
        }
    }
}

#[test]
fn cooperative_groups_of_the_grid() {
    for build in BUILDS {
        let mut d = Device::new("groups.cu", build);
        let x = Rng(60).vec(5 * 64, |r| r.below(100) as i32);
        let (a, parts, out) = (d.upload(&x), d.empty::<i32>(5), d.empty::<i32>(15));
        let args: [&dyn crate::kernels::ToArg; 3] = [&a, &parts, &out];
        // Twice: the counter that the first launch leaves is of no concern to the second.
        for _ in 0..2 {
            d.try_run("grid_sums", [5, 1, 1], [64, 1, 1], 0, true, &args)
                .unwrap_or_else(|e| panic!("{build:?}: {e}"));
        }
        let all: i32 = x.iter().sum();
        let want: Vec<i32> = (0..15).map(|i| all + i / 5 * 5).collect();
        assert_eq!(d.download::<i32>(out, 15), want, "{build:?}");

        let (parts, out) = (d.empty::<i32>(5), d.empty::<i32>(5));
        let args: [&dyn crate::kernels::ToArg; 2] = [&parts, &out];
        let kind = |result: Result<_, Error>| match result {
            Err(Error::Fault(found)) => found[0].kind,
            other => panic!("{build:?}: {other:?}"),
        };
        let unordered = d.try_run("grid_sums_unordered", [5, 1, 1], [64, 1, 1], 0, true, &args);
        assert_eq!(kind(unordered), ErrorKind::GlobalRace, "{build:?}");
        // Without a cooperative launch there is no workspace, as on hardware.
        let alone = d.try_run("grid_sums_unordered", [5, 1, 1], [64, 1, 1], 0, false, &args);
        assert!(matches!(kind(alone), ErrorKind::OutOfBounds | ErrorKind::Trap), "{build:?}");
    }
}

#[test]
fn cooperative_groups_of_several_warps() {
    for build in BUILDS {
        for (entry, width) in [("tiles_of_64", 64usize), ("tiles_of_128", 128)] {
            let mut d = Device::new("groups.cu", build);
            let n = 3 * 256usize;
            let x = Rng(61).vec(n, |r| r.below(900) as i32);
            let (a, out) = (d.upload(&x), d.empty::<i32>(3 * n));
            d.run(entry, 3, 256, &[&a, &out, &(n as i32)]);
            let got = d.download::<i32>(out, 3 * n);
            for (i, _) in x.iter().enumerate() {
                let tile = &x[i / width * width..][..width];
                let want = [
                    tile.iter().sum(),
                    *tile.iter().max().unwrap(),
                    tile[0] + 1000 * i32::from(tile.contains(&7)),
                ];
                assert_eq!([got[i], got[n + i], got[2 * n + i]], want, "{build:?} {entry} {i}");
            }
        }
    }
}

#[test]
fn dynamic_shared_memory() {
    for build in BUILDS {
        let mut d = Device::new("sync.cu", build);
        let (threads, n) = (96usize, 250usize);
        let x = Rng(50).vec(n, Rng::f64);
        let (a, b) = (d.upload(&x), d.empty::<f64>(n));
        let shared = threads as u32 * 13;
        d.run_shared("dynamic_shared", 3, threads, shared, &[&a, &b, &(n as i32)]);
        for (i, got) in d.download::<f64>(b, n).into_iter().enumerate() {
            let index = |t: usize| (t * 37 + 11) % threads;
            let (block, t) = (i / threads * threads, i % threads);
            let v = x.get(block + index(t)).copied().unwrap_or(0.0);
            let sign = if index(t) & 1 == 1 { -1.0 } else { 1.0 };
            assert_eq!(got, v * sign + f64::from(shared), "{build:?} {i}");
        }
    }
}

#[test]
fn printf_assert_trap_heap() {
    for build in BUILDS {
        let mut d = Device::new("sync.cu", build);
        let mut x: Vec<i32> = (0..40).collect();
        let (a, b) = (d.upload(&x), d.empty::<i32>(40));
        d.run("print_and_check", 2, 32, &[&a, &b, &40i32]);
        assert_eq!(d.download::<i32>(b, 40), (1..41).collect::<Vec<_>>(), "{build:?}");

        x[17] = -1;
        let (a, b) = (d.upload(&x), d.upload(&[0i32; 64]));
        let faults = |r: Result<_, Error>| match r {
            Err(Error::Fault(findings)) => findings,
            other => panic!("{build:?}: {other:?}"),
        };
        let found = faults(
            d.try_run("print_and_check", [2, 1, 1], [32, 1, 1], 0, false, &[&a, &b, &40i32]).map(|_| ()),
        );
        assert_eq!(found[0].kind, ErrorKind::Trap, "{found:?}");
        assert!(found[0].message.contains("in[i] >= 0"), "{found:?}");
        let found = faults(d.try_run("trap_at", [1, 1, 1], [64, 1, 1], 0, false, &[&b, &37i32]).map(|_| ()));
        assert_eq!(found[0].kind, ErrorKind::Trap, "{found:?}");
        let threads = found[0].threads.as_ref().unwrap();
        assert_eq!((threads.warp, threads.lanes), (1, 1 << 5), "{found:?}");
        d.run("trap_at", 1, 64, &[&b, &64i32]);
        assert_eq!(d.download::<i32>(b, 64), [1; 64], "{build:?}");
        d.run("heap", 1, 40, &[&b]);
        assert_eq!(d.download::<i32>(b, 40), (0..40).collect::<Vec<_>>(), "{build:?}");
    }
}
