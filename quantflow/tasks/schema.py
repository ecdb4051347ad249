"""task=schema: the JSON schema of recipe files, for editors."""

from __future__ import annotations

import json
from collections.abc import Sequence

from quantflow.config.recipe_file import group_choices
from quantflow.errors import EXIT_PASSED
from quantflow.schema import Recipe
from quantflow.schema.json_schema import recipe_json_schema


def task(_recipe: Recipe, _overrides: Sequence[str]) -> int:
    """Printed to standard output."""
    print(json.dumps(recipe_json_schema(group_choices()), indent=1))
    return EXIT_PASSED
