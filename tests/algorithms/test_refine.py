"""Algorithms as a part of the whole job: order, modes, results, layers left alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import quantflow as qf
from quantflow.algorithms import GRAPH_ALGORITHMS, NUMBER_ALGORITHMS
from quantflow.ir.batch import Batch
from quantflow.schema import Algorithm, Recipe
from quantflow.schema.algorithms import AlgorithmName

EVERY = [
    {"guard": False} | settings
    for settings in (
        {"name": "equalize"}, {"name": "activation_scale"}, {"name": "clip_weights"},
        {"name": "bias_correction", "method": "full"}, {"name": "gptq"}, {"name": "adaround", "iterations": 20},
        {"name": "batchnorm"},
    )
]  # fmt: skip


def quantize(model: nn.Module, images: list[Batch], **settings: Any) -> Any:
    runtime = "torch" if settings.get("mode") == "torchscript" else "reference"
    return qf.quantize(model, images, runtime=runtime, **settings)


def test_every_name_has_settings_and_a_function_in_one_table() -> None:
    from typing import get_args

    classes = {c.model_fields["name"].default: c for c in get_args(get_args(Algorithm)[0])}
    for table, acts_on in ((GRAPH_ALGORITHMS, "graph"), (NUMBER_ALGORITHMS, "numbers")):
        assert table.keys() == {name for name, c in classes.items() if c.acts_on == acts_on}
    assert set(get_args(AlgorithmName)) == classes.keys()


@pytest.mark.parametrize("mode", ["export", "torchscript", "imperative"])
def test_all_together_in_every_mode(depthwise: nn.Module, images: list[Batch], mode: str) -> None:
    weights = {name: value.clone() for name, value in depthwise.state_dict().items()}
    plain = quantize(depthwise, images, mode=mode)
    model = quantize(depthwise, images, mode=mode, algorithms=EVERY)
    assert plain.results["algorithms"] == []
    section = model.results["algorithms"]
    assert [entry["name"] for entry in section] == [settings["name"] for settings in EVERY]
    assert all(entry["seconds"] >= 0 and entry["measure"] and entry["layers"] for entry in section)
    assert section[3]["settings"]["method"] == "full"
    assert {stage["name"] for stage in model.results["stages"]} >= {entry["name"] for entry in section}
    assert model.results["accuracy"]["sqnr_db"] > plain.results["accuracy"]["sqnr_db"]
    assert model.results["recipe"]["hash"] != plain.results["recipe"]["hash"]
    assert all(torch.equal(value, weights[name]) for name, value in depthwise.state_dict().items()), (
        "float is untouched"
    )


@pytest.mark.parametrize("algorithm", ["equalize", "gptq"])
def test_imperative_modules_hold_the_refined_weights(depthwise: nn.Module, images: list[Batch], algorithm: str) -> None:
    algorithms = [{"name": algorithm, "guard": False}]
    plain, better = (quantize(depthwise, images, mode="imperative", algorithms=a) for a in ("none", algorithms))
    names = [f"module.{name}" for name in ("stem", "depthwise", "project", "expand", "back", "head")]
    assert all(type(better.get_submodule(name)).__name__.startswith("Int8") for name in names)
    before, after = (
        [m.record.program.tensors[n.attrs["weight"]] for n in m.record.program.int8_nodes()] for m in (plain, better)
    )
    assert sum(not torch.equal(a, b) for a, b in zip(before, after, strict=True)) >= 2
    x = images[0].args[0]
    assert torch.isfinite(better(x)).all()


def test_equalized_models_are_compared_layer_by_layer_with_what_was_quantized(
    depthwise: nn.Module, images: list[Batch]
) -> None:
    model = quantize(depthwise, images, algorithms=["equalize"])
    assert min(row["sqnr_db"] for row in model.results["accuracy"]["per_layer"]) > 15


def test_the_artifact_tells_what_was_done(depthwise: nn.Module, images: list[Batch], tmp_path: Path) -> None:
    model = quantize(depthwise, images, algorithms="fast")
    model.save(tmp_path / "artifact")
    recipe = json.loads((tmp_path / "artifact" / "recipe.json").read_text())
    assert (
        recipe["algorithms"]
        == Recipe.from_dict({"model": {"kind": "mnist_cnn"}, "algorithms": "fast"}).to_dict()["algorithms"]
    )
    loaded = qf.load(tmp_path / "artifact", runtime="reference")
    assert torch.equal(loaded(images[0].args[0]), model(images[0].args[0]))


def test_a_layer_can_be_left_alone(depthwise: nn.Module, images: list[Batch]) -> None:
    model = quantize(
        depthwise, images, algorithms=[{"name": "gptq", "guard": False}], layers={"head": {"without": ["gptq"]}}
    )
    (section,) = model.results["algorithms"]
    assert section["skipped"] == [{"layer": "head", "reason": "the recipe says so"}]
