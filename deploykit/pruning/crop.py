"""Channels taken out of layers, and what becomes of the layers' tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize

from deploykit.hub.structure import is_own, mask_of
from deploykit.layerwise.channels import Side, is_depthwise, sides, weight_axis, width


class Port(NamedTuple):
    """Where a layer takes or gives channels. Layers that work channel by channel have one port, ``in``."""

    layer: str
    side: Side


def can_be_cropped(layer: nn.Module) -> bool:
    """False where somebody else's parametrization (weight norm) makes the weight: its own tensors are unknown."""
    if not parametrize.is_parametrized(layer):
        return True
    chains: Any = layer.parametrizations
    return all(is_own(layer, name) for name in chains)


def crop(model: nn.Module, removed: Mapping[Port, Iterable[int]]) -> None:
    """Takes channels out of layers, in place. Nothing is checked: see `deploykit.pruning.groups`.

    Args:
        model: changed; give a copy.
        removed: channels by port. All groups of a grouped convolution lose the same ones.
    """
    for name in dict.fromkeys(port.layer for port in removed):
        layer = model.get_submodule(name)
        kept: dict[Side, Tensor] = {}
        for side in sides(layer):
            gone = set(removed.get(Port(name, side), ()))
            kept[side] = torch.tensor([c for c in range(width(layer, side)) if c not in gone], dtype=torch.long)
        if isinstance(layer, nn.Linear):
            _select(layer, "weight", {0: kept["out"], 1: kept["in"]})
            _select(layer, "bias", {0: kept["out"]})
            layer.in_features, layer.out_features = len(kept["in"]), len(kept["out"])
        elif isinstance(layer, nn.Embedding):
            _select(layer, "weight", {1: kept["out"]})
            layer.embedding_dim = len(kept["out"])
        elif isinstance(layer, _ConvNd):
            _crop_convolution(layer, kept)
        elif isinstance(layer, nn.PReLU):
            _select(layer, "weight", {0: kept["in"]})
            layer.num_parameters = len(kept["in"])
        elif isinstance(layer, _NormBase):
            for tensor in ("weight", "bias", "running_mean", "running_var"):
                _select(layer, tensor, {0: kept["in"]})
            layer.num_features = len(kept["in"])


def _crop_convolution(layer: _ConvNd, kept: Mapping[Side, Tensor]) -> None:
    if is_depthwise(layer):
        read = kept["in"]
        multiplier = layer.out_channels // layer.in_channels
        written = (read[:, None] * multiplier + torch.arange(multiplier)).flatten()
        _select(layer, "weight", {0: read if layer.transposed else written})
        layer.groups = len(read)
    else:
        read, written = kept["in"], kept["out"]
        # one side of the weight has all channels, the other those of a single group
        whole: Side = "in" if layer.transposed else "out"
        chosen = {side: own if side == whole else own[: len(own) // layer.groups] for side, own in kept.items()}
        _select(layer, "weight", {weight_axis(layer, side): own for side, own in chosen.items()})
    _select(layer, "bias", {0: written})
    layer.in_channels, layer.out_channels = len(read), len(written)


def _select(layer: nn.Module, name: str, kept: Mapping[int, Tensor]) -> None:
    """Replaces a parameter or buffer, and the mask on it, by what is kept of it along some dimensions."""

    def chosen(tensor: Tensor) -> Tensor:
        for axis, own in kept.items():
            tensor = tensor.index_select(axis, own.to(tensor.device))
        return tensor.clone()

    mask = mask_of(layer, name)
    owner: Any = layer
    leaf = name
    if mask is not None:
        mask.mask = chosen(mask.mask)
        owner, leaf = owner.parametrizations[name], "original"
    held = getattr(owner, leaf)
    if held is None:
        return
    new = chosen(held.detach())
    setattr(owner, leaf, nn.Parameter(new, held.requires_grad) if isinstance(held, nn.Parameter) else new)
