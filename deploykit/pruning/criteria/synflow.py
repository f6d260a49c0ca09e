"""Synaptic flow, without data. Tanaka et al. 2020, "Pruning neural networks without any data by iteratively conserving
synaptic flow".

    R = 1' (prod_l |W_l|) 1,      score = dR/d|w| |w|

What flows into a unit flows out of it, so every layer's scores sum to R and no layer is emptied while others have
weights to spare, as long as scores are taken anew after every small cut: 100 of them in their algorithm 1 (`ROUNDS`).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from deploykit.hub.structure import bake
from deploykit.layerwise.channels import weight_of
from deploykit.losses import tensors
from deploykit.pruning.criteria.evidence import Evidence

ROUNDS = 100


def synflow(model: nn.Module, layers: Sequence[str], evidence: Evidence) -> dict[str, Tensor]:
    """dR/d|w| |w|, float64, in the shape of each layer's weight."""
    plain, _ = bake(copy.deepcopy(model).eval().double())
    with torch.no_grad():
        for tensor in plain.parameters():
            tensor.abs_()
        for layer in plain.modules():
            if isinstance(layer, _NormBase) and layer.running_mean is not None:
                layer.running_mean.zero_()
            bias = getattr(layer, "bias", None)
            if isinstance(bias, Tensor):
                bias.zero_()  # what flows in has come through weights alone
    ones = {n: torch.ones_like(t[:1], dtype=torch.float64) for n, t in evidence.sample.items()}
    weights = [weight_of(plain.get_submodule(name)) for name in layers]
    flow = torch.stack([t.sum() for t in tensors(plain(**ones))]).sum()
    slopes = torch.autograd.grad(flow, weights, allow_unused=True)
    return {
        name: torch.zeros_like(weight) if slope is None else (slope * weight).detach()
        for name, weight, slope in zip(layers, weights, slopes, strict=True)
    }
