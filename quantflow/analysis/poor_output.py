"""What to say of an int8 model whose output is far from float's: where the errors are, and what to try next."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

#: Below this an output is poor: its error has more than a third of the magnitude of the output itself.
POOR_DB = 10.0
#: A layer below this by itself would bound the whole model's accuracy.
LOSSY_DB = 20.0
#: How many layers are named.
LISTED = 5


def poor_output_notices(accuracy: Mapping[str, Any] | None) -> tuple[str, ...]:
    """A notice where the output's SQNR is below POOR_DB; none where it is not, or was not measured.

    Args:
        accuracy: of the results: "sqnr_db", and "per_layer" where layers were measured.
    """
    found = (accuracy or {}).get("sqnr_db")
    if not isinstance(found, (int, float)) or math.isnan(found) or found >= POOR_DB:
        return ()
    told = f"the int8 output keeps {found:.1f} dB of float's, less than {POOR_DB:.0f} dB"
    rows = [row for row in (accuracy or {}).get("per_layer", ()) if row.get("own_sqnr_db") is not None]
    worst = sorted(rows, key=lambda row: row["own_sqnr_db"])[:LISTED]
    if not worst:
        return (f"{told}; {_ELSE}",)
    lossy = [row for row in worst if row["own_sqnr_db"] < LOSSY_DB]
    named = ", ".join(f"{row['name']} {row['own_sqnr_db']:.1f} dB" for row in lossy or worst)
    if not lossy:
        return (f"{told}, though no layer loses much by itself (the largest errors: {named}): they add up; {_ELSE}",)
    floats = ", ".join(f"{row['name']}: float" for row in lossy)
    return (f"{told}; the largest errors that layers make by themselves: {named}; try layers: {{{floats}}}; {_ELSE}",)


_ELSE = "try algorithms: accurate; task=sensitivity (quantflow.sensitivity) says which layers float would help most"
