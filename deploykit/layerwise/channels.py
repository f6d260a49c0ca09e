"""The layers whose channels can be taken out: what they read, what they write, and what becomes of their tensors."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

Side = Literal["in", "out"]


def mixes(layer: nn.Module) -> bool:
    """Whether the layer makes its output channels from all (or a group) of its input channels."""
    return isinstance(layer, (nn.Linear, nn.Embedding)) or (isinstance(layer, _ConvNd) and not is_depthwise(layer))


def is_channelwise(layer: nn.Module) -> bool:
    """Whether the layer has parameters or statistics per channel and keeps channels apart."""
    if isinstance(layer, nn.PReLU):
        return layer.num_parameters > 1
    if isinstance(layer, _NormBase):
        return layer.affine or layer.track_running_stats
    return isinstance(layer, _ConvNd) and is_depthwise(layer)


def sides(layer: nn.Module) -> tuple[Side, ...]:
    """The ports that a layer has."""
    return ("in", "out") if mixes(layer) else ("in",)


def weight_of(layer: nn.Module) -> Tensor:
    """The weight of a layer, as it computes with it."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight


def is_depthwise(layer: _ConvNd) -> bool:
    """Whether every input channel is a group of its own."""
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
    return layer.groups if isinstance(layer, _ConvNd) and not is_depthwise(layer) else 1


def weight_axis(layer: nn.Module, side: Side) -> int:
    """The dimension of the weight that counts the channels of one side (within a group where there are several)."""
    inputs_first = isinstance(layer, (nn.Embedding, _ConvTransposeNd))
    return int((side == "in") != inputs_first)
