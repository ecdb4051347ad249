"""`layers:` → settings of every unit: which patterns match it, and what they and the policy ask of it."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping, Sequence

from quantflow.errors import Problem, RecipeError, nearest
from quantflow.ir.plan import INT8
from quantflow.ir.units import FLOAT, SIZE, Unit
from quantflow.schema import ActivationOverride, LayerOverride, PolicySettings, QConfig, WeightOverride

_NO_TENSOR = (
    "activation settings change nothing: the layer before writes the codes it reads, and its own result is not coded; "
    "set them for the layer before"
)
_NO_LINEAR = "{} nothing: it matches no convolution or linear that runs in int8"


class Overrides:
    """`layers:` resolved against the units: op types first, then globs, then exact names, so the narrowest wins."""

    def __init__(
        self,
        layers: Mapping[str, str | LayerOverride],
        units: Sequence[Unit],
        qconfig: QConfig,
        recipe_name: str,
        policy: PolicySettings,
    ) -> None:
        self._base = qconfig
        self._policy: dict[str, str] = policy.model_dump(exclude={"float"})
        self._recipe_name = recipe_name
        self._chosen: dict[str, list[tuple[str, str | LayerOverride]]] = {}
        owner = {layer: unit for unit in units for layer in unit.layers if unit.kind != SIZE}
        types = {kind for unit in units for kind in (unit.layer_type, unit.kind) if unit.kind not in (SIZE, FLOAT)}
        problems: list[Problem] = []
        by_rank: list[list[tuple[str, str | LayerOverride, list[Unit]]]] = [[], [], []]
        for pattern, value in layers.items():
            if pattern in owner:
                rank, matched = 2, [owner[pattern]]
            elif pattern in types:
                rank, matched = 0, [u for u in units if pattern in (u.layer_type, u.kind)]
            else:
                rank, matched = 1, [owner[name] for name in owner if fnmatch.fnmatchcase(name, pattern)]
            if not matched:
                known = nearest(pattern.replace("*", ""), [*owner, *types])
                problems.append(Problem(f"layers.{pattern}", f"'{pattern}' matches nothing; nearest names: {known}"))
            reason = matched[0].float_reason if rank == 2 and value == INT8 else ""
            if reason:
                problems.append(Problem(f"layers.{pattern}", f"can't run in int8: {reason}; remove the override"))
            by_rank[rank].append((pattern, value, matched))
        if problems:
            raise RecipeError(recipe_name, problems)
        for overrides in by_rank:
            for pattern, value, matched in overrides:
                for unit in dict.fromkeys(matched):
                    self._chosen.setdefault(unit.name, []).append((pattern, value))

    def precision(self, unit: Unit) -> tuple[str | None, str]:
        """("float" | "int8" | None, the setting that says so)."""
        for pattern, value in reversed(self._chosen.get(unit.name, [])):
            return (value, f"layers.{pattern}") if isinstance(value, str) else (INT8, f"layers.{pattern}")
        return self._policy.get(unit.kind), f"policy.{unit.kind}"

    def qconfig(self, unit: Unit) -> QConfig:
        """The unit's own QConfig: the recipe's, changed by every override that matches."""
        qconfig = self._base
        for _, value in self._chosen.get(unit.name, []):
            if isinstance(value, LayerOverride):
                qconfig = value.apply(qconfig)
        return qconfig

    def without(self, unit: Unit) -> frozenset[str]:
        """The algorithms that any matching override turns off."""
        chosen = (value for _, value in self._chosen.get(unit.name, []) if isinstance(value, LayerOverride))
        return frozenset(name for value in chosen for name in value.without)

    def require_one_term(self, units: Iterable[Unit]) -> None:
        """
        Raises:
            RecipeError: a layer's weight or input is to be coded in two terms, which takes two int8 layers.
        """
        for unit in units:
            qconfig = self.qconfig(unit)
            for place, terms in (("weight.terms", qconfig.weight.terms), ("input_terms", qconfig.input_terms)):
                if terms != 1:
                    message = (
                        f"{terms} is not possible in imperative mode, which swaps one module for one ({unit.name}); "
                        "use mode=export"
                    )
                    raise RecipeError(self._recipe_name, [Problem(place, message)])

    def without_effect(self, deciding: set[str], linear: set[str]) -> list[str]:
        """Notes on patterns with settings that change nothing.

        Args:
            deciding: the units whose activation settings reach a tensor.
            linear: the int8 convolutions and linears, which alone have weights and can read an input in two terms.
        """
        effect: dict[tuple[str, str], bool] = {}
        for name, chosen in self._chosen.items():
            for pattern, value in chosen:
                if not isinstance(value, LayerOverride):
                    continue
                given = {
                    _NO_TENSOR: (value.activation != ActivationOverride(), name in deciding),
                    _NO_LINEAR.format("weight settings change"): (value.weight != WeightOverride(), name in linear),
                    _NO_LINEAR.format("input_terms changes"): (value.input_terms is not None, name in linear),
                }
                for text, (is_given, has_effect) in given.items():
                    if is_given:
                        effect[pattern, text] = effect.get((pattern, text), False) or has_effect
        return [f"layers.{pattern}: its {text}" for (pattern, text), has_effect in effect.items() if not has_effect]
