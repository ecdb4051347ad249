"""The `algorithms:` section: presets, lists, and what is wrong with them."""

from __future__ import annotations

from typing import Any, get_args

import pytest

from quantflow.config.compose import load_recipe
from quantflow.errors import RecipeError
from quantflow.schema import ALGORITHM_PRESETS, Algorithm, BiasCorrectionAlgorithm, EqualizeAlgorithm, Recipe
from quantflow.schema.algorithms import AlgorithmName

MODEL = {"kind": "mnist_cnn"}
CLASSES = get_args(get_args(Algorithm)[0])


def recipe(algorithms: Any, **more: Any) -> Recipe:
    return Recipe.from_dict({"model": MODEL, "algorithms": algorithms, **more})


@pytest.mark.parametrize("preset", ALGORITHM_PRESETS)
def test_a_preset_is_written_out_in_the_recipe(preset: str) -> None:
    asked = recipe(preset)
    written = asked.to_dict()["algorithms"]
    assert [entry["name"] for entry in written] == [entry["name"] for entry in ALGORITHM_PRESETS[preset]]
    assert all(len(entry) > 1 for entry in written if entry["name"] != "clip_weights"), "settings are written out, too"
    assert Recipe.from_dict(asked.to_dict()) == asked
    assert load_recipe("mnist_cnn_sym_int8", [f"algorithms={preset}"]).algorithms == asked.algorithms


def test_a_list_keeps_its_order_and_a_bare_name_takes_the_defaults() -> None:
    asked = recipe([{"name": "bias_correction", "method": "full"}, "equalize"])
    assert asked.algorithms == (BiasCorrectionAlgorithm(method="full"), EqualizeAlgorithm())


def test_every_algorithm_can_be_left_out_of_a_layer() -> None:
    assert set(get_args(AlgorithmName)) == {c.model_fields["name"].default for c in CLASSES}
    layers = {"fc": {"without": [*get_args(AlgorithmName), "all"]}}
    assert recipe("none", layers=layers).to_dict()["layers"]["fc"]["without"] == layers["fc"]["without"]


@pytest.mark.parametrize(
    ("algorithms", "helps"),
    [
        ("quick", r"algorithms: found 'quick'; must be one of none, fast, accurate, best, or a list"),
        ([{"name": "equalise"}], r"algorithms\.0\.name: 'equalise' is not possible here; nearest: equalize"),
        ([{"samples": 3}], r"algorithms\.0\.name: is required"),
        (["equalize", {"name": "gptq", "sweps": 1}], r"algorithms\.1\.sweps: no such setting; nearest: sweeps"),
        ([{"name": "gptq", "samples": 0}], r"algorithms\.0\.samples: found 0; must be at least 1"),
        (7, r"algorithms: found 7; must be a list"),
    ],
)
def test_what_is_wrong_is_said_with_the_legal_choices(algorithms: Any, helps: str) -> None:
    with pytest.raises(RecipeError, match=helps):
        recipe(algorithms)


def test_calibration_depends_on_what_happens_before_it_and_on_nothing_else() -> None:
    keys = {str(a): recipe(a).calibration_key() for a in ("none", ["gptq"], ["equalize"])}
    assert keys["none"] == keys["['gptq']"] != keys["['equalize']"]
    assert recipe("none").hash() != recipe(["gptq"]).hash()
