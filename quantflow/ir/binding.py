"""A call's arguments, bound to the inputs of a graph or program by position, keyword, shape and dtype."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch

from quantflow.errors import DataError
from quantflow.ir.graph import Input


def bind(inputs: tuple[Input, ...], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
    """The call's tensors in the order of the program's inputs.

    Raises:
        DataError: too few or too many arguments, an unknown keyword, or something that is not a tensor.
    """
    remaining, named, bound = list(args), dict(kwargs), []
    for item in inputs:
        name = item.keyword or item.name
        if name in named:
            bound.append(named.pop(name))
        elif remaining:
            bound.append(remaining.pop(0))
        else:
            raise DataError(f"input '{name}' is missing; the model takes ({_expected(inputs)})")
    if remaining or named:
        extra = f"{len(remaining)} more positional" if remaining else f"unknown keyword {', '.join(named)}"
        raise DataError(f"the call has {extra} arguments; the model takes ({_expected(inputs)})")
    for item, value in zip(inputs, bound, strict=True):
        if not isinstance(value, torch.Tensor):
            raise DataError(f"input '{item.keyword or item.name}' is a {type(value).__name__}, not a tensor")
        if value.dim() != len(item.shape):
            raise DataError(
                f"input '{item.keyword or item.name}' has shape {tuple(value.shape)}; "
                f"the model takes {_shape(item.shape)}"
            )
        for found, wanted in zip(value.shape, item.shape, strict=True):
            if wanted is not None and found != wanted:
                raise DataError(
                    f"input '{item.keyword or item.name}' has shape {tuple(value.shape)}; "
                    f"the model was captured for {_shape(item.shape)}"
                )
        if _name(value.dtype) != item.dtype:
            raise DataError(
                f"input '{item.keyword or item.name}' is {_name(value.dtype)}; the model takes {item.dtype}"
            )
    return bound


@cache
def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _expected(inputs: tuple[Input, ...]) -> str:
    return ", ".join(f"{i.keyword or i.name}: {i.dtype}{_shape(i.shape)}" for i in inputs)


def _shape(shape: tuple[int | None, ...]) -> str:
    return "(" + ", ".join("batch" if s is None else str(s) for s in shape) + ("," if len(shape) == 1 else "") + ")"
