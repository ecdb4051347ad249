"""The `quantflow::` operators: int8 kernels of stock PyTorch behind names that say what is fused.

They register when quantflow is imported, so a saved ScriptModule loads after `import quantflow`. Each takes plain
tensors and numbers; the packed form that oneDNN wants is kept in a cache beside the weight, never saved.

Where PyTorch's int8 kernels would saturate (`HAS_INT8_KERNELS` is False) convolutions and linears sum the same integers
in floating point: exact, and no faster than the float model.

Layout: 4-D activations are channels-last. `*_scale` and `*_zero_point` describe codes as they are stored (see
`quantflow.runtimes.torch`: most signed values are stored as uint8 with zero_point + 128). `is_nonnegative` marks int8
codes in [0, 127], whose bytes are read as uint8. `out_dtype` is "int8", "uint8" or "float32".
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F

from quantflow.host.environment import has_exact_int8_products
from quantflow.host.forks import lock
from quantflow.ir import recurrence as recurrent
from quantflow.ir.activations import ACTIVATIONS, Epilogue, apply_epilogue
from quantflow.numerics.affine import ACTIVATION_RANGE, TORCH_DTYPE

Tensor = torch.Tensor
_onednn = torch.ops.onednn
_OUT = {**TORCH_DTYPE, "float32": torch.float32}

#: Whether convolutions and linears run on PyTorch's int8 kernels, whose sums are wrong where int8 products saturate.
HAS_INT8_KERNELS = has_exact_int8_products()
#: Spatial dimensions → epilogue kind → attribute where stock PyTorch fuses it; the others follow in float32.
FUSED_IN_CONV = {
    1: {"": "none", "relu": "relu"},
    2: {"": "none", "relu": "relu", "hardtanh": "hardtanh", "hardswish": "hardswish", "silu": "swish"},
    3: {"": "none"},
}
#: The same for linear: epilogue kind → (attribute, algorithm).
FUSED_IN_LINEAR = {
    "": ("none", ""), "relu": ("relu", ""), "gelu": ("gelu", "none"), "gelu_tanh": ("gelu", "tanh"),
    "hardtanh": ("hardtanh", ""), "hardswish": ("hardswish", ""), "silu": ("swish", ""),
    "leaky_relu": ("leaky_relu", ""), "tanh": ("tanh", ""),
}  # fmt: skip
#: Packed forms kept per weight, one per input shape (oneDNN chooses the layout by it); the oldest is dropped.
_PACKED_PER_WEIGHT = 8
_POINTWISE = {
    3: _onednn.qconv1d_pointwise.default,
    4: _onednn.qconv2d_pointwise.default,
    5: _onednn.qconv3d_pointwise.default,
}
_FLOAT_CONV = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}
_SUM = _onednn.qconv2d_pointwise.binary
_LINEAR = _onednn.qlinear_pointwise.default
_LINEAR_SUM = _onednn.qlinear_pointwise.binary
_ATTRIBUTE = "_quantflow_packed"


_lock = lock()


def _packed(weight: Tensor, key: Any, pack: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
    """(packed weight, weight zero points) for one input shape, or the weight as floating point; made once.

    They are kept in the weight tensor's own attributes, so that they die with it; any other mapping from tensors
    costs a microsecond on each of a model's calls.
    """
    forms: OrderedDict[Any, tuple[Tensor, Tensor]] | None = weight.__dict__.get(_ATTRIBUTE)
    found = forms.get(key) if forms is not None else None
    if found is None:
        with _lock:
            forms = weight.__dict__.setdefault(_ATTRIBUTE, OrderedDict())
            found = forms.get(key)
            if found is None:
                found = forms[key] = (pack(), torch.zeros(weight.shape[0], dtype=torch.int8))
                while len(forms) > _PACKED_PER_WEIGHT:
                    forms.popitem(last=False)
    return found


def _dense(x: Tensor) -> Tensor:
    """The layout the kernels are fast in: channels-last for images, contiguous for everything else."""
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x.contiguous()


def flip(x: Tensor) -> Tensor:
    """int8 codes as uint8 codes with zero_point + 128, or back: the top bit flipped."""
    if x.dtype is torch.int8:
        return x.view(torch.uint8).bitwise_xor(128)
    return x.bitwise_xor(128).view(torch.int8)


def quantize(x: Tensor, scale: float, zero_point: int, dtype: str) -> Tensor:
    """q = clamp(round_half_even(x / scale) + zero_point, qmin, qmax); NaN saturates to qmax, as in the reference."""
    low, high = ACTIVATION_RANGE[dtype]
    q = torch.div(x, scale).round_()
    if zero_point:
        q.add_(zero_point)
    return _dense(q.nan_to_num_(high, high, low).clamp_(low, high).to(_OUT[dtype]))


def dequantize(x: Tensor, scale: float, zero_point: int) -> Tensor:
    """x' = (q - zero_point) * scale."""
    r = x.to(torch.float32)
    return r.sub_(zero_point).mul_(scale) if zero_point else r.mul_(scale)


def requantize(mean: Tensor, scale: float, out_scale: float, out_zero_point: int, out_dtype: str) -> Tensor:
    """Codes of mean * scale, for the mean of centered codes."""
    return quantize(mean * scale, out_scale, out_zero_point, out_dtype)


def _finish(r: Tensor, epilogue: str, values: list[float], scale: float, zero_point: int, dtype: str) -> Tensor:
    if epilogue:
        r = apply_epilogue(r, Epilogue(epilogue, tuple(values)))
    return r if dtype == "float32" else quantize(r, scale, zero_point, dtype)


def _finish_sum(
    r: Tensor, residual: Tensor | None, residual_scale: float, residual_zero_point: int,
    epilogue: str, values: list[float], scale: float, zero_point: int, dtype: str,
) -> Tensor:  # fmt: skip
    if residual is not None:
        is_real = residual.is_floating_point()
        r = r + (residual if is_real else dequantize(residual, residual_scale, residual_zero_point))
    return _finish(r, epilogue, values, scale, zero_point, dtype)


def conv(
    x: Tensor, x_scale: float, x_zero_point: int, is_nonnegative: bool, weight: Tensor, weight_scale: Tensor,
    bias: Tensor | None, stride: list[int], padding: list[int], dilation: list[int], groups: int,
    out_scale: float, out_zero_point: int, out_dtype: str, epilogue: str, values: list[float],
    residual: Tensor | None = None, residual_scale: float = 1.0, residual_zero_point: int = 0,
    may_overwrite: bool = False,
) -> Tensor:  # fmt: skip
    """Convolution over codes (batch, channels, *spatial), with residual and activation."""
    shape = x.shape
    if 0 in shape:
        return _empty_conv(x, weight, stride, padding, dilation, out_dtype)
    x = _dense(x)
    if weight.shape[2:] == (1, 1) and groups == 1 and stride == [1, 1] and padding == [0, 0]:
        # The same product as a GEMM over channels-last pixels, with less work around it.
        last = (0, 2, 3, 1)
        flat = linear(
            x.permute(last), x_scale, x_zero_point, is_nonnegative, weight, weight_scale, bias,
            out_scale, out_zero_point, out_dtype, epilogue, values,
            None if residual is None else _dense(residual).permute(last), residual_scale, residual_zero_point,
            may_overwrite,
        )  # fmt: skip
        return flat.permute(0, 3, 1, 2)
    if not HAS_INT8_KERNELS:
        r = _float_conv(x, x_scale, x_zero_point, weight, weight_scale, bias, stride, padding, dilation, groups)
        return _finish_sum(
            r, residual, residual_scale, residual_zero_point, epilogue, values, out_scale, out_zero_point, out_dtype
        )
    if is_nonnegative:
        x = x.view(torch.uint8)
    elif x.dtype is torch.int8:
        x, x_zero_point = flip(x), x_zero_point + 128
    x, stride, padding, dilation = _sound_geometry(x, x_zero_point, weight, stride, padding, dilation)
    packed, zeros = _packed(
        weight,
        (x.shape, x_zero_point),
        lambda: _onednn.qconv_prepack(
            weight, weight_scale, x_scale, x_zero_point, stride, padding, dilation, groups, list(x.shape)
        ),
    )
    attributes = FUSED_IN_CONV[len(stride)]
    if residual is None and epilogue in attributes:
        return _POINTWISE[weight.dim()](
            x, x_scale, x_zero_point, packed, weight_scale, zeros, bias, stride, padding, dilation, groups,
            out_scale, out_zero_point, _OUT[out_dtype], attributes[epilogue], values, "",
        )  # fmt: skip
    if _sums_in_place(residual, epilogue, out_dtype) and len(shape) == 4:
        return _SUM(
            x, x_scale, x_zero_point, packed, weight_scale, zeros,
            _accumulator(_dense(residual), residual, may_overwrite), bias, stride, padding, dilation, groups,
            out_scale, out_zero_point, _OUT[out_dtype], residual_scale, residual_zero_point, "sum", 1.0,
            epilogue or None, [], None,
        )  # fmt: skip
    r = _POINTWISE[weight.dim()](
        x, x_scale, x_zero_point, packed, weight_scale, zeros, bias, stride, padding, dilation, groups,
        1.0, 0, torch.float32, "none", [], "",
    )  # fmt: skip
    return _finish_sum(
        r, residual, residual_scale, residual_zero_point, epilogue, values, out_scale, out_zero_point, out_dtype
    )


def _sums_in_place(residual: Tensor | None, epilogue: str, out_dtype: str) -> TypeGuard[Tensor]:
    """Whether PyTorch's kernels can add to these codes."""
    is_code = residual is not None and not residual.is_floating_point() and residual.dtype is _OUT[out_dtype]
    return is_code and epilogue in ("", "relu")


def _accumulator(dense: Tensor, residual: Tensor, may_overwrite: bool) -> Tensor:
    """A tensor the kernel may sum into: the residual itself only when nothing reads it afterwards."""
    return dense if may_overwrite or dense is not residual else residual.clone()


def _sound_geometry(
    x: Tensor, x_zero_point: int, weight: Tensor, stride: list[int], padding: list[int], dilation: list[int]
) -> tuple[Tensor, list[int], list[int], list[int]]:
    """The same convolution, where oneDNN 3.12 would crash or sum wrongly, in a geometry that it gets right.

    Its brgemm kernels crash where padding is as wide as the dilated kernel, and give wrong sums for padded volumes of
    depth 1 and for images of output width 1 with a stride or dilation along the width.
    """
    spans = [d * (k - 1) + 1 for d, k in zip(dilation, weight.shape[2:], strict=True)]
    if x.dim() == 5 or any(p >= span for p, span in zip(padding, spans, strict=True)):
        x = _dense(F.pad(x, [p for pad in reversed(padding) for p in (pad, pad)], value=x_zero_point))
        padding = [0] * len(padding)
    if x.dim() > 3 and x.shape[-1] + 2 * padding[-1] - spans[-1] < stride[-1] and stride[-1] * dilation[-1] > 1:
        window = F.pad(x, (padding[-1], spans[-1] - x.shape[-1] - padding[-1]), value=x_zero_point)
        x = _dense(window[..., :: dilation[-1]])
        stride, padding, dilation = [*stride[:-1], 1], [*padding[:-1], 0], [*dilation[:-1], 1]
    return x, stride, padding, dilation


def _empty_conv(
    x: Tensor, weight: Tensor, stride: list[int], padding: list[int], dilation: list[int], out_dtype: str
) -> Tensor:
    sizes = zip(x.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True)
    spatial = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in sizes]
    return torch.empty(x.shape[0], weight.shape[0], *spatial, dtype=_OUT[out_dtype])


def linear(
    x: Tensor, x_scale: float, x_zero_point: int, is_nonnegative: bool, weight: Tensor, weight_scale: Tensor,
    bias: Tensor | None, out_scale: float, out_zero_point: int, out_dtype: str, epilogue: str, values: list[float],
    residual: Tensor | None = None, residual_scale: float = 1.0, residual_zero_point: int = 0,
    may_overwrite: bool = False,
) -> Tensor:  # fmt: skip
    """Linear over codes (*, in_features)."""
    shape = x.shape
    if 0 in shape:
        return torch.empty(*shape[:-1], weight.shape[0], dtype=_OUT[out_dtype])
    x = x.contiguous()
    if not HAS_INT8_KERNELS:
        r = _float_linear(x, x_scale, x_zero_point, weight, weight_scale, bias)
        return _finish_sum(
            r, residual, residual_scale, residual_zero_point, epilogue, values, out_scale, out_zero_point, out_dtype
        )
    if is_nonnegative:
        x = x.view(torch.uint8)
    packed, zeros = _packed(weight, shape, lambda: _onednn.qlinear_prepack(weight.flatten(1), list(shape)))
    if residual is None and epilogue in FUSED_IN_LINEAR:
        attribute, algorithm = FUSED_IN_LINEAR[epilogue]
        return _LINEAR(
            x, x_scale, x_zero_point, packed, weight_scale, zeros, bias, out_scale, out_zero_point, _OUT[out_dtype],
            attribute, values, algorithm,
        )  # fmt: skip
    if _sums_in_place(residual, epilogue, out_dtype):
        return _LINEAR_SUM(
            x, x_scale, x_zero_point, packed, weight_scale, zeros,
            _accumulator(residual.contiguous(), residual, may_overwrite), bias, out_scale, out_zero_point,
            _OUT[out_dtype], residual_scale, residual_zero_point, "sum", 1.0, epilogue or "none", [], "",
        )  # fmt: skip
    r = _LINEAR(
        x, x_scale, x_zero_point, packed, weight_scale, zeros, bias, 1.0, 0, torch.float32, "none", [], "",
    )  # fmt: skip
    return _finish_sum(
        r, residual, residual_scale, residual_zero_point, epilogue, values, out_scale, out_zero_point, out_dtype
    )


def _float_conv(
    x: Tensor, x_scale: float, x_zero_point: int, weight: Tensor, weight_scale: Tensor, bias: Tensor | None,
    stride: list[int], padding: list[int], dilation: list[int], groups: int,
) -> Tensor:  # fmt: skip
    """r = acc * (scale_x * scale_w[c]) + bias[c]. Centered codes are padded with 0, as codes are with zero_point.

    mkldnn_convolution sums directly; F.conv2d may hand float32 to NNPACK, whose Winograd transforms round.
    """
    q, w = _exact_in_float(x, x_zero_point, weight)
    if w.dtype is torch.float32:
        acc = torch.mkldnn_convolution(q, w, None, padding, stride, dilation, groups)
    else:
        acc = _FLOAT_CONV[w.dim()](q, w, None, stride, padding, dilation, groups).to(torch.float32)
    channels = (-1, *[1] * len(stride))
    r = acc.mul_((weight_scale * x_scale).view(channels))
    return r if bias is None else r.add_(bias.view(channels))


def _float_linear(
    x: Tensor, x_scale: float, x_zero_point: int, weight: Tensor, weight_scale: Tensor, bias: Tensor | None
) -> Tensor:
    """r = acc * (scale_x * scale_w[c]) + bias[c]."""
    q, w = _exact_in_float(x, x_zero_point, weight)
    r = F.linear(q, w.flatten(1)).to(torch.float32).mul_(weight_scale * x_scale)
    return r if bias is None else r.add_(bias)


def _exact_in_float(x: Tensor, x_zero_point: int, weight: Tensor) -> tuple[Tensor, Tensor]:
    """(q_x - zero_point, q_w) in a float type that holds every sum of their products, in whatever order it is formed.

    |sum| <= max|q_x - zero_point| * max_c(sum|q_w[c]|); float32 is exact up to 2**24, float64 for every legal program.
    Centered codes have 8 significant bits, so that a reduced float32 precision (bf16, TF32) holds them too.
    """
    codes = torch.iinfo(x.dtype)
    largest = max(codes.max - x_zero_point, x_zero_point - codes.min)

    def convert() -> Tensor:
        heaviest = int(weight.flatten(1).to(torch.int64).abs().sum(1).max())
        return _dense(weight.to(torch.float32 if largest * heaviest <= 2**24 else torch.float64))

    w, _ = _packed(weight, largest, convert)
    return x.to(w.dtype).sub_(x_zero_point), w


def matmul(
    a: Tensor, a_scale: float, a_zero_point: int, b: Tensor, b_scale: float, b_zero_point: int,
    out_scale: float, out_zero_point: int, out_dtype: str,
) -> Tensor:  # fmt: skip
    """Batched product of two activations. A float32 GEMM over codes is exact while K * 255 * 255 < 2**24."""
    dtype = torch.float32 if a.shape[-1] * 255 * 255 < 2**24 else torch.float64
    acc = torch.matmul(a.to(dtype) - a_zero_point, b.to(dtype) - b_zero_point)
    scale = torch.tensor(a_scale * b_scale, dtype=torch.float32)
    return _finish(acc.to(torch.float32) * scale, "", [], out_scale, out_zero_point, out_dtype)


def add(
    a: Tensor, a_scale: float, a_zero_point: int, b: Tensor, b_scale: float, b_zero_point: int,
    out_scale: float, out_zero_point: int, out_dtype: str, epilogue: str, values: list[float],
) -> Tensor:  # fmt: skip
    """a + b of two coded tensors that broadcast."""
    r = dequantize(a, a_scale, a_zero_point) + dequantize(b, b_scale, b_zero_point)
    return _finish(r, epilogue, values, out_scale, out_zero_point, out_dtype)


def mul(
    a: Tensor, a_scale: float, a_zero_point: int, b: Tensor, b_scale: float, b_zero_point: int,
    out_scale: float, out_zero_point: int, out_dtype: str, epilogue: str, values: list[float],
) -> Tensor:  # fmt: skip
    """a * b of two coded tensors that broadcast."""
    r = dequantize(a, a_scale, a_zero_point) * dequantize(b, b_scale, b_zero_point)
    return _finish(r, epilogue, values, out_scale, out_zero_point, out_dtype)


def max_pool(
    x: Tensor, kernel: list[int], stride: list[int], padding: list[int], dilation: list[int], ceil_mode: bool
) -> Tensor:
    """Max pooling of codes (*, *spatial), as maxima of shifted slices, one dimension after another."""
    for index, (k, s, p, d) in enumerate(zip(kernel, stride, padding, dilation, strict=True)):
        axis = x.dim() - len(kernel) + index
        size, span = x.shape[axis], d * (k - 1) + 1
        out = -(-(size + 2 * p - span) // s) + 1 if ceil_mode else (size + 2 * p - span) // s + 1
        if ceil_mode and (out - 1) * s >= size + p:
            out -= 1
        # A tap reads x[i * s + offset] for the outputs i in [first, last] where that lies inside x.
        offsets = [tap * d - p for tap in range(k)]
        taps = [(max(0, -(o // s)), min(out - 1, (size - 1 - o) // s), o) for o in offsets]
        y: Tensor | None = None
        for first, last, offset in sorted(taps, key=lambda tap: tap[0] - tap[1]):
            if first > last:
                continue
            part = x.narrow(axis, first * s + offset, (last - first) * s + 1)[_every(axis, s)]
            if last - first + 1 == out:
                y = part.clone() if y is None else torch.maximum(y, part, out=y)
                continue
            y = _lowest(x, axis, out) if y is None else y
            inside = y.narrow(axis, first, last - first + 1)
            torch.maximum(inside, part, out=inside)
        x = _lowest(x, axis, out) if y is None else y
    return x


def _lowest(x: Tensor, axis: int, size: int) -> Tensor:
    """The lowest code everywhere, in x's shape with another size along one dimension."""
    return x.new_full([*x.shape[:axis], size, *x.shape[axis + 1 :]], torch.iinfo(x.dtype).min)


def _every(axis: int, step: int) -> tuple[slice, ...]:
    return (*(slice(None),) * axis, slice(None, None, step))


def clamp(x: Tensor, low: int, high: int) -> Tensor:
    """Codes clamped to [low, high]."""
    return x.clamp(low, high)


#: Sums of products of two codes up to 127 are whole numbers that float32 holds, in reductions no longer than this.
_EXACT_IN_FLOAT32 = 2**24 // 127**2


def recurrence(
    gates: Tensor, weight: Tensor, weight_scale: Tensor | None, bias: Tensor | None, h0: Tensor | None,
    c0: Tensor | None, cell: str, reverse: bool,
) -> Tensor:  # fmt: skip
    """The steps of an LSTM, GRU or RNN; products of codes where there is a `weight_scale`, summed exactly in floats."""
    h = recurrent.initial(gates, cell, h0)
    c = recurrent.initial(gates, cell, c0) if cell == "lstm" else None
    transposed = weight.t()
    if weight_scale is None:
        return recurrent.steps(cell, lambda state: state @ transposed, gates, bias, h, c, reverse)
    wide = torch.float32 if weight.shape[1] <= _EXACT_IN_FLOAT32 else torch.float64
    codes, scale, r = transposed.to(wide), weight_scale * torch.tensor(1 / recurrent.STATE_STEPS), recurrent.reach(h)

    def product(state: Tensor) -> Tensor:
        return (recurrent.state_codes(state, r).to(wide) @ codes).to(torch.float32).mul_(scale).mul_(r)

    return recurrent.steps(cell, product, gates, bias, h, c, reverse)


_X = (
    "Tensor x, float x_scale, int x_zero_point, bool is_nonnegative, Tensor weight, Tensor weight_scale, Tensor? bias, "
)
_OUTPUT = "float out_scale, int out_zero_point, str out_dtype"
_EPILOGUE = ", str epilogue, float[] values"
_PAIR = "Tensor a, float a_scale, int a_zero_point, Tensor b, float b_scale, int b_zero_point, "
_RESIDUAL = ", Tensor residual, float residual_scale, int residual_zero_point, bool may_overwrite"
_GEOMETRY = "int[] stride, int[] padding, int[] dilation, int groups, "

_library = torch.library.Library("quantflow", "DEF")


def _register(name: str, schema: str, function: Callable[..., Any]) -> None:
    _library.define(f"{name}({schema}) -> Tensor")
    _library.impl(name, function, "CPU")


for _kind in ("", *ACTIVATIONS):
    _suffix = f"_{_kind}" if _kind else ""
    _register(f"conv{_suffix}", _X + _GEOMETRY + _OUTPUT + _EPILOGUE, conv)
    _register(f"conv_sum{_suffix}", _X + _GEOMETRY + _OUTPUT + _EPILOGUE + _RESIDUAL, conv)
    _register(f"linear{_suffix}", _X + _OUTPUT + _EPILOGUE, linear)
    _register(f"linear_sum{_suffix}", _X + _OUTPUT + _EPILOGUE + _RESIDUAL, linear)
    _register(f"add{_suffix}", _PAIR + _OUTPUT + _EPILOGUE, add)
    _register(f"mul{_suffix}", _PAIR + _OUTPUT + _EPILOGUE, mul)
_register("matmul", _PAIR + _OUTPUT, matmul)
_register("quantize", "Tensor x, float scale, int zero_point, str dtype", quantize)
_register("dequantize", "Tensor x, float scale, int zero_point", dequantize)
_register("requantize", "Tensor mean, float scale, float out_scale, int out_zero_point, str out_dtype", requantize)
_register("max_pool", "Tensor x, int[] kernel, int[] stride, int[] padding, int[] dilation, bool ceil_mode", max_pool)
_register(
    "recurrence",
    "Tensor gates, Tensor weight, Tensor? weight_scale, Tensor? bias, Tensor? h0, Tensor? c0, str cell, bool reverse",
    recurrence,
)
_register("clamp", "Tensor x, int low, int high", clamp)
_register("flip", "Tensor x", flip)
