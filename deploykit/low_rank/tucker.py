"""Tucker-2: fewer channels in, a small core with the original kernel, more channels out.

Kim et al. 2016, "Compression of Deep Convolutional Neural Networks for Fast and Low Power Mobile Applications":

    W[f, c, ..]  ≈  Σ_pq A[f, p] G[p, q, ..] B[c, q].

A and B start as the leading singular vectors of both unfoldings (HOSVD) and are improved in turns, each the best for
the other (HOOI; De Lathauwer et al. 2000, "On the Best Rank-1 and Rank-(R1, .., RN) Approximation of Higher-Order
Tensors").
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from deploykit.low_rank.factored import Place, Ranks, Shape, carrier, mixing, shape_of

RUNS_AT: tuple[Place, ...] = ("in", "out", "out")
KERNEL: int | None = 1
LOOKS = 8
"""Ranks that are tried per side, at most."""
TURNS = 4


def full(shape: Shape) -> Ranks:
    """(q, p), ranks of inputs and outputs, with which nothing is lost."""
    return min(shape.c, shape.f * shape.taps), min(shape.f, shape.c * shape.taps)


def choices(shape: Shape, multiple: int) -> Iterator[Ranks]:
    """All pairs of ranks in even steps, multiples of ``multiple``."""

    def steps(most: int) -> range:
        step = multiple * -(-most // (multiple * LOOKS))
        return range(step, most + 1, step)

    ins, outs = full(shape)
    yield from ((q, p) for q in steps(ins) for p in steps(outs))


def weights(shape: Shape, ranks: Ranks) -> tuple[int, ...]:
    """Of the factors."""
    q, p = ranks
    return shape.c * q, q * p * shape.taps, p * shape.f


def split(w: Tensor, g: int, ranks: Ranks) -> tuple[Tensor, ...]:
    """B' ``[q, c, 1, 1]``, G ``[p, q, *kernel]``, A ``[f, p, 1, 1]``."""
    q, p = ranks
    a, b = leading(w.flatten(1), p), leading(w.transpose(0, 1).flatten(1), q)
    for _ in range(TURNS):
        a = leading(torch.einsum("fc...,cq->fq...", w, b).flatten(1), p)
        b = leading(torch.einsum("fc...,fp->cp...", w, a).flatten(1), q)
    core = torch.einsum("fc...,fp,cq->pq...", w, a, b)
    ones = [1] * (w.ndim - 2)
    return b.T.reshape(q, -1, *ones), core, a.reshape(-1, p, *ones)


def leading(m: Tensor, count: int) -> Tensor:
    """The first left singular vectors of a matrix ``[n, m]``, ``[n, count]``."""
    vectors: Tensor = torch.linalg.eigh(m @ m.T)[1]
    return vectors.flip(1)[:, :count]


def approximations(w: Tensor, g: int, choices: Sequence[Ranks]) -> Iterator[Tensor]:
    """What each of the choices makes of a weight before it is improved (HOSVD)."""
    a, b = leading(w.flatten(1), w.shape[0]), leading(w.transpose(0, 1).flatten(1), w.shape[1])
    for q, p in choices:
        outs, ins = a[:, :p] @ a[:, :p].T, b[:, :q] @ b[:, :q].T
        yield torch.einsum("fc...,fp,cq->pq...", w, outs, ins)


def merge(factors: Sequence[Tensor], g: int, ranks: Ranks) -> Tensor:
    """The weight that the factors make, ``[f, c, *kernel]``."""
    b, core, a = factors
    return torch.einsum("pq...,fp,qc->fc...", core, a.flatten(1), b.flatten(1))


def modules(layer: Any, ranks: Ranks) -> list[nn.Module]:
    """B; the core, a copy of the layer; A, with the bias."""
    (q, p), shape = ranks, shape_of(layer)
    return [mixing(layer, shape.c, q), carrier(layer, q, p, 1), mixing(layer, p, shape.f, bias=True)]
