"""How fast is imperative mode, beside float eager, torch.ao's eager mode where it runs, and export mode?

    OMP_NUM_THREADS=2 python -m bench.imperative_speed --models resnet50 mobilenet_v2 bert_base vit_b_16

All are timed in turns within each round; the figures are medians of the ratios in a round. Weights are random: times do
not depend on them.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import quantflow as qf
from bench.reporting import arguments, console, show, show_machine, write
from bench.varying_shapes import MODELS as ENCODERS
from quantflow.errors import first_line
from quantflow.sources.models.torchvision_zoo import import_torchvision

COLUMNS = ("model", "batch", "imperative_ms", "to float", "to torch.ao", "to export", "spread")
LENGTH = 128


def _pictures(name: str) -> tuple[nn.Module, Callable[[int], dict[str, torch.Tensor]]]:
    module = getattr(import_torchvision().models, name)(weights=None)
    return module.eval(), lambda batch: {"x": torch.randn(batch, 3, 224, 224)}


def _encoder(name: str) -> tuple[nn.Module, Callable[[int], dict[str, torch.Tensor]]]:
    make, *_ = ENCODERS[name]
    return make().eval(), lambda batch: {
        "input_ids": torch.randint(1000, 20000, (batch, LENGTH)),
        "attention_mask": torch.ones(batch, LENGTH, dtype=torch.long),
    }


MODELS: dict[str, Callable[[str], tuple[nn.Module, Callable[[int], dict[str, torch.Tensor]]]]] = {
    "resnet50": _pictures, "mobilenet_v2": _pictures, "bert_base": _encoder, "minilm": _encoder, "vit_b_16": _pictures,
}  # fmt: skip


def _torch_ao(name: str, samples: dict[str, torch.Tensor]) -> Callable[..., Any] | str:
    """torch.ao's eager mode on torchvision's model for it, or why there is none."""
    if name not in ("resnet50", "mobilenet_v2"):
        return "torch.ao's eager mode has no such model"
    torch.backends.quantized.engine = "onednn"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        models = import_torchvision().models.quantization
        module = getattr(models, name)(weights=None, quantize=False).eval()
        module.fuse_model(is_qat=False)
        module.qconfig = torch.ao.quantization.get_default_qconfig("onednn")
        torch.ao.quantization.prepare(module, inplace=True)
        module(samples["x"])
        torch.ao.quantization.convert(module, inplace=True)
    return module  # type: ignore[no-any-return]


def measure(name: str, batches: list[int], rounds: int) -> list[dict[str, Any]]:
    """One row per batch size."""
    torch.manual_seed(0)
    module, draw = MODELS[name](name)
    example = draw(4)
    models: dict[str, Any] = {
        "imperative": qf.quantize(module, [example], mode="imperative", device="cpu"),
        "float": module,
        "export": qf.quantize(module, [example], device="cpu"),
    }
    try:
        models["torch.ao"] = _torch_ao(name, example)
    except Exception as error:  # noqa: BLE001 what it refuses is a result
        models["torch.ao"] = first_line(error)
    rows = []
    for batch in batches:
        call = draw(batch)
        runs = {k: (lambda m=m, call=call: m(**call)) for k, m in models.items() if not isinstance(m, str)}
        taken: dict[str, list[float]] = {key: [] for key in runs}
        with torch.inference_mode():
            for run in runs.values():
                run(), run()
            for turn in range(rounds):
                order = list(runs)[turn % len(runs) :] + list(runs)[: turn % len(runs)]
                for key in order:
                    taken[key].append(min(_ms(runs[key]) for _ in range(3)))
        ratios = {
            key: [a / b for a, b in zip(taken["imperative"], taken[key], strict=True)] for key in runs
        }  # fmt: skip
        ao = models["torch.ao"]
        quarters = statistics.quantiles(ratios["export"], n=4) if rounds > 1 else ratios["export"] * 3
        rows.append(
            {
                "model": name,
                "batch": batch,
                "imperative_ms": statistics.median(taken["imperative"]),
                "to float": statistics.median(ratios["float"]),
                "to torch.ao": ao if isinstance(ao, str) else statistics.median(ratios["torch.ao"]),
                "to export": statistics.median(ratios["export"]),
                "spread": f"{quarters[0]:.2f} to {quarters[2]:.2f}",
            }
        )
    return rows


def _ms(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) * 1e3


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=["resnet50", "mobilenet_v2"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    found, rows = show_machine(), []
    for name in options.models[:1] if options.smoke else options.models:
        rows += measure(name, [1] if options.smoke else options.batches, 2 if options.smoke else options.rounds)
        console.print(rows[-1])
    show("imperative mode", rows, COLUMNS)
    write(options.json, {"machine": found, "rows": rows})


if __name__ == "__main__":
    main()
