//! wgmma. Where elements lie in shared memory and in registers is written down here from the ISA's figures, element by element,
//! and shares nothing with the machine's.

use std::fmt::Write as _;

use ptxvm::{Arg, Gpu, Launch, MmaOrder, Module, Options};

/// Bytes of shared memory for a factor. The patterns of swizzles repeat every 1024 bytes.
const ROOM: usize = 64 * 1024;

/// How a factor lies in shared memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Layout {
    /// Bytes of the swizzle: 16 (none), 32, 64, 128.
    swizzle: usize,
    /// Whether the elements of 16 bytes are neighbours along m (n).
    mn_major: bool,
    /// The part of the swizzle's width that the product reads, in units of 32 bytes along k (K-major).
    slice: usize,
}

/// Bits of an element.
fn width(ty: &str) -> usize {
    match ty {
        "tf32" => 32,
        "f16" | "bf16" => 16,
        "b1" => 1,
        _ => 8,
    }
}

/// The bits of a small integer.
fn encode(ty: &str, value: i32) -> u32 {
    let float = |exponent: u32, mantissa: u32| {
        if value == 0 {
            return 0;
        }
        let sign = u32::from(value < 0) << (exponent + mantissa);
        let power = value.unsigned_abs().ilog2();
        let bias = (1 << (exponent - 1)) - 1;
        let rest = value.unsigned_abs() - (1 << power);
        assert!(power <= mantissa);
        sign | (bias + power) << mantissa | rest << (mantissa - power)
    };
    match ty {
        "f16" => float(5, 10),
        "bf16" => float(8, 7),
        "tf32" | "f32" => float(8, 23),
        "e4m3" => float(4, 3),
        "e5m2" => float(5, 2),
        "s8" | "u8" => value as u32 & 0xff,
        "s32" => value as u32,
        "b1" => value as u32 & 1,
        _ => panic!("{ty}"),
    }
}

/// A factor as the host has it: element (row, k), rows along m or n.
fn element(ty: &str, seed: usize, row: usize, k: usize) -> i32 {
    let x = (row * 7 + k * 13 + row * k * 3 + seed * 5) % 17;
    match ty {
        "b1" => i32::from(x.is_multiple_of(3)),
        "u8" => x as i32 % 4,
        "e5m2" => x as i32 % 7 - 3,
        _ => x as i32 % 8 - 4,
    }
}

/// Distances in bytes: of the descriptor's leading and stride offset.
fn offsets(layout: Layout, rows: usize) -> (usize, usize) {
    match (layout.mn_major, layout.swizzle) {
        // Eight rows of 16 bytes, one after another along the rows; the second half of k behind them all, and a gap.
        (false, 16) => (rows * 16 + 128, 128),
        (false, width) => (16, 8 * width),
        // Eight depths of 16 bytes; along the rows, and along k.
        (true, 16) => (rows * 16 + 256, 128),
        // Atoms of eight depths; along the rows; along k.
        (true, width) => (16 * width, 8 * width),
    }
}

/// The byte at which an element begins, behind the beginning of the factor's room.
fn place(layout: Layout, rows: usize, bits: usize, row: usize, k: usize) -> usize {
    let (leading, stride) = offsets(layout, rows);
    let pattern = |line: usize| match layout.swizzle {
        128 => line % 8,
        64 => line / 2 % 4,
        32 => line / 4 % 2,
        _ => 0,
    };
    if layout.mn_major {
        let (atom_rows, bytes) = (layout.swizzle * 8 / bits, bits / 8);
        let (across, within) = (row / atom_rows, row % atom_rows * bytes);
        let chunk = (within / 16) ^ pattern(k % 8);
        let in_atom = k % 8 * layout.swizzle + chunk * 16 + within % 16;
        let (along_rows, along_k) = if layout.swizzle == 16 { (stride, leading) } else { (leading, stride) };
        return across * along_rows + k / 8 * along_k + in_atom;
    }
    let along = k * bits / 8 + 32 * layout.slice;
    if layout.swizzle == 16 {
        return row % 8 * 16 + row / 8 * stride + along / 16 * leading + along % 16;
    }
    let chunk = (along / 16) ^ pattern(row % 8);
    row / 8 * stride + row % 8 * layout.swizzle + chunk * 16 + along % 16
}

fn descriptor(layout: Layout, rows: usize, at: usize) -> u64 {
    let (leading, stride) = offsets(layout, rows);
    let start = at + 32 * layout.slice;
    let mode = match layout.swizzle {
        128 => 1u64,
        64 => 2,
        32 => 3,
        _ => 0,
    };
    (start as u64 >> 4) | (leading as u64 >> 4) << 16 | (stride as u64 >> 4) << 32 | mode << 62
}

fn image(layout: Layout, ty: &str, seed: usize, rows: usize, depth: usize) -> Vec<u8> {
    let mut bytes = vec![0u8; ROOM];
    for row in 0..rows {
        for k in 0..depth {
            let bits = encode(ty, element(ty, seed, row, k));
            let at = place(layout, rows, width(ty), row, k);
            match width(ty) {
                1 => bytes[at] |= (bits as u8) << (k % 8),
                8 => bytes[at] = bits as u8,
                16 => bytes[at..at + 2].copy_from_slice(&(bits as u16).to_le_bytes()),
                _ => bytes[at..at + 4].copy_from_slice(&bits.to_le_bytes()),
            }
        }
    }
    bytes
}

struct Case {
    n: usize,
    a: &'static str,
    b: &'static str,
    d: &'static str,
    /// `None`: A in registers.
    a_layout: Option<Layout>,
    b_layout: Layout,
    scales: (i32, i32),
    adds: bool,
}

impl Case {
    fn depth(&self) -> usize {
        256 / width(self.a)
    }

    fn registers(&self) -> usize {
        if self.d == "f16" { self.n / 4 } else { self.n / 2 }
    }

    fn text(&self) -> String {
        let (integer, half) = (self.d == "s32", width(self.a) == 16);
        let count = self.registers();
        let list = |name: &str, n: usize| (0..n).map(|i| format!("{name}{i}")).collect::<Vec<_>>().join(", ");
        let mut body = String::new();
        for i in 0..count {
            writeln!(body, "mov.b32 %d{i}, 0;\nld.global.b32 %d{i}, [%rd5+{}];", 4 * i).unwrap();
        }
        let a = if self.a_layout.is_some() {
            "%rd1".to_owned()
        } else {
            for i in 0..4 {
                writeln!(body, "ld.global.b32 %a{i}, [%rd6+{}];", 4 * i).unwrap();
            }
            format!("{{{}}}", list("%a", 4))
        };
        let mut operands = format!("{{{}}}, {a}, %rd2, %p1", list("%d", count));
        if !integer {
            write!(operands, ", {}, {}", self.scales.0, self.scales.1).unwrap();
        }
        if let (true, Some(layout)) = (half, self.a_layout) {
            write!(operands, ", {}", u8::from(layout.mn_major)).unwrap();
        }
        if half {
            write!(operands, ", {}", u8::from(self.b_layout.mn_major)).unwrap();
        }
        let popc = if self.a == "b1" { ".and.popc" } else { "" };
        let name = format!(
            "wgmma.mma_async.sync.aligned.m64n{}k{}.{}.{}.{}{popc}",
            self.n,
            self.depth(),
            self.d,
            self.a,
            self.b
        );
        write!(
            body,
            "wgmma.fence.sync.aligned;\n{name} {operands};\nwgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 0;\n"
        )
        .unwrap();
        for i in 0..count {
            writeln!(body, "st.global.b32 [%rd7+{}], %d{i};", 4 * i).unwrap();
        }
        format!(
            ".version 8.8\n.target sm_90a\n.address_size 64\n.extern .shared .align 1024 .b8 smem[];\n\
             .visible .entry k(.param .u64 image, .param .u64 da, .param .u64 db, .param .u64 start, .param .u64 regs, \
             .param .u64 out, .param .u32 adds)\n{{\n\
             .reg .pred %p<3>;\n.reg .b32 %r<8>;\n.reg .b32 %d<128>;\n.reg .b32 %a<4>;\n.reg .b64 %rd<10>;\n\
             ld.param.u64 %rd0, [image];\nld.param.u64 %rd1, [da];\nld.param.u64 %rd2, [db];\nld.param.u64 %rd5, [start];\n\
             ld.param.u64 %rd6, [regs];\nld.param.u64 %rd7, [out];\nld.param.u32 %r0, [adds];\nsetp.ne.u32 %p1, %r0, 0;\n\
             mov.u32 %r1, %tid.x;\nmov.u32 %r3, smem;\nshr.u32 %r4, %r3, 4;\ncvt.u64.u32 %rd8, %r4;\n\
             add.u64 %rd1, %rd1, %rd8;\nadd.u64 %rd2, %rd2, %rd8;\n\
             mul.lo.u32 %r5, %r1, {stride};\ncvt.u64.u32 %rd8, %r5;\nadd.u64 %rd5, %rd5, %rd8;\nadd.u64 %rd7, %rd7, %rd8;\n\
             shl.b32 %r5, %r1, 4;\ncvt.u64.u32 %rd8, %r5;\nadd.u64 %rd6, %rd6, %rd8;\n\
             shl.b32 %r2, %r1, 2;\nCOPY:\nadd.u32 %r5, %r3, %r2;\ncvt.u64.u32 %rd8, %r2;\nadd.u64 %rd8, %rd0, %rd8;\n\
             ld.global.b32 %r6, [%rd8];\nst.shared.b32 [%r5], %r6;\nadd.u32 %r2, %r2, 512;\nsetp.lt.u32 %p2, %r2, {room};\n\
             @%p2 bra COPY;\nfence.proxy.async;\nbar.sync 0;\n{body}ret;\n}}\n",
            stride = 4 * count,
            room = 2 * ROOM,
        )
    }

    /// What element (row, column) of D begins with.
    fn start(row: usize, column: usize) -> i32 {
        ((row * 5 + column * 3) % 11) as i32 - 5
    }

    /// Row and column of the element `sub` of register `i` of thread `t`.
    fn position(&self, thread: usize, i: usize, sub: usize) -> (usize, usize) {
        let (warp, lane) = (thread / 32, thread % 32);
        // In the figure d0, d1 are neighbours, d2, d3 lie eight rows below, and d4 is eight columns further.
        let d = if self.d == "f16" { 2 * i + sub } else { i };
        (warp * 16 + lane / 4 + 8 * (d / 2 % 2), d / 4 * 8 + lane % 4 * 2 + d % 2)
    }

    /// The registers of all threads, from the elements.
    fn fragments(&self, value: impl Fn(usize, usize) -> i32) -> Vec<u32> {
        let mut words = Vec::new();
        for thread in 0..128 {
            for i in 0..self.registers() {
                let of = |sub| {
                    let (row, column) = self.position(thread, i, sub);
                    encode(self.d, value(row, column))
                };
                words.push(if self.d == "f16" { of(0) | of(1) << 16 } else { of(0) });
            }
        }
        words
    }

    /// A's registers: four of each thread, each with neighbours along k.
    fn a_registers(&self) -> Vec<u32> {
        let each = 32 / width(self.a);
        let mut words = Vec::new();
        for thread in 0..128 {
            let (warp, lane) = (thread / 32, thread % 32);
            for i in 0..4 {
                let row = warp * 16 + lane / 4 + 8 * (i % 2);
                let first = (lane % 4 + i / 2 * 4) * each;
                let word = (0..each).fold(0, |word, e| {
                    word | encode(self.a, element(self.a, 1, row, first + e)) << (e * width(self.a))
                });
                words.push(word);
            }
        }
        words
    }

    fn run(&self, order: MmaOrder) {
        let text = self.text();
        let told = || {
            format!(
                "{} {:?} {:?}",
                text.lines().find(|l| l.starts_with("wgmma.mma")).unwrap(),
                self.a_layout,
                self.b_layout
            )
        };
        let mut gpu = Gpu::new(Options { mma: order, ..Options::default() });
        let module = Module::load("wgmma.ptx", &text).unwrap_or_else(|e| panic!("{}: {e}", told()));
        let loaded = gpu.load(&module).unwrap_or_else(|e| panic!("{}: {e}", told()));
        let bytes = match self.a_layout {
            Some(layout) => image(layout, self.a, 1, 64, self.depth()),
            None => vec![0; ROOM],
        };
        let bytes = [bytes, image(self.b_layout, self.b, 2, self.n, self.depth())].concat();
        let start = self.fragments(Self::start);
        let mut upload = |bytes: &[u8]| {
            let ptr = gpu.alloc(bytes.len()).unwrap();
            gpu.write(ptr, bytes).unwrap();
            ptr
        };
        let image = upload(&bytes);
        let begin = upload(bytemuck::cast_slice(&start));
        let regs = upload(bytemuck::cast_slice(&self.a_registers()));
        let out = upload(bytemuck::cast_slice(&vec![0u32; start.len()]));
        let args = [
            Arg::Ptr(image),
            Arg::U64(self.a_layout.map_or(0, |layout| descriptor(layout, 64, 0))),
            Arg::U64(descriptor(self.b_layout, self.n, ROOM)),
            Arg::Ptr(begin),
            Arg::Ptr(regs),
            Arg::Ptr(out),
            Arg::U32(u32::from(self.adds)),
        ];
        let launch = Launch { shared_bytes: 2 * ROOM as u32, ..Launch::linear(1, 128) };
        gpu.launch(&loaded, "k", &launch, &args).unwrap_or_else(|e| panic!("{}: {e}", told()));
        let mut found = vec![0u8; 4 * start.len()];
        gpu.read(out, &mut found).unwrap();
        let found: Vec<u32> = found.chunks(4).map(|c| u32::from_le_bytes(c.try_into().unwrap())).collect();
        let wanted = self.fragments(|row, column| {
            let product: i32 =
                (0..self.depth()).map(|k| element(self.a, 1, row, k) * element(self.b, 2, column, k)).sum();
            product * self.scales.0 * self.scales.1 + if self.adds { Self::start(row, column) } else { 0 }
        });
        assert!(found == wanted, "{}", told());
    }
}

const PLAIN: Layout = Layout { swizzle: 16, mn_major: false, slice: 0 };

fn case(a: &'static str, b: &'static str, d: &'static str, n: usize) -> Case {
    Case { n, a, b, d, a_layout: Some(PLAIN), b_layout: PLAIN, scales: (1, 1), adds: true }
}

/// All types, with all numbers of columns that the ISA lists.
#[test]
fn types_and_shapes() {
    let types = [
        ("f16", "f16", "f16"),
        ("f16", "f16", "f32"),
        ("bf16", "bf16", "f32"),
        ("tf32", "tf32", "f32"),
        ("e4m3", "e4m3", "f32"),
        ("e4m3", "e5m2", "f16"),
        ("e5m2", "e4m3", "f32"),
        ("e5m2", "e5m2", "f16"),
        ("s8", "s8", "s32"),
        ("s8", "u8", "s32"),
        ("u8", "s8", "s32"),
        ("u8", "u8", "s32"),
        ("b1", "b1", "s32"),
    ];
    let integers = [8, 16, 24, 32, 48, 64, 80, 96, 112, 128, 144, 160, 176, 192, 208, 224, 240, 256];
    for (i, (a, b, d)) in types.into_iter().enumerate() {
        let all: Vec<usize> = if d == "s32" { integers.to_vec() } else { (1..=32).map(|n| 8 * n).collect() };
        for (j, n) in all.into_iter().enumerate() {
            // Each type with each second number, so that neighbours share them out.
            if (i + j).is_multiple_of(2) || n == 8 || n == 256 {
                Case { adds: j % 3 != 0, ..case(a, b, d, n) }.run(MmaOrder::Chain);
            }
        }
        Case { a_layout: None, ..case(a, b, d, 24) }.run(MmaOrder::Hopper);
    }
}

/// Every swizzle, each slice of it, and both majors where there are two.
#[test]
fn layouts() {
    let mut all = Vec::new();
    for swizzle in [16, 32, 64, 128] {
        let slices = if swizzle == 16 { 1 } else { swizzle / 32 };
        all.extend((0..slices).map(|slice| Layout { swizzle, mn_major: false, slice }));
    }
    let k_major = all.clone();
    all.extend([16, 32, 64, 128].map(|swizzle| Layout { swizzle, mn_major: true, slice: 0 }));
    for (i, layout) in all.iter().enumerate() {
        let other = all[(i + 3) % all.len()];
        for ty in ["f16", "bf16"] {
            Case { a_layout: Some(*layout), b_layout: other, ..case(ty, ty, "f32", 64) }.run(MmaOrder::Chain);
            Case { a_layout: Some(other), b_layout: *layout, ..case(ty, ty, "f32", 192) }
                .run(MmaOrder::Chain);
            Case { a_layout: None, b_layout: *layout, ..case(ty, ty, "f32", 128) }.run(MmaOrder::Chain);
        }
    }
    for (i, layout) in k_major.iter().enumerate() {
        let other = k_major[(i + 3) % k_major.len()];
        for (a, b, d) in
            [("tf32", "tf32", "f32"), ("e4m3", "e5m2", "f32"), ("s8", "u8", "s32"), ("b1", "b1", "s32")]
        {
            Case { a_layout: Some(*layout), b_layout: other, ..case(a, b, d, 32) }.run(MmaOrder::Chain);
        }
    }
}

#[test]
fn scales_and_accumulators() {
    for scales in [(1, -1), (-1, 1), (-1, -1)] {
        for (a, b, d) in
            [("f16", "f16", "f16"), ("bf16", "bf16", "f32"), ("tf32", "tf32", "f32"), ("e4m3", "e5m2", "f32")]
        {
            for (adds, a_layout) in [(true, Some(PLAIN)), (false, None)] {
                Case { scales, adds, a_layout, ..case(a, b, d, 40) }.run(MmaOrder::Chain);
            }
        }
    }
}

/// What no assembler accepts, or the machine does not run, is told by name.
#[test]
fn wrong_products_are_refused() {
    let right = case("f16", "f16", "f32", 8).text();
    let line = right.lines().find(|l| l.starts_with("wgmma.mma")).unwrap();
    let with = |other: &str| {
        let text = right.replace(line, other);
        let error =
            Module::load("wgmma.ptx", &text).and_then(|m| Gpu::new(Options::default()).load(&m).map(|_| ()));
        error.expect_err(other).to_string()
    };
    let d = "{%d0, %d1, %d2, %d3}";
    for (other, part) in [
        (
            format!("wgmma.mma_async.sync.aligned.m64n12k16.f32.f16.f16 {d}, %rd1, %rd2, %p1, 1, 1, 0, 0;"),
            "shape",
        ),
        (
            format!("wgmma.mma_async.sync.aligned.m64n8k8.f32.f16.f16 {d}, %rd1, %rd2, %p1, 1, 1, 0, 0;"),
            "shape",
        ),
        (
            format!("wgmma.mma_async.sync.aligned.m32n8k16.f32.f16.f16 {d}, %rd1, %rd2, %p1, 1, 1, 0, 0;"),
            "m64",
        ),
        (
            format!("wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.bf16 {d}, %rd1, %rd2, %p1, 1, 1, 0, 0;"),
            "types",
        ),
        (
            format!("wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {d}, %rd1, %rd2, %p1, 2, 1, 0, 0;"),
            "scale",
        ),
        (
            format!("wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {d}, %rd1, %rd2, %p1, 1, 1, 0, 2;"),
            "transposition",
        ),
        (
            format!("wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {d}, %rd1, %rd2, %p1, 1, 1;"),
            "operands",
        ),
        (
            format!("wgmma.mma_async.sync.aligned.m64n16k16.f32.f16.f16 {d}, %rd1, %rd2, %p1, 1, 1, 0, 0;"),
            "8 registers",
        ),
        (format!("wgmma.mma_async.m64n8k16.f32.f16.f16 {d}, %rd1, %rd2, %p1, 1, 1, 0, 0;"), "sync.aligned"),
        (
            format!(
                "wgmma.mma_async.sp.sync.aligned.m64n8k32.f32.f16.f16 {d}, %rd1, %rd2, %r1, 0, %p1, 1, 1, 0, 0;"
            ),
            "sparse",
        ),
        ("wgmma.wait_group.sync.aligned;".to_owned(), "operands"),
        ("wgmma.commit_group;".to_owned(), "sync.aligned"),
        ("wgmma.flush.sync.aligned;".to_owned(), "wgmma.flush"),
    ] {
        let told = with(&other);
        assert!(told.contains(part), "{other}: {told}");
    }
}
