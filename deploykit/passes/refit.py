"""Refit: the weights that pruning left take over what the others did, layer by layer, without labels or training.

He et al. 2017, "Channel Pruning for Accelerating Very Deep Neural Networks", section 3.1, for any mask and on inputs as
the pruned layers in front have made them (`deploykit.layerwise.refit`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from deploykit.core.context import Context, enough
from deploykit.core.errors import said_by
from deploykit.core.recipe import Stage
from deploykit.core.target import Need, Profit

if TYPE_CHECKING:
    from torch import nn

LEAST_SAMPLES = 32


@dataclass(frozen=True)
class Refit:
    """Fits the layers of a pruned model to what the original's layers give."""

    stage: ClassVar[Stage] = "model"
    needs: ClassVar[tuple[Need, ...]] = ("data", "teacher")
    pays_if: ClassVar[tuple[Profit, ...]] = ("structured", "unstructured", "2:4", "small_file")

    def foresee(self, context: Context) -> None:
        """Refuses too few calibration samples."""
        fewer = "The step reestimate_bn works with fewer."
        enough(context, "refit", LEAST_SAMPLES, "fits weights to the data", fewer)

    def __call__(self, model: nn.Module, context: Context) -> nn.Module:
        """A copy of the model with other weights, biases and running means; its zeros stay zero.

        Raises:
            DeploykitError: too few calibration samples; layers of other widths than the original's.
        """
        from deploykit.layerwise.refit import refit

        self.foresee(context)
        data = context.need("calibration", "refit")
        with said_by("refit"):
            return refit(model, context.original, data)
