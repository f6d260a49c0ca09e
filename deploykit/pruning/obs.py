"""Optimal brain surgeon, row by row: what each weight costs when it goes and the others make up for it.

For a row w of a layer's matrix, with H the covariance of what it multiplies and S the weights that still live, taking
weight q costs the row's output (Hassibi & Stork 1992, "Second Order Derivatives for Network Pruning: Optimal Brain
Surgeon", equation 5)

    Δ_q  =  w_q² / [H_SS⁻¹]_qq,      w  ←  w - H_SS⁻¹ e_q w_q / [H_SS⁻¹]_qq

and H_SS⁻¹ loses row and column q by one step of Gaussian elimination. So a row goes from dense to empty in k steps, the
cheapest weight first (Frantar & Alistarh 2022, "Optimal Brain Compression", section 4). What a weight cost when it went
is its score: rows do not know of each other, so any share of the network can be taken by one threshold.

Rows are compared by what their output's error costs the network: Δ is times how sensitive the loss is to that output at
all positions p together, E[Σ_p (∂L/∂y_cp)²] (the Fisher information; Theis et al. 2018, "Faster gaze prediction with
dense networks and Fisher pruning").
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

ROWS = 16
"""That are worked on at a time: each has an inverse of its own."""
AT_ONCE = 64
"""Wide rows lose several weights in a step, so that there are about so many steps."""


@dataclass(frozen=True)
class Matrix:
    """A layer as the surgeon sees it."""

    w: Tensor
    """Weights ``[g, o, k]``."""
    h: Tensor
    """Covariance of the inputs ``[g, k, k]``, damped."""
    fisher: Tensor
    """E[Σ_p (∂L/∂y_p)²] ``[g, o]``."""


def costs(matrix: Matrix, lives: Tensor, room: Tensor | None = None, most: int = 0) -> Tensor:
    """What every weight costs when it goes, ``[g, o, k]``; minus infinity for those that are gone already.

    Within a row costs rise in the order of going: a weight that comes after a dearer one counts as much as that.

    Args:
        matrix: the layer.
        lives: who lives before, bool ``[g, o, k]``.
        room: numbers ``[k]`` that say which weights of a row belong together; None: nobody.
        most: how many of those that belong together may go. The others cost infinity.
    """
    found = torch.empty_like(matrix.w)
    for g, h in enumerate(matrix.h):
        for start in range(0, matrix.w.shape[1], ROWS):
            rows = slice(start, start + ROWS)
            own = _rows(matrix.w[g, rows], h, lives[g, rows], room, most)
            found[g, rows] = own * matrix.fisher[g, rows, None].clamp_min(torch.finfo(own.dtype).tiny)
    return found


def _rows(w: Tensor, h: Tensor, lives: Tensor, room: Tensor | None, most: int) -> Tensor:
    """Δ of some rows ``[r, k]`` with the same H ``[k, k]``."""
    k = w.shape[1]
    eye = torch.eye(k, dtype=h.dtype)
    among = lives[:, :, None] & lives[:, None, :]
    a = torch.cholesky_inverse(torch.linalg.cholesky(torch.where(among, h, eye))) * among
    w = (a @ ((w @ h) * lives)[:, :, None])[:, :, 0]
    together = 1 if room is not None else max(1, k // AT_ONCE)
    cost = torch.where(lives, torch.inf, -torch.inf).to(w.dtype)
    level = torch.zeros_like(w[:, :1])
    free = lives.clone()
    while bool(free.any()):
        delta = torch.where(free, w.square() / a.diagonal(dim1=1, dim2=2).clamp_min(1e-30), torch.inf)
        least, q = delta.topk(together, largest=False)
        going = torch.isfinite(least)
        level = torch.maximum(level, torch.where(going, least, 0.0)).cummax(1)[0]
        cost.scatter_(1, q, torch.where(going, level, cost.gather(1, q)))
        level = level[:, -1:]
        columns = a.gather(2, q[:, None].expand(-1, k, -1)) * going[:, None]
        corner = columns.gather(1, q[:, :, None].expand(-1, -1, together))
        corner = torch.where(going[:, :, None] & going[:, None], corner, torch.eye(together, dtype=a.dtype))
        share = torch.linalg.solve(corner, columns.transpose(1, 2))
        w = w - (share.transpose(1, 2) @ (w.gather(1, q) * going)[:, :, None])[:, :, 0]
        a = a - columns @ share
        gone = torch.zeros_like(free).scatter_(1, q, going)
        w, free = w.masked_fill(gone, 0.0), free & ~gone
        if room is not None:
            taken = torch.zeros(len(w), int(room.max()) + 1, dtype=torch.long)
            taken.scatter_add_(1, room.expand(len(w), -1), (~free & torch.isfinite(cost)).long())
            free &= taken.gather(1, room.expand(len(w), -1)) < most
    return cost
