"""pydantic's validation errors, rewritten as problems in the words of the user's YAML."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from quantflow.errors import Problem

_WANTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "text",
    "tuple_type": "a list",
    "dict_type": "a mapping",
    "greater_than": "more than {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "less than {lt}",
    "less_than_equal": "at most {le}",
    "too_short": "a list of at least {min_length}",
    "too_long": "a list of at most {max_length}",
    "string_too_short": "text of at least {min_length} character",
    "string_too_long": "text of at most {max_length} characters",
}


def explain(error: ValidationError, root: type[BaseModel]) -> list[Problem]:
    """Every problem in `error`, with union tags stripped from the paths and the nearest legal names added."""
    details = [detail for detail in error.errors(include_url=False) if detail["type"] != "conflict"]
    return [_problem(detail, root) for detail in details if not _follows_from_another(detail, details)]


def legal_keys(root: type[BaseModel], path: tuple[str, ...], kinds: Mapping[str, str]) -> list[str]:
    """The keys that may stand at `path`; `kinds` says which member of a union is meant, as {"model": "torchvision"}."""
    tagged: list[str] = []
    for part in path:
        tagged += [part, kinds[part]] if part in kinds else [part]
    _, owner = _descend(root, tuple(tagged))
    return [] if owner is None else list(owner.model_fields)


def _follows_from_another(detail: ErrorDetails, details: list[ErrorDetails]) -> bool:
    """pydantic calls a list too short when its items were refused, with the items' own errors beside it."""
    depth = len(detail["loc"])
    return detail["type"] == "too_short" and any(
        len(other["loc"]) > depth and other["loc"][:depth] == detail["loc"] for other in details
    )


def _problem(detail: ErrorDetails, root: type[BaseModel]) -> Problem:
    kind, context = detail["type"], detail.get("ctx", {})
    path, owner = _descend(root, detail["loc"])
    where = ".".join(path) or "recipe"
    found = _shown(detail["input"])
    tagged_by = "name" if path[:1] == ("algorithms",) else "kind"
    match kind:
        case "extra_forbidden":
            _, parent = _descend(root, detail["loc"][:-1])
            keys = list(parent.model_fields) if parent else []
            dotted = "; a name with dots is one key, as in layers={a.b: float}" if path[0] == "layers" else ""
            return Problem(where, f"no such setting; {choices(path[-1], keys)}{dotted}")
        case "missing":
            return Problem(where, "is required and not given")
        case "literal_error":
            words = re.findall(r"'([^']*)'", str(context["expected"]))
            return Problem(where, f"{found} is not possible here; {choices(detail['input'], words)}")
        case "union_tag_invalid":
            tag = context["tag"]
            return Problem(f"{where}.{tagged_by}", f"'{tag}' is not possible here; {choices(tag, _tags(root, path))}")
        case "union_tag_not_found":
            return Problem(f"{where}.{tagged_by}", f"is required; legal: {', '.join(_tags(root, path))}")
        case "model_attributes_type":
            return Problem(where, f"found {found}; must be a mapping with {tagged_by}: {' | '.join(_tags(root, path))}")
        case "model_type":
            words_too = "float, int8, or " if path[0] == "layers" and len(path) == 2 else ""
            fields = ", ".join(owner.model_fields) if owner else ""
            return Problem(where, f"found {found}; must be {words_too}a mapping with keys of: {fields}")
    wanted = _WANTED.get(kind)
    return Problem(where, f"found {found}; " + (f"must be {wanted.format(**context)}" if wanted else detail["msg"]))


def choices(written: object, legal: Sequence[str]) -> str:
    """The legal choices as the end of a sentence, the ones close to what was written first."""
    if not legal:
        return "nothing is legal here"
    if len(legal) <= 2:
        return f"use {' or '.join(legal)}"
    close = difflib.get_close_matches(str(written), legal, cutoff=0.5)
    return (f"nearest: {', '.join(close)}; " if close else "") + f"legal: {', '.join(legal)}"


def _descend(root: type[BaseModel], loc: tuple[str | int, ...]) -> tuple[tuple[str, ...], type[BaseModel] | None]:
    """`loc` without pydantic's union tags, and the settings class found there (None: a plain value)."""
    path: list[str] = []
    owner: type[BaseModel] | None = root
    parts = iter(loc)
    for part in parts:
        path.append(str(part))
        if owner is None:
            continue
        field = owner.model_fields.get(str(part))
        classes = list(_classes(field.annotation)) if field else []
        if field and get_origin(field.annotation) is dict and classes:
            pattern, tag = next(parts, None), next(parts, None)
            path += [str(pattern)] if pattern is not None else []
            owner = classes[0] if tag == "fields" else None
        elif len(classes) > 1:
            if field and _is_list(field.annotation):
                path += [str(index)] if (index := next(parts, None)) is not None else []
            owner = _member(classes, next(parts, None))
        else:
            owner = classes[0] if classes else None
    return tuple(path), owner


def _member(classes: list[type[BaseModel]], tag: str | int | None) -> type[BaseModel] | None:
    return next((each for each in classes if each.model_fields[_tag_field(classes)].default == tag), None)


def _tag_field(classes: list[type[BaseModel]]) -> str:
    """The field that tells a union's members apart: algorithms have a name, everything else has a kind."""
    return "kind" if all("kind" in each.model_fields for each in classes) else "name"


def _is_list(annotation: Any) -> bool:
    return get_origin(annotation) is tuple or any(_is_list(inner) for inner in get_args(annotation))


def _tags(root: type[BaseModel], path: tuple[str, ...]) -> list[str]:
    classes = list(_classes(root.model_fields[path[0]].annotation))
    return [str(each.model_fields[_tag_field(classes)].default) for each in classes]


def _classes(annotation: Any) -> Iterator[type[BaseModel]]:
    """Every settings class inside an annotation, in the order written."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _classes(argument)


def _shown(value: object) -> str:
    """`value` as YAML writes it, shortened to 80 characters."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    text = repr(value)
    return text if len(text) <= 80 else text[:79] + "…"
