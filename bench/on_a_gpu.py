"""Is int8 on a GPU worth having: the triton runtime beside torch.compile in bfloat16, and its products beside cuBLAS?

Medians of event timings, on tensors that live on the card; bfloat16 is channels last, frozen and recorded as CUDA
graphs. "float" is how the int8 model holds what is no code (policy.float). bert is BERT-base at 128 tokens.
Weights are random: this is about speed. "sqnr_db" is int8 against float32.

    python -m bench.on_a_gpu --models resnet50:1,32,128 mobilenet_v2:1,128 --json gpu.json
    python -m bench.on_a_gpu --models vit_b_16:1,32 bert:32 --float bfloat16
    python -m bench.on_a_gpu --models resnet50:128 --products --steps    the time of every step of a run
    python -m bench.on_a_gpu --only gelu    what GELU costs behind the products of ViT-B/16 and BERT-base, tile by tile
"""

from __future__ import annotations

import copy
import sys
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from bench.reporting import arguments, console, show, show_machine, write
from quantflow.errors import EXIT_PASSED, EXIT_UNAVAILABLE
from quantflow.numerics.affine import QParams
from quantflow.numerics.measures import sqnr_db
from quantflow.runtimes import RUNTIMES
from quantflow.sources.models.torchvision_zoo import import_torchvision
from quantflow.tasks.selftest import quantized_program

SECTIONS = ("models", "products", "gelu")
#: Rows, inputs and outputs of a layer with GELU: ViT-B/16's at batch 32 and 128, BERT-base's at 32 with 128 tokens.
GELU_LAYERS = ((32 * 197, 768, 3072), (128 * 197, 768, 3072), (32 * 128, 768, 3072))
COLUMNS = ("model", "batch", "float", "int8_ms", "bf16_ms", "ratio", "sqnr_db", "tiles measured")


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument(
        "--models", nargs="+", default=["resnet50:1,32,128", "mobilenet_v2:1,128"], metavar="NAME:SIZES"
    )
    parser.add_argument("--float", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--products", nargs="*", type=int, default=[4096, 8192], metavar="N")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=("models", "products"))
    parser.add_argument("--steps", action="store_true", help="print the time of every step, too")
    options = parser.parse_args()
    found = show_machine()
    if reason := RUNTIMES["triton"].missing("cuda"):
        console.print(f"runtime triton can't use a CUDA card here: {reason}", markup=False)
        return EXIT_UNAVAILABLE
    card = torch.cuda.get_device_name()
    console.print(card)
    models = ["resnet18:1"] if options.smoke else options.models
    rows, products, gelus = [], [], []
    if "models" in options.only:
        rows = [row for named in models for row in _model(*named.split(":"), options.float, options.steps)]
        show(f"int8 beside bfloat16 on {card}", rows, COLUMNS)
    if "products" in options.only:
        products = [_product(n) for n in ([512] if options.smoke else options.products)]
        show("int8 products, TOPS", products, ("n", "linear with its epilogue", "torch._int_mm", "share"))
    if "gelu" in options.only:
        gelus = [row for sizes in GELU_LAYERS[: 1 if options.smoke else None] for row in _gelus(*sizes)]
        show(f"linear and GELU on {card}, us", gelus, list(gelus[0]))
    write(
        options.json,
        {"question": "gpu", "machine": found, "card": card, "rows": rows, "products": products, "gelus": gelus},
    )
    return EXIT_PASSED


def _median(call: Any) -> float:
    from triton.testing import do_bench

    return float(do_bench(call, return_mode="median"))


class _Bert(torch.nn.Module):
    """BERT-base's last hidden state of token numbers."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import BertConfig, BertModel

        self.bert = BertModel(BertConfig())

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.bert(input_ids=tokens).last_hidden_state
        return result


def net_of(name: str) -> torch.nn.Module:
    """A model by name, with random weights."""
    torch.manual_seed(0)
    if name == "bert":
        net: torch.nn.Module = _Bert()
    elif name == "efficientnet_lite0":
        from efficientnet_lite_pytorch import EfficientNet

        net = EfficientNet.from_name("efficientnet-lite0")
    else:
        net = getattr(import_torchvision().models, name)(weights=None)
    if name.startswith("vit"):  # whose head begins as zeros
        torch.nn.init.normal_(net.heads.head.weight, std=0.02)
    made: torch.nn.Module = net.eval()
    return made


def batch_of(name: str, size: int) -> torch.Tensor:
    """What it takes."""
    return torch.randint(0, 30_000, (size, 128)) if name == "bert" else torch.randn(size, 3, 224, 224)


def _model(name: str, sizes: str, floats: str, shows_steps: bool) -> list[dict[str, Any]]:
    net, x, runtime = net_of(name), batch_of(name, 2), RUNTIMES["triton"]
    runner = runtime.halves.get(floats, runtime.build)(quantized_program(net, x), "cuda")
    with torch.inference_mode():
        quality = sqnr_db(net(x), runner([x]))
    import torch._inductor.config as inductor

    inductor.freezing = True
    half = copy.deepcopy(net).to("cuda", torch.bfloat16).to(memory_format=torch.channels_last)
    rows = []
    for size in map(int, sizes.split(",")):
        image = batch_of(name, size).to("cuda")
        tiles = runner.tune([image])
        given = image
        if image.is_floating_point():
            given = image.to(torch.bfloat16).contiguous(memory_format=torch.channels_last)
        with torch.inference_mode():
            torch._dynamo.reset()
            compiled = torch.compile(half, mode="reduce-overhead")
            for _ in range(3):
                compiled(given)
                runner([image])
            bf16, int8 = _median(partial(compiled, given)), _median(partial(runner, [image]))
        rows.append(
            {"model": name, "batch": size, "float": floats, "int8_ms": int8, "bf16_ms": bf16, "ratio": int8 / bf16,
             "sqnr_db": quality, "tiles measured": len(tiles)}
        )  # fmt: skip
        console.print(f"{name}, batch {size}: {int8:.3f} ms, bfloat16 {bf16:.3f} ms")
        for step in runner.profile([image]) if shows_steps else ():
            console.print(f"  {1e3 * step['ms']:8.1f} us  {step['kernel']} {step['name']}")
    return rows


def _product(n: int) -> dict[str, Any]:
    from quantflow.runtimes.triton.cards import card_of
    from quantflow.runtimes.triton.layers import Finish, Layer

    a = torch.randint(-128, 128, (n, n), dtype=torch.int8, device="cuda")
    w = torch.randint(-127, 128, (n, n), dtype=torch.int8)
    card, finish = card_of("cuda"), Finish(QParams("int8", 0.05, 0), QParams("int8", 2.0, 0))
    layer, other = Layer(w, torch.full((n,), 1e-3), torch.zeros(n), None, finish, card), w.cuda().t()
    with card.tuner.measuring(60):
        layer(a)
    ours, cublas = (2e-9 * n**3 / _median(call) for call in (lambda: layer(a), lambda: torch._int_mm(a, other)))
    return {"n": n, "linear with its epilogue": ours, "torch._int_mm": cublas, "share": ours / cublas}


def _gelus(rows: int, inputs: int, outputs: int) -> list[dict[str, Any]]:
    """A row per tile that would be tried, the ends one after the other, and one for the best of each end."""
    from quantflow.ir.activations import Epilogue
    from quantflow.runtimes.triton import formulas
    from quantflow.runtimes.triton import layers as kernels
    from quantflow.runtimes.triton.cards import card_of
    from quantflow.runtimes.triton.tiles import candidates

    torch.manual_seed(0)
    x = torch.randint(-128, 128, (rows, inputs), dtype=torch.int8, device="cuda")
    weight, scale = torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8), torch.full((outputs,), 1e-3)
    card, layers = card_of("cuda"), {}
    untuned = replace(card, multiprocessors=0)  # takes the tile that it is given
    # What ends a layer → the number of its activation in a kernel.
    ends = {"none": None, "GELU": formulas.GELU}
    ends |= {f"GELU within {error}": number for number, error in formulas.SHORT_GELUS.items()}
    for end, number in ends.items():
        epilogue = None if number is None else Epilogue("gelu")
        finish = kernels.Finish(QParams("int8", 0.01, 0), QParams("int8", 0.05, 0), epilogue=epilogue)
        layers[end] = kernels.Layer(weight, scale, torch.zeros(outputs), None, finish, untuned)
        if number is not None:
            layers[end].activation = number
    found: list[dict[str, Any]] = []
    for way in candidates(rows, outputs, inputs, 1, 1, card.multiprocessors):
        row: dict[str, Any] = {"rows": rows, "tile": str(way)}
        kernels.SAFE = way
        for end, layer in layers.items():
            try:
                row[end] = 1e3 * _median(partial(layer, x))
            except Exception as error:  # noqa: BLE001 a tile that the card refuses
                row[end] = type(error).__name__
        found.append(row)
    best = {end: min(row[end] for row in found if isinstance(row[end], float)) for end in ends}
    return [*found, {"rows": rows, "tile": "the best of each", **best}]


if __name__ == "__main__":
    sys.exit(main())
