"""The ops of a program: which ATen ops each stands for, what it takes, and what becomes of the codes, in one table.

Adding one takes a row here, how a node becomes its unit in `units`, its formula in `quantflow.runtimes.reference`, and
a kernel in the other runtimes. `quantflow.stages.convert` writes down by itself what pairs two values or keeps its ATen
name; what moves codes is planned, checked and stored as such because its row says so.
"""

from __future__ import annotations

from dataclasses import dataclass

POOLS = ("max_pool1d", "max_pool2d", "max_pool3d")
AVERAGES = (
    "avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d",
    "mean",
)  # fmt: skip
SHAPES = (
    "reshape", "flatten", "unflatten", "permute", "transpose", "t", "slice", "select", "squeeze", "unsqueeze", "split",
    "split_with_sizes", "chunk", "unbind", "expand", "repeat", "roll", "flip", "pixel_shuffle", "pixel_unshuffle",
    "channel_shuffle", "narrow", "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "constant_pad_nd",
    "pad",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Op:
    """One row.

    Attributes:
        aten: the ATen ops that it stands for; none for what has no counterpart, or any.
        arity: how many arguments it takes; None where it keeps the name of an ATen op (or of a function on sizes) and
            that op's arguments.
        has_weight: a convolution or linear.
        computes: a real number per element, which is rounded to codes or stays float32.
        moves_codes: moves or compares codes; output and inputs share one scale and zero point.
    """

    aten: tuple[str, ...] = ()
    arity: int | None = None
    has_weight: bool = False
    computes: bool = False
    moves_codes: bool = False


OPS: dict[str, Op] = {
    "quantize": Op(arity=1),
    "dequantize": Op(arity=1),
    "conv": Op(aten=("conv1d", "conv2d", "conv3d"), arity=2, has_weight=True, computes=True),
    "linear": Op(aten=("linear",), arity=2, has_weight=True, computes=True),
    "matmul": Op(aten=("matmul", "bmm"), arity=2, computes=True),
    "add": Op(aten=("add",), arity=2, computes=True),
    "mul": Op(aten=("mul",), arity=2, computes=True),
    "clamp": Op(arity=1, moves_codes=True),
    "max_pool": Op(aten=POOLS, moves_codes=True),
    "avg_pool": Op(aten=AVERAGES, computes=True),
    "shape": Op(aten=SHAPES, moves_codes=True),
    "cat": Op(aten=("cat",), moves_codes=True),
    "recurrence": Op(arity=3),
    "aten": Op(),
    "size": Op(),
}
LINEAR_OPS = tuple(name for name, op in OPS.items() if op.has_weight)
#: Ops that carry the name of an ATen op (or a size function) and its arguments.
NAMED_OPS = tuple(name for name, op in OPS.items() if op.arity is None)
#: Ops on two values that are both codes.
PAIR_OPS = tuple(name for name, op in OPS.items() if op.arity == 2 and not op.has_weight)
COMPUTING_OPS = tuple(name for name, op in OPS.items() if op.computes)
MOVING_OPS = tuple(name for name, op in OPS.items() if op.moves_codes)
#: The convolutions and linears of a captured graph.
LINEARS = tuple(aten for name in LINEAR_OPS for aten in OPS[name].aten)
#: Transposed convolutions by their dimensions, which `passes.transposed_convolutions` writes as ordinary ones.
TRANSPOSED = ("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
#: What reads a table of weights, which is its first argument.
LOOKUPS = ("embedding", "_embedding_bag", "embedding_bag", "index_select")
#: Other ops that multiply by weights → the positions of the arguments that may be weights.
PRODUCTS = {
    "matmul": (0, 1), "mm": (0, 1), "bmm": (0, 1), "mv": (0, 1), "dot": (0, 1), "addmm": (1, 2), "addmv": (1, 2),
    "addbmm": (1, 2), "baddbmm": (1, 2), "einsum": (1,), "tensordot": (0, 1), "bilinear": (2,), "_trilinear": (1,),
    "chain_matmul": (0,),
}  # fmt: skip
#: Convolutions and recurrent layers that have no int8 form; their weights may also be computed at run time.
FLOAT_LAYERS = (
    "conv_tbc", "lstm", "gru", "rnn_tanh", "rnn_relu",
    "lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell",
)  # fmt: skip
