"""A model as quantization takes it: out of wrappers that only pass calls on, and in float32."""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from quantflow.errors import ModelError
from quantflow.host.place import CPU
from quantflow.sources.models.loaded import LoadedModel

#: Attribute that holds the model itself → wrapper, by the name of its class.
_WRAPPERS = {
    "OptimizedModule": ("_orig_mod", "torch.compile"),
    "DataParallel": ("module", "DataParallel"),
    "DistributedDataParallel": ("module", "DistributedDataParallel"),
    "FullyShardedDataParallel": ("module", "FullyShardedDataParallel"),
    "AveragedModel": ("module", "AveragedModel"),
}


def usable(model: LoadedModel) -> LoadedModel:
    """The model itself, in float32; each wrapper that was taken off and each change of dtype with a notice.

    Raises:
        ModelError: weights in another dtype that can't be copied to float32.
    """
    module, notices = _unwrapped(model.module)
    module = _on_the_cpu(module, notices)
    original = None
    if isinstance(module, nn.Module) and not isinstance(module, torch.jit.ScriptModule):
        dtypes = {p.dtype for p in module.parameters() if p.is_floating_point() and not p.is_meta}
        if other := sorted(str(d).removeprefix("torch.") for d in dtypes - {torch.float32}):
            original, module = module, _in_float32(module, other)
            notices.append(
                f"the model's weights are {', '.join(other)}: a copy in float32 was quantized, which takes and gives "
                "the dtypes that the model does"
            )
    return replace(model, module=module, original=original, notices=(*model.notices, *notices))


def _on_the_cpu(module: Any, notices: list[str]) -> Any:
    """The module, or a copy where capture can look into it."""
    if not isinstance(module, nn.Module):
        return module
    tensors = itertools.chain(module.parameters(), module.buffers())
    places = sorted({str(x.device) for x in tensors if x.device.type not in (CPU.type, "meta")})
    if not places:
        return module
    try:
        copied = copy.deepcopy(module).to(CPU)
    except Exception as error:  # whatever the module holds may refuse in its own way
        raise ModelError(
            f"model: it is on {', '.join(places)} and can't be copied to the CPU ({error}); call model.cpu()"
        ) from error
    notices.append(f"the model is on {', '.join(places)}: a copy of it on the CPU was quantized")
    return copied


def _unwrapped(module: Any) -> tuple[Any, list[str]]:
    notices: list[str] = []
    while isinstance(module, nn.Module):
        inner, what = _inside(module)
        if inner is None or inner is module:
            break
        notices.append(f"{what} was taken off: the model inside it was quantized")
        module = inner
    return module, notices


def _inside(module: nn.Module) -> tuple[nn.Module | None, str]:
    for kind in type(module).__mro__:
        if kind.__name__ in _WRAPPERS and kind.__module__.startswith("torch."):
            attribute, what = _WRAPPERS[kind.__name__]
            return getattr(module, attribute, None), what
        library = kind.__module__.partition(".")[0]
        if library == "peft" and kind.__name__ == "PeftModel":
            return module.get_base_model(), type(module).__name__  # type: ignore[operator]
        if library == "ultralytics" and kind.__name__ == "Model":
            return module.model, type(module).__name__  # type: ignore[return-value]
    return None, ""


def _in_float32(module: nn.Module, found: list[str]) -> nn.Module:
    try:
        return copy.deepcopy(module).float().eval()
    except Exception as error:  # whatever the module holds may refuse in its own way
        raise ModelError(
            f"model: its weights are {', '.join(found)}, and a copy in float32 can't be made ({error}); "
            "call model.float() yourself"
        ) from error
