"""Write the seed corpus: small real programs, and those that once ended the process, as the fuzz targets read them.

python -m native.fuzz.make_corpus native/fuzz/corpus
"""

import json
import struct
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save

from quantflow.stages.record import weights_bytes
from quantflow.tasks.selftest import selftest_programs
from tests.security.test_hostile_programs import PROGRAMS
from tests.security.worker import stored

#: Hostile programs that ended in a signal, or read what nobody had written.
PAST = (
    "permute with a dimension twice", "mean over one dimension four times", "layer_norm of what is not there",
    "layer_norm with a short weight", "layer_norm with an expanded weight", "linear with a short bias",
    "linear by a transposed weight", "where with one argument", "masked_fill without a value",
    "masked_fill without anything", "flatten backwards", "pixel_shuffle by 2^32", "repeat whose product wraps",
    "split that does not sum up", "conv with a short bias", "images of a size and a scale", "roll by 2^63",
    "codes padded by NaN", "sizes that wrap to 16", "stack of other ranks at the end",
    "a convolution of lines longer than a task", "positions at both ends of 64 bits",
    "a norm of no channels",
)  # fmt: skip


def write(file: Path, program: Mapping[str, Any], weights: bytes) -> None:
    text = json.dumps(program, separators=(",", ":")).encode()
    file.write_bytes(struct.pack("<I", len(text)) + text + weights)


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number, (name, program) in enumerate(selftest_programs()):
        write(folder / f"{number:03}_{name.replace(' ', '_')}", program.to_json(), weights_bytes(program))
    for name in PAST:
        text = json.dumps(PROGRAMS[name])
        used = {key: tensor for key, tensor in stored().items() if f'"tensor": "{key}"' in text}
        write(folder / f"past_{name.replace(' ', '_')}", PROGRAMS[name], save(used))
    # A header whose sizes multiply to 16 modulo 2^64.
    header = {"x": {"dtype": "U8", "shape": [2**32, 2**32, 16], "data_offsets": [0, 16]}}
    text = json.dumps(header, separators=(",", ":")).encode()
    wraps = struct.pack("<Q", len(text)) + text + bytes(16)
    empty = {"format": 1, "inputs": [], "values": {}, "nodes": [], "output": []}
    write(folder / "past_a_U8_tensor_whose_product_wraps", empty, wraps)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
