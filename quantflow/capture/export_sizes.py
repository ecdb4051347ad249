"""The sizes of an exported program: which vary, under what names, and what its code asks of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from quantflow.capture.place import line_of
from quantflow.capture.sizes import Sizes, default_name
from quantflow.errors import CaptureError, cause_line
from quantflow.ir.calls import BATCH, Input, Limit
from quantflow.ir.graph import Graph

#: torch.export takes no symbol for 0 or 1: guards that only exclude these say nothing about larger sizes.
_LEAST = 2
#: A guard that holds for all sizes below is none.
_SEEN = 400
_TORCH = str(Path(torch.__file__).parent)


class SizeNotFree(CaptureError):
    """A size that should vary came out fixed, or torch.export can't solve what the code asks of it."""


def described_input(
    node: fx.Node,
    value: torch.Tensor,
    index: int,
    keyword: str | None,
    before: Sequence[Input],
    sizes: Sizes,
    placeholders: Sequence[fx.Node],
) -> Input:
    """The input of a placeholder; dimensions that share a symbol share a name."""
    dtype = str(value.dtype).removeprefix("torch.")
    batch = _batch_symbol(placeholders)
    known = _known(before, placeholders)
    shape: list[int | str | None] = []
    for dim, size in enumerate(value.shape):
        expression = _expression(size)
        if expression is None:
            shape.append(int(size))
        elif expression == batch:
            shape.append(None if dim == 0 else BATCH)
        elif expression in known:
            shape.append(known[expression])
        else:
            name = sizes.names.get((index, dim), "") or default_name(value, dim, known.values())
            known[expression] = name
            shape.append(name)
    return Input(node.name, keyword, dtype, tuple(shape))


def _batch_symbol(placeholders: Sequence[fx.Node]) -> Any:
    """The symbol that counts samples: that of the first dimension of the first input that has one there."""
    for node in placeholders:
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and value.dim():
            expression = _expression(value.shape[0])
            if expression is not None and expression.is_Symbol:
                return expression
    return None


def _known(inputs: Sequence[Input], placeholders: Sequence[fx.Node]) -> dict[Any, str]:
    """Expression → name, of the sizes of these inputs."""
    known: dict[Any, str] = {}
    for item, node in zip(inputs, placeholders, strict=False):
        for name, size in zip(item.shape, node.meta["val"].shape, strict=True):
            expression = _expression(size)
            if isinstance(name, str) and expression is not None:
                known.setdefault(expression, name)
    return known


def _expression(size: Any) -> Any:
    if not isinstance(size, torch.SymInt):
        return None
    expression = size.node.expr
    return None if expression.is_number else expression


def limits_of(program: torch.export.ExportedProgram) -> Callable[[Graph], tuple[Limit, ...]]:
    """What the exported code asks of its sizes, once the graph's inputs have names for them.

    Guards that only exclude sizes 0 and 1 are left out, as are those on strides: every op takes both.
    """
    import sympy  # half a second, which only a capture has to spend

    lifted = {spec.arg.name for spec in program.graph_signature.input_specs if spec.kind.name != "USER_INPUT"}
    nodes = [n for n in program.graph.nodes if n.op == "placeholder" and n.name not in lifted]
    values = [n.meta["val"] for n in nodes if isinstance(n.meta.get("val"), torch.Tensor)]
    environment = next((s.node.shape_env for x in values for s in x.shape if isinstance(s, torch.SymInt)), None)
    guards = [] if environment is None else [(guard.expr, str(guard.sloc)) for guard in environment.guards]
    ranges = dict(program.range_constraints)

    def limits(graph: Graph) -> tuple[Limit, ...]:
        names: dict[Any, str] = {}
        derived: list[tuple[Any, str]] = []
        for item, value in zip(graph.inputs, values, strict=True):
            for name, size in zip(item.shape, value.shape, strict=True):
                expression, called = _expression(size), BATCH if name is None else name
                if expression is not None and not isinstance(called, int):
                    if expression.is_Symbol:
                        names.setdefault(expression, called)
                    elif all(called != other for _, other in derived):
                        derived.append((expression, called))
        found = [_limit(sympy.Eq(sympy.Symbol(called), e, evaluate=False), names, "") for e, called in derived]
        found += [_limit(guard, names, _place(place)) for guard, place in guards if not _is_trivial(guard)]
        found += [
            Limit(f"{names[symbol]} <= {int(known.upper)}")
            for symbol, known in ranges.items()
            if symbol in names and known.upper.is_number and known.upper < 2**31
        ]
        return tuple({limit.expression: limit for limit in reversed(found) if limit is not None}.values())[::-1]

    return limits


def _is_trivial(guard: Any) -> bool:
    """Whether it says nothing about sizes of at least two."""
    import sympy  # half a second, which only a capture has to spend

    if isinstance(guard, (sympy.Ne, sympy.Ge, sympy.Gt)) and guard.args[1].is_number and guard.args[1] <= 1:
        return True
    if isinstance(guard, (sympy.Ne, sympy.Le, sympy.Lt)) and guard.args[0].is_number and guard.args[0] <= 1:
        return True
    symbols = list(guard.free_symbols)
    if len(symbols) == 1 and isinstance(guard, sympy.Rel):
        try:
            return all(bool(guard.xreplace({symbols[0]: sympy.Integer(n)})) for n in range(_LEAST, _SEEN))
        except (TypeError, ZeroDivisionError):
            return False
    return isinstance(guard, sympy.Eq) and all(side.is_Symbol for side in guard.args)


def _limit(guard: Any, names: Mapping[Any, str], place: str) -> Limit | None:
    """The guard over names; None where it speaks of sizes that no input has, or says what can't be written down."""
    import sympy  # half a second, which only a capture has to spend
    from torch.utils._sympy.printers import PythonPrinter

    symbols = {symbol: sympy.Symbol(names.get(symbol, str(symbol)), integer=True) for symbol in guard.free_symbols}
    if any(symbol not in names and str(symbol) not in names.values() for symbol in symbols):
        return None
    try:
        limit = Limit(PythonPrinter().doprint(guard.xreplace(symbols)), place)
        limit.holds(dict.fromkeys(limit.names, _LEAST))
    except (ValueError, LookupError, TypeError):
        return None
    return limit


def _place(location: str) -> str:
    """The line of the user's code in torch's words for it; "" for a line of torch itself."""
    inner = location.strip("()")
    file = inner.partition(":")[0]
    is_torch = file.startswith("_") or "torch/" in file or (Path(_TORCH) / file).exists()
    return "" if is_torch or ":" not in inner else inner[file.rfind("/") + 1 :]


def require_dynamic(
    program: torch.export.ExportedProgram, graph: Graph, sizes: Sizes, model: nn.Module | torch.export.ExportedProgram
) -> None:
    """
    Raises:
        SizeNotFree: a size that varies in the data came out fixed; names the input, the dimension and the line.
    """
    for at, dim in sizes.names:
        item = graph.inputs[at]
        size = item.shape[dim]
        if not isinstance(size, int):
            continue
        raise SizeNotFree(
            f"mode: the model fixes dimension {dim} of input '{item.keyword or item.name}' to {size}"
            f"{_why_fixed(program, sizes, model, size)}; give it batches of that size (cut or pad them), let the code "
            "read the size from x.shape, or say dynamic=none"
        )


def _why_fixed(program: torch.export.ExportedProgram, sizes: Sizes, model: Any, size: int) -> str:
    import sympy  # half a second, which only a capture has to spend

    run = model.module() if isinstance(model, torch.export.ExportedProgram) else model
    for batch in sizes.others:
        try:
            with torch.no_grad():
                run(*batch.args, **batch.kwargs)
        except Exception as error:  # noqa: BLE001 the user's code may raise anything
            where = line_of(error)
            return f" ({where + ': ' if where else ''}{cause_line(error)})"
    values = [n.meta.get("val") for n in program.graph.nodes if n.op == "placeholder"]
    shapes = [s for x in values if isinstance(x, torch.Tensor) for s in x.shape if isinstance(s, torch.SymInt)]
    for guard in shapes[0].node.shape_env.guards if shapes else ():
        if isinstance(guard.expr, sympy.Eq) and size in guard.expr.args and (place := _place(str(guard.sloc))):
            return f" ({place})"
    return " although its code runs on others (a number is made of it in Python, or a table is as long)"
