"""The cheapest assignment of bits that still loses little enough, found by trying some on the frontier.

The frontier is what `assign` finds at every budget. Along it the predicted loss falls as the cost rises, and the true
loss follows, but for noise: so the cheapest assignment that is good enough lies where trials change from bad to good,
and halving the budgets between a bad and a good one finds it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

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


def ends(costs: Table) -> tuple[float, float]:
    """The least and the most that an assignment costs."""
    return sum(min(row.values()) for row in costs.values()), sum(max(row.values()) for row in costs.values())


def _distinct(found: list[Trial]) -> list[Trial]:
    return list({frozenset(t.bits.items()): t for t in found}.values())
