"""Where calibration and evaluation samples come from: one class per `data.kind`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, JsonValue

from quantflow.schema.base import BatchSize, EntryPoint, PathText, Settings, shaped

SampleCount = Annotated[int, Field(ge=1, le=10_000_000)]
ImageSize = Annotated[int, Field(ge=1, le=8192)]
Dimension = Annotated[int, Field(ge=1, le=2**31 - 1)]
TensorFile = Annotated[PathText, shaped(r".+\.(npz|safetensors)", "a .npz or .safetensors file")]
#: One input's shape without its batch dimension.
InputShape = Annotated[tuple[Dimension, ...], Field(strict=False, max_length=8)]


class DataSettings(Settings):
    """What every kind of data has. Counts are samples, not batches."""

    calibration: SampleCount = 64
    evaluation: SampleCount = 128
    batch_size: BatchSize = 16


class PhotosData(DataSettings):
    """Seeded crops of natural photos that arrive in packages. `size` in pixels; None: as the weights want it."""

    kind: Literal["photos"] = "photos"
    size: ImageSize | None = None


class FolderData(DataSettings):
    """Images in a folder; subfolders are class labels."""

    kind: Literal["folder"] = "folder"
    path: PathText
    size: ImageSize | None = None


class MnistData(DataSettings):
    """Real digits from a package, with labels."""

    kind: Literal["mnist"] = "mnist"


class TextData(DataSettings):
    """Lines of a text file through the model's tokenizer; without a path, the Lee documents from a package."""

    kind: Literal["text"] = "text"
    path: PathText | None = None
    max_length: Annotated[int, Field(ge=1, le=1_000_000)] | None = None


class TensorsData(DataSettings):
    """Tensors from .npz or .safetensors. Without `input_keys`, every key but `label_key` is an input."""

    kind: Literal["tensors"] = "tensors"
    path: TensorFile
    evaluation_path: TensorFile | None = None
    input_keys: Annotated[tuple[str, ...], Field(strict=False, min_length=1)] | None = None
    label_key: Annotated[str, Field(min_length=1)] | None = None


class RandomData(DataSettings):
    """Seeded noise. Speed and plumbing only: ranges measured on noise say nothing about real inputs."""

    kind: Literal["random"] = "random"
    shape: Annotated[tuple[InputShape, ...], Field(strict=False, min_length=1, max_length=64)] = ((3, 224, 224),)
    dtype: Literal["float32", "int64"] = "float32"


class EntryData(DataSettings):
    """The user's own code: `package.module:callable`, called with kwargs, returns batches."""

    kind: Literal["entry"] = "entry"
    entry: EntryPoint
    kwargs: dict[str, JsonValue] = Field(default_factory=dict)


class GivenData(Settings):
    """Batches handed to `quantflow.quantize`; a record, as `GivenModel`."""

    kind: Literal["given"] = "given"


DataSpec = Annotated[
    PhotosData | FolderData | MnistData | TextData | TensorsData | RandomData | EntryData | GivenData,
    Field(discriminator="kind"),
]
