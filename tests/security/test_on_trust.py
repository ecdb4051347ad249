"""Boxes of images that are not there, states of other sizes: refused before kernels read by them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from quantflow.errors import ArtifactError
from quantflow.ir.aten_policy import aten_op
from quantflow.ir.on_trust import guarded

IMAGE = torch.arange(2 * 4 * 6 * 6, dtype=torch.float32).reshape(2, 4, 6, 6)
BOX = [1.0, 0.0, 0.0, 4.0, 4.0]
NAN, INF = float("nan"), float("inf")
_BOXED = "Tensor input, Tensor rois, float spatial_scale, int pooled_height, int pooled_width"
#: As torchvision registers them; it can't be loaded beside every torch.
SCHEMAS = {
    "roi_align": f"({_BOXED}, int sampling_ratio, bool aligned) -> Tensor",
    "roi_pool": f"({_BOXED}) -> (Tensor, Tensor)",
    "ps_roi_align": f"({_BOXED}, int sampling_ratio) -> (Tensor, Tensor)",
    "ps_roi_pool": f"({_BOXED}) -> (Tensor, Tensor)",
    "deform_conv2d": "(Tensor input, Tensor weight, Tensor offset, Tensor mask, Tensor bias, int stride_h) -> Tensor",
}  # fmt: skip


class Registered:
    """An operator that says that it was called."""

    def __init__(self, name: str) -> None:
        self._schema = torch._C.parse_schema(f"torchvision::{name}{SCHEMAS[name]}")

    def __call__(self, *_args: Any, **_kwargs: Any) -> str:
        return "computed"


def call(name: str, *args: Any, **kwargs: Any) -> Any:
    return guarded(name, Registered(name))(*args, **kwargs)


def roi_align(boxes: list[list[float]], scale: float = 1.0, size: int = 2, ratio: int = 2) -> Any:
    return call(
        "roi_align", IMAGE, torch.tensor(boxes).reshape(-1, 5), scale, size, size, sampling_ratio=ratio, aligned=True
    )


def test_a_box_within_an_image_is_computed() -> None:
    assert roi_align([BOX]) == "computed"
    assert roi_align([]) == "computed"
    assert roi_align([[0.0, -3.0, -3.0, 9.0, 9.0], BOX], ratio=-1) == "computed"


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ({"boxes": [[2.0**20, *BOX[1:]]]}, "of images 1.04858e"),
        ({"boxes": [[2.0, *BOX[1:]]]}, "of images 2 to 2; there are 2"),
        ({"boxes": [[-1.0, *BOX[1:]]]}, "of images -1"),
        ({"boxes": [[NAN, *BOX[1:]]]}, "of images nan"),
        ({"boxes": [[0.0, NAN, 0.0, 4.0, 4.0]]}, "no number within"),
        ({"boxes": [[0.0, 0.0, 0.0, INF, 4.0]]}, "no number within"),
        ({"boxes": [[0.0, 0.0, 0.0, 1e9, 1e9]]}, "no number within"),
        ({"boxes": [[0.0, 0.0, 0.0, 1e6, 1e6]], "ratio": 0}, "places for a box"),
        ({"boxes": [BOX], "ratio": 2**20}, "places for a box"),
        ({"boxes": [BOX], "size": 2**20}, "elements"),
        ({"boxes": [BOX], "size": 0}, "at least 1"),
        ({"boxes": [BOX], "scale": NAN}, "spatial_scale is nan"),
    ],
)
def test_what_is_read_is_there(what: dict[str, Any], words: str) -> None:
    with pytest.raises(ArtifactError) as caught:
        roi_align(**what)
    assert words in str(caught.value)


@pytest.mark.parametrize("name", ["roi_align", "roi_pool", "ps_roi_align", "ps_roi_pool"])
def test_every_op_with_boxes_is_held_to_it(name: str) -> None:
    more = {"roi_align": (2, True), "ps_roi_align": (2,)}.get(name, ())
    assert call(name, IMAGE, torch.tensor([BOX]), 1.0, 2, 2, *more) == "computed"
    with pytest.raises(ArtifactError, match=f"torchvision::{name}: its boxes are of images 7 to 7; there are 2"):
        call(name, IMAGE, torch.tensor([[7.0, *BOX[1:]]]), 1.0, 2, 2, *more)


def test_offsets_are_numbers() -> None:
    weight, mask, bias = torch.ones(4, 4, 3, 3), torch.ones(2, 9, 4, 4), torch.zeros(4)
    assert call("deform_conv2d", IMAGE, weight, torch.zeros(2, 18, 4, 4), mask, bias, 1) == "computed"
    with pytest.raises(ArtifactError, match="offset holds what is no finite number"):
        call("deform_conv2d", IMAGE, weight, torch.full((2, 18, 4, 4), NAN), mask, bias, 1)


def recurrent(module: torch.nn.RNNBase, x: torch.Tensor, states: Any, sizes: torch.Tensor | None = None) -> Any:
    """The module's own call, its operator by name."""
    kind = {"LSTM": "lstm", "GRU": "gru", "RNN": "rnn_tanh"}[type(module).__name__]
    more = (module.bias, module.num_layers, 0.0, False, module.bidirectional)
    if sizes is not None:
        return aten_op(f"{kind}.data")(x, sizes, states, module._flat_weights, *more)
    return aten_op(f"{kind}.input")(x, states, module._flat_weights, *more, module.batch_first)


@pytest.mark.filterwarnings("ignore:LSTM with projections")  # PyTorch's own
@pytest.mark.parametrize("make", [torch.nn.LSTM, torch.nn.GRU, torch.nn.RNN])
@pytest.mark.parametrize(
    "settings",
    [{}, {"num_layers": 2, "bidirectional": True}, {"bias": False}, {"batch_first": True}, {"proj_size": 3}],
    ids=str,
)
def test_a_recurrent_net_is_computed(make: Any, settings: dict[str, Any]) -> None:
    if "proj_size" in settings and make is not torch.nn.LSTM:
        pytest.skip("LSTMs alone have projections")
    module, x = make(4, 5, **settings).eval(), torch.randn(3, 3, 4)
    count = module.num_layers * (2 if module.bidirectional else 1)
    h = torch.randn(count, 3, module.proj_size or 5)
    states = [h, torch.randn(count, 3, 5)] if make is torch.nn.LSTM else h
    wanted, _ = module(x, tuple(states) if isinstance(states, list) else states)
    assert torch.allclose(recurrent(module, x, states)[0], wanted, atol=1e-6)
    other = torch.randn(count, 4, 5)
    with pytest.raises(ArtifactError, match="its states are"):
        recurrent(module, x, [h, other] if isinstance(states, list) else other)
    module._flat_weights[1] = torch.randn(20, 7)
    with pytest.raises(ArtifactError, match="its weights are"):
        recurrent(module, x, states)


def test_a_packed_sequence_has_the_rows_of_its_steps() -> None:
    module, states = torch.nn.GRU(4, 5).eval(), torch.zeros(1, 3, 5)
    packed = torch.nn.utils.rnn.pack_padded_sequence(torch.randn(4, 3, 4), torch.tensor([4, 2, 1]))
    assert torch.equal(recurrent(module, packed.data, states, packed.batch_sizes)[0], module(packed, states)[0].data)
    for sizes in ([3, 2, 1, 2**40], [1, 2, 3, 1], [3, 4], [], [3, 2, 2, 0], [4, 3]):
        with pytest.raises(ArtifactError, match=r"its steps' sizes|its states are"):
            recurrent(module, packed.data, states, torch.tensor(sizes, dtype=torch.int64))
