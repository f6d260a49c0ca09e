"""An explanation in words: findings (tables, some with a curve) of what matters most, and sentences for the rest."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from deploykit.core.artifact import Island
from deploykit.core.errors import some
from deploykit.core.figures import file_size
from deploykit.core.manifest import Finding
from deploykit.core.precision import needs_calibration
from deploykit.explain.explanation import Alternative, Explanation, Measured, Operator
from deploykit.report.growth import growth
from deploykit.report.layers import grouped
from deploykit.report.words import decibels

STEP = "explain"
GAIN = 0.2
"""Decibels: less than that is no gain."""
TYPED = "add --calib DATA (what the export was given), in the folder the export was started in"


def summary(e: Explanation) -> str:
    """What the file is, in one line."""
    back = sum(o.state == "integer" and o.runs_in == "float" for o in e.operators)
    counts = [
        (e.count("integer"), f"integer{f' ({back} of them computed in float by the runtime)' if back else ''}"),
        (e.count("moves"), "moving integers"), (e.count("weights"), "with integer weights"),
        (e.count("float"), "in float"),
    ]  # fmt: skip
    said = ", ".join(f"{n} {what}" for n, what in counts if n)
    return f"{e.path} on {e.target}, {len(e.operators)} operators: {said}"


def findings(e: Explanation, rows: int | None = None) -> tuple[Finding, ...]:
    """What can be done first; tables of operators and ranges have so many rows (None: all)."""
    m = e.measured
    found = []
    if m is not None and _better(m):
        found.append(_alternatives(m))
    worst = [o for o in e.worst if o.share or m is None]
    if worst:
        found.append(_operators(e, worst, rows))
    if any(o.bits is not None for o in e.operators):
        found.append(_bits(e, rows))
    if m is not None and len(m.parts) > 1:
        found.append(_parts(m))
    return (*found, *growth(e.convergence))


def ranges(e: Explanation, rows: int) -> Finding:
    """Ranges as a table, those whose ends the fewest samples reach first."""
    wide = sorted(e.spans, key=lambda s: -s.stretch)[:rows]
    table = tuple(
        (s.name, float(s.low), float(s.high), 100.0 if s.cut is None else 100 * (s.cut[1] - s.cut[0]), s.stretch)
        for s in wide
    )
    columns = ("tensor", "low", "high", f"covered by {e.thresholds} %", "range / average sample's")
    return Finding(STEP, f"ranges, {_of(len(wide), e.tensors)}: those that few samples reach", columns, table)


def lines(e: Explanation) -> Iterator[str]:
    """What the tables do not say."""
    m = e.measured
    if m is not None:
        yield (
            f"answers: {decibels(m.quality.sqnr_db)} above the error on {m.samples} samples ({m.data}); what operators "
            f"lose alone adds up to {decibels(m.accounted_db)}, {m.input:.0f} % of it at the network's inputs"
        )
        idle = [a.what for a in m.alternatives if a.gain_db < GAIN]
        if idle:
            yield f"tried without gain: {', '.join(idle)}"
        yield from _enough(m)
    yield from e.notes
    floats = [Island(o.operator, o.layer, o.why) for o in e.operators if o.state == "float" and o.why]
    for group in grouped(floats):
        yield f"in float: {group.count} {group.operator} ({group.layers}): {group.why}"
    for reason, layers in _slow(e.operators).items():
        yield f"slow: {some(layers, 5)}: {reason}"
    if e.timed_on:
        yield f"times: {e.timed_on}"
    if m is None and needs_calibration(e.precision):
        yield f"to measure what operators contribute and what would be better: {TYPED}"


def _enough(m: Measured) -> Iterator[str]:
    if m.enough is not None:
        yield f"enough samples: from {m.enough} on answers are as good as with all {m.parts[-1].samples}"
        return
    half = next((p for p in reversed(m.parts) if 2 * p.samples <= m.parts[-1].samples), None)
    if half is not None:
        gained = m.parts[-1].quality.sqnr_db - half.quality.sqnr_db
        yield (
            f"not settled: from {half.samples} to {m.parts[-1].samples} samples the answers moved by {gained:+.1f} dB; "
            "more samples may help"
        )


def _slow(operators: Sequence[Operator]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for o in operators:
        for reason in o.slow:
            found.setdefault(reason, []).append(o.layer)
    return found


def _better(m: Measured) -> list[Alternative]:
    return [a for a in m.alternatives if a.gain_db >= GAIN]


def _alternatives(m: Measured) -> Finding:
    kind = "agreement" if m.quality.metric is None else "top-1"
    columns = ("what would be better", "gain dB", f"gain {kind}", "file", "CPU s", "how")
    rows = tuple(
        (a.what, round(a.gain_db, 2), a.gain_points, _growth_of_file(a.bytes), a.seconds, a.option) for a in _better(m)
    )
    return Finding(STEP, f"what would be better, measured on {m.samples} samples", columns, rows)


def _growth_of_file(count: int) -> str:
    return "same size" if count == 0 else f"{'+' if count > 0 else '-'}{file_size(abs(count))}"


def _operators(e: Explanation, worst: Sequence[Operator], rows: int | None) -> Finding:
    shares, timed = e.measured is not None, any(o.ms is not None for o in e.operators)
    columns = ["layer", "operator", "alone dB"]
    columns += (["weights %", "values %"] if shares else []) + (["ms"] if timed else [])
    table = []
    for o in worst[:rows]:
        row: list[str | float | None] = [o.layer, o.operator, o.sqnr_db]
        row += [o.weights, o.values] if shares else []
        row += [o.ms] if timed else []
        table.append(tuple(row))
    by = "by their share of the answers' error" if shares else "by their own error"
    return Finding(STEP, f"worst operators {by}, {_of(len(table), len(worst))}", tuple(columns), tuple(table))


def _bits(e: Explanation, rows: int | None) -> Finding:
    held = [o for o in e.operators if o.bits is not None]
    table = tuple((o.layer, o.operator, o.bits) for o in held[:rows])
    return Finding(STEP, f"bits of the weights, {_of(len(table), len(held))}", ("layer", "operator", "bits"), table)


def _parts(m: Measured) -> Finding:
    columns = ("samples", "answers dB", "agreement %", "top-1 %")
    rows = tuple((p.samples, p.quality.sqnr_db, p.quality.agreement, p.quality.metric) for p in m.parts)
    return Finding(STEP, "answers by number of calibration samples", columns, rows, ("samples", "answers dB"))


def _of(shown: int, there: int) -> str:
    return f"all {there}" if shown == there else f"{shown} of {there}"
