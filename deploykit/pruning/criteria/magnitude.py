"""Magnitude: small weights matter little. Han et al. 2015 (L1, L2 of weights); Li et al. 2017 (L1 of filters)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from deploykit.layerwise.channels import weight_of
from deploykit.pruning.criteria.evidence import Evidence


def l1(model: nn.Module, layers: Sequence[str], evidence: Evidence) -> dict[str, Tensor]:
    """|w|, in the shape of each layer's weight."""
    return {name: weight_of(model.get_submodule(name)).detach().abs() for name in layers}


def l2(model: nn.Module, layers: Sequence[str], evidence: Evidence) -> dict[str, Tensor]:
    """w², in the shape of each layer's weight; summed it is the square of the L2 norm, which ranks alike."""
    return {name: weight_of(model.get_submodule(name)).detach().square() for name in layers}
