from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from quantflow.errors import ArtifactError
from quantflow.store import artifact
from quantflow.store.artifact import (
    MANIFEST,
    add_files,
    check_destination,
    parse_json,
    read_artifact,
    read_manifest,
    write_artifact,
)

FILES = {"recipe.json": b'{"name": "x"}', "weights.safetensors": bytes(range(256)) * 40}


@pytest.fixture
def written(tmp_path: Path) -> Path:
    return write_artifact(tmp_path / "model", FILES, notices=["random weights"])


def leftovers(directory: Path) -> list[str]:
    return [path.name for path in directory.parent.iterdir() if path.name != directory.name]


def edit_manifest(directory: Path, change: Callable[[dict[str, Any]], None], *, sign: bool = True) -> None:
    """Rewrites the manifest as an attacker would, with a digest that fits unless `sign` is off."""
    path = directory / MANIFEST
    manifest = json.loads(path.read_text())
    change(manifest)
    if sign:
        manifest["sha256"] = artifact._digest(manifest)
    path.write_text(json.dumps(manifest))


def test_what_was_written_is_read_back(written: Path) -> None:
    contents = read_artifact(written)
    assert {name: content for name, content in contents.items() if name != MANIFEST} == FILES
    manifest = read_manifest(written)
    assert manifest.format == 1
    assert manifest.notices == ("random weights",)
    assert manifest.files["recipe.json"].sha256 == hashlib.sha256(FILES["recipe.json"]).hexdigest()
    assert manifest.versions["python"].startswith("3.")
    assert leftovers(written) == []


def test_same_files_give_the_same_bytes(tmp_path: Path) -> None:
    first, second = (read_artifact(write_artifact(tmp_path / name, FILES)) for name in "ab")
    assert {n: c for n, c in first.items() if n != MANIFEST} == {n: c for n, c in second.items() if n != MANIFEST}


def test_permissions_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        written = write_artifact(tmp_path / "model", FILES)
    finally:
        os.umask(before)
    assert written.stat().st_mode & 0o777 == 0o750
    assert (written / "recipe.json").stat().st_mode & 0o777 == 0o640


def test_an_artifact_is_replaced_whole(written: Path) -> None:
    write_artifact(written, {"plan.json": b"{}"})
    assert set(read_artifact(written)) == {"plan.json", MANIFEST}
    assert leftovers(written) == []


def test_a_link_to_an_artifact_keeps_pointing_at_it(written: Path, tmp_path: Path) -> None:
    link = tmp_path / "latest"
    link.symlink_to(written)
    write_artifact(link, {"plan.json": b"{}"})
    assert link.is_symlink()
    assert set(read_artifact(written)) == {"plan.json", MANIFEST}


def test_an_empty_directory_may_be_used(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    assert read_artifact(write_artifact(tmp_path / "model", FILES))["recipe.json"] == FILES["recipe.json"]


def test_parents_are_created(tmp_path: Path) -> None:
    assert read_artifact(write_artifact(tmp_path / "a" / "b" / "model", FILES))


def test_add_files_replaces_and_adds_and_keeps_the_rest(written: Path) -> None:
    inode = (written / "weights.safetensors").stat().st_ino
    add_files(written, {"recipe.json": b"{}", "results.json": b'{"format": 1}'})
    contents = read_artifact(written)
    assert contents["recipe.json"] == b"{}"
    assert contents["results.json"] == b'{"format": 1}'
    assert contents["weights.safetensors"] == FILES["weights.safetensors"]
    assert (written / "weights.safetensors").stat().st_ino == inode
    assert read_manifest(written).notices == ("random weights",)
    assert leftovers(written) == []


def test_add_files_without_hard_links_copies(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*_: object, **__: object) -> None:
        raise OSError(errno.EPERM, "not permitted")

    monkeypatch.setattr(os, "link", no_links)
    add_files(written, {"results.json": b"{}"})
    assert read_artifact(written)["weights.safetensors"] == FILES["weights.safetensors"]


def test_add_files_does_not_launder_damage(written: Path) -> None:
    (written / "weights.safetensors").write_bytes(b"\0" * len(FILES["weights.safetensors"]))
    add_files(written, {"results.json": b"{}"})
    with pytest.raises(ArtifactError, match=r"weights\.safetensors was changed"):
        read_artifact(written)


# Destinations that are not ours


def test_other_peoples_files_are_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ArtifactError, match=r"thesis.tex.*choose another output="):
        write_artifact(tmp_path, FILES)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_a_stray_file_in_an_artifact_is_never_lost(written: Path) -> None:
    (written / "notes.txt").write_text("keep me")
    with pytest.raises(ArtifactError, match=r"notes.txt.*would be lost"):
        check_destination(written)


def test_another_programs_manifest_is_not_ours(tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_text(json.dumps({"name": "web app", "files": {"index.html": 1}}))
    (tmp_path / "index.html").write_text("hello")
    with pytest.raises(ArtifactError, match="not part of an artifact"):
        write_artifact(tmp_path, FILES)


def test_a_damaged_artifact_may_be_replaced(written: Path) -> None:
    (written / MANIFEST).write_text("{")
    write_artifact(written, FILES)
    assert read_artifact(written)


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "model").write_text("")
    with pytest.raises(ArtifactError, match="is a file"):
        write_artifact(tmp_path / "model", FILES)


@pytest.mark.parametrize("place", ["model", "new", "a/b/c"])
def test_a_place_that_is_not_writable(written: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anywhere, so permissions would not do
    with pytest.raises(ArtifactError, match=r"not writable; choose another output="):
        check_destination(written.parent / place)


@pytest.mark.parametrize("name", ["../evil", "/etc/passwd", "a/b", ".hidden", "", MANIFEST, "a\nb", "a" * 101])
def test_illegal_names_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ArtifactError, match="can't hold a file named"):
        write_artifact(tmp_path / "model", {name: b""})
    assert list(tmp_path.iterdir()) == []


# Interrupted writes


def test_a_full_disk_leaves_what_was_there(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ArtifactError, match="No space left on device; what was there before is unchanged"):
        write_artifact(written, {"plan.json": b"{}"})
    monkeypatch.undo()
    assert set(read_artifact(written)) == {*FILES, MANIFEST}
    assert leftovers(written) == []


@pytest.mark.parametrize("moment", range(6))
def test_an_exception_at_any_flush_leaves_old_or_new(
    written: Path, monkeypatch: pytest.MonkeyPatch, moment: int
) -> None:
    calls = 0

    def interrupted(_: int) -> None:
        nonlocal calls
        if calls == moment:
            raise KeyboardInterrupt
        calls += 1

    monkeypatch.setattr(os, "fsync", interrupted)
    new = {"plan.json": b"{}", "program.json": b"{}"}
    try:
        write_artifact(written, new)
    except KeyboardInterrupt:
        assert moment < 5
    assert set(read_artifact(written)) in ({*FILES, MANIFEST}, {*new, MANIFEST})
    assert leftovers(written) == []


def test_what_a_dead_writer_left_is_tidied_and_a_live_one_is_not(written: Path) -> None:
    dead = written.with_name(".model.staging-0123456789abcdef")
    dead.mkdir()
    (dead / "weights.safetensors").write_bytes(b"half")
    with artifact._staging(written) as alive:
        assert not dead.exists()
        write_artifact(written, FILES)
        assert alive.exists()
    assert leftovers(written) == []


def test_a_file_system_that_cannot_exchange(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(artifact, "_exchange", lambda *_: False)
    write_artifact(written, {"plan.json": b"{}"})
    assert set(read_artifact(written)) == {"plan.json", MANIFEST}
    assert leftovers(written) == []


def test_a_kill_between_the_steps_of_an_exchange_loses_nothing(written: Path) -> None:
    written.rename(written.with_name(".model.retired-0123456789abcdef"))
    assert read_artifact(written)["recipe.json"] == FILES["recipe.json"]
    add_files(written.with_name("model"), {"results.json": b"{}"})
    assert "results.json" in read_artifact(written)


def test_a_failed_second_step_is_undone(written: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        artifact._exchange_in_steps(tmp_path / "absent", written)
    assert read_artifact(written)


WRITER = """
import os, sys, time
from pathlib import Path
from quantflow.store.artifact import add_files, write_artifact
directory = Path(sys.argv[1])
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        while True:
            content = str(time.time_ns()).encode() * 20000
            write_artifact(directory, {"program.json": content, "weights.safetensors": content})
            add_files(directory, {"results.json": content})
    print(child, flush=True)
    os.waitpid(child, 0)
    print("dead", flush=True)
"""


def test_kill_9_at_random_moments_leaves_a_whole_artifact(tmp_path: Path) -> None:
    directory = write_artifact(tmp_path / "model", {"program.json": b"", "weights.safetensors": b""})
    moments = random.Random(0)
    generations = set()
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(directory)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(artifact.__file__).parents[2],
    )
    assert writer.stdin is not None
    assert writer.stdout is not None
    with writer:
        for _ in range(12):
            writer.stdin.write("go\n")
            writer.stdin.flush()
            before, child = directory.stat().st_ino, int(writer.stdout.readline())
            while not directory.exists() or directory.stat().st_ino == before:  # until it has written something
                assert os.waitid(os.P_PID, writer.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None, "the writer ended"
                time.sleep(0.001)
            time.sleep(moments.uniform(0.0, 0.1))
            os.kill(child, signal.SIGKILL)
            assert writer.stdout.readline() == "dead\n"
            contents = read_artifact(directory)
            assert contents["program.json"] == contents["weights.safetensors"]
            assert contents.get("results.json", contents["program.json"]) == contents["program.json"]
            generations.add(contents["program.json"][:20])
        writer.stdin.close()
    assert len(generations) > 2  # it was killed while it worked, not before
    write_artifact(directory, FILES)
    assert leftovers(directory) == []


def test_reading_while_another_process_writes(tmp_path: Path) -> None:
    directory = write_artifact(tmp_path / "model", {"program.json": b"", "weights.safetensors": b""})
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(directory)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(artifact.__file__).parents[2],
    )
    assert writer.stdin is not None
    assert writer.stdout is not None
    with writer:
        writer.stdin.write("go\n")
        writer.stdin.flush()
        child = int(writer.stdout.readline())
        end = time.monotonic() + 1.0
        try:
            while time.monotonic() < end:
                contents = read_artifact(directory)
                assert contents["program.json"] == contents["weights.safetensors"]
        finally:
            os.kill(child, signal.SIGKILL)
            writer.stdin.close()


# Damaged and hostile artifacts


def flip_byte(directory: Path) -> None:
    path = directory / "weights.safetensors"
    content = bytearray(path.read_bytes())
    content[1000] ^= 1
    path.write_bytes(content)


def truncate(directory: Path) -> None:
    os.truncate(directory / "weights.safetensors", 100)


def grow(directory: Path) -> None:
    with (directory / "weights.safetensors").open("ab") as file:
        file.write(b"more")


def replace_by_link(directory: Path) -> None:
    (directory / "recipe.json").rename(directory.parent / "elsewhere.json")
    (directory / "recipe.json").symlink_to(directory.parent / "elsewhere.json")


def replace_by_pipe(directory: Path) -> None:
    (directory / "recipe.json").unlink()
    os.mkfifo(directory / "recipe.json")


def replace_by_directory(directory: Path) -> None:
    (directory / "recipe.json").unlink()
    (directory / "recipe.json").mkdir()


def manifest_link(directory: Path) -> None:
    (directory / MANIFEST).rename(directory.parent / "m.json")
    (directory / MANIFEST).symlink_to(directory.parent / "m.json")


def edit_record(directory: Path, record: dict[str, Any]) -> None:
    edit_manifest(directory, lambda m: m["files"].update({"recipe.json": record}))


def escape(directory: Path) -> None:
    (directory.parent / "secret").write_bytes(b"secret")
    record = {"sha256": hashlib.sha256(b"secret").hexdigest(), "bytes": 6}
    edit_manifest(directory, lambda m: m["files"].update({"../secret": record}))


def absolute(directory: Path) -> None:
    content = Path("/etc/hostname").read_bytes() if Path("/etc/hostname").exists() else b""
    record = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    edit_manifest(directory, lambda m: m["files"].update({"/etc/hostname": record}))


def lists_itself(directory: Path) -> None:
    edit_manifest(directory, lambda m: m["files"].update({MANIFEST: {"sha256": "0" * 64, "bytes": 1}}))


def many_files(directory: Path) -> None:
    record = {"sha256": "0" * 64, "bytes": 0}
    edit_manifest(directory, lambda m: m["files"].update({f"f{i}": record for i in range(1100)}))


def huge_json(directory: Path) -> None:
    size = artifact.MAX_JSON_BYTES + 1
    os.truncate(directory / "recipe.json", size)
    edit_manifest(directory, lambda m: m["files"]["recipe.json"].update(bytes=size))


def huge_manifest(directory: Path) -> None:
    os.truncate(directory / MANIFEST, artifact.MAX_MANIFEST_BYTES + 1)


def deep_manifest(directory: Path) -> None:
    (directory / MANIFEST).write_text("[" * 200_000)


HOSTILE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a flipped byte": (flip_byte, "weights.safetensors was changed after it was written"),
    "truncated": (truncate, r"weights.safetensors has 100 bytes where 10240 were written \(truncated\)"),
    "emptied": (lambda d: os.truncate(d / "recipe.json", 0), "truncated"),
    "grown": (grow, "has 10244 bytes where at most 10240 are expected"),
    "a file missing": (lambda d: (d / "recipe.json").unlink(), "'recipe.json' missing"),
    "a file added": (lambda d: (d / "evil.pt").write_bytes(b""), "'evil.pt' not in its manifest"),
    "a hidden file added": (lambda d: (d / ".evil").write_bytes(b""), "'.evil' not in its manifest"),
    "a folder added": (lambda d: (d / "more").mkdir(), "'more' not in its manifest"),
    "a link in place of a file": (replace_by_link, "recipe.json is a link"),
    "a pipe in place of a file": (replace_by_pipe, "recipe.json is not a regular file"),
    "a folder in place of a file": (replace_by_directory, "recipe.json is not a regular file"),
    "a link in place of the manifest": (manifest_link, "manifest.json is a link"),
    "no manifest": (lambda d: (d / MANIFEST).unlink(), "manifest.json missing"),
    "an empty manifest": (lambda d: (d / MANIFEST).write_bytes(b""), "manifest.json is not valid JSON"),
    "half a manifest": (lambda d: os.truncate(d / MANIFEST, 200), "manifest.json is not valid JSON"),
    "a manifest that is no text": (lambda d: (d / MANIFEST).write_bytes(b"\xff\xfe"), "not valid JSON"),
    "a manifest that is a list": (lambda d: (d / MANIFEST).write_text("[]"), "a JSON list where an object"),
    "a manifest with a key twice": (
        lambda d: (d / MANIFEST).write_text('{"files": {}, ' + (d / MANIFEST).read_text().lstrip()[1:]),
        "manifest.json is not valid JSON .key 'files' is given twice.",
    ),
    "a deeply nested manifest": (deep_manifest, "not valid JSON"),
    "a huge manifest": (huge_manifest, "manifest.json has 1048577 bytes where at most 1048576"),
    "huge JSON": (huge_json, "recipe.json is 67108865 bytes long"),
    "a path outside": (escape, r"lists '\.\./secret', which is not a plain file name"),
    "an absolute path": (absolute, "lists '/etc/hostname', which is not a plain file name"),
    "a manifest that lists itself": (lists_itself, "which is not a plain file name"),
    "too many files": (many_files, "lists over 1024 files"),
    "another creation date": (lambda d: edit_manifest(d, lambda m: m.update(created="x"), sign=False), "own sha256"),
    "no notices": (lambda d: edit_manifest(d, lambda m: m.pop("notices")), "lacks a field"),
    "a wrong type": (lambda d: edit_manifest(d, lambda m: m.update(files=[])), "one of the wrong type"),
    "a record without a digest": (lambda d: edit_record(d, {"bytes": 13}), "no usable sha256"),
    "a size that is true": (lambda d: edit_record(d, {"sha256": "0" * 64, "bytes": True}), "no usable sha256"),
    "a size below zero": (lambda d: edit_record(d, {"sha256": "0" * 64, "bytes": -1}), "no usable sha256"),
    "no format": (lambda d: edit_manifest(d, lambda m: m.pop("format")), "no usable 'format'"),
    "a format that is text": (lambda d: edit_manifest(d, lambda m: m.update(format="1")), "no usable 'format'"),
    "a newer format": (
        lambda d: edit_manifest(d, lambda m: m.update(format=2, quantflow="9.0.0"), sign=False),
        "format 2, and this quantflow reads formats up to 1; install quantflow 9.0.0 or newer",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_artifacts_are_refused(written: Path, case: str) -> None:
    damage, message = HOSTILE[case]
    damage(written)
    with pytest.raises(ArtifactError, match=message) as caught:
        read_artifact(written)
    assert str(written) in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("place", ["absent", "a/b/c", "file"])
def test_no_artifact_there(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match=r"no artifact at .* give artifact="):
        read_artifact(tmp_path / place)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[1]", b"1" * 5000, b"[" * 100_000])
def test_parse_json_names_the_place(content: bytes) -> None:
    with pytest.raises(ArtifactError, match=r"plan\.json"):
        parse_json(content, "artifact 'x': plan.json")
