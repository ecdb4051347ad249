from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from quantflow.errors import DataError
from quantflow.schema import FolderData
from quantflow.sources.data import Data, load_data
from quantflow.sources.data.preprocess import ImagePreprocess

PREPROCESS = ImagePreprocess(8, 8, (0.0,) * 3, (1.0,) * 3)


def load(path: Path, calibration: int = 2, evaluation: int = 2, seed: int = 0) -> Data:
    spec = FolderData(path=str(path), calibration=calibration, evaluation=evaluation, batch_size=2)
    return load_data(spec, PREPROCESS, seed)


def paint(file: Path, value: int) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (10, 12), (value, value, value)).save(file)


def values(data: Data) -> dict[str, float]:
    batches = [*data.calibration, *data.evaluation]
    return {i: float(x.mean() * 255) for b in batches for i, x in zip(b.ids, b.args[0], strict=True)}


def test_pixels_labels_and_disjoint_parts(tmp_path: Path) -> None:
    for i in range(6):
        paint(tmp_path / ("cat" if i % 2 else "dog") / f"{i}.png", i * 40)
    (tmp_path / "notes.txt").write_text("ignored")
    data = load(tmp_path, 3, 3)
    assert data.metric == "top1"
    assert not set(data.identity["calibration_ids"]) & set(data.identity["evaluation_ids"])
    for name, value in values(data).items():
        assert value == pytest.approx(int(Path(name).stem) * 40, abs=0.01)
    for batch in data.evaluation:
        assert batch.labels.tolist() == [0 if name.startswith("cat") else 1 for name in batch.ids]


def test_numbered_directories_are_the_labels(tmp_path: Path) -> None:
    for label in (7, 12):
        paint(tmp_path / str(label) / "a.png", label)
    batch = load(tmp_path, 1, 1).evaluation[0]
    assert str(batch.labels.item()) == batch.ids[0].split("/")[0]


def test_loose_images_have_no_labels(tmp_path: Path) -> None:
    for i in range(4):
        paint(tmp_path / f"{i}.jpg", 0)
    data = load(tmp_path)
    assert data.metric is None
    assert data.calibration[0].labels is None
    assert data.notices == ()


def test_too_few_images_are_shared(tmp_path: Path) -> None:
    for i in range(3):
        paint(tmp_path / f"{i}.png", 0)
    data = load(tmp_path, 10, 20)
    assert (data.identity["calibration_samples"], data.identity["evaluation_samples"]) == (1, 2)
    assert "holds 3 samples where 10 + 20 were asked for" in data.notices[0]


def test_a_single_image_serves_both(tmp_path: Path) -> None:
    paint(tmp_path / "only.png", 9)
    data = load(tmp_path)
    assert data.identity["calibration_ids"] == data.identity["evaluation_ids"] == ["only.png"]
    assert "only sample" in data.notices[0]


def test_the_choice_follows_the_seed_and_the_hash_the_content(tmp_path: Path) -> None:
    for i in range(12):
        paint(tmp_path / f"{i}.png", i)
    first = load(tmp_path)
    assert load(tmp_path).identity == first.identity
    assert load(tmp_path, seed=3).identity["calibration_ids"] != first.identity["calibration_ids"]
    for i in range(12):
        paint(tmp_path / f"{i}.png", i + 100)
    changed = load(tmp_path).identity
    assert changed["ids_sha256"] == first.identity["ids_sha256"]
    assert changed["content_sha256"] != first.identity["content_sha256"]


def test_a_broken_image_is_named(tmp_path: Path) -> None:
    paint(tmp_path / "good.png", 0)
    whole = (tmp_path / "good.png").read_bytes()
    (tmp_path / "good.png").unlink()
    (tmp_path / "broken.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"broken\.png: can't be decoded"):
        list(load(tmp_path).calibration)


def test_no_directory_no_images_mixed_labels(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="missing, expected a directory"):
        load(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"holds no image; files ending in \.jpg"):
        load(tmp_path)
    paint(tmp_path / "loose.png", 0)
    paint(tmp_path / "cat" / "a.png", 0)
    with pytest.raises(DataError, match=r"unlabelled ones such as loose\.png"):
        load(tmp_path)


def test_palette_and_grey_images_become_rgb(tmp_path: Path) -> None:
    Image.new("P", (8, 8)).save(tmp_path / "palette.gif")
    Image.new("LA", (8, 8)).save(tmp_path / "alpha.png")
    assert all(torch.isfinite(b.args[0]).all() and b.args[0].shape[1] == 3 for b in load(tmp_path, 1, 1).calibration)
