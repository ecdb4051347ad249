"""Measurements come back after a kill, and nothing else does."""

from __future__ import annotations

import contextlib
import errno
import math
import os
from pathlib import Path

import pytest

from quantflow.errors import ArtifactError, UsageError
from quantflow.store.journal import Journal


def filled(path: Path, key: str = "k") -> list[float]:
    with Journal(path, key) as journal:
        return [journal.measure(name, lambda value=value: {"value": value})["value"] for name, value in VALUES.items()]


VALUES = {"a": 1.5, "b": math.inf, "c": -math.inf}


def test_a_recorded_measurement_is_not_made_again(tmp_path: Path) -> None:
    assert filled(tmp_path / "j.jsonl") == list(VALUES.values())
    with Journal(tmp_path / "j.jsonl", "k") as journal:
        assert journal.resumed == 3
        assert journal.notice == ""
        assert journal.spent_s == sum(record["seconds"] for record in journal.records.values())
        assert {name: journal.measure(name, dict)["value"] for name in VALUES} == VALUES
        assert journal.measure("d", lambda: {"value": 4.0})["value"] == 4.0
    with Journal(tmp_path / "j.jsonl", "k") as journal:
        assert list(journal.records) == ["a", "b", "c", "d"]


def test_every_record_is_a_line_on_disk_at_once(tmp_path: Path) -> None:
    with Journal(tmp_path / "j.jsonl", "k") as journal:
        for count in range(1, 4):
            journal.measure(str(count), lambda: {"value": [1, {"x": math.nan}]})
            lines = (tmp_path / "j.jsonl").read_text().splitlines()
            assert len(lines) == 1 + count
        assert journal.content() == (tmp_path / "j.jsonl").read_bytes()
    with Journal(tmp_path / "j.jsonl", "k") as journal:
        assert math.isnan(journal.records["1"]["value"][1]["x"])


@pytest.mark.parametrize("cut", [1, 7, 30])
def test_a_half_written_line_is_dropped(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "j.jsonl"
    filled(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    with Journal(path, "k") as journal:
        assert list(journal.records) == ["a", "b"]
        journal.measure("c", lambda: {"value": VALUES["c"]})
    assert len(path.read_bytes().splitlines()) == len(whole.splitlines())


@pytest.mark.parametrize("content", [b"", b"not JSON\n", b'{"format": 1, "key": "other"}\n{"name": "a"}\n', b"[1]\n"])
def test_what_is_not_its_own_is_not_used(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "j.jsonl"
    path.write_bytes(content)
    with Journal(path, "k") as journal:
        assert journal.records == {}
        assert ("belongs to another job" in journal.notice) is bool(content)
    filled(path)
    with Journal(path, "k") as journal:
        assert journal.resumed == 3


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    with Journal(tmp_path / "j.jsonl", "k"), pytest.raises(UsageError, match="runs in another process"):
        Journal(tmp_path / "j.jsonl", "k")
    Journal(tmp_path / "j.jsonl", "k").__exit__()


def test_a_place_that_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="choose another output="):
        Journal(tmp_path / "file" / "j.jsonl", "k")


def test_in_memory_only() -> None:
    with Journal(None, "k") as journal:
        assert journal.measure("a", lambda: {"value": 1})["value"] == 1
        assert journal.measure("a", dict)["value"] == 1
        assert journal.content() == b""


@pytest.mark.parametrize("place", ["a folder", "a loop", "a pipe", "below a file", "in use", "no room"])
def test_a_cache_that_cannot_be_used_is_done_without(
    tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "j.jsonl"
    with contextlib.ExitStack() as stack:
        match place:
            case "a folder":
                path.mkdir()
            case "a loop":
                path.symlink_to(path.name)
            case "a pipe":
                os.mkfifo(path)
            case "below a file":
                (tmp_path / "file").touch()
                path = tmp_path / "file" / "j.jsonl"
            case "in use":
                stack.enter_context(Journal(path, "k"))
            case "no room":

                def full(_: int) -> None:
                    raise OSError(errno.ENOSPC, "No space left on device")

                monkeypatch.setattr(os, "fsync", full)
        with pytest.raises((UsageError, ArtifactError), match=r"journal '.*j\.jsonl' (can't be|is in use)"):
            Journal(path, "k")
        with Journal(path, "k", is_cache=True) as journal:
            assert journal.measure("a", lambda: {"value": 1.0})["value"] == 1.0
            assert journal.measure("a", dict)["value"] == 1.0
            assert "not kept for later runs: journal" in journal.notice


def test_nesting_that_no_parser_follows_is_no_record(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    filled(path)
    path.write_bytes(path.read_bytes() + b"[" * 100_000 + b"\n")
    with Journal(path, "k") as journal:
        assert list(journal.records) == list(VALUES)
