"""What an unfinished run keeps: used when it fits, refused with the reason when it does not."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from quantflow.errors import ArtifactError
from quantflow.store import run_folder as work
from quantflow.store.run_folder import Work

CONTENT = {"sqnr_db": math.inf, "rows": [{"name": "fc", "max_error": 0.1}], "none": None, "nan": "text"}


def kept(tmp_path: Path, key: str = "key") -> Work:
    first = Work(tmp_path / "art", key)
    first.put("accuracy", "inputs", CONTENT)
    return Work(tmp_path / "art", key)


def test_a_product_comes_back(tmp_path: Path) -> None:
    again = kept(tmp_path)
    assert again.folder == tmp_path / ".art.work"
    assert again.get("accuracy", "inputs") == CONTENT
    assert again.resumed == ["accuracy"]
    assert "accuracy resumed: taken from an earlier run that was interrupted" in again.notices[0]
    assert again.get("benchmark", "inputs") is None
    assert len(again.notices) == 1


def edited(change: Callable[[dict[str, object]], object]) -> Callable[[Path], object]:
    def edit(path: Path) -> None:
        record = json.loads(path.read_text())
        change(record)
        path.write_text(json.dumps(record))

    return edit


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda path: path.write_bytes(b"\x00\xff"), "it can't be read"),
        (lambda path: path.write_bytes(path.read_bytes()[:-40]), "it can't be read"),
        (lambda path: path.write_text("[1]"), "it can't be read"),
        (lambda path: path.write_text("{}"), "its format is None, not 1"),
        (edited(lambda record: record.update(format=2)), "its format is 2, not 1"),
        (edited(lambda record: record["content"].update(none=3)), "changed or damaged"),  # type: ignore[attr-defined]
        (edited(lambda record: record.update(key="other")), "belongs to another recipe"),
    ],
)
def test_what_is_damaged_is_computed_again(tmp_path: Path, damage: Callable[[Path], object], reason: str) -> None:
    again = kept(tmp_path)
    damage(again.folder / "accuracy.json")
    assert again.get("accuracy", "inputs") is None
    assert again.resumed == []
    (notice,) = again.notices
    assert notice.startswith("accuracy is computed again: ")
    assert reason in notice


def test_what_belongs_to_something_else_is_computed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert kept(tmp_path).get("accuracy", "other data") is None
    assert Work(tmp_path / "art", "another recipe").get("accuracy", "inputs") is None
    monkeypatch.setattr(work, "distribution_version", lambda _: "9.9")
    assert Work(tmp_path / "art", "key").get("accuracy", "inputs") is None


def test_a_run_that_starts_afresh_throws_it_away(tmp_path: Path) -> None:
    assert kept(tmp_path).get("accuracy", "inputs") is not None
    assert Work(tmp_path / "art", "key", resume=False).get("accuracy", "inputs") is None
    assert list(tmp_path.iterdir()) == []


def test_only_what_is_ours_is_removed(tmp_path: Path) -> None:
    again = kept(tmp_path)
    again.put("clip_weights-0123456789ab", "inputs", CONTENT, b"tensors")
    assert again.get_tensors("clip_weights-0123456789ab", "inputs") == (CONTENT, b"tensors")
    for name in ("calibration.safetensors", "calibration-1-of-4.safetensors", ".accuracy.json.123.partial"):
        (again.folder / name).touch()
    (again.folder / "notes.txt").write_text("mine")
    again.remove()
    assert [path.name for path in again.folder.iterdir()] == ["notes.txt"]
    (again.folder / "notes.txt").unlink()
    again.remove()
    assert list(tmp_path.iterdir()) == []
    again.remove()


def test_a_file_in_the_folders_place(tmp_path: Path) -> None:
    (tmp_path / ".art.work").write_text("mine")
    mine = Work(tmp_path / "art", "key")
    assert mine.get("accuracy", "inputs") is None
    with pytest.raises(ArtifactError, match="choose another output="):
        mine.put("accuracy", "inputs", CONTENT)
    mine.remove()
    assert (tmp_path / ".art.work").read_text() == "mine"


def test_each_worker_has_its_checkpoint(tmp_path: Path) -> None:
    mine = Work(tmp_path / "art", "key")
    names = [mine.checkpoint(rank, count).name for rank, count in ((0, 1), (0, 2), (1, 2))]
    assert names == ["calibration.safetensors", "calibration-0-of-2.safetensors", "calibration-1-of-2.safetensors"]


@pytest.mark.parametrize("what", ["deep", "pipe", "loop", "folder"])
def test_no_garbage_stands_in_the_way(tmp_path: Path, what: str) -> None:
    work = Work(tmp_path / "art", "k")
    work.put("accuracy", "i", {"a": 1})
    path = work.folder / "accuracy.json"
    path.unlink()
    {
        "deep": lambda: path.write_bytes(b"[" * 100_000),
        "pipe": lambda: os.mkfifo(path),
        "loop": lambda: path.symlink_to(path.name),
        "folder": path.mkdir,
    }[what]()
    assert work.get("accuracy", "i") is None
