#!/bin/sh
# Everything that is worth knowing of a machine with a GPU, in one file: tools/gpu_report.sh [FILE]
#
# The tests of every op and of whole training steps on cuda:0, compute-sanitizer's four tools over the op tests where
# it is installed, the kernels' times, and PyTorch doing the same work in the same minute where there is a PyTorch with
# CUDA. Nothing is skipped in silence: the file says what did not run, and why. The exit status is 0 if all that ran
# passed.
set -u
cd "$(dirname "$0")/.."
out=${1:-gpu_report.txt}
failed=0

say() {
    printf '\n==== %s\n' "$*" | tee -a "$out"
}

# Runs a command into the report; a failure is remembered, not fatal.
step() {
    title=$1
    shift
    say "$title"
    printf '$ %s\n' "$*" >>"$out"
    started=$(date +%s)
    "$@" >>"$out" 2>&1
    status=$?
    printf 'exit status %d after %d s\n' "$status" "$(($(date +%s) - started))" | tee -a "$out"
    [ "$status" -eq 0 ] || failed=1
}

: >"$out" || exit 1
say "bon-engine $(git describe --always --dirty 2>/dev/null || echo 'of no git'), $(uname -sr)"
if ! command -v nvidia-smi >/dev/null; then
    say "no nvidia-smi: this machine has no NVIDIA driver; nothing was run"
    exit 1
fi
step "the GPU" nvidia-smi --query-gpu=name,driver_version,compute_cap,memory.total,clocks.max.sm,clocks.max.mem,power.limit --format=csv
step "a compiler for the kernels" tools/install-nvcc.sh
step "build" cargo build --locked --release
step "what the program sees" target/release/bon-engine devices
step "tests of every op and of whole steps, on cuda:0 and on the virtual GPU" \
    cargo test --locked --test main -- kernels:: engine:: device:: --nocapture

if command -v compute-sanitizer >/dev/null; then
    binary=$(cargo test --locked --test main --no-run --message-format=json 2>/dev/null |
        sed -n 's/.*"executable":"\([^"]*\/main-[^"]*\)".*/\1/p' | tail -n 1)
    for tool in memcheck initcheck racecheck synccheck; do
        step "compute-sanitizer, $tool" compute-sanitizer --tool "$tool" --error-exitcode 9 \
            "$binary" kernels:: --test-threads 1
    done
else
    say "no compute-sanitizer on PATH (it comes with the CUDA toolkit): the kernels were not run under it"
fi

step "the kernels' times" cargo bench --locked --bench kernels
step "what the times could be: bounds from counts" target/release/bon-engine kernels
python=${PYTHON:-python3}
if "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
    step "the same work in PyTorch" "$python" tools/reference/gpu_bench.py
else
    say "no PyTorch with CUDA under $python (set PYTHON to one that has it): nothing to compare with"
fi

if [ -d .cache/gemma-3-270m ]; then
    for device in cuda cpu; do
        step "64 streams of the real Gemma on $device" target/release/bon-engine sample --device "$device" \
            --model .cache/gemma-3-270m --prompt "The capital of France is" -n 64 --max-new-tokens 64 --seed 1 --json
    done
else
    say "no .cache/gemma-3-270m (\`make gemma\` fetches it): no real model was run"
fi

if [ "$failed" -eq 0 ]; then say "all that ran passed; the report is $out"; else say "something failed; see $out"; fi
exit "$failed"
