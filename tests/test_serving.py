"""The artifact behind a server, and without Python: the examples that users start from."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import quantflow as qf
from quantflow.runtimes.native_library import library_path

ROOT = Path(__file__).parents[1]
SHAPE = (3, 16, 16)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor, torch.Tensor]:
    """An artifact, four samples and its results for them."""
    torch.manual_seed(0)
    module = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(2048, 4)
    ).eval()
    x = torch.randn(4, *SHAPE)
    model = qf.quantize(module, [x])
    folder = tmp_path_factory.mktemp("serving") / "artifact"
    model.save(folder)
    return folder, x, model(x)


def npy(x: torch.Tensor) -> bytes:
    written = io.BytesIO()
    np.save(written, x.numpy())
    return written.getvalue()


def test_the_server_batches_answers_and_stops_without_losing_a_request(saved: Any) -> None:
    httpx = pytest.importorskip("httpx", reason="the extra `serve` is not installed")
    pytest.importorskip("fastapi", reason="the extra `serve` is not installed")
    folder, x, expected = saved
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "examples/serve.py", "--artifact", folder, "--port", str(port), "--threads", "1"]
    # A second for a batch to fill: the four samples are one batch, and the signal comes while they wait.
    command += ["--wait-ms", "1000"]
    env = os.environ | {"PYTHONPATH": os.pathsep.join((str(ROOT), *sys.path))}
    with subprocess.Popen(command, cwd=ROOT, env=env) as server, httpx.Client(trust_env=False, timeout=60) as http:
        try:
            until = time.monotonic() + 60
            while True:
                try:
                    assert http.get(url + "/health").json() == {"status": "serving"}
                    break
                except httpx.TransportError:
                    assert server.poll() is None, "the server ended"
                    assert time.monotonic() < until, "the server did not begin to answer"
                    time.sleep(0.05)
            refused = http.post(url + "/predict", content=npy(x[0, :1]))
            assert refused.status_code == 422
            assert "the model takes float32 [3, 16, 16]" in refused.text
            assert http.post(url + "/predict", content=b"no array").status_code == 422
            answers: dict[int, Any] = {}
            threads = [
                threading.Thread(target=lambda i=i: answers.update({i: http.post(url + "/predict", content=npy(x[i]))}))
                for i in range(4)
            ]
            for thread in threads:
                thread.start()
            time.sleep(0.4)
            server.send_signal(signal.SIGTERM)
            for thread in threads:
                thread.join(60)
            assert server.wait(60) in (0, -signal.SIGTERM)
        finally:
            server.kill()
    for i in range(4):
        assert answers[i].status_code == 200
        assert torch.equal(torch.from_numpy(np.load(io.BytesIO(answers[i].content))), expected[i])


def test_the_artifact_runs_without_python(saved: Any, tmp_path: Path) -> None:
    library = library_path("libquantflow_native.so")
    if library is None or shutil.which("g++") is None:
        pytest.skip("needs the native library and a C++ compiler")
    folder, x, expected = saved
    program = tmp_path / "run_artifact"
    source = ROOT / "native/examples/run_artifact.cpp"
    subprocess.run(
        ["g++", "-std=c++17", "-Wall", "-Werror", source, "-I", ROOT / "native/include", library,
         f"-Wl,-rpath,{library.parent}", "-o", program],
        check=True,
    )  # fmt: skip
    written = json.loads((folder / "program.json").read_text())
    names = written["inputs"][0]["name"], written["output"]["value"]
    command = [program, folder, names[0], "x".join(map(str, x.shape)), names[1]]
    done = subprocess.run(command, input=x.numpy().tobytes(), capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert torch.equal(torch.frombuffer(bytearray(done.stdout), dtype=torch.float32).view(4, 4), expected)
    done = subprocess.run(command, input=b"short", capture_output=True, check=False)
    assert done.returncode == 1
    assert b"the input is not 3072 float32 numbers" in done.stderr
