"""Where a model can't be captured as a whole: which of its submodules can, and what these are called with."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from quantflow.capture.flat import tensor_names
from quantflow.ir.batch import Batch
from quantflow.ir.structure import Unknown, flatten, type_name

#: Ops whose result's size depends on the numbers in a tensor, whatever the model's code does with it.
_SIZES_FROM_DATA = frozenset(
    [
        "aten::nonzero", "aten::nonzero_numpy", "aten::masked_select", "aten::unique_dim", "aten::_unique",
        "aten::_unique2", "aten::unique_consecutive", "aten::argwhere", "aten::bincount", "torchvision::nms",
    ]
)  # fmt: skip
#: A part is calibrated on at most so many rows of a call: a detector's head gets hundreds of regions per image.
MOST_ROWS = 256
#: And on calls that fill so much memory.
MOST_BYTES = 2 << 30
#: Batches that are looked at to see which submodules are called, and how.
LOOKED_AT = 4


@dataclass
class Seen:
    """How a submodule was called.

    Attributes:
        calls: how often.
        from_data: ops inside it whose result's size depends on the data.
        unlike: why a call of it is no function of tensors; "" where every one is.
    """

    calls: int = 0
    from_data: set[str] = field(default_factory=set)
    unlike: str = ""


@dataclass(frozen=True)
class Recorded:
    """What a submodule was called with while the model ran.

    Attributes:
        batches: a batch per call.
        shapes: further calls, which show sizes that vary and nothing else.
        notices: what of the calls was left out.
    """

    batches: Sequence[Batch]
    shapes: Sequence[Batch] = ()
    notices: tuple[str, ...] = ()


class _Watch(TorchDispatchMode):
    """Tells `found` of every op whose result's size depends on the data."""

    def __init__(self, found: Callable[[str], None]) -> None:
        super().__init__()
        self._found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if name in _SIZES_FROM_DATA or (name == "aten::index" and any(map(_is_mask, args[1]))):
            self._found(name.removeprefix("aten::"))
        return func(*args, **(kwargs or {}))


def _is_mask(index: Any) -> bool:
    return isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8)


def survey(model: nn.Module, batches: Iterable[Batch]) -> dict[str, Seen]:
    """How every submodule ("" is the model) was called while the model ran the first batches."""
    seen = {name: Seen() for name, _ in model.named_modules()}
    running: list[Seen] = []

    def enter(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen[name].calls += 1
            seen[name].unlike = seen[name].unlike or _unlike("takes", (args, kwargs))
            running.append(seen[name])

        return hook

    def leave(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            seen[name].unlike = seen[name].unlike or _unlike("returns", output)
            running.pop()

        return hook

    def found(op: str) -> None:
        for each in running:
            each.from_data.add(op)

    with contextlib.ExitStack() as stack:
        for name, module in model.named_modules():
            if not isinstance(module, torch.jit.ScriptModule):
                stack.callback(module.register_forward_pre_hook(enter(name), with_kwargs=True).remove)
                stack.callback(module.register_forward_hook(leave(name)).remove)
        with torch.no_grad(), _Watch(found):
            for batch in batches:
                model(*batch.args, **batch.kwargs)
    return seen


def _unlike(verb: str, value: Any) -> str:
    try:
        leaves = flatten(value, "", [])[1]
    except Unknown as unknown:
        return f"it {verb} a {type_name(unknown.value)}"
    return "" if leaves else f"it {verb} no tensor"


def sizes_from_data(model: nn.Module, batch: Batch) -> frozenset[str]:
    """The ops of a model whose result's size depends on the data; none where it does not run."""
    try:
        return frozenset(survey(model, [batch])[""].from_data)
    except Exception:  # noqa: BLE001 the user's code may raise anything, and capture says what
        return frozenset()


def is_ragged(batches: Sequence[Batch]) -> bool:
    """Whether batches that are alike otherwise hold different numbers of tensors."""
    calls = {(len(batch.args), tuple(sorted(batch.kwargs))) for batch in batches}
    return len(calls) == 1 and len({len(batch.tensors) for batch in batches}) > 1


def holds_lists(batch: Batch) -> bool:
    """Whether tensors lie in a list, tuple or dict among the inputs."""
    values = (*batch.args, *batch.kwargs.values())
    return len(batch.tensors) > sum(isinstance(value, torch.Tensor) for value in values)


def why_not(model: nn.Module, name: str, seen: Mapping[str, Seen]) -> str:
    """Why a submodule is no part that could be captured; "" where it may be."""
    module, own = model.get_submodule(name), seen[name]
    if not has_weights(module):
        return "it holds no weights of layers"
    if isinstance(module, torch.jit.ScriptModule):
        return "it is a ScriptModule inside the model"
    if own.calls == 0:
        inner = f"{name}." if name else ""
        any_called = any(other.calls for at, other in seen.items() if at.startswith(inner) and at != name)
        return "the model does not call it as a whole" if any_called else "the calibration data do not reach it"
    if own.unlike:
        return own.unlike
    if own.from_data:
        return f"sizes in it depend on the data ({', '.join(sorted(own.from_data))})"
    if any(_has_hooks(child) for child in module.modules() if child is not module):
        return "forward hooks lie inside it"
    return ""


def has_weights(module: nn.Module) -> bool:
    """Whether there is anything in it that could be int8: a weight of two dimensions or more."""
    return any(parameter.dim() > 1 for parameter in module.parameters())


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def record(model: nn.Module, name: str, batches: Iterable[Batch]) -> Recorded:
    """What a submodule is called with while the model runs the batches, in order.

    Calls without a single number in them are left out, and of calls with many rows some are taken, evenly.
    """
    calls: list[Batch] = []
    notes: dict[str, None] = {}
    total = 0

    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal total
        call = Batch(args, kwargs)
        if any(x.numel() == 0 for x in call.tensors):
            return
        thinned = _thinned(call)
        if thinned is not call:
            notes[f"{name}: calibrated on {MOST_ROWS} rows of each call with more of them"] = None
        total += sum(x.nbytes for x in thinned.tensors)
        if total > MOST_BYTES and calls:
            notes[f"{name}: calibrated on the first {len(calls)} calls, which fill {MOST_BYTES >> 30} GiB"] = None
            total = MOST_BYTES + 1
            return
        # The model may change the tensors in place afterwards.
        calls.append(thinned.mapped(lambda x: x.detach().clone()))

    handle = model.get_submodule(name).register_forward_pre_hook(hook, with_kwargs=True)
    try:
        with torch.no_grad():
            for batch in batches:
                model(*batch.args, **batch.kwargs)
    finally:
        handle.remove()
    return Recorded(calls, notices=tuple(notes))


def _thinned(call: Batch) -> Batch:
    rows = call.size
    if rows <= MOST_ROWS or any(x.dim() == 0 or x.shape[0] != rows for x in call.tensors):
        return call
    chosen = torch.linspace(0, rows - 1, MOST_ROWS).round().long()
    return call.mapped(lambda x: x.index_select(0, chosen.to(x.device)))


def with_other_sizes(model: nn.Module, name: str, recorded: Recorded, batch: Batch) -> Recorded:
    """With what the submodule is called with for each image of a batch alone, where the images' sizes differ."""
    shapes = [
        call
        for each in _one_by_one(batch)
        for call in _tried(lambda each=each: record(model, name, [each]).batches)  # type: ignore[misc]
    ]
    return replace(recorded, shapes=shapes)


def _tried(calls: Callable[[], Sequence[Batch]]) -> Sequence[Batch]:
    try:
        return calls()
    except Exception:  # noqa: BLE001 the model may need all that a batch holds, and raise anything
        return ()


def _one_by_one(batch: Batch) -> list[Batch]:
    """A batch for each entry of its lists, where they are of one length and the tensors in them of several shapes."""
    lists = [value for value in (*batch.args, *batch.kwargs.values()) if isinstance(value, list)]
    shapes = {tuple(x.shape) for value in lists for x in flatten(value)[1]}
    lengths = {len(value) for value in lists}
    if len(lengths) != 1 or len(shapes) < 2:
        return []

    def cut(value: Any, index: int) -> Any:
        return [value[index]] if isinstance(value, list) else value

    return [
        Batch(tuple(cut(x, i) for x in batch.args), {key: cut(x, i) for key, x in batch.kwargs.items()})
        for i in range(lengths.pop())
    ]


def largest_first(calls: Sequence[Batch]) -> list[Batch]:
    """The calls, one without a size of 1 first, if there is any: capture takes 1 for a constant."""
    if 1 not in _sizes(calls[0]):
        return list(calls)
    first = max(range(len(calls)), key=lambda at: (-_sizes(calls[at]).count(1), -at))
    return [calls[first], *calls[:first], *calls[first + 1 :]]


def _sizes(call: Batch) -> list[int]:
    return [size for x in call.tensors for size in x.shape[1:]]


def all_of_images(part: nn.Module, recorded: Sequence[Batch]) -> dict[str, dict[int, str]]:
    """`dynamic` for every side of every image or feature map of a part, where one of them differs between its calls.

    The calls that were seen show some of what follows from other images, and never all of it.
    """
    example = recorded[0]
    shapes = {
        tuple(tuple(x.shape[2:]) for x in call.tensors)
        for call in recorded
        if len(call.tensors) == len(example.tensors)
    }
    if len(shapes) < 2:
        return {}
    maps = [(name, x) for name, x in zip(tensor_names(part, example), example.tensors, strict=True) if _is_map(x)]
    sides = ("depth", "height", "width")
    return {
        name: {d: sides[d - x.dim()] + (f"_{at + 1}" if at else "") for d in range(2, x.dim())}
        for at, (name, x) in enumerate(maps)
    }


def _is_map(x: torch.Tensor) -> bool:
    return x.is_floating_point() and x.dim() in (4, 5)
