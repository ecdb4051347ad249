"""LSTM, GRU and RNN taken through quantflow: int8 products by name in the plan, and every runtime right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import quantflow as qf
from quantflow.numerics.measures import sqnr_db
from quantflow.runtimes import native_devices
from quantflow.runtimes.native import NativeRunner
from quantflow.runtimes.specification import Specification, handed_on
from quantflow.runtimes.torch import TorchRunner

BATCHES = [torch.randn(4, 6, 24, generator=torch.Generator().manual_seed(0)) for _ in range(2)]
RUNTIMES = ["native", "torch"]


def here(runtime: str) -> str:
    if runtime == "native" and (reason := native_devices.missing("cpu")) is not None:
        pytest.skip(reason)
    return runtime


class Tagger(nn.Module):
    """A recurrent layer between two linears; everything it returns comes out."""

    def __init__(self, make: type[nn.RNNBase], hidden: int = 64, **arrangement: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(24, 16)
        self.rnn = make(16, hidden, batch_first=True, **arrangement)
        self.head = nn.Linear(hidden * (2 if self.rnn.bidirectional else 1), 5)

    def forward(self, x: torch.Tensor) -> Any:
        y, last = self.rnn(self.embed(x))
        return self.head(y), last


def leaves(output: Any) -> list[torch.Tensor]:
    return torch.utils._pytree.tree_leaves(output)


def require_close(model: nn.Module, int8: Any, x: torch.Tensor, least_db: float = 25) -> None:
    with torch.no_grad():
        for a, b in zip(leaves(model(x)), leaves(int8(x)), strict=True):
            assert a.shape == b.shape
            assert sqnr_db(a, b) > least_db


def rows(model: Any) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in model.results["plan"]}


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("mode", ["export", "torchscript"])
@pytest.mark.parametrize("make", [nn.LSTM, nn.GRU, nn.RNN])
def test_products_are_int8_by_name(make: type[nn.RNNBase], mode: str, runtime: str, tmp_path: Path) -> None:
    model = Tagger(make, num_layers=2, bidirectional=True).eval()
    int8 = qf.quantize(model, BATCHES, mode=mode, runtime=here(runtime), device="cpu")
    for part in ("l0", "l0_reverse", "l1", "l1_reverse"):
        assert rows(int8)[f"rnn.ih_{part}"]["precision"] == "int8"
        steps = rows(int8)[f"rnn.hh_{part}"]
        assert (steps["precision"], steps["reason"]) == ("int8", "state and gates float32")
    require_close(model, int8, BATCHES[0])
    require_close(model, int8, torch.randn(9, 6, 24))
    int8.save(tmp_path / "saved")
    loaded = qf.load(tmp_path / "saved")
    assert all(map(torch.equal, leaves(loaded(BATCHES[0])), leaves(int8(BATCHES[0]))))


@pytest.mark.parametrize("runner", [NativeRunner, TorchRunner], ids=["native", "torch"])
@pytest.mark.parametrize("make", [nn.LSTM, nn.GRU])
def test_runtimes_agree_with_the_reference_step_by_step(make: type[nn.RNNBase], runner: Any) -> None:
    if runner is NativeRunner:
        here("native")
    program = qf.quantize(Tagger(make, bidirectional=True).eval(), BATCHES, runtime="reference").record.program
    kernels, values = runner(program), {}
    Specification(program)([BATCHES[0]], lambda _, seen: values.update(seen))
    for index, node in enumerate(program.nodes):
        if node.op == "recurrence":
            found = kernels.run_node(index, values)
            torch.testing.assert_close(found, handed_on(program, node, values, found), rtol=0, atol=2e-6)
    assert kernels.left_to_torch() == {}


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_first_states_are_taken_beyond_one_too(runtime: str) -> None:
    class Continued(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.rnn = nn.GRU(24, 64)

        def forward(self, x: torch.Tensor, h: torch.Tensor) -> Any:
            return self.rnn(x, h)

    model, x = Continued().eval(), (torch.randn(5, 3, 24), torch.randn(1, 3, 64) * 4)
    int8 = qf.quantize(model, [x], runtime=here(runtime))
    with torch.no_grad():
        for a, b in zip(leaves(model(*x)), leaves(int8(*x)), strict=True):
            assert sqnr_db(a, b) > 25


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_few_hidden_units_stay_float_unless_asked_for(runtime: str) -> None:
    model = Tagger(nn.LSTM, hidden=8).eval()
    plain = qf.quantize(model, BATCHES, runtime=here(runtime))
    row = rows(plain)["rnn.hh_l0"]
    assert row["precision"] == "float"
    assert "its 8 hidden units are too few" in row["reason"]
    assert rows(plain)["rnn.ih_l0"]["precision"] == "int8"
    require_close(model, plain, BATCHES[0])
    asked = qf.quantize(model, BATCHES, runtime=runtime, layers={"rnn.hh_l0": "int8"})
    assert rows(asked)["rnn.hh_l0"]["precision"] == "int8"
    require_close(model, asked, BATCHES[0])


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_state_without_bound_stays_float(runtime: str) -> None:
    model = Tagger(nn.RNN, nonlinearity="relu").eval()
    int8 = qf.quantize(model, BATCHES, runtime=here(runtime))
    assert "no bound" in rows(int8)["rnn.hh_l0"]["reason"]
    require_close(model, int8, BATCHES[0])


def test_layers_can_be_kept_float_by_pattern() -> None:
    int8 = qf.quantize(Tagger(nn.LSTM).eval(), BATCHES, layers={"rnn.*": "float"})
    for part in ("rnn.ih_l0", "rnn.hh_l0"):
        assert rows(int8)[part]["reason"] == "the recipe says so: layers.rnn.*"


def test_natively_no_step_returns_to_python() -> None:
    here("native")
    int8 = qf.quantize(Tagger(nn.LSTM).eval(), BATCHES, runtime="native")
    kernels = {row["name"]: row["kernel"] for row in NativeRunner(int8.record.program).profile([BATCHES[0]], runs=1)}
    assert kernels["rnn.hh_l0"].startswith("host.recurrence of host.igemm")


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_share_the_samples(threads: int) -> None:
    here("native")
    program = qf.quantize(Tagger(nn.LSTM).eval(), BATCHES, runtime="reference").record.program
    x = torch.randn(11, 6, 24)
    for a, b in zip(
        leaves(NativeRunner(program, threads=threads)([x])), leaves(NativeRunner(program, threads=1)([x])), strict=True
    ):
        assert torch.equal(a, b)


def test_imperative_mode_keeps_the_users_module() -> None:
    model = Tagger(nn.LSTM).eval()
    int8 = qf.quantize(model, BATCHES, mode="imperative")
    assert "the user's own float modules" in rows(int8)["rnn"]["reason"]
    require_close(model, int8, BATCHES[0])
