"""Text beside points: placed where it covers least. Pixels throughout, downwards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

Anchor = Literal["start", "middle", "end"]

CHARACTER, LINE = 6.6, 13.0
"""What a character of a label needs, and a line of text."""
POINT = 6.0
"""Half the side of the square that a point needs."""
BESIDE = 9.0
"""From a point to the text beside it."""
GAP = 6.0
"""Between two texts on one line."""
LINES = (0.0, -1.0, 1.0, -2.0, 2.0, -3.0, 3.0)
"""How far from its point's line a text may stand; the first that covers nothing is taken."""


class Box(NamedTuple):
    """A rectangle."""

    left: float
    top: float
    right: float
    bottom: float

    def overlap(self, other: Box) -> float:
        """Square pixels."""
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.bottom, other.bottom) - max(self.top, other.top)
        return max(width, 0.0) * max(height, 0.0)


@dataclass(frozen=True)
class Name:
    """What a point is called, and whose it is (empty: of several)."""

    text: str
    left: float
    top: float
    owner: str = ""


@dataclass(frozen=True)
class Label:
    """A name and where its text is anchored on its base line."""

    name: Name
    left: float
    top: float
    anchor: Anchor

    @property
    def far(self) -> bool:
        """Whether the eye needs a line from the point to the text."""
        return abs(self.top - 4 - self.name.top) > 1.5 * LINE

    @property
    def box(self) -> Box:
        """What it covers."""
        width = CHARACTER * len(self.name.text) + GAP
        start = self.left - {"start": 0.0, "middle": width / 2, "end": width}[self.anchor]
        return Box(start, self.top - LINE + 3, start + width, self.top + 3)


def place(
    names: Sequence[Name], points: Sequence[tuple[float, float]], taken: Sequence[Box], frame: Box
) -> tuple[Label, ...]:
    """One label per name, from the right to the left, each where it covers least.

    Args:
        names: at their points.
        points: what shall not be covered.
        taken: nor that.
        frame: nor shall a label leave this, which counts four times.
    """
    covered = [*taken, *(_square(x, y) for x, y in points)]
    placed = []
    for name in sorted(names, key=lambda n: -n.left):
        options = _around(name)
        costs = [sum(o.box.overlap(b) for b in covered) + 4 * _outside(o.box, frame) for o in options]
        best = options[costs.index(min(costs))]
        covered.append(best.box)
        placed.append(best)
    return tuple(placed)


def on_line(text: str, line: float, points: Sequence[tuple[float, float]], taken: Sequence[Box], frame: Box) -> Label:
    """The name of a level line: above or below one of its ends, where it covers least."""
    name = Name(text, frame.right, line)
    ends: tuple[tuple[float, Anchor], ...] = ((frame.right, "end"), (frame.left + 4, "start"))
    options = [Label(name, left, line + down, anchor) for down in (-5.0, LINE) for left, anchor in ends]
    covered = [*taken, *(_square(*p) for p in points)]
    costs = [sum(o.box.overlap(b) for b in covered) for o in options]
    return options[costs.index(min(costs))]


def _square(x: float, y: float) -> Box:
    return Box(x - POINT, y - POINT, x + POINT, y + POINT)


def _around(name: Name) -> list[Label]:
    found: list[Label] = []
    for lines in LINES:
        base = name.top + 4 + lines * LINE
        found += [Label(name, name.left + BESIDE, base, "start"), Label(name, name.left - BESIDE, base, "end")]
        found += [Label(name, name.left, base, "middle")] if lines else []
    return found


def _outside(box: Box, frame: Box) -> float:
    return (box.right - box.left) * (box.bottom - box.top) - box.overlap(frame)
