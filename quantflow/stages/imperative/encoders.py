"""Transformer layers whose code is known, computed in one call of the runtime where nobody looks inside.

Attention, its projections, the sums and LayerNorms: a layer of BERT makes seven int8 calls with float ops between. It
runs step by step once for each size of input; what its int8 units were then says which nodes of the program the layer
is. These in one call stand for it from then on, as long as nothing about its modules changed. The float ops between
are the runtime's there, as in an artifact, so the numbers are those of the steps up to rounding.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from quantflow.numerics.measures import sqnr_db
from quantflow.stages.imperative.chains import is_watched
from quantflow.stages.imperative.joins import BLOCKS, LAYERS, LEAVES, State, version_of
from quantflow.stages.imperative.tensors import Weight

if TYPE_CHECKING:
    from quantflow.stages.imperative.engines import Engine
    from quantflow.stages.imperative.spans import Layer

_FAMILIES = (("bert", "Bert"), ("roberta", "Roberta"), ("xlm_roberta", "XLMRoberta"), ("electra", "Electra"))
#: Forwards (module, class) of layers, of one tensor; transformers' of a mask, too: nothing else must be given.
_ENCODERS = {
    *((f"transformers.models.{name}.modeling_{name}", f"{kind}Layer") for name, kind in _FAMILIES),
    ("torchvision.models.vision_transformer", "EncoderBlock"),
}
#: And of what is in them, which compute of their input, the mask and their submodules alone.
_PARTS = {
    *((f"transformers.models.{name}.modeling_{name}", f"{kind}{part}") for name, kind in _FAMILIES
      for part in ("Attention", "SelfAttention", "SelfOutput", "Intermediate", "Output")),
    ("transformers.activations", "GELUActivation"),
}  # fmt: skip
_LEAVES = (*LEAVES, nn.LayerNorm, nn.Tanh, nn.MultiheadAttention, nn.modules.linear.NonDynamicallyQuantizableLinear)
#: The layer's result in one call must agree with that of its steps up to float rounding.
_LEAST_DB = 60.0
#: And up to what that does to single codes: of n numbers, four leave about this and 10 log10(n).
_FOUR_CODES_DB = 19.0
_SIZES_PER_LAYER = 16
_ATTENTION = "sdpa"


class _Encoder:
    """What is known about a layer as its modules are.

    Attributes:
        engine: of its int8 layers; None: there is something in it that is not known.
        calls: (sizes of the input, of the mask) → the call, or None where the layer is no such run.
    """

    def __init__(self, module: nn.Module) -> None:
        self.calls: dict[Any, Layer | None] = {}
        self.engine = _engine_of(module)
        self._state = State(module)
        self._configs = [each.config.__dict__ for each in module.modules() if "config" in each.__dict__]
        self._functions = getattr(sys.modules[type(module).__module__], "ALL_ATTENTION_FUNCTIONS", {})
        self._attention = self._functions.get(_ATTENTION)

    def is_current(self) -> bool:
        """Whether its modules are what they were, attention is still torch's, and nobody looks inside."""
        return (
            all(config.get("_attn_implementation_internal") == _ATTENTION for config in self._configs)
            and self._functions.get(_ATTENTION) is self._attention
            and self._state.is_current()
        )


_known: WeakKeyDictionary[nn.Module, _Encoder] = WeakKeyDictionary()


def is_encoder_layer(module: nn.Module) -> bool:
    """Whether its class is a known layer, with that class's forward."""
    return _is_one_of(type(module), _ENCODERS)


def _is_one_of(kind: type[nn.Module], names: set[tuple[str, str]]) -> bool:
    forward, name = getattr(kind, "forward", None), (kind.__module__, kind.__qualname__)
    return name in names and (forward.__module__, forward.__qualname__) == (name[0], f"{name[1]}.forward")


@cache
def encoder_class(base: type[nn.Module], members: tuple[tuple[str, Any], ...]) -> type[nn.Module]:
    """A known layer's class, with a forward that computes the same in one call; it shows as what it was.

    Args:
        members: what else it gets.
    """

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = None if is_watched() else _given(args, kwargs)
        result = None if given is None else _at_once(self, *given, lambda: base.forward(self, *args, **kwargs))
        return base.forward(self, *args, **kwargs) if result is None else result

    made = {**dict(members), "forward": forward, "__module__": base.__module__, "__qualname__": base.__qualname__}
    return type(base.__name__, (base,), made)


def _given(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor | None] | None:
    """The input and the mask of a call that gives nothing else."""
    others = dict(kwargs)
    names = ("hidden_states", "attention_mask")
    x, mask = (args[at] if at < len(args) else others.pop(name, None) for at, name in enumerate(names))
    if any(each is not None and each is not False for each in (*args[2:], *others.values())):
        return None
    if type(x) is not torch.Tensor or x.dtype is not torch.float32 or x.dim() != 3:
        return None
    if x.requires_grad and torch.is_grad_enabled():
        return None
    is_mask = mask is None or (type(mask) is torch.Tensor and mask.dtype is torch.bool)
    return (x, mask) if is_mask and not torch.is_autocast_enabled(x.device.type) else None


def _at_once(module: nn.Module, x: torch.Tensor, mask: torch.Tensor | None, stepped: Callable[[], Any]) -> Any:
    """The layer's result; None where it must be computed step by step."""
    key = (x.shape, None if mask is None else mask.shape)
    known = _known.get(module)
    if known is not None and key in known.calls and known.calls[key] is None:
        return None
    if known is None or not known.is_current():
        known = _known[module] = _Encoder(module)
        if not known.is_current():  # somebody looks on
            return None
    if known.engine is None:
        return None
    if key not in known.calls:
        return _noted(known, known.engine, key, x, mask, stepped)
    layer = known.calls[key]
    assert layer is not None
    return known.engine.at_once(layer.units, _operands(layer, x, mask), layer.run)


def _operands(layer: Layer, x: torch.Tensor, mask: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """Without a mask every place sees all others."""
    if len(layer.reads) == 1:
        return {layer.reads[0]: x}
    seen = mask
    if seen is None:
        seen = torch.ones((x.shape[0], 1, x.shape[1], x.shape[1]), dtype=torch.bool, device=x.device)
    return dict(zip(layer.reads, (x, seen), strict=True))


def _noted(
    known: _Encoder, engine: Engine, key: Any, x: torch.Tensor, mask: torch.Tensor | None, stepped: Callable[[], Any]
) -> Any:
    """Step by step, with a look at what was computed."""
    before = version_of(x)
    with engine.noting() as notes:
        result = stepped()
    if len(known.calls) >= _SIZES_PER_LAYER:
        known.calls.clear()
    known.calls[key] = None
    units = tuple(unit for note in notes.calls for unit in note.units)
    if type(result) is not torch.Tensor or not units or len(set(units)) < len(units) or version_of(x) != before:
        return result
    layer = engine.layer_of(units, x)
    if layer is None or (mask is not None and (len(layer.reads) == 1 or mask.shape != (len(x), 1, *[x.shape[1]] * 2))):
        return result
    again = layer.run(*_operands(layer, x, mask).values())
    if again is not None and again.shape == result.shape and sqnr_db(result, again) >= _least_db(result.numel()):
        known.calls[key] = layer
    return result


def _least_db(numbers: int) -> float:
    return min(_LEAST_DB, _FOUR_CODES_DB + 10 * math.log10(max(numbers, 1)))


def _engine_of(module: nn.Module) -> Engine | None:
    """Of the int8 layers in it; None: what it computes does not follow from what is known here."""
    engine: Engine | None = None
    for each in module.modules():
        kind = type(each)
        is_part = each is module or _is_one_of(kind, _PARTS)
        is_known = (
            is_part or kind in _LEAVES or kind in LAYERS or BLOCKS.get(kind, kind).forward is nn.Sequential.forward
        )
        is_called = each is module or kind.__call__ is nn.Module.__call__
        # What sees only what came before says so by itself where it is given no mask.
        is_plain = not each.training and "forward" not in each.__dict__ and not each.__dict__.get("is_causal")
        if not is_known or not is_called or not is_plain:
            return None
        for weight in each._parameters.values():
            if type(weight) is Weight:
                if len(weight.site.calls) != 1:
                    return None
                engine = weight.site.engine
    return engine
