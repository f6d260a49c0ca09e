"""What steps found out: their tables, and a curve or a map where they have one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from deploykit.core.figures import text
from deploykit.core.manifest import Finding
from deploykit.report.axes import Axis, from_zero
from deploykit.report.heat import Heat, heat

WIDTH, HEIGHT = 440.0, 260.0
LEFT, TOP, RIGHT, BOTTOM = 60.0, 28.0, 24.0, 42.0


@dataclass(frozen=True)
class Curve:
    """A line through points, in pixels."""

    x_name: str
    y_name: str
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]
    points: tuple[tuple[float, float, str], ...]
    """Left, top, and what is said about the point."""
    path: str


@dataclass(frozen=True)
class Shown:
    """One finding in words."""

    title: str
    columns: tuple[str, ...]
    numeric: tuple[bool, ...]
    """Whether a column holds numbers."""
    rows: tuple[tuple[str, ...], ...]
    curve: Curve | None
    heat: Heat | None
    summary: str


def shown(findings: Sequence[Finding]) -> tuple[Shown, ...]:
    """All of them, in order."""
    return tuple(
        Shown(
            found.title,
            found.columns,
            tuple(any(isinstance(row[i], (int, float)) for row in found.rows) for i in range(len(found.columns))),
            tuple(tuple(text(value) for value in row) for row in found.rows),
            _curve(found),
            heat(found),
            found.summary,
        )
        for found in findings
    )


def _curve(found: Finding) -> Curve | None:
    """The named columns over each other, as far as both are numbers."""
    if found.curve is None:
        return None
    x, y = (found.columns.index(name) for name in found.curve)
    pairs = []
    for row in found.rows:
        at, over = row[x], row[y]
        if isinstance(at, (int, float)) and isinstance(over, (int, float)):
            said = " ".join(f"{c} {text(v)}" for c, v in zip(found.columns, row, strict=True) if v)
            pairs.append((float(at), float(over), said))
    pairs.sort()
    if len(pairs) < 2:
        return None
    x_axis, y_axis = (from_zero(max(values)) for values in list(zip(*pairs, strict=True))[:2])
    points = tuple((_left(x_axis, a), _top(y_axis, b), text) for a, b, text in pairs)
    return Curve(
        *found.curve,
        tuple((_left(x_axis, tick), f"{tick:.3g}") for tick in x_axis.ticks),
        tuple((_top(y_axis, tick), f"{tick:.3g}") for tick in y_axis.ticks),
        points,
        "M" + "L".join(f"{left:.1f} {top:.1f}" for left, top, _ in points),
    )


def _left(axis: Axis, value: float) -> float:
    return LEFT + (WIDTH - LEFT - RIGHT) * axis(value)


def _top(axis: Axis, value: float) -> float:
    return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * axis(value)
