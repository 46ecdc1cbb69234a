#!/bin/sh
# Make the virtual environment $2 with sae-lens and transformer-lens, at the pinned versions, for tests/parity.
# It stands on $1, where actstore is installed: what is there (torch, transformers, pytest) is not installed again.
set -eu
base=$1
venv=$2

"$base/bin/python" -m venv --clear "$venv"
echo '*' >"$venv/.gitignore"
packages=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
"$base/bin/python" -c 'import sys; [print(f"import site; site.addsitedir({path!r})") for path in sys.path if path.endswith("-packages")]' \
    >"$packages/base.pth"
grep -v '^torch==' constraints.txt >"$venv/constraints.txt"
cat constraints-saelens.txt >>"$venv/constraints.txt"
"$venv/bin/pip" install --quiet --disable-pip-version-check -c "$venv/constraints.txt" sae-lens
"$venv/bin/python" -c 'import actstore, torch; from importlib.metadata import version; print("sae-lens", version("sae-lens"), "over torch", torch.__version__)'
