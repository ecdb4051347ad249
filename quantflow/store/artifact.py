"""A directory of files that is always complete: written aside, then swapped in; verified when read.

Knows names, sizes and digests, not meanings. `manifest.json` lists every other file with its size and
sha256, and carries a digest of itself, so a changed, missing, added or truncated file is noticed. It is
not signed: someone who rewrites the manifest too can make an artifact say anything, which is why nothing
in one is ever unpickled or imported.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from quantflow.errors import ArtifactError
from quantflow.host.environment import versions
from quantflow.store.json_values import distinct, encoded, unshowable
from quantflow.store.places import exchange as _exchange
from quantflow.store.places import is_mounted, is_writable, sync_directory

FORMAT = 1

RECIPE = "recipe.json"
PLAN = "plan.json"
PROGRAM = "program.json"
WEIGHTS = "weights.safetensors"
CALIBRATION = "calibration.safetensors"
RESULTS = "results.json"
MANIFEST = "manifest.json"
NAMES = (RECIPE, PLAN, PROGRAM, WEIGHTS, CALIBRATION, RESULTS, MANIFEST)
#: The fused graph as text, where it was asked for.
GRAPH = "graph.txt"
#: Views of the results.
REPORT = "report.md"
PAGE = "report.html"
SUMMARY = "summary.md"
JUNIT = "junit.xml"
#: Where an artifact holds the parts of a model: which they are, and the beginning of their files' names.
PARTS = "parts.json"
#: All others in an artifact are kept as they are.
OWN = {*NAMES, GRAPH, REPORT, PAGE, SUMMARY, JUNIT}

MAX_MANIFEST_BYTES = 1 << 20
MAX_JSON_BYTES = 64 << 20
MAX_FILES = 1024
MAX_DEPTH = 100

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")
#: Our own folders inside a mount point: where a write is prepared, what it moves in, and an unfinished run's products.
_INSIDE = re.compile(r"\.quantflow\.(staging-|next-|work$)[0-9a-f]*")
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class FileRecord:
    """A file's content: hexadecimal sha256, and length in bytes."""

    sha256: str
    bytes: int


@dataclass(frozen=True)
class Manifest:
    """What manifest.json says: who wrote the artifact, when, with what, and every file in it."""

    format: int
    quantflow: str
    versions: Mapping[str, str]
    created: str
    notices: tuple[str, ...]
    files: Mapping[str, FileRecord]


def check_destination(directory: Path) -> None:
    """Says before a long run whether its artifact may go to `directory`.

    Absent, empty, or an earlier artifact is fine; that one will be replaced.

    Raises:
        ArtifactError: if something is there that quantflow did not write, or the place is not writable.
    """
    directory = _resolved(directory)
    if loop := next((path for path in (directory, *directory.parents) if path.is_symlink()), None):
        raise ArtifactError(
            f"'{directory}' can't be reached: the link '{loop}' leads to itself; choose another output="
        )
    if not directory.exists():
        parent = next(path for path in directory.parents if path.exists())
        if not parent.is_dir() or not is_writable(parent):
            raise ArtifactError(f"'{directory}' can't be created: '{parent}' is not writable; choose another output=")
        return
    if not directory.is_dir():
        raise ArtifactError(f"'{directory}' is a file, so no artifact can be written there; choose another output=")
    if is_mounted(directory):
        if not is_writable(directory):
            raise ArtifactError(f"'{directory}' can't be written to: it is mounted read-only; choose another output=")
    elif not is_writable(directory.parent):
        raise ArtifactError(f"'{directory}' can't be replaced: its parent is not writable; choose another output=")
    if foreign := sorted(_entries(directory) - _written_by_us(directory)):
        raise ArtifactError(
            f"'{directory}' holds files that are not part of an artifact ({_some(foreign)}) and would be lost; "
            "move them, or choose another output="
        )


def _entries(directory: Path) -> set[str]:
    """What lies in a directory, without what a file system and an unfinished run keep there."""
    names = {path.name for path in directory.iterdir()}
    if not is_mounted(directory):
        return names
    return {name for name in names if name != "lost+found" and not _INSIDE.fullmatch(name)}


def write_artifact(directory: Path, files: Mapping[str, bytes], *, notices: Sequence[str] = ()) -> Path:
    """Writes `files` and their manifest to `directory`, replacing an artifact that is there.

    Everything goes to a hidden sibling directory first and is flushed to disk; then the two directories
    change places in one system call. A kill at any moment leaves the old artifact or the new one. What a
    killed run left beside it is removed by the next write. A mount point can't change places: there the new
    files are prepared inside, and once they are complete, moved in one by one; readers finish what a kill left.

    Args:
        files: plain file name → content; `manifest.json` is added.
        notices: kept in the manifest, for whoever opens the artifact.

    Returns:
        The resolved directory.

    Raises:
        ArtifactError: illegal file names, a destination that must not be replaced, or an error from the disk.
    """
    _check_names(files)
    check_destination(directory)
    return _write(_resolved(directory), files, {}, notices)


def add_files(directory: Path, files: Mapping[str, bytes]) -> Path:
    """Adds files to an artifact, or replaces some of its files, as atomically as `write_artifact`.

    The files that stay are hard-linked, not copied, and keep their digests: damage to them is still noticed.

    Raises:
        ArtifactError: as `read_manifest` and `write_artifact`.
    """
    _check_names(files)
    directory = _located(directory)
    manifest = read_manifest(directory)
    kept = {name: record for name, record in manifest.files.items() if name not in files}
    return _write(directory, files, kept, manifest.notices)


def read_artifact(directory: Path) -> dict[str, bytes]:
    """Every file's content, manifest.json included, after all of it was verified.

    The bytes returned are the bytes that were hashed, so nothing can change in between.

    Raises:
        ArtifactError: no artifact there, a newer format, or a file missing, added, truncated or altered.
    """
    directory = _located(directory)
    while True:
        with _opened(directory) as folder:
            try:
                manifest, raw = _verified_manifest(folder, directory)
                contents = {name: _verified(folder, directory, name, record) for name, record in manifest.files.items()}
            except ArtifactError:
                if _was_replaced(folder, directory):
                    continue
                raise
        return {**contents, MANIFEST: raw}


def read_manifest(directory: Path) -> Manifest:
    """The manifest, after checking it and the list of files, but not the files' contents.

    Raises:
        ArtifactError: as `read_artifact`.
    """
    directory = _located(directory)
    with _opened(directory) as folder:
        return _verified_manifest(folder, directory)[0]


def parse_json(content: bytes, where: str) -> dict[str, Any]:
    """A JSON object from an untrusted file.

    Raises:
        ArtifactError: not UTF-8, not JSON, nested too deeply, a key given twice, a text that no terminal or file should
            be given, or not an object; names `where`.
    """
    try:
        value = json.loads(content.decode("utf-8"), object_pairs_hook=distinct)
    except (ValueError, RecursionError) as error:
        reason = str(error) or type(error).__name__
        raise ArtifactError(f"{where} is not valid JSON ({reason}); restore it or run the recipe again") from None
    if not isinstance(value, dict):
        raise ArtifactError(f"{where} holds a JSON {type(value).__name__} where an object is expected")
    if _is_deeper(value, MAX_DEPTH):
        raise ArtifactError(f"{where} is nested deeper than {MAX_DEPTH} levels; restore it or run the recipe again")
    if (found := unshowable(content, value)) is not None:
        raise ArtifactError(
            f"{where} holds the text {found[:80]!a}, whose control characters would reach your terminal; restore it or "
            "run the recipe again"
        )
    return value


def _is_deeper(value: Any, levels: int) -> bool:
    """Whether lists and objects lie inside each other more than `levels` deep."""
    layer = [value]
    for _ in range(levels):
        containers = (each for each in layer if isinstance(each, (dict, list)))
        layer = [item for each in containers for item in (each.values() if isinstance(each, dict) else each)]
    return any(isinstance(each, (dict, list)) for each in layer)


# Writing


def _write(directory: Path, files: Mapping[str, bytes], kept: Mapping[str, FileRecord], notices: Sequence[str]) -> Path:
    records = {name: FileRecord(hashlib.sha256(content).hexdigest(), len(content)) for name, content in files.items()}
    manifest = _manifest_json({**kept, **records}, notices)
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        with _staging(directory) as staging:
            for name in kept:
                _link(directory / name, staging / name)
            for name, content in {**files, MANIFEST: manifest}.items():
                _write_file(staging / name, content)
            sync_directory(staging)
            _publish(staging, directory)
    except OSError as error:
        raise ArtifactError(
            f"artifact '{directory}' could not be written: {error.strerror or error}; what was there before is "
            "unchanged. Free some space, or choose another output="
        ) from error
    return directory


def _manifest_json(files: Mapping[str, FileRecord], notices: Sequence[str]) -> bytes:
    installed = versions()
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "quantflow": installed.get("quantflow", "not installed"),
        "versions": installed,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "notices": encoded(notices),
        "files": {name: asdict(files[name]) for name in sorted(files)},
    }
    manifest["sha256"] = _digest(manifest)
    return (json.dumps(manifest, indent=2) + "\n").encode()


def _digest(manifest: Mapping[str, Any]) -> str:
    """sha256 of the manifest's canonical JSON, its own digest left out."""
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


@contextmanager
def _staging(directory: Path) -> Iterator[Path]:
    """An empty hidden sibling of `directory`, locked while its writer lives, gone afterwards."""
    _tidy(directory)
    staging, lock = _locked_directory(directory)
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        os.close(lock)


def _locked_directory(directory: Path) -> tuple[Path, int]:
    while True:
        path = _sibling(directory, "staging")
        path.mkdir()
        # Another process may tidy the directory away before it is locked: then make the next one.
        try:
            lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            continue
        with suppress(OSError):  # a file system without locks; nobody can tidy there either
            fcntl.flock(lock, fcntl.LOCK_EX)
        if path.exists():
            return path, lock
        os.close(lock)


def _tidy(directory: Path) -> None:
    """Removes what killed writers left; brings back an artifact that one of them had moved aside."""
    for retired in _siblings(directory, "retired"):
        if directory.exists():
            shutil.rmtree(retired, ignore_errors=True)
        else:
            retired.rename(directory)
    for staging in _siblings(directory, "staging"):
        with suppress(OSError):
            lock = os.open(staging, os.O_RDONLY | os.O_DIRECTORY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails while its writer lives
                shutil.rmtree(staging, ignore_errors=True)
            finally:
                os.close(lock)


def _publish(staging: Path, directory: Path) -> None:
    """Puts `staging` at `directory`; what was there, if anything, is at `staging` afterwards."""
    if staging.parent == directory:
        complete = directory / staging.name.replace("staging", "next")
        staging.rename(complete)
        sync_directory(directory)
        _move_in(complete, directory)
        return
    try:
        staging.rename(directory)  # succeeds where nothing, or an empty directory, is in the way
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        if not _exchange(staging, directory):
            _exchange_in_steps(staging, directory)
    sync_directory(directory.parent)


def _move_in(complete: Path, directory: Path) -> None:
    """Moves complete files into a mount point, the manifest last; can be repeated wherever it was interrupted."""
    arriving = {path.name for path in complete.iterdir()}
    if MANIFEST in arriving:
        listed = parse_json((complete / MANIFEST).read_bytes(), MANIFEST)["files"]
        for name in _written_by_us(directory) - set(listed) - {MANIFEST}:
            (directory / name).unlink(missing_ok=True)
        for name in sorted(arriving - {MANIFEST}):
            source, target = complete / name, directory / name
            if target.exists() and source.samefile(target):
                source.unlink()  # a file that stays: renaming one link of it to another does nothing
            else:
                source.replace(target)
        sync_directory(directory)
        (complete / MANIFEST).replace(directory / MANIFEST)
    complete.rmdir()
    sync_directory(directory)


def _finish(directory: Path) -> None:
    """Moves in what a killed writer had completed inside a mount point."""
    for complete in sorted(directory.glob(".quantflow.next-*")):
        _move_in(complete, directory)


def _exchange_in_steps(staging: Path, directory: Path) -> None:
    """The same with plain renames. In between both are complete; `_located` and `_tidy` know where to look."""
    retired = _sibling(directory, "retired")
    directory.rename(retired)
    try:
        staging.rename(directory)
    except BaseException:
        retired.rename(directory)
        raise
    retired.rename(staging)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:  # a file system without hard links
        _write_file(target, source.read_bytes())


def _write_file(path: Path, content: bytes) -> None:
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _check_names(files: Mapping[str, bytes]) -> None:
    illegal = sorted(name for name in files if not _NAME.fullmatch(name) or name == MANIFEST)
    if illegal:
        raise ArtifactError(
            f"an artifact can't hold a file named {_some(illegal)}: names are letters, digits, '_', '-' and '.', "
            f"without folders, and {MANIFEST} is written by quantflow itself"
        )


def _written_by_us(directory: Path) -> set[str]:
    """Names in `directory` that a write may replace: the files of its manifest, even a damaged artifact's.

    A manifest that can't be read any more may have been another program's; ours lay beside a recipe and its weights.
    """
    try:
        if not stat.S_ISREG((directory / MANIFEST).lstat().st_mode):
            return set()
        with (directory / MANIFEST).open("rb") as file:
            manifest = parse_json(file.read(MAX_MANIFEST_BYTES), MANIFEST)
    except OSError:
        return set()
    except ArtifactError:
        found = {name for name in NAMES if _is_file(directory / name)}
        return found if {RECIPE, WEIGHTS} <= found else set()
    listed = manifest.get("files")
    if not {"format", "quantflow", "created", "sha256"} <= manifest.keys() or not isinstance(listed, dict):
        return set()
    names = {name for name, record in listed.items() if isinstance(record, dict) and "sha256" in record}
    return {name for name in {MANIFEST, *names} if _NAME.fullmatch(name) and _is_file(directory / name)}


def _is_file(path: Path) -> bool:
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except OSError:
        return False


# Reading


@contextmanager
def _opened(directory: Path) -> Iterator[int]:
    try:
        folder = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise ArtifactError(
            f"no artifact at '{directory}' ({error.strerror}); give artifact= the directory that a run wrote"
        ) from None
    try:
        yield folder
    finally:
        os.close(folder)


def _verified_manifest(folder: int, directory: Path) -> tuple[Manifest, bytes]:
    raw = _read(folder, directory, MANIFEST, MAX_MANIFEST_BYTES)
    manifest = _parse_manifest(parse_json(raw, f"artifact '{directory}': {MANIFEST}"), directory)
    found, listed = set(os.listdir(folder)) - {MANIFEST}, set(manifest.files)
    if is_mounted(directory):
        found &= _entries(directory)
    if missing := sorted(listed - found):
        raise _damaged(directory, f"{_some(missing)} missing")
    if extra := sorted(found - listed):
        raise _damaged(directory, f"{_some(extra)} not in its manifest", cure="move what does not belong there")
    return manifest, raw


def _parse_manifest(data: Mapping[str, Any], directory: Path) -> Manifest:
    version, writer = data.get("format"), data.get("quantflow")
    if type(version) is not int or version < 1:
        raise _damaged(directory, f"{MANIFEST} has no usable 'format' (found {version!r})")
    if version > FORMAT:
        raise ArtifactError(
            f"artifact '{directory}' has format {version}, and this quantflow reads formats up to {FORMAT}; "
            f"install quantflow {writer if isinstance(writer, str) else 'of a later version'} or newer"
        )
    created, installed, notices, files = (data.get(key) for key in ("created", "versions", "notices", "files"))
    if not (
        isinstance(writer, str)
        and isinstance(created, str)
        and isinstance(installed, dict)
        and isinstance(notices, list)
        and isinstance(files, dict)
        and len(files) <= MAX_FILES
        and all(isinstance(text, str) for text in (*installed.values(), *notices))
    ):
        raise _damaged(
            directory, f"{MANIFEST} lacks a field, has one of the wrong type, or lists over {MAX_FILES} files"
        )
    records = {name: _parse_record(name, record, directory) for name, record in files.items()}
    if data.get("sha256") != _digest(data):
        raise _damaged(directory, f"{MANIFEST} was changed after it was written (its own sha256 differs)")
    return Manifest(version, writer, installed, created, tuple(notices), records)


def _parse_record(name: str, record: object, directory: Path) -> FileRecord:
    if not _NAME.fullmatch(name) or name == MANIFEST:
        raise _damaged(directory, f"{MANIFEST} lists {name!r}, which is not a plain file name")
    if isinstance(record, dict) and record.keys() == {"sha256", "bytes"}:
        sha256, size = record["sha256"], record["bytes"]
        if isinstance(sha256, str) and _DIGEST.fullmatch(sha256) and type(size) is int and size >= 0:
            return FileRecord(sha256, size)
    raise _damaged(directory, f"{MANIFEST} has no usable sha256 and size for {name}")


def _verified(folder: int, directory: Path, name: str, record: FileRecord) -> bytes:
    if name.endswith(".json") and record.bytes > MAX_JSON_BYTES:
        raise _damaged(directory, f"{name} is {record.bytes} bytes long; JSON may have {MAX_JSON_BYTES}")
    content = _read(folder, directory, name, record.bytes)
    if len(content) != record.bytes:
        raise _damaged(directory, f"{name} has {len(content)} bytes where {record.bytes} were written (truncated)")
    if hashlib.sha256(content).hexdigest() != record.sha256:
        raise _damaged(directory, f"{name} was changed after it was written (its sha256 differs)")
    return content


def _read(folder: int, directory: Path, name: str, limit: int) -> bytes:
    """At most `limit` bytes of a regular file, found inside `folder` without following links."""
    try:
        # O_NONBLOCK: opening a named pipe must not wait for a writer.
        descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
    except FileNotFoundError:
        raise _damaged(directory, f"{name} missing") from None
    except OSError as error:
        what = "is a link" if error.errno == errno.ELOOP else f"can't be opened ({error.strerror})"
        raise _damaged(directory, f"{name} {what}") from None
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise _damaged(directory, f"{name} is not a regular file")
        if status.st_size > limit:
            raise _damaged(directory, f"{name} has {status.st_size} bytes where at most {limit} are expected")
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            return file.read(limit)
    finally:
        os.close(descriptor)


def _was_replaced(folder: int, directory: Path) -> bool:
    """Whether `directory` is no longer the one that was opened, because a writer finished meanwhile."""
    with suppress(OSError):
        return not os.path.samestat(os.fstat(folder), directory.stat())
    return False


def _damaged(
    directory: Path, what: str, cure: str = "restore it from a copy, or run the recipe again"
) -> ArtifactError:
    return ArtifactError(f"artifact '{directory}' is not as it was written: {what}; {cure}")


# Places


def _resolved(directory: Path) -> Path:
    """The real directory, so that a link to an artifact keeps pointing at it when the artifact is replaced."""
    return Path(os.path.realpath(directory))


def _located(directory: Path) -> Path:
    """Where the artifact is: a writer killed between the steps of `_exchange_in_steps` left it in a sibling."""
    directory = _resolved(directory)
    if not directory.exists():
        return next(iter(_siblings(directory, "retired")), directory)
    if is_mounted(directory):
        with suppress(OSError, ArtifactError, LookupError, TypeError):  # then it is found damaged
            _finish(directory)
    return directory


def _sibling(directory: Path, role: str) -> Path:
    name = f"{role}-{secrets.token_hex(8)}"
    if is_mounted(directory):
        return directory / f".quantflow.{name}"
    return directory.with_name(f".{directory.name}.{name}")


def _siblings(directory: Path, role: str) -> list[Path]:
    folder, prefix = directory.parent, f".{directory.name}.{role}-"
    if is_mounted(directory):
        folder, prefix = directory, f".quantflow.{role}-"
    with suppress(OSError):
        return sorted(path for path in folder.iterdir() if path.name.startswith(prefix) and path.is_dir())
    return []


def _some(names: Sequence[str], count: int = 3) -> str:
    shown = ", ".join(repr(name) for name in names[:count])
    return shown + (f" and {len(names) - count} more" if len(names) > count else "")
