"""Block reconstruction: chooses the integers of whole blocks of layers, for the least error of what they put out.

Li et al. 2021, "BRECQ: Pushing the Limit of Post-Training Quantization by Block Reconstruction". gptq sees a layer's
output before its activation and before what the next layer makes of it; a block's output shows both. Block after block,
its layers are rounded by gptq, and from there roundings and biases are learned. How a block is learned:
`deploykit.hub.fitting.reconstruction`; where it begins and ends: `deploykit.hub.fitting.blocks`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from deploykit.core.context import Context, enough
from deploykit.core.recipe import Stage
from deploykit.core.target import Need, Profit

if TYPE_CHECKING:
    from deploykit.hub.graph import Hub

LEAST_SAMPLES = 32


@dataclass(frozen=True)
class Reconstruct:
    """Rounds by gptq and learns better roundings from there, for the least error of every block's output."""

    steps: int = 500
    """Of gradient descent, per block."""
    layers: int = 2
    """A block ends where it can, once it has so many."""
    batch: int = 16
    """Samples per step."""
    positions: int = 128
    """Output positions per input of a layer that gptq's statistics are averaged over, of all samples together."""

    stage: ClassVar[Stage] = "hub"
    needs: ClassVar[tuple[Need, ...]] = ("data",)
    pays_if: ClassVar[tuple[Profit, ...]] = ("int8", "int4")

    def __post_init__(self) -> None:
        """Refuses what learns nothing."""
        if min(self.steps, self.layers, self.batch, self.positions) < 1:
            raise ValueError("steps, layers, batch and positions must be 1 or more")

    def foresee(self, context: Context) -> None:
        """Refuses too few calibration samples."""
        why = "learns from most of the calibration samples, judges by the rest"
        enough(context, "reconstruct", LEAST_SAMPLES, why, "The step gptq works with 8.")

    def __call__(self, hub: Hub, context: Context) -> Hub:
        """The hub with other integers, weight scales and biases.

        Raises:
            DeploykitError: too few calibration samples, or an operator cannot be trained.
        """
        from deploykit.hub.fitting.reconstruction import reconstruct

        self.foresee(context)
        data = context.need("calibration", "reconstruct")
        return reconstruct(
            hub, data, size=self.layers, steps=self.steps, batch=self.batch, positions=self.positions,
            seed=context.seed, journal=context.journal,
        )  # fmt: skip
