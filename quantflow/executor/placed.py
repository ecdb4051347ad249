"""Whether what is not int8 runs on the run's device, too: calibration, algorithms, evaluation and the float model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from quantflow.errors import first_line
from quantflow.executor.run import Run
from quantflow.executor.source import cut
from quantflow.host.place import CPU, exact_float32, place_of
from quantflow.ir.batch import Batch
from quantflow.ir.binding import bind
from quantflow.ir.graph import Graph, float_leaves, interpret
from quantflow.ir.structure import plain
from quantflow.numerics.measures import sqnr_db
from quantflow.runtimes import card

#: The float model on a card is the CPU's up to float32's rounding, which deep models amplify.
LEAST_DB = 60.0
#: The trial runs on so many samples.
SAMPLES = 2


def placed(run: Run, graph: Graph, example: Batch) -> tuple[Run, Graph]:
    """The run with its place, and a note of the graph where that is the CPU after all."""
    run, note = with_place(run, cut(example, SAMPLES, graph), graph)
    return run, graph.with_notes(note) if note else graph


@exact_float32()
def with_place(run: Run, batch: Batch, graph: Graph | None = None) -> tuple[Run, str]:
    """The run with its place: the device, where torch computes there what it computes on the CPU; else why not.

    Args:
        batch: what the float model, and the graph that was captured of it, are tried on.
    """
    place = place_of(run.choice.device)
    if place == CPU:
        return run, ""
    try:
        with torch.inference_mode():
            here, moved = _numbers(run.source.float_model()(*batch.args, **batch.kwargs)), batch.at(place)
            found = [_numbers(run.source.float_model(place)(*moved.args, **moved.kwargs))]
            if graph is not None:
                found.append(_numbers(interpret(graph.at(place), bind(graph, batch.args, batch.kwargs))))
        worst = min(_worst_db(here, there) for there in found)
        why = "" if worst >= LEAST_DB or run.stands_for is not torch.float32 else f"it differs there: {worst:.1f} dB"
    except Exception as error:  # noqa: BLE001 the model's own code may fail in any way on another device
        why = first_line(error)
    if not why:
        return replace(run, place=place), ""
    return run, f"calibration, evaluation and the float model run on the CPU, as the model does not on {place}: {why}"


def card_section(run: Run) -> dict[str, Any]:
    """The results' `card` section, where the run is on one."""
    found = card(run.choice.device)
    return {"card": {**found, "calibration, evaluation and float on": str(run.place)}} if found else {}


def _numbers(output: Any) -> list[torch.Tensor]:
    return [x.float().cpu() for x in float_leaves(plain(output))]


def _worst_db(expected: list[torch.Tensor], found: list[torch.Tensor]) -> float:
    pairs = zip(expected, found, strict=True)
    return min((sqnr_db(a, b) for a, b in pairs if not torch.equal(a, b)), default=float("inf"))
