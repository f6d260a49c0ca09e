"""A map of coloured cells: one row per layer, one column per setting, the more colour the larger the value."""

from __future__ import annotations

from dataclasses import dataclass

from deploykit.core.figures import text
from deploykit.core.manifest import Finding

LEFT, TOP = 220.0, 40.0
CELL, LINE = 72.0, 20.0
LONGEST = 32
"""Letters of a row's name that there is room for."""
DEEPEST = 0.6
"""Opacity of the largest value: the number on it must stay readable, on light paper and on dark."""


@dataclass(frozen=True)
class Cell:
    """One value, in pixels."""

    left: float
    top: float
    opacity: float
    text: str
    said: str


@dataclass(frozen=True)
class Heat:
    """The map, in pixels."""

    title: str
    rows: tuple[tuple[float, str, str], ...]
    """Baseline, the name as far as there is room, the whole name."""
    columns: tuple[tuple[float, str], ...]
    """Middle and name."""
    cells: tuple[Cell, ...]
    width: float
    height: float


def heat(found: Finding) -> Heat | None:
    """The named columns of a finding as a map, rows and columns in the order in which they come."""
    if found.heat is None:
        return None
    row, column, value = (found.columns.index(name) for name in found.heat)
    values = [(text(r[row]), text(r[column]), r[value]) for r in found.rows]
    rows, columns = list(dict.fromkeys(r for r, _, _ in values)), list(dict.fromkeys(c for _, c, _ in values))
    numbers = {(r, c): v for r, c, v in values if isinstance(v, (int, float))}
    most = max([abs(v) for v in numbers.values()], default=0.0) or 1.0
    cells = tuple(
        Cell(
            LEFT + CELL * columns.index(c),
            TOP + LINE * rows.index(r),
            DEEPEST * abs(v) / most,
            text(v),
            f"{r}, {found.heat[1]} {c}: {found.heat[2]} {text(v)}",
        )
        for (r, c), v in numbers.items()
    )
    return Heat(
        f"{found.heat[2]} by {found.heat[0]} and {found.heat[1]}",
        tuple((TOP + LINE * (i + 0.7), _short(name), name) for i, name in enumerate(rows)),
        tuple((LEFT + CELL * (i + 0.5), name) for i, name in enumerate(columns)),
        cells,
        LEFT + CELL * len(columns),
        TOP + LINE * len(rows),
    )


def _short(name: str) -> str:
    """The end of a long name: paths differ there."""
    return name if len(name) <= LONGEST else "…" + name[1 - LONGEST :]
