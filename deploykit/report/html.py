"""Templates to pages: self-contained HTML, every string of the user's escaped."""

from __future__ import annotations

from typing import Any

from deploykit.core.errors import MissingExtra
from deploykit.core.figures import MISSING, file_size, milliseconds, number, quotient
from deploykit.report.layers import noise, percent
from deploykit.report.words import decibels, shape, title

GENERATOR = "deploykit"
"""In every page's head, so that a page of ours is known as such."""


def fill(template: str, **values: Any) -> str:
    """The page that a template of ``templates/`` makes of these values.

    Raises:
        MissingExtra: jinja2 is not installed.
    """
    try:
        import jinja2
    except ImportError:
        raise MissingExtra("writing report.html", "report") from None

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("deploykit.report", "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.globals |= {
        "generator": GENERATOR,
        "missing": MISSING,
        "decibels": decibels,
        "ms": milliseconds,
        "noise": noise,
        "number": number,
        "percent": percent,
        "quotient": quotient,
        "rate": _rate,
        "seconds": _seconds,
        "shape": shape,
        "size": file_size,
        "title": title,
    }
    return environment.get_template(template).render(**values)


def _rate(value: float | None) -> str:
    return MISSING if value is None else f"{value:,.0f}" if value >= 100 else milliseconds(value)


def _seconds(value: float | None) -> str:
    return "" if value is None or value < 0.05 else f"{value:.1f} s"
