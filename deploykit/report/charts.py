"""The report's small charts as values: fractions of a panel's width and what stands beside them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from deploykit.core.figures import file_size, milliseconds, number
from deploykit.report.rows import Row


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
    """Size, time and accuracy (or agreement), as far as they were measured."""
    files = [row for row in found if row.file is not None]
    panels = (_size(files), _time(files), _accuracy(found))
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
    return Panel("Time per call", "median; the line ends at p90", tuple(bars))


def _accuracy(found: Sequence[Row]) -> Panel:
    """Accuracy where there were labels, else agreement with the original model. Both are percent."""
    scores = [(r.precision, r.score) for r in found]
    labelled = any(s is not None and s.metric is not None for _, s in scores)
    bars = []
    for precision, score in scores:
        value = None if score is None else score.metric if labelled else score.agreement
        text = "not measured" if value is None else f"{number(value)} %"
        bars.append(Bar(precision, None if value is None else max(value, 0.0) / 100.0, text))
    samples = next((s.samples for _, s in scores if s is not None), 0)
    title = "Accuracy" if labelled else "Agreement with the original"
    return Panel(title, f"percent of {samples:,} samples", tuple(bars))
