"""What an encoder with contexts looks for: levels of a codebook, neighbours that tell something, and coefficients by
least squares. A decoder needs none of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deploykit.coding.contexts import FINE, SHARE, Layer, Model, Seen

UNIT = 32
"""Level of the root mean square: the largest that a byte holds is four times that."""
FARTHEST = 100
"""Columns that neighbours in a matrix are sought within."""
TELLS = 0.05
"""Correlation from which on a neighbour in a matrix does .."""
ERRORS = 4
""".. if it is as many standard errors, too."""
NEIGHBOURS = 8
PASSES = 32
"""Of a matrix with many weights; there is too little to learn from in a quarter of that .."""
FEW = 1 << 14
""".. with fewer than these."""
SAMPLES = 1 << 18
"""Weights that are looked at."""
RIDGE = 1e-3
"""Of the average square, beside the squares of what is known."""


def levels(values: NDArray[Any], codes: NDArray[Any]) -> NDArray[np.int8]:
    """The codebook's values on a scale with a root mean square of 32.

    Args:
        values: finite ``[k]``.
        codes: of all weights.
    """
    counts = np.bincount(codes.reshape(-1), minlength=len(values))
    exact = values.astype(float)  # of the smallest float32, too
    return _bytes(UNIT * exact / (float(np.sqrt((counts * exact**2).sum() / counts.sum())) or 1.0))


def fits(kernel: int, layers: Sequence[Layer], codes: Sequence[NDArray[Any]]) -> list[Model]:
    """Models with the coefficients that expect best: one set of them for all passes, and for kernels one for each.

    Args:
        kernel: positions; 1: a matrix.
        layers: of the kind.
        codes: of each ``[rows, columns]``.
    """
    few = sum(own.size for own in codes) < FEW
    passes = kernel if kernel > 1 else PASSES // 4 if few else PASSES
    places = neighbours(kernel, layers, codes)
    nothing = np.zeros((1, len(places)), np.int8), np.zeros((1, len(places) + 4), np.int8)
    known = _walked(Model(kernel, passes, tuple(places), *nothing), layers, codes)
    together = [[own for number, own in enumerate(known) if number or passes == 1]]  # the first pass knows nothing
    every = [together, *([[[own] for own in known]] if kernel > 1 else [])]
    return [Model(kernel, passes, tuple(places), *_solved(sets)) for sets in every]


def neighbours(kernel: int, layers: Sequence[Layer], codes: Sequence[NDArray[Any]]) -> list[int]:
    """Distances of those that tell most of a weight. Of kernels these are the positions before it, of a matrix both
    sides, as far as they tell something at all."""
    farthest = kernel if kernel > 1 else min(FARTHEST, layers[0].columns // 2)
    own = [x.levels[c[: max(1, SAMPLES // x.columns)]].astype(np.float32) for x, c in zip(layers, codes, strict=True)]
    own += [np.abs(level) for level in own]
    own = [x - x.mean(0) - x.mean(1, keepdims=True) + x.mean() for x in own]  # of these, sums tell
    told = sorted(((_correlation(own, d), d) for d in range(1, farthest)), reverse=True)
    if kernel > 1:
        return [-d for _, d in told[:NEIGHBOURS]]
    least = max(TELLS, ERRORS / np.sqrt(sum(x.size for x in own) / 2))
    return [d for r, far in told[: NEIGHBOURS // 2] if r > least for d in (-far, far)]


def _correlation(centred: Sequence[NDArray[np.float32]], d: int) -> float:
    """Of what is so far from each other: the average of all, whatever their signs."""
    found = []
    for x in centred:
        found.append(abs(float((x[:, d:] * x[:, : x.shape[1] - d]).mean())) / (float((x * x).mean()) or 1.0))
    return sum(found) / len(found)


Known = tuple[NDArray[Any], NDArray[Any], NDArray[Any]]
"""Of some weights, levels and magnitudes around them and their own levels ``[.., n]``."""


def _walked(model: Model, layers: Sequence[Layer], codes: Sequence[NDArray[Any]]) -> list[Known]:
    """What is known in each pass of some of its weights."""
    seen, every = Seen(model, layers), np.concatenate([own.reshape(-1) for own in codes]).astype(np.int64)
    step, found = max(1, len(every) // SAMPLES), list[Known]()
    for number in range(model.passes):
        told = seen.ask(number)
        some = told.at.every(step)
        level = seen.levels[some.layer, every[some.place]]
        around, spread = seen.around(some)
        found.append((around.astype(float), spread.astype(float), level.astype(float)))
        seen.learn(told, every[told.at.place])
    return found


def _solved(sets: Sequence[Sequence[Known]]) -> tuple[NDArray[np.int8], NDArray[np.int8]]:
    """Coefficients of each set: of μ by the levels, then of σ by what μ misses them by."""
    mean, sigma = [], []
    for parts in sets:
        around, spread, level = (np.concatenate(own, -1) for own in zip(*parts, strict=True))
        mean.append(_least_squares(around, level))
        sigma.append(_least_squares(spread / FINE, np.abs(level - mean[-1] @ around / SHARE)))
    return np.stack(mean), np.stack(sigma)


def _least_squares(told: NDArray[Any], wanted: NDArray[Any]) -> NDArray[np.int8]:
    """Coefficients in 32nds ``[n]``, of what is told ``[n, samples]``."""
    gram = told @ told.T + RIDGE * UNIT**2 * len(wanted) * np.eye(len(told))
    return _bytes(SHARE * np.linalg.solve(gram, told @ wanted))


def _bytes(own: NDArray[Any]) -> NDArray[np.int8]:
    return np.clip(np.round(own), -127, 127).astype(np.int8)
