"""Second order: what the cost rises by when a weight becomes zero, at a minimum where slopes vanish.

LeCun et al. 1990, "Optimal Brain Damage":  1/2 h w². The diagonal h of the Hessian is that of the empirical Fisher
matrix, the mean of the squared gradients of single samples (Hassibi & Stork 1993; Theis et al. 2018).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from deploykit.layerwise.channels import weight_of
from deploykit.pruning.criteria.evidence import Evidence


def hessian(model: nn.Module, layers: Sequence[str], evidence: Evidence) -> dict[str, Tensor]:
    """1/2 w² mean over all samples of (dC/dw)², in the shape of each layer's weight. One pass over the data."""
    weights = [weight_of(model.get_submodule(name)) for name in layers]
    h = [torch.zeros_like(w) for w in weights]
    count = 0
    for sample in evidence.batches(1):
        slopes = torch.autograd.grad(evidence.cost(model, sample), weights, allow_unused=True)
        for total, slope in zip(h, slopes, strict=True):
            if slope is not None:
                total += slope.square()
        count += 1
    return {n: w.detach().square() * t / (2 * count) for n, w, t in zip(layers, weights, h, strict=True)}
