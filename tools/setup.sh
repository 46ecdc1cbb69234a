#!/bin/sh
# Make the virtual environment $1 and install actstore with its development tools into it, at the pinned versions.
# A torch that is already there (in the environment, or in the Python that makes it) is kept as it is.
set -eu
venv=$1
python=${PYTHON:-python3}

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "actstore needs Python >= 3.11; $python is $("$python" -V). Give another: make PYTHON=python3.12 demo" >&2
    exit 1
}
if [ ! -x "$venv/bin/python" ]; then
    site=
    if "$python" -c 'import torch' 2>/dev/null; then site=--system-site-packages; fi
    "$python" -m venv $site "$venv"
fi
pins=$venv/constraints.txt
if "$venv/bin/python" -c 'import torch' 2>/dev/null; then
    grep -v '^torch==' constraints.txt >"$pins"
else
    cp constraints.txt "$pins"
    "$venv/bin/pip" install --quiet --disable-pip-version-check torch -c "$pins"
fi
"$venv/bin/pip" install --quiet --disable-pip-version-check -e '.[dev]' -c "$pins"
