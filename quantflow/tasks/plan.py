"""task=plan: what would happen to every layer, and why."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from rich.text import Text

from quantflow import report
from quantflow.errors import EXIT_PASSED
from quantflow.executor.run import Run
from quantflow.executor.source import Source
from quantflow.executor.steps import graph_of, plan_for
from quantflow.ir.batch import Batch
from quantflow.numerics.seed import seeded
from quantflow.report import Progress
from quantflow.runtimes import choose_runtime
from quantflow.schema import Recipe
from quantflow.sources.data import Data, ImagePreprocess, TextPreprocess, load_data
from quantflow.sources.models import LoadedModel, load_model


def task(recipe: Recipe, _overrides: Sequence[str]) -> int:
    """Needs no data where the model says what its input looks like."""
    assert recipe.model is not None, "the schema asks for it"
    console = report.make_console(plain=recipe.report.plain)
    choice = choose_runtime(recipe.runtime.kind, recipe.device.kind, recipe.mode.kind, recipe.policy.float)
    with seeded(recipe.seed):
        model = load_model(recipe.model, recipe.seed)
        report.print_notices(console, model.notices)
        example = _example(model) or next(iter(load_data(recipe.data, model.preprocess, recipe.seed).calibration))
        run = Run(recipe, Source(model, Data([example], [], {})), choice, Progress(console, quiet=True))
        plan = plan_for(run, graph_of(run, example), example)
    report.print_plan(console, plan.to_json()["rows"])
    report.print_notices(console, plan.notes)
    console.print(Text(f"runtime {choice.runtime.name} on {choice.device} ({choice.reason})"))
    return EXIT_PASSED


def _example(model: LoadedModel) -> Batch | None:
    """Input of the right form without data: zeros are enough for a structure."""
    if isinstance(model.preprocess, ImagePreprocess):
        return Batch(args=(torch.zeros(2, model.preprocess.channels, model.preprocess.size, model.preprocess.size),))
    if isinstance(model.preprocess, TextPreprocess):
        return Batch(args=model.preprocess.encode(["a", "b"]))
    return None
