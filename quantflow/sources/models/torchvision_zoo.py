"""torchvision's architectures by name, with its published weights."""

from __future__ import annotations

import importlib
import logging
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch
from torch import nn

from quantflow.errors import ModelError, UnavailableError, nearest
from quantflow.numerics.seed import seeded
from quantflow.sources.data.packages import missing_package
from quantflow.sources.data.preprocess import ImagePreprocess
from quantflow.sources.models.loaded import LoadedModel
from quantflow.sources.models.weights import (
    AUTO,
    PRETRAINED,
    apply_state,
    download_state,
    draw_zero_weights,
    has_batchnorm,
    is_path,
    load_state,
    random_notice,
)

logger = logging.getLogger(__name__)

#: Parts that only training uses; torchvision's weight files hold them all the same.
_AUXILIARY = ("aux1.", "aux2.", "AuxLogits.", "aux_classifier.")
#: Kept for the life of the process: the schemas go away with it.
_schemas: list[torch.library.Library] = []


def import_torchvision() -> ModuleType:
    """torchvision, even where its wheel was built for another torch.

    Beside a CPU build of torch its compiled operators can't load, and its Python half then stops at operators that
    are not there. With their schemas declared the Python half works; nothing quantflow uses needs the compiled one.

    Raises:
        UnavailableError: torchvision is not installed.
    """
    try:
        return importlib.import_module("torchvision")
    except ModuleNotFoundError as problem:
        if problem.name != "torchvision":
            raise
        raise missing_package("torchvision", purpose="model=torchvision") from problem
    except RuntimeError as problem:
        if "torchvision::nms" not in str(problem):
            raise
    for name in [m for m in sys.modules if m.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    library = torch.library.Library("torchvision", "DEF")
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _schemas.append(library)
    logger.info("torchvision's compiled operators do not fit this torch; its models work without them")
    return importlib.import_module("torchvision")


def load_torchvision(name: str, weights: str, num_classes: int | None, seed: int) -> LoadedModel:
    """An architecture by torchvision's name: classification, segmentation or video.

    Raises:
        ModelError: no such architecture, or weights that do not fit.
        UnavailableError: torchvision is missing, or weights=pretrained can't be had here.
    """
    models: Any = importlib.import_module("torchvision.models", import_torchvision().__name__)
    family = _family(models, name)
    published = models.get_model_weights(name)
    best = published.DEFAULT if len(published) else None
    state, used, reason = _find_state(name, weights, num_classes, best)

    options: dict[str, Any] = {} if num_classes is None else {"num_classes": num_classes}
    if name in ("googlenet", "inception_v3"):
        options |= {"aux_logits": False, "init_weights": False, "transform_input": state is not None}
    if family == "segmentation":
        options |= {"aux_loss": False, "weights_backbone": None}
    if name.startswith("vit_") and state is not None and best is not None:
        options["image_size"] = best.meta["min_size"][0]
    with seeded(seed):
        module: nn.Module = models.get_model(name, weights=None, **options)
        if state is None:
            draw_zero_weights(module)
    if state is not None:
        apply_state(module, {k: v for k, v in state.items() if not k.startswith(_AUXILIARY)}, used)
    notices = () if state is not None else (random_notice(name, seed, reason),)
    return LoadedModel(
        module=module.eval(),
        name=name,
        preprocess=_preprocess(module, best) if family == "classification" else None,
        weights_requested=weights,
        weights_used=used if state is not None else f"random (seed {seed})",
        notices=notices,
        batchnorm_to_estimate=state is None and has_batchnorm(module),
        outputs="other" if family == "segmentation" else "logits",
    )


def _family(models: Any, name: str) -> Literal["classification", "segmentation", "video"]:
    classification = models.list_models(module=models)
    segmentation = models.list_models(module=models.segmentation)
    video = models.list_models(module=models.video)
    if name in classification:
        return "classification"
    if name in segmentation:
        return "segmentation"
    if name in video:
        return "video"
    if name in models.list_models():
        raise ModelError(
            f"model.name: torchvision's '{name}' is not a classification, segmentation or video architecture; "
            "detection, optical-flow and already quantized ones can't be loaded"
        )
    known = [*classification, *segmentation, *video]
    raise ModelError(f"model.name: torchvision has no architecture '{name}'; nearest names: {nearest(name, known)}")


def _find_state(
    name: str, weights: str, num_classes: int | None, best: Any
) -> tuple[dict[str, torch.Tensor] | None, str, str | None]:
    """(state, what it is, why there is none): the reason is None when random weights are what was asked for."""
    if is_path(weights):
        return load_state(Path(weights)), weights, None
    if weights not in (PRETRAINED, AUTO):
        return None, "", None
    if best is None:
        reason = f"torchvision publishes none for {name}"
    elif num_classes is not None and num_classes != len(best.meta["categories"]):
        reason = f"the published ones have {len(best.meta['categories'])} classes, not num_classes={num_classes}"
    else:
        try:
            return download_state(best.url), f"pretrained ({best.name})", None
        except UnavailableError as problem:
            reason = str(problem)
    if weights == PRETRAINED:
        raise UnavailableError(
            f"model.weights: pretrained weights of {name} can't be had: {reason}; use model.weights=PATH with a file "
            "of yours, or model.weights=auto to go on with random ones"
        )
    return None, "", f"pretrained ones can't be had: {reason}"


def _preprocess(module: nn.Module, best: Any) -> ImagePreprocess | None:
    if best is None:
        return None
    transforms = best.transforms()
    preprocess = ImagePreprocess(
        size=transforms.crop_size[0],
        resize=transforms.resize_size[0],
        mean=tuple(transforms.mean),
        std=tuple(transforms.std),
        interpolation=transforms.interpolation.value,
    )
    own_size = getattr(module, "image_size", None)
    return preprocess.with_size(own_size) if isinstance(own_size, int) else preprocess
