"""Batch normalisation's scale: a channel multiplied by almost nothing matters little.

Liu et al. 2017, "Learning Efficient Convolutional Networks through Network Slimming".
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from deploykit.pruning.criteria.evidence import Evidence
from deploykit.pruning.crop import Port


def bn_scale(model: nn.Module, layers: Sequence[str], evidence: Evidence) -> dict[Port, Tensor]:
    """|gamma| by normalisation layer, ``[channels]``."""
    norms = {name: model.get_submodule(name) for name in layers}
    return {
        Port(name, "in"): norm.weight.detach().abs()
        for name, norm in norms.items()
        if isinstance(norm, _NormBase) and norm.affine
    }
