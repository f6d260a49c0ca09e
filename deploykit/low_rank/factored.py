"""`Factored`: a layer that became a chain of smaller ones, and what the chain is made of."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn
from torch.nn.modules.conv import _ConvNd

Ranks = tuple[int, ...]
"""What the ranks of a form mean says its file; ``channel`` has (k, j)."""
Place = Literal["in", "mid", "out"]
"""Where a factor runs: at the positions of the layer's input, of its input after a column has run along it, of its
output."""
SIZES = ("in_channels", "out_channels", "groups", "in_features", "out_features")


class Factored(nn.Sequential):
    """Ordinary modules one after the other, in the place of the layer whose sizes it remembers.

    Args:
        layer: what it stands for.
        form: a name in `deploykit.low_rank.forms`.
        ranks: of that form.
        factors: the chain.
    """

    def __init__(self, layer: nn.Module, form: str, ranks: Ranks, factors: Sequence[nn.Module]) -> None:
        """In the layer's mode."""
        super().__init__(*factors)
        self.form, self.ranks = form, ranks
        for size in SIZES:
            if size in vars(layer):
                setattr(self, size, getattr(layer, size))
        self.train(layer.training)


@dataclass(frozen=True)
class Shape:
    """Of a convolution's or linear layer's weight."""

    f: int
    """Outputs."""
    c: int
    """Inputs, of all groups together."""
    kernel: tuple[int, ...]
    """Empty: a linear layer."""
    g: int
    """Groups."""

    @property
    def taps(self) -> int:
        """Weights of one kernel."""
        return math.prod(self.kernel)

    @property
    def weights(self) -> int:
        """How many there are."""
        return self.f * self.c // self.g * self.taps

    @property
    def depthwise(self) -> bool:
        """Whether every input channel is a group of its own."""
        return self.g == self.c > 1


def shape_of(layer: Any) -> Shape:
    """The shape of a convolution or linear layer, by its attributes."""
    if isinstance(layer, _ConvNd):
        return Shape(layer.out_channels, layer.in_channels, tuple(layer.kernel_size), layer.groups)
    return Shape(layer.out_features, layer.in_features, (), 1)


def carrier(layer: Any, inputs: int, outputs: int, groups: int) -> nn.Module:
    """A copy of the layer, with whatever its class does in forward, that carries its kernel between other channels.

    It has no bias; its weight ``[outputs, inputs / groups, *kernel]`` is to be filled.
    """
    held, bias = layer.weight, layer.bias
    made: Any = copy.deepcopy(layer, {id(held): held, id(bias): bias})
    made.weight = nn.Parameter(held.new_zeros((outputs, inputs // groups, *held.shape[2:])), held.requires_grad)
    made.bias = None
    if isinstance(made, _ConvNd):
        made.in_channels, made.out_channels, made.groups = inputs, outputs, groups
    else:
        made.in_features, made.out_features = inputs, outputs
    return made  # type: ignore[no-any-return]


def mixing(layer: Any, inputs: int, outputs: int, groups: int = 1, bias: bool = False) -> nn.Module:
    """What mixes channels where they are, position by position: a 1x1 convolution, or a linear layer.

    Args:
        layer: whose kind, type and device it has.
        inputs: channels.
        outputs: channels.
        groups: of channels.
        bias: whether it has one, if the layer has.
    """
    given = {"bias": bias and layer.bias is not None, "dtype": layer.weight.dtype, "device": layer.weight.device}
    made: nn.Module
    if isinstance(layer, _ConvNd):
        kind: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(layer.kernel_size) - 1]
        made = kind(inputs, outputs, 1, groups=groups, **given)
    else:
        made = nn.Linear(inputs, outputs, **given)
    return made.requires_grad_(layer.weight.requires_grad)
