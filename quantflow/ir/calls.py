"""What a call of a model looks like: its tensors, where they lie among its arguments, and which sizes are legal."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

#: The name of the dimension that counts samples, in messages and limits.
BATCH = "batch"


@dataclass(frozen=True)
class Input:
    """One tensor the model takes.

    Attributes:
        name: of its node.
        keyword: what it is passed by; None: by position.
        dtype: "float32".
        shape: a number where the size is fixed, a name where it varies, None where it counts samples.
    """

    name: str
    keyword: str | None
    dtype: str
    shape: tuple[int | str | None, ...]


@dataclass(frozen=True)
class Arguments:
    """How a model's tensors lie among the arguments of its call, where they are not simply these.

    Attributes:
        parameters: parameter → tree over the inputs (`Leaf(i)`), with the constants it was captured with.
        names: the parameters that can be given by position, in order.
        defaults: what the others that it has hold when they are not given.
        neutral: parameter → the number that, given in every place of a tensor shaped like the first input, changes
            nothing: so it may be left out, or given like that.
        catches: whether it takes keywords of any other name.
    """

    parameters: Mapping[str, Any]
    names: tuple[str, ...] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict)
    neutral: Mapping[str, float] = field(default_factory=dict)
    catches: bool = False


@dataclass(frozen=True)
class Limit:
    """What the sizes of a call must fulfil.

    Attributes:
        expression: a comparison of whole-number arithmetic over the names of sizes: "height % 8 == 0".
        place: the layer or line that asks for it; "" where it is not known.
    """

    expression: str
    place: str = ""

    def holds(self, sizes: Mapping[str, int]) -> bool:
        """Whether these sizes fulfil it.

        Raises:
            ValueError: the expression is not one.
        """
        try:
            return bool(_compiled(self.expression)(sizes))
        except ZeroDivisionError:
            return False

    @property
    def names(self) -> list[str]:
        """The sizes it speaks of."""
        return sorted(
            {
                node.id
                for node in ast.walk(ast.parse(self.expression, mode="eval"))
                if isinstance(node, ast.Name) and node.id not in _FUNCTIONS
            }
        )


def fitting(limits: Sequence[Limit], sizes: Mapping[str, int], samples: int, most: int) -> int:
    """The least number of samples from `samples` on, and at most `most`, that the limits allow; `most` if none does."""
    for count in range(min(samples, most), most):
        if all(limit.holds({**sizes, BATCH: count}) for limit in limits):
            return count
    return most


_Evaluate = Callable[[Mapping[str, int]], Any]
_OPERATORS: dict[type, Callable[..., Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod, ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le,
    ast.Gt: operator.gt, ast.GtE: operator.ge, ast.USub: operator.neg, ast.Not: operator.not_,
    ast.Div: operator.truediv,
}  # fmt: skip
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "max": max, "min": min, "Max": max, "Min": min, "Mod": operator.mod, "PythonMod": operator.mod,
    "FloorDiv": operator.floordiv, "Eq": operator.eq, "Ne": operator.ne, "int": int, "TruncToInt": int,
}  # fmt: skip
#: A power needs no more, and a file could ask for one that never ends.
_LARGEST_EXPONENT = 4


@cache
def _compiled(expression: str) -> _Evaluate:
    try:
        return _evaluator(ast.parse(expression, mode="eval").body)
    except (SyntaxError, RecursionError) as error:
        raise ValueError(f"{expression!r} is no limit of sizes") from error


def _evaluator(node: ast.AST) -> _Evaluate:
    """The expression as a function of sizes: whole-number arithmetic and comparisons, and nothing else."""
    if isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
        value = node.value
        return lambda _: value
    if isinstance(node, ast.Name):
        name = node.id
        return lambda sizes: sizes[name]
    if isinstance(node, ast.UnaryOp) and type(node.op) in _OPERATORS:
        function, operand = _OPERATORS[type(node.op)], _evaluator(node.operand)
        return lambda sizes: function(operand(sizes))
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        function, left, right = _OPERATORS[type(node.op)], _evaluator(node.left), _evaluator(node.right)
        return lambda sizes: function(left(sizes), right(sizes))
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow) and isinstance(node.right, ast.Constant):
        base, exponent = _evaluator(node.left), node.right.value
        if exponent in range(_LARGEST_EXPONENT + 1):
            return lambda sizes: base(sizes) ** exponent
    if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in _OPERATORS:
        function, left, right = _OPERATORS[type(node.ops[0])], _evaluator(node.left), _evaluator(node.comparators[0])
        return lambda sizes: function(left(sizes), right(sizes))
    if isinstance(node, ast.BoolOp):
        parts, every = [_evaluator(value) for value in node.values], isinstance(node.op, ast.And)
        return lambda sizes: (all if every else any)(part(sizes) for part in parts)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _FUNCTIONS:
        called, given = _FUNCTIONS[node.func.id], [_evaluator(value) for value in node.args]
        return lambda sizes: called(*(value(sizes) for value in given))
    raise ValueError(f"{ast.unparse(node)!r} has no place in a limit of sizes")
