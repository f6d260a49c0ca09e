"""Ways of choosing ranks by name: what an error is, how many slices there may be, and how errors are balanced.

- ``data``: the least sum of what outputs lose on data, by what that costs the network.
- ``weights``: the least sum of the squared errors of all weights, k free.
- ``alds``: Liebenwein et al. 2021, algorithm 1, with its largest relative error; ``equal_error``: its optimum.
- ``constant``: the same share of every layer.
- ``energy``: the same share of the squared singular values is left of every layer (Alvarez & Salzmann 2017,
  "Compression-aware Training of Deep Networks").
- ``pca``: the largest product over layers of the share of the responses' energy that is left (Zhang et al. 2015,
  "Accelerating Very Deep Convolutional Networks for Classification and Detection", section 3.3).
- ``l_rank``: the same as ``weights`` with k = 1 (Idelbayev & Carreira-Perpiñán 2020, "Low-rank Compression
  of Neural Nets: Learning the Rank of Each Layer", the C step).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from operator import attrgetter
from typing import Literal

import torch
from torch import Tensor, nn

from deploykit.core.data import DataSet
from deploykit.layerwise.covariance import covariances, damped
from deploykit.layerwise.fisher import fisher
from deploykit.layerwise.products import matrix
from deploykit.low_rank.select import Choice, Number, Tables, alternate, equal_error, equal_ratio, least_sum, spent
from deploykit.low_rank.tables import Candidate, Norm

Method = Literal["data", "weights", "alds", "equal_error", "constant", "energy", "pca", "l_rank"]
SEES_DATA = ("data", "pca")
ONE_SLICE = ("constant", "energy", "pca", "l_rank")
"""Of the singular value decomposition as a whole."""
LEAST = 1e-3
"""What an output matters at least, of the layer's output that matters most."""

DRAWS = 4
"""Answers that are drawn for every sample. A network that is sure of itself is seldom surprised; with one draw, what
matters hangs on a few samples."""


def choose(method: Method, cost: Number, seeds: int, seed: int, tables: Tables, budget: float) -> Choice:
    """What every layer becomes, for at most ``budget`` altogether; see `deploykit.low_rank.select`."""
    if method == "constant":
        return equal_ratio(tables, cost, budget)
    if method == "alds":  # as the paper has it: what is left of the budget is left
        return alternate(tables, cost, attrgetter("worst"), budget, seeds, seed)
    error: Number
    if method in ("equal_error", "energy"):
        error = attrgetter("share" if method == "energy" else "worst")
        found = equal_error(tables, cost, error, budget)
    else:
        error = _energy if method == "pca" else attrgetter("lost")
        found = least_sum(tables, cost, error, budget)
    return spent(tables, cost, error, budget, found)


def _energy(candidate: Candidate) -> float:
    """Minus its logarithm: sums are then products."""
    return -math.log(max(1.0 - candidate.share, 1e-300))


def norms(method: Method, model: nn.Module, names: Iterable[str], data: DataSet, seed: int) -> dict[str, Norm]:
    """What errors of layers' weights mean on data; with ``pca`` all outputs matter alike."""
    layers = {name: model.get_submodule(name) for name in names}
    found = covariances(model, layers, data)
    draws = [fisher(model, layers, data, seed * DRAWS + i) for i in range(DRAWS)] if method == "data" else []

    def of(name: str, layer: nn.Module) -> Norm:
        assert isinstance(layer.weight, Tensor)
        alike = torch.ones(matrix(layer, layer.weight).shape[:2], dtype=torch.float64)
        matters = torch.stack([draw[name] for draw in draws] or [alike]).mean(0)
        d = matters.clamp_min(max(LEAST * float(matters.max()), 1e-30)).sqrt()
        return Norm(d, damped(found[name].centred()))

    return {name: of(name, layer) for name, layer in layers.items()}
