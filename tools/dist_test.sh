#!/usr/bin/env bash
# Test a detector: bash tools/dist_test.sh CONFIG CHECKPOINT GPUS --eval bbox segm [--show | --show-dir DIR]
set -euo pipefail
if [ "$#" -lt 3 ]; then
    echo "usage: bash tools/dist_test.sh CONFIG CHECKPOINT GPUS [options of MMDetection's test.py]" >&2
    exit 2
fi
if [ ! -f "$2" ]; then
    echo "test: there is no checkpoint '$2'" >&2
    exit 2
fi
exec bash "$(dirname "$0")/dist_run.sh" test "$3" "$1" "$2" "${@:4}"
