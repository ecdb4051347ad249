"""quantflow's Python names: what they take, what they give, what they refuse."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import own_models
import pytest
import torch
from torch import nn

import quantflow as qf
from quantflow.errors import (
    ArtifactError,
    CalibrationError,
    DataError,
    NothingQuantizedError,
    RecipeError,
    UnavailableError,
    UsageError,
)
from quantflow.schema import PRESETS
from quantflow.sources.data import Batch

DICT_QCONFIG = {"activation": {"qscheme": "affine", "dtype": "uint8"}, "weight": {"granularity": "per_channel"}}


@pytest.fixture
def module() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).eval()


def batches(count: int = 3, size: int = 4) -> Iterator[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        yield torch.randn(size, 8, generator=generator)


def test_the_public_names() -> None:
    assert qf.__all__ == [
        "PRESETS",
        "CalibrationTable",
        "ObservedModule",
        "QConfig",
        "QuantflowError",
        "QuantizedModel",
        "QuantizedModule",
        "QuantizedParts",
        "QuantizedScript",
        "Recipe",
        "convert",
        "load",
        "load_recipe",
        "prepare",
        "quantize",
        "run",
        "sensitivity",
    ]
    assert all(hasattr(qf, name) for name in qf.__all__)
    assert (Path(qf.__file__).parent / "py.typed").is_file()


def test_takes_what_it_says(module: nn.Module, tmp_path: Path) -> None:
    x = next(batches())
    wanted = qf.quantize(module, list(batches()))(x)
    forms: dict[str, Any] = {
        "a generator": batches(),
        "tuples": [(b,) for b in batches()],
        "Batch objects": [Batch((b,)) for b in batches()],
        "keywords": [{"input": b} for b in batches()],
        "one sample at a time": [row[None] for b in batches() for row in b],
        "a DataLoader": torch.utils.data.DataLoader(torch.cat(list(batches())), batch_size=5),
    }
    for form, given in forms.items():
        y = qf.quantize(module, given)(x)
        # Float sums over one row may round differently, and the ranges with them.
        alike = form == "one sample at a time" and torch.allclose(y, wanted, rtol=0, atol=1e-4)
        assert alike or torch.equal(y, wanted), form
    model = qf.quantize(module, batches(), evaluation=batches(2), gates={"min_sqnr_db": 90}, benchmark=True, seed=3)
    assert model.results["verdict"] == "failed"
    assert model.results["accuracy"]["samples"] == 8
    assert model.results["benchmark"]["configs"]
    assert model.results["calibration"]["samples"] == 12
    model.save(tmp_path / "art")
    assert torch.equal(qf.load(tmp_path / "art")(x), model(x))
    torch.testing.assert_close(qf.load(str(tmp_path / "art"), runtime="reference")(x), model(x))


def test_a_preset_a_dict_and_a_qconfig_say_the_same(module: nn.Module) -> None:
    programs = [
        qf.quantize(module, batches(), qconfig=qconfig).record.program.to_json()
        for qconfig in ("affine_uint8", DICT_QCONFIG, PRESETS["affine_uint8"])
    ]
    assert programs[0] == programs[1] == programs[2]
    assert {value["dtype"] for value in programs[0]["values"].values()} == {"uint8"}


def test_layers_and_modes(module: nn.Module) -> None:
    assert qf.quantize(module, batches(), layers={"2": "float"}).int8_layers() == 1
    scripted = qf.quantize(module, batches(), mode={"kind": "torchscript", "method": "script"})
    assert isinstance(scripted, (torch.jit.ScriptModule, qf.QuantizedScript))
    assert isinstance(qf.quantize(module, batches(), mode="imperative"), qf.QuantizedModule)


def test_a_layer_in_two_terms_is_one_layer(module: nn.Module) -> None:
    layers = {"2": {"input_terms": 2, "weight": {"terms": 2}}}
    model = qf.quantize(module, batches(), layers=layers, algorithms="fast")
    proof = model.results["int8_proof"]
    assert proof["int8_layers_run"] == proof["int8_layers"] == 2
    assert [node.name for node in model.record.program.int8_nodes()] == ["0", "2.low", "2.rest", "2"]


def test_an_exported_program(module: nn.Module) -> None:
    x = torch.cat(list(batches()))
    shapes = ({0: torch.export.Dim.AUTO},)
    program = torch.export.export(module, (x,), dynamic_shapes=shapes)
    assert torch.equal(qf.quantize(program, batches())(x), qf.quantize(module, batches())(x))


def nan() -> list[torch.Tensor]:
    good = list(batches())
    good[1][2, 3] = float("nan")
    return good


REFUSED: dict[str, tuple[Callable[[nn.Module], Any], type[Exception], str]] = {
    "one tensor": (lambda m: qf.quantize(m, torch.zeros(4, 8)), UsageError, r"batches: is one tensor; .*x\.split"),
    "one array": (lambda m: qf.quantize(m, np.zeros((4, 8))), DataError, "from_numpy"),
    "a number": (lambda m: qf.quantize(m, 7), DataError, "batches: found int, expected an iterable"),
    "a string": (lambda m: qf.quantize(m, "photos"), DataError, "batches: found str, expected an iterable"),
    "one dict": (lambda m: qf.quantize(m, {"x": torch.zeros(4, 8)}), DataError, "a single batch goes in a list"),
    "labels among the inputs": (
        lambda m: qf.quantize(m, [(torch.zeros(4, 8), 3)]),
        DataError,
        "model fails on the first batch: .* 2 positional arguments",
    ),
    "no batches": (lambda m: qf.quantize(m, []), DataError, "there are no samples"),
    "an empty generator": (lambda m: qf.quantize(m, batches(0)), DataError, "there are no samples"),
    "no evaluation": (lambda m: qf.quantize(m, batches(), evaluation=[]), DataError, "evaluation"),
    "an empty batch": (lambda m: qf.quantize(m, [torch.zeros(0, 8)]), DataError, "batch 0: holds no sample"),
    "NaN": (lambda m: qf.quantize(m, nan()), DataError, r"NaN in batch 1 \(sample 6\)"),
    "a wrong width": (lambda m: qf.quantize(m, [torch.zeros(4, 9)]), DataError, "model fails on the first batch"),
    "a wrong width later": (
        lambda m: qf.quantize(m, [torch.zeros(4, 8), torch.zeros(4, 9)]),
        DataError,
        r"batch 1 .*dimension 1 of input is 9 and was 8 in the first batch",
    ),
    "a wrong width to evaluate": (
        lambda m: qf.quantize(m, batches(), evaluation=[torch.zeros(4, 9)]),
        DataError,
        "evaluation",
    ),
    "no module": (lambda _: qf.quantize(lambda x: x, batches()), UsageError, "module: is a function; pass an nn.Mod"),
    "a class": (lambda _: qf.quantize(nn.ReLU, batches()), UsageError, "module: is a .*type; pass an nn.Module"),
    "a preset that is none": (
        lambda m: qf.quantize(m, batches(), qconfig="sym_int4"),
        RecipeError,
        "'sym_int4' is not a preset; use sym_int8",
    ),
    "a qconfig's typo": (
        lambda m: qf.quantize(m, batches(), qconfig={"activations": {}}),
        RecipeError,
        "nearest: activation",
    ),
    "a qconfig of numbers": (lambda m: qf.quantize(m, batches(), qconfig=8), UsageError, "qconfig"),
    "an illegal qconfig": (
        lambda m: qf.quantize(m, batches(), qconfig={"weight": {"dtype": "uint8"}}),
        RecipeError,
        "use int8",
    ),
    "a mode that is none": (
        lambda m: qf.quantize(m, batches(), mode="fx"),
        RecipeError,
        "mode.kind: 'fx' is not possible here; .*export",
    ),
    "a layer that is none": (
        lambda m: qf.quantize(m, batches(), layers={"fc": "float"}),
        RecipeError,
        "'fc' matches nothing; nearest names",
    ),
    "a gate that is none": (
        lambda m: qf.quantize(m, batches(), gates={"sqnr": 3}),
        RecipeError,
        "gates.sqnr: no such setting",
    ),
    "a GPU": (lambda m: qf.quantize(m, batches(), device="xpu"), UnavailableError, "devices found: cpu"),
    "CUDA": (lambda m: qf.quantize(m, batches(), device="cuda"), UnavailableError, "'cuda' is not available"),
    "everything float": (lambda m: qf.quantize(m, batches(), layers={"*": "float"}), NothingQuantizedError, "layers"),
    "half precision on float32": (
        lambda m: qf.quantize(m.half(), batches()),
        DataError,
        "model fails on the first batch",
    ),
    "overflow inside": (
        lambda _: qf.quantize(nn.Sequential(nn.Linear(8, 8), Exp(), nn.Linear(8, 2)), [torch.full((2, 8), 1e4)]),
        CalibrationError,
        "gives Inf in batch 0",
    ),
    "an artifact that is none": (lambda _: qf.load("nowhere"), ArtifactError, "no artifact at"),
    "a recipe that is none": (
        lambda _: qf.load_recipe("resnet"),
        RecipeError,
        "'resnet' is not known; nearest: resnet",
    ),
    "a recipe's bad override": (
        lambda _: qf.load_recipe("resnet18_sym_int8", ["seed=x"]),
        RecipeError,
        "seed: found 'x'; must be a whole",
    ),
}


class Exp(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.exp(x * x)


@pytest.mark.parametrize("name", REFUSED)
def test_refuses(name: str, module: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    attempt, kind, message = REFUSED[name]
    with pytest.raises(kind, match=message) as caught:
        attempt(module)
    assert isinstance(caught.value, qf.QuantflowError)
    assert list(tmp_path.iterdir()) == []


def test_saving_where_something_else_is(module: nn.Module, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    for mode in ("export", "torchscript", "imperative"):
        with pytest.raises(ArtifactError, match="would be lost"):
            qf.quantize(module, batches(), mode=mode).save(tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_recipe_from_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "mine.yaml"
    file.write_text(
        "model: {kind: entry, entry: 'own_models:net'}\n"
        "data: {kind: random, shape: [[3, 8, 8]], calibration: 8, evaluation: 4}\n"
        "benchmark: {enabled: false}\nreport: {quiet: true}\n"
    )
    recipe = qf.load_recipe(file, ["seed=2", "mode=torchscript"])
    assert (recipe.name, recipe.seed) == ("mine", 2)
    model = qf.run(recipe)
    assert isinstance(model, torch.jit.ScriptModule)
    again = qf.load("outputs/mine")
    x = own_models.good_batches()[0]
    assert torch.equal(again(x), model(x))
    assert qf.Recipe.from_dict(again.record.recipe) == recipe
