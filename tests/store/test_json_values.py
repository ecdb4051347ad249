from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantflow.report import from_json, to_json

texts = st.text().filter(lambda text: text not in ("Infinity", "-Infinity", "NaN"))
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | texts,
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(), children, max_size=3),
    max_leaves=10,
)


@given(st.dictionaries(st.text(), values, max_size=4))
def test_round_trip(results: dict[str, object]) -> None:
    assert from_json(to_json(results)) == results


def test_it_is_json_that_strict_readers_accept() -> None:
    content = to_json({"sqnr_db": math.inf, "low": -math.inf, "layers": ({"sqnr_db": math.nan},), "name": "größer"})

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    assert json.loads(content, parse_constant=refuse)["layers"] == [{"sqnr_db": "NaN"}]
    back = from_json(content)
    assert (back["sqnr_db"], back["low"], back["name"]) == (math.inf, -math.inf, "größer")
    assert math.isnan(back["layers"][0]["sqnr_db"])


def test_what_is_not_json_is_refused() -> None:
    with pytest.raises(TypeError):
        to_json({"path": object()})
