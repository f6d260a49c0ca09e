"""Magnitude pruning: the smallest weights of the whole network become zeros that stay zero.

Han et al. 2015, "Learning both Weights and Connections for Efficient Neural Networks", with one threshold for all
layers. Weights of convolutions and linear layers take part; biases and normalisation do not. The zeros are held by a
parametrization ``w = mask * v`` (`deploykit.hub.structure`), so later training cannot fill them.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from deploykit.core.context import Context
from deploykit.core.errors import DeploykitError
from deploykit.core.recipe import Stage
from deploykit.core.target import Need, Profit

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Prune:
    """Sets the ``sparsity`` share of all weights with the smallest magnitude to zero."""

    sparsity: float
    """Share of the weights to remove, 0 < sparsity < 1."""

    stage: ClassVar[Stage] = "model"
    needs: ClassVar[tuple[Need, ...]] = ()
    pays_if: ClassVar[tuple[Profit, ...]] = ("unstructured", "small_file")

    def __post_init__(self) -> None:
        """Refuses a share outside (0, 1)."""
        if not 0.0 < self.sparsity < 1.0:
            raise ValueError(f"sparsity must lie between 0 and 1, given {self.sparsity}")

    def __call__(self, model: nn.Module, context: Context) -> nn.Module:
        """A pruned copy of the model.

        Raises:
            DeploykitError: the model has no convolution or linear layer.
        """
        import torch

        from deploykit.hub.structure import attach_mask

        pruned = copy.deepcopy(model)
        layers = [
            layer for layer in pruned.modules()
            if isinstance(layer, (torch.nn.Linear, torch.nn.modules.conv._ConvNd))
        ]  # fmt: skip
        if not layers:
            raise DeploykitError("prune: the model has no convolution or linear layer")
        with torch.no_grad():
            magnitudes = torch.cat([layer.weight.abs().flatten() for layer in layers])
            # exactly k of all layers' weights, also where magnitudes are equal
            k = round(self.sparsity * magnitudes.numel())
            lives = torch.ones_like(magnitudes, dtype=torch.bool)
            lives[magnitudes.argsort(stable=True)[:k]] = False
            parts = torch.split(lives, [layer.weight.numel() for layer in layers])
            for layer, mask in zip(layers, parts, strict=True):
                attach_mask(layer, "weight", mask.reshape(layer.weight.shape))
        return pruned
