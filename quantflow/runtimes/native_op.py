"""`quantflow::native`: a whole program on the native runtime as one operator, for ScriptModules.

A ScriptModule of mode=torchscript holds the fused `quantflow::` ops and, in front of them, one call of this operator,
taken where the native runtime can run. So the file runs everywhere, and `graph_for` shows what is fused.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from functools import cache

import torch

from quantflow.host.forks import lock
from quantflow.ir.aten_policy import ANY_OPERATOR
from quantflow.ir.program import Program
from quantflow.runtimes import native_devices
from quantflow.runtimes.native import NativeRunner
from quantflow.runtimes.ordinary import below_autograd, ordinary
from quantflow.runtimes.runner import AbstractRunner
from quantflow.runtimes.torch import build_script

_ATTRIBUTE = "_quantflow_native"
_lock = lock()
_library = torch.library.Library("quantflow", "FRAGMENT")


def adopt(tensors: Sequence[torch.Tensor], runner: NativeRunner) -> None:
    """Let the operator use this runner for the program whose tensors these are."""
    tensors[0].__dict__[_ATTRIBUTE] = runner


def as_script(runner: AbstractRunner) -> torch.jit.ScriptModule:
    """A native runner's program as a ScriptModule, which runs natively where that is possible.

    Elsewhere it runs by the same fused ops of PyTorch, so that the file runs on any machine.
    """
    assert isinstance(runner, NativeRunner)
    program = runner.program
    script = build_script(program, calls_native=True)
    adopt([program.tensors[name] for name in sorted(program.tensors)], runner)
    return script


@cache
def _reason() -> str | None:
    reason = native_devices.missing("cpu")
    if reason is not None:
        warnings.warn(
            f"quantflow: this ScriptModule runs on PyTorch's int8 kernels, not on the native runtime: {reason}",
            RuntimeWarning,
            stacklevel=2,
        )
    return reason


def _native_runs(_x: torch.Tensor) -> bool:
    return _reason() is None


def _native(
    inputs: list[torch.Tensor], program: str, names: list[str], tensors: list[torch.Tensor]
) -> list[torch.Tensor]:
    runner = tensors[0].__dict__.get(_ATTRIBUTE)
    if runner is None:
        with _lock:
            runner = tensors[0].__dict__.get(_ATTRIBUTE)
            if runner is None:
                # The ScriptModule that calls this may itself call any operator.
                parsed = Program.from_json(
                    json.loads(program), dict(zip(names, tensors, strict=True)), operators=ANY_OPERATOR
                )
                adopt(tensors, runner := NativeRunner(parsed))
    return runner.outputs(inputs)


def _native_with_grad(
    inputs: list[torch.Tensor], program: str, names: list[str], tensors: list[torch.Tensor]
) -> list[torch.Tensor]:
    """In a ScriptModule that is called outside of no_grad: the same, and backward through it is refused."""
    with below_autograd():
        outputs: list[torch.Tensor] = torch.ops.quantflow.native(inputs, program, names, tensors)
    return [ordinary(y, inputs) for y in outputs]


for _name, _schema, _function in (
    ("native_runs", "Tensor x) -> bool", _native_runs),
    ("native", "Tensor[] inputs, str program, str[] names, Tensor[] tensors) -> Tensor[]", _native),
):
    _library.define(f"{_name}({_schema}")
    _library.impl(_name, _function, "CPU")
_library.impl("native", _native_with_grad, "Autograd")
