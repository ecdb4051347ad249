"""What every settings class shares: frozen, no unknown keys, strict and finite numbers."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic_core import PydanticCustomError


class Settings(BaseModel):
    """Base of every class in the schema."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


def shaped(pattern: str, hint: str) -> AfterValidator:
    """A validator for text that must match `pattern` as a whole; `hint` completes the sentence 'must be …'."""

    def check(value: str) -> str:
        if not re.fullmatch(pattern, value):
            raise PydanticCustomError("shape", "must be {hint}", {"hint": hint})
        return value

    return AfterValidator(check)


#: A file or folder, as the user wrote it. Not resolved: a recipe must mean the same on another machine.
PathText = Annotated[str, Field(min_length=1)]
#: The only place where a recipe may name Python code, and always the user's own.
EntryPoint = Annotated[
    str, shaped(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", "written as package.module:callable")
]
BatchSize = Annotated[int, Field(ge=1, le=65536)]
