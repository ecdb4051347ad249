"""How fast are quantflow's int8 models beside OpenVINO's, ONNX Runtime's and torch.ao's?

Every contestant gets the same weights, calibration samples and inputs, and makes its int8 model once, in a process of
its own; then all take turns, round after round, while the others wait. The table says how long a batch takes, how far
the output is from the float model's, and the ratio to the fastest peer, of times in the same round. A contestant that
fails is a row with its reason. `--isa avx2` holds quantflow and OpenVINO to that instruction set; the others have no
setting that covers all their kernels. The peers run in the interpreter `--peer-python`, an environment of their own
with torch, openvino, nncf, onnx, onnxscript and onnxruntime.

    python -m bench.vs_peers --peer-python PATH/bin/python --threads 2 --floor --json vs_peers.json
    python -m bench.vs_peers --peer-python PATH/bin/python --threads 2 --first-result
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from bench.engine_rate import NoEngineRate, built, engine_rate
from bench.photo_models import float_module, model_on_photos, photos
from bench.reporting import arguments, console, show, show_machine, write
from quantflow.numerics.measures import sqnr_db
from quantflow.sources.data import Batch, Data, TextPreprocess
from quantflow.sources.data.text import load_lee
from quantflow.sources.models.efficientnet_lite0 import load_efficientnet_lite0
from quantflow.sources.models.torchvision_zoo import import_torchvision
from quantflow.sources.models.transformers_zoo import TextEmbedding, load_minilm
from quantflow.stages.benchmark import threads

CONTESTANT = Path(__file__).with_name("contestant.py")
OURS, PEERS = "quantflow", ("openvino", "onnxruntime", "torch_ao")
#: Where it is asked for: the float model in bfloat16, which some processors compute as fast as others do int8.
IN_BFLOAT16 = "openvino_bf16"
MODELS = ("resnet50", "resnet18", "mobilenet_v2", "efficientnet_lite0", "minilm", "vit_b_16")
#: Named by hand: BERT-base of random weights on random tokens.
BERT = "bert_base"
TOKENS = 128
CALIBRATION_BATCH = 16
#: The large product whose speed is the floor's: a chain of linears, so that making codes of its input hardly counts.
GEMM = "large linears"
GEMM_SIZE, GEMM_LINEARS = 2048, 4
#: Quiet between two turns, in which the pools of the last one stop spinning.
SETTLE_S = 0.05
#: Of one core, used by a contestant while others run: more would slow them down.
IDLE_LIMIT = 0.02
#: quantflow's name of an instruction set (QUANTFLOW_ISA), and the limit that oneDNN knows (ONEDNN_MAX_CPU_ISA).
ISAS = {
    "avx2": "AVX2",
    "avx_vnni": "AVX2_VNNI",
    "avx512_vnni": "AVX512_CORE_VNNI",
    "amx_int8": "AVX512_CORE_AMX",
}
COLUMNS = (
    "what",
    "median_ms",
    "quartiles_ms",
    "calls",
    "sqnr_db",
    "to fastest peer",
    "quartiles",
    "to floor",
    "isa",
    "status",
)
FIRST_COLUMNS = (
    "what", "process_s", "after_imports_s", "load_s", "first_call_s", "peak_rss_mb", "model_rss_mb", "status"
)  # fmt: skip


@dataclass(frozen=True)
class Task:
    """A float model with its samples: what every contestant starts from.

    Attributes:
        calibration, evaluation: for each input, all samples (N, ...).
        macs: multiply-accumulates of one sample; of one call, for the large linears.
    """

    name: str
    module: nn.Module
    weights: str
    is_transformer: bool
    calibration: tuple[torch.Tensor, ...]
    evaluation: tuple[torch.Tensor, ...]
    macs: int


@dataclass
class Worker:
    """A contestant's process. `failed` says why it can't go on; its last words are in `log`."""

    what: str
    process: subprocess.Popen[str]
    log: Path
    timeout_s: float
    failed: str | None = None
    prepared: dict[str, Any] = field(default_factory=dict)
    notes: Sequence[str] = ()

    def ask(self, **order: Any) -> dict[str, Any]:
        """The answer to an order; {} and `failed` where there is none."""
        if self.failed is None:
            assert self.process.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.write(json.dumps(order) + "\n")
                self.process.stdin.flush()
        return self.answer()

    def answer(self) -> dict[str, Any]:
        if self.failed is not None:
            return {}
        assert self.process.stdout is not None
        timer = threading.Timer(self.timeout_s, self.process.kill)
        timer.start()
        try:
            line = self.process.stdout.readline()
        finally:
            timer.cancel()
        found: dict[str, Any] = json.loads(line) if line else {"failed": self._last_words()}
        self.failed = found.get("failed")
        if self.failed is not None and self.failed.startswith("ModuleNotFoundError"):
            self.failed += "; give --peer-python an interpreter that has it"
        return found

    def cpu_s(self) -> float:
        """Processor time it has used so far; 0 where the system does not say."""
        try:
            fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return 0.0
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def _last_words(self) -> str:
        code = self.process.wait()
        lines = self.log.read_text(errors="replace").strip().splitlines() or [f"no answer within {self.timeout_s:g} s"]
        return f"the process ended ({code}): {lines[-1]}"


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument(
        "--models", nargs="+", metavar="NAME", help=f"torchvision's, {BERT}, or of {', '.join(MODELS)} (all)"
    )
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 16], help="batch sizes (default 1 16)")
    parser.add_argument("--size", type=int, default=224, help="side of images (default 224)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of every contestant")
    parser.add_argument("--contestants", nargs="+", default=[OURS, *PEERS], choices=[OURS, *PEERS, IN_BFLOAT16])
    parser.add_argument("--peer-python", metavar="PATH", default=sys.executable, help="interpreter of the peers")
    parser.add_argument("--qconfig", nargs="+", default=["sym_int8"], help="quantflow's presets, one contestant each")
    parser.add_argument("--mode", default="export", choices=("export", "torchscript", "imperative"))
    parser.add_argument("--runtime", default="auto", help="quantflow's runtime")
    parser.add_argument("--calibration", type=int, default=300, help="samples (default 300, as NNCF's own)")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--min-turn-ms", type=float, default=300.0)
    parser.add_argument("--isa", choices=ISAS, help="hold quantflow and OpenVINO to it (default: the best)")
    parser.add_argument(
        "--floor",
        action="store_true",
        help="time a large int8 product and the engine's own rate, too, and say what they predict",
    )
    parser.add_argument("--first-result", action="store_true", help="instead: from a saved model to its first result")
    parser.add_argument("--timeout-s", type=float, default=1800, help="for any one answer of a contestant")
    options = parser.parse_args()
    options.models = options.models or (["resnet50"] if options.first_result else list(MODELS))
    if options.smoke:
        options.models, options.batch, options.size, options.rounds = ["squeezenet1_1"], [2], 64, 2
        options.calibration, options.min_turn_ms = 4, 5.0
    torch.backends.mha.set_fastpath_enabled(False)  # it can neither be traced nor counted
    with threads(options.threads):
        found = show_machine()
        answer = _first_result if options.first_result else _compare
        results = [answer(name, options) for name in options.models]
    write(
        options.json,
        {
            "question": "vs_peers",
            "options": {k: v for k, v in vars(options).items() if k not in ("json", "peer_python")},
            "machine": found,
            "models": results,
        },
    )
    rows = [row for result in results for row in result["rows"]]
    return 1 if any(row["status"] != "ok" and row["what"].startswith(OURS) for row in rows) else 0


def _compare(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Every contestant on one model, all batch sizes."""
    task = _load(name, options)
    rows: list[dict[str, Any]] = []
    with contextlib.ExitStack() as stack:
        folder = _folder(stack, task)
        workers = [stack.enter_context(_started(*each, folder, options)) for each in _contestants(options)]
        gemm = stack.enter_context(_gemm(stack, options)) if options.floor else None
        for batch in options.batch:
            rows += _measure(task, batch, workers, gemm, folder, options)
            title = f"{name} ({task.weights}), batch {batch}, {options.threads} threads, {options.rounds} rounds"
            show(title, [_readable(row) for row in rows if row["batch"] == batch], COLUMNS)
    for row in rows:
        if row["idle_cpu"] > IDLE_LIMIT:
            console.print(f"{row['what']} used {row['idle_cpu']:.0%} of a core while others ran: do not trust this run")
    return {
        "model": name,
        "weights": task.weights,
        "macs": task.macs,
        "rows": rows,
        "contestants": {
            w.what: w.prepared | {"notes": w.notes, "failed": w.failed} for w in (*workers, *([gemm] if gemm else ()))
        },
    }


def _contestants(options: argparse.Namespace) -> list[tuple[str, str, dict[str, Any]]]:
    """(what, the name that contestant.py knows it by, its settings)."""
    found = []
    for name in options.contestants:
        if name == OURS:
            found += [(f"{OURS} {qconfig}", OURS, {"qconfig": qconfig}) for qconfig in options.qconfig]
        else:
            found.append((name, name, {}))
    return found


@contextlib.contextmanager
def _started(
    what: str, name: str, settings: dict[str, Any], folder: Path, options: argparse.Namespace
) -> Iterator[Worker]:
    """The contestant's process with its model made; ended on leaving."""
    own = folder / what.replace(" ", "_")
    own.mkdir()
    for file in ("task.json", "data.npz", "traced.pt", "module.pt", "fx.pt"):
        if (folder / file).exists():
            (own / file).symlink_to(folder / file)
    console.print(f"{what} …")
    command = _command("serve", name, own, settings, options)
    with (own / "log.txt").open("w") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=_environment(command, options),
        )
    worker = Worker(what, process, own / "log.txt", options.timeout_s)
    try:
        worker.prepared = worker.answer()
        if worker.failed is not None:
            console.print(f"  {worker.failed}", markup=False)
        yield worker
    finally:
        with contextlib.suppress(BrokenPipeError):
            process.communicate(timeout=10) if process.poll() is None else None
        process.kill()
        process.wait()


def _command(
    what: str, name: str, folder: Path, settings: dict[str, Any], options: argparse.Namespace
) -> Sequence[str]:
    python = sys.executable if name == OURS else options.peer_python
    common = {"threads": options.threads, "mode": options.mode, "runtime": options.runtime}
    common["calibration_batch"] = CALIBRATION_BATCH
    return [python, str(CONTESTANT), what, name, str(folder), json.dumps(common | settings)]


def _environment(command: Sequence[str], options: argparse.Namespace) -> dict[str, str]:
    """Of a contestant's process. oneDNN's limit is not for quantflow: its runtime on torch goes by the processor."""
    limits = {}
    if options.isa is not None:
        is_ours = command[3] == OURS
        limits = {"QUANTFLOW_ISA": options.isa} if is_ours else {"ONEDNN_MAX_CPU_ISA": ISAS[options.isa]}
    return os.environ | {"OMP_NUM_THREADS": str(options.threads), "HF_HUB_OFFLINE": "1"} | limits


def _measure(
    task: Task, batch: int, workers: Sequence[Worker], gemm: Worker | None, folder: Path, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """One row per contestant, failed ones included."""
    sizes = {w.what: GEMM_SIZE if w is gemm else batch for w in (*workers, *([gemm] if gemm else ()))}
    sqnrs = {w.what: _sqnr_db(task, batch, w, folder) for w in workers}
    running = [w for w in (*workers, *([gemm] if gemm else ())) if w.failed is None]
    calls = {}
    for worker in running:
        took = worker.ask(do="run", batch=sizes[worker.what], calls=3).get("ms", [math.inf])
        calls[worker.what] = max(1, math.ceil(options.min_turn_ms / min(took)))
    rounds: dict[str, list[float]] = {w.what: [] for w in running}
    idle, elapsed = dict.fromkeys(rounds, 0.0), dict.fromkeys(rounds, 0.0)
    engine = _Engine(gemm, folder, options.threads)
    for turn in range(options.rounds):
        first = turn % max(len(running), 1)
        engine.turn()
        for worker in running[first:] + running[:first]:
            time.sleep(SETTLE_S)
            before, start = {w.what: w.cpu_s() for w in running}, time.perf_counter()
            answer = worker.ask(do="run", batch=sizes[worker.what], calls=calls[worker.what])
            took_s = time.perf_counter() - start
            rounds[worker.what].append(statistics.median(answer.get("ms", [math.nan])))
            for other in running:
                if other is not worker:
                    idle[other.what] += other.cpu_s() - before[other.what]
                    elapsed[other.what] += took_s
    rows = [
        {
            "what": w.what,
            "batch": batch,
            "status": w.failed or "ok",
            "sqnr_db": sqnrs.get(w.what),
            "calls": calls.get(w.what),
            "rounds_ms": rounds.get(w.what, []),
            "idle_cpu": idle[w.what] / elapsed[w.what] if elapsed.get(w.what) else 0.0,
            "isa": w.prepared.get("isa"),
        }
        | (_quartiles("_ms", rounds[w.what]) if w.failed is None else {})
        for w in (*workers, *([gemm] if gemm else ()))
    ]
    return _with_ratios(rows, _floor_ms(rows, task, batch, engine))


def _sqnr_db(task: Task, batch: int, worker: Worker, folder: Path) -> float | None:
    file = folder / "outputs.npy"
    worker.notes = worker.ask(do="evaluate", batch=batch, file=str(file)).get("notes", worker.notes)
    if worker.failed is not None:
        return None
    outputs = torch.from_numpy(np.load(file))
    with torch.inference_mode():
        real = torch.cat([task.module(*(x[i : i + 1] for x in task.evaluation)) for i in range(len(outputs))])
    return sqnr_db(real, outputs)


def _with_ratios(rows: list[dict[str, Any]], floor_ms: float | None) -> list[dict[str, Any]]:
    """To the peer with the least median: the median over the rounds of the two times in one round."""
    peers = [row for row in rows if row["what"] in PEERS and row["status"] == "ok"]
    fastest = min(peers, key=lambda row: row["median_ms"], default=None)
    for row in rows:
        if row["status"] != "ok" or row["what"] == GEMM:
            continue
        if fastest is not None:
            pairs = zip(row["rounds_ms"], fastest["rounds_ms"], strict=True)
            row |= _quartiles("_ratio", [a / b for a, b in pairs]) | {"fastest_peer": fastest["what"]}
        if floor_ms is not None:
            row |= {"floor_ms": floor_ms, "to floor": row["median_ms"] / floor_ms}
    return rows


class _Engine:
    """The processor's own int8 rate on the instruction set of the large linears, measured once in each round."""

    def __init__(self, gemm: Worker | None, folder: Path, threads: int) -> None:
        self.isa = None if gemm is None else gemm.prepared.get("isa")
        self.threads = threads
        self.rates: list[float] = []
        self.missing = "the large linears don't say on which instruction set they run"
        self.program: Path | None = None
        if self.isa is not None:
            self._try(lambda: setattr(self, "program", built(folder)))

    def turn(self) -> None:
        program, isa = self.program, self.isa
        if program is not None and isa is not None:
            self._try(lambda: self.rates.append(engine_rate(program, isa, self.threads)))

    def _try(self, do: Callable[[], None]) -> None:
        try:
            do()
        except NoEngineRate as error:
            self.missing, self.program = str(error), None

    def beside(self, gmacs: float) -> dict[str, Any]:
        """For the record: the rate in GMAC/s, and the share of it that `gmacs` are."""
        if not self.rates:
            return {"engine": None, "reason": self.missing}
        rate = statistics.median(self.rates)
        return {"engine": rate, "isa": self.isa, "linears": gmacs, "share": gmacs / rate}


def _floor_ms(rows: Sequence[dict[str, Any]], task: Task, batch: int, engine: _Engine) -> float | None:
    """The model's multiply-accumulates at the rate of the large linears in the same rounds."""
    gemm = next((row for row in rows if row["what"] == GEMM and row["status"] == "ok"), None)
    if gemm is None:
        return None
    per_ms = GEMM_LINEARS * GEMM_SIZE**3 / gemm["median_ms"]
    floor_ms: float = task.macs * batch / per_ms
    console.print(
        f"\nfloor: {task.macs * batch / 1e9:.3f} GMAC at the {per_ms / 1e6:.0f} GMAC/s of {GEMM_LINEARS} linears of "
        f"{GEMM_SIZE} x {GEMM_SIZE} on {GEMM_SIZE} rows: {floor_ms:.3f} ms"
    )
    gemm["engine"] = found = engine.beside(per_ms / 1e6)
    if found["engine"] is None:
        console.print(f"the engine's own rate: not measured ({found['reason']})", markup=False)
    else:
        console.print(
            f"the engine's own rate ({found['isa']}, exact products of registers): {found['engine']:.0f} GMAC/s, "
            f"of which the linears reach {found['share']:.2f}"
        )
    return floor_ms


def _quartiles(unit: str, values: Sequence[float]) -> dict[str, float]:
    low, median, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else 3 * [values[0]]
    return {f"q1{unit}": low, f"median{unit}": median, f"q3{unit}": high}


def _readable(row: dict[str, Any]) -> dict[str, Any]:
    shown = dict(row)
    if "median_ms" in row:
        shown["quartiles_ms"] = f"{row['q1_ms']:.4g} to {row['q3_ms']:.4g}"
    if "median_ratio" in row:
        shown["to fastest peer"] = row["median_ratio"]
        shown["quartiles"] = f"{row['q1_ratio']:.3f} to {row['q3_ratio']:.3f}"
    return shown


@contextlib.contextmanager
def _gemm(stack: contextlib.ExitStack, options: argparse.Namespace) -> Iterator[Worker]:
    """quantflow on a chain of large linears, on the same runtime and qconfig as the models."""
    torch.manual_seed(0)
    module = nn.Sequential(*(nn.Linear(GEMM_SIZE, GEMM_SIZE) for _ in range(GEMM_LINEARS))).eval()
    x = torch.randn(GEMM_SIZE, GEMM_SIZE)
    task = Task(GEMM, module, "random", False, (x[:CALIBRATION_BATCH],), (x,), GEMM_LINEARS * GEMM_SIZE**3)
    settings = {"qconfig": options.qconfig[0]}
    with _started(GEMM, OURS, settings, _folder(stack, task), options) as worker:
        yield worker


def _load(name: str, options: argparse.Namespace) -> Task:
    """The float model, and samples that fill every batch size."""
    calibration, evaluation = options.calibration, max(8, *options.batch)
    data: Data
    if name == BERT:
        module, data, weights = _bert(calibration, evaluation)
    elif name == "minilm":
        loaded = load_minilm("pretrained", TOKENS, seed=0)
        assert isinstance(loaded.preprocess, TextPreprocess)
        data = load_lee(loaded.preprocess, TOKENS, calibration, evaluation, CALIBRATION_BATCH, 0)
        module, weights = float_module(loaded), loaded.weights_used
    elif name == "efficientnet_lite0":
        loaded = load_efficientnet_lite0("pretrained", seed=0)
        data = photos(loaded, calibration=calibration, evaluation=evaluation, size=options.size)
        module, weights = float_module(loaded), loaded.weights_used
    else:
        module, data, weights = model_on_photos(name, options.size, calibration=calibration, evaluation=evaluation)
    is_transformer = any("Attention" in type(m).__name__ for m in module.modules())
    inputs = _inputs(data.calibration)
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        module(*(x[:1] for x in inputs))
    macs = counter.get_total_flops() // 2
    return Task(name, module, weights, is_transformer, inputs, _inputs(data.evaluation), macs)


def _bert(calibration: int, evaluation: int) -> tuple[nn.Module, Data, str]:
    import_torchvision()  # before transformers, which looks for it
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig()
    config._attn_implementation = "eager"
    module = TextEmbedding(BertModel(config, add_pooling_layer=False)).eval()
    tokens = torch.randint(0, config.vocab_size, (calibration + evaluation, TOKENS)).split([calibration, evaluation])
    made = [[Batch((ids, torch.ones_like(ids)))] for ids in tokens]
    return module, Data(*made, identity={}), "random"


def _inputs(batches: Iterable[Batch]) -> tuple[torch.Tensor, ...]:
    """Each input of the model with all samples."""
    return tuple(torch.cat(parts) for parts in zip(*(batch.args for batch in batches), strict=True))


def _folder(stack: contextlib.ExitStack, task: Task) -> Path:
    """The files that contestants read, for as long as the stack."""
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    names = [f"input{i}" for i in range(len(task.calibration))]
    try:
        torch.save(torch.fx.symbolic_trace(task.module), folder / "fx.pt")
        fx_refused = None
    except Exception as error:  # noqa: BLE001 - whatever the model's code makes of a proxy
        fx_refused = f"{type(error).__name__}: {error}"
    content = {"name": task.name, "is_transformer": task.is_transformer, "inputs": names, "fx_refused": fx_refused}
    (folder / "task.json").write_text(json.dumps(content))
    kinds = {"calibration": task.calibration, "evaluation": task.evaluation}
    arrays: dict[str, Any] = {
        f"{kind}_{name}": x.numpy() for kind, xs in kinds.items() for name, x in zip(names, xs, strict=True)
    }
    np.savez(folder / "data.npz", **arrays)
    torch.save(task.module, folder / "module.pt")
    with torch.no_grad():
        script = torch.jit.trace(task.module, tuple(x[:2] for x in task.calibration))  # type: ignore[no-untyped-call]
    script.save(str(folder / "traced.pt"))
    return folder


def _first_result(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Fresh processes in turn: from a saved model to the first result of batch 1."""
    rounds = 1 if options.smoke else 5
    rows: list[dict[str, Any]] = []
    with contextlib.ExitStack() as stack:
        folder = _folder(stack, _load(name, options))
        chosen = [each for each in _contestants(options) if each[1] in (OURS, "openvino")]
        for each in chosen:
            with _started(*each, folder, options) as worker:
                worker.ask(do="save")
            rows.append({"what": each[0], "status": worker.failed or "ok", "rounds": []})
        for turn in range(rounds + 1):
            for row, (what, known, settings) in zip(rows, chosen, strict=True):
                if row["status"] == "ok":
                    own = folder / what.replace(" ", "_")
                    found = _timed_process(_command("first", known, own, settings, options), options)
                    if "failed" in found:
                        row["status"] = found["failed"]
                    elif turn > 0:  # the first fills the system's file cache
                        row["rounds"].append(found)
    for row in rows:
        for key in FIRST_COLUMNS[1:-1]:
            row[key] = statistics.median(r[key] for r in row["rounds"]) if row["rounds"] else None
    show(f"{name}, batch 1, {options.threads} threads: {rounds} fresh processes each, medians", rows, FIRST_COLUMNS)
    return {"model": name, "rows": rows}


def _timed_process(command: Sequence[str], options: argparse.Namespace) -> dict[str, Any]:
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, env=_environment(command, options), check=False)
    process_s = time.perf_counter() - start
    if done.returncode:
        return {"failed": (done.stderr.strip().splitlines() or [f"the process ended ({done.returncode})"])[-1]}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    peak, imported = found["peak_rss_bytes"], found["imported_rss_bytes"]
    memory = {} if peak is None else {"peak_rss_mb": peak / 1e6, "model_rss_mb": (peak - imported) / 1e6}
    return found | {"process_s": process_s, **memory}


if __name__ == "__main__":
    sys.exit(main())
