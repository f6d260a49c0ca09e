"""The layers whose channels can be taken out: what they read, what they write, and what becomes of their tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils import parametrize

from deploykit.hub.structure import mask_of

Side = Literal["in", "out"]


class Port(NamedTuple):
    """Where a layer takes or gives channels. Layers that work channel by channel have one port, ``in``."""

    layer: str
    side: Side


def mixes(layer: nn.Module) -> bool:
    """Whether the layer makes its output channels from all (or a group) of its input channels."""
    return isinstance(layer, (nn.Linear, nn.Embedding)) or (isinstance(layer, _ConvNd) and not _depthwise(layer))


def is_channelwise(layer: nn.Module) -> bool:
    """Whether the layer has parameters or statistics per channel and keeps channels apart."""
    if isinstance(layer, nn.PReLU):
        return layer.num_parameters > 1
    if isinstance(layer, _NormBase):
        return layer.affine or layer.track_running_stats
    return isinstance(layer, _ConvNd) and _depthwise(layer)


def sides(layer: nn.Module) -> tuple[Side, ...]:
    """The ports that a layer has."""
    return ("in", "out") if mixes(layer) else ("in",)


def weight_of(layer: nn.Module) -> Tensor:
    """The weight of a layer, as it computes with it."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight


def _depthwise(layer: _ConvNd) -> bool:
    return layer.groups == layer.in_channels > 1


def axis(layer: nn.Module, tensor: Tensor) -> int:
    """The dimension of what a layer reads or writes that counts its channels."""
    return tensor.ndim - 1 if isinstance(layer, (nn.Linear, nn.Embedding)) else min(1, tensor.ndim - 1)


def width(layer: nn.Module, side: Side) -> int:
    """How many channels a layer takes or gives there; an embedding takes none."""
    if isinstance(layer, nn.Linear):
        return layer.in_features if side == "in" else layer.out_features
    if isinstance(layer, nn.Embedding):
        return 0 if side == "in" else layer.embedding_dim
    if isinstance(layer, _ConvNd):
        return layer.in_channels if side == "in" else layer.out_channels
    if isinstance(layer, nn.PReLU):
        return layer.num_parameters
    assert isinstance(layer, _NormBase)
    return layer.num_features


def groups_of(layer: nn.Module) -> int:
    """In how many groups a convolution splits its channels; all groups must stay equally wide."""
    return layer.groups if isinstance(layer, _ConvNd) and not _depthwise(layer) else 1


def weight_axis(layer: nn.Module, side: Side) -> int:
    """The dimension of the weight that counts the channels of one side (within a group where there are several)."""
    inputs_first = isinstance(layer, (nn.Embedding, _ConvTransposeNd))
    return int((side == "in") != inputs_first)


def can_be_cropped(layer: nn.Module) -> bool:
    """False where somebody else's parametrization (weight norm) makes the weight: its own tensors are unknown."""
    if not parametrize.is_parametrized(layer):
        return True
    chains: Any = layer.parametrizations
    return all(mask_of(layer, name) is not None and len(chain) == 1 for name, chain in chains.items())


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
    if _depthwise(layer):
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
