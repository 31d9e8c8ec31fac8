//! Runs a few instructions of PTX on whole warps: inputs and outputs are 32-bit registers of all lanes.

use ptxvm::error::ErrorKind;
use ptxvm::{Arg, Error, Gpu, Launch, MmaOrder, Module, Options};

/// One register of a warp.
pub(crate) type Row = [u32; 32];

const HEAD: &str = ".version 8.5\n.target sm_90a\n.address_size 64\n";

/// Each warp has its own inputs, one row a register, `%in0`, `%in1`, ...; `body` writes `%out0`, `%out1`, .... Free for
/// its use: `%lane`, `%r<40>`, `%f<40>`, `%d<40>`, `%p<8>`, `%h<8>`. Lanes without a bit in a register's `written` mask
/// leave it unwritten. With `probe`, that output is used as an address.
fn kernel(body: &str, inputs: usize, written: &[u32], outputs: usize, probe: Option<usize>) -> String {
    let mut text = format!(
        "{HEAD}.visible .entry k(.param .u64 from, .param .u64 to)\n{{\n\
         .reg .b32 %in<{}>, %out<{}>, %r<40>, %lane, %wi, %wo, %bit;\n.reg .f32 %f<40>;\n.reg .f64 %d<40>;\n\
         .reg .b64 %a, %b, %z;\n.reg .b16 %h<8>;\n.reg .pred %p<8>, %w;\n.shared .align 16 .b8 tile[2048];\n\
         ld.param.u64 %a, [from];\nld.param.u64 %b, [to];\nmov.u32 %lane, %tid.x;\nmov.u32 %wi, %ctaid.x;\n\
         mul.lo.u32 %wo, %wi, {};\nmul.lo.u32 %wi, %wi, {};\nmad.lo.u32 %wi, %lane, 4, %wi;\n\
         mad.lo.u32 %wo, %lane, 4, %wo;\ncvt.u64.u32 %z, %wi;\nadd.u64 %a, %a, %z;\ncvt.u64.u32 %z, %wo;\n\
         add.u64 %b, %b, %z;\n",
        inputs.max(1),
        outputs,
        outputs * 128,
        inputs * 128,
    );
    for i in 0..inputs {
        let mask = written.get(i).copied().unwrap_or(u32::MAX);
        if mask == u32::MAX {
            text += &format!("ld.global.b32 %in{i}, [%a+{}];\n", 128 * i);
        } else {
            text += &format!(
                "shr.u32 %bit, {mask}, %lane;\nand.b32 %bit, %bit, 1;\nsetp.ne.u32 %w, %bit, 0;\n\
                 @%w ld.global.b32 %in{i}, [%a+{}];\n",
                128 * i
            );
        }
    }
    text += body;
    match probe {
        None => {
            for i in 0..outputs {
                text += &format!("st.global.b32 [%b+{}], %out{i};\n", 128 * i);
            }
        }
        Some(i) => {
            text += &format!(
                "mul.lo.u32 %bit, %out{i}, 0;\ncvt.u64.u32 %z, %bit;\nadd.u64 %b, %b, %z;\nst.global.b32 [%b], %lane;\n"
            );
        }
    }
    text + "ret;\n}\n"
}

fn launch(text: &str, warps: &[Vec<Row>], outputs: usize, mma: MmaOrder) -> Result<Vec<Vec<Row>>, Error> {
    let module = Module::load("test.ptx", text)?;
    let mut gpu = Gpu::new(Options { threads: 1, mma, ..Options::default() });
    let loaded = gpu.load(&module)?;
    let bytes: Vec<u8> = warps.iter().flatten().flatten().flat_map(|w| w.to_le_bytes()).collect();
    let from = gpu.alloc(bytes.len().max(4))?;
    gpu.write(from, &bytes)?;
    let mut result = vec![0u8; warps.len() * outputs * 128];
    let to = gpu.alloc(result.len())?;
    gpu.launch(&loaded, "k", &Launch::linear(warps.len() as u32, 32), &[Arg::Ptr(from), Arg::Ptr(to)])?;
    gpu.read(to, &mut result)?;
    let words: Vec<u32> = result.chunks(4).map(|b| u32::from_le_bytes(b.try_into().unwrap())).collect();
    let rows: Vec<Row> = words.chunks(32).map(|row| row.try_into().unwrap()).collect();
    Ok(rows.chunks(outputs).map(<[Row]>::to_vec).collect())
}

/// The outputs of each warp.
pub(crate) fn try_run(body: &str, warps: &[Vec<Row>], outputs: usize) -> Result<Vec<Vec<Row>>, Error> {
    launch(&kernel(body, warps[0].len(), &[], outputs, None), warps, outputs, MmaOrder::Chain)
}

/// The outputs of each warp where products are summed in an order.
pub(crate) fn run_in(order: MmaOrder, body: &str, warps: &[Vec<Row>], outputs: usize) -> Vec<Vec<Row>> {
    launch(&kernel(body, warps[0].len(), &[], outputs, None), warps, outputs, order)
        .unwrap_or_else(|e| panic!("{body}\n{e}"))
}

/// The outputs of each warp, of a program without faults.
pub(crate) fn run(body: &str, warps: &[Vec<Row>], outputs: usize) -> Vec<Vec<Row>> {
    try_run(body, warps, outputs).unwrap_or_else(|e| panic!("{body}\n{e}"))
}

/// The outputs of one warp.
pub(crate) fn run_one(body: &str, inputs: &[Row], outputs: usize) -> Vec<Row> {
    run(body, &[inputs.to_vec()], outputs).remove(0)
}

/// For each output, the lanes in which it is undefined, when the inputs are written in the lanes of `written` alone.
pub(crate) fn undefined(body: &str, inputs: &[Row], written: &[u32], outputs: usize) -> Vec<u32> {
    let lanes = |i| {
        let text = kernel(body, inputs.len(), written, outputs, Some(i));
        match launch(&text, &[inputs.to_vec()], outputs, MmaOrder::Chain) {
            Ok(_) => 0,
            Err(Error::Fault(findings)) => {
                assert_eq!(findings.len(), 1, "{body}\n{findings:?}");
                assert_eq!(findings[0].kind, ErrorKind::Uninitialized, "{body}\n{findings:?}");
                findings[0].threads.as_ref().unwrap().lanes
            }
            Err(e) => panic!("{body}\n{e}"),
        }
    };
    (0..outputs).map(lanes).collect()
}

/// The kinds of the faults of a program for one warp; none if it is right.
pub(crate) fn faults(body: &str, inputs: &[Row], outputs: usize) -> Vec<ErrorKind> {
    match try_run(body, &[inputs.to_vec()], outputs) {
        Ok(_) => Vec::new(),
        Err(Error::Fault(findings) | Error::Unsupported(findings)) => {
            findings.iter().map(|f| f.kind).collect()
        }
        Err(e) => panic!("{body}\n{e}"),
    }
}

/// Random numbers (splitmix64).
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    pub(crate) fn row(&mut self) -> Row {
        std::array::from_fn(|_| self.next() as u32)
    }
}
