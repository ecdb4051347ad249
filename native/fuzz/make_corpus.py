"""Write the seed corpus: small real programs, as the fuzz targets read them.

python native/fuzz/make_corpus.py native/fuzz/corpus
"""

import json
import struct
import sys
from pathlib import Path

from quantflow.stages.record import weights_bytes
from quantflow.tasks.selftest import selftest_programs

folder = Path(sys.argv[1])
folder.mkdir(parents=True, exist_ok=True)
for number, (name, program) in enumerate(selftest_programs()):
    text = json.dumps(program.to_json(), separators=(",", ":")).encode()
    file = folder / f"{number:03}_{name.replace(' ', '_')}"
    file.write_bytes(struct.pack("<I", len(text)) + text + weights_bytes(program))
