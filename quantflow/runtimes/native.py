"""The native runtime: whole runs of a program's nodes in one call of the C++ library (`native/`).

A program is cut into sections of consecutive nodes that have native kernels. Most models are one section; a node
without a kernel runs in torch, between two sections, by the reference runtime's code. For every set of input shapes a
section becomes a plan (kernels chosen, weights packed, one arena), kept in a bounded cache.
"""

from __future__ import annotations

import ctypes
import math
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch

from quantflow.errors import VerificationError
from quantflow.host.forks import in_forked_child, lock
from quantflow.ir.calls import BATCH
from quantflow.ir.plan import PlannedUnit
from quantflow.ir.program import Program, Ref
from quantflow.ir.units import CORE
from quantflow.runtimes import native_library as lib
from quantflow.runtimes import native_rates, native_ways
from quantflow.runtimes.native_sections import RunVariant, Section, SectionPlan, parsed
from quantflow.runtimes.native_values import (
    dense,
    foreign_dtype,
    has_rows,
    is_dense,
    is_list,
    keep_lists_together,
    same,
    strides_of,
    why_foreign,
)
from quantflow.runtimes.ordinary import below_autograd
from quantflow.runtimes.reference import resolve
from quantflow.runtimes.reference import run_node as run_in_torch
from quantflow.runtimes.runner import AbstractRunner, lowered

#: Plans kept per section, one per set of input shapes; the least recently used is dropped.
PLANS_PER_SECTION = 16
#: The backend whose steps are cut by the rates of the machine.
HOST = "host"
#: Functions on sizes whose results are flags; the library knows whole numbers only.
_COMPARISONS = ("eq", "ne", "lt", "le", "gt", "ge")
_AS_IT_IS = nullcontext()
_runners: weakref.WeakSet[NativeRunner] = weakref.WeakSet()


class NativeRunner(AbstractRunner):
    """Executes a program on the native library. Safe to call from several threads."""

    name = "native"

    def __init__(self, program: Program, backend: str = "host", threads: int | None = None) -> None:
        """
        Args:
            backend: "host", "sycl.cpu" or "sycl.gpu".
            threads: cores that one call may use (host); None: as many as torch uses at each call.

        Raises:
            UnavailableError: the library or the backend can't run here.
            ArtifactError: the library refuses the program.
        """
        self.program = program
        self.backend = backend
        self.threads = threads
        #: Node index → why it runs in torch.
        self.in_torch: dict[int, str] = {}
        self._tensors = {name: tensor.contiguous() for name, tensor in program.tensors.items()}
        self._parsed = parsed(program, self._tensors)
        self._engines: dict[int, lib.Handle] = {}
        self._lock = lock()
        _runners.add(self)
        if backend == HOST:
            native_rates.take_up(self._threads())
        self._engine(self._threads())
        self._plans: dict[Section, OrderedDict[Any, SectionPlan]] = {}
        #: (batch size, threads asked for) → the variant that `tune` found fastest.
        self.variants: dict[tuple[int, int], RunVariant] = {}
        #: What `choices` tells, per batch size and threads asked for.
        self._choices: dict[tuple[int, int], dict[str, Any]] = {}
        #: What each step has ready, per set of inputs.
        self._ready: list[dict[Any, SectionPlan]] = []
        #: What a call has ready whose inputs one section makes into the one result, per set of inputs.
        self._whole: dict[Any, SectionPlan] = {}
        self._ready.append(self._whole)
        self._flags = {n.output for n in program.nodes if n.op == "size" and n.target in _COMPARISONS}
        for index, node in enumerate(program.nodes):
            if not lib.library().qf_program_supports(self._parsed.pointer, ctypes.c_int32(index)):
                self.in_torch[index] = f"{node.target or node.op} has no native kernel"
            elif foreign := foreign_dtype(node):
                self.in_torch[index] = f"{node.target} to {str(foreign).removeprefix('torch.')} has no native kernel"
        self._cut()

    def __call__(self, inputs: Sequence[torch.Tensor]) -> Any:
        """The program's output structure."""
        key = (self._threads(), *[(x.shape, x.stride(), x.dtype) for x in inputs])
        if (plan := self._whole.get(key)) is not None and not any(x.is_neg() for x in inputs):
            return plan.made(inputs)
        values = self._values(inputs)
        self._keep_whole(key, inputs)
        return resolve(self.program, self.program.output, values)

    def _keep_whole(self, key: Any, inputs: Sequence[torch.Tensor]) -> None:
        """Have the plan of a call ready, where there is one, for the next call with such inputs."""
        section, output = self._parts[0] if len(self._parts) == 1 else 0, self.program.output
        if not isinstance(section, Section) or not isinstance(output, Ref) or section.outputs != (output.name,):
            return
        variant = self.variants.get((self._batch(inputs), key[0]), RunVariant(key[0]))
        if variant.chunk or section.inputs != tuple(item.name for item in self.program.inputs):
            return
        if not all(is_dense(x) for x in inputs):
            return
        plan = self._plan(section, inputs, variant.threads)
        with self._lock:
            if isinstance(plan.outputs[0], tuple):
                if len(self._whole) >= PLANS_PER_SECTION:
                    self._whole.clear()
                self._whole[key] = plan

    def outputs(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The values the program returns, each once, in the order of its output structure; sizes as tensors."""
        values = self._values(inputs)
        found = (values[name] for name in dict.fromkeys(self.program.output_names()))
        return [value if isinstance(value, torch.Tensor) else torch.tensor(value) for value in found]

    def tune(self, inputs: Sequence[torch.Tensor], runs: int = 5) -> list[dict[str, Any]]:
        """Time what is worth trying on an input, and keep the fastest: the cuts of its steps, then whole variants.

        Returns:
            One row per variant: {"batch", "asked_threads", "threads", "chunk", "ms" (least of `runs`, of two where it
            is the only one), "chosen"}; the chosen one has the "cuts" of steps that are not as predicted, too.

        Raises:
            VerificationError: another cut of the steps gives another result.
        """
        batch, threads = self._batch(inputs), self._threads()
        if self.backend == HOST and native_rates.measure(threads):
            self._forget_plans()
        whole = self._run_variant(inputs, RunVariant(threads))
        names = set(self.program.output_names())
        layers: list[dict[str, Any]] = []
        skipped = ""
        if self.backend == HOST:
            layers = native_ways.try_all(self.program, self._sections(inputs, threads), runs, threads)
            self._forget_plans()
            again = self._run_variant(inputs, RunVariant(threads))
            if not all(same(again[name], whole[name]) for name in names):
                raise VerificationError(f"batch of {batch}: steps cut in another way give another result; report this")
            if threads > 1:
                plain_ms = native_ways.least_ms(partial(self._run_variant, inputs, RunVariant(threads)))
                alone = (plan for _, _, plan in self._sections(inputs, 1))
                skipped = native_ways.why_not_alone(layers, alone, threads, plain_ms)
        counts = [threads, 1] if threads > 1 and not skipped else [threads]
        chunks = [0, *(self._chunks(batch) if all(has_rows(whole[name], batch) for name in names) else ())]
        variants = []
        for variant in (RunVariant(t, c) for t in counts for c in chunks):
            values = self._run_variant(inputs, variant) if variant != RunVariant(threads) else whole
            if all(same(values[name], whole[name]) for name in names):
                variants.append(variant)
        calls = [partial(self._run_variant, inputs, variant) for variant in variants]
        taken = _interleaved_ms(calls, runs if len(calls) > 1 else 2)
        rows: list[dict[str, Any]] = [
            {"batch": batch, "asked_threads": threads, **vars(variant), "ms": ms, "chosen": False}
            for variant, ms in zip(variants, taken, strict=True)
        ]
        best = min(rows, key=lambda row: row["ms"])
        if best is not rows[0]:
            # A moment's noise must not slow down all later calls, so what beats the plain way has to do so twice.
            pair = [partial(self._run_variant, inputs, v) for v in (variants[0], variants[rows.index(best)])]
            plain, other = _interleaved_ms(pair, 2 * runs)
            if best["ms"] > 0.97 * rows[0]["ms"] or other > 0.97 * plain:
                best = rows[0]
        best["chosen"] = True
        if layers:
            best["cuts"] = native_ways.kept(layers)
            self._choices[batch, threads] = {"batch": batch, "threads": threads, "layers": layers, "skipped": skipped}
        self.variants[batch, threads] = RunVariant(best["threads"], best["chunk"])
        self._whole.clear()
        return rows

    def choices(self) -> dict[str, Any]:
        """The rates by which steps are cut, and per batch size what `tune` tried: see `native_ways.try_ways`."""
        if self.backend != HOST or not self._choices:
            return {}
        return {"rates": native_rates.described(self._threads()), "batches": list(self._choices.values())}

    def _sections(
        self, inputs: Sequence[torch.Tensor], threads: int
    ) -> list[tuple[Section, list[torch.Tensor | int], SectionPlan]]:
        """Every section with what reaches it and its plan, in order; what ran before knows that there are no others."""
        values: dict[str, Any] = {i.name: x for i, x in zip(self.program.inputs, inputs, strict=True)}
        found = []
        with torch.inference_mode():
            for part in self._parts:
                if isinstance(part, int):
                    node = self.program.nodes[part]
                    values[node.output] = run_in_torch(self.program, node, values)
                    continue
                given = self._given(part, values)
                plan = self._plan(part, given, threads)
                found.append((part, given, plan))
                if part is not self._parts[-1]:
                    values.update(zip(part.outputs, plan.run(given), strict=True))
        return found

    def _forget_plans(self) -> None:
        """Have all plans made again, by the rates and ways that are in use now."""
        with self._lock:
            self._plans.clear()
            for ready in self._ready:
                ready.clear()

    def _chunks(self, batch: int) -> list[int]:
        """The pieces that a batch may be cut into, as far as the program tells."""
        regroups = any(BATCH in limit.names for limit in self.program.limits)
        return [c for c in (1, 2, 4, 8) if self.program.batch_is_dynamic and not regroups and c < batch]

    def adopt(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Take over what `tune` found on the same machine in an earlier process."""
        for row in rows:
            counts = [row.get(key) for key in ("batch", "asked_threads", "threads", "chunk")]
            if row.get("chosen") is not True or not all(type(count) is int for count in counts):
                continue
            batch, asked, threads, chunk = counts
            # A file's rows are taken where `tune` could have found them.
            if threads in (asked, 1) and chunk in (0, *self._chunks(batch)):
                self.variants[batch, asked] = RunVariant(threads, chunk)
                native_ways.adopt(row.get("cuts"))
        self._whole.clear()

    def left_to_torch(self) -> dict[int, str]:
        """Node index → why PyTorch computes it."""
        return dict(sorted(self.in_torch.items()))

    def _batch(self, inputs: Sequence[torch.Tensor]) -> int:
        return inputs[0].shape[0] if inputs and inputs[0].dim() else 0

    def _values(self, inputs: Sequence[torch.Tensor]) -> dict[str, Any]:
        variant = self.variants.get((self._batch(inputs), self._threads())) if self.variants else None
        return self._run_variant(inputs, variant or RunVariant(self._threads()))

    def _run_variant(self, inputs: Sequence[torch.Tensor], variant: RunVariant) -> dict[str, Any]:
        """Inputs and everything the sections hand over; the outputs alone where the batch runs in pieces."""
        if not variant.chunk:
            return self._run_all(inputs, variant.threads)
        batch, step = self._batch(inputs), variant.chunk
        follows = [
            i.shape[:1] == (None,) and x.shape[0] == batch for i, x in zip(self.program.inputs, inputs, strict=True)
        ]
        pieces = [
            self._run_all(
                [x[at : at + step] if f else x for x, f in zip(inputs, follows, strict=True)], variant.threads
            )
            for at in range(0, batch, step)
        ]
        return {name: torch.cat([piece[name] for piece in pieces]) for name in self.program.output_names()}

    def _run_all(self, inputs: Sequence[torch.Tensor], threads: int) -> dict[str, Any]:
        program = self.program
        values: dict[str, Any] = {i.name: x for i, x in zip(program.inputs, inputs, strict=True)}
        done: list[Section | int] = []
        with below_autograd() if self.in_torch else _AS_IT_IS:
            while True:
                parts = self._parts
                # What was refused changes the parts from there on; rarely those before, whose values then lack some.
                done = done if parts[: len(done)] == done else []
                try:
                    for part in parts[len(done) :]:
                        if isinstance(part, int):
                            node = program.nodes[part]
                            values[node.output] = run_in_torch(program, node, values)
                        else:
                            values.update(zip(part.outputs, self._run(part, values, threads), strict=True))
                        done.append(part)
                    return values
                except lib.Unsupported as refused:
                    self._leave_to_torch({refused.node: refused.reason})
                except _Foreign as refused:
                    self._leave_to_torch(refused.reasons)

    def run_node(self, index: int, values: Mapping[str, Any]) -> Any:
        """One node's value from given values, codes as the program defines them."""
        node = self.program.nodes[index]
        with torch.inference_mode():
            if index not in self.in_torch and node.op != "size" and not is_list(node) and node.target != "getitem":
                # As kernels write it, unless torch may read it, some of whose ops take no other layout than its own.
                is_step = not self.in_torch
                section = Section(index, index + 1, tuple(dict.fromkeys(node.refs())), (node.output,), is_step)
                try:
                    value = self._run(section, values, self._threads(), keep=False)[0]
                    return self._own_codes(node.output, value) if is_step else value
                except lib.Unsupported as refused:
                    self._leave_to_torch({refused.node: refused.reason})
                except _Foreign as refused:
                    self._leave_to_torch(refused.reasons)
            return run_in_torch(self.program, node, values)

    def step(self, index: int) -> Callable[[Sequence[torch.Tensor]], torch.Tensor]:
        """One node as a function of the values that it reads; plans are kept per set of shapes."""
        node, in_own_codes = self.program.nodes[index], super().step(index)
        section = Section(index, index + 1, tuple(dict.fromkeys(node.refs())), (node.output,), is_step=True)
        plan_of = self._steps_of(section)

        def by_node(values: Sequence[torch.Tensor]) -> torch.Tensor:
            return in_own_codes([self._own_codes(n, x) for n, x in zip(section.inputs, values, strict=True)])

        def step(values: Sequence[torch.Tensor]) -> torch.Tensor:
            plan, values = plan_of(values)
            return by_node(values) if plan is None else plan.made(values)

        return step

    def steps(
        self, first: int, last: int, reads: tuple[str, ...], gives: str, numbers: tuple[tuple[str, int], ...] = ()
    ) -> Callable[..., torch.Tensor | None] | None:
        """Nodes [first, last) as one section."""
        sizes = [number for _, number in numbers]
        section = Section(first, last, (*reads, *(name for name, _ in numbers)), (gives,), is_step=True)
        plan_of = self._steps_of(section, sizes)

        def steps(*given: torch.Tensor) -> torch.Tensor | None:
            plan, values = plan_of(given)
            if plan is None:
                return None
            return plan.run([*values, *sizes])[0] if sizes else plan.made(values)  # type: ignore[return-value]

        return steps

    def _steps_of(
        self, section: Section, numbers: Sequence[int] = ()
    ) -> Callable[[Sequence[torch.Tensor]], tuple[SectionPlan | None, Sequence[torch.Tensor]]]:
        """Values → the plan for them, or None where the library takes them not, and the values as it takes them."""
        ready: dict[Any, SectionPlan] = {}
        self._ready.append(ready)

        def plan_of(values: Sequence[torch.Tensor]) -> tuple[SectionPlan | None, Sequence[torch.Tensor]]:
            threads = self._threads()
            plan = ready.get((threads, *[(x.shape, x.stride(), x.dtype) for x in values]))
            if plan is None:
                if any(i in self.in_torch for i in range(section.first, section.last)) or any(
                    why_foreign(x) for x in values
                ):
                    return None, values
                values = [dense(x) for x in values]  # type: ignore[misc]
                try:
                    with self._lock:
                        plan = self._make_plan(section, [*values, *numbers], threads)
                        while len(ready) >= PLANS_PER_SECTION:
                            del ready[next(iter(ready))]
                        ready[threads, *[(x.shape, x.stride(), x.dtype) for x in values]] = plan
                except lib.Unsupported as refused:
                    self._leave_to_torch({refused.node: refused.reason})
                    return None, values
            return plan, values

        return plan_of

    def _own_codes(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """A value as the program has it, of what a step gave."""
        form = self.program.values.get(name)
        is_raised = form is not None and form.qparams is not None and form.qparams.torch_dtype is not x.dtype
        return lowered(x) if is_raised else x

    def int8_layers(self) -> int:
        """Layers that native int8 kernels compute."""
        return sum(index not in self.in_torch for index in self.program.int8_layers())

    def profile(self, inputs: Sequence[torch.Tensor], runs: int = 10) -> list[dict[str, Any]]:
        """One row per kernel in execution order: {"name", "op", "kernel", "parts", "ms"}, the least of `runs` runs.

        "parts": in how many parts the batch passes it; 1: at once.
        """
        program, rows = self.program, []
        self(inputs)
        values: dict[str, Any] = {i.name: x for i, x in zip(program.inputs, inputs, strict=True)}
        with torch.inference_mode():
            for part in self._parts:
                if isinstance(part, int):
                    node = program.nodes[part]
                    taken = []
                    for _ in range(runs):
                        start = time.perf_counter()
                        values[node.output] = run_in_torch(program, node, values)
                        taken.append((time.perf_counter() - start) * 1e3)
                    op = node.target or node.op
                    rows.append({"name": node.name, "op": op, "kernel": f"torch {op}", "parts": 1, "ms": min(taken)})
                    continue
                given = self._given(part, values)
                plan = self._plan(part, given, self._threads())
                outputs = plan.run(given)
                for step in lib.profile(plan.handle, lib.pointers(given), lib.pointers(outputs), runs):
                    node = program.nodes[step["node"]] if step["node"] >= 0 else None
                    rows.append(
                        {
                            "name": node.name if node else "inputs and outputs",
                            "op": (node.target or node.fused_name) if node else "copy",
                            "kernel": step["kernel"],
                            "parts": step["parts"],
                            "ms": step["ms"],
                        }
                    )
                values.update(zip(part.outputs, outputs, strict=True))
        return rows

    # -- sections

    def _threads(self) -> int:
        return self.threads or torch.get_num_threads()

    def _engine(self, threads: int) -> lib.Handle:
        """The program on a backend with that many threads; packed weights are shared between them."""
        if threads not in self._engines:
            backend = lib.backend(self.backend, threads)
            self._engines[threads] = lib.make(
                "qf_engine_create", "qf_engine_free", self._parsed.pointer, backend.pointer, keeps=self._tensors
            )
        return self._engines[threads]

    def _cut(self) -> None:
        """Divide the program into sections and single torch nodes, in execution order."""
        program = self.program
        keep_lists_together(program, self.in_torch)
        readers: dict[str, list[int]] = {}
        for index, node in enumerate(program.nodes):
            for name in node.refs():
                readers.setdefault(name, []).append(index)
        wanted = set(program.output_names())
        parts: list[Section | int] = []
        first = 0
        while first < len(program.nodes):
            if first in self.in_torch:
                parts.append(first)
                first += 1
                continue
            last = first
            while last < len(program.nodes) and last not in self.in_torch:
                last += 1
            nodes = program.nodes[first:last]
            if self.in_torch and all(node.op in ("size", "shape") for node in nodes):
                parts += range(first, last)  # nothing to compute: not worth a call
            else:
                inside = {node.output for node in nodes}
                read = dict.fromkeys(name for node in nodes for name in node.refs() if name not in inside)
                # The program's own first and in its order: `_keep_whole`.
                inputs = dict.fromkeys((*(item.name for item in program.inputs if item.name in read), *read))
                outputs = [
                    node.output for node in nodes
                    if node.output in wanted or any(r >= last for r in readers.get(node.output, ()))
                ]  # fmt: skip
                if outputs:
                    parts.append(Section(first, last, tuple(inputs), tuple(outputs)))
            first = last
        self._parts = parts

    def start_again(self) -> None:
        """Forget, in a forked child, what threads of the parent may have left half done or still hold."""
        _of_the_parent.append((self._engines, self._plans, [dict(ready) for ready in self._ready]))
        self._engines, self._plans = {}, {}
        for ready in self._ready:
            ready.clear()

    def _leave_to_torch(self, reasons: Mapping[int, str]) -> None:
        with self._lock:
            self.in_torch = {**reasons, **self.in_torch}
            self._plans.clear()
            self._whole.clear()
            self._cut()

    def _run(self, section: Section, values: Mapping[str, Any], threads: int, *, keep: bool = True) -> list[Any]:
        given = self._given(section, values)
        return self._plan(section, given, threads, keep=keep).run(given)

    def _given(self, section: Section, values: Mapping[str, Any]) -> list[torch.Tensor | int]:
        """The section's inputs as the library takes them.

        Raises:
            _Foreign: one that it can't take; names the nodes that read it.
        """
        reasons: dict[int, str] = {}
        for name in section.inputs:
            if reason := why_foreign(values[name]):
                readers = (i for i in range(section.first, section.last) if name in self.program.nodes[i].refs())
                reasons |= dict.fromkeys(readers, reason)
        if reasons:
            raise _Foreign(reasons)
        return [dense(values[name]) for name in section.inputs]

    def _plan(
        self, section: Section, given: Sequence[torch.Tensor | int], threads: int, *, keep: bool = True
    ) -> SectionPlan:
        key = (threads, *(v if isinstance(v, int) else (v.shape, v.dtype, v.is_contiguous()) for v in given))
        with self._lock:
            plans = self._plans.setdefault(section, OrderedDict()) if keep else OrderedDict()
            plan = plans.get(key)
            if plan is None:
                plan = plans[key] = self._make_plan(section, given, threads)
                while len(plans) > PLANS_PER_SECTION:
                    plans.popitem(last=False)
            else:
                plans.move_to_end(key)
            return plan

    def _make_plan(self, section: Section, given: Sequence[torch.Tensor | int], threads: int) -> SectionPlan:
        forms = (lib.Form * len(given))(*(lib.Form.of(value) for value in given))
        handle = lib.make(
            "qf_step_create" if section.is_step else "qf_plan_create", "qf_plan_free",
            self._engine(threads).pointer, ctypes.c_int32(section.first),
            ctypes.c_int32(section.last), _names(section.inputs), forms, ctypes.c_size_t(len(given)),
            _names(section.outputs), ctypes.c_size_t(len(section.outputs)), keeps=self._tensors,
        )  # fmt: skip
        found = (lib.Form * len(section.outputs))()
        lib.library().qf_plan_outputs(handle.pointer, found)
        shapes = tuple(
            (bool(f.number) if name in self._flags else f.number)
            if f.is_number
            else (tuple(f.dims[: f.rank]), strides_of(f), lib.TORCH_DTYPES[f.dtype])
            for name, f in zip(section.outputs, found, strict=True)
        )
        return SectionPlan(handle, shapes)


class _Foreign(Exception):
    """A section was given what the library has no form for. `reasons`: node index → why it runs in torch."""

    def __init__(self, reasons: Mapping[int, str]) -> None:
        super().__init__(str(reasons))
        self.reasons = reasons


#: Never freed: that could wait for threads which the child does not have.
_of_the_parent: list[Any] = []


def _start_again() -> None:
    for runner in list(_runners):
        runner.start_again()


in_forked_child(_start_again)


def kernel_of(planned: PlannedUnit) -> str:
    """The kernel that will run a unit, for the plan."""
    unit = planned.unit
    if unit.kind == CORE:
        name = "linear" if unit.op == "linear" else "conv"
        parts = [
            name,
            *(["sum"] if unit.residual is not None else []),
            *([unit.epilogue.kind] if unit.epilogue else []),
        ]
        return f"native.{'_'.join(parts)}"
    return f"native.{unit.kind}"


#: Runs that other programs interrupted are repeated for at most this long.
_PATIENCE_S = 2.0


def _interleaved_ms(calls: Sequence[Callable[[], Any]], runs: int) -> list[float]:
    """The least time of each call over `runs` rounds in turn, in ms.

    A run during which the system took a core away says nothing about the call: with more threads it is the more
    likely, so on a busy machine one thread would seem the fastest. Such rounds are repeated while patience lasts; not
    where there is one call and nothing to choose. What is hopeless after two rounds is left out.
    """
    import resource  # not on Windows, where nothing native runs

    best, done, start = [math.inf] * len(calls), 0, time.perf_counter()
    while done < runs:
        preempted = resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw
        is_patient = len(calls) > 1 and time.perf_counter() - start <= _PATIENCE_S
        for i, call in enumerate(calls):
            if done >= 2 and best[i] > native_ways.HOPELESS * min(best):
                continue
            begin = time.perf_counter()
            call()
            best[i] = min(best[i], (time.perf_counter() - begin) * 1e3)
        if not is_patient or preempted == resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw:
            done += 1
    return best


def _names(names: Sequence[str]) -> Any:
    return (ctypes.c_char_p * len(names))(*(name.encode() for name in names))
