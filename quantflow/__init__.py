"""quantflow: one recipe in, a real int8 model out.

    import quantflow as qf
    model = qf.quantize(module, calibration_batches, qconfig="sym_int8")
    y = model(x)
    model.save("artifact"); model = qf.load("artifact")

    p = qf.prepare(module, example); ...your own loop, which calls p...; model = qf.convert(p)

Importing quantflow registers the `quantflow::` operators that saved TorchScript models call.
"""

import gc

_collects = gc.isenabled()
gc.disable()  # what is imported stays: searching it for garbage again and again takes a fifth of the time
try:
    from quantflow.api import convert, prepare, quantize, sensitivity
    from quantflow.config.compose import load_recipe
    from quantflow.errors import QuantflowError
    from quantflow.executor.own_loop import ObservedModule
    from quantflow.quantized import QuantizedModel, QuantizedModule, QuantizedParts, QuantizedScript, load
    from quantflow.schema import PRESETS, QConfig, Recipe
    from quantflow.stages.calibrate import CalibrationTable
    from quantflow.tasks.run import run
finally:
    if _collects:
        gc.enable()

__all__ = [
    "PRESETS",
    "CalibrationTable",
    "ObservedModule",
    "QConfig",
    "QuantflowError",
    "QuantizedModel",
    "QuantizedModule",
    "QuantizedParts",
    "QuantizedScript",
    "Recipe",
    "convert",
    "load",
    "load_recipe",
    "prepare",
    "quantize",
    "run",
    "sensitivity",
]
