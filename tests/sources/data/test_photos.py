from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from quantflow.errors import DataError, UnavailableError
from quantflow.schema import PhotosData
from quantflow.sources.data import Data, TextPreprocess, load_data
from quantflow.sources.data.packages import file_in_package
from quantflow.sources.data.preprocess import IMAGENET, ImagePreprocess

RAW = ImagePreprocess(224, 256, (127.0,) * 3, (128.0,) * 3, divisor=1.0)


def load(preprocess: ImagePreprocess | TextPreprocess | None = RAW, seed: int = 0, **options: int) -> Data:
    return load_data(PhotosData(**{"calibration": 9, "evaluation": 11, "batch_size": 4} | options), preprocess, seed)


def inputs(batches) -> torch.Tensor:
    return torch.cat([batch.args[0] for batch in batches])


def published_crops(names: list[str], count: int, seed: int, size: int = 224) -> torch.Tensor:
    """The crops other tools' published figures were measured on, step by step as they were made."""
    files = {"china.jpg": ("sklearn", "datasets/images/"), "flower.jpg": ("sklearn", "datasets/images/")}
    photos = []
    for name in names:
        package, directory = files.get(name, ("skimage", "data/"))
        photos.append(np.asarray(Image.open(file_in_package(package, directory + name, purpose="test")).convert("RGB")))
    random, crops = np.random.default_rng(seed), []
    for i in range(count):
        photo = photos[i % len(photos)]
        h, w = photo.shape[:2]
        s = int(min(h, w) * random.uniform(0.35, 1.0))
        y, x = random.integers(0, h - s + 1), random.integers(0, w - s + 1)
        crop = np.asarray(Image.fromarray(photo[y : y + s, x : x + s]).resize((size, size), Image.BICUBIC))
        crops.append(((crop[:, ::-1] if random.random() < 0.5 else crop).astype(np.float32) - 127.0) / 128.0)
    return torch.from_numpy(np.stack(crops).transpose(0, 3, 1, 2).copy())


def test_crops_are_the_published_ones_to_the_bit() -> None:
    data = load()
    calibration = published_crops(["astronaut.png", "coffee.png", "rocket.jpg", "china.jpg"], 9, 1)
    evaluation = published_crops(
        ["chelsea.png", "flower.jpg", "motorcycle_left.png", "ihc.png", "hubble_deep_field.jpg"], 11, 2
    )
    assert torch.equal(inputs(data.calibration), calibration)
    assert torch.equal(inputs(data.evaluation), evaluation)


def test_batches_are_countable_and_repeatable() -> None:
    data = load()
    assert (len(data.calibration), len(data.evaluation)) == (3, 3)
    assert [batch.size for batch in data.calibration] == [4, 4, 1]
    assert torch.equal(inputs(data.calibration), inputs(data.calibration))
    assert data.calibration[-1].ids == data.calibration[2].ids


def test_the_seed_changes_the_crops_and_the_record() -> None:
    first, again, other = load(), load(), load(seed=1)
    assert first.identity == again.identity
    assert first.identity["ids_sha256"] != other.identity["ids_sha256"]
    assert not torch.equal(inputs(first.calibration), inputs(other.calibration))


def test_more_samples_begin_with_the_same_ones() -> None:
    more = load(calibration=12)
    assert torch.equal(inputs(more.calibration)[:9], inputs(load().calibration))


def test_ids_name_photo_and_place() -> None:
    data = load()
    assert data.identity["calibration_ids"][0] == "astronaut@123,155+349-mirrored"
    assert data.identity["calibration_samples"] == 9
    assert data.calibration[0].ids == tuple(data.identity["calibration_ids"][:4])


def test_size_and_preprocessing_are_the_models() -> None:
    assert load(IMAGENET.with_size(64)).evaluation[0].args[0].shape == (4, 3, 64, 64)
    assert load(IMAGENET, size=32).evaluation[0].args[0].shape == (4, 3, 32, 32)
    grey = ImagePreprocess(28, 28, (0.5,), (0.5,))
    assert load(grey).evaluation[0].args[0].shape == (4, 1, 28, 28)


def test_content_hash_depends_on_the_preprocessing() -> None:
    assert load(IMAGENET).identity["content_sha256"] != load(RAW).identity["content_sha256"]


def test_a_model_without_preprocessing_gets_imagenets_and_a_notice() -> None:
    data = load(None)
    assert data.calibration[0].args[0].shape == (4, 3, 224, 224)
    assert "224 x 224" in data.notices[0]


def test_photos_do_not_fit_a_text_model() -> None:
    with pytest.raises(DataError, match="use data=text"):
        load(TextPreprocess(None, 8, 8))


def test_a_missing_package_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(UnavailableError, match=r"'scikit-image', which is not installed.*quantflow\[zoo\]"):
        load()
