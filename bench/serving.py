"""How many requests a second does examples/serve.py answer, and how late is the slowest percent: int8 beside float?

    python -m bench.serving --seconds 60 --clients 16 --threads 1

Each server is a process of its own on the loopback; the clients are one asyncio process that asks again as soon as it
was answered. At the end the server gets SIGTERM while requests are in flight: each must be answered or its connection
refused, and the process must end by that signal. Needs the extra `serve`, and torchvision.
"""

from __future__ import annotations

import asyncio
import io
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch
from torch import nn

import quantflow as qf
from bench.reporting import arguments, show, show_machine, write
from quantflow.sources.models.torchvision_zoo import import_torchvision

ROOT = Path(__file__).parents[1]


def float_model() -> nn.Module:
    """ResNet-18, seeded."""
    torch.manual_seed(0)
    return import_torchvision().models.resnet18().eval()  # type: ignore[no-any-return]


async def load(url: str, body: bytes, clients: int, seconds: float, server: subprocess.Popen[bytes]) -> dict[str, Any]:
    """Latencies while every client asks without a pause, and what became of those in flight at the SIGTERM."""
    latencies: list[float] = []
    errors: list[str] = []
    refused = 0
    stopping = asyncio.Event()

    async def client(http: httpx.AsyncClient) -> None:
        nonlocal refused
        while True:
            begun = time.perf_counter()
            try:
                answer = await http.post(url + "/predict", content=body)
            except httpx.ConnectError:
                if not stopping.is_set():
                    errors.append("refused before the stop")
                refused += 1
                return
            except httpx.HTTPError as error:
                errors.append(f"{type(error).__name__}{' in flight at the stop' if stopping.is_set() else ''}")
                return
            if answer.status_code != 200:
                errors.append(str(answer.status_code))
            if stopping.is_set():
                return
            latencies.append(time.perf_counter() - begun)

    limits = httpx.Limits(max_connections=clients)
    async with httpx.AsyncClient(timeout=60, limits=limits, trust_env=False) as http:
        tasks = [asyncio.create_task(client(http)) for _ in range(clients)]
        await asyncio.sleep(seconds)
        stopping.set()
        server.send_signal(signal.SIGTERM)
        await asyncio.gather(*tasks)
    return {"latencies": latencies, "errors": errors, "refused": refused}


def served(name: str, extra: list[str], artifact: Path, options: Any) -> dict[str, Any]:
    """One server's row."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "examples/serve.py", "--artifact", str(artifact), "--port", str(port), *extra]
    command += ["--threads", str(options.threads), "--max-batch", str(options.max_batch)]
    env = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    with subprocess.Popen(command, cwd=ROOT, env=env) as server:
        try:
            wait_for(url, server)
            sample = io.BytesIO()
            np.save(sample, np.random.default_rng(0).standard_normal((3, options.size, options.size), np.float32))
            seen = asyncio.run(load(url, sample.getvalue(), options.clients, options.seconds, server))
            code = server.wait(60)
        finally:
            server.kill()
    ms = sorted(1000 * each for each in seen["latencies"])
    return {
        "model": name, "requests": len(ms), "per_second": len(ms) / options.seconds, "p50_ms": statistics.median(ms),
        "p99_ms": ms[int(0.99 * len(ms))], "errors": len(seen["errors"]), "said": sorted(set(seen["errors"])),
        "exit_code": code,
    }  # fmt: skip


def wait_for(url: str, server: subprocess.Popen[bytes]) -> None:
    """Returns once the server answers.

    Raises:
        SystemExit: it ended, or did not answer within two minutes.
    """
    until = time.monotonic() + 120
    while time.monotonic() < until and server.poll() is None:
        try:
            httpx.get(url + "/health", trust_env=False)
            return
        except httpx.TransportError:
            time.sleep(0.1)
    raise SystemExit(f"the server did not begin to answer on {url}; its exit code: {server.poll()}")


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--max-batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=224)
    options = parser.parse_args()
    if options.smoke:
        options.seconds, options.clients, options.max_batch, options.size = 1.0, 4, 2, 64
    machine = show_machine()
    with tempfile.TemporaryDirectory() as folder:
        artifact = Path(folder) / "artifact"
        batches = [torch.randn(4, 3, options.size, options.size) for _ in range(2)]
        qf.quantize(float_model(), batches).save(artifact)
        rows = [
            served("int8", [], artifact, options),
            served("float32", ["--float", "bench.serving:float_model"], artifact, options),
        ]
    show("ResNet-18 behind examples/serve.py", rows, list(rows[0]))
    write(options.json, {"machine": machine, "rows": rows})
    raise SystemExit(any(row["errors"] or row["exit_code"] not in (0, -signal.SIGTERM) for row in rows))


if __name__ == "__main__":
    main()
