//! The program `ptxvm`: commands, arguments, files, messages, exit codes.

use std::fs;
use std::path::Path;

use assert_cmd::Command;
use tempfile::TempDir;

const HEAD: &str = ".version 8.0\n.target sm_80\n.address_size 64\n";

/// y[i] = a x[i] + y[i]
const SAXPY: &str = "
.visible .entry saxpy(.param .u32 n, .param .f32 a, .param .u64 x, .param .u64 y)
{
    .reg .pred %p; .reg .b32 %i, %b, %t, %n; .reg .b64 %x, %y, %o; .reg .f32 %a, %f, %g;
    ld.param.u32 %n, [n];
    ld.param.f32 %a, [a];
    ld.param.u64 %x, [x];
    ld.param.u64 %y, [y];
    mov.u32 %i, %ctaid.x;
    mov.u32 %b, %ntid.x;
    mov.u32 %t, %tid.x;
    mad.lo.u32 %i, %i, %b, %t;
    setp.ge.u32 %p, %i, %n;
    @%p bra done;
    mul.wide.u32 %o, %i, 4;
    add.u64 %x, %x, %o;
    add.u64 %y, %y, %o;
    ld.global.f32 %f, [%x];
    ld.global.f32 %g, [%y];
    fma.rn.f32 %g, %a, %f, %g;
    st.global.f32 [%y], %g;
done:
    ret;
}
";

/// Each thread copies a word.
const COPY: &str = "
.visible .entry copy(.param .u64 from, .param .u64 to)
{
    .reg .b32 %t, %v; .reg .b64 %x, %y, %o;
    ld.param.u64 %x, [from];
    ld.param.u64 %y, [to];
    mov.u32 %t, %tid.x;
    mul.wide.u32 %o, %t, 4;
    add.u64 %x, %x, %o;
    add.u64 %y, %y, %o;
    ld.global.b32 %v, [%x];
    st.global.b32 [%y], %v;
    ret;
}
";

/// A directory with files, in which the program runs.
struct Place(TempDir);

/// What the program did: exit code, standard output, standard error.
type Outcome = (i32, String, String);

impl Place {
    fn new() -> Self {
        let place = Self(TempDir::new().unwrap());
        place.ptx("saxpy.ptx", SAXPY);
        place.ptx("copy.ptx", COPY);
        place
    }

    fn ptx(&self, name: &str, body: &str) {
        self.put(name, format!("{HEAD}{body}"));
    }

    fn put(&self, name: &str, bytes: impl AsRef<[u8]>) {
        fs::write(self.0.path().join(name), bytes).unwrap();
    }

    fn get(&self, name: &str) -> Vec<u8> {
        fs::read(self.0.path().join(name)).unwrap_or_else(|e| panic!("{name}: {e}"))
    }

    fn names(&self) -> Vec<String> {
        let entries = fs::read_dir(self.0.path()).unwrap();
        let mut names: Vec<String> = entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    /// Runs the program with arguments that spaces separate.
    fn run(&self, line: &str) -> Outcome {
        run_in(self.0.path(), line)
    }

    #[track_caller]
    fn good(&self, line: &str) -> String {
        let (code, out, err) = self.run(line);
        assert_eq!((code, err.as_str()), (0, ""), "{line}\n{out}");
        out
    }

    /// Runs what fails, and expects all of these parts in the message.
    #[track_caller]
    fn bad(&self, line: &str, code: i32, parts: &[&str]) {
        let (found, out, err) = self.run(line);
        assert_eq!(found, code, "{line}\n{out}{err}");
        assert_eq!(err.matches("error: ").count(), 1, "{line}\n{err}");
        for part in parts {
            assert!(err.contains(part), "{line}: `{part}` is not in\n{err}");
        }
    }
}

fn run_in(folder: &Path, line: &str) -> Outcome {
    let mut command = Command::new(assert_cmd::cargo::cargo_bin!("ptxvm"));
    let output = command.current_dir(folder).args(line.split_whitespace()).output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (output.status.code().unwrap(), text(output.stdout), text(output.stderr))
}

/// An npy file of version 1 with this header and data.
fn npy(dict: &str, data: &[u8]) -> Vec<u8> {
    let mut file = b"\x93NUMPY\x01\x00".to_vec();
    file.extend((dict.len() as u16).to_le_bytes());
    file.extend(dict.bytes());
    file.extend(data);
    file
}

fn floats(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

fn npy_floats(values: &[f32]) -> Vec<u8> {
    let dict = format!("{{'descr': '<f4', 'fortran_order': False, 'shape': ({},), }}\n", values.len());
    npy(&dict, &floats(values))
}

// ------------------------------------------------------------------------------------------------------------ arguments

/// A kernel that stores its one parameter of `bits` bits.
fn store(bits: u32) -> String {
    let register = bits.max(16);
    format!(
        ".visible .entry store(.param .b{bits} v, .param .u64 to)\n{{\n    .reg .b{register} %v; .reg .b64 %to;\n    \
         ld.param.b{bits} %v, [v];\n    ld.param.u64 %to, [to];\n    st.global.b{bits} [%to], %v;\n    ret;\n}}\n"
    )
}

#[test]
fn numbers_reach_the_kernel_to_the_bit() {
    let place = Place::new();
    for bits in [8, 16, 32, 64] {
        place.ptx(&format!("{bits}.ptx"), &store(bits));
    }
    for (bits, spec, expected) in [
        (8, "i8:-128", 0x80),
        (8, "u8:255", 0xff),
        (16, "i16:-2", 0xfffe),
        (16, "u16:0xBEEF", 0xbeef),
        (32, "i32:-2147483648", 0x8000_0000),
        (32, "i32:0x7fffffff", 0x7fff_ffff),
        (32, "u32:4294967295", 0xffff_ffff),
        (64, "i64:-1", u64::MAX),
        (64, "i64:-9223372036854775808", 1 << 63),
        (64, "u64:18446744073709551615", u64::MAX),
        (64, "null", 0),
        (32, "f32:1.5", 0x3fc0_0000),
        (32, "f32:-inf", 0xff80_0000),
        (32, "f32:16777217", 0x4b80_0000), // a tie: to even
        (64, "f64:1e-3", 0.001f64.to_bits()),
        (16, "f16:1", 0x3c00),
        (16, "f16:0.1", 0x2e66),
        (16, "f16:-0.0", 0x8000),
        (16, "f16:65519.9", 0x7bff),
        (16, "f16:inf", 0x7c00),
        (16, "f16:nan", 0x7e00),
        (16, "f16:0.00006102", 0x0400), // the smallest normal number, from below
        (16, "f16:0.0000000298023223876953125", 0x0000), // half of the smallest: a tie
        (16, "f16:0.00000002980232238769532", 0x0001),
        (16, "f16:1e-300", 0x0000),
        (16, "f16:2049", 0x6800), // a tie: to even
        (16, "f16:2051", 0x6802),
        (16, "bf16:1", 0x3f80),
        (16, "bf16:0.1", 0x3dcd),
        (16, "bf16:-3.3895314e38", 0xff7f),
        (16, "bf16:1e-40", 0x0001),
        (16, "bf16:1.00390625", 0x3f80), // a tie: to even
        (16, "bf16:1.9999", 0x4000),     // into the next binade
        (32, "bytes:00fF12Ab", 0xab12_ff00),
    ] {
        let line = format!("run {bits}.ptx --grid 1 --block 1 --arg {spec} out:-:u{bits}[1]");
        assert_eq!(place.good(&line), format!("argument 2, u{bits}[1]:\n{expected}\n"), "{spec}");
    }
    for (bits, spec, part) in [
        (8, "i8:128", "no integer of -128 to 127"),
        (8, "u8:-1", "no integer of 0 to 255"),
        (32, "u32:4294967296", "no integer"),
        (32, "u32:", "no integer"),
        (32, "i32:--5", "no integer"),
        (32, "i32:+5", "no integer"),
        (32, "i32:1.5", "no integer"),
        (64, "u64:0x10000000000000000", "no integer"),
        (64, "u64:99999999999999999999999999999999999999999999", "no integer"),
        (32, "f32:one", "no number"),
        (32, "f32:1e39", "too large for f32"),
        (64, "f64:1e999", "too large for f64"),
        (16, "f16:65520", "too large for f16"),
        (16, "bf16:3.4e38", "too large for bf16"),
        (32, "bytes:00f", "two hexadecimal digits each"),
        (32, "bytes:", "two hexadecimal digits each"),
        (32, "bytes:00gg0000", "two hexadecimal digits each"),
        (32, "f8:1", "`f8:` is unknown; give a number"),
        (32, "5", "give a number (i32:5"),
        (64, "zeros:-4", "no number of bytes"),
        (64, "scratch:9223372036854775808", "no number of bytes"),
        (64, "in:", "a file is missing"),
        (64, "inout:x.npy", "two files are needed"),
        (64, "inout:a:b:c", "two files are needed"),
        (64, "inout:a:", "a file is missing"),
        (64, "out:y.npy", "type and shape are missing"),
        (64, "out:y.npy:f32", "no type and shape"),
        (64, "out:y.npy:f31[4]", "`f31` is no type; there are i8"),
        (64, "out:y.npy:f32[]", "no dimension"),
        (64, "out:y.npy:f32[4,-1]", "`-1` is no dimension"),
        (64, "out:y.npy:f32[4294967296,4294967296]", "too large"),
        (64, "out::f32[4]", "a file is missing"),
    ] {
        let line = format!("run {bits}.ptx --grid 1 --block 1 --arg {spec} out:-:u{bits}[1]");
        place.bad(&line, 2, &["--arg <SPEC>...", part]);
    }
}

/// Loads two rows of four words through a tensor map, from row 1 and column 4 on, and stores them through another.
const BOXES: &str = "
.visible .entry boxes(.param .align 64 .b8 from[128], .param .align 64 .b8 to[128])
{
    .reg .b32 m, s; .reg .b64 a, b; .reg .pred p;
    .shared .align 8 .b64 bar;
    .shared .align 128 .b8 tile[32];
    mov.u32 m, bar;
    mov.u32 s, tile;
    mov.b64 a, from;
    mov.b64 b, to;
    mbarrier.init.shared.b64 [m], 1;
    fence.proxy.async;
    mbarrier.arrive.expect_tx.shared.b64 _, [m], 32;
    cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [s], [a, {4, 1}], [m];
wait:
    mbarrier.try_wait.parity.shared.b64 p, [m], 0;
    @!p bra wait;
    cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [b, {0, 1}], [s];
    cp.async.bulk.commit_group;
    cp.async.bulk.wait_group 0;
    ret;
}
";

#[test]
fn tensor_maps_of_memory_are_arguments() {
    let place = Place::new();
    let head = HEAD.replace("8.0", "8.6").replace("sm_80", "sm_90");
    place.put("boxes.ptx", head + BOXES);
    place.put("x.raw", (0..32i32).flat_map(i32::to_le_bytes).collect::<Vec<u8>>());
    let run = "run boxes.ptx --grid 1 --block 1 --arg";
    let from = "map:i32[4,8]:box[2,4]:0:in:x.raw";
    let out = place.good(&format!("{run} {from} map:f32[3,4]:box[2,4]:0:out:-:i32[3,4]"));
    let (title, rows) = out.split_once('\n').unwrap();
    assert_eq!(title, "argument 2, i32[3, 4]:");
    assert_eq!(rows.lines().skip(1).collect::<Vec<_>>(), ["12 13 14 15", "20 21 22 23"]);
    for (map, part) in [
        ("map:i32[4,8]:box[2,4]:0", "a tensor, a box, a swizzle and memory are needed"),
        ("map:i32[4,8]:[2,4]:0:in:x.raw", "the box is missing"),
        ("map:i32[]:box[2,4]:0:in:x.raw", "no dimension"),
        ("map:i31[4,8]:box[2,4]:0:in:x.raw", "`i31` is no type"),
        ("map:i32[4,8]:box[2,4]:16:in:x.raw", "a swizzle of `16` bytes"),
        ("map:i32[4,8]:box[2,4]:0:null", "`null` is no memory"),
        ("map:i32[4,8]:box[2,4]:0:u64:5", "`u64:5` is no memory"),
        ("map:i32[4,8]:box[2]:0:in:x.raw", "must fit the dimensions"),
        ("map:i32[4,8]:box[2,3]:0:in:x.raw", "12 bytes wide"),
        ("map:i32[4,7]:box[2,4]:0:in:x.raw", "28 bytes"),
        ("map:i32[4,8]:box[2,4294967300]:0:in:x.raw", "1 to 256"),
        ("map:i32[4,8]:box[2,4]:64:in:x.raw", "how its rows lie is not documented"),
        ("map:i32[4,8]:box[2,4]:0:in:none.raw", "none.raw"),
    ] {
        place.bad(&format!("{run} {map} map:i32[4,8]:box[2,4]:0:zeros:128"), 2, &[part]);
    }
    // The tensor is larger than its memory.
    place.bad(&format!("{run} map:i32[400,8]:box[2,4]:0:scratch:48 {from}"), 1, &["OutOfBounds"]);
}

#[test]
fn buffers_come_from_files_and_go_to_files() {
    let place = Place::new();
    let (x, y) = ([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], [0.5, 0.25, 0.0, -1.0, 8.0, 100.0]);
    let sum = floats(&[2.5, 4.25, 6.0, 7.0, 18.0, 112.0]);
    let shaped = "{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), }";
    place.put("x.npy", npy_floats(&x));
    place.put("x.raw", floats(&x));
    place.put("y.npy", npy(shaped, &floats(&y)));
    place.put("y.bin", floats(&y));
    let saxpy = "run saxpy.ptx --grid 1 --block 32 --arg u32:6 f32:2";
    // NumPy writes this header to the byte: 128 bytes before the data.
    let header = npy(&format!("{shaped:<117}\n"), &[]);
    assert_eq!(header.len(), 128);

    assert_eq!(place.good(&format!("{saxpy} in:x.npy inout:y.npy:z.npy")), "");
    assert_eq!(place.get("z.npy"), [header.clone(), sum.clone()].concat());
    // A file is replaced, also the one that was loaded; its shape goes with it.
    assert_eq!(place.good(&format!("{saxpy} in:x.raw --arg inout:y.npy:y.npy")), "");
    assert_eq!(place.get("y.npy"), [header, sum.clone()].concat());
    // Bytes alone, in and out.
    assert_eq!(place.good(&format!("{saxpy} in:x.npy inout:y.bin:z.raw")), "");
    assert_eq!(place.get("z.raw"), sum);
    // As text, a line for each row.
    place.put("y.npy", npy(shaped, &floats(&y)));
    let printed = place.good(&format!("{saxpy} in:x.npy inout:y.npy:-"));
    assert_eq!(printed, "argument 4, f32[2, 3]:\n2.5 4.25 6.0\n7.0 18.0 112.0\n");
    // Nobody has written the last two of `out`: they are read as 0.
    let copy = "run copy.ptx --grid 1 --block 6 --arg in:x.npy";
    assert_eq!(place.good(&format!("{copy} out:o.npy:i32[8]")), "");
    let expected =
        npy(&format!("{:<117}\n", "{'descr': '<i4', 'fortran_order': False, 'shape': (8,), }"), &floats(&x));
    assert_eq!(place.get("o.npy"), [expected, vec![0; 8]].concat());
    assert_eq!(place.good(&format!("{copy} out:o.raw:f32[3,1,2]")), "");
    assert_eq!(place.get("o.raw"), floats(&x));
    let scalar = "{'descr': '<f4', 'fortran_order': False, 'shape': (), }";
    place.put("scalar.npy", npy(scalar, &floats(&[7.0])));
    assert_eq!(
        place.good("run copy.ptx --grid 1 --block 1 --arg inout:scalar.npy:s.npy scratch:4"),
        "",
        "an array without dimensions"
    );
    assert_eq!(place.get("s.npy"), npy(&format!("{scalar:<117}\n"), &floats(&[7.0])));
    // No trace of what was written on the way.
    assert!(!place.names().iter().any(|name| name.contains("part")), "{:?}", place.names());
}

#[test]
fn buffers_larger_than_a_piece_are_saved_whole() {
    let place = Place::new();
    let words: Vec<u8> = (0..600_000u32).flat_map(|i| i.wrapping_mul(2_654_435_761).to_le_bytes()).collect();
    place.put("big.raw", &words);
    place.good("run copy.ptx --grid 1 --block 32 --arg in:big.raw inout:big.raw:big.out");
    assert!(place.get("big.out") == words, "the content differs");
}

#[test]
fn zeros_are_written_and_scratch_is_not() {
    let place = Place::new();
    let copy = "run copy.ptx --grid 1 --block 4 --arg";
    assert_eq!(place.good(&format!("{copy} zeros:16 out:-:u32[4]")), "argument 2, u32[4]:\n0 0 0 0\n");
    place.bad(
        &format!("{copy} scratch:16 out:y.raw:u32[4]"),
        1,
        &["Uninitialized", "copy.ptx:", "lanes 0-3"],
    );
    assert!(!place.names().contains(&"y.raw".to_owned()), "a fault saves nothing");
    place.good(&format!("{copy} scratch:16 out:y.raw:u32[4] --checks none"));
    place.good(&format!("{copy} zeros:16 scratch:16"));
    place.bad(&format!("{copy} zeros:12 scratch:16"), 1, &["OutOfBounds", "`zeros:12` (12 bytes", "lane 3"]);
    place.bad(&format!("{copy} null scratch:16"), 1, &["OutOfBounds"]);
    place.bad(
        &format!("{copy} zeros:99999999999999 scratch:16"),
        2,
        &["out of memory", "zeros:99999999999999"],
    );
}

#[test]
fn arguments_must_fit_the_parameters() {
    let place = Place::new();
    let saxpy = "run saxpy.ptx --grid 1 --block 1 --arg";
    place.bad(
        &format!("{saxpy} u32:6 f32:2 null"),
        2,
        &["4 parameters (n .u32, a .f32, x .u64, y .u64) of `saxpy`", "3 arguments", "--arg"],
    );
    place.bad(
        &format!("{saxpy} u32:6 f64:2 null null"),
        2,
        &["--arg f64:2: 8 bytes", "parameter 2", "(a .f32) has 4"],
    );
    place.bad("run saxpy.ptx --grid 1 --block 1", 2, &["0 arguments"]);
    place.ptx(
        "struct.ptx",
        ".visible .entry k(.param .align 4 .b8 s[12]) { ret; }\n.visible .entry none() { ret; }",
    );
    place.good("run struct.ptx --entry k --grid 1 --block 1 --arg bytes:000102030405060708090a0b");
    place.bad("run struct.ptx --entry k --grid 1 --block 1 --arg null", 2, &["(s .b8[12]) has 12"]);
    place.bad(
        "run struct.ptx --entry none --grid 1 --block 1 --arg null",
        2,
        &["0 parameters of `none`, but 1"],
    );
    place.good("run struct.ptx --entry none --grid 1 --block 1");
}

// ----------------------------------------------------------------------------------------------------------------- npy

#[test]
fn npy_headers_of_all_writers_are_read() {
    let place = Place::new();
    let data = floats(&[1.0, 2.0]);
    let long = |version: u8, dict: &str| {
        let mut file = [&b"\x93NUMPY"[..], &[version, 0]].concat();
        file.extend((dict.len() as u32).to_le_bytes());
        [&file, dict.as_bytes(), &data].concat()
    };
    let usual = "{'descr': '<f4', 'fortran_order': False, 'shape': (2,), }\n";
    for (i, file) in [
        npy(usual, &data),
        npy("{\"shape\":(2,),\"fortran_order\":False,\"descr\":\"=f4\"}", &data),
        npy("  { 'fortran_order' : False , 'descr' : '<f4' , 'shape' : ( 1 , 2 ) , }   \n", &data),
        npy("{'descr': '|V2', 'fortran_order': False, 'shape': (2, 2)}", &data),
        npy("{'descr': '<c8', 'fortran_order': False, 'shape': (1,)}", &data),
        long(2, usual),
        long(3, usual),
    ]
    .iter()
    .enumerate()
    {
        place.put("x.npy", file);
        let out = place.good("run copy.ptx --grid 1 --block 2 --arg in:x.npy out:-:f32[2]");
        assert_eq!(out, "argument 2, f32[2]:\n1.0 2.0\n", "{i}");
    }
    // What other types print as.
    for (descr, shape, name, text) in [
        ("|i1", "8,", "i8[8]", "0 0 -128 63 0 0 0 64"),
        ("|u1", "2, 4", "u8[2, 4]", "0 0 128 63\n0 0 0 64"),
        ("<i2", "4,", "i16[4]", "0 16256 0 16384"),
        ("<u8", "1,", "u64[1]", "4611686019492741120"),
        ("<f2", "4,", "f16[4]", "0.0 1.875 0.0 2.0"),
        ("<V2", "4,", "bf16[4]", "0.0 1.0 0.0 2.0"),
        ("<f8", "1,", "f64[1]", "2.000000473111868"),
    ] {
        place.put(
            "x.npy",
            npy(&format!("{{'descr': '{descr}', 'fortran_order': False, 'shape': ({shape})}}"), &data),
        );
        let out = place.good("run copy.ptx --grid 1 --block 2 --arg inout:x.npy:- scratch:8");
        assert_eq!(out, format!("argument 1, {name}:\n{text}\n"));
    }
    place.put("x.npy", npy("{'descr': '<c8', 'fortran_order': False, 'shape': (1,)}", &data));
    place.bad(
        "run copy.ptx --grid 1 --block 2 --arg inout:x.npy:- scratch:8",
        2,
        &["inout:x.npy:-", "not known"],
    );
    place.put("x.raw", &data);
    place.bad("run copy.ptx --grid 1 --block 2 --arg inout:x.raw:y.npy scratch:8", 2, &["not known", ".raw"]);
}

#[test]
fn bad_npy_files_are_refused() {
    let place = Place::new();
    let good = "{'descr': '<f4', 'fortran_order': False, 'shape': (2,)}";
    let eight = [0; 8];
    let cases: Vec<(Vec<u8>, &str)> = vec![
        (vec![], "no npy file"),
        (b"\x93NUMPX\x01\x00".to_vec(), "no npy file"),
        (b"\x93NUMPY\x01".to_vec(), "cut off"),
        (b"\x93NUMPY\x01\x00\xff".to_vec(), "cut off"),
        (b"\x93NUMPY\x01\x00\xff\xff{}".to_vec(), "cut off"),
        (b"\x93NUMPY\x02\x00\xff\xff\xff\xff{}".to_vec(), "cut off"),
        (b"\x93NUMPY\x04\x00\x00\x00\x00\x00".to_vec(), "version 4.0"),
        (b"\x93NUMPY\x01\x00\x01\x00\xff".to_vec(), "no text"),
        (npy(good, &[0; 7]), "7 bytes of data"),
        (npy(good, &[0; 9]), "9 bytes of data"),
        (npy("", &eight), "where `{` should be"),
        (npy("{}", &eight), "lacks"),
        (npy("{'descr': '<f4', 'fortran_order': False}", &eight), "lacks"),
        (npy("{'descr': '<f4'", &eight), "where `}` should be"),
        (npy("{'descr", &eight), "a string without an end"),
        (npy("{'descr' '<f4'}", &eight), "where `:` should be"),
        (npy(&good.replace("False", "True"), &eight), "Fortran order"),
        (npy(&good.replace("'<f4'", "'>f4'"), &eight), "big-endian"),
        (npy(&good.replace("'<f4'", "'|O'"), &eight), "element type `|O`"),
        (npy(&good.replace("'<f4'", "'<U8'"), &eight), "only numbers"),
        (npy(&good.replace("'<f4'", "'<f0'"), &eight), "only numbers"),
        (npy(&good.replace("'<f4'", "'<V99999999999999999999'"), &eight), "only numbers"),
        (npy(&good.replace("'<f4'", "[('a', '<f4'), ('b', '<i4')]"), &eight), "no structures"),
        (npy(&good.replace("(2,)", "(-2,)"), &eight), "a dimension ``"),
        (npy(&good.replace("(2,)", "(2 3)"), &eight), "where `)` should be"),
        (npy(&good.replace("(2,)", "2"), &eight), "where `(` should be"),
        (npy(&good.replace("(2,)", "(99999999999999999999,)"), &eight), "a dimension"),
        (npy(&good.replace("(2,)", "(4294967296, 4294967296, 2)"), &eight), "8 bytes of data"),
        (npy(&good.replace("(2,)", &format!("({})", "1,".repeat(65))), &eight), "64 dimensions"),
        (npy(&good.replace("descr", "dtype"), &eight), "unknown key `dtype`"),
    ];
    for (file, part) in cases {
        place.put("x.npy", &file);
        let line = "run copy.ptx --grid 1 --block 2 --arg in:x.npy scratch:8";
        place.bad(line, 2, &["x.npy: ", part]);
    }
}

// -------------------------------------------------------------------------------------------------- options and errors

#[test]
fn errors_name_the_option_or_file() {
    let place = Place::new();
    place.put("x.raw", floats(&[0.0; 4]));
    place.put("binary.ptx", b"\x7fELF\xff\xfe");
    place.ptx("two.ptx", ".visible .entry _Z3addPf() { ret; }\n.visible .entry _Z3addPi() { ret; }\n");
    place.ptx("none.ptx", ".visible .func f() { ret; }\n");
    let copy = "run copy.ptx --grid 1 --block 1";
    for (line, parts) in [
        ("".to_owned(), &["Usage:"][..]),
        ("walk copy.ptx".into(), &["walk"]),
        ("run".into(), &["--grid", "--block", "<PTX>"]),
        ("run copy.ptx --grid 1".into(), &["--block"]),
        ("run copy.ptx --grid 1,2,3,4 --block 1".into(), &["--grid", "4 dimensions"]),
        ("run copy.ptx --grid 1, --block 1".into(), &["--grid", "`` is no number"]),
        ("run copy.ptx --grid 1 --block 1x1".into(), &["--block", "`1x1` is no number"]),
        (format!("{copy} --checks some"), &["--checks", "all, strict, none, init, race"]),
        (format!("{copy} --threads 5000"), &["--threads"]),
        (format!("{copy} --seed x"), &["--seed"]),
        (format!("{copy} --budget=-1"), &["--budget"]),
        ("run gone.ptx --grid 1 --block 1".into(), &["gone.ptx: "]),
        ("run . --grid 1 --block 1".into(), &[".: "]),
        ("run binary.ptx --grid 1 --block 1".into(), &["binary.ptx", "nvcc -ptx"]),
        ("check gone.ptx".into(), &["gone.ptx: "]),
        (format!("{copy} --arg in:gone.npy scratch:4"), &["gone.npy: "]),
        (format!("{copy} --arg in:x.raw out:gone/y.npy:f32[4]"), &["gone/y.npy: there is no directory gone"]),
        (format!("{copy} --arg in:x.raw out:.:f32[4]"), &[".: exists and is no regular file"]),
        (
            format!("{copy} --arg in:x.raw out:/dev/null:f32[4]"),
            &["/dev/null: exists and is no regular file"],
        ),
        (format!("{copy} --arg inout:x.raw:y.raw out:y.raw:f32[4]"), &["--arg out:y.raw:f32[4]", "another"]),
        (
            "run two.ptx --grid 1 --block 1".into(),
            &["two.ptx has 2 kernels", "--entry", "_Z3addPf, _Z3addPi"],
        ),
        ("run two.ptx --entry add --grid 1 --block 1".into(), &["--entry add", "_Z3addPf, _Z3addPi"]),
        ("run two.ptx --entry sub --grid 1 --block 1".into(), &["--entry sub", "it has _Z3addPf, _Z3addPi"]),
        ("run none.ptx --grid 1 --block 1".into(), &["none.ptx has no kernel"]),
        // The launch does not fit the device or the kernel.
        ("run two.ptx --entry _Z3addPf --grid 0 --block 1".into(), &["grid of (0,1,1)"]),
        ("run two.ptx --entry _Z3addPf --grid 1 --block 2048".into(), &["block of (2048,1,1)"]),
        ("run two.ptx --entry _Z3addPf --grid 1 --block 1 --shared 9999999".into(), &["shared memory"]),
        ("run two.ptx --entry _Z3addPf --grid 99999 --block 1 --cooperative".into(), &["at the same time"]),
        ("report copy.ptx --json --grid 1 --block 1 --arg in:x.raw out:-:f32[4]".into(), &["--json"]),
    ] {
        let (code, out, err) = place.run(&line);
        assert_eq!(code, 2, "{line}\n{out}{err}");
        assert_eq!(out, "", "{line}");
        for part in parts {
            assert!(err.contains(part), "{line}: `{part}` is not in\n{err}");
        }
    }
    assert_eq!(place.names(), ["binary.ptx", "copy.ptx", "none.ptx", "saxpy.ptx", "two.ptx", "x.raw"]);
}

#[test]
fn a_kernel_may_be_named_without_its_mangling() {
    let place = Place::new();
    place
        .ptx("k.ptx", ".visible .entry _Z5firstPf() { ret; }\n.visible .entry _ZN2ns6secondEPi() { ret; }\n");
    for (name, kernel) in
        [("first", "_Z5firstPf"), ("second", "_ZN2ns6secondEPi"), ("_Z5firstPf", "_Z5firstPf")]
    {
        let out = place.good(&format!("report k.ptx --entry {name} --grid 1 --block 1"));
        assert!(out.starts_with(&format!("{kernel}: ")), "{out}");
    }
}

#[test]
fn what_the_program_does_wrong_ends_with_1_and_what_is_missing_with_3() {
    let place = Place::new();
    place.ptx("loop.ptx", ".visible .entry k() { again: bra again; }\n");
    place.bad("run loop.ptx --grid 1 --block 1 --budget 1000", 1, &["Budget", "loop.ptx:4"]);
    place.ptx("trap.ptx", ".visible .entry k() { trap; }\n");
    place.bad("run trap.ptx --grid 1 --block 1", 1, &["Trap"]);
    // What one kernel or declaration lacks keeps nobody else from running, and is told nevertheless.
    place.ptx(
        "mixed.ptx",
        ".global .texref picture;
.extern .global .b32 elsewhere;
.global .u64 table[2] = {elsewhere, 0};
.func (.param .b32 r) helper() { frobnicate.u32; ret; }
.visible .entry works(.param .u64 p) { .reg .b64 %r; ld.param.u64 %r, [p]; st.global.u32 [%r], 7; ret; }
.visible .entry lacks() {
    tcgen05.wait::ld.sync.aligned;
    tcgen05.wait::ld.sync.aligned;
    tcgen05.wait::ld.sync.aligned;
    ret;
}
.visible .entry calls() { .param .b32 r; call (r), helper, (); ret; }
.visible .entry clusters() .reqnctapercluster 2, 1, 1 { ret; }
.visible .entry reads() { .reg .b64 %r; mov.u64 %r, table; ret; }
.visible .entry wrong() { add.u32 %nobody, 1, 2; ret; }",
    );
    let (code, out, err) = place.run("check mixed.ptx");
    assert_eq!((code, err.as_str()), (1, ""));
    for part in [
        "mixed.ptx: 2 of 6 kernels run, 1 wrong, ",
        "\n  kernel works(p .u64)\n",
        "\n  kernel lacks(): does not run\n",
        "\n  kernel calls(): does not run\n",
        "\n  kernel clusters()\n",
        "\n  kernel reads(): does not run\n",
        "\n  kernel wrong(): does not run\n",
        "`.texref` is not supported",
        "and at 2 more places",
    ] {
        assert!(out.contains(part), "`{part}` is not in\n{out}");
    }
    assert_eq!(out.matches("tcgen05.wait").count(), 1, "the first of its places\n{out}");
    place.good("run mixed.ptx --entry works --grid 1 --block 1 --arg zeros:4");
    for (entry, code, part) in [
        ("lacks", 3, "tcgen05"),
        ("calls", 3, "frobnicate"),
        ("reads", 3, "link first"),
        ("wrong", 1, "nobody"),
    ] {
        place.bad(&format!("run mixed.ptx --entry {entry} --grid 1 --block 1"), code, &[part]);
    }
    place.good("run mixed.ptx --entry clusters --grid 2 --block 1");
    place.good("run mixed.ptx --entry works --grid 4 --block 1 --cluster 1,1 --arg zeros:4 --checks init");
    for (options, part) in [
        ("--entry clusters --grid 3 --block 1", "no multiple of the cluster"),
        ("--entry clusters --grid 4 --block 1 --cluster 4", "the kernel requires (2,1,1)"),
        ("--entry works --grid 4 --block 1 --cluster 4,4,4 --arg zeros:4", "1 to 16 blocks"),
        ("--entry works --grid 4 --block 1 --cluster two --arg zeros:4", "--cluster"),
    ] {
        place.bad(&format!("run mixed.ptx {options}"), 2, &[part]);
    }
    place.ptx("syntax.ptx", ".visible .entry k( { ret; }\n");
    place.bad("run syntax.ptx --grid 1 --block 1", 1, &["syntax.ptx:4", "Syntax"]);
    place.ptx("name.ptx", ".visible .entry k() { .reg .b32 %a; add.u32 %a, %b, 1; ret; }\n");
    place.bad("run name.ptx --grid 1 --block 1", 1, &["Invalid", "name.ptx:4"]);
    place.ptx("new.ptx", ".visible .entry k() { .reg .b32 %a; tcgen05.wait::ld.sync.aligned; ret; }\n");
    place.bad("run new.ptx --grid 1 --block 1", 3, &["Unsupported", "new.ptx:4", "tcgen05"]);
}

#[test]
fn checks_can_be_chosen() {
    let place = Place::new();
    // Two warps write the same word of shared memory; then a value that nobody wrote goes to memory.
    place.ptx(
        "both.ptx",
        ".visible .entry k(.param .u64 to)
{
    .shared .align 4 .b8 s[4];
    .reg .b32 %a, %t, %u; .reg .b64 %to;
    mov.u32 %t, %tid.x;
    mov.u32 %a, s;
    st.shared.b32 [%a], %t;
    ld.param.u64 %to, [to];
    st.global.b32 [%to], %u;
    ret;
}",
    );
    let line = "run both.ptx --grid 1 --block 64 --arg scratch:4 --checks";
    place.good(&format!("{line} none"));
    for (checks, expected) in [("init", [true, false]), ("race", [false, true]), ("all", [true, true])] {
        let (code, _, err) = place.run(&format!("{line} {checks}"));
        assert_eq!(code, 1, "{checks}");
        assert_eq!(
            [err.contains("Uninitialized: "), err.contains("SharedRace: ")],
            expected,
            "{checks}\n{err}"
        );
    }
}

#[test]
fn results_do_not_depend_on_threads_or_seed() {
    let place = Place::new();
    let n: Vec<f32> = (0..4096).map(|i| i as f32).collect();
    place.put("x.npy", npy_floats(&n));
    let line =
        "report saxpy.ptx --json --grid 32 --block 128 --arg u32:4000 f32:3 in:x.npy inout:x.npy:y.npy";
    let first = place.good(line);
    let saved = place.get("y.npy");
    assert_eq!(saved[128..136], floats(&[0.0, 4.0]));
    for more in ["--threads 1", "--threads 7", "--seed 1", "--seed 18446744073709551615"] {
        assert_eq!(place.good(&format!("{line} {more}")), first, "{more}");
        assert!(place.get("y.npy") == saved, "{more}");
    }
}

#[test]
fn dynamic_shared_memory_and_cooperative_launches_work() {
    let place = Place::new();
    place.ptx(
        "shared.ptx",
        ".extern .shared .align 4 .b8 s[];
.visible .entry k(.param .u64 to)
{
    .reg .b32 %a, %t; .reg .b64 %to;
    mov.u32 %t, %dynamic_smem_size;
    mov.u32 %a, s;
    st.shared.b32 [%a+60], %t;
    ld.shared.b32 %t, [%a+60];
    ld.param.u64 %to, [to];
    st.global.b32 [%to], %t;
    ret;
}",
    );
    let line = "run shared.ptx --grid 1 --block 1 --arg out:-:u32[1] --shared";
    assert_eq!(place.good(&format!("{line} 64")), "argument 1, u32[1]:\n64\n");
    place.bad(&format!("{line} 60"), 1, &["OutOfBounds"]);
    // Block 0 waits for block 1: only a cooperative launch ends.
    place.ptx(
        "wait.ptx",
        ".visible .entry k(.param .u64 flag)
{
    .reg .pred %p; .reg .b32 %b, %v; .reg .b64 %f;
    ld.param.u64 %f, [flag];
    mov.u32 %b, %ctaid.x;
    setp.eq.u32 %p, %b, 0;
    @%p bra wait;
    st.release.gpu.global.u32 [%f], 1;
    ret;
wait:
    ld.acquire.gpu.global.u32 %v, [%f];
    setp.eq.u32 %p, %v, 0;
    @%p bra wait;
    ret;
}",
    );
    let line = "run wait.ptx --grid 2 --block 1 --arg zeros:4 --budget 100000";
    place.good(&format!("{line} --cooperative"));
    place.bad(line, 1, &["Budget"]);
}

const PRINTF: &str = r#"
.extern .func (.param .b32 r) vprintf (.param .b64 f, .param .b64 a);
.global .align 1 .b8 text[17] = {98, 108, 111, 99, 107, 32, 37, 100, 32, 115, 97, 121, 115, 32, 34, 10};
.visible .entry hello()
{
    .local .align 8 .b8 stack[8];
    .reg .b32 %b; .reg .b64 %s, %t;
    mov.u32 %b, %ctaid.x;
    mov.u64 %s, stack;
    cvta.local.u64 %s, %s;
    st.u32 [%s], %b;
    mov.u64 %t, text;
    cvta.global.u64 %t, %t;
    {
    .param .b64 p0;
    st.param.b64 [p0], %t;
    .param .b64 p1;
    st.param.b64 [p1], %s;
    .param .b32 r0;
    call.uni (r0), vprintf, (p0, p1);
    }
    ret;
}
"#;

#[test]
fn what_a_kernel_prints_goes_to_standard_output() {
    let place = Place::new();
    place.ptx("hello.ptx", PRINTF);
    let expected = "block 0 says \"\nblock 1 says \"\nblock 2 says \"\n";
    assert_eq!(place.good("run hello.ptx --grid 3 --block 1"), expected);
    assert!(place.good("report hello.ptx --grid 3 --block 1").starts_with(expected));
    let json = place.good("report hello.ptx --grid 1 --block 1 --json");
    assert!(json.contains(r#""printed":"block 0 says \"\n""#), "{json}");
}

// ------------------------------------------------------------------------------------------------------- check, report

#[test]
fn check_lists_kernels_and_all_that_is_wrong() {
    let place = Place::new();
    assert_eq!(
        place.good("check saxpy.ptx copy.ptx"),
        "saxpy.ptx: runs\n  kernel saxpy(n .u32, a .f32, x .u64, y .u64)\n\
         copy.ptx: runs\n  kernel copy(from .u64, to .u64)\n"
    );
    place.ptx(
        "limits.ptx",
        ".visible .func f() { ret; }
.visible .entry a(.param .align 8 .b8 s[24]) .reqntid 16, 4 { ret; }
.visible .entry b() .maxntid 256, 1, 1 { ret; }",
    );
    assert_eq!(
        place.good("check limits.ptx"),
        "limits.ptx: runs\n  kernel a(s .b8[24]), blocks of exactly 16,4,1 threads\n  kernel b(), blocks of at most 256 \
         threads\n"
    );
    place.ptx(
        "bad.ptx",
        ".visible .entry k(.param .u32 n)
{
    .reg .b32 %a;
    tcgen05.wait::ld.sync.aligned;
    frobnicate.u32 %a, 1;
    add.u32 %a, %a, %nobody;
    ret;
}",
    );
    let (code, out, err) = place.run("check bad.ptx saxpy.ptx");
    assert_eq!((code, err.as_str()), (1, ""));
    assert!(out.starts_with("bad.ptx: 1 wrong, 2 not supported\n  kernel k(n .u32)\n"), "{out}");
    for part in ["bad.ptx:7", "bad.ptx:8", "bad.ptx:9", "Unsupported: ", "Invalid: "] {
        assert!(out.contains(part), "`{part}` is not in\n{out}");
    }
    assert!(out.contains("saxpy.ptx: runs\n"), "files after a bad one are checked as well\n{out}");
    place.ptx("syntax.ptx", ".visible .entry k( { ret; }\n");
    let (code, out, _) = place.run("check syntax.ptx");
    assert_eq!(code, 1);
    assert!(out.starts_with("syntax.ptx: 1 wrong\n  Syntax: "), "{out}");
}

/// Line 5 parts the warp, line 8 reads with a stride of 128 bytes, line 12 has a bank conflict of 32 ways.
const SLOW: &str = ".version 8.0\n.target sm_80\n.address_size 64
.visible .entry slow(.param .u64 x) { .reg .pred %p; .reg .b32 %t, %s, %v; .reg .b64 %x, %o; .shared .align 4 .b8 a[4096];
    mov.u32 %t, %tid.x; setp.lt.u32 %p, %t, 8; @%p bra go;
    .loc 1 10 1
go: ld.param.u64 %x, [x]; mul.wide.u32 %o, %t, 128; add.u64 %x, %x, %o;
    ld.global.u32 %v, [%x];
    .loc 1 11 1
    mov.u32 %s, a;
    mad.lo.u32 %s, %t, 128, %s;
    st.shared.u32 [%s], %v;
    ret;
}
.file 1 \"slow.cu\"
";

#[test]
fn report_tells_where_the_time_goes() {
    let place = Place::new();
    place.put("slow.ptx", SLOW);
    let line = "report slow.ptx --grid 1 --block 32 --arg zeros:4096";
    let out = place.good(line);
    assert!(out.starts_with("slow: grid (1,1,1), block (32,1,1), 4096 bytes shared\n"), "{out}");
    // The rows of a table: columns, and what stands behind them.
    let rows = |out: &str, title: &str| -> Vec<String> {
        let (_, table) =
            out.split_once(&format!("\nhottest {title}, ")).unwrap_or_else(|| panic!("{title}: {out}"));
        let rows = table.lines().skip(1).take_while(|line| !line.is_empty());
        rows.map(|row| row.split_whitespace().collect::<Vec<_>>().join(" ")).collect()
    };
    let columns = "warps lanes divergent sectors/ideal wavefronts/ideal";
    let by_sectors = place.good(&format!("{line} --by sectors"));
    assert_eq!(
        rows(&by_sectors, "lines of the PTX"),
        [columns, "1 32.0 0 32/4 8: ld.global.u32 %v, [%x]; (slow.cu:10)"]
    );
    let by_wavefronts = place.good(&format!("{line} --by wavefronts"));
    assert_eq!(
        rows(&by_wavefronts, "lines of the PTX"),
        [columns, "1 32.0 0 32/1 12: st.shared.u32 [%s], %v; (slow.cu:11)"]
    );
    assert_eq!(rows(&by_wavefronts, "lines of the source"), [columns, "4 32.0 0 32/1 slow.cu:11"]);
    let by_divergent = place.good(&format!("{line} --by divergent"));
    let parted = rows(&by_divergent, "lines of the PTX");
    assert_eq!(parted.len(), 2, "{by_divergent}");
    assert!(parted[1].contains(" 1 5: mov.u32 %t"), "{by_divergent}");
    // By instructions, the first of equals first; the source lines sum up.
    assert_eq!(rows(&out, "lines of the PTX").len(), 1 + 7, "{out}");
    assert_eq!(rows(&place.good(&format!("{line} --top 2")), "lines of the PTX").len(), 1 + 2);
    assert_eq!(rows(&place.good(&format!("{line} --top 0")), "lines of the PTX").len(), 0);
}

#[test]
fn json_holds_every_counter() {
    let place = Place::new();
    let file = "a\"b.ptx";
    place.put(file, SLOW);
    let out = place.good(&format!("report {file} --json --grid 1 --block 32 --arg zeros:4096"));
    for part in [
        r#"{"kernel":"slow","grid":[1,1,1],"block":[32,1,1],"shared_bytes":4096,"#,
        r#""Global":{"warps":1,"lanes":32}"#,
        r#""flops":0,"mma_flops":0,"#,
        r#""global":{"requests":1,"bytes":128,"sectors":32,"ideal_sectors":4,"#,
        r#""wavefronts":32,"ideal_wavefronts":1}"#,
        r#""unique_sectors":{"read":32,"written":0},"barriers":0,"divergent":1,"printed":"","lines":[{"line":5,"#,
        r#"{"line":8,"text":"ld.global.u32 %v, [%x];","source":"slow.cu:10","warps":1,"lanes":32,"divergent":0,"#,
        r#""source":null,"#,
        r#""notes":[]}"#,
    ] {
        assert!(out.contains(part), "`{part}` is not in\n{out}");
    }
    // As many brackets as close: no text of this kernel holds any but in pairs.
    for (open, close) in [('{', '}'), ('[', ']')] {
        assert_eq!(out.matches(open).count(), out.matches(close).count());
    }
}

// -------------------------------------------------------------------------------------------------------------- README

/// Every console block of the README, run in the crate's folder, prints what the README says.
#[test]
fn the_readme_shows_what_the_program_prints() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let readme = fs::read_to_string(root.join("README.md")).unwrap();
    let mut ran = 0;
    for block in readme.split("```console\n").skip(1) {
        let block = block.split("```").next().unwrap();
        for call in block.split("$ ").skip(1) {
            let (line, expected) = call.split_once('\n').unwrap();
            let (_, out, err) = run_in(root, line.strip_prefix("ptxvm ").unwrap());
            assert_eq!(format!("{out}{err}"), expected.trim_end_matches('\n').to_owned() + "\n", "{line}");
            ran += 1;
        }
    }
    assert!(ran >= 3, "only {ran} commands were found");
}
