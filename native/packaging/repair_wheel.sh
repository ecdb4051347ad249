#!/usr/bin/env bash
# Names the platforms that a built wheel runs on: repair_wheel.sh WHEEL FOLDER. Needs auditwheel and patchelf.
#
# Nothing is copied into the wheel: oneDNN and SYCL come with the extra `native`, and the library that links to them is
# loaded only where they are.
set -euo pipefail
auditwheel repair --exclude 'libdnnl.so.*' --exclude 'libsycl.so.*' --exclude 'libur_loader.so.*' --exclude 'libumf.so.*' \
    --exclude 'libimf.so*' --exclude 'libsvml.so*' --exclude 'libirng.so*' --exclude 'libintlc.so.*' \
    --exclude 'libtbb.so.*' --wheel-dir "$2" "$1"
