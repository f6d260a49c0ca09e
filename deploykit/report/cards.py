"""The cards at the top of a report: one figure each, beside it the other files as bars."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from deploykit.core.figures import file_size, milliseconds, number, quotient
from deploykit.core.manifest import Manifest, Score
from deploykit.report.rows import Row, rows, unscored, untimed
from deploykit.report.words import decibels

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
class Card:
    """One figure of the most compressed file, and every file's bar. ``figure`` empty: not measured."""

    title: str
    figure: str
    unit: str
    beside: str
    """In a sentence: what it is compared with, or why it was not measured."""
    caption: str
    """What the bars are."""
    bars: tuple[Bar, ...]


def cards(manifest: Manifest) -> tuple[Card, ...]:
    """Size (of what the device reads), accuracy, time."""
    found = rows(manifest)
    files = [r for r in found if r.file is not None]
    if not files:
        return ()
    return _size(files), _accuracy(found, files, manifest), _time(files)


def _size(files: Sequence[Row]) -> Card:
    files = [r for r in files if r.file is not None and not r.file.read_instead]
    base, last = files[0], files[-1]
    top = max((r.bytes for r in files if r.bytes), default=1)
    bars = [Bar(r.precision, None if r.bytes is None else r.bytes / top, file_size(r.bytes)) for r in files]
    if last.bytes is None:
        return Card("Size", "", "", "its bytes were not noted", "bytes", tuple(bars))
    figure, _, unit = file_size(last.bytes).partition(" ")
    beside = f"the {last.precision} file"
    if last is not base:
        beside += f"; {quotient(last.size)} the {base.precision} file's {file_size(base.bytes)}"
    return Card("Size", figure, unit, beside, "bytes", tuple(bars))


def _time(files: Sequence[Row]) -> Card:
    base, last = files[0], files[-1]
    timed = [r.measurement for r in files if r.measurement is not None and r.measurement.p50_ms is not None]
    top = max((m.p90_ms or m.p50_ms or 0.0 for m in timed), default=1.0)
    bars = []
    for row in files:
        m = row.measurement
        if m is None or m.p50_ms is None:
            bars.append(Bar(row.precision, None, "not measured"))
        else:
            tick = None if m.p90_ms is None else m.p90_ms / top
            bars.append(Bar(row.precision, m.p50_ms / top, f"{milliseconds(m.p50_ms)} ms", tick))
    m = last.measurement
    if m is None or m.p50_ms is None:
        return Card("Time per call", "", "", untimed(last), "milliseconds", tuple(bars) if timed else ())
    beside = f"median of {m.runs:,} calls"
    b = base.measurement
    if last is not base and b is not None and b.p50_ms:
        beside += f"; {quotient(m.p50_ms / b.p50_ms)} the {base.precision} file's {milliseconds(b.p50_ms)} ms"
    return Card("Time per call", milliseconds(m.p50_ms), "ms", beside, "median, line to p90", tuple(bars))


def _accuracy(found: Sequence[Row], files: Sequence[Row], manifest: Manifest) -> Card:
    """Bars show what was lost, so that they can start at zero and still show it."""
    original = next((r.score.metric for r in found if r.file is None and r.score is not None), None)
    last = files[-1].score
    losses = [(r.precision, _loss(r.score, original)) for r in files]
    top = max(FULL, *(v for _, v in losses if v is not None), 0.0)
    bars = tuple(
        Bar(p, None if v is None else max(v, 0.0) / top, "not measured" if v is None else _lost(v, original is None))
        for p, v in losses
    )
    if last is None:
        return Card("Accuracy", "", "", unscored(manifest), "", bars if any(b.value is not None for b in bars) else ())
    where = f"on {last.samples:,} samples"
    if last.metric is not None:
        beside = where if original is None else f"the original model {number(original)} %, {where}"
        return Card("Accuracy", number(last.metric), "%", beside, "points lost", bars)
    if last.agreement is not None:
        beside = f"of its answers are the original model's, {where}"
        return Card("Same answers", number(last.agreement), "%", beside, "other answers, %", bars)
    if last.sqnr_db:
        name, worst = min(last.sqnr_db.items(), key=lambda item: item[1])
        beside = f"output {name} against the original model's, {where}"
        figure, _, unit = decibels(worst).partition(" ")
        return Card("Signal to noise", figure, unit, beside, "", ())
    return Card("Accuracy", "", "", "there is no output to compare", "", ())


def _loss(score: Score | None, original: float | None) -> float | None:
    if score is None:
        return None
    if original is not None:
        return None if score.metric is None else original - score.metric
    return None if score.agreement is None else 100.0 - score.agreement


def _lost(value: float, of_answers: bool) -> str:
    if of_answers or value >= 0.005:
        return number(max(value, 0.0))
    return f"{number(-value)} gained" if value <= -0.005 else "0.00"
