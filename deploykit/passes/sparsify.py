"""Pruning of single weights: those worth least become zeros that stay zero.

What a weight is worth says the criterion: its magnitude (Han et al. 2015, "Learning both Weights and Connections for
Efficient Neural Networks"), or what its layer's output loses when the others make up for it, as much as that matters to
the network (Hassibi & Stork 1992; `deploykit.pruning.obs`). The zeros are held by a parametrization ``w = mask * v``
(`deploykit.hub.structure`), so later training cannot fill them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, ClassVar, Literal

from deploykit.core.context import Context
from deploykit.core.errors import said_by
from deploykit.core.recipe import Stage
from deploykit.core.target import Need, Profit

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Sparsify:
    """Sets the ``sparsity`` share of the weights of convolutions and linear layers to zero.

    Recurrent layers, embeddings and attention's joint projection keep theirs and are not counted.
    """

    sparsity: float
    """Share of the weights to remove, 0 < sparsity < 1."""
    criterion: str = "auto"
    """obs where there are 32 calibration samples or more, else l1; or one of those of `prune` that score weights."""
    scope: Literal["global", "layer"] = "global"
    """One threshold for all layers, or the same share of every layer."""
    skip: tuple[str, ...] = ()
    """Layers that keep all weights, by name or pattern."""

    stage: ClassVar[Stage] = "model"
    needs: ClassVar[tuple[Need, ...]] = ()
    pays_if: ClassVar[tuple[Profit, ...]] = ("unstructured", "small_file")

    def __post_init__(self) -> None:
        """Refuses a share outside (0, 1)."""
        if not 0.0 < self.sparsity < 1.0:
            raise ValueError(f"sparsity must lie between 0 and 1, given {self.sparsity}")

    def foresee(self, context: Context) -> None:
        """Refuses a criterion that is unknown or lacks data, and layers that the original does not have."""
        from deploykit.layerwise.products import products
        from deploykit.pruning.choose import resolved
        from deploykit.pruning.takable import foresee_layers

        resolved(self.criterion, context, "sparsify")
        foresee_layers(self.skip, context.original, products, "sparsify")

    def __call__(self, model: nn.Module, context: Context) -> nn.Module:
        """A copy of the model with masks on its weights. Biases and normalisation have none.

        Raises:
            DeploykitError: the model has no convolution or linear layer; unknown criterion or layer; the criterion
                lacks data.
        """
        from deploykit.pruning.choose import kept, layers_of, masked, resolved, rounds
        from deploykit.pruning.masks import layer_by_layer, network_wide

        criterion = resolved(self.criterion, context, "sparsify")
        layers = list(layers_of(model, self.skip, "sparsify"))
        choose = network_wide if self.scope == "global" else layer_by_layer
        n = rounds(criterion)  # the same share of what is left in each
        shares = [*(1 - (1 - self.sparsity) ** (k / n) for k in range(1, n)), self.sparsity]
        with said_by("sparsify"):
            sparse = masked(model, layers, criterion, context, [partial(choose, sparsity=share) for share in shares])
        context.note(kept(sparse, repr(self)))
        return sparse
