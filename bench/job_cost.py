"""What does `quantize` cost with all that it reports, beside OpenVINO's conversion, NNCF's quantize and compilation?

Random weights; the same samples for both, 8 images of 224 x 224 or 8 texts of 128 tokens. Ours is all of
`quantflow.quantize`: capture, calibration, the program, its verification against the reference, the comparison with
float and the error of every layer. Both sides have imported what they need, and take turns in processes of their own;
medians over the rounds. `cpu s`, all threads' processor time, depends less on what else the machine does. `figures` is
a digest of the program: two installations that print the same made the same model.

`--recipe` runs the ResNet-50 recipe as a user does, too, in a process of its own, beside NNCF's work on its 64
calibration photos: all of it, and the stages without loading the model, evaluation and benchmark, which the peer
is not asked for.

    OMP_NUM_THREADS=2 python -m bench.job_cost --peer-python PATH/bin/python --recipe --json job_cost.json
"""

from __future__ import annotations

import hashlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import quantflow
from bench import nncf_process
from bench.photo_models import model_on_photos
from bench.reporting import arguments, console, show, show_machine, write
from quantflow.sources.models.torchvision_zoo import import_torchvision
from quantflow.stages.record import weights_bytes

COLUMNS = ("model", "ours, s", "NNCF, s", "time ratio", "ours, cpu s", "NNCF, cpu s", "cpu ratio", "stages", "figures")
RECIPE, RECIPE_PHOTOS = "resnet50_sym_int8", 64
RECIPE_COLUMNS = ("recipe", "whole, s", "its stages, s", "NNCF, s", "whole ratio", "stages ratio", "stages")
#: Stages of a run that `convert_model`, `nncf.quantize` and `compile_model` have nothing of.
NOT_ASKED_FOR = ("load", "evaluate", "benchmark")
SAMPLES, TOKENS = 8, 128
#: What all of `quantize` may take of the other's time.
MOST = 0.6


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--models", nargs="+", default=["densenet121", "resnet50", "bert_base"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--recipe", action="store_true", help=f"also all of recipe={RECIPE}")
    parser.add_argument("--peer-python", metavar="PATH", help="an interpreter with nncf, openvino and torch")
    options = parser.parse_args()
    if options.smoke:
        options.rounds, options.models = 1, ["mobilenet_v2"]
    found = show_machine()
    quantflow.quantize(nn.Linear(4, 4), [torch.randn(8, 4)])
    rows = [_row(name, options.rounds, options.peer_python) for name in options.models]
    show(f"median of {options.rounds} rounds, {torch.get_num_threads()} threads", rows, COLUMNS)
    slow = [row["model"] for row in rows if (row["cpu ratio"] or 0) > MOST]
    console.print(f"above {MOST} of NNCF's processor time: {', '.join(slow)}" if slow else "all within the limits")
    recipe = [_recipe(options.rounds, options.peer_python)] if options.recipe else []
    if recipe:
        show(f"the recipe, median of {options.rounds} rounds", recipe, RECIPE_COLUMNS)
    write(options.json, {"question": "job_cost", "machine": found, "results": rows, "recipe": recipe})
    return 1 if slow and not options.smoke else 0


def _recipe(rounds: int, peer_python: str | None) -> dict[str, Any]:
    module, data, _ = model_on_photos("resnet50", 224, calibration=RECIPE_PHOTOS, evaluation=1)
    photos = torch.cat([batch.args[0] for batch in data.calibration])
    ours, theirs = _in_turns(module, [photos], _timed_recipe, rounds, peer_python)
    row: dict[str, Any] = {
        "recipe": RECIPE,
        "whole, s": _median(ours, lambda each: each["seconds"]),
        "its stages, s": _median(ours, _asked_for),
        "NNCF, s": None,
        "whole ratio": None,
        "stages ratio": None,
        "stages": _stages(ours[-1]),
        "rounds": {"ours": ours, "NNCF": theirs},
    }
    if theirs:
        pairs = list(zip(ours, theirs, strict=True))
        row["NNCF, s"] = _median(theirs, _seconds)
        row["whole ratio"] = _median(pairs, lambda pair: pair[0]["seconds"] / _seconds(pair[1]))
        row["stages ratio"] = _median(pairs, lambda pair: _asked_for(pair[0]) / _seconds(pair[1]))
    return row


def _asked_for(run: dict[str, Any]) -> float:
    return sum(seconds for stage, seconds in run["stages"].items() if stage not in NOT_ASKED_FOR)


def _stages(run: dict[str, Any]) -> str:
    return ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in run["stages"].items() if seconds >= 0.1)


def _timed_recipe() -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "run"
        command = [sys.executable, "-m", "quantflow", f"recipe={RECIPE}", f"output={output}"]
        started = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        seconds = time.perf_counter() - started
        results = json.loads((output / "results.json").read_text())
    return {"seconds": seconds, "stages": {stage["name"]: stage["seconds"] for stage in results["stages"]}}


def _in_turns(
    module: nn.Module,
    inputs: list[torch.Tensor],
    ours: Callable[[], dict[str, Any]],
    rounds: int,
    peer_python: str | None,
) -> tuple[list[dict[str, Any]], list[dict[str, float]]]:
    """(what `ours` gave, what NNCF took on the module and its inputs), round after round."""
    found: list[dict[str, Any]] = []
    theirs: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        peer = (
            nncf_process.started(peer_python, Path(folder), module, inputs, is_text=len(inputs) > 1)
            if peer_python
            else None
        )
        for _ in range(rounds):
            if peer is not None:
                theirs.append(nncf_process.asked(peer))
            found.append(ours())
        if peer is not None:
            peer.communicate()
    return found, theirs


def _row(name: str, rounds: int, peer_python: str | None) -> dict[str, Any]:
    module, inputs = _task(name)
    ours, theirs = _in_turns(module, inputs, lambda: _timed(module, inputs), rounds, peer_python)
    row: dict[str, Any] = {
        "model": name,
        "ours, s": _median(ours, lambda each: each["seconds"]),
        "ours, cpu s": _median(ours, lambda each: each["cpu_s"]),
        "NNCF, s": None,
        "NNCF, cpu s": None,
        "time ratio": None,
        "cpu ratio": None,
        "stages": _stages(ours[-1]),
        "figures": ours[-1]["figures"],
        "rounds": {"ours": ours, "NNCF": theirs},
    }
    if theirs:
        pairs = list(zip(ours, theirs, strict=True))
        row["NNCF, s"] = _median(theirs, _seconds)
        row["NNCF, cpu s"] = _median(theirs, lambda each: each["all_cpu_s"])
        row["time ratio"] = _median(pairs, lambda pair: pair[0]["seconds"] / _seconds(pair[1]))
        row["cpu ratio"] = _median(pairs, lambda pair: pair[0]["cpu_s"] / pair[1]["all_cpu_s"])
    return row


def _median(rows: list[Any], of: Callable[[Any], float]) -> float:
    return statistics.median(map(of, rows))


def _seconds(answer: dict[str, float]) -> float:
    return answer["convert_s"] + answer["quantize_s"] + answer["compile_s"]


def _task(name: str) -> tuple[nn.Module, list[torch.Tensor]]:
    """The model and its inputs, each (8, ...)."""
    torch.manual_seed(0)
    import_torchvision()
    if name == "bert_base":
        from transformers import BertConfig, BertModel

        module = BertModel(BertConfig(attn_implementation="eager"), add_pooling_layer=False)
        return _Texts(module).eval(), [
            torch.randint(1000, 30000, (SAMPLES, TOKENS)),
            torch.ones(SAMPLES, TOKENS).long(),
        ]
    import torchvision

    return getattr(torchvision.models, name)(weights=None).eval(), [torch.randn(SAMPLES, 3, 224, 224)]


class _Texts(nn.Module):
    """Tensors alone come out: both sides take the same module."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        return self.module(input_ids=input_ids, attention_mask=attention_mask, return_dict=False)[0]


def _timed(module: nn.Module, inputs: list[torch.Tensor]) -> dict[str, Any]:
    started, cpu = time.perf_counter(), time.process_time()
    model = quantflow.quantize(module, [tuple(inputs)])
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    program = model.record.program
    made = hashlib.sha256(json.dumps(program.to_json(), sort_keys=True).encode() + weights_bytes(program)).hexdigest()
    stages = {stage["name"]: stage["seconds"] for stage in model.results["stages"]}
    return {"seconds": seconds, "cpu_s": cpu, "stages": stages, "figures": made[:12]}


if __name__ == "__main__":
    sys.exit(main())
