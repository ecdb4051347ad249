"""Which unedited models run: each in every mode, on two shapes, against float and the reference, and after reload.

    python -m bench.model_table --json models.json --write docs/models.md    # the whole table: about an hour on a core
    python -m bench.model_table --json models.json --only 'timm *' --modes export torchscript

Every result is in the JSON file as soon as it is there, and what is there is not run again (--again does): a table may
be made in parts, and goes on after an interruption. Each model has --seconds per mode; one that ends the process is a
row that says so. `--write` makes the page of all rows of the file.

Weights are random (BatchNorm statistics from the calibration data) and configurations small, since what is shown is
that a model is taken as it comes and computed right, not what int8 costs it. A model that is refused is a row with the
words that its user reads. Packages: timm, torchvision, transformers, segmentation_models_pytorch, ultralytics; a family
whose package is not there is left out, by name.
"""

from __future__ import annotations

import contextlib
import faulthandler
import fnmatch
import importlib.util
import json
import logging
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

import quantflow as qf
from bench.reporting import arguments, console, show, show_machine, write
from quantflow.errors import QuantflowError, cause_line, first_line
from quantflow.ir.binding import bind
from quantflow.ir.structure import plain
from quantflow.runtimes.specification import Specification
from quantflow.sources.models.torchvision_zoo import import_torchvision
from quantflow.stages.evaluate import tensors

MODES = ("export", "torchscript", "imperative")
COLUMNS = ("model", *MODES, "int8 layers", "dB to float", "note")
#: Random networks amplify rounding, some beyond all likeness. Below this SQNR to float, the same model with its last
#: layer alone in int8 tells whether all the rest is right, and it must reach the second.
TELLING_DB, LEAST_ALONE_DB = 10.0, 10.0
#: Of the whole model to the reference on the same input. Where the network amplifies, a code next to a rounding
#: tie does so too, but costs less than rounding every value: the second is how much less, at least.
LEAST_TO_REFERENCE_DB, LEAST_BEYOND_FLOAT_DB = 15.0, 3.0
#: Modes whose SQNR to float differs by more are named, and so are other counts of layers.
ALIKE_DB = 1.0


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
    larger = _images((128, 128), (128, 160))  # what it pools four times after a factor of 16 has to be there
    for kind in ("Unet", "UnetPlusPlus", "FPN", "Linknet", "DeepLabV3Plus", "PAN"):
        make = lambda kind=kind: getattr(smp, kind)("resnet18", encoder_weights=None)  # noqa: E731
        yield Entry(kind, make, *(larger if kind == "PAN" else varying))


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


def entries(packages: Iterable[str] = tuple(FAMILIES)) -> Iterator[tuple[str, Entry]]:
    """(package, model) of every package that is installed; the others are named."""
    import_torchvision()
    for package in packages:
        family = FAMILIES[package]
        if importlib.util.find_spec(package) is None:
            console.print(f"{package} is not installed: its models are left out")
            continue
        yield from ((package, entry) for entry in family())


@dataclass(frozen=True)
class Result:
    """What came of one model in one mode.

    Attributes:
        verdict: "ok", "refused", "wrong" or "crashed".
        note: why it is not ok.
        layers: "int8 of all layers with weights".
        db: the least SQNR to float, of the calls that were compared.
        reload_db: the least of the model to what its artifact gives when it is loaded.
    """

    verdict: str
    note: str = ""
    layers: str = ""
    db: float | None = None
    reload_db: float | None = None


class OutOfTime(BaseException):
    """No Exception, so that nothing on the way takes it for a failure of what it tries."""


def run(entry: Entry, mode: str, seconds: float | None = None) -> Result:
    """Quantize the model and hold it against float, the reference and what is loaded again.

    Args:
        seconds: the most that it may take; None where nothing bounds it.
    """
    torch.manual_seed(0)
    try:
        with _at_most(seconds):
            module = _settled(entry.make(), entry.batches()[0])
            model: Any = qf.quantize(module, entry.batches(), mode=mode)
            least = reloaded = float("inf")
            for call in (entry.call(), entry.batches()[0]):
                db, wrong = _compared(module, model, call, entry.batches(), mode)
                least = min(least, db)
                if not wrong:
                    reloaded = min(reloaded, _reloaded_db(model, call, mode))
                    allowed = _least_to_reference_db(db) if mode == "imperative" else 100
                    wrong = "" if reloaded >= allowed else f"{reloaded:.1f} dB to itself after reload"
                if wrong:
                    return Result("wrong", wrong, db=least)
    except QuantflowError as error:
        return Result("refused", first_line(error))
    except OutOfTime:
        return Result("crashed", f"takes more than {seconds:g} s")
    except Exception as error:  # noqa: BLE001 what a table is for
        return Result("crashed", f"{type(error).__name__}: {cause_line(error)}")
    proof = model.results["int8_proof"]
    return Result("ok", "", f"{proof['int8_layers']} of {proof['core_layers']}", least, reloaded)


@contextlib.contextmanager
def _at_most(seconds: float | None) -> Iterator[None]:
    """OutOfTime is raised then; a kernel that goes on for half as long again ends the process."""
    if seconds is None:
        yield
        return

    def stop(*_: Any) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    faulthandler.dump_traceback_later(1.5 * seconds, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _compared(module: nn.Module, model: Any, call: Any, batches: list[Any], mode: str) -> tuple[float, str]:
    """(SQNR to float in dB, what is wrong)."""
    wanted, found = _called(module, call), _called(model, call)
    if type(wanted) is not type(found):
        return float("-inf"), f"gives a {type(found).__name__}, float a {type(wanted).__name__}"
    to_float = _sqnr_db(wanted, found)
    if (
        not to_float >= TELLING_DB
        and not (alone := _last_alone_db(module, model, call, batches, mode)) >= LEAST_ALONE_DB
    ):
        return to_float, f"{to_float:.1f} dB to float, {alone:.1f} with its last layer alone in int8"
    # A module's own code also gives the caches that a program leaves out, and computes its float parts in torch.
    is_code = mode == "imperative"
    args, kwargs = _arguments(call)
    reference = Specification(model.record.program)(bind(model.record.program, args, kwargs))
    if not (db := _sqnr_db(reference, found, whole=not is_code)) >= _least_to_reference_db(to_float):
        return to_float, f"{db:.1f} dB to the reference"
    return to_float, ""


def _least_to_reference_db(to_float: float) -> float:
    return min(LEAST_TO_REFERENCE_DB, to_float + LEAST_BEYOND_FLOAT_DB)


def _reloaded_db(model: Any, call: Any, mode: str) -> float:
    """SQNR of the model to its artifact, loaded again: a module's own code computes its float parts in torch."""
    with tempfile.TemporaryDirectory() as folder:
        model.save(Path(folder) / "artifact")
        again = _called(qf.load(Path(folder) / "artifact"), call)
    return _sqnr_db(again, _called(model, call), whole=mode != "imperative")


def _last_alone_db(module: nn.Module, model: Any, call: Any, batches: list[Any], mode: str) -> float:
    last = [row["name"] for row in model.results["plan"] if row["precision"] == "int8"][-1]
    alone = qf.quantize(module, batches, mode=mode, layers={"*": "float", last: "int8"})
    return _sqnr_db(_called(module, call), _called(alone, call))


def _arguments(call: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(call, dict):
        return (), call
    return (call if isinstance(call, tuple) else (call,)), {}


def _called(model: Any, call: Any) -> Any:
    args, kwargs = _arguments(call)
    with torch.no_grad():
        return model(*args, **kwargs)


def _sqnr_db(wanted: Any, found: Any, *, whole: bool = True) -> float:
    """Of all floating tensors together; -inf where shapes or their number differ.

    Args:
        whole: `found` holds no more than `wanted`.
    """
    a = [x for _, x in tensors(plain(wanted)) if x.is_floating_point()]
    b = [x for _, x in tensors(plain(found)) if x.is_floating_point()]
    b = b if whole else b[: len(a)]
    if [x.shape for x in a] != [x.shape for x in b]:
        return float("-inf")
    flat = [torch.cat([x.double().flatten() for x in each]) for each in (a, b)]
    finite = flat[0].isfinite() & flat[1].isfinite()
    signal, noise = flat[0][finite].pow(2).sum(), (flat[0] - flat[1])[finite].pow(2).sum()
    return float(10 * torch.log10(signal / noise)) if noise != 0 else float("inf")


def _settled(module: nn.Module, batch: Any) -> nn.Module:
    """BatchNorm statistics from one batch: random ones let activations grow without bound. No weights of zeros only."""
    for weight in module.parameters():
        if weight.dim() > 1 and not weight.any():
            nn.init.normal_(weight, std=0.02)  # a head that gives zeros tells nothing
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    module.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    if norms:
        _called(module, batch)
    return module.eval()


class Table:
    """The results so far, in a file where one is given.

    Attributes:
        rows: model → mode → what `Result` holds.
    """

    def __init__(self, path: Path | None, machine: dict[str, Any]) -> None:
        self.rows: dict[str, dict[str, dict[str, Any]]] = {}
        self._path, self._machine = path, machine
        if path is None or not path.exists():
            return
        kept = json.loads(path.read_text())
        if kept["machine"]["versions"] == machine["versions"]:
            self.rows = kept["models"]
        else:
            console.print(f"{path} is of other versions: it is started afresh")

    def has(self, name: str, mode: str) -> bool:
        return mode in self.rows.get(name, {})

    def fill(self, name: str, mode: str, compute: Callable[[], Result]) -> Result:
        """Run it; until it ends, the file says that it never did. What a signal stops leaves no row."""
        self._put(name, mode, Result("crashed", "ended the process"))
        try:
            result = compute()
        except BaseException:
            del self.rows[name][mode]
            if not self.rows[name]:
                del self.rows[name]
            self._write()
            raise
        self._put(name, mode, result)
        return result

    def _put(self, name: str, mode: str, result: Result) -> None:
        self.rows.setdefault(name, {})[mode] = asdict(result)
        self._write()

    def _write(self) -> None:
        if self._path is not None:
            write(self._path, {"machine": self._machine, "models": self.rows})

    def shown(self) -> list[dict[str, str]]:
        """Rows by `COLUMNS`."""
        rows = []
        for name, modes in sorted(self.rows.items(), key=lambda item: (_place(item[0]), item[0].lower())):
            notes: dict[str, list[str]] = {}
            for mode, result in modes.items():
                if result["note"]:
                    notes.setdefault(f"{result['note']}", []).append(mode)
            right = [result for result in modes.values() if result["verdict"] == "ok"]
            decibels = [float(result["db"]) for result in right]
            rows.append(
                {"model": name}
                | {mode: modes[mode]["verdict"] if mode in modes else "" for mode in MODES}
                | {
                    "int8 layers": right[0]["layers"] if right else "",
                    "dB to float": f"{min(decibels):.0f}" if decibels else "",
                    "note": "; ".join(f"{', '.join(each)}: {said}" for said, each in notes.items()),
                }
            )
        return rows

    def unlike(self) -> list[str]:
        """Where imperative mode's SQNR to float, or its count of layers, is another than export's."""
        said = []
        for name, modes in sorted(self.rows.items()):
            ours, other = modes.get("imperative", {}), modes.get("export", {})
            if ours.get("verdict") != "ok" or other.get("verdict") != "ok":
                continue
            if ours["db"] != other["db"] and abs(ours["db"] - other["db"]) > ALIKE_DB:
                said.append(f"{name}: {ours['db']:.1f} dB to float in imperative mode, {other['db']:.1f} in export")
            if ours["layers"] != other["layers"]:
                said.append(f"{name}: {ours['layers']} in int8 in imperative mode, {other['layers']} in export")
        return said


def _place(name: str) -> int:
    return list(FAMILIES).index(name.partition(" ")[0])


def page(rows: list[dict[str, str]], found: dict[str, Any]) -> str:
    """docs/models.md."""
    versions = {name: version for name, version in found["versions"].items() if name in ("torch", *FAMILIES)}
    counted = []
    for mode in MODES:
        if not (verdicts := [row[mode] for row in rows if row[mode]]):
            continue
        counted.append(f"{mode} {verdicts.count('ok')} of {len(verdicts)} right")
        counted += [f"{verdicts.count(v)} {v}" for v in ("refused", "wrong", "crashed") if v in verdicts]
    lines = [
        "# Models that run",
        "",
        "Unedited models of other packages, small or with random weights: each is quantized in each mode on batches of",
        "two shapes where it takes more than one, called with another size of batch, and held against float, against",
        "the reference runtime and against itself after save and load. What is refused says why.",
        "",
        "The table shows that a model is taken as it comes and computed right. Figures against float are of random",
        "weights, which round worse than trained ones: they say nothing of accuracy.",
        "",
        f"{', '.join(counted)}. With {', '.join(f'{name} {version}' for name, version in versions.items())}.",
        "",
        "Written by `python -m bench.model_table --json models.json --write docs/models.md`.",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|" + "---|" * len(COLUMNS),
        *("| " + " | ".join(row[c].replace("|", "\\|").replace("<", "&lt;") for c in COLUMNS) + " |" for row in rows),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--only", default="*", metavar="GLOB", help="'timm *', '* T5'")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--seconds", type=float, default=300.0, help="the most that one model may take in one mode")
    parser.add_argument("--again", action="store_true", help="run what the JSON file holds already, too")
    parser.add_argument("--write", type=Path, metavar="FILE", help="the table as a page")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))
    found = show_machine()
    found["versions"] |= {name: version(name) for name in FAMILIES if importlib.util.find_spec(name) is not None}
    table, count = Table(options.json, found), 0
    for package, entry in entries():
        name = f"{package} {entry.name}"
        if not fnmatch.fnmatch(name, options.only) or (options.smoke and count == 1):
            continue
        count += 1
        for mode in options.modes:
            if table.has(name, mode) and not options.again:
                continue
            start = time.perf_counter()
            result = table.fill(name, mode, lambda entry=entry, mode=mode: run(entry, mode, options.seconds))
            said = result.note or f"{result.layers} in int8, {result.db:.1f} dB to float"
            console.print(
                f"{name} {mode}: {result.verdict} ({said}), {time.perf_counter() - start:.0f} s", markup=False
            )
    show("models", table.shown(), COLUMNS)
    for line in table.unlike():
        console.print(line, markup=False)
    if options.write is not None:
        options.write.write_text(page(table.shown(), found))


if __name__ == "__main__":
    main()
