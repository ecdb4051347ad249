"""The native library by itself: its C interface is public, so what Python refuses is refused there once more."""

from __future__ import annotations

import random

import pytest

from quantflow.runtimes import native_library
from tests.security.calls import every_wrong_call
from tests.security.running import outcomes
from tests.security.test_hostile_programs import PROGRAMS
from tests.security.test_op_table import CALLS

pytestmark = pytest.mark.skipif(
    native_library.library_path("libquantflow_native.so") is None, reason="the native library was not built"
)


@pytest.fixture(scope="module")
def found() -> dict[str, str]:
    return dict(zip(PROGRAMS, outcomes(list(PROGRAMS.values()), "--border"), strict=True))


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_hostile_program_ends_in_no_signal(found: dict[str, str], name: str) -> None:
    assert found[name].startswith(("refused", "computed")), found[name]


def test_a_wrong_call_ends_in_no_signal() -> None:
    every = list(every_wrong_call())
    chosen = every if len(every) <= CALLS else random.Random(1).sample(every, CALLS)
    found = zip(chosen, outcomes([program for _, program in chosen], "--border"), strict=True)
    assert not [f"{what}: {outcome}" for (what, _), outcome in found if outcome.startswith("signal")]
