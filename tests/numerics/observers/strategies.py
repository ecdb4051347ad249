"""What the observer tests draw from."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from hypothesis import strategies as st

from quantflow.numerics.observers import OBSERVERS, AbstractObserver, make_observer
from quantflow.schema import ActivationSpec

#: Every float32 that is a number, subnormal ones included.
NUMBERS = st.floats(width=32, allow_nan=False, allow_infinity=False)
#: A mix of ordinary numbers, repeats of them, and extreme ones.
TENSORS = st.lists(st.one_of(st.floats(-100, 100, width=32), st.just(0.0), NUMBERS), min_size=1, max_size=40).map(
    lambda values: torch.tensor(values, dtype=torch.float32)
)
SPECS = st.builds(
    ActivationSpec,
    observer=st.sampled_from(sorted(OBSERVERS)),
    dtype=st.sampled_from(["int8", "uint8"]),
    qscheme=st.sampled_from(["symmetric", "affine"]),
    percentile=st.sampled_from([90.0, 99.99, 100.0]),
    averaging_constant=st.sampled_from([0.01, 0.5, 1.0]),
)


def observed(spec: ActivationSpec, tensors: Iterable[torch.Tensor]) -> AbstractObserver:
    """A new observer that saw the tensors."""
    observer = make_observer(spec)
    for x in tensors:
        observer.observe(x)
    return observer
