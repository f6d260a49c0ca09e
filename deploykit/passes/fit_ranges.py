"""Activation ranges by what they do to the network's outputs (see `deploykit.hub.fitting.range_search`).

Threshold methods look at one tensor's values (``--thresholds``). Nagel et al. 2021, "A White Paper on Neural Network
Quantization", section 3.1, compares them by the error of the tensor itself or of the next layer; here the measure is
what is wanted in the end, the error of the outputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from deploykit.core.context import Context
from deploykit.core.recipe import Stage
from deploykit.core.target import Need, Profit

if TYPE_CHECKING:
    from deploykit.hub.graph import Hub


@dataclass(frozen=True)
class FitRanges:
    """Shrinks every activation range as long as the outputs get better by it."""

    samples: int = 64
    """Of the calibration data, evenly spread."""

    stage: ClassVar[Stage] = "hub"
    needs: ClassVar[tuple[Need, ...]] = ("data",)
    pays_if: ClassVar[tuple[Profit, ...]] = ("int8", "int4")

    def __post_init__(self) -> None:
        """Refuses what nothing can be judged by."""
        if self.samples < 1:
            raise ValueError("samples must be 1 or more")

    def __call__(self, hub: Hub, context: Context) -> Hub:
        """The hub with other activation scales and zero points; biases in the new steps."""
        from deploykit.hub.fitting.range_search import search_ranges

        data = context.need("calibration", "fit_ranges").spread(self.samples)
        return search_ranges(hub, data, "fit_ranges", context.journal)
