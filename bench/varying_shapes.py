"""How fast are int8 models on sizes that vary, beside OpenVINO's with dynamic shapes and our own at fixed sizes?

One int8 model of each contestant takes inputs of several sizes, in turns within each round; times are ratios in the
same round. `first call` is what a size costs when it is seen for the first time, less what it takes afterwards.
`--shapes N` runs N different sizes through one model and shows memory.

    OMP_NUM_THREADS=2 python -m bench.varying_shapes --models minilm bert_base fcn fcn_resnet50 unet
    OMP_NUM_THREADS=2 python -m bench.varying_shapes --models conv_tasnet vae_decoder unet resnet18_unet lstm gru
    OMP_NUM_THREADS=2 python -m bench.varying_shapes --models minilm --shapes 500

A model whose int8 form the peer refuses with dynamic shapes (Conv-TasNet's) is compiled there once for each shape.
The peer needs openvino and nncf in this environment. Weights are random: times do not depend on them.
"""

from __future__ import annotations

import itertools
import resource
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import quantflow as qf
from bench.reporting import arguments, console, show, show_machine, write
from quantflow.sources.models.torchvision_zoo import import_torchvision

LENGTHS = (16, 32, 64, 128, 256)
IMAGES = ((128, 128), (160, 224), (224, 160), (256, 192), (192, 320))
COLUMNS = ("model", "size", "ours_ms", "peer_ms", "to peer", "to fixed", "first call ms")


class _UNet(nn.Module):
    """Three levels down and up again, with skips."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        sizes = [width, 2 * width, 4 * width]
        self.first = _block(3, width)
        self.down = nn.ModuleList(_block(a, b, stride=2) for a, b in itertools.pairwise(sizes))
        pairs = list(zip(sizes[-2::-1], sizes[:0:-1], strict=True))
        self.up = nn.ModuleList(nn.ConvTranspose2d(b, a, 2, 2) for a, b in pairs)
        self.merge = nn.ModuleList(_block(2 * a, a) for a in sizes[-2::-1])
        self.last = nn.Conv2d(width, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        seen = [self.first(x)]
        for down in self.down:
            seen.append(down(seen[-1]))
        x = seen.pop()
        for up, merge in zip(self.up, self.merge, strict=True):
            x = merge(torch.cat([seen.pop(), up(x)], 1))
        return self.last(x)


def _block(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, 1), nn.ReLU(), nn.Conv2d(outputs, outputs, 3, padding=1), nn.ReLU()
    )


class _Separator(nn.Module):
    """A Conv-TasNet (Luo and Mesgarani 2019) of two speakers: 2 repeats of 4 blocks, global layer norm."""

    def __init__(self, basis: int = 256, width: int = 128, hidden: int = 256) -> None:
        super().__init__()
        self.encode = nn.Conv1d(1, basis, 16, 8, bias=False)
        self.first = nn.Sequential(nn.GroupNorm(1, basis, eps=1e-8), nn.Conv1d(basis, width, 1))
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv1d(width, hidden, 1),
                nn.PReLU(),
                nn.GroupNorm(1, hidden, eps=1e-8),
                nn.Conv1d(hidden, hidden, 3, padding=2**i, dilation=2**i, groups=hidden),
                nn.PReLU(),
                nn.GroupNorm(1, hidden, eps=1e-8),
            )
            for _ in range(2)
            for i in range(4)
        )
        self.residual = nn.ModuleList(nn.Conv1d(hidden, width, 1) for _ in self.blocks)
        self.skip = nn.ModuleList(nn.Conv1d(hidden, width, 1) for _ in self.blocks)
        self.masks = nn.Sequential(nn.PReLU(), nn.Conv1d(width, 2 * basis, 1), nn.Sigmoid())
        self.decode = nn.ConvTranspose1d(basis, 1, 16, 8, bias=False)
        self.basis = basis

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        coded = torch.relu(self.encode(x))
        features, total = self.first(coded), 0
        for block, residual, skip in zip(self.blocks, self.residual, self.skip, strict=True):
            hidden = block(features)
            features = features + residual(hidden)
            total = total + skip(hidden)
        coded = self.masks(total) * torch.cat([coded, coded], 1)
        return self.decode(coded.reshape(2 * x.shape[0], self.basis, -1))


class _Residual(nn.Module):
    """A block of a diffusion model's decoder."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.a = nn.Sequential(nn.GroupNorm(16, inputs), nn.SiLU(), nn.Conv2d(inputs, outputs, 3, padding=1))
        self.b = nn.Sequential(nn.GroupNorm(16, outputs), nn.SiLU(), nn.Conv2d(outputs, outputs, 3, padding=1))
        self.short = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.short(x) + self.b(self.a(x))


def _vae_decoder() -> nn.Module:
    layers: list[nn.Module] = [nn.Conv2d(4, 128, 3, padding=1), _Residual(128, 128)]
    for inputs, outputs in ((128, 128), (128, 64)):
        layers += [nn.Upsample(scale_factor=2.0), nn.Conv2d(inputs, inputs, 3, padding=1), _Residual(inputs, outputs)]
    return nn.Sequential(*layers, nn.GroupNorm(16, 64), nn.SiLU(), nn.Conv2d(64, 3, 3, padding=1))


class _Recurrent(nn.Module):
    """Two recurrent layers and a linear one over every step."""

    def __init__(self, kind: type[nn.LSTM] | type[nn.GRU]) -> None:
        super().__init__()
        self.layers = kind(128, 256, 2, batch_first=True)
        self.last = nn.Linear(256, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.layers(x)[0])


def _resnet18_unet() -> nn.Module:
    import_torchvision()
    import segmentation_models_pytorch as smp

    found: nn.Module = smp.Unet("resnet18", encoder_weights=None, classes=4)
    return found


def _fcn() -> nn.Module:
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 32), (32, 64), (64, 64), (64, 32)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(32, 4, 1))


def _fcn_resnet50() -> nn.Module:
    found: nn.Module = import_torchvision().models.segmentation.fcn_resnet50(
        weights=None, weights_backbone=None, num_classes=21
    )
    return found


def _encoder(hidden: int, layers: int, heads: int) -> nn.Module:
    import_torchvision()
    from transformers import BertConfig, BertModel

    config = BertConfig(
        hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=4 * hidden
    )
    return BertModel(config, add_pooling_layer=False)


def _text(size: int) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.randint(1000, 20000, (1, size)), "attention_mask": torch.ones(1, size, dtype=torch.long)}


def _image(size: tuple[int, int]) -> dict[str, torch.Tensor]:
    return {"x": torch.randn(1, 3, *size)}


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[Any], dict[str, torch.Tensor]], tuple[Any, ...]]] = {
    "minilm": (lambda: _encoder(384, 6, 12), _text, LENGTHS),
    "bert_base": (lambda: _encoder(768, 12, 12), _text, LENGTHS),
    "fcn": (_fcn, _image, IMAGES),
    "fcn_resnet50": (_fcn_resnet50, _image, IMAGES),
    "unet": (_UNet, _image, IMAGES),
    "resnet18_unet": (_resnet18_unet, _image, IMAGES[:1] + IMAGES[3:]),
    "conv_tasnet": (_Separator, lambda size: {"x": torch.randn(1, 1, size)}, (4000, 8000, 16000)),
    "vae_decoder": (_vae_decoder, lambda size: {"x": torch.randn(1, 4, *size)}, ((16, 16), (24, 16), (32, 32))),
    "lstm": (lambda: _Recurrent(nn.LSTM), lambda size: {"x": torch.randn(1, size, 128)}, (32, 100)),
    "gru": (lambda: _Recurrent(nn.GRU), lambda size: {"x": torch.randn(1, size, 128)}, (32, 100)),
}
#: torch.export writes one length into a recurrent layer.
MODES = {"lstm": "torchscript", "gru": "torchscript"}


def _first_tensor(output: Any) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else next(iter(output.values()))


class _Flat(nn.Module):
    """The model by position, as the peer's converter takes it."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return _first_tensor(self.module(*inputs))


def _peer(module: nn.Module, batches: list[dict[str, torch.Tensor]]) -> Callable[[dict[str, torch.Tensor]], Any]:
    import nncf
    import openvino

    samples = [tuple(batch.values()) for batch in batches]
    with torch.no_grad():
        script = torch.jit.trace(_Flat(module).eval(), samples[0], check_trace=False)
    model = openvino.convert_model(script, example_input=samples[0])
    is_text = not samples[0][0].is_floating_point()
    kind = nncf.ModelType.TRANSFORMER if is_text else None
    data = nncf.Dataset([tuple(x.numpy() for x in sample) for sample in samples])
    quantized = nncf.quantize(model, data, model_type=kind, subset_size=len(samples))
    hints = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    core, requests = openvino.Core(), {}
    try:
        request = core.compile_model(quantized, "CPU", hints).create_infer_request()
    except RuntimeError:  # no int8 kernel for a dynamic length: one model for each shape
        for sample in samples:
            quantized.reshape(dict(enumerate(list(x.shape) for x in sample)))
            key = tuple(x.shape for x in sample)
            requests[key] = core.compile_model(quantized, "CPU", hints).create_infer_request()
        return lambda batch: requests[tuple(x.shape for x in batch.values())].infer(
            [x.numpy() for x in batch.values()], share_inputs=True
        )
    return lambda batch: request.infer([x.numpy() for x in batch.values()], share_inputs=True)


def _ms(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


def measure(name: str, rounds: int) -> list[dict[str, Any]]:
    """One row per size: medians over the rounds, and ratios within a round."""
    make, draw, sizes = MODELS[name]
    torch.manual_seed(0)
    module = make().eval()
    batches = [draw(size) for size in sizes]
    mode = MODES.get(name, "export")
    ours: Any = qf.quantize(module, _named(module, batches), evaluation=_named(module, batches[:1]), mode=mode)
    peer = _peer(module, batches)
    rows = []
    with torch.inference_mode():
        for size, batch in zip(sizes, batches, strict=True):
            call = _named(module, [batch])[0]
            fixed: Any = qf.quantize(module, [call], dynamic="none", mode=mode)
            ours.compiled.runner._plans.clear()
            first = _ms(lambda call=call: ours(**call))
            calls = {
                "ours": lambda call=call: ours(**call),
                "peer": lambda batch=batch: peer(batch),
                "fixed": lambda call=call, fixed=fixed: fixed(**call),
            }
            for each in calls.values():
                _ms(each), _ms(each)
            taken: dict[str, list[float]] = {key: [] for key in calls}
            for turn in range(rounds):
                order = list(calls)[turn % 3 :] + list(calls)[: turn % 3]
                for key in order:
                    taken[key].append(min(_ms(calls[key]) for _ in range(3)))
            middle = {key: statistics.median(values) for key, values in taken.items()}
            ratio = {
                key: statistics.median(a / b for a, b in zip(taken["ours"], taken[key], strict=True))
                for key in ("peer", "fixed")
            }
            cells = (name, size, middle["ours"], middle["peer"], ratio["peer"], ratio["fixed"], first - middle["ours"])
            rows.append(dict(zip(COLUMNS, cells, strict=True)))
    return rows


def _named(module: nn.Module, batches: list[dict[str, torch.Tensor]]) -> list[Any]:
    """The batches as the module's own keywords."""
    if "x" not in batches[0]:
        return batches
    key = "input" if isinstance(module, nn.Sequential) else "x"
    return [{key: batch["x"]} for batch in batches]


def many(name: str, shapes: int) -> None:
    """So many sizes through one model: memory after each tenth of them, and the dearest first call."""
    make, draw, sizes = MODELS[name]
    module = make().eval()
    model: Any = qf.quantize(module, _named(module, [draw(size) for size in sizes[:2]]))
    worst = 0.0
    for index in range(shapes):
        size = 2 + index if isinstance(sizes[0], int) else (64 + 4 * (index % 40), 64 + 4 * (index // 40))
        call = _named(module, [draw(size)])[0]
        with torch.inference_mode():
            worst = max(worst, _ms(lambda call=call: model(**call)) - _ms(lambda call=call: model(**call)))
        if (index + 1) % max(1, shapes // 10) == 0:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            console.print(f"{index + 1} shapes: peak memory {peak:.0f} MiB, dearest first call {worst:.1f} ms more")


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["minilm", "fcn", "unet"])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--shapes", type=int, default=0, help="run so many sizes through one model instead")
    options = parser.parse_args()
    found, rows = show_machine(), []
    for name in options.models:
        if options.shapes:
            many(name, 10 if options.smoke else options.shapes)
            continue
        own = measure(name, 2 if options.smoke else options.rounds)
        show(name, own, COLUMNS)
        rows += own
    write(options.json, {"machine": found, "rows": rows})


if __name__ == "__main__":
    main()
