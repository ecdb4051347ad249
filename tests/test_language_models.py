"""Language models as transformers makes them: caches dropped, typed outputs, any length, and `generate()`."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import quantflow as qf
from quantflow.ir.binding import bind
from quantflow.ir.structure import plain
from quantflow.runtimes.reference import ReferenceRunner
from quantflow.sources.models.torchvision_zoo import import_torchvision

import_torchvision()  # transformers imports it, and its wheel may be one for another torch
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")


def text(batch: int, length: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 99, (batch, length))
    return {"input_ids": ids, "attention_mask": torch.ones(batch, length, dtype=torch.long)}


def decoder() -> Any:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=99, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2
    )
    return transformers.GPT2LMHeadModel(config).eval()


def test_generate_on_an_int8_model_gives_the_reference_runtimes_tokens() -> None:
    module, calibration, prompt = decoder(), [text(16, 9), text(16, 20)], text(2, 6)
    tokens = []
    for runtime in ("native", "reference"):
        model: Any = qf.quantize(module, calibration, runtime=runtime)
        # transformers 4.50 gives the past as tuples, which are results like any others.
        if not isinstance(module(**prompt).past_key_values, tuple):
            assert any("is a cache of its past" in notice for notice in model.results["notices"])
        shell = copy.copy(module)
        shell.forward = lambda input_ids, attention_mask=None, model=model, **_: model(
            input_ids=input_ids, attention_mask=attention_mask
        )
        tokens.append(shell.generate(**prompt, max_new_tokens=8, do_sample=False, use_cache=False))
    assert torch.equal(*tokens)


@pytest.mark.parametrize("mode", ["export", "torchscript"])
def test_an_encoder_decoders_encoder_gives_its_own_type_at_any_length(mode: str) -> None:
    torch.manual_seed(0)
    config = transformers.T5Config(vocab_size=99, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    module = transformers.T5EncoderModel(config).eval()
    model: Any = qf.quantize(module, [text(8, 9), text(8, 16)], mode=mode)
    for batch, length in ((2, 12), (1, 30)):
        call = text(batch, length)
        found, program = model(**call), model.record.program
        assert type(found) is type(module(**call))
        wanted = plain(ReferenceRunner(program)(bind(program, (), call)))["last_hidden_state"]
        assert torch.nn.functional.cosine_similarity(found.last_hidden_state, wanted, dim=-1).min() > 0.99
