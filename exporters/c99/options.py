"""The ``[options]`` table of a target of the c99 exporter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from deploykit.core.errors import DeploykitError
from deploykit.core.tables import from_table
from deploykit.core.target import Target
from deploykit.exporters.c99.rounding import Rounding


@dataclass(frozen=True)
class Options:
    """How sums are rounded, and what there is room for."""

    rounding: Rounding
    weights: Literal["plain", "coded"] = "plain"
    """How they lie in flash; coded: entropy-coded where that is smaller, and decoded layer by layer into the arena."""
    flash_bytes: int | None = None
    """Read-only memory for weights and code; None: not limited."""
    ram_bytes: int | None = None
    """Memory for activations, inputs, outputs and stack."""
    cross: str = 'CC=… AR=… CFLAGS="-O2 …"'
    """What stands before ``make`` to compile for the processor."""
    synthesis: bool = False
    """Whether the C becomes logic: then there is no code in flash and no stack."""

    def __post_init__(self) -> None:
        """Refuses budgets of nothing."""
        if min(self.flash_bytes or 1, self.ram_bytes or 1) < 1:
            raise ValueError("flash_bytes and ram_bytes must be positive")


def options(target: Target) -> Options:
    """The target's options, validated against how it stores numbers.

    Raises:
        DeploykitError: an unknown or missing key, a wrong value, a [quant] this exporter cannot write.
    """
    found = from_table(Options, target.options, f"target {target.name} [options]")
    quant = target.quant
    if quant.placement != "everywhere" or quant.bias != "int32":
        raise DeploykitError(
            f'target {target.name}: integer programs need placement = "everywhere" and bias = "int32" in [quant]'
        )
    if found.rounding == "floor_folded_half" and quant.scale != "power_of_two":
        raise DeploykitError(
            f'target {target.name}: rounding = "floor_folded_half" shifts; it needs scale = "power_of_two" in [quant]'
        )
    return found
