"""The tasks by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from quantflow.errors import EXIT_PASSED
from quantflow.host.workers import rank_and_count
from quantflow.schema import Recipe, Task
from quantflow.tasks import artifact, compare, doctor, export, plan, run, schema, selftest, sensitivity

TASKS: dict[Task, Callable[[Recipe, Sequence[str]], int]] = {
    "run": run.task,
    "tune": run.task,
    "plan": plan.task,
    "evaluate": artifact.measure_again,
    "benchmark": artifact.measure_again,
    "inspect": artifact.inspect,
    "report": artifact.report_again,
    "export": export.task,
    "compare": compare.task,
    "sensitivity": sensitivity.task,
    "doctor": doctor.task,
    "selftest": selftest.task,
    "schema": schema.task,
}


def run_task(recipe: Recipe, overrides: Sequence[str]) -> int:
    """Carry out `recipe.task` and return the exit code (0 passed, 3 a gate failed).

    Raises:
        QuantflowError: with the exit code of its class.
    """
    if rank_and_count()[0] > 0 and recipe.task != "run":
        return EXIT_PASSED  # the first worker's business
    return TASKS[recipe.task](recipe, overrides)
