"""`Explanation`: all there is to say about one integer file, as values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from deploykit.calibration.growth import Convergence
from deploykit.core.precision import Precision
from deploykit.report.spans import Span

State = Literal["integer", "moves", "weights", "float"]
"""moves: it only selects or rearranges integers. weights: they alone are integers; what is computed with them is the
runtime's business."""


@dataclass(frozen=True)
class Operator:
    """One operator of the file. None means not measured, never 0."""

    layer: str
    operator: str
    state: State
    why: str = ""
    """Why it stayed in float; empty also where weights alone become integers and it has none."""
    bits: int | None = None
    """Of its weights, where a step chose them layer by layer."""
    sqnr_db: float | None = None
    """Signal to noise of this operator quantized alone, fed with what the float network feeds it."""
    weights: float | None = None
    """Percent of the answers' error that comes from rounding its weights."""
    values: float | None = None
    """Percent of the answers' error that comes from rounding the tensor it writes."""
    ms: float | None = None
    """Of one call on this machine, median."""
    converting_ms: float | None = None
    """Spent beside it on turning integers into floats and back."""
    runs_in: str = ""
    """What the runtime computes in here, ``"float"`` or ``"integer"``; empty: it does not tell."""
    slow: tuple[str, ...] = ()
    """Why it is slower than it could be on this target, one phrase each."""

    @property
    def share(self) -> float | None:
        """Percent of the answers' error that is its own."""
        return None if self.weights is None and self.values is None else (self.weights or 0.0) + (self.values or 0.0)


@dataclass(frozen=True)
class Quality:
    """How close the integers of a hub answer to the float network."""

    sqnr_db: float
    """Of the worst output."""
    agreement: float | None
    """Percent of the samples with the same top-1 class; None: the model gives no class scores."""
    metric: float | None
    """Top-1 in percent, where there are labels."""


@dataclass(frozen=True)
class Alternative:
    """Another way of making the integers, measured on the same samples."""

    what: str
    option: str
    """What to type or to write into the recipe."""
    quality: Quality
    gain_db: float
    gain_points: float | None
    """Of the metric, where there are labels; else of agreement."""
    bytes: int
    """That the file grows by."""
    seconds: float
    """CPU time of making these integers."""


@dataclass(frozen=True)
class Part:
    """What comes out of calibrating on a part of the samples."""

    samples: int
    quality: Quality


@dataclass(frozen=True)
class Measured:
    """What was measured with sample data at hand."""

    data: str
    samples: int
    """That the answers were compared on."""
    quality: Quality
    """Of the hub as it was exported."""
    accounted_db: float
    """Signal to noise if every operator's own error is added up."""
    input: float
    """Percent of the answers' error that comes from rounding the inputs of the network."""
    alternatives: tuple[Alternative, ...]
    """The greatest gain first."""
    parts: tuple[Part, ...]
    """The smallest first; the last is all samples."""
    seconds: float
    """CPU time of it all."""

    @property
    def enough(self) -> int | None:
        """The smallest part, at most half of the samples, from which on the answers are as good as with all of them
        (within `STILL`); None: there is none, or there are too few to tell."""
        best = self.parts[-1] if self.parts else None
        if best is None:
            return None
        found = None
        for part in reversed(self.parts):
            if part.quality.sqnr_db < best.quality.sqnr_db - STILL:
                break
            found = part.samples
        return found if found is not None and 2 * found <= best.samples else None


STILL = 0.5
"""Decibels: agreement with the float network does not tell them apart."""


@dataclass(frozen=True)
class Explanation:
    """One integer file of an artifact."""

    folder: str
    path: str
    precision: Precision
    target: str
    operators: tuple[Operator, ...]
    """In the network's order."""
    spans: tuple[Span, ...]
    """What values tensors took, and the range that was chosen."""
    tensors: int
    """How many there are, of which `spans` shows some."""
    thresholds: str
    convergence: Convergence | None
    notes: tuple[str, ...]
    """About the calibration data."""
    measured: Measured | None = None
    timed_on: str = ""
    """Machine and runtime of the times; empty: the runtime tells no times operator by operator."""

    def count(self, state: State) -> int:
        """How many operators are in that state."""
        return sum(o.state == state for o in self.operators)

    @property
    def worst(self) -> tuple[Operator, ...]:
        """Those that were measured: by their share of the answers' error, else by their own error; worst first."""
        if self.measured is not None:
            return tuple(sorted((o for o in self.operators if o.share is not None), key=lambda o: -(o.share or 0.0)))
        return tuple(sorted((o for o in self.operators if o.sqnr_db is not None), key=lambda o: o.sqnr_db or 0.0))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        found: dict[str, Any] = msgspec.to_builtins(self)
        found["spans"] = [
            {k: v for k, v in span.items() if k in ("name", "low", "high", "stretch")} for span in found["spans"]
        ]
        if self.convergence is not None:
            found["convergence"] = {
                "said": self.convergence.sentence(), "enough": self.convergence.enough,
                "parts": list(self.convergence.parts), "largest": list(self.convergence.largest),
                "median": list(self.convergence.median),
            }  # fmt: skip
        if self.measured is not None:
            found["measured"]["enough"] = self.measured.enough
        return found
