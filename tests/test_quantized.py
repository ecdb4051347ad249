"""A quantized model among other code: its results, copies, processes, traces, compilers, gradients and conversions."""

from __future__ import annotations

import copy
import multiprocessing
import pickle
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.utils.data import DataLoader, Dataset

import quantflow as qf
from quantflow.errors import UsageError

#: (mode, runtime): whatever runs a model by its own code.
KINDS = [
    ("export", "native"),
    ("export", "torch"),
    ("export", "reference"),
    ("torchscript", "native"),
    ("torchscript", "torch"),
    ("imperative", "native"),
    ("imperative", "torch"),
    ("imperative", "reference"),
]
IDS = ["-".join(kind) for kind in KINDS]
X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
OTHER = 2 * torch.randn(7, 3, 8, 8, generator=torch.Generator().manual_seed(2))


def net() -> nn.Module:
    torch.manual_seed(0)
    convs = (nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3, stride=2))
    return nn.Sequential(*convs, nn.Flatten(1), nn.Linear(36, 6)).eval()


class Around(nn.Module):
    """A user's module with a quantized one inside."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.before = nn.Conv2d(3, 3, 1)
        self.model = model
        self.head = nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.model(self.before(x)))  # type: ignore[no-any-return]


@pytest.fixture(scope="module", params=KINDS, ids=IDS)
def model(request: pytest.FixtureRequest) -> Any:
    mode, runtime = request.param
    return qf.quantize(net(), [X], mode=mode, runtime=runtime, device="cpu")


@pytest.fixture
def around(model: Any) -> Around:
    return Around(model).eval()


@pytest.fixture(autouse=True)
def _torchscript_is_deprecated() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*deprecated", DeprecationWarning)
        warnings.filterwarnings("ignore", "The input to trace is already a ScriptModule")
        # The reference's layers in Python branch on their own constants.
        warnings.filterwarnings("ignore", "Converting a tensor", torch.jit.TracerWarning)
        yield


# -- results


def test_a_result_may_be_changed_in_place(model: Any) -> None:
    wanted = 2 * model(X)
    weight = torch.ones(6, requires_grad=True)
    y = model(X).mul_(2)
    assert torch.equal(y, wanted)
    y.mul_(weight).sum().backward()
    assert weight.grad is not None
    assert weight.grad.abs().sum() > 0
    assert torch.equal(2 * model(X), wanted)


def test_a_head_trains_on_a_result(around: Around) -> None:
    around.head(around.model(X)).sum().backward()
    assert around.head.weight.grad is not None


def test_in_inference_mode_it_is_as_floats_would_be(model: Any) -> None:
    with torch.inference_mode():
        y = model(X)
        assert y.is_inference()
    assert torch.equal(y, model(X))


class Gives(nn.Module):
    """Returns what is its own: a parameter, a buffer and a view of it, in a dict and a list."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(8, 8)
        self.scale = nn.Parameter(torch.ones(8))
        self.register_buffer("table", torch.arange(8.0))

    def forward(self, x: torch.Tensor) -> Any:
        return self.layer(x), self.scale, self.table.view(2, 4)


@pytest.mark.parametrize(("mode", "runtime"), KINDS, ids=IDS)
def test_a_result_shares_no_memory_with_the_model(mode: str, runtime: str) -> None:
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    model: Any = qf.quantize(Gives().eval(), [x], mode=mode, runtime=runtime, device="cpu")
    wanted = [y.clone() for y in model(x)]
    for _ in range(2):
        found = model(x)
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
        for y in found:
            y.zero_()
    copied = copy.deepcopy(model)
    for y in copied(x):
        y.zero_()
    assert all(torch.equal(a, b) for a, b in zip(copied(x), wanted, strict=True))


# -- copies and processes


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_a_copy_gives_the_same_and_can_be_saved(copied: Callable[[Any], Any], model: Any, tmp_path: Path) -> None:
    model.note = ["mine"]
    other = copied(model)
    assert type(other) is type(model)
    assert other.note == ["mine"]
    assert other.compiled is model.compiled
    assert torch.equal(other(X), model(X))
    other.save(tmp_path / "artifact")
    loaded: Any = qf.load(tmp_path / "artifact")
    assert torch.equal(loaded(X), qf.load(model.save(tmp_path / "other"))(X))
    assert torch.equal(copied(other)(OTHER), model(OTHER))


def test_a_module_around_it_can_be_copied(around: Around) -> None:
    other = copy.deepcopy(around)
    assert other.head.weight is not around.head.weight
    assert torch.equal(other(OTHER), around(OTHER))


def test_a_copied_scriptmodule_writes_torchscript(tmp_path: Path) -> None:
    model: Any = qf.quantize(net(), [X], mode="torchscript", device="cpu")
    copy.deepcopy(model).save(tmp_path / "model.pt")
    assert torch.equal(torch.jit.load(str(tmp_path / "model.pt"))(X), model(X))


def test_hooks_are_copied() -> None:
    model: Any = qf.quantize(net(), [X], device="cpu")
    model.register_forward_hook(lambda *_: torch.zeros(1))
    assert torch.equal(copy.deepcopy(model)(X), torch.zeros(1))


@pytest.mark.parametrize("write", [pickle.dumps, lambda m: torch.save(m, "never.pt")], ids=["pickle", "torch.save"])
def test_pickling_says_save(write: Callable[[Any], Any], around: Around, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    for found in (around.model, around):
        with pytest.raises(UsageError, match=r"model\.save\(folder\).*quantflow\.load\(folder\)"):
            write(found)


def test_a_spawned_process_says_save(model: Any) -> None:
    process = multiprocessing.get_context("spawn").Process(target=print, args=(model,))
    with pytest.raises(UsageError, match=r"quantflow\.load"):
        process.start()


class Embedded(Dataset[torch.Tensor]):
    """A dataset that calls a model for its samples."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __len__(self) -> int:
        return len(X)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.model(X[index : index + 1])[0]  # type: ignore[no-any-return]


@pytest.fixture
def _two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.skipif(sys.platform != "linux", reason="workers are forked on Linux")
@pytest.mark.usefixtures("_two_threads")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_forked_workers_may_call_it(model: Any) -> None:
    wanted = torch.cat([model(X[i : i + 1]) for i in range(len(X))])
    model(OTHER)
    loader = DataLoader(Embedded(model), batch_size=2, num_workers=2, timeout=60, multiprocessing_context="fork")
    torch.testing.assert_close(torch.cat(list(loader)), wanted)


def test_several_threads_may_call_it(model: Any) -> None:
    inputs = [torch.cat([OTHER] * n)[: 5 + n] for n in range(1, 5)]
    wanted = [model(x) for x in inputs]
    wrong: list[int] = []

    def call(index: int) -> None:
        for _ in range(10):
            if not torch.equal(model(inputs[index]), wanted[index]):
                wrong.append(index)

    threads = [threading.Thread(target=call, args=(i,)) for i in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# -- traces and compilers


def is_on_reference(model: Any) -> bool:
    """Whether the compiled program runs on the runtime that makes no scripts."""
    return model.compiled.choice.runtime.script is None


def test_a_trace_is_right_for_other_inputs(around: Around, tmp_path: Path) -> None:
    if is_on_reference(around.model):
        with pytest.raises(UsageError, match=r"runtime 'reference'.*quantflow\.load\(folder, runtime='auto'\)"):
            torch.jit.trace(around, X)
        return
    for module in (around.model, around):
        traced = torch.jit.trace(module, X)
        # In imperative mode PyTorch's kernels run one by one, and may choose another order of float sums.
        atol = 0.02 if isinstance(around.model, qf.QuantizedModule) else 0.0
        assert torch.allclose(traced(OTHER), module(OTHER), rtol=0, atol=atol)
        torch.jit.save(traced, tmp_path / "traced.pt")
        assert torch.equal(torch.jit.load(tmp_path / "traced.pt")(OTHER), traced(OTHER))


def test_a_saved_trace_runs_in_another_process(tmp_path: Path) -> None:
    model: Any = qf.quantize(net(), [X], device="cpu")
    torch.jit.save(torch.jit.trace(nn.Sequential(model, nn.ReLU()), X), tmp_path / "traced.pt")
    torch.save(X, tmp_path / "x.pt")
    code = "import torch, quantflow; print(torch.jit.load('traced.pt')(torch.load('x.pt')).double().sum().item())"
    found = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert float(found.stdout) == model(X).relu().double().sum().item()


def test_a_trace_around_two_models_keeps_them_apart(tmp_path: Path) -> None:
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    parts: list[Any] = [qf.quantize(nn.Sequential(nn.Linear(6, 6)).eval(), [x], device="cpu") for _ in range(2)]
    torch.jit.save(torch.jit.trace(nn.Sequential(*parts), x), tmp_path / "traced.pt")
    assert torch.equal(torch.jit.load(tmp_path / "traced.pt")(x), parts[1](parts[0](x)))


def test_scripting_is_right_or_refused(around: Around) -> None:
    if isinstance(around.model, torch.jit.ScriptModule):
        assert torch.equal(torch.jit.script(around)(OTHER), around(OTHER))
        return
    for module in (around.model, around):
        with pytest.raises(UsageError, match=r"mode=torchscript.*torch\.jit\.trace"):
            torch.jit.script(module)


def test_a_compiler_leaves_it_as_it_is(around: Around) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    for module in (around.model, around):
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("eager")
        compiled = torch.compile(module, backend=counter)
        with torch.no_grad():
            for x in (X, OTHER, X[:1]):
                assert torch.equal(compiled(x), module(x))
        ops = {node.target for graph in counter.graphs for node in graph.graph.nodes if node.op == "call_function"}
        assert len(ops) <= 2, "a convolution and a linear, the module's own"
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"an int8 model is compiled already.*fullgraph=False"):
        torch.compile(around, backend="eager", fullgraph=True)(X)
    torch._dynamo.reset()


def test_exporting_it_is_refused(around: Around) -> None:
    if not isinstance(around.model, torch.jit.ScriptModule):
        with pytest.raises(UsageError, match=r"torch\.export can't look into an int8 model"):
            torch.export.export(around.model, (X,))
    with pytest.raises(UsageError, match=r"Export the float model"):
        torch.export.export(around, (X,))
    wanted = around(X)
    with pytest.raises(Exception, match=r"an int8 model is compiled already.*torch\.export can't"):
        torch.export.export(around, (X,), strict=True)
    assert torch.equal(around(X), wanted)


def test_importing_quantflow_imports_no_compiler() -> None:
    code = "import sys, quantflow; sys.exit('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=False).returncode == 0


# -- gradients


def test_backward_says_that_there_is_no_gradient(model: Any) -> None:
    x = X.clone().requires_grad_()
    y = model(x)
    assert torch.equal(y, model(X))
    with pytest.raises(UsageError, match=r"an int8 model has no gradient.*y\.detach\(\).*float model"):
        y.mul_(2).sum().backward()
    with torch.no_grad():
        assert not model(x).requires_grad


def test_a_gradient_taken_forwards_is_refused(model: Any) -> None:
    with forward_ad.dual_level(), pytest.raises(UsageError, match="no gradient"):
        model(forward_ad.make_dual(X, torch.ones_like(X)))
    for transform in (torch.func.grad(lambda x: model(x).sum()), lambda x: torch.func.jvp(model, (x,), (x,))):
        with pytest.raises((UsageError, RuntimeError), match=r"no gradient|data pointer"):
            transform(X)


def test_a_way_around_it_does_not_hide_the_missing_gradient(around: Around) -> None:
    with pytest.raises(UsageError, match="no gradient"):
        around(X).sum().backward()


def test_a_scriptmodule_from_a_file_has_no_gradient_either(tmp_path: Path) -> None:
    model: Any = qf.quantize(net(), [X], mode="torchscript", runtime="native", device="cpu")
    model.save(tmp_path / "model.pt")
    loaded = torch.jit.load(str(tmp_path / "model.pt"))
    x = X.clone().requires_grad_()
    for _ in range(3):
        with pytest.raises((UsageError, RuntimeError), match="no gradient"):
            (loaded(x).sum() + x.sum()).backward()


@pytest.mark.parametrize(("mode", "runtime"), KINDS, ids=IDS)
def test_every_floating_result_refuses_backward(mode: str, runtime: str) -> None:
    class Several(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> Any:
            y = self.a(x)
            return self.b(y), y.reshape(-1, 4), y.argmax(1)

    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    model: Any = qf.quantize(Several().eval(), [x], mode=mode, runtime=runtime, device="cpu")
    *floating, classes = model(x.requires_grad_())
    assert not classes.requires_grad
    for y in floating:
        with pytest.raises(UsageError, match="no gradient"):
            y.sum().backward()


# -- what would change it


def test_the_device_and_dtype_it_has_are_fine(model: Any) -> None:
    wanted = model(X)
    assert torch.equal(model.to("cpu").to(torch.float32).float().eval()(X), wanted)


@pytest.mark.parametrize(
    "move",
    [lambda m: m.to("meta"), lambda m: m.half(), lambda m: m.to(torch.float64)],
    ids=["device", "half", "dtype"],
)
def test_another_device_or_dtype_is_refused(move: Callable[[nn.Module], Any], around: Around) -> None:
    wanted = around.model(X)
    for module in (around.model, nn.Sequential(around.model)):
        with pytest.raises(UsageError, match=r"can't become .* quantize the float model again"):
            move(module)
    assert torch.equal(around.model(X), wanted)


def test_training_mode_is_a_notice(around: Around) -> None:
    for module in (around.model, around):
        with pytest.warns(UserWarning, match=r"train\(\) changes nothing on an int8 model"):
            module.train()
        assert not any(part.training for part in around.model.modules())
    assert around.head.training


def test_a_checkpoint_of_the_module_around_it_loads(around: Around) -> None:
    saved = copy.deepcopy(around.state_dict())
    wanted = around(X)
    nn.init.zeros_(around.head.weight)
    around.load_state_dict(saved)
    assert torch.equal(around(X), wanted)


def test_other_weights_are_refused(model: Any) -> None:
    wanted = model(X)
    with pytest.raises(UsageError, match=r"can't be loaded.*into the float model and quantize that"):
        model.load_state_dict(net().state_dict())
    if changed := {name: value.clone() for name, value in model.state_dict().items()}:
        next(iter(changed.values())).add_(1)
        with pytest.raises(UsageError, match="can't be loaded"):
            model.load_state_dict(changed)
    assert torch.equal(model(X), wanted)
