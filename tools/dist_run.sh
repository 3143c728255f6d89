#!/usr/bin/env bash
# Shared by dist_train.sh and dist_test.sh: run PROGRAM on GPUS processes; without a GPU, one process on the CPU.
# Usage: bash tools/dist_run.sh PROGRAM GPUS [ARGUMENT ...]
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
program="$1"
gpus="$2"
shift 2

# The environment that `make setup` made, unless another one is active or named.
python="${PYTHON:-}"
if [ -z "$python" ]; then
    if [ -z "${VIRTUAL_ENV:-}" ] && [ -x "$here/../.venv/bin/python" ]; then
        python="$here/../.venv/bin/python"
    else
        python=python
    fi
fi

if ! [[ "$gpus" =~ ^[1-9][0-9]*$ ]]; then
    echo "$program: GPUS must be a positive number, got '$gpus'" >&2
    exit 2
fi
visible="$("$python" -c 'import torch; print(torch.cuda.device_count())')"
if [ "$visible" -eq 0 ]; then
    if [ "$gpus" -ne 1 ]; then
        echo "$program: $gpus processes were asked for, but no GPU is visible; on the CPU use 1" >&2
        exit 2
    fi
    exec "$python" "$here/$program.py" "$@"
fi
if [ "$gpus" -gt "$visible" ]; then
    echo "$program: $gpus GPUS were asked for, but $visible are visible" >&2
    exit 2
fi
exec "$python" -m torch.distributed.run \
    --nnodes="${NNODES:-1}" --node_rank="${NODE_RANK:-0}" \
    --master_addr="${MASTER_ADDR:-127.0.0.1}" --master_port="${PORT:-29500}" \
    --nproc_per_node="$gpus" "$here/$program.py" "$@" --launcher pytorch
