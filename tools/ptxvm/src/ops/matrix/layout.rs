//! Which lane and register hold which element of a fragment (PTX ISA, "Matrix Fragments for mma").
//!
//! All layouts but one (f16 `m8n8k4`, [`quad`]) are built from blocks. With `g = lane / 4`, `t = lane % 4` and `e`
//! elements in a register:
//!
//! - a register of A is 8 rows by 4e columns: lane (g, t) holds row g, columns t*e ..;
//! - a register of B is 4e rows by 8 columns: lane (g, t) holds column g, rows t*e ..;
//! - C and D come in 8 x 8 blocks: lane (g, t) holds row g, columns 2t and 2t+1, in two registers, or packed in one
//!   for f16.
//!
//! So the words of a register, in the order of lanes, are a row-major block of A, or a column-major one of B. The ISA
//! leaves the fragments of `wmma` open; here they are the same blocks, which is what hardware of sm_75 and later has.

/// Rows, columns, and the depth of a product.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Rows of A and D.
    pub m: u8,
    /// Columns of B and D.
    pub n: u8,
    /// Columns of A, rows of B.
    pub k: u16,
}

/// An operand of a product.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operand {
    /// The left factor.
    A,
    /// The right factor.
    B,
    /// The accumulator, before and after.
    C,
}

/// One operand's fragment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fragment {
    /// Which operand.
    pub operand: Operand,
    /// The product it belongs to.
    pub shape: Shape,
    /// Elements in one register: 32 / bits, or 1 for f64.
    pub elements: u8,
}

/// The place of an element in a fragment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Index of the register.
    pub reg: u8,
    /// The lane.
    pub lane: u8,
    /// The element in the register, 0 the lowest bits.
    pub sub: u8,
}

impl Shape {
    /// Row blocks that the registers of A alternate between: the two halves of 16 rows, or one.
    fn halves(self) -> u8 {
        if self.m == 8 { 1 } else { 2 }
    }
}

impl Fragment {
    /// Blocks along k.
    pub fn k_blocks(self) -> u8 {
        (self.shape.k / (4 * u16::from(self.elements))) as u8
    }

    /// Registers that hold distinct elements.
    pub fn registers(self) -> u8 {
        match self.operand {
            Operand::A => self.shape.m / 8 * self.k_blocks(),
            Operand::B => self.shape.n / 8 * self.k_blocks(),
            Operand::C => self.shape.m / 8 * (self.shape.n / 8) * (2 / self.elements),
        }
    }

    /// The register with rows `8 * block ..` and the `k`-th block of columns of A.
    pub fn a(self, block: u8, k: u8) -> u8 {
        let halves = self.shape.halves();
        (block / halves * self.k_blocks() + k) * halves + block % halves
    }

    /// The register with columns `8 * block ..` and the `k`-th block of rows of B.
    pub fn b(self, block: u8, k: u8) -> u8 {
        block * self.k_blocks() + k
    }

    /// The (first) register with rows `8 * row ..` and columns `8 * col ..` of C.
    pub fn c(self, row: u8, col: u8) -> u8 {
        let halves = self.shape.halves();
        ((row / halves * (self.shape.n / 8) + col) * halves + row % halves) * (2 / self.elements)
    }

    /// Where the element of a row and column lies.
    pub fn place(self, row: usize, col: usize) -> Place {
        let e = usize::from(self.elements);
        match self.operand {
            Operand::A => Place {
                reg: self.a((row / 8) as u8, (col / (4 * e)) as u8),
                lane: (row % 8 * 4 + col / e % 4) as u8,
                sub: (col % e) as u8,
            },
            Operand::B => Place {
                reg: self.b((col / 8) as u8, (row / (4 * e)) as u8),
                lane: (col % 8 * 4 + row / e % 4) as u8,
                sub: (row % e) as u8,
            },
            Operand::C => Place {
                reg: self.c((row / 8) as u8, (col / 8) as u8) + if e == 1 { (col % 2) as u8 } else { 0 },
                lane: (row % 8 * 4 + col % 8 / 2) as u8,
                sub: if e == 1 { 0 } else { (col % 2) as u8 },
            },
        }
    }

    /// Row and column of the element that a register holds at `sub` in lane 0, and how they grow with g and with t:
    /// the element of lane (g, t) is `at + g * by_g + t * by_t`.
    pub fn origin(self, reg: u8, sub: u8) -> Origin {
        let Shape { m, n, .. } = self.shape;
        let e = self.elements;
        let find = |outer: u8, inner: u8, index: &dyn Fn(u8, u8) -> u8| {
            (0..outer).flat_map(|o| (0..inner).map(move |i| (o, i))).find(|&(o, i)| index(o, i) == reg)
        };
        match self.operand {
            Operand::A => {
                let (block, k) = find(m / 8, self.k_blocks(), &|o, i| self.a(o, i)).unwrap_or_default();
                Origin { at: [8 * block, k * 4 * e + sub], by_g: [1, 0], by_t: [0, e] }
            }
            Operand::B => {
                let (block, k) = find(n / 8, self.k_blocks(), &|o, i| self.b(o, i)).unwrap_or_default();
                Origin { at: [k * 4 * e + sub, 8 * block], by_g: [0, 1], by_t: [e, 0] }
            }
            Operand::C => {
                let second = if e == 1 { reg % 2 } else { sub };
                let first = if e == 1 { reg - reg % 2 } else { reg };
                let (row, col) =
                    find(m / 8, n / 8, &|o, i| if self.c(o, i) == first { reg } else { u8::MAX })
                        .unwrap_or_default();
                Origin { at: [8 * row, 8 * col + second], by_g: [1, 0], by_t: [0, 2] }
            }
        }
    }
}

/// See [`Fragment::origin`]; each is (row, column).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Origin {
    /// In lane 0.
    pub at: [u8; 2],
    /// Added for each g.
    pub by_g: [u8; 2],
    /// Added for each t.
    pub by_t: [u8; 2],
}

/// The layouts of f16 `mma.m8n8k4`: four products at once, each by 8 lanes ("quad pairs"): computation q has lanes
/// 4q .. 4q+3 and 16+4q .. 16+4q+3. A and B have two registers of two elements; C and D four of f16 or eight of f32.
pub mod quad {
    use crate::ops::matrix::layout::Place;

    fn lane(quad: usize, high: usize, t: usize) -> u8 {
        (16 * high + 4 * quad + t) as u8
    }

    fn packed(lane: u8, i: usize) -> Place {
        Place { reg: (i / 2) as u8, lane, sub: (i % 2) as u8 }
    }

    /// An element of A, stored by rows or by columns.
    pub fn a(quad: usize, row: usize, col: usize, by_rows: bool) -> Place {
        if by_rows {
            packed(lane(quad, row / 4, row % 4), col)
        } else {
            packed(lane(quad, row / 4, col), row % 4)
        }
    }

    /// An element of B, stored by rows or by columns: the mirror image of A.
    pub fn b(quad: usize, row: usize, col: usize, by_rows: bool) -> Place {
        a(quad, col, row, !by_rows)
    }

    /// An element of C or D of f16.
    pub fn c_f16(quad: usize, row: usize, col: usize) -> Place {
        packed(lane(quad, row / 4, row % 4), col)
    }

    /// An element of C or D of f32.
    pub fn c_f32(quad: usize, row: usize, col: usize) -> Place {
        let reg = (col & 4) | (row & 2) | (col & 1);
        Place { reg: reg as u8, lane: lane(quad, row / 4, (row & 1) | (col & 2)), sub: 0 }
    }
}
