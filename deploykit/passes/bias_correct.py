"""Bias correction: shift every channel back to the mean it had in float.

Rounding weights and activations changes the mean of each output channel; the shift is known from calibration data and
is removed by the bias (Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and Bias Correction",
section 4.2, empirical form). Layers are corrected in order, each on the outputs of the layers corrected before it:

    b_c  +=  E[y_c]  -  E[ (W_q x_q + b)_c ]

E[y_c] was measured on the float network (`Ranges.means`). A layer is linear, so E[W_q x_q + b] = W_q E[x_q] + b: the
layer runs once, on the mean of its integer inputs. Those are needed sample by sample, and the network produces them
once, in stretches from one layer to the next (`deploykit.hub.fitting.activations`).
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
class BiasCorrect:
    """Empirical, sequential bias correction. Weights and scales do not change.

    The one step that works on 8-bit floating point too: W_q and x_q are then floats of 8 bits.
    """

    samples: int = AVERAGED
    """Of the calibration data, evenly spread: means need no more."""

    stage: ClassVar[Stage] = "hub"
    needs: ClassVar[tuple[Need, ...]] = ("data",)
    pays_if: ClassVar[tuple[Profit, ...]] = ("int8",)

    def __post_init__(self) -> None:
        """Refuses what gives no means."""
        if self.samples < 1:
            raise ValueError("samples must be 1 or more")

    def __call__(self, hub: Hub, context: Context) -> Hub:
        """The hub with corrected biases."""
        from deploykit.hub.fitting.refit import refit
        from deploykit.hub.fitting.rounding import to_nearest

        data = context.need("calibration", "bias_correct")
        return refit(hub, data, "bias_correct", to_nearest, samples=self.samples, widest=0)
