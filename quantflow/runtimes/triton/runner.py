"""The triton runtime's runner: a program on a card, its values torch tensors there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree

from quantflow.ir.program import Program
from quantflow.runtimes.ordinary import below_autograd
from quantflow.runtimes.runner import AbstractRunner
from quantflow.runtimes.triton.cards import card_of, timed_ms
from quantflow.runtimes.triton.graphs import Recordings, on_tensors
from quantflow.runtimes.triton.lower import WITHOUT_KERNEL, Lowering, Step, int8_layers, last_uses
from quantflow.runtimes.triton.precision import HALVES

#: How long `tune` may look for the fastest tiles of one batch.
TUNING_S = 60.0


class TritonRunner(AbstractRunner):
    """Executes a program on a card. Safe to call from several threads and streams.

    Inputs on the card give outputs there; inputs on the CPU come back on the CPU.
    """

    name = "triton"
    kernelless = tuple(WITHOUT_KERNEL)

    def __init__(self, program: Program, device: str, floats: str = "float32") -> None:
        """
        Args:
            device: "cuda" or "xpu", whose current card is taken; "cpu" where Triton interprets its kernels.
            floats: how a whole run holds floats where that is tolerated: "float32", "bfloat16" or "float16".
        """
        self.program = program
        self.card = card_of(device)
        self.takes = tuple(dict.fromkeys(("cpu", device)))
        with self.card.current():
            self._lowering = Lowering(program, self.card, HALVES.get(floats, torch.float32))
        self.halves = len(self._lowering.halves)
        if self.halves:
            self.held = self._lowering.halves.held
        self._frees = last_uses(self._lowering.together, set(program.output_names()))
        self._own = {t.untyped_storage().data_ptr() for t in self._lowering.tensors.values() if t.numel()}
        self._recordings = Recordings(self.card, self._run)

    def __call__(self, inputs: Sequence[Tensor]) -> Any:
        with below_autograd(), self.card.current():
            output = self._recordings(self._moved(inputs))
            return on_tensors(lambda y: self._given_back(y, inputs), output)

    def _moved(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        return [x.detach().to(self.card.device) for x in inputs]

    def _given_back(self, y: Tensor, inputs: Sequence[Tensor]) -> Tensor:
        home = inputs[0].device if inputs else torch.device("cpu")
        if y.device != home:
            return y.to(home)
        return y.clone() if y.numel() and y.untyped_storage().data_ptr() in self._own else y

    def _run(self, inputs: Sequence[Tensor]) -> Any:
        values = self._values(inputs)
        for index, step in enumerate(self._lowering.together):
            values.update(zip(step.writes, step.run(values), strict=True))
            for dead in self._frees.get(index, ()):
                values.pop(dead, None)
        return self._lowering.full(self.program.output, values)

    def _values(self, inputs: Sequence[Tensor]) -> dict[str, Any]:
        return {i.name: x for i, x in zip(self.program.inputs, inputs, strict=True)}

    def run_node(self, index: int, values: Mapping[str, Any]) -> Any:
        """One node's value from given values, codes as the program defines them; where the first of them lies."""
        step = self._lowering.alone[index]
        given = {name: values[name] for name in step.reads}
        tensors = [x for x in _pytree.tree_leaves(given) if isinstance(x, Tensor)]
        home = tensors[0].device if tensors else torch.device("cpu")
        with torch.inference_mode(), self.card.current():
            local = _pytree.tree_map_only(Tensor, lambda x: x.to(self.card.device), given)
            (found,) = step.run(local)
            return _pytree.tree_map_only(Tensor, lambda y: y.to(home), found)

    def step(self, index: int) -> Callable[[Sequence[Tensor]], Tensor]:
        """One node as a function of the values that it reads, which come back to where the first of them lies."""
        made, device = self._lowering.whole[index], self.card.device

        def step(values: Sequence[Tensor]) -> Tensor:
            home = values[0].device
            with below_autograd(), self.card.current():
                moved = (x.detach().to(device) if isinstance(x, Tensor) else x for x in values)
                (found,) = made.run(dict(zip(made.reads, moved, strict=True)))
                result: Tensor = found.to(home)
            return result

        return step

    def between(self) -> AbstractContextManager[Any]:
        """PyTorch's autocast, where floats are held in half precision."""
        return torch.autocast(self.card.device.type, self.held) if self.halves else nullcontext()

    def int8_layers(self) -> int:
        """Convolutions and linears: each runs on kernels of exact int8 products."""
        return int8_layers(self.program)

    def left_to_torch(self) -> dict[int, str]:
        """Ops on codes that have no kernel. Float ops are PyTorch's on every card, as the plan says."""
        found = ((i, WITHOUT_KERNEL.get(node.op)) for i, node in enumerate(self.program.nodes))
        return {index: reason for index, reason in found if reason is not None}

    def trace(self, inputs: Sequence[Tensor]) -> Iterator[tuple[int, Any]]:
        """Every node's index and value, which stay on the card until they are yielded."""
        home = inputs[0].device if inputs else torch.device("cpu")
        values, frees = self._values(self._moved(inputs)), self.program.last_uses()
        for index, step in enumerate(self._lowering.alone):
            with torch.inference_mode(), self.card.current():
                values[step.writes[0]] = value = step.run(values)[0]
                shown = _pytree.tree_map_only(Tensor, lambda y: y.to(home), value)
            yield index, shown
            for dead in frees.get(index, ()):
                del values[dead]

    # -- tuning and times

    def tune(self, inputs: Sequence[Tensor]) -> list[dict[str, Any]]:
        """Measure tiles for every product of this batch that has none yet; rows for what was measured."""
        with torch.inference_mode(), self.card.current(), self.card.tuner.measuring(TUNING_S) as rows:
            self._run(self._moved(inputs))
        if rows:
            self._recordings.forget()
        batch = inputs[0].shape[0] if inputs and inputs[0].dim() else 0
        return [{"batch": batch, "card": self.card.name, **row} for row in rows]

    def adopt(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Take over what was measured on such a card."""
        self.card.tuner.adopt([row for row in rows if row.get("card") == self.card.name])

    def profile(self, inputs: Sequence[Tensor], runs: int = 10) -> list[dict[str, Any]]:
        """One row per step, timed on the card."""
        if not self.card.has_graphs:
            return super().profile(inputs, runs)
        rows: list[dict[str, Any]] = []
        with torch.inference_mode(), self.card.current():
            values = self._values(self._moved(inputs))
            for index, step in enumerate(self._lowering.together):
                values.update(zip(step.writes, step.run(values), strict=True))
                rows.append(self._row(step, timed_ms(self.card.interface, lambda step=step: step.run(values), runs)))  # type: ignore[misc]
                for dead in self._frees.get(index, ()):
                    values.pop(dead, None)
        return rows

    def _row(self, step: Step, ms: float) -> dict[str, Any]:
        node = self.program.nodes[step.nodes[-1]]
        what = node.target if node.op == "aten" else node.fused_name
        is_joined = len(step.nodes) > 1 or step.writes[-1] != node.output
        origin = (
            "torch"
            if not is_joined and node.op in ("aten", "size", "shape", "cat", "clamp", *WITHOUT_KERNEL)
            else self.name
        )
        return {"name": node.name, "op": node.target or node.op, "kernel": f"{origin}.{what}", "ms": ms}
