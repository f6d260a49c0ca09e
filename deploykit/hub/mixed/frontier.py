"""The cheapest assignment of bits that still loses little enough, found by trying some on the frontier.

The frontier is what `assign` finds at every budget. Along it the predicted loss falls as the cost rises, and the true
loss follows, but for noise: so the cheapest assignment that is good enough lies where trials change from bad to good,
and halving the budgets between a bad and a good one finds it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from deploykit.core.errors import DeploykitError
from deploykit.core.manifest import Finding
from deploykit.core.progress import say
from deploykit.hub.mixed.assignment import Table, assign, cost

PRECISION = 0.01
"""Of the cost of the dearest assignment: budgets that lie closer are not told apart."""
POINTS = 12
"""Budgets of `frontier`."""


@dataclass(frozen=True)
class Trial:
    """One assignment on the frontier."""

    bits: Mapping[str, int]
    cost: float
    predicted: float
    """Summed sensitivities."""
    lost: float | None = None
    """What it was measured to lose; None: it was not tried."""


def on_frontier(losses: Table, costs: Table, budget: float) -> Trial:
    """The assignment that is predicted to lose least within a budget.

    Raises:
        OverBudget: there is none.
    """
    bits = assign(losses, costs, budget)
    return Trial(bits, cost(costs, bits), cost(losses, bits))


def frontier(losses: Table, costs: Table) -> list[Trial]:
    """Assignments at evenly spaced budgets between the cheapest and the dearest, the cheapest first."""
    low, high = ends(costs)
    found = [on_frontier(losses, costs, low + (high - low) * i / (POINTS - 1)) for i in range(POINTS)]
    return _distinct(found)


def cheapest_within(
    losses: Table, costs: Table, most_lost: float, measure: Callable[[Mapping[str, int]], float]
) -> tuple[Trial | None, list[Trial]]:
    """The cheapest assignment that was measured to lose no more than ``most_lost``, and all that were tried.

    None: not even the dearest on the frontier, which loses least, does.
    """
    tried: dict[frozenset[tuple[str, int]], Trial] = {}

    def at(budget: float) -> Trial:
        found = on_frontier(losses, costs, budget)
        key = frozenset(found.bits.items())
        if key not in tried:
            tried[key] = Trial(found.bits, found.cost, found.predicted, measure(found.bits))
        return tried[key]

    def good(trial: Trial) -> bool:
        return trial.lost is not None and trial.lost <= most_lost

    low, high = ends(costs)
    best, least = at(high), at(low)
    if good(least):
        best = least
    elif good(best):
        while high - low > PRECISION * ends(costs)[1]:
            middle = at((low + high) / 2)
            if good(middle):
                best, high = middle, middle.cost
            else:
                low = (low + high) / 2
    every = sorted(tried.values(), key=lambda t: t.cost)
    return best if good(best) else None, every


@dataclass(frozen=True)
class Bar:
    """What an assignment may lose, and how that is told."""

    points: float
    lost: Callable[[Mapping[str, int]], float]
    """Points that an assignment was measured to lose."""
    what: str
    """That are counted."""
    samples: int
    """That they are counted on."""


def least_within(
    losses: Table, costs: Table, bar: Bar, budget: float | None, who: str, unit: str
) -> tuple[Trial, list[Trial]]:
    """`cheapest_within`, or what stood in its way.

    Args:
        losses: by layer and bits.
        costs: for the same.
        bar: what may be lost.
        budget: most that the assignment may cost; None: any amount.
        who: the step that asks.
        unit: of the costs.

    Raises:
        DeploykitError: no assignment loses so little, or only some that cost more than the budget.
    """
    if 100 / bar.samples > bar.points > 0:
        say(
            f"note: {who} judges {bar.points:g} points by {bar.samples} samples, one of which is "
            f"{100 / bar.samples:.3g}; {math.ceil(100 / bar.points)} or more tell them apart better"
        )
    best, tried = cheapest_within(losses, costs, bar.points, bar.lost)
    points = f"{bar.points:g} points of {bar.what} on {bar.samples} samples"
    listed = "; ".join(f"{t.cost:.3g} loses {t.lost:.2f}" for t in tried if t.lost is not None)
    if best is None:
        raise DeploykitError(
            f"{who}: no assignment stays within {points}, where one answer is {100 / bar.samples:.3g}. Tried ({unit}): "
            f"{listed}"
        )
    if budget is not None and best.cost > budget:
        raise DeploykitError(
            f"{who}: to stay within {points} takes {best.cost:.3g} ({unit}), more than {budget:g}. Tried: {listed}"
        )
    return best, tried


def told(step: str, unit: str, chosen: Trial, shown: Sequence[Trial]) -> Finding:
    """The frontier, for the report."""
    others = [t for t in shown if t.bits != chosen.bits]
    rows = [(t.cost, t.predicted, t.lost, "chosen" if t is chosen else "") for t in (chosen, *others)]
    rows.sort(key=lambda row: row[:2])
    columns = unit, "predicted loss", "points lost", ""
    return Finding(step, "Loss over what the weights cost", columns, tuple(rows), (unit, "predicted loss"))


def ends(costs: Table) -> tuple[float, float]:
    """The least and the most that an assignment costs."""
    return sum(min(row.values()) for row in costs.values()), sum(max(row.values()) for row in costs.values())


def _distinct(found: list[Trial]) -> list[Trial]:
    return list({frozenset(t.bits.items()): t for t in found}.values())
