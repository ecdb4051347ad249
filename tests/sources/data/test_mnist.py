from __future__ import annotations

import torch

from quantflow.schema import MnistData
from quantflow.sources.data import Data, load_data
from quantflow.sources.data.digits import load_digits
from quantflow.sources.data.preprocess import IMAGENET, ImagePreprocess


def load(preprocess: ImagePreprocess | None = None, seed: int = 0, **options: int) -> Data:
    return load_data(MnistData(**{"calibration": 20, "evaluation": 40} | options), preprocess, seed)


def test_the_parts_are_disjoint_and_cover_all_digits() -> None:
    rows = [set(load_digits(part).rows.tolist()) for part in ("train", "calibration", "evaluation")]
    assert [len(part) for part in rows] == [3500, 500, 1000]
    assert set.union(*rows) == set(range(5000))


def test_digits_with_labels() -> None:
    data = load()
    batch = data.evaluation[0]
    assert data.metric == "top1"
    assert batch.args[0].shape == (16, 1, 28, 28)
    # The package's file is sorted by label, 500 digits of each.
    assert batch.labels.tolist() == [int(name.removeprefix("mnist:")) // 500 for name in batch.ids]


def test_the_seed_chooses_the_digits() -> None:
    assert load().identity == load().identity
    assert load(seed=1).identity["ids_sha256"] != load().identity["ids_sha256"]


def test_more_than_there_are_is_a_notice() -> None:
    data = load(calibration=501)
    assert data.identity["calibration_samples"] == 500
    assert "holds 500 samples where 501 were asked for" in data.notices[0]


def test_a_colour_model_sees_resized_colour_digits() -> None:
    x = load(IMAGENET.with_size(32)).calibration[0].args[0]
    assert x.shape == (16, 3, 32, 32)
    assert torch.isfinite(x).all()
