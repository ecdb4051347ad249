"""Which unedited models run: each in every mode, on two shapes, against float and the reference, and after reload.

    python -m bench.model_table --write docs/models.md            # the whole table, some minutes on a core
    python -m bench.model_table --only 'timm *' --modes export

Weights are random (BatchNorm statistics from the calibration data) and configurations small, since what is shown is
that a model is taken as it comes and computed right, not what int8 costs it. A model that is refused is a row with the
words that its user reads. Packages: timm, torchvision, transformers, segmentation_models_pytorch, ultralytics; a family
whose package is not there is left out, by name.
"""

from __future__ import annotations

import fnmatch
import importlib.util
import logging
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import quantflow as qf
from bench.reporting import arguments, console, show, show_machine, write
from quantflow.errors import QuantflowError, first_line
from quantflow.ir.binding import bind
from quantflow.ir.structure import plain
from quantflow.runtimes.specification import Specification
from quantflow.sources.models.torchvision_zoo import import_torchvision
from quantflow.stages.evaluate import tensors

MODES = ("export", "torchscript", "imperative")
COLUMNS = ("model", *MODES, "int8 layers", "note")
#: Small random networks amplify rounding: this tells right from wrong, not good from bad.
LEAST_DB = 0.0
#: Of the whole model to the reference's result on the same input.
LEAST_TO_REFERENCE_DB = 15.0


@dataclass(frozen=True)
class Entry:
    """One model: how it is made, and two batches and one call of other sizes."""

    name: str
    make: Callable[[], nn.Module]
    batches: Callable[[], list[Any]]
    call: Callable[[], Any]


def _images(*sizes: tuple[int, int]) -> tuple[Callable[[], list[Any]], Callable[[], Any]]:
    return (
        lambda: [torch.randn(4, 3, h, w) for h, w in sizes],
        lambda: torch.randn(3, 3, *sizes[-1]),
    )


def _ids(batch: int, length: int) -> torch.Tensor:
    return torch.randint(5, 99, (batch, length))


def _text(batch: int, length: int, **more: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"input_ids": _ids(batch, length), "attention_mask": torch.ones(batch, length, dtype=torch.long), **more}


def _timm() -> Iterator[Entry]:
    import timm

    varying, fixed = _images((64, 64), (64, 96)), _images((64, 64))
    for name in (
        "resnet18", "resnext50_32x4d", "seresnet18", "mobilenetv3_small_100", "efficientnet_b0", "regnety_002",
        "convnext_atto", "densenet121", "ghostnet_100", "mobilenetv4_conv_small", "repvgg_a0", "res2net50_26w_4s",
        "hrnet_w18_small", "dla34", "fbnetc_100", "mnasnet_100", "lcnet_050", "tinynet_e", "edgenext_xx_small",
    ):  # fmt: skip
        yield Entry(name, lambda name=name: timm.create_model(name, pretrained=False), *varying)
    for name, options in (
        ("vit_tiny_patch16_224", {"img_size": 64}), ("deit_tiny_patch16_224", {"img_size": 64}),
        ("mixer_s32_224", {"img_size": 64}), ("swin_tiny_patch4_window7_224", {"img_size": 64, "window_size": 2}),
        ("levit_128s", {"img_size": 64}), ("poolformer_s12", {}), ("mobilevit_xxs", {}),
    ):  # fmt: skip
        make = lambda name=name, options=options: timm.create_model(name, pretrained=False, **options)  # noqa: E731
        yield Entry(name, make, *fixed)


def _torchvision() -> Iterator[Entry]:
    models = import_torchvision().models
    varying, fixed = _images((64, 64), (64, 96)), _images((64, 64))
    for name in (
        "resnet18", "mobilenet_v2", "mobilenet_v3_small", "efficientnet_b0", "shufflenet_v2_x0_5", "squeezenet1_1",
        "mnasnet0_5", "regnet_x_400mf", "convnext_tiny", "googlenet", "densenet121",
    ):  # fmt: skip
        yield Entry(name, lambda name=name: getattr(models, name)(weights=None), *varying)
    for name in ("vgg11_bn", "alexnet"):
        yield Entry(name, lambda name=name: getattr(models, name)(weights=None), *_images((64, 64), (96, 64)))
    vit = {"image_size": 32, "patch_size": 8, "num_layers": 2, "num_heads": 4, "hidden_dim": 32, "mlp_dim": 64}
    yield Entry("VisionTransformer", lambda: models.VisionTransformer(**vit), *_images((32, 32)))
    yield Entry("swin_t", lambda: models.swin_t(weights=None), *fixed)
    segmentation = models.segmentation
    for name in ("fcn_resnet50", "deeplabv3_mobilenet_v3_large", "lraspp_mobilenet_v3_large"):
        make = lambda name=name: getattr(segmentation, name)(weights=None, weights_backbone=None)  # noqa: E731
        yield Entry(name, make, *varying)
    backbone = models.detection.backbone_utils.resnet_fpn_backbone
    yield Entry("resnet18 with FPN", lambda: backbone(backbone_name="resnet18", weights=None), *varying)
    head = models.detection.retinanet.RetinaNetHead
    levels = lambda n: [torch.randn(2, 256, s, s) for s in (n, n // 2)]  # noqa: E731
    yield Entry(
        "RetinaNet's head", lambda: head(256, 9, 10), lambda: [(levels(16),), (levels(8),)], lambda: (levels(12),)
    )


def _transformers() -> Iterator[Entry]:
    import transformers as hf

    small = {
        "vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
    }  # fmt: skip
    text = (lambda: [_text(4, 9), _text(3, 16)], lambda: _text(2, 12))
    encoders: dict[str, tuple[Any, Any, dict[str, Any]]] = {
        "BERT": (hf.BertForSequenceClassification, hf.BertConfig, small),
        "RoBERTa": (hf.RobertaForMaskedLM, hf.RobertaConfig, small),
        "ELECTRA": (hf.ElectraModel, hf.ElectraConfig, small | {"embedding_size": 32}),
        "ALBERT": (hf.AlbertModel, hf.AlbertConfig, small | {"embedding_size": 16}),
        "DistilBERT": (
            hf.DistilBertModel, hf.DistilBertConfig,
            {"vocab_size": 99, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64},
        ),
        "MPNet": (hf.MPNetModel, hf.MPNetConfig, small),
        "DeBERTa-v2": (hf.DebertaV2Model, hf.DebertaV2Config, small),
        "GPT-2": (hf.GPT2LMHeadModel, hf.GPT2Config, {"vocab_size": 99, "n_embd": 32, "n_layer": 2, "n_head": 4}),
        "OPT": (
            hf.OPTForCausalLM, hf.OPTConfig,
            {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 64,
             "word_embed_proj_dim": 32},
        ),
        "Llama": (hf.LlamaForCausalLM, hf.LlamaConfig, small | {"num_key_value_heads": 2}),
        "Qwen2": (hf.Qwen2ForCausalLM, hf.Qwen2Config, small | {"num_key_value_heads": 2}),
        "Mistral": (hf.MistralForCausalLM, hf.MistralConfig, small | {"num_key_value_heads": 2}),
        "Gemma": (hf.GemmaForCausalLM, hf.GemmaConfig, small | {"num_key_value_heads": 2, "head_dim": 8}),
        "GPT-NeoX": (hf.GPTNeoXForCausalLM, hf.GPTNeoXConfig, small),
        "T5 encoder": (
            hf.T5EncoderModel, hf.T5Config,
            {"vocab_size": 99, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4},
        ),
    }  # fmt: skip
    for name, (kind, config, options) in encoders.items():
        yield Entry(name, lambda kind=kind, config=config, options=options: kind(config(**options)), *text)
    t5 = {"vocab_size": 99, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    pair = lambda b, n: _text(b, n, decoder_input_ids=_ids(b, 5))  # noqa: E731
    yield Entry(
        "T5", lambda: hf.T5ForConditionalGeneration(hf.T5Config(**t5, decoder_start_token_id=0)),
        lambda: [pair(4, 9), pair(3, 16)], lambda: pair(2, 12),
    )  # fmt: skip
    bart = {
        "vocab_size": 99, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
        "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
    }  # fmt: skip
    yield Entry(
        "BART", lambda: hf.BartForConditionalGeneration(hf.BartConfig(**bart)),
        lambda: [pair(4, 9), pair(3, 16)], lambda: pair(2, 12),
    )  # fmt: skip
    vision = {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "image_size": 32,
        "patch_size": 8,
    }  # fmt: skip
    pictures = _images((32, 32))
    yield Entry("ViT", lambda: hf.ViTForImageClassification(hf.ViTConfig(**vision)), *pictures)
    yield Entry("DeiT", lambda: hf.DeiTModel(hf.DeiTConfig(**vision)), *pictures)
    yield Entry("CLIP's vision model", lambda: hf.CLIPVisionModel(hf.CLIPVisionConfig(**vision)), *pictures)
    yield Entry("DINOv2", lambda: hf.Dinov2Model(hf.Dinov2Config(**vision)), *pictures)
    yield Entry(
        "SegFormer",
        lambda: hf.SegformerForSemanticSegmentation(
            hf.SegformerConfig(hidden_sizes=[16, 16, 32, 32], depths=[1, 1, 1, 1], decoder_hidden_size=16)
        ),
        *_images((64, 64), (64, 96)),
    )
    speech = {
        "vocab_size": 32, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
        "conv_dim": (32, 32), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_conv_pos_embeddings": 16,
        "num_conv_pos_embedding_groups": 4,
    }  # fmt: skip
    waves = (lambda: [torch.randn(2, 800), torch.randn(2, 1000)], lambda: torch.randn(1, 1200))
    yield Entry("wav2vec 2.0", lambda: hf.Wav2Vec2ForCTC(hf.Wav2Vec2Config(**speech)), *waves)
    yield Entry("HuBERT", lambda: hf.HubertModel(hf.HubertConfig(**speech)), *waves)
    whisper = bart | {"max_source_positions": 50, "num_mel_bins": 16, "pad_token_id": 0, "decoder_start_token_id": 1}
    heard = lambda b, n: {"input_features": torch.randn(b, 16, 100), "decoder_input_ids": _ids(b, n)}  # noqa: E731
    yield Entry(
        "Whisper", lambda: hf.WhisperForConditionalGeneration(hf.WhisperConfig(**whisper)),
        lambda: [heard(2, 5), heard(2, 8)], lambda: heard(3, 6),
    )  # fmt: skip


def _segmentation() -> Iterator[Entry]:
    import segmentation_models_pytorch as smp

    varying = _images((64, 64), (64, 96))
    for kind in ("Unet", "UnetPlusPlus", "FPN", "Linknet", "DeepLabV3Plus", "PAN"):
        make = lambda kind=kind: getattr(smp, kind)("resnet18", encoder_weights=None)  # noqa: E731
        yield Entry(kind, make, *varying)


def _ultralytics() -> Iterator[Entry]:
    from ultralytics.nn import tasks

    varying = _images((64, 64), (64, 96))
    for name, kind in (
        ("yolov8n", "DetectionModel"), ("yolo11n", "DetectionModel"), ("yolov8n-seg", "SegmentationModel"),
        ("yolov8n-pose", "PoseModel"), ("yolov8n-cls", "ClassificationModel"),
    ):  # fmt: skip
        make = lambda name=name, kind=kind: getattr(tasks, kind)(f"{name}.yaml", verbose=False)  # noqa: E731
        yield Entry(name, make, *varying)


#: Package → its models.
FAMILIES: dict[str, Callable[[], Iterator[Entry]]] = {
    "timm": _timm,
    "torchvision": _torchvision,
    "transformers": _transformers,
    "segmentation_models_pytorch": _segmentation,
    "ultralytics": _ultralytics,
}


def entries() -> Iterator[tuple[str, Entry]]:
    """(package, model) of every package that is installed; the others are named."""
    import_torchvision()
    for package, family in FAMILIES.items():
        if importlib.util.find_spec(package) is None:
            console.print(f"{package} is not installed: its models are left out")
            continue
        yield from ((package, entry) for entry in family())


def run(entry: Entry, mode: str) -> tuple[str, str]:
    """("ok", int8 layers) or ("refused" | "wrong" | "crashed", why)."""
    torch.manual_seed(0)
    module = _settled(entry.make(), entry.batches()[0])
    try:
        model: Any = qf.quantize(module, entry.batches(), mode=mode)
        for call in (entry.call(), entry.batches()[0]):
            if (wrong := _why_wrong(module, model, call, mode)) is not None:
                return "wrong", wrong
    except QuantflowError as error:
        return "refused", first_line(error)
    except Exception as error:  # noqa: BLE001 what a table is for
        return "crashed", f"{type(error).__name__}: {first_line(error)}"
    proof = model.results["int8_proof"]
    return "ok", f"{proof['int8_layers']} of {proof['core_layers']}"


def _why_wrong(module: nn.Module, model: Any, call: Any, mode: str) -> str | None:
    wanted, found = _called(module, call), _called(model, call)
    if type(wanted) is not type(found):
        return f"gives a {type(found).__name__}, float a {type(wanted).__name__}"
    if (db := _sqnr_db(wanted, found)) < LEAST_DB:
        return f"{db:.1f} dB to float"
    if mode != "imperative":
        args, kwargs = _arguments(call)
        reference = Specification(model.record.program)(bind(model.record.program, args, kwargs))
        if (db := _sqnr_db(reference, found)) < LEAST_TO_REFERENCE_DB:
            return f"{db:.1f} dB to the reference"
    with tempfile.TemporaryDirectory() as folder:
        model.save(Path(folder) / "artifact")
        again = _called(qf.load(Path(folder) / "artifact"), call)
    if mode != "imperative" and _sqnr_db(found, again) < 100:
        return "differs after reload"
    return None


def _arguments(call: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(call, dict):
        return (), call
    return (call if isinstance(call, tuple) else (call,)), {}


def _called(model: Any, call: Any) -> Any:
    args, kwargs = _arguments(call)
    with torch.no_grad():
        return model(*args, **kwargs)


def _sqnr_db(wanted: Any, found: Any) -> float:
    """Of all floating tensors together; -inf where shapes or their number differ."""
    a = [x for _, x in tensors(plain(wanted)) if x.is_floating_point()]
    b = [x for _, x in tensors(plain(found)) if x.is_floating_point()]
    if [x.shape for x in a] != [x.shape for x in b]:
        return float("-inf")
    flat = [torch.cat([x.double().flatten() for x in each]) for each in (a, b)]
    finite = flat[0].isfinite() & flat[1].isfinite()
    signal, noise = flat[0][finite].pow(2).sum(), (flat[0] - flat[1])[finite].pow(2).sum()
    return float(10 * torch.log10(signal / noise.clamp_min(1e-30 * signal.clamp_min(1e-30))))


def _settled(module: nn.Module, batch: Any) -> nn.Module:
    """BatchNorm statistics from one batch: random ones let activations grow without bound."""
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    module.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    if norms:
        _called(module, batch)
    return module.eval()


def page(rows: list[dict[str, Any]], found: dict[str, Any]) -> str:
    """docs/models.md."""
    right = sum(row[mode] == "ok" for row in rows for mode in MODES[:2])
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    lines = [
        "# Models that run",
        "",
        "Written by `python -m bench.model_table --write docs/models.md`: unedited models of other packages, small or",
        "with random weights, quantized in each mode on batches of two shapes where the model takes them, and held",
        "against float, against the reference, and after reload.",
        "",
        f"Export and TorchScript: {right} of {2 * len(rows)} right. {versions}.",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|" + "---|" * len(COLUMNS),
        *("| " + " | ".join(str(row[c]).replace("|", "\\|") for c in COLUMNS) + " |" for row in rows),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--only", default="*", metavar="GLOB", help="'timm *', '* T5'")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--write", type=Path, metavar="FILE", help="the table as a page")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    machine, rows = show_machine(), []
    for package, entry in entries():
        name = f"{package} {entry.name}"
        if not fnmatch.fnmatch(name, options.only) or (options.smoke and len(rows) == 1):
            continue
        start, row = time.perf_counter(), dict.fromkeys(COLUMNS, "") | {"model": name}
        notes: dict[str, list[str]] = {}
        for mode in options.modes:
            row[mode], said = run(entry, mode)
            if row[mode] == "ok":
                row["int8 layers"] = row["int8 layers"] or said
            else:
                notes.setdefault(said, []).append(mode)
        row["note"] = "; ".join(f"{', '.join(modes)}: {said}" for said, modes in notes.items())
        console.print(f"{name}: {[row[m] for m in options.modes]} {time.perf_counter() - start:.0f} s {row['note']}")
        rows.append(row)
    show("models", rows, COLUMNS)
    if options.write is not None:
        options.write.write_text(page(rows, machine))
    write(options.json, {"machine": machine, "rows": rows})


if __name__ == "__main__":
    main()
