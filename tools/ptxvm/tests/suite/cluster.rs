//! Clusters: special registers, addresses in other blocks' shared memory, and the forms of the barrier, against plain arithmetic.

use ptxvm::error::ErrorKind;
use ptxvm::{Arg, Error, Gpu, Launch, Module, Options};

/// Launches the only kernel of a text, whose parameter is a buffer of `words` words, and gives what is in that.
fn run(text: &str, launch: &Launch, words: usize, options: Options) -> Result<Vec<u32>, Error> {
    let mut gpu = Gpu::new(options);
    let module = Module::load("cluster.ptx", text)?;
    let loaded = gpu.load(&module)?;
    let out = gpu.alloc_named(4 * words, "out")?;
    gpu.launch(&loaded, "k", launch, &[Arg::Ptr(out)])?;
    let mut bytes = vec![0; 4 * words];
    gpu.read(out, &mut bytes)?;
    Ok(bytes.chunks_exact(4).map(|b| u32::from_le_bytes(b.try_into().unwrap())).collect())
}

/// A kernel that finds its buffer in `out`, its thread in `i`, its rank in `c` and the cluster's size in `n`.
fn kernel(directives: &str, body: &str) -> String {
    format!(
        ".version 8.6\n.target sm_90\n.address_size 64\n.visible .entry k(.param .u64 at) {directives}\n{{\n\
         .reg .b32 b, c, e, i, n, r, s, t, u, v<4>, w, x, y;\n.reg .b64 a, g, out;\n.reg .pred p, q;\n\
         .shared .align 16 .b32 slots[64];\nld.param.u64 out, [at];\nmov.u32 i, %tid.x;\n\
         mov.u32 c, %cluster_ctarank;\nmov.u32 n, %cluster_nctarank;\nmov.u32 s, slots;\n{body}\nret;\n}}\n"
    )
}

const SYNC: &str = "barrier.cluster.arrive;\nbarrier.cluster.wait;\n";

/// The block's number in the grid, x fastest, into `b`.
const NUMBER: &str = "mov.u32 x, %ctaid.z;\nmov.u32 y, %nctaid.y;\nmul.lo.u32 b, x, y;\nmov.u32 x, %ctaid.y;\nadd.u32 b, b, x;\n\
    mov.u32 y, %nctaid.x;\nmul.lo.u32 b, b, y;\nmov.u32 x, %ctaid.x;\nadd.u32 b, b, x;\n";

#[test]
fn special_registers() {
    const NAMES: [&str; 17] = [
        "%clusterid.x",
        "%clusterid.y",
        "%clusterid.z",
        "%nclusterid.x",
        "%nclusterid.y",
        "%nclusterid.z",
        "%cluster_ctaid.x",
        "%cluster_ctaid.y",
        "%cluster_ctaid.z",
        "%cluster_nctaid.x",
        "%cluster_nctaid.y",
        "%cluster_nctaid.z",
        "%cluster_ctarank",
        "%cluster_nctarank",
        "%ctaid.x",
        "%ctaid.y",
        "%ctaid.z",
    ];
    let mut body = format!("{NUMBER}mad.wide.u32 out, b, {}, out;\n", 4 * (NAMES.len() + 1));
    for (k, name) in NAMES.iter().enumerate() {
        body += &format!("mov.u32 w, {name};\nst.global.u32 [out+{}], w;\n", 4 * k);
    }
    body += &format!(
        "mov.pred p, %is_explicit_cluster;\nselp.u32 w, 1, 0, p;\nst.global.u32 [out+{}], w;\n",
        4 * NAMES.len()
    );
    let per_block = NAMES.len() + 1;
    for (grid, cluster) in [
        ([4, 6, 4], Some([2, 3, 2])),
        ([6, 2, 1], Some([3, 1, 1])),
        ([2, 4, 3], Some([1, 4, 1])),
        ([3, 2, 2], None),
        ([3, 2, 2], Some([1, 1, 1])),
    ] {
        let launch = Launch { grid, cluster, ..Launch::linear(1, 1) };
        let words = grid.iter().product::<u32>() as usize * per_block;
        let got = run(&kernel("", &body), &launch, words, Options::default()).unwrap();
        let size = cluster.unwrap_or([1; 3]);
        for (b, got) in got.chunks(per_block).enumerate() {
            let b = b as u32;
            let at = [b % grid[0], b / grid[0] % grid[1], b / (grid[0] * grid[1])];
            let within: Vec<u32> = (0..3).map(|i| at[i] % size[i]).collect();
            let mut want: Vec<u32> = (0..3).map(|i| at[i] / size[i]).collect();
            want.extend((0..3).map(|i| grid[i] / size[i]));
            want.extend(&within);
            want.extend(size);
            want.push(within[0] + size[0] * within[1] + size[0] * size[1] * within[2]);
            want.push(size.iter().product());
            want.extend(at);
            want.push(u32::from(cluster.is_some()));
            assert_eq!(got, want, "grid {grid:?}, cluster {cluster:?}, block {at:?}");
        }
    }
}

/// Each block writes to all, by 32-bit and generic addresses, plainly and by atomics; reads of others' memory; ranks of addresses.
#[test]
fn addresses_in_all_blocks() {
    let body = format!(
        "mad.lo.u32 t, i, 4, s;\nmov.u32 w, 0;\nst.shared.v4.u32 [s+192], {{w, w, w, w}};\n{SYNC}\
         mov.u32 r, 0;\nall:\n\
         mad.lo.u32 u, c, 4, s;\nmapa.shared::cluster.u32 u, u, r;\n\
         mad.lo.u32 w, c, 16, r;\nst.shared::cluster.u32 [u], w;\n\
         cvt.u64.u32 a, s;\ncvta.shared.u64 a, a;\nmapa.u64 g, a, r;\nmad.wide.u32 g, c, 4, g;\nadd.u32 w, w, 1000;\nst.u32 [g+64], w;\n\
         mapa.u64 g, a, r;\nred.add.u32 [g+192], 1;\nmapa.shared::cluster.u32 u, s, r;\n\
         atom.shared::cluster.max.u32 v0, [u+196], c;\nred.relaxed.cluster.shared::cluster.or.b32 [u+200], 2;\n\
         getctarank.shared::cluster.u32 x, u;\ngetctarank.u64 y, g;\nadd.u32 x, x, y;\n\
         isspacep.shared::cluster p, g;\nisspacep.shared::cta q, g;\nselp.u32 y, 64, 0, p;\nselp.u32 e, 128, 0, q;\nadd.u32 x, x, y;\n\
         add.u32 x, x, e;\nmad.lo.u32 u, r, 4, s;\nst.shared.u32 [u+128], x;\n\
         add.u32 r, r, 1;\nsetp.lt.u32 p, r, n;\n@p bra all;\n{SYNC}\
         add.u32 r, c, 1;\nrem.u32 r, r, n;\n{NUMBER}mad.wide.u32 out, b, 256, out;\n\
         mov.u32 e, 0;\ncopy:\nadd.u32 u, s, e;\nmapa.shared::cluster.u32 u, u, r;\n\
         ld.shared::cluster.v4.u32 {{v0, v1, v2, v3}}, [u];\ncvt.u64.u32 g, e;\nadd.u64 g, out, g;\n\
         st.global.v4.u32 [g], {{v0, v1, v2, v3}};\nadd.u32 e, e, 16;\nsetp.lt.u32 p, e, 256;\n@p bra copy;\n{SYNC}"
    );
    let text = kernel("", &body).replace("mad.lo.u32 t, i, 4, s;\n", "mov.u32 t, 0;\nmov.u32 e, s;\nfill:\nst.shared.u32 [e], t;\nadd.u32 e, e, 4;\nadd.u32 w, s, 256;\nsetp.lt.u32 p, e, w;\n@p bra fill;\n");
    for n in [1, 2, 3, 8, 16] {
        let launch = Launch { cluster: Some([n, 1, 1]), ..Launch::linear(2 * n, 1) };
        let words = 2 * n as usize * 64;
        let want = run(&text, &launch, words, Options { threads: 1, ..Options::default() });
        let want = want.unwrap_or_else(|e| panic!("{n}: {e}"));
        for (b, got) in want.chunks(64).enumerate() {
            // What a block has copied is what the next one has.
            let of = (b as u32 % n + 1) % n;
            for from in 0..n {
                assert_eq!(got[from as usize], 16 * from + of, "{n}, {b}");
                assert_eq!(got[16 + from as usize], 16 * from + of + 1000, "{n}, {b}");
                // The rank twice, and whether it is shared memory of the cluster, and the own.
                let own = if from == of { 128 } else { 0 };
                assert_eq!(got[32 + from as usize], 2 * from + 64 + own, "{n}, {b}");
            }
            assert_eq!(got[48..51], [n, n - 1, 2], "{n}, {b}");
        }
        for threads in [2, 3, 8] {
            for seed in [None, Some(7)] {
                let got = run(&text, &launch, words, Options { threads, seed, ..Options::default() });
                assert_eq!(got.as_ref(), Ok(&want), "{threads} threads, seed {seed:?}");
            }
        }
    }
}

/// All forms of the barrier order what was stored before; lanes that are apart, that are missing, and that have left.
#[test]
fn forms_of_the_barrier() {
    for (arrive, wait) in [
        ("barrier.cluster.arrive;\n", "barrier.cluster.wait;\n"),
        ("barrier.cluster.arrive.aligned;\n", "barrier.cluster.wait.aligned;\n"),
        ("barrier.cluster.arrive.release;\n", "barrier.cluster.wait.acquire;\n"),
        ("barrier.cluster.arrive.release.aligned;\n", "barrier.cluster.wait.acquire.aligned;\n"),
        // The ISA's own example of a relaxed arrival.
        ("fence.acq_rel.cluster;\nbarrier.cluster.arrive.relaxed;\n", "barrier.cluster.wait;\n"),
        // What is exchanged lies in shared memory.
        (
            "fence.release.sync_restrict::shared::cta.cluster;\nbarrier.cluster.arrive.relaxed;\n",
            "barrier.cluster.wait;\nfence.acquire.sync_restrict::shared::cluster.cluster;\n",
        ),
        (
            "fence.proxy.async::generic.release.sync_restrict::shared::cta.cluster;\nbarrier.cluster.arrive.relaxed;\n",
            "barrier.cluster.wait;\n",
        ),
    ] {
        let sync = format!("{arrive}{wait}");
        let body = format!(
            "mad.lo.u32 t, i, 4, s;\nst.shared.u32 [t], i;\n{sync}\
             xor.b32 r, c, 1;\nmapa.shared::cluster.u32 u, t, r;\nld.shared::cluster.u32 w, [u];\n{sync}\
             add.u32 w, w, c;\n{NUMBER}mad.lo.u32 b, b, 40, i;\nmad.wide.u32 out, b, 4, out;\nst.global.u32 [out], w;\n"
        );
        let launch = Launch { cluster: Some([2, 1, 1]), ..Launch::linear(4, 40) };
        let want: Vec<u32> = (0..160).map(|k| k % 40 + k / 40 % 2).collect();
        for seed in [None, Some(1), Some(2)] {
            let got = run(&kernel("", &body), &launch, 160, Options { seed, ..Options::default() });
            assert_eq!(got.as_ref(), Ok(&want), "{arrive}{wait}");
        }
    }
    // Relaxed arrivals order what stands before a fence and nothing else, so that what they leave out is found.
    let relaxed = |first: &str| {
        kernel(
            "",
            &format!(
                "{first}barrier.cluster.wait;\nxor.b32 r, c, 1;\nmapa.shared::cluster.u32 u, s, r;\n\
                 ld.shared::cluster.u32 w, [u];\n{SYNC}{NUMBER}mad.wide.u32 out, b, 4, out;\nst.global.u32 [out], w;\n"
            ),
        )
    };
    let launch = Launch { cluster: Some([2, 1, 1]), ..Launch::linear(2, 1) };
    for first in [
        "st.shared.u32 [s], c;\nbarrier.cluster.arrive.relaxed;\n",
        "fence.acq_rel.cluster;\nst.shared.u32 [s], c;\nbarrier.cluster.arrive.relaxed;\n",
    ] {
        let found = run(&relaxed(first), &launch, 2, Options::default());
        assert!(matches!(found, Err(Error::Fault(f)) if f[0].kind == ErrorKind::SharedRace), "{first}");
    }
    // Half of the lanes leave before, some arrive on one side of a branch and some on the other, a whole warp has left.
    let body = format!(
        "setp.ge.u32 p, i, 48;\n@p exit;\nand.b32 x, i, 1;\nsetp.eq.u32 q, x, 0;\n@q bra even;\nbarrier.cluster.arrive;\nbra both;\n\
         even:\nbarrier.cluster.arrive;\nboth:\nbarrier.cluster.wait;\n\
         {NUMBER}mad.lo.u32 b, b, 48, i;\nmad.wide.u32 out, b, 4, out;\nst.global.u32 [out], i;\n"
    );
    let launch = Launch { cluster: Some([4, 1, 1]), ..Launch::linear(4, 96) };
    let want: Vec<u32> = (0..192).map(|k| k % 48).collect();
    assert_eq!(run(&kernel("", &body), &launch, 192, Options::default()), Ok(want));
}

/// The kernel's directives: a cluster of its own, a grid that is counted in clusters, and limits.
#[test]
fn directives() {
    let body = format!("{NUMBER}mad.wide.u32 out, b, 4, out;\nst.global.u32 [out], n;\n");
    let plain = Launch::linear(4, 1);
    for (directives, launch, want) in [
        (".reqnctapercluster 2", plain, Ok(vec![2; 4])),
        (".explicitcluster .reqnctapercluster 4, 1, 1", plain, Ok(vec![4; 4])),
        (".reqnctapercluster 2 .blocksareclusters", Launch::linear(2, 1), Ok(vec![2; 4])),
        (".explicitcluster", Launch { cluster: Some([2, 1, 1]), ..plain }, Ok(vec![2; 4])),
        (".maxclusterrank 2", Launch { cluster: Some([2, 1, 1]), ..plain }, Ok(vec![2; 4])),
        (".maxclusterrank 2", Launch { cluster: Some([4, 1, 1]), ..plain }, Err("1 to 2 blocks")),
        (".explicitcluster", plain, Err("names no size")),
        ("", Launch { cluster: Some([3, 1, 1]), ..plain }, Err("no multiple of the cluster")),
        ("", Launch { cluster: Some([0, 1, 1]), ..plain }, Err("1 to 16 blocks")),
        (".reqnctapercluster 32", plain, Err("clusters of 32 blocks")),
        (".blocksareclusters", plain, Err("without .reqnctapercluster")),
    ] {
        let got = run(&kernel(directives, &body), &launch, 4, Options::default());
        match want {
            Ok(want) => assert_eq!(got, Ok(want), "{directives}"),
            Err(what) => {
                assert!(got.as_ref().is_err_and(|e| e.to_string().contains(what)), "{directives}: {got:?}")
            }
        }
    }
}
