"""What every settings class shares: frozen, no unknown keys, strict and finite numbers."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError
from pydantic_core.core_schema import no_info_after_validator_function


class Settings(BaseModel):
    """Base of every class in the schema."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


@dataclass(frozen=True)
class _Shape:
    """The pattern as an editor's schema shows it."""

    pattern: str
    hint: str

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return no_info_after_validator_function(self.check, handler(source))

    def __get_pydantic_json_schema__(self, core: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return handler(core) | {"pattern": f"^({self.pattern})$", "description": self.hint}

    def check(self, value: str) -> str:
        if not re.fullmatch(self.pattern, value):
            raise PydanticCustomError("shape", "must be {hint}", {"hint": self.hint})
        return value


def shaped(pattern: str, hint: str) -> _Shape:
    """A validator for text that must match `pattern` as a whole; `hint` completes the sentence 'must be …'."""
    return _Shape(pattern, hint)


def _possible_path(value: str) -> str:
    """Text that every system call takes: limits of Linux's limits.h."""
    parts = [part.encode(errors="replace") for part in value.split("/")]
    if "\0" in value or sum(map(len, parts)) + len(parts) > 4096 or any(len(part) > 255 for part in parts):
        raise PydanticCustomError("path", "must be a path without NUL, of at most 4095 bytes and 255 per name")
    return value


#: A file or folder, as the user wrote it. Not resolved: a recipe must mean the same on another machine.
PathText = Annotated[str, Field(min_length=1), AfterValidator(_possible_path)]
#: The only place where a recipe may name Python code, and always the user's own.
EntryPoint = Annotated[
    str, shaped(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", "written as package.module:callable")
]
BatchSize = Annotated[int, Field(ge=1, le=65536)]
