"""Does the native runtime agree with the reference runtime, for every shipped recipe and several batch sizes?

Every recipe is built on a few calibration samples, and each int8 and float node is run on the reference's own values:
at most one code apart, and only next to a rounding tie, or a run ends there. "whole" is the SQNR of the whole model's
output against the reference's: infinite where every code is the same, and low where a single code that rounds the other
way early in the model is amplified by what follows.

    python -m bench.agreement --json agreement.json
"""

from __future__ import annotations

import sys
import tempfile
from typing import Any

from bench.reporting import arguments, console, show, show_machine, write
from quantflow.config.compose import load_recipe
from quantflow.config.recipe_file import recipe_files
from quantflow.executor.order import build
from quantflow.executor.run import Run
from quantflow.executor.source import load_source
from quantflow.report import Progress
from quantflow.runtimes import choose_runtime
from quantflow.stages.benchmark import resized
from quantflow.stages.compile import compile_program
from quantflow.stages.warmup import warmup

COLUMNS = ("recipe", "batch", "nodes", "one-code differences", "whole_db")
#: Searches start from another recipe, and the template has no model.
LEFT_OUT = ("template", "efficientnet_lite0_tuned", "minilm_tuned")


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--recipes", nargs="+", metavar="NAME", help="these alone")
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 3, 16])
    options = parser.parse_args()
    found = show_machine()
    if options.smoke:
        options.recipes, options.batch = ["mnist_cnn_sym_int8"], [1, 3]
    rows = []
    for name in options.recipes or [name for name in sorted(recipe_files()) if name not in LEFT_OUT]:
        rows += _rows(name, options.batch)
    show("native against reference", rows, COLUMNS)
    write(options.json, {"question": "agreement", "machine": found, "rows": rows})
    return 0


def _rows(name: str, sizes: list[int]) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        overrides = ["data.calibration=16", "data.evaluation=16", "runtime=native", f"output={folder}/run"]
        recipe = load_recipe(name, overrides)
        source = load_source(recipe)
        with Progress(console) as progress:
            built = build(Run.of(recipe, source, progress))
    program = built.program
    compiled = compile_program(program, choose_runtime("native"))
    samples = next(iter(source.data.evaluation))
    rows = []
    for size in sizes:
        batch = resized(samples, size)
        seen = warmup(compiled, batch, iterations=1)
        row = {
            "recipe": name,
            "batch": size,
            "nodes": seen.layers_checked,
            "one-code differences": seen.one_code_differences,
            "whole_db": seen.sqnr_vs_reference_db,
        }
        rows.append(row)
        console.print(f"{name}, batch {size}: {row['nodes']} nodes agree, whole {row['whole_db']:.1f} dB")
    return rows


if __name__ == "__main__":
    sys.exit(main())
