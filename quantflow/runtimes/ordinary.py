"""What makes an int8 model behave as any module does, wherever a compiled program allows it.

Results are tensors of their own that say clearly that they have no gradient; copies share the program; whatever would
have to change the program or look into it (pickling, moving, loading weights, exporting) is refused with the cure.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from types import FunctionType
from typing import Any, ClassVar, Self, TypeVar

import torch
from torch._C._dynamo import eval_frame
from torch.autograd import forward_ad
from torch.utils import _pytree

from quantflow.errors import UsageError
from quantflow.ir.ops import COMPUTING_OPS
from quantflow.ir.program import Program, Ref, TensorRef, substitute
from quantflow.ir.structure import holds_types, replaced

Function = TypeVar("Function", bound=Callable[..., Any])
#: Ops whose result always lies in memory of its own.
_FRESH = ("quantize", "dequantize", "clamp", "cat", *COMPUTING_OPS)


# -- results

_NO_GRADIENT = (
    "an int8 model has no gradient: its weights are integers. Cut the graph there with y.detach() or by calling the "
    "model under torch.no_grad(), or train the float model and quantize it again"
)


def below_autograd() -> AbstractContextManager[Any]:
    """As fast as torch.inference_mode, whose tensors nobody may change afterwards, and faster than torch.no_grad."""
    made: AbstractContextManager[Any] = torch._C._AutoDispatchBelowAutograd()
    return made


def untracked(inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The inputs without their history, for TorchScript, which would differentiate what it runs."""
    return [x.detach() if x.requires_grad else x for x in inputs]


class _NoGradient(torch.autograd.Function):
    """y as it is, with a backward that refuses."""

    @staticmethod
    def forward(ctx: Any, y: torch.Tensor, *_inputs: torch.Tensor) -> torch.Tensor:
        # In place, so that the result is no view and may itself be changed in place.
        ctx.mark_dirty(y)
        return y

    @staticmethod
    def backward(_ctx: Any, *_gradients: torch.Tensor) -> Any:
        raise UsageError(_NO_GRADIENT)


def addresses(tensors: Iterable[torch.Tensor]) -> frozenset[int]:
    """Where the tensors' memory begins."""
    return frozenset(address for tensor in tensors if (address := _address(tensor)))


def reachable(program: Program) -> frozenset[int]:
    """Where the stored tensors lie whose memory an output may share."""
    found: set[str] = set()
    makers = {node.output: node for node in program.nodes}
    waiting, seen = [program.output], set()

    def meet(reference: Ref | TensorRef) -> None:
        if isinstance(reference, TensorRef):
            found.add(reference.name)
        elif reference.name not in seen:
            seen.add(reference.name)
            node = makers.get(reference.name)
            if node is not None and node.op not in _FRESH:
                waiting.extend([node.args, dict(node.kwargs)])

    while waiting:
        substitute(waiting.pop(), meet)
    return addresses(program.tensors[name] for name in found)


def ordinary(output: Any, inputs: Sequence[Any], kept: frozenset[int] = frozenset()) -> Any:
    """An int8 model's output as a float model would give it.

    Tensors that share the model's own memory are copied. Where gradients are recorded and an input asks for one,
    floating tensors take part, and backward through them raises a UsageError.

    Args:
        inputs: the call's; what is no tensor counts for nothing.
        kept: where the model's own tensors lie, see `addresses`.

    Raises:
        UsageError: the gradient is taken on the way (forward-mode, torch.func), where no backward could refuse it.
    """
    if forward_ad._current_level >= 0 and any(isinstance(x, torch.Tensor) and _has_tangent(x) for x in inputs):
        raise UsageError(_NO_GRADIENT)
    recording = torch.is_grad_enabled() and not torch.jit.is_tracing()
    if not recording and not kept:
        return output
    tracked = [x for x in inputs if isinstance(x, torch.Tensor) and x.requires_grad] if recording else []
    if tracked and torch._C._are_functorch_transforms_active():
        raise UsageError(_NO_GRADIENT)
    if isinstance(output, torch.Tensor):
        return _own(output, kept, recording, tracked)
    own = partial(_own, kept=kept, recording=recording, tracked=tracked)
    if holds_types(output):
        return replaced(output, lambda leaf: own(leaf) if isinstance(leaf, torch.Tensor) else leaf)
    # A torch.Size is a tuple to pytree, and would come back as one.
    return _pytree.tree_map_only(torch.Tensor, own, output, is_leaf=lambda x: isinstance(x, torch.Size))


def _own(y: torch.Tensor, kept: frozenset[int], recording: bool, tracked: Sequence[torch.Tensor]) -> torch.Tensor:
    if kept and _address(y) in kept:
        y = y.clone()
    if not recording or y.requires_grad or y.is_inference():
        return y
    if tracked and (y.is_floating_point() or y.is_complex()):
        result: torch.Tensor = _NoGradient.apply(y.detach(), *tracked)  # type: ignore[no-untyped-call]
        return result
    # A view that was made without grad may not be changed in place with something that has a gradient.
    return y.detach() if y._is_view() else y


def _has_tangent(x: torch.Tensor) -> bool:
    return forward_ad.unpack_dual(x).tangent is not None


def _address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr() if torch._C._has_storage(tensor) else 0


# -- compilers


@contextmanager
def unrecorded() -> Iterator[None]:
    """What runs in here is no part of the torch.jit.trace around it."""
    state = torch._C._get_tracing_state()
    torch._C._set_tracing_state(None)
    try:
        yield
    finally:
        torch._C._set_tracing_state(state)


def as_function(script: torch.jit.ScriptModule) -> Callable[..., Any]:
    """A ScriptModule's forward as a function that holds the module's tensors, so that any trace can record its call."""
    with warnings.catch_warnings():
        for kind in (DeprecationWarning, FutureWarning):  # torch warns of TorchScript, and whoever traces knows
            warnings.simplefilter("ignore", kind)
        graph = torch.jit.freeze(script, optimize_numerics=False).graph.copy()
    graph.eraseInput(0)
    function: Callable[..., Any] = torch._C._create_function_from_graph("__torch__.quantflow.int8_model", graph)
    return function


def outside_compilers(function: Function) -> Function:
    """A function that torch.compile leaves as it is, with all that it calls: a graph break around an int8 model.

    torch.compiler.disable does the same but imports torch._dynamo, which takes a second.
    """
    assert isinstance(function, FunctionType)
    skip = eval_frame._FrameAction.SKIP
    eval_frame.set_code_exec_strategy(function.__code__, eval_frame._FrameExecStrategy(skip, skip))
    function.__dict__.update(
        _torchdynamo_disable=True,
        _torchdynamo_disable_msg=(
            "an int8 model is compiled already: torch.compile needs fullgraph=False, torch.export can't look into it"
        ),
    )
    return function


def refuse_export() -> None:
    """Raises:
    UsageError: torch.export, or another compiler that runs Python on tensors without data, is at work.
    """
    if torch.compiler.is_compiling():
        raise UsageError(
            "torch.export can't look into an int8 model: it is compiled already. Export the float model and hand the "
            "ExportedProgram to quantflow.quantize, or use model.save(folder) and quantflow.load(folder); "
            "mode=torchscript makes one file that runs without the Python code"
        )


# -- modules


class Fixed:
    """A part of the classes of modules whose weights are compiled.

    Copies share what `_immutable` names. Moving, converting and loading are right where they change nothing.
    """

    #: Attributes that copies share.
    _immutable: ClassVar[tuple[str, ...]] = ()

    def __copy__(self) -> Self:
        copied = type(self).__new__(type(self))
        copied.__dict__.update(self.__dict__)
        return copied

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        shared = [getattr(self, name) for name in self._immutable]
        memo.update((id(part), part) for part in shared if part is not None)
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied

    def __reduce_ex__(self, _protocol: Any) -> Any:
        raise UsageError(
            f"a {type(self).__name__} can't be pickled, which torch.save and processes that are spawned do: write the "
            "model with model.save(folder) and read it, in another process too, with quantflow.load(folder)"
        )

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        probe = torch.empty(0, dtype=torch.float32)
        moved = fn(probe)
        if moved.dtype != probe.dtype or moved.device.type not in self._devices(probe.device.type):
            raise UsageError(
                f"a {type(self).__name__} can't become {_name(moved.dtype)} on {moved.device.type}: it is compiled for "
                f"{_name(probe.dtype)} inputs on {' or '.join(self._devices(probe.device.type))}; quantize the float "
                "model again for another device (device=…), and convert inputs and outputs for another dtype"
            )
        return super()._apply(fn, recurse)  # type: ignore[misc,no-any-return]

    def _devices(self, host: str) -> tuple[str, ...]:
        """The kinds of devices that the module already is on, as `torch.device` names them."""
        return (host,)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        own: Mapping[str, Any] = self.state_dict()  # type: ignore[attr-defined]
        for key, value in state_dict.items():
            if key.startswith(prefix) and not _equal(own.get(key.removeprefix(prefix)), value):
                raise UsageError(
                    f"'{key}' can't be loaded into a {type(self).__name__}: its weights are compiled. Load it into the "
                    "float model and quantize that, or read a saved int8 model with quantflow.load(folder)"
                )
        super()._load_from_state_dict(state_dict, prefix, *rest)  # type: ignore[misc]


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return a is not None and bool(a == b)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
