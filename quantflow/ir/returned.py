"""What the ScriptModule of a program returns: TorchScript can't express every structure."""

from __future__ import annotations

from typing import Any

from quantflow.ir.program import Program, Ref, TensorRef, substitute
from quantflow.ir.structure import Typed, leaves_of


def returned(program: Program) -> Any:
    """The output as TorchScript can express it: as nested, or a tuple of the tensors and sizes in it.

    A tuple where it holds types of their own, or dicts of anything but tensors.
    """
    return program.output if _is_expressible(program.output) else tuple(_references(program.output))


def rebuilt(program: Program, output: Any) -> Any:
    """The output's own structure, from what the ScriptModule returns."""
    if _is_expressible(program.output):
        return output
    parts = iter(output)
    return substitute(program.output, lambda _: next(parts))


def _references(output: Any) -> list[Ref | TensorRef]:
    return [leaf for leaf in leaves_of(output) if isinstance(leaf, (Ref, TensorRef))]


def _is_expressible(output: Any) -> bool:
    if isinstance(output, dict):
        return bool(output) and all(isinstance(value, (Ref, TensorRef)) for value in output.values())
    if isinstance(output, (list, tuple)):
        return bool(output) and all(_is_expressible(value) for value in output)
    return not isinstance(output, Typed)
