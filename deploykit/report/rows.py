"""`Row`: all that is known about one file in one place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from deploykit.core.artifact import File, Measurement
from deploykit.core.manifest import Manifest, Score
from deploykit.core.precision import is_quantized

ORIGINAL = "original"
"""Precision of the score of the model as it came in, which is no file."""


@dataclass(frozen=True)
class Row:
    """One line of a result table. None: not measured."""

    target: str
    precision: str
    file: File | None
    """None: the model as it came in."""
    bytes: int | None
    size: float | None
    """Bytes over those of the first file, the float baseline; None where only integer files were written."""
    score: Score | None
    measurement: Measurement | None


def rows(manifest: Manifest) -> tuple[Row, ...]:
    """The model as it came in, if it was scored, then every file in order."""
    scores = {s.precision: s for s in reversed(manifest.scores)}
    measured = {m.precision: m for m in reversed(manifest.measurements)}
    sizes = {s.path: s.bytes for s in manifest.stored}
    first = manifest.files[0] if manifest.files and not is_quantized(manifest.files[0].precision) else None
    base = None if first is None else _bytes(first, sizes)
    found = [Row(manifest.target, ORIGINAL, None, None, None, scores[ORIGINAL], None)] if ORIGINAL in scores else []
    for file in manifest.files:
        size = _bytes(file, sizes)
        found.append(
            Row(
                manifest.target,
                file.precision,
                file,
                size,
                size / base if size is not None and base else None,
                scores.get(file.precision),
                measured.get(file.precision),
            )
        )
    return tuple(found)


def _bytes(file: File, sizes: Mapping[str, int]) -> int | None:
    """Of the file and of what belongs to it."""
    if file.bytes is not None:
        return file.bytes
    found = [sizes.get(path) for path in (file.path, *file.parts)]
    return None if None in found else sum(size for size in found if size is not None)


def reason(where: str) -> str:
    """Why no time was taken."""
    return where.removeprefix("not run here: ")


def place(where: str) -> str:
    """Where a time was taken, or why none was: the files may well have been run here."""
    return where.replace("not run here:", "not timed here:", 1)


def untimed(row: Row) -> str:
    """Why a file has no time."""
    return reason(row.measurement.where) if row.measurement is not None else "it was not timed (--no-benchmark)"


def unscored(manifest: Manifest) -> str:
    """Why the files have no accuracy."""
    said = next((c.detail for c in manifest.checks if c.passed is None and c.name == "accuracy"), "")
    return said or "there was no data to score it on"
