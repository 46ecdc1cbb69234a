#!/bin/sh
# Make the virtual environment $2 with the tools that open stores and exports (scanpy, JupySQL, marimo), at the pinned
# versions, for tests/tools. It stands on $1, where actstore is installed: what is there is not installed again.
set -eu
base=$1
venv=$2

"$base/bin/python" -m venv --clear "$venv"
echo '*' >"$venv/.gitignore"
packages=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
"$base/bin/python" -c 'import sys; [print(f"import site; site.addsitedir({path!r})") for path in sys.path if path.endswith("-packages")]' \
    >"$packages/base.pth"
grep -v '^torch==' constraints.txt >"$venv/constraints.txt"
cat constraints-tools.txt >>"$venv/constraints.txt"
"$venv/bin/pip" install --quiet --disable-pip-version-check -c "$venv/constraints.txt" scanpy jupysql marimo ipython
"$venv/bin/python" -c 'import actstore; from importlib.metadata import version; print(*(f"{name} {version(name)}" for name in ("scanpy", "jupysql", "marimo")))'
