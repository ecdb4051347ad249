"""Ops that move elements, look them up or make them by position."""

from __future__ import annotations

from typing import Any

import torch

from quantflow.exchange.onnx_arguments import Given, Write, out, positive, scalar, spread
from quantflow.exchange.onnx_writer import Writer

#: The largest int64, where a slice has no end.
_END = (1 << 63) - 1


def _reshape(key: str) -> Write:
    return lambda w, given: w.add("Reshape", [w.of(given["self"]), w.sizes(given[key])], allowzero=0)


def _flatten(w: Writer, given: Given) -> str:
    rank = w.rank(given["self"])
    first, last = positive(given["start_dim"], rank), positive(given["end_dim"], rank)
    if first == 1 and last == rank - 1:
        return w.add("Flatten", [w.of(given["self"])], axis=1)
    return _regrouped(w, given["self"], first, w.ints(-1), last + 1)


def _permute(w: Writer, given: Given) -> str:
    rank = w.rank(given["self"])
    return w.add("Transpose", [w.of(given["self"])], perm=[positive(d, rank) for d in given["dims"]])


def _transpose(w: Writer, given: Given) -> str:
    rank = w.rank(given["self"])
    perm = list(range(rank))
    a, b = (positive(given.get(k, default), rank) for k, default in (("dim0", 0), ("dim1", rank - 1)))
    perm[a], perm[b] = perm[b], perm[a]
    return w.add("Transpose", [w.of(given["self"])], perm=perm)


def _unsqueeze(w: Writer, given: Given) -> str:
    return w.add("Unsqueeze", [w.of(given["self"]), w.ints(positive(given["dim"], w.rank(given["self"]) + 1))])


def _squeeze(w: Writer, given: Given) -> str:
    dims, shape = given.get("dim"), w.value(given["self"]).shape
    dims = range(len(shape)) if dims is None else [dims] if isinstance(dims, int) else dims
    ones = [d for d in dims if shape[d] == 1]
    return w.add("Squeeze", [w.of(given["self"]), w.ints(*ones)]) if ones else w.of(given["self"])


def _expand(w: Writer, given: Given) -> str:
    return w.add("Expand", [w.of(given["self"]), w.sizes([1 if s == -1 else s for s in given["size"]])])


def _slice(w: Writer, given: Given) -> str:
    start, end = 0 if given["start"] is None else given["start"], given["end"]
    ends = w.ints(_END) if end is None else w.size(end)
    return w.add("Slice", [w.of(given["self"]), w.size(start), ends, w.ints(given["dim"]), w.size(given["step"])])


def _select(w: Writer, given: Given) -> str:
    index = given["index"]
    at = w.number(index, torch.int64) if isinstance(index, int) else scalar(w, index, torch.int64)
    return w.add("Gather", [w.of(given["self"]), at], axis=given["dim"])


def _cat(w: Writer, given: Given) -> str:
    return w.add("Concat", [w.of(x) for x in given["tensors"]], axis=given["dim"])


def _stack(w: Writer, given: Given) -> str:
    dim = positive(given["dim"], w.rank(given["tensors"][0]) + 1)
    return w.add("Concat", [w.add("Unsqueeze", [w.of(x), w.ints(dim)]) for x in given["tensors"]], axis=dim)


def _split(w: Writer, given: Given) -> list[str]:
    parts = [x.shape[given["dim"]] for x in w.value(out(w))]
    return w.add_many("Split", [w.of(given["self"]), w.ints(*parts)], len(parts), axis=given["dim"])


def _unbind(w: Writer, given: Given) -> list[str]:
    x, count = w.of(given["self"]), len(w.value(out(w)))
    return [w.add("Gather", [x, w.number(i, torch.int64)], axis=given["dim"]) for i in range(count)]


def _pad(w: Writer, given: Given) -> str:
    rank, pads, value = w.rank(given["self"]), list(given["pad"]), given.get("value") or 0
    if given.get("mode", "constant") != "constant":
        raise w.refused(f"padding by {given['mode']}")
    q = w.qparams(given["self"])
    real = float(value) if q is None else (value - q.zero_point) * q.scale
    before, after = [0] * rank, [0] * rank
    for i in range(len(pads) // 2):
        before[rank - 1 - i], after[rank - 1 - i] = pads[2 * i], pads[2 * i + 1]
    return w.add("Pad", [w.of(given["self"]), w.ints(*before, *after), w.number(real, torch.float32)])


def _unflatten(w: Writer, given: Given) -> str:
    dim = positive(given["dim"], w.rank(given["self"]))
    return _regrouped(w, given["self"], dim, w.sizes(given["sizes"]), dim + 1)


def _regrouped(w: Writer, x: Any, first: int, sizes: str, rest: int) -> str:
    """Dimensions [first, rest) in other sizes; those around them as they are, whatever they are."""
    parts = [w.ints(*[0] * first)] if first else []
    parts.append(sizes)
    if rest < w.rank(x):
        parts.append(w.add("Shape", [w.of(x)], start=rest))
    shape = w.add("Concat", parts, axis=0) if len(parts) > 1 else parts[0]
    return w.add("Reshape", [w.of(x), shape], allowzero=0)


def _pixel_shuffle(w: Writer, given: Given) -> str:
    if w.rank(given["self"]) != 4:
        raise w.refused("a pixel shuffle of other than images")
    return w.add("DepthToSpace", [w.of(given["self"])], blocksize=given["upscale_factor"], mode="CRD")


def _repeat(w: Writer, given: Given) -> str:
    x, repeats = w.of(given["self"]), given["repeats"]
    if ones := len(repeats) - w.rank(given["self"]):
        x = w.add("Unsqueeze", [x, w.ints(*range(ones))])
    return w.add("Tile", [x, w.sizes(repeats)])


def _expand_as(w: Writer, given: Given) -> str:
    return w.add("Expand", [w.of(given["self"]), w.add("Shape", [w.of(given["other"])])])


def _flip(w: Writer, given: Given) -> str:
    rank = w.rank(given["self"])
    dims = [positive(d, rank) for d in given["dims"]]
    ones = [-1] * len(dims)
    return w.add(
        "Slice", [w.of(given["self"]), w.ints(*ones), w.ints(*[-_END] * len(dims)), w.ints(*dims), w.ints(*ones)]
    )


def _roll(w: Writer, given: Given) -> str:
    """Around each dimension in turn; a slice clamps, so that a shift has to be within the size that was seen."""
    x, shifts, dims = w.of(given["self"]), spread(given["shifts"], 1), spread(given["dims"] or [], 1)
    if not dims:
        raise w.refused("a roll over all elements")
    shape = w.value(given["self"]).shape
    for shift, dim in zip(shifts, dims, strict=True):
        if abs(shift) > shape[dim]:
            raise w.refused(f"a roll by {shift} over {shape[dim]} places")
        if not shift:
            continue
        axis, at = w.ints(dim), w.ints(-shift)
        back = w.add("Slice", [x, at, w.ints(_END), axis])
        x = w.add("Concat", [back, w.add("Slice", [x, w.ints(0), at, axis])], axis=dim)
    return x


# -- tables and positions


def _embedding(w: Writer, given: Given) -> str:
    return w.add("Gather", [w.of(given["weight"]), w.of(given["indices"])], axis=0)


def _gather(w: Writer, given: Given) -> str:
    return w.add("GatherElements", [w.of(given["self"]), w.of(given["index"])], axis=given["dim"])


def _index_select(w: Writer, given: Given) -> str:
    return w.add("Gather", [w.of(given["self"]), w.of(given["index"])], axis=given["dim"])


def _index(w: Writer, given: Given) -> str:
    x, indices = given["self"], list(given["indices"])
    known = [i for i in indices if i is not None]
    if any(w.dtype(i) is torch.bool for i in known):
        raise w.refused("an index of flags")
    if len(known) == 1:
        return w.add("Gather", [w.of(x), w.of(known[0])], axis=indices.index(known[0]))
    if len(known) < len(indices):
        raise w.refused("indices around a whole dimension")
    zero = w.number(0, torch.int64)
    names = [w.as_operand(i, torch.int64) for i in known]
    together = names[0]
    for name in names[1:]:
        together = w.add("Add", [together, name])
    nothing = w.add("Mul", [together, zero])  # of the shape that all indices broadcast to
    last = [w.add("Unsqueeze", [w.add("Add", [name, nothing]), w.ints(-1)]) for name in names]
    return w.add("GatherND", [w.of(x), w.add("Concat", last, axis=-1)])


def _arange(w: Writer, given: Given) -> str:
    dtype = w.dtype(out(w))
    start, step = given.get("start", 0), given.get("step", 1)
    return w.add("Range", [scalar(w, each, dtype) for each in (start, given["end"], step)])


def _full(value: float | None, like: bool = False) -> Write:
    def write(w: Writer, given: Given) -> str:
        filled = w.number(given["fill_value"] if value is None else value, w.dtype(out(w)))
        shape = w.add("Shape", [w.of(given["self"])]) if like else w.sizes(given["size"])
        return w.add("Expand", [filled, shape])

    return write


OPS: dict[str, Write] = {
    "reshape": _reshape("shape"),
    "view": _reshape("size"),
    "_unsafe_view": _reshape("size"),
    "flatten": _flatten,
    "permute": _permute,
    "transpose": _transpose,
    "t": _transpose,
    "unsqueeze": _unsqueeze,
    "squeeze": _squeeze,
    "expand": _expand,
    "slice": _slice,
    "select": _select,
    "cat": _cat,
    "stack": _stack,
    **dict.fromkeys(("split", "split_with_sizes", "chunk"), _split),
    "unbind": _unbind,
    **dict.fromkeys(("constant_pad_nd", "pad"), _pad),
    "embedding": _embedding,
    "gather": _gather,
    "index": _index,
    "index_select": _index_select,
    "arange": _arange,
    "full": _full(None),
    "ones": _full(1),
    "zeros": _full(0),
    "full_like": _full(None, like=True),
    "ones_like": _full(1, like=True),
    "zeros_like": _full(0, like=True),
    "unflatten": _unflatten,
    "pixel_shuffle": _pixel_shuffle,
    "repeat": _repeat,
    "expand_as": _expand_as,
    "flip": _flip,
    "roll": _roll,
}
