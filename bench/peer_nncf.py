"""NNCF's quantization of a traced model, each time it is asked for.

A part of `algorithm_time`, in a file of its own because it may run in another interpreter: it needs torch, numpy,
openvino and nncf, and nothing of quantflow.

    python peer_nncf.py FOLDER    reads FOLDER/model.pt and data.npz; answers each line on stdin with one JSON line
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from importlib.metadata import version
from pathlib import Path

import nncf
import numpy as np
import openvino
import torch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--transformer", action="store_true")
    options = parser.parse_args()
    with np.load(options.folder / "data.npz") as data:
        arrays = [data[name] for name in sorted(data.files)]
    samples = [tuple(a[i : i + 1] for a in arrays) for i in range(len(arrays[0]))]
    model = torch.jit.load(options.folder / "model.pt").eval()
    answers = sys.stdout
    for _ in sys.stdin:
        with contextlib.redirect_stdout(sys.stderr):
            started, all_cpu = time.perf_counter(), time.process_time()
            converted = openvino.convert_model(model, example_input=tuple(torch.from_numpy(a) for a in samples[0]))
            converted.reshape(dict(enumerate([-1, *a.shape[1:]] for a in samples[0])))
            between, cpu = time.perf_counter(), time.process_time()
            kind = nncf.ModelType.TRANSFORMER if options.transformer else None
            made = nncf.quantize(converted, nncf.Dataset(samples), model_type=kind, subset_size=len(samples))
            done, cpu_done = time.perf_counter(), time.process_time()
            openvino.compile_model(made, "CPU")
        found = {
            "convert_s": between - started,
            "quantize_s": done - between,
            "cpu_s": cpu_done - cpu,
            "compile_s": time.perf_counter() - done,
            "all_cpu_s": time.process_time() - all_cpu,
        }
        versions = {name: version(name) for name in ("nncf", "openvino", "torch")}
        print(json.dumps(found | {"versions": versions}), file=answers, flush=True)


if __name__ == "__main__":
    main()
