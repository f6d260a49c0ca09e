"""The report's small charts as values: fractions of a panel's width and what stands beside them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from deploykit.core.figures import file_size, milliseconds, number
from deploykit.core.manifest import Score
from deploykit.report.rows import Row

FULL = 2.0
"""Points of loss that fill a panel at least: a loss of 0.1 shall not look like a disaster."""


@dataclass(frozen=True)
class Bar:
    """One bar, from zero. ``value`` None: there is no figure, only the text."""

    label: str
    value: float | None
    """Of the panel's width."""
    text: str
    tick: float | None = None
    """Where p90 lies."""


@dataclass(frozen=True)
class Panel:
    """One small chart."""

    title: str
    caption: str
    bars: tuple[Bar, ...]


def charts(found: Sequence[Row]) -> tuple[Panel, ...]:
    """Size, time and what was lost, as far as they were measured."""
    files = [row for row in found if row.file is not None]
    panels = (_size(files), _time(files), _lost(found))
    return tuple(p for p in panels if any(bar.value is not None for bar in p.bars))


def _size(files: Sequence[Row]) -> Panel:
    top = max((r.bytes for r in files if r.bytes), default=1)
    bars = [Bar(r.precision, None if r.bytes is None else r.bytes / top, file_size(r.bytes)) for r in files]
    return Panel("Size", "of the file", tuple(bars))


def _time(files: Sequence[Row]) -> Panel:
    timed = [r.measurement for r in files if r.measurement is not None and r.measurement.p50_ms is not None]
    top = max((m.p90_ms or m.p50_ms or 0.0 for m in timed), default=1.0)
    bars = []
    for row in files:
        m = row.measurement
        if m is None or m.p50_ms is None or m.p90_ms is None:
            bars.append(Bar(row.precision, None, "not measured"))
        else:
            bars.append(Bar(row.precision, m.p50_ms / top, f"{milliseconds(m.p50_ms)} ms", m.p90_ms / top))
    return Panel("Time per call", "median, line to p90", tuple(bars))


def _lost(found: Sequence[Row]) -> Panel:
    """What was lost, so that bars can start at zero and still show it: points of accuracy, or else answers."""
    original = next((r.score.metric for r in found if r.file is None and r.score is not None), None)
    bars = []
    losses = [(r.precision, _loss(r.score, original)) for r in found if r.file is not None]
    top = max(FULL, *(v for _, v in losses if v is not None), 0.0)
    for precision, value in losses:
        text = "not measured" if value is None else number(value)
        bars.append(Bar(precision, None if value is None else max(value, 0.0) / top, text))
    if original is not None:
        return Panel("Accuracy lost", f"points below {number(original)} %", tuple(bars))
    return Panel("Other answers", "than the original, %", tuple(bars))


def _loss(score: Score | None, original: float | None) -> float | None:
    if score is None:
        return None
    if original is not None:
        return None if score.metric is None else original - score.metric
    return None if score.agreement is None else 100.0 - score.agreement
