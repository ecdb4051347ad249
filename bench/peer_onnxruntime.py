"""ONNX Runtime's static int8 quantization of a traced model: uint8 activations, per-channel int8 weights, QDQ.

A part of `lite0_accuracy`, in a file of its own because it may run in another interpreter: it needs torch, numpy, onnx
and onnxruntime, and nothing of quantflow.

    python peer_onnxruntime.py FOLDER    reads FOLDER/model.pt and data.npz, writes outputs.npz
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

METHODS = ("MinMax", "Percentile", "Entropy")
#: Samples per call when evaluating.
BATCH = 50


class Reader(CalibrationDataReader):  # type: ignore[misc]
    """The calibration samples one by one."""

    def __init__(self, samples: np.ndarray) -> None:
        self._samples: Iterator[np.ndarray] = iter(samples)

    def get_next(self) -> dict[str, np.ndarray] | None:
        sample = next(self._samples, None)
        return None if sample is None else {"x": sample[None]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--methods", nargs="+", default=METHODS[:1], choices=METHODS)
    options = parser.parse_args()
    folder = options.folder
    print(", ".join(f"{name} {version(name)}" for name in ("onnxruntime", "onnx", "torch")))
    with np.load(folder / "data.npz") as data:
        calibration, evaluation = data["calibration"], data["evaluation"]
    model = torch.jit.load(folder / "model.pt").eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter that takes a traced model is the deprecated one
        torch.onnx.export(
            model,
            (torch.from_numpy(calibration[:2]),),
            str(folder / "model.onnx"),
            dynamo=False,
            input_names=["x"],
            dynamic_axes={"x": {0: "n"}},
            opset_version=17,
        )
    quant_pre_process(str(folder / "model.onnx"), str(folder / "prepared.onnx"))
    outputs = {}
    for method in options.methods:
        quantize_static(
            str(folder / "prepared.onnx"),
            str(folder / "int8.onnx"),
            Reader(calibration),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod[method],
        )
        session = onnxruntime.InferenceSession(str(folder / "int8.onnx"), providers=["CPUExecutionProvider"])
        batches = np.split(evaluation, range(BATCH, len(evaluation), BATCH))
        name = f"ONNX Runtime {version('onnxruntime')} uint8 {method}"
        outputs[name] = np.concatenate([session.run(None, {"x": batch})[0] for batch in batches])
    np.savez(folder / "outputs.npz", **outputs)


if __name__ == "__main__":
    main()
