#!/usr/bin/env bash
# Shared by dist_train.sh and dist_test.sh: `kw-mmdet COMMAND ...` with the environment that `make setup` made, unless
# another one is active or named by $PYTHON.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
python="${PYTHON:-}"
if [ -z "$python" ]; then
    if [ -z "${VIRTUAL_ENV:-}" ] && [ -x "$here/../.venv/bin/python" ]; then
        python="$here/../.venv/bin/python"
    else
        python=python
    fi
fi
exec "$python" -m kw_mmdet "$@"
