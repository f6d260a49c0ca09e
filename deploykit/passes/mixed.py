"""Mixed precision: few bits where they cost little, more where they are needed.

What the answers lose when one weight alone gets few bits is measured (`deploykit.hub.mixed.sensitivity`). Integer
programming finds the bits of all weights that lose least within a budget (`deploykit.hub.mixed.assignment`): of bytes,
of multiply-accumulates times bits, or of milliseconds. Or the budget itself is sought, the smallest with which the
network loses no more than some points (`deploykit.hub.mixed.frontier`).

The step sets bits and rounds to nearest; which integers do best with these bits is the business of `gptq`, which comes
next by itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np

from deploykit.core.context import Context, apart
from deploykit.core.data import DataSet
from deploykit.core.errors import DeploykitError
from deploykit.core.journal import NOTHING_KEPT
from deploykit.core.manifest import Finding
from deploykit.core.patterns import matching
from deploykit.core.recipe import Stage
from deploykit.core.target import Need, Profit

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from deploykit.hub.bits import Held
    from deploykit.hub.graph import Hub
    from deploykit.hub.mixed.assignment import Table
    from deploykit.hub.mixed.frontier import Trial

BYTES = 0.7
BITS = "Bits of every layer"
"""The table that says them."""


@dataclass(frozen=True)
class Mixed:
    """Chooses the bits of every weight: least loss within a budget, or least budget within a loss."""

    bits: tuple[int, ...] = (4, 8)
    """What weights may have; none gets more than the target's numbers have."""
    bytes: float | None = None
    """Budget: bytes of all weights, as a share of what they take in 8 bits. 0.7 where no other is given."""
    macs: float | None = None
    """Budget: multiply-accumulates times bits of the weight, as a share of those in 8 bits."""
    ms: float | None = None
    """Budget: milliseconds of all layers together, by ``times``."""
    times: str = ""
    """TOML file with the milliseconds of every layer at every number of bits, measured on the device."""
    max_drop: float | None = None
    """Points that may be lost, of accuracy where samples have labels, else of agreement with the float model."""
    keep: tuple[str, ...] = ()
    """Layers that keep the most bits, by name or pattern."""
    samples: int = 64
    """That the loss of every single weight is measured on."""
    measure: Literal["squared", "divergence", "cross_entropy"] = "squared"
    """By what: squared error of the outputs, divergence of the answers' probabilities, or from the labels."""

    stage: ClassVar[Stage] = "hub"
    needs: ClassVar[tuple[Need, ...]] = ("data",)
    pays_if: ClassVar[tuple[Profit, ...]] = ("int4",)

    def __post_init__(self) -> None:
        """Refuses what no assignment can be found for."""
        if len(set(self.bits)) < 2 or not all(2 <= b <= 8 for b in self.bits):
            raise ValueError("bits must be two or more different numbers between 2 and 8")
        budgets = [b for b in (self.bytes, self.macs, self.ms) if b is not None]
        if len(budgets) > 1 or not all(b > 0 for b in budgets):
            raise ValueError("there is one budget, above 0: bytes, macs or ms")
        if self.ms is not None and not self.times:
            raise ValueError(
                "ms needs times: a file with the milliseconds of every layer with 4, 8 ... bits on the device. They "
                "cannot be measured here: the runtimes of this machine widen fewer bits to 8 when they load a file"
            )
        if self.times and self.ms is None:
            raise ValueError("times are what the budget ms is counted in; give ms")
        if (self.max_drop is not None and not self.max_drop >= 0) or self.samples < 1:
            raise ValueError("max_drop must be 0 or more points, samples 1 or more")

    @property
    def least_bits(self) -> int:
        """The fewest that a weight may get: with few, integers have to be chosen."""
        return min(self.bits)

    def foresee(self, context: Context) -> None:
        """Refuses too few calibration samples, and to count answers to samples that are made up."""
        _, judged = apart(context, "mixed")
        if self.max_drop is not None and judged.synthetic:
            raise DeploykitError("mixed: max_drop counts answers to real samples, and these are made up; give a budget")

    def rehearse(self, hub: Hub) -> None:
        """Refuses layers that there are not, times that are missing, and a budget that no bits can meet.

        Raises:
            DeploykitError: one of these; nothing to choose bits for.
            MissingExtra: there is no solver.
        """
        from deploykit.hub.mixed.assignment import require_solver

        require_solver()
        self._room(hub)

    def __call__(self, hub: Hub, context: Context) -> Hub:
        """The hub with the bits chosen, rounded to nearest; how they were chosen is among its findings.

        Raises:
            DeploykitError: a budget or loss that cannot be met, with what can be; a pattern that matches nothing; too
                few samples; nothing to choose bits for.
            MissingExtra: there is no solver.
        """
        from deploykit.hub.bits import is_plain, with_bits
        from deploykit.hub.mixed.assignment import require_solver
        from deploykit.hub.mixed.frontier import told
        from deploykit.hub.mixed.sensitivity import sensitivities

        require_solver()
        self.foresee(context)
        held, allowed, costs = self._room(hub)
        if not is_plain(hub):
            raise DeploykitError("mixed sets weights anew and comes first of the hub steps; put the others behind it")
        fitted, judged = apart(context, "mixed")
        bits = sorted({b for choices in allowed.values() for b in choices})

        def measured() -> dict[str, NDArray[np.float64]]:
            found = sensitivities(hub, fitted, judged.spread(self.samples), bits, self.measure, seed=context.seed)
            return {name: np.asarray([row[b] for b in bits], np.float64) for name, row in found.items()}

        found = context.journal.once("sensitivities", measured)
        losses = {name: {b: float(found[name][bits.index(b)]) for b in own} for name, own in allowed.items()}
        chosen, shown = self._chosen(hub, replace(context, data={"calibration": fitted}), judged, losses, costs)
        findings = *hub.findings, told(repr(self), self._unit, chosen, shown), self._layers(chosen, held, losses)
        return replace(with_bits(hub, chosen.bits), findings=findings)

    def _room(self, hub: Hub) -> tuple[list[Held], dict[str, tuple[int, ...]], Table]:
        """The weights that bits are chosen for, which they may have, and what those cost."""
        import onnx

        from deploykit.hub.bits import held_weights
        from deploykit.hub.mixed.assignment import cheapest, within
        from deploykit.hub.slices import Slicer

        held = held_weights(Slicer(onnx.load_model_from_string(hub.bytes)))
        if not held:
            raise DeploykitError("mixed chooses bits of integer weights that meet integer inputs, and there are none")
        allowed = self._allowed(hub, held)
        costs = self._costs(hub, held, allowed)
        if self._budget is not None and not within(least := cheapest(costs), self._budget):
            raise DeploykitError(
                f"mixed: {self._budget:g} ({self._unit}) cannot be met: the least possible is {least:.4g}, with "
                f"{min(min(bits) for bits in allowed.values())} bits wherever they are allowed"
            )
        return held, allowed, costs

    def _allowed(self, hub: Hub, held: Sequence[Held]) -> dict[str, tuple[int, ...]]:
        """Bits that each weight may have."""
        bits = tuple(sorted({min(b, hub.spec.weight_bits) for b in self.bits}))
        known = {layer.name: each.name for each in held for layer in each.layers}
        kept = {known[name] for name in matching("layer", self.keep, known)}
        return {each.name: bits[-1:] if each.name in kept else bits for each in held}

    def _costs(self, hub: Hub, held: Sequence[Held], allowed: Mapping[str, Sequence[int]]) -> Table:
        """In `_unit`."""
        from deploykit.hub.mixed.costs import macs, read_times

        if self.ms is not None:
            times = read_times(Path(self.times), list(allowed), sorted({b for bits in allowed.values() for b in bits}))
            return {name: {b: times[name][b] for b in bits} for name, bits in allowed.items()}
        amounts = macs(hub, held) if self.macs is not None else {each.name: each.size for each in held}
        whole = 8 * sum(amounts.values())
        return {name: {b: amounts[name] * b / whole for b in bits} for name, bits in allowed.items()}

    @property
    def _unit(self) -> str:
        if self.ms is not None:
            return "milliseconds"
        return "weight bytes, share of int8" if self.macs is None else "MACs x bits, share of int8"

    @property
    def _budget(self) -> float | None:
        given = next((b for b in (self.bytes, self.macs, self.ms) if b is not None), None)
        return BYTES if given is None and self.max_drop is None else given

    def _chosen(
        self, hub: Hub, context: Context, judged: DataSet, losses: Table, costs: Table
    ) -> tuple[Trial, list[Trial]]:
        """The assignment, and those beside it on the frontier."""
        from deploykit.hub.analysis.answers import Exam
        from deploykit.hub.bits import with_bits
        from deploykit.hub.mixed.frontier import Bar, frontier, least_within, on_frontier
        from deploykit.passes.gptq import Gptq

        budget = self._budget
        if self.max_drop is None:
            assert budget is not None
            return on_frontier(losses, costs, budget), frontier(losses, costs)
        exam = Exam(hub.graph, judged, "mixed", context.need("calibration", "mixed"))
        plain = replace(context, journal=NOTHING_KEPT)

        def lost(bits: Mapping[str, int]) -> float:
            found = context.journal.once(
                f"lost with {sorted(bits.items())}",
                lambda: {"points": np.asarray(exam.lost(Gptq()(with_bits(hub, bits), plain).bytes))},
            )
            return float(found["points"])

        return least_within(
            losses, costs, Bar(self.max_drop, lost, exam.what, len(judged)), budget, "mixed", self._unit
        )

    def _layers(self, chosen: Trial, held: Sequence[Held], losses: Table) -> Finding:
        bits = sorted({b for row in losses.values() for b in row})
        rows = tuple(
            (each.name, chosen.bits[each.name], each.size, *(losses[each.name].get(b) for b in bits)) for each in held
        )
        columns = "layer", "bits", "weights", *(f"loss with {b} bits" for b in bits)
        return Finding(repr(self), BITS, columns, rows)
