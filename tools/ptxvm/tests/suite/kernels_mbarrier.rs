//! mbarrier.cu: barriers and pipelines of a block, right and silent, and a wrong twin of each.

use ptxvm::Error;
use ptxvm::error::ErrorKind;

use crate::kernels::{BUILDS, Build, Device, Rng};

const N: usize = 256;
const WRONG: &[&str] = &["-O3", "-lineinfo", "-DWRONG"];

/// Kernel, threads of a block, numbers of a tile, and what is found in its twin.
const KERNELS: [(&str, usize, usize, ErrorKind); 4] = [
    ("reverse", N, N, ErrorKind::SharedRace),
    ("ring", N, N - 32, ErrorKind::SharedRace),
    ("pipe_unified", N, N, ErrorKind::AsyncRace),
    ("pipe_roles", N + 32, N, ErrorKind::AsyncRace),
];

#[test]
fn barriers_and_pipelines_of_a_block() {
    for build in BUILDS {
        let mut d = Device::new("mbarrier.cu", build);
        for (kernel, threads, width, _) in KERNELS {
            for tiles in [1, 2, 3, 7] {
                let x = Rng(tiles as u64).vec(width * tiles, |r| r.below(1000) as f32);
                let scale = if kernel == "ring" { 2.0 } else { 1.0 };
                let want: Vec<f32> =
                    x.chunks(width).flat_map(|tile| tile.iter().rev().map(|v| scale * v)).collect();
                let (a, b) = (d.upload(&x), d.empty::<f32>(x.len()));
                d.run(kernel, 1, threads, &[&a, &b, &(tiles as i32)]);
                assert_eq!(d.download::<f32>(b, x.len()), want, "{build:?} {kernel}, {tiles} tiles");
            }
        }
    }
}

#[test]
fn wrong_twins() {
    for arch in ["80", "90"] {
        for (kernel, threads, width, kind) in KERNELS {
            let mut d = Device::new("mbarrier.cu", Build { arch, flags: WRONG });
            let x = Rng(5).vec(width * 7, |r| r.below(1000) as f32);
            let (a, b) = (d.upload(&x), d.empty::<f32>(x.len()));
            let found = d.try_run(kernel, [1, 1, 1], [threads as u32, 1, 1], 0, false, &[&a, &b, &7i32]);
            let Err(Error::Fault(found)) = found else { panic!("{kernel} for sm_{arch}: {found:?}") };
            assert!(found.iter().any(|f| f.kind == kind), "{kernel} for sm_{arch}: {found:#?}");
            let line =
                |f: &ptxvm::error::Finding| f.at.source.as_ref().is_some_and(|s| s.contains("mbarrier.cu"));
            assert!(found.iter().any(line), "{kernel} for sm_{arch}: {found:#?}");
        }
    }
}
