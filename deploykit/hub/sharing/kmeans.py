"""k-means in one dimension: k values c that stand for many, with the least sum of h (x - c)².

Lloyd's iteration (Lloyd 1982, "Least squares quantization in PCM") finds an optimum near its start: Han et al. 2016
("Deep Compression", section 3.2) start evenly between the smallest and the largest value, evenly among the values
sorted, or from values drawn at random. On a line the best of all clusterings can be found: clusters are runs of sorted
values, so with D_k(j) the least error of the first j values in k clusters,

    D_k(j)  =  min_i  D_{k-1}(i) + e(i, j),          e(i, j) = the error of the values i .. j around their mean,

by dynamic programming (Wang & Song 2011, "Ckmeans.1d.dp"). The best i does not fall as j grows, so that halving the j's
leaves O(n log n) candidates for every k (Grønlund et al. 2017, "Fast exact k-means, k-medians and Bregman divergence
clustering in 1D", section 2). All k up to the largest come with it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

Start = Literal["optimal", "linear", "density", "random"]
CELLS = 2048
"""That values fall into: for dynamic programming those in one are one, and Lloyd's iteration tells them apart
afterwards."""
ROUNDS = 100
"""Of Lloyd's iteration, at most."""
SETTLED = 1e-6
"""Of the error: a round that gains less is the last."""


def cluster(x: Floats, k: int, start: Start = "optimal", h: Floats | None = None, seed: int = 0) -> Floats:
    """The k values, or fewer where there are fewer different ones, ascending.

    Args:
        x: ``[n]``, in any order; n > 0.
        k: clusters, at least 1.
        start: where Lloyd's iteration begins.
        h: how much each value's error counts ``[n]``, at least 0; None: all the same.
        seed: of ``random``.
    """
    values, at = np.unique(x, return_inverse=True)
    weight = np.bincount(at, None if h is None else h, len(values)).astype(np.float64)
    weight += 1e-12 * max(float(weight.sum()), 1e-300) / len(values)  # what does not matter still is somewhere
    if len(values) <= k:
        return values
    if start == "optimal":
        first = optimal(values, weight, k)
    elif start == "linear":
        first = np.linspace(values[0], values[-1], k)
    elif start == "density":
        first = np.interp((np.arange(k) + 0.5) / k, (np.cumsum(weight) - weight / 2) / weight.sum(), values)
    else:
        first = np.sort(np.random.default_rng(seed).choice(values, k, replace=False))
    return lloyd(values, weight, first)


def lloyd(x: Floats, h: Floats, start: Floats) -> Floats:
    """Means of what is nearest to each centre, again and again; a centre that nothing is near to stays.

    Args:
        x: ascending ``[n]``.
        h: their weights ``[n]``, above 0.
        start: ascending ``[k]``.
    """
    c, before = start.astype(np.float64), np.inf
    sums = [np.concatenate([[0.0], np.cumsum(h * x**p)]) for p in range(3)]
    for _ in range(ROUNDS):
        ends = np.concatenate([[0], np.searchsorted(x, (c[1:] + c[:-1]) / 2), [len(x)]])
        s0, s1, s2 = (np.diff(s[ends]) for s in sums)
        c = np.sort(np.where(s0 > 0, s1 / np.where(s0 > 0, s0, 1.0), c))
        error = float((s2 - np.where(s0 > 0, s1**2 / np.where(s0 > 0, s0, 1.0), 0.0)).sum())
        if before - error <= SETTLED * max(error, 0.0):
            break
        before = error
    return c


def nearest(x: NDArray[np.floating], c: Floats) -> NDArray[np.int64]:
    """Which of the ascending centres ``[k]`` is nearest to each value."""
    return np.searchsorted((c[1:] + c[:-1]) / 2, x)


def optimal(x: Floats, h: Floats, k: int) -> Floats:
    """The means of the k clusters with the least error, by dynamic programming on cells of x.

    Args:
        x: ascending, all different ``[n]``.
        h: their weights ``[n]``, above 0.
        k: fewer than n.
    """
    sums = cells(x, h)
    n = len(sums[0]) - 1
    k = min(k, n)
    ends = [np.arange(n + 1)]  # by k, by j: where the last cluster begins
    least = np.concatenate([[0.0], _error(sums, np.zeros(n, np.int64), np.arange(1, n + 1))])
    for _ in range(1, k):
        least, begins = _row(least, sums)
        ends.append(begins)
    edges = [n]
    for begins in reversed(ends[1:]):
        edges.append(int(begins[edges[-1]]))
    edges = sorted({0, *edges})
    return np.diff(sums[1][edges]) / np.diff(sums[0][edges])


def cells(x: Floats, h: Floats) -> tuple[Floats, Floats, Floats]:
    """Sums of h, h x, h x² over the cells in front of each."""
    cell = np.arange(len(x))
    if len(x) > CELLS:  # half of the cells equally wide, half with equally many values: outliers make wide ones useless
        wide = np.linspace(x[0], x[-1], CELLS // 2 + 1)[1:-1]
        full = x[np.arange(1, CELLS // 2) * len(x) // (CELLS // 2)]
        cell = np.searchsorted(np.union1d(wide, full), x, side="right")
        cell = np.cumsum(np.diff(cell, prepend=cell[0]) > 0)
    found = [np.concatenate([[0.0], np.cumsum(np.bincount(cell, h * x**p))]) for p in range(3)]
    return found[0], found[1], found[2]


def _error(sums: tuple[Floats, Floats, Floats], i: NDArray[np.int64], j: NDArray[np.int64]) -> Floats:
    """e(i, j) of the cells i .. j - 1."""
    s0, s1, s2 = (s[j] - s[i] for s in sums)
    return np.maximum(s2 - s1**2 / s0, 0.0)


def _row(before: Floats, sums: tuple[Floats, Floats, Floats]) -> tuple[Floats, NDArray[np.int64]]:
    """D_k and where the last cluster begins, from D_{k-1}: the middle j of every run first, which halves the others'
    candidates."""
    n = len(before) - 1
    least, begins = np.full(n + 1, np.inf), np.zeros(n + 1, np.int64)
    low, high = np.array([1]), np.array([n])  # runs of j that are open
    first, last = np.array([0]), np.array([n - 1])  # and of their candidates
    while len(low):
        j = (low + high) // 2
        until = np.minimum(last, j - 1)
        many = until - first + 1
        offset = np.cumsum(many) - many
        i = np.arange(int(many.sum())) + np.repeat(first - offset, many)
        found = before[i] + _error(sums, i, np.repeat(j, many))
        smallest = np.minimum.reduceat(found, offset)
        at = np.flatnonzero(found == np.repeat(smallest, many))
        best = i[at[np.searchsorted(at, offset)]]
        least[j], begins[j] = smallest, best
        sides = np.concatenate([low, j + 1]), np.concatenate([j - 1, high])
        first, last = np.concatenate([first, best]), np.concatenate([best, last])
        open_ = sides[0] <= sides[1]
        low, high, first, last = sides[0][open_], sides[1][open_], first[open_], last[open_]
    return least, begins
