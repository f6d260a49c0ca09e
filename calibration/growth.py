"""Are these samples enough? How ranges grow with the number of samples, from the one pass over all of them.

Parts of the data grow by doubling, each within the next: 8, 16, 32, … and all samples. They are drawn at random,
because folders are sorted by class. Running extremes of each part cost one comparison per tensor, sample and part.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from deploykit.core.ranges import Ranges

if TYPE_CHECKING:
    from numpy.typing import NDArray

FIRST = 8
SETTLED = 0.02
"""Share of a range: scales that move by less are as good as still, 0.17 dB of rounding noise."""


def parts(samples: int) -> tuple[int, ...]:
    """``8, 16, 32, …`` below the number of samples, and that number."""
    doubling = [FIRST << k for k in range(max(samples, 1).bit_length()) if FIRST << k < samples]
    return (*doubling, samples)


def drawn(samples: int) -> NDArray[np.int64]:
    """Positions in random order, always the same: the first m of them are the part of m samples."""
    return np.random.default_rng(0).permutation(samples)


class Growth:
    """Running extremes of some tensors on every part.

    Args:
        samples: how many there will be.
    """

    def __init__(self, samples: int) -> None:
        """Nothing seen yet."""
        self.parts = parts(samples)
        self._rank = np.argsort(drawn(samples))
        self._names: dict[str, int] = {}
        self._low = self._high = np.empty((0, len(self.parts)))

    def add(self, sample: int, extremes: Mapping[str, tuple[float, float]]) -> None:
        """What the sample at a position of the data did: (low, high) of the same tensors every time."""
        if not self._names:
            self._names = {name: i for i, name in enumerate(extremes)}
            self._low = np.full((len(extremes), len(self.parts)), np.inf)
            self._high = -self._low
        low, high = np.asarray([extremes[name] for name in self._names], np.float64).reshape(-1, 2).T
        first = int(np.searchsorted(self.parts, self._rank[sample], side="right"))  # parts that it belongs to
        self._low[:, first:] = np.minimum(self._low[:, first:], low[:, None])
        self._high[:, first:] = np.maximum(self._high[:, first:], high[:, None])

    def of(self, name: str) -> tuple[tuple[float, float], ...]:
        """(low, high) of a tensor on every part."""
        row = self._names[name]
        return tuple((float(a), float(b)) for a, b in zip(self._low[row], self._high[row], strict=True))


@dataclass(frozen=True)
class Convergence:
    """How the ranges of a network's tensors settle."""

    parts: tuple[int, ...]
    missing: Mapping[str, tuple[float, ...]]
    """By tensor: what its range still lacks on each part of that on all samples, 0..1. The last is 0."""

    @property
    def largest(self) -> tuple[float, ...]:
        """Of any tensor, by part."""
        return tuple(max(column) for column in zip(*self.missing.values(), strict=True))

    @property
    def median(self) -> tuple[float, ...]:
        """Over tensors, by part."""
        return tuple(float(np.median(column)) for column in zip(*self.missing.values(), strict=True))

    @property
    def half(self) -> int | None:
        """The largest part of at most half the samples; None: there are too few to tell anything."""
        return max((p for p in self.parts if 2 * p <= self.parts[-1]), default=None)

    @property
    def enough(self) -> int | None:
        """The smallest part, at most half of the samples, from which on no range moves; None: there is none."""
        fine = (p for p, lack in zip(self.parts, self.largest, strict=True) if lack <= SETTLED)
        return next((p for p in fine if self.half is not None and p <= self.half), None)

    def sentence(self) -> str:
        """The answer, for people; empty where there are too few samples to tell."""
        if self.half is None:
            return ""
        if self.enough is not None:
            return f"enough samples: from {self.enough} on no range moves by more than {100 * SETTLED:.0f} %"
        at = self.parts.index(self.half)
        growing = {name: lack[at] for name, lack in self.missing.items() if lack[at] > SETTLED}
        worst = max(growing, key=lambda name: growing[name])
        return (
            f"ranges still grow: between {self.half} and {self.parts[-1]} samples {len(growing)} of "
            f"{len(self.missing)} widened by more than {100 * SETTLED:.0f} %, that of '{worst}' the most, "
            f"by {100 * growing[worst]:.0f} % of it"
        )


def convergence(ranges: Ranges) -> Convergence | None:
    """How ranges settled; None: the ranges do not tell (older files), or no tensor has any values but zero."""
    found = {}
    for name, stats in ranges.tensors.items():
        width = np.asarray([max(high, 0.0) - min(low, 0.0) for low, high in stats.growth])  # with zero, as a scale has
        if len(width) and width[-1] > 0:
            found[name] = tuple(float(lack) for lack in 1.0 - width / width[-1])
    return Convergence(ranges.parts, found) if found else None
