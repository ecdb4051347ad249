"""The JSON schema of a recipe file, for editors: completion, and red lines under what `Recipe` would refuse.

A file says only what differs, so nothing is required. Besides the sections it may hold Hydra's `defaults` list, and a
group's name in place of a section (`qconfig: sym_int8`). What only shows when everything is put together (conflicts
between fields, required fields, layers that match nothing) is left to quantflow itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from quantflow.schema.recipe import Recipe

#: The draft that editors know best; nothing newer is needed.
DRAFT = "http://json-schema.org/draft-07/schema#"
#: Kinds that record an object given in Python; a file can't ask for them.
_RECORDS = ("given",)
_ANY_REFERENCE = "#/$defs/"


def recipe_json_schema(groups: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """The schema as JSON-ready data.

    Args:
        groups: group → the names that it accepts, as `quantflow.config.recipe_file.group_choices` gives them.
    """
    generated = _partial(Recipe.model_json_schema())
    definitions, sections = generated["$defs"], generated["properties"]
    for name, section in sections.items():
        if union := _union(section):
            sections[name] = _by_kind(union, definitions)
    properties = {"defaults": _defaults_list(groups)} | {
        name: _or_word(section, groups[name]) if name in groups else section for name, section in sections.items()
    }
    words_only = {name: _word(names) for name, names in groups.items() if name not in sections}
    return {
        "$schema": DRAFT,
        "title": "quantflow recipe",
        "description": generated.get("description", ""),
        "type": "object",
        "additionalProperties": False,
        "properties": properties | words_only,
        "$defs": {name: each for name, each in definitions.items() if _kind(each) not in _RECORDS},
    }


def _partial(schema: Any) -> Any:
    """Without `required`, and without the titles that repeat the field's name."""
    if isinstance(schema, list):
        return [_partial(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    is_schema = "title" not in schema or isinstance(schema["title"], str)
    dropped = ("required", "title") if is_schema else ()
    return {key: _partial(value) for key, value in schema.items() if key not in dropped}


def _union(section: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The part of a section that is told apart by `kind`."""
    parts = [section, *section.get("anyOf", ())]
    return next((part for part in parts if "discriminator" in part), None)


def _by_kind(union: Mapping[str, Any], definitions: Mapping[str, Any]) -> dict[str, Any]:
    """The chosen kind's settings where `kind` is written; any kind's where the defaults list chooses it."""
    mapping = union["discriminator"]["mapping"]
    kinds = {kind: reference for kind, reference in mapping.items() if kind not in _RECORDS}
    fields: dict[str, list[Any]] = {}
    for reference in kinds.values():
        for name, field in definitions[reference.removeprefix(_ANY_REFERENCE)]["properties"].items():
            if name != "kind" and field not in fields.setdefault(name, []):
                fields[name].append(field)
    any_kind = {name: each[0] if len(each) == 1 else {"anyOf": each} for name, each in fields.items()}
    return {
        "type": "object",
        "properties": {"kind": {"enum": list(kinds)}},
        "allOf": [
            *(
                {"if": {"properties": {"kind": {"const": kind}}, "required": ["kind"]}, "then": {"$ref": reference}}
                for kind, reference in kinds.items()
            ),
            {
                "if": {"required": ["kind"]},
                "else": {"properties": any_kind, "additionalProperties": False},
            },
        ],
    }


def _or_word(section: Any, names: Sequence[str]) -> dict[str, Any]:
    return {"anyOf": [_word(names), section, {"type": "null"}]}


def _word(names: Sequence[str]) -> dict[str, Any]:
    return {"enum": list(names)}


def _defaults_list(groups: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """`_self_`, recipes to build on, and one choice per group."""
    choices = {
        f"override {slash}{group}": {"anyOf": [_word(names), {"type": "null"}]}
        for group, names in groups.items()
        for slash in ("/", "")
    }
    override = {"type": "object", "properties": choices, "additionalProperties": False, "maxProperties": 1}
    text = {"type": "string", "pattern": r"^[^$]+$"}
    return {
        "description": "What to start from: recipes by name, '_self_' for this file, and 'override /GROUP: NAME'",
        "type": "array",
        "items": {"anyOf": [text, override]},
    }


def _kind(definition: Mapping[str, Any]) -> Any:
    return definition.get("properties", {}).get("kind", {}).get("const")
