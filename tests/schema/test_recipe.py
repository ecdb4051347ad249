from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from quantflow.errors import EXIT_USAGE, RecipeError
from quantflow.schema import OBJECTIVES, Recipe

MODEL = {"kind": "torchvision", "name": "resnet18"}

NAMES = st.from_regex(r"[A-Za-z][A-Za-z0-9_]{0,11}", fullmatch=True)
PATHS = st.from_regex(r"[a-z/_.]{1,12}", fullmatch=True)
COUNTS = st.integers(1, 1000)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-1000, 1000) | st.floats(allow_nan=False, allow_infinity=False) | NAMES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=6,
)
ENTRIES = st.builds("{}.{}:{}".format, NAMES, NAMES, NAMES)
WEIGHTS = st.sampled_from(["pretrained", "random", "auto", "weights/own.safetensors", "own.pt"])
SAMPLES = {"calibration": COUNTS, "evaluation": COUNTS, "batch_size": COUNTS}
ACTIVATION = {
    "dtype": st.sampled_from(["int8", "uint8"]),
    "qscheme": st.sampled_from(["symmetric", "affine"]),
    "observer": st.sampled_from(["minmax", "moving_average", "histogram", "percentile", "mse", "entropy"]),
    "averaging_constant": st.floats(0, 1, exclude_min=True),
    "percentile": st.floats(50, 100, exclude_min=True) | st.integers(51, 100),
}
TERMS = st.sampled_from([1, 2])
WEIGHT = {
    "granularity": st.sampled_from(["per_tensor", "per_channel"]),
    "observer": st.sampled_from(["minmax", "mse", "percentile"]),
    "terms": TERMS,
}


def some(**fields: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({}, optional=fields)


def kind(name: str, required: dict[str, st.SearchStrategy[Any]], **optional: st.SearchStrategy[Any]) -> Any:
    return st.fixed_dictionaries({"kind": st.just(name), **required}, optional=optional)


MODELS = st.one_of(
    kind("torchvision", {"name": NAMES}, weights=WEIGHTS, num_classes=COUNTS),
    kind("transformers", {"path": PATHS}, task=st.sampled_from(["embedding", "classification", "base"])),
    kind("transformers", {"package": NAMES}, max_length=COUNTS),
    kind("efficientnet_lite0", {}, weights=WEIGHTS),
    kind("minilm", {}, max_length=st.integers(1, 512)),
    kind("mnist_cnn", {}, weights=WEIGHTS),
    kind("scriptmodule", {"path": PATHS}),
    kind("exported", {"path": PATHS}),
    kind("entry", {"entry": ENTRIES}, kwargs=st.dictionaries(NAMES, JSON, max_size=3)),
)
DATA = st.one_of(
    kind("photos", {}, size=COUNTS, **SAMPLES),
    kind("folder", {"path": PATHS}, **SAMPLES),
    kind("mnist", {}, **SAMPLES),
    kind("text", {}, path=PATHS, max_length=COUNTS),
    kind("tensors", {"path": st.just("x.npz")}, input_keys=st.lists(NAMES, min_size=1, max_size=3), label_key=NAMES),
    kind("random", {}, shape=st.lists(st.lists(COUNTS, max_size=4), min_size=1, max_size=3)),
    kind("entry", {"entry": ENTRIES}, kwargs=st.dictionaries(NAMES, JSON, max_size=3)),
)
LAYERS = st.dictionaries(
    st.text(min_size=1, max_size=12),
    st.sampled_from(["float", "int8"]) | some(activation=some(**ACTIVATION), weight=some(**WEIGHT), input_terms=TERMS),
    max_size=4,
)
FRACTIONS = st.floats(0, 1) | st.sampled_from([0, 1]) | st.none()
RECIPES = st.fixed_dictionaries(
    {"model": MODELS},
    optional={
        "name": NAMES,
        "description": st.text(max_size=20),
        "task": st.sampled_from(["run", "plan"]),
        "output": PATHS,
        "resume": st.booleans(),
        "seed": st.integers(0, 2**31 - 1),
        "data": DATA,
        "qconfig": some(
            activation=some(**ACTIVATION),
            weight=some(**WEIGHT),
            input_terms=TERMS,
            reduce_range=st.sampled_from(["auto", True, False]),
        ),
        "layers": LAYERS,
        "mode": some(kind=st.just("torchscript"), method=st.just("trace")),
        "runtime": some(kind=st.sampled_from(["auto", "native", "torch", "reference"])),
        "device": some(kind=st.sampled_from(["auto", "cpu", "cuda", "xpu"])),
        "calibrate": some(resume=st.booleans(), checkpoint_every_s=st.floats(0, 100)),
        "warmup": some(iterations=COUNTS, min_sqnr_db=st.floats(0, 100)),
        "evaluate": some(enabled=st.booleans(), per_layer=st.booleans()),
        "benchmark": some(batch_sizes=st.lists(COUNTS, min_size=1, max_size=4, unique=True), rounds=COUNTS),
        "gates": some(min_sqnr_db=st.floats(-100, 100), max_accuracy_drop=FRACTIONS, min_int8_coverage=FRACTIONS),
        "sweep": some(objectives=st.lists(st.sampled_from(list(OBJECTIVES)), min_size=1, max_size=4)),
        "sensitivity": some(samples=COUNTS),
        "tune": some(
            subject_to=some(min_agreement=FRACTIONS, min_cosine=FRACTIONS, min_sqnr_db=st.floats(-100, 100)),
            qconfigs=st.lists(st.sampled_from(["sym_int8", "affine_uint8"]), max_size=2),
            algorithms=st.lists(st.sampled_from(["fast", "accurate", "best"]), max_size=2),
            observers=st.lists(st.sampled_from(["minmax", "mse", "percentile"]), max_size=2),
            time_budget_s=st.floats(1, 1e6),
        ),
        "report": some(graph_dump=st.booleans(), quiet=st.booleans()),
    },
)


@settings(deadline=None, max_examples=150)
@given(RECIPES)
def test_recipe_to_dict_and_back_by_way_of_json_and_yaml(written: dict[str, Any]) -> None:
    recipe = Recipe.from_dict(written)
    for copy in (
        recipe.to_dict(),
        json.loads(json.dumps(recipe.to_dict())),
        yaml.safe_load(yaml.safe_dump(recipe.to_dict(), sort_keys=False)),
    ):
        again = Recipe.from_dict(copy)
        assert again == recipe
        assert (again.hash(), again.calibration_key()) == (recipe.hash(), recipe.calibration_key())


def test_defaults_are_the_documented_ones() -> None:
    recipe = Recipe.from_dict({"model": MODEL})
    assert (recipe.data.kind, recipe.data.calibration, recipe.data.evaluation, recipe.data.batch_size) == (
        "photos",
        64,
        128,
        16,
    )
    assert (recipe.mode.kind, recipe.runtime.kind, recipe.device.kind) == ("export", "auto", "auto")
    assert (recipe.warmup.iterations, recipe.benchmark.batch_sizes, recipe.benchmark.rounds) == (3, (1,), 7)
    assert set(recipe.gates.model_dump().values()) == {None}


def test_a_recipe_is_frozen() -> None:
    recipe = Recipe.from_dict({"model": MODEL})
    with pytest.raises(ValidationError, match="frozen"):
        recipe.seed = 1  # type: ignore[misc]


BAD: list[tuple[dict[str, Any], str, str]] = [
    ({"mdoel": MODEL}, "mdoel", "nearest: model"),
    ({}, "model", "is required; choose one"),
    ({"model": {"kind": "torchvison"}}, "model.kind", "nearest: torchvision"),
    ({"model": {"name": "resnet18"}}, "model.kind", "is required; legal: torchvision"),
    ({"model": "resnet18"}, "model", "must be a mapping with kind: torchvision"),
    ({"model": {"kind": "torchvision"}}, "model.name", "is required and not given"),
    ({"model": MODEL | {"wieghts": "auto"}}, "model.wieghts", "nearest: weights"),
    ({"model": MODEL | {"weights": "pretraned"}}, "model.weights", "must be pretrained, random, auto, or a"),
    ({"model": MODEL | {"num_classes": 0}}, "model.num_classes", "must be at least 1"),
    ({"model": {"kind": "entry", "entry": "os.system"}}, "model.entry", "must be written as package.module:callable"),
    ({"model": {"kind": "transformers"}}, "model", "give exactly one of path"),
    ({"model": {"kind": "transformers", "path": "a", "package": "b"}}, "model", "give exactly one of path"),
    ({"model": {"kind": "minilm", "max_length": 513}}, "model.max_length", "must be at most 512"),
    ({"data": {"kind": "photo"}}, "data.kind", "nearest: photos"),
    ({"data": {"kind": "folder"}}, "data.path", "is required and not given"),
    ({"data": {"kind": "photos", "calibration": 0}}, "data.calibration", "must be at least 1"),
    ({"data": {"kind": "photos", "calibration": True}}, "data.calibration", "found true; must be a whole number"),
    ({"data": {"kind": "photos", "batch_size": 1.5}}, "data.batch_size", "must be a whole number"),
    ({"data": {"kind": "tensors", "path": "x.pkl"}}, "data.path", "must be a .npz or .safetensors file"),
    ({"data": {"kind": "random", "shape": []}}, "data.shape", "must be a list of at least 1"),
    ({"data": {"kind": "random", "shape": [[3, 0]]}}, "data.shape.0.1", "must be at least 1"),
    ({"layers": {"fc": "flaot"}}, "layers.fc", "use float or int8"),
    ({"layers": {"fc": 8}}, "layers.fc", "must be float, int8, or a mapping with keys of: activation, weight"),
    ({"layers": {"fc": {"activation": {"obsrver": "mse"}}}}, "layers.fc.activation.obsrver", "nearest: observer"),
    ({"layers": {"layer4": {"0": "float"}}}, "layers.layer4.0", "as in layers={a.b: float}"),
    ({"mode": {"kind": "jit"}}, "mode.kind", "legal: export, torchscript, imperative"),
    ({"mode": {"method": "script"}}, "mode.method", "possible in mode=torchscript only"),
    ({"runtime": {"kind": "onnx"}}, "runtime.kind", "legal: auto, native, torch, triton, reference"),
    ({"device": {"kind": "tpu"}}, "device.kind", "legal: auto, cpu, cuda, xpu"),
    ({"benchmark": {"batch_sizes": []}}, "benchmark.batch_sizes", "at least 1"),
    ({"benchmark": {"batch_sizes": [1, 1]}}, "benchmark.batch_sizes", "listed twice"),
    ({"benchmark": {"batch_sizes": [1, 0]}}, "benchmark.batch_sizes.1", "must be at least 1"),
    ({"gates": {"min_sqnr_db": float("inf")}}, "gates.min_sqnr_db", "must be a finite number"),
    ({"gates": {"max_accuracy_drop": 2}}, "gates.max_accuracy_drop", "must be at most 1"),
    ({"evaluate": {"enabled": "yes"}}, "evaluate.enabled", "must be true or false"),
    ({"seed": -1}, "seed", "must be at least 0"),
    ({"name": "../elsewhere"}, "name", "must be a file name"),
    ({"task": "bench"}, "task", "nearest: benchmark"),
    ({"task": "report"}, "artifact", "needs the folder that a run wrote"),
    ({"artifact": "dir"}, "artifact", "leave artifact out"),
    ({"_target_": "os.system"}, "_target_", "no such setting"),
]


@pytest.mark.parametrize(
    ("written", "where", "message"), BAD, ids=[f"{where}-{i}" for i, (_, where, _) in enumerate(BAD)]
)
def test_a_bad_recipe_names_place_and_cure(written: dict[str, Any], where: str, message: str) -> None:
    complete = (
        written if where in ("mdoel", "model", "model.kind") or "model" in written else {"model": MODEL} | written
    )
    with pytest.raises(RecipeError) as caught:
        Recipe.from_dict(complete, "mine")
    assert caught.value.exit_code == EXIT_USAGE
    found = {problem.where: problem.message for problem in caught.value.problems}
    assert message in found[where]
    assert str(caught.value).startswith("recipe 'mine' can't run (")


def test_every_problem_at_once_and_no_consequences() -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe.from_dict(
            {
                "model": {"kind": "torchvision", "nmae": "x"},
                "mode": {"method": "script"},
                "data": {"kind": "random", "shape": [[0]]},
            }
        )
    places = [problem.where for problem in caught.value.problems]
    assert sorted(places) == ["data.shape.0.0", "mode.method", "model.name", "model.nmae"]


def test_built_directly_the_fields_must_fit_together_too() -> None:
    with pytest.raises(ValidationError, match="needs the folder that a run wrote"):
        Recipe(task="report")
    assert Recipe(task="report", artifact="dir").model is None


CHANGES: list[tuple[dict[str, Any], bool]] = [
    ({"seed": 1}, True),
    ({"model": MODEL | {"weights": "random"}}, True),
    ({"data": {"kind": "photos", "calibration": 8}}, True),
    ({"qconfig": {"activation": {"observer": "mse"}}}, True),
    ({"layers": {"fc": "float"}}, True),
    ({"mode": {"kind": "imperative"}}, True),
    ({"gates": {"min_speedup": 2.0}}, False),
    ({"benchmark": {"rounds": 3}}, False),
    ({"report": {"quiet": True}}, False),
    ({"output": "elsewhere"}, False),
    ({"device": {"kind": "cpu"}}, False),
]


@pytest.mark.parametrize(("change", "calibrates_anew"), CHANGES)
def test_the_keys_follow_what_they_stand_for(change: dict[str, Any], calibrates_anew: bool) -> None:
    base, changed = Recipe.from_dict({"model": MODEL}), Recipe.from_dict({"model": MODEL} | change)
    assert changed.hash() != base.hash()
    assert (changed.calibration_key() != base.calibration_key()) is calibrates_anew


def test_the_order_of_layers_counts() -> None:
    orders = [{"a*": "float", "ab": "int8"}, {"ab": "int8", "a*": "float"}]
    first, second = (Recipe.from_dict({"model": MODEL, "layers": layers}) for layers in orders)
    assert first.hash() != second.hash()


def test_the_schema_needs_neither_torch_nor_hydra() -> None:
    # A stand-in for the package keeps quantflow/__init__.py, which may import torch, out of the question.
    code = (
        "import importlib.util, sys, types; spec = importlib.util.find_spec('quantflow');"
        "package = types.ModuleType('quantflow'); package.__path__ = list(spec.submodule_search_locations);"
        "sys.modules['quantflow'] = package; import quantflow.schema;"
        "sys.exit(', '.join({'torch', 'hydra', 'omegaconf'} & sys.modules.keys()) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("change", "is_other_work"),
    [
        ({"output": "elsewhere"}, False),
        ({"resume": False}, False),
        ({"sweep": {"objectives": ["speedup"]}}, False),
        ({"seed": 1}, True),
        ({"benchmark": {"rounds": 3}}, True),
        ({"gates": {"min_sqnr_db": 9.0}}, True),
        ({"name": "other"}, True),
    ],
)
def test_what_makes_it_other_work(change: dict[str, Any], is_other_work: bool) -> None:
    base, changed = Recipe.from_dict({"model": MODEL}), Recipe.from_dict({"model": MODEL, **change})
    assert changed.hash() != base.hash()
    assert (changed.work_key() != base.work_key()) is is_other_work


def test_an_unknown_objective_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"sweep\.objectives.*'speed' is not possible here; nearest: speedup"):
        Recipe.from_dict({"model": MODEL, "sweep": {"objectives": ["speed"]}})
