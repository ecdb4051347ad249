from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from quantflow.errors import DataError
from quantflow.schema import EntryData
from quantflow.sources.data import Data, load_data

CODE = """
import torch
from quantflow.sources.data import Batch

def batches(count=6, value=1.0):
    return [torch.full((2, 3), value + i) for i in range(count)]

def generator():
    for i in range(100):
        yield {"x": torch.full((3, 1), float(i))}

def pair():
    return batches(2), [Batch((torch.zeros(4, 3),), labels=torch.arange(4), ids=("a", "b", "c", "d"))]

def three():
    return (1, 2, 3)

def one_tensor():
    return torch.zeros(3)

def empty():
    return []

def bad_item():
    return [torch.zeros(1), "text"]

def bad_number():
    return [torch.zeros(2, 3), torch.tensor([[0.0], [float("nan")]])]

def breaks():
    raise KeyError("no such thing")

def breaks_later():
    yield torch.zeros(1, 1)
    raise OSError("disk on fire")

value = 3
"""


@pytest.fixture(autouse=True)
def code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_batches.py").write_text(CODE)
    (tmp_path / "own_broken.py").write_text("import own_missing_dependency")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "own_batches", raising=False)


def load(name: str, calibration: int = 5, evaluation: int = 4, **kwargs: Any) -> Data:
    entry = name if ":" in name else f"own_batches:{name}"
    spec = EntryData(entry=entry, kwargs=kwargs, calibration=calibration, evaluation=evaluation)
    return load_data(spec, None, 0)


def test_one_iterable_serves_both_in_turn() -> None:
    data = load("batches")
    assert [b.size for b in data.calibration] == [2, 2, 1]
    assert [b.args[0][0, 0].item() for b in data.evaluation] == [4.0, 5.0]
    assert data.notices == ("data.entry ran the user's own code: own_batches:batches",)
    assert data.identity["calibration_samples"] == 5


def test_a_generator_is_kept_and_can_be_read_twice() -> None:
    data = load("generator", 4, 4)
    assert [b.kwargs["x"][0].item() for b in data.calibration] == [0.0, 1.0]
    assert len(list(data.evaluation)) == len(list(data.evaluation)) == 2


def test_a_pair_with_labels() -> None:
    data = load("pair")
    assert data.metric == "top1"
    assert data.evaluation[0].ids == ("a", "b", "c", "d")
    assert "yielded 4 calibration samples where 5 were asked for" in data.notices[1]


def test_nothing_left_for_evaluation() -> None:
    data = load("batches", calibration=12)
    assert list(data.evaluation) == list(data.calibration)
    assert "calibration samples are used again" in data.notices[-1]


def test_kwargs_change_content_and_hash() -> None:
    assert load("batches", value=2.0).identity["content_sha256"] != load("batches").identity["content_sha256"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("three", r"returned a tuple of 3; return \(calibration, evaluation\), or a list"),
        ("one_tensor", "found one tensor"),
        ("empty", "yielded no calibration batch"),
        ("bad_item", "batch 1: found str"),
        ("bad_number", "calibration batch 1, input 0: sample 3 holds NaN"),
        ("breaks", r"calling it raised KeyError at .*own_batches\.py:\d+"),
        ("breaks_later", "raised OSError while yielding batches: disk on fire"),
        ("value", "found int"),
        ("batchs", "'own_batches' has no 'batchs'; nearest names: batches"),
        ("own_absent:f", "no module 'own_absent'"),
        ("own_broken:f", "importing it raised ModuleNotFoundError .*own_missing_dependency"),
    ],
)
def test_errors_name_the_entry_and_the_cure(name: str, message: str) -> None:
    with pytest.raises(DataError, match=f"(?s)data.entry.*{message}"):
        load(name)


def test_wrong_kwargs_are_shown() -> None:
    with pytest.raises(DataError, match=r"calling it with \{'nope': 1\} raised TypeError"):
        load("batches", nope=1)


def test_content_is_what_the_model_will_see() -> None:
    assert all(torch.isfinite(b.args[0]).all() for b in load("batches").calibration)
