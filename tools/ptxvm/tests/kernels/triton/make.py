#!/usr/bin/env python3
"""Compiles kernels.py to the .ptx files beside it. Needs Triton 3.9 (pip install triton) and no GPU.

Each file's first lines say how it is launched; tests read the warps and the shared memory from there."""

import pathlib
import re

import kernels
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

HERE = pathlib.Path(__file__).resolve().parent
F32, BF16, F16, I32 = "*fp32", "*bf16", "*fp16", "i32"

# kernel: arguments' types in order, constants, options.
KERNELS = {
    "add": ([F32, F32, F32, I32], {"BLOCK": 1024}, {}),
    "softmax": ([F32, F32, I32, I32], {"BLOCK": 1024}, {}),
    "layer_norm": ([F32, F32, F32, F32, I32, "fp32"], {"BLOCK": 1024}, {"num_warps": 8}),
    "matmul": ([BF16, BF16, F32, I32, I32, I32], {"BM": 64, "BN": 64, "BK": 32}, {"num_stages": 3}),
    "attention": ([F16, F16, F16, F16, "fp32", I32], {"BM": 64, "BN": 32, "D": 64, "CAUSAL": True}, {"num_stages": 2}),
}
# Arguments that the tests keep at multiples of 16, which is what lets Triton use wide loads; all others are free.
EVEN = {"softmax": [2, 3], "matmul": [4, 5]}
# The newest PTX that the assembler of CUDA 13.2 reads is 9.2.
PTX_VERSION = 88
ARCHES = {80: list(KERNELS), 90: ["add", "softmax", "layer_norm", "matmul"]}


def compile_one(name, arch):
    types, constants, options = KERNELS[name]
    function = getattr(kernels, name)
    signature = dict(zip(function.arg_names, types + ["constexpr"] * len(constants)))
    # What Triton's launcher would find out: pointers come from an allocator, and some sizes are multiples of 16.
    sixteen = [i for i, ty in enumerate(types) if ty[0] == "*"] + EVEN.get(name, [])
    attributes = {(i,): [["tt.divisibility", 16]] for i in sixteen}
    source = ASTSource(fn=function, signature=signature, constexprs=constants, attrs=attributes)
    built = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options | {"ptx_version": PTX_VERSION})
    # Debug sections name directories of the machine that compiled.
    ptx = re.sub(r"\n\t\.section.*", "\n", built.asm["ptx"], flags=re.S)
    ptx = re.sub(r"^\s*\.(loc|file)\b.*\n", "", ptx, flags=re.M)
    ptx = re.sub(r",\s*debug\b", "", ptx)
    ptx = re.sub(r"^\s*//.*\n|^\s*\$L__tmp\d+:\s*\n|^\s*\$L__func_(begin|end)\d+:\s*\n", "", ptx, flags=re.M)
    ptx = re.sub(r"[ \t]+\n", "\n", re.sub(r"\n{2,}", "\n", ptx))
    meta = built.metadata
    head = f"// Triton {triton.__version__}, {name} of kernels.py, sm_{arch}: {constants}\n"
    head += f"// warps {meta.num_warps} shared {meta.shared} scratch {meta.global_scratch_size}\n"
    (HERE / f"{name}_sm{arch}.ptx").write_text(head + ptx.lstrip().rstrip() + "\n")
    print(f"{name}_sm{arch}.ptx: {head.splitlines()[1][3:]}")


for arch, names in ARCHES.items():
    for name in names:
        compile_one(name, arch)
