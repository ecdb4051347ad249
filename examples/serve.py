"""An artifact behind an HTTP server: loaded once, requests formed into batches, a stop that loses none.

    pip install "quantflow[serve]"
    python examples/serve.py --artifact DIR --port 8000 --threads 2 --max-batch 8 --wait-ms 2

POST /predict takes one sample and gives its result, each as the bytes of a .npy file; GET /health says that it serves.
On SIGTERM it takes no new connections, answers what it has taken, and ends. One process serves: torch and the kernels
use `--threads` cores; for more, start another process on other cores (`--cores 2,3`) behind a load balancer.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib
import io
import os
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import uvicorn
from fastapi import FastAPI, HTTPException, Request, Response

import quantflow as qf

Model = Callable[[torch.Tensor], torch.Tensor]


class Batcher:
    """Samples that arrive within `wait_ms` of each other run as one batch, of at most `max_batch`, in one thread.

    Under load nothing waits: while a batch runs the next one fills.
    """

    def __init__(self, model: Model, max_batch: int, wait_ms: float, max_waiting: int) -> None:
        self.model, self.max_batch, self.wait_s = model, max_batch, wait_ms / 1000
        self.waiting: asyncio.Queue[tuple[torch.Tensor, asyncio.Future[torch.Tensor]]] = asyncio.Queue(max_waiting)
        self.thread = ThreadPoolExecutor(1)

    async def result(self, sample: torch.Tensor) -> torch.Tensor:
        """The model's result for one sample, without the batch dimension.

        Raises:
            asyncio.QueueFull: more samples wait than may.
        """
        future = asyncio.get_running_loop().create_future()
        self.waiting.put_nowait((sample, future))
        return await future

    async def run(self) -> None:
        """Serves until it is cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            batch = [await self.waiting.get()]
            if len(batch) + self.waiting.qsize() < self.max_batch:
                await asyncio.sleep(self.wait_s)
            while len(batch) < self.max_batch and not self.waiting.empty():
                batch.append(self.waiting.get_nowait())
            samples = torch.stack([sample for sample, _ in batch])
            try:
                results = await loop.run_in_executor(self.thread, self._forward, samples)
            except Exception as error:  # noqa: BLE001 whatever it is, those who wait are told
                for _, future in batch:
                    if not future.done():
                        future.set_exception(error)
                continue
            for (_, future), result in zip(batch, results, strict=True):
                if not future.done():  # a client that went away
                    future.set_result(result)

    @torch.inference_mode()
    def _forward(self, samples: torch.Tensor) -> torch.Tensor:
        return self.model(samples)


def make_app(model: Model, shape: Sequence[int], *, max_batch: int, wait_ms: float, max_waiting: int = 256) -> FastAPI:
    """The server of a model that takes one float32 tensor (batch, *shape) and gives one tensor (batch, …)."""
    batcher = Batcher(model, max_batch, wait_ms, max_waiting)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        # Every batch size once: plans are made now, not at a request.
        for size in range(1, max_batch + 1):
            await asyncio.to_thread(batcher._forward, torch.zeros(size, *shape))
        task = asyncio.create_task(batcher.run())
        yield
        # The server has answered every request by now.
        task.cancel()
        batcher.thread.shutdown()

    app = FastAPI(lifespan=lifespan)

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "serving"}

    @app.post("/predict")
    async def predict(request: Request) -> Response:
        try:
            sample = np.load(io.BytesIO(await request.body()), allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise HTTPException(422, "the body is not one .npy array; write it with numpy.save") from error
        if sample.shape != tuple(shape) or sample.dtype != np.float32:
            found = f"{sample.dtype} {list(sample.shape)}"
            raise HTTPException(422, f"the sample is {found}; the model takes float32 {list(shape)}, without a batch")
        try:
            result = await batcher.result(torch.from_numpy(sample))
        except asyncio.QueueFull as error:
            raise HTTPException(503, f"{max_waiting} samples wait already; try again") from error
        written = io.BytesIO()
        np.save(written, result.numpy())
        return Response(written.getvalue(), media_type="application/octet-stream")

    return app


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--artifact", type=Path, required=True)
    parser.add_argument("--float", metavar="MODULE:CALLABLE", help="serve this float model in its place, to compare")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cores", help="the cores to stay on, as in 2,3")
    parser.add_argument("--max-batch", type=int, default=8)
    parser.add_argument("--wait-ms", type=float, default=2.0)
    options = parser.parse_args()
    if options.cores:
        os.sched_setaffinity(0, {int(core) for core in options.cores.split(",")})
    torch.set_num_threads(options.threads)
    loaded = qf.load(options.artifact)
    (taken,) = loaded.record.program.inputs
    model: Model = loaded
    if options.float:
        module, _, name = options.float.partition(":")
        model = getattr(importlib.import_module(module), name)()
    app = make_app(model, taken.shape[1:], max_batch=options.max_batch, wait_ms=options.wait_ms)
    uvicorn.run(app, host="127.0.0.1", port=options.port, log_level="warning", timeout_graceful_shutdown=30)


if __name__ == "__main__":
    main()
