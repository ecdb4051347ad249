"""TorchScript → Graph: trace or script a module, or take over a ScriptModule, and import what it runs.

The import is an abstract interpreter. It runs the TorchScript on two batches of different size at once, follows the
branches they take, and writes down every ATen op that depends on the input. A number that differs between the two
runs follows the batch size and stays symbolic; everything else is a constant.

    script   a model as TorchScript, and the import checked against it
    walk     the interpreter: modules, calls, branches, loops
    ops      one ATen op or builtin on what the runs hold
    writer   the graph written so far, with the names of its layers and constants
    values   what the runs hold
    failure  why an import fails
"""

from quantflow.capture.torchscript.script import FIXED_BY_TRACING, capture_torchscript

__all__ = ["FIXED_BY_TRACING", "capture_torchscript"]
