"""Finished algorithms come back to the bit, and only for what they worked on."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import own_models
import pytest
import torch
from torch import nn

from quantflow import algorithms
from quantflow.algorithms import Applied, Material, refine, rewrite
from quantflow.algorithms.kept import KeptAlgorithms, _pack_graph
from quantflow.capture import capture_export
from quantflow.ir.batch import Batch
from quantflow.ir.graph import Graph, copied, is_aten
from quantflow.ir.passes.fold_batchnorm import fold_batch_norms
from quantflow.ir.plan import Plan
from quantflow.report import Progress, make_console
from quantflow.schema import PRESETS, Algorithm, Recipe
from quantflow.stages.calibrate import calibrate
from quantflow.stages.plan import make_plan
from quantflow.stages.prepare import prepare
from quantflow.stages.refined import Refined
from quantflow.store.run_folder import Work

ON_GRAPHS = ["equalize", {"name": "smooth", "insert": False}]
ON_NUMBERS = ["activation_scale", "clip_weights", "bias_correction", "gptq", {"name": "adaround", "iterations": 20}]


class Net(nn.Module):
    """Something to do for every algorithm."""

    def __init__(self) -> None:
        super().__init__()
        self.net = own_models.net()
        self.norm, self.up, self.down = nn.LayerNorm(5), nn.Linear(5, 16), nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(self.norm(self.net(x))).relu())


def listed(names: Sequence[Any]) -> tuple[Algorithm, ...]:
    return Recipe.from_dict({"model": {"kind": "mnist_cnn"}, "algorithms": list(names)}).algorithms


def batches() -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    return [Batch((torch.randn(8, 3, 8, 8, generator=generator),)) for _ in range(4)]


@pytest.fixture(scope="module")
def graph() -> Graph:
    torch.manual_seed(0)
    net = Net().eval()
    with torch.no_grad():
        net.norm.weight[3] = 30
    return fold_batch_norms(capture_export(net, batches()[0]))


def plan_of(graph: Graph) -> Plan:
    return make_plan(graph, PRESETS["affine_uint8"], {})


def run(graph: Graph, work: Work | None, on_numbers: Sequence[Any] = ON_NUMBERS, inputs: str = "data") -> Any:
    """(graph, numbers, what was applied) of one run."""
    kept, material = KeptAlgorithms(work, inputs), Material(batches())
    with Progress(make_console(), quiet=True) as progress:
        graph, first = rewrite(listed(ON_GRAPHS), graph, plan_of, material, progress.stage, kept.graphs())
        prepared = prepare(graph, plan_of(graph))
        table = calibrate(prepared, material.batches)
        refined, second = refine(listed(on_numbers), prepared, table, material, progress.stage, kept.numbers(prepared))
    return graph, refined, (*first, *second)


def numbers(refined: Refined) -> dict[str, list[Any]]:
    return {
        name: [None if t is None else (t.dtype, t.tolist()) for t in vars(layer).values()]
        for name, layer in refined.layers.items()
    }


def untimed(applied: Sequence[Applied]) -> list[Applied]:
    return [replace(each, seconds=0.0) for each in applied]


def work(folder: Path) -> Work:
    return Work(folder / "art", "key")


def test_every_finished_algorithm_is_taken_as_it_was(
    graph: Graph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = run(graph, None)
    found = [run(graph, work(tmp_path))]

    def unasked(*_: object) -> None:
        raise AssertionError("it was finished")

    for table in (algorithms.GRAPH_ALGORITHMS, algorithms.NUMBER_ALGORITHMS):
        for name in table:
            monkeypatch.setitem(table, name, unasked)
    again = work(tmp_path)
    found.append(run(graph, again))
    names = [name if isinstance(name, str) else name["name"] for name in (*ON_GRAPHS, *ON_NUMBERS)]
    assert again.resumed == names
    for rewritten, refined, applied in found:
        assert rewritten.digest == expected[0].digest
        assert numbers(refined) == numbers(expected[1])
        assert list(refined.layers) == list(expected[1].layers)
        assert list(refined.qparams.items()) == list(expected[1].qparams.items())
        assert untimed(applied) == untimed(expected[2])
    assert sum(bool(each.outcome.changes) for each in expected[2]) > 2, "some of them did something"
    assert [each.seconds for each in found[1][2]] == [each.seconds for each in found[0][2]]


def test_an_algorithm_that_differs_runs_and_so_do_those_behind_it(graph: Graph, tmp_path: Path) -> None:
    run(graph, work(tmp_path))
    again = work(tmp_path)
    changed = ["activation_scale", {"name": "bias_correction", "samples": 16}, "gptq"]
    run(graph, again, changed)
    assert again.resumed == ["equalize", "smooth", "activation_scale"]
    assert again.notices == [
        f"{name} resumed: taken from an earlier run that was interrupted ({path})"
        for name, path in zip(again.resumed, kept_files(again, again.resumed), strict=True)
    ]


def kept_files(work: Work, names: Sequence[str]) -> list[Path]:
    return [next(work.folder.glob(f"{name}-*.json")) for name in names]


def test_nothing_is_taken_for_other_weights_or_data(graph: Graph, tmp_path: Path) -> None:
    run(graph, work(tmp_path))
    (name, weight), *_ = graph.constants.items()
    for other, inputs in (
        (replace(graph, constants={**graph.constants, name: weight * 1.5}), "data"),
        (graph, "other"),
    ):
        again = work(tmp_path)
        run(other, again, inputs=inputs)
        assert again.resumed == []


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.with_suffix(".safetensors").write_bytes(b"x"),
        lambda path: path.with_suffix(".safetensors").unlink(),
        lambda path: path.write_text(json.dumps({**json.loads(path.read_text()), "content": {}})),
    ],
    ids=["other tensors", "no tensors", "other content"],
)
def test_what_is_damaged_is_computed_again(graph: Graph, tmp_path: Path, damage: Callable[[Path], object]) -> None:
    expected = run(graph, work(tmp_path))
    again = work(tmp_path)
    damage(kept_files(again, ["gptq"])[0])
    found = run(graph, again)
    assert "gptq" not in again.resumed
    assert "adaround" in again.resumed, "it had the same numbers to work on"
    assert any(notice.startswith("gptq is computed again: ") for notice in again.notices)
    assert numbers(found[1]) == numbers(expected[1])


def test_multiplications_at_run_time_are_kept(graph: Graph, tmp_path: Path) -> None:
    inserting = listed([{"name": "smooth", "insert": True, "min_gain_db": 0, "guard": False}])
    found = []
    for _ in range(2):
        mine = work(tmp_path)
        with Progress(make_console(), quiet=True) as progress:
            keep = KeptAlgorithms(mine).graphs()
            rewritten, _ = rewrite(inserting, graph, plan_of, Material(batches()), progress.stage, keep)
        found.append(rewritten)
    assert mine.resumed == ["smooth"]
    assert str(found[0]) != str(graph)
    assert found[0].digest == found[1].digest
    assert [node.meta.get("layer") for node in found[0].fx.nodes] == [n.meta.get("layer") for n in found[1].fx.nodes]


def test_a_graph_with_other_ops_is_not_kept(graph: Graph) -> None:
    other = replace(graph, fx=copied(graph.fx))
    relu = next(node for node in other.fx.nodes if is_aten(node, "relu"))
    with other.fx.inserting_after(relu):
        other.fx.call_function(torch.ops.aten.neg.default, (relu,))
    assert _pack_graph(graph, other) is None


def test_a_worker_that_only_reads(graph: Graph, tmp_path: Path) -> None:
    mine = work(tmp_path)
    keep = KeptAlgorithms(mine, writes=False).graphs()
    with Progress(make_console(), quiet=True) as progress:
        rewrite(listed(["equalize"]), graph, plan_of, Material(batches()), progress.stage, keep)
    assert not mine.folder.exists()
