"""Rules of ops whose results are bounded rather than known: by their operands, or by a number that they are given."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from quantflow.ir.op_shapes.computes import RULES as COMPUTES
from quantflow.ir.op_shapes.moves import RULES as MOVES
from quantflow.ir.op_shapes.parts import (
    ANY,
    Dims,
    Given,
    Shape,
    Size,
    axis_of,
    broadcast,
    changed,
    check_size,
    first_of,
    product_of,
    sizes_of,
    without,
)
from quantflow.ir.op_shapes.windows import RULES as WINDOWS
from quantflow.ir.op_table import MAX_ITEMS, Row

Rule = Callable[[Row, Given], Any]


def _operands(row: Row, given: Given) -> list[Shape]:
    """Every tensor that it is given, those in lists too."""
    values = [given.get(argument.name) for argument in row.arguments]
    flat = [item for value in values for item in (value if isinstance(value, list) else [value])]
    return [value for value in flat if isinstance(value, Shape)]


def _dims(given: Given, name: str) -> Dims | None:
    value = given.get(name)
    return value.dims if isinstance(value, Shape) else None


def _bounded(count: int) -> Shape:
    """A tensor of unknown shape and at most so many elements."""
    check_size(Shape((count,)))
    return Shape(None, count)


def _within(row: Row, given: Given) -> Any:
    """No more than all operands together."""
    return _bounded(sum(operand.elements for operand in _operands(row, given) if operand != ANY))


def _parts_within(row: Row, given: Given) -> Any:
    whole = _within(row, given)
    sections = given.get("sections", 1)
    if isinstance(sections, int) and not 1 <= sections <= MAX_ITEMS:
        raise ValueError(f"makes {sections} parts; 1 to {MAX_ITEMS} are possible")
    return None if whole == ANY else ANY


def _broadcast_within(row: Row, given: Given) -> Any:
    """No more than the operands' common shape."""
    found = COMPUTES["broadcast"](row, given)
    return _bounded(found.elements) if found != ANY else ANY


def _loss(row: Row, given: Given) -> Any:
    """A number, or one of each element of a shape that the operands have together."""
    if given.get("reduction", 1) in (1, 2):
        return Shape(())
    return _broadcast_within(row, given)


def _class_loss(row: Row, given: Given) -> Any:
    """The same where a target names classes: its shape is not the scores'."""
    return Shape(()) if given.get("reduction", 1) in (1, 2) else _within(row, given)


def _twice(rule: Rule) -> Rule:
    def rule_of_both(row: Row, given: Given) -> Any:
        return [rule(row, given)] * 2

    return rule_of_both


def _normalized(row: Row, given: Given) -> Any:
    """The first operand's shape, and statistics that are smaller."""
    return [Shape(first_of(row, given)), ANY, ANY]


def _rms_normalized(row: Row, given: Given) -> Any:
    return [Shape(first_of(row, given)), ANY]


def _half_window(_row: Row, given: Given) -> Any:
    return Shape((given["n"] // 2 + 1 if isinstance(given["n"], int) else None,))


def _group_norm(row: Row, given: Given) -> Any:
    dims = first_of(row, given)
    n, c, area, group = (given[name] for name in ("N", "C", "HxW", "group"))
    if all(isinstance(value, int) for value in (c, group)) and c % group:
        raise ValueError(f"has {c} channels in {group} groups")
    is_known = dims is not None and None not in dims and all(isinstance(value, int) for value in (n, c, area))
    if is_known and math.prod(size or 0 for size in dims or ()) != n * c * area:
        raise ValueError(f"takes {n} * {c} * {area} elements, gets {dims}")
    for role in ("weight", "bias"):
        held = _dims(given, role)
        if held is not None and isinstance(c, int) and held not in ((c,), (None,)):
            raise ValueError(f"has a {role} of shape {held} for {c} channels")
    return [Shape(dims), ANY, ANY]


def _movedim(row: Row, given: Given) -> Any:
    dims = first_of(row, given)
    source, to = (sizes_of(given[name]) for name in ("source", "destination"))
    if dims is None or source is None or to is None or None in source or None in to:
        return ANY
    if len(source) != len(to):
        raise ValueError(f"moves {len(source)} dimensions to {len(to)} places")
    rank = max(1, len(dims))
    places = {t % rank: s % rank for s, t in zip(source, to, strict=True) if s is not None and t is not None}
    if not dims:
        return Shape(())
    rest = iter([i for i in range(rank) if i not in places.values()])
    return Shape(tuple(dims[places[i] if i in places else next(rest)] for i in range(rank)))


def _reversed(row: Row, given: Given) -> Any:
    dims = first_of(row, given)
    return ANY if dims is None else Shape(tuple(reversed(dims)))


def _ravel(row: Row, given: Given) -> Any:
    dims = first_of(row, given)
    return ANY if dims is None else Shape((product_of(dims),))


def _diag(row: Row, given: Given) -> Any:
    """A vector becomes a matrix, a matrix its diagonal."""
    dims, k = first_of(row, given), given.get("diagonal", 0)
    if dims is None or not isinstance(k, int):
        return ANY
    if len(dims) not in (1, 2):
        raise ValueError(f"takes a vector or a matrix, gets {len(dims)} dimensions")
    if len(dims) == 2:
        return Shape((None,), _within(row, given).most)
    side = abs(k) if dims[0] is None else dims[0] + abs(k)
    check_size(Shape((side, side)))
    return Shape((None, None) if dims[0] is None else (side, side))


def _pad_sequence(_row: Row, given: Given) -> Any:
    parts = given["sequences"]
    if not isinstance(parts, list) or any(not isinstance(p, Shape) or not p.dims for p in parts):
        return ANY
    longest = max((p.dims[0] or 0 for p in parts), default=0)
    return _bounded(len(parts) * longest * max((Shape(p.dims[1:]).elements for p in parts), default=0))


def _conv_tbc(row: Row, given: Given) -> Any:
    dims, weight, pad = first_of(row, given), _dims(given, "weight"), given.get("pad", 0)
    if dims is None or weight is None or not isinstance(pad, int):
        return ANY
    if len(dims) != 3 or len(weight) != 3:
        raise ValueError(f"takes 3 dimensions, gets {len(dims)} and a weight of {len(weight)}")
    if pad < 0:
        raise ValueError(f"pads by {pad}")
    time = None if dims[0] is None or weight[0] is None else dims[0] + 2 * pad - weight[0] + 1
    return Shape((2 * pad if time is None and pad >= 1 << 16 else time, dims[1], weight[2]))


def _inner(_row: Row, given: Given) -> Any:
    a, b = _dims(given, "self"), _dims(given, "other")
    if a is None or b is None:
        return ANY
    if not a or not b:
        return Shape(a or b)
    if None not in (a[-1], b[-1]) and a[-1] != b[-1]:
        raise ValueError(f"multiplies {a} by {b}")
    return Shape((*a[:-1], *b[:-1]))


def _bilinear(_row: Row, given: Given) -> Any:
    a, weight = _dims(given, "input1"), _dims(given, "weight")
    if a is None or weight is None:
        return ANY
    if not a or len(weight) != 3:
        raise ValueError(f"takes features and a weight of 3 dimensions, gets {a} and {weight}")
    return Shape((*a[:-1], weight[0]))


def _product_of_ends(_row: Row, given: Given) -> Any:
    """Of several matrices; products on the way are no larger than all operands' rows times columns."""
    parts = given["tensors"]
    if not isinstance(parts, list) or any(not isinstance(p, Shape) or p.dims is None for p in parts):
        return ANY
    longest = [max((size or 1 for p in parts for size in p.dims[-2:][at:][:1]), default=1) for at in (0, 1)]
    check_size(Shape((max(longest), max(longest))))
    return ANY


def _added(rows: str, columns: str) -> Rule:
    """A product of two operands, added to what broadcasts to it."""

    def rule(_row: Row, given: Given) -> Any:
        a, b = _dims(given, rows), _dims(given, columns)
        if a is None or b is None:
            return ANY
        if len(a) < 2:
            raise ValueError(f"multiplies {a} by {b}")
        return Shape((a[-2],) if len(b) == 1 else (a[-2], b[-1]))

    return rule


def _bags(_row: Row, given: Given) -> Any:
    table, index, offsets = (_dims(given, name) for name in ("weight", "indices", "offsets"))
    if table is None or index is None or offsets is None:
        return [ANY] * 4
    if len(table) != 2 or len(index) not in (1, 2):
        raise ValueError(f"takes a table of rows and indices, gets {table} and {index}")
    bags: Size = index[0] if len(index) == 2 else offsets[0] if offsets else 1
    if len(index) == 1 and bags is not None and given.get("include_last_offset"):
        bags -= 1
    check_size(Shape((bags, table[1])))
    return [Shape((bags, table[1])), ANY, ANY, ANY]


def _places(row: Row, given: Given) -> Any:
    """Where it is not 0: one row of coordinates each."""
    dims = first_of(row, given)
    if dims is None:
        return ANY
    # Whole numbers of 8 bytes.
    return Shape((None, len(dims)), _bounded(2 * len(dims) * Shape(dims).elements).most)


def _places_by_dimension(row: Row, given: Given) -> Any:
    _places(row, given)
    return None


def _chosen(row: Row, given: Given) -> Any:
    return Shape((None,), _broadcast_within(row, given).most)


def _sought(_row: Row, given: Given) -> Any:
    value = given["self"]
    return Shape(value.dims if isinstance(value, Shape) else ())


def _take_along(row: Row, given: Given) -> Any:
    a, index, axis = first_of(row, given), _dims(given, "indices"), given.get("dim")
    if a is None or index is None or not isinstance(axis, int):
        return ANY
    if len(a) != len(index):
        raise ValueError(f"takes indices of {len(a)} dimensions, gets {len(index)}")
    axis %= max(1, len(a))
    if not a:
        return Shape(())
    return Shape(changed(broadcast([changed(a, axis, 1), changed(index, axis, 1)]), axis, index[axis]))


def _quantile(row: Row, given: Given) -> Any:
    found, q = COMPUTES["reduce"](row, given), given["q"]
    if found == ANY or found.dims is None:
        return ANY
    if isinstance(q, Shape):
        return ANY if q.dims is None else Shape((*q.dims, *found.dims))
    return found


def _summed_along(row: Row, given: Given) -> Any:
    """Without the dimension `dim`, the last one unless it is named."""
    dims = first_of(row, given)
    axis = None if dims is None else axis_of(given, "dim", len(dims), -1)
    if dims is None or axis is None:
        return ANY
    if not dims:
        raise ValueError("integrates a number")
    x = _dims(given, "x")
    if x is not None and len(x) > 1:
        return _broadcast_within(row, given)
    return Shape(without(dims, {axis}))


def _decomposed(row: Row, given: Given) -> Any:
    """Of matrices (..., m, n): factors of at most m * m and n * n."""
    most = 0
    for operand in _operands(row, given):
        dims = operand.dims
        if dims is None or len(dims) < 2:
            continue
        m, n = dims[-2] or 1, dims[-1] or 1
        whole = (*dims[:-2], max(m, n), max(m, n))
        check_size(Shape(whole))
        most = max(most, 2 * Shape(whole).elements)
    return _bounded(most)


def _factors(row: Row, given: Given) -> Any:
    _decomposed(row, given)
    return None


def _solved(row: Row, given: Given) -> Any:
    """Matrices in batches that broadcast."""
    batches = [o.dims[:-2] for o in _operands(row, given) if o.dims is not None and len(o.dims) >= 2]
    largest = max((Shape(o.dims[-2:]).elements for o in _operands(row, given) if o.dims), default=1)
    _decomposed(row, given)
    common = broadcast(batches) if len({len(b) for b in batches}) <= 1 else max(batches, key=len)
    return _bounded(2 * largest * Shape(common).elements)


def _solved_parts(row: Row, given: Given) -> Any:
    _solved(row, given)
    return None


def _transformed(row: Row, given: Given) -> Any:
    """Fourier over several dimensions, each cut or padded to the size that is asked for; complex numbers."""
    dims, sizes, axes = first_of(row, given), sizes_of(given.get("s")), sizes_of(given.get("dim"))
    if dims is None:
        return ANY
    if sizes is None and given.get("s") is not None:
        return ANY
    if axes is None:
        count = len(sizes) if sizes is not None else 2 if row.target.split(".")[0].endswith("2") else len(dims)
        axes = list(range(-count, 0))
    if sizes is not None and len(sizes) == 1:
        sizes = sizes * len(axes)
    if sizes is not None and len(sizes) != len(axes):
        raise ValueError(f"asks for {len(sizes)} sizes of {len(axes)} dimensions")
    whole = dims
    for at, axis in enumerate(axes):
        if axis is None or not -len(dims) <= axis < len(dims):
            raise ValueError(f"names dimension {axis} of {len(dims)}")
        size = sizes[at] if sizes is not None else None
        axis %= len(dims)
        # Half a spectrum gives twice its size.
        given_size = whole[axis]
        whole = changed(whole, axis, size if size not in (None, -1) else None if given_size is None else 2 * given_size)
    return _bounded(2 * Shape(whole).elements)


def _spectrogram(row: Row, given: Given) -> Any:
    dims, n = first_of(row, given), given["n_fft"]
    hop = given.get("hop_length")
    if dims is None or not dims or not isinstance(n, int):
        return ANY
    step = hop if isinstance(hop, int) else max(1, n // 4)
    frames = 1 + ((dims[-1] or 1) + n) // step
    return _bounded(2 * n * frames * Shape(dims[:-1]).elements)


def _waves(row: Row, given: Given) -> Any:
    dims, n, hop, length = (first_of(row, given), *(given.get(name) for name in ("n_fft", "hop_length", "length")))
    if dims is None or len(dims) < 2 or not isinstance(n, int):
        return ANY
    step = hop if isinstance(hop, int) else max(1, n // 4)
    longest = max(n + step * (dims[-1] or 1), length if isinstance(length, int) else 0)
    return _bounded(n * (dims[-1] or 1) * Shape(dims[:-2]).elements + longest * Shape(dims[:-2]).elements)


def _layers(row: Row, given: Given) -> Any:
    """A recurrent net: states of each step, and what its weights make of the input."""
    dims, layers = first_of(row, given), given["num_layers"]
    params = given["params"]
    if isinstance(layers, int) and not 1 <= layers <= MAX_ITEMS:
        raise ValueError(f"has {layers} layers; 1 to {MAX_ITEMS} are possible")
    if isinstance(layers, int) and isinstance(params, list):
        each = (4 if given.get("has_biases") else 2) * (2 if given.get("bidirectional") else 1)
        if len(params) not in (layers * each, layers * (each + (2 if given.get("bidirectional") else 1))):
            raise ValueError(f"has {len(params)} weights for {layers} layers of {each}")
    if dims is None or not isinstance(params, list):
        return None
    widths = [p.dims[0] for p in params if isinstance(p, Shape) and p.dims and p.dims[0] is not None]
    steps = Shape(dims[:-1]).elements
    check_size(Shape((steps, 2 * max(widths, default=1))))
    return None


def _cell(row: Row, given: Given) -> Any:
    dims = first_of(row, given)
    weights = [_dims(given, name) for name in ("w_ih", "w_hh")]
    for role, weight in zip(("w_ih", "w_hh"), weights, strict=True):
        if weight is not None and len(weight) != 2:
            raise ValueError(f"has a {role} of {len(weight)} dimensions")
    if dims is not None and len(dims) != 2:
        raise ValueError(f"takes (batch, features), gets {len(dims)} dimensions")
    rows = weights[0][0] if weights[0] else None
    check_size(Shape(((dims or (None,))[0], rows)))
    return None if row.target.startswith("lstm") else Shape(_dims(given, "hx"))


_REDUCE, _ADAPTIVE, _POOL = COMPUTES["reduce"], WINDOWS["adaptive"], WINDOWS["pool"]
RULES: dict[str, Rule] = {
    "within": _within, "parts_within": _parts_within, "broadcast_within": _broadcast_within, "loss": _loss,
    "class_loss": _class_loss, "normalized": _normalized, "rms_normalized": _rms_normalized,
    "half_window": _half_window, "group_norm": _group_norm, "movedim": _movedim,
    "reversed": _reversed, "ravel": _ravel, "diag": _diag, "pad_sequence": _pad_sequence, "conv_tbc": _conv_tbc,
    "inner": _inner, "bilinear": _bilinear, "product_of_ends": _product_of_ends, "addmv": _added("mat", "vec"),
    "addbmm": _added("batch1", "batch2"), "bags": _bags, "places": _places, "places_by_dimension": _places_by_dimension,
    "chosen": _chosen, "sought": _sought, "take_along": _take_along, "quantile": _quantile,
    "summed_along": _summed_along, "decomposed": _decomposed, "factors": _factors, "solved": _solved,
    "solved_parts": _solved_parts, "transformed": _transformed, "spectrogram": _spectrogram, "waves": _waves,
    "layers": _layers, "cell": _cell, "two_reduced": _twice(_REDUCE), "two_pooled": _twice(_POOL),
    "two_adaptive": _twice(_ADAPTIVE), "t_copy": MOVES["t"],
}  # fmt: skip
