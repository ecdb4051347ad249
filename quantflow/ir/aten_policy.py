"""Which operators a program may call: functional ones, on tensors, that reach nothing outside the process.

A program made in this process may call whatever the model called. One read from a file, which nobody vouches for, is
held to the ops of the table (`op_table`), a few operators of a known library, and what the caller allows by name.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from fnmatch import fnmatchcase
from functools import cache
from typing import Any

import torch

from quantflow.errors import ArtifactError
from quantflow.ir.on_trust import guarded, trusts
from quantflow.ir.op_table import row_of

#: Functional ATen ops that still reach outside the process; whatever a caller allows.
_FORBIDDEN_ATEN = ("from_file", "_print", "_debug", "record_stream", "_nested", "cuda", "_cudnn", "_copy_from")
#: Operators of other libraries that compute with tensors and do nothing else. Naming one imports its library.
KNOWN_OPERATORS = frozenset(
    f"torchvision::{name}"
    for name in ("nms", "roi_align", "roi_pool", "ps_roi_align", "ps_roi_pool", "deform_conv2d")
)  # fmt: skip
_VIEWS = ("view.default", "_unsafe_view.default")
#: As `operators`: whatever is registered.
ANY_OPERATOR = ("*",)


def aten_op(target: str) -> Callable[..., Any]:
    """The functional operator of that name: "softmax.int" of ATen, "my::gelu.default" of any other library.

    Raises:
        ArtifactError: there is no such operator here, it writes to its arguments, or it reaches outside the process.
    """
    full_name, _, overload = target.partition(".")
    library, is_other, name = full_name.rpartition("::")
    shown = target if is_other else f"aten.{target}"
    if not name.isidentifier() or not overload.isidentifier() or (is_other and not library.isidentifier()):
        raise _not_allowed(target)
    if not is_other and name.startswith(_FORBIDDEN_ATEN):
        raise _not_allowed(target)
    op = _registered(library or "aten", name, overload)
    if op is None and full_name in KNOWN_OPERATORS:
        with suppress(ImportError, RuntimeError, OSError):  # what a library for another torch raises
            importlib.import_module(library)
            op = _registered(library, name, overload)
    if op is None and is_other:
        raise ArtifactError(
            f"program.json: this process has no operator {target}; import the module that registers {library}'s "
            "operators before the model is used"
        )
    if op is None:
        raise ArtifactError(f"program.json: this torch ({torch.__version__}) has no op {shown}")
    if op._schema.is_mutable:
        raise ArtifactError(f"program.json: {shown} writes to its arguments, which a program may not")
    if not _computes_with_tensors(op):
        raise _not_allowed(target)
    return guarded(name, op) if trusts(full_name) else op


def computing(target: str) -> Callable[..., Any]:
    """As `aten_op`, with a view as a reshape: a program's values have a shape, and no strides that a view could miss.

    Raises:
        ArtifactError: as `aten_op`.
    """
    op = aten_op(target)
    return _reshape if target in _VIEWS else op


def _reshape(self: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    return self.reshape(tuple(size))


def require_allowed(target: str, operators: Sequence[str]) -> None:
    """Refuse what a program from a file may not name.

    Args:
        operators: patterns of full names ("my::*") that the caller allows besides the table's and the known ones.

    Raises:
        ArtifactError: says how to allow it.
    """
    name = target.partition(".")[0]
    if row_of(target) is not None or name in KNOWN_OPERATORS:
        return
    full_name = name if "::" in name else f"aten::{name}"
    if any(fnmatchcase(full_name, pattern) for pattern in operators):
        return
    if "::" not in name:
        raise ArtifactError(
            f"program.json: aten.{target} is not among the ops that a program from a file may call. If you trust this "
            f'file and know what the op does, allow it: quantflow.load(directory, operators=["{full_name}"])'
        )
    raise ArtifactError(
        f"program.json: calls the operator {name}, which is not ATen's: loading an artifact runs no code that its "
        f'caller did not name. If you know what it does, allow it: quantflow.load(directory, operators=["{name}"]), '
        "or evaluate with model=entry model.entry=package.module:callable, code that registers it with torch.library"
    )


def _registered(library: str, name: str, overload: str) -> torch._ops.OpOverload | None:
    packet = getattr(getattr(torch.ops, library), name, None)
    op = getattr(packet, overload, None) if packet is not None else None
    return op if isinstance(op, torch._ops.OpOverload) else None


def _not_allowed(target: str) -> ArtifactError:
    what = "operator" if "::" in target else "ATen op"
    return ArtifactError(f"program.json: {target!r} is not an {what} that a program may use")


@cache
def _computes_with_tensors(op: torch._ops.OpOverload) -> bool:
    """Whether the op has a result, and a tensor in or out. TorchScript's own `aten::save` and the like have not."""
    schema = op._schema
    types = [str(value.type) for value in (*schema.arguments, *schema.returns)]
    return bool(schema.returns) and any("Tensor" in kind for kind in types)
