#!/usr/bin/env python3
"""Compiles the kernels of the modules beside it to .ptx files. Needs Triton 3.9 (pip install triton) and no GPU.

Each file's second line says how it is launched; the tests read it."""

import pathlib
import re

import attentions
import gluons
import kernels
import products
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

HERE = pathlib.Path(__file__).resolve().parent
F32, BF16, F16, I32, I64, U8 = "*fp32", "*bf16", "*fp16", "i32", "*i64", "*u8"
E4M3, E5M2 = "*fp8e4nv", "*fp8e5"
# The newest PTX that the assembler of CUDA 13.2 reads is 9.2.
PTX_VERSION = 88
BOTH, HOPPER, WITH_SCALES = [80, 90], [90], [90, 120]


def tensor(rows, columns):
    """A tensor map of f16."""
    return f"tensordesc<fp16[{rows},{columns}]>"


def laid_out(rows, columns):
    """One of Gluon, which has its layout in shared memory written down."""
    layout = gl.NVMMASharedLayout.get_default_for([rows, columns], gl.float16)
    return f"tensordesc<fp16[{rows},{columns}],{layout!r}>"


# file, kernel, architectures, arguments' types in order, constants, options, and which arguments the tests keep at
# multiples of 16, beside the pointers, which is what lets Triton use wide loads.
MAPS = [tensor(128, 64), tensor(128, 64), tensor(128, 64), I32, I32, I32]
SQUARES = [tensor(64, 64), tensor(64, 64), tensor(64, 64), I32, I32, I32]
PROGRAMS = {"GROUP": 2, "PROGRAMS": 3}
KERNELS = [
    ("add", kernels.add, BOTH, [F32, F32, F32, I32], {"BLOCK": 1024}, {}, []),
    ("dependent_add", kernels.dependent_add, HOPPER, [F32, F32, F32, I32], {"BLOCK": 256}, {"launch_pdl": True}, []),
    ("arcsine", kernels.arcsine, HOPPER, [F32, F32, I32], {"BLOCK": 256}, {}, []),
    ("dropout", kernels.dropout, HOPPER, [F32, F32, I32, "fp32", "i64"], {"BLOCK": 256}, {}, []),
    ("softmax", kernels.softmax, BOTH, [F32, F32, I32, I32], {"BLOCK": 1024}, {}, [2, 3]),
    (
        "softmax_rows",
        kernels.softmax_rows,
        HOPPER,
        [F32, F32, I32, I32, I32],
        {"BLOCK": 1024, "STAGES": 3},
        {"num_warps": 8},
        [2, 4],
    ),
    (
        "layer_norm",
        kernels.layer_norm,
        BOTH,
        [F32, F32, F32, F32, I32, "fp32"],
        {"BLOCK": 1024},
        {"num_warps": 8},
        [],
    ),
    (
        "layer_norm_backward",
        kernels.layer_norm_backward,
        HOPPER,
        [F32] * 8 + ["*i32", I32],
        {"GROUPS": 2, "BLOCK": 512},
        {},
        [],
    ),
    ("column_sums", kernels.column_sums, HOPPER, [F32, F32, I32, I32], {"BM": 16, "BN": 64}, {}, []),
    (
        "matmul",
        products.matmul,
        BOTH,
        [BF16, BF16, F32, I32, I32, I32],
        {"BM": 64, "BN": 64, "BK": 32},
        {"num_stages": 3},
        [4, 5],
    ),
    (
        "matmul_leaky",
        products.matmul_leaky,
        HOPPER,
        [F16, F16, F16, I32, I32, I32],
        {"BM": 64, "BN": 64, "BK": 32, "GROUP": 2},
        {"num_stages": 3},
        [4, 5],
    ),
    (
        "matmul_leaky_e4m3",
        products.matmul_leaky,
        HOPPER,
        [E4M3, E4M3, F16, I32, I32, I32],
        {"BM": 64, "BN": 64, "BK": 64, "GROUP": 2},
        {"num_stages": 3},
        [4, 5],
    ),
    (
        "matmul_tf32",
        products.matmul_tf32,
        HOPPER,
        [F32, F32, F32, I32, I32, I32],
        {"BM": 64, "BN": 32, "BK": 32},
        {"num_stages": 3},
        [4, 5],
    ),
    (
        "matmul_groups",
        products.matmul_groups,
        HOPPER,
        [I64, "*i32", I32],
        {"BM": 64, "BN": 32, "BK": 32, "PROGRAMS": 3},
        {},
        [],
    ),
    (
        "matmul_groups_maps",
        products.matmul_groups_maps,
        HOPPER,
        [I64, "*i32", I32],
        {"BM": 64, "BN": 64, "BK": 64, "PROGRAMS": 3},
        {},
        [],
    ),
    (
        "matmul_persistent",
        products.matmul_persistent,
        HOPPER,
        [F16, F16, F16, I32, I32, I32],
        {"BM": 64, "BN": 64, "BK": 32, "FLATTEN": True} | PROGRAMS,
        {"num_stages": 3},
        [4, 5],
    ),
    (
        "matmul_maps",
        products.matmul_maps,
        HOPPER,
        MAPS,
        {"BM": 128, "BN": 128, "BK": 64, "FLATTEN": True, "SPECIALIZE": False, "HALVES": True} | PROGRAMS,
        {"num_stages": 3, "num_warps": 8},
        [],
    ),
    (
        "matmul_maps_specialized",
        products.matmul_maps,
        HOPPER,
        SQUARES,
        {"BM": 64, "BN": 64, "BK": 64, "FLATTEN": False, "SPECIALIZE": True, "HALVES": False} | PROGRAMS,
        {"num_stages": 3},
        [],
    ),
    (
        "matmul_maps_cluster",
        products.matmul_maps,
        HOPPER,
        [tensor(128, 64), tensor(128, 64), tensor(128, 128), I32, I32, I32],
        {"BM": 128, "BN": 128, "BK": 64, "FLATTEN": False, "SPECIALIZE": False, "HALVES": False} | PROGRAMS,
        {"num_stages": 3, "num_ctas": 2},
        [],
    ),
    (
        "matmul_scaled_e2m1",
        products.matmul_scaled,
        HOPPER,
        [E4M3, U8, U8, U8, F32, I32, I32, I32],
        {"BM": 64, "BN": 32, "BK": 64, "PACK": 2},
        {},
        [6, 7],
    ),
    (
        "matmul_scaled_e5m2",
        products.matmul_scaled,
        WITH_SCALES,
        [E4M3, U8, E5M2, U8, F32, I32, I32, I32],
        {"BM": 64, "BN": 32, "BK": 64, "PACK": 1},
        {},
        [6, 7],
    ),
    (
        "attention",
        attentions.attention,
        BOTH,
        [F16, F16, F16, F16, "fp32", I32],
        {"BM": 64, "BN": 32, "D": 64, "CAUSAL": True},
        {"num_stages": 2},
        [],
    ),
    (
        "attention_maps",
        attentions.attention_maps,
        HOPPER,
        [tensor(128, 64), tensor(64, 64), tensor(64, 64), tensor(128, 64), F32, "fp32", I32],
        {"BM": 128, "BN": 64, "D": 64, "CAUSAL": True, "SPECIALIZE": False},
        {"num_stages": 2, "num_warps": 8},
        [],
    ),
    (
        "attention_maps_specialized",
        attentions.attention_maps,
        HOPPER,
        [tensor(64, 64), tensor(64, 64), tensor(64, 64), tensor(64, 64), F32, "fp32", I32],
        {"BM": 64, "BN": 64, "D": 64, "CAUSAL": True, "SPECIALIZE": True},
        {"num_stages": 2},
        [],
    ),
    (
        "attention_backward",
        attentions.attention_backward,
        HOPPER,
        [F16] * 4 + [F32] * 5 + ["fp32", I32],
        {"BM": 32, "BN": 64, "D": 64},
        {"num_stages": 2},
        [],
    ),
    ("copied_add", gluons.copied_add, HOPPER, [F32, F32, F32, I32], {"BLOCK": 256, "TURNS": 3}, {}, []),
    (
        "ring_matmul",
        gluons.ring_matmul,
        HOPPER,
        [laid_out(64, 64)] * 3 + [I32],
        {"BM": 64, "BN": 64, "BK": 64, "STAGES": 3},
        {},
        [],
    ),
    (
        "partitioned_matmul",
        gluons.partitioned_matmul,
        HOPPER,
        [laid_out(64, 64)] * 3 + [I32],
        {"BM": 64, "BN": 64, "BK": 64, "STAGES": 2},
        {},
        [],
    ),
]


def compile_one(name, function, arch, types, constants, options, even):
    signature = dict(zip(function.arg_names, types + ["constexpr"] * len(constants)))
    # What Triton's launcher would find out: pointers come from an allocator, and some sizes are multiples of 16.
    sixteen = [i for i, ty in enumerate(types) if ty[0] == "*"] + even
    attributes = {(i,): [["tt.divisibility", 16]] for i in sixteen}
    source = (GluonASTSource if function.is_gluon() else ASTSource)(function, signature, constants, attributes)
    options = options | {"ptx_version": PTX_VERSION, "enable_fp_fusion": True}
    built = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    # Debug sections name directories of the machine that compiled.
    ptx = re.sub(r"\n\t\.section.*", "\n", built.asm["ptx"], flags=re.S)
    ptx = re.sub(r"^\s*\.(loc|file)\b.*\n", "", ptx, flags=re.M)
    ptx = re.sub(r",\s*debug\b", "", ptx)
    ptx = re.sub(r"^\s*//.*\n|^\s*\$L__tmp\d+:\s*\n|^\s*\$L__func_(begin|end)\d+:\s*\n", "", ptx, flags=re.M)
    ptx = re.sub(r"[ \t]+\n", "\n", re.sub(r"\n{2,}", "\n", ptx))
    meta = built.metadata
    module = function.__module__
    head = f"// Triton {triton.__version__}, {function.__name__} of {module}.py, sm_{arch}: {constants}\n"
    head += f"// warps {meta.num_warps} shared {meta.shared} scratch {meta.global_scratch_size} cluster {meta.num_ctas}"
    # Rows, columns and swizzle of the tensor maps' boxes, all of f16.
    for of in meta.tensordesc_meta:
        assert of["elem_type"] == 6 and not of["is_im2col"] and not of["fp4_padded"], of
        rows, columns = of["block_size"]
        head += f" map {rows} {columns} {[0, 32, 64, 128][of['swizzle']]}"
    (HERE / f"{name}_sm{arch}.ptx").write_text(head + "\n" + ptx.lstrip().rstrip() + "\n")
    print(f"{name}_sm{arch}.ptx: {head.splitlines()[1][3:]}")


for name, function, arches, *how in KERNELS:
    for arch in arches:
        compile_one(name, function, arch, *how)
