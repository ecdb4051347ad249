#!/usr/bin/env bash
# A wheel in a new environment that has torch: smoke_test.sh WHEEL [PYTHON…], by default the python3 on the path.
#
# quantflow is installed beside the torch that is there, a model is quantized, saved and loaded, its int8 layers run on the
# native runtime, and a recipe runs from the command line. Prints how long the installation took.
set -euo pipefail
wheel="$(realpath "$1")"
shift
for python in "${@:-python3}"; do
    work="$(mktemp -d)"
    trap 'rm -rf "$work"' EXIT
    "$python" -m venv "$work/venv"
    "$work/venv/bin/pip" install --quiet --disable-pip-version-check "torch==${TORCH:-2.13.*}"
    before="$SECONDS"
    "$work/venv/bin/pip" install --quiet --disable-pip-version-check "$wheel"
    echo "$("$python" --version): the wheel and its dependencies beside torch were installed in $((SECONDS - before)) s"
    (cd "$work" && "$work/venv/bin/quantflow" --version && "$work/venv/bin/python" - << 'PROGRAM')
import torch
import quantflow as qf

module = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(288, 4))
batches = [torch.randn(4, 3, 8, 8) for _ in range(4)]
model = qf.quantize(module.eval(), batches, runtime="native")
model.save("artifact")
assert torch.equal(qf.load("artifact")(batches[0]), model(batches[0]))
print("torch", torch.__version__, "SQNR", round(model.results["accuracy"]["sqnr_db"], 1), "dB")
PROGRAM
    (cd "$work" && "$work/venv/bin/quantflow" recipe=template model=entry model.entry=torch.nn:Linear \
        "model.kwargs={in_features: 8, out_features: 4}" data=random "data.shape=[[8]]" output=run > run.log 2>&1) ||
        { cat "$work/run.log"; exit 1; }
    rm -rf "$work"
done
