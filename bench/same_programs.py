"""Do two installations make the same models, and say the same things? A change that should change nothing shows here.

    python -m bench.same_programs --other-python OLD/bin/python
    python -m bench.same_programs --write old.json        # the running interpreter's side alone, then
    python -m bench.same_programs --compare old.json new.json

Each side runs what its interpreter has installed, never the folder this is started in, and each case is processes of
its own: one thread, a fresh folder and a fresh cache. Cases use the command line, quantflow's public names and files
alone, so that modules may be moved and renamed. Without --other-python the running interpreter is compared with itself.

- recipes: every shipped one with few samples and small inputs, several algorithms, modes, qconfigs and runtimes; sha256
  of the artifact's files. Of results.json, by section, and of the reports, what no clock decides.
- modules: `quantize` of modules written here; also the sha256 of what the model computes.
- killed: a run that gets SIGKILL while it times, or searches: the names and keys of all that it keeps to go on from.
- keys: calibration_key(), work_key() and hash() of every shipped recipe, with and without settings of the user's own.
- commands: --help, the schema, plans, sensitivities, exit codes and messages; names: what Python code can reach.

Searches (`*_tuned` recipes) decide by measured time: those recipes are run without their search (tune=none), and of a
search only the keys are compared. Left out besides, because clocks or the moment decide: manifest.json,
seconds and milliseconds, the warm-up's `variants` and `choices`, and every number of a printed text.
"""

from __future__ import annotations

import argparse
import fnmatch
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# The other interpreter runs this file too, and finds nothing of ours but `quantflow`: bench.reporting waits for main.

TINY = ("data.calibration=4", "data.evaluation=4", "benchmark=disabled", "gates=none", "warmup.iterations=1")
QUIET = ("report=quiet", "output=out")
RANDOM = "model.weights=random"
NO_SEARCH = "tune=none"
#: Recipe → what makes it small: weights that need no network, images as small as the architecture takes.
RECIPES: dict[str, tuple[str, ...]] = {
    "mnist_cnn_sym_int8": (),
    "resnet18_sym_int8": (RANDOM, "data.size=64"),
    "resnet50_sym_int8": (RANDOM, "data.size=64"),
    "resnet50_affine_uint8": (RANDOM, "data.size=64"),
    "mobilenet_v2_affine_uint8": (RANDOM, "data.size=64"),
    "efficientnet_lite0_sym_int8": ("data.size=64",),
    "efficientnet_lite0_affine_uint8": ("data.size=64",),
    "efficientnet_lite0_tuned": ("data.size=64", NO_SEARCH),
    "minilm_sym_int8": ("model.max_length=24",),
    "minilm_tuned": ("model.max_length=24", NO_SEARCH),
    "vit_b_16_sym_int8": (RANDOM, "data.calibration=2", "data.evaluation=2", "data.batch_size=2"),
}
SMALLEST = "mnist_cnn_sym_int8"
QUICK_RECIPES = (SMALLEST, "resnet18_sym_int8", "efficientnet_lite0_affine_uint8")
MODES = ("export", "torchscript", "imperative")
#: A recipe file of the user's own, in each case's folder: the command line takes algorithms by a preset's name alone.
EVERY = "every.yaml"
EVERY_TEXT = """\
model: {kind: mnist_cnn}
data: {kind: mnist}
algorithms: [batchnorm, equalize, smooth, unsigned, clip_weights, activation_scale, bias_correction, gptq,
  {name: adaround, iterations: 20}]
"""
#: Name → (recipe, settings beside the small ones).
VARIATIONS: dict[str, tuple[str, tuple[str, ...]]] = {
    **{f"algorithms={name}": (SMALLEST, (f"algorithms={name}",)) for name in ("none", "fast", "accurate", "best")},
    "every algorithm": (EVERY, ()),
    "fast, transformer": ("minilm_sym_int8", ("algorithms=fast",)),
    "int8 matmul and embedding": ("minilm_sym_int8", ("policy.matmul=int8", "policy.embedding=int8")),
    **{f"mode={mode}": ("resnet18_sym_int8", (f"mode={mode}", "report.graph_dump=true")) for mode in MODES},
    "scripted": (SMALLEST, ("mode=torchscript", "mode.method=script")),
    **{
        f"qconfig={name}": (SMALLEST, (f"qconfig={name}",))
        for name in ("sym_int8", "affine_uint8", "sym_uint8", "affine_int8")
    },
    **{
        f"observer={name}": (SMALLEST, (f"observer={name}",))
        for name in ("entropy", "histogram", "minmax", "moving_average", "mse", "percentile")
    },
    **{f"runtime={name}": (SMALLEST, (f"runtime={name}",)) for name in ("native", "torch", "reference")},
}
QUICK_VARIATIONS = ("every algorithm", "mode=torchscript", "mode=imperative", "qconfig=affine_uint8")
MODULES = ("residual", "encoder", "depthwise")
FILES = ("program.json", "weights.safetensors", "plan.json", "calibration.safetensors", "recipe.json")
TEXTS = ("report.html", "report.md", "summary.md", "junit.xml", "graph.txt")
#: A line about a stage that is over.
STAGE_S = re.compile(r"((?:done|failed) +)[\d.]+ s")
#: Fields of results.json that a clock decides.
TIMED = re.compile(r"(.*_)?(seconds|ms|s)|stages|variants|choices|benchmark|latency")
LIMIT_S = 600.0


@dataclass(frozen=True)
class Side:
    """One installation: its interpreter, and the folder of the package (which messages may name)."""

    python: str
    package: Path


@dataclass(frozen=True)
class Case:
    """A name, and what makes its fingerprint in a folder of its own: a flat record, most of it digests."""

    name: str
    fingerprint: Callable[[Runner], dict[str, Any]]
    note: str = ""


class Runner:
    """Runs a side's interpreter in one case's folder."""

    def __init__(self, side: Side, folder: Path) -> None:
        self.side = side
        self.folder = folder
        self.environment = {
            **{name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")},
            "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0", "XDG_CACHE_HOME": str(folder / "cache"), "COLUMNS": "120",
            "NO_COLOR": "1", "TERM": "dumb", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1",
            # Where processes wait for each other's measurements: other cases and other users don't count.
            "TMPDIR": str(folder / "tmp"),
        }  # fmt: skip

    def start(self, *arguments: str, **options: Any) -> subprocess.Popen[str]:
        # -P: the working folder is not searched for modules.
        command = [self.side.python, "-P", *arguments]
        return subprocess.Popen(command, cwd=self.folder, env=self.environment, text=True, **options)

    def python(self, *arguments: str) -> tuple[int, str, str]:
        """(exit code, stdout, stderr)."""
        with self.start(*arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            try:
                out, error = process.communicate(timeout=LIMIT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                raise RuntimeError(f"took more than {LIMIT_S:.0f} s") from None
        return process.returncode, out, error

    def quantflow(self, *arguments: str) -> tuple[int, str, str]:
        return self.python("-m", "quantflow", *arguments)

    def passing(self, *arguments: str) -> str:
        """What a command prints.

        Raises:
            RuntimeError: it did not pass.
        """
        exit_code, out, error = self.quantflow(*arguments)
        if exit_code != 0:
            raise RuntimeError(f"exit code {exit_code}: {self.neutral(error)[-500:]}")
        return out

    def neutral(self, text: str) -> str:
        """Without the places of this case and of this installation."""
        package = self.side.package
        places = ((self.folder, "DIR"), (package, "PACKAGE"), (package.parent, "PACKAGE"))
        for place, word in places:
            text = text.replace(str(place), word)
        return text


# --- fingerprints


def of_artifact(runner: Runner, folder: Path) -> dict[str, Any]:
    """The list of files, and a digest of each that is compared; results.json by section."""
    found: dict[str, Any] = {"files": sorted(path.name for path in folder.iterdir())}
    found |= {name: _sha256((folder / name).read_bytes()) for name in FILES}
    for section, content in _untimed(json.loads((folder / "results.json").read_text())).items():
        found[f"results.{section}"] = _sha256(runner.neutral(json.dumps(content, sort_keys=True)).encode())
    for name in TEXTS:
        if (folder / name).exists():
            found[name] = _sha256(_without_numbers(runner.neutral((folder / name).read_text())).encode())
    return found


def of_cache(runner: Runner) -> dict[str, Any]:
    """Names of what a run has left for later runs, and the first line of each journal, which holds its key."""
    cache = runner.folder / "cache" / "quantflow"
    files = sorted(path for path in cache.rglob("*") if path.is_file())
    found: dict[str, Any] = {"cache": [str(path.relative_to(cache)) for path in files]}
    for path in files:
        if path.suffix == ".jsonl":
            found[f"cache/{path.parent.name} journal"] = path.read_text().splitlines()[0]
    return found


def of_work(folder: Path) -> dict[str, Any]:
    """What a killed run has kept: names, keys and tensors."""
    found: dict[str, Any] = {}
    for path in sorted(folder.iterdir()):
        if path.name.endswith(".partial"):
            continue
        if path.suffix == ".json":
            record = json.loads(path.read_text())
            found[path.name] = {key: record[key] for key in ("format", "key", "tensors")}
        else:
            found[path.name] = _sha256(path.read_bytes())
    return {"work": sorted(found), **found}


def _untimed(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _untimed(inner) for key, inner in value.items() if not TIMED.fullmatch(key)}
    return [_untimed(inner) for inner in value] if isinstance(value, list) else value


def _without_numbers(text: str) -> str:
    """Numbers, units, and the spaces and lines that columns of numbers need, taken out.

    A TorchScript graph's names of classes and comments say where code lies, and do not count.
    """
    text = re.sub(r"#.*/.*:\d+:\d+|__torch__[\w.]*", "", text)
    text = re.sub(r"[-+]?\d[\d.,]*(e[-+]?\d+)?( ?(us|ms|s|min)\b)?", "#", text)
    return re.sub(r"[\s\u2500-\u259f]+", " ", text)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:32]


# --- cases of the command line


def recipe_case(recipe: str, more: Sequence[str] = ()) -> Callable[[Runner], dict[str, Any]]:
    def fingerprint(runner: Runner) -> dict[str, Any]:
        runner.passing(f"recipe={recipe}", *TINY, *RECIPES.get(recipe, ()), *more, *QUIET)
        return of_artifact(runner, runner.folder / "out") | of_cache(runner)

    return fingerprint


#: The benchmark is the run's last product, and takes long enough to be killed in.
LONG = ("benchmark=default", "benchmark.rounds=1000", "benchmark.min_round_ms=1000", "calibrate.checkpoint_every_s=0")


def killed_case(recipe: str, more: Sequence[str]) -> Callable[[Runner], dict[str, Any]]:
    """Killed while it times, when everything before is finished."""

    def fingerprint(runner: Runner) -> dict[str, Any]:
        work = runner.folder / ".out.work"
        arguments = (f"recipe={recipe}", *TINY, *RECIPES.get(recipe, ()), *LONG, *more, *QUIET)
        _kill_when(runner, lambda: (work / "layers.json").exists(), arguments)
        return of_work(work)

    return fingerprint


def killed_search(runner: Runner) -> dict[str, Any]:
    """Killed as soon as its journal has a key and a record; also the keys of the sensitivities it has asked for."""
    journal = runner.folder / ".out.tune.jsonl"
    cache = runner.folder / "cache" / "quantflow" / "sensitivity"

    def is_under_way() -> bool:
        journals = [journal, *cache.glob("*.jsonl")]
        return len(journals) > 1 and all(path.exists() and path.read_bytes().count(b"\n") > 1 for path in journals)

    # A limit that no model keeps: the search has to measure sensitivities.
    limits = ("algorithms=fast", "tune.subject_to.min_sqnr_db=200", "tune.time_budget_s=300")
    _kill_when(runner, is_under_way, (f"recipe={SMALLEST}", *TINY, *limits, *QUIET))
    return {"journal": journal.read_text().splitlines()[0], **of_work(runner.folder / ".out.work"), **of_cache(runner)}


def _kill_when(runner: Runner, is_ready: Callable[[], bool], arguments: Sequence[str]) -> None:
    with (
        (runner.folder / "log").open("w") as log,
        runner.start("-m", "quantflow", *arguments, stdout=log, stderr=log) as process,
    ):
        until = time.monotonic() + LIMIT_S
        while process.poll() is None and not is_ready() and time.monotonic() < until:
            time.sleep(0.002)
        was_running = process.poll() is None
        process.send_signal(signal.SIGKILL)
    if not was_running or not is_ready():
        raise RuntimeError(f"was not there to be killed: {(runner.folder / 'log').read_text()[-500:]}")


def sensitivity_case(runner: Runner) -> dict[str, Any]:
    runner.passing(f"recipe={SMALLEST}", "task=sensitivity", *TINY, "report=quiet", "output=found.json")
    found = json.loads((runner.folder / "found.json").read_text())
    return {"found.json": _sha256(json.dumps(_untimed(found), sort_keys=True).encode()), **of_cache(runner)}


def tasks_case(runner: Runner) -> dict[str, Any]:
    """Tasks that look at artifacts."""
    common = (f"recipe={SMALLEST}", *TINY, "report=quiet")
    runner.passing(*common, "output=one")
    runner.passing(*common, "qconfig=affine_uint8", "output=two")
    found = {}
    for name, arguments in {
        "inspect": ("task=inspect", "artifact=one"),
        "report": ("task=report", "artifact=one"),
        "evaluate": ("task=evaluate", "artifact=one"),
        "compare": ("task=compare", "baseline=one", "candidate=two", "compare=untimed", "output=compared"),
    }.items():
        exit_code, out, error = runner.quantflow(*arguments)
        found[name] = [exit_code, _without_numbers(runner.neutral(out)), _without_numbers(runner.neutral(error))]
    compared = _untimed(json.loads((runner.folder / "compared" / "compare.json").read_text()))
    for part in ("baseline", "candidate"):
        compared.pop(part, None)  # when each was made
    return found | {"compare.json": _sha256(json.dumps(compared, sort_keys=True).encode())}


#: Their exit code, stdout and stderr are compared to the letter, but for what a stage took.
COMMANDS: dict[str, tuple[str, ...]] = {
    "--help": ("--help",),
    "--version": ("--version",),
    "schema": ("task=schema",),
    "--cfg job": (f"recipe={SMALLEST}", "--cfg", "job"),
    "plan, mnist_cnn": (f"recipe={SMALLEST}", "task=plan"),
    "plan, minilm": ("recipe=minilm_sym_int8", "task=plan", "policy.matmul=int8"),
    "nothing": (),
    "no such recipe": ("recipe=no_such",),
    "no such task": (f"recipe={SMALLEST}", "task=bench"),
    "no such field": (f"recipe={SMALLEST}", "data.calibratoin=4"),
    "no such group": (f"recipe={SMALLEST}", "qconfig=int4"),
    "illegal value": (f"recipe={SMALLEST}", "data.calibration=-1", "qconfig.activation.dtype=int4"),
    "illegal together": (f"recipe={SMALLEST}", "mode=imperative", "policy.embedding=int8"),
    "no artifact": ("task=inspect", "artifact=nowhere"),
    "artifact missing": ("task=report",),
    "no such layer": (f"recipe={SMALLEST}", *TINY, "+layers={no_such_layer:float}"),
    "nothing left in int8": (f"recipe={SMALLEST}", *TINY, "+layers={conv2d:float,linear:float}"),
    "no such device": (f"recipe={SMALLEST}", *TINY, "device=xpu"),
    "no such folder": (f"recipe={SMALLEST}", "data=folder", "data.path=nowhere"),
    "no such module": ("model=entry", "model.entry=no_such_module:net", "data=random", "data.shape=[[3,8,8]]"),
    "no such weights": ("recipe=resnet18_sym_int8", "model.weights=nowhere.safetensors", *TINY),
    "a gate failed": (f"recipe={SMALLEST}", *TINY, "gates.min_sqnr_db=200", "report=quiet"),
}
QUICK_COMMANDS = ("--help", "schema", "plan, mnist_cnn", "no such recipe", "no such layer", "a gate failed")


def command_case(arguments: Sequence[str]) -> Callable[[Runner], dict[str, Any]]:
    def fingerprint(runner: Runner) -> dict[str, Any]:
        exit_code, out, error = runner.quantflow(*arguments)
        return {
            "exit code": exit_code,
            "stdout": STAGE_S.sub(r"\1", runner.neutral(out)),
            "stderr": runner.neutral(error),
        }

    return fingerprint


# --- cases in Python: this file under the side's interpreter, with `--part`


def python_case(*part: str) -> Callable[[Runner], dict[str, Any]]:
    def fingerprint(runner: Runner) -> dict[str, Any]:
        exit_code, _, error = runner.python("-W", "ignore", str(Path(__file__).resolve()), "--part", *part)
        if exit_code != 0:
            raise RuntimeError(f"exit code {exit_code}: {runner.neutral(error)[-500:]}")
        found = json.loads(runner.neutral((runner.folder / "part.json").read_text()))
        for name in [name for name in found if found[name] == "artifact"]:
            found |= {f"{name}: {k}": v for k, v in of_artifact(runner, runner.folder / found.pop(name + "@")).items()}
            del found[name]
        return found

    return fingerprint


def names_part() -> dict[str, Any]:
    """Public names, their parameters and members, operators and entry points."""
    import inspect
    from importlib import metadata
    from types import ModuleType

    import torch

    import quantflow as qf

    found: dict[str, Any] = {
        "__all__": list(qf.__all__),
        "dir": [n for n in dir(qf) if not n.startswith("_") and not isinstance(getattr(qf, n), ModuleType)],
        "operators": sorted(n for n in torch._C._dispatch_get_all_op_names() if n.startswith("quantflow::")),
        "entry points": sorted((each.group, each.name) for each in metadata.distribution("quantflow").entry_points),
        "presets": {name: preset.model_dump(mode="json") for name, preset in qf.PRESETS.items()},
    }
    for name in qf.__all__:
        public = getattr(qf, name)
        if inspect.isclass(public):
            found[name] = [n for n in dir(public) if not n.startswith("_")]
        if inspect.isfunction(public):
            found[name] = [f"{p.name}: {p.annotation} {p.kind}" for p in inspect.signature(public).parameters.values()]
            # Where a module lies is not what a docstring promises.
            found[f"{name}.__doc__"] = re.sub(r"\s*quantflow\.[\w.]+", "", " ".join((public.__doc__ or "").split()))
    return found


def keys_part() -> dict[str, Any]:
    """The keys that a run is taken up by, and the recipe itself."""
    import quantflow as qf

    found: dict[str, Any] = {}
    settings = {
        "": (),
        " seed": ("seed=7",),
        " qconfig": ("qconfig=affine_uint8", "qconfig.weight.granularity=per_tensor"),
        " algorithms": ("algorithms=fast", "mode=torchscript", "output=elsewhere", "report.quiet=true"),
        " layers": ("+layers={conv1:float}", "policy.matmul=int8", "data.calibration=5"),
    }
    for name in RECIPES:
        for what, overrides in settings.items():
            recipe = qf.load_recipe(name, list(overrides))
            found[f"{name}{what}"] = [recipe.calibration_key(), recipe.work_key(), recipe.hash()]
    return found


def module_part(kind: str, mode: str) -> dict[str, Any]:
    """`quantize` with several settings of one module in one mode; an error's message where it is refused."""
    import torch

    import quantflow as qf

    torch.set_num_threads(1)
    uint8_per_tensor = {
        "activation": {"qscheme": "affine", "dtype": "uint8", "observer": "histogram"},
        "weight": {"granularity": "per_tensor"},
    }
    settings: dict[str, dict[str, Any]] = {
        "sym_int8": {"qconfig": "sym_int8"},
        "affine_uint8": {"qconfig": "affine_uint8", "algorithms": "fast"},
        "sym_uint8, accurate": {"qconfig": "sym_uint8", "algorithms": "accurate"},
        "affine_int8, torch": {"qconfig": "affine_int8", "runtime": "torch"},
        "histogram, reference": {"qconfig": uint8_per_tensor, "runtime": "reference"},
        "layers": {"layers": LAYERS[kind], "runtime": "torch" if mode == "imperative" else "native"},
        "policy float": {"policy": {"add": "float", "mul": "float", "cat": "float"}},
        "policy int8": {"policy": {"matmul": "int8"}, "gates": {"min_sqnr_db": 5}, "seed": 3},
        "no such layer": {"layers": {"no_such_layer": "float"}},
    }
    found: dict[str, Any] = {}
    generator = torch.Generator().manual_seed(1)
    shape = (12, 32) if kind == "encoder" else (3, 16, 16)
    x, y = (torch.randn(count, *shape, generator=generator) for count in (16, 5))
    for number, (name, options) in enumerate(settings.items()):
        torch.manual_seed(0)
        module = own_module(kind).eval()
        try:
            model = qf.quantize(module, list(x.split(8)), evaluation=[y], mode=mode, **options)
        except qf.QuantflowError as error:
            found[f"{name}: refused"] = f"{type(error).__name__} {error.exit_code}: {error}"
            continue
        model.save(f"model{number}")
        again = qf.load(f"model{number}") if mode != "imperative" else model
        with torch.inference_mode():
            outputs = [each(part) for each in (model, again) for part in (y, y[:1])]
        found[name], found[f"{name}@"] = "artifact", f"model{number}"
        found[f"{name}: outputs"] = [_sha256(output.contiguous().numpy().tobytes()) for output in outputs]
        found[f"{name}: types"] = [type(model).__name__, type(again).__name__]
    if mode == "export":
        ranked = qf.sensitivity(own_module(kind).eval(), list(x.split(8)), samples=4)
        found["sensitivity"] = [each["layer"] for each in ranked["layers"]]
    return found


LAYERS: dict[str, dict[str, Any]] = {
    "residual": {"stem.*": "float", "head": {"weight": {"granularity": "per_tensor"}}, "add": "float"},
    "encoder": {"matmul": "int8", "second": "float", "out": {"activation": {"qscheme": "affine", "dtype": "uint8"}}},
    "depthwise": {"squeeze": "float", "excite": "float", "depthwise": {"activation": {"observer": "mse"}}},
}


def own_module(kind: str) -> Any:
    """A small module, its weights from torch's generator, its BatchNorms with statistics of their own."""
    import torch
    from torch import nn
    from torch.nn import functional as F

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
            self.first = nn.Conv2d(16, 16, 3, padding=1, bias=False)
            self.bn = nn.BatchNorm2d(16)
            self.side = nn.Conv2d(16, 8, 1)
            self.pool = nn.MaxPool2d(2)
            self.head = nn.Linear(24, 10)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.stem(x)
            x = F.relu(self.bn(self.first(x)) + x)
            x = torch.cat([x, F.relu(self.side(x))], 1)
            return self.head(self.pool(x).mean((2, 3)))

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.last = nn.LayerNorm(32), nn.LayerNorm(32)
            self.query, self.key, self.value, self.out = (nn.Linear(32, 32) for _ in range(4))
            self.first, self.second = nn.Linear(32, 64), nn.Linear(64, 32)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.norm(x)
            q, k, v = (
                each(y).reshape(y.shape[0], y.shape[1], 4, 8).transpose(1, 2)
                for each in (self.query, self.key, self.value)
            )
            weights = torch.softmax(torch.matmul(q, k.transpose(2, 3)) / 8**0.5, -1)
            x = x + self.out(torch.matmul(weights, v).transpose(1, 2).reshape(y.shape))
            return self.last(x + self.second(F.gelu(self.first(x))))

    class Depthwise(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 16, 3, stride=2, padding=1)
            self.depthwise = nn.Conv2d(16, 16, 5, padding=2, groups=16, bias=False)
            self.bn = nn.BatchNorm2d(16)
            self.grouped = nn.Conv2d(16, 32, 3, padding=1, groups=4)
            self.pool = nn.AdaptiveAvgPool2d(1)
            self.squeeze, self.excite = nn.Conv2d(32, 8, 1), nn.Conv2d(8, 32, 1)
            self.head = nn.Linear(32, 10)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = F.hardswish(self.stem(x))
            x = F.relu6(self.bn(self.depthwise(x)))
            x = F.hardswish(self.grouped(x))
            x = x * F.hardsigmoid(self.excite(F.relu(self.squeeze(self.pool(x)))))
            return self.head(torch.flatten(self.pool(x), 1))

    module = {"residual": Residual, "encoder": Encoder, "depthwise": Depthwise}[kind]()
    for each in module.modules():
        if isinstance(each, nn.BatchNorm2d):
            each.running_mean.normal_()
            each.running_var.uniform_(0.5, 2)
    return module


PARTS: dict[str, Callable[..., dict[str, Any]]] = {"names": names_part, "keys": keys_part, "module": module_part}


# --- all cases, one side


def cases(options: argparse.Namespace) -> Iterator[Case]:
    """What was asked for, the longest first so that no job waits for one at the end."""
    quick, modes = options.quick, options.modes
    recipes = options.recipes or (QUICK_RECIPES if quick else RECIPES)
    for name in sorted(recipes, key=lambda name: not name.startswith(("vit", "resnet50"))):
        note = "without its search" if NO_SEARCH in RECIPES[name] else ""
        yield Case(f"recipe {name}", recipe_case(name), note)
    for name, (recipe, more) in VARIATIONS.items():
        mode = name.removeprefix("mode=")
        if quick and name not in QUICK_VARIATIONS:
            continue
        if (not options.recipes or recipe in options.recipes) and (mode not in MODES or mode in modes):
            yield Case(f"{name}, {recipe}", recipe_case(recipe, more))
    for kind in MODULES[:1] if quick else MODULES:
        for mode in modes:
            yield Case(f"module {kind}, {mode}", python_case("module", kind, mode))
    yield Case("killed, every algorithm", killed_case(EVERY, ()))
    yield Case("killed search", killed_search, "only keys")
    if not quick:
        yield Case("killed, imperative", killed_case("resnet18_sym_int8", ("mode=imperative", "algorithms=fast")))
        yield Case("killed, torchscript", killed_case(SMALLEST, ("mode=torchscript", "observer=histogram")))
        yield Case("killed, transformer", killed_case("minilm_sym_int8", ("algorithms=fast",)))
        yield Case("tasks of artifacts", tasks_case)
    yield Case("sensitivity", sensitivity_case)
    yield Case("keys", python_case("keys"))
    yield Case("names", python_case("names"))
    for name, arguments in COMMANDS.items():
        if name in QUICK_COMMANDS or not quick:
            yield Case(f"command {name}", command_case(arguments))


def fingerprints(
    python: str, wanted: Sequence[Case], jobs: int, keep: Path | None, say: Callable[[str], None]
) -> dict[str, Any]:
    """One side: case → fingerprint, {"failed": why} for a case that could not be made."""
    found = subprocess.run(
        [python, "-P", "-c", "import quantflow; print(quantflow.__file__)"],
        cwd=tempfile.gettempdir(), env={**os.environ, "PYTHONPATH": ""}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if found.returncode != 0:
        raise SystemExit(f"{python} has no quantflow: {found.stderr.strip()[-500:]}")
    side = Side(python, Path(found.stdout.strip()).parent)
    say(f"{python}: {side.package}")
    began, done = time.monotonic(), 0
    trained: list[Path] = []

    with tempfile.TemporaryDirectory(prefix="same_programs.") as temporary:
        root = (keep or Path(temporary)).resolve()

        def make(case: Case) -> dict[str, Any]:
            nonlocal done
            folder = root / re.sub(r"\W+", "_", case.name)
            shutil.rmtree(folder, ignore_errors=True)
            cache = folder / "cache" / "quantflow"
            cache.mkdir(parents=True)
            (folder / "tmp").mkdir()
            (folder / EVERY).write_text(EVERY_TEXT)
            for file in trained:
                shutil.copy(file, cache)
            start = time.monotonic()
            try:
                made = case.fingerprint(Runner(side, folder))
            except (RuntimeError, OSError, ValueError, LookupError) as error:
                made = {"failed": f"{type(error).__name__}: {error}"}
            done += 1
            failed = f" failed: {made['failed']}" if "failed" in made else ""
            say(f"{done} of {len(wanted)}: {case.name}, {time.monotonic() - start:.1f} s{failed}")
            return made

        # MNIST's small network is trained once per side; the other cases find its weights in their caches.
        first = [case for case in wanted if case.name == f"recipe {SMALLEST}"]
        made = {case.name: make(case) for case in first}
        trained += (root / f"recipe_{SMALLEST}" / "cache" / "quantflow").glob("*.safetensors")
        with ThreadPoolExecutor(jobs) as pool:
            rest = [case for case in wanted if case.name not in made]
            made |= zip((case.name for case in rest), pool.map(make, rest), strict=True)
    say(f"{len(made)} cases, {time.monotonic() - began:.0f} s")
    return {"python": python, "seconds": time.monotonic() - began, "cases": made}


# --- two sides


def difference(one: Mapping[str, Any] | None, other: Mapping[str, Any] | None) -> str:
    """ "" where equal; else what differs, with the first differing line where there is text."""
    if one is None or other is None:
        return f"only in {'the second' if one is None else 'the first'}"
    if "failed" in one or "failed" in other:
        return f"failed: {one.get('failed', 'not here')} | {other.get('failed', 'not here')}"
    parts = [f"{key}{_where(one.get(key), other.get(key))}" for key in one | other if one.get(key) != other.get(key)]
    return "differ: " + ", ".join(parts) if parts else ""


def _where(one: Any, other: Any) -> str:
    if isinstance(one, str) and isinstance(other, str) and not re.fullmatch("[0-9a-f]{32}", one):
        one, other = one.splitlines(), other.splitlines()
    if isinstance(one, list) and isinstance(other, list):
        here, there = next(
            ((a, b) for a, b in zip(one, other, strict=False) if a != b), (f"{len(one)} rows", f"{len(other)} rows")
        )
        return f" ({str(here)[:200]!r} | {str(there)[:200]!r})"
    return ""


def main() -> int:
    from bench.reporting import arguments, console, show, show_machine, write

    parser = arguments(__doc__)
    parser.add_argument("--other-python", default=sys.executable, metavar="PY", help="the other side's interpreter")
    parser.add_argument("--write", type=Path, metavar="FILE", help="make one side's fingerprints and stop")
    parser.add_argument("--compare", type=Path, nargs=2, metavar="FILE", help="two files that --write wrote")
    parser.add_argument("--quick", action="store_true", help="the most telling cases")
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, metavar="NAME", help="these alone")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES, help="of the modes, these alone")
    parser.add_argument("--only", nargs="+", metavar="GLOB", help="cases whose name fits, as in 'module *'")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes at a time, of one thread each")
    parser.add_argument(
        "--keep", type=Path, metavar="DIR", help="keep what the sides write, in DIR/first and DIR/second"
    )
    options = parser.parse_args()
    if options.smoke:
        options.quick, options.only = True, [f"recipe {SMALLEST}", "module residual, export", "keys", "names"]
    chosen = cases(options)
    wanted = [c for c in chosen if options.only is None or any(fnmatch.fnmatch(c.name, g) for g in options.only)]
    notes = {case.name: case.note for case in wanted}
    found = show_machine()

    def side(python: str, name: str) -> dict[str, Any]:
        keep = options.keep and options.keep / name
        return fingerprints(python, wanted, options.jobs, keep, lambda text: console.print(text, markup=False))

    if options.compare:
        one, other = (json.loads(path.read_text()) for path in options.compare)
    else:
        one = side(sys.executable, "first")
        if options.write:
            write(options.write, one)
            failed = [name for name, made in one["cases"].items() if "failed" in made]
            console.print(f"written to {options.write}; failed: {', '.join(failed) or 'none'}", markup=False)
            return 1 if failed else 0
        other = side(options.other_python, "second")

    names = list(one["cases"] | other["cases"])
    rows = [
        {
            "case": name,
            "result": difference(one["cases"].get(name), other["cases"].get(name)) or "same",
            "note": notes.get(name) or None,
        }
        for name in names
    ]
    show("two installations", rows, ("case", "result", "note"))
    differing = sum(row["result"] != "same" for row in rows)
    console.print(f"{len(rows) - differing} of {len(rows)} cases are the same")
    write(options.json, {"question": "same_programs", "machine": found, "rows": rows, "sides": [one, other]})
    return 1 if differing else 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--part"]:
        Path("part.json").write_text(json.dumps(PARTS[sys.argv[2]](*sys.argv[3:])))
    else:
        sys.exit(main())
