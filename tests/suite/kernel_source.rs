//! What build.rs reads in the text of kernels, and what it says of text that it cannot read.

#[allow(unreachable_pub, reason = "as in build.rs")]
#[path = "../../build/source.rs"]
pub(crate) mod source;

use source::{EntryPoint, Shared, Value, add_shared, entries};

fn shared_of(text: &str) -> Result<Shared, String> {
    let mut shared = Shared::new();
    add_shared(text, &mut shared).map(|()| shared)
}

#[test]
fn marked_lines_are_what_a_launcher_has() {
    let text = "// shared by all kernels\n\
        constexpr int ROWS = 64;  // shared\n\
        constexpr unsigned long MORE = 12;   // shared: rows of a block\n\
        constexpr int HIDDEN = 3;\n\
        struct alignas(16) KeyItem {  // shared\n    unsigned row;\n};\n\
        static_assert(sizeof(KeyItem) == 16);\n\
        template <Layout LA>\nusing Tile32x16 = Tile<32, 16, LA>;  // shared\n";
    let want = [
        ("KEY_ITEM_BYTES", Value::Number(16)),
        ("MORE", Value::Number(12)),
        ("ROWS", Value::Number(64)),
        ("TILE32X16", Value::Numbers(vec![32, 16])),
    ];
    let want: Shared = want.into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
    assert_eq!(shared_of(text), Ok(want));
}

#[test]
fn a_marked_line_that_cannot_be_read_is_an_error_with_its_line() {
    let cases = [
        (
            "constexpr int N = 2 * 3;  // shared",
            "want `constexpr <type> NAME = <decimal number>;`, not `constexpr int N = 2 * 3;`",
        ),
        ("constexpr int N = 0x40;  // shared", "want `constexpr <type> NAME = <decimal number>;`, not"),
        ("constexpr int N{64};  // shared", "want `constexpr <type> NAME = <decimal number>;`, not"),
        ("constexpr float N = 0.5f;  // shared", "want `constexpr <type> NAME = <decimal number>;`, not"),
        ("#define N 64  // shared", "stands behind a constexpr, a struct or a using, not `#define N 64`"),
        ("struct Item;  // shared", "stands behind a constexpr, a struct or a using, not `struct Item;`"),
        ("struct Item {  // shared\n};", "want `static_assert(sizeof(Item) == <number>);` in this file"),
        (
            "struct Item {  // shared\n};\nstatic_assert(sizeof(Item) == 4 * 8);",
            "want `static_assert(sizeof(Item) == <number>);` in this file",
        ),
        (
            "struct Item {  // shared\n};\nstatic_assert(sizeof(KeyItem) == 32);",
            "want `static_assert(sizeof(Item) == <number>);` in this file",
        ),
        (
            "using Walk = Tile<ROWS, 2>;  // shared",
            "want `using Name = Template<<decimal number>, ..>;`, not",
        ),
        (
            "using Walk = Tile;  // shared",
            "want `using Name = Template<<decimal number>, ..>;`, not `using Walk = Tile;`",
        ),
    ];
    for (text, want) in cases {
        let problem = shared_of(&format!("// A kernel.\n{text}\n")).expect_err(text);
        assert!(problem.starts_with(&format!("2: `// shared`: {want}")), "{text}\n{problem}");
    }
}

#[test]
fn files_of_one_stem_agree() {
    let mut shared = Shared::new();
    add_shared("constexpr int ROWS = 64;  // shared\n", &mut shared).unwrap();
    assert_eq!(add_shared("constexpr int ROWS = 64;  // shared\n", &mut shared), Ok(()));
    let problem = add_shared("\nconstexpr int ROWS = 32;  // shared\n", &mut shared).unwrap_err();
    assert_eq!(problem, "2: `// shared`: `ROWS` is Number(64) elsewhere, and Number(32) here");
}

fn entry(name: &str, line: usize, threads: &str) -> EntryPoint {
    EntryPoint { name: name.to_owned(), line, threads: threads.to_owned() }
}

#[test]
fn entry_points_and_those_of_families_are_found() {
    let text = "#include \"tile.cuh\"\n\
        #define SIZE 3\n\
        // extern \"C\" __global__ of a comment\n\
        extern \"C\" __global__ void __launch_bounds__(64, 2) plain(\n    const float *x) {\n}\n\
        #define FORWARD(NAME, TILE) \\\n\
        \x20   extern \"C\" __global__ void __launch_bounds__(Tile##TILE::THREADS) \\\n\
        \x20       forward_##NAME(const float *x) {  \\\n    }\n\
        FORWARD(bf16_64x64, 64x64)\n\
        FORWARD(32x16, 32x16)\n\
        extern \"C\" __global__ void __launch_bounds__(32) last(int x) {}\n";
    let want = [
        entry("plain", 4, "64"),
        entry("forward_bf16_64x64", 7, "Tile64x64::THREADS"),
        entry("forward_32x16", 7, "Tile32x16::THREADS"),
        entry("last", 13, "32"),
    ];
    assert_eq!(entries(text), Ok(want.to_vec()));
}

#[test]
fn an_entry_point_that_cannot_be_read_is_an_error_with_its_line() {
    const FAMILY: &str = "#define F(A) extern \"C\" __global__ void __launch_bounds__(32) f_##A(int x) {}";
    let cases = [
        ("extern \"C\" __global__ int f(int x) {}".to_owned(), "1: a kernel returns void"),
        ("extern \"C\" __global__ void f(int x) {}".to_owned(), "1: a kernel says its __launch_bounds__(..)"),
        (
            "extern \"C\" __global__ void __launch_bounds__(32".to_owned(),
            "1: __launch_bounds__( is not closed",
        ),
        ("extern \"C\" __global__ void __launch_bounds__(32) f".to_owned(), "1: a kernel has parameters"),
        (
            "namespace { extern \"C\" __global__ void f() {} }".to_owned(),
            "1: `extern \"C\" __global__` stands at the beginning",
        ),
        (
            "#define F extern \"C\" __global__ void f() {}".to_owned(),
            "1: a macro of an entry point has a parameter",
        ),
        (
            format!("\n{FAMILY} extern \"C\" __global__ void g() {{}}"),
            "2: F has two entry points; make it two macros",
        ),
        (format!("{FAMILY}\nF(1, 2)"), "2: F takes 1 arguments, not 2"),
        (format!("{FAMILY}\nF(1"), "2: F( is not closed"),
    ];
    for (text, want) in cases {
        let problem = entries(&text).expect_err(&text);
        assert!(problem.starts_with(want), "{text}\n{problem}");
    }
}
