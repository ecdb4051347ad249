"""A convolution or linear of codes as one launch: weights packed, scales folded, everything but the tensors settled."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
import triton
from torch import Tensor

from quantflow.ir.activations import Epilogue
from quantflow.numerics.affine import MAX_REDUCTION, QParams
from quantflow.runtimes.reference import bounds_in_steps
from quantflow.runtimes.triton import convolution, formulas
from quantflow.runtimes.triton.cards import Card, launch_options, scratch
from quantflow.runtimes.triton.tiles import SAFE, candidates
from quantflow.runtimes.triton.tuner import Way

#: Offsets of more elements than this need 64 bits.
WIDE = 2**31 - 2**20
#: Bytes of weights that stay in the cache in any order of the tiles, and tiles that can be numbered in float32.
_CACHED, _NUMBERED = 8 * 2**20, 2**21
#: Terms of at most so many steps of the result may be taken as shares of its range: they differ by 2^-24 of each, far
#: less than what the rule for codes next to a tie allows.
_MOST_STEPS = 2048
#: An activation may be off by so many steps of the result: the rule for codes next to a tie allows 1e-2.
_MOST_OFF = 6e-3
#: Taps of a depthwise kernel that are written out.
_UNROLLED = 25
#: A depthwise tile: positions, channels, warps.
_DEPTHWISE = (16, 32, 4)
_DEPTHWISE_WAYS = [(64, 64, 4), (32, 64, 4), (16, 64, 4), (32, 32, 2), (128, 32, 4), (8, 128, 4), (16, 16, 1)]


@dataclass(frozen=True)
class Geometry:
    """Of a convolution, one number per spatial dimension.

    Attributes:
        behind: what is padded there, where that is not what is padded in front.
    """

    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    groups: int = 1
    behind: Sequence[int] | None = None


@dataclass(frozen=True)
class Finish:
    """What happens to exact sums.

    Attributes:
        x: how the operand is coded.
        out: how the result is; None: floats.
        residual: how what is added is; None: nothing is added, or floats where `adds_float`.
    """

    x: QParams
    out: QParams | None
    residual: QParams | None = None
    adds_float: bool = False
    epilogue: Epilogue | None = None


def _triple(values: Sequence[int], fill: int) -> list[int]:
    return [fill] * (3 - len(values)) + [int(v) for v in values]


class Layer:
    """A convolution, or a linear where there is no geometry. Safe to call from several threads.

    The reduction of a legal program is at most MAX_REDUCTION long, so that int32 holds every sum.
    """

    def __init__(
        self, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, geometry: Geometry | None, finish: Finish,
        card: Card,
    ) -> None:  # fmt: skip
        """
        Args:
            weight: int8 codes, (out, in / groups, *kernel).
            weight_scale: 1 or `out` float32 values.

        Raises:
            ValueError: the reduction is longer than MAX_REDUCTION.
        """
        if weight[0].numel() > MAX_REDUCTION:
            raise ValueError(f"{weight[0].numel()} products in a sum exceed {MAX_REDUCTION}: int32 could overflow")
        self.card, self.finish, self.geometry = card, finish, geometry
        self._given = (weight, weight_scale, bias)
        self.out_channels = out = weight.shape[0]
        self.in_channels = weight.shape[1]
        self.kernel = _triple(weight.shape[2:], 1)
        self.taps = math.prod(self.kernel)
        self.groups = 1 if geometry is None else geometry.groups
        self.stride = _triple([] if geometry is None else geometry.stride, 1)
        self.padding = _triple([] if geometry is None else geometry.padding, 0)
        self.behind = self.padding if geometry is None or geometry.behind is None else _triple(geometry.behind, 0)
        self.dilation = _triple([] if geometry is None else geometry.dilation, 1)
        self.is_depthwise = self.groups > 1 and self.groups == out and self.in_channels == 1
        #: Whether windows lie side by side, of so few channels that a row of each is short.
        self.are_patches = (
            self.groups == 1 and self.taps > 1 and self.in_channels < 16 and self.stride == self.kernel
            and not any((*self.padding, *self.behind)) and self.dilation == [1, 1, 1]
        )  # fmt: skip
        device = card.device
        packed = (
            weight.flatten(2).movedim(1, 2) if weight.dim() > 2 else weight.unsqueeze(1)
        )  # (out, taps, in / groups)
        if self.is_depthwise:
            self.weight = packed.reshape(out, self.taps).t().contiguous().to(device)
        else:
            self.weight = packed.contiguous().to(device)
        x = finish.x
        self.shift = x.zero_point - (128 if x.dtype == "uint8" else 0)
        #: The largest magnitude of a code less its zero point.
        self.widest = 128 + abs(self.shift)
        sums = weight.flatten(1).to(torch.int64).sum(1) * -self.shift
        self.correction = sums.to(torch.int32).to(device)
        self._settle(weight_scale.cpu(), None if bias is None else bias.cpu())

    def _settle(self, weight_scale: Tensor, bias: Tensor | None) -> None:
        """Scales, biases and bounds, as the reference decides between its two forms."""
        f, out = self.finish, self.finish.out
        scale = (weight_scale * f.x.scale).expand(self.out_channels)
        constant = torch.zeros(self.out_channels) if bias is None else bias
        bounds = (0.0, 0.0) if f.epilogue is None else f.epilogue.bounds
        self.in_steps = int(out is not None and bounds is not None and not f.adds_float)
        if out is not None and self.in_steps:
            factor = (scale.to(torch.float64) / out.scale).to(torch.float32)
            shifted = (constant.to(torch.float64) / out.scale).to(torch.float32)
            self.in_steps = int(bool(factor.isfinite().all() & shifted.isfinite().all()))
            if self.in_steps:
                scale, constant = factor, shifted
        residual_scale, residual_zero = (1.0, 0) if f.residual is None else (f.residual.scale, f.residual.zero_point)
        low = high = inverse = 0.0
        zero_point = 0
        if out is not None:
            zero_point, inverse = out.zero_point, 1.0 / out.scale
            low, high = (float(bound - out.zero_point) for bound in out.range)
            if self.in_steps:
                low, high = bounds_in_steps(f.epilogue, out)
                residual_scale = residual_scale / out.scale
        self.activation, first, second = activation_of(None if self.in_steps else f.epilogue)
        terms = max(float(constant.abs().max()), 0.0 if f.residual is None else residual_scale * 255)
        if self.in_steps and low < high and terms <= _MOST_STEPS:
            self.in_steps, first, second = 2, high - low, formulas.ROUNDER + low + zero_point
            scale, constant = scale.to(torch.float64) / first, (constant.to(torch.float64) - low) / first
            residual_scale = residual_scale / first
        elif out is not None and bounds is None and not f.adds_float and math.isfinite(inverse):
            self.in_steps, length = -1, high - low
            inverse, low, high, zero_point = inverse / length, -low / length, length, out.range[0]
            if self.activation == formulas.GELU:
                short = (each for each, error in formulas.SHORT_GELUS.items() if error <= _MOST_OFF * out.scale)
                self.activation = next(short, formulas.GELU)
        self.scale = scale.to(torch.float32).contiguous().to(self.card.device)
        self.bias = constant.to(torch.float32).contiguous().to(self.card.device)
        self.finishing = (residual_scale, residual_zero, first, second, inverse, low, high, zero_point)
        self.adds = 2 if f.adds_float else 1 if f.residual is not None else 0

    def beside(self, others: Sequence[Layer]) -> Layer:
        """The linear whose results are this one's and the others', of the same codes, side by side."""
        given = [each._given for each in (self, *others)]
        scales = [scale.expand(weight.shape[0]) for weight, scale, _ in given]
        biases = [torch.zeros(len(weight)) if bias is None else bias.cpu() for weight, _, bias in given]
        weights = torch.cat([weight for weight, _, _ in given])
        return Layer(weights, torch.cat(scales), torch.cat(biases), None, self.finish, self.card)

    def out_dtype(self, held: torch.dtype) -> torch.dtype:
        """The result's type, where floats are held so."""
        return held if self.finish.out is None else self.finish.out.torch_dtype

    def __call__(self, x: Tensor, residual: Tensor | None = None, held: torch.dtype = torch.float32) -> Tensor:
        """
        Args:
            x: codes, (*, in) of a linear, (batch, in, *spatial) of a convolution, in any layout.
            residual: of the result's shape, or one that broadcasts to it.
            held: the type of a float result.

        Returns:
            The result; a convolution's lies channels-last in memory.
        """
        if self.geometry is None:
            rows = x.reshape(-1, self.in_channels).contiguous()
            y = torch.empty(*x.shape[:-1], self.out_channels, dtype=self.out_dtype(held), device=x.device)
            if y.numel():
                added = None if residual is None else residual.expand(y.shape).contiguous()
                sizes = [rows.shape[0], 1, 1, 1]
                self._launch(rows, [rows.shape[0], 1, 1, 1, rows.shape[1]], sizes, added, y)
            return y
        if self.are_patches:
            return self._on_patches(x, residual, held)
        x = x.movedim(1, -1).contiguous()
        sizes = self.out_sizes(x.shape[0], _triple(x.shape[1:-1], 1))
        shape = [sizes[0], *sizes[4 - len(self.geometry.stride) :], self.out_channels]
        y = torch.empty(shape, dtype=self.out_dtype(held), device=x.device)
        result = y.movedim(-1, 1)
        if y.numel():
            added = None if residual is None else residual.expand(result.shape).movedim(1, -1).contiguous()
            self._launch(x, [x.shape[0], *_triple(x.shape[1:-1], 1), x.shape[-1]], sizes, added, y)
        return result

    def _on_patches(self, x: Tensor, residual: Tensor | None, held: torch.dtype) -> Tensor:
        """Patches that do not overlap, side by side in memory: a linear of all their codes."""
        dims = x.dim() - 2
        memory, kernel = x.movedim(1, -1), self.kernel[3 - dims :]
        counts = [size // k for size, k in zip(memory.shape[1:-1], kernel, strict=True)]
        cut = memory[(slice(None), *(slice(n * k) for n, k in zip(counts, kernel, strict=True)))]
        pairs = (size for pair in zip(counts, kernel, strict=True) for size in pair)
        order = [0, *range(1, 2 * dims, 2), *range(2, 2 * dims + 1, 2), 2 * dims + 1]
        split = cut.reshape(x.shape[0], *pairs, x.shape[1]).permute(order)
        y = torch.empty(x.shape[0], *counts, self.out_channels, dtype=self.out_dtype(held), device=x.device)
        result = y.movedim(-1, 1)
        if y.numel():
            added = None if residual is None else residual.expand(result.shape).movedim(1, -1).contiguous()
            rows = split.reshape(-1, self.taps * self.in_channels)
            m, c = rows.shape
            self._launch_gemm(
                rows, y, added, self.weight, c, [1, 1, 1], [1, 1, 1], [0, 0, 0], [1, 1, 1], [1, 1, 1], [m, 1, 1, 1],
                [c, c, c, c], is_linear=True, is_padded=False, is_deep=False, aligned=math.gcd(16, c),
            )  # fmt: skip
        return result

    def out_sizes(self, batch: int, spatial: Sequence[int]) -> list[int]:
        """[batch, depth, height, width] of the result."""
        return [batch, *(
            (size + p + q - d * (k - 1) - 1) // s + 1
            for size, k, s, p, q, d in zip(
                spatial, self.kernel, self.stride, self.padding, self.behind, self.dilation, strict=True
            )
        )]  # fmt: skip

    def _launch(self, x: Tensor, shape: list[int], sizes: list[int], residual: Tensor | None, y: Tensor) -> None:
        if self.is_depthwise:
            self._launch_depthwise(x, shape, sizes, residual, y)
            return
        _, depth, height, width, channels = shape
        is_padded = any((*self.padding, *self.behind))
        moves_on = self.taps == 1 and not is_padded and self.stride == [1, 1, 1]
        strides = [depth * height * width * channels, height * width * channels, width * channels, channels]
        self._launch_gemm(
            x, y, residual, self.weight, self.in_channels, self.kernel, self.stride, self.padding, self.dilation,
            [depth, height, width], sizes, strides, is_linear=moves_on or self.geometry is None, is_padded=is_padded,
            is_deep=depth > 1 or self.padding[0] + self.behind[0] > 0 or self.kernel[0] > 1,
            aligned=math.gcd(16, channels, self.in_channels),
        )  # fmt: skip

    def _launch_gemm(
        self, x: Tensor, y: Tensor, residual: Tensor | None, weight: Tensor, c: int, kernel: Sequence[int],
        stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], spatial: Sequence[int],
        sizes: Sequence[int], strides: Sequence[int], *, is_linear: bool, is_padded: bool, is_deep: bool,
        aligned: int, run_of: int = 0,
    ) -> None:  # fmt: skip
        """`run_of`: a tap is so short that several are one block; `c` counts those of all taps."""
        m, n, taps = math.prod(sizes), self.out_channels // self.groups, 1 if run_of else math.prod(kernel)
        is_wide = max(x.numel(), y.numel()) > WIDE

        def run(way: Way) -> None:
            bm, bn, bk, group, split, warps, stages = way
            blocks = -(-c // bk)
            columns = -(-n // bn)
            tiles = -(-m // bm) * columns
            work, arrived = scratch(self.card, tiles * self.groups, bm * bn) if split > 1 else (y, y)
            convolution.convolution[tiles, self.groups, split](
                x, weight, self.scale, self.bias, self.correction, y if residual is None else residual, y, work,
                arrived, m, n, c, blocks, kernel[1], kernel[2], taps * blocks, *spatial, *sizes[1:], *strides,
                taps * c, self.out_channels, *stride, *padding, *dilation, self.finish.x.zero_point, *self.finishing,
                1 / columns, IS_LINEAR=is_linear, IS_DEEP=is_deep, IS_PADDED=is_padded,
                ONE_TAP=taps == 1 and not is_padded, ONE_BLOCK=taps * blocks == 1, RUN=run_of,
                ALIGNED=aligned, W_ALIGNED=math.gcd(16, c), EVEN_C=c % bk == 0, EVEN_N=n % bn == 0,
                BY_ROWS=weight.numel() <= _CACHED and tiles < _NUMBERED,
                ZERO_PADDING=self.finish.x.zero_point == 0, HAS_CORRECTION=self.shift != 0, IS_WIDE=is_wide,
                IS_SMALL=self.taps * self.in_channels * self.widest * 127 < 2**22, IN_STEPS=self.in_steps,
                RESIDUAL=self.adds, ACTIVATION=self.activation, IS_CENTERED=self.finishing[-1] == 0,
                BM=bm, BN=bn, BK=bk, GROUP=group, SPLIT=split, num_warps=warps,
                num_stages=stages, **launch_options(y.device),
            )  # fmt: skip

        if self.card.multiprocessors == 0:
            run(SAFE)
            return
        kinds = (
            f"{x.element_size()}{self.finish.x.dtype}.{self.adds}.{self.activation}.{y.dtype}.{is_padded:d}.{run_of}"
        )
        key = f"gemm {m}x{n}x{taps}x{c} groups {self.groups} stride {stride[-1]} {kinds}"
        ways = partial(candidates, m, n, c, taps, self.groups, self.card.multiprocessors)
        run(self.card.tuner.way(key, ways, run))

    def _launch_depthwise(
        self, x: Tensor, shape: list[int], sizes: list[int], residual: Tensor | None, y: Tensor
    ) -> None:
        m, channels = math.prod(sizes), shape[-1]

        def run(way: Way) -> None:
            bm, bn, warps = way
            convolution.depthwise[triton.cdiv(m, bm), triton.cdiv(channels, bn)](
                x, self.weight, self.scale, self.bias, self.correction, y if residual is None else residual, y,
                m, channels, *shape[1:4], *sizes[1:],
                *self.stride, *self.padding, *self.dilation, self.finish.x.zero_point, *self.finishing,
                TAPS=self.taps, TAPS_H=self.kernel[1], TAPS_W=self.kernel[2], IS_UNROLLED=self.taps <= _UNROLLED,
                HAS_CORRECTION=self.shift != 0, IS_WIDE=max(x.numel(), y.numel()) > WIDE,
                IS_SMALL=self.taps * self.widest * 127 < 2**22, IN_STEPS=self.in_steps, RESIDUAL=self.adds,
                ACTIVATION=self.activation, IS_CENTERED=self.finishing[-1] == 0,
                BM=bm, BN=bn, num_warps=warps, **launch_options(y.device),
            )  # fmt: skip

        if self.card.multiprocessors == 0:
            run(_DEPTHWISE)
            return
        key = f"depthwise {m}x{channels}x{self.taps} stride {self.stride[-1]} {self.finish.x.dtype}.{self.adds}"
        run(self.card.tuner.way(key, lambda: _DEPTHWISE_WAYS, run))


def activation_of(epilogue: Epilogue | None) -> tuple[int, float, float]:
    """(the activation's number in a kernel, its first number, its second)."""
    if epilogue is None:
        return formulas.NONE, 0.0, 0.0
    numbers = epilogue.bounds if epilogue.bounds is not None else (*epilogue.values, 0.0, 0.0)
    return formulas.ACTIVATION_NUMBERS[epilogue.kind], float(numbers[0]), float(numbers[1])


class Stem(Layer):
    """A first convolution of up to 4 channels and at most 8 taps in a row, on framed codes.

    Four channels of a pixel are one word, so that a row of taps is one run of bytes: the layer becomes one of as many
    channels as the rows have bytes together, with no padding to look after. Rows and their number are powers of two,
    so that one block may hold all of them; taps that are not there weigh nothing.
    """

    #: The most taps in a row.
    LONGEST = 8

    def __init__(
        self, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, geometry: Geometry, finish: Finish, card: Card
    ) -> None:
        super().__init__(weight, weight_scale, bias, geometry, finish, card)
        out, channels, height, width = weight.shape
        self.columns = self.LONGEST // 2 if width <= self.LONGEST // 2 else self.LONGEST
        self.height = triton.next_power_of_2(height)
        rows = torch.zeros(out, self.height, self.columns, 4, dtype=torch.int8)
        rows[:, :height, :width, :channels] = weight.movedim(1, -1)
        self.rows = rows.reshape(out, -1).to(card.device)

    @classmethod
    def fits(cls, weight: Tensor, geometry: Geometry) -> bool:
        """Whether a convolution can be computed so."""
        return (
            weight.dim() == 4 and weight.shape[1] <= 4 and weight.shape[3] <= cls.LONGEST and geometry.groups == 1
            and list(geometry.dilation) == [1, 1] and weight.shape[2] * weight.shape[3] > 1
        )  # fmt: skip

    def frame(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) of the framed image that the taps of every output stay inside of."""
        _, _, rows, columns = self.out_sizes(1, [1, height, width])
        least = (columns - 1) * self.stride[2] + self.columns
        # Rows begin at multiples of 16 bytes.
        return (rows - 1) * self.stride[1] + self.height, -(-least // 4) * 4

    def on_framed(self, x: Tensor, height: int, width: int, held: torch.dtype = torch.float32) -> Tensor:
        """
        Args:
            x: codes, (batch, *frame, 4), of images (batch, channels, height, width).
            held: the type of a float result.
        """
        sizes = self.out_sizes(x.shape[0], [1, height, width])
        y = torch.empty(sizes[0], *sizes[2:], self.out_channels, dtype=self.out_dtype(held), device=x.device)
        strides = [x.shape[1] * x.shape[2] * 4, 0, x.shape[2] * 4, 4]
        self._launch_gemm(
            x, y, None, self.rows, self.rows.shape[1], [1, self.height, 1], self.stride, [0, 0, 0], [1, 1, 1],
            [1, *x.shape[1:3]], sizes, strides, is_linear=False, is_padded=False, is_deep=False,
            aligned=math.gcd(16, 4 * self.stride[2]), run_of=4 * self.columns,
        )  # fmt: skip
        return y.movedim(-1, 1)
