"""What onnxruntime makes of a file: every layer's codes from the same operands, and the results of the whole."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from quantflow.errors import VerificationError, cause_line
from quantflow.exchange.onnx_writer import Writer, onnx_package, onnxruntime_package
from quantflow.ir.ops import COMPUTING_OPS
from quantflow.runtimes.specification import run_node


def onnxruntime_outputs(path: Path, inputs: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    """The file's outputs on onnxruntime's CPU.

    Raises:
        UnavailableError: onnxruntime is not installed.
        VerificationError: it can't run the file.
    """
    names, found = _run(path, str(path), inputs, optimized=True)
    return [found[name] for name in names]


def differing_codes(path: Path, w: Writer, inputs: Mapping[str, torch.Tensor]) -> tuple[int, int]:
    """(codes that differ from the reference's, codes in all) of every layer, each from the operands that the file gave.

    The file's nodes are computed one by one, as they stand: a result of the whole can't tell a layer that is wrong from
    one-code differences that add up.

    Raises:
        VerificationError: codes differ by more than one; names the layer.
    """
    onnx, program = onnx_package(), w.program
    coded = {
        node.output: f"{node.output}.codes"
        for node in program.nodes
        if node.op in ("quantize", *COMPUTING_OPS) and w.qparams(node.output) is not None
    }
    held = {name for node in program.nodes if node.output in coded for name in node.refs()}
    wanted = {name: coded.get(name) or _tensor_of(w, name) for name in {*held, *coded}}
    model = onnx.load(str(path))
    known = {item.name for item in (*model.graph.input, *model.graph.output)}
    model.graph.output.extend(
        onnx.helper.make_empty_tensor_value_info(name) for name in sorted({*wanted.values()} - known)
    )
    found = _run(path, model.SerializeToString(), inputs, optimized=False)[1] | dict(inputs)
    values: dict[str, torch.Tensor] = {name: found[tensor] for name, tensor in wanted.items()}
    differ = total = 0
    for node in program.nodes:
        if node.output not in coded:
            continue
        ours, theirs = run_node(program, node, values), values[node.output]
        steps = (ours.to(torch.int32) - theirs.to(torch.int32)).abs()
        if steps.numel() and int(steps.max()) > 1:
            raise VerificationError(
                f"ONNX: layer '{node.name}' ({node.fused_name}) differs from the reference by {int(steps.max())} codes "
                f"on the same operands, where 1 is legal; '{path}' must not be used: report this"
            )
        differ, total = differ + int(steps.count_nonzero()), total + steps.numel()
    return differ, total


def _tensor_of(w: Writer, name: str) -> str:
    """The file's tensor that holds a value: its codes, where it is coded."""
    q = w.qparams(name)
    return f"{name}.codes" if q is not None else str(w.names[name])


def _run(
    path: Path, model: str | bytes, inputs: Mapping[str, torch.Tensor], *, optimized: bool
) -> tuple[list[str], dict[str, Any]]:
    """Names of the outputs in order, and each."""
    runtime = onnxruntime_package()
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    if not optimized:
        options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        session = runtime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        names = [item.name for item in session.get_outputs()]
        feed = {item.name: inputs[item.name].detach().cpu().numpy() for item in session.get_inputs()}
        return names, dict(zip(names, map(torch.from_numpy, session.run(names, feed)), strict=True))
    except Exception as error:  # its errors have no common class but RuntimeError's and Exception's
        raise VerificationError(f"ONNX: onnxruntime can't run '{path}': {cause_line(error)}; report this") from error
