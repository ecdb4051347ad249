"""QConfig: how activations and weights become int8. Anything outside these literals is refused."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field, SerializerFunctionWrapHandler, model_serializer
from pydantic_core import PydanticCustomError

from quantflow.schema.algorithms import AlgorithmName
from quantflow.schema.base import Settings

if TYPE_CHECKING:
    import torch

ActivationDtype = Literal["int8", "uint8"]
QScheme = Literal["symmetric", "affine"]
WeightGranularity = Literal["per_tensor", "per_channel"]
ActivationObserver = Literal["minmax", "moving_average", "histogram", "percentile", "mse", "entropy"]
WeightObserver = Literal["minmax", "mse", "percentile"]
Terms = Literal[1, 2]
#: In percent: 99.99 keeps all but one value in ten thousand.
Percentile = Annotated[float, Field(gt=50, le=100)]
AveragingConstant = Annotated[float, Field(gt=0, le=1)]


def _auto_or_bool(value: object) -> object:
    if value != "auto" and not isinstance(value, bool):
        raise PydanticCustomError("auto_or_bool", "use auto, true or false")
    return value


class ActivationSpec(Settings):
    """One scale and zero point per activation tensor, from the range that `observer` measures.

    symmetric + uint8 means zero_point 128. `averaging_constant` is read by moving_average, `percentile` by percentile.
    """

    dtype: ActivationDtype = "int8"
    qscheme: QScheme = "symmetric"
    granularity: Literal["per_tensor"] = "per_tensor"
    observer: ActivationObserver = "minmax"
    averaging_constant: AveragingConstant = 0.01
    percentile: Percentile = 99.99


class WeightSpec(Settings):
    """Symmetric int8 codes in [-127, 127], one scale per tensor or per output channel.

    `terms: 2` codes what the first codes leave over as a second int8 weight: about 15 bits for twice the products.
    """

    dtype: Literal["int8"] = "int8"
    qscheme: Literal["symmetric"] = "symmetric"
    granularity: WeightGranularity = "per_channel"
    observer: WeightObserver = "minmax"
    percentile: Percentile = 99.99
    terms: Terms = 1


class QConfig(Settings):
    """Activation spec + weight spec.

    `input_terms: 2` codes what the first codes of a convolution's or linear's input leave over as second codes: about
    16 bits for twice the products. What computes that input then writes float32.
    `reduce_range` spends 7 bits on activations. auto means false: no runtime here saturates, on any CPU. torch.ao's own
    kernels do on a CPU without VNNI: say true for `to_torch` there.
    """

    activation: ActivationSpec = ActivationSpec()
    weight: WeightSpec = WeightSpec()
    input_terms: Terms = 1
    reduce_range: Annotated[Literal["auto", True, False], BeforeValidator(_auto_or_bool)] = "auto"

    def to_torch(self) -> torch.ao.quantization.QConfig:
        """The equivalent `torch.ao.quantization.QConfig`, with the same numbers."""
        from quantflow.numerics.observers.torch_ao import to_torch

        return to_torch(self)


class Override(Settings):
    """A partial spec: None means as in `qconfig`, and is not written out."""

    @model_serializer(mode="wrap")
    def _only_given(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in handler(self).items() if value is not None}


class ActivationOverride(Override):
    """The fields of an ActivationSpec that one layer sees differently."""

    dtype: ActivationDtype | None = None
    qscheme: QScheme | None = None
    granularity: Literal["per_tensor"] | None = None
    observer: ActivationObserver | None = None
    averaging_constant: AveragingConstant | None = None
    percentile: Percentile | None = None


class WeightOverride(Override):
    """The fields of a WeightSpec that one layer sees differently."""

    dtype: Literal["int8"] | None = None
    qscheme: Literal["symmetric"] | None = None
    granularity: WeightGranularity | None = None
    observer: WeightObserver | None = None
    percentile: Percentile | None = None
    terms: Terms | None = None


class LayerOverride(Settings):
    """What differs from `qconfig` in the layers that a pattern of `layers` matches.

    `activation` means the layer's output, and its input too where a float layer or nothing comes before it.
    `without` names algorithms that leave the layer alone; all means every one.
    """

    activation: ActivationOverride = ActivationOverride()
    weight: WeightOverride = WeightOverride()
    input_terms: Terms | None = None
    without: Annotated[tuple[AlgorithmName | Literal["all"], ...], Field(strict=False)] = ()

    @model_serializer(mode="wrap")
    def _only_given(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        given = {"without": bool(self.without), "input_terms": self.input_terms is not None}
        return {key: value for key, value in handler(self).items() if given.get(key, True)}

    def apply(self, qconfig: QConfig) -> QConfig:
        """`qconfig` with the fields given here replaced."""
        update: dict[str, Any] = {
            "activation": qconfig.activation.model_copy(update=self.activation.model_dump()),
            "weight": qconfig.weight.model_copy(update=self.weight.model_dump()),
        }
        if self.input_terms is not None:
            update["input_terms"] = self.input_terms
        return qconfig.model_copy(update=update)


#: The names that `qconfig: NAME` and `quantize(qconfig="NAME")` accept.
PRESETS: dict[str, QConfig] = {
    "sym_int8": QConfig(activation=ActivationSpec(dtype="int8", qscheme="symmetric")),
    "affine_uint8": QConfig(activation=ActivationSpec(dtype="uint8", qscheme="affine")),
    "sym_uint8": QConfig(activation=ActivationSpec(dtype="uint8", qscheme="symmetric")),
    "affine_int8": QConfig(activation=ActivationSpec(dtype="int8", qscheme="affine")),
}
