from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from quantflow.errors import ModelError
from quantflow.schema import EntryModel
from quantflow.sources.models import LoadedModel, load_model

CODE = """
import torch
from torch import nn

def build(width=4):
    return nn.Linear(3, width).train()

def exported():
    return torch.export.export(build(), (torch.zeros(2, 3),))

class Net(nn.Linear):
    def __init__(self):
        super().__init__(3, 2)

ready = nn.Linear(3, 5)

def breaks():
    raise ValueError("half a checkpoint")

def wrong():
    return {"weight": 1}

number = 3
"""


@pytest.fixture(autouse=True)
def code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_models.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "own_models", raising=False)


def load(name: str, seed: int = 0, **kwargs: Any) -> LoadedModel:
    return load_model(EntryModel(entry=f"own_models:{name}", kwargs=kwargs), seed)


def test_a_function_in_the_working_directory() -> None:
    model = load("build", width=6)
    assert model.module(torch.zeros(1, 3)).shape == (1, 6)
    assert not model.module.training
    assert model.notices == ("model.entry ran the user's own code: own_models:build",)
    assert (model.name, model.preprocess, model.outputs) == ("build", None, "other")


def test_the_seed_is_the_recipes() -> None:
    assert torch.equal(load("build").module.weight, load("build").module.weight)
    assert not torch.equal(load("build").module.weight, load("build", seed=1).module.weight)


def test_a_class_an_instance_and_an_exported_program() -> None:
    assert load("Net").module.out_features == 2
    assert load("ready").module.out_features == 5
    assert isinstance(load("exported").module, torch.export.ExportedProgram)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("biuld", "'own_models' has no 'biuld'; nearest names: build"),
        ("breaks", r"calling it raised ValueError at .*own_models\.py:\d+: half a checkpoint"),
        ("wrong", r"returned dict; expected torch\.nn\.Module"),
        ("number", "is a int, expected something to call"),
    ],
)
def test_errors_name_the_entry(name: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        load(name)


def test_wrong_kwargs() -> None:
    with pytest.raises(ModelError, match=r"calling it with \{'depth': 2\} raised TypeError"):
        load("build", depth=2)
    with pytest.raises(ModelError, match="already is a model and takes none; found depth"):
        load("ready", depth=2)


def test_an_absent_module_says_where_it_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=f"no module 'own_absent' on the Python path or in {tmp_path}"):
        load_model(EntryModel(entry="own_absent.sub:f"), 0)
