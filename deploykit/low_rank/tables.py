"""What a layer would lose and cost with every choice of ranks: tables that any way of choosing can read.

Two errors stand beside each other. The squared distance, in the norm that is asked for: of the weights themselves, or
of what the outputs lose on data,

    Σ_o d_o² (W - Ŵ)_o C (W - Ŵ)_oᵀ,

C the covariance of what the layer multiplies and d² how much an error of that output costs the network. And, of channel
slices, Liebenwein et al. 2021's relative spectral error. Their bound (section 2.2, with α the singular values)

    ‖W - Ŵ‖ / ‖W‖  ≤  √k / α_1 · max_i α_{i,j+1}

is kept as a certificate; choices are made without √k, as the authors' own code does: with it k = 1 wins nearly
everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deploykit.layerwise.products import matrix
from deploykit.low_rank import channel
from deploykit.low_rank.factored import Place, Ranks, shape_of
from deploykit.low_rank.forms import form_of


@dataclass(frozen=True)
class Candidate:
    """One choice of ranks for a layer."""

    ranks: Ranks
    """Empty: the layer stays whole."""
    params: int
    macs: int
    bytes: int
    lost: float
    """Squared error."""
    share: float
    """The same, of the layer's squared norm."""
    worst: float
    """Relative spectral error of the worst slice; of other forms than channel slices the root of ``share``."""
    bound: float | None = None
    """What the relative spectral error of the weight cannot exceed; None: nobody says."""

    @property
    def k(self) -> int:
        """Slices; other forms, whose first rank is no number of slices, never ask."""
        return self.ranks[0]


@dataclass(frozen=True)
class Table:
    """All that a layer could become."""

    whole: Candidate
    factored: tuple[Candidate, ...]
    decay: tuple[float, ...] = ()
    """Singular values of the whole layer, the largest 1; of channel slices alone."""


@dataclass(frozen=True)
class Norm:
    """What an error of a layer's weights means on data."""

    d: Tensor
    """Weight of each output, ``[g, o]``."""
    c: Tensor
    """Covariance of what the layer multiplies, damped, ``[g, k, k]``."""


Errors = tuple[float, float, float, float | None]
"""lost, share, worst and bound of a candidate."""


def table(
    layer: Any, form: str, runs: Mapping[Place, int], multiple: int, k: int = 0, norm: Norm | None = None
) -> Table:
    """All choices for a layer.

    Args:
        layer: a convolution or linear layer that can have this form.
        form: a name in `deploykit.low_rank.forms`.
        runs: positions of one sample, by where a factor may run.
        multiple: channels between factors are a multiple of it.
        k: of channel slices, how many; where that does not divide the channels the nearest that does. 0: all.
        norm: None: the weights' own.
    """
    shape, made = shape_of(layer), form_of(form)
    w = layer.weight.detach().double()
    n, each = shape.weights, layer.weight.element_size()
    whole = Candidate((), n, n * runs["out"], n * each, 0.0, 0.0, 0.0, 0.0)
    choices = list(made.choices(shape, multiple))
    if form == "channel" and k:
        nearest = min(channel.slices(shape), key=lambda own: abs(own - k))
        choices = [ranks for ranks in choices if ranks[0] == nearest]

    def counted(ranks: Ranks) -> tuple[int, int]:
        sizes = made.weights(shape, ranks)
        return sum(sizes), sum(size * runs[place] for size, place in zip(sizes, made.RUNS_AT, strict=True))

    decay: tuple[float, ...] = ()
    if form == "channel":
        s = singular_values(w, shape.g, 1, norm)
        decay = tuple((s.amax((0, 1)) / s.max().clamp_min(1e-300)).tolist())
        errors = _by_slices(w, shape.g, choices, norm, s)
    else:  # what saves nothing is not worth the time to find out what it loses
        choices = [r for r in choices if counted(r)[0] < whole.params or counted(r)[1] < whole.macs]
        errors = _measured(layer, w, form, choices, norm)
    found = []
    for ranks, (lost, share, worst, bound) in zip(choices, errors, strict=True):
        params, macs = counted(ranks)
        found.append(Candidate(ranks, params, macs, params * each, lost, share, worst, bound))
    return Table(whole, tuple(found), decay)


def _by_slices(w: Tensor, g: int, choices: list[Ranks], norm: Norm | None, whole: Tensor) -> Iterator[Errors]:
    """Singular values are computed once for every k; ``whole`` are those with k = 1."""
    known: dict[int, tuple[list[float], list[float]]] = {}
    top, total = max(float(whole.max()), 1e-300), max(float(whole.square().sum()), 1e-300)
    for k, j in choices:
        if k not in known:
            s = whole if k == 1 else singular_values(w, g, k, norm)
            tail = s.square().sum((0, 1)).flip(0).cumsum(0).flip(0)  # of α_j, α_j+1 ..
            known[k] = [*tail.tolist(), 0.0], [*(s.amax((0, 1)) / top).tolist(), 0.0]
        lost, worst = known[k][0][j], known[k][1][j]
        yield lost, lost / total, worst, math.sqrt(k) * worst if norm is None else None


def singular_values(w: Tensor, g: int, k: int, norm: Norm | None = None) -> Tensor:
    """Of the slices W_i, or D W_i C_ii^½, descending: ``[g, k, min(f/g, b)]``.

    They are the roots of the eigenvalues of the smaller of both products with the transpose.
    """
    a = channel.sliced(w, g, k)
    o, b = a.shape[2:]
    if norm is None:
        gram = a @ a.mT if o <= b else a.mT @ a
    else:
        c = torch.stack([norm.c[:, i * b : (i + 1) * b, i * b : (i + 1) * b] for i in range(k)], 1)
        a = norm.d[:, None, :, None] * a
        if o <= b:
            gram = a @ c @ a.mT
        else:
            a = a @ torch.linalg.cholesky(c)
            gram = a.mT @ a
    values: Tensor = torch.linalg.eigvalsh(gram)
    return values.clamp_min(0).sqrt().flip(-1)


def _measured(layer: Any, w: Tensor, form: str, choices: list[Ranks], norm: Norm | None) -> Iterator[Errors]:
    """Of what the factors make; nothing bounds them."""
    total = max(_squared(matrix(layer, w), norm), 1e-300)
    for found in form_of(form).approximations(w, shape_of(layer).g, choices):
        lost = _squared(matrix(layer, w - found), norm)
        yield lost, lost / total, math.sqrt(lost / total), None


def _squared(w: Tensor, norm: Norm | None) -> float:
    """The squared norm of a matrix ``[g, o, k]``."""
    if norm is None:
        return float(w.square().sum())
    w = norm.d[:, :, None] * w
    return float(((w @ norm.c) * w).sum())
