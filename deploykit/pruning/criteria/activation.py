"""Weights by what they are multiplied with: |w| ‖x‖.

Sun et al. 2024, "A Simple and Effective Pruning Approach for Large Language Models" (Wanda).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from deploykit.layerwise.channels import axis, weight_axis, weight_of, width
from deploykit.pruning.criteria.evidence import Evidence
from deploykit.pruning.criteria.reads import reads


def activation(model: nn.Module, layers: Sequence[str], evidence: Evidence) -> dict[str, Tensor]:
    """|w| times the L2 norm of the channel it reads, over all samples and positions. One pass over the data."""
    readers = [n for n in layers if width(model.get_submodule(n), "in")]
    squares: dict[str, Tensor] = {}
    for batch in evidence.batches():
        with torch.no_grad(), reads(model, readers) as read:
            model(**batch.inputs)
        for name, calls in read.items():
            for x in calls:
                own = x.movedim(axis(model.get_submodule(name), x), 0).flatten(1).square().sum(1)
                squares[name] = squares.get(name, 0) + own
    return {name: _weighted(model.get_submodule(name), square.sqrt()) for name, square in squares.items()}


def _weighted(layer: nn.Module, norms: Tensor) -> Tensor:
    weight = weight_of(layer).detach().abs()
    if weight_axis(layer, "in") == 0:  # transposed: every input channel has its row
        return weight * norms.view(-1, *[1] * (weight.ndim - 1))
    # [groups, outputs of a group, inputs of a group, positions of the kernel]
    groups = len(norms) // weight.shape[1]
    parts = weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)
    return (parts * norms.view(groups, 1, -1, 1)).view(weight.shape)
