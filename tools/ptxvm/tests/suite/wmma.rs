//! `wmma`: loads, products and stores of all shapes, types and layouts against the definition of `support/product.rs`.

use ptxvm::{Arg, Gpu, Launch, Module, Options};

use crate::support::product::{Case, Matrix, bits, case, list, product};
use crate::support::warp::Random;

/// Loads A, B and C from memory, multiplies, doubles D element by element where `twice`, and stores it.
fn wmma(case: &Case, to: &str, layouts: [bool; 4], shared: bool) {
    let Case { m, n, k, a, b, c, extra } = *case;
    let mut random = Random(17);
    let dims = [(m, k, a), (k, n, b), (m, n, c), (m, n, to)];
    // Stride of rows or columns in elements, a multiple of 32 bytes wider than needed.
    let strides: Vec<usize> = dims
        .iter()
        .zip(layouts)
        .map(|((r, c, ty), rows)| if rows { *c } else { *r } + 256 / bits(ty))
        .collect();
    let matrices: Vec<Matrix> = dims[..3]
        .iter()
        .map(|(r, c, ty)| {
            Matrix::new(*r, *c, |_, _| match *ty {
                "f16" => random.next() & 0x83ff | 0x3800,
                "bf16" => random.next() & 0x83ff | 0x3c00,
                "f32" | "tf32" => random.next() & 0x83ff_ffff | 0x3c00_0000,
                "f64" => random.next() & 0x800f_ffff_ffff_ffff | 0x3ff0 << 48,
                "s32" => [0x7fff_ffff, 0x8000_0000, 5][(random.next() % 3) as usize],
                _ => random.next() & ((1 << bits(ty)) - 1),
            })
        })
        .collect();
    let offset =
        |i: usize, r: usize, c: usize| if layouts[i] { r * strides[i] + c } else { c * strides[i] + r };
    let mut memory = Vec::new();
    for (i, matrix) in matrices.iter().enumerate() {
        let (rows, cols, ty) = dims[i];
        let mut bytes = vec![0u8; 16384];
        for (r, c) in (0..rows * cols).map(|x| (x / cols, x % cols)) {
            let bit = offset(i, r, c) * bits(ty);
            for (j, byte) in matrix.get(r, c).to_le_bytes().iter().enumerate().take(bits(ty).div_ceil(8)) {
                bytes[bit / 8 + j] |= byte << (bit % 8);
            }
        }
        memory.extend(bytes);
    }
    let regs = |elements: usize, ty: &str| {
        (elements * bits(ty) / 32 / 32).div_ceil(if bits(ty) == 64 { 2 } else { 1 })
    };
    let factor = |elements, ty| if ty == "f16" { 8 } else { regs(elements, ty) };
    let counts = [factor(m * k, a), factor(k * n, b), regs(m * n, c), regs(m * n, to)];
    let prefix = |ty: &str, name: &str| if ty == "f64" { format!("d{name}") } else { format!("r{name}") };
    let names = ["a", "b", "c", "d"];
    let vector = |i: usize| list(&prefix(dims[i].2, names[i]), 0, counts[i]);
    let layout = |i: usize| if layouts[i] { "row" } else { "col" };
    let shape = format!("m{m}n{n}k{k}");
    let space = if shared { ".shared" } else { ".global" };
    let mut text = String::from(
        ".version 8.5\n.target sm_90a\n.address_size 64\n.extern .shared .align 32 .b8 tile[];\n.visible .entry k(.param .u64 p)\n{\n.reg .b64 %g, %q, %x;\n.reg .b32 %s, %i, %v;\n.reg .pred %p;\n",
    );
    for name in names {
        text += &format!(".reg .b32 %r{name}<8>;\n.reg .f64 %d{name}<8>;\n");
    }
    text += "ld.param.u64 %g, [p];\nmov.u32 %i, %tid.x;\n";
    if shared {
        // All of it to shared memory first, word by word.
        text += "shl.b32 %i, %i, 2;\nCOPY:\ncvt.u64.u32 %x, %i;\nadd.u64 %x, %x, %g;\nld.global.b32 %v, [%x];\nmov.u32 %s, tile;\nadd.u32 %s, %s, %i;\nst.shared.b32 [%s], %v;\nadd.u32 %i, %i, 128;\nsetp.lt.u32 %p, %i, 49152;\n@%p bra COPY;\nbar.sync 0;\n";
    }
    for i in 0..3 {
        let at = if shared { format!("tile+{}", 16384 * i) } else { format!("%g+{}", 16384 * i) };
        text += &format!(
            "mov.u32 %s, {};\nwmma.load.{}.sync.aligned.{}.{shape}{space}.{} {}, [{at}], %s;\n",
            strides[i],
            names[i],
            layout(i),
            dims[i].2,
            vector(i)
        );
    }
    let op = if a == "b1" { format!(".{extra}.popc") } else { String::new() };
    let sat = if extra == "satfinite" { ".satfinite" } else { "" };
    let types = if a == "f16" { format!("{to}.{c}") } else { format!("{to}.{a}.{b}.{c}") };
    text += &format!(
        "wmma.mma{op}.sync.aligned.{}.{}.{shape}.{types}{sat} {}, {}, {}, {};\n",
        layout(0),
        layout(1),
        vector(3),
        vector(0),
        vector(1),
        vector(2)
    );
    text += &format!(
        "wmma.store.d.sync.aligned.{}.{shape}.global.{to} [%g+49152], {}, {};\nret;\n}}\n",
        layout(3),
        vector(3),
        strides[3]
    );
    if let Ok(dir) = std::env::var("PTXVM_DUMP") {
        let id = format!(
            "{shape}_{a}_{b}_{c}_{to}_{extra}_{}{}{}{}_{shared}",
            layout(0),
            layout(1),
            layout(2),
            layout(3)
        );
        std::fs::write(format!("{dir}/{id}.ptx"), &text).unwrap();
    }
    let mut gpu = Gpu::new(Options { threads: 1, ..Options::default() });
    let module = Module::load("wmma.ptx", &text).unwrap_or_else(|e| panic!("{text}\n{e}"));
    let loaded = gpu.load(&module).unwrap();
    let p = gpu.alloc(65536).unwrap();
    gpu.write(p, &memory).unwrap();
    let launch = Launch { shared_bytes: 49152, ..Launch::linear(1, 32) };
    gpu.launch(&loaded, "k", &launch, &[Arg::Ptr(p)]).unwrap_or_else(|e| panic!("{text}\n{e}"));
    let mut out = vec![0; 16384];
    gpu.read(p.offset(49152), &mut out).unwrap();
    let want = product(case, to, &matrices[0], &matrices[1], &matrices[2]);
    let got = Matrix::new(m, n, |r, c| {
        let bytes = bits(to) / 8;
        let at = offset(3, r, c) * bytes;
        out[at..at + bytes].iter().rev().fold(0, |all, byte| all << 8 | u64::from(*byte))
    });
    assert_eq!(got.bits, want.bits, "{text}");
}

#[test]
fn wmma_of_all_shapes_types_and_layouts() {
    let both = [true, false];
    for (m, n) in [(16, 16), (8, 32), (32, 8)] {
        for (i, bits) in (0..16).map(|bits| (bits, [8, 4, 2, 1].map(|bit| bits & bit != 0))) {
            let shared = i % 3 == 0;
            for (c, to) in [("f32", "f32"), ("f16", "f16"), ("f16", "f32"), ("f32", "f16")] {
                wmma(&case(m, n, 16, "f16", "f16", c, ""), to, bits, shared);
            }
            wmma(&case(m, n, 16, "bf16", "bf16", "f32", ""), "f32", bits, !shared);
            for extra in ["", "satfinite"] {
                for ty in ["s8", "u8"] {
                    wmma(&case(m, n, 16, ty, ty, "s32", extra), "s32", bits, shared);
                }
            }
        }
    }
    for (x, y, z) in
        both.into_iter().flat_map(|x| both.map(|y| (x, y))).flat_map(|(x, y)| both.map(|z| (x, y, z)))
    {
        wmma(&case(16, 16, 8, "tf32", "tf32", "f32", ""), "f32", [x, y, z, x], z);
        wmma(&case(8, 8, 4, "f64", "f64", "f64", ""), "f64", [x, y, z, y], z);
        for ty in ["s4", "u4"] {
            wmma(&case(8, 8, 32, ty, ty, "s32", ""), "s32", [true, false, x, y], z);
        }
        for op in ["xor", "and"] {
            wmma(&case(8, 8, 128, "b1", "b1", "s32", op), "s32", [true, false, x, y], z);
        }
    }
}
