"""Codes and shared values of one layer for the least error of its output: GPTQ with a codebook.

With T ``[g, o, k]`` what is aimed at, H ``[g, k, k]`` the second moments of the input (positive definite), c the values
and Q the codes,

    tr (c_Q - T) H (c_Q - T)ᵀ  +  λ Σ r_Q

(van Baalen et al. 2024, "GPTVQ: The Blessing of Dimensionality for LLM Quantization", sections 3.2 and 3.3, for values
instead of vectors, and with a price of bits). Codes are chosen column by column, each making good what those before it
lost; then values, by least squares over all weights that share them, and codes in turn.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from deploykit.hub.fitting.columns import Choose, in_order, in_turn
from deploykit.hub.sharing.entropy import borders, cheapest, constrained, level, rates
from deploykit.hub.sharing.kmeans import cluster

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]
    Codes = NDArray[np.int64]

TURNS = 3
"""Of values and codes."""
STEPS = 12
"""Of conjugate gradients, for the values."""
WIDE = 200
"""Outputs from which on it is faster to look a code up between borders than to compare all values."""
ENOUGH = 1e-12
"""Of what the first of them has to make good."""


def in_bits(t: Floats, h: Floats, kept: NDArray[np.bool_], bits: int) -> Floats:
    """A weight with 2^bits values, zero among them if weights are, ``[g, o, k]``.

    Args:
        t: T.
        h: H.
        kept: where weights may be other than zero ``[g, o, k]``, somewhere at least.
        bits: of a code.
    """
    zeros = 0 if kept.all() else 1
    c = cluster(t[kept], 2**bits - zeros, "optimal", _curvature(t, h)[kept])
    c = np.concatenate([np.zeros(zeros), c[c != 0] if zeros else c])
    c, q = fitted(t, h, kept, c, np.zeros(len(c)))
    return c[q]


def at_level(t: Floats, h: Floats, kept: NDArray[np.bool_], bits: float, turns: int = TURNS) -> Floats:
    """A weight whose codes take about so many bits once they are coded (`deploykit.hub.sharing.entropy.level`)."""
    curvature = _curvature(t, h)[kept]
    lam = level(t[kept], curvature, bits)
    c, price = constrained(t[kept], curvature, lam, int((~kept).sum()))
    c, q = fitted(t, h, kept, c, price, lam, turns)
    return c[q]


def fitted(
    t: Floats,
    h: Floats,
    kept: NDArray[np.bool_],
    c: Floats,
    price: Floats,
    lam: float = 0.0,
    turns: int = TURNS,
) -> tuple[Floats, Codes]:
    """Values ``[k]`` and codes ``[g, o, k]``.

    Args:
        t: T.
        h: H.
        kept: where weights may be other than zero; ``c`` has a zero if that is not everywhere.
        c: values to begin with ``[k]``.
        price: λ r to begin with ``[k]``.
        lam: λ.
        turns: how often values and codes are fitted to each other; 0: codes are chosen once, for these values.
    """
    starts = in_order(t, h, _among(c, price, kept)), _nearest(t, h, kept, c, price)
    first, second = (_codes(x, c) for x in starts)
    better = _each(t, h, c, first, price) <= _each(t, h, c, second, price)
    q = np.where(better[:, :, None], first, second)
    for turn in range(turns):
        if turn:  # codes as GPTQ leaves them are worth improving first
            c = values(q, t, h, c)
        price = lam * rates(np.bincount(q.reshape(-1), minlength=len(c)))
        q = _codes(in_turn(c[q], t, h, _among(c, price, kept)), c)
    return c, q


def cost(t: Floats, h: Floats, c: Floats, q: Codes, lam: float) -> float:
    """What is minimised."""
    return float(_each(t, h, c, q, lam * rates(np.bincount(q.reshape(-1), minlength=len(c)))).sum())


def values(q: Codes, t: Floats, h: Floats, c: Floats) -> Floats:
    """The values that do best with given codes, by conjugate gradients from ``c``; a zero stays."""
    free = c != 0

    def summed(x: Floats) -> Floats:
        return np.asarray(np.bincount(q.reshape(-1), x.reshape(-1), len(c)) * free)

    scale = summed(_curvature(t, h))
    scale = np.where(scale > 0, scale, 1.0)
    r = summed((t - c[q]) @ h)
    p = z = r / scale
    rz = first = float(r @ z)
    for _ in range(STEPS):
        if rz <= ENOUGH * first:
            break
        hp = summed(p[q] @ h)
        step = rz / float(p @ hp)
        c, r = c + step * p, r - step * hp
        z, before = r / scale, rz
        rz = float(r @ z)
        p = z + rz / before * p
    return c


def _among(c: Floats, price: Floats, kept: NDArray[np.bool_]) -> Choose:
    """The values of the codebook, each at its price; zero where nothing else may be."""

    def choose(v: Floats, curvature: Floats, column: int) -> Floats:
        if v.shape[1] < WIDE:
            q = cheapest(v, curvature, c, price)
        else:
            q = np.empty(v.shape, np.int64)
            for group in range(len(v)):
                codes, between = borders(float(curvature[group, 0]), c, price)
                q[group] = codes[np.searchsorted(between, v[group])]
        return np.where(kept[:, :, column], c[q], 0.0)

    return choose


def _nearest(t: Floats, h: Floats, kept: NDArray[np.bool_], c: Floats, price: Floats) -> Floats:
    """Every weight by itself."""
    return np.where(kept, c[cheapest(t, _curvature(t, h), c, price)], 0.0)


def _each(t: Floats, h: Floats, c: Floats, q: Codes, price: Floats) -> Floats:
    """The cost of every output ``[g, o]``, with codes at a price."""
    e = c[q] - t
    return np.asarray(((e @ h) * e + price[q]).sum(2))


def _codes(x: Floats, c: Floats) -> Codes:
    """Of values that are in the codebook."""
    order = np.argsort(c)
    return np.asarray(order[np.searchsorted(c, x, sorter=order)])


def _curvature(t: Floats, h: Floats) -> Floats:
    """The diagonal of H for every weight ``[g, o, k]``."""
    return np.broadcast_to(np.diagonal(h, axis1=1, axis2=2)[:, None], t.shape)
