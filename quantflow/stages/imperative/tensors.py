"""The two tensors by which a module's own code computes in int8.

Coded    a float32 tensor that is held as codes between layers, or as the layer call that waits for what fuses with it
Weight   a parameter whose convolution or linear is computed in int8

Both are what they stand for: whatever reads them in a way that `functions` has no rule for reads float32, and a change
in place is a change. So the user's code stays as it is, and a rule can only make it faster.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import fx, nn

from quantflow.errors import UsageError

if TYPE_CHECKING:
    from quantflow.stages.imperative.calls import Pending, Site, UnitCall
    from quantflow.stages.imperative.engines import Engine

Rule = Callable[[Callable[..., Any], tuple[Any, ...], Mapping[str, Any]], Any]
#: Torch function → what it means for these tensors; NotImplemented: float32. `functions` fills it.
RULES: dict[Callable[..., Any], Rule] = {}
_PRIVATE = (
    "the weight of an int8 layer is compiled and can't be changed: change the float model and quantize that again, or "
    "read a saved int8 model with quantflow.load(folder)"
)


class Coded(torch.Tensor):
    """A float32 tensor that exists as codes, or as a layer call that is not complete yet.

    Attributes:
        engine: what codes and computes.
        codes: how the engine holds it; None while `pending` or once a change in place made it an ordinary tensor.
        root: whose scale and zero point the codes have.
        node: the graph's value that it is, where that is known.
        pending: the call that will make it.
        sizes, place: its shape and device as it was made, without a call of torch.
        shown: its numbers, once somebody asked for them, at `version`.
        view_of: (tensor, function, arguments behind it) of which it is a view.
    """

    engine: Engine
    codes: torch.Tensor | None = None
    root: str = ""
    node: fx.Node | None = None
    pending: Pending | None = None
    sizes: tuple[int, ...]
    place: torch.device
    shown: torch.Tensor | None = None
    version: int
    view_of: tuple[Coded, Callable[..., Any], tuple[Any, ...], Mapping[str, Any]] | None = None

    @staticmethod
    def of(engine: Engine, codes: torch.Tensor, root: str, node: fx.Node | None) -> Coded:
        """A tensor of the codes' shape."""
        made = _wrapped(tuple(codes.shape), codes.device)
        made.engine, made.codes, made.root, made.node = engine, codes, root, node
        return made

    @staticmethod
    def waiting(pending: Pending) -> Coded:
        """The result of a call that is not complete."""
        made = _wrapped(pending.shape, pending.device)
        made.engine, made.pending = pending.call.engine, pending
        return made

    def current(self) -> torch.Tensor | None:
        """The codes, unless the tensor was changed in place since."""
        codes = self.codes
        return codes if codes is None or self._is_untouched() or self._is_unchanged() else None

    def unfinished(self) -> Pending | None:
        """The call that waits, unless the tensor was changed in place since."""
        pending = self.pending
        return pending if pending is None or self._is_untouched() or self._is_unchanged() else None

    def _is_untouched(self) -> bool:
        """Whether nobody has looked at it, nor is it part of another: most are, and this is told fastest."""
        return self.shown is None and self.view_of is None

    def _is_unchanged(self) -> bool:
        if self.shown is not None and not self.shown.is_inference() and self.shown._version != self.version:
            return False
        return self.view_of is None or self.view_of[0]._is_unchanged()

    def as_float(self) -> torch.Tensor:
        """Its numbers, in memory that views of it share."""
        if self.shown is None:
            with torch.inference_mode(False), torch.no_grad():  # inference tensors don't tell when they are changed
                if self.view_of is not None:
                    base, function, args, kwargs = self.view_of
                    self.shown = function(base.as_float(), *args, **kwargs)
                elif self.pending is not None:
                    self.shown = self.pending.replayed()
                else:
                    assert self.codes is not None
                    self.shown = self.engine.decode(self.codes, self.root)
            self.version = self.shown._version
        return self.shown

    def become(self, other: torch.Tensor) -> Self:
        """Take over another tensor's value, as a change in place does."""
        if type(other) is Coded:
            self.codes, self.root, self.node, self.pending = other.codes, other.root, other.node, other.pending
            self.shown = self.view_of = None
        else:
            self.codes = self.pending = self.view_of = None
            # Whoever changes an inference tensor is not noticed, and nothing depends on it here.
            self.shown, self.version = other, 0 if other.is_inference() else other._version
        return self

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return dispatched(func, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return in_float(func, args, kwargs or {})


def _wrapped(shape: tuple[int, ...], device: torch.device) -> Coded:
    made: Coded = torch.Tensor._make_wrapper_subclass(Coded, shape, dtype=torch.float32, device=device)
    made.sizes, made.place = shape, device
    return made


class Weight(nn.Parameter):
    """A float32 parameter whose calls `site` computes in int8. It reads as the float parameter that it is."""

    site: Site
    #: The parameter as an ordinary tensor, in the same memory.
    plain: torch.Tensor
    #: What is passed beside it, by the unit that is called.
    biases: dict[UnitCall, torch.Tensor | None]

    @staticmethod
    def of(parameter: torch.Tensor, site: Site, biases: dict[UnitCall, torch.Tensor | None]) -> Weight:
        made: Weight = torch.Tensor._make_subclass(Weight, parameter.detach(), False)
        made.site, made.plain, made.biases = site, parameter.detach(), biases
        return made

    def __deepcopy__(self, memo: dict[int, Any]) -> Weight:
        if id(self) not in memo:
            # A copied module passes the copies of its biases, which are the ones in `memo`.
            memo[id(self)] = Weight.of(self.plain.clone(), self.site, copy.deepcopy(self.biases, memo))
        return memo[id(self)]  # type: ignore[no-any-return]

    def __reduce_ex__(self, _protocol: Any) -> Any:
        return refuse_pickling(self)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return dispatched(func, args, kwargs or {})


def refuse_pickling(_self: Any, _protocol: Any = None) -> Any:
    """
    Raises:
        UsageError: always.
    """
    raise UsageError(
        "a module with int8 layers can't be pickled, which torch.save and processes that are spawned do: write the "
        "model with model.save(folder) and read it, in another process too, with quantflow.load(folder)"
    )


def dispatched(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """A torch function on these tensors."""
    rule = RULES.get(func)
    if rule is not None:
        result = rule(func, args, kwargs)
        if result is not NotImplemented:
            return result
    return in_float(func, args, kwargs)


def in_float(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The function on ordinary tensors. What it gives back of these it gives back as what it was.

    Raises:
        UsageError: it would change a weight.
    """
    if args and isinstance(args[0], Weight) and _changes(func, args):
        raise UsageError(_PRIVATE)
    seen: dict[int, Coded] = {}
    result = func(*ordinary(args, seen), **ordinary(dict(kwargs), seen))
    return seen.get(id(result), result) if seen else result


def ordinary(value: Any, seen: dict[int, Coded]) -> Any:
    """A nesting of arguments with ordinary tensors in it; `seen` learns which stand for which."""
    kind = type(value)
    if kind is Coded:
        real = value.as_float()
        seen[id(real)] = value
        return real
    if kind is Weight:
        return value.plain
    if kind in (tuple, list):
        return kind(ordinary(each, seen) for each in value)
    return {key: ordinary(each, seen) for key, each in value.items()} if kind is dict else value


def _changes(func: Callable[..., Any], args: tuple[Any, ...]) -> bool:
    """Whether the function writes to its first argument, a weight, something else than it holds."""
    name = getattr(func, "__name__", "")
    weight = args[0].plain
    if name == "copy_" or (name == "__set__" and func == torch.Tensor.data.__set__):
        given = args[1]
        # The same numbers on another device are a module that is moved.
        return given.dtype != weight.dtype or not torch.equal(given.to(weight.device), weight)
    if name in ("requires_grad_", "__setstate__"):
        return False
    return (name.endswith("_") and not name.endswith("__")) or name in (
        "__setitem__",
        "__iadd__",
        "__imul__",
        "__isub__",
    )
