"""The fused program as plain data for a picture: which kernel reads what from which."""

from __future__ import annotations

from typing import Any

from quantflow.ir.program import Node, Program


def fused_graph(program: Program) -> dict[str, Any]:
    """The `graph` section of the results. Arithmetic on sizes is left out.

    Returns:
        inputs: names of the model's inputs, numbers 0, 1, …;
        nodes: [{"name", "op", "precision", "reads"}] numbered from there on, in execution order. `op` is what one
            kernel computes ("conv_sum_relu"), `precision` is "int8", "float", or "between" for quantize and
            dequantize, `reads` are numbers of inputs and nodes;
        outputs: numbers of what the model returns.
    """
    number = {value.name: index for index, value in enumerate(program.inputs)}
    nodes = []
    for node in program.nodes:
        if node.op == "size":
            continue
        reads = list(dict.fromkeys(number[name] for name in node.refs() if name in number))
        number[node.output] = len(program.inputs) + len(nodes)
        nodes.append({"name": node.name, "op": _op(node), "precision": _precision(node), "reads": reads})
    outputs = [number[name] for name in dict.fromkeys(program.output_names()) if name in number]
    return {"inputs": [value.name for value in program.inputs], "nodes": nodes, "outputs": outputs}


def _op(node: Node) -> str:
    return node.target.partition(".")[0] if node.target else node.fused_name


def _precision(node: Node) -> str:
    if node.op == "aten":
        return "float"
    return "between" if node.op in ("quantize", "dequantize") else "int8"
