#!/usr/bin/env bash
# What a GPU makes of the kernels: ./run.sh [--virtual] right|fast OUT
#
#   right   does it compute what it should? Loader, driver, compiler, every op, whole steps; at most 240 s.
#   fast    how fast is it? The engine, the kernels, PyTorch for comparison, profiler and sanitizer; at most 480 s.
#
# Needs NVIDIA's driver, bash and coreutils, and nothing that is not in this folder. Each step is a process of its own
# with a time limit of its own, so that one that fails or hangs hides no other. OUT gets the output of each step as it
# comes, and report.txt, at most 1 MB, which ends with a line per step. The exit status is 0 if all passed on the GPU and
# nothing was skipped, 1 if not, and 2 if there was nothing to ask.
#
# --virtual asks the virtual GPU of this folder instead (right alone: it has no speed), with four times the time.
set -u
export LC_ALL=C

kit=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

# One sentence: what is wrong and what to do next.
fail() {
    echo "run.sh: error: $*" >&2
    exit 2
}

# ----------------------------------------------------------------------------------------------------------- arguments

virtual=false
if [[ ${1:-} == --virtual ]]; then
    virtual=true
    shift
fi
stage=${1:-}
[[ $# == 2 && ($stage == right || $stage == fast) ]] || fail "usage: ./run.sh [--virtual] right|fast OUT"
! $virtual || [[ $stage == right ]] || fail "a virtual GPU has no speed to measure: leave out --virtual, or ask for right"
out=$2
mkdir -p "$out" 2>/dev/null || fail "the folder $out cannot be made: give another OUT"
out=$(cd "$out" 2>/dev/null && pwd) || fail "the folder $2 cannot be entered: give another OUT"
report=$out/report.txt
{ : >"$report"; } 2>/dev/null || fail "$report cannot be written: give another OUT"
# Some tools leave files where they run.
cd "$out" || fail "the folder $out cannot be entered: give another OUT"

case $stage in
right) limit=240 ;;
fast) limit=480 ;;
esac
# The virtual GPU is one or two processors, which may have other things to do.
scale=1
! $virtual || scale=4
limit=$((limit * scale))
# What is left over is for the last lines of the report.
deadline=$((SECONDS + limit - 5))

if $virtual; then
    export LD_LIBRARY_PATH=$kit/vcuda${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
    # The kernels' tests have the virtual GPU's checks elsewhere; here they would take minutes.
    export VCUDA_CHECKS=${VCUDA_CHECKS:-0}
fi

# ------------------------------------------------------------------------------------------------------- is there a GPU

devices=$(timeout -k 5 60 "$kit/bon-engine" devices 2>&1) \
    || fail "$kit/bon-engine does not run on this machine: ${devices%%$'\n'*}"
gpu=
while IFS= read -r line; do
    case $line in
    "cuda:0 "*) gpu=${line#cuda:0 } gpu=${gpu# } ;;
    "cuda "*) fail "there is no GPU to ask: ${line#cuda*none: }" ;;
    esac
done <<<"$devices"
[[ -n $gpu ]] || fail "bon-engine devices names no cuda:0; it says: ${devices//$'\n'/; }"
[[ $gpu != *"too old"* ]] || fail "there is no GPU to ask: $gpu"
if [[ $gpu == vcuda* ]]; then
    $virtual || fail "the CUDA driver that is found first is the virtual one: look at LD_LIBRARY_PATH, or say --virtual"
elif $virtual; then
    fail "--virtual found a real driver before $kit/vcuda: look at LD_LIBRARY_PATH and /etc/ld.so.preload"
fi

# ---------------------------------------------------------------------------------------------------------------- steps

summary=()
asked=false # whether a step has passed on the GPU
bad=false   # whether a step has failed or was skipped

# Prints and keeps a line of the summary: verdict, step, seconds, what there is to say.
line() {
    local text
    printf -v text '%-7s %-22s %4s s  %s' "$1" "$2" "$3" "${4:0:600}"
    summary+=("$text")
    echo "$text"
}

# Appends a log to the report: all of a short one, the ends of a long one, less when the report grows large.
append() {
    local log=$1 bytes most=24000 have
    bytes=$(stat -c %s "$log") have=$(stat -c %s "$report")
    ((have < 700000)) || most=1000
    {
        if ((bytes <= most)); then
            cat "$log"
        else
            head -c $((most / 3)) "$log"
            printf '\n[... of %s bytes the middle is left out: see %s ...]\n' "$bytes" "${log##*/}"
            tail -c $((most * 2 / 3)) "$log"
        fi
        echo
    } >>"$report"
}

# A log, but of a very long one the beginning and the end.
ends() {
    if (($(stat -c %s "$1") <= 200000)); then
        cat "$1"
    else
        head -c 100000 "$1"
        tail -c 100000 "$1"
    fi
}

# Reads a log: sets `passed` (tests), `skips` (why something was not asked) and `said` (what matters most in it).
digest() {
    local text log=$1 next=false last=
    passed=0 skips= said=
    while IFS= read -r text; do
        [[ $text != *[![:space:]]* ]] || last=$text
        if $next; then
            said=$text next=false
        elif [[ $text =~ ^test\ result:\ [^.]*\.\ ([0-9]+)\ passed\;\ [0-9]+\ failed\;\ ([0-9]+)\ ignored ]]; then
            passed=${BASH_REMATCH[1]}
            ((BASH_REMATCH[2] == 0)) || skips+="${BASH_REMATCH[2]} tests are ignored; "
        elif [[ $text == "skipped: "* ]]; then
            skips+="${text#skipped: }; "
        elif [[ -z $said && $text == *"panicked at "* ]]; then
            # The message is the next line.
            next=true
        elif [[ -z $said && ($text == *rror:* || $text == *"ERROR SUMMARY: "*) ]]; then
            said=$text
        elif [[ $text == "in short: "* || $text == "cuda:0 "* ]]; then
            said=${text#in short: }
        fi
    done < <(ends "$log" | tr -d '\000')
    said=${said:-$last}
}

# Runs a command within a time limit, and within what is left of the stage: sets `status` and `seconds`, and `over` to
# why it was ended, if it was.
run() {
    local log=$1 most=$(($2 * scale)) began=$SECONDS left=$((deadline - SECONDS))
    shift 2
    ((most <= left)) || most=$left
    printf '\n==== %s\n$ %s\n' "${log##*/}" "$*" >>"$report"
    # The group keeps bash from telling that a process was killed; `status` does.
    { timeout -k 3 "$most" "$@" >"$log" 2>&1 </dev/null; } 2>/dev/null
    status=$?
    seconds=$((SECONDS - began)) over=
    # 137 is also what a process of its own may die of.
    [[ $status != 124 && ($status != 137 || $seconds -lt $most) ]] || over="stopped after $most s; last words: "
    append "$log"
}

# Whether there is time for one more step; says so if not.
late() {
    ((deadline - SECONDS < 3)) || return 1
    line LATE "$1" 0 "not run: the $limit s of this stage are over"
    bad=true
}

# A step: name, seconds, command.
step() {
    local name=$1 most=$2 log=$out/$1.log
    shift 2
    ! late "$name" || return 1
    run "$log" "$most" "$@"
    digest "$log"
    case $status in
    0)
        if [[ -n $skips ]]; then
            line SKIPPED "$name" "$seconds" "$skips"
            bad=true
        else
            line ok "$name" "$seconds" "$said"
        fi
        ;;
    *)
        line FAILED "$name" "$seconds" "${over:-exit status $status: }$said"
        bad=true
        ;;
    esac
    [[ $status == 0 && -z $skips ]]
}

# A step of tests: name, seconds, arguments of the tests' binary. Some must have run. If one fails, all of them run once
# more, each in a process of its own: after a fault a GPU's context is lost, and with it every later test.
tests() {
    local name=$1 most=$2
    shift 2
    ! late "$name" || return 1
    run "$out/$name.log" "$most" "$kit/main" "$@"
    digest "$out/$name.log"
    if [[ $status == 0 && -z $skips && $passed -gt 0 ]]; then
        line ok "$name" "$seconds" "$passed tests passed"
        asked=true
        return 0
    fi
    bad=true
    if [[ $status != 0 ]]; then
        line FAILED "$name" "$seconds" "$over$said"
        apart "$name" "$@"
    else
        line SKIPPED "$name" "$seconds" "${skips:-no test ran}"
    fi
    return 1
}

# Each test of a step that failed by itself.
apart() {
    local name=$1 test listed=() arguments=()
    shift
    while [[ $# -gt 0 ]]; do
        case $1 in
        --test-threads) shift ;;
        *) arguments+=("$1") ;;
        esac
        shift
    done
    while IFS= read -r test; do
        [[ $test != *": test" ]] || listed+=("${test%: test}")
    done < <(timeout 20 "$kit/main" "${arguments[@]}" --list 2>/dev/null)
    ((${#listed[@]} > 1)) || return
    local until=$((SECONDS + 45 * scale))
    for test in "${listed[@]}"; do
        if ((SECONDS >= until || deadline - SECONDS < 3)); then
            line LATE "  $name" 0 "not run by itself for want of time: $test and what follows"
            return
        fi
        run "$out/$name.apart.log" 20 "$kit/main" --exact "$test"
        digest "$out/$name.apart.log"
        [[ $status == 0 ]] || line FAILED "  by itself" "$seconds" "$test: $over$said"
    done
}

# What this machine does not have.
none() {
    line none "$1" 0 "$2"
}

finish() {
    local verdict status
    if ! $asked; then
        verdict="the GPU was not asked" status=1
    elif $bad; then
        verdict="not all passed" status=1
    else
        verdict="all passed, nothing was skipped" status=0
    fi
    {
        printf '\n==== summary: %s, %s\n' "$stage" "$gpu"
        printf '%s\n' "${summary[@]}"
        printf '%s after %s s\n' "$verdict" "$SECONDS"
    } >>"$report"
    echo "$verdict; the report is $report"
    trap - EXIT
    exit "$status"
}
trap 'bad=true; line FAILED "interrupted" 0 "by a signal"; finish' INT TERM HUP
trap finish EXIT

has() {
    command -v "$1" >/dev/null 2>&1
}

echo "bon-engine, stage $stage, on $gpu"
echo "bon-engine, stage $stage, on $gpu" >>"$report"
[[ ! -r $kit/made_of ]] || cat "$kit/made_of" >>"$report"

# ---------------------------------------------------------------------------------------------------------- the machine

# shellcheck disable=SC2016 # what the inner shell expands
machine='
    uname -srm; nproc; df -h . /dev/shm
    for f in /proc/driver/nvidia/version /etc/os-release; do [[ ! -r $f ]] || cat "$f"; done
    has() { command -v "$1" >/dev/null 2>&1; }
    ! has nvidia-smi || nvidia-smi
    ! has ldconfig || ldconfig -p | while IFS= read -r line; do [[ $line != *libcuda* ]] || echo "$line"; done
    ! has nvcc || nvcc --version
    env | while IFS= read -r line; do [[ $line != *CUDA* && $line != LD_LIBRARY_PATH* ]] || echo "$line"; done
    echo "in short: $(uname -srm), $(nproc) processors"'

# ---------------------------------------------------------------------------------------------------------------- right

right() {
    export KERNEL_TESTS=gpu RUST_BACKTRACE=1
    export CUDA_LAUNCH_BLOCKING=1
    step 00-machine 20 bash -c "$machine"
    step 01-devices 30 "$kit/bon-engine" devices
    tests 02-driver 60 device::on_gpu:: --test-threads 1
    # All modules through the driver's compiler; nothing runs.
    step 03-compile 120 "$kit/bon-engine" kernels --device cuda --resources
    # Simple to hard. An op that is not named here comes last.
    local ops=(rows adamw reduce embed geglu rms_norm rope matmul attention attention_backward lm_head) test op
    while IFS= read -r test; do
        [[ $test =~ ^kernels::([a-z_0-9]+)::.*:\ test$ ]] || continue
        op=${BASH_REMATCH[1]}
        # What ptxas says of kernels is no matter of a GPU.
        [[ $op == resources || " ${ops[*]} " == *" $op "* ]] || ops+=("$op")
    done < <(timeout 20 "$kit/main" kernels:: --list 2>/dev/null)
    # A GPU is asked by one thread, and afterwards for all of it once more. The virtual one does its work when it is waited
    # for, whoever asks: several threads are only faster, and a few ops stand for all.
    local threads=1 again=(kernels::)
    ! $virtual || threads=2 again=(kernels::rows:: kernels::rope:: kernels::rms_norm::)
    # Ops that failed are not run again: the steps that rest on others say something of their own.
    local without=(--skip kernels::resources::)
    for op in "${ops[@]}"; do
        tests "10-$op" 60 "kernels::$op::" --test-threads "$threads" || without+=(--skip "kernels::$op::")
    done
    tests 20-step 60 engine::a_step_on_a_gpu --test-threads 1
    # From here on nobody waits for a launch, as in a run.
    unset CUDA_LAUNCH_BLOCKING
    tests 21-replay 60 engine::decode_steps_are_replayed --test-threads 1
    tests 22-async 90 "${again[@]}" device::on_gpu:: "${without[@]}" --test-threads 16
    wgmma
}

# The bits of wgmma beside those of mma.sync, on GPUs that have it.
wgmma() {
    local name=30-wgmma
    ! late "$name" || return
    run "$out/$name.log" 60 env WGMMA_BITS="$kit/wgmma_bits.ptx" "$kit/main" --exact gpu_kit::bits_of_wgmma --nocapture
    digest "$out/$name.log"
    if [[ $status != 0 || $passed == 0 ]]; then
        line FAILED "$name" "$seconds" "$said"
        bad=true
    elif [[ -n $skips && $gpu == *"compute capability 9.0"* ]]; then
        line SKIPPED "$name" "$seconds" "$skips"
        bad=true
    elif [[ -n $skips ]]; then
        none "$name" "$skips"
    else
        line ok "$name" "$seconds" "$said"
    fi
}

# ----------------------------------------------------------------------------------------------------------------- fast

fast() {
    local bench python=${PYTHON:-python3}
    step 00-machine 20 bash -c "$machine"
    if [[ -x $kit/benches/engine ]]; then
        ! step 10-engine 150 "$kit/benches/engine" --bench --output "$out/engine.json" || asked=true
        # Where kernels begin while those before them run: what that gains, of the model whose launches cost most.
        case $gpu in
        *"compute capability 8."*) none 11-engine-late "kernels of this GPU begin one after the other anyway" ;;
        *) step 11-engine-late 40 env BON_GPU_DEPENDENT_LAUNCH=0 "$kit/benches/engine" --bench 'Gemma 3 270M/decode' ;;
        esac
    else
        none 10-engine "this kit has no bench of the engine"
    fi
    if [[ -x $kit/benches/kernels ]]; then
        export CRITERION_HOME=$out/criterion
        ! step 20-kernels-2b 100 "$kit/benches/kernels" --bench --noplot '^Gemma 2B/' || asked=true
        ! step 21-kernels-270m 70 "$kit/benches/kernels" --bench --noplot '^Gemma 3 270M/' || asked=true
    else
        none 20-kernels "this kit has no bench of the kernels"
    fi
    for bench in "$kit"/benches/*; do
        case ${bench##*/} in
        engine | kernels | '*') ;;
        *) step "25-${bench##*/}" 60 "$bench" --bench ;;
        esac
    done
    if timeout 60 "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
        step 30-torch-engine 100 "$python" "$kit/gpu_bench.py" --engine
        step 31-torch-ops 80 "$python" "$kit/gpu_bench.py" --model 2b
    else
        none 30-torch "$python has no PyTorch with CUDA (PYTHON names another)"
    fi
    profile
    sanitize
}

# Everything that the profiler counts, of one launch each of the kernels that matter most.
profile() {
    if ! has ncu; then
        none 40-ncu "no ncu on PATH"
        return
    fi
    local work kernel name
    while IFS='|' read -r name kernel work; do
        ! late "40-ncu-$name" || return
        # Out of `--bench`, the bench runs an op once.
        run "$out/40-ncu-$name.log" 30 ncu --clock-control none --set full --launch-count 1 \
            --kernel-name "regex:$kernel" "$kit/benches/kernels" "$work"
        digest "$out/40-ncu-$name.log"
        if [[ $(head -c 100000 "$out/40-ncu-$name.log") == *ERR_NVGPUCTRPERM* ]]; then
            none 40-ncu "this user may not read the GPU's counters"
            return
        elif [[ $status == 0 ]]; then
            line ok "40-ncu-$name" "$seconds" "see 40-ncu-$name.log"
        else
            line FAILED "40-ncu-$name" "$seconds" "exit status $status: $said"
            bad=true
        fi
    done <<'WORK'
matmul|matmul_forward|^Gemma 2B/matmul_forward down, T = 512
attention|attention_forward|^Gemma 2B/attention_forward prefill of 1024$
backward|attention_backward_keys|^Gemma 2B/attention_backward 512
head|lm_head_sample|^Gemma 2B/lm_head_sample
WORK
}

# Bounds, uninitialised memory and races, by NVIDIA's tool; every tensor is an allocation of the driver's, so that it
# sees the bounds of each.
sanitize() {
    if ! has compute-sanitizer; then
        none 50-sanitizer "no compute-sanitizer on PATH"
        return
    fi
    local tool ops=(kernels::matmul:: kernels::attention kernels::lm_head::)
    for tool in memcheck racecheck; do
        step "50-$tool" 90 env KERNEL_TESTS=gpu BON_GPU_EXACT_ALLOC=1 compute-sanitizer --tool "$tool" \
            --error-exitcode 9 "$kit/main" "${ops[@]}" --test-threads 1
    done
}

$stage
finish
