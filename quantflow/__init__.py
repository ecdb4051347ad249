"""quantflow: one recipe in, a real int8 model out.

    import quantflow as qf
    model = qf.quantize(module, calibration_batches, qconfig="sym_int8")
    y = model(x)
    model.save("artifact"); model = qf.load("artifact")

Importing quantflow registers the `quantflow::` operators that saved TorchScript models call.
"""

from quantflow.api import quantize, sensitivity
from quantflow.config.compose import load_recipe
from quantflow.errors import QuantflowError
from quantflow.quantized import QuantizedModel, QuantizedModule, QuantizedParts, QuantizedScript, load
from quantflow.schema import PRESETS, QConfig, Recipe
from quantflow.tasks.run import run

__all__ = [
    "PRESETS",
    "QConfig",
    "QuantflowError",
    "QuantizedModel",
    "QuantizedModule",
    "QuantizedParts",
    "QuantizedScript",
    "Recipe",
    "load",
    "load_recipe",
    "quantize",
    "run",
    "sensitivity",
]
