#!/usr/bin/env bash
# Builds the release binaries and puts a kit together: make.sh FOLDER. What was in FOLDER goes.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
folder=$(realpath -m "${1:?usage: make.sh FOLDER}")
cd "$here/../.."

# The binary of a target that a cargo command builds: name, command. Cargo names others that it needs on the way, too.
built() {
    local name=$1 binary
    shift
    binary=$(cargo "$@" "$name" --locked --no-run --message-format=json |
        sed -n 's|.*"executable":"\([^"]*/deps/'"$name"'-[^"/]*\)".*|\1|p' | tail -n 1)
    [[ -x $binary ]] || { echo "make.sh: error: cargo $* $name made no binary" >&2; return 1; }
    echo "$binary"
}

cargo build --locked --release
tests=$(built main test --release --test)
benches=()
# All that Cargo.toml names, but for the CPU's.
for name in $(sed -n '/^\[\[bench\]\]/,/^$/s/^name = "\(.*\)"/\1/p' Cargo.toml); do
    [[ $name == cpu_ops ]] && continue
    bench=$(built "$name" bench --bench)
    benches+=("$name=$bench")
done
rm -rf "$folder"
# Cargo builds a dev-dependency's libraries beside the tests.
"$here/assemble.sh" "$folder" target/release/bon-engine "$tests" "$(dirname "$tests")/libvcuda.so" "${benches[@]}"
