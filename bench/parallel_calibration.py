"""Do several workers calibrate and evaluate to the same result as one, and how much faster?

One run of the same recipe for each number of workers and each observer, by torchrun, one thread per worker. The sha256
of the saved table and of the integer program, and the accuracy section, must not depend on the number of workers.

    python -m bench.parallel_calibration --json parallel_calibration.json
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.reporting import arguments, console, show, show_machine, write

COLUMNS = ("observer", "workers", "calibrate_s", "evaluate_s", "run_s", "samples", "table", "program", "accuracy")
FILES = {"table": "calibration.safetensors", "program": "program.json", "weights": "weights.safetensors"}


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--recipe", default="resnet18_sym_int8")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--observers", nargs="+", default=["moving_average", "histogram"])
    parser.add_argument("--samples", type=int, default=128, help="to calibrate on, and half as many to evaluate on")
    parser.add_argument("--batch", type=int, default=8)
    options = parser.parse_args()
    if options.smoke:
        options.recipe, options.workers, options.observers = "mnist_cnn_sym_int8", [1, 2], ["moving_average"]
        options.samples = 32
    found = show_machine()
    rows = [_run(observer, count, options) for observer in options.observers for count in options.workers]
    show(f"{options.recipe}, batches of {options.batch}, one thread per worker", rows, COLUMNS)
    same = all(
        len({json.dumps([row[key] for key in (*FILES, "accuracy")]) for row in rows if row["observer"] == observer})
        == 1
        for observer in options.observers
    )
    console.print("identical for any number of workers" if same else "NOT identical")
    write(options.json, {"question": "parallel_calibration", "machine": found, "runs": rows, "identical": same})
    return 0 if same else 1


def _run(observer: str, count: int, options: Any) -> dict[str, Any]:
    root = Path(__file__).resolve().parent.parent
    with tempfile.TemporaryDirectory() as folder:
        launch = ["-m", "torch.distributed.run", "--nproc-per-node", str(count)] if count > 1 else []
        command = [
            sys.executable, *launch, "-m", "quantflow", f"recipe={options.recipe}", f"observer={observer}",
            f"data.calibration={options.samples}", f"data.evaluation={options.samples // 2}",
            f"data.batch_size={options.batch}", "mode=torchscript", "benchmark=disabled", "evaluate=summary",
            "gates=none", "report=quiet", f"output={folder}/art",
        ]  # fmt: skip
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
        start = time.perf_counter()
        subprocess.run(command, cwd=folder, env=environment, check=True, stdout=subprocess.DEVNULL)
        seconds = time.perf_counter() - start
        art = Path(folder, "art")
        results = json.loads((art / "results.json").read_text())
        digests = {name: hashlib.sha256((art / file).read_bytes()).hexdigest()[:16] for name, file in FILES.items()}
    stages = {stage["name"]: stage["seconds"] for stage in results["stages"]}
    accuracy = hashlib.sha256(json.dumps(results["accuracy"], sort_keys=True).encode()).hexdigest()[:16]
    return {
        "observer": observer, "workers": results["calibration"]["workers"], "calibrate_s": stages["calibrate"],
        "evaluate_s": stages["evaluate"], "run_s": seconds, "samples": results["calibration"]["samples"],
        **digests, "accuracy": accuracy,
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
