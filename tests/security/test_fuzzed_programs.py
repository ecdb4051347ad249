"""Programs of the fuzzer's corpus: what they compute natively is what the reference computes, node by node."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from native.fuzz.compare import compare, read

CORPUS = sorted(Path("native/fuzz/corpus").glob("grammar_*"))


def test_there_are_some() -> None:
    assert len(CORPUS) >= 30


@pytest.mark.parametrize("file", CORPUS, ids=lambda file: file.name)
def test_natively_as_by_the_reference(file: Path) -> None:
    assert compare(read(file)) == []


@pytest.mark.parametrize("file", sorted(Path("native/fuzz/corpus").iterdir()), ids=lambda file: file.name)
def test_a_file_of_the_corpus_is_what_the_targets_read(file: Path) -> None:
    data = file.read_bytes()
    (length,) = struct.unpack_from("<I", data)
    assert data[4:5] == b"{"
    assert data[3 + length : 4 + length] == b"}"
