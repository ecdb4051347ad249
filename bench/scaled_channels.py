"""Do the presets find back to accuracy when the channels of a depthwise net are badly scaled?

EfficientNet-Lite0, real weights, affine uint8: seeded factors of 0.01 to 100, one per channel, are put between the ops
that write a channel and those that read it, so that the float function stays. `streams`: the linear bottlenecks, with
all that a residual stream joins. `everything`: also through every ReLU6, which becomes min(max(x, 0), 6 / s) per
channel, and through the depthwise convolutions. 96 crops of photos to calibrate, 400 of others to evaluate.

    OMP_NUM_THREADS=2 python -m bench.scaled_channels --json scaled_channels.json
"""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

import quantflow
from bench.ablation import MODELS
from bench.reporting import arguments, console, show, show_machine, write
from quantflow.numerics.measures import sqnr_db
from quantflow.stages.evaluate import evaluate

QCONFIG = "affine_uint8"
COLUMNS = ("channels", "algorithms", "sqnr_db", "agreement", "to unscaled", "float sqnr_db")
#: #4: with `fast`, the scaled model may lose so much against the unscaled one.
MOST_LOSS_DB = 1.0
#: Powers of ten that factors are drawn between.
SMALLEST, LARGEST = -2.0, 2.0


class Clamp(nn.Module):
    """min(max(x, 0), bound) with a bound per channel."""

    def __init__(self, bound: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("bound", bound.reshape(-1, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.minimum(torch.relu(x), self.bound)  # type: ignore[arg-type]


def scaled(model: nn.Module, everything: bool, seed: int) -> nn.Module:
    """A copy of the network that computes the same with rescaled channels."""
    net = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)

    def factors(norm: nn.BatchNorm2d) -> torch.Tensor:
        drawn = torch.rand(norm.num_features, generator=generator, dtype=torch.float64)
        return (10 ** (SMALLEST + (LARGEST - SMALLEST) * drawn)).float()

    blocks: list[Any] = list(net._blocks)  # type: ignore[arg-type]
    for first, last in _streams(blocks):
        readers = [b._expand_conv for b in blocks[first + 1 : last + 1]]
        readers.append(blocks[last + 1]._expand_conv if last + 1 < len(blocks) else net._conv_head)
        _rescale([b._bn2 for b in blocks[first : last + 1]], readers, factors(blocks[first]._bn2))
    if everything:
        s = factors(net._bn0)  # type: ignore[arg-type]
        _rescale([net._bn0], [blocks[0]._depthwise_conv], s)
        net._bn0, swish = nn.Sequential(net._bn0, Clamp(6 / s)), net._swish  # type: ignore[arg-type]
        net._bn1, net._swish = nn.Sequential(net._bn1, swish), nn.Identity()  # type: ignore[arg-type]
        for block in blocks:
            if hasattr(block, "_expand_conv"):
                s = factors(block._bn0)
                _rescale([block._bn0], [block._depthwise_conv], s)
                block._bn0 = nn.Sequential(block._bn0, Clamp(6 / s))
            s = factors(block._bn1)
            _rescale([block._bn1], [block._project_conv], s)
            block._bn1, block._swish = nn.Sequential(block._bn1, Clamp(6 / s)), nn.Identity()
    return net


def _streams(blocks: list[Any]) -> Iterable[tuple[int, int]]:
    """(first, last) block that write to one stream: a block with a skip adds to its input."""
    first = 0
    for index in range(1, len(blocks) + 1):
        joins = index < len(blocks) and (
            blocks[index]._block_args.stride == 1
            and blocks[index]._block_args.input_filters == blocks[index]._block_args.output_filters
        )
        if not joins:
            yield first, index - 1
            first = index


def _rescale(writers: Iterable[Any], readers: Iterable[Any], s: torch.Tensor) -> None:
    """What the writers' BatchNorms write is divided by s, and the readers' weights take it up."""
    with torch.no_grad():
        for norm in writers:
            norm.weight /= s
            norm.bias /= s
        for conv in readers:
            conv.weight *= s.reshape(-1, 1, 1, 1) if conv.groups > 1 else s.reshape(1, -1, 1, 1)


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--algorithms", nargs="+", default=["none", "fast"], help="presets' names")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    found = show_machine()
    module, data, outputs = MODELS["lite0"](options.smoke)
    modules = {"as they are": module} | {
        name: scaled(module, name == "everything", options.seed) for name in ("streams", "everything")
    }
    probe = data.evaluation[0].args[0]
    rows: list[dict[str, Any]] = []
    for name, each in modules.items():
        with torch.inference_mode():
            same = sqnr_db(module(probe), each(probe))
        for preset in options.algorithms:
            model = quantflow.quantize(
                each, data.calibration, evaluation=[data.calibration[0].head(1)], qconfig=QCONFIG, algorithms=preset
            )
            figures = evaluate(module, model, data.evaluation, outputs=outputs)
            unscaled = next((r["sqnr_db"] for r in rows if r["algorithms"] == preset), figures["sqnr_db"])
            rows.append(
                {key: figures[key] for key in ("sqnr_db", "agreement")}
                | {"channels": name, "algorithms": preset, "to unscaled": figures["sqnr_db"] - unscaled}
                | {"float sqnr_db": same, "notices": model.results["notices"]}
            )
            console.print(f"{name}, {preset}: {figures['sqnr_db']:.2f} dB")
    show(f"EfficientNet-Lite0, {QCONFIG}, seed {options.seed}", rows, COLUMNS)
    worst = min((row["to unscaled"] for row in rows if row["algorithms"] == "fast"), default=math.inf)
    write(options.json, {"question": "scaled_channels", "machine": found, "results": rows})
    return 1 if worst < -MOST_LOSS_DB and not options.smoke else 0


if __name__ == "__main__":
    sys.exit(main())
