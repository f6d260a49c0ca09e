"""How figures are written for people. What was not measured is a dash, never 0."""

from __future__ import annotations

MISSING = "–"


def number(value: float | None, digits: int = 2) -> str:
    """``86.33``."""
    return MISSING if value is None else f"{value:.{digits}f}"


def milliseconds(value: float | None) -> str:
    """Three significant digits: ``0.0123``, ``1.23``, ``123``."""
    if value is None:
        return MISSING
    digits = 0 if value >= 100 else 1 if value >= 10 else 2 if value >= 1 else 3 if value >= 0.1 else 4
    return f"{value:.{digits}f}"


def file_size(value: int | None) -> str:
    """``842 B``, ``12.3 kB``, ``4.56 MB`` (powers of ten)."""
    if value is None:
        return MISSING
    if value < 1000:
        return f"{value} B"
    scaled, unit = (value / 1e3, "kB") if value < 1e6 else (value / 1e6, "MB") if value < 1e9 else (value / 1e9, "GB")
    return f"{scaled:.{2 if scaled < 10 else 1 if scaled < 100 else 0}f} {unit}"


def quotient(value: float | None) -> str:
    """``0.27×``."""
    return MISSING if value is None else f"{value:.2f}×"


def text(value: str | float | None) -> str:
    """A cell of a table: words as they are, whole numbers whole, others in three digits."""
    if value is None:
        return MISSING
    if isinstance(value, str):
        return value
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:.3g}"
