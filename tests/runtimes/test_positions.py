"""Positions, masks and lookups in native sections, and what plans for different shapes share."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import nn

import quantflow as qf
from quantflow.runtimes.native import PLANS_PER_SECTION
from quantflow.runtimes.reference import ReferenceRunner
from quantflow.sources.models.torchvision_zoo import import_torchvision
from quantflow.stages.evaluate import tensors

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux") or os.uname().machine != "x86_64", reason="native is built for Linux x86-64"
)


class With(nn.Module):
    """A linear, and a function of its result and an index."""

    def __init__(self, function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.linear, self.function = nn.Linear(8, 8), function

    def forward(self, x: torch.Tensor, i: torch.Tensor) -> torch.Tensor:
        return self.function(self.linear(x), i)


def _places(size: int, x: torch.Tensor) -> torch.Tensor:
    return torch.arange(size, device=x.device)


def _sum(i: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return i.to(x.dtype).sum()


FUNCTIONS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "rows": lambda x, i: x[0][i],
    "columns": lambda x, i: x[:, i],
    "last": lambda x, i: x[:, :, i],
    "apart": lambda x, i: x[(i * 0)[:, None], :, i],
    "together": lambda x, i: x[:, i[:, None], i],
    "counting": lambda x, i: x[:, _places(x.shape[1], x)] * _sum(i, x),
    "diagonal": lambda x, _: x[:, _places(x.shape[0], x), _places(x.shape[0], x)],
    "from the end": lambda x, _: x[:, _places(2, x) - 2],
    "every other": lambda x, _: x[:, torch.arange(0, x.shape[1], 2)],
    "gather": lambda x, i: x.gather(1, i[None, :, None].expand(x.shape[0], -1, x.shape[2]).abs()),
    "positions gathered": lambda x, _: x.gather(2, _places(5, x)[None, None].expand(x.shape[0], x.shape[1], 5)),
    "running sum": lambda x, i: x[:, :1] * _sum(i.cumsum(0), x) + _sum((i > 0).cumsum(0), x),
    "type of another": lambda x, i: x + i.abs().type_as(x).sum() - _sum(-i, x),
    "least": lambda x, i: x * _sum(torch.min(i, torch.zeros_like(i)), x) + torch.full((), 3) + torch.full_like(x, 2),
    "causal": lambda x, _: torch.where(_places(x.shape[1], x)[:, None] >= _places(8, x)[None], x, x.new_full((), -1.0)),
    "far apart": lambda x, _: torch.where(_places(x.shape[1], x)[:, None] + 9 > _places(8, x)[None], x, -x),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_lookups_equal_the_reference(name: str) -> None:
    torch.manual_seed(0)
    module = With(FUNCTIONS[name]).eval()
    calls = [(torch.randn(3, n, 8), torch.tensor([1, -1, 0, -2])) for n in (5, 6, 9)]
    model = qf.quantize(module, calls, dynamic={"x": {1: "length"}}, runtime="native")
    assert model.compiled.left_to_torch() == {}
    reference = ReferenceRunner(model.record.program)
    for call in [*calls, (torch.randn(3, 7, 8), torch.tensor([0, 1, 1, -2]))]:
        # The first call of a size, and one on the plan that is known.
        for _ in range(2):
            torch.testing.assert_close(model(*call), reference(list(call)), rtol=1e-5, atol=1e-5)


def test_an_index_outside_is_an_error_and_not_a_crash() -> None:
    module = With(FUNCTIONS["columns"]).eval()
    model = qf.quantize(module, [(torch.randn(2, 5, 8), torch.tensor([1, 0]))], runtime="native")
    for wrong in (5, -6):
        with pytest.raises(Exception, match=rf"index {wrong} is outside a dimension of 5"):
            model(torch.randn(2, 5, 8), torch.tensor([0, wrong]))
    assert model(torch.randn(2, 5, 8), torch.tensor([4, -5])).shape == (2, 2, 8)


def _encoder(attention: str) -> nn.Module:
    import_torchvision()
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, vocab_size=100,
        max_position_embeddings=64, attn_implementation=attention,
    )  # fmt: skip
    return BertModel(config, add_pooling_layer=False).eval()


def _text(length: int, batch: int = 2) -> dict[str, torch.Tensor]:
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[0, length // 2 :] = 0
    return {"input_ids": torch.randint(100, (batch, length)), "attention_mask": mask}


@pytest.mark.parametrize("mode", ["export", "torchscript"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("masked", [True, False])
def test_an_encoder_of_any_length_is_one_section(mode: Any, attention: str, masked: bool) -> None:
    module = _encoder(attention)
    calls: list[Any] = [_text(n) for n in (6, 9, 12)]
    if not masked:
        calls = [{"input_ids": call["input_ids"]} for call in calls]
    varying = qf.quantize(module, calls, mode=mode, runtime="native")
    fixed = qf.quantize(module, calls[:1], mode=mode, dynamic="none", runtime="native")
    for model in (varying, fixed):
        assert model.compiled.left_to_torch() == {}
        assert len(model.compiled.runner._parts) == 1  # type: ignore[attr-defined]
    kernels = [
        [row["kernel"] for row in model.compiled.runner.profile(list(calls[0].values()))]  # type: ignore[attr-defined]
        for model in (varying, fixed)
    ]
    assert kernels[0].count("host.gather") <= 3
    assert [k for k in kernels[0] if "attention" in k or "igemm" in k] == [
        k for k in kernels[1] if "attention" in k or "igemm" in k
    ]
    reference = ReferenceRunner(varying.record.program)
    for call in [*calls, {key: value[:1] for key, value in calls[2].items()}]:
        ((_, expected),) = tensors(reference(list(call.values())))
        torch.testing.assert_close(varying(**call).last_hidden_state, expected, rtol=1e-3, atol=1e-3)


def test_threads_with_different_lengths_share_memory_and_stay_right() -> None:
    module = _encoder("sdpa")
    model: Any = qf.quantize(module, [_text(n) for n in (6, 9)], runtime="native")
    calls = [_text(2 + n, batch=1 + n % 3) for n in range(PLANS_PER_SECTION + 4)]
    with torch.inference_mode():
        expected = [model(**call).last_hidden_state.clone() for call in calls]

        def all_of(start: int) -> bool:
            order = [(start * 5 + i) % len(calls) for i in range(3 * len(calls))]
            return all(torch.equal(model(**calls[i]).last_hidden_state, expected[i]) for i in order)

        with ThreadPoolExecutor(6) as pool:
            assert all(pool.map(all_of, range(6)))
