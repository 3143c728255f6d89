#!/usr/bin/env bash
# Train a detector: bash tools/dist_train.sh CONFIG GPUS [options of MMDetection's train.py]
# Without a GPU, GPUS is the number of processes on the CPU. Several machines: NNODES, NODE_RANK, MASTER_ADDR, PORT.
set -euo pipefail
if [ "$#" -lt 2 ]; then
    echo "usage: bash tools/dist_train.sh CONFIG GPUS [options of MMDetection's train.py]" >&2
    exit 2
fi
exec bash "$(dirname "$0")/dist_run.sh" train "$1" --processes "$2" "${@:3}"
