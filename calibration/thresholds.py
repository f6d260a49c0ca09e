"""Ranges from raw statistics: which part of the values the integers shall cover.

Each method takes the statistics of one tensor and the number of integer steps, and returns (low, high).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from deploykit.core.errors import DeploykitError, unknown
from deploykit.core.ranges import Histogram, Stats

if TYPE_CHECKING:
    from numpy.typing import NDArray

PERCENTILE = 99.99
"""Share of the values (in percent) that the percentile method covers on each side."""


def threshold(stats: Stats, method: str, steps: int, symmetric: bool) -> tuple[float, float]:
    """The range to be represented, as (low, high).

    Args:
        stats: raw statistics of one tensor.
        method: a key of `METHODS`.
        steps: number of integer steps between low and high, e.g. 255.
        symmetric: whether the range will be made symmetric around zero.

    Raises:
        DeploykitError: unknown method, or it needs histograms that were not collected.
    """
    if method not in METHODS:
        raise unknown("threshold method", method, METHODS)
    return METHODS[method](stats, steps, symmetric)


def minmax(stats: Stats, steps: int, symmetric: bool) -> tuple[float, float]:
    """All of it."""
    return stats.low, stats.high


def moving_average(stats: Stats, steps: int, symmetric: bool) -> tuple[float, float]:
    """Mean of the samples' extremes: one unusual sample does not set the range."""
    return stats.average_low, stats.average_high


def percentile(stats: Stats, steps: int, symmetric: bool) -> tuple[float, float]:
    """Cuts the outermost 0.01 % of the values on each side."""
    x, p = _distribution(stats)
    cumulative = np.cumsum(p)
    tail = 1.0 - PERCENTILE / 100.0
    low = float(x[int(np.searchsorted(cumulative, tail))])
    high = float(x[min(int(np.searchsorted(cumulative, 1.0 - tail)), len(x) - 1)])
    return max(stats.low, min(low, 0.0)), min(stats.high, max(high, 0.0))


def mse(stats: Stats, steps: int, symmetric: bool) -> tuple[float, float]:
    """The shrunken range with the least expected squared error.

    What lies inside is rounded (scale^2 / 12 on average), what lies outside is cut (its squared distance).
    """
    x, p = _distribution(stats)

    def error(low: float, high: float) -> float:
        scale = (high - low) / steps
        beyond = np.maximum(x - high, 0.0) + np.maximum(low - x, 0.0)
        return scale**2 / 12 * float(p @ (beyond == 0)) + float(p @ beyond**2)

    return _best_shrunken(stats, symmetric, error)


def entropy(stats: Stats, steps: int, symmetric: bool) -> tuple[float, float]:
    """The shrunken range whose quantized distribution has the least Kullback-Leibler divergence.

    Migacz, "8-bit inference with TensorRT" (GTC 2017): the clipped distribution P (outliers added to its end bins)
    is compared with Q, P merged into ``steps`` levels and spread again over the bins that were not empty. Zero has a
    level of its own and is exact, so the peak that a ReLU leaves there says nothing about the others: the two bins
    beside it are lowered to their neighbours.
    """
    x, p = _distribution(stats)
    middle = len(p) // 2
    p = p.copy()
    p[middle - 1], p[middle] = min(p[middle - 1], p[middle - 2]), min(p[middle], p[middle + 1])
    p /= max(p.sum(), 1e-300)

    def divergence(low: float, high: float) -> float:
        inside = (x >= low) & (x <= high)
        if not p[inside].any():
            return np.inf
        clipped = p[inside].copy()
        clipped[0] += p[x < low].sum()
        clipped[-1] += p[x > high].sum()
        level = np.floor((x[inside] - low) / (high - low) * (steps + 1)).astype(int)
        occupied = p[inside] > 0
        mass = np.bincount(level, weights=p[inside])
        share = np.bincount(level, weights=occupied)
        spread = np.where(occupied, mass[level] / np.maximum(share[level], 1), 0.0)
        spread /= spread.sum()
        both = (clipped > 0) & (spread > 0)
        lost = clipped[(clipped > 0) & (spread == 0)].sum()
        return float((clipped[both] * np.log(clipped[both] / spread[both])).sum() + lost * np.log(1e9))

    return _best_shrunken(stats, symmetric, divergence)


METHODS: dict[str, Callable[[Stats, int, bool], tuple[float, float]]] = {
    "minmax": minmax,
    "moving_average": moving_average,
    "percentile": percentile,
    "mse": mse,
    "entropy": entropy,
}
NEED_HISTOGRAM = frozenset({"percentile", "mse", "entropy"})


def _best_shrunken(stats: Stats, symmetric: bool, cost: Callable[[float, float], float]) -> tuple[float, float]:
    low, high = min(stats.low, 0.0), max(stats.high, 0.0)
    if symmetric:
        low, high = -max(-low, high), max(-low, high)
    if high - low <= 0:
        return low, high
    factors = np.linspace(1.0, 0.2, 81)
    costs = [cost(low * f, high * f) for f in factors]
    best = float(factors[int(np.argmin(costs))])
    return low * best, high * best


def _distribution(stats: Stats) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Bin centres and probabilities of the histogram."""
    histogram: Histogram | None = stats.histogram
    if histogram is None:
        raise DeploykitError("these ranges have no histograms; calibrate with the threshold method you want")
    bins = len(histogram.counts)
    x: NDArray[np.float64] = (np.arange(bins, dtype=np.float64) + 0.5 - bins / 2) * (2 * histogram.limit / bins)
    return x, histogram.counts / max(histogram.counts.sum(), 1)
