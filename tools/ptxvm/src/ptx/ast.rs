//! The syntax tree of a PTX module. Names and modifiers borrow from the text; nothing is resolved here.

use crate::types::{Space, Type};

/// A whole PTX file.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Module<'a> {
    /// `.version major.minor`
    pub version: (u32, u32),
    /// `.target sm_80, ...`
    pub targets: Vec<&'a str>,
    /// `.address_size`: 64, or 32, which the machine does not run.
    pub address_size: u32,
    /// `.file` directives: index and path, for `.loc`.
    pub files: Vec<(u32, String)>,
    /// Variables of module scope, in order.
    pub variables: Vec<Variable<'a>>,
    /// Kernels and device functions, declarations included, in order.
    pub functions: Vec<Function<'a>>,
    /// `.alias name, function;`: a second name for a function of the module.
    pub aliases: Vec<Alias<'a>>,
    /// Variables of a kind that the machine has nothing for.
    pub refused: Vec<RefusedVariable<'a>>,
}

/// A variable of a kind that the machine has nothing for, such as `.texref`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RefusedVariable<'a> {
    /// Its name.
    pub name: &'a str,
    /// Line in the text, from 1.
    pub line: u32,
    /// Why.
    pub message: String,
}

/// `.alias name, function;`
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Alias<'a> {
    /// The new name, declared as a function without a body.
    pub name: &'a str,
    /// The function that it stands for.
    pub function: &'a str,
    /// Line in the text, from 1.
    pub line: u32,
}

/// Who may see a symbol.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Linkage {
    /// This module only.
    #[default]
    Internal,
    /// `.visible`
    Visible,
    /// `.extern`: defined elsewhere, or shared memory whose size the launch gives.
    Extern,
    /// `.weak`
    Weak,
    /// `.common`
    Common,
}

/// A variable declaration of one name: `.global .align 4 .b8 table[24] = {...};`, also a parameter.
#[derive(Clone, Debug, PartialEq)]
pub struct Variable<'a> {
    /// Where it lives.
    pub space: Space,
    /// Its name.
    pub name: &'a str,
    /// The element's type; a vector type `.v4 .f32` has `vector` 4.
    pub ty: Type,
    /// Elements of one vector: 1, 2 or 4.
    pub vector: u32,
    /// Alignment in bytes: the value of `.align`, else the size of the element, or of the vector. A power of two.
    pub align: u32,
    /// Bytes in all; `None` for `[]`, whose size the launch gives (dynamic shared memory).
    pub bytes: Option<u64>,
    /// Its initial value; empty means zeros for global and const.
    pub init: Vec<Initial<'a>>,
    /// Who may see it.
    pub linkage: Linkage,
    /// Line in the text, from 1.
    pub line: u32,
}

/// A piece of an initialiser, at a byte offset in its variable.
#[derive(Clone, Debug, PartialEq)]
pub struct Initial<'a> {
    /// Offset in bytes from the variable's start.
    pub offset: u64,
    /// The value.
    pub value: InitialValue<'a>,
}

/// The value of a part of an initialiser.
#[derive(Clone, Debug, PartialEq)]
pub enum InitialValue<'a> {
    /// These bytes, little-endian (runs of numbers are joined to one piece).
    Bytes(Vec<u8>),
    /// The address of a symbol plus an offset, in `bytes` bytes; `generic(name)` asks for the generic address.
    Symbol {
        /// A variable or function of the module.
        name: &'a str,
        /// Added to the address.
        addend: i64,
        /// Whether `generic()` was written.
        generic: bool,
        /// Width of the stored address: 8 (others are refused when the module is loaded).
        bytes: u32,
        /// `mask(...)`: the part of the address, as a right shift in bits; 0 without one.
        shift: u32,
    },
}

/// A kernel (`.entry`) or a device function (`.func`).
#[derive(Clone, Debug, PartialEq)]
pub struct Function<'a> {
    /// Whether a launch may name it.
    pub is_entry: bool,
    /// Its name.
    pub name: &'a str,
    /// Who may see it.
    pub linkage: Linkage,
    /// Return parameters, `.func (.param .b32 r) f`; also `.reg` ones (then `space` is `Generic`).
    pub returns: Vec<Variable<'a>>,
    /// Parameters.
    pub params: Vec<Variable<'a>>,
    /// `.noreturn`
    pub noreturn: bool,
    /// `.maxntid x, y, z`: the most threads of a block, by dimension (missing ones are 1).
    pub max_threads: Option<[u32; 3]>,
    /// `.reqntid x, y, z`: the exact block.
    pub required_threads: Option<[u32; 3]>,
    /// Its directives about clusters of blocks.
    pub cluster: Cluster,
    /// The statements; `None` for a declaration.
    pub body: Option<Vec<Statement<'a>>>,
    /// Line of the name, from 1.
    pub line: u32,
}

/// The cluster directives of a kernel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cluster {
    /// `.reqnctapercluster x, y, z`: the exact cluster, in blocks (missing ones are 1).
    pub required: Option<[u32; 3]>,
    /// `.maxclusterrank`: the most blocks of a cluster.
    pub max_rank: Option<u32>,
    /// `.explicitcluster`: a launch must say the cluster's shape.
    pub explicit: bool,
    /// `.blocksareclusters`: a launch counts its grid in clusters.
    pub blocks_are_clusters: bool,
}

/// A statement of a function body.
#[derive(Clone, Debug, PartialEq)]
pub enum Statement<'a> {
    /// `name:`
    Label(&'a str, u32),
    /// `.reg .b32 %r<100>;` or `.reg .pred p, q;`: one for each name.
    Register(Register<'a>),
    /// `.local`, `.shared`, `.param`, ... in a function.
    Variable(Variable<'a>),
    /// One instruction.
    Instruction(Instruction<'a>),
    /// `{ ... }`: a scope of its own for names.
    Block(Vec<Statement<'a>>),
    /// `name: .branchtargets a, b;`
    BranchTargets(&'a str, Vec<&'a str>),
    /// `name: .calltargets f, g;`
    CallTargets(&'a str, Vec<&'a str>),
    /// `name: .callprototype (returns) _ (params);`
    CallPrototype(&'a str, Vec<Variable<'a>>, Vec<Variable<'a>>),
}

/// A register declaration: `%r<100>` declares `%r0` to `%r99`.
#[derive(Clone, Debug, PartialEq)]
pub struct Register<'a> {
    /// The type; vectors of registers (`.reg .v4 .f32`) have `vector` > 1.
    pub ty: Type,
    /// 1, 2 or 4.
    pub vector: u32,
    /// The name, or the name's beginning where `count` is given.
    pub name: &'a str,
    /// How many numbered registers, for `<n>`.
    pub count: Option<u32>,
    /// Line in the text.
    pub line: u32,
}

/// A line of a `.loc` directive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SourceLoc {
    /// Index of a `.file`.
    pub file: u32,
    /// Line, from 1; 0 where the compiler knows none.
    pub line: u32,
    /// Column.
    pub column: u32,
    /// File and line in the function of the text that the code was inlined into, through all calls between.
    pub inlined_at: Option<(u32, u32)>,
}

/// `@!p opcode.mod.mod a, b, c;`
#[derive(Clone, Debug, PartialEq)]
pub struct Instruction<'a> {
    /// Line in the text, from 1.
    pub line: u32,
    /// The `.loc` before it.
    pub loc: Option<SourceLoc>,
    /// The predicate that guards it.
    pub guard: Option<Guard<'a>>,
    /// The part before the first dot: `mad`.
    pub opcode: &'a str,
    /// The rest, split at dots: `["lo", "s32"]`. `::` stays inside: `shared::cta`, `L2::128B`.
    pub modifiers: Vec<&'a str>,
    /// Operands, in order.
    pub operands: Vec<Operand<'a>>,
}

/// `@p` or `@!p`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Guard<'a> {
    /// The predicate register.
    pub name: &'a str,
    /// Whether the instruction runs where it is false.
    pub negated: bool,
}

/// An operand of an instruction.
#[derive(Clone, Debug, PartialEq)]
pub enum Operand<'a> {
    /// A register, special register (`%tid.x`, with its component), variable, label or function; `sym+8` has an addend.
    Name(&'a str, i64),
    /// An integer, as the 64 bits of its two's complement (`-1` is all ones).
    Integer(u64),
    /// `0f3F800000`
    F32(u32),
    /// `0d3FF0000000000000`, and decimal floats such as `1.5`, as bits.
    F64(u64),
    /// `[base+offset]`; a tensor access has coordinates after the base: `[map, {x, y}]`.
    Address(Box<Address<'a>>),
    /// `{a, b}`
    Vector(Vec<Operand<'a>>),
    /// `(a, b)`: the arguments or results of a call.
    List(Vec<Operand<'a>>),
    /// `d|p`: two results.
    Pair(Box<Operand<'a>>, Box<Operand<'a>>),
    /// `!p`
    Not(&'a str),
    /// `-%r1` as in old code.
    Negated(&'a str),
    /// `_`
    Sink,
}

/// The inside of `[...]`.
#[derive(Clone, Debug, PartialEq)]
pub struct Address<'a> {
    /// A register or variable; `None` for a plain number.
    pub base: Option<&'a str>,
    /// Bytes added to it.
    pub offset: i64,
    /// Operands after the base and a comma: coordinates and offsets of tensor copies.
    pub rest: Vec<Operand<'a>>,
}
