"""Accuracy over time and over bytes: one point per file, the best ones marked (the Pareto front).

Only what was measured alike shares axes: one plot per data set, and for times one per machine and way of measuring.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from deploykit.core.artifact import Measurement
from deploykit.core.figures import file_size, milliseconds, number
from deploykit.core.manifest import Manifest
from deploykit.report.axes import Axis, around, positive
from deploykit.report.labels import Box, Label, Name, on_line, place
from deploykit.report.made import Made
from deploykit.report.rows import Row, rows, unscored, untimed

WIDTH, HEIGHT = 440.0, 330.0
LEFT, TOP, RIGHT, BOTTOM = 46.0, 28.0, 36.0, 42.0
"""Right of the frame is half of the last tick's text, as large as it is on a phone."""
STROKE = 4.0
"""What a line takes that no label shall stand on."""
NEAR = 9.0
"""Points this close (pixels) share a label."""
LEAST = 2.0
"""Points of accuracy an axis spans at least."""
NOT_THE_DEVICE = ", not the device"
ANSWERED = ", answered on "
"""Behind the name of the data where a device answered: the samples are the same."""


@dataclass(frozen=True)
class Entry:
    """One file of one artifact, with what tells whether two may be compared."""

    made: Made
    row: Row
    data: str
    """What it was scored on; empty: it was not."""
    machine: str
    """Where and how it was timed, without the runtime; empty: it was not."""

    @property
    def name(self) -> str:
        """``x86 int8``."""
        return f"{self.made.label} {self.row.precision}"

    @property
    def elsewhere(self) -> bool:
        """Whether it was timed on a machine that is not its target."""
        return self.row.measurement is not None and NOT_THE_DEVICE in self.row.measurement.where


@dataclass(frozen=True)
class Point:
    """One file in a plot."""

    entry: Entry
    x: float
    y: float
    left: float
    """Pixels, and so is ``top``."""
    top: float
    best: bool
    """On the Pareto front: no other is better in one and at least as good in the other."""


@dataclass(frozen=True)
class Plot:
    """One picture."""

    title: str
    caption: str
    x_name: str
    y_name: str
    x_ticks: tuple[tuple[float, str], ...]
    """Pixels and text."""
    y_ticks: tuple[tuple[float, str], ...]
    points: tuple[Point, ...]
    labels: tuple[Label, ...]
    front: str
    """SVG path through the best points."""
    original: float | None
    """Height of the original model's accuracy, in pixels."""
    elsewhere: bool
    """Whether a point was timed on a machine that is not its target."""
    best: tuple[str, ...]
    """Names on the front, the smallest or fastest first."""


@dataclass(frozen=True)
class Missing:
    """Files that are in no plot, and why."""

    names: tuple[str, ...]
    why: str


def entries(found: Sequence[Made]) -> tuple[Entry, ...]:
    """Every file of every artifact."""
    return tuple(
        Entry(made, row, _scored_on(made, row), _machine(made.manifest, row.measurement))
        for made in found
        for row in rows(made.manifest)
        if row.file is not None
    )


def over_bytes(found: Sequence[Entry]) -> tuple[Plot, ...]:
    """Accuracy over the size of the file, one plot per data set."""
    usable = [e for e in found if e.data and e.row.bytes]
    title = "Accuracy over size"
    return tuple(
        _plot(group, title, e.data, "size of the file", lambda e: float(e.row.bytes or 0), lambda v: file_size(int(v)))
        for group in _groups(usable, lambda e: (e.data,))
        for e in group[:1]
    )


def over_time(found: Sequence[Entry]) -> tuple[Plot, ...]:
    """Accuracy over the median time of a call, one plot per data set and machine."""
    usable = [e for e in found if e.data and e.machine]
    return tuple(
        _plot(group, "Accuracy over time", f"{e.machine}; {e.data}", "milliseconds per call", _time, milliseconds)
        for group in _groups(usable, lambda e: (e.data, e.machine))
        for e in group[:1]
    )


def left_out(found: Sequence[Entry]) -> tuple[Missing, ...]:
    """The files that have no time or no accuracy."""
    why: dict[str, dict[str, list[str]]] = {}
    for e in found:
        if not e.data:
            why.setdefault(f"not scored: {unscored(e.made.manifest)}", {}).setdefault(e.made.label, []).append(
                e.row.precision
            )
        if not e.machine:
            why.setdefault(f"no time: {untimed(e.row)}", {}).setdefault(e.made.label, []).append(e.row.precision)
    return tuple(
        Missing(tuple(f"{label} {', '.join(precisions)}" for label, precisions in files.items()), reason)
        for reason, files in why.items()
    )


def front(points: Sequence[tuple[float, float]]) -> set[int]:
    """Positions of the points (x, y) that no other beats: none has less x and as much y, or more y and as little x."""
    best: set[int] = set()
    top = float("-inf")
    for i in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1])):
        if points[i][1] > top or any(points[i] == points[j] for j in best):
            best.add(i)
            top = max(top, points[i][1])
    return best


def _scored_on(made: Made, row: Row) -> str:
    score = row.score
    if score is None or (score.metric is None and score.agreement is None):
        return ""
    role = "eval" if "eval" in made.manifest.data else "holdout"
    source = made.manifest.data.get(role)
    mark = f" (hash {source.hash[:8]})" if source is not None else ""
    return f"{score.samples:,} samples: {score.data.partition(ANSWERED)[0]}{mark}"


def _machine(manifest: Manifest, m: Measurement | None) -> str:
    """Where and how a file was timed, without the runtime, which is named last."""
    if m is None or m.p50_ms is None:
        return ""
    where = m.where.replace(NOT_THE_DEVICE, "")
    known = [manifest.device.text] if manifest.device else []
    known += [f"this machine: {manifest.machine.processor}"] if manifest.machine else []
    place = next((name for name in known if where.startswith(name)), where.rpartition(", ")[0] or where)
    return f"{place}, batch {m.batch}, {m.threads} thread{'s' if m.threads != 1 else ''}"


def _time(entry: Entry) -> float:
    assert entry.row.measurement is not None and entry.row.measurement.p50_ms is not None
    return entry.row.measurement.p50_ms


def _groups(found: Sequence[Entry], key: Callable[[Entry], tuple[str, ...]]) -> list[list[Entry]]:
    groups: dict[tuple[str, ...], list[Entry]] = {}
    for entry in found:
        groups.setdefault(key(entry), []).append(entry)
    return list(groups.values())


def _plot(
    group: Sequence[Entry],
    title: str,
    caption: str,
    x_name: str,
    x_of: Callable[[Entry], float],
    written: Callable[[float], str],
) -> Plot:
    scores = [e.row.score for e in group if e.row.score is not None]
    by_metric = all(s.metric is not None for s in scores)
    values = [(s.metric if by_metric else s.agreement) or 0.0 for s in scores]
    y_name = "accuracy, %" if by_metric else "same answer as the original model, %"
    sought = [s.metric for e in group for s in e.made.manifest.scores if s.precision == "original"]
    original = next((m for m in sought if m is not None), None) if by_metric else None
    y_axis = around([*values, *([] if original is None else [original])], LEAST, 100.0)
    x_axis = positive([x_of(e) for e in group])
    best = front([(x_of(e), y) for e, y in zip(group, values, strict=True)])
    points = tuple(
        Point(e, x_of(e), y, _left(x_axis, x_of(e)), _top(y_axis, y), i in best)
        for i, (e, y) in enumerate(zip(group, values, strict=True))
    )
    line = None if original is None else _top(y_axis, original)
    ahead = sorted((p for p in points if p.best), key=lambda p: (p.x, -p.y))
    step = y_axis.ticks[1] - y_axis.ticks[0] if len(y_axis.ticks) > 1 else 1.0
    digits = 0 if step == int(step) else 1 if step * 10 == int(step * 10) else 2
    return Plot(
        title, caption, x_name + (" (logarithmic)" if x_axis.logarithmic else ""), y_name,
        tuple((_left(x_axis, t), "0" if t == 0 else written(t)) for t in x_axis.ticks),
        tuple((_top(y_axis, t), number(t, digits)) for t in y_axis.ticks),
        points, _labels(points, x_of is _time, line, _strokes(ahead)), _steps(ahead), line,
        x_of is _time and any(e.elsewhere for e in group),
        tuple(p.entry.name for p in ahead),
    )  # fmt: skip


def _left(axis: Axis, value: float) -> float:
    return LEFT + (WIDTH - LEFT - RIGHT) * axis(value)


def _top(axis: Axis, value: float) -> float:
    return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * axis(value)


def _steps(ahead: Sequence[Point]) -> str:
    """Whoever allows so many bytes or milliseconds gets this accuracy: flat until the next better point, then up."""
    if not ahead:
        return ""
    path = f"M{ahead[0].left:.1f} {HEIGHT - BOTTOM:.1f}V{ahead[0].top:.1f}"
    for p in ahead[1:]:
        path += f"H{p.left:.1f}V{p.top:.1f}"
    return f"{path}H{WIDTH - RIGHT:.1f}"


def _strokes(ahead: Sequence[Point]) -> list[Box]:
    """What `_steps` covers."""
    half, floor = STROKE / 2, HEIGHT - BOTTOM
    found = []
    for p, after in zip(ahead, [*ahead[1:], None], strict=True):
        end = WIDTH - RIGHT if after is None else after.left
        found.append(Box(p.left - half, p.top, p.left + half, floor))
        found.append(Box(p.left, p.top - half, end, p.top + half))
        floor = p.top
    return found


def _labels(points: Sequence[Point], starred: bool, line: float | None, strokes: Sequence[Box]) -> tuple[Label, ...]:
    """A label per point, or per several that lie on one another, and one for the line of the original model."""
    names = []
    for cluster in _clusters(points):
        star = " *" if starred and any(p.entry.elsewhere for p in cluster) else ""
        owners = {p.entry.made.label for p in cluster}
        owner = owners.pop() if len(owners) == 1 else ""
        names.append(Name(_named(cluster) + star, cluster[0].left, cluster[0].top, owner))
    places = [(p.left, p.top) for p in points]
    frame = Box(LEFT, 0.0, WIDTH - RIGHT, HEIGHT - BOTTOM)
    if line is None:
        return place(names, places, strokes, frame)
    level = Box(frame.left, line - STROKE / 2, frame.right, line + STROKE / 2)
    there = on_line("original model", line, places, strokes, frame)
    return (there, *place(names, places, [there.box, level, *strokes], frame))


def _clusters(points: Sequence[Point]) -> list[list[Point]]:
    clusters: list[list[Point]] = []
    for p in points:
        for cluster in clusters:
            if abs(cluster[0].left - p.left) < NEAR and abs(cluster[0].top - p.top) < NEAR:
                cluster.append(p)
                break
        else:
            clusters.append([p])
    return clusters


def _named(cluster: Sequence[Point]) -> str:
    """``x86 int8``; ``x86, jetson int8``; ``int8 ×5``."""
    labels = list(dict.fromkeys(p.entry.made.label for p in cluster))
    precisions = list(dict.fromkeys(p.entry.row.precision for p in cluster))
    if len(labels) == 1 or (len(precisions) == 1 and len(labels) == 2):
        return f"{', '.join(labels)} {', '.join(precisions)}"
    if len(cluster) == 2:
        return ", ".join(p.entry.name for p in cluster)
    return f"{', '.join(precisions)} ×{len(cluster)}"
