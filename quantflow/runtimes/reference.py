"""The reference runtime: plain PyTorch, exact integer sums, slow and obviously right. It is the specification.

Every other runtime is compared with it, node by node, on the same codes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from quantflow.errors import ArtifactError
from quantflow.host.place import adds_exactly_in_float32
from quantflow.ir.activations import Epilogue, apply_epilogue
from quantflow.ir.aten_policy import aten_op, computing
from quantflow.ir.graph import SIZE_FUNCTIONS
from quantflow.ir.op_table import MAX_ELEMENTS
from quantflow.ir.ops import COMPUTING_OPS, LINEAR_OPS
from quantflow.ir.program import Node, Program, Ref, TensorRef, substitute
from quantflow.ir.recurrence import STATE_STEPS, initial, reach, state_codes, steps
from quantflow.numerics.affine import QParams, dequantize, quantize
from quantflow.runtimes.ordinary import below_autograd
from quantflow.runtimes.runner import AbstractRunner

#: Ops that compute a real number per element; every other op moves codes, or is float by itself.
_COMPUTED = ("quantize", *COMPUTING_OPS)
#: Float32 holds every whole number up to this.
FLOAT32_INTEGERS = 2**24
#: No int8 number is larger.
WEIGHT_REACH = 128
_CONV = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}


class ReferenceRunner(AbstractRunner):
    """Executes a program node by node. Stateless between calls, so safe to call from several threads."""

    name = "reference"

    def __init__(self, program: Program) -> None:
        self.program = program
        self._frees = program.last_uses()

    def __call__(
        self, inputs: Sequence[torch.Tensor], on_value: Callable[[Node, Mapping[str, Any]], None] | None = None
    ) -> Any:
        """Run the program.

        Args:
            inputs: in the order of `program.inputs`.
            on_value: called after every node with the values alive at that point, the node's own included.
        """
        program = self.program
        values: dict[str, Any] = {i.name: x for i, x in zip(program.inputs, inputs, strict=True)}
        with below_autograd():
            for index, node in enumerate(program.nodes):
                values[node.output] = run_node(program, node, values)
                if on_value is not None:
                    on_value(node, values)
                for dead in self._frees.get(index, ()):
                    del values[dead]
            return resolve(program, program.output, values)

    def run_node(self, index: int, values: Mapping[str, Any]) -> Any:
        """One node's value from given values."""
        with torch.inference_mode():
            return run_node(self.program, self.program.nodes[index], values)

    def int8_layers(self) -> int:
        """Those of the program: this runtime executes every one as integer sums."""
        return len(self.program.int8_layers())


def resolve(program: Program, argument: Any, values: Mapping[str, Any]) -> Any:
    """An argument with its references replaced by values and stored tensors."""
    return substitute(argument, lambda r: program.tensors[r.name] if isinstance(r, TensorRef) else values[r.name])


def run_node(program: Program, node: Node, values: Mapping[str, Any]) -> Any:
    """One node's value, by the formulas in `quantflow.ir.program`."""
    if node.op in _COMPUTED:
        out = qparams_of(program, node.output)
        if out is not None and (steps := _steps(program, node, values, out)) is not None:
            return _coded(steps, node.epilogue, out)
        r = _real(program, node, values)
        return r if out is None else quantize(r, out)
    args = resolve(program, node.args, values)
    kwargs = resolve(program, dict(node.kwargs), values)
    match node.op:
        case "dequantize":
            return dequantize(args[0], _known(qparams_of(program, node.args[0].name)))
        case "clamp":
            return args[0].clamp(node.attrs["low"], node.attrs["high"])
        case "max_pool" | "cat" | "shape":
            return on_codes(node, args, kwargs)
        case "recurrence":
            return _recurrence(program, node, args)
        case "size" if node.target in SIZE_FUNCTIONS:
            return _size(node.target, args)
        case _:
            found = computing(node.target)(*args, **kwargs)
            # Sizes that the program computes are known only now; an expansion of any size takes no memory yet.
            if isinstance(found, torch.Tensor) and found.numel() > MAX_ELEMENTS:
                raise ArtifactError(
                    f"layer {node.name} ({node.target}): a tensor of {found.numel()} elements; "
                    f"{MAX_ELEMENTS} are possible"
                )
            return found


def handed_on(program: Program, node: Node, values: Mapping[str, Any], found: torch.Tensor) -> torch.Tensor:
    """The node's value where a recurrence starts each step from the state that a kernel found in the one before.

    Its states are rounded to codes in every step: one that lies next to a tie may be rounded either way, and all later
    states differ. Those that follow from a kernel's own states do not.
    """
    if node.op != "recurrence":
        return run_node(program, node, values)  # type: ignore[no-any-return]
    return _recurrence(program, node, resolve(program, node.args, values), found)


def unrounded(program: Program, node: Node, values: Mapping[str, Any]) -> torch.Tensor | None:
    """r / scale + zero_point in float64: what the node's codes are before rounding and saturation.

    None where the node only moves codes, or writes none.
    """
    out = qparams_of(program, node.output)
    if node.op not in _COMPUTED or out is None:
        return None
    if (steps := _steps(program, node, values, out)) is None:
        return _real(program, node, values).to(torch.float64) / out.scale + out.zero_point
    low, high = bounds_in_steps(node.epilogue, out)
    return steps.to(torch.float64).clamp(low, high) + out.zero_point


def _real(program: Program, node: Node, values: Mapping[str, Any]) -> torch.Tensor:
    """r, the node's float32 value before it is quantized."""
    args = resolve(program, node.args, values)
    operands = [qparams_of(program, a.name) if isinstance(a, Ref) else None for a in node.args]
    match node.op:
        case "quantize":
            r = args[0]
        case "conv" | "linear":
            r = _linear(program, node, args, operands)
        case "matmul":
            (a, b), (qa, qb) = args, (_known(q) for q in operands)
            r = _scaled(torch.matmul(_centered(a, qa), _centered(b, qb)), _float32(qa.scale * qb.scale))
        case "add" | "mul":
            a, b = (dequantize(x, _known(q)) for x, q in zip(args, operands, strict=True))
            r = a + b if node.op == "add" else a * b
        case "avg_pool":
            q = _known(operands[0])
            kwargs = resolve(program, dict(node.kwargs), values)
            r = _scaled(aten_op(node.target)(_centered(args[0], q), *args[1:], **kwargs), _float32(q.scale))
        case _:
            raise ValueError(f"{node.op} computes no real value")
    return apply_epilogue(r, node.epilogue)


def _size(name: str, args: Sequence[Any]) -> Any:
    """A function on sizes: whole numbers of 64 bits, and numbers made of them.

    Raises:
        ArtifactError: it is given something else, or its result is none.
    """
    numbers = args[1:] if name == "getitem" else args
    if any(not isinstance(x, (int, float)) for x in numbers) or (name == "pow" and not -64 <= args[1] <= 64):
        raise ArtifactError(f"program.json: {name} of {args!r}, which are no sizes")
    found = SIZE_FUNCTIONS[name](*args)
    if isinstance(found, int) and abs(found) >= 1 << 63:
        raise ArtifactError(f"program.json: {name} of {args!r} is no size")
    return found


def on_codes(node: Node, args: Any, kwargs: Mapping[str, Any]) -> Any:
    """An op that moves or compares values, applied to codes. Through int32 where torch has no int8 kernel for it."""
    if node.target in SIZE_FUNCTIONS:
        return _size(node.target, args)
    op = computing(node.target)
    if node.op == "max_pool" or "upsample" in node.target:
        x, *rest = args
        return op(x.to(torch.float32), *rest, **kwargs).to(x.dtype)
    return op(*args, **kwargs)


def qparams_of(program: Program, name: str) -> QParams | None:
    """How a value is coded; None if it is not."""
    value = program.values.get(name)
    return value.qparams if value is not None else None


def _linear(program: Program, node: Node, args: Any, operands: Sequence[QParams | None]) -> torch.Tensor:
    """acc * (scale_x * scale_w[c]) + bias[c] (+ the residual, dequantized if it is codes), float32."""
    acc, scale, bias = _sums(program, node, args, operands)
    r = _scaled(acc, scale)
    if bias is not None:
        r = r + bias
    if args[1] is not None:
        r = r + (args[1] if operands[1] is None else dequantize(args[1], operands[1]))
    return r


def _sums(
    program: Program, node: Node, args: Any, operands: Sequence[QParams | None]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """(exact sums, scale_x * scale_w, bias) of a convolution or linear; the last two fit the sums' shape."""
    qx, attrs = _known(operands[0]), node.attrs
    scale = program.tensors[attrs["weight_scale"]] * qx.scale
    centered, weight = _exact_operands(args[0], qx, program.tensors[attrs["weight"]])
    if node.op == "linear":
        acc, channel = F.linear(centered, weight), -1
    else:
        # Padding with 0 after centering is padding with zero_point before.
        conv = _CONV[weight.dim()]
        acc = conv(centered, weight, None, attrs["stride"], attrs["padding"], attrs["dilation"], attrs["groups"])
        channel = 1
    shape = [1] * acc.dim()
    shape[channel] = -1
    bias = None if attrs["bias"] is None else program.tensors[attrs["bias"]].reshape(shape)
    return acc, scale.reshape(shape) if scale.numel() > 1 else scale, bias


def _exact_operands(q: torch.Tensor, qparams: QParams, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Centered codes and a weight's codes, as floats whose products' sums are exact.

    That is float32 where no partial sum, in whatever order, can leave the whole numbers that it holds:
    max |q| * max_c sum |w_c| <= 2**24. Float64 takes twice as long.
    """
    if q.is_cpu and q.numel() and weight.numel() and adds_exactly_in_float32():
        narrow = weight.to(torch.float32)
        largest = max(abs(int(extreme) - qparams.zero_point) for extreme in q.aminmax())
        most = largest * WEIGHT_REACH * weight[0].numel()
        if most > FLOAT32_INTEGERS:
            most = largest * float(torch.linalg.vector_norm(narrow.flatten(1), 1, dim=1).max())
        if most <= FLOAT32_INTEGERS:
            return q.to(torch.float32) - qparams.zero_point, narrow
    return _centered(q, qparams), weight.to(torch.float64)


def _recurrence(program: Program, node: Node, args: Any, found: torch.Tensor | None = None) -> torch.Tensor:
    """All steps of a recurrence; the product of a state is that of its codes, p = acc * (scale_w[c] / 127) * r."""
    a, gates = node.attrs, args[0]
    h0 = initial(gates, a["cell"], args[1])
    c0 = initial(gates, a["cell"], args[2]) if a["cell"] == "lstm" else None
    weight = program.tensors[a["weight"]].t()
    bias = None if a["bias"] is None else program.tensors[a["bias"]]

    def real(h: torch.Tensor) -> torch.Tensor:
        return h @ weight

    if a["weight_scale"] is None:
        return steps(a["cell"], real, gates, bias, h0, c0, a["reverse"], found)
    scale, r = program.tensors[a["weight_scale"]] * _float32(1 / STATE_STEPS), reach(h0)

    def exact(h: torch.Tensor) -> torch.Tensor:
        return _scaled(state_codes(h, r).to(torch.float64) @ weight.to(torch.float64), scale) * r

    return steps(a["cell"], exact, gates, bias, h0, c0, a["reverse"], found)


def _steps(program: Program, node: Node, values: Mapping[str, Any], out: QParams) -> torch.Tensor | None:
    """A convolution's or linear's result in steps of its output's scale, before it is clamped and rounded; float32.

        t = fma(acc, scale_x * scale_w[c] / scale_y, bias[c] / scale_y),  t = fma(q_r - zp_r, scale_r / scale_y, t)

    None where an activation that is no clamp comes first, a residual is float32, or a constant leaves float32's range.
    """
    if node.op not in LINEAR_OPS or (node.epilogue is not None and node.epilogue.bounds is None):
        return None
    args = resolve(program, node.args, values)
    operands = [qparams_of(program, a.name) if isinstance(a, Ref) else None for a in node.args]
    if args[1] is not None and operands[1] is None:
        return None
    acc, scale, bias = _sums(program, node, args, operands)
    factor = (scale.to(torch.float64) / out.scale).to(torch.float32)
    constant = _float32(0.0) if bias is None else (bias.to(torch.float64) / out.scale).to(torch.float32)
    if not bool(factor.isfinite().all() & constant.isfinite().all()):
        return None
    t = _fused_multiply_add(acc.to(torch.float32), factor, constant)
    if args[1] is None:
        return t
    residual = _known(operands[1])
    return _fused_multiply_add(_centered(args[1], residual), _float32(residual.scale / out.scale), t)


def _fused_multiply_add(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """a * b + c, rounded to float32 once: the product of two float32 is exact in float64."""
    return torch.addcmul(c.to(torch.float64), a.to(torch.float64), b.to(torch.float64)).to(torch.float32)


def bounds_in_steps(epilogue: Epilogue | None, out: QParams) -> tuple[float, float]:
    """The least and the largest number of steps that the codes and the activation allow."""
    low, high = (float(bound - out.zero_point) for bound in out.range)
    if epilogue is None or epilogue.bounds is None:
        return low, high
    steps = [float(torch.round(_float32(bound) / _float32(out.scale))) for bound in epilogue.bounds]
    return min(max(steps[0], low), high), min(max(steps[1], low), high)


def _coded(steps: torch.Tensor, epilogue: Epilogue | None, out: QParams) -> torch.Tensor:
    low, high = bounds_in_steps(epilogue, out)
    return torch.round(steps).clamp_(low, high).add_(out.zero_point).to(out.torch_dtype)


def _centered(q: torch.Tensor, qparams: QParams) -> torch.Tensor:
    """q - zero_point in float64, where integer sums up to 2**53 are exact."""
    return q.to(torch.float64) - qparams.zero_point


def _scaled(acc: torch.Tensor, scale: float | torch.Tensor) -> torch.Tensor:
    return acc.to(torch.float32) * scale


def _float32(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float32)


def _known(qparams: QParams | None) -> QParams:
    assert qparams is not None, "the program was checked when it was built"
    return qparams
