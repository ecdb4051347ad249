"""What does each accuracy algorithm give, alone and together, on a convolutional net and on a transformer?

EfficientNet-Lite0 (random crops of photos) and all-MiniLM-L6-v2 (Lee documents), real weights, affine uint8 unless
--qconfig says otherwise, every convolution and linear int8: SQNR of the model's output against float's, top-1 agreement
(Lite0) or the smallest cosine (MiniLM), the seconds that the algorithms took, and how many layers' changes the guard
rolled back. Then the same for the presets.

    python -m bench.ablation --json ablation.json
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, get_args

import torch

import quantflow
from bench.photo_models import float_module, photos
from bench.reporting import arguments, console, show, show_machine, write
from quantflow.schema import ALGORITHM_PRESETS, Algorithm
from quantflow.search.workbench import Yardstick
from quantflow.sources.data import Data, TextPreprocess
from quantflow.sources.data.text import load_lee
from quantflow.sources.models.efficientnet_lite0 import load_efficientnet_lite0
from quantflow.sources.models.transformers_zoo import load_minilm
from quantflow.stages.evaluate import EMBEDDING

COLUMNS = (
    "algorithms",
    "sqnr_db",
    "gain_db",
    "agreement",
    "cosine_min",
    "algorithms_s",
    "layers changed",
    "rolled back",
)
#: Combinations beside each algorithm alone and those that are presets.
TOGETHER = (
    ("equalize", "bias_correction"),
    ("equalize", "gptq"),
    ("activation_scale", "gptq"),
    ("gptq", "bias_correction"),
    ("gptq", "adaround"),
)


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--model", nargs="+", default=["lite0", "minilm"], choices=("lite0", "minilm"))
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these algorithms and presets alone")
    parser.add_argument("--qconfig", default="affine_uint8", help="a preset's name")
    options = parser.parse_args()
    found = show_machine()
    results: dict[str, list[dict[str, Any]]] = {}
    for name in options.model:
        module, data, outputs = MODELS[name](options.smoke)
        yardstick = Yardstick(module, list(data.evaluation), outputs=outputs)
        rows = results[name] = []
        for label, algorithms in _questions(options.smoke, options.only):
            rows.append({"algorithms": label} | _row(module, data, options.qconfig, yardstick, algorithms))
            rows[-1]["gain_db"] = rows[-1]["sqnr_db"] - rows[0]["sqnr_db"]
            console.print(f"{name} {label}: {rows[-1]['sqnr_db']:.2f} dB")
        samples = [sum(batch.size for batch in part) for part in (data.calibration, data.evaluation)]
        show(f"{name}, {options.qconfig}, {samples[0]} samples to calibrate, {samples[1]} to evaluate", rows, COLUMNS)
    write(options.json, {"question": "ablation", "machine": found, "results": results})
    return 0


def _questions(smoke: bool, only: Sequence[str] | None) -> list[tuple[str, Any]]:
    """(label, what `algorithms` is set to); nothing comes first, because gains are counted from it."""
    alone = [settings.model_fields["name"].default for settings in get_args(get_args(Algorithm)[0])]
    full = [{"name": "bias_correction", "method": "full"}]
    questions: list[tuple[str, Any]] = [("none", "none")]
    questions += [(name, [name]) for name in alone]
    questions += [("bias_correction full", full)]
    questions += [(" + ".join(names), list(names)) for names in TOGETHER]
    questions += [(f"preset {name}", name) for name in ALGORITHM_PRESETS if name != "none"]
    if smoke:
        return [question for question in questions if question[0] in ("none", "clip_weights", "preset fast")]
    wanted = {"none", *(only or ())}
    return [q for q in questions if only is None or q[0] in wanted or q[0].removeprefix("preset ") in wanted]


def _row(module: torch.nn.Module, data: Data, qconfig: str, yardstick: Yardstick, algorithms: Any) -> dict[str, Any]:
    model = quantflow.quantize(
        module, data.calibration, evaluation=list(data.calibration)[:1], qconfig=qconfig, algorithms=algorithms
    )
    figures = yardstick.errors(model)
    section = model.results["algorithms"]
    row = {
        "sqnr_db": figures["sqnr_db"],
        "algorithms_s": sum(entry["seconds"] for entry in section),
        "layers changed": sum(len(entry["layers"]) for entry in section),
        "rolled back": sum("rolled back" in each["reason"] for entry in section for each in entry["skipped"]),
        "effects": [entry["model"] for entry in section],
        "notices": model.results["notices"],
    }
    return row | {key: figures[key] for key in ("agreement", "cosine_min") if key in figures}


def _lite0(smoke: bool) -> tuple[torch.nn.Module, Data, str]:
    loaded = load_efficientnet_lite0("pretrained", seed=0)
    calibration, evaluation = (4, 8) if smoke else (96, 400)
    data = photos(loaded, calibration=calibration, evaluation=evaluation)
    return float_module(loaded), data, loaded.outputs


def _minilm(smoke: bool) -> tuple[torch.nn.Module, Data, str]:
    length = 16 if smoke else 128
    loaded = load_minilm("pretrained", length, seed=0)
    assert isinstance(loaded.preprocess, TextPreprocess)
    data = load_lee(loaded.preprocess, length, *((4, 6) if smoke else (64, 50)), 16, 0)
    return float_module(loaded), data, EMBEDDING


MODELS: dict[str, Callable[[bool], tuple[torch.nn.Module, Data, str]]] = {"lite0": _lite0, "minilm": _minilm}


if __name__ == "__main__":
    sys.exit(main())
