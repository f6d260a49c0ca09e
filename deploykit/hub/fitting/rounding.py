"""Integer weights of one layer for the least error of its output, given the second moments of its input.

Everything is for matrices side by side: W, Q ``[g, o, k]``, s ``[g, o]``, H ``[g, k, k]`` (positive definite), all
float64. The error of a rounding is tr (sQ - W) H (sQ - W)ᵀ. `to_nearest` and `gptq` are whole roundings, as
`deploykit.hub.fitting.refit` takes them; the rest are their parts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from deploykit.core.target import QuantSpec
from deploykit.hub.fitting.columns import Choose, in_order, in_turn

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Matrices = NDArray[np.float64]

REFITS = 2
SCALES = 1.0, 1.15, 0.87, 0.75, 0.65
"""Scales that columns are rounded with, as shares of the one that is best for plain rounding."""
SHRINK = np.linspace(1.0, 0.4, 13).tolist()
"""Scales that are tried, as shares of the one that cuts no weight."""


def to_nearest(w: Matrices, h: Matrices, least: Matrices, spec: QuantSpec) -> tuple[Matrices, Matrices]:
    """Each weight by itself, nothing cut.

    Args:
        w: what is rounded.
        h: of the inputs; not looked at.
        least: smallest scales allowed ``[g, o]``.
        spec: bits, granularity and kind of scale.
    """
    s = storable(widest(w, least, spec), spec)
    return nearest(w, s, spec.weight_max), s


def gptq(w: Matrices, h: Matrices, least: Matrices, spec: QuantSpec) -> tuple[Matrices, Matrices]:
    """Columns in order, then single integers, then scales and integers in turn.

    Args:
        w: what is rounded.
        h: of the inputs.
        least: smallest scales allowed ``[g, o]``.
        spec: bits, granularity and kind of scale.
    """
    top, plain = spec.weight_max, searched_scale(w, h, least, spec)
    tries = []
    for share in SCALES:
        s = storable(np.maximum(plain * share, least), spec)
        q = _better(column_by_column(w, s, h, top), s, nearest(w, s, top), s, w, h)[0]
        tries.append(polished(q, s, w, h, least, spec))
    if spec.weight_granularity == "tensor":
        return min(tries, key=lambda tried: float(error(tried[0], tried[1], w, h).sum()))
    best, best_s = tries[0]
    for q, s in tries[1:]:
        best, best_s = _better(best, best_s, q, s, w, h)
    return best, best_s


def polished(
    q: Matrices, s: Matrices, w: Matrices, h: Matrices, least: Matrices, spec: QuantSpec
) -> tuple[Matrices, Matrices]:
    """A rounding and its scales after coordinate descent, and after fitting scales to integers and back."""
    top = spec.weight_max
    q = descend(q, w, s, h, top)
    for _ in range(REFITS):
        other = storable(np.maximum(fitted_scale(q, w, h, s, spec), least), spec)
        tried = descend(q, w, other, h, top)
        if spec.weight_granularity == "channel":
            q, s = _better(q, s, tried, other, w, h)
        elif error(tried, other, w, h).sum() < error(q, s, w, h).sum():
            q, s = tried, other
    return q, s


def _better(
    q: Matrices, s: Matrices, tried: Matrices, other: Matrices, w: Matrices, h: Matrices
) -> tuple[Matrices, Matrices]:
    """Per output those of two roundings, with their scales, that lose less."""
    gains = error(tried, other, w, h) < error(q, s, w, h)
    return np.where(gains[:, :, None], tried, q), np.where(gains, other, s)


def nearest(w: Matrices, s: Matrices, top: int) -> Matrices:
    """Integers nearest to W / s."""
    return np.clip(np.rint(w / s[:, :, None]), -top, top)


def error(q: Matrices, s: Matrices, w: Matrices, h: Matrices) -> Matrices:
    """(sQ - W) H (sQ - W)ᵀ per output ``[g, o]``."""
    e = q * s[:, :, None] - w
    return np.asarray(((e @ h) * e).sum(2))


def widest(w: Matrices, least: Matrices, spec: QuantSpec) -> Matrices:
    """The scale that cuts no weight: per output, or one for all."""
    s = np.maximum(np.abs(w).max(2) / spec.weight_max, least)
    return np.full_like(s, s.max()) if spec.weight_granularity == "tensor" else s


def storable(s: Matrices, spec: QuantSpec) -> Matrices:
    """The scale as a float32 (or the power of two above it), so that what is rounded to it is what is stored."""
    return 2.0 ** np.ceil(np.log2(s)) if spec.scale == "power_of_two" else s.astype(np.float32).astype(np.float64)


def searched_scale(w: Matrices, h: Matrices, least: Matrices, spec: QuantSpec) -> Matrices:
    """Of scales up to the widest the one whose plain rounding has the least error."""
    whole = widest(w, least, spec)
    best, cost = whole, np.full_like(whole, np.inf)
    for share in SHRINK:
        s = storable(np.maximum(whole * share, least), spec)
        found = error(nearest(w, s, spec.weight_max), s, w, h)
        if spec.weight_granularity == "tensor":
            found = np.full_like(found, found.sum())
        best, cost = np.where(found < cost, s, best), np.minimum(found, cost)
    return best


def fitted_scale(q: Matrices, w: Matrices, h: Matrices, s: Matrices, spec: QuantSpec) -> Matrices:
    """The best scale for given integers; the old one where there is none above 0."""
    qh = q @ h
    up, down = (qh * w).sum(2), (qh * q).sum(2)
    if spec.weight_granularity == "tensor":
        up, down = np.full_like(up, up.sum()), np.full_like(down, down.sum())
    best = up / np.maximum(down, 1e-300)
    return np.where(best > 0, best, s)


def column_by_column(w: Matrices, s: Matrices, h: Matrices, top: int) -> Matrices:
    """Integers by GPTQ (`deploykit.hub.fitting.columns`)."""
    return np.asarray(np.rint(in_order(w, h, _grid(s, top)) / s[:, :, None]))


def descend(q: Matrices, w: Matrices, s: Matrices, h: Matrices, top: int) -> Matrices:
    """Every integer in turn to its best value given the others, until none changes."""
    return np.asarray(np.rint(in_turn(q * s[:, :, None], w, h, _grid(s, top)) / s[:, :, None]))


def _grid(s: Matrices, top: int) -> Choose:
    """Multiples of the scales."""
    return lambda v, curvature, column: np.clip(np.rint(v / s), -top, top) * s
