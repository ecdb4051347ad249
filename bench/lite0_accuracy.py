"""How much accuracy does EfficientNet-Lite0 (real ImageNet weights, all layers int8) keep, beside ONNX Runtime?

Random crops of natural photos: 96 of four photos to calibrate, 400 of five others to evaluate. Everybody gets the same
tensors and is compared with the float model's own outputs; nothing is trained. Per-channel weights, minmax observers.
`seconds` is all of `quantize`, warm-up and verification included.

ONNX Runtime runs with `--peer` where `onnxruntime` and `onnx` can be imported, or in another interpreter that has them
(and torch) with `--peer-python PATH`.

    python -m bench.lite0_accuracy --peer-python PATH/bin/python --json lite0_accuracy.json
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.accuracy import variants
from bench.photo_models import float_module, photos
from bench.reporting import arguments, console, show, show_machine, write
from quantflow.numerics.measures import sqnr_db, top1_agreement
from quantflow.sources.models.efficientnet_lite0 import load_efficientnet_lite0

PEER = Path(__file__).with_name("peer_onnxruntime.py")
COLUMNS = ("what", "sqnr_db", "top1_agreement", "top5_overlap", "kl", "max_error", "int8/core", "seconds")
#: #2 asks for an SQNR that is at most this far below ONNX Runtime's.
MARGIN_DB = 0.5


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--qconfig", nargs="+", default=["affine_uint8", "sym_int8"], help="presets' names")
    parser.add_argument("--observer", nargs="+", default=["minmax"], help="activation observers, each with each preset")
    parser.add_argument("--algorithms", nargs="+", default=["none"], help="presets' names, each with each of these")
    parser.add_argument("--mode", default="export", choices=("export", "torchscript", "imperative"))
    parser.add_argument("--calibration", type=int, default=96, help="samples")
    parser.add_argument("--evaluation", type=int, default=400, help="samples")
    parser.add_argument("--peer", action="store_true", help="also quantize with ONNX Runtime, in this interpreter")
    parser.add_argument("--peer-python", metavar="PATH", help="the same, in that interpreter")
    options = parser.parse_args()
    if options.peer and not (find_spec("onnx") and find_spec("onnxruntime")):
        parser.error("--peer: onnx and onnxruntime are not installed here; install them, or use --peer-python PATH")
    if options.smoke:
        options.calibration, options.evaluation = 4, 8
    found = show_machine()
    loaded = load_efficientnet_lite0("pretrained", seed=0)
    module = float_module(loaded)
    data = photos(loaded, calibration=options.calibration, evaluation=options.evaluation)
    evaluation = [batch.args[0] for batch in data.evaluation]
    with torch.inference_mode():
        real = torch.cat([module(x) for x in evaluation])

    rows: list[dict[str, Any]] = []
    for preset, observer, algorithms, model, seconds in variants(module, data, options):
        with torch.inference_mode():
            row = _compare(real, torch.cat([model(x) for x in evaluation]))
        proof = model.results["int8_proof"]
        layers = f"{proof['int8_layers_run']}/{proof['core_layers']}"
        what = f"quantflow {preset} {observer}{'' if algorithms == 'none' else f' {algorithms}'}"
        rows.append({"what": what} | row | {"int8/core": layers, "seconds": seconds})
        rows[-1]["algorithms"] = model.results["algorithms"]
        console.print(f"{what}: {row['sqnr_db']:.2f} dB")
    if options.peer or options.peer_python:
        calibration = torch.cat([batch.args[0] for batch in data.calibration])
        outputs = _peer(options.peer_python or sys.executable, module, calibration, torch.cat(evaluation))
        rows += [{"what": name} | _compare(real, y) for name, y in outputs.items()]
    show(f"EfficientNet-Lite0, {options.calibration} + {options.evaluation} crops, mode={options.mode}", rows, COLUMNS)
    holds = _verdict(rows)
    write(
        options.json,
        {
            "question": "lite0_accuracy",
            "weights": loaded.weights_used,
            "data": data.identity,
            "mode": options.mode,
            "machine": found,
            "results": rows,
        },
    )
    return 0 if holds else 1


def _compare(real: torch.Tensor, found: torch.Tensor) -> dict[str, Any]:
    """Both logits of shape (samples, classes). KL is the mean over samples of sum p log(p / p'), in nats."""
    log_p, log_q = real.log_softmax(1), found.log_softmax(1)
    first, second = real.topk(5, 1).indices, found.topk(5, 1).indices
    shared = (first.unsqueeze(2) == second.unsqueeze(1)).any(2)
    return {
        "sqnr_db": sqnr_db(real, found),
        "top1_agreement": top1_agreement(real, found),
        "top5_overlap": shared.float().mean().item(),
        "kl": (log_p.exp() * (log_p - log_q)).sum(1).mean().item(),
        "max_error": (real - found).abs().max().item(),
    }


def _peer(
    python: str, module: torch.nn.Module, calibration: torch.Tensor, evaluation: torch.Tensor
) -> dict[str, torch.Tensor]:
    """ONNX Runtime's outputs by method, from the same model and tensors."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with torch.no_grad():
            torch.jit.trace(module, calibration[:2]).save(str(folder / "model.pt"))  # type: ignore[no-untyped-call]
        np.savez(folder / "data.npz", calibration=calibration.numpy(), evaluation=evaluation.numpy())
        subprocess.run([python, str(PEER), str(folder)], check=True)
        with np.load(folder / "outputs.npz") as outputs:
            return {method: torch.from_numpy(outputs[method]) for method in outputs.files}


def _verdict(rows: list[dict[str, Any]]) -> bool:
    ours = next((r for r in rows if r["what"] == "quantflow affine_uint8 minmax"), None)
    theirs = next((r for r in rows if r["what"].startswith("ONNX Runtime") and r["what"].endswith("MinMax")), None)
    if ours is None or theirs is None:
        return True
    difference = ours["sqnr_db"] - theirs["sqnr_db"]
    console.print(f"affine uint8 minmax minus ONNX Runtime MinMax: {difference:+.2f} dB (at least {-MARGIN_DB:g})")
    return bool(difference >= -MARGIN_DB)


if __name__ == "__main__":
    sys.exit(main())
