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
"""Weights of a layer that are looked at."""
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


def start(kernel: int, layers: Sequence[Layer], codes: Sequence[NDArray[Any]], shared: bool) -> Model:
    """A model that knows where to look, without coefficients.

    Args:
        kernel: positions; 1: a matrix.
        layers: of the kind.
        codes: of each.
        shared: one set of coefficients for all passes.
    """
    if kernel > 1:
        passes, near = kernel, [[-d] for d in range(1, kernel)]
    else:
        passes = PASSES if sum(own.size for own in codes) >= FEW else PASSES // 4
        near = [[-d, d] for d in range(1, min(FARTHEST, layers[0].columns // 2))]
    own = [x.levels[c[: max(1, SAMPLES // x.columns)]].astype(np.float32) for x, c in zip(layers, codes, strict=True)]
    own += [np.abs(level) for level in own]
    own = [x - x.mean(0) - x.mean(1, keepdims=True) + x.mean() for x in own]  # of these, sums tell
    told = sorted(((_correlation(own, pair[-1]), pair) for pair in near), reverse=True)
    least = max(TELLS, ERRORS / np.sqrt(sum(x.size for x in own) / 2))
    distances = [d for r, pair in told if kernel > 1 or r > least for d in pair][:NEIGHBOURS]
    sets = 1 if shared or kernel == 1 else passes
    shape = sets, len(distances)
    return Model(kernel, passes, tuple(distances), np.zeros(shape, np.int8), np.zeros((sets, shape[1] + 4), np.int8))


def _correlation(centred: Sequence[NDArray[np.float32]], distance: int) -> float:
    """Of what is so far from each other: the average of all, whatever their signs."""
    d, found = abs(distance), []
    for x in centred:
        found.append(abs(float((x[:, d:] * x[:, : x.shape[1] - d]).mean())) / (float((x * x).mean()) or 1.0))
    return sum(found) / len(found)


def fit(model: Model, layers: Sequence[Layer], codes: Sequence[NDArray[Any]]) -> Model:
    """The model with the coefficients that expect best: μ of the levels, then σ of what μ misses them by."""
    sets = len(model.mean)
    seen, every = Seen(model, layers), np.concatenate([own.reshape(-1) for own in codes]).astype(np.int64)
    known: list[list[tuple[NDArray[Any], NDArray[Any], NDArray[Any]]]] = [[] for _ in range(sets)]
    step = max(1, len(every) // (SAMPLES * len(layers)))
    for number in range(model.passes):
        told = seen.ask(number)
        own = every[told.at.place]
        if sets > 1 or number or model.passes == 1:  # the first pass knows nothing
            around, spread = seen.around(told.at)
            level = seen.levels[told.at.layer, own]
            known[number % sets].append((around[:, ::step], spread[:, ::step], level[::step]))
        seen.learn(told, own)
    mean, sigma = [], []
    for parts in known:
        around, spread, level = (np.concatenate(own, -1).astype(float) for own in zip(*parts, strict=True))
        mean.append(_least_squares(around, level))
        missed = np.abs(level - mean[-1] @ around / SHARE)
        sigma.append(_least_squares(spread / FINE, missed))
    return Model(model.kernel, model.passes, model.distances, np.stack(mean), np.stack(sigma))


def _least_squares(told: NDArray[Any], wanted: NDArray[Any]) -> NDArray[np.int8]:
    """Coefficients in 32nds ``[n]``, of what is told ``[n, samples]``."""
    gram = told @ told.T + RIDGE * UNIT**2 * len(wanted) * np.eye(len(told))
    return _bytes(SHARE * np.linalg.solve(gram, told @ wanted))


def _bytes(own: NDArray[Any]) -> NDArray[np.int8]:
    return np.clip(np.round(own), -127, 127).astype(np.int8)
