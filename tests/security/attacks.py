"""Artifacts, recipes, files, folders and inputs made to do harm, by name: see `forked`."""

from __future__ import annotations

import contextlib
import ctypes
import io
import itertools
import json
import os
import pickle
import struct
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import quantflow as qf
from quantflow.runtimes import native_library
from quantflow.schema import Recipe
from quantflow.sources.data.tensors import load_tensors
from quantflow.sources.models.weights import apply_state, load_state
from quantflow.store.artifact import MANIFEST, read_artifact, write_artifact
from quantflow.store.journal import Journal
from quantflow.tasks.artifact import inspect, report_again
from quantflow.tasks.stage_times import earlier_times
from tests.security.forked import FOREIGN, command, guarded
from tests.security.test_hostile_files import Net

Attack = Callable[[], str | None]
X = torch.linspace(-1, 1, 2 * 3 * 64).reshape(2, 3, 8, 8)


def attacks(folder: Path) -> dict[str, Attack]:
    torch.manual_seed(0)
    good = folder / "good"
    qf.quantize(Net().eval(), [X]).save(good)
    model = qf.load(good)
    wanted = model(X)
    reference = qf.load(good, runtime="reference")
    kinds = {
        "artifact": of_artifacts(good, wanted), "input": of_inputs(model, reference), "C": of_the_c_interface(good),
        "settings": of_settings(), "file": of_files(good), "cache": of_caches(),
    }  # fmt: skip
    return {f"{kind}: {name}": attack for kind, named in kinds.items() for name, attack in named}


# --- artifacts

EVIL = "\x1b]0;pwned\x07\x1b[2J[/bold][link=file:///etc/passwd]x[/link]<script>alert(1)</script>\ud800\r\n|`"
JUNK: dict[str, Any] = {
    "null": None, "number": 7, "text": "x", "list": [1, [2]], "empty": {}, "object": {"x": {"y": 1}}, "true": True,
    "huge": 10**400, "escapes": EVIL, "infinite": 1e999,
}  # fmt: skip


def forged(good: Path, change: Callable[[dict[str, bytes]], Any]) -> Path:
    """A copy of an artifact with other content and a manifest that fits it."""
    files = read_artifact(good)
    del files[MANIFEST]
    change(files)
    return write_artifact(Path("art"), files)


def opened(path: Path, wanted: torch.Tensor) -> str | None:
    """Every way to open an artifact; the worst of what becomes of it."""
    told = []
    asked = {"task": "inspect", "artifact": str(path), "report": {"plain": True}}
    for task in (inspect, report_again):
        told.append(guarded(partial(task, Recipe.from_dict(asked), ())))
    told.append(guarded(lambda: as_wanted(qf.load(path)(X), wanted)))
    return next((t for t in told if not t.startswith(("refused", "computed"))), told[-1])


def as_wanted(result: Any, wanted: torch.Tensor) -> str | None:
    """None, or that it differs; a program may say that a call gives a constant instead of its values."""
    return None if not isinstance(result, torch.Tensor) or result.shape == wanted.shape else "differs"


def in_json(file: str, *keys: str | int, value: Any) -> Callable[[dict[str, bytes]], None]:
    def change(files: dict[str, bytes]) -> None:
        data = json.loads(files[file])
        if not keys:
            files[file] = json.dumps(value).encode()
            return
        at = data
        for key in keys[:-1]:
            at = at[key]
        at[keys[-1]] = value
        files[file] = json.dumps(data).encode()

    return change


def of_artifacts(good: Path, wanted: torch.Tensor) -> Iterator[tuple[str, Attack]]:
    results = json.loads((good / "results.json").read_text())
    plan = json.loads((good / "plan.json").read_text())
    recipe = json.loads((good / "recipe.json").read_text())
    places: list[tuple[str, tuple[str | int, ...]]] = [("results.json", (key,)) for key in results]
    places += [("results.json", (key, inner)) for key, value in results.items() if isinstance(value, dict)
               for inner in value]  # fmt: skip
    places += [("plan.json", (key,)) for key in plan]
    places += [("plan.json", ("rows", 0))] + [("plan.json", ("rows", 0, key)) for key in plan["rows"][0]]
    places += [("recipe.json", (key,)) for key in recipe]
    program = json.loads((good / "program.json").read_text())
    places += [("program.json", (key,)) for key in program]
    places += [("program.json", ("inputs", 0, key)) for key in program["inputs"][0]]
    for index, node in enumerate(program["nodes"]):
        places += [("program.json", ("nodes", index, key)) for key in node]
    for file, keys in places:
        yield f"{file} {'/'.join(map(str, keys))}", partial(forge_and_open, good, file, keys, wanted)


def forge_and_open(good: Path, file: str, keys: Any, wanted: torch.Tensor) -> str | None:
    told = {kind: opened(forged(good, in_json(file, *keys, value=junk)), wanted) for kind, junk in JUNK.items()}
    bad = [f"{t} ({kind})" for kind, t in told.items() if not t.startswith(("refused", "computed"))]
    return f"{len(bad)} of {len(told)}: " + " || ".join(b[:260] for b in bad) if bad else "computed"


# --- what a model is called with


class Tagged(torch.Tensor):
    """A subclass whose operators say no."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in ("shape", "__get__", "dim", "size"):
            return super().__torch_function__(func, types, args, kwargs or {})
        raise OSError("pwned")


class Liar(torch.Tensor):
    """A subclass that says that it is larger than it is."""

    @property
    def shape(self) -> torch.Size:  # type: ignore[override]
        return torch.Size((1 << 20, 3, 8, 8))

    def data_ptr(self) -> int:
        return 8


def overlapping() -> torch.Tensor:
    return torch.linspace(-1, 1, 64).as_strided((2, 3, 8, 8), (1, 2, 3, 1))


def shared() -> torch.Tensor:
    return X.clone().share_memory_()


def freed() -> torch.Tensor:
    x = X.clone()
    x.untyped_storage().resize_(0)
    return x


def halved() -> torch.Tensor:
    x = X.clone()
    x.untyped_storage().resize_(X.nbytes // 2)
    return x


def inference() -> torch.Tensor:
    with torch.inference_mode():
        return X.clone()


def offset(by: int) -> torch.Tensor:
    """The numbers begin at an odd place in memory."""
    memory = torch.empty(X.numel() * 4 + by, dtype=torch.uint8)
    found = torch.frombuffer(memory.numpy(), dtype=torch.float32, offset=by, count=X.numel()).view(X.shape)
    return found.copy_(X)


GIVEN: dict[str, Callable[[], Any]] = {
    "expanded over the batch": lambda: X[:1].expand(1000, 3, 8, 8),
    "expanded far beyond memory": lambda: torch.zeros(1).expand(1 << 30, 3, 8, 8),
    "expanded to 2^60 numbers": lambda: torch.zeros(1).expand(1 << 52, 3, 8, 8),
    "overlapping": overlapping,
    "strides of zero": lambda: torch.tensor(0.5).expand(2, 3, 8, 8),
    "every second column": lambda: torch.linspace(-1, 1, 6 * 128).reshape(2, 3, 8, 16)[..., ::2],
    "transposed": lambda: X.transpose(2, 3),
    "batch last": lambda: X.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
    "flipped": lambda: X.flip(3),
    "an odd address": lambda: offset(1),
    "two bytes off": lambda: offset(2),
    "no batch": lambda: X[:0],
    "0-d": lambda: torch.tensor(1.0),
    "no channels": lambda: X[:, :0],
    "no rows": lambda: X[:, :, :0],
    "five dimensions": lambda: X[None],
    "64 dimensions": lambda: X.reshape((1,) * 60 + X.shape),
    "complex": lambda: X.to(torch.complex64),
    "bfloat16": lambda: X.bfloat16(),
    "float16": lambda: X.half(),
    "float8": lambda: X.to(torch.float8_e4m3fn),
    "int64": lambda: X.long(),
    "bool": lambda: X > 0,
    "uint16": lambda: torch.ones(X.shape, dtype=torch.uint16),
    "quantized": lambda: torch.quantize_per_channel(X, torch.ones(3), torch.zeros(3), 1, torch.quint8),
    "a subclass whose operators raise": lambda: X.clone().as_subclass(Tagged),
    "a subclass that lies": lambda: X.clone().as_subclass(Liar),
    "a parameter": lambda: nn.Parameter(X.clone()),
    "a buffer": lambda: nn.Buffer(X.clone()),
    "of shared memory": shared,
    "with its memory freed": freed,
    "of inference mode": inference,
    "read-only": lambda: torch.from_numpy(__import__("numpy").broadcast_to(X.numpy(), X.shape)),
    "a numpy array": lambda: X.numpy(),
    "a list": lambda: X.tolist(),
    "a number": lambda: 7,
    "text": lambda: "x" * 1000,
    "none": lambda: None,
    "a storage": lambda: X.untyped_storage(),
    "sparse bsr": lambda: torch.eye(8).to_sparse_bsr((2, 2)),
    "jagged": lambda: torch.nested.nested_tensor([X[0], X[1]], layout=torch.jagged),
    "infinite": lambda: X.clone().fill_(float("inf")),
    "not a number": lambda: X.clone().fill_(float("nan")),
    "denormal": lambda: X * 1e-42,
    "largest": lambda: X.sign() * 3.4e38,
    "uninitialized": lambda: nn.parameter.UninitializedParameter(),
    "fake": lambda: torch._subclasses.FakeTensorMode().from_tensor(X),
    "functional": lambda: torch._to_functional_tensor(X),
    "cut to half of its memory": halved,
    "negated and strided": lambda: torch.ones(2, 3, 8, 16, dtype=torch.complex64).mul(1j).conj().imag[..., ::2],
}  # fmt: skip


def of_inputs(model: Any, reference: Any) -> Iterator[tuple[str, Attack]]:
    for name, make in GIVEN.items():
        yield name, partial(given, model, reference, make)
    yield "twice", lambda: str(model(X, X))
    yield "by another name", lambda: str(model(y=X))
    yield "by name and place", lambda: str(model(X, x=X))
    yield "changed by another thread", partial(changed_meanwhile, model)


def given(model: Any, reference: Any, make: Callable[[], Any]) -> str | None:
    """The native model refuses, or gives what the reference gives."""
    x = make()
    found = model(x)
    wanted = reference(x)
    same = found.shape == wanted.shape and torch.allclose(found, wanted, rtol=0.05, atol=0.05, equal_nan=True)
    return None if same else f"differs: {found.flatten()[:4].tolist()} {wanted.flatten()[:4].tolist()}"


def changed_meanwhile(model: Any) -> None:
    """Another thread rewrites the memory that is computed on; the numbers are anyone's, the process lives."""
    x, ended = X.clone(), threading.Event()

    def rewrite() -> None:
        while not ended.is_set():
            x.fill_(float("nan")).mul_(-1)

    other = threading.Thread(target=rewrite)
    other.start()
    for _ in range(50):
        model(x)
    ended.set()
    other.join()


# --- the C interface


def of_the_c_interface(good: Path) -> Iterator[tuple[str, Attack]]:
    program, weights = str(good / "program.json").encode(), str(good / "weights.safetensors").encode()
    text = (good / "program.json").read_bytes()

    def asked(name: str, *args: Any) -> str:
        """A call as it is; what is told, or the status."""
        error, function = ctypes.create_string_buffer(512), getattr(native_library.library(), name)
        function.argtypes = None
        handle = ctypes.c_void_p()
        status = function(*args, ctypes.byref(handle), error, ctypes.c_size_t(512))
        if not status:
            return "computed"
        return (
            f"refused {error.value.decode(errors='replace')}" if error.value else f"crashed: status {status}, no word"
        )

    size, null, none = ctypes.c_size_t, ctypes.c_void_p(None), ctypes.c_size_t(0)
    yield "no text", lambda: asked("qf_program_parse", null, size(0), null, none)
    yield "no text of some length", lambda: asked("qf_program_parse", null, size(10), null, none)
    yield "no tensors of some count", lambda: asked("qf_program_parse", text, size(len(text)), null, size(3))
    yield "half of a text", lambda: asked("qf_program_parse", text, size(len(text) // 2), null, none)
    yield "text that is none", lambda: asked("qf_program_parse", b"\xff\xfe\0" * 40, size(120), null, none)
    yield "deep text", lambda: asked("qf_program_parse", b"[" * (1 << 20), size(1 << 20), null, none)
    yield "no path", lambda: asked("qf_program_open", null, null)
    yield "no weights", lambda: asked("qf_program_open", program, null)
    yield "weights that are the program", lambda: asked("qf_program_open", program, program)
    yield "program that is the weights", lambda: asked("qf_program_open", weights, weights)
    yield "a folder", lambda: asked("qf_program_open", b"/", b"/")
    yield "a device", lambda: asked("qf_program_open", program, b"/dev/zero")
    yield "an empty path", lambda: asked("qf_program_open", b"", b"")
    yield "threads below zero", lambda: asked("qf_backend_host", ctypes.c_int32(-5))
    yield "no threads", lambda: asked("qf_backend_host", ctypes.c_int32(0))
    yield "2^31 threads", lambda: asked("qf_backend_host", ctypes.c_int32(2**31 - 1))
    yield "no library", lambda: asked("qf_backend_sycl", null, b"cpu", b"/tmp")
    yield "a library that is none", lambda: asked("qf_backend_sycl", program, b"cpu", b"/tmp")
    yield "no engine", lambda: asked("qf_engine_create", null, null)
    yield "nothing to sum", lambda: asked("qf_error_sums", null, null, 0, ctypes.c_float(1), 0, size(8))

    def freed() -> None:
        for name in ("program", "backend", "engine", "plan"):
            getattr(native_library.library(), f"qf_{name}_free")(None)

    yield "nothing to free", freed
    for name, header in HEADERS.items():
        yield f"weights whose header {name}", partial(opened_in_c, asked, program, header)


HEADERS: dict[str, bytes] = {
    "claims 2^63 bytes": struct.pack("<Q", 2**63) + b"{}",
    "ends at once": b"\2\0\0",
    "is longer than the file": struct.pack("<Q", 100) + b"{}",
    "has offsets that overflow": b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[18446744073709551612,16]}}',
    "has offsets in reverse": b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[16,0]}}',
    "has offsets below zero": b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[-16,0]}}',
    "has sizes whose product wraps": b'{"a":{"dtype":"U8","shape":[4294967296,4294967296,16],"data_offsets":[0,16]}}',
    "has 1000 dimensions": b'{"a":{"dtype":"U8","shape":[' + b"1," * 999 + b'1],"data_offsets":[0,1]}}',
    "names a dtype that is none": b'{"a":{"dtype":"F33","shape":[4],"data_offsets":[0,16]}}',
    "is a list": b"[1,2]",
    "has one name twice": b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"F32","shape":[4],'
    b'"data_offsets":[0,16]}}',
}


def safetensors(header: bytes) -> bytes:
    begun = header[:1] not in b"{["
    return header if begun else struct.pack("<Q", len(header)) + header + bytes(16)


def opened_in_c(asked: Callable[..., str], program: bytes, header: bytes) -> str:
    Path("w").write_bytes(safetensors(header))
    return asked("qf_program_open", program, b"w")


# --- settings of somebody else

BUILT = "_target_: evil.Callback\n"
CALLBACK = {"model/x.yaml": f"# @package hydra.callbacks.x\n{BUILT}"}
#: File below ../theirs → content; what the command line says besides. Each would have Hydra build an object.
SETTINGS: dict[str, tuple[dict[str, str], list[str]]] = {
    "a value too long to be read": ({"model/x.yaml": f"# @package hydra.callbacks.x\n{BUILT}pad: {'x' * 1001}\n"}, []),
    "too many values": ({"model/x.yaml": f"# @package hydra.callbacks.x\n{BUILT}pad: [{'1,' * 100_001}]\n"}, []),
    "nested too deep": ({"model/x.yaml": f"# @package hydra.callbacks.x\n{BUILT}pad: {'[' * 60}{']' * 60}\n"}, []),
    "an end of line that few know": ({"model/x.yaml": "# @foo bar\u2028# @package hydra.callbacks.x\nx: 1\n"}, []),
    "a form feed": ({"model/x.yaml": "# @foo bar\x85# @package hydra.callbacks.x\nx: 1\n"}, []),
    "named like Hydra": ({"model/hydra.yaml": "# @package _name_\nrun: {dir: ../out}\n"}, ["model=hydra"]),
    "Hydra's folder inside another": ({"model/hydra/x.yaml": "# @package _group_\nx: 1\n"}, ["model=hydra/x"]),
    "an escape to the terminal": ({"model/x.yaml": 'description: "\\e]0;pwned\\a"\n'}, []),
    "an escape in a recipe": ({"recipe/x.yaml": 'description: "\\e[2Jx"\n'}, ["recipe=x"]),
    "the beginning of an option": (CALLBACK, ["--config-di=../theirs"]),
    "Hydra's search path": (CALLBACK, ["hydra.searchpath=[../theirs]"]),
    "a search path in quotes": (CALLBACK, ["+hydra.searchpath=['file://../theirs']"]),
    "the environment": ({"model/x.yaml": "kind: entry\nentry: ${oc.env:HOME}\n"}, []),
    "a decoded resolver": ({"model/x.yaml": "kind: entry\nentry: ${oc.decode:'${oc.env:HOME}'}\n"}, []),
    "a resolver that makes values": ({"model/x.yaml": "kind: entry\nentry: ${oc.create:{_target_: os.mkdir}}\n"}, []),
    "a key that leads to itself": ({"model/x.yaml": "kind: entry\nentry: ${model.entry}\n"}, []),
    "an anchor a million times": (
        {"model/x.yaml": "a: &a [1,1,1,1,1,1,1,1,1,1]\n" + "".join(
            f"{c}: &{c} [{','.join(['*' + b] * 10)}]\n" for b, c in itertools.pairwise("abcdefgh"))}, []
    ),
    "a Python object": ({"model/x.yaml": "kind: !!python/object/apply:os.system ['touch pwned']\n"}, []),
}  # fmt: skip


def of_settings() -> Iterator[tuple[str, Attack]]:
    for name, (files, words) in SETTINGS.items():
        yield name, partial(composed, files, words, linked=False)
    yield "a folder below a link", partial(composed, CALLBACK, [], linked=True)


def composed(files: dict[str, str], words: list[str], *, linked: bool) -> str:
    here = Path("mine")
    here.mkdir()
    Path("evil.py").write_text("open('pwned', 'w').close()\n")
    for name, content in files.items():
        file = Path("elsewhere" if linked else "theirs", name)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)
    if linked:
        Path("theirs").mkdir()
        Path("theirs/model").symlink_to("../elsewhere/model")
    sys.path.insert(0, str(Path.cwd()))
    os.chdir(here)
    folder = [] if any("theirs" in word for word in words) else ["--config-dir", "../theirs"]
    named = [] if any(word.startswith(("model=", "recipe=")) for word in words) else ["model=x"]
    told = command("task=plan", *named, "data=random", "data.shape=[[4]]", *words, *folder)
    return told if told.startswith("refused") else f"not refused: {told}"


# --- files of data and weights


def npy(header: str, data: bytes = b"") -> bytes:
    text = header.encode().ljust(117) + b"\n"
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(text)) + text + data


def zipped(names: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    memory = io.BytesIO()
    with zipfile.ZipFile(memory, "w", method) as archive:
        for name, content in names.items():
            archive.writestr(name, content)
    return memory.getvalue()


class Executes:
    def __reduce__(self) -> Any:
        return os.mkdir, ("pwned",)


def of_files(good: Path) -> Iterator[tuple[str, Attack]]:
    arrays = {
        "objects": npy("{'descr': '|O', 'fortran_order': False, 'shape': (2,)}", pickle.dumps(Executes())),
        "2^60 numbers": npy("{'descr': '<f4', 'fortran_order': False, 'shape': (1152921504606846976,)}"),
        "a size below zero": npy("{'descr': '<f4', 'fortran_order': False, 'shape': (-4,)}"),
        "a header that is code": npy("__import__('os').mkdir('pwned')"),
        "a dtype of 2^31 bytes": npy("{'descr': '|V2147483647', 'fortran_order': False, 'shape': (8,)}"),
        "a void dtype": npy("{'descr': '|V4', 'fortran_order': False, 'shape': (4,)}", bytes(16)),
        "text": npy("{'descr': '<U4', 'fortran_order': False, 'shape': (4,)}", bytes(64)),
        "dates": npy("{'descr': '<M8[s]', 'fortran_order': False, 'shape': (4,)}", bytes(32)),
        "fields": npy("{'descr': [('x', '<f4')], 'fortran_order': False, 'shape': (4,)}", bytes(16)),
    }  # fmt: skip
    for name, content in arrays.items():
        yield f"an array of {name}", partial(data_of, "d.npz", zipped({"x.npy": content}))
        yield f"a plain array of {name}", partial(data_of, "d.npy", content)
    yield "a name with folders", partial(data_of, "d.npz", zipped({"../../pwned.npy": arrays["text"]}))
    for name, header in HEADERS.items():
        yield f"tensors whose header {name}", partial(data_of, "d.safetensors", safetensors(header))
        yield (
            f"an artifact's weights whose header {name}",
            partial(part_of, good, "weights.safetensors", safetensors(header)),
        )
        yield f"a table whose header {name}", partial(part_of, good, "calibration.safetensors", safetensors(header))
    yield "a pickle for weights", partial(weights_of, pickle.dumps(Executes()))
    for name, value in {"a function": {"w": os.mkdir}, "an object": {"w": Executes()}, "a list": [1],
                        "a tensor on meta": {"w": torch.empty(3, device="meta")},
                        "a sparse tensor": {"w": torch.eye(3).to_sparse()},
                        "text for a tensor": {"w": "x"}, "numbers for names": {1: torch.ones(2)}}.items():  # fmt: skip
        memory = io.BytesIO()
        with contextlib.suppress(Exception):
            torch.save(value, memory)
        yield f"{name} among weights", partial(weights_of, memory.getvalue())


def data_of(name: str, content: bytes) -> str:
    Path(name).write_bytes(content)
    load_tensors(Path(name), None, None, None, 1, 1, 1, 0)
    return "computed"


def weights_of(content: bytes) -> str:
    Path("w.pt").write_bytes(content)
    apply_state(Net(), load_state(Path("w.pt")), "w.pt")
    return "not refused"


def part_of(good: Path, file: str, content: bytes) -> str:
    found = forged(good, lambda files: files.update({file: content}))
    return f"not refused: {qf.load(found)(X).shape}"


# --- caches and what is kept


def of_caches() -> Iterator[tuple[str, Attack]]:
    junk = {"nothing": b"", "zeros": bytes(1000), "a list": b"[1]\n", "a number": b"7\n",
            "deep": b"[" * 100_000 + b"\n",
            "a huge number": b'{"name": "a", "seconds": 1e999, "format": 1, "key": "k"}\n',
            "half a line": b'{"format": 1, "key": "k"}\n{"name": "a", "sec',
            "numbers for names": b'{"format": 1, "key": "k"}\n{"name": 7, "seconds": 1.0}\n',
            "a record twice": b'{"format": 1, "key": "k"}\n' + b'{"name": "a", "seconds": 1.0}\n' * 2}  # fmt: skip
    for name, content in junk.items():
        yield f"a journal of {name}", partial(journal_of, content)
        yield f"times of {name}", partial(times_of, content)
    yield "a journal that is a pipe", partial(journal_of, None)
    yield "a journal that is a link to a foreign file", linked_journal


def journal_of(content: bytes | None) -> None:
    path = Path("j.jsonl")
    os.mkfifo(path) if content is None else path.write_bytes(content)
    with Journal(path, "k", is_cache=True) as journal:
        journal.measure("b", lambda: {"x": 1})


def linked_journal() -> None:
    Path("j.jsonl").symlink_to(f"../{FOREIGN}")
    with Journal(Path("j.jsonl"), "k", is_cache=True) as journal:
        journal.measure("b", lambda: {"x": 1})


def times_of(content: bytes) -> None:
    Path("out").mkdir()
    Path("out", "results.json").write_bytes(content)
    recipe = Recipe.from_dict({"model": {"kind": "entry", "entry": "a:b"}, "data": {"kind": "random", "shape": [[4]]}})
    earlier_times(recipe, Path("out"))
