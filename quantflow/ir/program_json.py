"""program.json: a program written down, and read again from a file that nobody vouches for."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from quantflow.errors import ArtifactError
from quantflow.ir.activations import ACTIVATIONS, Epilogue
from quantflow.ir.calls import Arguments, Input, Limit
from quantflow.ir.ops import OPS
from quantflow.ir.program import Node, Program, Ref, TensorRef, Value
from quantflow.ir.program_rules import check
from quantflow.ir.structure import KINDS, Leaf, Typed, holds_types
from quantflow.numerics.affine import ACTIVATION_RANGE, QParams

#: 1: flat tensors in, fixed sizes but for the batch. 2: names of sizes, structures, limits.
FORMAT = 2
_DTYPES = {
    str(d).removeprefix("torch."): d
    for d in (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.uint8, torch.int16,
              torch.int32, torch.int64, torch.bool, torch.complex64)
}  # fmt: skip

_MEMORY_FORMATS = {
    str(f).removeprefix("torch."): f
    for f in (torch.contiguous_format, torch.channels_last, torch.channels_last_3d, torch.preserve_format)
}


def to_json(program: Program) -> dict[str, Any]:
    """Everything but the tensors."""
    data = {
        "format": _format(program),
        "batch_is_dynamic": program.batch_is_dynamic,
        "inputs": [
            {"name": i.name, "keyword": i.keyword, "dtype": i.dtype, "shape": list(i.shape)} for i in program.inputs
        ],
        "values": {name: _value_to_json(value) for name, value in program.values.items() if value.qparams is not None},
        "nodes": [_node_to_json(node) for node in program.nodes],
        "output": _encode(program.output),
    }
    if program.arguments is not None:
        data["arguments"] = _arguments_to_json(program.arguments)
    if program.limits:
        data["limits"] = [vars(limit) for limit in program.limits]
    return data


def _format(program: Program) -> int:
    """The oldest format that can hold it, so that older readers take what they can."""
    has_names = any(isinstance(size, str) for item in program.inputs for size in item.shape)
    return 2 if has_names or program.arguments is not None or program.limits or holds_types(program.output) else 1


def from_json(data: Any, tensors: Mapping[str, torch.Tensor], operators: Sequence[str] | None = ()) -> Program:
    """Rebuild and check a program. Nothing is executed, and nothing that the program names is imported.

    Args:
        operators: patterns of the operators that it may call besides ATen's ("my::*"); None: it is read, never run.

    Raises:
        ArtifactError: names the node and the field that is not legal.
    """
    try:
        found = data["format"]
        if type(found) is not int or found < 1:
            raise ArtifactError(f"program.json: format {found!r} is not known")
        if found > FORMAT:
            raise ArtifactError(f"program.json: format {found} is newer than this quantflow reads ({FORMAT})")
        program = Program(
            inputs=tuple(_input_from_json(i) for i in data["inputs"]),
            nodes=tuple(_node_from_json(node) for node in data["nodes"]),
            values={name: _value_from_json(value) for name, value in data["values"].items()},
            tensors=dict(tensors),
            output=_decode(data["output"]),
            batch_is_dynamic=bool(data["batch_is_dynamic"]),
            arguments=_arguments_from_json(data["arguments"]) if "arguments" in data else None,
            limits=tuple(Limit(str(e["expression"]), str(e["place"])) for e in data.get("limits", ())),
        )
        check(program, operators)
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError) as error:
        raise ArtifactError(f"program.json: {type(error).__name__} while reading it: {error}") from error
    return program


def _arguments_to_json(arguments: Arguments) -> dict[str, Any]:
    return {
        "parameters": {name: _encode(tree) for name, tree in arguments.parameters.items()},
        "names": list(arguments.names),
        "defaults": {name: _encode(value) for name, value in arguments.defaults.items()},
        "neutral": dict(arguments.neutral),
        "catches": arguments.catches,
    }


def _arguments_from_json(data: Any) -> Arguments:
    return Arguments(
        {str(name): _decode(tree) for name, tree in data["parameters"].items()},
        tuple(map(str, data["names"])),
        {str(name): _decode(value) for name, value in data["defaults"].items()},
        {str(name): float(value) for name, value in data["neutral"].items()},
        bool(data["catches"]),
    )


def _value_to_json(value: Value) -> dict[str, Any]:
    assert value.qparams is not None
    q = value.qparams
    return {"dtype": q.dtype, "scale": q.scale, "zero_point": q.zero_point, "is_nonnegative": value.is_nonnegative}


def _input_from_json(data: Any) -> Input:
    name, keyword, dtype, shape = str(data["name"]), data["keyword"], data["dtype"], tuple(data["shape"])
    if keyword is not None and not isinstance(keyword, str):
        raise ValueError(f"input {name!r}: keyword {keyword!r} is not a name")
    if not _is_name(name):
        raise ValueError(f"input {name!r} is called what is no name")
    if dtype not in _DTYPES:
        raise ValueError(f"input {name!r}: dtype {dtype!r} is not known")
    legal = (
        size is None or (_is_name(size) if isinstance(size, str) else type(size) is int and size >= 0) for size in shape
    )
    if not all(legal):
        raise ValueError(f"input {name!r}: shape {shape} is not made of sizes")
    return Input(name, keyword, dtype, shape)


def _is_name(text: str) -> bool:
    """Printable, so that a message shows it and a C string holds all of it."""
    return bool(text) and text.isprintable()


def _value_from_json(data: Any) -> Value:
    if data["dtype"] not in ACTIVATION_RANGE:
        raise ValueError(f"dtype {data['dtype']!r} is not int8 or uint8")
    if type(data["zero_point"]) is not int:
        raise ValueError(f"zero_point {data['zero_point']!r} is not an integer")
    qparams = QParams(data["dtype"], float(data["scale"]), data["zero_point"])
    if data["is_nonnegative"] and (qparams.dtype, qparams.zero_point) != ("int8", 0):
        raise ValueError("only a symmetric int8 value can be is_nonnegative")
    return Value(qparams, bool(data["is_nonnegative"]))


def _node_to_json(node: Node) -> dict[str, Any]:
    data: dict[str, Any] = {
        "name": node.name,
        "op": node.op,
        "output": node.output,
        "args": [_encode(a) for a in node.args],
    }
    if node.kwargs:
        data["kwargs"] = {k: _encode(v) for k, v in node.kwargs.items()}
    if node.target:
        data["target"] = node.target
    if node.epilogue is not None:
        data["epilogue"] = {"kind": node.epilogue.kind, "values": [_encode(v) for v in node.epilogue.values]}
    if node.attrs:
        data["attrs"] = dict(node.attrs)
    return data


def _node_from_json(data: Any) -> Node:
    if data["op"] not in tuple(OPS):  # which also takes what can't be looked up in a dict
        raise ValueError(f"node {data['name']!r}: op {data['op']!r} is not one of {', '.join(OPS)}")
    epilogue = None
    if (given := data.get("epilogue")) is not None:
        values = tuple(float(_decode(v)) for v in given["values"])
        activation = ACTIVATIONS.get(given["kind"])
        if activation is None or len(activation.numbers) != len(values):
            raise ValueError(
                f"node {data['name']!r}: epilogue {given['kind']!r} with {len(values)} numbers is not known"
            )
        if any(map(math.isnan, values)):
            raise ValueError(f"node {data['name']!r}: a number of its epilogue {given['kind']!r} is NaN")
        epilogue = Epilogue(given["kind"], values)
    if not _is_name(str(data["output"])):
        raise ValueError(f"node {data['name']!r}: its output {data['output']!r} is called what is no name")
    return Node(
        name=str(data["name"]),
        op=data["op"],
        output=str(data["output"]),
        args=tuple(_decode(a) for a in data["args"]),
        kwargs={str(k): _decode(v) for k, v in data.get("kwargs", {}).items()},
        target=str(data.get("target", "")),
        epilogue=epilogue,
        attrs=dict(data.get("attrs", {})),
    )


def _encode(value: Any) -> Any:
    if isinstance(value, Ref):
        return {"value": value.name}
    if isinstance(value, TensorRef):
        return {"tensor": value.name}
    if isinstance(value, Leaf):
        return {"input": value.index}
    if isinstance(value, Typed):
        held = [_encode(v) for v in value.values]
        return {"typed": {"type": value.type, "kind": value.kind, "fields": list(value.fields), "values": held}}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, torch.memory_format):
        return {"memory_format": str(value).removeprefix("torch.")}
    if isinstance(value, torch.layout):
        return {"layout": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": value.type}
    if isinstance(value, complex):
        raise ValueError("complex numbers can't be saved in a program")
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": repr(value)}
    if isinstance(value, dict):
        return {"dict": {k: _encode(v) for k, v in value.items()}}
    if isinstance(value, list):
        return [_encode(v) for v in value]
    if isinstance(value, tuple):
        return {"tuple": [_encode(v) for v in value]} if value else {"tuple": []}
    return value


def _decode(value: Any) -> Any:
    if isinstance(value, list):
        return [_decode(v) for v in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "value":
        return Ref(str(content))
    if kind == "tensor":
        return TensorRef(str(content))
    if kind == "input":
        return Leaf(int(content))
    if kind == "typed":
        return _typed(content)
    if kind == "dtype":
        return _DTYPES[content]
    if kind == "memory_format":
        return _MEMORY_FORMATS[content]
    if kind == "layout":
        return {"strided": torch.strided}[content]
    if kind == "device":
        return {"cpu": torch.device("cpu")}[content]
    if kind == "float":
        return {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}[content]
    if kind == "dict":
        return {str(k): _decode(v) for k, v in content.items()}
    if kind == "tuple":
        return tuple(_decode(v) for v in content)
    raise ValueError(f"{kind!r} is not a kind of argument")


def _typed(content: Any) -> Typed:
    fields, values = tuple(map(str, content["fields"])), tuple(_decode(v) for v in content["values"])
    if content["kind"] not in KINDS or len(fields) != len(values):
        raise ValueError(f"{content['type']!r} with {len(values)} values as {content['kind']!r} is no container")
    return Typed(str(content["type"]), content["kind"], fields, values)
