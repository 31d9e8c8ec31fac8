#!/usr/bin/env bash
# Prints the path of an nvcc, and nothing else on stdout. An installed CUDA toolkit is used as it is; without one, the
# compiler's parts come from NVIDIA's wheels on PyPI, pinned by version and sha256, into .cache/nvcc-<version>.
set -euo pipefail

VERSION=13.2.78
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
PLACE=$ROOT/.cache/nvcc-$VERSION
NVCC=$PLACE/nvidia/cu13/bin/nvcc

# One paragraph: what is wrong and what to do next.
fail() {
    echo "install-nvcc: error: $*" >&2
    exit 1
}

# Cargo does not see that a compiler has come: the build must look again, but only if it is another than last time.
found() {
    mkdir -p "$ROOT/.cache"
    if [[ $(cat "$ROOT/.cache/nvcc.path" 2>/dev/null || true) != "$1" ]]; then
        echo "$1" >"$ROOT/.cache/nvcc.path"
        touch "$ROOT/build.rs"
    fi
    echo "$1"
}

# Both compilers must run: a toolkit without ptxas, or one of another architecture, is none.
works() {
    [[ -x $1 ]] && "$1" --version >/dev/null 2>&1 && "$(dirname "$1")/ptxas" --version >/dev/null 2>&1
}

# nvcc preprocesses with a host compiler, wherever nvcc itself comes from.
need_host_compiler() {
    [[ -n ${NVCC_CCBIN:-} ]] || command -v g++ >/dev/null || fail "nvcc needs a C++ compiler on this machine and finds" \
        "no g++: install one (Debian, Ubuntu: apt install g++; Fedora: dnf install gcc-c++), or name another in" \
        "NVCC_CCBIN, and run again."
}

on_path=$(command -v nvcc || true)
# A link on PATH may lead away from its ptxas.
[[ -z $on_path ]] || on_path=$(readlink -f "$on_path")
for candidate in "$on_path" "${CUDA_HOME:+$CUDA_HOME/bin/nvcc}" "${CUDA_PATH:+$CUDA_PATH/bin/nvcc}" \
    /usr/local/cuda/bin/nvcc "$NVCC"; do
    # What stands in the cache was tried when it was put there.
    if [[ -n $candidate ]] && { [[ $candidate == "$NVCC" && -x $NVCC ]] || works "$candidate"; }; then
        need_host_compiler
        found "$candidate"
        exit 0
    fi
done

need_host_compiler
# Each wheel, and the sha256 of its file for this machine.
case $(uname -s)-$(uname -m) in
Linux-x86_64) wheels="
    nvidia-cuda-nvcc==13.2.78      c3bd144dd9b6b25e062589acb7bbd43d93d3120c72fad71da808f9817aba1239
    nvidia-nvvm==13.2.78           f5aa433631109bbdec81802c5b5f319bf10bc891fe2f212e4e445845211d6f77
    nvidia-cuda-crt==13.2.78       2c8615ee30ed466cb6298ecb8ffe9e6ea8b252ca833206152d155750bf831608
    nvidia-cuda-runtime==13.2.75   72bf454902da594e0b833cadeddc8b7100ce1c7cf7ed9023943931be1aa913b7
    nvidia-cuda-cccl==13.2.75      11a2b1948e8709805a0ccf04441baf5279a9219c13eb11dc13d57bb023151768
    nvidia-cuda-cuobjdump==13.2.78 394087411405b846bf43aa52ca2ff603bbe18b3b8a1257cda0903e23c17bdbf3
    nvidia-cuda-nvdisasm==13.2.78  b4ebcd3c5046bf8039ac52675b9dbefd843600969649ecaab0a42b0713a61dae" ;;
Linux-aarch64) wheels="
    nvidia-cuda-nvcc==13.2.78      dfc76950c775cd00ce588f15192f08c9b858c0dcfa7da685acf39a3d0d8f588b
    nvidia-nvvm==13.2.78           88075f87a361a1dce95c799cabc028f7093af616a5702dcfb74eba4045dbbd5f
    nvidia-cuda-crt==13.2.78       3f5f1d7bf8a89e98f19f45a2f18bb5df99a806433bfb6f0bc487d9e8f4b3677b
    nvidia-cuda-runtime==13.2.75   36e539e8deb01568025830c1454216c26ef4b4529507220b1d8ef739bf5c6439
    nvidia-cuda-cccl==13.2.75      d3b4129c84a8b94ac09fc3042c98c71bd0821e140f0ae213b319a9a86506d781
    nvidia-cuda-cuobjdump==13.2.78 c985f2ac62cc6b41cb3c612c4b8d117f4c30ff5c1a2f9e23ca3350e0090a85b6
    nvidia-cuda-nvdisasm==13.2.78  c338282695eca43de237929c5e3963d8d04f61d578d40f01bd04aca2bc29c233" ;;
*) fail "NVIDIA publishes no CUDA compiler for $(uname -s) on $(uname -m). Use a Linux machine or container on x86_64" \
    "or aarch64 (no GPU is needed), or install a CUDA toolkit and put its nvcc on PATH or name it in CUDA_HOME." ;;
esac

command -v python3 >/dev/null || fail "there is no nvcc here, and fetching one needs python3 with pip: install them" \
    "(Debian, Ubuntu: apt install python3-pip), or a CUDA toolkit, and run again."
python3 -m pip --version >/dev/null 2>&1 || fail "there is no nvcc here, and fetching one needs pip, which" \
    "$(command -v python3) lacks: install it (Debian, Ubuntu: apt install python3-pip), or a CUDA toolkit, and run again."

mkdir -p "$ROOT/.cache"
# What an interrupted run left is removed by the next one; a directory younger than an hour may belong to a live one.
find "$ROOT/.cache" -maxdepth 1 -name "nvcc-$VERSION.part.*" -mmin +60 -exec rm -rf {} + 2>/dev/null || true
part=$PLACE.part.$$
rm -rf "$part"
mkdir "$part"
trap 'rm -rf "$part"' EXIT
trap 'exit 130' INT TERM HUP

echo "install-nvcc: fetching the CUDA compiler $VERSION (about 125 MB) into ${PLACE#"$ROOT"/}" >&2
while read -r wheel hash; do
    [[ -z $wheel ]] || echo "$wheel --hash=sha256:$hash"
done <<<"$wheels" >"$part/requirements.txt"
if ! python3 -m pip install --quiet --disable-pip-version-check --no-input --no-deps --only-binary=:all: \
    --require-hashes --no-compile --target "$part/new" --requirement "$part/requirements.txt" >"$part/log" 2>&1; then
    fail "pip could not fetch the CUDA compiler: $(grep -m1 '^ERROR' "$part/log" || tail -n1 "$part/log"). This needs" \
        "the network once (about 125 MB from PyPI): check it, or install a CUDA toolkit, and run again."
fi
# Wheels may lose the executable bit on the way.
chmod +x "$part"/new/nvidia/cu13/bin/* "$part"/new/nvidia/cu13/nvvm/bin/*
works "$part/new/nvidia/cu13/bin/nvcc" || fail "the CUDA compiler was fetched but does not run:" \
    "$("$part/new/nvidia/cu13/bin/nvcc" --version 2>&1 | tail -n1) It needs glibc 2.17 or newer: use a Debian, Ubuntu or" \
    "Fedora machine or container, or install a CUDA toolkit there, and run again."
# Complete or absent. If another run was faster, its copy is as good: never move into an existing directory.
mv -T "$part/new" "$PLACE" 2>/dev/null || works "$NVCC" || fail "$PLACE is in the way and holds no working nvcc:" \
    "remove it and run again."
found "$NVCC"
