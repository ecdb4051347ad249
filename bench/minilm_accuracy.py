"""How much of all-MiniLM-L6-v2 (real weights) is left when every linear is int8?

Spearman correlation with people's ratings of the 50 Lee documents, float and int8, and the cosine between float's and
int8's embedding of each document. Calibration: 64 of Lee's background documents. `seconds` is all of
`quantize`, warm-up and verification included.

    python -m bench.minilm_accuracy --algorithms none fast best --json minilm_accuracy.json
"""

from __future__ import annotations

import sys
from typing import Any

from bench.accuracy import variants
from bench.photo_models import float_module
from bench.reporting import arguments, console, show, show_machine, write
from quantflow.sources.data import TextPreprocess
from quantflow.sources.data.text import load_lee
from quantflow.sources.models.transformers_zoo import load_minilm
from quantflow.stages.evaluate import EMBEDDING, SPEARMAN, evaluate

#: #2 asks for a Spearman at most this far below float's.
MARGIN = 0.02
#: The worst texts shown; all of them are in the JSON file.
WORST = 5
COLUMNS = (
    "what", "int8/core", "spearman_float", "spearman_int8", "drop", "cosine_mean", "cosine_min", "sqnr_db", "max_error",
    "seconds",
)  # fmt: skip


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--qconfig", nargs="+", default=["sym_int8", "affine_uint8"], help="presets' names")
    parser.add_argument("--observer", nargs="+", default=["minmax"], help="activation observers, each with each preset")
    parser.add_argument("--algorithms", nargs="+", default=["none"], help="presets' names, each with each of these")
    parser.add_argument("--mode", default="export", choices=("export", "torchscript", "imperative"))
    parser.add_argument("--max-length", type=int, default=128, help="tokens per text (default 128)")
    parser.add_argument("--calibration", type=int, default=64, help="texts")
    parser.add_argument("--evaluation", type=int, default=50, help="texts, at most 50")
    options = parser.parse_args()
    if options.smoke:
        options.qconfig, options.max_length, options.calibration, options.evaluation = ["sym_int8"], 16, 4, 6
    found = show_machine()
    loaded = load_minilm("pretrained", options.max_length, seed=0)
    module = float_module(loaded)
    assert isinstance(loaded.preprocess, TextPreprocess)
    data = load_lee(loaded.preprocess, options.max_length, options.calibration, options.evaluation, 16, 0)
    rows: list[dict[str, Any]] = []
    for preset, observer, algorithms, model, seconds in variants(module, data, options):
        figures = evaluate(module, model, data.evaluation, metric=SPEARMAN, outputs=EMBEDDING)
        proof, metric = model.results["int8_proof"], figures["metric"]
        rows.append(
            {
                "what": f"quantflow {preset} {observer} {algorithms}",
                "int8/core": f"{proof['int8_layers_run']}/{proof['core_layers']}",
                "spearman_float": metric["float"],
                "spearman_int8": metric["int8"],
                "drop": metric["drop"],
                "cosine_mean": figures["cosine_mean"],
                "cosine_min": figures["cosine_min"],
                "sqnr_db": figures["sqnr_db"],
                "max_error": figures["max_error"],
                "seconds": seconds,
                "stages": model.results["stages"],
                "algorithms": model.results["algorithms"],
                "cosines": figures["cosine_per_sample"],
            }
        )
    title = f"all-MiniLM-L6-v2, {options.calibration} + {options.evaluation} texts of {options.max_length} tokens"
    show(f"{title}, mode={options.mode}", rows, COLUMNS)
    for row in rows:
        worst = sorted(row["cosines"], key=lambda each: each["cosine"])[:WORST]
        console.print(f"{row['what']}, worst texts: " + ", ".join(f"{w['id']} {w['cosine']:.4f}" for w in worst))
    over = [row["what"] for row in rows if not row["drop"] <= MARGIN]
    console.print(f"more than {MARGIN} below float: {', '.join(over)}" if over else f"all within {MARGIN} of float")
    write(
        options.json,
        {
            "question": "minilm_accuracy",
            "weights": loaded.weights_used,
            "data": data.identity,
            "mode": options.mode,
            "machine": found,
            "results": rows,
        },
    )
    return 1 if over and not options.smoke else 0


if __name__ == "__main__":
    sys.exit(main())
