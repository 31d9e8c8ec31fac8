//! Conformance of single instructions: runs a piece of PTX for many operands, one thread for each.

use std::fmt::Write as _;

use ptxvm::types::Type;
use ptxvm::{Arg, Error, Gpu, Launch, Module, Options};

/// The register type that holds values of `ty`.
fn register(ty: Type) -> &'static str {
    match ty.bits() {
        1 => "pred",
        8 | 16 => "b16",
        32 => "b32",
        64 => "b64",
        bits => panic!("operands of {bits} bits"),
    }
}

/// The access that loads or stores values of `ty`.
fn access(ty: Type) -> &'static str {
    match ty.bits() {
        1 | 8 => "u8",
        16 => "b16",
        32 => "b32",
        _ => "b64",
    }
}

/// A kernel whose thread i has the i-th value of each input in `%in0`, `%in1`, ..., runs `body`, and stores `%out0`,
/// `%out1`, ... Registers have the width of their types (16 bits for 8; predicates are bytes in memory).
pub(crate) fn kernel(body: &str, inputs: &[Type], outputs: &[Type]) -> String {
    let mut text =
        ".version 8.8\n.target sm_90\n.address_size 64\n\n.visible .entry k(.param .u32 n".to_owned();
    for i in 0..inputs.len() + outputs.len() {
        write!(text, ", .param .u64 p{i}").unwrap();
    }
    text.push_str(
        ")\n{\n.reg .pred %outside;\n.reg .b32 %i, %n, %t, %byte;\n.reg .b64 %at, %offset, %base;\n",
    );
    for (name, types) in [("in", inputs), ("out", outputs)] {
        for (i, ty) in types.iter().enumerate() {
            writeln!(text, ".reg .{} %{name}{i};", register(*ty)).unwrap();
        }
    }
    text.push_str(
        "mov.u32 %i, %ctaid.x;\nmov.u32 %n, %ntid.x;\nmov.u32 %t, %tid.x;\nmad.lo.u32 %i, %i, %n, %t;\n\
         ld.param.u32 %n, [n];\nsetp.ge.u32 %outside, %i, %n;\n@%outside bra done;\ncvt.u64.u32 %at, %i;\n",
    );
    let address = |text: &mut String, p: usize, ty: Type| {
        let bytes = ty.bytes();
        writeln!(text, "ld.param.u64 %base, [p{p}];\nmul.lo.u64 %offset, %at, {bytes};").unwrap();
        text.push_str("add.u64 %base, %base, %offset;\n");
    };
    for (i, ty) in inputs.iter().enumerate() {
        address(&mut text, i, *ty);
        match ty {
            Type::Pred => writeln!(text, "ld.global.u8 %byte, [%base];\nsetp.ne.u32 %in{i}, %byte, 0;"),
            _ => writeln!(text, "ld.global.{} %in{i}, [%base];", access(*ty)),
        }
        .unwrap();
    }
    writeln!(text, "{{\n{body}\n}}").unwrap();
    for (i, ty) in outputs.iter().enumerate() {
        address(&mut text, inputs.len() + i, *ty);
        match ty {
            Type::Pred => writeln!(text, "selp.u32 %byte, 1, 0, %out{i};\nst.global.u8 [%base], %byte;"),
            _ => writeln!(text, "st.global.{} [%base], %out{i};", access(*ty)),
        }
        .unwrap();
    }
    text.push_str("done:\nret;\n}\n");
    text
}

/// Runs `body` (see [`kernel`]) for all values, and gives what each output is, with the launch's error if it has one.
pub(crate) fn run_with(
    options: &Options,
    body: &str,
    inputs: &[(Type, &[u64])],
    outputs: &[Type],
) -> (Vec<Vec<u64>>, Option<Error>) {
    let n = inputs.iter().map(|(_, values)| values.len()).max().unwrap_or(32);
    assert!(inputs.iter().all(|(_, values)| values.len() == n), "inputs of different lengths");
    let types: Vec<Type> = inputs.iter().map(|(ty, _)| *ty).collect();
    let text = kernel(body, &types, outputs);
    let module = Module::load("op.ptx", &text).unwrap_or_else(|e| panic!("{e}\n{text}"));
    let mut gpu = Gpu::new(options.clone());
    let loaded = gpu.load(&module).unwrap();
    let mut args = vec![Arg::U32(n as u32)];
    for (ty, values) in inputs {
        let width = ty.bytes() as usize;
        let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()[..width].to_vec()).collect();
        let at = gpu.alloc(bytes.len()).unwrap();
        gpu.write(at, &bytes).unwrap();
        args.push(Arg::Ptr(at));
    }
    let mut results = Vec::new();
    for ty in outputs {
        let at = gpu.alloc(n * ty.bytes() as usize).unwrap();
        results.push((at, *ty));
        args.push(Arg::Ptr(at));
    }
    let shape = Launch::linear(n.div_ceil(128) as u32, 128);
    let error = gpu.launch(&loaded, "k", &shape, &args).err();
    let read = |(at, ty): (ptxvm::DevicePtr, Type)| {
        let width = ty.bytes() as usize;
        let mut bytes = vec![0; n * width];
        gpu.read(at, &mut bytes).unwrap();
        let value = |chunk: &[u8]| chunk.iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte));
        bytes.chunks_exact(width).map(value).collect()
    };
    (results.into_iter().map(read).collect(), error)
}

/// [`run_with`] all checks on, and no error allowed.
pub(crate) fn run(body: &str, inputs: &[(Type, &[u64])], outputs: &[Type]) -> Vec<Vec<u64>> {
    let (results, error) = run_with(&Options { threads: 1, ..Options::default() }, body, inputs, outputs);
    if let Some(error) = error {
        panic!("{error}\nin `{body}`");
    }
    results
}

/// Runs `body` over [`cases`] of the inputs and compares every output with `want`.
pub(crate) fn check<const N: usize, const M: usize>(
    body: &str,
    inputs: [Type; N],
    outputs: [Type; M],
    want: impl Fn([u64; N]) -> [u64; M],
) {
    check_cases(body, inputs, outputs, &cases(inputs), want);
}

/// [`check`] for these operands; `cases` has a row for each input.
pub(crate) fn check_cases<const N: usize, const M: usize>(
    body: &str,
    inputs: [Type; N],
    outputs: [Type; M],
    cases: &[Vec<u64>; N],
    want: impl Fn([u64; N]) -> [u64; M],
) {
    let columns: Vec<(Type, &[u64])> =
        inputs.iter().zip(cases).map(|(ty, row)| (*ty, row.as_slice())).collect();
    let got = run(body, &columns, &outputs);
    for i in 0..cases[0].len() {
        let operands: [u64; N] = std::array::from_fn(|k| cases[k][i]);
        let got: [u64; M] = std::array::from_fn(|k| got[k][i]);
        let want = want(operands);
        assert!(got == want, "`{body}` of {operands:x?} is {got:x?}, not {want:x?}");
    }
}

/// Reproducible random numbers (SplitMix64).
pub(crate) struct Random(pub(crate) u64);

impl Random {
    /// 64 random bits.
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    /// A number of `bits` bits of any magnitude: small ones and runs of ones are as likely as large ones.
    pub(crate) fn number(&mut self, bits: u32) -> u64 {
        let value = match self.next() % 4 {
            0 => self.next(),
            1 => self.next() >> (self.next() % 64),
            2 => ((self.next() as i64) >> (self.next() % 64)) as u64,
            _ => (u64::MAX >> (self.next() % 64)) << (self.next() % u64::from(bits)),
        };
        value & mask(bits)
    }
}

/// The lowest `bits` bits.
pub(crate) fn mask(bits: u32) -> u64 {
    if bits >= 64 { u64::MAX } else { (1 << bits) - 1 }
}

/// Numbers where integer operations go wrong.
pub(crate) fn edges(bits: u32) -> Vec<u64> {
    let top = 1u64 << (bits - 1);
    let mut edges = vec![0, 1, mask(bits), top, top - 1, 2, 31, 32];
    if bits > 1 {
        edges.extend([
            3,
            7,
            15,
            16,
            33,
            63,
            64,
            65,
            100,
            255,
            256,
            top + 1,
            top >> 1,
            mask(bits) - 1,
            mask(bits) - 6,
        ]);
        edges.extend([
            0x5555_5555_5555_5555,
            0xaaaa_aaaa_aaaa_aaaa,
            0x8000_8000,
            0x7fff_7fff,
            0xffff_0000,
            0x80,
            0x7f,
        ]);
    }
    let mut seen = Vec::new();
    for edge in edges {
        let edge = edge & mask(bits);
        if !seen.contains(&edge) {
            seen.push(edge);
        }
    }
    seen
}

/// Operands: all combinations of edges (fewer of them the more operands there are), and random ones.
pub(crate) fn cases<const N: usize>(types: [Type; N]) -> [Vec<u64>; N] {
    let sets = types.map(|ty| {
        let mut set = edges(ty.bits());
        set.truncate(match N {
            1 | 2 => 64,
            3 => 12,
            _ => 5,
        });
        set
    });
    let total: usize = sets.iter().map(Vec::len).product();
    let mut cases: [Vec<u64>; N] = std::array::from_fn(|_| Vec::new());
    for i in 0..total {
        let mut rest = i;
        for (case, set) in cases.iter_mut().zip(&sets) {
            case.push(set[rest % set.len()]);
            rest /= set.len();
        }
    }
    let mut random = Random(N as u64);
    for _ in 0..1000 {
        for (case, ty) in cases.iter_mut().zip(types) {
            case.push(random.number(ty.bits()));
        }
    }
    cases
}
