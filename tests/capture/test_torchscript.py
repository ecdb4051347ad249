"""TorchScript capture: what a trace, a script and a saved file compute, the graph computes, for every batch size."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils import _pytree as pytree

from quantflow.capture import capture, capture_export, capture_torchscript
from quantflow.errors import CaptureError, UnavailableError
from quantflow.ir.batch import Batch
from quantflow.ir.graph import Graph, interpret, is_aten, op_name
from quantflow.ir.passes.fold_batchnorm import fold_batch_norms
from quantflow.schema import PRESETS, ModeSettings
from quantflow.sources.models.torchvision_zoo import load_torchvision
from quantflow.stages.plan import make_plan

METHODS = ("trace", "script", "saved")
#: Rounding only: the same kernels on the same numbers, up to constants folded in advance.
TOLERANCE = 1e-5


@pytest.fixture(autouse=True)
def quiet_torchscript() -> Iterator[None]:
    """torch.jit itself is deprecated, and says so at every call."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture(scope="module")
def resnet18() -> nn.Module:
    try:
        return load_torchvision("resnet18", "random", None, seed=0).module
    except UnavailableError as problem:
        pytest.skip(str(problem))


@pytest.fixture(scope="module")
def resnet18_graph(resnet18: nn.Module) -> Graph:
    return capture_export(resnet18, images())


def images(samples: int = 2) -> Batch:
    generator = torch.Generator().manual_seed(0)
    return Batch((torch.randn(samples, 3, 64, 64, generator=generator),))


def small(samples: int = 2) -> Batch:
    generator = torch.Generator().manual_seed(0)
    return Batch((torch.randn(samples, 3, 8, 8, generator=generator),))


def reload(module: torch.jit.ScriptModule) -> torch.jit.ScriptModule:
    file = io.BytesIO()
    torch.jit.save(module, file)
    file.seek(0)
    return torch.jit.load(file)


def captured(model: nn.Module, example: Batch, method: str) -> Graph:
    if method == "saved":
        return capture_torchscript(reload(torch.jit.script(model.eval())), example)
    return capture_torchscript(model, example, method)  # type: ignore[arg-type]


def assert_computes(graph: Graph, model: nn.Module, *batches: Batch) -> None:
    for batch in batches:
        found = pytree.tree_leaves(interpret(graph, batch.tensors))
        wanted = [leaf for leaf in pytree.tree_leaves(model(*batch.args, **batch.kwargs)) if leaf is not None]
        assert len(found) == len(wanted)
        for a, b in zip(found, wanted, strict=True):
            assert a.shape == b.shape
            assert torch.allclose(a, b, rtol=TOLERANCE, atol=TOLERANCE * float(b.abs().max()))


def layers(graph: Graph, *ops: str) -> list[str]:
    return sorted(n.meta["layer"] for n in graph.fx.nodes if is_aten(n, *ops))


def counts(graph: Graph) -> tuple[int, int, int]:
    plan = make_plan(fold_batch_norms(graph), PRESETS["sym_int8"])
    return plan.int8_layers, plan.core_layers, len(plan.rows)


# ── whole models ──────────────────────────────────────────────────────────────


SOURCES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "trace": lambda m: m,
    "script": lambda m: m,
    "saved trace": lambda m: reload(torch.jit.trace(m, images().args, check_trace=False)),
    "saved script": lambda m: reload(torch.jit.script(m)),
    "frozen trace": lambda m: torch.jit.freeze(torch.jit.trace(m, images().args, check_trace=False)),
    "frozen script": lambda m: torch.jit.freeze(torch.jit.script(m)),
    "saved frozen script": lambda m: reload(torch.jit.freeze(torch.jit.script(m))),
}


@pytest.mark.parametrize("source", SOURCES)
def test_resnet18_is_the_same_graph_as_by_export(source: str, resnet18: nn.Module, resnet18_graph: Graph) -> None:
    graph = capture_torchscript(SOURCES[source](resnet18), images(), "script" if source == "script" else "trace")
    assert_computes(graph, resnet18, images(1), images(3))
    assert graph.batch_is_dynamic
    assert not graph.notes
    assert counts(graph) == counts(resnet18_graph)
    if source != "saved frozen script":
        assert layers(graph, "conv2d", "linear") == layers(resnet18_graph, "conv2d", "linear")
    if "frozen" not in source:
        assert layers(graph, "relu", "add", "max_pool2d") == layers(resnet18_graph, "relu", "add", "max_pool2d")


def test_a_saved_frozen_module_has_numbered_layers(resnet18: nn.Module) -> None:
    graph = capture_torchscript(SOURCES["saved frozen script"](resnet18), images())
    assert "conv2d_19" in layers(graph, "conv2d")
    assert layers(graph, "linear") == ["linear"]


def test_no_batch_norm_is_left_after_folding(resnet18: nn.Module) -> None:
    folded = fold_batch_norms(capture_torchscript(resnet18, images(), "trace"))
    assert not layers(folded, "batch_norm")


def test_the_model_stays_as_it_was() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for method in METHODS:
        captured(model, small(), method)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


# ── attention ─────────────────────────────────────────────────────────────────


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attention(x, x, x)[0]


@pytest.mark.parametrize("method", METHODS)
def test_attention_shows_its_linears(method: str) -> None:
    model = Attention().eval()
    graph = captured(model, Batch((torch.randn(2, 5, 8),)), method)
    assert_computes(graph, model, Batch((torch.randn(1, 5, 8),)), Batch((torch.randn(3, 5, 8),)))
    assert layers(graph, "linear") == ["attention.in_proj", "attention.out_proj"]


# ── sizes ─────────────────────────────────────────────────────────────────────


class ConvBase(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.register_buffer("count", torch.zeros(4))


class Sizes(ConvBase):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, _, height, width = x.shape
        y = F.relu(self.conv(x)).view(batch * 2, 2, height * width).transpose(1, 2)
        y = y + torch.arange(batch * 2).view(-1, 1, 1)
        return y.reshape(batch, -1)[:, : (height * width) // 2]


@pytest.mark.parametrize("method", METHODS)
def test_sizes_follow_the_batch(method: str) -> None:
    model = Sizes().eval()
    graph = captured(model, small(), method)
    assert_computes(graph, model, small(1), small(3), small(7))
    assert graph.inputs[0].shape == (None, 3, 8, 8)


@pytest.mark.parametrize("method", METHODS)
def test_the_batch_size_is_read_from_the_input_once(method: str) -> None:
    graph = captured(Sizes(), small(), method)
    sizes = [node for node in graph.fx.nodes if op_name(node) == "sym_size"]
    assert [node.args[0].op for node in sizes] == ["placeholder"]
    (relu,) = (node for node in graph.fx.nodes if is_aten(node, "relu"))
    assert len(relu.users) == 1


class Halves(ConvBase):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x)
        half = x.shape[0] // 2
        return torch.cat([y[half:], y[:half]])


@pytest.mark.parametrize("method", METHODS)
def test_arithmetic_on_the_batch_size_stays_symbolic(method: str) -> None:
    model = Halves().eval()
    assert_computes(captured(model, small(), method), model, small(1), small(4), small(9))


class Windows(ConvBase):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x).view(x.shape[0] // 8, 8, -1).mean(1)


@pytest.mark.parametrize("method", METHODS)
def test_a_model_that_takes_multiples_of_eight(method: str) -> None:
    model = Windows().eval()
    graph = captured(model, small(8), method)
    assert graph.batch_is_dynamic
    assert_computes(graph, model, small(8), small(24))


class Baked(ConvBase):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x).reshape(int(x.shape[0]), -1)


@pytest.mark.parametrize("samples", [1, 2, 5])
def test_a_traced_size_fixes_the_batch_and_says_so(samples: int) -> None:
    model = Baked().eval()
    graph = capture_torchscript(model, small(samples), "trace")
    assert not graph.batch_is_dynamic
    assert graph.inputs[0].shape == (samples, 3, 8, 8)
    assert f"batches of {samples} only" in graph.notes[0]
    assert "mode=export" in graph.notes[0]
    assert_computes(graph, model, small(samples))
    assert capture_torchscript(model, small(samples), "script").batch_is_dynamic


class OneIsSpecial(ConvBase):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x)
        if x.shape[0] > 1:
            y = y.relu()
        return y


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("samples", [1, 4])
def test_a_model_that_treats_one_sample_otherwise_is_not_generalised(method: str, samples: int) -> None:
    model = OneIsSpecial().eval()
    graph = captured(model, small(samples), method)
    assert not graph.batch_is_dynamic
    assert_computes(graph, model, small(samples))


# ── control flow and values ───────────────────────────────────────────────────


class Loop(ConvBase):
    def __init__(self) -> None:
        super().__init__()
        self.steps = 3

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kept: list[torch.Tensor] = []
        names = {"first": 1, "second": 2}
        y = self.conv(x)
        for i in range(self.steps):
            y = F.relu(y + i * names["second"])
            if i % 2 == 0 and len(kept) < 5:
                kept.append(y)
        return torch.cat(kept, 1)


class BatchLoop(ConvBase):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.conv(x[i : i + 1]) for i in range(x.size(0))])


class DataBranch(ConvBase):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x)
        if bool(y.sum() > -1e9):
            return y.relu()
        return y.sigmoid()


@pytest.mark.parametrize("method", METHODS)
def test_loops_lists_and_dicts_are_unrolled(method: str) -> None:
    model = Loop().eval()
    graph = captured(model, small(), method)
    assert_computes(graph, model, small(1), small(3))
    assert len(layers(graph, "relu")) == 3


def test_a_loop_over_samples_fixes_the_batch() -> None:
    graph = captured(BatchLoop(), small(), "script")
    assert not graph.batch_is_dynamic
    assert "a loop depends on the batch size" in graph.notes[0]


def test_a_branch_on_data_is_the_examples_and_noted() -> None:
    model = DataBranch().eval()
    graph = captured(model, small(), "script")
    assert_computes(graph, model, small(3))
    assert "taken from the example" in graph.notes[0]
    assert not layers(graph, "sigmoid")


class InPlace(ConvBase):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x)
        alias = y
        alias.add_(1.0)
        y.mul_(alias)
        y[:, 1:3] = y[:, 1:3] * 2
        y[:, 0, 1] += 3.0
        mask = torch.zeros(4, 8, 8)
        mask[1:2, 3] += 2
        return y.relu_() + mask


class Filled(ConvBase):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.zeros(x.shape[0], 6, 8, 8)
        y[:, 1:5] = self.conv(x)
        return y


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("cls", [InPlace, Filled])
def test_in_place_ops_become_functional(cls: type[nn.Module], method: str) -> None:
    model = cls().eval()
    graph = captured(model, small(), method)
    assert_computes(graph, model, small(1), small(3))
    ops = [node.target for node in graph.fx.nodes if isinstance(node.target, torch._ops.OpOverload)]
    assert not any(op._schema.is_mutable for op in ops)


def test_the_mask_that_does_not_depend_on_the_input_is_a_constant() -> None:
    graph = captured(InPlace(), small(), "trace")
    masks = [value for value in graph.constants.values() if value.shape == (4, 8, 8)]
    assert len(masks) == 1
    assert masks[0].sum() == 16


# ── inputs and outputs ────────────────────────────────────────────────────────


class TwoInputs(ConvBase):
    def forward(self, x: torch.Tensor, offset: torch.Tensor, gain: float = 2.0) -> dict[str, torch.Tensor]:
        y = self.conv(x) * gain
        return {"plain": y, "shifted": y + offset}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("positional", [0, 1, 2])
def test_keywords_and_dict_outputs(method: str, positional: int) -> None:
    model = TwoInputs().eval()
    tensors = {"x": torch.randn(2, 3, 8, 8), "offset": torch.randn(2, 4, 1, 1)}
    names = list(tensors)
    batch = Batch(tuple(tensors[n] for n in names[:positional]), {n: tensors[n] for n in names[positional:]})
    graph = captured(model, batch, method)
    assert [item.keyword for item in graph.inputs] == [None] * positional + names[positional:]
    assert list(interpret(graph, batch.tensors)) == ["plain", "shifted"]
    assert_computes(graph, model, batch)


class Catches(nn.Module):
    """A trace names all its arguments after the parameter of the function that reads them: `input`."""

    def __init__(self) -> None:
        super().__init__()
        self.long, self.short = nn.Embedding(9, 4), nn.Embedding(9, 4)

    def forward(self, *ids: torch.Tensor) -> torch.Tensor:
        return self.long(ids[0]).mean(1) - self.short(ids[1]).sum(1)


def test_arguments_of_one_name_are_told_apart_by_their_place() -> None:
    model = Catches().eval()
    batch = Batch((torch.randint(9, (2, 7)), torch.randint(9, (2, 3))))
    graph = captured(model, batch, "trace")
    assert [item.shape[1] for item in graph.inputs] == [7, 3]
    assert len({item.name for item in graph.inputs}) == 2
    assert_computes(graph, model, batch)


class Nested(ConvBase):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, tuple[torch.Tensor, list[torch.Tensor]]]:
        y = self.conv(x)
        return y, (y.relu(), [y.sigmoid(), self.count])


@pytest.mark.parametrize("method", METHODS)
def test_nested_outputs(method: str) -> None:
    model = Nested().eval()
    graph = captured(model, small(), method)
    output = interpret(graph, small().tensors)
    assert isinstance(output[1][1], list)
    assert_computes(graph, model, small(3))


# ── what can't be captured ────────────────────────────────────────────────────


class Refuses(ConvBase):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[1] != 4:
            raise ValueError("expected 4 channels")
        return self.conv(x)


class Counts(ConvBase):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count.add_(1)
        return self.conv(x) + self.count[0]


class Random(ConvBase):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(self.conv(x), 0.5, True)


class Quantized(ConvBase):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.dequantize(
            torch.ops.quantized.add(*[torch.quantize_per_tensor(x, 0.1, 0, torch.qint8)] * 2, 0.1, 0)
        )


@pytest.mark.parametrize(
    ("cls", "method", "message"),
    [
        (Refuses, "trace", "expected 4 channels.*mode=export"),
        (Refuses, "script", "expected 4 channels"),
        (Refuses, "saved", "expected 4 channels"),
        (Counts, "trace", "changes its own count.*compute a new tensor"),
        (Counts, "saved", "changes its own count.*compute a new tensor"),
        (Random, "script", "draws random numbers.*mode=export"),
        (Quantized, "trace", "quantized::add.*mode=export"),
    ],
)
def test_refusals_name_the_cause_and_the_cure(cls: type[nn.Module], method: str, message: str) -> None:
    with pytest.raises(CaptureError, match=message):
        captured(cls().eval(), small(), method)


class AskPython(ConvBase):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x) if "numpy" in str(type(x)) else x.relu()


class Slices(ConvBase):
    def forward(self, x: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        return self.conv(torch.cat((x, *others)))


def test_python_inside_torchscript_is_refused_by_name() -> None:
    with pytest.raises(CaptureError, match=r"Python function 'type'.*mode=export"):
        capture_torchscript(AskPython(), small(), "script")


def test_a_module_that_can_not_be_scripted() -> None:
    with pytest.raises(CaptureError, match=r"torch.jit.script can't capture Slices: .*mode.method=trace"):
        capture_torchscript(Slices(), small(), "script")


def test_wrong_input_names_list_the_right_ones() -> None:
    module = torch.jit.script(TwoInputs().eval())
    with pytest.raises(CaptureError, match="fails on the example batch"):
        capture_torchscript(module, Batch((), {"x": small().args[0], "shift": torch.zeros(2, 4, 1, 1)}))


class Levels(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3, padding=1)

    def forward(self, levels: list[torch.Tensor]) -> list[torch.Tensor]:
        return [self.conv(level) for level in levels]


def test_inputs_that_go_through_one_layer_stay_apart() -> None:
    """A trace names inputs after the parameter that reads them, so that two may have one name."""
    model, batch = Levels().eval(), Batch(([torch.randn(2, 4, 8, 8), torch.randn(2, 4, 4, 4)],))
    graph = capture(model, batch, ModeSettings(kind="torchscript"))
    other = [torch.randn(3, 4, 8, 8), torch.randn(3, 4, 4, 4)]
    for found, wanted in zip(pytree.tree_leaves(interpret(graph, other)), model(other), strict=True):
        assert torch.allclose(found, wanted, atol=TOLERANCE)
