"""Which ranks each layer gets, so that the network as a whole meets a budget.

All ways read tables (`deploykit.low_rank.tables`) and know nothing of how a layer is decomposed.

- `alternate`: Liebenwein et al. 2021, "Compressing Neural Networks: Towards Determining the Optimal Layer-wise
  Decomposition", algorithm 1: equal errors at given k, then the best k of every layer at what it has been given.
- `equal_error`: the same optimum, found exactly: every layer takes the cheapest choice whose error is at most ε,
  whatever its k, and ε is the least that meets the budget.
- `least_sum`: the least sum of errors, by a Lagrange multiplier.
- `equal_ratio`: the same share of every layer.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np

from deploykit.low_rank.tables import Candidate, Table

Number = Callable[[Candidate], float]
Tables = Mapping[str, Table]
Choice = dict[str, Candidate]
TURNS = 8
FIXED = (1, 3, 5, 7)
"""k of every layer with which the first seeds start, or the nearest that it has."""


def saving(tables: Tables, cost: Number) -> dict[str, Table]:
    """Without the choices that cost as much as the whole layer, or more."""
    return {
        name: replace(table, factored=tuple(c for c in table.factored if cost(c) < cost(table.whole)))
        for name, table in tables.items()
    }


def least(tables: Tables, cost: Number) -> float:
    """What the cheapest choices of all layers cost together."""
    return sum(min(map(cost, (t.whole, *t.factored))) for t in tables.values())


def equal_error(tables: Tables, cost: Number, error: Number, budget: float) -> Choice:
    """The cheapest choices whose errors are all at most ε; the least ε with which they cost at most the budget.

    Args:
        tables: by layer.
        cost: of a choice.
        error: of a choice; 0 for a whole layer.
        budget: for all layers together; above the least that they can cost.
    """
    stairs = {name: _stairs(table, cost, error) for name, table in tables.items()}
    levels = sorted({error(c) for own in stairs.values() for c in own})

    def chosen(level: float) -> Choice:
        return {n: own[bisect.bisect_right(own, level, key=error) - 1] for n, own in stairs.items()}

    def meets(level: float) -> bool:
        return sum(map(cost, chosen(level).values())) <= budget

    return chosen(levels[min(bisect.bisect_left(levels, True, key=meets), len(levels) - 1)])


def spent(tables: Tables, cost: Number, error: Number, budget: float, choice: Choice) -> Choice:
    """What is left of the budget goes to the layer whose error it lowers most, as long as it lowers any.

    Args:
        tables: by layer.
        cost: of a choice.
        error: of a choice; 0 for a whole layer.
        budget: for all layers together.
        choice: that costs less.
    """
    stairs = {name: _stairs(table, cost, error) for name, table in tables.items()}
    choice = dict(choice)
    while True:
        left = budget - sum(map(cost, choice.values()))
        best = {
            name: next((c for c in stairs[name] if cost(c) <= cost(own) + left), own) for name, own in choice.items()
        }
        name = max(choice, key=lambda n: error(choice[n]) - error(best[n]))
        if left < 0 or not error(best[name]) < error(choice[name]):
            return choice
        choice[name] = best[name]


def _stairs(table: Table, cost: Number, error: Number) -> list[Candidate]:
    """By rising error, only those that cost less than all before; the whole layer is the first."""
    found = [table.whole]
    for candidate in sorted(table.factored, key=lambda c: (error(c), cost(c))):
        if cost(candidate) < cost(found[-1]):
            found.append(candidate)
    return found


def alternate(tables: Tables, cost: Number, error: Number, budget: float, seeds: int, seed: int) -> Choice:
    """Algorithm 1. Of all seeds the choice with the least largest error.

    Args:
        tables: by layer, of channel slices.
        cost: of a choice.
        error: of a choice; 0 for a whole layer.
        budget: for all layers together.
        seeds: how often to start, with other k.
        seed: of the k that are drawn.
    """
    random = np.random.default_rng(seed)
    by_k = {name: _grouped(table) for name, table in tables.items()}
    best: tuple[float, Choice] | None = None
    for start in range(seeds):
        ks = {}
        for name, own in by_k.items():
            near = min(own, key=lambda k: abs(k - FIXED[start % len(FIXED)]))
            ks[name] = near if start < len(FIXED) else int(random.choice(list(own)))
        for _ in range(TURNS):
            fixed = {name: by_k[name][k] for name, k in ks.items()}
            choice = equal_error(fixed, cost, error, budget)  # line 4: ε, and with it the ranks
            better = {name: _best(table, cost, error, choice[name]) for name, table in tables.items()}  # lines 5 to 7
            if better == ks:
                break
            ks = better
        worst = max(map(error, choice.values()))
        if sum(map(cost, choice.values())) <= budget and (best is None or worst < best[0]):
            best = worst, choice
    return best[1] if best is not None else equal_error(tables, cost, error, budget)


def _grouped(table: Table) -> dict[int, Table]:
    """The choices with the same k; a layer without any has k = 1."""
    ks = sorted({c.k for c in table.factored}) or [1]
    return {k: Table(table.whole, tuple(c for c in table.factored if c.k == k)) for k in ks}


def _best(table: Table, cost: Number, error: Number, given: Candidate) -> int:
    """The k whose ranks lose least at what a layer has been given."""
    affordable = [c for c in table.factored if cost(c) <= cost(given)]
    return min(affordable, key=lambda c: (error(c), c.k)).k if affordable else 1


def least_sum(tables: Tables, cost: Number, error: Number, budget: float) -> Choice:
    """The least sum of errors: minimise error + μ cost, layer by layer, with the least μ that meets the budget.

    As μ grows, a layer walks down the lower convex hull of its choices. The steps of all layers are taken in the order
    of their slopes, error for what is saved, until the budget is met.

    Args:
        tables: by layer.
        cost: of a choice.
        error: of a choice; 0 for a whole layer.
        budget: for all layers together.
    """
    hulls = {name: _hull(table, cost, error) for name, table in tables.items()}
    steps = sorted(
        ((error(b) - error(a)) / (cost(a) - cost(b)), i, name)
        for name, hull in hulls.items()
        for i, (a, b) in enumerate(itertools.pairwise(hull))
    )
    choice = {name: hull[0] for name, hull in hulls.items()}
    total = sum(map(cost, choice.values()))
    for _, i, name in steps:
        if total <= budget:
            break
        total -= cost(choice[name]) - cost(hulls[name][i + 1])
        choice[name] = hulls[name][i + 1]
    return choice


def _hull(table: Table, cost: Number, error: Number) -> list[Candidate]:
    """From the whole layer down, by falling cost and rising slope."""
    found: list[Candidate] = []
    for c in _stairs(table, cost, error):
        while len(found) > 1 and (error(c) - error(found[-2])) * (cost(found[-2]) - cost(found[-1])) <= (
            error(found[-1]) - error(found[-2])
        ) * (cost(found[-2]) - cost(c)):
            found.pop()  # it lies above the line from its neighbour to c
        found.append(c)
    return found


def equal_ratio(tables: Tables, cost: Number, budget: float) -> Choice:
    """The cheapest choices that save at most the same share of every layer; the least share that meets the budget.

    Args:
        tables: by layer.
        cost: of a choice.
        budget: for all layers together.
    """
    saved = {id(c): 1.0 - cost(c) / (cost(t.whole) or 1.0) for t in tables.values() for c in (t.whole, *t.factored)}
    return equal_error(tables, cost, lambda c: saved[id(c)], budget)
