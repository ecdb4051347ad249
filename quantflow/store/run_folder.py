"""What a run that is not finished yet keeps beside its output, so that the next one goes on from there.

    outputs/NAME            the artifact, whole or absent
    outputs/.NAME.work/     products of finished stages, tensors beside their JSON, and the calibration's checkpoint;
                            gone when the run is saved. Where outputs/NAME is a mount point: .quantflow.work in it

Every product says what it depends on. One that does not fit, is damaged or is not ours is not used, and a notice
says so.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from quantflow.host.environment import distribution_version
from quantflow.store.json_values import from_json, to_json
from quantflow.store.places import is_mounted
from quantflow.store.whole_file import read_regular, write_whole

FORMAT = 1
#: Files in the folder that are ours.
_OURS = re.compile(
    r"[a-z_]+(-[0-9a-f]{12})?\.(json|safetensors)|calibration(-\d+-of-\d+)?\.safetensors|\..*\.\d+\.partial"
)
_DAMAGED = "it was changed or damaged after it was written"


class Work:
    """The hidden folder of one run.

    Args:
        destination: where the run's artifact goes.
        key: what everything in the run depends on, such as Recipe.work_key().
        resume: whether to use what is there; otherwise it is thrown away.

    Attributes:
        notices: what the user should hear: what was used, and what was not and why.
        resumed: names of the products that were used.
    """

    def __init__(self, destination: Path, key: str, *, resume: bool = True) -> None:
        inside = is_mounted(destination)
        self.folder = destination / ".quantflow.work" if inside else destination.with_name(f".{destination.name}.work")
        self.notices: list[str] = []
        self.resumed: list[str] = []
        self._key = key
        if not resume:
            self.remove()

    def checkpoint(self, rank: int = 0, count: int = 1) -> Path:
        """Where this worker's calibration saves its table so far."""
        return self.folder / ("calibration.safetensors" if count == 1 else f"calibration-{rank}-of-{count}.safetensors")

    def get(self, name: str, inputs: str) -> dict[str, Any] | None:
        """A product that an earlier run has finished, or None.

        Args:
            name: a word, and after a dash 12 hexadecimal digits where there are several of its kind.
            inputs: what it depends on besides the key; the one given to `put` must be the same.
        """
        found = self.get_tensors(name, inputs)
        return None if found is None else found[0]

    def get_tensors(self, name: str, inputs: str) -> tuple[dict[str, Any], bytes] | None:
        """A product with the file of tensors that `put` was given for it."""
        path, word = self._path(name), name.partition("-")[0]
        if not path.exists():
            return None
        tensors = b""
        try:
            record = from_json(read_regular(path))
            reason = self._misfit(record, inputs)
            content = record.get("content")
            if not reason and record["tensors"] is not None:
                tensors = read_regular(path.with_suffix(".safetensors"))
                reason = "" if hashlib.sha256(tensors).hexdigest() == record["tensors"] else _DAMAGED
        except (OSError, ValueError, TypeError, AttributeError, LookupError, RecursionError) as error:
            reason, content = f"it can't be read ({' '.join(str(error).split())})", None
        if reason or not isinstance(content, dict):
            self.notices.append(f"{word} is computed again: '{path}' does not fit, {reason or 'it holds no product'}")
            return None
        self.notices.append(f"{word} resumed: taken from an earlier run that was interrupted ({path})")
        self.resumed.append(word)
        return content, tensors

    def put(self, name: str, inputs: str, content: Mapping[str, Any], tensors: bytes | None = None) -> None:
        """Keeps a finished product, with a .safetensors file where it has tensors.

        Raises:
            ArtifactError: it can't be written.
        """
        path = self._path(name)
        if tensors is not None:
            write_whole(path.with_suffix(".safetensors"), tensors)
        record = {
            "format": FORMAT,
            "key": self._full_key(inputs),
            "content": content,
            "sha256": _digest(content),
            "tensors": None if tensors is None else hashlib.sha256(tensors).hexdigest(),
        }
        write_whole(path, to_json(record))

    def remove(self) -> None:
        """Takes away what is ours, and the folder where nothing else is in it."""
        with suppress(OSError):
            for path in self.folder.iterdir():
                if _OURS.fullmatch(path.name) and not path.is_dir():
                    path.unlink(missing_ok=True)
            self.folder.rmdir()

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.json"

    def _misfit(self, record: Mapping[str, Any], inputs: str) -> str:
        if record.get("format") != FORMAT:
            return f"its format is {record.get('format')!r}, not {FORMAT}"
        if record.get("key") != self._full_key(inputs):
            return "it belongs to another recipe, model, data, machine or version"
        if record.get("sha256") != _digest(record.get("content")):
            return _DAMAGED
        return ""

    def _full_key(self, inputs: str) -> str:
        version = distribution_version("quantflow") or "not installed"
        return hashlib.sha256(f"{self._key}\n{version}\n{inputs}".encode()).hexdigest()


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
