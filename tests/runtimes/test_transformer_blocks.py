"""Blocks of transformers and torchvision, random and tiny: every linear and convolution runs in int8, unedited."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import quantflow as qf
from quantflow.sources.models.torchvision_zoo import import_torchvision
from quantflow.sources.models.transformers_zoo import ImageModel, TextModel

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 32}


def bert(transformers: Any) -> nn.Module:
    return transformers.BertModel(transformers.BertConfig(vocab_size=50, max_position_embeddings=16, **SIZES))


def llama(transformers: Any) -> nn.Module:
    """RoPE, grouped queries, SwiGLU, a causal mask, no cache."""
    return transformers.LlamaModel(
        transformers.LlamaConfig(vocab_size=50, num_key_value_heads=2, use_cache=False, **SIZES)
    )


def vit(transformers: Any) -> nn.Module:
    return transformers.ViTModel(transformers.ViTConfig(image_size=16, patch_size=8, **SIZES))


def swin(transformers: Any) -> nn.Module:
    config = transformers.SwinConfig(
        image_size=16, patch_size=2, embed_dim=8, depths=[2, 1], num_heads=[2, 2], window_size=4
    )
    return transformers.SwinModel(config)


def convnext(transformers: Any) -> nn.Module:
    config = transformers.ConvNextConfig(image_size=16, patch_size=2, hidden_sizes=[8, 16], depths=[1, 1], num_stages=2)
    return transformers.ConvNextModel(config)


TEXTS, IMAGES = (bert, llama), (vit, swin, convnext)


def build(make: Callable[[Any], nn.Module], attention: str) -> tuple[nn.Module, list[dict[str, torch.Tensor]]]:
    """The model and its calibration batches."""
    import_torchvision()  # transformers stops at a torchvision that fails to import
    transformers = pytest.importorskip("transformers", reason="the blocks are its")
    torch.manual_seed(0)
    model = make(transformers).eval()
    if make is not convnext:
        model.set_attn_implementation(attention)
    if make not in TEXTS:
        return ImageModel(model, "last_hidden_state"), [{"pixel_values": torch.randn(2, 3, 16, 16)} for _ in range(2)]
    mask = torch.ones(3, 8, dtype=torch.int64)
    mask[1, 5:] = 0
    batches = [{"input_ids": torch.randint(0, 50, (3, 8)), "attention_mask": mask} for _ in range(2)]
    return TextModel(model, "last_hidden_state"), batches


def check(results: dict[str, Any], attention: str | None = None) -> None:
    proof = results["int8_proof"]
    assert proof["int8_layers_run"] == proof["int8_layers"] > 0
    assert {layer["op"] for layer in proof["float_layers"]} <= {"embedding"}
    assert results["accuracy"]["sqnr_db"] > 25
    floats = {row["op"] for row in results["plan"] if row["precision"] == "float"}
    if attention is not None:
        assert ("scaled_dot_product_attention" in floats) is (attention == "sdpa")
        assert ("matmul" in floats) is (attention == "eager")


@pytest.mark.parametrize("make", [*TEXTS, *IMAGES], ids=lambda make: make.__name__)
@pytest.mark.parametrize("mode", ["export", "torchscript"])
def test_every_linear_and_convolution_is_int8(make: Callable[[Any], nn.Module], mode: str) -> None:
    attention = "sdpa" if mode == "export" else "eager"
    model, batches = build(make, attention)
    check(qf.quantize(model, batches, mode=mode).results, None if make is convnext else attention)


@pytest.mark.parametrize("make", [bert, llama], ids=lambda make: make.__name__)
def test_attention_products_become_int8_on_request(make: Callable[[Any], nn.Module]) -> None:
    model, batches = build(make, "eager")
    results = qf.quantize(model, batches, layers={"matmul": "int8"}).results
    products = [
        row for row in results["plan"] if row["op"] == "matmul" and row["name"].endswith(("matmul", "matmul_1"))
    ]
    assert [row["precision"] for row in products] == ["int8"] * len(products)
    assert len(products) >= 2
    assert results["accuracy"]["sqnr_db"] > 20


@pytest.mark.parametrize("make", [llama, vit], ids=["llama", "vit"])
def test_smoothing_folds_into_the_blocks(make: Callable[[Any], nn.Module]) -> None:
    model, batches = build(make, "sdpa")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name and name.endswith("weight"):
                parameter[3] = 100.0
    plain = qf.quantize(model, batches, layers={"linear": "int8"}).results
    results = qf.quantize(model, batches, layers={"linear": "int8"}, algorithms=["smooth"]).results
    (applied,) = results["algorithms"]
    notes = {layer["layer"]: layer["note"] for layer in applied["layers"]}
    assert sum("folded into" in note for note in notes.values()) >= 2
    assert results["accuracy"]["sqnr_db"] > plain["accuracy"]["sqnr_db"]


def torchvision_vit(models: Any) -> nn.Module:
    return models.VisionTransformer(16, 8, 1, 2, 16, 32, num_classes=5)


def torchvision_swin(models: Any) -> nn.Module:
    return models.SwinTransformer([2, 2], 8, [2], [2], [2, 2], num_classes=5)


def torchvision_convnext(models: Any) -> nn.Module:
    return models.ConvNeXt([models.convnext.CNBlockConfig(8, 16, 1), models.convnext.CNBlockConfig(16, None, 1)], 0.0)


@pytest.mark.parametrize("make", [torchvision_vit, torchvision_swin, torchvision_convnext], ids=lambda m: m.__name__)
def test_torchvision_blocks(make: Callable[[Any], nn.Module]) -> None:
    models = import_torchvision().models
    torch.manual_seed(0)
    model = make(models).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith(("heads", "head", "classifier")) and parameter.dim() == 2:
                parameter.copy_(torch.randn_like(parameter))  # torchvision starts some heads at zero
    check(qf.quantize(model, [torch.randn(2, 3, 16, 16) for _ in range(2)]).results)


@pytest.mark.parametrize("mode", ["export", "torchscript"])
@pytest.mark.parametrize("batch_first", [True, False])
def test_an_encoder_of_torch_permutes_rows_without_copies(batch_first: bool, mode: str) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=batch_first)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    x = torch.randn(5, 7, 32)
    batch = 0 if batch_first else 1
    batches = [x, x.narrow(batch, 0, 3)]
    quantized = qf.quantize(model, batches, runtime="native", device="cpu", mode=mode)
    kernels = [row["kernel"] for row in quantized.compiled.runner.profile([x])]
    assert not {"host.copy", "host.add"} & set(kernels), kernels
    alone = torch.cat([quantized(part) for part in x.split(1, batch)], batch)  # one sequence has no rows to permute
    assert torch.equal(quantized(x), alone)
