"""Chance: the control that every criterion has to beat."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from deploykit.layerwise.channels import weight_of
from deploykit.pruning.criteria.evidence import Evidence
from deploykit.pruning.groups import Group


def chance_by_channel(model: nn.Module, groups: Sequence[Group], evidence: Evidence) -> list[Tensor]:
    """One uniform number for every channel, by group: sums over many weights would all but agree with each other."""
    random = torch.Generator().manual_seed(evidence.seed)
    return [torch.rand(len(group.channels), generator=random) for group in groups]


def chance(model: nn.Module, layers: Sequence[str], evidence: Evidence) -> dict[str, Tensor]:
    """Uniform numbers from the seed, in the shape of each layer's weight."""
    random = torch.Generator().manual_seed(evidence.seed)
    shapes = {name: weight_of(model.get_submodule(name)).shape for name in layers}
    return {name: torch.rand(shape, generator=random) for name, shape in shapes.items()}
