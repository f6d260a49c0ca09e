"""Channel slicing: input channels in k slices, each slice's weights as a product of rank j.

Liebenwein et al. 2021, "Compressing Neural Networks: Towards Determining the Optimal Layer-wise Decomposition", section
2.1. With W_i ``[f, c/k * taps]`` what the outputs have of slice i,

    W  =  [W_1 .. W_k]  ≈  [U_1 V_1 .. U_k V_k],

V is a convolution with the original kernel in k groups, c -> kj, and U a 1x1 convolution, kj -> f: j (c taps + f k)
weights. k = 1 is the singular value decomposition of the whole. Convolutions that have groups are sliced within each.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from deploykit.low_rank.factored import Place, Ranks, Shape, carrier, mixing, shape_of

RUNS_AT: tuple[Place, ...] = ("out", "out")
KERNEL: int | None = 0


def slices(shape: Shape) -> list[int]:
    """The k that there are."""
    each = shape.c // shape.g
    return [k for k in range(1, each + 1) if each % k == 0] if shape.kernel else [1]


def largest(shape: Shape, k: int) -> int:
    """The j from which on nothing is lost."""
    return min(shape.f // shape.g, shape.c // shape.g // k * shape.taps)


def full(shape: Shape) -> Ranks:
    """(k, j) with which nothing is lost."""
    return 1, largest(shape, 1)


def choices(shape: Shape, multiple: int) -> Iterator[Ranks]:
    """All (k, j) whose channels in between are a multiple of ``multiple``."""
    for k in slices(shape):
        yield from ((k, j) for j in range(1, largest(shape, k) + 1) if shape.g * k * j % multiple == 0)


def weights(shape: Shape, ranks: Ranks) -> tuple[int, ...]:
    """Of the factors."""
    k, j = ranks
    return j * shape.c * shape.taps, shape.f * k * j


def sliced(w: Tensor, g: int, k: int) -> Tensor:
    """``[f, c/g, *kernel]`` as ``[g, k, f/g, b]``: W_i of every group."""
    return w.reshape(g, w.shape[0] // g, k, -1).transpose(1, 2)


def split(w: Tensor, g: int, ranks: Ranks) -> tuple[Tensor, ...]:
    """V ``[gkj, c/(gk), *kernel]`` and U ``[f, kj, 1 ..]``, the singular values shared evenly between them."""
    k, j = ranks
    u, s, v = torch.linalg.svd(sliced(w, g, k), full_matrices=False)
    root = s[..., :j].sqrt()
    second = (u[..., :j] * root[..., None, :]).transpose(1, 2)
    first = root[..., None] * v[..., :j, :]
    return first.reshape(g * k * j, w.shape[1] // k, *w.shape[2:]), second.reshape(len(w), k * j, *[1] * (w.ndim - 2))


def approximations(w: Tensor, g: int, choices: Sequence[Ranks]) -> Iterator[Tensor]:
    """What each of the choices makes of a weight."""
    return (merge(split(w, g, ranks), g, ranks) for ranks in choices)


def merge(factors: Sequence[Tensor], g: int, ranks: Ranks) -> Tensor:
    """The weight that the factors make, ``[f, c/g, *kernel]``."""
    k, j = ranks
    first, second = factors
    f, kernel = len(second), first.shape[2:]
    w = torch.einsum("gokj,gkjb->gokb", second.reshape(g, f // g, k, j), first.reshape(g, k, j, -1))
    return w.reshape(f, k * first.shape[1], *kernel)


def modules(layer: Any, ranks: Ranks) -> list[nn.Module]:
    """V, a copy of the layer; U, with the bias."""
    (k, j), shape = ranks, shape_of(layer)
    middle = shape.g * k * j
    first = carrier(layer, shape.c, middle, shape.g * k)
    return [first, mixing(layer, middle, shape.f, shape.g, bias=True)]
