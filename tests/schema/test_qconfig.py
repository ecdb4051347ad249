from __future__ import annotations

import itertools
from typing import Any

import pytest

from quantflow.errors import RecipeError
from quantflow.schema import PRESETS, LayerOverride, QConfig, Recipe

MODEL = {"kind": "torchvision", "name": "resnet18"}

ACTIVATION = {
    "dtype": ["int8", "uint8"],
    "qscheme": ["symmetric", "affine"],
    "granularity": ["per_tensor"],
    "observer": ["minmax", "moving_average", "histogram", "percentile", "mse", "entropy"],
}
WEIGHT = {
    "dtype": ["int8"],
    "qscheme": ["symmetric"],
    "granularity": ["per_tensor", "per_channel"],
    "observer": ["minmax", "mse", "percentile"],
}
ILLEGAL = {
    "activation": {"dtype": "int4", "qscheme": "asymmetric", "granularity": "per_channel", "observer": "kl"},
    "weight": {"dtype": "uint8", "qscheme": "affine", "granularity": "per_group", "observer": "histogram"},
}


def combinations(table: dict[str, list[str]]) -> list[dict[str, str]]:
    return [dict(zip(table, values, strict=True)) for values in itertools.product(*table.values())]


@pytest.mark.parametrize("activation", combinations(ACTIVATION))
@pytest.mark.parametrize("weight", combinations(WEIGHT))
@pytest.mark.parametrize("reduce_range", ["auto", True, False])
def test_every_legal_qconfig_is_kept_as_written(activation: Any, weight: Any, reduce_range: Any) -> None:
    written = {"activation": activation, "weight": weight, "reduce_range": reduce_range}
    recipe = Recipe.from_dict({"model": MODEL, "qconfig": written})
    kept = recipe.to_dict()["qconfig"]
    assert activation.items() <= kept["activation"].items()
    assert weight.items() <= kept["weight"].items()
    assert kept["reduce_range"] is reduce_range or kept["reduce_range"] == "auto" == reduce_range


@pytest.mark.parametrize(
    ("section", "field", "value"),
    [(section, field, value) for section, fields in ILLEGAL.items() for field, value in fields.items()],
)
def test_anything_else_is_refused_with_the_legal_choices(section: str, field: str, value: str) -> None:
    legal = (ACTIVATION if section == "activation" else WEIGHT)[field]
    with pytest.raises(RecipeError) as caught:
        Recipe.from_dict({"model": MODEL, "qconfig": {section: {field: value}}})
    (problem,) = caught.value.problems
    assert problem.where == f"qconfig.{section}.{field}"
    assert f"'{value}' is not possible here" in problem.message
    assert all(choice in problem.message for choice in legal)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("activation.percentile", 50, "must be more than 50"),
        ("activation.percentile", 100.5, "must be at most 100"),
        ("activation.averaging_constant", 0, "must be more than 0"),
        ("activation.averaging_constant", True, "must be a number"),
        ("activation.averaging_constant", float("nan"), "must be a finite number"),
        ("weight.percentile", "99", "must be a number"),
        ("reduce_range", 1, "use auto, true or false"),
        ("reduce_range", "yes", "use auto, true or false"),
        ("activation", None, "must be a mapping with keys of: dtype"),
        ("weigth", {}, "nearest: weight"),
    ],
)
def test_values_out_of_bounds(path: str, value: object, message: str) -> None:
    *parents, last = path.split(".")
    settings: dict[str, Any] = {last: value}
    for part in reversed(parents):
        settings = {part: settings}
    with pytest.raises(RecipeError) as caught:
        Recipe.from_dict({"model": MODEL, "qconfig": settings})
    (problem,) = caught.value.problems
    assert problem.where == f"qconfig.{path}"
    assert message in problem.message


def test_presets_cover_both_schemes_and_dtypes() -> None:
    pairs = {(preset.activation.qscheme, preset.activation.dtype) for preset in PRESETS.values()}
    assert pairs == set(itertools.product(["symmetric", "affine"], ["int8", "uint8"]))
    assert PRESETS["sym_int8"] == QConfig()


def test_an_override_replaces_only_the_fields_it_gives() -> None:
    override = LayerOverride.model_validate(
        {"activation": {"observer": "percentile", "percentile": 99.0}, "weight": {"granularity": "per_tensor"}}
    )
    base = PRESETS["affine_uint8"]
    changed = override.apply(base)
    assert (changed.activation.dtype, changed.activation.qscheme) == ("uint8", "affine")
    assert (changed.activation.observer, changed.activation.percentile) == ("percentile", 99.0)
    assert (changed.weight.granularity, changed.weight.observer) == ("per_tensor", "minmax")
    assert LayerOverride().apply(base) == base
