"""The `quantflow::` operators on cards, and a runner's program as a ScriptModule.

A ScriptModule begins with one call of the whole program, which records it (see `graphs`), and holds the fused ops
behind it, so that the file runs on any machine and `graph_for` shows what is fused. The first call imports Triton.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from quantflow.host.forks import lock
from quantflow.ir.activations import ACTIVATIONS, Epilogue
from quantflow.ir.aten_policy import ANY_OPERATOR, aten_op
from quantflow.ir.program import Node, Program, Ref
from quantflow.numerics.affine import QParams
from quantflow.runtimes import kernels
from quantflow.runtimes.runner import AbstractRunner
from quantflow.runtimes.torch import Call, Lowering, Stored, build_script
from quantflow.runtimes.triton import devices

_ATTRIBUTE = "_quantflow_triton"
#: Layers kept per weight, one for each way in which it is used.
_KEPT = 8
_lock = lock()
_library = torch.library.Library("quantflow", "FRAGMENT")
_KEYS = {"cuda": "CUDA", "xpu": "XPU"}


def _epilogue(kind: str, values: Sequence[float]) -> Epilogue | None:
    return Epilogue(kind, tuple(values)) if kind else None


def _out(scale: float, zero_point: int, dtype: str) -> QParams | None:
    return None if dtype == "float32" else QParams(dtype, scale, zero_point)


def _coding(x: Tensor, scale: float, zero_point: int) -> QParams:
    return QParams("uint8" if x.dtype is torch.uint8 else "int8", scale, zero_point)


def _layer(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, geometry: Any, finish: Any) -> Any:
    """The layer of these settled arguments, kept beside its weight."""
    from quantflow.runtimes.triton.cards import card_of
    from quantflow.runtimes.triton.layers import Geometry, Layer

    key = (str(x.device), geometry, finish)
    found = weight.__dict__.setdefault(_ATTRIBUTE, {})
    if key not in found:
        with _lock:
            while len(found) >= _KEPT:
                found.pop(next(iter(found)))
            shape = None if geometry is None else Geometry(*geometry)
            found[key] = Layer(weight, weight_scale, bias, shape, finish, card_of(str(x.device)))
    return found[key]


def _finish(
    x: Tensor, x_scale: float, x_zero_point: int, out: QParams | None, epilogue: Epilogue | None,
    residual: Tensor | None, residual_scale: float, residual_zero_point: int,
) -> Any:  # fmt: skip
    from quantflow.runtimes.triton.layers import Finish

    is_float = residual is not None and residual.is_floating_point()
    coded = None if residual is None or is_float else _coding(residual, residual_scale, residual_zero_point)
    return Finish(_coding(x, x_scale, x_zero_point), out, coded, is_float, epilogue)


def conv(
    x: Tensor, x_scale: float, x_zero_point: int, _is_nonnegative: bool, weight: Tensor, weight_scale: Tensor,
    bias: Tensor | None, stride: list[int], padding: list[int], dilation: list[int], groups: int, out_scale: float,
    out_zero_point: int, out_dtype: str, epilogue: str, values: list[float], residual: Tensor | None = None,
    residual_scale: float = 1.0, residual_zero_point: int = 0, _may_overwrite: bool = False,
) -> Tensor:  # fmt: skip
    """Convolution over codes, as `quantflow.runtimes.kernels.conv`."""
    finish = _finish(
        x, x_scale, x_zero_point, _out(out_scale, out_zero_point, out_dtype), _epilogue(epilogue, values), residual,
        residual_scale, residual_zero_point,
    )  # fmt: skip
    geometry = (tuple(stride), tuple(padding), tuple(dilation), groups)
    result: Tensor = _layer(x, weight, weight_scale, bias, geometry, finish)(x, residual)
    return result


def linear(
    x: Tensor, x_scale: float, x_zero_point: int, _is_nonnegative: bool, weight: Tensor, weight_scale: Tensor,
    bias: Tensor | None, out_scale: float, out_zero_point: int, out_dtype: str, epilogue: str, values: list[float],
    residual: Tensor | None = None, residual_scale: float = 1.0, residual_zero_point: int = 0,
    _may_overwrite: bool = False,
) -> Tensor:  # fmt: skip
    """Linear over codes, as `quantflow.runtimes.kernels.linear`."""
    finish = _finish(
        x, x_scale, x_zero_point, _out(out_scale, out_zero_point, out_dtype), _epilogue(epilogue, values), residual,
        residual_scale, residual_zero_point,
    )  # fmt: skip
    result: Tensor = _layer(x, weight, weight_scale, bias, None, finish)(x, residual)
    return result


def _pair(is_product: bool) -> Callable[..., Tensor]:
    def run(
        a: Tensor, a_scale: float, a_zero_point: int, b: Tensor, b_scale: float, b_zero_point: int, out_scale: float,
        out_zero_point: int, out_dtype: str, epilogue: str, values: list[float],
    ) -> Tensor:  # fmt: skip
        from quantflow.runtimes.triton import operators

        return operators.pair(
            a, _coding(a, a_scale, a_zero_point), b, _coding(b, b_scale, b_zero_point),
            _out(out_scale, out_zero_point, out_dtype), _epilogue(epilogue, values), is_product=is_product,
        )  # fmt: skip

    return run


def matmul(
    a: Tensor, a_scale: float, a_zero_point: int, b: Tensor, b_scale: float, b_zero_point: int,
    out_scale: float, out_zero_point: int, out_dtype: str,
) -> Tensor:  # fmt: skip
    """Batched product of two activations."""
    from quantflow.runtimes.triton import operators

    return operators.matmul(
        a, _coding(a, a_scale, a_zero_point), b, _coding(b, b_scale, b_zero_point),
        _out(out_scale, out_zero_point, out_dtype),
    )  # fmt: skip


def quantize(x: Tensor, scale: float, zero_point: int, dtype: str) -> Tensor:
    """Codes of real numbers; of images and volumes channels-last."""
    from quantflow.runtimes.triton import operators

    return operators.quantize(x, QParams(dtype, scale, zero_point), True if x.dim() == 4 else None)


def dequantize(x: Tensor, scale: float, zero_point: int) -> Tensor:
    """What codes stand for."""
    from quantflow.runtimes.triton import operators

    return operators.dequantize(x, _coding(x, scale, zero_point))


def max_pool(
    x: Tensor, kernel: list[int], stride: list[int], padding: list[int], dilation: list[int], ceil_mode: bool
) -> Tensor:
    """Max pooling of codes."""
    from quantflow.runtimes.triton.operators import Pool

    given = {
        "kernel_size": kernel, "stride": stride, "padding": padding, "dilation": dilation, "ceil_mode": ceil_mode
    }  # fmt: skip
    return _pool(f"max_pool{len(kernel)}d", x.dtype, Pool)(x, given)


@cache
def _pool(target: str, dtype: torch.dtype, made: Callable[..., Any]) -> Any:
    return made(target, QParams("uint8" if dtype is torch.uint8 else "int8", 1.0, 0), None)


# -- whole programs


def _runs(device: str) -> Callable[[Tensor], bool]:
    return lambda _: devices.missing(device) is None


def _whole(inputs: list[Tensor], program: str, names: list[str], tensors: list[Tensor]) -> list[Tensor]:
    place = tensors[0].device
    runner = tensors[0].__dict__.get(_ATTRIBUTE)
    if runner is None:
        with _lock:
            runner = tensors[0].__dict__.get(_ATTRIBUTE)
            if runner is None:
                # The ScriptModule that calls this may itself call any operator.
                held = dict(zip(names, tensors, strict=True))
                written = json.loads(program)
                parsed = Program.from_json(written, held, operators=ANY_OPERATOR)
                floats = str(written.get("floats", "float32"))
                runner = tensors[0].__dict__[_ATTRIBUTE] = _listing(parsed, str(place), floats)
    return [x if isinstance(x, Tensor) else torch.tensor(x) for x in runner(inputs)]


def _listing(program: Program, device: str, floats: str) -> AbstractRunner:
    """A runner that gives the values the program returns, each once."""
    listed = replace(program, output=[Ref(name) for name in dict.fromkeys(program.output_names())])
    return devices.build(listed, device, floats)


class _Plain(Lowering):
    """Codes stored as the program defines them, and nothing made on another device than the module's."""

    def __init__(self, program: Program) -> None:
        super().__init__(program)
        coded = ((name, value.qparams) for name, value in program.values.items())
        self.stored = {name: Stored(q.dtype, q.scale, q.zero_point, False) for name, q in coded if q is not None}

    def calls(self, index: int) -> list[Call]:
        """The calls that compute one node."""
        return [self._placed(call, self.program.nodes[index]) for call in super().calls(index)]

    def _placed(self, call: Call, node: Node) -> Call:
        if not call.op.startswith("aten.") or node.op == "shape":
            return call
        schema = aten_op(node.target)._schema.arguments  # type: ignore[attr-defined]
        has_tensors = any("Tensor" in str(argument.type) for argument in schema)
        if has_tensors or not any(argument.name == "device" for argument in schema):
            return call
        return replace(call, kwargs={**call.kwargs, "device": torch.device("cpu")})


def as_script(runner: AbstractRunner) -> torch.jit.ScriptModule:
    """A runner's program as a ScriptModule on its card.

    Inputs on the CPU are moved to where the module is, and what comes of them is moved back. On a card floats are held
    as the runner holds them.
    """
    from quantflow.runtimes.triton.runner import TritonRunner

    assert isinstance(runner, TritonRunner)
    program, device = runner.program, runner.card.device
    placed = replace(program, tensors={name: tensor.to(device) for name, tensor in program.tensors.items()})
    floats = str(runner.held).removeprefix("torch.")
    return build_script(placed, _Plain(placed), calls_native=True, moves=True, floats=floats)


def _register() -> None:
    for key in _KEYS.values():
        for kind in ("", *ACTIVATIONS):
            suffix = f"_{kind}" if kind else ""
            for name, function in (("conv", conv), ("linear", linear)):
                _library.impl(f"{name}{suffix}", function, key)
                _library.impl(f"{name}_sum{suffix}", function, key)
            _library.impl(f"add{suffix}", _pair(False), key)
            _library.impl(f"mul{suffix}", _pair(True), key)
        for name, function in (
            ("matmul", matmul), ("quantize", quantize), ("dequantize", dequantize), ("max_pool", max_pool),
            # These are PyTorch's ops, on whatever device.
            ("requantize", kernels.requantize), ("recurrence", kernels.recurrence), ("clamp", kernels.clamp),
            ("flip", kernels.flip), ("native", _whole),
        ):  # fmt: skip
            _library.impl(name, function, key)
    for device, key in _KEYS.items():
        _library.impl("native_runs", _runs(device), key)


_register()
