"""First-order Taylor expansion: how much the cost changes if a feature map becomes zero.

Molchanov et al. 2017, "Pruning Convolutional Neural Networks for Resource Efficient Inference", equations 8 and 9:

    Theta(z_k) = | 1/M sum_m  dC/dz_k,m  z_k,m |            M positions, averaged over examples
    Theta_l   <- Theta_l / sqrt(sum_j Theta_l(z_j)^2)        layer by layer

A feature map is what a layer *reads*: behind normalisation and activation, where a removed channel is truly zero.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from deploykit.layerwise.channels import axis, mixes
from deploykit.pruning.criteria.evidence import Evidence
from deploykit.pruning.criteria.reads import by_example, reads
from deploykit.pruning.crop import Port


def taylor(model: nn.Module, layers: Sequence[str], evidence: Evidence) -> dict[Port, Tensor]:
    """Theta by reading layer, ``[channels]``. One pass over the data."""
    total: dict[str, Tensor] = {}
    for batch in evidence.batches():
        n = len(next(iter(batch.inputs.values())))
        with reads(model, [n for n in layers if mixes(model.get_submodule(n))]) as read:
            cost = evidence.cost(model, batch)
        z = [(name, t) for name, calls in read.items() for t in calls if t.requires_grad]
        slopes = torch.autograd.grad(cost, [t for _, t in z], allow_unused=True)
        for (name, t), slope in zip(z, slopes, strict=True):
            if slope is None:
                continue
            # the cost is a mean over n examples: n times its slope is the example's own
            product = by_example(n * slope * t.detach(), axis(model.get_submodule(name), t), n)
            theta = product.mean(2).abs()
            total[name] = total.get(name, 0) + theta.sum(0)
    return {Port(name, "in"): theta / theta.norm().clamp_min(1e-30) for name, theta in total.items()}
