"""The pictures of the documentation, as SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

COLOURS = ("#3b6ea5", "#c0504d", "#6a9a3b", "#7d5ba6", "#d08a2e", "#3d97a8", "#8c6d5a", "#b35a9c", "#5c6b7a", "#a0a032")
Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Bars:
    """Shares of something that is 1."""

    title: str
    shares: Mapping[str, float]
    one: str
    """What 1 stands for."""


def bars(shown: Bars) -> str:
    """A bar per share, and a line at 1."""
    left, full, step = 220, 400, 34
    height = 70 + step * len(shown.shares)
    shapes = [
        f'<text x="16" y="28" font-size="16">{escape(shown.title)}</text>',
        f'<path d="M{left + full} 44V{height - 16}" stroke="#888" stroke-dasharray="4 3"/>',
        f'<text x="{left + full + 6}" y="{height - 18}" fill="#555">{escape(shown.one)}</text>',
    ]
    for i, (label, value) in enumerate(shown.shares.items()):
        y = 50 + step * i
        shapes += [
            f'<text x="{left - 10}" y="{y + 17}" text-anchor="end">{escape(label)}</text>',
            f'<rect x="{left}" y="{y}" width="{full * value:.1f}" height="24" fill="#3b6ea5"/>',
            f'<text x="{left + full * value + 6:.1f}" y="{y + 17}">{value:.2f}</text>',
        ]
    return _drawn(720, height, shapes)


def lines(title: str, curves: Mapping[str, Points], unit: str = "%", ticks: Sequence[float] = ()) -> str:
    """A curve per name over one x, percent on the y-axis; the legend in the order of the best values.

    Args:
        title: above it.
        curves: points by name; a single one is a dot.
        unit: of x.
        ticks: on the x-axis; every x, where there are none.
    """
    left, top, wide, high = 50, 44, 500, 300
    xs = sorted(ticks or {x for points in curves.values() for x, _ in points})
    ys = [y for points in curves.values() for _, y in points]
    low, span = 10 * (min(ys) // 10), 10 * (max(ys) // 10 + 1) - 10 * (min(ys) // 10)

    def at(x: float, y: float) -> tuple[float, float]:
        return left + wide * (x - xs[0]) / (xs[-1] - xs[0]), top + high * (1 - (y - low) / span)

    shapes = [f'<text x="16" y="24" font-size="16">{escape(title)}</text>']
    for x in xs:
        px, py = at(x, low)
        shapes.append(f'<text x="{px:.0f}" y="{py + 20:.0f}" text-anchor="middle">{x:g} {unit}</text>')
    for tick in range(int(low), int(low + span) + 1, 10 if span <= 60 else 20):
        px, py = at(xs[0], tick)
        shapes += [
            f'<path d="M{px:.0f} {py:.0f}h{wide}" stroke="#ddd"/>',
            f'<text x="{px - 8:.0f}" y="{py + 5:.0f}" text-anchor="end">{tick}</text>',
        ]
    order = sorted(curves, key=lambda name: -max(curves[name])[1])
    for i, name in enumerate(order):
        colour = COLOURS[i % len(COLOURS)]
        path = "L".join("{:.1f} {:.1f}".format(*at(x, y)) for x, y in sorted(curves[name]))
        y = top + 12 + 22 * i
        shapes += [f'<circle cx="{px:.1f}" cy="{py:.1f}" r="3" fill="{colour}"/>'
                   for px, py in (at(x, y_) for x, y_ in curves[name])]  # fmt: skip
        shapes += [
            f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="2"/>',
            f'<path d="M{left + wide + 20} {y}h22" stroke="{colour}" stroke-width="3"/>',
            f'<text x="{left + wide + 50}" y="{y + 5}">{escape(name)}</text>',
        ]
    return _drawn(left + wide + 60 + 8 * max(map(len, curves)), top + high + 40, shapes)


def _drawn(width: int, height: int, shapes: Sequence[str]) -> str:
    body = "\n".join(shapes)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        f'font-size="14">\n<rect width="{width}" height="{height}" fill="white"/>\n{body}\n</svg>\n'
    )
