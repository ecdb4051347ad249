"""Binding a call's arguments: what was found legal once is not looked at again, and nothing else passes for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from quantflow.errors import DataError
from quantflow.ir import binding
from quantflow.ir.binding import bind
from quantflow.ir.calls import Input


@dataclass(frozen=True)
class Model:
    inputs: tuple[Input, ...] = (Input("x", None, "float32", (None, 3)),)
    arguments: Any = None
    limits: tuple[Any, ...] = ()


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")  # torch's, on making one
def test_a_form_is_remembered_and_others_are_refused_as_ever() -> None:
    taken: set[Any] = set()
    x = torch.randn(2, 3)
    for _ in range(2):
        (found,) = bind(Model(), (x,), {}, taken=taken)
        assert found is x
    assert len(taken) == 1
    wrong = {
        "dimension 1 must be 3": torch.randn(2, 4),
        "takes float32": x.double(),
        "sparse": x.to_sparse(),
        "nested": torch.nested.nested_tensor([x[0], x[1]]),
        "has no data": x.to("meta"),
    }
    for message, value in wrong.items():
        with pytest.raises(DataError, match=message):
            bind(Model(), (value,), {}, taken=taken)
    assert len(taken) == 1


def test_what_memory_holds_is_looked_at_in_a_known_form_too() -> None:
    taken: set[Any] = set()
    x = torch.randn(2, 3)
    bind(Model(), (x,), {}, taken=taken)
    negated = torch._neg_view(x)
    (found,) = bind(Model(), (negated,), {}, taken=taken)
    assert not found.is_neg()
    assert torch.equal(found, -x)


def test_the_memory_of_forms_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(binding, "KEPT_FORMS", 4)
    taken: set[Any] = set()
    for rows in range(1, 12):
        bind(Model(), (torch.randn(rows, 3),), {}, taken=taken)
    assert len(taken) <= 4
