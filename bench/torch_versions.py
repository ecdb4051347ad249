"""Which versions of torch and transformers does quantflow run on? The fast tests, in an environment for each.

    python -m bench.torch_versions --wheel dist/quantflow-*.whl
    python -m bench.torch_versions --wheel FILE --only "torch 2.9" --keep environments

Each environment is new: torch, torchvision and transformers of the row, the packages of the tests, and then quantflow's
wheel, which must leave the torch that is there (pip check, and its version again). What fails is printed by name. A
build of torch for CUDA takes 7 GB of disk while its row runs; the CPU is all that is used.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from bench.reporting import arguments, show, write

ROOT = Path(__file__).parents[1]
#: Row → what is installed first: the oldest and the newest that pyproject.toml declares, and what lies between.
VERSIONS: dict[str, tuple[str, ...]] = {
    "torch 2.9, transformers 4.50": ("torch==2.9.*", "torchvision==0.24.*", "transformers==4.50.*"),
    "torch 2.11, transformers 5": ("torch==2.11.*", "torchvision==0.26.*", "transformers>=5,<6"),
    "torch 2.13, transformers 4.50": ("torch==2.13.*", "torchvision==0.28.*", "transformers==4.50.*"),
    "torch 2.13, transformers 5": ("torch==2.13.*", "torchvision==0.28.*", "transformers>=5,<6"),
    "torch 2.14, transformers 5": ("torch==2.14.*", "torchvision==0.29.*", "transformers>=5,<6"),
}
#: Some minutes on two cores, and every place that calls what differs between versions: captures, passes, runtimes.
FAST = (
    "tests/capture/test_export.py", "tests/exchange", "tests/ir", "tests/stages/test_imperative.py",
    "tests/runtimes/test_models.py", "tests/test_api.py", "tests/test_language_models.py", "tests/test_own_loop.py",
    "tests/test_quantized.py", "tests/test_shapes_that_vary.py", "tests/test_structures.py",
)  # fmt: skip
SMOKE = ("tests/test_api.py",)
#: Of the extra `test`: what those need.
TOOLS = ("pytest", "pytest-timeout", "pytest-xdist", "hypothesis", "onnx", "onnxruntime", "scikit-image", "jsonschema")
WHAT_RUNS = (
    "import sys, torch, transformers; print(sys.version.split()[0], torch.__version__, transformers.__version__)"
)


def environment(folder: Path, packages: Sequence[str], wheel: Path) -> Path:
    """An environment's interpreter, after everything was installed.

    Raises:
        SystemExit: quantflow's wheel replaced the torch that was there.
    """
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python = folder / "bin/python"
    install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*install, *packages, *TOOLS], check=True)
    before = _printed(python, WHAT_RUNS)
    subprocess.run([*install, wheel], check=True)
    if (after := _printed(python, WHAT_RUNS)) != before:
        raise SystemExit(f"{wheel.name} replaced what was there: {before} became {after}")
    return python


def tested(python: Path, paths: Sequence[str], workers: int) -> dict[str, Any]:
    """The tests' result: counts and the names of those that failed."""
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results.xml"
        command = [python, "-m", "pytest", "-n", str(workers), "-q", "-m", "not slow", "-p", "no:cacheprovider"]
        subprocess.run(
            [*command, "--tb=line", f"--junitxml={results}", *paths], cwd=ROOT, check=False, stdout=subprocess.DEVNULL,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        suite = next(ElementTree.parse(results).iter("testsuite"))
    counts = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    failed = counts["failures"] + counts["errors"]
    names = [
        f"{case.get('classname')}::{case.get('name')}"
        for case in suite.iter("testcase")
        if case.find("failure") is not None or case.find("error") is not None
    ]
    passed = counts["tests"] - failed - counts["skipped"]
    return {
        "passed": passed,
        "failed": failed,
        "skipped": counts["skipped"],
        "seconds": suite.get("time"),
        "names": names,
    }


def declared() -> Mapping[str, Any]:
    """What pyproject.toml says of the versions."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return {
        "torch": next(d for d in project["dependencies"] if d.startswith("torch")),
        "extras": project["optional-dependencies"],
    }


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--wheel", type=Path, help="quantflow's wheel; built from this checkout where left out")
    parser.add_argument("--only", help="rows whose name holds this")
    parser.add_argument("--workers", type=int, default=2, help="processes that run tests at once")
    parser.add_argument("--keep", type=Path, help="keep the environments in this folder")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        wheel = options.wheel or _built(Path(folder))
        for name, packages in VERSIONS.items():
            if options.only and options.only not in name:
                continue
            place = (options.keep or Path(folder)) / name.replace(", ", "-").replace(" ", "-")
            python = environment(place, packages, wheel.resolve())
            rows.append(
                {
                    "row": name,
                    "versions": _printed(python, WHAT_RUNS),
                    **tested(python, SMOKE if options.smoke else FAST, options.workers),
                }
            )
            for failed in rows[-1]["names"]:
                print(f"{name}: {failed}")
            if not options.keep:
                shutil.rmtree(place)
            if options.smoke:
                break
    show(f"pyproject.toml: {declared()['torch']}", rows, ("row", "versions", "passed", "failed", "skipped", "seconds"))
    write(options.json, {"rows": rows})
    raise SystemExit(any(row["failed"] for row in rows))


def _built(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, ROOT]
    subprocess.run(command, check=True)
    return next(folder.glob("quantflow-*.whl"))


def _printed(python: Path, code: str) -> str:
    return subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    main()
