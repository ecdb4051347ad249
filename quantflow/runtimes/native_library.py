"""The C interface of the native runtime (native/include/quantflow/native.h), by ctypes.

Finds and loads the libraries, and turns their status codes into errors. Everything here is loaded at first use, so a
missing or broken part leaves the other runtimes working.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import json
import os
import threading
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

from quantflow.errors import ArtifactError, UnavailableError
from quantflow.host.environment import cache_folder
from quantflow.host.forks import in_forked_child, is_forked_child, lock

ABI_VERSION = 5
UNSUPPORTED = 2
MAX_RANK = 16
_CAPACITY = 4096
#: torch dtype → qf_dtype. Tensors of other dtypes are read by torch only.
DTYPES = {
    torch.float32: 0, torch.uint8: 1, torch.int8: 2, torch.int32: 3, torch.int64: 4, torch.bool: 5,
}  # fmt: skip
TORCH_DTYPES = {code: dtype for dtype, code in DTYPES.items()}
#: What the SYCL backend's library needs, by distribution, in the order in which they load.
_SYCL_PARTS = (
    ("tbb", "libtbb.so.12"),
    ("intel-cmplr-lib-rt", "libimf.so"),
    ("intel-cmplr-lib-rt", "libsvml.so"),
    ("intel-cmplr-lib-rt", "libirng.so"),
    ("intel-cmplr-lib-rt", "libintlc.so.5"),
    ("umf", "libumf.so"),
    ("intel-cmplr-lib-ur", "libur_loader.so.0"),
    ("intel-sycl-rt", "libsycl.so.9"),
    ("onednn", "libdnnl.so.3"),
)
INSTALL_SYCL = "pip install 'quantflow[native]'"


class Unsupported(Exception):
    """The library has no kernel for a node, given the shapes at hand."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        where, _, self.reason = text.partition(": ")
        self.node = int(where.removeprefix("node "))


class Form(ctypes.Structure):
    """qf_form: what an input or output looks like."""

    _fields_ = (
        ("dtype", ctypes.c_int32),
        ("rank", ctypes.c_int32),
        ("dims", ctypes.c_int64 * MAX_RANK),
        ("is_channels_last", ctypes.c_int32),
        ("is_number", ctypes.c_int32),
        ("number", ctypes.c_int64),
    )

    @classmethod
    def of(cls, value: torch.Tensor | int) -> Form:
        """The form of a dense tensor, or of a plain integer."""
        if isinstance(value, int):
            return cls(is_number=1, number=value)
        form = cls(DTYPES[value.dtype], value.dim(), is_channels_last=not value.is_contiguous())
        form.dims[: value.dim()] = value.shape
        return form


class Tensor(ctypes.Structure):
    """qf_tensor: a stored tensor."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("dtype", ctypes.c_int32),
        ("rank", ctypes.c_int32),
        ("dims", ctypes.POINTER(ctypes.c_int64)),
        ("data", ctypes.c_void_p),
    )


class Handle:
    """One object of the library, freed with this one."""

    def __init__(self, pointer: ctypes.c_void_p, free: Any, keeps: Any = None) -> None:
        """`keeps`: memory that the object points to; it lives at least as long."""
        self.pointer = pointer
        self._free = free
        self._keeps = keeps

    def __del__(self) -> None:
        self._free(self.pointer)


def library_folders() -> Iterator[Path]:
    """Where the built libraries may lie: in the installed package, which a checkout on the path may hide."""
    try:
        for file in importlib.metadata.distribution("quantflow").files or ():
            if file.name.startswith("libquantflow_") and file.suffix == ".so":
                yield Path(str(file.locate())).parent
                break
    except importlib.metadata.PackageNotFoundError:
        pass
    yield Path(__file__).parents[1] / "_native"


def library_path(name: str) -> Path | None:
    """A built library's file, or None if it was not built."""
    return next((folder / name for folder in library_folders() if (folder / name).is_file()), None)


@cache
def library() -> ctypes.CDLL:
    """The native library.

    Raises:
        UnavailableError: it was not built, or does not load; says how to get it.
    """
    path = library_path("libquantflow_native.so")
    if path is None:
        raise UnavailableError(
            "runtime: 'native' was not built for this installation (it needs Linux on x86-64 and a C++17 compiler "
            "when quantflow is installed); reinstall with 'pip install --force-reinstall --no-deps quantflow' or "
            "'pip install .' in a checkout, or use runtime=torch"
        )
    try:
        loaded = ctypes.CDLL(str(path))
    except OSError as error:
        raise UnavailableError(
            f"runtime: 'native' does not load ({error}); reinstall quantflow, or use runtime=torch"
        ) from error
    for name in ("qf_program_free", "qf_backend_free", "qf_engine_free", "qf_plan_free"):
        function = getattr(loaded, name)
        function.argtypes, function.restype = (ctypes.c_void_p,), None
    loaded.qf_host_isa.restype = ctypes.c_char_p
    loaded.qf_plan_arena_bytes.restype = ctypes.c_int64
    loaded.qf_plan_run.argtypes = (*(ctypes.c_void_p,) * 4, ctypes.c_size_t)
    if (found := loaded.qf_abi_version()) != ABI_VERSION:
        raise UnavailableError(
            f"runtime: 'native' at {path} has interface {found}, this quantflow needs {ABI_VERSION}; "
            "reinstall quantflow so that both come from one version"
        )
    loaded.qf_error_sums.argtypes = (
        ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int32, ctypes.c_float, ctypes.c_int32, ctypes.c_size_t,
        ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t,
    )  # fmt: skip
    loaded.qf_host_borrow.argtypes, loaded.qf_host_borrow.restype = (ctypes.c_void_p,), None
    if (region := region_of_torch()) is not None:
        loaded.qf_host_borrow(region)
    return loaded


def region_of_torch() -> int | None:
    """Where torch's OpenMP runtime has GOMP_parallel: its threads spin for milliseconds after every torch op.

    None in a forked child, in which those threads don't exist and a parallel region waits for them forever.
    """
    if is_forked_child():
        return None
    try:
        torch_cpu = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        return ctypes.cast(torch_cpu.GOMP_parallel, ctypes.c_void_p).value
    except (OSError, AttributeError):  # a torch with threads of another kind
        return None


class _Errors(threading.local):
    """A buffer for messages per thread, because making one takes longer than the rest of a call."""

    def __init__(self) -> None:
        self.buffer = ctypes.create_string_buffer(_CAPACITY)


_errors = _Errors()
_ROOM = ctypes.c_size_t(_CAPACITY)


def call(name: str, *args: Any) -> None:
    """Call a function that reports errors.

    Raises:
        Unsupported: a node has no kernel for these shapes.
        ArtifactError: what the library refused, with its place.
    """
    error = _errors.buffer
    if status := getattr(library(), name)(*args, error, _ROOM):
        raise _refused(status, error.value)


def run_plan(plan: Handle, inputs: Any, outputs: Any) -> None:
    """`call` of qf_plan_run, which every layer of a module in imperative mode makes.

    Raises:
        Unsupported, ArtifactError: as `call`.
    """
    error = _errors.buffer
    if status := library().qf_plan_run(plan.pointer, inputs, outputs, error, _ROOM):
        raise _refused(status, error.value)


def _refused(status: int, text: bytes) -> Exception:
    words = text.decode(errors="replace")
    return Unsupported(words) if status == UNSUPPORTED else ArtifactError(words)


def make(name: str, free: str, *args: Any, keeps: Any = None) -> Handle:
    """Call a function whose last argument receives a handle (`keeps`: see Handle)."""
    pointer = ctypes.c_void_p()
    call(name, *args, ctypes.byref(pointer))
    return Handle(pointer, getattr(library(), free), keeps)


def host_isa() -> str:
    """The instruction set that the CPU kernels use here."""
    return str(library().qf_host_isa().decode())


_backends: dict[tuple[str, int], Handle] = {}
_backends_lock = lock()
_of_the_parent: list[Any] = []


def forget_backends() -> None:
    """Programs that are compiled from now on get threads of their own again; those that are keep theirs."""
    with _backends_lock:
        _backends.clear()


def _start_again() -> None:
    """A forked child makes threads of its own; the parent's are never freed, since that could wait for them."""
    for key in [key for key in _backends if key[0] == "host"]:
        _of_the_parent.append(_backends.pop(key))


in_forked_child(_start_again)


def backend(kind: str, threads: int) -> Handle:
    """The process's one backend of a kind: threads and queues are shared by all models.

    Args:
        kind: "host" (the CPU by our own kernels), "sycl.cpu" or "sycl.gpu" (SYCL and oneDNN).

    Raises:
        UnavailableError: the backend can't run here.
    """
    key = (kind, threads if kind == "host" else 0)
    with _backends_lock:
        if key not in _backends:
            if kind == "host":
                made = make("qf_backend_host", "qf_backend_free", ctypes.c_int32(threads))
            else:
                path, device = sycl_library(), kind.removeprefix("sycl.")
                try:
                    made = make(
                        "qf_backend_sycl", "qf_backend_free", str(path).encode(), device.encode(),
                        str(cache_folder()).encode(),
                    )  # fmt: skip
                except ArtifactError as error:
                    raise UnavailableError(f"device: {error}") from error
            _backends[key] = made
        return _backends[key]


@cache
def sycl_library() -> Path:
    """The SYCL backend's library, with everything it needs loaded and the CPU device findable.

    Raises:
        UnavailableError: names what is missing and the command that installs it.
    """
    path = library_path("libquantflow_sycl.so")
    if path is None:
        raise UnavailableError(
            "runtime: the native runtime's SYCL library (Intel GPUs) was not built for this installation; "
            "reinstall quantflow on Linux x86-64"
        )
    missing = []
    for distribution, file in _SYCL_PARTS:
        part = distribution_file(distribution, file)
        if part is None:
            missing.append(f"{file} of {distribution}")
            continue
        try:
            ctypes.CDLL(str(part), mode=ctypes.RTLD_GLOBAL)
        except OSError as error:
            raise UnavailableError(f"runtime: {file} does not load ({error}); reinstall: {INSTALL_SYCL}") from error
    if missing:
        raise UnavailableError(f"runtime: SYCL and oneDNN are incomplete, {', '.join(missing)}; {INSTALL_SYCL}")
    # The OpenCL loader finds Intel's CPU device by this variable only; it has to be set before SYCL starts.
    icd = distribution_file("intel-opencl-rt", "libintelocl.so")
    if icd is not None and not os.environ.get("OCL_ICD_FILENAMES"):
        os.environ["OCL_ICD_FILENAMES"] = str(icd)
    return path


def distribution_file(distribution: str, name: str) -> Path | None:
    """An installed distribution's file by its name, or None."""
    try:
        files = importlib.metadata.distribution(distribution).files or ()
    except importlib.metadata.PackageNotFoundError:
        return None
    return next((path for f in files if f.name == name and (path := Path(str(f.locate())).resolve()).is_file()), None)


def profile(plan: Handle, inputs: Any, outputs: Any, runs: int) -> list[dict[str, Any]]:
    """What a plan's kernels take, each timed alone; see qf_plan_profile in native/include/quantflow/native.h."""
    found: list[dict[str, Any]] = text_of("qf_plan_profile", plan.pointer, inputs, outputs, ctypes.c_int32(runs))
    return found


def host_rates() -> dict[str, Any]:
    """What the host's kernels are chosen by now; see qf_host_rates."""
    found: dict[str, Any] = text_of("qf_host_rates")
    return found


def text_of(name: str, *args: Any, room: int = 1 << 16) -> Any:
    """Call a function that writes JSON and says how much room it needs, once more where that was more than it had.

    Raises:
        Unsupported, ArtifactError: as `call`.
    """
    needed = ctypes.c_size_t()
    while True:
        text = ctypes.create_string_buffer(room)
        call(name, *args, text, ctypes.c_size_t(room), ctypes.byref(needed))
        if needed.value < room:
            return json.loads(text.value)
        room = needed.value + 1


class _Addresses(dict[int, Any]):
    """Count → the type of as many addresses; finding a type takes longer than making one of it."""

    def __missing__(self, count: int) -> Any:
        made = self[count] = ctypes.c_void_p * count
        return made


ADDRESSES = _Addresses()
ONE = ADDRESSES[1]


def pointers(values: Sequence[torch.Tensor | int]) -> Any:
    """Addresses of tensors' data as the library takes them; numbers have none."""
    return ADDRESSES[len(values)](*[None if isinstance(v, int) else v.data_ptr() for v in values])
