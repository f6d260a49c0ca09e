"""What a budget counts: the size of a network in some unit, and the share of it that a smaller one saves."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

from torch import nn

from deploykit.core.context import Context
from deploykit.core.errors import DeploykitError
from deploykit.pruning.layers import mixes, width

Unit = Literal["macs", "params", "bytes", "channels", "artifact", "ms"]
WORDS: Mapping[Unit, str] = {"artifact": "bytes of the artifact", "ms": "milliseconds"}
COUNTED: Mapping[Unit, Unit] = {"artifact": "params", "ms": "macs"}
"""Units that take a file to be measured, and those that are counted where single channels are compared: what one
channel saves of a file or of its time is lost among everything else."""
LEVELS = 128
"""Of a budget that is sought by measuring: 8 measurements."""


def size(unit: Unit, context: Context, who: str = "prune") -> Callable[[nn.Module], float]:
    """What a network has of a unit.

    Raises:
        DeploykitError: the context cannot tell, or files for its target are not timed here; says what comes nearest.
    """
    if unit == "channels":
        return lambda module: sum(width(layer, "out") for layer in module.modules() if mixes(layer))
    if unit == "ms":
        times = context.times
        if times is None:
            target = context.target
            why = "the context times no files" if target.measured_here else "its files are not timed on this machine"
            raise DeploykitError(
                f"{who}: milliseconds on target '{target.name}' cannot be counted: {why}. The nearest is of = 'macs'"
            )
        return lambda module: times([module])[0]
    if unit == "artifact":
        if context.file_bytes is None:
            raise DeploykitError(f"{who}: the context writes no files to count the bytes of; use of = 'params'")
        return context.file_bytes
    cost = context.cost
    if cost is None:
        raise DeploykitError(f"{who}: the context has no cost to count {unit} with; use of = 'channels'")
    return lambda module: float(getattr(cost(module), unit))


def saving(unit: Unit, whole: nn.Module, context: Context, who: str = "prune") -> Callable[[nn.Module], float]:
    """The share of a unit that a smaller network saves of the whole one; times are taken in turns with the whole's.

    Raises:
        DeploykitError: as `size`.
    """
    measure = size(unit, context, who)
    if unit == "ms":
        assert context.times is not None
        times = context.times

        def faster(module: nn.Module) -> float:
            before, after = times([whole, module])
            return 1.0 - after / before

        return faster
    before = measure(whole)
    return lambda module: 1.0 - measure(module) / before
