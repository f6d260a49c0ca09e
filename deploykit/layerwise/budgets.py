"""Budgets: what is counted, how much of it a network has, and the share that a smaller one saves."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

from torch import nn

from deploykit.core.context import Context
from deploykit.core.errors import DeploykitError
from deploykit.core.progress import say
from deploykit.layerwise.channels import mixes, width

Unit = Literal["macs", "params", "bytes", "channels", "artifact", "ms"]
WORDS: Mapping[Unit, str] = {"artifact": "bytes of the artifact", "ms": "milliseconds"}
COUNTED: Mapping[Unit, Unit] = {"artifact": "params", "ms": "macs"}
"""Units that take a file to be measured, and those that are counted where single channels are compared: what one
channel saves of a file or of its time is lost among everything else."""
LEVELS = 128
"""Of a budget that is sought by measuring: 8 measurements."""


class NotEnough(DeploykitError):
    """All that may go saves less than was asked for.

    Args:
        amount: the share that was asked for.
        possible: the share that can be saved.
    """

    def __init__(self, amount: float, possible: float) -> None:
        """Says both."""
        super().__init__(f"{amount:.1%} cannot be saved; at most {max(0.0, possible):.1%} can")
        self.possible = possible


def refuse_budget(amount: float | None, at_most: float | None) -> None:
    """Raises ValueError unless one of both is given, a share or what may be left, and within its range."""
    if (amount is None) == (at_most is None):
        raise ValueError("give either amount, the share to save, or at_most, what may be left (in the unit `of`)")
    if amount is not None and not 0.0 <= amount < 1.0:
        raise ValueError(f"amount must be at least 0 and below 1, given {amount}")
    if at_most is not None and not at_most > 0.0:
        raise ValueError(f"at_most must be above 0, given {at_most}")


def share_to_save(
    amount: float | None, at_most: float | None, unit: Unit, whole: nn.Module, context: Context, who: str
) -> float:
    """The amount, or the share that has to go so that at most so much is left.

    Raises:
        DeploykitError: as `size`.
    """
    if amount is not None:
        return amount
    assert at_most is not None
    before = size(unit, context, who)(whole)
    share = max(0.0, 1.0 - at_most / before)
    said = WORDS.get(unit, unit)
    say(f"{who}: at most {at_most:,g} {said} of {before:,.6g} may be left: {share:.1%} have to be saved")
    return share


def size(unit: Unit, context: Context, who: str) -> Callable[[nn.Module], float]:
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


def saving(unit: Unit, whole: nn.Module, context: Context, who: str) -> Callable[[nn.Module], float]:
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
