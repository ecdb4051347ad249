"""Transformer layers in one native call: where nobody looks inside, and with the numbers of their steps."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn

import quantflow as qf
from quantflow.numerics.measures import sqnr_db
from quantflow.runtimes import native_library
from quantflow.sources.models.torchvision_zoo import import_torchvision

pytestmark = pytest.mark.skipif(
    native_library.library_path("libquantflow_native.so") is None, reason="the native library was not built here"
)
LENGTH, LAYERS = 12, 2
Calls = Callable[[Callable[[], Any]], int]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """How many native calls something makes."""
    counted: list[int] = []
    run = native_library.run_plan
    monkeypatch.setattr(native_library, "run_plan", lambda *args: (counted.append(1), run(*args))[1])

    def count(what: Callable[[], Any]) -> int:
        counted.clear()
        what()
        return len(counted)

    return count


@cache
def bert() -> tuple[Any, dict[str, torch.Tensor]]:
    """A small int8 encoder of lengths that vary, and a batch without padding."""
    import_torchvision()
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        num_hidden_layers=LAYERS, hidden_size=32, intermediate_size=64, num_attention_heads=4, vocab_size=50,
        max_position_embeddings=64,
    )  # fmt: skip
    batches = [
        {"input_ids": torch.randint(3, 50, (4, length)), "attention_mask": torch.ones(4, length, dtype=torch.long)}
        for length in (LENGTH, LENGTH - 3)
    ]
    module = transformers.BertModel(config).eval()
    model = qf.quantize(module, batches, mode="imperative", device="cpu", runtime="native")
    if not isinstance(model.module.encoder.layer[0](torch.randn(1, LENGTH, 32)), torch.Tensor):
        pytest.skip("this transformers' layers give tuples, which stay step by step")
    return model, batches[0]


def vit() -> tuple[Any, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    module = import_torchvision().models.VisionTransformer(16, 8, LAYERS, 4, 32, 64, num_classes=8).eval()
    batch = {"x": torch.randn(4, 3, 16, 16)}
    return qf.quantize(module, [batch], mode="imperative", device="cpu", runtime="native"), batch


def called(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        found = model(**batch)
    return found if isinstance(found, torch.Tensor) else found.last_hidden_state


def steps(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """With every module called, as a debugger sees it."""
    before = sys.gettrace()
    sys.settrace(lambda *_: None)
    try:
        return called(model, batch)
    finally:
        sys.settrace(before)


def by_program(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    found = model.compiled(**batch)
    return found if isinstance(found, torch.Tensor) else found["last_hidden_state"]


@pytest.mark.parametrize("make", [bert, vit])
def test_a_layer_is_one_call_and_computes_what_its_steps_do(make: Callable[[], Any], calls: Calls) -> None:
    model, batch = make()
    called(model, batch)
    one = calls(lambda: called(model, batch))
    assert calls(lambda: steps(model, batch)) - one >= LAYERS * 6
    found = called(model, batch)
    assert sqnr_db(steps(model, batch), found) >= 40
    assert sqnr_db(by_program(model, batch), found) >= 60
    proof = model.results["int8_proof"]
    assert proof["int8_layers_run"] == proof["int8_layers"] >= LAYERS * 4


def test_a_mask_is_looked_at_in_every_call(calls: Calls) -> None:
    model, batch = bert()
    called(model, batch)
    without = calls(lambda: called(model, batch))
    for lengths in ([12, 12, 5, 7], [3, 12, 12, 9], [12, 12, 12, 12]):
        mask = (torch.arange(LENGTH) < torch.tensor(lengths)[:, None]).long()
        for ids in (batch["input_ids"], batch["input_ids"][:, :8]):
            padded = {"input_ids": ids, "attention_mask": mask[:, : ids.shape[1]]}
            called(model, padded)
            assert calls(lambda given=padded: called(model, given)) == without
            found = called(model, padded)
            assert sqnr_db(steps(model, padded), found) >= 40
            assert sqnr_db(by_program(model, padded), found) >= 60


class Doubled(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x


def _eager(model: Any) -> None:
    model.module.config._attn_implementation = "eager"


def _another_part(model: Any) -> None:
    model.module.encoder.layer[0].output.LayerNorm = Doubled()


def _other_numbers(model: Any) -> None:
    model.module.encoder.layer[1].output.LayerNorm.bias = nn.Parameter(torch.ones(32))


def _another_setting(model: Any) -> None:
    model.module.encoder.layer[0].chunk_size_feed_forward = 4


def _a_hook(model: Any) -> None:
    model.module.encoder.layer[0].attention.output.register_forward_hook(lambda _m, _x, y: y * 2)


@pytest.mark.parametrize("change", [_eager, _another_part, _other_numbers, _another_setting, _a_hook])
def test_a_layer_that_was_changed_computes_what_its_modules_do(change: Callable[[Any], Any], calls: Calls) -> None:
    model, batch = copy.deepcopy(bert()[0]), bert()[1]
    called(model, batch)
    before = calls(lambda: called(model, batch))
    change(model)
    called(model, batch)
    found = called(model, batch)
    assert change is _other_numbers or calls(lambda: called(model, batch)) > before
    assert sqnr_db(steps(model, batch), found) >= 40


def test_what_else_a_layer_is_given_is_computed_by_its_steps(calls: Calls) -> None:
    model, batch = bert()
    called(model, batch)
    layer, x = model.module.encoder.layer[0], torch.randn(4, LENGTH, 32)
    causal = torch.zeros(4, 1, LENGTH, LENGTH).masked_fill(torch.ones(LENGTH, LENGTH).triu(1) > 0, -1e9)
    with torch.no_grad():
        assert calls(lambda: layer(x)) == 1
        assert calls(lambda: layer(x, causal)) > 1
        assert calls(lambda: layer(x, output_attentions=True)) > 1
        assert sqnr_db(layer(x, output_attentions=True), layer(x)) >= 60
        assert sqnr_db(layer(x, causal), layer(x)) < 60
    with torch.enable_grad():
        assert calls(lambda: layer(x.clone().requires_grad_())) > 1
