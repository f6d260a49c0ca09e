"""GPTQ: integer weights for the least error of every layer's output, for 4 bits and fewer.

Frantar et al. 2023, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers": a layer's
columns are rounded one after another, and what each loses is made good by those not rounded yet,

    q_j = round(w_j / s),     e = (w_j - s q_j) / U_jj,     w_: -= e U_j:        U = the upper Cholesky factor of H⁻¹,

with H = E[x xᵀ] of the layer's inputs. What is rounded is not the weight but the target that does best on the inputs as
the quantized network gives them (`deploykit.hub.fitting.refit`). Afterwards single integers are moved while that helps
(coordinate descent), and scales and integers are fitted to each other. Scales are searched per output channel under the
same H. For convolutions H is that of the patches, for depthwise ones there is a small one per channel.
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
class Gptq:
    """Rounds weights for the least error of their layer's output, layer after layer."""

    positions: int = 128
    """Output positions per input of a layer that the statistics are averaged over, of all samples together."""

    stage: ClassVar[Stage] = "hub"
    needs: ClassVar[tuple[Need, ...]] = ("data",)
    pays_if: ClassVar[tuple[Profit, ...]] = ("int8", "int4")

    def __post_init__(self) -> None:
        """Refuses what gives no statistics."""
        if self.positions < 1:
            raise ValueError("positions must be 1 or more")

    def foresee(self, context: Context) -> None:
        """Refuses too few calibration samples."""
        enough(context, "gptq", LEAST_SAMPLES, "chooses integers by what they do to the data", FEWER)

    def __call__(self, hub: Hub, context: Context) -> Hub:
        """The hub with other integers, weight scales and biases.

        Raises:
            DeploykitError: too few calibration samples.
        """
        from deploykit.hub.fitting.refit import refit
        from deploykit.hub.fitting.rounding import gptq

        self.foresee(context)
        data = context.need("calibration", "gptq")
        return refit(hub, data, "gptq", gptq, positions=self.positions, seed=context.seed, journal=context.journal)
