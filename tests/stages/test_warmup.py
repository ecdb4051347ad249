"""What is said of a model that differs from the reference, and that single steps are blamed only where they do it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import quantflow as qf
from quantflow.errors import VerificationError
from quantflow.ir.batch import Batch
from quantflow.runtimes.specification import Specification
from quantflow.stages import warmup
from quantflow.stages.compile import Compiled


def made(runtime: str) -> tuple[Compiled, torch.Tensor]:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 12, 12)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    return qf.quantize(net, [x], runtime=runtime).compiled, x


def why(bound_db: float) -> str:
    compiled, x = made("reference")
    return warmup._why(compiled, Batch((x,)), Specification(compiled.program)([x]), bound_db, 12)


def test_single_steps_are_blamed_only_where_they_do_it() -> None:
    assert why(300.0).startswith(": this model amplifies single rounding steps (one step in every 97th code of ")
    text = why(10.0)
    assert "amplifies" not in text
    assert text.startswith(": 12 codes differ over all layers, and add up (one step in every 97th code of ")
    assert "runtime=reference" in text


def test_a_whole_program_may_differ_by_what_single_steps_make_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled, x = made("torch")
    y = compiled.runner([x])
    stepped_db, _ = warmup._stepped_db(compiled, Batch((x,)), y)

    def differing(db: float) -> None:
        noise = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
        noise *= y.norm() / noise.norm() * 10 ** (-db / 20)
        monkeypatch.setattr(type(compiled.runner), "__call__", lambda *_: y + noise)
        warmup.warmup(compiled, Batch((x,)), iterations=1, min_sqnr_db=0)

    monkeypatch.setattr(warmup, "LEAST_WHOLE_DB", 100.0)
    differing(stepped_db + 1)
    with pytest.raises(VerificationError, match="another result than its layers one by one"):
        differing(stepped_db - 6)


def test_a_node_that_read_the_same_to_the_bit_is_run_once(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled, x = made("torch")
    run, runner = list[int](), type(compiled.runner)
    true = runner.run_node
    monkeypatch.setattr(runner, "run_node", lambda self, index, values: run.append(index) or true(self, index, values))
    _, differences, checked = warmup._verify(compiled, Batch((x,)), compiled.runner([x]), None)
    assert (differences, checked) == (0, len(compiled.program.nodes))
    assert run == list(range(len(compiled.program.nodes)))


def test_nodes_behind_a_code_that_differs_are_run_on_the_references_too(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled, x = made("torch")
    run, runner = list[int](), type(compiled.runner)
    true = runner.run_node
    first = next(index for index, node in enumerate(compiled.program.nodes) if node.op == "conv")

    def differing(self: object, index: int, values: dict[str, torch.Tensor]) -> torch.Tensor:
        run.append(index)
        found: torch.Tensor = true(self, index, values)
        return found + (torch.arange(found.numel()).view_as(found) == 5).to(found.dtype) if index == first else found

    monkeypatch.setattr(runner, "run_node", differing)
    with pytest.raises(VerificationError, match=r"1 of \d+ codes differ from the reference"):
        warmup._verify(compiled, Batch((x,)), compiled.runner([x]), None)
    assert run.count(first) == 1
    monkeypatch.setattr(warmup, "disagreement", lambda *_: (0, 0.0))
    run.clear()
    _, differences, _ = warmup._verify(compiled, Batch((x,)), compiled.runner([x]), None)
    assert differences == 1
    assert {index: run.count(index) for index in run} == {
        index: 1 + (index > first) for index in range(len(compiled.program.nodes))
    }
