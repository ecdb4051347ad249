"""What onnxruntime makes of a file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from quantflow.errors import VerificationError, cause_line
from quantflow.exchange.onnx_writer import onnxruntime_package


def onnxruntime_outputs(path: Path, inputs: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    """The file's outputs on onnxruntime's CPU.

    Raises:
        UnavailableError: onnxruntime is not installed.
        VerificationError: it can't run the file.
    """
    runtime = onnxruntime_package()
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    try:
        session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        feed = {item.name: inputs[item.name].detach().cpu().numpy() for item in session.get_inputs()}
        return [torch.from_numpy(x) for x in session.run(None, feed)]
    except Exception as error:  # its errors have no common class but RuntimeError's and Exception's
        raise VerificationError(f"ONNX: onnxruntime can't run '{path}': {cause_line(error)}; report this") from error
