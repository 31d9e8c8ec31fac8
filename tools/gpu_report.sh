#!/bin/sh
# Everything that is worth knowing of a machine with a GPU, in one file: tools/gpu_report.sh [FILE]
#
# The tests of every op and of whole training steps on cuda:0, compute-sanitizer's four tools over the op tests where
# it is installed, the kernels' times, and PyTorch doing the same work in the same run where there is a PyTorch with
# CUDA. Nothing is skipped in silence: the file says what did not run, and why. The exit status is 0 if all that ran
# passed, and the GPU was among what ran.
#
# OPS=<beginning of names> times only those ops; PYTHON is the Python to look for PyTorch in.
set -u
cd "$(dirname "$0")/.." || exit 1
out=${1:-gpu_report.txt}
ops=${OPS:-}
failed=0

say() {
    printf '\n==== %s\n' "$*" | tee -a "$out"
}

# Runs a command into the report; a failure is remembered, not fatal.
step() {
    say "$1"
    shift
    printf '$ %s\n' "$*" >>"$out"
    started=$(date +%s)
    "$@" >>"$out" 2>&1
    status=$?
    printf 'exit status %d after %d s\n' "$status" "$(($(date +%s) - started))" | tee -a "$out"
    [ "$status" -eq 0 ] || failed=1
    return "$status"
}

# Without this nothing that follows says anything of the GPU.
need() {
    step "$@" && return
    say "nothing more was run; see $out"
    exit 1
}

: >"$out" || exit 1
say "bon-engine $(git describe --always --dirty 2>/dev/null || echo 'of no git'), $(uname -sr)"
if ! command -v nvidia-smi >/dev/null; then
    say "no nvidia-smi: this machine has no NVIDIA driver; nothing was run"
    exit 1
fi
step "the GPU" nvidia-smi --query-gpu=name,driver_version,compute_cap,memory.total,clocks.max.sm,clocks.max.mem,power.limit --format=csv
need "a compiler for the kernels" tools/install-nvcc.sh
need "build" cargo build --locked --release
need "what the program sees" target/release/bon-engine devices
# The same again, to ask for the line of a GPU that the program can compute on.
need "whether that is a GPU" sh -c 'target/release/bon-engine devices | grep "^cuda:0 " | grep -v "too old"'
step "tests of every op and of whole steps, on cuda:0 and on the virtual GPU" \
    cargo test --locked --test main -- kernels:: engine:: device:: --nocapture

if command -v compute-sanitizer >/dev/null; then
    binary=$(cargo test --locked --test main --no-run --message-format=json 2>>"$out" |
        sed -n 's/.*"executable":"\([^"]*\/main-[^"]*\)".*/\1/p' | tail -n 1)
    for tool in memcheck initcheck racecheck synccheck; do
        # The GPU alone: it is what the tool sees.
        step "compute-sanitizer, $tool" env KERNEL_TESTS=gpu compute-sanitizer --tool "$tool" --error-exitcode 9 \
            "$binary" kernels:: --test-threads 1
    done
else
    say "no compute-sanitizer on PATH (it comes with the CUDA toolkit): the kernels were not run under it"
fi
if grep -q 'skipped: ' "$out"; then
    say "some tests had nothing to run on: look for \"skipped\" above"
    failed=1
fi

step "the kernels' times" cargo bench --locked --bench kernels -- "$ops"
step "what the times could be: bounds from counts" target/release/bon-engine kernels --op "$ops"
python=${PYTHON:-python3}
if "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
    step "the same work in PyTorch" "$python" tools/reference/gpu_bench.py --op "$ops"
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
