"""Which ATen ops a program may call: functional ones, on tensors, that reach nothing outside the process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from quantflow.errors import ArtifactError

#: Functional ATen ops that still reach outside the process.
_FORBIDDEN_ATEN = ("from_file", "_print", "_debug", "record_stream", "_nested", "cuda", "_cudnn", "_copy_from")


def aten_op(target: str) -> Callable[..., Any]:
    """The functional ATen overload of that name.

    Raises:
        ArtifactError: there is no such op, it writes to its arguments, or it reaches outside the process.
    """
    name, _, overload = target.partition(".")
    if not name.isidentifier() or not overload.isidentifier() or name.startswith(_FORBIDDEN_ATEN):
        raise ArtifactError(f"program.json: {target!r} is not an ATen op that a program may use")
    packet = getattr(torch.ops.aten, name, None)
    op = getattr(packet, overload, None) if packet is not None else None
    if not isinstance(op, torch._ops.OpOverload):
        raise ArtifactError(f"program.json: this torch ({torch.__version__}) has no op aten.{target}")
    if op._schema.is_mutable:
        raise ArtifactError(f"program.json: aten.{target} writes to its arguments, which a program may not")
    if not _computes_with_tensors(op._schema):
        raise ArtifactError(f"program.json: aten.{target} is not an ATen op that a program may use")
    return op


def _computes_with_tensors(schema: torch._C.FunctionSchema) -> bool:
    """Whether the op has a result, and a tensor in or out. TorchScript's own `aten::save` and the like have not."""
    types = [str(value.type) for value in (*schema.arguments, *schema.returns)]
    return bool(schema.returns) and any("Tensor" in kind for kind in types)
