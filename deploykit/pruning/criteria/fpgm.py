"""Redundancy: a filter near the geometric median of its layer can be replaced by the others.

He et al. 2019, "Filter Pruning via Geometric Median for Deep Convolutional Neural Networks Acceleration", equation 6.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from deploykit.layerwise.channels import groups_of, mixes, weight_axis, weight_of
from deploykit.pruning.criteria.evidence import Evidence
from deploykit.pruning.crop import Port


def fpgm(model: nn.Module, layers: Sequence[str], evidence: Evidence) -> dict[Port, Tensor]:
    """The sum of a filter's distances from all filters of its layer, ``[channels]``."""
    found: dict[Port, Tensor] = {}
    for name in layers:
        layer = model.get_submodule(name)
        if not mixes(layer):
            continue
        weight = weight_of(layer).detach()
        if weight_axis(layer, "out") == 1 and groups_of(layer) > 1:  # transposed: [in, out / groups, ...]
            weight = torch.cat(weight.chunk(groups_of(layer)), dim=1)
        filters = weight.movedim(weight_axis(layer, "out"), 0).flatten(1)
        found[Port(name, "out")] = torch.cdist(filters, filters).sum(1)
    return found
