"""Covariances of what layers multiply."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from deploykit.core.data import DataSet
from deploykit.core.progress import track
from deploykit.layerwise.products import inputs
from deploykit.layerwise.watching import BATCH, entered, evaluating, hooked
from deploykit.losses import as_tensors

DAMPING = 1e-2
"""Of the mean variance, added to all: inputs that hardly vary, and covariances of few samples."""


def precise(x: Tensor) -> Tensor:
    """In float32 at least: sums of halves overflow."""
    return x if x.dtype == torch.float64 else x.float()


class Covariance:
    """Of numbers ``[g, n, k]`` that come batch by batch, and their mean.

    Products are taken about the mean of the first batch: with a mean far from zero nothing else would be left of them.
    """

    def __init__(self) -> None:
        """Nothing seen."""
        self.count = 0
        self.about: Any = None
        self.sum: Any = 0.0
        self.products: Any = 0.0

    def add(self, x: Tensor) -> None:
        """The next positions."""
        x = precise(x)
        if self.about is None:
            self.about = x.mean(1, keepdim=True)
        self.count += x.shape[1]
        self.sum = self.sum + x.sum(1, dtype=torch.float64)
        x = x - self.about
        self.products = self.products + (x.transpose(1, 2) @ x).double()  # one batch in float32, their sum not

    @property
    def mean(self) -> Tensor:
        """``[g, k]``."""
        return torch.as_tensor(self.sum / self.count)

    def centred(self) -> Tensor:
        """``[g, k, k]``."""
        off = self.mean - self.about[:, 0].double()
        return torch.as_tensor(self.products / self.count - off[:, :, None] * off[:, None, :])


def covariances(model: nn.Module, layers: Mapping[str, nn.Module], data: DataSet) -> dict[str, Covariance]:
    """Of what the layers multiply, in one pass. Memory holds one batch and ``[g, k, k]`` per layer."""
    found = {name: Covariance() for name in layers}

    def note(name: str) -> Any:
        return lambda layer, given, named, _: found[name].add(inputs(layer, entered(given, named).detach()))

    with (
        evaluating(model),
        torch.no_grad(),
        hooked(layer.register_forward_hook(note(n), with_kwargs=True) for n, layer in layers.items()),
    ):
        for batch in track(data.batches(BATCH), "covariances", total=-(-len(data) // BATCH)):
            model(**as_tensors(batch.inputs))
    return found


def damped(h: Tensor) -> Tensor:
    """H with a share of its mean variance added, ``[g, k, k]``."""
    mean = h.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-12)
    return h + DAMPING * mean[:, None, None] * torch.eye(h.shape[1], dtype=h.dtype)
