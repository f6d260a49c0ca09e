"""Bit rounding: float weights, codebooks and biases keep few bits behind the point, and a file that is packed needs not
keep the rest.

Zender 2016, "Bit Grooming", and Klöwer et al. 2021, "Compressing atmospheric data into its real information content",
section "Rounding": a float32 is rounded to the nearest that has only k of the 23 bits of its mantissa, to the even one
of two that are as near. It is off by 2^-(k+1) of itself at most, far less than sharing and pruning change. What is no
weight (limits, epsilons, sizes) is left: such numbers are often exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from numpy.typing import NDArray

from deploykit.core.context import Context
from deploykit.core.recipe import Stage
from deploykit.core.target import Need, Profit
from deploykit.hub.operators import PRODUCTS

if TYPE_CHECKING:
    from deploykit.hub.graph import FloatGraph

MANTISSA = 23
"""Bits of a float32's."""
READERS = {
    *PRODUCTS, "LSTM", "GRU", "RNN", "Add", "Gather", "BatchNormalization", "InstanceNormalization",
    "LayerNormalization", "GroupNormalization", "PRelu",
}  # fmt: skip
"""Operators whose constants are weights and biases."""


@dataclass(frozen=True)
class Bitround:
    """Rounds float constants to ``keep`` bits of mantissa; 7 are those of a bfloat16, 10 those of a float16."""

    keep: int = 7

    stage: ClassVar[Stage] = "graph"
    needs: ClassVar[tuple[Need, ...]] = ()
    pays_if: ClassVar[tuple[Profit, ...]] = ("small_file",)

    def __post_init__(self) -> None:
        """Refuses bits that a float32 does not have."""
        if not 1 <= self.keep < MANTISSA:
            raise ValueError(f"keep must lie between 1 and {MANTISSA - 1}, given {self.keep}")

    def __call__(self, graph: FloatGraph, context: Context) -> FloatGraph:
        """The graph with rounded constants."""
        from deploykit.hub.graph import constant
        from deploykit.hub.sharing.codebooks import with_weights

        initializers, found = graph.model.graph.initializers, dict[str, NDArray[np.float32]]()
        for node in graph.model.graph:
            for value in node.inputs if node.op_type in READERS else ():
                name, array = value.name if value is not None else None, constant(value)
                if name in initializers and name is not None and array is not None and array.dtype == np.float32:
                    found[name] = rounded(array, self.keep) if array.size > 1 else array
        return with_weights(graph, found)


def rounded(x: NDArray[np.float32], keep: int) -> NDArray[np.float32]:
    """The nearest numbers with so many bits of mantissa; what is not finite, or would not be, stays as it is."""
    drop = np.uint32(MANTISSA - keep)
    bits = np.ascontiguousarray(x).view(np.uint32)
    even = (bits >> drop) & np.uint32(1)
    half = np.uint32((1 << (MANTISSA - keep - 1)) - 1)
    found = ((bits + half + even) >> drop << drop).view(np.float32)
    return np.where(np.isfinite(x) & np.isfinite(found), found, x)
