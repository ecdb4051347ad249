"""Where the model comes from: one class per `model.kind`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, JsonValue, model_validator
from pydantic_core import PydanticCustomError

from quantflow.schema.base import EntryPoint, PathText, Settings, shaped

#: pretrained (or fail), random (seeded), auto (pretrained, else random and say so loudly), or a file.
Weights = Annotated[
    PathText,
    shaped(
        r"pretrained|random|auto|.+\.(safetensors|pt|pth|bin)",
        "pretrained, random, auto, or a .safetensors, .pt, .pth or .bin file",
    ),
]
MaxLength = Annotated[int, Field(ge=1, le=1_000_000)]


class TorchvisionModel(Settings):
    """A torchvision architecture by name, such as resnet50."""

    kind: Literal["torchvision"] = "torchvision"
    name: Annotated[str, shaped(r"[A-Za-z]\w*", "a torchvision architecture, such as resnet50")]
    weights: Weights = "auto"
    num_classes: Annotated[int, Field(ge=1, le=10_000_000)] | None = None


class TransformersModel(Settings):
    """A transformers model whose config.json and safetensors lie in a local folder or in an installed package."""

    kind: Literal["transformers"] = "transformers"
    path: PathText | None = None
    package: Annotated[str, shaped(r"[A-Za-z0-9][\w.-]*", "the name of an installed package")] | None = None
    task: Literal["embedding", "classification", "base"] = "embedding"
    weights: Weights = "auto"
    max_length: MaxLength | None = None

    @model_validator(mode="after")
    def _one_source(self) -> TransformersModel:
        if (self.path is None) == (self.package is None):
            raise PydanticCustomError(
                "one_source", "give exactly one of path (a local folder) and package (an installed one)"
            )
        return self


class EfficientNetLite0Model(Settings):
    """EfficientNet-Lite0 with the ImageNet weights that arrive in a package."""

    kind: Literal["efficientnet_lite0"] = "efficientnet_lite0"
    weights: Weights = "auto"


class MiniLMModel(Settings):
    """all-MiniLM-L6-v2 with the weights that arrive in a package; the output is the sentence embedding."""

    kind: Literal["minilm"] = "minilm"
    weights: Weights = "auto"
    max_length: Annotated[int, Field(ge=1, le=512)] = 128


class MnistCnnModel(Settings):
    """A small CNN, trained in seconds on real digits and cached."""

    kind: Literal["mnist_cnn"] = "mnist_cnn"
    weights: Weights = "auto"


class ScriptModuleModel(Settings):
    """A file written by torch.jit.save."""

    kind: Literal["scriptmodule"] = "scriptmodule"
    path: PathText


class ExportedModel(Settings):
    """A file written by torch.export.save."""

    kind: Literal["exported"] = "exported"
    path: PathText


class EntryModel(Settings):
    """The user's own code: `package.module:callable`, called with kwargs, returns the model."""

    kind: Literal["entry"] = "entry"
    entry: EntryPoint
    kwargs: dict[str, JsonValue] = Field(default_factory=dict)


class GivenModel(Settings):
    """A module handed to `quantflow.quantize`; a recipe on disk can't name it, so it is a record and not a request."""

    kind: Literal["given"] = "given"
    name: str


ModelSpec = Annotated[
    TorchvisionModel
    | TransformersModel
    | EfficientNetLite0Model
    | MiniLMModel
    | MnistCnnModel
    | ScriptModuleModel
    | ExportedModel
    | EntryModel
    | GivenModel,
    Field(discriminator="kind"),
]
