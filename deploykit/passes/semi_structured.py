"""N:M sparsity: of M neighbouring inputs of an output at most N keep their weight, as sparse tensor cores want it.

Mishra et al. 2021, "Accelerating Sparse Deep Neural Networks": 2 of 4 along the input channels, on NVIDIA GPUs from
Ampere on. The zeros are held by masks like those of `sparsify`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, ClassVar

from deploykit.core.context import Context
from deploykit.core.errors import DeploykitError
from deploykit.core.recipe import Stage
from deploykit.core.target import Need, Profit

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class SemiStructured:
    """Leaves N weights of every M along the inputs of a layer."""

    pattern: str = "2:4"
    """N:M."""
    criterion: str = "auto"
    """obs where there are 32 calibration samples or more, else l1; or one of those of `prune` that score weights."""
    skip: tuple[str, ...] = ()
    """Layers that keep all weights, by name or pattern."""

    stage: ClassVar[Stage] = "model"
    needs: ClassVar[tuple[Need, ...]] = ()
    pays_if: ClassVar[tuple[Profit, ...]] = ("2:4",)

    def __post_init__(self) -> None:
        """Refuses what is no pattern."""
        found = re.fullmatch(r"(\d+):(\d+)", self.pattern)
        if found is None or not 0 < int(found[1]) < int(found[2]):
            raise ValueError(f"pattern must be N:M with 0 < N < M, such as 2:4; given {self.pattern!r}")

    def foresee(self, context: Context) -> None:
        """Refuses a criterion that is unknown or lacks data."""
        from deploykit.pruning.choose import resolved

        resolved(self.criterion, context, "semi_structured")

    def __call__(self, model: nn.Module, context: Context) -> nn.Module:
        """A copy of the model with masks on the weights of layers whose input channels come in multiples of M.

        Raises:
            DeploykitError: there is no such layer; unknown criterion or layer; the criterion lacks data.
        """
        from deploykit.pruning.choose import kept, layers_of, masked, resolved
        from deploykit.pruning.masks import fits, n_of_m

        n, m = map(int, self.pattern.split(":"))
        criterion = resolved(self.criterion, context, "semi_structured")
        found = layers_of(model, self.skip, "semi_structured")
        layers = [name for name, layer in found.items() if fits(layer.weight, m)]
        if not layers:
            raise DeploykitError(f"semi_structured: no layer has input channels in multiples of {m}")
        sparse = masked(model, layers, criterion, context, [partial(n_of_m, n=n, m=m)], (n, m))
        context.note(kept(sparse, repr(self)))
        return sparse
