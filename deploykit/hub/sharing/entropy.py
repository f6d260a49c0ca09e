"""Shared values that are chosen for what their codes take once they are coded, not for how many they are.

Entropy-constrained scalar quantization: of all values c and codes q the least

    Σ h (x - c_q)²  +  λ Σ r_q  +  λ B |c|        r_q = -log2 p_q, the bits of a code that occurs with share p_q

with B bits for a value in the codebook (Chou, Lookabaugh & Gray 1989, "Entropy-constrained vector quantization"). At
one error it takes a tenth fewer bits than k-means, with more values: those far from zero are as fine as the others,
since they are rare. Where all errors count the same, clusters are runs of sorted values, and the best runs (of cells,
if there are many values) are found by dynamic programming, their number with them; iterations like Lloyd's then move
the borders, which lie nearer to the rarer value.

Zeros are a cluster of their own, around zero, which may take small values in.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from deploykit.hub.sharing.kmeans import cells

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

VALUE = 32.0
"""B."""
LEAST = 1e-6
"""Of the mean: what the error of a value counts at least, and of the range: distances, where λ is derived."""
ROUNDS = 30
SETTLED = 1e-5
"""Of the cost: a round that gains less is the last."""
NEVER = 64.0
"""Bits of a code that does not occur."""
AT_ONCE = 1 << 22
"""Costs that are compared in one piece."""


def level(x: Floats, h: Floats, bits: float) -> float:
    """λ at which codes take about so many bits.

    With steps Δ that are small against the density of x, codes take h(x) - log2 Δ bits, where h(x) is the differential
    entropy (estimated from the distances of sorted values, as Vasicek 1976 does, which a few large ones hardly move),
    and the error is Δ² / 12 times what it counts. λ is the slope of the one over the other. Where errors count
    differently, steps do, and their logarithms average.

    Args:
        x: values ``[n]``; n > 0.
        h: how much the errors of each count ``[n]``.
        bits: of a code.
    """
    ordered, n = np.sort(x), len(x)
    m = max(1, round(np.sqrt(n)))
    distance = ordered[np.minimum(np.arange(n) + m, n - 1)] - ordered[np.maximum(np.arange(n) - m, 0)]
    distance = np.maximum(distance, max(LEAST * float(np.ptp(x)), 1e-300))
    entropy = float(np.log2(distance * n / (2 * m)).mean())
    counted = np.exp(np.log(np.maximum(h, max(LEAST * float(h.mean()), 1e-300))).mean())
    return float(max(np.log(2) / 6 * counted * 4.0 ** (entropy - bits), 1e-300))


def rates(counts: NDArray[Any]) -> Floats:
    """r in bits, of codes that occur so often ``[k]``."""
    return np.asarray(np.where(counts > 0, -np.log2(np.maximum(counts, 1) / max(counts.sum(), 1)), NEVER))


def cheapest(v: Floats, h: Floats, c: Floats, price: Floats) -> NDArray[np.int64]:
    """The codes with the least h (v - c)² + price.

    Args:
        v: of any shape.
        h: against which it can be broadcast.
        c: values ``[k]``.
        price: of each, λ r ``[k]``.
    """
    found = np.empty(v.size, np.int64)
    flat, weight = v.reshape(-1), np.broadcast_to(h, v.shape).reshape(-1)
    step = max(1, AT_ONCE // len(c))
    for start in range(0, v.size, step):
        part = slice(start, start + step)
        cost = flat[part, None] - c
        cost *= cost
        cost *= weight[part, None]
        cost = cost + price
        found[part] = cost.argmin(1)
    return found.reshape(v.shape)


def borders(h: float, c: Floats, price: Floats) -> tuple[NDArray[np.int64], Floats]:
    """`cheapest` for one h: the codes that are cheapest somewhere, ascending, and the numbers between them.

    h (v - c)² + price are lines in v but for h v², which all have: the least of them is their lower envelope.

    Args:
        h: above 0.
        c: values ``[k]``.
        price: of each ``[k]``.
    """
    codes: list[int] = []
    between: list[float] = []
    for i in np.lexsort((price, c)).tolist():
        if codes and c[i] == c[codes[-1]]:
            continue  # that one is no dearer
        while codes:
            j = codes[-1]
            x = (h * (c[i] ** 2 - c[j] ** 2) + price[i] - price[j]) / (2 * h * (c[i] - c[j]))
            if not between or x > between[-1]:
                between.append(float(x))
                break
            codes.pop()
            between.pop()
        codes.append(i)
    return np.asarray(codes), np.asarray(between)


def constrained(x: Floats, h: Floats, lam: float, zeros: int = 0) -> tuple[Floats, Floats]:
    """The values, ascending, zero among them where there are zeros; and λ r of each.

    Args:
        x: ``[n]``, none of them zero; n > 0.
        h: how much each one's error counts ``[n]``, at least 0.
        lam: λ, above 0.
        zeros: further values, all of them zero.
    """
    values, at = np.unique(x, return_inverse=True)
    total = np.bincount(at, h, len(values)).astype(np.float64)
    total = total + 1e-12 * max(float(total.sum()), 1e-300) / len(values)  # what does not matter still is somewhere
    sums, (counts, _, _) = cells(values, total), cells(values, np.bincount(at).astype(np.float64))
    c, occurs = _best(sums, counts, lam, zeros)
    weight, moment, count = np.diff(sums[0]), np.diff(sums[1]), np.diff(counts)
    mean = moment / weight  # a cell is one value from here on
    price, before = lam * rates(occurs), np.inf
    for _ in range(ROUNDS):
        q = cheapest(mean, weight / count, c, price)
        occurs = np.bincount(q, count, len(c)) + zeros * (c == 0)
        price = lam * rates(occurs)
        s0, s1 = np.bincount(q, weight, len(c)), np.bincount(q, moment, len(c))
        free = (s0 > 0) & (c != 0)
        c = np.where(free, s1 / np.where(free, s0, 1.0), c)
        cost = float((weight * (mean - c[q]) ** 2).sum() + (occurs * price).sum())
        if before - cost <= SETTLED * abs(cost):
            break
        before = cost
    kept = np.flatnonzero((occurs > 0) | (c == 0))
    kept = kept[np.argsort(c[kept])]
    return c[kept], price[kept]


def _best(sums: tuple[Floats, Floats, Floats], counts: Floats, lam: float, zeros: int) -> tuple[Floats, Floats]:
    """Means of the best runs of cells, ascending, and how many values each has; with zeros, one run is around zero.

    Args:
        sums: of h, h x and h x² over the cells in front of each, and none behind the last ``[cells + 1]``.
        counts: how many values are in front of each ``[cells + 1]``.
        lam: λ.
        zeros: further values, all of them zero.
    """
    s0, s1, s2 = sums
    last, total = len(s0) - 1, counts[-1] + zeros

    def bits(count: Floats) -> Floats:
        return np.asarray(-count * np.log2(np.maximum(count, 1e-300) / total), np.float64)

    # least cost of the cells in front of j: no run around zero yet, and after it
    plain, behind = np.full(last + 1, np.inf), np.full(last + 1, np.inf)
    begins = np.zeros((2, last + 1), np.int64)
    around = np.zeros(last + 1, bool)
    plain[0] = 0.0
    behind[0] = lam * float(bits(np.asarray(float(zeros)))) if zeros else np.inf
    for j in range(1, last + 1):
        d0, d1, d2, count = (s[j] - s[:j] for s in (s0, s1, s2, counts))
        run = np.maximum(d2 - d1**2 / d0, 0.0) + lam * (bits(count) + VALUE)
        for found, number in ((plain, 0), (behind, 1)):
            cost = found[:j] + run
            begins[number, j] = i = int(cost.argmin())
            found[j] = cost[i]
        if zeros:
            cost = plain[:j] + d2 + lam * bits(count + zeros)
            i = int(cost.argmin())
            none = plain[j] + behind[0]  # zeros alone
            if min(cost[i], none) < behind[j]:
                around[j], begins[1, j], behind[j] = True, i if cost[i] < none else j, min(cost[i], none)
    runs: list[tuple[float, float]] = []
    j, number = last, 1 if zeros else 0
    while j > 0 or number:
        i = int(begins[number, j]) if j else 0
        count = float(counts[j] - counts[i])
        if number and (around[j] or j == 0):
            runs.append((0.0, count + zeros))
            number = 0
        else:
            runs.append((float((s1[j] - s1[i]) / (s0[j] - s0[i])), count))
        j = i
    c, occurs = np.asarray(sorted(runs)).T
    return c, occurs
