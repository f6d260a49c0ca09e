"""Connection sensitivity, for networks before training. Lee et al. 2019, "SNIP: Single-shot Network Pruning"."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from deploykit.layerwise.channels import weight_of
from deploykit.pruning.criteria.evidence import Evidence


def snip(model: nn.Module, layers: Sequence[str], evidence: Evidence) -> dict[str, Tensor]:
    """|w dC/dw| with the mean cost of all data, in the shape of each layer's weight. One pass over the data."""
    weights = [weight_of(model.get_submodule(name)) for name in layers]
    slope = [torch.zeros_like(w) for w in weights]
    for batch in evidence.batches():
        n = len(next(iter(batch.inputs.values())))
        slopes = torch.autograd.grad(evidence.cost(model, batch), weights, allow_unused=True)
        for total, own in zip(slope, slopes, strict=True):
            if own is not None:
                total += n * own
    return {n: (w.detach() * g).abs() for n, w, g in zip(layers, weights, slope, strict=True)}
