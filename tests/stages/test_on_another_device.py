"""Calibration, algorithms and evaluation on another device than the CPU: nothing there meets the CPU's tensors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import quantflow as qf
from quantflow.errors import CalibrationError
from quantflow.executor import order, placed, steps
from quantflow.numerics.observers import OBSERVERS, make_observer
from quantflow.schema import ActivationSpec
from quantflow.stages.benchmark import not_worth_it
from tests.elsewhere import PLACE, elsewhere, here_again


class Net(nn.Module):
    """Convolutions with a residual sum, a transformer's linears and an op that makes a tensor of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(3, 8, 3, 1, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, 1, 1)
        self.c, self.ln, self.up, self.down = nn.Conv2d(8, 8, 1), nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.a(x)))
        x = torch.relu(self.b(x)) + self.c(x)
        x = x.flatten(2).transpose(1, 2)
        x = x + torch.arange(x.shape[1], device=x.device).reshape(1, -1, 1) / 100
        return self.down(torch.nn.functional.gelu(self.up(self.ln(x))))


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    net = Net()
    for _ in range(3):
        net(torch.randn(4, 3, 6, 6))
    return net.eval()


@pytest.fixture
def batches() -> list[torch.Tensor]:
    torch.manual_seed(1)
    return [torch.randn(4, 3, 6, 6) for _ in range(4)]


@pytest.fixture
def there(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Runs compute elsewhere what is not int8; capture, planning and the int8 model stay here."""
    monkeypatch.setattr(placed, "place_of", lambda _: PLACE)
    for module, name in ((order, "captured"), (order, "ready"), (order, "plan_for"), (steps, "plan_for")):
        monkeypatch.setattr(module, name, here_again(getattr(module, name)))
    with elsewhere():
        yield


ALGORITHMS = [
    [],
    ["equalize", "smooth", "unsigned", "activation_scale", "clip_weights", "bias_correction"],
    [{"name": "bias_correction", "method": "full"}, "gptq", "batchnorm"],
    [{"name": "adaround", "iterations": 20}],
]


@pytest.mark.parametrize("algorithms", ALGORITHMS)
def test_the_model_is_the_cpus(
    algorithms: list[Any], net: Any, batches: list[torch.Tensor], request: pytest.FixtureRequest
) -> None:
    if not algorithms:
        with torch.no_grad():
            net.ln.weight[3] = 1e4  # an outlier
    here = qf.quantize(net, batches, device="cpu", mode="torchscript", algorithms=algorithms)
    request.getfixturevalue("there")
    found = qf.quantize(net, batches, device="cpu", mode="torchscript", algorithms=algorithms)
    assert bool(found.results["outliers"]) is not bool(algorithms)
    assert not [n for n in found.results["notices"] if "run on the CPU" in n]
    assert found.record.program.to_json() == here.record.program.to_json()
    for name, tensor in here.record.program.tensors.items():
        assert torch.equal(tensor, found.record.program.tensors[name]), name
    assert found.record.table == here.record.table
    assert found.results["accuracy"]["sqnr_db"] == pytest.approx(here.results["accuracy"]["sqnr_db"])


@pytest.mark.parametrize("observer", sorted(OBSERVERS))
@pytest.mark.parametrize("kind", ["normal", "relu", "tiny", "zeros", "large"])
def test_what_is_fetched_from_a_card_is_what_an_observer_sees(observer: str, kind: str) -> None:
    torch.manual_seed(2)
    x = torch.randn(3, 5, 1001)
    tensors = {
        "normal": [x, x * 3],
        "relu": [x.relu(), -x.relu()],
        "tiny": [x * 1e-38, x * 1e-36],
        "zeros": [x * 0, x[:1]],
        "large": [x * 1e37, x.double() + 4096],
    }[kind]
    spec = ActivationSpec.model_validate({"observer": observer})
    seen, taken = make_observer(spec), make_observer(spec)
    for each in tensors:
        seen.observe(each)
        with elsewhere() as place:
            sketch = taken.sketch(each.to(place))
            low, high = sketch.extremes.tolist()
            counts = None if sketch.counts is None else sketch.counts.cpu()
        taken.take(low, high, counts)
    assert taken == seen


@pytest.mark.usefixtures("there")
def test_a_value_that_is_not_finite_is_named(batches: list[torch.Tensor]) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1))
    with torch.no_grad():
        net[2].weight *= 1e37
    batches[2][1] *= 1000
    with pytest.raises(CalibrationError, match=r"gives (Inf|NaN) in batch 2 \(sample 9\)"):
        qf.quantize(net, batches, device="cpu", mode="torchscript")


@pytest.mark.usefixtures("there")
def test_a_model_that_can_not_go_there_is_said_to_stay(batches: list[torch.Tensor]) -> None:
    held = torch.ones(8, 1, 1)  # no buffer: it stays where it is

    class Keeps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(x) * held

    model = qf.quantize(Keeps().eval(), batches, device="cpu", mode="torchscript")
    (notice,) = [n for n in model.results["notices"] if "run on the CPU" in n]
    assert "Expected all tensors to be on the same device" in notice


def test_int8_that_does_not_beat_bfloat16_is_said() -> None:
    configs = [{"batch_size": 1, "speedup_bfloat16": 1.5}, {"batch_size": 32, "speedup_bfloat16": 0.5}]
    (notice,) = not_worth_it(configs)
    assert "2.00 times as long as bfloat16 under torch.compile at batch 32" in notice
    assert not_worth_it([{"batch_size": 1}]) == ()
