#!/usr/bin/env bash
# Make a virtual environment on top of another one: what is installed in it comes first, then the other's packages.
# Usage: bash tools/overlay.sh FOLDER BASE
# The other's pip, run there (FOLDER/bin/python -m pip), counts its packages as installed, and removes none of them.
set -euo pipefail
folder="$1" base="$2"
"$base/bin/python" -m venv --clear --without-pip "$folder"
packages='import sysconfig; print(sysconfig.get_path("purelib"))'
echo "import site; site.addsitedir('$("$base/bin/python" -c "$packages")')" \
    > "$("$folder/bin/python" -c "$packages")/base_environment.pth"
