"""Adding a runtime changes no stage: a stage asks a runner what it can, and never which one it is."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import quantflow as qf
from quantflow import runtimes
from quantflow.numerics.measures import sqnr_db
from quantflow.runtimes import RUNTIMES, Runtime
from quantflow.runtimes.reference import ReferenceRunner

PACKAGE = Path(qf.__file__).parent
#: The schema lists what may be asked for by name.
NAMING = ("runtimes", "schema")
#: Words that name a runtime or a device, and what else they mean where they are found.
WORDS = {"native", "torch", "reference", "cpu", "xpu", "cuda", "host"}
OTHER_MEANINGS = {
    ("analysis/baseline.py", "cpu"): "the processor's name in the environment",
    ("analysis/compare.py", "cpu"): "the processor's name in the environment",
    ("analysis/compare.py", "torch"): "a package",
    ("capture/torchscript/ops.py", "cpu"): "an op",
    ("host/environment.py", "cpu"): "the processor's name in the environment",
    ("host/environment.py", "torch"): "a package",
    ("ir/aten_policy.py", "cuda"): "the beginning of ops' names",
    ("ir/program_json.py", "cpu"): "where a file's tensors live",
    ("quantized.py", "cpu"): "the processor's name in the environment",
    ("report/junit.py", "cpu"): "the processor's name in the environment",
    ("report/junit.py", "torch"): "a package",
    ("search/bench.py", "cpu"): "the processor's name in the environment",
    ("search/bench.py", "torch"): "a package",
    ("sources/models/saved.py", "cpu"): "where a file's tensors are loaded to",
    ("sources/models/weights.py", "cpu"): "where a file's tensors are loaded to",
    ("tasks/doctor.py", "cpu"): "the processor's name in the environment",
}


def modules() -> Iterator[tuple[str, ast.Module]]:
    for file in sorted(PACKAGE.rglob("*.py")):
        name = str(file.relative_to(PACKAGE))
        if not name.startswith(NAMING):
            yield name, ast.parse(file.read_text(encoding="utf-8"))


def test_no_stage_asks_which_runner_it_holds() -> None:
    asked = [
        f"{name}:{node.lineno}"
        for name, tree in modules()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in ("isinstance", "issubclass")
        if any("Runner" in ast.unparse(argument) for argument in node.args[1:])
    ]
    assert asked == []


def test_no_stage_imports_one_runtime() -> None:
    of_all = {
        "quantflow.runtimes",
        "quantflow.runtimes.ordinary",
        "quantflow.runtimes.runner",
        "quantflow.runtimes.specification",
        "quantflow.runtimes.native_sums",  # of any two tensors, whatever computed them
    }
    imported = [
        f"{name}: {node.module}"
        for name, tree in modules()
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("quantflow.runtimes")
        if node.module not in of_all
    ]
    assert imported == []


def test_no_stage_names_a_runtime_or_a_device() -> None:
    named = {
        (name, node.value)
        for name, tree in modules()
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in WORDS
    }
    assert named - OTHER_MEANINGS.keys() == set()
    assert OTHER_MEANINGS.keys() - named == set(), "no longer found: take it off the list"


class Counting(ReferenceRunner):
    """A runtime that knows nothing but how to run."""

    name = "counting"
    calls = 0

    def __call__(self, *args, **kwargs):  # type: ignore[no-untyped-def]
        type(self).calls += 1
        return super().__call__(*args, **kwargs)


@pytest.mark.parametrize("mode", ["export", "imperative"])
def test_a_new_runtime_is_a_module_and_a_line_of_the_table(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    line = Runtime(
        "counting", lambda program, _: Counting(program), lambda _: "counting", lambda _: None,
        ("export", "imperative"),
    )  # fmt: skip
    monkeypatch.setattr(runtimes, "RUNTIMES", {"counting": line})
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4)).eval()
    x = torch.randn(4, 3, 8, 8)
    model = qf.quantize(net, [x], mode=mode, benchmark=True)
    assert model.results["runtime"]["chosen"] == "counting"
    assert sqnr_db(net(x), model(x)) > 20
    assert Counting.calls > 0
    assert {row["kernel"].partition(".")[0] for row in model.results["benchmark"]["per_layer"]} == {"counting"}
    assert model.results["warmup"]["variants"] == ()


def test_every_mode_is_served_by_a_runtime_that_can() -> None:
    for runtime in RUNTIMES.values():
        assert ("torchscript" in runtime.modes) == (runtime.script is not None)
        assert "imperative" in runtime.modes
