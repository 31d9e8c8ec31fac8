#!/usr/bin/env bash
# Puts a kit together out of what was built: assemble.sh [--link] FOLDER PROGRAM TESTS VCUDA [NAME=BENCH]...
#
# FOLDER must not exist. The binaries are stripped copies; with --link they are links to what was built, for a kit that
# stays on this machine.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$here/../..

link=false
if [[ ${1:-} == --link ]]; then
    link=true
    shift
fi
[[ $# -ge 4 ]] || { echo "usage: assemble.sh [--link] FOLDER PROGRAM TESTS VCUDA [NAME=BENCH]..." >&2; exit 2; }
folder=$1 program=$2 tests=$3 vcuda=$4
shift 4

place() {
    if $link; then
        ln -s "$(readlink -f "$1")" "$folder/$2"
    else
        strip -o "$folder/$2" "$1"
    fi
}

mkdir "$folder" "$folder/vcuda" "$folder/benches"
place "$program" bon-engine
place "$tests" main
place "$vcuda" vcuda/libcuda.so.1
for bench in "$@"; do
    place "${bench#*=}" "benches/${bench%%=*}"
done
cp "$here/run.sh" "$here/README.md" "$here/wgmma_bits.cu" "$root/tools/reference/gpu_bench.py" "$folder"

# wgmma came with PTX 8.0, which drivers of CUDA 12.0 take; nvcc says that its own newest is needed, and adds a hint of
# newer versions that changes no result. ptxas holds it to that.
nvcc=$("$root/tools/install-nvcc.sh")
"$nvcc" -ptx -arch=sm_90a -O3 -std=c++17 -Werror all-warnings -o "$folder/wgmma_bits.ptx" "$here/wgmma_bits.cu"
sed -i -e 's/^\.version .*/.version 8.0/' -e '/\.pragma "used_bytes_mask/d' "$folder/wgmma_bits.ptx"
"$(dirname "$(readlink -f "$nvcc")")/ptxas" -arch=sm_90a -o "$folder/wgmma_bits.cubin" "$folder/wgmma_bits.ptx"

{
    echo "bon-engine $(git -C "$root" describe --always --dirty 2>/dev/null || echo 'of no git')"
    echo "built on $(uname -srm), $(ldd --version 2>/dev/null | head -n 1), kernels by $("$nvcc" --version | tail -n 1)"
} >"$folder/made_of"
