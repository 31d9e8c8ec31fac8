//! The parser: tables of texts with their trees and errors, modules in the style of three compilers, hostile input.

use std::time::{Duration, Instant};

use proptest::prelude::*;
use ptxvm::error::{Error, ErrorKind, Finding};
use ptxvm::ptx::ast::*;
use ptxvm::ptx::{MAX_DEPTH, MAX_DIMENSIONS, parse};
use ptxvm::types::{Space, Type};

use crate::support::soup;

const NVCC: &str = include_str!("../parse/nvcc.ptx");
const CLANG: &str = include_str!("../parse/clang.ptx");
const TRITON: &str = include_str!("../parse/triton.ptx");
const REAL: &[&str] = &[NVCC, CLANG, TRITON];

/// What every module starts with; the text after it begins in line 2.
const HEAD: &str = ".version 8.5 .target sm_90 .address_size 64\n";

#[track_caller]
fn good(text: &str) -> Module<'_> {
    parse("t.ptx", text).unwrap_or_else(|error| panic!("{error}\n{text}"))
}

fn bad(text: &str) -> Finding {
    match parse("t.ptx", text) {
        Err(Error::Fault(mut found) | Error::Unsupported(mut found)) if found.len() == 1 => found.remove(0),
        other => panic!("{other:?}\n{text}"),
    }
}

/// The statements of a kernel with this body.
fn with_body<T>(body: &str, check: impl FnOnce(&[Statement<'_>]) -> T) -> T {
    let text = format!("{HEAD}.entry k() {{\n{body}\n}}");
    check(good(&text).functions[0].body.as_deref().unwrap())
}

fn name(name: &str) -> Operand<'_> {
    Operand::Name(name, 0)
}

fn at<'a>(base: &'a str, offset: i64, rest: Vec<Operand<'a>>) -> Operand<'a> {
    Operand::Address(Box::new(Address { base: Some(base), offset, rest }))
}

fn pair<'a>(a: Operand<'a>, b: Operand<'a>) -> Operand<'a> {
    Operand::Pair(Box::new(a), Box::new(b))
}

#[test]
fn operands() {
    use Operand::{F32, F64, Integer, List, Name, Negated, Not, Sink, Vector};
    let int = |value: i64| Integer(value as u64);
    let nowhere = |offset| Operand::Address(Box::new(Address { base: None, offset, rest: vec![] }));
    let cases: Vec<(&str, Vec<Operand<'_>>)> = vec![
        ("ret", vec![]),
        ("mov a, %tid.x", vec![name("a"), name("%tid.x")]),
        ("mov v.w, %v1.x", vec![name("v.w"), name("%v1.x")]),
        ("vadd a, a.b0, b.h1", vec![name("a"), name("a.b0"), name("b.h1")]),
        ("mov $x$1, _y", vec![name("$x$1"), name("_y")]),
        // Integers in every base, and their ends.
        ("i 0, 7, -7, - 7, +7", vec![int(0), int(7), int(-7), int(-7), int(7)]),
        ("i 0x1F, 0XfU, 017, 0b101, 0B1U, 5U, 0U", [31, 15, 15, 5, 1, 5, 0].map(int).to_vec()),
        ("i 18446744073709551615, -9223372036854775808", vec![Integer(u64::MAX), Integer(1 << 63)]),
        // Floats.
        ("f 0f3F800000, 0Fbf800000", vec![F32(0x3F80_0000), F32(0xBF80_0000)]),
        ("f 0d3FF0000000000000, 0DBFF0000000000000", vec![F64(1f64.to_bits()), F64((-1f64).to_bits())]),
        (
            "f 1.5, 1., 1e3, 2.5E-1, 00.5",
            [1.5, 1.0, 1000.0, 0.25, 0.5].map(|v: f64| F64(v.to_bits())).to_vec(),
        ),
        ("f -1.5, .5, -.5e-1", [-1.5, 0.5, -0.05].map(|v: f64| F64(v.to_bits())).to_vec()),
        // Constant expressions: precedence and types as in C with 64-bit integers.
        ("c 1+2*3, (1+2)*3, 7-2-1, 100/7 % 4", [7, 9, 4, 2].map(int).to_vec()),
        ("c 1<<2|1, 1|2^3&4, 5 % 3, -7/2, -7 % 4", [5, 3, 2, -3, -3].map(int).to_vec()),
        ("c !3, !0, ~0, - -5, -~5, !!7", [0, 1, -1, 5, 6, 1].map(int).to_vec()),
        ("c 1&&0||3==3, 1<2, 2<=1, -1>0, -1>0U, 1!=1", [1, 1, 0, 0, 1, 0].map(int).to_vec()),
        (
            "c -8>>1, -8U>>1, 1<<70, WARP_SZ, -WARP_SZ*2",
            vec![int(-4), Integer((-8i64 as u64) >> 1), int(64), int(32), int(-64)],
        ),
        ("c 1?2:3, 0?2:0?4:5, (.u64)-1>>63, (.s64)-1U>>63", [2, 5, 1, -1].map(int).to_vec()),
        ("c (-9223372036854775807-1)/-1, -9223372036854775808/-1", vec![Integer(1 << 63), int(0)]),
        ("c 1.5+2.5*2.0, 3.0/2.0-1.0", vec![F64(6.5f64.to_bits()), F64(0.5f64.to_bits())]),
        // Addresses and symbols with offsets.
        ("ld a, [b]", vec![name("a"), at("b", 0, vec![])]),
        ("ld a, [ %rd1 + 0 ]", vec![name("a"), at("%rd1", 0, vec![])]),
        (
            "ld a, [b+-4], [b-4], [b+4*2+1], [b-4+12]",
            vec![name("a"), at("b", -4, vec![]), at("b", -4, vec![]), at("b", 9, vec![]), at("b", 8, vec![])],
        ),
        ("ld a, [4096], [-4]", vec![name("a"), nowhere(4096), nowhere(-4)]),
        (
            "mov a, s+4, s-4, s+-4, s + 2*3",
            vec![name("a"), Name("s", 4), Name("s", -4), Name("s", -4), Name("s", 6)],
        ),
        (
            "cp [a], [m, {x, 5}, _], p",
            vec![at("a", 0, vec![]), at("m", 0, vec![Vector(vec![name("x"), int(5)]), Sink]), name("p")],
        ),
        // Predicates, pairs, sinks.
        ("setp p|q, a, !r", vec![pair(name("p"), name("q")), name("a"), Not("r")]),
        ("setp p|_, _|q, _", vec![pair(name("p"), Sink), pair(Sink, name("q")), Sink]),
        ("add a, -b, - %c", vec![name("a"), Negated("b"), Negated("%c")]),
        ("mov {a, _, 1}, b", vec![Vector(vec![name("a"), Sink, int(1)]), name("b")]),
        // Calls.
        ("call f", vec![name("f")]),
        ("call f, ()", vec![name("f"), List(vec![])]),
        (
            "call (r), f, (a, -1), proto",
            vec![List(vec![name("r")]), name("f"), List(vec![name("a"), int(-1)]), name("proto")],
        ),
        ("mov a, (3)", vec![name("a"), int(3)]),
    ];
    for (text, operands) in &cases {
        with_body(&format!("{text};"), |body| match body {
            [Statement::Instruction(found)] => assert_eq!(&found.operands, operands, "{text}"),
            other => panic!("{text}: {other:?}"),
        });
    }
}

#[test]
fn instructions() {
    // The text; its guard, opcode and modifiers.
    type Case<'a> = (&'a str, Option<(&'a str, bool)>, &'a str, &'a [&'a str]);
    let cases: &[Case<'_>] = &[
        ("ret;", None, "ret", &[]),
        ("@p bra L;", Some(("p", false)), "bra", &[]),
        ("@!%p1 bra.uni L;", Some(("%p1", true)), "bra", &["uni"]),
        ("@ ! p add .s32 a, a, 1;", Some(("p", true)), "add", &["s32"]),
        (
            "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 a;",
            None,
            "mma",
            &["sync", "aligned", "m16n8k8", "row", "col", "f32", "tf32", "tf32", "f32"],
        ),
        (
            "ld.global.L1::evict_last.L2::128B.v4.b32 a;",
            None,
            "ld",
            &["global", "L1::evict_last", "L2::128B", "v4", "b32"],
        ),
        (
            "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes a;",
            None,
            "cp",
            &["async", "bulk", "tensor", "2d", "shared::cluster", "global", "mbarrier::complete_tx::bytes"],
        ),
        ("tcgen05.ld.16x256b.x4 a;", None, "tcgen05", &["ld", "16x256b", "x4"]),
    ];
    for (text, guard, opcode, modifiers) in cases {
        with_body(text, |body| match body {
            [Statement::Instruction(found)] => {
                assert_eq!(found.guard, guard.map(|(name, negated)| Guard { name, negated }), "{text}");
                assert_eq!(
                    (found.opcode, &found.modifiers[..], found.line),
                    (*opcode, *modifiers, 3),
                    "{text}"
                );
            }
            other => panic!("{text}: {other:?}"),
        });
    }
}

#[test]
fn statements() {
    use Statement::{Block, BranchTargets, CallPrototype, CallTargets, Label};
    let register =
        |ty, vector, name, count, line| Statement::Register(Register { ty, vector, name, count, line });
    let param = |name, bytes, align| variable(Space::Param, name, Type::B8, align, Some(bytes), 3);
    let text_and_tree: Vec<(&str, Vec<Statement<'_>>)> = vec![
        ("", vec![]),
        ("L: M:\n$N:{}", vec![Label("L", 3), Label("M", 3), Label("$N", 4), Block(vec![])]),
        (
            ".reg .b32 %r<4000000000>, q;",
            vec![register(Type::B32, 1, "%r", Some(4_000_000_000), 3), register(Type::B32, 1, "q", None, 3)],
        ),
        (".reg .align 4 .v2 .f32 v<0x10>\n;", vec![register(Type::F32, 2, "v", Some(16), 3)]),
        (".reg .pred p;", vec![register(Type::Pred, 1, "p", None, 3)]),
        (
            "{ { .reg .b16 %a<0>; } }",
            vec![Block(vec![Block(vec![register(Type::B16, 1, "%a", Some(0), 3)])])],
        ),
        (
            "t: .branchtargets A,\n B; u: .calltargets f;",
            vec![BranchTargets("t", vec!["A", "B"]), CallTargets("u", vec!["f"])],
        ),
        (
            "p : .callprototype (.param .b8 _) _ (.param .align 8 .b8 _[16]) ;",
            vec![CallPrototype("p", vec![param("_", 1, 1)], vec![param("_", 16, 8)])],
        ),
        ("p: .callprototype _ .noreturn .abi_preserve 3;", vec![CallPrototype("p", vec![], vec![])]),
        (
            ".pragma \"a\", \"b\"; .shared .align 8 .b8 s[4], t;",
            vec![
                Statement::Variable(variable(Space::Shared, "s", Type::B8, 8, Some(4), 3)),
                Statement::Variable(variable(Space::Shared, "t", Type::B8, 8, Some(1), 3)),
            ],
        ),
    ];
    for (text, tree) in &text_and_tree {
        with_body(text, |body| assert_eq!(body, &tree[..], "{text}"));
    }
}

fn variable(space: Space, name: &str, ty: Type, align: u32, bytes: Option<u64>, line: u32) -> Variable<'_> {
    let (init, linkage) = (Vec::new(), Linkage::Internal);
    Variable { space, name, ty, vector: 1, align, bytes, init, linkage, line }
}

#[test]
fn source_lines_last_until_the_next_one_or_the_end_of_the_function() {
    let text = format!(
        "{HEAD}.func f() {{ ret; .loc 1 2 3 ret; {{ .loc 1 4 5, function_name $L + 8, inlined_at 1 2 3\nret; }} ret; }}
         .func g() {{ ret; }}"
    );
    fn locs(body: &[Statement<'_>], out: &mut Vec<Option<SourceLoc>>) {
        for statement in body {
            match statement {
                Statement::Instruction(instruction) => out.push(instruction.loc),
                Statement::Block(body) => locs(body, out),
                _ => {}
            }
        }
    }
    let module = good(&text);
    let mut found = Vec::new();
    module.functions.iter().for_each(|f| locs(f.body.as_deref().unwrap(), &mut found));
    let loc = |line, column, inlined_at| Some(SourceLoc { file: 1, line, column, inlined_at });
    assert_eq!(found, [None, loc(2, 3, None), loc(4, 5, Some((1, 2))), loc(4, 5, Some((1, 2))), None]);
}

#[test]
fn variables() {
    // The declaration; type, vector, align, bytes; pieces of the initial value.
    type Case<'a> = (&'a str, Type, u32, u32, Option<u64>, Vec<(u64, InitialValue<'a>)>);
    let bytes = |offset, bytes: &[u8]| (offset, InitialValue::Bytes(bytes.to_vec()));
    let symbol = |offset, name, addend, generic, bytes, shift| {
        (offset, InitialValue::Symbol { name, addend, generic, bytes, shift })
    };
    let cases: Vec<Case<'_>> = vec![
        (".global .u32 a", Type::U32, 1, 4, Some(4), vec![]),
        (".global .align 16 .attribute(.unified(1, 2)) .b8 a[2][3]", Type::B8, 1, 16, Some(6), vec![]),
        (".align 1 .const .v4 .f32 a[2]", Type::F32, 4, 1, Some(32), vec![]),
        (".global .v2 .f64 a", Type::F64, 2, 16, Some(16), vec![]),
        (".extern .shared .b8 a[]", Type::B8, 1, 1, None, vec![]),
        (".extern .shared .b8 a[0][4]", Type::B8, 1, 1, None, vec![]),
        (".global .f16x2 a[WARP_SZ]", Type::F16X2, 1, 4, Some(128), vec![]),
        // A count only, whatever its size.
        (".global .b8 a[4000000000][1000000000]", Type::B8, 1, 1, Some(4_000_000_000_000_000_000), vec![]),
        (".global .u32 a = -2", Type::U32, 1, 4, Some(4), vec![bytes(0, &[254, 255, 255, 255])]),
        (".global .u8 a[3] = {300, -1}", Type::U8, 1, 1, Some(3), vec![bytes(0, &[44, 255])]),
        (".global .b128 a = -1", Type::B128, 1, 16, Some(16), vec![bytes(0, &[255; 16])]),
        (".global .u16 a[] = {1, 2, 0x304}", Type::U16, 1, 2, Some(6), vec![bytes(0, &[1, 0, 2, 0, 4, 3])]),
        (
            ".global .u8 a[][3] = {{1}, {2, 3, 4}, {}}",
            Type::U8,
            1,
            1,
            Some(9),
            vec![bytes(0, &[1]), bytes(3, &[2, 3, 4])],
        ),
        (
            ".global .u8 a[2][2][2] = {{{1, 2}, {3, 4}}, {{5}, {6}}}",
            Type::U8,
            1,
            1,
            Some(8),
            vec![bytes(0, &[1, 2, 3, 4, 5]), bytes(6, &[6])],
        ),
        (".global .u8 a[2] = {}", Type::U8, 1, 1, Some(2), vec![]),
        (".global .v2 .u8 a[2] = {{1, 2}}", Type::U8, 2, 2, Some(4), vec![bytes(0, &[1, 2])]),
        (".global .f32 a = 1.5", Type::F32, 1, 4, Some(4), vec![bytes(0, &1.5f32.to_le_bytes())]),
        (
            ".global .f32 a = 0d3FF8000000000000",
            Type::F32,
            1,
            4,
            Some(4),
            vec![bytes(0, &1.5f32.to_le_bytes())],
        ),
        (".global .f64 a = 0f3FC00000", Type::F64, 1, 8, Some(8), vec![bytes(0, &1.5f64.to_le_bytes())]),
        (".global .b64 a = -1.5", Type::B64, 1, 8, Some(8), vec![bytes(0, &(-1.5f64).to_le_bytes())]),
        (
            ".global .b64 a = 0f3FC00000",
            Type::B64,
            1,
            8,
            Some(8),
            vec![bytes(0, &[0, 0, 0xC0, 0x3F, 0, 0, 0, 0])],
        ),
        (
            ".global .u64 a[4] = {f, 1, s+4, generic(s)+-4}",
            Type::U64,
            1,
            8,
            Some(32),
            vec![
                symbol(0, "f", 0, false, 8, 0),
                bytes(8, &[1, 0, 0, 0, 0, 0, 0, 0]),
                symbol(16, "s", 4, false, 8, 0),
                symbol(24, "s", -4, true, 8, 0),
            ],
        ),
        (".global .u32 a = s", Type::U32, 1, 4, Some(4), vec![symbol(0, "s", 0, false, 4, 0)]),
        (
            ".global .u8 a[4] = {9, 0xFF(s), 0xFF00(s+1), 0xFF00000000000000(generic(s)+2)}",
            Type::U8,
            1,
            1,
            Some(4),
            vec![
                bytes(0, &[9]),
                symbol(1, "s", 0, false, 1, 0),
                symbol(2, "s", 1, false, 1, 8),
                symbol(3, "s", 2, true, 1, 56),
            ],
        ),
    ];
    for (text, ty, vector, align, size, init) in cases {
        let module = format!("{HEAD}{text};");
        let module = good(&module);
        let [v] = &module.variables[..] else { panic!("{text}") };
        assert_eq!((v.name, v.ty, v.vector, v.align, v.bytes), ("a", ty, vector, align, size), "{text}");
        let found: Vec<_> = v.init.iter().map(|piece| (piece.offset, piece.value.clone())).collect();
        assert_eq!(found, init, "{text}");
    }
    let text = format!("{HEAD}.weak .global .f32 a = 1.0,\n b[3], c;\n.common .global .b8 d;");
    let module = good(&text);
    let found: Vec<_> = module.variables.iter().map(|v| (v.name, v.linkage, v.bytes, v.line)).collect();
    let (weak, common) = (Linkage::Weak, Linkage::Common);
    let expected = [
        ("a", weak, Some(4), 2),
        ("b", weak, Some(12), 3),
        ("c", weak, Some(4), 3),
        ("d", common, Some(1), 4),
    ];
    assert_eq!(found, expected);
}

#[test]
fn functions() {
    let text = format!(
        "{HEAD}.func f; .extern .func (.reg .b32 r, .reg .pred p) g(.reg .b64 a) .noreturn;
         .func .attribute(.unified(1, 2)) (.param .align 8 .b8 r[24]) h(.param .b32 n, .param .align 8 .b8 more[])
         .abi_preserve 8 .abi_preserve_control 2 {{ ret; }}
         .weak .entry e .maxntid 8 4 .pragma \"x\"; .maxnreg 32 .minnctapersm 2 {{ }}
         .visible .entry c(.param .u64 .ptr a, .param .u64 .ptr .global .align 1 b, .align 8 .param .b8 s[6])
         .maxntid 1, 2, 3 .reqntid 64 .reqnctapercluster 2, 1 .explicitcluster .maxclusterrank 8 .blocksareclusters {{ }}
         .alias f, h;"
    );
    let module = good(&text);
    let [f, g, h, e, c] = &module.functions[..] else { panic!("{module:?}") };
    assert_eq!((f.name, f.is_entry, &f.body, f.linkage), ("f", false, &None, Linkage::Internal));
    assert_eq!((g.noreturn, &g.body, g.linkage), (true, &None, Linkage::Extern));
    let kinds = |list: &[Variable<'_>]| -> Vec<_> {
        list.iter().map(|v| (v.name.to_string(), v.space, v.ty, v.align, v.bytes)).collect()
    };
    let v = |name: &str, space, ty, align, bytes| (name.to_string(), space, ty, align, bytes);
    assert_eq!(
        kinds(&g.returns),
        [v("r", Space::Generic, Type::B32, 4, Some(4)), v("p", Space::Generic, Type::Pred, 1, Some(1))]
    );
    assert_eq!(kinds(&g.params), [v("a", Space::Generic, Type::B64, 8, Some(8))]);
    assert_eq!(kinds(&h.returns), [v("r", Space::Param, Type::B8, 8, Some(24))]);
    assert_eq!(
        kinds(&h.params),
        [v("n", Space::Param, Type::B32, 4, Some(4)), v("more", Space::Param, Type::B8, 8, None)]
    );
    assert_eq!((h.line, h.noreturn, h.body.as_ref().map(Vec::len)), (3, false, Some(1)));
    assert_eq!(
        (e.is_entry, e.linkage, e.max_threads, e.required_threads),
        (true, Linkage::Weak, Some([8, 4, 1]), None,)
    );
    assert_eq!((e.cluster, e.params.len()), (Cluster::default(), 0));
    // The alignment behind .ptr is that of the memory it points at.
    assert_eq!(
        kinds(&c.params),
        [
            v("a", Space::Param, Type::U64, 8, Some(8)),
            v("b", Space::Param, Type::U64, 8, Some(8)),
            v("s", Space::Param, Type::B8, 8, Some(6))
        ]
    );
    assert_eq!((c.max_threads, c.required_threads), (Some([1, 2, 3]), Some([64, 1, 1])));
    let cluster =
        Cluster { required: Some([2, 1, 1]), max_rank: Some(8), explicit: true, blocks_are_clusters: true };
    assert_eq!(c.cluster, cluster);
    assert_eq!(module.aliases, [Alias { name: "f", function: "h", line: 8 }]);
}

#[test]
fn module_heads() {
    let module =
        good("// a comment\n/* another\n one */ .version 9.2\n.target sm_90a, debug .target sm_80\n\0\0");
    assert_eq!(
        (module.version, module.targets, module.address_size),
        ((9, 2), vec!["sm_90a", "debug", "sm_80"], 64)
    );
    assert_eq!(good(".version 1.0 .target x .address_size 32").address_size, 32);
    let text =
        format!("{HEAD}# 1 \"k.cu\" ' @\n.file 1 \"C:\\a\\b.cu\", 5, 6\n.file 2 \"\"\n.pragma \"nounroll\";");
    assert_eq!(good(&text).files, [(1, "C:\\a\\b.cu".to_string()), (2, String::new())]);
    let text = format!(
        "{HEAD}.section .debug_x {{ L: .b8 1,2,-3 .b32 .debug_y+4 .b64 L-M }}\n.section .debug_z {{ }}"
    );
    assert_eq!(good(&text).variables, []);
}

/// Real shapes: what nvcc, clang and Triton write around and inside functions.
#[test]
fn compilers() {
    let nvcc = good(NVCC);
    assert_eq!(
        (nvcc.version, nvcc.files.len(), nvcc.variables.len(), nvcc.functions.len()),
        ((8, 4), 2, 7, 5)
    );
    let scale = nvcc.functions.iter().find(|f| f.name == "scale").unwrap();
    assert_eq!((scale.is_entry, scale.max_threads, scale.params.len()), (true, Some([256, 1, 1]), 3));
    let body = scale.body.as_deref().unwrap();
    let shfl = instruction(body, "shfl");
    assert_eq!(shfl.loc, Some(SourceLoc { file: 2, line: 449, column: 9, inlined_at: Some((1, 6)) }));
    assert_eq!((&shfl.operands[0], shfl.line), (&pair(name("%r3"), name("%p1")), 74));
    let blocks: Vec<_> =
        body.iter().filter_map(|s| if let Statement::Block(b) = s { Some(b) } else { None }).collect();
    let call = instruction(blocks[0], "call");
    let list = |item| Operand::List(vec![name(item)]);
    assert_eq!(call.operands, [list("retval0"), name("%rd4"), list("param0"), name("prototype_0")]);
    assert_eq!(blocks[1].last(), Some(&Statement::Label("DONE", 101)));
    let copy = instruction(body, "cp");
    let map = at("%rd5", 0, vec![Operand::Vector(vec![name("%r6"), name("%r7")])]);
    assert_eq!(copy.operands, [at("%r5", 0, vec![]), map, at("%r8", 0, vec![])]);

    let clang = good(CLANG);
    assert_eq!(clang.functions.iter().map(|f| f.body.is_some()).collect::<Vec<_>>(), [false, true, true]);
    let targets = Statement::BranchTargets("$L_brx_0", vec!["$L__BB1_1", "$L__BB1_2"]);
    assert!(clang.functions[2].body.as_ref().unwrap().contains(&targets));

    let triton = good(TRITON);
    let mm = &triton.functions[0];
    assert_eq!((mm.required_threads, mm.cluster.required), (Some([128, 1, 1]), Some([2, 1, 1])));
    let load = instruction(mm.body.as_deref().unwrap(), "ld");
    assert_eq!((load.modifiers[0], load.loc.map(|loc| loc.line)), ("param", Some(5)));
}

fn instruction<'b, 'a>(body: &'b [Statement<'a>], opcode: &str) -> &'b Instruction<'a> {
    let mut all = body.iter().filter_map(|s| if let Statement::Instruction(i) = s { Some(i) } else { None });
    all.find(|i| i.opcode == opcode).unwrap()
}

#[test]
fn errors() {
    // The text; the line of the error; its message.
    let heads: &[(&str, u32, &str)] = &[
        ("", 1, "expected `.version` at the start, found the end of the text"),
        (".target sm_90", 1, "expected `.version` at the start, found `.target`"),
        (".version 9", 1, "expected a version such as 8.5, found `9`"),
        (".version 9.2\n.entry k {}", 2, "expected `.target` after the version, found `.entry`"),
        (
            ".version 9.2 .target sm_90 .address_size 16",
            1,
            "expected an address size of 32 or 64, found `16`",
        ),
        (".version 9.2 .target sm_90\n/* open", 2, "a comment `/*` that no `*/` ends"),
    ];
    let modules: &[(&str, u32, &str)] = &[
        (";", 2, "expected a declaration, found `;`"),
        (".version 9.2", 2, "expected a declaration, found `.version`"),
        (".loc 1 2 3", 2, "expected a declaration, found `.loc`"),
        ("\n\n.visible ret;", 4, "expected `.entry`, `.func` or a state space, found `ret`"),
        (".visible .weak .global .b8 a;", 2, "expected `.entry`, `.func` or a state space, found `.weak`"),
        (".u32 a;", 2, "expected a declaration, found `.u32`"),
        (".align 4 .u32 a;", 2, "expected a state space before the type, found `a`"),
        (".global a;", 2, "expected a type, found `a`"),
        (".global .bf16 a;", 2, "expected a type, found `.bf16`"),
        (".global .shared .b8 a;", 2, "expected a type, found `.shared`"),
        (".global .v2 .v4 .b8 a;", 2, "expected a type, found `.v4`"),
        (".global .b8 _;", 2, "expected the name of a variable, found `_`"),
        (".global .b8 a\n.global .b8 b;", 3, "expected `,` or `;`, found `.global`"),
        (".global .b8 a", 2, "expected `,` or `;`, found the end of the text"),
        (".local .b8 a;", 2, "only .global, .const and .shared variables have module scope"),
        (".reg .b32 a;", 2, "only .global, .const and .shared variables have module scope"),
        (".global .align 3 .b8 a;", 2, "an alignment of 3 is no power of two"),
        (".global .align 0 .b8 a;", 2, "an alignment of 0 is no power of two"),
        (".global .b8 a[-1];", 2, "the length of an array must be a whole number of at least 0"),
        (".global .b8 a[2][];", 2, "only the first dimension of an array may be open"),
        (".global .b8 a[];", 2, "an array without a size must be .extern or have an initial value"),
        (".global .b8 a[0];", 2, "an array without a size must be .extern or have an initial value"),
        (".global .b64 a[0xFFFFFFFFFFFFFFFF];", 2, "the size of the array does not fit in 63 bits"),
        (".global .b8 a[0x80000000][0x80000000][2];", 2, "the size of the array does not fit in 63 bits"),
        (
            ".shared .b8 a = 1;",
            2,
            "only .global and .const variables that are not .extern have an initial value",
        ),
        (".global .b8 a[2] = {1, 2, 3};", 2, "more than 2 elements in the initial value"),
        (".global .b8 a[2][2] = {{1, 2},\n{1, 2, 3}};", 3, "more than 2 elements in the initial value"),
        (".global .b8 a[2][2] = {1, 2};", 2, "expected `{`, found `1`"),
        (".global .b8 a[2] = 1;", 2, "expected `{`, found `1`"),
        (".global .b8 a = {1};", 2, "expected a number, found `{`"),
        (".global .b8 a[2] = {1,};", 2, "expected a number, found `}`"),
        (".global .b8 a[2] = {1;", 2, "expected `,` or `}`, found `;`"),
        (
            ".global .b8 a[] = {};",
            2,
            "expected an initial value that gives the array a size of at least 1, found `;`",
        ),
        (".global .v4 .b8 a = {1, 2, 3};", 2, "3 elements for a vector of 4"),
        (".global .f32 a = 1;", 2, "`1` is no initial value for the type .f32"),
        (".global .u32 a = 1.5;", 2, "`1.5` is no initial value for the type .u32"),
        (".global .f16 a = 1.5;", 2, "`1.5` is no initial value for the type .f16"),
        (".global .u16 a = b;", 2, "an address does not fit in an element of type .u16"),
        (".global .f64 a = b;", 2, "an address does not fit in an element of type .f64"),
        (".global .u8 a = 0xF(b);", 2, "the mask of an address must be one whole byte, such as 0xFF00"),
        (".global .u8 a = 0xFFFF(b);", 2, "the mask of an address must be one whole byte, such as 0xFF00"),
        (".global .u16 a = 0xFF(b);", 2, "a byte of an address does not fit an element of type .u16"),
        (".global .u64 a = 4+b;", 2, "expected a number, found `b`"),
        (".global .u64 a = generic(b+4);", 2, "expected `)`, found `+`"),
        (
            ".global .u64 a = b+1.5;",
            2,
            "an operator between an integer and a floating-point number, or on a `0f` number",
        ),
        (".global .u64 a = 7/0;", 2, "a division by zero"),
        (".global .u64 a = 7 % (1-1);", 2, "a division by zero"),
        (".global .u64 a = 1.5 | 2.5;", 2, "this operator takes integers"),
        (".global .u64 a = ~1.5;", 2, "`~` does not apply to this number"),
        (".global .f32 a = -0f3F800000;", 2, "`-` does not apply to this number"),
        (".global .u64 a = 99999999999999999999;", 2, "an integer that does not fit in 64 bits"),
        (".global .u64 a = 08;", 2, "`08` is no number"),
        (".global .u64 a = 0x;", 2, "`0x` is no number"),
        (".global .u64 a = 5u;", 2, "`5u` is no number"),
        (".global .f32 a = 1.5f;", 2, "`1.5f` is no number"),
        (".global .f32 a = 1e;", 2, "`1e` is no number"),
        (".global .f64 a = 1e999;", 2, "a number beyond the range of .f64"),
        (".global .f32 a = 0f3F8;", 2, "a `0f` number must have exactly 8 hexadecimal digits"),
        (".global .f64 a = 0d3F8;", 2, "a `0d` number must have exactly 16 hexadecimal digits"),
        (".global .pred a;", 2, "only single registers can be .pred"),
        (".global .v4 .f64 a;", 2, "a vector has at most 128 bits"),
        (".global .b8 é;", 2, "the character `é` has no meaning in PTX"),
        (".global .b8 a \u{1b};", 2, "the character `\\u{1b}` has no meaning in PTX"),
        (".global .b8 $;", 2, "a name of `$` alone"),
        (".global . b8 a;", 2, "a name must follow the dot directly"),
        (".file 1 \"a\n\"", 2, "a string that does not end on its line"),
        (".file 1 a", 2, "expected a path in quotes, found `a`"),
        (".section .debug_str { { } }", 2, "expected `}`, found `{`"),
        (".section .debug_str {\n.b8 1", 3, "expected `}`, found the end of the text"),
        (".section foo {}", 2, "expected the name of a section, found `foo`"),
        (".entry {}", 2, "expected the name of a function, found `{`"),
        (".entry k(.param .b32) {}", 2, "expected the name of a parameter, found `)`"),
        (".entry k(.param .b32 a,) {}", 2, "expected a type, found `)`"),
        (
            ".entry k(.reg .b32 a) {}",
            2,
            "a parameter must be in the state space .param, of a .func also .reg",
        ),
        (".func f(.param .v2 .b8 a);", 2, "a parameter cannot be a vector"),
        (".entry k(.param .b8 a[]) {}", 2, "a kernel's parameter must have a size"),
        (".entry k .maxntid 0 {}", 2, "expected a positive number, found `0`"),
        (".entry k .maxntid 1,2,3,4 {}", 2, "expected `{`, `;` or a directive, found `,`"),
        (".entry k .maxnreg 4294967296 {}", 2, "4294967296 does not fit in 32 bits"),
        (".entry k {", 2, "expected a statement or `}`, found the end of the text"),
        (".alias f;", 2, "expected `,`, found `;`"),
    ];
    let bodies: &[(&str, u32, &str)] = &[
        (";", 3, "expected a statement or `}`, found `;`"),
        ("ret\n}", 4, "expected an operand, found `}`"),
        ("add.s32 a, a\nret;", 4, "expected `,` or `;`, found `ret`"),
        ("add.s32 a a;", 3, "expected `,` or `;`, found `a`"),
        ("add.s32 a,;", 3, "expected an operand, found `;`"),
        ("add.s32 a, a, ;", 3, "expected an operand, found `;`"),
        ("add. s32 a;", 3, "a name must follow the dot directly"),
        ("%r1 a;", 3, "expected a statement, found `%r1`"),
        ("@p {}", 3, "expected an instruction, found `{`"),
        ("@ ret;", 3, "expected an instruction, found `;`"),
        ("@5 ret;", 3, "expected a predicate, found `5`"),
        ("@p L: ret;", 3, "expected an operand, found `:`"),
        ("ld a, [];", 3, "expected a number, found `]`"),
        ("ld a, [b+c];", 3, "expected a number, found `c`"),
        ("ld a, [b;", 3, "expected `,` or `]`, found `;`"),
        ("ld a, [1.5];", 3, "an address must be an integer"),
        ("mov a, {};", 3, "expected an operand, found `}`"),
        ("mov a, {b;", 3, "expected `,` or `}`, found `;`"),
        ("setp p|!q, a, b;", 3, "expected a second result, found `!`"),
        ("setp p|q|r, a, b;", 3, "expected `,` or `;`, found `|`"),
        ("mov a, 5%3;", 3, "expected `,` or `;`, found `%3`"),
        ("mov a, 1.5 ? 1 : 2;", 3, "expected an integer before the `?`, found `?`"),
        ("mov a, \"b\";", 3, "expected an operand, found `\"b\"`"),
        ("call (a, f;", 3, "expected `,` or `)`, found `;`"),
        (".maxnreg 3; ret;", 3, "expected a statement, found `.maxnreg`"),
        (".extern .shared .b8 a[];", 3, "expected a statement, found `.extern`"),
        (".loc 1 2\nret;", 4, "expected a column, found `ret`"),
        (
            ".loc 1 2 3, here\nret;",
            4,
            "expected `function_name` or `inlined_at` after the comma, found `ret`",
        ),
        (".reg .b32 a = 4;", 3, "expected `,` or `;`, found `=`"),
        (".reg .b32 a<-1>;", 3, "expected a number of registers, found `-`"),
        (".reg .b32 a<4294967296>;", 3, "4294967296 does not fit in 32 bits"),
        (".reg .b32 a<2+3>;", 3, "expected `>`, found `+`"),
        (".local .b8 a[];", 3, "an array without a size must be .extern or have an initial value"),
        ("p: .callprototype f;", 3, "expected `_` in place of a name, found `f`"),
    ];
    let modules = modules.iter().map(|(text, line, message)| (format!("{HEAD}{text}"), "", *line, *message));
    let bodies = bodies
        .iter()
        .map(|(text, line, message)| (format!("{HEAD}.func f {{\n{text}"), "f", *line, *message));
    let heads = heads.iter().map(|(text, line, message)| (text.to_string(), "", *line, *message));
    for (text, function, line, message) in heads.chain(modules).chain(bodies) {
        let found = bad(&text);
        assert_eq!((found.message.as_str(), found.at.line), (message, line), "{text}");
        assert_eq!(found.kind, ErrorKind::Syntax, "{text}");
        assert_eq!(found.at.file, "t.ptx");
        let quoted = text.lines().nth(line as usize - 1).unwrap_or("").trim();
        assert_eq!(found.at.text, quoted, "{text}");
        // From a function's name to its end, errors say which one.
        if !function.is_empty() || !(text.contains(".entry") || text.contains(".func")) {
            assert_eq!(found.kernel, function, "{text}");
        }
    }
}

#[test]
fn unsupported() {
    let cases = [
        (".entry k(.param .samplerref s) {}", "`.samplerref` is not supported"),
        (".entry k { .global .texref t; }", "`.texref` is not supported"),
        (".frobnicate 7;", "the directive `.frobnicate` is not supported"),
        (".entry k .language 4 {}", "the directive `.language` is not supported"),
        (".entry k { .frobnicate 7; }", "the directive `.frobnicate` is not supported"),
        (".entry k { ld.b32 a, s[1]; }", "an array index in an operand is not supported"),
    ];
    for (text, message) in cases {
        let text = format!("{HEAD}{text}");
        let found = bad(&text);
        assert_eq!(
            (found.kind, found.message.as_str(), found.at.line),
            (ErrorKind::Unsupported, message, 2),
            "{text}"
        );
        assert!(matches!(parse("", &text), Err(Error::Unsupported(_))), "{text}");
    }
}

/// Nothing else of the module suffers from them.
#[test]
fn variables_of_kinds_that_are_not_supported_are_passed_over() {
    for (text, name, message) in [
        (".global .texref picture;", "picture", "`.texref` is not supported"),
        (".visible .global .surfref s[4];", "s", "`.surfref` is not supported"),
        (
            ".global .samplerref x = { addr_mode_0 = wrap, filter_mode = nearest };",
            "x",
            "`.samplerref` is not supported",
        ),
        (".const[2] .align 4 .b32 a[3] = {1, b, 2};", "a", "a bank of constant memory is not supported"),
    ] {
        let text = format!("{HEAD}{text}\n.global .b32 after;");
        let tree = parse("", &text).unwrap();
        let [refused] = &tree.refused[..] else { panic!("{text}: {:?}", tree.refused) };
        assert_eq!((refused.name, refused.line, refused.message.as_str()), (name, 2, message), "{text}");
        assert_eq!(tree.variables.iter().map(|v| v.name).collect::<Vec<_>>(), ["after"], "{text}");
    }
    for text in [".global .texref", ".global .texref t", ".global .texref ;", ".const[2] .b32 = 3;"] {
        let found = bad(&format!("{HEAD}{text}"));
        assert_eq!(found.kind, ErrorKind::Syntax, "{text}: {found}");
    }
}

#[test]
fn errors_quote_a_long_line_in_part() {
    let text = format!("{HEAD}   .global .b8 {};", "é".repeat(500));
    let found = bad(&text);
    assert_eq!(found.at.text, format!(".global .b8 {}...", "é".repeat(108)));
    let text = format!("{HEAD}{}", "a".repeat(500));
    assert_eq!(bad(&text).message, format!("expected a declaration, found `{}...`", "a".repeat(40)));
}

/// Every nested form up to the limit is taken; one more level, or a million, is an error.
#[test]
fn depth() {
    let forms = [
        (".entry k {", "{", "", "}", "}"),
        (".entry k { mov a, ", "(", "1", ")", "; }"),
        (".entry k { mov a, ", "- ", "1", "", "; }"),
        (".entry k { mov a, ", "0 ? 1 : ", "1", "", "; }"),
        (".entry k { mov a, ", "{", "1", "}", "; }"),
        (".entry k { mov a, ", "[0, ", "1", "]", "; }"),
        (".entry k { mov a, ", "(.s64) ", "1", "", "; }"),
    ];
    for (head, open, middle, close, tail) in forms {
        let text = |n: usize| format!("{HEAD}{head}{}{middle}{}{tail}", open.repeat(n), close.repeat(n));
        // The body is one level, and the outer `-` or block another.
        let limit = MAX_DEPTH as usize;
        good(&text(limit - 1));
        for n in [limit + 2, 1_000_000] {
            let found = bad(&text(n));
            assert_eq!(found.message, format!("nested deeper than {MAX_DEPTH} levels"), "{open}");
        }
    }
    let array =
        |n: usize| format!("{HEAD}.global .b8 a{} = {}{};", "[1]".repeat(n), "{".repeat(n), "}".repeat(n));
    good(&array(MAX_DIMENSIONS));
    assert_eq!(bad(&array(MAX_DIMENSIONS + 1)).message, format!("more than {MAX_DIMENSIONS} dimensions"));
}

/// Long texts of one thing: time and memory grow with the text alone.
#[test]
fn length() {
    let n = 100_000;
    let texts = [
        format!("{HEAD}.entry k {{ {} }}", "a b,c;".repeat(n)),
        format!("{HEAD}.entry k {{ mov a, {}1; }}", "1+".repeat(n)),
        format!("{HEAD}.entry k {{ mov a, s{}; }}", "+1-1".repeat(n)),
        format!("{HEAD}.entry k {{ mov {{a{}}}, b; }}", ",a".repeat(n)),
        format!("{HEAD}.entry k {{ add{} a; }}", ".f32".repeat(n)),
        format!("{HEAD}.global .b8 a[][4] = {{ {{1}}{} }};", ",{1}".repeat(n)),
        format!("{HEAD}.global .b8 a{};", ",b".repeat(n)),
        format!("{HEAD}{}", "/**/\n//\n".repeat(n)),
    ];
    for text in &texts {
        let start = Instant::now();
        good(text);
        assert!(start.elapsed() < Duration::from_secs(5), "{}", &text[..100]);
    }
}

/// Whatever the text, parsing returns soon; what it returns can be printed.
fn survives(text: &str) {
    let start = Instant::now();
    if let Err(error) = parse("t.ptx", text) {
        assert!(!matches!(error, Error::Internal(_)), "{error}");
        assert!(error.to_string().len() < 1000, "{error}");
    }
    assert!(start.elapsed() < Duration::from_secs(5), "{text}");
}

/// `PROPTEST_CASES` runs more.
fn config() -> ProptestConfig {
    let cases = std::env::var("PROPTEST_CASES").ok().and_then(|n| n.parse().ok()).unwrap_or(2000);
    ProptestConfig { cases, failure_persistence: None, ..ProptestConfig::default() }
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn random_bytes(bytes in prop::collection::vec(any::<u8>(), 0..200), head in any::<bool>()) {
        let text = String::from_utf8_lossy(&bytes);
        survives(&if head { format!("{HEAD}{text}") } else { text.into_owned() });
    }

    #[test]
    fn token_soup(text in soup::tokens(60)) {
        survives(&text);
    }

    #[test]
    fn programs(text in soup::programs()) {
        survives(&text);
    }

    #[test]
    fn mutated_modules(text in soup::mutations(REAL)) {
        survives(&text);
    }

    /// Blanks and comments between tokens mean nothing.
    #[test]
    fn blanks(which in 0..REAL.len(), blank in prop::sample::select(&[" ", "\t", "/* ; */ "][..])) {
        let wide = soup::split(REAL[which])
            .into_iter()
            .map(|piece| if piece.trim().is_empty() { format!("{piece}{blank}") } else { piece.to_string() })
            .collect::<String>();
        prop_assert_eq!(parse("", &wide), parse("", REAL[which]));
    }
}
