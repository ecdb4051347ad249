"""Everything an artifact holds about a quantized model: the products of the stages, and what was measured."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from quantflow.errors import ArtifactError
from quantflow.ir.program import Program
from quantflow.stages.calibrate import CalibrationTable
from quantflow.store import artifact
from quantflow.store.json_values import from_json, to_json
from quantflow.store.tensor_header import require_distinct


@dataclass(frozen=True)
class Record:
    """Everything an artifact holds about a quantized model.

    Attributes:
        recipe: resolved, every default written out.
        plan: the rows and shared qparams, as JSON.
        table: what calibration measured.
        program: the integer program with its tensors.
        results: the figures, see report.json.
        graph: the fused graph as text, when it was asked for.
        attached: further files by name, such as a search's journal.
    """

    recipe: Mapping[str, Any]
    plan: Mapping[str, Any]
    table: CalibrationTable
    program: Program
    results: Mapping[str, Any] = field(default_factory=dict)
    graph: str | None = None
    attached: Mapping[str, bytes] = field(default_factory=dict)

    def files(self) -> dict[str, bytes]:
        """File name → content, without the views of the results. The same record gives the same bytes."""
        files = {
            artifact.RECIPE: _json(self.recipe),
            artifact.PLAN: _json(self.plan),
            artifact.PROGRAM: _json(self.program.to_json()),
            artifact.WEIGHTS: weights_bytes(self.program),
            artifact.CALIBRATION: self.table.to_bytes(),
            artifact.RESULTS: to_json(self.results),
        }
        if self.graph is not None:
            files[artifact.GRAPH] = self.graph.encode()
        return {**self.attached, **files}

    @classmethod
    def load(cls, directory: str | Path, operators: Sequence[str] | None = ()) -> Record:
        """Read and verify an artifact. Nothing in it is executed or imported.

        Args:
            operators: patterns of the operators that its program may call besides ATen's ("my::*"); None: it is read,
                and never run.

        Raises:
            ArtifactError: missing, truncated, changed, or from a newer format; names the file.
        """
        return cls.of_files(artifact.read_artifact(Path(directory)), str(directory), operators)

    @classmethod
    def of_files(cls, files: Mapping[str, bytes], directory: str, operators: Sequence[str] = ()) -> Record:
        """What an artifact's files hold, as `load`. `directory`: where they lie, for errors."""
        if artifact.PARTS in files:
            parts = artifact.parse_json(files[artifact.PARTS], artifact.PARTS).get("parts")
            names = ", ".join(parts) if isinstance(parts, dict) else "none that can be read"
            raise ArtifactError(
                f"'{directory}' holds int8 parts of a model ({names}) and not the model's own code; in Python, "
                f"quantflow.load('{directory}', module=the float model) puts them into it"
            )
        required = (
            artifact.RECIPE,
            artifact.PLAN,
            artifact.PROGRAM,
            artifact.WEIGHTS,
            artifact.CALIBRATION,
            artifact.RESULTS,
        )
        if missing := [name for name in required if name not in files]:
            raise ArtifactError(f"'{directory}' lacks {', '.join(missing)}; run the recipe again")
        try:
            require_distinct(files[artifact.WEIGHTS])
            tensors = load_tensors(files[artifact.WEIGHTS])
        except SafetensorError as error:
            raise ArtifactError(
                f"'{directory}/{artifact.WEIGHTS}' is damaged ({error}); run the recipe again"
            ) from error
        artifact.parse_json(files[artifact.RESULTS], artifact.RESULTS)
        plan = artifact.parse_json(files[artifact.PLAN], artifact.PLAN)
        rows = plan.get("rows")
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise ArtifactError(f"'{directory}/{artifact.PLAN}' holds no rows; run the recipe again")
        return cls(
            recipe=artifact.parse_json(files[artifact.RECIPE], artifact.RECIPE),
            plan=plan,
            table=CalibrationTable.from_bytes(files[artifact.CALIBRATION], artifact.CALIBRATION),
            program=Program.from_json(
                artifact.parse_json(files[artifact.PROGRAM], artifact.PROGRAM), tensors, operators
            ),
            results=from_json(files[artifact.RESULTS]),
            graph=_graph(files),
            attached={name: content for name, content in files.items() if name not in artifact.OWN},
        )


def _graph(files: Mapping[str, bytes]) -> str | None:
    try:
        return files[artifact.GRAPH].decode() if artifact.GRAPH in files else None
    except UnicodeDecodeError as error:
        raise ArtifactError(f"{artifact.GRAPH} is not UTF-8 text ({error.reason}); run the recipe again") from error


def weights_bytes(program: Program) -> bytes:
    """The program's tensors as one .safetensors file; tensors that share memory are stored apart."""
    return save_tensors(
        {name: tensor.detach().clone().contiguous() for name, tensor in sorted(program.tensors.items())}
    )


def _json(data: Any) -> bytes:
    return (json.dumps(data, indent=1, allow_nan=False) + "\n").encode()
