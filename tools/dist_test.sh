#!/usr/bin/env bash
# Test a detector: bash tools/dist_test.sh CONFIG CHECKPOINT GPUS --eval bbox segm [--show | --show-dir DIR]
# Without a GPU, GPUS is the number of processes on the CPU. Several machines: NNODES, NODE_RANK, MASTER_ADDR, PORT.
set -euo pipefail
if [ "$#" -lt 3 ]; then
    echo "usage: bash tools/dist_test.sh CONFIG CHECKPOINT GPUS [options of MMDetection's test.py]" >&2
    exit 2
fi
exec bash "$(dirname "$0")/dist_run.sh" test "$1" "$2" --processes "$3" "${@:4}"
