"""What an artifact is asked: task=evaluate, benchmark, inspect and report, each with artifact=DIR."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.text import Text

from quantflow import report
from quantflow.analysis.baseline import beside
from quantflow.config.compose import overlay
from quantflow.config.foreign import RUN_FROM_FILE
from quantflow.config.overrides import key_of
from quantflow.errors import EXIT_GATE, EXIT_PASSED, ArtifactError, UsageError, VerificationError, first_line
from quantflow.executor.contest import notices_of
from quantflow.executor.measure import measure
from quantflow.executor.placed import with_place
from quantflow.executor.results import judged, timed
from quantflow.executor.run import Run
from quantflow.executor.source import load_source
from quantflow.executor.steps import captured, rewritten
from quantflow.host.environment import environment
from quantflow.numerics.seed import seeded
from quantflow.quantized import load
from quantflow.report import Progress
from quantflow.schema import Recipe
from quantflow.stages import benchmark as timing
from quantflow.stages.compile import Compiled
from quantflow.stages.gates import FAILED
from quantflow.stages.record import Record
from quantflow.store.artifact import RESULTS, add_files
from quantflow.tasks.run import named_baseline


def measure_again(recipe: Recipe, overrides: Sequence[str]) -> int:
    """Evaluate or benchmark an artifact once more, and judge it by its gates."""
    assert recipe.artifact is not None, "the schema asks for it"
    console = report.make_console(plain=recipe.report.plain)
    record = Record.load(recipe.artifact, operators=None)
    stored = Recipe.from_dict({**overlay(record.recipe, overrides), "task": "run", "artifact": None})
    require_own_code_named(stored, record, overrides)
    only = {
        "evaluate": stored.evaluate.model_copy(update={"enabled": recipe.task == "evaluate"}),
        "benchmark": stored.benchmark.model_copy(update={"enabled": recipe.task == "benchmark"}),
    }
    stored = stored.model_copy(update=only)
    with Progress(console, quiet=stored.report.quiet) as progress, seeded(stored.seed):
        with progress.stage("load"):
            before = _defined()
            source = load_source(stored)
            compiled = load(
                recipe.artifact,
                runtime=stored.runtime.kind,
                device=stored.device.kind,
                operators=sorted(_defined() - before),
            ).compiled
        run, note = with_place(Run(stored, source, compiled.choice, progress), source.first_batch)
        graph = None
        if recipe.task == "evaluate" and stored.evaluate.per_layer:
            example = source.first_batch
            graph, _, _ = rewritten(run, captured(run, example), example, run.kept_algorithms())
        try:
            fresh = measure(run, compiled, graph, _computing(compiled))
        except VerificationError as error:
            raise UsageError(
                f"model: not the float model that '{recipe.artifact}' was made from ({error}); name that one"
            ) from error
    results = {**record.results, **fresh, "environment": environment()}
    earlier = (n for n in record.results.get("notices", ()) if not n.startswith(timing.UNSTEADY_NOTICE))
    told = [*([note] if note else []), *notices_of(results.get("benchmark") or {})]
    results["notices"] = [*earlier, *timing.unsteady(timed(results)), *told]
    results |= judged(stored, results)
    if (baseline := named_baseline(recipe)) is not None:
        results["baseline"] = beside(baseline, results)
    add_files(Path(recipe.artifact), _result_files(results))
    report.print_summary(console, results, artifact=recipe.artifact, quiet=stored.report.quiet)
    return EXIT_GATE if results["verdict"] == FAILED else EXIT_PASSED


def inspect(recipe: Recipe, _overrides: Sequence[str]) -> int:
    """What the artifact holds."""
    assert recipe.artifact is not None, "the schema asks for it"
    console = report.make_console(plain=recipe.report.plain)
    record = Record.load(recipe.artifact, operators=None)
    report.print_plan(console, record.plan["rows"])
    console.print(Text(f"{len(record.program.nodes)} nodes, {len(record.program.int8_layers())} int8 layers"))
    report.print_summary(console, record.results, artifact=recipe.artifact)
    return EXIT_PASSED


def report_again(recipe: Recipe, _overrides: Sequence[str]) -> int:
    """Write an artifact's report again from its results, beside a baseline where one is named, and print it."""
    assert recipe.artifact is not None, "the schema asks for it"
    console = report.make_console(plain=recipe.report.plain)
    record = Record.load(recipe.artifact, operators=None)
    results = record.results
    if (baseline := named_baseline(recipe)) is not None:
        results = {**results, "baseline": beside(baseline, results)}
    add_files(Path(recipe.artifact), _result_files(results))
    report.print_summary(console, results, artifact=recipe.artifact)
    return EXIT_PASSED


def _result_files(results: Mapping[str, Any]) -> dict[str, bytes]:
    """What is written again beside the model."""
    return {RESULTS: report.to_json(results), **report.views(results)}


def _computing(compiled: Compiled) -> Callable[..., Any]:
    """The int8 model of an artifact; what its program does on input is the artifact's fault, not ours."""

    def call(*args: torch.Tensor, **kwargs: torch.Tensor) -> Any:
        try:
            return compiled(*args, **kwargs)
        except (RuntimeError, MemoryError) as error:
            reason = first_line(error)
            raise ArtifactError(f"program.json: it can't be computed on this input ({reason})") from error

    return call


def _defined() -> frozenset[str]:
    """The operators that Python code has registered: those of the code that a user names, the artifact may call.

    Compiled libraries that such code imports bring operators of their own, which nobody named.
    """
    return frozenset(torch.library._defs)


def _names(overrides: Sequence[str], section: str, field: str) -> bool:
    return any(key_of(override) in (section, f"{section}.{field}") for override in overrides)


def require_own_code_named(stored: Recipe, record: Record, overrides: Sequence[str]) -> None:
    """An artifact never makes its reader import code: the user names it again on the command line."""
    for section in ("model", "data"):
        spec = getattr(stored, section)
        if spec.kind == "given":
            raise UsageError(
                f"{section}: this artifact was made in Python from an object that is not in it; name the float "
                f"{section} on the command line, as in {section}=entry {section}.entry=package.module:callable"
            )
        if section == "model" and spec.kind in RUN_FROM_FILE and not _names(overrides, section, "path"):
            path = record.recipe[section]["path"]
            raise UsageError(
                f"model: the artifact names a file that is a program ('{path}'), which is not run unless you say so: "
                f"add model={spec.kind} model.path={path}"
            )
        if spec.kind == "entry" and not _names(overrides, section, "entry"):
            raise UsageError(
                f"{section}: the artifact names code ('{record.recipe[section]['entry']}'), which is not run "
                f"unless you say so: add {section}=entry {section}.entry={record.recipe[section]['entry']}"
            )
