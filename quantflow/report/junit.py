"""The gates as JUnit XML, for the test views of CI systems."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any
from xml.etree import ElementTree

from quantflow.report import tables

#: What XML 1.0 can't hold, escaped or not (https://www.w3.org/TR/xml/#charsets).
_ILLEGAL = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
#: Rows of the settings that become properties of the suite.
_PROPERTIES = ("recipe", "overrides", "model", "weights", "mode", "runtime", "device", "quantflow", "torch", "cpu")


def junit(results: Mapping[str, Any]) -> bytes:
    """One test case per gate, its class the recipe's name; figure and limit are the failure's message.

    A recipe without gates gives one skipped test case, because some readers refuse a file without any. The form is the
    one that Jenkins, GitLab and GitHub actions read: testsuites > testsuite > testcase > failure | skipped.
    """
    recipe, found = results.get("recipe"), results.get("gates")
    name = _legal(recipe.get("name") if isinstance(recipe, Mapping) else None) or "quantflow"
    gates = [gate for gate in found if isinstance(gate, Mapping)] if isinstance(found, (list, tuple)) else []
    failed = sum(not gate.get("passed") for gate in gates)
    counts = {"tests": str(len(gates) or 1), "failures": str(failed), "errors": "0"}
    root = ElementTree.Element("testsuites", {"name": "quantflow", **counts})
    skipped = {"skipped": "0" if gates else "1"}
    suite = ElementTree.SubElement(root, "testsuite", {"name": name, **counts, **skipped, "time": _seconds(results)})
    properties = ElementTree.SubElement(suite, "properties")
    for key, value in tables.settings(results).rows:
        if key in _PROPERTIES:
            ElementTree.SubElement(properties, "property", {"name": _legal(key), "value": _legal(value)})
    for gate in gates:
        case = ElementTree.SubElement(suite, "testcase", {"classname": name, "name": _legal(gate.get("name"))})
        text = _legal(gate.get("text"))
        if gate.get("passed"):
            ElementTree.SubElement(case, "system-out").text = text
        else:
            attributes = {"message": f"{_legal(gate.get('name'))}: {text}", "type": "gate"}
            ElementTree.SubElement(case, "failure", attributes).text = text
    if not gates:
        case = ElementTree.SubElement(suite, "testcase", {"classname": name, "name": "gates"})
        ElementTree.SubElement(case, "skipped", {"message": "the recipe sets no gate"})
    ElementTree.indent(root)
    return bytes(ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)) + b"\n"


def _seconds(results: Mapping[str, Any]) -> str:
    """All stages together."""
    stages = results.get("stages")
    taken = [stage.get("seconds") for stage in stages if isinstance(stage, Mapping)] if isinstance(stages, list) else []
    return f"{sum(value for value in taken if isinstance(value, (int, float))):.3f}"


def _legal(value: object) -> str:
    return _ILLEGAL.sub(" ", "" if value is None else str(value))
