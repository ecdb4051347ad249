"""The runtime that every other one is compared with, under the name of its role."""

from __future__ import annotations

from quantflow.runtimes.reference import ReferenceRunner as Specification
from quantflow.runtimes.reference import handed_on, resolve, run_node, unrounded

#: What a user asks for by name, to have every node computed as it is specified.
ASKED_FOR = "runtime=reference"

__all__ = ["ASKED_FOR", "Specification", "handed_on", "resolve", "run_node", "unrounded"]
