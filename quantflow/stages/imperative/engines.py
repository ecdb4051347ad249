"""How the units that a module's own code calls are computed: in float32 under observation, or in int8."""

from __future__ import annotations

import threading
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from quantflow.ir.plan import Plan
from quantflow.ir.program import Program
from quantflow.ir.units import SHAPE
from quantflow.numerics.affine import QParams, dequantize, quantize
from quantflow.runtimes import AbstractRunner
from quantflow.runtimes.ordinary import below_autograd
from quantflow.stages.imperative.calls import Pending, Site, UnitCall
from quantflow.stages.imperative.joins import Join, Noted, Notes
from quantflow.stages.imperative.spans import Layer, sizes_of, span
from quantflow.stages.imperative.tensors import Coded

OnValue = Callable[[str, torch.Tensor], None]
Step = Callable[[Sequence[torch.Tensor]], torch.Tensor]


class Ran:
    """What the module's code called in one forward.

    Attributes:
        complete: the units of which every call came as expected.
        counts: site → calls so far.
        last: the float tensor that was coded last: (itself, its version, root, codes).
        inputs: what the module was called with: (args, kwargs).
    """

    def __init__(self, *inputs: Any) -> None:
        self.inputs = inputs
        self.complete: list[UnitCall] = []
        self.counts: dict[int, int] = {}
        self.last: tuple[torch.Tensor, int, str, torch.Tensor] | None = None


class _Forward(threading.local):
    """The forward that runs in this thread."""

    def __init__(self) -> None:
        self.ran: Ran | None = None
        self.notes: Notes | None = None


class Engine(ABC):
    """Shared by all layers of a module and its copies. Safe to call from several threads.

    Attributes:
        codes: value → whose scale and zero point it has.
        readers: value → the calls of other units than convolutions and linears that read it.
        moves: value → what moves its elements, and its shape afterwards.
        stands_for: the dtype of the model that the module is a float32 copy of.
        held: the type in which floats between layers may be, beside float32.
    """

    held: torch.dtype = torch.float32

    def __init__(self, plan: Plan, stands_for: torch.dtype) -> None:
        self.stands_for = stands_for
        self.codes = dict(plan.codes)
        self.readers: dict[str, list[UnitCall]] = {}
        self.moves: dict[str, list[fx.Node]] = {}
        for p in plan.units:
            if p.unit.kind == SHAPE:
                self.moves.setdefault(p.unit.inputs[0].name, []).append(p.unit.output)
        self._forward = _Forward()

    def __deepcopy__(self, memo: dict[int, Any]) -> Engine:
        return self

    # -- one forward

    @contextmanager
    def forward(self, *inputs: Any) -> Iterator[Ran]:
        """The module's own code runs in here, called with (args, kwargs)."""
        before, self._forward.ran = self._forward.ran, Ran(*inputs)
        try:
            yield self._forward.ran
        finally:
            self._forward.ran = before

    def count(self, site: Site) -> int | None:
        """How often the site was called before in this forward; None outside of one."""
        ran = self._forward.ran
        if ran is None:
            return None
        ran.counts[id(site)] = found = ran.counts.get(id(site), -1) + 1
        return found

    def between(self) -> AbstractContextManager[Any]:
        """How PyTorch computes what is no unit."""
        return nullcontext()

    def is_real(self, x: torch.Tensor) -> bool:
        """Whether a unit takes these numbers."""
        return x.dtype is torch.float32 or x.dtype is self.held

    # -- values

    def coded(self, x: torch.Tensor, name: str) -> torch.Tensor:
        """A tensor as the codes of the graph's value `name`."""
        root = self.codes[name]
        if type(x) is Coded:
            if x.root == root and (codes := x.current()) is not None:
                return codes
            x = x.as_float()
        ran = None if x.is_inference() else self._forward.ran  # an inference tensor doesn't tell when it is changed
        last = None if ran is None else ran.last
        if last is not None and last[0] is x and last[1] == x._version and last[2] == root:
            return last[3]
        with below_autograd():
            codes = self.encode(x, name, root)
        if ran is not None:
            ran.last = (x, x._version, root, codes)
        if self._forward.notes is not None:
            self._forward.notes.coded.append((x, codes))
        return codes

    def complete(self, pending: Pending) -> torch.Tensor:
        """The unit's result."""
        call = pending.call
        if self._forward.ran is not None:
            self._forward.ran.complete.append(call)
        if torch.is_inference_mode_enabled():  # below autograd already
            value = self.compute(pending)
        else:
            with below_autograd():
                value = self.compute(pending)
        if self._forward.notes is not None:
            self._forward.notes.calls.append(Noted((call,), pending.operands, value))
        if call.root:
            return Coded.of(self, value, call.root, call.node)
        return value

    @contextmanager
    def noting(self) -> Iterator[Notes]:
        """What is computed in here; where that is asked within, both see it."""
        mine = Notes()
        before, self._forward.notes = self._forward.notes, mine
        try:
            yield mine
        finally:
            self._forward.notes = before
            if before is not None:
                before.calls += mine.calls
                before.coded += mine.coded

    def joined(self, join: Join, x: torch.Tensor) -> torch.Tensor | None:
        """What a block computes in one call; None: it has no kernel for this input after all."""
        last = join.units[-1]
        value = self.at_once(join.units, {join.reads: self.coded(x, join.reads)}, join.run)
        return Coded.of(self, value, last.root, last.node) if value is not None and last.root else value

    def at_once(
        self,
        units: tuple[UnitCall, ...],
        operands: dict[str, torch.Tensor],
        run: Callable[..., torch.Tensor | None],
    ) -> torch.Tensor | None:
        """What `run`, several units, gives on these operands; None: it has no kernel for them after all."""
        with below_autograd():
            value = run(*operands.values())
        if value is None:
            return None
        forward = self._forward
        if forward.ran is not None:
            forward.ran.complete.extend(units)
        if forward.notes is not None:
            forward.notes.calls.append(Noted(units, operands, value))
        return value

    def run_of(self, calls: Sequence[UnitCall], reads: str) -> Callable[[torch.Tensor], torch.Tensor | None] | None:  # noqa: ARG002
        """These units as one function of the one value that they read from outside; None: it has none."""
        return None

    def layer_of(self, calls: Sequence[UnitCall], x: torch.Tensor) -> Layer | None:  # noqa: ARG002
        """These units and the float ops around them as one function of x, a layer's input; None: it has none."""
        return None

    @abstractmethod
    def missed(self, site: Site) -> None:
        """A layer was called in a way that was not captured."""

    @abstractmethod
    def encode(self, x: torch.Tensor, name: str, root: str) -> torch.Tensor:
        """Numbers as this engine holds codes."""

    @abstractmethod
    def decode(self, codes: torch.Tensor, root: str) -> torch.Tensor:
        """The float32 numbers, in memory of their own."""

    @abstractmethod
    def padded(self, codes: torch.Tensor, root: str, pads: Sequence[int]) -> torch.Tensor:
        """Codes with the code of 0 around them."""

    @abstractmethod
    def compute(self, pending: Pending) -> torch.Tensor:
        """A complete unit: codes, or numbers where it gives those."""


class Observing(Engine):
    """Codes are float32 numbers, which `on_value` sees."""

    def __init__(self, plan: Plan, stands_for: torch.dtype) -> None:
        super().__init__(plan, stands_for)
        self.on_value: OnValue = lambda name, x: None  # noqa: ARG005

    def missed(self, site: Site) -> None:
        pass

    def encode(self, x: torch.Tensor, name: str, root: str) -> torch.Tensor:  # noqa: ARG002
        self.on_value(name, x)
        return x.detach().clone()

    def decode(self, codes: torch.Tensor, root: str) -> torch.Tensor:  # noqa: ARG002
        return codes.clone()

    def padded(self, codes: torch.Tensor, root: str, pads: Sequence[int]) -> torch.Tensor:  # noqa: ARG002
        return torch.nn.functional.pad(codes, pads)

    def compute(self, pending: Pending) -> torch.Tensor:
        value, call = pending.replayed(), pending.call
        if call.root:
            self.on_value(call.output, value)
        return value


class Running(Engine):
    """Codes are codes, and a runner's kernels compute the program's nodes one by one."""

    def __init__(self, plan: Plan, program: Program, runner: AbstractRunner, stands_for: torch.dtype) -> None:
        super().__init__(plan, stands_for)
        self._index = {node.output: index for index, node in enumerate(program.nodes)}
        self._program = program
        self._steps: dict[int, Step] = {}
        #: (first node, behind the last, what they read, what they give) → one function, for all shapes.
        self._runs: dict[Any, Callable[..., torch.Tensor | None] | None] = {}
        #: Unit → its step, and the values that it reads.
        self._kernels: dict[UnitCall, tuple[Step, tuple[str, ...]]] = {}
        self._runner, self.held = runner, runner.held
        self._missed: set[Site] = set()
        self._qparams: dict[str, QParams] = {}
        for name, root in plan.codes.items():
            held = program.values.get(name) or program.values.get(f"{name}.codes")
            if held is not None and held.qparams is not None:
                self._qparams[root] = held.qparams

    def between(self) -> AbstractContextManager[Any]:
        return self._runner.between()

    def missed(self, site: Site) -> None:
        if site not in self._missed:
            self._missed.add(site)
            warnings.warn(
                f"quantflow: {site.calls[0].name} computes in float32 in this call: its input's dtype or device, its "
                "bias, its settings or how often it is called are not those that were captured",
                RuntimeWarning,
                stacklevel=2,
            )

    def described(self, call: UnitCall) -> str:
        """A layer's integers in a line."""
        node, tensors = self._program.nodes[self._index[call.output]], self._program.tensors
        q, weight = self._qparams[self.codes[call.operands[0]]], tensors[node.attrs["weight"]]
        per = "per_channel" if tensors[node.attrs["weight_scale"]].numel() > 1 else "per_tensor"
        return (
            f"{node.fused_name}, weight=int8[{'x'.join(map(str, weight.shape))}] {per}, "
            f"input={q.dtype}(scale={q.scale:.6g}, zero_point={q.zero_point}), runtime={self._runner.name}"
        )

    def encode(self, x: torch.Tensor, name: str, root: str) -> torch.Tensor:
        index = self._index.get(f"{name}.codes")
        if index is None or not self.is_real(x):
            return quantize(x.detach(), self._qparams[root])
        return self._step(index)([x])

    def decode(self, codes: torch.Tensor, root: str) -> torch.Tensor:
        return dequantize(codes, self._form(codes, root)).contiguous()

    def padded(self, codes: torch.Tensor, root: str, pads: Sequence[int]) -> torch.Tensor:
        return torch.nn.functional.pad(codes, pads, value=self._form(codes, root).zero_point)

    def _form(self, codes: torch.Tensor, root: str) -> QParams:
        """What these codes mean: a runner's step may have made them 128 higher."""
        q = self._qparams[root]
        return q if codes.dtype is q.torch_dtype else replace(q, dtype="uint8", zero_point=q.zero_point + 128)

    def compute(self, pending: Pending) -> torch.Tensor:
        kernel = self._kernels.get(pending.call)
        if kernel is None:
            index = self._index[pending.call.output]
            reads = dict.fromkeys(self._program.nodes[index].refs())
            names = tuple(n if n in pending.operands else n.removesuffix(".codes") for n in reads)
            kernel = self._kernels[pending.call] = (self._step(index), names)
        step, names = kernel
        value = step([pending.operands[name] for name in names])
        phases = pending.call.phases
        return value if phases is None else phases.put_together(value)

    def run_of(self, calls: Sequence[UnitCall], reads: str) -> Callable[[torch.Tensor], torch.Tensor | None] | None:
        indices = sorted(self._index[call.output] for call in calls)
        first, last = indices[0], indices[-1] + 1
        if indices != list(range(first, last)):
            return None
        nodes = self._program.nodes[first:last]
        inside = {node.output for node in nodes}
        names = {name for node in nodes for name in node.refs()} - inside
        if len(names) != 1 or not names <= {reads, f"{reads}.codes"}:
            return None
        return self._run(first, last, (names.pop(),), calls[-1].output)

    def _run(self, *key: Any) -> Callable[..., torch.Tensor | None] | None:
        if key not in self._runs:
            self._runs[key] = self._runner.steps(*key)
        return self._runs[key]

    def layer_of(self, calls: Sequence[UnitCall], x: torch.Tensor) -> Layer | None:
        ran, indices = self._forward.ran, [self._index[call.output] for call in calls]
        found = span(self._program, indices)
        if ran is None or found is None:
            return None
        sizes = sizes_of(self._program, found, x, *ran.inputs)
        if sizes is None:
            return None
        reads = (found.reads, found.mask) if found.mask else (found.reads,)
        run = self._runner.steps(found.first, found.last, reads, found.gives, sizes)  # kept by its Encoder
        return None if run is None else Layer(tuple(calls), reads, run)

    def _step(self, index: int) -> Step:
        step = self._steps.get(index)
        if step is None:
            step = self._steps[index] = self._runner.step(index)
        return step
