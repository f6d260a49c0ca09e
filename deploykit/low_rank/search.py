"""Choices that meet a budget: one that can be counted layer by layer, or one that takes a file to be measured."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Mapping

from deploykit.layerwise.budgets import LEVELS, NotEnough
from deploykit.low_rank.factored import Ranks
from deploykit.low_rank.select import Choice, Number, Tables, least
from deploykit.low_rank.tables import Table

Choose = Callable[[Tables, float], Choice]
"""Ranks for at most a cost."""
Share = Callable[[Mapping[str, Ranks]], float]
"""What a network with these ranks saves, measured."""


def counted(choose: Choose, tables: Tables, cost: Number, amount: float, before: float) -> Choice:
    """The choice that saves ``amount`` of what the network costs.

    Args:
        choose: from `deploykit.low_rank.methods`.
        tables: by layer, of choices that save something.
        cost: of a choice.
        amount: share to save.
        before: what the whole network costs, whatever is in the tables.

    Raises:
        NotEnough: the cheapest choices save less.
    """
    whole = _whole(tables, cost)
    possible = (whole - least(tables, cost)) / before
    if amount > possible + 1e-9:
        raise NotEnough(amount, possible)
    return choose(tables, whole - amount * before)


def measured(choose: Choose, tables: Tables, cost: Number, amount: float, share: Share) -> Choice:
    """The choice that saves ``amount`` by measurement, and least by count: found to 1/128 of what can be counted.

    Args:
        choose: from `deploykit.low_rank.methods`.
        tables: by layer, of choices that save something.
        cost: what comes nearest to what is measured.
        amount: share to save.
        share: what ranks save.

    Raises:
        NotEnough: the cheapest choices save less.
    """
    whole, cheapest = _whole(tables, cost), least(tables, cost)

    def at(level: int) -> Choice:
        return choose(tables, whole - level / LEVELS * (whole - cheapest))

    def saved(level: int) -> float:
        return share(ranks_of(at(level)))

    if amount <= 0.0:
        return at(0)
    possible = saved(LEVELS)
    if possible < amount:
        raise NotEnough(amount, possible)
    # the last level is enough
    return at(bisect.bisect_left(range(LEVELS), True, lo=1, key=lambda level: saved(level) >= amount))


def quicker(choose: Choose, tables: Tables, cost: Number, share: Share) -> dict[str, Table]:
    """Without the choices of layers whose factors take longer than they do: each is tried alone.

    Args:
        choose: from `deploykit.low_rank.methods`.
        tables: by layer.
        cost: of a choice.
        share: of the network's time that ranks save.
    """
    half = choose(tables, (_whole(tables, cost) + least(tables, cost)) / 2)
    slow = {name for name, ranks in ranks_of(half).items() if share({name: ranks}) <= 0.0}
    return {name: Table(table.whole, (), table.decay) if name in slow else table for name, table in tables.items()}


def ranks_of(choice: Choice) -> dict[str, Ranks]:
    """Of the layers that do not stay whole."""
    return {name: candidate.ranks for name, candidate in choice.items() if candidate.ranks}


def _whole(tables: Tables, cost: Number) -> float:
    return sum(cost(table.whole) for table in tables.values())
