"""The old file or the new one, and nothing beside it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from quantflow.errors import ArtifactError
from quantflow.store.whole_file import disk_trouble, read_regular, replace_file, write_whole


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_a_killed_writer_left_goes_with_the_next_write(tmp_path: Path) -> None:
    (tmp_path / ".a.json.99999999.partial").touch()
    (tmp_path / ".b.json.99999999.partial").touch()
    write_whole(tmp_path / "a.json", b"{}")
    assert names(tmp_path) == [".b.json.99999999.partial", "a.json"]


def test_what_other_machines_may_be_writing_stays(tmp_path: Path) -> None:
    (tmp_path / ".a.json.99999999.partial").touch()
    replace_file(tmp_path / "a.json", b"{}")
    assert names(tmp_path) == [".a.json.99999999.partial", "a.json"]


def test_the_folder_is_made(tmp_path: Path) -> None:
    write_whole(tmp_path / "a" / "b.json", b"1")
    replace_file(tmp_path / "c" / "d.json", b"2")
    assert ((tmp_path / "a/b.json").read_bytes(), (tmp_path / "c/d.json").read_bytes()) == (b"1", b"2")


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_write_that_fails_leaves_the_old_file_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def fails(_: int) -> None:
        raise error

    write_whole(tmp_path / "a.json", b"old")
    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(type(error)):
        replace_file(tmp_path / "a.json", b"new")
    with pytest.raises(ArtifactError if isinstance(error, OSError) else KeyboardInterrupt):
        write_whole(tmp_path / "a.json", b"new")
    assert names(tmp_path) == ["a.json"]
    assert (tmp_path / "a.json").read_bytes() == b"old"


def test_the_error_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(
        ArtifactError, match=r"b\.json' can't be written \(.+\); free some space, or choose another out"
    ):
        write_whole(tmp_path / "file" / "b.json", b"")


def test_only_files_are_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"1")
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "pipe")
    assert read_regular(tmp_path / "file") == b"1"
    for name in ("loop", "pipe", "absent", "."):
        with pytest.raises(OSError):  # noqa: PT011 each has its own reason
            read_regular(tmp_path / name)


def test_what_the_disk_refuses_is_told_from_what_is_wrong() -> None:
    full = OSError(28, "No space left on device", "out/0.json")
    assert disk_trouble(full).startswith("'out/0.json' can't be used (No space left on device); free some space")
    wrapped = RuntimeError("Hydra's own")
    wrapped.__cause__ = full
    assert disk_trouble(wrapped) == disk_trouble(full)
    assert disk_trouble(ValueError("ours")) == ""
    assert disk_trouble(FileNotFoundError(2, "No such file", "x")) == ""
