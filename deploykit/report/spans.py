"""What values each tensor took on the calibration data: its range, its histogram if one was kept, and what is cut."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from deploykit import targets
from deploykit.calibration.thresholds import METHODS, threshold
from deploykit.core.manifest import Manifest
from deploykit.core.ranges import Ranges, Stats
from deploykit.core.target import QuantSpec
from deploykit.hub.operators import ROLES

if TYPE_CHECKING:
    from numpy.typing import NDArray

MOST = 24
"""Tensors shown."""
BINS = 64
WIDTH, HEIGHT = 240.0, 22.0


@dataclass(frozen=True)
class Span:
    """One tensor. Positions are fractions of the way from ``left`` to ``right``, its range with zero in it."""

    name: str
    low: float
    high: float
    zero: float
    average: tuple[float, float]
    """Where single samples end on average."""
    stretch: float
    """The range over the average sample's: 1, or more where few samples reach its ends."""
    outline: str
    """SVG path of the histogram, its height the logarithm of the count; empty: no histogram was kept."""
    cut: tuple[float, float] | None
    """The range that the threshold method chooses for this tensor alone; None: not known, or all of it."""


def spans(ranges: Ranges, manifest: Manifest) -> tuple[Span, ...]:
    """The tensors in the network's order; those that were only moved or reshaped from another are left out.

    Where there are more than `MOST`, those with the greatest stretch are chosen.
    """
    spec = _spec(manifest.target)
    whole = {o.name for o in manifest.outputs}  # what the network answers is never cut
    found = computed(ranges, manifest)
    kept = set(sorted(found, key=lambda name: -stretch(found[name]))[:MOST])
    return tuple(
        _span(name, s, manifest.thresholds, None if name in whole else spec)
        for name, s in found.items()
        if name in kept
    )


def stretch(stats: Stats) -> float:
    """Length of the whole range over that of the average sample's, both with zero in them."""
    whole = max(stats.high, 0.0) - min(stats.low, 0.0)
    average = max(stats.average_high, 0.0) - min(stats.average_low, 0.0)
    return whole / average if average > 0 else 1.0


def computed(ranges: Ranges, manifest: Manifest) -> dict[str, Stats]:
    """Without tensors that an operator only moved, which have the name of that layer, and without constants."""
    moved = {layer.name for layer in manifest.layers if ROLES.get(layer.operator) == "moves"}
    return {name: s for name, s in ranges.tensors.items() if name not in moved and s.high > s.low}


def _spec(target: str) -> QuantSpec | None:
    """How the target stores numbers; None for a profile of the user's, which is not here any more."""
    return targets.load(target).quant if target in targets.names() else None


def _span(name: str, s: Stats, method: str, spec: QuantSpec | None) -> Span:
    left, right = min(s.low, 0.0), max(s.high, 0.0)

    def place(value: float) -> float:
        return (min(max(value, left), right) - left) / (right - left)

    cut = None
    if spec is not None and method in METHODS and (method == "moving_average" or s.histogram is not None):
        bottom, top = spec.activation_range
        low, high = threshold(s, method, top - bottom, spec.activation_symmetric)
        cut = place(low), place(high)
        cut = None if cut[0] <= 0.0 and cut[1] >= 1.0 else cut
    outline = "" if s.histogram is None else _outline(s.histogram.counts, s.histogram.limit, left, right)
    average = place(s.average_low), place(s.average_high)
    return Span(name, s.low, s.high, place(0.0), average, stretch(s), outline, cut)


def _outline(counts: NDArray[np.int64], limit: float, left: float, right: float) -> str:
    """The counts over ``[left, right]`` in `BINS` bins, as an area on the line y = `HEIGHT`."""
    edges = np.linspace(-limit, limit, len(counts) + 1)
    cumulative = np.concatenate([[0.0], np.cumsum(counts)])
    merged = np.diff(np.interp(np.linspace(left, right, BINS + 1), edges, cumulative))
    heights = np.log1p(merged) / max(np.log1p(merged.max()), 1e-9)
    x, y = np.arange(BINS) * WIDTH / BINS, HEIGHT - heights * (HEIGHT - 2)
    steps = "".join(f"V{b:.1f}H{a + WIDTH / BINS:.1f}" for a, b in zip(x, y, strict=True))
    return f"M0 {HEIGHT:.0f}{steps}V{HEIGHT:.0f}Z"
