#!/usr/bin/env bash
# Prints the path of a Chromium that can be run without a screen; where there is none, the exit status says so.
set -u

for name in chromium chromium-browser chromium-headless-shell headless_shell google-chrome google-chrome-stable chrome; do
    if path=$(command -v "$name") && "$path" --version >/dev/null 2>&1; then
        echo "$path"
        exit 0
    fi
done
exit 1
