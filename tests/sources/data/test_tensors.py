from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from quantflow.errors import DataError
from quantflow.schema import RandomData, TensorsData
from quantflow.sources.data import Data, load_data


def load(path: Path, seed: int = 0, **options: Any) -> Data:
    spec = TensorsData(path=str(path), **{"calibration": 3, "evaluation": 4, "batch_size": 2} | options)
    return load_data(spec, None, seed)


def store(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return store(tmp_path / "x.npz", x=np.arange(20.0).reshape(10, 2), y=np.arange(10))


def test_one_input_is_positional_float32_and_follows_its_rows(file: Path) -> None:
    data = load(file, label_key="y")
    assert data.metric == "top1"
    for batch in (*data.calibration, *data.evaluation):
        assert batch.args[0].dtype == torch.float32
        rows = [int(name.removeprefix("x.npz[").removesuffix("]")) for name in batch.ids]
        assert batch.args[0].tolist() == [[2 * i, 2 * i + 1] for i in rows]
        assert batch.labels.tolist() == rows
    assert not set(data.identity["calibration_ids"]) & set(data.identity["evaluation_ids"])


def test_several_inputs_are_keywords_unless_ordered(file: Path) -> None:
    assert set(load(file).calibration[0].kwargs) == {"x", "y"}
    ordered = load(file, input_keys=("y", "x")).calibration[0]
    assert (ordered.args[0].dim(), ordered.args[1].dim(), ordered.kwargs) == (1, 2, {})


def test_safetensors_and_a_file_of_its_own_for_evaluation(file: Path, tmp_path: Path) -> None:
    save_file({"x": torch.full((5, 2), 7.0)}, tmp_path / "e.safetensors")
    data = load(file, evaluation_path=str(tmp_path / "e.safetensors"), input_keys=("x",), evaluation=9)
    assert [b.args[0].unique().tolist() for b in data.evaluation] == [[7.0]] * 3
    assert "holds 5 samples where 9 were asked for" in data.notices[0]


def test_seed_and_content_are_in_the_record(file: Path, tmp_path: Path) -> None:
    first = load(file)
    assert load(file).identity == first.identity
    assert load(file, seed=1).identity["ids_sha256"] != first.identity["ids_sha256"]
    store(tmp_path / "x.npz", x=np.ones((10, 2)), y=np.arange(10))
    assert load(file).identity["content_sha256"] != first.identity["content_sha256"]


@pytest.mark.parametrize(("value", "found"), [(np.nan, "NaN"), (-np.inf, "Inf")])
def test_what_is_not_finite_is_named(tmp_path: Path, value: float, found: str) -> None:
    x = np.zeros((6, 2))
    x[4, 1] = value
    path = store(tmp_path / "x.npz", pixels=x)
    with pytest.raises(DataError, match=rf"array 'pixels': sample 4 holds {found} \(1 of 6"):
        load(path)


def test_wrong_keys_list_the_legal_ones(file: Path) -> None:
    with pytest.raises(DataError, match=r"no array 'z' .* it holds: x, y; nearest"):
        load(file, input_keys=("z",))
    with pytest.raises(DataError, match="no array 'labels'"):
        load(file, label_key="labels")


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": np.zeros((3, 2)), "y": np.zeros(4)}, r"must agree; found shapes 'x' \(3, 2\), 'y' \(4,\)"),
        ({"x": np.float32(3.0)}, r"must agree; found shapes 'x' \(\)"),
        ({"x": np.zeros((0, 2))}, "holds no sample"),
        ({"x": np.array([{}, None], dtype=object)}, "array 'x' can't be used .* never loaded"),
        ({"x": np.array(["a", "b"])}, "array 'x' can't be used"),
        ({}, "holds no input array"),
    ],
)
def test_arrays_that_can_not_be_used(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    path = store(tmp_path / "x.npz", **arrays)
    with pytest.raises(DataError, match=message):
        load(path)


def test_labels_are_class_indices(tmp_path: Path) -> None:
    path = store(tmp_path / "x.npz", x=np.zeros((9, 2)), y=np.linspace(0, 1, 9))
    with pytest.raises(DataError, match="labels are class indices"):
        load(path, label_key="y")
    column = store(tmp_path / "c.npz", x=np.zeros((9, 2)), y=np.arange(9.0)[:, None])
    assert load(column, label_key="y").calibration[0].labels.dtype == torch.int64


@pytest.mark.parametrize("name", ["x.npz", "x.safetensors"])
def test_missing_and_broken_files(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match=f"{name} is missing"):
        load(tmp_path / name)
    (tmp_path / name).write_bytes(b"PK\x03\x04 half an archive")
    with pytest.raises(DataError, match="can't be read"):
        load(tmp_path / name)


def test_a_bare_array_is_no_archive(tmp_path: Path) -> None:
    with (tmp_path / "x.npz").open("wb") as stream:
        np.save(stream, np.zeros(3))
    with pytest.raises(DataError, match=r"write it with numpy.savez"):
        load(tmp_path / "x.npz")


def random(seed: int = 0, **options: Any) -> Data:
    return load_data(RandomData(**{"shape": [[3, 4]], "calibration": 5, "evaluation": 5} | options), None, seed)


def test_random_samples_depend_on_seed_and_number_only() -> None:
    first = torch.cat([b.args[0] for b in random(batch_size=2).calibration])
    more = torch.cat([b.args[0] for b in random(calibration=8).calibration])
    assert torch.equal(first, more[:5])
    assert not torch.equal(first, random(seed=1).calibration[0].args[0])
    assert not torch.equal(first, random().evaluation[0].args[0])
    assert "say nothing about real inputs" in random().notices[0]


def test_random_shapes_and_integers() -> None:
    batch = random(shape=[[3], [2, 2]], dtype="int64").calibration[0]
    assert [tuple(x.shape) for x in batch.args] == [(5, 3), (5, 2, 2)]
    assert {int(v) for x in batch.args for v in x.unique()} == {0, 1}
