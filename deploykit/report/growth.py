"""How ranges grow with the number of calibration samples, as a table and a curve."""

from __future__ import annotations

from deploykit.calibration.growth import Convergence
from deploykit.core.manifest import Finding


def growth(found: Convergence | None) -> tuple[Finding, ...]:
    """One finding; none where there are too few samples, or the ranges do not tell."""
    if found is None or len(found.parts) < 2:
        return ()
    columns = ("samples", "widest range, still missing %", "median range, still missing %")
    rows = tuple(
        (size, 100 * most, 100 * middle)
        for size, most, middle in zip(found.parts, found.largest, found.median, strict=True)
    )
    said = found.sentence()
    title = "ranges by number of calibration samples" + (f": {said}" if said else "")
    return (Finding("calibrate", title, columns, rows, columns[:2]),)
