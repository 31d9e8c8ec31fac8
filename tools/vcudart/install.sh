#!/usr/bin/env bash
# Puts the runtime where programs find it: install.sh DIR [libvcudart.so]. The library is built without the second argument.
#
# DIR then has libvcudart.so, under its own name and as libcuda.so.1 and libcudart.so, and libcudart.so.12 and .13. These two
# are empty libraries that need libvcudart.so: programs that were linked with NVIDIA's runtime ask for symbols of a version
# with the library's name, and a linker that Rust drives gives symbols no version. Without a C compiler they are links, and
# the dynamic linker then says "no version information available" and goes on.
set -euo pipefail

[[ $# -ge 1 ]] || { echo "usage: install.sh DIR [libvcudart.so]" >&2; exit 2; }
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
mkdir -p "$1"
folder=$(cd "$1" && pwd)
if [[ $# -ge 2 ]]; then
    library=$2
else
    (cd "$here/../.." && cargo build --locked --release --package vcudart)
    library=${CARGO_TARGET_DIR:-$here/../../target}/release/libvcudart.so
fi
[[ -f $library ]] || { echo "install.sh: error: there is no $library: build it with cargo build -p vcudart" >&2; exit 1; }
cp -f "$library" "$folder/libvcudart.so"
ln -sf libvcudart.so "$folder/libcuda.so.1"
ln -sf libvcudart.so "$folder/libcudart.so"
for version in 12 13; do
    name=libcudart.so.$version
    rm -f "$folder/$name"
    if ! printf '%s { };\n' "$name" >"$folder/$name.map" \
        || ! "${CC:-cc}" -shared -nostdlib -x c /dev/null -x none -o "$folder/$name" "-Wl,-soname,$name" \
            "-Wl,--version-script=$folder/$name.map" '-Wl,-rpath,$ORIGIN' -Wl,--no-as-needed -L"$folder" -lvcudart 2>/dev/null; then
        ln -sf libvcudart.so "$folder/$name"
    fi
    rm -f "$folder/$name.map"
done
