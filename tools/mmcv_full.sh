#!/usr/bin/env bash
# Compile mmcv-full 1.7.2 for the torch of an environment, once, and install it there. Needed for operators other than
# NMS and RoIAlign: deformable convolutions and the like. Wheels are kept in $KW_TIMM_WHEELS (~/.cache/kw-timm/wheels).
# Usage: bash tools/mmcv_full.sh PYTHON            build if no wheel is kept, and install it
#        bash tools/mmcv_full.sh PYTHON --kept     succeed where a wheel is kept, and do nothing
# CXX is the compiler; CFLAGS, MAX_JOBS, FORCE_CUDA and TORCH_CUDA_ARCH_LIST are mmcv's and torch's own.
set -euo pipefail
python="${1:?usage: bash tools/mmcv_full.sh PYTHON [--kept]}"
version=1.7.2

tag="$("$python" - "$version" <<'END'
import os, re, sys, sysconfig
import torch
seen = torch.cuda.is_available()
kind = 'cpu'
if seen or os.environ.get('FORCE_CUDA') == '1':
    devices = range(torch.cuda.device_count()) if seen else []
    found = sorted({'%d%d' % torch.cuda.get_device_capability(device) for device in devices})
    kind = f"cu{torch.version.cuda}-sm{os.environ.get('TORCH_CUDA_ARCH_LIST') or '.'.join(found) or 'default'}"
python = f'cp{sys.version_info.major}{sys.version_info.minor}'
tag = f'mmcv-full-{sys.argv[1]}-torch{torch.__version__}-{python}-{sysconfig.get_platform()}-{kind}'
print(re.sub(r'[^A-Za-z0-9.+_-]+', '_', tag))
END
)"
folder="${KW_TIMM_WHEELS:-${XDG_CACHE_HOME:-$HOME/.cache}/kw-timm/wheels}/$tag"
kept() { ls "$folder"/mmcv_full-"$version"-*.whl 2>/dev/null | head -n 1; }
if [ "${2:-}" = --kept ]; then
    [ -n "$(kept)" ]
    exit
fi

if [ -z "$(kept)" ]; then
    compiler="$(command -v "${CXX:-c++}")" || {
        echo "mmcv_full: there is no C++ compiler '${CXX:-c++}'; install g++ 11 or newer, or name it in CXX" >&2
        exit 1
    }
    work="$(mktemp -d)"
    trap 'rm -rf "$work"' EXIT
    # mmcv asks for C++17, the headers of torch 2.14 need C++20; nvcc refuses to be told two.
    wrap() {
        {
            printf '#!/bin/sh\nfor word do shift; case "$word" in -std=*) ;; *) set -- "$@" "$word" ;; esac; done\n'
            printf 'exec "%s" "$@" -std=c++20\n' "$2"
        } > "$work/$1"
        chmod +x "$work/$1"
    }
    wrap kw-c++ "$compiler"
    if nvcc="$(command -v "${CUDA_HOME:-/usr/local/cuda}/bin/nvcc")"; then
        wrap kw-nvcc "$nvcc"
        export PYTORCH_NVCC=kw-nvcc
    fi
    "$python" -m pip install 'setuptools>=77,<81' wheel ninja psutil
    echo "mmcv_full: compiling mmcv-full $version, about 14 minutes of one core without CUDA; log: $folder.log"
    mkdir -p "$folder"
    [[ "$tag" = *-cpu ]] && export CFLAGS="${CFLAGS--g0 -O1}"  # half the time of mmcv's own flags
    PATH="$work:$(cd "$(dirname "$python")" && pwd):$PATH" CXX=kw-c++ MMCV_WITH_OPS=1 \
        "$python" -m pip wheel --no-cache-dir --no-deps --no-build-isolation --no-binary mmcv-full \
        -w "$work/out" "mmcv-full==$version" > "$folder.log" 2>&1 || {
        grep -m 5 -E 'error: |Killed|No space left' "$folder.log" >&2 || tail -n 20 "$folder.log" >&2
        echo "mmcv_full: the build failed; the whole log: $folder.log" >&2
        exit 1
    }
    cp "$work"/out/*.whl "$folder/part"
    mv "$folder/part" "$folder/$(basename "$work"/out/*.whl)"
fi
"$python" -m pip install --no-deps --force-reinstall "$(kept)"
"$python" -W ignore -c 'from mmcv import ops; print("mmcv_full: installed, compiled by", ops.get_compiler_version())'
