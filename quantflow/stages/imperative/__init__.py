"""Imperative mode: the module's own code runs, and what it calls is computed unit by unit of the same int8 program.

tensors     values that are codes between layers, and parameters whose calls are int8
functions   what torch functions mean for them
moves       and those that move elements
calls       which unit of the plan a call belongs to
engines     how units are computed: in float32 under observation, or in int8 by a runner
joins       blocks of int8 layers in one call where nobody looks inside; chains: the layers of a Sequential
encoders    and layers of transformers, with their float ops; spans: which nodes of the program these are
layers      a module with observers, or with int8 layers, in place
carried     what algorithms changed in the graph, in the module
"""

from quantflow.stages.imperative import moves  # its rules
from quantflow.stages.imperative.carried import called_modules, carry_over, fixed_constants
from quantflow.stages.imperative.layers import (
    insert_observers,
    int8_calls,
    int8_layers,
    moved,
    not_reached,
    put_in_place,
    run_module,
    run_observed,
    swap_modules,
    with_tensors,
)

__all__ = [
    "called_modules", "carry_over", "fixed_constants", "insert_observers", "int8_calls", "int8_layers", "moved",
    "moves", "not_reached", "put_in_place", "run_module", "run_observed", "swap_modules", "with_tensors",
]  # fmt: skip
