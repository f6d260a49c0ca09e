"""How many channels go: ranks, shares and multiples, until the budget is met."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from deploykit.layerwise.budgets import NotEnough
from deploykit.layerwise.channels import width
from deploykit.pruning.groups import Channel, Group

Scope = Literal["global", "layer"]


@dataclass(frozen=True)
class Ranked:
    """A group whose channels are in order, least important first, and how many of them may go."""

    channels: tuple[Channel, ...]
    scores: tuple[float, ...]
    allowed: tuple[int, ...]
    """Ascending, from 0."""

    def at_most(self, count: int) -> int:
        """The largest number that may go, up to ``count``."""
        return max(n for n in self.allowed if n <= count)


def ranked(
    model: nn.Module, groups: Sequence[Group], scores: Sequence[Tensor], multiple: int, most: float
) -> list[Ranked]:
    """The groups in the order in which their channels go.

    Args:
        scores: importance by group, ``[channels]``.
        multiple: what is left of a layer that loses channels is a multiple of it, as far as groups can choose.
        most: largest share of a group's channels that goes; one channel always stays.
    """
    found = []
    for group, own in zip(groups, scores, strict=True):
        order = own.argsort(stable=True).tolist()
        limit = min(int(most * len(order) + 1e-9), len(order) - 1)
        lost = [(width(model.get_submodule(p.layer), "out"), len(group.channels[0][p])) for p in group.ports
                if p.side == "out"]  # fmt: skip
        allowed = [n for n in range(limit + 1) if n == 0 or all((w - n * each) % multiple == 0 for w, each in lost)]
        found.append(Ranked(tuple(group.channels[i] for i in order), tuple(own[order].tolist()), tuple(allowed)))
    return found


def chosen(groups: Sequence[Ranked], level: float, scope: Scope) -> list[Channel]:
    """The channels that go at a level between 0 (none) and 1 (all that may go).

    Args:
        groups: from `ranked`.
        level: with scope ``layer`` the share of each group's own limit; with ``global`` the share of all channels that
            may go, least important of the whole network first.
        scope: whether channels of different groups are compared.
    """
    return taken(groups, counts(groups, level, scope))


def counts(groups: Sequence[Ranked], level: float, scope: Scope) -> list[int]:
    """How many channels of every group go at a level (see `chosen`)."""
    if scope == "layer":
        found = [round(level * group.allowed[-1]) for group in groups]
    else:
        every = sorted((s, g) for g, group in enumerate(groups) for s in group.scores[: group.allowed[-1]])
        found = [0] * len(groups)
        for _, g in every[: round(level * len(every))]:
            found[g] += 1
    return [group.at_most(n) for group, n in zip(groups, found, strict=True)]


def taken(groups: Sequence[Ranked], counts: Sequence[int]) -> list[Channel]:
    """The first channels of every group, so many of each."""
    return [c for group, n in zip(groups, counts, strict=True) for c in group.channels[:n]]


def fit(
    groups: Sequence[Ranked],
    amount: float,
    scope: Scope,
    removed: Callable[[list[Channel]], float],
    levels: int | None = None,
) -> list[Channel]:
    """The fewest channels by which at least ``amount`` is saved.

    Args:
        groups: from `ranked`.
        amount: share to save, 0 <= amount < 1.
        scope: see `chosen`.
        removed: the share that is saved without these channels; it never falls when more of them go. Where it is
            measured and does, what comes back was measured to save enough all the same.
        levels: how finely the number of channels is sought, where every look takes long; None: channel by channel.

    Raises:
        NotEnough: all that may go is not enough.
    """
    if amount == 0.0:
        return []
    count = max(1, sum(group.allowed[-1] for group in groups))
    steps = count if levels is None else min(levels, count)
    possible = removed(chosen(groups, 1.0, scope))
    if possible < amount:
        raise NotEnough(amount, possible)

    def enough(level: int) -> bool:
        return removed(chosen(groups, level / steps, scope)) >= amount

    level = bisect.bisect_left(range(steps), True, lo=1, key=enough)  # all steps are enough
    gone = counts(groups, level / steps, scope)
    return taken(groups, gone if levels is not None else put_back(groups, gone, amount, removed))


def put_back(
    groups: Sequence[Ranked], gone: Sequence[int], amount: float, removed: Callable[[list[Channel]], float]
) -> list[int]:
    """The counts without what is not needed: where channels go by the dozen, the last dozen may save far too much.

    Groups are asked in the order of what is most important among that which went.
    """
    left = list(gone)
    order = sorted((g for g, n in enumerate(left) if n), key=lambda g: -groups[g].scores[left[g] - 1])
    for g in order:
        for fewer in reversed([n for n in groups[g].allowed if n < left[g]]):
            tried = [*left[:g], fewer, *left[g + 1 :]]
            if removed(taken(groups, tried)) < amount:
                break
            left = tried
    return left
