#!/usr/bin/env bash
# What a GPU makes of the kernels, on a machine with a checkout: tools/gpu_report.sh [OUT]
#
# Builds the kit that `make gpu-kit` packs and runs both of its stages; OUT/right/report.txt and OUT/fast/report.txt say
# what came out. tools/gpu_kit/README.md tells what they ask. The exit status is 0 if all passed and nothing was skipped.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=$(realpath -m "${1:-gpu_report}")

tools/install-nvcc.sh >/dev/null
tools/gpu_kit/make.sh target/gpu-kit
status=0
for stage in right fast; do
    target/gpu-kit/run.sh "$stage" "$out/$stage" || status=$?
    # Without a GPU the other stage has none either.
    [[ $status != 2 ]] || exit 2
done
exit "$status"
