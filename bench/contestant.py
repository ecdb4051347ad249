"""One contestant of `vs_peers` in a process of its own: an int8 model, made once, that runs when it is told to.

A part of `vs_peers`, in a file of its own because it may run in another interpreter: it needs torch, numpy and the
contestant's own library, and nothing of quantflow unless the contestant is quantflow.

    python contestant.py serve NAME FOLDER SETTINGS    makes the model from FOLDER, then answers on stdout, one JSON
                                                       line for each JSON line on stdin; ends when stdin does
    python contestant.py first NAME FOLDER SETTINGS    a saved model from disk to its first result, in one JSON line

SETTINGS is JSON: {"threads": 2, "batches": [1, 16], ...}. FOLDER holds task.json, data.npz, traced.pt (TorchScript),
module.pt (the pickled module; for quantflow) and fx.pt (the module as an FX graph; for torch.ao).
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import json
import os
import platform
import sys
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any

import numpy as np

Arrays = tuple[np.ndarray, ...]
Call = Callable[[], Any]
#: From what `arguments` gives to the output.
Compiled = Callable[[Any], Any]
#: Calls of a new model that are not timed: TorchScript specializes itself on the first two.
WARM_CALLS = 5
SAVED = "saved"


class AbstractContestant(ABC):
    """How one library makes an int8 model of the task, and runs it.

    Attributes:
        isa: the instruction set of its int8 kernels, where it says so.
        packages: distributions whose versions go into the record.
        notes: what a reader of the record should know about how the model was made.
    """

    packages: tuple[str, ...] = ()
    isa: str | None = None

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.folder = folder
        self.threads = int(settings["threads"])
        self.settings = settings
        self.notes: list[str] = []

    @abstractmethod
    def prepare(self) -> None:
        """Make the int8 model from the task's float model and calibration samples."""

    @abstractmethod
    def compiled(self, example: Arrays) -> Compiled:
        """The model, ready to run on inputs with the shapes of `example`."""

    @abstractmethod
    def arguments(self, inputs: Arrays) -> Any:
        """The inputs as the compiled model takes them."""

    def save(self) -> None:
        """Write the model to `folder / SAVED` as its users would."""
        raise NotImplementedError(f"{type(self).__name__} has no saved form here")

    def load(self) -> None:
        """The model that `save` wrote, in place of `prepare`."""
        raise NotImplementedError(f"{type(self).__name__} has no saved form here")

    @functools.cached_property
    def task(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / "task.json").read_text())
        return found

    def arrays(self, kind: str) -> Arrays:
        """The inputs' samples, `kind` being "calibration" or "evaluation"."""
        with np.load(self.folder / "data.npz") as data:
            return tuple(data[f"{kind}_{name}"] for name in self.task["inputs"])

    def calibration(self) -> list[Arrays]:
        """The calibration samples one by one."""
        arrays = self.arrays("calibration")
        return [tuple(a[i : i + 1] for a in arrays) for i in range(len(arrays[0]))]

    def calibration_batches(self) -> list[Any]:
        """The calibration samples as tuples of tensors, in batches."""
        size = self.settings["calibration_batch"]
        return list(zip(*(a.split(size) for a in _tensors(self.arrays("calibration"))), strict=True))

    def versions(self) -> dict[str, str]:
        """Of Python and of those of `packages` that are installed."""
        found = {"python": platform.python_version()}
        for name in self.packages:
            with contextlib.suppress(PackageNotFoundError):
                found[name] = version(name)
        return found


class Quantflow(AbstractContestant):
    packages = ("quantflow", "torch")

    def prepare(self) -> None:
        import torch

        import quantflow
        from quantflow.sources.models.torchvision_zoo import import_torchvision

        torch.set_num_threads(self.threads)
        with contextlib.suppress(quantflow.QuantflowError):
            import_torchvision()  # the pickled module may need it
        module = torch.load(self.folder / "module.pt", weights_only=False)
        batches = self.calibration_batches()
        chosen = {key: self.settings[key] for key in ("qconfig", "mode", "runtime")}
        self.model: Any = quantflow.quantize(module, batches, evaluation=batches[:1], device="cpu", **chosen)
        proof = self.model.results["int8_proof"]
        self.notes.append(f"{proof['int8_layers_run']} of {proof['core_layers']} layers int8")
        runtime = self.model.compiled.choice.runtime.name
        self.notes.append(f"runtime {runtime}")
        if runtime == "native":
            from quantflow.runtimes.native_library import host_isa

            self.isa = host_isa()

    def compiled(self, example: Arrays) -> Compiled:  # noqa: ARG002 - one model for all shapes
        return _inference(self.model)

    def arguments(self, inputs: Arrays) -> Any:
        return _tensors(inputs)

    def save(self) -> None:
        self.model.save(self.folder / SAVED)

    def load(self) -> None:
        import torch

        import quantflow

        torch.set_num_threads(self.threads)
        self.model = quantflow.load(self.folder / SAVED, runtime=self.settings["runtime"], device="cpu")


class OpenVino(AbstractContestant):
    """The PyTorch front end, NNCF's defaults for the kind of model, a fixed shape per batch size."""

    packages = ("openvino", "nncf", "torch", "numpy")
    isa = os.environ.get("ONEDNN_MAX_CPU_ISA")
    # Of float parts. It chooses bfloat16 by what the processor has, and then finds no kernel within a limit.
    precision = None if isa is None else "f32"

    def prepare(self) -> None:
        import nncf

        samples = self.calibration()
        kind = nncf.ModelType.TRANSFORMER if self.task["is_transformer"] else None
        self.model = nncf.quantize(
            self.converted(samples[0]), nncf.Dataset(samples), model_type=kind, subset_size=len(samples)
        )
        self.notes.append(f"model_type {kind}")

    def converted(self, sample: Arrays) -> Any:
        """The float model in OpenVINO's form, for any batch size."""
        import openvino
        import torch

        script = torch.jit.load(self.folder / "traced.pt").eval()  # type: ignore[no-untyped-call]
        model = openvino.convert_model(script, example_input=_tensors(sample))
        model.reshape(dict(enumerate([-1, *a.shape[1:]] for a in sample)))
        return model

    def compiled(self, example: Arrays) -> Compiled:
        import openvino

        model = self.model.clone()
        model.reshape(dict(enumerate(a.shape for a in example)))
        hints = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": self.threads}
        if self.precision is not None:
            hints["INFERENCE_PRECISION_HINT"] = self.precision
        compiled = openvino.Core().compile_model(model, "CPU", hints)
        note = f"float parts in {compiled.get_property('INFERENCE_PRECISION_HINT').to_string()}"
        if note not in self.notes:
            self.notes.append(note)
        request = compiled.create_infer_request()
        return lambda inputs: request.infer(inputs, share_inputs=True, share_outputs=True)[0]

    def arguments(self, inputs: Arrays) -> Any:
        return dict(enumerate(inputs))

    def save(self) -> None:
        import openvino

        (self.folder / SAVED).mkdir()
        model = self.model.clone()
        model.reshape(dict(enumerate([1, *a.shape[1:]] for a in self.calibration()[0])))
        openvino.save_model(model, self.folder / SAVED / "model.xml")

    def load(self) -> None:
        import openvino

        self.model = openvino.Core().read_model(self.folder / SAVED / "model.xml")


class OpenVinoBfloat16(OpenVino):
    """The float model, not quantized, computed in bfloat16."""

    packages = ("openvino", "torch", "numpy")
    precision = "bf16"

    def prepare(self) -> None:
        self.model = self.converted(self.calibration()[0])


class OnnxRuntime(AbstractContestant):
    """QDQ: uint8 activations, per-channel int8 weights, MinMax; transformers: MatMul and Gemm only."""

    packages = ("onnxruntime", "onnx", "torch", "numpy")

    def prepare(self) -> None:
        import torch
        from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

        # Of a model that is traced already the exporter knows no shapes, which some operators need.
        torch.backends.mha.set_fastpath_enabled(False)
        if self.task["fx_refused"]:
            module = torch.jit.load(self.folder / "traced.pt").eval()  # type: ignore[no-untyped-call]
        else:
            module = _without_graph(torch.load(self.folder / "fx.pt", weights_only=False)).eval()
        names = self.task["inputs"]
        torch.onnx.export(
            module,
            _tensors(tuple(a[:2] for a in self.arrays("calibration"))),
            str(self.folder / "model.onnx"),
            dynamo=False,  # the exporter that also takes a traced model
            input_names=names,
            dynamic_axes={name: {0: "n"} for name in names},
            opset_version=17,
        )
        samples = iter([dict(zip(names, sample, strict=True)) for sample in self.calibration()])

        class Reader(CalibrationDataReader):  # type: ignore[misc]
            def get_next(self) -> dict[str, np.ndarray] | None:
                return next(samples, None)

        quantize_static(
            self._prepared(),
            str(self.folder / "int8.onnx"),
            Reader(),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            op_types_to_quantize=["MatMul", "Gemm"] if self.task["is_transformer"] else None,
        )

    def _prepared(self) -> str:
        from onnxruntime.quantization.shape_inference import quant_pre_process

        source, prepared = str(self.folder / "model.onnx"), str(self.folder / "prepared.onnx")
        try:
            quant_pre_process(source, prepared)
        except Exception as error:  # noqa: BLE001 - it raises plain Exception when it can't infer a shape
            self.notes.append(f"quant_pre_process without symbolic shapes: {_first_line(error)}")
            quant_pre_process(source, prepared, skip_symbolic_shape=True)
        return prepared

    def compiled(self, example: Arrays) -> Compiled:
        import onnx
        import onnxruntime
        from onnxruntime.tools.onnx_model_utils import make_dim_param_fixed

        model = onnx.load(str(self.folder / "int8.onnx"))
        make_dim_param_fixed(model.graph, "n", len(example[0]))
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.threads
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        return lambda inputs: session.run(None, inputs)[0]

    def arguments(self, inputs: Arrays) -> Any:
        return dict(zip(self.task["inputs"], inputs, strict=True))


class TorchAo(AbstractContestant):
    """FX with the engine's default qconfig, then TorchScript, traced and frozen; channels last inside."""

    packages = ("torch", "numpy")
    engine = "x86"

    def prepare(self) -> None:
        import torch
        from torch.ao.quantization import get_default_qconfig_mapping
        from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

        torch.set_num_threads(self.threads)
        if refused := self.task["fx_refused"]:
            raise ValueError(f"torch.fx.symbolic_trace refuses the model: {refused}")
        module = torch.load(self.folder / "fx.pt", weights_only=False).eval()
        batches = self.calibration_batches()
        if batches[0][0].dim() == 4:
            module = module.to(memory_format=torch.channels_last)
        torch.backends.quantized.engine = self.engine
        prepared = prepare_fx(module, get_default_qconfig_mapping(self.engine), batches[0])
        with torch.no_grad():
            for batch in batches:
                prepared(*batch)
            self.model: Any = convert_fx(prepared)

    def compiled(self, example: Arrays) -> Compiled:
        import torch

        with torch.no_grad():
            traced = torch.jit.trace(self.model, _tensors(example))  # type: ignore[no-untyped-call]
            return _inference(torch.jit.freeze(traced))

    def arguments(self, inputs: Arrays) -> Any:
        return _tensors(inputs)


CONTESTANTS: dict[str, type[AbstractContestant]] = {
    "quantflow": Quantflow,
    "openvino": OpenVino,
    "openvino_bf16": OpenVinoBfloat16,
    "onnxruntime": OnnxRuntime,
    "torch_ao": TorchAo,
}
#: Imported before the clock of `first` starts.
IMPORTS = {"quantflow": ("quantflow",), "openvino": ("openvino",)}


def main() -> None:
    what, name, folder, settings = sys.argv[1:]
    with _only_us_on_stdout() as out:
        contestant = CONTESTANTS[name]
        if what == "serve":
            _serve(lambda: contestant(Path(folder), json.loads(settings)), out)
        else:
            _first(name, contestant(Path(folder), json.loads(settings)), out)


def _serve(make: Callable[[], AbstractContestant], out: IO[str]) -> None:
    """Answers {"do": "run" | "evaluate" | "save", ...} until stdin ends; a failure is an answer too."""
    compiled: dict[int, Compiled] = {}
    try:
        start = time.perf_counter()
        contestant = make()
        contestant.prepare()
        prepared = {"seconds": time.perf_counter() - start, "versions": contestant.versions(), "isa": contestant.isa}
        evaluation = contestant.arrays("evaluation")
    except Exception as error:  # noqa: BLE001 - every reason is reported
        _answer(out, _failure(error))
        return
    _answer(out, prepared)
    for line in sys.stdin:
        order = json.loads(line)
        try:
            answer: dict[str, Any]
            if order["do"] == "save":
                contestant.save()
                answer = {}
            else:
                batch = order["batch"]
                chunks = [contestant.arguments(chunk) for chunk in _chunks(evaluation, batch)]
                if batch not in compiled:
                    compiled[batch] = contestant.compiled(_chunks(evaluation, batch)[0])
                    for _ in range(WARM_CALLS):
                        compiled[batch](chunks[0])
                if order["do"] == "run":
                    answer = {"ms": _times_ms(functools.partial(compiled[batch], chunks[0]), order["calls"])}
                else:
                    outputs = [np.array(compiled[batch](chunk)) for chunk in chunks]
                    np.save(order["file"], np.concatenate(outputs))
                    answer = {"notes": contestant.notes}
        except Exception as error:  # noqa: BLE001 - every reason is reported
            answer = _failure(error)
        _answer(out, answer)


def _first(name: str, contestant: AbstractContestant, out: IO[str]) -> None:
    inputs = tuple(a[:1].copy() for a in contestant.arrays("evaluation"))
    for package in IMPORTS[name]:
        importlib.import_module(package)
    imported = _peak_rss_bytes()
    start = time.perf_counter()
    contestant.load()
    compiled = contestant.compiled(inputs)
    loaded = time.perf_counter()
    np.asarray(compiled(contestant.arguments(inputs)))
    end = time.perf_counter()
    _answer(
        out,
        {
            "load_s": loaded - start,
            "first_call_s": end - loaded,
            "after_imports_s": end - start,
            "imported_rss_bytes": imported,
            "peak_rss_bytes": _peak_rss_bytes(),
            "versions": contestant.versions(),
        },
    )


def _chunks(inputs: Arrays, batch: int) -> list[Arrays]:
    """All full batches of the samples, in order."""
    starts = range(0, len(inputs[0]) - batch + 1, batch)
    return [tuple(np.ascontiguousarray(a[i : i + batch]) for a in inputs) for i in starts]


def _tensors(inputs: Arrays) -> Any:
    import torch

    return tuple(torch.from_numpy(a) for a in inputs)


def _without_graph(module: Any) -> Any:
    """The module inside another one: the exporter takes anything with a `graph` for TorchScript."""
    import torch

    class Plain(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = module

        def forward(self, *inputs: Any) -> Any:
            return self.module(*inputs)

    return Plain()


def _inference(model: Callable[..., Any]) -> Compiled:
    import torch

    def run(inputs: Any) -> Any:
        with torch.inference_mode():
            return model(*inputs)

    return run


def _times_ms(call: Call, calls: int) -> list[float]:
    """Milliseconds of each of `calls` calls, after one that fetches the model back into the caches."""
    call()
    times = []
    gc.disable()
    try:
        for _ in range(calls):
            start = time.perf_counter_ns()
            call()
            times.append((time.perf_counter_ns() - start) / 1e6)
    finally:
        gc.enable()
    return times


def _peak_rss_bytes() -> int | None:
    """Of this program only: `ru_maxrss` would also count the parent that it was started from."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return None


@contextlib.contextmanager
def _only_us_on_stdout() -> Iterator[IO[str]]:
    """The real stdout; what libraries print goes to stderr."""
    with os.fdopen(os.dup(1), "w") as out:
        os.dup2(2, 1)
        yield out


def _answer(out: IO[str], content: Mapping[str, Any]) -> None:
    out.write(json.dumps(content) + "\n")
    out.flush()


def _failure(error: Exception) -> dict[str, str]:
    traceback.print_exc()
    return {"failed": _first_line(error)}


def _first_line(error: Exception) -> str:
    lines: Sequence[str] = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:300]


if __name__ == "__main__":
    main()
