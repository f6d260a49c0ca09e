"""Optimal brain surgeon, layer by layer: which weights cost least when the others make up for them.

For a row w of a layer's matrix, with H the covariance of what it multiplies and S the weights that still live, the best
that the living can do is w_S = H_SS⁻¹ (H w)_S, and taking weight q from them costs (Hassibi and Stork 1992, "Second
Order Derivatives for Network Pruning: Optimal Brain Surgeon", equation 5)

    Δ_q  =  w_q² / [H_SS⁻¹]_qq

more of the row's output error. Rows are compared by what their output's error costs the network: Δ_q counts as often as
the loss is sensitive to it, E[(∂L/∂y_c)²] for output c (the Fisher information; Theis et al. 2018, "Faster gaze
prediction with dense networks and Fisher pruning"). One threshold holds for all layers, and weights go in many small
portions: what a weight costs depends on who is still there to make up for it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deploykit.core.progress import track
from deploykit.pruning.masks import Masks, Scores

Portion = Callable[[Scores, Masks], dict[str, Tensor]]

DAMPING = 1e-2
"""Of the mean variance, added to all: inputs that hardly vary, and covariances of few samples."""
ROWS = 16
"""That are inverted at a time."""


@dataclass(frozen=True)
class Matrix:
    """A layer as the surgeon sees it."""

    w: Tensor
    """Weights ``[g, o, k]``, float64."""
    h: Tensor
    """Covariance of the inputs ``[g, k, k]``, damped."""
    fisher: Tensor
    """E[(∂L/∂y)²] ``[g, o]``."""


def damped(h: Tensor) -> Tensor:
    """H with a share of its mean variance added, ``[g, k, k]``."""
    mean = h.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-12)
    return h + DAMPING * mean[:, None, None] * torch.eye(h.shape[1], dtype=h.dtype)


def costs(matrix: Matrix, lives: Tensor) -> Tensor:
    """Δ of every living weight, infinite for the others ``[g, o, k]``.

    Args:
        matrix: the layer.
        lives: bool ``[g, o, k]``.
    """
    found = torch.full_like(matrix.w, torch.inf)
    eye = torch.eye(matrix.w.shape[2], dtype=matrix.h.dtype)
    for g, h in enumerate(matrix.h):
        for start in range(0, matrix.w.shape[1], ROWS):
            s = lives[g, start : start + ROWS]
            w = matrix.w[g, start : start + ROWS]
            among = s[:, :, None] & s[:, None, :]
            inverse = torch.cholesky_inverse(torch.linalg.cholesky(torch.where(among, h, eye)))
            best = (inverse @ ((w @ h) * s)[:, :, None])[:, :, 0]
            delta = best.square() / inverse.diagonal(dim1=1, dim2=2) * matrix.fisher[g, start : start + ROWS, None]
            found[g, start : start + ROWS] = torch.where(s, delta, torch.inf)
    return found


def surgeon(matrices: Mapping[str, Matrix], lives: Masks, portions: Sequence[Portion]) -> dict[str, Tensor]:
    """Which weights live after all portions were taken.

    Args:
        matrices: by layer.
        lives: who lives before, in the shape of the layer's weight.
        portions: each says by the costs who lives on; costs are computed anew for the next.
    """
    living = dict(lives)
    found: dict[str, Tensor] = {}
    stale = set(matrices)
    for portion in track(portions, "optimal brain surgeon"):
        for name in stale:
            w = matrices[name].w
            found[name] = costs(matrices[name], living[name].reshape(w.shape)).reshape(living[name].shape)
        fresh = portion(found, living)
        stale = {name for name in matrices if not torch.equal(fresh[name], living[name])}
        living = fresh
    return living
