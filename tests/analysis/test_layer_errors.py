from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import own_models
import pytest
import torch
from torch import nn

from quantflow.analysis.layer_errors import BINS, WORST_LAYERS, histogram, own_errors
from quantflow.ir.graph import Graph, interpret
from quantflow.numerics.measures import sqnr_db
from quantflow.runtimes import choose_runtime
from quantflow.stages.compile import Compiled, compile_program


def compiled(made: Any) -> Compiled:
    return compile_program(made.program, choose_runtime("reference", "cpu", "export"))


def floats(graph: Graph, x: torch.Tensor) -> dict[str, Any]:
    """Every value of the float model on one input."""
    values: dict[str, Any] = {}
    with torch.inference_mode():
        interpret(graph, [x], lambda node, value: values.update({node.name: value}))
    return values


def test_a_single_layers_own_error_is_the_models(stages: Callable[..., Any]) -> None:
    torch.manual_seed(0)
    module, x = nn.Sequential(nn.Linear(16, 8)).eval(), torch.randn(32, 16)
    made = stages(module, x)
    program = compiled(made)
    errors, shown = own_errors(made.graph, program, floats(made.graph, x))
    with torch.no_grad():
        expected = sqnr_db(module(x), program(x))
    assert list(errors) == ["0"]
    assert errors["0"].sqnr_db == pytest.approx(expected, abs=1e-6)
    assert [row["name"] for row in shown] == ["0"]
    assert set(shown[0]) == {"name", "input", "weight"}


def test_errors_of_earlier_layers_are_not_a_layers_own(stages: Callable[..., Any]) -> None:
    """One value far out ruins the first layer's input codes; the second layer reads float's values and is as good as
    it was."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    x = torch.randn(32, 16)
    x[0, 0] = 1000.0
    with torch.no_grad():
        module[0].weight[:, 0] = 0
    made = stages(module, x)
    errors, shown = own_errors(made.graph, compiled(made), floats(made.graph, x))
    assert errors["0"].sqnr_db < 15 < 30 < errors["2"].sqnr_db
    assert [row["name"] for row in shown] == ["0", "2"]


def test_every_kind_of_layer_and_its_progress(stages: Callable[..., Any]) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 8, 8)
    made = stages(own_models.net(), x)
    seen: list[tuple[int, int | None]] = []
    errors, shown = own_errors(
        made.graph, compiled(made), floats(made.graph, x), lambda done, total: seen.append((done, total))
    )
    assert {"stem.0", "block", "head"} <= set(errors)
    assert all(error.sqnr_db > 20 for error in errors.values())
    assert seen[-1] == (len(made.program.nodes), len(made.program.nodes))
    assert len(shown) <= WORST_LAYERS
    assert [row["name"] for row in shown] == sorted(errors, key=lambda name: errors[name].sqnr_db)[:WORST_LAYERS]
    weight = next(row for row in shown if row["name"] == "block")["weight"]
    assert weight["clip"][1] == pytest.approx(max(-weight["low"], weight["high"]), rel=1e-5)
    assert weight["clip_narrowest"][1] < weight["clip"][1]
    assert sum(weight["counts"]) == 8 * 8 * 9


def test_a_histogram_counts_every_finite_value_once() -> None:
    x = torch.tensor([[-4.0, -1.0, 0.0, 0.5], [1.0, 2.0, math.inf, math.nan]])
    found = histogram(x, [(-2.0, 1.5), (-1.0, 1.0)])
    assert (found["low"], found["high"], sum(found["counts"]), len(found["counts"])) == (-4.0, 2.0, 6, BINS)
    assert (found["counts"][0], found["counts"][-1]) == (1, 1)
    assert (found["clip"], found["clip_narrowest"]) == ([-2.0, 1.5], [-1.0, 1.0])
    assert found["clipped"] == pytest.approx(2 / 6)


def test_a_constant_has_one_full_bin() -> None:
    found = histogram(torch.full((10,), 3.0), [(-1.0, 1.0)])
    assert (sum(found["counts"]), found["low"], found["high"], found["clipped"]) == (10, 3.0, 3.0, 1.0)
    assert "clip_narrowest" not in found


@pytest.mark.parametrize("reach", [1e-40, 1e-3, 3e38])
def test_bins_are_right_for_any_range(reach: float) -> None:
    counts = histogram(torch.tensor([-reach, -reach, 0.0, reach]), [(-1.0, 1.0)])["counts"]
    assert [(at, count) for at, count in enumerate(counts) if count] == [(0, 2), (BINS // 2, 1), (BINS - 1, 1)]
