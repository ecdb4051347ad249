from __future__ import annotations

import numpy as np
import pytest
import torch

from quantflow.errors import DataError
from quantflow.sources.data import Batch, as_batches


def test_every_accepted_form() -> None:
    x, y = torch.zeros(2, 3), torch.ones(2)
    own = Batch((x,), labels=y, ids=("a", "b"))
    tensor, pair, keywords, same = as_batches([x, (x, y), {"x": x}, own])
    assert tensor.args == (x,)
    assert pair.args == (x, y)
    assert (keywords.args, dict(keywords.kwargs)) == ((), {"x": x})
    assert same is own


def test_samples_are_numbered_across_batches() -> None:
    batches = list(as_batches(torch.zeros(5, 1).split(2)))
    assert [b.ids for b in batches] == [("0", "1"), ("2", "3"), ("4",)]
    assert [b.size for b in batches] == [2, 2, 1]


def test_an_iterator_is_read_lazily() -> None:
    def endless():
        while True:
            yield torch.zeros(1)

    assert next(as_batches(endless())).size == 1


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (np.zeros(3), r"batch 1: found numpy.ndarray, .* torch.from_numpy"),
        ((torch.zeros(1), object()), r"batch 1, item 1: found object, expected a tensor, a constant, or a list"),
        ({"x": [object()]}, r"batch 1, key 'x'\[0\]: found object"),
        ({"x": [1]}, r"batch 1: holds no tensor; .*found list"),
        ([], "batch 1: holds no tensor"),
        (torch.zeros(0, 3), r"batch 1: holds no sample \(shape \(0, 3\)\)"),
        ("text", "batch 1: found str"),
    ],
)
def test_a_wrong_item_is_named(item: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        list(as_batches([torch.zeros(1), item]))


@pytest.mark.parametrize("whole", [torch.zeros(2), {"x": torch.zeros(2)}, "text", 3, Batch((torch.zeros(1),))])
def test_one_batch_is_no_iterable_of_batches(whole: object) -> None:
    with pytest.raises(DataError, match="batches: found"):
        as_batches(whole)  # type: ignore[arg-type]


def test_tail_cuts_everything_per_sample() -> None:
    whole = Batch((torch.arange(3),), {"k": torch.arange(3)}, torch.arange(3), ("a", "b", "c"))
    batch = whole.tail(2)
    assert [t.tolist() for t in (*batch.tensors, batch.labels)] == [[1, 2]] * 3  # type: ignore[union-attr]
    assert batch.ids == ("b", "c")
    assert whole.tail(3) is whole


def test_head_cuts_everything_alike() -> None:
    batch = Batch((torch.arange(3),), {"k": torch.arange(3)}, torch.arange(3), ("a", "b", "c")).head(2)
    assert (batch.size, len(batch.kwargs["k"]), len(batch.labels), batch.ids) == (2, 2, 2, ("a", "b"))


def test_head_leaves_inputs_of_different_lengths_alone() -> None:
    batch = Batch((torch.arange(3), torch.arange(5)))
    assert batch.head(2) is batch
    assert batch.tail(2) is batch
