"""Weights that may have some values only, set column by column for the least error of their layer's output.

Matrices stand side by side: W and X ``[g, o, k]``, H ``[g, k, k]`` (positive definite), float64. The error of X is
tr (X - W) H (X - W)ᵀ. Which values there are is the business of who asks: multiples of a scale, or a codebook.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Matrices = NDArray[np.float64]

Choose = Callable[["Matrices", "Matrices", int], "Matrices"]
"""(what a column should be ``[g, o]``, what the square of a difference costs ``[g, 1]``, which column) -> the values it
gets ``[g, o]``."""
BLOCK = 64
"""Columns whose effect on the others waits until the block is done: the same numbers, as one product of matrices."""
SWEEPS = 6


def in_order(w: Matrices, h: Matrices, choose: Choose) -> Matrices:
    """GPTQ (Frantar et al. 2023, algorithm 1): each column's error is made good by the columns after it."""
    u = np.linalg.cholesky(np.linalg.inv(h)).swapaxes(1, 2)
    w, x = w.copy(), np.zeros_like(w)
    k = w.shape[2]
    for start in range(0, k, BLOCK):
        end = min(start + BLOCK, k)
        errors = np.zeros_like(w[:, :, start:end])
        for j in range(start, end):
            x[:, :, j] = choose(w[:, :, j], u[:, j, j, None] ** -2, j)
            e = (w[:, :, j] - x[:, :, j]) / u[:, j, j, None]
            w[:, :, j:end] -= e[:, :, None] * u[:, j, None, j:end]
            errors[:, :, j - start] = e
        w[:, :, end:] -= errors @ u[:, start:end, end:]
    return x


def in_turn(x: Matrices, w: Matrices, h: Matrices, choose: Choose) -> Matrices:
    """Coordinate descent: every column in turn to its best values given the others, until none changes."""
    x = x.copy()
    residual = (x - w) @ h
    diagonal = np.diagonal(h, axis1=1, axis2=2)
    k = w.shape[2]
    for _ in range(SWEEPS):
        changed = False
        for start in range(0, k, BLOCK):
            end = min(start + BLOCK, k)
            r, block = residual[:, :, start:end].copy(), h[:, start:end, start:end]
            before = x[:, :, start:end].copy()
            for j in range(end - start):
                old, curvature = x[:, :, start + j], diagonal[:, start + j, None]
                best = choose(old - r[:, :, j] / curvature, curvature, start + j)
                step = best - old
                if step.any():
                    x[:, :, start + j] = best
                    r += step[:, :, None] * block[:, j, None, :]
            moved = x[:, :, start:end] - before
            if moved.any():
                changed = True
                residual += moved @ h[:, start:end]
        if not changed:
            break
    return x
