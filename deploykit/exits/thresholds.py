"""When a sample may leave: a threshold per exit, chosen on samples that were held out.

A sample leaves by the first exit whose confidence is above the exit's threshold, and by the last one in any case. So a
threshold of 1 lets nobody leave, and one of 0 everybody.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from deploykit.core.errors import DeploykitError

if TYPE_CHECKING:
    from numpy.typing import NDArray

WORK = 4096
"""Combinations of all thresholds but the last that are tried."""


@dataclass(frozen=True)
class Outcome:
    """What becomes of samples under some thresholds."""

    thresholds: tuple[float, ...]
    """Of all exits but the last, each within [0, 1]."""
    accuracy: float
    """Percent of samples that leave with a right answer."""
    cost: float
    """Mean over samples, in the unit of the costs."""
    shares: tuple[float, ...]
    """Of the samples, that leave by each exit."""


def outcome(
    confidence: NDArray[Any], right: NDArray[Any], costs: Sequence[float], thresholds: Sequence[float]
) -> Outcome:
    """What thresholds do to samples.

    Args:
        confidence: ``[exits, n]``: the largest probability of each exit's answer.
        right: ``[exits, n]`` bool: whether that answer is right (or, without labels, the deepest's).
        costs: ``[exits]``: of everything that was computed when a sample leaves by an exit.
        thresholds: ``[exits - 1]``.

    Raises:
        DeploykitError: thresholds or costs that are not one per exit, or thresholds outside [0, 1].
    """
    check(thresholds, len(confidence))
    _same_lengths(confidence, right, costs)
    left = leaves(confidence, thresholds)
    shares = np.bincount(left, minlength=len(costs)) / len(left)
    correct = np.asarray(right, bool)[left, np.arange(len(left))]
    return Outcome(
        tuple(float(t) for t in thresholds), 100.0 * float(correct.mean()), float(shares @ np.asarray(costs)),
        tuple(float(s) for s in shares),
    )  # fmt: skip


def leaves(confidence: NDArray[Any], thresholds: Sequence[float]) -> NDArray[np.int64]:
    """The exit ``[n]`` that each sample leaves by, counted from 0; confidence ``[exits, n]``."""
    bounds = np.asarray([*thresholds, -np.inf], np.float64)[:, None]
    return np.asarray(np.argmax(confidence > bounds, axis=0), np.int64)


def check(thresholds: Sequence[float], exits: int) -> None:
    """Refuses thresholds outside [0, 1], and another number of them than there are exits in front of the last."""
    for t in thresholds:
        if not 0.0 <= t <= 1.0:
            raise DeploykitError(f"a threshold is a probability between 0 (all leave) and 1 (nobody does); given {t:g}")
    if len(thresholds) != exits - 1:
        raise DeploykitError(
            f"{len(thresholds)} thresholds are given, and {exits - 1} exits stand in front of the last: one for each, "
            "first to last"
        )


def check_allowed(points: float) -> None:
    """Refuses a loss of accuracy below 0."""
    if not points >= 0:
        raise DeploykitError(f"the accuracy that may be lost is 0 points or more; given {points:g}")


def cheapest(
    confidence: NDArray[Any], right: NDArray[Any], costs: Sequence[float], allowed: float, errors: float = 0.0
) -> Outcome:
    """The thresholds of least mean cost that lose no more than ``allowed`` percentage points against the last exit.

    The best of many combinations is in part the luckiest: other samples lose more by it. So the loss and some standard
    errors of it must fit in. With d of n samples lost, and D answers right at one exit and wrong at the other, the
    standard error of d is √(D - d²/n) (paired proportions).

    All combinations of thresholds are compared, as far as samples tell them apart: exactly with up to three exits and
    4,096 samples; beyond that, thresholds in front of the last one are tried at evenly spaced ranks, 64 of them with
    four exits, 16 with five.

    Args:
        confidence: ``[exits, n]``.
        right: ``[exits, n]`` bool.
        costs: ``[exits]``: of everything that was computed when a sample leaves by an exit.
        allowed: points of accuracy.
        errors: how many standard errors of the loss must fit in as well.

    Raises:
        DeploykitError: ``allowed`` is below 0.
    """
    check_allowed(allowed)
    n, at_last = right.shape[1], np.asarray(right, bool)[-1].sum()

    def rank(correct: NDArray[Any], cost: NDArray[Any], unlike: NDArray[Any]) -> NDArray[Any]:
        lost = at_last - correct
        deviation = np.sqrt(np.maximum(unlike - lost * lost / n, 0.0))
        return np.where(lost + errors * deviation <= allowed / 100.0 * n + 1e-9, -cost, -np.inf)

    found = _best(confidence, right, costs, rank, lambda correct, cost: correct)
    assert found is not None  # nobody leaves: nothing is lost
    return found


def most_accurate(confidence: NDArray[Any], right: NDArray[Any], costs: Sequence[float], budget: float) -> Outcome:
    """The thresholds of highest accuracy whose mean cost is ``budget`` at most; searched as in `cheapest`.

    Raises:
        DeploykitError: the first exit alone costs more.
    """
    most = budget * confidence.shape[1] * (1 + 1e-12)

    def rank(correct: NDArray[Any], cost: NDArray[Any], _unlike: NDArray[Any]) -> NDArray[Any]:
        return np.where(cost <= most, correct, -np.inf)

    found = _best(confidence, right, costs, rank, lambda correct, cost: -cost)
    if found is None:
        raise DeploykitError(
            f"a mean cost of {budget:g} cannot be reached: leaving by the first exit costs {costs[0]:g}"
        )
    return found


def frontier(
    confidence: NDArray[Any], right: NDArray[Any], costs: Sequence[float], points: int = 9
) -> tuple[Outcome, ...]:
    """What accuracy costs: the most accurate thresholds of mean costs from the first exit's to the last's.

    Budgets are evenly spaced. What costs more than another without answering better is left out.

    Args:
        confidence: ``[exits, n]``.
        right: ``[exits, n]`` bool.
        costs: ``[exits]``, rising.
        points: budgets, two or more.

    Returns:
        rising in cost and in accuracy.
    """
    budgets = np.linspace(costs[0], costs[-1], points) * confidence.shape[1] * (1 + 1e-12)
    best: list[tuple[int, float, tuple[float, ...]] | None] = [None] * points
    for some in _candidates(confidence, right, costs):
        at_least = np.maximum.accumulate(some.correct[::-1])[::-1]  # of what costs as much or less: more leave
        first = len(some.cost) - np.searchsorted(some.cost[::-1], budgets, side="right")
        for k in np.flatnonzero(first < len(some.cost)):
            correct, known = int(at_least[first[k]]), best[k]
            if known is None or correct >= known[0]:
                top = int(np.flatnonzero(some.correct == correct)[-1])
                key = correct, -float(some.cost[top])
                if known is None or key > known[:2]:
                    best[k] = *key, some.thresholds(top)
    found: list[Outcome] = []
    for at in best:
        if at is not None and (not found or at[0] > round(found[-1].accuracy / 100 * confidence.shape[1])):
            found.append(outcome(confidence, right, costs, at[2]))
    return tuple(found)


Rank = Callable[["NDArray[Any]", "NDArray[Any]", "NDArray[Any]"], "NDArray[Any]"]
Tie = Callable[["NDArray[Any]", "NDArray[Any]"], "NDArray[Any]"]


def _best(
    confidence: NDArray[Any], right: NDArray[Any], costs: Sequence[float], rank: Rank, tie: Tie
) -> Outcome | None:
    """The thresholds of highest rank, and among equals of the highest tie; None where every rank is -inf.

    Ranks are of the number of right answers, the summed cost, and how many answers are right where the last exit's is
    wrong or the other way round; ties of the first two.
    """
    best: tuple[float, float, tuple[float, ...]] | None = None
    for some in _candidates(confidence, right, costs):
        ranks, ties = rank(some.correct, some.cost, some.unlike), tie(some.correct, some.cost)
        top = int(np.lexsort((ties, ranks))[-1])
        key = (float(ranks[top]), float(ties[top]))
        if np.isfinite(key[0]) and (best is None or key > best[:2]):
            best = (*key, some.thresholds(top))
    return None if best is None else outcome(confidence, right, costs, best[2])


@dataclass(frozen=True)
class _Candidates:
    """All choices of the last threshold behind one choice of the others. Arrays are one value for each."""

    taken: tuple[float, ...]
    """The other thresholds."""
    sure: NDArray[np.float64]
    """Confidence of the samples that are still there, descending."""
    ends: NDArray[np.int64]
    """How many of them leave."""
    correct: NDArray[np.int64]
    """Right answers, of all samples."""
    cost: NDArray[np.float64]
    """Summed over all samples."""
    unlike: NDArray[np.int64]
    """Answers that are right where the last exit's is wrong, or the other way round."""

    def thresholds(self, which: int) -> tuple[float, ...]:
        """Of one of them."""
        return (*self.taken, _between(self.sure, int(self.ends[which])))


def _candidates(confidence: NDArray[Any], right: NDArray[Any], costs: Sequence[float]) -> Iterator[_Candidates]:
    """All thresholds, as far as samples tell them apart.

    The last one is always exact: with samples in order of confidence, all its values are sums over a first and a last
    part.
    """
    _same_lengths(confidence, right, costs)
    confidence, right = np.asarray(confidence, np.float64), np.asarray(right, np.int64)
    early = len(confidence) - 2
    levels = max(2, int(WORK ** (1 / early) + 1e-9)) if early > 0 else 0
    differs = (right != right[-1]).astype(np.int64)
    for taken, alive, correct, cost, unlike in _fixed(confidence, right, differs, costs, early, levels):
        order = alive[np.argsort(-confidence[early, alive], kind="stable")]
        stay = right[-1, order].sum() - _sums(right[-1, order])
        total = correct + _sums(right[early, order]) + stay
        count = np.arange(len(order) + 1)
        spent = cost + count * costs[early] + (len(order) - count) * costs[-1]
        apart = unlike + _sums(differs[early, order])
        sure = confidence[early, order]
        ends = _ends(sure)
        yield _Candidates(taken, sure, ends, total[ends], spent[ends], apart[ends])


Fixed = tuple[tuple[float, ...], "NDArray[np.int64]", int, float, int]


def _fixed(
    confidence: NDArray[Any],
    right: NDArray[Any],
    differs: NDArray[Any],
    costs: Sequence[float],
    early: int,
    levels: int,
) -> Iterator[Fixed]:
    """Every choice of the first ``early`` thresholds: these, who is still there; of the rest the number of right
    answers, the cost and how many answers differ from the last exit's in being right."""
    open_: list[Fixed] = [((), np.arange(confidence.shape[1]), 0, 0.0, 0)]
    while open_:
        taken, alive, correct, cost, unlike = open_.pop()
        k = len(taken)
        if k == early:
            yield taken, alive, correct, cost, unlike
            continue
        order = alive[np.argsort(-confidence[k, alive], kind="stable")]
        ends = _ends(confidence[k, order])
        ends = ends[np.unique(np.linspace(0, len(ends) - 1, min(levels, len(ends))).round().astype(int))]
        for end in ends:
            gone, at = order[:end], _between(confidence[k, order], int(end))
            open_.append(
                ((*taken, at), order[end:], correct + int(right[k, gone].sum()), cost + int(end) * costs[k],
                 unlike + int(differs[k, gone].sum()))
            )  # fmt: skip


def _sums(x: NDArray[np.int64]) -> NDArray[np.int64]:
    """Of the first 0, 1, 2, … values."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(x)])


def _ends(descending: NDArray[Any]) -> NDArray[np.int64]:
    """How many may leave together: equally sure samples cannot be told apart."""
    inner = np.flatnonzero(descending[1:] < descending[:-1]) + 1
    return np.unique(np.concatenate([[0], inner, [len(descending)]])).astype(np.int64)


def _between(descending: NDArray[Any], count: int) -> float:
    """A threshold that the first ``count`` are above and the others not: halfway, so that rounding decides nothing.

    Where all may leave, samples that are less sure than any seen still go on.
    """
    if count == 0:
        return 1.0
    if count == len(descending):
        return float(np.nextafter(descending[-1], 0.0))
    above, below = float(descending[count - 1]), float(descending[count])
    middle = (above + below) / 2
    return middle if below <= middle < above else below


def _same_lengths(confidence: NDArray[Any], right: NDArray[Any], costs: Sequence[float]) -> None:
    if confidence.shape != right.shape or len(costs) != len(confidence):
        raise DeploykitError(
            f"confidences {list(confidence.shape)}, answers {list(right.shape)} and costs [{len(costs)}] are not of "
            "the same exits and samples"
        )
