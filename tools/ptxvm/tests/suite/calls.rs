//! Calls of device functions: recursion, function pointers, parameters in memory, lanes that part within them.

use ptxvm::error::ErrorKind;
use ptxvm::{Error, Launch, Options};

use crate::flow::{Kernel, each};

/// `(f)(a)` for every thread: the kernel that stores what `f` gives for its number.
fn apply(functions: &str, f: &str) -> Kernel {
    let call = format!(
        "
    {{
        .param .b32 x;
        .param .b32 y;
        st.param.b32 [x], i;
        call (y), {f}, (x); // call
        ld.param.b32 v, [y];
    }}"
    );
    Kernel::new(functions, &call)
}

const FACTORIAL: &str = "
.func (.param .b32 y) factorial(.param .b32 x)
{
    .reg .pred p;
    .reg .b32 v, w;
    ld.param.b32 v, [x]; // entered
    setp.gt.u32 p, v, 1;
    @p bra deeper;
    st.param.b32 [y], 1;
    ret;
deeper:
    sub.u32 w, v, 1;
    {
        .param .b32 a;
        .param .b32 r;
        st.param.b32 [a], w;
        call (r), factorial, (a);
        ld.param.b32 w, [r];
    }
    mul.lo.u32 v, v, w; // up again
    st.param.b32 [y], v;
    ret;
}";

#[test]
fn recursion_to_a_depth_of_each_lanes_own() {
    let k = apply(FACTORIAL, "factorial");
    let (got, report) = k.run(1, 32);
    assert_eq!(got, each(32, |i| (1..=i).fold(1, |all, n: u32| all.wrapping_mul(n))));
    // The deepest lane is 31 calls deep; lanes 0 and 1 return at once, and all come back together.
    assert_eq!(k.count(&report, "entered").0, 31);
    assert_eq!(k.count(&report, "up again").0, 30);
    assert_eq!(k.count(&report, "stored"), (1, 32));
}

#[test]
fn recursion_in_two_branches() {
    let fib = "
.func (.param .b32 y) fib(.param .b32 x)
{
    .reg .pred p;
    .reg .b32 v, w, a;
    ld.param.b32 v, [x];
    setp.lt.u32 p, v, 2;
    @p bra small;
    {
        .param .b32 x1;
        .param .b32 y1;
        sub.u32 w, v, 1;
        st.param.b32 [x1], w;
        call (y1), fib, (x1);
        ld.param.b32 a, [y1];
    }
    {
        .param .b32 x2;
        .param .b32 y2;
        sub.u32 w, v, 2;
        st.param.b32 [x2], w;
        call (y2), fib, (x2);
        ld.param.b32 w, [y2];
    }
    add.u32 v, a, w;
small:
    st.param.b32 [y], v;
    ret;
}";
    let (got, _) = apply(fib, "fib").run(1, 18);
    let mut want = vec![0u32, 1];
    while want.len() < 18 {
        want.push(want[want.len() - 1] + want[want.len() - 2]);
    }
    assert_eq!(got, want);
}

#[test]
fn mutual_recursion() {
    let functions = "
.func (.param .b32 y) odd(.param .b32 x);
.func (.param .b32 y) even(.param .b32 x)
{
    .reg .pred p;
    .reg .b32 v;
    ld.param.b32 v, [x];
    setp.ne.u32 p, v, 0;
    @p bra ask;
    st.param.b32 [y], 100;
    ret;
ask:
    .param .b32 a;
    .param .b32 r;
    sub.u32 v, v, 1;
    st.param.b32 [a], v;
    call (r), odd, (a);
    ld.param.b32 v, [r];
    st.param.b32 [y], v;
    ret;
}
.func (.param .b32 y) odd(.param .b32 x)
{
    .reg .pred p;
    .reg .b32 v;
    ld.param.b32 v, [x];
    setp.ne.u32 p, v, 0;
    @p bra ask;
    st.param.b32 [y], 200;
    ret;
ask:
    .param .b32 a;
    .param .b32 r;
    sub.u32 v, v, 1;
    st.param.b32 [a], v;
    call (r), even, (a);
    ld.param.b32 v, [r];
    st.param.b32 [y], v;
    ret;
}";
    let k = apply(functions, "even");
    let (got, report) = k.run(1, 40);
    assert_eq!(got, each(40, |i| if i % 2 == 0 { 100 } else { 200 }));
    assert_eq!(k.count(&report, "stored"), (2, 40));
}

const THREE: &str = "
.func (.param .b32 y) plus(.param .b32 x)
{
    .reg .b32 v;
    ld.param.b32 v, [x]; // plus
    add.u32 v, v, 1000;
    st.param.b32 [y], v;
    ret;
}
.func (.param .b32 y) times(.param .b32 x)
{
    .reg .b32 v;
    ld.param.b32 v, [x]; // times
    mul.lo.u32 v, v, 7;
    st.param.b32 [y], v;
    ret;
}
.func (.param .b32 y) small(.param .b32 x)
{
    .reg .pred p;
    .reg .b32 v;
    ld.param.b32 v, [x]; // small
    setp.lt.u32 p, v, 50;
    @p bra early;
    st.param.b32 [y], 3;
    ret;
early:
    st.param.b32 [y], 4;
    ret;
}
.global .align 8 .u64 table[3] = {plus, times, small};";

#[test]
fn lanes_call_different_functions() {
    let k = Kernel::new(
        THREE,
        "
    rem.u32 t, i, 3;
    mov.u64 a, table;
    mad.wide.u32 a, t, 8, a;
    ld.global.u64 f, [a];
    {
        .param .b32 x;
        .param .b32 y;
        st.param.b32 [x], i;
proto:  .callprototype (.param .b32 _) _ (.param .b32 _);
        call (y), f, (x), proto;
        ld.param.b32 v, [y]; // result
    }
    add.u32 v, v, 1; // after",
    );
    let (got, report) = k.run(1, 64);
    let want = |i: u32| {
        1 + match i % 3 {
            0 => i + 1000,
            1 => i * 7,
            _ => {
                if i < 50 {
                    4
                } else {
                    3
                }
            }
        }
    };
    assert_eq!(got, each(64, want));
    // Each callee runs once for the lanes that call it; behind the call all go on together.
    assert_eq!(k.count(&report, "plus"), (2, 22));
    assert_eq!(k.count(&report, "times"), (2, 21));
    assert_eq!(k.count(&report, "small"), (2, 21));
    assert_eq!(k.count(&report, "result"), (2, 64));
    assert_eq!(k.count(&report, "after"), (2, 64));
}

#[test]
fn a_pointer_chain_in_a_loop() {
    let k = Kernel::new(
        THREE,
        "
    mov.u32 v, i;
    mov.u32 n, 0;
next:
    add.u32 t, v, n;
    rem.u32 t, t, 3;
    mov.u64 a, table;
    mad.wide.u32 a, t, 8, a;
    ld.global.u64 f, [a];
    {
        .param .b32 x;
        .param .b32 y;
        st.param.b32 [x], v;
proto:  .callprototype (.param .b32 _) _ (.param .b32 _);
        call (y), f, (x), proto;
        ld.param.b32 v, [y];
    }
    add.u32 n, n, 1;
    setp.lt.u32 p, n, 6;
    @p bra next;",
    );
    let (got, _) = k.run(1, 96);
    let want = |i: u32| {
        (0..6).fold(i, |v: u32, n| match v.wrapping_add(n) % 3 {
            0 => v.wrapping_add(1000),
            1 => v.wrapping_mul(7),
            _ => {
                if v < 50 {
                    4
                } else {
                    3
                }
            }
        })
    };
    assert_eq!(got, each(96, want));
}

#[test]
fn calls_in_divergent_code_and_under_a_guard() {
    let k = Kernel::new(
        THREE,
        "
    .param .b32 x;
    .param .b32 y;
    mov.u32 v, 5;
    and.b32 t, i, 1;
    setp.eq.u32 p, t, 0;
    st.param.b32 [x], i;
    st.param.b32 [y], 9;
    @p call (y), plus, (x); // guarded
    ld.param.b32 v, [y]; // behind
    and.b32 t, i, 2;
    setp.eq.u32 p, t, 0;
    @p bra skip;
    st.param.b32 [x], v;
    call (y), times, (x);
    ld.param.b32 v, [y];
skip:
    add.u32 v, v, 1; // after",
    );
    let (got, report) = k.run(1, 32);
    let want = |i: u32| {
        let v = if i.is_multiple_of(2) { i + 1000 } else { 9 };
        1 + if i & 2 == 0 { v } else { v * 7 }
    };
    assert_eq!(got, each(32, want));
    assert_eq!(k.count(&report, "plus"), (1, 16));
    assert_eq!(k.count(&report, "times"), (1, 16));
    assert_eq!(k.count(&report, "after"), (1, 32));
}

#[test]
fn an_early_return_parts_no_callers() {
    let early = "
.func (.param .b32 y) classify(.param .b32 x)
{
    .reg .pred p;
    .reg .b32 v;
    ld.param.b32 v, [x];
    st.param.b32 [y], 1;
    setp.lt.u32 p, v, 5;
    @p ret;
    st.param.b32 [y], 2;
    setp.lt.u32 p, v, 20;
    @p ret;
    st.param.b32 [y], 3; // last
    ret;
}";
    let k = apply(early, "classify");
    let (got, report) = k.run(1, 32);
    assert_eq!(
        got,
        each(32, |i| if i < 5 {
            1
        } else if i < 20 {
            2
        } else {
            3
        })
    );
    assert_eq!(k.count(&report, "last"), (1, 12));
    assert_eq!(k.count(&report, "stored"), (1, 32));
}

#[test]
fn structures_by_value_and_as_results() {
    let functions = "
.func (.param .align 8 .b8 y[24]) turn(.param .b8 c, .param .align 8 .b8 x[24], .param .b64 z, .param .f32 h)
{
    .reg .b16 k;
    .reg .b32 a, b;
    .reg .b64 d, e;
    .reg .f32 g;
    ld.param.u8 k, [c];
    cvt.u32.u16 b, k;
    ld.param.b32 a, [x];
    add.u32 a, a, b;
    st.param.b32 [y+4], a;
    ld.param.b32 a, [x+4];
    st.param.b32 [y], a;
    ld.param.b64 d, [x+8];
    ld.param.b64 e, [z];
    add.u64 d, d, e;
    st.param.b64 [y+16], d;
    ld.param.f32 g, [h];
    cvt.rzi.u32.f32 a, g;
    ld.param.v2.b32 {a, b}, [x+16];
    add.u32 a, a, b;
    cvt.u64.u32 d, a;
    cvt.rzi.u64.f32 e, g;
    add.u64 d, d, e;
    st.param.b64 [y+8], d;
    ret;
}";
    let k = Kernel::new(
        functions,
        "
    .reg .b16 h;
    .reg .f32 g;
    .reg .b64 d, e;
    .param .b8 c;
    .param .align 8 .b8 x[24];
    .param .b64 z;
    .param .f32 y0;
    .param .align 8 .b8 y[24];
    mov.u16 h, 200;
    st.param.b8 [c], h;
    st.param.b32 [x], i;
    mul.lo.u32 t, i, 3;
    st.param.b32 [x+4], t;
    cvt.u64.u32 d, i;
    shl.b64 d, d, 33;
    st.param.b64 [x+8], d;
    mov.u32 t, 11;
    st.param.v2.b32 [x+16], {i, t};
    mov.u64 d, 5;
    st.param.b64 [z], d;
    mov.f32 g, 0f42c88000;
    st.param.f32 [y0], g;
    call (y), turn, (c, x, z, y0);
    ld.param.b32 v, [y];
    ld.param.b32 w, [y+4];
    mad.lo.u32 v, v, 1000, w;
    ld.param.b64 d, [y+8];
    cvt.u32.u64 w, d;
    mad.lo.u32 v, v, 7, w;
    ld.param.b64 d, [y+16];
    shr.u64 e, d, 33;
    add.u64 d, d, e;
    cvt.u32.u64 w, d;
    mad.lo.u32 v, v, 7, w;",
    );
    let (got, _) = k.run(1, 40);
    let want = |i: u32| {
        let v = (3 * i) * 1000 + i + 200;
        // 0f42c88000 is 100.25.
        let v = v * 7 + (i + 11 + 100);
        v * 7 + (5 + i)
    };
    assert_eq!(got, each(40, want));
}

#[test]
fn a_callee_may_write_its_callers_local_memory() {
    let functions = "
.func fill(.param .b64 to, .param .b32 n)
{
    .reg .pred p;
    .reg .b32 k, v, w;
    .reg .b64 a;
    .local .align 4 .b32 own[8];
    ld.param.b64 a, [to];
    ld.param.b32 v, [n];
    mov.u32 w, own;
    mov.u32 k, 0;
loop:
    st.local.u32 [w], k;
    mad.lo.u32 k, k, 1, 1;
    add.u32 w, w, 4;
    st.u32 [a], v;
    add.u64 a, a, 4;
    add.u32 v, v, 1;
    setp.lt.u32 p, k, 4;
    @p bra loop;
    ret;
}";
    let k = Kernel::new(
        functions,
        "
    .local .align 16 .b32 array[4];
    .param .b64 to;
    .param .b32 count;
    mov.u64 a, array;
    cvta.local.u64 a, a;
    st.param.b64 [to], a;
    mul.lo.u32 t, i, 10;
    st.param.b32 [count], t;
    call fill, (to, count);
    ld.local.u32 v, [array];
    ld.local.u32 w, [array+12];
    add.u32 v, v, w;",
    );
    let (got, report) = k.run(1, 64);
    assert_eq!(got, each(64, |i| 20 * i + 3));
    assert!(report.local.requests > 0);
}

/// Every frame has its own local memory and registers, however deep.
#[test]
fn frames_of_a_recursion_do_not_overlap() {
    let functions = "
.func (.param .b32 y) sum(.param .b32 x, .param .b64 up)
{
    .reg .pred p;
    .reg .b32 v, w, u;
    .reg .b64 a, b;
    .local .align 8 .b32 mine[2];
    ld.param.b32 v, [x];
    ld.param.b64 a, [up];
    st.local.u32 [mine], v;
    mov.u32 w, 0;
    setp.eq.u32 p, v, 0;
    @p bra end;
    {
        .param .b32 x1;
        .param .b64 u1;
        .param .b32 y1;
        sub.u32 w, v, 1;
        st.param.b32 [x1], w;
        mov.u64 b, mine;
        cvta.local.u64 b, b;
        st.param.b64 [u1], b;
        call (y1), sum, (x1, u1);
        ld.param.b32 w, [y1];
    }
end:
    // The value of this frame, doubled by the callee's callee, plus that of the caller.
    ld.local.u32 v, [mine];
    ld.u32 u, [a];
    st.u32 [a+4], u;
    add.u32 v, v, w;
    st.param.b32 [y], v;
    ret;
}";
    let k = Kernel::new(
        functions,
        "
    .local .align 8 .b32 top[2];
    .param .b32 x;
    .param .b64 u;
    .param .b32 y;
    and.b32 t, i, 15;
    st.local.u32 [top], 77;
    st.param.b32 [x], t;
    mov.u64 a, top;
    cvta.local.u64 a, a;
    st.param.b64 [u], a;
    call (y), sum, (x, u);
    ld.param.b32 v, [y];
    ld.local.u32 w, [top+4];
    mad.lo.u32 v, v, 1000, w;",
    );
    let (got, _) = k.run(1, 64);
    assert_eq!(got, each(64, |i| (i & 15) * ((i & 15) + 1) / 2 * 1000 + 77));
}

#[test]
fn a_function_may_exit_or_hold_a_barrier() {
    let functions = "
.func meet(.param .b32 x)
{
    .reg .pred p;
    .reg .b32 v;
    ld.param.b32 v, [x];
    setp.ge.u32 p, v, 90;
    @p exit;
    bar.sync 0;
    ret;
}";
    let k = Kernel::new(
        functions,
        "
    .shared .align 4 .b32 tile[96];
    .param .b32 x;
    mov.u32 s, tile;
    mad.lo.u32 s, i, 4, s;
    st.shared.u32 [s], i;
    st.param.b32 [x], i;
    call meet, (x);
    mov.u32 s, tile;
    sub.u32 t, 89, i;
    mad.lo.u32 s, t, 4, s;
    ld.shared.u32 v, [s];",
    );
    let (got, report) = k.run(1, 96);
    assert_eq!(got, each(96, |i| if i < 90 { 89 - i } else { 0 }));
    assert_eq!(report.barriers, 1);
}

#[test]
fn a_deep_recursion_ends_in_a_report() {
    // 2000 calls deep is fine, 100000 are not.
    let k = |depth: u32| {
        let text = FACTORIAL.replace("mul.lo.u32 v, v, w;", "add.u32 v, v, w;");
        Kernel::new(
            &text,
            &format!(
                "
    .param .b32 x;
    .param .b32 y;
    add.u32 t, i, {depth};
    st.param.b32 [x], t;
    call (y), factorial, (x);
    ld.param.b32 v, [y];"
            ),
        )
    };
    let (got, _) = k(2000).run(1, 32);
    assert_eq!(got, each(32, |i| (2..=2000 + i).sum::<u32>() + 1));
    let result = k(100_000).try_run(Options::default(), &Launch::linear(1, 32), 32);
    let Err(Error::Fault(findings)) = result else { panic!("{result:?}") };
    assert_eq!(findings[0].kind, ErrorKind::StackOverflow);
}

#[test]
fn a_call_must_fit_its_function() {
    for (call, message) in [
        ("call (y), plus, (x, x);", "arguments of `plus`"),
        ("call plus, (x);", "results of `plus`"),
        ("call (y), plus, (h);", "arguments of `plus`"),
        ("call (y), plus, (v);", "no `.param` variable"),
        ("call (y), k, (x);", "the kernel `k`"),
        ("call (y), nobody, (x);", "no function `nobody`"),
    ] {
        let body = format!("    .param .b32 x;\n    .param .b32 y;\n    .param .b16 h;\n    {call}");
        let result = Kernel::new(THREE, &body).try_run(Options::default(), &Launch::linear(1, 1), 1);
        let Err(Error::Fault(found) | Error::Unsupported(found)) = &result else {
            panic!("{call}: {result:?}")
        };
        assert!(found[0].message.contains(message), "{call}: {}", found[0]);
    }
}

/// Addresses of parameters in 32 bits, as LLVM takes them with short pointers (Triton for tensor maps): widened and made generic,
/// or read through. `cvta.param` and `.param::entry` mean a kernel's parameters in functions as well.
#[test]
fn addresses_of_parameters_in_32_bits() {
    let read = |first: &str| {
        format!(
            ".reg .b32 v, w, x, at;\n.reg .b64 wide, there;\n{first}\ncvt.u64.u32 wide, at;\n\
             ld.param.b32 w, [at+8];\nld.param.b32 x, [wide+12];\n"
        )
    };
    let sum = "mad.lo.u32 v, w, 100, v;\nmad.lo.u32 v, x, 10000, v;\n";
    // The address of a function's parameter is one of local memory, as LLVM reads it.
    let own = read("mov.b64 wide, s;\nld.local.b32 v, [wide+4];\nmov.b32 at, s;") + sum;
    let generic = "cvta.param.u64 there, wide;\nld.b32 v, [there+4];\n".to_owned() + sum;
    let entry = read("ld.param.b32 at, [a];").replace("ld.param.b32 w", "ld.param::entry.b32 w");
    let entry = entry.replace("ld.param.b32 x", "ld.param::entry.b32 x") + &generic;
    let kernel = read("mov.b32 at, s;") + &generic;
    let text = format!(
        ".version 8.3\n.target sm_80\n.address_size 64\n\
         .func (.param .b32 y) f(.param .b32 other, .param .align 16 .b8 s[16])\n{{\n{own}st.param.b32 [y], v;\nret;\n}}\n\
         .func (.param .b32 y) g(.param .b32 a, .param .align 16 .b8 s[16])\n{{\n{entry}st.param.b32 [y], v;\nret;\n}}\n\
         .visible .entry k(.param .b32 other, .param .align 16 .b8 s[16], .param .b64 out)\n{{\n{kernel}.reg .b64 o;\n\
         .reg .b32 t;\nld.param.b64 o, [out];\nmov.u32 t, %tid.x;\nmad.wide.u32 o, t, 16, o;\nst.global.u32 [o], v;\n\
         {{\n.param .b32 z;\n.param .align 16 .b8 a[16];\n.param .b32 r;\nst.param.b32 [z], at;\nadd.u32 x, t, 1;\n\
         st.param.v4.b32 [a], {{t, t, x, t}};\ncall (r), f, (z, a);\nld.param.b32 v, [r];\nst.global.u32 [o+4], v;\n\
         call (r), g, (z, a);\nld.param.b32 v, [r];\n}}\nst.global.u32 [o+8], v;\nret;\n}}\n"
    );
    let mut gpu = ptxvm::Gpu::new(Options::default());
    let module = gpu.load(&ptxvm::Module::load("short.ptx", &text).unwrap()).unwrap();
    let out = gpu.alloc(4 * 16).unwrap();
    let words: Vec<u8> = [1u32, 2, 3, 4].iter().flat_map(|w| w.to_le_bytes()).collect();
    let args = [ptxvm::Arg::U32(0), ptxvm::Arg::Bytes(words), ptxvm::Arg::Ptr(out)];
    gpu.launch(&module, "k", &Launch::linear(1, 4), &args).unwrap_or_else(|e| panic!("{text}\n{e}"));
    let mut got = [[0u32; 4]; 4];
    gpu.read(out, bytemuck::cast_slice_mut(got.as_flattened_mut())).unwrap();
    for t in 0..4 {
        assert_eq!(got[t as usize][..3], [40302, t + 100 * (t + 1) + 10000 * t, 40302], "thread {t}");
    }
}
