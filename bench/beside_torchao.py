"""Is int8 on a GPU ahead of torchao's int8, dynamic and static, under torch.compile?

Medians of event timings on tensors that live on the card, all of a batch size in one run. torchao quantizes every
nn.Linear of the model in bfloat16: activations per row (dynamic), or per tensor by scales of one batch (static).
Random weights. What torchao refuses, or can't compile, is a row that says why.

    python -m bench.beside_torchao --models vit_b_16:32,128 --json torchao.json
    python -m bench.beside_torchao --models bert:32 --kinds static
    python -m bench.beside_torchao --smoke    on a CPU: whether torchao builds both and what they compute
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from bench.on_a_gpu import batch_of, net_of
from bench.reporting import arguments, console, show, show_machine, write
from quantflow.errors import EXIT_PASSED, EXIT_UNAVAILABLE, first_line
from quantflow.numerics.measures import sqnr_db
from quantflow.runtimes import RUNTIMES

KINDS = ("dynamic", "static")
COLUMNS = ("model", "batch", "torchao", "int8_ms", "torchao_ms", "ratio", "sqnr_db", "holds", "why")


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--models", nargs="+", default=["vit_b_16:32,128"], metavar="NAME:SIZES")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--float", choices=("float32", "bfloat16", "float16"), default="bfloat16")
    options = parser.parse_args()
    found = show_machine()
    try:
        import torchao
    except ImportError as error:
        console.print(f"torchao can't be used here: {first_line(error)}; pip install --no-deps torchao", markup=False)
        return EXIT_UNAVAILABLE
    if options.smoke:
        rows = [_on_a_cpu(kind) for kind in options.kinds]
    elif reason := RUNTIMES["triton"].missing("cuda"):
        console.print(f"runtime triton can't use a CUDA card here: {reason}", markup=False)
        return EXIT_UNAVAILABLE
    else:
        rows = [
            row
            for named in options.models
            for row in beside_torchao(*named.split(":"), kinds=options.kinds, floats=options.float)
        ]
    show(f"beside torchao {torchao.__version__}", rows, COLUMNS)
    write(options.json, {"question": "beside_torchao", "machine": found, "torchao": torchao.__version__, "rows": rows})
    return EXIT_PASSED


def quantized(net: nn.Module, x: torch.Tensor, kind: str) -> nn.Module:
    """A copy of the net, in bfloat16 on x's device, whose linears are torchao's int8 of this kind.

    Args:
        x: the batch that static scales are of, as the copy takes it.
    """
    from torchao.quantization import (
        Int8DynamicActivationInt8WeightConfig,
        Int8StaticActivationInt8WeightConfig,
        PerRow,
        PerTensor,
        quantize_,
    )

    made = copy.deepcopy(net).to(x.device, torch.bfloat16)
    if kind == "dynamic":
        quantize_(made, Int8DynamicActivationInt8WeightConfig())
        return made
    linears = {name: module for name, module in made.named_modules() if type(module) is nn.Linear}
    seen: dict[str, torch.Tensor] = {}

    def see(name: str, _module: nn.Module, given: tuple[torch.Tensor, ...]) -> None:
        # One scale for the whole tensor, of as many dimensions as it has.
        seen[name] = (given[0].abs().amax().float() / 127).to(torch.bfloat16).reshape([1] * given[0].dim())

    hooks = [module.register_forward_pre_hook(partial(see, name)) for name, module in linears.items()]
    with torch.inference_mode(False), torch.no_grad():
        made(x)
    for hook in hooks:
        hook.remove()
    for name, scale in seen.items():
        config = Int8StaticActivationInt8WeightConfig(act_quant_scale=scale, granularity=(PerTensor(), PerRow()))
        quantize_(made, config, filter_fn=lambda module, _, own=linears[name]: module is own)
    return made


def beside_torchao(
    name: str, sizes: str, *, kinds: tuple[str, ...] = KINDS, floats: str = "bfloat16"
) -> list[dict[str, Any]]:
    """A row per batch size and kind; `holds` is None where torchao gives no figure."""
    from quantflow.tasks.selftest import quantized_program

    torch.manual_seed(0)
    net, runtime = net_of(name), RUNTIMES["triton"]
    runner = runtime.halves.get(floats, runtime.build)(quantized_program(net, batch_of(name, 2)), "cuda")
    rows = []
    for size in map(int, sizes.split(",")):
        x = batch_of(name, size).to("cuda")
        runner.tune([x])
        for kind in kinds:
            row: dict[str, Any] = {"model": name, "batch": size, "torchao": kind, "holds": None}
            try:
                row |= _timed(net, x, kind, partial(runner, [x]))
            except Exception as error:  # noqa: BLE001 a row says so
                row["why"] = f"{type(error).__name__}: {first_line(error)}"[:300]
            rows.append(row)
            console.print(row, markup=False)
    return rows


def _timed(net: nn.Module, x: torch.Tensor, kind: str, ours: Callable[[], Any]) -> dict[str, Any]:
    from triton.testing import do_bench

    given = x.to(torch.bfloat16) if x.is_floating_point() else x
    torch._dynamo.reset()
    theirs = quantized(net, given, kind)
    with torch.inference_mode():
        wanted = copy.deepcopy(net).to(x.device)(x)
        call = partial(torch.compile(theirs, mode="reduce-overhead"), given)
        for _ in range(3):
            found = call()
            ours()
        quality = sqnr_db(wanted, found.float())
        int8_ms, torchao_ms = (float(do_bench(each, return_mode="median")) for each in (ours, call))
    return {
        "int8_ms": int8_ms, "torchao_ms": torchao_ms, "ratio": int8_ms / torchao_ms, "sqnr_db": quality,
        "holds": int8_ms < torchao_ms,
    }  # fmt: skip


def _on_a_cpu(kind: str) -> dict[str, Any]:
    """A small net of rows and of tokens through torchao, not compiled."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64), nn.Flatten(), nn.Linear(32 * 64, 32)).eval()
    x = torch.randn(4, 32, 64)
    with torch.inference_mode():
        found = quantized(net, x.to(torch.bfloat16), kind)(x.to(torch.bfloat16))
        quality = sqnr_db(net(x), found.float())
    return {"model": "small", "batch": 4, "torchao": kind, "sqnr_db": quality, "holds": quality > 20}


if __name__ == "__main__":
    sys.exit(main())
