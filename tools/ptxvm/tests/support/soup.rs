//! Hostile PTX: token soups, and real modules with tokens deleted, doubled, swapped, replaced or cut off.

use proptest::prelude::*;
use proptest::sample::{Index, select};

/// Words of PTX, joined without regard to grammar; some are broken on purpose.
pub(crate) const VOCABULARY: &[&str] = &[
    ".version",
    "8.5",
    ".target",
    "sm_90",
    ",",
    ".address_size",
    "64",
    ".file",
    "1",
    "\"a.cu\"",
    ".loc",
    "inlined_at",
    "function_name",
    ".section",
    ".debug_str",
    ".visible",
    ".extern",
    ".weak",
    ".common",
    ".entry",
    ".func",
    "k",
    "f",
    "(",
    ")",
    "{",
    "}",
    "[",
    "]",
    ";",
    ":",
    ".global",
    ".const",
    ".shared",
    ".local",
    ".param",
    ".reg",
    ".align",
    "16",
    ".v2",
    ".v4",
    ".b8",
    ".b32",
    ".b64",
    ".u64",
    ".f32",
    ".f64",
    ".pred",
    ".b128",
    "x",
    "%r1",
    "%p1",
    "$L__BB0_1",
    "_",
    "<",
    ">",
    "<100>",
    "4000000000",
    "18446744073709551615",
    "0xFFU",
    "0x",
    "017",
    "08",
    "0b1",
    "0f3F800000",
    "0f1",
    "0d3FF0000000000000",
    "1.5",
    ".5",
    "1e9",
    "1e999",
    "=",
    "generic",
    "0xFF00",
    "WARP_SZ",
    "+",
    "-",
    "!",
    "~",
    "*",
    "/",
    "%",
    "<<",
    ">>",
    "&",
    "|",
    "^",
    "&&",
    "||",
    "?",
    "==",
    "!=",
    "<=",
    ">=",
    ".s64",
    ".noreturn",
    ".maxntid",
    ".reqntid",
    ".minnctapersm",
    ".maxnreg",
    ".reqnctapercluster",
    ".pragma",
    "\"nounroll\"",
    ".attribute",
    ".managed",
    ".alias",
    ".ptr",
    ".branchtargets",
    ".calltargets",
    ".callprototype",
    "@",
    "@%p1",
    "@!%p1",
    "mov",
    ".lo",
    "add.s32",
    "ld.global.L2::128B.v4.f32",
    "call.uni",
    "bra",
    "ret;",
    "setp.eq.s32",
    "%p1|%p2",
    "%tid.x",
    "[%rd1+-4]",
    "tex",
    "//",
    "/*",
    "*/",
    "#",
    "\n",
    "\"",
    "\0",
    "é",
    ".",
    "::",
];

/// Up to `most` words of the vocabulary behind a module's head (or without one) and inside a function (or not).
pub(crate) fn tokens(most: usize) -> impl Strategy<Value = String> {
    const HEADS: &[&str] = &[
        "",
        ".version 8.5\n.target sm_90\n.address_size 64\n",
        ".version 8.5 .target sm_90 .global .b32 x[2][2] = {",
        ".version 8.5 .target sm_90 .entry k(.param .b32 x) {\n",
        ".version 8.5 .target sm_90 .func f() { { call (x), f, (",
    ];
    (select(HEADS), prop::collection::vec(select(VOCABULARY), 0..most))
        .prop_map(|(head, words)| format!("{head}{}", words.join(" ")))
}

/// One change of a module's tokens.
#[derive(Clone, Debug)]
pub(crate) enum Edit {
    /// Takes a token out.
    Delete(Index),
    /// Puts a token there twice.
    Double(Index),
    /// Swaps two tokens.
    Swap(Index, Index),
    /// Writes a word of the vocabulary over a token.
    Replace(Index, &'static str),
    /// Drops everything from a token on.
    Truncate(Index),
}

/// A random change.
pub(crate) fn edit() -> impl Strategy<Value = Edit> {
    let index = any::<Index>;
    prop_oneof![
        4 => index().prop_map(Edit::Delete),
        4 => index().prop_map(Edit::Double),
        4 => (index(), index()).prop_map(|(a, b)| Edit::Swap(a, b)),
        4 => (index(), select(VOCABULARY)).prop_map(|(at, word)| Edit::Replace(at, word)),
        1 => index().prop_map(Edit::Truncate),
    ]
}

/// Cuts a text into words, marks, and blanks; joined, they are the text again.
pub(crate) fn split(text: &str) -> Vec<&str> {
    let is_word = |c: char| c.is_alphanumeric() || "_$%.".contains(c);
    let mut pieces = Vec::new();
    let mut rest = text;
    while let Some(first) = rest.chars().next() {
        let length = if is_word(first) {
            rest.find(|c| !is_word(c)).unwrap_or(rest.len())
        } else if first.is_whitespace() {
            rest.find(|c: char| !c.is_whitespace()).unwrap_or(rest.len())
        } else {
            first.len_utf8()
        };
        let (piece, tail) = rest.split_at(length);
        pieces.push(piece);
        rest = tail;
    }
    pieces
}

/// Applies edits in turn.
pub(crate) fn mutate(text: &str, edits: &[Edit]) -> String {
    let mut pieces = split(text);
    for edit in edits {
        if pieces.is_empty() {
            break;
        }
        let at = |index: &Index| index.index(pieces.len());
        match edit {
            Edit::Delete(index) => {
                let at = at(index);
                pieces.remove(at);
            }
            Edit::Double(index) => {
                let at = at(index);
                pieces.insert(at, pieces[at]);
            }
            Edit::Swap(a, b) => {
                let (a, b) = (at(a), at(b));
                pieces.swap(a, b);
            }
            Edit::Replace(index, word) => {
                let at = at(index);
                pieces[at] = word;
            }
            Edit::Truncate(index) => {
                let at = at(index);
                pieces.truncate(at);
            }
        }
    }
    pieces.concat()
}

/// One of the modules after one to six edits.
pub(crate) fn mutations(modules: &'static [&'static str]) -> impl Strategy<Value = String> {
    (select(modules), prop::collection::vec(edit(), 1..7)).prop_map(|(text, edits)| mutate(text, &edits))
}

/// A constant expression of literals and operators.
fn expression() -> impl Strategy<Value = String> {
    const LITERALS: &[&str] =
        &["0", "1", "7U", "0xFFFFFFFFFFFFFFFF", "9223372036854775807", "64", "1.5", "WARP_SZ"];
    const PREFIXES: &[&str] = &["-", "~", "!", "+", "(.s64)", "(.u64)"];
    const OPERATORS: &[&str] =
        &["+", "-", "*", "/", " % ", "<<", ">>", "&", "|", "^", "&&", "||", "<", "<=", ">", ">=", "==", "!="];
    select(LITERALS).prop_map(str::to_string).prop_recursive(4, 24, 3, |inner| {
        prop_oneof![
            (select(PREFIXES), inner.clone()).prop_map(|(op, a)| format!("{op}({a})")),
            (inner.clone(), select(OPERATORS), inner.clone()).prop_map(|(a, op, b)| format!("({a}{op}{b})")),
            (inner.clone(), inner.clone(), inner).prop_map(|(a, b, c)| format!("({a} ? {b} : {c})")),
        ]
    })
}

fn operand() -> impl Strategy<Value = String> {
    const NAMES: &[&str] = &["%r1", "%tid.x", "s", "_", "!p", "-a", "p|q", "_|p", "s+4", "0f3F800000"];
    prop_oneof![
        3 => select(NAMES).prop_map(str::to_string),
        1 => expression(),
        1 => expression().prop_map(|e| format!("[%rd1+{e}]")),
    ]
    .prop_recursive(3, 12, 4, |inner| {
        let list = prop::collection::vec(inner, 1..4).prop_map(|list| list.join(","));
        prop_oneof![
            list.clone().prop_map(|list| format!("{{{list}}}")),
            list.prop_map(|list| format!("[s,{list}]"))
        ]
    })
}

fn initial() -> impl Strategy<Value = String> {
    const SYMBOLS: &[&str] = &["s", "s+4", "generic(s)", "0xFF(s)", "0xFF00(generic(s)+1)", "1", "1.5"];
    prop_oneof![select(SYMBOLS).prop_map(str::to_string), expression()].prop_recursive(3, 12, 4, |inner| {
        prop::collection::vec(inner, 0..4).prop_map(|list| format!("{{{}}}", list.join(",")))
    })
}

/// A module that is mostly right: declarations with initial values, and a kernel of random instructions; then up to two
/// edits. Unlike soups, these get deep into a parser before something is wrong.
pub(crate) fn programs() -> impl Strategy<Value = String> {
    const TYPES: &[&str] =
        &["b8", "u8", "s16", "u32", "b32", "f32", "u64", "f64", "b128", "v2 .u16", "v4 .f32"];
    const SHAPES: &[&str] = &["", "[]", "[2]", "[][2]", "[2][3]", "[0x7FFFFFFFFFFFFFFF]"];
    const OPCODES: &[&str] = &["add.s32 ", "@!p call ", "ld.global.v4.f32 ", "bra ", "L: setp.eq.u64 "];
    let variable = (select(TYPES), select(SHAPES), initial())
        .prop_map(|(ty, shape, init)| format!(".global .{ty} a{shape} = {init};\n"));
    let instruction = (select(OPCODES), prop::collection::vec(operand(), 1..4))
        .prop_map(|(opcode, operands)| format!("{opcode}{};\n", operands.join(", ")));
    let variables = prop::collection::vec(variable, 0..2);
    let instructions = prop::collection::vec(instruction, 0..8);
    (variables, instructions, prop::collection::vec(edit(), 0..3)).prop_map(|(variables, body, edits)| {
        let head = ".version 8.5\n.target sm_90\n";
        mutate(&format!("{head}{}.entry k() {{\n{}}}\n", variables.concat(), body.concat()), &edits)
    })
}
