"""`Drift`: whether a device stays as fast as it begins."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median
from typing import Any

import msgspec

from deploykit.bench.compare import Timing
from deploykit.core.figures import milliseconds
from deploykit.devices.work import Window

MATTERS = 1.05
"""Below this, a change of the median is not worth a word."""


@dataclass(frozen=True)
class Drift:
    """One file over a sustained run."""

    timing: Timing
    windows: tuple[Window, ...]
    position: int
    """Of the file in each window."""

    @property
    def p50_ms(self) -> tuple[float, ...]:
        """Median of each window."""
        return tuple(w.p50_ms[self.position] for w in self.windows)

    @property
    def sustained_ms(self) -> float:
        """Median over the last quarter of the windows: what the device holds."""
        return median(self.p50_ms[-max(1, len(self.windows) // 4) :])

    @property
    def factor(self) -> float:
        """Sustained over the fastest of the first three windows; above 1 it became slower."""
        return self.sustained_ms / min(self.p50_ms[:3])

    def advice(self, name: str) -> str:
        """A sentence on what happened and what to do; empty where nothing did."""
        if self.factor < MATTERS:
            return ""
        first, last = self.windows[0], self.windows[-1]
        why = []
        if first.clock_mhz and last.clock_mhz and last.clock_mhz < 0.97 * first.clock_mhz:
            why.append(f"the clock went from {first.clock_mhz:.0f} to {last.clock_mhz:.0f} MHz")
        if first.celsius is not None and last.celsius is not None and last.celsius > first.celsius + 1:
            why.append(f"the temperature from {first.celsius:.0f} to {last.celsius:.0f} °C")
        because = f"; {' and '.join(why)}" if why else ""
        cool = "cool the device, lower its clock for good, or plan" if why else "plan"
        return (
            f"{name} takes {milliseconds(self.sustained_ms)} ms after {last.seconds / 60:.1f} minutes without a pause, "
            f"{self.factor:.2f} times what it took at first{because}: {cool} with the sustained figure"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "path": self.timing.file.path,
            "precision": self.timing.file.precision,
            "sustained_ms": self.sustained_ms,
            "factor": self.factor,
            "windows": [{**msgspec.to_builtins(w), "p50_ms": w.p50_ms[self.position]} for w in self.windows],
        }
