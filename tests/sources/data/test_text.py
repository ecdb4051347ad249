from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from quantflow.errors import DataError
from quantflow.schema import TextData
from quantflow.sources.data import Data, TextPreprocess, load_data


class Letters:
    """A tokenizer of letters: the ids are code points, padded with 0."""

    def __call__(self, texts: list[str], *, max_length: int, **_: object) -> dict[str, torch.Tensor]:
        ids = torch.tensor([[ord(c) for c in t[:max_length].ljust(max_length, "\0")] for t in texts])
        return {"input_ids": ids, "attention_mask": (ids != 0).long()}


PREPROCESS = TextPreprocess(Letters(), max_length=16, limit=32)


def load(path: Path | None = None, seed: int = 0, **options: int) -> Data:
    return load_data(TextData(path=None if path is None else str(path), **options), PREPROCESS, seed)


def test_lee_documents_with_the_rows_of_their_ratings() -> None:
    data = load(calibration=64, evaluation=50)
    assert data.metric == "spearman"
    assert [len(part) for part in (data.calibration, data.evaluation)] == [4, 4]
    assert data.calibration[0].ids[0] == "lee_background:0"
    assert all(tensor.shape == (16, 16) for tensor in data.calibration[0].args)
    ratings = torch.cat([batch.labels for batch in data.evaluation])
    assert ratings.shape == (50, 50)
    assert ((ratings >= 0) & (ratings <= 1)).all()
    assert ratings.triu(1).any()


def test_fewer_lee_documents_are_rated_among_themselves() -> None:
    data = load(calibration=4, evaluation=5)
    assert torch.cat([b.labels for b in data.evaluation]).shape == (5, 5)


def test_more_than_lee_has_is_a_notice() -> None:
    data = load(calibration=301, evaluation=128)
    assert [n.split(" where")[0] for n in data.notices] == [
        "data=text: Lee has 300 documents for calibration",
        "data=text: Lee has 50 documents for evaluation",
    ]
    assert data.identity["calibration_samples"] == 300


def test_the_seed_moves_lees_calibration_documents() -> None:
    assert load(seed=1, calibration=8).identity["calibration_ids"][0] == "lee_background:8"
    wrapped = load(seed=1, calibration=200).identity["calibration_ids"]
    assert (wrapped[99], wrapped[100], len(set(wrapped))) == ("lee_background:299", "lee_background:0", 200)


def test_lines_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "lines.txt"
    file.write_text("".join(f"line {i}\n\n" for i in range(30)), encoding="utf-8")
    data = load(file, calibration=10, evaluation=12)
    assert data.metric is None
    for batch in (*data.calibration, *data.evaluation):
        for name, ids in zip(batch.ids, batch.args[0], strict=True):
            text = "".join(map(chr, ids.tolist())).rstrip("\0")
            assert text == f"line {(int(name.split(':')[1]) - 1) // 2}"
    assert not set(data.identity["calibration_ids"]) & set(data.identity["evaluation_ids"])
    assert load(file, seed=1, calibration=10).identity["ids_sha256"] != data.identity["ids_sha256"]


def test_max_length_is_the_recipes_then_the_models() -> None:
    assert load(max_length=24, calibration=1, evaluation=1).calibration[0].args[0].shape == (1, 24)
    with pytest.raises(DataError, match="33 is longer than the 32 tokens"):
        load(max_length=33)


def test_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="missing, expected a text file"):
        load(tmp_path / "nowhere.txt")
    (tmp_path / "blank.txt").write_text("\n \n")
    with pytest.raises(DataError, match="holds no sample"):
        load(tmp_path / "blank.txt")
    (tmp_path / "binary.txt").write_bytes(b"abc\xff\xfe")
    with pytest.raises(DataError, match=r"not UTF-8 text .* at byte 3"):
        load(tmp_path / "binary.txt")
    with pytest.raises(DataError, match="needs a model with a tokenizer"):
        load_data(SimpleNamespace(kind="text"), None, 0)  # type: ignore[arg-type]
