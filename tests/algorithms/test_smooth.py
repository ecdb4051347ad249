"""SmoothQuant: the float function stays, outliers move into the weight, and each setting matters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import quantflow as qf
from quantflow.algorithms import Material, Outcome
from quantflow.algorithms.smooth import ALPHAS, OCTAVES, smooth
from quantflow.capture import capture_export
from quantflow.ir.batch import Batch
from quantflow.ir.graph import Graph, interpret, is_aten
from quantflow.schema import LayerOverride, QConfig, SmoothAlgorithm
from quantflow.stages.plan import make_plan

WIDTH, HEADS = 16, 4
#: The channel that every model here makes far larger than the others.
LOUD = 5


def loud_norm(norm: nn.Module) -> nn.Module:
    with torch.no_grad():
        norm.weight[LOUD] = 300.0
    return norm


def loud_rows(linear: nn.Linear, row: int = LOUD) -> nn.Linear:
    with torch.no_grad():
        linear.weight[row] *= 300.0
    return linear


class PreNorm(nn.Module):
    """LayerNorm → two linears."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = loud_norm(nn.LayerNorm(WIDTH))
        self.a, self.b = nn.Linear(WIDTH, 8), nn.Linear(WIDTH, 12, bias=False)

    def forward(self, x: torch.Tensor) -> Any:
        y = self.norm(x)
        return self.a(y), self.b(y)


class RMSNorm(nn.Module):
    """As decoders write it: weight * x / rms(x)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))
        loud_norm(self)
        self.fc = nn.Linear(WIDTH, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)))


class PostNorm(PreNorm):
    """The LayerNorm's value is also a residual."""

    def forward(self, x: torch.Tensor) -> Any:
        y = self.norm(x)
        return self.a(y), self.b(y), y


class Gated(nn.Module):
    """SwiGLU."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(WIDTH, 24), loud_rows(nn.Linear(WIDTH, 24))
        self.down = nn.Linear(24, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Behind(nn.Module):
    """linear → activation → linear."""

    def __init__(self, activation: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.up, self.down = loud_rows(nn.Linear(WIDTH, 24)), nn.Linear(24, WIDTH)
        self.activation = activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.activation(self.up(x)))


class Attention(nn.Module):
    """q, k, v → softmax → output; `groups` key and value heads, written as decoders do."""

    def __init__(self, groups: int = HEADS, *, fused: bool = False, packed: bool = False) -> None:
        super().__init__()
        self.groups, self.fused, self.packed = groups, fused, packed
        size = WIDTH // HEADS * groups
        if packed:
            self.qkv = loud_rows(nn.Linear(WIDTH, 3 * WIDTH), 2 * WIDTH + LOUD)
        else:
            self.q, self.k = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, size)
            self.v = loud_rows(nn.Linear(WIDTH, size))
        self.o = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, _ = x.shape
        if self.packed:
            q, k, v = self.qkv(x).reshape(batch, tokens, 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4).unbind(0)
        else:
            q, k, v = (
                each.view(batch, tokens, -1, WIDTH // HEADS).transpose(1, 2)
                for each in (self.q(x), self.k(x), self.v(x))
            )
        repeats = HEADS // self.groups
        if repeats > 1:
            k, v = (
                each[:, :, None].expand(batch, self.groups, repeats, tokens, -1).reshape(batch, HEADS, tokens, -1)
                for each in (k, v)
            )
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            y = torch.softmax(q @ k.transpose(2, 3), -1) @ v
        return self.o(y.transpose(1, 2).reshape(batch, tokens, WIDTH))


class Windows(PreNorm):
    """Data movement between the norm and its readers, with padding, as windowed attention has."""

    def forward(self, x: torch.Tensor) -> Any:
        y = F.pad(self.norm(x), (0, 0, 0, 3)).roll(2, 1).reshape(x.shape[0], 3, 3, WIDTH).transpose(1, 2)
        return self.a(y), self.b(y)


def batch(seed: int = 0) -> Batch:
    return Batch((torch.randn(4, 6, WIDTH, generator=torch.Generator().manual_seed(seed)),))


def smoothed(
    model: nn.Module, settings: SmoothAlgorithm | None = None, layers: Any = None, **material: Any
) -> tuple[Graph, Graph, Outcome]:
    graph = capture_export(model.eval(), batch())
    plan = make_plan(graph, QConfig(), layers)
    after, outcome = smooth(settings or SmoothAlgorithm(), graph, plan, Material([batch()], **material)).whole()
    return graph, after, outcome


def outputs(graph: Graph) -> list[torch.Tensor]:
    with torch.no_grad():
        found = interpret(graph, batch(1).tensors)
    return list(found) if isinstance(found, (tuple, list)) else [found]


def products(graph: Graph) -> int:
    return sum(is_aten(n, "mul") and any(a.op == "get_attr" for a in n.all_input_nodes) for n in graph.fx.nodes)


FOLDED = {
    "LayerNorm": (PreNorm, "a and 1 more", "norm"),
    "RMSNorm": (RMSNorm, "fc", "mul_1"),
    "gate": (Gated, "down", "up"),
    "ReLU": (lambda: Behind(F.relu), "down", "up"),
    "attention": (Attention, "o", "v"),
    "grouped queries": (lambda: Attention(2), "o", "v"),
    "fused attention": (lambda: Attention(fused=True), "o", "v"),
    "one linear for q, k and v": (lambda: Attention(packed=True), "o", "qkv"),
    "windows": (Windows, "a and 1 more", "norm"),
}


@pytest.mark.parametrize("case", FOLDED)
def test_factors_fold_into_what_makes_the_input(case: str) -> None:
    torch.manual_seed(0)
    make, layer, source = FOLDED[case]
    before, after, outcome = smoothed(make())
    changed = {change.layer: change for change in outcome.changes}
    assert changed[layer].note.endswith(f"folded into {source}")
    assert changed[layer].after > changed[layer].before + 3
    assert products(after) - products(before) == sum("run time" in change.note for change in outcome.changes)
    for a, b in zip(outputs(before), outputs(after), strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-4 * float(a.abs().max()))


@pytest.mark.parametrize("make", [PostNorm, lambda: Behind(F.gelu)], ids=["residual", "GELU"])
def test_elsewhere_the_input_is_multiplied_at_run_time(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    before, after, outcome = smoothed(make())
    assert any(change.note.endswith("multiplied at run time") for change in outcome.changes)
    assert products(after) > products(before)
    assert "multiplied by factors per channel at run time" in outcome.notices[0]
    for a, b in zip(outputs(before), outputs(after), strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-4 * float(a.abs().max()))


def test_it_moves_the_outlier_and_the_int8_model_gains() -> None:
    torch.manual_seed(0)
    model = PreNorm().eval()
    graph, after, _ = smoothed(model)
    spread = {}
    for name, g in (("before", graph), ("after", after)):
        weight = g.constants["norm.weight"].abs()
        spread[name] = float(weight.max() / weight.median())
    assert spread["after"] < spread["before"] / 10
    plain, better = (
        qf.quantize(model, [batch().args[0]], algorithms=algorithms).results["accuracy"]["sqnr_db"]
        for algorithms in ([], ["smooth"])
    )
    assert better > plain + 6


def test_zero_channels_and_zero_weights_are_no_obstacle() -> None:
    torch.manual_seed(0)
    model = PreNorm()
    with torch.no_grad():
        model.norm.weight[2] = model.norm.bias[2] = 0
        model.a.weight[:, 3] = model.b.weight[:, 3] = 0
        model.a.weight[1] = 0
    _, after, outcome = smoothed(model)
    assert outcome.changes
    assert all(bool(value.isfinite().all()) for value in after.constants.values())


def test_alpha_is_searched_or_taken_as_given() -> None:
    torch.manual_seed(0)
    model = PreNorm()
    searched, given = smoothed(model)[2].changes[0], smoothed(model, SmoothAlgorithm(alpha=0.1))[2].changes[0]
    assert given.note.startswith("alpha 0.1,")
    assert searched.after > given.after
    coarse = smoothed(model, SmoothAlgorithm(refinements=0))[2].changes[0]
    assert coarse.after <= searched.after
    assert coarse.note.split(",")[0] in {*(f"alpha {a:g}" for a in ALPHAS), *(f"phi {2**-o:.2g}" for o in OCTAVES)}


def test_each_channels_range_is_trusted_to_many_rows_only() -> None:
    """The factors of alpha make every channel clip what exceeds the rows seen; those of phi only the loud ones."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 64)).eval()
    with torch.no_grad():
        model[0].weight.copy_(10 ** torch.linspace(0, 3, WIDTH))
        model[1].weight /= model[0].weight
    for rows, family in ((64, "alpha"), (WIDTH - 1, "phi")):
        x = torch.randn(rows, WIDTH)
        graph = capture_export(model, Batch((x,)))
        material = Material([Batch((x,))])
        smoother, outcome = smooth(SmoothAlgorithm(), graph, make_plan(graph, QConfig()), material).whole()
        assert outcome.changes[0].note.startswith(f"{family} ")
        factors = graph.constants["0.weight"] / smoother.constants["0.weight"]
        quiet = factors[:3] / factors[0]
        assert torch.allclose(quiet, torch.ones(3)) is (family == "phi")


def test_run_time_products_can_be_refused() -> None:
    torch.manual_seed(0)
    model = PostNorm()
    for settings, reason in (
        (SmoothAlgorithm(insert=False), "nothing in front of it can take up the factors"),
        (SmoothAlgorithm(min_gain_db=100), "a multiplication at run time would gain only"),
    ):
        before, after, outcome = smoothed(model, settings)
        assert not outcome.changes
        assert reason in dict(outcome.skipped)["a and 1 more"]
        assert products(after) == products(before)
    _, _, outcome = smoothed(model, may_insert=False)
    assert "this mode inserts no op" in dict(outcome.skipped)["a and 1 more"]


def test_fixed_constants_and_excluded_layers_stay() -> None:
    torch.manual_seed(0)
    model = PreNorm()
    before, after, outcome = smoothed(model, fixed=frozenset({"norm.weight"}))
    assert outcome.changes[0].note.endswith("multiplied at run time")
    assert torch.equal(before.constants["norm.weight"], after.constants["norm.weight"])
    override = LayerOverride.model_validate({"without": ["smooth"]})
    _, _, outcome = smoothed(model, layers={"linear": override})
    assert dict(outcome.skipped)["a"] == "the recipe says so"


def test_samples_are_those_that_it_looks_at() -> None:
    torch.manual_seed(0)
    quiet, loud = batch(0).args[0], batch(1).args[0].clone()
    loud[:, :, LOUD] *= 1000
    model = nn.Sequential(nn.Linear(WIDTH, 8))
    graph = capture_export(model.eval(), batch())
    plan, material = make_plan(graph, QConfig()), Material([Batch((quiet,)), Batch((loud,))])
    few, all_of_them = (
        smooth(SmoothAlgorithm(samples=count, min_gain_db=0), graph, plan, material).whole()[1] for count in (4, 8)
    )
    assert all_of_them.changes[0].before != (few.changes[0].before if few.changes else None)


def test_imperative_mode_keeps_the_users_module_and_folds() -> None:
    torch.manual_seed(0)
    model = PreNorm().eval()
    reference = model.norm.weight.clone()
    result = qf.quantize(model, [batch().args[0]], mode="imperative", algorithms=["smooth"])
    assert torch.equal(model.norm.weight, reference)
    (applied,) = result.results["algorithms"]
    assert applied["layers"][0]["note"].endswith("folded into norm")
