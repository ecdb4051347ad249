"""Texts with the model's tokenizer: the Lee documents that arrive in gensim, or the lines of a file."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch

from quantflow.errors import DataError, found_at
from quantflow.ir.batch import Batch
from quantflow.sources.data.packages import file_in_package
from quantflow.sources.data.preprocess import TextPreprocess
from quantflow.sources.data.samples import Data, Samples, assemble, hash_of, split


def load_lee(
    preprocess: TextPreprocess, max_length: int, calibration: int, evaluation: int, batch_size: int, seed: int
) -> Data:
    """Lee's background documents for calibration (300), his rated documents for evaluation (50).

    Calibration takes `calibration` documents in a row, from document seed * calibration on, around the end.
    The labels are the rows of the human similarity ratings (N, N); only the part above the diagonal is filled.
    Source: Lee, Pincombe & Welsh 2005, "An empirical evaluation of models of text document similarity".
    """
    background = _lee_lines("lee_background.cor")
    documents = _lee_lines("lee.cor")
    ratings = np.loadtxt(io.BytesIO(_lee_file("similarities0-1.txt").read_bytes()), dtype=np.float32)
    notices = [
        f"data=text: Lee has {len(held)} documents for {name} where {asked} were asked for; all are used"
        for name, asked, held in (("calibration", calibration, background), ("evaluation", evaluation, documents))
        if asked > len(held)
    ]
    calibration, evaluation = min(calibration, len(background)), min(evaluation, len(documents))
    start = seed * calibration
    wanted = [(start + i) % len(background) for i in range(calibration)]
    labels = torch.from_numpy(ratings[:evaluation, :evaluation].copy())
    return assemble(
        "text",
        _samples([background[i] for i in wanted], [f"lee_background:{i}" for i in wanted], preprocess, max_length),
        _samples(documents[:evaluation], [f"lee:{i}" for i in range(evaluation)], preprocess, max_length, labels),
        batch_size,
        metric="spearman",
        notices=tuple(notices),
    )


def load_lines(
    path: Path,
    preprocess: TextPreprocess,
    max_length: int,
    calibration: int,
    evaluation: int,
    batch_size: int,
    seed: int,
) -> Data:
    """A seeded choice of a UTF-8 file's lines; blank ones are left out.

    Raises:
        DataError: no such file, not UTF-8 text, or no line in it.
    """
    if not path.is_file():
        raise DataError(f"data.path: {path} is {found_at(path)}, expected a text file")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as problem:
        raise DataError(f"data.path: {path} is not UTF-8 text ({problem.reason} at byte {problem.start})") from problem
    texts = {number: line.strip() for number, line in enumerate(lines, 1) if line.strip()}
    numbers = list(texts)
    chosen, notices = split(len(texts), calibration, evaluation, seed, f"data.path: {path}")

    def samples(positions: tuple[int, ...]) -> Samples:
        own = [numbers[i] for i in positions]
        return _samples([texts[n] for n in own], [f"{path.name}:{n}" for n in own], preprocess, max_length)

    return assemble("text", samples(chosen.calibration), samples(chosen.evaluation), batch_size, notices=notices)


def _samples(
    texts: list[str], ids: list[str], preprocess: TextPreprocess, max_length: int, labels: torch.Tensor | None = None
) -> Samples:
    input_ids, attention_mask = preprocess.encode(texts, max_length)

    def collate(positions: range) -> Batch:
        own = slice(positions.start, positions.stop)
        return Batch((input_ids[own], attention_mask[own]), labels=None if labels is None else labels[own])

    return Samples(tuple(ids), collate, hash_of([input_ids, attention_mask]))


def _lee_lines(name: str) -> list[str]:
    return _lee_file(name).read_text(encoding="latin-1").strip().split("\n")


def _lee_file(name: str) -> Path:
    return file_in_package("gensim", f"test/test_data/{name}", purpose="data=text without a path")
