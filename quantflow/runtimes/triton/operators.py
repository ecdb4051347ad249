"""Ops on codes other than convolutions and linears, as functions of tensors on a card (or interpreted, on the CPU)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from quantflow.ir.activations import Epilogue
from quantflow.numerics.affine import QParams
from quantflow.runtimes.triton import elementwise, pooling, products
from quantflow.runtimes.triton.cards import launch_options
from quantflow.runtimes.triton.layers import WIDE, activation_of

_BLOCK = 1024
#: Taps of a pooling kernel that are written out.
_UNROLLED = 16
#: Sums of that many codes fit int32, whatever their zero point.
LONGEST_MEAN = (2**31 - 1) // 255


def coding(out: QParams | None) -> tuple[float, float, float, int]:
    """(1 / scale, lowest steps, highest steps, zero point), as kernels take them; anything for floats."""
    if out is None:
        return 1.0, 0.0, 0.0, 0
    low, high = (float(bound - out.zero_point) for bound in out.range)
    return 1.0 / out.scale, low, high, out.zero_point


def _dtype(out: QParams | None, held: torch.dtype) -> torch.dtype:
    return held if out is None else out.torch_dtype


def _is_dense(x: Tensor, like: Tensor) -> bool:
    """Whether x fills its memory without gaps, in the order in which `like` does."""
    return x.shape == like.shape and x.stride() == like.stride()


def quantize(x: Tensor, out: QParams, channels_last: bool | None = None) -> Tensor:
    """Codes of real numbers.

    Args:
        channels_last: how they shall lie; None: as x lies.
    """
    if channels_last and x.dim() > 2:
        memory = x.movedim(1, -1)
        y = torch.empty(memory.shape, dtype=out.torch_dtype, device=x.device)
        if not memory.is_contiguous() and y.numel():
            x = x.contiguous()
            positions, channels = math.prod(x.shape[2:]), x.shape[1]
            bp, bc = (64, 64) if channels >= 64 else (256, triton.next_power_of_2(channels))
            grid = (triton.cdiv(positions, bp), triton.cdiv(channels, bc), x.shape[0])
            elementwise.quantize_moved[grid](
                x,
                y,
                positions,
                channels,
                positions * channels,
                1,
                positions,
                *coding(out),
                BP=bp,
                BC=bc,
                **launch_options(x.device),
            )
            return y.movedim(-1, 1)
        result = y.movedim(-1, 1)
        x = memory
    else:
        result = y = torch.empty_like(x, dtype=out.torch_dtype)
        if channels_last is False or not _is_dense(x, y):
            x = x.contiguous()
            result = y = torch.empty_like(x, dtype=out.torch_dtype)
    if y.numel():
        elementwise.quantize[(triton.cdiv(y.numel(), _BLOCK),)](
            x, y, y.numel(), *coding(out), BLOCK=_BLOCK, **launch_options(x.device)
        )
    return result


def quantize_framed(x: Tensor, out: QParams, frame: tuple[int, int], padding: tuple[int, int]) -> Tensor:
    """Codes of images (batch, up to 4, height, width) as (batch, *frame, 4), with zero points around them."""
    batch, channels, height, width = x.shape
    y = torch.empty(batch, *frame, 4, dtype=out.torch_dtype, device=x.device)
    block = min(256, triton.next_power_of_2(frame[1]))
    n, c, h, w = x.stride()
    elementwise.quantize_framed[batch * frame[0], triton.cdiv(frame[1], block)](
        x, y, height, width, n, c, h, w, *frame, *padding, *coding(out), CHANNELS=channels,
        BLOCK=block, **launch_options(x.device),
    )  # fmt: skip
    return y


def dequantize(x: Tensor, qparams: QParams, held: torch.dtype = torch.float32) -> Tensor:
    """What codes stand for, lying as they do; `held` is the type of the result."""
    y = torch.empty_like(x, dtype=held)
    if not _is_dense(x, y):
        x = x.contiguous()
        y = torch.empty_like(x, dtype=held)
    if y.numel():
        grid = (triton.cdiv(y.numel(), _BLOCK),)
        elementwise.dequantize[grid](
            x, y, y.numel(), qparams.scale, qparams.zero_point, BLOCK=_BLOCK, **launch_options(x.device)
        )
    return y


def pair(
    a: Tensor, a_qparams: QParams, b: Tensor, b_qparams: QParams, out: QParams | None, epilogue: Epilogue | None,
    *, is_product: bool, held: torch.dtype = torch.float32,
) -> Tensor:  # fmt: skip
    """a + b or a * b of two coded tensors that broadcast; `held` is the type of a float result."""
    shape = torch.broadcast_shapes(a.shape, b.shape)
    like = a if a.shape == shape else b if b.shape == shape else torch.empty(shape, device="meta")
    y = torch.empty_like(like, dtype=_dtype(out, held), device=a.device)
    if not y.numel():
        return y
    sizes, strides = [y.numel(), 1, 1], [[0, 0, 0], [0, 0, 0]]
    is_dense = _is_dense(a, y) and _is_dense(b, y)
    if not is_dense:
        order = sorted(range(y.dim()), key=lambda d: (-y.stride(d), d))
        views = [x.expand(shape).permute(order) for x in (a, b)]
        folded = _folded([y.permute(order).shape[d] for d in range(y.dim())], [list(v.stride()) for v in views])
        if len(folded[0]) > 3:
            a, b = (torch.empty_like(y, dtype=x.dtype).copy_(x) for x in (a, b))
            is_dense = True
        else:
            missing = 3 - len(folded[0])
            sizes = [1] * missing + folded[0]
            strides = [[0] * missing + row for row in folded[1]]
    activation, first, second = activation_of(epilogue)
    elementwise.pair[(triton.cdiv(y.numel(), _BLOCK),)](
        a, b, y, y.numel(), sizes[1], sizes[2], *strides[0], *strides[1], a_qparams.scale, a_qparams.zero_point,
        b_qparams.scale, b_qparams.zero_point, first, second, *coding(out),
        IS_PRODUCT=is_product, IS_DENSE=is_dense, IS_WIDE=y.numel() > WIDE, ACTIVATION=activation, BLOCK=_BLOCK,
        **launch_options(y.device),
    )  # fmt: skip
    return y


def _folded(sizes: Sequence[int], strides: Sequence[list[int]]) -> tuple[list[int], list[list[int]]]:
    """The same elements in as few dimensions as all the strides allow."""
    kept = [d for d, size in enumerate(sizes) if size != 1]
    made = [sizes[d] for d in kept]
    rows = [[row[d] for d in kept] for row in strides]
    d = 0
    while d + 1 < len(made):
        if all(row[d] == row[d + 1] * made[d + 1] for row in rows):
            made[d : d + 2] = [made[d] * made[d + 1]]
            for row in rows:
                del row[d]
        else:
            d += 1
    return made, rows


def matmul(
    a: Tensor, a_qparams: QParams, b: Tensor, b_qparams: QParams, out: QParams | None,
    held: torch.dtype = torch.float32,
) -> Tensor:  # fmt: skip
    """The batched product of two coded activations, as torch.matmul; `held` is the type of a float result."""
    if a.dim() == 1:
        return matmul(a.unsqueeze(0), a_qparams, b, b_qparams, out, held).squeeze(-2)
    if b.dim() == 1:
        return matmul(a, a_qparams, b.unsqueeze(1), b_qparams, out, held).squeeze(-1)
    batch = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    m, k, n = a.shape[-2], a.shape[-1], b.shape[-1]
    y = torch.empty(*batch, m, n, dtype=_dtype(out, held), device=a.device)
    if not y.numel():
        return y
    a, b = a.expand(*batch, m, k).reshape(-1, m, k), b.expand(*batch, k, n).reshape(-1, k, n)
    blanks = [128 if q.dtype == "uint8" else 0 for q in (a_qparams, b_qparams)]
    products.matmul[triton.cdiv(m, 32) * triton.cdiv(n, 64), a.shape[0]](
        a, b, y, m, n, k, *a.stride(), *b.stride(), *blanks, a_qparams.zero_point - blanks[0],
        b_qparams.zero_point - blanks[1], a_qparams.scale * b_qparams.scale, *coding(out), BM=32, BN=64, BK=32,
        num_warps=4, **launch_options(y.device),
    )  # fmt: skip
    return y


# -- pooling

_Window = list[tuple[int, int, int]]


class Pool:
    """Pooling by one ATen op; what depends on sizes is kept per input shape. Safe to call from several threads."""

    #: Tables of windows kept; the oldest goes first.
    KEPT = 64

    def __init__(self, target: str, x: QParams, out: QParams | None) -> None:
        self.name = target.partition(".")[0]
        self.x, self.out = x, out
        self._tables: dict[Any, tuple[Tensor, list[int], list[int], list[int]]] = {}

    def __call__(self, x: Tensor, given: Mapping[str, Any], held: torch.dtype = torch.float32) -> Tensor:
        """
        Args:
            given: the op's other arguments by name.
            held: the type of a float result.
        """
        if self.name == "mean":
            return self._mean(x, given, held)
        dims = int(self.name[-2])
        if x.dim() == dims + 1:
            return self(x.unsqueeze(0), given, held).squeeze(0)
        if self.name.startswith("adaptive") and all(size == 1 for size in _spread(given["output_size"], dims)):
            return self._mean(x, {"dim": list(range(2, dims + 2)), "keepdim": True}, held)
        windows, out, step, most = self._table(x, given, dims)
        memory = x.movedim(1, -1).contiguous()
        is_mean = self.name != f"max_pool{dims}d"
        qparams = self.out if is_mean else self.x
        y = torch.empty(x.shape[0], *out, x.shape[1], dtype=_dtype(qparams, held), device=x.device)
        if y.numel():
            m, c = y.numel() // x.shape[1], x.shape[1]
            bc = min(64, triton.next_power_of_2(c))
            bm = max(8, (1024 if m * c < 2**20 else 4096) // bc // 2)
            pooling.pool[triton.cdiv(m, bm), triton.cdiv(c, bc)](
                memory, y, windows, m, c, *_three(memory.shape[1:-1]), *_three(out), *step, self.x.zero_point,
                self.x.scale, *coding(qparams), *most, IS_UNROLLED=math.prod(most) <= _UNROLLED, IS_MEAN=is_mean,
                IS_WIDE=max(x.numel(), y.numel()) > WIDE, BM=bm, BC=bc, **launch_options(y.device),
            )  # fmt: skip
        return y.movedim(-1, 1)

    def _table(self, x: Tensor, given: Mapping[str, Any], dims: int) -> tuple[Tensor, list[int], list[int], list[int]]:
        key = (*x.shape[2:], *map(str, given.items()), x.device)
        found = self._tables.get(key)
        if found is None:
            windows, step = self._windows(list(x.shape[2:]), given, dims)
            out = [len(window) for window in windows]
            # The divisor of a dimension that is not there is 1.
            whole = [[(0, 1, 1)]] * (3 - dims) + windows
            most = [max((-(-(stop - start) // s) for start, stop, _ in w), default=0)
                    for w, s in zip(whole, _three(step), strict=True)]  # fmt: skip
            rows = torch.tensor([row for window in whole for row in window], dtype=torch.int32).reshape(-1, 3)
            while len(self._tables) >= self.KEPT:
                self._tables.pop(next(iter(self._tables)), None)
            found = self._tables[key] = (rows.to(x.device), out, _three(step), most)
        return found

    def _windows(self, sizes: list[int], given: Mapping[str, Any], dims: int) -> tuple[list[_Window], list[int]]:
        """(start, stop, divisor) of every output index of every dimension, and the distance between two taps."""
        if self.name.startswith("adaptive"):
            outs = [n if o is None else int(o) for o, n in zip(_spread(given["output_size"], dims), sizes, strict=True)]
            spans = [[(o * n // out, -(-(o + 1) * n // out)) for o in range(out)]
                     for n, out in zip(sizes, outs, strict=True)]  # fmt: skip
            return [[(a, b, b - a) for a, b in row] for row in spans], [1] * dims
        kernel = _spread(given["kernel_size"], dims)
        stride = _spread(given.get("stride") or kernel, dims)
        padding, ceil = _spread(given.get("padding", 0), dims), bool(given.get("ceil_mode", False))
        dilation = _spread(given.get("dilation", 1), dims)
        is_max = self.name.startswith("max")
        made: list[_Window] = []
        for axis, (n, k, s, p, d) in enumerate(zip(sizes, kernel, stride, padding, dilation, strict=True)):
            span = d * (k - 1) + 1
            outputs = -(-(n + 2 * p - span) // s) + 1 if ceil else (n + 2 * p - span) // s + 1
            if ceil and (outputs - 1) * s >= n + p:
                outputs -= 1
            rows = []
            for o in range(outputs):
                start, counted = o * s - p, min(o * s - p + k, n + p) - (o * s - p)
                stop = min(start + span, n)
                start += -(start // d) * d if start < 0 else 0
                if not given.get("count_include_pad", True):
                    counted = stop - start
                if given.get("divisor_override") and not is_max:
                    counted = given["divisor_override"] if axis == 0 else 1
                rows.append((start, stop, counted))
            made.append(rows)
        return made, dilation if is_max else [1] * dims

    def _mean(self, x: Tensor, given: Mapping[str, Any], held: torch.dtype) -> Tensor:
        """Over any dimensions: as (outer, reduced, inner), where the strides allow, else of a copy."""
        dims = given.get("dim")
        reduced = sorted({d % max(1, x.dim()) for d in ([dims] if isinstance(dims, int) else dims or range(x.dim()))})
        kept = [d for d in range(x.dim()) if d not in reduced]
        shape = [1 if d in reduced else x.shape[d] for d in range(x.dim())]
        y = torch.empty([x.shape[d] for d in kept], dtype=_dtype(self.out, held), device=x.device)
        view = x.permute(*kept, *reduced)
        inside, inner = _folded(view.shape[len(kept) :], [list(view.stride()[len(kept) :])])
        outside, outer = _folded(view.shape[: len(kept)], [list(view.stride()[: len(kept)])])
        if len(inside) > 1 or len(outside) > 2:
            view = view.contiguous()
            inside, inner = [math.prod(view.shape[len(kept) :])], [[1]]
            outside, outer = [y.numel()], [[inside[0]]]
        sizes = [1] * (2 - len(outside)) + outside
        strides = [0] * (2 - len(outside)) + outer[0]
        count, stride = (inside[0], inner[0][0]) if inside else (1, 0)
        if y.numel():
            bc = min(32, triton.next_power_of_2(sizes[1]))
            br = min(64, triton.next_power_of_2(count))
            pooling.mean[triton.cdiv(sizes[1], bc), sizes[0]](
                view, y, count, sizes[1], strides[0], stride, strides[1], self.x.zero_point, self.x.scale,
                *coding(self.out), BR=br, BC=bc, **launch_options(y.device),
            )  # fmt: skip
        return y.reshape(shape) if given.get("keepdim", False) else y


def _spread(value: Any, dims: int) -> list[Any]:
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    return values * dims if len(values) == 1 else values


def _three(values: Sequence[int]) -> list[int]:
    return [1] * (3 - len(values)) + list(values)
