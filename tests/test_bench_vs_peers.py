from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench.engine_rate import NoEngineRate, built, engine_rate
from bench.vs_peers import CONTESTANT, ISAS, OURS, _with_ratios
from quantflow import QuantflowError
from quantflow.runtimes.native_library import host_isa, library

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_smoke(tmp_path: Path) -> None:
    file = tmp_path / "vs_peers.json"
    command = [sys.executable, "-m", "bench.vs_peers", "--smoke", "--runtime", "torch", "--threads", "1"]
    done = subprocess.run([*command, "--json", file], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (model,) = json.loads(file.read_text())["models"]
    rows = {row["what"]: row for row in model["rows"]}
    assert set(rows) == {f"{OURS} sym_int8", "openvino", "onnxruntime", "torch_ao"}
    for name in (f"{OURS} sym_int8", "torch_ao"):
        assert rows[name]["status"] == "ok"
        assert rows[name]["sqnr_db"] > 15
        assert len(rows[name]["rounds_ms"]) == 2
        assert rows[name]["median_ratio"] > 0


def test_a_contestant_that_fails_says_why(tmp_path: Path) -> None:
    command = [sys.executable, str(CONTESTANT), "serve", "torch_ao", str(tmp_path), json.dumps({"threads": 1})]
    done = subprocess.run(command, input="", capture_output=True, text=True, check=True)
    assert "task.json" in json.loads(done.stdout)["failed"]


def test_ratios_are_taken_within_rounds_and_to_the_fastest_peer() -> None:
    rows = [
        {"what": f"{OURS} sym_int8", "status": "ok", "rounds_ms": [1.0, 4.0, 3.0], "median_ms": 3.0},
        {"what": "openvino", "status": "ok", "rounds_ms": [2.0, 4.0, 2.0], "median_ms": 2.0},
        {"what": "onnxruntime", "status": "ok", "rounds_ms": [9.0, 9.0, 9.0], "median_ms": 9.0},
        {"what": "torch_ao", "status": "refused", "rounds_ms": []},
    ]
    ours, openvino, _, torch_ao = _with_ratios(rows, floor_ms=1.5)
    assert (ours["fastest_peer"], ours["median_ratio"], ours["to floor"]) == ("openvino", 1.0, 2.0)
    assert openvino["median_ratio"] == 1.0
    assert "median_ratio" not in torch_ao


def test_the_engine_has_a_rate_on_the_instruction_set_that_our_kernels_use(tmp_path: Path) -> None:
    try:
        library()
        program = built(tmp_path)
    except (QuantflowError, NoEngineRate) as error:
        pytest.skip(str(error))
    if host_isa() in ISAS:
        assert engine_rate(program, host_isa(), 1) > 0.1
    with pytest.raises(NoEngineRate, match="no loop of products that runs here on generic"):
        engine_rate(program, "generic", 1)
