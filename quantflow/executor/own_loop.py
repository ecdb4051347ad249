"""Calibration by the user's own loop: a module that computes what the float one does and observes its calls."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from quantflow.errors import CalibrationError, CaptureError, DataError, UsageError
from quantflow.executor.built import Observable
from quantflow.executor.order import completed, execute, observed
from quantflow.executor.parts import why_after_all, why_in_parts
from quantflow.executor.results import finished
from quantflow.executor.run import Run
from quantflow.executor.source import Source, given
from quantflow.executor.steps import captured
from quantflow.ir.batch import Batch, as_batches
from quantflow.ir.binding import bind
from quantflow.ir.graph import Graph
from quantflow.quantized import Quantized, QuantizedParts
from quantflow.report import Progress, make_console
from quantflow.schema import Recipe
from quantflow.sources.data import Data
from quantflow.sources.models import LoadedModel
from quantflow.stages.calibrate import (
    CalibrationTable,
    calibrate,
    empty_table,
    observe,
    require_complete,
    shapes_of,
    specs_of,
)
from quantflow.stages.prepare import Prepared


class Observation:
    """What was seen of a model's calls so far.

    Ranges are measured call by call. Where algorithms that rewrite the float model, or its parts, need the data before
    anything can be observed, calls are only kept, and `model` goes through all stages on them.

    Args:
        keep: how many samples of the calls are kept, for what needs data behind calibration; None: all.
    """

    def __init__(self, recipe: Recipe, model: LoadedModel, keep: int | None) -> None:
        self.recipe, self.float_model, self._keep = recipe, model, keep
        self._lock = threading.RLock()
        self._calls: list[Batch] = []  # those that are kept
        self._samples = 0  # of all calls
        self._examples: list[Batch] = []  # what the graph was captured with
        self._graph: Graph | None = None
        self._observable: Observable | None = None
        self._table: CalibrationTable | None = None
        self._is_own = True  # the table holds these calls and no others
        self._why_later = "nothing was called yet, and no example was given"

    def begin(self, example: Batch) -> None:
        """Capture the model with one call of it, which is not observed.

        Raises:
            QuantflowError: CaptureError and the like; UsageError: all calls are needed, and only some would be kept.
        """
        self._examples = [example]
        self._why_later = self._capture()
        if self._why_later and self._keep is not None:
            raise UsageError(f"keep: all calls are needed, as {self._why_later}; leave keep out")

    def _capture(self) -> str:
        """Graph and observers for the examples; why they have to wait for the data, if they do."""
        rewriting = [each.name for each in self.recipe.algorithms if each.acts_on == "graph"]
        if rewriting:
            return f"the float model is rewritten by what the data show ({', '.join(rewriting)})"
        with Progress(make_console(), quiet=True, waits=False) as progress:
            run = self._run(self._examples[:1], progress)
            if why := why_in_parts(run):
                return f"the model is quantized in parts: {why}"
            try:
                graph = captured(run, self._examples[0])
            except CaptureError:
                if why := why_after_all(run):
                    return f"the model is quantized in parts: {why}"
                raise
            # Outliers are looked for among the calls, once there are any.
            ranges_only = self.recipe.outliers.model_copy(update={"samples": 0})
            recipe = self.recipe.model_copy(update={"outliers": ranges_only})
            self._observable = observed(replace(run, recipe=recipe), graph)
        self._graph, self._table = graph, empty_table(self._observable.prepared)
        return ""

    def see(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Observe one call.

        Raises:
            DataError, CalibrationError: as calibration; the ranges stay as they were before the call.
        """
        with self._lock, torch.inference_mode(False), torch.no_grad():
            batch = next(iter(as_batches([Batch(args, kwargs)]))).mapped(lambda x: x.detach().clone())
            batch = replace(batch, ids=tuple(str(self._samples + i) for i in range(batch.size)))
            if not self._examples:
                self.begin(batch)
            if self._observable is not None:
                self._observe(batch)
            if self._keep is None or sum(each.size for each in self._calls) + batch.size <= self._keep:
                self._calls.append(batch)
            self._samples += batch.size

    def _observe(self, batch: Batch) -> None:
        self._take_sizes(batch)
        assert self._observable is not None
        assert self._table is not None
        prepared, first = self._observable.at_its_place(), shapes_of(self._examples[0])
        # In a table of its own, so that a call that fails leaves no trace.
        table = observe(prepared, batch, empty_table(prepared), first=self._table.batches, first_shapes=first)
        self._table = self._table.merge(table)

    def _take_sizes(self, batch: Batch) -> None:
        """Capture anew, with this call beside the examples, where its sizes are not among those that may vary."""
        assert self._graph is not None
        try:
            bind(self._graph, batch.args, batch.kwargs)
            return
        except DataError:
            varies = self.recipe.dynamic == "auto" and _differ_in_sizes(self._examples[0], batch)
            if not varies or not self._holds_all():
                raise
        before = self._examples, self._graph, self._observable, self._table
        try:
            self._examples = [*self._examples, batch]
            self._capture()
            bind(self._graph, batch.args, batch.kwargs)
            if self._calls:
                self._table = calibrate(self._observable.at_its_place(), self._calls, first=0)
        except Exception:
            self._examples, self._graph, self._observable, self._table = before
            raise

    def _holds_all(self) -> bool:
        """Whether the table can be measured again."""
        return self._is_own and sum(each.size for each in self._calls) == self._samples

    @property
    def table(self) -> CalibrationTable:
        """
        Raises:
            UsageError: nothing is observed before all calls are there.
        """
        if self._table is None:
            raise UsageError(f"calibration: there is none, as {self._why_later}")
        return self._table

    @table.setter
    def table(self, table: CalibrationTable) -> None:
        if not isinstance(table, CalibrationTable):
            raise UsageError(f"calibration: is a {type(table).__name__}; give a quantflow.CalibrationTable")
        if specs_of(table) != specs_of(self.table):
            raise CalibrationError(
                "calibration: the table observed other values than this model's, or in other ways; give one that was "
                "measured on the same model with the same settings"
            )
        self._table, self._is_own = table, False

    def model(self, evaluation: Sequence[Batch] | None, progress: Progress) -> Quantized | QuantizedParts:
        """The int8 model of what was seen.

        Raises:
            QuantflowError: any stage's own error; DataError: nothing was called.
        """
        with self._lock:
            run = self._run(self._calls or self._examples if self._samples else [], progress, evaluation)
            if self._table is not None and not self._is_own and not self._samples:
                run = self._run(self._examples, progress, evaluation)
            if self._observable is None:
                return execute(run)
            assert self._graph is not None
            observable = observed(run, self._graph)
            built = completed(run, observable, self._measured(observable.at_its_place()))
            return finished(replace(run, place=built.place), built)

    def _measured(self, prepared: Prepared) -> CalibrationTable:
        """The table of what this model observes, which outliers may have made another than what the loop's did."""
        wanted, table = specs_of(empty_table(prepared)), self.table
        if wanted.items() <= specs_of(table).items():
            table = replace(table, observers={name: table.observers[name] for name in wanted})
            require_complete(table, prepared.layers)
            return table
        if self._holds_all():
            return calibrate(prepared, self._calls)
        raise UsageError(
            "calibration: massive outliers leave layers float, so that other values have to be observed than in the "
            "loop, and its calls were not all kept; leave keep out, or name those layers in `layers`"
        )

    def _run(self, calls: Sequence[Batch], progress: Progress, evaluation: Sequence[Batch] | None = None) -> Run:
        compared = calls if evaluation is None else evaluation
        source = given(self.float_model, calls, compared)
        shapes = [each for each in self._examples if all(each is not call for call in calls)]
        return Run.of(self.recipe, Source(source.model, _with_shapes(source.data, shapes)), progress)


def _with_shapes(data: Data, shapes: Sequence[Batch]) -> Data:
    return replace(data, shapes=tuple(shapes))


def _differ_in_sizes(a: Batch, b: Batch) -> bool:
    own, other = [x.shape for x in a.tensors], [x.shape for x in b.tensors]
    return own != other and [len(shape) for shape in own] == [len(shape) for shape in other]


class ObservedModule(nn.Module):
    """The float module, whose calls are observed.

    It takes and returns what the module does, and has its methods and attributes: `generate()` runs on it. The module
    itself is not changed, and calls of it are not observed.

    Attributes:
        module: the float model, in eval mode.
    """

    def __init__(self, module: Any, observation: Observation) -> None:
        super().__init__()
        self.module = module
        self.observation = observation
        self._shell: Any = None
        self.eval()
        if isinstance(module, nn.Module) and not isinstance(module, torch.jit.ScriptModule):
            self.__dict__["_shell"] = _observing(module, self._see)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self._shell is not None:
            return self._shell(*args, **kwargs)
        self._see(self.module, args, kwargs)
        run = self.module.module() if isinstance(self.module, torch.export.ExportedProgram) else self.module
        return run(*args, **kwargs)

    def _see(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if getattr(module, "training", False):
            raise UsageError("the model is in training mode, where its ranges are others; call eval() on it first")
        self.observation.see(args, kwargs)

    @property
    def calibration(self) -> CalibrationTable:
        """What was measured so far: can be saved, merged with another and set.

        Raises:
            UsageError: nothing can be measured before all calls are there.
            CalibrationError: on setting, the table observed other values.
        """
        return self.observation.table

    @calibration.setter
    def calibration(self, table: CalibrationTable) -> None:
        self.observation.table = table

    def train(self, mode: bool = True) -> Any:
        if self._shell is not None:
            self._shell.training = mode
        return super().train(mode)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "calibration" or "_modules" not in self.__dict__:
                raise
            return getattr(self.__dict__["_shell"] or self.module, name)


def _observing(module: nn.Module, see: Any) -> nn.Module:
    """An object of the module's class that shares all it holds, and calls `see` before everything else."""
    shell = module.__new__(type(module))
    shell.__dict__.update(module.__dict__)
    for name in ("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"):
        shell.__dict__[name] = type(module.__dict__[name])(module.__dict__[name])
    shell.register_forward_pre_hook(see, prepend=True, with_kwargs=True)
    return shell
