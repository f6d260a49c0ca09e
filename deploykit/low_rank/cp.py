"""Canonical polyadic decomposition: j products of a weight per output, input, row and column.

Lebedev et al. 2015, "Speeding-up Convolutional Neural Networks Using Fine-tuned CP-Decomposition":

    W[f, c, y, x]  ≈  Σ_r A[f, r] B[c, r] Y[y, r] X[x, r].

Alternating least squares: each matrix is the best for the three others (Kolda & Bader 2009, "Tensor Decompositions and
Applications", section 3.4).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from deploykit.low_rank.factored import Place, Ranks, Shape, mixing, shape_of
from deploykit.low_rank.spatial import along

RUNS_AT: tuple[Place, ...] = ("in", "mid", "out", "out")
KERNEL: int | None = None
LOOKS = 8
"""Ranks that are tried per layer, at most."""
TURNS = 50
RIDGE = 1e-9
"""Of the mean diagonal, so that products that resemble each other stay finite."""


def full(shape: Shape) -> Ranks:
    """(j,) with which nothing is lost: as many products as the three shorter sides have entries."""
    return (math.prod(sorted((shape.f, shape.c, *shape.kernel))[:3]),)


def choices(shape: Shape, multiple: int) -> Iterator[Ranks]:
    """Ranks that halve, multiples of ``multiple``."""
    (most,) = full(shape)
    halves = (most // 2**i // multiple * multiple for i in range(LOOKS))
    yield from ((j,) for j in dict.fromkeys(halves) if j)


def weights(shape: Shape, ranks: Ranks) -> tuple[int, ...]:
    """Of the factors."""
    (j,), (height, width) = ranks, shape.kernel
    return shape.c * j, height * j, width * j, shape.f * j


def split(w: Tensor, g: int, ranks: Ranks) -> tuple[Tensor, ...]:
    """B' ``[j, c, 1, 1]``, Y' ``[j, 1, height, 1]``, X' ``[j, 1, 1, width]``, A ``[f, j, 1, 1]``."""
    a, b, y, x = _even(_alternated(w, ranks[0]))
    return b.T[:, :, None, None], y.T[:, None, :, None], x.T[:, None, None, :], a[:, :, None, None]


def _alternated(w: Tensor, j: int) -> list[Tensor]:
    """One matrix ``[side, j]`` for each dimension."""
    order = sorted(range(4), key=lambda side: w.shape[side])
    long = order[3]
    if j >= math.prod(w.shape[side] for side in order[:3]):  # one product for each fibre along the longest side
        spots = list(itertools.product(*(range(w.shape[side]) for side in order[:3])))
        found = [torch.eye(n, dtype=w.dtype) for n in w.shape]
        for i, side in enumerate(order[:3]):
            found[side] = found[side][:, [spot[i] for spot in spots]]
        found[long] = w.permute(long, *order[:3]).reshape(w.shape[long], -1)
        return found
    random = torch.Generator().manual_seed(0)
    found = []
    for side, n in enumerate(w.shape):
        u = torch.linalg.eigh(_unfolded(w, side) @ _unfolded(w, side).T)[1].flip(1)[:, :j]
        found.append(torch.cat([u, torch.randn(n, max(0, j - n), generator=random, dtype=w.dtype)], 1))
    for _ in range(TURNS):
        for side in range(4):
            others = [found[i] for i in range(4) if i != side]
            gram = math.prod((m.T @ m for m in others[1:]), start=others[0].T @ others[0])
            products = torch.einsum("ar,br,cr->abcr", *others).flatten(0, 2)
            ridge = RIDGE * gram.diagonal().mean() * torch.eye(j, dtype=w.dtype)
            found[side] = torch.linalg.solve(gram + ridge, (_unfolded(w, side) @ products).T).T
    return found


def _unfolded(w: Tensor, side: int) -> Tensor:
    """``[side, the others]``."""
    return w.movedim(side, 0).flatten(1)


def _even(found: list[Tensor]) -> list[Tensor]:
    """The same products, each spread evenly over its four factors: integers then lose alike in all of them."""
    lengths = torch.stack([m.norm(dim=0) for m in found]).clamp_min(1e-30)
    return [m / own * lengths.log().mean(0).exp() for m, own in zip(found, lengths, strict=True)]


def approximations(w: Tensor, g: int, choices: Sequence[Ranks]) -> Iterator[Tensor]:
    """What each of the choices makes of a weight."""
    return (merge(split(w, 1, ranks), 1, ranks) for ranks in choices)


def merge(factors: Sequence[Tensor], g: int, ranks: Ranks) -> Tensor:
    """The weight that the factors make, ``[f, c, height, width]``."""
    b, y, x, a = (m.flatten(1) for m in factors)
    return torch.einsum("fr,rc,ry,rx->fcyx", a, b, y, x)


def modules(layer: Any, ranks: Ranks) -> list[nn.Module]:
    """B; a column and a row, channel by channel; A, with the bias."""
    (j,), shape = ranks, shape_of(layer)
    return [
        mixing(layer, shape.c, j), along(layer, 0, j, j, j), along(layer, 1, j, j, j),
        mixing(layer, j, shape.f, bias=True),
    ]  # fmt: skip
