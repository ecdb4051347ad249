from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantflow.report import from_json, to_json
from quantflow.store.json_values import unshowable

shown = st.text(st.characters(exclude_categories=["Cc", "Cs"]))
texts = shown.filter(lambda text: text not in ("Infinity", "-Infinity", "NaN"))
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | texts,
    lambda children: st.lists(children, max_size=3) | st.dictionaries(shown, children, max_size=3),
    max_leaves=10,
)


@given(st.dictionaries(shown, values, max_size=4))
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


def test_what_a_terminal_would_obey_is_replaced() -> None:
    assert from_json(to_json({"a\x1b": ["\ud800]\x9b", "a\tb\n"]})) == {"a\ufffd": ["\ufffd]\ufffd", "a\tb\n"]}


@pytest.mark.parametrize("text", ["\x1b]0;x\x07", "\x7f", "\x9b2J", "\ud800", "\b", "\x00"])
def test_what_a_terminal_would_obey_is_found(text: str) -> None:
    for content in (json.dumps({"a": [text]}), json.dumps({text: 1})):
        assert unshowable(content.encode(), json.loads(content)) == text


@pytest.mark.parametrize("text", ["é 漢 😀\t\n\r", "\\u001b", "\xa0"])
def test_other_texts_are_none(text: str) -> None:
    for is_ascii in (True, False):
        content = json.dumps([text], ensure_ascii=is_ascii)
        assert unshowable(content.encode(), json.loads(content)) is None
