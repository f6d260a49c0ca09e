"""What is lost with channels, the layers that read them make good with those they still read, before the channels go.

He et al. 2017, "Channel Pruning for Accelerating Very Deep Neural Networks", section 3.1 (`deploykit.layerwise.refit`).
"""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn.utils import parametrize

from deploykit.core.data import DataSet
from deploykit.hub.structure import attach_mask, bake, is_own, set_parameter
from deploykit.layerwise.channels import mixes, weight_of
from deploykit.layerwise.refit import refit
from deploykit.pruning.surgery import Removed, read_by


def compensated(model: nn.Module, removed: Removed, data: DataSet) -> nn.Module:
    """A copy of the same size, whose weights on other channels make up for those on the removed ones.

    Args:
        model: not changed.
        removed: channels that will go.
        data: unlabelled samples.
    """
    masked = copy.deepcopy(model)
    for port, channels in removed.items():
        layer = masked.get_submodule(port.layer)
        if port.side == "in" and mixes(layer):
            lives = torch.ones_like(weight_of(layer), dtype=torch.bool)
            lives[read_by(layer, channels)] = False
            attach_mask(layer, "weight", lives)
    fitted = bake(refit(masked, model, data))[0].state_dict()
    whole = copy.deepcopy(model)
    whole.load_state_dict({name: fitted.get(name, own) for name, own in whole.state_dict().items()})
    for name, layer in whole.named_modules():
        for leaf in list(layer.parametrizations) if parametrize.is_parametrized(layer) else []:
            if is_own(layer, leaf):  # others are not refitted
                set_parameter(layer, leaf, fitted[f"{name}.{leaf}" if name else leaf])
    return whole
