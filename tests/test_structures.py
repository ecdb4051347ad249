"""Calls and results of any structure: containers and constants in, types and attributes out."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

import quantflow as qf
from quantflow.errors import CaptureError, DataError
from quantflow.ir.structure import Attributes, build, flatten

MODES = ("export", "torchscript", "imperative")
TORCH = tuple(int(number) for number in torch.__version__.split(".")[:2])


class Pair(NamedTuple):
    first: torch.Tensor
    second: torch.Tensor


@dataclasses.dataclass
class Result:
    scores: torch.Tensor
    hidden: list[torch.Tensor]
    name: str = "scores"


class Model(nn.Module):
    """Two linears and what a case makes of them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 4)


class Nested(Model):
    def forward(self, parts: dict[str, Any], mask: torch.Tensor | None = None, *, scale: float = 1.0) -> torch.Tensor:
        x = parts["left"][0] + parts["right"]
        x = x if mask is None else x * mask
        return self.b(self.a(x).relu()) * scale


class Returns(Model):
    kind = "named"

    def forward(self, x: torch.Tensor) -> Any:
        h = self.a(x).relu()
        y = self.b(h)
        results: dict[str, Any] = {
            "named": Pair(y, h),
            "dataclass": Result(y, [h, h + 1]),
            "ordered": OrderedDict(out=y, aux=h),
            "mixed": (y, None, {"rows": x.shape[0], "label": "y"}, [h]),
            "size": (y, y.shape),
            "nested": {"a": {"b": (y, [h])}},
        }
        return results[self.kind]


def same(a: Any, b: Any) -> None:
    """The same structure, types and constants, tensors of the same shape and dtype."""
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
    elif isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            same(a[key], b[key])
    elif isinstance(a, (tuple, list)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            same(x, y)
    elif dataclasses.is_dataclass(a):
        same(vars(a), vars(b))
    else:
        assert a == b


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["named", "dataclass", "ordered", "mixed", "size", "nested"])
def test_results_keep_their_structure_and_types(kind: str, mode: str, tmp_path: Path) -> None:
    module = Returns().eval()
    module.kind = kind
    model = qf.quantize(module, [torch.randn(6, 8)], mode=mode)
    x = torch.randn(3, 8)
    with torch.no_grad():
        same(module(x), model(x))
        model.save(tmp_path / "artifact")
        same(module(x), qf.load(tmp_path / "artifact")(x))


@pytest.mark.parametrize("mode", MODES)
def test_containers_and_constants_go_in(mode: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Nested().eval()
    call = {"parts": {"left": [torch.randn(64, 8)], "right": torch.randn(64, 8)}, "mask": None, "scale": 2.0}
    model = qf.quantize(module, [call], mode=mode)
    model.save(tmp_path / "artifact")
    loaded = qf.load(tmp_path / "artifact")
    other = {"right": torch.randn(3, 8), "left": [torch.randn(3, 8)]}
    wanted = module(other, scale=2.0)
    for int8 in (model, loaded):
        assert torch.allclose(int8(scale=2.0, parts=other), wanted, atol=0.2)
        assert torch.allclose(int8(other, None, scale=2.0), wanted, atol=0.2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"scale": 3.0}, r"'scale' is 3.0; the model was captured with 2.0, which is a constant of it"),
        ({"mask": torch.ones(3, 8), "scale": 2.0}, r"'mask' is a tensor of shape \(3, 8\); .* captured with None"),
        ({"parts": {"left": []}, "scale": 2.0}, r"'parts' is 1 entries \(left\); .* 2 entries \(left, right\)"),
        ({"other": 1, "scale": 2.0}, "unknown keyword other"),
    ],
)
def test_another_constant_or_structure_is_refused_by_name(call: dict[str, Any], message: str) -> None:
    parts = {"left": [torch.randn(3, 8)], "right": torch.randn(3, 8)}
    model = qf.quantize(Nested().eval(), [{"parts": parts, "mask": None, "scale": 2.0}])
    with pytest.raises(DataError, match=message):
        model(**{"parts": parts, **call})


class Language(nn.Module):
    """What a language model's forward looks like."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Embedding(30, 8), nn.Linear(8, 8)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        **_others: Any,
    ) -> torch.Tensor:
        x = self.embed(input_ids)
        if attention_mask is not None:
            x = x * attention_mask[..., None]
        if token_type_ids is not None:
            x = x + token_type_ids[..., None]
        return self.out(x)


def test_a_tokenizer_may_give_more_than_calibration_did() -> None:
    ids, ones = torch.randint(0, 30, (3, 5)), torch.ones(3, 5, dtype=torch.long)
    model = qf.quantize(Language().eval(), [{"input_ids": ids, "attention_mask": ones}])
    wanted = model(ids, ones)
    assert torch.equal(model(attention_mask=ones, token_type_ids=0 * ones, input_ids=ids), wanted)
    assert torch.equal(model(input_ids=ids), wanted)
    assert torch.equal(model(input_ids=ids, attention_mask=None), wanted)
    with pytest.raises(DataError, match="'token_type_ids' holds other values than 0"):
        model(input_ids=ids, attention_mask=ones, token_type_ids=ones)
    with pytest.warns(RuntimeWarning, match="'special_tokens_mask' is ignored"):
        model(input_ids=ids, attention_mask=ones, special_tokens_mask=ones)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_model_of_another_dtype_is_quantized_from_float32(dtype: torch.dtype, mode: str) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)).eval().to(dtype)
    x = torch.randn(6, 8).to(dtype)
    model = qf.quantize(module, [x], mode=mode)
    assert model(x).dtype is dtype
    assert torch.allclose(model(x).float(), module(x).float(), atol=0.1)
    assert any("a copy in float32 was quantized" in notice for notice in model.results["notices"])
    assert module[0].weight.dtype is dtype


def test_a_sample_whose_layers_are_all_cut_off_at_0_is_no_proof_of_float() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    with torch.no_grad():
        module[0].weight.copy_(torch.eye(4))
        module[0].bias.zero_()
    x = torch.rand(6, 4) + 0.1
    x[0] = -x[0]
    for mode in MODES:
        results = qf.quantize(module, [x], mode=mode).results
        assert results["int8_proof"]["output_differs"], mode


def test_a_type_is_made_only_as_models_of_this_process_hold_it() -> None:
    seen = flatten(Result(torch.ones(1), []))[0]
    assert type(build(seen, [torch.ones(1)])) is Result
    forged = dataclasses.replace(seen, kind="mapping")
    assert type(build(forged, [torch.ones(1)])) is Attributes


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_wrappers_are_taken_off_with_a_notice() -> None:
    inner = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
    for wrapped, name in ((nn.DataParallel(inner), "DataParallel"), (torch.compile(inner), "torch.compile")):
        model = qf.quantize(wrapped, [torch.randn(6, 8)])
        assert any(f"{name} was taken off" in notice for notice in model.results["notices"])


class Chooses(Model):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(x)) if x.sum() > 0 else self.b(x)


def test_a_choice_that_depends_on_the_data_is_refused_with_its_line() -> None:
    with pytest.raises(CaptureError, match=r"test_structures.py:\d+: .*x.sum\(\) > 0"):
        qf.quantize(Chooses().eval(), [torch.randn(6, 8)])


class KeepsAGrid(nn.Module):
    """A detection head's kind: it keeps the grid of the last shape that it saw."""

    dynamic = False

    def __init__(self) -> None:
        super().__init__()
        self.a, self.shape, self.anchors = nn.Conv2d(3, 4, 3, padding=1), None, torch.empty(0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.dynamic or self.shape != x.shape:
            self.shape, self.anchors = x.shape, torch.arange(x.shape[2] * x.shape[3], dtype=torch.float32)
        return self.a(x).flatten(2) + self.anchors


@pytest.mark.parametrize("mode", MODES)
def test_a_head_that_keeps_a_grid_takes_every_shape_and_is_left_as_it_was(mode: str) -> None:
    if mode == "export" and TORCH < (2, 10):
        pytest.skip("torch.export of 2.9 refuses attributes that forward sets")
    torch.manual_seed(0)
    module = KeepsAGrid().eval()
    model = qf.quantize(module, [torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 12), torch.randn(2, 3, 4, 8)], mode=mode)
    for shape in ((1, 3, 8, 8), (3, 3, 12, 20)):
        x = torch.randn(shape)
        assert torch.allclose(model(x), module(x), atol=0.2)
    assert module.dynamic is False
    assert type(module.anchors) is torch.Tensor
