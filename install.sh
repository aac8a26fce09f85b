#!/usr/bin/env bash
# Makes the virtual environment of `make demo` and `make test`: $VENV from $PYTHON, versions from
# requirements.lock, whatever index pip is configured for. Says in a line what the machine lacks.
set -euo pipefail
cd "$(dirname "$0")"
: "${PYTHON:=python3}" "${VENV:=.venv}"

command -v git >/dev/null || { echo "git is missing: install it (Debian: apt-get install git)"; exit 2; }
command -v "$PYTHON" >/dev/null || { echo "$PYTHON is missing: Python 3.11 or newer is needed"; exit 2; }
"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "$("$PYTHON" --version) is too old: Python 3.11 or newer is needed (make PYTHON=python3.12 ...)"
    exit 2
}
"$PYTHON" -c 'import ensurepip, venv' 2>/dev/null || {
    echo "$PYTHON cannot make virtual environments (Debian: apt-get install python3-venv)"
    exit 2
}
command -v c++ >/dev/null || echo "note: no C++ compiler (c++): on a CPU, training runs uncompiled, some 1.5 times slower"

[ -x "$VENV/bin/python" ] || "$PYTHON" -m venv "$VENV"
pip() { "$VENV/bin/python" -m pip --disable-pip-version-check --quiet "$@"; }

torch=$(sed -n 's/^torch==//p' requirements.lock)
if "$VENV/bin/python" -c "import torch, sys; sys.exit(torch.__version__.split('+')[0] != '$torch')" 2>/dev/null; then
    :
elif command -v nvidia-smi >/dev/null && nvidia-smi >/dev/null 2>&1; then
    echo "installing torch $torch for this machine's NVIDIA GPU (several GB) ..."
    pip install "torch==$torch"
elif pip install "torch==$torch+cpu" 2>/dev/null; then
    echo "installed torch $torch, CPU build"
else
    echo "the package index offers no CPU build of torch $torch: installing its own (several GB) ..."
    pip install "torch==$torch"
fi
echo "installing the other packages ..."
pip install --constraint requirements.lock --editable ".[trainer,dev]"
