"""AdaRound: learns for every weight whether to round it up or down, for the least error of its layer's output.

Nagel et al. 2020, "Up or Down? Adaptive Rounding for Post-Training Quantization". Layer after layer, on the inputs as
the quantized network gives them, against what the float network computes there (the asymmetric form of section 3.3);
what is rounded is the weight that does best on these inputs (`deploykit.hub.fitting.refit`), and the bias takes the
mean, so that no correction is needed afterwards. How a rounding is learned: `deploykit.hub.fitting.soft_rounding`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from deploykit.core.context import Context, enough
from deploykit.core.recipe import Stage
from deploykit.core.target import Need, Profit

if TYPE_CHECKING:
    from deploykit.hub.graph import Hub

LEAST_SAMPLES = 8
FEWER = "The step weight_correct works with fewer."


@dataclass(frozen=True)
class Adaround:
    """Rounds weights up or down for the least error of their layer's output, layer after layer."""

    steps: int = 500
    """Of gradient descent, per layer."""
    positions: int = 32
    """Output positions per input of a layer that the statistics are averaged over, of all samples together."""

    stage: ClassVar[Stage] = "hub"
    needs: ClassVar[tuple[Need, ...]] = ("data",)
    pays_if: ClassVar[tuple[Profit, ...]] = ("int8", "int4")

    def __post_init__(self) -> None:
        """Refuses what learns nothing."""
        if self.steps < 1 or self.positions < 1:
            raise ValueError("steps and positions must be 1 or more")

    def foresee(self, context: Context) -> None:
        """Refuses too few calibration samples."""
        enough(context, "adaround", LEAST_SAMPLES, "learns roundings from the data", FEWER)

    def __call__(self, hub: Hub, context: Context) -> Hub:
        """The hub with other integers, weight scales and biases.

        Raises:
            DeploykitError: too few calibration samples.
        """
        from functools import partial

        from deploykit.hub.fitting.refit import refit
        from deploykit.hub.fitting.soft_rounding import adaround

        self.foresee(context)
        data = context.need("calibration", "adaround")
        rounding = partial(adaround, steps=self.steps)
        return refit(
            hub, data, "adaround", rounding, positions=self.positions, seed=context.seed, journal=context.journal
        )
