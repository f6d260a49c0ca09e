"""One streaming pass of a float graph over the calibration data.

Memory holds one sample's tensors and one histogram per tensor, whatever the number of samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from deploykit.calibration.growth import Growth
from deploykit.core.data import Batch, DataSet, Digest, evenly
from deploykit.core.errors import DeploykitError
from deploykit.core.progress import track
from deploykit.core.ranges import AVERAGED, Histogram, Ranges, Stats

if TYPE_CHECKING:
    from numpy.typing import NDArray

BINS = 2048


@dataclass(frozen=True)
class Extremes:
    """What one sample did to one tensor."""

    low: float
    high: float
    values: NDArray[Any] | None = None
    """The tensor itself, where a histogram is kept."""


@dataclass(frozen=True)
class Seen:
    """What one sample did to a graph."""

    extremes: Mapping[str, Extremes]
    means: Mapping[str, NDArray[Any]]
    """Per channel, over positions; empty where they were not asked for."""
    totals: Mapping[str, float]
    """Sums of what goes in and comes out: kernels that compare step over NaN, those that add do not."""


def observe(
    run: Callable[[Mapping[str, NDArray[Any]], bool], Seen],
    graph: str,
    data: DataSet,
    look: Callable[[Batch], None] = lambda batch: None,
) -> Ranges:
    """Runs the data through a float graph, one sample at a time, and keeps statistics of its tensors.

    Args:
        run: from inputs ``[1, ...]`` by name, and whether means are wanted (of `AVERAGED` samples), to what they did
            to the graph. Where it comes with values, `BINS`-bin histograms are kept too.
        graph: hash that identifies the graph in the result.
        data: inputs by name.
        look: sees every sample too, in order, so that nobody else has to make them again.

    Raises:
        DeploykitError: there is no data, or a tensor becomes NaN or infinite on it.
    """
    if len(data) == 0:
        raise DeploykitError(f"{data.origin}: no calibration samples")
    states: dict[str, _State] = {}
    sums: dict[str, NDArray[np.float64]] = {}
    digest, growth = Digest(), Growth(len(data))
    averaged = set(evenly(len(data), AVERAGED).tolist())
    for i, batch in enumerate(track(data.batches(1), "calibrating", total=len(data))):
        digest.add(batch)
        seen = run(batch.inputs, i in averaged)
        for name, total in seen.totals.items():
            if not math.isfinite(total):
                raise unfinite(name, data, i)
        for name, extremes in seen.extremes.items():
            if not math.isfinite(extremes.high - extremes.low):
                raise unfinite(name, data, i)
            states.setdefault(name, _State()).add(extremes)
        look(batch)
        growth.add(i, {name: (e.low, e.high) for name, e in seen.extremes.items()})
        for name, mean in seen.means.items():
            refuse_unfinite(mean, name, data, i)
            sums[name] = sums.get(name, 0.0) + mean.astype(np.float64)
    tensors = {name: replace(state.stats(), growth=growth.of(name)) for name, state in states.items()}
    means = {name: s / len(averaged) for name, s in sums.items()}
    return Ranges(graph, digest.result(), len(data), tensors, means, growth.parts, averaged=len(averaged))


def refuse_unfinite(numbers: NDArray[Any], name: str, data: DataSet, sample: int | None = None) -> None:
    """Raises DeploykitError where a tensor holds NaN or infinity; ``sample``: on which one."""
    if not np.isfinite(numbers).all():
        raise unfinite(name, data, sample)


def unfinite(name: str, data: DataSet, sample: int | None = None) -> DeploykitError:
    """What is said of a tensor that becomes NaN or infinite; ``sample``: on which one."""
    where = "" if sample is None else f" (sample {data.index[sample]})"
    return DeploykitError(f"{data.origin}: tensor '{name}' becomes NaN or infinite on the calibration data{where}")


class _State:
    """Running statistics of one tensor."""

    def __init__(self) -> None:
        self.low, self.high = np.inf, -np.inf
        self.sum_low, self.sum_high, self.samples = 0.0, 0.0, 0
        self.histogram: StreamingHistogram | None = None

    def add(self, seen: Extremes) -> None:
        low, high = seen.low, seen.high
        self.low, self.high = min(self.low, low), max(self.high, high)
        self.sum_low, self.sum_high, self.samples = self.sum_low + low, self.sum_high + high, self.samples + 1
        if seen.values is not None:
            self.histogram = self.histogram or StreamingHistogram(BINS)
            self.histogram.add(seen.values, low, high)

    def stats(self) -> Stats:
        histogram = None if self.histogram is None else Histogram(self.histogram.limit, self.histogram.counts)
        return Stats(self.low, self.high, self.sum_low / self.samples, self.sum_high / self.samples, histogram)


def channel_mean(array: NDArray[Any], axis: int) -> NDArray[Any]:
    """Mean per channel, over all other axes.

    Trailing axes are reduced first: numpy sums contiguous values pairwise, which is fast and exact enough in float32.
    """
    axis %= array.ndim
    flat = array.reshape(-1, array.shape[axis], int(np.prod(array.shape[axis + 1 :])))
    return np.asarray(flat.mean(axis=2).mean(axis=0))


class StreamingHistogram:
    """A histogram of ``[-limit, limit)`` with a fixed number of bins; the limit doubles when a value falls outside.

    Doubling adds neighbouring bins pairwise, so nothing is lost but resolution, and memory never grows.
    """

    def __init__(self, bins: int) -> None:
        """An empty histogram; ``bins`` must be a multiple of 4."""
        self.limit = 0.0
        self.counts = np.zeros(bins, np.int64)

    def add(self, array: NDArray[Any], low: float, high: float) -> None:
        """Counts the values of ``array``, whose smallest and largest are given."""
        reach = max(-low, high, 1e-12)
        if self.limit == 0.0:
            self.limit = float(2.0 ** np.ceil(np.log2(reach)))
        bins = len(self.counts)
        while self.limit <= reach:
            pairs = self.counts.reshape(-1, 2).sum(axis=1)
            self.counts = np.pad(pairs, bins // 4)
            self.limit *= 2.0
        index = (array.reshape(-1) * np.float32(bins / 2 / self.limit) + np.float32(bins / 2)).astype(np.int32)
        self.counts += np.bincount(np.clip(index, 0, bins - 1), minlength=bins)
