"""The table of what a program may do (`aten_ops.txt`), and a call of an op held against its row.

The native library is built with the same file and checks the same again (native/src/op_table.cpp), so the two can't
drift apart.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from quantflow.errors import ArtifactError
from quantflow.ir.program import Ref, TensorRef

#: Elements of one tensor, and entries of one list of arguments.
MAX_ELEMENTS = 1 << 33
MAX_ITEMS = 1 << 16
#: Nodes of a program, and dimensions of a tensor.
MAX_NODES = 1 << 15
MAX_RANK = 16
#: Sizes, and what a row bounds from below only.
MAX_SIZE = 1 << 40
_INT64 = range(-(1 << 63), 1 << 63)
_WORDS = {
    "Tensor": "a tensor", "Operand": "a tensor or a number", "int": "a whole number", "Scalar": "a number",
    "none": "None",
}  # fmt: skip
_FILE = Path(__file__).with_name("aten_ops.txt")
_TOKEN = re.compile(
    r"(?P<name>\w+):(?P<kind>[A-Za-z_]+?)(?P<element_none>\?(?=\[))?(?P<list>\[(?P<length>\d*)(?P<only>!)?\])?(?P<none>\?)?"
    r"(?P<rule>@\+?@?\w+|>=-?\d+|-?\d+\.\.-?\d+)?(?P<default>=)?"
)


@dataclass(frozen=True)
class Argument:
    """One argument of an op.

    Attributes:
        kind: "Tensor", "Operand" (a tensor, or a number in its place), "int", "float", "bool", "Scalar", "str",
            "dtype", "layout", "device", "memory_format" or "none".
        is_list: a list of them; `length` entries, or one for all, where that is not 0.
        takes_single: one of them may stand in the list's place.
        takes_none: None is legal; `takes_none_inside`: inside the list.
        is_optional: it has a default.
        is_keyword: it is given by name only.
        legal: the numbers that it may be; None: any of 64 bits.
        axis_of: the argument (a tensor, or a list of them) whose dimensions it names.
        extra: how many dimensions more than that one's may be named.
        is_once: no dimension may be named twice.
    """

    name: str
    kind: str
    is_list: bool
    length: int
    takes_single: bool
    takes_none: bool
    takes_none_inside: bool
    is_optional: bool
    is_keyword: bool
    legal: range | None
    axis_of: str
    extra: int
    is_once: bool


@dataclass(frozen=True)
class Row:
    """One op of the table: its arguments in order, and the rule of `op_shapes` that gives its result's shape."""

    target: str
    arguments: tuple[Argument, ...]
    shape: str


@cache
def _lines() -> dict[str, str]:
    lines = _FILE.read_text().splitlines()
    return {line.partition(" ")[0]: line for line in lines if line and not line.startswith("#")}


def targets() -> list[str]:
    """Every op of the table."""
    return list(_lines())


@cache
def row_of(target: str) -> Row | None:
    """The row of an op, as in "softmax.int"; None: it is not in the table."""
    line = _lines().get(target)
    if line is None:
        return None
    words, _, shape = line.rpartition(" -> ")
    arguments, is_keyword = [], False
    for word in words.split()[1:]:
        if word == "*":
            is_keyword = True
        else:
            arguments.append(_argument(word, is_keyword))
    return Row(target, tuple(arguments), shape)


def _argument(word: str, is_keyword: bool) -> Argument:
    found = _TOKEN.fullmatch(word)
    assert found is not None, word
    rule = found["rule"] or ""
    legal = None
    if rule.startswith(">="):
        legal = range(int(rule[2:]), MAX_SIZE + 1)
    elif ".." in rule:
        low, _, high = rule.partition("..")
        legal = range(int(low), int(high) + 1)
    axis = rule.startswith("@")
    return Argument(
        found["name"],
        found["kind"],
        found["list"] is not None,
        int(found["length"] or 0),
        bool(found["length"]) and found["only"] is None and found["kind"] != "Tensor",
        found["none"] is not None or found["kind"] == "none",
        found["element_none"] is not None,
        found["default"] is not None,
        is_keyword,
        legal,
        rule.lstrip("@+") if axis else "",
        int(rule.startswith("@+")),
        rule.startswith("@@"),
    )


def bound(row: Row, args: Sequence[Any], kwargs: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The arguments of a node by name, each of a type and in a range that its row has.

    Raises:
        ArtifactError: one is missing, given twice, unknown, of another type, or outside its range; names it.
    """
    by_position = [argument for argument in row.arguments if not argument.is_keyword]
    if len(args) > len(by_position):
        raise ArtifactError(f"{where}: {row.target} takes {len(by_position)} arguments by position, has {len(args)}")
    given = {argument.name: value for argument, value in zip(by_position, args, strict=False)}
    known = {argument.name for argument in row.arguments}
    for name, value in kwargs.items():
        if name not in known:
            raise ArtifactError(f"{where}: {row.target} has no argument {name!r}; it has {', '.join(known)}")
        if name in given:
            raise ArtifactError(f"{where}: argument {name!r} of {row.target} is given twice")
        given[name] = value
    for argument in row.arguments:
        if argument.name in given:
            _check(argument, given[argument.name], f"{where}: argument {argument.name!r} of {row.target}")
        elif not argument.is_optional:
            raise ArtifactError(f"{where}: argument {argument.name!r} of {row.target} is missing")
    return given


def _check(argument: Argument, value: Any, where: str) -> None:
    if value is None:
        if not argument.takes_none:
            raise ArtifactError(f"{where} is None, must be {_described(argument)}")
        return
    if isinstance(value, Ref):
        return
    if not isinstance(value, (list, tuple)):
        if argument.is_list and not argument.takes_single:
            raise ArtifactError(f"{where} is {_shown(value)}, must be {_described(argument)}")
        return _check_one(argument, value, where)
    if not argument.is_list:
        raise ArtifactError(f"{where} is a list, must be {_described(argument)}")
    if len(value) > MAX_ITEMS:
        raise ArtifactError(f"{where} has {len(value)} entries; a list may have {MAX_ITEMS}")
    if argument.length > 1 and len(value) not in (0, 1, argument.length):
        raise ArtifactError(f"{where} has {len(value)} entries, must have {argument.length}, or one for all")
    for item in value:
        if item is None and not argument.takes_none_inside:
            raise ArtifactError(f"{where} holds None, must be {_described(argument)}")
        if item is not None and not isinstance(item, Ref):
            _check_one(argument, item, where)


def _check_one(argument: Argument, value: Any, where: str) -> None:
    if not _is_of_kind(argument.kind, value):
        raise ArtifactError(f"{where} is {_shown(value)}, must be {_described(argument)}")
    if isinstance(value, int) and value not in (argument.legal or _INT64):
        raise ArtifactError(f"{where} is {_shown(value)}, must be {_described(argument)}")


def _is_of_kind(kind: str, value: Any) -> bool:
    match kind:
        case "Tensor":
            return isinstance(value, TensorRef)
        case "Operand":
            return isinstance(value, (TensorRef, int, float))
        case "int":
            return isinstance(value, int)
        case "float" | "Scalar":
            return isinstance(value, (int, float))
        case "bool":
            return isinstance(value, bool) or (isinstance(value, int) and value in (0, 1))
        case "str":
            return isinstance(value, str)
        case "dtype":
            return isinstance(value, torch.dtype)
        case "layout":
            return isinstance(value, torch.layout)
        case "device":
            return isinstance(value, torch.device)
        case "memory_format":
            return isinstance(value, torch.memory_format)
        case _:
            return False


def _described(argument: Argument) -> str:
    kind = {
        "Tensor": "a tensor",
        "Operand": "a tensor or a number",
        "int": "a whole number",
        "Scalar": "a number",
        "none": "None",
    }.get(argument.kind, f"a {argument.kind}")
    legal = argument.legal
    bounds = "" if legal is None else f" in [{legal.start}, {legal.stop - 1}]"
    return ("a list of: " if argument.is_list else "") + kind + bounds + (" or None" if argument.takes_none else "")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
