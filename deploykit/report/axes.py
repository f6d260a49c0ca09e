"""Axes of the report's charts: round numbers at the ticks."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

ROUND = (1.0, 2.0, 2.5, 5.0, 10.0)
MOST = 6
"""Ticks of a logarithmic axis."""
WIDE = 8.0
"""An axis whose largest value is this many times the smallest is logarithmic."""


@dataclass(frozen=True)
class Axis:
    """From values to 0..1, with ticks at round values."""

    low: float
    high: float
    logarithmic: bool
    ticks: tuple[float, ...]

    def __call__(self, value: float) -> float:
        """Where a value lies."""
        scale: Callable[[float], float] = math.log if self.logarithmic else float
        return (scale(value) - scale(self.low)) / (scale(self.high) - scale(self.low))


def round_step(span: float, parts: int) -> float:
    """The smallest round number of which at most ``parts`` fit into the span."""
    power = 10.0 ** math.floor(math.log10(span / parts))
    return next(r * power for r in ROUND if r * power * parts >= span * (1 - 1e-9))


def from_zero(top: float, parts: int = 4) -> Axis:
    """``0 .. top``, the top rounded up to a tick."""
    step = round_step(top, parts) if top > 0 else 1.0
    count = max(1, math.ceil(top / step - 1e-9))
    return Axis(0.0, count * step, False, tuple(i * step for i in range(count + 1)))


def around(values: list[float], least: float, ceiling: float = math.inf) -> Axis:
    """The values with room around them; spans ``least`` at least, and ends at the ceiling."""
    low, high = min(values), max(values)
    room = max(0.15 * (high - low), (least - (high - low)) / 2)
    step = round_step(high - low + 2 * room, 4)
    first, last = math.floor((low - room) / step), math.ceil((high + room) / step - 1e-9)
    ticks = [i * step for i in range(first, last + 1) if i * step <= ceiling + 1e-9]
    return Axis(ticks[0], min(last * step, max(ceiling, high)), False, tuple(ticks))


def positive(values: list[float]) -> Axis:
    """From zero, or logarithmic where the values are far apart."""
    low, high = min(values), max(values)
    if low <= 0 or high / low < WIDE:
        return from_zero(high * 1.05)
    low, high = low / 1.4, high * 1.4
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [r * 10.0**p for p in powers for r in (1.0, 2.0, 5.0) if low <= r * 10.0**p <= high]
    if len(ticks) > MOST:
        ticks = [10.0**p for p in powers if low <= 10.0**p <= high]
    return Axis(low, high, True, tuple(ticks[:: math.ceil(len(ticks) / MOST)]))
