//! Tensor maps and tensor copies against a definition element by element, and the rules of maps.

use ptxvm::error::ErrorKind;
use ptxvm::{
    Arg, Error, Gpu, Launch, Module, Options, Swizzle, TensorMap, TensorMapError, TensorType, Tiled,
};

use crate::support::warp::Random;

/// A kernel for one direction: `load` copies a box to `data`, `store` copies `data` to a box.
fn text(rank: usize, bytes: usize, copy: &str) -> String {
    let coordinates: Vec<String> = (0..rank).map(|i| format!("x{i}")).collect();
    let place = format!("[a, {{{}}}]", coordinates.join(", "));
    let move_words = |each: &str| {
        format!(
            "shl.b32 n, i, 2;\n{{\n.reg .pred q;\nnext:\nsetp.lt.u32 q, n, {bytes};\n@!q bra end;\nadd.u32 r, s, n;\n\
             cvt.u64.u32 t, n;\nadd.u64 t, o, t;\n{each}\nadd.u32 n, n, 128;\nbra next;\nend:\n}}\n"
        )
    };
    let body = if copy.contains("complete_tx") {
        format!(
            "@p mbarrier.arrive.expect_tx.shared.b64 _, [m], {bytes};\n@p {copy} [s], {place}, [m];\nwait:\n\
             mbarrier.try_wait.parity.shared.b64 w, [m], 0;\n@!w bra wait;\n{}",
            move_words("ld.shared.u32 v, [r];\nst.global.u32 [t], v;")
        )
    } else {
        format!(
            "{}fence.proxy.async.shared::cta;\nbar.warp.sync 0xffffffff;\n@p {copy} {place}, [s];\n\
             @p cp.async.bulk.commit_group;\n@p cp.async.bulk.wait_group 0;\n",
            move_words("ld.global.u32 v, [t];\nst.shared.u32 [r], v;")
        )
    };
    format!(
        ".version 8.6\n.target sm_90\n.address_size 64\n.visible .entry k(.param .align 64 .b8 map[128], \
         .param .u64 data, .param .align 4 .b8 c[20])\n{{\n.reg .b32 s, m, x<5>, i, n, r, v;\n.reg .b64 a, t, o;\n\
         .reg .pred p, w;\n.shared .align 8 .b64 bar;\n.shared .align 1024 .b8 box[16384];\nmov.u32 i, %tid.x;\n\
         mov.u32 m, bar;\nmov.u32 s, box;\nmov.b64 a, map;\ncvta.param.u64 a, a;\nld.param.u64 o, [data];\n\
         ld.param.u32 x0, [c];\nld.param.u32 x1, [c+4];\nld.param.u32 x2, [c+8];\nld.param.u32 x3, [c+12];\n\
         ld.param.u32 x4, [c+16];\nsetp.eq.u32 p, i, 0;\n@p mbarrier.init.shared.b64 [m], 1;\n\
         bar.warp.sync 0xffffffff;\n{body}ret;\n}}\n"
    )
}

/// Everything about one copy, drawn at random.
#[derive(Debug)]
struct Case {
    ty: TensorType,
    dims: Vec<u64>,
    strides: Vec<u64>,
    boxes: Vec<u32>,
    steps: Vec<u32>,
    swizzle: Swizzle,
    fill_nan: bool,
    at: Vec<i32>,
}

impl Case {
    fn draw(random: &mut Random) -> Self {
        let mut below = |n: u64| random.next() % n;
        let types = [
            TensorType::U8,
            TensorType::Bf16,
            TensorType::F16,
            TensorType::F32,
            TensorType::U32,
            TensorType::F64,
        ];
        let ty = types[below(6) as usize];
        let rank = 1 + below(5) as usize;
        let swizzle = [Swizzle::None, Swizzle::B32, Swizzle::B64, Swizzle::B128][below(4) as usize];
        let inner = match swizzle {
            Swizzle::None => 16 * (1 + below(6)),
            Swizzle::B32 => 32,
            Swizzle::B64 => 64,
            Swizzle::B128 => 128,
        };
        let size = ty.bytes();
        let mut boxes = vec![(inner / size) as u32];
        // The box is at most 16 KiB.
        let mut left = 16384 / inner;
        for _ in 1..rank {
            let n = 1 + below(left.min(9));
            boxes.push(n as u32);
            left /= n;
        }
        let dims: Vec<u64> = (0..rank).map(|i| if i == 0 { 1 + below(40) } else { 1 + below(8) }).collect();
        let mut strides = Vec::new();
        let mut bytes = dims[0] * size;
        for dim in &dims[1..] {
            bytes = bytes.next_multiple_of(16) + 16 * below(3);
            strides.push(bytes);
            bytes *= dim;
        }
        let steps = (0..rank).map(|_| if below(3) == 0 { 1 + below(3) as u32 } else { 1 }).collect();
        let at = dims.iter().map(|dim| below(dim + 6) as i32 - 4).collect();
        let float = !matches!(ty, TensorType::U8 | TensorType::U32);
        Self { ty, dims, strides, boxes, steps, swizzle, fill_nan: float && below(2) == 0, at }
    }

    fn map(&self, address: u64) -> [u8; 128] {
        TensorMap::encode(&Tiled {
            ty: self.ty,
            address,
            dims: &self.dims,
            strides: &self.strides,
            boxes: &self.boxes,
            element_strides: &self.steps,
            swizzle: self.swizzle,
            fill_nan: self.fill_nan,
        })
        .unwrap_or_else(|e| panic!("{self:?}: {e}"))
    }

    /// Bytes of the tensor.
    fn bytes(&self) -> usize {
        let last: u64 =
            self.dims[1..].iter().zip(&self.strides).map(|(dim, stride)| (dim - 1) * stride).sum();
        (last + self.dims[0] * self.ty.bytes()) as usize
    }

    /// Elements that are copied in a dimension.
    fn count(&self, i: usize) -> usize {
        if i == 0 { self.boxes[0] as usize } else { self.boxes[i].div_ceil(self.steps[i]) as usize }
    }

    fn box_bytes(&self) -> usize {
        (0..self.dims.len()).map(|i| self.count(i)).product::<usize>() * self.ty.bytes() as usize
    }

    /// For each element of the box its offset in shared memory, and in the tensor.
    fn elements(&self) -> Vec<(usize, Option<usize>)> {
        let size = self.ty.bytes() as usize;
        let xored = match self.swizzle {
            Swizzle::None => 1,
            Swizzle::B32 => 2,
            Swizzle::B64 => 4,
            Swizzle::B128 => 8,
        };
        (0..self.box_bytes() / size)
            .map(|number| {
                let dense = number * size;
                // Rows of 128 bytes are 8 chunks of 16; the row's number exchanges them.
                let (line, chunk, within) = (dense / 128, dense / 16 % 8, dense % 16);
                let shared = line * 128 + (chunk ^ (line % xored)) * 16 + within;
                let mut rest = number;
                let mut offset = Some(0i64);
                for i in 0..self.dims.len() {
                    let step = if i == 0 { 1 } else { self.steps[i] as i64 };
                    let place = i64::from(self.at[i]) + (rest % self.count(i)) as i64 * step;
                    rest /= self.count(i);
                    let stride = if i == 0 { size as i64 } else { self.strides[i - 1] as i64 };
                    offset = offset
                        .filter(|_| place >= 0 && place < self.dims[i] as i64)
                        .map(|o| o + place * stride);
                }
                (shared, offset.map(|o| o as usize))
            })
            .collect()
    }

    fn args(&self, map: [u8; 128], data: ptxvm::DevicePtr) -> [Arg; 3] {
        let mut at = [0u8; 20];
        for (to, c) in at.chunks_exact_mut(4).zip(&self.at) {
            to.copy_from_slice(&c.to_le_bytes());
        }
        [Arg::Bytes(map.to_vec()), Arg::Ptr(data), Arg::Bytes(at.to_vec())]
    }
}

fn bytes(random: &mut Random, n: usize) -> Vec<u8> {
    (0..n).map(|_| random.next() as u8).collect()
}

fn launch(gpu: &mut Gpu, text: &str, args: &[Arg]) -> Result<(), Error> {
    let module = Module::load("tensor.ptx", text)?;
    let loaded = gpu.load(&module)?;
    gpu.launch(&loaded, "k", &Launch::linear(1, 32), args).map(|_| ())
}

#[test]
fn boxes_are_loaded() {
    let mut random = Random(31);
    for _ in 0..400 {
        let case = Case::draw(&mut random);
        let mut gpu = Gpu::new(Options::default());
        let tensor = bytes(&mut random, case.bytes());
        let from = gpu.alloc(tensor.len()).unwrap();
        gpu.write(from, &tensor).unwrap();
        let to = gpu.alloc(case.box_bytes()).unwrap();
        let rank = case.dims.len();
        let space = ["shared::cta", "shared::cluster"][random.next() as usize % 2];
        let mode = ["", ".tile"][random.next() as usize % 2];
        let copy = format!("cp.async.bulk.tensor.{rank}d.{space}.global{mode}.mbarrier::complete_tx::bytes");
        let text = text(rank, case.box_bytes(), &copy);
        launch(&mut gpu, &text, &case.args(case.map(from.0), to))
            .unwrap_or_else(|e| panic!("{case:?}\n{text}\n{e}"));
        let mut got = vec![0; case.box_bytes()];
        gpu.read(to, &mut got).unwrap();
        let size = case.ty.bytes() as usize;
        for (shared, offset) in case.elements() {
            let got = &got[shared..shared + size];
            match offset {
                Some(o) => assert_eq!(*got, tensor[o..o + size], "{case:?} at {shared}"),
                None if !case.fill_nan => assert!(got.iter().all(|b| *b == 0), "{case:?} at {shared}"),
                None => {
                    let nan = match case.ty {
                        TensorType::F16 => u16::from_le_bytes(got.try_into().unwrap()) & 0x7fff > 0x7c00,
                        TensorType::Bf16 => u16::from_le_bytes(got.try_into().unwrap()) & 0x7fff > 0x7f80,
                        TensorType::F32 => f32::from_le_bytes(got.try_into().unwrap()).is_nan(),
                        _ => f64::from_le_bytes(got.try_into().unwrap()).is_nan(),
                    };
                    assert!(nan, "{case:?} at {shared}: {got:?}");
                }
            }
        }
    }
}

#[test]
fn boxes_are_stored_and_added() {
    let mut random = Random(32);
    for round in 0..300 {
        let case = Case::draw(&mut random);
        let mut gpu = Gpu::new(Options::default());
        let mut tensor = bytes(&mut random, case.bytes());
        let to = gpu.alloc(tensor.len()).unwrap();
        gpu.write(to, &tensor).unwrap();
        let data = bytes(&mut random, case.box_bytes());
        let from = gpu.alloc(data.len()).unwrap();
        gpu.write(from, &data).unwrap();
        let (rank, size) = (case.dims.len(), case.ty.bytes() as usize);
        let adds = case.ty == TensorType::U32 && round % 2 == 0;
        let copy = match adds {
            true => format!("cp.reduce.async.bulk.tensor.{rank}d.global.shared::cta.add.tile.bulk_group"),
            false => format!("cp.async.bulk.tensor.{rank}d.global.shared::cta.tile.bulk_group"),
        };
        let text = text(rank, data.len(), &copy);
        launch(&mut gpu, &text, &case.args(case.map(to.0), from))
            .unwrap_or_else(|e| panic!("{case:?}\n{text}\n{e}"));
        for (shared, offset) in case.elements() {
            let (new, Some(o)) = (&data[shared..shared + size], offset) else { continue };
            if adds {
                let word = |b: &[u8]| u32::from_le_bytes(b.try_into().unwrap());
                let sum = word(&tensor[o..o + 4]).wrapping_add(word(new));
                tensor[o..o + 4].copy_from_slice(&sum.to_le_bytes());
            } else {
                tensor[o..o + size].copy_from_slice(new);
            }
        }
        let mut got = vec![0; tensor.len()];
        gpu.read(to, &mut got).unwrap();
        assert_eq!(got, tensor, "{case:?}");
    }
}

/// A map in shared memory is changed in every field, published, and used.
#[test]
fn kernels_change_maps() {
    let side = 64u64;
    let fields = "tensormap.replace.tile.global_address.shared::cta.b1024.b64 [m], o;
tensormap.replace.tile.rank.shared::cta.b1024.b32 [m], 1;
tensormap.replace.tile.box_dim.shared::cta.b1024.b32 [m], 0, 8;
tensormap.replace.tile.box_dim.shared::cta.b1024.b32 [m], 1, 4;
tensormap.replace.tile.global_dim.shared::cta.b1024.b32 [m], 0, 6;
tensormap.replace.tile.global_dim.shared::cta.b1024.b32 [m], 1, 64;
tensormap.replace.tile.global_stride.shared::cta.b1024.b64 [m], 0, 256;
tensormap.replace.tile.element_stride.shared::cta.b1024.b32 [m], 1, 2;
tensormap.replace.tile.elemtype.shared::cta.b1024.b32 [m], 7;
tensormap.replace.tile.interleave_layout.shared::cta.b1024.b32 [m], 0;
tensormap.replace.tile.swizzle_mode.shared::cta.b1024.b32 [m], 1;
tensormap.replace.tile.fill_mode.shared::cta.b1024.b32 [m], 1;
";
    let module = |fields: &str| {
        let lines: String = fields.lines().map(|line| format!("@p {line}\n")).collect();
        format!(
            ".version 8.6\n.target sm_90a\n.address_size 64\n.visible .entry k(.param .align 64 .b8 map[128], \
             .param .u64 data, .param .u64 out, .param .u64 copy)\n{{\n.reg .b32 s, m, b, i, v, r;\n.reg .b64 a, o, t, c;\n\
             .reg .pred p, w;\n.shared .align 8 .b64 bar;\n.shared .align 128 .b8 mine[128];\n\
             .shared .align 1024 .b8 box[1024];\nmov.u32 i, %tid.x;\nmov.u32 b, bar;\nmov.u32 s, box;\nmov.u32 m, mine;\n\
             ld.param.u64 o, [data];\nld.param.u64 t, [out];\nld.param.u64 c, [copy];\nmov.b64 a, map;\n\
             setp.eq.u32 p, i, 0;\n@p mbarrier.init.shared.b64 [b], 1;\nmad.lo.u32 r, i, 4, m;\n{{\n.reg .b64 q;\n\
             mad.wide.u32 q, i, 4, a;\nld.param.u32 v, [q];\n}}\nst.shared.u32 [r], v;\nbar.warp.sync 0xffffffff;\n{lines}\
             bar.warp.sync 0xffffffff;\n\
             tensormap.cp_fenceproxy.global.shared::cta.tensormap::generic.release.gpu.sync.aligned [c], [m], 128;\n\
             fence.proxy.tensormap::generic.acquire.gpu [c], 128;\n\
             @p mbarrier.arrive.expect_tx.shared.b64 _, [b], 64;\n\
             @p cp.async.bulk.tensor.2d.shared::cta.global.mbarrier::complete_tx::bytes [s], [c, {{0, 1}}], [b];\nwait:\n\
             mbarrier.try_wait.parity.shared.b64 w, [b], 0;\n@!w bra wait;\nsetp.lt.u32 w, i, 16;\nmad.lo.u32 r, i, 4, s;\n\
             mad.wide.u32 t, i, 4, t;\n@w ld.shared.u32 v, [r];\n@w st.global.u32 [t], v;\nret;\n}}\n"
        )
    };
    let run = |text: &str| {
        let mut gpu = Gpu::new(Options::default());
        let (data, out, copy) =
            (gpu.alloc(64 * 256).unwrap(), gpu.alloc(64).unwrap(), gpu.alloc(128).unwrap());
        let words: Vec<u8> = (0..side * side).flat_map(|i| (i as f32).to_le_bytes()).collect();
        gpu.write(data, &words).unwrap();
        let args = [
            Arg::Bytes(TensorMap::encode(&MATRIX).unwrap().to_vec()),
            Arg::Ptr(data),
            Arg::Ptr(out),
            Arg::Ptr(copy),
        ];
        launch(&mut gpu, text, &args)?;
        let mut got = vec![0; 64];
        gpu.read(out, &mut got).unwrap();
        Ok::<_, Error>(got.chunks(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect::<Vec<_>>())
    };
    // Changed in every field, and made of zeros.
    let zeros = |fields: &str| module(fields).replace("st.shared.u32 [r], v;", "st.shared.u32 [r], 0;");
    for text in [module(fields), zeros(fields)] {
        // Two rows of the four, every other one from row 1 on, of 8 words of which the tensor has 6.
        let got = run(&text).unwrap_or_else(|e| panic!("{text}\n{e}"));
        for (i, got) in got.iter().enumerate() {
            let (row, column) = (i / 8, i % 8);
            if column < 6 {
                assert_eq!(*got, ((1 + 2 * row) * 64 + column) as f32, "word {i}");
            } else {
                assert!(got.is_nan(), "word {i}: {got}");
            }
        }
    }
    for (from, lacks) in [
        ("global_address", "it has no address"),
        ("rank", "1 dimensions is copied as one of 2"),
        ("box_dim.shared::cta.b1024.b32 [m], 0", "lacks the elements of the box of dimension 0"),
        ("box_dim.shared::cta.b1024.b32 [m], 1", "the elements of the box of dimension 1"),
        ("global_dim.shared::cta.b1024.b32 [m], 0", "the elements of dimension 0"),
        ("global_dim.shared::cta.b1024.b32 [m], 1", "the elements of dimension 1"),
        ("element_stride", "the element stride of dimension 1"),
    ] {
        let rest: String =
            fields.lines().filter(|line| !line.contains(from)).map(|l| l.to_owned() + "\n").collect();
        match run(&zeros(&rest)) {
            Err(Error::Fault(found)) => assert!(found[0].message.contains(lacks), "{from}: {found:?}"),
            other => panic!("{from}: {other:?}"),
        }
    }
    match run(
        &module(fields).replace("st.shared.u32 [r], v;", "setp.ne.u32 w, i, 31;\n@w st.shared.u32 [r], 0;")
    ) {
        Err(Error::Fault(found)) => assert_eq!(found[0].kind, ErrorKind::Uninitialized, "{found:?}"),
        other => panic!("a part unwritten: {other:?}"),
    }
    for (from, to, part) in [
        ("b64 [m], o;", "b64 [m], 8;", "no multiple of 16"),
        (
            "box_dim.shared::cta.b1024.b32 [m], 1, 4",
            "box_dim.shared::cta.b1024.b32 [m], 1, 257",
            "becomes 257",
        ),
        ("[m], 0, 256", "[m], 0, 260", "no multiple of 16"),
        (
            "global_stride.shared::cta.b1024.b64 [m], 0",
            "global_stride.shared::cta.b1024.b64 [m], 4",
            "no stride 4",
        ),
        (
            "elemtype.shared::cta.b1024.b32 [m], 7",
            "elemtype.shared::cta.b1024.b32 [m], 16",
            "it may be 0..=15",
        ),
        (
            "elemtype.shared::cta.b1024.b32 [m], 7",
            "elemtype.shared::cta.b1024.b32 [m], 2",
            "not filled with NaN",
        ),
        (
            "rank.shared::cta.b1024.b32 [m], 1",
            "rank.shared::cta.b1024.b32 [m], 5",
            "the rank less 1 becomes 5",
        ),
    ] {
        let text = module(&fields.replacen(from, to, 1));
        assert!(text != module(fields), "{from}");
        match run(&text) {
            Err(Error::Fault(found)) => {
                assert!(
                    found[0].kind == ErrorKind::TensorMap && found[0].message.contains(part),
                    "{part}: {found:?}"
                );
            }
            other => panic!("{to}: {other:?}"),
        }
    }
    // What GPUs have and this machine has not is no fault of the kernel's.
    for (field, value, part) in [
        ("elemtype", 13, "the number of the element type becomes 13"),
        ("interleave_layout", 2, "the number of the interleaved layout becomes 2"),
        ("swizzle_mode", 4, "the number of the swizzle becomes 4"),
        ("swizzle_mode", 2, "a box 32 bytes wide under a swizzle of 64"),
    ] {
        let change = |line: &str| match line.contains(field) {
            true => format!("{} {value};\n", &line[..line.rfind(' ').unwrap()]),
            false => format!("{line}\n"),
        };
        match run(&module(&fields.lines().map(change).collect::<String>())) {
            Err(Error::Unsupported(found)) => assert!(found[0].message.contains(part), "{part}: {found:?}"),
            other => panic!("{field} {value}: {other:?}"),
        }
    }
}

/// A matrix of 64 x 32 bf16 in boxes of 32 x 8.
const MATRIX: Tiled<'static> = Tiled {
    ty: TensorType::Bf16,
    address: 0x2_0000_0000,
    dims: &[64, 32],
    strides: &[128],
    boxes: &[32, 8],
    element_strides: &[1, 1],
    swizzle: Swizzle::B64,
    fill_nan: false,
};

#[test]
fn wrong_maps_are_refused() {
    TensorMap::encode(&MATRIX).unwrap();
    let wrong: [(Tiled<'_>, &str); 16] = [
        (Tiled { dims: &[], strides: &[], boxes: &[], element_strides: &[], ..MATRIX }, "0 dimensions"),
        (
            Tiled { dims: &[1; 6], strides: &[16; 5], boxes: &[1; 6], element_strides: &[1; 6], ..MATRIX },
            "6 dimensions",
        ),
        (Tiled { strides: &[], ..MATRIX }, "fit the dimensions"),
        (Tiled { boxes: &[32], ..MATRIX }, "fit the dimensions"),
        (Tiled { address: 0x2_0000_0008, ..MATRIX }, "multiple of 16"),
        (Tiled { address: 0, ..MATRIX }, "address"),
        (Tiled { dims: &[64, 0], ..MATRIX }, "dimension 1 has 0"),
        (Tiled { dims: &[64, (1 << 32) + 1], ..MATRIX }, "2^32"),
        (Tiled { strides: &[136], ..MATRIX }, "136 bytes"),
        (Tiled { strides: &[1 << 40], ..MATRIX }, "2^40"),
        (Tiled { boxes: &[32, 257], ..MATRIX }, "257 elements"),
        (Tiled { boxes: &[0, 8], ..MATRIX }, "0 elements"),
        (Tiled { element_strides: &[1, 9], ..MATRIX }, "element stride 9"),
        (Tiled { boxes: &[4, 8], ..MATRIX }, "8 bytes wide"),
        (Tiled { boxes: &[64, 8], ..MATRIX }, "more than the 64"),
        (Tiled { ty: TensorType::U16, fill_nan: true, ..MATRIX }, "NaN"),
    ];
    for (tiled, part) in wrong {
        match TensorMap::encode(&tiled) {
            Err(TensorMapError::Invalid(what)) => assert!(what.contains(part), "{tiled:?}: {what}"),
            other => panic!("{tiled:?}: {other:?}"),
        }
    }
    let narrow = TensorMap::encode(&Tiled { swizzle: Swizzle::B128, ..MATRIX });
    assert!(matches!(narrow, Err(TensorMapError::Unsupported(_))), "{narrow:?}");
    // The largest numbers survive.
    let large = Tiled { dims: &[1 << 32, 1 << 32], strides: &[(1 << 40) - 16], boxes: &[32, 256], ..MATRIX };
    TensorMap::encode(&large).unwrap();
    let mut map = TensorMap::encode(&MATRIX).unwrap();
    assert!(TensorMap::decode(&map).is_some());
    for i in 0..128 {
        map[i] ^= 4;
        assert_eq!(TensorMap::decode(&map), None, "byte {i}");
        map[i] ^= 4;
    }
}

#[test]
fn wrong_tensor_copies_are_found() {
    let load =
        |rank: usize| format!("cp.async.bulk.tensor.{rank}d.shared::cta.global.mbarrier::complete_tx::bytes");
    let run = |text: &str, change: &dyn Fn(&mut [u8; 128])| {
        let mut gpu = Gpu::new(Options::default());
        let (from, to) = (gpu.alloc(4096).unwrap(), gpu.alloc(512).unwrap());
        gpu.fill(from, 1, 4096).unwrap();
        let mut map = TensorMap::encode(&Tiled { address: from.0, ..MATRIX }).unwrap();
        change(&mut map);
        match launch(&mut gpu, text, &[Arg::Bytes(map.to_vec()), Arg::Ptr(to), Arg::Bytes(vec![0; 20])]) {
            Ok(()) => None,
            Err(Error::Fault(found) | Error::Unsupported(found)) => Some(found[0].clone()),
            Err(e) => panic!("{e}"),
        }
    };
    let right = text(2, 512, &load(2));
    assert_eq!(run(&right, &|_| ()), None);
    let kind = |text: &str, change: &dyn Fn(&mut [u8; 128])| run(text, change).map(|f| (f.kind, f.message));
    for (text, change, want, part) in [
        (
            right.clone(),
            &(|m: &mut [u8; 128]| m[50] ^= 1) as &dyn Fn(&mut [u8; 128]),
            ErrorKind::TensorMap,
            "no tensor map",
        ),
        (
            text(3, 512, &load(3)),
            &|_: &mut [u8; 128]| (),
            ErrorKind::TensorMap,
            "2 dimensions is copied as one of 3",
        ),
        (right.replace("[s], [a", "[s+64], [a"), &|_| (), ErrorKind::Misaligned, "multiple of 128"),
        (right.replace("[s], [a", "[s+16128], [a"), &|_| (), ErrorKind::OutOfBounds, "shared memory"),
        (right.replace("[m], 512", "[m], 256"), &|_| (), ErrorKind::Deadlock, "-256 bytes"),
        (
            right.replace(".global.mbarrier", ".global.im2col.mbarrier"),
            &|_| (),
            ErrorKind::Unsupported,
            "im2col",
        ),
        (
            right.replace(".global.mbarrier", ".global.im2col::w.mbarrier"),
            &|_| (),
            ErrorKind::Unsupported,
            "im2col::w",
        ),
        (
            right.replace(".global.mbarrier", ".global.tile::gather4.mbarrier"),
            &|_| (),
            ErrorKind::Unsupported,
            "tile::gather4",
        ),
        (right.replace(", {x0, x1}]", ", {x0}]"), &|_| (), ErrorKind::Invalid, "2 dimensions"),
        // The tensor is larger than its buffer.
        (
            right.clone(),
            &|m: &mut [u8; 128]| {
                let at = u64::from_le_bytes(m[12..20].try_into().unwrap()) + 4096 - 128;
                *m = TensorMap::encode(&Tiled { address: at, ..MATRIX }).unwrap();
            },
            ErrorKind::OutOfBounds,
            "behind the end",
        ),
    ] {
        let found = kind(&text, change).unwrap_or_else(|| panic!("nothing is found: {part}"));
        assert!(found.0 == want && found.1.contains(part), "{part}: {found:?}");
    }
}
