"""The site's reference pages, made at build time from the schema, the command's help and the public names.

A hook of mkdocs (`hooks:` in mkdocs.yml): nothing that it writes is kept in the repository.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Mapping
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

import quantflow
from quantflow.cli.command import help_text
from quantflow.config import recipe_file as recipes
from quantflow.schema import ALGORITHM_PRESETS, Recipe

_REFERENCE = "#/$defs/"
#: Sections told apart by this field are alternatives: one heading each.
_TAGS = ("kind", "name")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages to what mkdocs found in docs/."""
    for path, content in pages().items():
        files.append(File.generated(config, f"reference/{path}", content=content))
    return files


def pages() -> dict[str, str]:
    """File name below reference/ → Markdown."""
    return {
        "settings.md": settings_page(Recipe.model_json_schema(mode="validation")),
        "choices.md": choices_page(),
        "command-line.md": f"# Command line\n\n`python -m quantflow --help`:\n\n```text\n{help_text()}\n```\n",
        "python.md": python_page(),
    }


def settings_page(schema: Mapping[str, Any]) -> str:
    """Every setting of a recipe with its type, default and limits; a heading per section."""
    lines = [
        "# Settings",
        "",
        "Every setting that a recipe or the command line may hold: `section.key=value`. Defaults are the schema's own.",
        "Sections that have a kind or a name are alternatives. [Choices](choices.md) lists the names a group takes.",
        "",
        "## The recipe itself",
        "",
        *_section(schema),
    ]
    for name, field in schema["properties"].items():
        alternatives = list(_settings_classes(field, schema["$defs"]))
        if alternatives:
            lines += [f"## {name}", ""]
            for alternative in alternatives:
                tag = _tag(alternative)
                lines += [f"### {name}: {tag}", ""] if tag else []
                lines += _section(alternative)
                lines += _nested(name, alternative, schema["$defs"])
    return "\n".join(lines) + "\n"


def _nested(place: str, section: Mapping[str, Any], definitions: Mapping[str, Any]) -> Iterator[str]:
    for name, field in section["properties"].items():
        for inner in _settings_classes(field, definitions):
            yield from (f"### {place}.{name}", "", *_section(inner))
            yield from _nested(f"{place}.{name}", inner, definitions)


def _settings_classes(field: Mapping[str, Any], definitions: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The settings classes that a field's value may be of, or hold."""
    if "$ref" in field:
        definition = definitions[field["$ref"].removeprefix(_REFERENCE)]
        # What was handed over in Python is a record that no recipe can ask for.
        if "properties" in definition and _tag(definition) != "given":
            yield definition
    for key in ("anyOf", "oneOf"):
        for part in field.get(key, ()):
            yield from _settings_classes(part, definitions)
    for key in ("items", "additionalProperties"):
        if isinstance(field.get(key), dict):
            yield from _settings_classes(field[key], definitions)


def _section(section: Mapping[str, Any]) -> list[str]:
    rows = [
        f"| `{name}` | {_type(field)} | {_default(field, name in section.get('required', ()))} |"
        for name, field in section["properties"].items()
    ]
    return [section.get("description", ""), "", "| setting | type | default |", "|---|---|---|", *rows, ""]


def _tag(section: Mapping[str, Any]) -> str | None:
    fields = section["properties"]
    return next((fields[tag]["const"] for tag in _TAGS if "const" in fields.get(tag, ())), None)


def _type(field: Mapping[str, Any]) -> str:
    if "const" in field:
        return f"`{_plain(field['const'])}`"
    if field.get("type") == "null":
        return "`null`"
    if "enum" in field:
        return ", ".join(f"`{_plain(value)}`" for value in field["enum"])
    if "$ref" in field:
        return "section"
    if parts := field.get("anyOf") or field.get("oneOf"):
        return " or ".join(dict.fromkeys(_type(part) for part in parts))
    if field.get("type") == "array":
        inner = f"list of {_type(field['items'])}" if "items" in field else "list"
        return inner + _limits(field, "minItems", "maxItems", " entries")
    if field.get("type") == "object":
        return "mapping"
    if "pattern" in field and "description" in field:
        return f"text: {field['description']}"
    names = {"string": "text", "integer": "whole number", "number": "number", "boolean": "`true`, `false`"}
    return names.get(field.get("type", ""), "any") + _limits(field, "minimum", "maximum") + _bounds(field)


def _limits(field: Mapping[str, Any], least: str, most: str, unit: str = "") -> str:
    limits = [f"{word} {field[key]}{unit}" for key, word in ((least, "≥"), (most, "≤")) if key in field]
    return f" ({', '.join(limits)})" if limits else ""


def _bounds(field: Mapping[str, Any]) -> str:
    bounds = [
        f"{word} {field[key]}" for key, word in (("exclusiveMinimum", ">"), ("exclusiveMaximum", "<")) if key in field
    ]
    return f" ({', '.join(bounds)})" if bounds else ""


def _default(field: Mapping[str, Any], required: bool) -> str:
    if required:
        return "required"
    default = field.get("default", {} if field.get("type") == "object" else None)
    return "as below" if isinstance(default, dict) and default else f"`{_plain(default)}`"


def _plain(value: Any) -> str:
    return value if isinstance(value, str) and value else json.dumps(value)


def choices_page() -> str:
    """What each group's names stand for: the comment that leads each file in conf/, the recipes, the presets."""
    lines = ["# Choices", "", "`GROUP=NAME` on the command line, `override /GROUP: NAME` in a recipe.", ""]
    for group, names in recipes.group_choices().items():
        lines += [f"## {group}", "", "| name | what it chooses |", "|---|---|"]
        folder = recipes.shipped("conf") / group
        lines += [f"| `{name}` | {recipes.recipe_description(folder / f'{name}.yaml')} |" for name in names] + [""]
    lines += ["## Presets of accuracy algorithms", "", "| preset | algorithms, in order |", "|---|---|"]
    for name, algorithms in ALGORITHM_PRESETS.items():
        lines.append(f"| `{name}` | {', '.join(algorithm['name'] for algorithm in algorithms) or 'nearest codes'} |")
    lines += ["", "## Recipes", "", "| recipe | what it does |", "|---|---|"]
    lines += [f"| `{name}` | {recipes.recipe_description(file)} |" for name, file in recipes.recipe_files().items()]
    return "\n".join(lines) + "\n"


def python_page() -> str:
    """One entry of mkdocstrings for each name that the package promises."""
    lines = ["# Python", ""]
    lines += [
        "The public names of `import quantflow`. What a `Recipe` and a `QConfig` hold is in [Settings](settings.md).",
        "",
    ]
    for name in quantflow.__all__:
        value = getattr(quantflow, name)
        if inspect.isclass(value) or inspect.isfunction(value):
            lines += [f"::: quantflow.{name}", "    options: {members_order: source}", ""]
        else:
            lines += [f"## `quantflow.{name}`", "", f"A `{type(value).__name__}`: {', '.join(map(str, value))}.", ""]
    return "\n".join(lines)
