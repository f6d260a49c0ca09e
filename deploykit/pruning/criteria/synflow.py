"""Synaptic flow, without data. Tanaka et al. 2020, "Pruning neural networks without any data by iteratively conserving
synaptic flow".

    R = 1' (prod_l |W_l|) 1,      score = dR/d|w| |w|

What flows into a unit flows out of it, so every layer's scores sum to R and no layer is emptied while others have
weights to spare, as long as scores are taken anew after every small cut (their algorithm 1).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from deploykit.hub.structure import bake
from deploykit.losses import tensors
from deploykit.pruning.criteria.evidence import Evidence
from deploykit.pruning.layers import weight_of


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


def synflow_masks(
    model: nn.Module, layers: Sequence[str], evidence: Evidence, keep: float, rounds: int = 100
) -> dict[str, Tensor]:
    """Which single weights live on: algorithm 1, with one threshold for all layers.

    Args:
        model: not changed.
        layers: whose weights are ranked.
        evidence: its sample gives the shape of the inputs.
        keep: share of the weights that is left, 0 < keep <= 1.
        rounds: n; after round k a share keep^(k/n) is left.

    Returns:
        bool, in the shape of each layer's weight.
    """
    model = copy.deepcopy(model)
    weights = {name: weight_of(model.get_submodule(name)) for name in layers}
    masks = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in weights.items()}
    total = sum(mask.numel() for mask in masks.values())
    for k in range(1, rounds + 1):
        scores = synflow(model, layers, evidence)
        ranked = torch.cat([scores[name].flatten() for name in layers])
        lives = torch.zeros_like(ranked, dtype=torch.bool)
        lives[ranked.argsort(descending=True, stable=True)[: round(total * keep ** (k / rounds))]] = True
        parts = torch.split(lives, [weights[name].numel() for name in layers])
        for (name, weight), part in zip(weights.items(), parts, strict=True):
            masks[name] &= part.view_as(weight)
            with torch.no_grad():
                weight.mul_(masks[name])
    return masks
