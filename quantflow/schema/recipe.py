"""Recipe: the validated request. What the user asked, with every default in place, and nothing decided yet."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from quantflow.errors import Problem, RecipeError
from quantflow.schema.algorithms import Algorithms
from quantflow.schema.base import PathText, Settings, shaped
from quantflow.schema.data import DataSpec, PhotosData
from quantflow.schema.model import ModelSpec
from quantflow.schema.problems import explain
from quantflow.schema.qconfig import LayerOverride, QConfig
from quantflow.schema.settings import (
    BenchmarkSettings,
    CalibrateSettings,
    CompareSettings,
    DeviceSettings,
    EvaluateSettings,
    ExportSettings,
    GatesSettings,
    ModeSettings,
    OutlierSettings,
    PolicySettings,
    ReportSettings,
    RuntimeSettings,
    SensitivitySettings,
    SweepSettings,
    TuneSettings,
    WarmupSettings,
)

Task = Literal[
    "run", "plan", "evaluate", "benchmark", "inspect", "report", "compare", "sensitivity", "tune", "schema", "doctor",
    "selftest", "export",
]  # fmt: skip
#: Tasks that start from a model, and tasks that look at an artifact; the others look at this machine.
BUILDING_TASKS = ("run", "plan", "sensitivity", "tune")
ARTIFACT_TASKS = ("evaluate", "benchmark", "inspect", "report", "export")

#: A layer pattern's value: the word float or int8, or what differs from `qconfig`.
LayerChoice = Annotated[
    Annotated[Literal["float", "int8"], Tag("word")] | Annotated[LayerOverride, Tag("fields")],
    Discriminator(lambda value: "word" if isinstance(value, str) else "fields"),
]
Pattern = Annotated[str, Field(min_length=1)]

#: A dimension's number; the keys of JSON are text.
Dimension = Annotated[int, BeforeValidator(lambda key: int(key) if isinstance(key, str) and key.isdecimal() else key)]

#: Which sizes of the input vary beside the number of samples: those that differ between calibration batches, none, or
#: {input: {dimension: name}}.
DynamicSizes = Annotated[
    Annotated[Literal["auto", "none"], Tag("word")]
    | Annotated[
        dict[Pattern, dict[Dimension, Annotated[str, shaped(r"[A-Za-z]\w*", "a name of letters, digits and '_'")]]],
        Tag("sizes"),
    ],
    Discriminator(lambda value: "word" if isinstance(value, str) else "sizes"),
]

#: Which submodules are quantized one by one: those that are found where the whole can't be captured, none, or these.
Parts = Annotated[
    Annotated[Literal["auto", "none"], Tag("word")]
    | Annotated[Annotated[tuple[Pattern, ...], Field(strict=False, min_length=1)], Tag("names")],
    Discriminator(lambda value: "word" if isinstance(value, str) else "names"),
]

#: What the calibration's result depends on, and nothing else.
_CALIBRATION_FIELDS = ("model", "data", "seed", "qconfig", "layers", "mode", "dynamic", "policy", "outliers")

#: What a run's result does not depend on.
_WORK_LEAVES_OUT = ("output", "resume", "sweep")


class Recipe(Settings):
    """Everything the user may ask for. Frozen; unknown keys are refused; every default is here and nowhere else.

    `resume`: go on from what an interrupted run has finished; false (--force) starts afresh.
    """

    name: Annotated[
        str, shaped(r"[A-Za-z0-9][\w.-]{0,99}", "a file name of letters, digits, '_', '-' and '.' (100 at most)")
    ] = "custom"
    description: str = ""
    task: Task = "run"
    artifact: PathText | None = None
    baseline: PathText | None = None
    candidate: PathText | None = None
    output: PathText | None = None
    resume: bool = True
    seed: Annotated[int, Field(ge=0, le=2**31 - 1)] = 0
    model: ModelSpec | None = None
    data: DataSpec = PhotosData()
    qconfig: QConfig = QConfig()
    layers: dict[Pattern, LayerChoice] = Field(default_factory=dict)
    algorithms: Algorithms = ()
    mode: ModeSettings = ModeSettings()
    dynamic: DynamicSizes = "auto"
    parts: Parts = "auto"
    runtime: RuntimeSettings = RuntimeSettings()
    device: DeviceSettings = DeviceSettings()
    policy: PolicySettings = PolicySettings()
    outliers: OutlierSettings = OutlierSettings()
    calibrate: CalibrateSettings = CalibrateSettings()
    warmup: WarmupSettings = WarmupSettings()
    evaluate: EvaluateSettings = EvaluateSettings()
    benchmark: BenchmarkSettings = BenchmarkSettings()
    gates: GatesSettings = GatesSettings()
    sweep: SweepSettings = SweepSettings()
    compare: CompareSettings = CompareSettings()
    export: ExportSettings = ExportSettings()
    sensitivity: SensitivitySettings = SensitivitySettings()
    tune: TuneSettings = TuneSettings()
    report: ReportSettings = ReportSettings()

    @model_validator(mode="after")
    def _fits_together(self) -> Recipe:
        fields = {"task", "artifact", "baseline", "candidate", "model", "mode", "tune", "policy"}
        problems = _conflicts(self.model_dump(include=fields))
        if problems:
            raise PydanticCustomError("conflict", "{text}", {"text": "; ".join(str(problem) for problem in problems)})
        return self

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any], name: str | None = None) -> Recipe:
        """The recipe that `settings` describe.

        Args:
            settings: nested plain data, as read from YAML or JSON; what is left out takes its default.
            name: what errors call the recipe; None for its own name.

        Raises:
            RecipeError: lists everything that is wrong, each with its place and the legal choices.
        """
        try:
            return cls.model_validate(dict(settings))
        except ValidationError as error:
            problems = explain(error, cls) + _conflicts(settings)
            raise RecipeError(name or str(settings.get("name", "custom")), problems) from None

    def to_dict(self) -> dict[str, Any]:
        """Plain data that JSON and YAML can hold, every default written out; `from_dict` gives an equal recipe."""
        return self.model_dump(mode="json")

    def hash(self) -> str:
        """sha256 of the recipe as JSON."""
        return _sha256(self.to_dict())

    def work_key(self) -> str:
        """sha256 of everything but where the result goes and how it got there: equal keys, equal results."""
        settings = self.to_dict()
        return _sha256({field: value for field, value in settings.items() if field not in _WORK_LEAVES_OUT})

    def calibration_key(self) -> str:
        """sha256 of the settings that calibration depends on: two recipes with the same key share their table."""
        settings = self.to_dict()
        before = [a.model_dump(mode="json") for a in self.algorithms if a.acts_on == "graph"]
        # How a runtime holds floats is decided after calibration.
        policy = {field: value for field, value in settings["policy"].items() if field != "float"}
        kept = {field: settings[field] for field in _CALIBRATION_FIELDS} | {"policy": policy}
        return _sha256(kept | {"algorithms": before})


def _conflicts(settings: Mapping[str, Any]) -> list[Problem]:
    """Fields that are legal one by one and not together."""
    problems = []
    task, artifact, mode = settings.get("task", "run"), settings.get("artifact"), settings.get("mode")
    if task in BUILDING_TASKS:
        if settings.get("model") is None:
            problems.append(
                Problem(
                    "model", "is required; choose one (model=torchvision model.name=resnet50) or a recipe that does"
                )
            )
        if artifact is not None:
            problems.append(
                Problem("artifact", f"task={task} starts from a model; leave artifact out, or choose another task")
            )
    elif task in ARTIFACT_TASKS and artifact is None:
        problems.append(Problem("artifact", f"task={task} needs the folder that a run wrote: artifact=DIR"))
    for side in ("baseline", "candidate"):
        if (settings.get(side) is None) == (task == "compare"):
            must = "needs the folder that a run wrote" if task == "compare" else "does not read it; use task=compare"
            problems.append(Problem(side, f"task={task} {must}: {side}=DIR"))
    if task == "tune" and not _has_limit(settings.get("tune")):
        problems.append(
            Problem("tune.subject_to", "task=tune needs a limit to keep, as in tune.subject_to.min_agreement=0.97")
        )
    if isinstance(mode, Mapping) and mode.get("method") == "script" and mode.get("kind", "export") != "torchscript":
        problems.append(Problem("mode.method", "script is possible in mode=torchscript only; use trace"))
    policy = settings.get("policy")
    if isinstance(policy, Mapping) and policy.get("embedding") == "int8" and _is_imperative(mode):
        why = "int8 has no place in mode=imperative, where embeddings stay the model's own"
        problems.append(Problem("policy.embedding", f"{why}; leave it float, or use mode=export or mode=torchscript"))
    return problems


def _is_imperative(mode: Any) -> bool:
    return isinstance(mode, Mapping) and mode.get("kind") == "imperative"


def _has_limit(tune: Any) -> bool:
    limits = tune.get("subject_to") if isinstance(tune, Mapping) else None
    return isinstance(limits, Mapping) and any(limit is not None for limit in limits.values())


def _sha256(settings: Mapping[str, Any]) -> str:
    # Keys stay in the schema's order: the order of `layers` has a meaning, so sorting would equate unlike recipes.
    return hashlib.sha256(json.dumps(settings, separators=(",", ":"), allow_nan=False).encode()).hexdigest()
