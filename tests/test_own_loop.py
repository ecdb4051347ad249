"""prepare → the user's own loop → convert: the program that `quantize` makes of the same calls, byte for byte."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import quantflow as qf
from quantflow.errors import CalibrationError, DataError, UsageError
from quantflow.sources.models.torchvision_zoo import import_torchvision
from quantflow.stages.record import weights_bytes

import_torchvision()  # transformers imports it, and its wheel may be one for another torch
pytestmark = pytest.mark.filterwarnings("ignore")
MODES = ["export", "torchscript", "imperative"]


class Residual(nn.Module):
    """A ResNet's block between a stem and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU())
        self.block = nn.Sequential(
            nn.Conv2d(8, 8, 3, 1, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, 1, 1), nn.BatchNorm2d(8)
        )
        self.fc = nn.Linear(8, 4)
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        return self.fc(torch.relu(self.block(x) + x).mean((2, 3)))

    def describe(self, images: list[torch.Tensor]) -> list[int]:
        """A loop of the model's own."""
        return [int(self((image[None] - 0.5) / 0.25).argmax()) for image in images]


class Finder(nn.Module):
    """A detector in small: its own pre-processing, a backbone, and as many results as it likes."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone: Any = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 1, 1))

    def forward(self, images: list[torch.Tensor]) -> list[torch.Tensor]:
        found = []
        for image in images:
            padded = nn.functional.pad((image - 0.5) / 0.25, (0, -image.shape[2] % 8, 0, -image.shape[1] % 8))
            cells = self.backbone(padded[None])[0].flatten(1)
            found.append(cells[:, cells[0] > 0])
        return found


def residual() -> Any:
    torch.manual_seed(0)
    return Residual().eval()


def calls(count: int = 3, size: int = 16) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.rand(2, 3, size, size, generator=generator) for _ in range(count)]


def identity(model: Any) -> tuple[str, bytes, bytes]:
    record = model.record
    return json.dumps(record.program.to_json()), weights_bytes(record.program), record.table.to_bytes()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("algorithms", ["none", "fast"])  # measured call by call, and from all calls together
def test_a_residual_net(mode: str, algorithms: str) -> None:
    module, data = residual(), calls()
    p = qf.prepare(module, data[0], mode=mode, algorithms=algorithms)
    assert all(torch.equal(p(x), module(x)) for x in data)
    model: Any = qf.convert(p)
    wanted: Any = qf.quantize(module, data, mode=mode, algorithms=algorithms)
    assert identity(model) == identity(wanted)
    assert type(model) is type(wanted)
    assert model.results["accuracy"]["sqnr_db"] == wanted.results["accuracy"]["sqnr_db"]


@pytest.mark.parametrize("mode", MODES)
def test_a_detectors_backbone_behind_its_own_preprocessing(mode: str) -> None:
    torch.manual_seed(0)
    detector, images = Finder().eval(), [torch.rand(3, *size) for size in ((16, 16), (20, 30), (17, 40))]
    seen: list[torch.Tensor] = []
    with detector.backbone.register_forward_pre_hook(lambda _, args: seen.append(args[0])):
        wanted = detector(images)
    backbone = detector.backbone
    detector.backbone = p = qf.prepare(backbone, mode=mode)
    assert all(map(torch.equal, detector(images), wanted))
    detector.backbone = model = qf.convert(p)  # the sizes that vary were found in the loop
    assert identity(model) == identity(qf.quantize(backbone, seen, mode=mode))
    assert len(detector(images)) == 3


def test_generate() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=99, n_embd=16, n_layer=1, n_head=2, n_positions=32, bos_token_id=1, eos_token_id=2
    )
    module, seen = transformers.GPT2LMHeadModel(config).eval(), []
    prompt = {"input_ids": torch.randint(3, 99, (2, 6)), "attention_mask": torch.ones(2, 6, dtype=torch.long)}
    settings = {"max_new_tokens": 2, "do_sample": False, "use_cache": False}
    with module.register_forward_pre_hook(lambda _, __, kwargs: seen.append(dict(kwargs)), with_kwargs=True):
        wanted = module.generate(**prompt, **settings)
    p: Any = qf.prepare(module, mode="torchscript")
    assert torch.equal(p.generate(**prompt, **settings), wanted)
    assert identity(qf.convert(p)) == identity(qf.quantize(module, seen, mode="torchscript"))
    # transformers 4.50 gives use_cache itself, later ones a cache.
    with pytest.raises(DataError, match=r"use_cache=False|'use_cache' is True; the model was captured with False"):
        p.generate(**prompt, max_new_tokens=3)


def test_methods_of_the_module_are_observed_and_calls_of_itself_are_not() -> None:
    module = residual()
    p: Any = qf.prepare(module, torch.rand(1, 3, 16, 16))
    images = [x[0] for x in calls()]
    assert p.describe(images) == module.describe(images)
    assert (p.calibration.batches, p.calls) == (3, 0)
    assert not module._forward_pre_hooks


def test_tables_are_saved_merged_and_resumed(tmp_path: Path) -> None:
    module, data = residual(), calls(4)
    halves = []
    for half in (data[:2], data[2:]):
        p = qf.prepare(module, data[0], keep=0)
        for x in half:
            p(x)
        p.calibration.save(tmp_path / "half.safetensors")
        halves.append(qf.CalibrationTable.load(tmp_path / "half.safetensors"))
    resumed = qf.prepare(module, data[0])
    resumed.calibration = halves[0]
    for x in data[2:]:
        resumed(x)
    merged = qf.prepare(module, data[0])
    merged.calibration = halves[0].merge(halves[1])
    wanted = identity(qf.quantize(module, data))
    assert identity(qf.convert(resumed)) == wanted
    assert identity(qf.convert(merged)) == wanted
    assert identity(qf.convert(resumed)) == wanted  # and again
    other = qf.prepare(module, data[0], qconfig="affine_uint8")
    with pytest.raises(CalibrationError, match="same model with the same settings"):
        other.calibration = halves[0]


def test_a_call_that_fails_leaves_no_trace() -> None:
    module, data = residual(), calls()
    p = qf.prepare(module, data[0])
    p(data[0])
    for bad, match in ((torch.full((1, 3, 16, 16), float("nan")), "NaN"), (torch.zeros(1, 3), "shape")):
        with pytest.raises(DataError, match=match):
            p(bad)
    for x in data[1:]:
        p(x)
    assert identity(qf.convert(p)) == identity(qf.quantize(module, data))


def test_inplace() -> None:
    module = residual()
    p = qf.prepare(module, mode="imperative")
    p(calls()[0])
    model: Any = qf.convert(p, inplace=True)
    assert model.module is module
    assert "int8" in repr(module.fc)


@pytest.mark.parametrize(
    ("act", "error", "match"),
    [
        (lambda m: qf.convert(m), UsageError, "takes what quantflow.prepare returned; found a Residual"),
        (lambda m: qf.convert(qf.prepare(m, calls()[0])), DataError, "there are no samples"),
        (lambda m: qf.prepare(m).calibration, UsageError, "nothing was called yet"),
        (
            lambda m: qf.prepare(m, calls()[0], algorithms="fast").calibration,
            UsageError,
            "by what the data show .equalize",
        ),
        (lambda m: qf.prepare(m, calls()[0], algorithms="fast", keep=4), UsageError, "keep: all calls are needed"),
        (lambda m: qf.prepare(m, keep=-1), UsageError, "keep: is -1; give a number"),
        (lambda m: qf.prepare(m).train()(calls()[0]), UsageError, r"training mode.*call eval\(\)"),
        (lambda m: qf.prepare(m).missing, AttributeError, "missing"),
    ],
)
def test_refuses(act: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        act(residual())
