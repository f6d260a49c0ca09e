"""Weight correction: what rounding did to a layer's inputs is undone by its weights, not by its bias alone.

Bias correction gives every channel its mean back. But a layer of the quantized network also reads inputs with noise on
them, correlated with what it should read; the weights that answer best there are not the trained ones:

    T = E[y xᵀ] (E[x xᵀ])⁻¹        x: inputs in the quantized network, y: outputs in the float network

(Hubara et al. 2021, "Accurate Post Training Quantization With Small Calibration Sets"; see
`deploykit.hub.fitting.refit` for how few samples are kept from fixing too much). T is rounded to the nearest integers;
the bias takes the rest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from deploykit.core.context import Context
from deploykit.core.ranges import AVERAGED
from deploykit.core.recipe import Stage
from deploykit.core.target import Need, Profit

if TYPE_CHECKING:
    from deploykit.hub.graph import Hub


@dataclass(frozen=True)
class WeightCorrect:
    """Regresses every layer on the float network's answers; rounds to nearest."""

    samples: int = AVERAGED
    """Of the calibration data, evenly spread; more cost time and hardly help at 8 bits."""
    positions: int = 16
    """Output positions per input of a layer that the statistics are averaged over, of all samples together."""
    widest: int = 256
    """Layers with more inputs per output keep their integers: noise averages out in them, and their equations cost the
    cube of their width. Their biases are corrected all the same."""

    stage: ClassVar[Stage] = "hub"
    needs: ClassVar[tuple[Need, ...]] = ("data",)
    pays_if: ClassVar[tuple[Profit, ...]] = ("int8",)

    def __post_init__(self) -> None:
        """Refuses what gives no statistics."""
        if self.positions < 1 or self.samples < 1 or self.widest < 0:
            raise ValueError("positions and samples must be 1 or more, widest 0 or more")

    def __call__(self, hub: Hub, context: Context) -> Hub:
        """The hub with other integers, weight scales and biases."""
        from deploykit.hub.fitting.refit import refit
        from deploykit.hub.fitting.rounding import to_nearest

        return refit(
            hub, context.need("calibration", "weight_correct"), "weight_correct", to_nearest, samples=self.samples,
            positions=self.positions, widest=self.widest, seed=context.seed,
        )  # fmt: skip
