"""The command line: help, errors as small letters, exit codes.

0 passed   1 crash   2 recipe or usage error   3 a gate failed   4 this machine can't   130 interrupted
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from types import FrameType
from typing import NoReturn, get_args

from rich.console import Console

from quantflow.cli import sweep
from quantflow.config import app
from quantflow.config.recipe_file import config_dirs, group_choices, recipe_description, recipe_files
from quantflow.errors import EXIT_CRASH, EXIT_GATE, EXIT_INTERRUPTED, EXIT_PASSED, QuantflowError, UsageError
from quantflow.schema import Recipe, Task
from quantflow.store.whole_file import disk_trouble

#: What --force stands for: Hydra knows no options of ours.
_FORCED = "resume=false"


@dataclass(frozen=True)
class Ending:
    """How a job ended: its exit code, and why where it did not pass."""

    exit_code: int
    reason: str = ""


TASKS: dict[Task, str] = {
    "run": "the main job: quantize, verify, evaluate, benchmark, judge, save (the default)",
    "plan": "what would happen to every layer, and why; needs no data",
    "evaluate": "float beside int8 again, from an artifact: artifact=DIR",
    "benchmark": "float and int8 interleaved again, from an artifact: artifact=DIR",
    "inspect": "what an artifact holds: artifact=DIR",
    "export": "an artifact as ONNX, for onnxruntime and OpenVINO: artifact=DIR export.path=FILE",
    "report": "an artifact's report again: artifact=DIR",
    "compare": "what became worse, and in which layer: baseline=DIR candidate=DIR",
    "schema": "the JSON schema of recipe files, for editors",
    "doctor": "what this machine can run, what is missing, and the command that installs it",
    "sensitivity": "what int8 in each layer alone costs, and what float in it alone gives back",
    "tune": "the main job with a search: the fastest int8 model that keeps tune.subject_to (implied when that is set)",
    "selftest": "every kernel of our own and three small models against the reference: device=cpu, cuda or xpu",
}

_HELP = """\
quantflow: one recipe in, a real int8 model out, measured against the float model.

  quantflow recipe=resnet50_sym_int8
  quantflow recipe=resnet50_sym_int8 mode=torchscript qconfig.weight.granularity=per_tensor device=cpu
  quantflow recipe=path/to/mine.yaml
  quantflow -m recipe=resnet18_sym_int8 qconfig=sym_int8,affine_uint8
  quantflow model=entry model.entry=package.module:callable data=folder data.path=DIR
  quantflow task=benchmark artifact=DIR
  quantflow task=selftest device=xpu
  python -m quantflow.torchrun --nproc-per-node 4 -m quantflow recipe=…   (torchrun, with the exit codes below)

Tasks (task=NAME)
{tasks}

Recipes (recipe=NAME, or a file)
{recipes}

Groups (GROUP=NAME; replaces what the recipe says)
{groups}

Any single setting: section.key=value, as in seed=1 or gates.min_sqnr_db=20; --cfg job shows them all.

Options
  -m, --multirun       every combination of comma-separated values, 'recipe=glob(*)', hydra/sweeper=optuna; in several
                       processes or on several machines with hydra/launcher=joblib, submitit_slurm, ray
  --force              start afresh: without it a run goes on from what an interrupted one has finished, and a sweep
                       skips the jobs that are done
  --cfg job            print the settings and stop
  --config-dir DIR     your own recipes in DIR/recipe/, and groups in DIR/GROUP/
  -sc install=bash     tab completion: eval "$(quantflow -sc install=bash)"; also zsh and fish
  --hydra-help         Hydra's own options
  --version, --help

Exit codes
  0 passed   1 crash   2 recipe or usage error   3 a gate failed   4 this machine can't   130 interrupted
"""


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Runs the command line (default: sys.argv) and exits with its code."""
    raise SystemExit(run(sys.argv[1:] if arguments is None else arguments))


def run(arguments: Sequence[str]) -> int:
    """Runs the command line and returns its exit code."""
    if "--help" in arguments or "-h" in arguments:
        print(help_text(arguments), end="")
        return EXIT_PASSED
    if "--version" in arguments:
        print(f"quantflow {_version()}")
        return EXIT_PASSED
    arguments = [_FORCED if argument == "--force" else argument for argument in arguments]
    endings: list[Ending] = []
    try:
        with _interruptible():
            if app.is_multirun(arguments):
                if "WORLD_SIZE" in os.environ:
                    raise UsageError(
                        "command line: a sweep can't run under torchrun; its launchers start its processes"
                    )
                return sweep.run_sweep(arguments)
            app.run_app(arguments, lambda job: endings.append(run_job(job)))
    except QuantflowError as error:
        return _complain(error)
    except KeyboardInterrupt:
        Console(stderr=True).print("interrupted", style="red")
        return EXIT_INTERRUPTED
    except Exception as error:  # noqa: BLE001 the last resort: a traceback and the exit code of a crash
        if told := disk_trouble(error):
            return _complain(UsageError(told))
        traceback.print_exc()
        return EXIT_CRASH
    return endings[0].exit_code if endings else EXIT_PASSED


def run_job(job: app.Job) -> Ending:
    """Validates and runs one job. Never raises, save KeyboardInterrupt."""
    try:
        with _interruptible():
            recipe = Recipe.from_dict(job.settings, job.name)
            from quantflow.tasks.table import run_task

            exit_code = run_task(recipe, list(job.overrides))
            return Ending(exit_code, "a gate failed" if exit_code == EXIT_GATE else "")
    except QuantflowError as error:
        return Ending(_complain(error), str(error))
    except Exception as error:  # noqa: BLE001 the last resort: a traceback and the exit code of a crash
        if told := disk_trouble(error):
            return Ending(_complain(UsageError(told)), told)
        traceback.print_exc()
        return Ending(EXIT_CRASH, f"crashed with {type(error).__name__}: {error}")


def help_text(arguments: Sequence[str] = ()) -> str:
    """--help, with the recipes of every --config-dir in `arguments`."""
    files = recipe_files(config_dirs(arguments))
    recipes = {name: recipe_description(file) for name, file in files.items()}
    groups = {group: ", ".join(names) for group, names in group_choices().items()}
    return _HELP.format(
        tasks=_columns({task: TASKS[task] for task in get_args(Task)}),
        recipes=_columns(recipes),
        groups=_columns(groups),
    )


@contextmanager
def _interruptible() -> Iterator[None]:
    """Ctrl-C ends as KeyboardInterrupt, although TorchScript and Hydra turn that into errors of their own."""
    was_pressed = False

    def press(number: int, frame: FrameType | None) -> None:
        nonlocal was_pressed
        was_pressed = True
        if callable(before):
            before(number, frame)

    before = signal.getsignal(signal.SIGINT)
    is_ours = callable(before) and threading.current_thread() is threading.main_thread()
    if is_ours:
        signal.signal(signal.SIGINT, press)
    try:
        yield
    except Exception as error:
        if was_pressed:
            raise KeyboardInterrupt from error
        raise
    finally:
        if is_ours:
            signal.signal(signal.SIGINT, before)


def _columns(rows: dict[str, str]) -> str:
    width = max(map(len, rows))
    return "\n".join(f"  {name:{width}}  {text}" for name, text in rows.items())


def _complain(error: QuantflowError) -> int:
    """The message in red on stderr, no traceback; where several workers share the work, only the first one's."""
    if os.environ.get("RANK", "0") == "0":
        Console(stderr=True).print(str(error), style="red", markup=False, highlight=False, soft_wrap=True)
    return error.exit_code


def _version() -> str:
    try:
        return metadata.version("quantflow")
    except metadata.PackageNotFoundError:
        return "(not installed)"
