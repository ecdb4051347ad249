"""How long does a capture take in mode=export, here and in another checkout?

    python -m bench.capture_time --other PATH_OF_THE_OTHER_CHECKOUT

Both sides take turns, each in a process of its own that captures once to warm up; what is measured is CPU time, so that
others on the machine count less, and a row's ratio is that of the two least. Weights are random. Both sides run on this
interpreter; without --other, this checkout is compared with itself.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parents[1]


def main() -> int:
    from bench.reporting import arguments, show, show_machine, write

    parser = arguments(__doc__)
    parser.add_argument("--other", default=str(HERE), help="the folder of the other checkout")
    parser.add_argument("--only", default="", help="names of models, with commas")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    found = show_machine()
    names = options.only.split(",") if options.only else ["tiny"] if options.smoke else list(MODELS)
    rows = []
    for name in names:
        sides = [_side(folder, name) for folder in (str(HERE), options.other)]
        taken: list[list[float]] = [[], []]
        for round_ in range(1 if options.smoke else options.rounds):
            for at in (0, 1) if round_ % 2 else (1, 0):
                taken[at].append(_ask(sides[at]))
        for side in sides:
            side.communicate()
        this, other = min(taken[0]), min(taken[1])
        rows.append({"model": name, "this_s": this, "other_s": other, "ratio": this / other})
    show("CPU seconds of a capture, the least", rows, ("model", "this_s", "other_s", "ratio"))
    write(options.json, {"question": "capture_time", "machine": found, "rows": rows})
    return 0


def _side(folder: str, name: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": folder, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        [sys.executable, str(Path(__file__).resolve()), "answer", name],
        cwd=folder, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


def _ask(side: subprocess.Popen[str]) -> float:
    assert side.stdin is not None
    assert side.stdout is not None
    side.stdin.write("\n")
    side.stdin.flush()
    return float(json.loads(side.stdout.readline()))


def _tiny() -> Any:
    import torch
    from torch import nn

    layers = nn.Conv2d(1, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Flatten()
    return nn.Sequential(*layers, nn.Linear(16 * 11 * 11, 10)), (torch.randn(2, 1, 28, 28),), {}


def _of_torchvision(name: str) -> Callable[[], Any]:
    def make() -> Any:
        import torch

        from quantflow.sources.models.torchvision_zoo import import_torchvision

        zoo: Any = import_torchvision().models
        return getattr(zoo, name)(), (torch.randn(2, 3, 224, 224),), {}

    return make


def _of_transformers(kind: str, **config: Any) -> Callable[[], Any]:
    def make() -> Any:
        import torch

        from quantflow.sources.models.torchvision_zoo import import_torchvision

        import_torchvision()
        import transformers

        model = getattr(transformers, kind)(getattr(transformers, kind).config_class(**config))
        ids = torch.randint(3, 900, (2, 64))
        second = {"decoder_input_ids": ids[:, :16]} if kind.startswith("T5") else {}
        return model, (), {"input_ids": ids, **second}

    return make


MODELS: dict[str, Callable[[], Any]] = {
    "tiny": _tiny,
    "mobilenet_v2": _of_torchvision("mobilenet_v2"),
    "densenet121": _of_torchvision("densenet121"),
    "vit_b_16": _of_torchvision("vit_b_16"),
    "bert_base": _of_transformers("BertModel"),
    "minilm": _of_transformers(
        "BertModel", hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536
    ),
    "gpt2_of_6_layers": _of_transformers(
        "GPT2LMHeadModel", n_layer=6, n_embd=192, n_head=6, vocab_size=1000, bos_token_id=1, eos_token_id=2
    ),
    "t5_small": _of_transformers("T5ForConditionalGeneration", vocab_size=1000),
}


def answer(name: str) -> None:
    """Runs in the other process: a capture for every line of standard input."""
    with contextlib.redirect_stdout(io.StringIO()):  # standard output is for answers
        from quantflow.capture import capture
        from quantflow.ir.batch import Batch
        from quantflow.schema import ModeSettings

        model, args, kwargs = MODELS[name]()
        example, mode = Batch(args, kwargs), ModeSettings(kind="export")
        capture(model.eval(), example, mode)
    for _ in sys.stdin:
        start = time.process_time()
        capture(model, example, mode)
        print(json.dumps(time.process_time() - start), flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["answer"]:
        answer(sys.argv[2])
    else:
        raise SystemExit(main())
