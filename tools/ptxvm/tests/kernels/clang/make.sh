#!/usr/bin/env bash
# Compiles kernels.cu to the .ptx files beside it with clang 19; CLANG names another.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
for level in O2 O0; do
    "${CLANG:-clang-19}" -x cuda --cuda-device-only --cuda-gpu-arch=sm_80 -nocudainc -nocudalib \
        -Xclang -target-feature -Xclang +ptx70 "-$level" -S kernels.cu -o "kernels_$level.ptx"
done
