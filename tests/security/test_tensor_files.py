"""A .safetensors file that gives a name twice: each reader might take another tensor, so none of ours takes any."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from quantflow.errors import ArtifactError, DataError, ModelError
from quantflow.schema import TensorsData, TransformersModel
from quantflow.sources.data import load_data
from quantflow.sources.models import load_model
from quantflow.sources.models.weights import load_state
from quantflow.stages.calibrate import CalibrationTable
from quantflow.stages.record import Record
from quantflow.store.artifact import NAMES, WEIGHTS, write_artifact
from quantflow.store.tensor_header import require_distinct, require_distinct_file

CODES = '{"dtype":"I32","shape":[2],"data_offsets":[0,8]}'
REALS = '{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'


def file_of(header: str) -> bytes:
    return len(header).to_bytes(8, "little") + header.encode() + bytes(8)


TWICE = file_of(f'{{"a":{REALS},"a":{CODES}}}')


@pytest.mark.parametrize(
    ("header", "name"),
    [
        (f'{{"a":{REALS},"a":{CODES}}}', "a"),
        (f'{{"a":{REALS},"\\u0061":{CODES}}}', "a"),
        ('{"a":{"dtype":"F32","shape":[2],"shape":[1,2],"data_offsets":[0,8]}}', "shape"),
        ('{"__metadata__":{"k":"1","k":"2"}}', "k"),
    ],
)
def test_a_name_that_is_given_twice(header: str, name: str) -> None:
    with pytest.raises(SafetensorError, match=f"in the .safetensors header key '{name}' is given twice"):
        require_distinct(file_of(header))


def test_the_reader_itself_takes_one_of_the_two() -> None:
    assert load(TWICE)["a"].dtype in (torch.int32, torch.float32)


@pytest.mark.parametrize("content", [b"", b"\x01", b"\xff" * 64, file_of("[" * 100_000), file_of("no JSON")])
def test_other_damage_is_left_to_the_reader(content: bytes, tmp_path: Path) -> None:
    require_distinct(content)
    (tmp_path / "x.safetensors").write_bytes(content)
    require_distinct_file(tmp_path / "x.safetensors")


def in_an_artifact(folder: Path) -> None:
    write_artifact(folder / "a", {name: b"{}" for name in NAMES[:-1]} | {WEIGHTS: TWICE})
    Record.load(folder / "a")


def as_a_calibration_table(_: Path) -> None:
    CalibrationTable.from_bytes(TWICE, "calibration.safetensors")


def as_weights(folder: Path) -> None:
    load_state(folder / "x.safetensors")


def as_data(folder: Path) -> None:
    load_data(TensorsData(path=str(folder / "x.safetensors"), calibration=1, evaluation=1), None, 0)


def in_a_model_directory(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "bert", "num_hidden_layers": 1}))
    load_model(TransformersModel(path=str(folder)), 0)


@pytest.mark.parametrize(
    ("read", "error", "where"),
    [
        (in_an_artifact, ArtifactError, "weights.safetensors' is damaged"),
        (as_a_calibration_table, ArtifactError, "calibration.safetensors: not a calibration table"),
        (as_weights, ModelError, "model.weights: "),
        (as_data, DataError, "data.path: "),
        (in_a_model_directory, ModelError, "model.path: "),
    ],
)
def test_every_reader_refuses_it(
    read: Callable[[Path], None], error: type[Exception], where: str, tmp_path: Path
) -> None:
    (tmp_path / "x.safetensors").write_bytes(TWICE)
    with pytest.raises(error, match=f"{re.escape(where)}.*key 'a' is given twice"):
        read(tmp_path)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(save({"a": torch.ones(2), "b": torch.zeros(1)}, {"k": "v"}))
    assert load_state(tmp_path / "x.safetensors").keys() == {"a", "b"}
